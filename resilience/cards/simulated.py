"""Simulated cards: they have no hardware, and fail when they are told to."""

from __future__ import annotations

import queue

from resilience.cards.health import CardFault


class SimulatedCards:
    """A ``HealthProbe`` whose faults come from ``fail`` (chaos tests, the demo)."""

    def __init__(self) -> None:
        self._faults: queue.SimpleQueue[CardFault] = queue.SimpleQueue()

    def fail(self, index: int, code: str = "simulated", detail: str = "") -> None:
        self._faults.put(CardFault(index, code, detail))

    def poll(self) -> list[CardFault]:
        found = []
        while True:
            try:
                found.append(self._faults.get_nowait())
            except queue.Empty:
                return found

    def gaps(self) -> list[str]:
        return []
