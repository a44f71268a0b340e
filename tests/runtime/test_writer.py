"""The writer process, a real one: what it persists, and what it leaves alone."""

import os
import subprocess
import sys
import time

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
def writer(tmp_path, rank, monkeypatch):
    ours, theirs = Channel.pair()
    process = subprocess.Popen(
        python_command("resilience.runtime.writer", str(theirs.fileno()), str(os.getpid()), "r", "n"),
        pass_fds=[theirs.fileno()],
        stderr=sys.stderr,
    )
    theirs.close()
    monkeypatch.setenv("WRITER_PID", str(process.pid))
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


class Big(Rank):
    """A rank whose copies are worth following, and can be stopped in the middle."""

    def __init__(self) -> None:
        self.state = {f"w{n:02}": np.full(1 << 20, n, np.uint8) for n in range(16)}
        arrays, _ = flatten(self.state, prefix="")
        self.layout = plan(specs_of(arrays, self.state), rank=0, world_size=1)
        self.arena = Arena.create(2, self.layout.size)

    def begin(self, step: int, chunks: int) -> dict:
        """Copy that many chunks; returns the order to follow."""
        _, skeleton = flatten(self.state, prefix="")
        slot = self.arena.acquire()
        assert slot is not None
        for chunk in self.layout.chunks[:chunks]:
            payload = self.state[chunk.key].tobytes()
            self.arena.view(slot)[chunk.offset : chunk.offset + len(payload)] = payload
            self.arena.advance(slot, chunk.end)
        part = draft(self.layout, skeleton, run="r", step=step, generation=1)
        order = {"t": "follow", "key": [1, 0, 1], "generation": 1, "rank": 0, "step": step}
        return {**order, "slot": slot, "attempt": self.arena.state(slot).attempt, "part": part.to_json()}

    def finish(self, order: dict) -> dict:
        """Copy the rest and seal; returns the order to persist."""
        for chunk in self.layout.chunks:
            payload = self.state[chunk.key].tobytes()
            self.arena.view(order["slot"])[chunk.offset : chunk.offset + len(payload)] = payload
        self.arena.seal(order["slot"], order["step"], 1)
        return {**{k: v for k, v in order.items() if k != "attempt"}, "t": "persist"}


@pytest.fixture
def big(writer):
    made = Big()
    writer.send({"t": "arena", "key": [1, 0, 1]}, [made.arena.fd])
    yield made
    made.arena.close()


def eventually(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def files(path):
    return sorted(p.name for p in path.rglob("*") if p.is_file())


def test_what_is_copied_is_written_while_the_rest_is_copied_and_counts_after_the_order(writer, big, tmp_path):
    order = big.begin(5, chunks=8)
    writer.send(order)
    eventually(lambda: any(name.endswith("~") for name in files(tmp_path / "nvme")))
    persist = big.finish(order)
    # Its part is durable before anybody was told to persist, and nothing was said of it.
    eventually(lambda: files(tmp_path / "nvme") == ["rank-0.json", "rank-0.pack"])
    assert big.arena.state(order["slot"]).kind is SlotKind.SEALED
    writer.send(persist)
    got = replies(writer, "slot_free")
    assert [(m["t"], m.get("tier")) for m in got if m.get("tier") != "shared"] == [
        ("persisted", "nvme"),
        ("slot_free", None),
    ]
    if ("persisted", "shared") not in [(m["t"], m.get("tier")) for m in got]:
        replies(writer, "persisted", tier="shared")
    assert big.arena.state(order["slot"]).kind is SlotKind.PERSISTED
    packs = [tmp_path / tier / "checkpoints/step-5-g1/rank-0.pack" for tier in ("nvme", "shared")]
    assert packs[0].read_bytes() == packs[1].read_bytes() == bytes(big.arena.view(order["slot"]))


@pytest.mark.parametrize("chunks", [0, 8, 16])
def test_a_rank_that_dies_in_its_copy_leaves_nothing_and_holds_nobody_up(writer, rank, big, tmp_path, chunks):
    other = Rank()
    writer.send({"t": "arena", "key": [1, 1, 1]}, [other.arena.fd])
    writer.send(big.begin(5, chunks=chunks))  # and never finishes
    writer.send({**other.seal(6), "key": [1, 1, 1]})
    assert replies(writer, "slot_free")[-1]["saved"] is True
    writer.send({"t": "forget", "key": [1, 0, 1]})
    assert not (tmp_path / "nvme/checkpoints/step-5-g1/rank-0.pack").exists()
    assert [name for name in files(tmp_path / "nvme") if name.endswith("~")] == []
    other.arena.close()


def test_an_arena_is_forgotten_while_its_copy_is_followed(writer, big, rank, tmp_path):
    writer.send(big.begin(5, chunks=3))
    writer.send({"t": "forget", "key": [1, 0, 1]})
    writer.send({"t": "arena", "key": [1, 0, 2]}, [rank.arena.fd])
    writer.send({**rank.seal(6), "key": [1, 0, 2]})
    assert replies(writer, "slot_free")[-1]["saved"] is True
    assert [name for name in files(tmp_path / "nvme") if name.endswith("~")] == []


def test_a_copy_that_was_given_up_is_not_taken_for_the_next_of_the_same_step(writer, big, tmp_path):
    first = big.begin(5, chunks=16)
    writer.send(first)
    eventually(lambda: any(name.endswith("~") for name in files(tmp_path / "nvme")))
    big.arena.abort(first["slot"])
    for array in big.state.values():
        array += 100
    writer.send(big.finish(big.begin(5, chunks=0)))
    assert replies(writer, "slot_free")[-1]["saved"] is True
    pack = (tmp_path / "nvme/checkpoints/step-5-g1/rank-0.pack").read_bytes()
    assert pack[:100] == bytes([100]) * 100


def test_a_head_start_that_fails_is_told_with_the_order_only(writer, big, tmp_path):
    (tmp_path / "nvme").mkdir(exist_ok=True)
    (tmp_path / "nvme" / "checkpoints").write_text("in the way")
    order = big.begin(5, chunks=8)
    writer.send(order)
    writer.send(big.finish(order))
    got = replies(writer, "slot_free")
    assert [(m["t"], m.get("tier")) for m in got] == [
        ("save_failed", "nvme"),
        ("persisted", "shared"),
        ("slot_free", None),
    ]


def test_threads_of_the_writer_yield_to_training(writer, rank):
    writer.send(rank.seal(1))
    replies(writer, "persisted", tier="shared")
    pid = int(os.environ["WRITER_PID"])
    nices = sorted(os.getpriority(os.PRIO_PROCESS, int(t)) for t in os.listdir(f"/proc/{pid}/task"))
    assert nices[-1] == 19
    assert nices[0] == os.getpriority(
        os.PRIO_PROCESS, 0
    )  # whoever reads the orders does not wait for the processor
