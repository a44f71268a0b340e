"""Space of dead files, kept for new ones: overwriting a file is up to twice as fast as writing a new one.

Owns a directory of files that are nothing any more, and the two moves: in, by rename from an object's name; out,
by rename to a temporary name. Both are atomic, so that of several processes one gets a file, and a process that
dies anywhere leaves either a file of the pool or a temporary one. Must never take in what has a second name (a
hard link is somebody's copy), nor keep so much that others miss it. Which objects may come here is not decided
here: ``checkpoint.retention`` does.
"""

from __future__ import annotations

import os
import stat
import uuid

from storage_backends.base import Storage
from storage_backends.direct import open_direct, reserve
from storage_backends.files import unlink

POOL = ".recycled~"  # below a storage root: no object can have that name

SMALLEST = 1 << 20  # bytes of a file below which a new one costs no more
_FILES = 16
_SHARE = 2  # the pool holds at most one of so many parts of the space that is free besides
_LOOSE = 2  # a file may be so many times larger than what is to be written into it, and the reverse


class Pool:
    """The pool in ``directory``, which is made by the first file and gone with the last ``clear``."""

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def give(self, path: str) -> bool:
        """Take the file ``path`` in. False: it is still there, and not wanted."""
        try:
            status = os.lstat(path)
            if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1 or status.st_size < SMALLEST:
                return False
            held = self._files()
            free = os.statvfs(path)
            if len(held) >= _FILES or _SHARE * (sum(size for size, _ in held) + status.st_size) > (
                free.f_bavail * free.f_frsize
            ):
                return False
            os.makedirs(self._directory, exist_ok=True)
            os.rename(path, f"{self._directory}/{uuid.uuid4().hex}~")
        except OSError:
            return (
                False  # another file system, no right to, gone: the caller deletes it, and says what is wrong
            )
        return True

    def take(self, size: int, temporary: str) -> tuple[int, bool] | None:
        """A file for ``size`` bytes, open for writing under the name ``temporary`` (whose directory exists), with
        its space reserved; and whether O_DIRECT was granted. ``None`` when there is none that fits."""
        fitting = [(s, p) for s, p in self._files() if s <= size * _LOOSE and size <= s * _LOOSE]
        # The nearest size first, rather one to cut than one to extend: new space is slow to write.
        for _, path in sorted(fitting, key=lambda it: (it[0] < size, abs(it[0] - size))):
            try:
                os.rename(path, temporary)
            except OSError:
                continue  # somebody else was faster
            try:
                fd, direct = open_direct(temporary, 0)
            except OSError:
                unlink(temporary)  # another user's, in a directory that both may write
                continue
            try:
                if os.fstat(fd).st_nlink != 1:
                    raise OSError("it has a second name by now")
                os.ftruncate(fd, size)
                reserve(fd, size)
            except OSError:
                os.close(fd)
                unlink(temporary)
                continue
            return fd, direct
        return None

    def clear(self) -> bool:
        """Remove every file, and the directory. Whether there was anything."""
        held = self._files()
        for _, path in held:
            unlink(path)
        try:
            os.rmdir(self._directory)
        except OSError:  # absent; or somebody has just given a file
            return bool(held)
        return bool(held)

    def _files(self) -> list[tuple[int, str]]:
        """``(size, path)`` of what is here, as far as it can be seen."""
        found = []
        try:
            with os.scandir(self._directory) as entries:
                for entry in entries:
                    try:
                        found.append((entry.stat(follow_symlinks=False).st_size, entry.path))
                    except FileNotFoundError:
                        continue
        except (FileNotFoundError, NotADirectoryError):
            return []
        return found


def recycle(storage: Storage, name: str) -> None:
    """As ``storage.delete``; where objects are local files, the space is kept for sinks to come: bounded, no object,
    and given back by ``trim``. Only for what nothing committed names and nobody reads any more."""
    path = storage.path(name)
    pool = _pool(storage)
    if path is None or pool is None or not pool.give(str(path)):
        storage.delete(name)


def trim(storage: Storage) -> None:
    """Give back the space that ``recycle`` kept. May run twice, and while others write."""
    pool = _pool(storage)
    if pool is not None:
        pool.clear()


def _pool(storage: Storage) -> Pool | None:
    if not storage.capabilities.local:
        return None
    beside = storage.path("any")
    return None if beside is None else Pool(str(beside.with_name(POOL)))
