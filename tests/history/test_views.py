"""The SQL views over a run whose every number is known (builder.whole_run)."""

from __future__ import annotations

from types import ModuleType

import pytest

from resilience.control.ledger import account
from resilience.control.types import Incident
from resilience.history import History
from resilience.journal.records import Kind

TZERO = "2023-11-14T22:13:20"


@pytest.fixture(scope="module")
def it(finished: str, build: ModuleType) -> History:
    return History(finished, now=build.T0 + 10)


def test_runs(it: History) -> None:
    (run,) = it.runs
    assert {
        key: run[key] for key in ("run", "job", "workers", "result", "steps", "attempts", "generations")
    } == {
        "run": "demo",
        "job": "train",
        "workers": 4,
        "result": "finished",
        "steps": 40,
        "attempts": 1,
        "generations": 2,
    }
    assert (run["incidents"], run["lost_steps"]) == (1, 5)
    assert (run["checkpoint_step"], run["checkpoint_tier"]) == (40, "shared")
    assert run["checkpoint_age_s"] == pytest.approx(2.4)
    assert run["digest"] == "ab" * 32
    assert (run["started_at"], run["finished_at"]) == (f"{TZERO}.000000Z", "2023-11-14T22:13:27.700000Z")


def test_generations(it: History) -> None:
    first, second = it.generations
    assert [first[k] for k in ("fence_slot", "start_step", "end_step", "kept_steps", "incidents")] == [
        1,
        0,
        25,
        20,
        1,
    ]
    assert [second[k] for k in ("fence_slot", "start_step", "end_step", "kept_steps", "incidents")] == [
        5,
        20,
        40,
        20,
        0,
    ]
    assert (second["restore_generation"], second["restore_tier"], second["attempt_of_incident"]) == (
        1,
        "nvme",
        "1-1",
    )
    # It ran from its first step (2.0) to its failure (4.5), not to when its end was noted (4.7).
    assert first["running_s"] == pytest.approx(2.5)
    # Two saves; each waits for its slowest rank, once, though sealed and two tiers all tell the stall.
    assert first["stall_s"] == pytest.approx(0.05 + 0.03)
    assert second["running_s"] == pytest.approx(7.6 - 5.5)
    # Why a failed generation ended is what its incident came to, however it was blamed at first.
    assert first["reason"] == "rank 2 was killed by SIGKILL"
    assert second["reason"] == "finished"


def test_incidents(it: History, build: ModuleType) -> None:
    (row,) = it.incidents
    assert {f"{phase}_s": row[f"{phase}_s"] for phase in build.PHASES} == {
        f"{k}_s": v for k, v in build.PHASES.items()
    }
    assert row["recovery_s"] == pytest.approx(1.0)
    assert (row["incident"], row["generation"], row["recovered_by"], row["state"]) == (
        "1-1",
        1,
        2,
        "recovered",
    )
    assert (row["rank"], row["node"], row["card"], row["confidence"]) == (2, "node-b", "node-b/0", 1.0)
    assert (row["decision"], row["reason"]) == ("restart", "the card is healthy")
    assert (row["step_failed"], row["step_restored"], row["lost_steps"], row["tier"]) == (25, 20, 5, "nvme")
    assert row["failed_at"] == "2023-11-14T22:13:24.500000Z"
    assert row["signals"] == ["rank 3 lost its peer"]


def test_checkpoints(it: History) -> None:
    found = {(row["step"], row["tier"]): row for row in it.checkpoints}
    states = {key: row["state"] for key, row in found.items()}
    assert states == {
        (10, "nvme"): "retired",
        (10, "shared"): "deleted",
        (20, "nvme"): "kept",
        (30, "nvme"): "kept",
        (30, "shared"): "kept",
        (40, "shared"): "kept",
    }
    row = found[30, "shared"]
    assert [row[k] for k in ("generation", "world_size", "size", "stall_s", "durable_s")] == [
        2,
        4,
        4000,
        0.02,
        0.4,
    ]
    assert row["age_s"] == pytest.approx(10 - 6.9)
    assert all(row["in_log"] for row in found.values())
    (failed,) = it.rows("failed_saves")
    assert (failed["step"], failed["outcome"], failed["reason"]) == (20, "abandoned", "its generation ended")


def test_metrics_are_those_that_survived(it: History, build: ModuleType) -> None:
    rows = it.rows("metrics")
    assert [row["step"] for row in rows] == list(range(40))
    assert [row["generation"] for row in rows] == [1] * 20 + [2] * 20
    assert [row["loss"] for row in rows] == [build.loss(s, 1 if s < 20 else 2) for s in range(40)]
    assert rows[0]["values"] == {"loss": build.loss(0, 1), "lr": 0.1}
    undone = it.sql("SELECT step, value FROM metrics_all WHERE name = 'loss' AND NOT kept ORDER BY step")
    assert undone == [{"step": s, "value": build.loss(s, 1)} for s in range(20, 25)]


def test_lineage_agrees_with_metrics(it: History) -> None:
    assert it.sql("SELECT run, step, generation FROM metrics ORDER BY step") == it.rows("lineage")


def test_restores_ranks_nodes_cards_chaos(it: History) -> None:
    scratch, warm = it.rows("restores")
    assert (scratch["step"], scratch["tier"], scratch["ranks"]) == (0, None, 4)
    assert (warm["step"], warm["tier"], warm["written_by"], warm["ranks"]) == (20, "nvme", 1, 4)
    assert warm["slowest_s"] == pytest.approx(0.13)
    ranks = {(row["generation"], row["rank"]): row for row in it.rows("ranks")}
    assert len(ranks) == 8
    assert (ranks[1, 2]["signal"], ranks[1, 2]["card"], ranks[1, 2]["output"]) == (
        9,
        "node-b/0",
        "Fatal: killed\n",
    )
    assert ranks[2, 2]["signal"] is None
    assert {row["node"]: row["failures"] for row in it.rows("nodes")} == {
        "node-a": 0,
        "node-b": 1,
        "node-c": 0,
    }
    cards = {row["card"]: (row["state"], row["failures"], row["generations"]) for row in it.rows("cards")}
    assert cards["node-b/0"] == ("active", 1, 2)
    assert cards["node-c/1"] == ("spare", 0, 0)
    (chaos,) = it.rows("chaos")
    assert (chaos["fault"], chaos["step"], chaos["next_incident"]) == ("kill", 25, "1-1")


def test_ettr_by_hand(it: History) -> None:
    (row,) = it.rows("ettr")
    first = 2.5 - 0.08  # seconds that generation 1 computed; 20 of its 25 steps were kept
    productive = first * 20 / 25 + (2.1 - 0.03)
    assert row["wall_s"] == pytest.approx(7.7)
    assert row["productive_s"] == pytest.approx(productive)
    assert row["recompute_s"] == pytest.approx(first * 5 / 25)
    assert (row["startup_s"], row["stall_s"]) == (pytest.approx(2.0), pytest.approx(0.11))
    assert row["other_s"] == pytest.approx(0.1)  # from the last step to run.finished
    assert row["ettr"] == pytest.approx(productive / 7.7)
    assert (row["mttr_s"], row["mttd_s"]) == (pytest.approx(1.0), pytest.approx(0.05))
    lost = sum(part["seconds"] for part in it.rows("lost_time"))
    assert lost + row["productive_s"] == pytest.approx(row["wall_s"])


def test_ettr_agrees_with_the_ledger(it: History) -> None:
    # The ledger is the supervisor's own account: same incident, the mean step of generation 1, the same stalls.
    at = {"failed": 4.5, "detected": 4.55, "decided": 4.56, "fenced": 4.75, "started": 4.95, "restored": 5.1}
    incident = Incident(
        "1-1", "signal", "", 1, step_failed=25, step_restored=20, at={**at, "first_step": 5.5}
    )
    ledger = account([incident], wall_s=7.6, step_s=(2.5 - 0.08) / 25, stall_s=0.11, start_s=2.0)
    (row,) = it.rows("ettr")
    assert row["productive_s"] == pytest.approx(ledger.productive_s)
    assert (row["lost_steps"], row["mttr_s"]) == (ledger.lost_steps, pytest.approx(ledger.mttr_s))


def test_the_phases_of_lost_time(it: History, build: ModuleType) -> None:
    found = {row["phase"]: row["seconds"] for row in it.rows("lost_time")}
    assert {phase: found[phase] for phase in build.PHASES} == pytest.approx(build.PHASES)
    assert set(found) == {*build.PHASES, "startup", "recompute", "stall", "other"}


def test_an_open_incident_and_a_final_one(tmp_path: object, build: ModuleType) -> None:
    url = str(tmp_path)
    build.first_generation(url, "open")
    final = build.first_generation(url, "final")
    final.tell(5.0, "run.finished", {"result": "budget_exhausted", "reason": "8 failures without progress"})
    final.seal()
    it = History(url)
    assert {row["run"]: row["state"] for row in it.incidents} == {"open": "open", "final": "final"}
    assert {row["run"]: row["result"] for row in it.runs} == {"open": None, "final": "budget_exhausted"}
    # Nothing was restored yet, so nothing is undone yet.
    assert it.sql("SELECT count(*) AS n FROM metrics WHERE run = 'open'") == [{"n": 25}]


def test_steps_undone_for_good_do_not_survive(tmp_path: object, build: ModuleType) -> None:
    # Generation 2 goes back to 10, dies at 12 and nothing follows: 12..24 of generation 1 are gone too.
    run = build.first_generation(str(tmp_path), "r")
    run.tell(4.7, "generation.ended", {"reason": "incident 1-1", "steps": 25})
    run.fence(4.75, 2)
    run.ranks(4.8, restore={"step": 10, "generation": 1, "tier": "shared"}, done_at=5.0)
    run.steps(5.0, 10, 12)
    run.tell(5.2, "generation.ended", {"reason": "again", "steps": 12})
    run.seal()
    it = History(str(tmp_path))
    assert [row["step"] for row in it.rows("metrics")] == list(range(12))
    assert [row["generation"] for row in it.rows("lineage")] == [1] * 10 + [2] * 2
    assert it.runs[0]["steps"] == 12


def test_a_stopped_run_taken_up_again(tmp_path: object, build: ModuleType) -> None:
    # Interrupted at second 4, taken up again at second 1004: the thousand seconds between are nobody's loss.
    url = str(tmp_path)
    one = build.Builder(url, "r", source="supervisor-1")
    one.start(0.0)
    one.fence(1.0, 1)
    one.ranks(1.0, done_at=2.0)
    one.steps(2.0, 0, 20)
    one.sealed(4.0, 20, stall_s=0.05)
    one.committed(4.0, 20, "shared", stall_s=0.05, durable_s=0.1)
    one.tell(4.0, "generation.ended", {"reason": "interrupted", "steps": 20})
    one.tell(4.0, "run.finished", {"result": "interrupted", "reason": "Ctrl-C", "steps": 20})
    one.seal()
    two = build.Builder(url, "r", source="supervisor-2")
    two.start(1004.0, attempt=2, nodes=("node-a", "node-b"))
    two.fence(1005.0, 2)
    two.ranks(1005.0, restore={"step": 20, "generation": 1, "tier": "shared"}, done_at=1006.0)
    two.steps(1006.0, 20, 30)
    two.seal()
    it = History(url, now=build.T0 + 1010)
    (run,) = it.runs
    assert (run["attempts"], run["result"], run["steps"], run["generations"]) == (2, None, 30, 2)
    (row,) = it.rows("ettr")
    assert row["wall_s"] == pytest.approx(4.0 + 3.0)
    assert row["startup_s"] == pytest.approx(2.0 + 2.0)
    assert row["productive_s"] == pytest.approx((2.0 - 0.05) + 1.0)
    assert {row["node"]: row["state"] for row in it.rows("nodes")}["node-c"] == "gone"


def test_overlapping_incidents_are_counted_once(tmp_path: object, build: ModuleType) -> None:
    # A second failure during the recovery of the first: both end with generation 3, 2.0 s after the first failed.
    run = build.first_generation(str(tmp_path), "r")
    run.fence(4.75, 2)
    second = {"incident": "2-1", "kind": "node", "cause": "node-a died", "confidence": 1.0, "step": 20}
    run.tell(5.6, "incident.detected", second, node="node-a")
    run.fence(5.8, 3)
    run.ranks(5.9, restore={"step": 20, "generation": 1, "tier": "nvme"}, done_at=6.2)
    for number, total in (("1-1", 2.0), ("2-1", 1.0)):
        story = {"incident": number, "phases": {"detect": total}, "step_failed": 25, "step_restored": 20}
        run.tell(6.5, "incident.recovered", story)
    run.steps(6.5, 20, 25)
    run.seal()
    it = History(str(tmp_path))
    assert [row["recovery_s"] for row in it.incidents] == [2.0, 1.0]
    (row,) = it.rows("ettr")
    assert row["detect_s"] == pytest.approx(2.0)  # not 3.0
    assert row["mttr_s"] == pytest.approx(1.5)


def test_failed_card_and_lost_node(tmp_path: object, build: ModuleType) -> None:
    run = build.first_generation(str(tmp_path), "r")
    run.tell(5.0, "card.faulted", {"code": "simulated-ecc", "detail": ""}, node="node-a", card="node-a/1")
    run.tell(5.1, "node.lost", {"reason": "its agent fell silent"}, node="node-c")
    run.seal()
    it = History(str(tmp_path))
    cards = {row["card"]: row["state"] for row in it.rows("cards")}
    assert (cards["node-a/0"], cards["node-a/1"], cards["node-c/0"]) == ("active", "failed", "lost")
    nodes = {row["node"]: row for row in it.rows("nodes")}
    assert (nodes["node-c"]["state"], nodes["node-c"]["lost_reason"]) == ("lost", "its agent fell silent")
    assert (nodes["node-a"]["state"], nodes["node-a"]["card_faults"]) == ("up", 1)


def test_only_a_fault_that_puts_a_card_out_of_use_makes_it_failed(
    tmp_path: object, build: ModuleType
) -> None:
    run = build.first_generation(str(tmp_path), "r")
    faults = {
        "node-a/0": {"code": "94", "action": "restart"},
        "node-a/1": {"code": "X", "action": "replace card"},
        "node-b/0": {"code": "80E18402", "action": "reset", "affects": ["node-b/1"]},
    }
    for card, data in faults.items():
        run.tell(5.0, "card.faulted", {"detail": "", **data}, node=card.split("/")[0], card=card)
    run.tell(6.0, "card.cleared", {"code": "X", "reason": "software"}, node="node-a", card="node-a/1")
    run.seal()
    cards = {row["card"]: row["state"] for row in History(str(tmp_path)).rows("cards")}
    assert "failed" not in (cards["node-a/0"], cards["node-a/1"])
    assert (cards["node-b/0"], cards["node-b/1"]) == ("failed", "failed")


def test_a_zombie_record_is_no_checkpoint(tmp_path: object, build: ModuleType) -> None:
    from resilience.journal.records import Record, digest, encode

    run = build.first_generation(str(tmp_path), "r")
    run.fence(5.0, 2)
    run.seal()
    last = run.log.refresh()[-1]
    prev = digest(run.storage.read(f"log/{last.slot:020d}.json"))
    body = {"step": 24, "tier": "shared", "world_size": 4, "parts": [], "size": 1}
    late = Record(last.slot + 1, Kind.CHECKPOINT, 1, "zombie", prev, body)
    assert run.storage.create(f"log/{late.slot:020d}.json", encode(late)) is None
    it = History(str(tmp_path))
    assert max(row["step"] for row in it.checkpoints) == 20
    assert it.sql("SELECT ignored FROM log ORDER BY slot DESC LIMIT 1") == [{"ignored": True}]


def test_quarantine_and_a_drain_that_outlived_its_generation(tmp_path: object, build: ModuleType) -> None:
    run = build.first_generation(str(tmp_path), "r")
    run.fence(5.0, 2)
    run.log.append(Kind.QUARANTINE, {"step": 20, "generation": 1, "tier": "nvme", "reason": "loss jumped"})
    late = {"step": 20, "generation": 1, "tier": "shared", "world_size": 4, "parts": [], "size": 4000}
    run.log.append(Kind.CHECKPOINT, late)
    run.seal()
    found = {(row["step"], row["tier"]): row for row in History(str(tmp_path)).checkpoints}
    assert (found[20, "nvme"]["state"], found[20, "nvme"]["reason"]) == ("quarantined", "loss jumped")
    assert (found[20, "shared"]["generation"], found[20, "shared"]["state"]) == (1, "kept")


def test_metric_names_and_values_of_all_kinds(tmp_path: object, build: ModuleType) -> None:
    run = build.Builder(str(tmp_path), "r")
    run.start(0.0)
    run.fence(1.0, 1)
    run.ranks(1.0, done_at=2.0)
    values = [
        {"step": 0, "loss": float("nan"), "train/acc@1": 0.5, "it's": 1},
        {"step": 1, "loss": 1.0},
        {"step": 1, "loss": 2.0},
    ]
    run.tell(3.0, "metrics.logged", {"values": values}, rank=0)
    run.tell(3.0, "metrics.logged", {"values": [{"step": 0, "loss": 7.0}]}, rank=1)
    run.seal()
    first, second = History(str(tmp_path)).rows("metrics")
    assert first["loss"] != first["loss"]  # rank 0's NaN, not rank 1's 7.0
    assert first["values"]["train/acc@1"] == 0.5
    assert first["values"]["it's"] == 1.0
    assert second["loss"] == 2.0  # the last word in a step counts


def test_every_view_is_documented() -> None:
    from pathlib import Path

    from resilience.history.query import ORDERS

    text = (Path(__file__).parents[2] / "docs" / "history.md").read_text("utf-8")
    missing = [view for view in (*ORDERS, "events", "log", "metrics_all") if f"### `{view}`" not in text]
    assert missing == []
