"""Persisting: a sealed slot becomes a pack and a part in storage; a pack is copied from tier to tier.

Owns the order pack durable -> part durable, and the CRC32C in the four bytes after every payload. The bytes
in memory, in the file and in the object are the same. Must never write a part whose pack is not whole, nor
touch a pack that a part already vouches for.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import google_crc32c
import numpy as np

from resilience.checkpoint.follow import Sealed, Source
from resilience.checkpoint.part import CRC_BLOCK, Part, PartChunk, pack_name, part_name, sha256
from resilience.checkpoint.plan import CRC_BYTES
from resilience.errors import CorruptError, InvalidError
from storage_backends.base import Storage

_WRITE = 4 << 20  # bytes gathered before a write, chunks permitting
_READ = 64 << 20  # bytes asked for at once when copying, chunks permitting
_CRC = struct.Struct("<I")
_HINT = "restore an older checkpoint; `resilience verify` lists the damaged ones"
Failpoint = Callable[[str], None]


@dataclass(frozen=True)
class PersistResult:
    """What the commit log needs to know of a rank's share.

    Attributes:
        part_name: object name of the part, relative to the storage root.
        sha256: of the part's bytes, hexadecimal.
        size: bytes of the pack.
        seconds: it took.
    """

    part_name: str
    sha256: str
    size: int
    seconds: float


def crc32c(data: bytes | memoryview, before: int = 0) -> int:
    """CRC32C (Castagnoli), as the Zarr ``crc32c`` codec computes it; of what has the CRC ``before``, then ``data``."""
    # The C function refuses memoryviews, and takes NumPy arrays over the same memory.
    return int(google_crc32c.extend(before, np.frombuffer(data, np.uint8) if len(data) else b""))


def persist(
    view: memoryview,
    part: Part,
    storage: Storage,
    directory: str,
    *,
    source: Source = Sealed(),  # noqa: B008 - it has no state
    failpoint: Failpoint = lambda _: None,
    clock: Callable[[], float] = time.perf_counter,
) -> PersistResult:
    """Make a slot durable: the pack, then the part. May run again after any failure.

    Args:
        view: the slot; its CRC fields are filled in, nothing else is changed.
        part: the draft that belongs to it.
        directory: of the checkpoint, from ``part.directory()``.
        source: says how far the slot may be read, where it is not sealed yet. Nothing is published before it is.
        failpoint: called with ``pack.chunk`` after each chunk, ``pack.done``, ``part.done``.

    Raises:
        InvalidError: the part exists already with other contents: this step was saved before, differently.
        UnavailableError, ExhaustedError: of the storage. No part is visible then, or it is whole.
        Torn: of ``source``. Nothing is visible.
    """
    begun = clock()
    name = part_name(directory, part.rank)
    try:
        there = storage.read(name)
    except FileNotFoundError:
        data = _stream(view, part, storage, directory, source, failpoint)
        failpoint("pack.done")
        _create(storage, name, data)
    else:
        # Saved before: by this writer's predecessor, which died before it could tell, or by a mistake.
        source.sealed()
        data = _with_crcs(part, [_checksum(view, chunk, source) for chunk in part.chunks]).encode()
        if there != data:
            raise _taken(name)
    failpoint("part.done")
    return PersistResult(name, sha256(data), part.size, clock() - begun)


def _stream(
    view: memoryview, part: Part, storage: Storage, directory: str, source: Source, failpoint: Failpoint
) -> bytes:
    """Write the pack, computing CRCs on the way; returns the part's bytes. Durable when it returns."""
    crcs = []
    with storage.sink(pack_name(directory, part.rank), part.size) as sink:
        written = 0

        def hand_over(end: int) -> None:
            """Many small chunks in one write; of a large one, what is summed is on its way while the rest is."""
            nonlocal written
            if end - written >= _WRITE or end == part.size:
                sink.write(view[written:end])
                written = end

        for number, (_, end) in enumerate(_pieces(part)):
            if part.chunks:
                crcs.append(_checksum(view, part.chunks[number], source, hand_over))
            source.until(end)
            hand_over(end)
            failpoint("pack.chunk")
        source.sealed()
    return _with_crcs(part, crcs).encode()


def _with_crcs(part: Part, sums: Sequence[tuple[int, bytes]]) -> Part:
    return part.with_crcs([crc for crc, _ in sums], [running for _, running in sums])


def _checksum(
    view: memoryview, chunk: PartChunk, source: Source, summed: Callable[[int], None] = lambda end: None
) -> tuple[int, bytes]:
    """The CRC32C of a chunk's payload, also written into the four bytes after it, and the running CRCs before.
    ``summed`` is told of every block that is done."""
    end = chunk.offset + chunk.length
    crc, running = 0, []
    # The C function does not let go of the interpreter: in blocks, so that the threads that write get it too.
    for start in range(chunk.offset, end, _WRITE):
        stop = min(start + _WRITE, end)
        source.until(stop)
        for block in range(start, stop, CRC_BLOCK):
            crc = crc32c(view[block : min(block + CRC_BLOCK, stop)], crc)
            running.append(crc)
        if stop < end:
            summed(stop)
    _CRC.pack_into(view, end, crc)
    return crc, struct.pack(f"<{max(len(running), 1) - 1}I", *running[:-1])


def copy(
    source: Storage,
    target: Storage,
    directory: str,
    rank: int,
    *,
    pace: Callable[[int], None] = lambda count: None,
    failpoint: Failpoint = lambda _: None,
    clock: Callable[[], float] = time.perf_counter,
) -> PersistResult:
    """Copy a rank's pack and part to another tier, verifying every chunk on the way.

    ``pace`` is called with the length of each piece, and may take its time (see ``pace``); ``failpoint`` with
    ``drain.chunk`` after each piece and ``drain.done``.

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
        with target.sink(part.pack_name, part.size) as sink:
            for _, block in read_checked(source, part):
                sink.write(block)
                pace(len(block))
                failpoint("drain.chunk")
        _create(target, name, data)
    failpoint("drain.done")
    return PersistResult(name, sha256(data), part.size, clock() - begun)


def read_checked(storage: Storage, part: Part) -> Iterator[tuple[int, bytes]]:
    """The bytes of a pack in order, as ``(offset, block)``, each chunk verified before its block is yielded.

    Raises:
        CorruptError: missing or truncated pack, or a chunk whose CRC32C is wrong.
    """
    check_size(storage, part)
    pieces = list(_pieces(part))
    chunks = iter(part.chunks)
    while pieces:
        start, end = pieces.pop(0)
        count = 1
        while pieces and pieces[0][1] - start <= _READ:
            end = pieces.pop(0)[1]
            count += 1
        block = read_range(storage, part.pack_name, start, end)
        for chunk in (next(chunks) for _ in range(count if part.chunks else 0)):
            check_chunk(part, block, chunk.offset - start, chunk.length, chunk.offset, chunk.crc32c)
        yield start, block


def check_size(storage: Storage, part: Part) -> None:
    """``CorruptError`` unless the pack is there and as long as its part says."""
    try:
        size = storage.size(part.pack_name)
    except FileNotFoundError as error:
        raise CorruptError(
            f"pack {part.pack_name} is missing",
            operation="read pack",
            path=part.pack_name,
            start=0,
            end=part.size,
            step=part.step,
            generation=part.generation,
            hint=_HINT,
        ) from error
    if size != part.size:
        raise CorruptError(
            f"pack {part.pack_name} has {size:,} bytes, not {part.size:,}",
            operation="read pack",
            path=part.pack_name,
            start=min(size, part.size),
            end=max(size, part.size),
            step=part.step,
            generation=part.generation,
            hint=_HINT,
        )


def read_range(storage: Storage, name: str, start: int, end: int) -> bytes:
    """Bytes ``start:end``, all of them, or ``CorruptError``."""
    try:
        block = storage.read(name, start, end)
    except FileNotFoundError:
        block = b""
    if len(block) != end - start:
        raise CorruptError(
            f"{name} ends at byte {start + len(block):,}: bytes {start:,} to {end:,} cannot be read",
            operation="read pack",
            path=name,
            start=start + len(block),
            end=end,
            hint=_HINT,
        )
    return block


def check_chunk(part: Part, block: bytes | memoryview, at: int, length: int, offset: int, crc: int) -> None:
    """Verify the payload at ``at`` in ``block`` and the CRC field after it against the part.

    ``offset`` is where the payload lies in the pack.
    """
    payload = memoryview(block)[at : at + length]
    found = crc32c(payload)
    (stored,) = _CRC.unpack_from(block, at + length)
    if found == crc == stored:
        return
    damaged = "its payload" if found != crc else "the CRC field after it"
    raise CorruptError(
        f"pack {part.pack_name} is damaged: the chunk at bytes {offset:,} to {offset + length:,} does not "
        f"have the CRC32C {crc:08x} that its part records ({damaged} has changed)",
        operation="read pack",
        path=part.pack_name,
        start=offset,
        end=offset + length + CRC_BYTES,
        step=part.step,
        generation=part.generation,
        hint=_HINT,
    )


def _pieces(part: Part) -> Iterator[tuple[int, int]]:
    """Byte ranges that make up the pack: each chunk with all up to the next, or the page of an empty one."""
    starts = [0, *(chunk.offset for chunk in part.chunks[1:])]
    yield from zip(starts, [*starts[1:], part.size], strict=True)


def _holds(storage: Storage, name: str, data: bytes) -> bool:
    """Whether this very part is there: then so is its pack, and there is nothing left to do."""
    try:
        found = storage.read(name)
    except FileNotFoundError:
        return False
    if found != data:
        raise _taken(name)
    return True


def _create(storage: Storage, name: str, data: bytes) -> None:
    if storage.create(name, data) is not None:
        raise _taken(name)


def _taken(name: str) -> InvalidError:
    return InvalidError(
        f"{name} exists with other contents: this step was saved before in this generation",
        operation="persist",
        path=name,
        hint="save a step once per generation; the pack that is there was left alone",
    )
