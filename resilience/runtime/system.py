"""The few system calls Python's standard library has no name for."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import signal
import sys
import threading

_PR_SET_PDEATHSIG = 1
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}  # the system call's number
_IOPRIO_WHO_PROCESS = 1
_IOPRIO_BEST_EFFORT = 2
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the thread that made it ends; exit at once if ``parent`` is gone.

    The last line of defence against processes left behind: it works for a process that is stopped or stuck.
    """
    if _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        os._exit(0)


def yield_to_others(nice: int, *, disk: bool) -> None:
    """Lower the priority of this thread, and of those it starts, for the processor and, if ``disk``, for that too.
    Where the kernel does not want to (a sandbox, another architecture) they keep the one they have: slower for
    others, no less right."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
    if not disk:
        return
    number = _IOPRIO_SET.get(platform.machine())
    if number is not None:
        # Best effort, lowest level; the idle class could starve a drain for ever.
        _libc.syscall(number, _IOPRIO_WHO_PROCESS, threading.get_native_id(), _IOPRIO_BEST_EFFORT << 13 | 7)


def process_state(pid: int) -> str:
    """The kernel's state letter of ``pid`` (``R S D T Z``), ``X`` when it is gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(") ")[2][:1] or "X"
    except OSError:
        return "X"


def python_command(module: str, *arguments: str) -> list[str]:
    """Command that runs ``module`` of this installation in a new interpreter."""
    return [sys.executable, "-m", module, *arguments]
