"""Only what may pass is repeated; attempts and time are both bounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from resilience.errors import CorruptError, ExhaustedError, FencedError, InvalidError, UnavailableError
from storage_backends import RetryPolicy, Sink
from storage_backends.disk import Disk
from storage_backends.faults import Fault, FaultStorage
from storage_backends.memory import MemoryStorage
from storage_backends.retry import RetryStorage


class Clock:
    """Time that passes only in pauses."""

    def __init__(self) -> None:
        self.now, self.pauses = 0.0, list[float]()

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds

    def policy(self, **options: Any) -> RetryPolicy:
        return RetryPolicy(
            sleep=self.sleep, clock=lambda: self.now, uniform=lambda low, high: high, **options
        )


def failing(times: int, error: Exception) -> Callable[[], str]:
    left = [error] * times

    def call() -> str:
        if left:
            raise left.pop()
        return "done"

    return call


def test_unavailable_is_repeated_with_growing_pauses() -> None:
    clock = Clock()
    assert clock.policy(attempts=9, first=0.5, longest=3).call(failing(5, UnavailableError("away"))) == "done"
    assert clock.pauses == [0.5, 1, 2, 3, 3]


def test_attempts_are_bounded_and_told() -> None:
    clock = Clock()
    with pytest.raises(UnavailableError, match=r"away .tried 3 times in 0\.6 s"):
        clock.policy(attempts=3).call(failing(99, UnavailableError("away", hint="look at the service")))
    assert len(clock.pauses) == 2


def test_time_is_bounded() -> None:
    clock = Clock()
    with pytest.raises(UnavailableError, match="tried"):
        clock.policy(attempts=1000, seconds=20).call(failing(10_000, UnavailableError("away")))
    assert 10 < clock.now <= 20, "no attempt begins later"


def test_pauses_are_drawn_below_their_bound() -> None:
    drawn: list[tuple[float, float]] = []

    def uniform(low: float, high: float) -> float:
        drawn.append((low, high))
        return 0.0

    RetryPolicy(sleep=lambda seconds: None, uniform=uniform, first=1).call(failing(3, UnavailableError("")))
    assert drawn == [(0, 1), (0, 2), (0, 4)]


@pytest.mark.parametrize(
    "error",
    [
        InvalidError("no"),
        ExhaustedError("full"),
        CorruptError("bad"),
        FencedError("newer"),
        FileNotFoundError("absent"),
        KeyError("bug"),
    ],
)
def test_permanent_errors_come_at_once(error: Exception) -> None:
    clock = Clock()
    with pytest.raises(type(error)) as caught:
        clock.policy().call(failing(1, error))
    assert caught.value is error
    assert clock.pauses == []


def test_a_policy_that_cannot_be_followed_is_refused() -> None:
    with pytest.raises(InvalidError, match="attempts=0"):
        RetryPolicy(attempts=0)


def storage(*plan: Fault) -> tuple[RetryStorage, FaultStorage, Clock]:
    clock = Clock()
    faulty = FaultStorage(MemoryStorage(Disk()), plan)
    return RetryStorage(faulty, clock.policy()), faulty, clock


def test_every_single_call_is_repeated() -> None:
    retrying, faulty, clock = storage()
    retrying.create("a", b"1")
    calls: dict[str, Callable[[], object]] = {
        "create": lambda: retrying.create("b", b"1"),
        "sink": lambda: retrying.sink("c").cancel(),
        "read": lambda: retrying.read("a"),
        "size": lambda: retrying.size("a"),
        "list": retrying.list,
        "delete": lambda: retrying.delete("b"),
        "delete_all": lambda: retrying.delete_all("d"),
    }
    for number, (operation, call) in enumerate(calls.items(), start=1):
        faulty.add(Fault("unavailable", operation, count=1))  # type: ignore[arg-type]
        call()
        assert len(clock.pauses) == number, operation


def test_a_create_whose_reply_was_lost_is_repeated_into_success() -> None:
    retrying, faulty, _ = storage(Fault("lose_reply", "create", count=3))
    assert retrying.create("log/1", b"mine") is None
    assert retrying.create("log/1", b"other") == b"mine"
    assert len(faulty.fired) == 3


def test_nothing_inside_a_sink_is_repeated() -> None:
    for operation in ("write", "commit"):
        retrying, _, clock = storage(Fault("unavailable", operation))  # type: ignore[arg-type]
        sink = retrying.sink("a")

        def use(sink: Sink = sink) -> None:
            sink.write(b"1")
            sink.commit()

        with pytest.raises(UnavailableError, match="injected"):
            use()
        assert clock.pauses == []
        with pytest.raises(InvalidError, match="sink"):
            sink.commit()
        assert retrying.list() == []


def test_the_whole_object_is_written_again_by_whoever_has_its_bytes() -> None:
    retrying, faulty, clock = storage(Fault("unavailable", "commit"), Fault("lose_reply", "commit", after=1))

    def write() -> None:
        with retrying.sink("a") as sink:
            sink.write(b"12")
            sink.write(b"34")

    clock.policy().call(write)
    assert retrying.read("a") == b"1234"
    assert [fault.action for fault, _, _ in faulty.fired] == ["unavailable", "lose_reply"]
