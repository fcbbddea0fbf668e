"""Gunicorn's worker: an event loop receives requests and sends responses; threads handle them.

A slow client or a call of SQS occupies no request thread. A thread gets a request once it is fully
received. If the application's iterable has add_done_callback, the thread is free at once, and the
response is sent after the callback.

A connection has one owner at a time: the event loop, the thread that handles its request, or the
thread that completes its response. Only the event loop touches the socket.
"""

from __future__ import annotations

import os
import re
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from queue import SimpleQueue
from typing import Any

from gunicorn.http import wsgi
from gunicorn.http.errors import LimitRequestHeaders, LimitRequestLine
from gunicorn.http.parser import RequestParser
from gunicorn.workers import base

import app

MAX_HEAD_BYTES = 65_536  # the ALB's limit for all headers together
MAX_CHUNKS = 10_000  # Gunicorn's parser takes about 3 us for each
MAX_CHUNK_LINE_BYTES = 8190  # of Gunicorn's parser
# Limit for the requests of a pod that no thread handles yet; divided by the number of workers. A
# pod has 512 MiB; idle workers take 120.
MAX_RECEIVED_BYTES = 96 * 2**20
STOP_SECONDS = 2.0  # to wait for a client that neither sends nor closes
SWEEP_SECONDS = 0.1  # between two checks of all deadlines

_is_request_line = re.compile(rb"[!-~]+ [!-~]+ HTTP/1\.[0-9]\r\n").match
_is_http_1_0 = re.compile(rb"[^\r\n]*+(?<= HTTP/1\.0)\r\n").match
_framing_headers = re.compile(
    rb"\r\n(content-length|transfer-encoding|expect):([^\r\n]*+)(?=\r\n)", re.I
).findall
_chunk_size = re.compile(rb"([0-9a-fA-F]+)(?:[ \t]*;[^\r\n]*)?\r\n").match


class ReceivedRequest:
    """The received bytes of a request, and of the bytes that the client has sent behind it.

    is_complete decides when a thread can handle the request. Only Gunicorn's parser decides which
    request it is; the parser reads from this object as from a socket.
    """

    def __init__(self, max_body_bytes: int, data: bytes = b"") -> None:
        self.data = bytearray(data)
        self.error: app.ApiError | None = None
        self.expects_continue = self.has_body = False
        self._max_body_bytes = max_body_bytes
        self._body_start = 0  # 0 until the head is complete
        self._body_bytes: int | None = 0  # None for chunks
        self._chunk_start = self._chunks = self._chunk_bytes = 0
        self._read = 0  # by Gunicorn's parser

    def is_head_complete(self) -> bool:
        return self._body_start > 0

    def is_complete(self) -> bool:
        """Whether the request is fully received, or can only be rejected."""
        if not self._body_start:
            end = self.data.find(b"\r\n\r\n")
            if end < 0:
                return self._is_malformed_head()
            self._body_start = self._chunk_start = end + 4
            self._read_framing()
        if self._body_bytes is None:
            return self._has_all_chunks()
        if self._body_bytes > self._max_body_bytes:
            return self._is_too_large()
        return len(self.data) - self._body_start >= self._body_bytes

    def reject(self, error: app.ApiError) -> None:
        """Set the error that the client gets. The body is dropped."""
        self.error = error
        del self.data[self._body_start :]

    def _is_too_large(self, text: str = "") -> bool:
        text = text or f"The request body is larger than {self._max_body_bytes} bytes."
        self.reject(app.ApiError("request_too_large", text))
        return True

    def _is_malformed_head(self) -> bool:
        if len(self.data) > MAX_HEAD_BYTES:
            return self._is_too_large(f"The headers are larger than {MAX_HEAD_BYTES} bytes.")
        return self._has_bare_line_feed(0) or (
            b"\n" in self.data and not _is_request_line(self.data)
        )

    def _has_bare_line_feed(self, start: int) -> bool:
        return self.data.count(b"\n", start) != self.data.count(b"\r\n", start)

    def _read_framing(self) -> None:
        """Find where the body ends. A head that Gunicorn's parser rejects needs no body."""
        lengths, codings, is_valid = list[bytes](), list[bytes](), True
        for name, padded in _framing_headers(self.data, 0, self._body_start):
            value = padded.strip(b" \t")
            if name.lower() == b"content-length":
                lengths.append(value)
            elif name.lower() == b"transfer-encoding":
                codings += [coding.strip() for coding in value.lower().split(b",")]
            else:
                is_valid = is_valid and value.lower() == b"100-continue"
                # HTTP/1.0 has no interim responses.
                self.expects_continue = is_valid and not _is_http_1_0(self.data)
        is_chunked = codings[-1:] == [b"chunked"] and codings.count(b"chunked") == 1
        if is_valid and is_chunked and not lengths:
            self._body_bytes = None
        elif is_valid and len(lengths) == 1 and lengths[0].isdigit() and not codings:
            self._body_bytes = int(lengths[0].lstrip(b"0")[:20] or b"0")
        self.has_body = self._body_bytes != 0

    def _has_all_chunks(self) -> bool:
        data = self.data
        while size_line := _chunk_size(data, self._chunk_start):
            size, start = int(size_line[1], 16), size_line.end()
            if size == 0:
                is_end = data.startswith(b"\r\n", start) or data.find(b"\r\n\r\n", start) >= 0
                # Trailers that are too long are as malformed as those with other line ends.
                is_too_long = len(data) - start > MAX_HEAD_BYTES
                return is_end or is_too_long or self._has_bare_line_feed(start)
            if self._chunk_bytes + size > self._max_body_bytes:
                return self._is_too_large()
            if len(data) < start + size + 2:
                return False
            if not data.startswith(b"\r\n", start + size):
                return True
            self._chunk_start = start + size + 2
            self._chunk_bytes += size
            self._chunks += 1
            if self._chunks > MAX_CHUNKS:
                return self._is_too_large(f"The request body has more than {MAX_CHUNKS} chunks.")
        return data.find(b"\n", self._chunk_start) >= 0 or (
            len(data) - self._chunk_start > MAX_CHUNK_LINE_BYTES
        )

    def recv(self, size: int) -> bytes:
        """Called by Gunicorn's parser, as of a socket."""
        with memoryview(self.data) as data:
            piece = bytes(data[self._read : self._read + size])
        self._read += len(piece)
        return piece

    def take_rest(self) -> bytes:
        """The bytes behind the request; releases the others."""
        rest = bytes(self.data[self._read :])
        self.data = bytearray()
        return rest


class Connection:
    """A client's connection; Gunicorn's Response takes it for its socket."""

    def __init__(
        self, sock: socket.socket, address: Any, server: Any, request: ReceivedRequest
    ) -> None:
        self.sock, self.address, self.server = sock, address, server
        self.request = request
        self.unsent = deque[memoryview]()
        self.step: Callable[[Connection], None] | None = None  # when the client is ready
        self.registered_event = 0  # with the poller
        self.deadline = 0.0  # of the wait for the client, or for a thread
        self.linger_until = 0.0
        self.counted_bytes = 0  # of the request, in Worker.received_bytes
        self.keep_alive = self.is_lingering = False

    def sendall(self, data: bytes) -> None:
        # A view: many slow readers of a page share its bytes.
        self.unsent.append(memoryview(data))

    def send(self, data: bytes) -> int:
        """Gunicorn sends "100 Continue" this way, and nothing else; the event loop has sent it."""
        return len(data)


class Worker(base.Worker):  # type: ignore[misc]
    """The event loop calls all methods up to `handle_requests`; threads call the rest."""

    def init_process(self) -> None:
        # Not in __init__, which runs before the fork.
        self.poller = selectors.DefaultSelector()
        self.waiting: dict[Connection, None] = {}  # for their clients, oldest first
        self.responses = deque[Connection]()  # completed, to be sent
        # Requests without a body have a thread to themselves: /health waits neither behind POSTs
        # nor for AWS.
        self.with_body = SimpleQueue[Connection]()
        self.without_body = SimpleQueue[Connection]()
        self.received_lock = threading.Lock()
        self.received_bytes = 0  # of requests that no thread handles yet
        self.connections = 0
        self.is_awake = True
        self.is_accepting = False
        self.next_sweep = 0.0
        super().init_process()

    def run(self) -> None:
        settings = self.wsgi.settings
        self.max_body_bytes: int = settings.max_request_bytes
        self.body_seconds: float = settings.body_timeout_seconds
        self.keepalive: int = self.cfg.keepalive  # a lookup in cfg takes a microsecond
        self.max_received_bytes = max(
            MAX_RECEIVED_BYTES // self.cfg.workers, self.max_body_bytes + MAX_HEAD_BYTES
        )
        for queue, threads in ((self.with_body, self.cfg.threads), (self.without_body, 1)):
            for _ in range(threads):
                threading.Thread(target=self.handle_requests, args=(queue,), daemon=True).start()
        self.poller.register(self.PIPE[0], selectors.EVENT_READ, self.clear_pipe)
        for listener in self.sockets:
            listener.setblocking(False)
            # A small send buffer keeps the kernel's memory low while clients do not read.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
        self.set_accepting(True)
        while self.alive:
            self.turn()
        stop_at = time.monotonic() + self.cfg.graceful_timeout
        self.stop_accepting()
        while self.connections and time.monotonic() < stop_at:
            self.turn()

    def turn(self) -> None:
        """One turn: receive, accept, send, and enforce deadlines."""
        # In this order: a thread appends its response before it reads is_awake.
        self.is_awake = False
        timeout = 0.0 if self.responses else SWEEP_SECONDS if self.connections else 1.0
        events = self.poller.select(timeout)
        self.is_awake = True
        for key, _ in events:
            if not isinstance(conn := key.data, Connection):
                key.data(key.fileobj)
            elif conn in self.waiting:
                self.guard(conn.step, conn)
            elif conn.registered_event:  # its request is being handled
                self.unregister(conn)
        while self.responses:
            conn = self.responses.popleft()
            conn.deadline = time.monotonic() + 2 * self.body_seconds
            self.guard(self.send, conn)
        if (now := time.monotonic()) >= self.next_sweep:
            self.next_sweep = now + SWEEP_SECONDS
            self.notify()
            if os.getppid() != self.ppid:
                self.alive = False
            for conn in [conn for conn in self.waiting if conn.deadline <= now]:
                self.guard(self.expire, conn)
            self.keep_budget()  # also for requests sent behind a response that is not read
            if self.alive:
                self.set_accepting(True)

    def guard(self, step: Callable[[Connection], None] | None, conn: Connection) -> None:
        try:
            step(conn)  # type: ignore[misc]
        except OSError:  # the client has gone
            self.close(conn)
        except Exception:
            app.log.exception("unhandled exception")
            self.close(conn)

    def clear_pipe(self, pipe: int) -> None:
        with suppress(BlockingIOError):
            os.read(pipe, 4096)

    def watch(self, conn: Connection, event: int, step: Callable[[Connection], None]) -> None:
        self.waiting[conn] = None
        conn.step = step
        if conn.registered_event != event:
            self.unregister(conn)
            self.poller.register(conn.sock, event, conn)
            conn.registered_event = event

    def unwatch(self, conn: Connection) -> None:
        """Its socket stays registered: few clients send before they have the response."""
        self.waiting.pop(conn, None)

    def unregister(self, conn: Connection) -> None:
        if conn.registered_event:
            self.poller.unregister(conn.sock)
            conn.registered_event = 0

    def count(self, conn: Connection, size: int) -> None:
        with self.received_lock:
            self.received_bytes += size - conn.counted_bytes
            conn.counted_bytes = size

    def close(self, conn: Connection) -> None:
        self.unwatch(conn)
        self.unregister(conn)
        self.count(conn, 0)
        self.connections -= 1
        conn.sock.close()

    # Accepting

    def set_accepting(self, accepting: bool) -> None:
        if accepting != self.is_accepting:
            self.is_accepting = accepting
            for listener in self.sockets:
                if accepting:
                    self.poller.register(listener, selectors.EVENT_READ, self.accept)
                else:
                    self.poller.unregister(listener)

    def accept(self, listener: Any) -> None:
        """Accept the connections that wait, at most 64, so that the others have their turn."""
        for number in range(64):
            if self.connections >= self.cfg.worker_connections:
                if number:  # perhaps none waits: see at the next event
                    return
                if not self.close_oldest_idle():
                    self.set_accepting(False)  # until the next sweep
                    return
            try:
                self.add_connection(listener)
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError:  # no file, or no memory: without a pause this would be tried at once
                # A connection that this loop has accepted looks idle: its request is unread.
                if not number:
                    self.close_oldest_idle()
                self.set_accepting(False)
                return

    def add_connection(self, listener: Any) -> None:
        sock, address = listener.accept()
        sock.setblocking(False)
        request = ReceivedRequest(self.max_body_bytes)
        conn = Connection(sock, address, listener.getsockname(), request)
        self.connections += 1
        self.await_request(conn)

    def close_oldest_idle(self) -> bool:
        for conn in self.waiting:
            if not (conn.request.data or conn.unsent):
                self.close(conn)
                return True
        return False

    def stop_accepting(self) -> None:
        """Take over the connections in the backlog: no other worker accepts them."""
        self.set_accepting(False)
        for listener in self.sockets:
            with suppress(OSError):
                for _ in range(self.cfg.backlog):
                    self.add_connection(listener)
            listener.close()
        soon = time.monotonic() + STOP_SECONDS
        for conn in self.waiting:
            if conn.is_lingering or not (conn.request.data or conn.unsent):
                conn.deadline = min(conn.deadline, soon)

    # Receiving

    def await_request(self, conn: Connection) -> None:
        """Wait for a request, or for the rest of one that has begun to arrive."""
        seconds = self.keepalive if self.alive else STOP_SECONDS
        conn.deadline = time.monotonic() + (self.body_seconds if conn.request.data else seconds)
        self.watch(conn, selectors.EVENT_READ, self.receive)

    def receive(self, conn: Connection) -> None:
        data, request = conn.sock.recv(65_536), conn.request
        if not data:
            if request.is_head_complete():
                self.dispatch(conn)  # the body is truncated
            else:
                self.close(conn)
            return
        if not request.data:
            data = data.lstrip(b"\r\n")  # line breaks do not begin a request
            if not data:
                return
            conn.deadline = time.monotonic() + self.body_seconds
        request.data += data
        if self.dispatch_if_complete(conn):
            return
        self.count(conn, len(request.data))
        self.keep_budget()

    def dispatch_if_complete(self, conn: Connection) -> bool:
        if conn.request.is_complete():
            self.dispatch(conn)
            return True
        if conn.request.expects_continue:
            conn.request.expects_continue = False
            conn.sock.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        return False

    def keep_budget(self) -> None:
        while self.received_bytes > self.max_received_bytes and (
            oldest := self.oldest_incomplete()
        ):
            self.guard(self.expire, oldest)

    def oldest_incomplete(self) -> Connection | None:
        begun = (conn for conn in self.waiting if conn.request.data)
        return min(begun, key=lambda conn: conn.deadline, default=None)

    def expire(self, conn: Connection) -> None:
        if conn.is_lingering or conn.unsent or not conn.request.is_head_complete():
            self.close(conn)
        else:
            is_late = conn.deadline <= time.monotonic()
            cause = None if is_late else "the oldest, with too many bytes of incomplete requests"
            conn.request.reject(app.ApiError("request_timeout", cause=cause))
            self.dispatch(conn)

    def dispatch(self, conn: Connection) -> None:
        """Queue the request for a thread."""
        self.unwatch(conn)
        request = conn.request
        if request.has_body and not request.error and self.received_bytes > self.max_received_bytes:
            cause = f"{self.received_bytes} bytes of requests wait for a thread"
            request.reject(app.ApiError("overloaded", cause=cause))
        conn.linger_until = conn.deadline
        self.count(conn, len(request.data))
        conn.deadline = time.monotonic() + self.body_seconds
        (self.with_body if request.has_body else self.without_body).put(conn)

    # Sending

    def send(self, conn: Connection) -> None:
        self.unwatch(conn)
        unsent = conn.unsent
        while unsent:
            try:
                sent = conn.sock.sendmsg([*islice(unsent, 16)])
            except BlockingIOError:
                self.watch(conn, selectors.EVENT_WRITE, self.send)
                return
            while unsent and sent >= len(unsent[0]):
                sent -= len(unsent.popleft())
            if sent:
                unsent[0] = unsent[0][sent:]
        if not conn.keep_alive:
            conn.sock.shutdown(socket.SHUT_WR)
            conn.is_lingering = True
            conn.deadline = max(conn.linger_until, time.monotonic() + STOP_SECONDS)
            self.watch(conn, selectors.EVENT_READ, self.linger)
            return
        self.await_request(conn)
        if conn.request.data:  # sent behind the last one
            self.dispatch_if_complete(conn)

    def linger(self, conn: Connection) -> None:
        """Drain the connection: otherwise TCP resets it before the client reads the response."""
        if not conn.sock.recv(65_536):
            self.close(conn)

    # In the threads that handle requests, and those that complete responses

    def handle_requests(self, queue: SimpleQueue[Connection]) -> None:
        while True:
            conn = queue.get()
            self.count(conn, 0)
            self.handle(conn)

    def handle(self, conn: Connection) -> None:
        request, req = conn.request, None
        try:
            if time.monotonic() > conn.deadline and not request.error:
                cause = f"no thread was free for {self.body_seconds:g} s"
                request.reject(app.ApiError("overloaded", cause=cause))
            if request.error and not request.is_head_complete():
                raise request.error
            parser = RequestParser(self.cfg, request, conn.address)
            req = next(parser)
            resp, environ = wsgi.create(req, conn, conn.address, conn.server, self.cfg)
            environ["wsgi.multithread"] = True
            environ["worker.error"] = request.error
            body = self.wsgi(environ, resp.start_response)
            is_fully_read = self.is_fully_read(req.body)
            rest = parser.unreader.take_buffered() + request.take_rest()
            # Gunicorn finds "close" only if it is the only option.
            options = environ.get("HTTP_CONNECTION", "").lower().split(",")
            # At a stop, requests that have arrived behind this one still get their responses.
            is_last = "close" in map(str.strip, options) or not (self.alive or rest)
            if is_last or request.error or not is_fully_read:
                resp.force_close()
            conn.request = ReceivedRequest(self.max_body_bytes, rest.lstrip(b"\r\n"))
            if rest:
                self.count(conn, len(conn.request.data))
            if hasattr(body, "add_done_callback"):
                body.add_done_callback(lambda _: self.complete(conn, req, resp, body))
            else:
                self.complete(conn, req, resp, body)
        except Exception as error:
            self.fail(conn, req, error)

    def is_fully_read(self, body: Any) -> bool:
        """Whether the next request follows the body. Reads the rest that the application left."""
        with suppress(Exception):  # Gunicorn's, of a malformed chunk
            while not body.failed and body.read(2**20):
                pass
        return not body.failed

    def complete(self, conn: Connection, req: Any, resp: Any, body: Any) -> None:
        """Make the response of the application's iterable, and hand it to the event loop.

        Must not raise: as a callback of a future it would leave the client without a response.
        """
        try:
            for item in body:
                resp.write(item)
            resp.close()
            if hasattr(body, "close"):
                body.close()
            conn.keep_alive = not resp.should_close()
        except Exception as error:
            self.fail(conn, req, error)
        else:
            self.deliver(conn)

    def fail(self, conn: Connection, req: Any, error: Exception) -> None:
        """Respond to a request that Gunicorn could not parse, or to a defect."""
        if isinstance(error, (LimitRequestLine, LimitRequestHeaders)):
            text = "The request line or a header is too long, or there are too many headers."
            error = app.ApiError("request_too_large", text)
        elif req is None and not isinstance(error, app.ApiError):
            # The exception's text may quote a token, from a body that a wrong Content-Length made
            # look like the next request.
            text = "The request is not well-formed HTTP."
            error = app.ApiError("invalid_json", text, cause=type(error).__name__)
        environ = {
            "REQUEST_METHOD": getattr(req, "method", ""),
            "PATH_INFO": getattr(req, "path", ""),
            "REMOTE_ADDR": conn.address[0],
        }
        response = self.wsgi.reject(error, environ)
        conn.request = ReceivedRequest(self.max_body_bytes)  # releases the body
        conn.unsent.clear()
        conn.sendall(f"HTTP/1.1 {response.status}\r\nConnection: close\r\n".encode())
        conn.sendall(str(response.headers).encode("latin-1"))
        conn.sendall(response.data)
        conn.keep_alive = False
        self.deliver(conn)

    def deliver(self, conn: Connection) -> None:
        self.responses.append(conn)
        if not self.is_awake:
            self.is_awake = True
            with suppress(BlockingIOError):  # the pipe is full: the event loop wakes anyway
                os.write(self.PIPE[1], b"1")
