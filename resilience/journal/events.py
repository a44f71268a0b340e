"""The event journal: the story of a run, told in sealed segments of JSON lines. No decision ever reads it.

Owns ``events/g<generation>/<source>/<first>-<last>.jsonl``: each segment is created once and never changed; a
source numbers its events from 1 without a gap, in each generation anew. Losing all of it loses no training;
so telling must
never block training: ``emit`` does no I/O, and what cannot be written stays buffered up to a limit.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from resilience.errors import FencedError, InvalidError
from resilience.journal.event import TYPES, Event, segment_name
from resilience.journal.event_reader import EventReader, Gap, read_events
from storage_backends.base import Storage

__all__ = ["TYPES", "Event", "EventReader", "EventWriter", "Gap", "read_events", "segment_name"]

_SOURCE = re.compile(r"[a-z0-9-]+")
_SEVERITIES = ("info", "warning", "error")


class EventWriter:
    """Numbers and buffers the events of one source in one generation; ``seal`` writes them out. Thread-safe.

    One process at a time writes a source of a generation: the supervisor makes its writer when it has won its
    fence.

    Args:
        storage: rooted at the run.
        clock: seconds since the epoch; mono_ns: monotonic nanoseconds.
        seal_count: events from which ``due`` says that a seal is worth its write.
        limit: events kept while storage is away; beyond it the oldest are dropped and the loss is told.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        run: str,
        generation: int,
        source: str,
        clock: Callable[[], float] = time.time,  # noqa: TID251 - the story is told in wall time, decisions are not
        mono_ns: Callable[[], int] = time.monotonic_ns,
        seal_count: int = 512,
        limit: int = 65536,
    ) -> None:
        if not _SOURCE.fullmatch(source):
            raise InvalidError(f"{source!r} cannot be a source", operation="events", hint="use [a-z0-9-]+")
        if not 1 <= seal_count <= limit:
            raise InvalidError(
                f"seal_count {seal_count} must be in 1..{limit}", operation="events", hint="lower it"
            )
        self._storage, self._run, self._generation, self._source = storage, run, generation, source
        self._clock, self._mono_ns = clock, mono_ns
        self._seal_count, self._limit = seal_count, limit
        self._lock = threading.Lock()  # the buffers; never held during I/O
        self._sealing = threading.Lock()
        self._seq = 0
        self._buffer: list[tuple[int, bytes]] = []
        self._batch: list[tuple[int, bytes]] = []  # offered to storage; outcome not known
        self._lost: list[tuple[int, int]] = []  # dropped, not told yet
        self.dropped = 0

    @property
    def pending(self) -> int:
        """Events not known to be in storage."""
        with self._lock:
            return len(self._batch) + len(self._buffer)

    @property
    def due(self) -> bool:
        """Whether enough is pending to seal now rather than at the next tick."""
        return self.pending >= self._seal_count

    def emit(
        self,
        type: str,
        data: Mapping[str, Any] | None = None,
        *,
        rank: int | None = None,
        node: str | None = None,
        card: str | None = None,
        step: int | None = None,
        cause: str | None = None,
        severity: str = "info",
        time: float | None = None,
    ) -> str:
        """Buffer an event and return its id. No I/O. ``time`` (epoch seconds) when it happened, default now.

        ``InvalidError`` for an unknown type or severity, or data that is not a JSON object.
        """
        _one_of("event type", type, TYPES)
        _one_of("severity", severity, _SEVERITIES)
        moment = self._clock() if time is None else time
        mono_ns = self._mono_ns()
        names = (
            None if rank is None else f"rank-{rank}",
            card,
            node,
            None if step is None else f"step-{step}",
        )
        subject = next((name for name in names if name is not None), self._run)
        plain = _plain(dict(data or {}), type)
        with self._lock:
            seq = self._seq + 1
            event = Event(
                id=f"{self._source}/{self._generation}/{seq}",
                source=self._source,
                type=type,
                time=datetime.fromtimestamp(moment, UTC)
                .isoformat(timespec="microseconds")
                .replace("+00:00", "Z"),
                mono_ns=mono_ns,
                run=self._run,
                generation=self._generation,
                seq=seq,
                subject=subject,
                data=plain,
                rank=rank,
                node=node,
                card=card,
                step=step,
                cause=cause,
                severity=severity,
            )
            line = json.dumps(event.to_json(), separators=(",", ":"), allow_nan=False).encode() + b"\n"
            self._seq = seq
            self._buffer.append((seq, line))
            if len(self._buffer) > self._limit:
                self._drop(len(self._buffer) // 4)
            return event.id

    def seal(self) -> None:
        """Write what is pending as create-only segments; returns when it is durable.

        ``UnavailableError`` (and any other error of storage) leaves everything pending: call again later, the
        same bytes go to the same name. ``FencedError`` when another process has written these sequence
        numbers.
        """
        with self._sealing:
            while True:
                with self._lock:
                    if not self._batch:
                        # Frozen from here on: after a lost reply the same bytes must go to the same name.
                        self._batch, self._buffer = self._buffer, []
                    batch = self._batch
                    lost, self._lost = ([], self._lost) if batch else (self._lost, [])
                for first, last in lost:  # told when there is room again
                    message = (
                        f"events {first}..{last} of {self._source} were dropped: storage was away too long"
                    )
                    self.emit("warning.raised", {"message": message}, severity="warning")
                if lost:
                    continue
                if not batch:
                    return
                name = segment_name(self._generation, self._source, batch[0][0], batch[-1][0])
                held = self._storage.create(name, b"".join(line for _, line in batch))
                if held is not None:
                    raise FencedError(
                        f"another process is source {self._source!r} of generation {self._generation}",
                        operation="events",
                        path=name,
                        generation=self._generation,
                        hint="one process at a time is a source: this one must stop",
                    )
                with self._lock:
                    self._batch = []

    def _drop(self, count: int) -> None:
        """Forget the oldest of the buffer. Not of the batch: it may have landed already."""
        first, last = self._buffer[0][0], self._buffer[count - 1][0]
        del self._buffer[:count]
        self.dropped += count
        if self._lost and self._lost[-1][1] == first - 1:
            first = self._lost.pop()[0]
        self._lost.append((first, last))


def _plain(data: dict[str, Any], type: str) -> dict[str, Any]:
    """``data`` as JSON will give it back; numbers JSON has no form for become strings."""
    try:
        value = json.loads(json.dumps(_finite(data), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidError(
            f"the data of a {type} event is not JSON: {error}",
            operation="events",
            hint="use only strings, numbers, booleans, None, lists and dicts",
        ) from error
    assert isinstance(value, dict)
    return value


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _one_of(what: str, given: str, allowed: frozenset[str] | tuple[str, ...]) -> None:
    if given not in allowed:
        near = difflib.get_close_matches(given, allowed, n=1, cutoff=0.0)
        raise InvalidError(
            f"{given!r} is no {what}", operation="events", hint=f"did you mean {near[0]!r}?" if near else None
        )
