"""The snapshot: copying a rank's arrays into a slot of the arena. This copy is all that training waits for.

Owns the order copy -> seal, and that a slot holds exactly the bytes of its plan: payloads, zeros in all gaps.
Must never seal a slot that was not filled completely, and never keep a reference to an array after returning.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from resilience.checkpoint import arrays as _arrays
from resilience.checkpoint.arena import Arena
from resilience.checkpoint.arrays import AnyArray
from resilience.checkpoint.box import Box
from resilience.checkpoint.plan import ArraySpec, Chunk, Plan, specs
from resilience.errors import ExhaustedError, InvalidError

_ALONE = 4 << 20  # bytes up to which a second thread costs more than it brings


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
    before_seal: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Snapshot:
    """Copy ``arrays`` into ``slot`` as ``plan`` says, then seal it. When this returns, the arrays may change.

    Args:
        slot: from ``arena.acquire()``.
        arrays: by key, as ``tree.flatten`` returned them; more than the plan owns is fine.
        threads: that copy at the same time.
        before_seal: called when all is copied.

    Raises:
        InvalidError: the arrays are not those of the plan (another data type or shape, or missing).
        ExhaustedError: the slot is too small for the plan.

    On any error before the seal the slot is free again.
    """
    begun = clock()
    try:
        if plan.size > arena.slot_bytes:
            raise ExhaustedError(
                f"the state has grown to {plan.size:,} bytes; the arena's slots have {arena.slot_bytes:,}",
                operation="snapshot",
                step=step,
                hint="make a new arena with slots of the plan's size",
            )
        _fill(np.frombuffer(arena.view(slot), np.uint8), _sources(arrays, plan), plan, threads)
        before_seal()
    except BaseException:
        arena.abort(slot)
        raise
    arena.seal(slot, step, generation)
    return Snapshot(slot, step, generation, plan, plan.size, clock() - begun)


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


def _fill(target: AnyArray, sources: Mapping[str, list[AnyArray]], plan: Plan, threads: int) -> None:
    within = {spec.name: spec.boxes for spec in plan.arrays}

    def copy(chunk: Chunk) -> None:
        _copy(target, sources[chunk.key][chunk.piece], within[chunk.key][chunk.piece], chunk)

    if not plan.chunks:
        target[: plan.size] = 0
    if threads <= 1 or plan.size <= _ALONE:
        for chunk in plan.chunks:
            copy(chunk)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="snapshot") as pool:
        # NumPy lets go of the interpreter while it copies, so threads do copy at the same time.
        for done in pool.map(copy, plan.chunks):
            assert done is None


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
