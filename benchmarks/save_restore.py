"""Save and restore of 1 GiB of training state: ``torch.save``, torch DCP and this package, each made durable.

One process, one rank, one state (GPT-like: float32 weights and Adam's two moments, 150 tensors of 4 KiB to
64 MiB). The systems take turns in every round, in another order each time, so that a busy disk hits all alike.
A save ends when the bytes and their directory entry are on the device; a restore begins with the files dropped
from the page cache and ends when the state's own tensors hold the saved bytes, which is checked.

    python -m benchmarks.save_restore --directory /a/directory/on/the/disk/to/measure
"""

from __future__ import annotations

import argparse
import mmap
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed.checkpoint as dcp

from benchmarks import report
from resilience.checkpoint import fit
from resilience.checkpoint.arena import Arena
from resilience.checkpoint.pack import persist
from resilience.checkpoint.part import directory as directory_of
from resilience.checkpoint.part import draft
from resilience.checkpoint.plan import plan
from resilience.checkpoint.restore import Source, restore
from resilience.checkpoint.snapshot import snapshot, specs_of
from resilience.checkpoint.tree import flatten, unflatten
from storage_backends import open_storage

State = dict[str, dict[str, torch.Tensor]]
_BLOCK = 16 << 20


def gpt_state(layers: int = 4, width: int = 1024, hidden: int = 6784, vocabulary: int = 16384) -> State:
    """50 parameters and their two moments: 150 tensors, 1021 MiB. All values differ, so nothing can be left out."""
    shapes: dict[str, tuple[int, ...]] = {"embedding": (vocabulary, width), "norm": (width,)}
    for layer in range(layers):
        block = {
            "qkv": (3 * width, width),
            "out": (width, width),
            "up": (hidden, width),
            "down": (width, hidden),
            "norm1": (width,),
            "norm2": (width,),
        }
        for name, shape in block.items():
            shapes[f"{layer}.{name}.weight"] = shape
            shapes[f"{layer}.{name}.bias"] = shape[:1]
    random = torch.Generator().manual_seed(0)
    return {
        kind: {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
        for kind in ("model", "exp_avg", "exp_avg_sq")
    }


class System(Protocol):
    """One way to save. ``save`` returns further figures, e.g. what training would have waited for."""

    name: str

    def save(self, state: State, directory: str) -> dict[str, float]: ...

    def restore(self, state: State, directory: str) -> None: ...


class TorchSave:
    name = "torch.save"

    def save(self, state: State, directory: str) -> dict[str, float]:
        os.makedirs(directory)
        with open(os.path.join(directory, "checkpoint.pt"), "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        sync_directory(directory)
        return {}

    def restore(self, state: State, directory: str) -> None:
        saved = torch.load(os.path.join(directory, "checkpoint.pt"), weights_only=True)
        for kind, tensors in state.items():
            for name, tensor in tensors.items():
                tensor.copy_(saved[kind][name])


class Dcp:
    name = "torch DCP"

    def save(self, state: State, directory: str) -> dict[str, float]:
        # Its writer fsyncs its files by default; one rank, so no process group.
        dcp.save(dict(state), storage_writer=dcp.FileSystemWriter(directory, sync_files=True), no_dist=True)
        sync_directory(directory)
        return {}

    def restore(self, state: State, directory: str) -> None:
        dcp.load(dict(state), storage_reader=dcp.FileSystemReader(directory), no_dist=True)


class Ours:
    """Arena → snapshot → persist, and back. The arena is made once in a run, so before the first round."""

    name = "resilience"

    def __init__(self, state: State) -> None:
        arrays, _ = flatten({"state": fit.capture(state)}, prefix="")
        self._plan = plan(specs_of(arrays, {"state": state}), rank=0, world_size=1)
        began = time.perf_counter()
        self._arena = Arena.create(2, self._plan.size)
        self.arena_s = time.perf_counter() - began
        self._step = 0
        self._sources: dict[str, Source] = {}

    def save(self, state: State, directory: str) -> dict[str, float]:
        self._step += 1
        began = time.perf_counter()
        arrays, skeleton = flatten({"state": fit.capture(state)}, prefix="")
        slot = self._arena.acquire()
        assert slot is not None
        snapshot(self._arena, slot, arrays, self._plan, step=self._step, generation=1)
        stall = time.perf_counter() - began
        storage = open_storage(directory)
        part = draft(self._plan, skeleton, run="benchmark", step=self._step, generation=1)
        done = persist(self._arena.view(slot), part, storage, directory_of(self._step, 1))
        self._arena.persisted(slot)
        self._sources[directory] = Source(0, storage, done.part_name, done.sha256)
        return {"stall_s": stall}

    def restore(self, state: State, directory: str) -> None:
        source = self._sources[directory]
        got = restore([source], run="benchmark", step=self._step, generation=1, rank=0, world_size=1)
        fit.apply(state, unflatten(got.skeleton, got.arrays)["state"], name="state")

    def close(self) -> None:
        self._arena.close()


def sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def drop_cache(directory: str) -> None:
    """Drop clean pages of all files below (they were synced, so they are clean)."""
    for path in Path(directory).rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


def raw_rates(directory: str, size: int, threads: int = 4) -> dict[str, float]:
    """Seconds to write and to read ``size`` bytes past the page cache, 16 MiB at a time, several at once."""
    path = os.path.join(directory, "raw")
    offsets = range(0, size // _BLOCK * _BLOCK, _BLOCK)
    buffers = [mmap.mmap(-1, _BLOCK) for _ in range(threads)]
    for buffer in buffers:
        buffer.write(os.urandom(_BLOCK))

    def each(action: Callable[[int, mmap.mmap, int], object], flags: int) -> float:
        fd = os.open(path, flags | os.O_DIRECT, 0o600)
        try:
            began = time.perf_counter()
            with ThreadPoolExecutor(threads) as pool:

                def share(index: int) -> None:
                    for offset in offsets[index::threads]:
                        action(fd, buffers[index], offset)

                list(pool.map(share, range(threads)))
            os.fsync(fd)
            return time.perf_counter() - began
        finally:
            os.close(fd)

    try:
        write = each(lambda fd, buffer, at: os.pwrite(fd, buffer, at), os.O_WRONLY | os.O_CREAT)
        read = each(lambda fd, buffer, at: os.preadv(fd, [buffer], at), os.O_RDONLY)
    finally:
        os.unlink(path)
        for buffer in buffers:
            buffer.close()
    return {"write_s": write, "read_s": read, "size": len(offsets) * _BLOCK}


def measure(directory: str, rounds: int, state: State) -> dict[str, Any]:
    size = sum(t.nbytes for tensors in state.values() for t in tensors.values())
    target = {
        kind: {name: torch.zeros_like(t) for name, t in tensors.items()} for kind, tensors in state.items()
    }
    ours = Ours(state)
    systems: list[System] = [TorchSave(), Dcp(), ours]
    raw: dict[str, list[dict[str, float]]] = {system.name: [] for system in systems}
    device: list[dict[str, float]] = []
    try:
        for number in range(rounds):
            device.append(raw_rates(directory, size))
            for system in systems[number % 3 :] + systems[: number % 3]:
                raw[system.name].append(
                    _round(system, state, target, os.path.join(directory, f"round-{number}"))
                )
                print(f"  round {number + 1}: {system.name}: {raw[system.name][-1]}", flush=True)
    finally:
        ours.close()
    return {"size": size, "arena_s": ours.arena_s, "device": device, "systems": raw}


def _round(system: System, state: State, target: State, directory: str) -> dict[str, float]:
    for tensors in target.values():
        for tensor in tensors.values():
            tensor.zero_()
    began = time.perf_counter()
    further = system.save(state, directory)
    save = time.perf_counter() - began
    drop_cache(directory)
    began = time.perf_counter()
    system.restore(target, directory)
    seconds = time.perf_counter() - began
    for kind, tensors in state.items():
        for name, tensor in tensors.items():
            if not torch.equal(tensor, target[kind][name]):
                raise AssertionError(f"{system.name} brought back another {kind}/{name}")
    shutil.rmtree(directory)
    return {"save_s": save, "restore_s": seconds, **further}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", help="where to write; default: the current directory's disk")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=4, help="of the state; 4 makes 1 GiB")
    parser.add_argument("--out", type=Path, default=report.RESULTS / "save_restore.json")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one rank, meant
    note = report.machine("resilience", "torch", "numpy")
    directory = tempfile.mkdtemp(prefix="save-restore-", dir=arguments.directory or os.getcwd())
    try:
        results = measure(directory, arguments.rounds, gpt_state(arguments.layers))
    finally:
        shutil.rmtree(directory)
    report.write(arguments.out, {"benchmark": "save_restore", "machine": note, **results})
    _table(results)


def _table(results: dict[str, Any]) -> None:
    gib = results["size"] / 2**30
    print(f"{gib:.2f} GiB, median of {len(results['device'])}; training waits for 'stall'")
    print(f"{'':14}{'save s':>9}{'GiB/s':>8}{'stall s':>9}{'restore s':>11}{'GiB/s':>8}")

    def median(values: list[dict[str, float]], key: str) -> float:
        return report.percentiles([value[key] for value in values])["p50"]

    for name, values in results["systems"].items():
        save, back = median(values, "save_s"), median(values, "restore_s")
        stall = median(values, "stall_s") if "stall_s" in values[0] else save
        print(f"{name:14}{save:9.2f}{gib / save:8.2f}{stall:9.2f}{back:11.2f}{gib / back:8.2f}")
    write, read = median(results["device"], "write_s"), median(results["device"], "read_s")
    print(f"{'raw O_DIRECT':14}{write:9.2f}{gib / write:8.2f}{'':9}{read:11.2f}{gib / read:8.2f}")


if __name__ == "__main__":
    main()
