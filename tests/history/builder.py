"""Builds runs in storage with the real writers of the journal and the log, at times fixed by the test."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from resilience.checkpoint.arena import Arena
from resilience.checkpoint.pack import persist
from resilience.checkpoint.part import directory, draft
from resilience.checkpoint.plan import plan, specs
from resilience.checkpoint.snapshot import snapshot
from resilience.checkpoint.tree import flatten
from resilience.journal.events import EventWriter
from resilience.journal.format_file import ensure_format
from resilience.journal.log import CommitLog
from resilience.journal.records import Kind
from storage_backends import open_storage

T0 = 1_700_000_000.0  # 2023-11-14T22:13:20Z
PLACES = [(0, "node-a", 0), (1, "node-a", 1), (2, "node-b", 0), (3, "node-b", 1)]


class Builder:
    """One run. ``tell`` writes an event ``at`` seconds after T0 in the current generation (0 until ``fence``)."""

    def __init__(self, url: str, run: str, *, source: str = "supervisor-1") -> None:
        self.url, self.run, self.source = url, run, source
        self.storage = open_storage(f"{url.rstrip('/')}/{run}")
        ensure_format(self.storage, run=run, created="2023-11-14T22:13:19.000000Z")
        ids = itertools.count()
        self.log = CommitLog(self.storage, new_id=lambda: f"{source}-{next(ids)}")
        self._begin(0)

    def _begin(self, generation: int) -> None:
        self.generation = generation
        self.writer = EventWriter(self.storage, run=self.run, generation=generation, source=self.source)

    def tell(self, at: float, type: str, data: dict[str, Any] | None = None, **subject: Any) -> str:
        return self.writer.emit(type, data, time=T0 + at, **subject)

    def seal(self) -> None:
        self.writer.seal()

    def start(
        self,
        at: float,
        *,
        attempt: int = 1,
        nodes: tuple[str, ...] = ("node-a", "node-b", "node-c"),
        nvme: str = "/nonexistent/nvme",
    ) -> None:
        self.tell(
            at,
            "run.started",
            {
                "job": "train",
                "entry": "train.py:train",
                "workers": 4,
                "spares": 2,
                "storage": self.url,
                "nvme": nvme,
                "policy": {"keep_last": 3},
                "arguments": {"lr": 0.1},
                "attempt": attempt,
            },
        )
        for node in nodes:
            self.tell(
                at + 0.5, "node.joined", {"cards": 2, "levels": ["rack-1"], "host": "10.0.0.1"}, node=node
            )

    def fence(self, at: float, generation: int, *, seconds: float = 0.1) -> None:
        record = self.log.fence(generation, {"run": self.run, "supervisor": "host/1", "reason": "start"})
        self.seal()
        self._begin(record.generation)
        self.tell(at, "generation.fenced", {"slot": record.slot, "seconds": seconds})

    def ranks(
        self,
        at: float,
        *,
        restore: dict[str, Any] | None = None,
        incident: str | None = None,
        places: list[tuple[int, str, int]] = PLACES,
        done_at: float,
        seconds: float = 0.0,
    ) -> None:
        table = [{"rank": rank, "node": node, "card": f"{node}/{index}"} for rank, node, index in places]
        data = {"world_size": len(table), "ranks": table, "restore": restore, "attempt_of_incident": incident}
        self.tell(at, "generation.started", data)
        step, tier = (restore["step"], restore["tier"]) if restore else (0, None)
        chosen = {"tier": tier, "generation": restore["generation"]} if restore else {"tier": None}
        self.tell(at, "restore.chosen", chosen, step=step)
        for rank, _node, _index in places:
            self.tell(
                done_at, "restore.done", {"tier": tier, "seconds": seconds + rank / 100}, rank=rank, step=step
            )

    def steps(self, at: float, first: int, last: int, *, step_s: float = 0.1, batch: int = 10) -> None:
        """Losses of the steps first..last-1 (index), the first of which begins at ``at``."""
        for begin in range(first, last, batch):
            end = min(begin + batch, last)
            values = [{"step": s, "loss": loss(s, self.generation), "lr": 0.1} for s in range(begin, end)]
            self.tell(at + (end - first) * step_s, "metrics.logged", {"values": values}, rank=0)

    def sealed(self, at: float, step: int, *, stall_s: float) -> None:
        for rank, _node, _index in PLACES:
            self.tell(
                at,
                "checkpoint.sealed",
                {"stall_s": stall_s - (3 - rank) / 1000, "size": 1000},
                rank=rank,
                step=step,
            )

    def save(self, at: float, step: int, tier: str, *, nvme: str | None = None) -> None:
        """A checkpoint with real packs and parts, each of 4 ranks with a thousand numbers; told and recorded."""
        sources, size = [], 0
        for rank, node, _index in PLACES:
            root = open_storage(f"{nvme}/{self.run}/{node}") if nvme else self.storage
            arrays, skeleton = flatten({"weight": np.full(1000, rank + step, np.float32)}, prefix="")
            layout = plan(specs(arrays), rank=rank, world_size=len(PLACES))
            part = draft(layout, skeleton, run=self.run, step=step, generation=self.generation)
            with Arena.create(2, layout.size) as arena:
                slot = arena.acquire()
                assert slot is not None
                snapshot(arena, slot, arrays, layout, step=step, generation=self.generation)
                saved = persist(arena.view(slot), part, root, directory(step, self.generation))
            sources.append({"rank": rank, "node": node, "name": saved.part_name, "sha256": saved.sha256})
            size += saved.size
        body = {"step": step, "tier": tier, "world_size": len(PLACES), "parts": sources, "size": size}
        slot_number = self.log.append(Kind.CHECKPOINT, body).slot
        data = {"tier": tier, "size": size, "stall_s": 0.01, "durable_s": 0.1, "slot": slot_number}
        self.tell(at, "checkpoint.committed", data, step=step)

    def committed(self, at: float, step: int, tier: str, *, stall_s: float, durable_s: float) -> int:
        body = {"step": step, "tier": tier, "world_size": 4, "parts": [], "size": 4000}
        slot = self.log.append(Kind.CHECKPOINT, body).slot
        data = {"tier": tier, "size": 4000, "stall_s": stall_s, "durable_s": durable_s, "slot": slot}
        self.tell(at, "checkpoint.committed", data, step=step)
        return slot


def loss(step: int, generation: int) -> float:
    """Steps of another generation get another value, so that tests see whose survived."""
    return round(5.0 - step / 10 + generation / 1000, 6)


PHASES = {"detect": 0.05, "decide": 0.01, "fence": 0.19, "start": 0.2, "restore": 0.15, "first_step": 0.4}
BLAMED = {"rank": 2, "node": "node-b", "card": "node-b/0"}
FOUND = {
    "incident": "1-1",
    "kind": "signal",
    "cause": "rank 2 was killed by SIGKILL",
    "confidence": 1.0,
    "step": 25,
}


def first_generation(url: str, run: str = "demo") -> Builder:
    """Generation 1: steps 0..24 of 0.1 s each from second 2, checkpoints of 10 (nvme, shared) and 20 (nvme), then at
    4.5 s rank 2 is killed; the incident 1-1 is detected and decided, not recovered."""
    it = Builder(url, run)
    it.start(0.0)
    it.fence(1.0, 1)
    it.ranks(1.1, done_at=2.0)
    it.steps(2.0, 0, 25)
    it.sealed(3.0, 10, stall_s=0.05)
    it.committed(3.2, 10, "nvme", stall_s=0.05, durable_s=0.2)
    it.committed(3.6, 10, "shared", stall_s=0.05, durable_s=0.6)
    it.sealed(4.0, 20, stall_s=0.03)
    it.committed(4.1, 20, "nvme", stall_s=0.03, durable_s=0.1)
    it.tell(
        4.5,
        "chaos.injected",
        {"fault": "kill", "point": "step", "target": "rank 2", "plan_index": 0},
        rank=2,
        step=25,
    )
    out = "Fatal: killed\n"
    it.tell(4.52, "rank.exited", {"code": None, "signal": 9, "error": "", "output": out}, rank=2)
    it.tell(4.55, "incident.detected", FOUND, severity="error", **BLAMED)
    decided = {"incident": "1-1", "decision": "restart", "reason": "the card is healthy"}
    it.tell(4.56, "incident.decided", decided, **BLAMED)
    it.seal()
    return it


def whole_run(url: str, run: str = "demo") -> Builder:
    """``first_generation``, then generation 2 goes on from step 20 of the nvme tier at 5.5 s and finishes 40 steps."""
    it = first_generation(url, run)
    it.tell(4.6, "checkpoint.abandoned", {"reason": "its generation ended"}, step=20)
    it.tell(4.7, "generation.ended", {"reason": "incident 1-1", "steps": 25})
    it.fence(4.75, 2, seconds=0.05)
    restore = {"step": 20, "generation": 1, "tier": "nvme"}
    it.ranks(4.8, restore=restore, incident="1-1", done_at=5.1, seconds=0.1)
    story = {
        **{key: FOUND[key] for key in ("incident", "kind", "cause", "confidence")},
        "decision": "restart",
        "reason": "the card is healthy",
        "step_failed": 25,
        "step_restored": 20,
        "lost_steps": 5,
        "tier": "nvme",
        "phases": PHASES,
        "signals": ["rank 3 lost its peer"],
    }
    it.tell(5.5, "incident.recovered", story, **BLAMED)
    it.steps(5.5, 20, 40)
    it.sealed(6.5, 30, stall_s=0.02)
    it.committed(6.7, 30, "nvme", stall_s=0.02, durable_s=0.2)
    it.committed(6.9, 30, "shared", stall_s=0.02, durable_s=0.4)
    it.log.append(Kind.RETIRE, {"refs": [{"step": 10, "generation": 1}]})
    it.tell(7.0, "checkpoint.retired", {"generation": 1}, step=10)
    it.tell(7.1, "checkpoint.deleted", {"generation": 1, "tier": "shared"}, step=10)
    it.sealed(7.5, 40, stall_s=0.01)
    it.committed(7.6, 40, "shared", stall_s=0.01, durable_s=0.1)
    it.tell(7.6, "generation.ended", {"reason": "finished", "steps": 40})
    it.log.append(Kind.FINISH, {"step": 40, "result": "finished"})
    it.tell(7.7, "run.finished", {"result": "finished", "reason": "", "steps": 40, "digest": "ab" * 32})
    it.seal()
    return it
