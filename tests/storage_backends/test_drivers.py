"""Errors of drivers that are not installed here, in their own shapes; those of S3 are met in test_object."""

from __future__ import annotations

import errno

import pytest

from resilience.errors import ExhaustedError, InvalidError, UnavailableError
from storage_backends.drivers import exists_already, translate_driver
from storage_backends.oserrors import translate


def driver_error(module: str, name: str, **attributes: object) -> Exception:
    """An exception as a driver's package would define it: only its module, name and attributes matter."""
    return type(name, (Exception,), {"__module__": module, **attributes})("what it said")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (driver_error("gcsfs.retry", "HttpError", code=503), UnavailableError),
        (driver_error("gcsfs.retry", "HttpError", code=429), UnavailableError),
        (driver_error("gcsfs.retry", "HttpError", code=403), InvalidError),
        (driver_error("google.auth.exceptions", "DefaultCredentialsError"), InvalidError),
        (driver_error("google.auth.exceptions", "TransportError"), UnavailableError),
        (driver_error("azure.core.exceptions", "ServiceRequestError"), UnavailableError),
        (driver_error("azure.core.exceptions", "HttpResponseError", status_code=500), UnavailableError),
        (driver_error("azure.core.exceptions", "HttpResponseError", status_code=404), FileNotFoundError),
        (
            driver_error("azure.core.exceptions", "X", status_code=404, error_code="ContainerNotFound"),
            InvalidError,
        ),
        (driver_error("aiohttp.client_exceptions", "ClientPayloadError"), UnavailableError),
        (driver_error("aiohttp.client_exceptions", "ClientResponseError", status=401), InvalidError),
        (driver_error("botocore.exceptions", "NoCredentialsError"), InvalidError),
        (driver_error("botocore.exceptions", "ParamValidationError"), InvalidError),
        (TimeoutError(), UnavailableError),
        (ConnectionResetError(errno.ECONNRESET, "reset"), UnavailableError),
        (PermissionError("denied"), InvalidError),
    ],
)
def test_translation(error: Exception, expected: type[Exception]) -> None:
    translated = translate_driver(error, operation="read", path="gs://b/a")
    assert type(translated) is expected
    assert "gs://b/a" in str(translated)


def test_what_is_not_known_stays_what_it_is() -> None:
    for error in (KeyError("bug"), TypeError("bug"), driver_error("somewhere.else", "Odd")):
        assert translate_driver(error, operation="read", path="p") is error


def test_causes_are_looked_through() -> None:
    error = OSError("translated by the driver")
    error.__cause__ = driver_error("gcsfs.retry", "HttpError", code=503)
    assert isinstance(translate_driver(error, operation="read", path="p"), UnavailableError)


def test_taken_has_many_names() -> None:
    assert exists_already(FileExistsError("a"))
    assert exists_already(driver_error("azure.core.exceptions", "X", error_code="BlobAlreadyExists"))
    assert exists_already(driver_error("gcsfs.retry", "HttpError", code=412))
    assert not exists_already(driver_error("gcsfs.retry", "HttpError", code=409))


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (errno.ENOSPC, ExhaustedError),
        (errno.EDQUOT, ExhaustedError),
        (errno.EFBIG, ExhaustedError),
        (errno.EMFILE, ExhaustedError),
        (errno.EROFS, InvalidError),
        (errno.EACCES, InvalidError),
        (errno.EPERM, InvalidError),
        (errno.ENOTDIR, InvalidError),
        (errno.ENAMETOOLONG, InvalidError),
        (errno.EUCLEAN, InvalidError),
        (errno.EIO, UnavailableError),
        (errno.ESTALE, UnavailableError),
        (errno.ETIMEDOUT, UnavailableError),
        (errno.EHOSTUNREACH, UnavailableError),
        (errno.EAGAIN, UnavailableError),
    ],
)
def test_every_errno_has_a_class_and_a_hint(code: int, expected: type[Exception]) -> None:
    error = translate(OSError(code, "text"), operation="commit", path="/a/b")
    assert type(error) is expected
    assert error.hint and error.path == "/a/b" and error.operation == "commit"
    assert errno.errorcode[code] in str(error)
