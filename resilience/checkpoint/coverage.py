"""Coverage: which bytes of which packs hold the boxes that a rank wants. Pure.

Owns the way from wanted boxes to ranges of packs: boxes are met with chunks, chunks cut into strips that can be
checked alone, strips gathered into requests by ascending offset. Must never ask for a byte twice, and never let a
box be forgotten that no chunk holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from resilience.checkpoint import arrays as _arrays
from resilience.checkpoint.box import Box
from resilience.checkpoint.part import CRC_BLOCK, Part, PartArray, PartChunk
from resilience.checkpoint.plan import CRC_BYTES
from resilience.checkpoint.source import corrupt

REQUEST = 4 << 20  # bytes asked for at once, a multiple of CRC_BLOCK: two of these keep a fast disk busy


@dataclass(frozen=True)
class Want:
    """What is wanted of an array: its type and shape as the reader knows them, and boxes of it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class Take:
    """A chunk and what is wanted of it: boxes, each with the number of the wanted box that it is part of."""

    array: PartArray
    chunk: PartChunk
    boxes: tuple[tuple[int, Box], ...]


@dataclass(frozen=True)
class Strip:
    """Bytes ``start:end`` of a chunk's payload. Whole blocks, so its CRC can be checked alone."""

    take: Take
    start: int
    end: int

    @property
    def offset(self) -> int:
        """Where it lies in the pack."""
        return self.take.chunk.offset + self.start

    @property
    def stop(self) -> int:
        """Where it ends in the pack, the CRC field included if that follows."""
        chunk = self.take.chunk
        return chunk.offset + self.end + (CRC_BYTES if self.end == chunk.length else 0)


@dataclass(frozen=True)
class Request:
    """Strips of one pack that are read at once, by ascending offset."""

    strips: tuple[Strip, ...]

    @property
    def start(self) -> int:
        return self.strips[0].offset

    @property
    def end(self) -> int:
        return self.strips[-1].stop


class Coverage:
    """What is still wanted, while one part after the other is looked at."""

    def __init__(self, wants: Iterable[Want]) -> None:
        self._wants = {want.name: want for want in wants}
        self._left: dict[str, list[tuple[int, Box]]] = {}
        for want in self._wants.values():
            boxes = [(number, box) for number, box in enumerate(want.boxes) if box.count]
            if boxes:
                self._left[want.name] = boxes

    @property
    def left(self) -> Mapping[str, Sequence[tuple[int, Box]]]:
        """Name -> boxes that no part so far holds, each with the number of the wanted box that it is part of."""
        return self._left

    def absorb(self, part: Part) -> list[Take]:
        """What ``part`` holds of that which is left. ``CorruptError`` if it knows an array otherwise."""
        numbers = {}
        for number, array in enumerate(part.arrays):
            if array.name in self._left:
                want = self._wants[array.name]
                if (array.dtype, array.shape) != (want.dtype, want.shape):
                    problem = f"has {array.name} as {array.dtype}{list(array.shape)}, others as "
                    raise corrupt(part.name, f"{problem}{want.dtype}{list(want.shape)}", 0, None)
                numbers[number] = array
        found = []
        for chunk in part.chunks:
            holder = numbers.get(chunk.array)
            if holder is not None and holder.name in self._left:
                boxes = self._meet(holder.name, chunk.box)
                if boxes:
                    found.append(Take(holder, chunk, boxes))
        return found

    def _meet(self, name: str, there: Box) -> tuple[tuple[int, Box], ...]:
        found, left = [], []
        for number, box in self._left[name]:
            common = box.meet(there)
            if common is None:
                left.append((number, box))
            else:
                found.append((number, common))
                left += [(number, rest) for rest in box.without(common)]
        if found:
            self._left[name] = left
            if not left:
                del self._left[name]
        return tuple(found)


def requests(takes: Iterable[Take], *, gap: int, size: int = REQUEST) -> Iterator[Request]:
    """What to read of one pack.

    Args:
        takes: in the order of the pack.
        gap: bytes nobody wants that are read along rather than asking twice.
        size: of a request at most, a multiple of ``CRC_BLOCK``.
    """
    group: list[Strip] = []
    for take in takes:
        for strip in _strips(take, size):
            if group and (
                strip.offset - group[-1].stop > gap or strip.stop - group[0].offset > size + CRC_BYTES
            ):
                yield Request(tuple(group))
                group = []
            group.append(strip)
    if group:
        yield Request(tuple(group))


def _strips(take: Take, size: int) -> Iterator[Strip]:
    for start, end in _ranges(take):
        for at in range(start, end, size):
            yield Strip(take, at, min(at + size, end))


def _ranges(take: Take) -> list[tuple[int, int]]:
    """Ranges of the payload that hold the wanted boxes, in whole blocks."""
    chunk = take.chunk
    if chunk.length <= CRC_BLOCK or any(box == chunk.box for _, box in take.boxes):
        return [(0, chunk.length)]
    itemsize = _arrays.numpy_dtype(take.array.dtype).itemsize
    blocks = np.zeros(-(-chunk.length // CRC_BLOCK), bool)
    for _, box in take.boxes:
        starts, length = _runs(payload_box(take, box), payload_shape(take), CRC_BLOCK // itemsize)
        for start in starts:
            first, last = start * itemsize // CRC_BLOCK, ((start + length) * itemsize - 1) // CRC_BLOCK
            blocks[first : last + 1] = True
    edges = np.flatnonzero(np.diff(np.concatenate(([False], blocks, [False])).astype(np.int8)))
    return [
        (int(a) * CRC_BLOCK, min(int(b) * CRC_BLOCK, chunk.length))
        for a, b in zip(edges[::2], edges[1::2], strict=True)
    ]


def payload_shape(take: Take) -> tuple[int, ...]:
    """Shape of the chunk's payload: the grid's, where there is one."""
    return take.chunk.box_shape if take.array.grid is None else take.array.grid


def payload_box(take: Take, box: Box) -> Box:
    """A box of the array, as a box of the chunk's payload."""
    return Box(tuple(a - b for a, b in zip(box.offset, take.chunk.box_offset, strict=True)), box.shape)


def _runs(box: Box, shape: Sequence[int], reach: int) -> tuple[list[int], int]:
    """Where ``box`` lies in the flattened array of ``shape``: the first elements of runs, and their length. Runs whose
    starts are ``reach`` or less apart are taken as one, with what lies between."""
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    starts, length = [sum(o * s for o, s in zip(box.offset, strides, strict=True))], 1
    for axis in reversed(range(len(shape))):
        if length == strides[axis] or strides[axis] <= reach:
            length += (box.shape[axis] - 1) * strides[axis]
        else:
            starts = [start + n * strides[axis] for n in range(box.shape[axis]) for start in starts]
    return starts, length
