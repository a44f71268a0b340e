"""Snapshots hold the moment they were taken, every gap is zero, and a failed one leaves no trace."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from resilience.checkpoint.arena import Arena, SlotKind
from resilience.checkpoint.plan import ArraySpec, plan, specs
from resilience.checkpoint.snapshot import _tasks, snapshot, specs_of
from resilience.errors import ExhaustedError, InvalidError

ROOT = Path(__file__).parents[2]


def test_the_slot_is_the_pack_image_and_does_not_follow_later_changes() -> None:
    state = {"w": torch.arange(12.0).reshape(3, 4), "n": np.arange(3)[::-1], "s": torch.tensor(7)}
    layout = plan(specs(state), rank=0, world_size=1)
    with Arena.create(2, layout.size) as arena:
        for slot in range(2):
            arena.view(slot)[:] = b"\xff" * arena.slot_bytes  # what an earlier, other layout left behind
        slot = arena.acquire()
        assert slot is not None
        taken = snapshot(arena, slot, state, layout, step=5, generation=2)
        state["w"].zero_()
        state["n"][:] = 0
        state["s"].add_(1)
        image = bytes(arena.view(slot))
        payloads = {c.key: image[c.offset : c.offset + c.length] for c in layout.chunks}
        assert np.frombuffer(payloads["w"], np.float32).tolist() == list(range(12))
        assert np.frombuffer(payloads["n"], np.int64).tolist() == [2, 1, 0]
        assert np.frombuffer(payloads["s"], np.int64)[0] == 7
        rest = bytearray(image)
        for chunk in layout.chunks:
            rest[chunk.offset : chunk.offset + chunk.length] = bytes(chunk.length)
        assert not any(rest)
        assert (arena.state(slot).kind, arena.state(slot).step) == (SlotKind.SEALED, 5)
        assert (taken.slot, taken.size, taken.generation) == (slot, layout.size, 2)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_copies_the_same(threads: int) -> None:
    big = np.random.default_rng(0).integers(0, 255, (37, 300_001), np.uint8)
    state = {"big": big, "view": big[:, ::3], "t": torch.from_numpy(big)[::2]}
    layout = plan(specs(state), rank=0, world_size=1, chunk_bytes=1 << 20)
    with Arena.create(2, layout.size) as arena:
        slot = arena.acquire()
        assert slot is not None
        snapshot(arena, slot, state, layout, step=1, generation=1, threads=threads)
        for chunk in layout.chunks:
            where = tuple(slice(o, o + n) for o, n in zip(chunk.box_offset, chunk.box_shape, strict=True))
            expected = np.asarray(state[chunk.key])[where].tobytes()
            assert bytes(arena.view(slot)[chunk.offset : chunk.offset + len(expected)]) == expected


def test_progress_is_told_as_far_as_everything_before_it_is_there() -> None:
    """Whichever thread is faster: the copied prefix is the array's bytes whenever somebody looks."""
    random = np.random.default_rng(0)
    state = {f"w{n:02}": random.integers(1, 255, (5 << 20) + n, np.uint8) for n in range(12)}
    layout = plan(specs(state), rank=0, world_size=1)
    with Arena.create(2, layout.size) as arena:
        slot = arena.acquire()
        assert slot is not None
        looked: list[int] = []

        def look(attempt: int) -> None:
            assert attempt == arena.state(slot).attempt
            while not looked or looked[-1] < layout.size:
                copied = arena.state(slot).copied
                for chunk in layout.chunks:
                    if chunk.end <= copied and chunk.end > (looked[-1] if looked else 0):
                        payload = arena.view(slot)[chunk.offset : chunk.offset + chunk.length]
                        assert bytes(payload) == state[chunk.key].tobytes()
                looked.append(copied)

        snapshot(arena, slot, state, layout, step=1, generation=1, threads=3, announce=look)
        assert looked[-1] == layout.size
        assert looked == sorted(looked)


def test_ten_thousand_small_arrays_are_few_tasks() -> None:
    state = {f"w{n:05}": np.full(100, n, np.int32) for n in range(3000)}
    layout = plan(specs(state), rank=0, world_size=1)
    assert len(list(_tasks(layout.chunks, frozenset()))) <= 4
    assert [chunk for task in _tasks(layout.chunks, frozenset()) for chunk in task] == list(layout.chunks)
    with Arena.create(2, layout.size) as arena:
        slot = arena.acquire()
        assert slot is not None
        snapshot(arena, slot, state, layout, step=1, generation=1)
        image = arena.view(slot)
        for chunk in layout.chunks:
            payload = bytes(image[chunk.offset : chunk.offset + chunk.length])
            assert payload == state[chunk.key].tobytes()


def test_a_state_that_left_its_plan_is_refused_and_the_slot_is_free_again() -> None:
    layout = plan([ArraySpec("w", "float32", (3,), False)], rank=0, world_size=1)
    with Arena.create(2, layout.size) as arena:
        for state in ({}, {"w": np.zeros(3)}, {"w": np.zeros(4, np.float32)}):
            slot = arena.acquire()
            assert slot is not None
            with pytest.raises(InvalidError, match="planned as float32"):
                snapshot(arena, slot, state, layout, step=1, generation=1)
            assert arena.state(slot).kind is SlotKind.FREE


def test_a_failure_before_the_seal_frees_the_slot() -> None:
    layout = plan([], rank=0, world_size=1)
    with Arena.create(2, layout.size) as arena:
        slot = arena.acquire()
        assert slot is not None

        def fail() -> None:
            assert arena.state(slot).kind is SlotKind.WRITING
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            snapshot(arena, slot, {}, layout, step=1, generation=1, before_seal=fail)
        assert arena.state(slot).kind is SlotKind.FREE


def test_a_grown_state_asks_for_a_new_arena() -> None:
    layout = plan([ArraySpec("w", "uint8", (9000,), False)], rank=0, world_size=1)
    with Arena.create(2, 4096) as arena:
        slot = arena.acquire()
        assert slot is not None
        with pytest.raises(ExhaustedError, match="grown"):
            snapshot(arena, slot, {"w": np.zeros(9000, np.uint8)}, layout, step=1, generation=1)


def test_specs_of_plain_modules_are_local() -> None:
    model = torch.nn.Linear(2, 2)
    found = specs_of({"model/weight": model.weight, "model/bias": model.bias}, {"model": model})
    assert [spec.replicated for spec in found] == [False, False]


SMALL_SHM = """
mount -t tmpfs -o size=64k tmpfs /dev/shm
exec "$1" -c '
import os, numpy as np
stat = os.statvfs("/dev/shm")
assert stat.f_blocks * stat.f_frsize == 65536, "the small /dev/shm is not there"
from resilience.checkpoint.arena import Arena
from resilience.checkpoint.plan import plan, specs
from resilience.checkpoint.snapshot import snapshot
state = {"w": np.ones(2_000_000, np.float32)}
layout = plan(specs(state), rank=0, world_size=1)
arena = Arena.create(2, layout.size)
for step in (1, 2):
    slot = arena.acquire()
    snapshot(arena, slot, state, layout, step=step, generation=1)
    arena.persisted(slot)
print("ones:", int((np.frombuffer(arena.view(0), np.float32, 2_000_000) == 1).sum()))
'
"""


def test_a_container_with_a_tiny_dev_shm_still_snapshots() -> None:
    """Docker gives 64 MB of /dev/shm; state is larger. The arena must not live there."""
    unshare = shutil.which("unshare")
    flags = ["-m"] if os.geteuid() == 0 else ["-Urm"]
    probe = [unshare or "", *flags, "sh", "-c", "mount -t tmpfs -o size=64k tmpfs /dev/shm"]
    if unshare is None or subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("NOT TESTED: a private mount of /dev/shm is not permitted here (unshare -m)")
    done = subprocess.run(
        [unshare, *flags, "sh", "-c", SMALL_SHM, "sh", sys.executable],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert "ones: 2000000" in done.stdout
