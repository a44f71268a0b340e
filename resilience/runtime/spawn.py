"""Starting a node's own processes (zygote, writer) by exec, with a channel to each and a place for its output.

Leaves no descriptor behind when that fails. Never decides what to start again: that is the node's.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from typing import Any, BinaryIO

from resilience.runtime.output import Outputs
from resilience.runtime.system import python_command
from resilience.runtime.wire import Channel


def spawn(module: str, config: dict[str, Any], log: BinaryIO) -> tuple[subprocess.Popen[bytes], Channel]:
    """Run ``module`` in a new interpreter; returns it and our end of its channel."""
    ours, theirs = Channel.pair()
    end = str(theirs.fileno())
    try:
        process = subprocess.Popen(
            # The run and the node are for people (and leak checks) reading the process list.
            python_command(module, end, str(os.getpid()), config["run"], config["name"]),
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **config["env"]},
            start_new_session=True,
        )
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    return process, ours


def open_output(outputs: Outputs, name: str, warn: Callable[[str], None]) -> tuple[str, BinaryIO]:
    """Path of a file for somebody's output, and the file; a disk that takes none keeps nobody from training."""
    try:
        return outputs.open(name)
    except OSError as error:
        warn(f"the output of {name} is not kept: {error}")
        return "", open(os.devnull, "ab")


def await_exit(process: subprocess.Popen[bytes], timeout: float = 1.0) -> bool:
    """Whether the process ends by itself within ``timeout`` seconds."""
    try:
        process.wait(timeout)
    except subprocess.TimeoutExpired:
        return False
    return True
