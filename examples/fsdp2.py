"""A transformer under FSDP2 (``fully_shard``), saved as it lies and restored by any number of ranks.

Start it with ``resilience run examples/fsdp2.py:train --workers 2``, stop it with Ctrl-C, and go on with three ranks:
``resilience run examples/fsdp2.py:train --workers 3``. No rank ever holds the whole model, nor gathers it to save it.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import resilience
from resilience.integrations.torch import State

TOKENS, BATCH = 61, 12


def build(width: int, layers: int) -> nn.Module:
    """A small language model; nothing in it knows of ranks."""
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(width, 2, 4 * width, dropout=0.0, batch_first=True)
    return nn.Sequential(
        nn.Embedding(TOKENS, width), nn.TransformerEncoder(block, layers), nn.Linear(width, TOKENS)
    )


def batch(step: int) -> torch.Tensor:
    """The whole batch of a step, the same however many ranks share it: sequences that count on in steps of 1 to 5."""
    draw = torch.Generator().manual_seed(step)
    start = torch.randint(TOKENS, (BATCH, 1), generator=draw)
    stride = torch.randint(1, 6, (BATCH, 1), generator=draw)
    return (start + stride * torch.arange(17)) % TOKENS


def loss_of(model: nn.Module, sequences: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of the next token, given the last three."""
    seen = sequences[:, :-1].unfold(1, 3, 1).flatten(0, 1)
    logits = model(seen)[:, -1]
    return nn.functional.cross_entropy(logits, sequences[:, 3:].flatten())


@resilience.job(workers=2)
def train(
    run: resilience.Run, *, steps: int = 300, lr: float = 3e-3, width: int = 30, layers: int = 2
) -> dict[str, float]:
    """The last loss, and the length of the vector of all weights: what it came to, whoever computed it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (run.world_size,))
    model = build(width, layers)
    for layer in model[1].layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    run.track(train=State(model, optimizer))

    mean = torch.zeros(())
    for step in run.steps(steps):
        optimizer.zero_grad()
        loss = loss_of(model, batch(step).chunk(run.world_size)[run.rank])
        loss.backward()
        optimizer.step()
        mean = loss.detach()
        dist.all_reduce(mean)
        mean /= run.world_size
        run.log(loss=mean.item())

    squares = sum(
        p.full_tensor().double().square().sum() for p in model.parameters() if isinstance(p, DTensor)
    )
    dist.destroy_process_group()
    return {"loss": mean.item(), "weights": float(squares) ** 0.5}


if __name__ == "__main__":
    print(train.launch().value)
