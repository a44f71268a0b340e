"""What ``@resilience.job`` and ``Job.options`` take: checked when given, with the nearest right spelling."""

from __future__ import annotations

import difflib
import math
import os
import re
from dataclasses import dataclass, field, fields
from typing import Any

from resilience.control.types import Policy
from resilience.errors import InvalidError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Options:
    """What ``@resilience.job`` and ``Job.options`` take, all keyword-only.

    Attributes:
        workers: ranks to run, one card each.
        spares: cards to hold ready beyond that.
        storage: shared storage of all runs: a path, or any fsspec URL. Default ``./runs``.
        nvme: local directory for the near tier, on every node; ``None`` saves to shared storage directly.
        name: the run's name; launching again under it goes on from its newest checkpoint. Default: the function's.
        card: Ray resource that stands for a card: ``GPU``, ``NPU``, or ``card`` (simulated). Default: whichever the
            cluster has, simulated ones where it has none.
        topology: topology levels, outermost first; node labels ``resilience.io/<level>`` give their values.
        checkpoint_every: steps between checkpoints; ``None`` = as often as training waits at most ``overhead`` for.
        overhead: fraction of the time that automatic checkpoints may make training wait.
        snapshot: ``blocking``: training waits for the copy of its state; ``overlapped``: what only optimizers change is
            copied beside the next forward and backward pass, and training waits, at the latest, before an optimizer
            steps. Parameters must then change in ``optimizer.step()`` only (a snapshot whose tensors changed elsewhere
            is dropped, and said; what goes past torch, ``tensor.data`` or an extension's kernel, is not seen). Where
            overlap costs more than it hides, snapshots block again.
        drain_rate: bytes per second that each node may move from its near tier to shared storage, where that would be
            in training's way; ``None`` = as fast as it goes, at low priority.
        keep_last, keep_every: checkpoints to keep: the newest ones, and every so many steps (``None`` = no more).
        max_restarts: failures in a row without a new checkpoint before the run is given up.
        capacity_deadline: seconds to wait for enough cards.
        start_deadline: seconds a generation may take until every rank has made a step.
        stop_deadline: seconds a clean stop may take.
        hang_floor: seconds without any progress before a hang is suspected (longer where steps are longer).
        fault_codes: TOML file that overrides what fault codes of cards ask for (docs/cards.md), read where the job is
            launched. Default: the file that ``RESILIENCE_FAULT_CODES`` names, if it is set.
        env: environment variables for every process of the run, on all nodes: ranks, and whoever reads and writes
            storage (credentials, where the nodes have none of their own). The launching process keeps its own.
        faults: planned faults for chaos tests (see ``chaos.faults``).
    """

    workers: int = 1
    spares: int = 0
    storage: str = "runs"
    nvme: str | None = None
    name: str | None = None
    card: str | None = None
    topology: tuple[str, ...] = ("supernode",)
    checkpoint_every: int | None = None
    overhead: float = 0.01
    snapshot: str = "blocking"
    drain_rate: float | None = None
    keep_last: int = 3
    keep_every: int | None = None
    max_restarts: int = 8
    capacity_deadline: float = 300.0
    start_deadline: float = 600.0
    stop_deadline: float = 60.0
    hang_floor: float = 15.0
    fault_codes: str | None = None
    env: dict[str, str] = field(default_factory=dict)
    faults: tuple[dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        _at_least("workers", self.workers, 1)
        _at_least("spares", self.spares, 0)
        _at_least("keep_last", self.keep_last, 1)
        _at_least("max_restarts", self.max_restarts, 0)
        for name in ("checkpoint_every", "keep_every"):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 1)
        for name in ("capacity_deadline", "start_deadline", "stop_deadline", "hang_floor"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
                _refuse(name, value, "a number of seconds > 0")
        if self.snapshot not in ("blocking", "overlapped"):
            _refuse("snapshot", self.snapshot, "'blocking' or 'overlapped'")
        rate = self.drain_rate
        if rate is not None and (
            not isinstance(rate, int | float) or isinstance(rate, bool) or not 0 < rate < math.inf
        ):
            _refuse("drain_rate", rate, "bytes per second > 0, or None")
        if not isinstance(self.overhead, float) or not 0 < self.overhead < 1:
            _refuse("overhead", self.overhead, "a fraction between 0 and 1")
        if self.name is not None and not (isinstance(self.name, str) and _NAME.fullmatch(self.name)):
            _refuse("name", self.name, "letters, digits, '.', '_' and '-', at most 100")
        if isinstance(self.topology, str) or not all(isinstance(level, str) for level in self.topology):
            _refuse("topology", self.topology, "a tuple of level names, outermost first")
        if not isinstance(self.env, dict) or not all(
            isinstance(item, str) for pair in self.env.items() for item in pair
        ):
            _refuse("env", self.env, "a dict of strings")
        if self.card is not None and (not isinstance(self.card, str) or not self.card):
            _refuse("card", self.card, "the name of a Ray resource, such as GPU, NPU or card")
        if isinstance(self.faults, str) or not all(isinstance(fault, dict) for fault in self.faults):
            _refuse("faults", self.faults, "a tuple of faults as chaos.faults makes them")
        if not isinstance(self.storage, str | os.PathLike) or not str(self.storage):
            _refuse("storage", self.storage, "a path or an fsspec URL")
        if self.fault_codes is not None and not isinstance(self.fault_codes, str | os.PathLike):
            _refuse("fault_codes", self.fault_codes, "the path of a TOML file")
        if self.nvme is not None and (not isinstance(self.nvme, str | os.PathLike) or not str(self.nvme)):
            _refuse("nvme", self.nvme, "a local directory")

    def policy(self) -> Policy:
        return Policy(
            workers=self.workers,
            spares=self.spares,
            checkpoint_every=self.checkpoint_every,
            overhead=self.overhead,
            max_restarts=self.max_restarts,
            capacity_deadline_s=self.capacity_deadline,
            start_deadline_s=self.start_deadline,
            stop_deadline_s=self.stop_deadline,
            hang_floor_s=self.hang_floor,
            keep_last=self.keep_last,
            keep_every=self.keep_every,
        )


def _at_least(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        _refuse(name, value, f"an integer >= {least}")


def _refuse(name: str, value: Any, allowed: str) -> None:
    raise InvalidError(
        f"{name}={value!r} is not allowed: give {allowed}",
        operation="job",
        path=name,
        hint=f"set {name} to {allowed}",
    )


def checked(given: dict[str, Any]) -> dict[str, Any]:
    known = [f.name for f in fields(Options)]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise InvalidError(
                f"unknown option {name!r}",
                operation="job",
                path=name,
                hint=(f"did you mean {near[0]!r}? " if near else "") + f"options: {', '.join(known)}",
            )
    return given
