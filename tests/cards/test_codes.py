"""The data files of fault codes, and what overrides them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from resilience.cards.codes import FaultCodes, normal, read_overrides, tables
from resilience.control.faults import Action
from resilience.errors import InvalidError

SHIPPED = FaultCodes.over({})
DOCS = Path(__file__).parents[2] / "docs" / "cards.md"


@pytest.fixture
def file(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "codes.toml"
        path.write_text(text)
        return str(path)

    return write


@pytest.mark.parametrize(
    ("code", "action", "limit"),
    [
        ("79", Action.REPLACE_NODE, None),
        ("94", Action.RESTART, None),
        ("95", Action.RESET, None),
        ("63", Action.WATCH, None),
        ("80E01801", Action.RESTART, 2),
        ("80C98008", Action.RESTART, 2),
        ("8C0E4E00", Action.DRAIN, None),
        ("80DE1801", Action.RESET, None),
        ("80E18402", Action.REPLACE_CARD, None),
        ("80E20207", Action.WATCH, None),
        ("81078603", Action.WATCH, None),
        ("simulated", Action.REPLACE_CARD, None),
    ],
)
def test_what_the_vendors_ask_for(code, action, limit):
    found = SHIPPED.find(code)
    assert (found.action, found.limit) == (action, limit)


def test_every_entry_has_a_source_and_a_name_or_the_vendors_level():
    for code in SHIPPED:
        assert code.source, code
        assert code.name or code.level, code
        assert normal(code.code) == code.code


def test_what_the_probes_say_is_in_the_tables():
    package = Path(__file__).parents[2] / "resilience" / "cards"
    said = set()
    for name in ("nvidia.py", "ascend.py", "npu_smi.py", "simulated.py"):
        said |= set(re.findall(r'"((?:nvml|npu)-[a-z-]*[a-z]|simulated)"', (package / name).read_text()))
    from resilience.cards.nvidia import _RECOVERY

    said = said - {"npu-smi"} | {f"nvml-recovery-{name}" for name in _RECOVERY.values()}
    assert len(said) > 20
    assert {code for code in said if SHIPPED.find(code) is None} == set()


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ("XID 79", "79"),
        ("xid-79", "79"),
        (" 079x", "079x"),
        ("0x80e18402", "80E18402"),
        ("NVML-Lost", "nvml-lost"),
    ],
)
def test_codes_are_found_in_any_usual_spelling(given, code):
    assert normal(given) == code


def test_an_unknown_code_is_not_found():
    assert SHIPPED.find("80FFFFFF") is None
    assert SHIPPED.find("") is None


def test_an_override_changes_one_entry_and_keeps_its_name(file):
    path = file(
        '[codes]\n79 = { action = "watch" }\n"my-test" = { action = "replace card", name = "burn-in", limit = 3 }\n'
    )
    codes = FaultCodes.over(read_overrides(path))
    assert (codes.find("79").action, codes.find("79").name) == (Action.WATCH, "GPU has fallen off the bus")
    assert (codes.find("my-test").limit, codes.find("my-test").name) == (3, "burn-in")
    assert codes.find("79").source == path
    assert codes.find("95") == SHIPPED.find("95")


def test_no_path_is_no_override():
    assert read_overrides(None) == read_overrides("") == {}


@pytest.mark.parametrize(
    ("text", "key", "hint"),
    [
        ("[codes\n", "the file", "docs/cards.md"),
        ('[code]\n79 = { action = "watch" }', "code", "did you mean 'codes'?"),
        ("codes = 3", "codes", "[codes]"),
        ("[codes]\n79 = 3", "codes.79", "{ action ="),
        ('[codes]\n79 = { action = "replase card" }', "codes.79.action", "did you mean 'replace card'?"),
        ('[codes]\n79 = { name = "x" }', "codes.79.action", "give one of: watch, restart"),
        ('[codes]\n79 = { action = "watch", limits = 2 }', "codes.79.limits", "did you mean 'limit'?"),
        ('[codes]\n79 = { action = "watch", limit = 0 }', "codes.79.limit", "an integer >= 1"),
        ('[codes]\n79 = { action = "watch", limit = true }', "codes.79.limit", "an integer >= 1"),
        ('[codes]\n79 = { action = "watch", name = 3 }', "codes.79.name", "give a string"),
        ('[codes]\n79 = { action = ["watch"] }', "codes.79.action", "allowed: watch"),
        ('[codes]\n79 = { action = "watch" }\n"xid 79" = { action = "watch" }', "codes.xid 79", "keep one"),
    ],
)
def test_a_malformed_override_is_refused_with_file_key_and_what_is_allowed(file, text, key, hint):
    path = file(text)
    with pytest.raises(InvalidError) as refused:
        read_overrides(path)
    assert f"{path}: {key} " in refused.value.message
    assert hint in refused.value.hint


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InvalidError, match="cannot be read") as refused:
        read_overrides(str(tmp_path / "nothing.toml"))
    assert "RESILIENCE_FAULT_CODES" in refused.value.hint


def test_the_tables_of_the_documentation_are_the_data():
    text = DOCS.read_text()
    told = text[text.index("<!-- tables -->\n") + len("<!-- tables -->\n") :]
    assert told.strip() == tables().strip(), "run: python -m resilience.cards.codes"
