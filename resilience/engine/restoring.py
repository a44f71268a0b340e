"""Restoring without a supervisor: the newest checkpoint that all ranks can read, or the next one.

Owns the way through the candidates (``control.restore`` chooses) and that all ranks take the same. What is damaged is
quarantined in the log; what is merely away is tried once more when nothing else is left. Must never begin from
scratch where a checkpoint is recorded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from resilience.checkpoint.restore import Source, restore_into
from resilience.control.restore import Choice, choose
from resilience.control.types import Candidate, CheckpointRef
from resilience.engine.table import Table
from resilience.errors import CorruptError, InvalidError, ResilienceError, UnavailableError
from resilience.journal.state import Checkpoint, LogState, candidates
from storage_backends.base import Storage

_OK, _CORRUPT, _AWAY, _STOP = "ok", "corrupt", "away", "stop"


class Office(Protocol):
    """Rank 0's clerk, or another rank's follower."""

    @property
    def state(self) -> LogState: ...


@dataclass(frozen=True)
class Place:
    """Where this process restores.

    Attributes:
        shared, nvme: roots of the run; ``nvme`` this node's, ``None`` without that tier.
    """

    run: str
    rank: int
    world_size: int
    node: str
    shared: Storage
    nvme: Storage | None
    threads: int


@dataclass
class _Attempt:
    """How it went for one rank."""

    kind: str
    error: str = ""
    seconds: float = 0.0
    values: dict[str, Any] | None = None
    raised: BaseException | None = None

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "error": self.error, "milliseconds": round(1000 * self.seconds)}


@dataclass(frozen=True)
class Restored:
    """What was restored: its step, and the objects by name (replaced where they cannot change in place)."""

    ref: CheckpointRef
    tier: str
    values: dict[str, Any]


class Follow:
    """A rank that does what rank 0 proposes."""

    def __init__(self, place: Place, office: Office, table: Table) -> None:
        self._place, self._office, self._table = place, office, table

    def restore(self, objects: dict[str, Any], step: int | None) -> Restored | None:
        """As ``Lead.restore``."""
        while True:
            proposal = self._table.proposal()
            if proposal["step"] is None:
                if proposal["error"]:
                    raise _named(proposal["kind"], proposal["error"])
                return None
            ref = CheckpointRef(proposal["step"], proposal["generation"])
            if step is not None and step != ref.step:  # before anything is overwritten
                attempt = _Attempt(_STOP, f"rank {self._place.rank} wants step {step}")
            else:
                attempt = _attempt(self._place, self._office.state, ref, proposal["tier"], objects)
            self._table.answer(attempt.to_json())
            ruling = self._table.ruling()
            if attempt.raised is not None:
                raise attempt.raised
            if ruling["kind"] == _OK:
                assert attempt.values is not None
                return Restored(ref, proposal["tier"], attempt.values)
            if ruling["kind"] == _STOP:
                raise _named("InvalidError", ruling["error"])


class Lead:
    """Rank 0, or the only rank: chooses, and rules.

    Args:
        record: writes an event of the journal.
        quarantine: records that a checkpoint in a tier must not be used.
    """

    def __init__(
        self,
        place: Place,
        office: Office,
        table: Table,
        *,
        record: Callable[..., None],
        quarantine: Callable[[CheckpointRef, str, str], None],
        tell: Callable[[str], None],
    ) -> None:
        self._place, self._office, self._table = place, office, table
        self._record, self._quarantine, self._tell = record, quarantine, tell

    def restore(self, objects: dict[str, Any], step: int | None) -> Restored | None:
        """Fill ``objects``; ``None`` if nothing is recorded.

        Raises:
            CorruptError: checkpoints are recorded, and none can be used.
            UnavailableError: none can be read now.
            InvalidError: the state does not fit, or there is no such step.
        """
        damaged: dict[tuple[CheckpointRef, str], str] = {}
        unread: dict[tuple[CheckpointRef, str], str] = {}
        told: set[tuple[CheckpointRef, str]] = set()
        while True:
            try:
                choice = self._choose(step, damaged, unread)
            except ResilienceError as error:
                self._table.propose({"step": None, "kind": type(error).__name__, "error": str(error)})
                raise
            for candidate, reason in choice.skipped:
                if (candidate.ref, candidate.tier) not in told:
                    told.add((candidate.ref, candidate.tier))
                    self._skip(candidate, reason)
            if choice.candidate is None:
                self._table.propose({"step": None, "kind": "", "error": ""})
                self._record("restore.chosen", {"tier": None}, step=0)
                return None
            restored = self._try(choice.candidate, objects, damaged, unread)
            if restored is not None:
                return restored

    def _choose(
        self,
        step: int | None,
        damaged: Mapping[tuple[CheckpointRef, str], str],
        unread: Mapping[tuple[CheckpointRef, str], str],
    ) -> Choice:
        state = self._office.state
        offered = [each for each in candidates(state) if step is None or each.ref.step == step]
        aside = [
            Candidate(checkpoint.ref, tier, checkpoint.world_size, entry.hosts)
            for checkpoint in state.checkpoints
            for tier, entry in checkpoint.tiers.items()
            if (checkpoint.step, checkpoint.generation, tier) in state.quarantined
            and (step is None or checkpoint.step == step)
        ]
        if step is not None and not offered and not aside:
            steps = sorted({each.ref.step for each in candidates(state)})
            raise InvalidError(
                f"there is no committed checkpoint of step {step}",
                operation="restore",
                step=step,
                hint=f"steps there are: {', '.join(map(str, steps)) or 'none'}",
            )
        nodes = (self._place.node,) if self._place.nvme is not None else ()
        choice = choose(offered, damaged=damaged, unread=unread, nodes=nodes, unusable=aside)
        candidate = choice.candidate
        if candidate is not None and (candidate.ref, candidate.tier) in unread:
            raise UnavailableError(
                f"no checkpoint can be read: {unread[candidate.ref, candidate.tier]}",
                operation="restore",
                step=candidate.ref.step,
                hint="look at the storage, then start again: nothing is lost",
            )
        if choice.stuck:
            reasons = "; ".join(f"{each.ref} in {each.tier}: {why}" for each, why in choice.skipped[:4])
            raise CorruptError(
                f"{choice.stuck}{': ' + reasons if reasons else ''}",
                operation="restore",
                hint="`resilience verify` tells what is damaged; start a new run under another url",
            )
        if choice.warning:
            raise UnavailableError(
                f"checkpoints up to step {max(each.ref.step for each in offered)} lie only in the nvme tier of "
                f"{', '.join(sorted({host for each in offered for host in each.hosts}))}",
                operation="restore",
                hint=f"start on that node (this is {self._place.node}) with the same nvme=, or a new run under another "
                "url",
            )
        return choice

    def _try(
        self,
        candidate: Candidate,
        objects: dict[str, Any],
        damaged: dict[tuple[CheckpointRef, str], str],
        unread: dict[tuple[CheckpointRef, str], str],
    ) -> Restored | None:
        """One candidate, by all ranks. ``None``: it is noted as damaged or unread."""
        ref, tier = candidate.ref, candidate.tier
        data = {"tier": tier, "generation": ref.generation}
        self._record("restore.chosen", data, step=ref.step)
        self._table.propose({"step": ref.step, "generation": ref.generation, "tier": tier})
        own = _attempt(self._place, self._office.state, ref, tier, objects)
        answers = {self._place.rank: own.to_json(), **self._table.answers()}
        worst = _worst(answers)
        kind = worst[1]["kind"] if worst else _OK
        who = "" if self._place.world_size == 1 or worst is None else f"rank {worst[0]}: "
        error = f"{who}{worst[1]['error']}" if worst else ""
        self._table.rule({"kind": kind, "error": error})
        for rank, answer in answers.items():
            if answer["kind"] == _OK:
                seconds = answer["milliseconds"] / 1000
                self._record("restore.done", {"tier": tier, "seconds": seconds}, rank=rank, step=ref.step)
            else:
                failed = {"tier": tier, "reason": answer["error"]}
                self._record("restore.failed", failed, rank=rank, step=ref.step, severity="warning")
        if own.raised is not None:
            raise own.raised
        if kind == _OK:
            assert own.values is not None
            return Restored(ref, tier, own.values)
        if kind == _STOP:
            raise InvalidError(error, operation="restore", step=ref.step, hint="see that rank's own error")
        (damaged if kind == _CORRUPT else unread)[ref, tier] = error.splitlines()[0]
        if kind == _CORRUPT:
            self._quarantine(ref, tier, error.splitlines()[0])
        return None

    def _skip(self, candidate: Candidate, reason: str) -> None:
        data = {"tier": candidate.tier, "reason": reason, "generation": candidate.ref.generation}
        self._record("restore.skipped", data, step=candidate.ref.step, severity="warning")
        self._tell(f"checkpoint {candidate.ref} in {candidate.tier} is passed over: {reason}")


def _worst(answers: Mapping[int, dict[str, Any]]) -> tuple[int, dict[str, Any]] | None:
    """The answer that decides, ``None`` if all are well."""
    for kind in (_STOP, _CORRUPT, _AWAY):
        for rank in sorted(answers):
            if answers[rank]["kind"] == kind:
                return rank, answers[rank]
    return None


def _attempt(
    place: Place, state: LogState, ref: CheckpointRef, tier: str, objects: dict[str, Any]
) -> _Attempt:
    """Restore what this rank needs. Whatever goes wrong is an answer: the others wait for it."""
    begun = time.monotonic()
    try:
        values = restore_into(
            _sources(place, state, ref, tier),
            objects,
            rank=place.rank,
            world_size=place.world_size,
            run=place.run,
            step=ref.step,
            generation=ref.generation,
            threads=place.threads,
        )
    except CorruptError as error:
        return _Attempt(_CORRUPT, str(error))
    except (UnavailableError, FileNotFoundError) as error:
        return _Attempt(_AWAY, str(error))
    except Exception as error:  # noqa: BLE001 - raised again when the others know
        return _Attempt(_STOP, f"{type(error).__name__}: {error}", raised=error)
    return _Attempt(_OK, seconds=time.monotonic() - begun, values=values)


def _sources(place: Place, state: LogState, ref: CheckpointRef, tier: str) -> list[Source]:
    found: Checkpoint | None = next((each for each in state.checkpoints if each.ref == ref), None)
    if found is None or tier not in found.tiers:
        raise UnavailableError(f"{ref} was retired meanwhile", operation="restore", step=ref.step)
    sources = []
    for part in found.tiers[tier].parts:
        storage = place.shared
        if tier == "nvme":
            if place.nvme is None or part.node != place.node:
                raise UnavailableError(
                    f"a pack of {ref} lies on the disk of {part.node}, and this is {place.node}",
                    operation="restore",
                    step=ref.step,
                )
            storage = place.nvme
        sources.append(Source(part.rank, storage, part.name, part.sha256))
    return sources


def _named(kind: str, text: str) -> ResilienceError:
    classes: dict[str, type[ResilienceError]] = {
        "CorruptError": CorruptError,
        "UnavailableError": UnavailableError,
    }
    cls = classes.get(kind, InvalidError)
    return cls(text.partition("\n  hint: ")[0], operation="restore", hint="rank 0 says so; see its error")
