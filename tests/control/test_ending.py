"""The end of a run: it has finished when the log says so, and in no other case is that reported."""

from __future__ import annotations

import pytest

from resilience.control import commands as c
from resilience.control import events as e
from resilience.control.types import Phase, Result


@pytest.fixture
def ending(make_world):
    """A world whose ranks have returned and whose finish record is asked for, not answered."""
    world = make_world(world={"silent": {c.RecordFinish}})
    return world.until(lambda: world.made(c.RecordFinish))


def test_finished_is_said_after_the_record_and_not_before(ending):
    assert ending.made(c.RecordFinish) == [c.RecordFinish(100)]
    ending.run_for(100)
    assert ending.outcome is None
    assert not ending.records("run.finished")
    assert not ending.made(c.Finish)
    ending._finished(100)
    assert ending.outcome.result is Result.FINISHED
    assert ending.records("run.finished")
    (end,) = ending.made(c.Finish)
    assert end.outcome == ending.outcome


def test_another_supervisor_found_at_the_end_is_told(ending):
    ending.send(e.FenceLost(ending.now, "slot 9 is theirs"))
    assert ending.outcome.result is Result.FENCED
    assert ending.records("run.finished")[0].data["result"] == "fenced"


def test_a_record_that_fails_is_tried_again(ending):
    ending.send(e.FinishFailed(ending.now, "bucket away"))
    ending.send(e.FinishFailed(ending.now, "bucket away"))  # said twice
    assert ending.outcome is None
    ending.silent.clear()
    ending.run_for(3)
    assert len(ending.made(c.RecordFinish)) == 2
    assert ending.outcome.result is Result.FINISHED


@pytest.mark.parametrize("lost", [False, True])
def test_but_not_for_ever(ending, lost):
    for _ in range(3):
        assert ending.outcome is None
        away = e.FenceLost(ending.now, "bucket away", newer=False)
        ending.send(away if lost else e.FinishFailed(ending.now, "bucket away"))
        ending.run_for(5)
    assert len(ending.made(c.RecordFinish)) == 3
    assert ending.outcome.result is Result.UNAVAILABLE
    assert "bucket away" in ending.outcome.reason
    assert "launch again" in ending.outcome.reason


def test_who_asks_for_the_end_does_not_wait_for_another_try(ending):
    ending.stop().run_for(1)
    assert ending.outcome is None
    ending.send(e.FinishFailed(ending.now, "bucket away"))
    assert ending.outcome.result is Result.UNAVAILABLE


def test_a_stop_asked_for_while_the_record_is_written_does_not_undo_it(ending):
    ending.stop().run_for(1)
    ending._finished(100)
    assert ending.outcome.result is Result.FINISHED


def test_nothing_is_started_again_while_the_record_is_written(ending):
    started = len(ending.made(c.StartRanks))
    ending.fault(ending.card_of(3))
    ending.lose(ending.card_of(0).node).run_for(30)
    assert not ending.records("incident.detected")
    assert len(ending.made(c.StartRanks)) == started
    assert len(ending.made(c.Fence)) == 1
    ending._finished(100)
    assert ending.outcome.result is Result.FINISHED


def test_an_answer_nobody_asked_for_changes_nothing(make_world):
    world = make_world().run_to_step(23)
    before = world.state
    assert world.send(e.FinishRecorded(world.now)) == ()
    assert world.send(e.FinishFailed(world.now, "x")) == ()
    assert world.state.phase is before.phase is Phase.RUNNING
