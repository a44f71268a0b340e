"""What is saved opens with plain zarr and fsspec, without this package."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from resilience.checkpoint import arrays as dt
from resilience.checkpoint import dtypes, zarr_view
from resilience.checkpoint.catalog import catalog
from resilience.checkpoint.part import Part
from resilience.checkpoint.restore import Source
from resilience.checkpoint.shard import Shard
from resilience.checkpoint.zarr_view import chunk_places, metadata_documents, zarr_metadata
from storage_backends import Storage

Save = Callable[..., list[Source]]
assert dtypes
WHERE = "checkpoints/step-10-g1"
STATE = {
    "model": {
        "f32": np.arange(70, dtype=np.float32).reshape(10, 7) / 3,
        "i64": np.arange(13, dtype=np.int64) - 2**40,
        "scalar": np.array(2.5),
        "empty": np.zeros((0, 3), np.int8),
        "odd name/ü": np.arange(3, dtype=np.complex64),
    },
}


@pytest.fixture
def saved(save: Save, load: Callable[[Source], Part], storage: Storage) -> list[Part]:
    """Two ranks, with the Zarr files beside the packs."""
    model = {**STATE["model"]}
    model["tied"] = model["f32"]
    states = [{"model": model, "own": np.full(4, rank, np.int32)} for rank in range(2)]
    parts = [load(source) for source in save(states, replicated=("model",), chunk_bytes=100)]
    for name, data in zarr_metadata(parts, url=f"{storage.url}/{WHERE}").items():
        storage.create(f"{WHERE}/{name}", data)
    return parts


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """site-packages in which this package is not installed."""
    root = tmp_path / "site"
    root.mkdir()
    for folder in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for item in Path(folder).iterdir():
            own = ("resilience", "_resilience", "__editable__", "chaos", "storage_backends")
            if not item.name.startswith(own) and item.suffix != ".pth" and not (root / item.name).exists():
                (root / item.name).symlink_to(item)
    return root


def run_plain(bare: Path, code: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in an interpreter that cannot import this package."""
    head = f"""
import importlib.util, sys
sys.path.append({str(bare)!r})
for name in ("resilience", "storage_backends", "chaos"):
    assert importlib.util.find_spec(name) is None, name + " is importable"
import numpy as np, zarr
from zarr.storage import FsspecStore
def open_refs(url, **options):
    return zarr.open_group(FsspecStore.from_url("reference://", storage_options={{"fo": url, **options}}), mode="r")
"""
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", head + code, *args],
        cwd=bare,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


READ = """
group = open_refs(sys.argv[1] + "/refs.json")
about = {"run": "run-1", "step": 10, "generation": 1, "world_size": 2, "references": "refs.json"}
assert group.attrs["resilience"] == about
f32, i64 = group["model/f32"], group["model/i64"]
assert f32.dtype == np.float32 and f32.shape == (10, 7)
assert np.array_equal(f32[:], np.arange(70, dtype=np.float32).reshape(10, 7) / 3)
assert np.array_equal(f32[3:8, 2], (np.arange(70, dtype=np.float32).reshape(10, 7) / 3)[3:8, 2])
assert i64.dtype == np.int64
assert np.array_equal(i64[:], np.arange(13, dtype=np.int64) - 2**40)
assert group["model/scalar"][()] == 2.5
assert group["model/empty"].shape == (0, 3) and group["model/empty"][:].size == 0
assert np.array_equal(group["model/tied"][:], f32[:])
assert np.array_equal(group["model/odd%20name%2F%C3%BC"][:], [0, 1, 2])
for rank in range(2):
    assert np.array_equal(group[f"rank-{rank}/own"][:], [rank] * 4)
assert sorted(group) == ["model", "rank-0", "rank-1"]
"""


def test_plain_zarr_reads_it_without_this_package(saved: list[Part], storage: Storage, bare: Path) -> None:
    where = storage.path(WHERE)
    done = run_plain(bare, READ, str(where))
    assert done.returncode == 0, done.stderr


def test_a_moved_checkpoint_opens_with_another_template(
    saved: list[Part], storage: Storage, bare: Path, tmp_path: Path
) -> None:
    where = storage.path(WHERE)
    assert where is not None
    moved = tmp_path / "elsewhere"
    where.rename(moved)
    override = READ.replace(
        'sys.argv[1] + "/refs.json"',
        'sys.argv[1] + "/refs.json", template_overrides={"u": "file://" + sys.argv[1]}',
    )
    done = run_plain(bare, override, str(moved))
    assert done.returncode == 0, done.stderr


DAMAGED = """
group = open_refs(sys.argv[1] + "/refs.json")
try:
    values = group["model/f32"][:]
except Exception as error:
    print("raised", type(error).__name__)
else:
    print("returned", values)
"""


@pytest.mark.parametrize("damage", ["missing pack", "flipped bit", "truncated pack"])
def test_plain_zarr_raises_on_damage(
    saved: list[Part], storage: Storage, bare: Path, edit: Callable[[str, int, bytes], None], damage: str
) -> None:
    """No zeros for a lost pack: the reference filesystem does not take it for an empty chunk."""
    place = dict(chunk_places(catalog(saved)))["model/f32/c/2/0"]
    name = f"{WHERE}/rank-{place.rank}.pack"
    path = storage.path(name)
    assert path is not None
    if damage == "missing pack":
        path.unlink()
    elif damage == "flipped bit":
        edit(name, place.offset + 2, b"\xee")
    else:
        path.chmod(0o644)
        with path.open("r+b") as file:
            file.truncate(place.offset + 3)
    done = run_plain(bare, DAMAGED, str(path.parent))
    assert done.stdout.startswith("raised"), done.stdout + done.stderr


def test_every_document_is_what_zarr_itself_would_write(saved: list[Part]) -> None:
    """zarr-python writes the same metadata for the same arrays; only fields it omits may differ."""
    documents = metadata_documents(catalog(saved), {})
    store = zarr.storage.MemoryStore()
    zarr.create_group(store)
    for name, key in (("f32", "model/f32"), ("scalar", "model/scalar")):
        array = STATE["model"][name]
        mine = json.loads(documents[f"{key}/zarr.json"])
        grid = tuple(mine["chunk_grid"]["configuration"]["chunk_shape"])
        codecs = [zarr.codecs.Crc32cCodec()]
        made = zarr.create_array(
            store, name=key, shape=array.shape, chunks=grid, dtype=array.dtype, compressors=codecs
        )
        theirs = json.loads(json.dumps(made.metadata.to_dict()))
        assert theirs.items() <= mine.items()
    root = json.loads(documents["zarr.json"])
    assert set(root["consolidated_metadata"]["metadata"]) == {
        key.removesuffix("/zarr.json") for key in documents if key != "zarr.json"
    }


def test_every_type_has_valid_metadata(save: Save, load: Callable[[Source], Part], storage: Storage) -> None:
    state = {dtype: np.zeros(3, dt.numpy_dtype(dtype)) for dtype in dt.dtype_names()}
    (source,) = save([state], replicated=tuple(state))
    documents = metadata_documents(catalog([load(source)]), {})
    for dtype in state:
        parsed = zarr.core.metadata.ArrayV3Metadata.from_dict(json.loads(documents[f"{dtype}/zarr.json"]))
        assert parsed.dtype.to_native_dtype() == dt.numpy_dtype(dtype)
        assert parsed.to_dict()["data_type"] == dtype


def test_each_chunk_is_described_once_and_lies_in_its_pack(saved: list[Part]) -> None:
    refs: dict[str, Any] = json.loads(zarr_metadata(saved, url="s3://bucket/x/")["refs.json"])
    assert refs["version"] == 1
    assert refs["templates"] == {"u": "s3://bucket/x"}
    chunks = {key: value for key, value in refs["refs"].items() if isinstance(value, list)}
    ranges = {tuple(value) for key, value in chunks.items() if "/tied/" not in key}
    assert len(ranges) == sum(len(part.chunks) for part in saved)
    sizes = {f"{{{{u}}}}/rank-{part.rank}.pack": part.size for part in saved}
    assert all(offset + length <= sizes[pack] for pack, offset, length in chunks.values())


def test_torch_bfloat16_is_bfloat16_in_zarr(save: Save, load: Callable[[Source], Part]) -> None:
    (source,) = save([{"w": torch.ones(3, dtype=torch.bfloat16)}])
    document = json.loads(metadata_documents(catalog([load(source)]), {})["rank-0/w/zarr.json"])
    assert (document["data_type"], document["codecs"][0]["configuration"]) == (
        "bfloat16",
        {"endian": "little"},
    )


BARE = """
group = zarr.open_group(sys.argv[1], mode="r")
assert group.attrs["resilience"]["references"] == "refs.json"
assert list(group) == [] and "model" not in group
"""


def test_the_directory_itself_shows_no_arrays_whose_chunks_would_read_as_zeros(
    saved: list[Part], storage: Storage, bare: Path
) -> None:
    done = run_plain(bare, BARE, str(storage.path(WHERE)))
    assert done.returncode == 0, done.stderr


def test_boxes_of_any_kind_are_left_out_and_named(save: Save, load: Callable[[Source], Part]) -> None:
    """A chunk that is not listed would read as zeros: half of an array is worse than none."""
    w = np.arange(20, dtype=np.float32)
    states = [
        {"flat": Shard.flat(w[:7], shape=(4, 5), start=0), "whole": w},
        {"flat": Shard.flat(w[7:], shape=(4, 5), start=7), "whole": w},
    ]
    parts = [load(source) for source in save(states, replicated=("whole",))]
    files = zarr_metadata(parts, url="u")
    about = json.loads(files["zarr.json"])["attributes"]["resilience"]
    assert about["irregular"] == ["flat"]
    refs = json.loads(files["refs.json"])["refs"]
    assert "whole/c/0" in refs
    assert not [key for key in refs if key.startswith("flat")]
    assert json.loads(refs["zarr.json"])["attributes"]["resilience"] == about


def test_above_a_number_of_chunks_there_is_no_reference_file(
    save: Save, load: Callable[[Source], Part], monkeypatch: pytest.MonkeyPatch
) -> None:
    (source,) = save([{"w": np.arange(100.0)}], chunk_bytes=80)
    monkeypatch.setattr(zarr_view, "MAX_REFERENCES", 10)
    assert set(zarr_metadata([load(source)], url="u")) == {"zarr.json", "refs.json"}
    monkeypatch.setattr(zarr_view, "MAX_REFERENCES", 9)
    files = zarr_metadata([load(source)], url="u")
    assert set(files) == {"zarr.json"}
    assert json.loads(files["zarr.json"])["attributes"]["resilience"]["references"] is None
