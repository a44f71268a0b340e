"""Recruiting: enough healthy cards, of as few supernodes as possible, near the nodes that are ours."""

from __future__ import annotations

import random

from resilience.control.recruit import recruit
from resilience.control.types import Node


def nodes(*supernodes: int, cards: int = 2, start: int = 0) -> list[Node]:
    """One node per entry, named by its place, in the supernode of that number."""
    return [Node(f"n{at}", cards, (f"s{each}",)) for at, each in enumerate(supernodes, start)]


def test_nothing_is_enlisted_when_enough_cards_are_healthy() -> None:
    assert recruit(nodes(0, 0), [], 0, 0) == ()
    assert recruit(nodes(1, 1, start=1), nodes(0), wanted=2, healthy=2) == ()


def test_one_supernode_that_holds_everything_is_preferred() -> None:
    assert recruit(nodes(0, 1, 0, 1), [], wanted=4, healthy=0) == ("n0", "n2")
    assert recruit(nodes(0, 1, 1), [], wanted=4, healthy=0) == ("n1", "n2")


def test_the_smallest_supernode_that_holds_it_is_taken() -> None:
    assert recruit(nodes(0, 0, 0, 1, 1), [], wanted=4, healthy=0) == ("n3", "n4")


def test_where_none_holds_everything_the_largest_comes_first() -> None:
    chosen = recruit(nodes(0, 1, 1, 1, 2, 2), [], wanted=8, healthy=0)
    assert set(chosen) == {"n1", "n2", "n3", "n0"}


def test_a_failed_card_is_replaced_from_the_supernode_that_is_ours() -> None:
    """One card of two is excluded: a healthy count of one, whatever the nodes' totals say."""
    offers = [*nodes(1, 1, 1, start=1), Node("n10", 2, ("s0",))]
    assert recruit(offers, nodes(0), wanted=2, healthy=1) == ("n10",)


def test_a_replacement_goes_farther_only_for_what_is_missing_nearby() -> None:
    offers = [Node("near", 1, ("p0", "s0")), Node("pod", 2, ("p0", "s1")), Node("far", 8, ("p1", "s2"))]
    ours = [Node("ours", 2, ("p0", "s0"))]
    assert recruit(offers, ours, wanted=2, healthy=1) == ("near",)
    assert recruit(offers, ours, wanted=4, healthy=1) == ("near", "pod")
    assert recruit(offers, ours, wanted=6, healthy=1) == ("near", "pod", "far")


def test_all_there_is_when_that_is_too_little() -> None:
    assert recruit(nodes(0, 1), [], wanted=99, healthy=0) == ("n0", "n1")


def test_nodes_without_cards_and_nodes_of_ours_are_never_chosen() -> None:
    ours = nodes(0)
    assert recruit([Node("bare", 0), *ours], ours, wanted=4, healthy=0) == ()


def test_the_order_of_the_offers_does_not_matter() -> None:
    draw = random.Random(7)
    for _ in range(200):
        offers = [
            Node(f"n{at}", draw.randint(0, 4), (f"p{draw.randint(0, 1)}", f"s{draw.randint(0, 4)}"))
            for at in range(draw.randint(0, 12))
        ]
        ours = [Node(f"o{at}", 2, (f"p{draw.randint(0, 1)}", f"s{draw.randint(0, 4)}")) for at in range(2)]
        wanted, healthy = draw.randint(0, 30), draw.randint(0, 4)
        chosen = recruit(offers, ours, wanted, healthy)
        brought = {node.name: node.cards for node in offers}
        assert len(set(chosen)) == len(chosen)
        total = sum(brought.values())
        have = sum(brought[name] for name in chosen)
        assert have >= min(total, wanted - healthy)
        if chosen:
            assert have - brought[chosen[-1]] < wanted - healthy, "the last one was needed"
        draw.shuffle(offers)
        draw.shuffle(ours)
        assert recruit(offers, ours, wanted, healthy) == chosen
