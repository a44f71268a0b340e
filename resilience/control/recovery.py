"""From a sign of failure to the next attempt: settle, blame, decide, end the old ranks, drain.

Owns the life of an incident up to the decision. One failure is one incident: what else is seen before new
ranks have started is part of it, and may correct its blame. A failure of ranks that have started is an
incident of its own, and both are over when the world steps again. Every decision is in the journal before
anything is done about it.
"""

from __future__ import annotations

from dataclasses import replace

from resilience.control import blame, budget, progress, starting
from resilience.control.blame import Signal
from resilience.control.commands import Quarantine
from resilience.control.ending import complete, end_ranks, finish, saved
from resilience.control.events import NodeLost, RankExited, RestoreFailed
from resilience.control.faults import Action
from resilience.control.retention import SHARED, remove
from resilience.control.starting import subject
from resilience.control.state import MOST_SIGNALS, Drain, State, Trouble, Turn
from resilience.control.types import Incident, Outcome, Phase, Result

LIVE = (Phase.STARTING, Phase.RUNNING, Phase.STOPPING)
TRIES = 2  # restarts for a fault that a card and the user's exception both claim: in place, and elsewhere
_SIGKILL = 9
_OUT: dict[str, tuple[str, str]] = {
    Action.RESET: ("replace card", "the card must be reset before it can be used again"),
    Action.REPLACE_NODE: ("replace node", "the card is gone until its node is restarted"),
}


def node_lost(turn: Turn, *events: NodeLost) -> None:
    """Nodes are gone, with their cards and whatever ran there."""
    lost = [event for event in events if event.name in turn.state.cluster.nodes]
    attempt = turn.state.attempt
    for event in lost:
        state = turn.state
        turn.record("node.lost", {"reason": event.reason}, node=event.name)
        turn.put(cluster=state.cluster.lose(event.name), running=state.running.without(event.name))
    for event in lost:
        state = turn.state
        ranks = [assignment.rank for assignment in state.table if assignment.card.node == event.name]
        # A node all of whose ranks have finished matters only while it holds bytes that are nowhere else yet.
        over = state.phase in LIVE and all(rank in state.pages.finished for rank in ranks) and saved(turn)
        if ranks and not over:
            cause = f"node {event.name} was lost: {event.reason}"
            failed_at = min(turn.now, event.last_seen)
            fail(turn, Signal(turn.now, failed_at, blame.HARDWARE, "node", cause, None, event.name))
    state = turn.state
    if state.phase is not Phase.FENCING or not lost:
        return
    _narrow(turn)
    gone = {event.name for event in lost}
    if attempt is state.attempt and attempt is not None and gone & {*attempt.nodes, attempt.store_node}:
        starting.spoil(turn)
    else:
        drained(turn)
        starting.start(turn)


def rank_exited(turn: Turn, event: RankExited) -> None:
    """A process of the current generation ended. After its function returned, or by our own hand, that is no
    news."""
    state = turn.state
    card = state.card_of(event.rank)
    if card is None or event.rank in state.pages.finished:
        return
    ours = state.phase not in LIVE and event.exit.signal in (_SIGKILL, None) and not event.exit.error
    if ours:
        return
    if state.trouble is not None and event.rank in state.trouble.exited:
        return
    if event.step is not None and state.phase in LIVE:
        turn.put(pages=progress.reach(state.pages, event.step, event.at))
    turn.record(
        "rank.exited",
        {
            "code": event.exit.code,
            "signal": event.exit.signal,
            "error": event.exit.error,
            "output": event.exit.output,
        },
        rank=event.rank,
        node=card.node,
        card=str(card),
        step=event.step if event.step is not None else state.pages.top,
    )
    fail(turn, blame.exited(turn.now, event.rank, event.exit, node=card.node, card=str(card)))


def restore_failed(turn: Turn, event: RestoreFailed) -> None:
    """A checkpoint cannot be restored: never chosen again, and quarantined in the log when its bytes are
    wrong."""
    state = turn.state
    place = (event.ref, event.tier)
    if place not in state.damaged or state.phase in LIVE:
        data = {"tier": event.tier, "reason": event.reason}
        turn.record("restore.failed", data, rank=event.rank, step=event.ref.step)
    if event.corrupt and place not in state.damaged:
        turn.put(
            damaged={**state.damaged, place: event.reason}, kept=remove(state.kept, event.ref, event.tier)
        )
        where = {"tier": event.tier, "reason": event.reason, "generation": event.ref.generation}
        turn.record("checkpoint.quarantined", where, step=event.ref.step, urgent=True)
        turn.do(Quarantine(event.ref, event.tier, event.reason))
    elif not event.corrupt and state.phase in LIVE:
        turn.put(unread={**state.unread, place: event.reason})
    card = state.card_of(event.rank)
    cause = f"{event.ref} could not be restored from the {event.tier} tier: {event.reason}"
    node = card.node if card else None
    again = not event.corrupt and place in state.unread
    signal = Signal(
        turn.now, event.at, blame.RESTORE, "restore", cause, event.rank, node, confidence=0.0, again=again
    )
    fail(turn, signal)


def fail(turn: Turn, signal: Signal) -> None:
    """Something says that the current generation has failed."""
    state = turn.state
    if state.finishing is not None:
        return  # every rank has returned and what they saved is safe: nothing is left that could fail
    if state.phase in LIVE:
        turn.put(trouble=(state.trouble or Trouble(turn.now + blame.SETTLE_S)).add(signal))
        if signal.strength >= blame.DECISIVE:
            verdict(turn)
    elif state.open and state.phase is not Phase.DONE:
        _attach(turn, signal)


def settle(turn: Turn) -> None:
    """A tick while signs wait for a better explanation."""
    trouble = turn.state.trouble
    if trouble is not None and turn.now >= trouble.until:
        verdict(turn)


def verdict(turn: Turn) -> None:
    """Blame, decide, write both down, then act."""
    state = turn.state
    assert state.trouble is not None
    signal = blame.culprit(state.trouble.signals)
    others = tuple(dict.fromkeys(each.cause for each in state.trouble.signals if each is not signal))
    unexplained = signal.strength == blame.CONNECTION
    first = min(state.trouble.signals, key=lambda each: each.at)
    incident = Incident(
        id=f"{state.generation}-{state.counted + 1}",
        kind="exit" if unexplained else signal.kind,
        cause=f"{signal.cause}; nothing is known to have ended it" if unexplained else signal.cause,
        generation=state.generation,
        rank=None if unexplained else signal.rank,
        node=None if unexplained else signal.node,
        card=None if unexplained else signal.card,
        confidence=signal.confidence,
        step_failed=state.pages.top,
        step_began=state.pages.first if state.open else 0,
        at={"failed": min(each.failed_at for each in state.trouble.signals), "detected": first.at},
        signals=others,
    )
    failures, avoid = budget.charge(
        state.failures,
        incident,
        state.pages.top,
        state.table,
        state.policy,
        again=signal.again,
        reported=signal.action == Action.RESTART,
    )
    turn.put(failures=failures, cluster=replace(state.cluster, avoided=state.cluster.avoided | avoid))
    decision, reason, end = _decide(turn, incident, signal, bool(avoid))
    incident = replace(incident, decision=decision, reason=reason, at={**incident.at, "decided": turn.now})
    turn.record(
        "incident.detected",
        {
            "incident": incident.id,
            "kind": incident.kind,
            "cause": incident.cause,
            "confidence": incident.confidence,
            "step": incident.step_failed,
        },
        **subject(incident),
        urgent=True,
    )
    tell(turn, incident)
    turn.record("generation.ended", {"reason": incident.cause, "steps": state.pages.top})
    turn.put(open=(*state.open, incident), counted=state.counted + 1, believed=signal.strength)
    stop_all(turn, end)


def stop_all(turn: Turn, end: Outcome | None) -> None:
    """End every rank, then wait for what can still be committed; after that ``end``, or a new attempt."""
    state = turn.state
    turn.do(*end_ranks(turn))
    turn.put(
        phase=Phase.FENCING,
        attempt=None,
        trouble=None,
        ending_at=None,
        drain=Drain(turn.now + state.policy.drain_deadline_s, _worth(turn), end),
    )
    drained(turn)


def drained(turn: Turn) -> None:
    """While draining: go on when nothing is left to wait for, or it has taken too long."""
    state = turn.state
    drain = state.drain
    if drain is None:
        return
    steps = state.saves.steps
    left = any(step in steps and _moving(turn, step) for step in drain.steps) or state.saves.outstanding()
    if left and turn.now < drain.until:
        return
    turn.put(drain=None)
    _abandon(turn)
    if drain.end is not None:
        finish(turn, drain.end)
    else:
        starting.begin(turn)


def _decide(turn: Turn, incident: Incident, signal: Signal, avoided: bool) -> tuple[str, str, Outcome | None]:
    """Decision, reason, and the outcome if the run ends."""
    state = turn.state
    if state.stopping is not None:
        reason = f"{state.stopping.reason}; while stopping, {incident.cause}"
        return (
            "stop",
            "a clean stop was under way",
            Outcome(Result.INTERRUPTED, reason, signal.rank, signal.exit),
        )
    if incident.kind == "user":
        reason = "an exception of the training function itself: another card would not help"
        return "stop", reason, Outcome(Result.USER_ERROR, incident.cause, signal.rank, signal.exit)
    if state.failures.count > state.policy.max_restarts:
        story = "; ".join(state.failures.story)
        reason = (
            f"{state.failures.count} generations failed without a new checkpoint or a new step "
            f"(max_restarts={state.policy.max_restarts}): {story}"
        )
        end = Outcome(Result.BUDGET_EXHAUSTED, reason, signal.rank, signal.exit)
        return "stop", "the budget of restarts is used up", end
    raised = _raised(state.trouble) if signal.action == Action.RESTART else None
    if raised is not None and state.failures.count > TRIES and _elsewhere(state, signal):
        # The driver reports what a bad pointer does, too: with new processes and another card it is the code.
        reason = f"the function fails, and {TRIES} restarts did not help; the last time, {incident.cause}"
        return "stop", reason, Outcome(Result.USER_ERROR, raised.cause, raised.rank, raised.exit)
    if incident.kind == "restore":
        return "restore older", "the chosen checkpoint cannot be restored", None
    if avoided and state.cluster.unblemished < len(state.table):
        return "restart", f"card {incident.card} failed twice in a row, but there is no spare for it", None
    return (*_rung(incident, avoided, signal.action), None)


def _raised(trouble: Trouble | None) -> Signal | None:
    """The exception of the user's function among the signs, if there is one."""
    signals = trouble.signals if trouble is not None else ()
    return next((each for each in signals if each.kind == "user"), None)


def _elsewhere(state: State, signal: Signal) -> bool:
    """Whether another card than the one of ``signal`` has had such a fault too."""
    others = (s.cards for s in state.sightings.seen if s.action is Action.RESTART)
    return any(signal.card not in {str(card) for card in cards} for cards in others)


def _rung(incident: Incident, avoided: bool, action: str) -> tuple[str, str]:
    if incident.kind == "card" and action != Action.RESTART:
        return _OUT.get(action, ("replace card", "the card reported a fault"))
    if incident.kind == "card" and not avoided:
        return "restart", "what the card reported ends with the process; the card itself is good"
    if incident.kind == "node":
        return "replace node", "the node is gone with its cards"
    if avoided:
        return "replace card", f"card {incident.card} failed twice in a row without progress"
    if incident.rank is None:
        return "restart", "no card is to blame"
    return "restart", "a first failure of this process is no proof against its card"


def _attach(turn: Turn, signal: Signal) -> None:
    """One more sign of the newest incident; a stronger one corrects the blame."""
    state = turn.state
    incident = state.open[-1]
    if signal.cause not in (incident.cause, *incident.signals):
        incident = replace(incident, signals=(*incident.signals, signal.cause)[:MOST_SIGNALS])
    ends = state.drain is not None and state.drain.end is not None
    if signal.strength > max(state.believed, blame.USER) and incident.kind != "restore" and not ends:
        incident = replace(
            incident,
            kind=signal.kind,
            cause=signal.cause,
            rank=signal.rank,
            node=signal.node,
            card=signal.card,
            confidence=signal.confidence,
            signals=(*(each for each in incident.signals if each != signal.cause), incident.cause),
            at={**incident.at, "failed": min(incident.at["failed"], signal.failed_at)},
        )
        decision, reason = _rung(incident, False, signal.action)
        incident = replace(incident, decision=decision, reason=reason)
        tell(turn, incident)
        turn.put(believed=signal.strength)
    turn.put(open=(*state.open[:-1], incident))


def tell(turn: Turn, incident: Incident) -> None:
    """Write down what is decided about an incident."""
    data = {"incident": incident.id, "decision": incident.decision, "reason": incident.reason}
    turn.record("incident.decided", data, **subject(incident), urgent=True)


def _worth(turn: Turn) -> frozenset[int]:
    """Steps whose saves every rank has sealed, no tier has committed, and living nodes can still complete."""
    saves = turn.state.saves
    return frozenset(
        step
        for step, save in saves.steps.items()
        if saves.sealed(step) and not save.committed() and not save.closed
    )


def _moving(turn: Turn, step: int) -> bool:
    """Whether the save of ``step`` may still be committed."""
    state = turn.state
    save = state.saves.steps[step]
    if save.committed():
        return False
    gone = [a.rank for a in state.table if a.card.node not in state.cluster.nodes]
    tiers = save.tiers
    if all(tier.failed for tier in tiers.values()) and tiers:
        return False
    if not gone:
        return True
    # Packs on a lost node's nvme are no use: only the shared tier counts, and only if it has those ranks
    # already.
    shared = tiers.get(SHARED)
    return shared is not None and not shared.failed and all(rank in shared.ranks for rank in gone)


def _narrow(turn: Turn) -> None:
    drain = turn.state.drain
    if drain is not None:
        turn.put(drain=replace(drain, steps=drain.steps & _worth(turn)))


def _abandon(turn: Turn) -> None:
    """The next fence ends what the old generation had under way."""
    saves = turn.state.saves
    orphans = set(turn.state.orphans)
    for save in saves.steps.values():
        orphans.update((save.ref, name) for name, tier in save.tiers.items() if tier.asked and not tier.done)
        if not save.committed() and not save.closed:
            reason = "its generation ended before every rank's part was durable"
            turn.record("checkpoint.abandoned", {"reason": reason}, step=save.ref.step)
    turn.put(orphans=frozenset(orphans))


def quiet(turn: Turn) -> None:
    """Whether a run whose ranks have all finished is over."""
    if turn.state.phase in LIVE and turn.state.trouble is None:
        complete(turn)
