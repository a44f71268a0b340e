"""Reading boxes of arrays out of other people's files: only the bytes that are asked for, and all of them.

Owns nothing but the arithmetic and the file descriptors. Must never take a short read for data.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence

import numpy as np

from resilience.checkpoint.arrays import AnyArray, carrier
from resilience.checkpoint.box import Box
from resilience.errors import CorruptError


class Files:
    """Files opened once each, by path."""

    def __init__(self) -> None:
        self._fds: dict[str, int] = {}

    def fd(self, path: str) -> int:
        if path not in self._fds:
            try:
                self._fds[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError as error:
                raise damaged(path, "is missing") from error
        return self._fds[path]

    def size(self, path: str) -> int:
        return os.fstat(self.fd(path)).st_size

    def read(self, path: str, start: int, size: int) -> bytes:
        """Exactly ``size`` bytes from ``start``, or ``CorruptError``."""
        blocks, at = [], start
        while at < start + size:
            block = os.pread(self.fd(path), start + size - at, at)
            if not block:
                raise damaged(path, f"ends at byte {at:,}, data is expected up to {start + size:,}")
            blocks.append(block)
            at += len(block)
        return blocks[0] if len(blocks) == 1 else b"".join(blocks)

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()


def read_box(files: Files, path: str, base: int, shape: Sequence[int], box: Box, dtype: str) -> AnyArray:
    """``box`` of an array of ``shape`` that lies in C order at byte ``base`` of a file, in the carrier type."""
    kind = carrier(dtype)
    if not box.count:
        return np.empty(box.shape, kind)
    steps = [1] * len(shape)  # elements between neighbours along each axis
    for axis in reversed(range(len(shape) - 1)):
        steps[axis] = steps[axis + 1] * shape[axis + 1]
    first = sum(o * s for o, s in zip(box.offset, steps, strict=True))
    last = sum((e - 1) * s for e, s in zip(box.end, steps, strict=True))
    block = files.read(path, base + first * kind.itemsize, (last - first + 1) * kind.itemsize)
    strides = [step * kind.itemsize for step in steps]
    return np.ndarray(box.shape, kind, block, 0, strides)


class Slice(io.RawIOBase):
    """Some bytes of a file as a file of their own."""

    def __init__(self, files: Files, path: str, start: int, size: int) -> None:
        self._files, self._path, self._start, self._size = files, path, start, size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(self._size - self._at, 0)
        count = left if size is None or size < 0 else min(size, left)
        data = self._files.read(self._path, self._start + self._at, count)
        self._at += count
        return data

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def damaged(path: str, problem: str) -> CorruptError:
    """The error for a source that does not hold what it says."""
    return CorruptError(
        f"{path} {problem}",
        operation="import",
        path=path,
        hint="the checkpoint is incomplete or damaged: copy it again; nothing was imported",
    )
