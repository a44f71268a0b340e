"""Overlap: whether the next snapshot is copied while training goes on, or before it may. Pure.

Copying during the next forward and backward hides the wait but not the memory traffic: where cores or memory are
busy, the step slows down by more than the copy takes. Owns the comparison of the two, from the run's own times. Must
never rest on a single measurement.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from statistics import median

_KEPT = 16  # newest samples of each kind
_ENOUGH = 4  # samples of overlapped saves from which they are judged
_AGAIN = 64  # blocking saves after which overlap is tried once more
_TRIES = 2  # overlapped saves of such a trial


class Mode(StrEnum):
    BLOCKING = "blocking"
    OVERLAPPED = "overlapped"


@dataclass(frozen=True)
class Overlap:
    """What was measured, in seconds, newest last.

    Attributes:
        wanted: the mode that was asked for; ``blocking`` is never left.
        steps: of steps during which nothing was copied.
        waits: that training stood still for a blocking save.
        costs: of overlapped saves: what training stood still for, and what the step took longer than usual.
        trial: overlapped saves left of a trial; -1 while overlap has not been given up.
        since: blocking saves since it was.
    """

    wanted: Mode = Mode.BLOCKING
    steps: tuple[float, ...] = ()
    waits: tuple[float, ...] = ()
    costs: tuple[float, ...] = ()
    trial: int = -1
    since: int = 0

    @property
    def mode(self) -> Mode:
        """How to make the next snapshot."""
        if self.wanted is Mode.BLOCKING or not self.waits:
            return Mode.BLOCKING  # the first one shows what there is to hide
        return Mode.BLOCKING if self.trial == 0 else Mode.OVERLAPPED

    def step(self, seconds: float) -> Overlap:
        """A step took this long, and nothing was copied meanwhile."""
        return replace(self, steps=_add(self.steps, seconds))

    def blocked(self, seconds: float) -> Overlap:
        """A blocking save held training up for this long."""
        made = replace(self, waits=_add(self.waits, seconds))
        if self.trial == 0 and self.wanted is Mode.OVERLAPPED:
            made = replace(made, since=self.since + 1)
            if made.since >= _AGAIN:
                made = replace(made, since=0, trial=_TRIES, costs=())
        return made

    def overlapped(self, waited: float, step: float) -> Overlap:
        """An overlapped save held training up for ``waited``, and the step it ran in took ``step`` in all."""
        usual = median(self.steps) if self.steps else step - waited
        made = replace(self, costs=_add(self.costs, max(waited, step - usual)))
        if self.trial > 0:
            made = replace(made, trial=self.trial - 1)
        judged = len(made.costs) >= (_ENOUGH if self.trial < 0 else _TRIES)
        if not judged:
            return made
        worse = median(made.costs) > median(made.waits)
        return replace(made, trial=0 if worse else -1, since=0)


def _add(samples: tuple[float, ...], value: float) -> tuple[float, ...]:
    return (*samples, value)[-_KEPT:]
