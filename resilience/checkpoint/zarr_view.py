"""A checkpoint as a Zarr v3 hierarchy: its metadata, and a reference file that says where each chunk lies.

Owns the mapping from parts to Zarr: every chunk of a pack is a Zarr chunk (codecs ``bytes`` little endian,
then ``crc32c``), so plain zarr with fsspec's ``reference`` filesystem reads a checkpoint without this
package. Pure: it looks at parts only. Must never describe a chunk that is in no pack.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from resilience.checkpoint import arrays as _arrays
from resilience.checkpoint.part import Part, PartArray
from resilience.checkpoint.plan import CRC_BYTES, stored_name
from resilience.checkpoint.tree import leaves

METADATA = "zarr.json"
REFERENCES = "refs.json"


@dataclass(frozen=True)
class Place:
    """Where a Zarr chunk lies: its payload in the pack of ``rank``; its CRC32C is in the four bytes after."""

    rank: int
    offset: int
    length: int
    crc32c: int


def zarr_metadata(parts: Sequence[Part], *, url: str) -> dict[str, bytes]:
    """The two files that stand beside the packs, by name.

    Args:
        parts: all parts of one checkpoint.
        url: of the checkpoint's directory, as fsspec takes it; a template in ``refs.json``, so that a moved
            checkpoint opens with ``template_overrides={"u": new_url}``.

    Returns:
        ``zarr.json`` (the root group with consolidated metadata) and ``refs.json`` (fsspec reference format,
        version 1, all metadata inlined).
    """
    documents = metadata_documents(parts)
    refs: dict[str, Any] = {key: data.decode() for key, data in documents.items()}
    for key, place in chunk_places(parts).items():
        refs[key] = ["{{u}}/" + f"rank-{place.rank}.pack", place.offset, place.length + CRC_BYTES]
    references = {"version": 1, "templates": {"u": url.rstrip("/")}, "refs": refs}
    return {METADATA: documents[METADATA], REFERENCES: _dump(references)}


def metadata_documents(parts: Sequence[Part]) -> dict[str, bytes]:
    """Every ``zarr.json`` of the hierarchy by key; the root's holds all others as consolidated metadata."""
    nodes: dict[str, dict[str, Any]] = {}
    for name, array in sorted(_arrays_of(parts).items()):
        parent = name
        while "/" in parent:
            parent = parent.rpartition("/")[0]
            nodes[parent] = {"attributes": {}, "zarr_format": 3, "node_type": "group"}
        nodes[name] = _array_metadata(array)
    first = parts[0]
    root = {
        "attributes": {
            "resilience": {
                "run": first.run,
                "step": first.step,
                "generation": first.generation,
                "world_size": first.world_size,
            }
        },
        "zarr_format": 3,
        "consolidated_metadata": {
            "kind": "inline",
            "must_understand": False,
            "metadata": {path: nodes[path] for path in sorted(nodes)},
        },
        "node_type": "group",
    }
    return {METADATA: _dump(root)} | {f"{path}/{METADATA}": _dump(node) for path, node in nodes.items()}


def chunk_places(parts: Sequence[Part]) -> dict[str, Place]:
    """Where each chunk lies, by its Zarr key (``model/wte.weight/c/0/0``)."""
    names = _aliases(parts)
    places: dict[str, Place] = {}
    for part in parts:
        for chunk in part.chunks:
            array = part.arrays[chunk.array]
            if array.grid is None:
                continue
            index = [o // g for o, g in zip(chunk.box_offset, array.grid, strict=True)]
            suffix = "/".join(["c", *map(str, index)])
            place = Place(part.rank, chunk.offset, chunk.length, chunk.crc32c)
            for name in (array.name, *names.get(array.name, ())):
                places[f"{name}/{suffix}"] = place
    return places


def _arrays_of(parts: Sequence[Part]) -> dict[str, PartArray]:
    """All arrays of regular chunks by name, those included that are other names of the same bytes (tied weights)."""
    found = {array.name: array for part in parts for array in part.arrays}
    for name, others in _aliases(parts).items():
        found.update(dict.fromkeys(others, found[name]))
    return {name: array for name, array in found.items() if array.grid is not None}


def _aliases(parts: Sequence[Part]) -> dict[str, list[str]]:
    """Name of an array -> its other names."""
    found: dict[str, list[str]] = {}
    for part in parts:
        arrays = {part.key(array): array for array in part.arrays}
        for key, alias in _tied(part):
            array = arrays[key]
            name = stored_name(alias, array.scope, rank=part.rank)
            names = found.setdefault(array.name, [])
            if name not in names:
                names.append(name)
    return found


def _tied(part: Part) -> Iterator[tuple[str, str]]:
    for place, key in leaves(part.state):
        if place != key:
            yield key, place


def _array_metadata(array: PartArray) -> dict[str, Any]:
    assert array.grid is not None
    dtype = _arrays.numpy_dtype(array.dtype)
    fill: Any = 0 if dtype.kind in "iu" else 0.0
    if dtype.kind == "b":
        fill = False
    elif dtype.kind == "c":
        fill = [0.0, 0.0]
    elif array.dtype == "float8_e8m0fnu":
        fill = "0x00"  # it has no zero
    codec: dict[str, Any] = {"name": "bytes"}
    if dtype.itemsize > 1:
        codec["configuration"] = {"endian": "little"}
    return {
        "shape": list(array.shape),
        "data_type": array.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(array.grid)}},
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
