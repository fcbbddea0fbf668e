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
from typing import ClassVar

import pytest
from client import DATA
from fake_aws import TOKEN, FakeAws
from pages import page, section
from service import WAIT, ServiceProcess, StartService, clean_environment


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
def service(start_service: StartService) -> Iterator[ServiceProcess]:
    """Gunicorn with one worker, for the tests of this file."""
    with start_service(GUNICORN_WORKERS="1") as running:
        yield running


def variables_for(service: ServiceProcess) -> dict[str, str]:
    return {"API_URL": f"http://127.0.0.1:{service.port}", "API_TOKEN": TOKEN}


@pytest.mark.skipif("bash" not in INSTALLED, reason="curl is not installed")
def test_first_command_queues_the_message_that_it_shows(
    service: ServiceProcess, fake_aws: FakeAws, tmp_path: Path
) -> None:
    command = code_blocks(section("POST /process"))["bash"]
    code = command.replace("http://localhost:8080", variables_for(service)["API_URL"])
    status, output = end(start("bash", code, tmp_path / "client"))
    assert status == 0, output
    (message,) = fake_aws.messages()
    assert message["message_id"] in output
    assert json.loads(message["body"]) == DATA


@pytest.mark.parametrize("language", TOOLS)
def test_client_queues_its_message_and_shows_the_error_of_a_field(
    language: str, service: ServiceProcess, fake_aws: FakeAws, tmp_path: Path
) -> None:
    if language not in INSTALLED:
        pytest.skip(f"{TOOLS[language][0]} is not installed")
    variables, code = variables_for(service), CLIENTS[language]
    rejected = 'email_processor_requests_total{outcome="invalid_data"}'
    before = service.metrics()[rejected]

    status, output = end(start(language, code, tmp_path / "valid", **variables))
    assert status == 0, output
    (message,) = fake_aws.messages()
    assert message["message_id"] in output
    assert message["attributes"]["IdempotencyKey"] == "order-1843"
    assert json.loads(message["body"]).keys() == DATA.keys()

    code = code.replace('"John doe"', '""')
    status, output = end(start(language, code, tmp_path / "invalid", **variables))
    assert status != 0
    assert '"errors": [{"field": "email_sender", "message": "email_sender is empty"}]' in output
    assert service.metrics()[rejected] == before + 1, "sent again"


SOON = {"Retry-After": "1"}
RESPONSES = {
    "recovers": [
        (502, {}, "<html><body>502 Bad Gateway</body></html>"),
        (0, {}, ""),
        (503, SOON, '{"status": "error", "error": "queue_unavailable"}'),
        (429, SOON, '{"status": "error", "message": "Too many requests."}'),
        (200, {}, '{"status": "success", "message": "queued", "message_id": "id-1"}'),
    ],
    "stays-down": [
        (408, SOON, '{"status": "error", "error": "request_timeout"}'),
        *[(504, SOON, "<html><body>504 Gateway Time-out</body></html>")] * 9,
    ],
}


class Balancer(http.server.BaseHTTPRequestHandler):
    """Sends the responses of RESPONSES in turn; each client has a separate path."""

    requests: ClassVar[dict[str, list[tuple[str | None, bytes]]]] = defaultdict(list)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        requests = self.requests[self.path]
        status, headers, text = RESPONSES[self.path.split("/")[1]][len(requests)]
        requests.append((self.headers["Idempotency-Key"], body))
        if not status:  # the connection closes without a response
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(text))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())


@pytest.mark.slow
def test_clients_send_a_request_five_times_at_most(tmp_path: Path) -> None:
    ways = [(kind, language) for kind in RESPONSES for language in INSTALLED]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Balancer) as balancer:
        threading.Thread(target=balancer.serve_forever, args=(0.05,)).start()
        try:
            clients = []
            for kind, name in ways:
                url = f"http://127.0.0.1:{balancer.server_port}/{kind}/{name}"
                variables = {"API_URL": url, "API_TOKEN": TOKEN}
                clients.append(start(name, CLIENTS[name], tmp_path / kind / name, **variables))
            ends = [end(client) for client in clients]
        finally:
            balancer.shutdown()
    for (kind, name), (status, output) in zip(ways, ends, strict=True):
        recovers = kind == "recovers"
        assert (status == 0) is recovers, (name, output)
        assert ("id-1" if recovers else "Gateway Time-out") in output
        requests = Balancer.requests[f"/{kind}/{name}/process"]
        assert len(requests) == 5, name
        assert len(set(requests)) == 1
        assert requests[0][0] == "order-1843"
