"""Values the decisions are made of: topology, policy, assignments, candidates for restore, outcomes.

Everything here is frozen and made of plain data, so that a state can be built in a test, compared, and
written to the journal. Times are seconds on the supervisor's clock, handed in by events.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


@dataclass(frozen=True, order=True)
class Card:
    """One accelerator: the ``index``-th of ``node`` (indices run along the node's interconnect)."""

    node: str
    index: int

    def __str__(self) -> str:
        return f"{self.node}/{self.index}"


@dataclass(frozen=True)
class Node:
    """A machine that joined with its agent.

    Attributes:
        name: unique and stable while the node lives.
        cards: number of cards, indices ``0..cards-1``.
        levels: topology path, outermost first, without the node itself: ``("supernode-3",)`` or
            ``("pod-1", "supernode-3")``; empty where the cluster has no labels.
        host: address other nodes reach it at.
    """

    name: str
    cards: int
    levels: tuple[str, ...] = ()
    host: str = "127.0.0.1"


@dataclass(frozen=True)
class Policy:
    """What the user asked for; validated before it gets here.

    Attributes:
        workers: ranks, one card each.
        spares: cards wanted beyond ``workers``; fewer is reported, never fatal.
        checkpoint_every: steps between checkpoints; ``None`` = as often as costs at most ``overhead``.
        overhead: fraction of training time that checkpoints may make training wait (cadence, when automatic).
        max_restarts: generations that may fail without a newly committed checkpoint in between.
        capacity_deadline_s: how long to wait for enough cards before giving up.
        start_deadline_s: how long a generation may take from start of its ranks to all having begun to step.
        drain_deadline_s: how long a failure waits for saves that every rank has already sealed.
        stop_deadline_s: how long a clean stop may go without progress before ranks are ended without it.
        hang_floor_s: no rank is suspected of a hang before this long without progress.
        hang_factor: nor before this many times the longest step seen (first steps excluded).
        keep_last: newest checkpoints to keep (at least 1).
        keep_every: also keep steps divisible by this; ``None`` = none.
    """

    workers: int
    spares: int = 0
    checkpoint_every: int | None = None
    overhead: float = 0.01
    max_restarts: int = 8
    capacity_deadline_s: float = 300.0
    start_deadline_s: float = 600.0
    drain_deadline_s: float = 10.0
    stop_deadline_s: float = 60.0
    hang_floor_s: float = 15.0
    hang_factor: float = 10.0
    keep_last: int = 3
    keep_every: int | None = None


@dataclass(frozen=True)
class Assignment:
    """Where one rank runs. ``local_rank`` counts the ranks of one node from 0."""

    rank: int
    card: Card
    local_rank: int


@dataclass(frozen=True)
class CheckpointRef:
    """A checkpoint by name: completed steps and the generation that wrote it."""

    step: int
    generation: int

    def __str__(self) -> str:
        return f"step-{self.step}-g{self.generation}"


@dataclass(frozen=True)
class Candidate:
    """A committed checkpoint in one tier, as the log records it.

    Attributes:
        tier: ``"nvme"`` or ``"shared"``.
        world_size: ranks that wrote it.
        hosts: for ``nvme``, the node holding the pack of each rank (index = rank); empty for ``shared``.
    """

    ref: CheckpointRef
    tier: str
    world_size: int
    hosts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Exit:
    """How a rank's process ended.

    Attributes:
        code: exit code, ``None`` when a signal ended it.
        signal: signal number, ``None`` when it exited by itself.
        error: type and message of the user's exception, empty if there was none.
        traceback: the user's traceback, empty if there was none.
        signature: stable name of the exception's type and place, to recognise it when it comes again.
        output: last lines the rank printed.
    """

    code: int | None = None
    signal: int | None = None
    error: str = ""
    traceback: str = ""
    signature: str = ""
    output: str = ""


@dataclass(frozen=True)
class RankProgress:
    """What a rank's progress page said when its agent last read it.

    Attributes:
        step: step being worked on (completed steps so far), -1 before the first.
        section: innermost named section, ``"step"`` inside a step, ``"start"`` before the first.
        age_s: seconds since the page last changed.
        state: state letter of the process from the kernel: ``R`` running, ``S`` sleeping, ``D`` in
            uninterruptible sleep, ``T`` stopped, ``Z`` dead.
        stalled_s: total seconds the rank has waited for snapshots so far.
    """

    step: int
    section: str
    age_s: float
    state: str = "S"
    stalled_s: float = 0.0


class Phase(StrEnum):
    """Where a run is."""

    WAITING = "waiting"  # for enough cards
    FENCING = "fencing"  # old ranks being stopped, new generation being won in the log
    STARTING = "starting"  # ranks forked, restoring, not all have begun to step
    RUNNING = "running"
    STOPPING = "stopping"  # a clean stop was asked for: last checkpoint, then the end
    DONE = "done"


class Result(StrEnum):
    """How a run ended. The exit code of ``resilience run`` is derived from it."""

    FINISHED = "finished"
    INTERRUPTED = "interrupted"
    USER_ERROR = "user_error"
    BUDGET_EXHAUSTED = "budget_exhausted"
    NO_CAPACITY = "no_capacity"
    FENCED = "fenced"
    UNAVAILABLE = "unavailable"  # storage: the commit log out of reach, or the last state not saved
    NO_CHECKPOINT = "no_checkpoint"  # checkpoints are recorded, but none of them can be restored


@dataclass(frozen=True)
class Outcome:
    """The end of a run: what, why in a sentence, and for ``user_error`` which rank and how it ended."""

    result: Result
    reason: str = ""
    rank: int | None = None
    exit: Exit | None = None


@dataclass(frozen=True)
class Incident:
    """One failure with its story, as far as it is known.

    Attributes:
        id: ``"<generation>-<n>"``, unique in the run.
        kind: ``exit``, ``signal``, ``card``, ``node``, ``hang``, ``restore``, ``start``, ``user``.
        cause: one sentence.
        generation: the generation that failed.
        rank, node, card: who is blamed, ``None`` = unknown or not applicable.
        confidence: 0..1 of the blame.
        decision: what is done: ``restart``, ``replace card``, ``replace node``, ``restore older``, ``stop``.
        reason: why that decision.
        step_failed: the highest step any rank had begun.
        step_began: the step the failed generation began at, where it failed while recovering from another
        incident
            (which already counts the steps before it); 0 else.
        step_restored: the step the next generation begins at; ``None`` until known.
        tier: where it was restored from; ``None`` until known or from scratch.
        at: phase name → when it ended; keys ``failed`` (last sign of life before it, or the event's own
        time),
            ``detected``, ``decided``, ``fenced``, ``started``, ``restored``, ``first_step``.
        signals: further events attributed to the same failure, one line each.
    """

    id: str
    kind: str
    cause: str
    generation: int
    rank: int | None = None
    node: str | None = None
    card: str | None = None
    confidence: float = 1.0
    decision: str = ""
    reason: str = ""
    step_failed: int = 0
    step_began: int = 0
    step_restored: int | None = None
    tier: str | None = None
    at: dict[str, float] = field(default_factory=dict)
    signals: tuple[str, ...] = ()
