"""A forked child of a node's zygote, as its node holds it: channel, page, pidfd, and what it said last.

Ends with ``close``, which leaves no process of its group and no descriptor. Never judges why it died.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
from dataclasses import dataclass, field
from typing import Any

from resilience.runtime.page import Page
from resilience.runtime.system import process_state
from resilience.runtime.wire import Channel


@dataclass
class Forked:
    """A rank, or the store of a generation.

    Attributes:
        condemned: we were told to end it, so its death is no news.
        ended_at: when its pidfd said that it is gone; how it ended is the zygote's to tell.
        told: its last words: ``finished``, ``failed``, ``restore_failed``.
    """

    key: str
    generation: int
    rank: int | None
    channel: Channel
    page: Page | None
    output: str = ""
    pid: int | None = None
    pidfd: int | None = None
    condemned: bool = False
    ended_at: float | None = None
    told: dict[str, Any] = field(default_factory=dict)

    def signal(self, number: int) -> None:
        """Send a signal; one that is gone already does not mind."""
        if self.pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, number)

    def condemn(self) -> None:
        """End it on somebody's order."""
        self.condemned = True
        self.signal(signal.SIGKILL)

    def await_end(self, timeout: float) -> None:
        """Wait until the process is gone."""
        if self.pidfd is not None:
            with selectors.DefaultSelector() as selector:
                selector.register(self.pidfd, selectors.EVENT_READ)
                selector.select(timeout)

    def release_pidfd(self) -> None:
        if self.pidfd is not None:
            os.close(self.pidfd)
            self.pidfd = None

    def close(self) -> None:
        """The process is gone: end what its user's code left behind, and let go of everything."""
        self.release_pidfd()
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):  # children of the user's code, if any are left
                os.killpg(self.pid, signal.SIGKILL)
        self.channel.close()
        if self.page is not None:
            self.page.close()

    def progress(self) -> dict[str, Any] | None:
        """What the page says, ``None`` where there is no running rank."""
        if self.page is None or self.pid is None:
            return None
        return {
            "step": self.page.step,
            "section": self.page.section,
            "age_s": self.page.age_s,
            "state": process_state(self.pid),
            "stalled_s": self.page.stalled_s,
        }
