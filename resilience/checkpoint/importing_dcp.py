"""Reading a checkpoint of torch's distributed checkpoint (DCP): any number of ranks, any sharding, box by box.

Owns the mapping from DCP's flat names and chunks to a nested state and boxes. Metadata comes through
``importing_pickle``; tensors and values through ``torch.load(weights_only=True)``, and of tensors only the description:
their bytes are read where they lie in the archive. Must never load a whole tensor where a box is asked for.
"""

from __future__ import annotations

import math
import os
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from resilience.checkpoint import arrays as _arrays
from resilience.checkpoint.arrays import AnyArray, carrier
from resilience.checkpoint.box import Box, missing
from resilience.checkpoint.export import matches
from resilience.checkpoint.importing import SourceArray
from resilience.checkpoint.importing_pickle import Record, read_metadata
from resilience.checkpoint.importing_span import Files, Slice, damaged, read_box
from resilience.checkpoint.tree import flatten
from resilience.errors import CorruptError, InvalidError

_RANK = re.compile(r"rank-\d+")
_LOCAL_HEADER = 30  # bytes of a zip member's header before its name


@dataclass(frozen=True)
class _Stored:
    """Where DCP keeps one chunk or value: an archive of ``torch.save`` inside of a file."""

    path: str
    offset: int
    length: int


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the checkpoint: its chunks as boxes and where they lie."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[tuple[Box, _Stored], ...]


class DcpSource:
    """See ``importing.Imported``."""

    step: int | None = None

    def __init__(self, path: str, *, under: str | None, exclude: Sequence[str]) -> None:
        self._torch = _torch()
        self._path = path
        self._files = Files()
        self.notes: list[str] = []
        self._placed: dict[_Stored, int | None] = {}
        try:
            with open(f"{path}/.metadata", "rb") as file:
                metadata = read_metadata(file, f"{path}/.metadata")
            names = self._chosen(metadata, exclude)
            state, tensors = self._state(metadata, names)
            self._flatten({under: state} if under else state, tensors)
        except BaseException:
            self.close()
            raise

    def read(self, array: SourceArray, box: Box) -> AnyArray:
        held = self._held[array.key]
        if not isinstance(held, _Tensor):  # a small tensor inside of a value
            whole = _arrays.raw(held)
            piece: AnyArray = whole[box.slices(Box.whole(array.shape)) or ...]
            return piece
        meeting = [(chunk, common, stored) for chunk, stored in held.chunks if (common := chunk.meet(box))]
        target = np.empty(box.shape, carrier(array.dtype))
        for chunk, common, stored in meeting:
            target[common.slices(box) or ...] = self._read(held, chunk, common, stored)
        return target

    def close(self) -> None:
        self._files.close()

    # -- metadata --------------------------------------------------------------------------------------------

    def _chosen(self, metadata: Record, exclude: Sequence[str]) -> list[str]:
        described = metadata.get("state_dict_metadata")
        if not isinstance(described, dict) or not isinstance(metadata.get("storage_data"), dict):
            raise damaged(f"{self._path}/.metadata", "lists no tensors or no files")
        for pattern in exclude:
            if not any(_excluded(name, pattern) for name in described):
                some = ", ".join(list(described)[:5])
                raise InvalidError(
                    f"nothing in the checkpoint is named {pattern!r}",
                    operation="import",
                    path=pattern,
                    hint=f"there are: {some}{' and more' if len(described) > 5 else ''}",
                )
        return [n for n in described if not any(_excluded(n, pattern) for pattern in exclude)]

    def _state(self, metadata: Record, names: Sequence[str]) -> tuple[dict[str, Any], dict[int, _Tensor]]:
        """The nested state, with empty tensors where tensors are to be, and what these stand for, by identity."""
        torch = self._torch
        stored: dict[tuple[str, tuple[int, ...] | None], Record] = {}
        for index, info in metadata.get("storage_data").items():
            stored[index.get("fqn"), index.get("offset")] = info
        paths = metadata.get("planner_data") or {}
        state: dict[str, Any] = {}
        tensors: dict[int, _Tensor] = {}
        made: dict[Any, Any] = {}
        left = []
        for name in names:
            path = tuple(paths.get(name) or (name,)) if isinstance(paths, dict) else (name,)
            if _RANK.fullmatch(str(path[0])):
                left.append(name)
                continue
            item = metadata.get("state_dict_metadata")[name]
            if item.kind == "TensorStorageMetadata":
                tensor = self._tensor(name, item, stored)
                # Without memory of its own: it only says what the tensor will be. One for all that are the same bytes.
                if tensor.chunks not in made:
                    made[tensor.chunks] = torch.empty((), dtype=getattr(torch, tensor.dtype)).expand(
                        tensor.shape
                    )
                value = made[tensor.chunks]
                tensors[id(value)] = tensor
            else:
                info = stored.get((name, None))
                if info is None:
                    raise damaged(f"{self._path}/.metadata", f"does not say where {name} lies")
                value = self._value(name, self._place(info))
            _put(state, path, value)
        if left:
            self.notes.append(
                f"left out, because they belong to single ranks: {', '.join(left[:5])}"
                + (f" and {len(left) - 5} more" if len(left) > 5 else "")
            )
        return _with_numbers(state), tensors

    def _tensor(self, name: str, item: Record, stored: dict[Any, Record]) -> _Tensor:
        properties = item.get("properties")
        dtype = properties.fields[0] if isinstance(properties.fields, tuple) else properties.get("dtype")
        if dtype not in _arrays.dtype_names() or not hasattr(self._torch, dtype):
            raise InvalidError(
                f"{name} has the data type {dtype}, which cannot be kept",
                operation="import",
                path=name,
                hint="leave it out with --exclude",
            )
        shape = tuple(item.get("size"))
        chunks = []
        for chunk in item.get("chunks"):
            box = Box(tuple(chunk.get("offsets")), tuple(chunk.get("sizes")))
            info = stored.get((name, box.offset))
            if info is None:
                raise damaged(f"{self._path}/.metadata", f"does not say where {name} at {box.offset} lies")
            chunks.append((box, self._place(info)))
        for hole in missing(Box.whole(shape), [box for box, _ in chunks]):
            raise damaged(self._path, f"lacks {name} at {list(hole.offset)}, shape {list(hole.shape)}")
        return _Tensor(name, dtype, shape, tuple(chunks))

    def _place(self, info: Record) -> _Stored:
        if info.get("transform_descriptors"):
            raise InvalidError(
                f"{self._path} was written through extensions ({', '.join(info.get('transform_descriptors'))})",
                operation="import",
                path=self._path,
                hint="load it with torch and save it again without extensions",
            )
        relative = os.path.normpath(str(info.get("relative_path")))
        path = f"{self._path}/{relative}"
        if os.path.isabs(relative) or relative.startswith(".."):
            raise damaged(f"{self._path}/.metadata", f"names a file outside of its directory: {relative}")
        begin, length = int(info.get("offset")), int(info.get("length"))
        if not 0 <= begin <= begin + length <= self._files.size(path):
            raise damaged(
                path, f"has {self._files.size(path):,} bytes: data is expected up to {begin + length:,}"
            )
        return _Stored(path, begin, length)

    def _flatten(self, state: dict[str, Any], tensors: dict[int, _Tensor]) -> None:
        try:
            arrays, self.skeleton = flatten(state, prefix="")
        except InvalidError as error:
            raise InvalidError(
                f"{self._path} holds what cannot be kept: {error.message}",
                operation="import",
                path=error.path,
                hint="leave it out with --exclude",
            ) from error
        self._held = {key: tensors.get(id(value), value) for key, value in arrays.items()}
        self.arrays = tuple(SourceArray(key, *_arrays.describe(value)) for key, value in arrays.items())

    # -- archives --------------------------------------------------------------------------------------------

    def _value(self, name: str, place: _Stored) -> Any:
        torch = self._torch
        # NumPy's numbers are plain values too: their constructor and data types, and nothing else.
        scalars = [np.dtype, np.float64(0).__reduce__()[0], *(type(np.dtype(c)) for c in "?bhilqBHILQefdFD")]
        try:
            with torch.serialization.safe_globals(scalars):
                return torch.load(self._slice(place), map_location="cpu", weights_only=True)
        except CorruptError:
            raise
        except Exception as error:
            if "weights_only" in str(error) or "Unsupported" in str(error):
                named = re.search(r"GLOBAL (\S+)", str(error))
                raise InvalidError(
                    f"{name} is {f'of the class {named[1]}' if named else 'a pickled object'}, no plain value: "
                    "it could run any program when it is read",
                    operation="import",
                    path=name,
                    hint=f"leave it out: --exclude {name}",
                ) from None
            raise damaged(place.path, f"does not hold {name}: {error}") from error

    def _slice(self, place: _Stored) -> Slice:
        return Slice(self._files, place.path, place.offset, place.length)

    def _read(self, tensor: _Tensor, chunk: Box, common: Box, place: _Stored) -> AnyArray:
        """``common``, which lies in ``chunk``, from the archive of that chunk."""
        inner = Box(tuple(a - b for a, b in zip(common.offset, chunk.offset, strict=True)), common.shape)
        if place not in self._placed:
            self._placed[place] = self._locate(tensor, chunk, place)
        base = self._placed[place]
        if base is not None:
            return read_box(self._files, place.path, base, chunk.shape, inner, tensor.dtype)
        whole = _arrays.raw(self._load(tensor, place, "cpu"))
        found: AnyArray = whole[inner.slices(Box.whole(chunk.shape)) or ...]
        return found

    def _load(self, tensor: _Tensor, place: _Stored, device: str) -> Any:
        try:
            return self._torch.load(self._slice(place), map_location=device, weights_only=True)
        except CorruptError:
            raise
        except Exception as error:
            raise damaged(place.path, f"does not hold {tensor.name}: {error}") from error

    def _locate(self, tensor: _Tensor, chunk: Box, place: _Stored) -> int | None:
        """The byte of the file at which the chunk lies in C order; ``None``: it does not, and is loaded whole.

        ``torch.save`` writes a zip archive whose members are stored as they are: ``data.pkl`` describes the tensor,
        ``data/0`` is its memory.
        """
        found = self._load(tensor, place, "meta")
        dtype, shape = _arrays.describe(found) if hasattr(found, "shape") else ("", ())
        if (dtype, shape) != (tensor.dtype, chunk.shape):
            raise damaged(place.path, f"holds {dtype}{list(shape)} where {tensor.name} should be")
        try:
            with zipfile.ZipFile(self._slice(place)) as archive:
                members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
                order = members.get("byteorder")
                little = order is None or archive.read(order) == b"little"
        except zipfile.BadZipFile:  # torch's old format
            return None
        memory = [info for name, info in members.items() if re.fullmatch(r"data/\d+", name)]
        if len(memory) != 1 or memory[0].compress_type != zipfile.ZIP_STORED or not little:
            return None
        if not found.is_contiguous() or found.is_conj() or found.is_neg():
            return None
        begin = place.offset + memory[0].header_offset
        head = self._files.read(place.path, begin, _LOCAL_HEADER)
        data = (
            begin
            + _LOCAL_HEADER
            + int.from_bytes(head[26:28], "little")
            + int.from_bytes(head[28:30], "little")
        )
        base = data + int(found.storage_offset()) * found.element_size()
        needed = base + math.prod(chunk.shape) * found.element_size()
        return base if needed <= data + memory[0].file_size else None


def _excluded(name: str, pattern: str) -> bool:
    return matches(name, pattern) or name.startswith(pattern.rstrip(".") + ".")


def _put(state: dict[str, Any], path: tuple[Any, ...], value: Any) -> None:
    """Texts are keys of mappings, numbers places in lists: DCP's paths. Lists come as mappings at first."""
    here = state
    for key in path[:-1]:
        here = here.setdefault(key, {})
    here[path[-1]] = value


def _with_numbers(state: Any) -> Any:
    """Mappings whose keys are all numbers become lists; and the keys of an optimizer's state become numbers again.

    DCP writes every key as text. In a mapping with ``param_groups``, ``state`` is an optimizer's, whose keys are
    numbers unless they are parameters' names.
    """
    if not isinstance(state, dict):
        return state
    if state and all(type(key) is int for key in state):
        return [_with_numbers(state[key]) for key in sorted(state)]
    found = {key: _with_numbers(value) for key, value in state.items()}
    inner = found.get("state")
    if "param_groups" in found and isinstance(inner, dict) and all(str(key).isdecimal() for key in inner):
        found["state"] = {int(key): value for key, value in inner.items()}
    return found


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise InvalidError(
            "a checkpoint of torch's distributed checkpoint needs the package torch",
            operation="import",
            hint="pip install 'resilience[torch]'",
        ) from error
    return torch
