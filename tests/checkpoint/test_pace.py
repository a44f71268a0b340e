"""The bound on a rate: kept over any pieces, and never caught up with."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from resilience.checkpoint.pace import Pace


@given(
    st.lists(
        st.tuples(st.floats(0, 5), st.integers(1, 1000)),
        min_size=1,
        max_size=40,
    )
)
def test_no_stretch_of_time_has_more_than_its_bytes(pieces: list[tuple[float, int]]) -> None:
    """Each piece moves in no time at all, after a pause of any length."""
    now, moved = [0.0], []
    pace = Pace(100.0, clock=lambda: now[0], sleep=lambda seconds: now.__setitem__(0, now[0] + seconds))
    for pause, count in pieces:
        now[0] += pause
        began = now[0]
        pace(count)
        moved.append((began, now[0], count))
    for first, (began, _, _) in enumerate(moved):
        total = 0
        for _, ended, count in moved[first:]:
            total += count
            # The first piece may have used the time that passed before it, up to its own share.
            assert total <= 100.0 * (ended - began) + moved[first][2] + 1e-6


def test_time_that_the_bytes_took_themselves_counts_and_no_bound_waits_for_nothing() -> None:
    now, slept = [0.0], []
    pace = Pace(100.0, clock=lambda: now[0], sleep=slept.append)
    for _ in range(5):
        now[0] += 2.0  # slower than the bound by itself
        pace(100)
    assert slept == []
    free = Pace(None, clock=lambda: now[0], sleep=slept.append)
    free(1 << 40)
    assert slept == []
