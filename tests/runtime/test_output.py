"""What ranks print, and where it is kept."""

import os
import threading
from pathlib import Path

import pytest

from resilience.runtime.output import Outputs
from storage_backends import open_storage
from storage_backends.faults import Fault, FaultStorage

SHARED = "memory://outputs"


def written(outputs, name, text):
    path, file = outputs.open(name)
    with file:
        file.write(text.encode())
    return path


def test_on_a_local_root_the_file_is_written_in_place_and_can_be_read_at_once(tmp_path):
    outputs = Outputs(open_storage(str(tmp_path)), None)
    path, file = outputs.open("g3/rank-1")
    file.write(b"one\n")
    file.flush()
    assert Path(path) == tmp_path / "logs" / "g3" / "rank-1.log"
    assert Path(path).read_text() == "one\n"
    file.close()
    written(outputs, "g3/rank-1", "two\nthree\n")  # appended, never overwritten
    assert outputs.finish(path, 2) == "two\nthree\n"
    assert outputs.finish(path, 100) == "one\ntwo\nthree\n"
    outputs.close()
    assert Path(path).read_text() == "one\ntwo\nthree\n"


def test_elsewhere_it_is_shipped_when_its_rank_ends_and_nothing_stays_in_the_temporary_directory():
    storage = open_storage(f"{SHARED}/shipped")
    outputs = Outputs(storage, None)
    path = written(outputs, "g1/rank-0", "hello\nworld\n")
    assert outputs.finish(path, 1) == "world\n"
    outputs.close()
    assert storage.read("logs/g1/rank-0.log") == b"hello\nworld\n"
    assert not Path(path).exists()
    assert not outputs._scratch.exists()
    outputs.close()  # may run twice


def test_a_scratch_directory_that_was_given_is_used_and_left(tmp_path):
    storage = open_storage(f"{SHARED}/scratch")
    outputs = Outputs(storage, str(tmp_path))
    path = written(outputs, "g1/rank-0", "")
    outputs.finish(path, 5)
    outputs.close()
    assert Path(path) == tmp_path / "logs" / "g1" / "rank-0.log"
    assert storage.read("logs/g1/rank-0.log") == b"\n"  # it printed nothing, and that is known


def test_storage_that_is_away_is_told_and_does_not_lose_the_tail(tmp_path):
    storage = FaultStorage(open_storage(f"{SHARED}/away"), [Fault("unavailable", "sink", count=None)])
    said = []
    outputs = Outputs(storage, str(tmp_path), said.append)
    assert outputs.finish(written(outputs, "g1/rank-0", "last words\n"), 40) == "last words\n"
    outputs.close()
    assert len(said) == 1
    assert "logs/g1/rank-0.log could not be stored" in said[0]
    storage.heal()
    assert outputs.finish(written(outputs, "g1/rank-1", "later\n"), 40) == "later\n"
    outputs.close()
    assert storage.read("logs/g1/rank-1.log") == b"later\n"


def test_how_a_rank_ended_never_waits_for_storage(tmp_path):
    """Recovery begins with the tail: storage that hangs must not hold it up."""
    reached, release = threading.Event(), threading.Event()

    def hang(_seconds):
        reached.set()
        release.wait(10)

    storage = FaultStorage(
        open_storage(f"{SHARED}/slow"), [Fault("slow", "sink", count=1, seconds=60)], sleep=hang
    )
    said = []
    outputs = Outputs(storage, str(tmp_path), said.append)
    assert outputs.finish(written(outputs, "g1/rank-0", "tail\n"), 40) == "tail\n"
    assert reached.wait(10)
    assert outputs.finish(written(outputs, "g1/rank-1", "tail too\n"), 40) == "tail too\n"
    outputs.close(timeout=0.0)
    assert said == ["not all output of ranks could be stored before the end"]
    release.set()


def test_a_file_that_vanished_is_said_not_raised(tmp_path):
    outputs = Outputs(open_storage(str(tmp_path)), None)
    path = written(outputs, "g1/rank-0", "x")
    os.unlink(path)
    assert "could not be read" in outputs.finish(path, 40)
    assert outputs.finish("", 40) == ""  # it never had one


def test_a_directory_that_takes_no_file_raises_for_the_node_to_handle(tmp_path):
    (tmp_path / "logs").write_text("in the way")
    outputs = Outputs(open_storage(str(tmp_path)), None)
    with pytest.raises(OSError):
        outputs.open("g1/rank-0")
