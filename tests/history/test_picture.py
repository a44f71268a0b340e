"""The loss curve with its incidents."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from resilience.errors import InvalidError
from resilience.history import History
from resilience.history.picture import drawing, picture, text


@pytest.fixture(scope="module")
def it(finished: str, build: ModuleType) -> History:
    return History(finished, now=build.T0 + 10)


def test_what_is_drawn(it: History, build: ModuleType) -> None:
    drawn = drawing(it)
    assert (drawn.run, drawn.name) == ("demo", "loss")
    assert drawn.curve == [(s, build.loss(s, 1 if s < 20 else 2)) for s in range(40)]
    (undone,) = drawn.undone
    assert undone[0] == (19, build.loss(19, 1))  # where it leaves the curve
    assert undone[1:] == [(s, build.loss(s, 1)) for s in range(20, 25)]
    assert drawn.incidents == [(25, 20, "signal rank 2")]
    assert drawn.checkpoints == [10, 20, 30, 40]


def test_the_png(it: History, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    target = tmp_path / "new" / "loss.png"
    assert picture(it, target) == target
    assert target.read_bytes().startswith(b"\x89PNG")
    assert target.stat().st_size > 10_000


def test_without_matplotlib(it: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert picture(it, tmp_path / "loss.png") is None
    assert list(tmp_path.iterdir()) == []


def test_the_text(it: History) -> None:
    drawn = text(it, width=60, height=10)
    rows = drawn.splitlines()
    assert rows[0].startswith("5.001 |*") and rows[0].endswith("!")
    assert rows[9].lstrip().startswith("1.102 |") and rows[9].endswith("*")
    assert rows[10].count("^") == 4
    assert "! step 25: signal rank 2" in drawn


def test_another_metric_and_an_unknown_one(it: History) -> None:
    assert {value for _step, value in drawing(it, metric="lr").curve} == {0.1}
    with pytest.raises(InvalidError) as error:
        drawing(it, metric="accuracy")
    assert "loss, lr" in str(error.value.hint)


def test_a_run_that_logged_nothing(tmp_path: Path, build: ModuleType) -> None:
    build.Builder(str(tmp_path), "r")
    with pytest.raises(InvalidError, match="logged no 'loss'"):
        text(History(str(tmp_path)))


def test_values_that_are_not_finite_are_gaps(tmp_path: Path, build: ModuleType) -> None:
    run = build.Builder(str(tmp_path), "r")
    run.start(0.0)
    run.fence(1.0, 1)
    run.ranks(1.0, done_at=2.0)
    run.tell(
        3.0,
        "metrics.logged",
        {"values": [{"step": 0, "loss": float("nan")}, {"step": 1, "loss": 1.0}]},
        rank=0,
    )
    run.seal()
    it = History(str(tmp_path))
    assert text(it).count("*") == 2  # one point, one in the legend
    assert picture(it, tmp_path / "p.png") == tmp_path / "p.png"


def test_the_curve_is_of_one_rank(tmp_path: Path, build: ModuleType) -> None:
    # Rank 0 was killed with its last value; rank 1 logged the loss of other samples.
    run = build.Builder(str(tmp_path), "r")
    run.start(0.0)
    run.fence(1.0, 1)
    run.ranks(1.0, done_at=2.0)
    run.tell(3.0, "metrics.logged", {"values": [{"step": 0, "loss": 1.0}]}, rank=0)
    run.tell(3.0, "metrics.logged", {"values": [{"step": 0, "loss": 9.0}, {"step": 1, "loss": 9.0}]}, rank=1)
    run.seal()
    it = History(str(tmp_path))
    assert drawing(it).curve == [(0, 1.0)]
    assert [(row["rank"], row["loss"]) for row in it.rows("metrics")] == [(0, 1.0), (1, 9.0)]
