"""What ``Checkpointer`` takes, checked when given."""

from __future__ import annotations

import math
import os
import re
import socket
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from resilience.errors import InvalidError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Settings:
    """See ``Checkpointer``. ``url`` and ``nvme`` become absolute, ``name`` and ``node`` are filled in."""

    url: str
    nvme: str | None
    rank: int
    world_size: int
    name: str
    node: str
    session: str | None
    keep_last: int
    keep_every: int | None
    replicated: frozenset[str] | bool
    threads: int
    deadline: float

    @classmethod
    def of(
        cls,
        url: Any,
        nvme: Any,
        rank: Any,
        world_size: Any,
        *,
        name: Any,
        node: Any,
        session: Any,
        keep_last: Any,
        keep_every: Any,
        replicated: Any,
        threads: Any,
        deadline: Any,
    ) -> Settings:
        """Raises ``InvalidError``: what was given, and what is allowed."""
        for key, value, least in (
            ("world_size", world_size, 1),
            ("keep_last", keep_last, 1),
            ("threads", threads, 1),
            ("keep_every", 1 if keep_every is None else keep_every, 1),
            ("rank", rank, 0),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise _refused(key, value, f"an integer >= {least}")
        if rank >= world_size:
            raise _refused("rank", rank, f"a number below world_size, {world_size}")
        for key, place in (("url", url), ("nvme", nvme)):
            if not (isinstance(place, str | os.PathLike) and str(place)) and (
                place is not None or key == "url"
            ):
                raise _refused(key, place, "a path" + (" or an fsspec URL" if key == "url" else ""))
        root = _absolute(str(url))
        if root.startswith("memory:"):
            raise _refused("url", str(url), "storage that other processes see: the writer is one")
        found = root.rstrip("/").rpartition("/")[2] if name is None else name
        if not isinstance(found, str) or not _NAME.fullmatch(found):
            raise _refused(
                "name", found, "letters, digits, '.', '_' and '-', at most 100 (default: the end of url)"
            )
        here = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname()).lstrip("._-") or "node"
        if node is not None and not (isinstance(node, str) and _NAME.fullmatch(node)):
            raise _refused("node", node, "letters, digits, '.', '_' and '-', at most 100")
        if session is not None and not (isinstance(session, str) and session):
            raise _refused("session", session, "a text that all ranks of this start share")
        if not isinstance(deadline, int | float) or isinstance(deadline, bool) or not 0 < deadline < math.inf:
            raise _refused("deadline", deadline, "a number of seconds > 0")
        return cls(
            root,
            None if nvme is None else _absolute(str(nvme)),
            rank,
            world_size,
            found,
            node or here,
            session,
            keep_last,
            keep_every,
            _replicated(replicated),
            threads,
            float(deadline),
        )


def _replicated(given: Any) -> frozenset[str] | bool:
    if isinstance(given, bool):
        return given
    if (
        isinstance(given, str)
        or not isinstance(given, Collection)
        or not all(isinstance(name, str) and name for name in given)
    ):
        raise _refused("replicated", given, "True, or names such as ('model', 'optimizer/step')")
    return frozenset(name.strip("/") for name in given)


def _absolute(url: str) -> str:
    return url if "://" in url else os.path.abspath(os.path.expanduser(url))


def _refused(name: str, value: Any, allowed: str) -> InvalidError:
    return InvalidError(
        f"{name}={value!r} is not allowed: give {allowed}",
        operation="Checkpointer",
        path=name,
        hint=f"set {name} to {allowed}",
    )
