"""The follower of every rank but 0: learns from the commit log what became of its saves.

One thread. It writes nothing but notes of its own failures, and removes what the log retires from its node's disk.
Must never say that a save is durable before the log does.
"""

from __future__ import annotations

import queue
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from resilience.control.types import CheckpointRef
from resilience.engine import near
from resilience.engine.board import Board
from resilience.engine.gather import Gatherer
from resilience.engine.notes import Failure, leave
from resilience.engine.pause import Pause
from resilience.errors import FencedError, ResilienceError, UnavailableError
from resilience.journal.log import CommitLog
from resilience.journal.state import LogState, fold
from storage_backends.base import Storage

_HURRY = object()
_GRACE_S = 60.0  # between a retire record and the removal of its bytes


class Follower:
    """Args:
    storage: rooted at the run; nvme: at this node's root, ``None`` without that tier.
    log: that only we read.
    tell: called with a sentence for the user.
    stop: called when a newer start is in charge: nothing must be written any more.
    """

    def __init__(
        self,
        storage: Storage,
        nvme: Storage | None,
        log: CommitLog,
        *,
        rank: int,
        node: str,
        generation: int,
        tell: Callable[[str], None],
        stop: Callable[[], None],
    ) -> None:
        self.rank = rank
        self._storage, self._nvme, self._log = storage, nvme, log
        self._node, self._generation = node, generation
        self._tell, self._stop = tell, stop
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._gather = Gatherer(storage)
        self._board: Board | None = None
        self._pause = Pause()
        self._due: list[tuple[float, dict[str, Any]]] = []
        self._state = fold(log.refresh())
        self._told: set[str] = set()
        self._thread = threading.Thread(target=self._loop, name="resilience-follower", daemon=True)

    @property
    def state(self) -> LogState:
        """What the log means, read anew."""
        return fold(self._log.refresh())

    def begin(self, board: Board) -> None:
        self._board = board
        self._due.append((time.monotonic() + _GRACE_S, {"t": "sweep", "below": self._generation}))
        self._thread.start()

    def sealed(self, step: int, *, stall_s: float, size: int) -> None:
        self._queue.put(_HURRY)

    def hear(self, message: dict[str, Any]) -> None:
        self._queue.put(message)

    def hurry(self) -> None:
        self._queue.put(_HURRY)

    def warn(self, message: str) -> None:
        self._tell(message)

    def close(self, *, steps: int, reason: str) -> None:
        self.abort()
        if self._nvme is not None:
            near.remove(self._nvme, {"t": "trim"})

    def abort(self) -> None:
        if self._thread.ident is not None:
            self._queue.put(StopIteration)
            self._thread.join()

    def _loop(self) -> None:
        try:
            self._work()
        except Exception:  # noqa: BLE001 - whoever waits must hear of it
            self._on_broken(traceback.format_exc())

    def _work(self) -> None:
        look_at = time.monotonic()
        while True:
            try:
                item = self._queue.get(timeout=max(0.0, look_at - time.monotonic()))
            except queue.Empty:
                if self._look():
                    self._pause.reset()
                look_at = time.monotonic() + self._pause.next()
                continue
            if item is StopIteration:
                return
            if item is _HURRY:
                self._pause.reset()
                look_at = min(look_at, time.monotonic() + self._pause.next())
            else:
                self._on(item)

    def _on(self, message: dict[str, Any]) -> None:
        kind = message["t"]
        if kind == "save_failed":
            self._fail(self.rank, message["step"], message["tier"], message["error"])
            ref = CheckpointRef(message["step"], message["generation"])
            note = Failure(self.rank, self._node, message["tier"], message["error"])
            try:
                leave(self._storage, ref, note)
            except ResilienceError as error:  # the others learn from the next commit that this one never was
                self._tell(f"could not tell the other ranks that step {ref.step} failed: {error}")
        elif kind == "warning":
            self._tell(message["message"])
        elif kind == "broken":
            self._on_broken(message["traceback"])

    def _look(self) -> bool:
        """Read on in the log, and look for other ranks' failures. Whether there was anything new."""
        board = self._board
        assert board is not None
        self._remove_due()
        pending = board.pending()
        if not pending or board.broken is not None:
            return False
        try:
            state = fold(self._log.refresh())
            if state.generation > self._generation:
                self._lost(state.generation)
                return False
            news = self._fold(state, board, pending)
            for step in pending:
                for note in self._gather.look(
                    CheckpointRef(step, self._generation), parts=False, skip=self.rank
                ):
                    if isinstance(note, Failure):
                        self._fail(note.rank, step, note.tier, note.error)
                        news = True
        except UnavailableError:
            return False  # storage is away: the next look sees
        except ResilienceError as error:
            self._tell_once(f"what other ranks have left cannot be read: {error}")
            return False
        return news

    def _tell_once(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            self._tell(message)

    def _fold(self, state: LogState, board: Board, pending: list[int]) -> bool:
        news = False
        for checkpoint in reversed(state.checkpoints):
            for tier in checkpoint.tiers:
                if (
                    checkpoint.generation == self._generation
                    and checkpoint.step in pending
                    and not board.committed(checkpoint.step, tier)
                ):
                    board.done(checkpoint.step, tier)
                    news = True
        for ref in state.retired - self._state.retired:
            order = {"t": "delete", "step": ref.step, "generation": ref.generation}
            self._due.append((time.monotonic() + _GRACE_S, order))
            if ref.generation == self._generation:  # in what tiers it was, the log does not say any more
                board.fail(ref.step, "any", "it was retired")
        self._state = state
        return news

    def _remove_due(self) -> None:
        now = time.monotonic()
        while self._due and self._due[0][0] <= now:
            _at, order = self._due.pop(0)
            if self._nvme is not None:
                try:
                    if order["t"] == "sweep":
                        # As the log is now: rank 0 adopts what the start before left after we have begun.
                        state = fold(self._log.refresh())
                        if state.generation != self._generation:
                            continue  # not ours to sweep any more
                        order = {**order, "kept": [str(checkpoint.ref) for checkpoint in state.checkpoints]}
                    near.remove(self._nvme, order)
                except ResilienceError as error:
                    self._tell(f"could not remove checkpoints from nvme: {error}")

    def _fail(self, rank: int, step: int, tier: str, error: str) -> None:
        assert self._board is not None
        good, age = self._board.last_good()
        if self._board.fail(step, tier, error) and rank == self.rank:
            last = (
                "there is no good checkpoint"
                if good is None
                else f"the last good one is {good}, {age:.0f} s old"
            )
            self._tell(f"rank {rank} did not save checkpoint {step} in {tier}: {error}; {last}")

    def _lost(self, generation: int) -> None:
        assert self._board is not None
        self._board.fail_all(
            FencedError(
                f"a newer start of this run is in charge: generation {generation}",
                operation="save",
                generation=self._generation,
                hint="this process must stop; the newer one goes on from the same log",
            )
        )
        self._stop()

    def _on_broken(self, trace: str) -> None:
        error = UnavailableError(
            f"the checkpoint engine met an error of its own and saves nothing any more:\n{trace}",
            operation="save",
            hint="report this; what is committed is not concerned",
        )
        if self._board is not None:
            self._board.fail_all(error)
        self._tell(str(error))
