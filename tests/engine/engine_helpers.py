"""Helpers of the engine's tests: groups of ranks in one process, and training scripts that are killed."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from resilience import Checkpointer

DEADLINE = 60.0


def until(condition, what, deadline=DEADLINE):
    """Wait until ``condition()`` is true, and return what it is."""
    end = time.monotonic() + deadline
    while not (value := condition()):
        assert time.monotonic() < end, f"timed out: {what}"
        time.sleep(0.01)
    return value


class Script:
    """A Python script in its own process, heard line by line."""

    def __init__(self, source, *args, env=None):
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-c", source, *map(str, args)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(env or {})},
        )
        self.lines = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.lines.append(line.strip())

    def expect(self, start):
        """The first line that begins with ``start``."""

        def found():
            line = next((line for line in self.lines if line.startswith(start)), None)
            assert line is not None or self.process.poll() is None or self._reader.is_alive(), self.lines
            return line

        return until(found, f"a line {start!r} among {self.lines}")

    def go_on(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def kill(self):
        self.process.kill()
        self.process.wait()

    def end(self):
        code = self.process.wait(DEADLINE)
        self._reader.join(DEADLINE)
        return code


class Group:
    """All ranks of one start, in this process: as apart as they are elsewhere, but for the interpreter."""

    def __init__(self, url, world, **options):
        session = uuid.uuid4().hex
        self.world = world
        self.ranks = [
            Checkpointer(url, rank=rank, world_size=world, session=session, **options)
            for rank in range(world)
        ]

    def each(self, call):
        """``call(rank, checkpointer)`` on all ranks at once; what they return, or the first error."""
        with ThreadPoolExecutor(self.world) as pool:
            return [
                job.result(DEADLINE) for job in [pool.submit(call, i, c) for i, c in enumerate(self.ranks)]
            ]

    def save(self, step, states):
        return [c.save(step, state) for c, state in zip(self.ranks, states, strict=True)]

    def restore(self, states, **options):
        return self.each(lambda rank, c: c.restore(into=states[rank], **options))

    def close(self):
        self.each(lambda _rank, c: c.close())


def writer_of(checkpointer):
    return psutil.Process(checkpointer._writer.pid)


def packs(url):
    return sorted(Path(url).glob("checkpoints/*/*.pack"))


def damage(path):
    """Flip a bit in the first payload of a pack."""
    with open(path, "r+b") as file:
        byte = file.read(1)[0]
        file.seek(0)
        file.write(bytes([byte ^ 1]))
