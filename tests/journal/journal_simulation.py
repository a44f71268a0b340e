"""A world of supervisors over one pretend store, stepped by a schedule that is data: replayable to the last byte.

Every client runs in a thread of its own, but only the one whose turn it is moves, from one storage step to the next;
between two steps anything may happen to it or to the store. All choices (who moves, what fails, what a power
failure leaves, how stale a listing is) are taken from one byte string; when that is used up, no fault happens
and the client whose turn it is goes on.
"""

from __future__ import annotations

import itertools
import re
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from resilience.errors import FencedError, UnavailableError
from resilience.journal.log import CommitLog
from resilience.journal.records import Record, decode
from storage_backends.disk import Disk, Inode, PowerLoss
from storage_backends.memory import MemoryStorage

if TYPE_CHECKING:
    from journal_clients import Parts

SLOT = re.compile(r"log/(\d{20})\.json")


class Choices:
    """Numbers from a byte string; 0, the harmless one, when it is used up."""

    def __init__(self, data: bytes) -> None:
        self._data = iter(data)

    def next(self, n: int) -> int:
        return next(self._data, 0) % n if n > 1 else 0

    def decide(self, what: str, n: int) -> int:
        return self.next(n + 1)


@dataclass(frozen=True)
class Faults:
    """How often, of 256 turns (the first four) or calls."""

    power: int = 2  # every client dies; what was not synced may be gone
    kill: int = 3  # one client dies
    land: int = 20  # a write given up for lost lands after all, maybe for the second time
    unavailable: int = 24  # a step fails: 503, 409, EIO
    lost_reply: int = 30
    delayed: int = 20  # a create reported unavailable is still on its way (object stores)
    stale_list: int = 128
    stale_read: int = 20  # the newest slot is not seen yet (a negative cache), never twice in a row

    @classmethod
    def none(cls) -> Faults:
        return cls(0, 0, 0, 0, 0, 0, 0, 0)


class SimStorage(MemoryStorage):
    """The memory twin with the two faults that need the whole call: late landing and a negative cache."""

    world: World
    client: Client
    _missed: str | None = None

    def create(self, name: str, data: bytes) -> bytes | None:
        if self.disk.semantics == "object" and self.world.happens("delayed"):
            self.world.in_flight.append((name, data))
            raise UnavailableError(f"no answer to create of {name}", path=name)
        try:
            self._missed = name  # what create finds is there for it
            return super().create(name, data)
        finally:
            self._missed = None

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        if name.startswith("log/") and self._missed != name and self.world.happens("stale_read"):
            self._missed = name
            raise FileNotFoundError(name)
        self._missed = None
        return super().read(name, start, end)


class Client:
    """One process: a commit log over its own handle, running ``program`` when it is its turn."""

    def __init__(self, world: World, name: str, program: Callable[[Client], None]) -> None:
        self.world, self.name = world, name
        self.storage = world.parts.storage(world.disk, before=self._before)
        self.storage.world, self.storage.client = world, self
        self.storage.lose_reply = lambda op, _: op in ("create", "commit") and world.happens("lost_reply")
        self.storage.listing = lambda _, views: (
            world.choices.next(views + 1) if world.happens("stale_list") else 0
        )
        serial = itertools.count()
        self.new_id = lambda: f"{name}-{next(serial)}"
        self.log = world.parts.log(self.storage, new_id=self.new_id)
        self.outcome = ""  # "" running, else done, fenced, away, dead, broken
        self.error: BaseException | None = None
        self._program = program
        self._turn = threading.Lock()
        self._turn.acquire()
        self._thread = threading.Thread(target=self._run, daemon=True, name=name)
        self._thread.start()

    def go(self) -> None:
        """Let it move to its next step (or its end)."""
        self._turn.release()
        self.world.back.acquire()

    def pause(self) -> None:
        """Let others move: the client waits for something."""
        self.storage.step("wait", "")

    def insist(self, call: Callable[[], Any], tries: int = 4) -> Any:
        """The result of ``call``, repeated while storage is away; ``None`` when it stays away."""
        for _ in range(tries):
            try:
                return call()
            except UnavailableError:
                self.pause()
        return None

    def _before(self, step: str, name: str) -> None:
        if threading.current_thread() is not self._thread:
            return  # a reader's helper thread: part of the step its client is in
        self.world.back.release()
        self._turn.acquire()
        if self.storage.alive and step != "wait":
            self.world.strike()

    def _run(self) -> None:
        self._turn.acquire()
        try:
            self._program(self)
            self.outcome = "done"
        except PowerLoss:
            self.outcome = "dead"
        except FencedError:
            self.outcome = "fenced"
        except UnavailableError:
            self.outcome = "away"
        except BaseException as error:
            self.outcome, self.error = "broken", error
        self.world.back.release()


@dataclass
class World:
    """The store, its clients, and what happened so far.

    Attributes:
        acked: records whose append returned, in that order.
        fenced: (client, its fence record, every record it knew then, how many acks there were by then).
        slots: what a bystander with perfect sight has seen in the log.
        watchers: run after every turn.
    """

    choices: Choices
    parts: Parts
    semantics: str = "object"
    faults: Faults = field(default_factory=Faults)

    def __post_init__(self) -> None:
        self.disk = Disk(self.semantics)  # type: ignore[arg-type]
        self.back = threading.Lock()
        self.back.acquire()
        self.clients: list[Client] = []
        self.in_flight: list[tuple[str, bytes]] = []
        self.acked: list[Record] = []
        self.answers: list[tuple[str, Record]] = []
        self.fenced: list[tuple[Client, Record, tuple[Record, ...], int]] = []
        self.restores: dict[object, int] = {}  # open ones -> when they began
        self.slots: dict[int, bytes] = {}
        self.watchers: list[Callable[[World], None]] = []
        self.turn = 0
        self._current: Client | None = None
        self._serial = itertools.count()
        self._unavailable = False

    # -- what happens --------------------------------------------------------------------------------------------

    def start(self, program: Callable[[Client], None]) -> Client:
        client = Client(self, f"c{next(self._serial)}", program)
        self.clients.append(client)
        return client

    def running(self) -> list[Client]:
        return [client for client in self.clients if not client.outcome]

    def run(self, turns: int, fresh: Callable[[Client], None] | None = None, most: int = 8) -> None:
        """So many turns, or until nobody runs. ``fresh`` is started when nobody does, and now and then while
        somebody still does (who was only suspected), up to ``most`` clients."""
        for _ in range(turns):
            count = len(self.running())
            if (
                fresh
                and len(self.clients) < most
                and (count == 0 or (count < 3 and self.choices.next(256) > 245))
            ):
                self.start(fresh)
            if not self.running():
                return
            self.tick()

    def tick(self) -> None:
        self.turn += 1
        fate, faults = self.choices.next(256), self.faults
        self._unavailable = False
        running = self.running()
        client = self._pick(running)
        if fate >= (edge := 256 - faults.power):
            self.power_loss()
        elif fate >= (edge := edge - faults.kill):
            client.storage.kill()
        elif fate >= (edge := edge - faults.land):
            self.land()
        elif fate >= edge - faults.unavailable:
            self._unavailable = True
        if not client.outcome:
            client.go()
        if client.error is not None:
            raise client.error
        self.look()
        for watcher in self.watchers:
            watcher(self)

    def _pick(self, running: list[Client]) -> Client:
        """Mostly the same client again: long stalls find more than fair turns do."""
        choice = self.choices.next(256)
        if self._current not in running or choice >= 140:
            self._current = running[choice % len(running)]
        return self._current

    def strike(self) -> None:
        if self._unavailable:
            self._unavailable = False
            raise UnavailableError("the store is away for a moment")

    def happens(self, fault: str) -> bool:
        rate = getattr(self.faults, fault)
        return bool(rate) and self.choices.next(256) >= 256 - rate

    def land(self) -> None:
        if self.in_flight:
            name, data = self.in_flight[self.choices.next(len(self.in_flight))]  # stays: it may land twice
            self.disk.put(name, data, exclusive=True)

    def power_loss(self, decide: Callable[[str, int], int] | None = None) -> None:
        self.disk.crash(decide or self.choices.decide)
        self.restores.clear()
        for client in self.running():
            while not client.outcome:
                client.go()

    def if_power_failed(self) -> Disk:
        """What the store would be if the power went now and each volatile entry had an even chance."""
        decide = lambda what, n: zlib.crc32(f"{what} {self.turn}".encode()) % (n + 1)  # noqa: E731
        return clone(self.disk, decide)

    def heal(self) -> None:
        """From now on nothing fails; what was on its way has landed."""
        self.faults = Faults.none()
        while self.in_flight:
            name, data = self.in_flight.pop(0)
            self.disk.put(name, data, exclusive=True)

    def close(self) -> None:
        """End every thread."""
        for client in self.running():
            client.storage.kill()
            while not client.outcome:
                client.go()

    # -- what is seen --------------------------------------------------------------------------------------------

    def clean(self) -> MemoryStorage:
        """A handle that no fault touches."""
        return MemoryStorage(self.disk)

    def look(self) -> None:
        """Bring ``slots`` up to date; once seen, a slot keeps its bytes for as long as it is there."""
        storage = self.clean()
        matches = (SLOT.fullmatch(name) for name in self.disk.names())
        names = {int(match[1]): match[0] for match in matches if match}
        self.slots = {
            slot: self.slots[slot] if slot in self.slots else storage.read(names[slot])
            for slot in sorted(names)
        }

    def records(self) -> tuple[Record, ...]:
        """All of the log, by a reader who meets no fault."""
        return CommitLog(self.clean(), new_id=lambda: "").refresh()

    def record(self, slot: int) -> Record:
        return decode(self.slots[slot], path=f"slot {slot}")


def clone(disk: Disk, decide: Callable[[str, int], int]) -> Disk:
    """A copy of the disk after a power loss; the disk itself and its clients go on."""
    copies: dict[int, Inode] = {}

    def copy(inode: Inode | None) -> Any:
        if inode is None:
            return None
        return copies.setdefault(id(inode), Inode(bytearray(inode.data), inode.synced))

    twin = Disk(disk.semantics, remember=0)
    twin._files = {path: copy(inode) for path, inode in disk._files.items()}
    twin._durable_files = {path: copy(inode) for path, inode in disk._durable_files.items()}
    twin._directories, twin._durable_directories = set(disk._directories), set(disk._durable_directories)
    twin._pending = {
        place: [
            type(change)(change.put and (change.put[0], copy(change.put[1])), change.drop)
            for change in changes
        ]
        for place, changes in disk._pending.items()
    }
    twin.crash(decide)
    return twin
