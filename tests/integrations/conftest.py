"""Ranks as real processes under gloo."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CASES = Path(__file__).with_name("cases.py")
_DEADLINE_S = 120


@pytest.fixture
def ranks() -> Iterator[Callable[..., list[Any]]]:
    """``ranks("case", world, argument=...)``: run a function of ``cases.py`` on each rank; what they return, by rank.

    A rank that fails fails the test with its traceback; the others are ended.
    """
    started: list[subprocess.Popen[str]] = []

    def run(case: str, world: int, **arguments: Any) -> list[Any]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        processes = [
            subprocess.Popen(
                [sys.executable, str(CASES), case, str(rank), str(world), port, json.dumps(arguments)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=env,
            )
            for rank in range(world)
        ]
        started.extend(processes)
        outputs = [process.communicate(timeout=_DEADLINE_S) for process in processes]
        failed = [
            f"rank {rank} of {case}:\n{errors[-4000:]}"
            for rank, (process, (_, errors)) in enumerate(zip(processes, outputs, strict=True))
            if process.returncode
        ]
        assert not failed, "\n".join(failed)
        return [json.loads(output.splitlines()[-1]) for output, _ in outputs]

    yield run
    for process in started:
        process.kill()
        process.wait()
