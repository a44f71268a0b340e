"""``resilience logs``: what the ranks printed, kept per generation in the run's storage."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from resilience.cli.options import json_option, print_json, storage_option
from resilience.errors import InvalidError

if TYPE_CHECKING:
    from storage_backends import Storage

_GENERATION = re.compile(r"logs/g(\d+)/")
_RANK = re.compile(r"logs/g\d+/rank-(\d+)\.log")
_BLOCK = 1 << 20


@click.command("logs")
@click.argument("run")
@storage_option
@json_option
@click.option("--rank", type=click.IntRange(min=0), help="Only this rank; default all.")
@click.option("--generation", type=click.IntRange(min=1), help="Of this generation; default the newest.")
def logs_command(run: str, storage: str, as_json: bool, rank: int | None, generation: int | None) -> None:
    """Print the output (stdout and stderr) of the ranks of RUN."""
    from resilience.history.load import open_run

    root = open_run(storage, run).storage
    generation, names = _choose(root, run, rank, generation)
    if as_json:
        texts = {r: b"".join(_blocks(root, name)).decode(errors="replace") for r, name in names.items()}
        print_json([{"generation": generation, "rank": r, "output": text} for r, text in texts.items()])
        return
    out = sys.stdout.buffer
    for number, name in names.items():
        if len(names) > 1:
            out.write(f"==> generation {generation}, rank {number} <==\n".encode())
        last = b"\n"
        for block in _blocks(root, name):
            out.write(block)
            last = block[-1:] or last
        if last != b"\n":
            out.write(b"\n")
    out.flush()


def _choose(root: Storage, run: str, rank: int | None, generation: int | None) -> tuple[int, dict[int, str]]:
    """The generation and its files by rank; ``InvalidError`` saying what there is instead."""
    found = sorted(int(match[1]) for match in map(_GENERATION.fullmatch, root.list("logs")) if match)
    if not found:
        raise InvalidError(
            f"run {run!r} has no output yet",
            operation="logs",
            hint=f"see how far it is: resilience status {run}",
        )
    chosen = found[-1] if generation is None else generation
    if chosen not in found:
        raise InvalidError(
            f"there is no output of generation {chosen}",
            operation="logs",
            hint=f"there is output of generations {', '.join(map(str, found))}",
        )
    matches = map(_RANK.fullmatch, root.list(f"logs/g{chosen}"))
    names = {int(match[1]): match[0] for match in matches if match}
    if rank is not None and rank not in names:
        raise InvalidError(
            f"there is no output of rank {rank} in generation {chosen}",
            operation="logs",
            hint=f"there is output of ranks {', '.join(map(str, sorted(names))) or '(none)'}",
        )
    return chosen, {r: names[r] for r in sorted(names) if rank in (None, r)}


def _blocks(root: Storage, name: str) -> Iterator[bytes]:
    start = 0
    while block := root.read(name, start, start + _BLOCK):
        yield block
        start += len(block)
