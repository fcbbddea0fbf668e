"""The specification of the service: a test for each promise, in the order of app.py's sections.

The service runs in the process of the tests, on fakes of AWS that fail on command.
"""

import dataclasses
import gzip
import hashlib
import hmac
import io
import json
import logging
import logging.config
import os
import random
import re
import socket
import string
import subprocess
import sys
import threading
import time
import tracemalloc
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from unittest.mock import Mock

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError
from werkzeug.test import EnvironBuilder, TestResponse, run_wsgi_app

import app

TOKEN = "$DJISA<$#45ex3RtYr"
DATA = {
    "email_subject": "Happy new year!",
    "email_sender": "John doe",
    "email_timestream": "1693561101",
    "email_content": "Just want to say... Happy new year!!!",
}
PARAMETER = "/email-service/api-token"
QUEUE_URL = "https://sqs.us-west-1.amazonaws.com/123456789012/dev-CP-queue"
TRACE_ID = "1-67891233-abcdef012345678912345678"
TRACE = f"Root={TRACE_ID}"


def request_body(data: Any = DATA, token: Any = TOKEN) -> bytes:
    return json.dumps({"data": data, "token": token}).encode()


def body_with_data(source: str) -> bytes:
    """A request body whose data is this JSON text."""
    return f'{{"token": {json.dumps(TOKEN)}, "data": {source}}}'.encode()


BODY = request_body()


# --- Fakes of AWS ---------------------------------------------------------------------------------


class ManualExecutor(Executor):
    """Runs each task at once, in the caller's thread; while `holds`, when the test says so."""

    def __init__(self) -> None:
        self.holds = False
        self.held = SimpleQueue[Callable[[], None]]()

    def submit(self, task: Any, /, *arguments: Any, **_: Any) -> Future[Any]:
        future = Future[Any]()

        def run() -> None:
            try:
                future.set_result(task(*arguments))
            except Exception as error:
                future.set_exception(error)

        if self.holds:
            self.held.put(run)
        else:
            run()
        return future

    def run_next(self) -> None:
        """Run the next task that is held, once it is submitted."""
        self.held.get(timeout=20)()


def raised_or_returned(response: Any) -> Any:
    if isinstance(response, Exception):
        raise response
    return response


class FakeSsm:
    """A Parameter Store with these values. A `response` replaces them; an exception is raised."""

    def __init__(self, response: Any = None, **values: str) -> None:
        self.response = response
        self.values = values or {PARAMETER: TOKEN}
        self.reads = 0

    def get_parameters(self, Names: list[str], WithDecryption: bool) -> Any:  # noqa: N803
        self.reads += 1
        assert WithDecryption
        if self.response is not None:
            return raised_or_returned(self.response)
        found = [
            {"Name": name, "Type": "SecureString", "Value": self.values[name]}
            for name in Names
            if name in self.values
        ]
        missing = [name for name in Names if name not in self.values]
        return {"Parameters": found, "InvalidParameters": missing}


def queue_limit(size: str) -> dict[str, Any]:
    """The response of GetQueueAttributes."""
    return {"Attributes": {"MaximumMessageSize": size}}


class FakeSqs:
    """A queue that records its messages. Its responses are returned; an exception is raised."""

    def __init__(self, sent: Any = None, attributes: Any = None) -> None:
        self.sent = {"MessageId": "6e5f0a2b"} if sent is None else sent
        self.attributes = queue_limit("1048576") if attributes is None else attributes
        self.messages: list[dict[str, Any]] = []
        self.calls = 0

    def get_queue_attributes(self, **_: Any) -> Any:
        self.calls += 1
        return raised_or_returned(self.attributes)

    def send_message(self, **message: Any) -> Any:
        self.calls += 1
        self.messages.append(message)
        return raised_or_returned(self.sent)


def client_error(code: str, text: str = "as AWS puts it") -> ClientError:
    return ClientError(
        {"Error": {"Code": code, "Message": text}, "ResponseMetadata": {"HTTPStatusCode": 400}},
        "Operation",
    )


DOWN = EndpointConnectionError(endpoint_url="https://aws.invalid")
DENIED = client_error("AccessDeniedException")
NO_PARAMETER = {"Parameters": [], "InvalidParameters": [PARAMETER]}


# --- The service, and its client ------------------------------------------------------------------


class InProcessService:
    """The service on fakes of AWS, without a server in front."""

    def __init__(self, ssm: Any = None, sqs: Any = None, **settings: Any) -> None:
        self.ssm, self.sqs = ssm or FakeSsm(), sqs or FakeSqs()
        self.executor, self.now = ManualExecutor(), 1000.0
        self.app = app.create_app(
            app.Settings(**{"sqs_queue_url": QUEUE_URL, **settings}),
            ssm=self.ssm,
            sqs=self.sqs,
            executor=self.executor,
            clock=lambda: self.now,
            pause=lambda _: None,
        )

    def request(self, method: str, path: str, **options: Any) -> TestResponse:
        client = self.app.test_client(use_cookies=False)  # a new one: threads may not share it
        return client.open(path, method=method, **options)

    def get(self, path: str, **options: Any) -> TestResponse:
        return self.request("GET", path, **options)

    def post(self, body: bytes = BODY, **options: Any) -> TestResponse:
        options = {"content_type": "application/json", **options}
        return self.request("POST", "/process", data=body, **options)

    def post_stream(self, stream: Any, length: int | None) -> TestResponse:
        """A POST as Gunicorn passes it to the application; without a length, chunked."""
        environ = {"wsgi.input": stream, "wsgi.input_terminated": True}
        framing = {"CONTENT_LENGTH": str(length)} if length else {}
        framing = framing or {"HTTP_TRANSFER_ENCODING": "chunked"}
        return self.post(b"", environ_overrides=environ | framing)

    def rejected(self, code: str, body: bytes = BODY, **options: Any) -> dict[str, Any]:
        """The error of a POST that is rejected with this code before SQS is called."""
        error = error_of(self.post(body, **options), code)
        assert not self.sqs.messages
        return error

    def is_valid(self, token: str) -> bool:
        """Whether the service accepts the token, by a request without data."""
        code = self.post(request_body(None, token)).get_json()["error"]
        assert code in ("invalid_data", "invalid_token"), code
        return bool(code == "invalid_data")

    def metrics(self) -> dict[str, float]:
        lines = self.get("/metrics").get_data(as_text=True).splitlines()
        samples = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {n.removeprefix("email_processor_"): float(value) for n, _, value in samples}

    def metric_changes(self, before: dict[str, float]) -> dict[str, float]:
        """The samples of /metrics that differ from those before, with the difference."""
        now = self.metrics()
        return {name: now[name] - before[name] for name in now if now[name] != before[name]}


def attributes_of(message: dict[str, Any]) -> dict[str, str]:
    assert all(value["DataType"] == "String" for value in message["MessageAttributes"].values())
    return {name: value["StringValue"] for name, value in message["MessageAttributes"].items()}


@pytest.fixture
def service() -> InProcessService:
    """The service on healthy fakes of SSM and SQS."""
    return InProcessService()


def error_of(response: TestResponse, code: str) -> dict[str, Any]:
    """The body of an error response, checked against the promises for every error."""
    body = response.get_json()
    assert (response.status_code, body["error"]) == (app.ERRORS[code][0], code), body
    assert response.mimetype == "application/json"
    assert set(body) - {"errors"} == {"status", "error", "message", "request_id"}
    assert body["status"] == "error"
    assert body["message"]
    assert body["request_id"] == response.headers["X-Request-Id"]
    challenge = response.headers.get("WWW-Authenticate", "")
    assert challenge.startswith("Token ") == (response.status_code == 401)
    retry_after = int(response.headers.get("Retry-After", 0))
    assert (retry_after > 0) == (response.status_code == 503)
    return dict(body)


LogLines = Callable[[], list[dict[str, Any]]]
CaptureLog = Callable[[str], LogLines]


@pytest.fixture
def capture_log(capsys: pytest.CaptureFixture[str]) -> Iterator[CaptureLog]:
    """Configures logging for a LOG_LEVEL, as Gunicorn does. Returns a function for new lines."""
    names = ["", "email_processor", "gunicorn.error", "botocore"]
    loggers = [logging.getLogger(name) for name in names]
    before = [(logger, logger.level, logger.handlers[:]) for logger in loggers]

    def start(level: str) -> LogLines:
        logging.config.dictConfig(app.logging_config(level))
        return lambda: [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    yield start
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers


# --- Settings -------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_specification() -> None:
    defaults = ("us-west-1", (PARAMETER,), 8080, 4, 2, 2_097_152, 5, 8, 60, "INFO")
    settings = app.Settings.from_environ({"SQS_QUEUE_URL": QUEUE_URL})
    assert dataclasses.astuple(settings) == (QUEUE_URL, *defaults)


ARN = "arn:aws:ssm:us-west-1:123456789012:parameter/a"
SECRET_NAME = "/aws/reference/secretsmanager/a/b_c+d=e.f@g-h"
TEN_NAMES = ",".join(f"/{n}" for n in range(10))


@pytest.mark.parametrize(
    ("variable", "text", "value"),
    [
        ("SQS_QUEUE_URL", "http://localhost:5000/1/q.fifo", "http://localhost:5000/1/q.fifo"),
        ("AWS_REGION", "us-gov-east-1", "us-gov-east-1"),
        ("AWS_REGION", "", "us-west-1"),
        ("TOKEN_SSM_PARAMETER", "/a/b.c_d-e, /f ,g,/f", ("/a/b.c_d-e", "/f", "g")),
        ("TOKEN_SSM_PARAMETER", f"{ARN},{SECRET_NAME}", (ARN, SECRET_NAME)),
        ("TOKEN_SSM_PARAMETER", TEN_NAMES, tuple(TEN_NAMES.split(","))),
        ("PORT", " 65535 ", 65535),
        ("BODY_TIMEOUT_SECONDS", "1.5", 1.5),
    ],
)
def test_setting_is_read_from_its_variable(variable: str, text: str, value: Any) -> None:
    environ = {"SQS_QUEUE_URL": QUEUE_URL, variable: text}
    assert getattr(app.Settings.from_environ(environ), variable.lower()) == value


BAD_SETTINGS = {
    "SQS_QUEUE_URL": ["dev-CP-queue", "https://a/", "https://a b/c"],
    "AWS_REGION": ["US-WEST-1", "us-west-1a"],
    "TOKEN_SSM_PARAMETER": ["/a,", "/a b", "/\u00e9", TEN_NAMES + ",/10"],
    "PORT": ["x", "0", "65536", "+5", "1_0", "\u0665", "80.5", "9" * 5000],
    "GUNICORN_WORKERS": ["65"],
    "GUNICORN_THREADS": ["257"],
    "MAX_REQUEST_BYTES": ["1073741825"],
    "BODY_TIMEOUT_SECONDS": ["0.99", "61", "nan"],
    "SQS_CALLS_IN_FLIGHT": ["65"],
    "TOKEN_CACHE_SECONDS": ["3601"],
    "LOG_LEVEL": ["TRACE"],
}


def settings_error(**environ: str) -> str:
    try:
        app.Settings.from_environ(environ)
    except app.SettingsError as error:
        return str(error)
    return f"accepted: {environ}"


def test_malformed_setting_stops_the_start_with_a_line_that_names_it() -> None:
    for variable, texts in BAD_SETTINGS.items():
        for text in texts:
            error = settings_error(**{"SQS_QUEUE_URL": QUEUE_URL, variable: text})
            assert re.fullmatch(f"{variable} must be .+, not .+", error), (variable, text)


def test_all_unusable_settings_are_named_at_once() -> None:
    lines = settings_error(SQS_QUEUE_URL=" ", PORT="x", LOG_LEVEL="y").splitlines()
    assert [line.split()[0] for line in lines] == ["SQS_QUEUE_URL", "PORT", "LOG_LEVEL"]
    assert lines[0].startswith("SQS_QUEUE_URL is required")


# --- Errors: the order of the checks --------------------------------------------------------------


def not_received(code: str) -> dict[str, Any]:
    """A request of the wrong type whose body worker.py did not receive."""
    environ = {"worker.error": app.ApiError(code, cause="of the worker")}
    return {"data": b"\xff", "content_type": "text/plain", "environ_overrides": environ}


OVERSIZED = {"data": b"\xff" * 9000, "content_type": "text/plain"}
LONG = {**DATA, "email_content": "x" * 2000}
LONG_INVALID = {**LONG, "email_sender": "", "email_timestream": "x"}
ORDER: list[tuple[int, str, dict[str, Any]]] = [
    # Each request fails the check of its code, and as many later checks as possible.
    (404, "not_found", {"path": "/nowhere", **not_received("request_timeout")}),
    (405, "method_not_allowed", {"method": "PUT", **not_received("request_timeout")}),
    (413, "request_too_large", OVERSIZED),
    (413, "request_too_large", not_received("request_too_large")),
    (408, "request_timeout", not_received("request_timeout")),
    (503, "overloaded", not_received("overloaded")),
    (415, "unsupported_media_type", {"data": b"\xff", "content_type": "text/plain"}),
    (400, "invalid_json", {"data": b"\xff"}),
    (401, "token_required", {"data": b"{}", "ssm": DOWN}),
    (401, "invalid_token", {"data": request_body(None, 5), "ssm": DOWN}),
    (503, "token_store_unavailable", {"data": request_body(None), "ssm": DOWN}),
    (400, "invalid_data", {"data": request_body(None)}),
    (400, "invalid_data", {"data": request_body(LONG_INVALID)}),
    (400, "invalid_timestamp", {"data": request_body({**LONG, "email_timestream": "x"})}),
    (413, "message_too_large", {"data": request_body(LONG), "attributes": queue_limit("1024")}),
    (503, "queue_unavailable", {"data": request_body(LONG)}),
]


@pytest.mark.parametrize(("status", "code", "options"), ORDER, ids=[code for _, code, _ in ORDER])
def test_first_failed_check_decides_the_error(
    status: int, code: str, options: dict[str, Any]
) -> None:
    request = {"method": "POST", "path": "/process", "content_type": "application/json"} | options
    sqs = FakeSqs(DOWN, request.pop("attributes", DOWN))
    service = InProcessService(FakeSsm(request.pop("ssm", None)), sqs, max_request_bytes=8000)
    response = service.request(**request)
    error_of(response, code)
    assert response.status_code == status


def test_defect_is_500_that_reveals_nothing(
    service: InProcessService, capture_log: CaptureLog
) -> None:
    def defect() -> None:
        raise RuntimeError("something internal")

    service.app.add_url_rule("/defect", view_func=defect)
    lines = capture_log("INFO")
    response = service.get("/defect")
    body = error_of(response, "internal_error")
    assert response.status_code == 500
    assert not re.search("something internal|RuntimeError", json.dumps(body))
    cause, request = lines()
    assert re.search("in defect.*RuntimeError: something internal", cause["exc_info"], re.DOTALL)
    assert cause["level"] == request["level"] == "ERROR"
    assert cause["request_id"] == request["request_id"] == body["request_id"]


# --- Routes ---------------------------------------------------------------------------------------


def test_valid_request_puts_its_message_into_the_queue(service: InProcessService) -> None:
    headers = {"X-Request-Id": "r-1", "Idempotency-Key": "order 1843", "X-Amzn-Trace-Id": TRACE}
    response = service.post(headers=headers)
    assert (response.status_code, response.mimetype) == (200, "application/json")
    assert response.get_json() == {
        "status": "success",
        "message": "Email data processed and queued",
        "message_id": "6e5f0a2b",
    }
    (message,) = service.sqs.messages
    assert message["QueueUrl"] == QUEUE_URL
    assert json.loads(message["MessageBody"]) == DATA
    attributes = attributes_of(message)
    processed = datetime.fromisoformat(attributes.pop("ProcessedAt"))
    assert abs(datetime.now(UTC) - processed) < timedelta(minutes=5)
    assert processed.utcoffset() == timedelta(0)
    assert attributes == {
        "ContentType": "application/json",
        "RequestId": "r-1",
        "IdempotencyKey": "order 1843",
    }
    trace = {"DataType": "String", "StringValue": TRACE}
    assert message["MessageSystemAttributes"] == {"AWSTraceHeader": trace}


def test_host_and_upgrade_headers_are_ignored(service: InProcessService) -> None:
    """Werkzeug would reject these requests."""
    upgrade = {"HTTP_CONNECTION": "Upgrade", "HTTP_UPGRADE": "websocket"}
    for environ in ({"HTTP_HOST": "[::1"}, upgrade):
        assert service.post(environ_overrides=environ).status_code == 200, environ


def test_health_is_200_while_aws_is_down() -> None:
    service = InProcessService(FakeSsm(DOWN), FakeSqs(DOWN, DOWN))
    service.rejected("token_store_unavailable")
    calls = service.ssm.reads, service.sqs.calls
    response = service.get("/health")
    body = response.get_json()
    assert (response.status_code, response.mimetype) == (200, "application/json")
    assert (service.ssm.reads, service.sqs.calls) == calls
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}", body["timestamp"])
    now = datetime.fromisoformat(body.pop("timestamp")).replace(tzinfo=UTC)
    assert abs(datetime.now(UTC) - now) < timedelta(minutes=5)
    assert body == {"status": "healthy", "service": "email-processor"}


EMPTY_PARAMETER = {"Parameters": [{"Name": PARAMETER, "Value": " \n\u200b"}]}


@pytest.mark.parametrize(
    ("ssm", "attributes", "parts"),
    [
        (DENIED, None, ["ssm:GetParameters failed: AccessDeniedException"]),
        (NO_PARAMETER, None, [f"SSM does not have {PARAMETER}"]),
        (EMPTY_PARAMETER, None, [f"there is no token in {PARAMETER}"]),
        (None, DENIED, ["sqs:GetQueueAttributes failed: AccessDeniedException"]),
        (DOWN, DOWN, ["ssm:GetParameters failed: ", "; ", "sqs:GetQueueAttributes failed: "]),
    ],
    ids=["token denied", "no parameter", "empty parameter", "queue denied", "both"],
)
def test_not_ready_is_503_that_names_what_is_missing(
    ssm: Any, attributes: Any, parts: list[str]
) -> None:
    response = InProcessService(FakeSsm(ssm), FakeSqs(attributes=attributes)).get("/ready")
    code = "token_store_unavailable" if ssm else "queue_unavailable"
    message = error_of(response, code)["message"]
    assert re.search(".*".join(parts), message)
    assert (" queue " in message, " token " in message) == (bool(attributes), bool(ssm))


def test_ready_waits_for_no_call_of_aws(service: InProcessService) -> None:
    service.executor.holds = True
    for _ in range(2):
        message = error_of(service.get("/ready"), "token_store_unavailable")["message"]
        assert "sqs:GetQueueAttributes is in progress" in message
    assert (service.ssm.reads, service.sqs.calls) == (0, 0)
    for _ in range(3):
        service.executor.run_next()
    assert service.get("/ready").status_code == 200
    assert (service.ssm.reads, service.sqs.calls) == (1, 1)
    assert service.executor.held.empty()


def test_ready_is_200_from_the_first_success_on() -> None:
    service = InProcessService(FakeSsm(DENIED), FakeSqs(attributes=DENIED))
    error_of(service.get("/ready"), "token_store_unavailable")
    service.ssm.response, service.sqs.attributes = None, queue_limit("1048576")
    for passed, status, reads in ((4.9, 503, 1), (0.1, 200, 2), (0, 200, 2)):
        service.now += passed
        assert service.get("/ready").status_code == status
        assert (service.ssm.reads, service.sqs.calls) == (reads, reads)
    # A later outage, or the loss of the parameter, takes no pod out of service.
    service.sqs.attributes = service.sqs.sent = DOWN
    for response, accepted in ((DOWN, True), (NO_PARAMETER, False)):
        service.ssm.response = response
        service.now += 1000
        service.is_valid(TOKEN)  # starts the read
        assert service.is_valid(TOKEN) == accepted
        assert service.get("/ready").status_code == 200


def test_index_lists_the_endpoints(service: InProcessService) -> None:
    paths = ("/", "/health", "/ready", "/metrics", "/openapi.json", "/docs")
    body = service.get("/").get_json()
    assert set(body.pop("endpoints")) == {"POST /process", *(f"GET {path}" for path in paths)}
    assert body == {"service": "email-processor", "version": app.VERSION, "commit": app.COMMIT}


def test_commit_is_that_of_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init", "--quiet")
    assert app.commit_of(tmp_path) == "unknown", "before its first commit"
    author = ("-c", "user.name=a", "-c", "user.email=a@b")
    git(*author, "commit", "--quiet", "--allow-empty", "--message", "first")
    monkeypatch.setenv("GIT_DIR", "/other")  # as in a hook of another repository
    assert re.fullmatch("[0-9a-f]{40}", app.commit_of(tmp_path))
    monkeypatch.setenv("PATH", "")
    assert app.commit_of(tmp_path) == "unknown", "without git"


def test_unknown_path_is_404(service: InProcessService) -> None:
    for path in ("", "/process/", "/docs//swagger-ui.css", "/\xff", "//process"):
        # In the environment: the client would take the first part of //process for a host.
        service.rejected("not_found", environ_overrides={"PATH_INFO": path})


def test_wrong_method_is_405_with_allow(service: InProcessService) -> None:
    for method, path, allowed in (
        ("OPTIONS", "/process", "POST"),
        ("X", "/docs/swagger-ui.css", "GET, HEAD"),
    ):
        response = service.request(method, path)
        error_of(response, "method_not_allowed")
        assert response.headers["Allow"] == allowed
    response = service.request("HEAD", "/process")
    assert (response.status_code, response.data) == (405, b"")


def test_request_that_waits_for_sqs_needs_no_thread(service: InProcessService) -> None:
    assert service.post().status_code == 200  # the token is read
    service.sqs.sent, service.executor.holds = DENIED, True
    started, called, before = list[Any](), list[Any](), service.metrics()
    environ = EnvironBuilder(
        "/process", method="POST", data=BODY, content_type="application/json"
    ).get_environ()
    response: Any = service.app(environ, lambda *arguments: started.append(arguments))
    response.add_done_callback(called.append)
    assert (called, started) == ([], [])
    assert service.metric_changes(before)["requests_in_flight"] == 1
    with ThreadPoolExecutor(1) as other_thread:  # which has no context of Flask's
        other_thread.submit(service.executor.run_next).result(timeout=20)
        assert len(called) == 1
        body = json.loads(b"".join(other_thread.submit(list, response).result(timeout=20)))
    ((status, headers),) = started
    assert (status[:3], body["error"]) == ("503", "queue_unavailable")
    assert dict(headers)["X-Request-Id"] == body["request_id"]
    assert "requests_in_flight" not in service.metric_changes(before)


def test_refresh_thread_logs_a_failure_and_ends_without_a_line_at_the_exit(
    service: InProcessService, capture_log: CaptureLog
) -> None:
    failures = ["can't start new thread", "cannot schedule new futures after interpreter shutdown"]
    service.executor.submit = Mock(side_effect=map(RuntimeError, failures))  # type: ignore[method-assign]
    lines, others = capture_log("INFO"), set(threading.enumerate())
    service.app.start()
    (refresh_thread,) = set(threading.enumerate()) - others
    refresh_thread.join(20)
    assert not refresh_thread.is_alive()
    assert [line["message"] for line in lines()] == ["unhandled exception"]


# --- Read the body --------------------------------------------------------------------------------


@pytest.mark.parametrize("declared", [True, False], ids=["length", "chunked"])
def test_body_one_byte_over_the_limit_is_413(declared: bool) -> None:
    service = InProcessService(max_request_bytes=len(BODY))
    for body, status in ((BODY, 200), (BODY + b" ", 413)):
        response = service.post_stream(io.BytesIO(body), len(body) if declared else None)
        assert response.status_code == status
    assert str(len(BODY)) in error_of(response, "request_too_large")["message"]
    assert len(service.sqs.messages) == 1


def test_truncated_body_is_400(service: InProcessService) -> None:
    reset = Mock(read=Mock(side_effect=ConnectionResetError))
    for response in (
        service.post_stream(io.BytesIO(BODY), len(BODY) + 1),
        service.post_stream(reset, length=None),
    ):
        error_of(response, "invalid_json")
    assert not service.sqs.messages


# --- Parse ----------------------------------------------------------------------------------------


def test_body_that_is_not_plain_json_is_415(service: InProcessService) -> None:
    gzipped = {"headers": {"Content-Encoding": "gzip"}, "body": gzip.compress(BODY)}
    transfer = {"HTTP_TRANSFER_ENCODING": "gzip, chunked"}
    requests: list[tuple[str, dict[str, Any]]] = [
        ("Content-Type", {"content_type": None}),
        ("Content-Encoding", gzipped),
        ("Content-Encoding", {"headers": {"Content-Encoding": "x-gzip, identity"}}),
        ("Transfer-Encoding", {"environ_overrides": transfer}),
    ]
    for header, options in requests:
        assert header in service.rejected("unsupported_media_type", **options)["message"]


def nested(levels: int, level: str) -> bytes:
    """A valid request with so many levels: the request, its data, and lists or objects."""
    deep = level[:-1] * (levels - 3) + "[]" + level[-1] * (levels - 3)
    return body_with_data(f'{{{json.dumps(DATA)[1:-1]}, "deep": {deep}}}')


def valued(values: int, value: str) -> bytes:
    """A valid request with so many JSON values; eight are not in its list."""
    listed = ", ".join([value] * (values - 8))
    return body_with_data(f'{{{json.dumps(DATA)[1:-1]}, "many": [{listed}]}}')


CODE = {**DATA, "email_subject": "\\", "email_content": '"' + "[1]," * 9_000}
VALID: dict[str, dict[str, Any]] = {
    "charset": {"content_type": "application/json; charset=utf-8"},
    "empty encoding": {"headers": {"Content-Encoding": ""}},
    "identity": {"headers": {"Content-Encoding": "Identity, identity"}},
    "byte order mark": {"body": b"\xef\xbb\xbf" + BODY},
    "100 levels": {"body": nested(100, "[]").replace(b'"deep"', b'"flat": [], "deep"')},
    "10,000 numbers": {"body": valued(10_000, "1")},
    "10,000 values in objects": {"body": valued(5_004, '{"a,": 1}')},
    "10,000 empty values": {"body": valued(10_000, "[ ]").replace(b"[ ], [ ]", b"{}, { }")},
    "code in a text": {"body": request_body(CODE)},
}


@pytest.mark.parametrize("options", VALID.values(), ids=VALID)
def test_valid_request_is_200(service: InProcessService, options: dict[str, Any]) -> None:
    assert service.post(**options).status_code == 200


INVALID_JSON = {
    "empty": (b"", "not a JSON object"),
    "null": (b"null", "not a JSON object"),
    "list": (b"[]", "not a JSON object"),
    "Latin-1": (b'{"a": "\xe9"}', "not UTF-8"),
    "UTF-16": (BODY.decode().encode("utf-16"), "not UTF-8"),
    "NaN": (b'{"a": NaN}', "NaN is not JSON"),
    "two objects": (b"{}{}", "Extra data"),
    "truncated": (b"{", "is not JSON: "),
    "comma at the end": (b'{"a": 1,}', "is not JSON: "),
    "control character": (b'{"\x00": 1}', "is not JSON: "),
    "no colon": ('{"\xe9": 1,\n"a" 1}'.encode(), "delimiter: line 2 column 5 (char 13)"),
    "101 lists": (nested(101, "[]"), "nests deeper than 100 levels"),
    "101 objects": (nested(101, '{"a":}'), "nests deeper than 100 levels"),
    "unclosed lists": (b"[" * 9_999, "nests deeper than 100 levels"),
    "10,001 numbers": (valued(10_001, "1"), "more than 10,000 values"),
    "10,001 empty lists": (valued(10_001, "[ ]"), "more than 10,000 values"),
    "10,002 values in objects": (valued(5_005, '{"a": 1}'), "more than 10,000 values"),
    "100,000 nested objects": (b'{"a":' * 100_000, "more than 10,000 values"),
}


@pytest.mark.parametrize(("body", "reason"), INVALID_JSON.values(), ids=INVALID_JSON)
def test_invalid_json_is_400(service: InProcessService, body: bytes, reason: str) -> None:
    assert reason in service.rejected("invalid_json", body)["message"]


def test_message_is_the_data_unchanged_in_ascii(service: InProcessService) -> None:
    members = [
        json.dumps(DATA)[1:-1],
        '"email_timestream": 1693561101',
        '"numbers": [1.10, 1E5, 1e400, -0, -0.0, 12345678901234567890123, ' + "9" * 5000 + "]",
        r'"escapes": "\u0000\u001f\ufffe \\ \" \/ \ud83d\ude00 \ud83d \ude00\ud83d"',
        '"accents": "' + "\u00e9" * 30_000 + '"',
        '"\u00e9": "\u65e5\u672c \U0001f600 \u2028 \ufffe \uffff \u200b \u0085 \x7f \\\\ \\" "',
    ]
    source = f"{{{', '.join(members)}}}"
    assert service.post(body_with_data(source)).status_code == 200
    body = service.sqs.messages[0]["MessageBody"]
    sent, given = (json.loads(text, parse_int=str, parse_float=str) for text in (body, source))
    assert sent == given
    assert not re.search(r"[^\t\n\r -~\x7f]", body), "SQS rejects some other characters"


def test_last_data_member_is_the_message(service: InProcessService) -> None:
    text = r'{"other": {"data": 1}, "data": 2, "d\u0061ta": DATA, "token": "x", "token": TOKEN}'
    body = text.replace("DATA", json.dumps(DATA)).replace("TOKEN", json.dumps(TOKEN)).encode()
    assert service.post(body).status_code == 200
    assert json.loads(service.sqs.messages[0]["MessageBody"]) == DATA


def filled(start: bytes, unit: bytes, end: bytes = b"") -> bytes:
    """A body of the largest size."""
    return start + unit * ((2_097_152 - len(start + end)) // len(unit)) + end


IN_LIST, END = b'{"data": {"x": [', b"0]}}"
IN_TEXT = body_with_data(json.dumps(DATA)[:-1] + ', "x": "')[:-1]
COSTLY = {
    "empty lists": filled(IN_LIST, b"[],", END),
    "names": b"{" + b",".join(b'"%06x":1' % n for n in range(190_000)) + b"}",
    "lines behind": filled(b"{}", b"{}\n"),
    "quotes": filled(b"{", b'"'),
    "invisible": filled(IN_TEXT.replace(b"John doe", b"") + b'","email_sender":"', b" \\n", b'"}}'),
    "code": filled(IN_TEXT, b'[{\\"a\\": 1},', b'"}}'),
    "accents": filled(IN_TEXT, "\xe9a".encode(), b'"}}'),
    "emoji": filled(IN_TEXT, b"a", '\\n\U0001f600"}}'.encode()),
    "emoji and lines": filled(IN_TEXT + "\U0001f600".encode(), "\xe9\naa".encode(), b'"}}'),
}


@pytest.mark.parametrize("body", COSTLY.values(), ids=COSTLY)
def test_body_of_2_mib_takes_less_than_20_mib_and_no_loop_over_its_parts(
    service: InProcessService, body: bytes
) -> None:
    """Python needs a function call or a line for each part that it handles itself."""
    steps = 0

    def count(_frame: Any, _event: str, _argument: Any) -> Any:
        nonlocal steps
        steps += 1
        return count

    environ = EnvironBuilder(method="POST", path="/process").get_environ()
    environ |= {"CONTENT_LENGTH": str(len(body)), "CONTENT_TYPE": "application/json"}
    environ["wsgi.input"] = io.BytesIO(body)
    service.get("/health")  # prepares the routes, which do not count
    tracemalloc.start()
    tracer = sys.gettrace()
    sys.settrace(count)
    try:
        run_wsgi_app(service.app, environ)
    finally:
        sys.settrace(tracer)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 20 * 2**20
    assert steps < 100_000


# --- Token store ----------------------------------------------------------------------------------


def test_missing_token_is_401_that_names_its_place(service: InProcessService) -> None:
    for options in (
        {"body": request_body(token=None)},
        {"body": request_body(token="")},
        {"body": b'{"data": {"token": "x"}}'},
        {"body": b"{}", "headers": {"Authorization": TOKEN}},
    ):
        message = service.rejected("token_required", **options)["message"]
        assert "top level of the JSON body" in message


def test_invalid_token_is_401_without_field_errors(service: InProcessService) -> None:
    for token in (f"{TOKEN} ", "\u0442\u043e\u043a\u0435\u043d", "\ud800", 0, [TOKEN]):
        error = service.rejected("invalid_token", request_body({"email_subject": ""}, token))
        assert error["message"] == "Invalid token.", token
        assert "errors" not in error, token


def test_token_that_was_never_read_is_503() -> None:
    for response in (NO_PARAMETER, {"Parameters": [5]}):
        InProcessService(FakeSsm(response)).rejected("token_store_unavailable")


def holding(*tokens: str, **settings: Any) -> InProcessService:
    """A service whose SSM holds these tokens, each as the parameter of its name."""
    ssm = FakeSsm(**{f"/{token}": token for token in tokens})
    return InProcessService(ssm, token_ssm_parameter=tuple(ssm.values), **settings)


@pytest.fixture
def cached() -> InProcessService:
    """A service whose cache holds the token "old"."""
    service = holding("old")
    assert service.is_valid("old")
    return service


def test_token_is_compared_with_all_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[set[bytes]] = []
    monkeypatch.setattr(hmac, "compare_digest", lambda *both: compared.append({*both}) or True)
    assert holding("a", "b").is_valid("guess")
    assert compared == [{b"a", b"guess"}, {b"b", b"guess"}]


def test_token_is_read_again_at_70_to_90_percent_of_its_age() -> None:
    random.seed(1)
    ages = set()
    for _ in range(8):
        service = holding("old", token_cache_seconds=600)
        age = 415
        while service.is_valid("old") and service.ssm.reads == 1:
            age += 5
            service.now = 1000 + age
        ages.add(age)
    assert 420 <= min(ages) < 480 < max(ages) <= 545
    assert len(ages) > 3, "workers that read in step"


@pytest.mark.parametrize(
    ("response", "age", "interval"),
    [(None, 60, 5), (DOWN, 60, 5), (None, 1, 1)],
    ids=["SSM works", "SSM is down", "short cache"],
)
def test_wrong_tokens_cause_one_read_per_interval(
    response: Any, age: float, interval: float
) -> None:
    service = holding("old", token_cache_seconds=age)
    assert service.is_valid("old")
    service.ssm.response = response
    for passed, reads in ((interval - 0.5, 1), (0.5, 2), (interval - 0.5, 2), (0.5, 3)):
        service.now += passed
        for _ in range(3):
            assert service.is_valid("old")
            assert not service.is_valid("guess")
        assert service.ssm.reads == reads


@pytest.mark.parametrize("age", [59.9, 1000])
def test_known_token_is_accepted_while_a_read_is_in_progress(
    cached: InProcessService, age: float
) -> None:
    cached.ssm.values, cached.executor.holds = {"/old": "new"}, True
    cached.now += age
    assert all(cached.is_valid("old") for _ in range(3))
    cached.executor.run_next()
    assert (cached.is_valid("old"), cached.is_valid("new")) == (False, True)
    assert cached.ssm.reads == 2
    assert cached.executor.held.empty()


def test_rotated_token_works_at_once_after_one_read(cached: InProcessService) -> None:
    before = cached.metrics()
    cached.now += 5
    cached.ssm.values, cached.executor.holds = {"/old": "new"}, True
    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(cached.is_valid, token) for token in ("new", "new", "old guess")]
        cached.executor.run_next()
        assert [future.result(timeout=20) for future in waiting] == [True, True, False]
    assert not cached.is_valid("old")
    assert cached.executor.held.empty()
    assert cached.metric_changes(before)['token_reads_total{result="success"}'] == 1


def test_one_request_at_a_time_waits_for_a_failing_ssm(cached: InProcessService) -> None:
    cached.ssm.response = DOWN
    cached.now += 60
    assert not cached.is_valid("guess")
    cached.now += 5
    cached.executor.holds = True
    with ThreadPoolExecutor() as pool:
        first = pool.submit(cached.is_valid, "guess")
        read = cached.executor.held.get(timeout=20)
        assert not cached.is_valid("guess")
        assert cached.is_valid("old")
        assert not first.done()
        read()
        assert not first.result(timeout=20)


def test_slow_failure_of_ssm_is_one_read_per_request() -> None:
    class SlowSsm(FakeSsm):
        def get_parameters(self, **arguments: Any) -> Any:
            service.now += 5.5
            return super().get_parameters(**arguments)

    service = InProcessService(SlowSsm(DOWN))
    for passed, reads in ((0, 1), (4.9, 1), (0.1, 2)):  # since the end of the read
        service.now += passed
        service.rejected("token_store_unavailable")
        assert service.ssm.reads == reads


PARAMETER_LEFT_OUT = {"Parameters": [], "InvalidParameters": []}


@pytest.mark.parametrize("response", [DOWN, PARAMETER_LEFT_OUT], ids=["down", "incomplete"])
def test_last_known_token_works_while_ssm_fails(
    cached: InProcessService, caplog: pytest.LogCaptureFixture, response: Any
) -> None:
    before = cached.metrics()
    assert abs(time.time() - before["token_read_timestamp_seconds"]) < 300
    cached.ssm.response = response
    cached.now += 1000
    assert cached.is_valid("old")
    assert not cached.is_valid("guess")
    changes = cached.metric_changes(before)
    assert changes['token_reads_total{result="failure"}'] == 1
    assert not {'token_reads_total{result="success"}', "token_read_timestamp_seconds"} & {*changes}
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.__dict__["cause"]


def test_token_of_a_deleted_parameter_is_rejected(caplog: pytest.LogCaptureFixture) -> None:
    service = holding("a", "b")
    assert service.is_valid("b")
    del service.ssm.values["/b"]
    service.now += 60
    assert service.is_valid("a")  # starts the read
    assert not service.is_valid("b")
    assert service.is_valid("a")
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    assert warning.__dict__["parameters"] == ["/b"]


ARN_FOUND = {"Name": "/a", "ARN": ARN}


@pytest.mark.parametrize(
    ("names", "found", "counted"),
    [
        (("/b", "/a:prod"), [ARN_FOUND], "/a:prod"),  # an emulator leaves out the Selector
        (("/b", ARN), [ARN_FOUND], ARN),
        (("/a", "/a:1"), [{**ARN_FOUND, "Value": "new"}, {**ARN_FOUND, "Selector": ":1"}], "/a:1"),
        (("/b", "/a"), [ARN_FOUND, {"Name": "/b"}], "/b"),  # both have the same token
    ],
    ids=["label of an emulator", "ARN", "two versions", "order"],
)
def test_accepted_token_is_counted_for_its_configured_parameter(
    capture_log: CaptureLog, names: tuple[str, ...], found: list[dict[str, str]], counted: str
) -> None:
    parameters = [{"Value": "token", **parameter} for parameter in found]
    missing = [f"/missing-{n}" for n in range(len(names) - len(found))]
    response = {"Parameters": parameters, "InvalidParameters": missing}
    service = InProcessService(FakeSsm(response), token_ssm_parameter=names)
    before, lines = service.metrics(), capture_log("INFO")
    assert {f'tokens_accepted_total{{parameter="{name}"}}' for name in names} <= before.keys()
    assert service.is_valid("token")
    assert not service.is_valid("guess")
    changes = service.metric_changes(before)
    accepted = {name: value for name, value in changes.items() if "tokens_accepted" in name}
    assert accepted == {f'tokens_accepted_total{{parameter="{counted}"}}': 1}
    requests = [line for line in lines() if line["message"] == "request"]
    assert [line.get("token_parameter") for line in requests] == [counted, None]


STORED = [
    ("SecureString", "\ufeffs3, cr3t \r\n", ["s3, cr3t"], "white space"),
    ("SecureString", "'s3cr3t'\n", ["'s3cr3t'"], "quotes"),
    ("SecureString", " \n", [], "no token"),
    ("SecureString", '{\n "a": "s3cr3t"\n}\n', ['{\n "a": "s3cr3t"\n}'], "JSON"),
    ("SecureString", '["s3cr3t"]', ['["s3cr3t"]'], "JSON"),
    ("String", "\u2764\ufe0f", ["\u2764\ufe0f"], "not encrypted"),
    ("StringList", "a, s3cr3t\n", ["a", "s3cr3t"], "not encrypted"),
]


@pytest.mark.parametrize(("kind", "value", "tokens", "warning"), STORED)
def test_stored_value_is_normalised_with_a_warning(
    capture_log: CaptureLog, kind: str, value: str, tokens: list[str], warning: str
) -> None:
    parameter = {"Name": "/a/name", "Type": kind, "Value": value}
    good = {"Name": "/b", "Type": "SecureString", "Value": "good"}
    response = {"Parameters": [parameter, good], "InvalidParameters": []}
    service = InProcessService(FakeSsm(response), token_ssm_parameter=("/a/name", "/b"))
    lines = capture_log("INFO")
    assert all(service.is_valid(token) for token in [*tokens, "good"])
    assert value in tokens or not service.is_valid(value)
    service.now += 1000
    service.is_valid("good")  # read again: no second warning
    warned = [line for line in lines() if line["level"] == "WARNING"]
    assert {tuple(line["parameters"]) for line in warned} == {("/a/name",)}
    texts = [line["message"] for line in warned]
    assert len(texts) == len(set(texts))
    assert warning in " ".join(texts)
    assert "cr3t" not in " ".join(texts)


# --- Validate -------------------------------------------------------------------------------------


def test_data_that_is_no_object_is_400(service: InProcessService) -> None:
    fields_at_the_top = json.dumps({**DATA, "token": TOKEN}).encode()
    for body in (request_body(None), request_body([DATA]), fields_at_the_top):
        message = service.rejected("invalid_data", body)["message"]
        assert message == '"data" is missing or not an object.'


ABSENT = object()


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("email_subject", ABSENT, "missing"),
        ("email_timestream", None, "missing"),
        ("email_sender", "", "empty"),
        ("email_timestream", "", "empty"),
        ("email_content", "\t\r\n \u00a0\u2003\u3000" * 1000, "empty"),
        ("email_sender", 0, "not a string"),
    ],
)
def test_invalid_field_is_400_that_names_it(
    service: InProcessService, field: str, value: Any, problem: str
) -> None:
    data = {name: v for name, v in {**DATA, field: value}.items() if v is not ABSENT}
    error = service.rejected("invalid_data", request_body(data))
    assert error["errors"] == [{"field": field, "message": error["message"]}]
    assert error["message"] == f"{field} is {problem}"


def test_all_invalid_fields_are_listed_at_once(service: InProcessService) -> None:
    data = {"email_subject": "", "email_sender": 5, "email_timestream": "soon"}
    error = service.rejected("invalid_data", request_body(data))
    assert [problem["field"] for problem in error["errors"]] == list(DATA)
    assert all(problem["message"] in error["message"] for problem in error["errors"])


# White space, controls and format characters; default-ignorable code points (Hangul and Khmer
# fillers, joiners, selectors, tags, reserved ones) at both ends of each range; the blank Braille
# pattern.
INVISIBLE = (
    " \u00a0\u2028\u3000\x00\x1c\x7f\x85\xad\u061c\u200b\u202e\u2060\ufeff\u034f\u115f\u1160\u17b4"
    "\u17b5\u180b\u180f\u2065\u2800\u3164\ufe00\ufe0f\uffa0\ufff0\ufff8\U000e0000\U000e0fff"
)
# The neighbours of these ranges, and some that are easily taken for empty.
VISIBLE = "\u0301\u115e\u1161\u17b3\u17b6\u180a\u1810\u2801\u3163\ufdff\ufe10\uffa1-"


def test_text_of_invisible_characters_is_empty() -> None:
    for text in INVISIBLE:
        with pytest.raises(app.ApiError, match="invalid_data"):
            app.validate_data({**DATA, "email_subject": text})
    for text in (*VISIBLE, f"{' ' * 1000}x"):
        app.validate_data({**DATA, "email_subject": text})


def body_with_timestamp(source: str) -> bytes:
    return body_with_data(json.dumps(DATA).replace(json.dumps(DATA["email_timestream"]), source))


# Part of the message -> the JSON of email_timestream.
INVALID_TIMESTAMPS = {
    "is outside": ['"946684799"', "4102444801", f'"{"1" * 5000}"', "1" * 5000, '"0"'],
    "is not a Unix timestamp": [
        *('"+1693561101"', '"1_693_561_101"', r'" 1693561101"', r'"1693561101\n"', '"1e9"'),
        *("1e9", "1693561101.0", "true", "[1693561101]"),
        '"\u0661\u0666\u0669\u0663\u0665\u0666\u0661\u0661\u0660\u0661"',  # Arabic-Indic digits
    ],
}


@pytest.mark.parametrize(
    ("part", "source"),
    [(part, source) for part, sources in INVALID_TIMESTAMPS.items() for source in sources],
    ids=lambda text: ascii(text)[:30],
)
def test_invalid_timestamp_is_400(service: InProcessService, part: str, source: str) -> None:
    error = service.rejected("invalid_timestamp", body_with_timestamp(source))
    assert part in error["message"]
    assert error["errors"] == [{"field": "email_timestream", "message": error["message"]}]


@pytest.mark.parametrize(
    "source", ['"946684800"', "946684800", '"4102444800"', f'"{"0" * 20}946684800"']
)
def test_valid_timestamp_is_200(service: InProcessService, source: str) -> None:
    assert service.post(body_with_timestamp(source)).status_code == 200


# --- Publish --------------------------------------------------------------------------------------


def test_message_without_headers_has_three_attributes(service: InProcessService) -> None:
    response = service.post(headers={"Idempotency-Key": "  "})
    (message,) = service.sqs.messages
    attributes = attributes_of(message)
    assert set(message) == {"QueueUrl", "MessageBody", "MessageAttributes"}
    assert set(attributes) == {"ContentType", "ProcessedAt", "RequestId"}
    assert attributes["RequestId"] == response.headers["X-Request-Id"]


def test_idempotency_key_is_sent_as_text() -> None:
    for header, key in (
        ("\u540d".encode(), "\u540d"),
        (b"\xe9-1", "\u00e9-1"),
        (b" k ", "k"),
        ("\uffff".encode(), "\xef\xbf\xbf"),  # a character that SQS rejects
    ):
        service, environ = InProcessService(), {"HTTP_IDEMPOTENCY_KEY": header.decode("latin-1")}
        assert service.post(environ_overrides=environ).status_code == 200
        assert attributes_of(service.sqs.messages[0])["IdempotencyKey"] == key


def test_fifo_message_has_a_group_and_a_deduplication_id_that_sqs_accepts() -> None:
    service = InProcessService(sqs_queue_url=QUEUE_URL + ".fifo")
    keys = [string.punctuation, "x" * 128, "x" * 129, "x" * 130, "a b", "a\u00e9", "", ""]
    for key in keys:
        headers = {"Idempotency-Key": key, "X-Request-Id": "shared"}
        assert service.post(headers=headers).status_code == 200
    ids = [message["MessageDeduplicationId"] for message in service.sqs.messages]
    assert ids[:2] == keys[:2]
    assert len(set(ids)) == len(keys), "messages share an id, and SQS would drop one"
    assert all(re.fullmatch(r"[!-~]{1,128}", given) for given in ids)
    assert all(message["MessageGroupId"] for message in service.sqs.messages)


def test_message_one_byte_over_the_limit_is_413() -> None:
    """SQS counts the bytes of the body, and of each attribute's name, type and value."""
    body = request_body({**DATA, "email_content": "\u00e9" * 1000})
    options = {"body": body, "headers": {"Idempotency-Key": "cl\u00e9", "X-Amzn-Trace-Id": TRACE}}
    unlimited = InProcessService()
    assert unlimited.post(**options).status_code == 200
    (message,) = unlimited.sqs.messages
    attributes = [f"{name}String{value}" for name, value in attributes_of(message).items()]
    size = len("".join([message["MessageBody"], *attributes]).encode())
    exact = InProcessService(sqs=FakeSqs(attributes=queue_limit(str(size))))
    assert exact.post(**options).status_code == 200
    small = InProcessService(sqs=FakeSqs(attributes=queue_limit(str(size - 1))))
    text = small.rejected("message_too_large", **options)["message"]
    assert f"{size} bytes" in text
    assert f"takes {size - 1}" in text


def test_limit_lowered_since_it_was_read_is_413() -> None:
    text = "One or more parameters are invalid. Message must be shorter than 1024 bytes."
    service = InProcessService(sqs=FakeSqs(client_error("InvalidParameterValue", text)))
    error_of(service.post(), "message_too_large")


@pytest.mark.parametrize(
    "response",
    [DENIED, ClientError({}, "SendMessage"), {}],
    ids=["access denied", "no error code", "no MessageId"],
)
def test_failing_queue_is_503_until_it_recovers(response: Any) -> None:
    service = InProcessService(sqs=FakeSqs(response))
    assert "as AWS puts it" not in error_of(service.post(), "queue_unavailable")["message"]
    service.now += 1
    service.sqs.sent = {"MessageId": "later"}
    assert service.post().get_json()["message_id"] == "later"


def test_messages_are_sent_while_the_queues_limit_is_unknown() -> None:
    for response in (DENIED, {}, queue_limit("x")):
        assert InProcessService(sqs=FakeSqs(attributes=response)).post().status_code == 200


# --- Metrics --------------------------------------------------------------------------------------


def test_request_is_counted_and_logged_once(
    service: InProcessService, capture_log: CaptureLog
) -> None:
    lines, failing = capture_log("DEBUG"), InProcessService(sqs=FakeSqs(DENIED))
    unparsed = {"REQUEST_METHOD": "", "PATH_INFO": "", "REMOTE_ADDR": "127.0.0.1"}
    requests: list[tuple[str, int, Callable[[], Any]]] = [
        # The outcome, whether the duration is measured, and the request.
        ("success", 1, service.post),
        ("invalid_json", 1, lambda: service.post(b"{")),
        ("queue_unavailable", 1, failing.post),
        ("success", 0, lambda: service.get("/health")),
        ("method_not_allowed", 0, lambda: service.get("/process")),
        (
            "invalid_json",
            0,
            lambda: service.app.response_without_flask(app.ApiError("invalid_json"), unparsed),
        ),
    ]
    for outcome, measured, send in requests:
        before, _ = service.metrics(), lines()
        send()
        logged = [line for line in lines() if line["message"] == "request"]
        assert [line.get("error", "success") for line in logged] == [outcome]
        changes = service.metric_changes(before)
        assert changes.get("request_duration_seconds_count", 0) == measured
        assert "requests_in_flight" not in changes
        counted = {name: n for name, n in changes.items() if name.startswith("requests_total")}
        counted['requests_total{outcome="success"}'] -= 1  # of the metrics themselves
        expected = {f'requests_total{{outcome="{outcome}"}}': 1}
        assert {name: n for name, n in counted.items() if n} == expected


# --- Request ids and traces -----------------------------------------------------------------------


def test_well_formed_request_id_is_kept_and_any_other_replaced(service: InProcessService) -> None:
    kept = ["x" * 128, string.ascii_letters + string.digits + "._-"]
    replaced = ["", "", "x" * 129, "a b", "a\u00b2"]
    responses = [service.get("/", headers={"X-Request-Id": text}) for text in kept + replaced]
    ids = [response.headers["X-Request-Id"] for response in responses]
    assert ids[:2] == kept
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[A-Za-z0-9._-]{1,128}", given) for given in ids)


UPPER = TRACE_ID.upper()
PARENT, OTHER = "Parent=53995c3f42cd8ad8", "1-00000000-000000000000000000000000"
MALFORMED = f"xRoot={OTHER};Root=2-{OTHER[2:]};Root={OTHER}0;Root=1-67891233-ABCDEF"
TRACES = {
    "other order": (
        f"Sampled=0; {PARENT} ;\tLineage=a87bd80c:0; {TRACE} ;",
        f"{TRACE};{PARENT};Sampled=0",
    ),
    "capitals": (f"Root={UPPER};Sampled=1;Sampled=0", f"Root={UPPER};Sampled=1"),
    "two headers": (f"{TRACE}, Root={OTHER}", TRACE),
    "malformed fields": (f"{MALFORMED};{TRACE};Sampled=?;Parent=53995C3F", TRACE),
    "no root": (f"{PARENT};Sampled=1", None),
}


@pytest.mark.parametrize(("header", "sent"), TRACES.values(), ids=TRACES)
def test_message_gets_the_well_formed_fields_of_the_trace_header(
    service: InProcessService, capture_log: CaptureLog, header: str, sent: str | None
) -> None:
    lines = capture_log("INFO")
    assert service.post(headers={"X-Amzn-Trace-Id": header}).status_code == 200
    attributes = service.sqs.messages[0].get("MessageSystemAttributes", {})
    assert attributes.get("AWSTraceHeader", {}).get("StringValue") == sent
    assert lines()[0].get("trace_id") == (sent and sent[5:40])


# --- Log lines ------------------------------------------------------------------------------------


def test_request_is_one_log_line_with_documented_fields(
    service: InProcessService, capture_log: CaptureLog
) -> None:
    lines = capture_log("INFO")
    # The ALB appends the client's address to the header that the client sent.
    forwarded = {"X-Forwarded-For": "spoofed, 2001:db8::1 ", "X-Amzn-Trace-Id": TRACE}
    service.post(headers={"X-Request-Id": "r-1", **forwarded})
    service.post(request_body(token="wrong"), headers={"X-Request-Id": "r-2"})
    accepted, rejected = lines()
    for line in (accepted, rejected):
        age = datetime.now(UTC) - datetime.fromisoformat(line.pop("time"))
        assert timedelta(0) <= age < timedelta(minutes=5)
        assert 0 < line.pop("duration_ms") < 300_000
    always = {"level": "INFO", "logger": "email_processor", "message": "request"}
    always |= {"method": "POST", "path": "/process"}
    traced = {"request_id": "r-1", "trace_id": TRACE_ID, "client": "2001:db8::1"}
    untraced = {"request_id": "r-2", "client": "127.0.0.1"}
    result = {"status": 200, "message_id": "6e5f0a2b", "token_parameter": PARAMETER}
    assert accepted == {**always, **traced, **result}
    assert rejected == {**always, **untraced, "status": 401, "error": "invalid_token"}


def test_every_log_line_has_the_id_and_trace_of_its_request(
    service: InProcessService, capture_log: CaptureLog
) -> None:
    def view() -> None:
        logging.getLogger("botocore").error("of a library, during the request")
        raise app.ApiError("internal_error", cause="the cause")

    service.app.add_url_rule("/view", view_func=view)
    lines = capture_log("INFO")
    service.get("/view", headers={"X-Request-Id": "r-1", "X-Amzn-Trace-Id": TRACE})
    logging.getLogger("botocore").error("of a library, afterwards")
    of_library, of_request, outside = lines()
    assert of_library["logger"] == "botocore"
    assert (of_request["logger"], of_request["cause"]) == ("email_processor", "the cause")
    ids = {"request_id": "r-1", "trace_id": TRACE_ID}.items()
    assert ids <= of_library.items()
    assert ids <= of_request.items()
    assert not {"request_id", "trace_id"} & outside.keys()


LEVELS = ["DEBUG", "INFO", "WARNING", "ERROR"]


@pytest.mark.parametrize("level", ["DEBUG", "WARNING"])
def test_log_level_selects_the_lines(capture_log: CaptureLog, level: str) -> None:
    service = InProcessService(sqs=FakeSqs(DENIED), token_ssm_parameter=(PARAMETER, "/missing"))
    lines, quiet = capture_log(level), ["/health", "/ready", "/metrics"]
    for path in (*quiet, "/nowhere"):
        service.get(path)
    service.post()
    logged = lines()
    assert {line["level"] for line in logged} == set(LEVELS[LEVELS.index(level) :])
    of_quiet = [line["level"] for line in logged if line.get("path") in quiet]
    assert of_quiet == (["DEBUG"] * 3 if level == "DEBUG" else [])


def test_log_level_does_not_apply_to_libraries(capture_log: CaptureLog) -> None:
    capture_log("DEBUG")
    assert logging.getLogger("email_processor").isEnabledFor(logging.DEBUG)
    # At DEBUG, botocore logs decrypted tokens and message bodies.
    for name in ("", "botocore", "botocore.parsers", "urllib3", "gunicorn.error"):
        assert not logging.getLogger(name).isEnabledFor(logging.DEBUG)
    # It would warn with a traceback each time that credentials are not renewed.
    assert not logging.getLogger("botocore.credentials").isEnabledFor(logging.WARNING)


def test_no_log_line_holds_a_token_or_a_field(capture_log: CaptureLog) -> None:
    data = {name: f"SECRET-{name}" for name in DATA} | {"email_timestream": "1693561101"}
    body = request_body(data, "SECRET-token")
    quoting = ValueError("no JSON: SECRET-token SECRET-email_content")  # as parsers do
    ssm, lines = FakeSsm(**{PARAMETER: "SECRET-token"}), capture_log("DEBUG")
    service, failing = InProcessService(ssm), InProcessService(ssm, FakeSqs(quoting, quoting))
    responses = {
        "success": service.post(body),
        "queue_unavailable": failing.post(body),
        "invalid_json": service.post(body[:-1]),
        "invalid_token": service.post(request_body(data, "SECRET-guess")),
        "invalid_data": service.post(body.replace(b'"SECRET-email_sender"', b'["SECRET"]')),
        "invalid_timestamp": service.post(body.replace(b"1693561101", b"SECRET")),
    }
    bodies, logged = [response.get_json() for response in responses.values()], lines()
    assert [body.get("error", "success") for body in bodies] == [*responses]
    assert [line.get("error", "success") for line in logged if "path" in line] == [*responses]
    assert "SECRET" not in json.dumps([bodies, logged])


LONG_RECORDS: dict[str, dict[str, Any]] = {
    "escapes": {"path": "\ud800" * 3000 + "/end"},
    "several fields": dict.fromkeys("abcdefghijklmnopqrstuvwxyz", "x" * 700 + "/end"),
    "list": {"request_ids": ["x" * 124 + "/end"] * 1000, "messages": 1000},
}


@pytest.mark.parametrize("fields", LONG_RECORDS.values(), ids=LONG_RECORDS)
def test_long_log_line_is_shortened_to_an_atomic_write(
    capture_log: CaptureLog, capsys: pytest.CaptureFixture[str], fields: dict[str, Any]
) -> None:
    capture_log("INFO")
    always = {"msg": "x", "levelno": logging.ERROR, "request_id": "r-1"}
    logging.getLogger("gunicorn.error").handle(logging.makeLogRecord(always | fields))
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert len(line.encode()) <= 4000
    assert json.loads(line)["request_id"] == "r-1"
    assert re.search(r"\[\d+ (more|characters cut)\]", line)
    assert "/end" in line


Pipe = tuple[app.LogHandler, Any]


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pipe]:
    """A log handler whose standard output is a pipe, and the reading end of the pipe."""
    reader, writer = os.pipe()
    with open(reader, "rb", 0) as reading, open(writer, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        yield app.LogHandler(max_queued=3), reading


LONG_LINE = "x" * 3999


def log(handler: app.LogHandler, message: str) -> None:
    handler.handle(logging.makeLogRecord({"msg": message}))


def log_until_dropped(handler: app.LogHandler) -> int:
    """Log until a line is dropped. Returns the number of lines before it."""
    before = app.LOG_LINES_DROPPED.collect()
    for number in range(1000):
        log(handler, LONG_LINE)
        if app.LOG_LINES_DROPPED.collect() != before:
            return number
    raise AssertionError("none was dropped")


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX, which forks")
@pytest.mark.parametrize("is_started", [False, True], ids=["before the fork", "in its thread"])
def test_log_drops_and_counts_lines_that_standard_output_does_not_take(
    pipe: Pipe, is_started: bool
) -> None:
    handler, reading = pipe
    if is_started:
        handler.start()
    written, output = log_until_dropped(handler), b""
    log(handler, LONG_LINE)
    assert written < 20, "the pipe has room for 16 lines, the queue for 3"
    while output.count(f"{LONG_LINE}\n".encode()) < written:
        output += reading.read(65_536)
    log(handler, "next")
    log(handler, "last")
    while b"last\n" not in output:
        output += reading.read(65_536)
    assert b"log lines dropped\n" in output


@pytest.mark.parametrize("closed", ["by its reader", "before the start"])
def test_closed_standard_output_drops_log_lines_silently(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], pipe: Pipe, closed: str
) -> None:
    handler, reading = pipe
    if closed == "before the start":
        monkeypatch.setattr(sys, "stdout", None)
        handler = app.LogHandler()
    reading.close()
    assert log_until_dropped(handler) == 0
    assert capsys.readouterr().err == ""


# --- The page /docs -------------------------------------------------------------------------------


def test_docs_page_loads_its_own_assets_only(service: InProcessService) -> None:
    response = service.get("/docs")
    page, policy = response.get_data(as_text=True), response.headers["Content-Security-Policy"]
    assert (response.status_code, response.mimetype) == (200, "text/html")
    assert "://" not in page
    (script,) = re.findall(r"<script>(.+?)</script>", page, re.DOTALL)
    digest = b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith(f"default-src 'none'; script-src 'self' 'sha256-{digest}'; ")
    assert not re.search(r"unsafe-|\*|//|\w\.\w", policy.replace(digest, ""))
    assets = re.findall(r'(?:src|href)="(/[^"]+)"', page)
    assert [service.get(asset).mimetype for asset in assets] == ["text/css", "text/javascript"]


# --- Create the application -----------------------------------------------------------------------


def test_creating_the_app_calls_nothing_and_starts_no_thread() -> None:
    threads = set(threading.enumerate())
    service = InProcessService()
    assert (service.ssm.reads, service.sqs.calls) == (0, 0)
    assert set(threading.enumerate()) <= threads


# --- Local server ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dual_stack", [True, False])
def test_local_server_listens_on_ipv4_and_ipv6_where_available(
    monkeypatch: pytest.MonkeyPatch, dual_stack: bool
) -> None:
    if dual_stack and not socket.has_dualstack_ipv6():
        pytest.skip("needs IPv6")
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: dual_stack)
    with app.listen(0) as sock:
        assert sock.family == (socket.AF_INET6 if dual_stack else socket.AF_INET)
        with socket.create_connection(("127.0.0.1", sock.getsockname()[1]), 15):
            pass


@pytest.fixture
def free_port(monkeypatch: pytest.MonkeyPatch) -> int:
    """A port for the local server, in its environment."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = int(sock.getsockname()[1])
    monkeypatch.setenv("PORT", str(port))
    monkeypatch.setenv("SQS_QUEUE_URL", QUEUE_URL)
    return port


def test_busy_port_stops_the_local_server(free_port: int) -> None:
    with socket.create_server(("", free_port)), pytest.raises(SystemExit) as stopped:
        app.main()
    assert re.fullmatch(f"Port {free_port}: .+ PORT=.+", str(stopped.value))


@pytest.mark.usefixtures("free_port")
def test_embedded_aws_without_moto_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SQS_QUEUE_URL")
    monkeypatch.setitem(sys.modules, "moto.server", None)
    with pytest.raises(SystemExit, match=r"needs requirements-dev\.txt"):
        app.main()


@pytest.mark.usefixtures("free_port")
@pytest.mark.parametrize("has_posix", [True, False])
def test_local_server_is_gunicorn_or_flasks_own_without_posix(
    monkeypatch: pytest.MonkeyPatch, capture_log: CaptureLog, has_posix: bool
) -> None:
    capture_log("INFO")  # restores the logging of this process afterwards
    execute, make_server = Mock(), Mock()
    make_server.return_value.serve_forever.side_effect = KeyboardInterrupt
    monkeypatch.setattr(os, "chdir", Mock())
    monkeypatch.setattr(os, "execv", execute)
    monkeypatch.setattr(app, "create_app", Mock())
    monkeypatch.setattr(app, "make_server", make_server)
    monkeypatch.setattr(app, "find_spec", lambda _: has_posix or None)
    app.main()
    assert (execute.called, make_server.called) == (has_posix, not has_posix)
    if has_posix:
        assert execute.call_args.args[1][1:] == ["-m", "gunicorn"]
