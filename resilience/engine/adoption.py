"""Adoption: what the start before has made durable and could not record any more is committed by this one.

Owns the rule of what counts: every rank's part, and of the generation just before only; of an older one the run has
long gone another way. Never called before our fence: then nobody else can record anything of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from resilience.control.commands import Commit
from resilience.control.types import CheckpointRef
from resilience.engine.gather import Gatherer, complete, left_by
from resilience.engine.notes import Receipt
from resilience.errors import CorruptError, ResilienceError
from resilience.journal.state import LogState
from storage_backends.base import Storage

_TIERS = ("nvme", "shared")


def adoptable(
    storage: Storage, state: LogState, *, before: int, warn: Callable[[str], None]
) -> Iterator[Commit]:
    """The commits that generation ``before`` owes, oldest step first.

    Args:
        storage: rooted at the run.
        state: of the log, after our fence.
        warn: told of what is there and cannot be used.
    """
    recorded = {(checkpoint.ref, tier) for checkpoint in state.checkpoints for tier in checkpoint.tiers}
    for ref in left_by(storage, before):
        if ref in state.retired or all((ref, tier) in recorded for tier in _TIERS):
            continue
        try:
            found = Gatherer(storage).look(ref)
        except CorruptError as error:
            warn(f"what is left of {ref} cannot be used: {error}")
            continue
        except ResilienceError as error:
            warn(f"could not see what is left of {ref}: {error}")
            continue
        near = {note.rank: note.node for note in found if isinstance(note, Receipt) and note.node}
        for tier in _TIERS:
            receipts = complete(found, tier)
            if receipts is not None and (ref, tier) not in recorded:
                yield _commit(ref, tier, receipts, near)


def _commit(ref: CheckpointRef, tier: str, receipts: list[Receipt], nodes: dict[int, str]) -> Commit:
    parts = tuple(
        (note.rank, note.node or nodes.get(note.rank, ""), note.part, note.sha256) for note in receipts
    )
    return Commit(ref, tier, parts, sum(note.size for note in receipts))
