"""Reading ranges: the same bytes past the page cache, through it, and from storage that is not local."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage_backends import Storage, open_storage
from storage_backends.reading import ALIGN, RangeReader, buffer, room

SIZE = 5 * ALIGN + 123
DATA = os.urandom(SIZE)


@pytest.fixture(params=["direct", "buffered", "memory"])
def reader(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[RangeReader]:
    url = "memory://reading" if request.param == "memory" else str(tmp_path)
    storage: Storage = open_storage(url)
    with storage.sink("a/b") as sink:
        sink.write(DATA)
    if request.param == "buffered":  # as on a file system without O_DIRECT
        monkeypatch.setattr(os, "O_DIRECT", 0)
    with RangeReader(storage, "a/b") as made:
        yield made


@given(st.integers(0, SIZE + ALIGN), st.integers(0, 2 * ALIGN + 100))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_every_range_is_what_the_file_holds(reader: RangeReader, start: int, count: int) -> None:
    memory = buffer(2 * ALIGN + 100)
    assert bytes(reader.read(start, start + count, memory)) == DATA[start : start + count]
    assert reader.size == SIZE


def test_threads_share_a_reader(reader: RangeReader) -> None:
    def read(start: int) -> bytes:
        return bytes(reader.read(start, start + 1000, buffer(1000)))

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(read, range(0, SIZE, 1000)))
    assert b"".join(found) == DATA


def test_an_absent_object_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        RangeReader(open_storage(str(tmp_path)), "a/b")


def test_descriptors_are_given_back(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    storage.create("a", b"x")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with RangeReader(storage, "a") as reader:
            reader.read(0, 1, buffer(1))
            reader.close()
            assert len(os.listdir("/proc/self/fd")) == before
            reader.read(0, 1, buffer(1))
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_that_is_cut_while_it_is_read_ends_early(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    storage.create("a", DATA)
    with RangeReader(storage, "a") as reader:
        path = storage.path("a")
        assert path is not None
        path.chmod(0o600)
        os.truncate(path, ALIGN + 5)
        assert bytes(reader.read(0, SIZE, buffer(SIZE))) == DATA[: ALIGN + 5]
        assert bytes(reader.read(2 * ALIGN, 3 * ALIGN, buffer(ALIGN))) == b""


def test_buffers_have_room_for_a_range_that_begins_anywhere() -> None:
    assert len(buffer(1)) >= 2 * ALIGN
    assert room(ALIGN + 1) == 3 * ALIGN


class Filling:
    """A backend that fills memory itself."""

    def __init__(self, inner: Storage) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def read_into(self, name: str, ranges: list[tuple[int, memoryview]]) -> list[int]:
        [(start, into)] = ranges
        data = self._inner.read(name, start, start + len(into))
        into[: len(data)] = data
        return [len(data)]


def test_a_backend_that_fills_memory_itself_is_asked_to() -> None:
    storage = open_storage("memory://filling")
    storage.create("a", DATA)
    memory = buffer(SIZE)
    with RangeReader(Filling(storage), "a") as reader:  # type: ignore[arg-type]
        got = reader.read(100, SIZE + 50, memory)
        assert got.obj is memory.obj
        assert bytes(got) == DATA[100:]
