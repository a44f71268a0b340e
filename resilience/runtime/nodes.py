"""Which machines the run has: an agent for each, and the news when one comes, dies, or falls silent.

Ray tells which nodes are alive; the agents' own reports tell it sooner. Reports what it sees; whether a node is
needed, replaced or waited for is decided in ``control``.
"""

from __future__ import annotations

import socket
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from resilience.control.recruit import recruit
from resilience.control.types import Node
from resilience.runtime.agent import NodeAgent
from storage_backends import child

NODE_LABEL = "resilience.io/node"
LEVEL_LABEL = "resilience.io/{}"
_LATE_S = 2.0  # a look that comes so late has heard nobody meanwhile: it was us who stood still
SILENCE_S = 10.0  # a dead agent is seen at once; this is for one that is stopped or cut off
_LOOK_EVERY_S = 0.5
_CLOSE_S = 15.0
_JOIN_PATIENCE_S = 30.0
_REJOIN_S = 60.0  # a machine whose agent was lost may be well: it is asked again, under another name


@dataclass
class Member:
    """A node of the run and its agent."""

    node: Node
    ray_id: str
    agent: Any
    lifeline: Any
    last_seen: float
    enlisted: float
    ready: bool = False
    excused_s: float = 0.0  # of its silence: we did not listen


class Nodes:
    """The nodes of one run.

    Args:
        spec: the launch spec (``run, entry, env, nvme, shared, drain_rate, card, levels, wanted`` cards).
        supervisor: handle of the supervisor, for the agents to report to.
        usable: cards of the joined nodes that may be used, as ``control`` sees it.
        lost: called with (name, reason, last seen) when a member is gone.
        broken: called with the traceback of an error that is a bug of ours.
    """

    def __init__(
        self,
        spec: dict[str, Any],
        supervisor: Any,
        failpoints: list[dict[str, Any]],
        usable: Callable[[], int],
        lost: Callable[[str, str, float], None],
        broken: Callable[[str], None],
    ) -> None:
        self._spec = spec
        self._supervisor = supervisor
        self._failpoints = failpoints
        self._usable = usable
        self._lost = lost
        self._broken = broken
        self._members: dict[str, Member] = {}
        self._past: set[str] = set()  # a name that was lost does not come back: it is another node's now
        self._gone: dict[
            str, float
        ] = {}  # Ray id of a node whose agent was lost → when it may be asked again
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="nodes", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def member(self, name: str) -> Member | None:
        with self._lock:
            return self._members.get(name)

    def alive(self) -> list[Member]:
        with self._lock:
            return [m for m in self._members.values() if m.ready]

    def heard(self, name: str) -> bool:
        """An agent reported. False: it is no member (any more), and must go."""
        with self._lock:
            member = self._members.get(name)
            if member is None:
                return False
            member.last_seen, member.excused_s = time.monotonic(), 0.0
            return True

    def ready(self, name: str) -> Node | None:
        """An agent's zygote is warm; its node, the first time."""
        with self._lock:
            member = self._members.get(name)
            if member is None or member.ready:
                return None
            member.ready = True
            return member.node

    def order(self, name: str, *orders: dict[str, Any]) -> bool:
        """Send orders to a node's agent. False when there is no such member."""
        member = self.member(name)
        if member is None:
            return False
        member.agent.perform.remote(list(orders))
        return True

    def close(self) -> None:
        """End every agent and its processes; returns when they are gone (or their node is)."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(10)
        with self._lock:
            members = list(self._members.values())
        calls = [m.agent.close.remote() for m in members]
        if calls:
            ray.wait(calls, num_returns=len(calls), timeout=_CLOSE_S)
        with self._lock:
            self._members.clear()
        for member in members:
            ray.kill(member.agent)

    def _watch(self) -> None:
        try:
            self._look_after()
        except Exception:  # noqa: BLE001 - a bug of ours: it must end the run loudly, not this thread silently
            self._broken(traceback.format_exc())

    def _look_after(self) -> None:
        looked = time.monotonic()
        next_look = 0.0
        while not self._closing.is_set():
            now = time.monotonic()
            self._excuse(now - looked)
            looked = now
            if now >= next_look:
                next_look = now + _LOOK_EVERY_S
                alive = _alive_nodes()
                if alive is not None:
                    self._recruit(alive)
                    self._miss(alive)
            with self._lock:
                lifelines = {m.lifeline: name for name, m in self._members.items()}
            if not lifelines:
                self._closing.wait(0.1)
                continue
            ended, _ = ray.wait(list(lifelines), timeout=0.2)
            for ref in ended:
                self._drop(lifelines[ref], _why(ref))

    def _recruit(self, alive: dict[str, Any]) -> None:
        """Enlist what ``control.recruit`` chooses of the nodes that could be."""
        now = time.monotonic()
        with self._lock:
            members = list(self._members.values())
            barred = {ray_id for ray_id, until in self._gone.items() if until > now}
        known = {m.ray_id for m in members} | barred
        offers = {
            node.name: (ray_id, node)
            for ray_id, info in alive.items()
            if ray_id not in known and (node := self._offer(ray_id, info)).cards > 0
        }
        # An agent that does not come up (its node is dead, and Ray has not noticed) counts for a while only.
        joining = [m for m in members if not m.ready and now - m.enlisted < _JOIN_PATIENCE_S]
        healthy = self._usable() + sum(m.node.cards for m in joining)
        near = [m.node for m in members if m.ready] + [m.node for m in joining]
        chosen = recruit([node for _, node in offers.values()], near, self._spec["wanted"], healthy)
        for name in chosen:
            self._enlist(*offers[name])

    def _offer(self, ray_id: str, info: dict[str, Any]) -> Node:
        """A node of Ray's as it would join."""
        labels = info.get("Labels") or {}
        # A name that the machine keeps over runs, so that what it wrote to its nvme tier is found again.
        name = _plain(labels.get(NODE_LABEL) or info.get("NodeManagerHostname") or socket.gethostname())
        with self._lock:
            if name in self._members or name in self._past:
                name = f"{name}-{ray_id[:6]}"
                if name in self._members or name in self._past:
                    name = f"{name}-{len(self._past)}"
        levels = tuple(
            labels[key] for level in self._spec["levels"] if (key := LEVEL_LABEL.format(level)) in labels
        )
        cards = int(info["Resources"].get(self._spec["card"], 0))
        return Node(name, cards, levels, info["NodeManagerAddress"])

    def _enlist(self, ray_id: str, node: Node) -> None:
        spec, card = self._spec, self._spec["card"]
        config = {
            "name": node.name,
            "host": node.host,
            "cards": node.cards,
            "card": card,
            "run": spec["run"],
            "entry": spec["entry"],
            "env": spec["env"],
            "shared": spec["shared"],
            "nvme": child(spec["nvme"], spec["run"], node.name) if spec["nvme"] else None,
            "drain_rate": spec.get("drain_rate"),
        }
        agent = (
            ray.remote(concurrency_groups={"watch": 1, "read": 4})(NodeAgent)  # type: ignore[call-overload]
            .options(
                num_cpus=0,
                num_gpus=node.cards if card == "GPU" else None,
                resources=None if card == "GPU" else {card: node.cards},
                scheduling_strategy=NodeAffinitySchedulingStrategy(ray_id, soft=False),
                max_restarts=0,
            )
            .remote(config, self._supervisor)
        )
        lifeline = agent.lifeline.options(concurrency_group="watch").remote()
        now = time.monotonic()
        with self._lock:
            self._members[node.name] = Member(node, ray_id, agent, lifeline, last_seen=now, enlisted=now)
        agent.perform.remote([{"t": "arm", "failpoints": self._failpoints}])
        agent.start.remote()

    def _miss(self, alive: dict[str, Any]) -> None:
        with self._lock:
            members = list(self._members.items())
        now = time.monotonic()
        for name, member in members:
            silent_s = now - member.last_seen - member.excused_s
            if member.ray_id not in alive:
                self._drop(name, "Ray says that the node died")
            elif member.ready and silent_s > SILENCE_S:
                self._drop(name, f"no report from its agent for {silent_s:.1f} s")

    def _excuse(self, since_s: float) -> None:
        """The last look was ``since_s`` ago. If we stood still (a paused machine, a stopped process), what agents
        said meanwhile has yet to be heard: that is no silence of theirs."""
        if since_s > _LATE_S:
            with self._lock:
                for member in self._members.values():
                    member.excused_s += since_s

    def _drop(self, name: str, reason: str) -> None:
        with self._lock:
            member = self._members.pop(name, None)
            if member is None:
                return
            self._gone[member.ray_id] = time.monotonic() + _REJOIN_S
            self._past.add(name)
        self._lost(name, reason, member.last_seen)
        ray.kill(member.agent)  # if it lives after all: it is fenced, and its cards are wanted back


def _plain(name: str) -> str:
    """``name`` as a segment of object names."""
    return "".join(ch if ch.isalnum() or ch in "._-" else "-" for ch in name)


def _why(lifeline: Any) -> str:
    """Why an agent ended: what its call says, in a line."""
    try:
        ray.get(lifeline, timeout=1.0)
    except ray.exceptions.ActorDiedError as error:
        # The constructor's own error is worth more than Ray's account of a death.
        cause = str(error).strip().splitlines()
        told = [line for line in cause if "Error" in line and "ActorDiedError" not in line]
        return f"its agent died: {told[-1].strip()}" if told else "its agent died"
    except ray.exceptions.RayError as error:
        return f"its agent died: {type(error).__name__}"
    return "its agent ended"


def _alive_nodes() -> dict[str, Any] | None:
    """Ray's living nodes by id; ``None`` while Ray cannot say (its head restarts): that is no news of any node."""
    try:
        return {n["NodeID"]: n for n in ray.nodes() if n["Alive"]}  # type: ignore[no-untyped-call]
    except (ray.exceptions.RayError, ConnectionError, TimeoutError, RuntimeError):
        return None
