"""Storage for checkpoints, the commit log and the event journal: one narrow interface, several backends.

``open_storage`` turns a URL into a ``Storage``; ``probe`` tells whether a run may be trusted to it. The
contract is in ``base``. Importing this package imports no driver: fsspec is loaded when a URL first asks
for it.
"""

from storage_backends.base import Capabilities, Sink, Storage, check_name
from storage_backends.locate import child, open_storage
from storage_backends.probe import probe
from storage_backends.retry import RetryPolicy

__all__ = ["Capabilities", "RetryPolicy", "Sink", "Storage", "check_name", "child", "open_storage", "probe"]
