"""Making news of conditions that last."""

from resilience.cards.health import Levels


def test_what_is_there_is_told_once_and_again_after_it_was_gone():
    clock = [0.0]
    levels = Levels(lambda: clock[0])
    for now, told in [("ab", "ab"), ("ab", ""), ("b", ""), ("ab", "a"), ("", ""), ("b", "b")]:
        clock[0] += 1
        assert levels.appeared(now) == list(told)


def test_what_comes_back_within_the_hold_is_the_same():
    clock = [0.0]
    levels = Levels(lambda: clock[0], hold_s=60)
    for at, now, told in [
        (0, "a", "a"),
        (1, "", ""),
        (50, "a", ""),
        (51, "", ""),
        (111, "a", "a"),
        (999, "a", ""),
    ]:
        clock[0] = at
        assert levels.appeared(now) == list(told)
