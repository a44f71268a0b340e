"""Reading damaged and missing things: every damage is a warning, none is silence or a crash."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from resilience.errors import InvalidError
from resilience.history import History
from resilience.history.load import list_runs, open_run


def _segments(root: Path, generation: int) -> list[Path]:
    return sorted((root / f"events/g{generation}").rglob("*.jsonl"))


def _warnings(url: Path) -> list[str]:
    return [row["message"] for row in History(str(url)).warnings]


def test_a_whole_run_has_no_warnings(finished: str) -> None:
    assert History(finished).warnings == []


def test_a_torn_segment_is_a_warning_and_the_rest_is_read(tmp_path: Path, build: ModuleType) -> None:
    build.whole_run(str(tmp_path))
    (segment,) = _segments(tmp_path / "demo", 2)
    data = segment.read_bytes()
    segment.write_bytes(data[:-40])  # the last line, run.finished, is torn
    it = History(str(tmp_path))
    (warning,) = it.warnings
    assert "torn" in warning["message"] and str(segment.name) in warning["message"]
    assert warning["path"].endswith(segment.name)
    assert it.incidents[0]["state"] == "recovered"
    assert it.runs[0]["result"] == "finished"  # the commit log says so
    assert it.runs[0]["finished_at"] is None  # only the torn line knew when
    assert it.runs[0]["warnings"] == 1


def test_a_missing_segment_is_a_warning_that_names_the_events(tmp_path: Path, build: ModuleType) -> None:
    run = build.Builder(str(tmp_path), "r")
    run.start(0.0)
    run.seal()
    first_seal = _segments(tmp_path / "r", 0)[0]
    run.tell(1.0, "stop.requested", {"reason": "x"})
    run.seal()
    first_seal.unlink()
    (message,) = _warnings(tmp_path)
    assert message == "events 1..4 of supervisor-1 in generation 0 are missing"
    row = History(str(tmp_path)).runs[0]
    assert (row["run"], row["attempts"]) == ("r", 1)  # still there, though run.started is lost


def test_a_journal_that_is_gone_altogether_leaves_what_the_log_knows(
    tmp_path: Path, build: ModuleType
) -> None:
    import shutil

    build.whole_run(str(tmp_path))
    shutil.rmtree(tmp_path / "demo" / "events")
    it = History(str(tmp_path))
    (run,) = it.runs
    assert (run["result"], run["steps"], run["generations"], run["checkpoint_step"]) == (
        "finished",
        40,
        2,
        40,
    )
    assert {(row["step"], row["tier"]) for row in it.checkpoints} >= {(30, "nvme"), (40, "shared")}


def test_a_damaged_log_record_is_a_warning_and_the_others_count(tmp_path: Path, build: ModuleType) -> None:
    build.whole_run(str(tmp_path))
    record = tmp_path / "demo/log" / f"{3:020d}.json"  # the shared checkpoint of step 10
    record.write_bytes(record.read_bytes().replace(b'"step":10', b'"step":11'))
    it = History(str(tmp_path))
    assert any("00003.json" in row["message"] and "damaged" in row["message"] for row in it.warnings)
    told = {(row["step"], row["tier"]): row["in_log"] for row in it.checkpoints}
    assert told[10, "shared"] is False  # the journal still tells of it
    assert told[40, "shared"] is True


def test_every_damaged_log_record_is_named(tmp_path: Path, build: ModuleType) -> None:
    build.whole_run(str(tmp_path))
    for slot in (3, 6):
        record = tmp_path / "demo/log" / f"{slot:020d}.json"
        record.write_bytes(record.read_bytes().replace(b'"size":4000', b'"size":4001'))
    named = {row["path"] for row in History(str(tmp_path)).warnings}
    assert named == {f"log/{3:020d}.json", f"log/{6:020d}.json"}


def test_a_missing_log_record_is_a_warning(tmp_path: Path, build: ModuleType) -> None:
    build.whole_run(str(tmp_path))
    (tmp_path / "demo/log" / f"{6:020d}.json").unlink()
    assert any(f"{6:020d}.json is missing" in message for message in _warnings(tmp_path))


def test_an_unknown_run_suggests_the_nearest(finished: str) -> None:
    with pytest.raises(InvalidError) as error:
        open_run(finished, "dmeo")
    assert "did you mean 'demo'?" in str(error.value)
    assert "runs here: demo" in str(error.value)


def test_no_runs_at_all(tmp_path: Path) -> None:
    assert list_runs(str(tmp_path / "nothing")) == []
    assert not (tmp_path / "nothing").exists()  # asking creates nothing
    with pytest.raises(InvalidError, match="no runs at all"):
        open_run(str(tmp_path / "nothing"), "demo")


def test_only_directories_of_ours_are_runs(tmp_path: Path, build: ModuleType) -> None:
    build.Builder(str(tmp_path), "r")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"x")
    (tmp_path / "with space").mkdir()
    assert list_runs(str(tmp_path)) == ["r"]


def test_a_newer_format_is_refused_for_one_run_and_a_warning_in_the_list(
    tmp_path: Path, build: ModuleType
) -> None:
    build.whole_run(str(tmp_path))
    build.Builder(str(tmp_path), "future")
    path = tmp_path / "future/FORMAT"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 2, "reader": "9.0"}))
    with pytest.raises(InvalidError, match=r"9\.0"):
        History(str(tmp_path), "future")
    it = History(str(tmp_path))
    assert [row["run"] for row in it.warnings] == ["future"]
    assert {row["run"] for row in it.runs} == {"demo", "future"}


def test_a_damaged_format_file_is_a_warning(tmp_path: Path, build: ModuleType) -> None:
    build.whole_run(str(tmp_path))
    (tmp_path / "demo/FORMAT").write_bytes(b"{torn")
    it = History(str(tmp_path), "demo")
    assert it.runs[0]["steps"] == 40
    assert any("FORMAT" in row["message"] for row in it.warnings)


def test_warnings_of_the_run_itself_are_listed(tmp_path: Path, build: ModuleType) -> None:
    run = build.Builder(str(tmp_path), "r")
    run.start(0.0)
    run.tell(1.0, "warning.raised", {"message": "storage was away"}, severity="warning")
    run.seal()
    (row,) = History(str(tmp_path)).warnings
    assert (row["message"], row["warned_at"]) == ("storage was away", "2023-11-14T22:13:21.000000Z")


def test_any_fsspec_url(build: ModuleType) -> None:
    url = "memory://history-room/runs"
    build.whole_run(url)
    assert list_runs(url) == ["demo"]
    assert History(url, "demo").runs[0]["ettr"] == pytest.approx(0.5203, abs=1e-4)


def test_a_journal_of_many_events_loads_in_batches(tmp_path: Path, build: ModuleType) -> None:
    run = build.Builder(str(tmp_path), "r")
    run.start(0.0)
    run.fence(1.0, 1)
    run.ranks(1.0, done_at=2.0)
    run.steps(2.0, 0, 5000, step_s=0.01, batch=1)
    run.seal()
    it = History(str(tmp_path))
    assert it.sql("SELECT count(*) AS n FROM metrics") == [{"n": 5000}]
