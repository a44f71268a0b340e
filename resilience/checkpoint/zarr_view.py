"""A checkpoint as a Zarr v3 hierarchy: its metadata, and a reference file that says where each chunk lies.

Owns the mapping from arrays to Zarr: every chunk of a pack that keeps to a grid is a Zarr chunk (codecs ``bytes``
little endian, then ``crc32c``), so plain zarr with fsspec's ``reference`` filesystem reads a checkpoint without
this package. Pure: it looks at parts only. Must never describe a chunk, to whom takes what is missing for zeros, that
is in no pack.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from resilience.checkpoint import arrays as _arrays
from resilience.checkpoint.catalog import Entry, Piece, catalog, cell_count
from resilience.checkpoint.part import Part
from resilience.checkpoint.plan import CRC_BYTES

METADATA = "zarr.json"
REFERENCES = "refs.json"
#: Above so many chunks there is no reference file: readers of it hold all of it in memory, and it is rewritten with
#: every checkpoint. At 64 MiB a chunk that is 6 TiB, and a file of about 10 MB.
MAX_REFERENCES = 100_000


def zarr_metadata(parts: Sequence[Part], *, url: str) -> dict[str, bytes]:
    """The files that stand beside the packs, by name.

    Args:
        parts: all parts of one checkpoint.
        url: of the checkpoint's directory, as fsspec takes it; a template in ``refs.json``, so that a moved
            checkpoint opens with ``template_overrides={"u": new_url}``.

    Returns:
        ``zarr.json``, the root group alone: its attribute ``resilience`` says what this is. Its arrays are not in it,
        because whoever opened them there would find no chunks and read zeros. And, up to ``MAX_REFERENCES``
        chunks, ``refs.json`` (fsspec reference format, version 1, all metadata inlined and consolidated).
    """
    entries = catalog(parts)
    regular = {name: entry for name, entry in entries.items() if entry.grid is not None}
    attributes = about(parts[0])
    irregular = [name for name, entry in entries.items() if entry.grid is None and entry.same_as is None]
    if irregular:
        attributes["irregular"] = irregular
    chunks = sum(len(entry.pieces) for entry in regular.values())
    attributes["references"] = REFERENCES if chunks <= MAX_REFERENCES else None
    files = {METADATA: _dump(_group({"resilience": attributes}))}
    if chunks <= MAX_REFERENCES:
        documents = metadata_documents(regular, attributes)
        refs: dict[str, Any] = {key: data.decode() for key, data in documents.items()}
        for key, piece in chunk_places(regular):
            refs[key] = ["{{u}}/" + piece.file, piece.offset, piece.length + CRC_BYTES]
        references = {"version": 1, "templates": {"u": url.rstrip("/")}, "refs": refs}
        files[REFERENCES] = _dump(references)
    return files


def about(part: Part) -> dict[str, Any]:
    """What the root's attribute ``resilience`` says of every checkpoint."""
    return {
        "run": part.run,
        "step": part.step,
        "generation": part.generation,
        "world_size": part.world_size,
    }


def metadata_documents(entries: Mapping[str, Entry], attributes: Mapping[str, Any]) -> dict[str, bytes]:
    """Every ``zarr.json`` of the hierarchy by key; the root's holds all others as consolidated metadata.

    ``entries`` by the names they are to have; ``attributes`` is what the root's attribute ``resilience`` says.
    """
    nodes: dict[str, dict[str, Any]] = {}
    for name, entry in sorted(entries.items()):
        parent = name
        while "/" in parent:
            parent = parent.rpartition("/")[0]
            nodes[parent] = _group({})
        nodes[name] = array_metadata(entry)
    root = _group({"resilience": dict(attributes)})
    root["consolidated_metadata"] = {
        "kind": "inline",
        "must_understand": False,
        "metadata": {path: nodes[path] for path in sorted(nodes)},
    }
    return {METADATA: _dump(root)} | {f"{path}/{METADATA}": _dump(node) for path, node in nodes.items()}


def chunk_places(entries: Mapping[str, Entry]) -> Iterator[tuple[str, Piece]]:
    """The Zarr key (``model/wte.weight/c/0/0``) of each piece of the arrays that keep to a grid."""
    for name, entry in entries.items():
        if entry.grid is not None:
            for piece in entry.pieces:
                index = [o // g for o, g in zip(piece.box.offset, entry.grid, strict=True)]
                yield chunk_key(name, index), piece


def chunk_key(name: str, index: Sequence[int]) -> str:
    """The key of a chunk in Zarr's default encoding."""
    return "/".join([name, "c", *map(str, index)])


def chunk_keys(name: str, entry: Entry) -> Iterator[str]:
    """The keys of all chunks of an array, in C order, whether they lie in a pack or not."""
    counts = [cell_count((n,), (g,)) for n, g in zip(entry.shape, entry.view_grid, strict=True)]
    index = [0] * len(counts)
    for _ in range(cell_count(entry.shape, entry.view_grid)):
        yield chunk_key(name, index)
        for axis in reversed(range(len(index))):
            index[axis] += 1
            if index[axis] < counts[axis]:
                break
            index[axis] = 0


def _group(attributes: dict[str, Any]) -> dict[str, Any]:
    return {"attributes": attributes, "zarr_format": 3, "node_type": "group"}


def array_metadata(entry: Entry) -> dict[str, Any]:
    """The ``zarr.json`` of an array."""
    dtype = _arrays.numpy_dtype(entry.dtype)
    fill: Any = 0 if dtype.kind in "iu" else 0.0
    if dtype.kind == "b":
        fill = False
    elif dtype.kind == "c":
        fill = [0.0, 0.0]
    elif entry.dtype == "float8_e8m0fnu":
        fill = "0x00"  # it has no zero
    codec: dict[str, Any] = {"name": "bytes"}
    if dtype.itemsize > 1:
        codec["configuration"] = {"endian": "little"}
    return {
        "shape": list(entry.shape),
        "data_type": entry.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(entry.view_grid)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": fill,
        "codecs": [codec, {"name": "crc32c"}],
        "attributes": {},
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }


def _dump(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
