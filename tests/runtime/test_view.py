"""The run right now, as people see it."""

import time
from dataclasses import replace

import pytest

from resilience.control import events as e
from resilience.control import progress, saves
from resilience.control.retention import Kept
from resilience.control.supervise import State, step
from resilience.control.types import Assignment, Card, CheckpointRef, Incident, Node, Phase, Policy
from resilience.journal.state import Checkpoint, LogState, TierEntry
from resilience.runtime.view import view_of


@pytest.fixture
def state():
    made = State.initial(Policy(workers=2, spares=1), "r", at=0.0)
    for name in ("a", "b"):
        made, _ = step(made, e.NodeJoined(1.0, Node(name, 2, ("supernode-0",))))
    table = tuple(Assignment(rank, Card("a", rank), rank) for rank in (0, 1))
    made = replace(made, phase=Phase.RUNNING, generation=1, table=table)
    return replace(made, pages=progress.reach(made.pages, 7, 2.0))


def seen(state, log=None, **options):
    options = {"metrics": {}, "failing": None, **options}
    return view_of(state, log or LogState(), **options)


def test_a_run_that_goes_well(state):
    view = seen(state, metrics={"step": 7, "loss": 0.5, "lr": 0.1})
    assert (view["run"], view["phase"], view["step"], view["generation"]) == ("r", "running", 7, 1)
    assert (view["loss"], view["metrics"]) == (0.5, {"loss": 0.5, "lr": 0.1})
    assert view["cards"] == {"active": 2, "spare": 2, "failed": 0, "lost": 0}
    assert view["nodes"][0] == {"name": "a", "cards": 2, "levels": ["supernode-0"], "ranks": [0, 1]}
    assert (view["checkpoint"], view["recovering"], view["warning"]) == (None, None, None)


def test_the_newest_checkpoint_with_its_furthest_tier_and_its_age(state):
    kept = Kept(CheckpointRef(6, 1), frozenset({"nvme"}))
    state = replace(state, kept=(kept,), safe_at=time.monotonic() - 5)
    entry = TierEntry(slot=3, hosts=(), parts=(), size=1)
    for tiers, furthest in (({"nvme": entry}, "nvme"), ({"nvme": entry, "shared": entry}, "shared")):
        log = LogState(checkpoints=(Checkpoint(6, 1, 2, tiers),))
        checkpoint = seen(state, log)["checkpoint"]
        assert (checkpoint["step"], checkpoint["tier"]) == (6, furthest)
        assert 5 <= checkpoint["age_s"] < 60
    assert seen(state)["checkpoint"]["tier"] is None  # the log has not been read back yet


def test_failed_lost_and_waiting_cards(state):
    cluster = state.cluster
    failed = replace(state, cluster=replace(cluster, excluded=frozenset({Card("a", 0)})))
    assert seen(failed)["cards"]["failed"] == 1
    lost, _ = step(state, e.NodeLost(2.0, "b", "gone", 1.0))
    assert seen(lost)["cards"]["lost"] == 2
    assert [node["name"] for node in seen(lost)["nodes"]] == ["a"]
    assert seen(replace(state, phase=Phase.WAITING))["cards"]["active"] == 0


def test_what_is_waited_for(state):
    assert seen(state)["waiting"] is None
    assert seen(replace(state, phase=Phase.WAITING))["waiting"] is None, (
        "there are enough: spares may still join"
    )
    few = State.initial(Policy(workers=40, capacity_deadline_s=20.0), "r", at=0.0)
    assert seen(few, card="GPU")["waiting"] == {
        "needed": 40,
        "available": 0,
        "deadline_s": 20.0,
        "card": "GPU",
    }


def test_what_is_being_recovered_and_a_journal_that_cannot_be_written(state):
    incident = Incident("1-1", "exit", "rank 1 was killed", 1)
    view = seen(replace(state, open=(incident,), counted=3), failing="storage is away")
    assert (view["recovering"], view["incidents"], view["warning"]) == (
        "rank 1 was killed: deciding",
        3,
        "storage is away",
    )
    decided = replace(incident, decision="restart")
    assert seen(replace(state, open=(decided,)))["recovering"] == "rank 1 was killed: restart"


def test_saves_that_fail_are_warned_of_until_one_succeeds(state):
    held = saves.Saves(generation=1, world=2)

    def warning():
        return seen(replace(state, saves=held), failing="the journal")["warning"]

    for rank in (0, 1):
        held = saves.seal(held, e.Sealed(1.0, 1, rank, 5, 0.0, 1))
    assert warning() == "the journal"
    held, _ = saves.fail(held, 5, "nvme", 2.0, "ENOSPC")
    assert warning() == "the journal", "it still goes to the shared tier"
    held, _ = saves.fail(held, 5, "shared", 2.0, "EROFS")
    assert warning() == "the checkpoint of step 5 failed: ENOSPC"
    held = saves.seal(held, e.Sealed(3.0, 1, 0, 10, 0.0, 1))
    assert warning() == "the checkpoint of step 5 failed: ENOSPC", "the next is under way"
    held, _ = saves.commit(held, 10, "shared", 4.0)
    assert warning() == "the journal"


def test_before_anything_has_run():
    view = seen(State.initial(Policy(workers=2), "r", at=0.0))
    assert (view["step"], view["loss"], view["nodes"]) == (0, None, [])
