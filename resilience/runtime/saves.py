"""A node's side of saving: the arenas it holds for its ranks, the sealed slots, and the writer that persists them.

Keeps the promise that a sealed snapshot outlives its rank and the writer: an arena is held until none of its
slots waits, and a writer that dies is started again with all that still does. Lives in the node's thread.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from typing import Any

from resilience.runtime.wire import Channel, Closed

ArenaKey = tuple[int, int, int]  # generation, rank, the rank's count of arenas
_MAX_DEATHS = 3


class Saves:
    """Arenas and writer of one node.

    Args:
        config: the node's (``nvme``, ``shared``).
        spawn: starts a process of ours by module and kind; returns it and the channel to it.
        emit: called with what the writer reports.
        failing: called with whether the newest save failed.
    """

    def __init__(
        self,
        config: dict[str, Any],
        spawn: Callable[[str, str], tuple[subprocess.Popen[bytes], Channel]],
        emit: Callable[[dict[str, Any]], None],
        failing: Callable[[bool], None],
    ) -> None:
        self._config = config
        self._spawn = spawn
        self._emit = emit
        self._set_failing = failing
        self.failing = False
        self._writer: tuple[subprocess.Popen[bytes], Channel] | None = None
        self._deaths = 0  # of writers since one last got anything done
        self._arenas: dict[ArenaKey, int] = {}  # descriptors
        self._orphans: set[ArenaKey] = set()  # their rank is gone, or has a larger one
        # Sealed slots the writer still has to do, by arena, slot and step: a slot may be sealed anew before the
        # writer's word that it was free has reached us.
        self._waiting: dict[tuple[ArenaKey, int, int], dict[str, Any]] = {}
        # Packs that are durable in the nvme tier, and not in shared storage yet: generation, rank, step.
        self._draining: dict[tuple[int, int, int], dict[str, Any]] = {}
        self._failpoints: list[dict[str, Any]] = []

    def start(self) -> None:
        """Start a writer with everything that waits for one."""
        self._writer = self._spawn("resilience.runtime.writer", "writer")
        self.tell(
            {
                "t": "open",
                "nvme": self._config["nvme"],
                "shared": self._config["shared"],
                "drain_rate": self._config.get("drain_rate"),
            }
        )
        self.tell({"t": "arm", "failpoints": self._failpoints})
        for key, fd in self._arenas.items():
            self.tell({"t": "arena", "key": list(key)}, [fd])
        for order in (*self._waiting.values(), *self._draining.values()):
            self.tell(order)

    def pids(self) -> list[int]:
        return [self._writer[0].pid] if self._writer is not None else []

    def tell(self, message: dict[str, Any], fds: list[int] | None = None) -> None:
        """Send to the writer. One that is gone is seen by ``hear``, and its successor is told all it needs."""
        if self._writer is not None:
            self._writer[1].post(message, fds or ())

    def arm(self, failpoints: list[dict[str, Any]]) -> None:
        self._failpoints = failpoints
        self.tell({"t": "arm", "failpoints": failpoints})

    def arena(self, key: ArenaKey, fd: int) -> None:
        """A rank made an arena: hold it, and hand it on. It made it because an older one had become too small."""
        self._arenas[key] = fd
        self.tell({"t": "arena", "key": list(key)}, [fd])
        self._orphans |= {old for old in self._arenas if old[:2] == key[:2] and old[2] < key[2]}
        self._forget()

    def copying(self, key: ArenaKey, told: dict[str, Any]) -> None:
        """A rank has begun to fill a slot: the writer may follow. A word that is lost with a writer costs only the
        head start, so nothing is kept of it."""
        order: dict[str, Any] = {
            name: told[name] for name in ("slot", "attempt", "step", "part", "trained") if name in told
        }
        self.tell({"t": "follow", "key": list(key), "generation": key[0], "rank": key[1], **order})

    def sealed(self, key: ArenaKey, seal: dict[str, Any]) -> None:
        """A rank sealed a slot: have it persisted."""
        order = {
            "t": "persist",
            "key": list(key),
            "generation": key[0],
            "rank": key[1],
            "step": seal["step"],
            "slot": seal["slot"],
            "part": seal["part"],
            **({"trained": seal["trained"]} if seal.get("trained") else {}),
        }
        self._waiting[key, seal["slot"], seal["step"]] = order
        self.tell(order)

    def orphan(self, generation: int, rank: int) -> None:
        """A rank is gone: its arenas are, too, as soon as none of their slots waits."""
        self._orphans |= {key for key in self._arenas if key[0] <= generation and key[1] == rank}
        self._forget()

    def _forget(self) -> None:
        waiting = {key for key, _slot, _step in self._waiting}
        for key in self._orphans - waiting:
            self._orphans.discard(key)
            os.close(self._arenas.pop(key))
            self.tell({"t": "forget", "key": list(key)})

    def hear(self) -> bool:
        """The writer said something. False: it is gone; its channel is to be closed and ``revive`` called."""
        assert self._writer is not None
        try:
            messages = self._writer[1].take()
        except Closed:
            return False
        for message, _fds in messages:
            self._said(message)
        return True

    def _said(self, message: dict[str, Any]) -> None:
        kind = message["t"]
        if kind == "slot_free":
            self._deaths = 0
            self._waiting.pop((tuple(message["key"]), message["slot"], message["step"]), None)
            self._fail(not message["saved"])
            self._forget()
            return
        if kind in ("persisted", "save_failed"):
            self._note_drain(message)
        self._emit({**message, "source": "writer"} if kind == "inject" else message)

    def _note_drain(self, message: dict[str, Any]) -> None:
        key = (message["generation"], message["rank"], message["step"])
        if message["tier"] == "shared":
            self._draining.pop(key, None)
        elif message["t"] == "persisted":
            order = {name: message[name] for name in ("generation", "rank", "step")}
            self._draining[key] = {"t": "drain", **order}

    def _fail(self, failing: bool) -> None:
        self.failing = failing
        self._set_failing(failing)

    def revive(self) -> None:
        """Start another writer; what several of them died of is given up, so that this ends."""
        assert self._writer is not None
        self._writer[0].wait()
        self._writer = None
        self._deaths += 1
        self._emit({"t": "warning", "message": "the writer died; another goes on with the sealed slots"})
        given_up: list[dict[str, Any]] = []
        if self._deaths >= _MAX_DEATHS:
            given_up = self._give_up()
        self.start()
        for order in given_up:
            self.tell({**order, "t": "release"})  # its rank may use the slot again
        self._forget()

    def _give_up(self) -> list[dict[str, Any]]:
        error = f"the writer died {self._deaths} times over it (see its log)"
        given_up = list(self._waiting.values())
        for tier, orders in (("memory", given_up), ("shared", list(self._draining.values()))):
            for order in orders:
                failed = {key: order[key] for key in ("rank", "generation", "step")}
                self._emit({**failed, "t": "save_failed", "tier": tier, "error": error})
        self._waiting.clear()
        self._draining.clear()
        self._deaths = 0
        if given_up:
            self._fail(True)
        return given_up

    @property
    def unsent(self) -> bool:
        """Whether the writer has not been sent all that it was told."""
        return self._writer is not None and self._writer[1].pending

    def leave(self) -> subprocess.Popen[bytes] | None:
        """Let go of the writer, which does what it was told and ends, if it is one that does; and of all memory."""
        writer = self._writer
        self._writer = None
        if writer is not None:
            writer[1].close()
        self.close()
        return writer[0] if writer is not None else None

    def close(self) -> None:
        """End the writer and let go of all memory."""
        if self._writer is not None:
            self._writer[0].kill()
            self._writer[0].wait()
            self._writer[1].close()
            self._writer = None
        for fd in self._arenas.values():
            os.close(fd)
        self._arenas.clear()
