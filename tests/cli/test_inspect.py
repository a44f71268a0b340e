"""``inspect``: by name, by URL, of a directory; for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import Result

Call = Callable[..., Result]


@pytest.fixture
def saved(tmp_path: Path, build: ModuleType) -> Path:
    """Steps 10 in shared storage, 20 in both tiers, 30 in the near tier only."""
    run = build.Builder(str(tmp_path / "runs"), "r")
    run.start(0.0, nvme=str(tmp_path / "nvme"))
    run.fence(1.0, 1)
    run.save(2.0, 10, "shared")
    run.save(3.0, 20, "nvme", nvme=str(tmp_path / "nvme"))
    run.save(4.0, 20, "shared")
    run.save(5.0, 30, "nvme", nvme=str(tmp_path / "nvme"))
    run.seal()
    return tmp_path


def test_by_name_and_by_url(call: Call, saved: Path) -> None:
    runs = str(saved / "runs")
    by_name = call("inspect", "r", "--storage", runs, "--step", "20")
    assert by_name.exit_code == 0, by_name.output
    lines = by_name.stdout.splitlines()
    assert lines[0] == "run r, step 20, generation 1, saved by 4 ranks"
    assert "tier shared: 16.0 KiB" in lines
    assert "tier nvme: 16.0 KiB on node-a, node-b" in lines
    (row,) = [line.split() for line in lines if line.strip().startswith("weight ")]
    assert row == ["weight", "float32", "1000", "each", "1000", "0-3", "4", "15.6", "KiB"]
    assert lines[-1] == "total: 4 arrays, 15.6 KiB"
    assert call("inspect", f"{runs}/r", "--step", "20").stdout == by_name.stdout
    directory = call("inspect", f"file://{runs}/r/checkpoints/step-10-g1")
    assert directory.stdout.splitlines()[0] == "run r, step 10, generation 1, saved by 4 ranks"


def test_no_data_is_read(call: Call, saved: Path) -> None:
    for pack in (saved / "runs").rglob("*.pack"):
        pack.unlink()
    assert call("inspect", "r", "--storage", str(saved / "runs"), "--step", "10").exit_code == 0


def test_a_checkpoint_of_the_near_tier_only(call: Call, saved: Path) -> None:
    args = ("inspect", "r", "--storage", str(saved / "runs"))
    assert "total: 4 arrays" in call(*args).stdout  # where the run's own start said that the tier is
    (saved / "nvme").rename(saved / "elsewhere")
    told = call(*args)
    assert told.exit_code == 0
    assert "step 30" in told.stdout and "its parts lie on node node-a only" in told.stdout
    assert "unreadable" in json.loads(call(*args, "--json").stdout)
    assert "total: 4 arrays" in call(*args, "--nvme", str(saved / "elsewhere")).stdout


def test_for_programs(call: Call, saved: Path) -> None:
    document = json.loads(
        call("inspect", "r", "--storage", str(saved / "runs"), "--step", "20", "--json").stdout
    )
    assert (document["run"], document["step"], document["world_size"]) == ("r", 20, 4)
    assert document["steps"] == [30, 20, 10]
    assert set(document["tiers"]) == {"shared", "nvme"}
    assert document["objects"] == [{"name": "weight", "arrays": 4, "size": 16000}]
    assert [array["name"] for array in document["arrays"]] == [f"rank-{rank}/weight" for rank in range(4)]
    assert document["arrays"][2]["ranks"] == [2]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("rr",), "did you mean 'r'?"),
        (("r", "--step", "15"), "steps there are: 30, 20, 10"),
        (("./nothing",), "there is no directory"),
        (("/tmp",), "neither a run's commit log nor a checkpoint's parts"),
    ],
)
def test_misuse(call: Call, saved: Path, args: tuple[str, ...], message: str) -> None:
    result = call("inspect", *args, "--storage", str(saved / "runs"))
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
