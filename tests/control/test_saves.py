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
    assert saves.outstanding()


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


def test_memory_is_bounded_while_shared_storage_is_away():
    saves = s.Saves(1, WORLD)
    for step in range(1, 100):
        saves = s.seal(saves, sealed(0, step=step))
    assert len(saves.steps) <= 16
    assert not saves.open(1, 1)


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
