"""P1 and P5 with real processes on a real directory: racing for slots, and killed at any point of the protocol."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import resilience
from resilience.errors import CorruptError
from resilience.journal.log import CommitLog
from resilience.journal.records import Kind
from storage_backends.posix import PosixStorage

RACER = Path(__file__).parent / "journal_racer.py"
RACES = 200
KILL_ROUNDS = 200  # two writers each


def start(*arguments: str) -> subprocess.Popen[str]:
    errors = subprocess.DEVNULL if arguments[-1] in ("in_place", "check_then_write") else None
    root = str(Path(resilience.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(RACER), *arguments]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        env=environment,
        bufsize=1,
    )


def race(directory: Path, rounds: int, *broken: str) -> dict[str, int]:
    """Three processes race for every slot of so many logs; AssertionError when a log is not what they were told."""
    racers = [start("race", str(number), *broken) for number in range(3)]
    seen = {"fenced": 0, "contended": 0}
    try:
        for number in range(rounds):
            run = directory / f"run-{number}"
            begin = time.monotonic_ns() + 3_000_000
            for racer in racers:
                assert racer.stdin is not None
                racer.stdin.write(f"{begin} {run}\n")
            answers = []
            for racer in racers:
                assert racer.stdout is not None
                line = racer.stdout.readline()
                assert line, "a racer gave up"
                answers.append(json.loads(line))
            owners = [(slot, writer) for answer in answers for slot, writer in answer["won"]]
            found = CommitLog(PosixStorage(run), new_id=str).refresh()
            # Nobody was killed: what was won was told, to one process only, and nothing else is there.
            assert sorted(owners) == [(record.slot, record.writer) for record in found]
            fences = [record.generation for record in found if record.kind is Kind.FENCE]
            assert fences == sorted(set(fences))
            seen["fenced"] += sum(answer["fenced"] for answer in answers)
            seen["contended"] += len(fences) > 1
    finally:
        for racer in racers:
            racer.communicate(timeout=20)  # the end of its input is the end of it
    return seen


def kill(directory: Path, rounds: int, *broken: str) -> dict[str, int] | None:
    """What the helper counted; ``None`` when it found the log broken."""
    helper = start("kill", str(directory), str(rounds), "7", *broken)
    try:
        output, _ = helper.communicate(timeout=120)
    finally:
        if helper.poll() is None:
            helper.kill()
            helper.wait()
    return json.loads(output) if helper.returncode == 0 else None


def test_p1_real_processes_agree(tmp_path: Path) -> None:
    """Each slot has the one owner that was told so."""
    seen = race(tmp_path, RACES)
    assert seen["fenced"] > RACES / 4, "they hardly met"
    assert seen["contended"] > 0


def test_p5_killed_writers_leave_a_whole_record_or_none(tmp_path: Path) -> None:
    """Two writers a round die by SIGKILL, most of them at a point of the protocol."""
    seen = kill(tmp_path / "run", KILL_ROUNDS)
    assert seen is not None
    assert seen["killed"] == 2 * KILL_ROUNDS
    assert seen["at_points"] > KILL_ROUNDS / 2
    assert seen["acknowledged"] > KILL_ROUNDS / 2
    assert seen["slots"] >= seen["acknowledged"]


def test_p1_a_create_that_races_is_noticed(tmp_path: Path) -> None:
    with pytest.raises((AssertionError, CorruptError)):
        race(tmp_path, RACES, "check_then_write")


def test_p5_a_create_in_place_is_noticed(tmp_path: Path) -> None:
    assert kill(tmp_path / "run", KILL_ROUNDS, "in_place") is None
