"""What the commands share: the storage option, the JSON switch, and printing either tables or JSON.

With ``--json`` stdout holds JSON and nothing else; everything for people goes to stderr then.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def storage_option(function: F) -> F:
    """``--storage URL``: where the runs are."""
    return click.option(
        "--storage",
        envvar="RESILIENCE_STORAGE",
        default="./runs",
        show_default=True,
        show_envvar=True,
        metavar="URL",
        help="Storage that holds the runs: a path, or any fsspec URL.",
    )(function)


def json_option(function: F) -> F:
    """``--json``: for programs."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else.")(function)


def print_json(value: Any) -> None:
    """One JSON document on stdout: strict JSON, so not-finite numbers are null."""
    from resilience.history.query import jsonable

    click.echo(json.dumps(jsonable(value), indent=2))


def print_table(*renderables: Any) -> None:
    """Tables for people on stdout."""
    from resilience.history.format import console

    out = console()
    for renderable in renderables:
        out.print(renderable)


def warn(rows: list[dict[str, Any]]) -> None:
    """Say on stderr what is torn or missing: never left out, never in the way of a pipe."""
    if rows:
        from resilience.history.format import console
        from resilience.history.report import warnings_text

        console(stderr=True).print(warnings_text(rows))
