"""``resilience export``: a checkpoint as safetensors, plain Zarr, or torch's distributed checkpoint."""

from __future__ import annotations

import re
from dataclasses import asdict

import click

from resilience.cli.options import json_option, print_json, storage_option
from resilience.cli.progress import progress
from resilience.cli.target import target_url
from resilience.errors import InvalidError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{unit}I": 1024**power for power, unit in enumerate("KMGT", 1)}


@click.command("export")
@click.argument("run_or_url")
@click.argument("dest")
@storage_option
@json_option
@click.option("--to", required=True, metavar="FORMAT", help="safetensors, zarr or dcp.")
@click.option("--step", type=click.IntRange(min=0), help="Of this step; default the newest.")
@click.option(
    "--include", multiple=True, metavar="PATTERN", help="Only these arrays, or all below a name. Repeatable."
)
@click.option("--exclude", multiple=True, metavar="PATTERN", help="All but these. Repeatable.")
@click.option("--strip", metavar="OBJECT", help="Leave this name out in front: --strip model.")
@click.option(
    "--max-file-size",
    default="5GB",
    show_default=True,
    metavar="SIZE",
    help="safetensors: begin another file above it.",
)
@click.option("--overwrite", is_flag=True, help="Replace an older export at DEST.")
def export_command(
    run_or_url: str,
    dest: str,
    storage: str,
    as_json: bool,
    to: str,
    step: int | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    strip: str | None,
    max_file_size: str,
    overwrite: bool,
) -> None:
    """Write a checkpoint of RUN_OR_URL to DEST in another format.

    RUN_OR_URL is a run's name, or the URL of a run or of a checkpoint's directory. Every byte is checked on its way;
    DEST is complete, or not there. Names of arrays and objects: `resilience inspect RUN_OR_URL`.
    """
    from resilience.checkpoint.export import export
    from resilience.history.format import count, size

    with progress(quiet=as_json) as report:
        done = export(
            target_url(run_or_url, storage),
            dest,
            to=to,
            step=step,
            include=include,
            exclude=exclude,
            overwrite=overwrite,
            strip=strip,
            max_file_bytes=parse_size(max_file_size),
            report=lambda so_far, total: report(f"to {to}", so_far, total),
        )
    if as_json:
        print_json(asdict(done))
        return
    what = f"{count(done.arrays, 'array')}, {size(done.size)}, {count(done.files, 'file')}"
    click.echo(f"step {done.step} is at {done.path}: {what}")
    for note in done.notes:
        click.echo(f"note: {note}", err=True)


def parse_size(text: str) -> int:
    """``5GB``, ``500M``, ``1.5 GiB``, ``1000`` as bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", text.strip().upper())
    if match is None or match[2] not in _UNITS or float(match[1]) <= 0:
        raise InvalidError(
            f"{text!r} is not a size", operation="export", hint="write 5GB, 500MB, 2GiB or a number of bytes"
        )
    return max(int(float(match[1]) * _UNITS[match[2]]), 1)
