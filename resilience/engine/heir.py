"""The writer of one rank under ``Checkpointer``: it outlives the process that started it, until all is written.

What is sealed when its rank ends, however that ends, still becomes durable; then this process exits. It leaves a
receipt for each part on the nvme tier, since nobody else can look there, and holds a door open behind which the next
start of the run waits for it. Commits nothing: the next start does (``engine.adoption``).
"""

from __future__ import annotations

import os
import queue
import selectors
import signal
import socket
import sys
import threading
from typing import Any

from resilience.checkpoint.part import Part, directory, part_name, sha256
from resilience.control.types import CheckpointRef
from resilience.engine import notes
from resilience.engine.door import SERVED, door_address
from resilience.errors import ResilienceError
from resilience.runtime.wire import Channel, Closed
from resilience.runtime.writer import Writer, _or_die
from storage_backends import open_storage

_Task = tuple[Any, ...]


def main() -> None:
    fd, parent = int(sys.argv[1]), int(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    Heir(Channel.from_fd(fd), parent).live()


class Heir(Writer):
    """A writer that knows what it still has to do, and when its rank is gone."""

    def __init__(self, channel: Channel, parent: int) -> None:
        super().__init__(channel)
        self._parent = parent
        self._orphaned = False
        self._near: set[_Task] = set()  # slots and receipts
        self._far: set[_Task] = set()  # drains
        self._tasks = threading.Condition()
        self._receipts: queue.SimpleQueue[tuple[int, int, int]] = queue.SimpleQueue()
        self._node = ""
        self._places: tuple[str, str | None] = ("", None)

    def live(self) -> None:
        """Carry out orders until the rank is gone, then what is left of them."""
        self.start()
        threading.Thread(target=_or_die, args=(self._receipt_loop,), daemon=True).start()
        self._obey_all()
        self._orphaned = True
        # Whoever reads the output of the rank waits for its end, not for ours.
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 1)
        os.dup2(null, 2)
        with self._tasks:
            self._tasks.wait_for(lambda: not self._near and not self._far)

    def _obey_all(self) -> None:
        """Until the channel closes. Or the process at its other end is gone: those that it forked may hold the
        channel open."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._channel, selectors.EVENT_READ)
            try:
                gone = os.pidfd_open(self._parent)
            except ProcessLookupError:
                gone = -1
            if gone >= 0:
                selector.register(gone, selectors.EVENT_READ)
            ended = gone < 0 or os.getppid() != self._parent
            while not ended:
                ready = [key.fd for key, _events in selector.select()]
                ended = gone in ready
                if self._channel.fileno() in ready and not self._take():
                    return
            while self._take(until_empty=True):
                pass

    def _take(self, *, until_empty: bool = False) -> bool:
        """Carry out what has arrived. False: nothing more will come (``until_empty``: or nothing has)."""
        try:
            messages = self._channel.take()
        except Closed:
            return False
        for message, fds in messages:
            self.obey(message, fds)
        return bool(messages) or not until_empty

    def obey(self, message: dict[str, Any], fds: list[int]) -> None:
        kind = message["t"]
        if kind == "meet":
            self._node = message["node"]
            self._places = (message["shared"], message["nvme"])
            threading.Thread(target=self._keep_door, args=(message["door"],), daemon=True).start()
        elif kind == "persist":
            self._begin(self._near, ("slot", tuple(message["key"]), message["slot"], message["step"]))
        elif kind == "drain":  # of a predecessor: it may have died before it left the receipt
            self._owe(message)
        super().obey(message, fds)

    def _send(self, message: dict[str, Any]) -> None:
        kind = message["t"]
        if kind == "persisted" and message["tier"] == "nvme":
            self._owe(message)
        if not self._orphaned:
            try:
                super()._send(message)
            except Closed:
                self._orphaned = True
        if kind == "slot_free":
            self._end(self._near, ("slot", tuple(message["key"]), message["slot"], message["step"]))
        elif kind in ("persisted", "save_failed") and message["tier"] == "shared":
            self._end(self._far, _drain(message))

    def _owe(self, message: dict[str, Any]) -> None:
        """A pack is durable on nvme: a receipt and a drain are due."""
        task = _drain(message)
        self._begin(self._far, task)
        self._begin(self._near, ("receipt", *task))
        self._receipts.put(task)

    def _begin(self, tasks: set[_Task], task: _Task) -> None:
        with self._tasks:
            tasks.add(task)

    def _end(self, tasks: set[_Task], task: _Task) -> None:
        with self._tasks:
            tasks.discard(task)
            self._tasks.notify_all()

    def _receipt_loop(self) -> None:
        """Apart from the threads that move bytes: neither a slot nor a drain waits for a receipt."""
        while True:
            task = self._receipts.get()
            try:
                self._leave_receipt(*task)
            except (ResilienceError, FileNotFoundError) as error:
                message = f"step {task[2]} is on nvme, but its receipt could not be left: {error}"
                self._send({"t": "warning", "message": message})
            self._end(self._near, ("receipt", *task))

    def _leave_receipt(self, generation: int, rank: int, step: int) -> None:
        shared, nvme = self._places
        assert nvme is not None
        where = directory(step, generation)
        name = part_name(where, rank)
        data = open_storage(nvme).read(name)
        part = Part.decode(data, path=name)
        receipt = notes.Receipt(rank, part.world_size, self._node, "nvme", name, sha256(data), part.size)
        notes.leave(open_storage(shared), CheckpointRef(step, generation), receipt)

    def _keep_door(self, name: str) -> None:
        """Let a later start wait at our door until everything near is done; nobody has to wait while our rank lives:
        then it is the rank that is in the way, and the fence will tell it."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as door:
            door.bind(door_address(name, os.getpid()))
            door.listen()
            while True:
                visitor, _address = door.accept()
                threading.Thread(target=self._serve_visitor, args=(visitor,), daemon=True).start()

    def _serve_visitor(self, visitor: socket.socket) -> None:
        with visitor:
            if os.getppid() == self._parent and not self._orphaned:
                return
            with self._tasks:
                # Not before the last orders are read: they came before the visitor did.
                self._tasks.wait_for(lambda: self._orphaned and not self._near)
            visitor.sendall(SERVED)


def _drain(message: dict[str, Any]) -> tuple[int, int, int]:
    return (message["generation"], message["rank"], message["step"])


if __name__ == "__main__":
    main()
