"""Who belongs to one start."""

import os

import pytest

from resilience.engine.session import find, join, session_id
from resilience.errors import InvalidError, UnavailableError
from resilience.journal.log import CommitLog
from storage_backends import open_storage

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_RESTART_COUNT": "0",
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "2",
}


def test_what_is_given_is_taken():
    assert session_id("job-7/1", rank=1, world_size=4, environment={}) == "job-7/1"


def test_one_rank_is_a_session_of_its_own():
    assert session_id(None, rank=0, world_size=1) != session_id(None, rank=0, world_size=1)


def test_ranks_of_one_torchrun_agree_and_restarts_differ():
    first, second = (session_id(None, rank=rank, world_size=2, environment=TORCHRUN) for rank in (0, 1))
    assert first == second
    assert str(os.getppid()) in first  # torchrun's own id is "none" each time
    again = {**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "1"}
    assert session_id(None, rank=0, world_size=2, environment=again) != first


def test_over_several_nodes_the_launchers_differ_so_its_id_must_do():
    nodes = {**TORCHRUN, "WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "job-7"}
    assert session_id(None, rank=0, world_size=4, environment=nodes) == "torchrun/job-7/0"


def test_nothing_to_go_by_is_an_error_that_says_what_to_give():
    with pytest.raises(InvalidError, match="2 ranks") as caught:
        session_id(None, rank=0, world_size=2, environment={})
    assert "session=" in caught.value.hint


def test_the_newest_fence_of_a_session_is_its_generation():
    storage = open_storage("memory://sessions")
    ids = iter("abcdef")
    for session in ("one", "two"):
        CommitLog(storage, new_id=lambda: next(ids)).fence(
            1, {"run": "r", "supervisor": "s", "session": session}
        )
    reader = CommitLog(storage, new_id=str)
    assert join(reader, "one", deadline=0) == 1
    assert join(reader, "two", deadline=0) == 2
    assert find(reader.refresh(), "three") is None


def test_waiting_for_rank_0_ends_at_the_deadline():
    now = [0.0]
    with pytest.raises(UnavailableError, match="within 5 s"):
        join(
            CommitLog(open_storage("memory://no-session"), new_id=str),
            "x",
            deadline=5,
            clock=lambda: now[0],
            sleep=lambda seconds: now.__setitem__(0, now[0] + seconds),
        )
    assert now[0] >= 5
