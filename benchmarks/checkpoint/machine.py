"""What the machine can do at this moment, and what a process has used of it: the other side of every ratio."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil

_BLOCK = 16 << 20


def raw_rates(directory: str, size: int, threads: int = 4) -> dict[str, float]:
    """Seconds to write ``size`` bytes into a new file past the page cache, over it again, and to read them: 16 MiB at
    a time, several at once, synced."""
    path = os.path.join(directory, "raw")
    offsets = range(0, size // _BLOCK * _BLOCK, _BLOCK)
    buffers = [mmap.mmap(-1, _BLOCK) for _ in range(threads)]
    for buffer in buffers:
        buffer.write(os.urandom(_BLOCK))

    def each(action: Callable[[int, mmap.mmap, int], object], flags: int) -> float:
        began = time.perf_counter()
        fd = os.open(path, flags | os.O_DIRECT, 0o600)
        try:
            if flags & os.O_CREAT:
                os.posix_fallocate(fd, 0, len(offsets) * _BLOCK)  # the faster way to a new file
            with ThreadPoolExecutor(threads) as pool:

                def share(index: int) -> None:
                    for offset in offsets[index::threads]:
                        action(fd, buffers[index], offset)

                list(pool.map(share, range(threads)))
            os.fsync(fd)
            return (time.perf_counter() - began) * size / (len(offsets) * _BLOCK)
        finally:
            os.close(fd)

    def write(fd: int, buffer: mmap.mmap, at: int) -> None:
        os.pwrite(fd, buffer, at)

    try:
        return {
            "new_s": each(write, os.O_WRONLY | os.O_CREAT),
            "over_s": each(write, os.O_WRONLY),
            "read_s": each(lambda fd, buffer, at: os.preadv(fd, [buffer], at), os.O_RDONLY),
        }
    finally:
        os.unlink(path)
        for buffer in buffers:
            buffer.close()


def copy_rate(arrays: list[np.ndarray[Any, Any]], target: memoryview, threads: int = 2) -> float:
    """Seconds to copy ``arrays`` one after another into ``target``, memory that is faulted in: the least of three."""
    into = np.frombuffer(target, np.uint8)
    tasks: list[tuple[np.ndarray[Any, Any], int]] = []
    at = 0
    for array in arrays:
        tasks.append((array.reshape(-1).view(np.uint8), at))
        at += array.nbytes
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(lambda task: np.copyto(into[task[1] : task[1] + task[0].size], task[0]), tasks):
                pass
        best = min(best, time.perf_counter() - began)
    return best


def sync_all(directory: str) -> None:
    """Make every file and directory below durable, for systems that do not."""
    for root, _, files in os.walk(directory, topdown=False):
        for name in (*(os.path.join(root, name) for name in files), root):
            fd = os.open(name, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)


def drop_cache(directory: str) -> None:
    """Drop clean pages of all files below (they were synced, so they are clean)."""
    for path in Path(directory).rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


class Meter:
    """Processor seconds, and the peak of memory above what was there before, of this process and ``others``."""

    def __init__(self, others: list[int]) -> None:
        self._pids = [os.getpid(), *others]
        self._cpu = self._seconds()
        self._before = {}
        for pid in self._pids:
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak begins here
            self._before[pid] = _status(pid, "VmRSS")

    def read(self) -> dict[str, float]:
        """``cpu_s`` and ``extra_bytes`` since this object was made."""
        extra = sum(max(0, _status(pid, "VmHWM") - self._before[pid]) for pid in self._pids)
        return {"cpu_s": self._seconds() - self._cpu, "extra_bytes": extra}

    def _seconds(self) -> float:
        total = 0.0
        for pid in self._pids:
            times = psutil.Process(pid).cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
        return total


def _status(pid: int, field: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)
