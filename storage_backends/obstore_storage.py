"""Storage in S3 through obstore, the alternative to fsspec for ``s3://`` (RESILIENCE_S3_DRIVER=obstore).

Owns the same promises as ``object`` over the ``object_store`` crate. Endpoint, region, credentials and options are
those that s3fs and botocore find, so both drivers reach the same bucket with the same settings; botocore also
removes the unfinished uploads that obstore cannot list. What it cannot do: tell of a part that it sent again, or
give up one part of an upload rather than all of it (docs/decisions/0012-object-store.md). Must never use
obstore's fsspec shim, which ignores ``mode`` and so the condition of a create.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from obstore import open_writer
from obstore.exceptions import GenericError
from obstore.store import S3Store

from resilience.errors import InvalidError, UnavailableError
from storage_backends.base import (
    Capabilities,
    Sink,
    check_data,
    check_directory,
    check_name,
    check_range,
    well_formed,
)
from storage_backends.drivers import exists_already, past_the_end, translate_driver
from storage_backends.object_sink import ObjectSink
from storage_backends.ranges import Range
from storage_backends.s3_bytes import S3Bytes
from storage_backends.transfer import LARGEST_PART, OnRetry, TransferPolicy, Transfers

if TYPE_CHECKING:
    from obstore.store import S3Credential

T = TypeVar("T")
_RETRIES = 3  # of one request, inside obstore
_ASK_AGAIN = timedelta(minutes=5)  # botocore refreshes credentials in time; obstore asks it this often


class ObstoreStorage:
    """Objects below an S3 URL. Nothing is contacted before the first call."""

    def __init__(
        self, url: str, *, transfer: TransferPolicy | None = None, on_retry: OnRetry | None = None
    ) -> None:
        self._url = url.rstrip("/")
        self._bucket, _, self._root = self._url.partition("://")[2].partition("/")
        self._transfers = Transfers(transfer, on_retry)
        self._lock = threading.Lock()
        self._store: Any = None
        self._wire: S3Bytes | None = None
        self._process = 0

    @property
    def url(self) -> str:
        return self._url

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(arbitrates=True, local=False)

    def __repr__(self) -> str:
        return f"ObstoreStorage({self._url!r})"

    def create(self, name: str, data: bytes) -> bytes | None:
        check_data(data, name)
        key, store, data = self._key(name), self._connect(), bytes(data)
        try:
            self._ask("create", name, lambda: store.put(key, data, mode="create"))
            return None
        except FileNotFoundError as error:
            raise self._no_bucket("create", name) from error
        except Exception as error:
            if not exists_already(error):
                raise
        try:
            held = self.read(name)
        except FileNotFoundError as error:
            raise UnavailableError(
                f"{self._url}/{name} was taken, then absent",
                operation="create",
                path=f"{self._url}/{name}",
                hint="do not delete in a directory that is written to; the call may be repeated",
            ) from error
        return None if held == data else held

    def sink(self, name: str, size: int | None = None) -> Sink:
        key, url = self._key(name), f"{self._url}/{name}"
        upload = ObstoreUpload(self._connect(), self._transfers, key, size, lambda: self._sweep(key))
        return ObjectSink(lambda: self.size(name), url, upload)

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        check_range(start, end, name)
        key, store = self._key(name), self._connect()
        if end is not None and end <= start:
            self.size(name)  # absent is absent, also for an empty range
            return b""
        if end is not None and end - start > self._transfers.policy.part:
            buffer = memoryview(bytearray(end - start))
            return bytes(buffer[: self.read_into(name, [(start, buffer)])[0]])

        def fetch() -> bytes:
            if end is not None:
                return bytes(store.get_range(key, start=start, end=end))
            options = {"range": {"offset": start}} if start else None
            return bytes(store.get(key, options=options).bytes())

        return self._ask("read", name, lambda: _empty_past_the_end(fetch))

    def read_into(self, name: str, ranges: Sequence[Range]) -> list[int]:
        """See ``ranges.read_into``."""
        key, store, url = self._key(name), self._connect(), f"{self._url}/{name}"

        def fetch(at: int, view: memoryview) -> int:
            data = _empty_past_the_end(lambda: store.get_range(key, start=at, end=at + view.nbytes))
            view[: len(data)] = memoryview(data)
            return len(data)

        failed = threading.Event()
        pieces = []
        for start, buffer in ranges:
            check_range(start, None, name)
            view, of_range = buffer.cast("B"), []
            for at, end in self._transfers.policy.split(start, view.nbytes):
                attempt = partial(fetch, at, view[at - start : end - start])
                of_range.append(self._transfers.submit(f"read {at}:{end}", url, end - at, attempt, failed))
            pieces.append(of_range)
        try:
            return [sum(piece.result() for piece in of_range) for of_range in pieces]
        finally:
            failed.set()
            moving = [piece for of_range in pieces for piece in of_range]
            for piece in moving:
                piece.cancel()
            wait(moving)  # nobody writes into the caller's memory after this

    def size(self, name: str) -> int:
        key, store = self._key(name), self._connect()
        return self._ask("size", name, lambda: int(store.head(key)["size"]))

    def link(self, source: str, target: str) -> bool:
        key, copy, store = self._key(source), self._key(target), self._connect()
        if self.size(source) > LARGEST_PART:
            return False  # more than one request of S3 copies; obstore makes no more than one
        self._ask("link", source, lambda: store.copy(key, copy))
        return True

    def list(self, prefix: str = "") -> list[str]:
        prefix = check_directory(prefix)
        store, key = self._connect(), self._join(prefix)
        found = self._ask("list", prefix, lambda: store.list_with_delimiter(key or None))
        names = [entry["path"] for entry in found["objects"]] + [f"{p}/" for p in found["common_prefixes"]]
        inside = f"{self._root}/" if self._root else ""
        return sorted(
            n.removeprefix(inside) for n in names if well_formed(n.removeprefix(inside).removesuffix("/"))
        )

    def delete(self, name: str) -> None:
        key, store = self._key(name), self._connect()
        with suppress(FileNotFoundError):
            self._ask("delete", name, lambda: store.delete(key))

    def delete_all(self, prefix: str) -> None:
        store, key = self._connect(), self._key(check_directory(prefix, root=False))

        def remove() -> None:
            for page in store.list(f"{key}/"):
                store.delete([entry["path"] for entry in page])

        with suppress(FileNotFoundError):
            self._ask("delete_all", prefix, remove)
        self._ask("delete_all", prefix, lambda: self._sweep(f"{key}/"))

    def path(self, name: str) -> Path | None:
        check_name(name)
        return None

    def close(self) -> None:
        self._transfers.close()
        with self._lock:
            wire, self._wire, self._store = self._wire, None, None
        if wire is not None:
            wire.close()

    def _sweep(self, prefix: str) -> None:
        assert self._wire is not None
        self._wire.sweep(self._bucket, prefix)

    def _connect(self) -> Any:
        with self._lock:
            if self._store is None:
                try:
                    self._wire = _wire(self._url, self._transfers.policy)
                    self._store = _open(self._bucket, self._wire, self._transfers.policy)
                except Exception as error:
                    raise translate_driver(error, operation="open", path=self._url) from error
                self._process = os.getpid()
            elif self._process != os.getpid():
                raise InvalidError(
                    f"the storage {self._url} was opened before fork",
                    operation="storage",
                    path=self._url,
                    hint="open the storage in the process that uses it: connections do not survive a fork",
                )
            return self._store

    def _key(self, name: str) -> str:
        return self._join(check_name(name))

    def _join(self, name: str) -> str:
        return "/".join(part for part in (self._root, name) if part)

    def _ask(self, operation: str, name: str, call: Callable[[], T]) -> T:
        try:
            return call()
        except Exception as error:
            if exists_already(error):
                raise
            translated = translate_driver(error, operation=operation, path=f"{self._url}/{name}")
            if translated is error:
                raise
            raise translated from error

    def _no_bucket(self, operation: str, name: str) -> InvalidError:
        return InvalidError(
            f"cannot {operation} {self._url}/{name}: the bucket does not exist",
            operation=operation,
            path=self._url,
            hint="create the bucket, or correct its name in the storage URL",
        )


class ObstoreUpload:
    """A multipart upload whose parts obstore sends, and sends again; given up as a whole when it stands still."""

    def __init__(
        self, store: Any, transfers: Transfers, key: str, expected: int | None, sweep: Callable[[], None]
    ) -> None:
        policy = transfers.policy.for_size(expected)
        self._patience = (_RETRIES + 1) * policy.deadline(policy.part)
        self._sweep, self._block = sweep, policy.part
        self._transfers = transfers
        self._writer: Any = open_writer(store, key, buffer_size=policy.part, max_concurrency=policy.parallel)

    def write(self, view: memoryview) -> None:
        for at in range(0, len(view), self._block):
            # obstore keeps the buffer until its part has been sent, and the caller may use it again.
            self._bounded(partial(self._writer.write, bytes(view[at : at + self._block])))

    def publish(self) -> None:
        self._bounded(self._writer.close)

    def discard(self) -> None:
        self._writer = None  # one that is not closed publishes nothing
        with suppress(Exception):  # must not hide the error that brought us here; delete_all sweeps
            self._sweep()

    def _bounded(self, call: Callable[[], object]) -> None:
        try:
            self._transfers.lane(call).result(self._patience)
        except OSError as error:
            if error.errno is not None or type(error) is not OSError:
                raise
            raise GenericError(str(error)) from error  # its files raise the same texts under another name


def _wire(url: str, policy: TransferPolicy) -> S3Bytes:
    import fsspec

    fs, _ = fsspec.core.url_to_fs(url, skip_instance_cache=True)
    return S3Bytes(fs, policy)


def _open(bucket: str, wire: S3Bytes, policy: TransferPolicy) -> Any:
    place = wire.place()
    anonymous: dict[str, Any] = {"skip_signature": True} if place.anonymous else {}

    def credentials() -> S3Credential:
        now: Any = place.credentials.get_frozen_credentials()
        return {
            "access_key_id": now.access_key,
            "secret_access_key": now.secret_key,
            "token": now.token,
            "expires_at": datetime.now(UTC) + _ASK_AGAIN,
        }

    return S3Store(
        bucket,
        endpoint=place.endpoint,
        region=place.region,
        virtual_hosted_style_request=False,
        client_options={
            "allow_http": place.endpoint.startswith("http://"),
            "timeout": timedelta(seconds=policy.deadline(policy.part)),
            "connect_timeout": timedelta(seconds=min(5.0, policy.stall_s)),
            "read_timeout": timedelta(seconds=policy.stall_s),
        },
        retry_config={
            "max_retries": _RETRIES,
            "retry_timeout": timedelta(seconds=_RETRIES * policy.deadline(policy.part)),
            "backoff": {
                "init_backoff": timedelta(seconds=policy.retry.first),
                "max_backoff": timedelta(seconds=policy.retry.longest),
            },
        },
        credential_provider=None if anonymous else credentials,
        **anonymous,
    )


def _empty_past_the_end(fetch: Callable[[], Any]) -> Any:
    try:
        return fetch()
    except Exception as error:
        if past_the_end(error):
            return b""
        raise
