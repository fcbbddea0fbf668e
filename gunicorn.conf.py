"""How Gunicorn serves the application: plain `gunicorn` in this folder reads this file."""

import atexit
import gc
import json
import logging
import os
import random
import re
import resource
import selectors
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from pathlib import Path
from select import POLLIN, poll
from typing import Any

from gunicorn import glogging
from gunicorn.http.errors import LimitRequestHeaders, LimitRequestLine
from gunicorn.http.message import Request
from gunicorn.http.parser import RequestParser
from gunicorn.sock import close_sockets, create_sockets
from gunicorn.workers.gthread import STOP_KEEPALIVE_LINGER, TConn, ThreadWorker

# The root file system is read-only, and a write to a disk can block.
memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # noqa: S108

# prometheus_client looks at the variable when it is imported. On SIGHUP this file is read again.
if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
    made, master = tempfile.mkdtemp(prefix="email-processor-", dir=memory), os.getpid()
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = made

    def remove() -> None:
        if os.getpid() == master:  # workers run exit handlers too
            shutil.rmtree(made, ignore_errors=True)

    atexit.register(remove)
metrics = Path(os.environ["PROMETHEUS_MULTIPROC_DIR"])
try:
    metrics.mkdir(parents=True, exist_ok=True)
except OSError as error:
    sys.exit(f"PROMETHEUS_MULTIPROC_DIR must be a folder: {error}")

from prometheus_client.multiprocess import mark_process_dead

import app

settings = app.Settings.from_environ(os.environ)

# Many systems give a process 1,024 files until it asks for more.
hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
with suppress(ValueError, OSError):  # macOS calls it unlimited, and then refuses that
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]

wsgi_app = "app:create_app()"
# The address of IPv6 takes IPv4 too.
bind = f"{'[::]' if socket.has_dualstack_ipv6() else '0.0.0.0'}:{settings.port}"
workers = settings.gunicorn_workers
threads = settings.gunicorn_threads
# Each worker has a listening socket of its own, and Linux spreads connections evenly over them. A
# single worker uses the master's, in which connections wait while the worker is replaced.
reuse_port = workers > 1 and sys.platform == "linux"
# Of a worker, idle ones included. Calls of AWS need files too.
worker_connections = max(threads + 1, min(2000, files - 128 - 4 * threads))
# Loaded once, before the fork: workers share its memory, and a bad release fails at the start.
preload_app = True
# Longer than the ALB's idle limit of 60 s. Were it shorter, the ALB would now and then send a
# request into a connection that is just being closed, and answer 502.
keepalive = 75
# Kubernetes' grace period counts from the preStop sleep on and must exceed both together.
graceful_timeout = 25
# Recycling workers would reset connections in gthread.
max_requests = 0
worker_tmp_dir = memory  # of the heartbeat
control_socket_disable = True
accesslog = None
logconfig_dict = app.logging_config(settings.log_level)
# As much as each header may have.
limit_request_line = 8190
# By default headers from loopback may change path and scheme, and are refused if they disagree.
forwarded_allow_ips = ""


class Logger(glogging.Logger):  # type: ignore[misc]
    def access(self, *_: Any) -> None:
        """app.py writes a line for each request. With a logconfig_dict, Gunicorn would still gather
        what its own line shows.
        """


logger_class = Logger


# --- Worker ---------------------------------------------------------------------------------------

body_timeout = settings.body_timeout_seconds
# A whole head, or a first line that is no request's.
can_be_read = re.compile(
    rb"[\r\n]*+(.*?\n\r?\n|(?![!-~]+ \S+ HTTP/1\.[0-9]\r\n)[^\n]*\n)", re.DOTALL
).match


class ClientSocket(socket.socket):
    """A client's connection. All that a thread waits for is a body, and that until the deadline."""

    received = b""  # of the next request
    unsent: tuple[memoryview, ...] = ()  # of the last answer
    deadline = 0.0  # of the request
    ended = late = False  # nothing more comes; because of the deadline

    def setblocking(self, flag: bool) -> None:
        """Gunicorn sets this and the next again and again. The connection never blocks."""

    def settimeout(self, seconds: float | None) -> None:
        pass

    def recv(self, size: int, flags: int = 0) -> bytes:
        if self.received:
            data, self.received = self.received[:size], self.received[size:]
            return data
        while True:
            try:
                data = super().recv(size)
            except BlockingIOError:
                # The wait for a thread counts, else slow bodies in a row would hold the threads
                # for one deadline after the other. What has come by then counts, too.
                if (left := self.deadline - time.monotonic()) <= 0:
                    self.ended = self.late = True
                    return b""
                readable = poll()
                readable.register(self, POLLIN)
                readable.poll(left * 1000)
            else:
                self.ended = not data
                return data

    def send(self, data: Any, flags: int = 0) -> int:
        sent = 0
        if not self.unsent:
            with suppress(BlockingIOError):
                sent = super().send(data)
        if sent < len(data):
            self.unsent = (*self.unsent, memoryview(data)[sent:])
        return len(data)

    def sendall(self, data: Any, flags: int = 0) -> None:
        self.send(data)

    def receive(self) -> bytes:
        data = super().recv(16_384)
        if not data:
            raise ConnectionResetError
        return data

    def send_rest(self) -> bool:
        rest, self.unsent = self.unsent, ()
        for part in rest:
            self.send(part)
        return not self.unsent


class ClientRequest(Request):  # type: ignore[misc]
    def should_close(self) -> Any:
        """Also when the body did not arrive whole: what follows it is no request."""
        return self.unreader.sock.ended or self.body.failed or super().should_close()


class Worker(ThreadWorker):  # type: ignore[misc]
    """Gunicorn's threaded worker, whose threads get requests when their heads are here.

    Its main loop awaits heads, clients that are slow to take an answer, and clients that do not
    close. Gunicorn's threads would wait for the first two, and for each of the last its main loop,
    for up to two seconds in which nothing else goes on.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.waiting: dict[TConn, None] = {}  # until conn.timeout; the oldest first
        self.looked = 0.0

    def wait(self, conn: TConn, event: int, step: Callable[[TConn], None]) -> None:
        self.waiting[conn] = None
        self.poller.register(conn.sock, event, lambda _: self.go_on(conn, step))

    def go_on(self, conn: TConn, step: Callable[[TConn], None]) -> None:
        if conn in self.waiting:
            del self.waiting[conn]
            self.poller.unregister(conn.sock)
        try:
            step(conn)
        except OSError:  # the client has gone
            self.close(conn)

    def close(self, conn: TConn) -> None:
        self.nr_conns -= 1
        conn.close()

    def accept(self, listener: Any) -> bool:
        try:
            sock, address = listener.accept()
            # Else a client that takes nothing would have a whole answer in the kernel's memory.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
        except OSError:  # nobody is there any more, or there is no room
            return False
        client = ClientSocket(sock.family, sock.type, sock.proto, sock.detach())
        socket.socket.setblocking(client, False)
        conn = TConn(self.cfg, client, address, listener.getsockname())
        conn.parser, conn.data_ready = RequestParser(self.cfg, client, address), True
        conn.parser.mesg_class = ClientRequest
        self.nr_conns += 1
        self.await_head(conn)
        return True

    def await_head(self, conn: TConn) -> None:
        sock = conn.sock
        if len(sock.received) > 16_384 or can_be_read(sock.received):
            self.enqueue_req(conn)
            return
        if sock.received:
            conn.timeout = sock.deadline
        else:
            conn.timeout = time.monotonic() + (keepalive if self.alive else STOP_KEEPALIVE_LINGER)
        self.wait(conn, selectors.EVENT_READ, self.read_head)

    def read_head(self, conn: TConn) -> None:
        if not conn.sock.received:
            conn.sock.deadline = time.monotonic() + body_timeout
        conn.sock.received += conn.sock.receive()
        self.await_head(conn)

    def finish_request(self, conn: TConn, fs: Any) -> None:
        conn.timeout = time.monotonic() + 2 * body_timeout
        self.go_on(conn, partial(self.finish_answer, fs))

    def finish_answer(self, fs: Any, conn: TConn) -> None:
        sock = conn.sock
        if not sock.send_rest():
            self.wait(conn, selectors.EVENT_WRITE, partial(self.finish_answer, fs))
        elif fs.exception() or not fs.result():
            sock.shutdown(socket.SHUT_WR)
            conn.timeout = time.monotonic() + 2
            self.wait(conn, selectors.EVENT_READ, self.linger)
        else:
            sock.received = conn.parser.unreader.take_buffered() + sock.received
            sock.deadline = time.monotonic() + body_timeout
            self.await_head(conn)

    def linger(self, conn: TConn) -> None:
        """Read what still comes: unread, it would reset the connection under the answer."""
        conn.sock.receive()
        self.wait(conn, selectors.EVENT_READ, self.linger)

    def wait_for_and_dispatch_events(self, timeout: float) -> None:
        super().wait_for_and_dispatch_events(0.1 if self.waiting else timeout)

    def murder_pending(self) -> None:
        """Close what is overdue, and the oldest where there are too many."""
        now = time.monotonic()
        if now > self.looked + 0.1:
            self.looked = now
            for conn in [conn for conn in self.waiting if conn.timeout <= now]:
                self.go_on(conn, self.close)
        while self.nr_conns >= self.worker_connections and self.waiting:
            self.go_on(next(iter(self.waiting)), self.close)

    def _cap_keepalive(self, deadline: float) -> None:
        """When the worker stops."""
        # Nobody else takes what has come to this socket, and what is still to come goes elsewhere.
        for listener in self.sockets:
            while self.accept(listener):
                pass
            listener.close()
        for conn in self.waiting:
            if not conn.sock.received and not conn.sock.unsent:
                conn.timeout = min(conn.timeout, deadline)

    def handle_error(self, req: Any, client: ClientSocket, addr: Any, exc: Exception) -> None:
        """Answer in JSON what Gunicorn could not parse; its own pages are HTML.

        Of the exception only its type is logged: the text may quote a token, from a body that a
        wrong Content-Length made look like the next request.
        """
        if isinstance(exc, (LimitRequestLine, LimitRequestHeaders)):
            too_much = "The request line or a header is too long, or there are too many headers."
            api_error = app.ApiError("request_too_large", too_much)
        elif req is None:
            api_error = app.ApiError("invalid_json", "The request is not well-formed HTTP.")
        else:
            api_error = app.ApiError("internal_error")
            app.log.error("unhandled exception", exc_info=exc)
        request_id = app.request_id_of("")
        body = json.dumps(api_error.body(request_id)).encode()
        head = (
            f"HTTP/1.1 {api_error.status} {HTTPStatus(api_error.status).phrase}\r\n"
            "Connection: close\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nX-Request-Id: {request_id}\r\n\r\n"
        )
        client.sendall(head.encode() + body)
        app.record_answer(
            method=getattr(req, "method", ""),
            path=getattr(req, "path", ""),
            client=addr[0],
            status=api_error.status,
            request_id=request_id,
            error=api_error.code,
            cause=type(exc).__name__,
        )


worker_class = Worker


# --- Hooks ----------------------------------------------------------------------------------------


def on_starting(server: Any) -> None:
    # Workers with reuse_port would share the port with another service unnoticed.
    server.cfg.set("reuse_port", False)
    close_sockets(create_sockets(server.cfg, server.log))
    server.cfg.set("reuse_port", reuse_port)
    # Now that the port is this service's own, so is the folder. The master's own files go as well:
    # its gauges would count beside the workers'.
    for file in metrics.glob("*.db"):
        file.unlink()
    # Until a worker has its own handlers, it has the master's, which would swallow a SIGTERM: the
    # master would then wait for the worker until the graceful timeout.
    stop = {signal.SIGTERM}
    os.register_at_fork(
        before=partial(signal.pthread_sigmask, signal.SIG_BLOCK, stop),
        after_in_parent=partial(signal.pthread_sigmask, signal.SIG_UNBLOCK, stop),
    )


def when_ready(server: Any) -> None:
    murder, looked, spared = server.murder_workers, [time.monotonic()], [0.0]

    def murder_workers() -> None:
        # Called every second. After a pause the master slept as well, as in a frozen container or a
        # node's live migration: the workers get time to be heard of again.
        now = time.monotonic()
        if now - looked[0] > 5:
            spared[0] = now + server.cfg.timeout
        looked[0] = now
        if now >= spared[0]:
            murder()

    server.murder_workers = murder_workers
    # What is loaded stays. Were the workers' garbage collectors to look through it, each would get
    # a copy of its own, 4 MiB of memory.
    gc.collect()
    gc.freeze()


def post_fork(server: Any, worker: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    (stdout,) = logging.getLogger().handlers
    stdout.start()  # type: ignore[attr-defined]
    app.TOKEN_READ_TIMESTAMP.set(0)  # this makes the worker's files, with all series
    # Python runs one thread of a process at a time. Threads that pass their turn from core to core
    # cost a worker of 64 threads 14 % more CPU in a pod with half a core. Several need all cores.
    if workers == 1 and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {random.choice(sorted(os.sched_getaffinity(0)))})  # noqa: S311


def post_worker_init(worker: Any) -> None:
    threading.Thread(target=worker.wsgi.warm_up, daemon=True).start()


def child_exit(server: Any, worker: Any) -> None:
    mark_process_dead(worker.pid)  # type: ignore[no-untyped-call]
