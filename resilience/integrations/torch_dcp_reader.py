"""``StorageReader``: ``dcp.load`` from our checkpoints, every byte of it verified.

Owns the choice of the checkpoint, the metadata that DCP's planners want, and reading what they ask for: each chunk
once, whatever sharding it was saved in and is wanted in. Must never hand a planner bytes that were stored as a pickle:
values are decoded, and pickled here for DCP, which takes them no other way.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader as DcpStorageReader
from torch.futures import Future

from resilience.checkpoint import arrays as _arrays
from resilience.checkpoint.box import Box, missing
from resilience.checkpoint.pack import check_chunk, read_range
from resilience.checkpoint.part import Part, PartChunk
from resilience.checkpoint.plan import CRC_BYTES
from resilience.checkpoint.restore import Source, check_together, load_part
from resilience.checkpoint.tree import leaves, unflatten
from resilience.errors import CorruptError, InvalidError, ResilienceError
from resilience.integrations.torch_dcp import Catalog, step_of, wanted_step
from resilience.journal.log import CommitLog
from resilience.journal.state import fold
from storage_backends import Storage, open_storage


class _Unreadable(Metadata):
    """Metadata of a checkpoint that cannot be read. DCP makes an assertion of whatever ``read_metadata`` raises, so the
    error waits until somebody looks."""

    def __init__(self, error: ResilienceError) -> None:
        self.error = error

    @property
    def state_dict_metadata(self) -> Any:  # type: ignore[override]
        raise self.error


@dataclass
class _Want:
    """Boxes of an array that are wanted, and memory of their shapes for them, in carrier type."""

    boxes: list[Box] = field(default_factory=list)
    views: list[_arrays.AnyArray] = field(default_factory=list)

    def add(self, box: Box, memory: _arrays.AnyArray) -> None:
        self.boxes.append(box)
        self.views.append(memory if memory.dtype.isbuiltin == 1 else memory.view(_carrier(memory)))


class StorageReader(DcpStorageReader):
    """Reads checkpoints that ``StorageWriter`` wrote: ``dcp.load(state, storage_reader=StorageReader(url))``.

    Args:
        url: of the run.
        step: which checkpoint; ``None``: the number at the end of DCP's ``checkpoint_id``, or the newest.
        threads: that read and verify at the same time.

    Raises (from ``dcp.load``, inside of DCP's ``CheckpointException``, by rank):
        InvalidError: there is no such checkpoint, or it was not written through DCP.
        CorruptError: it is damaged; names file and byte range. The state may be partly overwritten by then.
        UnavailableError: the storage is away.
    """

    def __init__(self, url: str, step: int | None = None, *, threads: int = 2) -> None:
        self._url, self._step, self._threads = url, step, threads
        self._parts: list[Part] = []
        self._catalog: Catalog | None = None
        self._storage: Storage | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self._parts, self._catalog = [], None
        if checkpoint_id is not None:
            self._step = wanted_step(checkpoint_id)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        try:
            return self._read_catalog().metadata()
        except ResilienceError as error:
            return _Unreadable(error)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        if isinstance(metadata, _Unreadable):
            raise metadata.error
        if self._catalog is None:
            self._read_catalog()

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        catalog = self._catalog
        assert catalog is not None  # since set_up_storage_reader
        wants: dict[str, _Want] = {}

        def want(name: str, box: Box, memory: _arrays.AnyArray) -> None:
            wants.setdefault(name, _Want()).add(box, memory)

        tensors = []
        for item in (item for item in plan.items if item.type is LoadItemType.TENSOR):
            target = planner.resolve_tensor(item)
            name = catalog.tensors[item.storage_index.fqn]
            direct = _memory(target, catalog.arrays[name].dtype)
            memory = _new(catalog.arrays[name].dtype, tuple(item.lengths)) if direct is None else direct
            want(name, _box(item), memory)
            tensors.append((item, target, memory if direct is None else None))
        values = [
            catalog.values[item.storage_index.fqn] for item in plan.items if item.type is LoadItemType.BYTE_IO
        ]
        arrays = {}
        for name in {name for value in values for _, name in leaves(value)}:
            array = catalog.arrays[name]
            arrays[name] = _new(array.dtype, array.shape)
            want(name, Box.whole(array.shape), arrays[name])
        self._fill(wants)
        for item, target, apart in tensors:
            if apart is not None:
                target.copy_(_arrays.build(apart, "torch"))
            planner.commit_tensor(item, target)
        for item in (item for item in plan.items if item.type is LoadItemType.BYTE_IO):
            made = io.BytesIO()
            torch.save(unflatten(catalog.values[item.storage_index.fqn], arrays), made)
            made.seek(0)
            planner.load_bytes(item, made)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return step_of(checkpoint_id) is not None

    def _read_catalog(self) -> Catalog:
        if self._storage is None:
            self._storage = open_storage(self._url)
        storage = self._storage
        state = fold(CommitLog(storage, new_id=lambda: "read-only").refresh())
        usable = [
            found
            for found in state.checkpoints
            if "shared" in found.tiers and (found.step, found.generation, "shared") not in state.quarantined
        ]
        chosen = next((found for found in usable if self._step in (None, found.step)), None)
        if chosen is None:
            raise InvalidError(
                f"{self._url} has no committed checkpoint{'' if self._step is None else f' of step {self._step}'}",
                operation="dcp",
                path=self._url,
                step=self._step,
                hint=f"steps there are: {', '.join(str(found.step) for found in usable) or 'none'}",
            )
        sources = [
            Source(part.rank, storage, part.name, part.sha256) for part in chosen.tiers["shared"].parts
        ]
        self._parts = [load_part(source) for source in sources]
        check_together(self._parts, step=chosen.step, generation=chosen.generation)
        self._catalog = Catalog.of(self._parts)
        return self._catalog

    def _fill(self, wants: dict[str, _Want]) -> None:
        """Read, verify and copy all chunks that hold something of what is wanted."""
        work = []
        there: dict[str, list[Box]] = {}
        for part in self._parts:
            for chunk in part.chunks:
                name = part.arrays[chunk.array].name
                if name in wants and any(box.meet(chunk.box) for box in wants[name].boxes):
                    there.setdefault(name, []).append(chunk.box)
                    work.append((part, chunk, wants[name]))
        for name, want in wants.items():
            for box in want.boxes:
                for hole in missing(box, there.get(name, ())):
                    raise CorruptError(
                        f"{name} lacks the box of shape {list(hole.shape)} at {list(hole.offset)}: it is in no pack",
                        operation="dcp",
                        path=self._parts[0].directory,
                        hint="load an older checkpoint; `resilience verify` lists the damaged ones",
                    )
        with ThreadPoolExecutor(self._threads, thread_name_prefix="dcp-load") as pool:
            for done in pool.map(lambda it: self._take(*it), work):
                assert done is None

    def _take(self, part: Part, chunk: PartChunk, want: _Want) -> None:
        storage = self._storage
        assert storage is not None
        array = part.arrays[chunk.array]
        block = read_range(
            storage, part.pack_of(chunk), chunk.offset, chunk.offset + chunk.length + CRC_BYTES
        )
        check_chunk(part, block, 0, chunk.length, chunk.offset, chunk.crc32c)
        shape = chunk.box_shape if array.grid is None else array.grid
        payload = np.frombuffer(block, _arrays.carrier(array.dtype), math.prod(shape)).reshape(shape)
        held = Box(chunk.box_offset, tuple(shape))  # with what fills up a chunk that the array ends in
        for box, view in zip(want.boxes, want.views, strict=True):
            common = box.meet(chunk.box)
            if common is not None:
                view[common.slices(box) or ...] = payload[common.slices(held) or ...]


def _box(item: ReadItem) -> Box:
    offset = item.storage_index.offset or (0,) * len(item.lengths)
    return Box(tuple(a + b for a, b in zip(offset, item.storage_offsets, strict=True)), tuple(item.lengths))


def _new(dtype: str, shape: Sequence[int]) -> _arrays.AnyArray:
    return np.empty(tuple(shape), _arrays.numpy_dtype(dtype))


def _carrier(memory: _arrays.AnyArray) -> np.dtype[Any]:
    return _arrays.carrier(str(memory.dtype))


def _memory(target: torch.Tensor, dtype: str) -> _arrays.AnyArray | None:
    """The memory of ``target``, where bytes of ``dtype`` can be copied straight to it."""
    if target.device.type != "cpu" or target.is_conj() or target.is_neg():
        return None
    return _arrays.raw(target) if _arrays.describe(target)[0] == dtype else None
