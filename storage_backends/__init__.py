"""Storage for checkpoints, the commit log and the event journal: one narrow interface, several backends.

``open_storage`` turns a URL into a ``Storage``; ``probe`` tells whether a run may be trusted to it. The
contract is in ``base``. Importing this package imports no driver: fsspec is loaded when a URL first asks
for it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from storage_backends.base import Capabilities, Sink, Storage, check_name
    from storage_backends.locate import child, open_storage
    from storage_backends.probing import probe
    from storage_backends.retry import RetryPolicy

__all__ = ["Capabilities", "RetryPolicy", "Sink", "Storage", "check_name", "child", "open_storage", "probe"]

_HOMES = {
    "Capabilities": "base",
    "RetryPolicy": "retry",
    "Sink": "base",
    "Storage": "base",
    "check_name": "base",
    "child": "locate",
    "open_storage": "locate",
    "probe": "probing",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__


# The errors live in `resilience`, whose own modules import this package. Loaded here, after the names above
# can be resolved, either of the two may be imported first.
import resilience.errors  # noqa: E402, F401
