"""Planned faults hit what they name, as often as they say, and do what they say."""

from __future__ import annotations

import pytest

from resilience.errors import ExhaustedError, InvalidError, UnavailableError
from storage_backends.disk import Disk
from storage_backends.faults import Fault, FaultStorage
from storage_backends.memory import MemoryStorage


def faulty(*plan: Fault) -> FaultStorage:
    return FaultStorage(MemoryStorage(Disk()), plan, sleep=lambda seconds: None)


def test_a_fault_is_bound_to_operation_name_and_count() -> None:
    storage = faulty(Fault("unavailable", "create", "log/*", after=1, count=2))
    storage.create("other", b"1")
    storage.create("log/1", b"1")
    for slot in (2, 3):
        with pytest.raises(UnavailableError, match="injected"):
            storage.create(f"log/{slot}", b"1")
    storage.create("log/4", b"1")
    assert storage.list("log") == ["log/1", "log/4"]
    assert [name for _, _, name in storage.fired] == ["log/2", "log/3"]


def test_actions_that_prevent() -> None:
    storage = faulty(
        Fault("exhausted", "write"), Fault("read_only", "create"), Fault("unavailable", "delete", count=None)
    )
    with pytest.raises(ExhaustedError, match="injected"), storage.sink("a") as sink:
        sink.write(b"1")
    with pytest.raises(InvalidError, match="injected"):
        storage.create("a", b"1")
    for _ in range(5):
        with pytest.raises(UnavailableError, match="injected"):
            storage.delete("a")
    assert storage.list() == []
    storage.heal()
    storage.delete("a")


def test_lost_replies_come_after_the_deed() -> None:
    storage = faulty(*(Fault("lose_reply", operation) for operation in ("create", "commit", "delete")))
    with pytest.raises(UnavailableError):
        storage.create("a", b"1")
    with pytest.raises(UnavailableError), storage.sink("b") as sink:
        sink.write(b"2")
    assert (storage.read("a"), storage.read("b")) == (b"1", b"2")
    with pytest.raises(UnavailableError):
        storage.delete("a")
    assert storage.list() == ["b"]


def test_damaged_reads() -> None:
    storage = faulty(Fault("flip", "read"), Fault("cut", "read", after=1))
    storage.create("a", b"0123456789")
    assert storage.read("a") == b"01234" + b"4" + b"6789"
    assert storage.read("a") == b"01234"
    assert storage.read("a") == b"0123456789"


def test_slow_calls_take_the_sleep_they_are_given() -> None:
    slept: list[float] = []
    storage = FaultStorage(MemoryStorage(Disk()), [Fault("slow", "*", seconds=2.5)], sleep=slept.append)
    storage.create("a", b"1")
    assert slept == [2.5]
    with pytest.raises(InvalidError, match="clock"):
        FaultStorage(MemoryStorage(Disk()), [Fault("slow")])


def test_unknown_faults_are_refused() -> None:
    with pytest.raises(InvalidError, match="unavailable"):
        Fault("explode")  # type: ignore[arg-type]
    with pytest.raises(InvalidError, match="delete_all"):
        Fault("flip", "raed")  # type: ignore[arg-type]
