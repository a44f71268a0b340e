"""What must hold 7: after any end nothing of ours is left; and 6: roots that cannot hold a run are refused."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray

from chaos import leaks
from chaos.faults import kill
from resilience.errors import ExhaustedError, InvalidError, TrainingError

pytestmark = pytest.mark.ray


def ours() -> Iterator[psutil.Process]:
    """Processes that this session started, and orphans: nobody else's tests, which may run on the same machine."""
    me = psutil.Process()
    orphans = [p for p in psutil.process_iter(["ppid", "cmdline"]) if p.info["ppid"] == 1 and p.pid != me.pid]
    yield from (me, *me.children(recursive=True), *orphans)


def memfds() -> set[tuple[int, str]]:
    """(pid, name) of every descriptor of shared memory of ours."""
    found = set()
    for process in ours():
        try:
            for descriptor in os.scandir(f"/proc/{process.pid}/fd"):
                target = os.readlink(descriptor.path)
                if target.startswith("/memfd:resilience-"):
                    found.add((process.pid, target))
        except OSError:
            continue  # it ended while we looked
    return found


def sockets() -> set[str]:
    """Unix sockets with a name, in a file or abstract, that a process of ours holds, and that are not Ray's own."""
    held = set()
    for process in ours():
        with contextlib.suppress(OSError):
            held |= {os.readlink(descriptor.path) for descriptor in os.scandir(f"/proc/{process.pid}/fd")}
    lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    named = {fields[7]: f"socket:[{fields[6]}]" for fields in lines if len(fields) > 7}
    return {name for name, inode in named.items() if inode in held and "/ray/" not in name}


def workers() -> set[str]:
    """Ray's processes that are ours: they carry the class of the actor they are."""
    found = set()
    for process in ours():
        try:
            title = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if "ray::NodeAgent" in title or "ray::Supervisor" in title:
            found.add(f"{process.pid} {title}")
    return found


def actors() -> list[dict]:
    return [a for a in ray.util.list_named_actors(all_namespaces=True) if a["namespace"] == "resilience"]


def files() -> set[str]:
    """What lies in shared memory, less Ray's object stores, and what bears our name in the temporary directory."""
    shared = {
        str(path) for path in Path("/dev/shm").iterdir() if not path.name.startswith(("plasma", "sem."))
    }
    return shared | {str(path) for path in Path(tempfile.gettempdir()).glob("resilience*")}


def test_nothing_is_left_after_any_end(cluster, driven, jobs, chaos, drive, until):
    """Five ends, and one look at a run that is going, which proves that the looks see something."""
    before_files, before_sockets = files(), sockets()

    # While a run is going: everything that may leak is there, and none of it has a name in a file system.
    good = f"good-{os.getpid()}"  # several sessions may run on one machine
    arguments = {"control": str(drive.directory), "steps": 12}
    launch = drive.launch(lambda: chaos.options(driven, name=good).launch(view="none", **arguments))
    drive.allow(7)
    drive.wait_at(7)
    assert len(leaks.processes_of(good)) >= 4
    assert {name for _pid, name in memfds()} >= {
        "/memfd:resilience-page (deleted)",
        "/memfd:resilience-arena (deleted)",
    }
    until(workers, why="the actors' processes")
    assert [actor["name"] for actor in actors()] == [f"resilience:{good}"]
    assert files() - before_files == set(), "shared memory is memfds, sockets are pairs: no file is made"
    assert sockets() - before_sockets == set()
    drive.allow(12)
    assert launch.result().finished
    assert_clean(good, before_files, before_sockets, until)

    ends = {
        "error": (jobs.fails_at, [], {"step": 3}, {}, TrainingError),
        "budget": (jobs.endless, [kill(0, step=5)], {}, {"max_restarts": 0}, ExhaustedError),
        "capacity": (jobs.endless, [], {}, {"workers": 40, "capacity_deadline": 1.0}, ExhaustedError),
        "unsavable": (jobs.unsavable, [], {}, {}, TrainingError),
    }
    for name, (job, faults, given, options, error) in ends.items():
        with pytest.raises(error):
            chaos.options(job, faults, name=f"{name}-{os.getpid()}", **options).launch(view="none", **given)
        assert_clean(f"{name}-{os.getpid()}", before_files, before_sockets, until)


def test_nothing_is_left_of_a_run_on_an_object_store(cluster, jobs, chaos, aws, bucket, until):
    """There the ranks' output waits in a temporary directory until it is shipped."""
    before_files, before_sockets = files(), sockets()
    options = {"storage": f"s3://{bucket}/runs", "nvme": None, "env": aws}
    result = chaos.run(
        jobs.sgd,
        [kill(1, step=6)],
        arguments={"steps": 12, "amount": 100},
        **options,
    )
    assert result.finished
    assert_clean(result.run, before_files, before_sockets, until)


def assert_clean(run: str, before_files: set[str], before_sockets: set[str], until) -> None:
    assert leaks.wait_until_gone(run) == []
    # Ray ends the process of a killed actor in its own time.
    until(lambda: not workers(), why=f"the end of {workers()}")
    assert memfds() == set()
    assert actors() == []
    until(lambda: not files() - before_files, why=f"the end of {files() - before_files}")
    until(lambda: not sockets() - before_sockets, why=f"the end of {sockets() - before_sockets}")


@pytest.mark.parametrize(
    ("storage", "reason"),
    [
        ("ftp://127.0.0.1:1/runs", "no atomic create"),
        ("github://owner:repository@/runs", "no atomic create"),
        ("memory://runs", "memory of this process"),
    ],
)
def test_a_root_that_cannot_arbitrate_is_refused_before_anything_starts(jobs, storage, reason):
    with pytest.raises(InvalidError, match=reason) as caught:
        jobs.endless.options(storage=storage).launch(view="none")
    assert "POSIX file system" in str(caught.value) or "s3://" in str(caught.value), (
        "the hint names roots that can"
    )


def test_a_read_only_root_is_refused_before_anything_starts(jobs, tmp_path, mounts):
    root = mounts.tmpfs(tmp_path / "root", "1m")
    mounts.read_only(root)
    with pytest.raises(InvalidError, match="EROFS"):
        jobs.endless.options(storage=str(root)).launch(view="none")
    mounts.release(root)


def test_a_near_tier_that_is_not_local_is_refused(jobs, tmp_path):
    with pytest.raises(InvalidError, match="no local directory"):
        jobs.endless.options(storage=str(tmp_path / "s"), nvme="s3://bucket/near").launch(view="none")
    assert not (tmp_path / "s").exists()
