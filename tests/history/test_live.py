"""The live view: what gets a line, when, and where."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from resilience.errors import InvalidError
from resilience.history.live import LiveView, line, lines
from resilience.history.panel import panel, spark

SNAPSHOT: dict[str, Any] = {
    "run": "demo",
    "phase": "running",
    "step": 10,
    "steps": 600,
    "loss": 2.5,
    "generation": 1,
    "checkpoint": {"step": 8, "tier": "shared", "age_s": 1.25},
    "cards": {"active": 4, "spare": 2, "failed": 0, "lost": 0},
    "recovering": None,
    "nodes": [{"name": "node-a", "cards": 2, "levels": ["rack"], "ranks": [0, 1]}],
    "incidents": 0,
    "elapsed_s": 12.0,
}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_one_line() -> None:
    assert line(SNAPSHOT) == (
        "[   12.0 s] running, generation 1, step 10 of 600, loss 2.5000, checkpoint 8 (shared, 1.25 s old), "
        "cards: 4 active 2 spare"
    )


def test_a_line_of_almost_nothing() -> None:
    assert line({"phase": "waiting"}) == "[        -] waiting, step -, no checkpoint yet"
    cards = {"needed": 4, "available": 1, "deadline_s": 300.0, "card": "GPU"}
    assert "waiting, 4 GPUs needed, 1 there, waits up to 300 s for more, " in line(
        {"phase": "waiting", "waiting": cards}
    )
    assert "1 card needed, 0 there, waits" in line(
        {"waiting": {**cards, "needed": 1, "available": 0, "card": None}}
    )


def test_lines_are_printed_on_change_and_at_most_once_a_second() -> None:
    out, clock = io.StringIO(), Clock()
    with LiveView("plain", stream=out, clock=clock) as view:
        for tick in range(30):  # 0.1 s apart: a step each
            clock.now = tick / 10
            view.update({**SNAPSHOT, "step": 10 + tick})
        printed = len(out.getvalue().splitlines())
        assert printed == 3  # at 0.0, 1.0 and 2.0
        clock.now = 60.0
        view.update({**SNAPSHOT, "step": 39, "checkpoint": {"step": 8, "tier": "shared", "age_s": 58.0}})
        clock.now = 90.0
        view.update({**SNAPSHOT, "step": 39, "checkpoint": {"step": 8, "tier": "shared", "age_s": 88.0}})
    # The last step had not been printed; growing ages are no news.
    assert [text.split("step ")[1].split(" ")[0] for text in out.getvalue().splitlines()] == [
        "10",
        "20",
        "30",
        "39",
    ]


def test_a_turn_is_told_at_once() -> None:
    out, clock = io.StringIO(), Clock()
    with LiveView("plain", stream=out, clock=clock) as view:
        view.update(SNAPSHOT)
        clock.now = 0.01
        view.update(
            {**SNAPSHOT, "phase": "fencing", "recovering": "rank 2 was killed: restart", "incidents": 1}
        )
        last = out.getvalue().splitlines()[-1]
    assert (
        "fencing" in last and "recovering from: rank 2 was killed: restart" in last and "1 incident" in last
    )


def test_the_end_is_always_told() -> None:
    out, clock = io.StringIO(), Clock()
    with LiveView("plain", stream=out, clock=clock) as view:
        view.update(SNAPSHOT)
        clock.now = 0.5
        view.update({**SNAPSHOT, "step": 11})
        assert "step 11" not in out.getvalue()  # too soon after the line before
    assert "step 11" in out.getvalue().splitlines()[-1]


def test_incidents_may_be_a_list() -> None:
    assert "2 incidents" in line({**SNAPSHOT, "incidents": [{"id": "1-1"}, {"id": "1-2"}]})


def test_json_lines_are_json_and_nothing_else() -> None:
    out, clock = io.StringIO(), Clock()
    with LiveView("json", stream=out, clock=clock) as view:
        view.update({**SNAPSHOT, "loss": float("nan")})
        clock.now = 5.0
        view.update({**SNAPSHOT, "step": 11})
    first, second = [json.loads(text) for text in out.getvalue().splitlines()]
    assert (first["loss"], second["step"], second["run"]) == (None, 11, "demo")


def test_json_goes_to_stdout_and_lines_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    for mode in ("json", "plain"):
        with LiveView(mode) as view:
            view.update(SNAPSHOT)
    out, err = capsys.readouterr()
    assert json.loads(out)["step"] == 10
    assert "step 10 of 600" in err


def test_none_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with LiveView("none") as view:
        view.update(SNAPSHOT)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_panel() -> None:
    out = Terminal()
    with LiveView("auto", stream=out) as view:
        view.update(SNAPSHOT)
        view.update({**SNAPSHOT, "step": 11})
    assert "step 11 of 600" in out.getvalue()
    assert "╭" in out.getvalue()


def test_without_a_terminal_auto_is_plain() -> None:
    out = io.StringIO()
    with LiveView("auto", stream=out) as view:
        view.update(SNAPSHOT)
    assert "╭" not in out.getvalue() and "\x1b" not in out.getvalue()


def test_an_error_inside_the_block_still_restores_the_terminal() -> None:
    out = Terminal()
    view = LiveView("auto", stream=out)
    with pytest.raises(ZeroDivisionError), view:
        view.update({**SNAPSHOT, "step": 1 / 0})
    assert out.getvalue().rstrip().endswith("\x1b[?25h")  # the cursor is shown again


def test_an_unknown_mode_says_which_there_are() -> None:
    with pytest.raises(InvalidError, match="auto, plain, json, none"):
        LiveView("fancy")


def test_the_panel_shows_what_a_silent_run_needs() -> None:
    console = Console(width=90, file=io.StringIO(), record=True)
    console.print(
        panel({**SNAPSHOT, "silent": True, "heard_s": 95.0, "recovering": "[bold]x", "warnings": 2})
    )
    text = console.export_text()
    for wanted in (
        "step 10 of 600",
        "4 active",
        "node-a",
        "ranks 0 1",
        "1 min 35 s ago",
        "[bold]x",
        "2 warnings",
    ):
        assert wanted in text, wanted


def test_lines_name_tiers_nodes_and_silence() -> None:
    tiers = {"nvme": {"tier": "nvme", "step": 9, "generation": 1, "age_s": 0.5}}
    text = lines({**SNAPSHOT, "checkpoints": tiers, "silent": True, "heard_s": None})
    assert "checkpoint in nvme: step 9, generation 1, 0.500 s old" in text
    assert "node node-a: up, 2 cards, ranks 0 1" in text
    assert "last heard of: never" in text


def test_spark() -> None:
    assert spark([1.0]) == ""
    assert spark([1.0, 8.0]) == "▁█"
    assert spark([1.0, float("nan"), 8.0]) == "▁ █"
    assert spark([2.0, 2.0]) == "▁▁"
