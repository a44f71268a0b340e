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
        arbitrates: ``create`` has exactly one winner even among racing machines. On a backend this is a
            claim; in the answer of ``probe`` it has been tried.
        local: ``path`` returns a local path, so bytes can be read and written without this interface.
        reason: why the backend does not arbitrate; empty where it does.
    """

    arbitrates: bool
    local: bool
    reason: str = ""


class Sink(Protocol):
    """One object being written. As a context manager: normal exit commits, an exception cancels.

    Nothing is visible under the name before ``commit`` returns; a sink that is neither committed nor
    cancelled (its process died, the object was garbage-collected) leaves nothing visible. Not thread-safe.

    Never retried from inside: after any error the sink is dead (a second fsync or a second completion may
    report a success that did not happen). Cancel it and write the whole object again through a new sink,
    which is safe because names of data are never reused by different contents. After ``UnavailableError``
    from ``commit`` the object may be visible, but then it is whole.
    """

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes. May buffer, and may go on reading ``data`` after it has returned: the bytes must stay as
        they are until ``commit`` or ``cancel`` has. Bounded: it waits while too much is on its way."""

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
        bytes or nothing; on return they are durable, whoever wrote them. ``data`` must not be empty
        (``InvalidError``): an empty body defeats conditional writes on some stores. After
        ``UnavailableError`` the outcome is *unknown*, never "failed": the object may still appear.
        """

    def sink(self, name: str, size: int | None = None) -> Sink:
        """Open ``name`` for streaming. Replaces an existing object at commit: names of data are never
        reused by different contents, so replacing means repeating.

        ``size`` is how many bytes there will be, where that is known. A hint, so that space can be taken at once
        and large blocks go past caches: what counts is what is written."""

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes ``start:end`` of the object (``end`` exclusive; ``None`` is its end). Shorter when the
        object is shorter, empty past its end; negative bounds are ``InvalidError``. May run twice."""

    def size(self, name: str) -> int:
        """Size in bytes."""

    def link(self, source: str, target: str) -> bool:
        """Give the object ``source`` a second name without moving its bytes through this process: a hard link,
        or a copy that the store makes itself. ``True``: ``target`` holds the bytes, durably and whole, whatever
        becomes of ``source``, replacing what was there. ``False``: this store cannot; nothing was done. May run
        twice. Neither name may be written to afterwards."""

    def list(self, prefix: str = "") -> list[str]:
        """Full names of the immediate children of the directory ``prefix``, sorted; a child that is itself a
        directory ends in ``/`` (and may be handed back as it is). Empty when there is no such directory.
        What has no well-formed name (temporary files) is left out. A *hint*: it may be stale, a directory
        whose last object was deleted may or may not appear, and no decision may rest on what it lacks."""

    def delete(self, name: str) -> None:
        """Remove the object; absent is fine. Not durable by itself: after a power loss the object may be
        back. May run twice."""

    def delete_all(self, prefix: str) -> None:
        """Remove every object below the directory ``prefix``, with what dead writers left there (temporary
        files, unfinished uploads); absent is fine. Only for directories in which nobody writes any more.
        Not atomic: after an error some objects may be gone. May run twice."""

    def path(self, name: str) -> Path | None:
        """The local file that holds ``name``, whether it exists yet or not; ``None`` unless
        ``capabilities.local``."""

    def close(self) -> None:
        """Release connections. May run twice."""


def well_formed(name: str) -> bool:
    """Whether ``name`` is one that this interface can address."""
    return bool(_NAME.fullmatch(name)) and not any(segment in (".", "..") for segment in name.split("/"))


def check_name(name: str) -> str:
    """Return ``name`` if it is well formed, else raise ``InvalidError`` saying what is allowed."""
    if not well_formed(name):
        raise InvalidError(
            f"{name!r} is not a valid object name",
            operation="storage",
            hint="use /-separated segments of letters, digits, '.', '_' and '-'",
        )
    return name


def check_directory(prefix: str, *, root: bool = True) -> str:
    """``prefix`` without its final ``/``; "" is the root, refused unless ``root``. For backends."""
    prefix = prefix.removesuffix("/")
    return prefix if root and not prefix else check_name(prefix)


def check_data(data: bytes, name: str) -> None:
    """Refuse the empty body, for ``create``. For backends."""
    if not data:
        raise InvalidError(
            f"cannot create {name} empty",
            operation="create",
            path=name,
            hint="put at least the writer's id into it: some stores overwrite with an empty body",
        )


def check_range(start: int, end: int | None, name: str) -> None:
    """Refuse negative bounds: backends disagree on what they mean. For backends."""
    if start < 0 or (end is not None and end < 0):
        raise InvalidError(
            f"cannot read bytes {start}:{end} of {name}",
            operation="read",
            path=name,
            hint="count from the beginning of the object; size() tells its end",
        )
