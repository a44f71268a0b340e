"""``verify``: whole, damaged, absent and retired checkpoints, with real packs."""

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
    """A run with real packs: steps 10 and 20 in shared storage, 20 in the near tier."""
    run = build.Builder(str(tmp_path / "runs"), "r")
    run.start(0.0, nvme=str(tmp_path / "nvme"))
    run.fence(1.0, 1)
    run.save(2.0, 10, "shared")
    run.save(3.0, 20, "nvme", nvme=str(tmp_path / "nvme"))
    run.save(4.0, 20, "shared")
    run.seal()
    return tmp_path


def _flip(path: Path, offset: int) -> None:
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


@pytest.fixture
def verify(call: Call, saved: Path) -> Call:
    return lambda *args: call("verify", "r", "--storage", str(saved / "runs"), *args)


def test_verify_a_whole_run(verify: Call, saved: Path) -> None:
    result = verify()
    assert result.exit_code == 0, result.output
    assert result.stdout.count(": whole") == 3
    assert result.stdout.splitlines()[-1] == "3 whole; the commit log is whole"
    document = json.loads(verify("--json").stdout)
    assert document["ok"] is True
    assert [(it["step"], it["tier"]) for it in document["checkpoints"]] == [
        (20, "nvme"),
        (20, "shared"),
        (10, "shared"),
    ]


@pytest.mark.parametrize("tier", ["shared", "nvme"])
def test_verify_names_file_and_byte_range(verify: Call, saved: Path, tier: str) -> None:
    pack = "checkpoints/step-20-g1/rank-2.pack"
    _flip(saved / ("runs/r" if tier == "shared" else "nvme/r/node-b") / pack, 100)
    result = verify()
    assert result.exit_code == 1
    assert f"step 20, generation 1, {tier}: damaged" in result.stdout
    assert f"  {pack} bytes 0..4004: " in result.stdout
    assert result.stdout.splitlines()[-1] == "2 whole, 1 damaged; the commit log is whole"
    document = json.loads(verify("--json").stdout)
    (bad,) = [it for it in document["checkpoints"] if it["damage"]]
    assert document["ok"] is False
    assert [bad["damage"][0][key] for key in ("path", "start", "end")] == [pack, 0, 4004]
    assert verify("--step", "10").exit_code == 0  # that one is whole
    assert verify("--step", "20").exit_code == 1


def test_verify_a_missing_pack_and_a_missing_part(verify: Call, saved: Path) -> None:
    (saved / "runs/r/checkpoints/step-20-g1/rank-1.pack").unlink()
    (saved / "runs/r/checkpoints/step-10-g1/rank-3.json").unlink()
    result = verify()
    assert result.exit_code == 1
    assert "rank-1.pack" in result.stdout and "rank-3.json" in result.stdout
    assert "1 whole, 2 damaged" in result.stdout


def test_verify_of_a_run_that_goes_on(
    verify: Call, saved: Path, build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Between reading the log and reading the packs the run retires step 10 and deletes it: that is no damage.
    from resilience.cli import verify as command
    from resilience.journal.records import Kind

    def retire(_reader: object) -> None:
        run = build.Builder(str(saved / "runs"), "r", source="supervisor-2")
        run.fence(9.0, 2)
        run.log.append(Kind.RETIRE, {"refs": [{"step": 10, "generation": 1}]})
        for path in (saved / "runs/r/checkpoints/step-10-g1").iterdir():
            path.unlink()

    monkeypatch.setattr(command, "nvme_of", retire)
    result = verify()
    assert result.exit_code == 0, result.output
    assert "step 10, generation 1, shared: retired meanwhile" in result.stdout


def test_verify_says_what_is_not_on_this_machine(verify: Call, saved: Path) -> None:
    (saved / "nvme/r/node-b").rename(saved / "elsewhere")
    result = verify()
    assert result.exit_code == 0
    assert "step 20, generation 1, nvme: not on this machine (node node-b)" in result.stdout
    assert "2 whole, 1 not on this machine" in result.stdout


def test_verify_the_commit_log_too(verify: Call, saved: Path) -> None:
    _flip(saved / "runs/r/log" / f"{2:020d}.json", 30)
    result = verify()
    assert result.exit_code == 1
    assert f"{2:020d}.json" in result.stdout and "1 damaged record" in result.stdout


def test_verify_an_unknown_step(verify: Call, saved: Path) -> None:
    result = verify("--step", "15")
    assert result.exit_code == 2
    assert "it has those of steps 10, 20" in result.stderr
