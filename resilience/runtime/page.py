"""The page a rank shares with its agent: progress one way, orders the other way.

4 KiB of anonymous shared memory (a memfd), so that an agent still reads the progress of a rank that is stuck
in C with the interpreter lock held, and so that telling a rank something costs it one memory read a step.
Every field is one aligned 8-byte word (a single store on the machines we run on), except the section's name,
which is for people.
"""

from __future__ import annotations

import mmap
import os
import struct
import time

_SIZE = 4096
_WORD = struct.Struct("<q")
_BEAT = struct.Struct("<qqq")  # step, counter, monotonic ns
_STEP, _COUNTER, _TIME, _STALLED = 0, 8, 16, 24
_SECTION, _SECTION_MAX = 64, 64
_CHECKPOINT_AT, _STOP_AT, _RELEASE_AT, _SAVES_FAILING = 512, 520, 528, 536
NONE = -1


class Page:
    """Mapped progress page. Create it in the agent, attach to its descriptor in the rank."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map = mmap.mmap(fd, _SIZE)
        self._count = 0

    @classmethod
    def create(cls) -> Page:
        fd = os.memfd_create("resilience-page", os.MFD_CLOEXEC)
        os.ftruncate(fd, _SIZE)
        page = cls(fd)
        for offset in (_STEP, _CHECKPOINT_AT, _STOP_AT, _RELEASE_AT):
            page._put(offset, NONE)
        page.enter("start")
        page.beat(NONE)
        return page

    def _put(self, offset: int, value: int) -> None:
        _WORD.pack_into(self._map, offset, value)

    def _get(self, offset: int) -> int:
        return int(_WORD.unpack_from(self._map, offset)[0])

    # Written by the rank.

    def beat(self, step: int) -> None:
        """Say that something moved, at ``step`` completed steps."""
        self._count += 1
        _BEAT.pack_into(self._map, 0, step, self._count, time.monotonic_ns())

    def enter(self, section: str) -> None:
        name = section.encode()[: _SECTION_MAX - 1]
        self._map[_SECTION : _SECTION + _SECTION_MAX] = name.ljust(_SECTION_MAX, b"\0")

    def add_stall(self, seconds: float) -> None:
        self._put(_STALLED, self._get(_STALLED) + int(seconds * 1e9))

    # Read by the agent.

    @property
    def step(self) -> int:
        return self._get(_STEP)

    @property
    def section(self) -> str:
        raw = self._map[_SECTION : _SECTION + _SECTION_MAX]
        return raw.split(b"\0", 1)[0].decode(errors="replace")

    @property
    def age_s(self) -> float:
        return max(0.0, (time.monotonic_ns() - self._get(_TIME)) / 1e9)

    @property
    def stalled_s(self) -> float:
        return self._get(_STALLED) / 1e9

    # Written by the agent, read by the rank at every step.

    @property
    def checkpoint_at(self) -> int:
        return self._get(_CHECKPOINT_AT)

    @checkpoint_at.setter
    def checkpoint_at(self, step: int) -> None:
        self._put(_CHECKPOINT_AT, step)

    @property
    def stop_at(self) -> int:
        return self._get(_STOP_AT)

    @stop_at.setter
    def stop_at(self, step: int) -> None:
        self._put(_STOP_AT, step)

    @property
    def release_at(self) -> int:
        return self._get(_RELEASE_AT)

    @release_at.setter
    def release_at(self, step: int) -> None:
        self._put(_RELEASE_AT, step)

    @property
    def saves_failing(self) -> bool:
        """The last save of this node failed: do not hold up training for the next one."""
        return bool(self._get(_SAVES_FAILING))

    @saves_failing.setter
    def saves_failing(self, failing: bool) -> None:
        self._put(_SAVES_FAILING, int(failing))

    def close(self) -> None:
        self._map.close()
        os.close(self.fd)
