"""What the ranks of ``test_torch_sharding.py`` do."""

from __future__ import annotations

import itertools
import random
from typing import Any

import torch
import torch.distributed as dist
from rank import main
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from resilience.checkpoint.box import Box, missing
from resilience.integrations.torch_sharding import shard_of


def shards(examples: int, seed: int) -> int:
    """Random arrays on random meshes: what ``shard_of`` says is what lies in memory, and all of it is somewhere."""
    world, rank = dist.get_world_size(), dist.get_rank()
    draw = random.Random(seed)
    shapes = [shape for n in (1, 2, 3) for shape in itertools.product(range(1, 5), repeat=n)]
    meshes = {}
    for shape in (shape for shape in shapes if torch.Size(shape).numel() == world):
        for ranks in (list(range(world)), draw.sample(range(world), world)):
            meshes[(*shape, ranks == sorted(ranks))] = dist.device_mesh.DeviceMesh(
                "cpu", torch.tensor(ranks).reshape(shape)
            )
    said = []
    for _ in range(examples):
        drawn = draw.choice(sorted(meshes))
        mesh, in_order = meshes[drawn], drawn[-1]
        shape = [draw.choice((0, 1, 2, 3, 5, 7, 8, 12)) for _ in range(draw.randint(1, 3))]
        whole = torch.arange(torch.Size(shape).numel()).reshape(shape)
        placements = _placements(draw, mesh.ndim, len(shape))
        tensor = distribute_tensor(whole, mesh, placements, src_data_rank=None)
        shard = shard_of(tensor)
        views = shard.views(shard.local)
        for box, view in zip(shard.boxes, views, strict=True):
            assert torch.equal(view, whole[box.slices(Box.whole(shape))]), (shape, placements, box)
        assert sum(box.count for box in shard.boxes) == shard.local.numel(), (shape, placements)
        # torch itself gathers rightly only in meshes of ascending ranks, and only some strided shards.
        if in_order and not any(isinstance(placement, _StridedShard) for placement in placements):
            assert torch.equal(tensor.full_tensor(), whole), (shape, mesh, placements)
        size, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
        if len(shard.boxes) == 1:
            assert (shard.boxes[0].shape, shard.boxes[0].offset) == (size, offset), (shape, placements)
        said.append((shape, str(placements), shard.boxes, shard.holders, shard.unit))
    everybody: list[Any] = [None] * world
    dist.all_gather_object(everybody, said)
    irregular = 0
    for number, (shape, placements, boxes, holders, unit) in enumerate(said):
        others = [ranks[number] for ranks in everybody]
        assert rank in holders
        for other, (_, _, their_boxes, their_holders, their_unit) in enumerate(others):
            assert their_unit == unit
            if other in holders:
                assert (their_boxes, their_holders) == (boxes, holders)
            else:
                assert not any(a.meet(b) for a in boxes for b in their_boxes), (shape, placements)
            if unit is not None:
                for box in their_boxes:
                    sides = zip(box.offset, box.end, unit, shape, strict=True)
                    assert all(o % u == 0 and (e % u == 0 or e == n) for o, e, u, n in sides)
        assert not missing(Box.whole(shape), [box for _, _, theirs, _, _ in others for box in theirs])
        irregular += unit is None
    return irregular


def _placements(draw: random.Random, dims: int, axes: int) -> list[Placement]:
    found: list[Placement] = []
    for _ in range(dims):
        match draw.choice("RSSSX"):
            case "R":
                found.append(Replicate())
            case "S":
                found.append(Shard(draw.randrange(axes)))
            case _:
                found.append(_StridedShard(draw.randrange(axes), split_factor=draw.randint(1, 3)))
    return found


if __name__ == "__main__":
    main(globals())
