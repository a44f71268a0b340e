"""Removing the bytes of a checkpoint that the log has retired.

Owns the order of removal. Which checkpoints may go is decided in ``control.retention``; the retire record and a
grace period come before this, so that nobody begins to read what is about to go. Must never be called for a
checkpoint that the log still holds.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from resilience.checkpoint.part import directory
from resilience.control.types import CheckpointRef
from storage_backends.base import Storage
from storage_backends.recycle import recycle


def delete(storage: Storage, ref: CheckpointRef) -> None:
    """Remove a retired checkpoint's bytes from one tier. May run twice, and go on where it was interrupted.

    Parts go before packs: whoever looks at what is left of a half-deleted checkpoint finds parts missing,
    which every reader refuses. The packs' space is kept for the next ones, where the storage can: this is the one
    place from which a file may be recycled, and only because nothing committed names it any more.
    """
    where = directory(ref.step, ref.generation)
    names = storage.list(where)
    for name in names:
        if name.endswith(".json"):
            storage.delete(name)
    for name in names:
        if name.endswith(".pack"):
            recycle(storage, name)
    storage.delete_all(where)


_DIRECTORY = re.compile(r"checkpoints/step-(\d+)-g(\d+)/?")


def stale(storage: Storage, *, kept: Collection[str], below: int) -> list[CheckpointRef]:
    """What generations before ``below`` left in this tier and the log does not hold, oldest first.

    Saves that were never committed, and retired checkpoints whose removal was interrupted. Ask only after the
    fence of ``below``: from then on nothing of an older generation can be committed any more.

    Args:
        kept: names (``str(ref)``) of the checkpoints the log holds.
    """
    found = []
    for name in storage.list("checkpoints"):
        match = _DIRECTORY.fullmatch(name)
        if match:
            ref = CheckpointRef(int(match[1]), int(match[2]))
            if ref.generation < below and str(ref) not in kept:
                found.append(ref)
    return sorted(found, key=lambda ref: (ref.step, ref.generation))
