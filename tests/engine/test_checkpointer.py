"""``Checkpointer`` with one rank: real writer processes, killed and stopped."""

import json
import logging
import os
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest
from click.testing import CliRunner
from engine_helpers import damage, packs, until, writer_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import resilience
from resilience import Checkpointer
from resilience.errors import CorruptError, ExhaustedError, FencedError, InvalidError, UnavailableError


def make(value=0):
    return {
        "w": np.full(1000, float(value)),
        "epoch": int(value),
        "more": [np.full((3, 4), value, np.float32), "a", None],
    }


def test_import_takes_neither_ray_nor_torch(script):
    ended = script("import sys, resilience; resilience.Checkpointer; print('loaded', 'ray' in sys.modules)")
    assert ended.expect("loaded") == "loaded False"


def test_what_was_saved_comes_back_in_place(run):
    with Checkpointer(run) as c:
        assert c.restore(into=make()) is None
        handle = c.save(7, make(1.5))
        assert handle.wait() == handle.wait("shared") == "shared"
        assert handle.done("shared")
        assert c.steps() == [7]
    state = make()
    w, more = state["w"], state["more"]
    with Checkpointer(run) as c:
        assert c.restore(into=state) == 7
    assert state["w"] is w
    assert state["more"] is more
    assert (w == 1.5).all()
    assert (more[0] == 1.5).all()
    assert state["epoch"] == 1


def test_the_snapshot_is_a_copy(run):
    with Checkpointer(run) as c:
        state = make(3.0)
        handle = c.save(1, state)
        state["w"][:] = 4.0
        handle.wait()
        c.restore(into=state)
        assert (state["w"] == 3.0).all()


def test_both_tiers_in_their_order(run, tmp_path):
    with Checkpointer(run, nvme=tmp_path / "nvme") as c:
        handle = c.save(1, make(1.0))
        assert handle.wait() == "nvme"
        assert handle.wait("nvme") == "nvme"
        assert handle.wait("shared") == "shared"
        with pytest.raises(InvalidError, match="no tier 'peer'"):
            handle.wait("peer")
    assert len(packs(tmp_path / "nvme" / Path(run).name / c._settings.node)) == len(packs(run)) == 1


# Any state.

_DTYPES = ["float32", "float64", "int8", "uint16", "int64", "bool", "complex64", "float16"]


@st.composite
def _array(draw):
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
    raw = np.random.default_rng(draw(st.integers(0, 2**32))).bytes(int(np.prod(shape)) * 16 + 16)
    dtype = np.dtype(draw(st.sampled_from(_DTYPES)))
    if dtype.kind == "b":
        return (np.frombuffer(raw, np.uint8, int(np.prod(shape))) % 2).astype(bool).reshape(shape)
    return np.frombuffer(raw, dtype, int(np.prod(shape))).reshape(shape).copy()


_leaf = st.one_of(
    _array(), st.integers(), st.floats(), st.text(max_size=8), st.booleans(), st.none(), st.binary(max_size=8)
)
_keys = st.one_of(st.text(max_size=6), st.integers(-3, 3))
_tree = st.recursive(
    _leaf,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(_keys, inner, max_size=3),
    ),
    max_leaves=8,
)
_state = st.one_of(st.dictionaries(_keys, _tree, max_size=4), st.lists(_tree, max_size=4))


def _blank(value):
    """The same structure with other values."""
    if isinstance(value, np.ndarray):
        return np.zeros_like(value)
    if isinstance(value, dict):
        return {key: _blank(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_blank(item) for item in value)
    return 0 if not isinstance(value, bool) and value == 1 else None


def _same(a, b):
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and (a.dtype, a.shape, a.tobytes()) == (
            b.dtype,
            b.shape,
            b.tobytes(),
        )
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and (a == b or a != a)


@pytest.fixture
def kept(run):
    with Checkpointer(run) as c:
        yield c


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(state=_state)
def test_any_state_comes_back_bit_for_bit(kept, state):
    step = kept._last + 1
    kept.save(step, state).wait()
    into = _blank(state)
    assert kept.restore(into=into, step=step) == step
    assert _same(state, into)


def test_a_tuple_at_the_top_is_filled_where_it_can_be(run):
    with Checkpointer(run) as c:
        c.save(1, (np.ones(3), {"n": 5})).wait()
        into = (np.zeros(3), {"n": 0})
        c.restore(into=into)
        assert (into[0] == 1).all()
        assert into[1] == {"n": 5}
        with pytest.raises(InvalidError, match=r"state\[1\] is a int"):
            c.restore(into=(np.zeros(3), 0))


def test_torch_modules_and_optimizers(run):
    torch = pytest.importorskip("torch")

    def build(seed):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8))
        optimizer = torch.optim.AdamW(model.parameters())
        return {"model": model, "optimizer": optimizer, "half": torch.ones(5, dtype=torch.bfloat16) * seed}

    def train(state):
        loss = state["model"](torch.ones(4, 8) * torch.arange(4.0)[:, None]).square().mean()
        state["optimizer"].zero_grad()
        loss.backward()
        state["optimizer"].step()
        return loss.item()

    saved = build(1)
    train(saved)
    with Checkpointer(run) as c:
        c.save(1, saved)
        wanted = [train(saved) for _ in range(3)]  # while it drains
    other = build(2)
    train(other)
    with Checkpointer(run) as c:
        assert c.restore(into=other) == 1
    assert [train(other) for _ in range(3)] == wanted
    assert (other["half"] == 1).all()


def test_jax_arrays(run):
    jnp = pytest.importorskip("jax.numpy", reason="jax is not installed: JAX state is not tested")
    state = {"w": jnp.arange(4.0), "key": 1}
    with Checkpointer(run) as c:
        c.save(1, state).wait()
        into = {"w": jnp.zeros(4), "key": 0}
        c.restore(into=into)
        assert (into["w"] == state["w"]).all()


# What is refused.


def test_steps_are_new_and_in_order(run):
    with Checkpointer(run) as c:
        c.save(5, make())
        for step in (5, 4):
            with pytest.raises(InvalidError, match="is not after step 5"):
                c.save(step, make())
        with pytest.raises(InvalidError, match="completed steps"):
            c.save(True, make())
        c.save(6, make()).wait()
    with Checkpointer(run) as c:
        with pytest.raises(InvalidError, match="nothing was restored"):
            c.save(7, make())
        c.restore(into=make())
        with pytest.raises(InvalidError, match="is not after step 6"):
            c.save(6, make())
        c.save(7, make()).wait()
    with pytest.raises(InvalidError, match="is closed"):
        c.save(8, make())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"rank": 1}, "rank"),
        ({"world_size": 0}, "world_size"),
        ({"keep_last": 0}, "keep_last"),
        ({"name": "a/b"}, "name"),
        ({"node": ""}, "node"),
        ({"deadline": 0}, "deadline"),
        ({"replicated": "model"}, "replicated"),
        ({"nvme": ""}, "nvme"),
        ({"nvme": "s3://bucket"}, "nvme"),
        ({"world_size": 2}, "session"),
    ],
)
def test_wrong_options_are_named(run, options, named):
    with pytest.raises(InvalidError) as caught:
        Checkpointer(run, **options)
    assert caught.value.path == named
    assert caught.value.hint


def test_memory_of_this_process_is_no_place(run):
    with pytest.raises(InvalidError, match="memory://x"):
        Checkpointer("memory://x")


def test_a_state_that_does_not_fit_changes_nothing(run):
    with Checkpointer(run) as c:
        c.save(1, make(1.0)).wait()
        into = {"w": np.zeros(5), "epoch": 0, "more": make()["more"]}
        with pytest.raises(InvalidError, match="does not fit"):
            c.restore(into=into)
        assert (into["more"][0] == 0).all()


# Failures.


def test_a_failed_save_is_told_and_a_later_one_works(run, caplog):
    with Checkpointer(run) as c:
        c.save(1, make(1.0)).wait()
        where = Path(run, "checkpoints")
        where.rename(where.with_name("aside"))
        where.write_text("in the way")
        with caplog.at_level(logging.WARNING):
            failed = c.save(2, make(2.0))
            with pytest.raises(
                (InvalidError, UnavailableError, ExhaustedError), match="step 2 was not saved"
            ):
                failed.wait(timeout=170)
        assert any("the last good one is 1" in record.getMessage() for record in caplog.records)
        where.unlink()
        where.with_name("aside").rename(where)
        assert c.save(3, make(3.0)).wait() == "shared"
        assert c.steps() == [1, 3]


def test_a_writer_that_is_killed_is_replaced(run):
    with Checkpointer(run) as c:
        c.prepare(make())
        writer = writer_of(c)
        writer.suspend()
        handle = c.save(1, make(1.0))
        with pytest.raises(TimeoutError):
            handle.wait(timeout=0.05)
        writer.kill()
        assert handle.wait() == "shared"
        assert c.restore(into=make()) == 1


_TRAIN = """
import os, signal, sys
import numpy as np, psutil
from resilience import Checkpointer
url, nvme, how = sys.argv[1], sys.argv[2] or None, sys.argv[3]
c = Checkpointer(url, nvme=nvme)
state = {"w": np.zeros(1 << 20), "n": 0}
print("restored", c.restore(into=state), flush=True)
c.save(c._last + 1, state).wait("shared")
if how == "stopped":
    psutil.Process(c._writer.pid).suspend()
state["n"] = 42
handle = c.save(c._last + 1, state)
print("saved", c._last, c._writer.pid, flush=True)
if how == "raise":
    raise RuntimeError("of the user's")
if how == "exit":
    sys.exit(3)
if how != "end":
    sys.stdin.readline()
"""


@pytest.mark.parametrize("tier", ["shared", "nvme"])
def test_what_was_sealed_when_training_was_killed_is_there_at_the_next_start(run, script, tmp_path, tier):
    nvme = str(tmp_path / "nvme") if tier == "nvme" else ""
    training = script(_TRAIN, run, nvme, "stopped")
    writer = psutil.Process(int(training.expect("saved").split()[2]))
    training.kill()
    assert writer.status() == psutil.STATUS_STOPPED  # it has written nothing of it, nor seen the end
    waker = threading.Timer(0.3, writer.resume)
    waker.start()
    state = {"w": np.zeros(1 << 20), "n": 0}
    with Checkpointer(run, nvme=nvme or None) as c:
        assert c.restore(into=state) == 1
        assert state["n"] == 42
    waker.join()


@pytest.mark.parametrize("how", ["end", "raise", "exit"])
def test_a_forgotten_close_loses_nothing_and_does_not_hang(run, script, how):
    training = script(_TRAIN, run, "", how)
    assert training.end() == {"end": 0, "raise": 1, "exit": 3}[how]
    with Checkpointer(run) as c:
        assert c.steps() == [0, 1]
        assert c.generation == 2


_FORK = """
import os, sys
from resilience import Checkpointer, InvalidError
c = Checkpointer(sys.argv[1])
child = os.fork()
if child == 0:
    try:
        c.save(1, {})
    except InvalidError:
        c.close()  # does nothing to the parent's
        sys.exit(17)
    sys.exit(0)
print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
c.save(1, {"n": 1}).wait()
print("saved", c.steps())
"""


def test_a_child_that_was_forked_is_no_rank(run, script):
    forking = script(_FORK, run)
    assert forking.expect("child") == "child 17"
    assert forking.expect("saved") == "saved [1]"
    assert forking.end() == 0


def test_a_writer_sees_the_end_of_its_rank_though_children_hold_the_channel(run, script):
    forks = _TRAIN.replace("if how != ", "if os.fork() == 0:\n    signal.pause()\nif how != ")
    training = script(forks, run, "", "wait")
    child = until(
        lambda: [p for p in psutil.Process(training.process.pid).children() if "-c" in p.cmdline()], "fork"
    )
    writer = psutil.Process(int(training.expect("saved").split()[2]))
    training.kill()
    until(lambda: not writer.is_running() or writer.status() == psutil.STATUS_ZOMBIE, "the end of the writer")
    child[0].kill()


def test_a_newer_start_fences_the_older(run):
    old = Checkpointer(run)
    old.save(1, make(1.0)).wait()
    writer = writer_of(old)
    with Checkpointer(run) as new:
        assert new.generation == old.generation + 1
        assert new.restore(into=make()) == 1
        handle = old.save(2, make(9.0))
        with pytest.raises(FencedError):
            handle.wait()
        until(lambda: not writer.is_running(), "its writer ends")
        with pytest.raises(FencedError):
            old.save(3, make(9.0))
        new.save(2, make(2.0)).wait()
        old.close()
        state = make()
        assert new.restore(into=state) == 2
        assert (state["w"] == 2.0).all()


def test_saves_wait_for_a_slot_and_say_so(run, caplog):
    with Checkpointer(run) as c:
        writer = writer_of(c)
        writer.suspend()
        c.save(1, make())
        c.save(2, make())
        saved = []
        waiting = threading.Thread(target=lambda: saved.append(c.save(3, make())))
        try:
            with caplog.at_level(logging.WARNING):
                waiting.start()
                until(
                    lambda: any("training waits at step 3" in r.getMessage() for r in caplog.records),
                    "a warning",
                )
            assert not saved
        finally:
            writer.resume()
        waiting.join(60)
        assert saved[0].wait() == "shared"
        assert c.steps() == [1, 2, 3]


def test_no_slot_within_the_deadline_is_an_error(run):
    with Checkpointer(run, deadline=0.3) as c:
        writer = writer_of(c)
        writer.suspend()
        c.save(1, make())
        last = c.save(2, make())
        try:
            with pytest.raises(UnavailableError, match="no slot"):
                c.save(3, make())
        finally:
            writer.resume()
        last.wait()
        c.save(3, make()).wait()
        assert c.steps() == [1, 2, 3]


def test_close_leaves_nothing(run, tmp_path):
    def held():
        descriptors = [
            os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _exists(fd)
        ]
        ours = [d for d in descriptors if "resilience-arena" in d or "socket" in d or "eventfd" in d]
        mapped = "resilience-arena" in Path("/proc/self/maps").read_text()
        return len(ours), mapped, len(psutil.Process().children())

    before, threads = held(), threading.active_count()
    for _ in range(2):
        with Checkpointer(run, nvme=tmp_path / "nvme") as c:
            c.restore(into=make())
            c.save(c._last + 1, make())
    c.close()
    assert held() == before
    assert threading.active_count() == threads


def _exists(fd):
    return os.path.lexists(f"/proc/self/fd/{fd}")


# Which checkpoint.


def test_damage_is_passed_over_for_the_colder_tier_then_for_an_older_step(run, tmp_path, caplog):
    nvme = tmp_path / "nvme"
    with Checkpointer(run, nvme=nvme) as c:
        for step in (1, 2):
            c.save(step, make(step)).wait("shared")
    near = nvme / Path(run).name / c._settings.node
    damage(packs(near)[1])
    with caplog.at_level(logging.WARNING), Checkpointer(run, nvme=nvme) as c:
        state = make()
        assert c.restore(into=state) == 2
        assert (state["w"] == 2).all()
        assert any("step-2-g1 in nvme is passed over" in r.getMessage() for r in caplog.records)
    damage(packs(run)[1])
    with Checkpointer(run, nvme=nvme) as c:
        state = make()
        assert c.restore(into=state) == 1
        assert (state["w"] == 1).all()
        assert c.steps() == [1]
        c.save(2, make(5)).wait("shared")
        assert c.restore(into=state) == 2
        assert (state["w"] == 5).all()


def test_never_from_scratch_over_damaged_checkpoints(run):
    with Checkpointer(run) as c:
        c.save(1, make()).wait()
    damage(packs(run)[0])
    for _ in range(2):
        with Checkpointer(run) as c, pytest.raises(CorruptError, match="none can be restored"):
            c.restore(into=make())


def test_going_back_to_a_step_leaves_the_newer_ones_behind(run):
    with Checkpointer(run) as c:
        for step in (10, 20, 30):
            c.save(step, make(step)).wait()
    with Checkpointer(run) as c:
        with pytest.raises(InvalidError, match="no committed checkpoint of step 15") as caught:
            c.restore(into=make(), step=15)
        assert "10, 20, 30" in caught.value.hint
        assert c.restore(into=make(), step=10) == 10
        assert c.steps() == [10, 20, 30]  # nothing is decided before something is saved
        c.save(11, make(11)).wait()
    with Checkpointer(run) as c:
        assert c.steps() == [10, 11]
        assert c.restore(into=make()) == 11


def test_old_ones_are_retired(run):
    with Checkpointer(run, keep_last=2, keep_every=10) as c:
        for step in (9, 10, 11, 12, 13):
            c.save(step, make()).wait()
        until(lambda: c.steps() == [10, 12, 13], "retiring")


def test_a_checkpoint_on_the_disk_of_another_node_is_no_reason_to_start_over(run, tmp_path):
    nvme = tmp_path / "nvme"
    with Checkpointer(run, nvme=nvme, node="a") as c:
        Path(run, "checkpoints").mkdir()
        c.save(1, make()).wait("nvme")
        c._writer.kill()  # before, or after, it reached the shared tier: take it away
        c._board.fail_all(FencedError("the test is over"))
    log = Path(run, "log")
    for record in sorted(log.iterdir()):
        if '"tier":"shared"' in record.read_text():
            pytest.skip("the drain was faster than the kill")
    for left in Path(run, "checkpoints").glob("*/rank-0.json"):
        left.unlink()
    with Checkpointer(run, nvme=nvme, node="b") as c, pytest.raises(UnavailableError, match="nvme tier of a"):
        c.restore(into=make())


# The run is one like others.


def test_the_command_line_shows_it(run):
    with Checkpointer(run) as c:
        c.save(3, make(1.0)).wait()
    root, name = str(Path(run).parent), Path(run).name
    from resilience.cli.main import main

    def call(*arguments):
        done = CliRunner().invoke(main, [*arguments, "--storage", root])
        assert done.exit_code == 0, done.output
        return done.output

    assert "1 whole" in call("verify", name)
    status = json.loads(call("status", name, "--json"))
    assert (status["phase"], status["checkpoint"]["step"]) == ("done", 3)
    assert "Checkpointer" in call("history", name)
    assert [it["step"] for it in resilience.history(root, run=name).sql("SELECT step FROM checkpoints")] == [
        3
    ]


def test_zarr_opens_it(run):
    with Checkpointer(run) as c:
        c.save(
            3,
            make(1.5),
        ).wait()
    group = resilience.open_checkpoint(run)
    assert (group["rank-0/w"][:] == 1.5).all()


def test_replicated_names_have_no_rank(run):
    with Checkpointer(run, replicated=["w"]) as c:
        c.save(3, make(1.5)).wait()
        assert (resilience.open_checkpoint(run)["w"][:] == 1.5).all()
    with Checkpointer(run, replicated=["v"]) as c:
        c.restore(into=make())
        with pytest.raises(InvalidError, match="'v'"):
            c.save(4, make())
