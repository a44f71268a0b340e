"""``resilience status``: where a run is now, read from storage."""

from __future__ import annotations

import sys
import time
from typing import Any

import click

from resilience.cli.options import json_option, print_json, print_table, storage_option

_EVERY_S = 1.0  # the supervisor seals its journal about as often
_LOAD_FACTOR = 4  # a long journal is read at most a fifth of the time


@click.command("status")
@click.argument("run")
@storage_option
@json_option
@click.option("--watch", is_flag=True, help="Go on until the run ends; with --json, one object a line.")
def status_command(run: str, storage: str, as_json: bool, watch: bool) -> None:
    """Show phase, step, loss, newest checkpoint of each tier, open incident, nodes and cards of RUN."""
    if watch:
        _watch(run, storage, as_json)
        return
    snapshot = _read(run, storage)
    if as_json:
        print_json(snapshot)
    elif sys.stdout.isatty():
        from resilience.history.panel import panel

        print_table(panel(snapshot))
    else:
        from resilience.history.live import lines

        click.echo(lines(snapshot))


def _read(run: str, storage: str) -> dict[str, Any]:
    from resilience.history.query import History
    from resilience.history.status import status

    with History(storage, run) as history:
        return status(history, run)


def _watch(run: str, storage: str, as_json: bool) -> None:
    from resilience.history.live import LiveView

    with LiveView("json" if as_json else "auto", stream=sys.stdout) as view:
        try:
            while True:
                began = time.monotonic()
                snapshot = _read(run, storage)
                view.update(snapshot)
                if snapshot["phase"] == "done":
                    return
                spent = time.monotonic() - began
                time.sleep(max(_EVERY_S, _LOAD_FACTOR * spent))
        except KeyboardInterrupt:
            return  # how one stops watching; the run itself is not touched
