"""The plan: which rank writes which piece of which array, and where in its pack it lies. Pure.

Every rank computes its own plan from its own layout, without a word to the others, and all agree: a
replicated array has one owner, chosen from what all ranks see alike. A pack holds the owned chunks only; a
later memory tier lays its arena out as ``[owned | replicas]`` with this very layout as the prefix. Must
never look at values, and never depend on order of arrival, hashes that differ between processes, or the
clock.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from resilience.checkpoint import arrays as _arrays
from resilience.errors import InvalidError

ALIGN = 4096  # of chunk offsets and pack sizes: what O_DIRECT needs on every device we know
CRC_BYTES = 4
CHUNK_BYTES = 64 << 20
_RANK_PREFIX = re.compile(r"rank-\d+(/|$)")


@dataclass(frozen=True)
class ArraySpec:
    """One array of a rank's state.

    Attributes:
        name: as ``tree.flatten`` gave it, without a rank's prefix.
        dtype: Zarr name: ``float32``, ``bfloat16``, ...
        shape: of the whole array; may be ``()`` or hold zeros.
        replicated: every rank holds the same bytes, so one of them writes it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    replicated: bool

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _arrays.numpy_dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Chunk:
    """One chunk of an array and its place in the pack.

    Attributes:
        array: name of the array in the checkpoint (``rank-<r>/<key>`` for rank-local ones).
        key: name of the array in the rank's state.
        box_offset, box_shape: the part of the array it holds; contiguous in C order.
        dtype, shape: of the whole array.
        grid: shape of a full chunk. Where the array ends inside the chunk, zeros fill it up.
        offset: of the payload in the pack, in bytes, a multiple of ``ALIGN``.
        length: of the payload in bytes, padding included. Its CRC32C lies in the four bytes after it.
    """

    array: str
    key: str
    box_offset: tuple[int, ...]
    box_shape: tuple[int, ...]
    dtype: str
    shape: tuple[int, ...]
    grid: tuple[int, ...]
    offset: int
    length: int

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
        hash: of all that ranks must agree on (replicated arrays, world size, chunk size): equal on every
            rank of a checkpoint, or the ranks disagreed about the model.
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


def stored_name(name: str, *, replicated: bool, rank: int) -> str:
    """The name of an array in the checkpoint."""
    return name if replicated else f"rank-{rank}/{name}"


def specs(arrays: Mapping[str, Any], replicated: Collection[str] = ()) -> tuple[ArraySpec, ...]:
    """Specs of live arrays. An array is replicated if its name, or a name above it, is in ``replicated``."""
    names = frozenset(replicated)

    def covered(name: str) -> bool:
        while name and name not in names:
            name = name.rpartition("/")[0]
        return bool(name)

    found = []
    for name, array in arrays.items():
        dtype, shape = _arrays.describe(array)
        found.append(ArraySpec(name, dtype, shape, covered(name)))
    return tuple(found)


def plan(specs: Iterable[ArraySpec], *, rank: int, world_size: int, chunk_bytes: int = CHUNK_BYTES) -> Plan:
    """The plan of ``rank``.

    Args:
        specs: all arrays of this rank; the replicated ones must be the same on every rank, in any order.
        chunk_bytes: upper bound of a chunk's payload (one element, if that is larger).

    Raises:
        InvalidError: two arrays of one name, a name that looks like a rank's, or a rank outside the world.
    """
    return _plan(tuple(specs), rank, world_size, chunk_bytes)


@lru_cache(maxsize=16)  # layouts hardly ever change between saves; one process rarely knows more than two
def _plan(specs: tuple[ArraySpec, ...], rank: int, world_size: int, chunk_bytes: int) -> Plan:
    _check(specs, rank, world_size, chunk_bytes)
    replicated = [spec for spec in specs if spec.replicated]
    owners = _owners(replicated, world_size)
    chunks: list[Chunk] = []
    offset = 0
    for spec in specs:
        if spec.replicated and owners[spec.name] != rank:
            continue
        array = stored_name(spec.name, replicated=spec.replicated, rank=rank)
        grid = chunk_grid(spec.shape, _arrays.numpy_dtype(spec.dtype).itemsize, chunk_bytes)
        length = math.prod(grid) * _arrays.numpy_dtype(spec.dtype).itemsize
        for start, shape in boxes(spec.shape, grid):
            chunk = Chunk(array, spec.name, start, shape, spec.dtype, spec.shape, grid, offset, length)
            chunks.append(chunk)
            offset = chunk.end
    # One page even with nothing to write: no store likes empty objects, and "missing" must differ from
    # "empty".
    size = max(offset, ALIGN)
    shared = _hash(replicated, world_size, chunk_bytes)
    return Plan(rank, world_size, specs, tuple(chunks), size, shared, chunk_bytes)


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


def boxes(shape: tuple[int, ...], grid: tuple[int, ...]) -> Iterable[tuple[tuple[int, ...], tuple[int, ...]]]:
    """``(offset, shape)`` of every chunk's part of the array, in C order; none if it has no elements."""
    if 0 in shape:
        return
    counts = [-(-size // step) for size, step in zip(shape, grid, strict=True)]
    for number in range(math.prod(counts)):
        index = []
        for count in reversed(counts):
            number, remainder = divmod(number, count)
            index.append(remainder)
        start = tuple(i * step for i, step in zip(reversed(index), grid, strict=True))
        yield start, tuple(min(g, n - s) for g, n, s in zip(grid, shape, start, strict=True))


def _owners(replicated: list[ArraySpec], world_size: int) -> dict[str, int]:
    """Owner of each replicated array: the largest first, each to the rank with the fewest bytes so far."""
    loads = [(0, rank) for rank in range(world_size)]
    owners = {}
    for spec in sorted(replicated, key=lambda spec: (-spec.nbytes, spec.name)):
        load, owner = loads[0]
        owners[spec.name] = owner
        heapq.heapreplace(loads, (load + align(spec.nbytes + CRC_BYTES), owner))
    return owners


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
            continue
        raise InvalidError(
            f"cannot save array {spec.name!r}: {problem}",
            operation="plan",
            path=spec.name,
            hint="track the object under another name",
        )


def _hash(replicated: list[ArraySpec], world_size: int, chunk_bytes: int) -> str:
    layout = sorted([spec.name, spec.dtype, list(spec.shape)] for spec in replicated)
    text = json.dumps([1, world_size, chunk_bytes, layout], separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
