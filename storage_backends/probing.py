"""Trying a root out before a run is trusted to it.

Owns the question "can this root arbitrate?": the same name is created twice with different contents, and the
second must lose and see the first. Must leave nothing behind, and must refuse rather than guess: a store that
ignores conditional writes would let two supervisors both win.
"""

from __future__ import annotations

import dataclasses
import uuid

from resilience.errors import InvalidError
from storage_backends.base import Capabilities, Storage


def probe(storage: Storage) -> Capabilities:
    """What ``storage`` can do, tried out in about ten small calls below its root.

    Raises:
        InvalidError: the root cannot arbitrate, does not read back what was written, or is not writable; the
            message says which.
        UnavailableError, ExhaustedError: as the storage raised them.
    """
    claimed = storage.capabilities
    if not claimed.arbitrates:
        raise _refused(storage, claimed.reason or "its backend says so")
    directory = f"probe-{uuid.uuid4().hex}"
    try:
        _try_create(storage, f"{directory}/create")
        _try_sink(storage, f"{directory}/sink")
    finally:
        storage.delete_all(directory)
    return dataclasses.replace(claimed, arbitrates=True)


def _try_create(storage: Storage, name: str) -> None:
    first, second = (f"{who} {uuid.uuid4().hex}".encode() for who in ("first", "second"))
    if storage.create(name, first) is not None:
        raise _refused(storage, "a new name was already taken")
    if storage.create(name, first) is not None:
        raise _refused(storage, "repeating a create with the same bytes is not recognised as one's own")
    answer = storage.create(name, second)
    if answer is None:
        raise _refused(storage, "creating a name that exists succeeded: the store ignores conditional writes")
    if answer != first or storage.read(name) != first:
        raise _refused(storage, "the bytes of the first writer do not read back")


def _try_sink(storage: Storage, name: str) -> None:
    body = uuid.uuid4().bytes * 300
    with storage.sink(name) as sink:
        sink.write(body)
    if storage.size(name) != len(body) or storage.read(name, 16, 4000) != body[16:4000]:
        raise _refused(storage, "a streamed object does not read back")


def _refused(storage: Storage, reason: str) -> InvalidError:
    return InvalidError(
        f"{storage.url} cannot hold a run: {reason}",
        operation="probe",
        path=storage.url,
        hint="use a POSIX file system with hard links (ext4, xfs, NFS, Lustre), or S3, GCS or Azure storage",
    )
