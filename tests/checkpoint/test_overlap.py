"""Overlap is used where it hides more than it costs, and is given up elsewhere; from made-up times."""

from __future__ import annotations

import pytest

from resilience.checkpoint.overlap import Mode, Overlap


def run(overlap: Overlap, saves: int, *, slow: float, copy: float = 0.1, step: float = 0.5) -> list[Mode]:
    """Save after every second step; an overlapped copy makes its step slower by ``slow``."""
    modes = []
    for _ in range(saves):
        overlap = overlap.step(step)
        modes.append(overlap.mode)
        if overlap.mode is Mode.BLOCKING:
            overlap = overlap.blocked(copy)
        else:
            overlap = overlap.overlapped(0.0, step + slow)
    return modes


def test_overlap_that_hides_the_copy_stays() -> None:
    modes = run(Overlap(Mode.OVERLAPPED), 100, slow=0.02)
    assert modes[0] is Mode.BLOCKING, "the first save shows what there is to hide"
    assert set(modes[1:]) == {Mode.OVERLAPPED}


def test_overlap_that_costs_more_than_it_hides_is_given_up_and_tried_again_seldom() -> None:
    modes = run(Overlap(Mode.OVERLAPPED), 1000, slow=0.3)
    assert modes[1:5] == [Mode.OVERLAPPED] * 4
    assert modes[5] is Mode.BLOCKING
    assert modes.count(Mode.OVERLAPPED) < 4 + 1000 / 64 * 2 + 2
    assert Mode.OVERLAPPED in modes[100:], "circumstances change"


def test_it_comes_back_when_circumstances_change() -> None:
    overlap = Overlap(Mode.OVERLAPPED)
    for slow in (0.3, 0.0):
        for _ in range(200):
            overlap = overlap.step(0.5)
            if overlap.mode is Mode.BLOCKING:
                overlap = overlap.blocked(0.1)
            else:
                overlap = overlap.overlapped(0.0, 0.5 + slow)
    assert overlap.mode is Mode.OVERLAPPED


@pytest.mark.parametrize("slow", [0.0, 1.0])
def test_blocking_is_never_left(slow: float) -> None:
    assert set(run(Overlap(), 100, slow=slow)) == {Mode.BLOCKING}


def test_one_slow_step_decides_nothing() -> None:
    overlap = Overlap(Mode.OVERLAPPED).step(0.5).blocked(0.1)
    for slow in (0.0, 3.0, 0.0, 0.0, 0.0, 3.0, 0.0):
        overlap = overlap.overlapped(0.0, 0.5 + slow)
    assert overlap.mode is Mode.OVERLAPPED
