"""A job that the test drives: it goes as far as a file allows, and says in files how far it is.

Its state is known in closed form, so a run needs no second one to be compared with.
"""

import os
import time
from pathlib import Path

import numpy as np

import resilience


@resilience.job(workers=2, checkpoint_every=5, hang_floor=120.0, card="card")
def driven(run, *, control, steps, size=1000, talk=False, pids=False):
    """Adds random numbers up, one step at a time, as soon as ``control/limit`` is above the step."""
    directory = Path(control)
    state = {"table": np.zeros(size), "n": 0}
    np.random.seed(run.rank)
    run.track(state=state)
    if pids:
        _say(directory / f"pid-g{run.generation}-rank-{run.rank}", str(os.getpid()))
    for step in run.steps(steps):
        _say(directory / f"at-g{run.generation}-rank-{run.rank}", str(step))
        while int((directory / "limit").read_text()) <= step:
            time.sleep(0.005)
        if talk:
            print(f"rank {run.rank} at step {step} " + "x" * 2000)
        state["table"] += np.random.random(size)
        state["n"] += 1
        run.log(n=state["n"])
    return state["n"]


def _say(path, text):
    temporary = path.with_name(f"{path.name}.{os.getpid()}~")
    temporary.write_text(text)
    temporary.rename(path)
