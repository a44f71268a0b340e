"""Faults as data."""

import json

import pytest

from chaos.faults import ACTIONS, Fault, fail_card, kill, kill_node
from resilience.errors import InvalidError
from resilience.runtime.failpoint import POINTS, Failpoints


def test_a_fault_is_plain_data_without_what_may_be_anything():
    assert kill(2, step=30).to_json() == {
        "action": "kill",
        "rank": 2,
        "node": None,
        "at": {"point": "step", "rank": 2, "step": 30, "count": 1},
    }
    fault = Fault("kill_node", node="node-1", point="pack.chunk", step=40, tier="nvme", generation=2, count=3)
    assert fault.to_json()["at"] == {
        "point": "pack.chunk",
        "step": 40,
        "tier": "nvme",
        "generation": 2,
        "count": 3,
    }
    assert json.loads(json.dumps(fault.to_json())) == fault.to_json()


def test_by_default_a_fault_waits_for_its_own_rank_except_in_the_supervisor():
    assert kill(2, step=30, point="snapshot.sealed").at_rank == 2
    assert kill(2, step=30, point="pack.chunk").at_rank == 2
    assert kill(2, step=30, point="commit.before").at_rank is None
    assert kill(2, step=30, at_rank=0).at_rank == 0
    assert kill_node(1, step=30, point="fence.done").at_rank is None
    assert fail_card(1, step=30).at_rank == 1


@pytest.mark.parametrize(
    "fault", [kill(1, step=3), kill_node(1, step=3), fail_card(1, step=3)], ids=lambda f: f.action
)
def test_a_fault_fires_where_it_says(fault):
    fired = []
    points = Failpoints([{**fault.to_json(), "index": 0}], fired.append)
    points.reach("step", rank=0, step=3, generation=1)
    points.reach("step", rank=1, step=2, generation=1)
    assert fired == []
    points.reach("step", rank=1, step=3, generation=1)
    assert [hit["action"] for hit in fired] == [fault.action]


def test_every_action_and_place_can_be_planned():
    for action in ACTIONS:
        assert Fault(action, rank=0).to_json()["action"] == action
    for places in POINTS.values():
        for point in places:
            assert Fault("kill", rank=0, point=point).to_json()["at"]["point"] == point


@pytest.mark.parametrize(
    ("wrong", "said", "hint"),
    [
        ({"action": "kil", "rank": 0}, "action='kil' is unknown", "did you mean 'kill'"),
        (
            {"action": "kill", "rank": 0, "point": "pack.chunks"},
            r"point='pack\.chunks'",
            "did you mean 'pack.chunk'",
        ),
        ({"action": "kill"}, "hits nothing", "rank="),
        ({"action": "kill", "node": "n"}, "hits a rank, not a node", "rank="),
        ({"action": "kill", "rank": 0, "count": 0}, "count=0", "from 1"),
    ],
)
def test_an_impossible_fault_is_refused_with_what_to_do(wrong, said, hint):
    with pytest.raises(InvalidError, match=said) as raised:
        Fault(**wrong)
    assert hint in raised.value.hint
