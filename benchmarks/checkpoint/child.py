"""``python -m benchmarks.checkpoint.child``: one system in a process of its own, with the device's own figures beside.

Prints one line of JSON. A process of its own, so that memory and processor time are this system's, and none finds
the allocator warmed up by another.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from typing import Any

import torch

from benchmarks.checkpoint import systems
from benchmarks.checkpoint.machine import Meter, drop_cache, raw_rates
from benchmarks.checkpoint.state import gpt_state, same, size_of


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("system", choices=systems.SYSTEMS)
    parser.add_argument("--directory", required=True)
    parser.add_argument("--gib", type=float, required=True)
    parser.add_argument("--saves", type=int, required=True)
    arguments = parser.parse_args()
    root = tempfile.mkdtemp(prefix="checkpoint-", dir=arguments.directory)
    out = os.dup(1)
    os.dup2(2, 1)  # the systems talk too
    try:
        result = measure(arguments.system, root, arguments.gib, arguments.saves)
    finally:
        shutil.rmtree(root)
    with os.fdopen(out, "w") as file:
        file.write(json.dumps(result) + "\n")


def measure(name: str, root: str, gib: float, saves: int) -> dict[str, Any]:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    state = gpt_state(gib)
    size = size_of(state)
    system = systems.load(name, state, os.path.join(root, "store"))
    result: dict[str, Any] = {"size": size, "device": [raw_rates(root, size)], "saves": []}
    if hasattr(system, "copy_s"):
        result["copy_s"] = system.copy_s
    with contextlib.closing(system):
        directories = [os.path.join(root, f"save-{number}") for number in range(saves)]
        for number, directory in enumerate(directories):
            for tensors in state.values():
                for tensor in tensors.values():
                    tensor.view(-1)[:: 1 << 20] += 1  # no chunk holds the same bytes again
            if number >= 2:  # two are kept: the newest and the one before it
                system.discard(directories[number - 2])
            meter = Meter(system.pids)
            began = time.perf_counter()
            stall = system.save(state, directory)
            seconds = time.perf_counter() - began
            result["saves"].append(
                {"save_s": seconds, "stall_s": seconds if stall is None else stall, **meter.read()}
            )
        result["device"].append(raw_rates(root, size))
        drop_cache(root)
        held = {
            kind: {key: torch.zeros_like(t) for key, t in tensors.items()} for kind, tensors in state.items()
        }
        meter = Meter(system.pids)
        began = time.perf_counter()
        system.restore(held, directories[-1])
        result["restore"] = {"restore_s": time.perf_counter() - began, **meter.read()}
        if (wrong := same(state, held)) is not None:
            raise AssertionError(f"{name} brought back another {wrong}")
    return result


if __name__ == "__main__":
    main()
    sys.stdout.flush()
