"""What a fault of a card does to the run, action by action."""

from __future__ import annotations

import pytest

from resilience.control.faults import Action
from resilience.control.types import Card, Phase, Result

RESTART, DRAIN, RESET = Action.RESTART, Action.DRAIN, Action.RESET


def recover(world):
    count = len(world.recovered)
    world.until(lambda: len(world.recovered) > count)
    return world.recovered[-1]


def test_a_watched_fault_is_written_down_and_nothing_else(make_world):
    world = make_world().run_to_step(23).mark()
    world.fault(world.card_of(1), "81078603", action=Action.WATCH, name="port link down").run_for(3)
    (noticed,) = world.records("card.noticed")
    assert (noticed.data["code"], noticed.data["name"]) == ("81078603", "port link down")
    assert noticed.card == str(world.card_of(1))
    assert world.state.phase is Phase.RUNNING
    assert not world.records("incident.detected") and not world.records("card.faulted")
    assert not world.state.cluster.excluded


def test_an_unknown_code_says_that_nobody_knows_it(make_world):
    world = make_world().run_to_step(3).mark()
    world.fault(world.card_of(0), "DEADBEEF", action=Action.WATCH)
    assert "nobody knows" in world.records("card.noticed")[0].data["why"]


def test_a_fault_that_a_new_process_clears_keeps_the_card(make_world):
    world = make_world().run_to_step(23)
    cards = [a.card for a in world.state.table]
    done = recover(world.fault(cards[1], "80C98008", action=RESTART, name="AI core ECC"))
    assert (done["kind"], done["decision"]) == ("card", "restart")
    assert [a.card for a in world.state.table] == cards
    assert not world.state.cluster.excluded


def test_the_second_of_two_faults_in_a_row_gives_the_card_up(make_world):
    world = make_world().run_to_step(23)
    card = world.card_of(1)
    recover(world.fault(card, "94", action=RESTART))
    done = recover(world.fault(card, "94", action=RESTART))  # without a step beyond the first time
    assert done["decision"] == "replace card"
    assert card not in {a.card for a in world.state.table}


def test_a_limit_replaces_the_card_however_much_progress_there_was(make_world):
    world = make_world().run_to_step(23)
    card = world.card_of(1)
    recover(world.fault(card, "80C98008", action=RESTART, limit=2))
    world.run_for(10)
    done = recover(world.fault(card, "80C98008", action=RESTART, limit=2))
    assert done["decision"] == "replace card"
    assert card in world.state.cluster.excluded


def test_a_card_to_drain_is_left_at_the_next_restart(make_world):
    world = make_world().run_to_step(23)
    card = world.card_of(1)
    world.fault(card, "8C0E4E00", action=DRAIN).run_for(3)
    assert world.state.phase is Phase.RUNNING and world.card_of(1) == card
    recover(world.kill(0))
    assert card not in {a.card for a in world.state.table}


def test_a_card_to_drain_stays_where_there_is_no_other(make_world):
    world = make_world(nodes_=2, spares=0).run_to_step(23)
    card = world.card_of(1)
    world.fault(card, "8C0E4E00", action=DRAIN)
    recover(world.kill(0))
    assert world.card_of(1) == card


def test_a_card_that_needs_a_reset_is_replaced_and_says_why(make_world):
    world = make_world().run_to_step(23)
    card = world.card_of(1)
    done = recover(world.fault(card, "95", action=RESET))
    assert (done["decision"], "reset" in done["reason"]) == ("replace card", True)
    assert card in world.state.cluster.excluded


def test_both_dies_of_a_card_go(make_world):
    world = make_world(nodes_=2, cards=4, spares=2).run_to_step(23)
    one, other = world.card_of(0), world.card_of(1)
    assert one.node == other.node
    recover(world.fault(one, "80E18402", affects=(other,)))
    assert not {one, other} & {a.card for a in world.state.table}
    assert world.records("card.faulted")[-1].data["affects"] == [str(other)]


def test_a_die_without_a_rank_takes_its_neighbour_down_with_it(make_world):
    world = make_world(nodes_=2, cards=4, spares=2).run_to_step(23)
    idle = next(
        Card(name, index)
        for name, node in world.nodes.items()
        for index in range(node.cards)
        if Card(name, index) not in {a.card for a in world.state.table}
    )
    done = recover(world.fault(idle, "80E18402", affects=(world.card_of(0),)))
    assert done["kind"] == "card"


def test_a_node_to_replace_gives_up_its_card_and_leaves_the_others_if_it_can(make_world):
    world = make_world(nodes_=3, cards=2, spares=2).run_to_step(23)
    node = world.card_of(0).node
    done = recover(world.fault(world.card_of(0), "79", action=Action.REPLACE_NODE))
    assert done["decision"] == "replace node"
    assert node not in {a.card.node for a in world.state.table}


def test_a_node_to_replace_keeps_its_other_cards_where_there_are_too_few(make_world):
    world = make_world(nodes_=2, cards=3, spares=1).run_to_step(23)
    card = world.card_of(0)
    recover(world.fault(card, "79", action=Action.REPLACE_NODE))
    assert card not in {a.card for a in world.state.table}
    assert card.node in {a.card.node for a in world.state.table}


def test_a_burst_of_one_code_is_software_and_blames_no_card(make_world):
    """MindCluster isolated a large share of nodes for an AI-core timeout that its job's software had caused."""
    world = make_world().run_to_step(23).mark()
    first, second = world.card_of(0), world.card_of(1)
    world.fault(first, "80CB8009").fault(second, "80CB8009")
    done = recover(world)
    assert (done["kind"], done["decision"]) == ("card", "restart")
    assert world.records("incident.recovered")[-1].card is None
    assert not world.state.cluster.excluded
    assert world.state.cluster.available == sum(node.cards for node in world.nodes.values())
    assert [record.card for record in world.records("card.cleared")] == [str(first)]
    world.fault(world.card_of(2), "80CB8009").run_for(2)
    assert len(world.records("incident.detected")) == 1, "the rest of the burst ends nothing"


def test_a_run_that_waits_for_a_card_goes_on_when_it_is_given_back(make_world):
    world = make_world(nodes_=2, spares=0).run_to_step(23)
    first, second = world.card_of(0), world.card_of(1)
    world.fault(first, "X").run_to(Phase.WAITING)
    world.fault(second, "X")
    recover(world)
    assert world.state.phase is Phase.RUNNING


def test_an_exception_explained_by_the_card_is_not_the_users(make_world):
    world = make_world().run_to_step(23)
    card = world.card_of(1)
    done = recover(
        world.raise_in(1, "RuntimeError: CUDA error: uncorrectable ECC").fault(card, "94", action=RESTART)
    )
    assert (done["kind"], done["decision"]) == ("card", "restart")
    assert world.outcome is None


@pytest.mark.parametrize("last", ["31", "13"], ids=["one code, soon: software", "another code"])
def test_an_exception_that_restarts_do_not_help_is_the_users_in_the_end(make_world, last):
    """An illegal address is an XID as well: what comes again in place and on another card is the code."""
    world = make_world().run_to_step(23)
    for _ in range(2):
        recover(
            world.raise_in(1, "RuntimeError: illegal memory access").fault(
                world.card_of(1), "31", action=RESTART
            )
        )
    world.raise_in(1, "RuntimeError: illegal memory access").fault(world.card_of(1), last, action=RESTART)
    world.until(lambda: world.outcome is not None)
    assert world.outcome.result is Result.USER_ERROR
    assert "illegal memory access" in world.outcome.exit.error


def test_an_exception_that_one_card_explains_every_time_is_that_cards(make_world):
    world = make_world(nodes_=2, spares=0).run_to_step(23)
    card = world.card_of(1)
    for _ in range(4):
        world.raise_in(1, "RuntimeError: uncorrectable ECC").fault(card, "94", action=RESTART)
        recover(world)
    assert world.outcome is None


@pytest.mark.parametrize("action", [action for action in Action if action.excludes])
def test_the_same_fault_once_more_of_a_card_that_is_out_does_nothing(make_world, action):
    world = make_world().run_to_step(23)
    card = world.card_of(1)
    recover(world.fault(card, "95", action=action))
    world.mark().fault(card, "95", action=action).run_for(2)
    assert not world.records("card.faulted") and not world.records("incident.detected")
