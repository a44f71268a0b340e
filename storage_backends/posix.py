"""Storage in a directory of a POSIX file system: local disk, NVMe, NFS, Lustre, GPFS.

Owns the two durable publications: ``create`` (temporary file, fsync, ``link``, fsync of the directory) and
the sink (temporary file, fsync, ``rename``, fsync of the directory). Must never show a partial object under
its name, never trust an ``fsync`` after one has failed, and never decide by looking whether a name exists.
Temporary files carry a ``~``, which no object name may hold: orphans of dead writers cannot be listed, read
or mistaken for objects, and ``delete_all`` sweeps them.
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

from resilience.errors import InvalidError, UnavailableError
from storage_backends.base import (
    Capabilities,
    check_data,
    check_directory,
    check_name,
    check_range,
    well_formed,
)
from storage_backends.files import hard_link, open_new, publish, sync_directory, sync_file, unlink, write_all
from storage_backends.oserrors import translate

_BUFFER = 8 << 20  # bytes gathered before a write; larger writes go straight to the file
T = TypeVar("T")


class PosixStorage:
    """Objects as files below ``root``, which is created by the first write."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._root = os.path.abspath(os.path.expanduser(os.fspath(root)))
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
            directory, fd, temporary = self._temporary(final)
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

    def sink(self, name: str) -> PosixSink:
        final = self._local(name)
        try:
            directory, fd, temporary = self._temporary(final)
        except OSError as error:
            raise translate(error, operation="sink", path=final) from error
        return PosixSink(directory, fd, temporary, final)

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
            directory, fd, temporary = self._temporary(final)
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

    def _temporary(self, final: str) -> tuple[str, int, str]:
        """Directory, open descriptor and name of a new temporary file beside ``final``."""
        directory, base = os.path.split(final)
        temporary = f"{directory}/.{base[:100]}.{uuid.uuid4().hex}~"
        for last in (False, True):
            self._make_directory(directory)
            try:
                return directory, open_new(temporary), temporary
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


class PosixSink:
    """A temporary file that becomes the object at ``commit``."""

    def __init__(self, directory: str, fd: int, temporary: str, final: str) -> None:
        self._directory, self._fd, self._temporary, self._final = directory, fd, temporary, final
        self._buffer = bytearray()
        self._size = 0
        self._state = "open"
        self._process = os.getpid()

    def write(self, data: bytes | memoryview) -> None:
        self._need_open("write")
        view = memoryview(data).cast("B")
        self._size += len(view)
        try:
            if len(self._buffer) + len(view) < _BUFFER:
                self._buffer += view
                return
            self._drain()
            if len(view) >= _BUFFER:
                write_all(self._fd, view)
            else:
                self._buffer += view
        except OSError as error:
            self._fail()
            raise translate(error, operation="write", path=self._final) from error

    def commit(self) -> None:
        self._need_open("commit")
        try:
            self._drain()
            sync_file(self._fd, self._size, self._temporary)
            os.close(self._fd)
            self._fd = -1
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

    def _drain(self) -> None:
        if self._buffer:
            write_all(self._fd, memoryview(self._buffer))
            self._buffer = bytearray()

    def _fail(self) -> None:
        """Give the temporary file back. After a failed fsync the kernel has forgotten which pages it could
        not write, so a second one would report success: the sink stays dead."""
        renamed, self._state = self._state == "renamed", "dead"
        self._buffer = bytearray()
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)
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
