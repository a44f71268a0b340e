"""Arrays of other libraries as NumPy views: data types by name, bytes without a copy where memory allows.

Owns the table of data types that can be saved and the two conversions (array -> bytes to copy, bytes ->
array). It never imports torch or JAX: an array of theirs can only exist if they are loaded already. It never
pickles and never guesses: what cannot be saved bit for bit is refused with the reason.
"""

from __future__ import annotations

import sys
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from resilience.checkpoint.shard import Shard

AnyArray = npt.NDArray[Any]

# Zarr v3 name -> NumPy type. The Zarr registry lacks ``float8_e4m3fn``: that is TensorStore's and torch's
# name.
_NATIVE = (
    "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 complex64 complex128"
)
_DTYPES: dict[str, np.dtype[Any]] = {
    **{name: np.dtype(name) for name in _NATIVE.split()},
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e4m3fnuz": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "float8_e5m2fnuz": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "float8_e8m0fnu": np.dtype(ml_dtypes.float8_e8m0fnu),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# Types foreign to NumPy travel as unsigned integers of their size, so that copies are plain memory copies.
_CARRIER: dict[int, np.dtype[Any]] = {1: np.dtype(np.uint8), 2: np.dtype(np.uint16)}


def dtype_names() -> tuple[str, ...]:
    """Names of all data types that can be saved."""
    return tuple(_DTYPES)


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy type of a Zarr data type name; ``KeyError`` if it is not one of ``dtype_names()``."""
    return _DTYPES[name]


def carrier(name: str) -> np.dtype[Any]:
    """The type in which bytes of ``name`` are copied: itself, or an unsigned integer of its size."""
    dtype = _DTYPES[name]
    return dtype if dtype.isbuiltin == 1 else _CARRIER[dtype.itemsize]


def kind(value: Any) -> str | None:
    """``"torch"``, ``"numpy"``, ``"jax"`` (others with DLPack or ``__array__``), or ``None``: no array. Of a
    shard, that of its memory."""
    if isinstance(value, Shard):
        return kind(value.local)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return "torch"
    if isinstance(value, np.ndarray):
        return "numpy"
    if isinstance(value, np.generic) or not hasattr(value, "shape") or not hasattr(value, "dtype"):
        return None
    if hasattr(value, "iloc"):  # pandas: an array plus an index, which would be lost without a word
        return None
    return "jax" if hasattr(value, "__dlpack__") or hasattr(value, "__array__") else None


def localised(value: Any) -> Any:
    """What this rank holds of ``value``: of a DTensor its ``Shard``, without a copy or a collective; anything else as
    it is, and so a DTensor that cannot be saved (``refusal`` says why)."""
    if not _is_dtensor(value):
        return value
    from resilience.integrations.torch_sharding import share_of

    found = share_of(value)
    return value if isinstance(found, str) else found


def _is_dtensor(value: Any) -> bool:
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(value, tensors.DTensor)


def refusal(value: Any) -> str | None:
    """Why the array or shard ``value`` cannot be saved; ``None`` if it can."""
    if isinstance(value, Shard):
        return refusal(value.local)
    if kind(value) == "torch":
        reason = _torch_refusal(value)
        if reason is not None:
            return reason
    try:
        describe(value)
    except KeyError as missing:
        return f"data type {missing.args[0]} is not one of {', '.join(_DTYPES)}"
    return None


def _torch_refusal(tensor: Any) -> str | None:
    torch = sys.modules["torch"]
    if _is_dtensor(tensor):
        from resilience.integrations.torch_sharding import share_of

        found = share_of(tensor)
        return found if isinstance(found, str) else _torch_refusal(found.local)
    if tensor.is_quantized:
        return "a quantized tensor has no exact array form: save int_repr(), scale and zero point"
    if tensor.layout != torch.strided or tensor.is_nested:
        return f"a tensor of layout {tensor.layout} is not dense: save its index and value tensors"
    if tensor.device.type == "meta" or torch.nn.parameter.is_lazy(tensor):
        return "the tensor has no memory yet (meta or lazy): materialise it first"
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return f"tensor subclass {type(tensor).__name__} hides its bytes: save the plain tensors inside it"
    return None


def describe(value: Any) -> tuple[str, tuple[int, ...]]:
    """``(data type name, shape)``, of a shard the whole array's; ``KeyError`` with the name of a data type that
    cannot be saved."""
    if isinstance(value, Shard):
        return describe(value.local)[0], value.shape
    shape = tuple(int(size) for size in value.shape)
    if kind(value) == "torch":
        name = str(value.dtype).removeprefix("torch.")
        if name not in _DTYPES:
            raise KeyError(name)
        return name, shape
    try:
        dtype = np.dtype(value.dtype)
    except TypeError:  # a data type of another library, e.g. JAX's random keys
        raise KeyError(str(value.dtype)) from None
    native = dtype.newbyteorder("=") if dtype.isbuiltin != 2 else dtype
    if native not in _NAMES:
        raise KeyError(str(dtype))
    return _NAMES[native], shape


def identity(value: Any) -> tuple[Any, ...] | None:
    """Where the bytes of ``value`` lie: two arrays of equal identity are the same memory seen the same way.

    ``None`` where that cannot be known (then the array is simply saved on its own) or there are no bytes.
    """
    if isinstance(value, Shard):
        local = identity(value.local)
        return None if local is None else (*local, value.shape, value.boxes)
    name, shape = describe(value)
    match kind(value):
        case "torch":
            if value.numel() == 0 or value.is_conj() or value.is_neg():
                return None
            return (str(value.device), value.data_ptr(), tuple(value.stride()), name, shape)
        case "numpy":
            if value.size == 0 or value.dtype.byteorder == ">":
                return None
            return ("cpu", value.__array_interface__["data"][0], value.strides, name, shape)
        case _:
            return None


def pieces(value: Any) -> list[AnyArray]:
    """What this rank holds of an array, in ``carrier`` type: one NumPy view a box (``ArraySpec.boxes``)."""
    return value.views(raw(value.local)) if isinstance(value, Shard) else [raw(value)]


def raw(value: Any) -> AnyArray:
    """The array as NumPy in ``carrier`` type, little endian, sharing memory where it can.

    Strides are kept: the copy into the arena is the one that makes it contiguous.
    """
    name, _ = describe(value)
    match kind(value):
        case "torch":
            torch = sys.modules["torch"]
            tensor = value.detach().resolve_conj().resolve_neg()
            if tensor.device.type != "cpu":
                # The pinned, asynchronous path is a later issue; this one is correct, not fast.
                tensor = tensor.cpu()
            if _DTYPES[name].isbuiltin != 1:
                tensor = tensor.view(torch.uint8 if _DTYPES[name].itemsize == 1 else torch.int16)
            array = tensor.numpy()
        case "numpy":
            array = value
        case _:
            # DLPack has no bfloat16 in NumPy, and __array__ may copy: both are only ways to reach the bytes.
            array = np.asarray(value) if hasattr(value, "__array__") else np.from_dlpack(value)
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("="))
    return array.view(carrier(name))


def build(array: AnyArray, wanted: str) -> Any:
    """``array`` (in its own data type) as an array of ``wanted`` kind, sharing memory where that library can.

    A kind whose library is not loaded stays NumPy: a reader without torch can still look at a torch state.
    """
    if wanted == "torch" and (torch := sys.modules.get("torch")) is not None:
        name = _NAMES[array.dtype]
        if array.dtype.isbuiltin == 1:
            return torch.from_numpy(array)
        bits = array.view(np.uint8 if array.dtype.itemsize == 1 else np.int16)
        return torch.from_numpy(bits).view(getattr(torch, name))
    if wanted == "jax" and (jnp := sys.modules.get("jax.numpy")) is not None:
        return jnp.asarray(array)
    return array
