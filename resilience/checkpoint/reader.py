"""Reading: requests of packs carried out in parallel, each strip verified and copied to where it belongs.

Owns the bounce buffers: a block is read past the page cache, summed while it is in the processor's, and copied out,
by each of a few threads. Must never land a byte before its CRC is found right, and never use more memory than its
buffers, however large the state.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from resilience.checkpoint import arrays as _arrays
from resilience.checkpoint.box import flat_boxes
from resilience.checkpoint.coverage import REQUEST, Request, Strip, Take, payload_box, payload_shape, requests
from resilience.checkpoint.landing import Landing
from resilience.checkpoint.pack import crc32c
from resilience.checkpoint.part import CRC_BLOCK, Part
from resilience.checkpoint.plan import CRC_BYTES
from resilience.checkpoint.source import HINT, Source
from resilience.errors import CorruptError
from storage_backends.base import Storage
from storage_backends.reading import RangeReader, buffer

_NEAR, _FAR = 64 << 10, 1 << 20  # bytes read along rather than asking again: of a local disk, of a server
_FAR_THREADS = 8  # a server answers many at once


@dataclass(frozen=True)
class Job:
    """What is taken from the packs of one part."""

    source: Source
    part: Part
    takes: Sequence[Take]

    def by_pack(self) -> Iterator[tuple[str, int, Sequence[Take]]]:
        """Name and size of each pack that something is taken from, and what, by ascending offset."""
        for number, (name, size) in enumerate(self.part.packs):
            takes = [take for take in self.takes if take.chunk.pack == number]
            if takes:
                yield name, size, takes


@dataclass
class Traffic:
    """What a restore has moved: bytes taken from storage, and bytes landed. ``begun``: something may have landed."""

    read: int = 0
    landed: int = 0
    begun: bool = False


@dataclass
class _Pack:
    """A pack being read, and how much of it is left: its file is open no longer than that takes."""

    reader: RangeReader
    name: str
    part: Part
    left: int


def read(jobs: Sequence[Job], landings: Mapping[str, Landing], *, threads: int, traffic: Traffic) -> None:
    """Read what the jobs take, verify it, and land it.

    Args:
        landings: by name of the array in the checkpoint.
        threads: that read, verify and copy at the same time; more where the storage is not local.
        traffic: is added to.

    Raises:
        CorruptError: a pack is missing, of another size, or damaged; names file and byte range. If
            ``traffic.begun``, some bytes may have landed by then.
        UnavailableError: the storage is away. Likewise.
    """
    local = all(job.source.storage.capabilities.local for job in jobs)
    gap = _NEAR if local else _FAR
    threads = threads if local else max(threads, _FAR_THREADS)
    files = [(job, *pack) for job in jobs for pack in job.by_pack()]
    with ThreadPoolExecutor(threads, thread_name_prefix="restore") as pool:
        readers = list(pool.map(lambda file: _whole_pack(file[0], file[1], file[2]), files))
        work: list[tuple[_Pack, Request]] = []
        for (job, name, _, takes), reader in zip(files, readers, strict=True):
            found = list(requests(takes, gap=gap))
            pack = _Pack(reader, name, job.part, len(found))
            work += [(pack, request) for request in found]
        traffic.begun = traffic.begun or bool(work)
        with ExitStack() as stack:
            for reader in readers:
                stack.callback(reader.close)
            _share(work, landings, pool, min(threads, len(work)))
    traffic.read += sum(reader.read_bytes for reader in readers)
    traffic.landed += sum(
        box.count * _arrays.numpy_dtype(take.array.dtype).itemsize
        for job in jobs
        for take in job.takes
        for _, box in take.boxes
    )


def _share(
    work: Sequence[tuple[_Pack, Request]],
    landings: Mapping[str, Landing],
    pool: ThreadPoolExecutor,
    threads: int,
) -> None:
    lock, left = threading.Lock(), iter(work)
    failed = threading.Event()

    def carry_out() -> None:
        memory = buffer(REQUEST + CRC_BYTES)
        try:
            while True:
                with lock:
                    item = None if failed.is_set() else next(left, None)
                if item is None:
                    return
                pack, request = item
                _carry_out(pack, request, landings, memory)
                with lock:
                    pack.left -= 1
                    if not pack.left:
                        pack.reader.close()
        except BaseException:
            failed.set()
            raise

    tasks = [pool.submit(carry_out) for _ in range(threads)]
    wait(tasks)  # also when one has failed: nobody may land anything any more when this returns
    for task in tasks:
        task.result()


def _whole_pack(job: Job, name: str, size: int) -> RangeReader:
    """A pack of the size that its part says."""
    pack, problem = open_pack(job.source.storage, job.part, name, size)
    if problem is not None:
        raise problem
    return pack


def open_pack(storage: Storage, part: Part, name: str, size: int) -> tuple[RangeReader, CorruptError | None]:
    """A pack, and what is wrong with its length, if anything is. ``CorruptError`` if it is missing."""
    try:
        pack = RangeReader(storage, name)
    except FileNotFoundError as error:
        raise _damaged(part, name, "is missing", 0, size) from error
    if pack.size == size:
        return pack, None
    problem = f"has {pack.size:,} bytes, not {size:,}"
    return pack, _damaged(part, name, problem, min(pack.size, size), max(pack.size, size))


def read_all(
    pack: RangeReader, part: Part, name: str, start: int, end: int, memory: memoryview
) -> memoryview:
    """Bytes ``start:end`` of a pack, all of them, or ``CorruptError``."""
    block = pack.read(start, end, memory)
    if len(block) != end - start:
        at = start + len(block)
        raise _damaged(part, name, f"ends at byte {at:,}: bytes up to {end:,} cannot be read", at, end)
    return block


def _carry_out(pack: _Pack, request: Request, landings: Mapping[str, Landing], memory: memoryview) -> None:
    part = pack.part
    block = read_all(pack.reader, part, pack.name, request.start, request.end, memory)
    for strip in request.strips:
        payload = block[strip.offset - request.start : strip.stop - request.start]
        check_strip(part, strip, payload)
    for strip in request.strips:
        at = strip.offset - request.start
        _land(strip, block[at : at + strip.end - strip.start], landings[strip.take.array.name])


def check_strip(part: Part, strip: Strip, payload: memoryview) -> None:
    """``CorruptError`` unless the bytes of ``strip`` have the CRCs that the part records; ``payload`` holds the CRC
    field too, where it follows the strip."""
    chunk = strip.take.chunk
    length = strip.end - strip.start
    right = crc32c(payload[:length], chunk.crc_at(strip.start)) == chunk.crc_at(strip.end)
    field = payload[length:]
    if right and (not field or int.from_bytes(field, "little") == chunk.crc32c):
        return
    start, end = chunk.offset + strip.start, chunk.offset + strip.end + len(field)
    if not right:
        for at in range(strip.start, strip.end, CRC_BLOCK):
            stop = min(at + CRC_BLOCK, strip.end)
            piece = payload[at - strip.start : stop - strip.start]
            if crc32c(piece, chunk.crc_at(at)) != chunk.crc_at(stop):
                start = chunk.offset + at
                end = chunk.offset + stop + (CRC_BYTES if stop == chunk.length else 0)
                break
    changed = "the CRC field after it has" if right else "its payload has"
    raise _damaged(
        part,
        part.pack_of(chunk),
        f"is damaged: the chunk of {strip.take.array.name} at bytes {chunk.offset:,} to "
        f"{chunk.offset + chunk.length:,} does not have the CRC32C that its part records ({changed} changed, in bytes "
        f"{start:,} to {end:,})",
        start,
        end,
    )


def _land(strip: Strip, payload: memoryview, target: Landing) -> None:
    take = strip.take
    carrier = _arrays.carrier(take.array.dtype)
    shape = payload_shape(take)
    elements = np.frombuffer(payload, carrier)
    first = strip.start // carrier.itemsize
    if elements.size == 0:
        return
    # A strip is a flat range of the payload: a few boxes, each contiguous in it, each cut with what is wanted.
    at = 0
    for piece in flat_boxes(shape, first, first + elements.size):
        source = elements[at : at + piece.count].reshape(piece.shape)
        at += piece.count
        for number, box in take.boxes:
            common = piece.meet(payload_box(take, box))
            if common is not None:
                offset = tuple(a + b for a, b in zip(common.offset, take.chunk.box_offset, strict=True))
                where: tuple[slice, ...] = common.slices(piece)
                target.put(number, type(box)(offset, common.shape), source[where] if where else source)


def _damaged(part: Part, name: str, problem: str, start: int, end: int) -> CorruptError:
    return CorruptError(
        f"pack {name} {problem}",
        operation="read pack",
        path=name,
        start=start,
        end=end,
        step=part.step,
        generation=part.generation,
        hint=HINT,
    )
