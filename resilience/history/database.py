"""A DuckDB database in memory over journals and logs: the table ``events`` and the views of ``views.sql`` and
``accounts.sql``.

Owns the columns of the base tables. A snapshot of storage at one moment: open another to see what came after. Must
never reach for the network (extensions) nor for storage: everything comes through ``RunReader``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from importlib import resources
from itertools import islice
from typing import TYPE_CHECKING, Any

from resilience.errors import InvalidError
from resilience.history.load import RunReader, in_charge
from resilience.journal.event import Event

if TYPE_CHECKING:
    import duckdb

_BATCH = 2000  # events that are in Python memory at once
_EVENT = {
    "run": "VARCHAR",
    "generation": "BIGINT",
    "source": "VARCHAR",
    "seq": "BIGINT",
    "id": "VARCHAR",
    "type": "VARCHAR",
    "time": "TIMESTAMP",
    "mono_ns": "BIGINT",
    "subject": "VARCHAR",
    "node": "VARCHAR",
    "rank": "INTEGER",
    "card": "VARCHAR",
    "step": "BIGINT",
    "cause": "VARCHAR",
    "severity": "VARCHAR",
    "data": "JSON",
}
_TABLES = f"""
CREATE TABLE events ({", ".join(f"{name} {kind}" for name, kind in _EVENT.items())});
CREATE TABLE log (
    run VARCHAR, slot BIGINT, kind VARCHAR, generation BIGINT, writer VARCHAR, body JSON, ignored BOOLEAN
);
CREATE TABLE found (run VARCHAR, url VARCHAR, created TIMESTAMP);
CREATE TABLE warnings (run VARCHAR, generation BIGINT, warned_at TIMESTAMP, path VARCHAR, message VARCHAR);
CREATE TABLE reading (read_at TIMESTAMP);
"""


def build(readers: Iterable[RunReader], *, read_at: str) -> duckdb.DuckDBPyConnection:
    """Load every reader's run. ``read_at`` (ISO, UTC) is the moment that ages are counted to."""
    import duckdb

    database = duckdb.connect(":memory:", config={"autoinstall_known_extensions": "false"})
    for statement in _TABLES.split(";"):
        if statement.strip():
            database.execute(statement)
    database.execute("INSERT INTO reading VALUES (?::TIMESTAMP)", [read_at.removesuffix("Z")])
    for reader in readers:
        _load(database, reader)
    for name in ("views.sql", "accounts.sql"):
        database.execute(resources.files("resilience.history").joinpath(name).read_text("utf-8"))
    return database


def query(
    database: duckdb.DuckDBPyConnection, text: str, parameters: list[Any] | None = None
) -> list[dict[str, Any]]:
    """Rows of a statement as dicts; JSON columns decoded, TIMESTAMPs as ISO text in UTC.

    ``InvalidError`` with DuckDB's own message when the statement is wrong.
    """
    import duckdb

    try:
        cursor = database.execute(text, parameters)
        columns = [(column[0], str(column[1])) for column in cursor.description or ()]
        rows = cursor.fetchall()
    except duckdb.Error as error:
        raise InvalidError(
            f"the query failed: {str(error).strip()}",
            operation="history",
            hint="views: " + ", ".join(views(database)) + " (columns: docs/history.md, or DESCRIBE <view>)",
        ) from error
    return [
        {name: _plain(value, kind) for (name, kind), value in zip(columns, row, strict=True)} for row in rows
    ]


def views(database: duckdb.DuckDBPyConnection) -> list[str]:
    """Names of all tables and views, sorted."""
    found = database.execute(
        "SELECT table_name FROM information_schema.tables WHERE table_schema = 'main' ORDER BY 1"
    ).fetchall()
    return [name for (name,) in found]


def _load(database: duckdb.DuckDBPyConnection, reader: RunReader) -> None:
    rows = (_event_row(event, reader.run) for event in reader.events())
    for batch in _batched(rows):
        _insert(database, "events", _EVENT, batch)
    records = reader.records()
    _insert(
        database,
        "log",
        {
            "run": "VARCHAR",
            "slot": "BIGINT",
            "kind": "VARCHAR",
            "generation": "BIGINT",
            "writer": "VARCHAR",
            "body": "JSON",
            "ignored": "BOOLEAN",
        },
        [
            {
                "run": reader.run,
                "slot": record.slot,
                "kind": record.kind.value,
                "generation": record.generation,
                "writer": record.writer,
                "body": json.dumps(record.body),
                "ignored": not valid,
            }
            for record, valid in zip(records, in_charge(records), strict=True)
        ],
    )
    database.execute(
        "INSERT INTO found VALUES (?, ?, try_cast(? AS TIMESTAMP))",
        [reader.run, reader.url, reader.created or None],
    )
    for path, message in reader.warnings:
        database.execute(
            "INSERT INTO warnings VALUES (?, NULL, NULL, ?, ?)", [reader.run, path or None, message]
        )
    database.execute(
        "INSERT INTO warnings SELECT run, generation, time, NULL, data ->> 'message' FROM events"
        " WHERE run = ? AND type = 'warning.raised' ORDER BY time",
        [reader.run],
    )


def _event_row(event: Event, run: str) -> dict[str, Any]:
    row = {name: getattr(event, name) for name in _EVENT}
    row["run"] = run  # the directory decides: a copied run is another run
    row["data"] = json.dumps(event.data)
    return row


def _insert(
    database: duckdb.DuckDBPyConnection, table: str, columns: dict[str, str], rows: list[dict[str, Any]]
) -> None:
    """One statement for many rows: as one JSON parameter (executemany costs half a millisecond a row)."""
    if not rows:
        return
    # Text first, types after: a value of the wrong type then becomes NULL instead of failing the batch.
    shape = json.dumps([dict.fromkeys(columns, "VARCHAR")])
    values = ", ".join(
        f"row.{name}::JSON" if kind == "JSON" else f"try_cast(row.{name} AS {kind})"
        for name, kind in columns.items()
    )
    database.execute(
        f"INSERT INTO {table} SELECT {values} FROM (SELECT unnest(from_json(?::JSON, '{shape}')) AS row)",
        [json.dumps(rows)],
    )


def _batched(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    while batch := list(islice(rows, _BATCH)):
        yield batch


def _plain(value: Any, kind: str) -> Any:
    if isinstance(value, str) and kind == "JSON":
        return json.loads(value)
    if isinstance(value, datetime):
        # Always with microseconds: text of one length sorts as time does.
        utc = value if value.tzinfo is None else value.astimezone(UTC).replace(tzinfo=None)
        return f"{utc.isoformat(timespec='microseconds')}Z"
    return value
