"""Fixtures of the history room: runs in a temporary storage root, written by the real writers."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


def _load() -> ModuleType:
    # Tests are no package (importlib mode), so a helper module is loaded by its place.
    name = "resilience_history_builder"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("builder.py"))
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture(scope="session")
def build() -> ModuleType:
    """The builder module."""
    return _load()


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Storage URL with the run ``demo``: two generations, one incident, finished. Read only."""
    root = tmp_path_factory.mktemp("finished")
    _load().whole_run(str(root))
    return str(root)
