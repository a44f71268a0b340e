"""What a run must not leave behind: processes, sockets, shared memory, temporary files.

Our processes carry their run's name on the command line (their forks too). Shared memory of ours is memfds and
sockets are pairs, which end with their last process; so processes are what can leak, and files in ``/dev/shm``
and the temporary directory are looked at only to prove that there are none.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import psutil


def processes_of(run: str) -> list[str]:
    """``pid command`` of every process of ``run`` that still lives."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        command = process.info["cmdline"] or []
        ours = (
            any(part.startswith(("resilience.runtime.", "resilience.engine.")) for part in command)
            and run in command
        )
        if ours and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(f"{process.pid} {' '.join(command)}")
    return found


def files_of_ours() -> set[str]:
    """Files in shared memory and the temporary directory that bear our name."""
    places = (Path("/dev/shm"), Path(tempfile.gettempdir()))
    return {str(path) for place in places if place.is_dir() for path in place.glob("resilience-*")}


def wait_until_gone(run: str, timeout: float = 30.0) -> list[str]:
    """What is left of ``run`` after at most ``timeout`` seconds: the kernel needs a moment to end what was killed."""
    deadline = time.monotonic() + timeout
    while (left := processes_of(run)) and time.monotonic() < deadline:
        psutil.wait_procs([found for line in left for found in _handle(int(line.split()[0]))], 0.1)
    return left


def _handle(pid: int) -> list[psutil.Process]:
    """The process, or nothing: it may have ended since it was seen."""
    try:
        return [psutil.Process(pid)]
    except psutil.NoSuchProcess:
        return []
