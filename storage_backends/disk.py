"""The disk behind the memory twin: what many clients share, and what a power loss leaves of it.

Owns the bytes, the page cache and the past views of one pretend store. Two semantics:

``object``      a put is atomic and durable at once (S3, GCS, Azure);
``page_cache``  a POSIX file system: written bytes and directory entries are volatile until their fsync.

All choices come from a ``Decide`` that the test hands over (hypothesis, a seeded generator, or a script).
Must never read a clock, draw a random number, or do anything by itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from resilience.errors import InvalidError

Semantics = Literal["object", "page_cache"]

# Decide(what, n) returns a number in 0..n, both included; 0 is always the worst outcome (most is lost).
Decide = Callable[[str, int], int]


def worst(what: str, n: int) -> int:
    """Everything that was not synced is lost."""
    return 0


def best(what: str, n: int) -> int:
    """Everything survives, as if it had been synced."""
    return n


class PowerLoss(BaseException):
    """The client's process is dead: raised out of the call it was in, and by every later one.

    Not an ``Exception``: code under test must not be able to handle its own death. Only a test catches it.
    """


@dataclass(eq=False)
class Inode:
    """A file: ``data`` as processes see it, of which the first ``synced`` bytes are on the platter."""

    data: bytearray = field(default_factory=bytearray)
    synced: int = 0


@dataclass(frozen=True)
class _Change:
    """One volatile change of directory entries; a rename is one change, so it is never half done."""

    put: tuple[str, Inode | None] | None  # a path now holds an inode; None stands for a directory
    drop: str | None


class Disk:
    """Shared state of one pretend store. Thread-safe; ``MemoryStorage`` handles are its clients.

    Args:
        semantics: see the module.
        remember: how many past views ``list`` may show (0: only the present one).
    """

    def __init__(self, semantics: Semantics = "object", *, remember: int = 64) -> None:
        self.semantics: Semantics = semantics
        self.boots = 0  # power losses so far: a client of an earlier boot is dead
        self.lock = threading.RLock()
        self._files: dict[str, Inode] = {}
        self._directories: set[str] = {""}
        self._durable_files: dict[str, Inode] = {}
        self._durable_directories: set[str] = {""}
        self._pending: dict[str, list[_Change]] = {}  # per directory, in order
        self._remember = remember
        self._views: list[frozenset[str]] = []
        self._serial = 0

    def serial(self) -> int:
        """A number of its own for each temporary file; from the disk, so that a run can be repeated."""
        with self.lock:
            self._serial += 1
            return self._serial

    # --- what clients do, each one atomic step ------------------------------------------------------------

    def get(self, path: str) -> Inode | None:
        with self.lock:
            return self._files.get(path)

    def put(self, path: str, data: bytes, *, exclusive: bool) -> bool:
        """Object semantics: the whole body at once, durable. False: the name was taken."""
        with self.lock:
            if exclusive and path in self._files:
                return False
            inode = Inode(bytearray(data), len(data))
            self._files[path] = self._durable_files[path] = inode
            self._note()
            return True

    def make_directory(self, path: str) -> None:
        with self.lock:
            if path in self._directories:
                return
            parent = _parent(path)
            self.make_directory(parent)
            self._directories.add(path)
            self._pending.setdefault(parent, []).append(_Change((path, None), None))

    def open_new(self, path: str) -> Inode:
        with self.lock:
            inode = Inode()
            self._enter(path, inode)
            return inode

    def append(self, inode: Inode, data: bytes | memoryview) -> None:
        with self.lock:
            inode.data += data

    def sync(self, inode: Inode) -> None:
        with self.lock:
            inode.synced = len(inode.data)

    def link(self, source: str, target: str) -> bool:
        """False: the target exists."""
        with self.lock:
            if target in self._files:
                return False
            self._enter(target, self._temporary(source))
            return True

    def rename(self, source: str, target: str) -> None:
        with self.lock:
            inode = self._temporary(source)
            del self._files[source]
            self._files[target] = inode
            self._pending.setdefault(_parent(target), []).append(_Change((target, inode), source))
            self._note()

    def unlink(self, path: str) -> None:
        with self.lock:
            if self._files.pop(path, None) is None:
                return
            if self.semantics == "object":
                self._durable_files.pop(path, None)
            else:
                self._pending.setdefault(_parent(path), []).append(_Change(None, path))
            self._note()

    def sync_directory(self, path: str) -> None:
        with self.lock:
            for change in self._pending.pop(path, []):
                self._apply(change)

    def names(self, *, back: int = 0) -> frozenset[str]:
        """All names at present, or ``back`` changes ago (bounded by what is remembered)."""
        with self.lock:
            back = min(back, len(self._views) - 1)
            return self._views[-1 - back] if back > 0 else frozenset(self._files)

    @property
    def views(self) -> int:
        """How far back ``names`` can look."""
        with self.lock:
            return max(0, len(self._views) - 1)

    # --- what happens to it -------------------------------------------------------------------------------

    def crash(self, decide: Decide = worst) -> None:
        """Power loss: every client of this boot is dead, and what was not synced may be gone.

        For each volatile directory change ``decide(..., 1)`` says whether it survives (any subset may: file
        systems reorder); for each file with unsynced bytes ``decide(..., n)`` how many of those survive,
        and then whether the lost tail is missing (1) or reads as zeros (0). A directory whose entry is lost
        takes its contents along.
        """
        with self.lock:
            self.boots += 1
            for directory in sorted(self._pending):
                for change in self._pending[directory]:
                    what = f"entry {change.put[0] if change.put else '-' + str(change.drop)} survives"
                    if decide(what, 1):
                        self._apply(change)
            self._pending.clear()
            reachable = {d for d in self._durable_directories if self._reachable(d)}
            self._directories = self._durable_directories = reachable
            kept = {
                path: inode
                for path, inode in self._durable_files.items()
                if self.semantics == "object" or _parent(path) in reachable
            }
            for path in sorted(kept):
                inode = kept[path]
                loose = len(inode.data) - inode.synced
                if loose:
                    survive = inode.synced + decide(f"unsynced bytes of {path} that survive", loose)
                    lost = len(inode.data) - survive
                    del inode.data[survive:]
                    if lost and not decide(f"lost tail of {path} is missing, not zeros", 1):
                        inode.data += bytes(lost)
                    inode.synced = len(inode.data)
            self._durable_files = kept
            self._files = dict(kept)
            self._views = [frozenset(self._files)] if self._remember else []

    # --- inside -------------------------------------------------------------------------------------------

    def _temporary(self, path: str) -> Inode:
        if path not in self._files:
            raise InvalidError(
                f"the temporary file {path} is gone",
                operation="publish",
                path=path,
                hint="somebody deletes where others write: delete only what nobody writes",
            )
        return self._files[path]

    def _enter(self, path: str, inode: Inode) -> None:
        self._files[path] = inode
        self._pending.setdefault(_parent(path), []).append(_Change((path, inode), None))
        self._note()

    def _apply(self, change: _Change) -> None:
        if change.drop is not None:
            self._durable_files.pop(change.drop, None)
        if change.put is not None:
            path, inode = change.put
            if inode is None:
                self._durable_directories.add(path)
            else:
                self._durable_files[path] = inode

    def _reachable(self, directory: str) -> bool:
        while directory:
            if directory not in self._durable_directories:
                return False
            directory = _parent(directory)
        return True

    def _note(self) -> None:
        if self._remember:
            if not self._views:
                self._views.append(frozenset())
            self._views.append(frozenset(self._files))
            del self._views[: -1 - self._remember]


def _parent(path: str) -> str:
    return path.rpartition("/")[0]
