"""The property tests are able to fail: each obligation is played with a part that is broken in the way it guards
against, over a fixed set of seeds, and must notice. A mutation that survives here is a hole in the properties.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import journal_obligations as obligations
import pytest
from journal_clients import Parts, commit, save, write_data
from journal_simulation import Client, SimStorage

from resilience.errors import CorruptError, FencedError, UnavailableError
from resilience.journal import records
from resilience.journal.log import CommitLog
from resilience.journal.records import Kind, Record
from resilience.journal.state import Checkpoint, LogState, fold
from storage_backends.disk import Disk

# -- broken logs -------------------------------------------------------------------------------------------------


class Unfenced(CommitLog):
    """Does not look whether somebody newer is in charge."""

    def _check_in_charge(self) -> None:
        pass


class NotAbove(CommitLog):
    """Compares with <= where < is meant: begins a generation that exists already."""

    def _write(self, kind: Kind, generation: int, body: dict[str, Any]) -> Record:
        if kind is Kind.FENCE and self._newest is not None:
            generation, self._newest = max(generation, self._newest.generation), None
        return super()._write(kind, generation, body)


class NoReadBack(CommitLog):
    """Forgets what it has offered: a lost reply is a failure to it, and the next try a new record."""

    def _draft(self, *args: Any) -> Any:
        self._attempts.clear()
        return super()._draft(*args)


class Optimist(CommitLog):
    """Takes an unknown outcome for a success."""

    def _write(self, kind: Kind, generation: int, body: dict[str, Any]) -> Record:
        try:
            return super()._write(kind, generation, body)
        except UnavailableError:
            if kind is Kind.FENCE or not self._attempts:
                raise
            return self._attempts[-1]


class Unconfirmed(CommitLog):
    """Builds on a record that may still be volatile."""

    def _confirm_tail(self) -> None:
        pass


class Hasty(CommitLog):
    """Answers with a record that it merely found: visible is not durable."""

    def _claim(self, *args: Any, **kwargs: Any) -> Record | None:
        self._tail_durable, before = True, self._tail_durable
        try:
            return super()._claim(*args, **kwargs)
        finally:
            self._tail_durable = before


class Stubborn(CommitLog):
    """Having lost a slot, tries for the same one again."""

    def _admit(self, data: bytes, record: Record, *, durable: bool = False) -> None:
        if not (durable and record.writer not in [attempt.writer for attempt in self._attempts]):
            super()._admit(data, record, durable=durable)


class Credulous(CommitLog):
    """Does not compare ``prev`` and the slot."""

    def _decode(self, data: bytes) -> Record:
        return records.decode(data, path=f"log/{len(self._records) + 1:020d}.json")


class Unsigned(CommitLog):
    """Reads any JSON that has the fields, without looking at its checksum; the chain is still compared."""

    def _decode(self, data: bytes) -> Record:
        try:
            fields = records.json.loads(data)
            names = [field.name for field in dataclasses.fields(Record)]
            record = Record(**{name: fields[name] for name in names})
            good = self._tail and records.digest(self._tail)
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptError("no record", path=f"log/{len(self._records) + 1:020d}.json") from error
        if record.prev != (good or None):
            raise CorruptError("chain", path=f"log/{len(self._records) + 1:020d}.json")
        return record


# -- broken storage ----------------------------------------------------------------------------------------------


class CheckThenWrite(SimStorage):
    """exists(), then write: fsspec's local ``mode="create"``."""

    def create(self, name: str, data: bytes) -> bytes | None:
        try:
            held = super().read(name)
            return None if held == data else held
        except FileNotFoundError:
            with self.sink(name) as sink:
                sink.write(data)
            return None


class InPlace(SimStorage):
    """``open(name, "xb")``: the name is there before the bytes are."""

    def _create_file(self, name: str, path: str, data: bytes) -> bool:
        self.disk.make_directory(path.rpartition("/")[0])
        self.step("open", name)
        if self.disk.get(path) is not None:
            return False
        inode = self.disk.open_new(path)
        self.step("write", name)
        self.disk.append(inode, data)
        self.disk.sync(inode)
        self.disk.sync_directory(path.rpartition("/")[0])
        return True


class _Lazy:
    """A disk to which some calls are not passed on."""

    def __init__(self, disk: Disk, skip: str) -> None:
        self._disk, self._skip = disk, skip

    def __getattr__(self, name: str) -> Any:
        return (lambda *_: None) if name == self._skip else getattr(self._disk, name)


class NoSync(SimStorage):
    """Never calls fsync on a file."""

    def __init__(self, disk: Disk, **kwargs: Any) -> None:
        super().__init__(disk, **kwargs)
        self.disk = _Lazy(disk, "sync")  # type: ignore[assignment]


class NoDirectorySync(SimStorage):
    """Never calls fsync on a directory."""

    def __init__(self, disk: Disk, **kwargs: Any) -> None:
        super().__init__(disk, **kwargs)
        self.disk = _Lazy(disk, "sync_directory")  # type: ignore[assignment]


# -- broken users ------------------------------------------------------------------------------------------------


def save_record_first(me: Client, step: int) -> Record | None:
    """The record says what will be there soon."""
    place, later = f"checkpoints/step-{step}-g{me.log.generation}", "0" * 64
    part = {"rank": 0, "node": me.name, "name": f"{place}/rank-0.json", "sha256": later}
    body = {"step": step, "tier": "shared", "world_size": 1, "size": 1, "parts": [part], "op": me.new_id()}
    record = commit(me, Kind.CHECKPOINT, body)
    write_data(me, step)
    return record


def save_fence_ignored(me: Client, step: int) -> Record | None:
    """Goes on after having been told to stop, as if it still had the generation of the newest fence."""
    try:
        return save(me, step)
    except FencedError:
        me.log._generation = me.log._newest.generation  # type: ignore[union-attr]
        me.log._base = me.log._newest.writer  # type: ignore[union-attr]
        return save(me, step)


def fold_revives(found: Any) -> LogState:
    """A checkpoint record undoes an earlier retirement."""
    state = fold(found)
    back = [Checkpoint(ref.step, ref.generation, 1, {}) for ref in state.retired]
    entries = {
        (record.body["step"], record.generation): fold([record]).checkpoints[0].tiers
        for record in found
        if record.kind is Kind.CHECKPOINT
    }
    back = [dataclasses.replace(it, tiers=entries[it.step, it.generation]) for it in back]
    return dataclasses.replace(state, checkpoints=(*state.checkpoints, *back))


MUTATIONS: list[tuple[str, Callable[..., Any], Parts]] = [
    ("p1 create that races", obligations.p1_agreement_and_density, Parts(storage=CheckThenWrite)),
    ("p1 no directory fsync", obligations.p1_agreement_and_density, Parts(storage=NoDirectorySync)),
    ("p1 builds on volatile records", obligations.p1_agreement_and_density, Parts(log=Unconfirmed)),
    ("p2 record before data", obligations.p2_references_before_records, Parts(save=save_record_first)),
    ("p2 no fsync", obligations.p2_references_before_records, Parts(storage=NoSync)),
    ("p3 no check", obligations.p3_fencing, Parts(log=Unfenced)),
    ("p3 <= for <", obligations.p3_fencing, Parts(log=NotAbove)),
    ("p4 unknown taken for success", obligations.p4_no_lost_acknowledgement, Parts(log=Optimist)),
    ("p4 no directory fsync", obligations.p4_no_lost_acknowledgement, Parts(storage=NoDirectorySync)),
    ("p4 found taken for durable", obligations.p4_no_lost_acknowledgement, Parts(log=Hasty)),
    ("p5 written in place", obligations.p5_no_phantom, Parts(storage=InPlace)),
    ("p5 no fsync", obligations.p5_no_phantom, Parts(storage=NoSync)),
    ("p6 no read-back", obligations.p6_idempotence, Parts(log=NoReadBack)),
    ("p7 <= for <", obligations.p7_zombies_stay_in_their_prefix, Parts(log=NotAbove)),
    (
        "p7 a fenced writer goes on",
        obligations.p7_zombies_stay_in_their_prefix,
        Parts(save=save_fence_ignored),
    ),
    ("p8 no chain", obligations.p8_integrity, Parts(log=Credulous)),
    ("p8 no checksum", obligations.p8_integrity, Parts(log=Unsigned)),
    ("p9 delete, then retire", obligations.p9_gc_safety, Parts(order="delete, retire")),
    ("p9 no grace", obligations.p9_gc_safety, Parts(order="retire, delete")),
    ("p9 sweeps its own generation", obligations.p9_gc_safety, Parts(sweep_own=True)),
    ("p9 retirement undone", obligations.p9_gc_safety, Parts(fold=fold_revives)),
    ("p10 tries the same slot", obligations.p10_liveness_after_heal, Parts(log=Stubborn)),
]


@pytest.mark.parametrize(("check", "parts"), [m[1:] for m in MUTATIONS], ids=[m[0] for m in MUTATIONS])
def test_a_broken_part_is_caught(check: Callable[..., Any], parts: Parts) -> None:
    for seed in range(2000):
        data = random.Random(seed).randbytes(1024)
        try:
            check(data, parts)
        except (AssertionError, CorruptError, pytest.fail.Exception):
            check(data)  # and the whole parts pass the very same world
            return
    raise AssertionError("2000 worlds did not notice")
