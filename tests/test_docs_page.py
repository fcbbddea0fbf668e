"""/docs in a browser: its script runs within the page's policy, and sends a request."""

from __future__ import annotations

import json
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from client import DATA, WAIT
from fake_aws import FakeAws
from service import StartService, eventually, free_port, is_listening

ARGUMENTS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --disable-dev-shm-usage "
    "--window-size=1200,900 --proxy-server=direct://"
)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromedriver"), reason="chromedriver is not installed")
def test_page_sends_the_request_in_its_form(
    start_service: StartService, fake_aws: FakeAws, tmp_path: Path
) -> None:
    port = free_port()
    session = f"http://127.0.0.1:{port}/session"

    def command(path: str, body: dict[str, Any]) -> Any:
        """A command of the W3C's WebDriver protocol; returns its value."""
        request = Request(session + path, json.dumps(body).encode())
        with urlopen(request, timeout=2 * WAIT) as response:
            return json.load(response)["value"]

    def click(selector: str) -> None:
        by = {"using": "css selector", "value": f"#operations-Messages-process {selector}"}
        (identifier,) = command("/element", by).values()
        command(f"/element/{identifier}/click", {})

    options = {
        "goog:chromeOptions": {"args": [*ARGUMENTS.split(), f"--user-data-dir={tmp_path}/profile"]},
        "goog:loggingPrefs": {"browser": "ALL"},
        "timeouts": {"implicit": int(WAIT * 1000)},
    }
    with start_service(GUNICORN_WORKERS="1") as service, (tmp_path / "log").open("w") as log:
        driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=log)
        try:
            eventually(lambda: is_listening(port))
            session += f"/{command('', {'capabilities': {'alwaysMatch': options}})['sessionId']}"
            # The link opens the operation.
            command("/url", {"url": f"http://127.0.0.1:{service.port}/docs#/Messages/process"})
            click(".try-out__btn")
            click(".execute")
            script = "return document.querySelector('.live-responses-table .response')?.innerText"
            shown = eventually(lambda: command("/execute/sync", {"script": script, "args": []}))
            errors = command("/se/log", {"type": "browser"})  # and violations of the page's policy
        finally:
            with suppress(OSError):  # otherwise the browser stays
                urlopen(Request(session, method="DELETE"), timeout=WAIT).close()
            driver.terminate()
            driver.wait(WAIT)
    (message,) = fake_aws.messages()
    assert shown.startswith("200")
    assert message["message_id"] in shown
    assert json.loads(message["body"]) == DATA
    assert errors == []
