"""The life of checkpoints: sealed, persisted, committed, retired; and when the next one is asked for.

Owns what ``saves``, ``retention`` and ``cadence`` count becoming commands and journal lines. A save that
fails never stops training: it is told with the age of the last good checkpoint, and the next one is tried.
"""

from __future__ import annotations

from dataclasses import replace

from resilience.control import cadence, progress, recovery, retention, saves
from resilience.control.commands import PostCheckpoint, Retire
from resilience.control.ending import complete, note
from resilience.control.events import CommitFailed, Committed, Persisted, SaveFailed, Sealed
from resilience.control.state import Turn
from resilience.control.stopping import advance
from resilience.control.types import Phase


def sealed(turn: Turn, event: Sealed) -> None:
    state = turn.state
    if not state.saves.open(event.generation, event.step) or not 0 <= event.rank < len(state.table):
        return
    held = state.saves.steps.get(event.step)
    if held is not None and event.rank in held.sealed:
        return
    after = saves.seal(state.saves, event)
    save = after.steps.get(event.step)
    if save is None:  # forgotten as soon as begun
        turn.put(saves=after)
        return
    turn.put(
        saves=after,
        pages=progress.reach(state.pages, event.step, event.at),
        cadence=cadence.sealed(state.cadence, event.step, save.since, save.stall_s, after.sealed(event.step)),
    )
    data = {"stall_s": event.stall_s, "size": event.size}
    turn.record("checkpoint.sealed", data, rank=event.rank, step=event.step)
    _tell_forgotten(turn, state.saves.forgotten)
    _go_on(turn)


def persisted(turn: Turn, event: Persisted) -> None:
    state = turn.state
    if not state.saves.open(event.generation, event.step):
        return
    after, commit = saves.persist(state.saves, event)
    if after is state.saves:
        return
    turn.put(saves=after)
    data = {"tier": event.tier, "size": event.size, "seconds": event.seconds}
    turn.record("checkpoint.persisted", data, rank=event.rank, node=event.node, step=event.step)
    _tell_forgotten(turn, state.saves.forgotten)
    if commit is not None:
        turn.do(commit)
    _go_on(turn)


def save_failed(turn: Turn, event: SaveFailed) -> None:
    if turn.state.saves.open(event.generation, event.step):
        _failed(turn, event.step, event.tier, event.error, event.rank)


def commit_failed(turn: Turn, event: CommitFailed) -> None:
    save = turn.state.saves.steps.get(event.ref.step)
    if save is not None and save.ref == event.ref and event.tier in save.tiers:
        _failed(turn, event.ref.step, event.tier, event.error, None)
    turn.put(orphans=turn.state.orphans - {(event.ref, event.tier)})


def committed(turn: Turn, event: Committed) -> None:
    """The log records it. An answer that comes after the next fence was asked for still tells the truth."""
    state = turn.state
    place = (event.ref, event.tier)
    save = state.saves.steps.get(event.ref.step)
    ours = save is not None and save.ref == event.ref and event.tier in save.tiers
    if not ours:
        if place in state.orphans:
            turn.put(orphans=state.orphans - {place}, safe_at=turn.now)
            turn.record("checkpoint.committed", {"tier": event.tier, "slot": event.slot}, step=event.ref.step)
        return
    assert save is not None
    tier = save.tiers[event.tier]
    if not tier.asked or tier.done:
        return
    after, abandoned = saves.commit(state.saves, event.ref.step, event.tier, event.at)
    durable_s = max(0.0, event.at - save.since)
    turn.put(
        saves=after,
        safe_at=turn.now,
        kept=retention.add(state.kept, event.ref, event.tier),
        cadence=cadence.durable(state.cadence, event.tier, durable_s),
        failures=replace(state.failures, committed=True),
    )
    turn.record(
        "checkpoint.committed",
        {
            "tier": event.tier,
            "size": tier.size,
            "stall_s": save.stall_s,
            "durable_s": durable_s,
            "slot": event.slot,
            "generation": event.ref.generation,
        },
        step=event.ref.step,
    )
    for ref in abandoned:
        reason = f"not every rank's part became durable; step {event.ref.step} is committed instead"
        turn.record("checkpoint.abandoned", {"reason": reason}, step=ref.step)
    _retire(turn)
    _go_on(turn)


def ask(turn: Turn) -> None:
    """A tick: ask for a checkpoint when one is due."""
    state = turn.state
    idle = state.phase is Phase.RUNNING and state.trouble is None and not state.pages.finished.count
    if not idle or cadence.busy(state.saves, state.cadence, turn.now):
        return
    if cadence.due(state.policy, state.cadence, state.pages, turn.now):
        _post(turn, state.pages.top)


def missed(turn: Turn, wanted: int, step: int) -> None:
    """A rank was past the step asked for: ask again, farther ahead."""
    state = turn.state
    turn.put(pages=progress.reach(state.pages, step, turn.now))
    if state.phase is Phase.RUNNING and state.cadence.posted == wanted and not state.pages.finished.count:
        turn.put(cadence=cadence.missed(state.cadence))
        _post(turn, max(step, turn.state.pages.top))


def _post(turn: Turn, top: int) -> None:
    state = turn.state
    step = top + cadence.margin(state.pages, state.cadence.widen)
    turn.put(cadence=cadence.post(state.cadence, step, turn.now))
    turn.do(PostCheckpoint(state.generation, step))


def _failed(turn: Turn, step: int, tier: str, error: str, rank: int | None) -> None:
    state = turn.state
    after, news = saves.fail(state.saves, step, tier, turn.now, error)
    turn.put(saves=after, cadence=cadence.failed(state.cadence, step, turn.now))
    if news:
        data = {
            "tier": tier,
            "error": error,
            "last_good_step": state.kept[0].ref.step if state.kept else None,
            "last_good_age_s": turn.now - state.safe_at,
        }
        turn.record("checkpoint.failed", data, rank=rank, step=step, urgent=True)
    stop = state.stopping
    if stop is not None and stop.step == step and tier != retention.NVME:
        note(turn, f"its last checkpoint failed: {error}")
    _go_on(turn)


def _tell_forgotten(turn: Turn, before: int) -> None:
    """Say that checkpoints are given up because too many are under way; seldom, where it goes on and on."""
    held = turn.state.saves
    if held.forgotten > before and held.forgotten & (held.forgotten - 1) == 0:
        message = (
            f"{held.forgotten} checkpoint(s) given up: more than {saves.most(held.world)} were under way at once; "
            "the ranks are far apart, or storage is far behind"
        )
        turn.record("warning.raised", {"message": message}, urgent=True)


def _retire(turn: Turn) -> None:
    """Let go what the policy no longer keeps, unless a new generation is choosing just now."""
    state = turn.state
    if state.phase not in recovery.LIVE:
        return
    policy = state.policy
    chosen = retention.retire(state.kept, keep_last=policy.keep_last, keep_every=policy.keep_every)
    # A slow shared tier would never see a checkpoint whole if newer ones on the nodes retired it on its way.
    way = saves.draining(state.saves)
    refs = tuple(ref for ref in chosen if ref not in way)
    if not refs:
        return
    gone = set(refs)
    turn.put(
        kept=tuple(entry for entry in state.kept if entry.ref not in gone),
        saves=saves.close(state.saves, refs),
    )
    turn.do(Retire(refs))
    for ref in refs:
        turn.record("checkpoint.retired", {"generation": ref.generation}, step=ref.step)


def _go_on(turn: Turn) -> None:
    """Whoever waited for saves looks again."""
    state = turn.state
    if state.drain is not None:
        recovery.drained(turn)
    elif state.stopping is not None:
        advance(turn)
    if turn.state.ending_at is not None:
        complete(turn)
