"""Fixtures that several files use. Helpers are in the modules beside this one."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
pytest.register_assert_rewrite("client", "commands", "load", "pages", "service")

from client import Client  # noqa: E402
from commands import environment  # noqa: E402
from fake_aws import PARAMETER, TOKEN, FakeAws  # noqa: E402
from service import ServiceProcess, StartService, eventually, free_port, is_listening  # noqa: E402

import app  # noqa: E402 - the path comes first

# The caller's own configuration must not reach the tests, nor the processes that they start.
SETTINGS = {field.name.upper() for field in dataclasses.fields(app.Settings)}
FOREIGN = (
    *("AWS_", "API_", "FORWARDED_", "GUNICORN_", "OTEL_", "PIP_", "PROMETHEUS_", "PYTHON", "UV_"),
    "WEB_",
)
for name in list(os.environ):
    if name in SETTINGS or name.startswith(FOREIGN) or name.lower().endswith("_proxy"):
        del os.environ[name]

# A background shell and nohup ignore these, and children would too: a handler is not inherited.
for ignored in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
    if signal.getsignal(ignored) is signal.SIG_IGN:
        signal.signal(ignored, lambda *_: None)


@pytest.fixture(autouse=True)
def background_calls_end(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No call of AWS outlasts its test: its log lines would be another test's."""
    executors = []

    class KnownExecutor(ThreadPoolExecutor):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            executors.append(self)

    monkeypatch.setattr(app, "ThreadPoolExecutor", KnownExecutor)
    yield
    for executor in executors:
        executor.shutdown()


@pytest.fixture(scope="session")
def fake_aws_process() -> Iterator[FakeAws]:
    """The process behind `fake_aws`, for fixtures that outlive a test."""
    with FakeAws() as fake:
        yield fake


@pytest.fixture
def fake_aws(fake_aws_process: FakeAws) -> Iterator[FakeAws]:
    """SSM and SQS that fail on command and record every message; healthy and empty at first."""
    healthy = {"latency_ms": 8, "faults": {}, "parameters": {PARAMETER: TOKEN}}
    fake_aws_process.set(**healthy)
    fake_aws_process.forget()
    yield fake_aws_process
    fake_aws_process.set(**healthy)


@pytest.fixture(scope="session")
def start_service(
    fake_aws_process: FakeAws, tmp_path_factory: pytest.TempPathFactory
) -> StartService:
    """`with start_service(NAME=value, ...) as service:` runs Gunicorn in front of the fake AWS."""
    if find_spec("fcntl") is None:
        pytest.skip("Gunicorn needs POSIX")

    def make(**variables: str) -> ServiceProcess:
        folder = tmp_path_factory.mktemp("service") / "tmp"
        return ServiceProcess(folder, {**fake_aws_process.variables(), **variables})

    return make


@pytest.fixture
def emulator() -> Iterator[str]:
    """The URL of an emulated AWS."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    env, devnull = environment(COVERAGE_PROCESS_CONFIG=""), subprocess.DEVNULL
    with subprocess.Popen(command, env=env, stdout=devnull, stderr=devnull) as process:
        try:
            eventually(lambda: is_listening(port), 60)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


@pytest.fixture
def client(service: ServiceProcess) -> Iterator[Client]:
    """A connection to the `service` of the test's file."""
    with service.connect() as client:
        yield client


@pytest.fixture
def full(request: pytest.FixtureRequest) -> bool:
    """Whether --full asks for the long form of a test."""
    return bool(request.config.getoption("--full"))


@pytest.fixture
def figures(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Record measured figures for the end of the run. No verdict depends on them."""

    def record(title: str, *parts: object) -> None:
        record_property("figures", f"{title}: {'; '.join(map(str, parts))}")

    return record


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the failure modes in their long form")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    figures = [
        f"{value} [{report.nodeid.rpartition('::')[2]}]"
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", "") == "teardown"  # it has the properties of all phases
        for name, value in report.user_properties
        if name == "figures"
    ]
    if figures:
        terminalreporter.section("figures")
        for line in figures:
            terminalreporter.write_line(line)
