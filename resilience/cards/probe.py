"""Which probe reads the cards of a node, and which of the machine's devices those cards are.

A card's index counts the Ray resource of its node from 0; Ray tells its worker by an environment variable which
devices these are. Where it says nothing, card i is device i.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from resilience.cards.health import HealthProbe

#: The variable by which an accelerator's runtime, and Ray, say which cards a process may use.
VISIBLE = {"GPU": "CUDA_VISIBLE_DEVICES", "NPU": "ASCEND_RT_VISIBLE_DEVICES"}


def devices(kind: str, cards: int, environ: Mapping[str, str] = os.environ) -> list[str]:
    """The driver's name of each card, by index: a number, or a UUID where that is what Ray was given."""
    named = [part.strip() for part in environ.get(VISIBLE.get(kind, ""), "").split(",") if part.strip()]
    return named if len(named) == cards else [str(index) for index in range(cards)]


def open_probe(kind: str, visible: list[str]) -> HealthProbe | None:
    """The probe for cards of the Ray resource ``kind``; ``None`` where there is nothing to read (simulated cards).

    Raises:
        UnavailableError: the vendor's library is not here, or finds no driver.
    """
    if kind == "GPU":
        from resilience.cards.nvidia import NvidiaCards

        return NvidiaCards(visible)
    if kind == "NPU":
        from resilience.cards.ascend import open_ascend

        return open_ascend(visible)
    return None
