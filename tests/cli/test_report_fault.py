"""``resilience report-fault`` where there is nothing to report to, or nothing that can be reported."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest
from click.testing import Result

Call = Callable[..., Result]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--card", "node-7", "--code", "79"], "NODE/INDEX"),
        (["--card", "node-7/x", "--code", "79"], "NODE/INDEX"),
        (["--card", "node-7/3", "--code", " "], "the code is empty"),
        (["--card", "node-7/3", "--code", "79", "--action", "replce card"], "did you mean 'replace card'?"),
        (["--card", "node-7/3"], "--code"),
    ],
)
def test_what_cannot_be_reported_is_bad_usage(call: Call, options: list[str], told: str) -> None:
    result = call("report-fault", *options)
    assert result.exit_code == 2
    assert told in result.stderr


def test_no_cluster_is_unavailable(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    if ray.is_initialized():
        pytest.skip("this process is in a cluster already")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free.getsockname()[1]}")
    result = call("report-fault", "--card", "node-7/3", "--code", "79")
    assert result.exit_code == 6
    assert "no Ray cluster answers" in result.stderr and "hint" in result.stderr
