"""numpy_sgd: the smallest use, as a program would call it."""

from __future__ import annotations

from types import ModuleType


def test_it_learns_in_this_process(numpy_sgd: ModuleType) -> None:
    assert numpy_sgd.train.local(steps=0)["accuracy"] < 0.7
    assert numpy_sgd.train.local(steps=200)["accuracy"] > 0.97
