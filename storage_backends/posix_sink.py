"""One object on its way into a directory: the temporary file, how its bytes get there, and its publication.

Owns the order write, size check, fsync, rename, fsync of the directory. Must never call fsync twice, and never
leave a thread behind that still reads the caller's bytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Protocol

from resilience.errors import InvalidError, UnavailableError
from storage_backends.direct import BlockWriter
from storage_backends.files import sync_directory, sync_file, unlink, write_all
from storage_backends.oserrors import translate

_BUFFER = 8 << 20  # bytes gathered before a write; larger writes go straight to the file


class Body(Protocol):
    """How bytes get into the file ``fd``. Raises ``OSError``."""

    fd: int

    def write(self, view: memoryview) -> None: ...

    def finish(self, size: int) -> None:
        """All of the ``size`` bytes are in the file when this returns, in whatever cache."""

    def close(self) -> None:
        """Close ``fd``, whatever was or was not written. May run twice."""


class Buffered:
    """Small objects and those of unknown size: through the page cache, in few calls."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._buffer = bytearray()

    def write(self, view: memoryview) -> None:
        if len(self._buffer) + len(view) < _BUFFER:
            self._buffer += view
            return
        self._drain()
        if len(view) >= _BUFFER:
            write_all(self.fd, view)
        else:
            self._buffer += view

    def finish(self, size: int) -> None:
        self._drain()

    def close(self) -> None:
        self._buffer = bytearray()
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)

    def _drain(self) -> None:
        if self._buffer:
            write_all(self.fd, memoryview(self._buffer))
            self._buffer = bytearray()


class Blocks:
    """Large objects: see ``direct``."""

    def __init__(self, fd: int, refused: Callable[[], None]) -> None:
        self.fd = fd
        self._blocks = BlockWriter(fd, refused)

    def write(self, view: memoryview) -> None:
        self._blocks.write(view)

    def finish(self, size: int) -> None:
        self._blocks.finish(size)

    def close(self) -> None:
        if self.fd >= 0:
            self._blocks.close()
            fd, self.fd = self.fd, -1
            os.close(fd)


class PosixSink:
    """A temporary file that becomes the object at ``commit``."""

    def __init__(self, directory: str, body: Body, temporary: str, final: str) -> None:
        self._directory, self._body, self._temporary, self._final = directory, body, temporary, final
        self._size = 0
        self._state = "open"
        self._process = os.getpid()

    def write(self, data: bytes | memoryview) -> None:
        self._need_open("write")
        view = memoryview(data).cast("B")
        self._size += len(view)
        try:
            self._body.write(view)
        except OSError as error:
            self._fail()
            raise translate(error, operation="write", path=self._final) from error

    def commit(self) -> None:
        self._need_open("commit")
        try:
            self._body.finish(self._size)
            sync_file(self._body.fd, self._size, self._temporary)
            self._body.close()
            os.rename(self._temporary, self._final)
            self._state = "renamed"
            sync_directory(self._directory)
        except OSError as error:
            self._fail()
            raise translate(error, operation="commit", path=self._final) from error
        except UnavailableError:
            self._fail()
            raise
        self._state = "committed"

    def cancel(self) -> None:
        if self._state == "open":
            self._fail()

    def __enter__(self) -> PosixSink:
        return self

    def __exit__(self, *exc: object) -> None:
        if exc and exc[0] is not None:
            self.cancel()
        elif self._state == "open":
            self.commit()

    def __del__(self) -> None:
        if self._process == os.getpid():  # a forked child merely inherited it, and must leave the file
            self.cancel()

    def _fail(self) -> None:
        """Give the temporary file back. After a failed fsync the kernel has forgotten which pages it could
        not write, so a second one would report success: the sink stays dead."""
        renamed, self._state = self._state == "renamed", "dead"
        self._body.close()
        if not renamed:
            unlink(self._temporary)

    def _need_open(self, operation: str) -> None:
        if self._state != "open":
            raise InvalidError(
                f"the sink of {self._final} is {self._state}",
                operation=operation,
                path=self._final,
                hint="a sink is used once; after an error open a new one and write the object again",
            )
