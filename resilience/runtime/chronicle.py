"""The supervisor's pen: writes the event journal in the background, so that storage never holds up a decision.

Events are sealed about once a second, at once when one is urgent. While storage is away they wait in memory,
bounded (``EventWriter`` says in the journal what it had to drop).
"""

from __future__ import annotations

import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any

from resilience.errors import ResilienceError
from resilience.journal.events import EventWriter
from storage_backends import Storage

_SEAL_EVERY_S = 1.0


class Chronicle:
    """Journal of one supervisor.

    Args:
        storage: rooted at the run.
        source: unique among all supervisors of the run.
        broken: called with the traceback of an error that is a bug of ours.
    """

    def __init__(self, storage: Storage, *, run: str, source: str, broken: Callable[[str], None]) -> None:
        self._storage = storage
        self._run = run
        self._source = source
        self._broken = broken
        self._writer = EventWriter(storage, run=run, generation=0, source=source)
        self._old: deque[EventWriter] = deque()
        self._queue: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._loop, name="journal", daemon=True)
        self._thread.start()
        self.failing: str | None = None

    def write(
        self, type: str, data: dict[str, Any] | None = None, *, urgent: bool = False, **subject: Any
    ) -> None:
        """Write one event, timed now. Returns at once."""
        self._queue.put(("event", (type, data or {}, subject, urgent, time.time())))

    def generation(self, number: int) -> None:
        """Events from here on belong to generation ``number``."""
        self._queue.put(("generation", number))

    def flush(self, timeout: float = 10.0) -> bool:
        """Wait until everything written so far is in storage (or has failed to get there)."""
        done = threading.Event()
        self._queue.put(("flush", done))
        return done.wait(timeout)

    def close(self) -> None:
        self.flush()
        self._queue.put(("close", None))
        self._thread.join(10)

    def _loop(self) -> None:
        try:
            self._work()
        except Exception:  # noqa: BLE001 - a bug of ours: it must end the run loudly, not this thread silently
            self._broken(traceback.format_exc())

    def _work(self) -> None:
        sealed = time.monotonic()
        while True:
            due = max(0.0, sealed + _SEAL_EVERY_S - time.monotonic())
            try:
                kind, value = self._queue.get(timeout=due)
            except queue.Empty:
                kind, value = "seal", None
            if kind == "event":
                type_, data, subject, urgent, at = value
                self._writer.emit(type_, data, time=at, **subject)
                if not urgent:
                    continue
            elif kind == "generation":
                self._old.append(self._writer)
                self._writer = EventWriter(
                    self._storage, run=self._run, generation=value, source=self._source
                )
            self._seal()
            sealed = time.monotonic()
            if kind == "flush":
                value.set()
            elif kind == "close":
                return

    def _seal(self) -> None:
        try:
            while self._old:
                self._old[0].seal()
                self._old.popleft()
            self._writer.seal()
            self.failing = None
        except ResilienceError as error:
            # Kept: the next seal tries again. The journal only tells the story; the live view shows this.
            self.failing = str(error)
