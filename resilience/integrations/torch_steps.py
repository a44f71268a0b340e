"""Optimizers and their steps: which have stepped, and what nothing but a step changes.

Owns hooks on every tracked optimizer. After a step: an optimizer that stepped has changed its state, which a stale
snapshot is told by; one that did not (gradients are being accumulated, a scaler skipped the step) has rightly left it
as it was. Before a step: a snapshot that is still being copied has to be complete. Must never keep an optimizer alive.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from resilience.checkpoint.shard import Shard
from resilience.checkpoint.tree import segment
from resilience.integrations.torch import parameters_of
from resilience.integrations.torch_state import State

_SMALL = 64 << 10  # bytes up to which an array is copied at once: a task of its own would cost as much


class Stepped:
    """The parameters of tracked optimizers that were stepped since they were last asked about.

    Args:
        before: called before each step of any of them.
    """

    def __init__(self, before: Callable[[], None] = lambda: None) -> None:
        self._before = before
        # Numbers of the parameters that had a gradient in a step, by optimizer.
        self._stepped: weakref.WeakKeyDictionary[torch.optim.Optimizer, set[int]] = (
            weakref.WeakKeyDictionary()
        )

    def since(self, objects: Mapping[str, Any]) -> list[str]:
        """Names above the arrays that steps have changed, as ``tree.flatten`` gives them. The first time an optimizer
        is met nothing is known of it.

        Args:
            objects: the tracked objects by name.
        """
        names = []
        for name, value in objects.items():
            above = f"{segment(name)}/{'optimizer/' if isinstance(value, State) else ''}state"
            for optimizer in _optimizers(value):
                stepped = self._ask(optimizer)
                if not stepped:
                    continue
                if isinstance(value, State):
                    own = [segment(each) for each in value.parameter_names(optimizer)]
                else:
                    own = [str(number) for number in range(len(parameters_of(optimizer)))]
                    if len(own) == len(stepped):
                        names.append(above)  # all of it, in one word
                        continue
                names += [f"{above}/{own[number]}" for number in stepped]
        return names

    def _ask(self, optimizer: torch.optim.Optimizer) -> list[int]:
        if optimizer not in self._stepped:
            self._stepped[optimizer] = set()
            optimizer.register_step_pre_hook(self._wait)
            optimizer.register_step_post_hook(self._note)
            return []
        stepped, self._stepped[optimizer] = self._stepped[optimizer], set()
        return sorted(stepped)

    def _wait(self, *_: Any) -> None:
        self._before()  # what a hook returns would be the step's new arguments

    def _note(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        # A scaler hands fused optimizers a flag that may make the step do nothing: it lies on the device, and is not
        # worth waiting for.
        if getattr(optimizer, "found_inf", None) is not None or optimizer not in self._stepped:
            return
        parameters = parameters_of(optimizer)
        self._stepped[optimizer].update(n for n, p in enumerate(parameters) if p.grad is not None)


def changed_by_steps(arrays: Mapping[str, Any], objects: Mapping[str, Any]) -> frozenset[str]:
    """Keys of the arrays that change only when a tracked optimizer steps: its parameters and its own state. Not the
    small ones, nor anything else: buffers change in the forward pass, numbers of the user's at any time.

    Args:
        arrays: by key, as ``tree.flatten`` returned them for the objects.
        objects: the tracked objects by name.
    """
    memory: set[tuple[str, int]] = set()
    for value in objects.values():
        for optimizer in _optimizers(value):
            memory.update(_memory(tensor) for tensor in parameters_of(optimizer))
            for state in optimizer.state.values():
                memory.update(_memory(item) for item in state.values() if isinstance(item, torch.Tensor))
    found = set()
    for key, array in arrays.items():
        tensor = array.local if isinstance(array, Shard) else array
        if isinstance(tensor, torch.Tensor) and tensor.nbytes > _SMALL and _memory(tensor) in memory:
            found.add(key)
    return frozenset(found)


def _optimizers(value: Any) -> Iterator[torch.optim.Optimizer]:
    if isinstance(value, torch.optim.Optimizer):
        yield value
    elif isinstance(value, State):
        yield from value.optimizers


def _memory(tensor: torch.Tensor) -> tuple[str, int]:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return str(local.device), local.data_ptr()
