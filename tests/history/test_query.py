"""``History``: shapes handed to programs."""

from __future__ import annotations

import json
import subprocess
import sys
from types import ModuleType

import pytest

from resilience.errors import InvalidError
from resilience.history import History, history
from resilience.history.query import jsonable


def test_to_json_is_strict_json(finished: str, build: ModuleType) -> None:
    it = History(finished, "demo", now=build.T0 + 10)
    document = json.loads(json.dumps(it.to_json(), allow_nan=False))
    assert document["run"] == "demo"
    assert document["read_at"] == "2023-11-14T22:13:30.000000Z"
    assert document["incidents"][0]["card"] == "node-b/0"
    assert "metrics" not in document


def test_not_finite_numbers_are_null() -> None:
    assert jsonable({"a": [float("nan"), float("inf"), 1.0], "b": True}) == {
        "a": [None, None, 1.0],
        "b": True,
    }


def test_sql_takes_parameters_and_decodes_json(finished: str) -> None:
    rows = history(finished).sql("SELECT data, time FROM events WHERE type = ?", ["run.started"])
    assert rows[0]["data"]["arguments"] == {"lr": 0.1}
    assert rows[0]["time"] == "2023-11-14T22:13:20.000000Z"


def test_a_wrong_query_names_the_views(finished: str) -> None:
    with pytest.raises(InvalidError) as error:
        history(finished).sql("SELECT * FROM incident")
    assert "incidents" in str(error.value.hint)
    assert "incident" in error.value.message


def test_a_statement_without_rows(finished: str) -> None:
    assert history(finished).sql("SET threads = 1") == []


def test_one_run_of_several(tmp_path: object, build: ModuleType) -> None:
    build.whole_run(str(tmp_path), "a")
    build.whole_run(str(tmp_path), "b")
    assert [row["run"] for row in History(str(tmp_path)).runs] == ["a", "b"]
    assert [row["run"] for row in History(str(tmp_path), "b").runs] == ["b"]
    assert History(str(tmp_path)).rows("ettr")[0]["wall_s"] == pytest.approx(7.7)


def test_importing_history_is_light() -> None:
    heavy = ("duckdb", "rich", "ray", "fsspec", "zarr")
    code = f"import resilience.history, sys; print(sorted(m for m in {heavy} if m in sys.modules))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )
