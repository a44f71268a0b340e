"""One rank of a large world finds out what to read: 10,000 ranks, 1,000 arrays, parts as ranks write them.

The parts are generated (the real ``plan`` and ``draft``, CRCs made up), all of them, into files; a new process then
opens the checkpoint and plans its reads, without the data: as a rank of the same world and of 8,000, with arrays that
are sharded and with arrays that are replicated. Called by ``benchmarks.restore``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks import report
from resilience.checkpoint.part import Part, draft, sha256
from resilience.checkpoint.plan import ALIGN, plan, specs
from resilience.checkpoint.restore import Checkpoint, Source
from resilience.checkpoint.shard import Shard
from resilience.checkpoint.tree import flatten
from storage_backends import open_storage

ROWS, COLUMNS = 40_000, 64  # of each array: 4 rows, 1 KiB, for each of 10,000 ranks


def shards(rank: int, world_size: int, arrays: int) -> dict[str, Shard]:
    side = -(-ROWS // world_size)
    low, high = min(rank * side, ROWS), min((rank + 1) * side, ROWS)
    local = np.zeros((high - low, COLUMNS), np.float32)
    return {
        f"layer.{number}.weight": Shard.at(
            local.copy(), shape=(ROWS, COLUMNS), offset=(low, 0), unit=(side, COLUMNS)
        )
        for number in range(arrays)
    }


def generate(directory: str, ranks: int, arrays: int, *, replicated: bool) -> None:
    """All parts, and the order that a rank gets, as ``order.json``."""
    storage = open_storage(directory)
    order = []
    for part in _parts(ranks, arrays, replicated=replicated):
        data = part.encode()
        path = storage.path(part.name)
        assert path is not None
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)  # not fsynced: thrown away in a minute
        order.append({"rank": part.rank, "storage": storage.url, "part": part.name, "sha256": sha256(data)})
    with open(os.path.join(directory, "order.json"), "w") as file:
        json.dump(order, file)


def _parts(ranks: int, arrays: int, *, replicated: bool) -> Iterator[Part]:
    """As each rank's plan says. Rank 0's is computed, and another's where it differs in more than its rows."""
    first = _part(0, ranks, arrays, replicated=replicated)
    for rank in range(ranks):
        if replicated:
            # One array is one chunk, and has one owner: of more ranks than arrays, the others own none.
            own = rank < arrays
            empty = replace(first, rank=rank, chunks=(), size=ALIGN)
            yield _part(rank, ranks, arrays, replicated=True) if own else empty
        else:
            side = ROWS // ranks
            chunks = (replace(chunk, box_offset=(rank * side, 0)) for chunk in first.chunks)
            yield replace(first, rank=rank, chunks=tuple(chunks))


def _part(rank: int, ranks: int, arrays: int, *, replicated: bool) -> Part:
    state: dict[str, Any] = (
        {f"layer.{number}.weight": np.zeros((16, COLUMNS), np.float32) for number in range(arrays)}
        if replicated
        else shards(rank, ranks, arrays)
    )
    leaves, skeleton = flatten({"model": state, "epoch": 3}, prefix="")
    marked = ("model",) if replicated else ()
    layout = plan(specs(leaves, marked, rank=rank), rank=rank, world_size=ranks)
    made = draft(layout, skeleton, run="large", step=1, generation=1)
    return made.with_crcs([number * 7919 for number in range(len(made.chunks))])


def child(directory: str, rank: int, world_size: int, arrays: int, *, replicated: bool) -> None:
    """Plans what one rank reads; prints seconds, peak memory and how many parts it looked at."""
    if replicated:
        state: dict[str, Any] = {
            f"layer.{number}.weight": np.zeros((16, COLUMNS), np.float32) for number in range(arrays)
        }
    else:
        state = shards(rank, world_size, arrays)
    with open(os.path.join(directory, "order.json")) as file:
        text = file.read()
    began = time.perf_counter()
    checkpoint = Checkpoint(Source.all_from_json(json.loads(text)), rank=rank, world_size=world_size)
    jobs = checkpoint.prepare({"model": state})
    seconds = time.perf_counter() - began
    takes = sum(len(job.takes) for job in jobs)
    found = {"seconds": seconds, "peak_mb": report.peak_bytes() / 1e6, "packs": len(jobs), "chunks": takes}
    print(json.dumps(found))


def measure(directory: str, *, ranks: int = 10_000, arrays: int = 1_000) -> dict[str, Any]:
    """Seconds and memory by case."""
    found: dict[str, Any] = {"ranks": ranks, "arrays": arrays}
    for replicated in (False, True):
        place = tempfile.mkdtemp(prefix="large-world-", dir=directory)
        try:
            generate(place, ranks, arrays, replicated=replicated)
            found["part_bytes"] = os.path.getsize(os.path.join(place, "checkpoints/step-1-g1/rank-1.json"))
            for world_size in (ranks, ranks * 4 // 5):
                command = [
                    sys.executable,
                    "-m",
                    "benchmarks.large_world",
                    place,
                    str(world_size // 3),
                    str(world_size),
                ]
                command += [str(arrays), *(["--replicated"] if replicated else [])]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                found[f"{'replicated' if replicated else 'sharded'}, into {world_size}"] = json.loads(
                    done.stdout
                )
        finally:
            shutil.rmtree(place)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("directory")
    parser.add_argument("rank", type=int)
    parser.add_argument("world_size", type=int)
    parser.add_argument("arrays", type=int)
    parser.add_argument("--replicated", action="store_true")
    given = parser.parse_args()
    child(given.directory, given.rank, given.world_size, given.arrays, replicated=given.replicated)
