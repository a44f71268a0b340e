"""Who has come how far: the progress pages of one generation, and when their silence means a hang.

Owns the newest page of every rank, by node, with the few sums that decisions need, so that a batch of pages
costs the same whatever the size of the world. Suspecting is one comparison; only blaming looks at every rank.
Thin: the two-stage verdict and learnt deadlines per section come with their own issue.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from resilience.control.persistent import Ranks, Vec
from resilience.control.types import Assignment, Policy, RankProgress

FIRST_STEPS = 3  # compilation, allocation and caches make them slow: no measure of the steps that follow
LONG = 10.0  # a named section may take this many hang floors

Page = tuple[float, dict[int, RankProgress]]


@dataclass(frozen=True)
class Pages:
    """The pages of one generation.

    Attributes:
        nodes: node → its place in ``pages``; made once per generation.
        pages: per node, when it reported and what.
        begun: ranks that have begun a step, or finished without one.
        finished: ranks whose function has returned; ``least``: the fewest steps one of them had completed,
            -1 while none has.
        first: step at which the generation began.
        top: highest step any rank has begun, i.e. steps completed before it.
        top_at: when ``top`` was reached.
        moved_at: newest sign of progress of any rank.
        away: ranks that are in a section other than ``step``.
        over: ranks that have left their loop (section ``end``): what comes then may take any time.
        stalled_s: longest total time a rank has waited for snapshots.
        step_s: smoothed time of one step, 0 while unknown.
        longest_s: longest step seen after the first ones.
    """

    nodes: dict[str, int] = field(default_factory=dict)
    pages: Vec[Page | None] = field(default_factory=lambda: Vec.filled(0, None))
    begun: Ranks = field(default_factory=Ranks)
    finished: Ranks = field(default_factory=Ranks)
    least: int = -1
    first: int = 0
    top: int = 0
    top_at: float = 0.0
    moved_at: float = 0.0
    away: int = 0
    over: int = 0
    stalled_s: float = 0.0
    step_s: float = 0.0
    longest_s: float = 0.0


def begin(nodes: Mapping[str, int] | dict[str, int], first: int, at: float) -> Pages:
    """Pages of a generation that starts at step ``first`` on ``nodes`` (name → place from 0)."""
    count = max(1, len(nodes))
    return Pages(dict(nodes), Vec.filled(count, None), first=first, top=first, top_at=at, moved_at=at)


def observe(
    pages: Pages, table: tuple[Assignment, ...], node: str, ranks: Mapping[int, RankProgress], at: float
) -> Pages:
    """One node's batch. An older batch than the one held, or a rank that is not there, changes nothing."""
    place = pages.nodes.get(node)
    if place is None:
        return pages
    held = pages.pages[place]
    if held is not None and at < held[0]:
        return pages
    before = held[1] if held else {}
    kept = dict(before)
    begun, top, top_at = pages.begun, pages.top, pages.top_at
    away, over = pages.away, pages.over
    moved_at, stalled_s = pages.moved_at, pages.stalled_s
    for rank, page in ranks.items():
        if not 0 <= rank < len(table) or table[rank].card.node != node:
            continue
        old = before.get(rank)
        away += _away(page) - (old is not None and _away(old))
        over += (page.section == "end") - (old is not None and old.section == "end")
        if page.step >= 0:
            begun = begun.add(rank)
        changed = at - page.age_s
        moved_at = max(moved_at, changed)
        if page.step > top:
            top, top_at = page.step, changed
        elif page.step == top:
            top_at = min(top_at, changed)
        stalled_s = max(stalled_s, page.stalled_s)
        kept[rank] = page
    pages = replace(
        pages,
        pages=pages.pages.set(place, (at, kept)),
        begun=begun,
        away=away,
        over=over,
        moved_at=moved_at,
        stalled_s=stalled_s,
    )
    return _advance(pages, top, top_at)


def reach(pages: Pages, step: int, at: float) -> Pages:
    """Another event says that ``step`` was reached."""
    return _advance(pages, step, at) if step > pages.top else pages


def finish(pages: Pages, rank: int, steps: int, at: float) -> Pages:
    """A rank's function returned after ``steps`` completed steps."""
    pages = replace(
        pages,
        begun=pages.begun.add(rank),
        finished=pages.finished.add(rank),
        least=steps if pages.least < 0 else min(pages.least, steps),
        moved_at=max(pages.moved_at, at),
    )
    return reach(pages, steps, at)


def quiet_s(policy: Policy, pages: Pages) -> float:
    """How long the world may stand still before it is suspected."""
    floor = max(policy.hang_floor_s, policy.hang_factor * pages.longest_s)
    early = pages.top < pages.first + FIRST_STEPS
    past = pages.over or pages.finished.count
    # Only where nobody is left in a loop: a rank that is may wait for ever for one that has gone.
    if past and all(rank in pages.finished or page.section == "end" for rank, page in everyone(pages)):
        return math.inf
    if past or pages.away or early:
        return max(floor, LONG * policy.hang_floor_s)
    return floor


def suspect(policy: Policy, pages: Pages, now: float) -> bool:
    """Whether nobody has moved for too long, and every node has said so: where reports are late, be it that the
    supervisor itself stood still, nothing is known of the ranks."""
    if now - pages.moved_at <= policy.hang_floor_s:
        return False
    still_s = min(now, _heard_at(pages)) - pages.moved_at
    return still_s > policy.hang_floor_s and (
        still_s > quiet_s(policy, pages)
        # A stopped process needs no guess at how long a step may be. Looked for only in a long silence.
        or (still_s > policy.hang_factor * pages.longest_s and bool(stopped(pages)))
    )


def _heard_at(pages: Pages) -> float:
    """The oldest of the nodes' newest reports; nodes whose ranks have all finished have nothing more to report."""
    running = (held for held in pages.pages if held and any(rank not in pages.finished for rank in held[1]))
    return min((at for at, _ranks in running), default=math.inf)


def stopped(pages: Pages) -> tuple[int, ...]:
    """Ranks whose process the kernel has stopped, in order."""
    return tuple(sorted(rank for rank, page in everyone(pages) if page.state == "T"))


def everyone(pages: Pages) -> list[tuple[int, RankProgress]]:
    return [(rank, page) for held in pages.pages if held for rank, page in held[1].items()]


def blame(pages: Pages) -> tuple[int | None, float, str]:
    """Rank to blame for a hang (``None`` = unknown), confidence, and why, as a sentence."""
    halted = stopped(pages)
    if halted:
        return halted[0], 1.0, f"the process of rank {halted[0]} is stopped (state T)"
    running = [(page.step, rank) for rank, page in everyone(pages) if rank not in pages.finished]
    if running:
        lowest = min(running)[0]
        behind = [rank for step, rank in running if step == lowest]
        if len(behind) < len(running) and len(behind) == 1:
            return behind[0], 0.6, f"rank {behind[0]} stands at step {lowest}, the others are ahead"
        if len(behind) < len(running):
            return None, 0.0, f"ranks {some(behind)} stand at step {lowest}, the others are ahead"
        return None, 0.0, f"all ranks stand at step {lowest}"
    return None, 0.0, "no rank has reported progress"


def _advance(pages: Pages, top: int, top_at: float) -> Pages:
    if top <= pages.top:
        return pages
    took = max(0.0, top_at - pages.top_at) / (top - pages.top)
    step_s, longest_s = pages.step_s, pages.longest_s
    if pages.top >= pages.first + FIRST_STEPS:
        longest_s = max(longest_s, took)
        step_s = took if not step_s else step_s + 0.3 * (took - step_s)
    return replace(pages, top=top, top_at=max(pages.top_at, top_at), step_s=step_s, longest_s=longest_s)


def _away(page: RankProgress) -> bool:
    return page.section != "step" and page.step >= 0


def some(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (" …" if len(ranks) > 8 else "")
