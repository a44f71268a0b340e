"""Draining: a pack and its part are copied from a nearer tier to a colder one, every chunk checked on the way.

Owns the order pack durable -> part durable in the colder tier. What the part has in older packs is linked there too,
where that tier holds them. Must never make a part visible whose packs are not whole there.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator

from resilience.checkpoint.pack import PersistResult, crc32c, read_range, taken
from resilience.checkpoint.part import Link, Part, PartChunk, part_name, sha256
from resilience.checkpoint.plan import ALIGN, CRC_BYTES
from resilience.errors import CorruptError, ResilienceError
from storage_backends.base import Storage

_READ = 64 << 20  # bytes asked for at once, chunks permitting
_CRC = struct.Struct("<I")
_HINT = "restore an older checkpoint; `resilience verify` lists the damaged ones"


def copy(
    source: Storage,
    target: Storage,
    directory: str,
    rank: int,
    *,
    earlier: Part | None = None,
    pace: Callable[[int], None] = lambda count: None,
    failpoint: Callable[[str], None] = lambda _: None,
    clock: Callable[[], float] = time.perf_counter,
) -> PersistResult:
    """Copy a rank's pack and part to another tier.

    Args:
        earlier: the rank's part that was copied before this one: the target holds its packs.
        pace: called with the length of each piece, and may take its time (see ``pace``).
        failpoint: called with ``drain.chunk`` after each piece and ``drain.done``.

    Raises:
        CorruptError: the source is damaged; names file and byte range. Nothing is visible in the target.
        FileNotFoundError: the source has no such part (any more).
    """
    begun = clock()
    name = part_name(directory, rank)
    data = source.read(name)
    part = Part.decode(data, path=name)
    if part.name != name:
        raise CorruptError(
            f"part {name} says it is {part.name}",
            operation="drain",
            path=name,
            start=0,
            end=len(data),
            hint=_HINT,
        )
    if not _holds(target, name, data):
        for number, (pack, size) in enumerate(part.packs):
            if number and _linked(target, part, part.links[number - 1], earlier):
                continue
            with target.sink(pack, size) as sink:
                for _, block in read_checked(source, part, number):
                    sink.write(block)
                    pace(len(block))
                    failpoint("drain.chunk")
        if target.create(name, data) is not None:
            raise taken(name)
    failpoint("drain.done")
    return PersistResult(name, sha256(data), part.size, clock() - begun, part)


def read_checked(storage: Storage, part: Part, number: int = 0) -> Iterator[tuple[int, bytes]]:
    """The bytes of a pack in order, as ``(offset, block)``, each chunk of the part verified before its block is
    yielded.

    Args:
        number: which of ``part.packs``.

    Raises:
        CorruptError: missing or truncated pack, or a chunk whose CRC32C is wrong.
    """
    name, size = part.packs[number]
    _check_size(storage, part, name, size)
    for start, end, chunks in _blocks(part, number, size):
        block = read_range(storage, name, start, end)
        for chunk in chunks:
            _check_chunk(part, block, chunk, chunk.offset - start)
        yield start, block


def _blocks(part: Part, number: int, size: int) -> Iterator[tuple[int, int, list[PartChunk]]]:
    """Ranges that make up the pack, with the chunks that lie in each."""
    start = end = 0
    held: list[PartChunk] = []
    for chunk in (chunk for chunk in part.chunks if chunk.pack == number):
        stop = chunk.offset + chunk.length + CRC_BYTES
        if held and stop - start > _READ:
            yield start, end, held
            start, held = end, []
        while chunk.offset - start > _READ:  # bytes of chunks that this part has elsewhere by now
            yield start, start + _READ, []
            start += _READ
        held.append(chunk)
        end = stop
    if held:
        if size - end < ALIGN:
            end = size
        yield start, end, held
        start = end
    while start < size:
        yield start, min(start + _READ, size), []
        start += _READ


def _linked(target: Storage, part: Part, link: Link, earlier: Part | None) -> bool:
    """Whether the target has the older pack, under its new name now."""
    names = [link.origin, *([f"{earlier.directory}/{link.name}"] if earlier is not None else [])]
    for name in names:
        try:
            if target.size(name) == link.size and target.link(name, f"{part.directory}/{link.name}"):
                return True
        except (ResilienceError, FileNotFoundError):
            continue  # not there (any more), or the store stumbles: the bytes go over
    return False


def _check_size(storage: Storage, part: Part, name: str, expected: int) -> None:
    """``CorruptError`` unless the pack is there and as long as its part says."""
    try:
        size = storage.size(name)
    except FileNotFoundError as error:
        raise _corrupt(part, name, f"pack {name} is missing", 0, expected) from error
    if size != expected:
        problem = f"pack {name} has {size:,} bytes, not {expected:,}"
        raise _corrupt(part, name, problem, min(size, expected), max(size, expected))


def _check_chunk(part: Part, block: bytes, chunk: PartChunk, at: int) -> None:
    """Verify the payload at ``at`` in ``block``, and the CRC field after it, against the part."""
    found = crc32c(memoryview(block)[at : at + chunk.length])
    (stored,) = _CRC.unpack_from(block, at + chunk.length)
    if found == chunk.crc32c == stored:
        return
    damaged = "its payload" if found != chunk.crc32c else "the CRC field after it"
    end = chunk.offset + chunk.length
    raise _corrupt(
        part,
        part.pack_of(chunk),
        f"pack {part.pack_of(chunk)} is damaged: the chunk at bytes {chunk.offset:,} to {end:,} does not "
        f"have the CRC32C {chunk.crc32c:08x} that its part records ({damaged} has changed)",
        chunk.offset,
        end + CRC_BYTES,
    )


def _corrupt(part: Part, name: str, problem: str, start: int, end: int) -> CorruptError:
    return CorruptError(
        problem,
        operation="read pack",
        path=name,
        start=start,
        end=end,
        step=part.step,
        generation=part.generation,
        hint=_HINT,
    )


def _holds(storage: Storage, name: str, data: bytes) -> bool:
    """Whether this very part is there: then so is its pack, and there is nothing left to do."""
    try:
        found = storage.read(name)
    except FileNotFoundError:
        return False
    if found != data:
        raise taken(name)
    return True
