"""Watching a node's cards without ever being held up by them.

A driver's call about a sick card can hang for minutes. So one thread does nothing but ask; whoever else wants to
know whether it still answers looks at a clock. A probe that does not answer is news, not a verdict.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from resilience.cards.health import CardFault, HealthProbe
from resilience.errors import UnavailableError

POLL_S = 1.0
ANSWER_S = 10.0  # without an answer for so long, it is told
QUIET_S = 60.0  # a card that says the same over and over is heard ever more seldom, down to this often
REOPEN_S = 60.0  # a driver that is not there is looked for again so often


T = TypeVar("T")


class HealthWatch:
    """Polls a probe once a second in a thread of its own.

    Args:
        open_probe: makes the probe, in that thread; ``UnavailableError``: told once, tried again each minute.
            ``None``: there is nothing to watch.
        fault: called with every fault; ``warn`` with what people should know of the watching itself. Both in that
            thread, so they must not block.
        clock: seconds; ``poll_s`` between two polls.
    """

    def __init__(
        self,
        open_probe: Callable[[], HealthProbe | None],
        fault: Callable[[CardFault], None],
        warn: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        poll_s: float = POLL_S,
    ) -> None:
        self._open = open_probe
        self._fault = fault
        self._warn = warn
        self._clock = clock
        self._poll_s = poll_s
        self._look = threading.Event()
        self._closing = threading.Event()
        self._asked_at: float | None = None  # when the call that is going on began
        self._silent = False
        self._told: set[str] = set()
        self._last: dict[
            tuple[int, str], tuple[float, float]
        ] = {}  # when it was told, and when again at the soonest
        self._thread = threading.Thread(target=self._run, name="card health", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def look(self) -> None:
        """Poll now: something has happened that the cards may explain."""
        self._look.set()

    def check(self) -> None:
        """Called now and then by another thread, never blocks: tells if the probe has not answered for long."""
        asked_at = self._asked_at
        late = asked_at is not None and self._clock() - asked_at > ANSWER_S
        if late and not self._silent:
            self._silent = True
            self._warn(
                f"the driver has not answered for {ANSWER_S:g} s: the health of this node's cards is unknown; "
                "a card that makes it hang may be about to fail"
            )
        elif not late and self._silent:
            self._silent = False
            self._warn("the driver answers again: the health of this node's cards is known")

    def close(self) -> None:
        """Ask no more. Does not wait for a call that hangs: the thread dies with the process."""
        self._closing.set()
        self._look.set()

    def _run(self) -> None:
        probe: HealthProbe | None = None
        while not self._closing.is_set():
            try:
                if probe is None:
                    probe = self._timed(self._open)
                    if probe is None:
                        return
                for fault in self._timed(probe.poll):
                    self._tell(fault)
                for gap in probe.gaps():
                    self._once(f"card health, in part: {gap}")
                pause = self._poll_s
            except UnavailableError as error:
                self._once(f"card health cannot be read: {error}")
                pause = self._poll_s if probe is not None else REOPEN_S
            except Exception as error:  # noqa: BLE001 - a driver that answers nonsense must not end the watching
                self._once(f"card health cannot be read: {type(error).__name__}: {error}")
                pause = self._poll_s if probe is not None else REOPEN_S
            self._look.wait(pause)
            self._look.clear()

    def _timed(self, call: Callable[[], T]) -> T:
        self._asked_at = self._clock()
        try:
            return call()
        finally:
            self._asked_at = None

    def _tell(self, fault: CardFault) -> None:
        now, key = self._clock(), (fault.index, fault.code)
        told, after = self._last.get(key, (-QUIET_S, 0.0))
        if now - told < after:
            return
        # At first every poll: a fault that comes again right after a restart explains the next failure.
        self._last[key] = (now, min(QUIET_S, max(self._poll_s, 2 * after)) if now - told < QUIET_S else 0.0)
        self._fault(fault)

    def _once(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            self._warn(message)
