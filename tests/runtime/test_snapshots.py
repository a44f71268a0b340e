"""A rank's snapshots in both modes, through its host; the test is the agent and the training function."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from resilience.checkpoint import fit
from resilience.checkpoint.arena import Arena
from resilience.checkpoint.overlap import Mode, Overlap
from resilience.checkpoint.part import Part
from resilience.runtime.page import Page
from resilience.runtime.rank import RankHost
from resilience.runtime.wire import Channel

MESSAGE = {
    "rank": 0,
    "world_size": 1,
    "local_rank": 0,
    "run": "r",
    "generation": 1,
    "checkpoint_every": 1,
    "restore": None,
    "failpoints": [],
}


class Training:
    """A training function and its agent, step by step."""

    def __init__(self, mode: str) -> None:
        self.page = Page.create()
        self.channel, self.theirs = Channel.pair()
        self.host = RankHost({**MESSAGE, "snapshot": mode}, Page(os.dup(self.page.fd)), self.theirs)
        torch.manual_seed(0)
        self.model = torch.nn.Linear(300, 300)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.objects = {"model": self.model, "opt": self.optimizer}
        self.arenas: list[Arena] = []
        self.weights: dict[int, np.ndarray] = {}
        self.sealed: list[int] = []
        self.skipped: list[dict] = []

    def step(self, done: int, total: int = 1000, *, meddle: bool = False) -> None:
        self.host.begin(done - 1)
        self.model(torch.ones(4, 300)).square().mean().backward()
        if meddle:
            with torch.no_grad():
                self.model.weight.mul_(2)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.weights[done] = self.model.weight.detach().numpy().copy()
        if self.host.end(done, total):
            self.host.save(done, lambda: {n: fit.capture(v) for n, v in self.objects.items()}, self.objects)
        self.hear()

    def hear(self) -> None:
        while batch := self.channel.take():
            for message, fds in batch:
                self.arenas += [Arena.attach(fd) for fd in fds]
                if message["t"] == "sealed":
                    self.check(message)
                elif message["t"] == "skipped":
                    self.skipped.append(message)

    def check(self, message: dict) -> None:
        """What was sealed is the state as it was after that step."""
        arena, step = self.arenas[-1], message["step"]
        assert arena.state(message["slot"]).step == step
        part = Part.from_json(message["part"])
        [chunk] = [c for c in part.chunks if part.arrays[c.array].name == "rank-0/model/weight"]
        image = arena.view(message["slot"])[chunk.offset : chunk.offset + chunk.length]
        assert np.array_equal(np.frombuffer(image, np.float32).reshape(300, 300), self.weights[step])
        self.sealed.append(step)
        arena.persisted(message["slot"])

    def close(self) -> None:
        self.host._snapshots.close()
        for closable in (*self.arenas, self.channel, self.theirs, self.page, self.host._page):
            closable.close()


@pytest.fixture
def make():
    made = []

    def make(mode: str) -> Training:
        made.append(Training(mode))
        return made[-1]

    yield make
    for training in made:
        training.close()


@pytest.mark.parametrize("mode", ["blocking", "overlapped"])
def test_every_snapshot_holds_its_step(make, mode):
    training = make(mode)
    for done in range(1, 21):
        training.step(done)
        # Whether overlap pays on this machine is not the question here.
        training.host._snapshots._overlap = Overlap(Mode(mode), waits=(1e9,))
    training.host.finish()
    training.hear()
    assert training.sealed == list(range(1, 21))
    assert training.skipped == []


def test_overlapped_is_sealed_in_the_next_step_and_the_last_one_at_once(make):
    training = make("overlapped")
    training.step(1, total=4)
    assert training.sealed == [1], "the first one blocks, to show what there is to hide"
    training.host._snapshots._overlap = Overlap(Mode.OVERLAPPED, waits=(1e9,))
    training.step(2, total=4)
    assert training.sealed == [1]
    training.step(3, total=4)
    assert training.sealed == [1, 2]
    training.step(4, total=4)
    assert training.sealed == [1, 2, 3, 4]


def test_parameters_that_change_elsewhere_drop_the_snapshot_and_end_overlap(make, capfd):
    training = make("overlapped")
    training.step(1)
    training.host._snapshots._overlap = Overlap(Mode.OVERLAPPED, waits=(1e9,))
    training.step(2)
    training.step(3, meddle=True)
    assert [message["step"] for message in training.skipped] == [2]
    assert "optimizer.step()" in training.skipped[0]["reason"]
    assert "snapshots block from now on" in capfd.readouterr().err
    training.step(4, meddle=True)
    training.step(5)
    assert training.sealed == [1, 3, 4, 5]


def test_a_function_that_fails_leaves_its_last_snapshot_sealed(make):
    training = make("overlapped")
    training.step(1)
    training.host._snapshots._overlap = Overlap(Mode.OVERLAPPED, waits=(1e9,))
    training.step(2)
    training.host.fail(ValueError("of the user"))
    training.hear()
    assert training.sealed == [1, 2]
