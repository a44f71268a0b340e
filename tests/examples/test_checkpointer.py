"""examples/checkpointer.py and its torchrun twin, as programs: killed, and started again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import resilience

EXAMPLES = Path(__file__).parents[2] / "examples"
pytest.importorskip("torch")


def start(*command: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True)


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """The first line with ``text``."""
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return line.strip()
    raise AssertionError(f"it ended without {text!r}")


def test_it_is_as_short_as_promised() -> None:
    assert len((EXAMPLES / "checkpointer.py").read_text().splitlines()) < 40


def test_a_killed_loop_ends_with_the_bits_of_an_undisturbed_one(tmp_path: Path) -> None:
    script = str(EXAMPLES / "checkpointer.py")
    with start(script, str(tmp_path / "whole"), "60") as whole:
        wanted = read_until(whole, "weights")
    with start(script, str(tmp_path / "killed"), "60") as killed:
        read_until(killed, "step 35,")
        killed.kill()
    with start(script, str(tmp_path / "killed"), "60") as again:
        assert int(read_until(again, "step ").split()[1].rstrip(",")) in (21, 31)
        assert read_until(again, "weights") == wanted
    for process in (whole, again):
        assert process.returncode == 0


@pytest.mark.timeout(300)
def test_under_torchrun_it_goes_on_with_fewer_ranks(tmp_path: Path) -> None:
    def torchrun(ranks: int, steps: int) -> str:
        command = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}")
        with start(
            *command, str(EXAMPLES / "checkpointer_ddp.py"), str(tmp_path / "ddp"), str(steps)
        ) as process:
            line = read_until(process, f"step {steps} of")
            assert process.wait(120) == 0
        return line

    assert torchrun(2, 15).endswith("from 0")
    saved = resilience.open_checkpoint(str(tmp_path / "ddp"))["model/weight"][:]
    assert np.isfinite(saved).all()
    assert torchrun(1, 25).endswith("from 15")
