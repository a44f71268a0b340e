"""Any order of events: safety in every step, and life again once the world answers.

An adversary holds what is on its way and delivers it in any order, twice, or late, while ranks die, nodes vanish and
cards fail. It knows the truth (which processes live where, what the log holds) and checks every command against it.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resilience.control import commands as c
from resilience.control import events as e
from resilience.control.faults import Action
from resilience.control.supervise import State, step
from resilience.control.types import (
    Candidate,
    Card,
    CheckpointRef,
    Exit,
    Node,
    Phase,
    Policy,
    RankProgress,
    Result,
)

WORKERS = 3
ENDS = (
    Exit(signal=9),
    Exit(signal=6),
    Exit(code=3),
    Exit(code=1, error="RuntimeError: Connection reset by peer"),
)


class Adversary:
    def __init__(self, max_restarts: int) -> None:
        policy = Policy(WORKERS, spares=1, checkpoint_every=5, max_restarts=max_restarts, keep_last=2)
        self.state = State.initial(policy, "r")
        self.now = 0.0
        self.way: list[Any] = []  # events, or functions that make one when they are delivered
        self.past: list[Any] = []
        self.log = 0  # newest generation fenced
        self.fence_open = False
        self.told = 0  # newest generation the supervisor knows
        self.procs: dict[str, int] = {}  # node -> generation of living processes
        self.dead: set[str] = set()
        self.names = 0
        self.steps: dict[int, int] = {}
        self.saved = 1
        self.started: set[int] = set()
        self.table: tuple[Any, ...] = ()
        self.parts: dict[tuple[int, int, str], set[int]] = {}  # delivered
        self.recorded: dict[tuple[CheckpointRef, str], tuple[str, ...]] = {}
        self.bad: set[tuple[CheckpointRef, str]] = set()
        self.retired: set[CheckpointRef] = set()
        self.committed: set[tuple[CheckpointRef, str]] = set()
        self.finished = False
        self.record_open = self.recorded_finish = False
        self.record_asked = 0
        self.detected: set[str] = set()
        self.recovered: list[str] = []
        self.join(0)
        self.join(1)

    # --- what can happen -------------------------------------------------------------------------------------

    def join(self, k: int) -> None:
        node = Node(f"n{self.names}", 1 + k % 2, (f"sn{k % 2}",))
        self.names += 1
        self.send(e.NodeJoined(self.now, node))

    def deliver(self, k: int) -> None:
        if self.way:
            self.arrive(self.way.pop(k % len(self.way)))

    def again(self, k: int) -> None:
        if self.past:
            self.send(self.past[k % len(self.past)])

    def tick(self, k: int) -> None:
        self.now += (0.1, 0.25, 1.0, 7.0, 20.0)[k % 5]
        self.send(e.Tick(self.now))

    def progress(self, k: int) -> None:
        nodes = sorted(self.procs)
        if not nodes:
            return
        node = nodes[k % len(nodes)]
        pages = {}
        for a in self.table:
            if a.card.node == node:
                self.steps[a.rank] = self.steps.get(a.rank, -1) + 1
                pages[a.rank] = RankProgress(self.steps[a.rank], "step", 0.1, "T" if k % 97 == 0 else "S")
        self.send(e.Progress(self.now, self.procs[node], node, pages))

    def save(self, k: int) -> None:
        if self.procs:
            generation, at = max(self.procs.values()), 5 * (self.saved + k % 3)
            self.saved += k % 2
            for a in self.table:
                self.way.append(e.Sealed(self.now, generation, a.rank, at, 0.1, 10))
                for tier in ("nvme", "shared"):
                    if (k + a.rank) % 23:
                        made = e.Persisted(
                            self.now, generation, a.rank, at, tier, a.card.node, "p", "s", 10, 0.1
                        )
                    else:
                        made = e.SaveFailed(self.now, generation, a.rank, at, tier, "ENOSPC")
                    self.way.append(made)

    def exit(self, k: int) -> None:
        if self.procs:
            self.send(
                e.RankExited(self.now, max(self.procs.values()), k % WORKERS, ENDS[k // 3 % len(ENDS)], k % 9)
            )

    def lose(self, k: int) -> None:
        alive = sorted(self.state.cluster.nodes)
        if alive:
            name = alive[k % len(alive)]
            self.dead.add(name)
            self.procs.pop(name, None)
            self.send(e.NodeLost(self.now, name, "gone", self.now - 1))

    def fault(self, k: int) -> None:
        node = f"n{k % max(1, self.names)}"
        affects = (Card(node, 1 - k % 2),) if k % 5 == 0 else ()
        action = tuple(Action)[k // 7 % len(Action)]
        limit = 2 if k % 3 == 0 else None
        event = e.CardFaulted(self.now, Card(node, k % 2), f"sim-{k // 11 % 4}", "", action, affects=affects)
        self.send(replace(event, limit=limit, certain=k % 13 == 0))

    def damage(self, k: int) -> None:
        attempt = self.state.attempt
        if self.state.phase is Phase.STARTING and attempt is not None and attempt.restore is not None:
            found = attempt.restore
            corrupt = bool(k % 2)
            self.send(
                e.RestoreFailed(self.now, attempt.won, k % WORKERS, found.ref, found.tier, "crc", corrupt)
            )

    def miss(self, k: int) -> None:
        self.send(e.CheckpointMissed(self.now, self.told, k % WORKERS, k % 13, k % 17))
        self.send(e.Parked(self.now, self.told, k % WORKERS, k % 13))

    def finish(self, k: int) -> None:
        if self.procs:
            self.send(e.RankFinished(self.now, max(self.procs.values()), k % WORKERS, 50, bool(k % 2)))

    def nonsense(self, k: int) -> None:
        g, rank, at = k % 7, k % 11 - 3, self.now - k % 50
        events = (
            e.Restored(at, g, rank, k % 40, "nvme"),
            e.RankExited(at, g, rank, Exit(code=1, error="ValueError: x")),
            e.RankFinished(at, g, rank, 3),
            e.Sealed(at, g, rank, 5, 0.1, 1),
            e.Persisted(at, g, rank, 5, "shared", "n0", "p", "s", 1, 0.1),
            e.Committed(at, CheckpointRef(5, g), "shared", 3),
            e.CommitFailed(at, CheckpointRef(5, g), "nvme", "x"),
            e.StoreReady(at, g, "h:1"),
            e.RanksStopped(at, g, f"n{k % 5}"),
            e.Progress(at, g, f"n{k % 5}", {rank: RankProgress(k % 30, "eval", 0.1)}),
            e.NodeLost(at, "never-there", "x", at),
            e.Fenced(at, self.told),
        )
        event = events[k % len(events)]
        # What would be true or harmful if it came from the current generation is no nonsense but a lie.
        if getattr(event, "generation", 0) != self.told or isinstance(event, (e.StoreReady, e.Fenced)):
            if isinstance(event, e.RanksStopped) and g >= max(self.started, default=0):
                return
            if isinstance(event, (e.Fenced, e.StoreReady)) and self.fence_open:
                return
            if isinstance(event, (e.Committed, e.CommitFailed)) and event.ref.generation in self.started:
                return
            self.send(event)

    def stop(self, k: int) -> None:
        if k % 5 == 0:
            self.send(e.StopRequested(self.now))

    # --- the truth -------------------------------------------------------------------------------------------

    def arrive(self, item: Any) -> None:
        event = item() if isinstance(item, Callable) else item
        if event is not None:
            self.send(event)

    def send(self, event: Any) -> None:
        before = self.state
        if isinstance(event, e.Persisted) and event.generation == self.told and not self.fence_open:
            key = (event.generation, event.step, event.tier)
            self.parts.setdefault(key, set()).add(event.rank)
        self.state, made = step(before, event)
        assert step(before, event) == (self.state, made)
        if before.phase is Phase.DONE:
            assert made == ()
            assert self.state is before
            return
        self.past.append(event)
        stopped = False
        for command in made:
            if isinstance(command, c.Record):
                assert not (stopped and command.type in ("incident.detected", "incident.decided")), (
                    "act first"
                )
            stopped = stopped or isinstance(command, (c.StopRanks, c.Fence, c.StartRanks))
            handler = getattr(self, f"on_{type(command).__name__.lower()}", None)
            if handler:
                handler(command)
        self.check()

    def check(self) -> None:
        state = self.state
        cluster = state.cluster
        healthy = {
            Card(name, i) for name, node in cluster.nodes.items() for i in range(node.cards)
        } - cluster.excluded
        assert cluster.available == len(healthy)
        assert (state.phase is Phase.DONE) == self.finished
        assert state.phase is not Phase.RUNNING or not state.open
        assert len(set(self.recovered)) == len(self.recovered)

    def on_record(self, command: c.Record) -> None:
        if command.type == "incident.detected":
            assert command.data["incident"] not in self.detected
            self.detected.add(command.data["incident"])
        if command.type == "incident.recovered":
            assert command.data["incident"] in self.detected
            assert min(command.data["phases"].values()) >= 0
            self.recovered.append(command.data["incident"])

    def on_fence(self, command: c.Fence) -> None:
        assert not self.fence_open, "two fences asked for at once"
        assert command.generation > self.told
        self.fence_open = True

        def answer() -> e.Fenced:
            self.log = max(command.generation, self.log + 1)
            self.fence_open = False
            self.told = self.log
            found = [
                Candidate(ref, tier, WORKERS, hosts if tier == "nvme" else ())
                for (ref, tier), hosts in self.recorded.items()
                if ref not in self.retired and (ref, tier) not in self.bad
            ]
            unusable = [Candidate(*place, WORKERS) for place in self.bad if place[0] not in self.retired]
            found.sort(key=lambda x: (-x.ref.step, -x.ref.generation, x.tier))
            return e.Fenced(self.now, self.log, tuple(found), unusable=tuple(unusable))

        self.way.append(answer)

    def on_openstore(self, command: c.OpenStore) -> None:
        assert command.node in self.state.cluster.nodes
        self.way.append(e.StoreReady(self.now, command.generation, "h:1"))

    def on_stopranks(self, command: c.StopRanks) -> None:
        def answer() -> e.RanksStopped | None:
            if command.node in self.dead:
                return None
            if self.procs.get(command.node, 0) <= command.generation:
                self.procs.pop(command.node, None)
            return e.RanksStopped(self.now, command.generation, command.node)

        self.way.append(answer)

    def on_startranks(self, command: c.StartRanks) -> None:
        assert command.generation == self.told, "the fence must be won first"
        assert not self.fence_open
        if command.generation not in self.started:
            living = [name for name in self.procs if name in self.state.cluster.nodes]
            assert not living, "an old process lives on a living node"
            self.procs.clear()  # what a node that was given up still runs is fenced
            assert all(command.generation > old for old in self.started)
            cards = {a.card for a in command.table}
            assert len(cards) == WORKERS
            assert not cards & self.state.cluster.excluded
            assert [a.rank for a in command.table] == list(range(WORKERS))
            self.started.add(command.generation)
            self.table, self.steps = command.table, {}
            if command.restore is None:
                shared = [ref for ref, tier in self.recorded if tier == "shared" and ref not in self.retired]
                assert not shared, "from scratch over a checkpoint that is recorded"
        assert command.node in self.state.cluster.nodes
        self.procs[command.node] = command.generation
        base = command.restore.ref.step if command.restore else 0
        for a in command.table:
            if a.card.node == command.node:
                self.steps[a.rank] = base - 1
                self.way.append(e.Restored(self.now, command.generation, a.rank, base, None))

    def on_commit(self, command: c.Commit) -> None:
        assert command.ref.generation == self.told
        assert not self.fence_open, "the next generation was asked for already"
        assert (command.ref, command.tier) not in self.committed
        self.committed.add((command.ref, command.tier))
        assert [part[0] for part in command.parts] == list(range(WORKERS)), "a part is missing"
        key = (command.ref.generation, command.ref.step, command.tier)
        assert self.parts[key] == set(range(WORKERS)), "a part is not durable"

        def answer() -> Any:
            if command.ref.generation < self.log:
                return None  # fenced meanwhile
            if command.ref.step % 15 == 0:
                return e.CommitFailed(self.now, command.ref, command.tier, "away")
            hosts = tuple(part[1] for part in command.parts)
            self.recorded[command.ref, command.tier] = hosts
            return e.Committed(self.now, command.ref, command.tier, 1)

        self.way.append(answer)

    def on_retire(self, command: c.Retire) -> None:
        live = {ref for ref, tier in self.recorded if (ref, tier) not in self.bad} - self.retired
        newest = max(live, key=lambda ref: (ref.step, ref.generation))
        assert newest not in command.refs
        shared = {ref for ref, tier in self.recorded if tier == "shared" and (ref, tier) not in self.bad}
        self.retired.update(command.refs)
        assert not shared or shared - self.retired, "the last shared checkpoint is retired"

    def on_quarantine(self, command: c.Quarantine) -> None:
        self.bad.add((command.ref, command.tier))

    def on_recordfinish(self, command: c.RecordFinish) -> None:
        assert not self.fence_open
        assert not self.record_open, "two finish records asked for at once"
        self.record_open = True
        self.record_asked += 1

        def answer() -> Any:
            self.record_open = False
            if self.log > self.told:
                return e.FenceLost(self.now, "newer")
            if self.record_asked % 2:
                return e.FinishFailed(self.now, "away")
            self.recorded_finish = True
            return e.FinishRecorded(self.now)

        self.way.append(answer)

    def on_finish(self, command: c.Finish) -> None:
        assert not self.finished
        assert command.outcome.result is not Result.FINISHED or self.recorded_finish
        self.finished = True

    # --- life ------------------------------------------------------------------------------------------------

    def heal(self) -> None:
        """Cards join, everything is answered in order, ranks step: the run must step again, or have ended."""
        if self.state.phase is Phase.DONE:
            return
        for k in range(5):
            self.join(k)
        for _ in range(800):
            if self.state.phase is Phase.DONE:
                return
            if self.state.phase is Phase.RUNNING and self.state.trouble is None and not self.way:
                return
            while self.way:
                self.arrive(self.way.pop(0))
            for node in sorted(self.procs):
                pages = {a.rank: RankProgress(99, "step", 0.0) for a in self.table if a.card.node == node}
                self.send(e.Progress(self.now, self.procs[node], node, pages))
            self.now += 0.25
            self.send(e.Tick(self.now))
        raise AssertionError(f"stuck in {self.state.phase}: {self.state}")


RARE = ("again", "join", "exit", "lose", "fault", "damage", "miss", "finish", "nonsense", "stop")
COMMON = {"deliver": 8, "progress": 4, "tick": 2, "save": 2}
EVERYTHING = (*(name for name, weight in COMMON.items() for _ in range(weight)), *RARE)
orders = st.lists(st.tuples(st.sampled_from(EVERYTHING), st.integers(0, 1 << 12)), min_size=10, max_size=150)


def judge(world: Adversary) -> None:
    """The run steps again, or has ended for a reason that is true."""
    world.heal()
    outcome = world.state.outcome
    if outcome is not None:
        stopped = any(isinstance(event, e.StopRequested) for event in world.past)
        finished = any(isinstance(event, e.RankFinished) for event in world.past)
        allowed = {
            Result.INTERRUPTED: stopped,
            Result.FINISHED: finished,
            Result.UNAVAILABLE: finished,  # its last checkpoint could not be saved
            Result.NO_CHECKPOINT: bool(world.bad),
            Result.NO_CAPACITY: True,  # judged below
        }
        assert allowed.get(outcome.result, False), outcome
        if outcome.result is Result.NO_CAPACITY:
            assert world.state.cluster.available < WORKERS


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(orders)
def test_any_order_is_safe_and_life_goes_on(order):
    world = Adversary(max_restarts=1000)
    for name, k in order:
        getattr(world, name)(k)
    judge(world)


def test_long_schedules():
    """Longer than hypothesis goes, each with its own mix of trouble. ``CONTROL_SEEDS=5000`` for a soak."""
    started = recovered = retired = 0
    for seed in range(int(os.environ.get("CONTROL_SEEDS", "80"))):
        rng = random.Random(seed)
        world = Adversary(max_restarts=1000)
        weights = [
            *COMMON.values(),
            *(rng.random() ** 2 * (0.2 if n in ("stop", "lose") else 0.8) for n in RARE),
        ]
        try:
            for name in rng.choices([*COMMON, *RARE], weights, k=rng.randint(50, 500)):
                getattr(world, name)(rng.randrange(1 << 12))
            judge(world)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        started += len(world.started)
        recovered += len(world.recovered)
        retired += len(world.retired)
    assert started > 80, "schedules that start nothing prove nothing"
    assert recovered > 40
    assert retired > 0


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(orders, st.integers(0, 3))
def test_any_order_with_a_small_budget(order, max_restarts):
    world = Adversary(max_restarts)
    for name, k in order:
        getattr(world, name)(k)
    world.heal()


def test_a_terminal_state_absorbs_everything(make_world):
    world = make_world().run_to(Phase.DONE)
    before = world.state
    for event in (e.Tick(1e9), e.StopRequested(1e9), e.NodeLost(1e9, "node-0", "x", 1e9), e.Fenced(1e9, 9)):
        assert step(before, event) == (before, ())


def test_time_never_runs_backwards(make_world):
    world = make_world().run_to_step(3)
    before = world.state.now
    world.send(e.Tick(0.0))
    assert world.state.now == before


def test_another_supervisor_ends_this_one_in_any_phase(make_world):
    world = make_world().run_to_step(3).mark()
    world.send(e.FenceLost(world.now, "newer"))
    assert world.outcome.result is Result.FENCED
    assert world.made(c.StopRanks)
    world = make_world().run_to_step(3)
    world.send(e.FenceLost(world.now, "storage away", newer=False))
    assert world.state.phase is Phase.RUNNING  # no fence was asked for: training goes on


def test_one_event_costs_the_same_in_a_world_a_hundred_times_as_large():
    """Counted in calls, not seconds: a pass over all ranks would show on any machine."""
    import sys

    def calls(workers: int) -> int:
        state = State.initial(Policy(workers=workers), "r")
        for i in range(workers // 8):
            state, _ = step(state, e.NodeJoined(0.0, Node(f"n{i}", 8)))
        state, _ = step(state, e.StoreReady(0.0, 1, "h:1"))
        state, _ = step(state, e.Fenced(0.0, 1))
        for node in range(workers // 8):
            pages = {node * 8 + i: RankProgress(0, "step", 0.0) for i in range(8)}
            state, _ = step(state, e.Progress(1.0, 1, f"n{node}", pages))
        assert state.phase is Phase.RUNNING
        count = 0

        def tracer(frame, event, arg):
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(tracer)
        try:
            pages = {i: RankProgress(1, "step", 0.0) for i in range(8)}
            state, _ = step(state, e.Progress(2.0, 1, "n0", pages))
            state, _ = step(state, e.Tick(2.1))
            state, _ = step(state, e.Sealed(2.2, 1, 3, 5, 0.1, 10))
            state, _ = step(state, e.Persisted(2.3, 1, 3, 5, "nvme", "n0", "p", "s", 10, 0.1))
            state, _ = step(state, e.RankFinished(2.4, 1, 3, 5))
        finally:
            sys.setprofile(None)
        return count

    assert calls(6400) < 1.3 * calls(64)
