"""Plans: every element exactly once, aligned, balanced, and the same whoever computes them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience.checkpoint import arrays as dt
from resilience.checkpoint.plan import ALIGN, CRC_BYTES, ArraySpec, boxes, chunk_grid, plan, specs
from resilience.errors import InvalidError

shapes = st.lists(st.integers(0, 9), max_size=4).map(tuple)


@st.composite
def layouts(draw: st.DrawFn) -> list[ArraySpec]:
    return [
        ArraySpec(f"a{number}", draw(st.sampled_from(dt.dtype_names())), draw(shapes), draw(st.booleans()))
        for number in range(draw(st.integers(0, 6)))
    ]


@given(layouts(), st.integers(1, 4), st.integers(1, 300), st.randoms())
def test_all_ranks_together_cover_every_element_once(
    layout: list[ArraySpec], world: int, chunk_bytes: int, random: Any
) -> None:
    """Replicated arrays once in the world, local ones once per rank; each plan from its own, shuffled, layout."""
    written: dict[str, np.ndarray] = {}
    hashes = set()
    for rank in range(world):
        mine = random.sample(layout, len(layout))
        made = plan(mine, rank=rank, world_size=world, chunk_bytes=chunk_bytes)
        hashes.add(made.hash)
        end = 0
        for chunk in made.chunks:
            count = written.setdefault(chunk.array, np.zeros(chunk.shape, int))
            where = tuple(slice(o, o + n) for o, n in zip(chunk.box_offset, chunk.box_shape, strict=True))
            count[where] += 1
            itemsize = dt.numpy_dtype(chunk.dtype).itemsize
            assert chunk.offset % ALIGN == 0
            assert chunk.offset >= end
            assert chunk.length == math.prod(chunk.grid) * itemsize
            assert chunk.length <= max(chunk_bytes, itemsize)
            end = chunk.offset + chunk.length + CRC_BYTES
        assert end <= made.size
        assert made.size % ALIGN == 0
        assert made.size > 0
    assert len(hashes) == 1
    names = {s.name for s in layout if s.replicated and 0 not in s.shape}
    names |= {
        f"rank-{r}/{s.name}" for r in range(world) for s in layout if not s.replicated and 0 not in s.shape
    }
    assert set(written) == names
    assert all((count == 1).all() for count in written.values())


@given(shapes, st.sampled_from([1, 2, 4, 8, 16]), st.integers(1, 500))
def test_chunks_are_contiguous_and_on_a_regular_grid(
    shape: tuple[int, ...], itemsize: int, chunk_bytes: int
) -> None:
    """A chunk is one run of the array's memory, so that a copy is one memory copy."""
    grid = chunk_grid(shape, itemsize, chunk_bytes)
    assert len(grid) == len(shape)
    assert all(g >= 1 for g in grid)
    index = np.arange(math.prod(shape)).reshape(shape)
    expected = 0
    for start, size in boxes(shape, grid):
        assert all(s % g == 0 for s, g in zip(start, grid, strict=True))
        box = index[tuple(slice(o, o + n) for o, n in zip(start, size, strict=True))].ravel()
        assert box.tolist() == list(range(expected, expected + box.size))
        expected += box.size
    assert expected == math.prod(shape)


@given(st.lists(st.integers(1, 5_000), min_size=1, max_size=40), st.integers(1, 8))
def test_replicated_bytes_are_balanced(sizes: list[int], world: int) -> None:
    """No rank writes more than the fair share and the largest array."""
    layout = [ArraySpec(f"a{n}", "float32", (size * 1024,), True) for n, size in enumerate(sizes)]
    packs = [plan(layout, rank=rank, world_size=world).size for rank in range(world)]
    largest = max(sizes) * 4096 + ALIGN
    slack = ALIGN * (len(sizes) + 2)
    assert max(packs) <= sum(packs) / world + largest + slack
    if len(sizes) >= world:
        assert all(plan(layout, rank=rank, world_size=world).chunks for rank in range(world))


def test_large_rows_and_last_chunks() -> None:
    """Rows are spread evenly; a row larger than a chunk is cut along the next axis."""
    assert chunk_grid((65,), 1, 64) == (33,)
    assert chunk_grid((10, 8), 4, 100) == (3, 8)
    assert chunk_grid((2, 100), 1, 30) == (1, 25)
    assert chunk_grid((3,), 16, 1) == (1,)
    assert chunk_grid((), 8, 1) == ()
    assert chunk_grid((0, 5), 8, 64) == (1, 5)


def test_hash_tells_worlds_and_models_apart() -> None:
    a, b = ArraySpec("a", "float32", (4,), True), ArraySpec("b", "float32", (4,), False)
    first = plan([a, b], rank=0, world_size=2).hash
    assert plan([a], rank=1, world_size=2).hash == first  # local arrays are nobody else's business
    assert plan([a, b], rank=0, world_size=3).hash != first
    assert plan([ArraySpec("a", "float32", (5,), True)], rank=0, world_size=2).hash != first


@pytest.mark.parametrize("name", ["rank-0/a", "rank-12", ""])
def test_reserved_names_are_refused(name: str) -> None:
    with pytest.raises(InvalidError):
        plan([ArraySpec(name, "float32", (1,), True)], rank=0, world_size=1)


def test_bad_ranks_and_double_names_are_refused() -> None:
    spec = ArraySpec("a", "float32", (1,), True)
    with pytest.raises(InvalidError, match="two arrays"):
        plan([spec, spec], rank=0, world_size=1)
    with pytest.raises(InvalidError, match="rank 2 of 2"):
        plan([spec], rank=2, world_size=2)


def test_specs_marks_arrays_below_replicated_names() -> None:
    arrays = {"model/w": np.ones(1), "model/buf": np.ones(1), "opt/0/m": np.ones(1), "optx": np.ones(1)}
    marked = {spec.name for spec in specs(arrays, {"model/w", "opt"}) if spec.replicated}
    assert marked == {"model/w", "opt/0/m"}
