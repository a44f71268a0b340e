"""Storage that fails on purpose.

Owns planned faults over any backend: which call, on which names, how often, what happens. Used by tests and
by chaos runs; it is a wrapper like any other and changes nothing when its plan is empty. Must never act by
chance or by the clock: a plan fires by count, so that a run can be repeated.
"""

from __future__ import annotations

import fnmatch
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from resilience.errors import ExhaustedError, InvalidError, UnavailableError
from storage_backends.base import Capabilities, Sink, Storage

Action = Literal["unavailable", "lose_reply", "exhausted", "read_only", "flip", "cut", "slow"]
Operation = Literal[
    "create", "sink", "write", "commit", "read", "size", "list", "link", "delete", "delete_all"
]
T = TypeVar("T")


@dataclass(frozen=True)
class Fault:
    """One planned fault.

    Attributes:
        action: ``unavailable`` the call fails and nothing happens; ``lose_reply`` it is carried out, then
            ``UnavailableError``; ``exhausted`` no space; ``read_only`` not permitted; ``flip`` (read) one bit
            of the answer is wrong; ``cut`` (read) the answer lacks its second half; ``slow`` it takes
            ``seconds`` longer.
        operation: the call it concerns; ``write`` and ``commit`` are those of a sink; ``*`` is any.
        name: shell pattern for the object's name (``log/*``; ``*`` matches ``/`` too).
        after: matching calls that are let through first.
        count: how many calls it hits then; ``None`` is all.
        seconds: for ``slow``.
    """

    action: Action
    operation: Operation | Literal["*"] = "*"
    name: str = "*"
    after: int = 0
    count: int | None = 1
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.action not in get_args(Action) or self.operation not in ("*", *get_args(Operation)):
            raise InvalidError(
                f"{self} is not a fault",
                operation="faults",
                hint=f"actions: {', '.join(get_args(Action))}; "
                f"operations: *, {', '.join(get_args(Operation))}",
            )


class FaultStorage:
    """``inner`` with the faults of a plan. ``fired`` tells, in order, what was done to whom.

    The plan may be changed while in use: ``add``, and ``heal`` to drop what is left of it.
    """

    def __init__(
        self, inner: Storage, plan: Iterable[Fault] = (), *, sleep: Callable[[float], None] | None = None
    ) -> None:
        self.inner = inner
        self.fired: list[tuple[Fault, str, str]] = []
        self._sleep = sleep
        self._lock = threading.Lock()
        self._plan: list[tuple[Fault, list[int]]] = []
        for fault in plan:
            self.add(fault)

    def add(self, fault: Fault) -> None:
        if fault.action == "slow" and self._sleep is None:
            raise InvalidError(
                "a slow fault needs a clock", operation="faults", hint="pass sleep=time.sleep to FaultStorage"
            )
        with self._lock:
            self._plan.append((fault, [0]))

    def heal(self) -> None:
        with self._lock:
            self._plan.clear()

    @property
    def url(self) -> str:
        return self.inner.url

    @property
    def capabilities(self) -> Capabilities:
        return self.inner.capabilities

    def __repr__(self) -> str:
        return f"FaultStorage({self.inner!r}, {[fault for fault, _ in self._plan]})"

    def create(self, name: str, data: bytes) -> bytes | None:
        return self.run("create", name, lambda: self.inner.create(name, data))

    def sink(self, name: str, size: int | None = None) -> Sink:
        return FaultSink(self, name, self.run("sink", name, lambda: self.inner.sink(name, size)))

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        return self.run("read", name, lambda: self.inner.read(name, start, end))

    def size(self, name: str) -> int:
        return self.run("size", name, lambda: self.inner.size(name))

    def link(self, source: str, target: str) -> bool:
        return self.run("link", target, lambda: self.inner.link(source, target))

    def list(self, prefix: str = "") -> list[str]:
        return self.run("list", prefix, lambda: self.inner.list(prefix))

    def delete(self, name: str) -> None:
        self.run("delete", name, lambda: self.inner.delete(name))

    def delete_all(self, prefix: str) -> None:
        self.run("delete_all", prefix, lambda: self.inner.delete_all(prefix))

    def path(self, name: str) -> Path | None:
        return self.inner.path(name)

    def close(self) -> None:
        self.inner.close()

    def run(self, operation: str, name: str, call: Callable[[], T]) -> T:
        """Carry out one call, with whatever the plan has for it."""
        fault = self._next(operation, name)
        if fault is None:
            return call()
        text = f"injected: {fault.action} at {operation} of {name}"
        context: dict[str, Any] = {
            "operation": operation,
            "path": name,
            "hint": "this fault was injected by the test or the chaos plan that runs",
        }
        if fault.action == "exhausted":
            raise ExhaustedError(text, **context)
        if fault.action == "read_only":
            raise InvalidError(text, **context)
        if fault.action == "unavailable":
            raise UnavailableError(text, **context)
        if fault.action == "slow" and self._sleep is not None:
            self._sleep(fault.seconds)
        answer = call()
        if fault.action == "lose_reply":
            raise UnavailableError(text, **context)
        return _damage(fault.action, answer)

    def _next(self, operation: str, name: str) -> Fault | None:
        with self._lock:
            chosen: Fault | None = None
            for fault, seen in self._plan:
                if fault.operation not in ("*", operation) or not fnmatch.fnmatchcase(name, fault.name):
                    continue
                seen[0] += 1  # every matching call counts for every fault, so that plans do not interfere
                due = seen[0] > fault.after and (fault.count is None or seen[0] <= fault.after + fault.count)
                if due and chosen is None:
                    chosen = fault
                    self.fired.append((fault, operation, name))
            return chosen


class FaultSink:
    """A sink whose writes and commit go through the plan. After an error it is dead, as any sink."""

    def __init__(self, storage: FaultStorage, name: str, inner: Sink) -> None:
        self._storage, self._name, self._inner = storage, name, inner
        self._used = False

    def write(self, data: bytes | memoryview) -> None:
        self._do("write", lambda: self._inner.write(data))

    def commit(self) -> None:
        self._do("commit", self._inner.commit)
        self._used = True

    def cancel(self) -> None:
        self._inner.cancel()

    def __enter__(self) -> FaultSink:
        return self

    def __exit__(self, *exc: object) -> None:
        if exc and exc[0] is not None:
            self.cancel()
        elif not self._used:
            self.commit()

    def _do(self, operation: str, call: Callable[[], None]) -> None:
        try:
            self._storage.run(operation, self._name, call)
        except BaseException:
            self._used = True
            self._inner.cancel()
            raise


def _damage(action: str, answer: T) -> T:
    if not isinstance(answer, bytes) or not answer:
        return answer
    if action == "flip":
        middle = len(answer) // 2
        return answer[:middle] + bytes([answer[middle] ^ 1]) + answer[middle + 1 :]  # type: ignore[return-value]
    if action == "cut":
        return answer[: len(answer) // 2]  # type: ignore[return-value]
    return answer
