"""What ranks print: one file per rank and generation, kept in the run's storage.

Where storage is a local directory the file is written in place, so it can be read while the rank runs; else it
is written beside the nvme tier (or in a temporary directory) and shipped when the rank ends.
"""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from collections import deque
from pathlib import Path
from typing import Any, BinaryIO

from resilience.errors import ResilienceError
from storage_backends import Storage


class Stream(io.FileIO):
    """A rank's stdout or stderr. A disk that takes no more output must not end the training that prints: what it
    refuses is lost, and how much of it, and why, stands in its place as soon as there is room again."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd, "w", closefd=False)
        self._lost = 0
        self._reason = ""

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        left = memoryview(data).cast("B")
        try:
            if self._lost:
                note = f"[resilience: {self._lost} bytes of output were lost here: {self._reason}]\n"
                super().write(note.encode())
                self._lost = 0
            while left:
                left = left[super().write(left) or 0 :]
        except OSError as error:
            self._lost += len(left)
            self._reason = os.strerror(error.errno or 0)
        return size


class Outputs:
    """Output files of one node's processes."""

    def __init__(self, storage: Storage, scratch: str | None) -> None:
        self._storage = storage
        self._scratch: Path | None = None
        self._own_scratch = False
        if not storage.capabilities.local:
            self._own_scratch = scratch is None
            self._scratch = Path(scratch) if scratch else Path(tempfile.mkdtemp(prefix="resilience-output-"))

    def _path(self, name: str) -> Path:
        path = self._storage.path(name) if self._scratch is None else self._scratch / name
        assert path is not None
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def open(self, name: str) -> BinaryIO:
        """File for the output of one of our own processes."""
        return open(self._path(f"logs/{name}.log"), "ab")

    def rank(self, generation: int, rank: int) -> str:
        """Path of the file that takes a rank's output."""
        return str(self._path(f"logs/g{generation}/rank-{rank}.log"))

    def finish(self, path: str, lines: int) -> str:
        """The rank ended: ship its file where it is not in place already, and return its last lines."""
        with open(path, encoding="utf-8", errors="replace") as file:
            tail = "".join(deque(file, maxlen=lines))
        if self._scratch is not None:
            name = str(Path(path).relative_to(self._scratch))
            try:
                with self._storage.sink(name) as sink:
                    sink.write(Path(path).read_bytes() or b"\n")
            except ResilienceError as error:
                tail += f"\n[resilience: this output could not be stored: {error.message}]"
        return tail

    def close(self) -> None:
        if self._own_scratch and self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
