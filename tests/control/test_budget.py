"""Counting failures; scenarios are in test_recovery."""

from __future__ import annotations

from resilience.control.budget import charge
from resilience.control.state import Failures
from resilience.control.types import Assignment, Card, Incident, Policy

TABLE = tuple(Assignment(r, Card("n", r), r) for r in range(4))
POLICY = Policy(workers=4, max_restarts=2)


def fail(failures, step, kind="signal", rank=1, confidence=1.0):
    incident = Incident("1-1", kind, "cause", 1, rank=rank, confidence=confidence)
    return charge(failures, incident, step, TABLE, POLICY)


def test_failures_without_progress_add_up():
    failures = Failures()
    for count in (1, 2, 3):
        failures, _ = fail(failures, 43)
        assert failures.count == count
    failures, _ = fail(failures, 40)  # restored from an older checkpoint: behind is no progress
    assert failures.count == 4
    assert len(failures.story) == POLICY.max_restarts + 1


def test_a_step_beyond_refills():
    failures, _ = fail(Failures(), 43)
    failures, _ = fail(failures, 44)
    assert failures.count == 1


def test_a_committed_checkpoint_refills():
    failures, _ = fail(Failures(), 43)
    failures, _ = fail(Failures(**{**failures.__dict__, "committed": True}), 43)
    assert failures.count == 1
    assert not failures.committed


def test_restores_and_user_errors_are_not_counted():
    for kind in ("restore", "user"):
        assert fail(Failures(), 43, kind=kind)[0].count == 0


def test_the_same_card_twice_in_a_row():
    failures, avoid = fail(Failures(), 43)
    assert not avoid
    assert fail(failures, 43)[1] == {Card("n", 1)}
    other, avoid = fail(failures, 43, rank=2)
    assert not avoid
    assert not fail(other, 43, rank=1)[1]  # not in a row


def test_no_card_is_avoided_on_a_guess():
    failures, _ = fail(Failures(), 43, confidence=0.0)
    assert not fail(failures, 43, confidence=0.0)[1]
