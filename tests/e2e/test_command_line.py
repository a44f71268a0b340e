"""``resilience run`` on an existing cluster named by RAY_ADDRESS, as a user types it; then asking what happened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray

JOBS = str(Path(__file__).parent / "jobs.py")


def resilience(*arguments, address=None, code=0):
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RESILIENCE_STORAGE")}
    if address:
        environment["RAY_ADDRESS"] = address
    done = subprocess.run(
        [sys.executable, "-m", "resilience.cli", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_run_then_ask(cluster, tmp_path):
    storage = str(tmp_path / "s")
    command = [
        "run",
        f"{JOBS}:by_hand",
        "--workers",
        "2",
        "--spares",
        "1",
        "--storage",
        storage,
        "--name",
        "typed",
    ]
    done = resilience(*command, "--set", "steps=6", "--json", address=cluster.address)
    last = json.loads(done.stdout.strip().splitlines()[-1])
    assert (last["result"], last["steps"], last["value"]) == ("finished", 6, 6)
    assert all(line.startswith("{") for line in done.stdout.strip().splitlines()), (
        "stdout holds JSON and nothing else"
    )

    # From storage alone, with no cluster named.
    status = json.loads(resilience("status", "typed", "--storage", storage, "--json").stdout)
    assert "finished" in (status["phase"], status.get("result"))
    joined = json.loads(
        resilience(
            "history", "typed", "--storage", storage, "--json", "--sql",
            "select data -> 'levels' as levels from events where type = 'node.joined'",
        ).stdout
    )  # fmt: skip
    assert joined
    assert all(row["levels"] == ["supernode-0"] for row in joined), "topology comes from Ray's node labels"
    assert "typed" in resilience("history", "--storage", storage).stdout
    assert "2 whole" in resilience("verify", "typed", "--storage", storage).stdout


def test_a_bug_in_the_function_exits_with_1_and_shows_the_traceback(cluster, tmp_path):
    done = resilience(
        "run",
        f"{JOBS}:fails_at",
        "--storage",
        str(tmp_path / "s"),
        "--set",
        "step=3",
        address=cluster.address,
        code=1,
    )
    assert "ValueError: bad sample at step 3" in done.stderr
    logs = resilience("logs", "fails_at", "--storage", str(tmp_path / "s"), "--rank", "1")
    assert "rank 1 at step 3" in logs.stdout


def test_misuse_is_told_before_anything_starts(tmp_path):
    storage = ["--storage", str(tmp_path / "s")]
    assert "by_hand" in resilience("run", f"{JOBS}:by_hnd", *storage, code=2).stderr
    assert "FILE.py:FUNCTION" in resilience("run", JOBS, *storage, code=2).stderr
    assert "no such file" in resilience("run", "absent.py:train", *storage, code=2).stderr
    assert "steps" in resilience("run", f"{JOBS}:by_hand", *storage, "--set", "stps=3", code=2).stderr
    away = resilience("run", f"{JOBS}:by_hand", *storage, address="127.0.0.1:1", code=6)
    assert "RAY_ADDRESS" in away.stderr
