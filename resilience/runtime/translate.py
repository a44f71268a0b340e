"""What agents observe, as events for ``control`` and lines for the journal. No decision is made here.

A node reports plain dicts (``runtime.node``); this is the one place that knows both their shape and the
supervisor's vocabulary.
"""

from __future__ import annotations

from typing import Any

from resilience.cards.codes import FaultCodes
from resilience.control import events as e
from resilience.control.faults import Action
from resilience.control.types import Card, CheckpointRef, Exit, RankProgress

JournalLine = tuple[str, dict[str, Any], dict[str, Any]]  # type, data, subject


def event_of(
    node: str, seen: dict[str, Any], at: float, restoring: CheckpointRef | None, codes: FaultCodes
) -> e.Event | None:
    """The control event that an observation amounts to, ``None`` if it is only story.

    Args:
        restoring: the checkpoint the current generation was told to restore.
        codes: what faults of cards ask for.
    """
    kind = seen["t"]
    generation, rank = seen.get("generation", 0), seen.get("rank", 0)
    if kind == "progress":
        pages = {int(r): RankProgress(**page) for r, page in seen["ranks"].items()}
        return e.Progress(at, generation, node, pages)
    if kind == "restored":
        return e.Restored(at, generation, rank, seen["step"], seen["tier"], seen["seconds"])
    if kind == "sealed":
        return e.Sealed(at, generation, rank, seen["step"], seen["stall_s"], seen["size"])
    if kind == "persisted":
        return e.Persisted(
            at,
            generation,
            rank,
            seen["step"],
            seen["tier"],
            node,
            seen["part"],
            seen["sha256"],
            seen["size"],
            seen["seconds"],
        )
    if kind == "save_failed":
        return e.SaveFailed(at, generation, rank, seen["step"], seen["tier"], seen["error"])
    if kind == "skipped":
        return e.SaveFailed(at, generation, rank, seen["step"], "memory", seen["reason"])
    if kind == "missed":
        return e.CheckpointMissed(at, generation, rank, seen["wanted"], seen["step"])
    if kind == "parked":
        return e.Parked(at, generation, rank, seen["step"])
    if kind == "finished":
        return e.RankFinished(at, generation, rank, seen["steps"], seen["stopped"])
    if kind == "stopped":
        return e.RanksStopped(at, generation, node)
    if kind == "card":
        return fault_of(node, seen, at, codes)
    if kind == "exited":
        return _exited(seen, at, restoring)
    return None


def fault_of(node: str, seen: dict[str, Any], at: float, codes: FaultCodes) -> e.CardFaulted:
    """A fault of a card, with what its code asks for: nothing but to be watched where nobody knows it.

    Args:
        seen: ``index, code, detail, affects``; of a third party's report also ``source``, and ``action`` where it
            chose one itself.
    """
    code = codes.find(seen["code"])
    chosen = seen.get("action")
    return e.CardFaulted(
        at,
        Card(node, seen["index"]),
        code.code if code else seen["code"],
        seen["detail"],
        chosen or (code.action if code else Action.WATCH).value,
        code.name if code else "",
        tuple(Card(node, index) for index in seen["affects"]),
        code.limit if code and not chosen else None,
        certain=bool(chosen),
        source=seen.get("source", "driver"),
    )


def _exited(seen: dict[str, Any], at: float, restoring: CheckpointRef | None) -> e.Event | None:
    told = seen["told"]
    if told.get("t") == "finished" or seen["condemned"]:
        return None
    generation, rank = seen["generation"], seen["rank"]
    if told.get("t") == "restore_failed" and restoring is not None:
        tier, corrupt = told["tier"], told["corrupt"]
        return e.RestoreFailed(at, generation, rank, restoring, tier, told["reason"], corrupt)
    return e.RankExited(
        at,
        generation,
        rank,
        Exit(
            code=seen["code"],
            signal=seen["signal"],
            error=told.get("error", ""),
            traceback=told.get("traceback", ""),
            signature=told.get("signature", ""),
            output=seen["output"],
        ),
        seen["step"],
    )


def line_of(node: str, seen: dict[str, Any]) -> JournalLine | None:
    """The journal line of an observation that is only story, ``None`` where ``control`` writes it itself."""
    kind = seen["t"]
    if kind == "log":
        return "metrics.logged", {"values": seen["values"]}, {"node": node, "rank": seen["rank"]}
    if kind == "warning":
        return "warning.raised", {"message": seen["message"]}, {"node": node, "severity": "warning"}
    if kind == "retried":
        return "storage.retried", seen["data"], {"node": node, "severity": "warning"}
    if kind == "deleted":
        return (
            "checkpoint.deleted",
            {"generation": seen["of"], "tier": "nvme"},
            {"node": node, "step": seen["step"]},
        )
    if kind == "broken":
        message = f"the agent failed, please report this:\n{seen['traceback']}"
        return "warning.raised", {"message": message}, {"node": node, "severity": "error"}
    return None
