"""Shard: what one rank holds of an array that is larger than its part of it.

Owns the value that stands for a distributed array in a state: local memory and the boxes it fills in the global
array. DTensors become shards by themselves (``resilience.integrations.torch``); users of other parallelisms
(tensor-parallel slices, flat ranges of a distributed optimizer) make them by hand. Must never copy memory.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from resilience.checkpoint.box import Box, flat_boxes
from resilience.errors import InvalidError


@dataclass(frozen=True, eq=False)
class Shard:
    """A rank's share of a global array. Use ``Shard.at`` or ``Shard.flat``.

    Attributes:
        local: the memory: torch, NumPy or JAX; of one box's shape, 1-D for a flat range, or of the array's number
            of axes with several boxes side by side.
        shape: of the global array.
        boxes: what ``local`` holds, in the order in which it lies there; none if this rank holds nothing.
        holders: ranks that hold the same boxes with the same bytes (this one included): one of them writes.
            ``None``: this rank alone.
        unit: shape of a grid from the array's origin to which the boxes of **all** ranks keep (cut off at the
            array's end), or ``None``. With it plain Zarr can read the array; without it this package can.
    """

    local: Any
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    holders: Sequence[int] | None = None
    unit: tuple[int, ...] | None = None

    @classmethod
    def at(
        cls,
        local: Any,
        *,
        shape: Sequence[int],
        offset: Sequence[int],
        holders: Sequence[int] | None = None,
        unit: Sequence[int] | None = None,
    ) -> Shard:
        """The box of ``local``'s own shape at ``offset`` in an array of ``shape``.

        Raises:
            InvalidError: the box does not lie in the array, or not on the grid of ``unit``.
        """
        box = Box(tuple(map(int, offset)), tuple(map(int, local.shape)))
        whole = tuple(map(int, shape))
        if not len(whole) == len(box.offset) == len(box.shape) or not Box.whole(whole).holds(box):
            raise _invalid(f"a box of shape {box.shape} at {box.offset} is not part of an array of {whole}")
        grid = None if unit is None else tuple(map(int, unit))
        if grid is not None and box.count and not _on_grid(box, grid, whole):
            raise _invalid(f"a box of shape {box.shape} at {box.offset} does not keep to a grid of {grid}")
        return cls(local, whole, (box,) if box.count else (), holders, grid)

    @classmethod
    def flat(
        cls, local: Any, *, shape: Sequence[int], start: int, holders: Sequence[int] | None = None
    ) -> Shard:
        """Elements ``start .. start + len(local) - 1`` of an array of ``shape`` that was flattened in C order.

        Raises:
            InvalidError: ``local`` is not 1-D, or the range does not lie in the array.
        """
        whole = tuple(map(int, shape))
        if len(local.shape) != 1 or not 0 <= start <= start + int(local.shape[0]) <= math.prod(whole):
            raise _invalid(
                f"memory of shape {tuple(local.shape)} from element {start} on is no range of {whole}"
            )
        return cls(local, whole, tuple(flat_boxes(whole, start, start + int(local.shape[0]))), holders)

    def views(self, local: Any) -> list[Any]:
        """``local`` (this shard's memory, or another of its shape) cut into one view a box, of the box's shape."""
        if len(self.boxes) == 1 and tuple(local.shape) == self.boxes[0].shape:
            return [local]
        if len(local.shape) == len(self.shape) > 1:
            return self._blocks(local)
        found, at = [], 0
        for box in self.boxes:
            found.append(local[at : at + box.count].reshape(box.shape))
            at += box.count
        return found

    def _blocks(self, local: Any) -> list[Any]:
        """Views where the boxes lie in ``local`` side by side along every axis (strided shards): its axis has the
        index ranges of the boxes one after the other, in the order in which the boxes name them."""
        starts: list[dict[int, int]] = []
        for axis in range(len(self.shape)):
            sizes = {box.offset[axis]: box.shape[axis] for box in self.boxes}
            ends = [0, *itertools.accumulate(sizes.values())]
            starts.append(dict(zip(sizes, ends, strict=False)))
        at = [tuple(starts[axis][o] for axis, o in enumerate(box.offset)) for box in self.boxes]
        boxes = zip(at, self.boxes, strict=True)
        return [
            local[tuple(slice(o, o + n) for o, n in zip(corner, box.shape, strict=True))]
            for corner, box in boxes
        ]


def _on_grid(box: Box, grid: Sequence[int], shape: Sequence[int]) -> bool:
    sides = zip(box.offset, box.end, grid, shape, strict=True)
    return all(g > 0 and o % g == 0 and (e % g == 0 or e == n) for o, e, g, n in sides)


def _invalid(problem: str) -> InvalidError:
    return InvalidError(
        problem,
        operation="shard",
        hint="give the shape of the whole array and the index of the shard's first element in it",
    )
