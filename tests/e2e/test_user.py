"""What users meet: their own errors, bad input, interruption and resumption, checkpoints by hand, output, history."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest

import resilience
from chaos.faults import kill
from resilience.errors import ExhaustedError, InvalidError, TrainingError

pytestmark = pytest.mark.ray


def own(name: str) -> str:
    """Several sessions may run on one machine, and what is left behind is looked for by name."""
    return f"{name}-{os.getpid()}"


def test_the_users_exception_comes_back_with_its_traceback_and_the_ranks_output(cluster, jobs, chaos):
    with pytest.raises(TrainingError) as caught:
        chaos.run(jobs.fails_at, arguments={"step": 7, "rank": 1})
    error = caught.value
    assert error.rank == 1
    assert error.original.rstrip().endswith("ValueError: bad sample at step 7")
    assert "jobs.py" in error.original
    assert "in fails_at" in error.original
    assert "rank 1 at step 7" in error.output
    assert str(error).startswith("Traceback"), "the original traceback comes first"
    run = chaos.runs[-1]
    history = resilience.history(chaos.storage, run=run)
    assert [g["generation"] for g in history.generations] == [1], "a bug is not retried"
    output = Path(chaos.storage, run, "logs", "g1", "rank-0.log").read_text()
    assert "rank 0 at step 0" in output


def test_state_that_cannot_be_saved_is_named_before_the_first_step(cluster, jobs, chaos):
    with pytest.raises(TrainingError) as caught:
        chaos.run(jobs.unsavable)
    assert "state/callback/hook" in str(caught.value)
    assert "function" in str(caught.value)


def test_a_restored_state_that_does_not_fit_lists_the_keys(cluster, jobs, chaos):
    with pytest.raises(TrainingError):  # leaves a checkpoint, and no finish record
        chaos.options(jobs.fails_at, name=own("fits-not")).launch(view="none", step=8)
    with pytest.raises(TrainingError) as caught:
        chaos.options(jobs.shaped, name=own("fits-not")).launch(view="none", steps=20, width=4, extra=True)
    text = str(caught.value)
    assert "state" in text
    assert "the checkpoint holds no 'state'" in text or "missing" in text


def test_missing_unexpected_and_misshaped_keys_are_told_apart(cluster, jobs, chaos):
    first = chaos.options(jobs.shaped, name=own("shapes"))
    stopped = stop_at_a_step(first, steps=100_000, width=4)
    assert not stopped.finished
    with pytest.raises(TrainingError) as caught:
        chaos.options(jobs.shaped, name=own("shapes")).launch(view="none", steps=10, width=5, extra=True)
    text = str(caught.value)
    assert "state/bias" in text
    assert "state/weights" in text
    assert "4" in text
    assert "5" in text


def stop_at_a_step(job, **arguments):
    """Launch, ask for a clean stop from another thread as Ctrl-C does once it trains; the result."""
    import ray

    from resilience.runtime.supervisor import NAMESPACE, actor_name

    found: dict[str, object] = {}

    def launch():
        try:
            found["result"] = job.launch(view="none", **arguments)
        except BaseException as error:  # handed to the test's own thread
            found["error"] = error

    thread = threading.Thread(target=launch)
    thread.start()
    while thread.is_alive():
        try:
            supervisor = ray.get_actor(actor_name(job.name), namespace=NAMESPACE)
            view = ray.get(supervisor.view.remote())
        except (ValueError, ray.exceptions.RayError):
            thread.join(0.05)
            continue
        if view["phase"] == "running" and view["step"] >= 5:
            ray.get(supervisor.request_stop.remote("interrupted by the test"))
            break
        thread.join(0.05)
    thread.join(120)
    assert not thread.is_alive()
    if "error" in found:
        raise found["error"]
    return found["result"]


def test_a_clean_stop_leaves_a_checkpoint_and_the_same_launch_goes_on_from_it(cluster, jobs, chaos):
    job = chaos.options(jobs.endless, name=own("endless"))
    stopped = stop_at_a_step(job, steps=1_000_000, amount=50)
    assert stopped.outcome.result == "interrupted"
    assert stopped.steps > 0
    saved = resilience.open_checkpoint(f"{chaos.storage}/{own('endless')}")
    assert saved["rank-0/state/n"][0] == saved["rank-1/state/n"][0] == stopped.steps, (
        "all ranks stopped at one step"
    )
    again = chaos.options(jobs.endless, name=own("endless")).launch(
        view="none", steps=stopped.steps + 20, amount=50
    )
    assert again.finished
    assert again.value == stopped.steps + 20
    generations = again.history.generations
    assert generations[-1]["start_step"] == stopped.steps, "nothing was done twice"
    assert again.incidents == []
    # A finished run stays finished: launching it again does nothing, and says the same.
    third = chaos.options(jobs.endless, name=own("endless")).launch(
        view="none", steps=stopped.steps + 20, amount=50
    )
    assert (third.value, third.steps) == (again.value, again.steps)


def test_a_run_goes_on_with_another_number_of_workers(cluster, jobs, chaos):
    two = stop_at_a_step(chaos.options(jobs.sharded, name="reshard"), steps=1_000_000)
    three = stop_at_a_step(chaos.options(jobs.sharded, name="reshard", workers=3), steps=1_000_000)
    assert three.history.generations[-1]["start_step"] == two.steps
    steps = three.steps + 5
    one = chaos.options(jobs.sharded, name="reshard", workers=1).launch(view="none", steps=steps)
    assert one.finished
    assert one.value == [[row * steps] * 3 for row in range(13)], "one rank has all the rows now"
    assert one.incidents == []
    output = Path(chaos.storage, "reshard", "logs")
    assert any("generators of rank 2 of 3" in log.read_text() for log in output.glob("*/rank-2.log"))


def test_checkpoints_by_hand_and_automatic_cadence(cluster, jobs, chaos):
    result = chaos.run(jobs.by_hand)
    steps = {row["step"] for row in result.history.checkpoints}
    assert 4 in steps, "run.checkpoint() in step 3 saves when that step is complete"
    assert 9 in steps, "the last step is always saved"


def test_functional_state_survives(cluster, jobs, chaos):
    calm = chaos.run(jobs.functional)
    faulty = chaos.run(jobs.functional, [kill(1, step=8)])
    assert faulty.value == calm.value == {"params": [6.0] * 4, "step": 12}


def test_too_few_cards_says_for_what_it_waits_and_gives_up_at_the_deadline(cluster, jobs, chaos):
    with pytest.raises(ExhaustedError) as caught:
        chaos.run(jobs.endless, workers=40, capacity_deadline=2.0)
    assert re.search(r"40 cards are needed, \d are there; waited 2 s", str(caught.value))
    waiting = resilience.history(chaos.storage, run=chaos.runs[-1]).sql(
        "select data ->> 'needed' as needed from events where type = 'capacity.waiting'"
    )
    assert waiting[0]["needed"] in ("40", 40)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"workrs": 2}, "did you mean 'workers'"),
        ({"workers": 0}, "integer >= 1"),
        ({"checkpoint_every": -1}, "integer >= 1"),
        ({"name": "a/b"}, "letters, digits"),
        ({"overhead": 2.0}, "between 0 and 1"),
    ],
)
def test_a_wrong_option_says_what_is_allowed_when_it_is_given(jobs, options, says):
    with pytest.raises(InvalidError, match=says):
        jobs.endless.options(**options)


def test_wrong_arguments_and_urls_are_refused_before_anything_starts(jobs, tmp_path):
    job = jobs.endless.options(storage=str(tmp_path / "s"), name=own("ctrl-c"))
    with pytest.raises(InvalidError, match="lr"):
        job.launch(lr=1)
    with pytest.raises(InvalidError, match="plain value"):
        job.launch(steps=object())
    with pytest.raises(InvalidError, match="pip install"):
        jobs.endless.options(storage="gs://bucket/runs").launch()
    assert not (tmp_path / "s").exists()


def test_a_newer_format_is_refused_by_name(jobs, tmp_path):
    root = tmp_path / "s" / "newer"
    root.mkdir(parents=True)
    (root / "FORMAT").write_text(
        json.dumps(
            {"format": "resilience", "version": 99, "run": "newer", "created": "2030-01-01T00:00:00+00:00"}
        )
    )
    with pytest.raises(InvalidError, match="99"):
        jobs.endless.options(storage=str(tmp_path / "s"), name="newer").launch()


def test_local_runs_the_body_in_this_process(jobs):
    assert jobs.by_hand.local() == 9
    assert jobs.functional.local()["step"] == 12
    with pytest.raises(ValueError, match="bad sample"):
        jobs.fails_at.local(rank=0)
    assert "RANK" not in os.environ


def test_state_larger_than_memory_says_how_much_is_needed(cluster, jobs, chaos):
    # Once it can be promised (it is never touched); a snapshot of it cannot.
    size = psutil.virtual_memory().total // 4 * 5
    with pytest.raises(TrainingError) as caught:
        chaos.run(jobs.huge, arguments={"size": size})
    found = re.search(r"snapshots need ([\d,]+) bytes of memory .* are available", str(caught.value))
    assert found, str(caught.value)
    assert int(found[1].replace(",", "")) >= size
    assert "docker run --memory" in str(caught.value), "how to give it"


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from jobs import endless
job = endless.options(storage={storage!r}, workers=2, checkpoint_every=100000, name={name!r}, card="card")
if __name__ == "__main__":
    result = job.launch(view="json", steps=10_000_000, amount=50)
    print("END", result.outcome.result, result.steps, flush=True)
"""


def test_ctrl_c_of_a_script_stops_cleanly_and_leaves_nothing(tmp_path):
    """A process of its own, a local Ray cluster of its own, a real SIGINT."""
    from chaos import leaks

    script = tmp_path / "script.py"
    storage = str(tmp_path / "s")
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), storage=storage, name=own("ctrl-c")))
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("{") and (json.loads(line).get("step") or 0) >= 5:
                os.kill(process.pid, signal.SIGINT)
                break
        rest = process.communicate(timeout=120)[0]
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    assert "END interrupted" in rest, "".join(lines) + rest
    steps = int(rest.split()[-1])
    saved = resilience.open_checkpoint(f"{storage}/{own('ctrl-c')}")
    assert np.asarray(saved["rank-1/state/n"])[0] == steps
    assert leaks.wait_until_gone(own("ctrl-c")) == []


def test_ctrl_c_while_the_cluster_starts_leaves_nothing(tmp_path, until):
    """The interrupt of a terminal reaches the whole group, at the moment when Ray's own processes have just begun."""
    script = tmp_path / "script.py"
    script.write_text(
        SCRIPT.format(tests=str(Path(__file__).parent), storage=str(tmp_path / "s"), name=own("ctrl-c"))
    )
    process = start(script)

    def group() -> list[psutil.Process]:
        found = []
        for each in psutil.process_iter():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if os.getsid(each.pid) == process.pid and each.status() != psutil.STATUS_ZOMBIE:
                    found.append(each)
        return found

    try:
        until(lambda: any("raylet" in each.name() for each in group()), why="the raylet")
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=120)
        assert "KeyboardInterrupt" in err
        assert "END" not in out
        until(lambda: not group(), timeout=60, why="the end of everything that was started")
    finally:
        for left in group():
            left.kill()
        process.wait()
    assert not (tmp_path / "s" / own("ctrl-c") / "events").exists(), "no run had begun"


def start(script: Path) -> subprocess.Popen[str]:
    """``script`` in a process group of its own, as a terminal has it, with no cluster to use."""
    return subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
        start_new_session=True,
    )


STANDING = """
import sys
sys.path.insert(0, {tests!r})
from driven import driven
job = driven.options(storage={storage!r}, name={name!r})
if __name__ == "__main__":
    job.launch(view="none", control={control!r}, steps=100)
"""


def test_a_second_ctrl_c_ends_at_once_and_history_says_so(tmp_path, drive, until):
    """The ranks stand still before the stop point, so a clean stop cannot come first."""
    from chaos import leaks

    storage, name = str(tmp_path / "s"), own("twice")
    script = tmp_path / "script.py"
    script.write_text(
        STANDING.format(
            tests=str(Path(__file__).parent), storage=storage, name=name, control=str(drive.directory)
        )
    )
    drive.allow(7)
    process = start(script)

    def asked() -> bool:
        with resilience.history(storage, run=name) as history:
            return bool(history.sql("select * from events where type = 'stop.requested'"))

    try:
        drive.wait_at(7)
        os.killpg(process.pid, signal.SIGINT)
        until(asked, why="the first one to be heard")
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    assert "KeyboardInterrupt" in err
    history = resilience.history(storage, run=name)
    (run,) = history.runs
    assert (run["result"], run["checkpoint_step"]) == ("interrupted", 5)
    assert "ended at once" in run["reason"]
    assert leaks.wait_until_gone(name) == []


def test_a_killed_launcher_on_a_cluster_of_its_own_leaves_nothing(tmp_path):
    """SIGKILL of the process that started the local cluster: raylet, agents, zygotes, ranks and writer all go."""
    from chaos import leaks

    script = tmp_path / "script.py"
    script.write_text(
        SCRIPT.format(tests=str(Path(__file__).parent), storage=str(tmp_path / "s"), name=own("ctrl-c"))
    )
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{") and (json.loads(line).get("step") or 0) >= 5:
                break
        assert leaks.processes_of(own("ctrl-c")), "the check itself sees running processes"
    finally:
        process.kill()
        process.wait()
    assert leaks.wait_until_gone(own("ctrl-c"), timeout=60) == []
