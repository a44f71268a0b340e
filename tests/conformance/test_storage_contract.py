"""One suite for every backend: the contract of storage_backends/base.py, sentence by sentence."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from resilience.errors import InvalidError
from storage_backends import RetryPolicy, Storage, probe
from storage_backends.ranges import read_into
from storage_backends.recycle import recycle, trim

LARGE = 33 * 1024 * 1024 + 7  # three parts of an S3 upload, the last one ragged


def put(storage: Storage, name: str, data: bytes) -> None:
    with storage.sink(name) as sink:
        sink.write(data)


def test_it_is_a_storage(storage: Storage) -> None:
    assert isinstance(storage, Storage)
    assert "://" in storage.url


# --- create -----------------------------------------------------------------------------------------------


def test_create_of_an_absent_name_wins(storage: Storage) -> None:
    assert storage.create("log/1.json", b"mine") is None
    assert storage.read("log/1.json") == b"mine"
    assert storage.size("log/1.json") == 4


def test_create_repeated_with_the_same_bytes_is_the_same_success(storage: Storage) -> None:
    assert storage.create("log/1", b"mine") is None
    assert storage.create("log/1", b"mine") is None


def test_create_of_a_taken_name_returns_the_winner_and_changes_nothing(storage: Storage) -> None:
    storage.create("log/1", b"first")
    assert storage.create("log/1", b"second") == b"first"
    assert storage.create("log/1", b"firs") == b"first"
    assert storage.read("log/1") == b"first"


def test_create_empty_is_refused_and_truncates_nothing(storage: Storage) -> None:
    storage.create("log/1", b"first")
    with pytest.raises(InvalidError, match="empty"):
        storage.create("log/1", b"")
    assert storage.read("log/1") == b"first"
    with pytest.raises(InvalidError, match="empty"):
        storage.create("log/2", b"")
    assert storage.list("log") == ["log/1"]


def test_racing_creates_have_one_winner_and_losers_see_it(storage: Storage) -> None:
    if not storage.capabilities.arbitrates:
        pytest.skip(f"does not arbitrate: {storage.capabilities.reason}")
    with ThreadPoolExecutor(8) as pool:
        for slot in range(10):
            ready = threading.Barrier(8)

            def attempt(writer: int, slot: int = slot, ready: threading.Barrier = ready) -> bytes | None:
                ready.wait(10)
                return storage.create(f"log/{slot}", b"writer %d" % writer)

            answers = list(pool.map(attempt, range(8)))
            winners = [writer for writer, answer in enumerate(answers) if answer is None]
            assert len(winners) == 1
            body = b"writer %d" % winners[0]
            assert storage.read(f"log/{slot}") == body
            assert set(answers) == {None, body}


def test_racing_creates_of_the_same_bytes_all_succeed(storage: Storage) -> None:
    if not storage.capabilities.arbitrates:
        pytest.skip(f"does not arbitrate: {storage.capabilities.reason}")
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: storage.create("log/1", b"same"), range(8))) == [None] * 8


# --- sink -------------------------------------------------------------------------------------------------


def test_sink_publishes_at_commit_and_not_before(storage: Storage) -> None:
    sink = storage.sink("checkpoints/step-1/rank-0.pack")
    sink.write(b"abc")
    sink.write(memoryview(bytearray(b"defg"))[1:3])
    assert storage.list("checkpoints/step-1") == []
    with pytest.raises(FileNotFoundError):
        storage.read("checkpoints/step-1/rank-0.pack")
    sink.commit()
    assert storage.read("checkpoints/step-1/rank-0.pack") == b"abcef"
    assert storage.list("checkpoints/step-1") == ["checkpoints/step-1/rank-0.pack"]


def test_sink_of_several_parts(storage: Storage) -> None:
    body = bytes(range(256)) * (LARGE // 256) + b"endings"
    with storage.sink("big") as sink:
        sink.write(body[:5])
        sink.write(memoryview(body)[5:20_000_000])
        assert storage.list() == []
        sink.write(body[20_000_000:])
    assert storage.size("big") == len(body)
    assert storage.read("big", 16_777_210, 16_777_230) == body[16_777_210:16_777_230]
    assert storage.read("big", 20_000_000) == body[20_000_000:]


def test_sink_may_stay_empty(storage: Storage) -> None:
    with storage.sink("logs/rank-0.log"):
        pass
    assert storage.size("logs/rank-0.log") == 0
    assert storage.read("logs/rank-0.log") == b""


def test_sink_replaces(storage: Storage) -> None:
    put(storage, "a", b"longer than the next")
    put(storage, "a", b"next")
    assert storage.read("a") == b"next"


def test_an_exception_cancels_and_leaves_the_older_object(storage: Storage) -> None:
    put(storage, "d/a", b"old")

    def fail(name: str) -> None:
        with storage.sink(name) as sink:
            sink.write(b"x" * LARGE)
            raise KeyError("the writer's own error")

    for name in ("d/a", "d/b"):
        with pytest.raises(KeyError, match="own error"):
            fail(name)
    assert storage.list("d") == ["d/a"]
    assert storage.read("d/a") == b"old"


def test_a_sink_is_used_once(storage: Storage) -> None:
    sink = storage.sink("a")
    sink.write(b"1")
    sink.commit()
    sink.cancel()  # after commit it does nothing
    assert storage.read("a") == b"1"
    for call in (lambda: sink.write(b"2"), sink.commit):
        with pytest.raises(InvalidError, match="sink"):
            call()
    cancelled = storage.sink("b")
    cancelled.cancel()
    cancelled.cancel()
    with pytest.raises(InvalidError, match="sink"):
        cancelled.commit()
    assert storage.list() == ["a"]


def test_a_forgotten_sink_publishes_nothing(storage: Storage) -> None:
    """fsspec's own files complete their upload when they are garbage-collected."""
    sink = storage.sink("d/small")
    sink.write(b"partial")
    large = storage.sink("d/large")
    large.write(b"x" * LARGE)
    del sink, large
    gc.collect()
    assert storage.list("d") == []


# --- read, size, list ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (0, None, b"0123456789"),
        (3, None, b"3456789"),
        (0, 4, b"0123"),
        (3, 7, b"3456"),
        (3, 3, b""),
        (7, 3, b""),
        (8, 99, b"89"),
        (10, None, b""),
        (50, None, b""),
        (50, 60, b""),
        (0, 0, b""),
    ],
)
def test_read_range(storage: Storage, start: int, end: int | None, expected: bytes) -> None:
    put(storage, "a", b"0123456789")
    assert storage.read("a", start, end) == expected


def test_read_of_negative_bounds_is_refused(storage: Storage) -> None:
    put(storage, "a", b"0123456789")
    for start, end in ((-1, None), (0, -2)):
        with pytest.raises(InvalidError, match="read"):
            storage.read("a", start, end)


def test_what_is_absent_raises_file_not_found(storage: Storage) -> None:
    put(storage, "d/a", b"1")
    for name in ("absent", "d/absent", "no/such/directory", "d"):
        with pytest.raises(FileNotFoundError, match=name):
            storage.read(name)
        with pytest.raises(FileNotFoundError):
            storage.read(name, 5, 5)
        with pytest.raises(FileNotFoundError, match=name):
            storage.size(name)


def test_list_shows_immediate_children(storage: Storage) -> None:
    assert storage.list() == []
    assert storage.list("log") == []
    for name in ("log/2", "log/1", "log/10", "FORMAT", "checkpoints/step-1/a", "checkpoints/step-10/a"):
        put(storage, name, b"1")
    assert storage.list() == ["FORMAT", "checkpoints/", "log/"]
    assert storage.list("log") == ["log/1", "log/10", "log/2"]
    assert storage.list("log/") == storage.list("log")
    assert storage.list("checkpoints") == ["checkpoints/step-1/", "checkpoints/step-10/"]
    assert storage.list("checkpoints/step-1/") == ["checkpoints/step-1/a"]
    assert storage.list("lo") == []
    assert storage.list("FORMAT") == []


def test_a_second_handle_sees_new_objects_at_once(storage: Storage) -> None:
    """Listing caches of drivers would hide them for ever."""
    assert storage.list("log") == []
    storage.create("log/1", b"1")
    assert storage.list("log") == ["log/1"]
    storage.create("log/2", b"2")
    assert storage.list("log") == ["log/1", "log/2"]


# --- delete -------------------------------------------------------------------------------------------------


def test_delete_and_again(storage: Storage) -> None:
    put(storage, "d/a", b"1")
    put(storage, "d/b", b"1")
    for _ in range(2):
        storage.delete("d/a")
        assert storage.list("d") == ["d/b"]
    storage.delete("never/was")


def test_delete_all_takes_the_directory_and_not_its_namesakes(storage: Storage) -> None:
    for name in ("c/step-1/a", "c/step-1/deep/b", "c/step-10/a", "c/step-1.json"):
        put(storage, name, b"1")
    for _ in range(2):
        storage.delete_all("c/step-1")
        assert storage.list("c") == ["c/step-1.json", "c/step-10/"]
    storage.delete_all("never/was")
    with pytest.raises(InvalidError):
        storage.delete_all("")
    assert storage.list("c") == ["c/step-1.json", "c/step-10/"]


def test_delete_all_takes_what_dead_writers_left(storage: Storage) -> None:
    sink = storage.sink("c/step-1/rank-0.pack")
    sink.write(b"x" * LARGE)
    put(storage, "c/step-2/a", b"1")
    # Parts of the dead writer may still arrive while its upload is ended: a store may ask to be called again.
    RetryPolicy().call(lambda: storage.delete_all("c/step-1/"))
    assert storage.list("c") == ["c/step-2/"]
    sink.cancel()
    assert storage.list("c") == ["c/step-2/"]


def test_recycle_deletes_and_trim_gives_back(storage: Storage) -> None:
    body = bytes(range(256)) * 8192  # 2 MiB: large enough to be kept
    for step in (1, 2):
        with storage.sink(f"c/step-{step}/rank-0.pack", len(body)) as sink:
            sink.write(body)
    assert storage.link("c/step-1/rank-0.pack", "c/step-2/rank-0.old.pack")
    for _ in range(2):
        recycle(storage, "c/step-1/rank-0.pack")
        assert storage.list("c/step-1") == []
    recycle(storage, "c/step-2/rank-0.pack")
    with storage.sink("c/step-3/rank-0.pack", len(body)) as sink:
        sink.write(body[::-1])
    assert storage.read("c/step-3/rank-0.pack") == body[::-1]
    assert storage.read("c/step-2/rank-0.old.pack") == body, "a second name keeps the bytes"
    recycle(storage, "never/was")
    for _ in range(2):
        trim(storage)
    assert storage.read("c/step-3/rank-0.pack") == body[::-1]


def test_a_sink_may_be_told_the_size_right_or_wrong(storage: Storage) -> None:
    body = bytes(range(256)) * 8192
    for said in (0, 100, len(body), 2 * len(body)):
        with storage.sink("a", said) as sink:
            sink.write(body[:5000])
            sink.write(memoryview(body)[5000:])
        assert storage.read("a") == body


# --- names, paths, the rest ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["", "/a", "a/", "a//b", "../a", "a/../b", "a/./b", "a b", "a~", "ä", "a\n", "a\0b"]
)
def test_malformed_names_are_refused_everywhere(storage: Storage, name: str) -> None:
    calls = [
        lambda: storage.create(name, b"1"),
        lambda: storage.sink(name),
        lambda: storage.read(name),
        lambda: storage.size(name),
        lambda: storage.delete(name),
        lambda: recycle(storage, name),
        lambda: storage.path(name),
    ]
    if name not in ("", "a/"):  # those name directories
        calls += [lambda: storage.list(name), lambda: storage.delete_all(name)]
    for call in calls:
        with pytest.raises(InvalidError, match="not a valid object name"):
            call()


def test_long_and_odd_but_good_names(storage: Storage) -> None:
    for name in ("d/" + "n" * 255, "d/.hidden", "d/-dash", "d/..a"):
        assert storage.create(name, b"1") is None
        put(storage, name, b"2")
        assert storage.read(name) == b"2"
    assert len(storage.list("d")) == 4


def test_path_is_where_the_bytes_are(storage: Storage) -> None:
    put(storage, "d/a", b"bytes")
    path = storage.path("d/a")
    assert (path is not None) == storage.capabilities.local
    if path is not None:
        assert path.read_bytes() == b"bytes"


def test_probe_accepts_what_arbitrates_and_leaves_nothing(storage: Storage) -> None:
    storage.create("FORMAT", b"1")
    if storage.capabilities.arbitrates:
        assert probe(storage) == storage.capabilities
    else:
        with pytest.raises(InvalidError, match="cannot hold a run"):
            probe(storage)
    assert storage.list() == ["FORMAT"]


def test_many_threads_on_one_handle(storage: Storage) -> None:
    def work(number: int) -> bytes:
        put(storage, f"d/{number}", b"%d" % number)
        assert storage.size(f"d/{number}") == len(str(number))
        return storage.read(f"d/{number}")

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(24))) == [b"%d" % number for number in range(24)]
    assert len(storage.list("d")) == 24


def test_close_twice(storage: Storage) -> None:
    storage.create("a", b"1")
    storage.close()
    storage.close()


# --- link -------------------------------------------------------------------------------------------------


def test_a_link_is_the_same_bytes_and_outlives_the_first_name(storage: Storage) -> None:
    body = bytes(range(256)) * 64
    put(storage, "checkpoints/step-1-g1/rank-0.pack", body)
    assert storage.link("checkpoints/step-1-g1/rank-0.pack", "checkpoints/step-2-g1/rank-0.old.pack")
    assert storage.link("checkpoints/step-1-g1/rank-0.pack", "checkpoints/step-2-g1/rank-0.old.pack"), "twice"
    assert storage.list("checkpoints/step-2-g1") == ["checkpoints/step-2-g1/rank-0.old.pack"]
    storage.delete_all("checkpoints/step-1-g1")
    assert storage.read("checkpoints/step-2-g1/rank-0.old.pack") == body
    assert storage.size("checkpoints/step-2-g1/rank-0.old.pack") == len(body)


def test_a_link_replaces(storage: Storage) -> None:
    put(storage, "a", b"one")
    put(storage, "b", b"two")
    assert storage.link("a", "b")
    assert storage.read("b") == b"one"


def test_a_link_to_nothing_says_so(storage: Storage) -> None:
    with pytest.raises(FileNotFoundError):
        storage.link("nothing", "a")
    assert storage.list() == []


# --- ranges.read_into ---------------------------------------------------------------------------------------


def test_ranges_land_in_the_callers_memory_and_tell_where_the_object_ends(storage: Storage) -> None:
    body = bytes(range(256)) * 400
    put(storage, "a", body)
    memory = bytearray(b"-" * 90)
    view = memoryview(memory)
    ranges = [(1000, view[:50]), (len(body) - 10, view[50:80]), (len(body) + 5, view[80:])]
    assert read_into(storage, "a", ranges) == [50, 10, 0]
    assert memory[:50] == body[1000:1050] and memory[50:60] == body[-10:]
    assert read_into(storage, "a", []) == []
    with pytest.raises(FileNotFoundError):
        read_into(storage, "absent", ranges)
