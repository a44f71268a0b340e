"""Import: what others saved becomes a run with one committed checkpoint, streamed.

Owns the order: everything that can be wrong with the source is found first, then the run is begun (FORMAT, a fence in
its log), then the pack is written chunk by chunk, then part, Zarr files and the checkpoint's record. Must never
touch a run that somebody trained, and never build more than one chunk in memory.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from resilience.checkpoint.arrays import AnyArray, carrier
from resilience.checkpoint.box import Box
from resilience.checkpoint.pack import crc32c
from resilience.checkpoint.part import Part, directory, draft, pack_name, part_name, sha256
from resilience.checkpoint.plan import CHUNK_BYTES, CRC_BYTES, ArraySpec, Chunk, Plan, plan
from resilience.checkpoint.zarr_view import zarr_metadata
from resilience.errors import InvalidError, ResilienceError
from storage_backends import check_name, child, open_storage, probe
from storage_backends.base import Storage

if TYPE_CHECKING:
    from resilience.journal.log import CommitLog

Report = Callable[[int, int], None]  # bytes done, bytes in all
_BY = "import"  # the fence's ``supervisor`` begins with it: a run that only an import has touched


@dataclass(frozen=True)
class SourceArray:
    """An array of the source. ``key``: its name in the state, as ``tree.flatten`` would give it."""

    key: str
    dtype: str
    shape: tuple[int, ...]


class Imported(Protocol):
    """What is imported: opened, checked, and read box by box.

    Attributes:
        arrays: all of them, each of a name of its own.
        skeleton: the state around them (see ``tree``).
        step: that the source itself speaks of, if it does.
        notes: what is left out, in words.
    """

    arrays: tuple[SourceArray, ...]
    skeleton: Any
    step: int | None
    notes: list[str]

    def read(self, array: SourceArray, box: Box) -> AnyArray:
        """A box of an array in the carrier type. ``CorruptError`` if the file does not hold it."""

    def close(self) -> None: ...


@dataclass
class ImportResult:
    """What came of it."""

    url: str
    step: int
    generation: int
    arrays: int
    size: int
    notes: list[str] = field(default_factory=list)


def open_source(path: str, *, under: str | None = None, exclude: Sequence[str] = ()) -> Imported:
    """The checkpoint at a local path: a directory of torch's distributed checkpoint, a safetensors file, or a
    directory of those (with Hugging Face's index, where there is one).

    Raises:
        InvalidError: it is none of these, or holds what cannot be imported.
        CorruptError: it is damaged or incomplete.
    """
    path = os.path.abspath(os.path.expanduser(path.removeprefix("file://")))
    if os.path.isfile(f"{path}/.metadata"):
        from resilience.checkpoint.importing_dcp import DcpSource

        return DcpSource(path, under=under, exclude=exclude)
    from resilience.checkpoint.importing_safetensors import SafetensorsSource, files_of

    files = files_of(path)
    if files:
        return SafetensorsSource(files, under=under, exclude=exclude)
    if not os.path.exists(path):
        problem = f"there is nothing at {path}"
    else:
        problem = f"{path} is no checkpoint that can be imported"
    raise InvalidError(
        problem,
        operation="import",
        path=path,
        hint="give a directory of a torch distributed checkpoint (it holds a file .metadata), a .safetensors file, "
        "or a directory of those; from a bucket, copy it here first",
    )


def import_checkpoint(
    source: str,
    storage: str,
    run: str,
    *,
    created: str,
    step: int | None = None,
    under: str | None = None,
    exclude: Sequence[str] = (),
    chunk_bytes: int = CHUNK_BYTES,
    report: Report = lambda done, total: None,
) -> ImportResult:
    """Make the run ``run`` below ``storage``, with one committed checkpoint that holds what is at ``source``.

    All arrays count as held by every rank alike, so a launch of any number of workers goes on from it, where names
    and shapes fit.

    Args:
        source: see ``open_source``.
        created: ISO time, for the run's FORMAT.
        step: completed steps; default what the source says, else 0.
        under: an object's name that everything is put below.
        exclude: patterns of the source's names that are left out.

    Raises:
        InvalidError: no such source, a run of that name exists, or something in it cannot be kept.
        CorruptError: the source is damaged.
        ExhaustedError, UnavailableError: of the storage. The run has no checkpoint then; the same call may be made
            again.
    """
    check_name(run)
    opened = open_source(source, under=under, exclude=exclude)
    try:
        specs = [ArraySpec(array.key, array.dtype, array.shape, replicated=True) for array in opened.arrays]
        layout = plan(specs, rank=0, world_size=1, chunk_bytes=chunk_bytes)
        done = (opened.step or 0) if step is None else step
        root = open_storage(child(storage, run))
        log = _begin(root, run, created)
        where = directory(done, log.generation)
        try:
            part = draft(layout, opened.skeleton, run=run, step=done, generation=log.generation)
            _write(root, opened, layout, part, report)
            _commit(root, log, part)
        except BaseException:
            _discard(root, where)
            raise
        return ImportResult(root.url, done, log.generation, len(specs), layout.size, opened.notes)
    finally:
        opened.close()


def _begin(root: Storage, run: str, created: str) -> CommitLog:
    """Take charge of a new run, or of one that an import began and did not finish."""
    # The journal is a room of its own: everything else about checkpoints does without.
    from resilience.journal.format_file import ensure_format, read_format
    from resilience.journal.log import CommitLog
    from resilience.journal.records import Kind

    log = CommitLog(root, new_id=lambda: secrets.token_hex(16))
    try:
        read_format(root)
    except FileNotFoundError:
        probe(root)
    foreign = [
        record
        for record in log.refresh()
        if record.kind is not Kind.FENCE or not str(record.body.get("supervisor", "")).startswith(f"{_BY}/")
    ]
    if foreign:
        raise InvalidError(
            f"there is a run {run!r} already",
            operation="import",
            path=root.url,
            hint="import under another --name: a run that exists is not changed",
        )
    ensure_format(root, run=run, created=created)
    log.fence(1, {"run": run, "supervisor": f"{_BY}/{socket.gethostname()}/{os.getpid()}"})
    return log


def _write(root: Storage, source: Imported, layout: Plan, draft_: Part, report: Report) -> None:
    """Pack, part, and what plain Zarr needs beside them; each durable before the next begins."""
    by_key = {array.key: array for array in source.arrays}
    total = sum(chunk.length for chunk in layout.chunks)
    crcs, done = [], 0
    with root.sink(pack_name(draft_.directory, 0)) as sink:
        at = 0
        for chunk in layout.chunks:
            payload = _payload(source, by_key[chunk.key], chunk)
            crcs.append(crc32c(payload))
            sink.write(bytes(chunk.offset - at))
            sink.write(payload)
            sink.write(crcs[-1].to_bytes(CRC_BYTES, "little"))
            at = chunk.offset + chunk.length + CRC_BYTES
            done += chunk.length
            report(done, total)
        sink.write(bytes(layout.size - at))
    part = draft_.with_crcs(crcs)
    data = part.encode()
    if root.create(part_name(part.directory, 0), data) is not None:
        raise InvalidError(
            f"{part.name} exists with other contents",
            operation="import",
            path=part.name,
            hint="somebody else writes into this run: use another --name",
        )
    url = f"{root.url.rstrip('/')}/{part.directory}"
    for name, document in zarr_metadata([part], url=url).items():
        with root.sink(f"{part.directory}/{name}") as sink:
            sink.write(document)


def _payload(source: Imported, array: SourceArray, chunk: Chunk) -> memoryview:
    values = source.read(array, chunk.box)
    assert chunk.grid is not None
    if chunk.box_shape != chunk.grid:
        padded = np.zeros(chunk.grid, carrier(array.dtype))
        corner: Any = (..., *map(slice, chunk.box_shape))
        padded[corner] = values
        values = padded
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data


def _commit(root: Storage, log: CommitLog, part: Part) -> None:
    from resilience.journal.records import Kind

    name = part_name(part.directory, 0)
    reference = {"rank": 0, "node": _BY, "name": name, "sha256": sha256(root.read(name))}
    body = {
        "step": part.step,
        "tier": "shared",
        "world_size": 1,
        "parts": [reference],
        "size": part.size,
    }
    log.append(Kind.CHECKPOINT, body)


def _discard(root: Storage, where: str) -> None:
    """The bytes of an import that failed. They were never committed, so nothing depends on this."""
    try:
        root.delete_all(where)
    except ResilienceError:
        return  # the first error is the one to tell
