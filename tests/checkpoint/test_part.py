"""Parts with links: chunks that lie in older packs under a second name."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from resilience.checkpoint.part import Link, Part, draft, link_name
from resilience.checkpoint.plan import plan, specs
from resilience.checkpoint.tree import flatten
from resilience.errors import CorruptError


def linked() -> Part:
    """Two chunks: one in the pack, one in an older one."""
    arrays, skeleton = flatten({"a": np.zeros(3), "b": np.ones(5)}, prefix="")
    part = draft(plan(specs(arrays), rank=3, world_size=4), skeleton, run="r", step=9, generation=2)
    one, two = part.with_crcs([1, 2]).chunks
    return replace(
        part,
        size=4096,
        chunks=(one, replace(two, pack=1, offset=8192)),
        links=(Link(link_name(3, 6, 1), 16384),),
    )


def test_links_come_back_and_say_where_chunks_lie() -> None:
    part = linked()
    part.check()
    back = Part.decode(part.encode(), path="p")
    assert back == part
    assert [back.pack_of(chunk) for chunk in back.chunks] == [
        "checkpoints/step-9-g2/rank-3.pack",
        "checkpoints/step-9-g2/rank-3.from-step-6-g1.pack",
    ]
    assert back.packs == (
        ("checkpoints/step-9-g2/rank-3.pack", 4096),
        ("checkpoints/step-9-g2/rank-3.from-step-6-g1.pack", 16384),
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"links": (Link("../../secret.pack", 16384),)},
        {"links": (Link("rank-3.from-step-6-g1.pack", 8192),)},  # the chunk ends behind it
        {"links": ()},
    ],
)
def test_links_that_cannot_be_are_damage(wrong: dict[str, tuple[Link, ...]]) -> None:
    with pytest.raises(CorruptError):
        Part.decode(replace(linked(), **wrong).encode(), path="p")
