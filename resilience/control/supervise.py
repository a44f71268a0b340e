"""The supervisor: ``step(state, event) -> (state, commands)``. Total, pure, deterministic.

Owns the order in which rules see an event, and what is late: events of another generation are dropped here,
so that no rule meets them. The rules themselves are in ``starting``, ``recovery``, ``checkpoints``,
``stopping`` and ``ending``; what they know is in ``state``.
"""

from __future__ import annotations

from dataclasses import replace

from resilience.control import cards, checkpoints, ending, progress, recovery, starting, stopping, watch
from resilience.control.commands import Command
from resilience.control.events import (
    CardFaulted,
    CheckpointMissed,
    CommitFailed,
    Committed,
    Event,
    Fenced,
    FenceLost,
    FinishFailed,
    FinishRecorded,
    LoadFailed,
    NodeJoined,
    NodeLost,
    Parked,
    Persisted,
    Progress,
    RankExited,
    RankFinished,
    RanksStopped,
    Restored,
    RestoreFailed,
    SaveFailed,
    Sealed,
    StopRequested,
    StoreReady,
    Tick,
)
from resilience.control.state import State, Turn
from resilience.control.types import Exit, Outcome, Phase, Result

__all__ = ["State", "step"]

LIVE = recovery.LIVE


def step(state: State, event: Event) -> tuple[State, tuple[Command, ...]]:
    """What is known after ``event``, and what is to be done, in this order.

    Total: every event is answered in every state, late, repeated or out of order ones by doing nothing. After
    ``Finish`` was decided nothing changes any more.
    """
    if state.phase is Phase.DONE:
        return state, ()
    turn = Turn(state if event.at <= state.now else replace(state, now=event.at))
    _answer(turn, event)
    return turn.state, tuple(turn.commands)


def _answer(turn: Turn, event: Event) -> None:
    match event:
        case Progress():
            _progress(turn, event)
        case Tick():
            _tick(turn)
        case Sealed():
            checkpoints.sealed(turn, event)
        case Persisted():
            checkpoints.persisted(turn, event)
        case SaveFailed():
            checkpoints.save_failed(turn, event)
        case Committed():
            checkpoints.committed(turn, event)
        case CommitFailed():
            checkpoints.commit_failed(turn, event)
        case FinishRecorded():
            ending.recorded(turn)
        case FinishFailed():
            ending.not_recorded(turn, event.error)
        case NodeJoined():
            _joined(turn, event)
        case LoadFailed():
            _load_failed(turn, event)
        case NodeLost():
            recovery.node_lost(turn, event)
        case CardFaulted():
            cards.card_faulted(turn, event)
        case StoreReady():
            starting.store_ready(turn, event)
        case Fenced():
            starting.fenced(turn, event)
        case FenceLost():
            _fence_lost(turn, event)
        case RanksStopped():
            _stopped(turn, event)
        case StopRequested():
            stopping.requested(turn, event)
        case _:
            _of_generation(turn, event)


def _of_generation(
    turn: Turn,
    event: Restored | RestoreFailed | RankExited | RankFinished | CheckpointMissed | Parked,
) -> None:
    """Events that mean nothing unless they are of the current generation."""
    state = turn.state
    if event.generation != state.generation or not 0 <= event.rank < len(state.table):
        return
    live = state.phase in LIVE
    match event:
        case RankExited():
            recovery.rank_exited(turn, event)
        case RestoreFailed():
            recovery.restore_failed(turn, event)
        case Restored() if live:
            starting.restored(turn, event)
        case RankFinished() if live and event.rank not in state.pages.finished:
            turn.put(pages=progress.finish(state.pages, event.rank, event.steps, event.at))
            starting.stepping(turn)
            stopping.advance(turn)
            recovery.quiet(turn)
        case CheckpointMissed() if live:
            stopping.missed(turn, event.wanted, event.step)
            checkpoints.missed(turn, event.wanted, event.step)
        case Parked() if live:
            stopping.parked(turn, event)
        case _:
            pass


def _progress(turn: Turn, event: Progress) -> None:
    state = turn.state
    if event.generation != state.generation or state.phase not in LIVE:
        return
    turn.put(pages=progress.observe(state.pages, state.table, event.node, event.ranks, event.at))
    if state.phase is Phase.STARTING:
        starting.stepping(turn)


def _tick(turn: Turn) -> None:
    starting.wait_longer(turn)
    watch.watch(turn)
    stopping.watch(turn)
    checkpoints.ask(turn)
    recovery.quiet(turn)


def _joined(turn: Turn, event: NodeJoined) -> None:
    node = event.node
    if turn.state.cluster.knows(node.name):
        return
    turn.put(cluster=turn.state.cluster.join(node))
    data = {"cards": node.cards, "levels": list(node.levels), "host": node.host}
    turn.record("node.joined", data, node=node.name)
    starting.wait(turn)


def _load_failed(turn: Turn, event: LoadFailed) -> None:
    # Before anything has run this is the user's mistake, and waiting for more cards would hide it. Later it
    # is a node with another environment: the run goes on without it.
    if turn.state.generation == 0:
        reason = f"the training function could not be imported on node {event.node}: {event.error}"
        ended = Exit(code=1, error=event.error, traceback=event.traceback)
        ending.finish(turn, Outcome(Result.USER_ERROR, reason, None, ended))
    else:
        message = f"node {event.node} cannot be used: {event.error}"
        turn.record("warning.raised", {"message": message}, node=event.node)


def _stopped(turn: Turn, event: RanksStopped) -> None:
    state = turn.state
    # Only an answer to what we asked: a report from before these ranks were started says nothing about them.
    running = state.running
    if running.told_at is None or event.generation < running.generation or event.node not in running:
        return
    turn.put(running=running.without(event.node))
    starting.start(turn)


def _fence_lost(turn: Turn, event: FenceLost) -> None:
    if event.newer:
        ending.finish(
            turn, Outcome(Result.FENCED, f"another supervisor of this run is in charge: {event.reason}")
        )
    elif turn.state.phase is Phase.FENCING:
        ending.finish(turn, Outcome(Result.UNAVAILABLE, f"the commit log cannot be reached: {event.reason}"))
    else:
        ending.not_recorded(turn, event.reason)
