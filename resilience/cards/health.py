"""What every source of card health answers: what is wrong with the cards of one node.

A probe says what it sees, once; what a code asks for is looked up in ``codes``, what is done is decided in
``control``. Unknown is not healthy: what a probe cannot read it names as a gap.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

T = TypeVar("T", bound=Hashable)


@dataclass(frozen=True)
class CardFault:
    """``index`` of the card on its node, the vendor's ``code``, and a sentence. ``affects``: indexes of cards that
    fail with it (the other die of the same card)."""

    index: int
    code: str
    detail: str = ""
    affects: tuple[int, ...] = ()


class HealthProbe(Protocol):
    """Health of the cards of one node. Called by one thread, which may hang in it: nothing else waits for it."""

    def poll(self) -> list[CardFault]:
        """Faults that appeared since the last call; on the first one, those that are there.

        Raises:
            UnavailableError: nothing can be read (any more): the driver is away. Polled again all the same.
        """

    def gaps(self) -> list[str]:
        """What cannot be read of otherwise readable cards, a sentence each, as far as known after the last poll."""


class Levels(Generic[T]):
    """Makes news of conditions that last: ``appeared`` returns those that were not there before.

    A condition that comes back within ``hold_s`` seconds is the same one (clocks go down and up with the heat).
    """

    def __init__(self, clock: Callable[[], float], hold_s: float = 0.0) -> None:
        self._clock = clock
        self._hold_s = hold_s
        self._seen: dict[T, float] = {}  # when it was last there
        self._looked_at = -1.0

    def appeared(self, now: Iterable[T]) -> list[T]:
        at, current = self._clock(), list(dict.fromkeys(now))
        self._seen = {
            what: last
            for what, last in self._seen.items()
            if last == self._looked_at or at - last < self._hold_s
        }
        new = [what for what in current if what not in self._seen]
        self._seen = {
            what: last for what, last in self._seen.items() if what in current or at - last < self._hold_s
        } | dict.fromkeys(current, at)
        self._looked_at = at
        return new
