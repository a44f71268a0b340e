"""Tables of what happened, for people: lists of runs, and the report of one run.

Owns the choice and order of columns. Everything shown comes from the rows of ``History``; nothing is computed
here but totals of what is shown. Tables fit 80 columns; text of users is never taken for markup.
"""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from resilience.history.format import blamed, count, moment, number, percent, seconds, size

if TYPE_CHECKING:
    from resilience.history.query import History

Row = dict[str, Any]
_REASON = 80  # characters of why a generation ended; the incident has all of it
PHASES = ("detect", "decide", "fence", "start", "restore", "first_step")


def runs_table(rows: Sequence[Row]) -> RenderableType:
    """All runs, one a line."""
    table = _table(
        "run", "result", ">steps", ">gens", ">incidents", ">lost steps", ">ETTR", "last checkpoint"
    )
    for row in rows:
        last = "none"
        if row["checkpoint_step"] is not None:
            age = row["checkpoint_age_s"]
            last = f"step {row['checkpoint_step']} ({row['checkpoint_tier']}"
            last += f", {seconds(age)} ago)" if age is not None else ")"
        table.add_row(
            Text(row["run"]),
            Text(row["result"] or "not finished", style=_style(row["result"])),
            number(row["steps"]),
            number(row["generations"]),
            number(row["incidents"]),
            number(row["lost_steps"]),
            percent(row["ettr"]),
            last,
        )
    return table


def generations_table(rows: Sequence[Row]) -> RenderableType:
    """From where each generation began, how far it got, how much of it was kept."""
    table = _table(">gen", "started (UTC)", ">ranks", "from step", ">to step", ">kept", ">stall", "ended")
    for row in rows:
        origin = number(row["start_step"]) + (f" ({row['restore_tier']})" if row["restore_tier"] else "")
        table.add_row(
            str(row["generation"]),
            moment(row["started_at"] or row["fenced_at"])[5:],  # the headline of the run has the year
            number(row["world_size"]),
            origin,
            number(row["end_step"]),
            number(row["kept_steps"]),
            seconds(row["stall_s"]),
            Text(
                shorten(
                    row["reason"] or ("-" if row["started_at"] else "never started"),
                    _REASON,
                    placeholder=" ...",
                )
            ),
        )
    return table


def incidents_table(rows: Sequence[Row]) -> RenderableType:
    """Each incident: cause, blamed card, decision, the time each phase took, steps lost."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("incident", no_wrap=True)
    table.add_column("what happened", ratio=3)
    table.add_column("phases", ratio=2)
    table.add_column("lost", justify="right", no_wrap=True)
    for row in rows:
        confidence = row["confidence"]
        sure = f" (confidence {percent(confidence)})" if confidence is not None and confidence < 1 else ""
        story = Text(row["cause"] or "cause unknown", style="bold")
        story.append(f"\nblamed: {blamed(row)}{sure}", style="not bold")
        reason = f" ({row['reason']})" if row["reason"] else ""
        story.append(f"\ndecision: {row['decision'] or 'none yet'}{reason}", style="not bold")
        if row["step_restored"] is not None:
            came = f"({row['tier']})" if row["tier"] else "(from scratch)"
            story.append(
                f"\nback to step {row['step_restored']} {came} from {row['step_failed']}", style="not bold"
            )
        for signal in row["signals"] or ():
            story.append(f"\nalso: {signal}", style="not bold dim")
        table.add_row(
            f"{row['incident']}\n{row['state']}",
            story,
            Text(_phases(row)),
            "-" if row["lost_steps"] is None else count(row["lost_steps"], "step"),
            end_section=True,
        )
    return table


def checkpoints_table(rows: Sequence[Row]) -> RenderableType:
    """Each checkpoint in each tier: size, stall, time until durable."""
    table = _table(">step", ">gen", "tier", "state", ">size", ">stall", ">durable after", ">age")
    for row in rows:
        table.add_row(
            str(row["step"]),
            str(row["generation"]),
            row["tier"],
            Text(row["state"] + (f": {row['reason']}" if row["reason"] else "")),
            size(row["size"]),
            seconds(row["stall_s"]),
            seconds(row["durable_s"]),
            seconds(row["age_s"]),
        )
    return table


def totals_table(run: Row, lost: Sequence[Row]) -> RenderableType:
    """Wall, productive and lost time, MTTR, ETTR."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column()
    wall, ettr = run["wall_s"], run["ettr"]
    table.add_row("wall time", seconds(wall), "")
    productive = None if wall is None or ettr is None else wall * ettr
    table.add_row("productive", seconds(productive), f"ETTR {percent(ettr)}")
    for row in lost:
        if row["seconds"] > 0.0005:
            table.add_row(
                f"  {row['phase'].replace('_', ' ')}", seconds(row["seconds"]), percent(row["share"])
            )
    table.add_row(
        "MTTR",
        seconds(run["mttr_s"]),
        f"{count(run['incidents'], 'incident')}, {count(run['lost_steps'], 'step')} lost",
    )
    return table


def run_report(history: History, run: str | None = None) -> RenderableType:
    """The whole story of one run: what the demo ends with and ``resilience history RUN`` prints.

    Args:
        run: its name; may be left out when ``history`` holds one run only.
    """
    name = run or history.run or history.runs[0]["run"]

    def mine(view: str) -> list[Row]:
        return [row for row in history.rows(view) if row["run"] == name]

    row = mine("runs")[0]
    parts: list[RenderableType] = [_headline(row)]
    for title, view, table in (
        ("generations", "generations", generations_table),
        ("incidents", "incidents", incidents_table),
        ("checkpoints", "checkpoints", checkpoints_table),
    ):
        rows = mine(view)
        parts += [_title(title), table(rows) if rows else Text("  none")]
    failed = mine("failed_saves")
    if failed:
        parts += [_title("saves that did not become a checkpoint"), _failed(failed)]
    parts += [_title("where the time went"), totals_table(row, mine("lost_time"))]
    warnings = mine("warnings")
    if warnings:
        parts += [_title("warnings"), warnings_text(warnings)]
    return Group(*parts)


def warnings_text(rows: Sequence[Row]) -> Text:
    """What is torn or missing, one a line."""
    return Text("\n".join(f"  warning: {row['run']}: {row['message']}" for row in rows), style="yellow")


def rows_table(rows: Sequence[Row]) -> RenderableType:
    """Rows of any query as a table."""
    if not rows:
        return Text("no rows")
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in rows[0]:
        numeric = all(isinstance(row[name], int | float | None) for row in rows)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text("" if value is None else str(value)) for value in row.values()))
    return table


def _headline(row: Row) -> Text:
    text = Text(f"run {row['run']}: ", style="bold")
    text.append(row["result"] or "not finished", style=_style(row["result"]))
    text.append(
        f", {count(row['steps'], 'step')}, {count(row['generations'], 'generation')}", style="not bold"
    )
    if row["started_at"]:
        text.append(f"\nstarted {moment(row['started_at'])} UTC", style="not bold")
        text.append(
            f", ended {moment(row['finished_at'])} UTC" if row["finished_at"] else "", style="not bold"
        )
    if row["reason"]:
        text.append(f"\n{row['reason']}", style="not bold")
    if row["digest"]:
        text.append(f"\ndigest of the final state {row['digest']}", style="not bold dim")
    return text


def _phases(row: Row) -> str:
    known = [(phase, row[f"{phase}_s"]) for phase in PHASES if row[f"{phase}_s"] is not None]
    if row["recovery_s"] is None:
        return "not recovered"
    lines = [f"{phase.replace('_', ' '):<10} {seconds(value):>9}" for phase, value in known]
    return "\n".join([*lines, f"{'total':<10} {seconds(row['recovery_s']):>9}"])


def _failed(rows: Sequence[Row]) -> RenderableType:
    table = _table(">step", ">gen", ">rank", "tier", "outcome", "why")
    for row in rows:
        why = Text(row["reason"] or "-")
        table.add_row(
            number(row["step"]),
            number(row["generation"]),
            number(row["rank"]),
            row["tier"] or "-",
            row["outcome"],
            why,
        )
    return table


_WHOLE = ("run", "result", "started (UTC)")  # columns whose words are never cut: others make room


def _table(*columns: str) -> Table:
    """A table with a header; a name that begins with ``>`` is right-aligned."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in columns:
        justify: Any = "right" if name.startswith(">") else "left"
        table.add_column(name.lstrip(">"), justify=justify, no_wrap=name in _WHOLE)
    return table


def _title(text: str) -> Text:
    return Text(f"\n{text}", style="bold")


def _style(result: str | None) -> str:
    return {"finished": "green", "interrupted": "yellow", None: "cyan"}.get(result, "red")
