"""Which checkpoint a new generation restores: the newest that can be read, or none only when none was ever
kept.

Owns the rule that a run never starts from scratch when a checkpoint is recorded. Every candidate passed over
is named with its reason.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

from resilience.control.retention import NVME, SHARED
from resilience.control.types import Candidate, CheckpointRef

Place = tuple[CheckpointRef, str]  # a checkpoint in a tier


@dataclass(frozen=True)
class Choice:
    """``candidate`` to restore (``None``: from scratch), what was ``skipped`` and why; or, when there is
    nothing to restore although something was kept, ``stuck``: the reason to stop."""

    candidate: Candidate | None
    skipped: tuple[tuple[Candidate, str], ...] = ()
    stuck: str = ""
    warning: str = ""


def choose(
    candidates: Sequence[Candidate],
    *,
    damaged: Mapping[Place, str],
    unread: Mapping[Place, str],
    nodes: Container[str],
    unusable: Sequence[Candidate] = (),
) -> Choice:
    """The first candidate that is not damaged, not unread and, in the nvme tier, whose hosts are all alive.

    ``damaged``: failed to restore for good; ``unread``: could not be read last time, tried again when nothing
    else is left; ``unusable``: recorded, but quarantined in the log. Checkpoints that lay on lost nodes only
    and never reached the shared tier are gone with them: if there never were others, the run begins again,
    with a warning.
    """
    skipped: list[tuple[Candidate, str]] = []
    again: Candidate | None = None
    gone = True
    for candidate in candidates:
        place = (candidate.ref, candidate.tier)
        away = (
            sorted({host for host in candidate.hosts if host not in nodes}) if candidate.tier == NVME else []
        )
        if place in damaged:
            skipped.append((candidate, f"damaged: {damaged[place]}"))
            gone = False
        elif away:
            skipped.append((candidate, f"its packs lie on {', '.join(away[:4])}, lost"))
            gone = gone and candidate.tier != SHARED
        elif place in unread:
            skipped.append((candidate, f"could not be read last time: {unread[place]}"))
            gone = False
            again = again or candidate
        else:
            return Choice(candidate, tuple(skipped))
    if again is not None:
        return Choice(again, tuple(each for each in skipped if each[0] != again))
    if not candidates and not unusable and not damaged:
        return Choice(None)
    if not gone or unusable or damaged:
        places = [*damaged, *((each.ref, each.tier) for each in (*candidates, *unusable))]
        bad = [f"{ref} ({tier})" for ref, tier in dict.fromkeys(places)]
        return Choice(
            None,
            tuple(skipped),
            stuck=f"checkpoints are recorded but none can be restored: {', '.join(bad[:6])}; "
            "a run does not start from scratch over them",
        )
    newest = max(candidate.ref.step for candidate in candidates)
    return Choice(
        None,
        tuple(skipped),
        warning=f"step {newest} was only in the nvme tier of nodes that are lost, never in the shared one: "
        "the run begins from scratch",
    )
