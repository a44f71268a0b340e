"""Notes: the small objects by which ranks that never talk tell each other what became of a save.

Owns their names and form (docs/format.md, "Notes"). They lie beside the checkpoint's packs in shared storage, and go
with them. A receipt says that one rank's part is durable in the nvme tier, which nobody else can look into; a
failure note that a part will never be there. Must never be needed to read a committed checkpoint.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from resilience.checkpoint.part import directory
from resilience.control.types import CheckpointRef
from resilience.errors import CorruptError
from resilience.journal.records import canonical
from storage_backends.base import Storage

_FORMAT = "resilience-note"
_NAME = re.compile(r"(?:.*/)?rank-(\d+)\.(nvme|failed-[a-z]+)\.json")
_PART = re.compile(r"(?:.*/)?rank-(\d+)\.json")


@dataclass(frozen=True)
class Receipt:
    """One rank's part is durable in a tier of one node.

    Attributes:
        world_size: ranks that the checkpoint needs.
        part: object name of the part, relative to the node's root.
        sha256: of the part's bytes; size: of the pack.
    """

    rank: int
    world_size: int
    node: str
    tier: str
    part: str
    sha256: str
    size: int


@dataclass(frozen=True)
class Failure:
    """One rank's part will never be durable in a tier (``memory``: in none)."""

    rank: int
    node: str
    tier: str
    error: str


def receipt_name(directory: str, rank: int) -> str:
    return f"{directory}/rank-{rank}.nvme.json"


def failure_name(directory: str, rank: int, tier: str) -> str:
    return f"{directory}/rank-{rank}.failed-{tier}.json"


def rank_of_note(name: str) -> int | None:
    """The rank whose note ``name`` is, ``None`` if it is no note."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def rank_of_part(name: str) -> int | None:
    """The rank whose part ``name`` is, ``None`` if it is no part."""
    match = _PART.fullmatch(name)
    return int(match[1]) if match else None


def leave(storage: Storage, ref: CheckpointRef, note: Receipt | Failure) -> None:
    """Put a note beside the save it is about. May run twice."""
    where = directory(ref.step, ref.generation)
    failed = isinstance(note, Failure)
    name = failure_name(where, note.rank, note.tier) if failed else receipt_name(where, note.rank)
    storage.create(name, encode(note))


def encode(note: Receipt | Failure) -> bytes:
    kind = "receipt" if isinstance(note, Receipt) else "failure"
    return canonical({"format": _FORMAT, "version": 1, "kind": kind, **vars(note)}) + b"\n"


def decode(data: bytes, *, path: str) -> Receipt | Failure:
    """``CorruptError`` when the bytes are no note of this version."""
    try:
        fields: dict[str, Any] = json.loads(data)
        if fields.pop("format") != _FORMAT or fields.pop("version") != 1:
            raise ValueError("not a note of version 1")
        kind = Receipt if fields.pop("kind") == "receipt" else Failure
        known = {name: fields[name] for name in kind.__dataclass_fields__}
        for name, value in known.items():
            if type(value) is not (int if name in ("rank", "world_size", "size") else str):
                raise ValueError(f"{name} is {value!r}")
        return kind(**known)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptError(
            f"{path} cannot be read: {type(error).__name__}: {error}",
            operation="read note",
            path=path,
            start=0,
            end=len(data),
            hint="the save it belongs to does not count; nothing that is committed is concerned",
        ) from error
