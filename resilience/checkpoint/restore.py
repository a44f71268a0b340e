"""Restore: one rank's view of a checkpoint, every byte of it verified before it is used.

Owns the check that parts belong together and cover what the rank needs, and the reading: each range once, in
order, neighbours together. Must never hand out an array that was not verified completely, and never fill a
gap with zeros: what is missing is an error that names file and byte range.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from resilience.checkpoint import arrays as _arrays
from resilience.checkpoint import fit
from resilience.checkpoint.arrays import AnyArray
from resilience.checkpoint.box import Box, missing
from resilience.checkpoint.pack import check_chunk, check_size, read_range
from resilience.checkpoint.part import Part, PartArray, PartChunk, sha256
from resilience.checkpoint.plan import CRC_BYTES, Scope
from resilience.checkpoint.tree import unflatten
from resilience.errors import CorruptError, InvalidError
from storage_backends import open_storage
from storage_backends.base import Storage

_GAP = 1 << 20  # bytes nobody asked for that are read along rather than asking twice
_BLOCK = 64 << 20  # bytes asked for at once
_Place = tuple[str, tuple[int, ...], tuple[int, ...]]  # array, box
_HINT = "restore an older checkpoint; `resilience verify` lists the damaged ones"


@dataclass(frozen=True)
class Source:
    """Where the part of one rank of the saved world lies, and what the commit log says of it.

    Attributes:
        storage: root that ``part`` and the pack's name are relative to.
        part: object name of the part.
        sha256: of the part's bytes, as recorded.
    """

    rank: int
    storage: Storage
    part: str
    sha256: str

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Source:
        """From ``{"rank", "storage": URL, "part", "sha256"}``."""
        return cls(data["rank"], open_storage(data["storage"]), data["part"], data["sha256"])


@dataclass(frozen=True)
class Restored:
    """A rank's state as saved. ``arrays`` are NumPy (fresh, writable), by key; see ``tree.unflatten``."""

    run: str
    step: int
    generation: int
    skeleton: Any
    arrays: dict[str, AnyArray]


def restore(
    sources: Sequence[Source],
    *,
    rank: int,
    world_size: int,
    run: str | None = None,
    step: int | None = None,
    generation: int | None = None,
    threads: int = 2,
) -> Restored:
    """Read what ``rank`` of ``world_size`` needs: the replicated arrays, its own arrays and its own skeleton.

    Args:
        sources: one per rank of the saved world.
        run, step, generation: what the log says the checkpoint is; ``None`` = not checked.
        threads: that read and verify at the same time.

    Raises:
        CorruptError: anything is missing, damaged or of another checkpoint; names file and byte range.
        InvalidError: saved by another number of ranks, and some state belongs to single ranks.
        UnavailableError: the storage is away.
    """
    if not sources:
        raise InvalidError("restore without sources", operation="restore", hint="give one per saved rank")
    with ThreadPoolExecutor(threads, thread_name_prefix="restore") as pool:
        parts = list(pool.map(load_part, sources))
        check_together(parts, run=run, step=step, generation=generation)
        own = _own(parts, rank, world_size)
        wanted = {array.name: array for array in own.arrays}
        arrays = {
            name: np.empty(array.shape, _arrays.numpy_dtype(array.dtype)) for name, array in wanted.items()
        }
        reads: list[tuple[Source, Part, list[PartChunk]]] = []
        seen: set[_Place] = set()
        for source, part in sorted(zip(sources, parts, strict=True), key=lambda it: it[1].rank):
            needed = _needed(part, wanted, seen)
            if needed:
                check_size(source.storage, part)
                reads += [(source, part, group) for group in _coalesce(needed)]
        _check_coverage(seen, own)
        for done in pool.map(lambda it: _read(it[0], it[1], it[2], arrays), reads):
            assert done is None
    keyed = {own.key(array): arrays[array.name] for array in own.arrays}
    return Restored(own.run, own.step, own.generation, own.state, keyed)


def restore_into(
    sources: Sequence[Source],
    objects: dict[str, Any],
    *,
    rank: int,
    world_size: int,
    run: str | None = None,
    step: int | None = None,
    generation: int | None = None,
    threads: int = 2,
    warn: Callable[[str], None] = warnings.warn,
) -> dict[str, Any]:
    """Fill the tracked objects (name -> value, as ``Run.track`` takes them) in place from a checkpoint.

    An object named ``rng`` (its value does not matter) puts the random number generators back.

    Args:
        sources: one per rank of the saved world.
        objects: all that the checkpoint holds, by the names it was saved under.
        rank, world_size: of the world that restores; may differ from the one that saved.
        run, step, generation: what the log says the checkpoint is; ``None`` = not checked.
        threads: that read and verify at the same time.
        warn: told what could not be restored and need not be (generators of ranks that were not saved).

    Returns:
        name -> value: what cannot change in place (plain values, tuples, JAX arrays) is replaced.

    Raises:
        CorruptError: anything is missing, damaged or of another checkpoint; names file and byte range.
        InvalidError: the state does not fit (lists missing, unexpected and mis-shaped keys), or belongs to single
            ranks of another world. Nothing was changed.
        UnavailableError: the storage is away.
    """
    got = restore(
        sources, rank=rank, world_size=world_size, run=run, step=step, generation=generation, threads=threads
    )
    state = unflatten(got.skeleton, got.arrays)
    return {name: fit.apply(value, state[name], name=name) for name, value in objects.items()}


def load_part(source: Source) -> Part:
    """Read a part. ``CorruptError`` when it is missing, other than recorded, or not of its rank and place."""
    try:
        data = source.storage.read(source.part)
    except FileNotFoundError as error:
        raise _corrupt(source.part, "is missing", 0, None) from error
    found = sha256(data)
    if found != source.sha256:
        raise _corrupt(source.part, f"has the SHA-256 {found}, recorded is {source.sha256}", 0, len(data))
    part = Part.decode(data, path=source.part)
    if (part.rank, part.name) != (source.rank, source.part):
        raise _corrupt(source.part, f"says it is {part.name}, for rank {source.rank}", 0, len(data))
    return part


def check_together(
    parts: Sequence[Part],
    *,
    run: str | None = None,
    step: int | None = None,
    generation: int | None = None,
) -> None:
    """``CorruptError`` unless the parts are those of one whole checkpoint, and of the one asked for."""
    first = parts[0]
    expected = {
        "run": first.run if run is None else run,
        "step": first.step if step is None else step,
        "generation": first.generation if generation is None else generation,
        "world_size": len(parts),
        "plan_hash": first.plan_hash,
    }
    for part in parts:
        for name, value in expected.items():
            if getattr(part, name) != value:
                problem = f"has {name} {getattr(part, name)!r}, expected is {value!r}"
                raise _corrupt(part.name, problem, 0, None)
    ranks = sorted(part.rank for part in parts)
    if ranks != list(range(len(parts))):
        raise _corrupt(first.directory, f"has the parts of ranks {ranks}", None, None)


def _own(parts: Sequence[Part], rank: int, world_size: int) -> Part:
    """The part whose arrays and skeleton ``rank`` restores."""
    saved = len(parts)
    if world_size == saved:
        return next(part for part in parts if part.rank == rank)
    # The seam of resharding: today only state that no rank has for itself can be read by another world.
    local = [array.name for part in parts for array in part.arrays if array.scope is Scope.RANK]
    if local:
        shown = ", ".join(local[:5]) + (f" and {len(local) - 5} more" if len(local) > 5 else "")
        problem = f"these arrays belong to single ranks: {shown}"
    elif any(part.state != parts[0].state for part in parts):
        problem = "values outside of arrays differ between the ranks"
    else:
        return next(part for part in parts if part.rank == 0)
    raise InvalidError(
        f"the checkpoint was saved by {saved} ranks and cannot be restored by {world_size}: {problem}",
        operation="restore",
        step=parts[0].step,
        generation=parts[0].generation,
        hint=f"run with {saved} workers, or track only state that all ranks hold alike",
    )


def _needed(part: Part, wanted: Mapping[str, PartArray], seen: set[_Place]) -> list[PartChunk]:
    """The chunks of ``part`` to read. Adds their places to ``seen``; a place may be filled only once."""
    needed = []
    for chunk in part.chunks:
        array = part.arrays[chunk.array]
        mine = wanted.get(array.name)
        if mine is None:
            continue
        if mine != array:
            problem = f"has {array.name} as {array.dtype}{list(array.shape)}, others as "
            raise _corrupt(part.name, f"{problem}{mine.dtype}{list(mine.shape)}", 0, None)
        place = (array.name, chunk.box_offset, chunk.box_shape)
        if place in seen:
            raise _corrupt(part.name, f"has {array.name} at {chunk.box_offset} a second time", 0, None)
        seen.add(place)
        needed.append(chunk)
    return needed


def _check_coverage(seen: set[_Place], own: Part) -> None:
    """``CorruptError`` unless every chunk of every array is somewhere."""
    for array in own.arrays:
        held = [Box(offset, shape) for name, offset, shape in seen if name == array.name]
        for hole in missing(Box.whole(array.shape), held):
            problem = (
                f"is not whole: {array.name} lacks the box of shape {list(hole.shape)} at {list(hole.offset)}"
            )
            raise _corrupt(own.directory, problem, None, None)


def _coalesce(chunks: list[PartChunk]) -> Iterator[list[PartChunk]]:
    """Runs of chunks that are read at once."""
    group: list[PartChunk] = []
    for chunk in chunks:
        if group:
            gap = chunk.offset - (group[-1].offset + group[-1].length)
            if gap > _GAP or chunk.offset + chunk.length - group[0].offset > _BLOCK:
                yield group
                group = []
        group.append(chunk)
    if group:
        yield group


def _read(source: Source, part: Part, chunks: list[PartChunk], arrays: Mapping[str, AnyArray]) -> None:
    """Read one range, verify it, copy it to its place."""
    start, end = chunks[0].offset, chunks[-1].offset + chunks[-1].length + CRC_BYTES
    block = read_range(source.storage, part.pack_name, start, end)
    for chunk in chunks:
        check_chunk(part, block, chunk.offset - start, chunk.length, chunk.offset, chunk.crc32c)
    for chunk in chunks:
        array = part.arrays[chunk.array]
        carrier = _arrays.carrier(array.dtype)
        full = chunk.box_shape if array.grid is None else array.grid
        payload = np.frombuffer(block, carrier, math.prod(full), chunk.offset - start).reshape(full)
        target = arrays[array.name].view(carrier)
        target[chunk.box.slices(Box.whole(array.shape)) or ...] = payload[tuple(map(slice, chunk.box_shape))]


def _corrupt(path: str, problem: str, start: int | None, end: int | None) -> CorruptError:
    return CorruptError(
        f"{path or 'the checkpoint'} {problem}",
        operation="restore",
        path=path or None,
        start=start,
        end=end,
        hint=_HINT,
    )
