"""docs/format.md is enough: a reader written from it alone, without a line of this package, reads a checkpoint."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from resilience.checkpoint.restore import Source
from resilience.journal.log import CommitLog
from resilience.journal.records import Kind
from storage_backends import Storage

TABLE = [0] * 256
for _n in range(256):
    _crc = _n
    for _ in range(8):
        _crc = (_crc >> 1) ^ (0x82F63B78 if _crc & 1 else 0)
    TABLE[_n] = _crc


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = (crc >> 8) ^ TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def read_log(root: Path) -> dict[tuple[int, int], dict[str, Any]]:
    """Checkpoints of the shared tier by (step, generation)."""
    found: dict[tuple[int, int], dict[str, Any]] = {}
    previous, fence = None, 0
    paths = (root / "log" / f"{slot:020d}.json" for slot in itertools.count(1))
    for path in itertools.takewhile(Path.exists, paths):
        data = path.read_bytes()
        record = json.loads(data)
        assert record["v"] == 1
        plain = {key: value for key, value in record.items() if key != "sha256"}
        text = json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()
        assert hashlib.sha256(text).hexdigest() == record["sha256"]
        assert record["prev"] == (hashlib.sha256(previous).hexdigest() if previous else None)
        previous = data
        if record["generation"] < fence:
            continue
        body = record["body"]
        if record["kind"] == "fence":
            fence = record["generation"]
        elif record["kind"] == "checkpoint" and body["tier"] == "shared":
            found[body["step"], body.get("generation", record["generation"])] = body
        elif record["kind"] == "retire":
            for ref in body["refs"]:
                found.pop((ref["step"], ref["generation"]), None)
    return found


def read_rank(root: Path, checkpoint: dict[str, Any], rank: int) -> Any:
    parts = []
    for reference in checkpoint["parts"]:
        data = (root / reference["name"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == reference["sha256"]
        parts.append((root / reference["name"], json.loads(data)))
    mine = next(part for _, part in parts if part["rank"] == rank)
    arrays = {name: np.empty(shape, dtype) for name, dtype, shape, _, _ in mine["arrays"]}
    filled = dict.fromkeys(arrays, 0)
    for path, part in parts:
        pack = path.with_suffix(".pack").read_bytes()
        assert len(pack) == part["size"]
        for number, start, shape, offset, length, crc, *_ in part["chunks"]:
            name, dtype, _, grid, _ = part["arrays"][number]
            payload = pack[offset : offset + length]
            assert crc32c(payload) == crc == struct.unpack_from("<I", pack, offset + length)[0]
            if name in arrays:
                box = tuple(slice(o, o + n) for o, n in zip(start, shape, strict=True))
                full = np.frombuffer(payload, np.dtype(dtype).newbyteorder("<")).reshape(grid)
                arrays[name][box] = full[tuple(slice(n) for n in shape)]
                filled[name] += int(np.prod(shape, dtype=int))
    assert all(filled[name] == array.size for name, array in arrays.items())

    def build(node: Any) -> Any:
        if isinstance(node, list):
            return [build(item) for item in node]
        if not isinstance(node, dict):
            return node
        match node["t"]:
            case "array":
                own = f"rank-{rank}/{node['n']}"
                return arrays[own if own in arrays else node["n"]]
            case "dict":
                return dict(zip(map(build, node["k"]), map(build, node["v"]), strict=True))
            case "tuple":
                return tuple(map(build, node["v"]))
            case "int":
                return int(node["v"], 16)
            case "float":
                return struct.unpack(">d", bytes.fromhex(node["v"]))[0]
            case "bytes":
                return base64.b64decode(node["v"])
        raise AssertionError(f"not in this test: {node['t']}")

    return build(mine["state"])


def test_a_reader_written_from_the_document(storage: Storage, save: Callable[..., list[Source]]) -> None:
    assert crc32c(b"123456789") == 0xE3069283
    model = {"w": np.arange(60, dtype=np.float32).reshape(20, 3), "b": np.arange(4, dtype=np.complex64)}
    states = [
        {
            "model": {**model, "tied": model["w"]},
            3: (rank, -(2**80), b"x"),
            "3": [1.5],
            "own": np.arange(rank),
        }
        for rank in range(3)
    ]
    log = CommitLog(storage, new_id=map(str, itertools.count()).__next__)
    for step in (10, 20):
        sources = save(states, replicated=("model",), step=step, chunk_bytes=50)
        references = [{"rank": s.rank, "node": "n", "name": s.part, "sha256": s.sha256} for s in sources]
        body = {"step": step, "tier": "shared", "world_size": 3, "parts": references, "size": 1}
        if step == 10:
            log.fence(1, {})
        log.append(Kind.CHECKPOINT, body)
    log.append(Kind.RETIRE, {"refs": [{"step": 10, "generation": 1}]})
    root = storage.path("log")
    assert root is not None
    checkpoints = read_log(root.parent)
    assert list(checkpoints) == [(20, 1)]
    for rank, state in enumerate(states):
        back = read_rank(root.parent, checkpoints[20, 1], rank)
        assert list(back) == ["model", 3, "3", "own"]
        assert (back[3], back["3"]) == (state[3], [1.5])
        assert np.array_equal(back["own"], np.arange(rank))
        for name in ("w", "b", "tied"):
            assert back["model"][name].tobytes() == state["model"][name].tobytes()
