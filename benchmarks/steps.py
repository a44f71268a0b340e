"""What ``run.steps`` costs a step, with heartbeat and nothing to save: measured in a launched run.

    python -m benchmarks.steps

The body does nothing, in batches of 1000 steps; the same batches over a bare ``range`` are subtracted. One rank
under supervision, then the same in ``train.local()``, where nothing watches.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import resilience
from benchmarks import report

BATCH = 1000


@resilience.job
def train(run: resilience.Run, *, batches: int) -> list[float]:
    """Microseconds a step, one value a batch."""
    loop = run.steps(batches * BATCH)
    costs = []
    for _ in range(batches):
        began = time.perf_counter()
        for _ in range(BATCH):
            next(loop)
        costs.append((time.perf_counter() - began) / BATCH * 1e6)
    for _ in loop:
        raise AssertionError("more steps than asked for")
    return costs


def bare(batches: int) -> list[float]:
    loop = iter(range(batches * BATCH))
    costs = []
    for _ in range(batches):
        began = time.perf_counter()
        for _ in range(BATCH):
            next(loop)
        costs.append((time.perf_counter() - began) / BATCH * 1e6)
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--out", type=Path, default=report.RESULTS / "steps.json")
    arguments = parser.parse_args()
    note = report.machine("resilience", "ray")
    with tempfile.TemporaryDirectory(prefix="steps-") as directory:
        job = train.options(storage=directory, checkpoint_every=10**9)
        launched = job.launch(view="none", batches=arguments.batches)
    raw = {
        "launched": launched.value,
        "local": train.local(batches=arguments.batches),
        "bare range": bare(arguments.batches),
    }
    floor = statistics.median(raw["bare range"])
    results: dict[str, Any] = {
        name: report.percentiles([v - floor for v in raw[name]]) for name in ("launched", "local")
    }
    unit = "microseconds a step, bare range subtracted"
    report.write(
        arguments.out, {"benchmark": "steps", "machine": note, "unit": unit, "results": results, "raw": raw}
    )
    for name, cost in results.items():
        print(f"{name:10} p50 {cost['p50']:.2f} us  p95 {cost['p95']:.2f} us a step")


if __name__ == "__main__":
    main()
