"""A node's processes under test: a real zygote, a real writer, real ranks of a small job, in a directory."""

import os
import queue
import time
from pathlib import Path

import pytest

from resilience.runtime.entry import Entry
from resilience.runtime.node import NodeProcesses
from resilience.runtime.output import Outputs
from storage_backends import open_storage

JOB = """
import os, signal, subprocess, sys
import numpy as np

def train(run, *, steps=6, then="return", arrays=1, size=64):
    state = {f"a{i}": np.full(size, 1.0) for i in range(arrays)}
    run.track(state=state)
    print(f"hello from rank {run.rank}")
    for step in run.steps(steps):
        for value in state.values():
            value += 1
        run.log(loss=float(step))
        if step == 2 and then == "child":
            child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
            print(f"child {child.pid}", flush=True)
        if step == 2 and then in ("child", "wait"):
            print("waiting", flush=True)
            while True:
                signal.pause()
        if step == 1 and then == "half a message":
            import socket, struct
            sock = run._host._channel._sock
            run._host._first = False
            sock.sendall(struct.pack("<IB", 1 << 20, 0) + b'{"t": "log", "values": [')
            os.kill(os.getpid(), signal.SIGSTOP)
        if step == 2 and then == "raise":
            raise ValueError("bad sample")
    return {"sum": float(sum(v.sum() for v in state.values()))}
"""


class Node:
    """``NodeProcesses`` with what it reported."""

    def __init__(self, directory: Path, *, body: str = JOB, nvme: bool = True, name: str = "node-0") -> None:
        script = directory / "small_job.py"
        script.write_text(body)
        self.directory = directory
        self.run = f"run-{os.getpid()}-{directory.name}"
        self.shared = open_storage(str(directory / "shared"))
        self.seen: list[dict] = []
        self._new: queue.SimpleQueue[dict] = queue.SimpleQueue()
        self.config = {
            "name": name,
            "run": self.run,
            "entry": Entry(name="train", file=str(script)).to_json(),
            "env": {"OMP_NUM_THREADS": "1"},
            "shared": str(directory / "shared"),
            "nvme": str(directory / "nvme") if nvme else None,
        }
        self.outputs = Outputs(self.shared, None)
        self.processes = NodeProcesses(self.config, self.outputs, self._new.put)

    def start(self) -> "Node":
        self.processes.start()
        return self

    def wait(self, kind: str, timeout: float = 60.0, **matching) -> dict:
        """The first report of ``kind`` that has these values, seen already or to come."""
        deadline = time.monotonic() + timeout
        checked = 0
        while True:
            for seen in self.seen[checked:]:
                if seen["t"] == kind and all(seen.get(key) == value for key, value in matching.items()):
                    return seen
            checked = len(self.seen)
            try:
                self.seen.append(self._new.get(timeout=max(0.0, deadline - time.monotonic())))
            except queue.Empty:
                story = "\n".join(str(seen)[:300] for seen in self.seen if seen["t"] != "progress")
                raise AssertionError(f"no {kind} {matching} within {timeout} s; seen:\n{story}") from None

    def forget(self) -> None:
        """Drop what was reported so far."""
        while not self._new.empty():
            self._new.get()
        self.seen.clear()

    def all(self, kind: str) -> list[dict]:
        while not self._new.empty():
            self.seen.append(self._new.get())
        return [seen for seen in self.seen if seen["t"] == kind]

    def train(self, generation: int = 1, *, ranks: int = 1, every=None, failpoints=(), **arguments) -> None:
        self.processes.order(
            {
                "t": "start",
                "generation": generation,
                "ranks": [
                    {
                        "rank": rank,
                        "local_rank": rank,
                        "world_size": ranks,
                        "run": self.run,
                        "checkpoint_every": every,
                        "restore": None,
                        "arguments": arguments,
                        "failpoints": list(failpoints),
                        "env": {"RANK": str(rank)},
                    }
                    for rank in range(ranks)
                ],
            }
        )

    def output(self, rank: int = 0, generation: int = 1) -> str:
        return (self.directory / "shared" / "logs" / f"g{generation}" / f"rank-{rank}.log").read_text()

    def until(self, true, timeout: float = 60.0, what: str = "condition") -> None:
        """Wait for something that no report tells of."""
        deadline = time.monotonic() + timeout
        pause = queue.SimpleQueue()
        while not true():
            if time.monotonic() > deadline:
                raise AssertionError(f"{what} did not come true within {timeout} s")
            try:
                pause.get(timeout=0.005)
            except queue.Empty:
                continue

    @property
    def zygote(self) -> int:
        return self.processes._zygote[0].pid

    @property
    def writer(self) -> int:
        return self.processes._saves.pids()[0]

    def rank_pid(self, rank: int, generation: int = 1) -> int:
        self.until(lambda: self._pid(rank, generation), what=f"fork of rank {rank}")
        return self._pid(rank, generation)

    def _pid(self, rank: int, generation: int) -> int | None:
        process = self.processes._processes.get(f"rank-{rank}-g{generation}")
        return process.pid if process is not None else None


@pytest.fixture
def make_node(tmp_path):
    nodes = []

    def make(*, prepare=lambda: None, **options) -> Node:
        directory = tmp_path / f"node{len(nodes)}"
        directory.mkdir()
        prepare()
        node = Node(directory, **options)
        nodes.append(node)
        return node.start()

    yield make
    for node in nodes:
        node.processes.close()
        node.outputs.close()


@pytest.fixture
def node_class():
    return Node


@pytest.fixture
def node(make_node) -> Node:
    """A node whose zygote is ready."""
    made = make_node()
    made.wait("ready")
    return made
