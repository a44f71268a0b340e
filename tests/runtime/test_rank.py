"""A supervised rank's host, over a real channel and a real page; the test is its agent."""

import gc
import json
import os
import threading

import numpy as np
import pytest

from resilience.checkpoint.arena import Arena, SlotKind
from resilience.checkpoint.memory import Available
from resilience.checkpoint.pack import persist
from resilience.checkpoint.part import Part, directory
from resilience.errors import InvalidError
from resilience.runtime.page import Page
from resilience.runtime.rank import RankHost, _RestoreFailed
from resilience.runtime.wire import Channel
from storage_backends import open_storage

MESSAGE = {
    "rank": 0,
    "world_size": 1,
    "local_rank": 0,
    "run": "r",
    "generation": 1,
    "checkpoint_every": None,
    "restore": None,
    "failpoints": [],
}


class Agent:
    def __init__(self, **message):
        self.page = Page.create()
        self.channel, theirs = Channel.pair()
        self.theirs = theirs
        self.rank_page = Page(os.dup(self.page.fd))
        self.host = RankHost({**MESSAGE, **message}, self.rank_page, theirs)
        self.arenas = []
        self.value = 1.0
        self.size = 10

    def heard(self, kind=None):
        """What the rank said since the last call."""
        got = []
        while batch := self.channel.take():
            for message, fds in batch:
                self.arenas += [Arena.attach(fd) for fd in fds]
                got.append(message)
        return [message for message in got if kind in (None, message["t"])]

    def capture(self):
        return {"state": {"w": np.full(self.size, self.value), "note": "x"}}

    def save(self, done):
        self.host.save(done, self.capture, {"state": {}})

    def steps(self, first, last, total=1000):
        """Make steps as ``Run`` does; returns those at which it was told to save."""
        saved = []
        for done in range(first, last + 1):
            self.host.begin(done - 1)
            if self.host.end(done, total):
                self.save(done)
                saved.append(done)
            assert self.host.stop_point(done) is False
        return saved

    def close(self):
        for arena in self.arenas:
            arena.close()
        self.host._snapshots.close()
        for closable in (self.channel, self.theirs, self.page, self.rank_page):
            closable.close()


@pytest.fixture
def make():
    gc.collect()  # what tests before this one left in cycles
    before = len(os.listdir("/proc/self/fd"))
    made = []

    def make(**message):
        made.append(Agent(**message))
        return made[-1]

    yield make
    for agent in made:
        agent.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def agent(make):
    return make()


# Restoring.


def test_from_scratch_there_is_nothing_and_it_is_said_once(agent):
    assert agent.host.restored() is None
    assert agent.host.restored() is None
    assert agent.heard() == [{"t": "restored", "step": 0, "tier": None, "seconds": 0.0}]
    assert agent.page.section == "start"


@pytest.fixture
def saved(make, tmp_path):
    """The ``restore`` of a start order, for a checkpoint of step 5 on disk."""
    first = make()
    first.value = 42.0
    first.save(5)
    [seal] = first.heard("sealed")
    part = Part.from_json(seal["part"])
    with first.arenas[0].view(seal["slot"]) as view:
        result = persist(view, part, open_storage(str(tmp_path)), directory(5, 1))
    part = {"rank": 0, "storage": str(tmp_path), "part": result.part_name, "sha256": result.sha256}
    return {"step": 5, "generation": 1, "tier": "shared", "parts": [part]}


def test_what_was_saved_is_restored_and_not_saved_again_at_that_step(make, saved):
    agent = make(restore=saved, generation=2)
    restored = agent.host.restored()
    assert agent.host.restored() is restored
    assert (restored.step, list(restored.names)) == (5, ["state"])
    state = {"w": np.zeros(10), "note": ""}
    weights = state["w"]
    assert restored.into({"state": state}) == {"state": state}
    assert (weights.tolist(), state["note"]) == ([42.0] * 10, "x")
    assert agent.heard() == []
    agent.host.ready()
    agent.host.ready()
    [told] = agent.heard()
    assert (told["t"], told["step"], told["tier"], told["seconds"] > 0) == ("restored", 5, "shared", True)
    assert (agent.page.step, agent.page.section) == (5, "start")
    agent.save(5)
    assert agent.heard() == []


def test_a_function_without_a_loop_has_restored_too(make, saved):
    agent = make(restore=saved)
    agent.host.restored()
    agent.host.finish()
    assert [message["t"] for message in agent.heard()] == ["restored", "finished"]


def test_a_damaged_checkpoint_is_told_apart_from_the_users_errors(make, saved, tmp_path):
    pack = tmp_path / "checkpoints" / "step-5-g1" / "rank-0.pack"
    data = bytearray(pack.read_bytes())
    data[3] ^= 1
    pack.write_bytes(data)
    restored = make(restore=saved).host.restored()
    with pytest.raises(_RestoreFailed, match=r"rank-0\.pack.*partly overwritten") as raised:
        restored.into({"state": {"w": np.zeros(10), "note": ""}})
    assert not isinstance(raised.value, Exception), "it passes through the handlers of careless users"
    assert type(raised.value.__cause__).__name__ == "CorruptError"


def test_a_checkpoint_that_is_not_there_fails_before_the_users_code(make, saved, tmp_path):
    (tmp_path / "checkpoints" / "step-5-g1" / "rank-0.json").unlink()
    with pytest.raises(_RestoreFailed, match="is missing"):
        make(restore=saved).host.restored()


# Steps.


def test_steps_beat_on_the_page_and_the_first_one_is_said_at_once(agent):
    agent.steps(1, 3)
    assert (agent.page.step, agent.page.age_s < 60) == (3, True)
    assert agent.heard("stepped") == [{"t": "stepped", "step": 1, "total": 1000}]


def test_a_fixed_cadence_saves_at_its_multiples_and_at_the_end(make):
    agent = make(checkpoint_every=6)
    assert agent.steps(1, 10, total=10) == [6, 10]
    again = make(checkpoint_every=5)
    assert again.steps(1, 10, total=10) == [5, 10]  # the end once, not twice


def test_a_posted_step_is_saved_when_it_comes(agent):
    agent.page.checkpoint_at = 3
    assert agent.steps(1, 5) == [3]
    agent.page.checkpoint_at = 7
    assert agent.steps(6, 8) == [7]
    assert agent.heard("missed") == []


def test_a_posted_step_that_had_passed_is_said_once(agent):
    agent.steps(1, 5)
    agent.page.checkpoint_at = 3
    assert agent.steps(6, 9) == []
    assert agent.heard("missed") == [{"t": "missed", "wanted": 3, "step": 6}]


def test_a_posted_step_that_a_later_save_makes_up_for_is_not_missed(agent):
    agent.steps(1, 5)
    agent.save(5)
    agent.page.checkpoint_at = 3
    agent.steps(6, 7)
    assert agent.heard("missed") == []


# Stopping.


def stop_in_thread(agent, done):
    answer = []
    thread = threading.Thread(target=lambda: answer.append(agent.host.stop_point(done)), daemon=True)
    thread.start()
    message, _ = agent.channel.receive()
    assert message == {"t": "parked", "step": done}
    while agent.page.section != "stopping":
        os.sched_yield()
    return thread, answer


def test_a_rank_parks_at_the_stop_and_leaves_when_it_is_released(agent):
    agent.page.stop_at = 4
    agent.steps(1, 3)
    agent.heard()
    agent.host.end(4, 1000)
    thread, answer = stop_in_thread(agent, 4)
    agent.page.release_at = 4
    thread.join(10)
    assert answer == [True]


def test_a_parked_rank_goes_on_to_a_later_stop(agent):
    agent.page.stop_at = 1
    thread, answer = stop_in_thread(agent, 1)
    agent.page.stop_at = 6
    thread.join(10)
    assert answer == [False]
    assert agent.page.section == "step"


def test_a_stop_that_had_passed_is_said_even_if_a_later_step_was_saved(agent):
    """The supervisor waits for all ranks to park there: a save does not make up for that."""
    agent.steps(1, 5)
    agent.save(5)
    agent.heard()
    agent.page.stop_at = 3
    agent.steps(6, 8)
    assert agent.heard("missed") == [{"t": "missed", "wanted": 3, "step": 6}]


# Saving.


def test_a_save_hands_over_the_arena_then_the_seal(agent):
    agent.host.log(1, {"loss": 0.5})
    agent.host.enter("step")
    agent.save(7)
    told = agent.heard()
    assert [message["t"] for message in told] == ["log", "arena", "sealed"]  # what was logged goes first
    seal = told[-1]
    assert (seal["step"], seal["arena"], seal["size"]) == (7, 1, agent.arenas[0].slot_bytes)
    state = agent.arenas[0].state(seal["slot"])
    assert (state.kind, state.step, state.generation) == (SlotKind.SEALED, 7, 1)
    part = Part.from_json(seal["part"])
    assert (part.run, part.step, part.rank) == ("r", 7, 0)
    assert agent.page.section == "step"
    assert 0 < agent.page.stalled_s == pytest.approx(seal["stall_s"], abs=1e-6)


def test_the_same_step_is_never_saved_twice_under_one_name(agent):
    agent.save(7)
    agent.value = 2.0
    agent.save(7)
    assert [message["step"] for message in agent.heard("sealed")] == [7]


def test_state_that_grew_gets_a_larger_arena(agent):
    agent.save(1)
    agent.size = 10_000
    agent.save(2)
    told = agent.heard()
    assert [(m["t"], m["arena"]) for m in told] == [("arena", 1), ("sealed", 1), ("arena", 2), ("sealed", 2)]
    assert agent.arenas[1].slot_bytes > agent.arenas[0].slot_bytes
    assert agent.arenas[0].state(told[1]["slot"]).kind is SlotKind.SEALED  # still there for the writer


def test_while_saves_fail_no_step_waits_for_a_slot(agent):
    agent.page.saves_failing = True
    for step in (1, 2, 3):
        agent.save(step)
    told = agent.heard()
    assert [m["step"] for m in told if m["t"] == "sealed"] == [1, 2]
    [skipped] = [m for m in told if m["t"] == "skipped"]
    assert (skipped["step"], "slot" in skipped["reason"]) == (3, True)
    agent.arenas[0].release(0)
    agent.save(4)
    assert [m["step"] for m in agent.heard("sealed")] == [4]


def test_a_writer_that_is_behind_is_waited_for(agent):
    agent.save(1)
    agent.save(2)
    agent.heard()
    thread = threading.Thread(target=agent.save, args=(3,), daemon=True)
    thread.start()
    while agent.page.section != "snapshot":
        os.sched_yield()
    agent.arenas[0].persisted(0)
    thread.join(10)
    assert [m["step"] for m in agent.heard("sealed")] == [3]


def test_the_last_save_is_waited_for_even_while_saves_fail(agent):
    """Nothing is trained after it: to skip it would be to lose the end of the run."""
    agent.save(1)
    agent.save(2)
    agent.heard()
    agent.page.saves_failing = True
    agent.host.end(3, 3)
    thread = threading.Thread(target=agent.save, args=(3,), daemon=True)
    thread.start()
    while agent.page.section != "snapshot" and thread.is_alive():
        os.sched_yield()
    agent.arenas[0].release(0)  # the writer gave a save up, which frees its slot
    thread.join(10)
    told = agent.heard()
    assert [m["step"] for m in told if m["t"] == "sealed"] == [3]
    assert not [m for m in told if m["t"] == "skipped"]


# Faults, and the end.


def test_a_raise_is_journalled_first_and_then_raised(make):
    fault = {"index": 4, "action": "raise", "rank": 0, "at": {"point": "step", "step": 2}}
    agent = make(failpoints=[fault])
    agent.host.begin(1)
    agent.channel.send({"t": "injected"})
    with pytest.raises(RuntimeError, match="injected fault 4"):
        agent.host.begin(2)
    assert agent.heard() == [{"t": "inject", "index": 4}]
    agent.host.begin(2)  # once


def test_the_end_flushes_and_carries_the_value(agent, capsys):
    agent.host.restored()
    agent.steps(1, 2)
    agent.host.log(2, {"loss": 1.0})
    agent.heard()
    agent.host.finish({"a": [1, 2.5]})
    told = agent.heard()
    assert [m["t"] for m in told] == ["log", "finished"]
    assert (told[1]["steps"], told[1]["stopped"], json.loads(told[1]["value"])) == (2, False, {"a": [1, 2.5]})
    agent.host.finish(object())
    assert agent.heard()[0]["value"] == "null"
    assert "type object is not JSON" in capsys.readouterr().out


def test_a_failure_tells_where_it_happened(agent):
    try:
        raise InvalidError("cannot be saved", path="state/x")
    except InvalidError as error:
        agent.host.fail(error)
    [told] = agent.heard()
    assert told["error"].startswith("InvalidError: cannot be saved")
    assert told["signature"].startswith("InvalidError@test_rank.py:")
    assert "raise InvalidError" in told["traceback"]


def test_a_large_copy_is_announced_before_it_is_sealed(make):
    agent = make(checkpoint_every=1)
    agent.size = 1 << 20  # 8 MiB
    agent.steps(1, 1)
    told = [m for m in agent.heard() if m["t"] in ("arena", "copying", "sealed")]
    assert [m["t"] for m in told] == ["arena", "copying", "sealed"]
    copying, sealed = told[1:]
    assert copying["part"] == sealed["part"]
    state = agent.arenas[0].state(sealed["slot"])
    assert (copying["slot"], copying["attempt"]) == (sealed["slot"], state.attempt)
    agent.size = 10
    agent.steps(2, 2)
    assert not agent.heard("copying")


def test_memory_for_one_snapshot_is_used_for_one_and_it_is_said(make, monkeypatch):
    create = Arena.create

    def tight(slots, size):
        free = 16384 if slots == 1 else 8192
        return create(slots, size, probe=lambda: Available((64 << 20) + free, "cgroup x"))

    monkeypatch.setattr("resilience.runtime.snapshots.Arena.create", tight)
    agent = make(checkpoint_every=1)
    agent.steps(1, 1)
    [warning] = agent.heard("warning")
    assert "one snapshot" in warning["message"]
    assert "cgroup x" in warning["message"]
    [arena] = agent.arenas
    assert arena.slots == 1
    # Training waits for the writer, and goes on when the slot is durable.
    timer = threading.Timer(0.05, arena.persisted, (0,))
    timer.start()
    agent.steps(2, 2)
    timer.join()
    assert [m["step"] for m in agent.heard("sealed")] == [2]
    assert arena.state(0).step == 2
