"""Restoring in place: into the memory that is there, all or nothing, without a second copy of the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from resilience.checkpoint import fit
from resilience.checkpoint.restore import Checkpoint, Source, restore_into
from resilience.checkpoint.shard import Shard
from resilience.errors import InvalidError
from storage_backends import Storage

Save = Callable[..., list[Source]]


def model() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Linear(6, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 2).bfloat16()
    )


def fresh() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    made = model()
    return made, torch.optim.AdamW(made.parameters(), lr=0.1)


def trained(steps: int = 3) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(1)
    made, optimizer = fresh()
    for step in range(steps):
        optimizer.zero_grad()
        hidden = made[1](made[0](torch.arange(24.0).reshape(4, 6) + step))
        made[2](hidden.bfloat16()).float().pow(2).mean().backward()
        optimizer.step()
    return made, optimizer


def captured(objects: dict[str, Any]) -> dict[str, Any]:
    return {name: fit.capture(value) for name, value in objects.items()}


def into(sources: list[Source], objects: dict[str, Any]) -> dict[str, Any]:
    return restore_into(sources, objects, rank=0, world_size=1)


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def test_modules_are_filled_where_they_are(save: Save) -> None:
    source, _ = trained()
    target, _ = fresh()
    where = {key: (id(value), value.data_ptr()) for key, value in target.named_parameters()}
    buffers = {key: (id(value), value.data_ptr()) for key, value in target.named_buffers()}
    assert into(save([captured({"model": source})]), {"model": target}) == {"model": target}
    assert equal(dict(source.state_dict()), dict(target.state_dict()))
    assert where == {key: (id(value), value.data_ptr()) for key, value in target.named_parameters()}
    assert buffers == {key: (id(value), value.data_ptr()) for key, value in target.named_buffers()}


def test_an_optimizer_before_its_first_step_adopts_what_was_read(save: Save, monkeypatch: Any) -> None:
    """torch takes the tensors it is given: it makes no copy of them, and its next step gives the same bits."""
    source, optimizer = trained()
    made, other = fresh()
    given = {}
    load = torch.optim.Optimizer.load_state_dict

    def watched(self: Any, state: Any) -> None:
        given.update({(n, k): v.data_ptr() for n, s in state["state"].items() for k, v in s.items()})
        load(self, state)

    sources = save([captured({"model": source, "optimizer": optimizer})])
    monkeypatch.setattr(torch.optim.Optimizer, "load_state_dict", watched)
    into(sources, {"model": made, "optimizer": other})
    assert equal(optimizer.state_dict(), other.state_dict())
    adopted = {(n, k): v.data_ptr() for n, s in other.state_dict()["state"].items() for k, v in s.items()}
    assert adopted == given
    assert other.state[made[2].weight]["exp_avg"].dtype == torch.bfloat16


def test_an_optimizer_that_has_stepped_is_filled_where_it_is(save: Save) -> None:
    source, optimizer = trained(3)
    made, other = trained(1)
    before = {id(p): s["exp_avg"].data_ptr() for p, s in other.state.items()}
    into(save([captured({"optimizer": optimizer})]), {"optimizer": other})
    assert equal(optimizer.state_dict(), other.state_dict())
    assert before == {id(p): s["exp_avg"].data_ptr() for p, s in other.state.items()}
    assert made is not source


def test_what_decides_itself_how_to_load_is_given_memory_of_its_own(save: Save) -> None:
    """A hook that transposes would read and write the same memory."""

    class Turned(torch.nn.Linear):
        def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
            state[prefix + "weight"] = state[prefix + "weight"].t().contiguous().t() * 2
            super()._load_from_state_dict(state, prefix, *rest)

    class Loader:
        def __init__(self) -> None:
            self.seen = np.arange(4)
            self.given: Any = None

        def state_dict(self) -> dict[str, Any]:
            return {"seen": self.seen}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.given, self.seen = state["seen"], self.seen + state["seen"]

    source, target = torch.nn.Linear(3, 3), Turned(3, 3)
    loader = Loader()
    into(save([captured({"m": source, "l": Loader()})]), {"m": target, "l": loader})
    assert torch.equal(target.weight, source.weight * 2)
    assert loader.seen.tolist() == [0, 2, 4, 6]
    assert loader.given is not loader.seen


def test_hooks_of_the_users_see_the_saved_state(save: Save) -> None:
    source, target = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)

    def halve(module: Any, state: Any, prefix: str, *rest: Any) -> None:
        state[prefix + "weight"] = state[prefix + "weight"] / 2

    target.register_load_state_dict_pre_hook(halve)
    into(save([captured({"m": source})]), {"m": target})
    assert torch.equal(target.weight, source.weight / 2)


def test_extra_state_and_tied_weights(save: Save) -> None:
    class Extra(torch.nn.Linear):
        note = "new"

        def get_extra_state(self) -> Any:
            return {"note": self.note, "table": torch.full((2,), 3.0 if self.note == "old" else 0.0)}

        def set_extra_state(self, state: Any) -> None:
            self.note, self.table = state["note"], state["table"]

    def tied(made: torch.nn.Module) -> torch.nn.Module:
        made[1].weight = made[0].weight
        return made

    source = tied(torch.nn.Sequential(Extra(3, 3), Extra(3, 3)))
    source[0].note = source[1].note = "old"
    sources = save([captured({"m": source})])
    for target in (
        tied(torch.nn.Sequential(Extra(3, 3), Extra(3, 3))),
        torch.nn.Sequential(Extra(3, 3), Extra(3, 3)),
    ):
        into(sources, {"m": target})
        assert equal(source[0].weight, target[0].weight)
        assert equal(source[1].weight, target[1].weight)
        assert (target[0].note, target[1].table.tolist()) == ("old", [3.0, 3.0])


def test_two_saved_arrays_whose_place_is_now_one_end_as_loading_one_after_the_other_would(save: Save) -> None:
    shared = np.zeros(3)
    sources = save([{"t": {"a": np.ones(3), "b": np.full(3, 2.0)}}])
    into(sources, {"t": {"a": shared, "b": shared}})
    assert shared.tolist() == [2.0] * 3


def test_trees_of_every_kind_of_array(save: Save) -> None:
    frozen = np.zeros(3)
    frozen.flags.writeable = False
    swapped = np.zeros(3, ">f8")
    strided = np.zeros((4, 6))[::2, ::3]
    columns = torch.zeros(4, 3).t()
    tree = {
        "frozen": frozen,
        "swapped": swapped,
        "strided": strided,
        "columns": columns,
        "t": (np.zeros(2), 1),
    }
    inner = tree["t"][0]
    saved = {
        "frozen": np.arange(3.0),
        "swapped": np.arange(3.0),
        "strided": np.arange(4.0).reshape(2, 2),
        "columns": torch.arange(12.0).reshape(3, 4),
        "t": (np.ones(2), 5),
    }
    into(save([{"s": saved}]), {"s": tree})
    assert tree["frozen"].tolist() == [0, 1, 2]
    assert frozen.tolist() == [0, 0, 0]
    assert swapped.tolist() == [0, 1, 2]
    assert tree["swapped"] is swapped
    assert strided.tolist() == [[0, 1], [2, 3]]
    assert torch.equal(columns, saved["columns"])
    assert (inner.tolist(), tree["t"][1]) == ([1, 1], 5)
    assert tree["t"][0] is inner


def test_what_is_restored_may_stay_a_shard_of_an_array_that_never_changes(save: Save) -> None:
    jnp = pytest.importorskip("jax.numpy")
    whole = np.arange(12, dtype=np.float32).reshape(4, 3)
    state = {"w": Shard.at(jnp.zeros((2, 3)), shape=(4, 3), offset=(1, 0)), "v": jnp.zeros(2)}
    into(save([{"s": {"w": whole, "v": jnp.ones(2)}}]), {"s": state})
    assert type(state["w"].local) is type(jnp.zeros(2))
    assert np.array_equal(state["w"].local, whole[1:3])
    assert np.array_equal(state["v"], [1, 1])


def test_functional_state_is_rebuilt_and_the_old_one_left(save: Save) -> None:
    old = {"w": np.zeros(3), "n": 0}
    sources = save([{"functional": {"w": np.arange(3.0), "n": 4}}])
    new = Checkpoint(sources, rank=0, world_size=1).rebuild("functional", old)
    assert (new["w"].tolist(), new["n"]) == ([0, 1, 2], 4)
    assert (old["w"].tolist(), old["n"]) == ([0, 0, 0], 0)


def test_nothing_changes_before_all_objects_fit(save: Save) -> None:
    source, optimizer = trained()
    sources = save([captured({"model": source, "other": {"w": np.ones(3)}})])
    target, _ = fresh()
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(InvalidError, match=r"different \(1\): other/w: float64\[4\] here, float64\[3\]"):
        into(sources, {"model": target, "other": {"w": np.zeros(4)}})
    with pytest.raises(InvalidError, match="holds no 'optimizer'; it holds model, other"):
        into(sources, {"model": target, "optimizer": optimizer})
    assert equal(before, dict(target.state_dict()))


MEMORY = """
import json, sys
import torch
from resilience.checkpoint.restore import Source, restore_into
def peak():  # not ru_maxrss: that begins with the parent's
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))

source = Source.from_json(json.loads(sys.argv[1]))
model = torch.nn.Linear(4096, 4096, bias=False)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
optimizer.state[model.weight]["momentum_buffer"] = torch.ones(4096, 4096)
tree = {"w": torch.ones(8192, 4096)}
restore_into([source], {"warm": {"n": torch.zeros(3)}}, rank=0, world_size=1)  # buffers and modules of ours apart
before = peak()
restore_into([source], {"model": model, "optimizer": optimizer, "tree": tree}, rank=0, world_size=1)
after = peak()
assert tree["w"][-1, -1] == 7 and optimizer.state[model.weight]["momentum_buffer"][0, 0] == 3
print(after - before)
"""


def test_memory_beside_the_state_is_bounded(save: Save, storage: Storage, tmp_path: Path) -> None:
    """256 MiB come back; what the process grows by is its buffers, not another copy."""
    model = torch.nn.Linear(4096, 4096, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer.state[model.weight]["momentum_buffer"] = torch.full((4096, 4096), 3.0)
    objects = {"model": model, "optimizer": optimizer, "tree": {"w": torch.full((8192, 4096), 7.0)}}
    [source] = save([{**captured(objects), "warm": {"n": torch.zeros(3)}}], chunk_bytes=64 << 20)
    order = {"rank": 0, "storage": storage.url, "part": source.part, "sha256": source.sha256}
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, json.dumps(order)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 64 << 10, f"{int(done.stdout) >> 10} MiB"
