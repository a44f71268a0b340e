"""The training under Ray Train: ``TorchTrainer`` with ``FailureConfig(max_failures=-1)``, on a local cluster.

``command`` starts it; run as a program this file starts the cluster, trains, and shuts the cluster down.
``raytrain`` runs with Ray's defaults; ``raytrain-fast`` polls its workers ten times a second instead of every
two seconds, for a user who knows of ``RAY_TRAIN_HEALTH_CHECK_INTERVAL_S``.
"""

from __future__ import annotations

import os
import sys
import tempfile
from typing import Any

from benchmarks.recovery.workload import Lines, Settings, build, save_file, train_step

VERSIONS = ("ray", "torch")


def command(settings: Settings, path: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.recovery.ray_train", path]


def fast_command(settings: Settings, path: str) -> list[str]:
    return [*command(settings, path), "fast"]


def loop(config: dict[str, Any]) -> None:
    import ray.train
    import ray.train.torch
    import torch

    settings = Settings(**config)
    context = ray.train.get_context()
    model, optimizer, loader = build(context.get_world_rank(), ray.train.torch.prepare_model)
    start = 0
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as directory:
            state = torch.load(os.path.join(directory, "checkpoint.pt"), weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        loader.load_state_dict(state["loader"])
        start = state["step"]
    lines = Lines(settings, context.get_world_rank())
    for step in range(start, settings.steps):
        loss = train_step(model, optimizer, loader)
        done = step + 1
        if lines.done(done):
            return
        if done % settings.every:
            continue
        with tempfile.TemporaryDirectory() as directory:
            saved = None
            if context.get_world_rank() == 0:
                objects = {"model": model, "optimizer": optimizer, "loader": loader}
                state = {"step": done, **{name: value.state_dict() for name, value in objects.items()}}
                save_file(os.path.join(directory, "checkpoint.pt"), state)
                saved = ray.train.Checkpoint.from_directory(directory)
            ray.train.report({"loss": loss}, checkpoint=saved)  # every rank has to call it


def main() -> None:
    settings = Settings.load(sys.argv[1])
    if sys.argv[2:] == ["fast"]:
        os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.1"
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    ray.init(num_cpus=settings.ranks + 1)
    try:
        TorchTrainer(
            loop,
            train_loop_config=vars(settings),
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=ScalingConfig(num_workers=settings.ranks, resources_per_worker={"CPU": 1}),
            run_config=RunConfig(
                name="recovery",
                storage_path=os.path.join(settings.directory, "storage"),
                failure_config=FailureConfig(max_failures=-1),
                checkpoint_config=CheckpointConfig(num_to_keep=3),
            ),
        ).fit()
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
