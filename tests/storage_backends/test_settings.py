"""Where endpoint and credentials of S3 come from: each of the places that its users know, and no other.

In a process of its own, as fsspec reads its configuration when it is imported; what signed the requests is seen
by a proxy before the server.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

USE = """
    import sys
    from storage_backends import open_storage
    from storage_backends.transfer import TransferPolicy
    storage = open_storage(sys.argv[1], transfer=TransferPolicy(part=5 << 20))
    assert storage.create("log/1", b"1") is None
    body = b"x" * (11 << 20)
    with storage.sink("pack") as sink:
        sink.write(body)
    assert storage.read("pack", 0, len(body)) == body
    assert storage.list() == ["log/", "pack"]
    storage.delete_all("log")
"""


@pytest.fixture
def nothing(proxy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No setting anywhere, and a directory for some."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "FSSPEC_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("FSSPEC_CONFIG_DIR", str(tmp_path / "fsspec"))
    (tmp_path / "fsspec").mkdir()
    return tmp_path


def by_variables(directory: Path, endpoint: str, key: str) -> dict[str, str]:
    return {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": "s"}


def by_the_variable_for_s3(directory: Path, endpoint: str, key: str) -> dict[str, str]:
    wrong = {**by_variables(directory, "http://127.0.0.1:9", key)}
    return {**wrong, "AWS_ENDPOINT_URL_S3": endpoint}


def by_profile(directory: Path, endpoint: str, key: str) -> dict[str, str]:
    (directory / "config").write_text(f"[profile train]\nendpoint_url = {endpoint}\nregion = eu-west-1\n")
    (directory / "credentials").write_text(
        f"[default]\naws_access_key_id = other\naws_secret_access_key = s\n"
        f"[train]\naws_access_key_id = {key}\naws_secret_access_key = s\n"
    )
    return {"AWS_PROFILE": "train"}


def by_default_profile(directory: Path, endpoint: str, key: str) -> dict[str, str]:
    (directory / "config").write_text(f"[default]\nendpoint_url = {endpoint}\n")
    (directory / "credentials").write_text(
        f"[default]\naws_access_key_id = {key}\naws_secret_access_key = s\n"
    )
    return {}


def by_credential_process(directory: Path, endpoint: str, key: str) -> dict[str, str]:
    answer = directory / "answer.json"
    answer.write_text(json.dumps({"Version": 1, "AccessKeyId": key, "SecretAccessKey": "s"}))
    (directory / "config").write_text(
        f"[default]\nendpoint_url = {endpoint}\ncredential_process = cat {answer}\n"
    )
    return {}


def by_fsspec_json(directory: Path, endpoint: str, key: str) -> dict[str, str]:
    settings = {"s3": {"endpoint_url": endpoint, "key": key, "secret": "s"}}
    (directory / "fsspec" / "conf.json").write_text(json.dumps(settings))
    return {}


def by_fsspec_client_kwargs(directory: Path, endpoint: str, key: str) -> dict[str, str]:
    client = {"endpoint_url": endpoint, "aws_access_key_id": key, "aws_secret_access_key": "s"}
    (directory / "fsspec" / "conf.json").write_text(json.dumps({"s3": {"client_kwargs": client}}))
    return {}


def by_fsspec_ini(directory: Path, endpoint: str, key: str) -> dict[str, str]:
    (directory / "fsspec" / "conf.ini").write_text(
        f"[s3]\nendpoint_url = {endpoint}\nkey = {key}\nsecret = s\n"
    )
    return {}


def by_fsspec_profile(directory: Path, endpoint: str, key: str) -> dict[str, str]:
    by_profile(directory, endpoint, key)
    (directory / "fsspec" / "conf.json").write_text(json.dumps({"s3": {"profile": "train"}}))
    return {}


def by_fsspec_variables(directory: Path, endpoint: str, key: str) -> dict[str, str]:
    return {"FSSPEC_S3_ENDPOINT_URL": endpoint, "FSSPEC_S3_KEY": key, "FSSPEC_S3_SECRET": "s"}


@pytest.mark.parametrize("driver", ["fsspec", "obstore"])
@pytest.mark.parametrize(
    "place",
    [
        by_variables,
        by_the_variable_for_s3,
        by_profile,
        by_default_profile,
        by_credential_process,
        by_fsspec_json,
        by_fsspec_client_kwargs,
        by_fsspec_ini,
        by_fsspec_profile,
        by_fsspec_variables,
    ],
)
def test_each_place_is_honoured(
    place: Any,
    driver: str,
    nothing: Path,
    proxy: Any,
    bucket: str,
    start: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RESILIENCE_S3_DRIVER", driver)
    for name, value in place(nothing, proxy.url, "thekey").items():
        monkeypatch.setenv(name, value)
    process = start(USE, f"s3://{bucket}/run")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert proxy.keys == {"thekey"}
