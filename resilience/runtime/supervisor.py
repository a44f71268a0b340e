"""The supervisor: a detached Ray actor, named after its run, that drives ``control.supervise``.

It gathers what happens, asks ``step`` what to do, and has it done; every decision is in ``control``. One thread
runs that loop and never waits for storage or for a node: those answer with events.
"""

from __future__ import annotations

import os
import queue
import socket
import threading
import time
import traceback
import uuid
from typing import Any

import ray

from resilience.cards.codes import FaultCodes
from resilience.control import commands as c
from resilience.control import events as e
from resilience.control.supervise import State, step
from resilience.control.types import CheckpointRef, Outcome, Phase, Policy, Result
from resilience.runtime.chronicle import Chronicle
from resilience.runtime.failpoint import Failpoints
from resilience.runtime.faults import Faults
from resilience.runtime.logkeeper import LogKeeper
from resilience.runtime.nodes import Nodes
from resilience.runtime.orders import start_order
from resilience.runtime.translate import event_of, fault_of, line_of
from resilience.runtime.view import view_of
from storage_backends import open_storage

NAMESPACE = "resilience"
_TICK_S = 0.25
_ABANDON_S = 120.0  # for everything to end that is ended at once
_LEAVE_S = 30.0
_ORPHAN_S = 60.0  # a finished supervisor whose caller never comes for the result ends itself


PREFIX = "resilience:"


def actor_name(run: str) -> str:
    return PREFIX + run


class Supervisor:
    """Drives one run.

    Args:
        spec: plain data from the launcher: ``run, job, entry, env, arguments, policy, card, levels, storage, nvme,
            faults, fault_codes, wanted``.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        self._spec = spec
        os.environ.update(spec["env"])  # before storage is opened: its credentials may be in there
        self._policy = Policy(**spec["policy"])
        self._events: queue.SimpleQueue[e.Event] = queue.SimpleQueue()
        self._state = State.initial(self._policy, spec["run"], at=time.monotonic())
        self._storage = open_storage(spec["shared"])
        self._source = f"supervisor-{uuid.uuid4().hex[:8]}"
        self._broken: str | None = None  # traceback of a bug of ours: never hidden, always the end
        self._chronicle = Chronicle(self._storage, run=spec["run"], source=self._source, broken=self._break)
        self._plan = [{**fault, "index": i} for i, fault in enumerate(spec["faults"])]
        self._faults = Faults(self._chronicle)
        self._codes = FaultCodes.over(spec["fault_codes"])
        self._failpoints = Failpoints(self._plan, self._inject)
        self._log = LogKeeper(
            self._storage,
            self._chronicle,
            run=spec["run"],
            describe={"supervisor": f"{socket.gethostname()}/{os.getpid()}"},
            answer=self._events.put,
            reach=self._reach,
            nodes=self._order_all,
            broken=self._break,
            near=spec["nvme"] is not None,
        )
        self._nodes: Nodes | None = None
        self._restoring: CheckpointRef | None = None
        self._reported: dict[str, int] = {}  # node → number of its newest report
        self._metrics: dict[str, float] = {}
        self._value: str | None = None
        self._total: int | None = None
        self._done = threading.Event()
        self._collected = threading.Event()
        self._counting = threading.Lock()
        self._followers = 1

    # Called by the launcher.

    def start(self) -> None:
        """Begin: recruit nodes, and go."""
        spec = self._spec
        self._chronicle.write(
            "run.started", {**spec["describe"], "arguments": spec["arguments"]}, urgent=True
        )
        me = ray.get_runtime_context().current_actor
        self._nodes = Nodes(
            spec,
            me,
            self._plan,
            usable=lambda: self._state.cluster.available,
            lost=self._node_lost,
            broken=self._break,
        )
        self._nodes.start()
        threading.Thread(target=self._loop, name="supervise", daemon=True).start()

    def _break(self, traceback_text: str) -> None:
        """A thread of ours met an error that nobody foresaw: end the run with it, loudly."""
        self._broken = traceback_text
        threading.Thread(target=self._wind_down, name="finish", daemon=True).start()

    def report(self, node: str, number: int, batch: list[dict[str, Any]]) -> bool:
        """What a node's agent saw, ``number`` counting its reports: one that was taken already does nothing. False:
        the agent is not a member of the run any more."""
        assert self._nodes is not None
        if not self._nodes.heard(node):
            return False
        if number <= self._reported.get(node, 0):
            return True
        self._reported[node] = number
        try:
            for seen in batch:
                self._take(node, seen)
        except Exception:  # noqa: BLE001 - a bug of ours: it must end the run loudly
            self._break(traceback.format_exc())
        return True

    def view(self) -> dict[str, Any]:
        """The run right now, as plain data (see ``history.live``)."""
        view = view_of(
            self._state,
            self._log.state,
            metrics=self._metrics,
            failing=self._chronicle.failing,
            card=self._spec["card"],
        )
        return {**view, "steps": self._total}

    def wait(self, timeout: float) -> dict[str, Any] | None:
        """The outcome, or ``None`` when the run is still going after ``timeout`` seconds."""
        if not self._done.wait(timeout):
            return None
        outcome = self._state.outcome
        if self._broken is not None or outcome is None:
            outcome = Outcome(
                Result.UNAVAILABLE, f"the supervisor failed, please report this:\n{self._broken}"
            )
        finished = self._log.state.finished or {}
        return {
            "outcome": outcome,
            "value": finished.get("value"),
            "steps": finished.get("step", self._steps()),
            "view": {**self.view(), "result": outcome.result.value},
        }

    def _steps(self) -> int:
        return max(self._state.step, self._state.restored_step, 0)

    def request_stop(self, reason: str) -> None:
        self._events.put(e.StopRequested(time.monotonic(), reason))

    def report_fault(self, node: str, seen: dict[str, Any], storage: str | None) -> str | None:
        """A third party reports a fault of a card of ``node`` (``seen`` as ``translate.fault_of`` takes it). ``None``:
        taken; else why not. ``storage``: only if the run is kept there."""
        if storage is not None and storage.rstrip("/") != self._spec["storage"].rstrip("/"):
            return f"it is kept in {self._spec['storage']}"
        nodes = self._state.cluster.nodes
        if node not in nodes:
            return f"it has no node {node!r}; its nodes: {', '.join(sorted(nodes)) or 'none yet'}"
        if not 0 <= seen["index"] < nodes[node].cards:
            return f"node {node} has {nodes[node].cards} cards, counted from 0"
        if self._state.phase is Phase.DONE:
            return "it has ended"
        self._events.put(fault_of(node, seen, time.monotonic(), self._codes))
        return None

    def abandon(self) -> None:
        """End everything now, without a last checkpoint; what is committed stays. Nothing happens while more than
        one launcher follows the run."""
        with self._counting:
            if self._followers > 1:
                return
        if self._nodes is None:  # it was never started: there is no loop to end it
            self._wind_down()
            return
        self._events.put(e.StopRequested(time.monotonic(), "interrupted twice (Ctrl-C)", at_once=True))
        self._done.wait(_ABANDON_S)

    def attach(self) -> None:
        """Another launcher follows this run."""
        with self._counting:
            self._followers += 1

    def collected(self) -> int:
        """A launcher has the result. Returns how many still want it; at 0 nothing is left to stay for."""
        with self._counting:
            self._followers -= 1
            if self._followers <= 0:
                self._collected.set()
            return self._followers

    # The loop.

    def _loop(self) -> None:
        try:
            self._supervise()
        except Exception:  # noqa: BLE001 - a bug of ours: reported as the outcome of the run
            self._break(traceback.format_exc())
        self._done.wait()  # ending may take long, where storage is away: the outcome is not lost to that
        if self._collected.wait(_ORPHAN_S):
            threading.Event().wait(
                _LEAVE_S
            )  # whoever has the outcome takes us down, unless it died at that moment
        os._exit(0)

    def _supervise(self) -> None:
        ticked = time.monotonic()
        while self._state.phase is not Phase.DONE and self._broken is None:
            try:
                # Deadlines are judged on ticks only, and those come after what was reported before them.
                event: e.Event = self._events.get(timeout=max(0.0, ticked + _TICK_S - time.monotonic()))
            except queue.Empty:
                ticked = time.monotonic()
                event = e.Tick(ticked)
            self._state, commands = step(self._state, event)
            for command in commands:
                getattr(self, f"_do_{type(command).__name__.lower()}")(command)

    def _do_stopranks(self, command: c.StopRanks) -> None:
        order = {"t": "stop", "generation": command.generation, "token": command.node}
        if not self._order(command.node, order):
            self._events.put(e.RanksStopped(time.monotonic(), command.generation, command.node))

    def _do_openstore(self, command: c.OpenStore) -> None:
        self._order(command.node, {"t": "store", "generation": command.generation})

    def _do_startranks(self, command: c.StartRanks) -> None:
        assert self._nodes is not None
        self._restoring = command.restore.ref if command.restore else None
        plan = [fault for fault in self._plan if not self._faults.fired(fault)]
        self._order(command.node, start_order(command, self._spec, self._log.state, self._nodes, plan))
        self._reach("ranks.started", node=command.node, generation=command.generation)

    def _do_postcheckpoint(self, command: c.PostCheckpoint) -> None:
        self._post(command.generation, "checkpoint_at", command.step)

    def _do_poststop(self, command: c.PostStop) -> None:
        # The checkpoint first: a rank that sees the stop must already see that it is to save there.
        self._post(command.generation, "checkpoint_at", command.step)
        self._post(command.generation, "stop_at", command.step)

    def _do_releasestop(self, command: c.ReleaseStop) -> None:
        self._post(command.generation, "release_at", command.step)

    def _post(self, generation: int, word: str, value: int) -> None:
        self._order_all({"t": "post", "generation": generation, "word": word, "step": value})

    def _do_record(self, command: c.Record) -> None:
        if command.type == "checkpoint.abandoned" and command.step is not None:
            self._log.discard(CheckpointRef(command.step, self._state.generation))
        self._chronicle.write(
            command.type,
            command.data,
            urgent=command.urgent,
            rank=command.rank,
            node=command.node,
            card=command.card,
            step=command.step,
        )

    def _to_log(self, command: c.Command) -> None:
        self._log.perform(command)

    _do_fence = _do_commit = _do_quarantine = _do_retire = _to_log

    def _do_recordfinish(self, command: c.RecordFinish) -> None:
        self._log.value = self._value
        self._log.perform(command)

    def _do_finish(self, _command: c.Finish) -> None:
        threading.Thread(target=self._wind_down, name="finish", daemon=True).start()

    def _wind_down(self) -> None:
        """End agents and threads; only then tell the caller, so that nothing of ours is left by then."""
        try:
            self._log.close()  # first: its last removals are orders to the agents
            if self._nodes is not None:
                self._nodes.close()
            self._chronicle.close()
        finally:
            self._done.set()

    # What happens.

    def _take(self, node: str, seen: dict[str, Any]) -> None:
        at = time.monotonic()
        kind = seen["t"]
        if kind == "ready":
            joined = self._nodes.ready(node) if self._nodes else None
            if joined is not None:
                self._events.put(e.NodeJoined(at, joined))
        elif kind == "store":
            host = self._nodes.member(node) if self._nodes else None
            if host is not None:
                address = f"{host.node.host}:{seen['port']}"
                self._events.put(e.StoreReady(at, seen["generation"], address))
        elif kind == "inject":
            threading.Thread(target=self._injection, args=(node, seen), daemon=True).start()
        elif kind == "load_failed":
            self._events.put(e.LoadFailed(at, node, seen["error"], seen["traceback"]))
        else:
            if kind == "stepped":
                self._total = seen["total"]
            if kind == "finished" and seen["rank"] == 0:
                self._value = seen["value"]
            if kind == "log" and seen["values"] and seen["rank"] == 0:
                self._metrics = {**self._metrics, **seen["values"][-1]}
            event = event_of(node, seen, at, self._restoring, self._codes)
            if event is not None:
                self._events.put(event)
            line = line_of(node, seen)
            if line is not None:
                self._chronicle.write(line[0], line[1], **line[2])

    def _node_lost(self, name: str, reason: str, last_seen: float) -> None:
        if name not in self._state.cluster.nodes:  # it never joined, so no decision will speak of it
            message = f"node {name} could not be used: {reason}"
            self._chronicle.write("warning.raised", {"message": message}, node=name, severity="warning")
        self._events.put(e.NodeLost(time.monotonic(), name, reason, last_seen))

    def _order(self, node: str, order: dict[str, Any]) -> bool:
        return self._nodes is not None and self._nodes.order(node, order)

    def _order_all(self, order: dict[str, Any]) -> None:
        for member in self._nodes.alive() if self._nodes else ():
            self._order(member.node.name, order)

    # Faults on purpose.

    def _reach(self, point: str, **context: Any) -> None:
        if self._failpoints:
            self._failpoints.reach(point, **context)

    def _injection(self, node: str, seen: dict[str, Any]) -> None:
        """A process of ``node`` waits at its failpoint: carry the fault out, then let it go on."""
        self._inject(self._plan[seen["index"]])
        source = seen.get("source") or f"rank-{seen['rank']}-g{seen['generation']}"
        self._order(node, {"t": "injected", "source": source})

    def _inject(self, fault: dict[str, Any]) -> None:
        if self._nodes is not None:
            self._faults.carry_out(fault, self._state.table, self._nodes)


def supervisor_options(run: str) -> dict[str, Any]:
    """Options of the actor: detached, so that it outlives the caller; many callers at once."""
    return {
        "name": actor_name(run),
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "num_cpus": 0,
        "max_concurrency": 32,
        "max_restarts": 0,
    }
