"""Which devices a node's cards are, and who reads them."""

import pytest

from resilience.cards.probe import devices, open_probe


@pytest.mark.parametrize(
    ("kind", "environ", "expected"),
    [
        ("GPU", {}, ["0", "1"]),
        ("GPU", {"CUDA_VISIBLE_DEVICES": "4,5"}, ["4", "5"]),
        ("GPU", {"CUDA_VISIBLE_DEVICES": " GPU-a , GPU-b "}, ["GPU-a", "GPU-b"]),
        ("GPU", {"CUDA_VISIBLE_DEVICES": "4"}, ["0", "1"]),  # not what Ray gave us: it names too few
        ("GPU", {"ASCEND_RT_VISIBLE_DEVICES": "4,5"}, ["0", "1"]),
        ("NPU", {"ASCEND_RT_VISIBLE_DEVICES": "6,7"}, ["6", "7"]),
        ("card", {"CUDA_VISIBLE_DEVICES": "4,5"}, ["0", "1"]),
    ],
)
def test_cards_are_the_devices_ray_was_given(kind, environ, expected):
    assert devices(kind, 2, environ) == expected


def test_simulated_cards_have_no_driver():
    assert open_probe("card", ["0"]) is None
    assert open_probe("my-resource", ["0"]) is None
