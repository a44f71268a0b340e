"""``Checkpointer``: the checkpoint engine alone, for training that keeps its own launcher.

Owns the life of one rank's engine: who is in charge, saving, restoring, closing. What lies in storage is a run like
a supervised one. It starts one process (the writer) and no cluster.
"""

from __future__ import annotations

import atexit
import logging
import os
import socket
import sys
import time
import weakref
from collections.abc import Collection
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

from resilience.checkpoint.plan import Plan, plan
from resilience.checkpoint.trained import Trained
from resilience.engine import session as sessions
from resilience.engine.board import Board, SaveHandle
from resilience.engine.clerk import Clerk
from resilience.engine.door import door_name, wait_at_doors
from resilience.engine.follower import Follower
from resilience.engine.local_writer import LocalWriter
from resilience.engine.restoring import Follow, Lead, Place, Restored
from resilience.engine.settings import Settings
from resilience.engine.slots import Slots
from resilience.engine.state import check_fillable, objects_of, put_back, specs, split
from resilience.engine.table import Table
from resilience.errors import FencedError, InvalidError, ResilienceError, UnavailableError
from resilience.journal.format_file import ensure_format
from resilience.journal.log import CommitLog
from resilience.journal.state import candidates, fold
from storage_backends import child, open_storage, probe

_LOGGER = logging.getLogger("resilience.checkpointer")
_EXIT_S = (
    60.0  # that the end of the interpreter waits for saves on their way; the writer goes on alone after it
)


class Checkpointer:
    """Saves and restores the state of one process, or of each rank of a group (as under torchrun).

    ::

        with Checkpointer("runs/demo", nvme="/local/nvme") as c:
            done = c.restore(into=state) or 0
            for step in range(done + 1, steps + 1):
                ...
                if step % 100 == 0:
                    c.save(step, state)

    The newest start of a run is in charge: making a ``Checkpointer`` fences every older one, which gets
    ``FencedError`` and stops writing. What an older one had sealed in memory when it was killed still becomes durable,
    and is taken up by the next start on that node.

    Used from one thread at a time, and not in a forked child.

    Args:
        url: the run's root: a path, or any fsspec URL. Its last part is the run's name.
        nvme: a local directory: checkpoints go there first, and on to ``url`` behind. ``None``: to ``url`` directly.
        rank, world_size: of this process in its group. Every rank makes a ``Checkpointer``, and calls ``save`` and
            ``restore`` for the same steps in the same order. Ranks never wait for each other in ``save``.
        name: the run's name, if it is not the last part of ``url``.
        node: this machine's name; default the host's. Must stay the same, so that the packs on nvme are found again.
        session: an id that all ranks of this start share and no other start has. By default one is broadcast where
            ``torch.distributed`` is initialised, else taken from what torchrun says.
        keep_last, keep_every: checkpoints to keep: the newest ones, and every so many steps (``None`` = no more).
        replicated: names of what is the same on every rank, and everything below them, so that it is written once and
            any number of ranks can restore it; ``True``: all arrays. State of DistributedDataParallel, DTensors
            and ``Shard`` need not be named. Everything else belongs to its rank.
        threads: that copy a snapshot, and that read a checkpoint.
        deadline: seconds that anything waits for others: for rank 0 to begin, for a free slot, for the ranks to
            agree on what they restore, for saves on their way in ``close``.

    Raises:
        InvalidError: an option is wrong, or the place cannot hold a run.
        FencedError: another start began at the same time, and won.
        UnavailableError: storage is away; rank 0 has not begun within the deadline.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        nvme: str | os.PathLike[str] | None = None,
        rank: int = 0,
        world_size: int = 1,
        *,
        name: str | None = None,
        node: str | None = None,
        session: str | None = None,
        keep_last: int = 3,
        keep_every: int | None = None,
        replicated: Collection[str] | bool = (),
        threads: int = 2,
        deadline: float = 300.0,
    ) -> None:
        self._closed = True  # until there is something to close
        self._settings = Settings.of(
            url,
            nvme,
            rank,
            world_size,
            name=name,
            node=node,
            session=session,
            keep_last=keep_last,
            keep_every=keep_every,
            replicated=replicated,
            threads=threads,
            deadline=deadline,
        )
        given = self._settings
        self._pid = os.getpid()
        self._last = -1  # the newest step that was saved or restored by us
        self._restores = 0
        self._back: int | None = (
            None  # the step that the user went back to, until something is saved after it
        )
        self._shared = open_storage(given.url)
        self._near_root = None if given.nvme is None else child(given.nvme, given.name, given.node)
        self._near = None if self._near_root is None else open_storage(self._near_root)
        if self._near is not None and not self._near.capabilities.local:
            raise InvalidError(
                f"nvme={given.nvme!r} is no local directory",
                operation="Checkpointer",
                path="nvme",
                hint="give a directory on a disk of this machine, or leave nvme out",
            )
        self._writer = LocalWriter(
            run=given.name,
            node=given.node,
            rank=given.rank,
            shared=given.url,
            nvme=self._near_root,
            emit=self._heard,
        )
        try:
            started = sessions.session_id(given.session, rank=given.rank, world_size=given.world_size)
            self._office: Clerk | Follower = self._lead(started) if given.rank == 0 else self._follow(started)
            self._set_up()
        except BaseException:
            self._writer.kill()
            raise
        self._closed = False
        _OPEN.add(self)

    def _lead(self, session: str) -> Clerk:
        given = self._settings
        probe(self._shared)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        ensure_format(self._shared, run=given.name, created=now)
        records = CommitLog(self._shared, new_id=_never).refresh()
        used = sessions.find(records, session)
        if used is not None:
            raise InvalidError(
                f"session {session!r} was used before, by generation {used.generation}",
                operation="Checkpointer",
                path="session",
                hint="every start needs another one (a job's number and its attempt), the same on all its ranks; or "
                "call torch.distributed.init_process_group() first",
            )
        before = fold(records).generation
        clerk = Clerk(
            self._shared,
            self._near,
            run=given.name,
            node=given.node,
            session=session,
            world_size=given.world_size,
            keep_last=given.keep_last,
            keep_every=given.keep_every,
            tell=_LOGGER.warning,
            stop=self._stop_writing,
        )
        try:
            self.generation = clerk.fence(self._describe())
            if before:
                late = wait_at_doors(door_name(given.url), deadline=given.deadline)
                if late:
                    clerk.warn(
                        f"{len(late)} writer(s) of an older start are still at work after {given.deadline:g} s"
                    )
                clerk.adopt(before)
        except BaseException:
            clerk.abort()
            raise
        return clerk

    def _follow(self, session: str) -> Follower:
        given = self._settings
        log = CommitLog(self._shared, new_id=_never)
        self.generation = sessions.join(log, session, deadline=given.deadline)
        return Follower(
            self._shared,
            self._near,
            log,
            rank=given.rank,
            node=given.node,
            generation=self.generation,
            tell=_LOGGER.warning,
            stop=self._stop_writing,
        )

    def _set_up(self) -> None:
        given = self._settings
        there = candidates(self._office.state)
        self._there = bool(there)
        tiers = ("shared",) if self._near is None else ("nvme", "shared")
        self._board = Board(tiers, step=there[0].ref.step if there else None)
        self._trained = Trained()
        self._slots = Slots(generation=self.generation, rank=given.rank, hand_over=self._writer.arena)
        table = Table(
            self._shared,
            generation=self.generation,
            rank=given.rank,
            world_size=given.world_size,
            deadline=given.deadline,
        )
        place = Place(
            given.name,
            given.rank,
            given.world_size,
            given.node,
            self._shared,
            self._near,
            given.threads,
        )
        if isinstance(self._office, Clerk):
            table.clear(self.generation)
            clerk = self._office
            self._restorer: Lead | Follow = Lead(
                place,
                clerk,
                table,
                record=clerk.record,
                quarantine=clerk.quarantine,
                tell=_LOGGER.warning,
            )
        else:
            self._restorer = Follow(place, self._office, table)
        self._writer.start()
        self._office.begin(self._board)

    def _describe(self) -> dict[str, Any]:
        given = self._settings
        return {
            "job": "Checkpointer",
            "entry": sys.argv[0],
            "workers": given.world_size,
            "spares": 0,
            "storage": given.url.rpartition("/")[0],
            "nvme": given.nvme,
            "policy": {"keep_last": given.keep_last, "keep_every": given.keep_every},
            "launcher": socket.gethostname(),
            "arguments": {},
        }

    # Saving.

    def save(self, step: int, state: Any) -> SaveHandle:
        """Take a snapshot; returns when training may change ``state`` again: after one copy of it in memory.

        Where both slots still wait for storage it waits for one of them, at most ``deadline`` seconds, and says so.
        The first save also takes the memory, twice the size of what this rank writes (see ``prepare``).

        Args:
            step: completed steps; greater than that of every save and restore before.
            state: nested dict, list or tuple of arrays (torch, NumPy, JAX), ``Shard``, plain values, and objects with
                ``state_dict`` and ``load_state_dict``.

        Returns:
            What ``wait`` and ``done`` of say when it is durable. A save that fails there is also logged as a warning,
            with the age of the last good one; a later save does not depend on it.

        Raises:
            InvalidError: the step is not new, the state cannot be saved (names key and type), or there are
                checkpoints and ``restore`` was not called.
            ExhaustedError: too little memory for the snapshots.
            UnavailableError: no slot came free within the deadline.
            FencedError: a newer start is in charge.
        """
        begun = time.monotonic()
        self._check(step)
        layout, arrays, skeleton = self._layout(state)
        given = self._settings
        seal = self._slots.fill(
            arrays,
            skeleton,
            layout,
            run=given.name,
            step=step,
            threads=given.threads,
            deadline=given.deadline,
            trained=self._trained.since(objects_of(state)),
            copying=lambda told: self._writer.copying(self._slots.key, told),
            slow=lambda: self._office.warn(
                f"training waits at step {step}: every slot still waits for storage"
            ),
            broken=lambda: self._board.broken,
        )
        try:
            if self._back is not None and isinstance(self._office, Clerk):
                self._office.go_back(self._back)
            self._back = None
            self._board.open(step)
            self._last = step
            stall = time.monotonic() - begun
            self._office.sealed(step, stall_s=stall, size=layout.size)
        except BaseException:
            self._slots.give_up(seal["slot"])
            raise
        self._writer.sealed(self._slots.key, seal, deadline=given.deadline)
        return SaveHandle(self._board, self._office.hurry, step, self.generation, time.monotonic() - begun)

    def prepare(self, state: Any) -> None:
        """Take the memory for snapshots of ``state`` now rather than in the first save. Optional."""
        self._check_open()
        layout, _arrays, _skeleton = self._layout(state)
        self._slots.prepare(layout)

    def _layout(self, state: Any) -> tuple[Plan, dict[str, Any], Any]:
        given = self._settings
        objects = objects_of(state)
        arrays, skeleton = split(objects)
        found = specs(arrays, objects, given.replicated, rank=given.rank)
        return plan(found, rank=given.rank, world_size=given.world_size), arrays, skeleton

    def _check(self, step: int) -> None:
        self._check_open()
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise InvalidError(
                f"save({step!r})", operation="save", hint="give a number of completed steps >= 0"
            )
        if self._there and not self._restores:
            raise InvalidError(
                "this run has checkpoints, and nothing was restored",
                operation="save",
                step=step,
                hint="call restore(into=state) first, or begin a new run under another url",
            )
        if step <= self._last:
            raise InvalidError(
                f"step {step} is not after step {self._last}, which was saved or restored",
                operation="save",
                step=step,
                hint="a checkpoint is named by its step: save each once, in order; to go back, restore in a new "
                "Checkpointer",
            )
        if self._board.broken is not None:
            raise self._board.broken

    def _check_open(self) -> None:
        if self._closed or os.getpid() != self._pid:
            why = "is closed" if self._closed else "belongs to the process that forked this one"
            raise InvalidError(
                f"this Checkpointer {why}",
                operation="Checkpointer",
                hint="make one in the process that trains",
            )

    # Restoring.

    def restore(self, into: Any, step: int | None = None) -> int | None:
        """Fill ``into`` in place from the newest checkpoint that verifies: every byte of it is checked.

        One that is damaged is passed over, and quarantined, for the colder tier's and then an older one; the reasons
        are logged. All ranks take the same one. The number of ranks may differ from that of the ranks that saved, where
        what they saved is replicated or sharded.

        Args:
            into: a state as was saved. What cannot change in place (plain values, tuples, JAX arrays) is replaced in
                the dict or list that holds it.
            step: this one, in whatever tier, and no other. Newer ones are quarantined by the next save: training has
                gone another way.

        Returns:
            The completed steps of what was restored; ``None`` if the run has no checkpoint yet.

        Raises:
            InvalidError: the state does not fit (names what is missing, unexpected, of another shape), or there is
                no such step.
            CorruptError: checkpoints are recorded, and none can be used. ``into`` may be partly overwritten.
            UnavailableError: none can be read now, or the other ranks have not come within the deadline.
        """
        self._check_open()
        objects = objects_of(into)
        if set(objects) != set(into if isinstance(into, dict) else ()):
            check_fillable(into)
        found = self._restorer.restore(objects, step)
        if isinstance(self._office, Clerk):
            self._office.settle()  # what was found damaged on the way is out of ``steps()``
        self._restores += 1
        self._say_started(found)
        if found is None:
            return None
        put_back(into, found.values)
        self._back = found.ref.step if step is not None else None
        self._last = max(self._last, found.ref.step)
        return found.ref.step

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, oldest first; quarantined and retired ones are not among them."""
        state = fold(CommitLog(self._shared, new_id=_never).refresh())
        return sorted({candidate.ref.step for candidate in candidates(state)})

    def _say_started(self, found: Restored | None) -> None:
        if isinstance(self._office, Clerk) and self._restores == 1:
            given = self._settings
            ranks = [{"rank": 0, "node": given.node}] if given.world_size == 1 else []
            restore = None
            if found is not None:
                restore = {"step": found.ref.step, "generation": found.ref.generation, "tier": found.tier}
            data = {"world_size": given.world_size, "ranks": ranks, "restore": restore}
            self._office.record("generation.started", {**data, "attempt_of_incident": None})

    # The end.

    def close(self, timeout: float | None = None) -> None:
        """Wait until what was saved is where it can get, and end: no process, thread or memory is left.

        May run twice. What is not durable after ``timeout`` seconds (default: ``deadline``) the writer goes on with
        alone, and the next start takes it up.

        Raises:
            UnavailableError: that is so.
        """
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        _OPEN.discard(self)
        given = self._settings
        limit = given.deadline if timeout is None else timeout
        self._office.hurry()
        settled = self._board.settle(limit)
        fenced = isinstance(self._board.broken, FencedError)
        if fenced:
            self._office.abort()
            self._writer.kill()
            gone = True
        else:
            self._office.close(steps=max(self._last, 0), reason="the Checkpointer was closed")
            gone = self._writer.leave()
        self._slots.close()
        self._shared.close()
        if not settled or not gone:
            steps = ", ".join(map(str, self._board.pending()))
            raise UnavailableError(
                f"not durable everywhere after {limit:g} s: {f'steps {steps}' if steps else 'the writer is at work'}",
                operation="close",
                hint="the writer process goes on alone; the next start of this run takes up what it finishes",
            )

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _heard(self, message: dict[str, Any]) -> None:
        self._office.hear(message)

    def _stop_writing(self) -> None:
        self._writer.kill()


def _never() -> str:
    raise AssertionError("this log is only read")


_OPEN: weakref.WeakSet[Checkpointer] = weakref.WeakSet()


@atexit.register
def _close_forgotten() -> None:
    """At the end of the interpreter: what was saved is waited for, but not for ever."""
    for checkpointer in list(_OPEN):
        try:
            checkpointer.close(_EXIT_S)
        except ResilienceError as error:
            _LOGGER.warning("%s", error)
