"""The commit log: numbered, create-only records, the only thing that says who is in charge and what exists.

Owns the slots ``log/%020d.json``. ``Storage.create`` is the only arbiter. Slot N is written only by somebody
who holds the bytes of N-1 (its ``prev`` proves that) and after N-1 is durable, so the log is dense at every
moment and whoever wins slot N has seen all before it: a listing is only ever a hint. Must never rewrite or
delete a record, read a clock, or guess the outcome of a write whose reply was lost.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from resilience.errors import CorruptError, FencedError, InvalidError
from resilience.journal.records import FIRST_SLOT, Kind, Record, check_body, decode, digest, encode, plain
from storage_backends.base import Storage

_NAME = re.compile(r"log/(\d{20})\.json")
_PREFETCH_ABOVE = 8  # unread slots from which reading them in parallel is worth threads
_PREFETCH_THREADS = 16
_REMEMBERED = 16  # writes of unknown outcome; an older one that lands is read like anybody's


def slot_name(slot: int) -> str:
    """The object that holds a slot."""
    return f"log/{slot:020d}.json"


class CommitLog:
    """Reads and writes one run's log. Thread-safe: one operation at a time; must not be used across ``fork``.

    A reader only calls ``refresh``. A writer calls ``fence`` once per generation, then ``append``. After
    ``UnavailableError`` the outcome is unknown: calling again with the same arguments settles it (the same
    bytes are offered to the same slot, or found there), and never writes twice. After ``FencedError`` the
    object refuses all further writing.

    Args:
        storage: rooted at the run.
        new_id: a new, unique id for every write (uuid4().hex in production).
    """

    def __init__(self, storage: Storage, *, new_id: Callable[[], str]) -> None:
        self._storage = storage
        self._new_id = new_id
        self._lock = threading.Lock()
        self._records: list[Record] = []
        self._tail = b""  # the bytes of the newest record: the next one's prev is their digest
        self._tail_durable = True  # whether they outlive a power failure for certain
        self._opened = False
        self._newest: Record | None = None  # the newest fence in the log
        self._base: str | None = None  # writer of the fence we write under (or began to fence over)
        self._generation = 0
        self._attempts: list[Record] = []  # offered to the next slot, outcome unknown: may still land
        self._landed: list[Record] = []  # did land, unknown to our caller yet

    @property
    def generation(self) -> int:
        """The generation this object fenced, 0 = none: it only reads."""
        return self._generation

    def refresh(self) -> tuple[Record, ...]:
        """Read on from the last known slot; all records, oldest first.

        Raises ``CorruptError`` (a damaged, replaced or missing record, named), ``InvalidError`` (a newer
        format), ``UnavailableError``. May miss records that appear meanwhile, never one that was acknowledged
        before.
        """
        with self._lock:
            self._catch_up(hint=not self._opened)
            return tuple(self._records)

    def fence(self, generation: int, body: dict[str, Any]) -> Record:
        """Begin a generation: at least ``generation``, always above every other in the log.

        On return every record below the returned one is known, durable and final, so what to restore may be
        chosen from ``refresh()``. Losing a slot to a record of the generation in charge is no conflict: the
        next slot is tried, and every such loss is the other's progress. ``FencedError`` when somebody else's
        fence
        appears that was not there when this object began: exactly one of several that start together wins.
        """
        if generation < 1:
            raise InvalidError(
                f"generation {generation} cannot be fenced", operation="fence", hint="count from 1"
            )
        with self._lock:
            body = plain(body)
            self._catch_up(hint=True)
            if self._base is None:
                self._base = self._newest.writer if self._newest else ""
            self._check_in_charge()
            landed = self._claim(Kind.FENCE, body, at_least=generation)
            return landed or self._write(Kind.FENCE, generation, body)

    def append(self, kind: Kind, body: dict[str, Any]) -> Record:
        """Write a record under our generation; on return it is durable and may be acknowledged.

        What the body refers to must be durable before. ``FencedError`` when a higher generation is in the
        log; ``InvalidError`` without a generation, for a fence, or for a body its readers could not use.
        """
        with self._lock:
            body = plain(body)
            wrong = "a fence is written by fence()" if kind is Kind.FENCE else check_body(kind, body)
            if not self._generation:
                wrong = "this log is read only until fence() has won a generation"
            if wrong:
                raise InvalidError(wrong, operation="append", hint="see docs/format.md for the bodies")
            self._check_in_charge()
            landed = self._claim(kind, body, at_least=self._generation)
            return landed or self._write(kind, self._generation, body)

    # -- writing ---------------------------------------------------------------------------------------------

    def _write(self, kind: Kind, generation: int, body: dict[str, Any]) -> Record:
        while True:
            if kind is Kind.FENCE and self._newest is not None:
                generation = max(generation, self._newest.generation + 1)
            self._confirm_tail()
            record = self._draft(kind, generation, body)
            data = encode(record)
            # Any exception from here on leaves the attempt noted: it may have landed, or land later.
            held = self._storage.create(slot_name(record.slot), data)
            if held is None:
                self._admit(data, record, durable=True)
                self._landed.remove(record)
                return record
            self._admit(held, self._decode(held), durable=True)  # create answers with durable bytes
            self._check_in_charge()
            landed = self._claim(kind, body, at_least=generation)
            if landed is not None:
                return landed

    def _draft(self, kind: Kind, generation: int, body: dict[str, Any]) -> Record:
        """What to offer to the next slot: what was already offered to it for the same purpose, or new."""
        for record in self._attempts:
            if (record.kind, record.generation, record.body) == (kind, generation, body):
                return record
        slot = len(self._records) + FIRST_SLOT
        prev = digest(self._tail) if self._records else None
        record = Record(slot, kind, generation, self._new_id(), prev, body)
        self._attempts = [*self._attempts[1 - _REMEMBERED :], record]
        return record

    def _claim(self, kind: Kind, body: dict[str, Any], *, at_least: int) -> Record | None:
        """Our own earlier write of the same thing, if it turned out to have landed, its reply lost."""
        for record in self._landed:
            if record.kind is kind and record.body == body and record.generation >= at_least:
                self._confirm_tail()  # found is not yet durable, and our caller is about to acknowledge it
                self._landed.remove(record)
                return record
        return None

    def _confirm_tail(self) -> None:
        """Make sure the newest record is durable before a record refers to it by ``prev``.

        A record that we read may be visible and not yet durable: its writer died between the two. Without
        this, a power failure could keep our record and lose the one before it. ``create`` of identical
        bytes is the promise needed: on return they are durable.
        """
        if self._tail_durable:
            return
        path = slot_name(self._records[-1].slot)
        if self._storage.create(path, self._tail) is not None:
            raise _broken(path, "holds other bytes than were read from it")
        self._tail_durable = True

    def _check_in_charge(self) -> None:
        newest = self._newest
        if newest is None or self._base is None or newest.writer == self._base:
            return
        raise FencedError(
            f"generation {newest.generation} is in charge of this run since slot {newest.slot}"
            f" ({newest.body.get('supervisor', 'unknown supervisor')})",
            operation="commit log",
            path=slot_name(newest.slot),
            generation=self._generation or None,
            hint="this process must stop; the newer one goes on from the same log",
        )

    # -- reading ---------------------------------------------------------------------------------------------

    def _catch_up(self, *, hint: bool) -> None:
        listed = self._listed() if hint else []
        ahead = self._prefetch([slot for slot in listed if slot >= len(self._records) + FIRST_SLOT])
        while True:
            slot = len(self._records) + FIRST_SLOT
            data = ahead.pop(slot, None) or self._read(slot)
            if data is None and any(later > slot for later in listed):
                # Later slots prove that this one was written. Once more, in case the store was merely behind.
                data = self._read(slot)
                if data is None:
                    raise _broken(slot_name(slot), "is missing although later slots exist")
            if data is None:
                break
            self._admit(data, self._decode(data))
        self._opened = True

    def _listed(self) -> list[int]:
        """Slots a listing shows: hint of what to fetch, proof of what must exist, never of what does not."""
        names = (_NAME.fullmatch(name) for name in self._storage.list("log"))
        return [int(match[1]) for match in names if match]

    def _prefetch(self, slots: list[int]) -> dict[int, bytes | None]:
        if len(slots) <= _PREFETCH_ABOVE:
            return {}
        with ThreadPoolExecutor(_PREFETCH_THREADS, thread_name_prefix="commit-log") as pool:
            return dict(zip(slots, pool.map(self._read, slots), strict=True))

    def _read(self, slot: int) -> bytes | None:
        try:
            return self._storage.read(slot_name(slot))
        except FileNotFoundError:
            return None

    def _decode(self, data: bytes) -> Record:
        """The record of the next slot, verified against the one before."""
        slot = len(self._records) + FIRST_SLOT
        path = slot_name(slot)
        record = decode(data, path=path)
        if record.slot != slot:
            raise _broken(path, f"holds the record of slot {record.slot}")
        if record.prev != (digest(self._tail) if self._records else None):
            raise _broken(path, "does not follow the record before it: one of the two was replaced")
        return record

    def _admit(self, data: bytes, record: Record, *, durable: bool = False) -> None:
        self._records.append(record)
        self._tail, self._tail_durable = data, durable
        ours = any(attempt.writer == record.writer for attempt in self._attempts)
        if ours:
            self._landed = [*self._landed[1 - _REMEMBERED :], record]
        self._attempts = []  # the slot is taken for good: whatever else was offered to it can no longer land
        if record.kind is Kind.FENCE and (
            self._newest is None or record.generation > self._newest.generation
        ):
            self._newest = record
            if ours:
                self._base, self._generation = record.writer, record.generation


def _broken(path: str, why: str) -> CorruptError:
    return CorruptError(
        f"the commit log is damaged: {path} {why}",
        operation="commit log",
        path=path,
        hint="records are never rewritten or deleted: bring the object back from a copy",
    )
