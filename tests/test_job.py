"""The decorator: options, names, arguments, and how each end of a run comes back."""

import inspect
import os
import pickle
from dataclasses import fields

import pytest

import resilience
from resilience.control.types import Exit, Outcome
from resilience.control.types import Result as End
from resilience.errors import (
    CorruptError,
    ExhaustedError,
    FencedError,
    InvalidError,
    ResilienceError,
    TrainingError,
    UnavailableError,
)
from resilience.job import Job, load
from resilience.options import Options


@resilience.job(workers=2)
def train(run, *, lr=0.1, sizes=()):
    """Trains."""
    return {"rank": run.rank, "lr": lr, "env": os.environ["WORLD_SIZE"]}


# Options.


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"workers": 0}, "workers=0"),
        ({"workers": True}, "workers=True"),
        ({"workers": 2.0}, r"workers=2\.0"),
        ({"spares": -1}, "spares=-1"),
        ({"keep_last": 0}, "keep_last=0"),
        ({"keep_every": 0}, "keep_every=0"),
        ({"checkpoint_every": 0}, "checkpoint_every=0"),
        ({"max_restarts": -1}, "max_restarts=-1"),
        ({"overhead": 1}, "overhead=1"),
        ({"overhead": 0.0}, r"overhead=0\.0"),
        ({"overhead": float("nan")}, "overhead=nan"),
        ({"capacity_deadline": 0}, "capacity_deadline=0"),
        ({"start_deadline": "soon"}, "start_deadline='soon'"),
        ({"stop_deadline": float("nan")}, "stop_deadline=nan"),
        ({"hang_floor": float("inf")}, "hang_floor=inf"),
        ({"hang_floor": True}, "hang_floor=True"),
        ({"name": "a/b"}, "name='a/b'"),
        ({"name": ".hidden"}, r"name='\.hidden'"),
        ({"name": "x" * 101}, "name='xxx"),
        ({"name": 7}, "name=7"),
        ({"storage": ""}, "storage=''"),
        ({"storage": 3}, "storage=3"),
        ({"nvme": 3}, "nvme=3"),
        ({"nvme": ""}, "nvme=''"),
        ({"topology": "supernode"}, "topology='supernode'"),
        ({"env": {"A": 1}}, "env={'A': 1}"),
        ({"card": ""}, "card=''"),
        ({"faults": "kill"}, "faults='kill'"),
        ({"fault_codes": {"79": "watch"}}, "fault_codes={'79': 'watch'}"),
    ],
)
def test_an_impossible_option_is_refused_at_decoration_and_says_what_is_allowed(given, said):
    with pytest.raises(InvalidError, match=f"{said}.* is not allowed: give ") as raised:
        resilience.job(**given)
    [name] = given
    assert raised.value.path == name
    assert raised.value.hint.startswith(f"set {name} to ")
    with pytest.raises(InvalidError, match=said):
        train.options(**given)


def test_a_misspelt_option_gets_the_nearest_right_spelling_and_all_of_them():
    with pytest.raises(InvalidError, match="unknown option 'worker'") as raised:
        resilience.job(worker=3)
    assert raised.value.hint.startswith("did you mean 'workers'?")
    assert all(field.name in raised.value.hint for field in fields(Options))


def test_options_change_a_copy():
    more = train.options(workers=5, checkpoint_every=3, overhead=0.05, keep_every=10)
    assert more is not train
    assert (more._options.workers, train._options.workers) == (5, 2)
    policy = more._options.policy()
    assert (policy.workers, policy.checkpoint_every, policy.overhead, policy.keep_every) == (5, 3, 0.05, 10)


def test_every_deadline_of_the_options_reaches_the_policy():
    options = Options(
        capacity_deadline=1.5, start_deadline=2.5, stop_deadline=3.5, hang_floor=4.5, max_restarts=0
    )
    policy = options.policy()
    assert (policy.capacity_deadline_s, policy.start_deadline_s, policy.stop_deadline_s) == (1.5, 2.5, 3.5)
    assert (policy.hang_floor_s, policy.max_restarts) == (4.5, 0)


# The decorator.


def test_a_job_is_still_its_function():
    assert isinstance(train, Job)
    assert (train.__name__, train.__doc__) == ("train", "Trains.")
    assert list(inspect.signature(train).parameters) == ["run", "lr", "sizes"]

    @resilience.job
    def bare(run):
        return run

    assert isinstance(bare, Job)
    assert bare(5) == 5


def test_a_function_that_takes_no_run_is_refused():
    with pytest.raises(InvalidError, match=r"no_run\(\) takes no argument"):

        @resilience.job(workers=1)
        def no_run(): ...


@pytest.mark.parametrize(
    ("function", "name"),
    [
        ("train", "train"),
        ("_private", "private"),
        ("__dunder__", "dunder__"),
        ("größe", "gr--e"),
        ("λ", "job"),
        ("x" * 150, "x" * 100),
    ],
)
def test_the_name_of_a_run_is_its_functions_as_far_as_storage_can_hold_it(function, name):
    def body(run): ...

    body.__name__ = function
    assert Job(body, Options()).name == name
    Options(name=name)  # it would be accepted as a name, too
    assert Job(body, Options(name="given")).name == "given"


# Arguments, and what other processes get.


def test_the_spec_is_plain_data_with_absolute_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = train.options(storage="runs", nvme=tmp_path / "near", spares=1, env={"A": "1"}, name="n")._spec(
        {"lr": 0.5, "sizes": [1, {"a": None}]}
    )
    assert (spec["storage"], spec["shared"]) == (str(tmp_path / "runs"), str(tmp_path / "runs" / "n"))
    assert (spec["nvme"], spec["wanted"], spec["run"]) == (str(tmp_path / "near"), 3, "n")
    assert spec["arguments"] == {"lr": 0.5, "sizes": [1, {"a": None}]}
    assert (spec["env"]["A"], spec["env"]["OMP_NUM_THREADS"]) == ("1", "1")
    assert (tmp_path / "runs" / "n" / "FORMAT").is_file()
    assert pickle.loads(pickle.dumps(spec)) == spec


def test_fault_codes_come_from_the_option_or_the_environment_and_are_checked_at_launch(tmp_path, monkeypatch):
    ours, cluster = tmp_path / "ours.toml", tmp_path / "cluster.toml"
    ours.write_text('[codes]\n79 = { action = "watch" }\n')
    cluster.write_text('[codes]\n79 = { action = "explode" }\n')
    job = train.options(storage=str(tmp_path))
    assert job._spec({})["fault_codes"] == {}
    assert job.options(fault_codes=str(ours))._spec({})["fault_codes"]["79"]["action"] == "watch"
    monkeypatch.setenv("RESILIENCE_FAULT_CODES", str(cluster))
    assert job.options(fault_codes=str(ours))._spec({})["fault_codes"]["79"]["action"] == "watch"
    with pytest.raises(InvalidError, match=r"cluster.toml: codes.79.action = 'explode'"):
        job.launch(view="none")


@pytest.mark.parametrize(
    "value", [object(), {1, 2}, b"bytes", {1: "int key"}, [{"deep": {2: 3}}], lambda: None]
)
def test_an_argument_that_would_not_arrive_as_it_is_given_is_refused(tmp_path, value):
    with pytest.raises(InvalidError, match="argument sizes is not a plain value"):
        train.options(storage=str(tmp_path))._spec({"sizes": value})
    assert list(tmp_path.iterdir()) == []  # found before anything was started or written


def test_an_argument_the_function_does_not_take_is_refused_with_its_signature(tmp_path):
    for call in (train.options(storage=str(tmp_path)).launch, train.local):
        with pytest.raises(InvalidError, match="unexpected keyword argument 'rate'") as raised:
            call(rate=1.0)
        assert "train(run, *, lr=0.1, sizes=())" in raised.value.hint


# Local.


def test_local_runs_the_body_here_and_leaves_the_environment_as_it_was(monkeypatch):
    monkeypatch.setenv("RANK", "from outside")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert train.local(lr=3.0) == {"rank": 0, "lr": 3.0, "env": "1"}
    assert os.environ["RANK"] == "from outside"
    assert "WORLD_SIZE" not in os.environ


def test_local_lets_the_users_exception_through():
    @resilience.job
    def fails(run):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        fails.local()


# Results.


def ended(result, reason="because", **outcome):
    return {"outcome": Outcome(result, reason, **outcome), "value": '{"x": 1}', "steps": 7}


SPEC = {"storage": "/runs"}


@pytest.mark.parametrize("result", [End.FINISHED, End.INTERRUPTED])
def test_a_good_end_is_a_result(result):
    got = train._result(SPEC, ended(result))
    assert (got.run, got.value, got.steps, got.storage) == ("train", {"x": 1}, 7, "/runs")
    assert got.finished is (result is End.FINISHED)
    assert train._result(SPEC, {**ended(result), "value": None}).value is None


@pytest.mark.parametrize(
    ("result", "error"),
    [
        (End.USER_ERROR, TrainingError),
        (End.NO_CAPACITY, ExhaustedError),
        (End.BUDGET_EXHAUSTED, ExhaustedError),
        (End.NO_CHECKPOINT, CorruptError),
        (End.FENCED, FencedError),
        (End.UNAVAILABLE, UnavailableError),
    ],
)
def test_every_other_end_is_raised_as_its_error_with_step_and_hint(result, error):
    with pytest.raises(ResilienceError, match="because") as raised:
        train._result(SPEC, ended(result))
    assert type(raised.value) is error
    assert raised.value.step == 7
    assert "resilience " in raised.value.hint


def test_no_end_is_forgotten():
    for result in End:
        try:
            train._result(SPEC, ended(result))
        except UnavailableError:
            assert result is End.UNAVAILABLE
        except ResilienceError:
            continue


def test_the_users_error_comes_with_its_traceback_first_and_the_ranks_output():
    exit_ = Exit(
        code=1, error="ValueError: x", traceback="Traceback ...\nValueError: x\n", output="last line\n"
    )
    with pytest.raises(TrainingError) as raised:
        train._result(SPEC, ended(End.USER_ERROR, rank=3, exit=exit_))
    text = str(raised.value)
    assert text.startswith("Traceback ...\nValueError: x")
    assert text.endswith("last output of rank 3:\nlast line")
    assert (raised.value.rank, raised.value.original, raised.value.output) == (
        3,
        exit_.traceback,
        exit_.output,
    )


def test_a_traceback_that_the_rank_has_printed_too_is_told_once():
    error = TrainingError("it failed", rank=1, original="Traceback ...\nValueError: x\n", output="before\n")
    assert str(error).endswith("last output of rank 1:\nbefore")
    error.output = "before\nTraceback ...\nValueError: x\n"
    assert str(error).endswith("it failed\nlast output of rank 1:\nbefore")
    error.output = "Traceback ...\nValueError: x\n"
    assert str(error).endswith("it failed")


# Loading by name.


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "some_jobs.py"
    path.write_text(
        "import resilience\n@resilience.job(workers=3)\ndef train(run): ...\ndef plain(run): ...\nvalue = 3\n"
    )
    return path


def test_a_job_is_found_by_file_and_name(script):
    assert load(f"{script}:train")._options.workers == 3
    plain = load(f"{script}:plain")
    assert (plain.name, plain._options) == ("plain", Options())


@pytest.mark.parametrize("target", ["file.py", "file.py:", ":train", ""])
def test_a_target_without_file_and_function_is_refused(target):
    with pytest.raises(InvalidError, match="names no function"):
        load(target)


def test_a_name_that_is_no_function_is_refused_with_the_jobs_there_are(script):
    for name in ("absent", "value"):
        with pytest.raises(InvalidError, match=f"no function '{name}'") as raised:
            load(f"{script}:{name}")
        assert "train" in raised.value.hint
    with pytest.raises(InvalidError, match="no such file"):
        load(f"{script.parent}/absent.py:train")


def test_a_function_that_takes_no_run_is_refused_by_name_too(tmp_path):
    (tmp_path / "jobs_without_run.py").write_text("def train(): ...\n")
    with pytest.raises(InvalidError, match=r"train\(\) takes no argument"):
        load(f"{tmp_path}/jobs_without_run.py:train")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def train(run\n", "SyntaxError: '(' was never closed"),
        (
            "import no_such_module_anywhere\n",
            "ModuleNotFoundError: No module named 'no_such_module_anywhere'",
        ),
        ("def f():\n    raise RuntimeError('theirs')\nf()\n", "RuntimeError: theirs"),
        ("raise SystemExit(3)\n", "SystemExit: 3"),
    ],
)
def test_a_file_that_cannot_be_imported_comes_with_their_traceback_and_none_of_our_frames(
    tmp_path, text, said
):
    script = tmp_path / "broken_job.py"
    script.write_text(text)
    with pytest.raises(TrainingError, match="could not be imported") as raised:
        load(f"{script}:train")
    original = raised.value.original
    assert original.rstrip().endswith(said)
    assert f'File "{script}"' in original
    assert "importlib" not in original
    assert "entry.py" not in original
