"""What must hold 1 and 2: whatever dies, wherever in a step or a save, the run ends with the same bytes.

Real processes, real signals, a real Ray cluster of several raylets. The job's state (weights, velocity, which
samples were seen how often, three random generators) is compared bit by bit with the uninterrupted run's.
"""

from __future__ import annotations

import numpy as np
import pytest

import resilience
from chaos.faults import Fault, fail_card, kill, kill_node

pytestmark = pytest.mark.ray

STEPS = 30
ARGUMENTS = {"steps": STEPS, "amount": 250}

# Where in a save of step 5 the fault fires. All points of the life of a checkpoint, in order.
SAVE_POINTS = {
    "before seal": {"point": "snapshot.copied", "step": 5},
    "after seal": {"point": "snapshot.sealed", "step": 5},
    "mid-pack": {"point": "pack.chunk", "step": 5, "count": 2},
    "after pack": {"point": "pack.done", "step": 5},
    "after part": {"point": "part.done", "step": 5},
    "mid-drain": {"point": "drain.chunk", "step": 5},
    "between part and commit": {"point": "commit.before", "step": 5},
    "after commit": {"point": "commit.done", "step": 5},
}


def final_state(result):
    """Every array of the last checkpoint, all ranks, by name."""
    group = resilience.open_checkpoint(f"{result.storage}/{result.run}", step=result.steps)
    return (
        {name: array[...] for name, array in group.arrays_flat()}
        if hasattr(group, "arrays_flat")
        else _walk(group)
    )


def _walk(group, prefix=""):
    found = {}
    for name, member in group.members():
        if hasattr(member, "members"):
            found |= _walk(member, f"{prefix}{name}/")
        else:
            found[f"{prefix}{name}"] = np.asarray(member[...])
    return found


def assert_same(result, reference):
    assert result.finished
    assert result.steps == STEPS
    assert result.value == reference["value"]
    state = final_state(result)
    assert sorted(state) == sorted(reference["state"])
    for name, value in reference["state"].items():
        assert np.array_equal(state[name], value), name


@pytest.fixture(scope="module")
def reference(_virtual_cluster, jobs, tmp_path_factory):
    """The uninterrupted run."""
    from chaos.harness import Chaos

    _virtual_cluster.heal()
    with Chaos(tmp_path_factory.mktemp("reference")) as chaos:
        result = chaos.run(jobs.sgd, arguments=ARGUMENTS)
        assert result.incidents == []
        state = final_state(result)
        assert {f"rank-{r}/state/seen" for r in range(3)} <= set(state)
        assert all(state[f"rank-{r}/state/seen"].sum() == 8 * STEPS for r in range(3))
        return {"value": result.value, "state": state}


@pytest.mark.parametrize("where", SAVE_POINTS)
@pytest.mark.parametrize("what", ["kill", "kill_node", "fail_card"])
def test_a_death_at_every_point_of_a_save(
    cluster, jobs, chaos, reference, assert_newest_restored, what, where
):
    at = SAVE_POINTS[where]
    fault = Fault(what, rank=1, at_rank=None if at["point"].startswith("commit") else 1, **at)
    # A card's health is polled once a second: the job must not be over by then.
    arguments = {**ARGUMENTS, "amount": 1200} if what == "fail_card" else ARGUMENTS
    result = chaos.run(jobs.sgd, [fault], arguments=arguments)
    assert_same(result, reference)
    incident = only_incident(result)
    assert incident["kind"] == {"kill": "signal", "kill_node": "node", "fail_card": "card"}[what]
    check_the_log(result, assert_newest_restored)


@pytest.mark.parametrize("step", [0, 1, 7, STEPS - 1])
def test_a_rank_killed_at_any_step(cluster, jobs, chaos, reference, assert_newest_restored, step):
    result = chaos.run(jobs.sgd, [kill(2, step=step)], arguments=ARGUMENTS)
    assert_same(result, reference)
    incident = only_incident(result)
    assert (incident["kind"], incident["rank"]) == ("signal", 2)
    check_the_log(result, assert_newest_restored)


def test_a_new_generation_is_forked_from_the_warm_zygote(cluster, jobs, chaos, reference):
    result = chaos.run(jobs.sgd, [kill(2, step=15)], arguments=ARGUMENTS)
    assert_same(result, reference)
    parents: dict[int, set[float]] = {}
    generations: dict[int, set[int]] = {}
    for event in result.history.sql(
        "select rank, generation, data from events where type = 'metrics.logged'"
    ):
        parents.setdefault(event["rank"], set()).update(v["parent"] for v in event["data"]["values"])
        generations.setdefault(event["rank"], set()).add(event["generation"])
    # A rank that is killed takes the last half second of its log with it, so not every one need show up in both.
    assert {1, 2} in generations.values(), generations
    assert all(len(found) == 1 for found in parents.values()), parents


def test_a_card_that_fails_is_replaced_and_not_used_again(cluster, jobs, chaos, reference):
    result = chaos.run(jobs.sgd, [fail_card(0, step=12)], arguments={"steps": STEPS, "amount": 2500})
    incident = only_incident(result)
    assert incident["kind"] == "card"
    assert incident["decision"] == "replace card"
    generations = result.history.sql(
        "select data from events where type = 'generation.started' order by generation"
    )
    assert incident["card"] in str(generations[0]["data"]["ranks"])
    assert incident["card"] not in str(generations[-1]["data"]["ranks"])
    state = final_state(result)
    for name, value in reference["state"].items():
        assert np.array_equal(state[name], value), name


def test_several_faults_one_after_another(cluster, jobs, chaos, reference, assert_newest_restored):
    faults = [
        kill(0, step=6),
        Fault("segfault", rank=1, at_rank=1, step=11),
        kill_node(2, step=17),
        Fault("kill", rank=0, at_rank=0, point="log", step=22),
    ]
    result = chaos.run(jobs.sgd, faults, arguments={"steps": STEPS, "amount": 800})
    assert_same(result, reference)
    # The ranks of this job do not wait for each other, so faults of one generation may fall into one incident.
    assert {"signal", "node"} <= {i["kind"] for i in result.incidents}
    assert all(i["state"] == "recovered" for i in result.incidents)
    check_the_log(result, assert_newest_restored)


def test_a_death_while_recovering_from_another(cluster, jobs, chaos, reference, assert_newest_restored):
    # The second fault needs a checkpoint to restore from, so the steps are slow enough for one to be committed.
    faults = [kill(0, step=22), Fault("kill", rank=2, at_rank=2, point="restore.begin")]
    result = chaos.run(jobs.sgd, faults, arguments={"steps": STEPS, "amount": 1000})
    assert_same(result, reference)
    check_the_log(result, assert_newest_restored)


def test_a_stopped_rank_is_found_and_its_generation_never_commits_again(
    cluster, jobs, chaos, reference, assert_newest_restored
):
    result = chaos.run(
        jobs.sgd, [Fault("stop", rank=1, at_rank=1, step=9)], arguments=ARGUMENTS, hang_floor=5.0
    )
    assert_same(result, reference)
    incident = only_incident(result)
    assert (incident["kind"], incident["rank"]) == ("hang", 1)
    check_the_log(result, assert_newest_restored)


def only_incident(result):
    """The run's one incident; more than one names them all."""
    assert len(result.incidents) == 1, [(i["kind"], i["cause"], i["signals"]) for i in result.incidents]
    return result.incidents[0]


def check_the_log(result, assert_newest_restored):
    """No record of a fenced generation after the fence; every acknowledged checkpoint is in the log."""
    from resilience.journal.log import CommitLog
    from storage_backends import open_storage

    log = CommitLog(open_storage(f"{result.storage}/{result.run}"), new_id=lambda: "reader")
    newest = 0
    committed = set()
    for record in log.refresh():
        assert record.generation >= newest, f"slot {record.slot} is of a fenced generation"
        newest = max(newest, record.generation)
        if record.kind == "checkpoint":
            committed.add((record.body["step"], record.generation, record.body["tier"]))
    acknowledged = result.history.sql(
        "select step, generation, tier from checkpoints where committed_at is not null"
    )
    assert {(row["step"], row["generation"], row["tier"]) for row in acknowledged} <= committed
    assert_newest_restored(result)
