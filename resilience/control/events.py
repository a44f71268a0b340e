"""What can happen to a run: the inputs of ``supervise.step``. Observed by ``runtime``, decided on here.

Every event carries ``at``, seconds on the supervisor's clock. Events of a generation other than the current
one are ignored by the supervisor except where said.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from resilience.control.types import Candidate, Card, CheckpointRef, Exit, Node, RankProgress


@dataclass(frozen=True)
class NodeJoined:
    """A node's agent is up and its zygote is warm: it can fork ranks in milliseconds."""

    at: float
    node: Node


@dataclass(frozen=True)
class LoadFailed:
    """A node's zygote could not import the user's module: it cannot fork ranks, and does not join."""

    at: float
    node: str
    error: str
    traceback: str = ""


@dataclass(frozen=True)
class NodeLost:
    """The node died, or its agent fell silent. ``last_seen`` is the last sign of life."""

    at: float
    name: str
    reason: str
    last_seen: float


@dataclass(frozen=True)
class CardFaulted:
    """A card's driver, or somebody else, reported a fault.

    Attributes:
        code: the vendor's (or ``simulated``).
        action: what the code asks for: a value of ``faults.Action``; ``watch`` where nobody knows the code.
        name: what the code means, if that is known.
        affects: cards that fail with it (the other die of the same card).
        limit: so many of the code on one card within a day are answered by replacing the card; ``None`` = never.
        certain: whoever reported it chose the action: it is never taken for a fault of software.
        source: who reported it: ``driver`` or the name a reporter gave.
    """

    at: float
    card: Card
    code: str
    detail: str = ""
    action: str = "replace card"
    name: str = ""
    affects: tuple[Card, ...] = ()
    limit: int | None = None
    certain: bool = False
    source: str = "driver"

    @property
    def cards(self) -> frozenset[Card]:
        """The card, and those that fail with it."""
        return frozenset((self.card, *self.affects))


@dataclass(frozen=True)
class StoreReady:
    """The rendezvous store asked for by ``OpenStore`` listens at ``address`` (``host:port``)."""

    at: float
    generation: int
    address: str


@dataclass(frozen=True)
class Fenced:
    """The fence asked for was won. ``generation`` is the number to use from now on (at least the one asked
    for); ``candidates`` are the committed, not retired, not quarantined checkpoints, newest first, nearer
    tier first within a step."""

    at: float
    generation: int
    candidates: tuple[Candidate, ...] = ()
    finished: bool = False  # the log already holds a finish record: nothing is left to do
    unusable: tuple[
        Candidate, ...
    ] = ()  # recorded and not retired, but quarantined: never a reason to start over
    slot: int | None = None  # of the fence record, for the journal


@dataclass(frozen=True)
class FenceLost:
    """Another supervisor of this run holds a newer generation (or the log could not be reached)."""

    at: float
    reason: str
    newer: bool = True  # False: storage unavailable after all retries


@dataclass(frozen=True)
class RanksStopped:
    """Every process of ``generation`` (and older) on ``node`` is gone. Accepted for older generations."""

    at: float
    generation: int
    node: str


@dataclass(frozen=True)
class Restored:
    """A rank has its state. ``step`` completed steps (0 and tier ``None`` from scratch)."""

    at: float
    generation: int
    rank: int
    step: int
    tier: str | None
    seconds: float = 0.0


@dataclass(frozen=True)
class RestoreFailed:
    """A rank could not restore from the chosen candidate; ``reason`` names object and byte range. Not
    ``corrupt``: it could not be read now (storage away), so it is passed over this time but not
    quarantined."""

    at: float
    generation: int
    rank: int
    ref: CheckpointRef
    tier: str
    reason: str
    corrupt: bool = True


@dataclass(frozen=True)
class Progress:
    """Progress pages of one node's ranks, at most once a second and node, and at once when a rank begins its
    first step."""

    at: float
    generation: int
    node: str
    ranks: dict[int, RankProgress] = field(default_factory=dict)


@dataclass(frozen=True)
class RankExited:
    """A rank's process ended. A rank that returned normally sends ``RankFinished`` first. ``step``: what its progress
    page said last, so that the account of lost steps does not depend on when pages were read."""

    at: float
    generation: int
    rank: int
    exit: Exit
    step: int | None = None


@dataclass(frozen=True)
class RankFinished:
    """The user's function returned on this rank, after ``steps`` completed steps; or, with ``stopped``, it
    left the loop at the stop point that ``PostStop`` named."""

    at: float
    generation: int
    rank: int
    steps: int
    stopped: bool = False


@dataclass(frozen=True)
class Sealed:
    """A rank's snapshot of ``step`` is complete in memory; training waited ``stall_s`` for it."""

    at: float
    generation: int
    rank: int
    step: int
    stall_s: float
    size: int


@dataclass(frozen=True)
class Persisted:
    """Pack and part of one rank are durable in ``tier``; ``part`` and ``sha256`` name the part's bytes.
    Accepted for the generation that wrote them until the next fence is asked for."""

    at: float
    generation: int
    rank: int
    step: int
    tier: str
    node: str
    part: str
    sha256: str
    size: int
    seconds: float


@dataclass(frozen=True)
class SaveFailed:
    """One rank's save of ``step`` to ``tier`` failed for good (retried already). Training goes on. Any tier
    but ``nvme`` and ``shared`` (``memory``): there was no snapshot, so the step cannot be saved in any."""

    at: float
    generation: int
    rank: int
    step: int
    tier: str
    error: str


@dataclass(frozen=True)
class Committed:
    """The commit log records the checkpoint in ``tier``: it is acknowledged from here on."""

    at: float
    ref: CheckpointRef
    tier: str
    slot: int


@dataclass(frozen=True)
class CommitFailed:
    """The record could not be written (storage away). The bytes stay; the checkpoint does not count."""

    at: float
    ref: CheckpointRef
    tier: str
    error: str


@dataclass(frozen=True)
class FinishRecorded:
    """The log holds the finish record asked for by ``RecordFinish``: only now the run has finished."""

    at: float


@dataclass(frozen=True)
class FinishFailed:
    """The finish record could not be written (storage away, retried already). A newer generation in the log is
    ``FenceLost``, not this."""

    at: float
    error: str


@dataclass(frozen=True)
class CheckpointMissed:
    """A rank had already passed the step that ``PostCheckpoint`` or ``PostStop`` named; it is at ``step``."""

    at: float
    generation: int
    rank: int
    wanted: int
    step: int


@dataclass(frozen=True)
class Parked:
    """A rank waits at the stop point ``step``, its state unchanged since that step."""

    at: float
    generation: int
    rank: int
    step: int


@dataclass(frozen=True)
class StopRequested:
    """The user asked for a clean end (Ctrl-C, or the API): last checkpoint, then stop. ``at_once``: without one."""

    at: float
    reason: str = "interrupted"
    at_once: bool = False


@dataclass(frozen=True)
class Tick:
    """Time passed (about every 0.25 s): deadlines are judged here and nowhere else."""

    at: float


Event = (
    NodeJoined
    | LoadFailed
    | NodeLost
    | CardFaulted
    | StoreReady
    | Fenced
    | FenceLost
    | RanksStopped
    | Restored
    | RestoreFailed
    | Progress
    | RankExited
    | RankFinished
    | Sealed
    | Persisted
    | SaveFailed
    | Committed
    | CommitFailed
    | FinishRecorded
    | FinishFailed
    | CheckpointMissed
    | Parked
    | StopRequested
    | Tick
)
