"""What a fault of a card does to the run: nothing, a restart, or another card.

Owns the carrying out of ``faults``: cards go out of use and come back, ranks on them have failed. How a failure is
then recovered from is decided in ``recovery``.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from resilience.control import blame, faults, starting
from resilience.control.blame import Signal
from resilience.control.events import CardFaulted
from resilience.control.faults import Action, Verdict
from resilience.control.recovery import LIVE, fail, tell
from resilience.control.state import MOST_SIGNALS, Turn
from resilience.control.types import Card, Phase


def card_faulted(turn: Turn, event: CardFaulted) -> None:
    """A fault of a card was reported."""
    state, cards, action = turn.state, event.cards, Action(event.action)
    if action is Action.WATCH:
        _noticed(turn, event, "nothing is done for it" if event.name else "nobody knows this code")
        return
    if faults.known(state.sightings, event.code, cards):
        return
    ran = any(a.card in cards for a in state.table)
    shuns = _shuns(turn, event, action)
    verdict = faults.judge(state.sightings, event, action, ran=ran, shuns=shuns)
    turn.put(sightings=verdict.sightings)
    if verdict.software:
        _software(turn, event, verdict)
        return
    action = verdict.action
    out_already = cards <= state.cluster.excluded
    if not out_already:
        _record(turn, "card.faulted", event, {"action": action.value, "hits": verdict.hits})
    cluster = state.cluster
    for card in sorted(cards - cluster.excluded) if action.excludes else ():
        cluster = cluster.exclude(card)
    turn.put(cluster=replace(cluster, avoided=cluster.avoided | shuns))
    if action.fails and not out_already:
        _fail(turn, event, action)


def _fail(turn: Turn, event: CardFaulted, action: Action) -> None:
    state = turn.state
    hit = [a for a in state.table if a.card in event.cards]
    if not hit or (state.phase in LIVE and all(a.rank in state.pages.finished for a in hit)):
        return
    first = next((a for a in hit if a.card == event.card), hit[0])
    if action is Action.RESTART and state.phase not in LIVE:
        return  # its processes are being ended already
    signal = Signal(
        turn.now,
        event.at,
        blame.HARDWARE,
        "card",
        _cause(event),
        first.rank,
        first.card.node,
        str(event.card),
        action=action.value,
    )
    before = state.attempt
    fail(turn, signal)
    if action.excludes and turn.state.phase is Phase.FENCING and turn.state.attempt is before:
        starting.spoil(turn)


def _software(turn: Turn, event: CardFaulted, verdict: Verdict) -> None:
    """Another card of the job says the same: no card's fault. Nothing is ended for it: where a process is really
    hurt, it exits or hangs, and that is seen."""
    cluster = turn.state.cluster
    cleared = sorted(verdict.cleared & cluster.excluded)
    for card in cleared:
        cluster = cluster.readmit(card)
    turn.put(cluster=replace(cluster, avoided=cluster.avoided - verdict.unshunned))
    _noticed(turn, event, "the same code on several cards within 30 s is software")
    for card in cleared:
        reason = f"{event.code} was also reported by {event.card}: it is software, not the card"
        turn.record(
            "card.cleared",
            {"code": event.code, "reason": reason},
            node=card.node,
            card=str(card),
            urgent=True,
        )
    if any(str(card) == incident.card for card in cleared for incident in turn.state.open):
        cause = f"{event.code} was reported by several cards within 30 s, the last of them {event.card}"
        _correct(turn, cause, {str(card) for card in cleared})
    if cleared and turn.state.phase is Phase.WAITING:
        starting.wait(turn)


def _correct(turn: Turn, cause: str, cards: Collection[str]) -> None:
    """Open incidents that blame one of ``cards`` were not its fault: ``cause`` is what it was."""
    opened = []
    for incident in turn.state.open:
        if incident.kind == "card" and incident.card in cards:
            incident = replace(
                incident,
                cause=cause,
                rank=None,
                node=None,
                card=None,
                confidence=0.0,
                decision="restart",
                reason="the same fault on several cards at once is software: no card is to blame",
                signals=(*incident.signals, incident.cause)[:MOST_SIGNALS],
            )
            tell(turn, incident)
        opened.append(incident)
    turn.put(open=tuple(opened))


def _shuns(turn: Turn, event: CardFaulted, action: Action) -> frozenset[Card]:
    """Cards that are used only where nothing else is left from now on."""
    cluster = turn.state.cluster
    if action is Action.DRAIN:
        return event.cards - cluster.avoided
    if action is Action.REPLACE_NODE:
        node = cluster.nodes.get(event.card.node)
        others = {Card(event.card.node, index) for index in range(node.cards if node else 0)}
        return frozenset(others - event.cards - cluster.avoided)
    return frozenset()


def _noticed(turn: Turn, event: CardFaulted, why: str) -> None:
    _record(turn, "card.noticed", event, {"why": why})


def _record(turn: Turn, type_: str, event: CardFaulted, more: dict[str, object]) -> None:
    data: dict[str, object] = {"code": event.code, "detail": event.detail, "name": event.name}
    if event.affects:
        data["affects"] = [str(card) for card in event.affects]
    data |= {"source": event.source, **more}
    turn.record(type_, data, node=event.card.node, card=str(event.card))


def _cause(event: CardFaulted) -> str:
    told = " ".join(part for part in (event.code, f"({event.name})" if event.name else "") if part)
    by = "" if event.source == "driver" else f" by {event.source}"
    what = f"card {event.card} was reported{by} with {told}" if by else f"card {event.card} reported {told}"
    return what + (f": {event.detail}" if event.detail else "")
