"""Faults fire at their place, by count, once."""

from resilience.runtime.failpoint import Failpoints


def fault(index, **at):
    return {"index": index, "action": "kill", "at": at}


def test_a_fault_fires_at_its_place_and_only_once():
    fired = []
    points = Failpoints([fault(0, point="step", rank=2, step=30)], lambda f: fired.append(f["index"]))
    points.reach("step", rank=1, step=30)
    points.reach("step", rank=2, step=29)
    points.reach("log", rank=2, step=30)
    assert fired == []
    points.reach("step", rank=2, step=30)
    points.reach("step", rank=2, step=30)
    assert fired == [0]
    assert not points


def test_count_waits_for_the_nth_time_that_everything_matches():
    fired = []
    points = Failpoints([fault(0, point="pack.chunk", step=40, count=3)], lambda f: fired.append(f["index"]))
    for step in (40, 41, 40, 42, 40):
        assert fired == []
        points.reach("pack.chunk", rank=0, step=step, tier="nvme")
    assert fired == [0]


def test_an_unarmed_set_is_falsy_so_that_product_code_pays_one_test():
    assert not Failpoints([], lambda f: None)
    assert Failpoints([fault(0, point="step")], lambda f: None)
