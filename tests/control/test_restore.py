"""Which checkpoint is restored, and that scratch is the last resort."""

from __future__ import annotations

from resilience.control.restore import choose
from resilience.control.types import Candidate, CheckpointRef

NODES = {"a": 1, "b": 1}


def candidate(step, tier, hosts=("a", "b")):
    return Candidate(CheckpointRef(step, 1), tier, 2, hosts if tier == "nvme" else ())


LOCAL, COLD, OLD = candidate(20, "nvme"), candidate(20, "shared"), candidate(10, "shared")


def pick(*candidates, damaged=(), unread=(), nodes=NODES, unusable=()):
    return choose(
        candidates,
        damaged={(each.ref, each.tier): "crc" for each in damaged},
        unread={(each.ref, each.tier): "timeout" for each in unread},
        nodes=nodes,
        unusable=unusable,
    )


def test_the_first():
    assert pick(LOCAL, COLD, OLD).candidate is LOCAL


def test_nothing_recorded_is_scratch():
    choice = pick()
    assert choice.candidate is None
    assert not choice.stuck
    assert not choice.warning


def test_nvme_needs_all_its_hosts():
    choice = pick(LOCAL, COLD, nodes={"a": 1})
    assert choice.candidate is COLD
    assert choice.skipped == ((LOCAL, "its packs lie on b, lost"),)


def test_damaged_falls_to_the_colder_tier_then_to_an_older_step():
    assert pick(LOCAL, COLD, OLD, damaged=[LOCAL]).candidate is COLD
    assert pick(LOCAL, COLD, OLD, damaged=[LOCAL, COLD]).candidate is OLD


def test_unread_is_tried_again_when_nothing_else_is_left():
    assert pick(COLD, OLD, unread=[COLD]).candidate is OLD
    assert pick(COLD, OLD, unread=[COLD, OLD]).candidate is COLD


def test_never_scratch_over_recorded_checkpoints():
    choice = pick(LOCAL, COLD, damaged=[LOCAL, COLD])
    assert choice.candidate is None
    assert "step-20-g1 (nvme), step-20-g1 (shared)" in choice.stuck
    assert pick(unusable=[COLD]).stuck
    assert pick(LOCAL, nodes={}, unusable=[COLD]).stuck


def test_what_was_only_on_lost_nodes_is_gone_with_them():
    choice = pick(LOCAL, nodes={"a": 1})
    assert choice.candidate is None
    assert not choice.stuck
    assert "step 20" in choice.warning
