"""torch.distributed.checkpoint on our storage: real ranks under gloo, one parallelism to another, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from resilience.checkpoint.restore import Source
from resilience.checkpoint.store import open_checkpoint
from resilience.checkpoint.verify import verify
from resilience.errors import CorruptError, FencedError, InvalidError
from resilience.integrations.torch import StorageReader, StorageWriter
from resilience.journal.log import CommitLog
from resilience.journal.state import Checkpoint, fold
from storage_backends import open_storage

Ranks = Callable[..., list[Any]]


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "runs" / "run-1")


def checkpoints(url: str) -> tuple[Checkpoint, ...]:
    return fold(CommitLog(open_storage(url), new_id=lambda: "test").refresh()).checkpoints


def damage_of(url: str) -> list[CorruptError]:
    storage, newest = open_storage(url), checkpoints(url)[0]
    sources = [Source(part.rank, storage, part.name, part.sha256) for part in newest.tiers["shared"].parts]
    return list(verify(sources, step=newest.step, generation=newest.generation))


@pytest.mark.filterwarnings("ignore::UserWarning")
class TestOneProcess:
    """Without a process group: what is stored, and what is refused."""

    STATE = {"model": {"w": torch.arange(6.0).reshape(2, 3)}, "lr": 0.5, "odd": {"t": (1, np.arange(2))}}

    def fresh(self) -> dict[str, Any]:
        return {"model": {"w": torch.zeros(2, 3)}, "lr": 0.0, "odd": {"t": None}}

    def test_round_trip_without_pickle(self, url: str) -> None:
        dcp.save(self.STATE, storage_writer=StorageWriter(url, step=3))
        state = self.fresh()
        dcp.load(state, storage_reader=StorageReader(url))
        assert torch.equal(state["model"]["w"], self.STATE["model"]["w"])
        assert state["lr"] == 0.5
        assert state["odd"]["t"][0] == 1 and np.array_equal(state["odd"]["t"][1], np.arange(2))
        for file in (path for path in Path(url).rglob("*") if path.is_file()):
            assert b"PK\x03\x04" not in file.read_bytes()  # how torch.save begins

    def test_it_opens_like_any_other_checkpoint(self, url: str) -> None:
        dcp.save(self.STATE, storage_writer=StorageWriter(url, step=3))
        group = open_checkpoint(url, step=3)
        assert np.array_equal(group["model.w"][:], self.STATE["model"]["w"].numpy())
        assert not damage_of(url)

    def test_steps_are_counted_on_or_named(self, url: str) -> None:
        writer = StorageWriter(url)
        for checkpoint_id in (None, None, "out/step-40", None):
            dcp.save(self.STATE, storage_writer=writer, checkpoint_id=checkpoint_id)
        assert [found.step for found in checkpoints(url)] == [41, 40, 1, 0]
        with pytest.raises(CheckpointException, match="saved before"):
            dcp.save({"lr": 1}, storage_writer=writer, checkpoint_id="step-40")
        with pytest.raises(InvalidError, match="does not end in a number"):
            dcp.save(self.STATE, storage_writer=writer, checkpoint_id="best")

    def test_a_step_that_is_not_there_is_said(self, url: str) -> None:
        dcp.save(self.STATE, storage_writer=StorageWriter(url, step=3))
        with pytest.raises(CheckpointException) as caught:
            dcp.load(self.fresh(), storage_reader=StorageReader(url, 4))
        cause = caught.value.failures[0][0]
        assert isinstance(cause, InvalidError) and "steps there are: 3" in str(cause)
        with pytest.raises(InvalidError):
            _ = StorageReader(url, 4).read_metadata().state_dict_metadata

    def test_every_flipped_byte_of_the_payload_is_found(self, url: str) -> None:
        dcp.save(self.STATE, storage_writer=StorageWriter(url, step=3))
        pack = next(Path(url).rglob("rank-0.pack"))
        whole = pack.read_bytes()
        pack.chmod(0o644)
        at = whole.index(np.float32(5).tobytes())
        pack.write_bytes(whole[:at] + b"\x01" + whole[at + 1 :])
        with pytest.raises(CheckpointException) as caught:
            dcp.load(self.fresh(), storage_reader=StorageReader(url))
        cause = caught.value.failures[0][0]
        assert isinstance(cause, CorruptError) and "rank-0.pack" in str(cause)

    def test_a_damaged_part_is_an_error_of_ours(self, url: str) -> None:
        dcp.save(self.STATE, storage_writer=StorageWriter(url, step=3))
        part = next(Path(url).rglob("rank-0.json"))
        part.chmod(0o644)
        part.write_bytes(part.read_bytes().replace(b"float32", b"float16"))
        with pytest.raises(CheckpointException) as caught:
            dcp.load(self.fresh(), storage_reader=StorageReader(url))
        assert isinstance(caught.value.failures[0][0], CorruptError)

    def test_what_needs_pickle_is_refused_by_name_and_type(self, url: str) -> None:
        with pytest.raises(CheckpointException) as caught:
            dcp.save({"a": {"thing": {1, 2}}}, storage_writer=StorageWriter(url))
        cause = caught.value.failures[0][0]
        assert isinstance(cause, InvalidError) and "a.thing" in str(cause) and "set" in str(cause)
        assert not checkpoints(url)

    def test_a_planner_with_bytes_of_its_own_is_refused(self, url: str) -> None:
        class Planner(dcp.DefaultSavePlanner):
            def transform_object(self, write_item: Any, object: Any) -> Any:
                found = super().transform_object(write_item, object)
                return found if isinstance(found, torch.Tensor) else type(found)(b"own" + found.getvalue())

        with pytest.raises(CheckpointException, match="only that planner can read"):
            dcp.save(self.STATE, storage_writer=StorageWriter(url), planner=Planner())

    def test_a_planner_that_changes_tensors_only_is_served(self, url: str) -> None:
        class Planner(dcp.DefaultSavePlanner):
            def transform_object(self, write_item: Any, object: Any) -> Any:
                return super().transform_object(write_item, object)

        dcp.save(self.STATE, storage_writer=StorageWriter(url), planner=Planner())
        assert not damage_of(url)

    def test_loading_casts_as_dcp_does(self, url: str) -> None:
        dcp.save(self.STATE, storage_writer=StorageWriter(url))
        state = {"model": {"w": torch.zeros(2, 3, dtype=torch.bfloat16)}}
        dcp.load(state, storage_reader=StorageReader(url), planner=dcp.DefaultLoadPlanner())
        assert torch.equal(state["model"]["w"], self.STATE["model"]["w"].bfloat16())

    def test_a_writer_is_fenced_by_a_newer_one(self, url: str) -> None:
        old, new = StorageWriter(url), StorageWriter(url)
        dcp.save(self.STATE, storage_writer=old)
        dcp.save(self.STATE, storage_writer=new)
        with pytest.raises(CheckpointException) as caught:
            dcp.save(self.STATE, storage_writer=old)
        assert isinstance(caught.value.failures[0][0], FencedError)
        assert [found.step for found in checkpoints(url)] == [1, 0]

    def test_whole_checkpoints_can_be_read_without_knowing_them(self, url: str, tmp_path: Path) -> None:
        """torch's own conversion rebuilds the nested state from the metadata."""
        from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
        from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

        dcp.save(self.STATE, storage_writer=StorageWriter(url))
        state: dict[str, Any] = {}
        _load_state_dict(
            state, storage_reader=StorageReader(url), planner=_EmptyStateDictLoadPlanner(), no_dist=True
        )
        assert torch.equal(state["model"]["w"], self.STATE["model"]["w"])
        assert state["lr"] == 0.5

    def test_empty_and_scalar_tensors(self, url: str) -> None:
        state = {"none": torch.empty(0, 3), "one": torch.tensor(4.0), "half": torch.tensor(1.5).bfloat16()}
        dcp.save(state, storage_writer=StorageWriter(url))
        got = {key: torch.zeros_like(value) for key, value in state.items()}
        dcp.load(got, storage_reader=StorageReader(url))
        assert all(torch.equal(got[key], state[key]) for key in state)


def test_one_parallelism_to_another(ranks: Ranks, url: str) -> None:
    """Other numbers of ranks, one and two dimensions of a mesh, strided shards, parameters no parallelism touches."""
    first, second = f"{url}-fsdp", f"{url}-two"
    loads = [("load", 3, "fsdp"), ("load", 1, "plain"), ("load", 2, "ddp"), ("load", 4, "hsdp")]
    results = ranks(
        "dcp",
        ("save", 4, {"url": first, "layout": "fsdp", "steps": [10]}),
        *((case, world, {"url": first, "layout": layout}) for case, world, layout in loads),
        ("save", 4, {"url": second, "layout": "fsdp_tp", "steps": [10]}),
        *((case, world, {"url": second, "layout": layout}) for case, world, layout in loads),
    )
    for own in (results[:5], results[5:]):
        saved = own[0][0]
        assert len(saved) > 20
        assert [got == saved for loaded in own for got in loaded] == [True] * (4 + 3 + 1 + 2 + 4)
    assert not damage_of(first)
    assert not damage_of(second)


def test_several_saves_of_one_writer(ranks: Ranks, url: str) -> None:
    """Asynchronous ones, and with DCP's cached plans."""
    for how in ("async", "cached"):
        saved, loaded, older = ranks(
            "dcp",
            ("save", 2, {"url": f"{url}-{how}", "layout": "ddp", "steps": [10, 20, 30], "how": how}),
            ("load", 2, {"url": f"{url}-{how}", "layout": "fsdp"}),
            ("load", 1, {"url": f"{url}-{how}", "layout": "plain", "step": 20}),
        )
        assert [found.step for found in checkpoints(f"{url}-{how}")] == [30, 20, 10]
        assert loaded == saved
        assert older[0] != saved[0]


def test_a_crash_between_ranks_leaves_nothing_half_visible(ranks: Ranks, url: str) -> None:
    fsdp = {"url": url, "layout": "fsdp"}
    [saved] = ranks("dcp", ("save", 2, {**fsdp, "steps": [10]}))
    assert ranks("dcp", ("crash", 2, {"url": url, "step": 20})) == [[None, None]]
    left = {path.parent.name for path in Path(url).rglob("*.pack")}
    assert left == {"step-10-g1", "step-20-g2"}
    assert [found.step for found in checkpoints(url)] == [10]
    loaded, again, newest = ranks(
        "dcp", ("load", 2, fsdp), ("save", 2, {**fsdp, "steps": [20]}), ("load", 2, {**fsdp, "step": 20})
    )
    assert loaded == saved
    assert newest == again


def test_damage_is_told_by_the_rank_that_met_it(ranks: Ranks, url: str) -> None:
    fsdp = {"url": url, "layout": "fsdp"}
    ranks("dcp", ("save", 2, {**fsdp, "steps": [10]}))
    pack = next(Path(url).rglob("rank-1.pack"))
    pack.chmod(0o644)
    pack.write_bytes(pack.read_bytes()[:-4096])
    [told] = ranks("dcp", ("load", 2, fsdp))
    assert told[0] == told[1]
    assert "CorruptError" in told[0]["1"] and "rank-1.pack" in told[0]["1"]
