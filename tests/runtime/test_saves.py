"""The node's side of saving, over a writer that is played by the test."""

import gc
import os

import pytest

from resilience.runtime.saves import Saves
from resilience.runtime.wire import Channel


class Played:
    """A writer process that does nothing but end."""

    pid = 4242

    def wait(self):
        return -9

    def kill(self):
        pass


class Desk:
    """``Saves`` and the writer's end of the newest channel."""

    def __init__(self):
        self.said = []
        self.failing = []
        self.channels = []
        self.ours = None
        config = {"nvme": "/n", "shared": "/s"}
        self.saves = Saves(config, self._spawn, self.said.append, self.failing.append)
        self.saves.start()
        self.fds = []

    def _spawn(self, module, kind):
        self.ours, theirs = Channel.pair()
        self.channels.append(theirs)
        return Played(), self.ours

    def orders(self):
        """What the newest writer was told, without its greeting."""
        told = []
        while batch := self.channels[-1].take():
            for message, fds in batch:
                self.fds += fds
                told.append({**message, "fds": len(fds)} if message["t"] == "arena" else message)
        return told

    def arena(self, generation=1, rank=0, number=1):
        fd = os.memfd_create("arena")
        self.saves.arena((generation, rank, number), fd)
        return fd

    def seal(self, step, slot=0, generation=1, rank=0, number=1):
        self.saves.sealed((generation, rank, number), {"step": step, "slot": slot, "part": {}})

    def reply(self, message):
        self.channels[-1].send(message)
        assert self.saves.hear()

    def free(self, step, slot=0, *, saved=True, key=(1, 0, 1)):
        self.reply({"t": "slot_free", "key": list(key), "slot": slot, "step": step, "saved": saved})

    def die(self):
        self.channels[-1].close()
        assert not self.saves.hear()
        self.ours.close()
        self.saves.revive()

    def close(self):
        self.saves.close()
        for channel in self.channels:
            channel.close()
        for fd in self.fds:
            os.close(fd)


@pytest.fixture
def desk():
    gc.collect()  # what tests before this one left in cycles
    before = len(os.listdir("/proc/self/fd"))
    made = Desk()
    assert [order["t"] for order in made.orders()] == ["open", "arm"]
    yield made
    made.close()
    assert len(os.listdir("/proc/self/fd")) == before


def kinds(orders):
    return [(order["t"], order.get("step")) for order in orders]


def persisted(step, tier):
    return {"t": "persisted", "generation": 1, "rank": 0, "step": step, "tier": tier}


def test_a_successor_is_told_all_that_still_waits_and_nothing_else(desk):
    desk.arena()
    desk.seal(1, slot=0)
    desk.seal(2, slot=1)
    assert kinds(desk.orders()) == [("arena", None), ("persist", 1), ("persist", 2)]
    desk.reply(persisted(1, "nvme"))
    desk.free(1)
    desk.die()
    assert kinds(desk.orders()) == [
        ("open", None),
        ("arm", None),
        ("arena", None),
        ("persist", 2),
        ("drain", 1),
    ]
    assert desk.said[-1]["t"] == "warning"
    desk.reply(persisted(1, "shared"))
    desk.reply(persisted(2, "nvme"))
    desk.free(2, slot=1)
    desk.reply({"t": "save_failed", "generation": 1, "rank": 0, "step": 2, "tier": "shared", "error": "away"})
    desk.die()
    assert kinds(desk.orders()) == [("open", None), ("arm", None), ("arena", None)]


def test_a_slot_sealed_anew_before_the_word_that_it_was_free_still_waits(desk):
    desk.arena()
    desk.seal(1)
    desk.seal(5)
    desk.free(1)
    desk.die()
    assert ("persist", 5) in kinds(desk.orders())


def test_an_arena_is_held_until_its_rank_is_gone_and_none_of_its_slots_waits(desk):
    fd = desk.arena()
    desk.seal(1)
    desk.saves.orphan(1, 0)
    os.fstat(fd)
    assert kinds(desk.orders()) == [("arena", None), ("persist", 1)]
    desk.free(1)
    with pytest.raises(OSError):
        os.fstat(fd)
    assert kinds(desk.orders()) == [("forget", None)]


def test_an_arena_of_a_rank_that_lives_is_kept_when_its_slots_are_done(desk):
    fd = desk.arena()
    desk.seal(1)
    desk.free(1)
    os.fstat(fd)
    desk.saves.orphan(1, 3)  # another rank's end
    os.fstat(fd)


def test_a_save_that_failed_tells_the_ranks_and_one_that_works_takes_it_back(desk):
    desk.arena()
    desk.seal(1)
    desk.free(1, saved=False)
    assert (desk.saves.failing, desk.failing) == (True, [True])
    desk.seal(2)
    desk.free(2)
    assert (desk.saves.failing, desk.failing) == (False, [True, False])


def test_writers_that_die_again_and_again_are_given_up_and_their_slots_released(desk):
    desk.arena()
    desk.seal(1)
    desk.reply(persisted(0, "nvme"))
    desk.die()
    desk.die()
    assert not [seen for seen in desk.said if seen["t"] == "save_failed"]
    desk.saves.orphan(1, 0)
    desk.die()
    failed = [(seen["step"], seen["tier"]) for seen in desk.said if seen["t"] == "save_failed"]
    assert failed == [(1, "memory"), (0, "shared")]
    assert desk.failing == [True]
    # The rank may use the slot again; only then is the arena let go of.
    assert kinds(desk.orders()) == [
        ("open", None),
        ("arm", None),
        ("arena", None),
        ("release", 1),
        ("forget", None),
    ]


def test_deaths_count_only_while_nothing_gets_done(desk):
    desk.arena()
    for step in range(1, 7):
        desk.seal(step)
        desk.die()
        desk.free(step)
    assert not [seen for seen in desk.said if seen["t"] == "save_failed"]


def test_a_writer_that_reads_nothing_holds_nobody_up(desk):
    desk.arena()
    for step in range(100):
        desk.saves.sealed((1, 0, 1), {"step": step, "slot": 0, "part": {"x": "y" * 50_000}})
    assert desk.ours.pending
    assert len(desk.orders()) < 100


def test_faults_of_the_writer_are_marked_as_its_own(desk):
    desk.saves.arm([{"index": 7}])
    assert desk.orders() == [{"t": "arm", "failpoints": [{"index": 7}]}]
    desk.reply({"t": "inject", "index": 7})
    assert desk.said == [{"t": "inject", "index": 7, "source": "writer"}]
    desk.die()
    assert {"t": "arm", "failpoints": [{"index": 7}]} in desk.orders()


def test_a_copy_that_has_begun_is_passed_on_and_nothing_is_kept_of_it(desk):
    desk.arena()
    desk.saves.copying(
        (1, 0, 1), {"t": "copying", "slot": 0, "attempt": 3, "step": 4, "part": {}, "arena": 1}
    )
    [_, follow] = desk.orders()
    assert (follow["t"], follow["key"], follow["attempt"], follow["step"]) == ("follow", [1, 0, 1], 3, 4)
    desk.die()
    assert kinds(desk.orders()) == [("open", None), ("arm", None), ("arena", None)]
    desk.saves.orphan(1, 0)
    assert kinds(desk.orders()) == [("forget", None)]
