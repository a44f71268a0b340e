"""A leak is found; nothing else is taken for one."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from chaos import leaks

# A stand-in with the command line of one of our processes; it says when it runs, and ends when its input does.
_WAIT = "import sys; print('up', flush=True); sys.stdin.read()"
RUN = f"leaky-run-{os.getpid()}"  # several sessions may run on one machine


@pytest.fixture
def leaked():
    started = []

    def start(module="resilience.runtime.zygote", run=RUN):
        process = subprocess.Popen(
            [sys.executable, "-c", _WAIT, module, run],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        started.append(process)
        assert process.stdout.readline() == b"up\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def test_a_process_of_the_run_is_found_with_its_command(leaked):
    process = leaked()
    [line] = leaks.processes_of(RUN)
    assert line.startswith(f"{process.pid} ")
    assert "resilience.runtime.zygote" in line


def test_other_runs_other_programs_and_the_dead_are_not_leaks(leaked):
    leaked(run="another-run")
    leaked(module="unrelated.module")
    dead = leaked()
    dead.kill()
    os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)  # a zombie from here on
    assert leaks.processes_of(RUN) == []
    assert leaks.wait_until_gone(RUN, timeout=0.0) == []


def test_what_ends_in_time_is_waited_for_and_what_stays_is_returned(leaked):
    stays = leaked()
    ends = leaked()
    ends.stdin.close()
    ends.wait()
    left = leaks.wait_until_gone(RUN, timeout=0.1)
    assert [int(line.split()[0]) for line in left] == [stays.pid]
    stays.stdin.close()
    assert leaks.wait_until_gone(RUN, timeout=60) == []


def test_a_process_that_ends_while_it_is_looked_at_is_no_error(leaked, monkeypatch):
    """Between the list and a closer look every process may be gone."""
    gone = leaked()
    gone.kill()
    gone.wait()
    answers = iter([[f"{gone.pid} resilience.runtime.rank {RUN}"], []])
    monkeypatch.setattr(leaks, "processes_of", lambda run: next(answers))
    assert leaks.wait_until_gone(RUN, timeout=5) == []


def test_files_that_bear_our_name_are_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = leaks.files_of_ours()
    with tempfile.NamedTemporaryFile(prefix="resilience-leak-test-") as file:
        assert leaks.files_of_ours() - before == {file.name}
    assert leaks.files_of_ours() == before
    assert not Path(file.name).exists()
