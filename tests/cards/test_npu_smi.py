"""The text of ``npu-smi``, from a tool of our own on the PATH that prints what the real ones print."""

from __future__ import annotations

import os
import stat

import pytest

from resilience.cards.npu_smi import Chip, parse_health, parse_info

HEAD_B = """\
+------------------------------------------------------------------------------------------------+
| npu-smi 24.1.1                   Version: 24.1.1                                               |
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
"""
ROW_B = """\
| {npu}     910B4               | {health:13} | 88.2        30                0    / 0             |
| 0                         | 0000:C{npu}:00.0  | 0           0    / 0          26838/ 32768         |
+===========================+===============+====================================================+
"""
HEAD_C = """\
+------------------------------------------------------------------------------------------------+
| npu-smi 25.2.1                   Version: 25.2.1                                               |
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip  Phy-ID              | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
"""
ROW_C = """\
| {npu}     Ascend910           | {health:13} | {power:11} 38                0    / 0             |
| {chip}     {phy}                   | 0000:9{phy}:00.0  | 0           0    / 0          3131 / 65536         |
+------------------------------------------------------------------------------------------------+
"""
PROCESSES = """\
+---------------------------+---------------+----------------------------------------------------+
| NPU     Chip              | Process id    | Process name             | Process memory(MB)      |
+===========================+===============+====================================================+
| 0       0                 | 4242          | python3                  | 1024                    |
+===========================+===============+====================================================+
| No running processes found in NPU 1                                                            |
+===========================+===============+====================================================+
"""


def table_b(*healths: str) -> str:
    return HEAD_B + "".join(ROW_B.format(npu=i, health=h) for i, h in enumerate(healths)) + PROCESSES


def table_c(*healths: str) -> str:
    rows = (
        ROW_C.format(npu=i // 2, chip=i % 2, phy=i, health=h, power="166.5" if i % 2 == 0 else "-")
        for i, h in enumerate(healths)
    )
    return HEAD_C + "".join(rows) + PROCESSES


HEALTH = """\
        NPU ID                         : {npu}
        Chip ID                        : {chip}
        Health                         : Alarm
        Error Code                     : {code}
        Error Information              : something 12345678 about it
"""


def test_the_table_of_a_910b():
    assert parse_info(table_b("OK", "Alarm")) == [Chip(0, 0, "OK"), Chip(1, 0, "Alarm")]


def test_the_table_of_a_910c_has_two_dies_for_each_npu():
    assert parse_info(table_c("OK", "OK", "Warning", "OK")) == [
        Chip(0, 0, "OK"),
        Chip(0, 1, "OK"),
        Chip(1, 0, "Warning"),
        Chip(1, 1, "OK"),
    ]


def test_wider_columns_read_the_same():
    text = table_c("OK", "OK").replace(" | ", "   |   ").replace("--", "----")
    assert parse_info(text) == [Chip(0, 0, "OK"), Chip(0, 1, "OK")]


@pytest.mark.parametrize("text", ["", "npu-smi: command not found", PROCESSES, HEAD_B, HEAD_C])
def test_text_without_cards_has_none(text):
    assert parse_info(text) == []


def test_error_codes_are_read_from_their_line_only():
    assert parse_health(HEALTH.format(npu=0, chip=0, code="80e18402")) == ("80E18402",)
    assert parse_health(HEALTH.format(npu=0, chip=0, code="0x80C98008, 80E18402")) == ("80C98008", "80E18402")
    assert parse_health(HEALTH.format(npu=0, chip=0, code="NA")) == ()
    assert parse_health("") == ()


@pytest.fixture
def tool(tmp_path, drive):
    """``tool(visible)`` with ``tool.says(...)``: ``npu-smi`` on the PATH, and a probe that asks it."""
    tmp_path.joinpath("bin").mkdir()
    says = tmp_path / "says"
    says.mkdir()
    script = tmp_path / "bin" / "npu-smi"
    script.write_text(
        f"#!/bin/sh\nfile={says}/$(echo \"$*\" | tr -d ' ')\n"
        '[ -f "$file" ] || { echo "This device does not support $*" >&2; exit 255; }\ncat "$file"\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)

    class Tool:
        def start(self, *visible: str):
            return drive("NPU", list(visible), PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")

        def says(self, command: str, text: str) -> None:
            (says / command.replace(" ", "")).write_text(text)

    return Tool()


def test_a_910b_through_the_tool(tool):
    tool.says("info", table_b("OK", "OK"))
    cards = tool.start("0", "1")
    assert cards.ask() == {"faults": [], "gaps": [], "probe": "NpuSmiCards"}
    tool.says("info", table_b("OK", "Alarm"))
    tool.says("info -t health -i 1 -c 0", HEALTH.format(npu=1, chip=0, code="80E18402"))
    assert cards.ask(advance=1)["faults"] == [[1, "80E18402", []]]
    assert cards.ask(advance=1)["faults"] == []


def test_a_910c_through_the_tool_affects_both_dies(tool):
    tool.says("info", table_c("OK", "OK", "OK", "Critical"))
    tool.says("info -t health -i 1 -c 1", HEALTH.format(npu=1, chip=1, code="80E0020B"))
    assert tool.start("0", "1", "2", "3").ask()["faults"] == [[3, "80E0020B", [2]]]


def test_health_without_a_code_is_told_by_its_name(tool):
    tool.says("info", table_b("Warning"))
    tool.says("info -t health -i 0 -c 0", HEALTH.format(npu=0, chip=0, code="NA"))
    assert tool.start("0").ask()["faults"] == [[0, "npu-health-minor", []]]


def test_a_card_that_the_table_has_lost_is_lost(tool):
    tool.says("info", table_b("OK", "OK"))
    cards = tool.start("0", "1")
    cards.ask()
    tool.says("info", table_b("OK"))
    assert cards.ask(advance=1)["faults"] == [[1, "npu-lost", []]]


def test_a_health_nobody_knows_is_a_gap(tool):
    tool.says("info", table_b("OK", "UNKNOWN"))
    answer = tool.start("0", "1").ask()
    assert answer["faults"] == []
    assert "UNKNOWN" in answer["gaps"][0]


def test_a_tool_that_fails_is_away(tool):
    tool.says("info", table_b("Alarm"))
    answer = tool.start("0").ask()
    assert "does not support" in answer["error"]
    tool.says("info", "nothing")
    assert "shows no card" in tool.start("0").ask()["error"]
