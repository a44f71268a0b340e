"""A real S3 server, proxies before it that break what they carry, and Python in a process of its own."""

from __future__ import annotations

import http.client
import itertools
import logging
import os
import select
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

import pytest

_serial = itertools.count()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Its endpoint: a free port of loopback, once per session."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def aws(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Endpoint and credentials, only through the environment, as users give them."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    return s3_server


@pytest.fixture
def bucket(aws: str) -> str:
    import boto3

    name = f"unit-{next(_serial)}"
    boto3.client("s3").create_bucket(Bucket=name)
    return name


class Proxy:
    """A real HTTP proxy before the S3 server that can lose replies and answer in the server's place.

    ``plan`` maps a method to the actions of its next requests: ``"pass"``, ``"lose"`` (carried out, then the
    connection is closed without an answer), or ``(status, code)`` (not carried out, answered so).
    """

    def __init__(self, target: str) -> None:
        self.plan: dict[str, list[str | tuple[int, str]]] = {}
        self.seen: list[str] = []
        self.keys: set[str] = set()  # access keys that signed what was seen
        self.dropped: set[str] = set()  # names of headers that the server does not get to see
        proxy, host = self, urlsplit(target).netloc

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                queue = proxy.plan.get(self.command, [])
                action = queue.pop(0) if queue else "pass"
                proxy.seen.append(f"{self.command} {action}")
                if isinstance(action, tuple):
                    status, code = action
                    # A 200 with an error in its body is one that drivers repeat, so success has none.
                    error = f"<Error><Code>{code}</Code><Message>planned</Message></Error>"
                    text = error.encode() if status >= 300 else b""
                    self.answer(status, {"Content-Type": "application/xml"}, text)
                    return
                connection = http.client.HTTPConnection(host, timeout=30)
                _, _, signer = self.headers.get("Authorization", "").partition("Credential=")
                proxy.keys.add(signer.partition("/")[0])
                headers = {k: v for k, v in self.headers.items() if k.lower() not in proxy.dropped}
                connection.request(self.command, self.path, body, headers)
                reply = connection.getresponse()
                text = reply.read()
                connection.close()
                if action == "lose":
                    self.close_connection = True
                    return
                self.answer(reply.status, dict(reply.headers), text)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_one  # noqa: N815

            def answer(self, status: int, headers: dict[str, str], text: bytes) -> None:
                self.send_response_only(status)
                for name, value in headers.items():
                    if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                        self.send_header(name, value)
                length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(text))
                self.send_header("Content-Length", length)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(text)

            def log_message(self, format: str, *arguments: object) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))
        self.thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def proxy(bucket: str, aws: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    made = Proxy(aws)
    monkeypatch.setenv("AWS_ENDPOINT_URL", made.url)
    yield made
    made.stop()


Way = Literal["stall", "drop", "late"]
_HEARD = 30.0  # seconds after which a test that nobody answers ends


class Wire:
    """A TCP proxy on loopback that breaks connections in the ways that networks do.

    ``plan`` orders a fault. It befalls the first connection that has carried ``after`` bytes ``toward`` the
    server or the client, once the faults ordered before it have happened:

    - ``stall``: from there on nothing is forwarded, and nothing is closed;
    - ``drop``: both ends are reset;
    - ``late``: what the server answers is kept until the client has gone.
    """

    def __init__(self, target: str) -> None:
        host, _, port = urlsplit(target).netloc.partition(":")
        self._target = (host, int(port))
        self._lock = threading.Lock()
        self._plan: list[tuple[Way, str, int]] = []
        self.happened: list[Way] = []
        self._open: set[socket.socket] = set()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def plan(self, way: Way, *, toward: str = "server", after: int = 2 << 20) -> None:
        with self._lock:
            self._plan.append((way, toward, after))

    def stop(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for end in list(self._open):
            self._end(end)
        for thread in self._threads:
            thread.join(_HEARD)
            assert not thread.is_alive()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            server = socket.create_connection(self._target)
            self._open |= {client, server}
            link = _Link(self, client, server)
            for pump in (link.to_server, link.to_client):
                thread = threading.Thread(target=pump)
                self._threads.append(thread)
                thread.start()

    def _take(self, toward: str, carried: int) -> Way | None:
        with self._lock:
            if self._plan and self._plan[0][1] == toward and carried >= self._plan[0][2]:
                way = self._plan.pop(0)[0]
                self.happened.append(way)
                return way
        return None

    def _end(self, end: socket.socket) -> None:
        try:
            end.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        end.close()
        self._open.discard(end)


class _Link:
    def __init__(self, wire: Wire, client: socket.socket, server: socket.socket) -> None:
        self._wire, self._client, self._server = wire, client, server
        self._stalled = False
        self._late = threading.Event()

    def to_server(self) -> None:
        self._pump(self._client, self._server, "server")

    def to_client(self) -> None:
        self._pump(self._server, self._client, "client")

    def _pump(self, source: socket.socket, sink: socket.socket, toward: str) -> None:
        carried = 0
        try:
            while data := source.recv(1 << 16):
                carried += len(data)
                way = self._wire._take(toward, carried)
                if way == "stall":
                    self._stalled = True
                elif way == "late":
                    self._late.set()
                elif way == "drop":
                    return
                if self._stalled:
                    self._wait_for_the_client()
                    return
                if toward == "client" and self._late.is_set():
                    self._wait_for_the_client()
                sink.sendall(data)
        except (OSError, ValueError):  # the other pump of the two closed it
            return
        finally:
            self._wire._end(source)
            self._wire._end(sink)

    def _wait_for_the_client(self) -> None:
        poll = select.poll()
        poll.register(self._client, select.POLLRDHUP | select.POLLHUP)
        assert poll.poll(1000 * _HEARD), "the client waits for ever"


@pytest.fixture
def wire(bucket: str, aws: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    made = Wire(aws)
    monkeypatch.setenv("AWS_ENDPOINT_URL", made.url)
    yield made
    made.stop()


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """``start(code, *arguments, prefix=())``: Python code in a process; killed, if need be, at the end."""
    running: list[subprocess.Popen[str]] = []

    def run(code: str, *arguments: object, prefix: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*prefix, sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        running.append(process)
        return process

    yield run
    for process in running:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=30)
