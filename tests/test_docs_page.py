"""/docs in a real browser: a newcomer reads the page, and tries the API from it."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from client import DATA
from fake_aws import TOKEN, FakeAws
from service import WAIT, StartService, eventually, free_port, is_listening

import app

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("chromedriver") is None, reason="chromedriver is not installed"
    ),
]
POST = "#operations-Messages-process"


ANSWER = f"{POST} .live-responses-table .response"
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
        session = self.ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._session = f"/session/{session['sessionId']}"

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        with closing(http.client.HTTPConnection("127.0.0.1", self._port, timeout=2 * WAIT)) as to:
            to.request(method, self._session + path, json.dumps(body) if body is not None else None)
            answer = to.getresponse()
            value = json.loads(answer.read())["value"]
        assert answer.status == 200, value
        return value

    def open(self, url: str) -> None:
        self.ask("POST", "/url", {"url": url})

    def text(self, selector: str) -> str:
        """What a person sees of the first element that the CSS selector finds, once it is there."""
        script = "return document.querySelector(arguments[0])?.innerText"
        body = {"script": script, "args": [selector]}
        return str(eventually(lambda: self.ask("POST", "/execute/sync", body)))

    def element(self, selector: str, action: str, **body: str) -> None:
        by = {"using": "css selector", "value": selector}
        (identifier,) = self.ask("POST", "/element", by).values()
        self.ask("POST", f"/element/{identifier}/{action}", body)

    def click(self, selector: str) -> None:
        self.element(selector, "click")

    def complaints(self) -> list[str]:
        """What the browser has logged: errors of scripts, and refusals of the page's policy."""
        return [entry["message"] for entry in self.ask("POST", "/se/log", {"type": "browser"})]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    folder, port = tmp_path_factory.mktemp("browser"), free_port()
    with (folder / "chromedriver.log").open("w") as log:
        driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=log)
        try:
            eventually(lambda: is_listening(port))
            started = Browser(folder, port)
            yield started
            started.ask("DELETE", "")
        finally:
            driver.terminate()
            driver.wait(WAIT)


@pytest.fixture(scope="module")
def url(start_service: StartService, fake_aws_process: FakeAws) -> Iterator[str]:
    with start_service(**fake_aws_process.variables(), GUNICORN_WORKERS="1") as service:
        yield f"http://127.0.0.1:{service.port}"


def test_page_explains_every_error_of_process(browser: Browser, url: str) -> None:
    browser.open(f"{url}/docs#/Messages/process")  # the link opens the operation
    shown = browser.text(f"{POST} .responses-wrapper")
    for code in app.ERRORS.keys() - {"not_found"}:
        assert re.search(rf"^\s*{code}\t", shown, re.M), code  # a row of a table
    assert browser.complaints() == []


def test_page_sends_what_is_typed_into_it(browser: Browser, url: str, fake_aws: FakeAws) -> None:
    browser.open(f"{url}/docs#/Messages/process")
    browser.click(f"{POST} .try-out__btn")
    browser.click(f"{POST} .execute")
    shown = browser.text(ANSWER)
    (message,) = fake_aws.messages()
    assert shown.startswith("200")
    assert message["message_id"] in shown
    assert json.loads(message["body"]) == DATA
    wrong = json.dumps({"data": {**DATA, "email_sender": ""}, "token": TOKEN})
    browser.element(f"{POST} .body-param__text", "clear")
    browser.element(f"{POST} .body-param__text", "value", text=wrong)
    browser.click(f"{POST} .execute")
    shown = eventually(lambda: (text := browser.text(ANSWER)).startswith("400") and text)
    assert "email_sender is empty" in shown
    assert len(fake_aws.messages()) == 1
