"""Which checkpoints may go: a pure rule over the committed ones.

Owns the rule only; what it names is retired in the log first, and its bytes go after the grace period. It
never names the newest, the only one, nor the newest that lies in the shared tier: a checkpoint that exists on
nodes alone is gone with one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from resilience.control.types import CheckpointRef

SHARED = "shared"
NVME = "nvme"


@dataclass(frozen=True)
class Kept:
    """A committed checkpoint and the tiers that hold it (quarantined tiers left out)."""

    ref: CheckpointRef
    tiers: frozenset[str]

    @property
    def order(self) -> tuple[int, int]:
        return (self.ref.step, self.ref.generation)


def add(kept: Sequence[Kept], ref: CheckpointRef, tier: str) -> tuple[Kept, ...]:
    """``kept`` with ``tier`` added to ``ref``, newest first."""
    by_ref = {entry.ref: entry for entry in kept}
    entry = by_ref.get(ref, Kept(ref, frozenset()))
    by_ref[ref] = replace(entry, tiers=entry.tiers | {tier})
    return tuple(sorted(by_ref.values(), key=lambda each: each.order, reverse=True))


def remove(kept: Sequence[Kept], ref: CheckpointRef, tier: str) -> tuple[Kept, ...]:
    """``kept`` without ``tier`` of ``ref``; a checkpoint with no tier left counts as none."""
    left = (replace(entry, tiers=entry.tiers - {tier}) if entry.ref == ref else entry for entry in kept)
    return tuple(entry for entry in left if entry.tiers)


def retire(kept: Sequence[Kept], *, keep_last: int, keep_every: int | None) -> tuple[CheckpointRef, ...]:
    """The checkpoints that are no longer wanted, oldest first.

    Kept are: the newest ``keep_last`` (at least 1) by step, then generation; those whose step is divisible by
    ``keep_every``; and the newest in the shared tier. What a later generation has gone back behind (it could not be
    read, or lay on lost nodes) counts for none of that, or it would push out what training goes on from; it goes
    when a later one of the shared tier has come past it.
    """
    behind = left_behind(kept)
    order = sorted((e for e in kept if e.ref not in behind), key=lambda entry: entry.order, reverse=True)
    stay = {entry.ref for entry in order[: max(1, keep_last)]}
    stay.update(entry.ref for entry in order if keep_every and entry.ref.step % keep_every == 0)
    shared = next((entry.ref for entry in order if SHARED in entry.tiers), None)
    if shared is not None:
        stay.add(shared)
    stay.update(ref for ref in behind if shared is None or ref.step > shared.step)
    return tuple(entry.ref for entry in sorted(kept, key=lambda e: e.order) if entry.ref not in stay)


def left_behind(kept: Sequence[Kept]) -> frozenset[CheckpointRef]:
    """Checkpoints of which a later generation knows nothing: it has one of a lower or the same step."""
    lowest: dict[int, int] = {}  # by generation: of it and all later ones
    low = None
    for entry in sorted(kept, key=lambda e: -e.ref.generation):
        low = entry.ref.step if low is None else min(low, entry.ref.step)
        lowest[entry.ref.generation] = low
    found = set()
    for entry in kept:
        later = [step for generation, step in lowest.items() if generation > entry.ref.generation]
        if later and min(later) <= entry.ref.step:
            found.add(entry.ref)
    return frozenset(found)
