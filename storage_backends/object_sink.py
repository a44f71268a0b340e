"""Streaming one object into an object store.

Owns the upload between the first byte and its publication, which is one atomic request at ``commit``. Must
never let a garbage-collected or interrupted upload publish itself: fsspec's own file objects do (closing
them completes the upload), so they are not used.
"""

from __future__ import annotations

import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from resilience.errors import InvalidError, UnavailableError
from storage_backends.drivers import translate_driver

_PART = 16 << 20  # bytes of a part, at first; smaller objects are a single put
_GROW = 1000  # parts of one size before the next is doubled: S3 takes 10,000 parts, so 16 TiB fit
_PARALLEL = 4  # parts on their way at once; one stream alone does not fill a network


class Upload(Protocol):
    """Where a sink's bytes go until they are published at once."""

    def write(self, view: memoryview) -> None: ...

    def publish(self) -> None: ...

    def discard(self) -> None:
        """Free what the upload holds. Best effort: never raises what a driver raises."""


class ObjectSink:
    """One object on its way: one use, cancelled by any error, its size checked after publication."""

    def __init__(self, fs: Any, path: str, url: str, upload: Upload) -> None:
        self._fs, self._path, self._url, self._upload = fs, path, url, upload
        self._size = 0
        self._state = "open"

    def write(self, data: bytes | memoryview) -> None:
        self._need_open("write")
        view = memoryview(data).cast("B")
        try:
            self._upload.write(view)
        except BaseException as error:
            raise self._dead(error, "write") from error
        self._size += len(view)

    def commit(self) -> None:
        self._need_open("commit")
        try:
            self._upload.publish()
            size = int(self._fs.info(self._path)["size"])
        except BaseException as error:
            raise self._dead(error, "commit") from error
        if size != self._size:
            self._state = "dead"
            raise UnavailableError(
                f"{self._url} holds {size} bytes after writing {self._size}",
                operation="commit",
                path=self._url,
                hint="another writer used the same name, or the store lost bytes: write the object again",
            )
        self._state = "committed"

    def cancel(self) -> None:
        if self._state == "open":
            self._state = "dead"
            self._upload.discard()

    def __enter__(self) -> ObjectSink:
        return self

    def __exit__(self, *exc: object) -> None:
        if exc and exc[0] is not None:
            self.cancel()
        elif self._state == "open":
            self.commit()

    def _dead(self, error: BaseException, operation: str) -> BaseException:
        self.cancel()
        if not isinstance(error, Exception):
            return error  # KeyboardInterrupt and the like: clean up and go on
        translated = translate_driver(error, operation=operation, path=self._url)
        if isinstance(translated, FileNotFoundError):
            return InvalidError(
                f"{operation} of {self._url} failed: what it writes into is gone",
                operation=operation,
                path=self._url,
                hint="check that the bucket exists and that nobody deletes where a job writes",
            )
        return translated

    def _need_open(self, operation: str) -> None:
        if self._state != "open":
            raise InvalidError(
                f"the sink of {self._url} is {self._state}",
                operation=operation,
                path=self._url,
                hint="a sink is used once; after an error open a new one and write the object again",
            )


class S3Upload:
    """A multipart upload of S3, its parts sent in parallel; a single put below one part."""

    def __init__(self, fs: Any, path: str) -> None:
        self._fs, self._path = fs, path
        self._bucket, self._key, _ = fs.split_path(path)
        self._buffer = bytearray()
        self._id = ""
        self._pool: ThreadPoolExecutor | None = None
        self._parts: list[Future[dict[str, Any]]] = []

    def write(self, view: memoryview) -> None:
        while view:
            size = _PART << (len(self._parts) // _GROW)
            taken = view[: size - len(self._buffer)]
            self._buffer += taken
            view = view[len(taken) :]
            if len(self._buffer) == size:
                self._send()

    def publish(self) -> None:
        if not self._id:
            self._fs.pipe_file(self._path, bytes(self._buffer), mode="overwrite")
            return
        if self._buffer:
            self._send()
        parts = [part.result() for part in self._parts]
        self._call("complete_multipart_upload", UploadId=self._id, MultipartUpload={"Parts": parts})
        self._stop()

    def discard(self) -> None:
        self._buffer = bytearray()
        self._stop()
        if self._id:
            try:
                self._call("abort_multipart_upload", UploadId=self._id)
            except Exception:  # noqa: BLE001 (must not hide the error that brought us here; delete_all sweeps)
                return

    def _send(self) -> None:
        if self._pool is None:
            self._id = self._call("create_multipart_upload")["UploadId"]
            self._pool = ThreadPoolExecutor(_PARALLEL, thread_name_prefix="upload")
        if len(self._parts) >= _PARALLEL:
            self._parts[-_PARALLEL].result()  # bounds the memory, and tells of a lost part early
        body, self._buffer = bytes(self._buffer), bytearray()
        self._parts.append(self._pool.submit(self._part, len(self._parts) + 1, body))

    def _part(self, number: int, body: bytes) -> dict[str, Any]:
        answer = self._call("upload_part", UploadId=self._id, PartNumber=number, Body=body)
        checksums = {name: value for name, value in answer.items() if name.startswith("Checksum") and value}
        checksums.pop("ChecksumType", None)
        return {"PartNumber": number, "ETag": answer["ETag"], **checksums}

    def _call(self, method: str, **arguments: Any) -> dict[str, Any]:
        extra = self._fs.s3_additional_kwargs  # encryption and storage class, where configured
        return dict(self._fs.call_s3(method, extra, Bucket=self._bucket, Key=self._key, **arguments) or {})

    def _stop(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


class SpooledUpload:
    """Bytes gathered in a local temporary file (in memory while small), sent as one object at the end.

    For drivers whose streaming files we cannot vouch for. Needs room for the object in ``TMPDIR``.
    """

    def __init__(self, fs: Any, path: str) -> None:
        self._fs, self._path = fs, path
        self._file = tempfile.SpooledTemporaryFile(max_size=_PART, prefix="resilience-upload-")  # noqa: SIM115

    def write(self, view: memoryview) -> None:
        self._file.write(view)

    def publish(self) -> None:
        size = self._file.tell()
        self._file.seek(0)
        if size <= _PART:
            self._fs.pipe_file(self._path, self._file.read(), mode="overwrite")
        else:
            self._file.flush()
            self._fs.put_file(f"/proc/self/fd/{self._file.fileno()}", self._path)
        self._file.close()

    def discard(self) -> None:
        self._file.close()
