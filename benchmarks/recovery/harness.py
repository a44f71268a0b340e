"""Kill a rank, see from outside when training goes on; the same for every system.

Starts a system's command, follows the file in which the ranks write completed steps, kills one rank at a time
with SIGKILL, and takes all times from that file (CLOCK_MONOTONIC is one clock for the whole machine). It must
never kill a process that does not hold that file open, and leave no process of a system behind.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.recovery.workload import Settings
from benchmarks.report import ROOT, percentiles

POLL_S = 0.02  # how often the file is read; no measured time depends on it
SETTLE_STEPS = 12  # completed by every rank after a recovery before the next kill: past one more checkpoint


@dataclass(frozen=True)
class Line:
    time: float
    rank: int
    pid: int
    step: int


class FailedError(Exception):
    """The system did not come back, or never started."""


class Follower:
    """All lines so far, read on from the last known byte; half a line is left for the next time."""

    def __init__(self, path: str) -> None:
        self.path, self._offset = path, 0
        self.lines: list[Line] = []

    def refresh(self) -> None:
        with contextlib.suppress(FileNotFoundError), open(self.path, "rb") as file:
            file.seek(self._offset)
            data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            self._offset += len(whole)
            for line in whole.decode().splitlines():
                at, rank, pid, step = line.split()
                self.lines.append(Line(float(at), int(rank), int(pid), int(step)))

    def wait(self, system: System, ready: Callable[[list[Line]], bool], deadline_s: float, what: str) -> None:
        until = time.monotonic() + deadline_s
        while True:
            self.refresh()
            if ready(self.lines):
                return
            if system.process.poll() is not None:
                raise FailedError(
                    f"{what}: the system ended with {system.process.returncode}\n{system.tail()}"
                )
            if time.monotonic() > until:
                raise FailedError(f"{what}: not within {deadline_s} s\n{system.tail()}")
            time.sleep(POLL_S)


class System:
    """A started system: its process, its output, and every process below it."""

    def __init__(self, command: list[str], directory: Path, environment: dict[str, str]) -> None:
        self._output = directory / "output.txt"
        with open(self._output, "wb") as output:
            env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
            env.pop("RAY_ADDRESS", None)
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT
            )
        self._seen: dict[int, psutil.Process] = {}

    def look(self) -> None:
        """Remember who is below us, while the tree is whole: orphans could not be found later."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                self._seen[child.pid] = child

    def tail(self) -> str:
        return self._output.read_text(errors="replace")[-3000:]

    def end(self, deadline_s: float) -> float:
        """Wait for the end, then end what is left; the seconds it took, by itself or not."""
        began = time.monotonic()
        self.look()
        try:
            self.process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(20)
        seconds = time.monotonic() - began
        # is_running() compares start times, so a pid that was given to somebody else is not ours.
        left = [child for child in self._seen.values() if child.is_running()]
        _, left = psutil.wait_procs(left, timeout=5)
        for child in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        return seconds


def measure(
    name: str,
    make: Callable[[Settings, str], list[str]],
    directory: Path,
    *,
    kills: int,
    environment: dict[str, str],
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Kill ranks of one system; raw values and percentiles, and ``failed`` with the reason if it gave up.

    Args:
        make: settings and the path of their file → the system's command.
        environment: that the system needs.
        options: of the ``Settings``.
    """
    directory.mkdir(parents=True)
    settings = Settings(
        directory=str(directory),
        lines=str(directory / "lines"),
        stop=str(directory / "stop"),
        kills=kills,
        **{"ranks": 4, "every": 10, "steps": 1_000_000, **options},
    )
    path = directory / "settings.json"
    path.write_text(json.dumps(asdict(settings)))
    rng = random.Random(seed)
    began = time.monotonic()
    system = System(make(settings, str(path)), directory, environment)
    follower = Follower(settings.lines)
    raw: list[dict[str, Any]] = []
    result: dict[str, Any] = {"system": name, "settings": {"ranks": settings.ranks, "every": settings.every}}
    try:
        _wait_steps(follower, system, settings.ranks, SETTLE_STEPS, 0, 180, "start")
        result["start_s"] = min(line.time for line in follower.lines) - began
        result["step_s"] = _step_seconds(follower.lines)
        for number in range(kills):
            raw.append(_kill(follower, system, settings, number % settings.ranks, rng))
            print(f"  {name} kill {number + 1}/{kills}: {raw[-1]['first_step_s']:.2f} s", flush=True)
        follower.refresh()
        # Written whole in one rename, and far enough ahead that every rank sees it before that step.
        (directory / "stop.new").write_text(str(max(line.step for line in follower.lines) + 40))
        os.replace(directory / "stop.new", settings.stop)
        result["end_s"] = system.end(120)
        result["exit"] = system.process.returncode
    except FailedError as error:
        result["failed"] = str(error)
    finally:
        system.end(0)
    for key in ("first_step_s", "regained_s", "lost_steps"):
        result[key] = percentiles([float(kill[key]) for kill in raw])
    return {**result, "kills": raw}


def _kill(
    follower: Follower, system: System, settings: Settings, rank: int, rng: random.Random
) -> dict[str, Any]:
    """Kill ``rank`` somewhere in a step; wait until the step it had reached is passed again."""
    time.sleep(rng.uniform(0.0, 0.3))
    system.look()
    follower.refresh()
    victim = next(line for line in reversed(follower.lines) if line.rank == rank)
    _check_ours(victim.pid, settings.lines)
    at = time.monotonic()
    os.kill(victim.pid, signal.SIGKILL)
    follower.refresh()
    seen = len(follower.lines)
    before = {line.pid for line in follower.lines}
    reached = max(line.step for line in follower.lines)

    def fresh() -> list[Line]:
        # Ranks that were not killed may still write a step they had finished: look for a new process.
        return [line for line in follower.lines[seen:] if line.rank == rank and line.pid not in before]

    follower.wait(system, lambda _: bool(fresh()), 60, f"first step after the kill of rank {rank}")
    first = fresh()[0]
    follower.wait(
        system, lambda _: any(line.step > reached for line in fresh()), 180, "the step reached before"
    )
    regained = next(line for line in fresh() if line.step > reached)
    _wait_steps(
        follower, system, settings.ranks, SETTLE_STEPS, seen, 180, "steps after the recovery", first.step
    )
    return {
        "rank": rank,
        "step": reached,
        "resumed_at": first.step - 1,
        "lost_steps": max(0, reached - (first.step - 1)),
        "first_step_s": first.time - at,
        "regained_s": regained.time - at,
    }


def _wait_steps(
    follower: Follower,
    system: System,
    ranks: int,
    steps: int,
    seen: int,
    deadline_s: float,
    what: str,
    base: int = 0,
) -> None:
    def ready(lines: list[Line]) -> bool:
        newest: dict[int, int] = {}
        for line in lines[seen:]:
            newest[line.rank] = line.step
        return len(newest) == ranks and min(newest.values()) >= base + steps

    follower.wait(system, ready, deadline_s, what)


def _check_ours(pid: int, lines: str) -> None:
    """Only a process that holds our file open is one of our ranks."""
    try:
        held = {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
    except (FileNotFoundError, ProcessLookupError):
        held = set()
    if os.path.realpath(lines) not in held:
        raise FailedError(f"process {pid} is not a rank of this run (any more); nothing was killed")


def _step_seconds(lines: list[Line]) -> float:
    times = [line.time for line in lines if line.rank == 0]
    return statistics.median(b - a for a, b in itertools.pairwise(times))
