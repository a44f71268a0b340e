"""Failpoints: named places in our own code where a planned fault is fired, by count, never by the clock.

A plan is data (``chaos.faults`` writes it); this module only matches and counts, and only when a plan is there:
an unarmed failpoint is one attribute test. The process that reaches a matching place asks its agent to carry
the fault out and waits, so that the fault is in the journal before it happens, and happens at that place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

POINTS: dict[str, tuple[str, ...]] = {
    "rank": ("step", "log", "snapshot.begin", "snapshot.copied", "snapshot.sealed", "restore.begin"),
    "writer": ("pack.chunk", "pack.done", "part.done", "drain.chunk", "drain.done"),
    "supervisor": ("commit.before", "commit.done", "fence.done", "ranks.started"),
}
"""Where faults can be fired, by the process that passes there."""

_MATCHED = ("rank", "step", "tier", "node", "generation")


class Failpoints:
    """The faults of a plan that this process may reach.

    Args:
        plan: faults as JSON objects, each with its ``index`` in the whole plan and ``at``: ``point``, any of
            ``rank, step, tier, node, generation`` (absent = any) and ``count`` (1 = the first time all match).
        fire: called with a fault when its place is reached; returns when it was carried out.
    """

    def __init__(self, plan: Sequence[dict[str, Any]], fire: Callable[[dict[str, Any]], None]) -> None:
        self._armed = [dict(fault) for fault in plan]
        self._seen: dict[int, int] = {}
        self._fire = fire

    def __bool__(self) -> bool:
        return bool(self._armed)

    def reach(self, point: str, **context: Any) -> None:
        """Say that this process is at ``point``; fires every fault whose count is reached here."""
        for fault in list(self._armed):
            at = fault["at"]
            if at["point"] != point:
                continue
            if any(at.get(key) is not None and at[key] != context.get(key) for key in _MATCHED):
                continue
            index = fault["index"]
            self._seen[index] = self._seen.get(index, 0) + 1
            if self._seen[index] < at.get("count", 1):
                continue
            self._armed.remove(fault)
            self._fire(fault)
