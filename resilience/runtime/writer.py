"""The writer: streams sealed slots from shared memory to the nearest tier, then on to shared storage.

One process per node, started by exec; it outlives any rank, so a snapshot that was sealed is persisted even if
its rank dies the next moment. It decides nothing and commits nothing: it reports what is durable, and what is
not, and the supervisor writes the record. Training never waits for it except for a free slot.

Where it is told of a copy that has begun, it writes what is copied while the rest is still being copied. That is a
head start and nothing else: nothing is published before the seal, nothing reported before the order to persist,
and whatever goes wrong on the way is forgotten, for the order is then carried out from the beginning.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from resilience.checkpoint import drain, pack
from resilience.checkpoint.arena import Arena, SlotKind
from resilience.checkpoint.follow import Following, Sealed, Source, Torn
from resilience.checkpoint.increment import Base
from resilience.checkpoint.pace import Pace
from resilience.checkpoint.part import Part, directory
from resilience.errors import CorruptError, ResilienceError
from resilience.runtime.failpoint import Failpoints
from resilience.runtime.system import die_with_parent, yield_to_others
from resilience.runtime.wire import Channel, Closed
from storage_backends import Storage, open_storage
from storage_backends.transfer import Retried

_PERSIST_NICE = 15  # at 10 a copy that is followed on two cores takes 1.15 times as long, at 15 about 1.1
_DRAIN_NICE = 19


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
    attempt: int | None = None  # of the copy to follow; None: the slot is sealed
    trained: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Last:
    """A rank's last save in a tier, and which attempt at which slot it was made from."""

    base: Base
    arena: tuple[int, int, int]
    slot: int
    attempt: int


class Writer:
    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._sending = threading.Lock()
        self._arenas: dict[tuple[int, int, int], Arena] = {}
        self._forgotten: set[tuple[int, int, int]] = set()  # arenas that are about to be closed
        # Jobs; and arenas to close, which is done between jobs.
        self._persist: queue.SimpleQueue[_Job | tuple[int, int, int]] = queue.SimpleQueue()
        # What a head start has made durable, until the order for it comes.
        self._ahead: dict[tuple[tuple[int, int, int], int, int], tuple[str, pack.PersistResult]] = {}
        self._last: dict[tuple[int, str], _Last] = {}  # by rank and tier
        self._drained: dict[int, Part] = {}  # what was copied last, by rank
        self._drain: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._replies: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._nvme: Storage | None = None
        self._shared: Storage | None = None
        self._pace = Pace(None)
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
            self._nvme = open_storage(message["nvme"], tell=self._warn) if message["nvme"] else None
            self._shared = open_storage(message["shared"], tell=self._warn, on_retry=self._retried)
            self._pace = Pace(message.get("drain_rate"))
        elif kind == "arm":
            self._failpoints = Failpoints(message["failpoints"], self._fire)
        elif kind == "arena":
            self._arenas[tuple(message["key"])] = Arena.attach(fds[0])
        elif kind == "forget":
            self._forgotten.add(tuple(message["key"]))
            self._persist.put(tuple(message["key"]))
        elif kind in ("persist", "follow"):
            self._persist.put(
                _Job(
                    rank=message["rank"],
                    generation=message["generation"],
                    step=message["step"],
                    arena=tuple(message["key"]),
                    slot=message["slot"],
                    part=message["part"],
                    attempt=message.get("attempt"),
                    trained=tuple(message.get("trained", ())),
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

    def _retried(self, news: Retried) -> None:
        self._send({"t": "retried", "data": asdict(news)})

    def _warn(self, text: str) -> None:
        self._send({"t": "warning", "message": text})

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
        # Where processors are scarce the copy that we follow comes first, and training after it.
        yield_to_others(_PERSIST_NICE, disk=False)
        while True:
            job = self._persist.get()
            if isinstance(job, tuple):
                self._forget(job)
            elif job.attempt is not None:
                self._follow(job)
            else:
                self._carry_out(job)

    def _carry_out(self, job: _Job) -> None:
        key = job.arena or (0, 0, 0)
        arena = self._arenas[key]  # its agent keeps it as long as a slot of it waits
        saved = True
        ahead = self._ahead.pop((key, job.slot, job.step), None)
        # A predecessor may have died after it was done with the slot and before it could say so. The rank
        # may be writing the next snapshot there by now, which must not be taken for this one.
        if _holds(arena, job.slot, job.step, job.generation):
            if ahead is not None:
                self._saved(job, *ahead)
            else:
                saved = self._save(job, arena, Part.from_json(job.part or {}))
            # Free it only after the bytes are safe, or after it is certain that they will not be.
            (arena.persisted if saved else arena.release)(job.slot)
        self._send(
            {
                "t": "slot_free",
                "key": list(key),
                "slot": job.slot,
                "step": job.step,
                "saved": saved,
            }
        )

    def _follow(self, job: _Job) -> None:
        """Persist a slot while it is being filled, as far as nobody has to be told of it yet."""
        key = job.arena or (0, 0, 0)
        arena = self._arenas.get(key)
        storage, tier = (self._nvme, "nvme") if self._nvme is not None else (self._shared, "shared")
        if arena is None or storage is None:
            return
        source = Following(
            arena,
            job.slot,
            attempt=job.attempt or 0,
            step=job.step,
            generation=job.generation,
            abandoned=lambda: key in self._forgotten,
        )
        try:
            result = self._write(job, arena, Part.from_json(job.part or {}), storage, tier, source)
        except (Torn, ResilienceError):
            return  # whoever seals the slot after all has it persisted; what fails then is told
        self._ahead[key, job.slot, job.step] = tier, result

    def _forget(self, key: tuple[int, int, int]) -> None:
        arena = self._arenas.pop(key, None)
        if arena is not None:
            arena.close()
        self._forgotten.discard(key)
        for done in [done for done in self._ahead if done[0] == key]:
            del self._ahead[done]  # sealed, and its rank died before it could say so: never committed, swept

    def _save(self, job: _Job, arena: Arena, part: Part) -> bool:
        assert self._shared is not None
        for storage, tier in ((self._nvme, "nvme"), (self._shared, "shared")):
            if storage is None:
                continue
            try:
                result = self._write(job, arena, part, storage, tier, Sealed())
            except CorruptError as error:
                self._failed(job, "memory", error)  # it is the snapshot that is wrong: no tier shall have it
                return False
            except ResilienceError as error:
                self._failed(job, tier, error)  # and go straight to the colder tier, while the slot is there
            else:
                self._saved(job, tier, result)
                return True
        return False

    def _write(
        self, job: _Job, arena: Arena, part: Part, storage: Storage, tier: str, source: Source
    ) -> pack.PersistResult:
        attempt = arena.state(job.slot).attempt
        result = pack.persist(
            arena.view(job.slot),
            part,
            storage,
            directory(job.step, job.generation),
            source=source,
            earlier=self._earlier(job.rank, tier),
            trained=job.trained,
            failpoint=self._reach(job, tier),
        )
        assert result.base is not None
        self._last[job.rank, tier] = _Last(result.base, job.arena or (0, 0, 0), job.slot, attempt)
        return result

    def _earlier(self, rank: int, tier: str) -> pack.Earlier | None:
        """The rank's last save in this tier, with its snapshot if that is still in memory."""
        last = self._last.get((rank, tier))
        if last is None:
            return None
        arena = self._arenas.get(last.arena)
        if arena is None:
            return pack.Earlier(last.base)

        def whole() -> bool:
            return arena.state(last.slot).attempt == last.attempt

        return pack.Earlier(last.base, arena.view(last.slot), whole) if whole() else pack.Earlier(last.base)

    def _saved(self, job: _Job, tier: str, result: pack.PersistResult) -> None:
        self._done(job, tier, result)
        if tier == "nvme":
            self._drain.put(job)

    def _drain_loop(self) -> None:
        yield_to_others(_DRAIN_NICE, disk=True)  # nobody waits for it; what it starts inherits this
        while True:
            job = self._drain.get()
            assert self._nvme is not None and self._shared is not None
            try:
                result = drain.copy(
                    self._nvme,
                    self._shared,
                    directory(job.step, job.generation),
                    job.rank,
                    earlier=self._drained.get(job.rank),
                    pace=self._pace,
                    failpoint=self._reach(job, "shared"),
                )
            except FileNotFoundError:
                self._failed(
                    job, "shared", ResilienceError("the pack left the nvme tier before it was drained")
                )
            except ResilienceError as error:
                self._failed(job, "shared", error)
            else:
                self._drained[job.rank] = result.part
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
    except Closed:  # nobody to tell any more; the thread that reads orders ends the process
        return
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        os._exit(70)


if __name__ == "__main__":
    main()
