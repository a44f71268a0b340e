"""Exports, read back with the packages that others read them with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from resilience.checkpoint import arrays as dt
from resilience.checkpoint.export import export, select
from resilience.checkpoint.export_safetensors import DTYPES
from resilience.checkpoint.packs import find_packs
from resilience.checkpoint.restore import Source
from resilience.checkpoint.shard import Shard
from resilience.errors import CorruptError, InvalidError
from storage_backends import Storage

Save = Callable[..., list[Source]]
WHERE = "checkpoints/step-10-g1"
W = torch.arange(1, 61, dtype=torch.float32).reshape(12, 5)
ROOT = Path(__file__).parents[2]


def trained() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    return model, optimizer


def three_ranks() -> list[dict[str, Any]]:
    """Flat ranges and column shards, replicated state with tied weights, state of single ranks, plain values."""
    model, optimizer = trained()
    columns = [(0, 2), (2, 3), (3, 5)]
    ranges = [(0, 13), (13, 41), (41, 60)]
    states = []
    for rank in range(3):
        first, last = columns[rank]
        start, stop = ranges[rank]
        states.append(
            {
                "sharded": {
                    "flat": Shard.flat(W.ravel()[start:stop], shape=(12, 5), start=start),
                    "columns": Shard.at(W[:, first:last], shape=(12, 5), offset=(0, first)),
                },
                "model": {
                    "w": model.weight,
                    "tied": model.weight,
                    "half": W.bfloat16(),
                    "none": torch.zeros(0, 3),
                    "scalar": torch.tensor(2.5),
                },
                "optimizer": optimizer.state_dict(),
                "own": np.array([rank]),
                "epoch": 3,
                "loader": {"seed": rank},
            }
        )
    return states


@pytest.fixture
def saved(save: Save, storage: Storage) -> str:
    save(three_ranks(), replicated=("model", "optimizer"), chunk_bytes=64)
    return f"{storage.url}/{WHERE}"


def test_safetensors(saved: str, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    done = export(saved, str(tmp_path / "out"), to="safetensors")
    found = safetensors.load_file(tmp_path / "out" / "model.safetensors")
    model, optimizer = trained()
    assert torch.equal(found["sharded.flat"], W)
    assert torch.equal(found["sharded.columns"], W)
    assert found["model.half"].dtype == torch.bfloat16
    assert torch.equal(found["model.half"], W.bfloat16())
    assert torch.equal(found["model.w"], model.weight)
    assert found["model.none"].shape == (0, 3)
    assert found["model.scalar"] == 2.5
    assert torch.equal(found["optimizer.state.1.exp_avg"], optimizer.state_dict()["state"][1]["exp_avg"])
    assert [int(found[f"rank-{rank}.own"]) for rank in range(3)] == [0, 1, 2]
    with pytest.importorskip("safetensors").safe_open(done.path + "/model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert metadata["model.tied"] == "model.w"  # as Hugging Face writes down what is shared
    assert json.loads(metadata["resilience"])["step"] == 10
    values = json.loads(metadata["resilience.state"])["values"]
    assert values["epoch"] == 3
    assert values["rank-2.loader.seed"] == 2
    assert values["optimizer.param_groups.0.params"] == [0, 1]
    assert done.notes == ["model.tied shares its bytes with model.w, and is only named in __metadata__"]


def test_safetensors_of_every_data_type(save: Save, storage: Storage, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    kept = [name for name in dt.dtype_names() if name in DTYPES]
    state = {
        name: np.frombuffer(bytes(range(16, 48)), dt.carrier(name)).view(dt.numpy_dtype(name))
        for name in kept
        if name != "bool"
    }
    save([state])
    export(f"{storage.url}/{WHERE}", str(tmp_path / "all.safetensors"), to="safetensors")
    found = safetensors.load_file(tmp_path / "all.safetensors")
    assert set(found) == set(state)
    for name, values in state.items():
        assert found[name].dtype == getattr(torch, name)
        assert found[name].view(torch.uint8).numpy().tobytes() == values.tobytes()


def test_safetensors_lacks_a_data_type(save: Save, storage: Storage, tmp_path: Path) -> None:
    save([{"ok": np.zeros(3), "wide": np.zeros(3, np.complex128)}])
    url = f"{storage.url}/{WHERE}"
    with pytest.raises(InvalidError, match="complex128: rank-0/wide"):
        export(url, str(tmp_path / "out"), to="safetensors")
    assert not (tmp_path / "out").exists()
    export(url, str(tmp_path / "out"), to="safetensors", exclude=["wide"])


def test_safetensors_in_several_files_with_an_index(saved: str, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    done = export(
        saved, str(tmp_path / "out"), to="safetensors", include=["model"], strip="model", max_file_bytes=130
    )
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == done.size
    found = {}
    for name, file in index["weight_map"].items():
        assert file in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
        found[name] = safetensors.load_file(tmp_path / "out" / file)[name]
    assert set(found) == {"w", "half", "none", "scalar"}
    assert torch.equal(found["half"], W.bfloat16())
    assert len(os.listdir(tmp_path / "out")) == done.files == 3


def test_zarr_opens_without_this_package(saved: str, tmp_path: Path) -> None:
    """In zarr-python (bfloat16 left out: it has no such type by itself) and, with it, in TensorStore."""
    export(saved, str(tmp_path / "out"), to="zarr", exclude=["model/half"])
    code = f"""
        import sys, numpy as np, zarr
        assert "resilience" not in sys.modules
        group = zarr.open_group({str(tmp_path / "out")!r}, mode="r")
        w = np.arange(1, 61, dtype=np.float32).reshape(12, 5)
        assert group.attrs["resilience"]["step"] == 10
        for name in ("flat", "columns"):
            assert np.array_equal(group["sharded"][name][:], w), name
        assert np.array_equal(group["model/tied"][:], group["model/w"][:])
        assert group["model/none"].shape == (0, 3) and group["model/scalar"][()] == 2.5
        assert [int(group[f"rank-{{rank}}/own"][0]) for rank in range(3)] == [0, 1, 2]
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        check=False,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )
    assert done.returncode == 0, done.stderr


def test_zarr_opens_in_tensorstore(saved: str, tmp_path: Path) -> None:
    tensorstore = pytest.importorskip("tensorstore")
    export(saved, str(tmp_path / "out"), to="zarr")

    def read(name: str) -> Any:
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{tmp_path}/out/{name}/"}}
        return tensorstore.open(spec, read=True).result().read().result()

    assert np.array_equal(read("sharded/flat"), W)
    half = read("model/half")
    assert half.dtype.name == "bfloat16"
    assert np.array_equal(half.astype(np.float32), W.bfloat16().float())
    (chunk,) = [p for p in (tmp_path / "out/model/half/c").rglob("*") if p.name == "0" and "c/0/" in str(p)]
    data = bytearray(chunk.read_bytes())
    data[0] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(ValueError, match=r"CRC|checksum|Digest"):
        read("model/half")


def test_zarr_holds_the_same_as_the_checkpoint(saved: str, tmp_path: Path) -> None:
    from resilience.checkpoint.store import open_checkpoint

    export(saved, str(tmp_path / "out"), to="zarr")
    ours, plain = open_checkpoint(saved), zarr.open_group(str(tmp_path / "out"), mode="r")
    names = [name for name, item in ours.members(max_depth=None) if isinstance(item, zarr.Array)]
    assert names == [name for name, item in plain.members(max_depth=None) if isinstance(item, zarr.Array)]
    for name in names:
        assert np.array_equal(ours[name][...], plain[name][...])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_dcp_loads_into_a_state_of_the_same_names(saved: str, tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    export(saved, str(tmp_path / "out"), to="dcp")
    model, optimizer = trained()
    fresh = torch.optim.Adam(model.parameters(), lr=9.0).state_dict()
    fresh["state"] = {0: {"step": torch.tensor(0.0), "exp_avg": torch.zeros(3, 4)}}
    state: dict[str, Any] = {
        "sharded": {"flat": torch.zeros(12, 5), "columns": torch.zeros(12, 5)},
        "model": {
            "w": torch.zeros(3, 4),
            "tied": torch.zeros(3, 4),
            "half": torch.zeros(12, 5, dtype=torch.bfloat16),
            "none": torch.zeros(0, 3),
            "scalar": torch.tensor(0.0),
        },
        "optimizer": fresh,
        "epoch": 0,
        "rank-1": {"own": torch.zeros(1, dtype=torch.int64), "loader": {"seed": None}},
    }
    reader = dcp.FileSystemReader(tmp_path / "out")
    dcp.load(state, storage_reader=reader, no_dist=True)
    assert torch.equal(state["sharded"]["flat"], W)
    assert torch.equal(state["sharded"]["columns"], W)
    assert torch.equal(state["model"]["half"], W.bfloat16())
    assert torch.equal(state["model"]["w"], model.weight)
    assert torch.equal(state["model"]["tied"], model.weight)
    assert state["model"]["scalar"] == 2.5
    assert torch.equal(
        state["optimizer"]["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"]
    )
    assert state["optimizer"]["param_groups"] == optimizer.state_dict()["param_groups"]
    assert (state["epoch"], state["rank-1"]["loader"]["seed"], int(state["rank-1"]["own"])) == (3, 1, 1)
    chunks = reader.read_metadata().state_dict_metadata["sharded.columns"].chunks
    assert len(chunks) > 3  # one for each piece: nothing was put together in memory


@pytest.mark.parametrize("to", ["safetensors", "zarr", "dcp"])
def test_a_damaged_chunk_ends_the_export_and_nothing_is_there(
    saved: str, storage: Storage, edit: Callable[[str, int, bytes], None], tmp_path: Path, to: str
) -> None:
    out = tmp_path / "exports"
    out.mkdir()
    edit(f"{WHERE}/rank-1.pack", 4096, b"\x99")
    with pytest.raises(CorruptError, match="CRC32C"):
        export(saved, str(out / "x"), to=to)
    assert os.listdir(out) == []
    storage.delete(f"{WHERE}/rank-1.pack")
    with pytest.raises(CorruptError):
        export(saved, str(out / "x"), to=to)
    assert os.listdir(out) == []


@pytest.mark.parametrize("to", ["safetensors", "zarr", "dcp"])
def test_an_export_may_be_replaced_by_one_of_its_kind(saved: str, tmp_path: Path, to: str) -> None:
    out = str(tmp_path / "out")
    export(saved, out, to=to, include=["sharded"])
    with pytest.raises(InvalidError, match="exists"):
        export(saved, out, to=to)
    first = sorted(os.listdir(out))
    done = export(saved, out, to=to, include=["model"], overwrite=True)
    assert done.arrays >= 4
    assert os.listdir(tmp_path / "store" / "run-1" / "checkpoints") == ["step-10-g1"]
    other = {"safetensors": "zarr", "zarr": "dcp", "dcp": "safetensors"}[to]
    with pytest.raises(InvalidError, match="other things"):
        export(saved, out, to=other, overwrite=True)
    with pytest.raises(InvalidError, match="other things"):  # a checkpoint is no export, Zarr file or not
        export(saved, saved.removeprefix("file://"), to=to, overwrite=True)
    assert first


def test_names_and_patterns(saved: str) -> None:
    packs = find_packs(saved)

    def names(*include: str, exclude: tuple[str, ...] = (), strip: str | None = None) -> list[str]:
        return [item.name for item in select(packs, include, exclude, strip).items]

    assert names("model") == ["model.w", "model.tied", "model.half", "model.none", "model.scalar"]
    assert names("model/*", exclude=("model/tied", "*/none"), strip="model") == ["w", "half", "scalar"]
    assert names("rank-2") == ["rank-2.own"]
    moments = [f"optimizer.state.0.{key}" for key in ("step", "exp_avg", "exp_avg_sq")]
    assert sorted(names("*/state/0")) == sorted(moments)
    with pytest.raises(InvalidError, match="'modle'") as caught:
        names("modle")
    assert "did you mean model" in str(caught.value.hint)
    with pytest.raises(InvalidError, match="no array is left"):
        names("model", exclude=("model",))
    with pytest.raises(InvalidError, match="below 'optim'"):
        names("model", strip="optim")
    chosen = select(packs, ["model"])
    assert chosen.values == {}  # values of objects that are left out stay out
    assert ("optimizer", "param_groups", 0, "lr") in select(packs, ["optimizer"]).values


def test_two_arrays_of_one_name(save: Save, storage: Storage) -> None:
    save([{"a.b": np.zeros(2), "a": {"b": np.zeros(3)}}])
    with pytest.raises(InvalidError, match=r"would both be named 'a\.b'"):
        select(find_packs(f"{storage.url}/{WHERE}"))


def test_an_unknown_format(saved: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidError, match="no format 'tensors'") as caught:
        export(saved, str(tmp_path / "x"), to="tensors")
    assert "safetensors" in str(caught.value.hint)


def test_dcp_without_torch(saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InvalidError, match="needs the package torch") as caught:
        export(saved, str(tmp_path / "x"), to="dcp")
    assert "resilience[torch]" in str(caught.value.hint)


MEMORY = """
    import sys
    from resilience.checkpoint.export import export

    def peak():
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) << 10

    small, large, out, to = sys.argv[1:]
    export(small, out + "-small", to=to)  # whatever is loaded once is loaded now
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
    before = peak()
    export(large, out + "-large", to=to)
    print(peak() - before)
"""


@pytest.mark.parametrize("to", ["safetensors", "zarr", "dcp"])
@pytest.mark.parametrize("layout", ["rows", "flat", "columns"])
def test_memory_is_bounded_by_the_largest_chunk(
    save: Save, storage: Storage, tmp_path: Path, to: str, layout: str
) -> None:
    """96 MiB in pieces of 4 MiB, in a process of its own: a few pieces at the most.

    For Zarr boxes are put together, and some pieces are remembered meanwhile (``packs._KEPT``).
    """
    rows, columns, mib = 3072, 8192, 1 << 20
    values = np.random.default_rng(0).integers(0, 1 << 30, (rows, columns), np.int32)
    for name, count in (("small", 64), ("large", rows)):
        part = values[:count]
        third = part.size // 3 + 1
        cuts = [(0, 2000), (2000, 5000), (5000, columns)]
        states: list[dict[str, Any]] = [{"w": part}]
        if layout == "flat":
            flat = part.ravel()
            states = [
                {"w": Shard.flat(flat[r * third : (r + 1) * third], shape=part.shape, start=r * third)}
                for r in range(3)
            ]
        elif layout == "columns":
            states = [{"w": Shard.at(part[:, a:b], shape=part.shape, offset=(0, a))} for a, b in cuts]
        from storage_backends import open_storage

        save(states, chunk_bytes=4 * mib, to=open_storage(str(tmp_path / name)))
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            textwrap.dedent(MEMORY),
            str(tmp_path / "small" / WHERE),
            str(tmp_path / "large" / WHERE),
            str(tmp_path / "out"),
            to,
        ],
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    bound = 56 if to == "zarr" and layout != "rows" else 20
    assert int(done.stdout) < bound * mib, f"{int(done.stdout) / mib:.0f} MiB"
