"""Verification: every byte of a checkpoint against what its parts and the commit log say of it.

Owns going on after the first problem: all damage is reported, each as a ``CorruptError`` with file and byte
range. Must never repair, delete or skip anything.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from resilience.checkpoint.box import Box, missing
from resilience.checkpoint.pack import check_chunk, check_size, read_range
from resilience.checkpoint.part import Part
from resilience.checkpoint.plan import CRC_BYTES
from resilience.checkpoint.restore import Source, check_together, load_part
from resilience.checkpoint.zarr_view import METADATA, REFERENCES, zarr_metadata
from resilience.errors import CorruptError

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
    done, total = 0, sum(part.size for _, part in parts)
    for source, part in parts:
        for read, problem in _pack(source, part):
            if problem is not None:
                yield problem
            done += read
            progress(VerifyProgress(done, total, part.pack_name))
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


def _pack(source: Source, part: Part) -> Iterator[tuple[int, CorruptError | None]]:
    """``(bytes read, problem)`` for each chunk and the zeros up to the next."""
    try:
        check_size(source.storage, part)
    except CorruptError as error:
        yield 0, error
    starts = [chunk.offset for chunk in part.chunks]
    if not part.chunks or starts[0] > 0:
        yield _zeros(source, part, 0, starts[0] if starts else part.size)
    for chunk, end in zip(part.chunks, [*starts[1:], part.size], strict=True):
        try:
            block = read_range(source.storage, part.pack_name, chunk.offset, end)
            check_chunk(part, block, 0, chunk.length, chunk.offset, chunk.crc32c)
        except CorruptError as error:
            yield end - chunk.offset, error
            continue
        used = chunk.length + CRC_BYTES
        yield end - chunk.offset, _dirty(part, block[used:], chunk.offset + used)


def _zeros(source: Source, part: Part, start: int, end: int) -> tuple[int, CorruptError | None]:
    try:
        block = read_range(source.storage, part.pack_name, start, end)
    except CorruptError as error:
        return end - start, error
    return end - start, _dirty(part, block, start)


def _dirty(part: Part, gap: bytes, start: int) -> CorruptError | None:
    """Bytes between chunks carry nothing and are written as zeros: others tell of a failing device."""
    if not gap.strip(b"\0"):
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
