"""char_gpt: deterministic, resumable to the bit, and it learns."""

from __future__ import annotations

import time
from types import ModuleType
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="char_gpt needs the torch extra")

TINY = {"steps": 12, "batch": 2, "block": 32, "width": 32, "layers": 2}


def loader(char_gpt: ModuleType, *, rank: int = 0, world: int = 1, size: int = 1601, **options: Any) -> Any:
    text = char_gpt.read_text(size)
    return char_gpt.Loader(
        text, **{"block": 16, "batch": 5, "rank": rank, "world": world, "seed": 3, **options}
    )


def test_same_run_same_bits_and_resumed_run_same_bits(plain_launch: Any) -> None:
    # Four ranks: with two, gradients are summed in one possible order only, and DDP's change of its bucket
    # layout after the first step would not show.
    full, again, resumed, other = plain_launch(
        "char_gpt",
        4,
        [
            {"arguments": TINY, "keep_at": 5},
            {"arguments": TINY},
            {"arguments": TINY, "resume": 0},
            {"arguments": {**TINY, "seed": 1}},
        ],
    )
    assert again == full
    assert resumed["start"] == 5
    assert resumed["losses"] == full["losses"][5:]
    assert resumed["value"] == full["value"]
    assert other["value"]["sha256"] != full["value"]["sha256"]
    assert other["value"]["samples"] != full["value"]["samples"]


def test_it_learns(plain_launch: Any) -> None:
    (one,) = plain_launch("char_gpt", 1, [{"arguments": {"steps": 60, "layers": 2}}])
    assert 5.2 < one["losses"][0] < 5.8  # ln 256: it knows nothing
    assert sum(one["losses"][-10:]) / 10 < 4.0


def test_text_is_the_same_every_time_and_quick_to_read(char_gpt: ModuleType) -> None:
    began = time.perf_counter()
    text = char_gpt.read_text()
    assert time.perf_counter() - began < 1.0
    assert len(text) == 1_000_000
    assert torch.equal(text, char_gpt.read_text())
    assert b"import" in bytes(text.tolist())


def test_an_epoch_gives_every_sample_to_exactly_one_rank(char_gpt: ModuleType) -> None:
    loaders = [loader(char_gpt, rank=rank, world=4) for rank in range(4)]
    ids = []
    for _ in range(loaders[0].samples // 20):
        for one in loaders:
            one.next()
            ids += one.ids
    assert sorted(ids) == list(range(100))
    for one in loaders:
        one.next()
        assert all(100 <= i < 200 for i in one.ids)  # the next epoch, in another order


def test_inputs_and_targets_are_one_byte_apart(char_gpt: ModuleType) -> None:
    one = loader(char_gpt)
    x, y = one.next()
    assert x.shape == y.shape == (5, 16)
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert torch.equal(x[0], one.text[one.ids[0] * 16 : one.ids[0] * 16 + 16].long())


@pytest.mark.parametrize("before", [0, 1, 19, 20, 21, 45])
def test_loader_resumes_at_its_exact_place(char_gpt: ModuleType, before: int) -> None:
    whole, resumed = loader(char_gpt), loader(char_gpt)
    for _ in range(before):
        whole.next()
    resumed.load_state_dict(whole.state_dict())
    for _ in range(25):
        assert torch.equal(whole.next()[0], resumed.next()[0])
        assert whole.ids == resumed.ids
    assert whole.state_dict() == resumed.state_dict()


def test_seen_is_a_digest_of_the_multiset(char_gpt: ModuleType) -> None:
    one = loader(char_gpt, batch=20)
    four = [loader(char_gpt, rank=rank, world=4) for rank in range(4)]
    for _ in range(7):
        one.next()
        for each in four:
            each.next()
    assert sum(each.seen for each in four) % 2**256 == one.seen  # other order, other ranks, same samples
    one.next()
    assert sum(each.seen for each in four) % 2**256 != one.seen


def test_digest_covers_every_bit_of_model_and_optimizer(char_gpt: ModuleType) -> None:
    model = char_gpt.GPT(16, 16, 1, 2, 0.0)
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.zeros(1, 16, dtype=torch.long)
    model(x, x).backward()
    optimizer.step()
    before = char_gpt.digest(model, optimizer)
    assert char_gpt.digest(model, optimizer) == before
    tensors = [*model.state_dict().values(), *(t for s in optimizer.state.values() for t in s.values())]
    assert len(tensors) == len(list(model.parameters())) * 4  # the parameter, two moments, the step count
    for tensor in tensors:
        data = tensor.detach().reshape(-1).view(torch.uint8)
        data[-1] ^= 1
        assert char_gpt.digest(model, optimizer) != before
        data[-1] ^= 1
    assert char_gpt.digest(model, optimizer) == before
