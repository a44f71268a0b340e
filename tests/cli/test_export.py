"""``export`` and ``import`` as commands; what they do with bytes is tested beside their modules."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import Result

from resilience.cli.export import parse_size
from resilience.errors import InvalidError

Call = Callable[..., Result]


@pytest.fixture
def runs(tmp_path: Path, build: ModuleType) -> str:
    run = build.Builder(str(tmp_path / "runs"), "r")
    run.fence(1.0, 1)
    run.save(2.0, 10, "shared")
    run.save(4.0, 20, "shared")
    run.seal()
    return str(tmp_path / "runs")


def test_there_and_back(call: Call, runs: str, tmp_path: Path) -> None:
    out = str(tmp_path / "w.safetensors")
    args = ("export", "r", out, "--to", "safetensors", "--storage", runs)
    done = call(*args, "--step", "10", "--include", "rank-3", "--strip", "rank-3")
    assert done.exit_code == 0, done.output
    assert done.stdout == f"step 10 is at {out}: 1 array, 3.9 KiB, 1 file\n"
    assert done.stderr == ""  # no bar without a terminal
    taken = call("import", out, "--name", "again", "--storage", runs)
    assert taken.exit_code == 0, taken.output
    assert taken.stdout == "run 'again' begins at step 10: 1 array, 4.0 KiB\n"
    shown = json.loads(call("inspect", "again", "--storage", runs, "--json").stdout)
    assert shown["arrays"][0]["name"] == "model/weight"
    assert call("verify", "again", "--storage", runs).exit_code == 0
    assert call("status", "again", "--storage", runs).exit_code == 0
    assert call("history", "again", "--storage", runs).exit_code == 0


def test_json(call: Call, runs: str, tmp_path: Path) -> None:
    done = call("export", "r", str(tmp_path / "z"), "--to", "zarr", "--storage", runs, "--json")
    document = json.loads(done.stdout)
    assert (document["step"], document["arrays"], document["size"]) == (20, 4, 16000)
    assert document["path"] == str(tmp_path / "z")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("r", "out", "--to", "safetensor"), "did you mean safetensors?"),
        (("rr", "out", "--to", "zarr"), "did you mean 'r'?"),
        (("r", "out", "--to", "zarr", "--step", "15"), "steps there are: 20, 10"),
        (("r", "out", "--to", "zarr", "--include", "rank-9"), "no array is named 'rank-9'"),
        (("r", "out", "--to", "safetensors", "--max-file-size", "5 bananas"), "is not a size"),
        (("r", "s3://bucket/out", "--to", "zarr"), "is a URL"),
        (("r", "there", "--to", "zarr"), "--overwrite"),
    ],
)
def test_misuse(
    call: Call,
    runs: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    args: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    result = call("export", *args, "--storage", runs)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert sorted(os.listdir(tmp_path)) == ["runs", "there"]


def test_no_room_in_a_real_process(process: Callable[..., object], runs: str, tmp_path: Path) -> None:
    """A limit of a KiB or two for a file, as a full disk answers: exit code 3, one message, nothing left."""
    for to in ("safetensors", "zarr", "dcp"):
        where = f"{tmp_path}/out/{to}"
        line = f"ulimit -f 2; $R export r {where} --to {to} --include rank-0 --storage {runs}"
        done = process(line)
        assert done.returncode == 3, done.stderr  # type: ignore[attr-defined]
        assert "file-size limit" in done.stderr and "Traceback" not in done.stderr  # type: ignore[attr-defined]
        assert os.listdir(tmp_path / "out") == []


def test_sizes() -> None:
    assert [parse_size(text) for text in ("5GB", "500 M", "2GiB", "1000", "1.5kb", "7 B")] == [
        5 * 10**9,
        5 * 10**8,
        2 << 30,
        1000,
        1500,
        7,
    ]
    for text in ("", "GB", "0", "-5", "5 PB", "1e9"):
        with pytest.raises(InvalidError):
            parse_size(text)
