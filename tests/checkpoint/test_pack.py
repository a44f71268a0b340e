"""Persisting and draining: the same bytes everywhere, part after pack, damage never passed on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest

from resilience.checkpoint import drain, pack
from resilience.checkpoint.arena import Arena
from resilience.checkpoint.part import Part, directory, draft
from resilience.checkpoint.plan import plan, specs
from resilience.checkpoint.restore import Source
from resilience.checkpoint.snapshot import snapshot
from resilience.checkpoint.tree import flatten
from resilience.errors import CorruptError, ExhaustedError, InvalidError
from storage_backends import Storage, open_storage

WHERE = directory(10, 1)
STATE = {"a": np.arange(5000, dtype=np.float32).reshape(50, 100), "b": np.arange(3, dtype=np.int8), "n": 4}


class Sealed:
    """A slot with STATE in it and the draft of its part."""

    def __init__(self, state: Any = STATE, chunk_bytes: int = 4000) -> None:
        arrays, skeleton = flatten(state, prefix="")
        layout = plan(specs(arrays), rank=0, world_size=1, chunk_bytes=chunk_bytes)
        self.part = draft(layout, skeleton, run="run-1", step=10, generation=1)
        self.arena = Arena.create(2, layout.size)
        slot = self.arena.acquire()
        assert slot is not None
        snapshot(self.arena, slot, arrays, layout, step=10, generation=1)
        self.view = self.arena.view(slot)


@pytest.fixture
def make_sealed() -> Iterator[Callable[..., Sealed]]:
    made: list[Sealed] = []

    def make(*args: Any) -> Sealed:
        made.append(Sealed(*args))
        return made[-1]

    yield make
    for one in made:
        one.arena.close()


@pytest.fixture
def sealed(make_sealed: Callable[..., Sealed]) -> Sealed:
    return make_sealed()


def test_memory_file_and_crcs_are_the_same_bytes(sealed: Sealed, storage: Storage) -> None:
    result = pack.persist(sealed.view, sealed.part, storage, WHERE)
    data = storage.read(f"{WHERE}/rank-0.pack")
    assert data == bytes(sealed.view[: result.size])
    part = Part.decode(storage.read(result.part_name), path="p")
    assert len(part.chunks) > 3
    for chunk in part.chunks:
        payload = data[chunk.offset : chunk.offset + chunk.length]
        after = data[chunk.offset + chunk.length :][:4]
        assert google_crc32c.value(payload) == chunk.crc32c == int.from_bytes(after, "little")
    assert part.state == sealed.part.state
    assert (part.run, part.step, part.generation, part.rank, part.world_size) == ("run-1", 10, 1, 0, 1)


def test_failpoints_are_reached_in_order_and_the_part_comes_last(sealed: Sealed, storage: Storage) -> None:
    points: list[tuple[str, bool, bool]] = []

    def there(name: str) -> bool:
        path = storage.path(name)
        return path is not None and path.exists()

    def reach(point: str) -> None:
        points.append((point, there(f"{WHERE}/rank-0.pack"), there(f"{WHERE}/rank-0.json")))

    pack.persist(sealed.view, sealed.part, storage, WHERE, failpoint=reach)
    chunks = len(sealed.part.chunks)
    assert points == [
        *[("pack.chunk", False, False)] * chunks,
        ("pack.done", True, False),
        ("part.done", True, True),
    ]


@pytest.mark.parametrize("point", ["pack.chunk", "pack.done", "part.done"])
def test_dying_at_any_point_leaves_nothing_half_and_can_be_repeated(
    sealed: Sealed, storage: Storage, point: str
) -> None:
    def die(reached: str) -> None:
        if reached == point:
            raise RuntimeError(point)

    with pytest.raises(RuntimeError):
        pack.persist(sealed.view, sealed.part, storage, WHERE, failpoint=die)
    names = [name.rpartition("/")[2] for name in storage.list(WHERE)]
    expected = {"pack.chunk": [], "pack.done": ["rank-0.pack"], "part.done": ["rank-0.json", "rank-0.pack"]}
    assert names == expected[point]
    result = pack.persist(sealed.view, sealed.part, storage, WHERE)
    assert pack.persist(sealed.view, sealed.part, storage, WHERE).sha256 == result.sha256


def test_the_same_step_with_other_contents_leaves_the_committed_bytes_alone(
    sealed: Sealed, make_sealed: Callable[..., Sealed], storage: Storage
) -> None:
    pack.persist(sealed.view, sealed.part, storage, WHERE)
    before = storage.read(f"{WHERE}/rank-0.pack")
    other = make_sealed({**STATE, "a": STATE["a"] + 1})
    with pytest.raises(InvalidError, match="saved before"):
        pack.persist(other.view, other.part, storage, WHERE)
    assert storage.read(f"{WHERE}/rank-0.pack") == before


def test_a_rank_that_owns_nothing_still_has_a_pack(
    make_sealed: Callable[..., Sealed], storage: Storage
) -> None:
    empty = make_sealed({"n": 1, "none": np.zeros((0, 3))})
    result = pack.persist(empty.view, empty.part, storage, WHERE)
    assert storage.read(f"{WHERE}/rank-0.pack") == bytes(4096)
    assert result.size == 4096
    twin = open_storage("memory://empty-pack")
    assert drain.copy(storage, twin, WHERE, 0).sha256 == result.sha256


def test_draining_copies_the_same_bytes(sealed: Sealed, storage: Storage, tmp_path: Path) -> None:
    saved = pack.persist(sealed.view, sealed.part, storage, WHERE)
    target = open_storage(str(tmp_path / "shared"))
    points: list[str] = []
    copied = drain.copy(storage, target, WHERE, 0, failpoint=points.append)
    assert (copied.part_name, copied.sha256, copied.size) == (saved.part_name, saved.sha256, saved.size)
    for name in ("rank-0.pack", "rank-0.json"):
        assert target.read(f"{WHERE}/{name}") == storage.read(f"{WHERE}/{name}")
    assert points[-1] == "drain.done"
    assert set(points[:-1]) == {"drain.chunk"}
    assert drain.copy(storage, target, WHERE, 0).sha256 == saved.sha256  # may run again


@pytest.mark.parametrize("damage", ["payload", "crc", "truncated", "missing", "part"])
def test_a_damaged_source_is_not_drained(
    sealed: Sealed, storage: Storage, edit: Callable[[str, int, bytes], None], tmp_path: Path, damage: str
) -> None:
    pack.persist(sealed.view, sealed.part, storage, WHERE)
    chunk = sealed.part.chunks[2]
    name = f"{WHERE}/rank-0.pack"
    path = storage.path(name)
    assert path is not None
    size = path.stat().st_size
    expected = (name, chunk.offset, chunk.offset + chunk.length + 4)
    if damage == "payload":
        edit(name, chunk.offset + 17, b"\xaa")
    elif damage == "crc":
        edit(name, chunk.offset + chunk.length, b"\xaa\xbb")
    elif damage == "truncated":
        with path.open("r+b") as file:
            file.truncate(size - 4096)
        expected = (name, size - 4096, size)
    elif damage == "missing":
        path.unlink()
        expected = (name, 0, size)
    else:
        edit(f"{WHERE}/rank-0.json", 0, b"[")
        part_size = storage.size(f"{WHERE}/rank-0.json")
        expected = (f"{WHERE}/rank-0.json", 0, part_size)
    target = open_storage(str(tmp_path / "shared"))
    with pytest.raises(CorruptError) as caught:
        drain.copy(storage, target, WHERE, 0)
    assert (caught.value.path, caught.value.start, caught.value.end) == expected
    assert target.list(WHERE) == []


def test_a_drain_keeps_its_pace(sealed: Sealed, storage: Storage, tmp_path: Path) -> None:
    pack.persist(sealed.view, sealed.part, storage, WHERE)
    counts: list[int] = []
    drain.copy(storage, open_storage(str(tmp_path / "shared")), WHERE, 0, pace=counts.append)
    assert sum(counts) == sealed.part.size


def test_a_missing_part_is_not_found(storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        drain.copy(storage, open_storage(str(tmp_path / "shared")), WHERE, 0)


def test_a_full_disk_leaves_nothing(sealed: Sealed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The save fails with an error of ours; what was committed earlier is not touched."""
    monkeypatch.setattr(pack, "_WRITE", 4096)
    target = Full(open_storage(str(tmp_path / "full")))
    with pytest.raises(ExhaustedError):
        pack.persist(sealed.view, sealed.part, target, WHERE)
    assert target.list(WHERE) == []


class Full:
    """A storage whose disk is full after the second write of every sink."""

    def __init__(self, inner: Storage) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def sink(self, name: str, size: int | None = None) -> Any:
        sink, count = self._inner.sink(name, size), iter(range(100))
        write = sink.write

        def limited(data: bytes | memoryview) -> None:
            if next(count) == 2:
                raise ExhaustedError("no space left", operation="write", path=name, hint="free some")
            write(data)

        sink.write = limited  # type: ignore[method-assign]
        return sink


def test_parts_of_a_newer_version_say_so(sealed: Sealed) -> None:
    data = sealed.part.to_json()
    with pytest.raises(InvalidError, match="version 2") as caught:
        Part.decode(json.dumps({**data, "version": 2}).encode(), path="p")
    assert "upgrade" in str(caught.value.hint)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"rank": 1},
        {"size": 5},
        {"size": 4096},
        {"chunks": [[99, [], [], 0, 4, 0]]},
        {"chunks": [[1, [0], [3], 8, 3, 0]]},
        {"chunks": [[1, [1], [3], 0, 3, 0]]},
        {"chunks": [[1, [0], [3], 0, 30000, 0]]},
        {"arrays": [["a", "float33", [1], [1], True]], "chunks": []},
        {"arrays": None},
    ],
)
def test_parts_whose_numbers_do_not_fit_are_corrupt(sealed: Sealed, change: dict[str, Any]) -> None:
    data = sealed.part.to_json()
    Part.decode(json.dumps(data).encode(), path="p")
    with pytest.raises(CorruptError):
        Part.decode(json.dumps({**data, **change}).encode(), path="p")


def test_sources_know_their_storage(storage: Storage, save: Callable[..., list[Source]]) -> None:
    (source,) = save([STATE])
    plain = {"rank": 0, "storage": storage.url, "part": source.part, "sha256": source.sha256}
    again = Source.from_json(plain)
    assert again.storage.read(again.part) == storage.read(source.part)
