"""Jobs that the end-to-end tests run. Deterministic: the same arguments give the same bytes."""

import mmap
import os
import random

import numpy as np

import resilience
from resilience.checkpoint.shard import Shard


def work(amount: int) -> float:
    """A bit of real arithmetic, so that steps take a few milliseconds."""
    matrix = np.eye(96) * 1.0001
    for _ in range(amount):
        matrix = matrix @ matrix.T / np.linalg.norm(matrix)
    return float(matrix[0, 0])


@resilience.job(workers=3, spares=1, checkpoint_every=5)
def sgd(run, *, steps=40, amount=20, size=2000):
    """Logistic regression on made data; draws its samples from every generator that is to be restored."""
    data = np.random.default_rng(1000 + run.rank)
    features = data.normal(size=(size, 16))
    labels = (features @ np.arange(16) > 0).astype(float)
    state = {
        "weights": np.zeros(16),
        "velocity": np.zeros(16),
        "seen": np.zeros(size, np.int64),
        "counts": {"draws": 0, "last": [0, 0]},
    }
    random.seed(run.rank)
    np.random.seed(run.rank)
    run.track(state=state)
    for step in run.steps(steps):
        chosen = np.random.randint(0, size, 8)
        chosen[0] = random.randrange(size)
        np.add.at(state["seen"], chosen, 1)
        state["counts"]["draws"] += 8
        state["counts"]["last"][0] = step
        x, y = features[chosen], labels[chosen]
        error = 1 / (1 + np.exp(-(x @ state["weights"]))) - y
        state["velocity"] *= 0.9
        state["velocity"] -= 0.1 * x.T @ error
        state["weights"] += state["velocity"]
        work(amount)
        run.log(loss=float(np.mean(error**2)), parent=os.getppid())
    return {"draws": state["counts"]["draws"], "weights": state["weights"].tolist()}


@resilience.job(workers=2, checkpoint_every=5)
def fails_at(run, *, steps=20, rank=1, step=7):
    """The user's own bug, on one rank."""
    state = {"n": np.zeros(1)}
    run.track(state=state)
    for at in run.steps(steps):
        print(f"rank {run.rank} at step {at}")
        if run.rank == rank and at == step:
            raise ValueError(f"bad sample at step {at}")
        state["n"] += 1


@resilience.job(workers=2, checkpoint_every=2)
def unsavable(run):
    """State that cannot be saved."""
    run.track(state={"weights": np.zeros(3), "callback": {"hook": lambda: None}})
    for _ in run.steps(4):
        pass


@resilience.job(workers=2, checkpoint_every=5)
def shaped(run, *, steps=10, width=4, extra=False):
    """State whose shape is an argument: resumes only if it fits."""
    state = {"weights": np.zeros(width)}
    if extra:
        state["bias"] = np.zeros(1)
    run.track(state=state)
    for _ in run.steps(steps):
        state["weights"] += 1


@resilience.job(workers=2, checkpoint_every=5)
def sharded(run, *, steps=10, rows=13):
    """No rank holds the whole array: each has some of its rows."""
    side = -(-rows // run.world_size)
    low, high = min(run.rank * side, rows), min((run.rank + 1) * side, rows)
    local = np.zeros((high - low, 3))
    run.track(state={"w": Shard.at(local, shape=(rows, 3), offset=(low, 0), unit=(side, 3))})
    for _ in run.steps(steps):
        local += np.arange(low, high)[:, None]
        work(5)
    return local.tolist()


@resilience.job(workers=2, checkpoint_every=1000)
def endless(run, *, steps=1_000_000, amount=20):
    """Goes on until it is stopped."""
    state = {"n": np.zeros(1, np.int64)}
    run.track(state=state)
    for _ in run.steps(steps):
        state["n"] += 1
        work(amount)
        run.log(n=float(state["n"][0]))
    return int(state["n"][0])


@resilience.job(workers=2)
def by_hand(run, *, steps=9):
    """Checkpoints by hand and a named section."""
    state = {"n": np.zeros(1, np.int64)}
    run.track(state=state)
    for step in run.steps(steps):
        state["n"] += 1
        if step == 3:
            run.checkpoint()
        with run.section("eval"):
            work(5)
    return int(state["n"][0])


@resilience.job(workers=2, checkpoint_every=3)
def functional(run, *, steps=12):
    """Functional state: a new value every step, as with JAX."""
    state = run.restore({"params": np.zeros(4), "step": 0})
    for _ in run.steps(steps):
        state = {"params": state["params"] + 0.5, "step": state["step"] + 1}
        run.save(state)
    return {"params": state["params"].tolist(), "step": state["step"]}


@resilience.job(workers=1, checkpoint_every=1)
def huge(run, *, size):
    """More state than the machine has memory (never touched, so it costs nothing itself)."""
    promised = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
    state = {"table": np.frombuffer(promised, np.uint8)}
    run.track(state=state)
    for _ in run.steps(2):
        pass
