"""The board: what became of each save of this process, and whoever waits for it.

Owns the outcome of every save by tier. Thread-safe. Must never say "durable" before the commit log does, and never
let anybody wait for what cannot come any more.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from resilience import errors
from resilience.errors import InvalidError, ResilienceError, UnavailableError

_CLASSES: dict[str, type[ResilienceError]] = {
    name: getattr(errors, name) for name in ("InvalidError", "CorruptError", "ExhaustedError")
}


@dataclass
class _Entry:
    done: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)  # tier -> why


class Board:
    """The saves of one ``Checkpointer``.

    Args:
        tiers: nearest first.
        step: of the last good checkpoint that was there before, if any.
    """

    def __init__(
        self, tiers: tuple[str, ...], *, step: int | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.tiers = tiers
        self._clock = clock
        self._changed = threading.Condition()
        self._entries: dict[int, _Entry] = {}
        self._broken: ResilienceError | None = None
        self._good = step
        self._good_at = clock()

    @property
    def broken(self) -> ResilienceError | None:
        """Why nothing can be saved any more: fenced, or a bug of ours."""
        return self._broken

    def open(self, step: int) -> None:
        with self._changed:
            self._entries[step] = _Entry()

    def done(self, step: int, tier: str) -> None:
        """The log records ``step`` in ``tier``. An older save that it does not record there by now never will be:
        records are written in order of steps."""
        with self._changed:
            entry = self._entries.get(step)
            if entry is None:
                return
            entry.done.add(tier)
            if self._good is None or step >= self._good:
                self._good, self._good_at = step, self._clock()
            for older, other in self._entries.items():
                if older < step and tier not in other.done:
                    why = f"not every rank's part became durable; step {step} was committed instead"
                    other.failed.setdefault(tier, why)
            self._changed.notify_all()

    def fail(self, step: int, tier: str, error: str) -> bool:
        """``step`` will never be complete in ``tier`` (any other than a known tier: in none). Whether that is news."""
        with self._changed:
            entry = self._entries.get(step)
            if entry is None:
                return False
            news = False
            for name in (tier,) if tier in self.tiers else self.tiers:
                if name not in entry.done and name not in entry.failed:
                    entry.failed[name] = error
                    news = True
            self._changed.notify_all()
            return news

    def fail_all(self, error: ResilienceError) -> None:
        """Nothing is saved any more, and every wait for what is not done ends with ``error``."""
        with self._changed:
            self._broken = self._broken or error
            self._changed.notify_all()

    def last_good(self) -> tuple[int | None, float]:
        """Step of the newest committed checkpoint that we know of, and its age in seconds."""
        with self._changed:
            return self._good, self._clock() - self._good_at

    def pending(self) -> list[int]:
        """Steps that may still get somewhere, oldest first."""
        with self._changed:
            return sorted(step for step, entry in self._entries.items() if self._open_tiers(entry))

    def committed(self, step: int, tier: str) -> bool:
        with self._changed:
            entry = self._entries.get(step)
            return entry is not None and tier in entry.done

    def wait(self, step: int, tier: str | None, timeout: float | None) -> str:
        """The tier in which ``step`` is durable: ``tier``, or the nearest one that it gets to.

        Raises what made it impossible, ``TimeoutError`` after ``timeout`` seconds.
        """
        if tier is not None and tier not in self.tiers:
            raise InvalidError(
                f"there is no tier {tier!r} here",
                operation="wait",
                path="tier",
                step=step,
                hint=f"tiers of this Checkpointer: {', '.join(self.tiers)}",
            )
        wanted = self.tiers if tier is None else (tier,)
        with self._changed:
            entry = self._entries[step]
            self._changed.wait_for(
                lambda: (
                    any(name in entry.done for name in wanted)
                    or all(name in entry.failed for name in wanted)
                    or self._broken is not None
                ),
                timeout,
            )
            for name in wanted:
                if name in entry.done:
                    return name
            if self._broken is not None:
                raise self._broken
            if all(name in entry.failed for name in wanted):
                raise _failure(step, {name: entry.failed[name] for name in wanted})
        raise TimeoutError(f"step {step} is not durable in {' or '.join(wanted)} after {timeout} s")

    def settle(self, timeout: float) -> bool:
        """Wait until every save is where it can get. Whether that is so within ``timeout`` seconds."""
        with self._changed:
            return self._changed.wait_for(
                lambda: (
                    self._broken is not None
                    or not any(self._open_tiers(entry) for entry in self._entries.values())
                ),
                timeout,
            )

    def _open_tiers(self, entry: _Entry) -> list[str]:
        return [name for name in self.tiers if name not in entry.done and name not in entry.failed]


class SaveHandle:
    """A save on its way.

    Attributes:
        step: completed steps, as given to ``save``.
        generation: the start of the run that saved it.
        stall_s: seconds that training waited for it.
    """

    def __init__(
        self, board: Board, hurry: Callable[[], None], step: int, generation: int, stall_s: float
    ) -> None:
        self._board = board
        self._hurry = hurry
        self.step = step
        self.generation = generation
        self.stall_s = stall_s

    def wait(self, tier: str | None = None, *, timeout: float | None = None) -> str:
        """Return when the checkpoint is durable and committed: all ranks' bytes, and the record in the log.

        Args:
            tier: ``"nvme"`` or ``"shared"``; ``None``: the nearest one that it gets to.
            timeout: seconds; ``None`` waits until it is durable, or certain not to become so.

        Returns:
            The tier.

        Raises:
            TimeoutError: not yet.
            ExhaustedError, UnavailableError, InvalidError: this save failed (a later one may succeed): a rank's
                disk is full, storage is away, or not every rank saved this step.
            FencedError: a newer start of this run is in charge.
        """
        self._hurry()
        return self._board.wait(self.step, tier, timeout)

    def done(self, tier: str) -> bool:
        """Whether it is durable and committed in ``tier``, without waiting."""
        return self._board.committed(self.step, tier)

    def __repr__(self) -> str:
        tiers = [tier for tier in self._board.tiers if self.done(tier)]
        return f"<save of step {self.step}: {'durable in ' + ', '.join(tiers) if tiers else 'on its way'}>"


def _failure(step: int, failed: dict[str, str]) -> ResilienceError:
    """The error of a save, of the class that the one who met it named."""
    texts = list(failed.values())
    kind, _, text = texts[-1].partition(": ")
    cls = _CLASSES.get(kind, UnavailableError)
    reasons = "; ".join(f"{tier}: {why.splitlines()[0]}" for tier, why in failed.items())
    hint = text.partition("\n  hint: ")[2] or "train on: a later save does not depend on this one"
    return cls(f"step {step} was not saved: {reasons}", operation="save", step=step, hint=hint)
