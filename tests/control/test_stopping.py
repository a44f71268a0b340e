"""A clean stop: one last checkpoint, at the same step on every rank, or a good reason why not."""

from __future__ import annotations

import pytest

from resilience.control import commands as c
from resilience.control import events as e
from resilience.control.types import CheckpointRef, Phase, Result


def test_stops_after_a_last_checkpoint(make_world):
    world = make_world().run_to_step(23).stop().run_to(Phase.DONE, limit=30)
    assert world.outcome.result is Result.INTERRUPTED
    (post,) = world.made(c.PostStop)
    assert post.step > 23
    assert world.made(c.ReleaseStop) == [c.ReleaseStop(1, post.step)]
    assert world.state.kept[0].ref.step == post.step
    assert "shared" in world.state.kept[0].tiers
    order = [type(item) for item in world.log]
    last = max(i for i, item in enumerate(world.log) if isinstance(item, e.Committed))
    assert last < order.index(c.ReleaseStop) < order.index(c.Finish)
    assert world.records("stop.requested")


def test_the_release_waits_for_the_shared_tier(make_world):
    world = make_world(world={"save_s": 6.0}).run_to_step(23).stop().run_for(8)
    assert world.state.stopping.parked.count == 4
    assert not world.made(c.ReleaseStop)
    assert world.run_for(8).made(c.ReleaseStop)


def test_a_stop_point_that_was_passed_is_set_farther_ahead(make_world):
    world = make_world().run_to_step(23)
    for rank in world.ranks.values():
        rank.step = 60  # far ahead of what the supervisor has heard
    world.stop().run_to(Phase.DONE, limit=40)
    posts = [command.step for command in world.made(c.PostStop)]
    assert posts[0] < 60 < posts[-1]
    assert world.outcome.result is Result.INTERRUPTED
    assert world.state.kept[0].ref.step == posts[-1]


def test_some_parked_some_past_go_on_to_the_same_later_point(make_world):
    world = make_world().run_to_step(23)
    world.drop = lambda event: isinstance(event, (e.Parked, e.CheckpointMissed))
    world.stop()
    (post,) = world.made(c.PostStop)
    world.drop = lambda event: False
    world.send(e.Parked(world.now, 1, 0, post.step))
    assert world.state.stopping.parked.count == 1
    world.send(e.CheckpointMissed(world.now, 1, 1, post.step, post.step + 2))
    second = world.made(c.PostStop)[-1]
    assert second.step > post.step + 2
    assert world.state.stopping.parked.count == 0
    world.send(e.Parked(world.now, 1, 2, post.step))  # late, of the earlier point
    assert world.state.stopping.parked.count == 0


@pytest.mark.parametrize("fail", ["save", "commit", "memory"])
def test_a_last_checkpoint_that_fails_does_not_hold_the_stop(make_world, fail):
    world = make_world().run_to_step(23)
    world.silent.add(c.Commit)
    world.drop = lambda event: fail != "commit" and getattr(event, "tier", "") == "shared" and event.at > 12
    world.stop().run_for(4)
    step = world.state.stopping.step
    if fail == "commit":
        world.send(e.CommitFailed(world.now, CheckpointRef(step, 1), "shared", "bucket away"))
    else:
        world.drop = lambda event: False
        tier = "shared" if fail == "save" else "memory"
        world.send(e.SaveFailed(world.now, 1, 0, step, tier, "bucket away"))
    world.until(lambda: world.made(c.ReleaseStop), limit=5)
    world.run_to(Phase.DONE, limit=70)
    assert world.outcome.result is Result.INTERRUPTED
    assert "bucket away" in world.outcome.reason


def test_the_deadline_ends_ranks_that_do_not_park(make_world):
    world = make_world(stop_deadline_s=20).run_to_step(23)
    world.drop = lambda event: isinstance(event, e.Parked)
    world.stop().run_to(Phase.DONE, limit=40)
    assert world.outcome.result is Result.INTERRUPTED
    assert "20 s" in world.outcome.reason
    assert world.made(c.StopRanks)


def test_long_steps_reach_the_stop_point(make_world):
    """The stop point is two steps ahead at best: 80 s, and the deadline without progress is 60."""
    world = make_world(checkpoint_every=2, world={"step_s": 40.0}).run_to_step(7)
    world.stop().run_to(Phase.DONE, limit=300)
    assert world.outcome.result is Result.INTERRUPTED
    assert "stopped cleanly" in world.outcome.reason
    assert world.state.kept[0].ref.step == world.made(c.PostStop)[-1].step


def test_a_last_checkpoint_that_keeps_moving_is_waited_for(make_world):
    world = make_world(stop_deadline_s=20).run_to_step(23)
    world.drop = lambda event: isinstance(event, e.Persisted)
    world.stop().run_for(4)
    world.drop = lambda event: False
    step = world.state.stopping.step
    for tier in ("nvme", "shared"):
        for rank in range(4):
            world.run_for(15)
            world._persist(1, rank, step, tier, world.card_of(rank).node)
    world.run_to(Phase.DONE, limit=5)
    assert "stopped cleanly" in world.outcome.reason
    assert world.state.kept[0].tiers == {"nvme", "shared"}


def test_steps_beyond_a_stop_point_do_not_hold_the_deadline(make_world):
    world = make_world(stop_deadline_s=20).run_to_step(23)
    world._on_poststop = lambda command: None  # the ranks never hear of it
    world.stop().run_to(Phase.DONE, limit=30 + world.step_s * 10)
    assert "without progress" in world.outcome.reason


@pytest.mark.parametrize("how", ["kill", "raise_in", "lose"])
def test_a_failure_while_stopping_ends_the_run_and_starts_nothing(make_world, how):
    world = make_world().run_to_step(23)
    world.drop = lambda event: isinstance(event, e.Parked)
    world.stop().run_for(1).mark()
    target = world.card_of(2).node if how == "lose" else 2
    getattr(world, how)(target)
    world.run_to(Phase.DONE, limit=15)
    assert world.outcome.result is Result.INTERRUPTED
    assert not world.made(c.Fence)
    assert world.records("incident.detected")


def test_a_stop_while_waiting_fencing_or_starting_ends_at_once(make_world):
    for world in (
        make_world(nodes_=1),
        make_world(world={"silent": {c.Fence}}),
        make_world().run_to(Phase.STARTING),
    ):
        world.stop()
        assert world.outcome.result is Result.INTERRUPTED


def test_a_stop_while_recovering_keeps_the_last_saves_and_starts_nothing(make_world):
    world = make_world(world={"save_s": 2.0}).run_to_step(20).run_for(0.1).mark()
    world.kill(2).stop().run_to(Phase.DONE, limit=15)
    assert world.outcome.result is Result.INTERRUPTED
    assert world.state.kept[0].ref.step == 20
    assert not world.made(c.Fence)


def test_a_run_that_ends_before_the_stop_point_is_finished(make_world):
    world = make_world().run_to_step(99).stop().run_to(Phase.DONE, limit=30)
    assert world.outcome.result is Result.FINISHED


def test_a_second_request_changes_nothing(make_world):
    world = make_world().run_to_step(23).stop()
    assert world.send(e.StopRequested(world.now)) == ()


@pytest.mark.parametrize("asked_before", [False, True])
def test_a_stop_at_once_ends_the_run_and_is_told(make_world, asked_before):
    world = make_world().run_to_step(23)
    if asked_before:
        world.stop()
    world.send(e.StopRequested(world.now, "twice", at_once=True))
    assert world.state.phase is Phase.DONE
    assert world.outcome.result is Result.INTERRUPTED
    assert "without a last checkpoint" in world.outcome.reason
    assert world.records("run.finished") and world.records("generation.ended")
    assert {command.node for command in world.made(c.StopRanks)} == {a.card.node for a in world.state.table}
