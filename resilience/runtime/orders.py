"""What a node's agent is told to start: ranks with their environment, and what they restore from.

Turns the decision (``control.commands.StartRanks``) into plain data for ``runtime.node``. Decides nothing.
"""

from __future__ import annotations

from typing import Any

from resilience.cards.probe import VISIBLE
from resilience.control.commands import StartRanks
from resilience.control.types import Assignment
from resilience.journal.state import LogState
from resilience.runtime.nodes import Nodes
from storage_backends import child


def start_order(
    command: StartRanks, spec: dict[str, Any], log: LogState, nodes: Nodes, failpoints: list[dict[str, Any]]
) -> dict[str, Any]:
    """The order that starts the ranks of ``command.node``.

    Args:
        spec: the launch spec.
        log: the commit log as the fence found it; holds the checkpoint to restore.
        failpoints: planned faults that have not fired.
    """
    restore, fetch = _restore(command, spec, log, nodes)
    here = [a for a in command.table if a.card.node == command.node]
    ranks = [
        {
            "rank": a.rank,
            "local_rank": a.local_rank,
            "world_size": len(command.table),
            "run": spec["run"],
            "checkpoint_every": spec["policy"]["checkpoint_every"],
            "snapshot": spec.get("snapshot", "blocking"),
            "restore": restore,
            "arguments": spec["arguments"],
            "failpoints": failpoints,
            "env": _environment(a, command, spec, len(here)),
        }
        for a in here
    ]
    return {"t": "start", "generation": command.generation, "ranks": ranks, "fetch": fetch}


def _environment(a: Assignment, command: StartRanks, spec: dict[str, Any], local: int) -> dict[str, str]:
    """The variables torchrun would set: ``init_process_group()`` finds rank, world and store in them; and the card.

    Cards are counted as NVML and Ray do, in PCI order; CUDA itself would put the fastest first.
    """
    host, _, port = command.store.rpartition(":")
    return {
        "RANK": str(a.rank),
        "WORLD_SIZE": str(len(command.table)),
        "LOCAL_RANK": str(a.local_rank),
        "LOCAL_WORLD_SIZE": str(local),
        "MASTER_ADDR": host,
        "MASTER_PORT": port,
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": str(command.generation),
        "TORCHELASTIC_RUN_ID": spec["run"],
        VISIBLE.get(spec["card"], "RESILIENCE_CARD"): str(a.card.index),
        **({"CUDA_DEVICE_ORDER": "PCI_BUS_ID"} if spec["card"] == "GPU" else {}),
    }


def _restore(
    command: StartRanks, spec: dict[str, Any], log: LogState, nodes: Nodes
) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """What the ranks restore from, and what their agent has to fetch from peers first."""
    candidate = command.restore
    if candidate is None:
        return None, []
    entry = next(found for found in log.checkpoints if found.ref == candidate.ref).tiers[candidate.tier]
    near = candidate.tier == "nvme"
    root = child(spec["nvme"], spec["run"], command.node) if near else spec["shared"]
    fetch = []
    for part in entry.parts if near else ():
        peer = nodes.member(part.node) if part.node != command.node else None
        if peer is not None:
            names = (part.name, part.name.removesuffix(".json") + ".pack")
            fetch += [{"peer": peer.agent, "name": name} for name in names]
    order = {
        "step": candidate.ref.step,
        "generation": candidate.ref.generation,
        "tier": candidate.tier,
        "parts": [
            {"rank": part.rank, "storage": root, "part": part.name, "sha256": part.sha256}
            for part in entry.parts
        ],
    }
    return order, fetch
