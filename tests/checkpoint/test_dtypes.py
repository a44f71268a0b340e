"""bfloat16 and float8 in zarr: bit-exact, and known wherever this package is installed."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import zarr
from zarr.core.dtype.common import DataTypeValidationError

from resilience.checkpoint import arrays as dt
from resilience.checkpoint import dtypes

ROOT = Path(__file__).parents[2]
FOREIGN = [name for name in dt.dtype_names() if dt.numpy_dtype(name).isbuiltin != 1]


@pytest.mark.parametrize("name", FOREIGN)
def test_every_bit_pattern_survives_zarr(name: str) -> None:
    dtype = dt.numpy_dtype(name)
    bits = np.arange(1 << (8 * dtype.itemsize), dtype=dt.carrier(name))
    store = zarr.storage.MemoryStore()
    array = zarr.create_array(store, shape=bits.shape, chunks=(100,), dtype=dtype, compressors=None)
    array[:] = bits.view(dtype)
    again = zarr.open_array(store, mode="r")
    assert again.dtype == dtype
    assert again.metadata.to_dict()["data_type"] == name
    assert np.array_equal(np.asarray(again[:]).view(bits.dtype), bits)


@pytest.mark.parametrize("name", FOREIGN)
def test_scalars_in_json(name: str) -> None:
    kind = zarr.dtype.parse_dtype(name, zarr_format=3)
    native = dt.numpy_dtype(name)
    for bits in range(256):
        value = np.array([bits], dt.carrier(name)).view(native)[0]
        back = kind.from_json_scalar(kind.to_json_scalar(value, zarr_format=3), zarr_format=3)
        assert np.asarray(back).tobytes() == np.asarray(value).tobytes()
    with pytest.raises(TypeError):
        kind.cast_scalar("text")
    with pytest.raises(TypeError):
        kind.from_json_scalar("text", zarr_format=3)
    with pytest.raises(ValueError):
        kind.to_json(zarr_format=2)
    with pytest.raises(DataTypeValidationError):
        type(kind).from_json({"name": "<V2", "object_codec_id": None}, zarr_format=2)


def test_big_endian_is_refused() -> None:
    with pytest.raises(ValueError, match="big-endian"):
        dtypes.BFloat16(endianness="big").to_native_dtype()


def test_installing_is_enough_for_stock_zarr(tmp_path: Path) -> None:
    """The entry points of pyproject.toml, as pip writes them, and a program that never names this package.

    zarr 3.1.6 never loads the group ``zarr.data_type``; it loads ``zarr.buffer`` when it opens a group.
    """
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    wanted = {group: entries for group, entries in groups.items() if group.startswith("zarr.")}
    info = tmp_path / "resilience_types-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: resilience-types\nVersion: 1\n")
    lines = [f"[{g}]\n" + "".join(f"{k} = {v}\n" for k, v in e.items()) for g, e in wanted.items()]
    (info / "entry_points.txt").write_text("\n".join(lines))
    store = tmp_path / "group.zarr"
    dtype = dt.numpy_dtype("bfloat16")
    made = zarr.create_group(str(store)).create_array("w", shape=(5,), dtype=dtype, compressors=None)
    made[:] = np.arange(5).astype(dtype)
    zarr.consolidate_metadata(str(store))
    code = """
import sys, zarr
array = zarr.open_group(sys.argv[1], mode="r")["w"]
assert array.dtype.name == "bfloat16", array.dtype
print(array[:].astype(float).tolist())
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(store)],
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": "/usr/bin:/bin"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.strip() == "[0.0, 1.0, 2.0, 3.0, 4.0]", done.stderr
