"""What failures cost: lost steps, times to recover, ETTR as measured and as expected. Pure arithmetic.

Owns the formulas and their sources. ETTR, the effective training time ratio, is productive time over wall
time; steps computed a second time are not productive. All times in seconds, all rates per second.

Sources: "Meta" is Kokolis et al., "Revisiting Reliability in Large-Scale Machine Learning Research Clusters",
HPCA 2025; "Young" is J. W. Young, CACM 17(9), 1974; "Daly" is J. T. Daly, FGCS 22(3), 2006.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from resilience.control.types import Incident

PHASES = ("detect", "decide", "fence", "start", "restore", "first_step")
_ENDS = ("failed", "detected", "decided", "fenced", "started", "restored", "first_step")


def phases(incident: Incident) -> dict[str, float]:
    """Seconds of each phase of a recovered incident. A moment that was never reached ends where the one
    before it did, so that the phases always add up to the time from failure to first step."""
    lengths = {}
    before = incident.at.get("failed", 0.0)
    for name, end in zip(PHASES, _ENDS[1:], strict=True):
        now = max(before, incident.at.get(end, before))
        lengths[name] = now - before
        before = now
    return lengths


def lost_steps(incident: Incident) -> int:
    """Steps the failed generation had completed beyond the one restored: they are computed twice. 0 while the
    restored step is unknown."""
    if incident.step_restored is None:
        return 0
    return max(0, incident.step_failed - max(incident.step_restored, incident.step_began))


def recovery_s(incident: Incident) -> float:
    """Failure to first new step."""
    return sum(phases(incident).values())


def mttr(incidents: Sequence[Incident]) -> float:
    """Mean time to recovery over recovered incidents; 0.0 without any."""
    times = [recovery_s(each) for each in incidents if "first_step" in each.at]
    return sum(times) / len(times) if times else 0.0


@dataclass(frozen=True)
class Ledger:
    """The account of a run.

    Attributes:
        wall_s: first start to end.
        lost_steps: steps computed more than once.
        recomputed_s: seconds spent on them.
        down_s: seconds without a generation that steps (overlapping incidents counted once).
        stall_s: seconds training waited for snapshots.
        productive_s: what is left of ``wall_s``.
        mttr_s: mean time to recovery.
        ettr: ``productive_s / wall_s``.
    """

    wall_s: float
    lost_steps: int
    recomputed_s: float
    down_s: float
    stall_s: float
    productive_s: float
    mttr_s: float
    ettr: float


def account(
    incidents: Sequence[Incident], *, wall_s: float, step_s: float, stall_s: float = 0.0, start_s: float = 0.0
) -> Ledger:
    """The measured account: wall time less start, down time, recomputed steps and stalls. ``start_s`` is what
    passed before the first step of the first generation."""
    lost = sum(lost_steps(each) for each in incidents)
    recomputed = lost * step_s
    down = _covered(
        (each.at["failed"], each.at["first_step"]) for each in incidents if "first_step" in each.at
    )
    productive = max(0.0, wall_s - start_s - down - recomputed - stall_s)
    ettr = productive / wall_s if wall_s > 0 else 0.0
    return Ledger(wall_s, lost, recomputed, down, stall_s, productive, mttr(incidents), ettr)


def goodput(ettr: float, throughput: float, reference: float) -> float:
    """ETTR times throughput relative to a reference (any unit, the same for both)."""
    return ettr * throughput / reference


def failure_rate(nodes: int, per_node: float) -> float:
    """λ = N·r_f, failures of the whole job (Meta). 1/λ is its MTTF."""
    return nodes * per_node


def posterior_rate(failures: int, seconds: float, prior_failures: float, prior_seconds: float) -> float:
    """Rate after ``failures`` in ``seconds``, with a Gamma prior worth ``prior_failures`` in
    ``prior_seconds`` (textbook conjugate; recovery.md 5.1 proposes it)."""
    return (failures + prior_failures) / (seconds + prior_seconds)


def expected_ettr(rate: float, *, restart_s: float, interval_s: float, write_s: float) -> float:
    """E[ETTR] ≈ (1 - λ(u₀ + Δ/2)) / (1 + w/Δ), clipped to 0..1 (Meta, small-loss closed form).

    ``restart_s`` u₀: detection and restart; ``interval_s`` Δ: between checkpoints; ``write_s`` w: what one
    checkpoint makes training wait. Good while λ(u₀ + Δ) is well below 1.
    """
    value = (1.0 - rate * (restart_s + interval_s / 2)) / (1.0 + write_s / interval_s)
    return min(1.0, max(0.0, value))


def young(write_s: float, rate: float) -> float:
    """Best interval to first order: √(2w/λ) (Young). Infinite without failures."""
    return math.sqrt(2.0 * write_s / rate) if rate > 0 else math.inf


def daly(write_s: float, mttf_s: float) -> float:
    """Best interval to higher order (Daly, eq. 37): √(2wM)·[1 + ⅓·√(w/2M) + (w/2M)/9] - w for w < 2M, else
    M."""
    if write_s >= 2.0 * mttf_s:
        return mttf_s
    ratio = write_s / (2.0 * mttf_s)
    return math.sqrt(2.0 * write_s * mttf_s) * (1.0 + math.sqrt(ratio) / 3.0 + ratio / 9.0) - write_s


def best_interval(write_s: float, rate: float, drain_s: float) -> float:
    """Young's interval, never below the time a checkpoint takes to be durable (asynchronous saves)."""
    return max(young(write_s, rate), drain_s)


def expected_wall(interval_s: float, *, write_s: float, restart_s: float, mttf_s: float) -> float:
    """E[wall]/work with exponential failures: (M/Δ)·e^(R/M)·(e^((Δ+w)/M) - 1) (Daly, complete cost
    function)."""
    return (mttf_s / interval_s) * math.exp(restart_s / mttf_s) * math.expm1((interval_s + write_s) / mttf_s)


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of ``spans``."""
    total, reached = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
