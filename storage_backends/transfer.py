"""How bytes travel to and from an object store: in pieces, several at once, each with a deadline of its own.

Owns the size of pieces, how many are under way, when one of them counts as stalled, and its repetition. What
was repeated is told (``Retried``), so a slow or broken network is an event and never a silence. Must never
repeat a permanent error, nor wait for anything without a bound.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TypeVar

from resilience.errors import InvalidError, UnavailableError
from storage_backends.drivers import translate_driver
from storage_backends.retry import RetryPolicy

T = TypeVar("T")

SMALLEST_PART = 5 << 20  # S3, Azure and Google refuse smaller parts, but for the last one
LARGEST_PART = 5 << 30  # of S3
MOST_PARTS = 10_000  # of S3
_STEADY = 2000  # parts of one size at first; from there on the size doubles every
_DOUBLE = 1000
_EVEN = 8000  # parts of an object whose size is known; the rest is for mistakes


@dataclass(frozen=True)
class TransferPolicy:
    """How pieces travel.

    Attributes:
        part: bytes of a piece, read or written; at least 5 MiB. Pieces of an upload grow when there are very
            many: with the default 2,000 of 16 MiB (31 GiB), then twice the size every 1,000, so that 8 TiB
            fit into the 10,000 pieces that S3 takes.
        parallel: pieces under way at once, of one storage.
        memory: bytes of pieces that one upload holds on their way, or one piece where that is larger; another one
            is being filled meanwhile.
        stall_s: seconds in which some byte must move, or an answer come; after that the piece is abandoned.
        slowest: bytes a second below which a piece is abandoned although it moves. Its deadline is
            ``stall_s + size / slowest``: 94 s for 16 MiB.
        steady: pieces of an upload before they begin to grow.
        retry: of a piece. The default tries four times.
    """

    part: int = 16 << 20
    parallel: int = 4
    memory: int = 256 << 20
    stall_s: float = 30.0
    slowest: float = 256 << 10
    steady: int = _STEADY
    retry: RetryPolicy = field(default=RetryPolicy(attempts=4, seconds=600.0, longest=5.0))

    def __post_init__(self) -> None:
        if (
            not SMALLEST_PART <= self.part <= LARGEST_PART
            or self.parallel < 1
            or min(self.stall_s, self.slowest) <= 0
        ):
            raise InvalidError(
                f"{self} cannot be followed",
                operation="transfer",
                hint="part is 5 MiB to 5 GiB, parallel at least 1, stall_s and slowest more than 0",
            )

    def size(self, number: int) -> int:
        """Bytes of an upload's piece ``number``, counted from 0; ``InvalidError`` past the last one."""
        if number >= MOST_PARTS:
            raise InvalidError(
                f"an object of more than {MOST_PARTS:,} parts cannot be stored",
                operation="write",
                hint="give TransferPolicy a larger part, or save with more ranks",
            )
        return min(self.part << max(0, (number - self.steady) // _DOUBLE + 1), LARGEST_PART)

    def for_size(self, expected: int | None) -> TransferPolicy:
        """The policy for an object of ``expected`` bytes: parts of one size. ``None``: not known, as it is."""
        if expected is None:
            return self
        mebibytes = -(-expected // (_EVEN << 20))
        return replace(self, part=min(max(self.part, mebibytes << 20), LARGEST_PART), steady=_EVEN)

    def under_way(self, size: int) -> int:
        """How many pieces of ``size`` bytes one upload may have on their way."""
        return max(1, min(self.parallel, self.memory // max(size, 1)))

    def deadline(self, size: int) -> float:
        """Seconds after which a piece of ``size`` bytes is abandoned, whatever it does."""
        return self.stall_s + size / self.slowest

    def split(self, start: int, size: int) -> Iterator[tuple[int, int]]:
        """The ranges ``start:end`` in which ``size`` bytes are read."""
        for at in range(start, start + size, self.part):
            yield at, min(at + self.part, start + size)


@dataclass(frozen=True)
class Retried:
    """A piece that had to be sent or asked for again.

    Attributes:
        operation: ``upload part 3``, ``read 0:16777216``.
        path: URL of the object.
        size: bytes of the piece.
        seconds: that the failed attempt took.
        attempt: which one failed, from 1.
        stalled: it was abandoned for want of progress, rather than refused or cut off.
        error: what was seen.
    """

    operation: str
    path: str
    size: int
    seconds: float
    attempt: int
    stalled: bool
    error: str


OnRetry = Callable[[Retried], None]


class Abandoned(Exception):
    """Nobody wants this piece any more: its upload was cancelled, or another piece of its read failed."""


class Transfers:
    """The lanes of one storage. Thread-safe."""

    def __init__(self, policy: TransferPolicy | None = None, on_retry: OnRetry | None = None) -> None:
        self.policy = policy or TransferPolicy()
        self._on_retry = on_retry
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None

    def run(
        self,
        operation: str,
        path: str,
        size: int,
        attempt: Callable[[], T],
        cancelled: threading.Event | None = None,
    ) -> T:
        """``attempt()``, repeated by the policy, its errors in our words. ``attempt`` minds the deadlines.

        Raises:
            Abandoned: ``cancelled`` was set, before an attempt or during one that failed.
        """
        began = 0.0

        def once() -> T:
            nonlocal began
            began = time.monotonic()
            if cancelled is not None and cancelled.is_set():
                raise Abandoned
            try:
                return attempt()
            except Exception as error:
                if cancelled is not None and cancelled.is_set():
                    raise Abandoned from error
                translated = translate_driver(error, operation=operation, path=path)
                if translated is error:
                    raise
                raise translated from error

        def tell(error: UnavailableError, number: int) -> None:
            if self._on_retry is not None:
                seconds = time.monotonic() - began
                self._on_retry(
                    Retried(operation, path, size, seconds, number, timed_out(error), error.message)
                )

        return self.policy.retry.call(once, on_repeat=tell)

    def submit(
        self,
        operation: str,
        path: str,
        size: int,
        attempt: Callable[[], T],
        cancelled: threading.Event | None = None,
    ) -> Future[T]:
        """``run`` on a lane."""
        return self.lane(lambda: self.run(operation, path, size, attempt, cancelled))

    def lane(self, call: Callable[[], T]) -> Future[T]:
        """``call`` on one of ``policy.parallel`` threads."""
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self.policy.parallel, thread_name_prefix="transfer")
            return self._pool.submit(call)

    def close(self) -> None:
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)


def timed_out(error: BaseException) -> bool:
    """Whether an error comes from a deadline that passed, by the classes in its chain."""
    seen: set[int] = set()
    links: list[BaseException | None] = [error]
    while links:
        link = links.pop()
        if link is None or id(link) in seen:
            continue
        seen.add(id(link))
        if isinstance(link, TimeoutError) or any("Timeout" in c.__name__ for c in type(link).__mro__):
            return True
        links += [link.__cause__, link.__context__]
        links += [argument for argument in link.args if isinstance(argument, BaseException)]
    return False
