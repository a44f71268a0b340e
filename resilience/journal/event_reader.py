"""Reading the event journal: events in order, and beside them what is torn or missing.

Owns the tolerance for damage: reading never stops at a bad line or an absent segment, and never hides one.
Must not be used for a decision about recovery.
"""

from __future__ import annotations

import heapq
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from resilience.journal.event import Event
from storage_backends.base import Storage

_DIRECTORY = re.compile(r"events/g(\d+)/")
_SEGMENT = re.compile(r"events/g\d+/[a-z0-9-]+/(\d{12,})-(\d{12,})\.jsonl")


@dataclass(frozen=True)
class Gap:
    """Events that are not there.

    Attributes:
        source, generation: whose.
        first, last: sequence numbers missing, both included; ``None`` where a damaged line does not say.
        reason: ``missing`` (never sealed, dropped, or the segment is gone), ``torn`` (damaged line or
            segment).
        path: object concerned, empty for ``missing``.
    """

    source: str
    generation: int
    first: int | None
    last: int | None
    reason: str
    path: str = ""


class EventReader:
    """The events of a run, oldest generation first; iterate once, then look at ``gaps``.

    Within a generation the sources are merged by wall time, each in its own sequence. Reads one segment per
    source at a time. What a source never sealed at its end cannot be told from nothing.
    """

    def __init__(self, storage: Storage, *, since_generation: int = 0) -> None:
        self._storage = storage
        self._since = since_generation
        self.gaps: list[Gap] = []

    def __iter__(self) -> Iterator[Event]:
        self.gaps = []
        found = [
            (int(match[1]), match[0])
            for match in map(_DIRECTORY.fullmatch, self._storage.list("events"))
            if match
        ]
        for generation, directory in sorted(found):
            if generation >= self._since:
                sources = [
                    self._source(generation, name.rstrip("/").rpartition("/")[2])
                    for name in self._storage.list(directory.rstrip("/"))
                    if name.endswith("/")
                ]
                yield from heapq.merge(*sources, key=lambda event: (event.time, event.source))

    def _source(self, generation: int, source: str) -> Iterator[Event]:
        expected = 1
        for first, last, name in self._segments(generation, source):
            yet = max(first, expected)
            for event in self._lines(name, generation, source):
                if event.seq < expected:
                    continue  # shipped twice
                if event.seq > expected:
                    self._missing(source, generation, expected, event.seq - 1)
                expected = event.seq + 1
                yield event
            if expected <= last and yet <= last:
                self.gaps.append(Gap(source, generation, expected, last, "torn", name))
                expected = last + 1

    def _segments(self, generation: int, source: str) -> list[tuple[int, int, str]]:
        names = self._storage.list(f"events/g{generation}/{source}")
        return sorted(
            (int(match[1]), int(match[2]), match[0]) for match in map(_SEGMENT.fullmatch, names) if match
        )

    def _lines(self, name: str, generation: int, source: str) -> Iterator[Event]:
        try:
            data = self._storage.read(name)
        except FileNotFoundError:
            return  # the listing was stale; its numbers show up as a gap
        for line in data.splitlines(keepends=True):
            try:
                event = Event.from_json(json.loads(line)) if line.endswith(b"\n") else None
            except (ValueError, AttributeError, RecursionError):
                event = None
            if event is None or (event.source, event.generation) != (source, generation):
                self.gaps.append(Gap(source, generation, None, None, "torn", name))
            else:
                yield event

    def _missing(self, source: str, generation: int, first: int, last: int) -> None:
        self.gaps.append(Gap(source, generation, first, last, "missing"))


def read_events(storage: Storage, *, since_generation: int = 0) -> EventReader:
    """The events from ``since_generation`` on; after iterating, ``.gaps`` says what is torn or missing."""
    return EventReader(storage, since_generation=since_generation)
