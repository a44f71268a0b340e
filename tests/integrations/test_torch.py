"""What torch replicates over ranks, by two real processes under gloo, and names without wrappers."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from resilience.checkpoint import fit
from resilience.checkpoint.snapshot import specs_of
from resilience.checkpoint.tree import flatten
from resilience.integrations.torch import replicated_names, unwrap

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    """A process group of this process alone."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class Model(torch.nn.Module):
    """Parameters, a tied one, a buffer, and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = torch.nn.Embedding(5, 4)
        self.norm = torch.nn.BatchNorm1d(4)
        self.head = torch.nn.Linear(4, 5, bias=False)
        self.head.weight = self.wte.weight
        self.frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.wte(x)))


def replicated(objects: dict[str, object]) -> set[str]:
    """Names of the arrays that would be written once."""
    arrays, _ = flatten({name: fit.capture(value) for name, value in objects.items()}, prefix="")
    return {spec.name for spec in specs_of(arrays, objects) if spec.replicated}


def stepped(module: torch.nn.Module, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(parameters)
    module(torch.arange(5)).sum().backward()
    optimizer.step()
    return optimizer


def test_parameters_of_ddp_are_replicated_and_buffers_are_not(group: None) -> None:
    """Batch statistics differ between ranks: written once they would be the wrong ones for most."""
    ddp = DistributedDataParallel(Model())
    names = replicated({"model": ddp})
    assert names == {"model/wte.weight", "model/norm.weight", "model/norm.bias", "model/frozen"}
    assert "model/head.weight" in replicated_names({"model": ddp})  # tied: whichever name comes first


def test_an_optimizer_follows_its_parameters(group: None) -> None:
    ddp = DistributedDataParallel(Model())
    trainable = [parameter for parameter in ddp.parameters() if parameter.requires_grad]
    optimizer = stepped(ddp, trainable)
    names = replicated({"opt": optimizer, "model": ddp})
    assert "opt/state/0/exp_avg" in names
    assert "opt/state/0/step" in names
    own = torch.nn.Parameter(torch.zeros(2, requires_grad=True))
    mixed = torch.optim.AdamW([*trainable, own])
    assert "mixed" not in replicated_names({"model": ddp, "mixed": mixed})
    assert replicated_names({"opt": optimizer}) == frozenset()  # its module is not tracked: who knows


def test_plain_modules_and_everything_else_are_local() -> None:
    model = Model()
    optimizer = stepped(model, list(model.norm.parameters()))
    assert (
        replicated_names({"model": model, "opt": optimizer, "x": torch.ones(2), "n": {"a": 1}}) == frozenset()
    )


def test_an_optimizer_that_shards_its_state_is_local(group: None) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    ddp = DistributedDataParallel(Model())
    trainable = [parameter for parameter in ddp.parameters() if parameter.requires_grad]
    optimizer = ZeroRedundancyOptimizer(trainable, torch.optim.AdamW)
    assert "zero" not in replicated_names({"model": ddp, "zero": optimizer})


def test_ignored_parameters_are_local(group: None) -> None:
    model = Model()
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["frozen"])
    assert "model/frozen" not in replicated({"model": DistributedDataParallel(model)})


def test_compiled_modules_keep_their_names(group: None) -> None:
    plain = Model()
    for wrapped in (
        torch.compile(plain),
        DistributedDataParallel(plain),
        DistributedDataParallel(torch.compile(plain)),
        torch.compile(DistributedDataParallel(plain)),
        torch.nn.DataParallel(plain),
    ):
        assert unwrap(wrapped) is plain
        assert list(fit.capture(wrapped)) == list(plain.state_dict())
    compiled = DistributedDataParallel(torch.compile(plain))
    assert "model/wte.weight" in replicated({"model": compiled})


def test_state_moves_between_wrapped_and_plain(group: None) -> None:
    torch.manual_seed(0)
    source, target = DistributedDataParallel(Model()), Model()
    fit.apply(target, fit.capture(source), name="model")
    assert torch.equal(target.wte.weight, source.module.wte.weight)
    assert target.head.weight is target.wte.weight
    back = DistributedDataParallel(Model())
    fit.apply(back, fit.capture(target), name="model")
    assert torch.equal(back.module.norm.weight, target.norm.weight)


WORKER = """
import os, sys, torch
sys.path.insert(0, sys.argv[3])
from torch.nn.parallel import DistributedDataParallel
from resilience.checkpoint import fit
from resilience.checkpoint.arrays import raw
from resilience.checkpoint.snapshot import specs_of
from resilience.checkpoint.tree import flatten
import hashlib
rank = int(sys.argv[1])
torch.set_num_threads(1)
store = torch.distributed.TCPStore("127.0.0.1", int(sys.argv[2]), 2, is_master=rank == 0)
torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
torch.manual_seed(rank)
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
ddp = DistributedDataParallel(model)
optimizer = torch.optim.AdamW(ddp.parameters(), lr=0.1)
for step in range(3):
    optimizer.zero_grad()
    ddp(torch.randn(16, 8)).pow(2).mean().backward()
    optimizer.step()
objects = {"model": ddp, "opt": optimizer}
arrays, _ = flatten({name: fit.capture(value) for name, value in objects.items()}, prefix="")
for spec in specs_of(arrays, objects):
    digest = hashlib.sha256(raw(arrays[spec.name]).tobytes()).hexdigest()
    print(spec.name, spec.replicated, digest)
torch.distributed.barrier()
sys.stdout.flush()
os._exit(0)  # gloo's threads may abort a process that ends while they run
"""


def test_what_is_called_replicated_is_the_same_bytes_on_two_ranks() -> None:
    """Two processes, different data and seeds: after three steps the claim must hold bit for bit."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), port, str(ROOT)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0].splitlines() for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert [process.returncode for process in ranks] == [0, 0]
    claimed, differing = 0, set()
    for one, two in zip(*outputs, strict=True):
        name, is_replicated, _ = one.split()
        if is_replicated == "True":
            assert one == two
            claimed += 1
        elif one != two:
            differing.add(name)
    assert claimed == 6 + 6 * 3
    assert "model/1.running_mean" in differing
