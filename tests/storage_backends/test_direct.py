"""Writes past the page cache: the same bytes whatever the pieces, real refusals, and errors that are not lost."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilience.errors import ExhaustedError
from storage_backends import direct
from storage_backends.posix import PosixStorage

BLOCK = 64 << 10
LARGE = 3 * (1 << 20) + 5000  # goes past the page cache, and ends inside a sector
pages = memoryview(mmap.mmap(-1, 8 << 20))
pages[:] = os.urandom(1 << 20) * 8


def temporaries(root: Path) -> list[str]:
    return sorted(path.name for path in root.rglob("*") if path.name.endswith("~") and path.is_file())


@settings(max_examples=60, deadline=None)
@given(
    pieces=st.lists(
        st.tuples(
            st.sampled_from([0, 1, 7, 4096]), st.sampled_from([1, 100, 4096, 5000, BLOCK, 3 * BLOCK + 1])
        ),
        max_size=12,
    ),
    before=st.sampled_from([0, 4096, 1 << 20]),
    refuse=st.booleans(),
)
def test_any_pieces_make_the_same_file(pieces: list[tuple[int, int]], before: int, refuse: bool) -> None:
    """Aligned memory or not, whole blocks or not, over a longer or a shorter file, with O_DIRECT or without."""
    body = b"".join(bytes(pages[start : start + length]) for start, length in pieces)
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.NamedTemporaryFile(dir=Path.cwd(), suffix="~") as file,
    ):
        patch.setattr(direct, "BLOCK", BLOCK)
        file.write(b"\xff" * before)
        file.flush()
        fd, granted = direct.open_direct(file.name, 0)
        if not granted:
            pytest.skip("NOT TESTED: the current directory's file system has no O_DIRECT")
        if refuse:
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)
        writer = direct.BlockWriter(fd, lambda: pytest.fail("refused"))
        for start, length in pieces:
            writer.write(pages[start : start + length])
        writer.finish(len(body))
        os.close(fd)
        assert Path(file.name).read_bytes() == body
        assert os.stat(file.name).st_size == len(body)


def test_large_objects_of_known_size_do_not_pass_the_page_cache(tmp_path: Path) -> None:
    told: list[str] = []
    storage = PosixStorage(tmp_path, tell=told.append)
    for size, expected in ((LARGE, os.O_DIRECT), (100, 0), (None, 0)):
        sink = storage.sink("d/a", size)
        flags = fcntl.fcntl(sink._body.fd, fcntl.F_GETFL) & os.O_DIRECT
        if told:
            pytest.skip(f"NOT TESTED: {told[0]}")
        assert flags == expected
        sink.write(pages[:LARGE])
        sink.commit()
        assert storage.read("d/a") == bytes(pages[:LARGE])


def test_the_size_is_a_hint(tmp_path: Path) -> None:
    storage = PosixStorage(tmp_path)
    for said, written in ((4 * LARGE, LARGE), (LARGE, 2 * LARGE), (4 * LARGE, 0)):
        with storage.sink("a", said) as sink:
            sink.write(pages[:written])
        assert storage.read("a") == bytes(pages[:written])
        assert os.stat(tmp_path / "a").st_blocks * 512 <= written + direct.BLOCK, (
            "what was reserved is given back"
        )


RAMFS = """
import fcntl, os, sys
from storage_backends.posix import PosixStorage
told = []
storage = PosixStorage(sys.argv[1], tell=told.append)
body = os.urandom(3 * (1 << 20) + 5)
for name in ("a", "b"):
    with storage.sink(name, len(body)) as sink:
        sink.write(body)
    assert storage.read(name) == body
[text] = told
assert "O_DIRECT" in text and sys.argv[1] in text, text
print("told once")
"""


def test_a_file_system_without_direct_io_gets_the_bytes_too_and_it_is_said_once(
    tmp_path: Path, start
) -> None:  # type: ignore[no-untyped-def]
    """ramfs refuses O_DIRECT when a file is opened."""
    mount = f'mount -t ramfs none "{tmp_path}" || exit 77; exec "$@"'
    process = start(RAMFS, tmp_path, prefix=("unshare", "-rm", "sh", "-c", mount, "sh"))
    out, err = process.communicate(timeout=60)
    if process.returncode == 77 or "unshare:" in err:
        pytest.skip(f"NOT TESTED: no mount namespaces here ({err.strip()})")
    assert (process.returncode, out.strip()) == (0, "told once"), err


def test_direct_io_that_is_refused_at_a_write_goes_on_through_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some network file systems open with O_DIRECT, and refuse the write: from several threads at once."""
    real, told = os.pwrite, []
    at_once = threading.Barrier(direct.DEPTH)

    def pwrite(fd: int, data: memoryview, at: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            if not told:
                at_once.wait(10)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, data, at)

    monkeypatch.setattr(direct, "BLOCK", BLOCK)
    monkeypatch.setattr(os, "pwrite", pwrite)
    storage = PosixStorage(tmp_path, tell=told.append)
    with storage.sink("a", LARGE) as sink:
        sink.write(pages[:LARGE])
    assert storage.read("a") == bytes(pages[:LARGE])
    assert len(told) == 1


def test_an_error_on_the_way_is_raised_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.pwrite, iter(range(1000))

    def pwrite(fd: int, data: memoryview, at: int) -> int:
        if next(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data, at)

    monkeypatch.setattr(direct, "BLOCK", BLOCK)
    monkeypatch.setattr(os, "pwrite", pwrite)
    storage = PosixStorage(tmp_path)
    sink = storage.sink("d/a", LARGE)

    def write() -> None:
        for start in range(0, LARGE, BLOCK):
            sink.write(pages[start : start + BLOCK])
        sink.commit()

    with pytest.raises(ExhaustedError, match="ENOSPC"):  # by a later write, or by commit at the latest
        write()
    sink.cancel()
    assert storage.list("d") == []
    assert temporaries(tmp_path) == []


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a nearly full disk, at a signal: the rest is not aligned any more, and that is no refusal."""
    real, told = os.pwrite, []
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[: max(512, len(data) // 2)], at))
    storage = PosixStorage(tmp_path, tell=told.append)
    with storage.sink("a", LARGE) as sink:
        sink.write(pages[:LARGE])
    assert storage.read("a") == bytes(pages[:LARGE])


def test_a_cancelled_sink_has_let_go_of_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, going, go = os.pwrite, threading.Event(), threading.Event()
    ended: list[int] = []

    def pwrite(fd: int, data: memoryview, at: int) -> int:
        going.set()
        go.wait(10)
        ended.append(at)
        return real(fd, data, at)

    monkeypatch.setattr(os, "pwrite", pwrite)
    sink = PosixStorage(tmp_path).sink("a", LARGE)
    sink.write(pages[: 2 << 20])
    assert going.wait(10)
    threading.Timer(0.05, go.set).start()
    sink.cancel()
    assert ended, "the write that was on its way has ended"
    assert temporaries(tmp_path) == []
