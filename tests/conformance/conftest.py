"""Every backend, ready to be put through the same suite. Adding a backend is adding a maker to MAKERS."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from storage_backends import RetryPolicy, Storage
from storage_backends.disk import Disk
from storage_backends.faults import FaultStorage
from storage_backends.memory import MemoryStorage
from storage_backends.object import ObjectStorage
from storage_backends.obstore_storage import ObstoreStorage
from storage_backends.posix import PosixStorage
from storage_backends.retry import RetryStorage

_serial = itertools.count()


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """A real S3 server over HTTP on a free port of loopback, once per session."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_root(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh bucket's URL; endpoint and credentials only through the environment, as users give them."""
    import boto3

    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    bucket = f"bucket-{next(_serial)}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    return f"s3://{bucket}/runs/run-1"


def _posix(request: pytest.FixtureRequest) -> Storage:
    path: Path = request.getfixturevalue("tmp_path")
    return PosixStorage(path / "root" / "run")


def _memory(request: pytest.FixtureRequest) -> Storage:
    return MemoryStorage(Disk("object"), "run")


def _page_cache(request: pytest.FixtureRequest) -> Storage:
    return MemoryStorage(Disk("page_cache"), "run")


def _s3(request: pytest.FixtureRequest) -> Storage:
    return ObjectStorage(request.getfixturevalue("s3_root"))


def _obstore(request: pytest.FixtureRequest) -> Storage:
    return ObstoreStorage(request.getfixturevalue("s3_root"))


def _fsspec_memory(request: pytest.FixtureRequest) -> Storage:
    return ObjectStorage(f"memory://conformance-{next(_serial)}/run")


MAKERS: dict[str, Callable[[pytest.FixtureRequest], Storage]] = {
    "posix": _posix,
    "memory": _memory,
    "memory-page-cache": _page_cache,
    "s3": _s3,
    "s3-obstore": _obstore,
    "fsspec-memory": _fsspec_memory,
}


def _flaky(storage: Storage) -> Storage:
    """Retry around a plan with no faults: both wrappers must be invisible."""
    return RetryStorage(FaultStorage(storage), RetryPolicy(sleep=lambda seconds: None))


@pytest.fixture(params=[f"{maker}{wrap}" for maker in MAKERS for wrap in ("", "+wrappers")])
def storage(request: pytest.FixtureRequest) -> Iterator[Storage]:
    """An empty storage of every kind, bare and wrapped."""
    name, _, wrapped = request.param.partition("+")
    made = MAKERS[name](request)
    made = _flaky(made) if wrapped else made
    yield made
    made.close()
