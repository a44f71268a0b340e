"""State trees survive the way through JSON and bytes exactly."""

from __future__ import annotations

import collections
import enum
import json
import math
import struct
import subprocess
import sys
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resilience.checkpoint import arrays as dt
from resilience.checkpoint.tree import flatten, leaves, segment, unflatten
from resilience.errors import CorruptError, InvalidError

DTYPES = dt.dtype_names()


def roundtrip(state: Any, prefix: str = "s") -> Any:
    """As through a part and a pack: the skeleton as JSON text, the arrays as raw bytes."""
    arrays, skeleton = flatten(state, prefix=prefix)
    stored = {}
    for name, array in arrays.items():
        dtype, shape = dt.describe(array)
        data = np.ascontiguousarray(dt.raw(array)).tobytes()
        stored[name] = np.frombuffer(bytearray(data), dt.numpy_dtype(dtype)).reshape(shape)
    return unflatten(json.loads(json.dumps(skeleton, allow_nan=False)), stored)


def same(a: Any, b: Any) -> bool:
    """Equal in type and bits, all the way down."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        keys = [(type(k), k) for k in a] == [(type(k), k) for k in b]
        return keys and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b)
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(a, torch.Tensor | np.ndarray):
        return dt.describe(a) == dt.describe(b) and dt.raw(a).tobytes() == dt.raw(b).tobytes()
    if isinstance(a, np.generic):
        return a.dtype == b.dtype and a.tobytes() == b.tobytes()
    return bool(a == b)


@st.composite
def numpy_arrays(draw: st.DrawFn) -> np.ndarray:
    dtype = dt.numpy_dtype(draw(st.sampled_from(DTYPES)))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    count = math.prod(shape)
    data = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
    if dtype.kind == "b":
        data = bytes(byte & 1 for byte in data)
    array = np.frombuffer(bytearray(data), dtype).reshape(shape)
    return array.T if draw(st.booleans()) else array


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.complex_numbers(),
    st.text(st.characters()),
    st.binary(),
    st.builds(np.float32, st.floats(width=32)),
    st.builds(np.uint8, st.integers(0, 255)),
    st.builds(torch.Size, st.lists(st.integers(0, 9), max_size=3)),
    st.sampled_from([torch.bfloat16, torch.int64, torch.device("cpu"), torch.device("cuda", 1)]),
)
keys = st.one_of(
    st.text(), st.integers(), st.booleans(), st.none(), st.sampled_from(["1", 1, "a/b", "..", "c"])
)
trees = st.recursive(
    st.one_of(
        scalars, numpy_arrays(), numpy_arrays().filter(lambda a: a.dtype.isbuiltin == 1).map(torch.tensor)
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(keys, inner, max_size=4),
        st.dictionaries(keys, inner, max_size=3).map(OrderedDict),
    ),
    max_leaves=12,
)


@given(trees)
def test_any_tree_comes_back_exactly(state: Any) -> None:
    """Types of keys, order, float bits, integers of any size, arrays of any type and layout."""
    assert same(roundtrip(state), state)


@given(st.text(), st.text())
def test_segments_are_one_to_one_and_valid_zarr_names(a: str, b: str) -> None:
    """Two keys never share a name, and no name is one that Zarr reserves."""
    assert (segment(a) == segment(b)) == (a == b)
    name = segment(a)
    assert name.isascii()
    assert name
    assert "/" not in name
    assert set(name) != {"."}
    assert not name.startswith("__")
    assert name != "zarr.json"


@pytest.mark.parametrize("dtype", [d for d in DTYPES if hasattr(torch, d)])
def test_torch_types_views_and_aliases(dtype: str) -> None:
    """Every torch type, 0-d, empty, non-contiguous, and a tensor met twice stays one tensor."""
    size = dt.numpy_dtype(dtype).itemsize
    raw = torch.arange(24 * size, dtype=torch.uint8).reshape(4, 6 * size)
    if dtype == "bool":
        raw = raw % 2
    base = raw.view(getattr(torch, dtype))
    state = {
        "t": base.T,
        "strided": base[::2, 1::2],
        "scalar": base[0, 0],
        "empty": base[:0],
        "again": base.T,
    }
    back = roundtrip(state)
    assert same(back, state)
    assert back["again"] is back["t"]
    assert back["strided"].is_contiguous()


def test_lazy_conjugates_and_negations_are_resolved() -> None:
    """torch keeps a conjugation as a bit beside the memory; the saved bytes must hold it."""
    z = torch.tensor([1 + 2j, 3 - 4j])
    state = {"z": z, "conj": z.conj(), "imag": z.conj().imag}
    back = roundtrip(state)
    assert torch.equal(back["conj"], torch.tensor([1 - 2j, 3 + 4j]))
    assert torch.equal(back["imag"], torch.tensor([-2.0, 4.0]))


def test_names_are_key_paths_and_clashing_keys_stay_apart() -> None:
    """Readable names; the key 1 beside the key "1" gets one that no string can have."""
    state = {"w": np.ones(1), 0: {"exp_avg": np.ones(2)}, 1: np.ones(3), "1": np.ones(4), "a/b": [np.ones(5)]}
    arrays, _ = flatten(state, prefix="opt")
    assert list(arrays) == ["opt/w", "opt/0/exp_avg", "opt/%int-1", "opt/1", "opt/a%2Fb/0"]
    assert list(flatten(np.ones(1), prefix="x")[0]) == ["x"]


def test_tied_weights_are_saved_once_and_listed_under_both_names() -> None:
    model = torch.nn.Linear(2, 2)
    arrays, skeleton = flatten({"a": model.weight, "b": model.weight, "c": model.weight.T}, prefix="m")
    assert list(arrays) == ["m/a", "m/c"]
    assert list(leaves(skeleton)) == [("m/a", "m/a"), ("m/b", "m/a"), ("m/c", "m/c")]


def test_optimizer_state_keeps_integer_keys() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    assert same(roundtrip(state), state)


def test_subclasses_become_the_value_they_equal() -> None:
    class Colour(enum.IntEnum):
        RED = 7

    point = collections.namedtuple("point", "x y")
    back = roundtrip({"e": Colour.RED, "p": point(1, np.ones(2)), "d": collections.defaultdict(int, a=1)})
    assert type(back["e"]) is int
    assert back["e"] == 7
    assert type(back["p"]) is tuple
    assert back["d"] == {"a": 1}


class Opaque:
    """Nothing a tree can hold."""


@pytest.mark.parametrize(
    ("state", "path", "kind"),
    [
        ({"a": {"b": Opaque()}}, "m/a/b", "Opaque"),
        ({"f": lambda: 0}, "m/f", "function"),
        ({"s": {1, 2}}, "m/s", "set"),
        ({("x", 1): 2}, "keys must be", "tuple"),
        ({1.5: 2}, "keys must be", "float"),
        ({"o": np.array([object()])}, "m/o", "object"),
        ({"u": np.array(["text"])}, "m/u", "<U4"),
        ({"d": np.array(["2020-01-01"], "datetime64[D]")}, "m/d", "datetime64"),
        ({"q": torch.zeros(2, 2).to_sparse()}, "m/q", "not dense"),
        ({"meta": torch.zeros(2, device="meta")}, "m/meta", "no memory"),
        ({"h": torch.zeros(2, dtype=torch.complex32)}, "m/h", "complex32"),
    ],
)
def test_what_cannot_be_saved_is_named(state: Any, path: str, kind: str) -> None:
    """Key path and type in the message, what is allowed in the hint."""
    with pytest.raises(InvalidError) as caught:
        flatten(state, prefix="m")
    assert path in str(caught.value)
    assert kind in str(caught.value)
    assert "state_dict" in str(caught.value.hint)


def test_a_tree_that_contains_itself_is_refused() -> None:
    state: dict[str, Any] = {}
    state["me"] = [state]
    with pytest.raises(InvalidError, match="contains itself"):
        flatten(state, prefix="m")


class Foreign:
    """An array of a library that speaks only ``__array__``, as JAX arrays do."""

    shape = (2, 2)
    dtype = dt.numpy_dtype("bfloat16")

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return np.arange(4).astype(self.dtype).reshape(2, 2)


def test_foreign_arrays_are_arrays() -> None:
    back = roundtrip({"j": Foreign()})
    assert back["j"].dtype == Foreign.dtype
    assert back["j"].tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    "skeleton",
    [
        {"t": "array", "n": "gone", "a": "numpy"},
        {"t": "pickle", "v": "x"},
        {"v": 1},
        {"t": "dict", "k": ["a"], "v": []},
    ],
)
def test_a_malformed_skeleton_is_corrupt(skeleton: Any) -> None:
    with pytest.raises(CorruptError):
        unflatten(skeleton, {})


def test_torch_is_never_imported() -> None:
    """Reading a torch state where torch is not loaded gives NumPy arrays, and leaves it so."""
    code = """
import sys, numpy as np
from resilience.checkpoint.tree import flatten, unflatten
arrays, skeleton = flatten({"a": np.ones(2), "n": [1, 2.5]}, prefix="x")
skeleton["v"][0]["a"] = "torch"
state = unflatten(skeleton, arrays)
assert type(state["a"]) is np.ndarray
assert "torch" not in sys.modules, "torch was imported"
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
