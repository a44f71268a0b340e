"""Wording of single values."""

from __future__ import annotations

import pytest

from resilience.history import format as wording


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0.0, "0.000 s"),
        (0.0421, "0.042 s"),
        (0.9996, "1.00 s"),
        (9.99, "9.99 s"),
        (9.999, "10.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (125, "2 min 05 s"),
        (3599.6, "1 h 00 min"),
        (90_000, "1 d 1 h"),
        (-0.5, "-0.500 s"),
    ],
)
def test_seconds(value: float | None, text: str) -> None:
    assert wording.seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0, "0 B"),
        (1023, "1023 B"),
        (4000, "3.9 KiB"),
        (1 << 30, "1.0 GiB"),
        (1 << 50, "1.0 PiB"),
    ],
)
def test_size(value: int | None, text: str) -> None:
    assert wording.size(value) == text


def test_blamed() -> None:
    assert wording.blamed({"rank": 2, "node": "a", "card": "a/0"}) == "rank 2 on a/0"
    assert wording.blamed({"rank": None, "node": "a", "card": None}) == "a"
    assert wording.blamed({"rank": 0}) == "rank 0"
    assert wording.blamed({}) == "unknown"


def test_count() -> None:
    assert [wording.count(n, "step") for n in (0, 1, 2)] == ["0 steps", "1 step", "2 steps"]


def test_a_pipe_is_wide_and_has_no_colours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    console = wording.console()
    assert console.width == 160
    console.print("x", style="red")
    assert capsys.readouterr().out == "x\n"
