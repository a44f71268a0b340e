"""The plan: which rank writes which piece of which array, and where in its pack it lies. Pure.

Every rank computes its own plan from its own layout, without a word to the others, and all agree: a chunk
that several ranks hold has one owner, chosen from what all its holders see alike. A pack holds the owned
chunks only; a later memory tier lays its arena out as ``[owned | replicas]`` with this very layout as the
prefix. Must never look at values, and never depend on order of arrival, hashes that differ between processes,
or the clock.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Any

from resilience.checkpoint import arrays as _arrays
from resilience.checkpoint.box import Box, cells
from resilience.checkpoint.shard import Shard
from resilience.errors import InvalidError

ALIGN = 4096  # of chunk offsets and pack sizes: what O_DIRECT needs on every device we know
CRC_BYTES = 4
CHUNK_BYTES = 64 << 20
_RANK_PREFIX = re.compile(r"rank-\d+(/|$)")


class Scope(StrEnum):
    """Whose an array is."""

    RANK = "rank"  # one rank's own: stored under rank-<r>/
    REPLICATED = "replicated"  # whole on every rank, the same bytes
    SHARDED = "sharded"  # each rank holds some of it


@dataclass(frozen=True)
class Sharding:
    """What a rank holds of an array: as in ``Shard``, without the memory.

    ``holders`` is ascending, and never empty; a ``range`` where it can be, so that large worlds stay small.
    """

    boxes: tuple[Box, ...]
    holders: Sequence[int]
    unit: tuple[int, ...] | None = None


@dataclass(frozen=True)
class ArraySpec:
    """One array of a rank's state.

    Attributes:
        name: as ``tree.flatten`` gave it, without a rank's prefix.
        dtype: Zarr name: ``float32``, ``bfloat16``, ...
        shape: of the whole array; may be ``()`` or hold zeros.
        replicated: every rank holds the same bytes, so one of them writes it.
        sharding: the rank holds only some of it; not together with ``replicated``.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    replicated: bool
    sharding: Sharding | None = None

    @property
    def scope(self) -> Scope:
        if self.sharding is not None:
            return Scope.SHARDED
        return Scope.REPLICATED if self.replicated else Scope.RANK

    @property
    def boxes(self) -> tuple[Box, ...]:
        """What this rank holds."""
        return (Box.whole(self.shape),) if self.sharding is None else self.sharding.boxes


@dataclass(frozen=True)
class Chunk:
    """One chunk of an array and its place in the pack.

    Attributes:
        array: name of the array in the checkpoint (``rank-<r>/<key>`` for rank-local ones).
        key: name of the array in the rank's state.
        piece: which of the rank's boxes of the array it is cut from.
        box_offset, box_shape: the part of the array it holds.
        dtype, shape: of the whole array.
        grid: shape of a full chunk. Where the array ends inside the chunk, zeros fill it up. ``None``: the chunks
            keep to no grid, and are as large as their boxes.
        offset: of the payload in the pack, in bytes, a multiple of ``ALIGN``.
        length: of the payload in bytes, padding included. Its CRC32C lies in the four bytes after it.
    """

    array: str
    key: str
    piece: int
    box_offset: tuple[int, ...]
    box_shape: tuple[int, ...]
    dtype: str
    shape: tuple[int, ...]
    grid: tuple[int, ...] | None
    offset: int
    length: int

    @property
    def box(self) -> Box:
        return Box(self.box_offset, self.box_shape)

    @property
    def end(self) -> int:
        """Where the next chunk may begin."""
        return align(self.offset + self.length + CRC_BYTES)


@dataclass(frozen=True)
class Plan:
    """What one rank writes.

    Attributes:
        rank, world_size: whose plan, of how many.
        arrays: all arrays of this rank's state, written by it or not.
        chunks: those it writes, by ascending offset.
        size: bytes of its pack, a multiple of ``ALIGN`` and never 0.
        hash: of all that every rank must agree on (replicated arrays, world size, chunk size): equal on every
            rank of a checkpoint, or the ranks disagreed about the model. Of sharded arrays some ranks may know
            nothing (pipeline stages): those who do are compared when they are read.
        chunk_bytes: the bound the chunks were cut to.
    """

    rank: int
    world_size: int
    arrays: tuple[ArraySpec, ...]
    chunks: tuple[Chunk, ...]
    size: int
    hash: str
    chunk_bytes: int = CHUNK_BYTES


def align(number: int) -> int:
    """The next multiple of ``ALIGN``."""
    return -(-number // ALIGN) * ALIGN


def stored_name(name: str, scope: Scope, *, rank: int) -> str:
    """The name of an array in the checkpoint."""
    return f"rank-{rank}/{name}" if scope is Scope.RANK else name


def specs(
    arrays: Mapping[str, Any], replicated: Collection[str] = (), *, rank: int = 0
) -> tuple[ArraySpec, ...]:
    """Specs of live arrays and shards. An array is replicated if its name, or a name above it, is in
    ``replicated``. ``rank`` is this one's, for shards that nobody else holds."""
    names = frozenset(replicated)

    def covered(name: str) -> bool:
        while name and name not in names:
            name = name.rpartition("/")[0]
        return bool(name)

    found = []
    for name, array in arrays.items():
        dtype, shape = _arrays.describe(array)
        if isinstance(array, Shard):
            holders = (rank,) if array.holders is None else _compact(array.holders)
            found.append(ArraySpec(name, dtype, shape, False, Sharding(array.boxes, holders, array.unit)))
        else:
            found.append(ArraySpec(name, dtype, shape, covered(name)))
    return tuple(found)


def _compact(ranks: Sequence[int]) -> Sequence[int]:
    """Equal sets of ranks as equal values, whatever they came as; a range if they are one."""
    ordered = tuple(sorted(map(int, ranks)))
    step = ordered[1] - ordered[0] if len(ordered) > 1 else 1
    guess = range(ordered[0], ordered[-1] + 1, step) if step > 0 else range(0)
    return guess if tuple(guess) == ordered else ordered


def plan(specs: Iterable[ArraySpec], *, rank: int, world_size: int, chunk_bytes: int = CHUNK_BYTES) -> Plan:
    """The plan of ``rank``.

    Args:
        specs: all arrays of this rank; the replicated ones must be the same on every rank, in any order.
        chunk_bytes: upper bound of a chunk's payload (one element, if that is larger; a whole shard, if no number
            of equal pieces fits its grid).

    Raises:
        InvalidError: two arrays of one name, a name that looks like a rank's, or a rank outside the world.
    """
    return _plan(tuple(specs), rank, world_size, chunk_bytes)


@lru_cache(maxsize=16)  # layouts hardly ever change between saves; one process rarely knows more than two
def _plan(specs: tuple[ArraySpec, ...], rank: int, world_size: int, chunk_bytes: int) -> Plan:
    _check(specs, rank, world_size, chunk_bytes)
    pieces = [_cut(spec, chunk_bytes) for spec in specs]
    others = _owned_by_others(specs, pieces, rank, world_size)
    chunks: list[Chunk] = []
    offset = 0
    for spec, (grid, boxes) in zip(specs, pieces, strict=True):
        array = stored_name(spec.name, spec.scope, rank=rank)
        itemsize = _arrays.numpy_dtype(spec.dtype).itemsize
        for piece, box in boxes:
            if (spec.name, box.offset) in others:
                continue
            length = (box.count if grid is None else math.prod(grid)) * itemsize
            chunk = Chunk(
                array, spec.name, piece, box.offset, box.shape, spec.dtype, spec.shape, grid, offset, length
            )
            chunks.append(chunk)
            offset = chunk.end
    # One page even with nothing to write: no store likes empty objects, and "missing" must differ from
    # "empty".
    size = max(offset, ALIGN)
    shared = _hash([spec for spec in specs if spec.scope is Scope.REPLICATED], world_size, chunk_bytes)
    return Plan(rank, world_size, specs, tuple(chunks), size, shared, chunk_bytes)


def grid_of(spec: ArraySpec, chunk_bytes: int) -> tuple[int, ...] | None:
    """Shape of a full chunk of the array, the same on every rank; ``None``: its chunks keep to no grid."""
    itemsize = _arrays.numpy_dtype(spec.dtype).itemsize
    if spec.sharding is None:
        return chunk_grid(spec.shape, itemsize, chunk_bytes)
    if spec.sharding.unit is None:
        return None
    return _dividing_grid(spec.sharding.unit, itemsize, chunk_bytes)


def _cut(spec: ArraySpec, chunk_bytes: int) -> tuple[tuple[int, ...] | None, list[tuple[int, Box]]]:
    """The grid of an array, and the boxes of its chunks with the piece that each is cut from."""
    grid = grid_of(spec, chunk_bytes)
    itemsize = _arrays.numpy_dtype(spec.dtype).itemsize
    found = []
    for piece, box in enumerate(spec.boxes):
        if grid is not None:
            found += [(piece, cell) for cell in cells(box, grid)]
        else:
            own = chunk_grid(box.shape, itemsize, chunk_bytes)
            for cell in cells(Box.whole(box.shape), own):
                start = tuple(a + b for a, b in zip(box.offset, cell.offset, strict=True))
                found.append((piece, Box(start, cell.shape)))
    return grid, found


def chunk_grid(shape: tuple[int, ...], itemsize: int, chunk_bytes: int) -> tuple[int, ...]:
    """Shape of a full chunk: split along the first axis that gets it to ``chunk_bytes`` or less.

    That is axis 0 unless a single row is larger than ``chunk_bytes``. Every chunk is contiguous in the
    array's C order, and rows are spread evenly, so that the padded last chunk wastes little.
    """
    if 0 in shape:
        return tuple(max(size, 1) for size in shape)
    for axis, size in enumerate(shape):
        rest = math.prod(shape[axis + 1 :]) * itemsize
        if rest <= chunk_bytes or axis == len(shape) - 1:
            count = -(-size // max(chunk_bytes // rest, 1))
            return (1,) * axis + (-(-size // count),) + shape[axis + 1 :]
    return ()


def _dividing_grid(unit: tuple[int, ...], itemsize: int, chunk_bytes: int) -> tuple[int, ...]:
    """Like ``chunk_grid``, for a grid that has to divide ``unit`` exactly, so that the cells of shards of that
    shape are cells of the whole array. A side that cannot be divided well stays whole, and the chunk large."""
    grid = tuple(max(size, 1) for size in unit)
    for axis, size in enumerate(grid):
        rest = math.prod(grid[axis + 1 :]) * itemsize
        needed = -(-size // max(chunk_bytes // rest, 1))
        count = next((n for n in range(needed, min(4 * needed, size) + 1) if size % n == 0), None)
        if count is None:
            return grid
        grid = (*grid[:axis], size // count, *grid[axis + 1 :])
        if math.prod(grid) * itemsize <= chunk_bytes:
            return grid
    return grid


def boxes(shape: tuple[int, ...], grid: tuple[int, ...]) -> Iterable[tuple[tuple[int, ...], tuple[int, ...]]]:
    """``(offset, shape)`` of every cell of a grid over an array, in C order; none if it has no elements."""
    for cell in cells(Box.whole(shape), grid):
        yield cell.offset, cell.shape


def _owned_by_others(
    specs: Sequence[ArraySpec],
    pieces: Sequence[tuple[tuple[int, ...] | None, list[tuple[int, Box]]]],
    rank: int,
    world_size: int,
) -> set[tuple[str, tuple[int, ...]]]:
    """Chunks (array, offset) that this rank holds and another one writes.

    Among ranks that hold the same chunks, the largest goes first, each to the one with the fewest bytes so far:
    all of them come to the same answer from what they all know.
    """
    shared: dict[Sequence[int], list[tuple[int, str, tuple[int, ...]]]] = {}
    for spec, (grid, boxes) in zip(specs, pieces, strict=True):
        if spec.scope is Scope.RANK:
            continue
        holders = range(world_size) if spec.sharding is None else spec.sharding.holders
        if len(holders) > 1:
            itemsize = _arrays.numpy_dtype(spec.dtype).itemsize
            shared.setdefault(holders, []).extend(
                (-(box.count if grid is None else math.prod(grid)) * itemsize, spec.name, box.offset)
                for _, box in boxes
            )
    others = set()
    for holders, items in shared.items():
        others |= {(name, offset) for name, offset, owner in owners(items, holders) if owner != rank}
    return others


def owners(
    chunks: Iterable[tuple[int, str, tuple[int, ...]]], holders: Sequence[int]
) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """``(array, offset, owner)`` of each chunk ``(minus its payload's bytes, array, offset)`` that ``holders`` hold
    alike. Readers use it too, to guess where a chunk lies."""
    loads = [(0, holder) for holder in holders]
    for nbytes, name, offset in sorted(chunks):
        load, owner = loads[0]
        heapq.heapreplace(loads, (load + align(CRC_BYTES - nbytes), owner))
        yield name, offset, owner


def _check(specs: tuple[ArraySpec, ...], rank: int, world_size: int, chunk_bytes: int) -> None:
    if not 0 <= rank < world_size or chunk_bytes < 1:
        raise InvalidError(
            f"rank {rank} of {world_size} with chunks of {chunk_bytes} bytes cannot be planned",
            operation="plan",
            hint="0 <= rank < world_size and chunk_bytes >= 1",
        )
    seen = set()
    for spec in specs:
        if spec.name in seen or not spec.name:
            problem = "there are two arrays of this name" if spec.name else "an array has no name"
        elif _RANK_PREFIX.match(spec.name):
            problem = "names beginning with rank-<number> belong to the arrays of one rank"
        else:
            seen.add(spec.name)
            if spec.sharding is None or rank in spec.sharding.holders:
                continue
            problem = f"rank {rank} is not among those that hold its shard, {list(spec.sharding.holders)}"
        raise InvalidError(
            f"cannot save array {spec.name!r}: {problem}",
            operation="plan",
            path=spec.name,
            hint="give a shard the ranks that hold the same bytes, this one included"
            if seen and spec.sharding is not None
            else "track the object under another name",
        )


def _hash(replicated: list[ArraySpec], world_size: int, chunk_bytes: int) -> str:
    layout = sorted([spec.name, spec.dtype, list(spec.shape)] for spec in replicated)
    text = json.dumps([1, world_size, chunk_bytes, layout], separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
