"""The report of a run, as text people read."""

from __future__ import annotations

import io
from types import ModuleType

import pytest
from rich.console import Console

from resilience.history import History
from resilience.history.report import rows_table, run_report, runs_table


def _text(renderable: object, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(renderable)
    return console.export_text()


@pytest.fixture(scope="module")
def it(finished: str, build: ModuleType) -> History:
    return History(finished, now=build.T0 + 10)


@pytest.mark.parametrize("width", [80, 160])
def test_the_report_says_all_that_an_incident_needs(it: History, width: int) -> None:
    text = _text(run_report(it), width)
    for wanted in (
        "run demo: finished, 40 steps, 2 generations",
        "rank 2 was killed by SIGKILL",
        "blamed: rank 2 on node-b/0",
        "decision: restart",
        "back to step 20 (nvme) from 25",
        "5 steps",
        "0.190 s",  # fence
        "1.00 s",  # recovery
        "its generation ended",  # the save that was abandoned
        "ETTR 52.0 %",
        "ab" * 32,
    ):
        assert wanted in text, wanted
    for phase in ("detect", "decide", "fence", "start", "restore", "first step"):
        assert phase in text


def test_no_line_is_wider_than_the_terminal(it: History) -> None:
    assert max(len(text) for text in _text(run_report(it), 80).splitlines()) <= 80


def test_an_unrecovered_incident_is_not_given_times(tmp_path: object, build: ModuleType) -> None:
    build.first_generation(str(tmp_path), "r")
    text = _text(run_report(History(str(tmp_path))))
    assert "not finished" in text and "not recovered" in text and "open" in text


def test_a_run_of_nothing(tmp_path: object, build: ModuleType) -> None:
    build.Builder(str(tmp_path), "r")
    it = History(str(tmp_path))
    assert "r" in _text(runs_table(it.runs))
    assert "none" in _text(run_report(it))


def test_the_list_of_runs(it: History) -> None:
    text = _text(runs_table(it.runs), 120)
    for wanted in ("demo", "finished", "40", "52.0 %", "step 40 (shared, 2.40 s ago)"):
        assert wanted in text, wanted


def test_text_of_users_is_no_markup() -> None:
    assert "[red]" in _text(rows_table([{"a": "[red]", "b": None, "c": 1}]))
    assert "no rows" in _text(rows_table([]))
