"""safetensors: a header of JSON, then the bytes of all tensors, each in one piece; large ones split over several files.

Owns the file format (https://huggingface.co/docs/safetensors) and the names of the files as Hugging Face has them.
What is not an array goes into the header's ``__metadata__`` as JSON text.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from resilience.checkpoint.catalog import node_kind, places
from resilience.checkpoint.export import Exported, Item, Report, Selection
from resilience.checkpoint.export_target import Target
from resilience.checkpoint.part import Part
from resilience.checkpoint.plan import Scope, stored_name
from resilience.checkpoint.tree import leaves
from resilience.checkpoint.zarr_view import about
from resilience.errors import InvalidError

DTYPES = {
    "bool": "BOOL",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
    "bfloat16": "BF16",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2": "F8_E5M2",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
}
INDEX = "model.safetensors.index.json"
ABOUT = "resilience"  # keys of ``__metadata__``: which checkpoint it was, and its state without the arrays
STATE = "resilience.state"
_MAX_STATE = 4 << 20  # bytes of a state in the header: readers load all of it, and refuse more than 100 MB


def write(chosen: Selection, dest: str, *, overwrite: bool, max_file_bytes: int, report: Report) -> Exported:
    """See ``export.export``."""
    items = [item for item in chosen.items if item.entry.same_as is None or _orphan(item, chosen)]
    _check_types(items)
    single = dest.endswith(".safetensors")
    files = [items] if single else _split(items, max_file_bytes)
    names = ["model.safetensors"]
    if len(files) > 1:
        names = [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    notes: list[str] = []
    metadata = _metadata(chosen, items, notes)
    total = sum(item.entry.size for item in items)
    done = 0
    with Target(dest, single=single, overwrite=overwrite, ours=_ours) as target:
        for name, group in zip(names, files, strict=True):
            # Larger elements first, so that each tensor is aligned to its own; sorting keeps the order otherwise.
            group = sorted(group, key=lambda item: -item.entry.itemsize)
            head = _header(group, metadata if name == names[0] else {"format": metadata["format"]})
            size = len(head) + sum(item.entry.size for item in group)
            with target.file(name, size) as file:
                base = file.append(head) + len(head)
                for item in group:
                    entry = item.entry
                    for piece in entry.pieces:
                        file.fill(base, entry.shape, piece.box, chosen.packs.piece(entry, piece))
                        done += piece.box.count * entry.itemsize
                        report(done, total)
                    base += entry.size
        if len(files) > 1:
            where = {item.name: name for name, group in zip(names, files, strict=True) for item in group}
            with target.file(INDEX) as file:
                index = {"metadata": {"total_size": total}, "weight_map": where}
                file.append(json.dumps(index, indent=2, ensure_ascii=False).encode() + b"\n")
    count = len(files) + (len(files) > 1)  # with the index
    return Exported(target.path, chosen.packs.first.step, len(items), total, count, notes)


def _orphan(item: Item, chosen: Selection) -> bool:
    """Whether the array of which this is another name is not exported: then this name carries the bytes."""
    same = [other for other in chosen.items if item.entry.same_as in (other.entry.name, other.entry.same_as)]
    return same[0] is item and all(other.entry.same_as is not None for other in same)


def _check_types(items: Sequence[Item]) -> None:
    wrong = [item for item in items if item.entry.dtype not in DTYPES]
    if wrong:
        names = ", ".join(item.entry.name for item in wrong[:5]) + (" and more" if len(wrong) > 5 else "")
        raise InvalidError(
            f"safetensors has no data type {wrong[0].entry.dtype}: {names}",
            operation="export",
            path=wrong[0].entry.name,
            hint="leave it out with --exclude, or export --to zarr or dcp",
        )


def _split(items: Sequence[Item], limit: int) -> list[list[Item]]:
    """Files of consecutive arrays, up to ``limit`` bytes of data each, one array at least."""
    files: list[list[Item]] = [[]]
    held = 0
    for item in items:
        if files[-1] and held + item.entry.size > limit:
            files.append([])
            held = 0
        files[-1].append(item)
        held += item.entry.size
    return files


def _header(items: Sequence[Item], metadata: dict[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for item in items:
        entry = item.entry
        span = [at, at + entry.size]
        header[item.name] = {
            "dtype": DTYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": span,
        }
        at = span[1]
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _metadata(chosen: Selection, items: Sequence[Item], notes: list[str]) -> dict[str, str]:
    """All texts. An array that shares the bytes of another is named with that one's name, as Hugging Face does."""
    parts = chosen.packs.parts
    kinds = {node["a"] for part in parts.values() for node in _array_nodes(part.state)}
    found = {
        "format": "pt" if "torch" in kinds or not kinds else "np",
        ABOUT: json.dumps(about(chosen.packs.first)),
    }
    carriers = {item.entry.same_as or item.entry.name: item.name for item in items}
    written = {item.name for item in items}
    for item in chosen.items:
        if item.name not in written:
            assert item.entry.same_as is not None
            found[item.name] = carriers[item.entry.same_as]
            notes.append(
                f"{item.name} shares its bytes with {found[item.name]}, and is only named in __metadata__"
            )
    values = {".".join(map(str, path)): node for path, node in chosen.values.items()}
    state: Any = {"values": values}
    skeleton = _skeleton(chosen)
    if skeleton is not None:
        part = chosen.packs.first
        scopes = _scopes(part)
        kept = sorted({node["n"] for node in _array_nodes(skeleton)})
        names = {key: carriers[stored_name(key, scopes[key], rank=part.rank)] for key in kept}
        state = {"skeleton": skeleton, "names": names, **state}
    for smaller in (state, {"values": values}):
        text = json.dumps(smaller, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        if len(text) <= _MAX_STATE:
            found[STATE] = text
            return found
    notes.append(f"values that are not arrays are left out: {len(text):,} bytes are too many for a header")
    return found


def _skeleton(chosen: Selection) -> Any:
    """The state of what is exported whole and held alike by all ranks, for whoever imports it again.

    Of several ranks that is the objects without anything of a rank's own: one rank's random numbers are no state for
    all of them.
    """
    first = chosen.packs.first
    parts = chosen.packs.parts.values()
    if node_kind(first.state) not in ("dict", "odict"):
        return first.state if len(parts) == 1 and chosen.whole else None
    exported = {item.entry.name for item in chosen.items}
    scopes = _scopes(first)
    kept = []
    for place, (key, value) in enumerate(zip(first.state["k"], first.state["v"], strict=True)):
        nodes = [node.get("as", node["n"]) for node in _array_nodes(value)]
        names = {stored_name(name, scopes[name], rank=first.rank) for name in nodes}
        alone = len(parts) > 1 and (
            any(scopes[name] is Scope.RANK for name in nodes)
            or any(_at(part.state, place) != (key, value) for part in parts)
        )
        if not alone and names <= exported and (nodes or chosen.whole):
            kept.append((key, value))
    if not kept:
        return None
    return {"t": first.state["t"], "k": [key for key, _ in kept], "v": [value for _, value in kept]}


def _at(state: Any, place: int) -> Any:
    if node_kind(state) not in ("dict", "odict") or place >= len(state["k"]):
        return None
    return state["k"][place], state["v"][place]


def _scopes(part: Part) -> dict[str, Scope]:
    """The scope of each array of a rank's state; other names of the same bytes have that of the first."""
    scopes = {part.key(array): array.scope for array in part.arrays}
    return {place: scopes[key] for place, key in leaves(part.state)} | scopes


def _array_nodes(state: Any) -> list[dict[str, Any]]:
    return [node for _, node in places(state) if node_kind(node) == "array"]


def _ours(directory: str) -> bool:
    return all(name.endswith(".safetensors") or name == INDEX for name in os.listdir(directory))
