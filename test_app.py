"""The HTTP contract, in-process: responses, messages in the queue, log lines and metrics.

Most tests use the fakes below, which fail and count their calls; some use moto's SQS.
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
import uuid
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from unittest.mock import Mock

import boto3
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError
from moto import mock_aws
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
GET_PATHS = ["/", "/health", "/ready", "/metrics", "/openapi.json", "/docs"]


# --- Fakes of AWS ---------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Tasks(Executor):
    """Runs each task at once, in the caller's thread; or when the test says so, if `held`."""

    def __init__(self) -> None:
        self.held = False
        self.waiting = SimpleQueue[Callable[[], None]]()

    def submit(self, task: Any, /, *arguments: Any, **_: Any) -> Future[Any]:
        future = Future[Any]()

        def run() -> None:
            try:
                future.set_result(task(*arguments))
            except Exception as error:
                future.set_exception(error)

        if self.held:
            self.waiting.put(run)
        else:
            run()
        return future

    def run_next(self) -> None:
        """Run the next task that is held, once it is submitted."""
        self.waiting.get(timeout=20)()


def respond(response: Any, arguments: dict[str, Any]) -> Any:
    """Raise an exception, call a function, return anything else."""
    if isinstance(response, Exception):
        raise response
    return response(**arguments) if callable(response) else response


class FakeSsm:
    """A Parameter Store that counts its reads. A `response` takes the place of its values."""

    def __init__(self, response: Any = None, **values: str) -> None:
        self.response = response
        self.values = values or {PARAMETER: TOKEN}
        self.reads = 0

    def get_parameters(self, **arguments: Any) -> Any:
        self.reads += 1
        return respond(self.find if self.response is None else self.response, arguments)

    def find(self, Names: list[str], WithDecryption: bool) -> dict[str, Any]:  # noqa: N803
        assert WithDecryption
        found = [name for name in Names if name in self.values]
        secure = [{"Name": n, "Type": "SecureString", "Value": self.values[n]} for n in found]
        return {"Parameters": secure, "InvalidParameters": [n for n in Names if n not in found]}


def queue_limit(size: Any) -> dict[str, Any]:
    return {"Attributes": {"MaximumMessageSize": size}}


class FakeSqs:
    """A queue that records its messages. Its fields are its responses, or raised."""

    def __init__(self, sent: Any = None, attributes: Any = None) -> None:
        self.sent = {"MessageId": "6e5f0a2b"} if sent is None else sent
        self.attributes = queue_limit("1048576") if attributes is None else attributes
        self.messages: list[dict[str, Any]] = []
        self.calls = 0

    def get_queue_attributes(self, **arguments: Any) -> Any:
        self.calls += 1
        return respond(self.attributes, arguments)

    def send_message(self, **arguments: Any) -> Any:
        self.calls += 1
        self.messages.append(arguments)
        return respond(self.sent, arguments)


def client_error(code: str, status: int = 400) -> ClientError:
    error = {"Error": {"Code": code, "Message": "as AWS puts it"}}
    return ClientError(error | {"ResponseMetadata": {"HTTPStatusCode": status}}, "Operation")


DOWN = EndpointConnectionError(endpoint_url="https://aws.invalid")
DENIED = client_error("AccessDeniedException")
NO_CODE = ClientError({}, "Operation")
NO_PARAMETER = {"Parameters": [], "InvalidParameters": [PARAMETER]}


def stored(value: str, kind: str = "SecureString") -> dict[str, Any]:
    return {"Parameters": [{"Name": PARAMETER, "Type": kind, "Value": value}]}


def clear_aws_variables(patch: pytest.MonkeyPatch) -> None:
    """Hide the caller's own AWS configuration."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        patch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        patch.setenv(name, os.devnull)


@pytest.fixture
def moto(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """moto's SQS. The data of a moto server in the same process stays."""
    clear_aws_variables(monkeypatch)
    mock = mock_aws()
    mock.start(reset=False)
    yield boto3.client("sqs", "us-west-1")
    mock.stop(remove_data=False)


# --- The service, and its client ------------------------------------------------------------------


class App:
    """The application on fakes of AWS, with its responses and metrics."""

    def __init__(self, ssm: Any = None, sqs: Any = None, **changes: Any) -> None:
        self.ssm, self.sqs = ssm or FakeSsm(), sqs or FakeSqs()
        self.tasks, self.clock = Tasks(), Clock()
        self.app = app.create_app(
            app.Settings(**{"sqs_queue_url": QUEUE_URL, **changes}),
            ssm=self.ssm,
            sqs=self.sqs,
            executor=self.tasks,
            clock=self.clock,
            pause=lambda _: None,
        )

    def request(self, method: str, path: str, **options: Any) -> TestResponse:
        client = self.app.test_client(use_cookies=False)  # one each: any thread may ask
        return client.open(path, method=method, **options)

    def get(self, path: str, **options: Any) -> TestResponse:
        return self.request("GET", path, **options)

    def post(self, body: bytes | None = None, **options: Any) -> TestResponse:
        options = {"content_type": "application/json", "path": "/process", **options}
        return self.request("POST", data=BODY if body is None else body, **options)

    def post_stream(
        self, stream: Any, length: int | None, path: str = "/process", **environ: Any
    ) -> TestResponse:
        """A POST as Gunicorn passes it to the application; without a length, chunked."""
        environ |= {"wsgi.input": stream, "wsgi.input_terminated": True}
        environ |= {"CONTENT_LENGTH": str(length)} if length else {}
        environ |= {} if length else {"HTTP_TRANSFER_ENCODING": "chunked"}
        return self.post(b"", path=path, environ_overrides=environ)

    def rejects(self, code: str, body: bytes | None = None, **options: Any) -> dict[str, Any]:
        """The body of the error response to a POST that leaves no message in the queue."""
        rejected = error_body(self.post(body, **options), code)
        assert code.endswith("unavailable") or not self.sqs.messages
        return rejected

    def accepts(self, token: str) -> bool:
        """Whether the token is valid, by a request without data."""
        code = self.post(request_body(None, token)).get_json()["error"]
        assert code in ("invalid_data", "invalid_token"), code
        return bool(code == "invalid_data")

    def parameters_of(self, token: str) -> dict[str, float]:
        """The parameters whose metric a request with the token increases."""
        before, head = self.metrics(), 'tokens_accepted_total{parameter="'
        self.accepts(token)
        changes = self.changes_since(before)
        return {n.removeprefix(head)[:-2]: v for n, v in changes.items() if n.startswith(head)}

    def changes_since(self, before: dict[str, float]) -> dict[str, float]:
        """The samples of /metrics that differ, with the difference."""
        now = self.metrics()
        return {name: now[name] - before[name] for name in now if now[name] != before[name]}

    def metrics(self) -> dict[str, float]:
        lines = self.get("/metrics").get_data(as_text=True).splitlines()
        samples = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {n.removeprefix("email_processor_"): float(value) for n, _, value in samples}


@pytest.fixture
def service() -> App:
    return App()


def request_body(data: Any = DATA, token: Any = TOKEN) -> bytes:
    return json.dumps({"data": data, "token": token}).encode()


BODY = request_body()


def body_with_data(text: str) -> bytes:
    return f'{{"token": {json.dumps(TOKEN)}, "data": {text}}}'.encode()


def error_body(response: TestResponse, code: str) -> dict[str, Any]:
    """The body of an error response, checked against the shape of every error."""
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


class MotoQueue:
    """A queue of moto's, a service that sends to it, and its consumer."""

    def __init__(self, sqs: Any, suffix: str = "", **attributes: str) -> None:
        self.sqs, name = sqs, f"{uuid.uuid4()}{suffix}"
        self.url = sqs.create_queue(QueueName=name, Attributes=attributes)["QueueUrl"]
        self.service = App(sqs=sqs, sqs_queue_url=self.url)

    def only_message(self) -> dict[str, Any]:
        options = {"MaxNumberOfMessages": 10, "MessageAttributeNames": ["All"]}
        response = self.sqs.receive_message(QueueUrl=self.url, AttributeNames=["All"], **options)
        (message,) = response["Messages"]
        return dict(message)


@pytest.fixture
def queue(moto: Any) -> MotoQueue:
    return MotoQueue(moto)


LogLines = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def log_at(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[str], LogLines]]:
    """Configure logging, as Gunicorn does. The function returned gives the new lines."""
    names = ["", "email_processor", "gunicorn.error", "gunicorn.access"]
    loggers = [logging.getLogger(name) for name in names]
    before = [(logger, logger.level, logger.handlers[:]) for logger in loggers]

    def start(level: str) -> LogLines:
        logging.config.dictConfig(app.logging_config(level))
        return lambda: [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    yield start
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers


LogAt = Callable[[str], LogLines]


# --- Success --------------------------------------------------------------------------------------


def test_valid_request_puts_its_message_into_the_queue(queue: MotoQueue) -> None:
    response = queue.service.post()
    message = queue.only_message()
    assert (response.status_code, response.mimetype) == (200, "application/json")
    assert response.get_json() == {
        "status": "success",
        "message": "Email data processed and queued",
        "message_id": message["MessageId"],
    }
    assert json.loads(message["Body"]) == DATA


def test_creating_the_app_calls_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    clear_aws_variables(monkeypatch)
    threads = set(threading.enumerate())
    service = App()
    with_aws_clients = app.create_app(app.Settings(sqs_queue_url=QUEUE_URL))
    assert (service.ssm.reads, service.sqs.calls) == (0, 0)
    assert set(threading.enumerate()) <= threads
    assert with_aws_clients.test_client().get("/health").status_code == 200


# --- The other endpoints --------------------------------------------------------------------------


def test_health_is_200_while_aws_is_down() -> None:
    service = App(FakeSsm(DOWN), FakeSqs(DOWN, DOWN))
    service.rejects("token_store_unavailable")
    calls = service.ssm.reads, service.sqs.calls
    response = service.get("/health")
    body = response.get_json()
    assert (response.status_code, response.mimetype) == (200, "application/json")
    assert (service.ssm.reads, service.sqs.calls) == calls
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}", body["timestamp"])
    said = datetime.fromisoformat(body.pop("timestamp")).replace(tzinfo=UTC)
    assert abs(datetime.now(UTC) - said) < timedelta(minutes=5)
    assert body == {"status": "healthy", "service": "email-processor"}


@pytest.mark.parametrize(
    ("ssm", "attributes", "named", "unnamed"),
    [
        (DENIED, None, ["ssm:GetParameters", "AccessDeniedException"], "queue"),
        (NO_PARAMETER, None, [f"SSM does not have {PARAMETER}"], "no token"),
        (stored(" \n\u200b"), None, [f"there is no token in {PARAMETER}"], "does not have"),
        (stored(",, ,", "StringList"), None, [f"there is no token in {PARAMETER}"], "does not"),
        (None, DENIED, ["sqs:GetQueueAttributes", "AccessDeniedException"], "token"),
        (DOWN, DOWN, ["ssm:GetParameters", "sqs:GetQueueAttributes"], "success"),
    ],
    ids=["token", "parameter", "white space", "commas", "queue", "both"],
)
def test_not_ready_is_503_that_names_what_is_missing(
    ssm: Any, attributes: Any, named: list[str], unnamed: str
) -> None:
    response = App(FakeSsm(ssm), FakeSqs(attributes=attributes)).get("/ready")
    code = "token_store_unavailable" if ssm else "queue_unavailable"
    message = error_body(response, code)["message"]
    assert all(word in message for word in named)
    assert unnamed not in message.lower()


def test_ready_waits_for_no_call_of_aws(service: App) -> None:
    service.tasks.held = True
    for _ in range(2):
        message = error_body(service.get("/ready"), "token_store_unavailable")["message"]
        assert "sqs:GetQueueAttributes is in progress" in message
    assert (service.ssm.reads, service.sqs.calls) == (0, 0)
    for _ in range(3):
        service.tasks.run_next()
    assert service.get("/ready").status_code == 200
    assert (service.ssm.reads, service.sqs.calls) == (1, 1)
    assert service.tasks.waiting.empty()


def test_ready_turns_200_once_token_and_queue_are_reached() -> None:
    service = App(FakeSsm(DENIED), FakeSqs(attributes=DENIED))
    for _ in range(3):
        error_body(service.get("/ready"), "token_store_unavailable")
    assert service.ssm.reads == 1, "at most one in five seconds"
    service.ssm.response = None
    service.clock.now += 5
    error_body(service.get("/ready"), "queue_unavailable")
    service.sqs.attributes = queue_limit("1024")
    service.clock.now += 4.9
    error_body(service.get("/ready"), "queue_unavailable")
    service.clock.now += 0.1
    calls = service.sqs.calls
    for _ in range(3):
        assert service.get("/ready").status_code == 200
    assert service.sqs.calls == calls + 1
    assert not service.sqs.messages


def test_ready_stays_200_in_a_later_outage(service: App) -> None:
    assert service.post().status_code == 200
    service.sqs.attributes = service.sqs.sent = DOWN
    for response, accepted in ((DOWN, True), (NO_PARAMETER, False)):
        service.ssm.response = response
        service.clock.now += 1000
        service.accepts(TOKEN)  # starts the read
        assert service.accepts(TOKEN) == accepted
        assert service.get("/ready").status_code == 200


def test_index_lists_the_endpoints(service: App) -> None:
    body = service.get("/").get_json()
    assert set(body.pop("endpoints")) == {"POST /process", *(f"GET {path}" for path in GET_PATHS)}
    assert body == {"service": "email-processor", "version": app.VERSION, "commit": app.COMMIT}


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_checkout_reports_its_own_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout, worktree = tmp_path / "checkout", tmp_path / "worktree"
    (checkout / "folder").mkdir(parents=True)
    git(checkout, "init", "--quiet")
    assert app.commit_of(checkout) == "unknown"  # it has no commit yet
    for message in ("first", "second"):
        git(checkout, "commit", "--quiet", "--allow-empty", "--message", message)
    git(checkout, "worktree", "add", "--quiet", str(worktree), "HEAD~1")
    commits = git(checkout, "log", "--reverse", "--format=%H").split()
    monkeypatch.setenv("GIT_DIR", str(tmp_path))  # as in a hook of another repository
    assert [app.commit_of(folder) for folder in (worktree, checkout)] == commits
    assert app.commit_of(checkout / "folder") == "unknown"
    monkeypatch.setenv("PATH", "")
    assert app.commit_of(checkout) == "unknown"  # git is not installed


def test_docs_page_loads_its_own_assets_only(service: App) -> None:
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


# --- Metrics --------------------------------------------------------------------------------------


def outcomes(**counts: int) -> dict[str, int]:
    return {f'requests_total{{outcome="{name}"}}': count for name, count in counts.items()}


def test_duration_counts_post_process_only(service: App) -> None:
    before = service.metrics()
    service.get("/process")
    service.get("/health")
    for body in (BODY, b"{"):
        service.post(body)
    changes = service.changes_since(before)
    assert changes["request_duration_seconds_count"] == 2
    assert changes["request_duration_seconds_sum"] > 0


# --- Request id -----------------------------------------------------------------------------------


@pytest.mark.parametrize("offered", ["x" * 128, string.ascii_letters + string.digits + "._-"])
def test_request_id_of_the_caller_is_kept(service: App, offered: str) -> None:
    for path in ("/health", "/nowhere"):
        response = service.get(path, headers={"X-Request-Id": offered})
        assert response.headers.getlist("X-Request-Id") == [offered]


@pytest.mark.parametrize("offered", ["", "x" * 129, "a b", "a\u00b2"])
def test_malformed_request_id_is_replaced(service: App, offered: str) -> None:
    headers = {"X-Request-Id": offered}
    ids = {service.get("/", headers=headers).headers["X-Request-Id"] for _ in range(3)}
    assert len(ids) == 3
    assert all(re.fullmatch(r"[A-Za-z0-9._-]{1,128}", given) for given in ids)


# --- Paths and methods ----------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["", "/process/", "/docs//swagger-ui.css", "/\xff", "//process"])
def test_unknown_path_is_404(service: App, path: str) -> None:
    # In the environment: the client would take the first part of //process for a host.
    for method in ("GET", "POST", "OPTIONS"):
        environ = {"PATH_INFO": path, "REQUEST_METHOD": method}
        service.rejects("not_found", environ_overrides=environ)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/process", "POST"),
        ("HEAD", "/process", "POST"),
        ("OPTIONS", "/process", "POST"),
        ("POST", "/", "GET, HEAD"),
        ("X", "/docs/swagger-ui.css", "GET, HEAD"),
    ],
)
def test_wrong_method_is_405_with_allow(service: App, method: str, path: str, allowed: str) -> None:
    response = service.request(method, path)
    if method == "HEAD":
        assert (response.status_code, response.data) == (405, b"")
    else:
        error_body(response, "method_not_allowed")
    assert response.headers["Allow"] == allowed


# --- The body -------------------------------------------------------------------------------------


@pytest.mark.parametrize("declared", [True, False], ids=["length", "chunked"])
def test_body_one_byte_over_the_limit_is_413(declared: bool) -> None:
    service = App(max_request_bytes=len(BODY))
    for body, status in ((BODY, 200), (BODY + b" ", 413)):
        response = service.post_stream(io.BytesIO(body), len(body) if declared else None)
        assert response.status_code == status
    assert str(len(BODY)) in error_body(response, "request_too_large")["message"]
    assert len(service.sqs.messages) == 1


@pytest.mark.parametrize(
    ("stream", "length"),
    [
        (io.BytesIO(BODY), len(BODY) + 1),
        (Mock(read=Mock(side_effect=ConnectionResetError)), len(BODY)),
        (Mock(read=Mock(side_effect=ConnectionResetError)), None),
    ],
)
def test_truncated_body_is_400(service: App, stream: Any, length: int | None) -> None:
    error_body(service.post_stream(stream, length), "invalid_json")
    assert not service.sqs.messages


@pytest.mark.parametrize("code", ["request_too_large", "request_timeout", "overloaded"])
def test_body_that_the_worker_has_not_received_is_its_error(
    service: App, log_at: LogAt, code: str
) -> None:
    environ = {"worker.error": app.ApiError(code, cause="the worker's")}
    lines, stream = log_at("INFO"), io.BytesIO(BODY)
    error_body(service.post_stream(stream, len(BODY), **environ), code)
    assert stream.tell() == 0
    (line,) = lines()
    assert (line["error"], line["cause"]) == (code, "the worker's")
    # Other paths do not read the body.
    error_body(service.post_stream(stream, len(BODY), "/nowhere", **environ), "not_found")
    error_body(service.post_stream(stream, len(BODY), "/health", **environ), "method_not_allowed")
    assert not service.sqs.messages


# --- Validation -----------------------------------------------------------------------------------


def nested(levels: int, level: str) -> bytes:
    """The request and its data are two of the levels, the innermost list one."""
    deep = level[:-1] * (levels - 3) + "[]" + level[-1] * (levels - 3)
    return body_with_data(f'{{{json.dumps(DATA)[1:-1]}, "deep": {deep}}}')


def valued(values: int, value: str) -> bytes:
    """The request with so many JSON values: six beside the texts and the list in which they are."""
    listed = ", ".join([value] * (values - 8))
    return body_with_data(f'{{{json.dumps(DATA)[1:-1]}, "many": [{listed}]}}')


def body_with_timestamp(text: str) -> bytes:
    return body_with_data(json.dumps(DATA).replace(json.dumps(DATA["email_timestream"]), text))


def encoded(coding: str, body: bytes = BODY) -> dict[str, Any]:
    return {"body": body, "headers": {"Content-Encoding": coding}}


ACCEPTED: dict[str, dict[str, Any]] = {
    "type with a charset": {"content_type": "application/json; charset=utf-8"},
    "type in capitals": {"content_type": "Application/JSON"},
    "empty encoding": encoded(""),
    "encoding that changes nothing": encoded("Identity, identity"),
    "byte order mark": {"body": b"\xef\xbb\xbf" + BODY},
    "100 levels of lists": {"body": nested(100, "[]")},
    "100 levels of objects": {"body": nested(100, '{"a":}')},
    "10,000 values": {"body": valued(10_000, "1")},
    "10,000 values with names": {"body": valued(5_004, '{"a,": 1}')},
    "10,000 empty values": {"body": valued(10_000, "[ ]").replace(b"[ ], [ ]", b"{}, { }")},
    "code in a text": {
        "body": request_body({**DATA, "email_content": '[{"a": [1, "\\\\"]},' * 9_000})
    },
    # The neighbours of INVISIBLE, and some that are easily taken for empty.
    **{
        f"only {letter!a}": {"body": request_body({**DATA, "email_subject": letter})}
        for letter in "\u0301\u115e\u1161\u17b3\u17b6\u180a\u1810\u2801\u3163\ufdff\ufe10\uffa1-"
    },
    "start of 2000": {"body": body_with_timestamp('"946684800"')},
    "start of 2000, a number": {"body": body_with_timestamp("946684800")},
    "start of 2100": {"body": body_with_timestamp('"4102444800"')},
    "timestamp with zeros": {"body": body_with_timestamp('"00946684800"')},
    # Werkzeug would reject these.
    "malformed Host": {"environ_overrides": {"HTTP_HOST": "[::1"}},
    "WebSocket": {"headers": {"Connection": "Upgrade", "Upgrade": "websocket"}},
}


@pytest.mark.parametrize("options", ACCEPTED.values(), ids=ACCEPTED)
def test_valid_request_is_200(service: App, options: dict[str, Any]) -> None:
    assert service.post(**options).status_code == 200
    assert service.sqs.messages[0]["MessageBody"].startswith("{")


def short(value: Any) -> str:
    """The id of a test."""
    return ascii(value)[:60]


@pytest.mark.parametrize(
    ("header", "options"),
    [
        ("Content-Type", {"content_type": None}),
        ("Content-Type", {"content_type": "text/plain"}),
        ("Content-Encoding", encoded("gzip", gzip.compress(BODY, mtime=0))),
        ("Content-Encoding", encoded("x-gzip, identity")),
        ("Transfer-Encoding", {"environ_overrides": {"HTTP_TRANSFER_ENCODING": "gzip, chunked"}}),
    ],
    ids=short,
)
def test_body_that_is_not_plain_json_is_415(
    service: App, header: str, options: dict[str, Any]
) -> None:
    assert header in service.rejects("unsupported_media_type", **options)["message"]


# Part of the message -> request bodies.
INVALID_JSON = {
    "not a JSON object": [b"", b"null", b"[]", b"\xef\xbb\xbf" * 2 + BODY],
    "not UTF-8": [b'{"a": "\xe9"}', BODY.decode().encode("utf-16")],
    "NaN is not JSON": [b'{"a": NaN}'],
    "-Infinity is not JSON": [b'{"a": -Infinity}'],
    "Extra data": [b"{}{}", b"{}]"],
    "is not JSON": [b"{", b'{"a" 1}', b'{"a": 1,}', b'{"a": }', b"{a: 1}", b'{"a": 1 2}'],
    "is not JSON: ": [b'{"a": "\\x"}', b'{"a": "\x00"}', b'{"a": "\\"}', '{"a": \xe9}'.encode()],
    "delimiter: line 2 column 5 (char 6)": [b'{\n"a" 1}'],
    "delimiter: line 2 column 5 (char 13)": ['{"\xe9": 1,\n"a" 1}'.encode()],
    "nests deeper than 100 levels": [nested(101, "[]"), nested(101, '{"a":}'), b"[" * 9_999],
    "more than 10,000 values": [
        *(valued(10_001, value) for value in ("1", '""', "[ ]")),
        *(valued(5_005, '{"a": 1}'), b'{"a",' * 9_999),
        *(b"[" * 100_000 + b"]" * 100_000, b'{"a":' * 100_000),
    ],
}


@pytest.mark.parametrize(
    ("part", "body"),
    [(p, body) for p, bodies in INVALID_JSON.items() for body in bodies],
    ids=short,
)
def test_invalid_json_is_400(service: App, part: str, body: bytes) -> None:
    assert part in service.rejects("invalid_json", body)["message"]


@pytest.mark.parametrize(
    "options",
    [
        {"body": request_body(token=None)},
        {"body": request_body(token="")},
        {"body": b'{"data": {"token": "x"}}'},
        {"body": b"{}", "headers": {"Authorization": TOKEN}},
    ],
    ids=short,
)
def test_missing_token_is_401_that_names_its_place(service: App, options: dict[str, Any]) -> None:
    message = service.rejects("token_required", **options)["message"]
    assert "top level of the JSON body" in message


WRONG_TOKENS = [TOKEN + " ", "x" * 100_000, "\ud800", "\u0442\u043e\u045c\u0435\u043d", 0, [TOKEN]]


@pytest.mark.parametrize("data", [DATA, None, {"email_subject": ""}], ids=short)
@pytest.mark.parametrize("token", WRONG_TOKENS, ids=short)
def test_invalid_token_is_401_without_field_errors(service: App, token: Any, data: Any) -> None:
    rejected = service.rejects("invalid_token", request_body(data, token))
    assert rejected["message"] == "Invalid token."
    assert "errors" not in rejected


@pytest.mark.parametrize(
    "body",
    [
        request_body(None),
        request_body([DATA]),
        request_body("text"),
        json.dumps({**DATA, "token": TOKEN}).encode(),
    ],
    ids=short,
)
def test_data_that_is_no_object_is_400(service: App, body: bytes) -> None:
    assert service.rejects("invalid_data", body)["message"] == '"data" is missing or not an object.'


# Part of the message -> the JSON of email_timestream.
INVALID_TIMESTAMPS = {
    "is outside": ['"946684799"', "4102444801", f'"{"1" * 5000}"', "1" * 5000, "-" + "1" * 5000],
    "is not a Unix timestamp": [
        *('"-1693561101"', '"+169"', '"1_693_561_101"', r'" 169\n"', r'"1693561101\n"', '"1e9"'),
        *("1e9", "1693561101.0", "1693561101e0", "1.693561101e9", "true", "[1693561101]"),
        '"\u0661\u0666\u0669\u0663\u0665\u0666\u0661\u0661\u0660\u0661"',  # Arabic-Indic digits
    ],
}


@pytest.mark.parametrize(
    ("part", "text"),
    [(p, text) for p, texts in INVALID_TIMESTAMPS.items() for text in texts],
    ids=short,
)
def test_invalid_timestamp_is_400(service: App, part: str, text: str) -> None:
    rejected = service.rejects("invalid_timestamp", body_with_timestamp(text))
    message = rejected["message"]
    assert part in message
    assert rejected["errors"] == [{"field": "email_timestream", "message": message}]


# Of each kind and range: white space, controls, format characters, default-ignorable code points
# (Hangul and Khmer fillers, joiners, selectors, tags, reserved ones), the blank Braille pattern.
INVISIBLE = (
    "\u2028\u2029\u1680\x1c\x7f\xad\u061c\u0600\ufff9\u034f\u115f\u1160\u17b4\u17b5\u180b\u180e\u180f"
    "\u2065\u2800\u3164\ufe00\ufe0f\uffa0\ufff0\ufff8\U0001bca0\U0001d173\U000e0000\U000e0100\U000e0fff"
)
ABSENT = object()
BAD_FIELDS = [
    ("email_subject", ABSENT, "missing"),
    ("email_timestream", ABSENT, "missing"),
    ("email_sender", None, "missing"),
    ("email_sender", "", "empty"),
    ("email_timestream", "", "empty"),
    ("email_content", "\t\r\n \u00a0\u2003\u3000", "empty"),
    ("email_subject", " \u2060\x00\u202e\x85 \u200b\ufeff", "empty"),
    ("email_content", "\u200d" * 300_000, "empty"),
    *(("email_subject", character, "empty") for character in INVISIBLE),
    ("email_sender", 0, "not a string"),
    ("email_sender", ["a"], "not a string"),
]


@pytest.mark.parametrize(("field", "value", "problem"), BAD_FIELDS)
def test_bad_field_is_400_that_names_it(service: App, field: str, value: Any, problem: str) -> None:
    data = {name: v for name, v in {**DATA, field: value}.items() if v is not ABSENT}
    response = service.rejects("invalid_data", request_body(data))
    assert response["errors"] == [{"field": field, "message": response["message"]}]
    assert field in response["message"]
    assert problem in response["message"]


def test_all_bad_fields_are_listed_at_once(service: App) -> None:
    data = {"email_subject": "", "email_sender": 5, "email_timestream": "soon"}
    response = service.rejects("invalid_data", request_body(data))
    assert [error["field"] for error in response["errors"]] == list(DATA)
    assert all(error["message"] in response["message"] for error in response["errors"])


@pytest.mark.parametrize("token", ["\u00e9 or \U0001f600", "x" * 4096], ids=["Unicode", "long"])
def test_any_token_that_ssm_holds_is_200(token: str) -> None:
    service = App(FakeSsm(**{PARAMETER: token}))
    assert service.post(request_body(token=token)).status_code == 200


@pytest.mark.parametrize("response", [DOWN, NO_CODE, NO_PARAMETER, {}, {"Parameters": [5]}])
def test_token_that_could_never_be_read_is_503(response: Any) -> None:
    service = App(FakeSsm(response))
    for token in (TOKEN, "wrong"):
        service.rejects("token_store_unavailable", request_body(None, token))


# --- The order of the checks ----------------------------------------------------------------------


BIG = {**DATA, "email_content": "x" * 2000}
OVERSIZED = {"data": b"\xff" * 9000, "content_type": "text/plain"}
ORDER: list[tuple[int, str, dict[str, Any]]] = [
    # Each request fails the check of its code, and as many later checks as possible.
    (404, "not_found", {"path": "/nowhere", **OVERSIZED}),
    (405, "method_not_allowed", {"method": "PUT", **OVERSIZED}),
    (413, "request_too_large", OVERSIZED),
    (415, "unsupported_media_type", {"data": b"\xff", "content_type": "text/plain"}),
    (400, "invalid_json", {"data": b"\xff"}),
    (401, "token_required", {"data": b"{}", "ssm": DOWN}),
    (401, "invalid_token", {"data": request_body(None, 5), "ssm": DOWN}),
    (503, "token_store_unavailable", {"data": request_body(None), "ssm": DOWN}),
    (400, "invalid_data", {"data": request_body(None)}),
    (
        400,
        "invalid_data",
        {"data": request_body({**BIG, "email_sender": "", "email_timestream": "x"})},
    ),
    (400, "invalid_timestamp", {"data": request_body({**BIG, "email_timestream": "x"})}),
    (413, "message_too_large", {"data": request_body(BIG), "attributes": queue_limit("1024")}),
    (503, "queue_unavailable", {"data": request_body(BIG)}),
]


@pytest.mark.parametrize(("status", "code", "options"), ORDER, ids=[code for _, code, _ in ORDER])
def test_first_failed_check_decides_the_error(
    status: int, code: str, options: dict[str, Any]
) -> None:
    request = {"method": "POST", "path": "/process", "content_type": "application/json"} | options
    sqs = FakeSqs(DOWN, request.pop("attributes", DOWN))
    service = App(FakeSsm(request.pop("ssm", None)), sqs, max_request_bytes=8000)
    response = service.request(**request)
    error_body(response, code)
    assert response.status_code == status


# --- The cost of a body ---------------------------------------------------------------------------


def filled(start: bytes, unit: bytes, end: bytes = b"") -> bytes:
    """A body of the largest size."""
    return start + unit * ((2_097_152 - len(start + end)) // len(unit)) + end


IN_LIST, END = b'{"data": {"x": [', b"0]}}"
IN_TEXT = body_with_data(json.dumps(DATA)[:-1] + ', "x": "')[:-1]
DENSE = {
    "nested lists": filled(IN_LIST, b"[" * 98 + b"]" * 98 + b",", END),
    "empty lists": filled(IN_LIST, b"[],", END),
    "objects": filled(IN_LIST, b'{"":[]},', END),
    "numbers": filled(IN_LIST, b"0,", END),
    "texts": filled(IN_LIST, b'"a\\u0100",', END),
    "names": b"{" + b",".join(b'"%06x":1' % n for n in range(190_000)) + b"}",
    "one name": filled(BODY[:-1] + b",", b'"a":1,', b'"a":1}'),
    "deep lists": filled(b"", b"["),
    "deep objects": filled(b"", b'{"a":'),
    "closing brackets": filled(b"{", b"]"),
    "quotes": filled(b"{", b'"'),
    "backslashes": filled(b'{"', b"\\"),
    "white space": filled(b"{", b" \n"),
    "lines behind": filled(b"{}", b"{}\n"),
    "digits": filled(b'{"a":1', b"9", b"}"),
    "fraction": filled(b'{"a":1.', b"9", b"}"),
    "token": filled(b'{"token": "', b"\\ud800", b'"}'),
    "invisible": filled(IN_TEXT.replace(b"John doe", b"") + b'","email_sender":"', b" \\n", b'"}}'),
    "code": filled(IN_TEXT, b'[{\\"a\\": 1},', b'"}}'),
    "accents": filled(IN_TEXT, "\xe9a".encode(), b'"}}'),
    "accents and escapes": filled(IN_TEXT, '\xe9\\"'.encode(), b'"}}'),
    "accents and lines": filled(IN_TEXT, "\xe9\n".encode(), b'"}}'),
    "emoji": filled(IN_TEXT, "\U0001f600".encode(), b'"}}'),
    "emoji escaped last": filled(IN_TEXT + "\u0100".encode(), b"a", rb'\n\ud83d\ude00"}}'),
    "emoji last": filled(IN_TEXT, b"a", '\\n\U0001f600"}}'.encode()),
    "emoji in texts": filled(b'{"data": [', b'"%b\xf0\x9f\x98\x80",' % (b"a" * 250), b"0]}"),
}


@pytest.mark.parametrize("body", DENSE.values(), ids=DENSE)
def test_body_of_2_mib_takes_less_than_20_mib_and_no_loop_over_its_parts(
    service: App, body: bytes
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
    # Not counted: the routes, which the first request prepares.
    service.get("/health")
    tracemalloc.start()
    tracer = sys.gettrace()
    sys.settrace(count)
    try:
        run_wsgi_app(service.app, environ)
    finally:
        sys.settrace(tracer)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert most < 20 * 2**20
    assert steps < 100_000


# --- The size of the message ----------------------------------------------------------------------


def size_of(message: dict[str, Any]) -> int:
    """As SQS counts: bytes of the body, and of each attribute's name, type and value."""
    size = len(message["MessageBody"].encode())
    for name, attribute in message["MessageAttributes"].items():
        size += len((name + attribute["DataType"] + attribute["StringValue"]).encode())
    return size


@pytest.mark.parametrize(
    ("content", "key"), [("x" * 5000, ""), ("\u00e9\U0001f600\u65e5" * 100, "cl\u00e9")]
)
def test_message_one_byte_over_the_limit_is_413(content: str, key: str) -> None:
    text = json.dumps({**DATA, "email_content": content}, ensure_ascii=False)
    headers = {"X-Request-Id": "r-1", "Idempotency-Key": key, "X-Amzn-Trace-Id": TRACE}
    roomy = App()
    assert roomy.post(body_with_data(text), headers=headers).status_code == 200
    size = size_of(roomy.sqs.messages[0])
    exact, short = (App(sqs=FakeSqs(attributes=queue_limit(str(n)))) for n in (size, size - 1))
    assert exact.post(body_with_data(text), headers=headers).status_code == 200
    message = short.rejects("message_too_large", body_with_data(text), headers=headers)["message"]
    assert str(size) in message
    assert str(size - 1) in message


def test_limit_lowered_since_it_was_read_is_413(queue: MotoQueue) -> None:
    assert queue.service.post().status_code == 200
    attributes = {"MaximumMessageSize": "1024"}
    queue.sqs.set_queue_attributes(QueueUrl=queue.url, Attributes=attributes)
    error_body(queue.service.post(request_body(BIG)), "message_too_large")


# --- The queue ------------------------------------------------------------------------------------


@pytest.mark.parametrize("response", [DOWN, NO_CODE, {}, {"MessageId": None}, []])
def test_failing_queue_is_503_until_it_recovers(response: Any) -> None:
    service = App(sqs=FakeSqs(response))
    assert "as AWS puts it" not in service.rejects("queue_unavailable")["message"]
    service.clock.now += 1
    service.sqs.sent = {"MessageId": "later"}
    assert service.post().get_json()["message_id"] == "later"


@pytest.mark.parametrize("response", [DENIED, {}, {"Attributes": "x"}, queue_limit("x")])
def test_messages_are_sent_while_the_queues_limit_is_unknown(response: Any) -> None:
    service = App(sqs=FakeSqs(attributes=response))
    assert service.post().status_code == 200
    error_body(service.get("/ready"), "queue_unavailable")


# --- Defects -------------------------------------------------------------------------------


def test_defect_is_500_that_reveals_nothing(service: App, log_at: LogAt) -> None:
    def defect() -> None:
        raise RuntimeError("something internal")

    service.app.add_url_rule("/defect", view_func=defect)
    lines = log_at("INFO")
    response = service.get("/defect")
    body = error_body(response, "internal_error")
    assert not re.search("something internal|RuntimeError", json.dumps(body))
    cause, request = lines()
    assert re.search("in defect.*RuntimeError: something internal", cause["exc_info"], re.DOTALL)
    assert cause["level"] == request["level"] == "ERROR"
    assert cause["request_id"] == request["request_id"] == body["request_id"]


# --- The token's cache ----------------------------------------------------------------------------


def holding(*tokens: str, **changes: Any) -> App:
    """A service whose SSM holds these tokens, each as the parameter of its name."""
    ssm = FakeSsm(**{f"/{token}": token for token in tokens})
    return App(ssm, token_ssm_parameter=tuple(ssm.values), **changes)


@pytest.fixture
def cached() -> App:
    """A service whose cache holds the token "old"."""
    service = holding("old")
    assert service.accepts("old")
    return service


def test_token_is_compared_with_all_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[set[bytes]] = []
    monkeypatch.setattr(hmac, "compare_digest", lambda *both: compared.append({*both}) or True)
    assert holding("a", "b").accepts("guess")
    assert compared == [{b"a", b"guess"}, {b"b", b"guess"}]


def test_token_is_read_again_at_70_to_90_percent_of_its_age() -> None:
    random.seed(1)
    ages = []
    for _ in range(20):
        service = holding("old", token_cache_seconds=600)
        assert service.accepts("old")
        while service.ssm.reads == 1:
            service.clock.now += 5
            assert service.accepts("old")
        ages.append(service.clock.now - 1000)
    assert 420 <= min(ages) < 460
    assert 500 < max(ages) <= 545
    assert len(set(ages)) > 5, "workers that read in step"


def test_mismatch_causes_one_read_every_five_seconds(cached: App) -> None:
    for passed, reads in ((4.9, 1), (0.1, 2), (4.9, 2), (0.1, 3)):
        cached.clock.now += passed
        for _ in range(3):
            assert cached.accepts("old")
            assert not cached.accepts("guess")
        assert cached.ssm.reads == reads


def test_short_cache_shortens_the_interval_of_reads() -> None:
    service = holding("old", token_cache_seconds=1)
    assert service.accepts("old")
    for passed, reads in ((0.5, 1), (0.5, 2), (0.5, 2), (0.5, 3)):
        service.clock.now += passed
        assert not service.accepts("guess")
        assert service.ssm.reads == reads


@pytest.mark.parametrize("passed", [5, 60])
def test_rotated_token_replaces_the_old_one(cached: App, passed: float) -> None:
    cached.ssm.values, before = {"/old": "new"}, cached.metrics()
    cached.clock.now += passed
    if passed < 60:
        assert cached.accepts("new"), "at once"
    else:
        assert cached.accepts("old"), "while the read that it starts is in progress"
    assert not cached.accepts("old")
    assert cached.changes_since(before)['token_reads_total{result="success"}'] == 1


ARN = "arn:aws:ssm:us-west-1:123456789012:parameter/a"


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("/a", {"Name": "/a", "ARN": ARN}),
        ("/a:3", {"Name": "/a", "ARN": ARN, "Selector": ":3"}),
        ("/a:prod", {"Name": "/a", "ARN": ARN}),  # an emulator's
        (ARN, {"Name": "/a", "ARN": ARN}),
        (ARN, {"Name": ARN}),  # of another account
        (f"{ARN}:3", {"Name": "/a", "ARN": ARN, "Selector": ":3"}),
    ],
)
def test_accepted_token_is_counted_for_its_configured_parameter(
    log_at: LogAt, name: str, found: dict[str, str]
) -> None:
    other = {"Name": "/a-2", "ARN": f"{ARN}-2", "Value": "other"}
    response = {"Parameters": [other, {**found, "Value": "secret"}], "InvalidParameters": []}
    service, lines = (App(FakeSsm(response), token_ssm_parameter=(name, "/a-2")), log_at("INFO"))
    assert f'tokens_accepted_total{{parameter="{name}"}}' in service.metrics()
    assert service.parameters_of("secret") == {name: 1}
    assert service.parameters_of("other") == {"/a-2": 1}
    assert service.parameters_of("guess") == {}
    of_requests = [line for line in lines() if line["message"] == "request"]
    assert [line.get("token_parameter") for line in of_requests] == [name, "/a-2", None]


@pytest.mark.parametrize(
    ("names", "parameters", "counted"),
    [
        (("/a:1", "/a"), [{"Selector": ":1", "Value": "old"}, {"Value": "token"}], "/a"),
        (("/a", "/b"), [{"Value": "token"}, {"Name": "/b", "Value": "token"}], "/a"),
        (("/b", "/a"), [{"Value": "token"}, {"Name": "/b", "Value": "token"}], "/b"),
    ],
    ids=["version", "first", "first configured"],
)
def test_token_counts_for_one_parameter(
    names: tuple[str, ...], parameters: list[dict[str, str]], counted: str
) -> None:
    found = [{"Name": "/a", "ARN": ARN, **parameter} for parameter in parameters]  # by name
    service = App(FakeSsm({"Parameters": found}), token_ssm_parameter=names)
    assert service.parameters_of("token") == {counted: 1}


STORED = [
    ("SecureString", "s3 cr3t\n", ["s3 cr3t"], "white space"),
    ("SecureString", "\ufeffs3cr3t \r\n", ["s3cr3t"], "white space"),
    ("SecureString", "'s3cr3t'\n", ["'s3cr3t'"], "quotes"),
    ("SecureString", " \n", [], "no token"),
    ("String", "\u2764\ufe0f", ["\u2764\ufe0f"], "not encrypted"),
    ("SecureString", '{"token": "s3cr3t"}', ['{"token": "s3cr3t"}'], "JSON"),
    ("SecureString", '{\n "a": "s3cr3t"\n}\n', ['{\n "a": "s3cr3t"\n}'], "JSON"),
    ("SecureString", '["s3cr3t"]', ['["s3cr3t"]'], "JSON"),
    ("StringList", '{"a": "s3cr3t", "b": 1}', ['"b": 1}'], "JSON"),
    ("String", "s3cr3t", ["s3cr3t"], "not encrypted"),
    ("StringList", "a, b\n", ["a", "b"], "not encrypted"),
]


@pytest.mark.parametrize(("kind", "stored", "tokens", "warning"), STORED)
def test_stored_value_is_normalised_with_a_warning(
    log_at: LogAt, kind: str, stored: str, tokens: list[str], warning: str
) -> None:
    parameter = {"Name": "/a/name", "Type": kind, "Value": stored}
    good = {"Name": "/b", "Type": "SecureString", "Value": "good"}
    response = {"Parameters": [parameter, good], "InvalidParameters": []}
    service = App(FakeSsm(response), token_ssm_parameter=("/a/name", "/b"))
    lines = log_at("INFO")
    assert all(service.accepts(token) for token in [*tokens, "good"])
    assert stored in tokens or not service.accepts(stored)
    service.clock.now += 1000
    service.accepts("good")  # read again: no second warning
    warned = [line for line in lines() if line["level"] == "WARNING"]
    assert {tuple(line["parameters"]) for line in warned} == {("/a/name",)}
    texts = [line["message"] for line in warned]
    assert len(texts) == len(set(texts))
    assert warning in " ".join(texts)
    assert "cr3t" not in " ".join(texts)


def test_token_of_a_deleted_parameter_is_rejected(caplog: pytest.LogCaptureFixture) -> None:
    service = holding("a", "b")
    assert service.accepts("b")
    del service.ssm.values["/b"]
    service.clock.now += 60
    assert service.accepts("a")
    assert not service.accepts("b")
    assert service.accepts("a")
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    assert warning.__dict__["parameters"] == ["/b"]


PARAMETER_LEFT_OUT = {"Parameters": [], "InvalidParameters": []}


@pytest.mark.parametrize("response", [DOWN, DENIED, {}, PARAMETER_LEFT_OUT])
def test_last_known_token_works_while_ssm_fails(
    cached: App, caplog: pytest.LogCaptureFixture, response: Any
) -> None:
    before = cached.metrics()
    assert abs(time.time() - before["token_read_timestamp_seconds"]) < 300
    cached.ssm.response = response
    cached.clock.now += 1000
    assert cached.accepts("old")
    assert not cached.accepts("guess")
    changes = cached.changes_since(before)
    assert changes['token_reads_total{result="failure"}'] == 1
    assert not {'token_reads_total{result="success"}', "token_read_timestamp_seconds"} & {*changes}
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.__dict__["cause"]


def test_failing_ssm_is_read_every_five_seconds(cached: App) -> None:
    cached.ssm.response = DOWN
    cached.clock.now += 60
    for passed, reads in ((0, 2), (4.9, 2), (0.1, 3)):
        cached.clock.now += passed
        for _ in range(5):
            assert cached.accepts("old")
            assert not cached.accepts("guess")
        assert cached.ssm.reads == reads


def test_slow_failure_of_ssm_is_one_read_per_request() -> None:
    def hang(**_: Any) -> None:
        service.clock.now += 5.5
        raise DOWN

    service = App(FakeSsm(hang))
    for passed, reads in ((0, 1), (4.9, 1), (0.1, 2)):  # from its end on
        service.clock.now += passed
        service.rejects("token_store_unavailable")
        assert service.ssm.reads == reads


@pytest.mark.parametrize("passed", [59.9, 1000])
def test_known_token_is_accepted_while_a_read_is_in_progress(cached: App, passed: float) -> None:
    cached.ssm.values, cached.tasks.held = {"/old": "new"}, True
    cached.clock.now += passed
    assert all(cached.accepts("old") for _ in range(3))
    cached.tasks.run_next()
    assert (cached.accepts("old"), cached.accepts("new")) == (False, True)
    assert cached.ssm.reads == 2
    assert cached.tasks.waiting.empty()


@pytest.mark.parametrize("loaded", [True, False])
def test_requests_with_an_unknown_token_wait_for_one_read(loaded: bool) -> None:
    service = holding("old")
    if loaded:
        assert service.accepts("old")
        service.clock.now += 5
    service.ssm.values, reads = {"/old": "new"}, service.ssm.reads
    service.tasks.held = True
    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(service.accepts, token) for token in ("new", "new", "guess")]
        service.tasks.run_next()
        assert [future.result(timeout=20) for future in waiting] == [True, True, False]
    assert service.ssm.reads == reads + 1
    assert service.tasks.waiting.empty()


@pytest.mark.parametrize("loaded", [True, False])
def test_one_request_at_a_time_waits_for_a_failing_ssm(loaded: bool) -> None:
    service = holding("old")
    if loaded:
        assert service.accepts("old")
    service.ssm.response = DOWN
    service.clock.now += 60
    service.post(request_body(None, "guess"))
    service.clock.now += 5
    service.tasks.held = True
    code = "invalid_token" if loaded else "token_store_unavailable"
    with ThreadPoolExecutor() as pool:
        first = pool.submit(service.post, request_body(None, "guess"))
        run = service.tasks.waiting.get(timeout=20)
        error_body(service.post(request_body(None, "guess")), code)
        assert not loaded or service.accepts("old")
        assert not first.done()
        run()
        error_body(first.result(timeout=20), code)


# --- The response that waits for SQS --------------------------------------------------------------


def begin(service: App, **headers: str) -> tuple[Any, list[Any]]:
    """The WSGI iterable of a POST whose message waits for SQS, and the calls of start_response."""
    service.tasks.held, started = True, list[Any]()
    builder = EnvironBuilder(
        "/process", method="POST", data=BODY, content_type="application/json", headers=headers
    )
    return service.app(builder.get_environ(), lambda *given: started.append(given)), started


@pytest.mark.parametrize(
    ("sent", "status", "code"), [(None, 200, "success"), (DENIED, 503, "queue_unavailable")]
)
def test_response_that_waits_for_sqs_frees_its_thread(
    service: App, log_at: LogAt, sent: Any, status: int, code: str
) -> None:
    assert service.post().status_code == 200  # the token is read
    service.sqs.sent, lines, called = sent or service.sqs.sent, log_at("INFO"), list[Any]()
    before = service.metrics()
    body, started = begin(service, **{"X-Request-Id": "r-1", "X-Amzn-Trace-Id": TRACE})
    body.add_done_callback(called.append)
    assert (called, started, lines()) == ([], [], [])
    assert service.changes_since(before)["requests_in_flight"] == 1
    with ThreadPoolExecutor(1) as other_thread:  # which has no context of Flask's
        other_thread.submit(service.tasks.run_next).result(timeout=20)
        assert len(called) == 1
        response = json.loads(b"".join(other_thread.submit(list, body).result(timeout=20)))
    ((status_line, headers),) = started
    assert (int(status_line.split()[0]), response.get("error", "success")) == (status, code)
    assert dict(headers)["X-Request-Id"] == "r-1"
    assert ("Retry-After" in dict(headers)) == (status == 503)
    (line,) = [line for line in lines() if line["message"] == "request"]
    assert (line["status"], line["request_id"], line["trace_id"]) == (status, "r-1", TRACE_ID)
    changes = service.changes_since(before)
    # The metrics have been read twice since then.
    assert outcomes(**{code: 3 if status == 200 else 1}).items() <= changes.items()
    assert "requests_in_flight" not in changes
    assert changes["request_duration_seconds_count"] == 1


def test_request_is_recorded_once_on_every_path(service: App, log_at: LogAt) -> None:
    def defect() -> None:
        raise RuntimeError

    service.app.add_url_rule("/defect", view_func=defect)
    lines = log_at("DEBUG")
    asked: list[tuple[str, Callable[[], Any]]] = [
        ("success", service.post),
        ("success", lambda: service.get("/health")),
        ("invalid_json", lambda: service.post(b"{")),
        ("not_found", lambda: service.get("/nowhere")),
        ("method_not_allowed", lambda: service.get("/process")),
        ("internal_error", lambda: service.get("/defect")),
        ("queue_unavailable", lambda: App(sqs=FakeSqs(DENIED)).post()),
        ("invalid_json", lambda: service.app.reject(app.ApiError("invalid_json"), ENVIRON)),
    ]
    for outcome, ask in asked:
        before, _ = service.metrics(), lines()
        assert ask().status_code == (200 if outcome == "success" else app.ERRORS[outcome][0])
        recorded = [
            line.get("error", "success") for line in lines() if line["message"] == "request"
        ]
        assert recorded == [outcome]
        counted = service.changes_since(before)
        counted = {name: n for name, n in counted.items() if name.startswith("requests_total")}
        counted['requests_total{outcome="success"}'] -= 1  # of the metrics themselves
        assert {name: n for name, n in counted.items() if n} == outcomes(**{outcome: 1})


ENVIRON = {"REQUEST_METHOD": "", "PATH_INFO": "", "REMOTE_ADDR": "127.0.0.1"}


# --- The message ----------------------------------------------------------------------------------


def text_values(text: str) -> Any:
    """The JSON with each number as its source text."""
    return json.loads(text, parse_int=str, parse_float=str)


@pytest.mark.parametrize(
    "more",
    [
        '"numbers": [1.10, 1E5, 1e400, -0, -0.0, 12345678901234567890123, ' + "9" * 5000 + "]",
        '"nested": {"data": {"email_subject": ""}, "list": [null, true, [], {}]}, "": ""',
        r'"escapes": "\u0000\u001f\ufffe \\ \" \/ \ud83d\ude00 \ud83d \ude00\ud83d"',
        '"\u00e9": "\u65e5\u672c \U0001f600 \u2028 \ufffe \uffff \u200b \u0085 \x7f  "',
    ],
    ids=["numbers", "nesting", "escapes", "characters"],
)
def test_body_is_the_data_unchanged_in_ascii(service: App, more: str) -> None:
    text = f'{{{json.dumps(DATA)[1:-1]}, "email_timestream": 1693561101, {more}}}'
    assert service.post(body_with_data(text)).status_code == 200
    body = service.sqs.messages[0]["MessageBody"]
    assert text_values(body) == text_values(text)
    assert not re.search(r"[^\t\n\r -~\x7f]", body), "SQS takes no other control characters"


@pytest.mark.parametrize(
    "text",
    [
        '{"other": {"data": DECOY}, "data": DECOY, "data": DATA, "token": "x", "token": TOKEN}',
        r'{"Data": DECOY, " data": DECOY, "d\u0061ta": DATA, "more": {"data": 1}, "token": TOKEN}',
        r'{"a": "data", "b": "\"data\": {}", "data": DATA, "c": "\\", "token": TOKEN}',
    ],
    ids=["twice", "escaped name", "in strings"],
)
def test_last_data_member_is_the_message(service: App, text: str) -> None:
    decoy = {**DATA, "email_subject": "decoy"}
    for word, value in (("DATA", DATA), ("DECOY", decoy), ("TOKEN", TOKEN)):
        text = text.replace(word, json.dumps(value))
    assert service.post(text.encode()).status_code == 200
    assert json.loads(service.sqs.messages[0]["MessageBody"]) == DATA


def attributes_of(message: dict[str, Any]) -> dict[str, str]:
    assert all(value["DataType"] == "String" for value in message["MessageAttributes"].values())
    return {name: value["StringValue"] for name, value in message["MessageAttributes"].items()}


def test_message_has_attributes_of_its_request(queue: MotoQueue) -> None:
    headers = {"X-Request-Id": "r-1", "Idempotency-Key": " order 1843/\u00e9 "}
    assert queue.service.post(headers={**headers, "X-Amzn-Trace-Id": TRACE}).status_code == 200
    message = queue.only_message()
    attributes = attributes_of(message)
    processed = datetime.fromisoformat(attributes.pop("ProcessedAt"))
    assert abs(datetime.now(UTC) - processed) < timedelta(minutes=5)
    assert processed.utcoffset() == timedelta(0)
    assert attributes == {
        "ContentType": "application/json",
        "RequestId": "r-1",
        "IdempotencyKey": "order 1843/\u00e9",
    }
    assert message["Attributes"]["AWSTraceHeader"] == TRACE


@pytest.mark.parametrize("headers", [{}, {"Idempotency-Key": "  "}], ids=["no key", "blank key"])
def test_message_without_headers_has_three_attributes(
    service: App, headers: dict[str, str]
) -> None:
    response = service.post(headers=headers)
    (message,) = service.sqs.messages
    attributes = attributes_of(message)
    assert set(message) == {"QueueUrl", "MessageBody", "MessageAttributes"}
    assert set(attributes) == {"ContentType", "ProcessedAt", "RequestId"}
    assert attributes["RequestId"] == response.headers["X-Request-Id"]


UPPER = TRACE_ID.upper()
PARENT, OTHER = "Parent=53995c3f42cd8ad8", "1-00000000-000000000000000000000000"
TRACES = {
    f"Self={TRACE_ID};{TRACE};CalledFrom=app": TRACE,
    f"{TRACE};{PARENT};Sampled=1;Lineage=a87bd80c:0|68fd508a:5": f"{TRACE};{PARENT};Sampled=1",
    f"Sampled=0; {PARENT} ;\t{TRACE} ;": f"{TRACE};{PARENT};Sampled=0",
    f"{TRACE};_dd.origin=rum;x-email=a@b.c;CalledFrom=my app": TRACE,
    f";;=;a;\u00e9=\u00e9;{TRACE};a={'b' * 5000}": TRACE,
    f"{TRACE};Sampled=?;Parent=53995C3F": TRACE,
    f"Root={UPPER};Sampled=1;Sampled=0": f"Root={UPPER};Sampled=1",
    f"{TRACE}, Root={OTHER}": TRACE,  # of two headers
    f"Root=;Root={TRACE_ID}0;{TRACE}": TRACE,
    f"Root=2-{TRACE_ID[2:]}": None,
    f"x{TRACE};x={TRACE};Self={TRACE_ID};Root=1-67891233-ABCDEF": None,
    f"{PARENT};Sampled=1": None,
    f"{TRACE}\u0660": None,
    "": None,
}


@pytest.mark.parametrize(("given", "passed_on"), TRACES.items(), ids=lambda t: ascii(t)[-20:])
def test_well_formed_fields_of_the_trace_header_go_on(
    service: App, log_at: LogAt, given: str, passed_on: str | None
) -> None:
    lines = log_at("INFO")
    assert service.post(headers={"X-Amzn-Trace-Id": given}).status_code == 200
    attributes = service.sqs.messages[0].get("MessageSystemAttributes", {})
    assert attributes.get("AWSTraceHeader", {}).get("StringValue") == passed_on
    assert lines()[0].get("trace_id") == (passed_on and passed_on[5:40])


def test_fifo_queue_drops_a_repeated_idempotency_key(moto: Any) -> None:
    queue = MotoQueue(moto, ".fifo", FifoQueue="true")
    for request_id in ("r-1", "r-2"):
        headers = {"X-Request-Id": request_id, "Idempotency-Key": "k-1"}
        assert queue.service.post(headers=headers).status_code == 200
    attributes = queue.only_message()["Attributes"]
    assert attributes["MessageGroupId"]
    assert attributes["MessageDeduplicationId"] == "k-1"


@pytest.mark.parametrize(
    ("sent", "arrives"),
    [
        ("名".encode(), "名"),
        (b"\xe9-1", "é-1"),
        (b" k ", "k"),
        ("\uffff".encode(), "\xef\xbf\xbf"),  # a character that SQS rejects
    ],
)
def test_idempotency_key_arrives_as_its_text(service: App, sent: bytes, arrives: str) -> None:
    environ = {"HTTP_IDEMPOTENCY_KEY": sent.decode("latin-1")}  # as WSGI shows bytes
    assert service.post(environ_overrides=environ).status_code == 200
    assert attributes_of(service.sqs.messages[0])["IdempotencyKey"] == arrives


def test_deduplication_id_is_one_that_sqs_takes() -> None:
    service = App(sqs_queue_url=QUEUE_URL + ".fifo")
    keys = [string.punctuation, "x" * 128, "x" * 129, "x" * 130, "a b", "a\u00e9", "", ""]
    for key in keys:
        headers = {"Idempotency-Key": key, "X-Request-Id": "shared"}
        assert service.post(headers=headers).status_code == 200
    ids = [message["MessageDeduplicationId"] for message in service.sqs.messages]
    assert ids[:2] == keys[:2]
    assert len(set(ids)) == len(keys), "requests without a key share an id"
    assert all(re.fullmatch(r"[!-~]{1,128}", given) for given in ids)


# --- Settings -------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_documentation() -> None:
    defaults = ("us-west-1", (PARAMETER,), 8080, 4, 2, 2_097_152, 5, 8, 60, "INFO")
    settings = app.Settings.from_environ({"SQS_QUEUE_URL": QUEUE_URL})
    assert dataclasses.astuple(settings) == (QUEUE_URL, *defaults)


ARN = "arn:aws:ssm:us-west-1:123456789012:parameter/a"
SECRET = "/aws/reference/secretsmanager/a/b_c+d=e.f@g-h"
TEN_NAMES = ",".join(f"/{n}" for n in range(10))


@pytest.mark.parametrize(
    ("variable", "text", "value"),
    [
        ("SQS_QUEUE_URL", "http://localhost:5000/1/q.fifo", "http://localhost:5000/1/q.fifo"),
        ("AWS_REGION", "us-gov-east-1", "us-gov-east-1"),
        ("AWS_REGION", "", "us-west-1"),
        ("TOKEN_SSM_PARAMETER", "/a/b.c_d-e, /f ,g,/f", ("/a/b.c_d-e", "/f", "g")),
        ("TOKEN_SSM_PARAMETER", ARN, (ARN,)),
        ("TOKEN_SSM_PARAMETER", SECRET, (SECRET,)),
        ("TOKEN_SSM_PARAMETER", TEN_NAMES, tuple(TEN_NAMES.split(","))),
        ("PORT", " 65535 ", 65535),
        ("BODY_TIMEOUT_SECONDS", "1.5", 1.5),
        ("LOG_LEVEL", "DEBUG", "DEBUG"),
    ],
)
def test_setting_is_read_from_its_variable(variable: str, text: str, value: Any) -> None:
    environ = {"SQS_QUEUE_URL": QUEUE_URL, variable: text}
    assert getattr(app.Settings.from_environ(environ), variable.lower()) == value


BAD_SETTINGS = {
    "SQS_QUEUE_URL": [" ", "dev-CP-queue", "https://a/", "https://a b/c"],
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


@pytest.mark.parametrize("variable", BAD_SETTINGS)
def test_bad_setting_gives_one_line_that_names_it(variable: str) -> None:
    for text in BAD_SETTINGS[variable]:
        with pytest.raises(app.SettingsError) as caught:
            app.Settings.from_environ({"SQS_QUEUE_URL": QUEUE_URL, variable: text})
        (line,) = str(caught.value).splitlines()
        assert line.startswith(variable)
        assert len(line) > len(variable) + 10


def test_several_bad_settings_are_named_at_once() -> None:
    with pytest.raises(app.SettingsError) as caught:
        app.Settings.from_environ({"PORT": "x", "LOG_LEVEL": "y", "AWS_REGION": "us-west-1"})
    lines = str(caught.value).splitlines()
    assert [line.split()[0] for line in lines] == ["SQS_QUEUE_URL", "PORT", "LOG_LEVEL"]


# --- Logging --------------------------------------------------------------------------------------


def test_request_is_one_log_line_with_documented_fields(service: App, log_at: LogAt) -> None:
    lines = log_at("INFO")
    # The ALB appends the client's address to the header that the client sent.
    forwarded = {"X-Forwarded-For": "spoofed, 2001:db8::1 ", "X-Amzn-Trace-Id": TRACE}
    service.post(headers={"X-Request-Id": "r-1", **forwarded})
    service.post(request_body(token="wrong"), headers={"X-Request-Id": "r-2"})
    accepted, rejected = lines()
    for line in (accepted, rejected):
        assert abs(datetime.now(UTC) - datetime.fromisoformat(line.pop("time"))).seconds < 300
        assert line.pop("duration_ms") >= 0
    always = {"level": "INFO", "logger": "email_processor", "message": "request"}
    always |= {"method": "POST", "path": "/process"}
    traced = {"request_id": "r-1", "trace_id": TRACE_ID, "client": "2001:db8::1"}
    untraced = {"request_id": "r-2", "client": "127.0.0.1"}
    always_accepted = {"status": 200, "message_id": "6e5f0a2b", "token_parameter": PARAMETER}
    assert accepted == {**always, **traced, **always_accepted}
    assert rejected == {**always, **untraced, "status": 401, "error": "invalid_token"}


def test_every_log_line_has_the_id_and_trace_of_its_request(service: App, log_at: LogAt) -> None:
    def view() -> None:
        logging.getLogger("botocore").error("of a library, during the request")
        raise app.ApiError("internal_error")

    service.app.add_url_rule("/view", view_func=view)
    lines = log_at("INFO")
    service.get("/view", headers={"X-Request-Id": "r-1", "X-Amzn-Trace-Id": TRACE})
    logging.getLogger("botocore").error("of a library, afterwards")
    *inside, outside = lines()
    assert [line["logger"] for line in inside] == ["botocore", "email_processor"]
    assert {(line["request_id"], line["trace_id"]) for line in inside} == {("r-1", TRACE_ID)}
    assert not {"request_id", "trace_id"} & outside.keys()


LEVELS = ["DEBUG", "INFO", "WARNING", "ERROR"]


@pytest.mark.parametrize("level", ["DEBUG", "WARNING"])
def test_log_level_selects_the_lines(log_at: LogAt, level: str) -> None:
    service = App(sqs=FakeSqs(DENIED), token_ssm_parameter=(PARAMETER, "/missing"))
    lines, quiet = log_at(level), ["/health", "/ready", "/metrics"]
    for path in (*quiet, "/nowhere"):
        service.get(path)
    service.post()
    logged = lines()
    assert {line["level"] for line in logged} == set(LEVELS[LEVELS.index(level) :])
    of_quiet = [line["level"] for line in logged if line.get("path") in quiet]
    assert of_quiet == (["DEBUG"] * 3 if level == "DEBUG" else [])


def test_log_level_does_not_apply_to_libraries(log_at: LogAt) -> None:
    log_at("DEBUG")
    assert logging.getLogger("email_processor").isEnabledFor(logging.DEBUG)
    # At DEBUG, botocore logs decrypted tokens and message bodies.
    for name in ("", "botocore", "botocore.parsers", "urllib3", "gunicorn.error"):
        assert not logging.getLogger(name).isEnabledFor(logging.DEBUG)
    # It would warn with a traceback each time that credentials are not renewed.
    assert not logging.getLogger("botocore.credentials").isEnabledFor(logging.WARNING)


SECRET_DATA = {name: f"SECRET-{name}" for name in DATA} | {"email_timestream": "1693561101"}
SECRET = request_body(SECRET_DATA, "SECRET-token")
QUOTING = ValueError("no JSON: SECRET-token SECRET-email_content")  # as parsers do
SECRETS: list[tuple[str, bytes, dict[str, Any]]] = [
    ("success", SECRET, {}),
    ("invalid_json", SECRET[:-1], {}),
    ("invalid_json", SECRET.replace(b"SECRET", b"SECRET\xff"), {}),
    ("invalid_token", request_body(SECRET_DATA, "SECRET-guess"), {}),
    ("invalid_data", SECRET.replace(b'"SECRET-email_sender"', b'["SECRET"]'), {}),
    ("invalid_timestamp", SECRET.replace(b"1693561101", b"SECRET"), {}),
    ("message_too_large", SECRET.replace(b"SECRET-email_sender", b"SECRET" * 400), {}),
    ("token_store_unavailable", SECRET, {"ssm": QUOTING}),
    ("success", SECRET, {"attributes": queue_limit("SECRET")}),
    ("queue_unavailable", SECRET, {"sent": QUOTING}),
]


@pytest.mark.parametrize(("code", "body", "failing"), SECRETS)
def test_no_log_line_holds_a_token_or_a_field(
    log_at: LogAt, code: str, body: bytes, failing: dict[str, Any]
) -> None:
    lines = log_at("DEBUG")
    ssm = FakeSsm(failing.get("ssm"), **{PARAMETER: "SECRET-token"})
    sqs = FakeSqs(failing.get("sent"), failing.get("attributes", queue_limit("2048")))
    response = App(ssm, sqs).post(body).get_json()
    assert response.get("error", "success") == code
    logged = lines()
    assert logged[-1]["path"] == "/process"
    assert "SECRET" not in json.dumps([response, *logged])


def long_traceback() -> Any:
    error: Exception | None = None
    for number in range(50):
        try:
            raise ValueError(f"{number} /end") from error
        except ValueError as raised:
            error = raised
    return type(error), error, error.__traceback__ if error else None


LONG_RECORDS: dict[str, dict[str, Any]] = {
    "path": {"path": "/" + "x" * 8000 + "/end"},
    "quotes": {"path": '/"\\' * 3000 + "/end"},
    "beyond ASCII": {"path": "\u00e9\U0001f600" * 3000 + "/end"},
    "lone surrogates": {"path": "\ud800" * 3000 + "/end"},
    "message": {"msg": "Invalid request from ip=%s", "args": ("x" * 5000 + "/end",)},
    "several": dict.fromkeys("abcdefghijklmnopqrstuvwxyz", "x" * 700 + "/end"),
    "ids": {"request_ids": ["x" * 124 + "/end"] * 1000, "messages": 1000},
    "nested": {"a": {"b": [["x" * 9000 + "/end"]]}},
    "object": {"cause": ValueError("x" * 9000 + "/end")},
    "traceback": {"exc_info": long_traceback()},
}


@pytest.mark.parametrize("name", LONG_RECORDS)
def test_long_log_line_is_shortened_to_an_atomic_write(
    log_at: LogAt, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    log_at("INFO")
    fields = {"msg": "x", "levelno": logging.ERROR, "request_id": "r-1"}
    record = logging.makeLogRecord(fields | LONG_RECORDS[name])
    logging.getLogger("gunicorn.error").handle(record)
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert len(line.encode()) <= 4000
    assert json.loads(line)["request_id"] == "r-1"
    assert re.search(r"\[\d+ (more|characters cut)\]", line)
    assert "/end" in line


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[app.LogHandler, Any]]:
    """A log handler whose standard output is a pipe, and the reading end of the pipe."""
    reader, writer = os.pipe()
    with open(reader, "rb", 0) as reading, open(writer, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        yield app.LogHandler(max_queued=3), reading


Pipe = tuple[app.LogHandler, Any]


def record(message: str) -> logging.LogRecord:
    return logging.makeLogRecord({"msg": message})


LONG = "x" * 3999


def fill(handler: app.LogHandler) -> int:
    """Log until a line is dropped. Returns the number of lines before it."""
    before = app.LOG_LINES_DROPPED.collect()
    for number in range(1000):
        handler.handle(record(LONG))
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
    written, output = fill(handler), b""
    handler.handle(record(LONG))
    assert written < 20, "the pipe has room for 16 lines, the queue for 3"
    while output.count(f"{LONG}\n".encode()) < written:
        output += reading.read(65_536)
    handler.handle(record("next"))
    while b"next\n" not in output or b"log lines dropped\n" not in output:
        output += reading.read(65_536)


@pytest.mark.parametrize("closed", ["by its reader", "before the start"])
def test_closed_standard_output_drops_log_lines_silently(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], pipe: Pipe, closed: str
) -> None:
    handler, reading = pipe
    if closed == "before the start":
        monkeypatch.setattr(sys, "stdout", None)
        handler = app.LogHandler()
    reading.close()
    assert fill(handler) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("both", [True, False])
def test_local_server_listens_on_ipv4_and_ipv6_where_available(
    monkeypatch: pytest.MonkeyPatch, both: bool
) -> None:
    if both and not socket.has_dualstack_ipv6():
        pytest.skip("needs IPv6")
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: both)
    with app.listen(0) as sock:
        assert sock.family == (socket.AF_INET6 if both else socket.AF_INET)
        with socket.create_connection(("127.0.0.1", sock.getsockname()[1]), 15):
            pass


# --- Local server ---------------------------------------------------------------------------------


@pytest.fixture
def free_port(monkeypatch: pytest.MonkeyPatch) -> int:
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
def test_local_server_is_gunicorn_on_posix(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Mock(side_effect=SystemExit)
    monkeypatch.setattr(os, "execv", run)
    monkeypatch.setattr(os, "chdir", Mock())
    monkeypatch.setattr(app, "find_spec", lambda _: True)
    with pytest.raises(SystemExit):
        app.main()
    assert run.call_args.args[1][1:] == ["-m", "gunicorn"]


def test_local_server_is_flasks_where_gunicorn_cannot_run(
    monkeypatch: pytest.MonkeyPatch, log_at: LogAt, free_port: int
) -> None:
    log_at("INFO")  # puts the process's logging back afterwards
    server = Mock()
    server.return_value.serve_forever.side_effect = KeyboardInterrupt
    monkeypatch.setattr(app, "find_spec", lambda _: None)
    monkeypatch.setattr(app, "make_server", server)
    app.main()
    _, port, application = server.call_args.args
    assert port == free_port
    assert application.test_client().get("/health").status_code == 200
