"""One event of the journal: its closed set of types, its fields, and its line.

Owns the names in a line: CloudEvents 1.0 plus ours, additive only. Must never do I/O.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: Closed: an event of another type is a mistake of ours. Readers accept more, from newer releases.
TYPES: frozenset[str] = frozenset(
    {
        "run.started",
        "run.finished",
        "generation.fenced",
        "generation.started",
        "generation.ended",
        "node.joined",
        "node.lost",
        "card.cleared",
        "card.faulted",
        "card.noticed",
        "capacity.waiting",
        "capacity.found",
        "rank.exited",
        "incident.detected",
        "incident.decided",
        "incident.recovered",
        "checkpoint.sealed",
        "checkpoint.persisted",
        "checkpoint.committed",
        "checkpoint.abandoned",
        "checkpoint.failed",
        "checkpoint.retired",
        "checkpoint.quarantined",
        "checkpoint.deleted",
        "restore.chosen",
        "restore.skipped",
        "restore.done",
        "restore.failed",
        "metrics.logged",
        "section.entered",
        "section.left",
        "chaos.injected",
        "storage.retried",
        "stop.requested",
        "warning.raised",
    }
)


@dataclass(frozen=True)
class Event:
    """One thing that happened.

    Attributes:
        id: ``<source>/<generation>/<seq>``: unique in the run.
        source: who tells it, ``[a-z0-9-]+``.
        type: one of ``TYPES``.
        time: ISO 8601 in UTC, for display: clocks differ and jump.
        mono_ns: nanoseconds on the source's monotonic clock: for durations within one source.
        run, generation: of the source when it told it.
        seq: from 1, gapless per source and generation.
        subject: what it concerns, as a short name: ``rank-2``, ``node-a/0``, ``step-40``, else the run.
        data: JSON object; keys by type in docs/format.md. Not-finite numbers are the strings ``"NaN"``,
            ``"Infinity"``, ``"-Infinity"``.
        rank, node, card, step: what it concerns, where that applies.
        cause: id of the event that caused this one.
        severity: ``info``, ``warning`` or ``error``.
    """

    id: str
    source: str
    type: str
    time: str
    mono_ns: int
    run: str
    generation: int
    seq: int
    subject: str
    data: dict[str, Any] = field(default_factory=dict)
    rank: int | None = None
    node: str | None = None
    card: str | None = None
    step: int | None = None
    cause: str | None = None
    severity: str = "info"

    def to_json(self) -> dict[str, Any]:
        """The object of its line; absent values are left out."""
        fields = {"specversion": "1.0", "datacontenttype": "application/json", **vars(self)}
        return {key: value for key, value in fields.items() if value is not None}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Event:
        """``ValueError`` when required fields are missing or of the wrong type; unknown ones are ignored."""
        known = {key: value for key, value in fields.items() if key in cls.__dataclass_fields__}
        try:
            event = cls(**known)
        except TypeError as error:
            raise ValueError(str(error)) from error
        numbers = (event.mono_ns, event.generation, event.seq)
        if not all(type(number) is int for number in numbers) or not isinstance(event.data, dict):
            raise ValueError("a field has the wrong type")
        return event


def segment_name(generation: int, source: str, first: int, last: int) -> str:
    """The object that holds events ``first..last`` of a source."""
    return f"events/g{generation}/{source}/{first:012d}-{last:012d}.jsonl"
