"""This package: arena and snapshot in this process, its real writer in another, one tier, retention with recycling."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable

import numpy as np

from benchmarks.checkpoint.machine import copy_rate
from benchmarks.checkpoint.state import State
from resilience.checkpoint import fit, retention
from resilience.checkpoint.arena import Arena
from resilience.checkpoint.part import draft
from resilience.checkpoint.plan import plan
from resilience.checkpoint.restore import Source, restore_into
from resilience.checkpoint.snapshot import snapshot, specs_of
from resilience.checkpoint.tree import flatten
from resilience.control.types import CheckpointRef
from resilience.runtime.spawn import spawn
from storage_backends import open_storage
from storage_backends.recycle import trim

_KEY = [1, 0, 1]  # generation, rank, arena


class Ours:
    """A rank and its writer. The arena is made once in a run, before the first save."""

    def __init__(
        self, state: State, root: str, *, nvme: str | None = None, drain_rate: float | None = None
    ) -> None:
        arrays, _ = flatten({"state": fit.capture(state)}, prefix="")
        self._plan = plan(specs_of(arrays, {"state": state}), rank=0, world_size=1)
        self._arena = Arena.create(2, self._plan.size)
        slot = self._arena.acquire()
        assert slot is not None
        sources = [tensor.numpy() for tensors in state.values() for tensor in tensors.values()]
        self.copy_s = copy_rate([np.asarray(source) for source in sources], self._arena.view(slot))
        self._arena.abort(slot)
        self._storage = open_storage(root)
        config = {"run": "benchmark", "name": "node", "env": {}}
        self._writer, self._channel = spawn("resilience.runtime.writer", config, subprocess.DEVNULL)  # type: ignore[arg-type]
        self._channel.send({"t": "open", "nvme": nvme, "shared": root, "drain_rate": drain_rate})
        self._near = "nvme" if nvme is not None else "shared"
        self._tiers = [self._storage, *([open_storage(nvme)] if nvme is not None else [])]
        self._channel.send({"t": "arena", "key": _KEY}, [self._arena.fd])
        self.pids = [self._writer.pid]
        self._step = 0
        self._steps: dict[str, tuple[int, Source]] = {}

    def save(self, state: State, directory: str) -> float:
        began = time.perf_counter()
        finish = self.begin(state, directory)
        stall = time.perf_counter() - began
        finish(self._near)
        return stall

    def begin(self, state: State, directory: str) -> Callable[[str], None]:
        """What training waits for. The answer returns when the state is durable in the tier it is given."""
        self._step += 1
        arrays, skeleton = flatten({"state": fit.capture(state)}, prefix="")
        slot = self._arena.acquire()
        assert slot is not None
        order = {"key": _KEY, "generation": 1, "rank": 0, "step": self._step, "slot": slot}

        def announce(attempt: int) -> None:
            part = draft(self._plan, skeleton, run="benchmark", step=self._step, generation=1)
            order["part"] = part.to_json()
            self._channel.send({"t": "follow", "attempt": attempt, **order})

        snapshot(self._arena, slot, arrays, self._plan, step=self._step, generation=1, announce=announce)
        self._channel.send({"t": "persist", **order})
        return lambda tier: self._finish(tier, directory)

    def _finish(self, tier: str, directory: str) -> None:
        missing = {("persisted", tier), ("slot_free", None)}
        while missing:
            message, _ = self._channel.receive()
            missing.discard((message["t"], message.get("tier")))
            if message["t"] == "persisted" and message["tier"] == "shared":
                source = Source(0, self._storage, message["part"], message["sha256"])
                self._steps[directory] = self._step, source
            elif message["t"] not in ("persisted", "slot_free"):
                raise RuntimeError(f"the save failed: {message}")

    def restore(self, state: State, directory: str) -> None:
        step, source = self._steps[directory]
        restore_into(
            [source], {"state": state}, run="benchmark", step=step, generation=1, rank=0, world_size=1
        )

    def discard(self, directory: str) -> None:
        ref = CheckpointRef(self._steps.pop(directory)[0], 1)
        for storage in self._tiers:
            retention.delete(storage, ref)

    def close(self) -> None:
        self._channel.close()
        self._writer.wait(10)
        self._arena.close()
        for storage in self._tiers:
            trim(storage)
