"""``Run`` over a host that records everything, and over none (``train.local()``)."""

import random

import numpy as np
import pytest

from resilience.checkpoint import fit
from resilience.errors import InvalidError
from resilience.run import Interrupted, LocalHost, Run


class Held:
    """A checkpoint in memory: what was captured, given back."""

    def __init__(self, step, state):
        self.step, self._state = step, state
        self.names = [name for name in state if name != "rng"]

    def into(self, objects):
        return {name: fit.apply(value, self._state[name], name=name) for name, value in objects.items()}

    def rebuild(self, name, value):
        return fit.rebuild(value, self._state[name], name=name)

    def generators(self):
        return self._state.get("rng")


class Recorder:
    """A host that remembers what it was told, restores what it is given, and saves when it is asked to."""

    rank, world_size, local_rank, name, generation = 1, 4, 1, "r", 3

    def __init__(self, restored=None, *, save_at=(), stop_at=None):
        self._restored = Held(*restored) if restored else None
        self.save_at, self.stop_at = save_at, stop_at
        self.told = []
        self.saved = []

    def restored(self):
        return self._restored

    def ready(self):
        self.told.append(("ready",))

    def begin(self, step):
        self.told.append(("begin", step))

    def end(self, done, total):
        self.told.append(("end", done, total))
        return done in self.save_at

    def save(self, done, capture, objects):
        self.saved.append((done, capture(), objects))

    def stop_point(self, done):
        return done == self.stop_at

    def log(self, step, values):
        self.told.append(("log", step, values))

    def enter(self, section):
        self.told.append(("enter", section))

    def sections(self):
        return [told[1] for told in self.told if told[0] == "enter"]


class Counter:
    def __init__(self, n=0):
        self.n = n

    def state_dict(self):
        return {"n": self.n}

    def load_state_dict(self, state):
        self.n = state["n"]


def test_a_run_knows_who_it_is():
    run = Run(Recorder())
    assert (run.rank, run.world_size, run.local_rank, run.name, run.generation) == (1, 4, 1, "r", 3)
    assert run.step == 0


# Steps.


def test_every_step_begins_and_ends_and_the_sections_say_where_it_is():
    host = Recorder()
    run = Run(host)
    assert [(step, run.step) for step in run.steps(2)] == [(0, 0), (1, 1)]
    assert run.step == 2
    assert host.told == [
        ("ready",),
        ("enter", "step"),
        ("begin", 0),
        ("end", 1, 2),
        ("begin", 1),
        ("end", 2, 2),
        ("enter", "end"),
    ]


def test_steps_resume_where_the_checkpoint_was_taken():
    run = Run(Recorder((7, {})))
    assert run.step == 7
    assert list(run.steps(10)) == [7, 8, 9]


def test_a_run_restored_at_its_end_has_nothing_to_do():
    host = Recorder((10, {}))
    assert list(Run(host).steps(10)) == []
    assert host.sections() == ["step", "end"]


@pytest.mark.parametrize("total", [-1, 2.0, "3", None])
def test_a_wrong_number_of_steps_is_refused(total):
    with pytest.raises(InvalidError, match="steps"):
        Run(Recorder()).steps(total)


def test_fewer_steps_than_are_done_is_refused():
    with pytest.raises(InvalidError, match="has completed 7"):
        Run(Recorder((7, {}))).steps(5)


def test_a_second_loop_is_refused_at_the_call():
    run = Run(Recorder())
    run.steps(1)
    with pytest.raises(InvalidError, match="twice"):
        run.steps(1)


def test_what_the_host_asks_for_is_saved_at_the_boundary():
    host = Recorder(save_at=(2,))
    run = Run(host)
    state = {"n": np.zeros(1)}
    run.track(rng=False, state=state)
    for _ in run.steps(3):
        state["n"] += 1
    [(done, saved, objects)] = host.saved
    assert (done, saved["state"]["n"].tolist()) == (2, [3.0])  # the very arrays: the host copies them
    assert objects == {"state": state}
    assert set(saved) == {"state"}


def test_a_stop_point_unwinds_and_no_exception_handler_of_the_user_catches_it():
    host = Recorder(stop_at=2)
    run = Run(host)
    steps = run.steps(5)
    assert [next(steps), next(steps)] == [0, 1]
    with pytest.raises(Interrupted):
        next(steps)
    assert not issubclass(Interrupted, Exception)


def test_a_step_left_with_break_is_not_completed():
    host = Recorder()
    run = Run(host)
    for step in run.steps(5):
        if step == 2:
            break
    assert run.step == 2
    assert ("end", 3, 5) not in host.told
    assert host.sections()[-1] == "end"
    run.checkpoint()
    assert [done for done, *_ in host.saved] == [2]


# Tracking.


def test_tracked_objects_are_restored_in_place():
    saved = {"counter": {"n": 5}, "state": {"w": np.arange(3.0), "note": "old"}}
    run = Run(Recorder((4, saved)))
    counter, state = Counter(), {"w": np.zeros(3), "note": "new"}
    array = state["w"]
    run.track(counter=counter, state=state)
    assert (counter.n, state["note"]) == (5, "old")
    assert state["w"] is array
    assert array.tolist() == [0, 1, 2]


def test_names_that_are_taken_reserved_or_no_names_are_refused():
    run = Run(Recorder())
    run.track(a=Counter())
    for name in ("a", "rng", "functional", "no name"):
        with pytest.raises(InvalidError, match=name):
            run.track(**{name: Counter()})


def test_tracking_after_the_loop_began_is_refused():
    run = Run(Recorder())
    for _ in run.steps(1):
        with pytest.raises(InvalidError, match=r"after steps\(\) began"):
            run.track(a=Counter())


def test_what_cannot_be_saved_is_refused_by_name_and_type_at_once():
    with pytest.raises(InvalidError, match=r"state/hook.*function|function.*state/hook"):
        Run(Recorder()).track(state={"hook": lambda: None})


def test_a_name_the_checkpoint_lacks_and_one_nobody_tracks_are_refused():
    run = Run(Recorder((4, {"model": {"n": 1}, "optimizer": {"n": 2}})))
    with pytest.raises(InvalidError, match="holds no 'modle'; it holds model, optimizer"):
        run.track(modle=Counter())
    run.track(model=Counter())
    with pytest.raises(InvalidError, match="also holds optimizer"):
        list(run.steps(10))


def test_a_state_that_does_not_fit_lists_what_does_not():
    run = Run(Recorder((4, {"state": {"w": np.zeros(3), "old": 1}})))
    with pytest.raises(InvalidError, match=r"missing.*new.*unexpected.*old.*different.*w"):
        run.track(state={"w": np.zeros(4), "new": 1})


# Random numbers.


def draw():
    return random.random(), float(np.random.rand())


def test_generators_are_restored_as_the_loop_begins_so_set_up_may_draw():
    random.seed(1)
    np.random.seed(1)
    host = Recorder(save_at=(1,))
    first = Run(host)
    for _ in first.steps(2):
        drawn = draw()  # of step 1, after the snapshot of step 1
    saved = {"rng": host.saved[0][1]["rng"]}
    random.seed(99)
    np.random.seed(99)
    again = Run(Recorder((1, saved)))
    again.track()
    draw()  # set-up code
    assert [draw() for _ in again.steps(2)] == [drawn]


def test_generators_are_left_alone_when_told_so():
    host = Recorder(save_at=(1,))
    run = Run(host)
    run.track(rng=False)
    run.track()  # once told, it stays so
    list(run.steps(1))
    assert "rng" not in host.saved[0][1]
    random.seed(5)
    wanted = random.Random(5).random()
    other = Run(Recorder((0, {"rng": {"garbage": 1}})))
    other.track(rng=False)
    assert [random.random() for _ in other.steps(1)] == [wanted]


# By hand, sections, metrics, functional state.


def test_a_checkpoint_by_hand_waits_for_the_end_of_its_step_and_is_made_once():
    host = Recorder()
    run = Run(host)
    run.checkpoint()
    assert [done for done, *_ in host.saved] == [0]
    for step in run.steps(4):
        if step == 1:
            run.checkpoint()
            assert len(host.saved) == 1
    run.checkpoint()
    assert [done for done, *_ in host.saved] == [0, 2, 4]


def test_a_request_by_hand_and_the_hosts_own_are_one_save():
    host = Recorder(save_at=(1,))
    run = Run(host)
    for _ in run.steps(2):
        if run.step == 0:
            run.checkpoint()
    assert [done for done, *_ in host.saved] == [1]


def test_sections_nest_and_are_left_on_an_exception():
    host = Recorder()
    run = Run(host)
    for _ in run.steps(1):
        with pytest.raises(KeyError), run.section("eval"), run.section("generate"):
            raise KeyError
    with run.section("export"):
        pass
    assert host.sections() == ["step", "eval", "generate", "eval", "step", "end", "export", "end"]


def test_metrics_are_numbers_of_their_step():
    host = Recorder()
    run = Run(host)
    for _ in run.steps(1):
        run.log(loss=np.float32(0.5), n=3)
        with pytest.raises(InvalidError, match=r"loss=.*str"):
            run.log(loss="low")
    assert ("log", 0, {"loss": 0.5, "n": 3.0}) in host.told


def test_functional_state_is_given_back_and_the_newest_is_saved():
    host = Recorder(save_at=(1, 2))
    run = Run(host)
    start = {"params": np.zeros(2)}
    state = run.restore(start)
    assert state is start
    for _ in run.steps(2):
        state = {"params": state["params"] + 1}
        run.save(state)
    assert [saved["functional"]["params"].tolist() for _, saved, _ in host.saved] == [[1, 1], [2, 2]]
    again = Run(Recorder((2, {"functional": host.saved[1][1]["functional"]})))
    got = again.restore({"params": np.zeros(2)})
    assert got["params"].tolist() == [2, 2]
    assert list(again.steps(3)) == [2]


# Nothing outside.


def test_on_a_local_host_the_body_just_runs():
    host = LocalHost("j")
    run = Run(host)
    state = {"n": np.zeros(1)}
    run.track(state=state)
    for step in run.steps(3):
        state["n"] += 1
        run.log(n=float(state["n"][0]))
        if step == 1:
            run.checkpoint()
        with run.section("eval"):
            pass
    assert (run.world_size, state["n"][0]) == (1, 3)
    assert host.logged == [(0, {"n": 1.0}), (1, {"n": 2.0}), (2, {"n": 3.0})]
