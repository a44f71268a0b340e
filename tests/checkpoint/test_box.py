"""Boxes: cutting, meeting, covering, against what NumPy says of the same slices."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from resilience.checkpoint.box import Box, cells, flat_boxes, missing

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def within(draw: st.DrawFn, shape: tuple[int, ...], *, empty: bool = False) -> Box:
    """A box in an array of ``shape``."""
    offset, size = [], []
    for n in shape:
        low = draw(st.integers(0, n if empty or not n else n - 1))
        offset.append(low)
        size.append(draw(st.integers(0 if empty else min(1, n - low), n - low)))
    return Box(tuple(offset), tuple(size))


def marked(shape: tuple[int, ...], *boxes: Box) -> np.ndarray[Any, Any]:
    """How often each element is in one of the boxes."""
    count = np.zeros(shape, int)
    for box in boxes:
        count[box.slices(Box.whole(shape)) or ...] += 1
    return count


@given(st.data(), shapes)
def test_meeting_and_leaving_out(data: st.DataObject, shape: tuple[int, ...]) -> None:
    a, b = (data.draw(within(shape, empty=True)) for _ in range(2))
    both = marked(shape, a) * marked(shape, b)
    common = a.meet(b)
    assert np.array_equal(both, marked(shape, *([common] if common and common.count else [])))
    assert np.array_equal(marked(shape, *a.without(b)), marked(shape, a) - both)
    assert len(a.without(b)) <= max(1, 2 * len(shape))


@given(st.data(), shapes)
def test_what_is_missing_and_what_is_there_are_all(data: st.DataObject, shape: tuple[int, ...]) -> None:
    boxes = data.draw(st.lists(within(shape, empty=True), max_size=5))
    wanted = data.draw(within(shape, empty=True))
    left = missing(wanted, boxes)
    there = np.minimum(marked(shape, *boxes), 1)
    assert np.array_equal(marked(shape, *left), marked(shape, wanted) * (1 - there))


@given(st.data(), st.lists(st.integers(1, 5), max_size=4).map(tuple))
def test_a_flat_range_is_its_boxes_in_order(data: st.DataObject, shape: tuple[int, ...]) -> None:
    count = math.prod(shape)
    start = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(start, count))
    boxes = flat_boxes(shape, start, stop)
    array = np.arange(count).reshape(shape)
    inside = [array[box.slices(Box.whole(shape)) or ...].reshape(-1) for box in boxes]
    assert np.array_equal(np.concatenate([np.zeros(0, int), *inside]), np.arange(start, stop))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


@given(st.data(), st.lists(st.integers(0, 6), max_size=3).map(tuple))
def test_cells_cut_a_box_along_the_grid(data: st.DataObject, shape: tuple[int, ...]) -> None:
    box = data.draw(within(shape, empty=True))
    grid = tuple(data.draw(st.integers(1, 4)) for _ in shape)
    found = list(cells(box, grid))
    assert np.array_equal(marked(shape, *found), marked(shape, box))
    for cell in found:
        assert all(o // g == (e - 1) // g for o, e, g in zip(cell.offset, cell.end, grid, strict=True))
    assert found == sorted(found)
