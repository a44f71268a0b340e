"""The engine's smaller parts: notes, the board, adoption's rule, doors."""

import contextlib
import socket
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience.checkpoint.part import directory
from resilience.control.types import CheckpointRef
from resilience.engine import notes
from resilience.engine.board import Board, SaveHandle
from resilience.engine.door import SERVED, door_address, door_name, wait_at_doors
from resilience.engine.gather import Gatherer, complete
from resilience.engine.notes import Failure, Receipt
from resilience.errors import CorruptError, ExhaustedError, FencedError, UnavailableError
from storage_backends import open_storage

_text = st.text(max_size=20)
_note = st.one_of(
    st.builds(Receipt, st.integers(0), st.integers(1), _text, _text, _text, _text, st.integers(0)),
    st.builds(Failure, st.integers(0), _text, _text, _text),
)


@given(_note)
def test_notes_come_back(note):
    assert notes.decode(notes.encode(note), path="x") == note


@given(_note, st.data())
def test_a_damaged_note_is_refused_and_raises_nothing_else(note, data):
    raw = bytearray(notes.encode(note))
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= 1 << data.draw(st.integers(0, 7))
    with contextlib.suppress(CorruptError):  # a flipped bit of a text may leave another note
        notes.decode(bytes(raw), path="x")


def test_names_tell_notes_from_parts():
    where = directory(3, 1)
    assert notes.rank_of_note(notes.receipt_name(where, 12)) == 12
    assert notes.rank_of_note(notes.failure_name(where, 4, "memory")) == 4
    assert notes.rank_of_part(f"{where}/rank-7.json") == 7
    for name in (f"{where}/rank-7.pack", f"{where}/zarr.json", f"{where}/refs.json"):
        assert notes.rank_of_note(name) is None
        assert notes.rank_of_part(name) is None
    assert notes.rank_of_part(notes.receipt_name(where, 12)) is None


def _receipt(rank, world=2, tier="nvme"):
    return Receipt(rank, world, "n", tier, f"part-{rank}", "0" * 64, 10)


def test_a_save_is_complete_with_all_ranks_of_one_world():
    assert complete([_receipt(1), _receipt(0)], "nvme") == [_receipt(0), _receipt(1)]
    assert complete([_receipt(0)], "nvme") is None
    assert complete([_receipt(0), _receipt(1)], "shared") is None
    assert complete([_receipt(0), _receipt(1, world=3), _receipt(2, world=3)], "nvme") is None
    assert complete([], "nvme") is None


def test_each_note_is_told_once():
    storage = open_storage("memory://gather")
    ref = CheckpointRef(3, 1)
    gather = Gatherer(storage)
    assert gather.look(ref) == []
    notes.leave(storage, ref, _receipt(0))
    notes.leave(storage, ref, _receipt(1))
    assert gather.look(ref, skip=0) == [_receipt(1)]
    assert gather.look(ref, skip=0) == []
    failure = Failure(1, "n", "shared", "full")
    notes.leave(storage, ref, failure)
    assert gather.look(ref, skip=0) == [failure]


# The board.


def board(*steps):
    made = Board(("nvme", "shared"), step=None, clock=lambda: 0.0)
    for step in steps:
        made.open(step)
    return made


def test_the_nearest_tier_is_enough():
    made = board(1)
    made.done(1, "shared")
    assert made.wait(1, None, 0) == "shared"
    made.done(1, "nvme")
    assert made.wait(1, None, 0) == "nvme"


def test_waiting_ends_when_nothing_can_come_any_more():
    made = board(1)
    assert made.fail(1, "nvme", "ExhaustedError: the disk is full\n  hint: free some")
    assert not made.fail(1, "nvme", "again")
    with pytest.raises(TimeoutError):
        made.wait(1, None, 0)
    with pytest.raises(ExhaustedError, match="the disk is full") as caught:
        made.wait(1, "nvme", 0)
    assert caught.value.hint == "free some"
    made.fail(1, "memory", "the writer died")
    with pytest.raises(UnavailableError, match="shared: the writer died"):
        made.wait(1, None, 0)
    assert made.settle(0)


def test_a_newer_checkpoint_ends_waiting_for_an_older_one_in_its_tier():
    made = board(1, 2)
    made.done(2, "nvme")
    with pytest.raises(UnavailableError, match="step 2 was committed instead"):
        made.wait(1, "nvme", 0)
    with pytest.raises(TimeoutError):
        made.wait(1, "shared", 0)
    assert made.pending() == [1, 2]
    made.done(1, "shared")
    made.done(2, "shared")
    assert made.settle(0)
    assert made.last_good()[0] == 2


def test_a_fence_ends_all_waiting_but_takes_nothing_back():
    made = board(1, 2)
    made.done(1, "nvme")
    made.fail_all(FencedError("newer"))
    assert made.wait(1, None, 0) == "nvme"
    with pytest.raises(FencedError):
        made.wait(2, None, 0)
    handle = SaveHandle(made, lambda: None, 1, 1, 0.0)
    assert handle.done("nvme")
    assert "durable in nvme" in repr(handle)


# Doors.


@pytest.mark.parametrize("word", [SERVED, b""])
def test_a_door_is_waited_at_until_its_writer_has_a_word_or_ends(word, tmp_path):
    name = door_name(str(tmp_path))
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(door_address(name, 1))
        door.listen()

        def serve():
            visitor, _ = door.accept()
            with visitor:
                visitor.sendall(word)

        serving = threading.Thread(target=serve)
        serving.start()
        assert wait_at_doors(name, deadline=30) == []
        serving.join()


def test_a_door_that_stays_shut_is_named(tmp_path):
    name = door_name(str(tmp_path))
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(door_address(name, 7))
        door.listen()
        assert wait_at_doors(name, deadline=0.01) == [f"{name}-7"]
    assert wait_at_doors(name, deadline=30) == []
