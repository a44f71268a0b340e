"""What a failure's signals mean, and which of them names the culprit. Pure; no state of its own.

When one rank of a world dies, its peers raise within milliseconds, often before its own death is seen. So
every signal has a strength: a weak one (a lost connection, an exception) waits a moment for a better
explanation, a strong one (a signal from the kernel, a node or card gone) is believed at once. ``unknown`` is
an allowed answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from resilience.control.types import Exit

SETTLE_S = (
    0.5  # how long a weak signal waits for a better one; peers of a dead rank raise within milliseconds
)

# Strengths. From DECISIVE on nothing is waited for.
CONNECTION = 1  # a rank that lost its peers: never the culprit
USER = 2  # an exception of the user's function
ABORTED = (
    2  # abort(): a crash, or what a watchdog does to a rank whose peer failed; of equals the earlier counts
)
DECISIVE = 4
EXITED = 4  # ended without an exception and without having finished; did not start; hangs
KILLED = 5  # SIGKILL, SIGSEGV, SIGBUS ...
RESTORE = 6
HARDWARE = 7  # node or card gone

_SIGNALS = {
    1: "SIGHUP",
    2: "SIGINT",
    3: "SIGQUIT",
    4: "SIGILL",
    5: "SIGTRAP",
    6: "SIGABRT",
    7: "SIGBUS",
    8: "SIGFPE",
    9: "SIGKILL",
    11: "SIGSEGV",
    13: "SIGPIPE",
    15: "SIGTERM",
    19: "SIGSTOP",
    24: "SIGXCPU",
    31: "SIGSYS",
}
_SIGABRT = 6

# The one list of what a rank says that lost its peers: gloo, NCCL, HCCL, the rendezvous store, plain sockets.
_CONNECTION = re.compile(
    r"connection (?:was )?(?:likely )?(?:closed|reset|refused|aborted|lost)"
    r"|connection(?:reset|refused|aborted)error"
    r"|broken ?pipe|socket closed|closed by peer|no route to host|network is unreachable"
    r"|remote process exit|remote end closed|network error"
    r"|timed out waiting \d+ ?ms for (?:recv|send)|connectfullmesh|pair closure|connect timeout"
    r"|nccl communicator was aborted|nccl watchdog|ncclremoteerror|ncclsystemerror|ncclinternalerror"
    r"|watchdog caught collective|collective operation timeout"
    r"|hccl.*(?:timed? ?out|link|socket|peer)|\bEI000[26]\b"
    r"|dist(?:network|backend|store)error|client socket has (?:failed|timed out)|wait timeout after \d+",
    re.IGNORECASE | re.DOTALL,
)


@dataclass(frozen=True)
class Signal:
    """One thing observed that says a generation has failed.

    ``at``: when it was observed; ``failed_at``: last sign of life before it. ``kind``, ``cause`` and
    ``confidence`` are the incident's when this signal is believed. ``again``: a restore that had failed before.
    ``action``: what a card's fault asks for (``faults.Action``), empty for other signals.
    """

    at: float
    failed_at: float
    strength: int
    kind: str
    cause: str
    rank: int | None = None
    node: str | None = None
    card: str | None = None
    confidence: float = 1.0
    exit: Exit | None = None
    again: bool = False
    action: str = ""


def lost_peers(text: str) -> bool:
    """Whether an error's type and message are those of a rank whose peers went away."""
    return _CONNECTION.search(text) is not None


def exited(at: float, rank: int, ended: Exit, *, node: str, card: str) -> Signal:
    """The signal that a rank's end is."""

    def signal(strength: int, kind: str, cause: str, confidence: float = 1.0) -> Signal:
        return Signal(at, at, strength, kind, cause, rank, node, card, confidence, ended)

    if ended.signal is not None:
        name = _SIGNALS.get(ended.signal, f"signal {ended.signal}")
        if ended.signal == _SIGABRT:
            if lost_peers(ended.error + "\n" + ended.output):
                return signal(CONNECTION, "signal", f"rank {rank} aborted after losing its peers", 0.0)
            return signal(ABORTED, "signal", f"rank {rank} aborted (SIGABRT)", 0.7)
        return signal(KILLED, "signal", f"rank {rank} was ended by {name}")
    if ended.error:
        if lost_peers(ended.error):
            return signal(CONNECTION, "exit", f"rank {rank} lost its peers: {_line(ended.error)}", 0.0)
        return signal(USER, "user", f"the training function failed on rank {rank}: {_line(ended.error)}")
    return signal(EXITED, "exit", f"rank {rank} exited with code {ended.code} without finishing")


def culprit(signals: Sequence[Signal]) -> Signal:
    """The signal that explains the others: the strongest, the earliest of equals."""
    return min(signals, key=lambda each: (-each.strength, each.at, -1 if each.rank is None else each.rank))


def _line(text: str) -> str:
    first = text.strip().splitlines()[0] if text.strip() else ""
    return first if len(first) <= 200 else first[:199] + "…"
