"""What the commit log means: generation in charge, checkpoints that exist, those not to be used, the end.

Owns the reading of record bodies. Pure: the same records give the same state, whoever folds them and when.
Must never look at the bytes a record refers to; whether those still verify is for who restores them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from resilience.control.types import Candidate, CheckpointRef
from resilience.errors import CorruptError
from resilience.journal.records import Kind, Record, check_body

#: Nearest first. A tier not named here comes after those that are.
TIERS = ("nvme", "shared")


class PartRef(NamedTuple):
    """One rank's part, as the checkpoint record names it.

    Attributes:
        rank: the rank that wrote it.
        node: node holding it (and its pack) for ``nvme``; where the rank ran for ``shared``.
        name: object name of the part within its tier's storage.
        sha256: SHA-256 (hex) of the part's bytes.
    """

    rank: int
    node: str
    name: str
    sha256: str


@dataclass(frozen=True)
class TierEntry:
    """A checkpoint in one tier.

    Attributes:
        slot: of the record that says so.
        hosts: node holding the pack of each rank (index = rank); empty for ``shared``.
        parts: by rank.
        size: bytes of all packs.
    """

    slot: int
    hosts: tuple[str, ...]
    parts: tuple[PartRef, ...]
    size: int


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint: completed steps, the generation that wrote it, and where it lies by tier."""

    step: int
    generation: int
    world_size: int
    tiers: dict[str, TierEntry]

    @property
    def ref(self) -> CheckpointRef:
        return CheckpointRef(self.step, self.generation)


@dataclass(frozen=True)
class LogState:
    """The meaning of a log.

    Attributes:
        generation: the one in charge, 0 before the first.
        checkpoints: newest first (by step, then generation); retired ones are gone, quarantined ones are not.
        quarantined: (step, generation, tier) → reason.
        finished: body of the newest finish record, ``None`` if there is none. A later fence does not undo it.
        retired: every checkpoint ever retired: its bytes may be deleted, and it never comes back.
    """

    generation: int = 0
    checkpoints: tuple[Checkpoint, ...] = ()
    quarantined: dict[tuple[int, int, str], str] = field(default_factory=dict)
    finished: dict[str, Any] | None = None
    retired: frozenset[CheckpointRef] = frozenset()


def fold(records: Iterable[Record]) -> LogState:
    """The state after ``records`` (all of them, oldest first).

    A record whose generation is below the highest earlier fence is ignored: its writer was no longer in
    charge. ``CorruptError`` when a body lacks what its kind must have.
    """
    generation = 0
    checkpoints: dict[CheckpointRef, Checkpoint] = {}
    quarantined: dict[tuple[int, int, str], str] = {}
    finished: dict[str, Any] | None = None
    retired: set[CheckpointRef] = set()
    for record in records:
        if record.generation < generation:
            continue
        body = _body(record)
        if record.kind is Kind.FENCE:
            generation = record.generation
        elif record.kind is Kind.CHECKPOINT:
            found = _checkpoint(record, body)
            known = checkpoints.get(found.ref)
            tiers = {**known.tiers, **found.tiers} if known else found.tiers
            checkpoints[found.ref] = Checkpoint(found.step, found.generation, found.world_size, tiers)
        elif record.kind is Kind.RETIRE:
            retired.update(CheckpointRef(ref["step"], ref["generation"]) for ref in body["refs"])
        elif record.kind is Kind.QUARANTINE:
            quarantined[body["step"], body["generation"], body["tier"]] = body["reason"]
        elif record.kind is Kind.FINISH:
            finished = body
    # Retiring is for ever, whatever order a late drain's record came in: its bytes may be gone already.
    kept = [checkpoint for ref, checkpoint in checkpoints.items() if ref not in retired]
    kept.sort(key=lambda checkpoint: (checkpoint.step, checkpoint.generation), reverse=True)
    return LogState(generation, tuple(kept), quarantined, finished, frozenset(retired))


def candidates(state: LogState) -> tuple[Candidate, ...]:
    """What may be restored: newest step first, within a step the nearer tier first, nothing quarantined."""
    found = [
        Candidate(checkpoint.ref, tier, checkpoint.world_size, entry.hosts)
        for checkpoint in state.checkpoints
        for tier, entry in checkpoint.tiers.items()
        if (checkpoint.step, checkpoint.generation, tier) not in state.quarantined
    ]
    found.sort(key=lambda it: (-it.ref.step, _distance(it.tier), it.tier, -it.ref.generation))
    return tuple(found)


def _checkpoint(record: Record, body: dict[str, Any]) -> Checkpoint:
    parts = tuple(
        sorted(PartRef(part["rank"], part["node"], part["name"], part["sha256"]) for part in body["parts"])
    )
    hosts = () if body["tier"] == "shared" else tuple(part.node for part in parts)
    entry = TierEntry(record.slot, hosts, parts, body["size"])
    # A later generation may record a tier of an older one's checkpoint (a drain that outlived it): it names
    # it.
    generation = body.get("generation", record.generation)
    return Checkpoint(body["step"], generation, body["world_size"], {body["tier"]: entry})


def _body(record: Record) -> dict[str, Any]:
    wrong = check_body(record.kind, record.body)
    if wrong is None:
        return record.body
    path = f"log/{record.slot:020d}.json"
    raise CorruptError(
        f"log record {path} cannot be used: {wrong}",
        operation="commit log",
        path=path,
        generation=record.generation,
        hint="a faulty writer made it (its checksum is right); report this with the record",
    )


def _distance(tier: str) -> int:
    return TIERS.index(tier) if tier in TIERS else len(TIERS)
