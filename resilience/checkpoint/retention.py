"""Retention: which checkpoints may go, and removing the bytes of one that the log has retired.

``choose`` is pure; ``delete`` is the effect, and comes after the retire record and a grace period, so that
nobody begins to read what is about to go. Must never choose the newest good checkpoint, and never count one
that is not committed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from resilience.checkpoint.part import directory
from resilience.control.types import CheckpointRef
from storage_backends.base import Storage


def choose(
    committed: Iterable[CheckpointRef],
    *,
    keep_last: int = 3,
    keep_every: int | None = None,
    verified: Collection[CheckpointRef] | None = None,
    unusable: Collection[CheckpointRef] = (),
) -> tuple[CheckpointRef, ...]:
    """Those to retire, oldest first.

    Args:
        committed: all that the log holds and has not retired, in any order.
        keep_last: so many of the newest good ones stay (at least one does).
        keep_every: steps divisible by this stay as well.
        verified: those known to be good; ``None`` = committed is good enough. What is newer than the newest
            verified one stays, as it may yet turn out good.
        unusable: known to be bad (quarantined): they count for nothing, and go when a good one is newer.
    """
    newest_first = sorted(set(committed), key=lambda ref: (ref.step, ref.generation), reverse=True)
    known = None if verified is None else frozenset(verified)
    bad = frozenset(unusable)
    good = [ref for ref in newest_first if ref not in bad and (known is None or ref in known)]
    if not good:
        return ()
    kept = set(good[: max(keep_last, 1)])
    kept.update(newest_first[: newest_first.index(good[0])])
    if keep_every:
        kept.update(ref for ref in newest_first if ref.step % keep_every == 0 and ref not in bad)
    return tuple(ref for ref in reversed(newest_first) if ref not in kept)


def delete(storage: Storage, ref: CheckpointRef) -> None:
    """Remove a retired checkpoint's bytes from one tier. May run twice, and go on where it was interrupted.

    Parts go before packs: whoever looks at what is left of a half-deleted checkpoint finds parts missing,
    which every reader refuses.
    """
    where = directory(ref.step, ref.generation)
    for name in storage.list(where):
        if name.endswith(".json"):
            storage.delete(name)
    storage.delete_all(where)
