"""Streaming one object into an object store.

Owns the upload between the first byte and its publication, which is one atomic request at ``commit``. Must
never let a garbage-collected or interrupted upload publish itself: fsspec's own file objects do (closing
them completes the upload), so they are not used.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from functools import partial
from typing import Any, Protocol, TypeVar

from resilience.errors import InvalidError, UnavailableError
from storage_backends.drivers import call, translate_driver, upload_is_gone
from storage_backends.s3_bytes import S3Bytes
from storage_backends.transfer import Transfers

T = TypeVar("T")

_SPOOL = 16 << 20  # bytes that a spooled object may have in memory


class Upload(Protocol):
    """Where a sink's bytes go until they are published at once."""

    def write(self, view: memoryview) -> None: ...

    def publish(self) -> None: ...

    def discard(self) -> None:
        """Free what the upload holds. Best effort: never raises what a driver raises."""


class ObjectSink:
    """One object on its way: one use, cancelled by any error, its size checked after publication."""

    def __init__(self, size: Callable[[], int], url: str, upload: Upload) -> None:
        self._published, self._url, self._upload = size, url, upload
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
            size = self._published()
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
    """A multipart upload of S3, its parts sent in parallel and repeated one by one; one put below one part.

    Holds at most ``TransferPolicy.memory`` bytes on their way and one part that is being filled; their buffers
    are used again.
    """

    def __init__(
        self,
        wire: S3Bytes,
        transfers: Transfers,
        bucket: str,
        key: str,
        url: str,
        expected: int | None = None,
    ) -> None:
        self._wire, self._transfers = wire, transfers
        self._policy = transfers.policy.for_size(expected)
        self._bucket, self._key, self._url = bucket, key, url
        self._buffer = bytearray()
        self._filled = 0
        self._free: list[bytearray] = []
        self._id = ""
        self._sent = 0
        self._moving: set[Future[None]] = set()
        self._done: list[dict[str, Any]] = []
        self._cancelled = threading.Event()

    def write(self, view: memoryview) -> None:
        while view:
            size = self._policy.size(self._sent)
            if len(self._buffer) != size:
                self._grow(size, len(view))
            taken = view[: len(self._buffer) - self._filled]
            self._buffer[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            view = view[len(taken) :]
            if self._filled == size:
                self._send()

    def publish(self) -> None:
        if not self._id:
            body = memoryview(self._buffer)[: self._filled]
            self._run("upload", lambda: self._wire.put(self._bucket, self._key, body, self._cancelled))
            return
        if self._filled:
            self._send()
        self._settle(0)
        self._done.sort(key=lambda part: int(part["PartNumber"]))
        self._run("complete the upload", self._complete)

    def discard(self) -> None:
        self._cancelled.set()  # parts on their way end at their next block
        for part in self._moving:
            part.cancel()
        wait(self._moving)
        self._moving.clear()
        self._buffer, self._free = bytearray(), []
        if self._id:
            try:
                self._wire.abort(self._bucket, self._key, self._id)
            except Exception:  # noqa: BLE001 (must not hide the error that brought us here; delete_all sweeps)
                return

    def _grow(self, size: int, coming: int) -> None:
        """A buffer of a whole part, unless less than that may ever come: many objects are small."""
        while self._free:
            self._buffer = self._free.pop()
            if len(self._buffer) == size:
                return
        needed = self._filled + coming
        if needed <= len(self._buffer):
            return
        kept = self._buffer[: self._filled]
        self._buffer = bytearray(size if self._id or needed >= size else min(size, 2 * needed))
        self._buffer[: len(kept)] = kept

    def _send(self) -> None:
        if not self._id:
            self._id = self._run("begin the upload", lambda: self._wire.begin(self._bucket, self._key))
        body, view = self._buffer, memoryview(self._buffer)[: self._filled]
        self._settle(self._policy.under_way(len(view)) - 1)
        self._sent += 1
        number = self._sent

        def attempt() -> None:
            self._done.append(
                self._wire.part(self._bucket, self._key, self._id, number, view, self._cancelled)
            )
            self._free.append(body)

        self._moving.add(
            self._transfers.submit(f"upload part {number}", self._url, view.nbytes, attempt, self._cancelled)
        )
        self._buffer, self._filled = bytearray(), 0

    def _settle(self, most: int) -> None:
        """Wait until at most ``most`` parts are on their way. Bounds the memory, and tells of a lost part early."""
        while len(self._moving) > most:
            finished, self._moving = wait(self._moving, return_when=FIRST_COMPLETED)
            for part in finished:
                part.result()

    def _complete(self) -> None:
        try:
            self._wire.complete(self._bucket, self._key, self._id, self._done)
        except Exception as error:
            # The answer to an earlier attempt was lost: the upload is no more because it is the object now.
            if not (upload_is_gone(error) and self._wire.exists(self._bucket, self._key)):
                raise

    def _run(self, operation: str, attempt: Callable[[], T]) -> T:
        return self._transfers.run(operation, self._url, self._filled, attempt)


class SpooledUpload:
    """Bytes gathered in a local temporary file (in memory while small), sent as one object at the end.

    For drivers whose streaming files we cannot vouch for. Needs room for the object in ``TMPDIR``.
    """

    def __init__(self, fs: Any, transfers: Transfers, path: str, url: str) -> None:
        self._fs, self._transfers, self._path, self._url = fs, transfers, path, url
        self._file = tempfile.SpooledTemporaryFile(max_size=_SPOOL, prefix="resilience-upload-")  # noqa: SIM115

    def write(self, view: memoryview) -> None:
        self._file.write(view)

    def publish(self) -> None:
        size = self._file.tell()
        self._file.seek(0)
        if size <= _SPOOL:
            body = self._file.read()
            self._call(size, "pipe_file", self._path, body, mode="overwrite")
        else:
            self._file.flush()
            self._call(size, "put_file", f"/proc/self/fd/{self._file.fileno()}", self._path)
        self._file.close()

    def discard(self) -> None:
        self._file.close()

    def _call(self, size: int, method: str, *arguments: Any, **options: Any) -> None:
        seconds = self._transfers.policy.deadline(size)
        attempt = partial(call, self._fs, method, *arguments, seconds=seconds, **options)
        self._transfers.run("upload", self._url, size, attempt)
