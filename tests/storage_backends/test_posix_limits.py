"""The POSIX backend where the file system is poor, full, read-only, or in the way."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from resilience.errors import InvalidError, UnavailableError
from storage_backends import files
from storage_backends.posix import PosixStorage

Start = Callable[..., subprocess.Popen[str]]


def temporaries(root: Path) -> list[str]:
    return sorted(path.name for path in root.rglob("*") if path.name.endswith("~"))


# --- file systems that cannot do everything -----------------------------------------------------------------


def test_without_hard_links_renameat2_arbitrates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: str, target: str) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    storage = PosixStorage(tmp_path)
    assert storage.create("d/a", b"first") is None
    assert storage.create("d/a", b"second") == b"first"
    assert storage.create("d/a", b"first") is None
    assert storage.list("d") == ["d/a"]
    assert temporaries(tmp_path) == []


def test_with_neither_the_root_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: str, target: str) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    class NoSuchCall:
        renameat2 = None

    monkeypatch.setattr(os, "link", link)
    monkeypatch.setattr(files.ctypes, "CDLL", lambda name, use_errno: NoSuchCall())
    with pytest.raises(InvalidError, match="cannot create a name exclusively"):
        PosixStorage(tmp_path).create("d/a", b"first")


@pytest.mark.parametrize("instead", [os.symlink, shutil.copyfile])
def test_links_that_are_something_else_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, instead: Callable[..., object]
) -> None:
    """BeeGFS with sysCreateHardlinksAsSymlinks; gateways that copy."""
    monkeypatch.setattr(os, "link", instead)
    with pytest.raises(InvalidError, match="something else"):
        PosixStorage(tmp_path).create("d/a", b"first")


def test_a_retransmitted_link_that_reports_our_own_success_is_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS: the first reply is lost, the second says EEXIST."""
    real = os.link

    def link(source: str, target: str) -> None:
        real(source, target)
        raise FileExistsError(errno.EEXIST, "File exists")

    monkeypatch.setattr(os, "link", link)
    storage = PosixStorage(tmp_path)
    assert storage.create("d/a", b"mine") is None
    assert storage.read("d/a") == b"mine"


def test_a_stale_handle_is_transient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = PosixStorage(tmp_path)
    storage.create("a", b"1")

    def stale(*arguments: object, **options: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(os, "stat", stale)
    with pytest.raises(UnavailableError, match="ESTALE"):
        storage.size("a")


# --- places that cannot be written --------------------------------------------------------------------------


def test_a_file_where_a_directory_is_needed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    storage = PosixStorage(tmp_path / "file" / "root")
    for call in (lambda: storage.create("d/a", b"1"), lambda: storage.sink("a")):
        with pytest.raises(InvalidError, match="ENOTDIR") as caught:
            call()
        assert "move it away" in str(caught.value)
    assert storage.list() == []
    with pytest.raises(FileNotFoundError):
        storage.read("d/a")


def test_an_object_where_a_directory_is_needed_and_the_reverse(tmp_path: Path) -> None:
    storage = PosixStorage(tmp_path)
    storage.create("a", b"1")
    storage.create("d/a", b"1")
    with pytest.raises(InvalidError):
        storage.create("a/b", b"1")
    sink = storage.sink("d")
    sink.write(b"1")
    with pytest.raises(InvalidError, match="EISDIR"):
        sink.commit()
    assert temporaries(tmp_path) == []


MOUNTED = """
    import os, subprocess, sys
    root = sys.argv[1]
    for command in ({commands}):
        done = subprocess.run(command.format(root=root), shell=True, capture_output=True, text=True)
        if done.returncode:
            print("cannot mount:", done.stderr)
            sys.exit(77)
    from resilience.errors import *
    from storage_backends.posix import PosixStorage
    storage = PosixStorage(root + "/mnt/run")
"""


def in_a_mount(start: Start, root: Path, commands: list[str], body: str) -> str:
    """Run ``body`` in a mount namespace of its own, so that nothing stays mounted whatever happens."""
    (root / "mnt").mkdir()
    code = MOUNTED.format(commands=", ".join(map(repr, commands)) + ",")
    process = start(code + body, root, prefix=("unshare", "-rm"))
    out, err = process.communicate(timeout=60)
    if process.returncode == 77 or "unshare:" in err:
        pytest.skip(f"NOT TESTED: no mount namespaces here ({out.strip()} {err.strip()})")
    assert process.returncode == 0, err
    return out


def test_full_disk(tmp_path: Path, start: Start) -> None:
    out = in_a_mount(
        start,
        tmp_path,
        ["mount -t tmpfs -o size=4m none {root}/mnt"],
        """
    storage.create("d/small", b"1")
    def sink():
        with storage.sink("d/big") as sink:
            for _ in range(10):
                sink.write(b"x" * 1_000_000)
    for call in (lambda: storage.create("d/big", b"x" * 8_000_000), sink):
        try:
            call()
        except ExhaustedError as error:
            assert "ENOSPC" in str(error) and error.hint and error.path.endswith("d/big"), error
            print("exhausted")
        assert storage.list("d") == ["d/small"], storage.list("d")
        assert len(os.listdir(root + "/mnt/run/d")) == 1, "the temporary file gives its space back"
    storage.create("d/other", b"x" * 3_000_000)   # there is room again
""",
    )
    assert out.split() == ["exhausted", "exhausted"]


def test_read_only_file_system(tmp_path: Path, start: Start) -> None:
    out = in_a_mount(
        start,
        tmp_path,
        [
            "mount -t tmpfs none {root}/mnt",
            "mkdir -p {root}/mnt/run/d && echo hello > {root}/mnt/run/d/old",
            "mount -o remount,ro {root}/mnt",
        ],
        """
    assert storage.read("d/old") == b"hello\\n" and storage.list("d") == ["d/old"]
    for call in (
        lambda: storage.create("d/a", b"1"), lambda: storage.sink("d/a"), lambda: storage.delete("d/old"),
        lambda: storage.create("new/a", b"1"), lambda: storage.delete_all("d"),
    ):
        try:
            call()
        except InvalidError as error:
            assert "EROFS" in str(error) and "read-only" in error.hint, error
            print("refused")
""",
    )
    assert out.split() == ["refused"] * 5


def test_file_size_limit(tmp_path: Path, start: Start) -> None:
    code = """
        import resource, signal, sys
        from resilience.errors import ExhaustedError
        from storage_backends.posix import PosixStorage
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        storage = PosixStorage(sys.argv[1])
        try:
            storage.create("a", b"x" * 200_000)
        except ExhaustedError as error:
            assert "ulimit -f" in error.hint, error
            print("exhausted", storage.list())
    """
    process = start(code, tmp_path)
    out, err = process.communicate(timeout=60)
    assert out == "exhausted []\n", err
    assert temporaries(tmp_path) == []


def test_out_of_descriptors(tmp_path: Path, start: Start) -> None:
    code = """
        import os, resource, sys
        from resilience.errors import ExhaustedError
        from storage_backends.posix import PosixStorage
        storage = PosixStorage(sys.argv[1])
        storage.create("a", b"1")
        resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
        held = []
        try:
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            pass
        try:
            storage.read("a")
        except ExhaustedError as error:
            assert "ulimit -n" in error.hint, error
            print("exhausted")
    """
    out, err = start(code, tmp_path).communicate(timeout=60)
    assert out == "exhausted\n", err


def test_a_forked_child_does_not_take_the_temporary_file_away(tmp_path: Path) -> None:
    storage = PosixStorage(tmp_path)
    sink = storage.sink("a")
    sink.write(b"1")
    child = os.fork()
    if child == 0:
        del sink  # what interpreter exit would do
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    sink.commit()
    assert storage.read("a") == b"1"
