"""A real Gunicorn process, an emulated AWS, and a client that speaks HTTP byte by byte."""

from __future__ import annotations

import dataclasses
import http.client
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import boto3
import pytest
from fake_aws import FakeAws
from moto.server import ThreadedMotoServer

PROJECT = Path(__file__).parent.parent
sys.path.insert(0, str(PROJECT))

import app  # noqa: E402 - the path comes first

# What the caller's shell has set for other things must not reach a test, nor what it starts.
SETTINGS = {field.name.upper() for field in dataclasses.fields(app.Settings)}
FOREIGN = (
    *("AWS_", "API_", "FORWARDED_", "GUNICORN_", "OTEL_", "PIP_", "PROMETHEUS_", "PYTHON", "UV_"),
    "WEB_",
)
for name in list(os.environ):
    if name in SETTINGS or name.startswith(FOREIGN) or name.lower().endswith("_proxy"):
        del os.environ[name]

# A background shell and nohup ignore these, and children would too: a handler is not inherited.
for ignored in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(ignored) is signal.SIG_IGN:
        signal.signal(ignored, lambda *_: None)

TOKEN = "$DJISA<$#45ex3RtYr"
PARAMETER = "/email-service/api-token"
DATA = {
    "email_subject": "Happy new year!",
    "email_sender": "John doe",
    "email_timestream": "1693561101",
    "email_content": "Just want to say... Happy new year!!!",
}
BODY = json.dumps({"data": DATA, "token": TOKEN}).encode()
WAIT = 60.0  # seconds; nothing here takes a tenth of it, so it is only for what hangs


def eventually(check: Callable[[], Any], seconds: float = WAIT) -> Any:
    """The first true value of `check`, asked again and again."""
    end = time.monotonic() + seconds
    while not (value := check()):
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.02)
    return value


# --- Client ---------------------------------------------------------------------------------------


@dataclass
class Answer:
    status: int
    headers: http.client.HTTPMessage | dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        return str(self.json["error"])

    def check(self) -> Answer:
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

    def answer(self, method: str = "GET") -> Answer:
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
        return Answer(status, headers, body).check()

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


# --- Service --------------------------------------------------------------------------------------


def free_port() -> int:
    """A port that no other process gets until the tests end.

    A socket is bound to it that does not listen: with SO_REUSEADDR on both, Gunicorn still can.
    """
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", 0))
    port = int(sock.getsockname()[1])
    sock.detach()  # it stays open
    return port


def is_listening(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=WAIT):
        return True
    return False


def environment(**variables: str) -> dict[str, str]:
    """Nothing of the caller's own configuration but what starts a process."""
    keep = ("PATH", "HOME", "LANG", "COVERAGE_PROCESS_CONFIG")
    kept = {name: os.environ[name] for name in keep if name in os.environ}
    return {**kept, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", **variables}


def gunicorn(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "gunicorn", *arguments]


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def has_booted(worker: int) -> bool:
    """Whether it heeds signals by itself: a fork has its master's handlers at first."""
    caught = re.search(r"^SigCgt:\s*(\w+)$", Path(f"/proc/{worker}/status").read_text(), re.M)
    return bool(caught) and not int(caught[1], 16) >> (signal.SIGHUP - 1) & 1


def metrics_folder(pid: int) -> Path:
    """Where a process keeps the files of its metrics: it has them in its memory."""
    (folder,) = set(
        re.findall(r" (/\S+)/[^/\s]+\.db$", Path(f"/proc/{pid}/maps").read_text(), re.M)
    )
    return Path(folder)


@dataclass
class Service:
    """`gunicorn` in the project's folder, as in production."""

    temporary: Path
    variables: dict[str, str]
    command: Sequence[str] = field(default_factory=gunicorn)
    folder: Path = PROJECT
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] = field(init=False)

    def __enter__(self) -> Service:
        self.temporary.mkdir(parents=True)
        with self._output("stdout").open("wb") as out, self._output("stderr").open("wb") as err:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.folder,
                env=environment(PORT=str(self.port), TMPDIR=str(self.temporary), **self.variables),
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        try:
            eventually(self._answers)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self, seconds: float = WAIT) -> float:
        """Ask it to stop, and return how many seconds that took."""
        begin = time.monotonic()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()  # the workers see that their parent is gone
            self.process.wait(seconds)
            raise
        return time.monotonic() - begin

    def _answers(self) -> bool:
        assert self.process.poll() is None, self.errors()
        # All, as the connections of a load stay with the workers that are there when it begins.
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

    def ask(self, *parts: bytes) -> Answer:
        """The answer to one request on a connection of its own."""
        with self.connect() as client:
            return client.send(*parts).answer()

    def get(self, path: str) -> Answer:
        return self.ask(request_head("GET", path, "Connection: close"))

    def metrics(self) -> dict[str, float]:
        """The samples of /metrics, by name and labels as they stand there."""
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


# --- Fixtures -------------------------------------------------------------------------------------


@dataclass
class Aws:
    """moto's server, with the queue and the token."""

    endpoint: str
    sqs: Any
    queue_url: str

    def variables(self, **more: str) -> dict[str, str]:
        return {"AWS_ENDPOINT_URL": self.endpoint, "SQS_QUEUE_URL": self.queue_url, **more}

    def receive(self) -> list[dict[str, Any]]:
        """Take what is in the queue out of it."""
        found: list[dict[str, Any]] = []
        while messages := self.sqs.receive_message(
            QueueUrl=self.queue_url, MaxNumberOfMessages=10, MessageAttributeNames=["All"]
        ).get("Messages"):
            for message in messages:
                self.sqs.delete_message(
                    QueueUrl=self.queue_url, ReceiptHandle=message["ReceiptHandle"]
                )
            found += messages
        return found


@pytest.fixture(scope="session")
def aws() -> Iterator[Aws]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    session = boto3.Session("test", "test", region_name="us-west-1")
    with ExitStack() as stack:
        stack.callback(server.stop)
        ssm = session.client("ssm", endpoint_url=endpoint)
        stack.callback(ssm.close)
        sqs = session.client("sqs", endpoint_url=endpoint)
        stack.callback(sqs.close)
        ssm.put_parameter(Name=PARAMETER, Value=TOKEN, Type="SecureString")
        queue_url = sqs.create_queue(QueueName="dev-CP-queue")["QueueUrl"]
        yield Aws(endpoint, sqs, queue_url)


@pytest.fixture(scope="session")
def fake_process() -> Iterator[FakeAws]:
    with FakeAws() as fake:
        yield fake


@pytest.fixture
def fake(fake_process: FakeAws) -> FakeAws:
    """An AWS that fails on command and knows what it took; healthy and empty at first."""
    fake_process.set(latency_ms=8, faults={}, parameters={PARAMETER: TOKEN})
    fake_process.forget()
    return fake_process


class NameServer:
    """The only one that a service knows: it says 127.0.0.1 for every name, unless it is silent."""

    def __init__(self, folder: Path) -> None:
        self.silent, self.asked = False, 0
        self._sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        address = f"127.77.{os.getpid() >> 8 & 255}.{os.getpid() & 255}"
        try:
            self._sock.bind((address, 53))
        except OSError as error:
            pytest.skip(f"needs the right to listen on port 53: {error}")
        resolv = folder / "resolv.conf"
        resolv.write_text(f"nameserver {address}\n")
        # The file takes the place of the machine's own in a mount namespace of the service's.
        mount = f'mount --bind {resolv} "$(readlink -f /etc/resolv.conf)" && exec "$@"'
        self.command = ("unshare", "--mount", "sh", "-c", mount, "sh")
        try:
            subprocess.run([*self.command, "true"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"needs a mount namespace: {error}")
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        self._sock.sendto(b"", self._sock.getsockname())  # wakes the thread
        self._thread.join()
        self._sock.close()

    def _serve(self) -> None:
        while question := self._sock.recvfrom(512):
            query, client = question
            if not query:
                return
            self.asked += 1
            if self.silent:
                continue
            end = query.index(b"\0", 12) + 5
            is_ipv4 = query[end - 4 : end - 2] == b"\0\1"
            head = query[:2] + b"\x81\x80\0\1" + (b"\0\1" if is_ipv4 else b"\0\0") + b"\0\0\0\0"
            answer = b"\xc0\x0c\0\1\0\1\0\0\0\0\0\4\x7f\0\0\1" if is_ipv4 else b""
            self._sock.sendto(head + query[12:end] + answer, client)


@pytest.fixture
def name_server(tmp_path: Path) -> Iterator[NameServer]:
    server = NameServer(tmp_path)
    yield server
    server.close()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the failure modes in their long form")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        long = [item for item in items if item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]


@pytest.fixture
def full(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--full"))


@pytest.fixture
def figures(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Note what a test has measured, for the end of the run: no verdict hangs on it."""

    def note(title: str, *parts: object) -> None:
        record_property("figures", f"{title}: {'; '.join(map(str, parts))}")

    return note


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    noted = [
        f"{value} [{report.nodeid.rpartition('::')[2]}]"
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", "") == "teardown"  # it has what all phases have noted
        for name, value in report.user_properties
        if name == "figures"
    ]
    if noted:
        terminalreporter.section("figures")
        for line in noted:
            terminalreporter.write_line(line)


StartService = Callable[..., Service]


def kill(pid: int) -> None:
    """By process id: a worker that the test's own service has started."""
    os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def start_service(aws: Aws, tmp_path_factory: pytest.TempPathFactory) -> StartService:
    """Make a service that is not started yet: use it in a `with`."""
    if find_spec("fcntl") is None:
        pytest.skip("Gunicorn needs POSIX")

    def make(**variables: str) -> Service:
        folder = tmp_path_factory.mktemp("service") / "tmp"
        return Service(folder, aws.variables(**variables))

    return make
