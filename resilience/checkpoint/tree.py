"""State trees: arrays by name, everything else as a JSON skeleton, and back, with nothing lost on the way.

Owns which values can be saved and how each is written down (docs/format.md, "Skeleton"). Keys keep their type
(torch's optimizers use integers), floats their bits, integers any size. Must never pickle, never guess at an
unknown type, and never import torch: its values can only be met where it is loaded already.
"""

from __future__ import annotations

import base64
import math
import re
import struct
import sys
import urllib.parse
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from resilience.checkpoint import arrays as _arrays
from resilience.errors import CorruptError, InvalidError

ALLOWED = (
    "dict, list and tuple; torch, NumPy and JAX arrays; int, float, complex, bool, None, str, bytes; "
    "NumPy scalars; torch.Size, torch.dtype, torch.device; and objects with state_dict"
)
# JSON readers of other languages hold numbers as doubles: integers beyond this are written as text.
_EXACT_INT = 2**53
_SAFE = "._-~@:+=,()[]"  # kept as they are in a segment of a name, besides ASCII letters and digits


def segment(text: str) -> str:
    """``text`` as one segment of an array's name: one to one, and valid in Zarr, URLs and JSON keys."""
    if not text:
        return "%"
    quoted = urllib.parse.quote(text, safe=_SAFE, errors="surrogatepass")
    if set(quoted) == {"."} or quoted == "zarr.json":  # not node names in Zarr
        return quoted.replace(".", "%2E")
    if quoted.startswith("__"):  # reserved by Zarr
        return "%5F" + quoted[1:]
    return quoted


def flatten(state: Any, *, prefix: str) -> tuple[dict[str, Any], Any]:
    """Split ``state`` into arrays by name and a JSON-able skeleton.

    Names are ``prefix`` and the keys on the way, ``/``-separated: ``optimizer/state/0/exp_avg``. The arrays
    are the objects themselves, not copies. An array met twice (tied weights) is returned once; the skeleton
    says where else it belongs.

    Raises:
        InvalidError: a value or key that cannot be saved; names its path and type and what is allowed.
    """
    flattener = _Flattener()
    path = "/".join(segment(part) for part in prefix.split("/")) if prefix else ""
    skeleton = flattener.encode(state, path)
    return flattener.arrays, skeleton


def places(state: Any, *, prefix: str) -> dict[str, tuple[Any, Any]]:
    """Every array of ``state`` by the name of its place, tied ones at each of theirs: ``(what flatten returns for it,
    the object that is there)``. The two differ where an object stands for a shard."""
    flattener = _Flattener()
    path = "/".join(segment(part) for part in prefix.split("/")) if prefix else ""
    skeleton = flattener.encode(state, path)
    return {place: (flattener.arrays[name], flattener.objects[name]) for place, name in leaves(skeleton)}


def unflatten(skeleton: Any, arrays: Mapping[str, Any], ready: Mapping[str, Any] | None = None) -> Any:
    """Rebuild the state from a skeleton and its arrays (NumPy, by name).

    torch and JAX arrays come back as such where their library is loaded, as NumPy otherwise, sharing memory
    with ``arrays`` where that library can. Named tuples come back as tuples: ``fit.apply`` gives them their
    type again. What is in ``ready`` (by name) is put in as it is.

    Raises:
        CorruptError: the skeleton is malformed, or names an array that is not there.
    """
    try:
        return _decode(skeleton, arrays, dict(ready or {}))
    except (KeyError, TypeError, ValueError, IndexError, struct.error) as error:
        raise CorruptError(
            f"the state skeleton cannot be read: {type(error).__name__}: {error}",
            operation="restore",
            hint="restore an older checkpoint; `resilience verify` lists the damaged ones",
        ) from error


def leaves(skeleton: Any) -> Iterator[tuple[str, str]]:
    """All array leaves of a skeleton as ``(name by place, name under which its bytes are saved)``.

    The two differ for an array that is met again elsewhere in the tree.
    """
    stack = [skeleton]
    while stack:
        node = stack.pop()
        if isinstance(node, list):
            stack.extend(reversed(node))
        elif isinstance(node, dict):
            if node["t"] == "array":
                yield str(node.get("as", node["n"])), str(node["n"])
            else:
                values = node.get("v")
                if node["t"] in ("dict", "odict", "tuple", "namedtuple") and isinstance(values, list):
                    stack.extend(reversed(values))


def differences(a: Any, b: Any, path: str = "") -> Iterator[str]:
    """Paths at which two skeletons are not alike."""
    if a == b:
        return
    kinds = isinstance(a, dict) and isinstance(b, dict) and a["t"] == b["t"] and a.get("k") == b.get("k")
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for number, (one, other) in enumerate(zip(a, b, strict=True)):
            yield from differences(one, other, _join(path, str(number)))
    elif kinds and a["t"] in ("dict", "odict", "tuple", "namedtuple") and len(a["v"]) == len(b["v"]):
        names = a["k"] if "k" in a else range(len(a["v"]))
        for name, one, other in zip(names, a["v"], b["v"], strict=True):
            yield from differences(one, other, _join(path, str(name)))
    else:
        yield path or "the state itself"


class _Flattener:
    """One walk over a tree. ``arrays`` fills up as it goes."""

    def __init__(self) -> None:
        self.arrays: dict[str, Any] = {}
        self.objects: dict[str, Any] = {}  # as they were met: what stands for a shard in ``arrays`` is not it
        self._seen: dict[tuple[Any, ...], str] = {}  # identity of an array -> the name it was first met under
        self._open: set[int] = set()  # containers being walked, to refuse a tree that contains itself

    def encode(self, value: Any, path: str) -> Any:
        """The skeleton node of ``value``."""
        if value is None or isinstance(value, bool):
            return value
        kind = _arrays.kind(value)
        if kind is not None:
            node = self._array(value, kind, path)
            self.objects.setdefault(node["n"], value)
            return node
        if isinstance(value, np.generic):
            return _numpy_scalar(value, path)
        if isinstance(value, Mapping | list | tuple):
            return self._container(value, path)
        return _scalar(value, path)

    def _array(self, value: Any, kind: str, path: str) -> Any:
        value = _arrays.localised(value)
        reason = _arrays.refusal(value)
        if reason is not None:
            raise _unsavable(path, value, reason)
        name = path or "value"
        if name in self.arrays:  # cannot happen for keys of one dict; a prefix handed in twice would
            raise _unsavable(path, value, "its name is taken by another array")
        node: dict[str, Any] = {"t": "array", "a": kind}
        identity = _arrays.identity(value)
        if identity is not None and identity in self._seen:
            return {**node, "n": self._seen[identity], "as": name}
        if identity is not None:
            self._seen[identity] = name
        self.arrays[name] = value
        return {**node, "n": name}

    def _container(self, value: Any, path: str) -> Any:
        if id(value) in self._open:
            raise _unsavable(path, value, "it contains itself")
        self._open.add(id(value))
        try:
            if isinstance(value, Mapping):
                return self._mapping(value, path)
            torch = sys.modules.get("torch")
            if torch is not None and isinstance(value, torch.Size):
                return {"t": "size", "v": [int(size) for size in value]}
            items = [self.encode(item, _join(path, str(index))) for index, item in enumerate(value)]
            if isinstance(value, list):
                return items
            if hasattr(value, "_fields"):
                return {"t": "namedtuple", "n": type(value).__name__, "f": list(value._fields), "v": items}
            return {"t": "tuple", "v": items}
        finally:
            self._open.discard(id(value))

    def _mapping(self, value: Mapping[Any, Any], path: str) -> Any:
        texts = {key for key in value if isinstance(key, str)}
        keys: list[Any] = []
        values: list[Any] = []
        for key, item in value.items():
            if key is not None and not isinstance(key, str | int):
                raise _unsavable(_join(path, segment(repr(key))), key, "keys must be str, int, bool or None")
            text = str(key)
            # A key 1 beside a key "1": the string keeps the plain name. No quoted text begins like this one.
            clash = not isinstance(key, str) and text in texts
            name = f"%{type(key).__name__}-{text}" if clash else segment(text)
            keys.append(key if key is None or isinstance(key, bool) else _scalar(key, path))
            values.append(self.encode(item, _join(path, name)))
        return {"t": "odict" if isinstance(value, OrderedDict) else "dict", "k": keys, "v": values}


def _join(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name


def _scalar(value: Any, path: str) -> Any:
    """Plain values. Subclasses (enumerations over int or str) are saved as the value they are equal to."""
    if isinstance(value, int):
        number = int(value)
        return number if abs(number) < _EXACT_INT else {"t": "int", "v": hex(number)}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"t": "float", "v": _bits(value)}
    if isinstance(value, complex):
        return {"t": "complex", "v": [_bits(value.real), _bits(value.imag)]}
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, bytes):
        return {"t": "bytes", "v": base64.b64encode(value).decode()}
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.dtype):
        return {"t": "dtype", "v": str(value).removeprefix("torch.")}
    if torch is not None and isinstance(value, torch.device):
        return {"t": "device", "v": str(value)}
    raise _unsavable(path, value, None)


def _numpy_scalar(value: np.generic[Any], path: str) -> Any:
    if isinstance(value, np.str_):
        return str(value)
    if isinstance(value, np.bytes_):
        return {"t": "bytes", "v": base64.b64encode(bytes(value)).decode()}
    try:
        name, _ = _arrays.describe(np.asarray(value))
    except KeyError:
        raise _unsavable(path, value, None) from None
    return {"t": "scalar", "d": name, "v": np.asarray(value).tobytes().hex()}


def _bits(value: float) -> str:
    return struct.pack(">d", value).hex()


def _from_bits(text: str) -> float:
    return float(struct.unpack(">d", bytes.fromhex(text))[0])


def _decode(node: Any, arrays: Mapping[str, Any], built: dict[Any, Any]) -> Any:
    if isinstance(node, list):
        return [_decode(item, arrays, built) for item in node]
    if not isinstance(node, dict):
        return node
    value = node.get("v")
    torch = sys.modules.get("torch")
    match node["t"]:
        case "array":
            if node["n"] in built:
                return built[node["n"]]
            key = (node["n"], node["a"])
            if key not in built:  # one object for all places, so that what was shared is shared again
                built[key] = _arrays.build(arrays[node["n"]], node["a"])
            return built[key]
        case "dict" | "odict":
            items = zip(node["k"], node["v"], strict=True)
            pairs = [(_decode(key, arrays, built), _decode(item, arrays, built)) for key, item in items]
            return OrderedDict(pairs) if node["t"] == "odict" else dict(pairs)
        case "tuple" | "namedtuple":
            return tuple(_decode(item, arrays, built) for item in node["v"])
        case "int":
            return int(node["v"], 16)
        case "float":
            return _from_bits(node["v"])
        case "complex":
            return complex(_from_bits(node["v"][0]), _from_bits(node["v"][1]))
        case "bytes":
            return base64.b64decode(node["v"], validate=True)
        case "scalar":
            dtype = _arrays.numpy_dtype(node["d"])
            return np.frombuffer(bytes.fromhex(node["v"]), dtype)[0]
        case "size":
            return torch.Size(node["v"]) if torch is not None else tuple(node["v"])
        case "dtype":
            return _torch_dtype(torch, node["v"]) if torch is not None else value
        case "device":
            return torch.device(node["v"]) if torch is not None else value
        case unknown:
            raise ValueError(f"unknown kind of node {unknown!r}")


def _torch_dtype(torch: Any, name: str) -> Any:
    dtype = getattr(torch, name, None) if re.fullmatch(r"[a-z0-9_]+", name) else None
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"torch has no data type {name!r}")
    return dtype


def _unsavable(path: str, value: Any, reason: str | None) -> InvalidError:
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    where = path or "the state itself"
    return InvalidError(
        f"cannot save {where}: type {kind}{': ' + reason if reason else ' is not supported'}",
        operation="save",
        path=path or None,
        hint=f"allowed are {ALLOWED}. Leave the value out of the state, or give its owner "
        "state_dict/load_state_dict that return allowed values",
    )
