"""Opening a checkpoint with Zarr: a read-only store over packs that verifies what it hands out.

Owns the Zarr ``Store`` and finding the checkpoint behind a URL. Unlike plain Zarr it raises on a chunk that
is missing (Zarr would return zeros). Must never write, and never return bytes whose CRC32C it has not
checked.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

import zarr
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype

from resilience.checkpoint import dtypes as _dtypes
from resilience.checkpoint.pack import check_chunk, read_range
from resilience.checkpoint.part import Part
from resilience.checkpoint.plan import CRC_BYTES
from resilience.checkpoint.restore import Source, check_together, load_part
from resilience.checkpoint.zarr_view import Place, chunk_places, metadata_documents
from resilience.errors import CorruptError, InvalidError
from storage_backends import open_storage
from storage_backends.base import Storage

assert _dtypes  # its import registers bfloat16 and float8

_CHUNK_KEY = re.compile(r"(.+)/c(/\d+)*")
_PART = re.compile(r"(?:.*/)?rank-(\d+)\.json")


def open_checkpoint(url: str, step: int | None = None) -> zarr.Group:
    """Open a checkpoint for reading.

    Args:
        url: of a run (``<storage>/<run>``; its commit log says which checkpoints exist) or of one
        checkpoint's
            directory (``.../checkpoints/step-40-g1``, wherever it was copied to).
        step: of a run, the step wanted; ``None`` is the newest committed checkpoint of the shared tier.

    Returns:
        The group of all arrays: replicated ones by their names, those of one rank below ``rank-<r>``.

    Raises:
        InvalidError: there is no such checkpoint.
        CorruptError: it is not whole. Damaged chunks are found when they are read.
    """
    storage = open_storage(url)
    if storage.list("log"):
        store = _of_run(storage, url, step)
    else:
        store = _of_directory(storage, url, step)
    return zarr.open_group(store, mode="r")


def _of_run(storage: Storage, url: str, step: int | None) -> PackStore:
    # The journal is a room of its own, and reading a copied checkpoint needs none.
    from resilience.journal.log import CommitLog
    from resilience.journal.state import fold

    state = fold(CommitLog(storage, new_id=lambda: "read-only").refresh())
    usable = [
        checkpoint
        for checkpoint in state.checkpoints
        if "shared" in checkpoint.tiers
        and (checkpoint.step, checkpoint.generation, "shared") not in state.quarantined
    ]
    for checkpoint in usable:
        if step is None or checkpoint.step == step:
            references = checkpoint.tiers["shared"].parts
            sources = [Source(part.rank, storage, part.name, part.sha256) for part in references]
            parts = [load_part(source) for source in sources]
            check_together(parts, step=checkpoint.step, generation=checkpoint.generation)
            return PackStore(parts, [(storage, part.pack_name) for part in parts])
    have = ", ".join(str(checkpoint.step) for checkpoint in usable) or "none"
    raise InvalidError(
        f"{url} has no committed checkpoint{'' if step is None else f' of step {step}'} in shared storage",
        operation="open_checkpoint",
        path=url,
        step=step,
        hint=f"steps there are: {have}",
    )


def _of_directory(storage: Storage, url: str, step: int | None) -> PackStore:
    """Without a log only the parts themselves can say whether they are complete."""
    names = [name for name in storage.list() if _PART.fullmatch(name)]
    if not names:
        raise InvalidError(
            f"{url} holds neither a run's commit log nor a checkpoint's parts",
            operation="open_checkpoint",
            path=url,
            hint="give the URL of a run (<storage>/<run>) or of a checkpoint's directory",
        )
    parts = [Part.decode(storage.read(name), path=name) for name in names]
    check_together(parts, step=step)
    return PackStore(parts, [(storage, f"rank-{part.rank}.pack") for part in parts])


class PackStore(Store):
    """A read-only Zarr store over the packs of one checkpoint.

    Args:
        parts: all parts of it.
        packs: for each part, the storage and the object name of its pack.
    """

    def __init__(self, parts: Sequence[Part], packs: Sequence[tuple[Storage, str]]) -> None:
        super().__init__(read_only=True)
        self._parts = {part.rank: part for part in parts}
        self._packs = {part.rank: pack for part, pack in zip(parts, packs, strict=True)}
        self._documents = metadata_documents(parts)
        self._places = chunk_places(parts)

    def __eq__(self, value: object) -> bool:
        return isinstance(value, PackStore) and (self._documents, self._places, self._urls()) == (
            value._documents,
            value._places,
            value._urls(),
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        part = next(iter(self._parts.values()))
        return f"PackStore({part.run!r}, step={part.step}, generation={part.generation})"

    def with_read_only(self, read_only: bool = False) -> PackStore:
        if not read_only:
            raise ValueError("checkpoints are read-only")
        parts = list(self._parts.values())
        return PackStore(parts, [self._packs[part.rank] for part in parts])

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        data = self._documents.get(key)
        if data is None:
            place = self._places.get(key)
            if place is None:
                self._refuse_hole(key)
                return None
            data = await asyncio.to_thread(self._read, place)
        return prototype.buffer.from_bytes(_cut(data, byte_range))

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return list(await asyncio.gather(*(self.get(key, prototype, wanted) for key, wanted in key_ranges)))

    async def exists(self, key: str) -> bool:
        return key in self._documents or key in self._places

    async def getsize(self, key: str) -> int:
        if key in self._documents:
            return len(self._documents[key])
        if key in self._places:
            return self._places[key].length + CRC_BYTES
        raise FileNotFoundError(key)

    async def list(self) -> AsyncIterator[str]:
        for key in (*self._documents, *self._places):
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        async for key in self.list():
            if key.startswith(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        start = f"{prefix.rstrip('/')}/" if prefix else ""
        seen = set()
        async for key in self.list_prefix(start):
            child = key[len(start) :].partition("/")[0]
            if child not in seen:
                seen.add(child)
                yield child

    async def set(self, key: str, value: Buffer) -> None:
        self._check_writable()

    async def delete(self, key: str) -> None:
        self._check_writable()

    @property
    def supports_writes(self) -> bool:
        return False

    @property
    def supports_deletes(self) -> bool:
        return False

    @property
    def supports_listing(self) -> bool:
        return True

    def _urls(self) -> dict[int, str]:
        return {rank: f"{storage.url}/{name}" for rank, (storage, name) in self._packs.items()}

    def _read(self, place: Place) -> bytes:
        """A chunk with its CRC, as Zarr's ``crc32c`` codec wants it."""
        storage, name = self._packs[place.rank]
        block = read_range(storage, name, place.offset, place.offset + place.length + CRC_BYTES)
        check_chunk(self._parts[place.rank], block, 0, place.length, place.offset, place.crc32c)
        return block

    def _refuse_hole(self, key: str) -> None:
        """Zarr takes "no such key" for "all zeros"; for a chunk of an array that is damage."""
        match = _CHUNK_KEY.fullmatch(key)
        if match and f"{match[1]}/zarr.json" in self._documents:
            raise CorruptError(
                f"chunk {key} is in no pack of this checkpoint",
                operation="read chunk",
                path=key,
                hint="open an older checkpoint; `resilience verify` lists the damaged ones",
            )


def _cut(data: bytes, wanted: Any) -> bytes:
    match wanted:
        case RangeByteRequest():
            return data[wanted.start : wanted.end]
        case OffsetByteRequest():
            return data[wanted.offset :]
        case SuffixByteRequest():
            return data[max(len(data) - wanted.suffix, 0) :]
        case _:
            return data
