"""Which checkpoint a command is about: a run by its name, or the URL of a run or of one checkpoint's directory.

Owns telling names from URLs. Must never guess between two things that are both there without saying which it took.
"""

from __future__ import annotations

import os
import re

from resilience.errors import InvalidError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def target_url(run_or_url: str, storage: str) -> str:
    """The URL that ``RUN_OR_URL`` means: itself, or the run of that name below ``storage``.

    Raises:
        InvalidError: neither is there; suggests the nearest name.
    """
    if _SCHEME.match(run_or_url) or run_or_url.startswith(("/", ".", "~")):
        return _existing(run_or_url)
    from resilience.history.load import open_run

    try:
        return open_run(storage, run_or_url).url
    except InvalidError:
        if "/" in run_or_url or os.path.isdir(run_or_url):
            return _existing(run_or_url)
        raise


def _existing(url: str) -> str:
    if not _SCHEME.match(url):
        path = os.path.abspath(os.path.expanduser(url))
        if not os.path.isdir(path):
            raise InvalidError(
                f"there is no directory {path}",
                operation="open checkpoint",
                path=path,
                hint="give a run's name (with --storage), or the URL of a run or of a checkpoint's directory",
            )
        return path
    return url
