"""Pieces on a broken network: a real connection that stalls, drops or answers too late, and how it is told."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience.errors import InvalidError, UnavailableError
from storage_backends import RetryPolicy
from storage_backends.drivers import call
from storage_backends.object import ObjectStorage
from storage_backends.obstore_storage import ObstoreStorage
from storage_backends.s3_bytes import Body
from storage_backends.transfer import (
    LARGEST_PART,
    MOST_PARTS,
    Abandoned,
    Retried,
    TransferPolicy,
    Transfers,
    timed_out,
)

MIB = 1 << 20
QUICK = RetryPolicy(attempts=4, seconds=60, first=0.01, longest=0.05)
IMPATIENT = TransferPolicy(part=5 * MIB, stall_s=1.0, retry=QUICK)


@pytest.fixture
def news() -> list[Retried]:
    return []


@pytest.fixture
def storage(bucket: str, wire: Any, news: list[Retried]) -> Iterator[ObjectStorage]:
    made = ObjectStorage(f"s3://{bucket}/run", transfer=IMPATIENT, on_retry=news.append)
    yield made
    made.close()


def uploads(bucket: str) -> list[Any]:
    import boto3

    return boto3.client("s3").list_multipart_uploads(Bucket=bucket).get("Uploads", [])


@pytest.mark.parametrize(("way", "stalled"), [("stall", True), ("drop", False), ("late", True)])
def test_a_part_that_goes_wrong_is_sent_again_and_told(
    storage: ObjectStorage, wire: Any, news: list[Retried], bucket: str, way: str, stalled: bool
) -> None:
    body = os.urandom(23 * MIB)
    wire.plan(way)
    with storage.sink("a") as sink:
        sink.write(body)
    assert wire.happened == [way]
    assert storage.read("a") == body
    (told,) = news
    assert told.operation.startswith("upload part ") and told.path == f"s3://{bucket}/run/a"
    assert (told.size, told.attempt, told.stalled) == (5 * MIB, 1, stalled)
    assert told.error and uploads(bucket) == []


@pytest.mark.parametrize("way", ["stall", "drop"])
def test_a_single_put_that_goes_wrong_is_sent_again_and_told(
    storage: ObjectStorage, wire: Any, news: list[Retried], way: str
) -> None:
    body = os.urandom(4 * MIB)
    wire.plan(way)
    with storage.sink("a") as sink:
        sink.write(body)
    assert storage.read("a") == body
    assert [(told.operation, told.size) for told in news] == [("upload", 4 * MIB)]


@pytest.mark.parametrize(("way", "stalled"), [("stall", True), ("drop", False)])
def test_a_range_that_goes_wrong_is_asked_for_again_and_told(
    storage: ObjectStorage, wire: Any, news: list[Retried], way: str, stalled: bool
) -> None:
    body = os.urandom(23 * MIB)
    with storage.sink("a") as sink:
        sink.write(body)
    wire.plan(way, toward="client")
    assert storage.read("a", 0, len(body)) == body
    assert wire.happened == [way]
    assert [(told.operation.split()[0], told.stalled) for told in news] == [("read", stalled)]


def test_a_network_that_stays_dead_is_an_error_in_bounded_time(
    storage: ObjectStorage, wire: Any, news: list[Retried], bucket: str
) -> None:
    for _ in range(4 * QUICK.attempts):
        wire.plan("stall")
    sink = storage.sink("a")
    with pytest.raises(UnavailableError, match="tried 4 times"):
        sink.write(bytes(40 * MIB))
    assert news and all(told.stalled for told in news)
    assert uploads(bucket) == [] and storage.list() == []


def test_a_stalled_create_goes_on(storage: ObjectStorage, wire: Any) -> None:
    """s3fs sends it, and is as impatient as we are."""
    wire.plan("stall", after=MIB)
    assert storage.create("a", bytes(2 * MIB)) is None
    assert wire.happened == ["stall"]
    assert storage.create("a", b"other") == bytes(2 * MIB)


def test_a_call_of_fsspec_that_never_ends_is_given_up(bucket: str, wire: Any) -> None:
    """Whatever a driver does inside: the call is cancelled, and its connections are closed."""
    storage = ObjectStorage(f"s3://{bucket}/run")  # s3fs itself waits for 15 s here
    storage.create("warm", b"1")
    wire.plan("stall", after=64 << 10)
    with pytest.raises(TimeoutError):
        call(storage._connect(), "pipe_file", storage._path("a"), bytes(2 * MIB), seconds=4)
    assert wire.happened == ["stall"]
    assert storage.create("a", b"1") is None


def test_a_lost_answer_to_the_completion_is_no_failure(proxy: Any, bucket: str) -> None:
    """The repeated request is told "no such upload": the upload is the object by then."""
    news: list[Retried] = []
    storage = ObjectStorage(f"s3://{bucket}/run", transfer=IMPATIENT, on_retry=news.append)
    body = os.urandom(11 * MIB)
    with storage.sink("a") as sink:
        sink.write(body)
        proxy.plan["POST"] = ["lose"]
    assert storage.read("a") == body
    assert [told.operation for told in news] == ["complete the upload"]


def test_a_permanent_error_is_not_repeated(proxy: Any, bucket: str) -> None:
    news: list[Retried] = []
    storage = ObjectStorage(f"s3://{bucket}/run", transfer=IMPATIENT, on_retry=news.append)
    sink = storage.sink("a")
    sink.write(bytes(4 * MIB))
    proxy.plan["PUT"] = [(403, "AccessDenied")] * 10
    with pytest.raises(InvalidError, match="AccessDenied"):
        sink.commit()
    assert proxy.seen.count("PUT (403, 'AccessDenied')") == 1 and news == []


def test_cancelling_ends_the_parts_on_their_way_and_tells_nobody(
    storage: ObjectStorage, wire: Any, news: list[Retried], bucket: str
) -> None:
    sink = storage.sink("a")
    sink.write(bytes(20 * MIB))
    sink.cancel()
    assert uploads(bucket) == [] and news == []


def test_what_is_cancelled_is_not_repeated() -> None:
    cancelled = threading.Event()
    attempts = []

    def attempt() -> None:
        attempts.append(1)
        cancelled.set()
        raise ConnectionResetError

    news: list[Retried] = []
    transfers = Transfers(TransferPolicy(retry=QUICK), news.append)
    for _ in range(2):
        with pytest.raises(Abandoned):
            transfers.run("read", "s3://b/a", 7, attempt, cancelled)
    assert attempts == [1] and news == []


def test_an_upload_holds_no_more_than_its_share_of_memory(bucket: str, aws: str) -> None:
    """Two parts on their way although there are four lanes, and every buffer used again."""
    policy = TransferPolicy(part=5 * MIB, parallel=4, memory=10 * MIB)
    storage = ObjectStorage(f"s3://{bucket}/run", transfer=policy)
    sink: Any = storage.sink("a")
    buffers = set()
    for _ in range(60):
        sink.write(bytes(MIB))
        buffers |= {id(sink._upload._buffer)} if len(sink._upload._buffer) else set()
        assert len([part for part in sink._upload._moving if not part.done()]) <= 2
    sink.commit()
    assert storage.size("a") == 60 * MIB and len(buffers) <= 4


def test_obstore_sends_a_stalled_part_again_but_tells_nobody(bucket: str, wire: Any) -> None:
    """Why it is not the default: what happens below its surface is not seen."""
    news: list[Retried] = []
    policy = TransferPolicy(part=5 * MIB, stall_s=1.0, slowest=10 * MIB, retry=QUICK)
    storage = ObstoreStorage(f"s3://{bucket}/run", transfer=policy, on_retry=news.append)
    body = os.urandom(11 * MIB)
    wire.plan("stall")
    with storage.sink("a") as sink:
        sink.write(body)
    assert wire.happened == ["stall"] and news == []
    assert storage.read("a") == body


# --- the pieces themselves ------------------------------------------------------------------------------------


@given(part=st.integers(5 * MIB, 5 << 30))
def test_parts_keep_the_limits_of_the_services(part: int) -> None:
    policy = TransferPolicy(part=part)
    sizes = [policy.size(number) for number in range(MOST_PARTS)]
    assert sizes == sorted(sizes) and sizes[0] == part and sizes[-1] <= LARGEST_PART
    assert sum(sizes) >= 2 << 40
    with pytest.raises(InvalidError, match="10,000"):
        policy.size(MOST_PARTS)


def test_the_largest_object_of_s3_fits_by_default() -> None:
    assert sum(TransferPolicy().size(number) for number in range(MOST_PARTS)) >= 5 << 40


@given(expected=st.integers(0, 48 << 40))
def test_an_object_of_known_size_has_parts_of_one_size(expected: int) -> None:
    """Up to 39 TiB; a part cannot be larger than S3 allows, so that the 9,766 parts of 48 TiB grow no more."""
    policy = TransferPolicy().for_size(expected)
    left, number = expected, 0
    while left > 0:
        left -= policy.size(number)
        number += 1
    assert number <= MOST_PARTS and policy.size(0) <= LARGEST_PART
    assert number == 0 or policy.size(number - 1) == policy.size(0)


@given(start=st.integers(0, 1 << 40), size=st.integers(0, 200 * MIB))
def test_ranges_are_split_without_gap_or_overlap(start: int, size: int) -> None:
    pieces = list(TransferPolicy().split(start, size))
    assert sum(end - at for at, end in pieces) == size
    assert all(0 < end - at <= TransferPolicy().part for at, end in pieces)
    ends = [start, *(end for _, end in pieces)]
    assert ends[:-1] == [at for at, _ in pieces]


@given(size=st.integers(1, 5 << 30))
def test_memory_is_bounded_whatever_the_size_of_parts(size: int) -> None:
    policy = TransferPolicy()
    assert policy.under_way(size) == 1 or policy.under_way(size) * size <= policy.memory


@pytest.mark.parametrize("wrong", [{"part": MIB}, {"parallel": 0}, {"stall_s": 0}, {"slowest": 0}])
def test_a_policy_that_cannot_be_followed_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidError, match="cannot be followed"):
        TransferPolicy(**wrong)


def test_a_trickle_is_given_up_at_the_deadline() -> None:
    """Bytes move, so the socket's own timeout never fires."""
    body = Body(memoryview(bytes(3 * MIB)), time.monotonic() + 60, threading.Event())
    assert len(body.read(16384)) == MIB and body.tell() == MIB
    body._until = time.monotonic() - 1
    with pytest.raises(TimeoutError):
        body.read(16384)


def test_a_cancelled_body_ends_at_its_next_block() -> None:
    cancelled = threading.Event()
    body = Body(memoryview(bytes(3 * MIB)), time.monotonic() + 60, cancelled)
    body.read(1)
    cancelled.set()
    with pytest.raises(Abandoned):
        body.read(1)


def test_a_body_reads_like_a_file() -> None:
    data = os.urandom(2 * MIB + 5)
    body = Body(memoryview(data), time.monotonic() + 60, threading.Event())
    assert len(body) == len(data) and body.seek(0, 2) == len(data) and body.read(5) == b""
    body.seek(0)
    assert b"".join(iter(lambda: bytes(body.read(8192)), b"")) == data
    body.seek(7)
    assert body.read() == data[7:]


def test_only_what_may_pass_by_itself_is_repeated_and_each_time_told() -> None:
    news: list[Retried] = []
    transfers = Transfers(TransferPolicy(retry=QUICK), news.append)
    errors: list[Exception] = [TimeoutError("slow"), ConnectionResetError("cut")]

    def attempt() -> str:
        if errors:
            raise errors.pop(0)
        return "done"

    assert transfers.run("read", "s3://b/a", 7, attempt) == "done"
    assert [(told.attempt, told.stalled) for told in news] == [(1, True), (2, False)]
    with pytest.raises(KeyError):
        transfers.run("read", "s3://b/a", 7, lambda: {}["bug"])
    assert len(news) == 2


def test_a_deadline_is_recognised_wherever_it_hides() -> None:
    import botocore.exceptions as botocore
    from urllib3.exceptions import ProtocolError

    hidden = botocore.ConnectionClosedError(endpoint_url="e")
    hidden.__context__ = ProtocolError("Connection aborted.", TimeoutError("timed out"))
    assert timed_out(hidden)
    assert timed_out(botocore.ReadTimeoutError(endpoint_url="e"))
    other = botocore.ConnectionClosedError(endpoint_url="e")
    other.__context__ = ProtocolError("Connection aborted.", ConnectionResetError())
    assert not timed_out(other)
