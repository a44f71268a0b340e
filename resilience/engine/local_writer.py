"""The rank's hand on its writer process: hands it arenas and sealed slots, hears it, starts another when it dies.

One thread around a selector, which never touches storage. Must never let ``sealed`` return before the order has left
this process: from then on the snapshot outlives it.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import subprocess
import threading
import traceback
from collections.abc import Callable
from typing import Any

from resilience.engine.door import door_name
from resilience.errors import UnavailableError
from resilience.runtime.saves import ArenaKey, Saves
from resilience.runtime.spawn import spawn
from resilience.runtime.wire import Channel

_EXIT_S = 10.0
_MAX_DEATHS = 8


class LocalWriter:
    """Args:
    run, node, rank: for people who read the process list, and for receipts.
    shared, nvme: URLs of the run's roots.
    emit: called from our thread with what the writer says (``persisted``, ``save_failed``, ``warning``), and with
        ``{"t": "broken", "traceback"}`` when this thread meets a bug of ours.
    """

    def __init__(
        self,
        *,
        run: str,
        node: str,
        rank: int,
        shared: str,
        nvme: str | None,
        emit: Callable[[dict[str, Any]], None],
    ) -> None:
        self._config: dict[str, Any] = {
            "run": run,
            "name": f"{node}/rank-{rank}",
            "nvme": nvme,
            "shared": shared,
            "env": {},
        }
        self._meet = {
            "t": "meet",
            "node": node,
            "shared": shared,
            "nvme": nvme,
            "door": door_name(shared),
        }
        self._emit = emit
        self._lock = threading.Condition(threading.RLock())  # over everything below
        self._selector = selectors.DefaultSelector()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._channel: Channel | None = None
        self._saves = Saves(self._config, self._spawn, emit, failing=lambda _failing: None)
        self._ending = False
        self._deaths = 0  # of writers since one last said anything
        self._thread = threading.Thread(target=self._loop, name="resilience-writer", daemon=True)

    def start(self) -> None:
        with self._lock:
            self._selector.register(self._wake, selectors.EVENT_READ)
            self._saves.start()
        self._thread.start()

    @property
    def pid(self) -> int | None:
        """Of the writer process."""
        with self._lock:
            return next(iter(self._saves.pids()), None)

    def arena(self, key: ArenaKey, fd: int) -> None:
        """Hand an arena on; ``fd`` stays the caller's."""
        with self._lock:
            if self._ending:
                return
            self._saves.arena(key, os.dup(fd))
        self._nudge()

    def copying(self, key: ArenaKey, told: dict[str, Any]) -> None:
        """A slot is being filled: the writer may begin. Only a head start."""
        with self._lock:
            if self._ending:
                return
            self._saves.copying(key, told)
        self._nudge()

    def sealed(self, key: ArenaKey, seal: dict[str, Any], *, deadline: float) -> None:
        """Have a sealed slot persisted. Returns when the writer has been sent all that takes.

        Raises:
            UnavailableError: it has not taken the order within ``deadline`` seconds: it is stopped, or starved.
        """
        with self._lock:
            if self._ending:
                return
            self._saves.sealed(key, seal)
            if not self._saves.unsent:
                return
        self._nudge()
        with self._lock:
            if not self._lock.wait_for(lambda: not self._saves.unsent or self._ending, deadline):
                raise UnavailableError(
                    f"the writer process {self.pid} has not taken an order within {deadline:g} s",
                    operation="save",
                    step=seal["step"],
                    hint="see whether it is stopped; the snapshot is sealed and becomes durable when it goes on",
                )

    def kill(self) -> None:
        """End the writer, whatever it is at: what it writes does not count any more."""
        self._end()
        with self._lock:
            self._saves.close()
        self._close()

    def leave(self) -> bool:
        """Let the writer do what it was told, and end. Whether it has ended within a few seconds; else it goes on
        alone."""
        self._end()
        with self._lock:
            process = self._saves.leave()
        self._close()
        if process is None:
            return True
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_EXIT_S)
            return True
        return False

    def _end(self) -> None:
        with self._lock:
            self._ending = True
            self._lock.notify_all()
        self._nudge()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _close(self) -> None:
        if self._wake >= 0:
            self._selector.close()
            os.close(self._wake)
            self._wake = -1

    def _nudge(self) -> None:
        if self._wake >= 0:
            os.eventfd_write(self._wake, 1)

    def _spawn(self, _module: str, _kind: str) -> tuple[subprocess.Popen[bytes], Channel]:
        with open(os.devnull if _no_stderr() else os.dup(2), "ab") as log:
            process, channel = spawn("resilience.engine.heir", self._config, log)
        channel.post(self._meet)
        self._selector.register(channel, selectors.EVENT_READ)
        self._channel = channel
        return process, channel

    def _loop(self) -> None:
        try:
            while not self._ending:
                with self._lock:
                    write = selectors.EVENT_WRITE if self._saves.unsent else 0
                    if self._channel is not None:
                        self._selector.modify(self._channel, selectors.EVENT_READ | write)
                ready = self._selector.select()
                with self._lock:
                    for key, events in ready:
                        self._on(key.fileobj, events)
                    self._lock.notify_all()
        except Exception:  # noqa: BLE001 - a bug of ours: saves must fail loudly, not hang
            self._emit({"t": "broken", "traceback": traceback.format_exc()})

    def _on(self, ready: Any, events: int) -> None:
        if ready == self._wake:
            os.eventfd_read(self._wake)
            return
        if ready is not self._channel or self._ending:
            return
        if events & selectors.EVENT_WRITE:
            self._channel.flush()
        if events & selectors.EVENT_READ:
            if self._saves.hear():
                self._deaths = 0
                return
            self._selector.unregister(self._channel)
            self._channel.close()
            self._channel = None
            self._deaths += 1
            if self._deaths > _MAX_DEATHS:
                raise RuntimeError(
                    f"the writer process died {self._deaths} times without a word; see its output"
                )
            self._saves.revive()


def _no_stderr() -> bool:
    try:
        os.fstat(2)
    except OSError:
        return True
    return False
