"""Failures: what is blamed, what is decided, what is written down, and that the run goes on."""

from __future__ import annotations

import pytest

from resilience.control import commands as c
from resilience.control import events as e
from resilience.control.types import Card, Exit, Node, Phase, Result


def recover(world):
    """Let time pass until the failure is over; its line in the journal."""
    before = len(world.recovered)
    world.until(lambda: len(world.recovered) > before or world.outcome)
    return world.recovered[-1]


def test_a_killed_rank_restarts_on_its_card(make_world):
    world = make_world().run_to_step(23)
    before = world.state.table
    world.mark().kill(2)
    done = recover(world)
    assert world.state.table == before
    assert (done["kind"], done["decision"], done["confidence"]) == ("signal", "restart", 1.0)
    assert "rank 2 was ended by SIGKILL" in done["cause"]
    assert (done["step_failed"], done["step_restored"], done["lost_steps"]) == (23, 20, 3)
    assert done["tier"] == "nvme"
    (line,) = world.records("incident.recovered")
    assert (line.rank, line.node, line.card) == (2, before[2].card.node, str(before[2].card))


def test_phases_are_measured(make_world):
    world = make_world().run_to_step(23).mark()
    began = world.now
    phases = recover(world.kill(2))["phases"]
    assert list(phases) == ["detect", "decide", "fence", "start", "restore", "first_step"]
    assert phases["detect"] == phases["decide"] == 0
    assert phases["fence"] == pytest.approx(0.02)
    assert phases["restore"] == pytest.approx(0.2)
    assert sum(phases.values()) == pytest.approx(world.now - began, abs=world.tick_s)


def test_the_decision_is_written_before_anything_is_done(make_world):
    world = make_world().run_to_step(23).mark()
    world.kill(2)
    order = [item.type if isinstance(item, c.Record) else type(item) for item in world.log]
    detected, decided = order.index("incident.detected"), order.index("incident.decided")
    assert detected < decided < order.index(c.StopRanks)
    assert order.index(c.StopRanks) < order.index(c.Fence)
    assert world.records("incident.detected")[0].urgent
    assert world.records("incident.decided")[0].urgent


def test_peers_that_lose_their_connection_first_are_not_blamed(make_world):
    world = make_world().run_to_step(23).mark()
    for rank in (0, 1, 3):
        world.lose_peers(rank)
    assert world.state.phase is Phase.RUNNING  # waiting for a better explanation
    world.run_for(0.1).kill(2)
    assert world.state.phase is Phase.FENCING  # found: no more waiting
    done = recover(world)
    assert done["cause"].startswith("rank 2 was ended by SIGKILL")
    assert len(done["signals"]) == 3
    assert len(world.recovered) == 1


def test_a_lone_connection_error_is_infrastructure_and_nobodys_fault(make_world):
    world = make_world().run_to_step(23).lose_peers(1)
    done = recover(world)
    assert (done["kind"], done["decision"], done["confidence"]) == ("exit", "restart", 0.0)
    assert world.records("incident.recovered")[0].rank is None
    assert world.state.failures.count == 1


def test_a_lost_connection_is_explained_by_the_node_lost_later(make_world):
    world = make_world().run_to_step(23)
    node = world.card_of(2).node
    world.silent.add(c.StopRanks)  # a node that died does not answer, and Ray takes its time to say so
    world.lose_peers(0).run_for(3)
    assert world.incident.rank is None
    world.silent.clear()
    for name in world.state.running.left():
        if name != node:
            world._on_stopranks(c.StopRanks(world.running, name))
    done = recover(world.lose(node))
    assert (done["kind"], done["decision"], done["confidence"]) == ("node", "replace node", 1.0)
    assert world.records("incident.recovered")[0].node == node
    assert [line.data["decision"] for line in world.records("incident.decided")] == [
        "restart",
        "replace node",
    ]
    assert len(world.recovered) == 1


def test_an_exception_of_the_user_ends_the_run_with_its_rank_and_traceback(make_world):
    world = make_world().run_to_step(23).mark()
    world.lose_peers(0).raise_in(3, "ValueError: bad batch").lose_peers(1)
    world.run_to(Phase.DONE, limit=15)
    assert world.outcome.result is Result.USER_ERROR
    assert world.outcome.rank == 3
    assert world.outcome.exit.error == "ValueError: bad batch"
    assert not world.made(c.Fence)
    assert world.records("run.finished")[0].data["result"] == "user_error"


def test_the_earliest_exception_is_the_root(make_world):
    world = make_world().run_to_step(5).raise_in(3, "ValueError: a").run_for(0.2).raise_in(0, "KeyError: b")
    world.run_to(Phase.DONE, limit=15)
    assert world.outcome.rank == 3


def test_an_exception_explained_by_a_dead_rank_is_not_the_users(make_world):
    world = make_world().run_to_step(23).raise_in(0, "RuntimeError: something odd in a collective")
    done = recover(world.run_for(0.2).kill(2))
    assert "rank 2" in done["cause"]
    assert "something odd" in done["signals"][0]


def test_a_silent_exit_restarts(make_world):
    done = recover(make_world().run_to_step(23).kill(1, Exit(code=3)))
    assert (done["kind"], done["decision"]) == ("exit", "restart")


def test_a_faulted_card_is_replaced_and_never_used_again(make_world):
    world = make_world(nodes_=2, cards=4, spares=1).run_to_step(23)
    card = world.card_of(1)
    world.fault(card)
    done = recover(world)
    assert (done["kind"], done["decision"]) == ("card", "replace card")
    assert world.card_of(1).node in {node.name for node in world.nodes.values()}
    for rank in (0, 2, 3):
        world.run_for(8).fault(world.card_of(rank), f"sim-{rank}").run_to(Phase.RUNNING)
    assert card not in {a.card for a in world.state.table}
    assert len(world.recovered) == 4


def test_a_lost_node_is_replaced_and_its_nvme_with_it(make_world):
    world = make_world().run_to_step(23)
    node = world.card_of(0).node
    stay = {a.rank: a.card for a in world.state.table if a.card.node != node}
    done = recover(world.lose(node))
    assert (done["kind"], done["decision"], done["tier"]) == ("node", "replace node", "shared")
    assert done["phases"]["detect"] == pytest.approx(1.0)  # since its last sign of life
    assert all(world.card_of(rank) == card for rank, card in stay.items())
    assert world.records("restore.skipped")[0].data["tier"] == "nvme"


def test_a_lost_spare_is_only_written_down(make_world):
    world = make_world().run_to_step(23).mark()
    (spare,) = set(world.nodes) - {a.card.node for a in world.state.table}
    world.lose(spare).fault(Card("node-9", 0)).run_for(1)
    assert world.state.phase is Phase.RUNNING
    assert world.records("node.lost")
    assert world.records("card.faulted")
    assert not world.records("incident.detected")


def test_a_name_that_was_lost_does_not_come_back(make_world):
    world = make_world().run_to_step(3)
    node = world.nodes["node-2"]
    world.lose("node-2").mark().join(node)
    assert "node-2" not in world.state.cluster.nodes
    world.join(Node("node-2b", 2))
    assert world.state.cluster.available == 6


def test_too_few_cards_left_waits_for_new_ones(make_world):
    world = make_world(nodes_=2, spares=0).run_to_step(23)
    world.lose("node-0").run_to(Phase.WAITING)
    world.run_for(5)
    assert world.records("capacity.waiting")[-1].data["available"] == 2
    world.join(Node("node-7", 2))
    done = recover(world)
    assert done["step_restored"] == 20
    world.run_to(Phase.DONE)
    assert world.outcome.result is Result.FINISHED


def test_too_few_cards_left_gives_up_at_the_deadline(make_world):
    world = make_world(nodes_=2, spares=0, capacity_deadline_s=30).run_to_step(23).lose("node-0")
    world.run_to(Phase.DONE, limit=40)
    assert world.outcome.result is Result.NO_CAPACITY


def test_more_signs_before_the_new_ranks_start_belong_to_the_same_incident(make_world):
    world = make_world(nodes_=5).run_to_step(23).kill(2)
    assert world.state.phase is Phase.FENCING
    world.lose(world.card_of(0).node)
    done = recover(world)
    assert len(world.recovered) == 1
    assert done["kind"] == "node"
    assert any("SIGKILL" in text for text in done["signals"])


def test_a_failure_of_ranks_that_had_started_is_an_incident_of_its_own(make_world):
    world = make_world(nodes_=5).run_to_step(23).kill(2).run_to(Phase.STARTING)
    second = world.state.generation
    world.kill(1)
    world.run_to(Phase.RUNNING)
    first_done, second_done = world.recovered
    assert world.state.generation == second + 1
    assert (first_done["lost_steps"], second_done["lost_steps"]) == (3, 0)
    assert first_done["phases"]["first_step"] == pytest.approx(second_done["phases"]["first_step"])
    assert world.records("incident.recovered")[1].rank == 1


def test_a_node_lost_while_fencing_is_not_placed_on(make_world):
    world = make_world(nodes_=5).run_to_step(23)
    world.silent.add(c.Fence)
    world.kill(2).run_for(1)
    world.lose(world.card_of(3).node)
    assert (
        len(world.made(c.Fence)) == 2
    )  # first start, this recovery: the third only once this one is answered
    world.silent.clear()
    world._fence(world.fenced_asked)
    world.run_to(Phase.RUNNING)
    assert len(world.made(c.Fence)) == 3


def test_events_of_older_generations_are_ignored(make_world):
    world = make_world().run_to_step(23)
    old = world.running
    recover(world.kill(2))
    before = world.state
    for event in (
        e.RankExited(world.now, old, 1, Exit(signal=11)),
        e.Restored(world.now, old, 1, 7, "nvme"),
        e.RankFinished(world.now, old, 1, 100),
        e.Sealed(world.now, old, 1, 30, 0.1, 1),
        e.Persisted(world.now, old, 1, 30, "shared", "node-0", "p", "s", 1, 0.1),
        e.SaveFailed(world.now, old, 1, 30, "shared", "x"),
        e.CheckpointMissed(world.now, old, 1, 30, 31),
        e.Parked(world.now, old, 1, 30),
        e.RanksStopped(world.now, old, "node-0"),
        e.StoreReady(world.now, old, "x:1"),
        e.Fenced(world.now, old),
        e.Progress(world.now, old, world.card_of(0).node, {0: world.state.pages.pages[0][1][0]}),
    ):
        assert world.send(event) == ()
        assert world.state == before


def test_saves_that_every_rank_sealed_are_committed_before_the_fence(make_world):
    world = make_world(world={"save_s": 1.0}).run_to_step(20).run_for(0.1).mark()
    world.kill(2)
    assert world.made(c.StopRanks)
    assert not world.made(c.Fence)
    done = recover(world)
    assert done["step_restored"] == 20
    order = [type(item) for item in world.log]
    assert order.index(c.Commit) < order.index(e.Committed) < order.index(c.Fence)


def test_the_drain_is_bounded(make_world):
    world = make_world(world={"save_s": 1e6}).run_to_step(20).run_for(0.1).kill(2)
    world.run_for(9)
    assert len(world.made(c.Fence)) == 1
    world.run_for(2)
    assert len(world.made(c.Fence)) == 2
    assert [line.step for line in world.records("checkpoint.abandoned")] == [10, 20]


def test_a_save_that_lost_a_node_is_not_waited_for(make_world):
    world = make_world(world={"save_s": 5.0}).run_to_step(20).run_for(0.1).mark()
    world.lose(world.card_of(0).node)
    assert world.made(c.Fence)
    assert world.records("checkpoint.abandoned")


def test_a_damaged_checkpoint_falls_to_the_colder_tier_then_to_an_older_one(make_world):
    world = make_world(world={"bad": {(20, "nvme"), (20, "shared")}}).run_to_step(23).kill(2)
    world.run_to(Phase.RUNNING)
    assert [(q.ref.step, q.tier) for q in world.made(c.Quarantine)] == [(20, "nvme"), (20, "shared")]
    assert world.recovered[0]["step_restored"] == 10
    assert world.recovered[0]["lost_steps"] == 13
    assert [done["decision"] for done in world.recovered] == ["restart", "restore older", "restore older"]
    assert sum(done["lost_steps"] for done in world.recovered) == 13
    assert world.records("checkpoint.quarantined")
    assert world.state.failures.count == 1  # restores that fail do not use up the budget


def test_never_from_scratch_over_damaged_checkpoints(make_world):
    world = make_world(world={"bad": {(10, "nvme"), (10, "shared")}}).run_to_step(13).kill(2)
    world.run_to(Phase.DONE)
    assert world.outcome.result is Result.NO_CHECKPOINT
    assert "none can be restored" in world.outcome.reason


def test_a_checkpoint_that_cannot_be_read_now_is_not_quarantined(make_world):
    world = make_world().run_to_step(23).kill(2).run_to(Phase.STARTING).mark()
    found = world.state.attempt.restore
    world.send(
        e.RestoreFailed(world.now, world.state.generation, 0, found.ref, found.tier, "timeout", corrupt=False)
    )
    done = recover(world)
    assert not world.made(c.Quarantine)
    assert (done["tier"], done["step_restored"]) == ("shared", 20)
    assert world.state.unread == {}


def test_checkpoints_that_can_never_be_read_end_the_run_and_not_in_a_thousand_generations(make_world):
    """What could not be read was tried again for ever: each restore was free, and none left the choice."""
    world = make_world(max_restarts=3).run_to_step(23).kill(2)
    tried = 0
    while tried < 50:
        world.until(lambda: world.state.phase in (Phase.STARTING, Phase.DONE))
        if world.state.phase is Phase.DONE:
            break
        found = world.state.attempt.restore
        world.send(
            e.RestoreFailed(
                world.now, world.state.generation, 0, found.ref, found.tier, "away", corrupt=False
            )
        )
        tried += 1
    places = 2 * len(world.state.candidates)
    assert world.outcome.result is Result.BUDGET_EXHAUSTED
    assert "could not be restored" in world.outcome.reason
    assert 3 < tried <= places + 4
    assert not world.made(c.Quarantine)


def test_what_was_only_on_a_lost_node_starts_over_with_a_warning(make_world):
    world = make_world(world={"drop": lambda event: getattr(event, "tier", "") == "shared"}).run_to_step(13)
    done = recover(world.lose(world.card_of(0).node))
    assert (done["step_restored"], done["tier"]) == (0, None)
    assert "step 10" in world.records("warning.raised")[0].data["message"]


def test_the_same_card_twice_without_progress_is_replaced(make_world):
    world = make_world().run_to_step(23)
    first = world.card_of(2)
    recover(world.kill(2))
    assert world.card_of(2) == first
    done = recover(world.kill(2))
    assert done["decision"] == "replace card"
    assert world.card_of(2) != first
    assert first not in world.state.cluster.excluded  # avoided, not condemned


def test_progress_between_two_failures_forgives_the_card(make_world):
    world = make_world().run_to_step(23)
    first = world.card_of(2)
    recover(world.kill(2))
    world.run_to_step(33)
    assert recover(world.kill(2))["decision"] == "restart"
    assert world.card_of(2) == first


def test_without_a_spare_the_same_card_is_tried_again(make_world):
    world = make_world(nodes_=2, spares=0).run_to_step(23)
    recover(world.kill(2))
    done = recover(world.kill(2))
    assert done["decision"] == "restart"
    assert "no spare" in done["reason"]


def test_the_budget_ends_the_run_and_tells_its_story(make_world):
    world = make_world(max_restarts=3).run_to_step(23)
    for _ in range(3):
        recover(world.kill(2))
    world.kill(2).run_to(Phase.DONE, limit=15)
    assert world.outcome.result is Result.BUDGET_EXHAUSTED
    assert world.outcome.reason.count("SIGKILL") == 4
    assert "max_restarts=3" in world.outcome.reason


def test_the_budget_is_refilled_by_progress(make_world):
    world = make_world(max_restarts=1)
    for step in (23, 33, 43, 53):
        world.run_to_step(step)
        recover(world.kill(2))
    assert world.state.phase is Phase.RUNNING


def test_no_restarts_at_all(make_world):
    world = make_world(max_restarts=0).run_to_step(23).kill(2).run_to(Phase.DONE, limit=15)
    assert world.outcome.result is Result.BUDGET_EXHAUSTED


def test_a_failure_of_the_kept_run_ends_bit_for_bit_where_it_should(make_world):
    world = make_world(nodes_=4)
    for step, rank in ((13, 0), (37, 3), (61, 1)):
        world.run_to_step(step).kill(rank).run_to(Phase.RUNNING)
    world.run_to(Phase.DONE)
    assert world.outcome.result is Result.FINISHED
    assert world.state.pages.top == 100
    assert world.records("run.finished")[0].data["steps"] == 100
