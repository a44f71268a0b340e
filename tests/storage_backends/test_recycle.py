"""Recycled files: the same space, never the same bytes, and nobody's file is taken for one."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from storage_backends import posix
from storage_backends import recycle as recycling
from storage_backends.posix import PosixStorage
from storage_backends.recycle import Pool, recycle, trim

MIB = 1 << 20
Start = Callable[..., subprocess.Popen[str]]


def put(storage: PosixStorage, name: str, body: bytes) -> None:
    with storage.sink(name, len(body)) as sink:
        sink.write(body)


def inode(root: Path, name: str) -> int:
    return os.stat(root / name).st_ino


def kept(root: Path) -> list[Path]:
    return sorted((root / ".recycled~").iterdir()) if (root / ".recycled~").exists() else []


@pytest.mark.parametrize("size", [2 * MIB, 2 * MIB - 5000, 3 * MIB + 1])
def test_the_next_object_is_written_into_the_space_of_the_last(tmp_path: Path, size: int) -> None:
    storage = PosixStorage(tmp_path)
    put(storage, "c/1/pack", b"1" * 2 * MIB)
    first = inode(tmp_path, "c/1/pack")
    recycle(storage, "c/1/pack")
    assert storage.list("c/1") == []
    assert storage.list() == ["c/"], "what is kept is no object"
    with pytest.raises(FileNotFoundError):
        storage.read("c/1/pack")
    put(storage, "c/2/pack", b"2" * size)
    assert inode(tmp_path, "c/2/pack") == first
    assert storage.read("c/2/pack") == b"2" * size
    assert kept(tmp_path) == []


def test_what_fits_badly_or_is_small_or_absent_is_not_used(tmp_path: Path) -> None:
    storage = PosixStorage(tmp_path)
    put(storage, "large", b"1" * 9 * MIB)
    recycle(storage, "large")
    put(storage, "other", b"2" * 2 * MIB)
    assert [path.stat().st_size for path in kept(tmp_path)] == [9 * MIB]
    put(storage, "small", b"3" * 100)
    for name in ("small", "absent", "no/such"):
        recycle(storage, name)
    assert len(kept(tmp_path)) == 1
    assert storage.list() == ["other"]


def test_an_object_that_has_a_second_name_is_left_alone(tmp_path: Path) -> None:
    """Links to older packs, and copies that people make with ``cp -l``, are the same bytes."""
    storage = PosixStorage(tmp_path)
    put(storage, "c/1/pack", b"1" * 2 * MIB)
    assert storage.link("c/1/pack", "c/2/old.pack")
    recycle(storage, "c/1/pack")
    assert (storage.list("c/1"), kept(tmp_path)) == ([], [])
    put(storage, "c/3/pack", b"3" * 2 * MIB)
    assert storage.read("c/2/old.pack") == b"1" * 2 * MIB


def test_a_file_that_got_a_second_name_in_the_pool_is_not_written_over(tmp_path: Path) -> None:
    storage = PosixStorage(tmp_path)
    put(storage, "a", b"1" * 2 * MIB)
    recycle(storage, "a")
    os.link(kept(tmp_path)[0], tmp_path / "copy")
    put(storage, "b", b"2" * 2 * MIB)
    assert (tmp_path / "copy").read_bytes() == b"1" * 2 * MIB
    assert storage.read("b") == b"2" * 2 * MIB


def test_the_pool_is_bounded_in_number_and_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = PosixStorage(tmp_path)
    for number in range(recycling._FILES + 3):
        put(storage, str(number), b"1" * MIB)
        storage_name = str(number)
    for number in range(recycling._FILES + 3):
        recycle(storage, str(number))
    assert len(kept(tmp_path)) == recycling._FILES
    assert storage.list() == []
    trim(storage)
    put(storage, storage_name, b"1" * MIB)

    class Nearly:
        f_bavail, f_frsize = 2 * MIB - 1, 1

    monkeypatch.setattr(os, "statvfs", lambda path: Nearly)
    recycle(storage, storage_name)
    assert (kept(tmp_path), storage.list()) == ([], [])


def test_trim_and_delete_all_leave_nothing(tmp_path: Path) -> None:
    storage = PosixStorage(tmp_path)
    trim(storage)
    for name in ("c/1/pack", "c/2/pack"):
        put(storage, name, b"1" * MIB)
        recycle(storage, name)
    trim(storage)
    trim(storage)
    storage.delete_all("c")
    assert list(tmp_path.iterdir()) == []


def test_of_many_that_want_a_file_one_gets_it(tmp_path: Path) -> None:
    (tmp_path / "pack").write_bytes(b"1" * MIB)
    assert Pool(str(tmp_path / "pool")).give(str(tmp_path / "pack"))

    def take(number: int) -> bool:
        found = Pool(str(tmp_path / "pool")).take(MIB, str(tmp_path / f"{number}~"))
        if found is not None:
            os.close(found[0])
        return found is not None

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(take, range(8))) == 1


def test_a_full_disk_gets_the_kept_space_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = PosixStorage(tmp_path)
    put(storage, "old", b"1" * 9 * MIB)
    recycle(storage, "old")
    real = posix.reserve

    def reserve(fd: int, size: int) -> None:
        if kept(tmp_path):
            raise OSError(28, "No space left on device")
        real(fd, size)

    monkeypatch.setattr(posix, "reserve", reserve)
    put(storage, "new", b"2" * 2 * MIB)
    assert storage.read("new") == b"2" * 2 * MIB
    assert kept(tmp_path) == []


KILLED = """
    import os, signal, sys
    root, stop_at, after = sys.argv[1], sys.argv[2], int(sys.argv[3])
    from storage_backends.posix import PosixStorage
    from storage_backends.recycle import recycle
    storage = PosixStorage(root)
    calls = 0
    def stopping(name, call):
        def wrapper(*a, **k):
            global calls
            calls += name == stop_at
            if name == stop_at and calls > after:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*a, **k)
        return wrapper
    for name in ("rename", "ftruncate", "pwrite", "fsync", "unlink", "open"):
        setattr(os, name, stopping(name, getattr(os, name)))
    recycle(storage, "c/1/pack")
    with storage.sink("c/3/pack", 2 << 20) as sink:
        sink.write(b"3" * (2 << 20))
    print("not killed")
"""


@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize("stop_at", ["rename", "ftruncate", "pwrite", "fsync", "open"])
def test_a_process_killed_anywhere_leaves_all_or_nothing(
    tmp_path: Path, start: Start, stop_at: str, after: int
) -> None:
    """Half overwritten is a temporary file; every object is whole; the rest is swept."""
    storage = PosixStorage(tmp_path)
    for step in (1, 2):
        put(storage, f"c/{step}/pack", b"%d" % step * 2 * MIB)
    process = start(KILLED, tmp_path, stop_at, after)
    out, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL or "not killed" in out, err
    for step in (1, 2, 3):
        for name in storage.list(f"c/{step}"):
            assert storage.read(name) == b"%d" % step * 2 * MIB
    assert storage.list("c/2") == ["c/2/pack"]
    put(storage, "c/4/pack", b"4" * 2 * MIB)  # nothing of it is in the way
    assert storage.read("c/4/pack") == b"4" * 2 * MIB
    storage.delete_all("c")
    trim(storage)
    assert list(tmp_path.iterdir()) == []
