"""What ranks print: kept where storage takes it, never a reason for training to end."""

from __future__ import annotations

import io
import os
import resource
import signal

import pytest

from resilience.runtime.output import Stream


@pytest.fixture
def small_files():
    """No file of this process may grow beyond 4 KiB: EFBIG, as a full disk's ENOSPC."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, ignored)


def test_a_disk_that_takes_no_more_output_does_not_raise_and_the_loss_is_told_in_its_place(
    tmp_path, small_files
):
    """A training function that prints died of ENOSPC when shared storage, where its output goes, was full."""
    path = tmp_path / "rank-0.log"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    out = io.TextIOWrapper(Stream(fd), write_through=True)
    print("begin", file=out)
    for _ in range(50):
        print("x" * 199, file=out)
    assert path.stat().st_size == 4096
    os.truncate(path, 6)  # there is room again
    print("end", file=out)
    begin, note, end = path.read_text().splitlines()
    assert (begin, end) == ("begin", "end")
    assert note == f"[resilience: {6 + 50 * 200 - 4096} bytes of output were lost here: File too large]"
    os.close(fd)
