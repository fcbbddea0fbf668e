"""An HTTP client that sends exactly the bytes of a test, and the service's requests to send."""

from __future__ import annotations

import http.client
import json
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
WAIT = 60.0  # seconds; nothing here takes a tenth of it, so it is only for what hangs


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
        """What holds for every answer of the service, whatever was asked."""
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
    """One connection. Nothing is sent but what the test sends, and every wait is bounded."""

    def __init__(self, port: int, host: str = "127.0.0.1", buffer: int = 0) -> None:
        self.sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        self.sock.settimeout(WAIT)
        if buffer:  # of few bytes, as from afar: on loopback the kernel would take all at once
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

    def response(self, method: str = "GET") -> Response:
        """The next answer, checked. Interim ones (100) are skipped."""
        status = 100
        while status < 200:
            line = self._file.readline()
            assert line.startswith(b"HTTP/1."), line
            status = int(line.split()[1])
            headers = http.client.parse_headers(self._file)
        length = 0 if method == "HEAD" else int(headers["Content-Length"])
        body = self._file.read(length)
        assert len(body) == length
        return Response(status, headers, body).check()

    def trickle(self, part: bytes, seconds: float = WAIT) -> Client:
        """Send `part` every 0.1 s until something comes, be it the connection's end."""
        self.sock.settimeout(0.1)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with suppress(BrokenPipeError, ConnectionResetError):
                self.sock.sendall(part)
            try:
                self.sock.recv(1, socket.MSG_PEEK)
                break
            except TimeoutError:
                continue
            except ConnectionResetError:  # closed while a byte was on its way
                break
        self.sock.settimeout(WAIT)
        return self

    def is_continued(self) -> bool:
        """Whether the server says 100 to `Expect: 100-continue`: it has read the head, no more."""
        return self._file.readline().split()[1] == b"100" and self._file.readline() == b"\r\n"

    def rest(self) -> bytes:
        """Everything until the server ends the connection, interim responses included."""
        return self._file.read()

    def is_closed(self, seconds: float = WAIT) -> bool:
        """Whether the server ends the connection within the time, with nothing more to read."""
        self.sock.settimeout(seconds)
        try:
            return self._file.read(1) == b""
        except ConnectionResetError:
            return True
        except TimeoutError:
            return False


def request_head(method: str, path: str, *headers: str) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", *headers, "", ""]
    return "\r\n".join(lines).encode("latin-1")


def post_head(*headers: str, path: str = "/process") -> bytes:
    return request_head("POST", path, "Content-Type: application/json", *headers)


def post(body: bytes = BODY, *headers: str, path: str = "/process") -> bytes:
    return post_head(f"Content-Length: {len(body)}", *headers, path=path) + body


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)
