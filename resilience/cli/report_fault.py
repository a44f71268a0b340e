"""``resilience report-fault``: tell the runs that are going that a card is bad."""

from __future__ import annotations

import click

from resilience.cli.options import json_option, print_json


@click.command("report-fault", epilog="Codes and what they ask for: docs/cards.md.")
@click.option("--card", required=True, metavar="NODE/INDEX", help="The card, as resilience status names it.")
@click.option("--code", required=True, help="XID, Ascend code, a name of docs/cards.md, or your own.")
@click.option("--run", metavar="RUN", help="Only this run.  [default: every run that has the card]")
@click.option("--storage", metavar="URL", help="Only runs that are kept there.")
@click.option("--detail", default="", metavar="TEXT", help="A sentence for the journal.")
@click.option("--action", help="What to do, whatever the code asks for: watch, restart, drain, reset, ...")
@click.option("--source", default="a report", metavar="NAME", help="Who reports, for the journal.")
@json_option
def report_fault_command(
    card: str,
    code: str,
    run: str | None,
    storage: str | None,
    detail: str,
    action: str | None,
    source: str,
    as_json: bool,
) -> None:
    """Report a fault of a card to the runs that have it, on the Ray cluster of RAY_ADDRESS or of this machine.

    What follows is what the code asks for; a code that nobody knows is written down and watched.
    """
    from resilience.runtime.report import report_fault

    taken = report_fault(card, code, run=run, storage=storage, detail=detail, action=action, source=source)
    if as_json:
        print_json({"card": card, "code": code, "runs": taken})
    else:
        click.echo(f"reported {code} of card {card} to {', '.join(taken)}")
