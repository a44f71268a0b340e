"""The recovery harness: what it reads, and whom it must not kill."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the benchmarks need the torch extra")

from benchmarks.recovery.harness import FailedError, Follower, Line, _check_ours
from benchmarks.report import percentiles


def test_half_a_line_is_left_for_the_next_time(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    follower = Follower(str(path))
    follower.refresh()
    assert follower.lines == []
    path.write_text("1.5 0 10 1\n2.5 1 1")
    follower.refresh()
    assert follower.lines == [Line(1.5, 0, 10, 1)]
    with path.open("a") as file:
        file.write("1 7\n")
    follower.refresh()
    assert follower.lines[1:] == [Line(2.5, 1, 11, 7)]


def test_only_a_process_that_holds_the_file_is_a_rank(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.touch()
    hold = "import sys; file = open(sys.argv[1]); print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        _check_ours(process.pid, str(path))
        process.communicate(b"")
    with pytest.raises(FailedError, match="nothing was killed"):
        _check_ours(process.pid, str(path))
    with pytest.raises(FailedError, match="nothing was killed"):
        _check_ours(os.getpid(), str(path))


def test_percentiles_of_few_and_many() -> None:
    assert percentiles([]) == {}
    assert percentiles([3.0]) == {"p50": 3.0, "p95": 3.0, "min": 3.0, "max": 3.0}
    found = percentiles([float(value) for value in range(101)])
    assert found == {"p50": 50.0, "p95": 95.0, "min": 0.0, "max": 100.0}
