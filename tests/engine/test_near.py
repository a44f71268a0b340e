"""What ranks remove from their node's nvme tier, and what they must not."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import pytest

from resilience.engine import follower as module
from resilience.engine import near
from resilience.engine.follower import Follower
from resilience.journal.log import CommitLog
from resilience.journal.records import Kind
from storage_backends import Storage, open_storage
from storage_backends.recycle import recycle

_ids = itertools.count()


def log_of(storage: Storage) -> CommitLog:
    return CommitLog(storage, new_id=lambda: f"id-{next(_ids)}")


class Board:
    broken = None

    def pending(self) -> list[int]:
        return []


@pytest.fixture
def roots(tmp_path: Path) -> tuple[Storage, Storage]:
    return open_storage(str(tmp_path / "run")), open_storage(str(tmp_path / "nvme"))


def put(storage: Storage, name: str, size: int = 10) -> None:
    with storage.sink(name, size) as sink:
        sink.write(b"x" * size)


def follow(roots: tuple[Storage, Storage], generation: int) -> Follower:
    shared, nvme = roots
    made = Follower(
        shared,
        nvme,
        log_of(shared),
        rank=1,
        node="n",
        generation=generation,
        tell=lambda text: pytest.fail(text),
        stop=lambda: None,
    )
    made._board = Board()  # type: ignore[assignment]
    return made


def test_what_rank_0_adopts_after_the_followers_began_is_not_swept(
    roots: tuple[Storage, Storage], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start before was killed between a save and its commit; rank 0 of this one commits it, a little later."""
    shared, nvme = roots
    monkeypatch.setattr(module, "_GRACE_S", 0.0)
    log_of(shared).fence(1, {"run": "r"})
    for step in (5, 6):
        put(nvme, f"checkpoints/step-{step}-g1/rank-0.pack")
    rank0 = log_of(shared)
    rank0.fence(2, {"run": "r"})
    follower = follow(roots, 2)
    follower._due.append((time.monotonic(), {"t": "sweep", "below": 2}))
    part = {"rank": 0, "node": "n", "name": "checkpoints/step-5-g1/rank-0.json", "sha256": "0" * 64}
    body: dict[str, Any] = {
        "step": 5,
        "tier": "nvme",
        "world_size": 1,
        "parts": [part],
        "size": 10,
        "generation": 1,
    }
    rank0.append(Kind.CHECKPOINT, body)
    follower._remove_due()
    assert nvme.list("checkpoints") == ["checkpoints/step-5-g1/"], "what the log holds stays, the rest goes"


def test_a_start_that_was_replaced_sweeps_nothing(roots: tuple[Storage, Storage]) -> None:
    shared, nvme = roots
    log_of(shared).fence(1, {"run": "r"})
    put(nvme, "checkpoints/step-5-g0/rank-0.pack")
    follower = follow(roots, 1)
    log_of(shared).fence(2, {"run": "r"})
    follower._due.append((time.monotonic(), {"t": "sweep", "below": 1}))
    follower._remove_due()
    assert nvme.list("checkpoints") == ["checkpoints/step-5-g0/"]


def test_kept_space_is_given_back(roots: tuple[Storage, Storage], tmp_path: Path) -> None:
    nvme = roots[1]
    put(nvme, "checkpoints/step-5-g1/rank-0.pack", 2 << 20)
    recycle(nvme, "checkpoints/step-5-g1/rank-0.pack")
    assert (tmp_path / "nvme" / ".recycled~").exists()
    near.remove(nvme, {"t": "trim"})
    assert not (tmp_path / "nvme" / ".recycled~").exists()
