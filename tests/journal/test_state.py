"""Folding the log: pure, deaf to writers that were not in charge, and never undoing a retirement."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilience.control.types import Candidate, CheckpointRef
from resilience.errors import CorruptError
from resilience.journal.records import Kind, Record
from resilience.journal.state import LogState, candidates, fold


def log(*entries: tuple[Kind, int, dict[str, Any]]) -> list[Record]:
    return [
        Record(slot, kind, generation, f"w{slot}", None, body)
        for slot, (kind, generation, body) in enumerate(entries, 1)
    ]


def fence(generation: int) -> tuple[Kind, int, dict[str, Any]]:
    return Kind.FENCE, generation, {}


def checkpoint(
    generation: int, step: int, tier: str = "shared", *, of: int | None = None
) -> tuple[Kind, int, dict[str, Any]]:
    parts = [
        {"rank": rank, "node": f"node-{rank}", "name": f"rank-{rank}.json", "sha256": "s"} for rank in (1, 0)
    ]
    body = {"step": step, "tier": tier, "world_size": 2, "parts": parts, "size": 10}
    if of is not None:
        body["generation"] = of
    return Kind.CHECKPOINT, generation, body


def retire(generation: int, *refs: tuple[int, int]) -> tuple[Kind, int, dict[str, Any]]:
    return Kind.RETIRE, generation, {"refs": [{"step": step, "generation": of} for step, of in refs]}


def quarantine(generation: int, step: int, of: int, tier: str) -> tuple[Kind, int, dict[str, Any]]:
    return Kind.QUARANTINE, generation, {"step": step, "generation": of, "tier": tier, "reason": "nan"}


def names(state: LogState) -> list[str]:
    return [str(it.ref) for it in state.checkpoints]


def test_an_empty_log_is_the_empty_state() -> None:
    assert fold([]) == LogState(0, (), {}, None, frozenset())
    assert candidates(fold([])) == ()


def test_checkpoints_are_newest_first_with_their_tiers() -> None:
    state = fold(
        log(
            fence(1), checkpoint(1, 10, "nvme"), checkpoint(1, 20, "nvme"), checkpoint(1, 10),
            fence(2), checkpoint(2, 20),
        )
    )  # fmt: skip
    assert state.generation == 2
    assert names(state) == ["step-20-g2", "step-20-g1", "step-10-g1"]
    oldest = state.checkpoints[-1]
    assert set(oldest.tiers) == {"nvme", "shared"}
    assert (oldest.tiers["nvme"].slot, oldest.tiers["shared"].slot) == (2, 4)
    assert oldest.tiers["nvme"].hosts == (
        "node-0",
        "node-1",
    )  # index = rank, whatever order they were told in
    assert oldest.tiers["shared"].hosts == ()
    assert [part.rank for part in oldest.tiers["shared"].parts] == [0, 1]
    assert oldest.tiers["shared"].parts[1] == (1, "node-1", "rank-1.json", "s")


def test_candidates_are_newest_step_first_then_the_nearer_tier() -> None:
    state = fold(
        log(
            fence(1), checkpoint(1, 10), checkpoint(1, 20), checkpoint(1, 20, "nvme"), checkpoint(1, 30),
            fence(2), checkpoint(2, 20), quarantine(2, 30, 1, "shared"), quarantine(2, 20, 2, "nvme"),
        )
    )  # fmt: skip
    assert [(str(it.ref), it.tier) for it in candidates(state)] == [
        ("step-20-g1", "nvme"),
        ("step-20-g2", "shared"),
        ("step-20-g1", "shared"),
        ("step-10-g1", "shared"),
    ]
    assert candidates(state)[0] == Candidate(CheckpointRef(20, 1), "nvme", 2, ("node-0", "node-1"))
    assert state.quarantined == {(30, 1, "shared"): "nan", (20, 2, "nvme"): "nan"}
    assert "step-30-g1" in names(state)


def test_retired_is_for_ever() -> None:
    """A drain that comes late must not bring back a checkpoint whose bytes are being deleted."""
    state = fold(
        log(fence(1), checkpoint(1, 10, "nvme"), checkpoint(1, 20), retire(1, (10, 1)), checkpoint(1, 10))
    )
    assert names(state) == ["step-20-g1"]
    assert state.retired == {CheckpointRef(10, 1)}


def test_a_later_generation_may_record_a_tier_of_an_older_checkpoint() -> None:
    state = fold(log(fence(1), checkpoint(1, 10, "nvme"), fence(2), checkpoint(2, 10, of=1)))
    assert names(state) == ["step-10-g1"]
    assert set(state.checkpoints[0].tiers) == {"nvme", "shared"}


def test_finish_keeps_its_body() -> None:
    state = fold(log(fence(1), (Kind.FINISH, 1, {"step": 7, "result": "finished"}), fence(2)))
    assert state.finished == {"step": 7, "result": "finished"}


ENTRIES = st.lists(
    st.tuples(st.sampled_from("fcrq"), st.integers(1, 4), st.sampled_from(["nvme", "shared"])), max_size=12
)


@settings(max_examples=150, database=None, deadline=None)
@given(ENTRIES, st.data())
def test_p3_readers_ignore_writers_that_were_not_in_charge(
    entries: list[tuple[str, int, str]], data: st.DataObject
) -> None:
    """Records of generations below the highest earlier fence, put in anywhere, change nothing."""
    generation = 1
    good = [fence(1)]
    for what, step, tier in entries:
        if what == "f":
            generation += step
            good.append(fence(generation))
        else:
            good.append(_of(what, generation, step, tier))
    spoiled, highest = [], 0
    for entry in good:
        spoiled.append(entry)
        highest = max(highest, entry[1])
        if highest > 1 and data.draw(st.booleans()):
            old = data.draw(st.integers(1, highest - 1))
            spoiled.append(
                data.draw(st.sampled_from([fence(old), *(_of(w, old, 99, "nvme") for w in "crq")]))
            )
    assert _meaning(fold(log(*spoiled))) == _meaning(fold(log(*good)))
    assert fold(log(*good)).generation == generation


def _of(what: str, generation: int, step: int, tier: str) -> tuple[Kind, int, dict[str, Any]]:
    if what == "c":
        return checkpoint(generation, step, tier)
    return retire(generation, (step, generation)) if what == "r" else quarantine(generation, step, 1, tier)


def _meaning(state: LogState) -> object:
    found = [(it.ref, sorted(it.tiers)) for it in state.checkpoints]
    return state.generation, found, state.quarantined, state.finished, state.retired


def test_a_body_that_cannot_be_used_is_named() -> None:
    with pytest.raises(CorruptError, match=r"log/0{19}2\.json.*'refs'"):
        fold(log(fence(1), (Kind.RETIRE, 1, {"ref": []})))
