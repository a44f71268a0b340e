"""From enough cards to ranks that step: waiting, placement, fence, store, restore, start.

Owns the gate that everything safe depends on: ranks start only when the new generation is won in the log, the
store listens, and no process of an older generation is left on any living node.

A fence may answer with a higher number than was asked for (the log had moved on). The ranks then run under
that number, while the store asked for under the first one still serves: nothing but this attempt knows its
address.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from resilience.control import cadence, placement, progress, restore, retention
from resilience.control.commands import Fence, OpenStore, StartRanks
from resilience.control.ending import finish
from resilience.control.events import Fenced, Restored, StoreReady
from resilience.control.ledger import lost_steps, phases
from resilience.control.persistent import Ranks
from resilience.control.saves import Saves
from resilience.control.state import Attempt, Running, Turn, Waiting
from resilience.control.types import Incident, Outcome, Phase, Result

GRACE_S = 5.0  # before the first generation: spares that join a moment later may give a better topology


def wait(turn: Turn) -> None:
    """In ``WAITING``: begin when there are cards, give up at the deadline."""
    state = turn.state
    waiting = state.waiting
    if state.phase is not Phase.WAITING or waiting is None:
        return
    policy, available = state.policy, state.cluster.available
    if available >= policy.workers:
        enough_at = turn.now if waiting.enough_at is None else waiting.enough_at
        first = state.generation == 0 and not state.open
        if available >= policy.workers + policy.spares or not first or turn.now - enough_at >= GRACE_S:
            if waiting.told >= 0:
                turn.record("capacity.found", {"needed": policy.workers, "available": available})
            begin(turn)
        elif waiting.enough_at is None:
            turn.put(waiting=replace(waiting, enough_at=enough_at))
    elif waiting.enough_at is not None:
        turn.put(waiting=replace(waiting, enough_at=None))


def wait_longer(turn: Turn) -> None:
    """A tick in ``WAITING``: the journal learns what is missing, the deadline is judged."""
    wait(turn)
    state = turn.state
    waiting = state.waiting
    if state.phase is not Phase.WAITING or waiting is None:
        return
    policy, available = state.policy, state.cluster.available
    if available >= policy.workers:
        return
    deadline_s = policy.capacity_deadline_s
    if turn.now - waiting.since >= deadline_s:
        reason = f"{policy.workers} cards are needed, {available} are there; waited {deadline_s:g} s for more"
        finish(turn, Outcome(Result.NO_CAPACITY, reason))
    elif waiting.told != available:
        data = {"needed": policy.workers, "available": available, "deadline_s": deadline_s}
        turn.record("capacity.waiting", data, urgent=waiting.told < 0)
        turn.put(waiting=replace(waiting, told=available))


def begin(turn: Turn) -> None:
    """A new attempt: place, then ask for the fence and the store at once. Too few cards: wait for them."""
    state = turn.state
    cluster, workers = state.cluster, state.policy.workers
    previous = state.table or None
    table = None
    if cluster.avoided:
        shunned = cluster.excluded | cluster.avoided
        table = placement.place(cluster.nodes, shunned, workers, previous, lost=cluster.lost)
    if table is None:
        table = placement.place(cluster.nodes, cluster.excluded, workers, previous, lost=cluster.lost)
    if table is None:
        turn.put(phase=Phase.WAITING, attempt=None, waiting=Waiting(turn.now))
        return
    asked = 1 + max(state.generation, state.attempt.asked if state.attempt else 0)
    nodes = tuple(dict.fromkeys(assignment.card.node for assignment in table))
    store_node = nodes[
        asked % len(nodes)
    ]  # no node is special, and one that does not answer is not asked twice
    turn.put(
        phase=Phase.FENCING,
        waiting=None,
        table=table,
        saves=Saves(),
        attempt=Attempt(asked, turn.now, table, nodes, store_node=store_node),
    )
    turn.do(Fence(asked), OpenStore(asked, store_node))


def spoil(turn: Turn) -> None:
    """The attempt's table has lost a card, or its store: a new attempt, once the fence is answered."""
    attempt = turn.state.attempt
    if turn.state.phase is Phase.WAITING:
        wait(turn)
    elif attempt is not None and attempt.started_at is None:
        if attempt.won:
            begin(turn)
        else:
            turn.put(attempt=replace(attempt, spoiled=True))


def fenced(turn: Turn, event: Fenced) -> None:
    """The log is ours from here on. What it holds decides what is restored."""
    state = turn.state
    attempt = state.attempt
    if state.phase is not Phase.FENCING or attempt is None or attempt.won or event.generation < attempt.asked:
        return
    kept: tuple[retention.Kept, ...] = ()
    for candidate in event.candidates:
        kept = retention.add(kept, candidate.ref, candidate.tier)
    turn.put(
        generation=event.generation,
        attempt=replace(attempt, won=event.generation),
        candidates=event.candidates,
        unusable=event.unusable,
        kept=kept,
        open=stamp(state.open, "fenced", turn.now),
    )
    data: dict[str, object] = {"seconds": turn.now - attempt.since}
    if event.slot is not None:
        data["slot"] = event.slot
    turn.record("generation.fenced", data, urgent=True)
    if event.finished:
        finish(turn, Outcome(Result.FINISHED, "the log says that this run has finished"))
    elif attempt.spoiled:
        begin(turn)
    elif choose(turn):
        start(turn)


def choose(turn: Turn) -> bool:
    """Decide what the attempt restores. False: there is nothing it may restore, and the run ends."""
    state = turn.state
    assert state.attempt is not None
    choice = restore.choose(
        state.candidates,
        damaged=state.damaged,
        unread=state.unread,
        nodes=state.cluster.nodes,
        unusable=state.unusable,
    )
    for candidate, reason in choice.skipped:
        data: dict[str, object] = {
            "tier": candidate.tier,
            "reason": reason,
            "generation": candidate.ref.generation,
        }
        turn.record("restore.skipped", data, step=candidate.ref.step)
    if choice.stuck:
        finish(turn, Outcome(Result.NO_CHECKPOINT, choice.stuck))
        return False
    if choice.warning:
        turn.record("warning.raised", {"message": choice.warning}, urgent=True)
    found = choice.candidate
    step, tier = (found.ref.step, found.tier) if found else (0, None)
    data = {"step": step, "tier": tier}
    if found:
        data["generation"] = found.ref.generation
    turn.record("restore.chosen", data, step=step)
    turn.put(
        attempt=replace(state.attempt, restore=found),
        restored_step=step,
        open=tuple(replace(each, step_restored=step, tier=tier) for each in state.open),
    )
    return True


def store_ready(turn: Turn, event: StoreReady) -> None:
    attempt = turn.state.attempt
    if attempt is not None and not attempt.store and event.generation in (attempt.asked, attempt.won):
        turn.put(attempt=replace(attempt, store=event.address))
        start(turn)


def start(turn: Turn) -> None:
    """Start the ranks if the gate is open: fence won, store ready, every old process gone."""
    state = turn.state
    attempt = state.attempt
    if state.phase is not Phase.FENCING or attempt is None or attempt.spoiled:
        return
    if not attempt.won or not attempt.store or state.running:
        return
    generation, found, first = attempt.won, attempt.restore, state.restored_step
    ref = {"step": found.ref.step, "generation": found.ref.generation, "tier": found.tier} if found else None
    turn.record(
        "generation.started",
        {
            "world_size": len(attempt.table),
            "ranks": [{"rank": a.rank, "node": a.card.node, "card": str(a.card)} for a in attempt.table],
            "restore": ref,
            "attempt_of_incident": state.open[-1].id if state.open else None,
        },
        urgent=True,
    )
    turn.do(*(StartRanks(generation, name, attempt.table, attempt.store, found) for name in attempt.nodes))
    places = {name: place for place, name in enumerate(attempt.nodes)}
    turn.put(
        phase=Phase.STARTING,
        attempt=replace(attempt, started_at=turn.now),
        running=Running(generation, places),
        pages=progress.begin(places, first, turn.now),
        restored=Ranks(),
        saves=Saves(generation, len(attempt.table)),
        cadence=cadence.begin(state.cadence),
        open=stamp(state.open, "started", turn.now),
    )


def restored(turn: Turn, event: Restored) -> None:
    state = turn.state
    if event.rank in state.restored:
        return
    ranks = state.restored.add(event.rank)
    turn.put(restored=ranks)
    if ranks.count == len(state.table):
        turn.put(open=stamp(state.open, "restored", turn.now))
    turn.record(
        "restore.done", {"tier": event.tier, "seconds": event.seconds}, rank=event.rank, step=event.step
    )


def stepping(turn: Turn) -> None:
    """In ``STARTING``: all ranks have begun to step, so the generation runs and open incidents are over."""
    state = turn.state
    if state.phase is not Phase.STARTING or state.pages.begun.count < len(state.table):
        return
    for incident in stamp(state.open, "first_step", turn.now):
        turn.record("incident.recovered", _recovered(incident), **subject(incident), urgent=True)
    # Silence counts from here: what passed before was starting, with its own deadline.
    pages = replace(state.pages, moved_at=max(state.pages.moved_at, turn.now))
    turn.put(phase=Phase.RUNNING, open=(), unread={}, pages=pages)


def stamp(incidents: tuple[Incident, ...], moment: str, at: float) -> tuple[Incident, ...]:
    """``incidents`` with a moment of the recovery set; a later attempt overwrites an earlier one's."""
    return tuple(replace(each, at={**each.at, moment: at}) for each in incidents)


def subject(incident: Incident) -> dict[str, Any]:
    return {"rank": incident.rank, "node": incident.node, "card": incident.card}


def _recovered(incident: Incident) -> dict[str, object]:
    return {
        "incident": incident.id,
        "kind": incident.kind,
        "cause": incident.cause,
        "confidence": incident.confidence,
        "decision": incident.decision,
        "reason": incident.reason,
        "step_failed": incident.step_failed,
        "step_restored": incident.step_restored,
        "lost_steps": lost_steps(incident),
        "tier": incident.tier,
        "phases": phases(incident),
        "signals": list(incident.signals),
    }
