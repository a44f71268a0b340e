"""Faults as data: what to break, and at which place of the run, by count.

A plan is a list of faults; each is fired once, at a protocol point that some process of the run reaches, never
by the clock, so that the same plan breaks the same thing again. What fired is in the journal as
``chaos.injected``, durable before it happens.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

from resilience.errors import InvalidError
from resilience.runtime.failpoint import POINTS

ACTIONS: dict[str, str] = {
    "kill": "SIGKILL to the rank",
    "segfault": "SIGSEGV to the rank",
    "stop": "SIGSTOP to the rank: it hangs, and may wake as a zombie",
    "exit": "the rank that reaches the point ends with exit code 7",
    "raise": "the rank that reaches the point raises RuntimeError in the user's function",
    "fail_card": "the simulated card of the rank reports a fault",
    "kill_node": "every process of the node, its raylet and its agent, SIGKILL at once",
}
_PLACES = [point for points in POINTS.values() for point in points]


@dataclass(frozen=True)
class Fault:
    """One fault of a plan.

    Attributes:
        action: one of ``ACTIONS``.
        rank: the rank hit (its card, its node).
        node: the node hit, instead of ``rank``, for ``kill_node``.
        point: where it fires, one of ``resilience.runtime.failpoint.POINTS``.
        at_rank, step, tier, generation: what must hold at that point; ``None`` = any.
        count: fire the nth time that all of it holds.
    """

    action: str
    point: str = "step"
    rank: int | None = None
    node: str | None = None
    at_rank: int | None = None
    step: int | None = None
    tier: str | None = None
    generation: int | None = None
    count: int = 1

    def __post_init__(self) -> None:
        _one_of("action", self.action, list(ACTIONS))
        _one_of("point", self.point, _PLACES)
        if self.rank is None and self.node is None:
            raise InvalidError(
                f"fault {self.action!r} hits nothing",
                operation="chaos",
                hint="give rank=..., or node=... for kill_node",
            )
        if self.node is not None and self.action != "kill_node":
            raise InvalidError(
                f"{self.action!r} hits a rank, not a node", operation="chaos", hint="give rank=..."
            )
        if self.count < 1:
            raise InvalidError(f"count={self.count}", operation="chaos", hint="count from 1")

    def to_json(self) -> dict[str, Any]:
        """As ``Options.faults`` takes it."""
        at = {
            "point": self.point,
            "rank": self.at_rank,
            "step": self.step,
            "tier": self.tier,
            "generation": self.generation,
            "count": self.count,
        }
        return {
            "action": self.action,
            "rank": self.rank,
            "node": self.node,
            "at": {key: value for key, value in at.items() if value is not None},
        }


def kill(rank: int, *, step: int, point: str = "step", **at: Any) -> Fault:
    """Kill ``rank`` as it begins ``step`` (its peers are then in the middle of that step, waiting for it)."""
    return Fault(
        "kill", rank=rank, step=step, point=point, at_rank=at.pop("at_rank", _own(point, rank)), **at
    )


def kill_node(rank: int, *, step: int, point: str = "step", **at: Any) -> Fault:
    """Kill the node that ``rank`` runs on."""
    return Fault(
        "kill_node", rank=rank, step=step, point=point, at_rank=at.pop("at_rank", _own(point, rank)), **at
    )


def fail_card(rank: int, *, step: int, **at: Any) -> Fault:
    """Fail the simulated card that ``rank`` runs on."""
    return Fault("fail_card", rank=rank, step=step, at_rank=rank, **at)


def _own(point: str, rank: int) -> int | None:
    """By default a fault at a rank's own place waits for that rank."""
    return None if point in POINTS["supervisor"] else rank


def _one_of(what: str, given: str, allowed: list[str]) -> None:
    if given not in allowed:
        near = difflib.get_close_matches(given, allowed, n=1)
        raise InvalidError(
            f"{what}={given!r} is unknown",
            operation="chaos",
            hint=(f"did you mean {near[0]!r}? " if near else "") + f"allowed: {', '.join(allowed)}",
        )
