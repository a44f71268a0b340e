"""From enough cards to ranks that step, and the gate before it."""

from __future__ import annotations

import pytest

from resilience.control import commands as c
from resilience.control import events as e
from resilience.control.types import Candidate, CheckpointRef, Node, Phase, Result


def test_a_run_starts(make_world):
    world = make_world().run_to(Phase.RUNNING)
    started = world.made(c.StartRanks)
    assert len(started) == 2  # four ranks on two of the three nodes, the third is the spare
    assert all(len(command.table) == 4 and command.restore is None for command in started)
    assert world.records("generation.fenced")[0].urgent
    (line,) = world.records("generation.started")
    assert [rank["card"] for rank in line.data["ranks"]] == [str(a.card) for a in world.state.table]
    assert world.records("restore.chosen")[0].data == {"step": 0, "tier": None}


def test_fence_and_store_are_asked_for_at_once(make_world):
    world = make_world()
    assert [type(item) for item in world.log if isinstance(item, (c.Fence, c.OpenStore))] == [
        c.Fence,
        c.OpenStore,
    ]


def test_waits_and_says_for_what(make_world):
    world = make_world(nodes_=1).run_for(10)
    assert world.state.phase is Phase.WAITING
    (line,) = world.records("capacity.waiting")
    assert line.data == {"needed": 4, "available": 2, "deadline_s": 300.0}
    world.join(Node("late-0", 2)).run_for(1)
    world.run_to(Phase.RUNNING)
    assert world.records("capacity.found")


def test_gives_up_at_the_deadline(make_world):
    world = make_world(nodes_=1, capacity_deadline_s=20).run_to(Phase.DONE, limit=25)
    assert world.outcome.result is Result.NO_CAPACITY
    assert "4 cards are needed, 2 are there" in world.outcome.reason
    assert world.now >= 20


def test_waits_a_little_for_spares_before_the_first_generation(make_world):
    world = make_world(nodes_=2).run_for(2)
    assert world.state.phase is Phase.WAITING
    world.join(Node("node-9", 2))
    assert world.state.phase is Phase.FENCING  # workers and spares are there: at once


def test_but_not_for_ever(make_world):
    world = make_world(nodes_=2).run_for(5.5)
    assert world.state.phase is not Phase.WAITING


def test_without_spares_it_starts_at_once(make_world):
    assert make_world(nodes_=2, spares=0).state.phase is Phase.FENCING


def test_a_higher_fence_than_asked_is_used_and_the_store_still_serves(make_world):
    world = make_world()
    world.generation = 6
    world.run_to(Phase.RUNNING)
    assert world.made(c.Fence)[0].generation == 1
    assert world.state.generation == 7
    assert {command.generation for command in world.made(c.StartRanks)} == {7}


@pytest.mark.parametrize("silent", [c.Fence, c.OpenStore])
def test_no_rank_starts_before_fence_and_store(make_world, silent):
    world = make_world(world={"silent": {silent}}).run_for(20)
    assert not world.made(c.StartRanks)
    assert world.state.phase is Phase.FENCING


def test_no_rank_starts_while_an_old_one_may_live(make_world):
    world = make_world().run_to_step(23)
    world.silent.add(c.StopRanks)
    world.mark().kill(2).run_for(20)
    assert world.made(c.Fence)
    assert not world.made(c.StartRanks)
    for name in world.state.running.left():
        assert not world.made(c.StartRanks)
        world.ranks = {rank: one for rank, one in world.ranks.items() if one.node != name}
        world.send(e.RanksStopped(world.now, world.running, name))
    assert world.made(c.StartRanks)


def test_a_node_that_does_not_end_its_ranks_is_taken_for_lost(make_world):
    world = make_world(nodes_=5).run_to_step(23)
    world.silent.add(c.StopRanks)
    world.kill(2)
    old = world.state.running.left()
    world.run_for(50)
    assert world.state.phase is Phase.FENCING
    for (
        name
    ) in old:  # cut off, as far as we can tell: they must not count as living for the world's own check
        world.nodes.pop(name)
    world.silent.clear()
    world.run_to(Phase.RUNNING)
    assert set(old) <= set(world.state.cluster.lost)


def test_a_store_that_does_not_open_is_asked_of_another_node(make_world):
    world = make_world(world={"silent": {c.OpenStore}}).run_for(30)
    (first,) = world.made(c.OpenStore)
    world.silent.clear()
    world.run_to(Phase.RUNNING)
    second = world.made(c.OpenStore)[-1]
    assert second.node != first.node
    assert second.generation > first.generation


def test_a_table_that_loses_a_card_before_the_start_is_placed_anew_after_the_fence(make_world):
    world = make_world()
    assert world.state.phase is Phase.FENCING
    card = world.card_of(0)
    world.fault(card)
    assert len(world.made(c.Fence)) == 1  # never two at once
    world.run_to(Phase.RUNNING)
    assert len(world.made(c.Fence)) == 2
    assert card not in {a.card for a in world.state.table}
    assert not world.records("incident.detected")  # nothing had started


def test_the_newest_checkpoint_whose_hosts_live_is_restored(make_world):
    def old(step, tier, *hosts):
        return Candidate(CheckpointRef(step, 1), tier, 4, hosts)

    world = make_world(world={"silent": {c.Fence}}).run_for(1)
    recorded = (old(30, "nvme", "gone", "node-0"), old(30, "shared"), old(20, "shared"))
    world.generation = 2
    world.send(e.Fenced(world.now, 2, recorded))
    world.run_for(1)
    assert world.made(c.StartRanks)[0].restore == recorded[1]
    (skipped,) = world.records("restore.skipped")
    assert skipped.data["tier"] == "nvme"
    assert "gone" in skipped.data["reason"]
    assert world.records("restore.chosen")[0].data == {"step": 30, "tier": "shared", "generation": 1}


def test_recorded_but_quarantined_is_no_reason_to_start_over(make_world):
    world = make_world(world={"silent": {c.Fence}}).run_for(1)
    world.send(e.Fenced(world.now, 2, unusable=(Candidate(CheckpointRef(30, 1), "shared", 4),)))
    assert world.outcome.result is Result.NO_CHECKPOINT
    assert "step-30-g1" in world.outcome.reason


def test_a_finished_run_is_not_run_again(make_world):
    world = make_world(world={"silent": {c.Fence}}).run_for(1)
    world.send(e.Fenced(world.now, 2, finished=True))
    assert world.outcome.result is Result.FINISHED
    assert not world.made(c.StartRanks)


@pytest.mark.parametrize(("newer", "result"), [(True, Result.FENCED), (False, Result.UNAVAILABLE)])
def test_a_lost_fence_ends_the_run(make_world, newer, result):
    world = make_world(world={"silent": {c.Fence}}).run_for(1)
    world.send(e.FenceLost(world.now, "slot 4 is theirs", newer))
    assert world.outcome.result is result


def test_code_that_cannot_be_imported_stops_at_once_with_its_traceback(make_world):
    world = make_world(nodes_=1)
    world.send(e.LoadFailed(world.now, "node-5", "ModuleNotFoundError: torchh", "Traceback ..."))
    assert world.outcome.result is Result.USER_ERROR
    assert world.outcome.exit.traceback == "Traceback ..."


def test_a_node_with_a_broken_environment_later_is_left_out(make_world):
    world = make_world().run_to(Phase.RUNNING)
    world.send(e.LoadFailed(world.now, "node-5", "ModuleNotFoundError: torchh", "Traceback ..."))
    assert world.state.phase is Phase.RUNNING
    assert world.records("warning.raised")


def test_an_older_fence_is_no_answer(make_world):
    world = make_world().run_to_step(23)
    world.silent.add(c.Fence)
    world.kill(2).run_for(1).mark()
    world.send(e.Fenced(world.now, world.running))
    assert world.state.attempt.won == 0
    assert not world.made(c.StartRanks)


def test_only_an_answer_to_our_own_order_says_that_a_node_is_clear(make_world):
    world = make_world().run_to_step(23)
    world.kill(2).run_to(Phase.RUNNING).mark()
    node = world.card_of(0).node
    world.send(e.RanksStopped(world.now, world.running, node))  # nobody was told to stop anything
    world.silent.add(c.StopRanks)
    world.kill(2)
    world.send(e.RanksStopped(world.now, world.running - 1, node))  # an older order's answer
    assert node in world.state.running
    world.send(e.RanksStopped(world.now, world.running, node))
    assert node not in world.state.running
