"""What the end-to-end tests of storage, zombies and clean ends share: driven jobs, mounts, a real S3 server."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

_serial = itertools.count()


def until(condition: Callable[[], object], *, timeout: float = 60.0, why: str = "") -> object:
    """Wait for ``condition`` to give something true, and return it; fails the test at the deadline."""
    pause, deadline = threading.Event(), time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {timeout} s for {why or condition}"
        pause.wait(0.02)
    return found


@pytest.fixture(name="until")
def _until():
    return until


class Launch:
    """A launch in a thread of its own. ``result()`` waits for it, and raises what it raised."""

    def __init__(self, launch: Callable[[], object]) -> None:
        self._launch = launch
        self._value: object = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value = self._launch()
        except BaseException as error:  # handed to the test's own thread
            self._error = error

    @property
    def over(self) -> bool:
        return not self._thread.is_alive()

    def result(self, timeout: float = 120.0):
        self._thread.join(timeout)
        assert self.over, f"the launch did not end within {timeout} s"
        if self._error is not None:
            raise self._error
        return self._value


class Drive:
    """A job that goes as far as it is allowed to.

    ``allow`` sets how many steps may be made, ``wait_at`` waits until all ranks of a generation stand before a step.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir()
        self.allow(0)
        self.runs: list[Launch] = []

    def launch(self, call: Callable[[], object]) -> Launch:
        self.runs.append(Launch(call))
        return self.runs[-1]

    def allow(self, steps: int) -> None:
        temporary = self.directory / "limit~"
        temporary.write_text(str(steps))
        temporary.rename(self.directory / "limit")

    def at(self, rank: int, generation: int) -> int:
        with contextlib.suppress(FileNotFoundError):
            return int((self.directory / f"at-g{generation}-rank-{rank}").read_text())
        return -1

    def wait_at(self, step: int, *, generation: int = 1, ranks: int = 2, timeout: float = 60.0) -> None:
        def there() -> bool:
            ended = [run for run in self.runs if run.over]
            for run in ended:
                run.result()  # raises what it raised: more telling than a deadline
            return all(self.at(rank, generation) >= step for rank in range(ranks))

        until(there, timeout=timeout, why=f"step {step} of generation {generation}")

    def end(self) -> None:
        """Let whatever still waits go on, so that a failed test does not leave its run behind."""
        self.allow(1 << 40)
        for run in self.runs:
            with contextlib.suppress(BaseException):
                run.result(60)


def expected(rank: int, steps: int, size: int) -> np.ndarray:
    """The ``table`` of a rank after ``steps``."""
    random, table = np.random.RandomState(rank), np.zeros(size)
    for _ in range(steps):
        table += random.random_sample(size)
    return table


@pytest.fixture
def drive(tmp_path) -> Iterator[Drive]:
    made = Drive(tmp_path / "control")
    yield made
    made.end()


@pytest.fixture
def assert_exact():
    """``assert_exact(group, steps=, size=)``: the checkpoint holds exactly what a run without any fault ends with."""

    def check(group, *, steps: int, size: int, ranks: int = 2) -> None:
        for rank in range(ranks):
            assert np.array_equal(group[f"rank-{rank}/state/table"][...], expected(rank, steps, size))

    return check


@pytest.fixture(scope="session")
def driven():
    """The driven job."""
    path = Path(__file__).parent / "driven.py"
    name = "resilience_job_driven"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name].driven


@pytest.fixture
def cli():
    """``cli(*arguments)``: the command line in a process of its own."""

    def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "resilience.cli", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, **environment},
        )

    return run


@pytest.fixture
def records():
    """``records(storage, run)``: the commit log, as anybody reads it."""
    from resilience.journal.log import CommitLog
    from storage_backends import open_storage

    def read(storage: str, run: str):
        return CommitLog(open_storage(f"{storage}/{run}"), new_id=lambda: "reader").refresh()

    return read


@pytest.fixture
def committed(records):
    """``committed(storage, run)``: (step, generation, tier) of every checkpoint that the log records, in order."""

    def read(storage: str, run: str):
        return [
            (record.body["step"], record.generation, record.body["tier"])
            for record in records(storage, run)
            if record.kind == "checkpoint"
        ]

    return read


def newest_restored(result) -> None:
    """Each recovery begins at the newest checkpoint acknowledged in a tier that survived: no more is lost."""
    events = result.history.sql(
        "select type, step, data from events where type in "
        "('checkpoint.committed', 'restore.chosen', 'node.lost') order by time, generation, seq"
    )
    newest = {"nvme": 0, "shared": 0}
    lost = False
    for event in events:
        if event["type"] == "checkpoint.committed":
            tier = event["data"]["tier"]
            newest[tier] = max(newest[tier], event["step"])
        elif event["type"] == "node.lost":
            lost = True
        else:
            if lost:
                newest["nvme"] = 0  # every checkpoint of these runs has packs on all nodes
            assert event["data"]["step"] >= max(newest.values())
            lost = False


@pytest.fixture
def assert_newest_restored():
    """``assert_newest_restored(result)``: no recovery lost more than it had to."""
    return newest_restored


class Mounts:
    """File systems mounted for a test, and taken down after it."""

    def __init__(self) -> None:
        self._mounted: list[Path] = []

    def tmpfs(self, path: Path, size: str) -> Path:
        path.mkdir(parents=True, exist_ok=True)
        self._mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path))
        self._mounted.append(path)
        return path

    def read_only(self, path: Path) -> None:
        """Everything below ``path`` is read-only for whoever opens it from now on, until ``release``."""
        self._mount("--bind", str(path), str(path))
        self._mounted.append(path)
        self._mount("-o", "remount,bind,ro", str(path))

    def release(self, path: Path) -> None:
        self._mounted.remove(path)
        subprocess.run(["umount", "-l", str(path)], check=True, capture_output=True)

    def _mount(self, *arguments: str) -> None:
        subprocess.run(["mount", *arguments], check=True, capture_output=True, text=True)

    def close(self) -> None:
        for path in reversed(self._mounted):
            subprocess.run(["umount", "-l", str(path)], check=False, capture_output=True)
        self._mounted.clear()


@pytest.fixture
def mounts(tmp_path) -> Iterator[Mounts]:
    made = Mounts()
    try:
        made.release(made.tmpfs(tmp_path / "probe-mount", "64k"))
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs the right to mount a tmpfs (run as root): {getattr(error, 'stderr', error)}")
    yield made
    made.close()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Endpoint of a real S3 server on loopback."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def aws_environment(endpoint: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": "/dev/null",
    }


@pytest.fixture
def aws(s3_server, monkeypatch) -> dict[str, str]:
    """Endpoint and credentials: in this process's environment, and returned for ``env=`` of a job."""
    for name, value in aws_environment(s3_server).items():
        monkeypatch.setenv(name, value)
    return aws_environment(s3_server)


@pytest.fixture
def bucket(aws) -> str:
    import boto3

    name = f"e2e-{next(_serial)}"
    boto3.client("s3").create_bucket(Bucket=name)
    return name


class Gate:
    """A TCP relay that can be cut: connections die, and new ones are refused, until it is opened again."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition("//")[2].partition(":")
        self._target = (host, int(port))
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._listener: socket.socket | None = None
        self._port = 0
        self.open()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def open(self) -> None:
        listener = socket.create_server(("127.0.0.1", self._port))
        self._port = listener.getsockname()[1]
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def cut(self) -> None:
        assert self._listener is not None
        listener, self._listener = self._listener, None
        self._close(listener)
        with self._lock:
            ends, self._open = self._open, set()
        for end in ends:
            self._close(end)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            if self._listener is not listener:
                self._close(near)
                return
            far = socket.create_connection(self._target)
            with self._lock:
                self._open |= {near, far}
            for source, target in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(source, target), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
        for end in (source, target):
            with self._lock:
                self._open.discard(end)
            self._close(end)

    @staticmethod
    def _close(end: socket.socket) -> None:
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)  # also wakes a thread that waits in accept or recv
        end.close()


@pytest.fixture
def gate(s3_server) -> Iterator[Gate]:
    made = Gate(s3_server)
    yield made
    if made._listener is not None:
        made.cut()
