"""What the supervisor decides to do: the outputs of ``supervise.step``, carried out by ``runtime`` in order.

A command that has an answer names the event that answers it. Commands never fail silently: what cannot be
carried out comes back as an event (``NodeLost``, ``SaveFailed``, ``CommitFailed``, ``FenceLost``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from resilience.control.types import Assignment, Candidate, CheckpointRef, Outcome


@dataclass(frozen=True)
class StopRanks:
    """End every process of ``generation`` and older on ``node`` at once (SIGKILL). Answer:
    ``RanksStopped``."""

    generation: int
    node: str


@dataclass(frozen=True)
class Fence:
    """Win the next slot of the log with a fence of at least ``generation``. Answer:
    ``Fenced``/``FenceLost``."""

    generation: int


@dataclass(frozen=True)
class OpenStore:
    """Open the rendezvous store of ``generation`` in a process of ``node``'s agent. Answer:
    ``StoreReady``."""

    generation: int
    node: str


@dataclass(frozen=True)
class StartRanks:
    """Fork the ranks of ``table`` that live on ``node``. ``restore`` is ``None`` to begin from scratch.
    Answers: ``Restored``, ``Progress``, ``RankExited`` …"""

    generation: int
    node: str
    table: tuple[Assignment, ...]
    store: str
    restore: Candidate | None


@dataclass(frozen=True)
class PostCheckpoint:
    """Tell all ranks to snapshot when ``step`` steps are completed."""

    generation: int
    step: int


@dataclass(frozen=True)
class PostStop:
    """Tell all ranks to snapshot and park when ``step`` steps are completed; ranks parked at an earlier stop
    point go on to this one."""

    generation: int
    step: int


@dataclass(frozen=True)
class ReleaseStop:
    """Every rank is parked at ``step``: let them leave their loops and return."""

    generation: int
    step: int


@dataclass(frozen=True)
class Commit:
    """Write the checkpoint record of ``ref`` in ``tier`` to the log; ``parts`` = (rank, node, part name,
    sha256), ``size``: bytes of all packs together. Answer: ``Committed``/``CommitFailed``, or ``FenceLost``
    when a newer generation is found there."""

    ref: CheckpointRef
    tier: str
    parts: tuple[tuple[int, str, str, str], ...]
    size: int


@dataclass(frozen=True)
class Quarantine:
    """Record in the log that ``ref`` in ``tier`` must not be restored, and why."""

    ref: CheckpointRef
    tier: str
    reason: str


@dataclass(frozen=True)
class Retire:
    """Record in the log that these are no longer wanted; their bytes go after the grace period."""

    refs: tuple[CheckpointRef, ...]


@dataclass(frozen=True)
class Record:
    """Write one event to the journal. ``type`` is one of ``journal.events.TYPES``; subject fields as
    there."""

    type: str
    data: dict[str, Any] = field(default_factory=dict)
    rank: int | None = None
    node: str | None = None
    card: str | None = None
    step: int | None = None
    urgent: bool = False  # seal the segment now: this must survive us


@dataclass(frozen=True)
class RecordFinish:
    """Write the finish record to the log: ``steps``, result ``finished``, and what rank 0 returned. It ends
    nothing, and may come again after ``FinishFailed``. Answer: ``FinishRecorded``, also where the log held a
    finish record of this run already; ``FenceLost`` when a newer generation is found there; ``FinishFailed`` when
    storage is away."""

    steps: int


@dataclass(frozen=True)
class Finish:
    """The run is over: stop what is left, tell the caller. Nothing is written to the log: where the result is
    ``finished``, the record is there already. No command comes after it."""

    outcome: Outcome


Command = (
    StopRanks
    | Fence
    | OpenStore
    | StartRanks
    | PostCheckpoint
    | PostStop
    | ReleaseStop
    | Commit
    | Quarantine
    | Retire
    | Record
    | RecordFinish
    | Finish
)
