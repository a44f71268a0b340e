"""The writer process, a real one: what it persists, and what it leaves alone."""

import os
import subprocess
import sys

import numpy as np
import pytest

from resilience.checkpoint.arena import Arena, SlotKind
from resilience.checkpoint.part import draft
from resilience.checkpoint.plan import plan
from resilience.checkpoint.snapshot import snapshot, specs_of
from resilience.checkpoint.tree import flatten
from resilience.runtime.system import python_command
from resilience.runtime.translate import line_of
from resilience.runtime.wire import Channel
from resilience.runtime.writer import Writer
from storage_backends.transfer import Retried


class Rank:
    """What a rank does to its arena."""

    def __init__(self) -> None:
        self.state = {"w": np.arange(1000.0)}
        arrays, _ = flatten(self.state, prefix="")
        self.layout = plan(specs_of(arrays, self.state), rank=0, world_size=1)
        self.arena = Arena.create(2, self.layout.size)

    def seal(self, step: int) -> dict:
        """Snapshot; returns the order to persist it."""
        arrays, skeleton = flatten(self.state, prefix="")
        slot = self.arena.acquire()
        assert slot is not None
        snapshot(self.arena, slot, arrays, self.layout, step=step, generation=1)
        part = draft(self.layout, skeleton, run="r", step=step, generation=1)
        order = {"t": "persist", "key": [1, 0, 1], "generation": 1, "rank": 0}
        return {**order, "step": step, "slot": slot, "part": part.to_json()}


@pytest.fixture
def rank():
    made = Rank()
    yield made
    made.arena.close()


@pytest.fixture
def writer(tmp_path, rank):
    ours, theirs = Channel.pair()
    process = subprocess.Popen(
        python_command("resilience.runtime.writer", str(theirs.fileno()), str(os.getpid()), "r", "n"),
        pass_fds=[theirs.fileno()],
        stderr=sys.stderr,
    )
    theirs.close()
    ours.send({"t": "open", "nvme": str(tmp_path / "nvme"), "shared": str(tmp_path / "shared")})
    ours.send({"t": "arena", "key": [1, 0, 1]}, [rank.arena.fd])
    yield ours
    ours.close()
    assert process.wait(10) == 0  # the end of the agent is the end of the writer


def replies(channel, until, **matching):
    got = []
    while True:
        message, _ = channel.receive()
        got.append(message)
        if message["t"] == until and all(message.get(k) == v for k, v in matching.items()):
            return got


def test_a_sealed_slot_goes_to_nvme_its_slot_is_freed_and_it_is_drained(writer, rank, tmp_path):
    order = rank.seal(5)
    writer.send(order)
    got = replies(writer, "persisted", tier="shared")
    said = [(m["t"], m.get("tier"), m.get("saved")) for m in got]
    assert said.index(("persisted", "nvme", None)) < said.index(("persisted", "shared", None))
    if ("slot_free", None, True) not in said:
        replies(writer, "slot_free")
    assert rank.arena.state(order["slot"]).kind is SlotKind.PERSISTED
    for tier in ("nvme", "shared"):
        names = sorted(p.name for p in (tmp_path / tier / "checkpoints" / "step-5-g1").iterdir())
        assert names == ["rank-0.json", "rank-0.pack"]


def test_a_slot_that_holds_another_snapshot_by_now_is_not_taken_for_the_one_ordered(writer, rank, tmp_path):
    """A predecessor persisted step 1, freed its slot, and died before it could say so; the rank went on."""
    stale = rank.seal(1)
    rank.arena.persisted(stale["slot"])
    rank.arena.persisted(rank.seal(2)["slot"])
    rank.state["w"] += 1
    assert rank.arena.acquire() == stale["slot"]  # the rank is writing there, right now
    writer.send(stale)
    [free] = replies(writer, "slot_free")  # and nothing else: no pack with half of another step in it
    assert (free["slot"], free["saved"]) == (stale["slot"], True)
    assert rank.arena.state(stale["slot"]).kind is SlotKind.WRITING
    assert not (tmp_path / "nvme" / "checkpoints").exists()


def test_a_successor_is_told_to_drain_and_to_release(writer, rank, tmp_path):
    writer.send({"t": "arm", "failpoints": [{"index": 0, "action": "kill", "at": {"point": "drain.chunk"}}]})
    first = rank.seal(1)
    writer.send(first)
    replies(writer, "inject")
    replies(writer, "slot_free") if rank.arena.state(first["slot"]).kind is not SlotKind.PERSISTED else None
    writer.send({"t": "injected"})
    replies(writer, "persisted", tier="shared")
    (tmp_path / "shared" / "checkpoints" / "step-1-g1" / "rank-0.json").unlink()
    writer.send({"t": "drain", "generation": 1, "rank": 0, "step": 1})
    replies(writer, "persisted", tier="shared")
    assert (tmp_path / "shared" / "checkpoints" / "step-1-g1" / "rank-0.json").is_file()
    second = rank.seal(2)
    writer.send({**second, "t": "release"})
    writer.send({**first, "t": "release"})  # not sealed any more: nothing to release
    writer.send({"t": "drain", "generation": 1, "rank": 0, "step": 9})  # orders are read in order
    failed = replies(writer, "save_failed")[-1]
    assert (failed["tier"], failed["step"]) == ("shared", 9)
    assert rank.arena.state(second["slot"]).kind is SlotKind.RELEASED


def test_a_full_near_tier_is_told_and_the_pack_goes_straight_to_shared_storage(writer, rank, tmp_path):
    (tmp_path / "nvme").mkdir(exist_ok=True)
    (tmp_path / "nvme" / "checkpoints").write_text("in the way")
    writer.send(rank.seal(3))
    got = replies(writer, "slot_free")
    assert [(m["t"], m.get("tier")) for m in got] == [
        ("save_failed", "nvme"),
        ("persisted", "shared"),
        ("slot_free", None),
    ]
    assert got[-1]["saved"] is True


def test_no_tier_left_frees_the_slot_and_says_that_nothing_was_saved(writer, rank, tmp_path):
    for tier in ("nvme", "shared"):
        (tmp_path / tier).mkdir(exist_ok=True)
        (tmp_path / tier / "checkpoints").write_text("in the way")
    order = rank.seal(3)
    writer.send(order)
    got = replies(writer, "slot_free")
    assert [m.get("tier") for m in got if m["t"] == "save_failed"] == ["nvme", "shared"]
    assert got[-1]["saved"] is False
    assert rank.arena.state(order["slot"]).kind is SlotKind.RELEASED


def test_a_piece_that_was_sent_again_is_told():
    """All the way to the line of the journal; storage_backends/test_transfer causes such pieces."""
    ours, theirs = Channel.pair()
    news = Retried("upload part 3", "s3://b/r/a.pack", 16 << 20, 30.1, 1, True, "timed out")
    Writer(theirs)._retried(news)
    message, _ = ours.receive()
    kind, data, subject = line_of("node-a", message)
    assert kind == "storage.retried" and subject["severity"] == "warning"
    assert data == {
        "operation": "upload part 3",
        "path": "s3://b/r/a.pack",
        "size": 16 << 20,
        "seconds": 30.1,
        "attempt": 1,
        "stalled": True,
        "error": "timed out",
    }
    ours.close()
    theirs.close()
