"""Where an export goes: a local file or directory that is whole or not there, and files filled piece by piece.

Owns the temporary neighbour that becomes the destination in one rename, and what may be overwritten. Space is taken
before the first byte is copied, so a disk that is too small is known at once. Must never replace what no export made.
"""

from __future__ import annotations

import errno
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Sequence
from types import TracebackType

import numpy as np

from resilience.checkpoint.arrays import AnyArray
from resilience.checkpoint.box import Box
from resilience.errors import InvalidError
from storage_backends.files import sync_directory, write_all
from storage_backends.oserrors import translate

_RUN_BYTES = 4096  # rows at least so long are written one by one
_WINDOW = 16 << 20  # bytes of the file read, changed and written back for shorter ones
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


class Target:
    """The destination of one export. A context manager: normal exit makes it visible, an exception leaves nothing.

    Args:
        dest: a local path; its parents are made.
        single: it is to be a file, not a directory.
        overwrite: whether an older export may be replaced.
        ours: whether a directory is what an export of this kind made, and nothing else.

    Raises:
        InvalidError: ``dest`` is a URL, or something is there that may not be replaced.
    """

    def __init__(self, dest: str, *, single: bool, overwrite: bool, ours: Callable[[str], bool]) -> None:
        dest = dest.removeprefix("file://")
        if _SCHEME.match(dest):
            raise _invalid(dest, f"{dest} is a URL", "export to a local path, then copy it there")
        self.path = os.path.abspath(os.path.expanduser(dest))
        self._single, self._overwrite, self._ours = single, overwrite, ours
        self._check()
        parent, name = os.path.split(self.path)
        self._temporary = f"{parent}/.{name[:100]}.{secrets.token_hex(8)}~"
        self._made = False

    def _check(self) -> None:
        if not os.path.lexists(self.path):
            return
        if not self._overwrite:
            raise _invalid(
                self.path, f"{self.path} exists", "choose another destination, or replace it with --overwrite"
            )
        if os.path.islink(self.path) or os.path.isdir(self.path) == self._single:
            kind = "a file" if self._single else "a directory"
            raise _invalid(self.path, f"{self.path} is not {kind}", "choose another destination")
        if not self._single and os.listdir(self.path) and not self._ours(self.path):
            raise _invalid(
                self.path,
                f"{self.path} holds other things than an export of this kind",
                "nothing was changed; choose another destination, or remove it yourself",
            )

    def __enter__(self) -> Target:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._discard()
            if isinstance(error, OSError):
                raise translate(error, operation="export", path=self.path) from error
            return
        try:
            self._publish()
        except OSError as problem:
            self._discard()
            raise translate(problem, operation="export", path=self.path) from problem
        except BaseException:
            self._discard()
            raise

    def file(self, name: str, size: int = 0) -> Filled:
        """A new file of the export; ``name`` is relative to the directory, and of no meaning for a single file.

        ``size`` bytes are taken at once, as zeros.
        """
        path = self._temporary if self._single else f"{self._temporary}/{name}"
        os.makedirs(os.path.dirname(path), exist_ok=True)
        self._made = True
        return Filled(path, size)

    def _publish(self) -> None:
        if not self._made:
            os.makedirs(self._temporary)
        if not self._single:
            for directory, _, _ in os.walk(self._temporary):
                sync_directory(directory)
        self._check()  # again: an export takes a while
        parent = os.path.dirname(self.path)
        if os.path.lexists(self.path):
            old = f"{self._temporary}old~"
            os.rename(self.path, old)
            os.rename(self._temporary, self.path)
            sync_directory(parent)
            os.unlink(old) if self._single else shutil.rmtree(old)
        elif self._single:
            os.link(self._temporary, self.path)  # unlike a rename it replaces nothing
            os.unlink(self._temporary)
            sync_directory(parent)
        else:
            os.rename(self._temporary, self.path)
            sync_directory(parent)

    def _discard(self) -> None:
        if os.path.isdir(self._temporary):
            shutil.rmtree(self._temporary, ignore_errors=True)
        elif os.path.lexists(self._temporary):
            os.unlink(self._temporary)


class Filled:
    """A file being written, anywhere in it. As a context manager it ends durable."""

    def __init__(self, path: str, size: int) -> None:
        self.path = path
        # Readable too: see ``_patch``.
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            if size:
                _allocate(self.fd, size)
        except BaseException:
            os.close(self.fd)
            raise
        self.end = 0

    def __enter__(self) -> Filled:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                os.fsync(self.fd)
        finally:
            os.close(self.fd)

    def append(self, data: bytes | bytearray | memoryview) -> int:
        """Write at the end of what was appended so far; where that was."""
        at = self.end
        os.lseek(self.fd, at, os.SEEK_SET)
        write_all(self.fd, memoryview(data).cast("B"))
        self.end += len(memoryview(data).cast("B"))
        return at

    def fill(self, base: int, shape: Sequence[int], box: Box, values: AnyArray) -> None:
        """Write ``values``, which are ``box`` of an array of ``shape`` that lies at byte ``base`` in C order."""
        if not box.count:
            return
        itemsize = values.itemsize
        axis = _first_partial(box, shape)
        row = math.prod(shape[1:]) * itemsize
        if all(n == 1 for n in box.shape[:axis]):
            start = 0
            for offset, size in zip(box.offset, shape, strict=True):
                start = start * size + offset
            os.lseek(self.fd, base + start * itemsize, os.SEEK_SET)
            write_all(self.fd, np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
        elif row > _WINDOW or math.prod(box.shape[axis:]) * itemsize >= _RUN_BYTES:
            inner = Box(box.offset[1:], box.shape[1:])
            for index in range(box.shape[0]):
                self.fill(base + (box.offset[0] + index) * row, shape[1:], inner, values[index])
        else:
            self._patch(base + box.offset[0] * row, row, shape[1:], box, values)

    def _patch(self, start: int, row: int, inner: Sequence[int], box: Box, values: AnyArray) -> None:
        """Short rows (a shard of few columns): read some of the file, change it, write it back."""
        where = tuple(slice(o, o + n) for o, n in zip(box.offset[1:], box.shape[1:], strict=True))
        step = max(_WINDOW // row, 1)
        for first in range(0, box.shape[0], step):
            rows = values[first : first + step]
            window = bytearray(os.pread(self.fd, len(rows) * row, start + first * row))
            window += bytes(len(rows) * row - len(window))
            view = np.frombuffer(window, values.dtype).reshape(len(rows), *inner)
            view[(slice(None), *where)] = rows
            os.lseek(self.fd, start + first * row, os.SEEK_SET)
            write_all(self.fd, memoryview(window))


def _first_partial(box: Box, shape: Sequence[int]) -> int:
    """The axis from which on the box is contiguous: all later ones it holds whole."""
    axis = len(shape)
    while axis and box.shape[axis - 1] == shape[axis - 1]:
        axis -= 1
    return max(axis - 1, 0)


def _allocate(fd: int, size: int) -> None:
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise
        os.ftruncate(fd, size)


def _invalid(path: str, problem: str, hint: str) -> InvalidError:
    return InvalidError(problem, operation="export", path=path, hint=hint)
