"""What torch.distributed.checkpoint (DCP) saves, in our parts: items by name, without pickle.

Owns the form (docs/format.md, "Checkpoints of torch.distributed.checkpoint") and the meaning of a ``checkpoint_id``.
A part's state says which items its rank wrote: tensors (whole or a piece), plain values, and where each belongs in the
nested state. Must never keep a byte that DCP pickled.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType

from resilience.checkpoint import arrays as _arrays
from resilience.checkpoint.box import Box, missing
from resilience.checkpoint.part import Part, PartArray
from resilience.checkpoint.shard import Shard
from resilience.checkpoint.tree import flatten, segment, unflatten
from resilience.errors import CorruptError, InvalidError

FORMAT = "torch.distributed.checkpoint"
Path = tuple[str | int, ...]


def step_of(checkpoint_id: str | os.PathLike[str]) -> int | None:
    """The step that a ``checkpoint_id`` names: the number at its end (``120``, ``step-120``, ``out/step_120/``)."""
    found = re.search(
        r"(\d+)/*$", os.fspath(checkpoint_id) if not isinstance(checkpoint_id, int) else str(checkpoint_id)
    )
    return int(found[1]) if found else None


def wanted_step(checkpoint_id: str | os.PathLike[str]) -> int:
    """As ``step_of``; ``InvalidError`` if it names none."""
    step = step_of(checkpoint_id)
    if step is None:
        raise InvalidError(
            f"checkpoint_id {os.fspath(checkpoint_id)!r} does not end in a number",
            operation="dcp",
            hint="checkpoints are named by their step: checkpoint_id='step-120', or leave it out to count on",
        )
    return step


def units(plans: Iterable[SavePlan]) -> dict[str, tuple[int, ...]]:
    """Item -> the largest of its pieces, where all of them keep to a grid of it."""
    pieces: dict[str, list[Box]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for item in (item for plan in plans for item in plan.items):
        if item.tensor_data is not None:
            pieces.setdefault(item.index.fqn, []).append(_box(item))
            shapes[item.index.fqn] = tuple(item.tensor_data.size)
    found = {}
    for name, boxes in pieces.items():
        whole = shapes[name]
        unit = tuple(max(1, *(box.shape[axis] for box in boxes)) for axis in range(len(whole)))
        corners = [(box.offset, box.end) for box in boxes if box.count]
        if all(
            o % u == 0 and (e % u == 0 or e == n)
            for offset, end in corners
            for o, e, u, n in zip(offset, end, unit, whole, strict=True)
        ):
            found[name] = unit
    return found


def _box(item: WriteItem) -> Box:
    assert item.tensor_data is not None
    chunk = item.tensor_data.chunk
    return Box(tuple(chunk.offsets), tuple(chunk.sizes))


def paths(plan: SavePlan) -> dict[str, Path]:
    """Places in the nested state of the items of a plan, where its planner notes them."""
    data = plan.planner_data
    if data is None:
        return {}
    if not isinstance(data, dict) or not all(isinstance(path, tuple) for path in data.values()):
        raise InvalidError(
            f"the save planner's data is a {type(data).__name__}, which only it can read",
            operation="dcp",
            hint="use DefaultSavePlanner, or a planner that leaves planner_data as that has it",
        )
    return {item.index.fqn: data[item.index.fqn] for item in plan.items if item.index.fqn in data}


def resolve(
    items: Iterable[WriteItem], planner: SavePlanner, units: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Shard], dict[str, Any]]:
    """A rank's tensors as shards, and its plain values."""
    held: dict[str, list[tuple[Box, torch.Tensor]]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    values: dict[str, Any] = {}
    for item in items:
        name = item.index.fqn
        if item.type is WriteItemType.BYTE_IO:
            values[name] = _value(item, planner)
            continue
        data = planner.resolve_data(item)
        assert item.tensor_data is not None and isinstance(data, torch.Tensor)
        reason = _arrays.refusal(data)
        if reason is not None:
            raise InvalidError(
                f"cannot save {name}: type {type(data).__name__}: {reason}",
                operation="dcp",
                path=name,
                hint="leave it out of the state, or save the plain tensors inside of it",
            )
        box = _box(item)
        if tuple(data.shape) != box.shape:
            raise InvalidError(
                f"cannot save {name}: DCP plans a piece of shape {list(box.shape)}, this rank holds {list(data.shape)}",
                operation="dcp",
                path=name,
                hint="DCP cannot describe strided shards that are cut unevenly: make the sizes divisible by the mesh",
            )
        held.setdefault(name, []).append((box, data.detach()))
        shapes[name] = tuple(item.tensor_data.size)
    tensors = {}
    for name, pieces in held.items():
        boxes = tuple(box for box, _ in pieces if box.count)
        # Several pieces on one rank (ShardedTensor) come as one memory, one after the other.
        local = pieces[0][1] if len(pieces) == 1 else torch.cat([piece.reshape(-1) for _, piece in pieces])
        tensors[name] = Shard(local, shapes[name], boxes, None, units.get(name))
    return tensors, values


def _value(item: WriteItem, planner: SavePlanner) -> Any:
    """The value that DCP would pickle. Planners that make something else of it cannot be served: only they can read
    what they make."""
    name = item.index.fqn
    lookup = getattr(planner, "lookup_object", None)
    if lookup is not None:
        value = lookup(item.index)
        if getattr(type(planner), "transform_object", None) is DefaultSavePlanner.transform_object:
            return value
        pickled, made = io.BytesIO(), planner.resolve_data(item)
        torch.save(value, pickled)
        if isinstance(made, io.BytesIO) and made.getvalue() == pickled.getvalue():
            return value
    raise InvalidError(
        f"cannot save {name}: {type(planner).__name__} makes bytes of it that only that planner can read",
        operation="dcp",
        path=name,
        hint="use DefaultSavePlanner, or a planner that leaves values that are no tensors as that has them",
    )


def encode(
    tensors: Mapping[str, Shard], values: Mapping[str, Any], paths: Mapping[str, Path]
) -> tuple[dict[str, Shard], Any]:
    """A rank's items as ``(arrays, state)`` of its part.

    ``InvalidError``, naming the item, where something can only be pickled.
    """
    arrays: dict[str, Shard] = {}
    nodes: list[dict[str, Any]] = []
    for items in (tensors, values):
        found = {}
        for name, item in items.items():
            # Each for itself: what is tied within this rank may be written by two of them.
            own, found[name] = flatten(item, prefix=segment(name))
            arrays.update(
                (key, array if isinstance(array, Shard) else _whole(array)) for key, array in own.items()
            )
        nodes.append({"t": "dict", "k": list(found), "v": list(found.values())})
    _, where = flatten({name: list(path) for name, path in paths.items()}, prefix="")
    return arrays, {"t": "dict", "k": ["format", "tensors", "values", "paths"], "v": [FORMAT, *nodes, where]}


def _whole(array: Any) -> Shard:
    """An array inside of a value: DCP has chosen this rank to write it, so it holds all of it alone."""
    _, shape = _arrays.describe(array)
    return Shard(array, shape, (Box.whole(shape),) if 0 not in shape else (), None, shape)


@dataclass(frozen=True)
class Catalog:
    """The items of a checkpoint.

    Attributes:
        arrays: all arrays, by name.
        tensors: item -> name of its array.
        values: item -> skeleton.
        paths: item -> its place in the nested state, as DCP's default planner notes it.
    """

    arrays: dict[str, PartArray]
    tensors: dict[str, str]
    values: dict[str, Any]
    paths: dict[str, Path]

    @classmethod
    def of(cls, parts: Sequence[Part]) -> Catalog:
        """``InvalidError`` if the checkpoint was not written through DCP, ``CorruptError`` if its parts disagree."""
        found = cls({}, {}, {}, {})
        for part in parts:
            for array in part.arrays:
                known = found.arrays.setdefault(array.name, array)
                if known != array:
                    raise CorruptError(
                        f"part {part.name} has {array.name} as {array.dtype}{list(array.shape)} in chunks of "
                        f"{array.grid}, others as {known.dtype}{list(known.shape)} in chunks of {known.grid}",
                        operation="dcp",
                        path=part.name,
                        hint="restore an older checkpoint; `resilience verify` lists the damaged ones",
                    )
            items = _items(part)
            found.tensors.update((name, str(node["n"])) for name, node in items["tensors"])
            found.values.update(items["values"])
            paths = unflatten(items["paths"], {})
            found.paths.update((name, tuple(path)) for name, path in paths.items())
        return found

    def metadata(self) -> Metadata:
        """What DCP's load planners want to know. A tensor is one piece here: who wrote how much of it is our affair."""
        known: dict[str, Any] = {}
        for name, key in self.tensors.items():
            array = self.arrays[key]
            size = torch.Size(array.shape)
            chunk = ChunkStorageMetadata(offsets=torch.Size((0,) * len(size)), sizes=size)
            known[name] = TensorStorageMetadata(TensorProperties(getattr(torch, array.dtype)), size, [chunk])
        known.update((name, BytesStorageMetadata()) for name in self.values)
        return Metadata(known, planner_data=dict(self.paths))

    def holes(self, parts: Iterable[Part]) -> dict[str, Box]:
        """Arrays that the parts do not hold completely, each with a box that is missing."""
        there: dict[str, list[Box]] = {}
        for part in parts:
            for chunk in part.chunks:
                there.setdefault(part.arrays[chunk.array].name, []).append(chunk.box)
        left = {
            name: missing(Box.whole(array.shape), there.get(name, ())) for name, array in self.arrays.items()
        }
        return {name: boxes[0] for name, boxes in left.items() if boxes}


def _items(part: Part) -> dict[str, Any]:
    """``tensors`` and ``values`` as pairs, ``paths`` as a skeleton."""
    try:
        top = dict(zip(part.state["k"], part.state["v"], strict=True))
        if top["format"] == FORMAT:
            pairs = {
                name: list(zip(top[name]["k"], top[name]["v"], strict=True)) for name in ("tensors", "values")
            }
            return {**pairs, "paths": top["paths"]}
    except (KeyError, TypeError, ValueError):
        pass
    raise InvalidError(
        f"{part.directory} was not written through torch.distributed.checkpoint",
        operation="dcp",
        path=part.directory,
        step=part.step,
        hint="restore it with Run.track or Checkpointer, or read its arrays with resilience.open_checkpoint",
    )
