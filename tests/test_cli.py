"""The command line, mostly in process through click's runner, and a few times as a real process."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from resilience import errors
from resilience.cli import main
from resilience.cli.main import COMMANDS, exit_code, tell
from resilience.cli.run import parse_settings

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def build() -> ModuleType:
    path = Path(__file__).parent / "history" / "builder.py"
    spec = importlib.util.spec_from_file_location("resilience_cli_builder", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, build: ModuleType) -> str:
    """Two runs: ``demo``, finished, and ``open``, in the middle of an incident; with the output of some ranks."""
    root = tmp_path_factory.mktemp("runs")
    build.whole_run(str(root))
    build.first_generation(str(root), "open")
    for generation, rank, text in ((1, 0, "one zero\n"), (2, 0, "two zero\n"), (2, 1, "two one")):
        path = root / "demo" / "logs" / f"g{generation}" / f"rank-{rank}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(root)


def _call(*args: str, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(main, list(args), env={"RESILIENCE_STORAGE": "", **(env or {})})


def _process(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "resilience.cli", *args],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **env},
        timeout=60,
        check=False,
    )


# history


def test_history_lists_runs(url: str) -> None:
    result = _call("history", "--storage", url)
    assert result.exit_code == 0
    (demo,) = [text for text in result.stdout.splitlines() if text.startswith("demo")]
    assert demo.split()[1:7] == ["finished", "40", "2", "1", "5", "52.0"]
    assert "open" in result.stdout and "not finished" in result.stdout


def test_history_of_one_run(url: str) -> None:
    result = _call("history", "demo", "--storage", url)
    assert result.exit_code == 0
    for wanted in ("rank 2 was killed by SIGKILL", "node-b/0", "restart", "5 steps", "ETTR 52.0 %", "4.0"):
        assert wanted in result.stdout, wanted


def test_history_json_is_json_alone(url: str) -> None:
    one = json.loads(_call("history", "demo", "--storage", url, "--json").stdout)
    assert one["incidents"][0]["lost_steps"] == 5
    assert one["generations"][1]["start_step"] == 20
    every = json.loads(_call("history", "--storage", url, "--json").stdout)
    assert [run["run"] for run in every["runs"]] == ["demo", "open"]


def test_history_sql(url: str) -> None:
    query = "SELECT step, tier FROM checkpoints WHERE state = 'kept' AND tier = 'shared' ORDER BY step"
    result = _call("history", "demo", "--storage", url, "--sql", query, "--json")
    assert json.loads(result.stdout) == [{"step": 30, "tier": "shared"}, {"step": 40, "tier": "shared"}]
    table = _call("history", "demo", "--storage", url, "--sql", query).stdout
    assert table.split()[:2] == ["step", "tier"] and "40" in table


def test_a_wrong_query_is_bad_usage(url: str) -> None:
    result = _call("history", "--storage", url, "--sql", "SELECT * FROM nothing")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "nothing" in result.stderr and "hint: views:" in result.stderr
    assert "Traceback" not in result.stderr


def test_storage_from_the_environment(url: str) -> None:
    assert "demo" in _call("history", env={"RESILIENCE_STORAGE": url}).stdout


def test_no_runs_is_said(tmp_path: Path) -> None:
    result = _call("history", "--storage", str(tmp_path))
    assert (result.exit_code, result.stdout) == (
        0,
        f"no runs under {tmp_path} (another place: --storage URL or RESILIENCE_STORAGE)\n",
    )
    assert json.loads(_call("history", "--storage", str(tmp_path), "--json").stdout)["runs"] == []


@pytest.mark.parametrize("command", ["history", "status", "verify", "logs"])
def test_an_unknown_run_suggests_and_lists(url: str, command: str) -> None:
    result = _call(command, "dmo", "--storage", url)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "error: there is no run 'dmo'" in result.stderr
    assert "hint: did you mean 'demo'? runs here: demo, open" in result.stderr


def test_damage_is_warned_of_and_keeps_json_clean(tmp_path: Path, build: ModuleType) -> None:
    build.whole_run(str(tmp_path))
    (segment,) = (tmp_path / "demo/events/g2").rglob("*.jsonl")
    segment.write_bytes(segment.read_bytes()[:-40])
    assert "torn" in _call("history", "--storage", str(tmp_path)).stderr
    assert "torn" in _call("history", "demo", "--storage", str(tmp_path)).stdout
    query = ("--sql", "SELECT count(*) AS n FROM events", "--json")
    result = _call("history", "--storage", str(tmp_path), *query)
    assert "torn" in result.stderr and json.loads(result.stdout)[0]["n"] > 50
    assert (
        "torn"
        in json.loads(_call("history", "--storage", str(tmp_path), "--json").stdout)["warnings"][0]["message"]
    )


def test_picture(url: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    target = tmp_path / "loss.png"
    result = _call("history", "demo", "--storage", url, "--picture", str(target))
    assert (result.exit_code, result.stdout.strip()) == (0, str(target))
    assert target.read_bytes().startswith(b"\x89PNG")
    assert _call("history", "--storage", url, "--picture", str(target)).exit_code == 2


# status


def test_status(url: str) -> None:
    result = _call("status", "open", "--storage", url)
    assert result.exit_code == 0
    assert "recovering from: rank 2 was killed by SIGKILL: restart" in result.stdout
    assert "checkpoint in nvme: step 20" in result.stdout and "checkpoint in shared: step 10" in result.stdout
    assert "its supervisor may be gone" in result.stdout  # 2023 is long ago
    done = json.loads(_call("status", "demo", "--storage", url, "--json").stdout)
    assert (done["phase"], done["result"], done["step"], done["checkpoint"]["step"]) == (
        "done",
        "finished",
        40,
        40,
    )


def test_watch_goes_on_until_the_end(tmp_path: Path, build: ModuleType) -> None:
    run = build.first_generation(str(tmp_path), "r")

    def finish() -> None:
        run.tell(9.0, "run.finished", {"result": "interrupted", "reason": "Ctrl-C", "steps": 25})
        run.seal()

    timer = threading.Timer(1.0, finish)
    timer.start()
    result = _call("status", "r", "--storage", str(tmp_path), "--watch", "--json")
    timer.join()
    lines = [json.loads(text) for text in result.stdout.splitlines()]
    assert [it["phase"] for it in (lines[0], lines[-1])] == ["fencing", "done"]
    assert lines[-1]["result"] == "interrupted"


# verify


@pytest.fixture
def saved(tmp_path: Path, build: ModuleType) -> Path:
    """A run with real packs: steps 10 and 20 in shared storage, 20 in the near tier."""
    run = build.Builder(str(tmp_path / "runs"), "r")
    run.start(0.0, nvme=str(tmp_path / "nvme"))
    run.fence(1.0, 1)
    run.save(2.0, 10, "shared")
    run.save(3.0, 20, "nvme", nvme=str(tmp_path / "nvme"))
    run.save(4.0, 20, "shared")
    run.seal()
    return tmp_path


def _flip(path: Path, offset: int) -> None:
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def _verify(saved: Path, *args: str) -> Result:
    return _call("verify", "r", "--storage", str(saved / "runs"), *args)


def test_verify_a_whole_run(saved: Path) -> None:
    result = _verify(saved)
    assert result.exit_code == 0, result.output
    assert result.stdout.count(": whole") == 3
    assert result.stdout.splitlines()[-1] == "3 whole; the commit log is whole"
    document = json.loads(_verify(saved, "--json").stdout)
    assert document["ok"] is True
    assert [(it["step"], it["tier"]) for it in document["checkpoints"]] == [
        (20, "nvme"),
        (20, "shared"),
        (10, "shared"),
    ]


@pytest.mark.parametrize("tier", ["shared", "nvme"])
def test_verify_names_file_and_byte_range(saved: Path, tier: str) -> None:
    pack = "checkpoints/step-20-g1/rank-2.pack"
    _flip(saved / ("runs/r" if tier == "shared" else "nvme/r/node-b") / pack, 100)
    result = _verify(saved)
    assert result.exit_code == 1
    assert f"step 20, generation 1, {tier}: damaged" in result.stdout
    assert f"  {pack} bytes 0..4004: " in result.stdout
    assert result.stdout.splitlines()[-1] == "2 whole, 1 damaged; the commit log is whole"
    document = json.loads(_verify(saved, "--json").stdout)
    (bad,) = [it for it in document["checkpoints"] if it["damage"]]
    assert document["ok"] is False
    assert [bad["damage"][0][key] for key in ("path", "start", "end")] == [pack, 0, 4004]
    assert _verify(saved, "--step", "10").exit_code == 0  # that one is whole
    assert _verify(saved, "--step", "20").exit_code == 1


def test_verify_a_missing_pack_and_a_missing_part(saved: Path) -> None:
    (saved / "runs/r/checkpoints/step-20-g1/rank-1.pack").unlink()
    (saved / "runs/r/checkpoints/step-10-g1/rank-3.json").unlink()
    result = _verify(saved)
    assert result.exit_code == 1
    assert "rank-1.pack" in result.stdout and "rank-3.json" in result.stdout
    assert "1 whole, 2 damaged" in result.stdout


def test_verify_of_a_run_that_goes_on(
    saved: Path, build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Between reading the log and reading the packs the run retires step 10 and deletes it: that is no damage.
    from resilience.cli import verify
    from resilience.journal.records import Kind

    def retire(_reader: object) -> None:
        run = build.Builder(str(saved / "runs"), "r", source="supervisor-2")
        run.fence(9.0, 2)
        run.log.append(Kind.RETIRE, {"refs": [{"step": 10, "generation": 1}]})
        for path in (saved / "runs/r/checkpoints/step-10-g1").iterdir():
            path.unlink()

    monkeypatch.setattr(verify, "_nvme", retire)
    result = _verify(saved)
    assert result.exit_code == 0, result.output
    assert "step 10, generation 1, shared: retired meanwhile" in result.stdout


def test_verify_says_what_is_not_on_this_machine(saved: Path) -> None:
    (saved / "nvme/r/node-b").rename(saved / "elsewhere")
    result = _verify(saved)
    assert result.exit_code == 0
    assert "step 20, generation 1, nvme: not on this machine (node node-b)" in result.stdout
    assert "2 whole, 1 not on this machine" in result.stdout


def test_verify_the_commit_log_too(saved: Path) -> None:
    _flip(saved / "runs/r/log" / f"{2:020d}.json", 30)
    result = _verify(saved)
    assert result.exit_code == 1
    assert f"{2:020d}.json" in result.stdout and "1 damaged record" in result.stdout


def test_verify_an_unknown_step(saved: Path) -> None:
    result = _verify(saved, "--step", "15")
    assert result.exit_code == 2
    assert "it has those of steps 10, 20" in result.stderr


# logs


def test_logs(url: str) -> None:
    every = _call("logs", "demo", "--storage", url)
    assert every.stdout == "==> generation 2, rank 0 <==\ntwo zero\n==> generation 2, rank 1 <==\ntwo one\n"
    assert _call("logs", "demo", "--storage", url, "--rank", "1").stdout == "two one\n"
    assert _call("logs", "demo", "--storage", url, "--generation", "1").stdout == "one zero\n"
    found = json.loads(_call("logs", "demo", "--storage", url, "--rank", "0", "--json").stdout)
    assert found == [{"generation": 2, "rank": 0, "output": "two zero\n"}]


def test_logs_that_are_not_there(url: str) -> None:
    assert "ranks 0, 1" in _call("logs", "demo", "--storage", url, "--rank", "7").stderr
    assert "generations 1, 2" in _call("logs", "demo", "--storage", url, "--generation", "9").stderr
    assert "has no output yet" in _call("logs", "open", "--storage", url).stderr


# run


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("8", 8),
        ("true", True),
        ("None", None),
        ("(1, 2)", (1, 2)),
        ("[1, 2]", [1, 2]),
        ('"8"', "8"),
        ("wiki", "wiki"),
        ("", ""),
        ("a=b", "a=b"),
        ("s3://x/y", "s3://x/y"),
    ],
)
def test_settings_are_typed(text: str, value: Any) -> None:
    found = parse_settings((f"key={text}",))["key"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("setting", ["lr", "=1", "my-key=1", "1x=1"])
def test_bad_settings(setting: str) -> None:
    with pytest.raises(click.UsageError):
        parse_settings((setting,))
    with pytest.raises(click.UsageError, match="twice"):
        parse_settings(("a=1", "a=2"))


class Launched:
    """Stands where a launch would: what ``run`` hands to the job, and what comes back."""

    def __init__(self, outcome: Any, storage: str) -> None:
        self.outcome, self.storage = outcome, storage
        self.options: dict[str, Any] = {}
        self.arguments: dict[str, Any] = {}


@pytest.fixture
def launched(url: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Launched]:
    """Replace only the launch itself: a real one needs a cluster and is tested in tests/runtime."""
    from resilience.control.types import Outcome
    from resilience.job import Job, JobResult

    def prepare(end: Any) -> Launched:
        it = Launched(end, url)
        options = Job.options

        def spy_options(self: Job, **overrides: Any) -> Job:
            it.options = overrides
            return options(self, **overrides)

        def launch(self: Job, *, view: str = "auto", **arguments: Any) -> JobResult:
            it.arguments = {"view": view, **arguments}
            if isinstance(end, Exception):
                raise end
            return JobResult("demo", Outcome(end), 7, 40, url)

        monkeypatch.setattr(Job, "options", spy_options)
        monkeypatch.setattr(Job, "launch", launch)
        return it

    return prepare


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "train.py"
    path.write_text("def train(run, *, lr=0.1, name='x'):\n    pass\n")
    return f"{path}:train"


def test_run_passes_options_and_arguments(launched: Callable[[Any], Launched], script: str) -> None:
    from resilience.control.types import Result as End

    it = launched(End.FINISHED)
    options = ("--workers", "4", "--spares", "1", "--nvme", "/n", "--name", "demo", "--checkpoint-every", "5")
    result = _call("run", script, *options, "--set", "lr=1e-3", "--set", "name=wiki", "--json")
    assert result.exit_code == 0, result.output
    assert it.options == {"workers": 4, "spares": 1, "nvme": "/n", "name": "demo", "checkpoint_every": 5}
    assert it.arguments == {"view": "json", "lr": 1e-3, "name": "wiki"}
    final = json.loads(result.stdout)
    assert (final["result"], final["steps"], final["value"]) == ("finished", 40, 7)


def test_run_ends_with_the_report(launched: Callable[[Any], Launched], script: str) -> None:
    from resilience.control.types import Result as End

    launched(End.FINISHED)
    assert "rank 2 was killed by SIGKILL" in _call("run", script).stdout


def test_an_interrupted_run_exits_130(launched: Callable[[Any], Launched], script: str) -> None:
    from resilience.control.types import Result as End

    launched(End.INTERRUPTED)
    assert _call("run", script).exit_code == 130


@pytest.mark.parametrize(
    ("error", "code", "name"),
    [
        (errors.TrainingError("boom", rank=1, original="Traceback: user"), 1, "user_error"),
        (errors.ExhaustedError("no more", operation="budget_exhausted"), 3, "budget_exhausted"),
        (errors.ExhaustedError("no cards", operation="no_capacity"), 4, "no_capacity"),
        (errors.FencedError("newer"), 5, "fenced"),
        (errors.UnavailableError("away", hint="look"), 6, "unavailable"),
        (errors.InvalidError("wrong"), 2, "not_started"),
    ],
)
def test_errors_become_exit_codes(
    launched: Callable[[Any], Launched], script: str, error: errors.ResilienceError, code: int, name: str
) -> None:
    launched(error)
    result = _call("run", script, "--json")
    assert result.exit_code == code
    assert json.loads(result.stdout) == {"run": "train", "result": name, "reason": error.message}
    assert error.message in result.stderr
    assert exit_code(error) == code


def test_the_users_traceback_comes_first() -> None:
    error = errors.TrainingError("rank 1 failed", rank=1, original="Traceback of theirs", output="last words")
    assert tell(error).startswith("Traceback of theirs\n")
    assert tell(errors.InvalidError("x", hint="do y")) == "error: x\n  hint: do y"


def test_a_target_that_is_none(tmp_path: Path) -> None:
    assert _call("run", "train.py").exit_code == 2
    assert "hint" in _call("run", str(tmp_path / "no.py") + ":train").stderr


# the group


def test_an_unknown_command_suggests() -> None:
    result = _call("histroy")
    assert result.exit_code == 2
    assert "Did you mean 'history'?" in result.stderr


def test_a_command_that_cannot_be_imported_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMMANDS, "demo", ("chaos.not_there", "demo_command", "x"))
    result = _call("demo")
    assert result.exit_code == 2
    assert "chaos.not_there" in result.stderr and "hint" in result.stderr


def test_help_lists_all_and_loads_nothing_heavy() -> None:
    code = (
        "import sys; from resilience.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted(m for m in ('ray', 'torch', 'duckdb', 'zarr', 'fsspec', 'matplotlib') if m in sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert result.stdout.splitlines()[-1] == "[]"
    for command in COMMANDS:
        assert f"  {command} " in result.stdout


def test_as_a_process_without_a_terminal(url: str) -> None:
    result = _process("history", "demo", "--storage", url)
    assert result.returncode == 0, result.stderr
    assert "rank 2 was killed by SIGKILL" in result.stdout and "\x1b" not in result.stdout
    bad = _process("status", "nobody", "--storage", url)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert "Traceback" not in bad.stderr


def test_a_closed_pipe_is_no_traceback(url: str) -> None:
    result = subprocess.run(
        f"{sys.executable} -m resilience.cli history demo --storage {url} | head -n 1",
        shell=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
        check=False,
    )
    assert result.stdout.startswith("run demo")
    assert "Traceback" not in result.stderr
