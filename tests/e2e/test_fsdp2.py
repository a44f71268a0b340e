"""The FSDP2 example: two ranks begin, three go on, and what comes out is what one process computes by itself."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import resilience
from resilience.history.query import History

pytestmark = pytest.mark.ray
torch = pytest.importorskip("torch")

EXAMPLE = Path(__file__).parents[2] / "examples" / "fsdp2.py"
STEPS = 150


@pytest.fixture
def run(cluster: Any, tmp_path: Path) -> Any:
    """``run(workers)``: the command line, started; its output is JSON lines."""
    started: list[subprocess.Popen[str]] = []

    def start(workers: int) -> subprocess.Popen[str]:
        command = [
            "run",
            f"{EXAMPLE}:train",
            "--workers",
            str(workers),
            "--storage",
            str(tmp_path),
            "--name",
            "f",
        ]
        options = ["--set", f"steps={STEPS}", "--checkpoint-every", "10", "--json"]
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "resilience.cli", *command, *options],
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "RAY_ADDRESS": cluster.address},
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def alone() -> dict[str, float]:
    """The same training in this process, without ranks."""
    spec = importlib.util.spec_from_file_location("examples_fsdp2", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    model = example.build(30, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = example.loss_of(model, example.batch(step))
        loss.backward()
        optimizer.step()
    squares = sum(p.detach().double().square().sum() for p in model.parameters())
    return {"loss": loss.item(), "weights": float(squares) ** 0.5}


def test_two_ranks_begin_and_three_go_on(
    run: Callable[[int], subprocess.Popen[str]], committed: Any, tmp_path: Path
) -> None:
    first = run(2)
    deadline = time.monotonic() + 60
    while not (tmp_path / "f" / "log").exists() or not committed(str(tmp_path), "f"):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    told = json.loads(first.communicate(timeout=60)[0].splitlines()[-1])
    assert told["result"] == "interrupted", told
    assert 0 < told["steps"] < STEPS

    output, _ = run(3).communicate(timeout=120)
    done = json.loads(output.splitlines()[-1])
    assert (done["result"], done["steps"]) == ("finished", STEPS)
    with History(str(tmp_path), "f") as history:
        query = "select rank, step from events where type = 'restore.done' and generation = 2 order by rank"
        assert [(row["rank"], row["step"]) for row in history.sql(query)] == [
            (n, told["steps"]) for n in range(3)
        ]
    newest = resilience.open_checkpoint(f"{tmp_path}/f")
    assert newest.attrs["resilience"]["world_size"] == 3
    assert newest["train/model/2.weight"].shape == (61, 30)

    reference = alone()
    # Ranks add up in another order, and every step makes a little more of that; the bits are tests/integrations'.
    assert done["value"]["loss"] == pytest.approx(reference["loss"], rel=3e-2)
    assert done["value"]["weights"] == pytest.approx(reference["weights"], rel=5e-3)
    assert reference["loss"] < 2.0  # it began at ln 61 = 4.1
