"""Storage in a directory of a POSIX file system: local disk, NVMe, NFS, Lustre, GPFS.

Owns the two durable publications: ``create`` (temporary file, fsync, ``link``, fsync of the directory) and
the sink (temporary file, fsync, ``rename``, fsync of the directory). Must never show a partial object under
its name, never trust an ``fsync`` after one has failed, and never decide by looking whether a name exists.
Temporary files carry a ``~``, which no object name may hold: orphans of dead writers cannot be listed, read
or mistaken for objects, and ``delete_all`` sweeps them. So does the directory of recycled files in the root.
Large objects of known size are written past the page cache, into recycled files where there are any.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from resilience.errors import UnavailableError
from storage_backends.base import (
    Capabilities,
    check_data,
    check_directory,
    check_name,
    check_range,
    well_formed,
)
from storage_backends.direct import open_direct, reserve
from storage_backends.files import hard_link, open_new, publish, sync_directory, sync_file, unlink, write_all
from storage_backends.oserrors import translate
from storage_backends.posix_sink import Blocks, Buffered, PosixSink
from storage_backends.recycle import POOL, SMALLEST, Pool

_FULL = (errno.ENOSPC, errno.EDQUOT)
T = TypeVar("T")
Opened = TypeVar("Opened")


class PosixStorage:
    """Objects as files below ``root``, which is created by the first write."""

    def __init__(
        self, root: str | os.PathLike[str], *, tell: Callable[[str], None] = lambda text: None
    ) -> None:
        """``tell`` is called, from any thread, with what a person should know and no caller has to act on."""
        self._root = os.path.abspath(os.path.expanduser(os.fspath(root)))
        self._tell = tell
        self._pool = Pool(f"{self._root}/{POOL}")
        self._refused = False  # this file system takes no O_DIRECT; said once
        # Directories whose own entry, and their parents', are known to be on disk: path -> (device, inode).
        self._durable: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"file://{self._root}"

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(arbitrates=True, local=True)

    def __repr__(self) -> str:
        return f"PosixStorage({self._root!r})"

    def create(self, name: str, data: bytes) -> bytes | None:
        check_data(data, name)
        final = self._local(name)
        try:
            directory, fd, temporary = self._temporary(final, open_new)
            try:
                try:
                    write_all(fd, memoryview(data).cast("B"))
                    sync_file(fd, len(data), temporary)
                    won = publish(temporary, final)
                finally:
                    os.close(fd)
                # Also when we lost: the winner may have died between its link and its fsync, and our caller
                # is about to rely on the bytes that we return.
                sync_directory(directory)
            finally:
                unlink(temporary)
            if won:
                return None
            held = _read(final, 0, None)
        except FileNotFoundError as error:
            # Between the failed link and the read the holder was deleted, or the directory under our feet.
            raise UnavailableError(
                f"{final} vanished while it was being created",
                operation="create",
                path=final,
                hint="do not delete in a directory that is written to; the call may be repeated",
            ) from error
        except OSError as error:
            raise translate(error, operation="create", path=final) from error
        return None if held == bytes(data) else held

    def sink(self, name: str, size: int | None = None) -> PosixSink:
        final = self._local(name)
        try:
            if size is None or size < SMALLEST:
                directory, fd, temporary = self._temporary(final, open_new)
                return PosixSink(directory, Buffered(fd), temporary, final)
            try:
                return self._large(final, size)
            except OSError as error:
                # What the pool holds is nobody's: it must not be the reason why a disk is full.
                if error.errno not in _FULL or not self._pool.clear():
                    raise
                return self._large(final, size)
        except OSError as error:
            raise translate(error, operation="sink", path=final) from error

    def _large(self, final: str, size: int) -> PosixSink:
        def open_file(temporary: str) -> tuple[int, bool]:
            if (found := self._pool.take(size, temporary)) is not None:
                return found
            fd, direct = open_direct(temporary, os.O_CREAT | os.O_EXCL)
            try:
                reserve(fd, size)
            except BaseException:
                os.close(fd)
                unlink(temporary)
                raise
            return fd, direct

        directory, (fd, direct), temporary = self._temporary(final, open_file)
        if not direct:
            self._say_refused()
        return PosixSink(directory, Blocks(fd, self._say_refused), temporary, final)

    def _say_refused(self) -> None:
        with self._lock:
            said, self._refused = self._refused, True
        if not said:
            self._tell(
                f"{self._root} takes no direct I/O (O_DIRECT): checkpoints are written through the page cache, "
                "which costs memory and is slower"
            )

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        check_range(start, end, name)
        path = self._local(name)
        return _looking(path, "read", lambda: _read(path, start, end))

    def size(self, name: str) -> int:
        path = self._local(name)

        def look() -> int:
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):
                raise _absent(path)
            return status.st_size

        return _looking(path, "size", look)

    def link(self, source: str, target: str) -> bool:
        origin, final = self._local(source), self._local(target)
        try:
            directory, fd, temporary = self._temporary(final, open_new)
            os.close(fd)
            unlink(temporary)
            try:
                if not hard_link(origin, temporary):
                    return False
                os.rename(temporary, final)
            finally:
                unlink(temporary)  # a rename onto another name of the same file does nothing
            sync_directory(directory)
        except FileNotFoundError:
            raise _absent(origin) from None
        except OSError as error:
            raise translate(error, operation="link", path=final) from error
        return True

    def list(self, prefix: str = "") -> list[str]:
        prefix = check_directory(prefix)
        path = self._local(prefix) if prefix else self._root
        try:
            with os.scandir(path) as entries:
                found = [(entry.name, entry.is_dir()) for entry in entries]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise translate(error, operation="list", path=path) from error
        lead = f"{prefix}/" if prefix else ""
        return sorted(f"{lead}{n}{'/' if d else ''}" for n, d in found if well_formed(n))

    def delete(self, name: str) -> None:
        path = self._local(name)
        try:
            os.unlink(path)
        except (FileNotFoundError, NotADirectoryError):
            return
        except IsADirectoryError:  # no object of that name: a directory is not one
            return
        except OSError as error:
            raise translate(error, operation="delete", path=path) from error

    def delete_all(self, prefix: str) -> None:
        path = self._local(check_directory(prefix, root=False))
        while os.path.isdir(path):
            try:
                shutil.rmtree(path)
            except FileNotFoundError:
                continue  # somebody else deletes here too: look again at what is left
            except OSError as error:
                raise translate(error, operation="delete_all", path=path) from error

    def path(self, name: str) -> Path | None:
        return Path(self._local(name))

    def close(self) -> None:
        return None

    def _local(self, name: str) -> str:
        return f"{self._root}/{check_name(name)}"

    def _temporary(self, final: str, open_file: Callable[[str], Opened]) -> tuple[str, Opened, str]:
        """Directory, what ``open_file`` made of it, and name of a new temporary file beside ``final``."""
        directory, base = os.path.split(final)
        temporary = f"{directory}/.{base[:100]}.{uuid.uuid4().hex}~"
        for last in (False, True):
            self._make_directory(directory)
            try:
                return directory, open_file(temporary), temporary
            except FileNotFoundError:  # somebody removed the directory after we made it
                if last:
                    raise
        raise AssertionError("unreachable")

    def _make_directory(self, directory: str) -> None:
        """Make the directory and see that its entry, and those of all its parents, are durable.

        Even where it exists already: whoever made it may have died before its fsync. Remembered by inode, so
        that it costs one ``stat`` afterwards.
        """
        status = None
        try:
            status = os.stat(directory)
        except FileNotFoundError:
            os.makedirs(directory, exist_ok=True)
            status = os.stat(directory)
        if not stat.S_ISDIR(status.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), directory)
        identity = (status.st_dev, status.st_ino)
        with self._lock:
            if self._durable.get(directory) == identity:
                return
        parent = os.path.dirname(directory)
        while parent != directory and os.stat(parent).st_dev == status.st_dev:
            inside = parent == self._root or parent.startswith(self._root + "/")
            try:
                sync_directory(parent)
            except PermissionError:
                if inside:
                    raise  # above our root there may be directories that we cannot read, hence did not make
            if parent == "/":
                break
            parent = os.path.dirname(parent)
        with self._lock:
            self._durable[directory] = identity


def _absent(path: str) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, "no such object", path)


def _read(path: str, start: int, end: int | None) -> bytes:
    with open(path, "rb") as file:
        file.seek(start)
        return file.read() if end is None else file.read(max(0, end - start))


def _looking(path: str, operation: str, look: Callable[[], T]) -> T:
    """Run a read-only call; a directory, or a file where a directory would be, is an absent object."""
    try:
        return look()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise _absent(path) from None
    except OSError as error:
        raise translate(error, operation=operation, path=path) from error
