"""How often to checkpoint when the user did not say: as often as the measured cost allows.

Owns one number, the interval, and the step to ask for. With ``Policy.checkpoint_every`` set the ranks
checkpoint by themselves and nothing here is used. The first checkpoint comes early, to have something to
measure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from resilience.control.progress import FIRST_STEPS, Pages
from resilience.control.retention import SHARED
from resilience.control.saves import Saves
from resilience.control.types import Policy

MESSAGE_S = 1.0  # age of the newest step known here (one progress report a second) plus the way to the ranks
_GIVE_UP_S = 30.0  # a posted checkpoint of which nothing was heard this long is taken as not made


@dataclass(frozen=True)
class Cadence:
    """What checkpoints of this run have cost, and the one that was asked for last.

    Attributes:
        stall_s: what training waited for the newest one, at most over its ranks.
        durable_s: its first seal to its last commit.
        since: when the newest one was sealed by its first rank; 0.0 = none yet in this generation.
        posted: step asked for and not yet sealed by every rank; ``None`` = none.
        posted_at: when.
        widen: factor on the margin, doubled by every miss, halved by every hit.
    """

    stall_s: float = 0.0
    durable_s: float = 0.0
    since: float = 0.0
    posted: int | None = None
    posted_at: float = 0.0
    widen: int = 1


def margin(pages: Pages, widen: int = 1) -> int:
    """Steps between the newest step known here and the one to ask for, so that no rank has passed it when the
    message arrives: what a rank can do in ``MESSAGE_S``, and one."""
    if pages.step_s <= 0.0:
        return 2 * widen
    return (math.ceil(MESSAGE_S / pages.step_s) + 1) * widen


def interval_s(policy: Policy, cadence: Cadence, step_s: float) -> float:
    """Seconds between checkpoints: the stall costs at most ``overhead`` of the time, the previous one is
    durable before the next begins, and no more than one a step."""
    return max(cadence.stall_s / max(policy.overhead, 1e-9), cadence.durable_s, step_s)


def due(policy: Policy, cadence: Cadence, pages: Pages, now: float) -> bool:
    """Whether to ask for a checkpoint now."""
    if policy.checkpoint_every is not None or pages.step_s <= 0.0:
        return False
    interval = interval_s(policy, cadence, pages.step_s)
    if cadence.posted is not None:
        return now - cadence.posted_at > _GIVE_UP_S + interval
    if not cadence.since:
        return pages.top >= pages.first + FIRST_STEPS
    # What is asked for now is made a margin of steps later.
    return now - cadence.since >= interval - margin(pages, cadence.widen) * pages.step_s


def post(cadence: Cadence, step: int, now: float) -> Cadence:
    return replace(cadence, posted=step, posted_at=now)


def missed(cadence: Cadence) -> Cadence:
    """A rank had passed the posted step: ask again, farther ahead."""
    return replace(cadence, posted=None, widen=min(cadence.widen * 2, 1 << 10))


def sealed(cadence: Cadence, step: int, since: float, stall_s: float, whole: bool) -> Cadence:
    """A rank sealed ``step``; ``whole``: every rank has."""
    cadence = replace(cadence, since=max(cadence.since, since), stall_s=stall_s)
    if whole and cadence.posted is not None and step >= cadence.posted:
        return replace(cadence, posted=None, widen=max(1, cadence.widen // 2))
    return cadence


def failed(cadence: Cadence, step: int, now: float) -> Cadence:
    """A save failed: the next one comes an interval later, not at once."""
    if cadence.posted is not None and step >= cadence.posted:
        return replace(cadence, posted=None, since=max(cadence.since, now))
    return cadence


def durable(cadence: Cadence, tier: str, seconds: float) -> Cadence:
    """A commit came ``seconds`` after the first seal. The shared tier's is the measure; a nearer one only a
    bound."""
    return replace(cadence, durable_s=seconds if tier == SHARED else max(cadence.durable_s, seconds))


def busy(saves: Saves, cadence: Cadence, now: float) -> bool:
    """Whether the newest save is still on its way to the shared tier, and for no suspiciously long time."""
    if not saves.steps:
        return False
    save = saves.steps[max(saves.steps)]
    shared = save.tiers.get(SHARED)
    settled = save.closed or (shared is not None and (shared.done or shared.failed))
    return not settled and now - save.since < max(_GIVE_UP_S, 3.0 * cadence.durable_s)


def begin(cadence: Cadence) -> Cadence:
    """A new generation: what things cost is still known, what was asked for is not."""
    return replace(cadence, since=0.0, posted=None)
