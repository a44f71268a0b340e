"""What must hold 2: whoever was replaced and wakes again writes nothing that counts; one supervisor is in charge."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import resilience
from chaos import leaks
from resilience.errors import FencedError

pytestmark = pytest.mark.ray

RUN = f"zombies-{os.getpid()}"  # several sessions may run on one machine
SIZE = 1000


def tree_of(run: str, rank_pid: int) -> list[psutil.Process]:
    """Every process of the node that a rank runs on, agent first: agent, zygote, writer, ranks."""
    agent = psutil.Process(rank_pid).parent().parent()
    assert run in " ".join(child.cmdline()[-1] + " ".join(child.cmdline()) for child in agent.children())
    return [agent, *agent.children(recursive=True)]


def signal_all(processes: list[psutil.Process], number: int) -> int:
    """How many were there to get it."""
    reached = 0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            os.kill(process.pid, number)
            reached += 1
    return reached


def assert_one_in_charge(log) -> None:
    """After the fence of a generation nothing of an older one was ever recorded."""
    newest = 0
    for record in log:
        assert record.generation >= newest, f"slot {record.slot} is of a fenced generation"
        newest = max(newest, record.generation)


def test_a_stopped_node_that_wakes_after_its_replacement_writes_nothing_that_counts(
    cluster, driven, chaos, drive, records, committed, until, assert_exact
):
    """Agent, zygote, writer and ranks of a node stand still; a new generation runs on the spare; then all of them
    wake up in the middle of their steps, with a save before them."""
    job = chaos.options(driven, name=RUN, nvme=None, keep_last=50, spares=1)
    arguments = {"control": str(drive.directory), "steps": 40, "size": SIZE, "pids": True}
    launch = drive.launch(lambda: job.launch(view="none", **arguments))
    drive.allow(7)
    until(lambda: (5, 1, "shared") in committed(chaos.storage, RUN), why="the first checkpoint")
    drive.wait_at(7)
    first = tree_of(RUN, int((drive.directory / "pid-g1-rank-0").read_text()))
    assert len(first) >= 5, "agent, zygote, writer, two ranks"
    signal_all(first, signal.SIGSTOP)
    # Replaced: the new generation has its fence, its checkpoint, and stands where it may not go on yet.
    drive.wait_at(7, generation=2)
    fences = [record for record in records(chaos.storage, RUN) if record.kind == "fence"]
    assert [fence.generation for fence in fences] == [1, 2]
    # The zombies wake with permission to run past the save of step 10, before the new generation makes it.
    still = signal_all(first[2:], signal.SIGCONT)
    drive.allow(12)
    signal_all(first[:2], signal.SIGCONT)
    until(lambda: (10, 2, "shared") in committed(chaos.storage, RUN), why="the new generation's save")
    until(
        lambda: not any(p.is_running() for p in first), timeout=30, why="the end of the old agent's processes"
    )
    drive.allow(40)
    result = launch.result()
    assert result.finished
    assert_exact(resilience.open_checkpoint(f"{chaos.storage}/{RUN}"), steps=40, size=SIZE)
    assert_one_in_charge(records(chaos.storage, RUN))
    log = committed(chaos.storage, RUN)
    assert [entry for entry in log if entry[1] == 1] == [(5, 1, "shared")]
    assert len(log) == len(set(log))
    (incident,) = result.incidents
    assert (incident["kind"], incident["decision"]) == ("node", "replace node")
    assert incident["step_restored"] == 5

    assert still == len(first) - 2, "the zombies were there to be woken"


def test_a_supervisor_that_stood_still_takes_nobody_for_dead(
    cluster, driven, chaos, drive, until, records, committed
):
    """Stopped for longer than any silence it would suffer, it hears its agents before it judges them."""
    from resilience.runtime.nodes import SILENCE_S

    job = chaos.options(driven, name=RUN, nvme=None, hang_floor=SILENCE_S)
    arguments = {"control": str(drive.directory), "steps": 40, "size": SIZE}
    launch = drive.launch(lambda: job.launch(view="none", **arguments))
    drive.allow(7)
    until(lambda: (5, 1, "shared") in committed(chaos.storage, RUN), why="the first checkpoint")
    fence = next(record for record in records(chaos.storage, RUN) if record.kind == "fence")
    supervisor = int(fence.body["supervisor"].rpartition("/")[2])
    began = time.monotonic()
    os.kill(supervisor, signal.SIGSTOP)
    try:
        for second in range(int(SILENCE_S) + 3):  # the ranks go on all the while
            until(lambda second=second: time.monotonic() > began + second, why="the pause")
            drive.allow(8 + second)
            drive.wait_at(8 + second)
    finally:
        os.kill(supervisor, signal.SIGCONT)
    drive.allow(40)
    result = launch.result()
    assert result.finished
    assert result.incidents == []
    assert [g["generation"] for g in result.history.generations] == [1]


def test_two_launches_of_one_run_at_once_share_it(cluster, driven, chaos, drive, until, records):
    """Both ask at the same moment; one starts the run, the other finds it, and both get its result."""
    from resilience.runtime.launch import run_to_end

    job = chaos.options(driven, name=RUN, nvme=None)
    views: list[list[dict]] = [[], []]

    def launch(number: int):
        spec = job._spec({"control": str(drive.directory), "steps": 8, "size": SIZE})
        return run_to_end(spec, show=views[number].append)

    launches = [drive.launch(lambda n=n: launch(n)) for n in range(2)]
    drive.wait_at(0)
    until(lambda: all(views), why="both to see the run")
    drive.allow(8)
    results = [each.result() for each in launches]
    assert [r["value"] for r in results] == ["8", "8"]
    assert [r["steps"] for r in results] == [8, 8]
    attached = [any(view.get("attached") for view in seen) for seen in views]
    assert sorted(attached) == [False, True]
    fences = [record for record in records(chaos.storage, RUN) if record.kind == "fence"]
    assert len(fences) == 1, "one run, one generation"


def test_a_second_supervisor_on_another_cluster_takes_over_and_the_first_is_fenced(
    cluster, driven, chaos, drive, until, records, committed, assert_exact
):
    """Two clusters that know nothing of each other, over the same storage, under the same name."""
    job = chaos.options(driven, name=RUN, nvme=None, keep_last=50)
    arguments = {"control": str(drive.directory), "steps": 40, "size": SIZE}
    launch = drive.launch(lambda: job.launch(view="none", **arguments))
    drive.allow(7)
    until(lambda: (5, 1, "shared") in committed(chaos.storage, RUN), why="the first checkpoint")
    command = [sys.executable, "-m", "resilience.cli", "run", f"{Path(__file__).parent / 'driven.py'}:driven"]
    command += ["--name", RUN, "--storage", chaos.storage, "--json"]
    for key, value in arguments.items():
        command += ["--set", f"{key}={json.dumps(value)}"]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    second = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        until(lambda: drive.at(0, 2) >= 7 or second.poll() is not None, why="the second cluster's ranks")
        assert second.poll() is None, second.communicate()
        drive.wait_at(7, generation=2)
        drive.wait_at(7, generation=1)
        drive.allow(12)  # both may go on now; only one of them can commit step 10
        with pytest.raises(FencedError) as caught:
            launch.result()
        assert "generation 2" in str(caught.value)
        drive.runs.clear()
        until(lambda: (10, 2, "shared") in committed(chaos.storage, RUN), why="the second's commit")
        drive.allow(40)
        out, err = second.communicate(timeout=120)
    finally:
        if second.poll() is None:
            second.kill()
            second.wait()
    assert second.returncode == 0, err
    assert json.loads(out.splitlines()[-1])["result"] == "finished", out
    assert_one_in_charge(records(chaos.storage, RUN))
    assert [entry for entry in committed(chaos.storage, RUN) if entry[1] == 1] == [(5, 1, "shared")]
    assert_exact(resilience.open_checkpoint(f"{chaos.storage}/{RUN}"), steps=40, size=SIZE)
    assert leaks.wait_until_gone(RUN, timeout=30) == []
