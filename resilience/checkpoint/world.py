"""Worlds of different sizes: what of a checkpoint may be given to ranks other than those that saved it. Pure.

Owns the comparison of ranks' own values and arrays. What all ranks hold alike is anybody's; what differs belongs to one
rank, and must never be handed to another silently.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from resilience.checkpoint.part import Part
from resilience.checkpoint.plan import Scope
from resilience.checkpoint.tree import differences
from resilience.errors import InvalidError

_ALL_BELOW = 64  # ranks of a saved world up to which everybody looks at all of them, for a better message
_SHOWN = 10


def neighbours(rank: int, world_size: int, saved: int, *, all_below: int = _ALL_BELOW) -> range:
    """Saved ranks that ``rank`` of ``world_size`` has to compare, and where it finds most of what it wants.

    Each rank takes its share of the saved ones and the next one after it: between them the ranks see every pair of
    neighbours, so a difference anywhere is found by one of them, while nobody reads more than a few parts.
    """
    if saved <= all_below:
        return range(saved)
    return range(rank * saved // world_size, min(-(-(rank + 1) * saved // world_size) + 1, saved))


def check_alike(own: Part, others: Sequence[Part], world_size: int, *, ignore: str) -> None:
    """``InvalidError`` listing what differs between ranks, if anything does, of values and of ranks' own arrays.

    Arrays are compared by the CRCs of their chunks. ``ignore`` is the name of an object whose differences do not
    matter.
    """
    found: dict[str, None] = {}
    for other in others:
        found.update(dict.fromkeys(_differing(own, other, ignore)))
        if len(found) > 100 * _SHOWN:
            break
    if not found:
        return
    shown = ", ".join(list(found)[:_SHOWN]) + (
        f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    )
    raise InvalidError(
        f"the checkpoint was saved by {own.world_size} ranks and cannot be restored by {world_size}: these differ "
        f"between the ranks: {shown}",
        operation="restore",
        step=own.step,
        generation=own.generation,
        hint=f"run with {own.world_size} workers, or track only state that all ranks hold alike or as shards",
    )


def _differing(own: Part, other: Part, ignore: str) -> Iterator[str]:
    for path in differences(own.state, other.state):
        if path != ignore and not path.startswith(f"{ignore}/"):
            yield path
    mine, theirs = _private(own, ignore), _private(other, ignore)
    for key in mine.keys() | theirs.keys():
        if mine.get(key) != theirs.get(key):
            yield f"rank-{own.rank if key in mine else other.rank}/{key}"


def _private(part: Part, ignore: str) -> dict[str, Any]:
    """The rank's own arrays by key: type, shape, and where its bytes are how."""
    found: dict[str, Any] = {}
    for array in part.arrays:
        key = part.key(array)
        if array.scope is Scope.RANK and not key.startswith(f"{ignore}/"):
            found[key] = [array.dtype, array.shape, array.grid]
    for chunk in part.chunks:
        array = part.arrays[chunk.array]
        if array.scope is Scope.RANK and (key := part.key(array)) in found:
            found[key].append((chunk.box_offset, chunk.box_shape, chunk.crc32c, chunk.running))
    return found
