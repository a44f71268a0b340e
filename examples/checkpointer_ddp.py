"""The same under torchrun: ``torchrun --nproc-per-node 2 examples/checkpointer_ddp.py runs/ddp 200``.

What DistributedDataParallel replicates is written once; any number of ranks can go on from it.
"""

import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from resilience import Checkpointer


def main(url: str, steps: int) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(1)
    model = DistributedDataParallel(torch.nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    state = {"model": model, "optimizer": optimizer}

    with Checkpointer(url, rank=rank, world_size=world) as checkpointer:
        done = checkpointer.restore(into=state) or 0
        for step in range(done + 1, steps + 1):
            x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step * world + rank))
            loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 10 == 0 or step == steps:
                checkpointer.save(step, state)
            if rank == 0:
                print(f"step {step} of {steps}, from {done}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
