"""A root that cannot arbitrate is refused, with the reason, and left as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from resilience.errors import ExhaustedError, InvalidError
from storage_backends import Capabilities, Storage, probe
from storage_backends.disk import Disk
from storage_backends.faults import Fault, FaultStorage
from storage_backends.memory import MemoryStorage


class Wrong(MemoryStorage):
    """A store with one lie; the disk below keeps what it was told."""

    lie: Callable[[MemoryStorage, str, bytes], bytes | None]

    def create(self, name: str, data: bytes) -> bytes | None:
        return type(self).lie(self, name, data)


def overwrites(storage: MemoryStorage, name: str, data: bytes) -> bytes | None:
    storage.disk.put(name, data, exclusive=False)
    return None


def overwrites_but_reports(storage: MemoryStorage, name: str, data: bytes) -> bytes | None:
    inode = storage.disk.get(name)
    held = bytes(inode.data) if inode else None
    storage.disk.put(name, data, exclusive=False)
    return None if held in (None, data) else held


def forgets_its_own(storage: MemoryStorage, name: str, data: bytes) -> bytes | None:
    return None if storage.disk.put(name, data, exclusive=True) else b"taken"


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        (overwrites, "ignores conditional writes"),
        (overwrites_but_reports, "do not read back"),
        (forgets_its_own, "not recognised"),
    ],
)
def test_liars_are_found(lie: Callable[..., bytes | None], reason: str) -> None:
    storage = type("Liar", (Wrong,), {"lie": staticmethod(lie)})(Disk())
    with pytest.raises(InvalidError, match=reason) as caught:
        probe(storage)
    assert caught.value.hint
    assert storage.list() == []


def test_damage_is_found() -> None:
    for operation in (0, 1):
        storage = FaultStorage(MemoryStorage(Disk()), [Fault("flip", "read", after=operation)])
        with pytest.raises(InvalidError, match="read back"):
            probe(storage)


def test_a_backend_that_says_no_is_believed() -> None:
    class Modest(MemoryStorage):
        @property
        def capabilities(self) -> Capabilities:
            return Capabilities(arbitrates=False, local=False, reason="it is only a toy")

    with pytest.raises(InvalidError, match="it is only a toy"):
        probe(Modest(Disk()))


def test_other_errors_pass_and_nothing_stays() -> None:
    storage: Storage = FaultStorage(MemoryStorage(Disk()), [Fault("exhausted", "commit")])
    with pytest.raises(ExhaustedError):
        probe(storage)
    assert storage.list() == []
