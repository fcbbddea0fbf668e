"""/docs in a real browser: a newcomer reads the page, and tries the API from it."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import DATA, TOKEN, WAIT, Service, eventually
from fake_aws import FakeAws

import app

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("chromedriver") is None, reason="chromedriver is not installed"
    ),
]
POST = "#operations-Messages-process"


class Browser:
    """Headless Chromium, driven over the W3C's WebDriver protocol."""

    ARGUMENTS = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
        "--disable-background-networking --disable-component-update --disable-dev-shm-usage "
        "--window-size=1200,900 --proxy-server=direct://"
    )

    def __init__(self, folder: Path) -> None:
        self._log = (folder / "chromedriver.log").open("w+")
        self._driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=self._log)
        try:
            self._port = int(eventually(self._announced_port))
            options = {"args": [*self.ARGUMENTS.split(), f"--user-data-dir={folder}/profile"]}
            wanted = {
                "goog:chromeOptions": options,
                "goog:loggingPrefs": {"browser": "ALL"},
                "timeouts": {"implicit": int(WAIT * 1000)},
            }
            session = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        except BaseException:
            self._stop_driver()
            raise
        self._session = f"/session/{session['sessionId']}"

    def _announced_port(self) -> str | None:
        text = Path(self._log.name).read_text()
        found = re.search(r"successfully on port ([0-9]+)", text)
        return found[1] if found else None

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=2 * WAIT)
        try:
            connection.request(method, path, json.dumps(body) if body is not None else None)
            answer = connection.getresponse()
            value = json.loads(answer.read())["value"]
        finally:
            connection.close()
        assert answer.status == 200, value
        return value

    def open(self, url: str) -> None:
        self._ask("POST", f"{self._session}/url", {"url": url})

    def text(self, selector: str) -> str:
        """What a person sees of the first element that the CSS selector finds, once it is there."""
        script = "return document.querySelector(arguments[0])?.innerText"
        body = {"script": script, "args": [selector]}
        return str(eventually(lambda: self._ask("POST", f"{self._session}/execute/sync", body)))

    def _element(self, selector: str) -> str:
        by = {"using": "css selector", "value": selector}
        (identifier,) = self._ask("POST", f"{self._session}/element", by).values()
        return f"{self._session}/element/{identifier}"

    def click(self, selector: str) -> None:
        self._ask("POST", f"{self._element(selector)}/click", {})

    def replace(self, selector: str, text: str) -> None:
        element = self._element(selector)
        self._ask("POST", f"{element}/clear", {})
        self._ask("POST", f"{element}/value", {"text": text})

    def complaints(self) -> list[str]:
        """What the browser has logged: errors of scripts, and refusals of the page's policy."""
        entries = self._ask("POST", f"{self._session}/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries]

    def stop(self) -> None:
        try:
            self._ask("DELETE", self._session)
        finally:
            self._stop_driver()

    def _stop_driver(self) -> None:
        self._driver.terminate()
        self._driver.wait(WAIT)
        self._log.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    started = Browser(tmp_path_factory.mktemp("browser"))
    yield started
    started.stop()


@pytest.fixture(scope="module")
def url(fake_process: FakeAws, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("service") / "tmp"
    with Service(folder, {**fake_process.environment(), "GUNICORN_WORKERS": "1"}) as service:
        yield f"http://127.0.0.1:{service.port}"


def test_page_explains_every_error_of_process(browser: Browser, url: str) -> None:
    browser.open(f"{url}/docs#/Messages/process")  # the link opens the operation
    shown = browser.text(f"{POST} .responses-wrapper")
    for code in app.ERRORS.keys() - {"not_found"}:
        assert re.search(rf"^\s*{code}\t", shown, re.M), code  # a row of a table
    assert browser.complaints() == []


def test_page_sends_what_is_typed_into_it(browser: Browser, url: str, fake: FakeAws) -> None:
    browser.open(f"{url}/docs#/Messages/process")
    browser.click(f"{POST} .try-out__btn")
    browser.click(f"{POST} .execute")
    shown = browser.text(f"{POST} .live-responses-table .response")
    (message,) = fake.messages()
    assert shown.startswith("200")
    assert message["message_id"] in shown
    assert json.loads(message["body"]) == DATA
    wrong = json.dumps({"data": {**DATA, "email_sender": ""}, "token": TOKEN})
    browser.replace(f"{POST} .body-param__text", wrong)
    browser.click(f"{POST} .execute")
    answer = f"{POST} .live-responses-table .response"
    shown = eventually(lambda: (text := browser.text(answer)).startswith("400") and text)
    assert '"error": "invalid_data"' in shown
    assert "email_sender is empty" in shown
    assert len(fake.messages()) == 1
