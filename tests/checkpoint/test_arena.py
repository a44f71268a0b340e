"""The seal protocol: as a state machine, and with real processes killed in the middle."""

from __future__ import annotations

import array
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from resilience.checkpoint.arena import MAX_SLOTS, Arena, SlotKind
from resilience.checkpoint.memory import Available
from resilience.errors import ExhaustedError, InvalidError

BYTES = 3 * mmap.PAGESIZE + 7


class SealProtocol(RuleBasedStateMachine):
    """A rank and a writer on one arena. The model remembers what each whole snapshot holds."""

    def __init__(self) -> None:
        super().__init__()
        self.rank = Arena.create(3, BYTES)
        self.writer = Arena.attach(os.dup(self.rank.fd))
        self.whole: dict[int, int] = {}  # slot -> content of the whole snapshot in it
        self.busy: set[int] = set()  # sealed, the writer has not finished
        self.newest: int | None = None
        self.writing: int | None = None
        self.content = 0

    def teardown(self) -> None:
        self.writer.close()
        self.rank.close()

    @precondition(lambda self: self.writing is None)
    @rule()
    def acquire(self) -> None:
        slot = self.rank.acquire()
        usable = set(range(3)) - self.busy - {self.newest}
        if slot is None:
            assert not usable
            return
        assert slot in usable
        assert not (slot in self.whole and usable - set(self.whole))  # free ones first
        self.whole.pop(slot, None)
        self.writing = slot
        self.rank.view(slot)[:] = bytes(BYTES)  # half a copy

    @precondition(lambda self: self.writing is not None)
    @rule()
    def seal(self) -> None:
        assert self.writing is not None
        self.content = self.content % 250 + 1
        self.rank.view(self.writing)[:] = bytes([self.content]) * BYTES
        self.rank.seal(self.writing, self.content, 1)
        self.whole[self.writing] = self.content
        self.busy.add(self.writing)
        self.newest, self.writing = self.writing, None

    @precondition(lambda self: self.writing is not None)
    @rule()
    def abort(self) -> None:
        assert self.writing is not None
        self.rank.abort(self.writing)
        self.writing = None

    @precondition(lambda self: self.writing is not None)
    @rule()
    def die_and_be_replaced(self) -> None:
        fd = os.dup(self.rank.fd)
        self.rank.close()
        self.rank = Arena.attach(fd)
        assert self.rank.recover() == [self.writing]
        self.writing = None

    @precondition(lambda self: self.busy)
    @rule(data=st.data(), good=st.booleans())
    def writer_finishes(self, data: st.DataObject, good: bool) -> None:
        slot = self.writer.sealed()[0] if good else data.draw(st.sampled_from(sorted(self.busy)))
        (self.writer.persisted if good else self.writer.release)(slot)
        (self.writer.persisted if good else self.writer.release)(slot)  # may run twice
        self.busy.discard(slot)

    @invariant()
    def whole_snapshots_are_untouched(self) -> None:
        for slot, content in self.whole.items():
            assert bytes(self.writer.view(slot)) == bytes([content]) * BYTES
            assert self.writer.state(slot).step == content
        assert set(self.writer.sealed()) == self.busy
        kinds = [self.writer.state(slot).kind for slot in range(3)]
        assert kinds.count(SlotKind.WRITING) == (self.writing is not None)


SealProtocol.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestSealProtocol = SealProtocol.TestCase


def test_layout_is_one_header_page_and_equal_slots() -> None:
    with Arena.create(2, BYTES) as arena:
        assert os.fstat(arena.fd).st_size == 4096 + 2 * 4 * 4096
        assert (arena.slots, arena.slot_bytes) == (2, BYTES)
        assert len(arena.view(1)) == BYTES
        with pytest.raises(InvalidError):
            arena.view(2)


def test_memory_is_taken_at_creation_and_cannot_shrink() -> None:
    """All pages exist (no fault later can fail), and no holder can truncate the memory under another."""
    with Arena.create(2, 1 << 20) as arena:
        assert os.fstat(arena.fd).st_blocks * 512 >= 2 << 20
        for size in (4096, 1 << 30):
            with pytest.raises(PermissionError):
                os.ftruncate(arena.fd, size)


def test_transitions_out_of_order_are_refused() -> None:
    with Arena.create(2, BYTES) as arena:
        for action in (arena.persisted, arena.release, arena.abort, lambda slot: arena.seal(slot, 1, 1)):
            with pytest.raises(InvalidError, match="FREE"):
                action(0)


def test_one_slot_is_taken_again_only_when_its_snapshot_is_durable_or_given_up() -> None:
    with Arena.create(1, BYTES) as arena:
        for finish in (arena.persisted, arena.release):
            assert arena.acquire() == 0
            assert arena.acquire() is None
            arena.seal(0, 1, 1)
            assert arena.acquire() is None
            finish(0)


def test_every_taking_is_another_attempt_with_nothing_copied() -> None:
    with Arena.create(1, BYTES) as arena:
        seen = set()
        for _ in range(3):
            assert arena.acquire() == 0
            state = arena.state(0)
            assert state.copied == 0
            seen.add(state.attempt)
            arena.advance(0, 4096)
            assert arena.state(0).copied == 4096
            arena.abort(0)
        assert len(seen) == 3


def test_wrong_descriptors_and_sizes_are_refused(tmp_path: Path) -> None:
    file = (tmp_path / "x").open("wb+")
    file.write(bytes(8192))
    file.flush()
    with pytest.raises(InvalidError, match="not an arena"):
        Arena.attach(file.fileno())
    file.close()
    for slots, size in ((0, BYTES), (MAX_SLOTS + 1, BYTES), (2, 0)):
        with pytest.raises(InvalidError):
            Arena.create(slots, size)


def test_too_little_memory_says_how_much_and_how_to_give_it() -> None:
    """Asked for more than the machine has: an error at once, not a killed process."""
    with pytest.raises(ExhaustedError) as caught:
        Arena.create(2, 1 << 50)
    assert f"{(2 << 50) + 4096:,} bytes" in str(caught.value)
    assert "available" in str(caught.value)
    assert "--memory" in str(caught.value.hint)


def test_memory_running_out_while_it_is_taken_keeps_nothing() -> None:
    """Other ranks of the node take memory at the same moment: the look before each block notices."""
    answers = iter(
        [Available(1 << 40, "first"), Available(1 << 40, "second"), Available(1 << 20, "cgroup x")]
    )
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(ExhaustedError, match="cgroup x"):
        Arena.create(2, 64 << 20, probe=lambda: next(answers))
    assert set(os.listdir("/proc/self/fd")) == before


def test_views_outlive_close() -> None:
    """Whoever still looks at a slot keeps its memory: no crash, and closing twice is fine."""
    arena = Arena.create(2, BYTES)
    view = arena.view(0)
    view[0] = 7
    arena.close()
    arena.close()
    assert view[0] == 7


def spawn(work: Callable[[], None]) -> int:
    """Run ``work`` in a forked child that always ends without Python's clean-up."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(1)
    return pid


@pytest.mark.parametrize("moment", range(12))
def test_a_rank_killed_in_the_middle_of_a_copy_leaves_the_last_snapshot(moment: int) -> None:
    """SIGKILL at a byte count of the copy: that slot is WRITING for ever, the sealed one whole, and named."""
    with Arena.create(2, 1 << 20) as arena:
        first = arena.acquire()
        assert first is not None
        arena.view(first)[:] = b"\1" * (1 << 20)
        arena.seal(first, 1, 1)
        ready, told = os.pipe()

        def rank() -> None:
            mine = Arena.attach(os.dup(arena.fd))
            slot = mine.acquire()
            assert slot == 1
            view = mine.view(slot)
            for page in range(256):
                if page == moment * 23:
                    os.write(told, b"x")
                    signal.pause()
                view[page * 4096 : (page + 1) * 4096] = b"\2" * 4096
            mine.seal(slot, 2, 1)

        pid = spawn(rank)
        try:
            assert select.select([ready], [], [], 30)[0], "the child never reached the copy"
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(ready)
            os.close(told)
        assert arena.state(1).kind is SlotKind.WRITING
        assert arena.sealed() == [first]
        assert arena.state(first).step == 1
        assert bytes(arena.view(first)) == b"\1" * (1 << 20)
        assert arena.acquire() is None  # neither the torn one, nor the one the writer still needs
        assert arena.recover() == [1]
        assert arena.acquire() == 1


def test_racing_seals_and_kills_never_show_a_torn_snapshot() -> None:
    """A child seals as fast as it can and is killed at random moments; whatever is sealed is whole."""
    with Arena.create(3, 64 << 10) as arena:
        for round_ in range(40):
            ready, told = os.pipe()

            def rank(base: int = round_, told: int = told) -> None:
                mine = Arena.attach(os.dup(arena.fd))
                mine.recover()
                number = 0
                while True:
                    slot = mine.acquire()
                    if slot is None:
                        for index in mine.sealed()[:-1]:
                            mine.persisted(index)
                        continue
                    value = (base * 31 + number) % 251
                    mine.view(slot)[:] = bytes([value]) * (64 << 10)
                    mine.seal(slot, value, base)
                    number += 1
                    if number == 3 + base % 5:
                        os.write(told, b"x")

            pid = spawn(rank)
            try:
                assert select.select([ready], [], [], 30)[0]
            finally:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                os.close(ready)
                os.close(told)
            kinds = [arena.state(slot).kind for slot in range(3)]
            assert kinds.count(SlotKind.WRITING) <= 1
            whole = [slot for slot in range(3) if arena.state(slot).kind >= SlotKind.SEALED]
            assert whole
            for slot in whole:
                assert bytes(arena.view(slot)) == bytes([arena.state(slot).step]) * (64 << 10)


def test_the_descriptor_travels_over_a_socket_and_survives_its_maker() -> None:
    """SCM_RIGHTS to a process that has nothing in common with the maker, which then is gone."""
    here, there = socket.socketpair()
    code = """
import array, os, signal, socket, sys
from resilience.checkpoint.arena import Arena
arena = Arena.create(2, 100)
slot = arena.acquire(); arena.view(slot)[:5] = b"hello"; arena.seal(slot, 40, 3)
socket.socket(fileno=int(sys.argv[1])).sendmsg(
    [b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [arena.fd]))])
os.kill(os.getpid(), signal.SIGKILL)
"""
    fd = there.fileno()
    child = subprocess.Popen([sys.executable, "-c", code, str(fd)], pass_fds=[fd])
    there.close()
    here.settimeout(60)
    _, rights, _, _ = here.recvmsg(1, socket.CMSG_LEN(4))
    child.wait(60)
    here.close()
    arena = Arena.attach(array.array("i", rights[0][2])[0])
    assert (arena.state(0).kind, arena.state(0).step, arena.state(0).generation) == (SlotKind.SEALED, 40, 3)
    assert bytes(arena.view(0)[:5]) == b"hello"
    assert not os.get_inheritable(arena.fd)
    arena.close()
