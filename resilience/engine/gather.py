"""What other ranks' saves have left in shared storage: their parts there, their receipts, their failures.

Owns the looking; it decides nothing. Reads only, each object once.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from resilience.checkpoint.part import Part, directory, sha256
from resilience.control.types import CheckpointRef
from resilience.engine import notes
from resilience.engine.notes import Failure, Receipt
from storage_backends.base import Storage

_THREADS = 8


class Gatherer:
    """Args:
    storage: rooted at the run.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._seen: dict[CheckpointRef, set[str]] = {}

    def look(
        self, ref: CheckpointRef, *, parts: bool = True, skip: int | None = None
    ) -> list[Receipt | Failure]:
        """What is new about a save since the last look. A part in shared storage comes as a receipt of that tier,
        with an empty node.

        Args:
            parts: also look at parts (they may be large).
            skip: a rank whose objects are of no interest.
        """
        seen = self._seen.setdefault(ref, set())
        names = []
        for name in self._storage.list(directory(ref.step, ref.generation)):
            part, note = notes.rank_of_part(name), notes.rank_of_note(name)
            rank = note if note is not None else part if parts else None
            if name not in seen and rank is not None and rank != skip:
                names.append(name)
        if not names:
            return []
        found = self._read_all(names)
        seen.update(name for name, note in zip(names, found, strict=True) if note is not None)
        # Nearer tiers first: they are what is waited for.
        return sorted((note for note in found if note is not None), key=lambda note: (note.tier, note.rank))

    def forget(self, ref: CheckpointRef) -> None:
        self._seen.pop(ref, None)

    def _read_all(self, names: list[str]) -> list[Receipt | Failure | None]:
        with ThreadPoolExecutor(min(_THREADS, len(names)), thread_name_prefix="gather") as pool:
            try:
                jobs = [pool.submit(self._read, name) for name in names]
            except RuntimeError:  # the interpreter is ending, and begins no more threads
                return [self._read(name) for name in names]
            return [job.result() for job in jobs]

    def _read(self, name: str) -> Receipt | Failure | None:
        try:
            data = self._storage.read(name)
        except FileNotFoundError:  # listed, and not there yet, or any more
            return None
        if notes.rank_of_note(name) is not None:
            return notes.decode(data, path=name)
        part = Part.decode(data, path=name)
        return Receipt(part.rank, part.world_size, "", "shared", name, sha256(data), part.size)


def complete(found: list[Receipt | Failure], tier: str) -> list[Receipt] | None:
    """The receipts of all ranks in ``tier``, by rank; ``None`` unless all are there and of one world."""
    receipts = {note.rank: note for note in found if isinstance(note, Receipt) and note.tier == tier}
    worlds = {note.world_size for note in receipts.values()}
    if len(worlds) != 1 or sorted(receipts) != list(range(worlds.pop())):
        return None
    return [receipts[rank] for rank in sorted(receipts)]


def left_by(storage: Storage, generation: int) -> Iterator[CheckpointRef]:
    """The saves of which ``generation`` left anything in shared storage, oldest first."""
    from resilience.checkpoint.retention import stale

    for ref in stale(storage, kept=(), below=generation + 1):
        if ref.generation == generation:
            yield ref
