"""How people read times, sizes and names, and the console they are printed on.

Owns the wording of single values; must never hold a unit back. ASCII only: output goes to pipes and log files.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_PIPE_WIDTH = 160  # without a terminal nobody wraps for us: wide enough that no table has to


def console(*, stderr: bool = False) -> Console:
    """A console on stdout (or stderr) as it is right now; colours only in a terminal and without NO_COLOR."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or os.environ.get("COLUMNS") else _PIPE_WIDTH
    return Console(file=stream, width=width, highlight=False, emoji=False, markup=False, soft_wrap=False)


def seconds(value: float | None) -> str:
    """A duration at about three digits: ``0.042 s``, ``3.1 s``, ``2 min 05 s``, ``3 h 20 min``, ``2 d 4 h``."""
    if value is None:
        return "-"
    if value < 0:
        return f"-{seconds(-value)}"
    if value < 0.9995:
        return f"{value:.3f} s"
    if value < 59.95:
        return f"{value:.1f} s" if value >= 9.995 else f"{value:.2f} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def size(value: float | None) -> str:
    """Bytes in binary units: ``512 B``, ``4.0 KiB``, ``1.5 GiB``."""
    if value is None:
        return "-"
    if value < 1024:
        return f"{value:.0f} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        value /= 1024
        if value < 1023.95:
            return f"{value:.1f} {unit}"
    return f"{value / 1024:.1f} PiB"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def number(value: float | None) -> str:
    return "-" if value is None else str(value)


def count(value: int | None, noun: str) -> str:
    """``1 step``, ``5 steps``, ``- steps``."""
    return f"{number(value)} {noun}{'' if value == 1 else 's'}"


def moment(value: str | None) -> str:
    """An ISO time in UTC as ``2026-01-31 12:00:05``."""
    return "-" if not value else value[:19].replace("T", " ")


def blamed(row: dict[str, Any]) -> str:
    """Who an incident blames: ``rank 2 on node-b/0``, ``node-b``, ``unknown``."""
    rank, place = row.get("rank"), row.get("card") or row.get("node")
    names = [
        f"rank {rank}" if rank is not None else "",
        f"on {place}" if rank is not None and place else place or "",
    ]
    return " ".join(name for name in names if name) or "unknown"
