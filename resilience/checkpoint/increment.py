"""Increments: which chunks of a snapshot need not be written again, and whether a snapshot is stale at all. Pure.

A chunk whose bytes are those of the rank's save before is taken from the older pack, under a second name in the new
checkpoint's directory (``part.Link``). Owns which packs are worth that, the layout of the smaller pack, and the check
that something was trained between two saves. Must never say "unchanged" from a checksum alone: who asks compares
the bytes, too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from resilience.checkpoint.part import Link, Part, PartChunk, link_name
from resilience.checkpoint.plan import ALIGN, CRC_BYTES, align
from resilience.errors import CorruptError

# Share of an older pack's bytes that must still be of use before it is kept for them: a small constant (a mask, a table
# of positions) must not keep a whole pack alive. A pack that is kept is at most four times what it saves.
WORTH = 0.25


@dataclass(frozen=True)
class Base:
    """What a rank's save left for the next one in the same tier.

    Attributes:
        draft: its layout in the arena.
        part: as it became durable; its chunks may be in another order.
        same: numbers of its chunks (in ``draft``) whose bytes were those of the save before it.
    """

    draft: Part
    part: Part
    same: frozenset[int] = frozenset()


def comparable(base: Base | None, draft: Part) -> bool:
    """Whether chunks of the two may be compared by number: the same rank of the same generation, the same layout,
    and a later step."""
    if base is None or base.draft.step >= draft.step:
        return False
    old = base.draft
    same = all(
        getattr(old, name) == getattr(draft, name) for name in ("run", "generation", "rank", "world_size")
    )
    return same and old.arrays == draft.arrays and old.chunks == draft.chunks


def before(base: Base) -> list[PartChunk]:
    """Where each chunk of ``base.draft`` lies, by its number: as in ``base.part``, with its CRC32C."""
    found = {(chunk.array, chunk.box_offset): chunk for chunk in base.part.chunks}
    return [found[chunk.array, chunk.box_offset] for chunk in base.draft.chunks]


def offered(base: Base) -> frozenset[int]:
    """Packs of ``base.part`` (0 its own, n its n-th link) that are worth to be named again.

    Known from the save before, because bytes are on their way to the device before the last of them is looked at:
    what has not changed is found by the second save, and left out from the third on.
    """
    useful = dict.fromkeys(range(1 + len(base.part.links)), 0)
    for number, chunk in enumerate(before(base)):
        if number in base.same:
            useful[chunk.pack] += chunk.length
    return frozenset(pack for pack, (_, size) in enumerate(base.part.packs) if useful[pack] >= WORTH * size)


def link_of(base: Base, pack: int) -> Link:
    """The name under which a pack of ``base.part`` goes on in the next checkpoint."""
    if pack:
        return base.part.links[pack - 1]
    return Link(link_name(base.part.rank, base.part.step, base.part.generation), base.part.size)


def assemble(
    draft: Part, sums: Sequence[tuple[int, bytes]], kept: Collection[int] = (), base: Base | None = None
) -> Part:
    """The part of a snapshot: the chunks ``kept`` in packs of ``base``, the others one after the other in its own.

    Args:
        sums: of each chunk, its CRC32C and running CRCs.
    """
    if base is None or not kept:
        return draft.with_crcs([crc for crc, _ in sums], [running for _, running in sums])
    old = before(base)
    order = sorted({old[number].pack for number in kept})
    index = {pack: place for place, pack in enumerate(order, 1)}
    chunks, offset = [], 0
    for number, (chunk, (crc, running)) in enumerate(zip(draft.chunks, sums, strict=True)):
        chunk = replace(chunk, crc32c=crc, running=running)
        if number in kept:
            chunks.append(replace(chunk, pack=index[old[number].pack], offset=old[number].offset))
        else:
            chunks.append(replace(chunk, offset=offset))
            offset += align(chunk.length + CRC_BYTES)
    return replace(
        draft,
        size=max(offset, ALIGN),
        chunks=tuple(sorted(chunks, key=lambda chunk: (chunk.pack, chunk.offset))),
        links=tuple(link_of(base, pack) for pack in order),
    )


def check_trained(base: Base, draft: Part, same: Collection[int], trained: Iterable[str]) -> None:
    """Refuse a snapshot that claims a later step with the optimizer's bytes of an earlier one.

    Peers have saved the same bytes for days, every save "successful", because a buffer was captured once and never
    again. An optimizer that stepped has changed its moments.

    Args:
        same: numbers of the chunks whose bytes are those of ``base``.
        trained: names above the arrays that have been trained since ``base``.

    Raises:
        CorruptError: all chunks of those arrays, and at least one, are the bytes of the earlier step.
    """
    above = tuple(f"{name}/" for name in trained)
    keys = [f"{draft.key(draft.arrays[chunk.array])}/" for chunk in draft.chunks]
    numbers = [number for number, key in enumerate(keys) if key.startswith(above)] if above else []
    if not numbers or any(number not in same for number in numbers):
        return
    raise CorruptError(
        f"the snapshot of step {draft.step} is stale: all {len(numbers)} chunks of the optimizer's state hold "
        f"the bytes of step {base.draft.step}",
        operation="persist",
        path=draft.pack_name,
        step=draft.step,
        generation=draft.generation,
        hint="check that the tracked objects are those that are trained, and that the optimizer steps at all; "
        "the checkpoint before is as good as this one",
    )
