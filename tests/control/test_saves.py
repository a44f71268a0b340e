"""Counting parts: one commit per checkpoint and tier, never with a part missing."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from resilience.control import saves as s
from resilience.control.events import Persisted, Sealed
from resilience.control.types import CheckpointRef

WORLD = 3


def persisted(rank, step=10, tier="nvme", at=1.0, sha=None):
    return Persisted(at, 1, rank, step, tier, f"n{rank}", f"rank-{rank}.json", sha or f"sha{rank}", 100, 0.1)


def sealed(rank, step=10, at=1.0, stall_s=0.1):
    return Sealed(at, 1, rank, step, stall_s, 100)


def test_commit_when_the_last_part_is_durable():
    saves = s.Saves(1, WORLD)
    for rank in (2, 0):
        saves, commit = s.persist(saves, persisted(rank))
        assert commit is None
    saves, commit = s.persist(saves, persisted(1))
    assert commit.ref == CheckpointRef(10, 1)
    assert commit.tier == "nvme"
    assert commit.parts == tuple(
        (rank, f"n{rank}", f"rank-{rank}.json", f"sha{rank}") for rank in range(WORLD)
    )
    assert commit.size == 100 * WORLD
    assert saves.outstanding()


def drive(world, events):
    """Commits of ``events``, each answered at once; the saves at the end."""
    saves, made = s.Saves(1, world), []
    for event in events:
        if not saves.open(1, event.step):
            continue
        saves, commit = s.persist(saves, event)
        if commit is not None:
            made.append(commit.ref.step)
            saves, _ = s.commit(saves, event.step, event.tier, 1.0)
        assert len(saves.steps) <= s.most(world)
    return made, saves


def test_ranks_far_apart_still_get_their_checkpoints():
    """One rank of two runs 200 saves ahead of the other, which then comes after."""
    ahead = [persisted(0, step) for step in range(1, 201)]
    made, saves = drive(2, ahead + [persisted(1, step) for step in range(1, 201)])
    assert made == list(range(1, 201))
    assert saves.forgotten == 0


def test_farther_apart_than_is_followed_some_are_given_up_and_the_rest_committed():
    count = 2 * s.most(2)
    ahead = [persisted(0, step) for step in range(1, count + 1)]
    made, saves = drive(2, ahead + [persisted(1, step) for step in range(1, count + 1)])
    assert made == [*range(1, s.most(2)), count]
    assert saves.forgotten >= count - s.most(2)


def test_with_a_tier_away_the_oldest_are_forgotten():
    count = s.most(2) + 10
    made, saves = drive(2, [persisted(rank, step) for step in range(1, count + 1) for rank in (0, 1)])
    assert len(made) == count
    assert min(saves.steps) == 11
    assert saves.forgotten == 0


def test_large_worlds_follow_fewer_saves():
    assert (s.most(1), s.most(256), s.most(4096), s.most(100_000)) == (1024, 1024, 64, 16)


def test_a_repeated_report_changes_nothing():
    saves, _ = s.persist(s.Saves(1, WORLD), persisted(0))
    again, commit = s.persist(saves, persisted(0, sha="other"))
    assert again is saves
    assert commit is None


def test_a_failed_tier_is_never_committed():
    saves, news = s.fail(s.Saves(1, WORLD), 10, "nvme", 1.0)
    assert news
    assert not s.fail(saves, 10, "nvme", 1.0)[1]
    for rank in range(WORLD):
        saves, commit = s.persist(saves, persisted(rank))
        assert commit is None


def test_a_skipped_snapshot_fails_every_tier():
    saves, _ = s.fail(s.Saves(1, WORLD), 10, "memory", 1.0)
    assert all(saves.steps[10].tiers[tier].failed for tier in ("nvme", "shared"))


def test_a_newer_shared_commit_closes_older_steps():
    saves = s.seal(s.Saves(1, WORLD), sealed(0, step=10))
    for rank in range(WORLD):
        saves, _ = s.persist(saves, persisted(rank, step=20, tier="shared"))
    saves, abandoned = s.commit(saves, 20, "shared", 2.0)
    assert abandoned == (CheckpointRef(10, 1),)
    assert not saves.open(1, 10)
    assert saves.open(1, 20)
    assert saves.open(1, 30)
    assert not saves.open(2, 30)


def test_a_newer_nvme_commit_leaves_the_older_drain_alone():
    saves = s.Saves(1, WORLD)
    for rank in range(WORLD):
        saves, _ = s.persist(saves, persisted(rank, step=10))
    saves, _ = s.commit(saves, 10, "nvme", 1.0)
    for rank in range(WORLD):
        saves, _ = s.persist(saves, persisted(rank, step=20))
    saves, abandoned = s.commit(saves, 20, "nvme", 2.0)
    assert abandoned == ()
    for rank in range(WORLD):
        saves, commit = s.persist(saves, persisted(rank, step=10, tier="shared"))
    assert commit.ref.step == 10


def test_an_incomplete_step_is_abandoned_once():
    saves = s.seal(s.Saves(1, WORLD), sealed(0, step=10))
    for step in (20, 30):
        for rank in range(WORLD):
            saves, _ = s.persist(saves, persisted(rank, step=step))
        saves, abandoned = s.commit(saves, step, "nvme", 2.0)
        assert [ref.step for ref in abandoned] == ([10] if step == 20 else [])
    assert not saves.open(1, 10)


def test_memory_is_bounded_however_far_one_rank_is_ahead():
    """What the others have yet to come to stays, and the newest."""
    saves = s.Saves(1, 100_000)
    for step in range(1, 100):
        saves = s.seal(saves, sealed(0, step=step))
    assert sorted(saves.steps) == [*range(1, 16), 99]


reports = st.lists(
    st.tuples(st.integers(0, WORLD - 1), st.sampled_from([1, 2, 3]), st.sampled_from(["nvme", "shared"]))
)


@settings(max_examples=60, deadline=None)
@given(reports)
def test_any_order_commits_at_most_once_and_only_whole(reports):
    saves, seen, done = s.Saves(1, WORLD), {}, set()
    for rank, step, tier in reports:
        if not saves.open(1, step):
            continue
        seen.setdefault((step, tier), set()).add(rank)
        saves, commit = s.persist(saves, persisted(rank, step=step, tier=tier))
        if commit is not None:
            assert seen[step, tier] == set(range(WORLD))
            assert (step, tier) not in done
            done.add((step, tier))
            saves, _ = s.commit(saves, step, tier, 1.0)
