"""The zygote: imports torch and the user's module once, then forks ranks in milliseconds.

Started by exec, so it inherits no threads of Ray's, and it stays single-threaded itself: that is what makes its
forks safe. It is the parent of its node's ranks, reaps them, and tells the agent how each ended. It dies with
the agent, and the ranks die with it (PDEATHSIG), so that a killed agent leaves no process holding a card.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import sys
import threading
import traceback
from typing import Any

from resilience.runtime.entry import Entry
from resilience.runtime.system import die_with_parent
from resilience.runtime.wire import Channel, Closed


def main() -> None:
    fd, parent = int(sys.argv[1]), int(sys.argv[2])
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C of the terminal is the launcher's business
    channel = Channel.from_fd(fd)
    try:
        Zygote(channel).serve()
    except Closed:
        return


class Zygote:
    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._function: Any = None
        self._children: set[int] = set()
        self._wake_r, self._wake_w = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def serve(self) -> None:
        message, _ = self._channel.receive()
        try:
            os.environ.update(message["env"])
            self._function = Entry.from_json(message["entry"]).load()
        except BaseException as error:  # noqa: BLE001 - whatever the user's module raises is reported, not judged
            self._channel.send(
                {"t": "load_failed", "error": repr(error), "traceback": traceback.format_exc()}
            )
            return
        # Pages of what is imported stay shared with the children if the collector does not touch them.
        gc.collect()
        gc.freeze()
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wake_w)
        self._channel.send({"t": "ready", "pid": os.getpid(), "threads": threading.active_count()})
        while True:
            watched: list[Any] = [self._channel, self._wake_r]
            readable, _, _ = select.select(watched, [], [])
            if self._wake_r in readable:
                self._drain_wakeups()
                self._reap()
            if self._channel in readable:
                self._handle(*self._channel.receive())

    def _drain_wakeups(self) -> None:
        try:
            while os.read(self._wake_r, 512):
                pass
        except BlockingIOError:
            return

    def _handle(self, message: dict[str, Any], fds: list[int]) -> None:
        try:
            pid = os.fork()
        except OSError as error:  # too many processes, too little memory: this rank's trouble, not its peers'
            for fd in fds:
                os.close(fd)
            self._channel.send({"t": "fork_failed", "key": message["key"], "error": f"fork: {error}"})
            return
        if pid == 0:
            self._become(message, fds)  # never returns
        for fd in fds:
            os.close(fd)
        self._children.add(pid)
        # Opened before the child can have been reaped, so the descriptor cannot name another process.
        pidfd = os.pidfd_open(pid)
        self._channel.send({"t": "forked", "pid": pid, "key": message["key"]}, [pidfd])
        os.close(pidfd)

    def _become(self, message: dict[str, Any], fds: list[int]) -> None:
        status = 70
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            self._channel.close()
            os.close(self._wake_r)
            os.close(self._wake_w)
            os.setsid()  # own group: children of the user's code die with the rank
            die_with_parent(message["zygote"])
            if message["t"] == "store":
                from resilience.runtime.store import serve

                status = serve(Channel.from_fd(fds[0]))
            else:
                from resilience.runtime.rank import run_rank

                status = run_rank(self._function, message, fds)
        except BaseException:  # noqa: BLE001 - last resort of a forked child: say it and exit non-zero
            traceback.print_exc()
        finally:
            try:
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(status)

    def _reap(self) -> None:
        while self._children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            self._children.discard(pid)
            code = os.waitstatus_to_exitcode(status)
            self._channel.send(
                {
                    "t": "exited",
                    "pid": pid,
                    "code": code if code >= 0 else None,
                    "signal": -code if code < 0 else None,
                }
            )


if __name__ == "__main__":
    main()
