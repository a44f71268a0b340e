"""bfloat16 and float8 as Zarr data types, by ml_dtypes.

Owns the ``ZDType`` classes and their registration, which happens on import. Entry points make stock zarr-python
import this module by itself where this package is installed: ``zarr.data_type`` is the place meant for it, but
zarr 3.1.6 collects that group and never loads it; ``zarr.buffer`` it does load, before it reads a group's
metadata, so that names this module as well. (A lone array opened as a program's first act needs the import.)
Must stay light: it is imported wherever zarr and this package are.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import ml_dtypes
import numpy as np
from zarr.core.dtype import data_type_registry
from zarr.core.dtype.common import DataTypeValidationError, HasEndianness, HasItemSize
from zarr.core.dtype.wrapper import ZDType


@dataclass(frozen=True, kw_only=True)
class _Float(ZDType[Any, Any], HasItemSize):
    """What all share. Scalars in JSON: a number, ``"NaN"``, ``"Infinity"``, ``"-Infinity"``, or the bits as a
    hexadecimal string (``"0x7fc0"``)."""

    native: ClassVar[np.dtype[Any]]

    @property
    def item_size(self) -> int:
        return self.native.itemsize

    @classmethod
    def from_native_dtype(cls, dtype: np.dtype[Any]) -> Self:
        if dtype == cls.native:
            return cls()
        raise DataTypeValidationError(f"{dtype} is not {cls._zarr_v3_name}")

    def to_native_dtype(self) -> np.dtype[Any]:
        return self.native

    @classmethod
    def _from_json_v2(cls, data: Any) -> Self:
        raise DataTypeValidationError(f"Zarr v2 has no {cls._zarr_v3_name}: {data!r}")

    @classmethod
    def _from_json_v3(cls, data: Any) -> Self:
        if data == cls._zarr_v3_name:
            return cls()
        raise DataTypeValidationError(f"{data!r} is not {cls._zarr_v3_name!r}")

    def to_json(self, zarr_format: Literal[2, 3]) -> Any:
        if zarr_format == 3:
            return self._zarr_v3_name
        raise ValueError(f"Zarr v2 has no {self._zarr_v3_name}")

    def _check_scalar(self, data: object) -> bool:
        return isinstance(data, int | float | np.number | self.native.type)

    def cast_scalar(self, data: object) -> Any:
        if self._check_scalar(data):
            return self.native.type(data)
        raise TypeError(f"{data!r} is not a number that {self._zarr_v3_name} could hold")

    def default_scalar(self) -> Any:
        return self.native.type(0)

    def from_json_scalar(self, data: Any, *, zarr_format: Literal[2, 3]) -> Any:
        if isinstance(data, str) and data.startswith("0x"):
            bits = int(data, 16).to_bytes(self.item_size, "little")
            return np.frombuffer(bits, self.native)[0]
        if isinstance(data, str) and data not in ("NaN", "Infinity", "-Infinity"):
            raise TypeError(f"{data!r} is not a {self._zarr_v3_name}")
        return self.native.type(float(data))

    def to_json_scalar(self, data: object, *, zarr_format: Literal[2, 3]) -> float | str:
        value = self.cast_scalar(data)
        number = float(value)
        if np.isnan(number):
            bits = int.from_bytes(np.asarray(value).tobytes(), "little")
            quiet = int.from_bytes(np.asarray(self.native.type("nan")).tobytes(), "little")
            return "NaN" if bits == quiet else f"0x{bits:0{2 * self.item_size}x}"
        if np.isinf(number):
            return "Infinity" if number > 0 else "-Infinity"
        return number


@dataclass(frozen=True, kw_only=True)
class BFloat16(_Float, HasEndianness):
    """``bfloat16``: the upper half of a float32."""

    _zarr_v3_name = "bfloat16"
    native = np.dtype(ml_dtypes.bfloat16)
    dtype_cls = type(native)

    def to_native_dtype(self) -> np.dtype[Any]:
        if self.endianness == "big":  # ml_dtypes has no swapped types
            raise ValueError("big-endian bfloat16 cannot be represented in NumPy")
        return self.native


@dataclass(frozen=True, kw_only=True)
class Float8E4M3FN(_Float):
    """``float8_e4m3fn``: finite values only and one NaN. TensorStore's name; the Zarr registry has none."""

    _zarr_v3_name = "float8_e4m3fn"
    native = np.dtype(ml_dtypes.float8_e4m3fn)
    dtype_cls = type(native)


@dataclass(frozen=True, kw_only=True)
class Float8E4M3FNUZ(_Float):
    """``float8_e4m3fnuz``: as e4m3fn, without a negative zero (AMD)."""

    _zarr_v3_name = "float8_e4m3fnuz"
    native = np.dtype(ml_dtypes.float8_e4m3fnuz)
    dtype_cls = type(native)


@dataclass(frozen=True, kw_only=True)
class Float8E5M2(_Float):
    """``float8_e5m2``: with infinities and NaNs."""

    _zarr_v3_name = "float8_e5m2"
    native = np.dtype(ml_dtypes.float8_e5m2)
    dtype_cls = type(native)


@dataclass(frozen=True, kw_only=True)
class Float8E5M2FNUZ(_Float):
    """``float8_e5m2fnuz``: as e5m2, finite values only, without a negative zero (AMD)."""

    _zarr_v3_name = "float8_e5m2fnuz"
    native = np.dtype(ml_dtypes.float8_e5m2fnuz)
    dtype_cls = type(native)


@dataclass(frozen=True, kw_only=True)
class Float8E8M0FNU(_Float):
    """``float8_e8m0fnu``: powers of two, scales of microscaled formats. Without a zero: empty is 2**-127."""

    _zarr_v3_name = "float8_e8m0fnu"
    native = np.dtype(ml_dtypes.float8_e8m0fnu)
    dtype_cls = type(native)

    def default_scalar(self) -> Any:
        return np.frombuffer(struct.pack("B", 0), self.native)[0]


for _cls in (BFloat16, Float8E4M3FN, Float8E4M3FNUZ, Float8E5M2, Float8E5M2FNUZ, Float8E8M0FNU):
    data_type_registry.register(_cls._zarr_v3_name, _cls)
