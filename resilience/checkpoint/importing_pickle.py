"""Reading DCP's ``.metadata``: a pickle, and the only one that this package reads. Nothing of it is ever run.

torch offers no other form of it. Owns the allow list: names of torch's own metadata classes, each of which becomes a
plain record here, so not even torch's classes are called. Any other name is refused, by name.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, BinaryIO

from resilience.checkpoint.arrays import dtype_names
from resilience.errors import CorruptError, InvalidError

_CHECKPOINT = "torch.distributed.checkpoint"
_RECORDS = {
    f"{_CHECKPOINT}.metadata": (
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    f"{_CHECKPOINT}.filesystem": ("_StorageInfo",),
    # where torch before 2.3 kept the properties
    "torch.distributed._shard.sharded_tensor.metadata": ("TensorProperties", "MEM_FORMAT_ENCODING"),
}
_DTYPES = frozenset((*dtype_names(), "complex32", "quint8", "qint8", "qint32"))


class Record:
    """What stands for an object of one of torch's metadata classes: its name and its fields."""

    kind = ""

    def __init__(self, *args: Any) -> None:
        self.args = args
        self.fields: Any = {}

    def __setstate__(self, state: Any) -> None:
        self.fields = state

    def get(self, name: str, default: Any = None) -> Any:
        return self.fields.get(name, default) if isinstance(self.fields, dict) else default

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a record is not pickled")


def read_metadata(file: BinaryIO, path: str) -> Record:
    """The ``Metadata`` record in ``file``.

    Raises:
        InvalidError: the pickle names anything that is not on the list. Nothing was run.
        CorruptError: it is no pickle, or not of a DCP checkpoint.
    """
    reader = _Reader(file)
    try:
        found = reader.load()
    except _Refused as refused:
        raise InvalidError(
            f"{path} is refused: its pickle names {refused}, which is no part of a checkpoint's metadata",
            operation="import",
            path=path,
            hint="a pickle that names other things than torch's metadata classes can run any program: do not "
            "load this file with torch either, unless you know who wrote it",
        ) from None
    except Exception as error:
        raise _corrupt(path, f"cannot be read: {type(error).__name__}: {error}") from error
    if getattr(found, "kind", None) != "Metadata":
        raise _corrupt(path, "does not describe a checkpoint")
    assert isinstance(found, Record)
    return found


class _Refused(Exception):
    """The name of what the pickle asked for."""


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _RECORDS.get(module, ()):
            return type("Record", (Record,), {"kind": name})
        if module == "torch" and name in _DTYPES:
            return name
        found = _PLAIN.get((module, name))
        if found is None:
            raise _Refused(f"{module}.{name}")
        return found

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused("a persistent id")


def _size(values: Any = ()) -> tuple[int, ...]:
    return tuple(map(int, values))


def _text(*parts: Any) -> str:
    return "/".join(map(str, parts))


def _ordered(pairs: Any = ()) -> dict[Any, Any]:
    return dict(pairs)


_PLAIN: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch", "Size"): _size,
    ("torch.serialization", "_get_layout"): _text,
    ("collections", "OrderedDict"): _ordered,
    **{
        (module, name): _text
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    },
}


def _corrupt(path: str, problem: str) -> CorruptError:
    return CorruptError(
        f"{path} {problem}",
        operation="import",
        path=path,
        hint="the checkpoint is incomplete or damaged: copy it again; nothing was imported",
    )
