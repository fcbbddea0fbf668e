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
    """Whether files can be made in it, with 4 MiB: 64 workers' metrics take 1.3 MiB.

    A worker maps these files into its memory: without room, a write is a SIGBUS that kills it.
    """
    try:
        tempfile.TemporaryFile(dir=folder).close()
        space = os.statvfs(folder)
    except OSError:
        return False
    return not space.f_blocks or space.f_bavail * space.f_frsize >= 4 * 2**20  # 0: unlimited


# The root file system is read-only, and a write to a disk can block.
memory = "/dev/shm" if has_room("/dev/shm") else None  # noqa: S108

# prometheus_client reads the variable when it is imported. On SIGHUP this file is read again.
started = "prometheus_client" in sys.modules
if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
    try:
        made, master = tempfile.mkdtemp(prefix="email-processor-", dir=memory), os.getpid()
    except OSError:
        sys.exit("Neither /dev/shm nor a temporary folder (TMPDIR) can be written.")
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = made

    def remove() -> None:
        if os.getpid() == master:  # workers run exit handlers too
            shutil.rmtree(made, ignore_errors=True)

    atexit.register(remove)
metrics = Path(os.environ["PROMETHEUS_MULTIPROC_DIR"])
with suppress(OSError):
    metrics.mkdir(parents=True, exist_ok=True)
if not started and not has_room(metrics):
    sys.exit(f"PROMETHEUS_MULTIPROC_DIR: {metrics} must be a writable folder with 4 MiB free.")

from prometheus_client.multiprocess import mark_process_dead

import app
import worker

settings = app.Settings.from_environ(os.environ)

# Many systems give a process 1,024 files until it asks for more.
hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
with suppress(ValueError, OSError):  # macOS reports no limit, and then does not accept that
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]

wsgi_app = "app:create_app()"
# The address of IPv6 takes IPv4 too.
bind = f"{'[::]' if socket.has_dualstack_ipv6() else '0.0.0.0'}:{settings.port}"
workers = settings.gunicorn_workers
threads = settings.gunicorn_threads
# Each worker has its own listening socket, and Linux spreads connections evenly over them. A
# single worker uses the master's, in which connections wait while the worker is replaced.
reuse_port = workers > 1 and sys.platform == "linux"
# Of a worker, idle ones included. Calls of AWS need files too.
worker_connections = max(threads + 1, min(2000, files - 128))
# Loaded once, before the fork: workers share its memory, and a bad release fails at the start.
preload_app = True
# Longer than the ALB's idle limit of 60 s. Were it shorter, the ALB would now and then send a
# request on a connection that is just being closed, and respond with 502.
keepalive = 75
# Kubernetes' grace period counts from the preStop sleep on and must exceed both together.
graceful_timeout = 25
# Recycling workers would close connections for nothing.
max_requests = 0
worker_tmp_dir = memory  # of the heartbeat
control_socket_disable = True
accesslog = None
logconfig_dict = app.logging_config(settings.log_level)
logging.captureWarnings(True)  # every line is JSON
# As much as each header may have.
limit_request_line = 8190
# No header of a proxy changes path or scheme. With "*" Gunicorn need not parse the peer's address.
forwarded_allow_ips = "*"
secure_scheme_headers: dict[str, str] = {}
forwarder_headers = ""


class Logger(glogging.Logger):  # type: ignore[misc]
    def __init__(self, cfg: Any) -> None:
        """Called once, in the master, before Gunicorn writes its first line."""
        super().__init__(cfg)
        app.log_start(settings, workers, threads)

    def info(self, msg: str, *arguments: Any, **options: Any) -> None:
        if msg.startswith("Listening at") and not arguments[0]:
            # With reuse_port the workers have the sockets, and the master has none to name.
            arguments = (bind, *arguments[1:])
        super().info(msg, *arguments, **options)

    def access(self, *_: Any) -> None:
        """Do nothing: app.py writes a line for each request."""


logger_class = Logger
worker_class = worker.Worker


# --- Hooks ----------------------------------------------------------------------------------------


def on_starting(server: Any) -> None:
    # Workers with reuse_port would share the port with another service unnoticed.
    server.cfg.set("reuse_port", False)
    close_sockets(create_sockets(server.cfg, server.log))
    server.cfg.set("reuse_port", reuse_port)
    # The port is free, so no other instance uses the folder. The master's own files are removed
    # too: its gauges would count beside the workers'.
    for file in metrics.glob("*.db"):
        file.unlink()
    # A new worker has the master's signal handlers at first. They would swallow a SIGTERM, and the
    # master would wait for the worker until the graceful timeout.
    stop = {signal.SIGTERM}
    os.register_at_fork(
        before=partial(signal.pthread_sigmask, signal.SIG_BLOCK, stop),
        after_in_parent=partial(signal.pthread_sigmask, signal.SIG_UNBLOCK, stop),
    )


def when_ready(server: Any) -> None:
    murder, called_at, spared_until = server.murder_workers, [time.monotonic()], [0.0]
    parent = os.environ.get("STOP_WITH_PROCESS")  # of app.py, with the embedded AWS

    def murder_workers() -> None:
        if parent and os.getppid() != int(parent):
            os.kill(os.getpid(), signal.SIGINT)
        # Called every second. After a pause of the container, as in a live migration, give the
        # workers one timeout to send a heartbeat.
        now = time.monotonic()
        if now - called_at[0] > 5:
            spared_until[0] = now + server.cfg.timeout
        called_at[0] = now
        if now >= spared_until[0]:
            murder()

    server.murder_workers = murder_workers
    # The workers' garbage collectors would copy 4 MiB of the master's pages when they visit them.
    gc.collect()
    gc.freeze()


def post_fork(server: Any, worker: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    for handler in logging.getLogger().handlers:
        if isinstance(handler, app.LogHandler):
            handler.start()
    app.TOKEN_READ_TIMESTAMP.set(0)  # this makes the worker's files, with all series
    app.BUILD_INFO.set(1)


def post_worker_init(worker: Any) -> None:
    worker.wsgi.start()


def worker_exit(server: Any, worker: Any) -> None:
    # The master also calls this, for a worker that it finds dead.
    wsgi = getattr(worker, "wsgi", None)
    if tracing := getattr(wsgi, "tracing", None):
        tracing.stop()


def child_exit(server: Any, worker: Any) -> None:
    mark_process_dead(worker.pid)  # type: ignore[no-untyped-call]
