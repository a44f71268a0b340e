"""The training under this package: ``train.launch()`` on a local cluster, a checkpoint every k steps.

``command`` starts it; run as a program this file launches the run and waits for its end.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import resilience
from benchmarks.recovery.workload import Lines, Settings, build, train_step

VERSIONS = ("resilience", "ray", "torch")


def command(settings: Settings, path: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.recovery.ours", path]


@resilience.job
def train(run: resilience.Run, *, config: dict[str, Any]) -> None:
    settings = Settings(**config)
    dist.init_process_group("gloo")
    model, optimizer, loader = build(run.rank, DistributedDataParallel)
    run.track(model=model, optimizer=optimizer, loader=loader)
    lines = Lines(settings, run.rank)
    for step in run.steps(settings.steps):
        loss = train_step(model, optimizer, loader)
        run.log(loss=loss)
        if lines.done(step + 1):
            break


def main() -> None:
    settings = Settings.load(sys.argv[1])
    train.options(
        workers=settings.ranks,
        checkpoint_every=settings.every,
        storage=os.path.join(settings.directory, "shared"),
        nvme=os.path.join(settings.directory, "nvme"),
        max_restarts=settings.kills + 10,
    ).launch(view="plain", config=vars(settings))


if __name__ == "__main__":
    main()
