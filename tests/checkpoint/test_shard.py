"""Shards: what they say of global arrays, and packs written from them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience.checkpoint.box import Box, missing
from resilience.checkpoint.pack import read_range
from resilience.checkpoint.part import Part
from resilience.checkpoint.plan import Plan, plan, specs
from resilience.checkpoint.restore import Source
from resilience.checkpoint.shard import Shard
from resilience.checkpoint.store import open_checkpoint
from resilience.errors import InvalidError
from storage_backends import Storage

Save = Callable[..., list[Source]]


def plans(shards: list[Shard], **options: Any) -> list[Plan]:
    return [
        plan(specs({"w": shard}, rank=rank), rank=rank, world_size=len(shards), **options)
        for rank, shard in enumerate(shards)
    ]


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(4, 200),
)
def test_evenly_cut_shards_and_their_replicas_cover_once_on_one_grid(
    shape: tuple[int, ...], parts: int, replicas: int, chunk_bytes: int
) -> None:
    """As DTensor's Shard(0): ceil(n / parts) rows each, the last ones fewer or none; some ranks hold the same."""
    rows = -(-shape[0] // parts)
    shards = []
    for rank in range(parts * replicas):
        start = min(rank % parts * rows, shape[0])
        stop = min(start + rows, shape[0])
        shards.append(
            Shard.at(
                np.zeros((stop - start, *shape[1:]), np.float32),
                shape=shape,
                offset=(start,) + (0,) * (len(shape) - 1),
                holders=range(rank % parts, parts * replicas, parts),
                unit=(rows, *shape[1:]),
            )
        )
    found = plans(shards, chunk_bytes=chunk_bytes)
    chunks = [chunk for each in found for chunk in each.chunks]
    assert missing(Box.whole(shape), [chunk.box for chunk in chunks]) == []
    assert sum(chunk.box.count for chunk in chunks) == math.prod(shape), "no chunk is written twice"
    assert len({chunk.grid for chunk in chunks}) == 1
    grid = chunks[0].grid
    assert grid is not None
    for chunk in chunks:
        assert all(o % g == 0 for o, g in zip(chunk.box_offset, grid, strict=True))
        assert chunk.length == math.prod(grid) * 4


@given(st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple), st.data())
def test_flat_ranges_cover_once(shape: tuple[int, ...], data: st.DataObject) -> None:
    """As Megatron's distributed optimizer cuts a flattened parameter: anywhere."""
    count = math.prod(shape)
    cuts = sorted(data.draw(st.lists(st.integers(0, count), max_size=4)))
    values = np.arange(count, dtype=np.int32)
    edges = [0, *cuts, count]
    shards = [Shard.flat(values[low:high], shape=shape, start=low) for low, high in itertools.pairwise(edges)]
    chunks = [chunk for each in plans(shards, chunk_bytes=16) for chunk in each.chunks]
    assert missing(Box.whole(shape), [chunk.box for chunk in chunks]) == []
    assert sum(chunk.box.count for chunk in chunks) == count
    for shard in shards:
        whole = np.zeros(shape, np.int32)
        for box, view in zip(shard.boxes, shard.views(shard.local), strict=True):
            whole[box.slices(Box.whole(shape))] = view
        assert set(whole[whole > 0]) == set(shard.local[shard.local > 0])


def test_a_pack_of_shards_holds_their_bytes(
    save: Save, load: Callable[[Source], Part], storage: Storage
) -> None:
    whole = np.arange(35, dtype=np.float32).reshape(5, 7)
    states: list[dict[str, Any]] = [
        {
            "rows": Shard.at(whole[:3], shape=(5, 7), offset=(0, 0), unit=(3, 7)),
            "columns": Shard.at(whole[:, :4], shape=(5, 7), offset=(0, 0), unit=(5, 4)),
            "flat": Shard.flat(whole.reshape(-1)[:9], shape=(5, 7), start=0),
        },
        {
            "rows": Shard.at(whole[3:], shape=(5, 7), offset=(3, 0), unit=(3, 7)),
            "columns": Shard.at(whole[:, 4:], shape=(5, 7), offset=(0, 4), unit=(5, 4)),
            "flat": Shard.flat(whole.reshape(-1)[9:], shape=(5, 7), start=9),
        },
    ]
    back = {name: np.zeros((5, 7), np.float32) for name in states[0]}
    for source in save(states, chunk_bytes=40):
        part = load(source)
        for chunk in part.chunks:
            data = read_range(source.storage, part.pack_name, chunk.offset, chunk.offset + chunk.length)
            array = part.arrays[chunk.array]
            payload = np.frombuffer(data, np.float32).reshape(array.grid or chunk.box_shape)
            box = payload[tuple(map(slice, chunk.box_shape))]
            back[array.name][chunk.box.slices(Box.whole((5, 7)))] = box
    for name, array in back.items():
        assert np.array_equal(array, whole), name
    group = open_checkpoint(f"{storage.url}/checkpoints/step-10-g1")
    for name in ("rows", "columns"):
        assert np.array_equal(group[name][...], whole), f"{name} through Zarr"


def test_what_does_not_lie_in_the_array_is_refused() -> None:
    local = np.zeros((2, 3))
    for wrong in ({"shape": (3, 3), "offset": (2, 0)}, {"shape": (3,), "offset": (0,)}):
        with pytest.raises(InvalidError, match="is not part of an array"):
            Shard.at(local, **wrong)
    with pytest.raises(InvalidError, match="grid"):
        Shard.at(local, shape=(9, 3), offset=(1, 0), unit=(2, 3))
    with pytest.raises(InvalidError, match="no range"):
        Shard.flat(np.zeros(4), shape=(2, 2), start=1)
    with pytest.raises(InvalidError, match="not among those that hold"):
        plans([Shard.at(local, shape=(2, 3), offset=(0, 0), holders=(1, 2))])
