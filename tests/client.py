"""An HTTP client that sends exactly the bytes that a test gives it, and builders of requests."""

from __future__ import annotations

import http.client
import json
import select
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from fake_aws import TOKEN

import app

DATA = {
    "email_subject": "Happy new year!",
    "email_sender": "John doe",
    "email_timestream": "1693561101",
    "email_content": "Just want to say... Happy new year!!!",
}
BODY = json.dumps({"data": DATA, "token": TOKEN}).encode()
WAIT = 60.0  # seconds, ten times what any step takes: a bound for defects that hang


@dataclass
class Response:
    status: int
    headers: http.client.HTTPMessage | dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        return str(self.json["error"])

    def check(self) -> Response:
        """Assert the properties of every response of the service, whatever the request."""
        assert app.request_id_of(self.headers["X-Request-Id"] or "") == self.headers["X-Request-Id"]
        assert self.status != 500, self.body
        if self.status >= 400 and self.body:
            assert self.headers["Content-Type"] == "application/json"
            assert self.json["status"] == "error"
            assert app.ERRORS[self.error][0] == self.status
            assert self.json["message"]
            assert self.json["request_id"] == self.headers["X-Request-Id"]
            for problem in self.json.get("errors", []):
                assert self.error in ("invalid_data", "invalid_timestamp")
                assert problem["field"] in DATA
                assert problem["message"] in self.json["message"]
        return self


class Client:
    """One connection. It sends only what the test sends, and every wait is bounded."""

    def __init__(self, port: int, host: str = "127.0.0.1", buffer: int = 0) -> None:
        """A small `buffer` (bytes) imitates a remote client: on loopback, the kernel would accept
        everything at once.
        """
        self.sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        self.sock.settimeout(WAIT)
        if buffer:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1400)
        try:
            self.sock.connect((host, port))
        except OSError:
            self.sock.close()
            raise
        self._file = self.sock.makefile("rb")

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self.sock.close()

    def send(self, *parts: bytes) -> Client:
        self.sock.sendall(b"".join(parts))
        return self

    def response(self) -> Response:
        """Read and check the next response, interim ones (100) skipped."""
        status = 100
        while status < 200:
            line = self._file.readline()
            assert line.startswith(b"HTTP/1."), line
            status = int(line.split()[1])
            headers = http.client.parse_headers(self._file)
        length = int(headers["Content-Length"])
        body = self._file.read(length)
        assert len(body) == length
        return Response(status, headers, body).check()

    def trickle(self, part: bytes) -> Client:
        """Send `part` every 0.1 s until a response begins, or the connection ends."""
        end = time.monotonic() + WAIT
        with suppress(BrokenPipeError, ConnectionResetError):
            while not select.select([self.sock], [], [], 0.1)[0] and time.monotonic() < end:
                self.sock.sendall(part)
        return self

    def is_continued(self) -> bool:
        """Whether "100 Continue" comes next: the service has read the head, and waits."""
        return self._file.readline().split()[1] == b"100" and self._file.readline() == b"\r\n"

    def read_to_end(self) -> bytes:
        """Everything until the service ends the connection, interim responses included."""
        return self._file.read()

    def is_closed(self) -> bool:
        """Wait for the end of the connection, or for something to read."""
        try:
            return self._file.read(1) == b""
        except ConnectionResetError:
            return True


def request_head(method: str, path: str, *headers: str) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", *headers, "", ""]
    return "\r\n".join(lines).encode("latin-1")


def post_head(*headers: str, path: str = "/process") -> bytes:
    """The head of a POST without a framing header: the caller adds Content-Length or chunked."""
    return request_head("POST", path, "Content-Type: application/json", *headers)


def post(body: bytes = BODY, *headers: str, path: str = "/process") -> bytes:
    return post_head(f"Content-Length: {len(body)}", *headers, path=path) + body


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)
