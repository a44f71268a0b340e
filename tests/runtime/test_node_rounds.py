"""One round of the node's selector: what is handled first may close what is ready too."""

from __future__ import annotations

import os
import selectors
import socket

import pytest

from resilience.runtime.node import NodeProcesses
from resilience.runtime.output import Outputs
from storage_backends import open_storage


@pytest.mark.parametrize("reused", [False, True], ids=["closed", "its number is another descriptor's by now"])
def test_a_descriptor_closed_by_what_was_handled_before_it_is_left_alone(tmp_path, reused):
    """The zygote's word that a rank is gone closes the rank's channel, which was ready in the same round: two ranks
    that died close together made the agent fail with a bad file descriptor, and its node was lost."""
    config = {"name": "n", "run": "r", "entry": {}, "env": {}, "nvme": None, "shared": str(tmp_path)}
    node = NodeProcesses(config, Outputs(open_storage(str(tmp_path)), None), lambda _: None)
    pairs = [socket.socketpair() for _ in range(2)]
    handled = []

    def on_probe(index: int) -> None:
        handled.append(index)
        other = pairs[1 - index][0]
        node._selector.unregister(other)
        number = other.fileno()
        other.close()
        if reused:
            assert os.dup2(pairs[index][1].fileno(), number) == number
            node._selector.register(number, selectors.EVENT_READ, ("new", None))
        node._closing = True

    node._on_probe = on_probe
    node._on_new = lambda _: handled.append("a stranger's")
    for index, (ours, theirs) in enumerate(pairs):
        node._selector.register(ours, selectors.EVENT_READ, ("probe", index))
        theirs.send(b"x")  # both are ready in the first round
    node._serve()
    assert len(handled) == 1
    assert isinstance(handled[0], int)
    for key in list(node._selector.get_map().values()):
        if key.data[0] == "new":
            os.close(key.fd)
    node._selector.close()
    for ours, theirs in pairs:
        ours.close()
        theirs.close()
    os.close(node._wake)
