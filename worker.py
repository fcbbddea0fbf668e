"""Gunicorn's worker: an event loop receives requests and sends responses; threads handle requests.

A thread gets a request when it is fully received, so slow clients occupy no request thread. Nor do
calls of SQS: if the application's iterable has add_done_callback, the request thread is free at
once, and the callback completes the response in another thread.

A connection has one owner at a time: the event loop, the thread that handles its request, or the
thread that completes its response. Only the event loop uses the socket.
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
# The memory of a pod for requests that are incomplete, or wait for a thread. Each worker gets an
# equal share, but at least one request of the maximum size. A pod has 512 MiB; idle workers take
# 120 MiB.
MAX_RECEIVED_BYTES = 96 * 2**20
LINGER_SECONDS = 2.0  # wait for a client to close, or to send its next request during a stop
SWEEP_SECONDS = 0.1  # between two checks of all deadlines

_is_request_line = re.compile(rb"[!-~]+ [!-~]+ HTTP/1\.[0-9]\r\n").match
_is_http_1_0 = re.compile(rb"[^\r\n]*+(?<= HTTP/1\.0)\r\n").match
_framing_headers = re.compile(
    rb"\r\n(content-length|transfer-encoding|expect):([^\r\n]*+)(?=\r\n)", re.I
).findall
_chunk_size = re.compile(rb"([0-9a-fA-F]+)(?:[ \t]*;[^\r\n]*)?\r\n").match


class ReceivedRequest:
    """The received bytes of a request, and of pipelined requests behind it.

    can_be_handled only finds the end of the request. Gunicorn's parser parses the request; it reads
    from this object as from a socket.
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
        """Whether the request line and all headers are received."""
        return self._body_start > 0

    def can_be_handled(self) -> bool:
        """Whether the request is fully received, or is malformed or too large."""
        if not self._body_start:
            end = self.data.find(b"\r\n\r\n")
            if not 0 <= end <= MAX_HEAD_BYTES:
                return self._is_head_invalid()
            self._body_start = self._chunk_start = end + 4
            self._read_framing()
        if self._body_bytes is None:
            return self._can_chunks_be_handled()
        if self._body_bytes > self._max_body_bytes:
            return self._reject_too_large()
        return len(self.data) - self._body_start >= self._body_bytes

    def reject(self, error: app.ApiError) -> None:
        """Set the error response, and drop the body."""
        self.error = error
        del self.data[self._body_start :]

    def _reject_too_large(self, text: str = "") -> bool:
        text = text or f"The request body is larger than {self._max_body_bytes} bytes."
        self.reject(app.ApiError("request_too_large", text))
        return True

    def _is_head_invalid(self) -> bool:
        if len(self.data) > MAX_HEAD_BYTES:
            return self._reject_too_large(f"The headers are larger than {MAX_HEAD_BYTES} bytes.")
        return self._has_bare_line_feed(0) or (
            b"\n" in self.data and not _is_request_line(self.data)
        )

    def _has_bare_line_feed(self, start: int) -> bool:
        return self.data.count(b"\n", start) != self.data.count(b"\r\n", start)

    def _read_framing(self) -> None:
        """Find how the body ends. If Gunicorn's parser will reject the head, wait for no body."""
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

    def _can_chunks_be_handled(self) -> bool:
        data = self.data
        while size_line := _chunk_size(data, self._chunk_start):
            size, start = int(size_line[1], 16), size_line.end()
            if size == 0:
                is_end = data.startswith(b"\r\n", start) or data.find(b"\r\n\r\n", start) >= 0
                # Malformed trailers: too long, or with other line ends.
                is_too_long = len(data) - start > MAX_HEAD_BYTES
                return is_end or is_too_long or self._has_bare_line_feed(start)
            if self._chunk_bytes + size > self._max_body_bytes:
                return self._reject_too_large()
            if len(data) < start + size + 2:
                return False
            if not data.startswith(b"\r\n", start + size):
                return True
            self._chunk_start = start + size + 2
            self._chunk_bytes += size
            self._chunks += 1
            if self._chunks > MAX_CHUNKS:
                return self._reject_too_large(
                    f"The request body has more than {MAX_CHUNKS} chunks."
                )
        return data.find(b"\n", self._chunk_start) >= 0 or (
            len(data) - self._chunk_start > MAX_CHUNK_LINE_BYTES
        )

    def recv(self, size: int) -> bytes:
        """Gunicorn's parser calls this instead of a socket's recv."""
        with memoryview(self.data) as data:
            piece = bytes(data[self._read : self._read + size])
        self._read += len(piece)
        return piece

    def take_rest(self) -> bytes:
        """The bytes behind the request. Releases the memory of the request."""
        rest = bytes(self.data[self._read :])
        self.data = bytearray()
        return rest


class Connection:
    """A client's connection. Gunicorn's Response writes to it as to a socket."""

    def __init__(
        self, sock: socket.socket, address: Any, server: Any, request: ReceivedRequest
    ) -> None:
        self.sock, self.address, self.server = sock, address, server
        self.request = request
        self.unsent = deque[memoryview]()
        self.step: Callable[[Connection], None] | None = None  # for the socket's next event
        self.registered_event = 0  # in the selector
        self.deadline = 0.0  # of the wait for the client, or for a free thread
        self.linger_until = 0.0  # until then, the rest of a rejected body may arrive
        self.counted_bytes = 0  # this connection's part of Worker.received_bytes
        self.keep_alive = self.is_lingering = False

    def sendall(self, data: bytes) -> None:
        """Add to the bytes that the event loop sends."""
        # A view: responses to slow clients share the bytes of a page.
        self.unsent.append(memoryview(data))

    def send(self, data: bytes) -> int:
        """Do nothing: Gunicorn sends only "100 Continue" here, which the event loop sends."""
        return len(data)


class Worker(base.Worker):  # type: ignore[misc]
    """Up to `linger`, only the event loop calls the methods, except set_received_bytes.

    Request threads, and the threads that complete responses, call the rest.
    """

    def init_process(self) -> None:
        """Make the state. Gunicorn calls this after the fork, and __init__ before."""
        self.selector = selectors.DefaultSelector()
        self.waiting: dict[Connection, None] = {}  # for their clients, oldest first
        self.completed = deque[Connection]()  # complete, to be sent
        # Requests without a body have their own thread: /health waits neither behind POSTs nor for
        # AWS.
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
        """Serve until SIGTERM, or until the master has ended; then finish the requests in progress.

        That takes at most graceful_timeout seconds.
        """
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
        self.selector.register(self.PIPE[0], selectors.EVENT_READ, self.clear_pipe)
        for listener in self.sockets:
            listener.setblocking(False)
            # A small send buffer keeps the kernel's memory low while clients do not read.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
        self.set_accepting(True)
        while self.alive:
            self.run_once()
        stop_at = time.monotonic() + self.cfg.graceful_timeout
        self.stop_accepting()
        while self.connections and time.monotonic() < stop_at:
            self.run_once()

    def run_once(self) -> None:
        """One iteration of the event loop: receive, accept, send, and enforce deadlines."""
        # Clear is_awake, then check `completed`. deliver() appends, then reads is_awake. So a
        # completed response is seen here, or wakes the selector.
        self.is_awake = False
        timeout = 0.0 if self.completed else SWEEP_SECONDS if self.connections else 1.0
        events = self.selector.select(timeout)
        self.is_awake = True
        for key, _ in events:
            if not isinstance(conn := key.data, Connection):
                key.data(key.fileobj)
            elif conn in self.waiting:
                self.run_step(conn.step, conn)
            elif conn.registered_event:  # data behind a request in progress: receive it later
                self.unregister(conn)
        while self.completed:
            conn = self.completed.popleft()
            conn.deadline = time.monotonic() + 2 * self.body_seconds
            self.run_step(self.send, conn)
        if (now := time.monotonic()) >= self.next_sweep:
            self.next_sweep = now + SWEEP_SECONDS
            self.notify()
            if os.getppid() != self.ppid:
                self.alive = False
            for conn in [conn for conn in self.waiting if conn.deadline <= now]:
                self.run_step(self.expire, conn)
            self.keep_budget()  # for pipelined requests of clients that do not read their response
            if self.alive:
                self.set_accepting(True)

    def run_step(self, step: Callable[[Connection], None] | None, conn: Connection) -> None:
        """Call the step. An exception closes this connection only."""
        try:
            step(conn)  # type: ignore[misc]
        except OSError:  # the client has closed or reset the connection
            self.close(conn)
        except Exception:
            app.log.exception("unhandled exception")
            self.close(conn)

    def clear_pipe(self, pipe: int) -> None:
        """Read the bytes that woke the event loop."""
        with suppress(BlockingIOError):
            os.read(pipe, 4096)

    def watch(self, conn: Connection, event: int, step: Callable[[Connection], None]) -> None:
        """Call `step` when the client's socket is ready, or expire() at the deadline."""
        self.waiting[conn] = None
        conn.step = step
        if conn.registered_event != event:
            self.unregister(conn)
            self.selector.register(conn.sock, event, conn)
            conn.registered_event = event

    def unwatch(self, conn: Connection) -> None:
        """Stop waiting for the client.

        The socket stays registered, which saves system calls: few clients send before the response.
        """
        self.waiting.pop(conn, None)

    def unregister(self, conn: Connection) -> None:
        """Wait for no event of the client."""
        if conn.registered_event:
            self.selector.unregister(conn.sock)
            conn.registered_event = 0

    def set_received_bytes(self, conn: Connection, size: int) -> None:
        """Set this connection's part of received_bytes."""
        with self.received_lock:
            self.received_bytes += size - conn.counted_bytes
            conn.counted_bytes = size

    def close(self, conn: Connection) -> None:
        """Close the connection, in the event loop."""
        self.unwatch(conn)
        self.unregister(conn)
        self.set_received_bytes(conn, 0)
        self.connections -= 1
        conn.sock.close()

    # Accepting

    def set_accepting(self, accepting: bool) -> None:
        """Register or unregister the listening sockets."""
        if accepting != self.is_accepting:
            self.is_accepting = accepting
            for listener in self.sockets:
                if accepting:
                    self.selector.register(listener, selectors.EVENT_READ, self.accept)
                else:
                    self.selector.unregister(listener)

    def accept(self, listener: Any) -> None:
        """Accept up to 64 connections: more would delay the connections that are open."""
        for number in range(64):
            if self.connections >= self.cfg.worker_connections:
                if number:  # the backlog may be empty: wait for the next event
                    return
                if not self.close_oldest_idle():
                    self.set_accepting(False)  # until the next sweep
                    return
            try:
                self.add_connection(listener)
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError:  # out of files or memory
                # A connection accepted in this loop looks idle, because its request is unread.
                if not number:
                    self.close_oldest_idle()
                self.set_accepting(False)  # until the next sweep: an immediate retry would fail too
                return

    def add_connection(self, listener: Any) -> None:
        """Accept one connection. Raises OSError."""
        sock, address = listener.accept()
        sock.setblocking(False)
        request = ReceivedRequest(self.max_body_bytes)
        conn = Connection(sock, address, listener.getsockname(), request)
        self.connections += 1
        self.await_request(conn)

    def close_oldest_idle(self) -> bool:
        """Close the connection that has been idle longest. Returns whether there was one."""
        for conn in self.waiting:
            if not (conn.request.data or conn.unsent):
                self.close(conn)
                return True
        return False

    def stop_accepting(self) -> None:
        """Accept the backlog's connections, and then no more.

        With reuse_port, no other worker can accept the connections of this worker's backlog.
        """
        self.set_accepting(False)
        for listener in self.sockets:
            with suppress(OSError):
                for _ in range(self.cfg.backlog):
                    self.add_connection(listener)
            listener.close()
        soon = time.monotonic() + LINGER_SECONDS
        for conn in self.waiting:
            if conn.is_lingering or not (conn.request.data or conn.unsent):
                conn.deadline = min(conn.deadline, soon)

    # Receiving

    def await_request(self, conn: Connection) -> None:
        """Wait for a request, or for the rest of an incomplete request."""
        seconds = self.keepalive if self.alive else LINGER_SECONDS
        conn.deadline = time.monotonic() + (self.body_seconds if conn.request.data else seconds)
        self.watch(conn, selectors.EVENT_READ, self.receive)

    def receive(self, conn: Connection) -> None:
        """Receive a part of a request."""
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
        if self.dispatch_if_possible(conn):
            return
        self.set_received_bytes(conn, len(request.data))
        self.keep_budget()

    def dispatch_if_possible(self, conn: Connection) -> bool:
        """Dispatch a request that can be handled. Otherwise send "100 Continue" if expected."""
        if conn.request.can_be_handled():
            self.dispatch(conn)
            return True
        if conn.request.expects_continue:
            conn.request.expects_continue = False
            conn.sock.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        return False

    def keep_budget(self) -> None:
        """End the oldest incomplete requests until the others fit max_received_bytes."""
        while self.received_bytes > self.max_received_bytes and (
            oldest := self.oldest_incomplete()
        ):
            self.run_step(self.expire, oldest)

    def oldest_incomplete(self) -> Connection | None:
        """The connection whose incomplete request has the earliest deadline."""
        incomplete = (conn for conn in self.waiting if conn.request.data)
        return min(incomplete, key=lambda conn: conn.deadline, default=None)

    def expire(self, conn: Connection) -> None:
        """End the wait for a client: 408 for a body, otherwise close the connection."""
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
        self.set_received_bytes(conn, len(request.data))
        conn.deadline = time.monotonic() + self.body_seconds
        (self.with_body if request.has_body else self.without_body).put(conn)

    # Sending

    def send(self, conn: Connection) -> None:
        """Send the response; then wait for the next request, or close the connection."""
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
            conn.deadline = max(conn.linger_until, time.monotonic() + LINGER_SECONDS)
            self.watch(conn, selectors.EVENT_READ, self.linger)
            return
        self.await_request(conn)
        if conn.request.data:  # a pipelined request
            self.dispatch_if_possible(conn)

    def linger(self, conn: Connection) -> None:
        """Drain the connection: otherwise TCP resets it before the client reads the response."""
        if not conn.sock.recv(65_536):
            self.close(conn)

    # In the threads that handle requests, and those that complete responses

    def handle_requests(self, queue: SimpleQueue[Connection]) -> None:
        """Handle a queue's requests, one after another."""
        while True:
            conn = queue.get()
            self.set_received_bytes(conn, 0)
            self.handle(conn)

    def handle(self, conn: Connection) -> None:
        """Parse the request, and call the application. Must not raise: the thread would end."""
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
            # Gunicorn finds "close" only if the header has no other option.
            options = environ.get("HTTP_CONNECTION", "").lower().split(",")
            # During a stop, pipelined requests still get their responses.
            is_last = "close" in map(str.strip, options) or not (self.alive or rest)
            if is_last or request.error or not is_fully_read:
                resp.force_close()
            conn.request = ReceivedRequest(self.max_body_bytes, rest.lstrip(b"\r\n"))
            if rest:
                self.set_received_bytes(conn, len(conn.request.data))
            if hasattr(body, "add_done_callback"):
                body.add_done_callback(lambda _: self.complete(conn, req, resp, body))
            else:
                self.complete(conn, req, resp, body)
        except Exception as error:
            self.fail(conn, req, error)

    def is_fully_read(self, body: Any) -> bool:
        """Read the rest of the body. Returns whether its end was found: a request may follow."""
        with suppress(Exception):  # Gunicorn's, for a malformed chunk
            while not body.failed and body.read(2**20):
                pass
        return not body.failed

    def complete(self, conn: Connection, req: Any, resp: Any, body: Any) -> None:
        """Write the application's response, and give the connection to the event loop.

        Must not raise: after an exception in a future's callback, the client would get no response.
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
        """Write the error response for a malformed request, a rejected request, or a defect."""
        if isinstance(error, (LimitRequestLine, LimitRequestHeaders)):
            text = "The request line or a header is too long, or there are too many headers."
            error = app.ApiError("request_too_large", text)
        elif req is None and not isinstance(error, app.ApiError):
            # The exception's text may quote a token: with a wrong Content-Length, the rest of a
            # body is parsed as the next request.
            text = "The request is not well-formed HTTP."
            error = app.ApiError("invalid_json", text, cause=type(error).__name__)
        environ = {
            "REQUEST_METHOD": getattr(req, "method", ""),
            "PATH_INFO": getattr(req, "path", ""),
            "REMOTE_ADDR": conn.address[0],
        }
        response = self.wsgi.response_without_flask(error, environ)
        conn.request = ReceivedRequest(self.max_body_bytes)  # releases the body
        conn.unsent.clear()
        conn.sendall(f"HTTP/1.1 {response.status}\r\nConnection: close\r\n".encode())
        conn.sendall(str(response.headers).encode("latin-1"))
        conn.sendall(response.data)
        conn.keep_alive = False
        self.deliver(conn)

    def deliver(self, conn: Connection) -> None:
        """Give the connection to the event loop, and wake the event loop."""
        self.completed.append(conn)
        if not self.is_awake:
            self.is_awake = True
            with suppress(BlockingIOError):  # the pipe is full: the event loop wakes anyway
                os.write(self.PIPE[1], b"1")
