"""The supervisor's pen."""

import threading

import pytest

from resilience.journal.events import EventReader, read_events
from resilience.runtime.chronicle import Chronicle
from storage_backends import open_storage
from storage_backends.faults import Fault, FaultStorage

_DOWN = Fault("unavailable", "create", name="events/*", count=None)


@pytest.fixture
def storage(request):
    return FaultStorage(open_storage(f"memory://chronicle/{request.node.name}", retry=False))


@pytest.fixture
def broken():
    return []


@pytest.fixture
def chronicle(storage, broken):
    made = Chronicle(storage, run="r", source="supervisor-1", broken=broken.append)
    yield made
    made.close()
    assert not made._thread.is_alive()
    assert broken == []


def told(storage):
    return [(event.type, event.generation, event.seq) for event in read_events(storage)]


def test_events_get_their_generation_and_subject_and_are_in_storage_after_flush(storage, chronicle):
    chronicle.write("run.started", {"job": "j"})
    chronicle.generation(4)
    chronicle.write("incident.detected", {"kind": "exit"}, rank=2, node="n", step=7, severity="error")
    assert chronicle.flush()
    assert told(storage) == [("run.started", 0, 1), ("incident.detected", 4, 1)]
    event = list(read_events(storage))[1]
    assert (event.rank, event.node, event.step, event.severity) == (2, "n", 7, "error")
    assert event.data == {"kind": "exit"}
    assert chronicle.failing is None


def test_while_storage_is_away_events_are_kept_and_sealed_later_without_a_gap(storage, chronicle):
    chronicle.write("run.started", {})
    chronicle.flush()
    storage.add(_DOWN)
    chronicle.write("stop.requested", {"reason": "a"}, urgent=True)
    chronicle.generation(1)  # a generation changes meanwhile: its predecessor's events still wait
    chronicle.write("stop.requested", {"reason": "b"})
    chronicle.generation(2)
    chronicle.write("stop.requested", {"reason": "c"})
    assert chronicle.flush()  # it came to an end, not to storage
    assert told(storage) == [("run.started", 0, 1)]
    assert "unavailable" in chronicle.failing
    storage.heal()
    chronicle.flush()
    assert chronicle.failing is None
    assert [event.data.get("reason") for event in read_events(storage)] == [None, "a", "b", "c"]
    reader = EventReader(storage)
    list(reader)
    assert reader.gaps == []


def test_close_writes_what_is_left(storage, broken):
    chronicle = Chronicle(storage, run="r", source="s", broken=broken.append)
    chronicle.write("run.finished", {"result": "finished"})
    chronicle.close()
    assert told(storage) == [("run.finished", 0, 1)]


def test_an_urgent_event_is_written_at_once_and_others_with_it(storage, broken, monkeypatch):
    monkeypatch.setattr("resilience.runtime.chronicle._SEAL_EVERY_S", 3600.0)
    written = threading.Event()

    class Noticed(FaultStorage):
        def create(self, name, data):
            answer = super().create(name, data)
            written.set()
            return answer

    chronicle = Chronicle(Noticed(storage), run="r", source="s", broken=broken.append)
    chronicle.write("stop.requested", {"reason": "not urgent"})
    chronicle.write("incident.decided", {"decision": "restart"}, urgent=True)
    assert written.wait(10)
    assert [type_ for type_, *_ in told(storage)] == ["stop.requested", "incident.decided"]
    chronicle.close()


def test_a_bug_of_ours_is_told_with_its_traceback(storage, broken):
    chronicle = Chronicle(storage, run="r", source="s", broken=broken.append)
    chronicle.write("no.such.event", {})
    chronicle._thread.join(10)
    assert len(broken) == 1
    assert "no.such.event" in broken[0]
