"""DTensor to Shard: which boxes of the global array a rank holds, and who else holds them. No collective.

Owns the reading of mesh and placements: ``Replicate``, ``Shard`` and the strided shards of FSDP2 over tensor
parallelism, on meshes of any number of dimensions. What it says is a function of shape, mesh and placements, so
every rank comes to the same cut without a word. Must never copy memory, and refuses by name what has no boxes
(``Partial``: every rank holds a summand).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as ShardPlacement
from torch.distributed.tensor.placement_types import Placement

from resilience.checkpoint.box import Box
from resilience.checkpoint.shard import Shard
from resilience.errors import InvalidError

Runs = tuple[tuple[int, int], ...]  # indices of one axis, as half-open ranges in the order they lie in memory
_Cut = tuple[int, int]  # of one axis by one mesh dimension: into how many, after how many (1: not strided)


@dataclass(frozen=True)
class _Layout:
    """What a rank holds of every DTensor of one shape, mesh and placements; ``reason``: why that cannot be said."""

    boxes: tuple[Box, ...] = ()
    local: tuple[int, ...] = ()  # shape of the memory
    holders: tuple[int, ...] | None = None
    unit: tuple[int, ...] | None = None
    reason: str = ""


def share_of(tensor: DTensor) -> Shard | str:
    """As ``shard_of``, or why the DTensor cannot be saved."""
    layout = _layout(tensor.shape, tensor.device_mesh, tensor.placements)
    if layout.reason:
        return layout.reason
    local = _local(tensor)
    size = tuple(local.shape)
    if layout.holders is not None and size != layout.local and (layout.boxes or 0 not in size):
        return (
            f"a sharded tensor (DTensor) of shape {list(tensor.shape)} placed as {list(tensor.placements)} "
            f"holds {list(size)} here, where its placements say {list(layout.local)}: give its local memory as "
            "Shard.at(tensor.to_local(), ...)"
        )
    return Shard(local, tuple(tensor.shape), layout.boxes, layout.holders, layout.unit)


def shard_of(tensor: DTensor) -> Shard:
    """The share of a DTensor that this rank holds; its memory is the DTensor's own.

    Ranks outside of its mesh hold nothing. ``holders`` are the ranks of the mesh at the same coordinates of the
    sharding dimensions: its other dimensions replicate. ``unit`` is the largest shard where all shards keep to a
    grid of it.

    Raises:
        InvalidError: the DTensor cannot be saved.
    """
    found = share_of(tensor)
    if isinstance(found, str):
        raise InvalidError(found, operation="shard", hint="redistribute(placements=[Shard(0)]) makes it one")
    return found


@lru_cache(maxsize=64)
def members(mesh: DeviceMesh) -> tuple[int, ...] | None:
    """Global ranks of a mesh; ``None`` if this one is not among them."""
    return None if mesh.get_coordinate() is None else tuple(mesh.mesh.flatten().tolist())


@lru_cache(maxsize=4096)  # a model has few layouts, and every tensor of every save asks
def _layout(shape: torch.Size, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> _Layout:
    for placement in placements:
        if placement.is_partial():
            return _Layout(
                reason=f"a sharded tensor (DTensor) placed as {placement!r} holds a summand on each rank, not a piece: "
                "redistribute it to Shard or Replicate first"
            )
        if _cut(placement, 1) is None and not isinstance(placement, Replicate):
            return _Layout(
                reason=f"a sharded tensor (DTensor) placed as {placement!r} is not known: use Shard or Replicate"
            )
    unit = _unit(shape, mesh, placements)
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return _Layout(unit=unit)
    axes: list[Runs] = [((0, int(size)),) if size else () for size in shape]
    for size, placement, at in zip(mesh.shape, placements, coordinate, strict=True):
        cut = _cut(placement, size)
        if cut is not None:
            axis = int(placement.dim)  # type: ignore[attr-defined]
            axes[axis] = _take(axes[axis], cut, at)
    boxes = tuple(
        Box(tuple(start for start, _ in span), tuple(stop - start for start, stop in span))
        for span in itertools.product(*axes)
    )
    replicas = tuple(
        slice(None) if isinstance(placement, Replicate) else at
        for placement, at in zip(placements, coordinate, strict=True)
    )
    holders = tuple(mesh.mesh[replicas].flatten().tolist())  # of global ranks
    return _Layout(boxes, tuple(map(_length, axes)), holders, unit)


def _local(tensor: DTensor) -> torch.Tensor:
    with torch.no_grad():  # no view for autograd: this is the very memory
        return tensor.to_local()


def _cut(placement: Any, size: int) -> _Cut | None:
    """How a placement cuts its axis over a mesh dimension of ``size``; ``None`` if it does not."""
    strided = getattr(placement, "split_factor", None)
    if strided is not None:
        return size, int(strided)
    return (size, 1) if isinstance(placement, ShardPlacement) else None


def _take(runs: Runs, cut: _Cut, at: int) -> Runs:
    """Piece ``at`` of an axis: like ``torch.chunk``, or strided: cut first as the mesh dimensions to the right
    will, then each of those pieces; the ``at``-th of all of them, one after the other."""
    pieces, strides = cut
    total = _length(runs)
    found: list[tuple[int, int]] = []
    for start, stop in (_chunk(total, strides, index) for index in range(strides)):
        low, high = _chunk(stop - start, pieces, at)
        found += _slice(runs, start + low, start + high)
    joined: list[tuple[int, int]] = []
    for start, stop in found:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return tuple(joined)


def _chunk(total: int, pieces: int, index: int) -> tuple[int, int]:
    """Piece ``index`` of ``torch.chunk``: all have the size of the first, the last ones are short or empty."""
    size = -(-total // pieces)
    return min(index * size, total), min((index + 1) * size, total)


def _slice(runs: Runs, low: int, high: int) -> list[tuple[int, int]]:
    """Elements ``low .. high - 1`` of ``runs`` laid end to end."""
    found, at = [], 0
    for start, stop in runs:
        first, last = max(low - at, 0), min(high - at, stop - start)
        if first < last:
            found.append((start + first, start + last))
        at += stop - start
    return found


def _length(runs: Runs) -> int:
    return sum(stop - start for start, stop in runs)


def _unit(shape: torch.Size, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> tuple[int, ...] | None:
    sizes = []
    for axis, length in enumerate(shape):
        cuts = tuple(
            cut
            for size, placement in zip(mesh.shape, placements, strict=True)
            if (cut := _cut(placement, size)) is not None and placement.dim == axis  # type: ignore[attr-defined]
        )
        size = _side(int(length), cuts)
        if size is None:
            return None
        sizes.append(size)
    return tuple(sizes)


@lru_cache(maxsize=4096)
def _side(length: int, cuts: Sequence[_Cut]) -> int | None:
    """Side of the cells of an axis that all ranks' runs keep to; ``None`` if there is none."""
    if not cuts:
        return max(length, 1)
    if len(cuts) == 1 and cuts[0][1] == 1:
        return max(-(-length // cuts[0][0]), 1)
    everybody: list[Runs] = [((0, length),) if length else ()]
    for cut in cuts:
        everybody = [_take(runs, cut, at) for runs in everybody for at in range(cut[0])]
    spans = [run for runs in everybody for run in runs]
    side = max((stop - start for start, stop in spans), default=1)
    keeps = all(start % side == 0 and (stop % side == 0 or stop == length) for start, stop in spans)
    return side if keeps else None
