"""Reading several ranges of an object at once, into memory that the caller has.

Owns one optional method beside the protocol of ``base``, and what is done where a backend lacks it. Restoring
reads this way: the bytes go from the socket to where they are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from storage_backends.base import Storage

Range = tuple[int, memoryview]  # where it starts in the object; where it goes, as long as it is


@runtime_checkable
class ReadsInto(Protocol):
    """What a backend that can do better than ``read`` offers."""

    def read_into(self, name: str, ranges: Sequence[Range]) -> list[int]:
        """See the function of this name."""


def read_into(storage: Storage, name: str, ranges: Sequence[Range]) -> list[int]:
    """Fill each range's buffer with the bytes of ``name`` from its start on, in parallel where that helps.

    Args:
        ranges: pairs of a start (bytes) and a writable, contiguous buffer of bytes. Buffers must not overlap.

    Returns:
        The bytes that were read into each buffer: fewer than it holds only where the object ends. After an
        error the buffers hold anything.

    Raises:
        As ``Storage.read``.
    """
    if isinstance(storage, ReadsInto):
        return storage.read_into(name, ranges)
    return read_one_by_one(storage, name, ranges)


def read_one_by_one(storage: Storage, name: str, ranges: Sequence[Range]) -> list[int]:
    """``read_into`` by ``read``. For backends."""
    filled = []
    for start, buffer in ranges:
        data = storage.read(name, start, start + buffer.nbytes)
        buffer.cast("B")[: len(data)] = data
        filled.append(len(data))
    return filled
