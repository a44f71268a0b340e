"""Verification finds every flipped byte, wherever it is, and goes on after the first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resilience.checkpoint.part import Part
from resilience.checkpoint.restore import Source
from resilience.checkpoint.verify import VerifyProgress, verify
from resilience.checkpoint.zarr_view import zarr_metadata
from storage_backends import Storage

Save = Callable[..., list[Source]]
Edit = Callable[[str, int, bytes], None]
STATES = [{"w": np.arange(3000, dtype=np.float32), "own": np.arange(rank + 1)} for rank in range(2)]


@pytest.fixture
def sources(save: Save, storage: Storage, load: Callable[[Source], Part]) -> list[Source]:
    saved = save(STATES, replicated=("w",), chunk_bytes=5000)
    where = f"{storage.url}/checkpoints/step-10-g1"
    for name, data in zarr_metadata([load(source) for source in saved], url=where).items():
        storage.create(f"checkpoints/step-10-g1/{name}", data)
    return saved


def test_a_whole_checkpoint_has_no_problems_and_tells_its_progress(sources: list[Source]) -> None:
    seen: list[VerifyProgress] = []
    assert list(verify(sources, step=10, generation=1, progress=seen.append)) == []
    assert [p.done for p in seen] == sorted(p.done for p in seen)
    assert seen[-1].done == seen[-1].total == 5 * 4096


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_flipped_byte_is_found(sources: list[Source], storage: Storage, edit: Edit, data: Any) -> None:
    """Payload, padding, CRC field, gap, part, zarr.json, refs.json: any byte of any file."""
    names = [f"rank-{rank}.{kind}" for rank in range(2) for kind in ("pack", "json")] + [
        "zarr.json",
        "refs.json",
    ]
    name = f"checkpoints/step-10-g1/{data.draw(st.sampled_from(names))}"
    at = data.draw(st.integers(0, storage.size(name) - 1))
    old = storage.read(name, at, at + 1)
    edit(name, at, bytes([old[0] ^ data.draw(st.integers(1, 255))]))
    try:
        problems = list(verify(sources, step=10, generation=1))
    finally:
        edit(name, at, old)
    if name.endswith("refs.json") and not problems:
        assert b'"templates"' in storage.read(name)[: at + 200]  # where the checkpoint lies is free to change
    else:
        assert [problem.path for problem in problems] == [name]
        start, end = problems[0].start, problems[0].end
        assert start is not None
        assert end is not None
        assert start <= at < end


def test_all_damage_is_listed(sources: list[Source], storage: Storage, edit: Edit) -> None:
    names = [f"checkpoints/step-10-g1/rank-{rank}.pack" for rank in range(2)]
    owner = max(names, key=storage.size)
    other = min(names, key=storage.size)
    edit(owner, 0, b"\xff\xff")
    edit(owner, 8192, b"\xff\xff")
    path = storage.path(other)
    assert path is not None
    path.unlink()
    problems = list(verify(sources))
    assert [(p.path, p.start) for p in problems if p.path == owner] == [(owner, 0), (owner, 8192)]
    assert {p.path for p in problems} == {owner, other}


def test_missing_parts_and_another_step(sources: list[Source], storage: Storage) -> None:
    (problem,) = verify(sources, step=11)
    assert "expected is 11" in str(problem)
    storage.delete(sources[0].part)
    (problem,) = verify(sources)
    assert problem.path == sources[0].part
