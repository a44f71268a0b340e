"""``StorageWriter``: ``dcp.save`` and ``dcp.async_save`` write packs, parts and a record in the commit log.

Owns the way of one save through DCP's calls: the coordinator wins a generation and names the step, every rank writes
the pack and the part of the items that DCP gave it, the coordinator checks that all is there and records it. What is
not recorded does not exist, so no crash leaves half a checkpoint. DCP's own collectives carry what the ranks tell each
other. Must never write what DCP pickled.
"""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter as DcpStorageWriter
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from resilience.checkpoint.arena import Arena
from resilience.checkpoint.pack import persist
from resilience.checkpoint.part import Part, directory, draft
from resilience.checkpoint.plan import plan as make_plan
from resilience.checkpoint.plan import specs
from resilience.checkpoint.restore import Source, check_together, load_part
from resilience.checkpoint.snapshot import snapshot
from resilience.checkpoint.zarr_view import zarr_metadata
from resilience.errors import CorruptError, InvalidError
from resilience.integrations.torch_dcp import Catalog, encode, paths, resolve, step_of, units, wanted_step
from resilience.journal.format_file import ensure_format, read_format
from resilience.journal.log import CommitLog
from resilience.journal.records import Kind
from resilience.journal.state import fold
from storage_backends import Storage, open_storage, probe

_SLOTS = 2


@dataclass(frozen=True)
class _Told:
    """What the coordinator tells a rank, beside DCP's plan. ``units``: item -> grid that all ranks' pieces keep to."""

    run: str
    step: int
    generation: int
    rank: int
    world_size: int
    units: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class _Wrote:
    """What a rank tells the coordinator."""

    step: int
    generation: int
    rank: int
    node: str
    part: str
    sha256: str
    size: int


class StorageWriter(DcpStorageWriter):
    """Checkpoints of torch.distributed.checkpoint in our format: verified, committed, readable by any Zarr reader.

    ``dcp.save(state, storage_writer=StorageWriter(url))``; one writer may serve any number of saves, and should: its
    memory (as large as what this rank writes, twice) is taken once. Each writer is a new generation of the run at
    ``url``: one that is still at work somewhere else is fenced off.

    Args:
        url: of the run, as ``resilience.open_checkpoint`` takes it; its last segment names a new run.
        step: of the next save; ``None``: the number at the end of DCP's ``checkpoint_id``, or one more than the newest.
        threads: that copy at the same time.

    Raises (from ``dcp.save``, inside of DCP's ``CheckpointException``, by rank):
        InvalidError: an item cannot be saved without pickle (named with its type), or the step exists already.
        FencedError: a newer writer is in charge of the run.
        UnavailableError, ExhaustedError: the storage is away, or full. No checkpoint is visible then.
    """

    def __init__(self, url: str, *, step: int | None = None, threads: int = 2) -> None:
        self._url, self._step, self._threads = url, step, threads
        self._storage: Storage | None = None
        self._log: CommitLog | None = None
        self._arena: Arena | None = None
        self._rank = 0

    def __getstate__(self) -> dict[str, Any]:
        """For DCP's saving in a process of its own: connections and memory stay here."""
        return {**self.__dict__, "_storage": None, "_log": None, "_arena": None}

    # DCP's calls, in their order.

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id is not None:
            self._step = wanted_step(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if not kwargs.get("use_collectives", True):
            raise InvalidError(
                "dcp.save(use_collectives=False) has no coordinator, who commits the checkpoint",
                operation="dcp",
                hint="leave use_collectives as it is",
            )

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        storage, log = self._in_charge()
        step = self._step
        if step is None:
            known = fold(log.refresh()).checkpoints
            step = known[0].step + 1 if known else 0
        grids = units(plans)
        return [
            replace(
                plan,
                storage_data=_Told(
                    read_format(storage).run,
                    step,
                    log.generation,
                    rank,
                    len(plans),
                    {item.index.fqn: grids[item.index.fqn] for item in plan.items if item.index.fqn in grids},
                ),
            )
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        told: _Told = plan.storage_data
        if self._step is not None:
            told = replace(told, step=self._step)  # DCP's cached plans bring what was told for an older save
        tensors, values = resolve(plan.items, planner, told.units)
        arrays, state = encode(tensors, values, paths(plan))
        layout = make_plan(specs(arrays, rank=told.rank), rank=told.rank, world_size=told.world_size)
        part = draft(layout, state, run=told.run, step=told.step, generation=told.generation)
        if self._arena is None or self._arena.slot_bytes < layout.size:
            if self._arena is not None:
                self._arena.close()
            self._arena = Arena.create(_SLOTS, layout.size)
        arena = self._arena
        slot = arena.acquire()
        assert slot is not None  # every slot is released below before the next save
        snapshot(
            arena, slot, arrays, layout, step=told.step, generation=told.generation, threads=self._threads
        )
        try:
            done = persist(arena.view(slot), part, self._open(), part.directory)
        finally:
            arena.release(slot)
        wrote = _Wrote(
            told.step,
            told.generation,
            told.rank,
            socket.gethostname(),
            done.part_name,
            done.sha256,
            done.size,
        )
        future: Future[list[WriteResult]] = Future()
        future.set_result([WriteResult(MetadataIndex(done.part_name), done.size, wrote)])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        storage, log = self._in_charge()
        wrote: list[_Wrote] = [result.storage_data for own in results for result in own]
        step = wrote[0].step
        if any((each.step, each.generation) != (step, log.generation) for each in wrote):
            raise InvalidError(
                f"ranks wrote {sorted({(each.step, each.generation) for each in wrote})} as (step, generation), "
                f"not all {(step, log.generation)}",
                operation="dcp",
                hint="with DefaultSavePlanner(enable_plan_caching=True) use one StorageWriter for all saves, and name "
                "each step (checkpoint_id='step-120')",
            )
        parts = [load_part(Source(each.rank, storage, each.part, each.sha256)) for each in wrote]
        check_together(parts, step=step, generation=log.generation)
        _check_whole(parts, metadata)
        where = directory(step, log.generation)
        for name, data in zarr_metadata(parts, url=f"{storage.url.rstrip('/')}/{where}").items():
            with storage.sink(f"{where}/{name}") as sink:
                sink.write(data)
        log.append(
            Kind.CHECKPOINT,
            {
                "step": step,
                "tier": "shared",
                "world_size": len(wrote),
                "parts": [
                    {"rank": each.rank, "node": each.node, "name": each.part, "sha256": each.sha256}
                    for each in wrote
                ],
                "size": sum(each.size for each in wrote),
            },
        )
        self._step = None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return step_of(checkpoint_id) is not None

    def _open(self) -> Storage:
        if self._storage is None:
            self._storage = open_storage(self._url)
        return self._storage

    def _in_charge(self) -> tuple[Storage, CommitLog]:
        """On the coordinator: the run is there, and this writer its newest generation."""
        storage = self._open()
        if self._log is None:
            try:
                run = read_format(storage).run
            except FileNotFoundError:
                run = storage.url.rstrip("/").rpartition("/")[2]
                probe(storage)
            ensure_format(storage, run=run, created=datetime.now(UTC).isoformat(timespec="seconds"))
            log = CommitLog(storage, new_id=lambda: uuid.uuid4().hex)
            log.fence(1, {"run": run, "supervisor": f"{socket.gethostname()}/{os.getpid()}"})
            self._log = log
        return storage, self._log


def _check_whole(parts: list[Part], metadata: Metadata) -> None:
    catalog = Catalog.of(parts)
    lost = set(metadata.state_dict_metadata) - set(catalog.tensors) - set(catalog.values)
    holes = catalog.holes(parts)
    if not lost and not holes:
        return
    what = [
        *sorted(lost),
        *(f"{name} in the box {list(box.offset)} + {list(box.shape)}" for name, box in holes.items()),
    ]
    raise CorruptError(
        f"the ranks have not written all of the checkpoint: {', '.join(what[:5])}{' and more' if what[5:] else ''}",
        operation="dcp",
        path=parts[0].directory,
        step=parts[0].step,
        generation=parts[0].generation,
        hint="save with all ranks of the process group; nothing was committed",
    )
