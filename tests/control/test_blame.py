"""Whose fault it was: what ranks really say when a peer has died, and which sign explains the others."""

from __future__ import annotations

import pytest

from resilience.control import blame
from resilience.control.types import Exit


def signal(exit, at=1.0, rank=0):
    return blame.exited(at, rank, exit, node="n0", card="n0/0")


@pytest.mark.parametrize(
    "error",
    [
        "RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:80",
        "RuntimeError: [/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Read error: Connection reset by peer",
        "RuntimeError: Application timeout caused pair closure",
        "RuntimeError: Timed out waiting 1800000ms for recv operation to complete",
        "RuntimeError: Gloo connectFullMesh failed with [..] Connect timeout",
        "torch.distributed.DistBackendError: NCCL communicator was aborted on rank 1.",
        "DistBackendError: ... ncclRemoteError: A call failed possibly due to a network error or a remote process",
        "RuntimeError: NCCL watchdog thread terminated: Watchdog caught collective operation timeout",
        "torch.distributed.DistNetworkError: Failed to recv, got 0 bytes. Connection was likely closed.",
        "torch.distributed.DistStoreError: wait timeout after 300000ms, keys: /default_pg/0",
        "ConnectionResetError: [Errno 104] Connection reset by peer",
        "BrokenPipeError: [Errno 32] Broken pipe",
        "RuntimeError: EI0006 Getting socket times out",
    ],
)
def test_a_lost_connection_is_never_the_users_error(error):
    assert signal(Exit(code=1, error=error)).strength == blame.CONNECTION


@pytest.mark.parametrize(
    "error",
    [
        "ValueError: bad batch",
        "RuntimeError: mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)",
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB",
        "FileNotFoundError: [Errno 2] No such file or directory: 'data.bin'",
        "KeyError: 'peers'",
        "InvalidError: cannot save model.hook: a function",
    ],
)
def test_an_ordinary_exception_is_the_users(error):
    made = signal(Exit(code=1, error=error))
    assert made.strength == blame.USER
    assert made.kind == "user"


@pytest.mark.parametrize(
    ("exit", "strength", "kind"),
    [
        (Exit(signal=9), blame.KILLED, "signal"),
        (Exit(signal=11), blame.KILLED, "signal"),
        (Exit(signal=6), blame.ABORTED, "signal"),
        (Exit(signal=6, output="what(): Connection closed by peer"), blame.CONNECTION, "signal"),
        (Exit(code=3), blame.EXITED, "exit"),
        (Exit(code=0), blame.EXITED, "exit"),
    ],
)
def test_ways_to_end(exit, strength, kind):
    made = signal(exit)
    assert (made.strength, made.kind) == (strength, kind)


def test_the_strongest_explains_whatever_the_order():
    peers = [signal(Exit(code=1, error="Connection reset by peer"), 1.0, rank) for rank in (0, 1, 3)]
    killed = signal(Exit(signal=9), 1.2, 2)
    assert blame.culprit([*peers, killed]) is killed
    assert blame.culprit([killed, *peers]) is killed


def test_of_equals_the_earliest():
    first, second = (
        signal(Exit(code=1, error="ValueError: a"), 1.0, 3),
        signal(Exit(code=1, error="KeyError: b"), 1.1),
    )
    assert blame.culprit([second, first]) is first
    aborted = signal(Exit(signal=6), 1.05, 1)
    assert blame.culprit([aborted, first]) is first  # a peer that aborts after an exception follows from it
