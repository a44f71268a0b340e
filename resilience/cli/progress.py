"""A bar of bytes for commands that read or write many of them: in a terminal only, and gone when they are done.

On stderr, so that stdout can be piped. Must never be what tells the user that something was done.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

Report = Callable[[str, int, int], None]  # what is read, bytes done, bytes in all


@contextlib.contextmanager
def progress(*, quiet: bool = False) -> Iterator[Report]:
    """A bar in a terminal, nothing elsewhere."""
    if quiet or not sys.stderr.isatty():
        yield lambda title, done, total: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from resilience.history.format import console

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=console(stderr=True), transient=True) as bar:
        task = bar.add_task("")
        yield lambda title, done, total: bar.update(task, description=title, completed=done, total=total)
