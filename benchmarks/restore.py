"""Restoring: cold, beside raw reads and other systems; resharded; its memory; the plan of a large world.

The state is GPT-like: float32 weights and Adam's two moments, 150 tensors of 4 KiB to 64 MiB for each GiB. A
restore begins with the files dropped from the page cache, and ends when the state's own tensors hold the saved bytes,
which is checked. Ratios are of one round: the raw read of the very pack is timed right before.

    python -m benchmarks.restore --gib 2 --directory /a/directory/on/the/disk/to/measure
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import torch
import torch.distributed.checkpoint as dcp

from benchmarks import large_world, report
from benchmarks.checkpoint.machine import drop_cache
from benchmarks.checkpoint.state import State, gpt_state
from resilience.checkpoint.arena import Arena
from resilience.checkpoint.pack import persist
from resilience.checkpoint.part import directory as directory_of
from resilience.checkpoint.part import draft
from resilience.checkpoint.plan import plan, specs
from resilience.checkpoint.restore import Checkpoint, Source, restore_into
from resilience.checkpoint.shard import Shard
from resilience.checkpoint.snapshot import snapshot
from resilience.checkpoint.tree import flatten
from storage_backends import open_storage


def save(state: Any, directory: str, *, rank: int = 0, world_size: int = 1, step: int = 1) -> Source:
    """One rank's share, durable."""
    arrays, skeleton = flatten({"state": state}, prefix="")
    layout = plan(specs(arrays, rank=rank), rank=rank, world_size=world_size)
    part = draft(layout, skeleton, run="benchmark", step=step, generation=1)
    storage = open_storage(directory)
    with Arena.create(2, layout.size) as arena:
        slot = arena.acquire()
        assert slot is not None
        snapshot(arena, slot, arrays, layout, step=step, generation=1)
        with arena.view(slot) as view:
            done = persist(view, part, storage, directory_of(step, 1))
        arena.persisted(slot)
    return Source(rank, storage, done.part_name, done.sha256)


def raw_read(path: str, *, block: int, threads: int) -> float:
    """Seconds to read a file past the page cache, ``threads`` blocks at once."""
    size = os.path.getsize(path) // block * block
    buffers = [
        mmap.mmap(-1, block, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
        for _ in range(threads)
    ]
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)

    def share(index: int) -> None:
        for offset in range(index * block, size, threads * block):
            os.preadv(fd, [buffers[index]], offset)

    try:
        began = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(share, range(threads)))
        return (time.perf_counter() - began) * os.path.getsize(path) / size
    finally:
        os.close(fd)


def sums(state: State) -> dict[str, int]:
    return {
        f"{kind}/{name}": google_crc32c.value(tensor.numpy().reshape(-1).view(np.uint8))
        for kind, tensors in state.items()
        for name, tensor in tensors.items()
    }


def flat(state: State) -> dict[str, torch.Tensor]:
    return {f"{kind}/{name}": tensor for kind, tensors in state.items() for name, tensor in tensors.items()}


def cold(directory: str, state: State, rounds: int) -> dict[str, Any]:
    """Each system once a round, in another order each time, each right after a raw read of our pack."""
    from safetensors.torch import load_file, save_file

    size = sum(tensor.nbytes for tensor in flat(state).values())
    expected = sums(state)
    places = {name: os.path.join(directory, name) for name in ("ours", "torch", "safetensors", "dcp")}
    source = save(state, places["ours"])
    pack = os.path.join(places["ours"], directory_of(1, 1), "rank-0.pack")
    for name in ("torch", "safetensors"):
        os.makedirs(places[name])
    torch.save(state, os.path.join(places["torch"], "state.pt"))
    save_file(flat(state), os.path.join(places["safetensors"], "state.safetensors"))
    dcp.save(dict(state), storage_writer=dcp.FileSystemWriter(places["dcp"]), no_dist=True)
    os.sync()

    def copy(saved: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in flat(state).items():
            tensor.copy_(saved[name])

    def ours(threads: int) -> Callable[[], object]:
        return lambda: restore_into([source], {"state": state}, rank=0, world_size=1, threads=threads)

    systems: dict[str, Callable[[], object]] = {
        "resilience": lambda: restore_into([source], {"state": state}, rank=0, world_size=1),
        **{f"resilience, {n} threads": ours(n) for n in (1, 2, 8)},
        "torch DCP": lambda: dcp.load(
            dict(state), storage_reader=dcp.FileSystemReader(places["dcp"]), no_dist=True
        ),
        "torch.load": lambda: copy(
            flat(torch.load(os.path.join(places["torch"], "state.pt"), weights_only=True))
        ),
        "safetensors": lambda: copy(load_file(os.path.join(places["safetensors"], "state.safetensors"))),
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in systems}
    order = list(systems)
    for number in range(rounds):
        for name in order[number % len(order) :] + order[: number % len(order)]:
            raw = min(raw_read(pack, block=block << 20, threads=2) for block in (4, 16))
            for tensor in flat(state).values():
                tensor.zero_()
            drop_cache(directory)
            cpu = time.process_time()
            began = time.perf_counter()
            systems[name]()
            seconds = time.perf_counter() - began
            found[name].append({"seconds": seconds, "raw_s": raw, "cpu_s": time.process_time() - cpu})
            if sums(state) != expected:
                raise AssertionError(f"{name} brought back something else")
    return {"size": size, "systems": found}


def rows(state: State, rank: int, world_size: int, *, empty: bool) -> dict[str, Shard]:
    """A rank's share of every tensor, cut along the first axis like ``torch.chunk`` (FSDP2)."""
    found = {}
    for name, tensor in flat(state).items():
        side = -(-tensor.shape[0] // world_size)
        low, high = min(rank * side, tensor.shape[0]), min((rank + 1) * side, tensor.shape[0])
        local = torch.zeros_like(tensor[low:high]) if empty else tensor[low:high]
        offset = (low, *[0] * (tensor.dim() - 1))
        found[name] = Shard.at(local, shape=tensor.shape, offset=offset, unit=(side, *tensor.shape[1:]))
    return found


def reshard(directory: str, state: State, rounds: int, changes: list[tuple[int, int]]) -> dict[str, Any]:
    """All ranks of the new world one after the other, beside those of the old world into itself."""
    found = {}
    for before, after in changes:
        place = os.path.join(directory, f"from-{before}")
        sources = [
            save(rows(state, rank, before, empty=False), place, rank=rank, world_size=before)
            for rank in range(before)
        ]
        results: dict[str, list[dict[str, float]]] = {"same": [], "resharded": []}
        for _ in range(rounds):
            results["same"].append(_world(place, sources, state, before))
            results["resharded"].append(_world(place, sources, state, after))
        found[f"{before} to {after}"] = results
        shutil.rmtree(place)
    return found


def _world(place: str, sources: list[Source], state: State, world_size: int) -> dict[str, float]:
    seconds, read, needed = 0.0, 0, 0
    for rank in range(world_size):
        target = rows(state, rank, world_size, empty=True)
        drop_cache(place)
        began = time.perf_counter()
        checkpoint = Checkpoint(sources, rank=rank, world_size=world_size)
        checkpoint.into({"state": target})
        seconds += time.perf_counter() - began
        read += checkpoint.traffic.read
        needed += sum(shard.local.nbytes for shard in target.values())
        for name, shard in rows(state, rank, world_size, empty=False).items():
            if not torch.equal(shard.local, target[name].local):
                raise AssertionError(f"rank {rank} of {world_size} got another {name}")
    return {"seconds": seconds, "read": read, "needed": needed}


def memory(directory: str, state: State) -> dict[str, float]:
    """What a new process grows by while it restores into tensors that are there, in MiB (peak resident size)."""
    source = save(state, os.path.join(directory, "memory"))
    order = {"rank": 0, "storage": source.storage.url, "part": source.part, "sha256": source.sha256}
    shapes = {kind: {name: list(t.shape) for name, t in tensors.items()} for kind, tensors in state.items()}
    command = [sys.executable, "-m", "benchmarks.restore", "--child", json.dumps([order, shapes])]
    found: dict[str, float] = json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout
    )
    return found


def _child(order: dict[str, Any], shapes: dict[str, dict[str, list[int]]]) -> None:
    state = {
        kind: {name: torch.ones(shape) for name, shape in names.items()} for kind, names in shapes.items()
    }
    before = report.peak_bytes()
    restore_into([Source.from_json(order)], {"state": state}, rank=0, world_size=1)
    print(json.dumps({"extra_mib": (report.peak_bytes() - before) / 2**20}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", help="where to write; default: the current directory's disk")
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--only", help="one figure, anew; the others are kept", choices=("cold", "reshard", "memory", "plan")
    )
    parser.add_argument("--out", type=Path, default=report.RESULTS / "restore.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        _child(*json.loads(arguments.child))
        return
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one rank, meant
    where = arguments.directory or os.getcwd()
    directory = tempfile.mkdtemp(prefix="restore-", dir=where)
    state = gpt_state(arguments.gib if arguments.only != "plan" else 0.1)
    measures: dict[str, Callable[[], Any]] = {
        "cold": lambda: cold(directory, state, arguments.rounds),
        "reshard": lambda: reshard(directory, state, arguments.rounds, [(4, 3), (3, 8)]),
        "memory": lambda: memory(directory, state),
        "plan": lambda: large_world.measure(where),
    }
    results: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.only else {}
    note = report.machine("resilience", "torch", "safetensors", "numpy")
    results.update(benchmark="restore", machine=note)
    try:
        for name, measure in measures.items():
            if arguments.only in (None, name):
                results[name] = measure()
                report.write(arguments.out, results)
    finally:
        shutil.rmtree(directory)
    _table(results)


def _table(results: dict[str, Any]) -> None:
    if "cold" in results:
        gb = results["cold"]["size"] / 1e9
        print(f"{gb:.2f} GB cold: {'':12}{'s':>8}{'GB/s':>8}{'of raw':>8}{'cpu s':>8}   (medians)")
        for name, rounds in results["cold"]["systems"].items():
            seconds, cpu = _p50(rounds, "seconds"), _p50(rounds, "cpu_s")
            ratio = report.percentiles([each["raw_s"] / each["seconds"] for each in rounds])["p50"]
            print(f"{name:26}{seconds:8.2f}{gb / seconds:8.2f}{ratio:8.2f}{cpu:8.2f}")
    for name, both in results.get("reshard", {}).items():
        same, other = (
            [each["needed"] / each["seconds"] / 1e9 for each in both[key]] for key in ("same", "resharded")
        )
        read = both["resharded"][0]["read"] / both["resharded"][0]["needed"]
        ratio = report.percentiles([b / a for a, b in zip(same, other, strict=True)])["p50"]
        print(
            f"reshard {name}: read/needed {read:.3f}, {report.percentiles(other)['p50']:.2f} GB/s, "
            f"{ratio:.2f} of a restore into the same shape"
        )
    for key in ("memory", "plan"):
        if key in results:
            print(f"{key}: {json.dumps(results[key])}")


def _p50(rounds: list[dict[str, float]], key: str) -> float:
    return report.percentiles([each[key] for each in rounds])["p50"]


if __name__ == "__main__":
    main()
