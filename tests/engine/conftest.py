"""Fixtures of the engine's tests. Makes the helpers beside them importable (pytest's importlib mode adds no path)."""

import sys
import uuid
from pathlib import Path

import pytest

from chaos.leaks import processes_of

sys.path.insert(0, str(Path(__file__).parent))

from engine_helpers import Group, Script, until


@pytest.fixture
def script():
    made = []

    def start(source, *args, **options):
        made.append(Script(source, *args, **options))
        return made[-1]

    yield start
    for each in made:
        if each.process.poll() is None:
            each.kill()
        each.process.stdin.close()
        each.process.stdout.close()


@pytest.fixture
def run(tmp_path):
    """URL of a new run. Its writers are gone in the end."""
    name = f"run-{uuid.uuid4().hex[:8]}"
    yield str(tmp_path / name)
    until(lambda: not processes_of(name), f"{processes_of(name)} are left")


@pytest.fixture
def group(run):
    made = []

    def start(world, **options):
        made.append(Group(run, world, **options))
        return made[-1]

    yield start
    for each in made:
        for checkpointer in each.ranks:
            checkpointer._board.fail_all(RuntimeError("the test is over"))
            checkpointer.close(0)
