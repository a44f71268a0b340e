"""The memory twin: the whole storage contract in this process, for tests and for trying things out.

Owns the client side of a pretend store: ``create`` and the sink as the same sequence of steps that the real
backends take, so that a test can stop a client between any two of them. Must never decide anything by
itself: faults come from the hooks of the handle, losses from ``Disk.crash``. A property test in short::

    disk = Disk("page_cache")
    a, b = MemoryStorage(disk), MemoryStorage(disk)          # two machines, one store
    a.before = lambda step, name: ...                        # raise PowerLoss or UnavailableError, or run b
    a.lose_reply = lambda op, name: op == "create"           # it is done, but the caller is not told
    b.listing = lambda prefix, views: views                  # how many changes ago the listing was taken
    disk.crash(lambda what, n: data.draw(st.integers(0, n), label=what))     # a and b are dead now
    c = MemoryStorage(disk)                                  # the next boot

Steps, page_cache: create = make_directory, sync_parents, open, write, sync, link, sync_directory, unlink;
sink = make_directory, sync_parents, open, write, sync, rename, sync_directory. Steps, object: create = put;
sink = put. Others, one step each: read, size, list, delete (delete_all: one delete per object).
Operations (for ``lose_reply``): create, commit, delete, delete_all.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from resilience.errors import InvalidError, UnavailableError
from storage_backends.base import (
    Capabilities,
    check_data,
    check_directory,
    check_name,
    check_range,
    well_formed,
)
from storage_backends.disk import Disk, Inode, PowerLoss

_DISKS: dict[str, Disk] = {}  # what memory:// URLs name: one store per netloc in this process
_DISKS_LOCK = threading.Lock()


def process_disk(netloc: str) -> Disk:
    """The store behind ``memory://<netloc>`` in this process."""
    with _DISKS_LOCK:
        return _DISKS.setdefault(netloc, Disk(remember=0))


class MemoryStorage:
    """A client of a ``Disk``. Several handles on one disk are several machines; one handle may be shared by
    threads as any backend may.

    Attributes:
        before: called as ``before(step, name)`` before each step, without any lock held: it may raise what
            the step should fail with, raise ``PowerLoss`` (this client dies there), or use other handles.
        lose_reply: ``lose_reply(operation, name)`` true: the operation is carried out, and
            ``UnavailableError`` raised.
        listing: ``listing(prefix, views)`` returns how many changes ago (0..views) the listing was taken.
    """

    def __init__(
        self,
        disk: Disk,
        root: str = "",
        *,
        url: str = "memory://disk",
        before: Callable[[str, str], None] | None = None,
        lose_reply: Callable[[str, str], bool] | None = None,
        listing: Callable[[str, int], int] | None = None,
    ) -> None:
        self.disk = disk
        self.before = before
        self.lose_reply = lose_reply
        self.listing = listing
        self._root = root.strip("/")
        self._url = url
        self._boot = disk.boots
        self._dead = False

    @property
    def url(self) -> str:
        return self._url

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(arbitrates=True, local=False)

    def __repr__(self) -> str:
        return f"MemoryStorage({self._url!r}, {self.disk.semantics})"

    def kill(self) -> None:
        """The process of this client is gone (SIGKILL): what it wrote stays in the page cache."""
        self._dead = True

    def create(self, name: str, data: bytes) -> bytes | None:
        check_data(data, name)
        path = self._path(name)
        if self.disk.semantics == "object":
            self.step("put", name)
            won = self.disk.put(path, data, exclusive=True)
        else:
            won = self._create_file(name, path, data)
        self.reply("create", name)
        if won:
            return None
        held = self.read(name)
        return None if held == bytes(data) else held

    def _create_file(self, name: str, path: str, data: bytes) -> bool:
        temporary, inode = self.open_temporary(name, path)
        try:
            self.step("write", name)
            self.disk.append(inode, data)
            self.step("sync", name)
            self.disk.sync(inode)
            self.step("link", name)
            won = self.disk.link(temporary, path)
            self.step("sync_directory", name)
            self.disk.sync_directory(path.rpartition("/")[0])
            self.step("unlink", name)
        except Exception:  # an error is handled by a living process; after PowerLoss nobody cleans up
            self.disk.unlink(temporary)
            raise
        self.disk.unlink(temporary)
        return won

    def sink(self, name: str, size: int | None = None) -> MemorySink:
        return MemorySink(self, name, self._path(name))

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        check_range(start, end, name)
        inode = self._look("read", name)
        with self.disk.lock:
            return bytes(inode.data[start:end])

    def size(self, name: str) -> int:
        return len(self._look("size", name).data)

    def link(self, source: str, target: str) -> bool:
        inode, path = self._look("link", source), self._path(target)
        if self.disk.semantics == "object":
            self.disk.put(path, bytes(inode.data), exclusive=False)
        else:
            directory = path.rpartition("/")[0]
            self.step("make_directory", target)
            self.disk.make_directory(directory)
            self.step("sync_parents", target)
            parent = directory
            while parent:
                parent = parent.rpartition("/")[0]
                self.disk.sync_directory(parent)
            temporary = f"{directory}/.link.{self.disk.serial()}~".lstrip("/")
            self.disk.link(self._path(source), temporary)
            self.step("rename", target)
            self.disk.rename(temporary, path)
            self.step("sync_directory", target)
            self.disk.sync_directory(directory)
        self.reply("link", target)
        return True

    def list(self, prefix: str = "") -> list[str]:
        prefix = check_directory(prefix)
        self.step("list", prefix)
        back = self.listing(prefix, self.disk.views) if self.listing else 0
        inside = self._inside(prefix)
        lead = f"{prefix}/" if prefix else ""
        found = set()
        for path in self.disk.names(back=back):
            if path.startswith(inside):
                child, slash, _ = path[len(inside) :].partition("/")
                if well_formed(child):
                    found.add(f"{lead}{child}{slash}")
        return sorted(found)

    def delete(self, name: str) -> None:
        path = self._path(name)
        self.step("delete", name)
        self.disk.unlink(path)
        self.reply("delete", name)

    def delete_all(self, prefix: str) -> None:
        prefix = check_directory(prefix, root=False)
        inside = self._inside(prefix)
        for path in sorted(self.disk.names()):
            if path.startswith(inside):
                self.step("delete", path)
                self.disk.unlink(path)
        self.reply("delete_all", prefix)

    def path(self, name: str) -> Path | None:
        check_name(name)
        return None

    def close(self) -> None:
        return None

    # --- for the sink -----------------------------------------------------------------------------------

    def step(self, step: str, name: str) -> None:
        """One point at which this client may die or fail."""
        self._alive()
        if self.before is not None:
            try:
                self.before(step, name)
            except PowerLoss:
                self._dead = True
                raise
            self._alive()

    def reply(self, operation: str, name: str) -> None:
        """The point at which the answer travels back."""
        self._alive()
        if self.lose_reply is not None and self.lose_reply(operation, name):
            raise UnavailableError(
                f"the reply to {operation} of {name} was lost",
                operation=operation,
                path=name,
                hint="the outcome is unknown: repeat the call or read the name back",
            )

    def open_temporary(self, name: str, path: str) -> tuple[str, Inode]:
        directory, _, base = path.rpartition("/")
        self.step("make_directory", name)
        self.disk.make_directory(directory)
        self.step("sync_parents", name)
        parent = directory
        while parent:
            parent = parent.rpartition("/")[0]
            self.disk.sync_directory(parent)
        temporary = f"{directory}/.{base}.{self.disk.serial()}~".lstrip("/")
        self.step("open", name)
        return temporary, self.disk.open_new(temporary)

    @property
    def alive(self) -> bool:
        """Whether this client still runs: not killed, and no power loss since it was made."""
        return not self._dead and self._boot == self.disk.boots

    def _alive(self) -> None:
        if not self.alive:
            raise PowerLoss

    def _look(self, step: str, name: str) -> Inode:
        path = self._path(name)
        self.step(step, name)
        inode = self.disk.get(path)
        if inode is None:
            raise FileNotFoundError(2, "no such object", f"{self._url}/{name}")
        return inode

    def _path(self, name: str) -> str:
        return f"{self._root}/{check_name(name)}".lstrip("/")

    def _inside(self, prefix: str) -> str:
        joined = "/".join(part for part in (self._root, prefix) if part)
        return f"{joined}/" if joined else ""


class MemorySink:
    """Bytes gathered (object) or appended to a temporary file (page_cache) until ``commit``."""

    def __init__(self, storage: MemoryStorage, name: str, path: str) -> None:
        self._storage, self._name, self._path = storage, name, path
        self._state = "open"
        self._temporary = ""
        self._inode = Inode()
        if storage.disk.semantics == "page_cache":
            self._temporary, self._inode = storage.open_temporary(name, path)

    def write(self, data: bytes | memoryview) -> None:
        self._need_open("write")
        try:
            if self._temporary:
                self._storage.step("write", self._name)
            self._storage.disk.append(self._inode, memoryview(data).cast("B"))
        except BaseException:
            self._fail()
            raise

    def commit(self) -> None:
        self._need_open("commit")
        storage, disk, name = self._storage, self._storage.disk, self._name
        try:
            if self._temporary:
                storage.step("sync", name)
                disk.sync(self._inode)
                storage.step("rename", name)
                disk.rename(self._temporary, self._path)
                self._temporary = ""
                storage.step("sync_directory", name)
                disk.sync_directory(self._path.rpartition("/")[0])
            else:
                storage.step("put", name)
                disk.put(self._path, bytes(self._inode.data), exclusive=False)
            storage.reply("commit", name)
        except BaseException:
            self._fail()
            raise
        self._state = "committed"

    def cancel(self) -> None:
        if self._state == "open":
            self._fail()

    def __enter__(self) -> MemorySink:
        return self

    def __exit__(self, *exc: object) -> None:
        if exc and exc[0] is not None:
            self.cancel()
        elif self._state == "open":
            self.commit()

    def _fail(self) -> None:
        self._state = "dead"
        if self._temporary and self._storage.alive:  # the dead clean nothing up
            self._storage.disk.unlink(self._temporary)

    def _need_open(self, operation: str) -> None:
        if self._state != "open":
            raise InvalidError(
                f"the sink of {self._name} is {self._state}",
                operation=operation,
                path=self._name,
                hint="a sink is used once; after an error open a new one and write the object again",
            )
