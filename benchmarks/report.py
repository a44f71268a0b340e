"""What every benchmark's JSON has in common: a machine note, raw values, percentiles.

Must never round or drop a raw value: summaries can be computed again, measurements cannot.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import quantiles
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def machine(*packages: str) -> dict[str, Any]:
    """Cores, memory, kernel, load and versions, so that a figure can be judged later."""
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "from the source tree" if package == "resilience" else "not installed"
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": _cpu(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_before": os.getloadavg(),
        "versions": versions,
        "commit": _commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def peak_bytes() -> int:
    """The most memory this process ever had resident. Not ``ru_maxrss``: that begins with its parent's."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024


def percentiles(values: list[float]) -> dict[str, float]:
    """p50, p95, min and max (linear between order statistics); empty for no values."""
    if not values:
        return {}
    cuts = quantiles(values, n=20, method="inclusive") if len(values) > 1 else values * 19
    return {"p50": cuts[9], "p95": cuts[18], "min": min(values), "max": max(values)}


def write(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"command": " ".join(sys.orig_argv[1:]), **results}, indent=1) + "\n")
    print(f"written to {os.path.relpath(path)}")


def _cpu() -> str:
    with open("/proc/cpuinfo") as file:
        names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"
