"""Deleting a retired checkpoint: it may be interrupted, and what is left never looks whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from resilience.checkpoint.restore import Source
from resilience.checkpoint.retention import delete
from resilience.control.types import CheckpointRef as Ref
from storage_backends import Storage, open_storage


def test_delete_removes_one_checkpoint_and_may_run_twice(
    storage: Storage, save: Callable[..., list[Source]]
) -> None:
    save([{"a": np.ones(3)}] * 2, step=10)
    save([{"a": np.ones(3)}] * 2, step=1)
    storage.create("checkpoints/step-10-g1/zarr.json", b"{}")
    for _ in range(2):
        delete(storage, Ref(10, 1))
        assert storage.list("checkpoints/step-10-g1") == []
        assert len(storage.list("checkpoints/step-1-g1")) == 4
    delete(storage, Ref(99, 9))


def test_parts_go_before_packs(storage: Storage, save: Callable[..., list[Source]]) -> None:
    """Interrupted in the middle, what is left does not look like a checkpoint."""
    save([{"a": np.ones(3)}] * 2)

    class Interrupted:
        def __getattr__(self, name: str) -> object:
            return getattr(storage, name)

        def delete(self, name: str) -> None:
            if name.endswith(".pack"):
                raise KeyboardInterrupt
            storage.delete(name)

    try:
        delete(Interrupted(), Ref(10, 1))  # type: ignore[arg-type]
    except KeyboardInterrupt:
        names = [name.rpartition("/")[2] for name in storage.list("checkpoints/step-10-g1")]
        assert names == ["rank-0.pack", "rank-1.pack"]
    else:
        raise AssertionError("delete did not reach the packs")


def test_the_space_of_retired_packs_is_written_over_by_the_next(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    for step in (1, 2):
        with storage.sink(f"checkpoints/step-{step}-g1/rank-0.pack", 2 << 20) as sink:
            sink.write(bytes([step]) * (2 << 20))
        storage.create(f"checkpoints/step-{step}-g1/rank-0.json", b"{}")
    number = (tmp_path / "checkpoints/step-1-g1/rank-0.pack").stat().st_ino
    delete(storage, Ref(1, 1))
    assert storage.list("checkpoints") == ["checkpoints/step-2-g1/"]
    assert storage.list() == ["checkpoints/"]
    with storage.sink("checkpoints/step-3-g1/rank-0.pack", 2 << 20) as sink:
        sink.write(b"3" * (2 << 20))
    assert (tmp_path / "checkpoints/step-3-g1/rank-0.pack").stat().st_ino == number
    assert storage.read("checkpoints/step-2-g1/rank-0.pack") == b"\2" * (2 << 20)
