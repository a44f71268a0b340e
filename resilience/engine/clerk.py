"""The clerk of rank 0: fences, commits when every rank's part is durable, retires, and keeps the journal.

One thread, in the background of the training process. It counts with ``control.saves`` and has a ``LogKeeper`` carry
out what follows, as the supervisor does. Must never commit before all parts are durable, nor after a fence.
"""

from __future__ import annotations

import os
import queue
import socket
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from typing import Any

from resilience.control import commands as c
from resilience.control import events as e
from resilience.control import retention, saves
from resilience.control.types import CheckpointRef
from resilience.engine import near
from resilience.engine.adoption import adoptable
from resilience.engine.board import Board
from resilience.engine.gather import Gatherer
from resilience.engine.notes import Failure, Receipt, leave
from resilience.engine.pause import Pause
from resilience.errors import FencedError, ResilienceError, UnavailableError
from resilience.journal.log import CommitLog
from resilience.journal.state import LogState, candidates, fold
from resilience.runtime.chronicle import Chronicle
from resilience.runtime.logkeeper import LogKeeper
from storage_backends.base import Storage

_SETTLE_S = 30.0
_HURRY = object()


class Clerk:
    """Args:
    storage: rooted at the run; nvme: at this node's root, ``None`` without that tier.
    tell: called with a sentence for the user.
    stop: called when a newer start is in charge: nothing must be written any more.
    """

    rank = 0

    def __init__(
        self,
        storage: Storage,
        nvme: Storage | None,
        *,
        run: str,
        node: str,
        session: str,
        world_size: int,
        keep_last: int,
        keep_every: int | None,
        tell: Callable[[str], None],
        stop: Callable[[], None],
    ) -> None:
        self._storage, self._nvme = storage, nvme
        self._node, self._world = node, world_size
        self._keep_last, self._keep_every = keep_last, keep_every
        self._tell, self._stop = tell, stop
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._chronicle = Chronicle(
            storage, run=run, source=f"checkpointer-{uuid.uuid4().hex[:8]}", broken=self._break
        )
        self._log = LogKeeper(
            storage,
            self._chronicle,
            run=run,
            describe={
                "supervisor": f"{socket.gethostname()}/{os.getpid()}",
                "session": session,
                "world_size": world_size,
            },
            answer=self._queue.put,
            reach=lambda *_point, **_context: None,
            nodes=self._remove_near,
            broken=self._break,
            near=nvme is not None,
        )
        self._reader = CommitLog(
            storage, new_id=lambda: uuid.uuid4().hex
        )  # beside the keeper's, which is busy when storage is slow
        self._gather = Gatherer(storage)
        self._saves = saves.Saves()
        self._kept: tuple[retention.Kept, ...] = ()
        self._board: Board | None = None
        self._pause = Pause()
        self._broken = ""
        self._thread = threading.Thread(target=self._loop, name="resilience-clerk", daemon=True)

    @property
    def state(self) -> LogState:
        """What the log means, as far as we have written or read it."""
        return self._log.state

    def fence(self, describe: dict[str, Any]) -> int:
        """Begin a generation. ``describe``: what the journal says of this start.

        Raises ``FencedError`` when another start did at the same time; ``UnavailableError``.
        """
        begun = time.monotonic()
        self._log.perform(c.Fence(1))
        answer = self._answer()
        if not isinstance(answer, e.Fenced):
            cls = FencedError if answer.newer else UnavailableError
            raise cls(answer.reason, operation="Checkpointer", hint="one start of a run at a time")
        self._saves = saves.Saves(answer.generation, self._world)
        self.record("run.started", describe)
        self.record(
            "generation.fenced", {"seconds": time.monotonic() - begun, "slot": answer.slot}, urgent=True
        )
        return answer.generation

    def adopt(self, before: int) -> None:
        """Commit what generation ``before`` has made durable and not recorded."""
        for commit in adoptable(self._storage, self.state, before=before, warn=self.warn):
            self._log.perform(commit)
            answer = self._answer()
            if isinstance(answer, e.FenceLost):
                raise FencedError(answer.reason, operation="Checkpointer", hint="this process must stop")
            if isinstance(answer, e.CommitFailed):
                self.warn(f"{commit.ref} is complete in {commit.tier}, but: {answer.error}")
                continue
            data = {"tier": commit.tier, "size": commit.size, "slot": answer.slot}
            self.record(
                "checkpoint.committed", {**data, "generation": commit.ref.generation}, step=commit.ref.step
            )

    def begin(self, board: Board) -> None:
        """Start following saves."""
        self._board = board
        for candidate in candidates(self.state):
            self._kept = retention.add(self._kept, candidate.ref, candidate.tier)
        self._thread.start()

    def _answer(self) -> Any:
        while True:
            answer = self._queue.get()
            if self._broken:
                raise UnavailableError(
                    f"the commit log cannot be kept: {self._broken}", operation="Checkpointer"
                )
            if isinstance(answer, e.Fenced | e.FenceLost | e.Committed | e.CommitFailed):
                return answer

    # Called by the training thread, and by that of the local writer.

    def record(self, type: str, data: dict[str, Any], **subject: Any) -> None:
        self._chronicle.write(type, data, **subject)

    def warn(self, message: str) -> None:
        self.record("warning.raised", {"message": message}, severity="warning")
        self._tell(message)

    def sealed(self, step: int, *, stall_s: float, size: int) -> None:
        now = time.monotonic()
        self._queue.put(e.Sealed(now, self._saves.generation, 0, step, stall_s, size))

    def hear(self, message: dict[str, Any]) -> None:
        """The local writer said something."""
        self._queue.put(message)

    def quarantine(self, ref: CheckpointRef, tier: str, reason: str) -> None:
        self._log.perform(c.Quarantine(ref, tier, reason))
        self.record(
            "checkpoint.quarantined",
            {"tier": tier, "reason": reason, "generation": ref.generation},
            step=ref.step,
        )
        self._queue.put(("quarantined", ref, tier))

    def go_back(self, step: int) -> None:
        """Training was taken back to ``step`` on purpose and goes on from there: what is newer is of another line,
        and must not be restored next time."""
        reason = f"training went back to step {step} in generation {self._saves.generation}"
        for candidate in candidates(self.state):
            if candidate.ref.step > step:
                self.quarantine(candidate.ref, candidate.tier, reason)

    def settle(self) -> None:
        """Return when the log says what it was to say, or cannot for now."""
        self._log.settle(_SETTLE_S)

    def hurry(self) -> None:
        """Somebody waits: look at storage soon."""
        self._queue.put(_HURRY)

    def close(self, *, steps: int, reason: str) -> None:
        """Carry out what is due, say that this start is over, and end."""
        self._join()
        self.record("generation.ended", {"reason": reason, "steps": steps})
        self.record("run.finished", {"result": "interrupted", "reason": reason, "steps": steps}, urgent=True)
        self._log.close()
        self._chronicle.close()

    def abort(self) -> None:
        """End; this start has no say any more."""
        self._join()
        self._log.close()
        self._chronicle.close()

    def _join(self) -> None:
        if self._thread.ident is not None:
            self._queue.put(StopIteration)
            self._thread.join()

    # The thread.

    def _break(self, trace: str) -> None:
        """A bug of ours, or of storage: end all waiting with it."""
        self._broken = trace
        self._queue.put({"t": "broken", "traceback": trace})

    def _loop(self) -> None:
        try:
            self._work()
        except Exception:  # noqa: BLE001 - whoever waits must hear of it
            self._on_broken(traceback.format_exc())

    def _work(self) -> None:
        look_at = time.monotonic()
        while True:
            wait = None if self._world == 1 else max(0.0, look_at - time.monotonic())
            try:
                item = self._queue.get(timeout=wait)
            except queue.Empty:
                if self._look():
                    self._pause.reset()
                look_at = time.monotonic() + self._pause.next()
                continue
            if item is StopIteration:
                return
            if item is _HURRY or isinstance(item, e.Sealed):
                self._pause.reset()
                look_at = min(look_at, time.monotonic() + self._pause.next())
            if item is not _HURRY:
                self._on(item)

    def _on(self, item: Any) -> None:
        if isinstance(item, dict):
            item = self._event(item)
        match item:
            case (_, CheckpointRef() as ref, str(tier)):
                self._kept = retention.remove(self._kept, ref, tier)
            case e.Sealed():
                self._on_sealed(item)
            case e.Persisted():
                self._on_persisted(item)
            case e.SaveFailed():
                self._fail(item.step, item.tier, item.error, item.rank)
                if item.rank == self.rank and self._world > 1:
                    self._leave_note(item)
            case e.CommitFailed():
                self._fail(item.ref.step, item.tier, item.error, None)
            case e.Committed():
                self._on_committed(item)
            case e.FenceLost():
                self._lost(item.reason)

    def _event(self, message: dict[str, Any]) -> Any:
        now = time.monotonic()
        match message["t"]:
            case "persisted":
                told = {name: message[name] for name in ("part", "sha256", "size", "seconds")}
                of = {name: message[name] for name in ("generation", "rank", "step", "tier")}
                return e.Persisted(at=now, node=self._node, **of, **told)
            case "save_failed":
                of = {name: message[name] for name in ("generation", "rank", "step", "tier", "error")}
                return e.SaveFailed(at=now, **of)
            case "warning":
                self.warn(message["message"])
            case "broken":
                self._on_broken(message["traceback"])
        return None

    def _look(self) -> bool:
        """Look at what other ranks have left. Whether there was anything new."""
        news = False
        for save in list(self._saves.steps.values()):
            if save.settled():
                self._gather.forget(save.ref)
                continue
            try:
                # Other ranks may have seen a fence before us, and stopped: their parts would never come.
                newest = fold(self._reader.refresh()).generation
                if newest > self._saves.generation:
                    self._lost(f"generation {newest}")
                    return False
                found = self._gather.look(save.ref, skip=self.rank)
            except UnavailableError:
                return False  # storage is away: the next look sees
            except ResilienceError as error:
                # Damaged, or not ours to read: that save has no future, and the others must not wait for it.
                news = True
                for tier in (retention.NVME, retention.SHARED):
                    self._fail(save.ref.step, tier, f"what another rank left cannot be read: {error}", None)
                continue
            for note in found:
                news = True
                self._on(self._noted(save.ref, note))
        return news

    def _noted(self, ref: CheckpointRef, note: Receipt | Failure) -> Any:
        now = time.monotonic()
        if isinstance(note, Failure):
            return e.SaveFailed(now, ref.generation, note.rank, ref.step, note.tier, note.error)
        of = (ref.generation, note.rank, ref.step, note.tier, note.node)
        return e.Persisted(now, *of, note.part, note.sha256, note.size, 0.0)

    def _on_sealed(self, event: e.Sealed) -> None:
        self._saves = saves.seal(self._saves, event)
        data = {"stall_s": event.stall_s, "size": event.size}
        self.record("checkpoint.sealed", data, rank=event.rank, step=event.step)

    def _on_persisted(self, event: e.Persisted) -> None:
        if not self._saves.open(event.generation, event.step):
            return
        after, commit = saves.persist(self._saves, event)
        if after is self._saves:
            return
        self._saves = after
        data = {"tier": event.tier, "size": event.size, "seconds": event.seconds}
        self.record("checkpoint.persisted", data, rank=event.rank, node=event.node or None, step=event.step)
        if commit is not None:
            self._log.perform(commit)

    def _on_committed(self, event: e.Committed) -> None:
        ref, tier = event.ref, event.tier
        save = self._saves.steps.get(ref.step)
        if save is None or save.ref != ref or tier not in save.tiers or save.tiers[tier].done:
            return
        self._saves, abandoned = saves.commit(self._saves, ref.step, tier, event.at)
        self._kept = retention.add(self._kept, ref, tier)
        data = {
            "tier": tier,
            "size": save.tiers[tier].size,
            "stall_s": save.stall_s,
            "durable_s": max(0.0, event.at - save.since),
            "slot": event.slot,
            "generation": ref.generation,
        }
        self.record("checkpoint.committed", data, step=ref.step)
        for old in abandoned:
            reason = f"not every rank's part became durable; step {ref.step} was committed instead"
            self.record("checkpoint.abandoned", {"reason": reason}, step=old.step)
            self._log.discard(old)
        self._retire()
        if self._board is not None:
            self._board.done(ref.step, tier)

    def _retire(self) -> None:
        chosen = retention.retire(self._kept, keep_last=self._keep_last, keep_every=self._keep_every)
        way = saves.draining(self._saves)
        refs = tuple(ref for ref in chosen if ref not in way)
        if not refs:
            return
        gone = set(refs)
        self._kept = tuple(entry for entry in self._kept if entry.ref not in gone)
        self._saves = saves.close(self._saves, refs)
        self._log.perform(c.Retire(refs))
        for ref in refs:
            self.record("checkpoint.retired", {"generation": ref.generation}, step=ref.step)

    def _fail(self, step: int, tier: str, error: str, rank: int | None) -> None:
        if not self._saves.open(self._saves.generation, step):
            return
        self._saves, news = saves.fail(self._saves, step, tier, time.monotonic(), error)
        if not news or self._board is None:
            return
        good, age = self._board.last_good()
        data = {"tier": tier, "error": error, "last_good_step": good, "last_good_age_s": age}
        self.record("checkpoint.failed", data, rank=rank, step=step, severity="warning", urgent=True)
        who = "" if rank is None or self._world == 1 else f" by rank {rank}"
        last = (
            "there is no good checkpoint" if good is None else f"the last good one is {good}, {age:.0f} s old"
        )
        self._tell(f"checkpoint {step} was not saved in {tier}{who}: {error}; {last}")
        self._board.fail(step, tier, error)
        save = self._saves.steps[step]
        if save.settled() and not save.committed():
            self._log.discard(save.ref)

    def _leave_note(self, event: e.SaveFailed) -> None:
        note = Failure(self.rank, self._node, event.tier, event.error)
        try:
            leave(self._storage, CheckpointRef(event.step, event.generation), note)
        except ResilienceError as error:  # the others learn from the next commit that this one never was
            self.warn(f"could not tell the other ranks that step {event.step} failed: {error}")

    def _lost(self, reason: str) -> None:
        error = FencedError(
            f"a newer start of this run is in charge: {reason}",
            operation="commit",
            generation=self._saves.generation,
            hint="this process must stop; the newer one goes on from the same log",
        )
        self._saves = saves.Saves()
        if self._board is not None:
            self._board.fail_all(error)
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

    def _remove_near(self, order: dict[str, Any]) -> None:
        if self._nvme is None:
            return
        try:
            near.remove(self._nvme, order)
        except ResilienceError as error:
            self.warn(f"could not remove checkpoints from nvme: {error}")
