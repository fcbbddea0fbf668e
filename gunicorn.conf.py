"""How Gunicorn serves the application: plain `gunicorn` in this folder reads this file."""

import atexit
import gc
import json
import logging
import os
import random
import resource
import selectors
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

from gunicorn.http.errors import LimitRequestHeaders, LimitRequestLine
from gunicorn.http.message import Request
from gunicorn.http.parser import RequestParser
from gunicorn.sock import close_sockets, create_sockets
from gunicorn.workers.gthread import TConn, ThreadWorker

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

try:
    settings = app.Settings.from_environ(os.environ)
except app.SettingsError as error:
    sys.exit(str(error))

# Many systems give a process 1,024 files until it asks for more.
hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
with suppress(ValueError, OSError):  # macOS calls it unlimited, and then refuses that
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]

wsgi_app = "app:create_app()"
# The address of IPv6 takes IPv4 too.
bind = f"{'[::]' if socket.has_dualstack_ipv6() else '0.0.0.0'}:{settings.port}"  # noqa: S104
workers = settings.gunicorn_workers
threads = settings.gunicorn_threads
# Each worker listens for itself, and the kernel spreads connections evenly; that of Linux does. A
# lone one leaves that to the master: connections wait there while it is being replaced.
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
# app.py writes a JSON line for each request.
accesslog = None
logconfig_dict = app.logging_config(settings.log_level)
# As much as each header may have.
limit_request_line = 8190
# By default headers from loopback may change path and scheme, and are refused if they disagree.
forwarded_allow_ips = ""


# --- Worker ---------------------------------------------------------------------------------------

body_timeout = settings.body_timeout_seconds


class ClientSocket(socket.socket):
    """A client's connection. A request must arrive by the deadline, however it trickles, and an
    answer be taken within twice BODY_TIMEOUT_SECONDS: a time-out of the socket alone would start
    again with each byte, and Gunicorn's `timeout` does not watch threads.
    """

    deadline = 0.0  # of the request, by time.monotonic()
    ended = late = False  # nothing more comes; because of the deadline

    def recv(self, *arguments: int) -> bytes:
        self.settimeout(max(self.deadline - time.monotonic(), 0.001))
        data = b""  # when it is late, as if the client had gone
        try:
            data = super().recv(*arguments)
        except TimeoutError:
            self.late = True
        self.ended = not data
        return data

    def sendall(self, *arguments: Any) -> None:
        self.settimeout(2 * body_timeout)  # for all of it
        super().sendall(*arguments)


class ClientRequest(Request):  # type: ignore[misc]
    def should_close(self) -> Any:
        """Also when the body did not arrive whole: what follows it is no request."""
        return self.unreader.sock.ended or self.body.failed or super().should_close()


class ClientParser(RequestParser):  # type: ignore[misc]
    mesg_class = ClientRequest


class Connection(TConn):  # type: ignore[misc]
    linger: Callable[[], None]

    def close(self, graceful: bool = False) -> None:
        """Gunicorn would wait here, in the worker's main loop, until the client closes, too."""
        if graceful:
            self.linger()
        else:
            super().close()


class Worker(ThreadWorker):  # type: ignore[misc]
    """Gunicorn's threaded worker, which no client can hold up.

    Its poller waits for the first byte of a connection and, after the last answer, for the client
    to close: Gunicorn would keep a thread waiting for the one, and the main loop for the other.
    """

    LINGER_SECONDS = 2.0

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.lingering: deque[Connection] = deque()  # counted in nr_conns, the oldest first

    def accept(self, listener: Any) -> bool:
        try:
            sock, address = listener.accept()
        except OSError:  # the client has gone again, or there is no file for it
            return False
        client = ClientSocket(sock.family, sock.type, sock.proto, sock.detach())
        conn = Connection(self.cfg, client, address, listener.getsockname())
        conn.parser = ClientParser(self.cfg, client, address)
        conn.linger = partial(self.linger, conn)
        conn.set_timeout()
        self.nr_conns += 1
        self.pending_conns.append(conn)
        step = partial(self.on_pending_socket_readable, conn)
        self.poller.register(client, selectors.EVENT_READ, step)
        return True

    def enqueue_req(self, conn: Connection) -> None:
        conn.sock.deadline = time.monotonic() + body_timeout
        super().enqueue_req(conn)

    def handle(self, conn: Connection) -> Any:
        # The wait for a thread counts, else slow bodies in a row would hold the threads for one
        # deadline after the other. By then most of an honest one is here.
        conn.sock.deadline = max(conn.sock.deadline, time.monotonic() + body_timeout / 20)
        return super().handle(conn)

    def linger(self, conn: Connection) -> None:
        """Say that no more comes, and take what the client still sends: unread, it would reset the
        connection before the client has read its answer.
        """
        try:
            conn.sock.setblocking(False)
            conn.sock.shutdown(socket.SHUT_WR)
        except OSError:  # the client has gone
            conn.close()
            return
        self.nr_conns += 1
        conn.timeout = time.monotonic() + self.LINGER_SECONDS
        self.lingering.append(conn)
        self.poller.register(conn.sock, selectors.EVENT_READ, partial(self.drain, conn))

    def drain(self, conn: Connection, sock: ClientSocket) -> None:
        with suppress(BlockingIOError):
            try:
                if socket.socket.recv(sock, 65_536):
                    return
            except ConnectionError:
                pass
            self.drop(self.lingering, conn)

    def drop(self, conns: deque[Connection], conn: Connection) -> None:
        conns.remove(conn)
        self.poller.unregister(conn.sock)
        self.nr_conns -= 1
        conn.close()

    def murder_pending(self) -> None:
        """Close what is overdue, and the oldest idle connections where there are too many."""
        super().murder_pending()
        while self.lingering and self.lingering[0].timeout <= time.monotonic():
            self.drop(self.lingering, self.lingering[0])
        for conns in (self.lingering, self.pending_conns, self.keepalived_conns):
            while conns and self.nr_conns >= self.worker_connections:
                self.drop(conns, conns[0])

    def _cap_keepalive(self, deadline: float) -> None:
        """When the worker stops: what has come to its own listening socket, nobody else takes."""
        for listener in self.sockets:
            while self.accept(listener):
                pass
            listener.close()
        super()._cap_keepalive(deadline)
        for conn in self.pending_conns:
            conn.timeout = min(conn.timeout, deadline)

    def handle_error(self, req: Any, client: ClientSocket, addr: Any, exc: Exception) -> None:
        """Answer in JSON what Gunicorn could not parse; its own pages are HTML.

        Of the exception only its type is logged: the text may quote a token, from a body that a
        wrong Content-Length made look like the next request.
        """
        if isinstance(exc, (LimitRequestLine, LimitRequestHeaders)):
            too_much = "The request line or a header is too long, or there are too many headers."
            refusal = app.Refusal("request_too_large", too_much)
        elif req is None:
            refusal = app.Refusal("invalid_json", "The request is not well-formed HTTP.")
        else:
            refusal = app.Refusal("internal_error")
            app.log.error("unforeseen error", exc_info=exc)
        request_id = app.request_id_of("")
        body = json.dumps(refusal.body(request_id)).encode()
        head = (
            f"HTTP/1.1 {refusal.status} {HTTPStatus(refusal.status).phrase}\r\n"
            "Connection: close\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nX-Request-Id: {request_id}\r\n\r\n"
        )
        with suppress(OSError):  # the client may have gone
            client.sendall(head.encode() + body)
        app.record_answer(
            method=getattr(req, "method", ""),
            path=getattr(req, "path", ""),
            client=addr[0],
            status=refusal.status,
            request_id=request_id,
            error=refusal.code,
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


def when_ready(server: Any) -> None:
    # What is loaded stays. Were the workers' garbage collectors to look through it, each would get
    # a copy of its own, 4 MiB of memory.
    gc.collect()
    gc.freeze()


def post_fork(server: Any, worker: Any) -> None:
    # Until a worker has its own handlers, the master's would swallow a SIGTERM, and the master
    # would wait for the worker until the graceful timeout.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    (stdout,) = logging.getLogger().handlers
    stdout.start()  # type: ignore[attr-defined]
    app.TOKEN_READ_TIMESTAMP.set(0)  # this makes the worker's files, with all series
    # Python runs one thread of a process at a time. Threads that pass their turn from core to core
    # cost a worker of 64 threads 40 % more CPU than on one core. Several workers need all cores.
    if workers == 1 and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {random.choice(sorted(os.sched_getaffinity(0)))})  # noqa: S311


def post_worker_init(worker: Any) -> None:
    threading.Thread(target=worker.wsgi.extensions["warm_up"], daemon=True).start()


def child_exit(server: Any, worker: Any) -> None:
    mark_process_dead(worker.pid)  # type: ignore[no-untyped-call]
