"""What an agent tells its processes of their cards."""

from types import SimpleNamespace

import pytest

from resilience.runtime.agent import NodeAgent


@pytest.mark.parametrize(
    ("kind", "variable", "expected"),
    [
        ("GPU", "CUDA_VISIBLE_DEVICES", "GPU-b"),
        ("NPU", "ASCEND_RT_VISIBLE_DEVICES", "GPU-b"),
        ("card", "RESILIENCE_CARD", "1"),
    ],
)
def test_a_rank_is_told_its_card_as_the_driver_calls_it(kind, variable, expected):
    agent, orders = NodeAgent.__new__(NodeAgent), []
    agent._config, agent._devices = {"card": kind}, ["GPU-a", "GPU-b"]
    agent._processes = SimpleNamespace(order=orders.append)
    agent._forward({"t": "start", "ranks": [{"env": {variable: "1"}}]})
    agent._forward({"t": "stop", "generation": 1})
    assert orders[0]["ranks"][0]["env"] == {variable: expected}
    assert orders[1] == {"t": "stop", "generation": 1}
