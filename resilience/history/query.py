"""``History``: what happened in one run, or in all runs under a storage URL, as rows and as SQL.

A snapshot of storage when it was made. Owns the order and the shape of the rows handed to people and programs;
what they mean is in ``views.sql`` and ``accounts.sql``. Must never need a cluster; importing it loads neither DuckDB
nor a storage driver.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import duckdb

Row = dict[str, Any]
#: View → its rows' order. The documented views, in the order they are documented.
ORDERS = {
    "runs": "started_at, run",
    "attempts": "run, attempt",
    "generations": "run, generation",
    "incidents": "run, detected_at, incident",
    "checkpoints": "run, step, generation, tier",
    "failed_saves": "run, failed_at",
    "restores": "run, generation",
    "ranks": "run, generation, rank",
    "nodes": "run, node",
    "cards": "run, card",
    "metrics": "run, step",
    "lineage": "run, step",
    "chaos": "run, injected_at",
    "ettr": "run",
    "lost_time": "run",
    "warnings": "run, warned_at NULLS FIRST, path",
}


class History:
    """What happened. Rows are dicts: times are ISO text in UTC, durations seconds, sizes bytes.

    Args:
        url: storage URL that holds runs (or a plain path).
        run: one run's name; ``None`` reads all of them.
        now: seconds since the epoch that ages are counted to; default the clock.

    Raises:
        InvalidError: no such run (the hint has the nearest name), or a newer format.
        UnavailableError: storage is away.
    """

    def __init__(self, url: str, run: str | None = None, *, now: float | None = None) -> None:
        self.url = url
        self.run = run
        moment = datetime.fromtimestamp(time.time() if now is None else now, UTC)
        self.read_at = moment.isoformat(timespec="microseconds").replace("+00:00", "Z")
        from resilience.history.database import build  # here, not above: `import resilience` stays light
        from resilience.history.load import open_run, open_runs

        readers = [open_run(url, run)] if run is not None else open_runs(url)
        self._database: duckdb.DuckDBPyConnection = build(readers, read_at=self.read_at)

    def __repr__(self) -> str:
        return f"History({self.url!r}, run={self.run!r})"

    @property
    def runs(self) -> list[Row]:
        """One row a run: result, steps, generations, incidents, lost steps, ETTR, newest checkpoint."""
        return self.rows("runs")

    @property
    def incidents(self) -> list[Row]:
        """One row a failure: cause, blamed rank, node and card, decision, phases in seconds, lost steps."""
        return self.rows("incidents")

    @property
    def checkpoints(self) -> list[Row]:
        """One row a checkpoint and tier: step, generation, state, size, stall_s, durable_s, age_s."""
        return self.rows("checkpoints")

    @property
    def generations(self) -> list[Row]:
        """One row a generation: from where it began, how far it got, what of it was kept."""
        return self.rows("generations")

    @property
    def warnings(self) -> list[Row]:
        """What is torn or missing in the journal or the log, and what the run itself warned of."""
        return self.rows("warnings")

    def rows(self, view: str) -> list[Row]:
        """All rows of a documented view, in its natural order."""
        return self.sql(f"SELECT * FROM {view} ORDER BY {ORDERS[view]}")

    def sql(self, query: str, parameters: Sequence[Any] = ()) -> list[Row]:
        """Rows of any DuckDB statement over ``events`` and the views (docs/history.md).

        ``InvalidError`` with DuckDB's message when the statement is wrong.
        """
        from resilience.history.database import query as run_query

        return run_query(self._database, query, list(parameters) or None)

    def to_json(self) -> dict[str, Any]:
        """Everything but metrics and single events, ready for ``json.dumps`` (not-finite numbers are ``null``)."""
        skipped = {"metrics", "lineage"}
        views = {view: self.rows(view) for view in ORDERS if view not in skipped}
        document: Row = jsonable({"storage": self.url, "run": self.run, "read_at": self.read_at, **views})
        return document

    def close(self) -> None:
        """Free the memory. May run twice."""
        self._database.close()

    def __enter__(self) -> History:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def history(url: str, run: str | None = None) -> History:
    """What happened under a storage URL (or a plain path): in one run, or in all of them. See ``History``."""
    return History(url, run)


def jsonable(value: Any) -> Any:
    """``value`` with everything that strict JSON cannot hold made plain."""
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    return str(value)
