"""Following a copy: nothing is read before it is there, and nothing counts before the seal."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from resilience.checkpoint import drain, follow, pack
from resilience.checkpoint.arena import Arena
from resilience.checkpoint.follow import Following, Torn
from resilience.checkpoint.part import Part, directory, draft
from resilience.checkpoint.plan import Plan, plan, specs
from resilience.checkpoint.snapshot import snapshot
from resilience.checkpoint.tree import flatten
from storage_backends.posix import PosixStorage

MIB = 1 << 20
WHERE = directory(7, 1)


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena.create(2, 32 * MIB)
    yield made
    made.close()


def following(arena: Arena, slot: int, **options: object) -> Following:
    attempt = arena.state(slot).attempt
    return Following(arena, slot, attempt=attempt, step=7, generation=1, **options)  # type: ignore[arg-type]


def acquired(arena: Arena) -> int:
    slot = arena.acquire()
    assert slot is not None
    return slot


class Rank:
    """A state, and the copy of it into an arena with a stop at every chunk."""

    def __init__(self, arrays: int = 16, size: int = MIB) -> None:
        random = np.random.default_rng(0)
        self.state = {f"w{n:02}": random.integers(0, 255, size, np.uint8) for n in range(arrays)}
        self.arrays, self.skeleton = flatten(self.state, prefix="")
        self.layout: Plan = plan(specs(self.arrays), rank=0, world_size=1)

    def part(self) -> Part:
        return draft(self.layout, self.skeleton, run="r", step=7, generation=1)


def test_bytes_are_released_as_they_are_copied_and_all_at_the_seal(arena: Arena) -> None:
    slot = acquired(arena)
    waited: list[float] = []

    def copy_more(seconds: float) -> None:
        waited.append(seconds)
        arena.advance(slot, len(waited) * MIB)

    source = following(arena, slot, sleep=copy_more)
    source.until(0)
    assert not waited
    source.until(2 * MIB)
    assert len(waited) == 2
    source.until(MIB)
    assert len(waited) == 2
    arena.seal(slot, 7, 1)
    source.until(32 * MIB)
    source.sealed()
    assert len(waited) == 2


@pytest.mark.parametrize("end", ["aborted", "taken again", "sealed as another", "persisted"])
def test_a_copy_that_came_to_something_else_is_torn(arena: Arena, end: str) -> None:
    slot = acquired(arena)
    source = following(arena, slot)
    arena.advance(slot, 4 * MIB)
    source.until(4 * MIB)
    if end == "sealed as another":
        arena.seal(slot, 8, 1)
    elif end == "persisted":
        arena.seal(slot, 7, 1)
        arena.persisted(slot)
    else:
        arena.abort(slot)
        if end == "taken again":  # and copied further than before: the number alone would not tell
            assert acquired(arena) == slot
            arena.advance(slot, 8 * MIB)
    with pytest.raises(Torn):
        source.until(8 * MIB)
    with pytest.raises(Torn):
        source.sealed()


def test_a_copy_taken_again_and_sealed_alike_is_torn(arena: Arena) -> None:
    """The same step after an abort: what was read before it is of another moment."""
    slot = acquired(arena)
    source = following(arena, slot)
    arena.abort(slot)
    assert acquired(arena) == slot
    arena.seal(slot, 7, 1)
    with pytest.raises(Torn):
        source.sealed()


def test_a_copy_that_stands_still_is_not_waited_for(arena: Arena) -> None:
    now = [0.0]
    slot = acquired(arena)
    arena.advance(slot, MIB)

    def sleep(seconds: float) -> None:
        now[0] += 0.25
        if now[0] == 1.0:
            arena.advance(slot, 2 * MIB)  # as long as it moves it may take its time

    source = following(arena, slot, clock=lambda: now[0], sleep=sleep)
    with pytest.raises(Torn, match=f"{2 * MIB:,} bytes"):
        source.until(3 * MIB)
    assert now[0] > 1.0 + follow._PATIENCE_S


def test_an_abandoned_copy_is_left_at_once(arena: Arena) -> None:
    with pytest.raises(Torn):
        following(arena, acquired(arena), abandoned=lambda: True).until(1)


def test_what_is_persisted_while_it_is_copied_is_the_snapshot(arena: Arena, tmp_path: Path) -> None:
    """Writer and copy at the same time, many times, over old bytes of the slot: never one of those in the pack."""
    rank, storage = Rank(), PosixStorage(tmp_path)
    for number in range(20):
        for array in rank.state.values():
            array += 1
        slot = acquired(arena)
        arena.view(slot)[:] = b"\xee" * arena.slot_bytes
        found: list[pack.PersistResult] = []
        threads: list[threading.Thread] = []

        def persist(source: Following, slot: int, found: list[pack.PersistResult]) -> None:
            found.append(pack.persist(arena.view(slot), rank.part(), storage, WHERE, source=source))

        def announce(
            attempt: int,
            slot: int = slot,
            found: list[pack.PersistResult] = found,
            threads: list[threading.Thread] = threads,
        ) -> None:
            source = Following(arena, slot, attempt=attempt, step=7, generation=1)
            threads.append(threading.Thread(target=persist, args=(source, slot, found)))
            threads[0].start()

        snapshot(arena, slot, rank.arrays, rank.layout, step=7, generation=1, announce=announce)
        threads[0].join(30)
        part = Part.decode(storage.read(found[0].part_name), path="p")
        data = b"".join(block for _, block in drain.read_checked(storage, part))
        for chunk in part.chunks:
            key = part.arrays[chunk.array].name.removeprefix("rank-0/")
            assert data[chunk.offset : chunk.offset + chunk.length] == rank.state[key].tobytes(), (
                number,
                key,
            )
        arena.persisted(slot)
        storage.delete_all(WHERE)


def test_a_failed_copy_never_becomes_a_pack(arena: Arena, tmp_path: Path) -> None:
    rank, storage = Rank(), PosixStorage(tmp_path)
    slot = acquired(arena)
    torn: list[BaseException] = []
    threads: list[threading.Thread] = []

    def announce(attempt: int) -> None:
        source = Following(arena, slot, attempt=attempt, step=7, generation=1)

        def persist() -> None:
            try:
                pack.persist(arena.view(slot), rank.part(), storage, WHERE, source=source)
            except Torn as error:
                torn.append(error)

        threads.append(threading.Thread(target=persist))
        threads[0].start()

    def fail() -> None:  # all is copied, and most of it written
        until(lambda: bool(list(tmp_path.rglob("*~"))))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        snapshot(
            arena, slot, rank.arrays, rank.layout, step=7, generation=1, announce=announce, before_seal=fail
        )
    threads[0].join(30)
    assert len(torn) == 1
    assert storage.list(WHERE) == []
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("moment", [0, 1, 5, 15, 16])
def test_a_rank_killed_in_the_middle_of_a_copy_leaves_no_pack(
    arena: Arena, tmp_path: Path, moment: int
) -> None:
    """SIGKILL after so many of 16 arrays, the last time between the copy and the seal, with a writer at its heels."""
    rank, storage = Rank(), PosixStorage(tmp_path)
    slot = acquired(arena)
    source = following(arena, slot)
    pid = os.fork()
    if pid == 0:
        try:
            for chunk in rank.layout.chunks[:moment]:
                view = arena.view(slot)[chunk.offset : chunk.offset + chunk.length]
                view[:] = rank.state[chunk.key].tobytes()
                arena.advance(slot, chunk.end)
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    with pytest.raises(Torn):
        pack.persist(arena.view(slot), rank.part(), storage, WHERE, source=source)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    assert storage.list(WHERE) == []
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)
