"""How Gunicorn serves the application: plain `gunicorn` in this folder reads this file."""

import atexit
import gc
import itertools
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
from pathlib import Path
from typing import Any

from gunicorn.http.errors import (
    InvalidResponseHeader,
    InvalidResponseHeaderName,
    LimitRequestHeaders,
    LimitRequestLine,
    ParseException,
)

# The root file system is read-only, and a write to a disk, be it into a mapped file, can block.
memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # noqa: S108


def prepare_metrics() -> None:
    """Provide the folder of the metrics' files, with space for them. Raises OSError."""
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    if folder:
        os.makedirs(folder, exist_ok=True)
    else:
        master, folder = os.getpid(), tempfile.mkdtemp(prefix="email-processor-", dir=memory)
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder

        def remove() -> None:
            if os.getpid() == master:  # workers run exit handlers too
                shutil.rmtree(folder, ignore_errors=True)

        atexit.register(remove)
    # A mapped file takes its space when it is written to, and then SIGBUS says that there is none.
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(2**22))  # the master and twice 64 workers take 20 kB each


# prometheus_client looks at the variable when it is imported, and app's metrics make files at once.
# On SIGHUP this file is read again.
if "app" not in sys.modules:
    try:
        prepare_metrics()
    except OSError as error:
        sys.exit(f"PROMETHEUS_MULTIPROC_DIR must be a folder with 4 MiB of free space: {error}")

import app

try:
    settings = app.Settings.from_environ(os.environ)
except app.SettingsError as error:
    sys.exit(str(error))

wsgi_app = "app:create_app()"
bind = f"0.0.0.0:{settings.port}"
reuse_port = True
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
worker_tmp_dir = memory  # of the heartbeat
control_socket_disable = True
# app.py writes a JSON line for each request.
accesslog = None
logconfig_dict = app.logging_config(settings.log_level)
# As much as each header may have.
limit_request_line = 8190
# By default a SCRIPT_NAME header from loopback may rewrite the path.
forwarder_headers = ""


def when_ready(server: Any) -> None:
    # What is loaded stays. Were the workers' garbage collectors to look through it, each would get
    # a copy of its own, 4 MiB of memory.
    gc.collect()
    gc.freeze()
    # Now that the port is this service's own, so is the folder. Every worker's files are made here,
    # whole: whoever replaces one finds them, and needs no space that may be gone by then. On SIGHUP
    # old and new workers live side by side.
    for file in Path(os.environ["PROMETHEUS_MULTIPROC_DIR"]).glob("*.db"):
        file.unlink()
    for slot in range(2 * workers):
        app.write_metrics_as(str(slot))
    app.write_metrics_as("master")
    # No thread waits for a client that connects and sends nothing, nor for ever to write an answer
    # of Gunicorn's own; the connections inherit both.
    for listener in server.LISTENERS:
        if hasattr(socket, "TCP_DEFER_ACCEPT"):
            listener.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, keepalive)
        listener.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 10, 0))


def pre_fork(server: Any, worker: Any) -> None:
    taken = {other.slot for other in server.WORKERS.values()}
    worker.slot = next(slot for slot in map(str, itertools.count()) if slot not in taken)


def post_fork(server: Any, worker: Any) -> None:
    # Until a worker has its own handlers, the master's would swallow a SIGTERM, and the master
    # would wait for the worker until the graceful timeout.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    app.write_metrics_as(worker.slot, alive=True)
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
    # mark_process_dead would delete the files of gauges, and the next worker may find no space for
    # its own. The master leaves the slot again: a fork would take what it remembers for the counts.
    app.write_metrics_as(worker.slot)
    app.write_metrics_as("master")


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
