"""The snapshot: copying a rank's arrays into a slot of the arena. This copy is all that training waits for.

Owns the order copy -> seal, and that a slot holds exactly the bytes of its plan: payloads, zeros in all gaps.
Arrays that nothing changes before an optimizer steps may be copied later, beside the next forward and backward.
Must never seal a slot that was not filled completely, or whose arrays changed while they were copied, and never keep
a reference to an array after the seal.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from resilience.checkpoint import arrays as _arrays
from resilience.checkpoint.arena import Arena
from resilience.checkpoint.arrays import AnyArray
from resilience.checkpoint.box import Box
from resilience.checkpoint.plan import ArraySpec, Chunk, Plan, specs
from resilience.checkpoint.shard import Shard
from resilience.errors import ExhaustedError, InvalidError

_ALONE = 4 << 20  # bytes up to which a second thread costs more than it brings
_TASK = (
    4 << 20
)  # bytes that a thread copies at a time, chunks permitting: a task costs as much as 100 KB copied


@dataclass(frozen=True)
class Snapshot:
    """A sealed slot.

    Attributes:
        slot: its index in the arena.
        size: bytes of the pack image in it.
        seconds: what the copy took.
    """

    slot: int
    step: int
    generation: int
    plan: Plan
    size: int
    seconds: float


def specs_of(
    arrays: Mapping[str, Any], objects: Mapping[str, Any], *, rank: int = 0
) -> tuple[ArraySpec, ...]:
    """Specs of the arrays of a state, with those marked replicated that every rank holds alike.

    Args:
        arrays: by key, as ``tree.flatten`` returned them for ``{name: fit.capture(object)}``.
        objects: the tracked objects by name.
        rank: this one.
    """
    if "torch" not in sys.modules:
        return specs(arrays, rank=rank)
    from resilience.integrations.torch import replicated_names

    return specs(arrays, replicated_names(objects), rank=rank)


def snapshot(
    arena: Arena,
    slot: int,
    arrays: Mapping[str, Any],
    plan: Plan,
    *,
    step: int,
    generation: int,
    threads: int = 2,
    announce: Callable[[int], None] = lambda attempt: None,
    before_seal: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Snapshot:
    """Copy ``arrays`` into ``slot`` as ``plan`` says, then seal it. When this returns, the arrays may change.

    Args:
        slot: from ``arena.acquire()``.
        arrays: by key, as ``tree.flatten`` returned them; more than the plan owns is fine.
        threads: that copy at the same time.
        announce: called with the arena's ``attempt`` while the copy goes on, if that takes long enough for a writer
            to follow it.
        before_seal: called when all is copied.

    Raises:
        InvalidError: the arrays are not those of the plan (another data type or shape, or missing).
        ExhaustedError: the slot is too small for the plan.

    On any error before the seal the slot is free again.
    """
    options: dict[str, Any] = {"threads": threads, "announce": announce, "clock": clock}
    return begin(arena, slot, arrays, plan, step=step, generation=generation, **options).join(before_seal)


def begin(
    arena: Arena,
    slot: int,
    arrays: Mapping[str, Any],
    plan: Plan,
    *,
    step: int,
    generation: int,
    later: Collection[str] = (),
    threads: int = 2,
    announce: Callable[[int], None] = lambda attempt: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Copying:
    """As ``snapshot``, which goes on in the background: when this returns, all arrays but ``later`` may change; those
    when ``join`` of what is returned has returned.

    Args:
        later: keys of arrays that nobody changes until then.
    """
    try:
        if plan.size > arena.slot_bytes:
            raise ExhaustedError(
                f"the state has grown to {plan.size:,} bytes; the arena's slots have {arena.slot_bytes:,}",
                operation="snapshot",
                step=step,
                hint="make a new arena with slots of the plan's size",
            )
        return Copying(
            arena, slot, arrays, plan, step, generation, frozenset(later), threads, announce, clock
        )
    except BaseException:
        arena.abort(slot)
        raise


class Copying:
    """A snapshot that is being made. Made by ``begin``; ``join`` it, once, from the thread that made it."""

    def __init__(
        self,
        arena: Arena,
        slot: int,
        arrays: Mapping[str, Any],
        plan: Plan,
        step: int,
        generation: int,
        later: frozenset[str],
        threads: int,
        announce: Callable[[int], None],
        clock: Callable[[], float],
    ) -> None:
        self._begun, self._clock = clock(), clock
        self._arena, self._slot, self._plan = arena, slot, plan
        self._step, self._generation = step, generation
        self._versions = [(arrays[key], _version(arrays[key])) for key in later]
        attempt = arena.state(slot).attempt
        self._filling = _Filling(arena, slot, _sources(arrays, plan), plan, threads)
        try:
            self._filling.start(later, lambda: announce(attempt))
        except BaseException:
            self._filling.close()
            raise

    def join(self, before_seal: Callable[[], None] = lambda: None) -> Snapshot:
        """Wait for the copy, and seal it. When this returns, every array may change.

        Raises:
            InvalidError: an array of ``later`` was changed meanwhile. Nothing was sealed.
        """
        try:
            self._filling.finish()
            for array, version in self._versions:
                if _version(array) != version:
                    raise InvalidError(
                        "the state was changed while its snapshot was still being copied",
                        operation="snapshot",
                        step=self._step,
                        hint="with overlapped snapshots parameters may change in optimizer.step() only; "
                        "use snapshot='blocking'",
                    )
            before_seal()
        except BaseException:
            self._filling.close()  # before somebody else may have the slot
            self._arena.abort(self._slot)
            raise
        finally:
            self._versions = []
            self._filling.close()
        self._arena.seal(self._slot, self._step, self._generation)
        seconds = self._clock() - self._begun
        return Snapshot(self._slot, self._step, self._generation, self._plan, self._plan.size, seconds)


def _version(array: Any) -> Any:
    """A number that torch raises with every change of a tensor in place; of other arrays nothing is known."""
    return getattr(array.local if isinstance(array, Shard) else array, "_version", None)


def _sources(arrays: Mapping[str, Any], plan: Plan) -> dict[str, list[AnyArray]]:
    """The planned arrays as NumPy, a view for each box that this rank holds, looked up anew on every save: a
    pointer kept from the last goes stale."""
    boxes = {spec.name: spec.boxes for spec in plan.arrays}
    sources: dict[str, list[AnyArray]] = {}
    for chunk in plan.chunks:
        if chunk.key in sources:
            continue
        if chunk.key not in arrays:
            raise _mismatch(chunk, "is missing")
        dtype, shape = _arrays.describe(arrays[chunk.key])
        if (dtype, shape) != (chunk.dtype, chunk.shape):
            raise _mismatch(chunk, f"is {dtype}{list(shape)} now")
        sources[chunk.key] = _arrays.pieces(arrays[chunk.key])
        held = tuple(box.shape for box in boxes[chunk.key])
        if tuple(piece.shape for piece in sources[chunk.key]) != held:
            raise _mismatch(chunk, "holds other boxes now")
    return sources


def _mismatch(chunk: Chunk, problem: str) -> InvalidError:
    return InvalidError(
        f"array {chunk.key} was planned as {chunk.dtype}{list(chunk.shape)} and {problem}",
        operation="snapshot",
        path=chunk.key,
        hint="plan again after the state has changed its layout",
    )


class _Filling:
    """The copies of one snapshot, cut into tasks that threads carry out."""

    def __init__(
        self, arena: Arena, slot: int, sources: Mapping[str, list[AnyArray]], plan: Plan, threads: int
    ) -> None:
        self._target = np.frombuffer(arena.view(slot), np.uint8)
        self._sources = sources
        self._within = {spec.name: spec.boxes for spec in plan.arrays}
        self._plan, self._threads = plan, threads
        self._progress = _Progress(arena, slot)
        self._pool: ThreadPoolExecutor | None = None
        self._running: list[Future[None]] = []

    def start(self, later: frozenset[str], begun: Callable[[], None]) -> None:
        """Returns when all chunks but those of ``later`` are copied. ``begun`` is called meanwhile."""
        chunks = self._plan.chunks
        if not chunks:
            self._target[: self._plan.size] = 0
        small = self._threads <= 1 or self._plan.size <= _ALONE
        if small and not later:
            for chunk in chunks:
                self._copy(chunk)
            return
        self._pool = ThreadPoolExecutor(max(self._threads, 1), thread_name_prefix="snapshot")
        # NumPy lets go of the interpreter while it copies, so threads do copy at the same time.
        tasks = list(enumerate(_tasks(chunks, later)))
        now = [self._pool.submit(self._do, n, task) for n, task in tasks if task[0].key not in later]
        self._running = [self._pool.submit(self._do, n, task) for n, task in tasks if task[0].key in later]
        try:
            begun()
        finally:
            for done in now:
                done.result()

    def finish(self) -> None:
        """Returns when all chunks are copied."""
        for done in self._running:
            done.result()

    def close(self) -> None:
        """No thread touches an array any more. May run twice."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
        self._running = []
        self._sources = {}

    def _do(self, number: int, task: Sequence[Chunk]) -> None:
        for chunk in task:
            self._copy(chunk)
        self._progress.done(number, task[-1].end)

    def _copy(self, chunk: Chunk) -> None:
        piece = self._sources[chunk.key][chunk.piece]
        _copy(self._target, piece, self._within[chunk.key][chunk.piece], chunk)


def _tasks(chunks: Iterable[Chunk], later: frozenset[str]) -> Iterator[list[Chunk]]:
    """Neighbours together until they are worth a task: a state may have ten thousand small arrays."""
    task: list[Chunk] = []
    for chunk in chunks:
        if task and (task[0].key in later) != (chunk.key in later):
            yield task
            task = []
        task.append(chunk)
        if chunk.end - task[0].offset >= _TASK:
            yield task
            task = []
    if task:
        yield task


class _Progress:
    """Tells the arena up to where the slot is filled, whichever thread was faster."""

    def __init__(self, arena: Arena, slot: int) -> None:
        self._arena, self._slot = arena, slot
        self._ends: dict[int, int] = {}  # of finished tasks after the first unfinished one
        self._next = 0
        self._lock = threading.Lock()

    def done(self, number: int, end: int) -> None:
        with self._lock:
            self._ends[number] = end
            copied = 0
            while self._next in self._ends:
                copied = self._ends.pop(self._next)
                self._next += 1
            if copied:
                self._arena.advance(self._slot, copied)


def _copy(target: AnyArray, source: AnyArray, held: Box, chunk: Chunk) -> None:
    """Copy a chunk out of ``source``, which holds the box ``held``."""
    where = chunk.box.slices(held)
    box = source[where] if where else source
    payload = target[chunk.offset : chunk.offset + chunk.length]
    if box.size * box.itemsize < chunk.length:  # the array ends inside the chunk: the rest of it is zeros
        payload[:] = 0
    corner: Any = (..., *map(slice, chunk.box_shape))  # with the ellipsis a scalar stays an array
    np.copyto(payload.view(source.dtype).reshape(chunk.grid or chunk.box_shape)[corner], box)
    # CRC and the gap to the next chunk: a slot is used again, and old bytes must not come along.
    target[chunk.offset + chunk.length : chunk.end] = 0
