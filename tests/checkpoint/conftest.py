"""Building checkpoints: whole worlds of ranks saved for real, into a directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from resilience.checkpoint import pack
from resilience.checkpoint.arena import Arena
from resilience.checkpoint.part import Part, directory, draft
from resilience.checkpoint.plan import plan, specs
from resilience.checkpoint.restore import Source
from resilience.checkpoint.snapshot import snapshot
from resilience.checkpoint.tree import flatten
from storage_backends import Storage, open_storage

Save = Callable[..., list[Source]]


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """A run's root on a real directory."""
    return open_storage(str(tmp_path / "store" / "run-1"))


@pytest.fixture
def save(storage: Storage) -> Save:
    """``save(states, replicated=..., step=..., generation=...)``: save one state per rank; the sources."""

    return lambda states, to=None, **options: write_world(to or storage, states, **options)


@pytest.fixture(scope="session")
def save_world() -> Callable[..., list[Source]]:
    """``save_world(storage, states, ...)``, for tests that make storages of their own."""
    return write_world


def write_world(
    target: Storage,
    states: list[Mapping[str, Any]],
    *,
    replicated: tuple[str, ...] = (),
    step: int = 10,
    generation: int = 1,
    chunk_bytes: int = 1 << 20,
) -> list[Source]:
    """Save one state per rank; the sources."""
    sources = []
    for rank, state in enumerate(states):
        arrays, skeleton = flatten(state, prefix="")
        layout = plan(
            specs(arrays, replicated, rank=rank),
            rank=rank,
            world_size=len(states),
            chunk_bytes=chunk_bytes,
        )
        part = draft(layout, skeleton, run="run-1", step=step, generation=generation)
        with Arena.create(2, layout.size) as arena:
            slot = arena.acquire()
            assert slot is not None
            snapshot(arena, slot, arrays, layout, step=step, generation=generation)
            result = pack.persist(arena.view(slot), part, target, directory(step, generation))
            arena.persisted(slot)
        sources.append(Source(rank, target, result.part_name, result.sha256))
    return sources


@pytest.fixture
def load() -> Callable[[Source], Part]:
    """Read the part behind a source."""
    return lambda source: Part.decode(source.storage.read(source.part), path=source.part)


@pytest.fixture
def edit(storage: Storage) -> Callable[[str, int, bytes], None]:
    """Overwrite bytes of an object in place, as a failing disk would."""

    def editor(name: str, offset: int, data: bytes) -> None:
        path = storage.path(name)
        assert path is not None
        path.chmod(0o644)
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(data)

    return editor
