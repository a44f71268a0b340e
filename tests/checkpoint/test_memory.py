"""The smallest limit around a process counts, whichever kernel interface tells of it."""

from __future__ import annotations

from pathlib import Path

from resilience.checkpoint.memory import available

GIB = 1 << 30


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def machine(root: Path, membership: str, free_kb: int = 8 * GIB // 1024) -> tuple[Path, Path]:
    write(root / "proc/meminfo", f"MemTotal: 1 kB\nMemAvailable: {free_kb} kB\n")
    write(root / "proc/self/cgroup", membership)
    return root / "proc", root / "cg"


def test_v2_the_tightest_parent_counts_and_page_cache_is_free(tmp_path: Path) -> None:
    proc, cg = machine(tmp_path, "0::/a/b\n")
    for name, limit, used in (("a/b", "max", 5 * GIB), ("a", str(6 * GIB), 5 * GIB)):
        write(cg / name / "memory.max", limit + "\n")
        write(cg / name / "memory.current", str(used))
        write(cg / name / "memory.stat", f"anon 1\ninactive_file {GIB}\n")
    found = available(proc, cg)
    assert found.bytes == 2 * GIB
    assert str(cg / "a/memory.max") in found.limit


def test_v1_in_a_container_whose_path_is_not_mounted(tmp_path: Path) -> None:
    """Docker shows the host's path but mounts only the container's own group, as the root."""
    proc, cg = machine(tmp_path, "5:devices:/x\n4:cpu,memory:/docker/abc\n0::/\n")
    write(cg / "memory/memory.limit_in_bytes", str(2 * GIB))
    write(cg / "memory/memory.usage_in_bytes", str(2 * GIB + 5))
    write(cg / "memory/memory.stat", f"inactive_file 7\ntotal_inactive_file {GIB}\n")
    assert available(proc, cg).bytes == GIB - 5


def test_without_cgroups_the_machine_counts(tmp_path: Path) -> None:
    proc, cg = machine(tmp_path, "", free_kb=123)
    assert available(proc, cg).bytes == 123 * 1024
    (proc / "self/cgroup").unlink()
    assert available(proc, cg).limit.startswith("MemAvailable")


def test_here() -> None:
    assert available().bytes > 0
