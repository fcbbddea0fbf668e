"""The clients of docs/clients.md, each run as printed there."""

from __future__ import annotations

import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from client import DATA
from fake_aws import TOKEN, FakeAws
from service import WAIT, ServiceProcess, clean_environment, eventually
from test_documentation import page, section


def code_blocks(text: str) -> dict[str, str]:
    return dict(re.findall(r"^```(bash|python|javascript)\n(.*?)^```$", text, re.M | re.S))


CLIENTS = code_blocks(page("clients"))
# Command that must be installed, program, and suffix of its files.
TOOLS = {
    "bash": ("curl", "bash", "sh"),
    "python": (sys.executable, sys.executable, "py"),
    "javascript": ("node", "node", "mjs"),
}
INSTALLED = [language for language, (tool, *_) in TOOLS.items() if shutil.which(tool)]
NEEDS = {
    language: pytest.mark.skipif(language not in INSTALLED, reason=f"{tool} is not installed")
    for language, (tool, *_) in TOOLS.items()
}
LANGUAGES = [pytest.param(language, marks=mark) for language, mark in NEEDS.items()]


def start(language: str, code: str, folder: Path, **variables: str) -> subprocess.Popen[str]:
    _, program, suffix = TOOLS[language]
    folder.mkdir(parents=True)
    (folder / f"client.{suffix}").write_text(code, "utf-8")
    return subprocess.Popen(
        [program, f"client.{suffix}"],
        cwd=folder,
        env=clean_environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end(client: subprocess.Popen[str]) -> tuple[int, str]:
    """The client's exit status and output."""
    try:
        output, _ = client.communicate(timeout=2 * WAIT)
    finally:
        client.kill()
        client.wait()
    return client.returncode, output


@pytest.fixture(scope="module")
def service(
    fake_aws_process: FakeAws, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[ServiceProcess, dict[str, str]]]:
    """A service on the fake AWS, and the variables that lead a client to it."""
    folder = tmp_path_factory.mktemp("service") / "tmp"
    with ServiceProcess(
        folder, {**fake_aws_process.variables(), "GUNICORN_WORKERS": "1"}
    ) as running:
        url = f"http://127.0.0.1:{running.port}"
        yield running, {"API_URL": url, "API_TOKEN": TOKEN}


def requests_with(service: ServiceProcess, outcome: str) -> int:
    metrics = service.get("/metrics").body.decode()
    found = re.search(
        rf'^email_processor_requests_total{{outcome="{outcome}"}} (\d+)', metrics, re.M
    )
    assert found
    return int(found[1])


@NEEDS["bash"]
def test_first_command_queues_the_message_that_it_shows(
    service: tuple[ServiceProcess, dict[str, str]], fake_aws: FakeAws, tmp_path: Path
) -> None:
    url = service[1]["API_URL"]
    code = code_blocks(section("POST /process"))["bash"].replace("http://localhost:8080", url)
    status, output = end(start("bash", code, tmp_path / "client"))
    assert status == 0, output
    (message,) = fake_aws.messages()
    assert message["message_id"] in output
    assert json.loads(message["body"]) == DATA


@pytest.mark.parametrize("language", LANGUAGES)
def test_client_queues_its_message(
    language: str, service: tuple[ServiceProcess, dict[str, str]], fake_aws: FakeAws, tmp_path: Path
) -> None:
    status, output = end(start(language, CLIENTS[language], tmp_path / "client", **service[1]))
    assert status == 0, output
    (message,) = fake_aws.messages()
    assert message["message_id"] in output
    assert message["attributes"]["IdempotencyKey"] == "order-1843"
    assert json.loads(message["body"]).keys() == DATA.keys()


@pytest.mark.parametrize("language", LANGUAGES)
def test_client_shows_the_errors_of_its_fields(
    language: str, service: tuple[ServiceProcess, dict[str, str]], fake_aws: FakeAws, tmp_path: Path
) -> None:
    running, variables = service
    before = requests_with(running, "invalid_data")
    code = CLIENTS[language].replace('"John doe"', '""')
    status, output = end(start(language, code, tmp_path / "client", **variables))
    assert status != 0
    assert '"errors": [{"field": "email_sender", "message": "email_sender is empty"}]' in output
    assert requests_with(running, "invalid_data") == before + 1
    assert fake_aws.messages() == []


@pytest.mark.slow
def test_clients_outlast_an_unavailable_queue(
    service: tuple[ServiceProcess, dict[str, str]], fake_aws: FakeAws, tmp_path: Path
) -> None:
    running, variables = service
    rejected = requests_with(running, "queue_unavailable") + len(INSTALLED)
    fake_aws.set(faults={"SQS": {"kind": "error", "status": 503, "code": "ServiceUnavailable"}})
    clients = [start(name, CLIENTS[name], tmp_path / name, **variables) for name in INSTALLED]
    try:
        eventually(lambda: requests_with(running, "queue_unavailable") >= rejected)
    finally:
        fake_aws.set(faults={})
        ends = [end(client) for client in clients]
    assert [status for status, _ in ends] == [0] * len(clients), ends
    queued = {message["message_id"] for message in fake_aws.messages()}
    assert len(queued) == len(clients)
    assert all(any(queued_id in output for queued_id in queued) for _, output in ends)


# --- Responses of the load balancer ---------------------------------------------------------------


class Balancer(http.server.ThreadingHTTPServer):
    """Gives each path's responses in turn; repeats the last."""

    daemon_threads = True

    def __init__(self, responses: dict[str, list[tuple[int, dict[str, str], str]]]) -> None:
        super().__init__(("127.0.0.1", 0), BalancerHandler)
        self.responses = responses
        self.requests: dict[str, list[tuple[str | None, bytes]]] = defaultdict(list)

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that close their connection."""


class BalancerHandler(http.server.BaseHTTPRequestHandler):
    server: Balancer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        requests = self.server.requests[self.path]
        requests.append((self.headers["Idempotency-Key"], body))
        responses = self.server.responses[self.path]
        status, headers, text = responses[min(len(requests), len(responses)) - 1]
        if not status:  # the connection closes without a response
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(text))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


SOON = {"Retry-After": "1"}
RECOVERS = [
    (502, {}, "<html><body>502 Bad Gateway</body></html>"),
    (0, {}, ""),
    (408, SOON, '{"status": "error", "error": "request_timeout"}'),
    (429, SOON, '{"status": "error", "message": "Too many requests."}'),
    (200, {}, '{"status": "success", "message": "queued", "message_id": "id-1"}'),
]
STAYS_DOWN = [(504, SOON, "<html><body>504 Gateway Time-out</body></html>")]


@pytest.mark.slow
def test_clients_send_a_request_five_times_at_most(tmp_path: Path) -> None:
    kinds = {"recovers": RECOVERS, "stays-down": STAYS_DOWN}
    ways = [(kind, language) for kind in kinds for language in INSTALLED]
    balancer = Balancer({f"/{kind}/{name}/process": kinds[kind] for kind, name in ways})
    thread = threading.Thread(target=balancer.serve_forever, args=(0.05,))
    thread.start()
    try:
        clients = {}
        for kind, name in ways:
            url = f"http://127.0.0.1:{balancer.server_port}/{kind}/{name}"
            variables = {"API_URL": url, "API_TOKEN": TOKEN}
            clients[kind, name] = start(name, CLIENTS[name], tmp_path / kind / name, **variables)
        ends = {way: end(client) for way, client in clients.items()}
    finally:
        balancer.shutdown()
        balancer.server_close()
        thread.join()
    for (kind, name), (status, output) in ends.items():
        recovers = kind == "recovers"
        assert (status == 0) is recovers, (name, output)
        assert ("id-1" if recovers else "Gateway Time-out") in output
        requests = balancer.requests[f"/{kind}/{name}/process"]
        assert len(requests) == 5, name
        assert len(set(requests)) == 1
        assert requests[0][0] == "order-1843"
