"""Several ranks: nobody gathers, rank 0 commits, all restore the same."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from engine_helpers import damage, packs, until, writer_of

from resilience import Checkpointer
from resilience.checkpoint.shard import Shard
from resilience.errors import CorruptError, FencedError, InvalidError, UnavailableError
from resilience.journal.log import CommitLog
from resilience.journal.state import fold
from storage_backends import open_storage

LENGTH = 1000


def failed(error, call, *args, **options):
    """The error that a call raises; for threads."""
    with pytest.raises(error) as caught:
        call(*args, **options)
    return caught


def own(rank, value=0.0):
    return {"w": np.full(100, float(value + rank)), "n": int(value)}


def cuts(world):
    return [LENGTH * rank // world for rank in range(world + 1)]


def sharded(rank, world, filled):
    """A state of a replicated array, and of one that each rank has a piece of."""
    start, end = cuts(world)[rank : rank + 2]
    piece = np.arange(start, end, dtype=np.float64) if filled else np.zeros(end - start)
    return {
        "model": {"w": np.arange(50.0) if filled else np.zeros(50)},
        "flat": Shard.flat(piece, shape=(LENGTH,), start=start),
    }


def test_every_rank_writes_its_own_and_waits_for_all(run, group):
    g = group(3)
    handles = g.save(1, [own(rank, 10.0) for rank in range(3)])
    assert g.each(lambda rank, _c: handles[rank].wait()) == ["shared"] * 3
    assert {c.generation for c in g.ranks} == {1}
    assert len(packs(run)) == 3
    states = [own(rank) for rank in range(3)]
    assert g.restore(states) == [1, 1, 1]
    assert [state["w"][0] for state in states] == [10, 11, 12]


def test_nvme_first_by_receipts(run, group, tmp_path):
    g = group(2, nvme=tmp_path / "nvme")
    handles = g.save(1, [own(0, 1.0), own(1, 1.0)])
    assert g.each(lambda rank, _c: handles[rank].wait("nvme")) == ["nvme"] * 2
    assert g.each(lambda rank, _c: handles[rank].wait("shared")) == ["shared"] * 2
    g.close()
    shutil.rmtree(Path(run, "checkpoints"))
    states = [own(0), own(1)]
    assert group(2, nvme=tmp_path / "nvme").restore(states) == [1, 1]
    assert states[1]["w"][0] == 2


@pytest.mark.parametrize("world", [1, 3])
def test_another_number_of_ranks(run, group, world):
    saved = group(2, replicated=["model"])
    for handle in saved.save(5, [sharded(rank, 2, True) for rank in range(2)]):
        handle.wait()
    saved.close()
    states = [sharded(rank, world, False) for rank in range(world)]
    assert group(world, replicated=["model"]).restore(states) == [5] * world
    assert np.concatenate([state["flat"].local for state in states]).tolist() == list(range(LENGTH))
    assert all((state["model"]["w"] == np.arange(50.0)).all() for state in states)


def test_a_replicated_array_is_written_once(run, group):
    big = {"w": np.ones(1 << 18)}
    for handle in group(2, replicated=True).save(1, [big, big]):
        handle.wait()
    assert sum(pack.stat().st_size for pack in packs(run)) < 1.5 * big["w"].nbytes


def test_all_ranks_go_back_together_when_one_finds_damage(run, group):
    g = group(2)
    for step in (1, 2):
        for handle in g.save(step, [own(0, step), own(1, step)]):
            handle.wait()
    damage(next(pack for pack in packs(run) if pack.match("step-2-*/rank-1.pack")))
    states = [own(0), own(1)]
    assert g.restore(states) == [1, 1]
    assert [state["w"][0] for state in states] == [1, 2]
    assert g.ranks[1].steps() == [1]
    g.close()
    assert group(2).restore(states) == [1, 1]


def test_no_rank_begins_from_scratch_over_damage(run, group):
    g = group(2)
    for handle in g.save(1, [own(0), own(1)]):
        handle.wait()
    damage(packs(run)[1])
    found = g.each(lambda rank, c: failed(CorruptError, c.restore, into=own(rank)))
    assert len(found) == 2


def test_a_state_that_does_not_fit_on_one_rank_stops_all(run, group):
    g = group(2)
    for handle in g.save(1, [own(0), own(1)]):
        handle.wait()
    states = [own(0), {"w": np.zeros(7), "n": 0}]
    errors = g.each(lambda rank, c: failed(InvalidError, c.restore, into=states[rank]))
    assert "does not fit" in str(errors[1].value)
    assert "rank 1" in str(errors[0].value)


def test_a_rank_that_does_not_come_to_the_restore_is_named(run, group):
    g = group(2, deadline=0.5)
    for handle in g.save(1, [own(0), own(1)]):
        handle.wait()
    with pytest.raises(UnavailableError, match="ranks 1"):
        g.ranks[0].restore(into=own(0))


def test_a_save_that_one_rank_never_makes_is_no_checkpoint(run, group):
    g = group(2)
    lone = g.ranks[0].save(1, own(0))
    with pytest.raises(TimeoutError):
        lone.wait(timeout=0.3)
    for handle in g.save(2, [own(0, 2.0), own(1, 2.0)]):
        handle.wait()
    with pytest.raises(UnavailableError, match="step 2 was committed instead"):
        lone.wait()
    assert g.ranks[0].steps() == [2]


def test_a_failure_of_one_rank_is_told_to_all(run, group):
    g = group(2)
    for handle in g.save(1, [own(0), own(1)]):
        handle.wait()
    # The pack of rank 1 cannot be put where a directory is.
    Path(run, "checkpoints/step-2-g1/rank-1.pack/in-the-way").mkdir(parents=True)
    handles = g.save(2, [own(0), own(1)])
    errors = g.each(lambda rank, _c: failed(Exception, handles[rank].wait, timeout=100))
    assert all("step 2 was not saved" in str(error.value) for error in errors)
    for handle in g.save(3, [own(0), own(1)]):
        assert handle.wait() == "shared"


def test_what_all_had_sealed_when_they_were_left_is_taken_up(run, group):
    """A writer of another rank is as good as gone for its own rank: rank 0 of the next start waits for all."""
    g = group(2)
    g.save(1, [own(0, 3.0), own(1, 3.0)])
    for c in g.ranks:
        c._writer.leave()
    until(lambda: len(list(Path(run).glob("checkpoints/step-1-g1/rank-?.json"))) == 2, "the writers")
    log = fold(CommitLog(open_storage(run), new_id=str).refresh())
    states = [own(0), own(1)]
    assert group(2).restore(states) == [1, 1]
    assert states[1]["w"][0] == 4
    assert len(log.checkpoints) <= 1


def test_zombies_of_every_rank_are_fenced(run, group):
    old = group(2)
    for handle in old.save(1, [own(0), own(1)]):
        handle.wait()
    writers = [writer_of(c) for c in old.ranks]
    new = group(2)
    handles = old.save(2, [own(0), own(1)])
    errors = old.each(lambda rank, _c: failed(FencedError, handles[rank].wait))
    assert len(errors) == 2
    for writer in writers:
        until(lambda writer=writer: not writer.is_running(), "its end")
    assert new.restore([own(0), own(1)]) == [1, 1]


def test_a_session_is_used_once(run, group):
    with Checkpointer(run, session="a"):
        pass
    with pytest.raises(InvalidError, match="'a' was used before"):
        Checkpointer(run, session="a")


def test_a_rank_waits_for_rank_0_no_longer_than_the_deadline(run):
    with pytest.raises(UnavailableError, match="rank 0 has not begun"):
        Checkpointer(run, rank=1, world_size=2, session="b", deadline=0.2)


def test_a_rank_may_come_before_rank_0(run):
    with ThreadPoolExecutor(1) as pool:
        early = pool.submit(Checkpointer, run, rank=1, world_size=2, session="c")
        with Checkpointer(run, rank=0, world_size=2, session="c") as zero, early.result(60) as one:
            assert one.generation == zero.generation == 1
