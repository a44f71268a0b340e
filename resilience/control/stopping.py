"""A clean stop: all ranks park after the same step, its checkpoint is committed, then they return.

Owns the way from ``StopRequested`` to the release of the parked ranks. A stop never starts anything: with no
ranks stepping it ends the run at once, and a failure on the way ends it with the last checkpoint there is.
"""

from __future__ import annotations

from dataclasses import replace

from resilience.control import cadence, progress, recovery
from resilience.control.commands import PostStop, ReleaseStop
from resilience.control.ending import complete, finish
from resilience.control.events import Parked, StopRequested
from resilience.control.persistent import Ranks
from resilience.control.retention import SHARED
from resilience.control.state import Stopping, Turn
from resilience.control.types import Outcome, Phase, Result

STEPS = 4.0  # a rank that has not moved for so many of its longest steps will not come to the stop point


def requested(turn: Turn, event: StopRequested) -> None:
    state = turn.state
    if event.at_once:
        finish(turn, Outcome(Result.INTERRUPTED, f"{event.reason}: ended at once, without a last checkpoint"))
        return
    if state.stopping is not None:
        return
    turn.record("stop.requested", {"reason": event.reason}, urgent=True)
    if state.drain is not None:
        # A failure is being drained: its last saves are still worth having, a new generation is not.
        end = state.drain.end or Outcome(Result.INTERRUPTED, f"{event.reason}: stopped while recovering")
        turn.put(drain=replace(state.drain, end=end), stopping=Stopping(turn.now, event.reason))
    elif state.phase is Phase.RUNNING:
        turn.put(phase=Phase.STOPPING, stopping=Stopping(turn.now, event.reason))
        if state.ending_at is None:
            _post(turn, state.pages.top)
    else:
        finish(turn, Outcome(Result.INTERRUPTED, f"{event.reason}: stopped while {state.phase.value}"))


def parked(turn: Turn, event: Parked) -> None:
    state = turn.state
    stop = state.stopping
    if stop is None or state.phase is not Phase.STOPPING or not 0 <= event.rank < len(state.table):
        return
    if event.step != stop.step or event.rank in stop.parked:
        return
    turn.put(
        stopping=replace(stop, parked=stop.parked.add(event.rank), parked_at=turn.now),
        pages=progress.reach(state.pages, event.step, event.at),
    )
    advance(turn)


def missed(turn: Turn, wanted: int, step: int) -> None:
    """A rank was past the stop point: all go on to a later one."""
    stop = turn.state.stopping
    if stop is None or turn.state.phase is not Phase.STOPPING or wanted != stop.step or stop.released:
        return
    turn.put(
        stopping=replace(stop, widen=stop.widen * 2),
        pages=progress.reach(turn.state.pages, step, turn.now),
    )
    _post(turn, max(step, turn.state.pages.top))


def advance(turn: Turn) -> None:
    """Release the ranks when all of them are parked and their checkpoint is safe, or cannot become so."""
    state = turn.state
    stop = state.stopping
    if stop is None or stop.released or state.phase is not Phase.STOPPING or not stop.parked.count:
        return
    if stop.parked.count + state.pages.finished.count < len(state.table):
        return
    save = state.saves.steps.get(stop.step)
    shared = save.tiers.get(SHARED) if save is not None else None
    if shared is None or not (shared.done or shared.failed):
        return
    turn.put(stopping=replace(stop, released=True))
    turn.do(ReleaseStop(state.generation, stop.step))


def watch(turn: Turn) -> None:
    """A tick while stopping: its deadline, after which ranks are ended as they are."""
    state = turn.state
    stop = state.stopping
    if stop is None or state.phase is not Phase.STOPPING:
        return
    if state.ending_at is not None:
        complete(turn)
    elif turn.now - _moved_at(turn, stop) >= (quiet_s := _quiet_s(turn)):
        reason = f"{stop.reason}: ranks were ended after {quiet_s:g} s without progress towards a clean stop"
        turn.record("generation.ended", {"reason": reason, "steps": state.pages.top})
        recovery.stop_all(turn, Outcome(Result.INTERRUPTED, reason))


def _moved_at(turn: Turn, stop: Stopping) -> float:
    """The newest sign that the stop is on its way: a step before the stop point, a rank parked, a save. What
    comes beyond the point is none: ranks that do not hear of it would never be ended."""
    state = turn.state
    moved_at = max(stop.since, stop.parked_at)
    if state.pages.top > stop.step:
        return moved_at
    return max(moved_at, state.pages.top_at, state.saves.touched)


def _quiet_s(turn: Turn) -> float:
    """How long nothing may move: steps are as long as they are, and the next may be a little longer."""
    pages = turn.state.pages
    return max(turn.state.policy.stop_deadline_s, STEPS * max(pages.longest_s, pages.step_s))


def _post(turn: Turn, top: int) -> None:
    state = turn.state
    stop = state.stopping
    assert stop is not None
    step = top + cadence.margin(state.pages, stop.widen)
    turn.put(stopping=replace(stop, step=step, parked=Ranks()))
    turn.do(PostStop(state.generation, step))
