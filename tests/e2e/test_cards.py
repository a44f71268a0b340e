"""Faults of cards end to end: reported by a third party, and read by a driver's tool on the node."""

from __future__ import annotations

import json
import os
import stat

import pytest
import ray

import resilience
from chaos.virtual_cluster import _STORE_BYTES
from resilience.errors import InvalidError, UnavailableError
from resilience.runtime.nodes import NODE_LABEL

pytestmark = pytest.mark.ray

INFO = """\
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip  Phy-ID              | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
"""
DIE = """\
| {npu}     Ascend910           | {health:13} | 166.5       38                0    / 0             |
| {chip}     {phy}                   | 0000:9{phy}:00.0  | 0           0    / 0          3131 / 65536         |
+------------------------------------------------------------------------------------------------+
"""


def test_a_reported_fault_replaces_the_card(cluster, driven, chaos, drive, until, cli, assert_exact):
    job = chaos.options(driven, spares=1)
    launch = drive.launch(lambda: job.launch(view="none", control=str(drive.directory), steps=12, size=1000))
    drive.allow(7)
    drive.wait_at(7)
    before = generations(job, until)[-1]
    card = before[1]

    with pytest.raises(UnavailableError, match="is not going"):
        resilience.report_fault(card, "80E18402", run="somebody-else")
    with pytest.raises(InvalidError, match="has no node 'node-99'"):
        resilience.report_fault("node-99/0", "80E18402", run=job.name)
    with pytest.raises(InvalidError, match="2 cards, counted from 0"):
        resilience.report_fault(card.replace(card[-2:], "/9"), "80E18402", run=job.name)
    with pytest.raises(InvalidError, match="it is kept in"):
        resilience.report_fault(card, "80E18402", run=job.name, storage="/nowhere")
    # A code that nobody knows is written down, and ends nothing.
    assert job.name in resilience.report_fault(card, "rumble", detail="it rumbled")
    done = cli(
        *("report-fault", "--card", card, "--code", "0x80e18402", "--detail", "found by the night's test"),
        *("--run", job.name, "--storage", chaos.storage, "--source", "night-test"),
        RAY_ADDRESS=cluster.address,
    )
    assert done.returncode == 0, done.stderr
    assert job.name in done.stdout

    drive.wait_at(5, generation=2)
    drive.allow(100)
    result = launch.result()
    assert result.finished
    assert_exact(resilience.open_checkpoint(f"{result.storage}/{result.run}", step=12), steps=12, size=1000)
    (incident,) = result.incidents
    assert (incident["kind"], incident["decision"], incident["card"]) == ("card", "replace card", card)
    assert "reported by night-test with 80E18402 (64 rows of HBM are isolated)" in incident["cause"]
    after = generations(job, until)[-1]
    assert card not in after and before[0] in after
    (noticed,) = events(result, "card.noticed")
    assert (noticed["code"], noticed["detail"], noticed["source"]) == ("rumble", "it rumbled", "a report")


def test_a_fault_that_npu_smi_tells_replaces_both_dies(cluster, driven, chaos, drive, until, tmp_path):
    """A node with 910C cards, as its agent sees it: Ray's NPU resource, npu-smi on its PATH."""
    says = tmp_path / "says"
    says.mkdir()
    show(says, 6)
    tool = tmp_path / "bin" / "npu-smi"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\ncat {says}/$(echo \"$*\" | tr -d ' ')\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    node = cluster._cluster.add_node(
        wait=False,
        num_cpus=2,
        num_gpus=0,
        resources={"NPU": 6},
        object_store_memory=_STORE_BYTES,
        labels={NODE_LABEL: "npus"},
    )
    try:
        until(lambda: ray.cluster_resources().get("NPU") == 6, why="the node")
        job = chaos.options(driven, card="NPU", spares=4, env={"PATH": f"{tool.parent}:{os.environ['PATH']}"})
        launch = drive.launch(
            lambda: job.launch(view="none", control=str(drive.directory), steps=12, size=1000)
        )
        drive.allow(7)
        drive.wait_at(7)
        assert generations(job, until)[-1] == ["npus/0", "npus/1"]
        (says / "info-thealth-i0-c1").write_text("Error Code   : 80E18402\n")
        show(says, 6, alarm=1)
        drive.wait_at(5, generation=2)
        drive.allow(100)
        result = launch.result()
        (incident,) = result.incidents
        assert (incident["kind"], incident["decision"]) == ("card", "replace card")
        assert generations(job, until)[-1] == ["npus/2", "npus/3"]
        (fault,) = events(result, "card.faulted")
        assert (fault["code"], fault["affects"]) == ("80E18402", ["npus/0"])
    finally:
        cluster._cluster.remove_node(node)


def show(says, dies: int, alarm: int | None = None) -> None:
    rows = (
        DIE.format(npu=die // 2, chip=die % 2, phy=die, health="Alarm" if die == alarm else "OK")
        for die in range(dies)
    )
    temporary = says / "info~"
    temporary.write_text(INFO + "".join(rows))
    temporary.rename(says / "info")


def generations(job, until) -> list[list[str]]:
    """The cards of every generation that has started, by rank."""

    def read():
        with resilience.history(job._options.storage, run=job.name) as history:
            return history.sql(
                "select data from events where type = 'generation.started' order by generation"
            )

    rows = until(read, why="a generation in the journal")
    return [[rank["card"] for rank in row["data"]["ranks"]] for row in rows]


def events(result, type_: str) -> list[dict]:
    rows = result.history.sql(f"select data from events where type = '{type_}'")
    return [row["data"] if isinstance(row["data"], dict) else json.loads(row["data"]) for row in rows]
