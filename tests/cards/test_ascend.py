"""libdcmi through ctypes: a library of our own that answers from a file; and what is done without one."""

from __future__ import annotations

import subprocess
import sys

import pytest

B = ("module 0 1", "module 1 1")  # two 910B
C = ("module 0 2", "module 1 2")  # two 910C: four dies


@pytest.fixture
def dcmi(build, drive):
    def start(*visible: str):
        return drive("NPU", list(visible), LD_LIBRARY_PATH=str(build("dcmi.c", "libdcmi.so")))

    return start


def test_a_healthy_node_says_nothing(dcmi):
    cards = dcmi("0", "1")
    assert cards.poll(*B) == []
    assert cards.ask() == {"faults": [], "gaps": [], "probe": "DcmiCards"}


def test_a_code_is_told_when_it_appears_and_again_when_it_comes_back(dcmi):
    cards = dcmi("0", "1")
    assert cards.poll(*B, "health 1 0 2", "code 1 0 80C98008") == [(1, "80C98008")]
    assert cards.poll(*B, "health 1 0 2", "code 1 0 80C98008", "code 1 0 80E18402") == [(1, "80E18402")]
    assert cards.poll(*B) == []
    assert cards.poll(*B, "code 1 0 80C98008") == [(1, "80C98008")]


def test_a_fault_of_one_die_affects_the_other_die_of_its_module(dcmi):
    cards = dcmi("0", "1", "2", "3")
    answer = cards.ask(state="\n".join((*C, "code 1 0 80E18402")) + "\n")
    assert answer["faults"] == [[2, "80E18402", [3]]]


def test_a_module_with_one_die_affects_nobody(dcmi):
    answer = dcmi("0", "1").ask(state="\n".join((*B, "code 1 0 80E18402")) + "\n")
    assert answer["faults"] == [[1, "80E18402", []]]


def test_cards_are_the_devices_that_ray_was_given(dcmi):
    cards = dcmi("2", "3", "1")  # the order in which this process counts them
    answer = cards.ask(state="\n".join((*C, "code 1 1 80E18402", "code 0 0 80E18402", "code 0 1 1")) + "\n")
    assert answer["faults"] == [[1, "80E18402", [0]], [2, "00000001", []]]


def test_bad_health_without_a_code_has_a_name_of_ours(dcmi):
    cards = dcmi("0", "1")
    assert cards.poll(*B, "health 0 0 3", "health 1 0 1") == [
        (0, "npu-health-critical"),
        (1, "npu-health-minor"),
    ]


def test_a_device_that_is_not_there_any_more_is_lost(dcmi):
    cards = dcmi("0", "1")
    cards.poll(*B)
    assert cards.poll(*B, "absent 1 0") == [(1, "npu-lost")]
    assert cards.poll(*B, "absent 1 0") == []


def test_a_driver_that_does_not_answer_is_away_and_no_verdict(dcmi):
    cards = dcmi("0", "1")
    cards.poll(*B)
    answer = cards.ask(state="\n".join((*B, "fail dcmi_get_device_health -8012")) + "\n")
    assert "none of the cards" in answer["error"]
    assert cards.poll(*B) == []


def test_what_cannot_be_read_is_a_gap_and_the_last_word_stands(dcmi):
    cards = dcmi("0", "1")
    cards.poll(*B, "code 0 0 80C98008")
    assert cards.poll(*B, "fail dcmi_get_device_errorcode_v2 -8010") == []
    assert any("errorcode" in gap for gap in cards.ask()["gaps"])
    assert cards.poll(*B, "code 0 0 80C98008") == []


def test_a_device_that_the_library_does_not_list_is_a_gap(dcmi):
    cards = dcmi("0", "7")
    assert cards.poll(*B) == []
    assert "7" in cards.ask()["gaps"][0]


def test_a_driver_that_refuses_says_so(dcmi):
    answer = dcmi("0").ask(state="fail dcmi_init -8002\n")
    assert "dcmi_init failed with -8002" in answer["error"] and "hint" in answer["error"]


def test_without_library_and_tool_it_says_what_to_do(drive, tmp_path):
    code = (
        "import ctypes; from resilience.cards.ascend import LIBRARIES\n"
        "for path in LIBRARIES:\n"
        "    try: ctypes.CDLL(path)\n"
        "    except OSError: continue\n"
        "    raise SystemExit(0)\n"
        "raise SystemExit(1)"
    )
    if subprocess.run([sys.executable, "-c", code], check=False).returncode == 0:
        pytest.skip("this machine has libdcmi")
    answer = drive("NPU", ["0"], PATH=str(tmp_path)).ask()
    assert "neither libdcmi.so nor npu-smi" in answer["error"] and "hint" in answer["error"]
