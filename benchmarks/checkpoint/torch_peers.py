"""torch.save, torch's distributed checkpoint, safetensors: each made durable in the way its users would."""

from __future__ import annotations

import os
import shutil
import time
import warnings

import torch
import torch.distributed.checkpoint as dcp

from benchmarks.checkpoint.machine import sync_all
from benchmarks.checkpoint.state import State


class _Peer:
    def __init__(self, state: State, root: str) -> None:
        self.pids: list[int] = []
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one rank, meant

    def discard(self, directory: str) -> None:
        shutil.rmtree(directory)

    def close(self) -> None:
        return None


class TorchSave(_Peer):
    def save(self, state: State, directory: str) -> None:
        os.makedirs(directory)
        torch.save(state, os.path.join(directory, "checkpoint.pt"))
        sync_all(directory)

    def restore(self, state: State, directory: str) -> None:
        saved = torch.load(os.path.join(directory, "checkpoint.pt"), weights_only=True)
        for kind, tensors in state.items():
            for name, tensor in tensors.items():
                tensor.copy_(saved[kind][name])


class Dcp(_Peer):
    def save(self, state: State, directory: str) -> float | None:
        # Its writer fsyncs its files by default; one rank, so no process group.
        dcp.save(dict(state), storage_writer=dcp.FileSystemWriter(directory, sync_files=True), no_dist=True)
        sync_all(directory)
        return None

    def restore(self, state: State, directory: str) -> None:
        dcp.load(dict(state), storage_reader=dcp.FileSystemReader(directory), no_dist=True)


class DcpAsync(Dcp):
    def __init__(self, state: State, root: str) -> None:
        super().__init__(state, root)
        # It wants a process group with a CPU backend, even for one rank.
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )

    def save(self, state: State, directory: str) -> float:
        began = time.perf_counter()
        writer = dcp.FileSystemWriter(directory, sync_files=True)
        response = dcp.async_save(dict(state), storage_writer=writer)
        stall = time.perf_counter() - began
        response.result()  # type: ignore[union-attr]
        sync_all(directory)
        return stall

    def close(self) -> None:
        torch.distributed.destroy_process_group()


class Safetensors(_Peer):
    def save(self, state: State, directory: str) -> None:
        from safetensors.torch import save_file

        os.makedirs(directory)
        flat = {f"{kind}/{name}": t for kind, tensors in state.items() for name, t in tensors.items()}
        save_file(flat, os.path.join(directory, "model.safetensors"))
        sync_all(directory)

    def restore(self, state: State, directory: str) -> None:
        from safetensors import safe_open

        with safe_open(os.path.join(directory, "model.safetensors"), "pt") as file:
            for kind, tensors in state.items():
                for name, tensor in tensors.items():
                    tensor.copy_(file.get_tensor(f"{kind}/{name}"))
