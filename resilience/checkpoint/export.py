"""Export: a checkpoint as others keep theirs, streamed: safetensors, plain Zarr, torch's distributed checkpoint.

Owns what is exported and under which names. At most one piece of one array is in memory at a time, and every piece is
verified on its way. Must never make a destination visible that is not complete.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from resilience.checkpoint.catalog import Entry, Path, node_kind, places
from resilience.checkpoint.packs import Packs, find_packs
from resilience.checkpoint.plan import stored_name
from resilience.errors import InvalidError

FORMATS = ("safetensors", "zarr", "dcp")
MAX_FILE_BYTES = 5_000_000_000
Report = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(frozen=True)
class Item:
    """An array to export.

    Attributes:
        path: the keys to it in the state, below ``rank-<r>`` where it is one of several ranks' own.
        key: the same as the checkpoint writes it: ``/``-separated segments.
    """

    path: Path
    key: str
    entry: Entry

    @property
    def name(self) -> str:
        """With dots, as torch and safetensors name what is nested."""
        return ".".join(map(str, self.path))


@dataclass
class Selection:
    """What is exported.

    Attributes:
        items: arrays, in the order of the state.
        values: what is not an array, by its place; what differs between ranks below ``rank-<r>``.
        whole: nothing was left out.
    """

    packs: Packs
    items: list[Item] = field(default_factory=list)
    values: dict[Path, Any] = field(default_factory=dict)
    whole: bool = True

    @property
    def size(self) -> int:
        """Bytes of the arrays, those of tied ones once."""
        return sum(item.entry.size for item in self.items if item.entry.same_as is None)


@dataclass
class Exported:
    """What came of it. ``notes``: what did not fit into the format, in words."""

    path: str
    step: int
    arrays: int
    size: int
    files: int
    notes: list[str] = field(default_factory=list)


def export(
    url: str,
    dest: str,
    *,
    to: str,
    step: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    overwrite: bool = False,
    strip: str | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    report: Report = lambda done, total: None,
) -> Exported:
    """Write a checkpoint to ``dest`` in another format.

    Args:
        url: of a run or a checkpoint's directory, as for ``open_checkpoint``.
        dest: a local path. For safetensors a name in ``.safetensors`` is one file; everything else is a directory.
        to: ``safetensors``, ``zarr`` or ``dcp``.
        step: of a run; ``None`` is the newest committed checkpoint.
        include, exclude: patterns (``fnmatch``) of array names, or names above them. Default: everything.
        overwrite: an older export of the same kind at ``dest`` may be replaced.
        strip: an object's name that is left out in front of exported names (``model``: names as the module has them).
        max_file_bytes: safetensors directories are split into files up to this size (and one array).
        report: called with the bytes copied so far, and in all.

    Raises:
        InvalidError: no such checkpoint, nothing matches a pattern, a data type the format lacks, a destination
            that exists, or a package that is not installed.
        CorruptError: the checkpoint is damaged. Nothing is at ``dest`` then.
        ExhaustedError: no space there.
    """
    if to not in FORMATS:
        near = difflib.get_close_matches(to, FORMATS, n=1)
        raise InvalidError(
            f"there is no format {to!r}",
            operation="export",
            hint=f"{f'did you mean {near[0]}? ' if near else ''}formats: {', '.join(FORMATS)}",
        )
    packs = find_packs(url, step)
    chosen = select(packs, include, exclude, strip)
    for item in chosen.items:
        item.entry.need_whole()
    if to == "safetensors":
        from resilience.checkpoint.export_safetensors import write

        return write(chosen, dest, overwrite=overwrite, max_file_bytes=max_file_bytes, report=report)
    if to == "zarr":
        from resilience.checkpoint import export_zarr

        return export_zarr.write(chosen, dest, overwrite=overwrite, report=report)
    from resilience.checkpoint import export_dcp

    return export_dcp.write(chosen, dest, overwrite=overwrite, report=report)


def select(
    packs: Packs, include: Sequence[str] = (), exclude: Sequence[str] = (), strip: str | None = None
) -> Selection:
    """Arrays and values by the patterns, with the names they are to have.

    The arrays of a single rank lose their ``rank-0/``: of a world of one nothing else is meant.
    """
    found = Selection(packs)
    names = {name: shown(name, packs) for name in packs.entries}
    for pattern in (*include, *exclude):
        if not any(matches(name, pattern) for name in names.values()):
            raise _nothing(pattern, names.values())

    def wanted(name: str) -> bool:
        kept = not include or any(matches(name, pattern) for pattern in include)
        return kept and not any(matches(name, pattern) for pattern in exclude)

    kept = {name for name, short in names.items() if wanted(short)}
    found.whole = len(kept) == len(names)
    seen: set[str] = set()
    for rank, part in packs.parts.items():
        own: Path = (f"rank-{rank}",) if len(packs.parts) > 1 else ()
        arrays = {part.key(array): array for array in part.arrays}
        for path, node in places(part.state):
            if node_kind(node) != "array":
                continue
            scope = arrays[node["n"]].scope
            name = stored_name(node.get("as", node["n"]), scope, rank=rank)
            if name in kept and name not in seen:
                seen.add(name)
                entry = packs.entries[name]
                whole = (*own, *path) if entry.rank is not None else path
                found.items.append(Item(whole or ("value",), names[name], entry))
    if not found.items:
        raise InvalidError(
            "no array is left to export", operation="export", hint="exclude less, or include more"
        )
    found.values = values_of(packs)
    # An object of which no array was chosen is not wanted, and neither are its values.
    objects = {item.path[: 2 if str(item.path[0]).startswith("rank-") else 1] for item in found.items}
    if not found.whole:
        found.values = {p: v for p, v in found.values.items() if any(p[: len(o)] == o for o in objects)}
    if strip is not None:
        _strip(found, tuple(strip.strip("./").split(".")) if strip else ())
    _check_names(found.items)
    return found


def values_of(packs: Packs) -> dict[Path, Any]:
    """The skeleton's nodes of what is not an array, by place: once where all ranks hold it alike, else each rank's
    below ``rank-<r>``."""
    values: dict[Path, dict[int, Any]] = {}
    for rank, part in packs.parts.items():
        for path, node in places(part.state):
            if node_kind(node) != "array":
                values.setdefault(path or ("value",), {})[rank] = node
    found: dict[Path, Any] = {}
    for path, by_rank in values.items():
        first = next(iter(by_rank.values()))
        if all(node == first for node in by_rank.values()):
            found[path] = first
        else:
            found.update({(f"rank-{rank}", *path): node for rank, node in by_rank.items()})
    return found


def _strip(found: Selection, prefix: Path) -> None:
    if not any(item.path[: len(prefix)] == prefix for item in found.items):
        tops = dict.fromkeys(str(item.path[0]) for item in found.items)
        raise InvalidError(
            f"no exported array is below {'.'.join(map(str, prefix))!r}",
            operation="export",
            hint=f"exported are: {', '.join(tops)}",
        )

    depth = len(prefix)

    def below(path: Path) -> bool:
        return path[:depth] == prefix and len(path) > depth

    found.items = [
        Item(item.path[depth:], item.key.split("/", depth)[depth], item.entry) if below(item.path) else item
        for item in found.items
    ]
    found.values = {path[depth:] if below(path) else path: value for path, value in found.values.items()}


def shown(name: str, packs: Packs) -> str:
    """The name of an array as people see and give it."""
    return name.removeprefix("rank-0/") if len(packs.parts) == 1 else name


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern is of an array's name, or of a name above it."""
    pattern = pattern.rstrip("/")
    ends = [at for at, letter in enumerate(name) if letter == "/"]
    return any(
        fnmatch.fnmatchcase(name[:end], pattern) or name[:end] == pattern for end in (*ends, len(name))
    )


def _nothing(pattern: str, names: Iterable[str]) -> InvalidError:
    names = list(names)
    above = {name.rsplit("/", depth)[0] for name in names for depth in range(1, name.count("/") + 1)}
    near = difflib.get_close_matches(pattern, [*sorted(above), *names], n=3, cutoff=0.5)
    tops = dict.fromkeys(name.partition("/")[0] for name in names)
    shown = ", ".join(list(tops)[:20])
    return InvalidError(
        f"no array is named {pattern!r}",
        operation="export",
        path=pattern,
        hint=(f"did you mean {' or '.join(near)}? " if near else "")
        + f"Names begin with: {shown}; `resilience inspect` lists them",
    )


def _check_names(items: Sequence[Item]) -> None:
    seen: dict[str, Item] = {}
    for item in items:
        other = seen.setdefault(item.name, item)
        if other is not item:
            raise InvalidError(
                f"{item.entry.name} and {other.entry.name} would both be named {item.name!r}",
                operation="export",
                path=item.name,
                hint="leave one of them out with --exclude",
            )
