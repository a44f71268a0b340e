"""Messages between the processes of one node: JSON with file descriptors, over a unix socket pair.

Every socket is one end of a pair whose other end is inherited or passed along, so there is never a socket
file to leave behind, and the end of either process closes it. Never used between machines: that is Ray's.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

_HEADER = struct.Struct("<IB")  # length of the JSON text, number of descriptors
_MAX_FDS = 8
_TAKE = 256 << 10


class Closed(Exception):
    """The other end is gone."""


class Channel:
    """One end of a socket pair; one reader and one writer at a time each.

    ``send`` and ``receive`` wait for the other end. ``post`` and ``take`` never do: they are for a process that
    has more to look after than one peer, which may be stopped in the middle of a message. Use one pair of them.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._in = bytearray()  # read by ``take``, not a whole message yet
        self._in_fds: deque[int] = deque()
        self._out: deque[tuple[memoryview, list[int]]] = deque()  # posted, not sent yet

    @classmethod
    def pair(cls) -> tuple[Channel, Channel]:
        a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        return cls(a), cls(b)

    @classmethod
    def from_fd(cls, fd: int) -> Channel:
        return cls(socket.socket(fileno=fd))

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        """Send one message. Raises ``Closed`` when the other end is gone."""
        body = json.dumps(message, separators=(",", ":")).encode()
        data = _HEADER.pack(len(body), len(fds)) + body
        try:
            sent = self._sock.sendmsg([data], _rights(fds))
            if sent < len(data):
                self._sock.sendall(memoryview(data)[sent:])
        except (BrokenPipeError, ConnectionResetError) as error:
            raise Closed from error

    def receive(self) -> tuple[dict[str, Any], list[int]]:
        """Wait for one message and its descriptors (close-on-exec). Raises ``Closed``."""
        try:
            header, fds = self._receive_header()
            length, count = _HEADER.unpack(header)
            body = self._exactly(length)
        except ConnectionResetError as error:
            raise Closed from error
        if len(fds) != count:
            raise Closed  # the sender died between descriptor and body, or descriptors ran out
        return json.loads(body), fds

    def _receive_header(self) -> tuple[bytes, list[int]]:
        header = b""
        fds: list[int] = []
        while len(header) < _HEADER.size:
            data, new = self._read(_HEADER.size - len(header), 0)
            if not data:
                raise Closed
            header += data
            fds += new
        return header, fds

    def _read(self, size: int, flags: int) -> tuple[bytes, list[int]]:
        """Bytes, and descriptors that came with them. ``socket.recv_fds`` would ignore the flags."""
        space = socket.CMSG_SPACE(_MAX_FDS * array("i").itemsize)
        data, ancillary, _flags, _address = self._sock.recvmsg(size, space, flags | socket.MSG_CMSG_CLOEXEC)
        fds = array("i")
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
        return data, list(fds)

    def _exactly(self, length: int) -> bytes:
        chunks = []
        while length:
            data = self._sock.recv(min(length, 1 << 20))
            if not data:
                raise Closed
            chunks.append(data)
            length -= len(data)
        return b"".join(chunks)

    def take(self) -> list[tuple[dict[str, Any], list[int]]]:
        """Messages that are here whole, without waiting for more; none means that there is nothing more to read
        now. Raises ``Closed`` when the other end is gone and everything it said has been taken."""
        found: list[tuple[dict[str, Any], list[int]]] = []
        while not found:
            try:
                # Descriptors come with the first byte of their message at the latest, and in order.
                data, fds = self._read(_TAKE, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except ConnectionResetError as error:
                raise Closed from error
            if not data:
                raise Closed
            self._in += data
            self._in_fds.extend(fds)
            found = self._whole()
        return found

    def _whole(self) -> list[tuple[dict[str, Any], list[int]]]:
        """Take the whole messages out of what was read."""
        found = []
        while len(self._in) >= _HEADER.size:
            length, count = _HEADER.unpack_from(self._in)
            end = _HEADER.size + length
            if len(self._in) < end:
                break
            if len(self._in_fds) < count:
                raise Closed  # descriptors ran out
            body = bytes(self._in[_HEADER.size : end])
            del self._in[:end]
            found.append((json.loads(body), [self._in_fds.popleft() for _ in range(count)]))
        return found

    def post(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        """Send as much as fits now; ``flush`` sends the rest when the socket is writable. What is posted to an
        end that is gone is dropped: ``take`` tells."""
        body = json.dumps(message, separators=(",", ":")).encode()
        data = memoryview(_HEADER.pack(len(body), len(fds)) + body)
        self._out.append((data, [os.dup(fd) for fd in fds]))
        self.flush()

    @property
    def pending(self) -> bool:
        """Something posted is still to be sent."""
        return bool(self._out)

    def flush(self) -> None:
        """Send what is posted, as far as that needs no waiting."""
        while self._out:
            data, fds = self._out[0]
            try:
                sent = self._sock.sendmsg([data], _rights(fds), socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except (BrokenPipeError, ConnectionResetError):
                self._drop()
                return
            _close_all(fds)
            if sent < len(data):
                self._out[0] = (data[sent:], [])
            else:
                self._out.popleft()

    def _drop(self) -> None:
        for _data, fds in self._out:
            _close_all(fds)
        self._out.clear()

    def close(self) -> None:
        self._drop()
        _close_all(self._in_fds)
        self._in_fds.clear()
        self._sock.close()


def _rights(fds: Sequence[int]) -> list[tuple[int, int, array[int]]]:
    """Descriptors as ancillary data; ``socket.send_fds`` would ignore the flags."""
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []


def _close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)
