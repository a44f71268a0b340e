"""The event journal: sealed once, told in order, tolerant of damage, silent about nothing."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilience.errors import FencedError, InvalidError, UnavailableError
from resilience.journal.events import TYPES, Event, EventWriter, Gap, read_events, segment_name
from storage_backends.disk import Disk
from storage_backends.memory import MemoryStorage


def writer(storage: MemoryStorage, source: str = "supervisor", **options: Any) -> EventWriter:
    tick = itertools.count(1_767_323_045)
    options = {
        "run": "r",
        "generation": 1,
        "clock": lambda: float(next(tick)),
        "mono_ns": lambda: 7,
        **options,
    }
    return EventWriter(storage, source=source, **options)


def told(storage: MemoryStorage, **options: Any) -> tuple[list[str], list[Gap]]:
    reader = read_events(storage, **options)
    return [event.id for event in reader], reader.gaps


def away() -> bool:
    raise UnavailableError("away")


def test_an_event_is_a_cloudevents_line_and_comes_back_equal() -> None:
    storage = MemoryStorage(Disk())
    events = writer(storage)
    first = events.emit("incident.detected", {"incident": "1-1"}, rank=2, node="a", card="a/0", step=40)
    second = events.emit(
        "incident.decided", {"decision": "restart"}, cause=first, severity="warning", time=0.5
    )
    assert (first, second, events.pending) == ("supervisor/1/1", "supervisor/1/2", 2)
    events.seal()
    assert events.pending == 0
    lines = storage.read("events/g1/supervisor/000000000001-000000000002.jsonl").splitlines()
    fields = json.loads(lines[0])
    assert fields == {
        "specversion": "1.0", "datacontenttype": "application/json", "id": first, "source": "supervisor",
        "type": "incident.detected", "time": "2026-01-02T03:04:05.000000Z", "mono_ns": 7, "run": "r",
        "generation": 1, "seq": 1, "subject": "rank-2", "data": {"incident": "1-1"}, "rank": 2, "node": "a",
        "card": "a/0", "step": 40, "severity": "info",
    }  # fmt: skip
    one, two = read_events(storage)
    assert one == Event.from_json(fields)
    assert (two.cause, two.subject, two.time) == (first, "r", "1970-01-01T00:00:00.500000Z")


def test_types_are_closed_and_a_near_miss_is_named() -> None:
    events = writer(MemoryStorage(Disk()))
    for type_ in TYPES:
        events.emit(type_)
    with pytest.raises(InvalidError, match=r"run\.finish") as caught:
        events.emit("run.finish")
    assert "run.finished" in str(caught.value.hint)
    with pytest.raises(InvalidError):
        events.emit("run.finished", severity="fatal")
    with pytest.raises(InvalidError, match="not JSON"):
        events.emit("run.finished", {"x": object()})
    assert events.pending == len(TYPES)  # and what was refused has used up no number


def test_numbers_without_a_json_form_are_told_as_strings() -> None:
    storage = MemoryStorage(Disk())
    events = writer(storage)
    events.emit("metrics.logged", {"values": [{"loss": float("nan"), "a": float("inf"), "b": -float("inf")}]})
    events.seal()
    (event,) = read_events(storage)
    assert event.data == {"values": [{"loss": "NaN", "a": "Infinity", "b": "-Infinity"}]}


def test_data_is_taken_as_it_is_at_that_moment() -> None:
    storage = MemoryStorage(Disk())
    events = writer(storage)
    data = {"values": [1]}
    events.emit("metrics.logged", data)
    data["values"].append(2)
    events.seal()
    assert [event.data for event in read_events(storage)] == [{"values": [1]}]


def test_sealing_nothing_writes_nothing() -> None:
    storage = MemoryStorage(Disk())
    writer(storage).seal()
    assert storage.list("events") == []


@pytest.mark.parametrize("landed", [False, True])
def test_what_could_not_be_sealed_stays_and_goes_to_the_same_name(landed: bool) -> None:
    storage = MemoryStorage(Disk())
    events = writer(storage)
    events.emit("run.started")
    if landed:
        storage.lose_reply = lambda operation, name: True
    else:
        storage.before = lambda step, name: away() and None
    with pytest.raises(UnavailableError):
        events.seal()
    assert events.pending == 1
    events.emit("run.finished")
    storage.before = storage.lose_reply = None
    events.seal()
    assert events.pending == 0
    assert storage.list("events/g1/supervisor") == [segment_name(1, "supervisor", n, n) for n in (1, 2)]
    assert told(storage) == (["supervisor/1/1", "supervisor/1/2"], [])


def test_a_second_process_of_the_same_source_is_told_to_stop() -> None:
    disk = Disk()
    one, two = writer(MemoryStorage(disk)), writer(MemoryStorage(disk))
    one.emit("run.started", {"who": 1})
    two.emit("run.started", {"who": 2})
    one.seal()
    with pytest.raises(FencedError, match="another process"):
        two.seal()


def test_a_bounded_buffer_drops_the_oldest_and_says_so() -> None:
    storage = MemoryStorage(Disk(), before=lambda step, name: away() and None)
    events = writer(storage, seal_count=4, limit=8)
    events.emit("run.started")
    with pytest.raises(UnavailableError):
        events.seal()  # number 1 is under way: it may have landed, so it is kept
    for _ in range(12):
        events.emit("checkpoint.failed")
    assert events.dropped == 4 and events.due
    storage.before = None
    events.seal()
    found, gaps = told(storage)
    assert found == [f"supervisor/1/{seq}" for seq in (1, *range(6, 15))]
    assert gaps == [Gap("supervisor", 1, 2, 5, "missing")]
    last = list(read_events(storage))[-1]
    assert last.type == "warning.raised" and "events 2..5" in last.data["message"]


def test_generations_are_in_order_and_sources_merged_by_time() -> None:
    storage = MemoryStorage(Disk())
    for generation in (10, 9, 2):
        for source, start in (("supervisor", 0.0), ("agent-a", 0.5)):
            events = writer(storage, source, generation=generation)
            for second in range(2):
                events.emit("warning.raised", time=start + second)
            events.seal()
    order = [f"{source}/{{}}/{seq}" for seq in (1, 2) for source in ("supervisor", "agent-a")]
    found, gaps = told(storage)
    assert found == [name.format(generation) for generation in (2, 9, 10) for name in order] and not gaps
    assert told(storage, since_generation=9)[0] == found[4:]


def test_a_clock_that_jumps_back_does_not_reorder_a_source() -> None:
    storage = MemoryStorage(Disk())
    events = writer(storage)
    for moment in (9.0, 1.0, 5.0):
        events.emit("warning.raised", time=moment)
    events.seal()
    other = writer(storage, "agent")
    other.emit("warning.raised", time=2.0)
    other.seal()
    found = [name for name in told(storage)[0] if name.startswith("supervisor")]
    assert found == ["supervisor/1/1", "supervisor/1/2", "supervisor/1/3"]


def test_a_torn_last_line_is_reported_and_the_rest_is_told() -> None:
    storage = MemoryStorage(Disk())
    events = writer(storage)
    for _ in range(3):
        events.emit("warning.raised")
    events.seal()
    name = segment_name(1, "supervisor", 1, 3)
    whole = storage.read(name)
    with storage.sink(name) as sink:
        sink.write(whole[:-10])
    events.emit("run.finished")
    events.seal()
    found, gaps = told(storage)
    assert found == ["supervisor/1/1", "supervisor/1/2", "supervisor/1/4"]
    assert Gap("supervisor", 1, 3, 3, "torn", name) in gaps
    assert Gap("supervisor", 1, None, None, "torn", name) in gaps


def test_a_segment_that_is_gone_is_a_gap() -> None:
    storage = MemoryStorage(Disk())
    events = writer(storage)
    for _ in range(4):
        events.emit("warning.raised")
        events.seal()
    storage.delete(segment_name(1, "supervisor", 1, 1))
    storage.delete(segment_name(1, "supervisor", 3, 3))
    assert told(storage) == (
        ["supervisor/1/2", "supervisor/1/4"],
        [Gap("supervisor", 1, 1, 1, "missing"), Gap("supervisor", 1, 3, 3, "missing")],
    )


def test_what_was_shipped_twice_is_told_once() -> None:
    storage = MemoryStorage(Disk())
    events = writer(storage)
    for _ in range(3):
        events.emit("warning.raised")
    events.seal()
    lines = storage.read(segment_name(1, "supervisor", 1, 3)).splitlines(keepends=True)
    storage.create(segment_name(1, "supervisor", 2, 3), b"".join(lines[1:]))
    assert told(storage) == ([f"supervisor/1/{seq}" for seq in (1, 2, 3)], [])


def test_an_event_of_a_newer_release_is_read() -> None:
    fields = {**Event("s/1/1", "s", "run.paused", "t", 1, "r", 1, 1, "r").to_json(), "mood": "good"}
    assert Event.from_json(fields).type == "run.paused"
    for broken in ({**fields, "seq": "1"}, {**fields, "data": []}, {"id": "x"}):
        with pytest.raises(ValueError):
            Event.from_json(broken)


def test_what_is_no_segment_is_left_alone() -> None:
    storage = MemoryStorage(Disk())
    for name in ("events/readme", "events/gx/a/1", "events/g1/notes.txt", "events/g1/agent/index.json"):
        storage.create(name, b"x")
    assert told(storage) == ([], [])


@pytest.mark.parametrize("options", [{"source": "Node A"}, {"seal_count": 0}, {"seal_count": 9, "limit": 8}])
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidError):
        writer(MemoryStorage(Disk()), **options)


@settings(max_examples=60, deadline=None, database=None)
@given(st.lists(st.sampled_from(["emit", "seal", "fail", "lose"]), max_size=40), st.data())
def test_whatever_fails_every_event_is_told_once_and_in_order(steps: list[str], data: st.DataObject) -> None:
    """And after any damage to one segment, what is told and what is reported make up the whole."""
    storage = MemoryStorage(Disk())
    events = writer(storage)
    count = 0
    for step in [*steps, "seal"]:
        if step == "emit":
            count += 1
            events.emit("warning.raised", {"n": count})
            continue
        storage.before = (lambda step, name: away() and None) if step == "fail" else None
        storage.lose_reply = (lambda operation, name: True) if step == "lose" else None
        try:
            events.seal()
        except UnavailableError:
            assert step != "seal"
    storage.before = storage.lose_reply = None
    assert told(storage) == ([f"supervisor/1/{seq}" for seq in range(1, count + 1)], [])
    names = storage.list("events/g1/supervisor")
    if not names:
        return
    name = data.draw(st.sampled_from(names))
    held = storage.read(name)
    with storage.sink(name) as sink:
        sink.write(held[: data.draw(st.integers(1, len(held)))])
    reader = read_events(storage)
    found = {event.seq for event in reader}
    missing = {seq for gap in reader.gaps if gap.first for seq in range(gap.first, (gap.last or 0) + 1)}
    assert found | missing == set(range(1, count + 1)) and not found & missing
