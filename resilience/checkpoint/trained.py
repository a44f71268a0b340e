"""What must have changed since the last save, as far as that can be known: the state of optimizers that stepped."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any


class Trained:
    """Remembers from save to save what was trained. Knows of torch's optimizers; of other state it says nothing."""

    def __init__(self) -> None:
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

            self._torch = Stepped()
        return list(self._torch.since(objects))
