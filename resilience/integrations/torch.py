"""torch: what is replicated over ranks, and names without the wrappers people put around modules.

Owns the knowledge of DistributedDataParallel, torch.compile and optimizers. Import it only where torch is
loaded. Must never call a collective, and when in doubt says "not replicated": that costs bytes, never truth.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.parallel import DataParallel, DistributedDataParallel

from resilience.checkpoint.tree import segment


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
    """Names of arrays, or of whole objects, whose bytes are the same on every rank.

    - Parameters of a module in DistributedDataParallel: the gradients every rank applies are the same bytes.
      Its buffers are not: batch statistics differ between ranks until rank 0's are broadcast again.
    - The state of an optimizer all of whose parameters belong to such modules.

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
        ignored = set(getattr(inner, "parameters_to_ignore", ()))
        # Tied parameters appear under several names in the state, but under the first one in the loop below.
        for path, parameter in inner.module.named_parameters(remove_duplicate=False):
            if path not in ignored:
                names.add(f"{segment(name)}/{segment(_without_wrappers(path))}")
                replicated.add(id(parameter))
    for name, value in objects.items():
        if isinstance(value, torch.optim.Optimizer) and _covered(value, replicated):
            names.add(segment(name))
    return frozenset(names)


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


def _covered(optimizer: torch.optim.Optimizer, replicated: set[int]) -> bool:
    # It shards its state over the ranks: same parameters, other bytes on each.
    if any(base.__name__ == "ZeroRedundancyOptimizer" for base in type(optimizer).__mro__):
        return False
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return bool(parameters) and all(id(parameter) in replicated for parameter in parameters)
