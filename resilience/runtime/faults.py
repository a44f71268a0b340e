"""Carrying out planned faults: each once, written to the journal and durable before it happens.

The one place of the runtime that breaks things, and only things named in the plan that the launcher was given.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from typing import Any

import ray

from resilience.control.types import Assignment
from resilience.runtime.chronicle import Chronicle
from resilience.runtime.nodes import Nodes

_SIGNALS = {"kill": signal.SIGKILL, "segfault": signal.SIGSEGV, "stop": signal.SIGSTOP}
_PATIENCE_S = 10.0


class Faults:
    """The faults of one run that have fired. Called from several threads, each fault from one at a time."""

    def __init__(self, chronicle: Chronicle) -> None:
        self._chronicle = chronicle
        self._fired: set[int] = set()

    def fired(self, fault: dict[str, Any]) -> bool:
        return fault["index"] in self._fired

    def carry_out(self, fault: dict[str, Any], table: Sequence[Assignment], nodes: Nodes) -> None:
        """Break what ``fault`` says; returns when it is broken. A fault that has fired does nothing."""
        if self.fired(fault):
            return
        self._fired.add(fault["index"])
        cards = {a.rank: a.card for a in table}
        rank = fault.get("rank")
        card = cards.get(rank) if rank is not None else None
        node = fault.get("node") or (card.node if card else None)
        self._chronicle.write(
            "chaos.injected",
            {
                "fault": fault["action"],
                "point": fault["at"],
                "target": node if rank is None else rank,
                "plan_index": fault["index"],
            },
            urgent=True,
            rank=rank,
            node=node,
            card=str(card) if card else None,
            step=fault["at"].get("step"),
        )
        self._chronicle.flush()
        member = nodes.member(node) if node is not None else None
        order = _order(fault, card.index if card else None)
        if member is None or order is None:
            return
        try:
            ray.get(member.agent.perform.remote([order]), timeout=_PATIENCE_S)
        except ray.exceptions.RayError:
            return  # a node that was killed does not answer


def _order(fault: dict[str, Any], card: int | None) -> dict[str, Any] | None:
    """What the agent is told; ``None`` where the rank that reached the point does it itself (exit, raise)."""
    action = fault["action"]
    if action in _SIGNALS:
        return {"t": "signal", "rank": fault["rank"], "signal": int(_SIGNALS[action])}
    if action == "fail_card" and card is not None:
        return {"t": "fail_card", "index": card}
    return {"t": "die"} if action == "kill_node" else None
