"""The service in a separate process: Gunicorn as in production, or another command."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from client import WAIT, Client, Response, request_head

PROJECT = Path(__file__).parent.parent


def eventually(check: Callable[[], Any], seconds: float = WAIT) -> Any:
    """Call `check` until its value is true, and return that value."""
    end = time.monotonic() + seconds
    while not (value := check()):
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.02)
    return value


def free_port() -> int:
    """A port that no other process gets until the tests end.

    A socket stays bound to it without listening. SO_REUSEADDR lets Gunicorn bind to it too.
    """
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", 0))
    port = int(sock.getsockname()[1])
    sock.detach()  # leaves it open
    return port


def is_listening(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=WAIT):
        return True
    return False


def clean_environment(**variables: str) -> dict[str, str]:
    """Environment of a child process: the variables, and those of the caller that a start needs."""
    keep = ("PATH", "HOME", "LANG", "COVERAGE_PROCESS_CONFIG")
    kept = {name: os.environ[name] for name in keep if name in os.environ}
    return {**kept, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", **variables}


def gunicorn(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "gunicorn", *arguments]


def run_gunicorn(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Gunicorn where it is expected to end by itself."""
    return subprocess.run(
        arguments or gunicorn(),
        cwd=PROJECT,
        env=clean_environment(SQS_QUEUE_URL="http://sqs/queue", **variables),
        capture_output=True,
        text=True,
        timeout=WAIT,
    )


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def has_booted(worker: int) -> bool:
    """Whether the worker has its own signal handlers: a fork has its master's at first."""
    caught = re.search(r"^SigCgt:\s*(\w+)$", Path(f"/proc/{worker}/status").read_text(), re.M)
    return bool(caught) and not int(caught[1], 16) >> (signal.SIGHUP - 1) & 1


def metrics_folder(pid: int) -> Path:
    """The folder of the process's metrics files, which are mapped into its memory."""
    (folder,) = set(
        re.findall(r" (/\S+)/[^/\s]+\.db$", Path(f"/proc/{pid}/maps").read_text(), re.M)
    )
    return Path(folder)


@dataclass
class ServiceProcess:
    """The service, started by `gunicorn` in the project's folder as in production."""

    temporary: Path
    variables: dict[str, str]
    command: Sequence[str] = field(default_factory=gunicorn)
    folder: Path = PROJECT
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] = field(init=False)

    def __enter__(self) -> ServiceProcess:
        self.temporary.mkdir(parents=True)
        with self._output("stdout").open("wb") as out, self._output("stderr").open("wb") as err:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.folder,
                env=clean_environment(
                    PORT=str(self.port), TMPDIR=str(self.temporary), **self.variables
                ),
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        try:
            eventually(self._is_ready)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self, seconds: float = WAIT) -> float:
        """Send SIGTERM, wait for the end, and return the seconds that it took."""
        begin = time.monotonic()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()  # the workers notice that their parent has ended
            self.process.wait(seconds)
            raise
        return time.monotonic() - begin

    def _is_ready(self) -> bool:
        assert self.process.poll() is None, self.errors()
        # All workers: the connections of a load stay with those that exist when it begins.
        workers = self.workers()
        if len(workers) < int(self.variables.get("GUNICORN_WORKERS", "4")):
            return False
        if not all(map(has_booted, workers)):
            return False
        try:
            return self.get("/health").status == 200
        except OSError:
            return False

    def _output(self, name: str) -> Path:
        return self.temporary / name

    def connect(self, host: str = "127.0.0.1", buffer: int = 0) -> Client:
        return Client(self.port, host, buffer)

    def request(self, *parts: bytes) -> Response:
        """Send one request on a new connection."""
        with self.connect() as client:
            return client.send(*parts).response()

    def get(self, path: str) -> Response:
        return self.request(request_head("GET", path, "Connection: close"))

    def metrics(self) -> dict[str, float]:
        """The samples of /metrics by name with labels, as /metrics writes them."""
        lines = self.get("/metrics").body.decode().splitlines()
        samples = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name: float(value) for name, _, value in samples}

    def log(self) -> list[dict[str, Any]]:
        """Every line of standard output; each must be JSON."""
        return [json.loads(line) for line in self._output("stdout").read_text().splitlines()]

    def errors(self) -> str:
        return self._output("stderr").read_text()

    def output(self) -> str:
        return self._output("stdout").read_text() + self.errors()

    def workers(self) -> list[int]:
        return children(self.process.pid)


StartService = Callable[..., ServiceProcess]


def kill(pid: int) -> None:
    """Kill a worker of the test's own service."""
    os.kill(pid, signal.SIGKILL)
