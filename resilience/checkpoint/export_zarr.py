"""Plain Zarr v3: a directory with one file for each chunk, that every Zarr reader opens by itself.

Chunks of a grid are copied as they are, CRC32C included (codec ``crc32c``); boxes of any kind are put together.
"""

from __future__ import annotations

import os

from resilience.checkpoint.box import Box, cells
from resilience.checkpoint.export import Exported, Report, Selection
from resilience.checkpoint.export_target import Target
from resilience.checkpoint.zarr_view import METADATA, about, chunk_key, metadata_documents


def write(chosen: Selection, dest: str, *, overwrite: bool, report: Report) -> Exported:
    """See ``export.export``. Names are those of the checkpoint, ``/``-separated: Zarr's own way to nest."""
    packs = chosen.packs
    entries = {item.key: item.entry for item in chosen.items}
    total = sum(entry.size for entry in entries.values())
    done = files = 0
    with Target(dest, single=False, overwrite=overwrite, ours=_ours) as target:
        for name, document in metadata_documents(entries, about(packs.first)).items():
            with target.file(name) as file:
                file.append(document)
            files += 1
        for name, entry in entries.items():
            grid = entry.view_grid
            on_grid = {piece.box.offset: piece for piece in entry.pieces} if entry.grid is not None else {}
            for cell in cells(Box.whole(entry.shape), grid):
                index = [o // g for o, g in zip(cell.offset, grid, strict=True)]
                piece = on_grid.get(cell.offset)
                block = packs.cell(entry, index) if piece is None else packs.block(piece)
                with target.file(chunk_key(name, index), len(block)) as file:
                    file.append(block)
                files += 1
                done += cell.count * entry.itemsize
                report(done, total)
    return Exported(target.path, packs.first.step, len(entries), total, files)


def _ours(directory: str) -> bool:
    """A hierarchy is ``zarr.json`` and directories that have one; a run or a checkpoint of ours has other files."""
    names = os.listdir(directory)
    below = [name for name in names if name != METADATA]
    return METADATA in names and all(os.path.isfile(f"{directory}/{name}/{METADATA}") for name in below)
