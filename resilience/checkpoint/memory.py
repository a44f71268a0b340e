"""How much memory this process may still take: the least of the machine's and its cgroups' headroom.

Owns reading ``/proc/meminfo`` and the cgroup files (v1 and v2). Read only. Must never count swap, and must
never fail where a file is absent: an unknown limit is no limit, the other one still holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Available:
    """Bytes that can be taken without the kernel killing somebody, and which limit says so."""

    bytes: int
    limit: str


def available(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> Available:
    """The least of the machine's available memory and the headroom of every cgroup around this process."""
    found = [Available(_machine(proc), "MemAvailable of this machine")]
    try:
        membership = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        membership = []
    for line in membership:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            found += _walk(cgroups, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            v1 = (cgroups / "memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes")
            found += _walk(*v1, "total_inactive_file")
    return min(found, key=lambda it: it.bytes)


def _machine(proc: Path) -> int:
    for line in (proc / "meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 1 << 62


def _walk(root: Path, path: str, limit: str, usage: str, reclaimable: str) -> list[Available]:
    """Headroom of the cgroup and of those above it (in a container the path may only exist as the root)."""
    found = []
    group = root / path.lstrip("/")
    for directory in [group, *group.parents]:
        if directory != root and root not in directory.parents:
            break
        try:
            maximum = (directory / limit).read_text().strip()
            used = int((directory / usage).read_text())
            stat = (directory / "memory.stat").read_text().splitlines()
        except (OSError, ValueError):
            continue
        if maximum == "max":
            continue
        # Page cache that nobody maps is given back before anybody is killed.
        cache = sum(int(line.split()[1]) for line in stat if line.startswith(f"{reclaimable} "))
        found.append(Available(max(int(maximum) - used + cache, 0), f"cgroup {directory / limit}"))
    return found
