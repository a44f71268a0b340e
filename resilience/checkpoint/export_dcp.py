"""torch's distributed checkpoint (DCP), as ``FileSystemReader`` reads it: one file for each pack, one piece at a time.

Owns the mapping of names (keys joined by dots, as torch flattens a nested state) and of pieces to DCP's chunks. It
writes torch's own metadata classes, which DCP keeps as a pickle; it reads none.
"""

from __future__ import annotations

import io
import os
import pickle
import warnings
from typing import Any

from resilience.checkpoint import arrays as _arrays
from resilience.checkpoint.box import Box
from resilience.checkpoint.catalog import Entry, Piece
from resilience.checkpoint.export import Exported, Report, Selection
from resilience.checkpoint.export_target import Filled, Target
from resilience.checkpoint.tree import unflatten
from resilience.errors import InvalidError

_METADATA = ".metadata"
_SUFFIX = ".distcp"
_VERSION = "1.0.0"  # of the metadata that this describes; torch 2.6 and later write it


def write(chosen: Selection, dest: str, *, overwrite: bool, report: Report) -> Exported:
    """See ``export.export``."""
    torch = _torch()
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    _check_types(chosen, torch)
    described: dict[str, Any] = {}
    stored: dict[Any, Any] = {}
    mapping: dict[str, Any] = {}
    carriers: dict[str, list[str]] = {}  # names of the bytes of each array: tied ones point to the same
    entries: dict[str, Entry] = {}
    for item in chosen.items:
        entry = item.entry
        carriers.setdefault(entry.same_as or entry.name, []).append(item.name)
        entries[entry.same_as or entry.name] = entry
        chunks = [ChunkStorageMetadata(torch.Size(b.offset), torch.Size(b.shape)) for b in _boxes(entry)]
        properties = TensorProperties(dtype=getattr(torch, entry.dtype))
        described[item.name] = TensorStorageMetadata(properties, torch.Size(entry.shape), chunks)
        mapping[item.name] = item.path
    by_rank: dict[int, list[tuple[str, int, Piece]]] = {rank: [] for rank in chosen.packs.parts}
    for name, entry in entries.items():
        for number, piece in enumerate(entry.pieces or (_nothing(entry, min(by_rank)),)):
            by_rank[piece.rank].append((name, number, piece))
    done = files = 0
    with Target(dest, single=False, overwrite=overwrite, ours=_ours) as target:
        for rank, pieces in by_rank.items():
            values = chosen.values if rank == min(by_rank) else {}
            if not pieces and not values:
                continue
            file_name = f"__{rank}_0{_SUFFIX}"
            files += 1
            with target.file(file_name) as file:
                for path, node in values.items():
                    name = ".".join(map(str, path))
                    begin, length = _save(torch, unflatten(node, {}), file)
                    described[name] = BytesStorageMetadata()
                    stored[MetadataIndex(name)] = _StorageInfo(file_name, begin, length)
                    mapping[name] = path
                for name, number, piece in sorted(pieces, key=lambda it: (it[2].file, it[2].offset)):
                    begin, length = _save(torch, _tensor(torch, chosen, entries[name], piece), file)
                    for other in carriers[name]:
                        index = MetadataIndex(other, piece.box.offset, number)
                        stored[index] = _StorageInfo(file_name, begin, length)
                    done += piece.box.count * entries[name].itemsize
                    report(done, chosen.size)
        metadata = Metadata(described, planner_data=mapping, storage_data=stored, version=_VERSION)
        with target.file(_METADATA) as file:
            file.append(pickle.dumps(metadata))
    return Exported(target.path, chosen.packs.first.step, len(chosen.items), done, files + 1)


def _boxes(entry: Entry) -> list[Box]:
    return [piece.box for piece in entry.pieces] or [Box.whole(entry.shape)]


def _nothing(entry: Entry, rank: int) -> Piece:
    """DCP wants a chunk of an array without elements, too."""
    return Piece(rank, "", Box.whole(entry.shape), entry.shape, 0, 0, 0)


def _tensor(torch: Any, chosen: Selection, entry: Entry, piece: Piece) -> Any:
    if not piece.length:
        return torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
    values = chosen.packs.piece(entry, piece).view(_arrays.numpy_dtype(entry.dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the memory is read-only, and nothing will write to it
        tensor = _arrays.build(values, "torch")
    # torch.save writes all memory behind a view: not the zeros after the end of the array.
    return tensor if piece.full == piece.box.shape else tensor.clone()


def _save(torch: Any, value: Any, file: Filled) -> tuple[int, int]:
    begin = file.end
    writer = _Appender(file)
    try:
        torch.save(value, writer)
    except RuntimeError:
        if writer.failed is not None:  # torch hides what went wrong behind what came of it
            raise writer.failed from None
        raise
    return begin, file.end - begin


class _Appender(io.RawIOBase):
    """What ``torch.save`` writes to."""

    def __init__(self, file: Filled) -> None:
        self._file = file
        self.failed: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        try:
            self._file.append(data)
        except OSError as error:
            self.failed = error
            raise
        return memoryview(data).nbytes


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise InvalidError(
            "the format dcp needs the package torch",
            operation="export",
            hint="pip install 'resilience[torch]', or export --to safetensors or zarr",
        ) from error
    return torch


def _check_types(chosen: Selection, torch: Any) -> None:
    for item in chosen.items:
        if not isinstance(getattr(torch, item.entry.dtype, None), torch.dtype):
            raise InvalidError(
                f"torch {torch.__version__} has no data type {item.entry.dtype}: {item.entry.name}",
                operation="export",
                path=item.entry.name,
                hint="leave it out with --exclude, or upgrade torch",
            )


def _ours(directory: str) -> bool:
    return all(name.endswith(_SUFFIX) or name == _METADATA for name in os.listdir(directory))
