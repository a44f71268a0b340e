"""NVML as the real binding loads it: a library of our own that answers from a file; and the real one, where it is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TWO = "cards 2"


@pytest.fixture
def nvml(build, drive):
    def start(*visible: str, flags: tuple[str, ...] = ()):
        path = build("nvml.c", "libnvidia-ml.so.1", *flags)
        return drive("GPU", list(visible or ("0", "1")), LD_LIBRARY_PATH=str(path))

    return start


def test_a_healthy_node_says_nothing(nvml):
    cards = nvml()
    assert cards.poll(TWO) == []
    assert cards.ask()["gaps"] == []


def test_xids_are_told_once_each_with_their_card(nvml):
    cards = nvml()
    cards.poll(TWO)
    assert cards.poll(TWO, "xid 1 79", "xid 0 94") == [(1, "79"), (0, "94")]
    assert cards.poll(TWO, "xid 1 79", "xid 0 94") == []
    assert cards.poll(TWO, "xid 1 79", "xid 0 94", "xid 0 94") == [(0, "94")]


def test_a_flood_of_events_is_read_in_parts(nvml):
    cards = nvml()
    cards.poll(TWO)
    flood = ["xid 0 13"] * 300
    assert len(cards.poll(TWO, *flood)) == 256
    assert len(cards.poll(TWO, *flood)) == 44


def test_events_of_a_card_that_is_not_ours_are_dropped(nvml):
    cards = nvml("1")
    cards.poll(TWO)
    assert cards.poll(TWO, "xid 0 79", "xid 1 95") == [(0, "95")]


def test_cards_may_be_named_by_uuid(nvml):
    cards = nvml("GPU-aa-1", "GPU-aa-0")
    cards.poll(TWO)
    assert cards.poll(TWO, "xid 0 95") == [(1, "95")]


def test_a_card_that_falls_off_the_bus_is_lost_once_and_the_others_are_read_on(nvml):
    cards = nvml()
    cards.poll(TWO)
    assert cards.poll(TWO, "lost 1") == [(1, "nvml-lost")]
    assert cards.poll(TWO, "lost 1", "recovery 0 1") == [(0, "nvml-recovery-gpu-reset")]


def test_a_card_that_is_gone_before_we_begin_is_lost(nvml):
    cards = nvml()
    assert cards.poll(TWO, "lost 1") == [(1, "nvml-lost")]


def test_a_card_that_must_be_reset_says_so(nvml):
    cards = nvml()
    cards.poll(TWO)
    assert (0, "nvml-reset-required") in cards.poll(TWO, "reset 0") + cards.poll(TWO, "reset 0")


@pytest.mark.parametrize(
    ("state", "code"),
    [
        ("recovery 0 2", "nvml-recovery-node-reboot"),
        ("recovery 0 4", "nvml-recovery-drain-and-reset"),
        ("recovery 0 99", "nvml-recovery-99"),
        ("rows 0 0 1 0", "nvml-remap-pending"),
        ("rows 0 0 0 1", "nvml-remap-failed"),
        ("slow 0 64", "nvml-slowdown-hw-thermal"),
        ("slow 0 128", "nvml-slowdown-hw-power-brake"),
    ],
)
def test_what_lasts_is_told_when_it_begins_even_before_us(nvml, state, code):
    cards = nvml()
    assert cards.poll(TWO, state) == [(0, code)]
    assert cards.poll(TWO, state) == []
    assert cards.poll(TWO) == []
    again = cards.poll(TWO, state)
    assert again == ([] if code.startswith("nvml-slowdown") else [(0, code)])
    cards.poll(TWO)
    assert cards.poll(TWO, state, advance=61) == [(0, code)]


def test_slowdowns_that_are_no_fault_are_not_told(nvml):
    assert nvml().poll(TWO, "slow 0 5") == []  # idle, power cap


def test_counters_are_told_when_they_grow_not_where_they_stand(nvml):
    cards = nvml()
    assert cards.poll(TWO, "ecc 0 3 5", "rows 1 2 0 0") == []
    assert cards.poll(TWO, "ecc 0 4 6", "rows 1 3 0 0") == [
        (0, "nvml-ecc-uncorrectable"),
        (0, "nvml-ecc-uncorrectable-lifetime"),
        (1, "nvml-rows-remapped"),
    ]
    assert cards.poll(TWO, "ecc 0 0 6", "rows 1 3 0 0") == []  # the driver was loaded anew


@pytest.mark.parametrize(
    ("function", "gap"),
    [
        ("nvmlDeviceRegisterEvents", "XID events"),
        ("nvmlDeviceGetTotalEccErrors", "ECC errors"),
        ("nvmlDeviceGetRemappedRows", "remapped rows"),
        ("nvmlDeviceGetFieldValues", "the recovery action"),
        ("recovery", "the recovery action"),
        ("nvmlDeviceGetCurrentClocksEventReasons", "slowdown reasons"),
    ],
)
def test_what_a_card_does_not_tell_is_a_gap_and_the_rest_is_read(nvml, function, gap):
    cards = nvml()
    cards.poll(TWO, f"without {function}")
    (told,) = cards.ask()["gaps"]
    assert gap in told
    assert cards.poll(TWO, f"without {function}", "lost 1") == [(1, "nvml-lost")]


def test_older_drivers_call_slowdowns_by_another_name(nvml):
    cards = nvml(flags=("-DOLD_DRIVER",))
    assert cards.poll(TWO, "slow 0 64") == [(0, "nvml-slowdown-hw-thermal")]


def test_without_a_library_it_says_what_to_do(drive, tmp_path):
    code = "import ctypes; ctypes.CDLL('libnvidia-ml.so.1')"
    if subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0:
        pytest.skip("this machine has NVML")
    answer = drive("GPU", ["0"]).ask()
    assert "NVML" in answer["error"] and "hint" in answer["error"]


def test_the_real_nvml(tmp_path):
    """On a machine with NVIDIA cards: the real library answers, and a healthy card has nothing to say."""
    code = (
        "import json, pynvml\n"
        "from resilience.cards.nvidia import NvidiaCards\n"
        "pynvml.nvmlInit()\n"
        "count = pynvml.nvmlDeviceGetCount()\n"
        "cards = NvidiaCards([str(i) for i in range(count)])\n"
        "faults = cards.poll() + cards.poll()\n"
        "print(json.dumps([count, [[f.index, f.code, f.detail] for f in faults], cards.gaps()]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode and "NVMLError" in done.stderr:
        pytest.skip(f"no NVIDIA card at hand: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    count, faults, gaps = json.loads(done.stdout)
    print("cards", count, "faults", faults, "gaps", gaps)
    assert count > 0
    from resilience.cards.codes import FaultCodes

    codes = FaultCodes.over({})
    assert all(codes.find(code) is not None for _, code, _ in faults), faults
