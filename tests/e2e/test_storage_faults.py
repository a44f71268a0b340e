"""What must hold 5: storage that is full, read-only or away during a save costs checkpoints, never training.

Real file systems that fill up and turn read-only, and a real S3 server behind a relay that is cut. The job is driven
by the test: it makes as many steps as it is allowed to, so nothing here depends on how long anything takes.
"""

from __future__ import annotations

import os

import pytest

import resilience

pytestmark = pytest.mark.ray

RUN = f"faults-{os.getpid()}"  # several sessions may run on one machine
SIZE = 1 << 17  # values: 1 MiB of state for each rank


def failures(history):
    return history.sql(
        "select step, rank, data ->> 'tier' as tier, data ->> 'error' as error, "
        "cast(data ->> 'last_good_step' as bigint) as last_good_step, "
        "cast(data ->> 'last_good_age_s' as double) as last_good_age_s "
        "from events where type = 'checkpoint.failed' order by time"
    )


def acknowledged(storage) -> list[int]:
    """Steps of the checkpoints that the supervisor knows to be committed, as its journal tells."""
    if RUN not in [row["run"] for row in resilience.history(storage).rows("runs")]:
        return []
    rows = resilience.history(storage, run=RUN).sql(
        "select step from events where type = 'checkpoint.committed' order by step"
    )
    return [row["step"] for row in rows]


def test_a_full_nvme_is_passed_by(cluster, driven, chaos, drive, mounts, committed, until, assert_exact):
    """The near tier fills up after a checkpoint: saves go straight to shared storage, until there is room again."""
    nvme = mounts.tmpfs(chaos.directory / "small", "16m")
    job = chaos.options(driven, name=RUN, nvme=str(nvme), keep_last=50)
    launch = drive.launch(lambda: job.launch(view="none", control=str(drive.directory), steps=25, size=SIZE))

    def has(step, tier):
        until(lambda: (step, 1, tier) in committed(chaos.storage, RUN), why=f"step {step} in {tier}")

    drive.allow(7)
    has(5, "nvme")
    has(5, "shared")
    filler = nvme / "filler"
    fill(filler)
    drive.allow(12)
    has(10, "shared")
    drive.allow(17)
    has(15, "shared")
    filler.unlink()
    drive.allow(25)
    result = launch.result()
    assert result.finished
    log = committed(chaos.storage, RUN)
    assert (10, 1, "nvme") not in log and (15, 1, "nvme") not in log
    assert (20, 1, "nvme") in log, "with room again the near tier is used again"
    assert_exact(resilience.open_checkpoint(f"{chaos.storage}/{RUN}"), steps=25, size=SIZE)
    told = failures(result.history)
    assert {(row["step"], row["tier"]) for row in told} == {(10, "nvme"), (15, "nvme")}
    assert all("ENOSPC" in row["error"] for row in told)
    assert {row["step"]: row["last_good_step"] for row in told} == {10: 5, 15: 10}
    assert all(row["last_good_age_s"] > 0 for row in told)
    assert result.incidents == []


def warning() -> str:
    """What whoever looks at the run is warned of."""
    import ray

    from resilience.runtime.supervisor import NAMESPACE, actor_name

    return ray.get(ray.get_actor(actor_name(RUN), namespace=NAMESPACE).view.remote())["warning"] or ""


def fill(path) -> None:
    """Take all the space there is."""
    with open(path, "wb", buffering=0) as file:
        for size in (1 << 20, 4096):
            try:
                while True:
                    file.write(b"\1" * size)
            except OSError:
                continue


def test_shared_storage_full_and_then_read_only(
    cluster, driven, chaos, drive, mounts, committed, until, assert_exact
):
    """All of shared storage, with the commit log, the journal and the ranks' output on it, fills up; there is room
    again; it turns read-only; and is writable again. Steps go on all the while, and saving resumes each time."""
    root = mounts.tmpfs(chaos.directory / "storage", "64m")
    job = chaos.options(driven, name=RUN, nvme=None, keep_last=50)
    launch = drive.launch(
        lambda: job.launch(view="none", control=str(drive.directory), steps=50, size=SIZE, talk=True)
    )

    def has(step):
        until(lambda: (step, 1, "shared") in committed(chaos.storage, RUN), why=f"step {step}")

    drive.allow(7)
    has(5)
    fill(root / "filler")
    drive.allow(17)  # past the saves of the steps 10 and 15
    drive.wait_at(17)
    until(lambda: "step 15 failed" in warning(), why="the warning of step 15")
    (root / "filler").unlink()
    drive.allow(22)
    has(20)
    mounts.read_only(root)
    drive.allow(32)
    drive.wait_at(32)
    until(lambda: "step 30 failed" in warning(), why="the warning of step 30")
    mounts.release(root)
    drive.allow(37)
    has(35)
    drive.allow(50)
    result = launch.result()
    assert result.finished
    assert result.value == 50
    steps = [step for step, _generation, _tier in committed(chaos.storage, RUN)]
    assert steps == [5, 20, 35, 40, 45, 50]
    for step in steps:
        assert_exact(resilience.open_checkpoint(f"{chaos.storage}/{RUN}", step=step), steps=step, size=SIZE)
    told = failures(result.history)
    assert {row["step"] for row in told} == {10, 15, 25, 30}
    assert {row["step"]: row["last_good_step"] for row in told} == {10: 5, 15: 5, 25: 20, 30: 20}
    ages = {row["step"]: row["last_good_age_s"] for row in told}
    assert 0 < ages[10] < ages[15]
    reasons = {row["step"]: row["error"] for row in told}
    assert all("ENOSPC" in reasons[step] for step in (10, 15))
    assert all("EROFS" in reasons[step] for step in (25, 30))
    assert result.incidents == [], "not a single restart"
    assert [g["generation"] for g in result.history.generations] == [1]
    assert [w for w in result.history.warnings if "dropped" in str(w) or "gap" in str(w)] == []


def test_a_bucket_out_of_reach(
    cluster, driven, chaos, drive, aws, bucket, gate, committed, until, assert_exact, monkeypatch
):
    """The network to the bucket is cut in the middle of a run, for longer than several saves, and comes back."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", gate.url)
    env = {**aws, "AWS_ENDPOINT_URL": gate.url}
    storage = f"s3://{bucket}/runs"
    job = chaos.options(driven, name=RUN, storage=storage, nvme=None, keep_last=50, env=env)
    launch = drive.launch(lambda: job.launch(view="none", control=str(drive.directory), steps=60, size=1000))

    def newest() -> int:
        return max((step for step, _generation, _tier in committed(storage, RUN)), default=0)

    drive.allow(7)
    # Acknowledged, and not only recorded: the answer is on its way through the network that is about to be cut.
    until(lambda: acknowledged(storage) == [5], why="the first checkpoint")
    gate.cut()
    drive.allow(42)
    drive.wait_at(42)
    gate.open()
    assert newest() == 5, "seven saves had nowhere to go"
    drive.allow(47)
    until(lambda: newest() >= 10, timeout=90, why="a checkpoint after the cut")
    drive.allow(60)
    result = launch.result()
    assert result.finished
    assert_exact(resilience.open_checkpoint(f"{storage}/{RUN}", step=60), steps=60, size=1000)
    assert result.incidents == []
    told = failures(result.history)
    assert told, "what could not be saved is told"
    assert told[0]["last_good_step"] == 5
    assert told[0]["last_good_age_s"] > 0
