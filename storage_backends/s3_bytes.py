"""The bytes of S3: parts sent and ranges fetched through botocore, from and into memory that we hold.

Owns the requests that carry packs. s3fs, which the small calls go through, moves bytes on the one thread of
its event loop and copies them on the way; botocore's plain client, which s3fs brings along, in several threads
does neither (docs/decisions/0012-object-store.md has the measurements). Endpoint, credentials and options are those of
the s3fs instance it is made from. Each call is one attempt: it must never wait longer than the policy says,
and never repeat anything.
"""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import google_crc32c

from storage_backends.drivers import past_the_end, upload_is_gone
from storage_backends.transfer import Abandoned, TransferPolicy

_BLOCK = 1 << 20  # bytes handed to the socket at once: each block has stall_s of its own


class Body:
    """A part as the file that botocore sends, without a copy. Reading it is how its progress is seen."""

    def __init__(self, view: memoryview, until: float, cancelled: threading.Event) -> None:
        self._view, self._until, self._cancelled = view, until, cancelled
        self._at = 0

    def __len__(self) -> int:
        return self._view.nbytes

    def read(self, size: int | None = -1) -> bytes | memoryview:
        """The next block, whatever ``size`` is asked for (HTTP clients ask for 16 KiB); all of it for -1."""
        if self._cancelled.is_set():
            raise Abandoned
        _check(self._until)
        at = self._at
        if size is None or size < 0:
            self._at = self._view.nbytes
            return bytes(self._view[at:])
        self._at = min(at + _BLOCK, self._view.nbytes)
        return self._view[at : self._at]

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._view.nbytes)[whence]
        return self._at


@dataclass(frozen=True)
class Place:
    """Where a store is, and as whom to speak to it.

    Attributes:
        credentials: of botocore, which refreshes them; ``None`` where there are none.
        anonymous: no credentials are wanted: requests are not signed.
    """

    endpoint: str
    region: str
    credentials: Any
    anonymous: bool


class S3Bytes:
    """Made from an s3fs file system; one per storage, thread-safe."""

    def __init__(self, fs: Any, policy: TransferPolicy) -> None:
        self._policy = policy
        self._put_extra = dict(fs.s3_additional_kwargs)  # encryption and storage class, where configured
        self._get_extra = dict(fs.req_kw)
        self._anonymous = bool(fs.anon)
        self._client, self._credentials = _client(fs, policy)
        # "when_required" is how people tell that their service does not know checksums.
        self._checksums = self._client.meta.config.request_checksum_calculation != "when_required"

    def put(self, bucket: str, key: str, view: memoryview, cancelled: threading.Event) -> None:
        """Store ``view`` as one object."""
        checksum = self._checksum(view)
        self._client.put_object(
            Bucket=bucket, Key=key, Body=self._body(view, cancelled), **checksum, **self._put_extra
        )

    def begin(self, bucket: str, key: str) -> str:
        """Begin a multipart upload; its id."""
        algorithm = {"ChecksumAlgorithm": "CRC32C"} if self._checksums else {}
        answer = self._client.create_multipart_upload(Bucket=bucket, Key=key, **algorithm, **self._put_extra)
        return str(answer["UploadId"])

    def part(
        self, bucket: str, key: str, upload: str, number: int, view: memoryview, cancelled: threading.Event
    ) -> dict[str, Any]:
        """Send part ``number`` (from 1); what ``complete`` wants to know of it."""
        checksum = self._checksum(view)
        answer = self._client.upload_part(
            Bucket=bucket,
            Key=key,
            UploadId=upload,
            PartNumber=number,
            Body=self._body(view, cancelled),
            **checksum,
            **self._only(("RequestPayer", "SSECustomerAlgorithm", "SSECustomerKey")),
        )
        return {"PartNumber": number, "ETag": answer["ETag"], **checksum}

    def complete(self, bucket: str, key: str, upload: str, parts: list[dict[str, Any]]) -> None:
        self._client.complete_multipart_upload(
            Bucket=bucket,
            Key=key,
            UploadId=upload,
            MultipartUpload={"Parts": parts},
            **self._only(("RequestPayer",)),
        )

    def exists(self, bucket: str, key: str) -> bool:
        try:
            self._client.head_object(Bucket=bucket, Key=key, **self._get_extra)
        except self._client.exceptions.ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
                return False
            raise
        return True

    def abort(self, bucket: str, key: str, upload: str) -> None:
        self._client.abort_multipart_upload(
            Bucket=bucket, Key=key, UploadId=upload, **self._only(("RequestPayer",))
        )

    def read_into(
        self, bucket: str, key: str, start: int, view: memoryview, cancelled: threading.Event
    ) -> int:
        """Fill ``view`` from byte ``start`` on; the number of bytes, fewer where the object ends."""
        until = time.monotonic() + self._policy.deadline(view.nbytes)
        asked = f"bytes={start}-{start + view.nbytes - 1}"
        try:
            answer = self._client.get_object(Bucket=bucket, Key=key, Range=asked, **self._get_extra)
        except Exception as error:
            if past_the_end(error):
                return 0
            raise
        length = min(int(answer["ContentLength"]), view.nbytes)
        fill, release = _reader(answer["Body"])
        filled = 0
        try:
            while filled < length:
                if cancelled.is_set():
                    raise Abandoned
                _check(until)
                count = fill(view[filled : min(filled + _BLOCK, length)])
                if not count:
                    raise ConnectionResetError(f"the connection ended after {filled:,} of {length:,} bytes")
                filled += count
        except BaseException:
            answer["Body"].close()
            raise
        release()
        return filled

    def sweep(self, bucket: str, prefix: str) -> None:
        """Abort every unfinished upload of a key that begins with ``prefix``: S3 keeps, and bills, the parts of
        writers that died."""
        marker: dict[str, str] = {}
        while True:
            page = self._client.list_multipart_uploads(Bucket=bucket, Prefix=prefix, **marker)
            for upload in page.get("Uploads", []):
                try:
                    self.abort(bucket, upload["Key"], upload["UploadId"])
                except Exception as error:
                    if not upload_is_gone(error):  # finished or aborted meanwhile
                        raise
            if not page.get("IsTruncated"):
                return
            marker = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def place(self) -> Place:
        """What another client needs to reach the same store.

        Raises:
            NoCredentialsError: of botocore.
        """
        from botocore.exceptions import NoCredentialsError

        meta = self._client.meta
        if self._credentials is None and not self._anonymous:
            raise NoCredentialsError
        return Place(meta.endpoint_url, meta.region_name or "us-east-1", self._credentials, self._anonymous)

    def close(self) -> None:
        self._client.close()

    def _body(self, view: memoryview, cancelled: threading.Event) -> Body:
        return Body(view, time.monotonic() + self._policy.deadline(view.nbytes), cancelled)

    def _checksum(self, view: memoryview) -> dict[str, str]:
        """CRC32C instead of botocore's own CRC32: ten times as fast, and sent before the body."""
        if not self._checksums:
            return {}
        import numpy as np

        crc = google_crc32c.value(np.frombuffer(view, np.uint8)) if view.nbytes else 0
        return {"ChecksumCRC32C": base64.b64encode(crc.to_bytes(4, "big")).decode()}

    def _only(self, names: tuple[str, ...]) -> dict[str, Any]:
        return {name: self._put_extra[name] for name in names if name in self._put_extra}


def _client(fs: Any, policy: TransferPolicy) -> tuple[Any, Any]:
    """A botocore client with the endpoint, credentials and options that ``fs`` would use; the credentials."""
    import botocore.session
    from botocore import UNSIGNED
    from botocore.config import Config
    from botocore.credentials import Credentials

    session = botocore.session.Session(**fs.kwargs)
    given = {
        "aws_access_key_id": fs.key,
        "aws_secret_access_key": fs.secret,
        "aws_session_token": fs.token,
        "endpoint_url": fs.endpoint_url,
        "use_ssl": fs.use_ssl,
    }
    arguments = {**{name: value for name, value in given.items() if value is not None}, **fs.client_kwargs}
    options = {name: value for name, value in fs.config_kwargs.items() if name != "connector_args"}
    if fs.anon:
        for name in ("aws_access_key_id", "aws_secret_access_key", "aws_session_token"):
            arguments.pop(name, None)
        options["signature_version"] = UNSIGNED
    checksums = options.get("request_checksum_calculation") or session.get_config_variable(
        "request_checksum_calculation"
    )
    if checksums != "when_required":
        # The checksum is signed and covers the body; hashing that as well takes two thirds of the time. A
        # profile with `s3 = payload_signing_enabled = true` has it back.
        wanted = {**(session.get_config_variable("s3") or {}), **(options.get("s3") or {})}
        options["s3"] = {"payload_signing_enabled": False, **wanted}
    # Repetition is ours alone. A request that is being sent is under connect_timeout, block by block.
    options |= {
        "retries": {"total_max_attempts": 1, "mode": "standard"},
        "connect_timeout": policy.stall_s,
        "read_timeout": policy.stall_s,
        "max_pool_connections": policy.parallel + 2,
        "response_checksum_validation": "when_required",  # every chunk has its CRC32C in its part
    }
    client = session.create_client("s3", config=Config(**options), **arguments)
    if fs.anon:
        return client, None
    names = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")
    key, secret, token = (arguments.get(name) for name in names)
    return client, Credentials(key, secret, token) if key else session.get_credentials()


def _reader(body: Any) -> tuple[Callable[[memoryview], int], Callable[[], None]]:
    """How to fill a buffer from an answer, and how to give its connection back.

    ``readinto`` of urllib3 reads into a new buffer and copies; that of the http.client response below it reads
    from the socket into ours. Where that layer is not there (another urllib3), the slower one will do.
    """
    raw = getattr(body, "_raw_stream", None)
    inner = getattr(raw, "_fp", None)
    release = getattr(raw, "release_conn", None)
    if inner is not None and hasattr(inner, "readinto") and release is not None:
        return inner.readinto, release
    return body.readinto, body.close


def _check(until: float) -> None:
    if time.monotonic() > until:
        raise TimeoutError("the deadline passed: the connection is too slow")
