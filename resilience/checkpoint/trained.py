"""What optimizers do to the state, as far as that can be known: what they have changed, what nobody else changes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any


class Trained:
    """Remembers from save to save what was trained. Knows of torch's optimizers; of other state it says nothing.

    Args:
        before_step: called before each step of an optimizer that it has been told of.
    """

    def __init__(self, before_step: Callable[[], None] = lambda: None) -> None:
        self._before_step = before_step
        self._torch: Any = None

    def since(self, objects: Mapping[str, Any]) -> list[str]:
        """Names above the arrays that have been trained since the last call; for ``increment.check_trained``.

        Args:
            objects: the tracked objects by name.
        """
        if "torch" not in sys.modules:
            return []
        if self._torch is None:
            from resilience.integrations.torch_steps import Stepped

            self._torch = Stepped(self._before_step)
        return list(self._torch.since(objects))

    def only(self, arrays: Mapping[str, Any], objects: Mapping[str, Any]) -> frozenset[str]:
        """Keys of the arrays that change in an optimizer's step only, after ``before_step`` was called."""
        if "torch" not in sys.modules:
            return frozenset()
        from resilience.integrations.torch_steps import changed_by_steps

        return changed_by_steps(arrays, objects)
