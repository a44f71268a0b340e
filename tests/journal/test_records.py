"""The bytes of a record: canonical, self-checking, and honest about newer formats."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilience.errors import CorruptError, InvalidError
from resilience.journal.records import Kind, Record, canonical, check_body, decode, digest, encode

PATH = "log/00000000000000000001.json"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
BODY = st.dictionaries(st.text(), JSON, max_size=4)


def record(body: dict[str, Any] | None = None, **changes: Any) -> Record:
    values: dict[str, Any] = {"slot": 1, "kind": Kind.FENCE, "generation": 1, "writer": "w", "prev": None}
    return Record(**{**values, **changes}, body=body or {})


def signed(**fields: Any) -> bytes:
    """A whole record with arbitrary fields, as another release might write it."""
    fields["sha256"] = digest(canonical(fields))
    return canonical(fields) + b"\n"


@settings(max_examples=60, database=None, deadline=None)
@given(BODY, st.integers(2, 10**18), st.sampled_from(list(Kind)))
def test_what_is_encoded_is_decoded(body: dict[str, Any], slot: int, kind: Kind) -> None:
    one = record(body, slot=slot, kind=kind, prev="0" * 64)
    data = encode(one)
    assert decode(data, path=PATH) == one
    assert encode(decode(data, path=PATH)) == data
    assert data.isascii() and data.count(b"\n") == 1


@settings(max_examples=200, database=None, deadline=None)
@given(BODY, st.data())
def test_every_flipped_bit_is_noticed(body: dict[str, Any], data: st.DataObject) -> None:
    good = encode(record(body))
    bit = data.draw(st.integers(0, 8 * len(good) - 1))
    bad = bytearray(good)
    bad[bit // 8] ^= 1 << bit % 8
    with pytest.raises(CorruptError) as caught:
        decode(bytes(bad), path=PATH)
    assert (caught.value.path, caught.value.start, caught.value.end) == (PATH, 0, len(good))


@pytest.mark.parametrize(
    "bad",
    [b"", b"\0" * 80, b"null\n", b"[]\n", b"{}\n", b"[" * 100_000, b'{"v":NaN}\n', b"\xff\xfe", b'"text"\n'],
    ids=["empty", "zeros", "null", "list", "object", "deep", "nan", "not-utf8", "string"],
)
def test_what_is_no_record_is_damage(bad: bytes) -> None:
    with pytest.raises(CorruptError, match="damaged"):
        decode(bad, path=PATH)


def test_the_same_values_in_another_form_are_damage() -> None:
    """Whoever rewrote the file, even without changing a value, broke the chain that the next record holds."""
    pretty = json.dumps(json.loads(encode(record())), indent=1).encode()
    with pytest.raises(CorruptError):
        decode(pretty, path=PATH)


def test_a_newer_format_says_which_release_reads_it() -> None:
    with pytest.raises(InvalidError, match=r"resilience 7\.1 or newer") as caught:
        decode(signed(v=2, reader="7.1", whatever=[1]), path=PATH)
    assert "resilience>=7.1" in str(caught.value.hint)
    with pytest.raises(InvalidError, match="newer"):
        decode(signed(v=2), path=PATH)


def test_an_unknown_kind_is_a_newer_format() -> None:
    fields = {"v": 1, "slot": 1, "generation": 1, "writer": "w", "prev": None, "body": {}}
    with pytest.raises(InvalidError, match="'merge'"):
        decode(signed(**fields, kind="merge"), path=PATH)


def test_a_flipped_version_is_damage_and_not_a_newer_format() -> None:
    bad = encode(record()).replace(b'"v":1', b'"v":3')
    with pytest.raises(CorruptError):
        decode(bad, path=PATH)


@pytest.mark.parametrize(
    "change",
    [
        {"slot": 0},
        {"slot": True},
        {"generation": 0},
        {"writer": ""},
        {"prev": "0" * 64},
        {"slot": 2},
        {"body": []},
    ],
    ids=str,
)
def test_fields_of_the_wrong_type_are_damage(change: dict[str, Any]) -> None:
    fields = {"v": 1, "slot": 1, "kind": "fence", "generation": 1, "writer": "w", "prev": None, "body": {}}
    decode(signed(**fields), path=PATH)
    with pytest.raises(CorruptError, match="missing or has the wrong type"):
        decode(signed(**{**fields, **change}), path=PATH)


@pytest.mark.parametrize("body", [{"x": float("nan")}, {"x": object()}, {"x": b"bytes"}], ids=str)
def test_a_body_that_is_not_json_is_refused(body: dict[str, Any]) -> None:
    with pytest.raises(InvalidError, match="not JSON"):
        encode(record(body))


def test_bodies_are_checked_by_kind() -> None:
    part = {"rank": 0, "node": "n", "name": "x", "sha256": "s"}
    good = {"step": 1, "tier": "nvme", "world_size": 1, "parts": [part], "size": 9}
    assert check_body(Kind.CHECKPOINT, good) is None
    assert check_body(Kind.CHECKPOINT, {**good, "op": "extra keys are for later"}) is None
    assert "'step'" in str(check_body(Kind.CHECKPOINT, {**good, "step": "1"}))
    assert "'step'" in str(check_body(Kind.CHECKPOINT, {**good, "step": True}))
    assert "parts[1]" in str(check_body(Kind.CHECKPOINT, {**good, "parts": [part, {"rank": 1}]}))
    assert "refs[0]" in str(check_body(Kind.RETIRE, {"refs": [[1, 2]]}))
    assert check_body(Kind.FENCE, {}) is None
