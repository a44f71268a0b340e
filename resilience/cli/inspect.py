"""``resilience inspect``: what a checkpoint holds, from its parts and the commit log. No data is read."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from resilience.cli.options import json_option, print_json, print_table, storage_option
from resilience.cli.target import target_url
from resilience.errors import InvalidError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from resilience.checkpoint.catalog import Entry
    from resilience.checkpoint.packs import Packs
    from resilience.journal.state import Checkpoint, LogState
    from storage_backends import Storage

_VALUES = 40  # values shown to people; --json has all
_SHOWN = 60  # characters of one


@dataclass
class Found:
    """A checkpoint: what the log says of it, and its parts where they can be read. ``why``: they cannot."""

    about: dict[str, Any]
    tiers: dict[str, dict[str, Any]] = field(default_factory=dict)
    packs: Packs | None = None
    why: str = ""


@dataclass
class Row:
    """An array in the table. One of every rank's own is one row: ``each`` is how many there are."""

    path: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]
    layout: str
    ranks: list[int]
    chunks: int
    size: int
    each: int = 0
    same_as: str | None = None


@click.command("inspect")
@click.argument("run_or_url")
@storage_option
@json_option
@click.option("--step", type=click.IntRange(min=0), help="Of this step; default the newest.")
@click.option("--nvme", metavar="DIR", help="Where the near tier is, for a checkpoint that is only there.")
def inspect_command(run_or_url: str, storage: str, as_json: bool, step: int | None, nvme: str | None) -> None:
    """Show arrays, shapes, shards, sizes, tiers and values of a checkpoint, without reading its data.

    RUN_OR_URL is a run's name, or the URL of a run or of a checkpoint's directory.
    """
    found = find(target_url(run_or_url, storage), step, nvme)
    if as_json:
        print_json(_document(found))
        return
    print_table(*_report(found))


def find(url: str, step: int | None, nvme: str | None = None) -> Found:
    """The checkpoint behind ``url``, in whatever tier its parts can be read."""
    from resilience.checkpoint.packs import find_packs
    from resilience.checkpoint.zarr_view import about
    from storage_backends import open_storage

    storage = open_storage(url)
    if not storage.list("log"):
        packs = find_packs(url, step)
        return Found({"url": storage.url, **about(packs.first)}, packs=packs)
    return _of_run(storage, step, nvme)


def _of_run(storage: Storage, step: int | None, nvme: str | None) -> Found:
    from resilience.checkpoint.packs import Packs
    from resilience.checkpoint.restore import Source, check_together, load_part
    from resilience.cli.verify import node_storage, nvme_of
    from resilience.history.load import RunReader
    from resilience.journal.format_file import read_format
    from resilience.journal.log import CommitLog
    from resilience.journal.state import fold

    state = fold(CommitLog(storage, new_id=lambda: "read-only").refresh())
    checkpoint = _choose(state, storage.url, step)
    run = read_format(storage).run
    about = {
        "url": storage.url,
        "run": run,
        "step": checkpoint.step,
        "generation": checkpoint.generation,
        "world_size": checkpoint.world_size,
        "steps": [other.step for other in state.checkpoints],
    }
    found = Found(about)
    for tier, entry in sorted(checkpoint.tiers.items()):
        reason = state.quarantined.get((checkpoint.step, checkpoint.generation, tier))
        nodes = sorted({part.node for part in entry.parts}) if tier != "shared" else []
        found.tiers[tier] = {"size": entry.size, "nodes": nodes, "quarantined": reason}
    tier = "shared" if "shared" in checkpoint.tiers else min(checkpoint.tiers)
    roots: list[Storage] = []
    near = None if tier == "shared" else nvme or nvme_of(RunReader(run, storage.url, "", storage))
    for part in checkpoint.tiers[tier].parts:
        root = storage if tier == "shared" else node_storage(near, run, part.node)
        if root is None:
            found.why = f"its parts lie on node {part.node} only: look there, or give --nvme DIR"
            return found
        roots.append(root)
    references = checkpoint.tiers[tier].parts
    parts = [
        load_part(Source(ref.rank, root, ref.name, ref.sha256))
        for ref, root in zip(references, roots, strict=True)
    ]
    check_together(parts, step=checkpoint.step, generation=checkpoint.generation)
    found.packs = Packs(parts, [(root, part.pack_name) for root, part in zip(roots, parts, strict=True)])
    return found


def _choose(state: LogState, url: str, step: int | None) -> Checkpoint:
    for checkpoint in state.checkpoints:
        if step is None or checkpoint.step == step:
            return checkpoint
    have = ", ".join(str(other.step) for other in state.checkpoints) or "none"
    raise InvalidError(
        f"{url} has no committed checkpoint{'' if step is None else f' of step {step}'}",
        operation="inspect",
        hint=f"steps there are: {have}",
    )


def rows(packs: Packs) -> list[Row]:
    """All arrays, in the order of the state; those of every rank's own that are alike as one."""
    found: dict[Any, Row] = {}
    for entry in packs.entries.values():
        name = entry.name if entry.rank is None else entry.name.partition("/")[2]
        ranks = sorted({piece.rank for piece in entry.pieces})
        layout = "boxes" if entry.grid is None else "x".join(map(str, entry.grid)) or "scalar"
        key = (name, entry.dtype, entry.shape, entry.rank is None)
        row = found.get(key)
        if row is None:
            row = Row(tuple(name.split("/")), entry.dtype, entry.shape, layout, [], 0, 0)
            row.same_as = entry.same_as
            found[key] = row
        row.ranks = sorted({*row.ranks, *(ranks if entry.rank is None else [entry.rank])})
        row.chunks += 0 if entry.same_as else len(entry.pieces)
        row.size += 0 if entry.same_as else entry.size
        row.each += entry.rank is not None
    order = _order(packs)
    return sorted(found.values(), key=lambda row: order.get(row.path, len(order)))


def _order(packs: Packs) -> dict[tuple[str, ...], int]:
    from resilience.checkpoint.tree import leaves

    order: dict[tuple[str, ...], int] = {}
    for part in packs.parts.values():
        for place, _ in leaves(part.state):
            order.setdefault(tuple(place.split("/")), len(order))
    return order


def objects(table: Sequence[Row]) -> list[dict[str, Any]]:
    """Arrays and bytes by object: the first key of the state."""
    found: dict[str, dict[str, Any]] = {}
    for row in table:
        total = found.setdefault(row.path[0], {"name": row.path[0], "arrays": 0, "size": 0})
        total["arrays"] += max(row.each, 1)
        total["size"] += row.size
    return list(found.values())


def _values(packs: Packs) -> dict[str, Any]:
    from resilience.checkpoint.export import values_of

    return {"/".join(map(str, path)): node for path, node in values_of(packs).items()}


def _document(found: Found) -> dict[str, Any]:
    document: dict[str, Any] = {**found.about, "tiers": found.tiers}
    if found.packs is None:
        return {**document, "unreadable": found.why}
    table = rows(found.packs)
    return {
        **document,
        "objects": objects(table),
        "arrays": [_array(entry) for entry in found.packs.entries.values()],
        "values": _values(found.packs),
        "packs": [
            {
                "rank": part.rank,
                "size": part.size,
                "chunks": len(part.chunks),
                "links": [x.name for x in part.links],
            }
            for part in found.packs.parts.values()
        ],
    }


def _array(entry: Entry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "dtype": entry.dtype,
        "shape": list(entry.shape),
        "size": entry.size,
        "scope": entry.scope.value,
        "grid": None if entry.grid is None else list(entry.grid),
        "chunks": len(entry.pieces),
        "ranks": sorted({piece.rank for piece in entry.pieces}),
        "same_as": entry.same_as,
    }


def _report(found: Found) -> list[RenderableType]:
    from rich.text import Text

    from resilience.history.format import count, size

    about = found.about
    head = f"run {about['run']}, step {about['step']}, generation {about['generation']}"
    lines: list[RenderableType] = [
        Text(f"{head}, saved by {count(about['world_size'], 'rank')}", style="bold")
    ]
    lines.append(Text(str(about["url"])))
    for tier, facts in found.tiers.items():
        where = f" on {', '.join(facts['nodes'])}" if facts["nodes"] else ""
        aside = f"; QUARANTINED: {facts['quarantined']}" if facts["quarantined"] is not None else ""
        lines.append(Text(f"tier {tier}: {size(facts['size'])}{where}{aside}"))
    if found.packs is None:
        return [*lines, Text(found.why)]
    table = rows(found.packs)
    lines += [Text(""), _tree(table), Text("")]
    lines += [
        Text(f"{total['name']}: {count(total['arrays'], 'array')}, {size(total['size'])}")
        for total in objects(table)
    ]
    lines.append(
        Text(f"total: {count(len(found.packs.entries), 'array')}, {size(sum(r.size for r in table))}")
    )
    values = _values(found.packs)
    if values:
        lines += [Text(""), Text(f"{count(len(values), 'value')} beside the arrays:")]
        lines += [Text(f"  {name} = {_shorten(node)}") for name, node in list(values.items())[:_VALUES]]
        if len(values) > _VALUES:
            lines.append(Text(f"  and {len(values) - _VALUES} more: --json has them all"))
    return lines


def _tree(table: Sequence[Row]) -> RenderableType:
    """Names indented by their place; a name above others sums them up."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from resilience.history.format import size

    out = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("array", "dtype", "shape", "chunks of", "ranks"):
        out.add_column(name, overflow="fold")
    for name in ("chunks", "size"):
        out.add_column(name, justify="right", no_wrap=True)
    sums: dict[tuple[str, ...], list[int]] = {}
    for row in table:
        for depth in range(1, len(row.path)):
            total = sums.setdefault(row.path[:depth], [0, 0])
            total[0] += row.chunks
            total[1] += row.size
    seen: set[tuple[str, ...]] = set()
    for row in table:
        for depth in range(1, len(row.path)):
            above = row.path[:depth]
            if above not in seen:
                seen.add(above)
                chunks, total_size = sums[above]
                out.add_row(
                    Text("  " * (depth - 1) + above[-1] + "/", style="bold"),
                    "",
                    "",
                    "",
                    "",
                    str(chunks),
                    size(total_size),
                )
        each = " each" if row.each > 1 else ""
        shape = "x".join(map(str, row.shape)) or "scalar"
        out.add_row(
            Text("  " * (len(row.path) - 1) + row.path[-1]),
            row.dtype,
            shape + each,
            f"same as {row.same_as}" if row.same_as else row.layout,
            _spans(row.ranks),
            "" if row.same_as else str(row.chunks),
            "" if row.same_as else size(row.size),
        )
    return out


def _spans(ranks: Sequence[int]) -> str:
    """``0-3, 7``."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    shown = [str(a) if a == b else f"{a}-{b}" for a, b in spans]
    return ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "")


def _shorten(node: Any) -> str:
    from resilience.checkpoint.tree import unflatten

    writer = reprlib.Repr()
    writer.maxstring = writer.maxother = _SHOWN
    text = writer.repr(unflatten(node, {}))
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
