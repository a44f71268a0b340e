"""Doors: how a new start of a run finds writers of an older one on its node, and waits for them.

Owns the abstract unix sockets (no file, gone with their process) behind which a writer whose rank has ended still
works. Must never wait for a writer whose rank lives.
"""

from __future__ import annotations

import contextlib
import hashlib
import socket
import time
from pathlib import Path

_PREFIX = "resilience-heir-"
SERVED = b"."  # everything near is written


def door_name(url: str) -> str:
    """The name shared by the doors of all writers of the run at ``url``."""
    return _PREFIX + hashlib.sha256(url.encode()).hexdigest()[:24]


def door_address(name: str, pid: int) -> str:
    return f"\0{name}-{pid}"


def wait_at_doors(name: str, *, deadline: float, table: Path = Path("/proc/net/unix")) -> list[str]:
    """Wait until every writer of that name whose rank is gone has made durable, in the nearest tier, what was sealed.

    Returns the doors at which that took longer than ``deadline`` seconds.
    """
    end = time.monotonic() + deadline
    late = []
    for address in _doors(name, table):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as visitor:
            visitor.settimeout(max(0.1, end - time.monotonic()))
            try:
                visitor.connect("\0" + address)
                visitor.recv(1)  # a word, or the end of the writer
            except TimeoutError:
                late.append(address)
            except OSError:
                continue  # it is gone
    return late


def _doors(name: str, table: Path) -> list[str]:
    found = set()
    with contextlib.suppress(OSError), table.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            address = line.split()[-1]
            if address.startswith(f"@{name}-"):
                found.add(address[1:])
    return sorted(found)
