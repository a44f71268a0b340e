"""Retention never lets the last good checkpoint go."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from resilience.checkpoint.restore import Source
from resilience.checkpoint.retention import choose, delete
from resilience.control.types import CheckpointRef as Ref
from storage_backends import Storage

refs = st.builds(Ref, st.integers(0, 30), st.integers(1, 4))


@given(
    st.lists(refs, unique=True),
    st.integers(0, 5),
    st.none() | st.integers(1, 7),
    st.none() | st.sets(refs),
    st.sets(refs),
)
def test_what_stays(
    committed: list[Ref], last: int, every: int | None, verified: set[Ref] | None, bad: set[Ref]
) -> None:
    gone = choose(committed, keep_last=last, keep_every=every, verified=verified, unusable=bad)
    order = lambda ref: (ref.step, ref.generation)  # noqa: E731
    assert list(gone) == sorted(set(gone), key=order)
    assert set(gone) <= set(committed)
    good = sorted(
        (ref for ref in committed if ref not in bad and (verified is None or ref in verified)), key=order
    )
    kept_good = [ref for ref in good if ref not in gone]
    assert kept_good[-max(last, 1) :] == good[-max(last, 1) :]
    if not good:
        assert not gone
    else:
        assert all(order(ref) < order(good[-1]) for ref in gone)
    if every:
        assert not any(ref.step % every == 0 and ref not in bad for ref in gone)
    again = choose(set(committed) - set(gone), keep_last=last, keep_every=every, verified=verified, unusable=bad)
    assert again == ()


def test_examples() -> None:
    all_ = [Ref(step, 1) for step in (10, 20, 30, 40, 50)]
    assert choose(all_, keep_last=2) == (Ref(10, 1), Ref(20, 1), Ref(30, 1))
    assert choose(all_, keep_last=1, keep_every=20) == (Ref(10, 1), Ref(30, 1), Ref(50, 1))[:2]
    assert choose(all_, keep_last=1, verified={Ref(30, 1)}) == (Ref(10, 1), Ref(20, 1))
    assert choose(all_, keep_last=1, unusable={Ref(50, 1)}) == (Ref(10, 1), Ref(20, 1), Ref(30, 1))


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

        def delete_all(self, prefix: str) -> None:
            raise KeyboardInterrupt

    try:
        delete(Interrupted(), Ref(10, 1))  # type: ignore[arg-type]
    except KeyboardInterrupt:
        names = [name.rpartition("/")[2] for name in storage.list("checkpoints/step-10-g1")]
        assert names == ["rank-0.pack", "rank-1.pack"]
    else:
        raise AssertionError("delete did not reach the packs")
