"""What may be left out of a pack: decided by building parts, no storage."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience.checkpoint.increment import Base, assemble, check_trained, comparable, offered
from resilience.checkpoint.part import CRC_BLOCK, Link, Part, draft
from resilience.checkpoint.plan import plan, specs
from resilience.checkpoint.tree import flatten
from resilience.errors import CorruptError

SIZES = (100_000, 5000, 3, 250_000)
SUMS = [(7, bytes((max(size, 1) - 1) // CRC_BLOCK * 4)) for size in SIZES]


def snapshot(step: int, sizes: tuple[int, ...] = SIZES) -> Part:
    state = {f"a{n}": np.zeros(size, np.uint8) for n, size in enumerate(sizes)}
    arrays, skeleton = flatten(state, prefix="")
    return draft(plan(specs(arrays), rank=0, world_size=1), skeleton, run="r", step=step, generation=1)


def first(step: int = 1, same: frozenset[int] = frozenset()) -> Base:
    part = snapshot(step)
    return Base(part, assemble(part, SUMS), same)


@given(st.lists(st.sets(st.integers(0, 3)), min_size=1, max_size=6))
def test_every_chunk_lies_somewhere_and_no_two_share_a_place(history: list[set[int]]) -> None:
    """Over any history of what stays the same, and whatever of it is kept: a valid part whose links name packs that
    really hold those chunks."""
    base = first()
    held = {chunk.array: (base.part.pack_name, chunk.offset) for chunk in base.part.chunks}
    for number, same in enumerate(history):
        new = snapshot(2 + number)
        assert comparable(base, new)
        kept = {n for n in same if base.part.chunks and _pack(base, n) in offered(base)}
        part = assemble(new, SUMS, kept, base)
        part.check()
        assert {chunk.array for chunk in part.chunks} == {0, 1, 2, 3}
        for chunk in part.chunks:
            name = part.pack_of(chunk)
            if chunk.pack:
                origin = name.rpartition("from-")[2].removesuffix(".pack")
                assert held[chunk.array] == (f"checkpoints/{origin}/rank-0.pack", chunk.offset)
            else:
                held[chunk.array] = (name, chunk.offset)
        base = Base(new, part, frozenset(same))


def _pack(base: Base, number: int) -> int:
    return next(chunk.pack for chunk in base.part.chunks if chunk.array == base.draft.chunks[number].array)


def test_a_small_constant_keeps_no_pack_alive() -> None:
    assert offered(first(same=frozenset({1, 2}))) == frozenset(), "5 of 355 kB"
    assert offered(first(same=frozenset({0, 1}))) == {0}, "105 of 355 kB"
    assert offered(first()) == frozenset()


def test_a_link_that_serves_little_any_more_is_given_up() -> None:
    base = first(same=frozenset({0, 3}))
    second = snapshot(2)
    part = assemble(second, SUMS, {0, 3}, base)
    assert part.links == (Link("rank-0.from-step-1-g1.pack", base.part.size),)
    assert part.size < base.part.size / 10
    assert offered(Base(second, part, frozenset({0, 3}))) == {1}
    assert offered(Base(second, part, frozenset({1, 2}))) == {0}
    third = snapshot(3)
    again = assemble(third, SUMS, {0, 3}, Base(second, part, frozenset({0, 3})))
    assert again.links == part.links, "the link goes on under the same name"


def test_only_the_same_layout_of_a_later_step_is_compared() -> None:
    base = first(step=5)
    assert comparable(base, snapshot(6))
    assert not comparable(None, snapshot(6))
    assert not comparable(base, snapshot(5))
    assert not comparable(base, snapshot(6, (*SIZES, 1)))
    assert not comparable(base, snapshot(6, (100_001, *SIZES[1:])))
    assert not comparable(base, replace(snapshot(6), generation=2))


def test_without_anything_kept_the_pack_is_the_arena() -> None:
    new = snapshot(2)
    assert assemble(new, SUMS, (), first()) == assemble(new, SUMS)


def test_an_optimizer_that_did_not_move_is_stale() -> None:
    base, new = first(), snapshot(2)
    with pytest.raises(CorruptError, match="stale: all 2 chunks"):
        check_trained(base, new, {0, 1, 3}, ["a1", "a3"])
    check_trained(base, new, {0, 1}, ["a1", "a3"])  # one of them moved
    check_trained(base, new, {0, 1, 2, 3}, [])  # no optimizer: frozen weights alone are no proof of anything
