"""The part: the small JSON manifest of one rank's pack, and the names of both.

Owns the part's format (docs/format.md, "Part") and where packs and parts lie under a storage root. A part
without CRCs is a draft: it travels from rank to writer, and is never written. Must never hold anything that
needs more than JSON to be read.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass, replace
from typing import Any

from resilience.checkpoint import arrays as _arrays
from resilience.checkpoint.box import Box
from resilience.checkpoint.plan import ALIGN, CRC_BYTES, Plan, Scope, grid_of, stored_name
from resilience.errors import CorruptError, InvalidError

VERSION = 1
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
    """A chunk. ``array`` is an index; ``crc32c`` is of the payload, -1 in a draft; ``pack`` says which file holds
    it: 0 the rank's own pack, n the part's n-th link."""

    array: int
    box_offset: tuple[int, ...]
    box_shape: tuple[int, ...]
    offset: int
    length: int
    crc32c: int = -1
    pack: int = 0

    @property
    def box(self) -> Box:
        return Box(self.box_offset, self.box_shape)


@dataclass(frozen=True)
class Link:
    """An older pack of the rank, under a second name in this checkpoint's directory, for what has not changed.

    Attributes:
        name: of the file in the directory: ``rank-<r>.from-step-<step>-g<generation>.pack``.
        size: bytes of it.
    """

    name: str
    size: int


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

    def with_crcs(self, crcs: list[int]) -> Part:
        """The part with the CRC32C of each chunk filled in, in the order of ``chunks``."""
        pairs = zip(self.chunks, crcs, strict=True)
        return replace(self, chunks=tuple(replace(chunk, crc32c=crc) for chunk, crc in pairs))

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
                + ([c.pack] if c.pack else [])
                for c in self.chunks
            ],
            "state": self.state,
            **({"links": [[link.name, link.size] for link in self.links]} if self.links else {}),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Part:
        """The inverse of ``to_json``. ``InvalidError`` on a newer version; ``KeyError``, ``TypeError`` or
        ``ValueError`` on anything malformed."""
        if data["format"] != _FORMAT:
            raise ValueError(f"format is {data['format']!r}")
        if int(data["version"]) > VERSION:
            raise InvalidError(
                f"the part has format version {data['version']}; this package reads up to {VERSION}",
                operation="read part",
                hint="upgrade this package: pip install -U resilience",
            )
        part = cls(
            run=str(data["run"]),
            step=int(data["step"]),
            generation=int(data["generation"]),
            rank=int(data["rank"]),
            world_size=int(data["world_size"]),
            size=int(data["size"]),
            plan_hash=str(data["plan_hash"]),
            arrays=tuple(
                PartArray(
                    str(name), str(dtype), tuple(shape), None if grid is None else tuple(grid), Scope(scope)
                )
                for name, dtype, shape, grid, scope in data["arrays"]
            ),
            chunks=tuple(
                PartChunk(
                    int(array),
                    tuple(start),
                    tuple(shape),
                    int(offset),
                    int(length),
                    int(crc),
                    *map(int, pack),
                )
                for array, start, shape, offset, length, crc, *pack in data["chunks"]
            ),
            state=data["state"],
            version=int(data["version"]),
            links=tuple(Link(str(name), int(size)) for name, size in data.get("links", ())),
        )
        part.check()
        return part

    def encode(self) -> bytes:
        """The bytes of the part file; the same for the same part, whoever writes it."""
        return json.dumps(self.to_json(), separators=(",", ":"), allow_nan=False).encode()

    @classmethod
    def decode(cls, data: bytes, *, path: str) -> Part:
        """Read a part file's bytes. ``CorruptError`` when they are none, ``InvalidError`` when too new."""
        try:
            return cls.from_json(json.loads(data))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptError(
                f"part {path} cannot be read: {type(error).__name__}: {error}",
                operation="read part",
                path=path,
                start=0,
                end=len(data),
                hint="restore an older checkpoint; `resilience verify` lists the damaged ones",
            ) from error

    def check(self) -> None:
        """``ValueError`` or ``KeyError`` unless the numbers fit each other: readers may trust them then."""
        if not 0 <= self.rank < self.world_size or self.size < ALIGN or self.size % ALIGN:
            raise ValueError(f"rank {self.rank} of {self.world_size} with a pack of {self.size} bytes")
        for array in self.arrays:
            grid = array.shape if array.grid is None else array.grid
            if len(grid) != len(array.shape) or min((*grid, *array.shape, 1)) < 0:
                raise ValueError(f"array {array.name} of shape {array.shape} in chunks of {array.grid}")
            _arrays.numpy_dtype(array.dtype)
        for link in self.links:
            if not _LINK.fullmatch(link.name) or link.size < ALIGN:
                raise ValueError(f"a link {link.name!r} of {link.size} bytes")
        end, pack = 0, 0
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
            end = chunk.offset + chunk.length + CRC_BYTES
            if end > self.packs[pack][1]:
                raise ValueError(f"a chunk ends at {end} in a pack of {self.packs[pack][1]} bytes")


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
