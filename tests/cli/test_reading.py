"""``history``, ``status`` and ``logs``: commands that read storage and print."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import Result

Call = Callable[..., Result]


def test_history_lists_runs(call: Call, url: str) -> None:
    result = call("history", "--storage", url)
    assert result.exit_code == 0
    (demo,) = [text for text in result.stdout.splitlines() if text.startswith("demo")]
    assert demo.split()[1:7] == ["finished", "40", "2", "1", "5", "52.0"]
    assert "open" in result.stdout and "not finished" in result.stdout


def test_history_of_one_run(call: Call, url: str) -> None:
    result = call("history", "demo", "--storage", url)
    assert result.exit_code == 0
    for wanted in ("rank 2 was killed by SIGKILL", "node-b/0", "restart", "5 steps", "ETTR 52.0 %", "4.0"):
        assert wanted in result.stdout, wanted


def test_history_json_is_json_alone(call: Call, url: str) -> None:
    one = json.loads(call("history", "demo", "--storage", url, "--json").stdout)
    assert one["incidents"][0]["lost_steps"] == 5
    assert one["generations"][1]["start_step"] == 20
    every = json.loads(call("history", "--storage", url, "--json").stdout)
    assert [run["run"] for run in every["runs"]] == ["demo", "open"]


def test_history_sql(call: Call, url: str) -> None:
    query = "SELECT step, tier FROM checkpoints WHERE state = 'kept' AND tier = 'shared' ORDER BY step"
    result = call("history", "demo", "--storage", url, "--sql", query, "--json")
    assert json.loads(result.stdout) == [{"step": 30, "tier": "shared"}, {"step": 40, "tier": "shared"}]
    table = call("history", "demo", "--storage", url, "--sql", query).stdout
    assert table.split()[:2] == ["step", "tier"] and "40" in table


def test_a_wrong_query_is_bad_usage(call: Call, url: str) -> None:
    result = call("history", "--storage", url, "--sql", "SELECT * FROM nothing")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "nothing" in result.stderr and "hint: views:" in result.stderr
    assert "Traceback" not in result.stderr


def test_storage_from_the_environment(call: Call, url: str) -> None:
    assert "demo" in call("history", env={"RESILIENCE_STORAGE": url}).stdout


def test_no_runs_is_said(call: Call, tmp_path: Path) -> None:
    result = call("history", "--storage", str(tmp_path))
    assert (result.exit_code, result.stdout) == (
        0,
        f"no runs under {tmp_path} (another place: --storage URL or RESILIENCE_STORAGE)\n",
    )
    assert json.loads(call("history", "--storage", str(tmp_path), "--json").stdout)["runs"] == []


@pytest.mark.parametrize("command", ["history", "status", "verify", "logs"])
def test_an_unknown_run_suggests_and_lists(call: Call, url: str, command: str) -> None:
    result = call(command, "dmo", "--storage", url)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "error: there is no run 'dmo'" in result.stderr
    assert "hint: did you mean 'demo'? runs here: demo, open" in result.stderr


def test_damage_is_warned_of_and_keeps_json_clean(call: Call, tmp_path: Path, build: ModuleType) -> None:
    build.whole_run(str(tmp_path))
    (segment,) = (tmp_path / "demo/events/g2").rglob("*.jsonl")
    segment.write_bytes(segment.read_bytes()[:-40])
    assert "torn" in call("history", "--storage", str(tmp_path)).stderr
    assert "torn" in call("history", "demo", "--storage", str(tmp_path)).stdout
    query = ("--sql", "SELECT count(*) AS n FROM events", "--json")
    result = call("history", "--storage", str(tmp_path), *query)
    assert "torn" in result.stderr and json.loads(result.stdout)[0]["n"] > 50
    assert (
        "torn"
        in json.loads(call("history", "--storage", str(tmp_path), "--json").stdout)["warnings"][0]["message"]
    )


def test_picture(call: Call, url: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    target = tmp_path / "loss.png"
    result = call("history", "demo", "--storage", url, "--picture", str(target))
    assert (result.exit_code, result.stdout.strip()) == (0, str(target))
    assert target.read_bytes().startswith(b"\x89PNG")
    assert call("history", "--storage", url, "--picture", str(target)).exit_code == 2


def test_status(call: Call, url: str) -> None:
    result = call("status", "open", "--storage", url)
    assert result.exit_code == 0
    assert "recovering from: rank 2 was killed by SIGKILL: restart" in result.stdout
    assert "checkpoint in nvme: step 20" in result.stdout and "checkpoint in shared: step 10" in result.stdout
    assert "its supervisor may be gone" in result.stdout  # 2023 is long ago
    done = json.loads(call("status", "demo", "--storage", url, "--json").stdout)
    assert (done["phase"], done["result"], done["step"], done["checkpoint"]["step"]) == (
        "done",
        "finished",
        40,
        40,
    )


def test_watch_goes_on_until_the_end(call: Call, tmp_path: Path, build: ModuleType) -> None:
    run = build.first_generation(str(tmp_path), "r")

    def finish() -> None:
        run.tell(9.0, "run.finished", {"result": "interrupted", "reason": "Ctrl-C", "steps": 25})
        run.seal()

    timer = threading.Timer(1.0, finish)
    timer.start()
    result = call("status", "r", "--storage", str(tmp_path), "--watch", "--json")
    timer.join()
    lines = [json.loads(text) for text in result.stdout.splitlines()]
    assert [it["phase"] for it in (lines[0], lines[-1])] == ["fencing", "done"]
    assert lines[-1]["result"] == "interrupted"


def test_logs(call: Call, url: str) -> None:
    every = call("logs", "demo", "--storage", url)
    assert every.stdout == "==> generation 2, rank 0 <==\ntwo zero\n==> generation 2, rank 1 <==\ntwo one\n"
    assert call("logs", "demo", "--storage", url, "--rank", "1").stdout == "two one\n"
    assert call("logs", "demo", "--storage", url, "--generation", "1").stdout == "one zero\n"
    found = json.loads(call("logs", "demo", "--storage", url, "--rank", "0", "--json").stdout)
    assert found == [{"generation": 2, "rank": 0, "output": "two zero\n"}]


def test_logs_that_are_not_there(call: Call, url: str) -> None:
    assert "ranks 0, 1" in call("logs", "demo", "--storage", url, "--rank", "7").stderr
    assert "generations 1, 2" in call("logs", "demo", "--storage", url, "--generation", "9").stderr
    assert "has no output yet" in call("logs", "open", "--storage", url).stderr


@pytest.mark.parametrize(
    "command", ["history demo", "history", "status demo", "verify demo", "history demo --sql \"select '→'\""]
)
def test_a_locale_without_our_characters_is_no_error(
    process: Callable[..., subprocess.CompletedProcess[str]], url: str, command: str
) -> None:
    result = process(f"PYTHONIOENCODING=ascii $R {command} --storage {url}")
    assert "UnicodeEncodeError" not in result.stderr
    assert result.returncode == (1 if "verify" in command else 0), result.stderr
    assert result.stdout.isascii()
