"""Watching a probe that may hang, fail, or not be there, without being held up."""

from __future__ import annotations

import itertools
import queue
import threading

import pytest

from resilience.cards.health import CardFault
from resilience.cards.watch import ANSWER_S, QUIET_S, HealthWatch
from resilience.errors import UnavailableError

FAULT = CardFault(0, "79")


class Probe:
    """Answers with what the test puts into ``answers``; waits for it, as a driver does that hangs."""

    def __init__(self):
        self.answers = queue.Queue()
        self.asked = threading.Semaphore(0)
        self.missing = []

    def poll(self):
        self.asked.release()
        answer = self.answers.get(timeout=30)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def gaps(self):
        return self.missing


class Watched:
    def __init__(self, open_probe):
        self.now = 0.0
        self.faults, self.warnings = queue.Queue(), queue.Queue()
        self.watch = HealthWatch(
            open_probe, self.faults.put, self.warnings.put, clock=lambda: self.now, poll_s=0.001
        )
        self.watch.start()


@pytest.fixture
def probe():
    return Probe()


@pytest.fixture
def watched(probe):
    made = Watched(lambda: probe)
    yield made
    made.watch.close()
    probe.answers.put([])
    made.watch._thread.join(10)
    assert not made.watch._thread.is_alive()


def test_faults_arrive(watched, probe):
    probe.answers.put([FAULT])
    assert watched.faults.get(timeout=10) == FAULT


def test_a_probe_that_does_not_answer_is_told_once_and_when_it_answers_again(watched, probe):
    probe.asked.acquire(timeout=10)
    watched.watch.check()
    assert watched.warnings.empty()
    watched.now += ANSWER_S + 1
    watched.watch.check()
    watched.watch.check()
    assert "not answered" in watched.warnings.get_nowait()
    assert watched.warnings.empty()
    probe.answers.put([])
    probe.asked.acquire(timeout=10)  # it has answered, and is asked again
    watched.watch.check()
    assert "answers again" in watched.warnings.get_nowait()
    assert watched.faults.empty()


def test_a_library_that_is_not_there_is_told_once_and_looked_for_again():
    tries = threading.Semaphore(0)

    def missing():
        tries.release()
        raise UnavailableError("no library", operation="card health", hint="install it")

    watched = Watched(missing)
    for _ in range(3):
        assert tries.acquire(timeout=10)
        watched.watch.look()
    assert tries.acquire(timeout=10)
    watched.watch.close()
    watched.watch._thread.join(10)
    assert "no library" in watched.warnings.get_nowait()
    assert watched.warnings.empty()


def test_a_driver_that_fails_is_told_once_and_asked_on(watched, probe):
    for _ in range(3):
        probe.answers.put(UnavailableError("driver away", operation="card health", hint="wait"))
    probe.answers.put(ValueError("nonsense"))
    probe.answers.put([FAULT])
    assert watched.faults.get(timeout=10) == FAULT
    assert "driver away" in watched.warnings.get_nowait()
    assert "ValueError: nonsense" in watched.warnings.get_nowait()
    assert watched.warnings.empty()


def test_gaps_are_told_once(watched, probe):
    probe.missing = ["ECC errors cannot be read"]
    for _ in range(3):
        probe.answers.put([])
    probe.answers.put([FAULT])
    watched.faults.get(timeout=10)
    assert "ECC errors" in watched.warnings.get(timeout=10)
    for _ in range(3):
        probe.asked.acquire(timeout=10)
    assert watched.warnings.empty()


def test_a_card_that_says_the_same_for_ever_is_heard_ever_more_seldom(watched, probe):
    probe.asked.acquire(timeout=10)
    heard = []
    for second in range(400):
        watched.now = 1000.0 + second
        probe.answers.put([FAULT, CardFault(1, "79")] if second == 0 else [FAULT])
        assert probe.asked.acquire(timeout=10)
        while not watched.faults.empty():
            heard.append((second, watched.faults.get().index))
    assert (0, 1) in heard
    ours = [second for second, index in heard if index == 0]
    assert ours[:2] == [0, 1], "at first every time"
    assert len(ours) < 60
    assert max(b - a for a, b in itertools.pairwise(ours)) <= QUIET_S + 1


def test_nothing_to_watch_ends_the_thread():
    watched = Watched(lambda: None)
    watched.watch._thread.join(10)
    assert not watched.watch._thread.is_alive()


def test_looking_polls_at_once(probe):
    slow = HealthWatch(lambda: probe, lambda fault: None, lambda text: None, poll_s=3600)
    slow.start()
    for _ in range(3):
        assert probe.asked.acquire(timeout=10)
        probe.answers.put([])
        slow.look()
    slow.close()
    probe.answers.put([])
