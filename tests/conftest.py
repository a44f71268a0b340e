"""Fixtures of all tests. One virtual cluster for the whole session; a test that kills nodes gets them replaced."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from hypothesis import settings

from chaos.virtual_cluster import VirtualCluster

# Machines are shared and slow at times: how long an example takes proves nothing.
settings.register_profile("shared", deadline=None)
settings.load_profile("shared")


@pytest.fixture(scope="session")
def _virtual_cluster():
    with VirtualCluster([2, 2, 2]) as cluster:
        yield cluster


@pytest.fixture
def cluster(_virtual_cluster):
    """Three nodes with two simulated cards each, all alive."""
    _virtual_cluster.heal()
    return _virtual_cluster


@pytest.fixture(scope="session")
def jobs():
    """The module of test jobs, importable by the zygotes by its file."""
    path = Path(__file__).parent / "e2e" / "jobs.py"
    name = "resilience_job_jobs"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]
