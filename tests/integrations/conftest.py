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

_DEADLINE_S = 120


@pytest.fixture
def ranks() -> Iterator[Callable[..., list[list[Any]]]]:
    """``ranks("dcp", ("save", 4, {...}), ("load", 3, {...}))``: functions of ``dcp_cases.py``, one after the other, by
    so many ranks each; what they returned, by rank.

    A rank that fails fails the test with its traceback; the others are ended.
    """
    started: list[subprocess.Popen[str]] = []

    def run(file: str, *phases: tuple[str, int, dict[str, Any]]) -> list[list[Any]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        script = str(Path(__file__).with_name(f"{file}_cases.py"))
        processes = [
            subprocess.Popen(
                [sys.executable, script, str(rank), port, json.dumps(phases)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=env,
            )
            for rank in range(max(world for _, world, _ in phases))
        ]
        started.extend(processes)
        outputs = [process.communicate(timeout=_DEADLINE_S) for process in processes]
        failed = [
            f"rank {rank} of {file}:\n{errors[-4000:]}"
            for rank, (process, (_, errors)) in enumerate(zip(processes, outputs, strict=True))
            if process.returncode
        ]
        assert not failed, "\n".join(failed)
        results = [json.loads(output.splitlines()[-1]) for output, _ in outputs]
        return [
            [results[rank][number] for rank in range(world)] for number, (_, world, _) in enumerate(phases)
        ]

    yield run
    for process in started:
        process.kill()
        process.wait()
