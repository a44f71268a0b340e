"""Imports: runs made from what torch and safetensors wrote, and from our own exports."""

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
import torch.distributed.checkpoint as dcp

from resilience.checkpoint.catalog import places
from resilience.checkpoint.export import export
from resilience.checkpoint.fit import apply
from resilience.checkpoint.importing import ImportResult, import_checkpoint, open_source
from resilience.checkpoint.packs import find_packs
from resilience.checkpoint.restore import Restored, Source, restore
from resilience.checkpoint.store import open_checkpoint
from resilience.checkpoint.tree import unflatten
from resilience.errors import CorruptError, ExhaustedError, InvalidError
from resilience.journal.log import CommitLog
from resilience.journal.records import Kind
from resilience.journal.state import fold
from storage_backends import Storage, open_storage

Save = Callable[..., list[Source]]
WHERE = "checkpoints/step-10-g1"
CREATED = "2026-01-01T00:00:00+00:00"
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def take(source: Path | str, tmp_path: Path, name: str = "taken", **options: Any) -> ImportResult:
    return import_checkpoint(
        str(source), str(tmp_path / "runs"), name, created=CREATED, **{"chunk_bytes": 64, **options}
    )


def again(done: ImportResult, *, world_size: int = 1, rank: int = 0) -> Restored:
    """What a rank of a launch under the run's name restores."""
    root = open_storage(done.url)
    state = fold(CommitLog(root, new_id=str).refresh())
    (checkpoint,) = state.checkpoints
    sources = [Source(p.rank, root, p.name, p.sha256) for p in checkpoint.tiers["shared"].parts]
    return restore(sources, rank=rank, world_size=world_size, step=done.step, generation=done.generation)


def trained() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.5)
    model(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_a_dcp_checkpoint_goes_on_in_a_launch_of_any_size(tmp_path: Path) -> None:
    model, optimizer = trained()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "note": ("x", [1, 2.5])}
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    done = take(tmp_path / "dcp", tmp_path, step=7)
    assert (done.step, done.generation, done.notes) == (7, 1, [])
    for rank in (0, 2):
        got = again(done, world_size=3, rank=rank)
        assert (got.run, got.step) == ("taken", 7)
        saved = unflatten(got.skeleton, got.arrays)
        fresh = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 2))
        other = torch.optim.Adam(fresh.parameters())
        apply(fresh, saved["model"], name="model")
        apply(other, saved["optimizer"], name="optimizer")
        assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), model.parameters(), strict=True))
        assert other.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
        for number, moments in optimizer.state_dict()["state"].items():
            for key, value in moments.items():
                assert torch.equal(other.state_dict()["state"][number][key], value)
        assert saved["note"] == ("x", [1, 2.5])


def test_the_run_is_whole_in_every_way_of_reading(tmp_path: Path) -> None:
    from resilience.checkpoint.verify import verify

    values = {"w": torch.arange(300.0).reshape(30, 10), "half": torch.ones(9, dtype=torch.bfloat16)}
    dcp.save({"model": values}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    done = take(tmp_path / "dcp", tmp_path)
    root = open_storage(done.url)
    assert np.array_equal(open_checkpoint(done.url)["model/w"][:], values["w"])
    (entry,) = fold(CommitLog(root, new_id=str).refresh()).checkpoints
    references = entry.tiers["shared"].parts
    sources = [Source(p.rank, root, p.name, p.sha256) for p in references]
    assert list(verify(sources, step=0, generation=1)) == []
    assert len(find_packs(done.url).entries["model/w"].pieces) > 10
    refs = json.loads(root.read("checkpoints/step-0-g1/refs.json"))["refs"]
    assert "model/w/c/0/0" in refs


def sharded(rank: int, world_size: int, port: int, where: str) -> None:
    """One rank of a real process group that saves DTensors of three shardings."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    mesh = init_device_mesh("cpu", (world_size,))
    w = torch.arange(77.0).reshape(11, 7)
    state = {
        "model": {
            "rows": distribute_tensor(w, mesh, [Shard(0)]),
            "columns": distribute_tensor(w, mesh, [Shard(1)]),
            "same": distribute_tensor(w, mesh, [Replicate()]),
        }
    }
    dcp.save(state, checkpoint_id=where)
    dist.destroy_process_group()


def test_a_sharded_dcp_checkpoint_of_several_ranks(tmp_path: Path) -> None:
    code = f"""
        import importlib.util, socket, sys
        import torch.multiprocessing as mp
        spec = importlib.util.spec_from_file_location("importing_ranks", {__file__!r})
        module = importlib.util.module_from_spec(spec)
        sys.modules["importing_ranks"] = module
        spec.loader.exec_module(module)
        if __name__ == "__main__":
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            mp.start_processes(module.sharded, (3, port, {str(tmp_path / "dcp")!r}), nprocs=3, start_method="fork")
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=150,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    group = open_checkpoint(take(tmp_path / "dcp", tmp_path, chunk_bytes=60).url)
    w = np.arange(77, dtype=np.float32).reshape(11, 7)
    for name in ("rows", "columns", "same"):
        assert np.array_equal(group[f"model/{name}"][:], w), name


def test_tensors_that_do_not_lie_in_order_are_loaded(tmp_path: Path) -> None:
    """A transposed tensor is saved with its strides: no range of the file is a box of it."""
    w = torch.arange(12.0).reshape(3, 4)
    images = torch.arange(96.0).reshape(2, 3, 4, 4).to(memory_format=torch.channels_last)
    dcp.save({"t": w.t(), "i": images, "z": torch.zeros(0, 2)}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    group = open_checkpoint(take(tmp_path / "dcp", tmp_path, under="m").url)
    assert np.array_equal(group["m/t"][:], w.t())
    assert np.array_equal(group["m/i"][:], images)
    assert group["m/z"].shape == (0, 2)


class Anything:
    """A class of the user's own."""


def test_values_that_would_run_code_are_refused_by_name(tmp_path: Path) -> None:
    state = {"w": torch.ones(3), "args": {"lr": 0.1, "config": Anything()}, "scalar": np.float32(1.5)}
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    with pytest.raises(InvalidError, match=r"args\.config is of the class .*Anything") as caught:
        take(tmp_path / "dcp", tmp_path)
    assert "--exclude args.config" in str(caught.value.hint)
    assert not (tmp_path / "runs").exists()  # found before the run was begun
    done = take(tmp_path / "dcp", tmp_path, exclude=["args.config"])
    got = again(done)
    saved = unflatten(got.skeleton, got.arrays)
    assert saved["args"] == {"lr": 0.1}
    assert saved["scalar"] == 1.5
    with pytest.raises(InvalidError, match="nothing in the checkpoint is named 'nope'"):
        take(tmp_path / "dcp", tmp_path, exclude=["nope"])


def test_a_malicious_dcp_checkpoint_is_refused(tmp_path: Path) -> None:
    import pickle

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "pwned"),)

    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(InvalidError, match=r"posix\.mkdir"):
        take(tmp_path / "dcp", tmp_path)
    assert not (tmp_path / "pwned").exists()


def test_a_damaged_dcp_checkpoint(tmp_path: Path) -> None:
    dcp.save({"w": torch.ones(300)}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    (file,) = (tmp_path / "dcp").glob("*.distcp")
    data = file.read_bytes()
    file.write_bytes(data[:-100])
    with pytest.raises(CorruptError, match="data is expected up to"):
        take(tmp_path / "dcp", tmp_path)
    file.write_bytes(data.replace(b"PK\x03\x04", b"XX\x03\x04"))
    with pytest.raises(CorruptError, match="does not hold w"):
        take(tmp_path / "dcp", tmp_path)
    file.unlink()
    with pytest.raises(CorruptError, match="is missing"):
        take(tmp_path / "dcp", tmp_path)


def test_safetensors_become_a_model(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model, _ = trained()
    safetensors.save_file(model.state_dict(), tmp_path / "m.safetensors", metadata={"tied": "0.weight"})
    done = take(tmp_path / "m.safetensors", tmp_path)
    got = again(done, world_size=4, rank=3)
    saved = unflatten(got.skeleton, got.arrays)
    assert saved["model"].pop("tied") is saved["model"]["0.weight"]
    fresh = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 2))
    apply(fresh, saved["model"], name="model")
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), model.parameters(), strict=True))
    other = take(tmp_path / "m.safetensors", tmp_path, "other", under="net", exclude=["1.*"], step=3)
    assert sorted(find_packs(other.url).entries) == ["net/0.bias", "net/0.weight", "net/tied"]
    assert other.step == 3


def test_several_safetensors_files(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    where = tmp_path / "hf"
    where.mkdir()
    safetensors.save_file({"a": torch.ones(3)}, where / "model-1.safetensors")
    safetensors.save_file({"b": torch.zeros(3)}, where / "model-2.safetensors")
    safetensors.save_file({"a": torch.zeros(9)}, where / "consolidated.safetensors")
    with pytest.raises(InvalidError, match="both hold a"):
        take(where, tmp_path)
    index = where / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
    assert sorted(find_packs(take(where, tmp_path).url).entries) == ["model/a", "model/b"]
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-3.safetensors"}}))
    with pytest.raises(CorruptError, match=r"model-3\.safetensors is missing"):
        open_source(str(where))
    index.write_text(json.dumps({"weight_map": {"a": "../m.safetensors"}}))
    with pytest.raises(CorruptError, match="outside"):
        open_source(str(where))
    index.write_text("{")
    with pytest.raises(CorruptError, match="no index"):
        open_source(str(where))


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}},  # the file has 12
        {"a": {"dtype": "F32", "shape": [-3], "data_offsets": [0, -12]}},
        {"a": {"dtype": "F32", "shape": [3], "data_offsets": [-12, 0]}},
        {"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 12]}},
        {"a": 3},
        [],
    ],
)
def test_headers_are_not_believed(tmp_path: Path, header: Any) -> None:
    text = json.dumps(header).encode()
    path = tmp_path / "m.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(12))
    with pytest.raises(CorruptError):
        open_source(str(path))


def test_no_safetensors_file_at_all(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    for data in (b"", b"x" * 100, (1 << 40).to_bytes(8, "little")):
        path.write_bytes(data)
        with pytest.raises(CorruptError):
            open_source(str(path))
    with pytest.raises(InvalidError, match="nothing at"):
        open_source(str(tmp_path / "absent"))
    with pytest.raises(InvalidError, match="no checkpoint that can be imported"):
        open_source(str(tmp_path / ".."))


@pytest.mark.parametrize("to", ["safetensors", "dcp"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_what_we_exported_comes_back(
    save: Save, storage: Storage, tmp_path: Path, to: str, ranks: int
) -> None:
    """All of it from one rank; from several what they hold alike: a rank's random numbers are not everybody's."""
    model, optimizer = trained()
    weights = model.state_dict()
    weights["tied"] = weights["0.weight"]
    states = [
        {"model": weights, "optimizer": optimizer.state_dict(), "rng": np.array([rank]), "epoch": 3}
        for rank in range(ranks)
    ]
    save(states, replicated=("model", "optimizer"))
    export(f"{storage.url}/{WHERE}", str(tmp_path / "out"), to=to)
    done = take(tmp_path / "out", tmp_path)
    got = again(done)
    saved = unflatten(got.skeleton, got.arrays)
    assert ("rng" in saved) == (ranks == 1)
    assert bool(done.notes) == (ranks > 1)
    assert saved["epoch"] == 3
    assert saved["model"]["tied"] is saved["model"]["0.weight"]
    fresh = torch.optim.Adam(trained()[0].parameters())
    apply(fresh, saved["optimizer"], name="optimizer")
    for number, moments in optimizer.state_dict()["state"].items():
        for key, value in moments.items():
            assert torch.equal(fresh.state_dict()["state"][number][key], value)
    if to == "safetensors":
        assert done.step == 10
        paths = {path for path, _ in places(got.skeleton)}
        assert ("optimizer", "param_groups", 0, "betas") in paths


def test_a_run_that_exists_is_not_changed(save: Save, storage: Storage, tmp_path: Path) -> None:
    dcp.save({"w": torch.ones(3)}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    done = take(tmp_path / "dcp", tmp_path)
    before = sorted(str(path) for path in (tmp_path / "runs").rglob("*"))
    with pytest.raises(InvalidError, match="there is a run 'taken' already"):
        take(tmp_path / "dcp", tmp_path)
    assert sorted(str(path) for path in (tmp_path / "runs").rglob("*")) == before
    log = CommitLog(open_storage(str(tmp_path / "runs" / "trained")), new_id=lambda: "x")
    log.fence(1, {"run": "trained", "supervisor": "host/1"})
    with pytest.raises(InvalidError, match="already"):
        take(tmp_path / "dcp", tmp_path, "trained")
    assert done.generation == 1


def test_an_import_that_failed_may_be_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No space in the middle of the pack: no checkpoint, no bytes; the same command later succeeds."""
    from resilience.checkpoint import importing

    dcp.save({"w": torch.arange(100.0)}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    calls = []

    def crc(data: Any) -> int:
        calls.append(data)
        if len(calls) == 4:
            raise ExhaustedError("no space left", operation="write")
        return int(real(data))

    real = importing.crc32c
    monkeypatch.setattr(importing, "crc32c", crc)
    with pytest.raises(ExhaustedError):
        take(tmp_path / "dcp", tmp_path)
    root = open_storage(str(tmp_path / "runs" / "taken"))
    assert root.list("checkpoints") == []
    assert fold(CommitLog(root, new_id=str).refresh()).checkpoints == ()
    done = take(tmp_path / "dcp", tmp_path)
    assert done.generation == 2  # the first one was used up
    records = CommitLog(root, new_id=str).refresh()
    assert [record.kind for record in records] == [Kind.FENCE, Kind.FENCE, Kind.CHECKPOINT]
    assert np.array_equal(open_checkpoint(done.url)["w"][:], np.arange(100.0))


MEMORY = """
    import sys
    from resilience.checkpoint.importing import import_checkpoint

    def peak():
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) << 10

    small, large, runs = sys.argv[1:]
    import_checkpoint(small, runs, "small", created="x", chunk_bytes=4 << 20)
    open("/proc/self/clear_refs", "w").write("5")
    before = peak()
    import_checkpoint(large, runs, "large", created="x", chunk_bytes=4 << 20)
    print(peak() - before)
"""


@pytest.mark.parametrize("kind", ["dcp", "safetensors"])
def test_memory_is_bounded_by_a_chunk(tmp_path: Path, kind: str) -> None:
    """96 MiB in one tensor, in one piece: torch.load would have all of it."""
    for name, rows in (("small", 8), ("large", 3072)):
        state = {"w": torch.zeros(rows, 8192, dtype=torch.int32)}
        if kind == "dcp":
            dcp.save(state, checkpoint_id=tmp_path / name, no_dist=True)
        else:
            pytest.importorskip("safetensors.torch").save_file(state, tmp_path / f"{name}.safetensors")
    end = "" if kind == "dcp" else ".safetensors"
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            textwrap.dedent(MEMORY),
            str(tmp_path / f"small{end}"),
            str(tmp_path / f"large{end}"),
            str(tmp_path / "runs"),
        ],
        capture_output=True,
        text=True,
        timeout=150,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 24 << 20, f"{int(done.stdout) >> 20} MiB"
