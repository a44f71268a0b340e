"""What a storage URL means, and what its mistakes are told."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fsspec.registry import known_implementations

from resilience.errors import InvalidError
from storage_backends import RetryPolicy, child, open_storage
from storage_backends.memory import MemoryStorage
from storage_backends.object import ObjectStorage
from storage_backends.posix import PosixStorage
from storage_backends.retry import RetryStorage


def test_paths_and_file_urls_are_posix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for url in (f"{tmp_path}/runs", f"file://{tmp_path}/runs", f"FILE://{tmp_path}/runs", "runs", "./runs/"):
        storage = open_storage(url, retry=False)
        assert isinstance(storage, PosixStorage)
        assert storage.url == f"file://{tmp_path}/runs"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_storage("~/runs").url == f"file://{tmp_path}/runs"


def test_a_url_opens_what_it_came_from(tmp_path: Path) -> None:
    for url in (f"{tmp_path}/with space/run", "memory://locate-round/run"):
        first = open_storage(url)
        first.create("a", b"1")
        assert open_storage(first.url).read("a") == b"1"


def test_memory_is_one_store_per_name_in_this_process() -> None:
    a = open_storage("memory://locate-one/runs/r", retry=False)
    assert isinstance(a, MemoryStorage)
    a.create("x", b"1")
    assert open_storage("memory://locate-one/").list() == ["runs/"]
    assert open_storage("memory://locate-one/runs").read("r/x") == b"1"
    assert open_storage("memory://locate-two/runs").list() == []


def test_other_schemes_are_fsspec() -> None:
    storage = open_storage("s3://bucket/runs", retry=False)
    assert isinstance(storage, ObjectStorage)
    assert storage.url == "s3://bucket/runs"


def test_retry_is_on_unless_told() -> None:
    policy = RetryPolicy(attempts=1)
    assert isinstance(open_storage("memory://locate"), RetryStorage)
    assert isinstance(open_storage("memory://locate", retry=policy), RetryStorage)
    assert isinstance(open_storage("memory://locate", retry=False), MemoryStorage)


def test_child_builds_urls() -> None:
    assert child("s3://b/runs/", "run-1", "node-a") == "s3://b/runs/run-1/node-a"
    assert child("/data", "run-1") == "/data/run-1"
    assert child("/", "run-1") == "/run-1"
    assert child("memory://x", "r") == "memory://x/r"
    for bad in ("", "a/../b", "a b"):
        with pytest.raises(InvalidError):
            child("/data", bad)


@pytest.mark.parametrize(
    ("url", "package", "command"),
    [("s3://b/r", "s3fs", "resilience[s3]"), ("gs://b/r", "gcsfs", "gcsfs"), ("az://c/r", "adlfs", "adlfs")],
)
def test_a_missing_package_is_named(url: str, package: str, command: str, monkeypatch: Any) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else real(name))
    with pytest.raises(InvalidError, match=f"needs the package {package}") as caught:
        open_storage(url)
    assert "pip install" in str(caught.value.hint) and command in str(caught.value.hint)


def test_schemes_that_fsspec_knows_name_their_package_themselves(monkeypatch: Any) -> None:
    known = {"class": "no_such_driver.FileSystem", "err": "Install no-such-driver to reach it"}
    monkeypatch.setitem(known_implementations, "elsewhere", known)
    with pytest.raises(InvalidError, match="not installed") as caught:
        open_storage("elsewhere://x/y")
    assert "no-such-driver" in str(caught.value.hint)


def test_unknown_schemes_say_what_is_known() -> None:
    with pytest.raises(InvalidError, match="'s4' is unknown") as caught:
        open_storage("s4://bucket/runs")
    assert "s3" in str(caught.value.hint) and "gs" in str(caught.value.hint)


@pytest.mark.parametrize("url", ["", "s3://", "memory://", "memory:///", "file://relative/path"])
def test_urls_that_name_nothing_are_refused(url: str) -> None:
    with pytest.raises(InvalidError) as caught:
        open_storage(url)
    assert caught.value.hint


def test_importing_and_opening_paths_loads_no_driver(start: Callable[..., Any], tmp_path: Path) -> None:
    code = """
        import sys
        from storage_backends import open_storage, probe
        probe(open_storage(sys.argv[1]))
        print([name for name in ("fsspec", "s3fs", "botocore", "aiohttp", "torch") if name in sys.modules])
    """
    process = start(code, tmp_path)
    out, err = process.communicate(timeout=60)
    assert out == "[]\n", err


def test_the_driver_of_s3_is_chosen_by_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = {}
    for driver in ("fsspec", "obstore"):
        monkeypatch.setenv("RESILIENCE_S3_DRIVER", driver)
        opened[driver] = type(open_storage("s3://bucket/runs", retry=False)).__name__
    assert opened == {"fsspec": "ObjectStorage", "obstore": "ObstoreStorage"}
    monkeypatch.setenv("RESILIENCE_S3_DRIVER", "boto")
    with pytest.raises(InvalidError, match="boto") as caught:
        open_storage("s3://bucket/runs")
    assert "fsspec or obstore" in caught.value.hint
    monkeypatch.setenv("RESILIENCE_S3_DRIVER", "obstore")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "obstore" else object())
    with pytest.raises(InvalidError, match="needs the package obstore"):
        open_storage("s3://bucket/runs")
