"""Which optimizers have stepped: what a stale snapshot is told by.

Owns a hook on every tracked optimizer that counts its steps. An optimizer that stepped has changed its state; one
that did not (gradients are being accumulated, a scaler skipped the step) has rightly left it as it was. Must never
keep an optimizer alive.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch

from resilience.checkpoint.tree import segment
from resilience.integrations.torch_state import State


class Stepped:
    """The optimizers among tracked objects that stepped since they were last asked about."""

    def __init__(self) -> None:
        self._known: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._stepped: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()

    def since(self, objects: Mapping[str, Any]) -> list[str]:
        """Names above the arrays that those optimizers have changed, as ``tree.flatten`` gives them. The first time
        an optimizer is met nothing is known of it.

        Args:
            objects: the tracked objects by name.
        """
        names = []
        for name, value in objects.items():
            if isinstance(value, torch.optim.Optimizer):
                if self._ask(value):
                    names.append(f"{segment(name)}/state")
            elif isinstance(value, State) and value.optimizers:
                asked = [self._ask(optimizer) for optimizer in value.optimizers]
                if all(asked):
                    names.append(f"{segment(name)}/optimizer/state")
        return names

    def _ask(self, optimizer: torch.optim.Optimizer) -> bool:
        if optimizer not in self._known:
            self._known.add(optimizer)
            optimizer.register_step_post_hook(self._note)
            return False
        stepped = optimizer in self._stepped
        self._stepped.discard(optimizer)
        return stepped

    def _note(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._stepped.add(optimizer)
