"""Random number generators as state: Python's, NumPy's global one, torch's of the CPU and of CUDA devices.

Owns taking and giving back their states bit for bit, as arrays and plain numbers. Must never draw from a
generator, import torch, or wake up CUDA: a generator nobody has loaded has no state worth keeping.
"""

from __future__ import annotations

import random
import sys
from typing import Any

import numpy as np

from resilience.errors import InvalidError

_PYTHON_VERSION = 3  # of random.getstate() since Python 2.6


def capture() -> dict[str, Any]:
    """The states of all generators of this process, as a tree that ``tree.flatten`` takes."""
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {
        "python": {"version": version, "words": np.array(words, np.uint32), "gauss": gauss},
        "numpy": np.random.get_state(legacy=False),
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        state["torch"] = torch.get_rng_state()
        # Asking an uninitialised CUDA for its state would create a context in a process that may yet fork.
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def apply(state: dict[str, Any]) -> None:
    """Put all generators back to ``state``.

    A generator that was captured and is not loaded now is skipped: nothing can have drawn from it. Where
    fewer CUDA devices are left than were saved, the first states are used.

    Raises:
        InvalidError: the state is of another kind of generator than this process has.
    """
    try:
        python = state["python"]
        words = tuple(int(word) for word in np.asarray(python["words"]))
        random.setstate((int(python["version"]), words, python["gauss"]))
        np.random.set_state(state["numpy"])
        torch = sys.modules.get("torch")
        if torch is not None and "torch" in state:
            torch.set_rng_state(torch.as_tensor(state["torch"]))
            if "cuda" in state and torch.cuda.is_available():
                for device, saved in enumerate(state["cuda"][: torch.cuda.device_count()]):
                    torch.cuda.set_rng_state(torch.as_tensor(saved), device)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InvalidError(
            f"the saved states of the random number generators do not fit: {type(error).__name__}: {error}",
            operation="restore",
            path="rng",
            hint="restore with the library versions that saved, or track with rng=False",
        ) from error
