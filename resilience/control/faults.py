"""What a card's fault asks for, and whether it is the card's at all. Pure.

Owns the scale of actions, and the memory of faults that judging one needs. Three rules: the same code on two or
more cards of the job within 30 s is software, and counts against no card; a code that has a ``limit`` counts, per
card, over a day; what a card was excluded for is remembered, so that it can be taken back. What then happens to
the run is decided in ``cards``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from resilience.control.events import CardFaulted
from resilience.control.types import Card

BURST_S = 30.0  # MindCluster's rule of software faults: a kernel that hangs, hangs on many cards at once
DAY_S = 86_400.0  # the window of MindCluster's frequency rules ("2 hits in 24 h")
REPEAT_S = 5.0  # the same code of the same card within this is one hit (XIDs come in showers)
_MOST = 4096  # faults remembered; far more than a day brings to the largest cluster


class Action(StrEnum):
    """What a fault code asks for, the mildest first."""

    WATCH = "watch"  # write it down; nothing else
    RESTART = "restart"  # the process must go, the card is good: new processes on the same cards
    DRAIN = "drain"  # the job may go on; the card is left at the next restart, where there is another
    RESET = "reset"  # the card is of no use until it has been reset, which is not ours to do: it is replaced
    REPLACE_CARD = "replace card"  # never again in this run
    REPLACE_NODE = "replace node"  # the card as above; the node's others only where nothing else is left

    @property
    def excludes(self) -> bool:
        """Whether the card is not used again in this run."""
        return self in (Action.RESET, Action.REPLACE_CARD, Action.REPLACE_NODE)

    @property
    def fails(self) -> bool:
        """Whether processes on the card cannot go on."""
        return self.excludes or self is Action.RESTART


@dataclass(frozen=True)
class Sighting:
    """One fault: the ``cards`` it hit, whether a rank ran there that may have caused it, and what was decided
    (``shunned``: cards that it made avoided)."""

    at: float
    code: str
    cards: frozenset[Card]
    action: Action
    ran: bool
    shunned: frozenset[Card] = frozenset()


@dataclass(frozen=True)
class Sightings:
    """Faults of the last day, oldest first; and ``software``: code → when it was last found to be software, and
    on which cards."""

    seen: tuple[Sighting, ...] = ()
    software: Mapping[str, tuple[float, frozenset[Card]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """``action`` to take for a fault; ``software``: it is not the card's, nothing is to be done, and ``cleared``
    and ``unshunned`` cards may be used again. ``hits``: how often this code hit this card today, with this one."""

    sightings: Sightings
    action: Action
    software: bool = False
    cleared: frozenset[Card] = frozenset()
    unshunned: frozenset[Card] = frozenset()
    hits: int = 1


def judge(
    sightings: Sightings, event: CardFaulted, action: Action, *, ran: bool, shuns: frozenset[Card]
) -> Verdict:
    """What ``event`` amounts to, after what was seen before.

    Args:
        action: what its code asks for.
        ran: whether a rank was placed on one of its cards. A fault of an idle spare is never software.
        shuns: further cards that it will make avoided.
    """
    now, code, cards = event.at, event.code, event.cards
    kept = [s for s in sightings.seen if now - s.at <= DAY_S][-_MOST:]
    software = {each: last for each, last in sightings.software.items() if now - last[0] <= BURST_S}
    alike = [s for s in kept if s.code == code]
    if ran and not event.certain:
        burst = [s for s in alike if s.ran and now - s.at <= BURST_S and _elsewhere(s, cards, action)]
        if burst or code in software:
            # Only the last is kept of those that follow: a burst over a whole cluster costs the same each. A card
            # that says it again and again does not keep the burst alive: then it is that card.
            last = software.get(code)
            software[code] = last if last is not None and last[1] == cards else (now, cards)
            kept = [s for s in kept if s not in burst]
            claimed = frozenset[Card]().union(*(s.cards for s in kept if s.action.excludes))
            hit = frozenset[Card]().union(*(s.cards for s in burst if s.action.excludes))
            shunned = frozenset[Card]().union(*(s.shunned for s in burst))
            seen = Sightings(tuple(kept), software)
            return Verdict(seen, Action.WATCH, True, hit - claimed, shunned)
    before = [s for s in alike if not s.cards.isdisjoint(cards)]
    repeated = bool(before) and now - before[-1].at <= REPEAT_S
    hits = len(before) + (not repeated)
    if event.limit is not None and hits >= event.limit and not action.excludes:
        action = Action.REPLACE_CARD
    if repeated and before[-1].action is action:
        return Verdict(Sightings(tuple(kept), software), action, hits=hits)
    seen = Sightings((*kept, Sighting(now, code, cards, action, ran and not event.certain, shuns)), software)
    return Verdict(seen, action, hits=hits)


def known(sightings: Sightings, code: str, cards: frozenset[Card]) -> bool:
    """Whether this very fault has put its cards out already, and only says so again."""
    return any(s.code == code and s.cards == cards and s.action.excludes for s in sightings.seen)


def _elsewhere(sighting: Sighting, cards: frozenset[Card], action: Action) -> bool:
    """Whether ``sighting`` is of other hardware. Two dies of one card, and two cards of a node that fails as a
    whole, are one piece."""
    if action is Action.REPLACE_NODE:
        return {card.node for card in sighting.cards}.isdisjoint(card.node for card in cards)
    return sighting.cards.isdisjoint(cards)
