"""Records of the commit log as bytes: what one holds, and how damage and newer formats are told apart.

Owns the byte form: canonical JSON (sorted keys, no spaces, ASCII, one trailing newline) whose ``sha256`` is
the digest of the same object without that key, and whose ``prev`` is the SHA-256 of the predecessor's bytes.
Two rules
hold for every version to come, so that an older reader never mistakes one for the other: the form is
    canonical and ``sha256`` covers it, and ``v`` is the version. Pure: reads no storage, no clock, draws no
    ids.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from resilience.errors import CorruptError, InvalidError

VERSION = 1
#: The oldest release of this package that reads ``VERSION``; newer versions write theirs as ``reader``.
READER = "0.1.0"
FIRST_SLOT = 1


class Kind(StrEnum):
    """What a record says happened."""

    FENCE = "fence"  # a generation begins; every older one is over
    CHECKPOINT = "checkpoint"  # all parts of a step are durable in one tier
    RETIRE = "retire"  # checkpoints whose bytes may be deleted, after a grace period
    QUARANTINE = "quarantine"  # a checkpoint that verifies in a tier but must not be used
    FINISH = "finish"  # the run is over


#: What ``fold`` needs of each body, by kind. A fence's body is for people: nothing in it decides anything.
_BODIES: dict[Kind, dict[str, type]] = {
    Kind.FENCE: {},
    Kind.CHECKPOINT: {"step": int, "tier": str, "world_size": int, "parts": list, "size": int},
    Kind.RETIRE: {"refs": list},
    Kind.QUARANTINE: {"step": int, "generation": int, "tier": str, "reason": str},
    Kind.FINISH: {},
}
_ITEMS: dict[str, dict[str, type]] = {
    "parts": {"rank": int, "node": str, "name": str, "sha256": str},
    "refs": {"step": int, "generation": int},
}


@dataclass(frozen=True)
class Record:
    """One slot of the log.

    Attributes:
        slot: its number, from 1; one record per slot, for ever.
        kind: what happened.
        generation: the generation that wrote it (for a fence: the one that begins).
        writer: unique per write, so that a writer whose reply was lost recognises its own record.
        prev: SHA-256 (hex) of the bytes of slot - 1; ``None`` for the first slot.
        body: JSON object; its keys by kind are in docs/format.md.
    """

    slot: int
    kind: Kind
    generation: int
    writer: str
    prev: str | None
    body: dict[str, Any]


def digest(data: bytes) -> str:
    """SHA-256 in hex: what the next record carries as ``prev``."""
    return hashlib.sha256(data).hexdigest()


def canonical(value: object) -> bytes:
    """The one byte form of a JSON value (no newline). ``TypeError`` or ``ValueError`` if it has none."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def plain(body: dict[str, Any]) -> dict[str, Any]:
    """``body`` as it will be read back (tuples become lists); ``InvalidError`` if it is not a JSON object."""
    try:
        value = json.loads(canonical(body))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidError(
            f"the body of a log record is not JSON: {error}",
            operation="commit log",
            hint="use only strings, finite numbers, booleans, None, lists and dicts with string keys",
        ) from error
    if not isinstance(value, dict):
        raise InvalidError(
            f"the body of a log record is a {type(body).__name__}, not a dict",
            operation="commit log",
            hint="pass a dict",
        )
    return value


def check_body(kind: Kind, body: dict[str, Any]) -> str | None:
    """What is wrong with the body of a record of this kind, ``None`` if nothing."""
    for key, kind_of in _BODIES[kind].items():
        if type(body.get(key)) is not kind_of:
            return f"{kind}: {key!r} must be {kind_of.__name__}, got {body.get(key)!r}"
        for index, item in enumerate(body[key] if kind_of is list else ()):
            for name, item_kind in _ITEMS[key].items():
                if not isinstance(item, dict) or type(item.get(name)) is not item_kind:
                    return f"{kind}: {key}[{index}] needs {name!r} as {item_kind.__name__}, got {item!r}"
    return None


def encode(record: Record) -> bytes:
    """The bytes of a record; ``InvalidError`` when its body is not a JSON object. Never empty."""
    fields: dict[str, Any] = {
        "v": VERSION,
        "slot": record.slot,
        "kind": str(record.kind),
        "generation": record.generation,
        "writer": record.writer,
        "prev": record.prev,
        "body": plain(record.body),
    }
    fields["sha256"] = digest(canonical(fields))
    return canonical(fields) + b"\n"


def decode(data: bytes, *, path: str) -> Record:
    """The record in ``data``, read from ``path`` (named in errors).

    Raises ``CorruptError`` when the bytes are not those that were written (any flipped, missing or added
    byte), ``InvalidError`` when they are whole but of a newer format, naming the release that reads it.
    """
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, data, f"not a record: {error}") from error
    if not isinstance(fields, dict):
        raise _damaged(path, data, "not a record: no JSON object")
    unsigned = {key: value for key, value in fields.items() if key != "sha256"}
    try:
        whole = canonical(fields) + b"\n" == data and digest(canonical(unsigned)) == fields.get("sha256")
    except (ValueError, RecursionError):  # NaN or Infinity where a number stood
        whole = False
    if not whole:
        raise _damaged(path, data, "its bytes do not match its sha256")
    version = fields.get("v")
    if type(version) is not int or version != VERSION or fields.get("kind") not in list(Kind):
        raise newer(
            f"{path} is a log record of format {version!r}, kind {fields.get('kind')!r}", path, fields
        )
    slot, generation, prev = fields.get("slot"), fields.get("generation"), fields.get("prev")
    writer, body = fields.get("writer"), fields.get("body")
    if (
        not (type(slot) is int and slot >= FIRST_SLOT)
        or not (type(generation) is int and generation >= 1)
        or not (prev is None if slot == FIRST_SLOT else isinstance(prev, str))
        or not (isinstance(writer, str) and writer)
        or not isinstance(body, dict)
    ):
        raise _damaged(path, data, "a field is missing or has the wrong type")
    return Record(slot, Kind(fields["kind"]), generation, writer, prev, body)


def newer(what: str, path: str, fields: dict[str, Any]) -> InvalidError:
    """The error for something whole that a newer release wrote; ``reader`` in it says which."""
    reader = fields.get("reader")
    release = (
        f"resilience {reader} or newer" if isinstance(reader, str) else f"a resilience newer than {READER}"
    )
    wanted = f"resilience>={reader}" if isinstance(reader, str) else "resilience"
    return InvalidError(
        f"{what}; this package reads format {VERSION}, {release} reads that one",
        operation="read",
        path=path,
        hint=f"pip install --upgrade '{wanted}'",
    )


def _damaged(path: str, data: bytes, why: str) -> CorruptError:
    return CorruptError(
        f"log record {path} is damaged: {why}",
        start=0,
        end=len(data),
        operation="commit log",
        path=path,
        hint="records are never rewritten: bring the object back from a copy or the store's versions of it",
    )
