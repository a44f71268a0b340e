"""The object backend where the suite cannot look: lost replies, refusals, dead endpoints, driver habits."""

from __future__ import annotations

import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from resilience.errors import ExhaustedError, InvalidError, UnavailableError
from storage_backends import RetryPolicy, open_storage, probe
from storage_backends.object import ObjectStorage
from storage_backends.obstore_storage import ObstoreStorage
from storage_backends.retry import RetryStorage
from storage_backends.transfer import TransferPolicy

PATIENT = RetryPolicy(sleep=lambda seconds: None)
Kind = type[ObjectStorage] | type[ObstoreStorage]


@pytest.fixture(params=[ObjectStorage, ObstoreStorage])
def kind(request: pytest.FixtureRequest) -> Kind:
    """Both drivers of S3 keep the same promises."""
    return request.param


def uploads(bucket: str) -> list[Any]:
    import boto3

    return boto3.client("s3").list_multipart_uploads(Bucket=bucket).get("Uploads", [])


def test_the_endpoint_comes_from_the_environment(bucket: str) -> None:
    """Nothing but AWS_ENDPOINT_URL and the AWS credentials says where the bucket is."""
    storage = open_storage(f"s3://{bucket}/run")
    assert storage.create("FORMAT", b"1") is None
    assert probe(storage).arbitrates


def test_a_lost_reply_to_our_own_create_is_success(kind: Kind, proxy: Any, bucket: str) -> None:
    """The driver repeats the put, and then loses to itself."""
    storage = kind(f"s3://{bucket}/run")
    proxy.plan["PUT"] = ["lose"]
    assert storage.create("log/1", b"mine") is None
    assert proxy.seen.count("PUT lose") == 1 and proxy.seen.count("PUT pass") >= 1


def test_a_create_whose_every_reply_is_lost_is_unknown_and_settles_on_repeat(
    kind: Kind, proxy: Any, bucket: str
) -> None:
    storage = kind(f"s3://{bucket}/run")
    proxy.plan["PUT"] = ["lose"] * 20
    with pytest.raises(UnavailableError, match="create") as caught:
        storage.create("log/1", b"mine")
    assert caught.value.hint
    proxy.plan.clear()
    assert storage.read("log/1") == b"mine", "it had landed"
    assert storage.create("log/1", b"mine") is None
    assert storage.create("log/1", b"other") == b"mine"


@pytest.mark.parametrize(
    "status", [(409, "ConditionalRequestConflict"), (503, "SlowDown"), (500, "InternalError")]
)
def test_conflicts_and_busy_servers_are_retried(
    kind: Kind, proxy: Any, bucket: str, status: tuple[int, str]
) -> None:
    storage = kind(f"s3://{bucket}/run")
    proxy.plan["PUT"] = [status] * 50
    with pytest.raises(UnavailableError):
        storage.create("log/1", b"mine")
    proxy.plan["PUT"] = [status] * 5
    assert RetryStorage(storage, PATIENT).create("log/1", b"mine") is None


def test_a_bare_412_means_taken(kind: Kind, proxy: Any, bucket: str) -> None:
    """Some clones answer without naming the condition that failed."""
    storage = kind(f"s3://{bucket}/run")
    storage.create("log/1", b"first")
    proxy.plan["PUT"] = [(412, "PreconditionFailed")]
    assert storage.create("log/1", b"second") == b"first"


def test_a_store_that_ignores_the_condition_is_refused(kind: Kind, proxy: Any, bucket: str) -> None:
    """Some S3 clones accept If-None-Match and overwrite."""
    storage = kind(f"s3://{bucket}/run")
    proxy.dropped.add("if-none-match")
    with pytest.raises(InvalidError, match="ignores conditional writes"):
        probe(storage)
    assert storage.list() == []


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ((403, "AccessDenied"), InvalidError),
        ((403, "InvalidAccessKeyId"), InvalidError),
        ((400, "InvalidArgument"), InvalidError),
        ((507, "XMinioStorageFull"), ExhaustedError),
        ((503, "ServiceUnavailable"), UnavailableError),
        ((429, "TooManyRequests"), UnavailableError),
        ((400, "RequestTimeout"), UnavailableError),
    ],
)
def test_what_the_service_says_becomes_our_words(
    kind: Kind, proxy: Any, bucket: str, status: tuple[int, str], expected: type[Exception]
) -> None:
    storage = kind(f"s3://{bucket}/run")
    storage.create("a", b"1")
    for method in ("GET", "PUT", "DELETE", "POST"):
        proxy.plan[method] = [status] * 50
    for call in (lambda: storage.read("a"), lambda: storage.create("b", b"1"), lambda: storage.delete("a")):
        with pytest.raises(expected) as caught:
            call()
        assert getattr(caught.value, "hint", "") and bucket in str(caught.value)


def test_a_missing_bucket_says_so(kind: Kind, aws: str) -> None:
    storage = kind("s3://nobody-made-this/run")
    sink = storage.sink("a")
    sink.write(b"1")
    for call in (lambda: storage.create("a", b"1"), lambda: storage.read("a"), storage.list, sink.commit):
        with pytest.raises(InvalidError, match="bucket") as caught:
            call()
        assert "create the bucket" in str(caught.value)


def test_missing_credentials_say_so(
    kind: Kind, bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(InvalidError, match="credentials"):
        kind(f"s3://{bucket}/run").create("a", b"1")


def test_a_dead_endpoint_is_told_in_bounded_time(
    kind: Kind, aws: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound and not listening: refuses, and nobody else can take it
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{held.getsockname()[1]}")
        storage = kind("s3://bucket/run")
        sink = storage.sink("a")
        sink.write(b"1")
        began = time.monotonic()
        for call in (lambda: storage.create("a", b"1"), lambda: storage.read("a"), storage.list, sink.commit):
            with pytest.raises(UnavailableError, match="bucket"):
                call()
        assert time.monotonic() - began < 30


def test_a_cancelled_upload_leaves_no_parts(kind: Kind, bucket: str) -> None:
    storage = kind(f"s3://{bucket}/run")
    sink = storage.sink("d/a")
    sink.write(bytes(40 << 20))
    assert len(uploads(bucket)) == 1
    sink.cancel()
    assert uploads(bucket) == []


def test_delete_all_takes_the_parts_of_dead_writers_only_below_it(kind: Kind, bucket: str) -> None:
    storage = kind(f"s3://{bucket}/run")
    sinks = [storage.sink(name) for name in ("c/step-1/a", "c/step-10/a")]
    for sink in sinks:
        sink.write(bytes(17 << 20))
    storage.delete_all("c/step-1")
    assert [upload["Key"] for upload in uploads(bucket)] == ["run/c/step-10/a"]
    for sink in sinks:
        sink.cancel()


def test_a_failed_part_kills_the_sink(kind: Kind, proxy: Any, bucket: str) -> None:
    storage = kind(f"s3://{bucket}/run")
    sink = storage.sink("a")
    proxy.plan["PUT"] = [(503, "SlowDown")] * 100
    sink.write(bytes(20 << 20))
    with pytest.raises(UnavailableError):
        sink.commit()
    proxy.plan.clear()
    with pytest.raises(InvalidError, match="dead"):
        sink.commit()
    assert storage.list() == [] and uploads(bucket) == []


def test_a_store_that_acknowledges_and_does_not_store_is_caught(kind: Kind, proxy: Any, bucket: str) -> None:
    storage = kind(f"s3://{bucket}/run")
    with storage.sink("a") as sink:
        sink.write(b"old")
    proxy.plan["PUT"] = [(200, "")]
    sink = storage.sink("a")
    sink.write(b"newer")
    with pytest.raises(UnavailableError, match=r"holds 3 bytes after writing 5|ETag Header missing"):
        sink.commit()


def test_many_parts_arrive_in_order(kind: Kind, bucket: str) -> None:
    storage = kind(f"s3://{bucket}/run", transfer=TransferPolicy(part=5 << 20, memory=12 << 20))
    body = os.urandom(1 << 20)
    with storage.sink("a") as sink:
        for number in range(52):
            sink.write(bytes([number]) + body[1:])
    whole = storage.read("a")
    assert len(whole) == 52 << 20
    assert [whole[number << 20] for number in range(52)] == list(range(52))
    assert whole[(33 << 20) + 1 : 34 << 20] == body[1:]


def test_a_caller_may_use_its_buffer_again_after_each_write(kind: Kind, bucket: str) -> None:
    """The arena's slot and a reader's block are overwritten while parts of them are still on their way."""
    storage = kind(f"s3://{bucket}/run", transfer=TransferPolicy(part=5 << 20))
    block = bytearray(3 << 20)
    with storage.sink("a") as sink:
        for number in range(1, 12):
            block[:] = bytes([number]) * len(block)
            sink.write(block)
        block[:] = bytes(len(block))
    assert storage.read("a") == b"".join(bytes([number]) * len(block) for number in range(1, 12))


@pytest.mark.parametrize("size", [0, 1, (5 << 20) - 1, 5 << 20, (5 << 20) + 1, 10 << 20])
def test_objects_around_the_size_of_a_part(kind: Kind, bucket: str, size: int) -> None:
    storage = kind(f"s3://{bucket}/run", transfer=TransferPolicy(part=5 << 20))
    body = os.urandom(size)
    with storage.sink("a") as sink:
        for at in range(0, size, 3_000_001):
            sink.write(body[at : at + 3_000_001])
    assert storage.read("a") == body
    assert storage.read("a", 0, size + 1) == body


def test_ranges_are_read_in_parallel_into_the_callers_memory(kind: Kind, proxy: Any, bucket: str) -> None:
    storage = kind(f"s3://{bucket}/run", transfer=TransferPolicy(part=5 << 20))
    body = os.urandom(23 << 20)
    with storage.sink("a") as sink:
        sink.write(body)
    memory = bytearray(20 << 20)
    view = memoryview(memory)
    proxy.seen.clear()
    ranges = [(7, view[: 11 << 20]), (20 << 20, view[11 << 20 : 15 << 20]), (30 << 20, view[15 << 20 :])]
    assert storage.read_into("a", ranges) == [11 << 20, 3 << 20, 0]
    assert memory[: 11 << 20] == body[7 : (11 << 20) + 7]
    assert memory[11 << 20 : 14 << 20] == body[20 << 20 :]
    assert sum(line.startswith("GET") for line in proxy.seen) == 3 + 1 + 1
    with pytest.raises(FileNotFoundError):
        storage.read_into("b", ranges)


def test_after_fork_a_handle_says_so(kind: Kind, bucket: str) -> None:
    """Using it would hang on an event loop whose thread does not exist in the child."""
    storage = kind(f"s3://{bucket}/run")
    storage.create("a", b"1")
    child = os.fork()
    if child == 0:
        try:
            storage.read("a")
        except InvalidError as error:
            os._exit(0 if "before fork" in str(error) else 1)
        except BaseException:
            os._exit(2)
        os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_handles_share_no_driver(bucket: str) -> None:
    """fsspec caches instances, and their listings never expire."""
    a, b = ObjectStorage(f"s3://{bucket}/run"), ObjectStorage(f"s3://{bucket}/run")
    assert a._connect() is not b._connect()
    for slot in range(3):
        b.create(f"log/{slot}", b"1")
        assert a.list("log") == [f"log/{n}" for n in range(slot + 1)]


# --- file systems that cannot arbitrate ---------------------------------------------------------------------


def test_fsspec_local_has_two_winners_in_a_race_and_is_refused(tmp_path: Path) -> None:
    """Why paths and file:// go to the posix backend, and why the probe does not ask only the store."""
    storage = ObjectStorage(f"local://{tmp_path}")
    storage._connect().auto_mkdir = True
    assert storage.create("warm", b"1") is None
    assert storage.create("warm", b"2") == b"1", "one after the other looks right"
    disputed = 0
    with ThreadPoolExecutor(8) as pool:
        for slot in range(200):
            ready = threading.Barrier(8)

            def attempt(writer: int, slot: int = slot, ready: threading.Barrier = ready) -> bool:
                ready.wait(10)
                return storage.create(f"{slot}", b"writer %d" % writer) is None

            disputed += sum(pool.map(attempt, range(8))) != 1
            if disputed:
                break
    assert disputed, "if this passes 200 times, fsspec has learnt to create exclusively: trust it then"
    with pytest.raises(InvalidError, match="looks first and writes then"):
        probe(storage)
    from storage_backends.posix import PosixStorage

    for url in (f"local://{tmp_path}", f"file://{tmp_path}", str(tmp_path)):
        assert isinstance(open_storage(url, retry=False), PosixStorage)


def test_other_schemes_are_refused_by_the_probe_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(InvalidError, match="no atomic create") as caught:
        probe(ObjectStorage("github://org:repo@main/"))
    assert "S3, GCS or Azure" in str(caught.value)


def test_a_spooled_sink_larger_than_memory_goes_through_a_file(tmp_path: Path) -> None:
    """What gcsfs and adlfs get, shown over fsspec's local file system."""
    storage = ObjectStorage(f"local://{tmp_path}")
    storage._connect().auto_mkdir = True
    body = os.urandom(1 << 20)
    with storage.sink("d/a") as sink:
        for _ in range(20):
            sink.write(body)
        assert storage.list("d") == []
    assert storage.read("d/a") == body * 20
