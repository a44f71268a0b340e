"""Verification: every byte of a checkpoint against what its parts and the commit log say of it.

Owns going on after the first problem: all damage is reported, each as a ``CorruptError`` with file and byte
range. Must never repair, delete or skip anything.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from resilience.checkpoint.box import Box, missing
from resilience.checkpoint.coverage import REQUEST, Strip, Take
from resilience.checkpoint.part import CRC_BLOCK, Part, PartChunk
from resilience.checkpoint.plan import CRC_BYTES
from resilience.checkpoint.reader import check_strip, open_pack, read_all
from resilience.checkpoint.source import Source, check_together, load_part
from resilience.checkpoint.zarr_view import METADATA, REFERENCES, zarr_metadata
from resilience.errors import CorruptError
from storage_backends.reading import RangeReader, buffer

_HINT = "restore an older checkpoint, and quarantine or retire this one"


@dataclass(frozen=True)
class VerifyProgress:
    """How far it is: bytes of packs read so far, of how many, and the pack being read."""

    done: int
    total: int
    path: str


def verify(
    sources: Sequence[Source],
    *,
    step: int | None = None,
    generation: int | None = None,
    progress: Callable[[VerifyProgress], None] = lambda _: None,
) -> Iterator[CorruptError]:
    """Everything that is wrong with a checkpoint; nothing if it is whole.

    Args:
        sources: one per rank of the world that saved it, as the log records them.
        step, generation: what the log says it is.
        progress: called after every chunk.

    Raises:
        UnavailableError: the storage is away: unknown is not damaged.
    """
    parts: list[tuple[Source, Part]] = []
    for source in sources:
        try:
            parts.append((source, load_part(source)))
        except CorruptError as error:
            yield error
    done, total = 0, sum(_bytes(part, number) for _, part in parts for number in range(len(part.packs)))
    for source, part in parts:
        for number, (name, _) in enumerate(part.packs):
            for read, problem in _pack(source, part, number):
                if problem is not None:
                    yield problem
                done += read
                progress(VerifyProgress(done, total, name))
    if len(parts) < len(sources):
        return  # what follows needs all of them
    whole = [part for _, part in parts]
    try:
        check_together(whole, step=step, generation=generation)
    except CorruptError as error:
        yield error
        return
    yield from _holes(whole)
    yield from _zarr(sources[0], whole)


def _bytes(part: Part, number: int) -> int:
    """What is read of a pack: all of the rank's own, of older ones the chunks that the part names."""
    return (
        sum(chunk.length + CRC_BYTES for chunk in part.chunks if chunk.pack == number)
        if number
        else part.size
    )


def _pack(source: Source, part: Part, number: int) -> Iterator[tuple[int, CorruptError | None]]:
    """``(bytes read, problem)`` for each chunk and, in the rank's own pack, for the zeros between."""
    name, size = part.packs[number]
    try:
        pack, problem = open_pack(source.storage, part, name, size)
    except CorruptError as error:
        yield _bytes(part, number), error
        return
    if problem is not None:
        yield 0, problem
    memory = buffer(REQUEST + CRC_BYTES)
    with pack:
        end = 0
        for chunk in part.chunks:
            if chunk.pack == number:
                if not number:
                    yield from _zeros(pack, part, end, chunk.offset, memory)
                yield _chunk(pack, part, chunk, memory)
                end = chunk.offset + chunk.length + CRC_BYTES
        if not number:
            yield from _zeros(pack, part, end, size, memory)


def _chunk(
    pack: RangeReader, part: Part, chunk: PartChunk, memory: memoryview
) -> tuple[int, CorruptError | None]:
    """The first thing that is wrong with a chunk, its running CRCs included."""
    take = Take(part.arrays[chunk.array], chunk, ())
    read = chunk.length + CRC_BYTES
    try:
        for at in range(0, chunk.length, REQUEST):
            stop = min(at + REQUEST, chunk.length)
            strips = [Strip(take, low, min(low + CRC_BLOCK, stop)) for low in range(at, stop, CRC_BLOCK)]
            start = strips[0].offset
            block = read_all(pack, part, part.pack_of(chunk), start, strips[-1].stop, memory)
            for strip in strips:
                check_strip(part, strip, block[strip.offset - start : strip.stop - start])
    except CorruptError as error:
        return read, error
    return read, None


def _zeros(
    pack: RangeReader, part: Part, start: int, end: int, memory: memoryview
) -> Iterator[tuple[int, CorruptError | None]]:
    for at in range(start, end, REQUEST):
        stop = min(at + REQUEST, end)
        try:
            yield stop - at, _dirty(part, read_all(pack, part, part.pack_name, at, stop, memory), at)
        except CorruptError as error:
            yield stop - at, error


def _dirty(part: Part, gap: memoryview, start: int) -> CorruptError | None:
    """Bytes between chunks carry nothing and are written as zeros: others tell of a failing device."""
    if not np.frombuffer(gap, np.uint8).any():
        return None
    return CorruptError(
        f"pack {part.pack_name} has other bytes than zeros between its chunks (no array is affected)",
        operation="verify",
        path=part.pack_name,
        start=start,
        end=start + len(gap),
        hint=_HINT,
    )


def _holes(parts: Sequence[Part]) -> Iterator[CorruptError]:
    there: dict[str, list[Box]] = {}
    for part in parts:
        for chunk in part.chunks:
            there.setdefault(part.arrays[chunk.array].name, []).append(chunk.box)
    arrays = {array.name: array for part in parts for array in part.arrays}
    for array in arrays.values():
        twice = sum(box.count for box in there.get(array.name, ())) - math.prod(array.shape)
        if twice > 0:
            yield CorruptError(
                f"{array.name} has {twice:,} elements more than once",
                operation="verify",
                path=parts[0].directory,
                hint=_HINT,
            )
        for hole in missing(Box.whole(array.shape), there.get(array.name, ())):
            yield CorruptError(
                f"{array.name} lacks the box of shape {list(hole.shape)} at {list(hole.offset)}: it is in no pack",
                operation="verify",
                path=parts[0].directory,
                hint=_HINT,
            )


def _zarr(source: Source, parts: Sequence[Part]) -> Iterator[CorruptError]:
    """The Zarr view, where there is one, must be what the parts say."""
    for name in (METADATA, REFERENCES):
        path = f"{parts[0].directory}/{name}"
        try:
            data = source.storage.read(path)
        except FileNotFoundError:
            continue  # tiers other than the shared one have none
        try:
            url = json.loads(data)["templates"]["u"] if name == REFERENCES else ""
            same = json.loads(data) == json.loads(zarr_metadata(parts, url=url)[name])
        except (ValueError, KeyError, TypeError):
            same = False
        if not same:
            yield CorruptError(
                f"{path} is not what the parts say",
                operation="verify",
                path=path,
                start=0,
                end=len(data),
                hint="restoring does not use it; only plain Zarr readers do",
            )
