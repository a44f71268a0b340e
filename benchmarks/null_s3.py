"""A server that speaks as much S3 as moving one object takes, and keeps nothing.

Bodies are read and dropped; a download is sent from memory. It measures clients, and must never be taken for a
store: it checks no signature, and what comes back is not what was sent.

    python -m benchmarks.null_s3 PORT SIZE
"""

from __future__ import annotations

import re
import socket
import sys
import threading

_BLOCK = bytes(range(256)) * (4 << 12)  # 16 MiB
_OBJECT = 'ETag: "0"\r\nLast-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\n'
_BEGUN = b"<InitiateMultipartUploadResult><UploadId>1</UploadId></InitiateMultipartUploadResult>"
_COMPLETED = b'<CompleteMultipartUploadResult><ETag>"0"</ETag></CompleteMultipartUploadResult>'
_EMPTY = b"<ListBucketResult></ListBucketResult>"


def serve(connection: socket.socket, size: int) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    buffer = memoryview(bytearray(1 << 20))
    rest = b""
    with connection:
        while True:
            while b"\r\n\r\n" not in rest:
                data = connection.recv(1 << 16)
                if not data:
                    return
                rest += data
            head, _, rest = rest.partition(b"\r\n\r\n")
            request, *lines = head.decode().split("\r\n")
            method, path, _ = request.split(" ")
            headers = {
                name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
            }
            if headers.get("expect"):
                connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            left = int(headers.get("content-length") or 0) - len(rest)
            rest = b""
            while left > 0:
                count = connection.recv_into(buffer, min(left, len(buffer)))
                if not count:
                    return
                left -= count
            _answer(connection, method, path, headers, size)


def _answer(connection: socket.socket, method: str, path: str, headers: dict[str, str], size: int) -> None:
    if method == "GET" and "?" in path:
        _send(connection, "200 OK", "Content-Type: application/xml\r\n", _EMPTY)
    elif method in ("GET", "HEAD"):
        asked = re.match(r"bytes=(\d+)-(\d*)", headers.get("range", ""))
        start, end = (int(asked[1]), int(asked[2] or size - 1) + 1) if asked else (0, size)
        end = min(end, size)
        status, place = (
            ("206 Partial Content", f"Content-Range: bytes {start}-{end - 1}/{size}\r\n")
            if asked
            else ("200 OK", "")
        )
        connection.sendall(
            f"HTTP/1.1 {status}\r\n{_OBJECT}{place}Content-Length: {end - start}\r\n\r\n".encode()
        )
        if method == "GET":
            for at in range(start, end, len(_BLOCK)):
                connection.sendall(memoryview(_BLOCK)[: end - at])
    elif method == "POST":
        body = _COMPLETED if "uploadId" in path else _BEGUN
        _send(connection, "200 OK", "Content-Type: application/xml\r\n", body)
    elif method == "PUT":
        _send(connection, "200 OK", _OBJECT)
    else:
        _send(connection, "204 No Content", "")


def _send(connection: socket.socket, status: str, headers: str, body: bytes = b"") -> None:
    connection.sendall(f"HTTP/1.1 {status}\r\n{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body)


def main() -> None:
    port, size = int(sys.argv[1]), int(sys.argv[2])
    with socket.create_server(("127.0.0.1", port)) as server:
        while True:
            connection, _ = server.accept()
            threading.Thread(target=_quietly, args=(connection, size), daemon=True).start()


def _quietly(connection: socket.socket, size: int) -> None:
    try:
        serve(connection, size)
    except ConnectionError:
        return  # clients come and go


if __name__ == "__main__":
    main()
