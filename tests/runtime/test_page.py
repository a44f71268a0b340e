"""The page a rank shares with its agent."""

import os

from resilience.runtime.page import NONE, Page


def test_what_the_rank_writes_its_agent_reads_through_another_mapping():
    agent = Page.create()
    rank = Page(os.dup(agent.fd))
    assert (agent.step, agent.section) == (NONE, "start")
    rank.beat(7)
    rank.enter("eval")
    rank.add_stall(0.25)
    rank.add_stall(0.5)
    assert (agent.step, agent.section, round(agent.stalled_s, 6)) == (7, "eval", 0.75)
    assert agent.age_s < 60
    agent.stop_at = 12
    agent.checkpoint_at = 9
    agent.release_at = 12
    agent.saves_failing = True
    assert (rank.stop_at, rank.checkpoint_at, rank.release_at, rank.saves_failing) == (12, 9, 12, True)
    rank.close()
    agent.close()


def test_a_long_or_foreign_section_name_is_cut_not_refused():
    page = Page.create()
    page.enter("é" * 100)
    assert page.section.startswith("éé")
    page.close()


def test_a_page_outlives_the_process_that_wrote_it():
    page = Page.create()
    pid = os.fork()
    if pid == 0:
        Page(os.dup(page.fd)).beat(41)
        os._exit(0)
    os.waitpid(pid, 0)
    assert page.step == 41
    page.close()
