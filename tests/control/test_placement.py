"""Few supernodes, few nodes, neighbours together; after a failure everybody stays who can."""

from __future__ import annotations

import random
import time

from hypothesis import given, settings
from hypothesis import strategies as st

from resilience.control.placement import place
from resilience.control.types import Assignment, Card, Node


def cluster(*supernodes, cards=8):
    """Nodes per supernode: ``cluster(2, 3)`` = ``sn-0`` with 2 nodes, ``sn-1`` with 3."""
    names = (f"sn-{number}" for number in range(len(supernodes)))
    made = [
        Node(f"{name}-node-{i}", cards, ("pod", name))
        for name, count in zip(names, supernodes, strict=True)
        for i in range(count)
    ]
    return {node.name: node for node in made}


def used(table, nodes, level=-1):
    return {nodes[a.card.node].levels[level] for a in table}


def at(table, rank):
    return str(table[rank].card)


def test_one_supernode_where_one_is_enough_and_the_smallest_such():
    nodes = cluster(4, 2, 3)
    assert used(place(nodes, (), 16), nodes) == {"sn-1"}
    assert used(place(nodes, (), 24), nodes) == {"sn-2"}
    assert used(place(nodes, (), 32), nodes) == {"sn-0"}


def test_as_few_supernodes_as_possible_and_the_rest_in_the_smallest_that_holds_it():
    nodes = cluster(4, 1, 3, 2)
    assert used(place(nodes, (), 40), nodes) == {"sn-0", "sn-1"}
    assert used(place(nodes, (), 56), nodes) == {"sn-0", "sn-2"}


def test_as_few_nodes_as_possible():
    nodes = {n.name: n for n in (Node("a", 2), Node("b", 8), Node("c", 4))}
    assert {a.card.node for a in place(nodes, (), 8)} == {"b"}
    assert {a.card.node for a in place(nodes, (), 10)} == {"a", "b"}


def test_ranks_follow_the_topology_in_natural_order():
    nodes = {f"node-{i}": Node(f"node-{i}", 2, ("sn",)) for i in (10, 9, 2)}
    table = place(nodes, (), 6)
    assert [str(a.card) for a in table] == [
        "node-2/0",
        "node-2/1",
        "node-9/0",
        "node-9/1",
        "node-10/0",
        "node-10/1",
    ]
    assert [a.local_rank for a in table] == [0, 1, 0, 1, 0, 1]
    assert [a.rank for a in table] == list(range(6))


def test_contiguous_cards():
    bad = {Card("n", 1), Card("n", 2)}
    table = place({"n": Node("n", 8)}, bad, 3)
    assert [a.card.index for a in table] == [3, 4, 5]


def test_too_few():
    nodes = cluster(1)
    assert place(nodes, (), 9) is None
    assert place(nodes, {Card("sn-0-node-0", 3)}, 8) is None
    table = place(nodes, (), 8)
    assert place(nodes, {Card("sn-0-node-0", 3)}, 8, table) is None
    assert place({}, (), 1) is None


def test_a_failed_card_is_replaced_on_its_node_first():
    nodes = cluster(2)
    table = place(nodes, (), 12)
    shared = next(a for a in table if sum(b.card.node == a.card.node for b in table) == 4)
    repaired = place(nodes, {shared.card}, 12, table)
    assert repaired[shared.rank].card.node == shared.card.node
    assert moved(table, repaired) == {shared.rank}


def test_then_in_its_supernode_then_elsewhere():
    nodes = cluster(1, 2, 2)
    table = tuple(Assignment(r, Card("sn-1-node-0", r), r) for r in range(8))
    repaired = place(nodes, {Card("sn-1-node-0", 3)}, 8, table)
    assert at(repaired, 3) == "sn-1-node-1/0"
    del nodes["sn-1-node-1"]
    repaired = place(nodes, {Card("sn-1-node-0", 3)}, 8, table)
    assert repaired[3].card.node in ("sn-0-node-0", "sn-2-node-0", "sn-2-node-1")
    assert moved(table, repaired) == {3}


def test_the_ranks_of_a_lost_node_go_together_to_the_nearest_node_that_holds_them():
    nodes = cluster(2, 3)
    table = place({name: node for name, node in nodes.items() if name < "sn-1-node-1"}, (), 24)
    lost = {"sn-1-node-0": nodes.pop("sn-1-node-0")}
    homeless = {a.rank for a in table if a.card.node == "sn-1-node-0"}
    repaired = place(nodes, {Card("sn-1-node-1", 0)}, 24, table, lost=lost)
    assert moved(table, repaired) == homeless
    assert {repaired[rank].card.node for rank in homeless} == {"sn-1-node-2"}  # node-1 has only seven


def test_local_ranks_stay_dense_after_a_move():
    nodes = cluster(2)
    table = place(nodes, (), 8)
    repaired = place(nodes, {table[3].card}, 8, table)
    for name in nodes:
        local = [a.local_rank for a in repaired if a.card.node == name]
        assert local == list(range(len(local)))


def moved(before, after):
    return {a.rank for a, b in zip(before, after, strict=True) if a.card != b.card}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 40))
def test_any_sequence_of_failures_keeps_survivors(seed, workers):
    rng = random.Random(seed)
    nodes = cluster(*(rng.randint(1, 3) for _ in range(rng.randint(1, 4))), cards=rng.randint(1, 5))
    excluded, lost = set(), {}
    table = place(nodes, excluded, workers)
    while table is not None:
        cards = [a.card for a in table]
        assert len(set(cards)) == workers
        assert all(card.node in nodes and card not in excluded for card in cards)
        shuffled = dict(rng.sample(sorted(nodes.items()), len(nodes)))
        assert place(shuffled, excluded, workers, table, lost=lost) == table  # nothing failed: nobody moves
        victim = rng.choice(table).card
        if rng.random() < 0.3:
            lost[victim.node] = nodes.pop(victim.node)
        else:
            excluded.add(victim)
        before, table = table, place(nodes, excluded, workers, table, lost=lost)
        free = sum(node.cards for node in nodes.values()) - sum(card.node in nodes for card in excluded)
        assert (table is None) == (free < workers)
        if table is not None:
            bad = {a.rank for a in before if a.card in excluded or a.card.node in lost}
            assert moved(before, table) == bad


def test_placement_scales():
    """The figure (50 ms) is a benchmark's; this only guards against anything quadratic, on any machine."""
    nodes = {f"n{i}": Node(f"n{i}", 8, (f"sn-{i // 48}",)) for i in range(1760)}
    table = place(nodes, (), 14_000)
    began = time.perf_counter()
    repaired = place(nodes, {table[5000].card}, 14_000, table)
    assert time.perf_counter() - began < 3.0
    assert moved(table, repaired) == {5000}
