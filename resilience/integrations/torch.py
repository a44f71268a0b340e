"""torch: what is replicated over ranks, and names without the wrappers people put around modules.

The public face of what we do for torch: ``State`` (a model and its optimizers under one parallelism or another),
``StorageWriter`` and ``StorageReader`` (torch.distributed.checkpoint on our engine). Owns the knowledge of
DistributedDataParallel, torch.compile and optimizers. Import it only where torch is loaded. Must never call a
collective, and when in doubt says "not replicated": that costs bytes, never truth.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parallel import DataParallel, DistributedDataParallel

from resilience.checkpoint.tree import segment

if TYPE_CHECKING:
    from resilience.integrations.torch_dcp_reader import StorageReader
    from resilience.integrations.torch_dcp_writer import StorageWriter
    from resilience.integrations.torch_state import State

__all__ = ["State", "StorageReader", "StorageWriter", "replicated_names", "unwrap"]

# Every process with torch loads this module; what few use, and what takes long to import, comes when it is asked for.
_HOMES = {"State": "torch_state", "StorageReader": "torch_dcp_reader", "StorageWriter": "torch_dcp_writer"}


def unwrap(value: Any) -> Any:
    """The module inside DistributedDataParallel, DataParallel and torch.compile; anything else as it is.

    State is saved under the inner names (``model/wte.weight``): it can be restored with or without wrappers.
    """
    while True:
        if isinstance(value, DistributedDataParallel | DataParallel):
            value = value.module
        elif isinstance(value, torch.nn.Module) and isinstance(
            getattr(value, "_orig_mod", None), torch.nn.Module
        ):
            value = value._orig_mod
        else:
            return value


def replicated_names(objects: Mapping[str, Any]) -> frozenset[str]:
    """Names of arrays, or of whole objects, whose bytes are the same on every rank. DTensors need none: they know.

    - Parameters of a module in DistributedDataParallel: the gradients every rank applies are the same bytes.
      Its buffers are not: batch statistics differ between ranks until rank 0's are broadcast again.
    - The state of an optimizer all of whose parameters belong to such modules.
    - What an optimizer has beside DTensors (Adam's ``step``) for parameters that are sharded over all ranks.

    Args:
        objects: the tracked objects by name.

    Returns:
        names for ``plan.specs``: ``model/wte.weight`` or ``optimizer``.
    """
    names: set[str] = set()
    replicated: set[int] = set()
    for name, value in objects.items():
        inner = _distributed(value)
        if inner is None:
            continue
        alike = replicated_parameters(value)
        replicated |= alike
        # Tied parameters appear under several names in the state, but under the first one in the loop below.
        for path, parameter in inner.module.named_parameters(remove_duplicate=False):
            if id(parameter) in alike:
                names.add(f"{segment(name)}/{segment(_without_wrappers(path))}")
    for name, value in objects.items():
        if isinstance(value, torch.optim.Optimizer) and not shards_its_state(value):
            parameters = parameters_of(value)
            if parameters and all(id(parameter) in replicated for parameter in parameters):
                names.add(segment(name))
            names.update(
                f"{segment(name)}/state/{number}"
                for number, parameter in enumerate(parameters)
                if _everywhere(parameter)
            )
    states = sys.modules.get("resilience.integrations.torch_state")
    for name, value in objects.items():
        if states is not None and isinstance(value, states.State):
            names.update(f"{segment(name)}/{path}" for path in value.replicated_names())
    return frozenset(names)


def replicated_parameters(value: Any) -> set[int]:
    """Identities of the parameters that DistributedDataParallel keeps equal; none without it."""
    inner = _distributed(value)
    if inner is None:
        return set()
    ignored = set(getattr(inner, "parameters_to_ignore", ()))
    found = inner.module.named_parameters(remove_duplicate=False)
    return {id(parameter) for path, parameter in found if path not in ignored}


def parameters_of(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    """An optimizer's parameters in the order in which its state numbers them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def shards_its_state(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it spreads its state over the ranks: same parameters, other bytes on each."""
    return any(base.__name__ == "ZeroRedundancyOptimizer" for base in type(optimizer).__mro__)


def _everywhere(parameter: torch.Tensor) -> bool:
    """Whether ``parameter`` is a DTensor over all ranks there are: they all step it together."""
    tensors = sys.modules.get("torch.distributed.tensor")
    return (
        tensors is not None
        and isinstance(parameter, tensors.DTensor)
        and parameter.device_mesh.size() == torch.distributed.get_world_size()
    )


def _distributed(value: Any) -> DistributedDataParallel | None:
    """The DistributedDataParallel around or inside torch.compile, if there is one and it has a real group."""
    if isinstance(getattr(value, "_orig_mod", None), torch.nn.Module):
        value = value._orig_mod
    return value if isinstance(value, DistributedDataParallel) else None


def _without_wrappers(path: str) -> str:
    """``_orig_mod.wte.weight`` of a compiled module inside DDP is ``wte.weight`` in its state."""
    while path.startswith("_orig_mod."):
        path = path.removeprefix("_orig_mod.")
    return path


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__package__}.{_HOMES[name]}"), name)
