"""resilience: a training function wrapped in one decorator goes on by itself.

Import is light: what needs Ray, Zarr or DuckDB is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from resilience.errors import (
    CorruptError,
    ExhaustedError,
    FencedError,
    InvalidError,
    ResilienceError,
    TrainingError,
    UnavailableError,
)

# Bound here, not lazily: these two are functions that share their name with the module they live in, and a
# submodule imported later would take the name away.
from resilience.history import history
from resilience.job import Job, JobResult, job
from resilience.run import Run

if TYPE_CHECKING:
    from resilience.checkpoint.store import open_checkpoint
    from resilience.checkpointer import Checkpointer
    from resilience.runtime.report import report_fault

__all__ = [
    "Checkpointer",
    "CorruptError",
    "ExhaustedError",
    "FencedError",
    "InvalidError",
    "Job",
    "JobResult",
    "ResilienceError",
    "Run",
    "TrainingError",
    "UnavailableError",
    "history",
    "job",
    "open_checkpoint",
    "report_fault",
]


def __getattr__(name: str) -> Any:
    if name == "open_checkpoint":
        return import_module("resilience.checkpoint.store").open_checkpoint
    if name == "report_fault":
        return import_module("resilience.runtime.report").report_fault
    if name == "Checkpointer":
        return import_module("resilience.checkpointer").Checkpointer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
