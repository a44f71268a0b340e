"""The smallest use: logistic regression in NumPy. Every rank fits its own data; nothing is communicated.

Start it with ``python examples/numpy_sgd.py``; kill any of its processes, or all of them, and start it again.
"""

import numpy as np

import resilience


@resilience.job(workers=2)
def train(run: resilience.Run, *, steps: int = 1000, lr: float = 0.5) -> dict[str, float]:
    """Fit ``y = [x . w > 0]``; the accuracy that rank 0 reached."""
    x = np.random.default_rng(run.rank).normal(size=(512, 16))
    y = x @ np.linspace(-1, 1, 16) > 0
    state = {"w": np.zeros(16), "v": np.zeros(16)}  # weights and momentum: arrays, changed in place
    run.track(state=state)
    for _ in run.steps(steps):
        p = 1 / (1 + np.exp(-x @ state["w"]))
        state["v"] *= 0.9
        state["v"] += x.T @ (p - y) / len(x)
        state["w"] -= lr * state["v"]
        run.log(loss=float(-np.mean(np.log(np.where(y, p, 1 - p) + 1e-12))))
    return {"accuracy": float(np.mean((x @ state["w"] > 0) == y))}


if __name__ == "__main__":
    print(train.launch().value)
