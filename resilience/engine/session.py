"""Sessions: how the ranks of one start recognise each other in the commit log.

Owns the session id, equal on all ranks of a start and on no other start, and finding the generation that rank 0
fenced under it. Nobody talks over the training group, but for one broadcast where there is nothing else to go by.
"""

from __future__ import annotations

import os
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from resilience.errors import InvalidError, UnavailableError
from resilience.journal.log import CommitLog
from resilience.journal.records import Kind, Record

_FIRST_LOOK_S = 0.02
_LONGEST_LOOK_S = 1.0


def session_id(
    given: str | None, *, rank: int, world_size: int, environment: Mapping[str, str] = os.environ
) -> str:
    """The id of this start.

    Args:
        given: by the user; must differ from start to start.

    Raises:
        InvalidError: several ranks, and nothing that only they share.
    """
    if given is not None:
        return given
    if world_size == 1:
        return uuid.uuid4().hex
    distributed = _initialised_group(world_size)
    if distributed is not None:
        return _broadcast(distributed, rank)
    if environment.get("TORCHELASTIC_RUN_ID") and environment.get("TORCHELASTIC_RESTART_COUNT"):
        parts = [environment["TORCHELASTIC_RUN_ID"], environment["TORCHELASTIC_RESTART_COUNT"]]
        if environment.get("LOCAL_WORLD_SIZE") == environment.get("WORLD_SIZE"):
            # On one node all ranks are children of one launcher, and no other start has the same one. Without this a
            # launcher with a fixed id (torchrun's default is "none") would look the same each time it is started.
            parts += [str(os.getppid()), _started(os.getppid())]
        return "torchrun/" + "/".join(parts)
    raise InvalidError(
        f"{world_size} ranks, and nothing tells which of them belong to one start",
        operation="Checkpointer",
        path="session",
        hint="give session= an id that all ranks of this start share and no other start has (a job's number and its "
        "attempt), or start with torchrun, or call torch.distributed.init_process_group() first",
    )


def _initialised_group(world_size: int) -> Any:
    torch = sys.modules.get("torch")
    distributed = getattr(torch, "distributed", None)
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    return distributed if distributed.get_world_size() == world_size else None


def _broadcast(distributed: Any, rank: int) -> str:
    """Rank 0's new id, to all. Bytes in a tensor: objects would travel as pickle."""
    torch = sys.modules["torch"]
    device = "cpu"
    if distributed.get_backend() in ("nccl", "hccl"):
        device = "cuda" if distributed.get_backend() == "nccl" else "npu"
    raw = list(uuid.uuid4().bytes) if distributed.get_rank() == 0 else [0] * 16
    tensor = torch.tensor(raw, dtype=torch.uint8, device=device)
    distributed.broadcast(tensor, src=0)
    return bytes(tensor.cpu().tolist()).hex()


def _started(pid: int) -> str:
    """When a process began, in the kernel's ticks: with its number, unique on this machine until it boots again."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            ticks = file.read().rpartition(") ")[2].split()[19]
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{ticks}/{file.read().strip()}"
    except (OSError, IndexError):
        return "0"


def find(records: tuple[Record, ...], session: str) -> Record | None:
    """The newest fence of ``session``."""
    fences = [record for record in records if record.kind is Kind.FENCE]
    return next((fence for fence in reversed(fences) if fence.body.get("session") == session), None)


def join(
    log: CommitLog,
    session: str,
    *,
    deadline: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """The generation that rank 0 has fenced for ``session``; waits for it ``deadline`` seconds.

    Raises:
        UnavailableError: it has not.
    """
    end = clock() + deadline
    pause = _FIRST_LOOK_S
    while True:
        fence = find(log.refresh(), session)
        if fence is not None:
            return fence.generation
        if clock() > end:
            raise UnavailableError(
                f"rank 0 has not begun session {session!r} within {deadline:g} s",
                operation="Checkpointer",
                hint="look at what rank 0 says: it must make a Checkpointer for the same url and session",
            )
        sleep(pause)
        pause = min(_LONGEST_LOOK_S, 1.5 * pause)
