"""What the ranks of ``test_torch_dcp.py`` do."""

from __future__ import annotations

import contextlib
import json
import os
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from models import build, digests, train
from rank import main
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from resilience.integrations.torch import StorageReader, StorageWriter

EXTRA = {
    "step": 7,
    "rate": 0.1,
    "name": "run",
    "nothing": None,
    "shape": torch.Size((2, 3)),
    "pair": (1, torch.arange(3)),
    "list": [1, "two"],
    "wide": torch.arange(4, dtype=torch.bfloat16),
}


def save(url: str, layout: str, steps: list[int], how: str = "save") -> dict[str, str]:
    """Save after each of ``steps`` more steps of training, with one writer; the digests of the last."""
    model, optimizer = build(layout, seed=1)
    writer = StorageWriter(url)
    pending = None
    for step in steps:
        train(model, optimizer)
        state = _state(model, optimizer)
        if how == "async":
            pending = dcp.async_save(state, storage_writer=writer, checkpoint_id=f"step-{step}")
            pending.result()
        else:
            planner = dcp.DefaultSavePlanner(enable_plan_caching=how == "cached")
            dcp.save(state, storage_writer=writer, checkpoint_id=f"step-{step}", planner=planner)
    return digests(model, optimizer)


def load(url: str, layout: str, step: int | None = None) -> dict[str, Any]:
    """Load into a model of another seed: its digests then, and whether all values came back."""
    model, optimizer = build(layout, seed=2)
    state = _state(model, optimizer)
    state["extra"] = {key: torch.zeros_like(value) if key == "wide" else 0 for key, value in EXTRA.items()}
    try:
        dcp.load(state, storage_reader=StorageReader(url, step))
    except CheckpointException as error:
        return {
            str(rank): type(cause).__name__ + ": " + str(cause) for rank, (cause, _) in error.failures.items()
        }
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    got = state["extra"]
    assert got["pair"][0] == 1 and torch.equal(got["pair"][1], torch.arange(3)), got
    assert torch.equal(got["wide"], EXTRA["wide"])
    assert all(got[key] == EXTRA[key] for key in EXTRA if key not in ("pair", "wide")), got
    return digests(model, optimizer)


def crash(url: str, step: int) -> None:
    """The last rank is gone before it has written; the others end with the error that gloo tells them."""
    model, optimizer = build("fsdp", seed=3)
    train(model, optimizer)
    writer = StorageWriter(url)
    if dist.get_rank() == dist.get_world_size() - 1:
        writer.write_data = lambda plan, planner: _gone()  # type: ignore[method-assign]
    with contextlib.suppress(Exception):
        dcp.save(_state(model, optimizer), storage_writer=writer, checkpoint_id=f"step-{step}")
        print(json.dumps(["saved"]), flush=True)
        os._exit(0)
    _gone()


def _gone() -> None:
    print(json.dumps([None]), flush=True)
    os._exit(0)


def _state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    own, inner = get_state_dict(model, optimizer)
    return {"model": own, "optimizer": inner, "extra": dict(EXTRA)}


if __name__ == "__main__":
    main(globals())
