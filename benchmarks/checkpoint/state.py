"""The state that is saved: GPT-like, 150 tensors of 4 KiB to 64 MiB, weights and Adam's two moments."""

from __future__ import annotations

import torch

State = dict[str, dict[str, torch.Tensor]]
_WIDTH = 1024
_PARAMETERS = 50  # names of them; times three: 150 tensors


def gpt_state(gib: float) -> State:
    """50 parameters and their two moments, ``gib`` GiB in all (within 2 %). All values differ, so nothing can be left
    out. Larger states have more layers of the same tensors, as larger models have; 2 GiB have 150 tensors."""
    shapes: list[tuple[str, tuple[int, ...]]] = [("embedding", (16384, _WIDTH)), ("norm", (_WIDTH,))]
    total = sum(_bytes(shape) for _, shape in shapes)
    layer = 0
    while total < gib * 2**30 / 3 - _bytes((4 * _WIDTH, _WIDTH)):
        block = {
            "qkv.weight": (3 * _WIDTH, _WIDTH),
            "qkv.bias": (3 * _WIDTH,),
            "out.weight": (_WIDTH, _WIDTH),
            "out.bias": (_WIDTH,),
            "up.weight": (16 * _WIDTH, _WIDTH),
            "up.bias": (16 * _WIDTH,),
            "down.weight": (_WIDTH, 16 * _WIDTH),
            "down.bias": (_WIDTH,),
            "norm1": (_WIDTH,),
            "norm2": (_WIDTH,),
        }
        for name, shape in block.items():
            if total + _bytes(shape) <= gib * 2**30 / 3:
                shapes.append((f"{layer}.{name}", shape))
                total += _bytes(shape)
        layer += 1
    while len(shapes) < _PARAMETERS:
        shapes.append((f"extra.{len(shapes)}", (_WIDTH,)))
    random = torch.Generator().manual_seed(0)
    return {
        kind: {name: torch.rand(shape, generator=random) for name, shape in shapes}
        for kind in ("model", "exp_avg", "exp_avg_sq")
    }


def size_of(state: State) -> int:
    return sum(tensor.nbytes for tensors in state.values() for tensor in tensors.values())


def same(one: State, other: State) -> str | None:
    """The first tensor that differs, ``None`` if none does."""
    for kind, tensors in one.items():
        for name, tensor in tensors.items():
            if not torch.equal(tensor, other[kind][name]):
                return f"{kind}/{name}"
    return None


def _bytes(shape: tuple[int, ...]) -> int:
    size = 4
    for side in shape:
        size *= side
    return size
