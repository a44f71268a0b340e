"""A node's processes, all of them real: what they report, and that none outlives its reason to be."""

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from resilience.runtime.system import process_state


def alive(pid):
    return process_state(pid) not in ("X", "Z")


def test_ranks_tell_of_every_stage_from_restore_to_exit(node):
    node.train(ranks=2, every=3)
    for rank in (0, 1):
        assert node.wait("restored", rank=rank)["step"] == 0
        assert node.wait("stepped", rank=rank)["step"] == 1
        assert node.wait("sealed", rank=rank, step=3)["size"] > 0
        assert node.wait("sealed", rank=rank, step=6)
        assert node.wait("persisted", rank=rank, step=6, tier="nvme")["sha256"]
        assert node.wait("persisted", rank=rank, step=6, tier="shared")
        finished = node.wait("finished", rank=rank)
        assert (finished["steps"], finished["stopped"], finished["value"]) == (6, False, '{"sum": 448.0}')
        exited = node.wait("exited", rank=rank)
        assert (exited["code"], exited["signal"], exited["step"]) == (0, None, 6)
        assert exited["told"]["t"] == "finished"
        assert exited["output"] == f"hello from rank {rank}\n"
    assert "part" not in node.wait("sealed", rank=0, step=3)
    assert [v["step"] for seen in node.all("log") if seen["rank"] == 0 for v in seen["values"]] == list(
        range(6)
    )
    assert (node.directory / "shared" / "checkpoints" / "step-6-g1" / "rank-1.pack").is_file()


def test_progress_pages_are_reported_while_a_rank_waits(node):
    node.train(then="wait")
    node.until(lambda: "waiting" in _output(node), what="the rank's output")
    node.forget()
    page = node.wait("progress", generation=1)["ranks"][0]
    assert (page["step"], page["section"]) == (2, "step")
    assert page["state"] in "SR"
    assert page["age_s"] < 60


def _output(node, rank=0):
    try:
        return node.output(rank)
    except FileNotFoundError:
        return ""


def test_stop_ends_everything_of_a_generation_and_is_answered(node):
    node.train(ranks=2, then="wait")
    pids = [node.rank_pid(rank) for rank in (0, 1)]
    node.processes.order({"t": "stop", "generation": 1, "token": "a"})
    assert node.wait("stopped")["generation"] == 1
    assert not any(alive(pid) for pid in pids)
    exits = node.all("exited")
    assert sorted(seen["rank"] for seen in exits) == [0, 1]
    assert all(seen["condemned"] and seen["signal"] == signal.SIGKILL for seen in exits)
    node.forget()
    node.processes.order({"t": "stop", "generation": 5, "token": "b"})
    assert node.wait("stopped")["generation"] == 5  # nothing to stop is an answer, too


def test_stop_right_behind_start_lets_no_rank_slip_through(node):
    """The order to stop arrives before the zygote has told of the forks."""
    for generation in range(1, 6):
        node.train(generation, ranks=3, then="wait")
        node.processes.order({"t": "stop", "generation": generation, "token": "x"})
        node.wait("stopped", generation=generation)
        assert len([seen for seen in node.all("exited") if seen["generation"] == generation]) == 3


def test_a_killed_rank_is_reported_with_signal_and_step(node):
    node.train(ranks=2, then="wait")
    node.until(lambda: "waiting" in _output(node, 1), what="rank 1 at step 2")
    os.kill(node.rank_pid(1), signal.SIGKILL)
    exited = node.wait("exited", rank=1)
    assert (exited["code"], exited["signal"], exited["step"]) == (None, signal.SIGKILL, 2)
    assert (exited["condemned"], exited["told"]) == (False, {})
    assert "waiting" in exited["output"]
    assert alive(node.rank_pid(0))


def test_a_user_exception_comes_with_traceback_and_signature(node):
    node.train(then="raise")
    exited = node.wait("exited")
    assert exited["code"] == 1
    told = exited["told"]
    assert told["error"] == "ValueError: bad sample"
    assert 'raise ValueError("bad sample")' in told["traceback"]
    assert told["signature"].startswith("ValueError@small_job.py:")
    assert "ValueError: bad sample" in exited["output"]


def test_children_of_the_users_code_die_with_their_rank(node):
    node.train(then="child")
    node.until(lambda: "waiting" in _output(node), what="the rank's child")
    child = int(node.output().split("child ")[1].split()[0])
    assert alive(child)
    os.kill(node.rank_pid(0), signal.SIGKILL)
    node.wait("exited")
    node.until(lambda: not alive(child), what="end of the rank's child")


def test_children_of_the_users_code_die_when_the_node_closes(node):
    node.train(then="child")
    node.until(lambda: "waiting" in _output(node), what="the rank's child")
    child = int(node.output().split("child ")[1].split()[0])
    node.processes.close()
    node.until(lambda: not alive(child), what="end of the rank's child")


def test_a_dead_zygote_takes_its_ranks_along_and_is_replaced(node):
    node.train(ranks=2, then="wait")
    pids = [node.rank_pid(rank) for rank in (0, 1)]
    node.until(lambda: "waiting" in _output(node, 1), what="rank 1 at step 2")
    first = node.zygote
    node.forget()
    os.kill(first, signal.SIGKILL)
    for rank in (0, 1):
        exited = node.wait("exited", rank=rank)
        assert exited["signal"] == signal.SIGKILL
        # Nobody ordered it: a death that must be judged, not one that was asked for.
        assert exited["condemned"] is False
    assert not any(alive(pid) for pid in pids)
    node.wait("ready")
    assert node.zygote != first
    node.train(2)
    node.wait("finished", generation=2)


def test_ranks_ordered_while_no_zygote_is_ready_start_when_it_is(make_node):
    node = make_node()
    node.train()
    node.wait("ready")
    node.wait("finished")


def test_a_stopped_zygote_does_not_keep_a_generation_alive(node, monkeypatch):
    """Nothing is reaped then; the node ends the zygote rather than wait for it."""
    monkeypatch.setattr("resilience.runtime.node._REAP_S", 0.3)
    node.train(then="wait")
    pid = node.rank_pid(0)
    os.kill(node.zygote, signal.SIGSTOP)
    node.processes.order({"t": "stop", "generation": 1, "token": "x"})
    node.wait("stopped")
    assert not alive(pid)
    node.wait("ready")


def test_a_module_that_raises_at_import_is_reported_once(make_node):
    node = make_node(body="raise RuntimeError('no such driver')")
    failed = node.wait("load_failed")
    assert failed["error"] == "RuntimeError('no such driver')"
    assert "small_job.py" in failed["traceback"]
    node.train()
    exited = node.wait("exited")  # an order to a node that cannot carry it out is answered, not forgotten
    assert exited["condemned"] is False
    assert len(node.all("load_failed")) == 1


def test_a_module_that_kills_its_process_at_import_is_given_up(make_node):
    node = make_node(body="import os; os._exit(3)")
    failed = node.wait("load_failed")
    assert "while it imported" in failed["error"]
    assert "3" in failed["error"]


def test_a_signal_to_a_rank_that_is_gone_changes_nothing(node):
    node.train(then="wait", ranks=2)
    node.until(lambda: "waiting" in _output(node, 1), what="rank 1 at step 2")
    for _ in range(3):
        node.processes.order({"t": "signal", "rank": 0, "signal": signal.SIGKILL})
    node.wait("exited", rank=0)
    node.processes.order({"t": "signal", "rank": 1, "signal": signal.SIGKILL})
    node.wait("exited", rank=1)
    assert not node.all("broken")


def test_many_ranks_dying_at_once_never_break_the_node(node):
    """Their channels, their pidfds and the zygote's word become ready together, in any order."""
    for generation in range(1, 9):
        node.train(generation, ranks=4, then="wait")
        for rank in range(4):
            node.rank_pid(rank, generation)
        node.processes.order({"t": "stop", "generation": generation, "token": "x"})
        node.wait("stopped", generation=generation)
        assert not node.all("broken")


def test_a_rank_stopped_in_the_middle_of_a_message_does_not_stop_its_watcher(node):
    """A part of thousands of arrays is larger than a socket's buffer. The agent must not wait for its rest."""
    fault = {"index": 0, "action": "stop", "rank": 0, "at": {"point": "step", "step": 1}}
    node.train(failpoints=[fault], then="half a message")
    node.wait("inject")
    pid = node.rank_pid(0)
    node.processes.order({"t": "injected", "source": "rank-0-g1"})
    node.until(lambda: process_state(pid) == "T", what="the rank's stop")
    assert node.wait("progress", generation=1)
    node.forget()
    assert node.wait("progress", generation=1)["ranks"][0]["state"] == "T"
    node.processes.order({"t": "stop", "generation": 1, "token": "x"})
    node.wait("stopped")


@pytest.mark.parametrize("point", ["pack.chunk", "pack.done", "part.done"])
def test_a_writer_killed_in_a_save_is_replaced_and_the_sealed_slot_persists(node, point):
    """Seven rounds at each of three places: 21 writers killed in the middle of their work."""
    for generation in range(1, 8):
        node.forget()
        node.processes.order(
            {"t": "arm", "failpoints": [_at(point, step=3, generation=generation, tier="nvme")]}
        )
        node.train(generation, every=3)
        node.wait("inject", source="writer")
        node.processes.order({"t": "arm", "failpoints": []})
        os.kill(node.writer, signal.SIGKILL)
        node.wait("warning")
        # Its step is sealed at 3, after which the rank goes on; the successor persists it in both tiers.
        node.wait("persisted", generation=generation, step=3, tier="nvme")
        node.wait("persisted", generation=generation, step=3, tier="shared")
        assert not node.all("save_failed")
        node.processes.order({"t": "stop", "generation": generation, "token": "x"})
        node.wait("stopped", generation=generation)


def _at(point, **at):
    return {"index": 0, "action": "kill", "at": {"point": point, **at}}


def test_a_writer_killed_while_it_drains_is_replaced_and_the_pack_reaches_shared_storage(node):
    for generation in range(1, 4):
        node.forget()
        point = "drain.chunk" if generation % 2 else "drain.done"
        node.processes.order({"t": "arm", "failpoints": [_at(point, step=6, generation=generation)]})
        node.train(generation, every=6)
        node.wait("persisted", generation=generation, step=6, tier="nvme")
        node.wait("inject", source="writer")
        node.processes.order({"t": "arm", "failpoints": []})
        os.kill(node.writer, signal.SIGKILL)
        node.wait("persisted", generation=generation, step=6, tier="shared")


def test_a_writer_that_dies_again_and_again_is_given_up_and_training_goes_on(node):
    fault = {"index": 0, "action": "kill", "at": {"point": "pack.chunk", "step": 3}}
    node.processes.order({"t": "arm", "failpoints": [fault]})
    node.train(every=3, steps=1_000_000)
    for death in range(3):
        node.wait("inject", source="writer")
        if death == 2:
            node.processes.order({"t": "arm", "failpoints": []})
        pid = node.writer
        node.forget()
        os.kill(pid, signal.SIGKILL)
        node.wait("warning")
    failed = node.wait("save_failed", step=3)
    assert (failed["rank"], failed["tier"]) == (0, "memory")
    assert "died 3 times" in failed["error"]
    # The slot it died over came free, so later saves work, without a wait.
    assert node.wait("persisted", tier="shared")["step"] > 3
    assert not node.all("exited")


def test_close_leaves_no_process_and_no_descriptor(make_node):
    before = set(os.listdir("/proc/self/fd"))
    node = make_node()
    node.wait("ready")
    node.processes.order({"t": "store", "generation": 1})
    node.wait("store")
    node.train(every=3)
    node.wait("persisted", step=6, tier="shared")
    node.wait("exited")
    node.train(2, ranks=2, then="wait")
    pids = [node.zygote, node.writer, *(node.rank_pid(rank, 2) for rank in (0, 1))]
    node.processes.close()
    assert not any(alive(pid) for pid in pids)
    node.processes.close()  # may run twice
    node.processes.order({"t": "stop", "generation": 9, "token": "late"})  # and a late order is harmless
    after = set(os.listdir("/proc/self/fd"))
    assert len(after) == len(before), sorted(after ^ before)


def test_close_before_start_leaves_nothing(tmp_path, node_class):
    gc.collect()  # what tests before this one left in cycles
    before = set(os.listdir("/proc/self/fd"))
    idle = node_class(
        tmp_path
    )  # never started: a started one opens descriptors in its own thread at any moment
    opened = set(os.listdir("/proc/self/fd")) - before
    assert opened, "a node holds descriptors from the moment it is made"
    idle.processes.close()
    idle.outputs.close()
    assert set(os.listdir("/proc/self/fd")) <= before


def test_a_node_whose_loop_dies_says_so_and_ends_its_processes(node):
    node.train(then="wait")
    pids = [node.rank_pid(0), node.zygote, node.writer]
    node.processes.order({"t": "no such order"})
    assert "no such order" in node.wait("broken")["traceback"]
    node.until(lambda: not any(alive(pid) for pid in pids), what="end of the node's processes")
    node.processes.close()


def test_a_node_that_cannot_start_its_processes_says_so(tmp_path, node_class):
    """Found in the node's thread, where nobody else would hear of it."""
    directory = tmp_path / "node"
    (directory / "shared").mkdir(parents=True)
    node = node_class(directory)
    node.config["entry"] = {"not": "json-able", "x": object()}
    before = set(os.listdir("/proc/self/fd"))
    broken = node.start().wait("broken")
    assert "not JSON serializable" in broken["traceback"]
    node.processes.close()
    after = set(os.listdir("/proc/self/fd"))
    assert len(after) < len(before)  # the node's own eventfd and epoll are gone, too


AGENT = """
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("runtime_conftest", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
node = module.Node(Path(sys.argv[2])).start()
node.wait("ready")
node.processes.order({"t": "store", "generation": 1})
node.wait("store")
node.train(ranks=2, then="wait")
# A child may be heard of before its fork is.
node.until(lambda: len(node.processes.pids()) == 5, what="zygote, writer, store, two ranks")
print(*node.processes.pids(), flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("stopped", [False, True], ids=["zygote running", "zygote stopped"])
def test_a_killed_agent_leaves_no_process(tmp_path, stopped):
    agent = subprocess.Popen(
        [sys.executable, "-c", AGENT, str(Path(__file__).parent / "conftest.py"), str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        pids = {int(word) for word in agent.stdout.readline().split()}
        assert len(pids) == 5
        assert all(alive(pid) for pid in pids)
        if stopped:
            os.kill(min(pids), signal.SIGSTOP)  # the zygote is the oldest
    finally:
        agent.kill()
        agent.wait()
        agent.stdin.close()
        agent.stdout.close()
    deadline = time.monotonic() + 60
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, [(pid, process_state(pid)) for pid in pids]
        os.sched_yield()


def test_output_that_cannot_be_kept_is_a_warning_and_training_goes_on(tmp_path, make_node):
    directory = tmp_path / "node0" / "shared"
    node = make_node(prepare=lambda: (directory.mkdir(), (directory / "logs").write_text("in the way")))
    node.wait("ready")
    node.train()
    exited = node.wait("exited")
    assert (exited["code"], exited["output"]) == (0, "")
    told = [seen["message"] for seen in node.all("warning")]
    assert [message.split(" is not kept")[0] for message in told] == [
        "the output of zygote-node-0",
        "the output of writer-node-0",
        "the output of g1/rank-0",
    ]


def test_a_module_that_starts_threads_when_imported_is_told_of(make_node):
    body = "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    node = make_node(body=body + "def train(run): ...\n")
    node.wait("ready")
    assert "started 1 thread(s)" in node.wait("warning")["message"]
