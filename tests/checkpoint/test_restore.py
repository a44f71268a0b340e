"""Restore: bit-equal for everything that can be saved, and damage of every kind is refused by name."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resilience.checkpoint import arrays as dt
from resilience.checkpoint.part import Part, sha256
from resilience.checkpoint.restore import Source, restore
from resilience.checkpoint.tree import unflatten
from resilience.errors import CorruptError, InvalidError
from storage_backends import Storage
from storage_backends.base import Capabilities
from storage_backends.ranges import read_one_by_one

Save = Callable[..., list[Source]]
Edit = Callable[[str, int, bytes], None]


def noise(dtype: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Random bits in a type: NaNs with payloads and denormals included."""
    wanted = dt.numpy_dtype(dtype)
    data = np.random.default_rng(seed).integers(0, 256, math.prod(shape) * wanted.itemsize, np.uint8)
    return (data & 1 if dtype == "bool" else data).view(wanted).reshape(shape)


def world(ranks: int) -> list[dict[str, Any]]:
    model = {f"w{n}": noise("float32", (n + 1, 7, 5), n) for n in range(6)}
    return [
        {"model": model, "own": noise("int64", (rank + 2,), rank), "step": 7 + rank} for rank in range(ranks)
    ]


def equal(a: Any, b: Any) -> bool:
    return dt.describe(a) == dt.describe(b) and dt.raw(a).tobytes() == dt.raw(b).tobytes()


@pytest.mark.parametrize("dtype", dt.dtype_names())
def test_every_type_and_shape_comes_back_bit_equal(save: Save, dtype: str) -> None:
    """Zero-size, 0-d, padded last chunks, rows larger than a chunk."""
    shapes = [(), (0,), (3, 0, 2), (1,), (65,), (7, 11), (2, 300), (5, 3, 4)]
    state = {str(shape): noise(dtype, shape, n) for n, shape in enumerate(shapes)}
    sources = save([state], chunk_bytes=64)
    got = restore(sources, rank=0, world_size=1, run="run-1", step=10, generation=1)
    assert (got.run, got.step, got.generation) == ("run-1", 10, 1)
    back = unflatten(got.skeleton, got.arrays)
    assert list(back) == list(state)
    assert all(equal(back[key], state[key]) for key in state)
    assert all(array.flags.writeable for array in got.arrays.values())


@given(ranks=st.integers(1, 4), chunk_bytes=st.integers(16, 2000), threads=st.integers(1, 3))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_rank_gets_its_own_view(save: Save, ranks: int, chunk_bytes: int, threads: int) -> None:
    states = world(ranks)
    generation = ranks * 10_000 + chunk_bytes  # a directory of its own for every example
    sources = save(states, replicated=("model",), chunk_bytes=chunk_bytes, generation=generation)
    for rank, state in enumerate(states):
        got = restore(sources[::-1], rank=rank, world_size=ranks, threads=threads)
        back = unflatten(got.skeleton, got.arrays)
        assert back["step"] == 7 + rank
        assert equal(back["own"], state["own"])
        assert all(equal(back["model"][key], state["model"][key]) for key in state["model"])


def test_replicated_bytes_are_stored_once(save: Save, load: Callable[[Source], Part]) -> None:
    sources = save(world(3), replicated=("model",))
    names = [part.arrays[chunk.array].name for part in map(load, sources) for chunk in part.chunks]
    assert sorted(names) == [f"model/w{n}" for n in range(6)] + [f"rank-{r}/own" for r in range(3)]


class Counting:
    """A store that is not local, and counts the byte ranges that are read."""

    capabilities = Capabilities(arbitrates=True, local=False)

    def __init__(self, inner: Storage) -> None:
        self._inner = inner
        self.reads: list[tuple[str, int, int | None]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def path(self, name: str) -> None:
        return None

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        self.reads.append((name, start, end))
        return self._inner.read(name, start, end)

    def read_into(self, name: str, ranges: Any) -> list[int]:
        return read_one_by_one(self, name, ranges)  # type: ignore[arg-type]


def test_each_range_is_read_once_and_neighbours_together(save: Save, storage: Storage) -> None:
    sources = save([{f"a{n}": noise("uint8", (5000,), n) for n in range(40)}], chunk_bytes=1000)
    counting = Counting(storage)
    restore([replace(source, storage=counting) for source in sources], rank=0, world_size=1)
    packs = [(start, end) for name, start, end in counting.reads if name.endswith(".pack")]
    assert len(packs) == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_a_flipped_bit_is_named(
    save: Save, edit: Edit, load: Callable[[Source], Part], storage: Storage, rank: int
) -> None:
    sources = save(world(2), replicated=("model",), chunk_bytes=100)
    part = load(sources[1])
    chunk = part.chunks[len(part.chunks) // 2]
    byte = storage.read(part.pack_name, chunk.offset + 3, chunk.offset + 4)[0]
    edit(part.pack_name, chunk.offset + 3, bytes([byte ^ 16]))
    with pytest.raises(CorruptError) as caught:
        restore(sources, rank=rank, world_size=2)
    assert caught.value.path == "checkpoints/step-10-g1/rank-1.pack"
    assert (caught.value.start, caught.value.end) == (chunk.offset, chunk.offset + chunk.length + 4)
    assert "verify" in str(caught.value.hint)


def test_a_damaged_crc_field_is_damage_too(save: Save, edit: Edit, load: Callable[[Source], Part]) -> None:
    sources = save(world(1))
    part = load(sources[0])
    edit(part.pack_name, part.chunks[0].offset + part.chunks[0].length, b"\x00\x01\x02\x03")
    with pytest.raises(CorruptError, match="CRC field"):
        restore(sources, rank=0, world_size=1)


def test_a_truncated_pack_is_named(save: Save, storage: Storage) -> None:
    sources = save(world(2), replicated=("model",))
    path = storage.path("checkpoints/step-10-g1/rank-0.pack")
    assert path is not None
    size = path.stat().st_size
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.truncate(size - 1)
    for rank in range(2):
        with pytest.raises(CorruptError) as caught:
            restore(sources, rank=rank, world_size=2)
        assert caught.value.path == "checkpoints/step-10-g1/rank-0.pack"
        assert (caught.value.start, caught.value.end) == (size - 1, size)


@pytest.mark.parametrize("name", ["rank-0.pack", "rank-0.json"])
def test_a_missing_file_is_named(save: Save, storage: Storage, name: str) -> None:
    sources = save(world(2), replicated=("model",))
    storage.delete(f"checkpoints/step-10-g1/{name}")
    for rank in range(2):
        with pytest.raises(CorruptError, match="is missing") as caught:
            restore(sources, rank=rank, world_size=2)
        assert caught.value.path == f"checkpoints/step-10-g1/{name}"


def test_a_part_of_another_generation_is_refused(save: Save, storage: Storage) -> None:
    """Put in place of the right one, and even recorded by mistake."""
    sources = save(world(2), replicated=("model",), generation=1)
    others = save(world(2), replicated=("model",), generation=2)
    with pytest.raises(CorruptError, match="generation 2"):
        restore([sources[0], others[1]], rank=0, world_size=2)
    with pytest.raises(CorruptError, match="expected is 3"):
        restore(sources, rank=0, world_size=2, generation=3)
    stale = storage.read(others[1].part)
    path = storage.path(sources[1].part)
    assert path is not None
    shutil.copy(str(storage.path(others[1].part)), path)
    with pytest.raises(CorruptError, match="SHA-256") as caught:
        restore(sources, rank=0, world_size=2)
    assert (caught.value.path, caught.value.start, caught.value.end) == (sources[1].part, 0, len(stale))
    with pytest.raises(CorruptError, match="step-10-g2"):
        restore([sources[0], replace(sources[1], sha256=sha256(stale))], rank=0, world_size=2)


def test_parts_must_be_one_world(save: Save) -> None:
    two, three = save(world(2), replicated=("model",)), save(world(3), replicated=("model",), step=11)
    for sources in (two[:1], [two[0], two[0]], [two[0], *three[1:]]):
        with pytest.raises(CorruptError):
            restore(sources, rank=0, world_size=2)
    with pytest.raises(CorruptError, match="step"):
        restore(two, rank=0, world_size=2, step=11)


def test_ranks_that_disagreed_about_the_model_are_refused(save: Save) -> None:
    states = world(2)
    states[1]["model"] = {**states[1]["model"], "extra": np.zeros(3)}
    with pytest.raises(CorruptError, match="plan_hash"):
        restore(save(states, replicated=("model",)), rank=0, world_size=2)


def test_a_hole_is_never_filled(save: Save, storage: Storage, load: Callable[[Source], Part]) -> None:
    """A part that lists one chunk less, or one twice elsewhere, is not whole although all CRCs are right."""
    sources = save([{"a": noise("uint8", (100,))}], chunk_bytes=10)
    part = load(sources[0])
    for chunks in (part.chunks[:-1], (*part.chunks[:-1], replace(part.chunks[-1], box_offset=(0,)))):
        data = replace(part, chunks=chunks).encode()
        storage.delete(part.name)
        assert storage.create(part.name, data) is None
        with pytest.raises(CorruptError, match=r"a second time|lacks the box"):
            restore([replace(sources[0], sha256=sha256(data))], rank=0, world_size=1)


def test_another_world_size_restores_only_what_no_rank_has_for_itself(save: Save) -> None:
    shared = {"model": world(1)[0]["model"], "step": 3}
    sources = save([shared] * 2, replicated=("model",))
    for ranks in (1, 3, 5):
        got = restore(sources, rank=ranks - 1, world_size=ranks)
        back = unflatten(got.skeleton, got.arrays)
        assert all(equal(back["model"][key], value) for key, value in shared["model"].items())
    with pytest.raises(InvalidError, match=r"saved by 2 ranks.*rank-0/own"):
        restore(save(world(2), replicated=("model",), step=11), rank=0, world_size=3)
    differing = [{**shared, "step": rank} for rank in range(2)]
    with pytest.raises(InvalidError, match="differ between the ranks"):
        restore(save(differing, replicated=("model",), step=12), rank=0, world_size=3)
