"""The writer: streams sealed slots from shared memory to the nearest tier, then on to shared storage.

One process per node, started by exec; it outlives any rank, so a snapshot that was sealed is persisted even if
its rank dies the next moment. It decides nothing and commits nothing: it reports what is durable, and what is
not, and the supervisor writes the record. Training never waits for it except for a free slot.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from resilience.checkpoint import pack
from resilience.checkpoint.arena import Arena, SlotKind
from resilience.checkpoint.part import Part, directory
from resilience.errors import ResilienceError
from resilience.runtime.failpoint import Failpoints
from resilience.runtime.system import die_with_parent
from resilience.runtime.wire import Channel, Closed
from storage_backends import Storage, open_storage


def main() -> None:
    fd, parent = int(sys.argv[1]), int(sys.argv[2])
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    writer = Writer(Channel.from_fd(fd))
    try:
        writer.serve()
    except Closed:
        return


@dataclass(frozen=True)
class _Job:
    """One pack to move: from an arena slot (``arena`` set) or from the nvme tier to the shared one."""

    rank: int
    generation: int
    step: int
    arena: tuple[int, int, int] | None = None  # generation, rank, id
    slot: int = 0
    part: dict[str, Any] | None = None


class Writer:
    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._sending = threading.Lock()
        self._arenas: dict[tuple[int, int, int], Arena] = {}
        self._persist: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._drain: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._replies: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._nvme: Storage | None = None
        self._shared: Storage | None = None
        self._failpoints = Failpoints((), self._fire)

    def serve(self) -> None:
        """Read orders for ever; two threads carry them out: one per tier, so that a slow shared store does not
        hold up the slots."""
        self.start()
        while True:
            self.obey(*self._channel.receive())

    def start(self) -> None:
        for loop in (self._persist_loop, self._drain_loop):
            threading.Thread(target=_or_die, args=(loop,), daemon=True).start()

    def obey(self, message: dict[str, Any], fds: list[int]) -> None:
        """Take one order."""
        kind = message["t"]
        if kind == "open":
            self._nvme = open_storage(message["nvme"]) if message["nvme"] else None
            self._shared = open_storage(message["shared"])
        elif kind == "arm":
            self._failpoints = Failpoints(message["failpoints"], self._fire)
        elif kind == "arena":
            self._arenas[tuple(message["key"])] = Arena.attach(fds[0])
        elif kind == "forget":
            arena = self._arenas.pop(tuple(message["key"]), None)
            if arena is not None:
                arena.close()
        elif kind == "persist":
            self._persist.put(
                _Job(
                    rank=message["rank"],
                    generation=message["generation"],
                    step=message["step"],
                    arena=tuple(message["key"]),
                    slot=message["slot"],
                    part=message["part"],
                )
            )
        elif kind == "drain":
            self._drain.put(_Job(message["rank"], message["generation"], message["step"]))
        elif kind == "release":
            arena = self._arenas[tuple(message["key"])]
            if _holds(arena, message["slot"], message["step"], message["generation"]):
                arena.release(message["slot"])
        elif kind == "injected":
            self._replies.put(None)

    def _send(self, message: dict[str, Any]) -> None:
        with self._sending:
            self._channel.send(message)

    def _fire(self, fault: dict[str, Any]) -> None:
        self._send({"t": "inject", "index": fault["index"]})
        self._replies.get()

    def _reach(self, job: _Job, tier: str) -> Any:
        def reach(point: str) -> None:
            if self._failpoints:
                self._failpoints.reach(
                    point, rank=job.rank, step=job.step, generation=job.generation, tier=tier
                )

        return reach

    def _persist_loop(self) -> None:
        while True:
            job = self._persist.get()
            arena = self._arenas[job.arena or (0, 0, 0)]  # its agent keeps it as long as a slot of it waits
            saved = True
            # A predecessor may have died after it was done with the slot and before it could say so. The rank
            # may be writing the next snapshot there by now, which must not be taken for this one.
            if _holds(arena, job.slot, job.step, job.generation):
                saved = self._save(job, arena, Part.from_json(job.part or {}))
                # Free it only after the bytes are safe, or after it is certain that they will not be.
                (arena.persisted if saved else arena.release)(job.slot)
            self._send(
                {
                    "t": "slot_free",
                    "key": list(job.arena or ()),
                    "slot": job.slot,
                    "step": job.step,
                    "saved": saved,
                }
            )

    def _save(self, job: _Job, arena: Arena, part: Part) -> bool:
        assert self._shared is not None
        view = arena.view(job.slot)
        if self._nvme is not None:
            try:
                result = pack.persist(
                    view,
                    part,
                    self._nvme,
                    directory(job.step, job.generation),
                    failpoint=self._reach(job, "nvme"),
                )
            except ResilienceError as error:
                self._failed(
                    job, "nvme", error
                )  # and go straight to the colder tier, while the slot is there
            else:
                self._done(job, "nvme", result)
                self._drain.put(job)
                return True
        try:
            result = pack.persist(
                view,
                part,
                self._shared,
                directory(job.step, job.generation),
                failpoint=self._reach(job, "shared"),
            )
        except ResilienceError as error:
            self._failed(job, "shared", error)
            return False
        self._done(job, "shared", result)
        return True

    def _drain_loop(self) -> None:
        while True:
            job = self._drain.get()
            assert self._nvme is not None and self._shared is not None
            try:
                result = pack.copy(
                    self._nvme,
                    self._shared,
                    directory(job.step, job.generation),
                    job.rank,
                    failpoint=self._reach(job, "shared"),
                )
            except FileNotFoundError:
                self._failed(
                    job, "shared", ResilienceError("the pack left the nvme tier before it was drained")
                )
            except ResilienceError as error:
                self._failed(job, "shared", error)
            else:
                self._done(job, "shared", result)

    def _done(self, job: _Job, tier: str, result: pack.PersistResult) -> None:
        self._send(
            {
                "t": "persisted",
                "rank": job.rank,
                "generation": job.generation,
                "step": job.step,
                "tier": tier,
                "part": result.part_name,
                "sha256": result.sha256,
                "size": result.size,
                "seconds": result.seconds,
            }
        )

    def _failed(self, job: _Job, tier: str, error: ResilienceError) -> None:
        self._send(
            {
                "t": "save_failed",
                "rank": job.rank,
                "generation": job.generation,
                "step": job.step,
                "tier": tier,
                "error": f"{type(error).__name__}: {error}",
            }
        )


def _holds(arena: Arena, slot: int, step: int, generation: int) -> bool:
    """Whether the slot is sealed with this very snapshot: then nobody else touches it."""
    state = arena.state(slot)
    return (state.kind, state.step, state.generation) == (SlotKind.SEALED, step, generation)


def _or_die(loop: Callable[[], None]) -> None:
    """Run a thread of ours; its unforeseen end is the end of the writer, which is then started again."""
    try:
        loop()
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        os._exit(70)


if __name__ == "__main__":
    main()
