"""A toy world that answers the supervisor's commands, so that a scenario is a few lines.

It owns a clock, nodes, ranks that step, writers that persist, and a log that fences and commits; each can be told to
stay silent. It checks, at every command, the promises that no scenario may break.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest

from resilience.control import commands as c
from resilience.control import events as e
from resilience.control.supervise import State, step
from resilience.control.types import (
    Candidate,
    Card,
    CheckpointRef,
    Exit,
    Incident,
    Node,
    Outcome,
    Phase,
    Policy,
    RankProgress,
    Result,
)

SIGKILLED = Exit(signal=9)
PEER_LOST = Exit(
    code=1,
    error="RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1",
)


@dataclass
class Rank:
    rank: int
    node: str
    step: int
    alive: bool = True
    parked: bool = False
    section: str = "step"
    state: str = "S"
    changed: float = 0.0


@dataclass
class World:
    """Nodes, ranks and a log around one ``State``. ``run_for`` lets time pass."""

    policy: Policy
    total: int = 100
    step_s: float = 0.5
    tick_s: float = 0.25
    save_s: float = 0.1
    nvme: bool = True
    now: float = 0.0
    state: State = field(init=False)
    log: list[Any] = field(default_factory=list)  # every event and command, in order
    nodes: dict[str, Node] = field(default_factory=dict)
    ranks: dict[int, Rank] = field(default_factory=dict)
    generation: int = 0  # newest fence in the log
    running: int = 0  # generation of ``ranks``
    recorded: dict[tuple[CheckpointRef, str], tuple[str, ...]] = field(default_factory=dict)
    retired: set[CheckpointRef] = field(default_factory=set)
    quarantined: set[tuple[CheckpointRef, str]] = field(default_factory=set)
    fenced_asked: int = 0
    persisted: dict[tuple[int, int, str], set[int]] = field(default_factory=dict)
    started: set[int] = field(default_factory=set)
    stopped: dict[str, int] = field(default_factory=dict)
    silent: set[type] = field(default_factory=set)  # commands that are not answered
    drop: Callable[[Any], bool] = lambda event: False  # events that get lost
    bad: set[tuple[int, str]] = field(default_factory=set)  # (step, tier) that cannot be restored
    stop_at: int | None = None
    posted: set[int] = field(default_factory=set)
    released: bool = False
    finish_record: int | None = None
    done: set[int] = field(default_factory=set)
    _queue: list[tuple[float, int, Any]] = field(default_factory=list)
    _count: Any = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self.state = State.initial(self.policy, "run-1")
        self.later(0.0, lambda: self._tick())
        self.later(0.01, lambda: self._steps())

    # --- driving ---------------------------------------------------------------------------------------------

    def later(self, delay: float, event: Any) -> None:
        heapq.heappush(self._queue, (self.now + delay, next(self._count), event))

    def send(self, event: Any) -> tuple[Any, ...]:
        """Hand one event to the supervisor at once and carry out what it decides."""
        if self.drop(event):
            return ()
        before = self.state
        self.log.append(event)
        self.state, made = step(before, event)
        again = step(before, event)
        assert again == (self.state, made), "step is a function of its arguments"
        for command in made:
            self.log.append(command)
            self._carry_out(command)
        return made

    def run_for(self, seconds: float) -> World:
        end = self.now + seconds
        while self._queue and self._queue[0][0] <= end:
            at, _, item = heapq.heappop(self._queue)
            self.now = max(self.now, at)
            if callable(item):
                item()
            else:
                self.send(item)
        self.now = end
        return self

    def until(self, condition: Callable[[], Any], limit: float = 2000.0) -> World:
        end = self.now + limit
        while not condition():
            assert self.now < end, f"not reached in {limit} s: phase {self.state.phase}, {self.log[-12:]}"
            self.run_for(max(0.0, self._queue[0][0] - self.now))
        return self

    def run_to(self, phase: Phase, limit: float = 2000.0) -> World:
        return self.until(lambda: self.state.phase is phase, limit)

    def run_to_step(self, wanted: int) -> World:
        return self.until(lambda: self.ranks and min(rank.step for rank in self.ranks.values()) >= wanted)

    # --- things that happen ----------------------------------------------------------------------------------

    def join(self, *nodes: Node) -> World:
        for node in nodes:
            self.nodes[node.name] = node
            self.send(e.NodeJoined(self.now, node))
        return self

    def kill(self, rank: int, exit: Exit = SIGKILLED) -> World:
        self.ranks[rank].alive = False
        self.send(e.RankExited(self.now, self.running, rank, exit, self.ranks[rank].step))
        return self

    def lose_peers(self, rank: int) -> World:
        """What a rank does whose peer has vanished."""
        return self.kill(rank, PEER_LOST)

    def raise_in(self, rank: int, error: str = "ValueError: bad batch") -> World:
        """The training function fails on ``rank``."""
        return self.kill(rank, Exit(code=1, error=error, traceback=f"Traceback ...\n{error}"))

    def lose(self, node: str, reason: str = "ray says dead") -> World:
        self.nodes.pop(node, None)
        self.stopped.pop(node, None)
        for rank in self.ranks.values():
            if rank.node == node:
                rank.alive = False
        self.send(e.NodeLost(self.now, node, reason, self.now - 1.0))
        return self

    def fault(self, card: Card, code: str = "sim", **more: Any) -> World:
        self.send(e.CardFaulted(self.now, card, code, **more))
        return self

    def stop(self) -> World:
        self.send(e.StopRequested(self.now, "interrupted"))
        return self

    # --- looking ---------------------------------------------------------------------------------------------

    def made(self, kind: type) -> list[Any]:
        return [item for item in self.log if isinstance(item, kind)]

    def records(self, type_: str) -> list[c.Record]:
        return [record for record in self.made(c.Record) if record.type == type_]

    @property
    def outcome(self) -> Outcome | None:
        return self.state.outcome

    @property
    def incident(self) -> Incident:
        """The newest incident that is not over."""
        return self.state.open[-1]

    @property
    def recovered(self) -> list[dict[str, Any]]:
        return [record.data for record in self.records("incident.recovered")]

    def card_of(self, rank: int) -> Card:
        return self.state.table[rank].card

    def mark(self) -> World:
        """Forget the log so far."""
        self.log.clear()
        return self

    # --- the world's side ------------------------------------------------------------------------------------

    def _tick(self) -> None:
        self.later(self.tick_s, lambda: self._tick())
        self._report()
        self.send(e.Tick(self.now))

    def _report(self) -> None:
        by_node: dict[str, dict[int, RankProgress]] = {}
        for rank in self.ranks.values():
            if rank.alive and rank.node in self.nodes and rank.rank not in self.done:
                by_node.setdefault(rank.node, {})[rank.rank] = RankProgress(
                    rank.step, rank.section, self.now - rank.changed, rank.state
                )
        for node, pages in by_node.items():
            self.send(e.Progress(self.now, self.running, node, pages))

    def _steps(self) -> None:
        self.later(self.step_s, lambda: self._steps())
        everyone = list(self.ranks.values())
        healthy = everyone and all(rank.alive and rank.state != "T" for rank in everyone)
        if not healthy or any(rank.step < 0 or rank.section != "step" for rank in everyone):
            return
        for rank in everyone:
            if rank.parked or rank.rank in self.done:
                continue
            rank.step += 1
            rank.changed = self.now
            every = self.policy.checkpoint_every
            final = rank.step >= self.total
            if (
                (every and rank.step % every == 0)
                or rank.step in self.posted
                or rank.step == self.stop_at
                or final
            ):
                self._save(rank)
            if final:
                self._finish(rank, False)
            elif rank.step == self.stop_at:
                rank.parked = True
                self.later(0.02, e.Parked(self.now, self.running, rank.rank, rank.step))

    def _finish(self, rank: Rank, stopped: bool) -> None:
        self.done.add(rank.rank)
        self.later(0.05, e.RankFinished(self.now, self.running, rank.rank, rank.step, stopped))
        self.later(0.06, e.RankExited(self.now, self.running, rank.rank, Exit(code=0)))

    def _save(self, rank: Rank) -> None:
        generation, number, at, node = self.running, rank.rank, rank.step, rank.node
        self.later(0.01, e.Sealed(self.now, generation, number, at, 0.001, 100))
        for delay, tier in ((1, "nvme"), (2, "shared")):
            if tier == "shared" or self.nvme:
                self.later(
                    self.save_s * delay, lambda tier=tier: self._persist(generation, number, at, tier, node)
                )

    def _persist(self, generation: int, rank: int, at: int, tier: str, node: str) -> None:
        if node not in self.nodes:
            return  # its writer died with it
        self.persisted.setdefault((generation, at, tier), set()).add(rank)
        part = f"checkpoints/step-{at}-g{generation}/rank-{rank}.json"
        self.send(e.Persisted(self.now, generation, rank, at, tier, node, part, f"sha-{rank}", 100, 0.1))

    def candidates(self) -> tuple[Candidate, ...]:
        usable = [
            Candidate(ref, tier, self.policy.workers, hosts if tier == "nvme" else ())
            for (ref, tier), hosts in self.recorded.items()
            if ref not in self.retired and (ref, tier) not in self.quarantined
        ]
        return tuple(sorted(usable, key=lambda x: (-x.ref.step, -x.ref.generation, x.tier)))

    def _carry_out(self, command: Any) -> None:
        check = getattr(self, "_on_" + type(command).__name__.lower(), None)
        if check:
            check(command)

    def _on_fence(self, command: c.Fence) -> None:
        assert command.generation > self.fenced_asked, "generations only grow"
        self.fenced_asked = command.generation
        if c.Fence not in self.silent:
            self.later(0.02, lambda: self._fence(command.generation))

    def _fence(self, asked: int) -> None:
        self.generation = max(asked, self.generation + 1)
        self.fenced_asked = self.generation
        self.send(e.Fenced(self.now, self.generation, self.candidates(), slot=self.generation))

    def _on_openstore(self, command: c.OpenStore) -> None:
        assert command.node in self.nodes
        if c.OpenStore not in self.silent:
            self.later(0.03, e.StoreReady(self.now, command.generation, f"{command.node}:1"))

    def _on_stopranks(self, command: c.StopRanks) -> None:
        if command.node in self.nodes and c.StopRanks not in self.silent:
            self.later(0.05, lambda: self._stop(command))

    def _stop(self, command: c.StopRanks) -> None:
        for rank in self.ranks.values():
            if rank.node == command.node and self.running <= command.generation and rank.alive:
                rank.alive = False
                if rank.rank not in self.done:
                    self.send(e.RankExited(self.now, self.running, rank.rank, SIGKILLED))
        if command.node in self.nodes:
            self.send(e.RanksStopped(self.now, command.generation, command.node))

    def _on_startranks(self, command: c.StartRanks) -> None:
        assert command.generation == self.generation, "ranks start only under the newest fence"
        if command.generation not in self.started:
            for rank in self.ranks.values():
                assert not rank.alive or rank.node not in self.nodes, "an old rank is still there"
            cards = [assignment.card for assignment in command.table]
            assert len(set(cards)) == len(cards) == self.policy.workers
            assert not set(cards) & self.state.cluster.excluded
            self.started.add(command.generation)
            self.ranks, self.running, self.done = {}, command.generation, set()
            self.stop_at, self.posted, self.released = None, set(), False
        for assignment in command.table:
            if assignment.card.node == command.node:
                assert command.node in self.nodes
                self.ranks[assignment.rank] = Rank(assignment.rank, command.node, -1, changed=self.now)
                self.later(0.2, lambda a=assignment: self._restore(command, a.rank))

    def _restore(self, command: c.StartRanks, rank: int) -> None:
        one = self.ranks.get(rank)
        if self.running != command.generation or one is None or not one.alive or one.node not in self.nodes:
            return
        found = command.restore
        if found and (found.ref.step, found.tier) in self.bad:
            reason = f"{found.ref}/rank-{rank}.pack bytes 0..4096: crc"
            self.send(e.RestoreFailed(self.now, command.generation, rank, found.ref, found.tier, reason))
            return
        one.step, one.changed = (found.ref.step if found else 0), self.now
        tier = found.tier if found else None
        self.send(e.Restored(self.now, command.generation, rank, one.step, tier, 0.01))
        if one.step >= self.total:
            self._finish(one, False)

    def _on_commit(self, command: c.Commit) -> None:
        key = (command.ref.generation, command.ref.step, command.tier)
        assert {part[0] for part in command.parts} == set(range(self.policy.workers)), "a part is missing"
        assert self.persisted.get(key) == set(range(self.policy.workers)), "a part is not durable"
        asked = [x for x in self.made(c.Commit) if (x.ref, x.tier) == (command.ref, command.tier)]
        assert len(asked) == 1, "one commit per checkpoint and tier"
        if c.Commit not in self.silent:
            self.later(0.01, lambda: self._commit(command))

    def _commit(self, command: c.Commit) -> None:
        if command.ref.generation != self.generation:
            return  # fenced
        self.recorded[command.ref, command.tier] = tuple(part[1] for part in command.parts)
        self.send(e.Committed(self.now, command.ref, command.tier, len(self.recorded)))

    def _on_retire(self, command: c.Retire) -> None:
        live = [ref for ref, _ in self.recorded if ref not in self.retired]
        newest = max(live, key=lambda ref: (ref.step, ref.generation))
        assert newest not in command.refs, "the newest is never retired"
        self.retired.update(command.refs)
        shared = {ref for ref, tier in self.recorded if tier == "shared"}
        if shared:
            assert shared - self.retired, "the newest shared one is never retired"

    def _on_recordfinish(self, command: c.RecordFinish) -> None:
        if c.RecordFinish not in self.silent:
            self.later(0.01, lambda: self._finished(command.steps))

    def _finished(self, steps: int) -> None:
        self.finish_record = steps
        self.send(e.FinishRecorded(self.now))

    def _on_finish(self, command: c.Finish) -> None:
        told = any(fenced.finished for fenced in self.made(e.Fenced))
        if command.outcome.result is Result.FINISHED and not told:
            assert self.finish_record is not None, "finished before the log says so"

    def _on_quarantine(self, command: c.Quarantine) -> None:
        self.quarantined.add((command.ref, command.tier))

    def _on_postcheckpoint(self, command: c.PostCheckpoint) -> None:
        self._post(command.step, self.posted.add)

    def _on_poststop(self, command: c.PostStop) -> None:
        def take(step: int) -> None:
            self.stop_at = step
            for rank in self.ranks.values():
                rank.parked = False

        self._post(command.step, take)

    def _post(self, step: int, take: Callable[[int], None]) -> None:
        passed = [rank for rank in self.ranks.values() if rank.step > step]
        if not passed:
            take(step)
        for rank in passed:
            self.later(0.01, e.CheckpointMissed(self.now, self.running, rank.rank, step, rank.step))

    def _on_releasestop(self, command: c.ReleaseStop) -> None:
        assert all(rank.parked and rank.step == command.step for rank in self.ranks.values())
        for rank in self.ranks.values():
            self._finish(rank, True)


def nodes(count: int, cards: int = 2, per_supernode: int = 0) -> list[Node]:
    """``count`` nodes; with ``per_supernode`` grouped under ``sn-0``, ``sn-1`` …"""
    return [
        Node(f"node-{i}", cards, (f"sn-{i // per_supernode}",) if per_supernode else ()) for i in range(count)
    ]


@pytest.fixture
def make_world() -> Callable[..., World]:
    """``make_world(workers=4, nodes=3, ...policy)``: a world whose nodes have joined; more keywords are the world's."""

    def make(
        *,
        nodes_: Iterable[Node] | int = 3,
        cards: int = 2,
        per_supernode: int = 0,
        world: dict[str, Any] | None = None,
        **policy: Any,
    ) -> World:
        options = {"workers": 4, "spares": 2, "checkpoint_every": 10} | policy
        made = World(Policy(**options), **(world or {}))
        some = nodes(nodes_, cards, per_supernode) if isinstance(nodes_, int) else nodes_
        return made.join(*some)

    return make
