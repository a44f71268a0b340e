"""Fixtures of the command line: runs in storage, and calling commands in process and as processes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner, Result

from resilience.cli import main

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def build() -> ModuleType:
    """The builder of the history room's tests."""
    path = Path(__file__).parents[1] / "history" / "builder.py"
    spec = importlib.util.spec_from_file_location("resilience_cli_builder", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def call() -> Callable[..., Result]:
    """Run a command in this process: ``call("history", "--storage", url)``."""

    def caller(*args: str, env: dict[str, str] | None = None) -> Result:
        return CliRunner().invoke(main, list(args), env={"RESILIENCE_STORAGE": "", **(env or {})})

    return caller


@pytest.fixture(scope="session")
def process() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command line in a shell, ``$R`` being the command, as users do."""

    def runner(line: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "R": f"{sys.executable} -m resilience.cli"}
        return subprocess.run(
            line, shell=True, capture_output=True, text=True, cwd=ROOT, env=env, timeout=60, check=False
        )

    return runner
