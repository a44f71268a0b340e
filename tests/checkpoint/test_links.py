"""Saves in a row on a real directory: what has not changed is written once, and never lost."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from resilience.checkpoint import drain, pack, retention
from resilience.checkpoint.arena import Arena
from resilience.checkpoint.part import Part, directory, draft
from resilience.checkpoint.plan import plan, specs
from resilience.checkpoint.restore import Source, restore
from resilience.checkpoint.snapshot import snapshot
from resilience.checkpoint.store import open_checkpoint
from resilience.checkpoint.tree import flatten
from resilience.checkpoint.verify import verify
from resilience.control.types import CheckpointRef
from resilience.errors import CorruptError
from storage_backends import Storage, open_storage
from storage_backends.memory import MemoryStorage

FROZEN, MOVING = 3 << 20, 300_000


@dataclass
class Line:
    """One rank that saves again and again, as a writer does it."""

    storage: Storage
    state: dict[str, Any] = field(default_factory=dict)
    saved: dict[int, tuple[dict[str, Any], pack.PersistResult]] = field(default_factory=dict)
    arena: Arena | None = None
    last: pack.Earlier | None = None
    drained: Part | None = None

    def save(self, step: int, *, trained: tuple[str, ...] = (), **options: Any) -> pack.PersistResult:
        arrays, skeleton = flatten(self.state, prefix="")
        layout = plan(specs(arrays), rank=0, world_size=1, chunk_bytes=1 << 20)
        self.arena = self.arena or Arena.create(2, layout.size)
        slot = self.arena.acquire()
        assert slot is not None
        snapshot(self.arena, slot, arrays, layout, step=step, generation=1)
        part = draft(layout, skeleton, run="r", step=step, generation=1)
        view, arena, attempt = self.arena.view(slot), self.arena, self.arena.state(slot).attempt
        options = {"earlier": self.last, "trained": trained, **options}
        result = pack.persist(view, part, self.storage, directory(step, 1), **options)
        self.arena.persisted(slot)
        assert result.base is not None
        self.last = pack.Earlier(result.base, view, lambda: arena.state(slot).attempt == attempt)
        self.saved[step] = ({n: a.copy() for n, a in self.state.items() if isinstance(a, np.ndarray)}, result)
        return result

    def check(self, step: int, storage: Storage | None = None) -> None:
        state, result = self.saved[step]
        source = Source(0, storage or self.storage, result.part_name, result.sha256)
        got = restore([source], rank=0, world_size=1, step=step)
        for name, array in state.items():
            assert np.array_equal(got.arrays[name], array), (step, name)
        assert [finding for finding in verify([source]) if isinstance(finding, CorruptError)] == []


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Line]:
    made = Line(open_storage(str(tmp_path / "near")))
    random = np.random.default_rng(0)
    made.state = {
        "frozen": random.integers(0, 255, FROZEN, np.uint8),
        "moving": random.integers(0, 255, MOVING, np.uint8),
        "constant": np.arange(10.0),
    }
    yield made
    if made.arena is not None:
        made.arena.close()


def move(line: Line) -> None:
    line.state["moving"] += 1


def test_what_has_not_changed_is_linked_from_the_third_save_on(line: Line) -> None:
    sizes = []
    for step in (1, 2, 3, 4, 5):
        move(line)
        sizes.append(line.save(step).size)
    assert sizes[0] == sizes[1] > FROZEN
    assert all(size < 2 * MOVING for size in sizes[2:])
    names = line.storage.list(directory(5, 1))
    assert [name.rpartition("/")[2] for name in names] == [
        "rank-0.from-step-2-g1.pack",
        "rank-0.json",
        "rank-0.pack",
    ]
    for step in line.saved:
        line.check(step)


def test_a_checkpoint_outlives_those_it_shares_bytes_with(line: Line) -> None:
    """Retired checkpoints' bytes go, and are recycled; what a later one needs of them stays under its name."""
    for step in range(1, 9):
        move(line)
        line.save(step)
        if step > 1:
            retention.delete(line.storage, CheckpointRef(step - 1, 1))
            del line.saved[step - 1]
        line.check(step)
    kept = [name for name in line.storage.list(directory(8, 1)) if name.endswith(".pack")]
    assert len(kept) == 2
    group = open_checkpoint(f"{line.storage.url}/{directory(8, 1)}")
    assert np.array_equal(group["rank-0/frozen"][...], line.state["frozen"])
    assert np.array_equal(group["rank-0/moving"][...], line.state["moving"])


def test_what_moves_again_is_written_again(line: Line) -> None:
    for step in (1, 2, 3):
        move(line)
        line.save(step)
    line.state["frozen"][0] ^= 1
    for step in (4, 5):
        move(line)
        line.save(step)
        line.check(step)
    line.state["frozen"] += 1  # all of it: the old pack is not worth its space any more
    move(line)
    assert line.save(6).size > FROZEN
    move(line)
    line.save(7)
    line.check(7)
    assert not any("from-" in name for name in line.storage.list(directory(7, 1)))


def test_equal_checksums_alone_are_no_proof(line: Line) -> None:
    """The snapshot before differs in memory although its checksums are the same: everything is written."""
    for step in (1, 2):
        line.save(step)
    assert line.last is not None
    assert line.last.view is not None
    line.last.view[:FROZEN] = bytes(FROZEN)
    assert line.save(3).size > FROZEN
    line.check(3)


def test_a_slot_taken_in_the_middle_proves_nothing(line: Line) -> None:
    for step in (1, 2):
        line.save(step)
    assert line.last is not None
    line.last = pack.Earlier(line.last.base, line.last.view, lambda: False)
    assert line.save(3).size > FROZEN
    line.check(3)


def test_where_the_older_pack_is_gone_everything_is_written(line: Line) -> None:
    for step in (1, 2):
        line.save(step)
    retention.delete(line.storage, CheckpointRef(2, 1))
    del line.saved[2]
    assert line.save(3).size > FROZEN
    line.check(3)


def test_a_store_without_links_is_written_in_full(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemoryStorage, "link", lambda *_: False)
    line.storage = open_storage("memory://no-links/run")
    for step in (1, 2, 3):
        assert line.save(step).size > FROZEN
        line.check(step)


def test_a_drain_links_what_the_colder_tier_has(line: Line, tmp_path: Path) -> None:
    cold = open_storage(str(tmp_path / "cold"))
    for step in (1, 2, 3, 4):
        move(line)
        line.save(step)
        before = written(tmp_path / "cold")
        result = drain.copy(line.storage, cold, directory(step, 1), 0, earlier=line.drained)
        line.drained = result.part
        line.check(step, cold)
        assert (written(tmp_path / "cold") - before > FROZEN) == (step < 3), step
    # One that comes alone, after the others were lost: its older pack goes over as a whole.
    alone = open_storage(str(tmp_path / "alone"))
    drain.copy(line.storage, alone, directory(4, 1), 0)
    line.check(4, alone)


def written(root: Path) -> int:
    """Bytes of all files below, each inode once."""
    stats = [path.stat() for path in root.rglob("*") if path.is_file()]
    return sum({status.st_ino: status.st_blocks * 512 for status in stats}.values())


def test_damage_in_a_linked_pack_names_it(line: Line) -> None:
    for step in (1, 2, 3):
        move(line)
        line.save(step)
    path = line.storage.path(f"{directory(3, 1)}/rank-0.from-step-2-g1.pack")
    assert path is not None and os.stat(path).st_nlink == 2
    with path.open("r+b") as file:
        file.seek(5)
        byte = file.read(1)
        file.seek(5)
        file.write(bytes([byte[0] ^ 1]))
    result = line.saved[3][1]
    with pytest.raises(CorruptError) as caught:
        restore([Source(0, line.storage, result.part_name, result.sha256)], rank=0, world_size=1)
    assert caught.value.path == f"{directory(3, 1)}/rank-0.from-step-2-g1.pack"
    with pytest.raises(CorruptError):
        drain.copy(line.storage, open_storage("memory://damaged-link/r"), directory(3, 1), 0)


def test_a_successor_of_a_writer_that_died_finds_the_part(line: Line) -> None:
    """It knows nothing of the save before, and would lay the pack out otherwise: what is there is as good."""
    for step in (1, 2, 3):
        move(line)
        line.save(step)
    arrays, skeleton = flatten(line.state, prefix="")
    layout = plan(specs(arrays), rank=0, world_size=1, chunk_bytes=1 << 20)
    assert line.last is not None and line.last.view is not None
    part = draft(layout, skeleton, run="r", step=3, generation=1)
    again = pack.persist(line.last.view, part, line.storage, directory(3, 1))
    assert again.sha256 == line.saved[3][1].sha256


def test_a_snapshot_whose_optimizer_stood_still_is_refused(line: Line) -> None:
    line.state["opt"] = {"state": {0: {"exp_avg": np.ones(50_000)}}}
    move(line)
    line.save(1)
    move(line)
    with pytest.raises(CorruptError, match="stale"):
        line.save(2, trained=("opt/state",))
    assert line.storage.list(directory(2, 1)) == [], "nothing of it is visible"
    assert line.last is not None and line.arena is not None
    [taken] = line.arena.sealed()
    line.arena.release(taken)
    line.last = pack.Earlier(line.last.base)  # its slot was taken by the snapshot that was refused
    with pytest.raises(CorruptError, match="stale"):
        line.save(4, trained=("opt/state",))
    [taken] = line.arena.sealed()
    line.arena.release(taken)
    line.state["opt"]["state"][0]["exp_avg"] += 1
    line.save(5, trained=("opt/state",))
