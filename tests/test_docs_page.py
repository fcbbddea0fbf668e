"""/docs in a browser: its script runs within the page's policy, and sends a request."""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from client import DATA
from fake_aws import FakeAws
from service import WAIT, StartService, eventually, free_port, is_listening

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("chromedriver") is None, reason="chromedriver is not installed"
    ),
]
POST = "#operations-Messages-process"
ARGUMENTS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --disable-dev-shm-usage "
    "--window-size=1200,900 --proxy-server=direct://"
)


class Browser:
    """Headless Chromium, driven over the W3C's WebDriver protocol."""

    def __init__(self, folder: Path, port: int) -> None:
        self._port, self._session = port, ""
        options = {"args": [*ARGUMENTS.split(), f"--user-data-dir={folder}/profile"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        wanted |= {"timeouts": {"implicit": int(WAIT * 1000)}}
        session = self.command("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._session = f"/session/{session['sessionId']}"

    def command(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        with closing(http.client.HTTPConnection("127.0.0.1", self._port, timeout=2 * WAIT)) as to:
            to.request(method, self._session + path, json.dumps(body) if body is not None else None)
            response = to.getresponse()
            value = json.loads(response.read())["value"]
        assert response.status == 200, value
        return value

    def open(self, url: str) -> None:
        self.command("POST", "/url", {"url": url})

    def text(self, selector: str) -> str:
        """The visible text of the first element that the CSS selector finds, once it exists."""
        script = "return document.querySelector(arguments[0])?.innerText"
        body = {"script": script, "args": [selector]}
        return str(eventually(lambda: self.command("POST", "/execute/sync", body)))

    def click(self, selector: str) -> None:
        by = {"using": "css selector", "value": selector}
        (identifier,) = self.command("POST", "/element", by).values()
        self.command("POST", f"/element/{identifier}/click", {})

    def errors(self) -> list[str]:
        """The errors of scripts and violations of the page's policy that the browser logged."""
        return [entry["message"] for entry in self.command("POST", "/se/log", {"type": "browser"})]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    folder, port = tmp_path_factory.mktemp("browser"), free_port()
    with (folder / "chromedriver.log").open("w") as log:
        driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=log)
        try:
            eventually(lambda: is_listening(port))
            started = Browser(folder, port)
            yield started
            started.command("DELETE", "")
        finally:
            driver.terminate()
            driver.wait(WAIT)


@pytest.fixture(scope="module")
def url(start_service: StartService, fake_aws_process: FakeAws) -> Iterator[str]:
    with start_service(**fake_aws_process.variables(), GUNICORN_WORKERS="1") as service:
        yield f"http://127.0.0.1:{service.port}"


def test_page_sends_the_request_in_its_form(browser: Browser, url: str, fake_aws: FakeAws) -> None:
    browser.open(f"{url}/docs#/Messages/process")  # the link opens the operation
    browser.click(f"{POST} .try-out__btn")
    browser.click(f"{POST} .execute")
    shown = browser.text(f"{POST} .live-responses-table .response")
    (message,) = fake_aws.messages()
    assert shown.startswith("200")
    assert message["message_id"] in shown
    assert json.loads(message["body"]) == DATA
    assert browser.errors() == []
