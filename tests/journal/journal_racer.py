"""Real processes on a real directory, for ``test_processes``. Run by exec: it has one thread, so it may fork.

``race NAME``            each line of stdin is ``<start, monotonic ns> <directory>``: fence and append there against
                         the others, answer with what was won, as JSON.
``kill DIR ROUNDS SEED`` each round forks two writers and kills both, at a point of the protocol or at any
                         moment; checks the log after each round; answers with what happened, as JSON.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import sys
import time
import uuid
from collections.abc import Callable
from typing import Any

from resilience.errors import FencedError
from resilience.journal.log import CommitLog
from resilience.journal.records import Kind, decode
from storage_backends import posix
from storage_backends.posix import PosixStorage

ROUNDS_PER_LOG = 20  # a long log would be read again by every writer
POINTS = ("open_new", "write_all", "sync_file", "publish", "sync_directory", "unlink")


def new_id() -> str:
    return uuid.uuid4().hex


def write(directory: str, acknowledge: Callable[[int, str], None], *, fences: int, appends: int) -> int:
    """Fence and append, again from the start whenever fenced; how often that happened."""
    fenced = 0
    for _ in range(fences):
        log = CommitLog(PosixStorage(directory), new_id=new_id)
        try:
            record = log.fence(1, {"run": "r", "supervisor": str(os.getpid())})
            acknowledge(record.slot, record.writer)
            for step in range(appends):
                body = {"step": step, "generation": record.generation, "tier": "nvme", "reason": "x" * 500}
                done = log.append(Kind.QUARANTINE, body)
                acknowledge(done.slot, done.writer)
        except FencedError:
            fenced += 1
    return fenced


def race(name: str) -> None:
    for line in sys.stdin:
        start, directory = line.split()
        won: list[tuple[int, str]] = []
        time.sleep(max(0.0, int(start) / 1e9 - time.monotonic() - 0.001))
        while time.monotonic_ns() < int(start):  # the last millisecond, so that they really begin together
            pass
        fenced = write(
            directory, lambda slot, writer, won=won: won.append((slot, writer)), fences=2, appends=2
        )
        print(json.dumps({"name": name, "won": won, "fenced": fenced}), flush=True)


def die_at(count: int, moment: str) -> None:
    """SIGKILL to ourselves at the count-th system call of the protocol: before, after, or half-way a write."""
    calls = itertools.count(1)

    def wrap(name: str) -> None:
        real = getattr(posix, name)

        def wrapped(*args: Any) -> Any:
            if next(calls) != count:
                return real(*args)
            if moment == "half" and name == "write_all":
                os.write(args[0], args[1][: len(args[1]) // 2])
            elif moment != "before":
                real(*args)
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError("unreachable")

        setattr(posix, name, wrapped)

    for name in POINTS:
        wrap(name)


def fork_writer(directory: str, count: int, moment: str) -> tuple[int, int]:
    """A writer in a child of its own; (pid, the pipe on which it acknowledges)."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    try:
        if count:
            die_at(count, moment)
        write(
            directory,
            lambda *it: os.write(writing, (json.dumps(it) + "\n").encode()) and None,
            fences=99,
            appends=4,
        )
    finally:
        os._exit(1)


def kill(directory: str, rounds: int, seed: int) -> None:
    draw = random.Random(seed)
    totals = {"killed": 0, "at_points": 0, "slots": 0, "acknowledged": 0}
    for number in range(0, rounds, ROUNDS_PER_LOG):
        kill_in(f"{directory}-{number}", min(ROUNDS_PER_LOG, rounds - number), draw, totals)
    print(json.dumps(totals))


def kill_in(directory: str, rounds: int, draw: random.Random, totals: dict[str, int]) -> None:
    reader = CommitLog(PosixStorage(directory), new_id=new_id)
    told: dict[int, str] = {}
    for _ in range(rounds):
        children = []
        for _ in range(2):
            count = draw.randint(1, 50) if draw.random() < 0.6 else 0
            totals["at_points"] += count > 0
            pid, reading = fork_writer(directory, count, draw.choice(("before", "after", "half")))
            children.append((pid, os.fdopen(reading), count))
        for pid, acks, count in children:
            lines = []
            if not count:  # killed from outside: some time after so many acknowledgements
                lines = [acks.readline() for _ in range(draw.randint(0, 2))]
                time.sleep(draw.uniform(0, 0.004))
                os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            totals["killed"] += os.WIFSIGNALED(status)
            with acks:
                for line in [*lines, *acks]:
                    slot, writer = json.loads(line)
                    assert told.setdefault(slot, writer) == writer, f"slot {slot} was acknowledged to two"
        check(directory, reader, told)
    fresh = CommitLog(PosixStorage(directory), new_id=new_id).refresh()
    assert fresh == reader.refresh()
    totals["slots"] += len(fresh)
    totals["acknowledged"] += len(told)


def check(directory: str, reader: CommitLog, told: dict[int, str]) -> None:
    found = reader.refresh()
    names = PosixStorage(directory).list("log")
    assert len(names) == len(found), f"{len(names)} slots are visible, {len(found)} can be read"
    for name in names[-6:]:
        with open(f"{directory}/{name}", "rb") as file:
            decode(file.read(), path=name)
    for slot, writer in told.items():
        assert found[slot - 1].writer == writer, f"slot {slot} was acknowledged to another"
    generation = 0
    for record in found:
        generation = max(generation + 1, record.generation) if record.kind is Kind.FENCE else generation
        assert record.generation == generation, f"slot {record.slot} is of generation {record.generation}"


def in_place(self: PosixStorage, name: str, data: bytes) -> bytes | None:
    """A broken create: the name is there before the bytes are (``open(name, "xb")``)."""
    final = f"{self.url.removeprefix('file://')}/{name}"
    os.makedirs(os.path.dirname(final), exist_ok=True)
    try:
        fd = posix.open_new(final)
    except FileExistsError:
        held = self.read(name)
        return None if held == data else held
    posix.write_all(fd, memoryview(data))
    posix.sync_file(fd, len(data), final)
    os.close(fd)
    return None


def check_then_write(self: PosixStorage, name: str, data: bytes) -> bytes | None:
    """A broken create: exists(), then write (fsspec's local ``mode="create"``)."""
    try:
        held = self.read(name)
        return None if held == data else held
    except FileNotFoundError:
        with self.sink(name) as sink:
            sink.write(data)
        return None


if __name__ == "__main__":
    if sys.argv[-1] in ("in_place", "check_then_write"):  # to show that the test can fail
        PosixStorage.create = globals()[sys.argv.pop()]  # type: ignore[method-assign]
    if sys.argv[1] == "race":
        race(sys.argv[2])
    else:
        kill(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
