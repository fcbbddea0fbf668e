"""How Gunicorn serves the application: plain `gunicorn` in this folder reads this file."""

import atexit
import json
import os
import random
import shutil
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
import types
from contextlib import suppress
from http import HTTPStatus
from typing import Any

from gunicorn.http.errors import (
    InvalidResponseHeader,
    InvalidResponseHeaderName,
    LimitRequestHeaders,
    LimitRequestLine,
    ParseException,
)

# prometheus_client looks at the variable when it is imported, so it must be set before app is.
if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
    _master, _metrics = os.getpid(), tempfile.mkdtemp(prefix="email-processor-")
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = _metrics

    def _remove_metrics() -> None:
        if os.getpid() == _master:  # workers run exit handlers too
            shutil.rmtree(_metrics, ignore_errors=True)

    atexit.register(_remove_metrics)

from prometheus_client.multiprocess import mark_process_dead

import app

try:
    settings = app.Settings.from_environ(os.environ)
except app.SettingsError as error:
    sys.exit(str(error))

wsgi_app = "app:create_app()"
bind = f"0.0.0.0:{settings.port}"
worker_class = "gthread"
workers = settings.gunicorn_workers
threads = settings.gunicorn_threads
# Loaded once, before the fork: workers share its memory, and a bad release fails at the start.
preload_app = True
# Longer than the ALB's idle limit of 60 s. Were it shorter, the ALB would now and then send a
# request into a connection that is just being closed, and answer 502.
keepalive = 75
# Kubernetes' grace period counts from the preStop sleep on and must exceed both together.
graceful_timeout = 25
# Recycling workers would reset connections in gthread.
max_requests = 0
# The root file system is read-only, and a heartbeat on a disk can block a worker.
worker_tmp_dir = "/dev/shm" if os.path.isdir("/dev/shm") else None  # noqa: S108
control_socket_disable = True
# app.py writes a JSON line for each request.
accesslog = None
logconfig_dict = app.logging_config(settings.log_level)
# As much as each header may have.
limit_request_line = 8190
# By default a SCRIPT_NAME header from loopback may rewrite the path.
forwarder_headers = ""


def when_ready(server: Any) -> None:
    # No thread waits for a client that connects and sends nothing, nor longer than that for one
    # that reads nothing; the connections inherit both.
    for listener in server.LISTENERS:
        if hasattr(socket, "TCP_DEFER_ACCEPT"):
            listener.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, keepalive)
        listener.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 10, 0))


def post_fork(server: Any, worker: Any) -> None:
    # Until a worker has its own handlers, the master's would swallow a SIGTERM, and the master
    # would wait for the worker until the graceful timeout.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # Python runs one thread of a process at a time. Threads that pass their turn from core to core
    # cost a worker of 64 threads 40 % more CPU than on one core. Several workers need all cores.
    if workers == 1 and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {random.choice(sorted(os.sched_getaffinity(0)))})  # noqa: S311


def pre_request(worker: Any, req: Any) -> None:
    """Give the application the means to close the connection after its answer."""
    req.body.force_close = req.force_close


def post_worker_init(worker: Any) -> None:
    worker.handle_error = types.MethodType(refuse_unreadable_request, worker)
    enqueue, handle, deadline = (
        worker.enqueue_req,
        worker.handle,
        worker.wsgi.extensions["deadline"],
    )

    def enqueue_req(conn: Any) -> None:
        conn.arrived = time.monotonic()
        enqueue(conn)

    def handle_in_time(conn: Any) -> Any:
        deadline.start(conn.sock, conn.arrived)
        try:
            return handle(conn)
        finally:
            deadline.stop(conn.sock)

    worker.enqueue_req, worker.handle = enqueue_req, handle_in_time
    threading.Thread(target=worker.wsgi.extensions["warm_up"], daemon=True).start()


def child_exit(server: Any, worker: Any) -> None:
    mark_process_dead(worker.pid)  # type: ignore[no-untyped-call]


def refuse_unreadable_request(
    worker: Any, req: Any, client: Any, addr: Any, exc: Exception
) -> None:
    """Answer in JSON what Gunicorn could not parse; its own pages are HTML.

    Of the exception only its type is logged: the text may quote a token, from a body that a wrong
    Content-Length made look like the next request.
    """
    ours = isinstance(exc, (InvalidResponseHeader, InvalidResponseHeaderName))
    if isinstance(exc, (LimitRequestLine, LimitRequestHeaders)):
        refusal = app.Refusal(
            "request_too_large",
            f"The request line may have {worker.cfg.limit_request_line} bytes, a header line "
            f"{worker.cfg.limit_request_field_size}, and {worker.cfg.limit_request_fields} headers "
            "are allowed.",
        )
    elif isinstance(exc, ParseException) and not ours:
        refusal = app.Refusal("invalid_json", "The request is not well-formed HTTP.")
    else:
        refusal = app.Refusal("internal_error")
        app.log.error("unforeseen error", exc_info=exc)
    request_id = app.request_id_of("")
    body = json.dumps(refusal.body(request_id)).encode()
    head = (
        f"HTTP/1.1 {refusal.status} {HTTPStatus(refusal.status).phrase}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        f"X-Request-Id: {request_id}\r\n\r\n"
    )
    with suppress(OSError):  # the client may have gone
        client.sendall(head.encode() + body)
    app.record_answer(
        method=getattr(req, "method", ""),
        path=getattr(req, "path", ""),
        client=addr[0] if addr else "",
        status=refusal.status,
        request_id=request_id,
        error=refusal.code,
        cause=type(exc).__name__,
    )
