"""Models and optimizers under one parallelism, restored under another: real ranks under gloo, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from resilience.errors import InvalidError
from resilience.integrations.torch import State

Ranks = Callable[..., list[list[Any]]]


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "run-1")


def phases(url: str, saver: tuple[int, str], *loaders: tuple[int, str], **common: Any) -> list[Any]:
    world, layout = saver
    save = ("save", world, {"url": url, "layout": layout, **common})
    loads = [
        ("load", n, {"url": url, "layout": name, "saved": world, "stepped": number % 2 == 1, **common})
        for number, (n, name) in enumerate(loaders)
    ]
    return [save, *loads]


def check(results: list[list[Any]]) -> None:
    saved = results[0][0]
    assert len(saved) > 20
    for loaded in results:
        assert loaded == [saved] * len(loaded)


def test_fsdp_on_other_numbers_of_ranks_and_back(ranks: Ranks, url: str) -> None:
    four, three = f"{url}-4", f"{url}-3"
    one = phases(four, (4, "fsdp"), (3, "fsdp"), (4, "fsdp"), (1, "plain"), (2, "ddp"))
    other = phases(three, (3, "fsdp"), (4, "fsdp"), (4, "hsdp"))
    results = ranks("state", *one, *other)
    check(results[: len(one)])
    check(results[len(one) :])


def test_ddp_to_fsdp_and_meshes_of_two_dimensions(ranks: Ranks, url: str) -> None:
    first = phases(f"{url}-ddp", (2, "ddp"), (4, "fsdp"), (2, "compiled"), (4, "fsdp_tp"), (2, "tp"))
    second = phases(f"{url}-two", (4, "fsdp_tp"), (3, "fsdp"), (4, "fsdp_tp"), (2, "ddp"))
    third = phases(f"{url}-tp", (2, "tp"), (4, "hsdp"))
    results = ranks("state", *first, *second, *third)
    check(results[: len(first)])
    check(results[len(first) : len(first) + len(second)])
    check(results[len(first) + len(second) :])


def test_module_and_optimizer_tracked_each_for_itself(ranks: Ranks, url: str) -> None:
    """Without ``State``: DTensors in a state keyed by the parameters' numbers, an optimizer that has no state yet."""
    check(ranks("state", *phases(url, (4, "fsdp"), (3, "fsdp"), (2, "fsdp"), how="plain")))


def test_names_are_those_of_torch(ranks: Ranks) -> None:
    layouts = ("plain", "ddp", "compiled", "fsdp", "tp")
    results = ranks("state", *(("names", 2, {"layout": layout}) for layout in layouts))
    assert results == [[True, True]] * len(layouts)


def test_looking_at_it_calls_no_collective_and_steps_nothing(ranks: Ranks) -> None:
    layouts = ("fsdp", "ddp", "fsdp_tp")
    assert ranks("state", *(("silent", 2, {"layout": layout}) for layout in layouts)) == [[True] * 2] * 3


def test_copies_are_written_once(ranks: Ranks, url: str) -> None:
    """Hybrid sharding of 2 x 2: what the copies hold alike has one writer; only buffers and what no parallelism
    touches belong to each rank."""
    [written] = ranks("state", ("written", 4, {"url": url}))
    model = 2 * (5 + 5 + 8 * 5 + 8 + 5 * 8 + 5) + 5 + 1  # parameters that are trained
    frozen, parameters = 2 * 3, 2 * 6 + 2
    assert sum(rank["elements"] for rank in written) == 3 * model + frozen + parameters
    assert all(
        rank["own"] == [f"rank-{n}/train/model/blocks.{b}.seen" for b in range(2)]
        for n, rank in enumerate(written)
    )
    assert max(rank["elements"] for rank in written) < 2 * min(rank["elements"] for rank in written)


class TestOneProcess:
    """What needs no ranks."""

    def model(self) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))

    def test_round_trip(self) -> None:
        model = self.model()
        state = State(model, torch.optim.AdamW(model.parameters()))
        model(torch.ones(1, 2)).sum().backward()
        state.optimizers[0].step()
        other = self.model()
        fresh = State(other, torch.optim.AdamW(other.parameters()))
        fresh.load_state_dict(state.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
        ours, theirs = (it.state_dict()["optimizer"]["state"]["0.bias"] for it in (state, fresh))
        assert all(torch.equal(ours[key], theirs[key]) for key in ("step", "exp_avg", "exp_avg_sq"))

    def test_groups_are_matched_by_their_parameters(self) -> None:
        model = self.model()
        first = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[1].parameters(), "lr": 0.2}]
        saved = State(model, torch.optim.SGD(first)).state_dict()
        swapped = torch.optim.SGD(
            [{"params": model[1].parameters(), "lr": 1.0}, {"params": model[0].parameters(), "lr": 1.0}]
        )
        State(model, swapped).load_state_dict(saved)
        assert [group["lr"] for group in swapped.param_groups] == [0.2, 0.1]
        with pytest.raises(InvalidError, match="saved in 2 groups"):
            State(model, torch.optim.SGD(model.parameters())).load_state_dict(saved)

    def test_several_optimizers_are_one_state(self) -> None:
        model = self.model()
        both = [
            torch.optim.SGD(model[0].parameters(), lr=0.1),
            torch.optim.AdamW(model[1].parameters(), lr=0.2),
        ]
        saved = State(model, *both).state_dict()
        assert [group["params"] for group in saved["optimizer"]["param_groups"]] == [
            ["0.weight", "0.bias"],
            ["1.weight", "1.bias"],
        ]
        State(model, *reversed(both)).load_state_dict(saved)
        assert [optimizer.param_groups[0]["lr"] for optimizer in both] == [0.1, 0.2]

    def test_an_optimizer_of_another_model_is_refused(self) -> None:
        with pytest.raises(InvalidError, match="parameters that are not the model's"):
            State(self.model(), torch.optim.SGD(self.model().parameters()))

    def test_a_state_that_does_not_fit_changes_nothing(self) -> None:
        from resilience.checkpoint import fit

        model = self.model()
        state = State(model, torch.optim.AdamW(model.parameters()))
        saved = state.state_dict()
        saved["model"]["0.weight"] = torch.zeros(4, 2)
        saved["model"]["more"] = torch.zeros(1)
        before = model[1].weight.detach().clone()
        with pytest.raises(InvalidError, match=r"model/more.*model/0.weight"):
            fit.apply(state, saved, name="train")
        assert torch.equal(model[1].weight, before)
