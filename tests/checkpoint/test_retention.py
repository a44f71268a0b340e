"""Deleting a retired checkpoint: it may be interrupted, and what is left never looks whole."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from resilience.checkpoint.restore import Source
from resilience.checkpoint.retention import delete
from resilience.control.types import CheckpointRef as Ref
from storage_backends import Storage


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

        def recycle(self, name: str) -> None:
            raise KeyboardInterrupt

    try:
        delete(Interrupted(), Ref(10, 1))  # type: ignore[arg-type]
    except KeyboardInterrupt:
        names = [name.rpartition("/")[2] for name in storage.list("checkpoints/step-10-g1")]
        assert names == ["rank-0.pack", "rank-1.pack"]
    else:
        raise AssertionError("delete did not reach the packs")
