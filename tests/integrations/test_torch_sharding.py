"""DTensors as shards: on random meshes and placements, against what torch itself puts into memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor
from torch.distributed.tensor import Shard as ShardPlacement

from resilience.checkpoint.box import Box
from resilience.checkpoint.shard import Shard
from resilience.checkpoint.tree import flatten
from resilience.errors import InvalidError
from resilience.integrations.torch_sharding import shard_of

EXAMPLES = int(os.environ.get("RESILIENCE_EXAMPLES", "200"))


@pytest.fixture(scope="module")
def mesh() -> Iterator[Any]:
    """A mesh of this process alone."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1, 1))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world", [3, 4])
def test_what_it_says_is_what_lies_in_memory(ranks: Callable[..., list[Any]], world: int) -> None:
    """Random shapes, meshes (ranks in any order) and placements: every view equals its box of the whole array; the
    boxes of all ranks cover it, disjoint but for those who are each other's holders; all keep to the unit."""
    [irregular] = ranks("sharding", ("shards", world, {"examples": EXAMPLES, "seed": world}))
    assert len(set(irregular)) == 1
    assert 0 < irregular[0] < EXAMPLES  # both arrays with a grid and without were met


def test_the_memory_is_the_tensors_own(mesh: Any) -> None:
    tensor = distribute_tensor(torch.arange(6.0).reshape(3, 2), mesh, [ShardPlacement(0), Replicate()])
    tensor.requires_grad_()
    arrays, skeleton = flatten({"w": tensor}, prefix="model")
    shard = arrays["model/w"]
    assert isinstance(shard, Shard)
    assert shard.local.data_ptr() == tensor.to_local().data_ptr()
    assert (shard.shape, shard.boxes, tuple(shard.holders or ())) == ((3, 2), (Box((0, 0), (3, 2)),), (0,))
    assert skeleton["v"] == [{"t": "array", "a": "torch", "n": "model/w"}]


def test_tied_dtensors_are_saved_once(mesh: Any) -> None:
    tensor = distribute_tensor(torch.ones(4), mesh, [ShardPlacement(0), Replicate()])
    arrays, _ = flatten({"a": tensor, "b": tensor}, prefix="")
    assert list(arrays) == ["a"]


def test_summands_are_refused_by_name(mesh: Any) -> None:
    tensor = DTensor.from_local(torch.ones(2), mesh, [Partial(), Replicate()], run_check=False)
    with pytest.raises(InvalidError, match=r"grads/w.*Partial.*summand"):
        flatten({"w": tensor}, prefix="grads")
    with pytest.raises(InvalidError, match="Partial"):
        shard_of(tensor)


def test_memory_that_does_not_fit_its_placements_is_refused(mesh: Any) -> None:
    local = torch.ones(2, 2)
    tensor = DTensor.from_local(
        local,
        mesh,
        [ShardPlacement(0), Replicate()],
        run_check=False,
        shape=torch.Size((5, 2)),
        stride=(2, 1),
    )
    with pytest.raises(InvalidError, match=r"holds \[2, 2\] here, where its placements say \[5, 2\]"):
        flatten({"w": tensor}, prefix="")


def test_side_by_side_boxes_are_views() -> None:
    """A strided shard along the second axis: two boxes in one memory."""
    whole = np.arange(24).reshape(3, 8)
    local = np.ascontiguousarray(whole[:, [0, 1, 4, 5]])
    shard = Shard(local, (3, 8), (Box((0, 0), (3, 2)), Box((0, 4), (3, 2))))
    for box, view in zip(shard.boxes, shard.views(local), strict=True):
        assert np.array_equal(view, whole[box.slices(Box.whole((3, 8)))])
        assert np.shares_memory(view, local)
