"""Two small persistent collections, so that one event costs the same with 100 cards and with 100,000.

``Vec`` is a fixed-size vector whose ``set`` shares all but the path to the changed element; ``Ranks`` is a
set of ranks held as the bits of one integer. Both are values: nothing here is ever changed in place, which is
what lets ``supervise.step`` hand out a new state per event without copying the old one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_BITS = (
    5  # 32 children: a path of four covers a million elements, and a copied node is one cache line or four
)
_WIDTH = 1 << _BITS
_MASK = _WIDTH - 1


class Vec(Generic[T]):
    """A vector of ``size`` elements; ``set`` returns a new one in O(log32 size)."""

    __slots__ = ("_depth", "_root", "size")

    def __init__(self, size: int, root: tuple[Any, ...], depth: int) -> None:
        self.size = size
        self._root = root
        self._depth = depth

    @classmethod
    def filled(cls, size: int, value: T) -> Vec[T]:
        """``size`` times ``value``. The inner nodes are one shared object per level: O(log size)."""
        depth, reach = 0, _WIDTH
        root: tuple[Any, ...] = (value,) * _WIDTH
        while reach < size:
            root = (root,) * _WIDTH
            reach *= _WIDTH
            depth += 1
        return cls(size, root, depth)

    def __getitem__(self, index: int) -> T:
        if not 0 <= index < self.size:
            raise IndexError(index)
        node = self._root
        for shift in range(self._depth * _BITS, 0, -_BITS):
            node = node[(index >> shift) & _MASK]
        element: T = node[index & _MASK]
        return element

    def set(self, index: int, value: T) -> Vec[T]:
        """A vector that differs from this one at ``index`` only."""
        if not 0 <= index < self.size:
            raise IndexError(index)
        path = []
        node = self._root
        for shift in range(self._depth * _BITS, 0, -_BITS):
            at = (index >> shift) & _MASK
            path.append((node, at))
            node = node[at]
        at = index & _MASK
        new: tuple[Any, ...] = (*node[:at], value, *node[at + 1 :])
        for node, at in reversed(path):
            new = (*node[:at], new, *node[at + 1 :])
        return Vec(self.size, new, self._depth)

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[T]:
        return (self[index] for index in range(self.size))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Vec):
            return NotImplemented
        return self.size == other.size and (self._root is other._root or tuple(self) == tuple(other))

    def __hash__(self) -> int:
        return hash((self.size, tuple(self)))

    def __repr__(self) -> str:
        return f"Vec({list(self)!r})"


@dataclass(frozen=True)
class Ranks:
    """A set of ranks. ``add`` of a present rank returns the set itself."""

    bits: int = 0
    count: int = 0

    def __contains__(self, rank: int) -> bool:
        return bool(self.bits >> rank & 1)

    def add(self, rank: int) -> Ranks:
        if rank in self:
            return self
        return Ranks(self.bits | 1 << rank, self.count + 1)

    def missing(self, size: int) -> tuple[int, ...]:
        """The ranks of ``0..size-1`` that are not in the set, in order."""
        return tuple(rank for rank in range(size) if rank not in self)
