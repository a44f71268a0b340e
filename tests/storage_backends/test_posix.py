"""The POSIX backend where the suite cannot look: killed writers, racing processes, full and broken disks."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from resilience.errors import ExhaustedError, InvalidError, UnavailableError
from storage_backends.posix import PosixStorage

Start = Callable[..., subprocess.Popen[str]]


def temporaries(root: Path) -> list[str]:
    return sorted(path.name for path in root.rglob("*") if path.name.endswith("~"))


def test_nothing_is_made_before_the_first_write(tmp_path: Path) -> None:
    storage = PosixStorage(tmp_path / "a" / "b")
    assert storage.list() == []
    storage.delete("x/y")
    storage.delete_all("x")
    assert not (tmp_path / "a").exists()


def test_racing_processes_have_one_winner_per_slot(tmp_path: Path, start: Start) -> None:
    """Eight processes, 40 slots, no coordination but the file system."""
    code = """
        import os, sys
        from storage_backends.posix import PosixStorage
        storage, me = PosixStorage(sys.argv[1]), sys.argv[2].encode() * 3000
        print("ready", flush=True)
        sys.stdin.readline()
        won = []
        for slot in range(40):
            held = storage.create(f"log/{slot}", me)
            assert held is None or (len(held) == 3000 and held != me), held
            won += [slot] if held is None else []
        print(*won)
    """
    processes = [start(code, tmp_path, letter) for letter in "abcdefgh"]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    wins: list[int] = []
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        wins += map(int, out.split())
    assert sorted(wins) == list(range(40))
    assert temporaries(tmp_path) == []


def test_a_reader_never_sees_part_of_an_object(tmp_path: Path) -> None:
    storage, body = PosixStorage(tmp_path), b"x" * 3_000_000
    stop, seen = threading.Event(), set()

    def look() -> None:
        while not stop.is_set():
            for name in ("created", "streamed"):
                try:
                    seen.add(len(storage.read(name)))
                except FileNotFoundError:
                    continue

    reader = threading.Thread(target=look)
    reader.start()
    for _ in range(10):
        storage.create("created", body)
        with storage.sink("streamed") as sink:
            for _ in range(3):
                sink.write(body[:1_000_000])
        storage.delete("created")
    stop.set()
    reader.join()
    assert seen <= {len(body)}


# A writer that stops, and waits to be killed, right before the n-th system call that matters.
KILLED = """
    import os, sys, signal
    root, how, stop_at = sys.argv[1], sys.argv[2], sys.argv[3]
    from storage_backends import files
    from storage_backends.posix import PosixStorage
    def stopping(name, call):
        def wrapper(*a, **k):
            if name == stop_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*a, **k)
        return wrapper
    import os as _os
    storage = PosixStorage(root)
    storage.create("d/warm", b"up")
    for name in ("write", "fsync", "link", "rename", "unlink", "close"):
        setattr(_os, name, stopping(name, getattr(_os, name)))
    if how == "create":
        storage.create("d/object", b"x" * 100_000)
    else:
        with storage.sink("d/object") as sink:
            for _ in range(20):
                sink.write(b"y" * 1_000_000)
"""


@pytest.mark.parametrize(
    ("how", "stop_at", "whole"),
    [
        ("create", "write", False),
        ("create", "fsync", False),
        ("create", "link", False),
        ("create", "close", True),
        ("create", "unlink", True),
        ("sink", "write", False),
        ("sink", "fsync", False),
        ("sink", "rename", False),
    ],
)
def test_a_killed_writer_leaves_all_or_nothing(
    tmp_path: Path, start: Start, how: str, stop_at: str, whole: bool
) -> None:
    process = start(KILLED, tmp_path, how, stop_at)
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, err
    storage = PosixStorage(tmp_path)
    assert storage.list("d") == (["d/object", "d/warm"] if whole else ["d/warm"])
    if whole:
        assert storage.read("d/object") == b"x" * 100_000
    assert len(temporaries(tmp_path)) == 1, "the orphan is there, harmless and unlisted"
    assert storage.create("d/object", b"x" * 100_000) is None, "the next attempt is not in its way"
    storage.delete_all("d")
    assert temporaries(tmp_path) == []
    assert storage.list() == []


def test_a_writer_killed_at_any_moment_leaves_all_or_nothing(tmp_path: Path, start: Start) -> None:
    """SIGKILL from outside, wherever it happens to hit."""
    code = """
        import sys
        from storage_backends.posix import PosixStorage
        storage = PosixStorage(sys.argv[1])
        print("ready", flush=True)
        for number in range(100_000):
            storage.create(f"d/c{number}", b"%08d" % number * 20_000)
            with storage.sink(f"d/s{number}") as sink:
                for _ in range(4):
                    sink.write(b"%08d" % number * 20_000)
            print(number, flush=True)
    """
    for _ in range(4):
        root = tmp_path / str(_)
        process = start(code, root)
        assert process.stdout is not None
        for _ in range(4):
            process.stdout.readline()
        process.kill()
        out, _ = process.communicate(timeout=30)
        storage = PosixStorage(root)
        names = storage.list("d")
        acknowledged = [line for line in out.split() if line.isdigit()]
        assert {f"d/{kind}{number}" for number in acknowledged for kind in "cs"} <= set(names)
        for name in names:
            number = int(name[3:])
            assert storage.read(name) == b"%08d" % number * (20_000 if name[2] == "c" else 80_000)


def test_an_acknowledged_create_is_synced_file_first_then_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of system calls is the protocol."""
    calls: list[str] = []

    def traced(name: str) -> None:
        real = getattr(os, name)

        def call(*arguments: object, **options: object) -> object:
            what = name
            if name == "fsync":
                where = os.readlink(f"/proc/self/fd/{arguments[0]}")
                what = f"fsync {'file' if where.endswith('~') else os.path.relpath(where, tmp_path)}"
            calls.append(what)
            return real(*arguments, **options)

        monkeypatch.setattr(os, name, call)

    storage = PosixStorage(tmp_path / "root")
    storage.create("d/warm", b"up")
    for name in ("fsync", "link", "rename", "unlink"):
        traced(name)
    storage.create("d/a", b"1")
    assert calls == ["fsync file", "link", "fsync root/d", "unlink"]
    calls.clear()
    assert storage.create("d/a", b"2") == b"1"
    assert "fsync root/d" in calls, "the winner may have died before its fsync: the loser relies on its bytes"
    calls.clear()
    with storage.sink("d/b") as sink:
        sink.write(b"1")
    assert calls == ["fsync file", "rename", "fsync root/d"]


def test_directories_on_the_way_are_synced_even_if_somebody_else_made_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "root" / "d").mkdir(parents=True)
    synced: list[str] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    PosixStorage(tmp_path / "root").create("d/e/a", b"1")
    for directory in ("root/d/e", "root/d", "root"):
        assert str(tmp_path / directory) in synced
    assert str(tmp_path) in synced, "the root's own entry"


def test_after_a_failed_fsync_the_sink_is_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second fsync of a file whose pages were dropped reports success."""
    storage = PosixStorage(tmp_path)
    storage.create("d/warm", b"up")
    sink = storage.sink("d/a")
    sink.write(b"1")
    failures = [OSError(errno.EIO, "Input/output error")]
    calls = []

    def fsync(fd: int) -> None:
        calls.append(fd)
        if failures:
            raise failures.pop()

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UnavailableError, match="EIO"):
        sink.commit()
    for again in (sink.commit, lambda: sink.write(b"2")):
        with pytest.raises(InvalidError, match="dead"):
            again()
    assert len(calls) == 1
    assert storage.list("d") == ["d/warm"]
    assert temporaries(tmp_path) == []


def test_a_create_whose_fsync_fails_publishes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = PosixStorage(tmp_path)
    storage.create("d/warm", b"up")

    def fsync(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(ExhaustedError, match="ENOSPC") as caught:
        storage.create("d/a", b"1")
    assert caught.value.hint
    assert (caught.value.path, caught.value.operation) == (str(tmp_path / "d/a"), "create")
    assert storage.list("d") == ["d/warm"]
    assert temporaries(tmp_path) == []


def test_bytes_lost_between_write_and_fsync_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, bytes(data)[:-1]) + 1)
    storage = PosixStorage(tmp_path)
    with pytest.raises(UnavailableError, match="holds 9 bytes after writing 10"):
        storage.create("d/a", b"0123456789")
    sink = storage.sink("d/b")
    sink.write(b"0123456789")
    with pytest.raises(UnavailableError, match="holds 9 bytes after writing 10"):
        sink.commit()
    assert storage.list("d") == []


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, bytes(data)[:3]))
    storage = PosixStorage(tmp_path)
    storage.create("a", b"0123456789")
    assert storage.read("a") == b"0123456789"


def test_two_may_delete_the_same_directory(tmp_path: Path) -> None:
    storage = PosixStorage(tmp_path)
    for number in range(300):
        (tmp_path / "d" / "deep").mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / "deep" / str(number)).touch()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: storage.delete_all("d"), range(4)))
    assert storage.list() == []
