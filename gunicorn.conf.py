"""How Gunicorn serves the application: plain `gunicorn` in this folder reads this file."""

import atexit
import gc
import logging
import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from gunicorn import glogging
from gunicorn.sock import close_sockets, create_sockets


def has_room(folder: str | Path) -> bool:
    """Whether the folder is writable and has 4 MiB free: 64 workers' metrics take 1.3 MiB.

    Workers map these files into memory. On a full disk, a write to them is a SIGBUS, which kills
    the worker.
    """
    try:
        tempfile.TemporaryFile(dir=folder).close()
        space = os.statvfs(folder)
    except OSError:
        return False
    return not space.f_blocks or space.f_bavail * space.f_frsize >= 4 * 2**20  # 0: unlimited


# Not on disk: the root file system is read-only, and a write to a disk can block.
memory_folder = "/dev/shm" if has_room("/dev/shm") else None  # noqa: S108

# prometheus_client reads PROMETHEUS_MULTIPROC_DIR when it is imported. Gunicorn reads this file
# again on SIGHUP.
is_reload = "prometheus_client" in sys.modules
if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
    try:
        temporary = tempfile.mkdtemp(prefix="email-processor-", dir=memory_folder)
    except OSError:
        sys.exit("Neither /dev/shm nor a temporary folder (TMPDIR) can be written.")
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = temporary
    master = os.getpid()

    def remove_temporary() -> None:
        """Remove the folder at the exit of the master. Workers run exit handlers too."""
        if os.getpid() == master:
            shutil.rmtree(temporary, ignore_errors=True)

    atexit.register(remove_temporary)
metrics = Path(os.environ["PROMETHEUS_MULTIPROC_DIR"])
with suppress(OSError):
    metrics.mkdir(parents=True, exist_ok=True)
if not is_reload and not has_room(metrics):
    sys.exit(f"PROMETHEUS_MULTIPROC_DIR: {metrics} must be a writable folder with 4 MiB free.")

from prometheus_client.multiprocess import mark_process_dead

import app
import worker

settings = app.Settings.from_environ(os.environ)

# The soft limit is often 1,024 files, and each connection is a file.
hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
with suppress(ValueError, OSError):  # macOS reports an unlimited hard limit, and rejects it here
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]

wsgi_app = "app:create_app()"
# A socket for [::] accepts IPv4 too.
bind = f"{'[::]' if socket.has_dualstack_ipv6() else '0.0.0.0'}:{settings.port}"
workers = settings.gunicorn_workers
threads = settings.gunicorn_threads
# Each worker has a listening socket, and Linux spreads connections evenly over these sockets. A
# single worker uses the master's socket: connections wait there while the worker is replaced.
reuse_port = workers > 1 and sys.platform == "linux"
# Of a worker, including idle connections. 128 files remain for calls of AWS and others.
worker_connections = max(threads + 1, min(2000, files - 128))
# Import the application before the fork: workers share its memory, and an error ends the start.
preload_app = True
# Longer than the ALB's idle timeout of 60 s. Otherwise the ALB sometimes sends a request while the
# service closes the connection, and responds with 502.
keepalive = 75
# Kubernetes' terminationGracePeriodSeconds must exceed the preStop sleep plus this timeout.
graceful_timeout = 25
# No worker is recycled: that would close its connections.
max_requests = 0
worker_tmp_dir = memory_folder  # of the heartbeat files
control_socket_disable = True
accesslog = None
logconfig_dict = app.logging_config(settings.log_level)
logging.captureWarnings(True)  # so that warnings are JSON too
limit_request_line = 8190  # bytes, as limit_request_field_size
# The two settings below are empty, so Gunicorn takes neither scheme nor path from a header. It is
# then safe to trust every peer, and saves the parsing of its address.
forwarded_allow_ips = "*"
secure_scheme_headers: dict[str, str] = {}
forwarder_headers = ""


class Logger(glogging.Logger):  # type: ignore[misc]
    """Gunicorn's log, as JSON lines."""

    def __init__(self, cfg: Any) -> None:
        """Gunicorn calls this once, in the master, before its first log line."""
        super().__init__(cfg)
        app.log_start(settings, workers, threads)

    def info(self, msg: str, *arguments: Any, **options: Any) -> None:
        """Log a line of Gunicorn."""
        if msg.startswith("Listening at") and not arguments[0]:
            # With reuse_port, only the workers have listening sockets, and the address is missing.
            arguments = (bind, *arguments[1:])
        super().info(msg, *arguments, **options)


logger_class = Logger
worker_class = worker.Worker


# --- Hooks ----------------------------------------------------------------------------------------


def on_starting(server: Any) -> None:
    """In the master, before the listening sockets exist."""
    # Fail if the port is in use: with reuse_port, workers would share it with another service.
    server.cfg.set("reuse_port", False)
    close_sockets(create_sockets(server.cfg, server.log))
    server.cfg.set("reuse_port", reuse_port)
    # Remove the files of an earlier start, which has ended, because its port is free; and those of
    # the master, whose gauges would be added to those of the workers.
    for file in metrics.glob("*.db"):
        file.unlink()
    # After the fork, a worker has the master's signal handlers for a moment. These would ignore a
    # SIGTERM, and the master would wait for the worker until the graceful timeout.
    stop = {signal.SIGTERM}
    os.register_at_fork(
        before=partial(signal.pthread_sigmask, signal.SIG_BLOCK, stop),
        after_in_parent=partial(signal.pthread_sigmask, signal.SIG_UNBLOCK, stop),
    )


def when_ready(server: Any) -> None:
    """In the master, before the workers start."""
    murder, called_at, spared_until = server.murder_workers, [time.monotonic()], [0.0]
    parent = os.environ.get("STOP_WITH_PROCESS")  # set by app.py for the local server

    def murder_workers() -> None:
        """Kill workers without a heartbeat. Gunicorn calls this every second."""
        if parent and os.getppid() != int(parent):
            os.kill(os.getpid(), signal.SIGINT)
        # After a pause of the container, such as a live migration, give the workers one timeout to
        # send a heartbeat.
        now = time.monotonic()
        if now - called_at[0] > 5:
            spared_until[0] = now + server.cfg.timeout
        called_at[0] = now
        if now >= spared_until[0]:
            murder()

    server.murder_workers = murder_workers
    # Garbage collection in workers writes to every object: each would copy 4 MiB of shared memory.
    gc.collect()
    gc.freeze()


def post_fork(server: Any, worker: Any) -> None:
    """In a new worker, directly after the fork."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    for handler in logging.getLogger().handlers:
        if isinstance(handler, app.LogHandler):
            handler.start()
    app.TOKEN_READ_TIMESTAMP.set(0)  # creates the worker's metrics files, with all series
    app.BUILD_INFO.set(1)


def post_worker_init(worker: Any) -> None:
    """In a new worker, before its event loop."""
    worker.wsgi.start()


def worker_exit(server: Any, worker: Any) -> None:
    """In a worker, before its exit. Also in the master, for a worker that it finds gone."""
    wsgi = getattr(worker, "wsgi", None)
    if tracing := getattr(wsgi, "tracing", None):
        tracing.stop()


def child_exit(server: Any, worker: Any) -> None:
    """In the master, after the exit of a worker."""
    mark_process_dead(worker.pid)  # type: ignore[no-untyped-call]
