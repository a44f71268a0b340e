"""What the ranks of ``test_torch_state.py`` do: save with our engine under one parallelism, restore under another."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from models import build, digest, digests, train
from rank import main
from torch.distributed.checkpoint.state_dict import get_state_dict

from resilience.checkpoint import fit
from resilience.checkpoint.arena import Arena
from resilience.checkpoint.pack import persist
from resilience.checkpoint.part import draft, sha256
from resilience.checkpoint.plan import plan
from resilience.checkpoint.restore import Source, restore_into
from resilience.checkpoint.snapshot import snapshot, specs_of
from resilience.checkpoint.tree import flatten
from resilience.integrations.torch import State
from storage_backends import open_storage


def save(url: str, layout: str, how: str = "state") -> dict[str, str]:
    """Train and save as a rank does; no collective in between but the one that lets all end together."""
    model, optimizer = build(layout, seed=1)
    train(model, optimizer)
    objects = _objects(how, model, optimizer)
    before = dist.get_world_size()
    arrays, skeleton = flatten({name: fit.capture(value) for name, value in objects.items()}, prefix="")
    rank, world = dist.get_rank(), dist.get_world_size()
    layout_ = plan(specs_of(arrays, objects, rank=rank), rank=rank, world_size=world)
    part = draft(layout_, skeleton, run="run", step=1, generation=1)
    with Arena.create(2, layout_.size) as arena:
        slot = arena.acquire()
        assert slot is not None
        snapshot(arena, slot, arrays, layout_, step=1, generation=1)
        persist(arena.view(slot), part, open_storage(url), part.directory)
        arena.persisted(slot)
    assert before == world
    return digests(model, optimizer)


def load(url: str, layout: str, saved: int, how: str = "state", stepped: bool = False) -> dict[str, str]:
    """Restore what ``saved`` ranks wrote into a model of another seed, whose optimizer has made a step or not."""
    model, optimizer = build(layout, seed=2)
    if stepped:
        train(model, optimizer, steps=1)
    storage = open_storage(url)
    names = [f"checkpoints/step-1-g1/rank-{rank}.json" for rank in range(saved)]
    sources = [Source(rank, storage, name, sha256(storage.read(name))) for rank, name in enumerate(names)]
    memory = {name: _address(value) for name, value in model.state_dict().items()}
    objects = _objects(how, model, optimizer)
    restore_into(sources, objects, rank=dist.get_rank(), world_size=dist.get_world_size())
    assert {name: _address(value) for name, value in model.state_dict().items()} == memory  # in place
    found = digests(model, optimizer)
    train(model, optimizer, steps=1)  # what was made for the optimizer is what it can go on with
    return found


def names(layout: str) -> bool:
    """Our names and values are those of torch's ``get_state_dict``."""
    model, optimizer = build(layout, seed=1)
    train(model, optimizer)
    own = State(model, optimizer).state_dict()
    theirs, inner = get_state_dict(model, optimizer)
    assert list(own["model"]) == list(theirs)
    assert all(digest(own["model"][name]) == digest(theirs[name]) for name in theirs)
    assert own["optimizer"]["param_groups"] == inner["param_groups"]
    assert set(own["optimizer"]["state"]) == set(inner["state"])
    for name, values in inner["state"].items():
        mine = own["optimizer"]["state"][name]
        assert set(mine) == set(values)
        for key, value in values.items():
            assert digest(getattr(mine[key], "local", mine[key])) == digest(value)
    return True


def silent(layout: str) -> bool:
    """Looking at a state calls no collective (they would hang: only rank 0 looks) and steps no optimizer."""
    model, optimizer = build(layout, seed=1)
    if dist.get_rank() == 0:
        state = State(model, optimizer)
        arrays, _ = flatten({"train": fit.capture(state)}, prefix="")
        specs_of(arrays, {"train": state}, rank=0)
        assert not optimizer.state
    train(model, optimizer)
    if dist.get_rank() == 0:
        flatten({"train": fit.capture(State(model, optimizer))}, prefix="")
    return True


def written(url: str) -> dict[str, Any]:
    """Who wrote how many bytes of which scope."""
    model, optimizer = build("hsdp", seed=1)
    train(model, optimizer)
    state = State(model, optimizer)
    arrays, _ = flatten({"train": fit.capture(state)}, prefix="")
    rank, world = dist.get_rank(), dist.get_world_size()
    layout = plan(specs_of(arrays, {"train": state}, rank=rank), rank=rank, world_size=world)
    return {
        "scopes": sorted({f"{spec.scope}" for spec in layout.arrays}),
        "elements": sum(chunk.box.count for chunk in layout.chunks if not chunk.array.startswith("rank-")),
        "own": sorted({chunk.array for chunk in layout.chunks if chunk.array.startswith("rank-")}),
    }


def _objects(how: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    if how == "plain":
        return {"model": model, "optimizer": optimizer}
    return {"train": State(model, optimizer)}


def _address(value: Any) -> Any:
    with torch.no_grad():
        return (value.to_local() if hasattr(value, "to_local") else value).data_ptr()


if __name__ == "__main__":
    main(globals())
