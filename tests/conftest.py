"""Fixtures: the service with Gunicorn, an emulated and a fake AWS, a name server."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

sys.path.insert(0, str(Path(__file__).parent.parent))
pytest.register_assert_rewrite("client", "load", "service")

from fake_aws import PARAMETER, TOKEN, FakeAws  # noqa: E402
from name_server import NameServer  # noqa: E402
from service import ServiceProcess, StartService  # noqa: E402

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
def fake_aws_process() -> Iterator[FakeAws]:
    with FakeAws() as fake:
        yield fake


@pytest.fixture
def fake_aws(fake_aws_process: FakeAws) -> FakeAws:
    """An AWS that fails on command and knows what it took; healthy and empty at first."""
    fake_aws_process.set(latency_ms=8, faults={}, parameters={PARAMETER: TOKEN})
    fake_aws_process.forget()
    return fake_aws_process


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


@pytest.fixture(scope="session")
def start_service(aws: Aws, tmp_path_factory: pytest.TempPathFactory) -> StartService:
    """Make a service that is not started yet: use it in a `with`."""
    if find_spec("fcntl") is None:
        pytest.skip("Gunicorn needs POSIX")

    def make(**variables: str) -> ServiceProcess:
        folder = tmp_path_factory.mktemp("service") / "tmp"
        return ServiceProcess(folder, aws.variables(**variables))

    return make
