"""Removing from this node's nvme tier what the log has retired, and what older starts left there.

Effects only; what may go is said by the log. May run in several processes of a node at a time.
"""

from __future__ import annotations

from typing import Any

from resilience.checkpoint import retention
from resilience.control.types import CheckpointRef
from storage_backends.base import Storage
from storage_backends.recycle import trim


def remove(storage: Storage, order: dict[str, Any]) -> None:
    """Carry out an order of the log keeper: ``{"t": "delete", "step", "generation"}``, ``{"t": "trim"}``, or
    ``{"t": "sweep", "kept", "below"}``."""
    if order["t"] == "trim":
        trim(storage)
        return
    if order["t"] == "sweep":
        refs = retention.stale(storage, kept=order["kept"], below=order["below"])
    else:
        refs = [CheckpointRef(order["step"], order["generation"])]
    for ref in refs:
        retention.delete(storage, ref)
