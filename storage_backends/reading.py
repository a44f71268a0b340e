"""Reading ranges of an object from several threads, each into memory of its own.

Owns the way past the page cache: a local file is read with O_DIRECT, whose rule is that file offset, length and
memory address are multiples of 4096; where a file system refuses that, through the page cache; where a read fails,
and for storage that is not local, through ``ranges.read_into``, which retries and knows the words of errors. Must never
return bytes that were not read.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from types import TracebackType

from storage_backends.base import Storage
from storage_backends.ranges import read_into

ALIGN = 4096  # what O_DIRECT needs on every device and file system we know


def room(count: int) -> int:
    """Bytes that a buffer must have for a range of ``count`` bytes that begins anywhere."""
    return -(-count // ALIGN) * ALIGN + ALIGN


def buffer(count: int) -> memoryview:
    """Memory at an aligned address, with its pages there already, for ranges of up to ``count`` bytes."""
    # Private: a child that is forked meanwhile must not share what we read into it.
    memory = mmap.mmap(-1, room(count), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
    return memoryview(memory)


class RangeReader:
    """One object for reading ranges. Thread-safe; a context manager. A file is opened by the first read, and again
    by one after ``close``.

    Raises, where it is made: ``FileNotFoundError``; and the errors of ``Storage.size``.

    Attributes:
        size: of the object, in bytes.
        read_bytes: taken from the device so far, alignment included.
    """

    def __init__(self, storage: Storage, name: str) -> None:
        self._storage, self._name = storage, name
        self._fd = -1
        self._direct = False
        self.read_bytes = 0
        self._lock = threading.Lock()
        self.size = storage.size(name)
        path = storage.path(name) if storage.capabilities.local else None
        self._path = None if path is None else os.fspath(path)

    def read(self, start: int, end: int, into: memoryview) -> memoryview:
        """Bytes ``start:end``, fewer only where the object ends. They lie in ``into`` (see ``buffer``) until that
        is used again.

        Raises:
            As ``Storage.read``.
        """
        if self._path is not None and self._opened():
            try:
                return self._pread(start, end, into)
            except OSError:
                pass  # a device that fails: once more, the slow way, with its retries and its words
        [count] = read_into(self._storage, self._name, [(start, into[: end - start])])
        self.read_bytes += count
        return into[:count]

    def close(self) -> None:
        """May run twice; not while others read."""
        with self._lock:
            fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> RangeReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _opened(self) -> bool:
        assert self._path is not None
        with self._lock:
            for flags in (os.O_DIRECT, 0) if self._fd < 0 else ():
                try:
                    self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | flags)
                except OSError as error:
                    if error.errno == errno.EINVAL and flags:
                        continue  # this file system knows no O_DIRECT
                    return False  # the storage will say why, in its words
                self._direct = bool(flags)
                break
            return self._fd >= 0

    def _pread(self, start: int, end: int, into: memoryview) -> memoryview:
        first = start // ALIGN * ALIGN if self._direct else start
        last = -(-end // ALIGN) * ALIGN if self._direct else end
        done = 0
        while first + done < last:
            try:
                count = os.preadv(self._fd, [into[done : last - first]], first + done)
            except OSError as error:
                if not self._direct or error.errno != errno.EINVAL:
                    raise
                # Refused only now (or a short read left us between two pages): through the page cache.
                return self._buffered(start, end, into)
            done += count
            self.read_bytes += count
            if count == 0 or (self._direct and count % ALIGN):
                break  # the end of the file
        if first + done < min(
            end, self.size
        ):  # not the end of the file: some network file systems read short
            return self._buffered(start, end, into)
        return into[start - first : min(end - first, max(done, start - first))]

    def _buffered(self, start: int, end: int, into: memoryview) -> memoryview:
        fd = os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            done = 0
            while done < end - start and (count := os.preadv(fd, [into[done : end - start]], start + done)):
                done += count
                self.read_bytes += count
            return into[:done]
        finally:
            os.close(fd)
