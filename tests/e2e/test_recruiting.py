"""Nodes are enlisted by topology and by how many healthy cards there are, on a cluster with more than it takes."""

from __future__ import annotations

import pytest

from chaos.faults import fail_card, kill_node

pytestmark = pytest.mark.ray


def nodes_of(result):
    rows = result.history.sql("select data from events where type = 'generation.started' order by generation")
    return [sorted({rank["node"] for rank in row["data"]["ranks"]}) for row in rows]


def test_a_failed_card_is_replaced_by_a_node_that_was_not_enlisted(cluster, jobs, chaos):
    """No spares asked for, idle nodes in the cluster: the run takes one rather than wait for capacity."""
    result = chaos.run(
        jobs.sgd,
        [fail_card(0, step=10)],
        arguments={"steps": 25, "amount": 1500},
        workers=2,
        spares=0,
        capacity_deadline=60.0,
    )
    first, second = nodes_of(result)
    assert len(first) == 1
    assert set(second) - set(first), "a card of another node took its place"


def test_a_lost_node_is_replaced_by_one_that_was_not_enlisted(cluster, jobs, chaos):
    result = chaos.run(
        jobs.sgd,
        [kill_node(1, step=10)],
        arguments={"steps": 25, "amount": 300},
        workers=2,
        spares=0,
        capacity_deadline=60.0,
    )
    first, second = nodes_of(result)
    assert not set(first) & set(second)
