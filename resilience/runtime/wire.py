"""Messages between the processes of one node: JSON with file descriptors, over a unix socket pair.

Every socket is one end of a pair whose other end is inherited or passed along, so there is never a socket
file to leave behind, and the end of either process closes it. Never used between machines: that is Ray's.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Sequence
from typing import Any

_HEADER = struct.Struct("<IB")  # length of the JSON text, number of descriptors
_MAX_FDS = 8


class Closed(Exception):
    """The other end is gone."""


class Channel:
    """One end of a socket pair. Blocking; one reader and one writer at a time each."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

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
            sent = socket.send_fds(self._sock, [data], list(fds)) if fds else self._sock.send(data)
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
            data, new, _flags, _address = socket.recv_fds(
                self._sock, _HEADER.size - len(header), _MAX_FDS, socket.MSG_CMSG_CLOEXEC
            )
            if not data:
                raise Closed
            header += data
            fds += new
        for fd in fds:
            os.set_inheritable(fd, False)
        return header, fds

    def _exactly(self, length: int) -> bytes:
        chunks = []
        while length:
            data = self._sock.recv(min(length, 1 << 20))
            if not data:
                raise Closed
            chunks.append(data)
            length -= len(data)
        return b"".join(chunks)

    def close(self) -> None:
        self._sock.close()
