"""Judging faults of cards: software, frequency, and what is taken back."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience.control.events import CardFaulted
from resilience.control.faults import BURST_S, DAY_S, Action, Sightings, judge, known
from resilience.control.types import Card

A, B, C = Card("n0", 0), Card("n0", 1), Card("n1", 0)


def fault(at, card, code="X", **more):
    return CardFaulted(at, card, code, **more)


def told(*events, action=Action.REPLACE_CARD, ran=True):
    """The verdicts of ``events``, one after another."""
    sightings, verdicts = Sightings(), []
    for event in events:
        verdict = judge(sightings, event, action, ran=ran, shuns=frozenset())
        sightings = verdict.sightings
        verdicts.append(verdict)
    return verdicts


def test_the_same_code_on_two_cards_within_half_a_minute_is_software_and_gives_the_first_card_back():
    first, second = told(fault(0, A), fault(BURST_S, C))
    assert not first.software
    assert second.software and second.cleared == {A}


def test_later_or_another_code_or_the_same_card_is_not_software():
    assert not told(fault(0, A), fault(BURST_S + 0.1, C))[1].software
    assert not told(fault(0, A), fault(1, C, "Y"))[1].software
    assert not told(fault(0, A), fault(1, A))[1].software


def test_two_dies_of_one_card_are_one_piece():
    assert not told(fault(0, A, affects=(B,)), fault(1, B, affects=(A,)))[1].software


def test_a_node_that_fails_as_a_whole_is_one_piece_but_two_of_them_are_software():
    _first, second, third = told(fault(0, A), fault(1, B), fault(2, C), action=Action.REPLACE_NODE)
    assert not second.software
    assert third.software and third.cleared == {A, B}


def test_an_idle_spare_and_a_reporter_who_is_certain_are_never_software():
    assert not told(fault(0, A), fault(1, C), ran=False)[1].software
    assert not told(fault(0, A, certain=True), fault(1, C))[1].software
    assert not told(fault(0, A), fault(1, C, certain=True))[1].software


def test_a_card_that_has_another_fault_is_not_given_back():
    assert told(fault(0, A), fault(1, A, "Y"), fault(2, C))[2].cleared == frozenset()


def test_a_burst_lasts_while_it_moves_on_and_no_longer():
    verdicts = told(fault(0, A), fault(20, C), fault(45, B), fault(46, B), fault(74, B), fault(76, B))
    assert [verdict.software for verdict in verdicts] == [False, True, True, True, True, False]


def test_a_code_with_a_limit_counts_on_its_card_for_a_day():
    events = [fault(at, A, limit=2) for at in (0, 100)]
    assert [v.action for v in told(*events, action=Action.RESTART)] == [Action.RESTART, Action.REPLACE_CARD]
    events[1] = replace(events[1], at=DAY_S + 1)
    assert [v.action for v in told(*events, action=Action.RESTART)] == [Action.RESTART, Action.RESTART]
    events[1] = replace(events[1], at=10, card=C)
    assert told(*events, action=Action.RESTART)[1].software
    assert told(events[0], replace(events[0], at=10, limit=None), action=Action.RESTART)[1].hits == 2


def test_a_shower_of_one_code_is_one_hit():
    events = [fault(at, A, limit=2) for at in (0, 1, 3, 5)]
    assert {(v.action, v.hits) for v in told(*events, action=Action.RESTART)} == {(Action.RESTART, 1)}


def test_what_put_a_card_out_is_known_and_says_nothing_new():
    sightings = told(fault(0, A))[0].sightings
    assert known(sightings, "X", frozenset({A}))
    assert not known(sightings, "Y", frozenset({A}))
    assert not known(sightings, "X", frozenset({A, B}))
    assert not known(told(fault(0, A), action=Action.RESTART)[0].sightings, "X", frozenset({A}))


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(0, 3), st.sampled_from("XYZ")), max_size=30))
def test_no_fault_counts_against_a_card_while_another_has_the_same(script):
    """After any history: two sightings of one code on two cards never stand within 30 s of each other."""
    events = [fault(at, Card(f"n{index}", 0), code) for at, index, code in sorted(script)]
    seen = told(*events)[-1].sightings.seen if events else ()
    for one in seen:
        for other in seen:
            if one.code == other.code and one.cards != other.cards:
                assert abs(one.at - other.at) > BURST_S


@pytest.mark.parametrize("action", list(Action))
def test_the_scale_says_what_goes_out_of_use_and_what_ends_processes(action):
    assert action.fails == (action not in (Action.WATCH, Action.DRAIN))
    assert action.excludes <= action.fails
