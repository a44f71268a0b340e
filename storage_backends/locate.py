"""From a URL to a storage object.

Owns the meaning of storage URLs: a plain path or ``file://`` is a POSIX directory, ``memory://name`` the
store of that name in this process, everything else an fsspec URL. Must not import fsspec before a URL asks
for it, and must not touch the store: nothing is created, and no connection is made, before the first call.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable

from resilience.errors import InvalidError
from storage_backends.base import Storage, check_name
from storage_backends.posix import PosixStorage
from storage_backends.retry import RetryPolicy, RetryStorage
from storage_backends.transfer import OnRetry, TransferPolicy

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
# What to install for the schemes that can hold a run; fsspec names the package of every other one itself.
_INSTALL = {
    "s3": ("s3fs", "pip install 'resilience[s3]'  (or: pip install s3fs)"),
    "s3a": ("s3fs", "pip install 'resilience[s3]'  (or: pip install s3fs)"),
    "gs": ("gcsfs", "pip install gcsfs"),
    "gcs": ("gcsfs", "pip install gcsfs"),
    "az": ("adlfs", "pip install adlfs"),
    "abfs": ("adlfs", "pip install adlfs"),
    "abfss": ("adlfs", "pip install adlfs"),
}


def open_storage(
    url: str,
    *,
    retry: bool | RetryPolicy = True,
    transfer: TransferPolicy | None = None,
    on_retry: OnRetry | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Storage:
    """The storage whose root is ``url``.

    Args:
        url: ``/path``, ``file:///path``, ``memory://name[/path]``, ``s3://bucket[/path]``, or any URL that
            fsspec knows.
        retry: repeat what failed with ``UnavailableError``: with the default policy, with the one given, or
            not at all. Sinks are not retried (see ``Sink``).
        transfer: size, number and deadlines of the pieces in which object stores move bytes; see there.
        on_retry: told of every piece that had to be repeated, from any thread; must not block.
        tell: called, from any thread, with what a person should know: that a directory takes no direct I/O.

    Raises:
        InvalidError: unknown scheme, or the package behind it is not installed (the hint names it).
    """
    storage = _open(url, transfer, on_retry, tell)
    if retry is False:
        return storage
    return RetryStorage(storage, RetryPolicy() if retry is True else retry)


def child(url: str, *names: str) -> str:
    """The URL of the directory ``names`` below ``url``: ``child("s3://b/runs", "run-1", "node-a")``."""
    return "/".join((url.rstrip("/"), *(check_name(n) for n in names)))


def _open(
    url: str, transfer: TransferPolicy | None, on_retry: OnRetry | None, tell: Callable[[str], None]
) -> Storage:
    match = _SCHEME.fullmatch(url)
    if not url or (match and not match[2].strip("/") and match[1].lower() != "file"):
        raise InvalidError(
            f"{url!r} names no storage root",
            operation="open_storage",
            path=url,
            hint="give a path, or a URL such as s3://bucket/runs",
        )
    if match is None:
        return PosixStorage(url, tell=tell)
    scheme, rest = match[1].lower(), match[2]
    if scheme in ("file", "local"):
        return PosixStorage(_absolute(rest, url), tell=tell)
    if scheme == "memory":
        from storage_backends.memory import MemoryStorage, process_disk

        netloc, _, path = rest.strip("/").partition("/")
        return MemoryStorage(process_disk(netloc), path, url=f"memory://{rest.strip('/')}")
    _check_installed(scheme, url)
    if scheme in ("s3", "s3a") and _driver(url) == "obstore":
        from storage_backends.obstore_storage import ObstoreStorage

        return ObstoreStorage(f"{scheme}://{rest}", transfer=transfer, on_retry=on_retry)
    from storage_backends.object import ObjectStorage

    return ObjectStorage(f"{scheme}://{rest}", transfer=transfer, on_retry=on_retry)


def _driver(url: str) -> str:
    """Which of the two that pass the same tests serves S3."""
    name = os.environ.get("RESILIENCE_S3_DRIVER", "fsspec")
    if name not in ("fsspec", "obstore"):
        raise InvalidError(
            f"RESILIENCE_S3_DRIVER is {name!r}",
            operation="open_storage",
            path=url,
            hint="unset it, or set it to fsspec or obstore",
        )
    if name == "obstore" and importlib.util.find_spec("obstore") is None:
        raise InvalidError(
            "RESILIENCE_S3_DRIVER=obstore needs the package obstore",
            operation="open_storage",
            path=url,
            hint="pip install 'resilience[obstore]'  (or: pip install obstore)",
        )
    return name


def _absolute(path: str, url: str) -> str:
    if not path.startswith("/"):
        raise InvalidError(
            f"{url!r} is not an absolute path",
            operation="open_storage",
            path=url,
            hint=f"write file:///{path} or a plain path",
        )
    return path


def _check_installed(scheme: str, url: str) -> None:
    if scheme in _INSTALL:
        package, command = _INSTALL[scheme]
        if importlib.util.find_spec(package) is None:
            raise InvalidError(
                f"{url} needs the package {package}", operation="open_storage", path=url, hint=command
            )
        return
    from fsspec.registry import get_filesystem_class, known_implementations

    try:
        get_filesystem_class(scheme)
    except ImportError as error:
        text = str(known_implementations.get(scheme, {}).get("err", "")) or str(error)
        raise InvalidError(
            f"{url} needs a package that is not installed: {error}",
            operation="open_storage",
            path=url,
            hint=text,
        ) from error
    except ValueError as error:
        known = ", ".join(sorted({"file", "memory", *_INSTALL}))
        raise InvalidError(
            f"{url}: the scheme {scheme!r} is unknown",
            operation="open_storage",
            path=url,
            hint=f"a run can live in: {known}; fsspec also knows {', '.join(sorted(known_implementations))}",
        ) from error
