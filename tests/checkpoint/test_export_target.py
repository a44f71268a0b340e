"""Destinations: whole or not there, and filled with boxes in any order."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resilience.checkpoint import export_target
from resilience.checkpoint.box import Box
from resilience.checkpoint.export_target import Filled, Target
from resilience.errors import ExhaustedError, InvalidError


@st.composite
def cuts(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    shape = tuple(draw(st.lists(st.integers(1, 9), max_size=4)))
    boxes = [Box.whole(shape)]
    for _ in range(draw(st.integers(0, 6)) if shape else 0):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        axis = draw(st.integers(0, len(shape) - 1))
        at = draw(st.integers(0, box.shape[axis]))
        low = Box(box.offset, (*box.shape[:axis], at, *box.shape[axis + 1 :]))
        boxes += [each for each in (low, *box.without(low)) if each.count]
    return shape, draw(st.permutations(boxes))


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts(), st.sampled_from([1, 40, 1000]), st.sampled_from([4, 60, 4096]), st.integers(0, 9))
def test_a_file_filled_box_by_box_is_the_array(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    covering: tuple[tuple[int, ...], list[Box]],
    window: int,
    run: int,
    base: int,
) -> None:
    """Whatever way the boxes take: whole, row by row, or through a window."""
    shape, boxes = covering
    monkeypatch.setattr(export_target, "_WINDOW", window)
    monkeypatch.setattr(export_target, "_RUN_BYTES", run)
    values = np.random.default_rng(0).integers(1, 1 << 30, shape, np.int32)
    path = tmp_path / "file"
    path.unlink(missing_ok=True)
    with Filled(str(path), base + values.nbytes) as file:
        for box in boxes:
            file.fill(base, shape, box, values[box.slices(Box.whole(shape)) or ...])
    assert path.read_bytes() == bytes(base) + values.tobytes()


def never(directory: str) -> bool:
    return False


@pytest.mark.parametrize("single", [True, False])
def test_nothing_is_left_of_an_export_that_failed(tmp_path: Path, single: bool) -> None:

    def export() -> None:
        with Target(str(tmp_path / "out"), single=single, overwrite=False, ours=never) as target:
            with target.file("a/b", 100) as file:
                file.append(b"x")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        export()
    assert os.listdir(tmp_path) == []


def test_what_no_export_made_is_never_replaced(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("x")
    with pytest.raises(InvalidError, match="exists"):
        Target(str(mine), single=False, overwrite=False, ours=never)
    with pytest.raises(InvalidError, match="other things"):
        Target(str(mine), single=False, overwrite=True, ours=never)
    with pytest.raises(InvalidError, match="is not a file"):
        Target(str(mine), single=True, overwrite=True, ours=never)
    with pytest.raises(InvalidError, match="is a URL"):
        Target("s3://bucket/x", single=True, overwrite=True, ours=never)
    assert (mine / "thesis.txt").read_text() == "x"


@pytest.mark.parametrize("single", [True, False])
def test_a_destination_that_appears_meanwhile_is_not_replaced(tmp_path: Path, single: bool) -> None:
    out = tmp_path / "out"

    def export() -> None:
        with Target(str(out), single=single, overwrite=False, ours=never) as target:
            with target.file("a") as file:
                file.append(b"ours")
            out.write_text("theirs")

    with pytest.raises(InvalidError, match="exists"):
        export()
    assert out.read_text() == "theirs"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("single", [True, False])
def test_an_older_export_is_replaced_whole(tmp_path: Path, single: bool) -> None:
    for text in (b"old", b"new"):
        with (
            Target(str(tmp_path / "out"), single=single, overwrite=True, ours=lambda _: True) as target,
            target.file(text.decode()) as file,
        ):
            file.append(text)
    out = tmp_path / "out"
    assert (out if single else out / "new").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["out"]
    assert single or os.listdir(out) == ["new"]


def test_space_is_taken_first(tmp_path: Path) -> None:
    """A disk that is too small is known before anything is copied. Here: a file larger than any can be."""
    with (
        pytest.raises(ExhaustedError),
        Target(str(tmp_path / "out"), single=True, overwrite=False, ours=never) as target,
        target.file("", 1 << 62),
    ):
        raise AssertionError("nothing may be copied")
    assert os.listdir(tmp_path) == []
