"""The part: the small JSON manifest of one rank's pack, and the names of both.

Owns the part's format (docs/format.md, "Part") and where packs and parts lie under a storage root. A part
without CRCs is a draft: it travels from rank to writer, and is never written. Must never hold anything that
needs more than JSON to be read.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from resilience.checkpoint import arrays as _arrays
from resilience.checkpoint.box import Box
from resilience.checkpoint.plan import ALIGN, CRC_BYTES, Plan, Scope, grid_of, stored_name
from resilience.errors import CorruptError, InvalidError

VERSION = 1
CRC_BLOCK = 1 << 16  # bytes between two running CRCs of a chunk: what is read at least to check a piece of it
_FORMAT = "resilience-part"
_LINK = re.compile(r"rank-\d+\.from-step-\d+-g\d+\.pack")


@dataclass(frozen=True)
class PartArray:
    """An array of the rank's state, whether its bytes are in this pack or in another rank's.

    Attributes:
        name: in the checkpoint; ``rank-<r>/<key>`` if it is the rank's own.
        shape: of the whole array.
        grid: shape of a full chunk; ``None``: the chunks keep to no grid, and are as large as their boxes.
        scope: whose it is.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    grid: tuple[int, ...] | None
    scope: Scope

    def payload(self, box: Box) -> int:
        """Bytes of the payload of the chunk that holds ``box``."""
        count = box.count if self.grid is None else math.prod(self.grid)
        return count * _arrays.numpy_dtype(self.dtype).itemsize


@dataclass(frozen=True)
class PartChunk:
    """A chunk.

    Attributes:
        array: index of its array.
        crc32c: of the payload, -1 in a draft.
        pack: which file holds it: 0 the rank's own pack, n the part's n-th link.
        running: the CRC32C of the payload's first ``CRC_BLOCK`` bytes, of its first ``2 CRC_BLOCK`` and so on, short
            of the whole; 32-bit little-endian integers. From one to the next the bytes between can be checked alone.
    """

    array: int
    box_offset: tuple[int, ...]
    box_shape: tuple[int, ...]
    offset: int
    length: int
    crc32c: int = -1
    pack: int = 0
    running: bytes = b""

    @property
    def box(self) -> Box:
        return Box(self.box_offset, self.box_shape)

    def crc_at(self, at: int) -> int:
        """The CRC32C of the payload's first ``at`` bytes: a multiple of ``CRC_BLOCK``, or all of them."""
        if at in (0, self.length):
            return self.crc32c if at else 0
        (found,) = struct.unpack_from("<I", self.running, at // CRC_BLOCK * 4 - 4)
        return int(found)


@dataclass(frozen=True)
class Link:
    """An older pack of the rank, under a second name in this checkpoint's directory, for what has not changed.

    Attributes:
        name: of the file in the directory: ``rank-<r>.from-step-<step>-g<generation>.pack``.
        size: bytes of it.
    """

    name: str
    size: int

    @property
    def origin(self) -> str:
        """Object name of the pack where it was written."""
        rank, _, where = self.name.removesuffix(".pack").partition(".from-")
        return f"checkpoints/{where}/{rank}.pack"


@dataclass(frozen=True)
class Part:
    """The manifest of one rank's share of a checkpoint: its pack, and what it has in older ones.

    Attributes:
        size: bytes of the pack.
        plan_hash: equal in all parts of a checkpoint (see ``Plan.hash``).
        arrays: all arrays of the rank's state.
        chunks: those this rank wrote, by pack and ascending offset.
        state: the skeleton (see ``tree``) of the rank's state.
        links: older packs that hold some of the chunks.
    """

    run: str
    step: int
    generation: int
    rank: int
    world_size: int
    size: int
    plan_hash: str
    arrays: tuple[PartArray, ...]
    chunks: tuple[PartChunk, ...]
    state: Any
    version: int = VERSION
    links: tuple[Link, ...] = ()

    @property
    def directory(self) -> str:
        return directory(self.step, self.generation)

    @property
    def pack_name(self) -> str:
        return pack_name(self.directory, self.rank)

    @property
    def name(self) -> str:
        return part_name(self.directory, self.rank)

    @property
    def packs(self) -> tuple[tuple[str, int], ...]:
        """Object name and size of every file that holds chunks of this part: its own pack, then the links."""
        return (
            (self.pack_name, self.size),
            *((f"{self.directory}/{link.name}", link.size) for link in self.links),
        )

    def pack_of(self, chunk: PartChunk) -> str:
        """Object name of the file that holds ``chunk``."""
        return f"{self.directory}/{self.links[chunk.pack - 1].name}" if chunk.pack else self.pack_name

    def key(self, array: PartArray) -> str:
        """The array's name in the rank's own state."""
        return array.name.removeprefix(f"rank-{self.rank}/") if array.scope is Scope.RANK else array.name

    def with_crcs(self, crcs: Sequence[int], running: Sequence[bytes] | None = None) -> Part:
        """The part with the CRC32C of each chunk, and its running CRCs, filled in, in the order of ``chunks``. Without
        ``running`` no chunk may be longer than ``CRC_BLOCK``."""
        pairs = zip(self.chunks, crcs, running or [b""] * len(crcs), strict=True)
        return replace(self, chunks=tuple(replace(it, crc32c=crc, running=more) for it, crc, more in pairs))

    def to_json(self) -> dict[str, Any]:
        """As JSON-able values."""
        return {
            "format": _FORMAT,
            "version": self.version,
            "run": self.run,
            "step": self.step,
            "generation": self.generation,
            "rank": self.rank,
            "world_size": self.world_size,
            "size": self.size,
            "plan_hash": self.plan_hash,
            "arrays": [
                [a.name, a.dtype, list(a.shape), None if a.grid is None else list(a.grid), a.scope.value]
                for a in self.arrays
            ],
            "chunks": [
                [c.array, list(c.box_offset), list(c.box_shape), c.offset, c.length, c.crc32c]
                + (
                    [c.pack, base64.b64encode(c.running).decode()]
                    if c.running
                    else [c.pack]
                    if c.pack
                    else []
                )
                for c in self.chunks
            ],
            "state": self.state,
            **({"links": [[link.name, link.size] for link in self.links]} if self.links else {}),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any], like: Part | None = None) -> Part:
        """The inverse of ``to_json``. ``InvalidError`` on a newer version; ``KeyError``, ``TypeError`` or
        ``ValueError`` on anything malformed. What is as in ``like``, another part of the checkpoint, is shared with
        it: who reads a thousand parts has neither time nor memory for each."""
        if data["format"] != _FORMAT:
            raise ValueError(f"format is {data['format']!r}")
        if int(data["version"]) > VERSION:
            raise InvalidError(
                f"the part has format version {data['version']}; this package reads up to {VERSION}",
                operation="read part",
                hint="upgrade this package: pip install -U resilience",
            )
        known = like._rows if like is not None else {}
        fresh: list[PartArray] = []
        arrays = []
        for row in data["arrays"]:
            array = known.get(
                (row[0], row[1], tuple(row[2]), None if row[3] is None else tuple(row[3]), row[4])
            )
            if array is None:
                name, dtype, shape, grid, scope = row
                array = PartArray(
                    str(name), str(dtype), tuple(shape), None if grid is None else tuple(grid), Scope(scope)
                )
                fresh.append(array)
            arrays.append(array)
        part = cls(
            run=str(data["run"]),
            step=int(data["step"]),
            generation=int(data["generation"]),
            rank=int(data["rank"]),
            world_size=int(data["world_size"]),
            size=int(data["size"]),
            plan_hash=str(data["plan_hash"]),
            arrays=tuple(arrays),
            chunks=tuple(
                PartChunk(
                    int(array),
                    tuple(start),
                    tuple(shape),
                    int(offset),
                    int(length),
                    int(crc),
                    int(rest[0]) if rest else 0,
                    base64.b64decode(rest[1], validate=True) if rest[1:] else b"",
                )
                for array, start, shape, offset, length, crc, *rest in data["chunks"]
            ),
            state=_shared(data["state"], like),
            version=int(data["version"]),
            links=tuple(Link(str(name), int(size)) for name, size in data.get("links", ())),
        )
        part.check(fresh)
        return part

    @cached_property
    def _rows(self) -> dict[tuple[Any, ...], PartArray]:
        """Arrays by what their rows in JSON hold."""
        return {(a.name, a.dtype, a.shape, a.grid, a.scope.value): a for a in self.arrays}

    def encode(self) -> bytes:
        """The bytes of the part file; the same for the same part, whoever writes it."""
        return json.dumps(self.to_json(), separators=(",", ":"), allow_nan=False).encode()

    @classmethod
    def decode(cls, data: bytes, *, path: str, like: Part | None = None) -> Part:
        """Read a part file's bytes. ``CorruptError`` when they are none, ``InvalidError`` when too new. ``like`` as in
        ``from_json``."""
        try:
            return cls.from_json(json.loads(data), like)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            raise CorruptError(
                f"part {path} cannot be read: {type(error).__name__}: {error}",
                operation="read part",
                path=path,
                start=0,
                end=len(data),
                hint="restore an older checkpoint; `resilience verify` lists the damaged ones",
            ) from error

    def check(self, arrays: Iterable[PartArray] | None = None) -> None:
        """``ValueError`` or ``KeyError`` unless the numbers fit each other: readers may trust them then. ``arrays``:
        those to look at, where others were before."""
        if not 0 <= self.rank < self.world_size or self.size < ALIGN or self.size % ALIGN:
            raise ValueError(f"rank {self.rank} of {self.world_size} with a pack of {self.size} bytes")
        for array in self.arrays if arrays is None else arrays:
            grid = array.shape if array.grid is None else array.grid
            if len(grid) != len(array.shape) or min((*grid, *array.shape, 1)) < 0:
                raise ValueError(f"array {array.name} of shape {array.shape} in chunks of {array.grid}")
            _arrays.numpy_dtype(array.dtype)
        for link in self.links:
            if not _LINK.fullmatch(link.name) or link.size < ALIGN:
                raise ValueError(f"a link {link.name!r} of {link.size} bytes")
        end, pack, packs = 0, 0, self.packs
        for chunk in self.chunks:
            if not pack <= chunk.pack <= len(self.links):
                raise ValueError(f"a chunk in pack {chunk.pack} after one in {pack}")
            if chunk.pack != pack:
                end, pack = 0, chunk.pack
            if not 0 <= chunk.array < len(self.arrays):
                raise ValueError(f"a chunk of array number {chunk.array}")
            array = self.arrays[chunk.array]
            if chunk.offset < end or chunk.offset % ALIGN or chunk.length != array.payload(chunk.box):
                raise ValueError(f"chunk of {array.name} at {chunk.offset}, {chunk.length} bytes")
            if not _fits(chunk.box, array):
                raise ValueError(f"chunk of {array.name} holds {chunk.box_shape} at {chunk.box_offset}")
            if chunk.crc32c >= 0 and len(chunk.running) != (max(chunk.length, 1) - 1) // CRC_BLOCK * 4:
                raise ValueError(
                    f"chunk of {array.name} at {chunk.offset} has {len(chunk.running)} bytes of CRCs"
                )
            end = chunk.offset + chunk.length + CRC_BYTES
            if end > packs[pack][1]:
                raise ValueError(f"a chunk ends at {end} in a pack of {packs[pack][1]} bytes")


def _shared(state: Any, like: Part | None) -> Any:
    """``state``, with those of its objects that are as in ``like`` taken from there."""
    if like is None or not isinstance(state, dict) or not isinstance(state.get("v"), list):
        return state
    theirs = like.state.get("v", ()) if isinstance(like.state, dict) else ()
    return {
        **state,
        "v": [b if a == b else a for a, b in itertools.zip_longest(state["v"], theirs)][: len(state["v"])],
    }


def _fits(box: Box, array: PartArray) -> bool:
    if min((*box.offset, 0)) < 0 or not Box.whole(array.shape).holds(box) or not box.count:
        return False
    if array.grid is None:
        return True
    sides = zip(box.offset, box.shape, array.grid, array.shape, strict=True)
    return all(o % g == 0 and s == min(g, n - o) for o, s, g, n in sides)


def draft(plan: Plan, skeleton: Any, *, run: str, step: int, generation: int) -> Part:
    """The part of a snapshot that has not been persisted yet: all but the CRCs."""
    arrays: list[PartArray] = []
    numbers = {}
    for spec in plan.arrays:
        name = stored_name(spec.name, spec.scope, rank=plan.rank)
        numbers[name] = len(arrays)
        arrays.append(PartArray(name, spec.dtype, spec.shape, grid_of(spec, plan.chunk_bytes), spec.scope))
    chunks = (
        PartChunk(numbers[chunk.array], chunk.box_offset, chunk.box_shape, chunk.offset, chunk.length)
        for chunk in plan.chunks
    )
    return Part(
        run=run,
        step=step,
        generation=generation,
        rank=plan.rank,
        world_size=plan.world_size,
        size=plan.size,
        plan_hash=plan.hash,
        arrays=tuple(arrays),
        chunks=tuple(chunks),
        state=skeleton,
    )


def directory(step: int, generation: int) -> str:
    """Where the packs and parts of a checkpoint lie, relative to the storage root of the run."""
    return f"checkpoints/step-{step}-g{generation}"


def pack_name(directory: str, rank: int) -> str:
    return f"{directory}/rank-{rank}.pack"


def link_name(rank: int, step: int, generation: int) -> str:
    """The second name of ``rank``'s pack of another checkpoint."""
    return f"rank-{rank}.from-step-{step}-g{generation}.pack"


def part_name(directory: str, rank: int) -> str:
    return f"{directory}/rank-{rank}.json"


def sha256(data: bytes) -> str:
    """How the commit log pins a part."""
    return hashlib.sha256(data).hexdigest()
