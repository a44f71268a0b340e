"""Landing: memory that restored bytes are copied to, whoever's it is.

Owns what memory can be filled in place, and the views of it. An array lands whole or, a shard, box by box. Must never
copy an array, and never let one land where its bytes would not stay.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from resilience.checkpoint import arrays as _arrays
from resilience.checkpoint.box import Box
from resilience.checkpoint.shard import Shard


@dataclass(frozen=True)
class Landing:
    """Memory for boxes of an array.

    Attributes:
        value: the array or shard that the memory belongs to.
        boxes: of the whole array.
        views: one a box, in carrier type (see ``arrays.carrier``): NumPy, or torch tensors on another device.
    """

    value: Any
    boxes: tuple[Box, ...]
    views: tuple[Any, ...]

    def put(self, number: int, box: Box, payload: _arrays.AnyArray) -> None:
        """Copy ``payload``, the elements of ``box``, to their place in the memory of box ``number``."""
        view = self.views[number]
        where: Any = (..., *box.slices(self.boxes[number]))  # with the ellipsis a scalar stays an array
        if isinstance(view, np.ndarray):
            view[where] = payload
        else:
            torch = sys.modules["torch"]
            bits = payload.view(np.int16) if view.dtype is torch.int16 else payload
            view[where].copy_(torch.from_numpy(bits if bits.flags.writeable else bits.copy()))


def landing(value: Any) -> Landing | None:
    """The memory of ``value``; ``None`` if it cannot be filled in place: read-only, of another byte order, of a
    library whose arrays never change (JAX), or none of ours."""
    local = value.local if isinstance(value, Shard) else value
    view = _view(local)
    if view is None:
        return None
    if isinstance(value, Shard):
        return Landing(value, value.boxes, tuple(value.views(view)))
    return Landing(value, (Box.whole(_arrays.describe(value)[1]),), (view,))


def fresh(dtype: str, shape: tuple[int, ...]) -> Landing:
    """New memory for a whole array."""
    made = landing(np.empty(shape, _arrays.numpy_dtype(dtype)))
    assert made is not None
    return made


def blank(value: Any) -> Any:
    """New memory like that of ``value``, where it lies: of the same kind, type, shape and device."""
    if isinstance(value, Shard):
        return replace(value, local=blank(value.local))
    if _arrays.kind(value) == "torch":
        return sys.modules["torch"].empty_like(value.detach(), requires_grad=False)
    if isinstance(value, np.ndarray):
        return np.empty(value.shape, value.dtype)
    return value


def _view(local: Any) -> Any:
    match _arrays.kind(local):
        case "numpy":
            if not local.flags.writeable or local.dtype.byteorder == ">":
                return None
            return _arrays.raw(local)
        case "torch":
            if local.is_conj() or local.is_neg():
                return None
            if local.device.type == "cpu":
                return _arrays.raw(local)
            torch = sys.modules["torch"]
            name, _ = _arrays.describe(local)
            if _arrays.numpy_dtype(name).isbuiltin == 1:
                return local.detach()
            bits = torch.uint8 if _arrays.numpy_dtype(name).itemsize == 1 else torch.int16
            return local.detach().view(bits)
        case _:
            return None
