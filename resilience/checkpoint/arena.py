"""The arena: slots of shared memory that a rank copies its state into and a writer process persists from.

Owns the memory (a memfd: freed by the kernel with its last holder, not bounded by a container's 64 MB
/dev/shm) and the seal protocol. A slot's words change hands with its state: the rank owns FREE -> WRITING
-> SEALED, the writer SEALED -> PERSISTED or RELEASED, then it is the rank's again. Must never let a sealed
slot be overwritten before a newer one is sealed, nor one whose writer has not finished with it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from types import TracebackType

from resilience.checkpoint.memory import Available, available
from resilience.checkpoint.plan import ALIGN, align
from resilience.errors import ExhaustedError, InvalidError

_MAGIC = b"RSARENA2"
_HEADER = struct.Struct("<8sQQQ")  # magic, slots, slot bytes, distance between slots
_FIRST_WORD = 8  # in 8-byte words: the slot records begin at byte 64
_WORDS = 6  # of a record: kind, step, generation, sequence, copied, attempt
MAX_SLOTS = (ALIGN - 8 * _FIRST_WORD) // (8 * _WORDS)
_BLOCK = 64 << 20  # memory is taken in blocks of this size, with a look at what is left before each
_MARGIN = 64 << 20  # never taken: what the processes around us need while we take the rest
# The memory may not change size under its holders: a shorter file would end them with SIGBUS.
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class SlotKind(IntEnum):
    """What a slot holds."""

    FREE = 0  # nothing
    WRITING = 1  # half a snapshot: its rank is copying, or died doing so
    SEALED = 2  # a whole snapshot that the writer has not finished with
    PERSISTED = 3  # a whole snapshot, durable in some tier
    RELEASED = 4  # a whole snapshot that the writer gave up on (storage failed)


@dataclass(frozen=True)
class SlotState:
    """A slot's state. ``step`` and ``generation`` count from SEALED on; ``sequence`` orders the seals.

    ``copied`` is how many bytes of the slot, from its beginning, the rank will not touch again in this ``attempt``;
    a number that grows whenever the slot is taken, so that a reader notices.
    """

    kind: SlotKind
    step: int
    generation: int
    sequence: int
    copied: int = 0
    attempt: int = 0


class Arena:
    """A fixed number of equal slots in one shared memory object, with a header page in front.

    One rank process fills slots, from one thread; one writer process empties them. Others may look. After
    ``fork`` the child shares the memory; an ``exec``'d or unrelated process attaches to the file descriptor.
    """

    def __init__(self, fd: int, memory: mmap.mmap) -> None:
        """Use ``create`` or ``attach``."""
        _, self._slots, self._slot_bytes, self._stride = _HEADER.unpack_from(memory, 0)
        self._fd = fd
        self._memory = memory
        self._view = memoryview(memory)
        self._words = self._view[:ALIGN].cast("q")

    @classmethod
    def create(cls, slots: int, slot_bytes: int, *, probe: Callable[[], Available] = available) -> Arena:
        """Take the memory, all of it, now: no page fault later, and no surprise.

        Args:
            slots: 2, so that one whole snapshot exists while the next is copied, or more. With 1, where there is
                no memory for two, the next copy has to wait until this one is durable.
            slot_bytes: of each slot; the plan's ``size``.
            probe: says how much memory may be taken.

        Raises:
            ExhaustedError: there is too little. Nothing is kept.
        """
        if not 1 <= slots <= MAX_SLOTS or slot_bytes < 1:
            raise InvalidError(
                f"an arena of {slots} slots of {slot_bytes} bytes",
                operation="arena",
                hint=f"1 to {MAX_SLOTS} slots of at least one byte",
            )
        stride = align(slot_bytes)
        total = ALIGN + slots * stride
        _check(total, total, probe())
        fd = os.memfd_create("resilience-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            for start in range(0, total, _BLOCK):
                # Others take memory too, perhaps at this moment and for the same reason.
                _check(total, total - start, probe())
                # Allocates and zeroes the pages; a lack of memory is an error here, and never a SIGBUS later.
                os.posix_fallocate(fd, start, min(_BLOCK, total - start))
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            memory = _map(fd, total)
        except OSError as error:
            os.close(fd)
            if error.errno in (errno.ENOMEM, errno.ENOSPC, errno.EFBIG):
                raise _exhausted(total, probe()) from error
            raise
        except BaseException:
            os.close(fd)
            raise
        _HEADER.pack_into(memory, 0, _MAGIC, slots, slot_bytes, stride)
        return cls(fd, memory)

    @classmethod
    def attach(cls, fd: int) -> Arena:
        """Map an arena that another process made. Takes over ``fd``: ``close`` closes it.

        Raises:
            InvalidError: ``fd`` is not an arena.
        """
        size = os.fstat(fd).st_size
        head = os.pread(fd, _HEADER.size, 0)
        if len(head) == _HEADER.size:
            magic, slots, _, stride = _HEADER.unpack(head)
            if magic == _MAGIC and size == ALIGN + slots * stride:
                os.set_inheritable(fd, False)  # sockets deliver descriptors that would survive an exec
                return cls(fd, _map(fd, size))
        raise InvalidError(
            f"file descriptor {fd} is not an arena of this version",
            operation="arena",
            hint="hand over the descriptor of Arena.create made by the same version of this package",
        )

    @property
    def fd(self) -> int:
        """The memory's file descriptor, to inherit or to send over a unix socket. Closed on exec."""
        return self._fd

    @property
    def slots(self) -> int:
        return int(self._slots)

    @property
    def slot_bytes(self) -> int:
        return int(self._slot_bytes)

    def acquire(self) -> int | None:
        """A slot to overwrite, now WRITING; ``None`` when the writer is behind and all are busy.

        Free ones first, then the oldest the writer has finished with, but never the newest whole snapshot, except
        in an arena of one slot.
        """
        states = [self.state(index) for index in range(self.slots)]
        whole = [state.sequence for state in states if state.kind >= SlotKind.SEALED]
        newest = max(whole, default=0)
        usable = [
            (state.sequence if state.kind is not SlotKind.FREE else -1, index)
            for index, state in enumerate(states)
            if state.kind is SlotKind.FREE
            or (state.kind >= SlotKind.PERSISTED and (state.sequence != newest or self.slots == 1))
        ]
        if not usable:
            return None
        _, index = min(usable)
        # First word first: from here until ``seal`` the slot counts for nothing, whenever we may be killed.
        self._set(index, SlotKind.WRITING)
        word = _FIRST_WORD + index * _WORDS
        self._words[word + 4] = 0
        self._words[word + 5] += 1
        fence()  # nothing is copied before everybody can see that this is another attempt
        return index

    def advance(self, index: int, copied: int) -> None:
        """The first ``copied`` bytes of the slot are as they will be sealed. Called after the copy, by any thread
        that did its part of it or has waited for those that did; the number must only grow."""
        fence()
        self._words[_FIRST_WORD + index * _WORDS + 4] = copied

    def seal(self, index: int, step: int, generation: int) -> None:
        """Declare the slot a whole snapshot: WRITING -> SEALED. The kind is written last, in one store."""
        self._expect(index, "seal", SlotKind.WRITING)
        sequence = 1 + max(self.state(other).sequence for other in range(self.slots))
        word = _FIRST_WORD + index * _WORDS
        self._words[word + 1] = step
        self._words[word + 2] = generation
        self._words[word + 3] = sequence
        fence()
        self._set(index, SlotKind.SEALED)

    def abort(self, index: int) -> None:
        """Give up a slot that was acquired: WRITING -> FREE."""
        self._expect(index, "abort", SlotKind.WRITING)
        self._set(index, SlotKind.FREE)

    def persisted(self, index: int) -> None:
        """The writer made the slot durable: SEALED -> PERSISTED. May run twice."""
        self._expect(index, "persisted", SlotKind.SEALED, SlotKind.PERSISTED)
        self._set(index, SlotKind.PERSISTED)

    def release(self, index: int) -> None:
        """The writer gave up: SEALED -> RELEASED, to be overwritten like a persisted one. May run twice."""
        self._expect(index, "release", SlotKind.SEALED, SlotKind.RELEASED)
        self._set(index, SlotKind.RELEASED)

    def recover(self) -> list[int]:
        """Free what a dead rank left WRITING; returns those slots. Only for the process in its place."""
        torn = [index for index in range(self.slots) if self.state(index).kind is SlotKind.WRITING]
        for index in torn:
            self._set(index, SlotKind.FREE)
        return torn

    def sealed(self) -> list[int]:
        """Slots waiting for the writer, oldest first."""
        states = [(self.state(index), index) for index in range(self.slots)]
        return [
            index
            for state, index in sorted(states, key=lambda it: it[0].sequence)
            if state.kind is SlotKind.SEALED
        ]

    def view(self, index: int) -> memoryview:
        """The slot's memory, ``slot_bytes`` long."""
        start = ALIGN + self._check_index(index) * int(self._stride)
        return self._view[start : start + self.slot_bytes]

    def state(self, index: int) -> SlotState:
        """The slot's state, consistent in itself even while its owner changes it."""
        word = _FIRST_WORD + self._check_index(index) * _WORDS
        while True:
            record = tuple(self._words[word : word + _WORDS])
            if record[0] == self._words[word] and record[3] == self._words[word + 3]:
                fence()  # what is read of the slot from here on is at least as new as what its state promises
                return SlotState(SlotKind(record[0]), *record[1:])

    def close(self) -> None:
        """Unmap and close. Views still in use keep the memory until they are gone. May run twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        for holder in (self._words, self._view, self._memory):
            # A view handed out earlier pins the mapping; the kernel frees it with that view.
            with contextlib.suppress(BufferError):
                holder.close() if isinstance(holder, mmap.mmap) else holder.release()

    def __enter__(self) -> Arena:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _set(self, index: int, kind: SlotKind) -> None:
        # One aligned 8-byte store: no other process can see half of it.
        self._words[_FIRST_WORD + index * _WORDS] = int(kind)

    def _check_index(self, index: int) -> int:
        if not 0 <= index < self.slots:
            raise InvalidError(f"slot {index} of {self.slots}", operation="arena", hint="slots count from 0")
        return index

    def _expect(self, index: int, action: str, *kinds: SlotKind) -> None:
        kind = self.state(index).kind
        if kind not in kinds:
            wanted = " or ".join(wanted.name for wanted in kinds)
            raise InvalidError(
                f"cannot {action} slot {index}: it is {kind.name}, not {wanted}",
                operation="arena",
                hint="slots go FREE -> WRITING -> SEALED -> PERSISTED or RELEASED",
            )


_FENCE = threading.Lock()


def fence() -> None:
    """Nothing in memory that comes before this is seen, by whatever process, later than what comes after it.

    Python has no barrier of its own, but giving a lock back is a release, and taking one an acquire, and no
    processor moves an acquire before an earlier release. x86 needs none of this between stores; arm64 does.
    """
    with _FENCE:
        pass
    with _FENCE:
        pass


def _map(fd: int, size: int) -> mmap.mmap:
    # MAP_POPULATE fills the page table too: the first copy costs no page faults.
    return mmap.mmap(fd, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)


def _check(total: int, wanted: int, found: Available) -> None:
    if wanted + _MARGIN > found.bytes:
        raise _exhausted(total, found)


def _exhausted(total: int, found: Available) -> ExhaustedError:
    return ExhaustedError(
        f"snapshots need {total:,} bytes of memory (and {_MARGIN:,} left over for others), "
        f"{found.bytes:,} are available ({found.limit})",
        operation="arena",
        hint="give the job more memory (docker run --memory, Kubernetes resources.limits.memory, "
        "Slurm --mem), put fewer ranks on this node, or keep less state per rank",
    )
