"""Reading a slot while its rank still copies into it, so that the disk is busy from the first bytes on.

Owns the rule that nothing counts before the seal: what was read on the way is worth something only after ``sealed``
has returned for the very attempt that was followed. Must never wait for a rank that does not move: whatever it
is that holds it up, the slot can be read later, or never will be.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from resilience.checkpoint.arena import Arena, SlotKind

_PATIENCE_S = 1.0  # without progress; a copy moves gigabytes a second
_LOOK_EVERY_S = 0.0003  # 4 MiB are copied in about as long


class Torn(Exception):
    """The copy that was followed came to nothing, or stands still: forget what was read of it."""


class Source(Protocol):
    """Tells a reader of a slot how far it may read. Both raise ``Torn``."""

    def until(self, end: int) -> None:
        """Return when the bytes before ``end`` are there to stay."""

    def sealed(self) -> None:
        """Return when all of the slot is a whole snapshot."""


class Sealed:
    """Of a slot that was sealed before."""

    def until(self, end: int) -> None:
        return None

    def sealed(self) -> None:
        return None


class Following:
    """Of a slot that is being copied into, perhaps by another process.

    Args:
        attempt: of ``arena.state(slot)`` as the rank announced it.
        step, generation: that it will be sealed with.
        abandoned: whether to stop at once.
    """

    def __init__(
        self,
        arena: Arena,
        slot: int,
        *,
        attempt: int,
        step: int,
        generation: int,
        abandoned: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._arena, self._slot, self._attempt = arena, slot, attempt
        self._identity = (step, generation)
        self._abandoned, self._clock, self._sleep = abandoned, clock, sleep
        self._known = 0  # bytes that are there to stay

    def until(self, end: int) -> None:
        if self._known < end:
            self._wait(end)

    def sealed(self) -> None:
        self._wait(None)

    def _wait(self, end: int | None) -> None:
        moved = self._clock()
        while True:
            state = self._arena.state(self._slot)
            if state.attempt != self._attempt:
                raise Torn("the slot was taken again")
            if state.kind is SlotKind.SEALED and (state.step, state.generation) == self._identity:
                self._known = self._arena.slot_bytes
                return
            if state.kind is not SlotKind.WRITING:
                raise Torn(f"the slot is {state.kind.name}")
            if state.copied > self._known:
                self._known, moved = state.copied, self._clock()
            if end is not None and self._known >= end:
                return
            if self._abandoned() or self._clock() - moved > _PATIENCE_S:
                raise Torn(f"the copy stands still after {self._known:,} bytes")
            self._sleep(_LOOK_EVERY_S)
