"""State goes back into what it came from, in place; what does not fit is refused before anything changes."""

from __future__ import annotations

import collections
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch

from resilience.checkpoint import arrays as dt
from resilience.checkpoint import fit
from resilience.checkpoint.tree import flatten, unflatten
from resilience.errors import InvalidError

State = collections.namedtuple("State", "count mu")


def through_storage(state: Any) -> Any:
    """A copy as restoring gives it."""
    arrays, skeleton = flatten(state, prefix="s")
    stored = {
        name: np.array(dt.raw(array))
        .view(dt.numpy_dtype(dt.describe(array)[0]))
        .reshape(dt.describe(array)[1])
        for name, array in arrays.items()
    }
    return unflatten(skeleton, stored)


def trained(steps: int = 3) -> tuple[torch.nn.Module, torch.optim.Optimizer, Any]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.arange(20.0).reshape(5, 4) + step).pow(2).mean().backward()
        optimizer.step()
        scheduler.step()
    return model, optimizer, scheduler


def test_module_optimizer_and_scheduler_go_on_bit_identically() -> None:
    """Restored into fresh objects, the next step gives the same bits."""
    source = trained()
    saved = [through_storage(fit.capture(value)) for value in source]
    fresh = trained(0)
    parameters = list(fresh[0].parameters())
    for value, state in zip(fresh, saved, strict=True):
        assert fit.apply(value, state, name="x") is value
    assert all(a is b for a, b in zip(parameters, fresh[0].parameters(), strict=True))  # in place
    for model, optimizer, scheduler in (source, fresh):
        optimizer.zero_grad()
        model(torch.ones(5, 4).cumsum(0)).pow(2).mean().backward()
        optimizer.step()
        scheduler.step()
    for a, b in zip(source[0].state_dict().values(), fresh[0].state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert source[2].state_dict() == fresh[2].state_dict()


def test_a_module_that_differs_is_refused_whole() -> None:
    state = through_storage(fit.capture(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 1))))
    other = torch.nn.Sequential(
        torch.nn.Linear(4, 5), torch.nn.Linear(5, 1, bias=False), torch.nn.Linear(1, 1)
    )
    before = [parameter.clone() for parameter in other.parameters()]
    with pytest.raises(InvalidError) as caught:
        fit.apply(other, state, name="model")
    text = str(caught.value)
    assert "missing (2): model/2.weight; model/2.bias" in text
    assert "unexpected (1): model/1.bias" in text
    assert "model/0.weight: float32[5, 4] here, float32[3, 4] in the checkpoint" in text
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))


def test_data_types_are_compared_too() -> None:
    state = through_storage(fit.capture(torch.nn.Linear(2, 2).bfloat16()))
    with pytest.raises(InvalidError, match=r"float32\[2, 2\] here, bfloat16\[2, 2\]"):
        fit.apply(torch.nn.Linear(2, 2), state, name="model")


def test_long_lists_are_cut() -> None:
    with pytest.raises(InvalidError) as caught:
        fit.apply({}, {f"k{n:03}": np.zeros(1) for n in range(100)}, name="big")
    assert "unexpected (100): big/k000" in str(caught.value)
    assert "and 80 more" in str(caught.value)
    assert "k020" not in str(caught.value)


def test_optimizers_are_compared_by_groups_and_shapes() -> None:
    """An optimizer before its first step has no state yet: that is no misfit. Another model is one."""
    _, optimizer, _ = trained()
    state = through_storage(fit.capture(optimizer))
    fit.apply(trained(0)[1], state, name="opt")
    few = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])
    with pytest.raises(InvalidError, match=r"groups of \[1\] here, of \[6\]"):
        fit.apply(few, state, name="opt")
    shapes = [torch.nn.Parameter(torch.zeros(2)) for _ in range(6)]
    with pytest.raises(InvalidError, match=r"opt/state/0/exp_avg: \[2\] here, \[3, 4\]"):
        fit.apply(torch.optim.AdamW(shapes), state, name="opt")
    with pytest.raises(InvalidError, match="something else"):
        fit.apply(trained(0)[1], {"a": 1}, name="opt")


def test_pytrees_are_restored_in_place() -> None:
    array, tensor = np.zeros(3), torch.zeros(2, dtype=torch.bfloat16)
    inner = [array, {"t": tensor}]
    tree: dict[Any, Any] = {"list": inner, 1: 0, "state": State(0, np.zeros(2)), "o": OrderedDict(a=1.0)}
    new: dict[Any, Any] = {
        "list": [np.arange(3.0), {"t": torch.ones(2, dtype=torch.bfloat16)}],
        1: 5,
        "state": State(4, np.ones(2)),
        "o": OrderedDict(a=2.0),
    }
    assert fit.apply(tree, through_storage(new), name="tree") is tree
    assert tree["list"] is inner
    assert array.tolist() == [0, 1, 2]
    assert tensor.tolist() == [1, 1]
    assert tree[1] == 5
    assert isinstance(tree["state"], State)
    assert tree["state"].count == 4
    assert tree["state"].mu.tolist() == [1, 1]
    assert tree["o"] == {"a": 2.0}


def test_read_only_arrays_are_replaced() -> None:
    fixed = np.zeros(2)
    fixed.flags.writeable = False
    tree = {"a": fixed}
    fit.apply(tree, {"a": np.ones(2)}, name="t")
    assert tree["a"].tolist() == [1, 1]
    assert fixed.tolist() == [0, 0]


def test_rebuild_leaves_the_old_tree_alone() -> None:
    tree = {"p": (np.zeros(2), State(1, np.zeros(1)))}
    new = fit.rebuild(tree, through_storage({"p": (np.ones(2), State(2, np.ones(1)))}), name="t")
    assert new["p"][0].tolist() == [1, 1]
    assert isinstance(new["p"][1], State)
    assert tree["p"][0].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("tree", "state", "message"),
    [
        ({"a": [1, 2]}, {"a": [1]}, "t/a: list of 2 here, list of 1"),
        ({"a": {"b": 1}}, {"a": 3}, "t/a: a dict here, int"),
        ({"a": np.zeros(2)}, {"a": 3}, "t/a: an array here, int"),
        ({"a": 3}, {"a": np.zeros(2)}, "t/a: int here, ndarray"),
        ({"a": 3}, {"a": [1]}, "t/a: int here, list"),
    ],
)
def test_trees_of_another_structure_are_refused(tree: Any, state: Any, message: str) -> None:
    with pytest.raises(InvalidError, match=message):
        fit.apply(tree, state, name="t")


class Loader:
    """Anything with the two methods."""

    def __init__(self) -> None:
        self.position = 0

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def test_objects_inside_trees_are_walked() -> None:
    loaders = {"train": [Loader()], "eval": (Loader(),)}
    loaders["train"][0].position = 5
    state = through_storage(fit.capture(loaders))
    assert state == {"train": [{"position": 5}], "eval": ({"position": 0},)}
    fresh = {"train": [Loader()], "eval": (Loader(),)}
    fit.apply(fresh, state, name="loaders")
    assert fresh["train"][0].position == 5


def test_check_names_what_cannot_be_saved() -> None:
    with pytest.raises(InvalidError, match="cannot save bad/x: type object"):
        fit.check({"x": object()}, name="bad")
    fit.check(trained(0)[0], name="model")
