"""The node agent: a Ray actor, one per node, that owns the node's cards and its processes.

It reports what it observes to the supervisor and carries out what comes back. It holds the node's cards as Ray
resources, so nobody else's work lands on them. An agent that is told it is lost, or that cannot reach the
supervisor for a whole lease, ends its ranks and itself, so that the cards of a cut-off node come free.
"""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray

from resilience.cards.health import CardFault
from resilience.cards.probe import VISIBLE, devices, open_probe
from resilience.cards.simulated import SimulatedCards
from resilience.cards.watch import HealthWatch
from resilience.checkpoint import retention
from resilience.checkpoint.part import Part
from resilience.control.types import CheckpointRef
from resilience.errors import CorruptError, ResilienceError
from resilience.runtime.node import NodeProcesses
from resilience.runtime.output import Outputs
from storage_backends import open_storage
from storage_backends.recycle import trim

HEARTBEAT_S = 0.5
LEASE_S = 60.0
_POLL_S = 1.0  # between two looks at the cards
_LOOK: dict[str, Any] = {"t": "look"}  # wakes the reporter: a simulated card was told to fail
_BLOCK = 32 << 20
_PEER_S = 60.0  # a peer that does not answer for so long is given up


class NodeAgent:
    """Made by the supervisor, one per node.

    Args:
        config: see ``NodeProcesses``; plus ``host``, ``cards`` and ``card``, the Ray resource they are.
        supervisor: handle of the supervisor actor.
    """

    def __init__(self, config: dict[str, Any], supervisor: Any) -> None:
        self._config = config
        os.environ.update(config["env"])  # before storage is opened: its credentials may be in there
        self._supervisor = supervisor
        self._observed: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._closed = threading.Event()
        self._slow: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._slow_worker = threading.Thread(target=self._slow_loop, name="files", daemon=True)
        self._stopped = 0  # newest generation that was told to stop
        self._reporter = threading.Thread(target=self._report_loop, name="reports", daemon=True)
        self._cards = SimulatedCards()  # on real ones too: what chaos tests inject
        self._devices = devices(config["card"], config["cards"])
        self._health = HealthWatch(
            lambda: open_probe(config["card"], self._devices), self._faulted, self._warn
        )
        self._poll_at = 0.0
        scratch = str(Path(config["nvme"].removeprefix("file://"))) if config["nvme"] else None
        self._outputs = Outputs(open_storage(config["shared"]), scratch, self._warn)
        self._processes = NodeProcesses(config, self._outputs, self._observe)

    def _observe(self, seen: dict[str, Any]) -> None:
        self._observed.put(seen)
        if seen["t"] == "exited":
            self._health.look()  # a card may explain it, and must do so before the blame has settled

    def _faulted(self, fault: CardFault) -> None:
        self._observed.put({"t": "card", **asdict(fault)})

    def _warn(self, message: str) -> None:
        self._observed.put({"t": "warning", "message": message})

    def start(self) -> int:
        """Begin: the zygote imports the user's module, reports start to flow. Returns this process's id."""
        self._processes.start()
        self._reporter.start()
        self._slow_worker.start()
        self._health.start()
        return os.getpid()

    def lifeline(self) -> None:
        """Return when the agent ends: the supervisor waits on this call to learn of our death at once."""
        self._closed.wait()

    def perform(self, orders: list[dict[str, Any]]) -> None:
        """Take orders, in order. Returns before they are done, so that none waits for another: answers come as
        reports."""
        for order in orders:
            kind = order["t"]
            if kind == "fail_card":
                self._cards.fail(order["index"], detail="injected")
                self._poll_at = 0.0
                self._observed.put(_LOOK)
            elif kind == "die":
                self._die()
            elif kind in ("delete", "sweep", "trim") or (kind == "start" and order.get("fetch")):
                self._slow.put(order)
            else:
                if kind == "stop":
                    self._stopped = max(self._stopped, order["generation"])
                self._forward(order)

    def _slow_loop(self) -> None:
        """Orders that read or remove files: they may take long, and stop orders must not wait for them."""
        while True:
            order = self._slow.get()
            if order is None:
                return
            if order["t"] != "start":
                self._remove(order)
                continue
            trouble = self._fetch(order["fetch"])
            if trouble is not None:
                for rank in order["ranks"]:
                    rank["restore"]["unfetched"] = trouble
            if order["generation"] > self._stopped:  # its generation may have ended while we fetched
                self._forward(order)

    def _forward(self, order: dict[str, Any]) -> None:
        """To the processes; ranks are told their card as its driver calls it, which Ray alone knows."""
        variable = VISIBLE.get(self._config["card"])
        for rank in order["ranks"] if order["t"] == "start" and variable else ():
            rank["env"][variable] = self._devices[int(rank["env"][variable])]
        self._processes.order(order)

    def read(self, name: str, start: int, end: int) -> bytes:
        """Bytes of a file of this node's nvme tier, for a peer that has to restore from it."""
        return open_storage(self._config["nvme"]).read(name, start, end)

    def size(self, name: str) -> int:
        return open_storage(self._config["nvme"]).size(name)

    def _remove(self, order: dict[str, Any]) -> None:
        """Remove checkpoints that the log does not hold (any more) from this node's nvme tier."""
        if self._config["nvme"] is None:
            return
        ours = open_storage(self._config["nvme"])
        try:
            if order["t"] == "trim":
                trim(ours)
                return
            if order["t"] == "sweep":
                refs = retention.stale(ours, kept=order["kept"], below=order["below"])
            else:
                refs = [CheckpointRef(order["step"], order["generation"])]
            for ref in refs:
                retention.delete(ours, ref)
                self._observed.put({"t": "deleted", "step": ref.step, "of": ref.generation})
        except ResilienceError as error:
            self._observed.put(
                {"t": "warning", "message": f"could not remove checkpoints from nvme: {error}"}
            )

    def _fetch(self, wanted: list[dict[str, Any]]) -> str | None:
        """Copy packs and parts of peers into our own nvme tier. What went wrong, ``None`` if nothing did."""
        ours = open_storage(self._config["nvme"])
        wanted = list(wanted)
        for item in wanted:  # grows on the way: a part names older packs
            size, read = (
                getattr(item["peer"], name).options(concurrency_group="read") for name in ("size", "read")
            )
            name = item["name"]
            try:
                length = ray.get(size.remote(name), timeout=_PEER_S)
                with ours.sink(name, length) as sink:
                    for start in range(0, length, _BLOCK):
                        sink.write(
                            ray.get(read.remote(name, start, min(length, start + _BLOCK)), timeout=_PEER_S)
                        )
                if name.endswith(".json"):
                    part = Part.decode(ours.read(name), path=name)
                    wanted += [{**item, "name": pack} for pack, _size in part.packs[1:]]
            except (FileNotFoundError, CorruptError):
                continue  # lost for good: the restore finds it missing or damaged, and names it
            except (ray.exceptions.RayError, ResilienceError, OSError) as error:
                return f"{name} could not be fetched from a peer: {type(error).__name__}: {error}"[:500]
        return None

    def _report_loop(self) -> None:
        last_reply = time.monotonic()
        number = 0
        while True:
            closing = self._closing.is_set()
            batch = self._batch()
            if time.monotonic() >= self._poll_at:
                self._poll_at = time.monotonic() + _POLL_S
                batch += [{"t": "card", **asdict(fault)} for fault in self._cards.poll()]
                self._health.check()
            number += 1
            # The same report is sent until it is answered: what is in it (a rank's end, a save) is said only once.
            while (welcome := self._report(number, batch)) is None:
                if time.monotonic() - last_reply > LEASE_S:
                    welcome = False  # nobody there for a whole lease: free the cards
                    break
                self._closing.wait(HEARTBEAT_S)
            last_reply = time.monotonic()
            if not welcome or any(seen["t"] == "broken" for seen in batch):
                self._processes.close()
                self._outputs.close()
                os._exit(0)
            if closing:
                return

    def _report(self, number: int, batch: list[dict[str, Any]]) -> bool | None:
        """Whether we are welcome; ``None`` if no answer came."""
        try:
            return bool(
                ray.get(self._supervisor.report.remote(self._config["name"], number, batch), timeout=LEASE_S)
            )
        except ray.exceptions.ActorDiedError:
            return False  # it does not come back, and its successor starts agents of its own
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            return None

    def _batch(self) -> list[dict[str, Any]]:
        batch = []
        try:
            batch.append(self._observed.get(timeout=HEARTBEAT_S))
            while True:
                batch.append(self._observed.get_nowait())
        except queue.Empty:
            return [seen for seen in batch if seen is not _LOOK]

    def _die(self) -> None:
        """Fail as a node does, all at once: every process of it, its raylet, this one. For chaos only."""
        for pid in self._processes.pids():
            os.kill(pid, signal.SIGKILL)
        parent = os.getppid()
        if "raylet" in Path(f"/proc/{parent}/cmdline").read_text().split("\0")[0]:
            os.kill(parent, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    def close(self) -> None:
        """End every process of this node; returns when they are gone, and files are removed that were to be."""
        self._health.close()
        self._slow.put(None)
        if self._slow_worker.ident is not None:
            self._slow_worker.join(_PEER_S)
        self._processes.close()
        self._outputs.close()
        self._closing.set()
        self._observed.put({"t": "closing"})  # wakes the reporter, which reports all up to here, and ends
        if self._reporter.ident is not None:
            self._reporter.join(10)
        self._closed.set()
