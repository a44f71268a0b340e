"""FORMAT: created once, checked ever after, never adopting what is not ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from resilience.errors import InvalidError, UnavailableError
from resilience.journal.format_file import NAME, Format, ensure_format, read_format
from storage_backends.disk import Disk
from storage_backends.memory import MemoryStorage
from storage_backends.posix import PosixStorage

NOW = "2026-01-02T03:04:05Z"


def test_it_is_created_once_and_read_back(tmp_path: Path) -> None:
    storage = PosixStorage(tmp_path / "runs" / "a")
    with pytest.raises(FileNotFoundError):
        read_format(storage)
    assert ensure_format(storage, run="a", created=NOW) == Format(1, "a", NOW)
    before = storage.read(NAME)
    assert ensure_format(storage, run="a", created="later") == Format(1, "a", NOW) == read_format(storage)
    assert storage.read(NAME) == before
    assert json.loads(before) | {"reader": "?"} == {
        "format": "resilience", "version": 1, "run": "a", "created": NOW, "reader": "?",
    }  # fmt: skip


def test_of_two_that_race_one_creates_it() -> None:
    disk = Disk()
    one, two = MemoryStorage(disk), MemoryStorage(disk)

    def other_first(step: str, name: str) -> None:
        if step == "put":
            one.before = None
            ensure_format(two, run="a", created="first")

    one.before = other_first
    assert ensure_format(one, run="a", created="second").created == "first"


def test_another_begins_while_we_look() -> None:
    disk = Disk()
    one, two = MemoryStorage(disk), MemoryStorage(disk)

    def other_first(step: str, name: str) -> None:
        if step == "list":
            one.before = None
            ensure_format(two, run="a", created="first")
            two.create("log/x.json", b"x")

    one.before = other_first
    assert ensure_format(one, run="a", created="second").created == "first"


def test_a_lost_reply_is_settled_by_calling_again() -> None:
    storage = MemoryStorage(Disk(), lose_reply=lambda operation, name: True)
    with pytest.raises(UnavailableError):
        ensure_format(storage, run="a", created=NOW)
    assert ensure_format(storage, run="a", created=NOW) == Format(1, "a", NOW)


def test_somebody_elses_directory_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    storage = PosixStorage(tmp_path)
    with pytest.raises(InvalidError, match=r"thesis\.tex") as caught:
        ensure_format(storage, run="a", created=NOW)
    assert caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    assert ensure_format(storage, run="a", created=NOW, ignore=["thesis.tex"]).run == "a"


def test_leftovers_of_a_killed_probe_are_no_reason_to_refuse(tmp_path: Path) -> None:
    (tmp_path / "probe-0123").mkdir()
    (tmp_path / ".DS_Store").write_text("x")
    assert ensure_format(PosixStorage(tmp_path), run="a", created=NOW).run == "a"


def test_another_runs_directory_is_refused() -> None:
    storage = MemoryStorage(Disk())
    ensure_format(storage, run="a", created=NOW)
    with pytest.raises(InvalidError, match="belongs to run 'a'"):
        ensure_format(storage, run="b", created=NOW)


def test_a_newer_version_says_which_release_reads_it() -> None:
    storage = MemoryStorage(Disk())
    storage.create(NAME, json.dumps({"format": "resilience", "version": 4, "reader": "3.0"}).encode())
    for call in (lambda: read_format(storage), lambda: ensure_format(storage, run="a", created=NOW)):
        with pytest.raises(InvalidError, match=r"format 4.*resilience 3\.0 or newer"):
            call()


@pytest.mark.parametrize(
    "text",
    ["garbage", "[]", "{}", '{"format":"zip","version":1}', '{"format":"resilience","version":"1"}',
     '{"format":"resilience","version":1,"run":7,"created":""}', '{"format":"resilience","version":0}'],
)  # fmt: skip
def test_a_format_that_is_not_ours_is_refused(text: str) -> None:
    storage = MemoryStorage(Disk())
    storage.create(NAME, text.encode())
    with pytest.raises(InvalidError, match="not written by this package"):
        read_format(storage)
