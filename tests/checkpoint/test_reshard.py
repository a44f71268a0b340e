"""Resharding: whatever boxes saved an array and whatever boxes want it, every element comes back bit-equal, once."""

from __future__ import annotations

import itertools
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilience.checkpoint.box import Box, missing
from resilience.checkpoint.part import CRC_BLOCK, Part
from resilience.checkpoint.restore import Checkpoint, Source, restore, restore_into
from resilience.checkpoint.shard import Shard
from resilience.errors import CorruptError, InvalidError
from storage_backends import Storage, open_storage

Save = Callable[..., list[Source]]
Cut = list[list[Box]]  # boxes of each rank


def rows(shape: Sequence[int], ranks: int) -> Cut:
    """As DTensor's Shard(0): equal but for the last ones, which may be empty."""
    return grid(shape, (ranks, *[1] * (len(shape) - 1)))


def grid(shape: Sequence[int], ranks: Sequence[int]) -> Cut:
    """A mesh of ranks, each axis cut like ``torch.chunk``."""
    sides = [-(-size // n) for size, n in zip(shape, ranks, strict=True)]
    cut: Cut = []
    for at in itertools.product(*map(range, ranks)):
        low = [min(i * side, size) for i, side, size in zip(at, sides, shape, strict=True)]
        high = [min((i + 1) * side, size) for i, side, size in zip(at, sides, shape, strict=True)]
        box = Box(tuple(low), tuple(b - a for a, b in zip(low, high, strict=True)))
        cut.append([box] if box.count else [])
    return cut


def shards(whole: np.ndarray, cut: Cut, *, fill: bool = True) -> list[Shard]:
    """The global array as each rank holds it: one box as it is, several end to end."""
    found = []
    for boxes in cut:
        pieces = [whole[box.slices(Box.whole(whole.shape))] for box in boxes]
        flat = np.concatenate([piece.reshape(-1) for piece in pieces] or [np.empty(0, whole.dtype)])
        local = flat.reshape(boxes[0].shape) if len(boxes) == 1 else flat
        found.append(Shard(local.copy() if fill else np.zeros_like(local), whole.shape, tuple(boxes)))
    return found


def flat(whole: np.ndarray, edges: Sequence[int], *, fill: bool = True) -> list[Shard]:
    values = whole.reshape(-1) if fill else np.zeros(whole.size, whole.dtype)
    return [Shard.flat(values[a:b].copy(), shape=whole.shape, start=a) for a, b in itertools.pairwise(edges)]


def noise(shape: Sequence[int], seed: int = 0) -> np.ndarray:
    """Random bits: NaNs with payloads included."""
    bits = np.random.default_rng(seed).integers(0, 256, math.prod(shape) * 4, np.uint8)
    return bits.view(np.float32).reshape(tuple(shape))


def reshard(save: Save, before: list[Any], after: list[Any], **options: Any) -> list[Checkpoint]:
    """Save one world, restore another in place; what each of its ranks saw of the checkpoint."""
    sources = save([{"state": {"w": value}} for value in before], **options)
    seen = []
    for rank, value in enumerate(after):
        it = Checkpoint(sources, rank=rank, world_size=len(after))
        it.into({"state": {"w": value}})
        seen.append(it)
    return seen


def same(a: Any, b: Any) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@st.composite
def coverings(draw: st.DrawFn, whole: np.ndarray, *, fill: bool) -> list[Any]:
    """The array as a world of some size holds it: regularly, in flat ranges, or cut anywhere."""
    match draw(st.sampled_from(["whole", "grid", "flat", "any"])):
        case "whole":
            ranks = draw(st.integers(1, 3))
            return [
                Shard(
                    whole.copy() if fill else np.zeros_like(whole),
                    whole.shape,
                    (Box.whole(whole.shape),),
                    range(ranks),
                )
                for _ in range(ranks)
            ]
        case "grid":
            return shards(whole, grid(whole.shape, [draw(st.integers(1, 3)) for _ in whole.shape]), fill=fill)
        case "flat":
            cuts = sorted(draw(st.lists(st.integers(0, whole.size), max_size=4)))
            return flat(whole, [0, *cuts, whole.size], fill=fill)
        case _:
            boxes = [Box.whole(whole.shape)]
            for _ in range(draw(st.integers(0, 5))):  # cut one of them in two, along any axis
                box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
                axis = draw(st.integers(0, whole.ndim - 1))
                at = draw(st.integers(0, box.shape[axis]))
                for low, high in ((0, at), (at, box.shape[axis])):
                    offset, shape = list(box.offset), list(box.shape)
                    offset[axis], shape[axis] = box.offset[axis] + low, high - low
                    boxes.append(Box(tuple(offset), tuple(shape)))
            boxes = draw(st.permutations([box for box in boxes if box.count]))
            cut: Cut = [[] for _ in range(draw(st.integers(1, 4)))]
            for box in boxes:
                cut[draw(st.integers(0, len(cut) - 1))].append(box)
            return shards(whole, cut, fill=fill)


@given(
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    chunk_bytes=st.integers(8, 300),
    data=st.data(),
)
@settings(max_examples=150, deadline=None)
def test_any_covering_is_restored_into_any_other(
    save_world: Any, shape: list[int], chunk_bytes: int, data: st.DataObject
) -> None:
    whole = noise(shape)
    before = data.draw(coverings(whole, fill=True))
    after = data.draw(coverings(whole, fill=False))
    with tempfile.TemporaryDirectory() as directory:
        reshard(saver(save_world, directory), before, after, chunk_bytes=chunk_bytes)
    for shard in after:
        for box, view in zip(shard.boxes, shard.views(shard.local), strict=True):
            assert same(
                np.ascontiguousarray(view), np.ascontiguousarray(whole[box.slices(Box.whole(whole.shape))])
            )


def saver(save_world: Any, directory: str) -> Save:
    storage = open_storage(directory)
    return lambda states, **options: save_world(storage, states, **options)


@given(before=st.integers(1, 6), after=st.integers(1, 6), size=st.integers(40_000, 120_000))
@settings(max_examples=25, deadline=None)
def test_pieces_of_large_chunks_are_checked_by_running_crcs(
    save_world: Any, before: int, after: int, size: int
) -> None:
    """Chunks of several blocks, of which a rank wants some: nothing but those is read."""
    whole = noise((size,))
    with tempfile.TemporaryDirectory() as directory:
        targets = shards(whole, rows(whole.shape, after), fill=False)
        seen = reshard(saver(save_world, directory), shards(whole, rows(whole.shape, before)), targets)
    for it, target in zip(seen, targets, strict=True):
        needed = target.local.nbytes
        assert same(
            target.local, whole[target.boxes[0].slices(Box.whole(whole.shape))] if target.boxes else whole[:0]
        )
        pieces = before + 1  # at most so many chunks, each cut at two ends
        assert needed <= it.traffic.read <= needed + pieces * (2 * CRC_BLOCK + 8192)
        assert it.traffic.landed == needed


@pytest.mark.parametrize("axis", [0, 1])
def test_rows_columns_and_two_dimensions(save: Save, axis: int) -> None:
    whole = noise((700, 300))
    ranks = [1, 1]
    ranks[axis] = 4
    for after in (grid(whole.shape, (3, 1)), grid(whole.shape, (1, 8)), grid(whole.shape, (2, 3))):
        targets = shards(whole, after, fill=False)
        reshard(save, shards(whole, grid(whole.shape, ranks)), targets, step=len(after))
        for target in targets:
            assert all(
                same(
                    np.ascontiguousarray(target.local),
                    np.ascontiguousarray(whole[box.slices(Box.whole(whole.shape))]),
                )
                for box in target.boxes
            )


def test_replicated_to_sharded_and_back(save: Save) -> None:
    whole = noise((90, 50))
    targets = shards(whole, rows(whole.shape, 7), fill=False)
    sources = save([{"state": {"w": whole}}] * 3, replicated=("state",))
    for rank, target in enumerate(targets):
        restore_into(sources, {"state": {"w": target}}, rank=rank, world_size=7)
    assert same(np.concatenate([target.local for target in targets]), whole)
    sources = save([{"state": {"w": target}} for target in targets], step=11)
    back = np.zeros_like(whole)
    restore_into(sources, {"state": {"w": back}}, rank=1, world_size=2)
    assert same(back, whole)


def test_missing_coverage_names_array_and_box(save: Save) -> None:
    whole = noise((10, 4))
    before = shards(whole, rows(whole.shape, 5))
    sources = save([{"state": {"w": value}} for value in [*before[:2], *shards(whole, [[]]), *before[3:]]])
    back = np.full_like(whole, 7)
    with pytest.raises(CorruptError, match=r"state/w lacks the box of shape \[2, 4\] at \[4, 0\]"):
        restore_into(sources, {"state": {"w": back}}, rank=0, world_size=1)
    assert (back == 7).all(), "nothing was changed"
    kept = np.zeros((4, 4), np.float32)
    restore_into(
        sources, {"state": {"w": Shard.at(kept, shape=(10, 4), offset=(0, 0))}}, rank=0, world_size=1
    )
    assert same(kept, whole[:4]), "what nobody wants may be missing"


def test_ranks_that_disagree_about_a_sharded_array_are_refused(save: Save) -> None:
    one = Shard.at(noise((2, 4)), shape=(4, 4), offset=(0, 0))
    two = Shard.at(noise((2, 5)), shape=(4, 5), offset=(2, 0))
    sources = save([{"state": {"w": one}}, {"state": {"w": two}}])
    target = {"state": {"w": Shard.at(np.zeros((4, 4), np.float32), shape=(4, 4), offset=(0, 0))}}
    with pytest.raises(CorruptError, match=r"has state/w as float32\[4, 5\], others as float32\[4, 4\]"):
        restore_into(sources, target, rank=0, world_size=2)


# Other world sizes: what belongs to ranks.


def test_what_differs_between_ranks_is_listed(save: Save) -> None:
    states = [
        {"state": {"seen": np.arange(3) + rank, "same": np.ones(2), "position": rank}} for rank in range(3)
    ]
    sources = save(states)
    mine = {"seen": np.zeros(3, np.int64), "same": np.zeros(2), "position": -1}
    with pytest.raises(InvalidError) as caught:
        restore_into(sources, {"state": mine}, rank=0, world_size=2)
    text = str(caught.value)
    assert "saved by 3 ranks" in text
    assert "state/seen" in text
    assert "state/position" in text
    assert "state/same" not in text
    assert mine["position"] == -1
    restore_into(sources, {"state": mine}, rank=2, world_size=3)
    assert (mine["position"], mine["seen"].tolist()) == (2, [2, 3, 4])


def test_what_all_ranks_hold_alike_is_anybodys(save: Save) -> None:
    sources = save([{"state": {"w": noise((40_000,)), "epoch": 3}}] * 3)
    for rank in range(5):
        mine = {"w": np.zeros(40_000, np.float32), "epoch": 0}
        restore_into(sources, {"state": mine}, rank=rank, world_size=5)
        assert same(mine["w"], noise((40_000,)))
        assert mine["epoch"] == 3


def test_in_a_large_world_each_rank_looks_at_few_parts_and_together_they_see_everything(
    save_world: Any,
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        states = [{"state": {"epoch": 3 + (rank == 57)}} for rank in range(100)]
        sources = saver(save_world, directory)(states)
        counts, complaints = [], 0
        for rank in range(80):
            counting = [CountedSource(source) for source in sources]
            try:
                Checkpoint([each.source for each in counting], rank=rank, world_size=80)
            except InvalidError as error:
                complaints += "state/epoch" in str(error)
            counts.append(sum(each.storage.reads for each in counting))
    assert complaints > 0
    assert max(counts) <= 4


class CountedSource:
    def __init__(self, source: Source) -> None:
        self.storage = CountedStorage(source.storage)
        self.source = Source(source.rank, self.storage, source.part, source.sha256)


class CountedStorage:
    def __init__(self, inner: Storage) -> None:
        self._inner, self.reads = inner, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        self.reads += 1
        return self._inner.read(name, start, end)


def test_generators_of_ranks_that_were_not_saved_stay_as_they_are(save: Save) -> None:
    import random

    from resilience.checkpoint import rng

    states = []
    for seed in range(2):
        random.seed(seed)
        states.append({"state": {"n": 1}, "rng": rng.capture()})
    drawn = [random.Random(seed).random() for seed in range(2)]
    sources = save(states)
    for rank in range(3):
        random.seed(99)
        warned: list[str] = []
        mine = {"n": 0}
        objects = {"state": mine, "rng": None}
        restore_into(sources, objects, rank=rank, world_size=3, warn=warned.append)
        assert mine == {"n": 1}
        assert random.random() == (drawn[rank] if rank < 2 else random.Random(99).random())
        assert len(warned) == (rank == 2)
    assert "rank 2 of 3" in warned[0]


def test_a_damaged_block_of_a_large_chunk_is_named_and_its_neighbours_are_not_read(
    save: Save, edit: Any, load: Callable[[Source], Part]
) -> None:
    whole = noise((100_000,))
    [source] = sources = save([{"state": {"w": whole}}])
    [chunk] = load(source).chunks
    edit("checkpoints/step-10-g1/rank-0.pack", chunk.offset + 3 * CRC_BLOCK + 5, b"xx")

    def target(low: int, high: int) -> dict[str, Any]:
        return {"w": Shard.at(np.zeros(high - low, np.float32), shape=whole.shape, offset=(low,))}

    per = CRC_BLOCK // 4
    mine = target(per, 3 * per)
    restore_into(sources, {"state": mine}, rank=0, world_size=1)
    assert same(mine["w"].local, whole[per : 3 * per])
    with pytest.raises(CorruptError, match="partly overwritten") as caught:
        restore_into(sources, {"state": target(0, 3 * per + 1)}, rank=0, world_size=1)
    assert (caught.value.start, caught.value.end) == (
        chunk.offset + 3 * CRC_BLOCK,
        chunk.offset + 4 * CRC_BLOCK,
    )
    with pytest.raises(CorruptError):
        restore(sources, rank=0, world_size=1)


def test_every_wanted_byte_is_covered_by_what_the_tests_cut() -> None:
    """The generators above do cut whole arrays."""
    for cut in (rows((10, 3), 4), grid((5, 7, 3), (2, 3, 2))):
        shape = (10, 3) if len(cut) == 4 else (5, 7, 3)
        assert missing(Box.whole(shape), [box for boxes in cut for box in boxes]) == []


def test_a_pack_that_is_cut_off_is_found_before_anything_changes(save: Save, storage: Storage) -> None:
    whole = noise((90, 50))
    sources = save([{"state": {"w": shard}} for shard in shards(whole, rows(whole.shape, 2))])
    path = storage.path("checkpoints/step-10-g1/rank-1.pack")
    assert path is not None
    path.chmod(0o600)
    os.truncate(path, path.stat().st_size - 4096)
    back = np.full_like(whole, 7)
    with pytest.raises(CorruptError, match=r"rank-1\.pack has .* bytes") as caught:
        restore_into(sources, {"state": {"w": back}}, rank=0, world_size=1)
    assert "overwritten" not in str(caught.value)
    assert (back == 7).all()
