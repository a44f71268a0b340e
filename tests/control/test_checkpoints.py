"""Checkpoints through the supervisor: commits, failures that do not stop training, retention, cadence."""

from __future__ import annotations

from itertools import pairwise

import pytest

from resilience.control import commands as c
from resilience.control import events as e
from resilience.control import saves
from resilience.control.types import CheckpointRef, Phase, Result


def test_commits_in_every_tier_and_says_what_it_cost(make_world):
    world = make_world().run_to_step(20).run_for(1)
    made = [(commit.ref.step, commit.tier) for commit in world.made(c.Commit)]
    assert made == [(10, "nvme"), (10, "shared"), (20, "nvme"), (20, "shared")]
    line = world.records("checkpoint.committed")[0]
    assert line.step == 10
    assert line.data["size"] == 400
    assert line.data["stall_s"] == 0.001
    assert line.data["durable_s"] == pytest.approx(0.1, abs=0.02)
    assert len(world.records("checkpoint.sealed")) == 8
    assert len(world.records("checkpoint.persisted")) == 16


def test_old_ones_are_retired(make_world):
    world = make_world(keep_last=2, keep_every=40).run_to_step(80).run_for(1)
    assert [ref.step for command in world.made(c.Retire) for ref in command.refs] == [10, 20, 30, 50, 60]
    assert [entry.ref.step for entry in world.state.kept] == [80, 70, 40]
    assert [line.step for line in world.records("checkpoint.retired")] == [10, 20, 30, 50, 60]


def test_the_newest_shared_one_stays_while_shared_storage_is_away(make_world):
    world = make_world(keep_last=1).run_to_step(11)
    world.drop = lambda event: getattr(event, "tier", "") == "shared"
    world.run_to_step(60).run_for(0.2)
    # 20 is the one the writers are at: retiring it for newer ones on the nodes would never let any arrive.
    assert [entry.ref.step for entry in world.state.kept] == [60, 20, 10]


def test_a_retired_checkpoint_is_never_committed_again(make_world):
    world = make_world(keep_last=1).run_to_step(11)
    held = []
    world.drop = lambda event: getattr(event, "tier", "") == "shared" and not held.append(event)
    world.run_to_step(60).run_for(0.2)
    gone = {ref for command in world.made(c.Retire) for ref in command.refs}
    assert {ref.step for ref in gone} == {30, 40, 50}
    world.drop = lambda event: False
    for event in held:
        world.send(event)
    world.run_for(1)
    assert not [commit for commit in world.made(c.Commit) if commit.ref in gone and commit.tier == "shared"]
    assert {entry.ref.step for entry in world.state.kept} == {60}


def test_a_failed_save_is_told_with_the_age_of_the_last_good_one_and_training_goes_on(make_world):
    world = make_world().run_to_step(19)
    world.drop = lambda event: isinstance(event, e.Persisted) and event.step == 20
    world.run_to_step(20).run_for(0.2)
    for rank in range(4):
        world.send(e.SaveFailed(world.now, world.running, rank, 20, "nvme", "ENOSPC: no space left"))
    (line,) = world.records("checkpoint.failed")  # told once, not by every rank
    assert line.urgent
    assert line.data["error"] == "ENOSPC: no space left"
    assert line.data["last_good_step"] == 10
    assert 4 < line.data["last_good_age_s"] < 6
    world.run_to_step(31)
    assert world.state.phase is Phase.RUNNING
    assert [line.step for line in world.records("checkpoint.abandoned")] == [20]
    assert world.state.kept[0].ref.step == 30  # space is back: saving has resumed


def test_a_commit_that_fails_does_not_count(make_world):
    world = make_world(world={"silent": {c.Commit}}).run_to_step(10).run_for(0.5)
    world.send(e.CommitFailed(world.now, CheckpointRef(10, 1), "shared", "bucket away"))
    assert world.records("checkpoint.failed")[0].data["last_good_step"] is None
    assert not world.state.kept
    world.send(e.CommitFailed(world.now, CheckpointRef(10, 1), "nvme", "bucket away"))
    assert not world.state.saves.outstanding()


def test_an_answer_after_the_next_fence_is_still_the_truth(make_world):
    world = make_world(world={"silent": {c.Commit}}).run_to_step(10).run_for(0.5)
    world.kill(2).run_for(11)
    assert world.state.generation == 2
    for _ in range(2):
        world.send(e.Committed(world.now, CheckpointRef(10, 1), "nvme", 7))
    assert [line.step for line in world.records("checkpoint.committed")] == [10]


def test_an_unknown_commit_is_not_believed(make_world):
    world = make_world().run_to_step(3)
    assert world.send(e.Committed(world.now, CheckpointRef(2, 1), "nvme", 7)) == ()
    assert not world.state.kept


def test_explicit_cadence_is_left_to_the_ranks(make_world):
    assert not make_world(checkpoint_every=10).run_to_step(50).made(c.PostCheckpoint)


def test_automatic_cadence_measures_first_then_keeps_to_the_overhead(make_world):
    world = make_world(checkpoint_every=None, overhead=0.0001, world={"total": 400}).run_to_step(100)
    steps = [command.step for command in world.made(c.PostCheckpoint)]
    assert steps[0] <= 12  # early, to have something to measure
    gaps = {later - earlier for earlier, later in pairwise(steps)}
    # stall 1 ms at 1/10,000: every 10 s, i.e. every 20 steps
    assert gaps <= {20, 21, 22}
    assert world.state.kept[0].ref.step >= 80


def test_automatic_cadence_never_outruns_the_drain(make_world):
    world = make_world(checkpoint_every=None, world={"total": 400, "save_s": 4.0}).run_to_step(150)
    steps = [command.step for command in world.made(c.PostCheckpoint)]
    assert len(steps) > 3
    assert min(later - earlier for earlier, later in pairwise(steps)) >= 16


def test_a_missed_checkpoint_is_asked_for_again_farther_ahead(make_world):
    world = make_world(checkpoint_every=None).run_to_step(8).mark()
    world.until(lambda: world.made(c.PostCheckpoint))
    (first,) = world.made(c.PostCheckpoint)
    for rank in range(4):
        world.send(e.CheckpointMissed(world.now, world.running, rank, first.step, first.step + 5))
    first, second = world.made(c.PostCheckpoint)
    assert second.step - (first.step + 5) in (6, 8)  # margin (1 s / 0.5 s + 1), doubled


def test_a_finished_run_waits_for_its_last_checkpoint(make_world):
    world = make_world(checkpoint_every=7, world={"save_s": 5.0}).run_to(Phase.DONE)
    assert world.outcome.result is Result.FINISHED
    assert "did not reach" not in world.outcome.reason
    assert world.state.kept[0].ref.step == 100
    assert "shared" in world.state.kept[0].tiers


def test_but_not_for_ever(make_world):
    world = make_world(checkpoint_every=7, stop_deadline_s=20).run_to_step(95)
    world.drop = lambda event: getattr(event, "tier", "") == "shared"
    world.run_to(Phase.DONE, limit=30)
    assert world.outcome.result is Result.FINISHED
    assert "did not reach the shared tier" in world.outcome.reason


@pytest.mark.parametrize("tier", ["memory", "shared"])
def test_a_run_whose_last_checkpoint_failed_has_not_finished(make_world, tier):
    """Skipped by a rank, or refused by the only tier: no finish record, so the next launch goes on."""
    world = make_world(world={"nvme": False}).run_to_step(95)
    world.drop = lambda event: isinstance(event, e.Persisted) and event.step == 100
    world.run_to_step(100)
    world.send(e.SaveFailed(world.now, 1, 2, 100, tier, "no space left"))
    world.run_to(Phase.DONE, limit=10)
    assert world.outcome.result is Result.UNAVAILABLE
    assert "no space left" in world.outcome.reason
    assert "launch again" in world.outcome.reason
    assert world.state.kept[0].ref.step == 90


def test_a_last_checkpoint_of_which_nothing_is_heard_is_not_saved_either(make_world):
    world = make_world(stop_deadline_s=20).run_to_step(95)
    world.drop = lambda event: isinstance(event, e.Persisted)
    world.run_to_step(100).run_for(15)
    assert world.outcome is None
    world.run_to(Phase.DONE, limit=20)
    assert world.outcome.result is Result.UNAVAILABLE


def test_a_last_checkpoint_on_the_nodes_counts_where_the_shared_tier_refused(make_world):
    world = make_world().run_to_step(95)
    world.drop = lambda event: isinstance(event, e.Persisted) and event.tier == "shared" and event.step == 100
    world.run_to_step(100)
    world.until(lambda: any(kept.ref.step == 100 for kept in world.state.kept))
    world.send(e.SaveFailed(world.now, 1, 0, 100, "shared", "bucket away"))
    world.run_to(Phase.DONE, limit=5)
    assert world.outcome.result is Result.FINISHED
    assert "did not reach the shared tier" in world.outcome.reason


def test_saves_given_up_are_told_seldom(make_world):
    world = make_world(workers=2).run_to_step(5)
    count = saves.most(2) + 40
    for step in range(100, 100 + count):
        world.send(e.Sealed(world.now, 1, 0, step, 0.1, 100))
    told = [line for line in world.records("warning.raised") if "given up" in line.data["message"]]
    assert 1 <= len(told) <= 7
    assert len(world.state.saves.steps) == saves.most(2)


def test_a_run_that_never_saves_finishes(make_world):
    world = make_world()
    world.drop = lambda event: isinstance(event, (e.Sealed, e.Persisted))
    world.run_to(Phase.DONE)
    assert world.outcome.result is Result.FINISHED
    assert "shared" not in world.outcome.reason


def test_a_loop_left_early_finishes_with_the_checkpoints_before(make_world):
    """``break``: no save is tried at its end; and one that only some ranks could reach is no last one."""
    world = make_world().run_to_step(95)
    world.drop = lambda event: isinstance(event, (e.Sealed, e.Persisted)) and event.step == 100
    world.send(e.Sealed(world.now, 1, 0, 105, 0.1, 100))
    world.run_to(Phase.DONE, limit=10)
    assert world.outcome.result is Result.FINISHED
    assert world.state.kept[0].ref.step == 90


def test_a_node_lost_with_the_last_bytes_is_recovered_from(make_world):
    world = make_world(world={"save_s": 5.0}).run_to_step(100).run_for(1)
    assert world.state.ending_at is not None
    world.lose(world.card_of(0).node).run_to(Phase.DONE)
    assert world.outcome.result is Result.FINISHED
    assert len(world.records("generation.started")) == 2
    assert world.state.kept[0].ref == CheckpointRef(100, 2)


def test_a_node_lost_after_the_last_bytes_are_safe_is_no_failure(make_world):
    world = make_world().run_to_step(100).run_for(0.5)
    world.lose(world.card_of(0).node).run_to(Phase.DONE)
    assert world.outcome.result is Result.FINISHED
    assert not world.records("incident.detected")
