"""``run``: what is handed to the job, and what its end becomes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import Result

from resilience import errors
from resilience.cli.main import exit_code, tell
from resilience.cli.run import parse_settings

Call = Callable[..., Result]


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


def test_run_passes_options_and_arguments(
    call: Call, launched: Callable[[Any], Launched], script: str
) -> None:
    from resilience.control.types import Result as End

    it = launched(End.FINISHED)
    options = ("--workers", "4", "--spares", "1", "--nvme", "/n", "--name", "demo", "--checkpoint-every", "5")
    result = call("run", script, *options, "--set", "lr=1e-3", "--set", "name=wiki", "--json")
    assert result.exit_code == 0, result.output
    assert it.options == {"workers": 4, "spares": 1, "nvme": "/n", "name": "demo", "checkpoint_every": 5}
    assert it.arguments == {"view": "json", "lr": 1e-3, "name": "wiki"}
    final = json.loads(result.stdout)
    assert (final["result"], final["steps"], final["value"]) == ("finished", 40, 7)


def test_run_ends_with_the_report(call: Call, launched: Callable[[Any], Launched], script: str) -> None:
    from resilience.control.types import Result as End

    launched(End.FINISHED)
    assert "rank 2 was killed by SIGKILL" in call("run", script).stdout


def test_an_interrupted_run_exits_130(call: Call, launched: Callable[[Any], Launched], script: str) -> None:
    from resilience.control.types import Result as End

    launched(End.INTERRUPTED)
    assert call("run", script).exit_code == 130


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
    call: Call,
    launched: Callable[[Any], Launched],
    script: str,
    error: errors.ResilienceError,
    code: int,
    name: str,
) -> None:
    launched(error)
    result = call("run", script, "--json")
    assert result.exit_code == code
    assert json.loads(result.stdout) == {"run": "train", "result": name, "reason": error.message}
    assert error.message in result.stderr
    assert exit_code(error) == code


def test_the_users_traceback_comes_first() -> None:
    error = errors.TrainingError("rank 1 failed", rank=1, original="Traceback of theirs", output="last words")
    assert tell(error).startswith("Traceback of theirs\n")
    assert tell(errors.InvalidError("x", hint="do y")) == "error: x\n  hint: do y"


def test_a_target_that_is_none(call: Call, tmp_path: Path) -> None:
    assert call("run", "train.py").exit_code == 2
    assert "hint" in call("run", str(tmp_path / "no.py") + ":train").stderr
