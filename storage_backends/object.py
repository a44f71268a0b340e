"""Storage in an object store, through fsspec: S3 and its relatives, Google Cloud Storage, Azure.

Owns the conditional put behind ``create`` and the read-back after it. Must never send an empty body
conditionally, never trust a cached listing, and never guess the outcome of a put whose answer did not
arrive. Endpoint and credentials come from where each driver's own users expect them (AWS environment
variables including AWS_ENDPOINT_URL, profiles, instance roles, fsspec's configuration).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
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
from storage_backends.drivers import exists_already, past_the_end, translate_driver
from storage_backends.object_sink import ObjectSink, S3Upload, SpooledUpload, Upload

T = TypeVar("T")

# Drivers whose pipe_file(mode="create") is one conditional request. Every other one looks first and writes
# then (fsspec's default), which a probe cannot see but a race can: two winners.
_CONDITIONAL = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"})
_S3 = frozenset({"s3", "s3a"})


class ObjectStorage:
    """Objects below an fsspec URL. Nothing is contacted before the first call."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
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
            fs.pipe_file(path, data, mode="create")
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
        fs = self._connect()
        upload: Upload = S3Upload(fs, path) if self._scheme in _S3 else SpooledUpload(fs, path)
        return ObjectSink(fs, path, f"{self._url}/{name}", upload)

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        check_range(start, end, name)
        path = self._path(name)
        if end is not None and end <= start:
            self.size(name)  # absent is absent, also for an empty range
            return b""
        fs = self._connect()
        # s3fs asks for the size first, so as to read large objects in parallel: a request more for each
        # record of the commit log, and large objects are read by range here.
        single = {"max_concurrency": 1} if self._scheme in _S3 else {}

        def fetch() -> bytes:
            try:
                return bytes(fs.cat_file(path, start=start or None, end=end, **single))
            except Exception as error:
                if start and past_the_end(error):
                    return b""
                raise

        return self._ask("read", name, fetch)

    def size(self, name: str) -> int:
        path, fs = self._path(name), self._connect()

        def look() -> int:
            found = fs.info(path)
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
        try:
            entries = self._ask("list", prefix, lambda: fs.ls(path, detail=True))
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
            self._ask("delete", name, lambda: fs.rm_file(path))
        except FileNotFoundError:
            return

    def recycle(self, name: str) -> None:
        self.delete(name)

    def trim(self) -> None:
        return None

    def delete_all(self, prefix: str) -> None:
        path, fs = self._path(check_directory(prefix, root=False)), self._connect()
        try:
            self._ask("delete_all", prefix, lambda: fs.rm(path, recursive=True))
        except FileNotFoundError:
            pass
        if hasattr(fs, "abort_mpu"):  # S3 keeps, and bills, the parts of uploads whose writer died
            self._ask("delete_all", prefix, lambda: _abort_uploads(fs, path))

    def path(self, name: str) -> Path | None:
        check_name(name)
        return None

    def close(self) -> None:
        with self._lock:
            self._filesystem = None  # its finalizer closes the connections

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


def _abort_uploads(fs: Any, path: str) -> None:
    bucket, key, _ = fs.split_path(path)
    marker: dict[str, str] = {}
    while True:
        page = fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{key}/", **marker)
        for upload in page.get("Uploads", []):
            try:
                fs.abort_mpu(bucket, upload["Key"], upload["UploadId"])
            except FileNotFoundError:
                continue  # finished or aborted meanwhile
        if not page.get("IsTruncated"):
            return
        marker = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}
