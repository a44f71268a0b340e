"""What may go, and what never."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilience.control.retention import NVME, SHARED, Kept, add, remove, retire
from resilience.control.types import CheckpointRef

BOTH = frozenset({NVME, SHARED})
LOCAL = frozenset({NVME})


def kept(*steps, tiers=BOTH):
    return tuple(Kept(CheckpointRef(step, 1), tiers) for step in sorted(steps, reverse=True))


@pytest.mark.parametrize(
    ("have", "keep_last", "keep_every", "gone"),
    [
        ((10,), 1, None, []),
        ((10, 20, 30), 3, None, []),
        ((10, 20, 30, 40), 3, None, [10]),
        ((10, 20, 30, 40), 1, None, [10, 20, 30]),
        ((10, 20, 30, 40), 0, None, [10, 20, 30]),  # at least one is kept
        ((10, 20, 30, 40, 50), 1, 20, [10, 30]),
        ((), 1, None, []),
    ],
)
def test_keep_last_and_every(have, keep_last, keep_every, gone):
    refs = retire(kept(*have), keep_last=keep_last, keep_every=keep_every)
    assert [ref.step for ref in refs] == gone


def test_the_newest_shared_one_stays_while_newer_ones_are_on_nodes_only():
    have = (*kept(40, 50, 60, tiers=LOCAL), *kept(10, 20, 30))
    assert [ref.step for ref in retire(have, keep_last=2, keep_every=None)] == [10, 20, 40]


def test_what_training_went_back_behind_pushes_nothing_out():
    """Steps 980 to 1000 of generation 1 cannot be read; generation 2 went on from 900."""
    old = tuple(
        Kept(CheckpointRef(step, 1), BOTH if step <= 900 else LOCAL) for step in (890, 900, 980, 990, 1000)
    )

    def gone(*steps, tiers=LOCAL, keep_last=3):
        new = tuple(Kept(CheckpointRef(step, 2), tiers) for step in steps)
        return [str(ref) for ref in retire((*old, *new), keep_last=keep_last, keep_every=None)]

    assert gone(910, keep_last=1) == ["step-890-g1"]
    assert gone(910, 920) == ["step-890-g1"], "900 is what all of it rests on until 910 is in the shared tier"
    assert gone(910, 920, tiers=BOTH, keep_last=1) == ["step-890-g1", "step-900-g1", "step-910-g2"]
    assert gone(910, 1010, tiers=BOTH, keep_last=1) == [
        "step-890-g1",
        "step-900-g1",
        "step-910-g2",
        "step-980-g1",
        "step-990-g1",
        "step-1000-g1",
    ]


def test_tiers_are_added_and_taken_away():
    ref = CheckpointRef(10, 1)
    have = add(add((), ref, NVME), ref, SHARED)
    assert have == (Kept(ref, BOTH),)
    assert remove(have, ref, NVME) == (Kept(ref, frozenset({SHARED})),)
    assert remove(remove(have, ref, NVME), ref, SHARED) == ()


tiers = st.sampled_from([LOCAL, BOTH, frozenset({SHARED})])
entries = st.dictionaries(st.tuples(st.integers(1, 99), st.integers(1, 4)), tiers, min_size=1, max_size=20)


@settings(max_examples=60, deadline=None)
@given(entries, st.integers(0, 5), st.one_of(st.none(), st.integers(1, 7)))
def test_never_the_newest_nor_the_newest_shared(entries, keep_last, keep_every):
    have = tuple(Kept(CheckpointRef(*at), tier) for at, tier in entries.items())
    gone = set(retire(have, keep_last=keep_last, keep_every=keep_every))
    assert max(have, key=lambda entry: entry.order).ref not in gone
    shared = [entry for entry in have if SHARED in entry.tiers]
    if shared:
        assert max(shared, key=lambda entry: entry.order).ref not in gone
