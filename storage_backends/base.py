"""The one interface to storage: what every backend promises, and nothing more.

A backend holds named byte strings under one root URL. Names are relative, ``/``-separated, made of
``[A-Za-z0-9._-]`` segments. The interface is small on purpose: create-if-absent is the only primitive that
decides anything (the commit log is built on it); everything else moves bytes. Cross-cutting behaviour
(retry, fault injection) is a wrapper over the same interface, never an option of a backend.

Errors, everywhere: ``FileNotFoundError`` the name is absent; ``UnavailableError`` transient, may be retried;
``ExhaustedError`` no space, no quota; ``InvalidError`` not permitted, read-only, malformed name. Anything
else is a bug in the backend. Every method may be called from several threads; a backend object must not be
used across ``fork``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from resilience.errors import InvalidError

_NAME = re.compile(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*")


@dataclass(frozen=True)
class Capabilities:
    """Facts about a backend as data, so that callers never ask for its type.

    Attributes:
        arbitrates: ``create`` has exactly one winner even among racing machines (filled in by ``probe``).
        local: ``path`` returns a local path, so bytes can be read and written without this interface.
    """

    arbitrates: bool
    local: bool


class Sink(Protocol):
    """One object being written. As a context manager: normal exit commits, an exception cancels.

    Nothing is visible under the name before ``commit`` returns; a sink that is neither committed nor
    cancelled (its process died) leaves nothing visible. Not thread-safe.
    """

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes. May buffer."""

    def commit(self) -> None:
        """Make the object durable and visible, replacing an older one of that name. Checks the size."""

    def cancel(self) -> None:
        """Discard everything written. May run twice, and after ``commit`` it does nothing."""

    def __enter__(self) -> Sink: ...

    def __exit__(self, *exc: object) -> None: ...


@runtime_checkable
class Storage(Protocol):
    """Byte strings under names, below one root."""

    @property
    def url(self) -> str:
        """The root, as an fsspec URL (``file:///...``, ``s3://...``, ``memory://...``)."""

    @property
    def capabilities(self) -> Capabilities: ...

    def create(self, name: str, data: bytes) -> bytes | None:
        """Create ``name`` holding ``data`` if it is absent.

        Returns ``None`` when ``name`` now holds exactly ``data``, whether by this call or by an identical
        earlier one (so a call whose reply was lost may run again: callers put a unique id into ``data``).
        Returns the bytes that hold the name when they differ: somebody else won. Readers see all of the
        bytes or nothing; on return they are durable. ``data`` must not be empty (``InvalidError``): an
        empty body defeats conditional writes on some stores. After ``UnavailableError`` the outcome is
        *unknown*, never "failed": the object may still appear.
        """

    def sink(self, name: str) -> Sink:
        """Open ``name`` for streaming. Replaces an existing object at commit: names of data are never
        reused by different contents, so replacing means repeating."""

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes ``start:end`` of the object (``end`` exclusive; ``None`` is its end). Shorter when the
        object is shorter. May run twice."""

    def size(self, name: str) -> int:
        """Size in bytes."""

    def list(self, prefix: str = "") -> list[str]:
        """Full names of the immediate children of the directory ``prefix``, sorted; a child that is itself a
        directory ends in ``/``. Empty when there is no such directory. A *hint*: it may be stale, and no
        decision may rest on what it lacks."""

    def delete(self, name: str) -> None:
        """Remove the object; absent is fine. May run twice."""

    def path(self, name: str) -> Path | None:
        """The local file that holds ``name``, whether it exists yet or not; ``None`` unless
        ``capabilities.local``."""

    def close(self) -> None:
        """Release connections. May run twice."""


def check_name(name: str) -> str:
    """Return ``name`` if it is well formed, else raise ``InvalidError`` saying what is allowed."""
    if not _NAME.fullmatch(name) or any(segment in (".", "..") for segment in name.split("/")):
        raise InvalidError(
            f"{name!r} is not a valid object name",
            operation="storage",
            hint="use /-separated segments of letters, digits, '.', '_' and '-'",
        )
    return name
