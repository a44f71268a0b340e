"""The command group: help, unknown commands, and commands as real processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from resilience.cli.main import COMMANDS

Call = Callable[..., Result]
Process = Callable[[str], subprocess.CompletedProcess[str]]
ROOT = Path(__file__).parents[2]


def test_an_unknown_command_suggests(call: Call) -> None:
    result = call("histroy")
    assert result.exit_code == 2
    assert "Did you mean 'history'?" in result.stderr


def test_a_command_that_cannot_be_imported_says_why(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMMANDS, "demo", ("chaos.not_there", "demo_command", "x"))
    result = call("demo")
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


def test_as_a_process_without_a_terminal(process: Process, url: str) -> None:
    result = process(f"$R history demo --storage {url}")
    assert result.returncode == 0, result.stderr
    assert "rank 2 was killed by SIGKILL" in result.stdout and "\x1b" not in result.stdout
    bad = process(f"$R status nobody --storage {url}")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert "Traceback" not in bad.stderr


def test_a_closed_pipe_is_no_traceback(process: Process, url: str) -> None:
    result = process(f"$R history demo --storage {url} | head -n 1")
    assert result.stdout.startswith("run demo")
    assert "Traceback" not in result.stderr
