"""The ``chaos`` fixture, in a pytest session of its own."""

import tempfile
import textwrap

import pytest

from chaos import leaks

pytest_plugins = ["pytester"]

_LEAKY = """
    import subprocess, sys

    def test_leaves_a_process(chaos):
        name = "plugin-leak"
        chaos.runs.append(name)
        process = subprocess.Popen(
            [sys.executable, "-c", "import sys; print('up', flush=True); sys.stdin.read()",
             "resilience.runtime.zygote", name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        assert process.stdout.readline() == b"up\\n"
        {after}
"""


@pytest.fixture
def session(pytester, monkeypatch):
    """Runs a test file with the plugin as an installed package has it."""
    wait = leaks.wait_until_gone
    monkeypatch.setattr(leaks, "wait_until_gone", lambda run: wait(run, timeout=0.2))

    monkeypatch.setattr(leaks, "left", None, raising=False)

    def run(body):
        pytester.makepyfile(textwrap.dedent(body))
        return pytester.runpytest_inprocess("-p", "no:cacheprovider", "-q")

    yield run
    if leaks.left is not None:
        leaks.left.kill()
        leaks.left.communicate()


def test_a_test_that_leaves_a_process_fails_and_the_process_is_named(session):
    result = session(_LEAKY.format(after="import chaos.leaks; chaos.leaks.left = process"))
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(
        ["*run plugin-leak left processes behind:*", "*resilience.runtime.zygote plugin-leak*"]
    )


def test_a_test_that_cleans_up_passes(session):
    session(_LEAKY.format(after="process.kill(); process.wait()")).assert_outcomes(passed=1)


def test_a_test_that_leaves_a_file_fails_and_the_file_is_named(session, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    result = session(
        """
        import tempfile

        def test_leaves_a_file(chaos):
            tempfile.mkstemp(prefix="resilience-left-")
        """
    )
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*files left behind: *resilience-left-*"])


def test_every_run_gets_a_name_and_places_of_its_own(session):
    session(
        """
        import resilience
        from chaos.faults import kill

        @resilience.job(workers=2)
        def train(run): ...

        def test_options(chaos):
            first, second = chaos.options(train), chaos.options(train, [kill(1, step=3)], workers=3)
            assert first.name != second.name
            assert chaos.runs == [first.name, second.name]
            assert first._options.storage == chaos.storage
            assert first._options.nvme.startswith(str(chaos.directory))
            assert (second._options.workers, second._options.card) == (3, "card")
            assert [fault["action"] for fault in second._options.faults] == ["kill"]
            assert chaos.options(train, name="mine", nvme=None)._options.nvme is None
        """
    ).assert_outcomes(passed=1)
