"""The packs of one checkpoint, opened for reading anything in it: every byte verified, whoever asks.

Owns finding a checkpoint behind a URL, and putting boxes of arrays together from the pieces that hold them. Must
never hand out bytes whose CRC32C it has not checked, and never fill a gap with zeros.
"""

from __future__ import annotations

import math
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from resilience.checkpoint import arrays as _arrays
from resilience.checkpoint.arrays import AnyArray
from resilience.checkpoint.box import Box, cells, missing
from resilience.checkpoint.catalog import HINT, Entry, Piece, catalog, lacks
from resilience.checkpoint.pack import crc32c, read_range
from resilience.checkpoint.part import Part
from resilience.checkpoint.plan import CRC_BYTES
from resilience.checkpoint.restore import Source, check_together, load_part
from resilience.errors import CorruptError, InvalidError
from storage_backends import open_storage
from storage_backends.base import Storage

_PART = re.compile(r"(?:.*/)?rank-(\d+)\.json")
_KEPT = 32 << 20  # bytes of verified pieces kept: neighbouring boxes are often of the same pieces


class Packs:
    """All parts of one checkpoint and the storage that holds their packs. Thread-safe.

    Args:
        parts: of all ranks.
        packs: for each part, the storage and the object name of its pack. Links lie beside it.

    Attributes:
        entries: the arrays by name.
    """

    def __init__(self, parts: Sequence[Part], packs: Sequence[tuple[Storage, str]]) -> None:
        self.parts = {part.rank: part for part in parts}
        self.packs = {part.rank: pack for part, pack in zip(parts, packs, strict=True)}
        self.entries = catalog(parts)
        self._cells: dict[str, dict[tuple[int, ...], list[Piece]]] = {}
        self._kept: OrderedDict[Piece, bytes] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def first(self) -> Part:
        """The part of the lowest rank."""
        return self.parts[min(self.parts)]

    def block(self, piece: Piece) -> bytes:
        """The payload of a piece and its CRC32C, as Zarr's ``crc32c`` codec wants it. Verified."""
        storage, pack = self.packs[piece.rank]
        name = f"{pack.rpartition('/')[0]}/{piece.file}".lstrip("/")
        block = read_range(storage, name, piece.offset, piece.offset + piece.length + CRC_BYTES)
        stored = int.from_bytes(block[piece.length :], "little")
        if crc32c(memoryview(block)[: piece.length]) == piece.crc32c == stored:
            return block
        part = self.parts[piece.rank]
        end = piece.offset + piece.length
        raise CorruptError(
            f"pack {name} is damaged: the chunk at bytes {piece.offset:,} to {end:,} does not have the CRC32C "
            f"{piece.crc32c:08x} that its part records",
            operation="read pack",
            path=name,
            start=piece.offset,
            end=end + CRC_BYTES,
            step=part.step,
            generation=part.generation,
            hint=HINT,
        )

    def piece(self, entry: Entry, piece: Piece) -> AnyArray:
        """What a piece holds of its array, in the carrier type, read-only. Verified."""
        return _shaped(entry, piece, self.block(piece))

    def box(self, entry: Entry, box: Box) -> AnyArray:
        """Any box of an array, in the carrier type, put together from the pieces that hold it.

        Raises:
            CorruptError: some of it is in no pack, or a piece is damaged.
        """
        target = np.empty(box.shape, _arrays.carrier(entry.dtype))
        self._fill(entry, box, target)
        return target

    def _fill(self, entry: Entry, box: Box, target: AnyArray) -> None:
        pieces = self._meeting(entry, box)
        for hole in missing(box, [piece.box for piece in pieces]):
            raise lacks(entry.name, hole)
        for piece in pieces:
            common = piece.box.meet(box)
            if common is None:  # it has a cell in common only
                continue
            source = _shaped(entry, piece, self._remembered(piece))
            target[common.slices(box) or ...] = source[common.slices(piece.box) or ...]

    def cell(self, entry: Entry, index: Sequence[int]) -> bytearray:
        """A full chunk of the array's grid (``Entry.view_grid``) with its CRC32C after it; zeros where the array
        ends inside.

        Raises:
            CorruptError: as ``box``.
        """
        grid = entry.view_grid
        box = Box(tuple(i * g for i, g in zip(index, grid, strict=True)), grid).meet(Box.whole(entry.shape))
        assert box is not None
        block = bytearray(math.prod(grid) * entry.itemsize + CRC_BYTES)  # the one copy that is made
        payload = memoryview(block)[:-CRC_BYTES]
        corner: Any = (..., *map(slice, box.shape))
        self._fill(entry, box, np.frombuffer(payload, _arrays.carrier(entry.dtype)).reshape(grid)[corner])
        block[-CRC_BYTES:] = crc32c(payload).to_bytes(CRC_BYTES, "little")
        return block

    def _meeting(self, entry: Entry, box: Box) -> list[Piece]:
        """The pieces that may hold some of ``box``, looked up by the cells of the array's grid."""
        grid = entry.view_grid
        index = self._cells.get(entry.name)
        if index is None:
            index = {}
            for piece in entry.pieces:
                for cell in cells(piece.box, grid):
                    key = tuple(o // g for o, g in zip(cell.offset, grid, strict=True))
                    index.setdefault(key, []).append(piece)
            self._cells[entry.name] = index
        found: dict[Piece, None] = {}
        for cell in cells(box, grid):
            key = tuple(o // g for o, g in zip(cell.offset, grid, strict=True))
            found.update(dict.fromkeys(index.get(key, ())))
        return list(found)

    def _remembered(self, piece: Piece) -> bytes:
        with self._lock:
            if piece in self._kept:
                self._kept.move_to_end(piece)
                return self._kept[piece]
        block = self.block(piece)
        with self._lock:
            self._kept[piece] = block
            while len(self._kept) > 1 and sum(map(len, self._kept.values())) > _KEPT:
                self._kept.popitem(last=False)
        return block


def _shaped(entry: Entry, piece: Piece, block: bytes) -> AnyArray:
    whole = np.frombuffer(block, _arrays.carrier(entry.dtype), math.prod(piece.full)).reshape(piece.full)
    corner: Any = (..., *map(slice, piece.box.shape))  # with the ellipsis a scalar stays an array
    found: AnyArray = whole[corner]
    return found


def find_packs(url: str, step: int | None = None) -> Packs:
    """The packs of a checkpoint.

    Args:
        url: of a run (``<storage>/<run>``; its commit log says which checkpoints exist) or of one checkpoint's
            directory (``.../checkpoints/step-40-g1``, wherever it was copied to).
        step: of a run, the step wanted; ``None`` is the newest committed checkpoint of the shared tier.

    Raises:
        InvalidError: there is no such checkpoint.
        CorruptError: it is not whole. Damaged chunks are found when they are read.
    """
    storage = open_storage(url)
    if storage.list("log"):
        return _of_run(storage, url, step)
    return _of_directory(storage, url, step)


def _of_run(storage: Storage, url: str, step: int | None) -> Packs:
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
            return Packs(parts, [(storage, part.pack_name) for part in parts])
    have = ", ".join(str(checkpoint.step) for checkpoint in usable) or "none"
    raise InvalidError(
        f"{url} has no committed checkpoint{'' if step is None else f' of step {step}'} in shared storage",
        operation="open_checkpoint",
        path=url,
        step=step,
        hint=f"steps there are: {have}",
    )


def _of_directory(storage: Storage, url: str, step: int | None) -> Packs:
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
    return Packs(parts, [(storage, f"rank-{part.rank}.pack") for part in parts])
