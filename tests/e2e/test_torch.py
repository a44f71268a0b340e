"""The example: a GPT under DistributedDataParallel over gloo, killed and restored, ends with the same SHA-256."""

from __future__ import annotations

from pathlib import Path

import pytest

import resilience
from chaos.faults import kill, kill_node
from resilience.job import load

pytestmark = pytest.mark.ray
torch = pytest.importorskip("torch")

SMALL = {"steps": 24, "width": 32, "layers": 2, "heads": 2, "block": 32, "batch": 4}


@pytest.fixture(scope="module")
def job():
    path = Path(__file__).parents[2] / "examples" / "char_gpt.py"
    return load(f"{path}:train").options(workers=3, spares=1, checkpoint_every=4)


@pytest.fixture(scope="module")
def calm(_virtual_cluster, job, tmp_path_factory):
    from chaos.harness import Chaos

    _virtual_cluster.heal()
    with Chaos(tmp_path_factory.mktemp("calm")) as chaos:
        result = chaos.run(job, arguments=SMALL)
        group = resilience.open_checkpoint(f"{result.storage}/{result.run}")
        assert group["model/tokens.weight"].shape == (256, 32), (
            "replicated arrays are saved once, under their names"
        )
        assert "rank-0/model/tokens.weight" not in group
        return result


@pytest.mark.parametrize("fault", [kill(1, step=13), kill_node(0, step=14)], ids=["rank", "node"])
def test_a_death_in_the_middle_of_a_step_changes_nothing(
    cluster, chaos, job, calm, fault, assert_newest_restored
):
    """Its peers are inside an all-reduce when it dies: they fail too, and are not blamed."""
    result = chaos.run(job, [fault], arguments=SMALL)
    assert result.value == calm.value
    incidents = result.incidents
    assert incidents[0]["state"] == "recovered"
    assert {i["kind"] for i in incidents} <= {"signal", "node", "exit"}
    assert incidents[-1]["kind"] == ("signal" if fault.action == "kill" else "node")
    assert_newest_restored(result)
