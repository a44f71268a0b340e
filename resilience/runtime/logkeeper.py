"""The supervisor's hand on the commit log: fences, commits, quarantines, retires, one at a time, off its loop.

Carries out what ``control`` decided and answers with events. The order of durability is kept here: parts are
durable before we are called, the Zarr metadata of the shared tier is written, then the record, then the answer.
"""

from __future__ import annotations

import queue
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from typing import Any

from resilience.checkpoint import retention, zarr_view
from resilience.checkpoint.part import Part, directory
from resilience.control import commands as c
from resilience.control import events as e
from resilience.control.types import Candidate, CheckpointRef, Result
from resilience.errors import CorruptError, FencedError, ResilienceError
from resilience.journal.log import CommitLog
from resilience.journal.records import Kind
from resilience.journal.state import LogState, candidates, fold
from resilience.runtime.chronicle import Chronicle
from storage_backends import Storage
from storage_backends.recycle import trim

_GRACE_S = (
    60.0  # between a retire record and the removal of its bytes: whoever began to restore it is done by then
)


class LogKeeper:
    """One thread that owns the ``CommitLog``.

    Args:
        answer: called with the events that answer commands.
        reach: failpoint of the supervisor.
        nodes: called with an order for every node: to remove checkpoints from its nvme tier.
        broken: called with the traceback of an error that is a bug of ours.
        near: whether this launch has an nvme tier; without one, what lies only there cannot be restored.
    """

    def __init__(
        self,
        storage: Storage,
        chronicle: Chronicle,
        *,
        run: str,
        describe: dict[str, Any],
        answer: Callable[[Any], None],
        reach: Callable[..., None],
        nodes: Callable[[dict[str, Any]], None],
        broken: Callable[[str], None],
        near: bool = True,
    ) -> None:
        self._storage = storage
        self._near = near
        self._chronicle = chronicle
        self._run = run
        self._describe = describe
        self._answer = answer
        self._reach = reach
        self._nodes = nodes
        self._broken = broken
        self._log = CommitLog(storage, new_id=lambda: uuid.uuid4().hex)
        self._orders: queue.SimpleQueue[c.Command | CheckpointRef | threading.Event | None] = (
            queue.SimpleQueue()
        )
        self._retired: list[tuple[float, CheckpointRef]] = []
        self._sweep_at: float | None = None
        self.state = LogState()
        self.value: str | None = None  # JSON text of what rank 0 returned, for the finish record
        self._finished = False
        self._thread = threading.Thread(target=self._loop, name="log", daemon=True)
        self._thread.start()

    def perform(self, command: c.Command) -> None:
        self._orders.put(command)

    def settle(self, timeout: float) -> bool:
        """Return when what was handed over so far is carried out; ``False`` after ``timeout`` seconds."""
        done = threading.Event()
        self._orders.put(done)
        return done.wait(timeout)

    def discard(self, ref: CheckpointRef) -> None:
        """A save was given up: its bytes go after the grace period, unless the log holds it by then after all."""
        self._orders.put(ref)

    def close(self) -> None:
        """Carry out what was handed over, then end."""
        self._orders.put(None)
        self._thread.join(60)

    def _loop(self) -> None:
        try:
            self._work()
        except Exception:  # noqa: BLE001 - a bug of ours: it must end the run loudly, not this thread silently
            self._broken(traceback.format_exc())

    def _work(self) -> None:
        while True:
            try:
                command = self._orders.get(timeout=1.0)
            except queue.Empty:
                self._collect()
                continue
            if command is None:
                # Nobody restores any more. What a run that did not finish leaves is collected when it goes on.
                self._collect(everything=self._finished)
                self._trim()
                return
            if isinstance(command, threading.Event):
                command.set()
                continue
            if isinstance(command, CheckpointRef):
                self._retired.append((time.monotonic() + _GRACE_S, command))
                continue
            handler: Callable[[Any], None] = getattr(self, f"_{type(command).__name__.lower()}")
            handler(command)

    def _fence(self, command: c.Fence) -> None:
        try:
            record = self._log.fence(command.generation, {"run": self._run, **self._describe})
            self.state = fold(self._log.refresh())
        except FencedError as error:
            self._answer(e.FenceLost(time.monotonic(), str(error)))
            return
        except ResilienceError as error:
            self._answer(e.FenceLost(time.monotonic(), str(error), newer=False))
            return
        self._finished = self.state.finished is not None
        self._chronicle.generation(record.generation)
        self._sweep_at = time.monotonic() + _GRACE_S
        self._reach("fence.done", generation=record.generation)
        usable, aside = self._candidates()
        self._answer(
            e.Fenced(
                time.monotonic(),
                record.generation,
                usable,
                finished=self.state.finished is not None,
                unusable=(*_unusable(self.state), *aside),
                slot=record.slot,
            )
        )

    def _candidates(self) -> tuple[tuple[Candidate, ...], tuple[Candidate, ...]]:
        """What may be restored, and what is set aside because this launch has no nvme directory."""
        offered = candidates(self.state)
        usable = tuple(each for each in offered if self._near or each.tier != "nvme")
        aside = tuple(each for each in offered if each not in usable)
        if aside and not any(each.ref == aside[0].ref for each in usable):
            self._warn(
                f"the newest checkpoint, {aside[0].ref}, lies only in the nvme tier, and this launch has none: "
                "give nvme= as before to restore it"
            )
        return usable, aside

    def _commit(self, command: c.Commit) -> None:
        ref, tier = command.ref, command.tier
        self._reach("commit.before", step=ref.step, tier=tier)
        try:
            if tier == "shared":
                self._describe_checkpoint(ref, command.parts)
            body: dict[str, Any] = {
                "step": ref.step,
                "tier": tier,
                "world_size": len(command.parts),
                "parts": [
                    {"rank": rank, "node": node, "name": name, "sha256": sha256}
                    for rank, node, name, sha256 in command.parts
                ],
                "size": command.size,
            }
            if ref.generation != self._log.generation:  # of one whose writers have outlived it
                body["generation"] = ref.generation
            record = self._log.append(Kind.CHECKPOINT, body)
            self.state = fold(self._log.refresh())
        except FencedError as error:
            self._answer(e.FenceLost(time.monotonic(), str(error)))
            return
        except (ResilienceError, FileNotFoundError) as error:
            self._answer(e.CommitFailed(time.monotonic(), ref, tier, str(error)))
            return
        self._reach("commit.done", step=ref.step, tier=tier)
        self._answer(e.Committed(time.monotonic(), ref, tier, record.slot))

    def _describe_checkpoint(self, ref: CheckpointRef, parts: tuple[tuple[int, str, str, str], ...]) -> None:
        """Write what plain Zarr needs beside the packs: metadata and chunk references."""
        where = directory(ref.step, ref.generation)
        loaded = [
            Part.decode(self._storage.read(name), path=name) for _rank, _node, name, _sha256 in sorted(parts)
        ]
        url = f"{self._storage.url.rstrip('/')}/{where}"
        for name, data in zarr_view.zarr_metadata(loaded, url=url).items():
            with self._storage.sink(f"{where}/{name}") as sink:
                sink.write(data)

    def _quarantine(self, command: c.Quarantine) -> None:
        ref = command.ref
        body = {
            "step": ref.step,
            "generation": ref.generation,
            "tier": command.tier,
            "reason": command.reason,
        }
        self._append(Kind.QUARANTINE, body, f"could not record the quarantine of {ref}")

    def _retire(self, command: c.Retire) -> None:
        refs = [{"step": ref.step, "generation": ref.generation} for ref in command.refs]
        if self._append(Kind.RETIRE, {"refs": refs}, "could not record what is retired"):
            for ref in command.refs:
                self._retired.append((time.monotonic() + _GRACE_S, ref))
        self._collect()

    def _collect(self, *, everything: bool = False) -> None:
        """Remove the bytes of what was retired a grace period ago, and what older generations left behind."""
        now = time.monotonic()
        while self._retired and (everything or self._retired[0][0] <= now):
            _due, ref = self._retired.pop(0)
            if any(checkpoint.ref == ref for checkpoint in self.state.checkpoints):
                continue  # given up, and committed after all
            self._nodes({"t": "delete", "step": ref.step, "generation": ref.generation})
            self._remove(ref)
        if self._sweep_at is not None and (everything or self._sweep_at <= now):
            self._sweep_at = None
            self._sweep()

    def _trim(self) -> None:
        """Nothing is saved any more: give back the space that was kept for the next packs."""
        self._nodes({"t": "trim"})
        try:
            trim(self._storage)
        except ResilienceError as error:
            self._warn(f"could not give back the space of retired checkpoints: {error}")

    def _sweep(self) -> None:
        """Remove checkpoints of older generations that the log does not hold: retired ones whose removal was
        interrupted, and saves that were never committed (and, after our fence, never can be)."""
        kept = [str(checkpoint.ref) for checkpoint in self.state.checkpoints]
        below = self._log.generation
        self._nodes({"t": "sweep", "kept": kept, "below": below})
        try:
            stale = retention.stale(self._storage, kept=kept, below=below)
        except ResilienceError as error:
            self._warn(f"could not look for what older generations left: {error}")
            return
        for ref in stale:
            self._remove(ref)

    def _remove(self, ref: CheckpointRef) -> None:
        try:
            retention.delete(self._storage, ref)
        except ResilienceError as error:
            self._warn(f"could not delete {ref}: {error}")
            return
        self._chronicle.write(
            "checkpoint.deleted", {"generation": ref.generation, "tier": "shared"}, step=ref.step
        )

    def _recordfinish(self, command: c.RecordFinish) -> None:
        """Where the log says already that the run has finished, what that record says stays."""
        if self.state.finished is None:
            body = {"step": command.steps, "result": Result.FINISHED.value, "value": self.value}
            try:
                self._log.append(Kind.FINISH, body)
                self.state = fold(self._log.refresh())
            except FencedError as error:
                self._answer(e.FenceLost(time.monotonic(), str(error)))
                return
            except ResilienceError as error:
                self._answer(e.FinishFailed(time.monotonic(), str(error)))
                return
        self._finished = True
        self._answer(e.FinishRecorded(time.monotonic()))

    def _append(self, kind: Kind, body: dict[str, Any], complaint: str) -> bool:
        try:
            self._log.append(kind, body)
            self.state = fold(self._log.refresh())
        except FencedError as error:
            self._answer(e.FenceLost(time.monotonic(), str(error)))
            return False
        except (ResilienceError, CorruptError) as error:
            self._warn(f"{complaint}: {error}")
            return False
        return True

    def _warn(self, message: str) -> None:
        self._chronicle.write("warning.raised", {"message": message}, severity="warning")


def _unusable(state: LogState) -> tuple[Candidate, ...]:
    """What is recorded but quarantined: nothing to restore from, and a reason not to start over."""
    return tuple(
        Candidate(checkpoint.ref, tier, checkpoint.world_size, entry.hosts)
        for checkpoint in state.checkpoints
        for tier, entry in checkpoint.tiers.items()
        if (checkpoint.step, checkpoint.generation, tier) in state.quarantined
    )
