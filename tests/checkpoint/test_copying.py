"""Snapshots that are copied beside training: whatever the contract lets the user do meanwhile, the old step is kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resilience.checkpoint import fit
from resilience.checkpoint.arena import Arena, SlotKind
from resilience.checkpoint.arrays import raw
from resilience.checkpoint.plan import Plan, plan, specs
from resilience.checkpoint.snapshot import begin
from resilience.checkpoint.trained import Trained
from resilience.checkpoint.tree import flatten
from resilience.errors import InvalidError


class Training:
    """A model with everything that changes at different times: parameters and moments in an optimizer's step, running
    statistics in the forward pass, numbers whenever the user likes."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(200, 300), torch.nn.BatchNorm1d(300), torch.nn.Linear(300, 100)
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.numbers = {"seen": np.zeros(50_000), "count": 0}
        self.before = lambda: None
        self.trained = Trained(lambda: self.before())
        self.step()  # the optimizer has state only after its first step
        self.trained.since(self.objects)

    @property
    def objects(self) -> dict[str, Any]:
        return {"model": self.model, "opt": self.optimizer, "numbers": self.numbers}

    def forward(self) -> torch.Tensor:
        return self.model(torch.randn(8, 200)).square().mean()

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.forward().backward()
        self.optimizer.step()

    def flat(self) -> tuple[dict[str, Any], Plan]:
        arrays, _ = flatten({name: fit.capture(value) for name, value in self.objects.items()}, prefix="")
        return arrays, plan(specs(arrays), rank=0, world_size=1, chunk_bytes=64 << 10)


@pytest.fixture
def training() -> Training:
    return Training()


@pytest.fixture
def arena(training: Training) -> Iterator[Arena]:
    with Arena.create(2, training.flat()[1].size) as made:
        yield made


def held(arena: Arena, slot: int, layout: Plan) -> dict[str, bytes]:
    image = arena.view(slot)
    found: dict[str, bytes] = {}
    for chunk in layout.chunks:
        length = chunk.box.count * np.dtype(chunk.dtype).itemsize  # what follows in a last chunk is padding
        payload = bytes(image[chunk.offset : chunk.offset + length])
        found[chunk.key] = found.get(chunk.key, b"") + payload
    return found


def bytes_of(arrays: dict[str, Any]) -> dict[str, bytes]:
    return {key: np.ascontiguousarray(raw(array)).tobytes() for key, array in arrays.items()}


def test_what_only_a_step_changes_is_parameters_and_moments(training: Training) -> None:
    arrays, _ = training.flat()
    only = training.trained.only(arrays, training.objects)
    assert "model/0.weight" in only and "opt/state/0/exp_avg" in only
    assert not {"model/1.running_mean", "numbers/seen", "opt/state/0/step"} & only
    assert training.trained.only(arrays, {"model": training.model}) == frozenset(), "who knows what steps it"


@settings(max_examples=40)
@given(
    between=st.lists(st.sampled_from(["forward", "numbers", "zero_grad", "eval"]), max_size=4),
    threads=st.integers(1, 3),
    overlapped=st.booleans(),
)
def test_the_old_step_is_kept_whatever_happens_before_the_next(
    between: list[str], threads: int, overlapped: bool
) -> None:
    """Each thing that the contract allows is done as soon as it is allowed."""
    training = Training()
    arrays, layout = training.flat()
    with Arena.create(2, layout.size) as arena:
        wanted = bytes_of(arrays)
        slot = arena.acquire()
        assert slot is not None
        later = training.trained.only(arrays, training.objects) if overlapped else frozenset()
        copying = begin(arena, slot, arrays, layout, step=1, generation=1, later=later, threads=threads)
        joined: list[Any] = []
        training.before = lambda: joined or joined.append(copying.join())
        training.numbers["seen"] += 1
        training.numbers["count"] += 1
        for action in between:
            if action == "forward":
                training.forward().backward()
            elif action == "zero_grad":
                training.optimizer.zero_grad()
            elif action == "numbers":
                training.numbers["seen"] -= 3
            else:
                training.model.eval()
        assert arena.state(slot).kind is SlotKind.WRITING, "nothing counts before the seal"
        if not overlapped:
            joined.append(copying.join())
        training.step()
        assert len(joined) == 1, "the optimizer waited for the copy"
        training.step()
        assert arena.state(slot).kind is SlotKind.SEALED
        assert held(arena, slot, layout) == wanted
        assert bytes_of(training.flat()[0]) != wanted


def test_a_parameter_changed_elsewhere_is_seen_and_nothing_is_sealed(
    training: Training, arena: Arena
) -> None:
    arrays, layout = training.flat()
    slot = arena.acquire()
    assert slot is not None
    later = training.trained.only(arrays, training.objects)
    copying = begin(arena, slot, arrays, layout, step=1, generation=1, later=later)
    with torch.no_grad():
        training.model[0].weight.clamp_(-0.01, 0.01)
    with pytest.raises(InvalidError, match="changed while its snapshot was still being copied"):
        copying.join()
    assert arena.state(slot).kind is SlotKind.FREE


def test_an_error_at_the_beginning_leaves_the_slot_free(training: Training, arena: Arena) -> None:
    arrays, layout = training.flat()
    slot = arena.acquire()
    assert slot is not None

    def fail(attempt: int) -> None:
        raise KeyError("the agent is gone")

    with pytest.raises(KeyError):
        begin(arena, slot, arrays, layout, step=1, generation=1, later=frozenset(arrays), announce=fail)
    assert arena.state(slot).kind is SlotKind.FREE


def test_an_optimizer_is_asked_whether_it_stepped(training: Training) -> None:
    assert training.trained.since(training.objects) == []
    training.forward().backward()
    assert training.trained.since(training.objects) == [], "gradients are being accumulated"
    training.step()
    assert training.trained.since(training.objects) == ["opt/state"]
    assert training.trained.since(training.objects) == []


def test_only_parameters_with_a_gradient_were_trained(training: Training) -> None:
    """An optimizer that is stepped over a frozen part leaves that as it is."""
    training.optimizer.zero_grad()
    training.model[2](torch.ones(1, 300)).sum().backward()
    training.optimizer.step()
    assert training.trained.since(training.objects) == ["opt/state/4", "opt/state/5"]
    training.optimizer.zero_grad()
    training.optimizer.step()
    assert training.trained.since(training.objects) == []


def test_a_step_that_a_scaler_may_have_skipped_proves_nothing(training: Training) -> None:
    """A fused optimizer is stepped with a flag that lies on the device, and may have done nothing."""
    training.optimizer = torch.optim.AdamW(training.model.parameters(), fused=True)
    training.step()
    training.trained.since(training.objects)
    before = training.model[0].weight.detach().clone()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(training.forward() * float("inf")).backward()
    scaler.step(training.optimizer)
    scaler.update()
    assert torch.equal(training.model[0].weight, before), "it did nothing"
    assert training.trained.since(training.objects) == []
