"""The loss curve of a run with its incidents: as a PNG where matplotlib is installed, else as text.

Owns what the picture shows: the surviving curve, the steps that were undone, where each incident threw it back, and
the checkpoints. Reads the views ``metrics``, ``metrics_all``, ``incidents`` and ``checkpoints`` only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from resilience.errors import InvalidError
from resilience.history.format import count

if TYPE_CHECKING:
    from resilience.history.query import History

Curve = list[tuple[int, float]]
_INK, _CURVE, _LOST, _INCIDENT, _CHECKPOINT = "#333333", "#1f5fa8", "#e08a1e", "#b3261e", "#2e7d32"


@dataclass(frozen=True)
class Drawing:
    """What is drawn.

    Attributes:
        name: of the metric.
        curve: (step, value), the surviving ones.
        undone: one curve for each generation whose last steps a restore threw away.
        incidents: (step it happened at, step it went back to or None, short label).
        checkpoints: steps of checkpoints that are in the log.
    """

    run: str
    name: str
    curve: Curve
    undone: list[Curve]
    incidents: list[tuple[int, int | None, str]]
    checkpoints: list[int]


def drawing(history: History, run: str | None = None, metric: str | None = None) -> Drawing:
    """Collect what is to be drawn.

    Args:
        metric: name of a logged value; default ``loss``, or the first one there is.

    Raises:
        InvalidError: the run logged no such value (the hint says which there are).
    """
    name = run or history.run or history.runs[0]["run"]
    known = [
        row["name"]
        for row in history.sql("SELECT DISTINCT name FROM metrics_all WHERE run = ? ORDER BY 1", [name])
    ]
    wanted = metric or ("loss" if "loss" in known or not known else known[0])
    if wanted not in known:
        raise InvalidError(
            f"run {name!r} logged no {wanted!r}",
            operation="picture",
            hint=f"it logged: {', '.join(known)}"
            if known
            else "call run.log(loss=...) in the training function",
        )
    rows = history.sql(
        "SELECT generation, step, value, kept, lag(kept) OVER steps AS before FROM ("
        "  SELECT generation, step, kept, value FROM metrics_all WHERE run = $1 AND name = $2"
        # One rank's values only: another rank's loss is of other samples, and would look like a jump.
        "  AND rank = (SELECT min(rank) FROM metrics_all WHERE run = $1 AND name = $2))"
        " WINDOW steps AS (PARTITION BY generation ORDER BY step) ORDER BY generation, step",
        [name, wanted],
    )
    curve = sorted((row["step"], _value(row["value"])) for row in rows if row["kept"])
    undone: dict[int, Curve] = {}
    kept = dict(curve)
    for row in rows:
        if not row["kept"]:
            started = undone.setdefault(row["generation"], [])
            if not started and row["before"] and row["step"] - 1 in kept:
                started.append((row["step"] - 1, kept[row["step"] - 1]))  # joined to the curve it leaves
            started.append((row["step"], _value(row["value"])))
    incidents = [
        (row["step_failed"], row["step_restored"], f"{row['kind'] or 'incident'} {_short(row)}".strip())
        for row in history.rows("incidents")
        if row["run"] == name and row["step_failed"] is not None
    ]
    checkpoints = sorted({row["step"] for row in history.checkpoints if row["run"] == name})
    return Drawing(name, wanted, curve, list(undone.values()), incidents, checkpoints)


def picture(
    history: History, path: str | Path, run: str | None = None, *, metric: str | None = None
) -> Path | None:
    """Write the PNG to ``path`` and return it, or ``None`` when matplotlib is not installed (use ``text``)."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    it = drawing(history, run, metric)
    figure = Figure(figsize=(9, 4.2), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, curve in enumerate(it.undone):
        # Broad, beneath the curve: where training is deterministic the steps done again give the same values.
        label = "undone by a restore" if number == 0 else None
        axes.plot(*_columns(curve), color=_LOST, linewidth=5, alpha=0.4, label=label)
    axes.plot(*_columns(it.curve), color=_CURVE, linewidth=1.6, label=f"{it.name} that survived")
    for number, (failed, restored, text) in enumerate(it.incidents):
        axes.axvline(failed, color=_INCIDENT, linewidth=1.0, label="incident" if number == 0 else None)
        if restored is not None and restored < failed:
            axes.axvspan(restored, failed, color=_INCIDENT, alpha=0.08, linewidth=0)
        height = 0.97 - 0.08 * (number % 4)  # neighbours do not write over each other
        axes.annotate(
            text,
            xy=(failed, height),
            xycoords=axes.get_xaxis_transform(),
            xytext=(4, 0),
            textcoords="offset points",
            color=_INCIDENT,
            fontsize=8,
            va="top",
        )
    if it.checkpoints:
        base = [0.0] * len(it.checkpoints)
        transform = axes.get_xaxis_transform()
        axes.plot(
            it.checkpoints,
            base,
            linestyle="none",
            marker="^",
            markersize=5,
            color=_CHECKPOINT,
            transform=transform,
            clip_on=False,
            label="checkpoint",
        )
    axes.set_title(f"{it.run}: {it.name}, {count(len(it.incidents), 'incident')}", loc="left", color=_INK)
    axes.set_xlabel("step")
    axes.set_ylabel(it.name)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.02)
    axes.legend(frameon=False, fontsize=8, loc="upper right")
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)
    return target


def text(
    history: History, run: str | None = None, *, metric: str | None = None, width: int = 72, height: int = 12
) -> str:
    """The same in characters: ``*`` the curve, ``o`` undone steps, ``!`` incidents, ``^`` checkpoints."""
    it = drawing(history, run, metric)
    points = [point for curve in (it.curve, *it.undone) for point in curve if math.isfinite(point[1])]
    if not points:
        return f"{it.name}: no finite values"
    steps, values = [p[0] for p in points], [p[1] for p in points]
    first, last, low, high = min(steps), max(steps), min(values), max(values)
    across = (width - 1) / max(1, last - first)
    down = (height - 1) / (high - low) if high > low else 0.0
    grid = [[" "] * width for _ in range(height)]

    def column(step: int) -> int:
        return min(width - 1, max(0, round((step - first) * across)))

    for failed, _restored, _label in it.incidents:
        for row in grid:
            row[column(failed)] = "!"
    for mark, curves in (("o", it.undone), ("*", [it.curve])):
        for curve in curves:
            for step, value in curve:
                if math.isfinite(value):
                    grid[round((high - value) * down)][column(step)] = mark
    base = [" "] * width
    for step in it.checkpoints:
        if first <= step <= last + 1:
            base[column(step)] = "^"
    labels = [f"{high:.4g}", *[""] * (height - 2), f"{low:.4g}"]
    margin = max(map(len, labels))
    lines = [f"{label:>{margin}} |{''.join(row).rstrip()}" for label, row in zip(labels, grid, strict=True)]
    lines.append(f"{'':>{margin}} +{''.join(base).rstrip() or '-'}")
    lines.append(f"{'':>{margin}}  {first:<{width - len(str(last))}}{last}")
    lines.append(f"{it.name} by step: * survived, o undone by a restore, ! incident, ^ checkpoint")
    lines += [f"  ! step {failed}: {label}" for failed, _restored, label in it.incidents]
    return "\n".join(lines)


def _columns(curve: Curve) -> tuple[list[int], list[float]]:
    return [step for step, _ in curve], [value for _, value in curve]


def _value(value: float | None) -> float:
    return math.nan if value is None else value


def _short(row: dict[str, object]) -> str:
    if row["rank"] is not None:
        return f"rank {row['rank']}"
    return str(row["card"] or row["node"] or "")
