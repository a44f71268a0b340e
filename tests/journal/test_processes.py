"""P1 and P5 with real processes on a real directory: racing for slots, and killed at any point of the protocol."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import resilience
from resilience.journal.log import CommitLog
from resilience.journal.records import Kind
from storage_backends.posix import PosixStorage

RACER = Path(__file__).parent / "journal_racer.py"
RACES = 60
KILL_ROUNDS = 100  # two writers each


def start(*arguments: str) -> subprocess.Popen[str]:
    root = str(Path(resilience.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(RACER), *arguments]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, bufsize=1
    )


def test_p1_real_processes_agree(tmp_path: Path) -> None:
    """Three processes race for every slot of sixty logs; each slot has the one owner that was told so."""
    racers = [start("race", str(number)) for number in range(3)]
    fenced = contended = 0
    try:
        for number in range(RACES):
            directory = tmp_path / f"run-{number}"
            begin = time.monotonic_ns() + 3_000_000
            for racer in racers:
                assert racer.stdin is not None
                racer.stdin.write(f"{begin} {directory}\n")
            answers = []
            for racer in racers:
                assert racer.stdout is not None
                answers.append(json.loads(racer.stdout.readline()))
            fenced += sum(answer["fenced"] for answer in answers)
            owners = [(slot, writer) for answer in answers for slot, writer in answer["won"]]
            found = CommitLog(PosixStorage(directory), new_id=str).refresh()
            # Nobody was killed: what was won was told, to one process only, and nothing else is there.
            assert sorted(owners) == [(record.slot, record.writer) for record in found]
            fences = [record.generation for record in found if record.kind is Kind.FENCE]
            assert fences == sorted(set(fences))
            contended += len(fences) > 1
    finally:
        for racer in racers:
            racer.communicate(timeout=20)  # the end of its input is the end of it
    assert fenced > RACES / 4, "they hardly met"
    assert contended > 0


def test_p5_killed_writers_leave_a_whole_record_or_none(tmp_path: Path) -> None:
    """Two hundred writers die by SIGKILL, most of them at a point of the protocol, on one log."""
    helper = start("kill", str(tmp_path / "run"), str(KILL_ROUNDS), "7")
    try:
        output, _ = helper.communicate(timeout=90)
    finally:
        if helper.poll() is None:
            helper.kill()
            helper.wait()
    assert helper.returncode == 0
    told = json.loads(output)
    assert told["killed"] == 2 * KILL_ROUNDS
    assert told["at_points"] > KILL_ROUNDS / 2
    assert told["acknowledged"] > KILL_ROUNDS / 2
    assert told["slots"] >= told["acknowledged"]
