"""Moving one object to and from an S3 server: this package, and the raw clients obstore, s3fs and boto3.

Everything on one machine, the server in a process of its own. Two servers: ``moto``, the S3 test server, which
is slow Python and hides what clients cost; and ``null``, which speaks just enough S3 to take parts and drop them,
or to send bytes from memory: what remains is the client. All move the same bytes in parts of 16 MiB, four at a
time, through a client that exists before the clock starts. They take turns in every round, in another order each
time. CPU seconds are those of the client's process.

    python -m benchmarks.object_store [--size MIB] [--rounds N]
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from statistics import median
from typing import Any, Protocol

from benchmarks import report

PART = 16 << 20
LANES = 4
BUCKET = "benchmark"
_WAIT = 30.0  # seconds for a server to listen

MOTO = """
import logging, sys, threading
from moto.server import ThreadedMotoServer
logging.getLogger("werkzeug").setLevel(logging.ERROR)
ThreadedMotoServer(ip_address="127.0.0.1", port=int(sys.argv[1]), verbose=False).start()
threading.Event().wait()
"""


class Client(Protocol):
    """One way to move an object. ``download`` returns what it read."""

    name: str

    def upload(self, data: bytes) -> None: ...

    def download(self, size: int) -> bytes | bytearray | memoryview: ...


class Ours:
    def __init__(self, driver: str) -> None:
        from storage_backends.object import ObjectStorage
        from storage_backends.obstore_storage import ObstoreStorage
        from storage_backends.transfer import TransferPolicy

        kind = {"fsspec": ObjectStorage, "obstore": ObstoreStorage}[driver]
        self.name = {"fsspec": "resilience", "obstore": "resilience over obstore"}[driver]
        self._storage = kind(f"s3://{BUCKET}", transfer=TransferPolicy(part=PART, parallel=LANES))
        self._storage.list("nothing")
        self._storage.sink("nothing").cancel()

    def upload(self, data: bytes) -> None:
        view = memoryview(data)
        with self._storage.sink("object", len(data)) as sink:
            for at in range(0, len(data), 64 << 20):  # as packs are copied from tier to tier
                sink.write(view[at : at + (64 << 20)])

    def download(self, size: int) -> bytearray:
        into = bytearray(size)
        assert self._storage.read_into("object", [(0, memoryview(into))]) == [size]
        return into


class Obstore:
    name = "obstore"

    def __init__(self) -> None:
        from obstore.store import S3Store

        self._store = S3Store(
            BUCKET, endpoint=os.environ["AWS_ENDPOINT_URL"], client_options={"allow_http": True}
        )
        self._pool = ThreadPoolExecutor(LANES)

    def upload(self, data: bytes) -> None:
        self._store.put("object", data, chunk_size=PART, max_concurrency=LANES)

    def download(self, size: int) -> bytearray:
        into = bytearray(size)
        view = memoryview(into)

        def fetch(at: int) -> None:
            end = min(at + PART, size)
            view[at:end] = memoryview(self._store.get_range("object", start=at, end=end))

        list(self._pool.map(fetch, range(0, size, PART)))
        return into


class S3fs:
    name = "s3fs"

    def __init__(self) -> None:
        import s3fs

        self._fs = s3fs.S3FileSystem(skip_instance_cache=True)
        self._fs.connect()

    def upload(self, data: bytes) -> None:
        self._fs.pipe_file(f"{BUCKET}/object", data, chunksize=PART, max_concurrency=LANES)

    def download(self, size: int) -> bytes:
        return self._fs.cat_file(f"{BUCKET}/object", chunksize=PART, max_concurrency=LANES)


class Boto3:
    name = "boto3"

    def __init__(self) -> None:
        import boto3
        from boto3.s3.transfer import TransferConfig

        self._client = boto3.client("s3")
        self._config = TransferConfig(
            multipart_threshold=PART, multipart_chunksize=PART, max_concurrency=LANES
        )

    def upload(self, data: bytes) -> None:
        self._client.upload_fileobj(io.BytesIO(data), BUCKET, "object", Config=self._config)

    def download(self, size: int) -> memoryview:
        into = io.BytesIO()
        self._client.download_fileobj(BUCKET, "object", into, Config=self._config)
        return into.getbuffer()


def measure(server: str, data: bytes, rounds: int) -> list[dict[str, Any]]:
    """Raw values: one entry per server, round, client and direction."""
    rows = []
    with running(server, len(data)):
        clients: list[Client] = [Ours("fsspec"), Ours("obstore"), Obstore(), S3fs(), Boto3()]
        for number in range(rounds + 1):  # the first one warms up and is dropped
            turn = number % len(clients)
            for client in clients[turn:] + clients[:turn]:
                if server == "moto":
                    clear()
                for direction in ("upload", "download"):
                    began, cpu = time.perf_counter(), _cpu()
                    got = client.upload(data) if direction == "upload" else client.download(len(data))
                    seconds, cpu_s = time.perf_counter() - began, _cpu() - cpu
                    if got is not None and server == "moto" and memoryview(got) != memoryview(data):
                        raise SystemExit(f"{client.name} moved other bytes")
                    del got
                    if number:
                        rows.append(
                            {
                                "server": server,
                                "round": number,
                                "client": client.name,
                                "direction": direction,
                                "seconds": seconds,
                                "cpu_s": cpu_s,
                            }
                        )
    return rows


def summary(rows: Sequence[dict[str, Any]], size: int) -> list[dict[str, Any]]:
    """Medians per server, direction and client; and the median over the rounds of its ratio to the raw client that
    was the fastest in that round, so that what else the machine does hits both sides."""
    found = []
    for server, direction in dict.fromkeys((row["server"], row["direction"]) for row in rows):
        of = [row for row in rows if (row["server"], row["direction"]) == (server, direction)]
        fastest: dict[int, float] = {}
        for row in of:
            if not row["client"].startswith("resilience"):
                number = row["round"]
                fastest[number] = min(fastest.get(number, row["seconds"]), row["seconds"])
        for client in sorted({row["client"] for row in of}):
            mine = [row for row in of if row["client"] == client]
            seconds = [row["seconds"] for row in mine]
            found.append(
                {
                    "server": server,
                    "direction": direction,
                    "client": client,
                    "mib_per_s": size / median(seconds) / 2**20,
                    "best_mib_per_s": size / min(seconds) / 2**20,
                    "cpu_s_per_gib": median(row["cpu_s"] for row in mine) * 2**30 / size,
                    "of_fastest_raw": median(fastest[row["round"]] / row["seconds"] for row in mine),
                }
            )
    return found


# --- servers --------------------------------------------------------------------------------------------------


@contextmanager
def running(server: str, size: int) -> Iterator[None]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    what = ["-c", MOTO] if server == "moto" else ["-m", "benchmarks.null_s3"]
    process = subprocess.Popen([sys.executable, *what, str(port), str(size)])
    os.environ.update(
        AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}",
        AWS_ACCESS_KEY_ID="benchmark",
        AWS_SECRET_ACCESS_KEY="benchmark",
        AWS_DEFAULT_REGION="us-east-1",
        AWS_CONFIG_FILE="/dev/null",
    )
    try:
        deadline = time.monotonic() + _WAIT
        while process.poll() is None and time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                time.sleep(0.05)
        if server == "moto":
            clear()
        yield
    finally:
        process.terminate()
        process.wait()


def clear() -> None:
    """Forget all objects (moto keeps them in memory), and make the bucket."""
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    for method, path in (("POST", "moto-api/reset"), ("PUT", BUCKET)):
        urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{path}", method=method)).close()


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", type=int, default=256, help="MiB of the object")
    parser.add_argument("--rounds", type=int, default=5, help="per server")
    parser.add_argument("--servers", nargs="+", choices=["moto", "null"], default=["moto", "null"])
    parser.add_argument("--output", default=str(report.RESULTS / "object_store.json"))
    options = parser.parse_args()
    size = options.size << 20
    machine = report.machine("obstore", "s3fs", "aiobotocore", "boto3", "botocore", "moto", "resilience")
    data = os.urandom(size)
    rows = [row for server in options.servers for row in measure(server, data, options.rounds)]
    table = summary(rows, size)
    print(f"{'':8}{'':10}{'':26}{'MiB/s':>8}{'best':>7}{'CPU s/GiB':>11}{'of fastest raw':>16}")
    for row in table:
        print(
            f"{row['server']:8}{row['direction']:10}{row['client']:26}{row['mib_per_s']:8.0f}{row['best_mib_per_s']:7.0f}"
            f"{row['cpu_s_per_gib']:11.2f}{row['of_fastest_raw']:16.2f}"
        )
    settings = {"size": size, "part": PART, "lanes": LANES, "rounds": options.rounds}
    report.write(
        report.Path(options.output),
        {"machine": machine, "settings": settings, "summary": table, "raw": rows},
    )


if __name__ == "__main__":
    main()
