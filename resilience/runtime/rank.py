"""A rank: one forked process that runs the user's function on one card.

It never imports Ray and never talks to storage except to read a checkpoint: snapshots go into its arena, which
the agent and the writer also hold, so that they outlive this process.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from resilience.checkpoint.overlap import Mode
from resilience.checkpoint.restore import Checkpoint, Source
from resilience.errors import CorruptError, UnavailableError
from resilience.run import Interrupted, Run
from resilience.runtime.failpoint import Failpoints
from resilience.runtime.output import Stream
from resilience.runtime.page import Page
from resilience.runtime.snapshots import Snapshots
from resilience.runtime.wire import Channel

_LOG_EVERY_S = 0.5
# Exit codes of a rank's process; its message to the agent says more.
EXIT_USER_ERROR = 1
EXIT_RESTORE_FAILED = 75


def run_rank(function: Any, message: dict[str, Any], fds: list[int]) -> int:
    """Body of the forked child: set the process up, run the function, say how it ended."""
    page_fd, channel_fd, output_fd = fds
    os.dup2(output_fd, 1)
    os.dup2(output_fd, 2)
    os.close(output_fd)
    # The zygote's stream objects may hold buffered text or be redirected: make fresh ones on the new descriptors.
    sys.stdout = io.TextIOWrapper(Stream(1), write_through=True)
    sys.stderr = io.TextIOWrapper(Stream(2), write_through=True)
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(message["env"])
    host = RankHost(message, Page(page_fd), Channel.from_fd(channel_fd))
    body = getattr(function, "function", function)
    try:
        # Held until this process exits: dropping a process group as the user's frame goes can deadlock between
        # gloo's thread, which wants the interpreter, and ours, which holds it and wants gloo's queue
        # (pytorch#56297).
        run = Run(host)
        value = body(run, **message["arguments"])
    except Interrupted:
        host.finish(stopped=True)
        return 0
    except _RestoreFailed as error:
        host.tell(
            {
                "t": "restore_failed",
                "tier": message["restore"]["tier"],
                "reason": str(error),
                "corrupt": isinstance(error.__cause__, CorruptError),
            }
        )
        return EXIT_RESTORE_FAILED
    except BaseException as error:  # noqa: BLE001 - the user's exception is carried to the caller, whatever it is
        traceback.print_exc()
        host.fail(error)
        return EXIT_USER_ERROR
    host.finish(value=value)
    return 0


class _RestoreFailed(BaseException):
    """The chosen checkpoint cannot be used; the supervisor falls back to another. A ``BaseException``: it passes
    through the training function, whose ``except Exception`` is not for this."""


class _Restoring:
    """The checkpoint of a start order, opened now and read as objects are tracked: its damage is the supervisor's
    business, its time is counted."""

    def __init__(self, order: Mapping[str, Any], host: RankHost) -> None:
        self.seconds = 0.0
        with self._counted():
            self._checkpoint = Checkpoint(
                Source.all_from_json(order["parts"]),
                run=host.name,
                step=order["step"],
                generation=order["generation"],
                rank=host.rank,
                world_size=host.world_size,
                warn=lambda text: print(f"resilience: {text}", file=sys.stderr, flush=True),
            )
        self.step = self._checkpoint.step
        self.names = self._checkpoint.names

    def into(self, objects: Mapping[str, Any]) -> dict[str, Any]:
        with self._counted():
            return self._checkpoint.into(objects)

    def rebuild(self, name: str, value: Any) -> Any:
        with self._counted():
            return self._checkpoint.rebuild(name, value)

    def generators(self) -> Any:
        with self._counted():
            return self._checkpoint.generators()

    @contextmanager
    def _counted(self) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        except (CorruptError, UnavailableError) as error:
            raise _RestoreFailed(str(error)) from error
        finally:
            self.seconds += time.monotonic() - began


class RankHost:
    """The ``Host`` of a supervised rank."""

    def __init__(self, message: dict[str, Any], page: Page, channel: Channel) -> None:
        self.rank: int = message["rank"]
        self.world_size: int = message["world_size"]
        self.local_rank: int = message["local_rank"]
        self.name: str = message["run"]
        self.generation: int = message["generation"]
        self._every: int | None = message["checkpoint_every"]
        self._sources = message["restore"]
        self._page = page
        self._channel = channel
        self._restored: _Restoring | None = None
        self._restore_begun = False
        self._restore_told = False
        self._done = 0
        self._total: int | None = None
        self._first = True
        self._missed: set[tuple[str, int]] = set()
        self._values: list[dict[str, Any]] = []
        self._flushed = time.monotonic()
        self._failpoints = Failpoints(message["failpoints"], self._fire)
        self._snapshots = Snapshots(self, page, Mode(message.get("snapshot", Mode.BLOCKING)))

    # Talking to the agent.

    def tell(self, message: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        self._channel.send(message, fds)

    def _fire(self, fault: dict[str, Any]) -> None:
        self.tell({"t": "inject", "index": fault["index"]})
        self._channel.receive()  # carried out: usually we do not live to see it
        if fault.get("rank") != self.rank:
            return
        if fault["action"] == "exit":
            os._exit(7)
        if fault["action"] == "raise":
            raise RuntimeError(f"injected fault {fault['index']}")

    def reach(self, point: str, step: int) -> None:
        if self._failpoints:
            self._failpoints.reach(point, rank=self.rank, step=step, generation=self.generation)

    # The Host protocol.

    def restored(self) -> _Restoring | None:
        if self._restore_begun:
            return self._restored
        self._restore_begun = True
        if self._sources is None:
            self.ready()
            return None
        self._page.enter("restore")
        if "unfetched" in self._sources:
            raise _RestoreFailed(self._sources["unfetched"])
        self.reach("restore.begin", self._sources["step"])
        self._restored = _Restoring(self._sources, self)
        self._snapshots.saved = self._done = self._restored.step
        self._page.enter("start")
        self._page.beat(self._done)
        return self._restored

    def ready(self) -> None:
        if self._restore_told:
            return
        self._restore_told = True
        restored = self._restored
        self.tell(
            {
                "t": "restored",
                "step": restored.step if restored else 0,
                "tier": self._sources["tier"] if restored else None,
                "seconds": restored.seconds if restored else 0.0,
            }
        )

    def begin(self, step: int) -> None:
        self._page.beat(step)
        self._snapshots.step_begins()
        if self._failpoints:
            self.reach("step", step)

    def end(self, done: int, total: int) -> bool:
        page = self._page
        page.beat(done)
        self._snapshots.step_ends()
        self._done, self._total = done, total
        if self._first:
            self._first = False
            self.tell({"t": "stepped", "step": done, "total": total})
        at = page.checkpoint_at
        if self._snapshots.saved < at < done and at >= 0:  # one saved since then serves as well
            self._miss("checkpoint", at, done)
        if done == total or at == done:
            return done != self._snapshots.saved
        return self._every is not None and done % self._every == 0

    def _miss(self, what: str, wanted: int, done: int) -> None:
        if (what, wanted) in self._missed:
            return
        self._missed.add((what, wanted))
        self.tell({"t": "missed", "wanted": wanted, "step": done})

    def stop_point(self, done: int) -> bool:
        page = self._page
        stop = page.stop_at
        if stop < 0 or stop > done:
            return False
        if stop < done:
            self._miss("stop", stop, done)
            return False
        self.flush()
        self.tell({"t": "parked", "step": done})
        page.enter("stopping")
        while page.stop_at == done:
            if page.release_at == done:
                return True
            time.sleep(0.002)  # the page is memory: there is nothing to wait on but its word
            page.beat(done)
        page.enter("step")
        return False

    def log(self, step: int, values: dict[str, float]) -> None:
        self._values.append({"step": step, **values})
        if time.monotonic() - self._flushed > _LOG_EVERY_S:
            self.flush()
        if self._failpoints:
            self.reach("log", step)

    def flush(self) -> None:
        self._flushed = time.monotonic()
        if self._values:
            self.tell({"t": "log", "values": self._values})
            self._values = []

    def enter(self, section: str) -> None:
        self._page.enter(section)
        self._page.beat(self._done)

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        before = self._page.section
        self.enter(name)
        try:
            yield
        finally:
            self.enter(before)

    def save(self, done: int, capture: Callable[[], dict[str, Any]], objects: dict[str, Any]) -> None:
        last = done in (self._total, self._page.stop_at)
        self._snapshots.save(done, capture, objects, last=last)

    # The end.

    def finish(self, value: Any = None, *, stopped: bool = False) -> None:
        self.ready()  # of a function that has no loop
        self._snapshots.join()
        self.flush()
        try:
            text = json.dumps(value)
        except (TypeError, ValueError):
            print(
                f"resilience: return value of type {type(value).__name__} is not JSON; it is dropped",
                flush=True,
            )
            text = "null"
        self.tell({"t": "finished", "steps": self._done, "stopped": stopped, "value": text})

    def fail(self, error: BaseException) -> None:
        with contextlib.suppress(Exception):  # neither is worth as much as the traceback that follows
            self._snapshots.join()
            self.flush()
        self.tell(
            {
                "t": "failed",
                "error": f"{type(error).__name__}: {error}"[:4000],
                "traceback": traceback.format_exc()[-16000:],
                "signature": _signature(error),
            }
        )


def _signature(error: BaseException) -> str:
    """Type and place of an exception, stable over generations."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1] if frames else None
    return (
        f"{type(error).__name__}@{os.path.basename(last.filename)}:{last.lineno}"
        if last
        else type(error).__name__
    )
