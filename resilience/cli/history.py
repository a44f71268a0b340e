"""``resilience history``: all runs, one run's story, or any SQL over the journal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from resilience.cli.options import json_option, print_json, print_table, storage_option, warn

if TYPE_CHECKING:
    from resilience.history.query import History


@click.command("history")
@click.argument("run", required=False)
@storage_option
@json_option
@click.option(
    "--sql", metavar="SELECT", help="Rows of a DuckDB query over events and views (docs/history.md)."
)
@click.option(
    "--picture",
    metavar="FILE.png",
    help="Draw the loss curve with the incidents (as text without matplotlib).",
)
def history_command(
    run: str | None, storage: str, as_json: bool, sql: str | None, picture: str | None
) -> None:
    """List the runs in storage, or tell what happened in RUN.

    Reads storage only: no cluster has to be up.
    """
    if picture and not run:
        raise click.UsageError("--picture needs a RUN")
    if picture and (sql or as_json):
        raise click.UsageError("--picture cannot be combined with --sql or --json")
    from resilience.history.query import History

    with History(storage, run) as history:
        if sql:
            _sql(history, sql, as_json)
        elif picture:
            _picture(history, picture)
        elif as_json:
            print_json(history.to_json() if run else _overview(history))
        elif run:
            from resilience.history.report import run_report

            print_table(run_report(history, run))
        else:
            _list(history, storage)


def _sql(history: History, sql: str, as_json: bool) -> None:
    rows = history.sql(sql)
    if as_json:
        print_json(rows)
    else:
        from resilience.history.report import rows_table

        print_table(rows_table(rows))
    warn([row for row in history.warnings if row["warned_at"] is None])


def _overview(history: History) -> dict[str, Any]:
    return {
        "storage": history.url,
        "read_at": history.read_at,
        "runs": history.runs,
        "warnings": history.warnings,
    }


def _picture(history: History, path: str) -> None:
    from resilience.history.picture import picture, text

    written = picture(history, path)
    if written is None:
        click.echo(text(history))
        click.echo(
            "matplotlib is not installed: no PNG was written (pip install 'resilience[demo]')", err=True
        )
    else:
        click.echo(str(written))


def _list(history: History, storage: str) -> None:
    rows = history.runs
    if not rows:
        click.echo(f"no runs under {storage} (another place: --storage URL or RESILIENCE_STORAGE)")
        return
    from resilience.history.report import runs_table

    print_table(runs_table(rows))
    warn([row for row in history.warnings if row["warned_at"] is None])
