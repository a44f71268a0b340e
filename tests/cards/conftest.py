"""Drivers of no hardware: small libraries built with the C compiler, loaded by the real code in its own process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FAKES = Path(__file__).parent / "fakes"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    """``build(source, library, *flags)``: the directory that the library lies in."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler (cc, gcc) to build the fake drivers with")
    made: dict[tuple[str, ...], Path] = {}

    def build(source: str, library: str, *flags: str) -> Path:
        key = (source, *flags)
        if key not in made:
            directory = tmp_path_factory.mktemp(source)
            command = [compiler, "-shared", "-fPIC", "-Wall", "-Werror", *flags]
            subprocess.run(
                [*command, f"-Wl,-soname,{library}", "-o", str(directory / library), str(FAKES / source)],
                check=True,
            )
            made[key] = directory
        return made[key]

    return build


class Driven:
    """A probe in a process of its own; ``poll(state)`` writes what the fake library answers from, and polls."""

    def __init__(self, kind: str, visible: list[str], state: Path, **environment: str) -> None:
        self._state = state
        self._process = subprocess.Popen(
            [sys.executable, str(FAKES / "drive.py"), kind, *visible],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "FAKE_CARDS": str(state), **environment},
        )

    def ask(self, **told: Any) -> dict[str, Any]:
        self._process.stdin.write(json.dumps(told) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def poll(self, *lines: str, advance: float = 1.0) -> list[tuple[int, str]]:
        answer = self.ask(state="\n".join(lines) + "\n", advance=advance)
        assert "error" not in answer, answer
        return [(index, code) for index, code, _ in answer["faults"]]

    def end(self) -> None:
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()


@pytest.fixture
def drive(tmp_path) -> Iterator[Any]:
    made: list[Driven] = []

    def start(kind: str, visible: list[str], **environment: str) -> Driven:
        made.append(Driven(kind, visible, tmp_path / f"state-{len(made)}", **environment))
        return made[-1]

    yield start
    for driven in made:
        driven.end()
