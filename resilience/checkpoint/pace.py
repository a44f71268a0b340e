"""A bound on the rate of bytes that move in the background, so that what moves in front of them has room.

Owns the arithmetic of one budget in time. Must never let unused time be caught up with later: a burst after a pause
is what the bound is there to prevent.
"""

from __future__ import annotations

import time
from collections.abc import Callable


class Pace:
    """At most ``rate`` bytes a second, in the mean over each piece; ``None`` is no bound. For one thread.

    ``pace(count)`` is called after ``count`` bytes have moved, and returns when the next may.
    """

    def __init__(
        self,
        rate: float | None,
        *,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._rate, self._clock, self._sleep = rate, clock, sleep
        self._free = clock()  # when all bytes so far have had their time

    def __call__(self, count: int) -> None:
        if self._rate is None:
            return
        now = self._clock()
        # The time that these bytes took themselves counts; a pause before them does not.
        self._free = max(self._free, now - count / self._rate) + count / self._rate
        if self._free > now:
            self._sleep(self._free - now)
