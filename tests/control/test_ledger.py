"""The formulas against the worked figures of their sources, and the account of a run by hand."""

from __future__ import annotations

import math

import pytest

from resilience.control import ledger
from resilience.control.types import Incident

DAY = 86400.0
RATE = 14000 * 0.3e-3 / DAY  # 0.3 per mille a card and day, 14,000 cards


def incident(start, lengths, failed=43, restored=40, began=0):
    ends = ("failed", "detected", "decided", "fenced", "started", "restored", "first_step")
    at, now = {"failed": start}, start
    for end, length in zip(ends[1:], lengths, strict=False):
        now += length
        at[end] = now
    return Incident(
        "1-1", "signal", "", 1, step_failed=failed, step_restored=restored, step_began=began, at=at
    )


@pytest.mark.parametrize(
    ("restart_s", "write_s", "published"),
    [(900, 20, 0.914), (180, 20, 0.948), (180, 1, 0.982), (60, 1, 0.987)],
)
def test_expected_ettr_at_14000_cards(restart_s, write_s, published):
    best = ledger.young(write_s, RATE)
    value = ledger.expected_ettr(RATE, restart_s=restart_s, interval_s=best, write_s=write_s)
    assert value == pytest.approx(published, abs=6e-4)


def test_failure_rate_of_the_cluster():
    assert 1 / ledger.failure_rate(14000, 0.3e-3 / DAY) / 3600 == pytest.approx(5.7, abs=0.05)


def test_young_and_daly():
    assert ledger.young(20, RATE) / 60 == pytest.approx(15.1, abs=0.05)
    assert ledger.young(1, RATE) / 60 == pytest.approx(3.4, abs=0.05)
    assert ledger.young(20, 0.0) == math.inf
    mttf = 1 / RATE
    assert ledger.daly(20, mttf) == pytest.approx(ledger.young(20, RATE), rel=0.02)
    assert ledger.daly(2 * mttf, mttf) == mttf
    assert ledger.best_interval(1, RATE, drain_s=600) == 600


def test_daly_is_the_minimum_of_the_complete_cost():
    mttf, write = 3600.0, 60.0
    best = ledger.daly(write, mttf)
    cost = [
        ledger.expected_wall(best * factor, write_s=write, restart_s=120, mttf_s=mttf)
        for factor in (0.8, 1, 1.25)
    ]
    assert cost[1] == min(cost)


def test_posterior_moves_from_the_prior_to_the_data():
    assert ledger.posterior_rate(0, 0, 1, 100) == pytest.approx(0.01)
    assert ledger.posterior_rate(1000, 1000, 1, 100) == pytest.approx(1.0, abs=0.1)


def test_phases_add_up_even_where_a_moment_is_missing():
    whole = incident(10.0, (0.1, 0.2, 0.3, 0.4, 0.5, 0.6))
    assert list(ledger.phases(whole).values()) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    del whole.at["restored"]
    assert ledger.phases(whole)["restore"] == 0
    assert ledger.recovery_s(whole) == pytest.approx(2.1)


def test_lost_steps():
    assert ledger.lost_steps(incident(0, ())) == 3
    assert ledger.lost_steps(incident(0, (), restored=None)) == 0
    # Two incidents in one recovery: the first counts what it lost down to the older checkpoint, the second only
    # what its own generation had computed.
    assert ledger.lost_steps(incident(0, (), failed=43, restored=30)) == 13
    assert ledger.lost_steps(incident(0, (), failed=40, restored=30, began=40)) == 0


def test_account():
    one = incident(100.0, (0, 0, 1, 1, 1, 1), failed=43, restored=40)
    two = incident(102.0, (0, 0, 0, 0, 1, 1), failed=40, restored=40, began=40)  # within the first
    made = ledger.account([one, two], wall_s=200.0, step_s=2.0, stall_s=1.0, start_s=3.0)
    assert made.down_s == pytest.approx(4.0)
    assert made.lost_steps == 3
    assert made.recomputed_s == pytest.approx(6.0)
    assert made.productive_s == pytest.approx(200 - 3 - 4 - 6 - 1)
    assert made.ettr == pytest.approx(0.93)
    assert made.mttr_s == pytest.approx(3.0)
    assert ledger.mttr([]) == 0.0
    assert ledger.goodput(made.ettr, 90.0, 100.0) == pytest.approx(0.837)
