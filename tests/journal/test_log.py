"""The commit log, one scripted scene per rule; arbitrary schedules are in ``test_properties``."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest

from resilience.errors import CorruptError, FencedError, InvalidError, UnavailableError
from resilience.journal.log import CommitLog, slot_name
from resilience.journal.records import Kind, Record, digest, encode
from storage_backends.disk import Disk, PowerLoss
from storage_backends.memory import MemoryStorage

_serial = itertools.count()
RETIRE: dict[str, Any] = {"refs": []}


def new_id() -> str:
    return f"w{next(_serial)}"


def log_on(storage: MemoryStorage) -> CommitLog:
    return CommitLog(storage, new_id=new_id)


def pair(disk: Disk | None = None) -> tuple[MemoryStorage, MemoryStorage]:
    disk = disk or Disk()
    return MemoryStorage(disk), MemoryStorage(disk)


def quarantine(step: int) -> dict[str, Any]:
    return {"step": step, "generation": 1, "tier": "nvme", "reason": ""}


def once(action: Callable[[], object], at: str) -> Callable[[str, str], None]:
    """A hook that acts before the first step ``at`` of the log, once."""
    left = [action]

    def before(step: str, name: str) -> None:
        if left and step == at and name.startswith("log/"):
            left.pop()()

    return before


def fail() -> None:
    raise UnavailableError("away")


def test_records_are_chained_and_dense() -> None:
    storage, _ = pair()
    log = log_on(storage)
    assert log.refresh() == () and log.generation == 0
    fence = log.fence(1, {"run": "r"})
    assert (fence.slot, fence.generation, fence.prev, log.generation) == (1, 1, None, 1)
    second = log.append(Kind.RETIRE, RETIRE)
    assert second.prev == digest(storage.read(slot_name(1)))
    assert log.refresh() == log_on(storage).refresh() == (fence, second)
    assert storage.list("log") == ["log/00000000000000000001.json", "log/00000000000000000002.json"]


def test_a_generation_is_always_above_every_other() -> None:
    one, two = pair()
    assert log_on(one).fence(5, {}).generation == 5
    assert log_on(two).fence(3, {}).generation == 6
    assert log_on(two).fence(9, {}).generation == 9


def test_the_same_object_may_fence_again() -> None:
    storage, _ = pair()
    log = log_on(storage)
    assert [log.fence(1, {"same": 1}).generation for _ in range(3)] == [1, 2, 3]
    log.append(Kind.RETIRE, RETIRE)
    assert len(log.refresh()) == 4


def test_a_writer_that_was_fenced_can_only_read() -> None:
    one, two = pair()
    old, new = log_on(one), log_on(two)
    old.fence(1, {"supervisor": "a/1"})
    new.fence(1, {"supervisor": "b/2"})
    with pytest.raises(FencedError, match=r"generation 2 is in charge .*b/2") as caught:
        old.append(Kind.RETIRE, RETIRE)
    assert caught.value.generation == 1 and caught.value.hint
    for call in (lambda: old.append(Kind.RETIRE, RETIRE), lambda: old.fence(7, {})):
        with pytest.raises(FencedError):
            call()
    assert old.refresh() == new.refresh() and len(new.refresh()) == 2


def test_a_writer_that_saw_its_fencing_in_a_refresh_does_not_write() -> None:
    one, two = pair()
    old, new = log_on(one), log_on(two)
    old.fence(1, {})
    new.fence(1, {})
    old.refresh()
    one.before = lambda step, name: pytest.fail("it went to storage")
    with pytest.raises(FencedError):
        old.append(Kind.RETIRE, RETIRE)


def test_of_two_that_begin_together_one_wins() -> None:
    one, two = pair()
    loser, winner = log_on(one), log_on(two)
    one.before = once(lambda: winner.fence(1, {}), "put")
    with pytest.raises(FencedError):
        loser.fence(1, {})
    assert winner.append(Kind.RETIRE, RETIRE).slot == 2
    assert loser.generation == 0


def test_a_slot_lost_to_the_generation_in_charge_is_no_conflict() -> None:
    one, two = pair()
    old, new = log_on(one), log_on(two)
    old.fence(1, {})
    two.before = once(lambda: old.append(Kind.RETIRE, RETIRE), "put")
    assert new.fence(1, {}).slot == 3
    assert [record.generation for record in new.refresh()] == [1, 1, 2]


def test_a_stale_listing_hides_nothing() -> None:
    one, two = pair()
    old = log_on(one)
    old.fence(1, {})
    for step in range(5):
        old.append(Kind.QUARANTINE, quarantine(step))
    two.listing = lambda prefix, views: views  # as empty as it ever was
    new = log_on(two)
    assert new.fence(1, {}).slot == 7
    assert len(new.refresh()) == 7


def test_a_long_log_is_read_in_parallel_and_in_order() -> None:
    one, two = pair()
    old = log_on(one)
    old.fence(1, {})
    for step in range(40):
        old.append(Kind.QUARANTINE, quarantine(step))
    threads = set()
    two.before = lambda step, name: threads.add(threading.current_thread().name)
    assert [record.slot for record in log_on(two).refresh()] == list(range(1, 42))
    assert any(name.startswith("commit-log") for name in threads)


@pytest.mark.parametrize("lost", ["before", "after"])
def test_an_unknown_outcome_is_settled_by_calling_again(lost: str) -> None:
    """Whether it landed or not: one record, the same bytes."""
    storage, _ = pair()
    log = log_on(storage)
    log.fence(1, {})
    if lost == "before":
        storage.before = once(fail, "put")
    else:
        storage.lose_reply = lambda operation, name: True
    with pytest.raises(UnavailableError):
        log.append(Kind.QUARANTINE, quarantine(1))
    storage.lose_reply = None
    record = log.append(Kind.QUARANTINE, quarantine(1))
    assert record.slot == 2 and len(log.refresh()) == 2
    assert log.append(Kind.QUARANTINE, quarantine(1)).slot == 3  # a later wish for the same is a new one


def test_an_unknown_outcome_may_be_found_by_reading() -> None:
    storage, _ = pair()
    log = log_on(storage)
    log.fence(1, {})
    storage.lose_reply = lambda operation, name: True
    with pytest.raises(UnavailableError):
        log.append(Kind.QUARANTINE, quarantine(1))
    storage.lose_reply = None
    assert len(log.refresh()) == 2
    assert log.append(Kind.QUARANTINE, quarantine(1)) == log.refresh()[1]
    assert len(log.refresh()) == 2


def test_an_abandoned_write_that_landed_stays_and_the_next_goes_behind_it() -> None:
    storage, _ = pair()
    log = log_on(storage)
    log.fence(1, {})
    storage.lose_reply = lambda operation, name: True
    with pytest.raises(UnavailableError):
        log.append(Kind.QUARANTINE, quarantine(1))
    storage.lose_reply = None
    assert log.append(Kind.QUARANTINE, quarantine(2)).slot == 3
    assert [record.body.get("step") for record in log.refresh()] == [None, 1, 2]


def test_an_abandoned_write_cannot_land_any_more_once_the_slot_is_taken() -> None:
    disk = Disk()
    storage = MemoryStorage(disk)
    log = log_on(storage)
    log.fence(1, {})
    late: list[tuple[str, bytes]] = []
    create = storage.create
    storage.create = lambda name, data: late.append((name, data)) or fail()  # type: ignore[method-assign,func-returns-value]
    with pytest.raises(UnavailableError):
        log.append(Kind.QUARANTINE, quarantine(1))
    storage.create = create  # type: ignore[method-assign]
    log.append(Kind.QUARANTINE, quarantine(2))
    assert disk.put(*late[0], exclusive=True) is False
    assert [record.body.get("step") for record in log_on(storage).refresh()] == [None, 2]


def test_a_fence_whose_reply_was_lost_is_still_ours() -> None:
    storage, other = pair()
    log = log_on(storage)
    storage.lose_reply = lambda operation, name: True
    with pytest.raises(UnavailableError):
        log.fence(1, {"reason": "start"})
    assert log.generation == 0
    storage.lose_reply = None
    assert log.fence(1, {"reason": "start"}).slot == 1
    assert log.generation == 1
    assert log.append(Kind.RETIRE, RETIRE).slot == 2
    assert len(log_on(other).refresh()) == 2


def test_a_fence_of_unknown_outcome_that_somebody_else_overtook_is_fenced() -> None:
    """The rival was not there when we began, so it is newer than we are, although we ask again."""
    one, two = pair()
    log = log_on(one)
    one.before = once(fail, "put")
    with pytest.raises(UnavailableError):
        log.fence(1, {})
    log_on(two).fence(1, {})
    with pytest.raises(FencedError):
        log.fence(1, {})


def test_what_is_found_is_made_durable_before_it_is_answered() -> None:
    """Visible is not durable: the fsync of the directory failed, the record can be read, the power may go."""
    disk = Disk("page_cache")
    storage = MemoryStorage(disk)
    log = log_on(storage)
    log.fence(1, {})
    storage.before = once(fail, "sync_directory")
    with pytest.raises(UnavailableError):
        log.append(Kind.QUARANTINE, quarantine(1))
    assert len(log.refresh()) == 2
    log.append(Kind.QUARANTINE, quarantine(1))
    disk.crash()
    assert len(log_on(MemoryStorage(disk)).refresh()) == 2


def test_nothing_is_built_on_a_record_that_may_vanish() -> None:
    """A record is visible, its writer dead before the fsync of the directory; the next writer builds on it, and the
    power goes in the middle. The later record may survive; then the earlier one must have."""
    disk = Disk("page_cache")
    one, two = pair(disk)

    def die() -> None:
        raise PowerLoss

    one.before = once(die, "sync_directory")
    with pytest.raises(PowerLoss):
        log_on(one).fence(1, {})
    two.before = lambda step, name: die() if step == "sync_directory" and name == slot_name(2) else None
    with pytest.raises(PowerLoss):
        log_on(two).fence(1, {})
    disk.crash(lambda what, n: n if slot_name(2) in what else 0)
    assert [record.slot for record in log_on(MemoryStorage(disk)).refresh()] == [1, 2]


def test_a_missing_record_is_damage_and_nothing_is_written_into_the_hole() -> None:
    storage, other = pair()
    log = log_on(storage)
    log.fence(1, {})
    for step in range(3):
        log.append(Kind.QUARANTINE, quarantine(step))
    storage.delete(slot_name(2))
    for call in (lambda it: it.refresh(), lambda it: it.fence(1, {})):
        with pytest.raises(CorruptError, match="missing although later") as caught:
            call(log_on(other))
        assert caught.value.path == slot_name(2)
    assert len(storage.list("log")) == 3


def test_a_replaced_record_breaks_the_chain() -> None:
    storage, other = pair()
    log = log_on(storage)
    log.fence(1, {})
    second = log.append(Kind.QUARANTINE, quarantine(1))
    log.append(Kind.QUARANTINE, quarantine(2))
    forged = encode(Record(2, Kind.QUARANTINE, 1, "forger", second.prev, quarantine(9)))
    with storage.sink(slot_name(2)) as sink:
        sink.write(forged)
    with pytest.raises(CorruptError, match="does not follow") as caught:
        log_on(other).refresh()
    assert caught.value.path == slot_name(3)


def test_a_damaged_record_stops_readers_and_writers() -> None:
    storage, other = pair()
    log = log_on(storage)
    log.fence(1, {})
    good = storage.read(slot_name(1))
    with storage.sink(slot_name(1)) as sink:
        sink.write(good[:-9] + b"\0" + good[-8:])
    for call in (lambda it: it.refresh(), lambda it: it.fence(1, {})):
        with pytest.raises(CorruptError) as caught:
            call(log_on(other))
        assert caught.value.path == slot_name(1)
    assert len(storage.list("log")) == 1


def test_calls_that_make_no_sense_are_refused() -> None:
    storage, _ = pair()
    log = log_on(storage)
    with pytest.raises(InvalidError, match="read only"):
        log.append(Kind.RETIRE, RETIRE)
    with pytest.raises(InvalidError, match="cannot be fenced"):
        log.fence(0, {})
    with pytest.raises(InvalidError, match="not JSON"):
        log.fence(1, {"x": object()})
    log.fence(1, {})
    with pytest.raises(InvalidError, match="fence"):
        log.append(Kind.FENCE, {})
    with pytest.raises(InvalidError, match="'step'"):
        log.append(Kind.CHECKPOINT, {"steps": 3})
    assert len(log.refresh()) == 1


def test_threads_may_share_a_log() -> None:
    storage, _ = pair()
    log = log_on(storage)
    log.fence(1, {})

    def work(first: int) -> None:
        for step in range(first, first + 20):
            log.append(Kind.QUARANTINE, quarantine(step))

    threads = [threading.Thread(target=work, args=(start,)) for start in (0, 100, 200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [record.slot for record in log_on(storage).refresh()] == list(range(1, 62))
