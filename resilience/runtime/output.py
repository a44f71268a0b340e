"""What ranks print: one file per rank and generation, kept in the run's storage.

Where storage is a local directory the file is written in place, so it can be read while the rank runs; else it
is written beside the nvme tier (or in a temporary directory) and shipped when the rank ends.
"""

from __future__ import annotations

import io
import os
import queue
import shutil
import tempfile
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from resilience.errors import ResilienceError
from storage_backends import Storage

_BLOCK = 4 << 20
_TAIL_BYTES = (
    64 << 10
)  # what is looked at for the last lines: a rank may have printed gigabytes, or no line end


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
    """Output files of one node's processes.

    Args:
        storage: rooted at the run.
        scratch: where files are written that cannot be written in place; ``None`` is a temporary directory.
        warn: called with a sentence about output that could not be stored.
    """

    def __init__(
        self, storage: Storage, scratch: str | None, warn: Callable[[str], None] = lambda _: None
    ) -> None:
        self._storage = storage
        self._warn = warn
        self._scratch: Path | None = None
        self._own_scratch = False
        self._finished: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._shipper: threading.Thread | None = None
        if not storage.capabilities.local:
            self._own_scratch = scratch is None
            self._scratch = Path(scratch) if scratch else Path(tempfile.mkdtemp(prefix="resilience-output-"))

    def open(self, name: str) -> tuple[str, BinaryIO]:
        """Path of the file that takes a process's output (``g<generation>/rank-<rank>``, or what one of our own is
        called), and the file. Raises ``OSError``."""
        name = f"logs/{name}.log"
        path = self._storage.path(name) if self._scratch is None else self._scratch / name
        assert path is not None
        path.parent.mkdir(parents=True, exist_ok=True)
        return str(path), open(path, "ab")

    def finish(self, path: str, lines: int) -> str:
        """A rank ended: have its file shipped where it is not in place already, and return its last lines.

        Waits for no storage: how a rank ended must be known before what it printed is safe.
        """
        if not path:
            return ""
        try:
            tail = _tail(path, lines)
        except OSError as error:
            return f"[resilience: this output could not be read: {error}]"
        if self._scratch is not None:
            if self._shipper is None:
                self._shipper = threading.Thread(target=self._ship_all, name="outputs", daemon=True)
                self._shipper.start()
            self._finished.put(path)
        return tail

    def _ship_all(self) -> None:
        while (path := self._finished.get()) is not None:
            self._ship(Path(path))

    def _ship(self, path: Path) -> None:
        assert self._scratch is not None
        name = str(path.relative_to(self._scratch))
        try:
            with self._storage.sink(name) as sink, open(path, "rb") as file:
                block = file.read(_BLOCK) or b"\n"
                while block:
                    sink.write(block)
                    block = file.read(_BLOCK)
        except (ResilienceError, OSError) as error:
            self._warn(f"{name} could not be stored: {error}")

    def close(self, timeout: float = 5.0) -> None:
        """Wait for what is being shipped, and clean up. May run twice."""
        if self._shipper is not None:
            self._finished.put(None)
            self._shipper.join(timeout)
            if self._shipper.is_alive():
                self._warn("not all output of ranks could be stored before the end")
            self._shipper = None
        if self._own_scratch and self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)


def _tail(path: str, lines: int) -> str:
    """The last lines of a file, in a time that does not grow with it."""
    with open(path, "rb") as file:
        start = max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES)
        file.seek(start)
        found = deque(io.TextIOWrapper(file, encoding="utf-8", errors="replace"), maxlen=lines + 1)
    if start and len(found) > 1 and len(found) <= lines:
        found.popleft()  # it began before what was read
    return "".join(list(found)[-lines:])
