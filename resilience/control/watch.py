"""What should have happened by now and has not: deadlines and hangs, judged on ticks only.

Owns the turning of silence into signals; what follows from them is decided in ``recovery``. A node that does
not answer is taken for lost rather than waited for.
"""

from __future__ import annotations

from resilience.control import blame, progress, starting
from resilience.control.blame import Signal
from resilience.control.events import NodeLost
from resilience.control.recovery import drained, fail, node_lost, settle
from resilience.control.state import Turn
from resilience.control.types import Phase

ANSWER_S = 60.0  # for an agent to end its ranks or open a store: far beyond what either takes


def watch(turn: Turn) -> None:
    """A tick: what should have happened by now and has not."""
    settle(turn)
    state = turn.state
    attempt = state.attempt
    if state.phase is Phase.FENCING:
        _unanswered(turn)
    elif state.phase is Phase.STARTING and attempt is not None and attempt.started_at is not None:
        if turn.now - attempt.started_at > state.policy.start_deadline_s:
            fail(turn, _late(turn, attempt.started_at))
        elif _halted(turn):
            fail(turn, _hang(turn))
    elif state.phase is Phase.RUNNING and _still(turn):
        fail(turn, _hang(turn))


def _unanswered(turn: Turn) -> None:
    running = turn.state.running
    if running and running.told_at is not None and turn.now - running.told_at > ANSWER_S:
        reason = f"it did not end its ranks within {ANSWER_S:g} s"
        node_lost(turn, *(NodeLost(turn.now, name, reason, running.told_at) for name in running.left()))
    drained(turn)
    attempt = turn.state.attempt
    if turn.state.phase is not Phase.FENCING or attempt is None or not attempt.won or attempt.store:
        return
    if turn.now - attempt.since > ANSWER_S:
        message = f"node {attempt.store_node} did not open the rendezvous store within {ANSWER_S:g} s"
        turn.record("warning.raised", {"message": message}, node=attempt.store_node)
        starting.spoil(turn)


def _still(turn: Turn) -> bool:
    state = turn.state
    if state.trouble is not None or state.ending_at is not None:
        return False
    return progress.suspect(state.policy, state.pages, turn.now)


def _halted(turn: Turn) -> bool:
    # Starting has its own, long deadline; a stopped process will not start however long it gets.
    state = turn.state
    silent = turn.now - state.pages.moved_at > state.policy.hang_floor_s
    return silent and state.trouble is None and bool(progress.stopped(state.pages))


def _late(turn: Turn, since: float) -> Signal:
    state = turn.state
    missing = state.pages.begun.missing(len(state.table))
    who = progress.some(missing)
    cause = f"after {turn.now - since:.0f} s rank(s) {who} of {len(state.table)} had not begun to step"
    if len(missing) != 1:
        return Signal(turn.now, since, blame.EXITED, "start", cause, confidence=0.0)
    card = state.table[missing[0]].card
    return Signal(turn.now, since, blame.EXITED, "start", cause, missing[0], card.node, str(card), 0.6)


def _hang(turn: Turn) -> Signal:
    state = turn.state
    rank, confidence, why = progress.blame(state.pages)
    card = None if rank is None else state.card_of(rank)
    since = state.pages.moved_at
    return Signal(
        turn.now,
        since,
        blame.EXITED,
        "hang",
        f"no rank has moved for {turn.now - since:.1f} s: {why}",
        rank,
        card.node if card else None,
        str(card) if card else None,
        confidence,
    )
