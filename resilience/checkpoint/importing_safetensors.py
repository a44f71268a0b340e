"""Reading safetensors: one file, or several with or without Hugging Face's index.

Owns the check of headers before anything is believed. Tensors keep their names, below one object; the files that
``resilience export`` wrote say in their ``__metadata__`` how the state was nested, and get it back.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from typing import Any

from resilience.checkpoint.arrays import AnyArray, numpy_dtype
from resilience.checkpoint.box import Box
from resilience.checkpoint.export import matches
from resilience.checkpoint.export_safetensors import ABOUT, DTYPES, STATE
from resilience.checkpoint.importing import SourceArray
from resilience.checkpoint.importing_span import Files, damaged, read_box
from resilience.checkpoint.tree import leaves, segment
from resilience.errors import InvalidError

OBJECT = "model"  # what tensors without a state around them are taken for
_INDEX = ".safetensors.index.json"
_MAX_HEADER = 100_000_000  # as the safetensors package
_NAMES = {theirs: ours for ours, theirs in DTYPES.items()}
_Place = tuple[str, int, str, tuple[int, ...]]  # file, byte, data type, shape


def files_of(path: str) -> list[str]:
    """The safetensors files at ``path``: itself, those its index names, or all in the directory. Sorted.

    Raises:
        CorruptError: the index cannot be read.
    """
    if os.path.isfile(path):
        if path.endswith(_INDEX):
            return _indexed(path)
        return [path] if path.endswith(".safetensors") else []
    if not os.path.isdir(path):
        return []
    names = sorted(os.listdir(path))
    indexes = [name for name in names if name.endswith(_INDEX)]
    if len(indexes) > 1:
        raise InvalidError(
            f"{path} holds several indexes: {', '.join(indexes)}",
            operation="import",
            path=path,
            hint="give one of them as the source",
        )
    if indexes:
        return _indexed(f"{path}/{indexes[0]}")
    return [f"{path}/{name}" for name in names if name.endswith(".safetensors")]


def _indexed(path: str) -> list[str]:
    try:
        with open(path, "rb") as file:
            names = sorted(set(json.load(file)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(path, f"is no index of safetensors files: {error}") from error
    if any(os.path.basename(name) != name for name in names):
        raise damaged(path, "names files outside of its directory")
    return [f"{os.path.dirname(path)}/{name}" for name in names]


class SafetensorsSource:
    """See ``importing.Imported``."""

    def __init__(self, files: Sequence[str], *, under: str | None, exclude: Sequence[str]) -> None:
        self._files = Files()
        self.notes: list[str] = []
        self.step: int | None = None
        self.skeleton: Any = None
        self._places: dict[str, _Place] = {}
        metadata: dict[str, str] = {}
        try:
            for path in files:
                metadata.update(self._read_header(path))
            for pattern in exclude:
                if not any(matches(name, pattern) for name in self._places):
                    raise _nothing(pattern, self._places)
            kept = [n for n in self._places if not any(matches(n, pattern) for pattern in exclude)]
            self._read_about(metadata)
            names = None if exclude else self._state(metadata, under)
            if names is None:
                names = self._flat(kept, metadata, under or OBJECT)
        except BaseException:
            self.close()
            raise
        self._names = names
        self.arrays = tuple(SourceArray(key, *self._places[name][2:]) for key, name in names.items())

    def read(self, array: SourceArray, box: Box) -> AnyArray:
        path, base, dtype, shape = self._places[self._names[array.key]]
        return read_box(self._files, path, base, shape, box, dtype)

    def close(self) -> None:
        self._files.close()

    def _read_header(self, path: str) -> dict[str, str]:
        """Note where the tensors of a file lie; its ``__metadata__``."""
        size = self._files.size(path)
        length = int.from_bytes(self._files.read(path, 0, 8), "little")
        if length > min(size - 8, _MAX_HEADER):
            raise damaged(path, f"has {size:,} bytes, and claims a header of {length:,}: no safetensors file")
        try:
            header = json.loads(self._files.read(path, 8, length))
            metadata = header.pop("__metadata__", None) or {}
            for name, tensor in header.items():
                begin, end = tensor["data_offsets"]
                shape = tuple(map(int, tensor["shape"]))
                if tensor["dtype"] not in _NAMES:
                    raise InvalidError(
                        f"tensor {name} of {path} has the data type {tensor['dtype']}, which cannot be kept",
                        operation="import",
                        path=name,
                        hint="leave it out with --exclude",
                    )
                dtype = _NAMES[tensor["dtype"]]
                if min(shape, default=0) < 0 or end - begin != math.prod(shape) * numpy_dtype(dtype).itemsize:
                    raise ValueError(f"{name}: {end - begin} bytes for {dtype}{list(shape)}")
                if not 0 <= begin <= end <= size - 8 - length:
                    raise damaged(path, f"is cut off: {name} lies at bytes {begin:,} to {end:,} of its data")
                if name in self._places:
                    raise InvalidError(
                        f"{path} and {self._places[name][0]} both hold {name}",
                        operation="import",
                        path=name,
                        hint="give one file, or the index that names those that belong together",
                    )
                self._places[name] = (path, 8 + length + begin, dtype, shape)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise damaged(path, f"has a header that cannot be read: {error}") from error
        return {str(key): str(value) for key, value in metadata.items()}

    def _read_about(self, metadata: dict[str, str]) -> None:
        try:
            step = json.loads(metadata.get(ABOUT, "{}")).get("step")
        except (ValueError, AttributeError):
            return  # somebody else's key of the same name: it is a hint only
        self.step = step if isinstance(step, int) and step >= 0 else None

    def _state(self, metadata: dict[str, str], under: str | None) -> dict[str, str] | None:
        """Key -> name of the tensors of a state that we exported ourselves; ``None`` for other files."""
        try:
            state = json.loads(metadata.get(STATE, "null"))
            skeleton, found = state["skeleton"], dict(state["names"])
            keys = {key for _, key in leaves(skeleton)}
            names = {key: found[key] for key in sorted(keys)}
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
        if not all(name in self._places for name in names.values()) or under is not None:
            return None
        self.skeleton = skeleton
        left = sorted(set(self._places) - set(names.values()))
        if left:
            self.notes.append(f"left out, because they belong to single ranks: {_some(left)}")
        return names

    def _flat(self, kept: Sequence[str], metadata: dict[str, str], under: str) -> dict[str, str]:
        """All tensors by their own names as one object: what a module's ``state_dict`` is."""
        names = {f"{segment(under)}/{segment(name)}": name for name in kept}
        keys, values = [], []
        for key, name in names.items():
            keys.append(name)
            values.append({"t": "array", "a": "torch", "n": key})
        for alias, name in metadata.items():  # tensors that share bytes, as Hugging Face writes them down
            if name in kept and alias not in self._places:
                keys.append(alias)
                key = f"{segment(under)}/{segment(name)}"
                place = f"{segment(under)}/{segment(alias)}"
                values.append({"t": "array", "a": "torch", "n": key, "as": place})
        inner = {"t": "odict", "k": keys, "v": values}
        self.skeleton = {"t": "dict", "k": [under], "v": [inner]}
        return names


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _nothing(pattern: str, names: Sequence[str] | dict[str, Any]) -> InvalidError:
    return InvalidError(
        f"no tensor is named {pattern!r}",
        operation="import",
        path=pattern,
        hint=f"there are: {_some(list(names))}",
    )
