"""What must hold 4: damage is named, with file and byte range, and never loaded; an older or colder copy is taken.

One run that is stopped early leaves its checkpoints in two tiers; each test damages a copy of it and launches again.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import resilience
from chaos.faults import Fault
from resilience.errors import CorruptError

pytestmark = pytest.mark.ray

AMOUNT = 300
ARRAYS = ("weights", "velocity", "seen")
RUN = f"damaged-{os.getpid()}"  # its own: several sessions may run on one machine
OPTIONS = {"checkpoint_every": 3, "keep_last": 1000, "name": RUN}


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

    def ready(self): ...
    def begin(self, step): ...
    def log(self, step, values): ...
    def enter(self, section): ...


@pytest.fixture(scope="module")
def seed(_virtual_cluster, jobs, tmp_path_factory):
    """A run of two generations, stopped when both have checkpoints in both tiers, the second enough of them to
    damage five: directory and steps."""
    import ray

    from chaos.harness import Chaos
    from resilience.runtime.supervisor import NAMESPACE, actor_name

    _virtual_cluster.heal()
    with Chaos(tmp_path_factory.mktemp("seed")) as chaos, ThreadPoolExecutor(1) as pool:
        fault = Fault("kill", rank=0, point="commit.done", step=3, tier="shared")
        job = chaos.options(jobs.sgd, [fault], **OPTIONS)
        launch = pool.submit(job.launch, view="none", steps=1_000_000, amount=AMOUNT)

        def enough() -> bool:
            # The fault fires some time after the commit, however many checkpoints the first generation has then.
            generations = list(committed_in(chaos.directory).values())
            return generations.count(1) >= 1 and len(generations) - generations.count(1) >= 6

        until(lambda: launch.done() or enough(), why="checkpoints of two generations")
        if not launch.done():
            supervisor = ray.get_actor(actor_name(RUN), namespace=NAMESPACE)
            ray.get(supervisor.request_stop.remote("enough for a test"))
        result = launch.result(120)
        assert result.outcome.result == "interrupted"
    return chaos.directory, result.steps


@pytest.fixture(scope="module")
def arguments(seed):
    return {"steps": seed[1] + 5, "amount": AMOUNT}


@pytest.fixture(scope="module")
def reference(jobs, arguments):
    """State of each rank after the same training, never interrupted."""
    from resilience.run import Run

    hosts = [Recorder(rank) for rank in range(3)]
    for host in hosts:
        jobs.sgd(Run(host), **{**arguments, "amount": 0})  # how long a step takes changes nothing
    return [host.state["state"] for host in hosts]


def committed_in(directory: Path) -> dict[int, int]:
    """Step and generation of each checkpoint that the log records in the shared tier."""
    from resilience.journal.log import CommitLog
    from storage_backends import open_storage

    log = CommitLog(open_storage(str(directory / "storage" / RUN)), new_id=lambda: "reader")
    found = [r for r in log.refresh() if r.kind == "checkpoint" and r.body["tier"] == "shared"]
    return {record.body["step"]: record.generation for record in found}


def until(condition, *, timeout: float = 90.0, why: str) -> None:
    pause, deadline = threading.Event(), time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, why
        pause.wait(0.02)


@pytest.fixture
def copy(seed, tmp_path):
    """A copy of the seed: its storage and its nvme tier."""
    shutil.copytree(seed[0], tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def shared(copy):
    """Directory of each checkpoint that the log records in the shared tier, by step, newest first."""
    found = committed_in(copy)
    root = copy / "storage" / RUN / "checkpoints"
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


def launch(jobs, copy: Path, arguments: dict, **options):
    job = jobs.sgd.options(
        **{"storage": str(copy / "storage"), "nvme": None, "card": "card", **OPTIONS, **options}
    )
    return job.launch(view="none", **arguments)


def assert_same(result, reference, steps: int) -> None:
    assert result.finished
    assert result.steps == steps
    group = resilience.open_checkpoint(f"{result.storage}/{result.run}", step=steps)
    for rank, state in enumerate(reference):
        for name in ARRAYS:
            assert np.array_equal(group[f"rank-{rank}/state/{name}"][...], state[name]), (rank, name)
    assert result.value == {"draws": 8 * steps, "weights": reference[0]["weights"].tolist()}


def test_every_kind_of_damage_is_named_skipped_and_outlived(
    cluster, jobs, cli, copy, shared, reference, arguments
):
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
    url = str(copy / "storage" / RUN)
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
    checked = cli("verify", RUN, "--storage", copy / "storage", "--nvme", copy / "no-nvme", "--json")
    assert checked.returncode == 1, checked.stdout + checked.stderr
    report = {c["step"]: c for c in json.loads(checked.stdout)["checkpoints"] if c["tier"] == "shared"}
    assert {step for step, c in report.items() if c["verdict"] == "damaged"} == set(files)
    for step, name in files.items():
        damage = report[step]["damage"]
        assert f"{of[step]}/{name}" in {d["path"] for d in damage}, (step, damage)
        assert all(d["start"] is not None for d in damage), (step, damage)
        if step in spots:
            assert spots[step] in {(d["start"], d["end"]) for d in damage}, (step, damage)
    words = cli("verify", RUN, "--storage", copy / "storage", "--step", flipped)
    assert f"rank-1.pack bytes {spots[flipped][0]}..{spots[flipped][1]}" in words.stdout
    assert words.returncode == 1

    # The same launch again (now without a near tier): the sixth is restored, the reasons are in the journal.
    result = launch(jobs, copy, arguments)
    assert_same(result, reference, arguments["steps"])
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
    again = cli("verify", RUN, "--storage", copy / "storage", "--step", arguments["steps"])
    assert again.returncode == 0, again.stdout


def test_a_damaged_near_tier_falls_back_to_the_colder_one_of_the_same_step(
    cluster, jobs, copy, shared, committed, reference, arguments
):
    newest = max(shared)
    for step, generation, tier in committed(copy / "storage", RUN):
        if tier == "nvme" and step > newest:  # where the near tier was ahead of the colder one
            for directory in copy.glob(f"nvme/{RUN}/*/checkpoints/step-{step}-g{generation}"):
                shutil.rmtree(directory)
    (pack,) = copy.glob(f"nvme/{RUN}/*/checkpoints/{shared[newest].name}/rank-0.pack")
    flip(pack, chunk_of(pack.parent, 0)["offset"])
    result = launch(jobs, copy, arguments, nvme=str(copy / "nvme"))
    assert_same(result, reference, arguments["steps"])
    last = result.history.rows("restores")[-1]
    assert (last["step"], last["tier"]) == (newest, "shared"), "not one step more is lost than need be"
    failed = result.history.sql(
        "select data ->> 'reason' as reason from events where type = 'restore.failed'"
    )
    assert any(f"{shared[newest].name}/rank-0.pack" in row["reason"] for row in failed)
    states = {(c["step"], c["tier"]): c["state"] for c in result.history.checkpoints}
    assert states[newest, "nvme"] == "quarantined"
    assert states[newest, "shared"] == "kept"


def test_with_every_checkpoint_damaged_it_never_starts_from_scratch(
    cluster, jobs, copy, shared, records, arguments
):
    for directory in shared.values():
        flip(directory / "rank-0.pack", chunk_of(directory, 0)["offset"])
    # Not without the near tier, which holds them whole but is not given; nor when that is lost, and the log has
    # all of the shared tier in quarantine.
    for nvme in (None, str(copy / "lost")):
        with pytest.raises(CorruptError) as caught:
            launch(jobs, copy, arguments, nvme=nvme)
        assert "does not start from scratch" in str(caught.value)
        assert shared[max(shared)].name in str(caught.value)
    assert not any(record.kind == "finish" for record in records(copy / "storage", RUN))
    history = resilience.history(str(copy / "storage"), run=RUN)
    assert [row["result"] for row in history.rows("attempts")] == [
        "interrupted",
        "no_checkpoint",
        "no_checkpoint",
    ]
    scratch = history.sql(
        "select * from events where type = 'restore.chosen' and step = 0 and generation > 2"
    )
    assert scratch == []
