"""Examples loaded by path, and run under a plain launcher: environment variables and a stand-in for ``Run``.

Nothing of the runtime is involved, so these tests say whether an example itself is right: deterministic, and
resumable to the bit from the state it tracks. That the runtime restores it is tested elsewhere.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

# What a rank does: each case is one run of the function, from scratch or from the state an earlier case kept.
_RANK = """
import copy, importlib.util, json, os, sys
import torch

class PlainRun:
    def __init__(self, keep_at, state):
        self.keep_at, self.state, self.start, self.kept, self.losses = keep_at, state, 0, None, []
    def track(self, **objects):
        self.objects = objects
        if self.state is not None:
            self.start = self.state["step"]
            for name, value in objects.items():
                value.load_state_dict(copy.deepcopy(self.state[name]))
            torch.set_rng_state(self.state["rng"])
    def steps(self, total):
        for step in range(self.start, total):
            if step == self.keep_at:
                states = {name: copy.deepcopy(value.state_dict()) for name, value in self.objects.items()}
                self.kept = {**states, "rng": torch.get_rng_state(), "step": step}
            yield step
    def log(self, loss):
        self.losses.append(loss)

spec = importlib.util.spec_from_file_location("example", sys.argv[1])
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)
runs, results = [], []  # kept: a process group freed right after a collective can deadlock (pytorch#56297)
for case in json.loads(sys.argv[2]):
    os.environ["MASTER_PORT"] = str(case["port"])
    state = None if case["resume"] is None else runs[case["resume"]].kept
    run = PlainRun(case["keep_at"], state)
    runs.append(run)
    value = example.train.function(run, **case["arguments"])
    results.append({"value": value, "losses": run.losses, "start": run.start})
print(json.dumps(results), flush=True)
os._exit(0)
"""


def load_example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"examples_{name}", ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def char_gpt() -> ModuleType:
    pytest.importorskip("torch", reason="char_gpt needs the torch extra")
    return load_example("char_gpt")


@pytest.fixture(scope="session")
def numpy_sgd() -> ModuleType:
    return load_example("numpy_sgd")


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.fixture
def plain_launch() -> Any:
    """``plain_launch("char_gpt", ranks, cases) -> results of each case on rank 0``; a case is a dict of
    ``arguments``, ``keep_at`` (keep the state as this step begins) and ``resume`` (number of
    the case to go on from)."""
    started: list[subprocess.Popen[str]] = []

    def launch(name: str, ranks: int, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
        cases = [{"keep_at": None, "resume": None, **case, "port": _free_port()} for case in cases]
        command = [sys.executable, "-c", _RANK, str(ROOT / "examples" / f"{name}.py"), json.dumps(cases)]
        for rank in range(ranks):
            env = {
                "RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "OMP_NUM_THREADS": "1",
            }
            process = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **env}, stdout=subprocess.PIPE, text=True
            )
            started.append(process)
        outputs = [process.communicate(timeout=120)[0] for process in started]
        assert [process.returncode for process in started] == [0] * ranks
        return list(json.loads(outputs[0].splitlines()[-1]))

    yield launch
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()
