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
from dataclasses import dataclass, field
from typing import Any

from resilience.runtime.output import Outputs
from resilience.runtime.page import Page
from resilience.runtime.saves import Saves
from resilience.runtime.system import process_state, python_command
from resilience.runtime.wire import Channel, Closed

_PROGRESS_EVERY_S = 1.0
_TAIL_LINES = 40


@dataclass
class _Process:
    """A forked child of the zygote: a rank, or the store of a generation."""

    key: str
    generation: int
    rank: int | None
    channel: Channel
    page: Page | None
    output: str = ""
    pid: int | None = None
    pidfd: int | None = None
    condemned: bool = False
    told: dict[str, Any] = field(default_factory=dict)  # its last words: finished, failed, restore_failed


class NodeProcesses:
    """The processes of one node.

    Args:
        config: ``name, run, entry, env, nvme, shared`` (URLs of the run's roots), ``arguments`` (pickled by the
            launcher, loaded in the rank's parent only).
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
        self._processes: dict[str, _Process] = {}
        self._stopping: list[tuple[int, str]] = []
        self._saves = Saves(config, self._spawn, emit, self._set_failing)
        self._last_progress = 0.0
        self._closing = False
        self._thread = threading.Thread(target=self._loop, name="node", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def order(self, message: dict[str, Any]) -> None:
        """Hand over an order: ``start, stop, store, post, arm, injected, delete, signal, close``."""
        self._orders.put(message)
        os.eventfd_write(self._wake, 1)

    def close(self, timeout: float = 10.0) -> None:
        """End every process and the thread. May run twice."""
        self.order({"t": "close"})
        if self._thread.ident is not None:
            self._thread.join(timeout)

    def pids(self) -> list[int]:
        """Every process of this node (for tests, and for killing a node on purpose)."""
        found = [p.pid for p in list(self._processes.values()) if p.pid is not None]
        if self._zygote is not None:
            found.append(self._zygote[0].pid)
        return found + self._saves.pids()

    # The loop.

    def _loop(self) -> None:
        self._selector.register(self._wake, selectors.EVENT_READ, ("wake", None))
        # Children get PDEATHSIG from this thread, which lives as long as the agent does.
        self._spawn_zygote()
        self._saves.start()
        try:
            self._serve()
        except Exception:  # noqa: BLE001 - a bug of ours: this node must fail loudly, not fall silent
            self._emit({"t": "broken", "traceback": traceback.format_exc()})
        finally:
            self._end_everything()

    def _serve(self) -> None:
        while not self._closing:
            for key, _ in self._selector.select(timeout=0.25):
                if self._selector.get_map().get(key.fd) is not key:
                    continue  # what came before it in this round has closed it
                kind, subject = key.data
                getattr(self, f"_on_{kind}")(subject)
            self._report_progress()

    def _on_wake(self, _subject: None) -> None:
        os.eventfd_read(self._wake)
        while True:
            try:
                message = self._orders.get_nowait()
            except queue.Empty:
                return
            getattr(self, f"_order_{message['t']}")(message)

    def _spawn(self, module: str, kind: str) -> tuple[subprocess.Popen[bytes], Channel]:
        ours, theirs = Channel.pair()
        os.set_inheritable(theirs.fileno(), True)
        with self._outputs.open(f"{kind}-{self._config['name']}") as log:
            process = subprocess.Popen(
                # The run and the node are for people (and leak checks) reading the process list.
                python_command(
                    module, str(theirs.fileno()), str(os.getpid()), self._config["run"], self._config["name"]
                ),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self._config["env"]},
                start_new_session=True,
            )
        theirs.close()
        self._selector.register(ours, selectors.EVENT_READ, (kind, ours))
        return process, ours

    def _spawn_zygote(self) -> None:
        self._zygote_ready = False
        self._zygote = self._spawn("resilience.runtime.zygote", "zygote")
        self._zygote[1].send({"t": "load", "entry": self._config["entry"], "env": self._config["env"]})

    def _on_writer(self, channel: Channel) -> None:
        if not self._saves.hear():
            self._selector.unregister(channel)
            channel.close()
            self._saves.revive()

    # The zygote and its children.

    def _on_zygote(self, channel: Channel) -> None:
        try:
            message, fds = channel.receive()
        except Closed:
            self._zygote_gone(channel)
            return
        kind = message["t"]
        if kind == "ready":
            self._zygote_ready = True
            self._emit({"t": "ready", "threads": message["threads"]})
        elif kind == "load_failed":
            self._emit(message)
        elif kind == "forked":
            process = self._processes[message["key"]]
            process.pid, process.pidfd = message["pid"], fds[0]
            self._selector.register(process.pidfd, selectors.EVENT_READ, ("pidfd", process))
            if process.condemned:
                self._kill(process)
        elif kind == "exited":
            for process in list(self._processes.values()):
                if process.pid == message["pid"]:
                    self._gone(process, message["code"], message["signal"])

    def _zygote_gone(self, channel: Channel) -> None:
        """The kernel kills the ranks with their zygote; report each, and start another zygote."""
        self._selector.unregister(channel)
        channel.close()
        if self._zygote is not None:
            self._zygote[0].wait()
        for process in list(self._processes.values()):
            if process.pid is not None:
                self._kill(process)
            self._gone(process, None, signal.SIGKILL)
        if not self._closing:
            self._spawn_zygote()

    def _order_start(self, message: dict[str, Any]) -> None:
        for rank in message["ranks"]:
            self._fork("rank", rank["rank"], rank, message["generation"])

    def _order_store(self, message: dict[str, Any]) -> None:
        self._fork("store", None, {}, message["generation"])

    def _fork(self, kind: str, rank: int | None, order: dict[str, Any], generation: int) -> None:
        assert self._zygote is not None
        ours, theirs = Channel.pair()
        key = f"{kind}-{rank}-g{generation}" if rank is not None else f"{kind}-g{generation}"
        process = _Process(key=key, generation=generation, rank=rank, channel=ours, page=None)
        fds = [theirs.fileno()]
        output = None
        if rank is not None:
            process.page = Page.create()
            process.page.saves_failing = self._saves.failing
            process.output = self._outputs.rank(generation, rank)
            output = open(process.output, "ab")  # noqa: SIM115 - its descriptor travels to the child
            fds = [process.page.fd, theirs.fileno(), output.fileno()]
        self._processes[key] = process
        self._selector.register(ours, selectors.EVENT_READ, (kind, process))
        with contextlib.suppress(Closed):  # a dying zygote is seen on its own channel
            self._zygote[1].send(
                {**order, "t": kind, "key": key, "zygote": self._zygote[0].pid, "generation": generation}, fds
            )
        theirs.close()
        if output is not None:
            output.close()

    def _on_store(self, process: _Process) -> None:
        try:
            message, _ = process.channel.receive()
        except Closed:
            self._selector.unregister(process.channel)
            return
        self._emit({"t": "store", "generation": process.generation, "port": message["port"]})

    def _on_rank(self, process: _Process) -> None:
        try:
            message, fds = process.channel.receive()
        except Closed:
            self._selector.unregister(process.channel)
            return
        self._hear(process, message, fds)

    def _hear(self, process: _Process, message: dict[str, Any], fds: list[int]) -> None:
        kind = message["t"]
        if kind == "arena":
            self._saves.arena((process.generation, int(process.rank or 0), message["arena"]), fds[0])
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

    def _on_pidfd(self, process: _Process) -> None:
        """The process is gone; how it ended comes from the zygote, which is its parent."""
        if process.pidfd is not None:
            self._selector.unregister(process.pidfd)
            os.close(process.pidfd)
            process.pidfd = None

    def _gone(self, process: _Process, code: int | None, number: int | None) -> None:
        if self._processes.pop(process.key, None) is None:
            return
        self._on_pidfd(process)
        self._drain(process)
        step = process.page.step if process.page is not None else None
        if process.pid is not None:
            with contextlib.suppress(ProcessLookupError):  # children of the user's code, if any are left
                os.killpg(process.pid, signal.SIGKILL)
        if process.page is not None:
            process.page.close()
        if process.rank is not None:
            tail = self._outputs.finish(process.output, _TAIL_LINES)
            self._emit(
                {
                    "t": "exited",
                    "generation": process.generation,
                    "rank": process.rank,
                    "code": code,
                    "signal": number,
                    "told": process.told,
                    "output": tail,
                    "step": step,
                    "condemned": process.condemned,
                }
            )
            self._saves.orphan(process.generation, process.rank)
        self._report_stopped()

    def _drain(self, process: _Process) -> None:
        """Read what the dead process still said: its bytes are in the socket."""
        process.channel._sock.setblocking(False)
        while process.channel in self._selector.get_map():
            try:
                message, fds = process.channel.receive()
            except (Closed, BlockingIOError):
                self._selector.unregister(process.channel)
                break
            if process.rank is not None:
                self._hear(process, message, fds)
        process.channel.close()

    # Ending them.

    def _kill(self, process: _Process) -> None:
        process.condemned = True
        if process.pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(process.pidfd, signal.SIGKILL)

    def _order_stop(self, message: dict[str, Any]) -> None:
        self._stopping.append((message["generation"], message["token"]))
        for process in self._processes.values():
            if process.generation <= message["generation"]:
                self._kill(process)
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
            self._kill(process)
        if self._zygote is not None:
            self._zygote[0].kill()
            self._zygote[0].wait()
            self._zygote[1].close()
        self._saves.close()
        for process in self._processes.values():
            if process.pidfd is not None:
                # The zygote is gone, so the kernel reaps its children: wait for the descriptor to say so.
                selectors_wait(process.pidfd, 5.0)
                os.close(process.pidfd)
            process.channel.close()
            if process.page is not None:
                process.page.close()
        self._processes.clear()
        self._selector.close()

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
        for process in self._processes.values():
            if process.key == message["source"]:
                with contextlib.suppress(Closed):
                    process.channel.send({"t": "injected"})

    def _order_signal(self, message: dict[str, Any]) -> None:
        """Send a signal to a rank, as a fault would."""
        for process in self._processes.values():
            if process.rank == message["rank"] and process.pidfd is not None:
                signal.pidfd_send_signal(process.pidfd, message["signal"])

    def _order_delete(self, message: dict[str, Any]) -> None:
        self._saves.tell(message)

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
            if process.rank is None or process.page is None or process.pid is None:
                continue
            ranks = by_generation.setdefault(process.generation, {})
            ranks[process.rank] = _progress_of(process.page, process_state(process.pid))
        for generation, ranks in by_generation.items():
            self._emit({"t": "progress", "generation": generation, "ranks": ranks})


def _progress_of(page: Page, state: str) -> dict[str, Any]:
    return {
        "step": page.step,
        "section": page.section,
        "age_s": page.age_s,
        "state": state,
        "stalled_s": page.stalled_s,
    }


def selectors_wait(fd: int, timeout: float) -> bool:
    """Wait until ``fd`` is readable."""
    with selectors.DefaultSelector() as selector:
        selector.register(fd, selectors.EVENT_READ)
        return bool(selector.select(timeout))
