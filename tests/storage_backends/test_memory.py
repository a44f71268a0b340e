"""The memory twin and its disk: it must lose what real disks lose, and nothing that was synced."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilience.errors import UnavailableError
from storage_backends import RetryPolicy, probe
from storage_backends.disk import Disk, PowerLoss, best, worst
from storage_backends.memory import MemoryStorage
from storage_backends.retry import RetryStorage

CREATE = ["make_directory", "sync_parents", "open", "write", "sync", "link", "sync_directory", "unlink"]
SINK = ["make_directory", "sync_parents", "open", "write", "sync", "rename", "sync_directory"]


def die_at(storage: MemoryStorage, wanted: int) -> list[str]:
    """Let the client die before its ``wanted``-th step; returns the steps as they happen."""
    steps: list[str] = []

    def before(step: str, name: str) -> None:
        if len(steps) == wanted:
            raise PowerLoss
        steps.append(step)

    storage.before = before
    return steps


def write(storage: MemoryStorage, how: str, name: str, data: bytes) -> None:
    if how == "create":
        assert storage.create(name, data) is None
    else:
        with storage.sink(name) as sink:
            sink.write(data)


@pytest.mark.parametrize(("how", "expected"), [("create", CREATE), ("sink", SINK)])
def test_the_steps_are_those_of_the_posix_backend(how: str, expected: list[str]) -> None:
    storage = MemoryStorage(Disk("page_cache"))
    steps = die_at(storage, 99)
    write(storage, how, "d/a", b"1")
    assert steps == expected


# --- the model loses what a real disk loses -----------------------------------------------------------------


def test_without_fsync_the_tail_is_torn_or_zero() -> None:
    for tail, expected in ((1, b"01"), (0, b"01\0\0")):
        disk = Disk("page_cache")
        inode = disk.open_new("a")
        disk.append(inode, b"0123")
        disk.sync_directory("")
        disk.crash(lambda what, n, tail=tail: 2 if "bytes" in what else tail)
        held = disk.get("a")
        assert held is not None and bytes(held.data) == expected


def test_without_fsync_of_the_directory_the_name_is_lost() -> None:
    for decide, expected in ((worst, frozenset()), (best, {"a"})):
        disk = Disk("page_cache")
        disk.sync(disk.open_new("a"))
        disk.crash(decide)
        assert disk.names() == expected


def test_without_fsync_of_the_parent_the_directory_is_lost_with_all_it_holds() -> None:
    disk = Disk("page_cache")
    disk.make_directory("d/e")
    disk.sync(disk.open_new("d/e/a"))
    disk.sync_directory("d/e")
    disk.sync_directory("d")
    disk.crash(worst)
    assert disk.names() == frozenset(), "the entry of d itself was volatile"


def test_volatile_changes_survive_in_any_subset() -> None:
    """A later entry may outlive an earlier one: file systems reorder."""
    disk = Disk("page_cache")
    for name in ("a", "b"):
        disk.sync(disk.open_new(name))
    disk.crash(lambda what, n: int("b" in what))
    assert disk.names() == {"b"}


def test_a_rename_is_one_change() -> None:
    for survives in (0, 1):
        disk = Disk("page_cache")
        for name in ("t~", "a"):
            disk.sync(disk.open_new(name))
        disk.sync_directory("")
        disk.rename("t~", "a")
        disk.crash(lambda what, n, survives=survives: survives)
        assert disk.names() == ({"a"} if survives else {"a", "t~"})


def test_a_delete_may_be_undone() -> None:
    disk = Disk("page_cache")
    storage = MemoryStorage(disk)
    storage.create("a", b"1")
    storage.delete("a")
    assert storage.list() == []
    disk.crash(worst)
    assert MemoryStorage(disk).list() == ["a"]


# --- and the protocol survives it ---------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from(["create", "sink"]), st.sampled_from(["page_cache", "object"]))
def test_any_crash_leaves_all_or_nothing_and_what_was_acknowledged(
    data: st.DataObject, how: str, semantics: str
) -> None:
    disk = Disk(semantics)  # type: ignore[arg-type]
    old, new = b"old bytes", b"new bytes, longer"
    first = MemoryStorage(disk, "run")
    if how == "sink" and data.draw(st.booleans(), label="an older object"):
        write(first, how, "d/a", old)
    first.create("d/acknowledged", b"yes")
    before = set(first.list("d"))
    client = MemoryStorage(disk, "run")
    steps = die_at(client, data.draw(st.integers(0, 9), label="step"))
    acknowledged = True
    try:
        write(client, how, "d/a", new)
    except PowerLoss:
        acknowledged = False
    for _ in range(data.draw(st.integers(1, 2), label="crashes")):
        disk.crash(lambda what, n: data.draw(st.integers(0, n), label=what))
    after = MemoryStorage(disk, "run")
    held = after.read("d/a") if "d/a" in after.list("d") else None
    assert after.read("d/acknowledged") == b"yes"
    assert set(after.list("d")) - {"d/a"} == before - {"d/a"}
    allowed = {old if "d/a" in before else None, new}
    assert held == new if acknowledged else held in allowed, steps


@settings(max_examples=200, deadline=None)
@given(data=st.data(), moment=st.sampled_from(CREATE))
def test_two_racing_creates_agree_and_the_answer_outlives_a_crash(data: st.DataObject, moment: str) -> None:
    """b runs wholly inside a's step ``moment``; a dies there. What b was told must still be true after it."""
    disk = Disk("page_cache")
    a, b = MemoryStorage(disk), MemoryStorage(disk)
    told: list[bytes | None] = []

    def before(step: str, name: str) -> None:
        if step == moment:
            told.append(b.create("log/1", b"b"))
            raise PowerLoss

    a.before = before
    with pytest.raises(PowerLoss):
        a.create("log/1", b"a")
    disk.crash(lambda what, n: data.draw(st.integers(0, n), label=what))
    assert MemoryStorage(disk).read("log/1") == (told[0] or b"b")


# --- hooks --------------------------------------------------------------------------------------------------


def test_the_dead_do_nothing_more() -> None:
    disk = Disk("page_cache")
    client = MemoryStorage(disk)
    sink = client.sink("d/a")
    sink.write(b"1")
    client.kill()
    for call in (sink.commit, client.list, lambda: client.read("d/a"), lambda: client.delete("d/a")):
        with pytest.raises(PowerLoss):
            call()
    assert not client.alive
    assert len(disk.names()) == 1, "its temporary file stays: nobody cleans up after the dead"
    disk.crash()
    other = MemoryStorage(disk)
    assert other.alive and other.create("d/a", b"2") is None


def test_a_crash_kills_every_client_of_its_boot() -> None:
    disk = Disk("page_cache")
    clients = [MemoryStorage(disk) for _ in range(2)]
    disk.crash()
    for client in clients:
        with pytest.raises(PowerLoss):
            client.create("a", b"1")
    assert MemoryStorage(disk).create("a", b"1") is None


def test_lost_replies_are_deeds_done() -> None:
    lost = ["create", "commit", "delete"]

    def lose(operation: str, name: str) -> bool:
        if operation not in lost:
            return False
        lost.remove(operation)
        return True

    client = MemoryStorage(Disk(), lose_reply=lose)
    patient = RetryStorage(client, RetryPolicy(sleep=lambda seconds: None))
    assert patient.create("log/1", b"mine") is None
    with pytest.raises(UnavailableError, match="lost"), patient.sink("a") as sink:
        sink.write(b"1")
    assert client.read("a") == b"1"
    patient.delete("a")
    assert lost == [] and client.list() == ["log/"]


def test_a_failed_step_prevents_the_deed_and_cleans_up() -> None:
    for step in CREATE:
        disk = Disk("page_cache")

        def before(now: str, name: str, step: str = step) -> None:
            if now == step:
                raise UnavailableError(f"no answer at {step}")

        client = MemoryStorage(disk, before=before)
        with pytest.raises(UnavailableError):
            client.create("d/a", b"1")
        client.before = None
        visible = CREATE.index(step) > CREATE.index("link")
        assert disk.names() == ({"d/a"} if visible else set()), step


def test_listings_may_be_stale_but_reads_are_not() -> None:
    disk = Disk()
    a, b = MemoryStorage(disk), MemoryStorage(disk)
    for slot in range(3):
        a.create(f"log/{slot}", b"1")
    for back in range(4):
        b.listing = lambda prefix, views, back=back: back
        assert b.list("log") == [f"log/{slot}" for slot in range(3 - back)]
    b.listing = lambda prefix, views: views
    assert b.list() == []
    assert b.read("log/2") == b"1"
    assert b.create("log/2", b"2") == b"1", "a stale listing cannot make a taken name free"
    assert a.list("log") == ["log/0", "log/1", "log/2"]


def test_a_script_or_a_seed_gives_the_same_run_again() -> None:
    def run(seed: int) -> list[str]:
        chance, disk = random.Random(seed), Disk("page_cache")
        client = MemoryStorage(disk)
        for number in range(6):
            die_at(client, chance.randint(0, 12))
            try:
                client.create(f"d/{number}", b"x" * 20)
            except PowerLoss:
                disk.crash(lambda what, n: chance.randint(0, n))
                client = MemoryStorage(disk)
        return sorted(disk.names())

    assert run(7) == run(7)
    assert len({tuple(run(seed)) for seed in range(20)}) > 1


def test_both_semantics_pass_the_probe() -> None:
    assert probe(MemoryStorage(Disk("object"))).arbitrates
    assert probe(MemoryStorage(Disk("page_cache"))).arbitrates
