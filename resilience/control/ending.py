"""How a run ends: its last saves, its outcome, and that nothing happens after.

Owns ``finish``, the only way into ``Phase.DONE``, the wait for saves still in flight when every rank's function
has returned, and the finish record: a run has finished when the log says so, never before.
"""

from __future__ import annotations

from dataclasses import replace

from resilience.control.commands import Finish, RecordFinish, StopRanks
from resilience.control.retention import SHARED
from resilience.control.saves import Save
from resilience.control.state import Finishing, Turn
from resilience.control.types import Outcome, Phase, Result

TRIES = 3  # of the finish record; each has the storage's own retries in it
AGAIN_S = 2.0  # before the second, twice that before the third


def finish(turn: Turn, outcome: Outcome) -> None:
    """End the run. Ranks still there are ended too; nothing is decided afterwards."""
    state = turn.state
    if state.phase is Phase.DONE:
        return
    if state.phase in (Phase.STARTING, Phase.RUNNING, Phase.STOPPING):
        turn.record("generation.ended", {"reason": outcome.result.value, "steps": state.pages.top})
    turn.record("run.finished", _story(turn, outcome), urgent=True)
    turn.do(*end_ranks(turn), Finish(outcome))
    turn.put(
        phase=Phase.DONE,
        outcome=outcome,
        trouble=None,
        drain=None,
        attempt=None,
        ending_at=None,
        finishing=None,
    )


def end_ranks(turn: Turn) -> list[StopRanks]:
    """Orders to end every process that may be left; none where they were given before."""
    running = turn.state.running
    if running.told_at is not None:
        return []
    turn.put(running=replace(running, told_at=turn.now))
    return [StopRanks(running.generation, node) for node in running.left()]


def complete(turn: Turn) -> None:
    """Every rank has finished: end the run once the saves on their way are committed, or have gone quiet."""
    state = turn.state
    if state.finishing is not None:
        _again(turn, state.finishing)
        return
    if state.ending_at is None:
        if state.pages.finished.count < len(state.table) or not state.table:
            return
        turn.put(ending_at=turn.now)
        state = turn.state
    if not saved(turn) and turn.now < _deadline(turn):
        return
    stop = state.stopping
    if stop is not None and stop.released:
        reason = (
            f"{stop.reason}: stopped cleanly after {state.pages.top} steps{stop.note and '; ' + stop.note}"
        )
        finish(turn, Outcome(Result.INTERRUPTED, reason))
    else:
        outcome = _returned(turn)
        if outcome.result is not Result.FINISHED:
            finish(turn, outcome)
            return
        steps = max(state.pages.top, state.restored_step, 0)
        turn.put(finishing=Finishing(outcome, steps))
        turn.do(RecordFinish(steps))


def recorded(turn: Turn) -> None:
    """The finish record is in the log: now, and only now, the run has finished."""
    finishing = turn.state.finishing
    if finishing is not None:
        finish(turn, finishing.outcome)


def not_recorded(turn: Turn, error: str) -> None:
    """Try again, a few times; nobody who asked for the end waits for that."""
    state = turn.state
    finishing = state.finishing
    if finishing is None or finishing.again_at is not None:
        return
    if finishing.tries < TRIES and state.stopping is None:
        turn.put(finishing=replace(finishing, again_at=turn.now + AGAIN_S * finishing.tries))
        return
    reason = (
        f"finished after {finishing.steps} steps, but that could not be recorded: {error}; "
        "launch again once storage is back"
    )
    finish(turn, Outcome(Result.UNAVAILABLE, reason))


def _again(turn: Turn, finishing: Finishing) -> None:
    if finishing.again_at is not None and turn.now >= finishing.again_at:
        turn.put(finishing=replace(finishing, tries=finishing.tries + 1, again_at=None))
        turn.do(RecordFinish(finishing.steps))


def saved(turn: Turn) -> bool:
    """Whether nothing on its way is worth waiting for: the last save lies in the shared tier, or cannot get
    there any more."""
    last = _last(turn)
    return not turn.state.saves.outstanding() and (last is None or last.settled())


def _last(turn: Turn) -> Save | None:
    """The newest save that was tried, of steps that every rank has completed. A loop left with ``break`` saves
    nothing at its end: what was saved before is the last then; ``None`` where nothing was tried."""
    pages = turn.state.pages
    return turn.state.saves.newest(pages.top if pages.least < 0 else pages.least)


def _returned(turn: Turn) -> Outcome:
    """The outcome when every rank's function has returned. A run whose last state lies in no tier has not
    finished: launched again, it goes on from the checkpoint before."""
    steps, last = turn.state.pages.top, _last(turn)
    if last is not None and not last.committed():
        why = last.error or "not every rank's part became durable in time"
        reason = (
            f"finished after {steps} steps, but its last checkpoint could not be saved: {why}; "
            "launch again once storage is back"
        )
        return Outcome(Result.UNAVAILABLE, reason)
    shared = last.tiers.get(SHARED) if last is not None else None
    late = ""
    if last is not None and (shared is None or not shared.done):
        late = f"; its last checkpoint did not reach the {SHARED} tier in time"
    return Outcome(Result.FINISHED, f"finished after {steps} steps{late}")


def _deadline(turn: Turn) -> float:
    # Renewed by every sign of life of the saves: a large last checkpoint may take as long as it moves.
    state = turn.state
    return max(state.ending_at or 0.0, state.saves.touched) + state.policy.stop_deadline_s


def _story(turn: Turn, outcome: Outcome) -> dict[str, object]:
    return {"result": outcome.result.value, "reason": outcome.reason, "steps": turn.state.pages.top}


def note(turn: Turn, text: str) -> None:
    """Remember why a clean stop goes without its checkpoint."""
    stop = turn.state.stopping
    if stop is not None and not stop.note:
        turn.put(stopping=replace(stop, note=text))
