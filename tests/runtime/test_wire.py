"""Messages between processes of one node."""

import os
import socket
import struct

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


def test_take_never_waits_for_the_rest_of_a_message():
    raw, other = socket.socketpair()
    channel = Channel(other)
    assert channel.take() == []
    whole = struct.pack("<IB", 9, 0) + b'{"n":"1"}'
    raw.sendall(whole + whole + whole[:7])
    assert channel.take() == [({"n": "1"}, []), ({"n": "1"}, [])]
    assert channel.take() == []
    raw.sendall(whole[7:])
    raw.close()
    assert channel.take() == [({"n": "1"}, [])]  # what was said before the end is heard
    with pytest.raises(Closed):
        channel.take()
    channel.close()


def test_taken_descriptors_stay_with_their_own_message_and_none_is_left_open():
    before = set(os.listdir("/proc/self/fd"))
    a, b = Channel.pair()
    fds = [os.memfd_create(str(i)) for i in range(3)]
    a.send({"n": 0})
    a.send({"n": 1}, fds[:1])
    a.send({"n": 2})
    a.send({"n": 3}, fds[1:])
    got = []
    while len(got) < 4:
        got += b.take()
    assert [(m["n"], len(some)) for m, some in got] == [(0, 0), (1, 1), (2, 0), (3, 2)]
    assert [os.fstat(f).st_ino for _, some in got for f in some] == [os.fstat(f).st_ino for f in fds]
    for fd in [*fds[1:], *(f for _, some in got for f in some)]:
        os.close(fd)
    # Half a message with a descriptor, of a sender that died: closed with the channel.
    socket.send_fds(a._sock, [struct.pack("<IB", 100, 1)], fds[:1])
    os.close(fds[0])
    a.close()
    with pytest.raises(Closed):
        b.take()
    b.close()
    assert set(os.listdir("/proc/self/fd")) == before


def test_post_never_waits_and_flush_sends_the_rest_in_order():
    before = set(os.listdir("/proc/self/fd"))
    a, b = Channel.pair()
    fd = os.memfd_create("posted")
    text = "x" * (3 << 20)
    a.post({"n": 0, "text": text})  # nobody reads yet: much larger than any socket buffer
    a.post({"n": 1}, [fd])
    os.close(fd)  # its own copy is kept until it is sent
    assert a.pending
    got = []
    while len(got) < 2:
        a.flush()
        got += b.take()
    assert not a.pending
    assert (got[0][0]["text"], got[1][0], len(got[1][1])) == (text, {"n": 1}, 1)
    os.close(got[1][1][0])
    # Posted to one that goes away: dropped, and no descriptor is kept.
    other = os.memfd_create("dropped")
    a.post({"text": text})
    a.post({"n": 2}, [other])
    os.close(other)
    b.close()
    a.flush()
    assert not a.pending
    a.close()
    assert set(os.listdir("/proc/self/fd")) == before


def test_take_returns_nothing_only_when_there_is_nothing_more_to_read():
    """A reader that stops at "nothing" must not leave behind what came after a long message."""
    a, b = Channel.pair()
    fd = os.memfd_create("x")
    a._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
    a.send({"text": "x" * 300_000})
    a.send({"n": 1}, [fd])
    a.send({"n": 2})
    a.close()
    os.close(fd)
    got = []
    for _ in range(3):
        got += b.take()
        if len(got) == 3:
            break
    with pytest.raises(Closed):
        b.take()
    assert [m.get("n") for m, _ in got] == [None, 1, 2]
    os.close(got[1][1][0])
    b.close()
