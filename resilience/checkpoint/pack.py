"""Persisting: a sealed slot becomes a pack and a part in storage.

Owns the order pack durable -> part durable, and the CRC32C in the four bytes after every payload. The bytes
in memory, in the file and in the object are the same; chunks that have not changed since the save before are linked
instead. Must never write a part whose packs are not whole, nor touch a pack that a part already vouches for.
"""

from __future__ import annotations

import ctypes
import struct
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np

from resilience.checkpoint.follow import Sealed, Source
from resilience.checkpoint.increment import (
    Base,
    assemble,
    before,
    check_trained,
    comparable,
    link_of,
    offered,
)
from resilience.checkpoint.part import CRC_BLOCK, Part, PartChunk, pack_name, part_name, sha256
from resilience.checkpoint.plan import ALIGN
from resilience.errors import CorruptError, InvalidError, ResilienceError
from storage_backends.base import Sink, Storage

_WRITE = 4 << 20  # bytes gathered before a write, chunks permitting
_CRC = struct.Struct("<I")
_HINT = "restore an older checkpoint; `resilience verify` lists the damaged ones"
_memcmp = ctypes.CDLL(None).memcmp  # called without the interpreter's lock
_memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
Failpoint = Callable[[str], None]


@dataclass(frozen=True)
class PersistResult:
    """What the commit log needs to know of a rank's share.

    Attributes:
        part_name: object name of the part, relative to the storage root.
        sha256: of the part's bytes, hexadecimal.
        size: bytes of the pack: of what was written.
        seconds: it took.
        part: as it is in storage.
        base: what the rank's next save may be compared with; ``None`` of a copy.
    """

    part_name: str
    sha256: str
    size: int
    seconds: float
    part: Part
    base: Base | None = None


@dataclass(frozen=True)
class Earlier:
    """The rank's save before in the same storage.

    Attributes:
        base: what it left.
        view: its slot, while its snapshot is still in memory.
        whole: whether the slot still holds it: its rank may take it at any moment.
    """

    base: Base
    view: memoryview | None = None
    whole: Callable[[], bool] = lambda: False


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
    earlier: Earlier | None = None,
    trained: Collection[str] = (),
    failpoint: Failpoint = lambda _: None,
    clock: Callable[[], float] = time.perf_counter,
) -> PersistResult:
    """Make a slot durable: the pack, then the part. May run again after any failure.

    Args:
        view: the slot; its CRC fields are filled in, nothing else is changed.
        part: the draft that belongs to it.
        directory: of the checkpoint, from ``part.directory()``.
        source: says how far the slot may be read, where it is not sealed yet. Nothing is published before it is.
        earlier: the rank's save before: what has not changed since is linked, not written again.
        trained: names above the arrays that have been trained since the save before.
        failpoint: called with ``pack.chunk`` after each chunk, ``pack.done``, ``part.done``.

    Raises:
        InvalidError: the part exists already with other contents: this step was saved before, differently.
        CorruptError: the snapshot is stale: none of ``trained`` has changed since ``earlier``. Nothing is visible.
        UnavailableError, ExhaustedError: of the storage. No part is visible then, or it is whole.
        Torn: of ``source``. Nothing is visible.
    """
    begun = clock()
    name = part_name(directory, part.rank)
    try:
        there = storage.read(name)
    except FileNotFoundError:
        older = _Older(earlier, part, storage, directory)
        base = _stream(view, part, storage, directory, source, older, trained, failpoint)
        data = base.part.encode()
        failpoint("pack.done")
        _create(storage, name, data)
    else:
        # Saved before: by this writer's predecessor, which died before it could tell, or by a mistake.
        source.sealed()
        mine = assemble(part, [_checksum(view, chunk, source) for chunk in part.chunks])
        base, data = Base(part, Part.decode(there, path=name)), there
        if _contents(base.part) != _contents(mine):
            raise taken(name)
    failpoint("part.done")
    return PersistResult(name, sha256(data), base.part.size, clock() - begun, base.part, base)


def _stream(
    view: memoryview,
    part: Part,
    storage: Storage,
    directory: str,
    source: Source,
    older: _Older,
    trained: Collection[str],
    failpoint: Failpoint,
) -> Base:
    """Write the pack, computing CRCs on the way. Durable when it returns."""
    sums: list[tuple[int, bytes]] = []
    kept, same = set(), set()
    with storage.sink(pack_name(directory, part.rank), max(part.size - older.expected(), ALIGN)) as sink:
        gather = _Gather(view, sink)
        for number, (start, end) in enumerate(_pieces(part)):
            if part.chunks:
                # What may be left out is looked at as a whole before any of it is written.
                likely = older.offers(number)
                sums.append(_checksum(view, part.chunks[number], source, _ignore if likely else gather.upto))
                if older.unchanged(number, sums[-1]):
                    same.add(number)
                    if likely and older.take(view, number):
                        kept.add(number)
                        gather.skip(start, end)
            source.until(end)
            gather.upto(end)
            failpoint("pack.chunk")
        gather.finish()
        source.sealed()
        if older.base is not None:
            check_trained(older.base, part, same, trained)
    return Base(part, assemble(part, sums, kept, older.base), frozenset(same))


def _ignore(end: int) -> None:
    return None


class _Gather:
    """Hands the slot to the sink in few pieces: many small chunks in one; of a large one, what is summed is on its
    way while the rest is."""

    def __init__(self, view: memoryview, sink: Sink) -> None:
        self._view, self._sink = view, sink
        self._from = self._to = 0  # summed and not handed over
        self._any = False

    def upto(self, end: int) -> None:
        self._to = max(end, self._from)
        if self._to - self._from >= _WRITE:
            self._hand_over()

    def skip(self, start: int, end: int) -> None:
        self._to = start
        self._hand_over()
        self._from = self._to = end

    def finish(self) -> None:
        self._hand_over()
        if not self._any:
            self._sink.write(bytes(ALIGN))  # a pack is never empty

    def _hand_over(self) -> None:
        if self._to > self._from:
            self._sink.write(self._view[self._from : self._to])
            self._any = True
        self._from = self._to


class _Older:
    """What of the save before can be named again. Without one: nothing."""

    def __init__(self, earlier: Earlier | None, draft: Part, storage: Storage, directory: str) -> None:
        usable = earlier is not None and comparable(earlier.base, draft)
        self._earlier = earlier if usable else None
        self.base = earlier.base if earlier is not None and usable else None
        self._storage, self._directory = storage, directory
        self._draft = draft
        self._chunks = [] if self.base is None else before(self.base)
        self._view = earlier.view if earlier is not None else None
        # Without the bytes to compare with nothing can be left out; what has changed can still be told.
        self._packs = frozenset() if self.base is None or self._view is None else offered(self.base)
        self._links: dict[int, bool] = {}  # packs that were asked for: whether they have their new name

    def expected(self) -> int:
        """Bytes that will not have to be written, as far as can be known."""
        same = () if self.base is None else self.base.same
        return sum(self._chunks[number].length for number in same if self.offers(number))

    def offers(self, number: int) -> bool:
        return bool(self._chunks) and self._chunks[number].pack in self._packs

    def unchanged(self, number: int, summed: tuple[int, bytes]) -> bool:
        """Whether the checksums say so. They are no proof."""
        return bool(self._chunks) and (self._chunks[number].crc32c, self._chunks[number].running) == summed

    def take(self, view: memoryview, number: int) -> bool:
        """Have the chunk's bytes, seen to be the same, under the new checkpoint's name. False: write them."""
        assert self._earlier is not None and self._view is not None
        chunk = self._draft.chunks[number]
        end = chunk.offset + chunk.length
        if not _equal(view[chunk.offset : end], self._view[chunk.offset : end]):
            return False
        pack = self._chunks[number].pack
        # Asked last: had the rank taken the slot in the middle of the comparison, it would have proved nothing.
        return self._earlier.whole() and self._link(pack)

    def _link(self, pack: int) -> bool:
        if pack not in self._links:
            assert self.base is not None
            name = self.base.part.packs[pack][0]
            target = f"{self._directory}/{link_of(self.base, pack).name}"
            try:
                self._links[pack] = self._storage.link(name, target)
            except (ResilienceError, FileNotFoundError):
                self._links[pack] = (
                    False  # it was removed meanwhile, or the store stumbles: the bytes are here
                )
        return self._links[pack]


def _equal(one: memoryview, other: memoryview) -> bool:
    pointers = [np.frombuffer(view, np.uint8).__array_interface__["data"][0] for view in (one, other)]
    return bool(_memcmp(*pointers, len(one)) == 0)


def _contents(part: Part) -> Any:
    """What a part says, whichever files hold it."""
    chunks = sorted((c.array, c.box_offset, c.box_shape, c.length, c.crc32c, c.running) for c in part.chunks)
    return (part.run, part.step, part.generation, part.plan_hash, part.arrays, part.state, chunks)


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


def _pieces(part: Part) -> Iterator[tuple[int, int]]:
    """Byte ranges that make up the pack: each chunk with all up to the next, or the page of an empty one."""
    starts = [0, *(chunk.offset for chunk in part.chunks[1:])]
    yield from zip(starts, [*starts[1:], part.size], strict=True)


def _create(storage: Storage, name: str, data: bytes) -> None:
    if storage.create(name, data) is not None:
        raise taken(name)


def taken(name: str) -> InvalidError:
    """The error of a part that exists already, and is another."""
    return InvalidError(
        f"{name} exists with other contents: this step was saved before in this generation",
        operation="persist",
        path=name,
        hint="save a step once per generation; the pack that is there was left alone",
    )
