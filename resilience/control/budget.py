"""How many failures in a row are allowed, and when the same card has failed too often. Pure.

Owns the counting. What refills the budget is progress only: a checkpoint committed since the last failure, or
a step begun beyond every earlier one. Restores that fail are not counted as long as each takes a checkpoint out
of the choice, so that they end by themselves; one that could not be read before, and is tried again, counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from resilience.control.state import Failures
from resilience.control.types import Assignment, Card, Incident, Policy

TWICE = 2  # the same card blamed this often in a row without progress is replaced
_TOLD = 16  # stories kept for the reason of a run that ends


def charge(
    failures: Failures,
    incident: Incident,
    step: int,
    table: Sequence[Assignment],
    policy: Policy,
    *,
    again: bool = False,
    reported: bool = False,
) -> tuple[Failures, frozenset[Card]]:
    """``failures`` with one more generation that failed at ``step``, and the cards to avoid from now on.

    ``again``: a restore of what could not be read before either. ``reported``: the card itself told of
    what a new process should clear.
    """
    if failures.committed or step > failures.step >= 0:
        failures = Failures(step=failures.step)
    failures = replace(failures, step=max(failures.step, step), committed=False)
    if incident.kind == "user" or (incident.kind == "restore" and not again):
        return failures, frozenset()
    story = f"generation {incident.generation} at step {step}: {incident.cause}"
    told = (*failures.story, story)[-min(_TOLD, policy.max_restarts + 1) :]
    blamed = dict(failures.blamed)
    avoid: frozenset[Card] = frozenset()
    likely = incident.kind in ("exit", "signal", "hang", "start") and incident.confidence >= 0.5
    on_card = reported or likely
    if on_card and incident.rank is not None and 0 <= incident.rank < len(table):
        card = table[incident.rank].card
        blamed = {card: blamed.get(card, 0) + 1}
        if blamed[card] >= TWICE:
            avoid = frozenset({card})
    return replace(failures, count=failures.count + 1, story=told, blamed=blamed), avoid
