"""What the drivers below fsspec do and raise, in our words.

Owns the bound on the time of a call, and the translation of errors of s3fs, gcsfs and adlfs (botocore, aiohttp,
google, azure) without importing any of them: by HTTP status, by service error code, by errno, by class name.
Must never turn an unknown error into a success or into "absent": what is not recognised goes on as it is,
because it is a bug to be seen.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from resilience.errors import ExhaustedError, InvalidError, ResilienceError, UnavailableError
from storage_backends.oserrors import translate

# obstore's errors have no attributes, only the text of its answer.
_ANSWER = re.compile(r"Server returned non-2xx status code: (\d{3})(?:.*?<Code>(\w+)</Code>)?", re.DOTALL)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_BUSY_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_BUSY_CODES = _words("""
    BadDigest ConditionalRequestConflict IncompleteBody InternalError NoSuchUpload OperationAborted
    RequestTimeout ServiceUnavailable SlowDown XAmzContentSHA256Mismatch XMinioServerNotInitialized
""")
_FULL_CODES = _words("QuotaExceeded InsufficientStorage XMinioStorageFull XMinioStorageQuotaExceeded")
_NO_BUCKET = _words("NoSuchBucket ContainerNotFound")
_DRIVERS = _words("botocore aiobotocore aiohttp google gcsfs azure adlfs requests urllib3 obstore")
# Class names by which drivers say "no answer"; base classes are looked at too.
_NO_ANSWER = _words("""
    HTTPClientError ConnectionError ClientError ClientPayloadError TransportError ServiceRequestError
    ServiceResponseError IncompleteReadError ResponseParserError HTTPError Timeout ProtocolError GenericError
""")


def call(fs: Any, method: str, *arguments: Any, seconds: float, **options: Any) -> Any:
    """``fs.method(...)``, given up after ``seconds`` with ``TimeoutError``.

    Drivers over a network are asynchronous inside, so that what they do can be cancelled, connection and all;
    the others (files, memory) never wait for anybody.
    """
    if not getattr(fs, "async_impl", False):
        return getattr(fs, method)(*arguments, **options)
    from fsspec.asyn import sync

    return sync(fs.loop, getattr(fs, f"_{method}"), *arguments, timeout=seconds, **options)


def exists_already(error: BaseException) -> bool:
    """Whether a conditional write was answered "the name is taken"."""
    if isinstance(error, FileExistsError):
        return True
    return any(
        _status(link) == 412 or _code(link) in ("PreconditionFailed", "BlobAlreadyExists")
        for link in _chain(error)
    )


def past_the_end(error: BaseException) -> bool:
    """Whether a ranged read was answered "there is nothing at that offset"."""
    return any(_status(link) == 416 or _code(link) in ("InvalidRange", "416") for link in _chain(error))


def upload_is_gone(error: BaseException) -> bool:
    """Whether a request of a multipart upload was answered "there is no such upload"."""
    return any(_code(link) == "NoSuchUpload" for link in _chain(error))


def translate_driver(error: Exception, *, operation: str, path: str) -> Exception:
    """The error to raise instead of ``error``: one of ours, ``FileNotFoundError``, or ``error`` itself."""
    if isinstance(error, ResilienceError):
        return error
    statuses = {status for link in _chain(error) if (status := _status(link))}
    codes = {code for link in _chain(error) if (code := _code(link))}
    text = f"{operation} of {path} failed: {_tell(error)}"
    if codes & _NO_BUCKET:
        return InvalidError(
            f"{operation} of {path} failed: the bucket does not exist",
            operation=operation,
            path=path,
            hint="create the bucket, or correct its name in the storage URL",
        )
    if codes & _FULL_CODES or 507 in statuses:
        return ExhaustedError(
            text,
            operation=operation,
            path=path,
            hint="raise the quota of the bucket, or keep fewer checkpoints",
        )
    if codes & _BUSY_CODES or statuses & _BUSY_STATUS:
        return _unavailable(text, operation, path)
    if statuses & {401, 403} or isinstance(error, PermissionError):
        return _forbidden(text, operation, path)
    if isinstance(error, FileNotFoundError) or 404 in statuses:
        return FileNotFoundError(2, "no such object", path)
    if isinstance(error, TimeoutError | ConnectionError):
        return _unavailable(text, operation, path)
    if isinstance(error, OSError) and error.errno is not None:
        return translate(error, operation=operation, path=path)
    for link in _chain(error):
        if type(link).__module__.partition(".")[0] in _DRIVERS:
            if any("Credential" in c.__name__ or c.__name__ == "ProfileNotFound" for c in type(link).__mro__):
                return _forbidden(text, operation, path)
            status = _status(link)
            if status is None and any(c.__name__ in _NO_ANSWER for c in type(link).__mro__):
                if type(link).__name__ == "InvalidURL":
                    break
                return _unavailable(text, operation, path)
            return InvalidError(
                text, operation=operation, path=path, hint="the service refused the request: see its message"
            )
    if isinstance(error, OSError):
        return translate(error, operation=operation, path=path)
    return error


def _unavailable(text: str, operation: str, path: str) -> UnavailableError:
    return UnavailableError(
        text,
        operation=operation,
        path=path,
        hint="check the endpoint (AWS_ENDPOINT_URL for S3) and the network; a busy service passes by itself",
    )


def _forbidden(text: str, operation: str, path: str) -> InvalidError:
    return InvalidError(
        text,
        operation=operation,
        path=path,
        hint="check the credentials and their rights (S3: AWS_PROFILE, or AWS_ACCESS_KEY_ID and its secret)",
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        found = next(
            (
                value
                for name in ("status", "status_code", "code")
                if isinstance(value := getattr(error, name, None), int)
            ),
            None,
        )
    if found is None and (answer := _answer(error)):
        found = int(answer[1])
    return found if isinstance(found, int) and 300 <= found < 600 else None


def _code(error: BaseException) -> str | None:
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        found = response.get("Error", {}).get("Code")
    else:
        found = getattr(error, "error_code", None)
    if found is None and (answer := _answer(error)):
        found = answer[2]
    return str(found) if found else None


def _answer(error: BaseException) -> re.Match[str] | None:
    ours = type(error).__module__.partition(".")[0] == "obstore" or isinstance(error, FileNotFoundError)
    return _ANSWER.search(str(error)) if ours else None


def _tell(error: Exception) -> str:
    text = str(error).partition("\n\nDebug source:")[0]  # pages of Rust, which say the same again
    return f"{type(error).__name__}: {text}"
