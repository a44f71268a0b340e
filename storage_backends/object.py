"""Storage in an object store, through fsspec: S3 and its relatives, Google Cloud Storage, Azure.

Owns the conditional put behind ``create`` and the read-back after it. Must never send an empty body
conditionally, never trust a cached listing, and never guess the outcome of a put whose answer did not
arrive. Endpoint and credentials come from where each driver's own users expect them (AWS environment
variables including AWS_ENDPOINT_URL, profiles, instance roles, fsspec's configuration).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

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
from storage_backends.drivers import call, exists_already, past_the_end, translate_driver
from storage_backends.object_sink import ObjectSink, S3Upload, SpooledUpload, Upload
from storage_backends.ranges import Range, read_one_by_one
from storage_backends.s3_bytes import S3Bytes
from storage_backends.transfer import OnRetry, TransferPolicy, Transfers

T = TypeVar("T")

# Drivers whose pipe_file(mode="create") is one conditional request. Every other one looks first and writes
# then (fsspec's default), which a probe cannot see but a race can: two winners.
_CONDITIONAL = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"})
_S3 = frozenset({"s3", "s3a"})


class ObjectStorage:
    """Objects below an fsspec URL. Nothing is contacted before the first call."""

    def __init__(
        self, url: str, *, transfer: TransferPolicy | None = None, on_retry: OnRetry | None = None
    ) -> None:
        self._url = url.rstrip("/")
        self._transfers = Transfers(transfer, on_retry)
        self._wire: S3Bytes | None = None
        self._scheme = url.partition("://")[0]
        self._lock = threading.Lock()
        self._filesystem: Any = None
        self._root = ""
        self._process = 0

    @property
    def url(self) -> str:
        return self._url

    @property
    def capabilities(self) -> Capabilities:
        if self._scheme in _CONDITIONAL:
            return Capabilities(arbitrates=True, local=False)
        reason = f"fsspec's {self._scheme!r} file system has no atomic create: it looks first and writes then"
        return Capabilities(arbitrates=False, local=False, reason=reason)

    def __repr__(self) -> str:
        return f"ObjectStorage({self._url!r})"

    def create(self, name: str, data: bytes) -> bytes | None:
        check_data(data, name)
        path = self._path(name)
        fs, data = self._connect(), bytes(data)
        try:
            call(fs, "pipe_file", path, data, mode="create", seconds=self._patience(len(data)))
            return None
        except Exception as error:
            if not exists_already(error):
                raise self._outcome_unknown(error, name) from error
        # Taken, perhaps by ourselves: drivers repeat a put whose answer was lost, and then lose to it.
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
        path = self._path(name)
        fs, url = self._connect(), f"{self._url}/{name}"
        upload: Upload
        if self._scheme in _S3:
            bucket, key, _ = fs.split_path(path)
            upload = S3Upload(self._open_wire(fs), self._transfers, bucket, key, url, size)
        else:
            upload = SpooledUpload(fs, self._transfers, path, url)
        return ObjectSink(lambda: self.size(name), url, upload)

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        check_range(start, end, name)
        path = self._path(name)
        if end is not None and end <= start:
            self.size(name)  # absent is absent, also for an empty range
            return b""
        if end is not None and end - start > self._transfers.policy.part and self._scheme in _S3:
            buffer = memoryview(bytearray(end - start))
            return bytes(buffer[: self.read_into(name, [(start, buffer)])[0]])
        fs = self._connect()
        # s3fs asks for the size first, so as to read large objects in parallel: a request more for each
        # record of the commit log, and large objects are read by range here.
        single = {"max_concurrency": 1} if self._scheme in _S3 else {}

        def fetch() -> bytes:
            try:
                found = call(
                    fs,
                    "cat_file",
                    path,
                    start=start or None,
                    end=end,
                    seconds=self._patience(self._transfers.policy.part),
                    **single,
                )
                return bytes(found)
            except Exception as error:
                if past_the_end(error):  # also the first byte of an empty object is
                    return b""
                raise

        return self._ask("read", name, fetch)

    def read_into(self, name: str, ranges: Sequence[Range]) -> list[int]:
        """See ``ranges.read_into``. On S3 all pieces of all ranges travel in parallel, without a copy."""
        if self._scheme not in _S3:
            return read_one_by_one(self, name, ranges)
        path, fs, url = self._path(name), self._connect(), f"{self._url}/{name}"
        wire = self._open_wire(fs)
        bucket, key, _ = fs.split_path(path)
        failed = threading.Event()
        pieces: list[list[Future[int]]] = []
        for start, buffer in ranges:
            check_range(start, None, name)
            view = buffer.cast("B")
            pieces.append([])
            for at, end in self._transfers.policy.split(start, view.nbytes):
                attempt = partial(wire.read_into, bucket, key, at, view[at - start : end - start], failed)
                pieces[-1].append(self._transfers.submit(f"read {at}:{end}", url, end - at, attempt, failed))
        moving = [piece for pieces_of_range in pieces for piece in pieces_of_range]
        try:
            return [sum(piece.result() for piece in pieces_of_range) for pieces_of_range in pieces]
        finally:
            failed.set()
            for piece in moving:
                piece.cancel()
            wait(moving)  # nobody writes into the caller's memory after this

    def size(self, name: str) -> int:
        path, fs = self._path(name), self._connect()

        def look() -> int:
            found = call(fs, "info", path, seconds=self._patience(0))
            if found["type"] != "file":
                raise FileNotFoundError(2, "no such object", path)
            return int(found["size"])

        return self._ask("size", name, look)

    def link(self, source: str, target: str) -> bool:
        path, copy, fs = self._path(source), self._path(target), self._connect()
        try:
            self._ask("link", source, lambda: fs.cp_file(path, copy))
        except NotImplementedError:
            return False
        return True

    def list(self, prefix: str = "") -> list[str]:
        prefix = check_directory(prefix)
        fs = self._connect()
        path = f"{self._root}/{prefix}" if prefix else self._root
        seconds = 10 * self._patience(0)  # a long listing is many requests
        try:
            entries = self._ask("list", prefix, lambda: call(fs, "ls", path, detail=True, seconds=seconds))
        except FileNotFoundError:
            return []
        lead = f"{prefix}/" if prefix else ""
        inside = f"{path.strip('/')}/"
        found = set()
        for entry in entries:
            full = entry["name"].strip("/")
            child = full.removeprefix(inside)
            if full.startswith(inside) and "/" not in child and well_formed(child):
                found.add(f"{lead}{child}{'/' if entry['type'] == 'directory' else ''}")
        return sorted(found)

    def delete(self, name: str) -> None:
        path, fs = self._path(name), self._connect()
        try:
            self._ask("delete", name, lambda: call(fs, "rm_file", path, seconds=self._patience(0)))
        except FileNotFoundError:
            return

    def delete_all(self, prefix: str) -> None:
        path, fs = self._path(check_directory(prefix, root=False)), self._connect()
        try:
            self._ask("delete_all", prefix, lambda: fs.rm(path, recursive=True))
        except FileNotFoundError:
            pass
        if self._scheme in _S3:
            wire, (bucket, key, _) = self._open_wire(fs), fs.split_path(path)
            self._ask("delete_all", prefix, lambda: wire.sweep(bucket, f"{key}/"))

    def path(self, name: str) -> Path | None:
        check_name(name)
        return None

    def close(self) -> None:
        self._transfers.close()
        with self._lock:
            wire, self._wire = self._wire, None
            self._filesystem = None  # its finalizer closes the connections
        if wire is not None:
            wire.close()

    def _connect(self) -> Any:
        with self._lock:
            if self._filesystem is None:
                import fsspec

                # No shared instances (their listing caches never expire, and fork breaks them all at once).
                options = {"skip_instance_cache": True, "use_listings_cache": False}
                try:
                    fs, root = fsspec.core.url_to_fs(self._url, **options)
                except Exception as error:
                    raise translate_driver(error, operation="open", path=self._url) from error
                if self._scheme in _S3:
                    # Two layers of patience below ours would multiply: minutes until a dead endpoint is told.
                    fs.retries = 2
                    patience = self._transfers.policy.stall_s
                    for name, usual in (("connect_timeout", 5.0), ("read_timeout", 15.0)):  # s3fs's own
                        fs.config_kwargs.setdefault(name, min(usual, patience))
                    fs.config_kwargs.setdefault("retries", {"total_max_attempts": 2, "mode": "standard"})
                self._filesystem, self._root, self._process = fs, root.rstrip("/"), os.getpid()
            elif self._process != os.getpid():
                raise InvalidError(
                    f"the storage {self._url} was opened before fork",
                    operation="storage",
                    path=self._url,
                    hint="open the storage in the process that uses it: connections do not survive a fork",
                )
            return self._filesystem

    def _open_wire(self, fs: Any) -> S3Bytes:
        with self._lock:
            if self._wire is None:
                try:
                    self._wire = S3Bytes(fs, self._transfers.policy)
                except Exception as error:
                    raise translate_driver(error, operation="open", path=self._url) from error
            return self._wire

    def _patience(self, size: int) -> float:
        """Seconds for a call of s3fs, gcsfs or adlfs: they repeat requests by themselves."""
        return 4 * self._transfers.policy.deadline(size)

    def _path(self, name: str) -> str:
        check_name(name)
        self._connect()
        return f"{self._root}/{name}"

    def _ask(self, operation: str, name: str, call: Callable[[], T]) -> T:
        try:
            return call()
        except IsADirectoryError:
            raise FileNotFoundError(2, "no such object", f"{self._url}/{name}") from None
        except Exception as error:
            translated = translate_driver(error, operation=operation, path=f"{self._url}/{name}")
            if translated is error:
                raise
            raise translated from error

    def _outcome_unknown(self, error: Exception, name: str) -> Exception:
        """A put that failed for want of an answer may have landed: say so, never "failed"."""
        translated = translate_driver(error, operation="create", path=f"{self._url}/{name}")
        if isinstance(translated, FileNotFoundError):
            return InvalidError(
                f"cannot create {self._url}/{name}: the bucket or container does not exist",
                operation="create",
                path=self._url,
                hint="create the bucket, or correct its name in the storage URL",
            )
        return translated
