"""Pages, step times, and when silence is a hang."""

from __future__ import annotations

from resilience.control import progress
from resilience.control.types import Assignment, Card, Policy, RankProgress

TABLE = tuple(Assignment(r, Card(f"n{r // 2}", r % 2), r % 2) for r in range(4))
POLICY = Policy(workers=4, hang_floor_s=15.0, hang_factor=10.0)


def pages(first=0):
    return progress.begin({"n0": 0, "n1": 1}, first, 0.0)


def see(p, node, at, **ranks):
    """``r0=(step, age)`` or ``r0=(step, age, section, state)``."""
    made = {
        int(name[1:]): RankProgress(v[0], v[2] if len(v) > 2 else "step", v[1], v[3] if len(v) > 3 else "S")
        for name, v in ranks.items()
    }
    return progress.observe(p, TABLE, node, made, at)


def stepping(p, until, step_s=1.0):
    for step in range(p.first, until + 1):
        at = step * step_s
        p = see(p, "n0", at, r0=(step, 0.0), r1=(step, 0.0))
        p = see(p, "n1", at, r2=(step, 0.0), r3=(step, 0.0))
    return p


def still(p, at):
    """Both nodes report at ``at`` that nothing has moved since their report before."""
    for node, place in p.nodes.items():
        held = p.pages[place]
        if held is not None:
            then, ranks = held
            aged = {
                rank: RankProgress(page.step, page.section, page.age_s + at - then, page.state)
                for rank, page in ranks.items()
            }
            p = progress.observe(p, TABLE, node, aged, at)
    return p


def suspected(p, now):
    """Whether a hang is suspected at ``now``, all nodes having reported just then."""
    return progress.suspect(POLICY, still(p, now), now)


def test_ranks_begin_with_their_first_step():
    p = see(pages(), "n0", 1.0, r0=(-1, 0.5, "start"), r1=(0, 0.1))
    assert p.begun.count == 1
    p = see(p, "n0", 2.0, r0=(0, 0.5), r1=(1, 0.1))
    assert (p.begun.count, p.top) == (2, 1)


def test_an_older_batch_and_strangers_change_nothing():
    p = stepping(pages(), 5)
    assert see(p, "n0", 3.0, r0=(9, 0.0)) is p
    assert see(p, "n7", 9.0, r0=(9, 0.0)) is p
    assert see(p, "n1", 9.0, r0=(9, 0.0), r77=(9, 0.0)).top == 5


def test_step_times_without_the_first_ones():
    p = see(pages(), "n0", 60.0, r0=(1, 0.0))  # compilation
    assert p.longest_s == 0.0
    p = stepping(pages(), 20, step_s=2.0)
    assert p.longest_s == 2.0
    assert abs(p.step_s - 2.0) < 1e-9


def test_a_rank_that_finishes_counts_as_begun():
    p = progress.finish(pages(), 2, 100, 5.0)
    assert (p.begun.count, p.finished.count, p.top) == (1, 1, 100)


def test_silence_is_suspect_after_the_floor():
    p = stepping(pages(), 20)
    assert not suspected(p, 20.0 + 14.9)
    assert suspected(p, 20.0 + 15.1)


def test_a_node_that_has_not_reported_proves_no_silence():
    p = stepping(pages(), 20)
    assert not progress.suspect(POLICY, p, 1000.0), "the supervisor stood still: nothing is known since"
    p = see(p, "n0", 36.0, r0=(20, 16.0), r1=(20, 16.0))
    assert not progress.suspect(POLICY, p, 36.0), "n1 may have moved"
    p = see(p, "n1", 36.5, r2=(20, 16.5), r3=(20, 16.5))
    assert progress.suspect(POLICY, p, 36.5)


def test_a_node_whose_ranks_have_finished_need_not_report():
    p = stepping(pages(), 20)
    p = progress.finish(progress.finish(p, 0, 20, 20.0), 1, 20, 20.0)
    p = see(p, "n1", 171.0, r2=(20, 151.0), r3=(20, 151.0))
    assert progress.suspect(POLICY, p, 171.0)


def test_long_steps_get_ten_times_their_length():
    p = stepping(pages(), 20, step_s=4.0)
    assert not suspected(p, 80.0 + 39.0)
    assert suspected(p, 80.0 + 41.0)


def test_one_rank_that_moves_is_enough():
    p = see(stepping(pages(), 20), "n1", 40.0, r2=(20, 1.0), r3=(20, 20.0))
    assert not suspected(p, 50.0)


def test_first_steps_and_named_sections_get_ten_floors():
    p = see(pages(), "n0", 1.0, r0=(0, 0.0))
    assert not suspected(p, 150.0)
    assert suspected(p, 152.0)
    p = see(stepping(pages(), 20), "n0", 21.0, r0=(20, 0.0, "eval"), r1=(20, 0.0))
    assert not suspected(p, 21.0 + 149.0)
    assert suspected(p, 21.0 + 151.0)
    p = see(p, "n0", 30.0, r0=(20, 0.0), r1=(20, 0.0))  # back from it
    assert suspected(p, 30.0 + 16.0)


def test_after_the_loop_nothing_is_suspected():
    p = see(stepping(pages(), 20), "n0", 21.0, r0=(20, 0.0, "end"), r1=(20, 0.0, "end"))
    p = see(progress.finish(p, 3, 20, 21.0), "n1", 21.0, r2=(20, 0.0, "end"), r3=(20, 0.0))
    assert not suspected(p, 1e6)


def test_ranks_left_behind_in_the_loop_are_suspected_in_the_end():
    """One rank has passed its loop, or returned; the others wait for it in a collective."""
    p = see(stepping(pages(), 20), "n0", 21.0, r0=(20, 0.0, "end"), r1=(20, 0.0))
    assert not suspected(p, 21.0 + 149.0)
    assert suspected(p, 21.0 + 151.0)
    p = progress.finish(stepping(pages(), 20), 0, 20, 21.0)
    assert not suspected(p, 21.0 + 149.0)
    assert suspected(p, 21.0 + 151.0)


def test_a_stopped_process_is_blamed_even_in_a_named_section():
    p = see(stepping(pages(), 20), "n1", 40.0, r2=(20, 20.0, "eval"), r3=(20, 20.0, "step", "T"))
    assert suspected(p, 40.0)
    assert progress.blame(p)[:2] == (3, 1.0)


def test_the_one_behind_is_blamed_with_less_confidence():
    p = see(stepping(pages(), 20), "n0", 21.0, r0=(21, 0.0), r1=(21, 0.0))
    p = see(p, "n1", 21.0, r2=(21, 0.0), r3=(20, 1.0))
    assert progress.blame(p)[:2] == (3, 0.6)


def test_unknown_is_an_answer():
    assert progress.blame(stepping(pages(), 20))[:2] == (None, 0.0)
    p = see(stepping(pages(), 20), "n0", 21.0, r0=(21, 0.0), r1=(21, 0.0))
    assert progress.blame(p) == (None, 0.0, "ranks 2, 3 stand at step 20, the others are ahead")
    assert progress.blame(pages())[0] is None
