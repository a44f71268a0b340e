"""Hangs and deadlines through the supervisor."""

from __future__ import annotations

from resilience.control import events as e
from resilience.control.types import Phase


def test_a_stopped_rank_is_found_and_replaced_in_place(make_world):
    world = make_world().run_to_step(23)
    world.ranks[2].state = "T"
    stopped_at = world.now
    world.until(lambda: world.recovered)
    (done,) = world.recovered
    (line,) = world.records("incident.recovered")
    assert (done["kind"], done["decision"], done["confidence"], line.rank) == ("hang", "restart", 1.0, 2)
    assert 14 < done["phases"]["detect"] < 16.5
    assert world.now - stopped_at < 20


def test_a_hang_without_a_culprit_blames_nobody(make_world):
    world = make_world().run_to_step(23)
    world.step_s = 1e9
    world.until(lambda: world.records("incident.detected"), limit=30)
    (line,) = world.records("incident.detected")
    assert (line.data["kind"], line.rank, line.data["confidence"]) == ("hang", None, 0.0)


def test_a_long_evaluation_is_no_hang(make_world):
    world = make_world().run_to_step(23)
    for rank in world.ranks.values():
        rank.section = "eval"
    world.run_for(120)
    assert world.state.phase is Phase.RUNNING
    for rank in world.ranks.values():
        rank.section = "step"
        rank.changed = world.now
    world.run_to(Phase.DONE)
    assert not world.records("incident.detected")


def test_ranks_that_never_begin_are_given_up_at_the_start_deadline(make_world):
    world = make_world(start_deadline_s=60)
    world.drop = lambda event: isinstance(event, e.Restored)
    world._restore = lambda command, rank: None
    world.until(lambda: world.records("incident.detected"), limit=70)
    (line,) = world.records("incident.detected")
    assert line.data["kind"] == "start"
    assert "0, 1, 2, 3 of 4 had not begun" in line.data["cause"]
    assert line.rank is None


def test_the_one_rank_that_does_not_begin_is_blamed(make_world):
    world = make_world(start_deadline_s=60)
    restore = world._restore
    world._restore = lambda command, rank: (
        None if rank == 3 and command.generation == 1 else restore(command, rank)
    )
    world.until(lambda: world.recovered)
    (line,) = world.records("incident.recovered")
    assert (line.data["kind"], line.rank) == ("start", 3)


def test_a_rank_stopped_while_starting_does_not_take_the_whole_start_deadline(make_world):
    world = make_world().run_to(Phase.STARTING)
    world._restore = lambda command, rank: None
    world.ranks[1].state = "T"
    world.until(lambda: world.records("incident.detected"), limit=20)
    assert world.records("incident.detected")[0].rank == 1
