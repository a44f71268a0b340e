"""The few steps from which durable files are made: write, size check, fsync, link, fsync of the directory.

Owns the system calls and what their answers mean; knows nothing of object names. Must never report a file as
published unless it is a regular file of that very inode, and must never call fsync on a file a second time.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Callable

from resilience.errors import InvalidError, UnavailableError

_NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK})
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1


def open_new(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def write_all(fd: int, view: memoryview) -> None:
    while view:
        view = view[os.write(fd, view) :]  # short at 2 GiB, at a nearly full disk, at a signal


def sync_file(fd: int, expected: int, path: str) -> None:
    """Size check, then fsync: some network file systems tell only here that they are full."""
    size = os.fstat(fd).st_size
    if size != expected:
        raise UnavailableError(
            f"{path} holds {size} bytes after writing {expected}",
            operation="write",
            path=path,
            hint="something else wrote to the temporary file, or the file system lost bytes: write it again",
        )
    os.fsync(fd)


def sync_directory(directory: str) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        # Some FUSE and SMB file systems have no fsync of directories; their metadata is synchronous.
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOSYS):
            raise
    finally:
        os.close(fd)


def publish(temporary: str, final: str) -> bool:
    """Give the temporary file the final name unless that is taken.

    False: it is taken, perhaps by ourselves: a retransmitted NFS call reports its own success as EEXIST, so
    the caller compares the bytes.
    """
    try:
        os.link(temporary, final)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return _rename_noreplace(temporary, final)
    status = os.lstat(final)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink < 2:
        # BeeGFS can be told to make symbolic links instead; those do not arbitrate and would dangle.
        raise _cannot_arbitrate(final, f"link() made something else (nlink {status.st_nlink})")
    return True


def hard_link(source: str, target: str) -> bool:
    """A second name for a file; ``False`` where the file system has none to give."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return False
    status = os.lstat(target)
    if stat.S_ISREG(status.st_mode) and status.st_nlink >= 2:
        return True
    os.unlink(
        target
    )  # a symbolic link, or names that the file system does not count: those bytes could be recycled
    return False


def _rename_noreplace(temporary: str, final: str) -> bool:
    call: Callable[..., int] | None = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        raise _cannot_arbitrate(final, "no hard links, and the C library has no renameat2")
    source, target = os.fsencode(temporary), os.fsencode(final)
    if call(_AT_FDCWD, source, _AT_FDCWD, target, _RENAME_NOREPLACE) == 0:
        return True
    code = ctypes.get_errno()
    if code == errno.EEXIST:
        return False
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP):
        raise _cannot_arbitrate(final, "neither hard links nor RENAME_NOREPLACE")
    raise OSError(code, os.strerror(code), final)


def _cannot_arbitrate(path: str, what: str) -> InvalidError:
    return InvalidError(
        f"the file system of {path} cannot create a name exclusively: {what}",
        operation="create",
        path=path,
        hint="choose a root with hard links (ext4, xfs, NFS, Lustre, GPFS) or an object store",
    )


def unlink(path: str) -> None:
    """Remove a temporary file; one that stays is harmless, so its own error must not hide the first."""
    try:
        os.unlink(path)
    except OSError:
        return
