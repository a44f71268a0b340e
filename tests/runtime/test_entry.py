"""Finding the user's function again from another process."""

import subprocess
import sys
from pathlib import Path

import pytest

from resilience.errors import InvalidError
from resilience.runtime.entry import Entry, load_file

JOB = """
import json, sys
imported = globals().get("__name__")
def train(run): return "from the file"
class Nested:
    @staticmethod
    def train(run): return "nested"
if __name__ == "__main__":
    from resilience.runtime.entry import Entry
    print(json.dumps(Entry.of(train).to_json()))
"""


def test_a_function_of_a_script_is_found_by_its_file_and_main_does_not_run_again(tmp_path):
    script = tmp_path / "job_script.py"
    script.write_text(JOB)
    out = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=True, timeout=60
    )
    import json

    entry = Entry.from_json(json.loads(out.stdout))
    assert entry.module is None
    assert entry.file == str(script)
    assert entry.load()(None) == "from the file"


def test_a_nested_name_and_a_module_are_found(tmp_path):
    script = tmp_path / "nested_job.py"
    script.write_text(JOB)
    module = load_file(str(script))
    assert Entry.from_json(Entry.of(module.Nested.train).to_json()).load()(None) == "nested"
    assert load_file(str(script)) is module


def test_closures_and_interactive_functions_are_refused_with_what_to_do():
    def inner(run): ...

    with pytest.raises(InvalidError, match="closure"):
        Entry.of(inner)
    namespace = {"__name__": "nowhere_module"}
    exec("def typed(run): ...", namespace)
    with pytest.raises(InvalidError, match="interactively"):
        Entry.of(namespace["typed"])


def test_a_missing_file_and_a_failing_module_leave_nothing_behind(tmp_path):
    with pytest.raises(InvalidError, match="no such file"):
        load_file(str(tmp_path / "absent.py"))
    bad = tmp_path / "bad_job.py"
    bad.write_text("raise RuntimeError('at import')")
    with pytest.raises(RuntimeError, match="at import"):
        load_file(str(bad))
    assert "resilience_job_bad_job" not in sys.modules
    assert Path(bad).exists()
