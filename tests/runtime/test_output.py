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


@pytest.mark.parametrize(
    ("text", "tail"),
    [
        ("x" * 100 + "\n" + "y" * 50 + "\n", ["x" * 100, "y" * 50]),
        ("a line\n" * 200_000 + "the last but one\nthe last\n", ["the last but one", "the last"]),
        ("z" * 200_000 + "\nshort\n", ["short"]),
        ("bar 1\rbar 2\rbar 3", ["bar 2", "bar 3"]),
    ],
)
def test_the_tail_is_whole_lines(tmp_path, text, tail):
    outputs = Outputs(open_storage(str(tmp_path)), None)
    path = written(outputs, "g1/rank-0", text)
    assert outputs.finish(path, 2).splitlines() == tail


def test_a_line_without_end_is_told_as_far_as_there_is_room(tmp_path):
    outputs = Outputs(open_storage(str(tmp_path)), None)
    told = outputs.finish(written(outputs, "g1/rank-0", "z" * 300_000), 40)
    assert 1000 < len(told) < 100_000
    assert set(told) == {"z"}


def test_output_is_shipped_in_pieces(tmp_path):
    """A rank may print more than its node has memory for."""

    class Counting:
        def __init__(self, inner):
            self.inner, self.largest = inner, 0

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def sink(self, name):
            real, outer = self.inner.sink(name), self

            class Sink:
                def write(self, data):
                    outer.largest = max(outer.largest, len(data))
                    real.write(data)

                def __enter__(self):
                    real.__enter__()
                    return self

                def __exit__(self, *exc):
                    real.__exit__(*exc)

            return Sink()

    storage = Counting(open_storage(f"{SHARED}/pieces"))
    outputs = Outputs(storage, str(tmp_path))
    text = "0123456789" * 1_000_000
    outputs.finish(written(outputs, "g1/rank-0", text), 1)
    outputs.close()
    assert storage.read("logs/g1/rank-0.log") == text.encode()
    assert storage.largest <= 4 << 20
