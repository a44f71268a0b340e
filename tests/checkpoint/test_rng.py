"""Random number generators go on as if nothing had happened."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from resilience.checkpoint import arrays as dt
from resilience.checkpoint import rng
from resilience.checkpoint.tree import flatten, unflatten
from resilience.errors import InvalidError


def draw() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        np.random.rand(),
        np.random.randn(),
        torch.randn(3).sum().item(),
    ]


def through_storage(state: Any) -> Any:
    arrays, skeleton = flatten(state, prefix="rng")
    return unflatten(
        json.loads(json.dumps(skeleton)), {name: np.array(dt.raw(array)) for name, array in arrays.items()}
    )


def test_all_generators_repeat_exactly() -> None:
    draw()  # leaves a half-used pair of normal numbers behind, which is part of the state
    state = through_storage(rng.capture())
    first = [draw() for _ in range(3)]
    rng.apply(state)
    assert [draw() for _ in range(3)] == first


def test_a_state_of_another_kind_is_refused() -> None:
    state = rng.capture()
    before = np.random.get_state(legacy=False)
    for change in ({"numpy": {"bit_generator": "PCG64"}}, {"torch": torch.zeros(3)}, {"python": None}):
        with pytest.raises(InvalidError, match="do not fit"):
            rng.apply({**state, **change})
    np.random.set_state(before)


def test_neither_torch_nor_cuda_is_woken_up() -> None:
    assert not torch.cuda.is_initialized()
    assert "cuda" not in rng.capture()
    code = """
import sys
from resilience.checkpoint import rng
state = rng.capture()
rng.apply({**state, "torch": None})
assert "torch" not in state and "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
