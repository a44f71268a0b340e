"""What must hold 4: damage is named, with file and byte range, and never loaded; an older or colder copy is taken.

One run that ends early leaves eight checkpoints in two tiers; each test damages a copy of it and launches again.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import resilience
from chaos.faults import Fault
from resilience.errors import CorruptError, TrainingError

pytestmark = pytest.mark.ray

STEPS = 30
ARGUMENTS = {"steps": STEPS, "amount": 1000}
ARRAYS = ("weights", "velocity", "seen")
OPTIONS = {"checkpoint_every": 3, "keep_last": 50, "name": "damaged"}


class Recorder:
    """A host that runs the training function in this process and keeps its last state: the uninterrupted run."""

    world_size, local_rank, generation, name = 3, 0, 0, "reference"

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.state: dict = {}

    def restored(self):
        return None

    def end(self, done, total):
        return done == total

    def save(self, done, capture, objects):
        self.state = capture()

    def stop_point(self, done):
        return False

    def begin(self, step): ...
    def log(self, step, values): ...
    def enter(self, section): ...


@pytest.fixture(scope="module")
def reference(jobs):
    """State of each rank after the same training, never interrupted."""
    from resilience.run import Run

    hosts = [Recorder(rank) for rank in range(3)]
    for host in hosts:
        jobs.sgd(Run(host), **ARGUMENTS)
    return [host.state["state"] for host in hosts]


@pytest.fixture(scope="module")
def seed(_virtual_cluster, jobs, tmp_path_factory):
    """A run of two generations that ended with an error of the user's at step 26, with all its checkpoints."""
    from chaos.harness import Chaos

    _virtual_cluster.heal()
    with Chaos(tmp_path_factory.mktemp("seed")) as chaos:
        faults = [
            Fault("kill", rank=0, point="commit.done", step=3, tier="shared"),
            Fault("raise", rank=1, at_rank=1, step=26),
        ]
        with pytest.raises(TrainingError, match="injected fault 1"):
            chaos.run(jobs.sgd, faults, arguments=ARGUMENTS, **OPTIONS)
    return chaos


@pytest.fixture
def copy(seed, tmp_path):
    """A copy of the seed: its storage and its nvme tier."""
    shutil.copytree(seed.directory, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def shared(copy, committed):
    """Directory of each checkpoint that the log records in the shared tier, by step, newest first."""
    found = {step: g for step, g, tier in committed(copy / "storage", "damaged") if tier == "shared"}
    root = copy / "storage/damaged/checkpoints"
    return {step: root / f"step-{step}-g{found[step]}" for step in sorted(found, reverse=True)}


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(bytes(data))


def chunk_of(directory: Path, rank: int) -> dict[str, int]:
    """The largest chunk of a rank's pack, as its part tells (docs/format.md)."""
    part = json.loads((directory / f"rank-{rank}.json").read_text())
    _array, _box, _shape, offset, length, _crc = max(part["chunks"], key=lambda chunk: chunk[4])
    return {"offset": offset, "length": length}


def read_all(group) -> dict:
    return {f"{rank}/{name}": group[f"rank-{rank}/state/{name}"][...] for rank in range(3) for name in ARRAYS}


def launch(jobs, copy: Path, **options):
    job = jobs.sgd.options(
        **{"storage": str(copy / "storage"), "nvme": None, "card": "card", **OPTIONS, **options}
    )
    return job.launch(view="none", **ARGUMENTS)


def assert_same(result, reference) -> None:
    assert result.finished
    assert result.steps == STEPS
    group = resilience.open_checkpoint(f"{result.storage}/{result.run}", step=STEPS)
    for rank, state in enumerate(reference):
        for name in ARRAYS:
            assert np.array_equal(group[f"rank-{rank}/state/{name}"][...], state[name]), (rank, name)
    assert result.value == {"draws": 8 * STEPS, "weights": reference[0]["weights"].tolist()}


def test_every_kind_of_damage_is_named_skipped_and_outlived(cluster, jobs, cli, copy, shared, reference):
    """The five newest checkpoints are damaged in five ways: one launch walks over all of them to the sixth."""
    flipped, truncated, packless, partless, foreign, good = list(shared)[:6]
    of = {step: f"checkpoints/{path.name}" for step, path in shared.items()}
    spot = chunk_of(shared[flipped], 1)
    flip(shared[flipped] / "rank-1.pack", spot["offset"] + spot["length"] // 2)
    pack = shared[truncated] / "rank-0.pack"
    whole = pack.stat().st_size
    pack.write_bytes(pack.read_bytes()[:-4096])
    (shared[packless] / "rank-2.pack").unlink()
    (shared[partless] / "rank-1.json").unlink()
    donor = min(shared)
    assert shared[donor].name.endswith("-g1") and not shared[foreign].name.endswith("-g1"), (
        "other generations"
    )
    for name in ("rank-2.json", "rank-2.pack"):
        shutil.copy(shared[donor] / name, shared[foreign] / name)
    files = dict(
        zip(
            list(shared)[:5],
            ("rank-1.pack", "rank-0.pack", "rank-2.pack", "rank-1.json", "rank-2.json"),
            strict=True,
        )
    )
    spots = {
        flipped: (spot["offset"], spot["offset"] + spot["length"] + 4),
        truncated: (whole - 4096, whole),
    }

    # Whoever opens one of them is told; nothing damaged is handed out.
    url = str(copy / "storage/damaged")
    with pytest.raises(CorruptError) as caught:
        read_all(resilience.open_checkpoint(url, step=flipped))
    assert (caught.value.path, caught.value.start, caught.value.end) == (
        f"{of[flipped]}/rank-1.pack",
        *spots[flipped],
    )
    for step in (packless, partless, foreign):
        with pytest.raises(CorruptError, match=f"{of[step]}/{files[step]}"):
            _ = resilience.open_checkpoint(url, step=step)[f"{files[step][:6]}/state/seen"][...]

    # `resilience verify` names every one of them, and the file and the bytes.
    checked = cli("verify", "damaged", "--storage", copy / "storage", "--nvme", copy / "no-nvme", "--json")
    assert checked.returncode == 1, checked.stdout + checked.stderr
    report = {c["step"]: c for c in json.loads(checked.stdout)["checkpoints"] if c["tier"] == "shared"}
    assert {step for step, c in report.items() if c["verdict"] == "damaged"} == set(files)
    for step, name in files.items():
        damage = report[step]["damage"]
        assert f"{of[step]}/{name}" in {d["path"] for d in damage}, (step, damage)
        assert all(d["start"] is not None for d in damage), (step, damage)
        if step in spots:
            assert spots[step] in {(d["start"], d["end"]) for d in damage}, (step, damage)
    words = cli("verify", "damaged", "--storage", copy / "storage", "--step", flipped)
    assert f"rank-1.pack bytes {spots[flipped][0]}..{spots[flipped][1]}" in words.stdout
    assert words.returncode == 1

    # The same launch again (now without a near tier): the sixth is restored, the reasons are in the journal.
    result = launch(jobs, copy)
    assert_same(result, reference)
    restores = result.history.rows("restores")
    assert (restores[-1]["step"], restores[-1]["tier"]) == (good, "shared")
    reasons = [reason for row in restores for reason in row["reasons"] or []]
    for step, name in files.items():
        assert any(f"step {step} in shared" in r and f"{of[step]}/{name}" in r for r in reasons), (
            step,
            reasons,
        )
    failed = {
        row["step"]: row["reason"]
        for row in result.history.sql(
            "select step, data ->> 'reason' as reason from events where type = 'restore.failed'"
        )
    }
    assert f"{spots[flipped][0]:,} to" in failed[flipped]
    quarantined = {
        row["step"]
        for row in result.history.checkpoints
        if row["state"] == "quarantined" and row["tier"] == "shared"
    }
    assert quarantined == set(files)
    assert [i["decision"] for i in result.incidents if i["kind"] == "restore"] == ["restore older"] * 5

    # What is quarantined is not offered any more; what was made since is whole.
    again = cli("verify", "damaged", "--storage", copy / "storage", "--step", STEPS)
    assert again.returncode == 0, again.stdout


def test_a_damaged_near_tier_falls_back_to_the_colder_one_of_the_same_step(
    cluster, jobs, copy, shared, committed, reference
):
    newest = max(shared)
    for step, generation, tier in committed(copy / "storage", "damaged"):
        if tier == "nvme" and step > newest:  # where the near tier was ahead of the colder one
            for directory in copy.glob(f"nvme/damaged/*/checkpoints/step-{step}-g{generation}"):
                shutil.rmtree(directory)
    (pack,) = copy.glob(f"nvme/damaged/*/checkpoints/{shared[newest].name}/rank-0.pack")
    flip(pack, chunk_of(pack.parent, 0)["offset"])
    result = launch(jobs, copy, nvme=str(copy / "nvme"))
    assert_same(result, reference)
    last = result.history.rows("restores")[-1]
    assert (last["step"], last["tier"]) == (newest, "shared"), "not one step more is lost than need be"
    failed = result.history.sql(
        "select data ->> 'reason' as reason from events where type = 'restore.failed'"
    )
    assert any(f"{shared[newest].name}/rank-0.pack" in row["reason"] for row in failed)
    states = {(c["step"], c["tier"]): c["state"] for c in result.history.checkpoints}
    assert states[newest, "nvme"] == "quarantined"
    assert states[newest, "shared"] == "kept"


def test_with_every_checkpoint_damaged_it_never_starts_from_scratch(cluster, jobs, copy, shared, records):
    for directory in shared.values():
        flip(directory / "rank-0.pack", chunk_of(directory, 0)["offset"])
    # Not without the near tier, which holds them whole but is not given; nor when that is lost, and the log has
    # all of the shared tier in quarantine.
    for nvme in (None, str(copy / "lost")):
        with pytest.raises(CorruptError) as caught:
            launch(jobs, copy, nvme=nvme)
        assert "does not start from scratch" in str(caught.value)
        assert shared[max(shared)].name in str(caught.value)
    assert not any(record.kind == "finish" for record in records(copy / "storage", "damaged"))
    history = resilience.history(str(copy / "storage"), run="damaged")
    assert [row["result"] for row in history.rows("attempts")] == [
        "user_error",
        "no_checkpoint",
        "no_checkpoint",
    ]
    scratch = history.sql(
        "select * from events where type = 'restore.chosen' and step = 0 and generation > 2"
    )
    assert scratch == []
