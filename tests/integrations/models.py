"""One small model under every parallelism, trained a little, and what it holds, gathered."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from resilience.checkpoint.arrays import raw


class Block(torch.nn.Module):
    """Sizes that no number of ranks divides, but for those that tensor parallelism splits."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(5)
        self.up = torch.nn.Linear(5, hidden)
        self.down = torch.nn.Linear(hidden, 5)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(Block(8) for _ in range(2))
        self.head = torch.nn.Linear(5, 1)
        self.frozen = torch.nn.Parameter(torch.rand(2, 3), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def build(layout: str, seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """``plain``, ``ddp``, ``fsdp``, ``hsdp`` (2 x n), ``tp``, ``fsdp_tp`` (n x 2), ``compiled``."""
    torch.manual_seed(seed)
    model: torch.nn.Module = Model()
    world = dist.get_world_size()
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    match layout:
        case "ddp":
            model = DistributedDataParallel(model)
        case "compiled":
            model = torch.compile(DistributedDataParallel(model), backend="eager")
        case "fsdp" | "hsdp":
            shape, names = ((world,), ("dp",)) if layout == "fsdp" else ((2, world // 2), ("copies", "dp"))
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
            for block in model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        case "tp" | "fsdp_tp":
            shape = (1, world) if layout == "tp" else (world // 2, 2)
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
            for block in model.blocks:
                parallelize_module(block, mesh["tp"], plan)
                if layout == "fsdp_tp":
                    fully_shard(block, mesh=mesh["dp"])
            if layout == "fsdp_tp":
                fully_shard(model, mesh=mesh["dp"])
        case "plain":
            pass
        case _:
            raise ValueError(layout)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model, torch.optim.AdamW(trained, lr=0.05)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    x = torch.linspace(-1, 1, 20).reshape(4, 5)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).pow(2).mean().backward()
        optimizer.step()


def digests(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """Of every whole tensor of the state, by torch's own names for them. All ranks call it together."""
    state, inner = get_state_dict(model, optimizer)
    found: dict[str, Any] = dict(state)
    for name, values in inner["state"].items():
        found.update((f"{name}.{key}", value) for key, value in values.items())
    return {name: digest(value) for name, value in sorted(found.items())}


def digest(value: torch.Tensor) -> str:
    whole = value.full_tensor() if isinstance(value, DTensor) else value
    return hashlib.sha256(raw(whole).tobytes()).hexdigest()[:16]
