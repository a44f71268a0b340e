"""What is compared, by name; each loaded only in the process that measures it."""

from __future__ import annotations

from importlib import import_module
from typing import Protocol

from benchmarks.checkpoint.state import State

# Name -> module and class, packages it needs besides torch, and how many saves one process makes.
SYSTEMS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "ours": ("ours", "Ours", ()),
    "torch.save": ("torch_peers", "TorchSave", ()),
    "dcp": ("torch_peers", "Dcp", ()),
    "dcp-async": ("torch_peers", "DcpAsync", ()),
    "safetensors": ("torch_peers", "Safetensors", ("safetensors",)),
    "orbax": ("array_peers", "Orbax", ("orbax.checkpoint",)),
    "tensorstore": ("array_peers", "TensorStore", ("tensorstore",)),
    "zarr": ("array_peers", "ZarrPython", ()),
}


class System(Protocol):
    """One way to save, in a process of its own.

    Attributes:
        pids: other processes that work for it.
    """

    pids: list[int]

    def save(self, state: State, directory: str) -> float | None:
        """Return when the state is durable below ``directory``, which does not exist yet. The seconds for which
        training waits, ``None`` if all of it."""

    def restore(self, state: State, directory: str) -> None:
        """Fill the tensors of ``state`` with what the newest save into ``directory`` held."""

    def discard(self, directory: str) -> None:
        """Remove that checkpoint, as this system's users do."""

    def close(self) -> None: ...


def load(name: str, state: State, root: str) -> System:
    module, attribute, _ = SYSTEMS[name]
    made: System = getattr(import_module(f"benchmarks.checkpoint.{module}"), attribute)(state, root)
    return made


def missing(name: str) -> str | None:
    """The package that ``name`` needs and that is not here."""
    for package in SYSTEMS[name][2]:
        try:
            import_module(package)
        except ImportError:
            return package
    return None
