"""Where a run is, read out of journals that stop at various moments."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

from resilience.history import History
from resilience.history.status import SILENT_S, status


def _status(url: object, run: str, at: float, build: ModuleType) -> dict[str, Any]:
    return status(History(str(url), run, now=build.T0 + at), run)


def test_a_finished_run(finished: str, build: ModuleType) -> None:
    it = _status(finished, "demo", 100.0, build)
    assert (it["phase"], it["result"], it["step"], it["generation"]) == ("done", "finished", 40, 2)
    assert it["loss"] == build.loss(39, 2)
    assert it["checkpoint"] == {"tier": "shared", "step": 40, "generation": 2, "age_s": pytest.approx(92.4)}
    assert it["checkpoints"]["nvme"]["step"] == 30
    assert it["cards"] == {"active": 0, "spare": 6, "failed": 0, "lost": 0}
    assert it["elapsed_s"] == pytest.approx(7.7)  # a finished run does not get older
    assert it["incident"] is None
    assert not it["silent"]  # done is not silent, however long ago


def test_an_open_incident(tmp_path: object, build: ModuleType) -> None:
    build.first_generation(str(tmp_path), "r")
    it = _status(tmp_path, "r", 5.0, build)
    assert (it["phase"], it["result"], it["step"], it["generation"]) == ("fencing", None, 25, 1)
    assert it["recovering"] == "rank 2 was killed by SIGKILL: restart"
    assert it["incident"]["card"] == "node-b/0"
    assert it["cards"] == {"active": 4, "spare": 2, "failed": 0, "lost": 0}
    assert [node["ranks"] for node in it["nodes"]] == [[0, 1], [2, 3], []]
    assert it["heard_s"] == pytest.approx(0.44)
    assert it["elapsed_s"] == pytest.approx(5.0)


def test_a_silent_run_does_not_look_healthy(tmp_path: object, build: ModuleType) -> None:
    run = build.Builder(str(tmp_path), "r")
    run.start(0.0)
    run.fence(1.0, 1)
    run.ranks(1.0, done_at=2.0)
    run.seal()
    assert not _status(tmp_path, "r", 2.0 + SILENT_S - 1, build)["silent"]
    late = _status(tmp_path, "r", 2.0 + SILENT_S + 1, build)
    assert late["silent"]
    assert late["heard_s"] == pytest.approx(SILENT_S + 1)


def test_the_phases_in_their_order(tmp_path: object, build: ModuleType) -> None:
    run = build.Builder(str(tmp_path), "r")
    seen = []

    def look() -> None:
        run.seal()
        seen.append(_status(tmp_path, "r", 100.0, build)["phase"])

    run.start(0.0)
    look()
    run.tell(1.0, "capacity.waiting", {"needed": 4, "available": 2, "deadline_s": 300})
    look()
    waiting = _status(tmp_path, "r", 100.0, build)["waiting"]
    assert waiting == {"needed": 4, "available": 2, "deadline_s": 300.0}
    run.tell(1.5, "capacity.found", {"needed": 4, "available": 4})
    run.fence(2.0, 1)
    look()
    run.ranks(2.1, done_at=3.0)
    run.steps(3.0, 0, 5)
    look()
    found = {**build.FOUND, "step": 5}
    run.tell(4.0, "incident.detected", found, **build.BLAMED)
    look()
    run.tell(4.2, "generation.ended", {"reason": "incident 1-1", "steps": 5})
    run.fence(4.4, 2)
    look()
    run.ranks(4.5, incident="1-1", done_at=4.8)
    run.tell(5.0, "incident.recovered", {"incident": "1-1", "phases": build.PHASES}, **build.BLAMED)
    look()
    run.tell(6.0, "stop.requested", {"reason": "Ctrl-C"})
    look()
    run.tell(7.0, "run.finished", {"result": "interrupted", "reason": "Ctrl-C", "steps": 9})
    look()
    assert seen == [
        "waiting",
        "waiting",
        "starting",
        "running",
        "fencing",
        "starting",
        "running",
        "stopping",
        "done",
    ]


def test_a_run_that_only_has_its_format(tmp_path: object, build: ModuleType) -> None:
    build.Builder(str(tmp_path), "r")
    it = _status(tmp_path, "r", 1.0, build)
    assert (it["phase"], it["step"], it["checkpoint"], it["heard_s"], it["silent"]) == (
        "waiting",
        None,
        None,
        None,
        True,
    )
