"""Where a run is, from storage alone: while it goes, and after.

Owns the reading of a phase out of a journal. A journal that has gone silent is never shown as a healthy run: every
status says how long ago the run was last heard of.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from resilience.control.types import Phase
from resilience.history.query import History

#: A run that says nothing for longer is pointed out: its supervisor seals about once a second while steps are logged.
SILENT_S = 60.0


def status(history: History, run: str) -> dict[str, Any]:
    """A superset of what the live view takes; ages and durations in seconds.

    Keys: ``run, job, phase, waiting`` (for cards: needed, available, deadline_s; or ``None``), ``result, reason,
    generation, step, loss, metrics, checkpoint`` (newest usable, with its most durable tier),
    ``checkpoints`` (tier → newest: step, generation, age_s), ``recovering, incident`` (the open one
    or ``None``), ``incidents`` (number), ``cards`` (by state), ``nodes, elapsed_s, heard_s`` (since the last event),
    ``silent, warnings``.
    """
    row = history.sql("SELECT * FROM runs WHERE run = ?", [run])[0]
    generation = _one(history, "SELECT max(generation) AS it FROM generations WHERE run = ?", run)
    metric = history.sql("SELECT * FROM metrics WHERE run = ? ORDER BY step DESC LIMIT 1", [run])
    open_ = history.sql(
        "SELECT * FROM incidents WHERE run = ? AND state = 'open' ORDER BY detected_at DESC", [run]
    )
    tiers = _tiers(history, run)
    newest = max(tiers.values(), key=lambda it: (it["step"], it["tier"] == "shared"), default=None)
    heard = _one(
        history,
        "SELECT seconds(last_event_at, (SELECT read_at FROM reading)) AS it FROM runs WHERE run = ?",
        run,
    )
    elapsed = row["wall_s"]
    if elapsed is not None and row["result"] is None and heard is not None:
        elapsed += heard
    phase = _phase(history, run, row, bool(open_))
    return {
        "run": run,
        "job": row["job"],
        "phase": phase.value,
        "waiting": _waiting(history, run) if phase is Phase.WAITING else None,
        "result": row["result"],
        "reason": row["reason"],
        "generation": generation,
        "step": row["steps"],
        "loss": metric[0]["loss"] if metric else None,
        "metrics": metric[0]["values"] if metric else {},
        "checkpoint": newest,
        "checkpoints": tiers,
        "recovering": f"{open_[0]['cause']}: {open_[0]['decision'] or 'deciding'}" if open_ else None,
        "incident": open_[0] if open_ else None,
        "incidents": row["incidents"],
        "cards": _cards(history, run, phase),
        "nodes": _nodes(history, run, generation, phase),
        "elapsed_s": elapsed,
        "heard_s": heard,
        "silent": phase is not Phase.DONE and (heard is None or heard > SILENT_S),
        "warnings": row["warnings"],
    }


def _phase(history: History, run: str, row: dict[str, Any], recovering: bool) -> Phase:
    if row["result"] is not None:
        return Phase.DONE
    last = {
        it["type"]: it["told_at"]
        for it in history.sql(
            "SELECT type, max(time) AS told_at FROM events WHERE run = ? AND time >= (SELECT max(started_at)"
            " FROM attempts a WHERE a.run = events.run) GROUP BY type",
            [run],
        )
    }

    def since(first: str, *later: str) -> bool:
        """Whether ``first`` was told and nothing of ``later`` after it."""
        return first in last and all(last.get(other, "") < last[first] for other in later)

    if "stop.requested" in last:
        return Phase.STOPPING
    if since("capacity.waiting", "capacity.found", "generation.started"):
        return Phase.WAITING
    if "generation.fenced" not in last and "generation.started" not in last:
        return Phase.WAITING
    if since("generation.ended", "generation.fenced", "generation.started"):
        return Phase.FENCING
    started = history.sql(
        "SELECT started_at, first_step_at FROM generations WHERE run = ? ORDER BY generation DESC LIMIT 1",
        [run],
    )
    if recovering:
        # An incident of a generation that has not ended yet: its ranks are being stopped.
        return Phase.STARTING if since("generation.fenced", "incident.detected") else Phase.FENCING
    return Phase.RUNNING if started and started[0]["first_step_at"] else Phase.STARTING


def _waiting(history: History, run: str) -> dict[str, Any] | None:
    """What the newest attempt said that it waits for, if it did."""
    rows = history.sql(
        "SELECT CAST(data ->> 'needed' AS BIGINT) AS needed, CAST(data ->> 'available' AS BIGINT) AS available,"
        " CAST(data ->> 'deadline_s' AS DOUBLE) AS deadline_s FROM events WHERE run = ? AND type = 'capacity.waiting'"
        " AND time >= (SELECT max(started_at) FROM attempts a WHERE a.run = events.run) ORDER BY time DESC LIMIT 1",
        [run],
    )
    return rows[0] if rows else None


def _tiers(history: History, run: str) -> dict[str, dict[str, Any]]:
    rows = history.sql(
        "SELECT tier, step, generation, age_s FROM checkpoints WHERE run = ? AND state = 'kept'"
        " ORDER BY step, generation",
        [run],
    )
    return {row["tier"]: row for row in rows}  # the last of each tier is its newest


def _cards(history: History, run: str, phase: Phase) -> dict[str, int]:
    found = Counter(row["state"] for row in history.sql("SELECT state FROM cards WHERE run = ?", [run]))
    if phase is Phase.DONE:  # nothing runs any more: what was in use is free
        found["spare"] += found.pop("active", 0)
    return {state: found[state] for state in ("active", "spare", "failed", "lost")}


def _nodes(history: History, run: str, generation: int | None, phase: Phase) -> list[dict[str, Any]]:
    ranks = history.sql(
        "SELECT node, list(rank ORDER BY rank) AS ranks FROM ranks WHERE run = ? AND generation = ? GROUP BY node",
        [run, generation],
    )
    placed = {} if phase is Phase.DONE else {row["node"]: row["ranks"] for row in ranks}
    return [
        {
            "name": row["node"],
            "state": row["state"],
            "cards": row["cards"],
            "levels": row["levels"] or [],
            "ranks": placed.get(row["node"], []),
            "failures": row["failures"],
        }
        for row in history.sql("SELECT * FROM nodes WHERE run = ? ORDER BY node", [run])
    ]


def _one(history: History, query: str, run: str) -> Any:
    return history.sql(query, [run])[0]["it"]
