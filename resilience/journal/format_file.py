"""The ``FORMAT`` file: what makes a directory a run of ours, and in which version of the format.

Owns that one object. It is created before anything else in a run and never changed. Must never adopt a
directory that holds somebody else's files, nor write into a run whose format this release does not know.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from resilience.errors import InvalidError
from resilience.journal.records import READER, VERSION, canonical, newer
from storage_backends.base import Storage

NAME = "FORMAT"


@dataclass(frozen=True)
class Format:
    """What the file says.

    Attributes:
        version: of everything under the root.
        run: id of the run.
        created: when, ISO 8601 in UTC; for display only.
    """

    version: int
    run: str
    created: str


def read_format(storage: Storage) -> Format:
    """The format of the run at this root.

    ``FileNotFoundError`` when there is no ``FORMAT`` (no run here); ``InvalidError`` when it is of a newer
    version (says which release reads it) or is not ours.
    """
    return _decode(storage.read(NAME), storage)


def ensure_format(storage: Storage, *, run: str, created: str, ignore: Iterable[str] = ()) -> Format:
    """Create the file, or check the one that is there. May run twice, and from racing processes.

    Args:
        run: id of the run that is to live here.
        created: ISO time to write if the file is new.
        ignore: names at the root that do not make it somebody else's.

    ``InvalidError`` when the directory belongs to another run, holds other files, or is of a newer version.
    """
    try:
        return _check(read_format(storage), run, storage)
    except FileNotFoundError:
        pass
    # Dot names are temporary files and what file managers leave; probe-* is left by a prober that was killed.
    foreign = [
        name
        for name in storage.list()
        if not name.startswith((".", "probe-")) and name.rstrip("/") not in set(ignore)
    ]
    if foreign:
        try:  # Another process may have begun this very run between the two calls.
            return _check(read_format(storage), run, storage)
        except FileNotFoundError:
            raise InvalidError(
                f"{storage.url} is not a run of ours: it holds {', '.join(foreign[:3])}"
                f"{' and more' if len(foreign) > 3 else ''}, but no {NAME}",
                operation="open run",
                path=storage.url,
                hint="choose an empty directory or a new run name; nothing was written",
            ) from None
    fields = {"format": "resilience", "version": VERSION, "run": run, "created": created, "reader": READER}
    held = storage.create(NAME, canonical(fields) + b"\n")
    return Format(VERSION, run, created) if held is None else _check(_decode(held, storage), run, storage)


def _check(found: Format, run: str, storage: Storage) -> Format:
    if found.run == run:
        return found
    raise InvalidError(
        f"{storage.url} belongs to run {found.run!r}, not to {run!r}",
        operation="open run",
        path=storage.url,
        hint="runs are not renamed by moving their directory: use the run's own name, or another directory",
    )


def _decode(data: bytes, storage: Storage) -> Format:
    fields: Any
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict) or fields.get("format") != "resilience":
        raise _not_ours(storage)
    version, run, created = fields.get("version"), fields.get("run"), fields.get("created")
    if type(version) is int and version > VERSION:
        raise newer(f"{storage.url} holds a run of format {version}", f"{storage.url}/{NAME}", fields)
    if version != VERSION or not isinstance(run, str) or not isinstance(created, str):
        raise _not_ours(storage)
    return Format(VERSION, run, created)


def _not_ours(storage: Storage) -> InvalidError:
    return InvalidError(
        f"{storage.url}/{NAME} was not written by this package, or is damaged",
        operation="open run",
        path=f"{storage.url}/{NAME}",
        hint="choose another directory, or bring the file back from a copy",
    )
