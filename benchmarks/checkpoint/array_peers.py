"""Orbax, TensorStore and zarr-python with their own defaults, each made durable by syncing what they wrote."""

from __future__ import annotations

import os
import shutil
import time
from typing import Any

import numpy as np
import torch

from benchmarks.checkpoint.machine import sync_all
from benchmarks.checkpoint.state import State


class _Peer:
    def __init__(self, state: State, root: str) -> None:
        self.pids: list[int] = []

    def discard(self, directory: str) -> None:
        shutil.rmtree(directory)

    def close(self) -> None:
        return None


class Orbax(_Peer):
    """``StandardCheckpointer``, which saves in the background by default."""

    def __init__(self, state: State, root: str) -> None:
        super().__init__(state, root)
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        import orbax.checkpoint as ocp

        self._checkpointer = ocp.StandardCheckpointer()

    def save(self, state: State, directory: str) -> float:
        began = time.perf_counter()
        self._checkpointer.save(os.path.abspath(directory), _arrays(state))
        stall = time.perf_counter() - began
        self._checkpointer.wait_until_finished()
        sync_all(directory)
        return stall

    def restore(self, state: State, directory: str) -> None:
        saved = self._checkpointer.restore(os.path.abspath(directory), _arrays(state))
        _take(state, lambda kind, name: np.asarray(saved[kind][name]))

    def close(self) -> None:
        self._checkpointer.close()


class TensorStore(_Peer):
    """The zarr3 driver, one array a tensor, all at once."""

    def save(self, state: State, directory: str) -> None:
        import tensorstore as ts

        pending = []
        for path, array in _flat(state):
            store = ts.open(
                {"driver": "zarr3", "kvstore": {"driver": "file", "path": os.path.join(directory, path)}},
                create=True,
                dtype=ts.float32,
                shape=array.shape,
            ).result()
            pending.append(store.write(array))
        for write in pending:
            write.result()
        sync_all(directory)

    def restore(self, state: State, directory: str) -> None:
        import tensorstore as ts

        pending = {}
        for path, _ in _flat(state):
            spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": os.path.join(directory, path)}}
            pending[path] = ts.open(spec, open=True).result().read()
        _take(state, lambda kind, name: pending[f"{kind}/{name}"].result())


class ZarrPython(_Peer):
    """zarr-python, version 3 arrays, one chunk a tensor, not compressed (random values do not compress)."""

    def save(self, state: State, directory: str) -> None:
        import zarr

        group = zarr.open_group(directory, mode="w")
        for path, array in _flat(state):
            made = group.create_array(
                path, shape=array.shape, dtype=array.dtype, chunks=array.shape, compressors=None
            )
            made[...] = array
        sync_all(directory)

    def restore(self, state: State, directory: str) -> None:
        import zarr

        group = zarr.open_group(directory, mode="r")
        _take(state, lambda kind, name: group[f"{kind}/{name}"][...])


def _arrays(state: State) -> dict[str, dict[str, Any]]:
    return {kind: {name: t.numpy() for name, t in tensors.items()} for kind, tensors in state.items()}


def _flat(state: State) -> list[tuple[str, Any]]:
    return [(f"{kind}/{name}", t.numpy()) for kind, ts in state.items() for name, t in ts.items()]


def _take(state: State, get: Any) -> None:
    for kind, tensors in state.items():
        for name, tensor in tensors.items():
            tensor.copy_(torch.from_numpy(np.array(get(kind, name), copy=False)))
