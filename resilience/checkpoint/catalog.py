"""The catalog of a checkpoint: its arrays by name, with every piece of them and where it lies. Pure.

Owns what the parts of all ranks say together: which arrays there are, under which names, in which boxes; and how
the skeleton places them. Looks at parts only. Must never call an array whole that is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from resilience.checkpoint import arrays as _arrays
from resilience.checkpoint.box import Box, missing
from resilience.checkpoint.part import Part, PartArray
from resilience.checkpoint.plan import (
    CHUNK_BYTES,
    ArraySpec,
    Scope,
    Sharding,
    chunk_grid,
    grid_of,
    stored_name,
)
from resilience.checkpoint.tree import leaves
from resilience.errors import CorruptError

HINT = "restore an older checkpoint; `resilience verify` lists the damaged ones"
Path = tuple[str | int, ...]
_CELL_BYTES = 1 << 20  # cells of a made-up grid are not made smaller for the sake of small pieces


@dataclass(frozen=True)
class Piece:
    """One chunk: ``length`` bytes at ``offset`` of a pack; its CRC32C is in the four bytes after.

    ``rank`` wrote it; ``file`` is the pack's name in the checkpoint's directory: the rank's own, or a link. ``full``
    is the shape of its payload: ``box.shape``, or the grid's, where the array ends inside the chunk.
    """

    rank: int
    file: str
    box: Box
    full: tuple[int, ...]
    offset: int
    length: int
    crc32c: int


@dataclass(frozen=True)
class Entry:
    """One array of a checkpoint.

    Attributes:
        name: in the checkpoint.
        grid: shape of a full chunk, ``None``: the pieces are boxes of any kind.
        rank: whose it is, where it is one rank's own.
        pieces: all there are, by rank and offset.
        same_as: the name of the array whose bytes these are, for one that was met again (tied weights).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    grid: tuple[int, ...] | None
    scope: Scope
    rank: int | None
    pieces: tuple[Piece, ...]
    same_as: str | None = None

    @property
    def itemsize(self) -> int:
        return _arrays.numpy_dtype(self.dtype).itemsize

    @property
    def size(self) -> int:
        """Bytes of the whole array."""
        return math.prod(self.shape) * self.itemsize

    @cached_property
    def view_grid(self) -> tuple[int, ...]:
        """The grid of the array as a Zarr array: its own, or for boxes of any kind one that suits them.

        That is the coarsest grid to which all its boxes keep, so that each cell lies in one piece; where that is too
        fine (flat ranges), whole rows. Cells are about as large as the largest piece, so that who reads one of
        them holds no more than who reads one of those.
        """
        if self.grid is not None:
            return self.grid
        largest = max((piece.length for piece in self.pieces), default=0)
        bound = min(max(largest, _CELL_BYTES), CHUNK_BYTES)
        rows = chunk_grid(self.shape, self.itemsize, bound)
        if 0 in self.shape:
            return rows
        unit = [0] * len(self.shape)  # of the edges inside the array, along each axis
        for piece in self.pieces:
            for axis, (start, stop) in enumerate(zip(piece.box.offset, piece.box.end, strict=True)):
                unit[axis] = math.gcd(unit[axis], start)
                if stop < self.shape[axis]:
                    unit[axis] = math.gcd(unit[axis], stop)
        sharding = Sharding((), (0,), tuple(u or n for u, n in zip(unit, self.shape, strict=True)))
        natural = grid_of(ArraySpec(self.name, self.dtype, self.shape, False, sharding), bound)
        assert natural is not None
        enough = max(2 * len(self.pieces), cell_count(self.shape, rows))
        return natural if cell_count(self.shape, natural) <= enough else rows

    def hole(self) -> Box | None:
        """A part of the array that is in no pack; ``None`` if it is whole."""
        if self.grid is not None:  # counting says the same of pieces on a grid, and is quick
            cells = math.prod(-(-n // g) for n, g in zip(self.shape, self.grid, strict=True))
            if len({piece.box.offset for piece in self.pieces}) == cells:
                return None
        return next(iter(missing(Box.whole(self.shape), [piece.box for piece in self.pieces])), None)

    def need_whole(self) -> None:
        """``CorruptError`` that names the array and a box it lacks, unless it is whole."""
        hole = self.hole()
        if hole is not None:
            raise lacks(self.name, hole)


def lacks(name: str, hole: Box) -> CorruptError:
    """The error for a box of an array that is in no pack."""
    return CorruptError(
        f"{name} lacks the box of shape {list(hole.shape)} at {list(hole.offset)}: it is in no pack of this checkpoint",
        operation="read checkpoint",
        path=name,
        hint=HINT,
    )


def catalog(parts: Sequence[Part]) -> dict[str, Entry]:
    """All arrays of a checkpoint by name, other names of the same bytes included.

    Raises:
        CorruptError: two parts describe an array differently.
    """
    arrays: dict[str, tuple[PartArray, int]] = {}
    pieces: dict[str, list[Piece]] = {}
    for part in sorted(parts, key=lambda part: part.rank):
        for array in part.arrays:
            known = arrays.setdefault(array.name, (array, part.rank))[0]
            if known != array:
                raise CorruptError(
                    f"part {part.name} has {array.name} as {array.dtype}{list(array.shape)} in chunks of {array.grid}, "
                    f"others as {known.dtype}{list(known.shape)} in chunks of {known.grid}",
                    operation="read checkpoint",
                    path=part.name,
                    hint=HINT,
                )
        for chunk in part.chunks:
            array = part.arrays[chunk.array]
            full = chunk.box_shape if array.grid is None else array.grid
            file = part.pack_of(chunk).rpartition("/")[2]
            piece = Piece(part.rank, file, chunk.box, full, chunk.offset, chunk.length, chunk.crc32c)
            pieces.setdefault(array.name, []).append(piece)
    found = {}
    for name, (array, rank) in arrays.items():
        owner = rank if array.scope is Scope.RANK else None
        found[name] = Entry(
            name, array.dtype, array.shape, array.grid, array.scope, owner, tuple(pieces.get(name, ()))
        )
    for name, other in _aliases(parts):
        found.setdefault(other, replace(found[name], name=other, same_as=name))
    return dict(sorted(found.items()))


def _aliases(parts: Sequence[Part]) -> Iterator[tuple[str, str]]:
    """``(name, other name)`` of arrays that were met more than once."""
    for part in parts:
        tied = [(key, place) for place, key in leaves(part.state) if place != key]
        arrays = {part.key(array): array for array in part.arrays} if tied else {}
        for key, place in tied:
            yield arrays[key].name, stored_name(place, arrays[key].scope, rank=part.rank)


def cell_count(shape: Sequence[int], grid: Sequence[int]) -> int:
    """Cells of a grid over an array; 0 if it has no elements."""
    return math.prod(-(-n // g) for n, g in zip(shape, grid, strict=True))


def places(skeleton: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The leaves of a skeleton as ``(keys on the way, node)``: arrays, and values without an array or a mapping in
    them. Keys of mappings as text, of lists and tuples as numbers: the paths of torch's distributed checkpoints."""
    kind = node_kind(skeleton)
    if kind in ("dict", "odict"):
        for key, value in zip(skeleton["k"], skeleton["v"], strict=True):
            text = str(int(key["v"], 16)) if isinstance(key, dict) else str(key)
            yield from places(value, (*path, text))
    elif kind in ("list", "tuple", "namedtuple") and _open(skeleton):
        for index, value in enumerate(items(skeleton)):
            yield from places(value, (*path, index))
    else:
        yield path, skeleton


def node_kind(node: Any) -> str:
    """``t`` of a skeleton's node; ``list``; or ``plain``."""
    if isinstance(node, list):
        return "list"
    return str(node["t"]) if isinstance(node, dict) else "plain"


def items(node: Any) -> list[Any]:
    """What a list, tuple or named tuple of a skeleton holds."""
    values = node if isinstance(node, list) else node["v"]
    return list(values)


def _open(node: Any) -> bool:
    """Whether a list or tuple holds an array or a mapping, at any depth."""
    for item in items(node):
        kind = node_kind(item)
        if kind in ("array", "dict", "odict"):
            return True
        if kind in ("list", "tuple", "namedtuple") and _open(item):
            return True
    return False
