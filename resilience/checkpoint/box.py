"""Boxes: axis-parallel pieces of an n-dimensional array, and the arithmetic of cutting, meeting and covering. Pure.

A shard of any parallelism is a set of boxes of one global array: a slice of a tensor-parallel weight is one box,
a range of a flattened parameter (Megatron's distributed optimizer, FSDP1) at most ``2 n - 1``. Must never look at
values, and never know who holds a box or where it lies.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Box:
    """The elements ``offset[i] <= index[i] < offset[i] + shape[i]`` of an array; of a scalar, the one element."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """All of an array of ``shape``."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def count(self) -> int:
        """Elements in it."""
        return math.prod(self.shape)

    @property
    def end(self) -> tuple[int, ...]:
        return tuple(o + n for o, n in zip(self.offset, self.shape, strict=True))

    def meet(self, other: Box) -> Box | None:
        """What both hold; ``None`` if that is nothing."""
        offset = tuple(map(max, self.offset, other.offset))
        shape = tuple(min(a, b) - o for a, b, o in zip(self.end, other.end, offset, strict=True))
        return None if any(n <= 0 for n in shape) else Box(offset, shape)

    def holds(self, other: Box) -> bool:
        """Whether all of ``other`` is in here."""
        return all(o <= p for o, p in zip(self.offset, other.offset, strict=True)) and all(
            e >= f for e, f in zip(self.end, other.end, strict=True)
        )

    def slices(self, within: Box) -> tuple[slice, ...]:
        """Where it lies in an array that holds ``within``."""
        return tuple(
            slice(o - w, o - w + n) for o, w, n in zip(self.offset, within.offset, self.shape, strict=True)
        )

    def without(self, other: Box) -> list[Box]:
        """Disjoint boxes that together hold what is in here and not in ``other``: at most two for each axis."""
        common = self.meet(other)
        if common is None:
            return [self] if self.count else []
        left, offset, shape = [], list(self.offset), list(self.shape)
        for axis, (start, stop) in enumerate(zip(common.offset, common.end, strict=True)):
            end = offset[axis] + shape[axis]
            for low, high in ((offset[axis], start), (stop, end)):
                if low < high:
                    left.append(
                        Box(
                            (*offset[:axis], low, *offset[axis + 1 :]),
                            (*shape[:axis], high - low, *shape[axis + 1 :]),
                        )
                    )
            offset[axis], shape[axis] = start, stop - start
        return left


def flat_boxes(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """The boxes that hold elements ``start .. stop - 1`` of an array of ``shape`` in C order, in that order.

    Each is contiguous in C order, so a piece of flattened memory maps to them one after the other. At most
    ``2 len(shape) - 1``: a tail of the first row, whole rows, a head of the last one, at every level.
    """
    if start >= stop:
        return []
    if not shape:
        return [Box((), ())]
    if len(shape) == 1:
        return [Box((start,), (stop - start,))]
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows are first .. last - 1
    if first > last:  # inside of one row
        index = start // row
        return _below(index, flat_boxes(shape[1:], start - index * row, stop - index * row))
    found: list[Box] = []
    if start < first * row:
        found += _below(first - 1, flat_boxes(shape[1:], start - (first - 1) * row, row))
    if first < last:
        found.append(Box((first,) + (0,) * (len(shape) - 1), (last - first, *shape[1:])))
    if last * row < stop:
        found += _below(last, flat_boxes(shape[1:], 0, stop - last * row))
    return found


def _below(index: int, boxes: Iterable[Box]) -> list[Box]:
    return [Box((index, *box.offset), (1, *box.shape)) for box in boxes]


def cells(box: Box, grid: Sequence[int]) -> Iterator[Box]:
    """``box`` cut along the regular grid of cell shape ``grid`` from the array's origin, in C order."""
    if not box.count:
        return
    ranges = [range(o // g * g, e, g) for o, e, g in zip(box.offset, box.end, grid, strict=True)]
    counts = [len(each) for each in ranges]
    for number in range(math.prod(counts)):
        corner = []
        for each, count in zip(reversed(ranges), reversed(counts), strict=True):
            number, index = divmod(number, count)
            corner.append(each[index])
        cell = box.meet(Box(tuple(reversed(corner)), tuple(grid)))
        assert cell is not None
        yield cell


def missing(wanted: Box, boxes: Iterable[Box]) -> list[Box]:
    """What of ``wanted`` is in none of ``boxes``: disjoint boxes, none if it is covered."""
    left = [wanted] if wanted.count else []
    for box in boxes:
        if not left:
            break
        left = [rest for piece in left for rest in piece.without(box)]
    return left
