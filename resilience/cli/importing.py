"""``resilience import``: a run from a checkpoint that others saved."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime

import click

from resilience.cli.options import json_option, print_json, storage_option
from resilience.cli.progress import progress


@click.command("import")
@click.argument("source")
@storage_option
@json_option
@click.option("--name", required=True, help="Name of the run that is made.")
@click.option("--step", type=click.IntRange(min=0), help="Completed steps; default what SOURCE says, else 0.")
@click.option("--under", metavar="OBJECT", help="Put everything below this name: the one it is tracked by.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave these out. Repeatable.")
def import_command(
    source: str,
    storage: str,
    as_json: bool,
    name: str,
    step: int | None,
    under: str | None,
    exclude: tuple[str, ...],
) -> None:
    """Make a run with one committed checkpoint that holds what is at SOURCE.

    SOURCE is a directory of torch's distributed checkpoint, a .safetensors file, or a directory of those. A launch
    under this name goes on from it, with any number of workers, where the names and shapes fit. safetensors without a
    state around them become one object, `model`.
    """
    from resilience.checkpoint.importing import import_checkpoint
    from resilience.history.format import count, size

    with progress(quiet=as_json) as report:
        done = import_checkpoint(
            source,
            storage,
            name,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            step=step,
            under=under,
            exclude=exclude,
            report=lambda so_far, total: report("import", so_far, total),
        )
    if as_json:
        print_json(asdict(done))
        return
    click.echo(f"run {name!r} begins at step {done.step}: {count(done.arrays, 'array')}, {size(done.size)}")
    for note in done.notes:
        click.echo(f"note: {note}", err=True)
