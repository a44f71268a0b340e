"""``StorageReader``: ``dcp.load`` from our checkpoints, every byte of it verified.

Owns the choice of the checkpoint, the metadata that DCP's planners want, and reading what they ask for: each chunk
once, whatever sharding it was saved in and is wanted in. Must never hand a planner bytes that were stored as a pickle:
values are decoded, and pickled here for DCP, which takes them no other way.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader as DcpStorageReader
from torch.futures import Future

from resilience.checkpoint import arrays as _arrays
from resilience.checkpoint.box import Box
from resilience.checkpoint.coverage import Coverage, Want
from resilience.checkpoint.landing import Landing, fresh, landing
from resilience.checkpoint.part import Part
from resilience.checkpoint.reader import Job, Traffic, read
from resilience.checkpoint.source import Source, check_together, load_part
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
        self._parts: list[tuple[Source, Part]] = []
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
        wanted: dict[str, list[tuple[Box, Landing]]] = {}
        tensors = []
        for item in (item for item in plan.items if item.type is LoadItemType.TENSOR):
            target = planner.resolve_tensor(item)
            name = catalog.tensors[item.storage_index.fqn]
            dtype = catalog.arrays[name].dtype
            direct = landing(target) if _arrays.describe(target)[0] == dtype else None
            memory = direct or fresh(dtype, tuple(item.lengths))
            wanted.setdefault(name, []).append((_box(item), memory))
            tensors.append((item, target, memory if direct is None else None))
        values = [
            catalog.values[item.storage_index.fqn] for item in plan.items if item.type is LoadItemType.BYTE_IO
        ]
        arrays = {}
        for name in {name for value in values for _, name in leaves(value)}:
            memory = fresh(catalog.arrays[name].dtype, catalog.arrays[name].shape)
            wanted.setdefault(name, []).append((Box.whole(catalog.arrays[name].shape), memory))
            arrays[name] = memory.value
        self._fill(catalog, wanted)
        for item, target, apart in tensors:
            if apart is not None:  # DCP casts without a word
                target.copy_(_arrays.build(apart.value, "torch"))
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
        parts = [load_part(source) for source in sources]
        check_together(parts, step=chosen.step, generation=chosen.generation)
        self._parts = list(zip(sources, parts, strict=True))
        self._catalog = Catalog.of(parts)
        return self._catalog

    def _fill(self, catalog: Catalog, wanted: Mapping[str, Sequence[tuple[Box, Landing]]]) -> None:
        """Read, verify and copy what is wanted of each array."""
        wants, landings = [], {}
        for name, pieces in wanted.items():
            array, boxes = catalog.arrays[name], tuple(box for box, _ in pieces)
            wants.append(Want(name, array.dtype, array.shape, boxes))
            landings[name] = Landing(None, boxes, tuple(memory.views[0] for _, memory in pieces))
        coverage = Coverage(wants)
        jobs = [Job(source, part, takes) for source, part in self._parts if (takes := coverage.absorb(part))]
        for name, left in coverage.left.items():
            hole = left[0][1]
            raise CorruptError(
                f"{name} lacks the box of shape {list(hole.shape)} at {list(hole.offset)}: it is in no pack",
                operation="dcp",
                path=self._parts[0][1].directory,
                hint="load an older checkpoint; `resilience verify` lists the damaged ones",
            )
        read(jobs, landings, threads=self._threads, traffic=Traffic())


def _box(item: ReadItem) -> Box:
    offset = item.storage_index.offset or (0,) * len(item.lengths)
    return Box(tuple(a + b for a, b in zip(offset, item.storage_offsets, strict=True)), tuple(item.lengths))
