"""The training under ``torchrun --max-restarts``: rank 0 saves every k steps, every start resumes.

``command`` starts it; run as a program this file is the script that torchrun runs.
"""

from __future__ import annotations

import os
import sys

from benchmarks.recovery.workload import Lines, Settings, build, save_file, train_step

VERSIONS = ("torch",)
# Without it torchrun's agent and its workers share one store, a restarted worker reads addresses of dead ones
# from it, and with gloo no restart ever succeeds (pytorch#135712): the way around that its users found.
ENVIRONMENT = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def command(settings: Settings, path: str) -> list[str]:
    """Defaults throughout (it polls its workers every 0.1 s); one agent, as there is one machine."""
    restarts = ["--standalone", f"--nproc-per-node={settings.ranks}", f"--max-restarts={settings.kills + 10}"]
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *restarts,
        "-m",
        "benchmarks.recovery.torchrun",
        path,
    ]


def main() -> None:
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    settings = Settings.load(sys.argv[1])
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model, optimizer, loader = build(rank, DistributedDataParallel)
    path, start = os.path.join(settings.directory, "checkpoint.pt"), 0
    if os.path.exists(path):
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        loader.load_state_dict(state["loader"])
        start = state["step"]
    lines = Lines(settings, rank)
    for step in range(start, settings.steps):
        train_step(model, optimizer, loader)
        done = step + 1
        if lines.done(done):
            break
        if done % settings.every == 0 and rank == 0:
            state = {"model": model, "optimizer": optimizer, "loader": loader}
            save_file(path, {"step": done, **{name: value.state_dict() for name, value in state.items()}})
    os._exit(0)  # freeing a gloo group can deadlock (pytorch#56297); its end is not what is measured


if __name__ == "__main__":
    main()
