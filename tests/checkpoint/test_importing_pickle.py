"""The one pickle that is read: torch's metadata, by name and nothing else."""

from __future__ import annotations

import collections
import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st

from resilience.checkpoint.importing_pickle import read_metadata
from resilience.errors import CorruptError, InvalidError


@pytest.fixture(scope="module")
def metadata(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    where = tmp_path_factory.mktemp("dcp")
    state = {"w": torch.ones(3, 2), "h": torch.ones(2, dtype=torch.bfloat16), "n": 3}
    dcp.save(state, checkpoint_id=where, no_dist=True)
    return (where / ".metadata").read_bytes()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_torch_writes_is_read_without_its_classes(metadata: bytes) -> None:
    found = read_metadata(io.BytesIO(metadata), "m")
    described = found.get("state_dict_metadata")
    assert set(described) == {"w", "h", "n"}
    assert described["w"].get("size") == (3, 2)
    assert type(described["w"].get("size")) is tuple
    assert described["h"].get("properties").fields[0] == "bfloat16"
    assert described["n"].kind == "BytesStorageMetadata"
    assert {index.get("fqn") for index in found.get("storage_data")} == {"w", "h", "n"}


class Calls:
    """Pickles as a call of any function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    ("function", "args", "name"),
    [
        (os.system, ("touch {}",), r"posix\.system"),
        (eval, ("open('{}', 'w')",), r"builtins\.eval"),
        (exec, ("open('{}', 'w')",), r"builtins\.exec"),
        (getattr, ("x", "upper"), r"builtins\.getattr"),
        (torch.load, ("{}",), r"torch\.serialization\.load"),
        (torch.ones, (3,), r"builtins\.getattr"),
        (collections.deque, (), r"collections\.deque"),
    ],
)
def test_a_malicious_pickle_is_refused_by_name_and_not_run(
    tmp_path: Path, function: Any, args: Any, name: str
) -> None:
    trace = tmp_path / "trace"
    filled = tuple(arg.format(trace) if isinstance(arg, str) else arg for arg in args)
    for value in (Calls(function, *filled), {"state_dict_metadata": [Calls(function, *filled)]}):
        data = pickle.dumps(value)
        with pytest.raises(InvalidError, match=rf"its pickle names {name}"):
            read_metadata(io.BytesIO(data), "m")
    assert not trace.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"cos\nsystem\n.",
        b"ctorch.distributed.checkpoint.metadata\nMetadata.__init__\n.",
        b"ctorch.distributed.checkpoint.metadata\npickle\n.",
        b"ctorch\n_C\n.",
        b"Pos.system\n.",
    ],
)
def test_names_are_taken_whole(data: bytes) -> None:
    """No way from an allowed module or class to what lies in it."""
    with pytest.raises(InvalidError, match="its pickle names"):
        read_metadata(io.BytesIO(data), "m")


def test_other_things_are_no_metadata() -> None:
    for data in (b"", b"not a pickle", pickle.dumps({"a": 1}), pickle.dumps(torch.Size([1]))):
        with pytest.raises(CorruptError):
            read_metadata(io.BytesIO(data), "m")


@pytest.mark.filterwarnings("ignore::UserWarning")
@given(st.data())
def test_damage_is_an_error_of_ours(metadata: bytes, data: st.DataObject) -> None:
    """Any flipped byte and any cut: read, refused or corrupt, never anything else."""
    damaged = bytearray(metadata[: data.draw(st.integers(0, len(metadata)))])
    if damaged:
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        read_metadata(io.BytesIO(bytes(damaged)), "m")
    except (CorruptError, InvalidError):
        return
