"""Messages between processes of one node."""

import os
import socket

import pytest

from resilience.runtime.wire import Channel, Closed


def test_a_message_arrives_with_its_descriptors_close_on_exec():
    a, b = Channel.pair()
    fd = os.memfd_create("wire-test")
    os.write(fd, b"through the socket")
    a.send({"t": "arena", "n": 1}, [fd])
    os.close(fd)
    message, fds = b.receive()
    assert message == {"t": "arena", "n": 1}
    assert os.pread(fds[0], 100, 0) == b"through the socket"
    assert not os.get_inheritable(fds[0])
    os.close(fds[0])
    a.close()
    b.close()


def test_descriptors_stay_with_their_own_message():
    a, b = Channel.pair()
    fds = [os.memfd_create(str(i)) for i in range(3)]
    a.send({"n": 0})
    a.send({"n": 1}, fds[:1])
    a.send({"n": 2})
    a.send({"n": 3}, fds[1:])
    got = [b.receive() for _ in range(4)]
    assert [(m["n"], len(f)) for m, f in got] == [(0, 0), (1, 1), (2, 0), (3, 2)]
    for fd in [*fds, *(f for _, some in got for f in some)]:
        os.close(fd)
    a.close()
    b.close()


def test_a_message_larger_than_the_socket_buffer_arrives_whole():
    import threading

    a, b = Channel.pair()
    text = "x" * (3 << 20)
    sender = threading.Thread(target=a.send, args=({"text": text},))
    sender.start()
    message, _ = b.receive()
    sender.join(10)
    assert message["text"] == text
    a.close()
    b.close()


def test_the_end_of_the_other_side_is_an_error_on_both_calls():
    a, b = Channel.pair()
    b.close()
    with pytest.raises(Closed):
        a.receive()
    with pytest.raises(Closed):
        a.send({"t": "hello"})
    a.close()


def test_a_sender_that_dies_in_the_middle_of_a_message_is_closed_not_garbage():
    raw, other = socket.socketpair()
    channel = Channel(other)
    raw.sendall(b"\xff\x00\x00\x00\x00half a mess")
    raw.close()
    with pytest.raises(Closed):
        channel.receive()
    channel.close()
