"""Writing a file past the page cache: large aligned blocks, several on their way at once.

Owns O_DIRECT and its rules: file offset, length and memory address of every write are multiples of 4096. Aligned
memory is written from where it is; everything else goes through a few aligned blocks of our own. Must never
report a block as written before the kernel has said so, and never touch bytes of the caller's after ``finish`` or
``close`` has returned. Where a file system refuses O_DIRECT the same writes go through the page cache.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

ALIGN = 4096  # what every device and file system we know is content with
BLOCK = 4 << 20  # bytes of a write: from here on larger ones bring nothing (docs/decisions/0011)
DEPTH = min(8, max(2, os.cpu_count() or 2))  # writes on their way at once: two of 4 MiB fill a disk of 4 GB/s
_KEEP_SIZE = 1  # of fallocate(2): the file's size goes on telling what was written
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})
_libc = ctypes.CDLL(None, use_errno=True)


class BlockWriter:
    """Writes a new or recycled file from its beginning. Not thread-safe.

    Args:
        fd: open for writing, with or without O_DIRECT.
        refused: called (from any thread, at most once) when the file system takes no direct write after all.
    """

    def __init__(self, fd: int, refused: Callable[[], None]) -> None:
        self._fd = fd
        self._refused = refused
        self._direct = bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)
        self._at = 0  # where the next block goes: all before it has been handed over
        self._rest: memoryview | None = None  # a block of ours that is being filled
        self._filled = 0
        self._spare: list[memoryview] = []  # blocks of ours that nobody uses now
        self._lock = threading.Lock()
        self._room = threading.BoundedSemaphore(DEPTH + 1)  # one is prepared while the others are written
        self._failure: BaseException | None = None
        # Threads are made as blocks come, and inherit the priority of the thread that writes to us.
        self._pool = ThreadPoolExecutor(DEPTH, thread_name_prefix="blocks")

    def write(self, data: memoryview) -> None:
        """Append ``data``, which must not change before ``finish`` or ``close``. ``OSError`` of this or of an
        earlier write."""
        while data:
            whole = min(len(data), BLOCK) // ALIGN * ALIGN
            if self._rest is None and whole and (not self._direct or _address(data) % ALIGN == 0):
                self._hand_over(data[:whole], own=None)
                data = data[whole:]
                continue
            if self._rest is None:
                self._rest, self._filled = self._take(), 0
            count = min(len(data), BLOCK - self._filled)
            self._rest[self._filled : self._filled + count] = data[:count]
            self._filled += count
            data = data[count:]
            if self._filled == BLOCK:
                self._flush(BLOCK)

    def finish(self, size: int) -> None:
        """Write what is left, wait for all of it, and give the file the ``size`` that was written."""
        if self._rest is not None and self._filled:
            padded = -(-self._filled // ALIGN) * ALIGN
            self._rest[self._filled : padded] = bytes(padded - self._filled)
            self._flush(padded)
        self.close()
        if self._failure is not None:
            raise self._failure
        status = os.fstat(self._fd)
        reserved = status.st_blocks * 512 > size + BLOCK
        if status.st_size > size or (reserved and status.st_size == size):
            os.ftruncate(
                self._fd, size
            )  # padding of ours, a longer file that was recycled, more than was needed

    def close(self) -> None:
        """Wait for what is on its way; nothing touches the caller's bytes any more. May run twice."""
        self._pool.shutdown(wait=True)
        self._rest = None
        self._spare.clear()

    def _flush(self, length: int) -> None:
        assert self._rest is not None
        block, self._rest = self._rest, None
        self._hand_over(block[:length], own=block)

    def _hand_over(self, view: memoryview, own: memoryview | None) -> None:
        self._room.acquire()
        if self._failure is not None:
            self._room.release()
            raise self._failure
        self._pool.submit(self._carry_out, view, self._at, own)
        self._at += len(view)

    def _carry_out(self, view: memoryview, at: int, own: memoryview | None) -> None:
        try:
            if self._failure is None:
                self._write(view, at)
        except BaseException as error:  # noqa: BLE001 - raised by the next write, or by finish
            self._failure = error
        finally:
            if own is not None:
                self._spare.append(own)
            self._room.release()

    def _write(self, view: memoryview, at: int) -> None:
        while view:
            direct = self._direct
            try:
                written = os.pwrite(self._fd, view, at)
            except OSError as error:
                if not direct or error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
                self._give_up_direct(told=at % ALIGN == 0)  # else it is the rest of a short write: no wonder
                continue
            view, at = view[written:], at + written

    def _give_up_direct(self, *, told: bool) -> None:
        """Go on through the page cache."""
        with self._lock:
            if not self._direct:
                return
            flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
            self._direct = False
        if told:
            self._refused()

    def _take(self) -> memoryview:
        return self._spare.pop() if self._spare else memoryview(mmap.mmap(-1, BLOCK))


def open_direct(path: str, flags: int) -> tuple[int, bool]:
    """Open ``path`` for writing with O_DIRECT, or without where that is refused; and whether it was not."""
    flags |= os.O_WRONLY | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_DIRECT, 0o666), True
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
    # Some kernels make the file before they look at O_DIRECT: the name is ours, a new one beyond chance.
    return os.open(path, flags & ~os.O_EXCL, 0o666), False


def reserve(fd: int, size: int) -> None:
    """Take the space of a file that will have ``size`` bytes. ``OSError`` only where there is too little; a file
    system that cannot reserve makes its writes slower, no less right. (``posix_fallocate`` would write zeros.)"""
    call = getattr(_libc, "fallocate", None)
    if call is None or size <= 0:
        return
    call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    if call(fd, _KEEP_SIZE, 0, size) != 0:
        code = ctypes.get_errno()
        if code in _NO_SPACE:
            raise OSError(code, os.strerror(code))


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).__array_interface__["data"][0])
