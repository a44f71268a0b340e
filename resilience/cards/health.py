"""What every source of card health answers: which cards must not be used any more, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class CardFault:
    """``index`` of the card on its node, the vendor's ``code``, and a sentence."""

    index: int
    code: str
    detail: str = ""


class HealthProbe(Protocol):
    """Health of the cards of one node. Polled about once a second, so it must return quickly."""

    def poll(self) -> list[CardFault]:
        """Faults that appeared since the last call."""
