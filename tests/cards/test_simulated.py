"""Simulated cards fail when told, and say so once."""

from resilience.cards.health import CardFault
from resilience.cards.simulated import SimulatedCards


def test_a_fault_is_reported_once_with_its_code():
    cards = SimulatedCards()
    assert cards.poll() == []
    cards.fail(1, "80E01801", "HBM")
    cards.fail(0)
    assert cards.poll() == [CardFault(1, "80E01801", "HBM"), CardFault(0, "simulated")]
    assert cards.poll() == []
