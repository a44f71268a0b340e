"""Operating-system errors in our words.

Owns the one table from ``errno`` to the error classes of this package, shared by the posix backend and by
the object backend (whose drivers raise ``OSError`` too). Must never guess success: an errno that is not in
the table is a permanent error that names itself.
"""

from __future__ import annotations

import errno

from resilience.errors import ExhaustedError, InvalidError, ResilienceError, UnavailableError

# The device or the server went away, or asks for patience: the same call may succeed later.
_TRANSIENT_NAMES = """
    EIO ESTALE ETIMEDOUT EAGAIN EBUSY EINTR ENOLCK EREMOTEIO ENODEV ENXIO ENETDOWN ENETUNREACH ENETRESET
    EHOSTDOWN EHOSTUNREACH ECONNRESET ECONNREFUSED ECONNABORTED ENOTCONN ESHUTDOWN EPIPE ECOMM ENOLINK
"""
_TRANSIENT = frozenset(code for code, name in errno.errorcode.items() if name in _TRANSIENT_NAMES.split())
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_FORBIDDEN = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_PROCESS_LIMIT = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})


def translate(error: OSError, *, operation: str, path: str) -> ResilienceError:
    """The error to raise instead of ``error``; raise it ``from`` the original."""
    code = error.errno
    name = errno.errorcode.get(code or 0, type(error).__name__)
    text = f"{operation} of {path} failed: {name}: {error.strerror or error}"
    if code in _FULL:
        return ExhaustedError(
            text,
            operation=operation,
            path=path,
            hint="free space, raise the quota, or keep fewer checkpoints; then run again: nothing was lost"
            if code != errno.EFBIG
            else "the file-size limit was met: raise it with `ulimit -f unlimited`",
        )
    if code in _PROCESS_LIMIT:
        return ExhaustedError(
            text,
            operation=operation,
            path=path,
            hint="raise the limit of open files (`ulimit -n`) or give the process more memory",
        )
    if code == errno.EROFS:
        return InvalidError(text, operation=operation, path=path, hint="the file system is mounted read-only")
    if code in _FORBIDDEN or isinstance(error, PermissionError):
        return InvalidError(
            text,
            operation=operation,
            path=path,
            hint="give this user (or these credentials) the right to write there, or choose another root",
        )
    if code in _TRANSIENT or isinstance(error, TimeoutError | ConnectionError):
        return UnavailableError(
            text,
            operation=operation,
            path=path,
            hint="check that the disk or the storage service is up and reachable from this node",
        )
    return InvalidError(text, operation=operation, path=path, hint=_hint(code))


def _hint(code: int | None) -> str:
    if code in (errno.ENOTDIR, errno.EISDIR, errno.ELOOP):
        return "something that is not a directory stands where one is needed (or the reverse): move it away"
    if code == errno.ENOENT:
        return "somebody deletes in a directory that is being written to: delete only what nobody writes"
    if code == errno.ENAMETOOLONG:
        return "choose a shorter root or run name"
    return "this error is not known to pass by itself: check the storage root"
