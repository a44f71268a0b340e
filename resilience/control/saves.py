"""Checkpoints on their way: which ranks sealed and persisted which step, and when a tier is complete.

Owns the counting of one generation's saves. A ``Commit`` comes from here only, once per checkpoint and tier,
and only when every rank's part is durable. It knows nothing of phases: a fence drops the whole record.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from resilience.control.commands import Commit
from resilience.control.events import Persisted, Sealed
from resilience.control.persistent import Ranks, Vec
from resilience.control.retention import NVME, SHARED
from resilience.control.types import CheckpointRef

Part = tuple[str, str, str]  # node, part name, sha256

# Saves followed at once: as many as hold a quarter of a million parts, between these bounds. Ranks that do not wait
# for each other may be that many saves apart; with the shared tier away for hours the oldest are forgotten.
_PARTS = 1 << 18
_FEWEST, _MOST = 16, 1024


@dataclass(frozen=True)
class TierSave:
    """One save in one tier. ``asked``: its commit was sent; ``done``: the log records it; ``failed``: it
    cannot be complete any more."""

    parts: Vec[Part | None]
    ranks: Ranks = field(default_factory=Ranks)
    size: int = 0
    asked: bool = False
    done: bool = False
    failed: bool = False


@dataclass(frozen=True)
class Save:
    """One step's checkpoint on its way. ``since`` is when its first rank sealed it."""

    ref: CheckpointRef
    since: float
    sealed: Ranks = field(default_factory=Ranks)
    stall_s: float = 0.0
    tiers: dict[str, TierSave] = field(default_factory=dict)
    closed: bool = False  # nothing about it counts any more
    error: str = ""  # why a part of it is missing for good, if one is

    def committed(self) -> bool:
        return any(tier.done for tier in self.tiers.values())

    def pending(self) -> bool:
        """Whether a commit was sent and not yet answered."""
        return any(tier.asked and not tier.done and not tier.failed for tier in self.tiers.values())

    def settled(self) -> bool:
        """Whether nothing more is to be expected of it: it lies in the shared tier, or cannot get there, nor
        into another one."""
        shared = self.tiers.get(SHARED)
        if self.closed or (shared is not None and shared.done):
            return True
        near = self.tiers.get(NVME)
        return shared is not None and shared.failed and (near is None or near.done or near.failed)

    def idle(self) -> bool:
        """Whether no tier has it and nothing says that it still goes to the shared one."""
        return not self.committed() and SHARED not in self.tiers

    def tier(self, name: str, world: int) -> TierSave:
        return self.tiers.get(name) or TierSave(Vec.filled(world, None))

    def put(self, name: str, tier: TierSave) -> Save:
        return replace(self, tiers={**self.tiers, name: tier})


@dataclass(frozen=True)
class Saves:
    """The saves of ``generation`` (0: none is accepted), by step.

    ``touched`` is the newest event's time; steps below ``floor`` are closed: what is still said of them is
    late. ``forgotten``: saves dropped because too many were under way, committed ones not counted.
    """

    generation: int = 0
    world: int = 0
    touched: float = 0.0
    floor: int = 0
    forgotten: int = 0
    steps: dict[int, Save] = field(default_factory=dict)

    def open(self, generation: int, step: int) -> bool:
        """Whether events about ``step`` of ``generation`` still count."""
        if generation != self.generation or generation == 0 or step < self.floor:
            return False
        save = self.steps.get(step)
        return save is None or not save.closed

    def get(self, step: int, at: float) -> Save:
        return self.steps.get(step) or Save(CheckpointRef(step, self.generation), at)

    def put(self, save: Save, at: float) -> Saves:
        steps = {**self.steps, save.ref.step: save}
        made = replace(self, steps=steps, touched=max(self.touched, at))
        return made._forget() if len(steps) > most(self.world) else made

    def _forget(self) -> Saves:
        """With one save less. The oldest, where every rank has sealed a newer one; else the ranks are far apart,
        and what the last of them has yet to come to must stay: the newest but one."""
        order = sorted(self.steps)
        oldest = any(self.sealed(step) for step in order[1:])
        gone = self.steps[order[0] if oldest else order[-2]]
        steps = {step: save for step, save in self.steps.items() if save is not gone}
        forgotten = self.forgotten + (not gone.committed() and not gone.closed)
        return replace(self, steps=steps, floor=order[1] if oldest else self.floor, forgotten=forgotten)

    def sealed(self, step: int) -> bool:
        """Whether every rank has sealed ``step``."""
        save = self.steps.get(step)
        return save is not None and save.sealed.count == self.world

    def newest(self, upto: int) -> Save | None:
        """The newest save that any rank tried, of those at step ``upto`` or before."""
        tried = [step for step in self.steps if step <= upto]
        return self.steps[max(tried)] if tried else None

    def outstanding(self) -> bool:
        """Whether a commit was sent and not yet answered."""
        return any(save.pending() for save in self.steps.values())


def most(world: int) -> int:
    """Saves of a world of this size that are followed at once."""
    return max(_FEWEST, min(_MOST, _PARTS // max(1, world)))


def seal(saves: Saves, event: Sealed) -> Saves:
    save = saves.get(event.step, event.at)
    save = replace(
        save,
        since=min(save.since, event.at),
        sealed=save.sealed.add(event.rank),
        stall_s=max(save.stall_s, event.stall_s),
    )
    return saves.put(save, event.at)


def persist(saves: Saves, event: Persisted) -> tuple[Saves, Commit | None]:
    """One more rank is durable in a tier; the commit, when it was the last one. A repeated report changes
    nothing: the first part named is the one committed."""
    save = saves.get(event.step, event.at)
    tier = save.tier(event.tier, saves.world)
    if event.rank in tier.ranks or not 0 <= event.rank < saves.world:
        return saves, None
    tier = replace(
        tier,
        parts=tier.parts.set(event.rank, (event.node, event.part, event.sha256)),
        ranks=tier.ranks.add(event.rank),
        size=tier.size + event.size,
    )
    commit = None
    if tier.ranks.count == saves.world and not tier.failed:
        parts = tuple((rank, *part) for rank, part in enumerate(tier.parts) if part is not None)
        commit = Commit(save.ref, event.tier, parts, tier.size)
        tier = replace(tier, asked=True)
    # What is durable was sealed, even where the report of the seal is still on its way.
    save = replace(save.put(event.tier, tier), sealed=save.sealed.add(event.rank))
    return saves.put(save, event.at), commit


def fail(saves: Saves, step: int, tier: str, at: float, error: str = "") -> tuple[Saves, bool]:
    """The save of ``step`` in ``tier`` cannot be complete. Second value: whether that is news."""
    save = saves.get(step, at)
    state = save.tier(tier, saves.world)
    if state.failed or state.done:
        return saves, False
    save = replace(save, error=save.error or error)
    if tier not in (NVME, SHARED):
        # A rank has no snapshot of this step: no tier will ever have all parts.
        for name in (NVME, SHARED):
            if not save.tier(name, saves.world).done:
                save = save.put(name, replace(save.tier(name, saves.world), failed=True))
    return saves.put(save.put(tier, replace(state, failed=True)), at), True


def commit(saves: Saves, step: int, tier: str, at: float) -> tuple[Saves, tuple[CheckpointRef, ...]]:
    """``step`` is committed in ``tier``. Returned with the saves: the older ones that never will be, now."""
    save = saves.steps.get(step)
    if save is None:
        return saves, ()
    saves = saves.put(save.put(tier, replace(save.tier(tier, saves.world), done=True)), at)
    # Writers work in order of steps: when every rank has persisted a newer step in a tier, an older one that is not
    # complete there never will be. Those still on their way to the shared tier are left alone by a nearer one.
    over = [
        old.ref
        for old in saves.steps.values()
        if old.ref.step < step and not old.closed and not old.pending() and (tier == SHARED or old.idle())
    ]
    abandoned = tuple(ref for ref in over if not saves.steps[ref.step].committed())
    return close(saves, over), abandoned


def close(saves: Saves, refs: Iterable[CheckpointRef]) -> Saves:
    """Nothing about ``refs`` counts any more. What is closed without a gap from below is forgotten."""
    steps = dict(saves.steps)
    for ref in refs:
        if ref.step in steps and ref.generation == saves.generation:
            steps[ref.step] = replace(steps[ref.step], closed=True)
    still = [step for step, save in steps.items() if not save.closed]
    floor = max(saves.floor, min(still)) if still else saves.floor
    return replace(saves, floor=floor, steps={step: save for step, save in steps.items() if step >= floor})


def draining(saves: Saves) -> frozenset[CheckpointRef]:
    """Saves with a commit unanswered, or on their way to the shared tier: those that have parts there, and the
    oldest that may still get there, which is the one the writers are at."""
    way = [save.ref for save in saves.steps.values() if save.pending()]
    oldest = True
    for step in sorted(saves.steps):
        save = saves.steps[step]
        shared = save.tiers.get(SHARED)
        if save.closed or (shared is not None and (shared.done or shared.failed)):
            continue
        if oldest or shared is not None:
            way.append(save.ref)
        oldest = False
    return frozenset(way)
