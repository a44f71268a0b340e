"""The run right now as plain data, for the live view: read from the supervisor's state, decides nothing."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from resilience.control.supervise import State
from resilience.control.types import Phase
from resilience.journal.state import LogState


def view_of(
    state: State, log: LogState, *, metrics: dict[str, float], failing: str | None, card: str = "card"
) -> dict[str, Any]:
    """What a person wants to see of a run; seconds are of this moment.

    ``{"run", "phase", "waiting": {"needed", "available", "deadline_s", "card"} | None, "step",
    "loss", "metrics", "generation", "checkpoint": {"step", "tier", "age_s"} | None,
    "cards": {"active", "spare", "failed", "lost"}, "recovering", "nodes", "incidents", "warning"}``
    """
    newest = state.kept[0] if state.kept else None
    open_ = state.open[-1] if state.open else None
    return {
        "run": state.run,
        "phase": state.phase.value,
        "waiting": _waiting(state, card),
        "step": max(state.step, state.restored_step, 0),
        "loss": metrics.get("loss"),
        "metrics": {key: value for key, value in metrics.items() if key != "step"},
        "generation": state.generation,
        "checkpoint": None
        if newest is None
        else {
            "step": newest.ref.step,
            "tier": _furthest(log, newest.ref),
            "age_s": max(0.0, time.monotonic() - state.safe_at),
        },
        "cards": _cards(state),
        "recovering": None if open_ is None else f"{open_.cause}: {open_.decision or 'deciding'}",
        "nodes": [
            {
                "name": node.name,
                "cards": node.cards,
                "levels": list(node.levels),
                "ranks": [a.rank for a in state.table if a.card.node == node.name],
            }
            for node in state.cluster.nodes.values()
        ],
        "incidents": state.counted,
        "warning": _saves_failing(state) or failing,
    }


def _waiting(state: State, card: str) -> dict[str, Any] | None:
    policy, available = state.policy, state.cluster.available
    if state.phase is not Phase.WAITING or available >= policy.workers:
        return None
    return {
        "needed": policy.workers,
        "available": available,
        "deadline_s": policy.capacity_deadline_s,
        "card": card,
    }


def _saves_failing(state: State) -> str | None:
    """Why the newest save that is decided came to nothing, where it did; the age of the last good one stands beside."""
    for step, save in sorted(state.saves.steps.items(), reverse=True):
        if save.committed():
            return None
        if save.settled() and save.error:
            return f"the checkpoint of step {step} failed: {save.error}"
    return None


def _furthest(log: LogState, ref: Any) -> str | None:
    """The most durable tier a checkpoint has reached, as far as the log says."""
    for checkpoint in log.checkpoints:
        if checkpoint.ref == ref:
            return "shared" if "shared" in checkpoint.tiers else next(iter(checkpoint.tiers), None)
    return None


def _cards(state: State) -> dict[str, int]:
    cluster = state.cluster
    here = Counter(card.node in cluster.nodes for card in cluster.excluded)
    active = sum(a.card.node in cluster.nodes for a in state.table) if state.phase is not Phase.WAITING else 0
    return {
        "active": active,
        "spare": max(0, cluster.available - active),
        "failed": here[True],
        "lost": sum(node.cards for node in cluster.lost.values()),
    }
