"""The slots of one rank: its arena, made anew when the state has grown, and the wait for a free one.

Owns the arena as the rank sees it. Used from one thread at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from resilience.checkpoint.arena import Arena, SlotKind
from resilience.checkpoint.part import draft
from resilience.checkpoint.plan import Plan
from resilience.checkpoint.snapshot import snapshot
from resilience.errors import ResilienceError, UnavailableError
from resilience.runtime.saves import ArenaKey

_SLOTS = 2
_TELL_AFTER_S = 1.0
_LOOK_EVERY_S = 0.001


class Slots:
    """Args:
    hand_over: called with each new arena's key and descriptor, which stays ours.
    """

    def __init__(self, *, generation: int, rank: int, hand_over: Callable[[ArenaKey, int], None]) -> None:
        self._generation, self._rank = generation, rank
        self._hand_over = hand_over
        self._arena: Arena | None = None
        self._count = 0

    @property
    def key(self) -> ArenaKey:
        return (self._generation, self._rank, self._count)

    def prepare(self, layout: Plan) -> Arena:
        """The arena, with slots large enough: all its memory is taken now. ``ExhaustedError`` if there is too
        little."""
        if self._arena is None or self._arena.slot_bytes < layout.size:
            self.close()  # the writer holds it as long as one of its slots waits
            self._arena = Arena.create(_SLOTS, layout.size)
            self._count += 1
            self._hand_over(self.key, self._arena.fd)
        return self._arena

    def fill(
        self,
        arrays: Mapping[str, Any],
        skeleton: Any,
        layout: Plan,
        *,
        run: str,
        step: int,
        threads: int,
        deadline: float,
        trained: Sequence[str],
        copying: Callable[[dict[str, Any]], None],
        slow: Callable[[], None],
        broken: Callable[[], ResilienceError | None],
    ) -> dict[str, Any]:
        """Take a snapshot into a free slot and seal it; what the writer has to be told of it.

        Args:
            trained: see ``checkpoint.trained``.
            copying: called with what the writer may be told while the copy goes on.
            slow: called once when no slot is free for a second.
            broken: why none will ever be, if that is so.
        """
        arena = self.prepare(layout)
        slot = self._acquire(arena, step, deadline, slow, broken)

        @cache
        def order() -> dict[str, Any]:
            """Made while the copy goes on, if that takes a while."""
            part = draft(layout, skeleton, run=run, step=step, generation=self._generation)
            return {"slot": slot, "step": step, "part": part.to_json(), "trained": list(trained)}

        def prepare() -> None:
            """The order is there before the seal: from then on only handing it over can fail."""
            order()

        try:
            snapshot(
                arena,
                slot,
                arrays,
                layout,
                step=step,
                generation=self._generation,
                threads=threads,
                announce=lambda attempt: copying({**order(), "attempt": attempt}),
                before_seal=prepare,
            )
        except BaseException:  # an interrupt, too: nobody would ever come back for the slot
            self.give_up(slot)
            raise
        return order()

    def give_up(self, slot: int) -> None:
        """What was to be saved there is not: the slot may be taken again."""
        if self._arena is None:
            return
        kind = self._arena.state(slot).kind
        if kind is SlotKind.WRITING:
            self._arena.abort(slot)
        elif kind is SlotKind.SEALED:
            self._arena.release(slot)

    def _acquire(
        self,
        arena: Arena,
        step: int,
        deadline: float,
        slow: Callable[[], None],
        broken: Callable[[], ResilienceError | None],
    ) -> int:
        begun = time.monotonic()
        told = False
        while (slot := arena.acquire()) is None:
            waited = time.monotonic() - begun
            error = broken()
            if error is not None:
                raise error
            if waited > deadline:
                raise UnavailableError(
                    f"no slot for a snapshot has come free in {deadline:g} s: storage is that far behind",
                    operation="save",
                    step=step,
                    hint="save less often, give nvme= a local disk, or give deadline= more seconds",
                )
            if not told and waited > _TELL_AFTER_S:
                told = True
                slow()
            time.sleep(
                _LOOK_EVERY_S
            )  # slot states are shared memory: there is nothing to wait on but their words
        return slot

    def close(self) -> None:
        if self._arena is not None:
            self._arena.close()
            self._arena = None
