"""``python -m benchmarks.checkpoint.training``: what a training loop loses while saves are persisted and drained.

One process trains (matrix products on all cores) and, in turns, does nothing else, or saves a snapshot that the
writer persists to the near tier and drains to the shared one at the same time. Reported: how much longer a step
takes while a save is on its way, the copy itself left out, for each rate of the drain.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import report
from benchmarks.checkpoint.ours import Ours
from benchmarks.checkpoint.state import gpt_state, size_of


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--directory", default=os.getcwd(), help="where to write; default: the current directory"
    )
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--rates", type=float, nargs="*", default=[0, 0.25], help="of the drain, GB/s; 0 is no bound"
    )
    parser.add_argument("--out", type=Path, default=report.RESULTS / "checkpoint_training.json")
    arguments = parser.parse_args()
    note = report.machine("resilience", "torch")
    state = gpt_state(arguments.gib)
    results: dict[str, Any] = {}
    for rate in arguments.rates:
        root = tempfile.mkdtemp(prefix="training-", dir=arguments.directory)
        try:
            results[str(rate)] = measure(state, root, rate * 1e9 or None, arguments.rounds)
        finally:
            shutil.rmtree(root)
        alone, saving = (median(itertools.chain(*results[str(rate)][key])) for key in ("alone", "saving"))
        print(
            f"drain at {rate or 'any'} GB/s: step {alone * 1e3:.1f} ms alone, {saving * 1e3:.1f} ms while a save is ",
            end="",
        )
        print(f"on its way: {saving / alone - 1:+.1%}", flush=True)
    report.write(
        arguments.out,
        {"benchmark": "checkpoint_training", "machine": note, "size": size_of(state), "rates": results},
    )


def measure(state: Any, root: str, rate: float | None, rounds: int) -> dict[str, list[list[float]]]:
    system = Ours(state, os.path.join(root, "shared"), nvme=os.path.join(root, "nvme"), drain_rate=rate)
    matrix = torch.rand(1024, 1024)
    found: dict[str, list[list[float]]] = {"alone": [], "saving": []}

    def steps(until: threading.Event) -> list[float]:
        times = []
        while not until.is_set() or len(times) < 5:
            began = time.perf_counter()
            for _ in range(4):
                matrix @ matrix
            times.append(time.perf_counter() - began)
        return times

    try:
        for number in range(rounds):
            if number >= 2:
                system.discard(f"save-{number - 2}")
            pause = threading.Event()
            threading.Timer(1.0, pause.set).start()
            found["alone"].append(steps(pause))
            for tensors in state.values():
                for tensor in tensors.values():
                    tensor.view(-1)[:: 1 << 20] += 1  # no chunk holds the same bytes again
            finish = system.begin(state, f"save-{number}")
            drained = threading.Event()
            waiter = threading.Thread(
                target=lambda finish=finish, done=drained: (finish("shared"), done.set())
            )
            waiter.start()
            found["saving"].append(steps(drained))
            waiter.join()
    finally:
        system.close()
    return found


if __name__ == "__main__":
    main()
