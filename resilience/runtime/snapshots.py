"""A rank's snapshots: its arena, when the copy is made, and what its agent is told of it.

Owns the choice between copying before training goes on and copying beside it (``checkpoint.overlap``), and that a
copy beside it is complete before an optimizer changes anything. Must never let a slot be sealed that holds two steps.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

from resilience.checkpoint.arena import Arena
from resilience.checkpoint.overlap import Mode, Overlap
from resilience.checkpoint.part import draft
from resilience.checkpoint.plan import Plan, plan
from resilience.checkpoint.snapshot import Copying, begin, specs_of
from resilience.checkpoint.trained import Trained
from resilience.checkpoint.tree import flatten
from resilience.errors import ExhaustedError, InvalidError
from resilience.runtime.page import Page

SLOTS = 2
_SLOT_WAIT_S = 10.0
_LAST_SLOT_WAIT_S = 300.0


class Rank(Protocol):
    """What snapshots need of their rank's host."""

    rank: int
    world_size: int
    name: str
    generation: int

    def tell(self, message: dict[str, Any], fds: tuple[int, ...] = ()) -> None: ...

    def reach(self, point: str, step: int) -> None: ...

    def flush(self) -> None: ...

    def section(self, name: str) -> AbstractContextManager[None]: ...


@dataclass
class _Copying:
    """A snapshot on its way: the copy, what the agent is told of it, and seconds that training stood still so far."""

    copying: Copying
    seal: dict[str, Any]
    part: Callable[[], dict[str, Any]]
    size: int
    stalled: float


class Snapshots:
    """One rank's. Called from the thread that trains.

    Attributes:
        saved: the newest step that was saved, or restored; -1: none.
    """

    def __init__(self, host: Rank, page: Page, mode: Mode) -> None:
        self._host, self._page = host, page
        self.saved = -1
        self._arena: Arena | None = None
        self._arena_id = 0
        self._behind = False  # the last save found no slot
        self._trained = Trained(self._before_step)
        self._overlap = Overlap(mode)
        self._copying: _Copying | None = None
        self._stalled = 0.0  # that the last snapshot made training wait
        self._step_began = 0.0
        self._hidden = False  # whether this step began with a copy still going on

    def step_begins(self) -> None:
        self._step_began = time.monotonic()
        self._hidden = self._copying is not None

    def step_ends(self) -> None:
        self.join()  # in a step without a step of an optimizer
        took = time.monotonic() - self._step_began
        known = self._overlap
        self._overlap = known.overlapped(self._stalled, took) if self._hidden else known.step(took)

    def _before_step(self) -> None:
        self.join()

    def close(self) -> None:
        if self._arena is not None:
            self._arena.close()
            self._arena = None

    def save(
        self, done: int, capture: Callable[[], dict[str, Any]], objects: dict[str, Any], *, last: bool
    ) -> None:
        """Take a snapshot; training may go on when this returns. ``last``: nothing is trained after it."""
        if done == self.saved:
            return  # a checkpoint is named by its step: this one exists, and another of its name cannot
        host = self._host
        began = time.monotonic()
        with host.section("snapshot"):
            host.flush()  # what was logged up to a checkpoint is as safe as the checkpoint
            host.reach("snapshot.begin", done)
            arrays, skeleton = flatten(capture(), prefix="")
            trained = self._trained.since(objects)
            # With nothing to train after it there is nothing to hide the copy behind.
            overlapped = self._overlap.mode is Mode.OVERLAPPED and not last
            later = self._trained.only(arrays, objects) if overlapped else frozenset()
            layout = plan(
                specs_of(arrays, objects, rank=host.rank), rank=host.rank, world_size=host.world_size
            )
            arena = self._fitting_arena(layout)
            slot = self._acquire(arena, done, last)
            if slot is None:
                return

            @cache
            def part() -> dict[str, Any]:
                """Made while the copy goes on, if that takes a while."""
                return draft(layout, skeleton, run=host.name, step=done, generation=host.generation).to_json()

            seal = {"arena": self._arena_id, "slot": slot, "step": done, "trained": trained}

            def announce(attempt: int) -> None:
                """The writer may begin while we copy. Only a head start: what counts is the seal."""
                host.tell({**seal, "t": "copying", "attempt": attempt, "part": part()})

            copying = begin(
                arena,
                slot,
                arrays,
                layout,
                step=done,
                generation=host.generation,
                later=later,
                announce=announce,
            )
            self.saved = done
            self._copying = _Copying(copying, seal, part, layout.size, time.monotonic() - began)
            if not later:
                self._overlap = self._overlap.blocked(self.join())

    def join(self) -> float:
        """Complete the snapshot that is being copied, if one is; seconds that training stood still for it."""
        at, self._copying = self._copying, None
        if at is None:
            return 0.0
        host = self._host
        began = time.monotonic()
        step = at.seal["step"]
        try:
            snapshot = at.copying.join(lambda: host.reach("snapshot.copied", step))
        except InvalidError as error:
            self._overlap = Overlap()  # whoever changes parameters elsewhere does so again
            print(f"resilience: {error}; snapshots block from now on", file=sys.stderr, flush=True)
            host.tell({"t": "skipped", "step": step, "reason": str(error)})
            return at.stalled + time.monotonic() - began
        at.stalled += time.monotonic() - began
        self._page.add_stall(at.stalled)
        told = {"t": "sealed", "stall_s": at.stalled, "size": snapshot.size, "part": at.part()}
        host.tell({**at.seal, **told})
        host.reach("snapshot.sealed", step)
        self._stalled = at.stalled
        return at.stalled

    def _fitting_arena(self, layout: Plan) -> Arena:
        if self._arena is None or self._arena.slot_bytes < layout.size:
            if self._arena is not None:
                self._arena.close()  # the agent and the writer hold it as long as its slots are needed
            self._arena = self._new_arena(layout.size)
            self._arena_id += 1
            self._host.tell({"t": "arena", "arena": self._arena_id}, (self._arena.fd,))
        return self._arena

    def _new_arena(self, size: int) -> Arena:
        """Two slots; one where the memory is not there for two: slower, but a run, and nobody is killed."""
        try:
            return Arena.create(SLOTS, size)
        except ExhaustedError as error:
            arena = Arena.create(1, size)
            host = self._host
            host.tell(
                {
                    "t": "warning",
                    "message": f"rank {host.rank} has memory for one snapshot only: each save waits until the one "
                    f"before it is durable ({error})",
                }
            )
            return arena

    def _acquire(self, arena: Arena, done: int, last: bool) -> int | None:
        """A slot to write to. Waits for the writer, but not for one whose saves fail, nor a second time for one
        that did not come: training goes on. The last save, with nothing to train after it, is waited for: what
        fails frees its slot."""
        deadline = time.monotonic() + (_LAST_SLOT_WAIT_S if last else 0.0 if self._behind else _SLOT_WAIT_S)
        while True:
            slot = arena.acquire()
            if slot is not None:
                self._behind = False
                return slot
            if (self._page.saves_failing and not last) or time.monotonic() > deadline:
                self._behind = True
                self._host.tell(
                    {"t": "skipped", "step": done, "reason": "every arena slot still waits for storage"}
                )
                return None
            self._page.beat(done)
            time.sleep(0.001)  # slot states are shared memory: there is nothing to wait on but their words
