"""The live view of a run: a panel in a terminal, lines elsewhere, JSON lines for programs, or nothing.

Owns what is worth a line and when. It is fed plain dicts and never asks anybody for anything; a key that is
missing is simply not shown. Progress goes to stderr (stdout belongs to the caller's program), JSON lines to stdout.
"""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TextIO

from resilience.errors import InvalidError
from resilience.history.format import count, seconds
from resilience.history.query import jsonable

if TYPE_CHECKING:
    from rich.live import Live

Snapshot = dict[str, Any]
MODES = ("auto", "plain", "json", "none")
_EVERY_S = 1.0  # between two lines that only say that steps go on
_LATER_S = 10.0  # the same, once a run is over a minute old
_KEPT_LOSSES = 48
_TURNS = (
    "phase",
    "waiting",
    "generation",
    "recovering",
    "incidents",
    "cards",
    "warning",
    "result",
    "attached",
)


class LiveView:
    """Shows snapshots of one run. A context manager; ``update`` from one thread.

    Args:
        mode: ``auto`` (a panel if stderr is a terminal, else ``plain``), ``plain``, ``json``, ``none``.
        stream: where to write; default stderr, for ``json`` stdout.
        clock: monotonic seconds.
    """

    def __init__(
        self, mode: str = "auto", *, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if mode not in MODES:
            raise InvalidError(
                f"view {mode!r} is unknown", operation="view", hint=f"one of {', '.join(MODES)}"
            )
        self._stream = stream or (sys.stdout if mode == "json" else sys.stderr)
        if mode == "auto":
            mode = "panel" if self._stream.isatty() else "plain"
        self._mode = mode
        self._clock = clock
        self._began = clock()
        self._shown_at = -_LATER_S
        self._shown: Snapshot = {}
        self._newest: Snapshot = {}
        self._losses: deque[float] = deque(maxlen=_KEPT_LOSSES)
        self._live: Live | None = None

    def __enter__(self) -> LiveView:
        self._began = self._clock()
        if self._mode == "panel":
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(file=self._stream, highlight=False), auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        elif self._newest and _steady(self._newest) != _steady(self._shown):
            self._write(self._newest)  # the end is always told

    def update(self, snapshot: Snapshot) -> None:
        """Show the run as it is now. Cheap: call it as often as there is news."""
        if self._mode == "none":
            return
        now = self._clock()
        snapshot = {"elapsed_s": now - self._began, **snapshot}
        self._newest = snapshot
        loss = snapshot.get("loss")
        if isinstance(loss, int | float) and (not self._losses or loss != self._losses[-1]):
            self._losses.append(loss)
        if self._live is not None:
            from resilience.history.panel import panel

            self._live.update(panel(snapshot, list(self._losses)), refresh=True)
        elif self._due(snapshot, now):
            self._shown_at = now
            self._write(snapshot)

    def _due(self, snapshot: Snapshot, now: float) -> bool:
        if _turn(snapshot) != _turn(self._shown):
            return True
        every = _EVERY_S if now - self._began < 60 else _LATER_S
        return now - self._shown_at >= every and _steady(snapshot) != _steady(self._shown)

    def _write(self, snapshot: Snapshot) -> None:
        self._shown = snapshot
        text = (
            json.dumps(jsonable(snapshot), separators=(",", ":")) if self._mode == "json" else line(snapshot)
        )
        self._stream.write(text + "\n")
        self._stream.flush()


def line(snapshot: Snapshot) -> str:
    """A snapshot in one line of plain text."""
    parts = [
        f"[{seconds(snapshot.get('elapsed_s')):>9}] {snapshot.get('result') or snapshot.get('phase', '?')}"
    ]
    if snapshot.get("waiting"):
        parts.append(waiting(snapshot["waiting"]))
    if snapshot.get("attached"):
        parts.append("attached to a run that is going")
    if snapshot.get("generation"):
        parts.append(f"generation {snapshot['generation']}")
    parts.append(progress(snapshot))
    if isinstance(snapshot.get("loss"), int | float):
        parts.append(f"loss {snapshot['loss']:.4f}")
    parts.append(checkpoint(snapshot))
    cards = {state: n for state, n in (snapshot.get("cards") or {}).items() if n}
    if cards:
        parts.append("cards: " + " ".join(f"{n} {state}" for state, n in cards.items()))
    if incidents(snapshot):
        parts.append(count(incidents(snapshot), "incident"))
    if snapshot.get("recovering"):
        parts.append(f"recovering from: {snapshot['recovering']}")
    if snapshot.get("warning"):
        parts.append(f"warning: {' '.join(str(snapshot['warning']).split())}")
    return ", ".join(parts)


def lines(snapshot: Snapshot) -> str:
    """A snapshot as a few lines of plain text: the summary, then one line a tier, a node and a complaint."""
    told = [line(snapshot)]
    for tier, it in sorted((snapshot.get("checkpoints") or {}).items()):
        told.append(
            f"checkpoint in {tier}: step {it['step']}, generation {it['generation']}, {seconds(it['age_s'])} old"
        )
    for node in snapshot.get("nodes") or ():
        ranks = " ".join(map(str, node.get("ranks") or ())) or "none"
        told.append(
            f"node {node['name']}: {node.get('state', 'up')}, {count(node.get('cards'), 'card')}, ranks {ranks}"
        )
    if snapshot.get("reason"):
        told.append(f"reason: {snapshot['reason']}")
    if snapshot.get("silent"):
        heard = snapshot.get("heard_s")
        ago = "never" if heard is None else f"{seconds(heard)} ago"
        told.append(f"last heard of: {ago}; its supervisor may be gone")
    if snapshot.get("warnings"):
        told.append(f"{count(snapshot['warnings'], 'warning')}: see resilience history {snapshot.get('run')}")
    return "\n".join(told)


def waiting(it: dict[str, Any]) -> str:
    """``4 GPUs needed, 2 there, waits up to 300 s for more``."""
    left = f"waits up to {it['deadline_s']:g} s for more"
    return f"{count(it['needed'], it.get('card') or 'card')} needed, {it['available']} there, {left}"


def progress(snapshot: Snapshot) -> str:
    """``step 120 of 600``."""
    total = f" of {snapshot['steps']}" if snapshot.get("steps") else ""
    step = snapshot.get("step")
    return f"step {'-' if step is None else step}{total}"


def checkpoint(snapshot: Snapshot) -> str:
    """``checkpoint 100 (shared, 1.2 s old)``."""
    newest = snapshot.get("checkpoint")
    if not newest:
        return "no checkpoint yet"
    age = newest.get("age_s")
    old = "" if age is None else f", {seconds(age)} old"
    return f"checkpoint {newest['step']} ({newest['tier']}{old})"


def incidents(snapshot: Snapshot) -> int:
    """How many there were: snapshots carry the number, or the list."""
    found = snapshot.get("incidents") or 0
    return found if isinstance(found, int) else len(found)


def _turn(snapshot: Snapshot) -> list[Any]:
    """What is worth a line at once when it changes."""
    return [snapshot.get(key) for key in _TURNS]


def _steady(snapshot: Snapshot) -> list[Any]:
    """What counts as a change at all: not ages, which always change."""
    newest = snapshot.get("checkpoint") or {}
    return [
        *_turn(snapshot),
        snapshot.get("step"),
        snapshot.get("loss"),
        newest.get("step"),
        newest.get("tier"),
    ]
