"""One snapshot of a run as a rich panel: what the live view and ``resilience status`` show.

Owns layout and colours only. Shows what the snapshot holds and leaves out what it does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from resilience.history.format import count, seconds
from resilience.history.live import Snapshot, checkpoint, incidents, progress, waiting

_BARS = "▁▂▃▄▅▆▇█"
_COLOURS = {"active": "green", "spare": "cyan", "failed": "red", "lost": "red"}
_PHASES = {"running": "green", "done": "bold", "waiting": "yellow", "stopping": "yellow"}


def panel(snapshot: Snapshot, losses: Sequence[float] = ()) -> RenderableType:
    """The panel. ``losses`` are the last values of the loss, oldest first, drawn as a small curve."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    phase = snapshot.get("phase", "?")
    state = Text(snapshot.get("result") or phase, style=_PHASES.get(phase, "yellow"))
    if snapshot.get("generation"):
        state.append(f"  generation {snapshot['generation']}", style="none")
    if incidents(snapshot):
        state.append(f"  {count(incidents(snapshot), 'incident')}", style="none")
    grid.add_row("state", state)
    if snapshot.get("waiting"):
        grid.add_row("waiting", Text(waiting(snapshot["waiting"]), style="yellow"))
    grid.add_row("progress", _progress(snapshot))
    if isinstance(snapshot.get("loss"), int | float):
        grid.add_row("loss", Text(f"{snapshot['loss']:.4f}  ").append(spark(losses), style="cyan"))
    grid.add_row("checkpoint", _checkpoints(snapshot))
    if snapshot.get("cards"):
        grid.add_row("cards", _cards(snapshot["cards"]))
    for node in snapshot.get("nodes") or ():
        grid.add_row("node", _node(node))
    parts: list[RenderableType] = [grid]
    if snapshot.get("recovering"):
        parts.append(Text(f"recovering from: {snapshot['recovering']}", style="bold yellow"))
    if snapshot.get("silent"):
        heard = snapshot.get("heard_s")
        ago = "never" if heard is None else f"{seconds(heard)} ago"
        parts.append(Text(f"last heard of: {ago}; its supervisor may be gone", style="bold red"))
    if snapshot.get("warning"):
        parts.append(Text(f"warning: {snapshot['warning']}", style="yellow"))
    if snapshot.get("warnings"):
        text = f"{count(snapshot['warnings'], 'warning')} in its journal: see resilience history {snapshot.get('run')}"
        parts.append(Text(text, style="yellow"))
    title = Text(f" {snapshot.get('run', 'run')} ", style="bold")
    return Panel(Group(*parts), title=title, title_align="left", subtitle=seconds(snapshot.get("elapsed_s")))


def spark(values: Sequence[float]) -> str:
    """A curve one character high; not-finite values are gaps."""
    finite = [v for v in values if v == v and abs(v) != float("inf")]
    if len(finite) < 2:
        return ""
    low, high = min(finite), max(finite)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((v - low) * scale)] if v in finite else " " for v in values)


def _progress(snapshot: Snapshot) -> RenderableType:
    text = Text(progress(snapshot))
    total, step = snapshot.get("steps"), snapshot.get("step")
    if not total or step is None:
        return text
    return Group(text, ProgressBar(total=total, completed=step, width=40))


def _checkpoints(snapshot: Snapshot) -> Text:
    tiers = snapshot.get("checkpoints")
    if not tiers:
        return Text(checkpoint(snapshot).removeprefix("checkpoint "))
    lines = [f"step {it['step']} in {tier}, {seconds(it['age_s'])} old" for tier, it in sorted(tiers.items())]
    return Text("\n".join(lines))


def _cards(cards: dict[str, int]) -> Text:
    text = Text()
    for state, number in cards.items():
        if number:
            text.append(f"{'■' * min(number, 32)} {number} {state}  ", style=_COLOURS.get(state, "none"))
    return text


def _node(node: dict[str, Any]) -> Text:
    text = Text(node["name"])
    if node.get("levels"):
        text.append(f" ({'/'.join(node['levels'])})", style="dim")
    ranks = node.get("ranks")
    text.append(f"  {count(node.get('cards'), 'card')}")
    text.append(
        f"  ranks {' '.join(map(str, ranks))}" if ranks else "  no ranks", style="none" if ranks else "dim"
    )
    if node.get("state") not in (None, "up"):
        text.append(f"  {node['state']}", style="red")
    return text
