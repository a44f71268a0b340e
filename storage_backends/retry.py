"""Repeating what is safe to repeat.

Owns the one retry loop of the storage layer: only ``UnavailableError`` is repeated, bounded in attempts
*and* in time, with exponential backoff and jitter. Must never repeat a permanent error, nor anything inside
a sink: a second fsync or a second completion may report a success that did not happen, so the whole object
is written again by whoever has its bytes (``RetryPolicy.call`` around that function). ``create`` is safe to
repeat by its contract: identical bytes that already hold the name count as success.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import tenacity

from resilience.errors import InvalidError, UnavailableError
from storage_backends.base import Capabilities, Sink, Storage
from storage_backends.ranges import Range, read_into

T = TypeVar("T")


@dataclass(frozen=True)
class RetryPolicy:
    """How often and how long to try.

    Attributes:
        attempts: calls in all, the first included.
        seconds: no attempt begins later than this after the first one.
        first: upper bound of the first pause, in seconds; it doubles with every attempt.
        longest: upper bound of every pause. The pause itself is drawn evenly between zero and its bound.
        sleep, random: injectable, so that tests neither wait nor vary.
    """

    attempts: int = 8
    seconds: float = 60.0
    first: float = 0.2
    longest: float = 10.0
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)
    clock: Callable[[], float] = field(default=time.monotonic, repr=False)
    uniform: Callable[[float, float], float] = field(default=random.uniform, repr=False)

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.seconds < 0 or self.first < 0 or self.longest < 0:
            raise InvalidError(
                f"{self} cannot be followed",
                operation="retry",
                hint="at least 1 attempt; times are seconds, 0 or more",
            )

    def call(
        self, function: Callable[[], T], *, on_repeat: Callable[[UnavailableError, int], None] | None = None
    ) -> T:
        """``function()``, repeated while it raises ``UnavailableError``; the last one is raised as it is,
        its message saying how often it was tried.

        ``on_repeat`` is told each error that is not the last, and which attempt it was, from 1.
        """
        began = self.clock()

        def pause(state: tenacity.RetryCallState) -> float:
            return self.uniform(0, min(self.longest, self.first * 2 ** (state.attempt_number - 1)))

        def stop(state: tenacity.RetryCallState) -> bool:
            return (
                state.attempt_number >= self.attempts
                or self.clock() - began + state.upcoming_sleep > self.seconds
            )

        attempts = 0

        def attempt() -> T:
            nonlocal attempts
            attempts += 1
            return function()

        def repeat(state: tenacity.RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            if on_repeat is not None and isinstance(error, UnavailableError):
                on_repeat(error, state.attempt_number)

        loop = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(UnavailableError),
            wait=pause,
            stop=stop,
            sleep=self.sleep,
            before_sleep=repeat,
            reraise=True,
        )
        try:
            return loop(attempt)
        except UnavailableError as error:
            if attempts > 1:
                error.message += f" (tried {attempts} times in {self.clock() - began:.1f} s)"
            raise


class RetryStorage:
    """A storage whose single calls are repeated by ``policy``."""

    def __init__(self, inner: Storage, policy: RetryPolicy | None = None) -> None:
        self.inner = inner
        self._policy = policy or RetryPolicy()

    @property
    def url(self) -> str:
        return self.inner.url

    @property
    def capabilities(self) -> Capabilities:
        return self.inner.capabilities

    def __repr__(self) -> str:
        return f"RetryStorage({self.inner!r})"

    def create(self, name: str, data: bytes) -> bytes | None:
        return self._policy.call(lambda: self.inner.create(name, data))

    def sink(self, name: str, size: int | None = None) -> Sink:
        """Opening is repeated; what happens inside the sink is not."""
        return self._policy.call(lambda: self.inner.sink(name, size))

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        return self._policy.call(lambda: self.inner.read(name, start, end))

    def read_into(self, name: str, ranges: Sequence[Range]) -> list[int]:
        return self._policy.call(lambda: read_into(self.inner, name, ranges))

    def size(self, name: str) -> int:
        return self._policy.call(lambda: self.inner.size(name))

    def link(self, source: str, target: str) -> bool:
        return self._policy.call(lambda: self.inner.link(source, target))

    def list(self, prefix: str = "") -> list[str]:
        return self._policy.call(lambda: self.inner.list(prefix))

    def delete(self, name: str) -> None:
        self._policy.call(lambda: self.inner.delete(name))

    def delete_all(self, prefix: str) -> None:
        self._policy.call(lambda: self.inner.delete_all(prefix))

    def path(self, name: str) -> Path | None:
        return self.inner.path(name)

    def close(self) -> None:
        self.inner.close()
