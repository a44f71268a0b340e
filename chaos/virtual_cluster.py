"""A cluster of several nodes on this machine: one raylet each, with simulated cards, in supernodes.

For tests and the demo: a node is killed by killing its processes. The head has no cards, so the supervisor
runs on a node of its own, as it should.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from types import TracebackType
from typing import Any

import ray
from ray.cluster_utils import Cluster

from resilience.runtime.nodes import LEVEL_LABEL, NODE_LABEL

# A killed node is to be seen in seconds; a busy one is not to be taken for dead.
_SYSTEM = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 8000,
}
_STORE_BYTES = 80 << 20  # Ray's smallest object store: only control messages and peer copies pass through it


class VirtualCluster:
    """Several raylets on one machine, and this process connected to them.

    Args:
        cards: simulated cards of each node, e.g. ``[2, 2, 2]``.
        supernodes: the supernode of each node; default: all in ``supernode-0``.
    """

    def __init__(self, cards: list[int], *, supernodes: list[int] | None = None) -> None:
        self._cards = cards
        self._supernodes = supernodes or [0] * len(cards)
        self._cluster: Any = None
        self._added = 0
        self._nodes: dict[Any, int] = {}  # Ray's handle of a node → its cards

    def __enter__(self) -> VirtualCluster:
        quiet = {
            "RAY_DEDUP_LOGS": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "RAY_ENABLE_METRICS_COLLECTION": "0",
        }
        for key, value in quiet.items():
            os.environ.setdefault(key, value)
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 2,
                "num_gpus": 0,
                "include_dashboard": False,
                "object_store_memory": _STORE_BYTES,
                "_system_config": _SYSTEM,
            },
        )
        for cards, supernode in zip(self._cards, self._supernodes, strict=True):
            self.add_node(cards, supernode=supernode)
        ray.init(address=self._cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        self._wait_for_cards(len(self._cards))
        return self

    def add_node(self, cards: int, *, supernode: int = 0) -> str:
        """Add a node; returns its name."""
        name = f"node-{self._added}"
        self._added += 1
        node = self._cluster.add_node(
            wait=False,
            num_cpus=2,
            num_gpus=0,
            resources={"card": cards},
            object_store_memory=_STORE_BYTES,
            labels={NODE_LABEL: name, LEVEL_LABEL.format("supernode"): f"supernode-{supernode}"},
        )
        self._nodes[node] = cards
        return name

    @property
    def address(self) -> str:
        """What other processes put into RAY_ADDRESS to run on this cluster."""
        return str(self._cluster.address)

    def heal(self) -> None:
        """Replace nodes whose raylet died, so that there are as many as at the start; returns when all are there.

        Looks at the processes: Ray itself takes seconds to notice.
        """
        dead = [node for node in self._nodes if not _raylet_alive(node)]
        for node in dead:
            self._cluster.remove_node(node, allow_graceful=False)
            self.add_node(self._nodes.pop(node))
        if dead:
            self._wait_for_cards(len(self._cards))

    def _wait_for_cards(self, nodes: int, timeout: float = 60.0) -> None:
        deadline = time.monotonic() + timeout
        while sum(bool(n["Alive"] and n["Resources"].get("card")) for n in ray.nodes()) < nodes:  # type: ignore[no-untyped-call]
            if time.monotonic() > deadline:
                raise TimeoutError(f"{nodes} nodes with cards did not join within {timeout} s")
            time.sleep(0.05)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ray.shutdown()
        # A node whose raylet was killed on purpose cannot be shut down in good order; its other processes can.
        with contextlib.suppress(AssertionError):
            self._cluster.shutdown()


def _raylet_alive(node: Any) -> bool:
    return all(info.process.poll() is None for info in node.all_processes.get("raylet", []))
