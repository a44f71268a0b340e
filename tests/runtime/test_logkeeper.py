"""The supervisor's hand on the commit log: order of durability, fencing, retiring, sweeping."""

import queue
from dataclasses import replace

import numpy as np
import pytest

from resilience.checkpoint.pack import persist
from resilience.checkpoint.part import directory, draft
from resilience.checkpoint.plan import plan
from resilience.checkpoint.snapshot import specs_of
from resilience.checkpoint.tree import flatten
from resilience.control import commands as c
from resilience.control import events as e
from resilience.control.types import CheckpointRef
from resilience.journal.events import read_events
from resilience.journal.log import CommitLog
from resilience.journal.records import Kind
from resilience.runtime.chronicle import Chronicle
from resilience.runtime.logkeeper import LogKeeper
from storage_backends import open_storage
from storage_backends.faults import Fault, FaultStorage
from storage_backends.recycle import recycle


class Watched(FaultStorage):
    """Remembers the order in which names came to be."""

    def __init__(self, inner):
        super().__init__(inner)
        self.made = []

    def create(self, name, data):
        answer = super().create(name, data)
        self.made.append(name)
        return answer

    def sink(self, name, size=None):
        self.made.append(name)
        return super().sink(name, size)


class Keeper:
    """A log keeper with all that it says."""

    def __init__(self, storage, **options):
        self.storage = storage
        self.broken = []
        self.reached = []
        self.node_orders = []
        self.answers = queue.SimpleQueue()
        self.chronicle = Chronicle(
            storage, run="r", source=f"supervisor-{id(self):x}", broken=self.broken.append
        )
        self.log = LogKeeper(
            storage,
            self.chronicle,
            run="r",
            describe={"supervisor": "host/1"},
            answer=self.answers.put,
            reach=lambda point, **at: self.reached.append(point),
            nodes=self.node_orders.append,
            broken=self.broken.append,
            **options,
        )

    def ask(self, command):
        self.log.perform(command)
        return self.answers.get(timeout=60)

    def fence(self, generation=1):
        return self.ask(c.Fence(generation))

    def finish(self, steps=10, value=None):
        """The run has finished; returns when the log's thread has ended."""
        self.log.value = value
        assert isinstance(self.ask(c.RecordFinish(steps)), e.FinishRecorded)
        self.log.close()

    def close(self):
        self.log.close()
        self.chronicle.close()
        assert self.broken == []

    def told(self, type_):
        self.chronicle.flush()
        return [event for event in read_events(self.storage) if event.type == type_]


@pytest.fixture
def storage(request):
    return Watched(open_storage(f"memory://logkeeper/{request.node.name}", retry=False))


@pytest.fixture
def make(storage):
    made = []

    def make(**options):
        made.append(Keeper(storage, **options))
        return made[-1]

    yield make
    for keeper in made:
        keeper.close()


@pytest.fixture
def keeper(make):
    return make()


def save(storage, step, generation=1, value=1.0):
    """Pack and part of a world of one; returns the command that commits them."""
    state = {"w": np.full(100, value)}
    arrays, skeleton = flatten(state, prefix="")
    layout = plan(specs_of(arrays, state), rank=0, world_size=1)
    view = memoryview(bytearray(layout.size))
    part = draft(layout, skeleton, run="r", step=step, generation=generation)
    result = persist(view, part, storage, directory(step, generation))
    parts = ((0, "node-0", result.part_name, result.sha256),)
    return c.Commit(CheckpointRef(step, generation), "shared", parts, result.size)


def records(storage):
    return CommitLog(storage, new_id=lambda: "reader").refresh()


def test_a_fence_is_won_and_answered_with_what_can_be_restored(keeper, storage):
    answer = keeper.fence(3)
    assert isinstance(answer, e.Fenced)
    assert (answer.generation, answer.candidates, answer.finished) == (3, (), False)
    assert answer.slot == records(storage)[-1].slot
    assert keeper.reached == ["fence.done"]
    keeper.ask(save(storage, 10, 3))
    again = keeper.fence(4)
    assert [(found.ref.step, found.tier) for found in again.candidates] == [(10, "shared")]


def test_what_the_record_refers_to_is_there_before_the_record(keeper, storage):
    keeper.fence()
    commit = save(storage, 10)
    storage.made.clear()
    answer = keeper.ask(commit)
    assert isinstance(answer, e.Committed)
    assert (answer.ref, answer.tier) == (commit.ref, "shared")
    assert len(storage.made) == 3
    assert sorted(storage.made[:2]) == [f"checkpoints/step-10-g1/{name}.json" for name in ("refs", "zarr")]
    assert storage.made[2].startswith("log/")
    record = records(storage)[-1]
    assert record.kind is Kind.CHECKPOINT
    assert (record.body["step"], record.body["size"], record.body["world_size"]) == (10, commit.size, 1)
    assert keeper.reached == ["fence.done", "commit.before", "commit.done"]


def test_a_checkpoint_of_the_near_tier_has_no_zarr_metadata(keeper, storage):
    keeper.fence()
    commit = save(storage, 10)
    storage.made.clear()
    keeper.ask(replace(commit, tier="nvme"))
    assert [name.split("/")[0] for name in storage.made] == ["log"]


def test_a_newer_generation_fences_us_and_nothing_is_written(make, storage):
    old, new = make(), make()
    old.fence(1)
    assert new.fence(2).generation == 2
    answer = old.ask(save(storage, 10, 1))
    assert isinstance(answer, e.FenceLost)
    assert answer.newer
    assert [record.kind for record in records(storage)] == [Kind.FENCE, Kind.FENCE]
    old.log.perform(c.Retire((CheckpointRef(5, 1),)))
    assert isinstance(old.answers.get(timeout=60), e.FenceLost)


def test_storage_that_is_away_fails_the_commit_and_a_later_one_works(keeper, storage):
    keeper.fence()
    commit = save(storage, 10)
    storage.add(Fault("unavailable", "create", name="log/*", count=None))
    failed = keeper.ask(commit)
    assert isinstance(failed, e.CommitFailed)
    assert (failed.ref, failed.tier) == (commit.ref, "shared")
    assert "unavailable" in failed.error
    storage.heal()
    assert isinstance(keeper.ask(save(storage, 20)), e.Committed)


def test_a_part_that_is_gone_fails_the_commit(keeper, storage):
    keeper.fence()
    commit = save(storage, 10)
    storage.delete(commit.parts[0][2])
    assert isinstance(keeper.ask(commit), e.CommitFailed)
    assert [record.kind for record in records(storage)] == [Kind.FENCE]


def test_storage_that_is_away_at_the_fence_is_told_apart_from_a_newer_generation(keeper, storage):
    storage.add(Fault("unavailable", "*", count=None))
    answer = keeper.fence()
    storage.heal()
    assert isinstance(answer, e.FenceLost)
    assert not answer.newer


def test_retired_bytes_go_after_the_grace_period_and_not_before(make, storage, monkeypatch):
    keeper = make()
    keeper.fence()
    commits = [save(storage, step) for step in (10, 20)]
    for commit in commits:
        keeper.ask(commit)
    keeper.log.perform(c.Retire((commits[0].ref,)))
    keeper.ask(save(storage, 30))  # orders are carried out in order
    assert storage.list("checkpoints/step-10-g1") != []
    monkeypatch.setattr("resilience.runtime.logkeeper._GRACE_S", 0.0)
    keeper.log._retired[0] = (0.0, commits[0].ref)  # as if its time had come
    keeper.log.perform(c.Retire((commits[1].ref,)))
    keeper.ask(save(storage, 40))
    assert storage.list("checkpoints/step-20-g1") == []
    deleted = keeper.told("checkpoint.deleted")
    assert sorted((event.step, event.data["tier"]) for event in deleted) == [(10, "shared"), (20, "shared")]
    assert {"t": "delete", "step": 20, "generation": 1} in keeper.node_orders


def test_a_finished_run_removes_what_is_retired_at_its_end(make, storage):
    keeper = make()
    keeper.fence()
    commit = save(storage, 10)
    keeper.ask(commit)
    keeper.log.perform(c.Retire((commit.ref,)))
    keeper.finish(10, '"done"')
    assert storage.list("checkpoints/step-10-g1") == []
    finish = records(storage)[-1]
    assert finish.kind is Kind.FINISH
    assert (finish.body["step"], finish.body["value"], finish.body["result"]) == (10, '"done"', "finished")


def test_at_the_end_no_space_is_kept_for_packs_to_come(tmp_path):
    root = open_storage(str(tmp_path))
    with root.sink("checkpoints/step-1-g1/rank-0.pack", 2 << 20) as sink:
        sink.write(bytes(2 << 20))
    recycle(root, "checkpoints/step-1-g1/rank-0.pack")
    assert (tmp_path / ".recycled~").is_dir()
    keeper = Keeper(root)
    keeper.log.close()
    assert not (tmp_path / ".recycled~").exists()
    assert keeper.node_orders[-1] == {"t": "trim"}
    keeper.close()


def test_the_end_is_recorded_once_and_may_be_asked_for_again(make, storage):
    keeper = make()
    keeper.fence()
    storage.add(Fault("unavailable", "create", name="log/*", count=None))
    failed = keeper.ask(c.RecordFinish(10))
    assert isinstance(failed, e.FinishFailed)
    assert "unavailable" in failed.error
    storage.heal()
    assert isinstance(keeper.ask(c.RecordFinish(10)), e.FinishRecorded)
    assert isinstance(keeper.ask(c.RecordFinish(99)), e.FinishRecorded)
    finishes = [record for record in records(storage) if record.kind is Kind.FINISH]
    assert [record.body["step"] for record in finishes] == [10]
    newer = make()
    assert newer.fence(2).finished
    assert isinstance(newer.ask(c.RecordFinish(50)), e.FinishRecorded)  # what that record says stays
    assert len([record for record in records(storage) if record.kind is Kind.FINISH]) == 1


def test_a_fenced_supervisor_cannot_record_an_end(make, storage):
    old, new = make(), make()
    old.fence(1)
    new.fence(2)
    answer = old.ask(c.RecordFinish(10))
    assert isinstance(answer, e.FenceLost)
    assert answer.newer


def test_what_a_predecessor_left_is_removed_when_the_run_ends(make, storage):
    """Retired and not removed, or never committed: both are found in the directory, not in any memory."""
    old = make()
    old.fence(1)
    retired, kept = save(storage, 10), save(storage, 20)
    old.ask(retired)
    old.ask(kept)
    save(storage, 25)  # durable, and never committed
    old.log.perform(c.Retire((retired.ref,)))
    old.log.close()  # not finished: the grace period of what it retired is not over
    assert storage.list("checkpoints/step-10-g1") != []
    new = make()
    new.fence(2)
    new.ask(save(storage, 30, 2))
    save(storage, 35, 2)  # of this generation: may still be committed
    new.finish()
    left = {name.strip("/").split("/")[-1] for name in storage.list("checkpoints")}
    assert left == {"step-20-g1", "step-30-g2", "step-35-g2"}
    assert {"t": "sweep", "kept": ["step-30-g2", "step-20-g1"], "below": 2} in new.node_orders


def test_the_bytes_of_a_save_given_up_go_unless_it_was_committed_after_all(make, storage):
    keeper = make()
    keeper.fence()
    given_up, late = save(storage, 10), save(storage, 20)
    keeper.log.discard(given_up.ref)
    keeper.log.discard(late.ref)
    keeper.ask(late)
    assert storage.list("checkpoints/step-10-g1") != []  # the grace period
    keeper.finish()
    left = {name.strip("/").split("/")[-1] for name in storage.list("checkpoints")}
    assert left == {"step-20-g1"}


def test_bytes_that_cannot_be_removed_are_a_warning(make, storage, monkeypatch):
    monkeypatch.setattr("resilience.runtime.logkeeper._GRACE_S", 0.0)
    keeper = make()
    keeper.fence()
    commit = save(storage, 10)
    keeper.ask(commit)
    storage.add(Fault("unavailable", "delete_all", count=None))
    keeper.log.perform(c.Retire((commit.ref,)))
    keeper.ask(save(storage, 20))
    assert any(
        "could not delete step-10-g1" in event.data["message"] for event in keeper.told("warning.raised")
    )


def test_without_a_near_tier_what_lies_only_there_is_set_aside_and_said(make, storage):
    first = make()
    first.fence(1)
    shared = save(storage, 10)
    first.ask(shared)
    near = save(storage, 20)
    first.ask(replace(near, tier="nvme"))
    second = make(near=False)
    answer = second.fence(2)
    assert [(found.ref.step, found.tier) for found in answer.candidates] == [(10, "shared")]
    assert [(found.ref.step, found.tier) for found in answer.unusable] == [(20, "nvme")]
    assert "give nvme=" in second.told("warning.raised")[0].data["message"]


def test_quarantined_is_recorded_and_not_offered_again(keeper, storage):
    keeper.fence()
    commit = save(storage, 10)
    keeper.ask(commit)
    keeper.log.perform(c.Quarantine(commit.ref, "shared", "loss jumped"))
    answer = keeper.fence(2)
    assert answer.candidates == ()
    assert [found.ref for found in answer.unusable] == [commit.ref]


def test_a_bug_of_ours_is_told_with_its_traceback(storage):
    keeper = Keeper(storage)
    keeper.log.perform(c.OpenStore(1, "n"))  # not an order for the log
    keeper.log._thread.join(10)
    assert "_openstore" in keeper.broken[0]
    keeper.chronicle.close()
