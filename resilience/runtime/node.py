"""One node's processes: zygote, ranks, writer, store. Starts them, watches them, ends them; no Ray in here.

One thread does everything, around a selector; orders come in through ``order`` (from any thread) and what is
observed goes out through ``emit`` as plain dicts (``agent`` turns them into events). It decides nothing about
the run: that a rank died is reported, not judged.
"""

from __future__ import annotations

import contextlib
import os
import queue
import selectors
import signal
import subprocess
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from resilience.runtime.forked import Forked
from resilience.runtime.output import Outputs
from resilience.runtime.page import Page
from resilience.runtime.saves import Saves
from resilience.runtime.spawn import await_exit, open_output, spawn
from resilience.runtime.wire import Channel, Closed

_PROGRESS_EVERY_S = 1.0
_TAIL_LINES = 40
_REAP_S = 5.0  # a zygote that does not reap for this long is stuck: it is ended, and another started
_EXIT_NOT_STARTED = 70
_MAX_DEATHS = 3  # of zygotes in a row, while they import the user's module


class NodeProcesses:
    """The processes of one node.

    Args:
        config: ``name, run, entry, env``, and ``nvme, shared`` (URLs of the run's roots).
        outputs: where the ranks' output goes.
        emit: called from the node's thread with each observation.
    """

    def __init__(
        self, config: dict[str, Any], outputs: Outputs, emit: Callable[[dict[str, Any]], None]
    ) -> None:
        self._config = config
        self._outputs = outputs
        self._emit = emit
        self._orders: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector = selectors.DefaultSelector()
        self._zygote: tuple[subprocess.Popen[bytes], Channel] | None = None
        self._zygote_ready = False
        self._was_ready = False
        self._deaths = 0  # of zygotes since one was last ready
        self._unloadable = ""  # why no zygote can import the user's module
        self._processes: dict[str, Forked] = {}
        self._stopping: list[tuple[int, str]] = []
        self._saves = Saves(config, self._spawn, emit, self._set_failing)
        self._last_progress = 0.0
        self._closing = False
        self._ordering = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="node", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def order(self, message: dict[str, Any]) -> None:
        """Hand over an order: ``start, stop, store, post, arm, injected, signal, close``."""
        with self._ordering:
            if not self._closed:
                self._orders.put(message)
                os.eventfd_write(self._wake, 1)

    def close(self, timeout: float = 10.0) -> None:
        """End every process and the thread. May run twice; orders that come later are dropped."""
        self.order({"t": "close"})
        if self._thread.ident is not None:
            self._thread.join(timeout)
        with self._ordering:
            if not self._closed and not self._thread.is_alive():
                self._closed = True
                self._selector.close()
                os.close(self._wake)

    def pids(self) -> list[int]:
        """Every process of this node (for tests, and for killing a node on purpose)."""
        found = [p.pid for p in list(self._processes.values()) if p.pid is not None]
        if self._zygote is not None:
            found.append(self._zygote[0].pid)
        return found + self._saves.pids()

    # The loop.

    def _loop(self) -> None:
        try:
            self._selector.register(self._wake, selectors.EVENT_READ, ("wake", None))
            # Children get PDEATHSIG from this thread, which lives as long as the agent does.
            self._spawn_zygote()
            self._saves.start()
            self._serve()
        except Exception:  # noqa: BLE001 - a bug of ours: this node must fail loudly, not fall silent
            self._emit({"t": "broken", "traceback": traceback.format_exc()})
        finally:
            self._end_everything()

    def _serve(self) -> None:
        while not self._closing:
            self._want_writable()
            for key, events in self._selector.select(timeout=0.25):
                if self._selector.get_map().get(key.fd) is not key:
                    continue  # what came before it in this round has closed it
                if events & selectors.EVENT_WRITE and isinstance(key.fileobj, Channel):
                    key.fileobj.flush()
                if events & selectors.EVENT_READ:
                    kind, subject = key.data
                    getattr(self, f"_on_{kind}")(subject)
            self._check_zygote()
            self._report_progress()

    def _want_writable(self) -> None:
        """Be told when channels with something left to send can take it: this thread waits for no peer."""
        for key in list(self._selector.get_map().values()):
            if isinstance(key.fileobj, Channel):
                write = selectors.EVENT_WRITE if key.fileobj.pending else 0
                if key.events != selectors.EVENT_READ | write:
                    self._selector.modify(key.fileobj, selectors.EVENT_READ | write, key.data)

    def _on_wake(self, _subject: None) -> None:
        os.eventfd_read(self._wake)
        while True:
            try:
                message = self._orders.get_nowait()
            except queue.Empty:
                return
            getattr(self, f"_order_{message['t']}")(message)

    def _spawn(self, module: str, kind: str) -> tuple[subprocess.Popen[bytes], Channel]:
        _path, log = open_output(self._outputs, f"{kind}-{self._config['name']}", self._warn)
        with log:
            process, channel = spawn(module, self._config, log)
        self._selector.register(channel, selectors.EVENT_READ, (kind, channel))
        return process, channel

    def _warn(self, message: str) -> None:
        self._emit({"t": "warning", "message": message})

    def _spawn_zygote(self) -> None:
        self._zygote_ready = False
        self._zygote = self._spawn("resilience.runtime.zygote", "zygote")
        self._zygote[1].post({"t": "load", "entry": self._config["entry"], "env": self._config["env"]})

    def _on_writer(self, channel: Channel) -> None:
        if not self._saves.hear():
            self._selector.unregister(channel)
            channel.close()
            self._saves.revive()

    # The zygote and its children.

    def _on_zygote(self, channel: Channel) -> None:
        try:
            messages = channel.take()
        except Closed:
            self._zygote_gone(channel)
            return
        for message, fds in messages:
            self._zygote_said(message, fds)

    def _zygote_said(self, message: dict[str, Any], fds: list[int]) -> None:
        kind = message["t"]
        if kind == "ready":
            self._zygote_ready = self._was_ready = True
            self._deaths = 0
            self._emit({"t": "ready"})
            if message["threads"] > 1:
                self._warn(
                    f"importing the training function started {message['threads'] - 1} thread(s): ranks are forked "
                    "from there without them, and a lock that one holds stays locked; start them in the function"
                )
        elif kind == "load_failed":
            self._give_up(message["error"], message["traceback"])
        elif kind == "forked":
            process = self._processes[message["key"]]
            process.pid, process.pidfd = message["pid"], fds[0]
            self._selector.register(process.pidfd, selectors.EVENT_READ, ("pidfd", process))
            if process.condemned:
                process.condemn()
        elif kind == "fork_failed":
            self._gone(self._processes[message["key"]], _EXIT_NOT_STARTED, None, message["error"])
        elif kind == "exited":
            for process in list(self._processes.values()):
                if process.pid == message["pid"]:
                    self._gone(process, message["code"], message["signal"])

    def _give_up(self, error: str, trace: str) -> None:
        """No zygote of ours can import the user's module: trying again would change nothing."""
        self._unloadable = error
        self._emit({"t": "load_failed", "error": error, "traceback": trace})
        if self._was_ready:  # the run counts on this node, which is of no use any more
            self._emit({"t": "broken", "traceback": f"no rank can be started any more: {error}\n{trace}"})

    def _zygote_gone(self, channel: Channel) -> None:
        """The kernel kills the ranks with their zygote; report each, and start another zygote."""
        assert self._zygote is not None
        self._selector.unregister(channel)
        channel.close()
        if not await_exit(self._zygote[0]):
            self._zygote[0].kill()  # it only let go of its channel
        code = self._zygote[0].wait()
        for process in list(self._processes.values()):
            process.signal(signal.SIGKILL)
            process.await_end(5.0)  # that a generation is stopped is said only when it is
            self._gone(process, None, signal.SIGKILL)
        if not self._zygote_ready and not self._unloadable:
            self._deaths += 1
            if self._deaths >= _MAX_DEATHS:
                end = f"exit code {code}" if code >= 0 else f"signal {-code}"
                error = (
                    f"the process died {self._deaths} times while it imported the training function: {end}"
                )
                self._give_up(error, "")
        self._zygote = None
        if not self._closing and not self._unloadable:
            self._spawn_zygote()

    def _check_zygote(self) -> None:
        """End a zygote that is stopped or stuck: how its children end would never be told."""
        now = time.monotonic()
        late = [p for p in self._processes.values() if p.ended_at is not None and now - p.ended_at > _REAP_S]
        if late and self._zygote is not None:
            self._zygote[0].kill()

    def _order_start(self, message: dict[str, Any]) -> None:
        for rank in message["ranks"]:
            self._fork("rank", rank["rank"], rank, message["generation"])

    def _order_store(self, message: dict[str, Any]) -> None:
        self._fork("store", None, {}, message["generation"])

    def _fork(self, kind: str, rank: int | None, order: dict[str, Any], generation: int) -> None:
        ours, theirs = Channel.pair()
        key = f"{kind}-{rank}-g{generation}" if rank is not None else f"{kind}-g{generation}"
        process = Forked(key=key, generation=generation, rank=rank, channel=ours, page=None)
        fds = [theirs.fileno()]
        with contextlib.ExitStack() as theirs_only:
            theirs_only.callback(theirs.close)
            if rank is not None:
                process.page = Page.create()
                process.page.saves_failing = self._saves.failing
                process.output, output = open_output(self._outputs, f"g{generation}/rank-{rank}", self._warn)
                theirs_only.callback(output.close)
                fds = [process.page.fd, theirs.fileno(), output.fileno()]
            self._processes[key] = process
            self._selector.register(ours, selectors.EVENT_READ, ("child", process))
            if self._zygote is None:
                error = f"the training function cannot be imported: {self._unloadable}"
                self._gone(process, _EXIT_NOT_STARTED, None, error)
                return
            # One that dies with this unread is seen on its channel, and its children are reported then.
            self._zygote[1].post(
                {**order, "t": kind, "key": key, "zygote": self._zygote[0].pid, "generation": generation}, fds
            )

    def _on_child(self, process: Forked) -> None:
        try:
            messages = process.channel.take()
        except Closed:
            self._selector.unregister(process.channel)
            return
        for message, fds in messages:
            self._hear(process, message, fds)

    def _hear(self, process: Forked, message: dict[str, Any], fds: list[int]) -> None:
        kind = message["t"]
        if kind == "arena":
            self._saves.arena((process.generation, int(process.rank or 0), message["arena"]), fds[0])
            return
        if kind == "copying":
            self._saves.copying((process.generation, int(process.rank or 0), message["arena"]), message)
            return
        if kind == "sealed":
            self._saves.sealed((process.generation, int(process.rank or 0), message["arena"]), message)
            message = {k: v for k, v in message.items() if k != "part"}
        elif kind in ("finished", "failed", "restore_failed"):
            process.told = message
            if kind != "finished":
                return  # said together with the exit
        self._emit({**message, "generation": process.generation, "rank": process.rank})
        if kind == "stepped":
            self._last_progress = 0.0  # the first step ends a recovery: say so at once

    def _on_pidfd(self, process: Forked) -> None:
        """The process is gone; how it ended comes from the zygote, which is its parent."""
        if process.pidfd is not None:
            self._selector.unregister(process.pidfd)
            process.release_pidfd()
            process.ended_at = time.monotonic()

    def _gone(self, process: Forked, code: int | None, number: int | None, note: str = "") -> None:
        if self._processes.pop(process.key, None) is None:
            return
        self._on_pidfd(process)
        self._drain(process)
        step = process.page.step if process.page is not None else None
        process.close()
        if process.rank is not None:
            self._emit(
                {
                    "t": "exited",
                    "generation": process.generation,
                    "rank": process.rank,
                    "code": code,
                    "signal": number,
                    "told": process.told,
                    "output": self._outputs.finish(process.output, _TAIL_LINES) + note,
                    "step": step,
                    "condemned": process.condemned,
                }
            )
            self._saves.orphan(process.generation, process.rank)
        self._report_stopped()

    def _drain(self, process: Forked) -> None:
        """Read what the dead process still said: its bytes are in the socket."""
        with contextlib.suppress(Closed):
            while messages := process.channel.take():
                for message, fds in messages:
                    self._hear(process, message, fds)
        with contextlib.suppress(KeyError):  # its end may have been seen there before
            self._selector.unregister(process.channel)

    # Ending them.

    def _order_stop(self, message: dict[str, Any]) -> None:
        self._stopping.append((message["generation"], message["token"]))
        for process in self._processes.values():
            if process.generation <= message["generation"]:
                process.condemn()
        self._report_stopped()

    def _report_stopped(self) -> None:
        for generation, token in list(self._stopping):
            if not any(p.generation <= generation for p in self._processes.values()):
                self._stopping.remove((generation, token))
                self._emit({"t": "stopped", "generation": generation})

    def _order_close(self, _message: dict[str, Any]) -> None:
        self._closing = True

    def _end_everything(self) -> None:
        for process in self._processes.values():
            process.condemn()
        if self._zygote is not None:
            self._zygote[0].kill()
            self._zygote[0].wait()
            self._zygote[1].close()
            self._zygote = None
        self._saves.close()
        for process in self._processes.values():
            # The zygote is gone, so the kernel reaps its children: their descriptors say so.
            process.await_end(5.0)
            process.close()
        self._processes.clear()

    # Orders to ranks, through their pages.

    def _order_post(self, message: dict[str, Any]) -> None:
        for process in self._processes.values():
            if process.generation == message["generation"] and process.page is not None:
                setattr(process.page, message["word"], message["step"])

    def _order_arm(self, message: dict[str, Any]) -> None:
        self._saves.arm(message["failpoints"])

    def _order_injected(self, message: dict[str, Any]) -> None:
        """A fault was carried out: the process that waits at its failpoint may go on."""
        if message["source"] == "writer":
            self._saves.tell({"t": "injected"})
        elif (process := self._processes.get(message["source"])) is not None:
            process.channel.post({"t": "injected"})

    def _order_signal(self, message: dict[str, Any]) -> None:
        """Send a signal to a rank, as a fault would."""
        for process in self._processes.values():
            if process.rank == message["rank"]:
                process.signal(message["signal"])

    def _set_failing(self, failing: bool) -> None:
        for process in self._processes.values():
            if process.page is not None:
                process.page.saves_failing = failing

    # Progress.

    def _report_progress(self) -> None:
        now = time.monotonic()
        if now - self._last_progress < _PROGRESS_EVERY_S:
            return
        self._last_progress = now
        by_generation: dict[int, dict[int, dict[str, Any]]] = {}
        for process in self._processes.values():
            if (page := process.progress()) is not None and process.rank is not None:
                by_generation.setdefault(process.generation, {})[process.rank] = page
        for generation, ranks in by_generation.items():
            self._emit({"t": "progress", "generation": generation, "ranks": ranks})
