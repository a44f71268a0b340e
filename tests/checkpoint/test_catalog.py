"""The catalog: names, pieces and places of a checkpoint's arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from resilience.checkpoint.box import Box
from resilience.checkpoint.catalog import Entry, Piece, catalog, places
from resilience.checkpoint.part import Part
from resilience.checkpoint.plan import Scope
from resilience.checkpoint.restore import Source
from resilience.checkpoint.shard import Shard
from resilience.checkpoint.tree import flatten
from resilience.errors import CorruptError

Save = Callable[..., list[Source]]


def entry(shape: tuple[int, ...], boxes: list[Box], grid: tuple[int, ...] | None = None) -> Entry:
    pieces = tuple(Piece(0, "rank-0.pack", box, grid or box.shape, 0, 4, 0) for box in boxes)
    return Entry("w", "float32", shape, grid, Scope.SHARDED, None, pieces)


def test_the_grid_of_boxes_is_the_one_they_keep_to_and_rows_where_that_is_too_fine() -> None:
    halves = [Box((0, 0), (8, 3)), Box((0, 3), (8, 3))]
    assert entry((8, 6), halves).view_grid == (8, 3)
    uneven = [Box((0,), (4,)), Box((4,), (4,)), Box((8,), (1,))]  # as DTensor cuts 9 over 3
    assert entry((9,), uneven).view_grid == (4,)
    flat = [Box((0, 0), (1, 1)), Box((0, 1), (1, 999)), Box((1, 0), (999, 1000))]
    assert entry((1000, 1000), flat).view_grid == (250, 1000)  # of 1 MB
    assert entry((0, 3), []).view_grid == (1, 3)
    assert entry((), [Box((), ())]).view_grid == ()


def test_a_hole_is_found_on_a_grid_and_without_one() -> None:
    quarters = [Box((o,), (2,)) for o in (0, 2, 4)] + [Box((6,), (1,))]
    for grid in ((2,), None):
        assert entry((7,), quarters, grid).hole() is None
        assert entry((7,), quarters[:2] + quarters[3:], grid).hole() == Box((4,), (2,))
        # The same cell twice is no replacement for another.
        assert entry((7,), [*quarters[:3], quarters[0]], grid).hole() == Box((6,), (1,))
    with pytest.raises(CorruptError, match=r"w lacks the box of shape \[2\] at \[0\]"):
        entry((7,), quarters[1:], (2,)).need_whole()


def test_places_are_paths_as_torch_flattens() -> None:
    state = {
        "a": {1: np.zeros(1), "b": 2},
        "list": [1, 2, [3]],
        "mixed": [1, {"x": np.zeros(1)}],
        "tuple": (1, (2, 3)),
        "empty": {},
        2**60: None,
    }
    found = dict(places(flatten(state, prefix="")[1]))
    assert list(found) == [
        ("a", "1"),
        ("a", "b"),
        ("list",),
        ("mixed", 0),
        ("mixed", 1, "x"),
        ("tuple",),
        (str(2**60),),
    ]
    assert found["list",] == [1, 2, [3]]


def test_other_names_of_the_same_bytes_are_entries_too(save: Save, load: Callable[[Source], Part]) -> None:
    w = np.arange(6.0)
    (source,) = save([{"model": {"w": w, "tied": w}}])
    found = catalog([load(source)])
    assert {name: each.same_as for name, each in found.items()} == {
        "rank-0/model/w": None,
        "rank-0/model/tied": "rank-0/model/w",
    }
    assert found["rank-0/model/tied"].pieces == found["rank-0/model/w"].pieces


def test_pieces_of_links_name_their_file(save: Save, load: Callable[[Source], Part]) -> None:
    from resilience.checkpoint.part import Link

    (source,) = save([{"w": Shard.flat(np.arange(6.0), shape=(2, 3), start=0)}])
    part = load(source)
    name = "rank-0.from-step-5-g1.pack"
    linked = replace(
        part, links=(Link(name, 4096),), chunks=tuple(replace(chunk, pack=1) for chunk in part.chunks)
    )
    assert {piece.file for piece in catalog([part])["w"].pieces} == {"rank-0.pack"}
    assert {piece.file for piece in catalog([linked])["w"].pieces} == {name}
