"""How long to wait between two looks at storage: short at first, longer when nothing comes."""

from __future__ import annotations


class Pause:
    """Seconds between looks; grows by half each time, up to ``longest``, until ``reset``."""

    shortest = 0.02

    def __init__(self, longest: float = 2.0) -> None:
        self._longest = longest
        self._now = self.shortest

    def next(self) -> float:
        now = self._now
        self._now = min(self._longest, 1.5 * now)
        return now

    def reset(self) -> None:
        self._now = self.shortest
