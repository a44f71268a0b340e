"""Opening a checkpoint with Zarr: a read-only store over packs that verifies what it hands out.

Owns the Zarr ``Store``. Arrays whose pieces keep to no grid get one here, and their chunks are put together as they
are asked for. Unlike plain Zarr it raises on a chunk that is missing (Zarr would return zeros). Must never write, and
never return bytes whose CRC32C it has not checked.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

import zarr
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype

from resilience.checkpoint import dtypes as _dtypes
from resilience.checkpoint.catalog import HINT, Entry, cell_count
from resilience.checkpoint.packs import Packs, find_packs
from resilience.checkpoint.part import Part
from resilience.checkpoint.plan import CRC_BYTES
from resilience.checkpoint.zarr_view import about, chunk_keys, chunk_places, metadata_documents
from resilience.errors import CorruptError
from storage_backends.base import Storage

assert _dtypes  # its import registers bfloat16 and float8

_CHUNK_KEY = re.compile(r"(.+)/c((?:/\d+)*)")


def open_checkpoint(url: str, step: int | None = None) -> zarr.Group:
    """Open a checkpoint for reading.

    Args:
        url: of a run (``<storage>/<run>``; its commit log says which checkpoints exist) or of one checkpoint's
            directory (``.../checkpoints/step-40-g1``, wherever it was copied to).
        step: of a run, the step wanted; ``None`` is the newest committed checkpoint of the shared tier.

    Returns:
        The group of all arrays, however they were sharded: by their names, those of one rank below ``rank-<r>``.

    Raises:
        InvalidError: there is no such checkpoint.
        CorruptError: it is not whole. Damaged chunks are found when they are read.
    """
    return zarr.open_group(PackStore.over(find_packs(url, step)), mode="r")


class PackStore(Store):
    """A read-only Zarr store over the packs of one checkpoint.

    Args:
        parts: all parts of it.
        packs: for each part, the storage and the object name of its pack.
    """

    def __init__(self, parts: Sequence[Part], packs: Sequence[tuple[Storage, str]]) -> None:
        super().__init__(read_only=True)
        self._begin(Packs(parts, packs))

    def _begin(self, packs: Packs) -> None:
        self._packs = packs
        self._documents = metadata_documents(packs.entries, about(packs.first))
        self._places = dict(chunk_places(packs.entries))

    @classmethod
    def over(cls, packs: Packs) -> PackStore:
        """The store over packs that are open already."""
        store = cls.__new__(cls)
        Store.__init__(store, read_only=True)
        store._begin(packs)
        return store

    def __eq__(self, value: object) -> bool:
        return isinstance(value, PackStore) and (self._packs.parts, self._urls()) == (
            value._packs.parts,
            value._urls(),
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        part = self._packs.first
        return f"PackStore({part.run!r}, step={part.step}, generation={part.generation})"

    def with_read_only(self, read_only: bool = False) -> PackStore:
        if not read_only:
            raise ValueError("checkpoints are read-only")
        return PackStore.over(self._packs)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        data: bytes | bytearray | None = self._documents.get(key)
        if data is None:
            if not await self.exists(key):
                self._refuse_hole(key)
                return None
            data = await asyncio.to_thread(self._read, key)
        return prototype.buffer.from_bytes(_cut(data, byte_range))

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return list(await asyncio.gather(*(self.get(key, prototype, wanted) for key, wanted in key_ranges)))

    async def exists(self, key: str) -> bool:
        return key in self._documents or key in self._places or self._virtual(key) is not None

    async def getsize(self, key: str) -> int:
        if key in self._documents:
            return len(self._documents[key])
        if key in self._places:
            return self._places[key].length + CRC_BYTES
        virtual = self._virtual(key)
        if virtual is not None:
            return math.prod(virtual[0].view_grid) * virtual[0].itemsize + CRC_BYTES
        raise FileNotFoundError(key)

    async def list(self) -> AsyncIterator[str]:
        for key in (*self._documents, *self._places):
            yield key
        for name, entry in self._packs.entries.items():
            if entry.grid is None:
                for key in chunk_keys(name, entry):
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
        return {rank: f"{storage.url}/{name}" for rank, (storage, name) in self._packs.packs.items()}

    def _virtual(self, key: str) -> tuple[Entry, tuple[int, ...]] | None:
        """The array and the index of a chunk that is put together when it is asked for."""
        match = _CHUNK_KEY.fullmatch(key)
        entry = self._packs.entries.get(match[1]) if match else None
        if match is None or entry is None or entry.grid is not None:
            return None
        index = tuple(map(int, match[2].split("/")[1:]))
        if len(index) != len(entry.shape) or not cell_count(entry.shape, entry.view_grid):
            return None
        inside = all(i * g < n for i, g, n in zip(index, entry.view_grid, entry.shape, strict=True))
        return (entry, index) if inside else None

    def _read(self, key: str) -> bytes | bytearray:
        """A chunk with its CRC, as Zarr's ``crc32c`` codec wants it."""
        if key in self._places:
            return self._packs.block(self._places[key])
        virtual = self._virtual(key)
        assert virtual is not None
        return self._packs.cell(*virtual)

    def _refuse_hole(self, key: str) -> None:
        """Zarr takes "no such key" for "all zeros"; for a chunk of an array that is damage."""
        match = _CHUNK_KEY.fullmatch(key)
        if match and f"{match[1]}/zarr.json" in self._documents:
            raise CorruptError(
                f"chunk {key} is in no pack of this checkpoint",
                operation="read chunk",
                path=key,
                hint=HINT,
            )


def _cut(data: bytes | bytearray, wanted: Any) -> bytes | bytearray:
    match wanted:
        case RangeByteRequest():
            return data[wanted.start : wanted.end]
        case OffsetByteRequest():
            return data[wanted.offset :]
        case SuffixByteRequest():
            return data[max(len(data) - wanted.suffix, 0) :]
        case _:
            return data
