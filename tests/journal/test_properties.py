"""The obligations P1-P11 of the commit protocol, over the memory twin.

Each test draws one byte string and plays a world with it: racing supervisors stepped by an arbitrary schedule, with
processes killed and power lost at any persistence point, replies lost, late and doubled, stale listings, errors at
any step. What each obligation says is on its function in ``journal_obligations``; that each can fail is shown in
``test_mutations``. More examples: ``RESILIENCE_EXAMPLES=5000 pytest tests/journal/test_properties.py``.
"""

from __future__ import annotations

import ast
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import journal_obligations as obligations
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from journal_simulation import Faults

import resilience
from resilience.journal import log, records, state

EXAMPLES = int(os.environ.get("RESILIENCE_EXAMPLES", "40"))
CLOCKS = ("time", "datetime", "sched", "random", "secrets", "uuid")


def over_worlds(test: Callable[[bytes], None]) -> Callable[[], None]:
    """Fixed-size strings, so that shrinking means zeros: fewer faults, longer turns."""
    profile = settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=[
            HealthCheck.too_slow,
            HealthCheck.data_too_large,
            HealthCheck.large_base_example,
        ],
    )
    return profile(given(st.binary(min_size=1024, max_size=1024))(test))


@over_worlds
def test_p1_agreement_and_density(data: bytes) -> None:
    obligations.p1_agreement_and_density(data)


@over_worlds
def test_p2_references_are_durable_before_the_record(data: bytes) -> None:
    obligations.p2_references_before_records(data)


@over_worlds
def test_p3_nothing_older_behind_a_fence(data: bytes) -> None:
    obligations.p3_fencing(data)


@over_worlds
def test_p4_no_lost_acknowledgement(data: bytes) -> None:
    obligations.p4_no_lost_acknowledgement(data)


@over_worlds
def test_p5_no_phantom(data: bytes) -> None:
    obligations.p5_no_phantom(data)


@over_worlds
def test_p6_idempotence_under_lost_and_doubled_replies(data: bytes) -> None:
    obligations.p6_idempotence(data)


@over_worlds
def test_p7_zombies_stay_in_their_prefix(data: bytes) -> None:
    obligations.p7_zombies_stay_in_their_prefix(data)


@over_worlds
def test_p8_integrity(data: bytes) -> None:
    for part in range(0, len(data), 64):
        obligations.p8_integrity(data[part : part + 64])


@over_worlds
def test_p9_gc_safety(data: bytes) -> None:
    obligations.p9_gc_safety(data)


@over_worlds
def test_p10_liveness_after_heal(data: bytes) -> None:
    obligations.p10_liveness_after_heal(data)


# -- P11 -----------------------------------------------------------------------------------------------------


def clocks_in(source: str) -> list[str]:
    """What a module takes from the modules that know the time or draw numbers, however it does so."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in CLOCKS]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in CLOCKS:
            found.append(node.module or "")
        elif isinstance(node, ast.Attribute) and node.attr in ("times", "clock_gettime", "urandom", "sleep"):
            found.append(node.attr)
        elif isinstance(node, ast.Name) and node.id == "__import__":
            found.append(node.id)
    return found


def deciding_modules() -> list[Path]:
    control = Path(resilience.__file__).parent / "control"
    return [*(Path(module.__file__) for module in (log, records, state)), *sorted(control.glob("*.py"))]


@pytest.mark.parametrize("path", deciding_modules(), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_p11_no_decision_imports_a_clock(path: Path) -> None:
    assert clocks_in(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import time",
        "from time import monotonic as m",
        "import a, datetime as d",
        "def f():\n  import random",
        "import os\nos.times()",
        "__import__('time')",
    ],
)
def test_p11_the_search_finds_clocks(source: str) -> None:
    assert clocks_in(source)


def test_p11_no_decision_reads_a_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same world gives the same log, byte for byte, while every clock of the process jumps about."""
    worlds = [random.Random(seed).randbytes(1024) for seed in range(8)]
    calm = [obligations.p11_no_clock(data) for data in worlds]
    jumps = random.Random(1)
    asked = []

    def jump() -> float:
        asked.append(None)
        return jumps.uniform(-1e12, 1e12)

    for name in ("time", "monotonic", "perf_counter"):
        monkeypatch.setattr(time, name, jump)
        monkeypatch.setattr(time, f"{name}_ns", lambda: int(jump()))
    wild = [obligations.p11_no_clock(data) for data in worlds]
    asked_by_us = len(asked)
    monkeypatch.undo()
    assert wild == calm
    assert asked_by_us == 0
    assert sum(map(len, calm)) > 20, "these worlds prove nothing"


def test_worlds_are_rich_enough_to_mean_something() -> None:
    """Over a few seeds every kind of end and fault happens; otherwise the properties pass for want of trouble."""
    seen: dict[str, int] = {}
    for seed in range(60):
        with obligations.world_of(random.Random(seed).randbytes(1024), obligations.PARTS) as world:
            obligations.play(world)
            for key in [client.outcome for client in world.clients] + [world.semantics]:
                seen[key] = seen.get(key, 0) + 1
            seen["boots"] = seen.get("boots", 0) + world.disk.boots
            seen["acks"] = seen.get("acks", 0) + len(world.acked)
            seen["fences"] = seen.get("fences", 0) + len(world.fenced)
    for key in ("done", "fenced", "dead", "page_cache", "object", "boots"):
        assert seen.get(key, 0) >= 10, seen
    assert seen["acks"] > 100 and seen["fences"] > 100, seen
    assert Faults.none() != Faults()
