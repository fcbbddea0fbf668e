"""The HTTP contract, in-process: requests go in, and what comes out is looked at: answers, what
arrived in the queue, log lines, metrics.

moto plays AWS where that shows more than the small doubles below: they fail, answer garbage and
count their calls on command.
"""

import hashlib
import hmac
import io
import itertools
import json
import logging
import logging.config
import os
import random
import re
import string
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError
from flask.testing import FlaskClient
from moto import mock_aws
from prometheus_client.parser import text_string_to_metric_families
from werkzeug.test import TestResponse

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
GET_PATHS += ["/docs/swagger-ui.css", "/docs/swagger-ui-bundle.js"]


# --- AWS, and what stands in for it ---------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0
        self.asked = threading.Event()

    def __call__(self) -> float:
        self.asked.set()
        return self.now


def give(answer: Any, arguments: dict[str, Any]) -> Any:
    """Raise an exception, call a function, return anything else."""
    if isinstance(answer, Exception):
        raise answer
    return answer(**arguments) if callable(answer) else answer


class Ssm:
    """A Parameter Store that counts its reads. With an `answer`, it gives that."""

    def __init__(self, answer: Any = None, *, values: dict[str, str] | None = None) -> None:
        self.answer = answer
        self.values = {PARAMETER: TOKEN} if values is None else values
        self.reads = 0

    def get_parameters(self, **arguments: Any) -> Any:
        self.reads += 1
        return self.find(**arguments) if self.answer is None else give(self.answer, arguments)

    def find(self, Names: list[str], WithDecryption: bool) -> dict[str, Any]:  # noqa: N803
        assert WithDecryption
        found = [name for name in Names if name in self.values]
        return {
            "Parameters": [
                {"Name": name, "Type": "SecureString", "Value": self.values[name]} for name in found
            ],
            "InvalidParameters": [name for name in Names if name not in found],
        }


def maximum(size: Any) -> dict[str, Any]:
    return {"Attributes": {"MaximumMessageSize": str(size)}}


class Sqs:
    """A queue that remembers its messages. It answers from its fields, or raises them."""

    def __init__(self, sent: Any = None, attributes: Any = None) -> None:
        self.sent = {"MessageId": "6e5f0a2b"} if sent is None else sent
        self.attributes = maximum(1_048_576) if attributes is None else attributes
        self.messages: list[dict[str, Any]] = []
        self.calls = 0

    def get_queue_attributes(self, **arguments: Any) -> Any:
        self.calls += 1
        return give(self.attributes, arguments)

    def send_message(self, **arguments: Any) -> Any:
        self.calls += 1
        self.messages.append(arguments)
        return give(self.sent, arguments)


def client_error(code: str, status: int = 400, message: str = "as AWS puts it") -> ClientError:
    metadata = {"HTTPStatusCode": status}
    error = {"Error": {"Code": code, "Message": message}, "ResponseMetadata": metadata}
    return ClientError(error, "Operation")


DOWN = EndpointConnectionError(endpoint_url="https://aws.invalid")
DENIED = client_error("AccessDeniedException")
OUTAGES = {
    "no connection": DOWN,
    "denied": DENIED,
    "throttled": client_error("ThrottlingException"),
    "failing": client_error("InternalFailure", 500),
    "an error without a code": ClientError({}, "Operation"),
    "anything": ValueError("an answer that no parser takes"),
}
each_outage = pytest.mark.parametrize("error", OUTAGES.values(), ids=OUTAGES)


def forget_aws(patch: pytest.MonkeyPatch) -> None:
    """Nothing of the caller's own AWS configuration counts."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        patch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        patch.setenv(name, os.devnull)


@pytest.fixture(scope="session")
def aws() -> Iterator[SimpleNamespace]:
    with pytest.MonkeyPatch.context() as patch:
        forget_aws(patch)
        with mock_aws():
            yield SimpleNamespace(
                ssm=boto3.client("ssm", "us-west-1"), sqs=boto3.client("sqs", "us-west-1")
            )


_numbers = itertools.count()


class Queue:
    """A queue of moto's, the service that fills it, and its consumer."""

    def __init__(self, aws: SimpleNamespace, fifo: bool = False, maximum: int = 1_048_576) -> None:
        attributes = {"MaximumMessageSize": str(maximum)} | ({"FifoQueue": "true"} if fifo else {})
        name = f"queue-{next(_numbers)}" + (".fifo" if fifo else "")
        self.sqs = aws.sqs
        self.url = aws.sqs.create_queue(QueueName=name, Attributes=attributes)["QueueUrl"]
        self.client = client_of(sqs=aws.sqs, sqs_queue_url=self.url)

    def received(self) -> list[dict[str, Any]]:
        answer = self.sqs.receive_message(
            QueueUrl=self.url,
            MaxNumberOfMessages=10,
            MessageAttributeNames=["All"],
            AttributeNames=["All"],
        )
        return list(answer.get("Messages", []))

    def only_message(self) -> dict[str, Any]:
        (message,) = self.received()
        return message


# --- The service, and its client ------------------------------------------------------------------


def settings(**changes: Any) -> app.Settings:
    return app.Settings(**{"sqs_queue_url": QUEUE_URL, **changes})


def no_pause(seconds: float) -> None:
    assert 0 < seconds < 1


def client_of(
    ssm: Any = None, sqs: Any = None, clock: Callable[[], float] = time.monotonic, **changes: Any
) -> FlaskClient:
    service = app.create_app(
        settings(**changes), ssm=ssm or Ssm(), sqs=sqs or Sqs(), clock=clock, pause=no_pause
    )
    return service.test_client(use_cookies=False)


@pytest.fixture
def sqs() -> Sqs:
    return Sqs()


@pytest.fixture
def client(sqs: Sqs) -> FlaskClient:
    return client_of(sqs=sqs)


@pytest.fixture
def queue(aws: SimpleNamespace) -> Queue:
    return Queue(aws)


def envelope(data: Any = DATA, token: Any = TOKEN) -> bytes:
    return json.dumps({"data": data, "token": token}).encode()


def post(client: FlaskClient, body: bytes | None = None, **options: Any) -> TestResponse:
    options.setdefault("content_type", "application/json")
    return client.post("/process", data=envelope() if body is None else body, **options)


def post_text(client: FlaskClient, data_text: str) -> TestResponse:
    return post(client, f'{{"token": {json.dumps(TOKEN)}, "data": {data_text}}}'.encode())


def post_stream(
    client: FlaskClient, stream: Any, length: int | None, path: str = "/process"
) -> TestResponse:
    """A POST as Gunicorn hands it on; without a length, chunked."""
    environ = {"wsgi.input": stream, "wsgi.input_terminated": True}
    environ |= {"CONTENT_TYPE": "application/json"}
    if length is None:
        environ["HTTP_TRANSFER_ENCODING"] = "chunked"
    else:
        environ["CONTENT_LENGTH"] = str(length)
    return client.open(path, method="POST", environ_overrides=environ)


def assert_refused(response: TestResponse, code: str) -> dict[str, Any]:
    """The answer is the error of that code, in the shape that every error has."""
    body = response.get_json()
    assert (response.status_code, body["error"]) == (app.ERRORS[code][0], code), body
    assert response.mimetype == "application/json"
    assert set(body) - {"errors"} == {"status", "error", "message", "request_id"}
    assert body["status"] == "error"
    assert body["message"]
    assert body["request_id"] == response.headers["X-Request-Id"]
    if response.status_code == 503:
        assert int(response.headers["Retry-After"]) > 0
    else:
        assert "Retry-After" not in response.headers
    return dict(body)


def counted(client: FlaskClient, metric: str, **labels: str) -> float:
    text = client.get("/metrics").get_data(as_text=True)
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    name = f"email_processor_{metric}"
    return sum(s.value for s in samples if s.name == name and s.labels.items() >= labels.items())


@contextmanager
def logging_as_in_production(level: str = "INFO") -> Iterator[None]:
    """The process's logging as Gunicorn sets it up; undone at the end."""
    names = ["", "email_processor", "gunicorn.error", "gunicorn.access"]
    loggers = [logging.getLogger(name) for name in names]
    before = [(logger, logger.level, logger.handlers[:]) for logger in loggers]
    logging.config.dictConfig(app.logging_config(level))
    try:
        yield
    finally:
        for logger, former, handlers in before:
            logger.setLevel(former)
            logger.handlers[:] = handlers


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    captured = capsys.readouterr()
    assert captured.err == ""
    return [json.loads(line) for line in captured.out.splitlines()]


# --- Success --------------------------------------------------------------------------------------


def test_valid_request_puts_its_message_into_the_queue(queue: Queue) -> None:
    response = post(queue.client)
    message = queue.only_message()
    assert response.status_code == 200
    assert response.mimetype == "application/json"
    assert response.get_json() == {
        "status": "success",
        "message": "Email data processed and queued",
        "message_id": message["MessageId"],
    }
    assert json.loads(message["Body"]) == DATA


@pytest.mark.parametrize(
    "content_type", ["application/json; charset=utf-8", "Application/JSON", "application/a+json"]
)
def test_json_content_type_is_200(client: FlaskClient, content_type: str) -> None:
    assert post(client, content_type=content_type).status_code == 200


def test_environment_names_queue_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    ssm, sqs = Ssm(values={"/a": "x", "/b": TOKEN}), Sqs()
    monkeypatch.setenv("SQS_QUEUE_URL", QUEUE_URL + "-2")
    monkeypatch.setenv("TOKEN_SSM_PARAMETER", "/a,/b")
    client = app.create_app(ssm=ssm, sqs=sqs).test_client()
    assert post(client).status_code == 200
    assert sqs.messages[0]["QueueUrl"] == QUEUE_URL + "-2"


def test_unusable_environment_is_a_settings_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SQS_QUEUE_URL", raising=False)
    with pytest.raises(app.SettingsError, match="SQS_QUEUE_URL"):
        app.create_app()


def test_creating_the_app_calls_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_aws(monkeypatch)
    ssm, sqs, threads = Ssm(), Sqs(), threading.active_count()
    app.create_app(settings(), ssm=ssm, sqs=sqs)
    real = app.create_app(settings()).test_client()
    assert (ssm.reads, sqs.calls, threading.active_count()) == (0, 0, threads)
    assert real.get("/health").status_code == 200


# --- The other endpoints --------------------------------------------------------------------------


def test_health_is_200_while_aws_is_down() -> None:
    ssm, sqs = Ssm(DOWN), Sqs(DOWN, DOWN)
    client = client_of(ssm, sqs)
    assert_refused(post(client), "token_store_unavailable")
    calls = ssm.reads, sqs.calls
    response = client.get("/health")
    body = response.get_json()
    assert (response.status_code, response.mimetype) == (200, "application/json")
    assert (ssm.reads, sqs.calls) == calls
    assert set(body) == {"status", "service", "timestamp"}
    assert (body["status"], body["service"]) == ("healthy", "email-processor")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}", body["timestamp"])
    said = datetime.fromisoformat(body["timestamp"]).replace(tzinfo=UTC)
    assert abs(datetime.now(UTC) - said) < timedelta(minutes=5)


@pytest.mark.parametrize(
    ("ssm", "attributes", "named", "unnamed"),
    [
        (DENIED, None, ["ssm:GetParameters", "AccessDeniedException"], "queue"),
        ({}, None, ["ssm:GetParameters"], "queue"),
        ({"Parameters": [], "InvalidParameters": [PARAMETER]}, None, ["parameter"], "queue"),
        (None, DENIED, ["sqs:GetQueueAttributes", "AccessDeniedException"], "token"),
        (None, {"Attributes": {}}, ["sqs:GetQueueAttributes"], "token"),
        (DENIED, DENIED, ["ssm:GetParameters", "sqs:GetQueueAttributes"], "health"),
    ],
)
def test_not_ready_is_503_that_names_what_is_missing(
    ssm: Any, attributes: Any, named: list[str], unnamed: str
) -> None:
    client = client_of(Ssm(ssm), Sqs(attributes=attributes))
    code = "token_store_unavailable" if ssm is not None else "queue_unavailable"
    message = assert_refused(client.get("/ready"), code)["message"]
    assert all(word in message for word in named)
    assert unnamed not in message.lower()


def test_ready_turns_200_when_what_was_missing_is_there() -> None:
    ssm, sqs, clock = Ssm(DENIED), Sqs(attributes=DENIED), Clock()
    client = client_of(ssm, sqs, clock)
    assert_refused(client.get("/ready"), "token_store_unavailable")
    ssm.answer = None
    clock.now += 60
    assert_refused(client.get("/ready"), "queue_unavailable")
    sqs.attributes = maximum(1024)
    response = client.get("/ready")
    assert (response.status_code, response.get_json()["status"]) == (200, "ready")
    assert not sqs.messages


def test_ready_stays_200_in_a_later_outage() -> None:
    ssm, sqs, clock = Ssm(), Sqs(), Clock()
    client = client_of(ssm, sqs, clock)
    assert client.get("/ready").status_code == 200
    ssm.answer = sqs.attributes = sqs.sent = DOWN
    clock.now += 1000
    assert_refused(post(client), "queue_unavailable")
    assert client.get("/ready").status_code == 200
    ssm.answer, ssm.values = None, {}
    clock.now += 1000
    assert_refused(post(client), "invalid_token")
    assert client.get("/ready").status_code == 200


def test_first_request_makes_the_worker_ready(client: FlaskClient, sqs: Sqs) -> None:
    post(client)
    sqs.attributes = DOWN
    assert client.get("/ready").status_code == 200


def test_index_lists_the_endpoints(client: FlaskClient) -> None:
    body = client.get("/").get_json()
    assert set(body) == {"service", "version", "endpoints"}
    assert (body["service"], body["version"]) == ("email-processor", app.VERSION)
    expected = {"POST /process"} | {f"GET {path}" for path in GET_PATHS[:6]}
    assert set(body["endpoints"]) == expected


def test_openapi_document_describes_every_endpoint(client: FlaskClient) -> None:
    response = client.get("/openapi.json")
    document = response.get_json()
    assert response.mimetype == "application/json"
    assert document["openapi"].startswith("3.1")
    for method, path in (e.split() for e in client.get("/").get_json()["endpoints"]):
        assert method.lower() in document["paths"][path]


def test_docs_page_needs_no_other_host(client: FlaskClient) -> None:
    response = client.get("/docs")
    page, policy = response.get_data(as_text=True), response.headers["Content-Security-Policy"]
    assert (response.status_code, response.mimetype) == (200, "text/html")
    assert "://" not in page
    directives = dict(part.split(maxsplit=1) for part in policy.split("; "))
    assert directives["default-src"] == "'none'"
    hosts = re.findall(r"(?<!')\b[\w*-]+[.:][\w.:/*-]*", policy)
    assert not [host for host in hosts if host != "data:"]
    assert "'unsafe-" not in policy
    for script in re.findall(r"<script>(.+?)</script>", page, re.DOTALL):
        digest = b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in directives["script-src"]
        assert "/openapi.json" in script
    assets = re.findall(r'(?:src|href)="(/[^"]+)"', page)
    assert len(assets) == 2
    for asset in assets:
        answer = client.get(asset)
        assert (answer.status_code, len(answer.data) > 10_000) == (200, True)
        assert answer.mimetype in ("text/css", "text/javascript")


@pytest.mark.parametrize("path", GET_PATHS)
def test_head_answers_as_get_does(client: FlaskClient, path: str) -> None:
    get, head = client.get(path), client.head(path)
    assert (head.status_code, head.data) == (get.status_code, b"") == (200, b"")
    assert head.content_type == get.content_type


# --- Metrics --------------------------------------------------------------------------------------


def test_metrics_count_answers_by_outcome(client: FlaskClient) -> None:
    def count(outcome: str) -> float:
        return counted(client, "requests_total", outcome=outcome)

    assert client.get("/metrics").content_type.startswith("text/plain; version=")
    before = {outcome: count(outcome) for outcome in ("not_found", "invalid_token")}
    client.get("/nowhere")
    for _ in range(2):
        post(client, envelope(token="wrong"))
    assert count("not_found") == before["not_found"] + 1
    assert count("invalid_token") == before["invalid_token"] + 2
    successes = count("success")
    post(client)
    # The request, and the reading of the metrics before it.
    assert count("success") == successes + 2


@pytest.mark.parametrize(
    ("method", "path", "body", "number"),
    [
        ("POST", "/process", envelope(), 1),
        ("POST", "/process", b"{", 1),
        ("GET", "/process", b"", 0),
        ("GET", "/health", b"", 0),
    ],
)
def test_duration_is_that_of_post_process_alone(
    client: FlaskClient, method: str, path: str, body: bytes, number: int
) -> None:
    metric = "request_duration_seconds"
    before = [counted(client, f"{metric}_{part}") for part in ("count", "sum")]
    client.open(path, method=method, data=body, content_type="application/json")
    after = [counted(client, f"{metric}_{part}") for part in ("count", "sum")]
    assert after[0] - before[0] == number
    assert (after[1] > before[1]) == bool(number)


@pytest.mark.parametrize("failure", [None, DOWN])
def test_requests_in_flight_have_no_answer_yet(sqs: Sqs, failure: Exception | None) -> None:
    client, seen = client_of(sqs=sqs), []

    def send(**_: Any) -> Any:
        seen.append(counted(client, "requests_in_flight"))
        return give(failure or {"MessageId": "m"}, {})

    sqs.sent = send
    post(client)
    assert set(seen) == {1}
    assert counted(client, "requests_in_flight") == 0


def test_token_read_timestamp_is_that_of_the_last_success() -> None:
    ssm, clock, before = Ssm(), Clock(), time.time()
    client = client_of(ssm, clock=clock)
    assert accepts(client, TOKEN)
    first = counted(client, "token_read_timestamp_seconds")
    assert before <= first <= time.time()
    ssm.answer = DOWN
    clock.now += 1000
    assert accepts(client, TOKEN)
    assert counted(client, "token_read_timestamp_seconds") == first


@pytest.mark.parametrize(
    ("answer", "result"),
    [
        (None, "success"),
        (DOWN, "unavailable"),
        ({}, "unavailable"),
        (client_error("ThrottlingException"), "unavailable"),
        (client_error("AccessDenied", 403), "refused"),
    ],
)
def test_call_of_sqs_is_counted_by_its_result(answer: Any, result: str) -> None:
    client = client_of(sqs=Sqs(answer))

    def counts() -> list[float]:
        return [
            counted(client, "sqs_calls_total"),
            counted(client, "sqs_calls_total", result=result),
            counted(client, "sqs_call_duration_seconds_count"),
            counted(client, "sqs_batch_size_sum"),
        ]

    before = counts()
    post(client)
    grown = [now - then for now, then in zip(counts(), before, strict=True)]
    assert grown[0] >= 1
    assert grown == [grown[0]] * 4


def test_call_of_sqs_is_timed_by_the_clock() -> None:
    clock = Clock()

    def send(**_: Any) -> dict[str, str]:
        clock.now += 0.012
        return {"MessageId": "m"}

    client = client_of(sqs=Sqs(send), clock=clock)
    before = counted(client, "sqs_call_duration_seconds_sum")
    assert post(client).status_code == 200
    assert counted(client, "sqs_call_duration_seconds_sum") - before == pytest.approx(0.012)


def test_circuit_is_shown_as_open_until_sqs_answers() -> None:
    clock, sqs = Clock(), Sqs(DOWN)
    client = client_of(sqs=sqs, clock=clock)
    assert counted(client, "sqs_circuits_open") == 0
    for _ in range(10):
        assert_refused(post(client), "queue_unavailable")
    assert counted(client, "sqs_circuits_open") == 1
    sqs.sent = {"MessageId": "m"}
    clock.now += 1
    assert post(client).status_code == 200
    assert counted(client, "sqs_circuits_open") == 0


# --- Request id -----------------------------------------------------------------------------------


@pytest.mark.parametrize("offered", ["x" * 128, string.ascii_letters + string.digits + "._-"])
def test_request_id_of_the_caller_is_kept(client: FlaskClient, offered: str) -> None:
    for path in ("/health", "/nowhere"):
        response = client.get(path, headers={"X-Request-Id": offered})
        assert response.headers.getlist("X-Request-Id") == [offered]


@pytest.mark.parametrize("offered", ["", "x" * 129, "a b", "a\u00b2", "<script>", "a\x00"])
def test_malformed_request_id_is_replaced(client: FlaskClient, offered: str) -> None:
    headers = {"X-Request-Id": offered}
    ids = {client.get("/health", headers=headers).headers["X-Request-Id"] for _ in range(3)}
    assert len(ids) == 3
    assert all(re.fullmatch(r"[A-Za-z0-9._-]{1,128}", given) for given in ids)


# --- Rule 1: paths and methods --------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/process/", "/Process", "/docs/../app.py", "/docs//swagger-ui.css", "/%ff", "/*"]
)
@pytest.mark.parametrize("method", ["GET", "OPTIONS"])
def test_unknown_path_is_404(client: FlaskClient, method: str, path: str) -> None:
    assert_refused(client.open(path, method=method), "not_found")


# As Gunicorn hands them on: the test client would take the first for a host's name.
@pytest.mark.parametrize("path", ["//process", "///process", "//"])
def test_doubled_slash_is_404_without_a_redirect(client: FlaskClient, sqs: Sqs, path: str) -> None:
    assert_refused(post(client, environ_overrides={"PATH_INFO": path}), "not_found")
    assert not sqs.messages


def test_empty_path_is_404(client: FlaskClient) -> None:
    # Of a request line such as `GET http://host HTTP/1.1`.
    assert_refused(client.get("/", environ_overrides={"PATH_INFO": ""}), "not_found")


@pytest.mark.parametrize(
    ("path", "method"),
    [
        *(("/process", method) for method in ("GET", "OPTIONS", "PUT", "X")),
        *((path, "POST") for path in GET_PATHS),
        *(("/", method) for method in ("OPTIONS", "DELETE")),
    ],
)
def test_wrong_method_is_405_with_allow(client: FlaskClient, path: str, method: str) -> None:
    response = client.open(path, method=method)
    assert_refused(response, "method_not_allowed")
    allowed = {"POST"} if path == "/process" else {"GET", "HEAD"}
    assert set(response.headers["Allow"].split(", ")) == allowed


def test_head_of_process_is_405_without_a_body(client: FlaskClient) -> None:
    response = client.head("/process")
    assert (response.status_code, response.data) == (405, b"")
    assert response.headers["Allow"] == "POST"


@pytest.mark.parametrize(
    "headers",
    [
        {"HTTP_HOST": "[::1"},
        {"HTTP_HOST": "a b\xff"},
        {"HTTP_CONNECTION": "Upgrade", "HTTP_UPGRADE": "websocket"},
    ],
)
def test_odd_host_or_upgrade_does_not_matter(client: FlaskClient, headers: dict[str, str]) -> None:
    assert client.get("/health", environ_overrides=headers).status_code == 200


# --- Rules 2 and 3: the body ----------------------------------------------------------------------

each_framing = pytest.mark.parametrize("declared", [True, False], ids=["length", "chunked"])


@each_framing
def test_body_one_byte_over_the_limit_is_413(sqs: Sqs, declared: bool) -> None:
    body = envelope()
    client = client_of(sqs=sqs, max_request_bytes=len(body))
    assert post_stream(client, io.BytesIO(body), len(body) if declared else None).status_code == 200
    stream = io.BytesIO(body + b" ")
    response = post_stream(client, stream, len(body) + 1 if declared else None)
    assert str(len(body)) in assert_refused(response, "request_too_large")["message"]
    assert stream.read() == b"", "what is not read would be taken for the next request"
    assert len(sqs.messages) == 1


@each_framing
@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/process", "request_too_large"),
        ("/nowhere", "not_found"),
        ("/health", "method_not_allowed"),
    ],
)
def test_body_that_is_not_wanted_is_read_to_its_end(path: str, code: str, declared: bool) -> None:
    stream = io.BytesIO(b"x" * 500_000)
    client = client_of(max_request_bytes=100)
    assert_refused(post_stream(client, stream, 500_000 if declared else None, path), code)
    assert stream.read() == b""


def test_body_declared_over_the_limit_is_413_at_its_end() -> None:
    client = client_of(max_request_bytes=100)
    assert_refused(post_stream(client, io.BytesIO(b"x"), 101), "request_too_large")


class Failing(io.BytesIO):
    """A body whose read fails before it is whole."""

    def __init__(self, failure: Exception) -> None:
        super().__init__()
        self.failure = failure

    def read(self, _: int | None = -1) -> bytes:
        raise self.failure


@pytest.mark.parametrize(
    "stream", [io.BytesIO(), io.BytesIO(envelope()), Failing(ConnectionResetError())]
)
def test_body_shorter_than_its_length_is_400(client: FlaskClient, sqs: Sqs, stream: Any) -> None:
    assert_refused(post_stream(client, stream, len(envelope()) + 1), "invalid_json")
    assert not sqs.messages


def test_malformed_chunks_are_400(client: FlaskClient, sqs: Sqs) -> None:
    errors = pytest.importorskip("gunicorn.http.errors")
    for failure in (errors.NoMoreData(), errors.InvalidChunkSize(b"zz")):
        assert_refused(post_stream(client, Failing(failure), None), "invalid_json")
    assert not sqs.messages


# --- Rules 4 and 5: content type and JSON ---------------------------------------------------------


@pytest.mark.parametrize(
    "content_type", [None, "text/plain", "text/json", "application/x-www-form-urlencoded"]
)
def test_content_type_other_than_json_is_415(
    client: FlaskClient, sqs: Sqs, content_type: str | None
) -> None:
    assert_refused(post(client, content_type=content_type), "unsupported_media_type")
    assert not sqs.messages


NOT_JSON_OBJECTS = {
    "nothing": b"",
    "null": b"null",
    "list": b"[]",
    "number": b"1",
    "string": b'"text"',
    "unfinished": b"{",
    "two objects": b"{}{}",
    "trailing comma": b'{"a": 1,}',
    "leading zero": b'{"a": 01}',
    "control character": b'{"a": "\x01"}',
    "broken escape": b'{"a": "\\ud8"}',
    "NaN": b'{"a": NaN}',
    "-Infinity": b'{"a": -Infinity}',
    "Latin-1": b'{"a": "\xe9"}',
    "surrogate in UTF-8": b'{"a": "\xed\xa0\x80"}',
    "UTF-16": envelope().decode().encode("utf-16"),
    "UTF-16 without a mark": envelope().decode().encode("utf-16-le"),
    "UTF-32": envelope().decode().encode("utf-32"),
    "100,000 lists": b"[" * 100_000 + b"]" * 100_000,
    "100,000 unfinished lists": b"[" * 100_000,
    "100,000 unfinished objects": b'{"a":' * 100_000,
}


@pytest.mark.parametrize("body", NOT_JSON_OBJECTS.values(), ids=NOT_JSON_OBJECTS)
def test_what_is_no_json_object_in_utf8_is_400(client: FlaskClient, sqs: Sqs, body: bytes) -> None:
    assert_refused(post(client, body), "invalid_json")
    assert not sqs.messages


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_json_nested_deeper_than_100_levels_is_400(
    client: FlaskClient, opening: str, closing: str
) -> None:
    # The request and its data are two levels, the innermost value one.
    deep, deeper = (opening * n + "[]" + closing * n for n in (97, 98))
    fields = json.dumps(DATA)[1:-1]
    assert post_text(client, f'{{{fields}, "deep": {deep}}}').status_code == 200
    assert_refused(post_text(client, f'{{{fields}, "deep": {deeper}}}'), "invalid_json")


def test_many_brackets_that_are_not_deep_are_200(client: FlaskClient) -> None:
    data = {**DATA, "text": "[{" * 500, "wide": [[], {}] * 500}
    assert post(client, envelope(data)).status_code == 200


# --- Rules 6 to 8: the token ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "body", [b"{}", envelope(token=None), envelope(token=""), json.dumps({"Token": TOKEN}).encode()]
)
def test_missing_null_or_empty_token_is_401(client: FlaskClient, sqs: Sqs, body: bytes) -> None:
    answer = assert_refused(post(client, body), "token_required")
    assert "token" in answer["message"]
    assert "errors" not in answer
    assert not sqs.messages


WRONG_TOKENS = [
    *(TOKEN + " ", TOKEN[:-1], TOKEN.lower(), " ", "x" * 100_000),
    *("\x00", "\ud800", TOKEN + "\udfff", "\u0442\u043e\u045c\u0435\u043d", "\U0001f600"),
    *(0, 1.5, True, [TOKEN], {"token": TOKEN}),
]


@pytest.mark.parametrize("token", WRONG_TOKENS, ids=lambda token: ascii(token)[:24])
def test_unknown_token_is_401_that_reveals_no_field_errors(
    client: FlaskClient, sqs: Sqs, token: Any
) -> None:
    for data in (DATA, None, {"email_subject": ""}):
        body = assert_refused(post(client, envelope(data, token)), "invalid_token")
        assert "Invalid token" in body["message"]
        assert "email_" not in body["message"]
        assert "errors" not in body
    assert not sqs.messages


@pytest.mark.parametrize("token", ["\u00e9 or \U0001f600", "x" * 4096])
def test_any_token_that_ssm_holds_is_200(token: str) -> None:
    client = client_of(Ssm(values={PARAMETER: token}))
    assert post(client, envelope(token=token)).status_code == 200


@each_outage
def test_token_that_could_never_be_read_is_503(sqs: Sqs, error: Exception) -> None:
    client = client_of(Ssm(error), sqs)
    for token in (TOKEN, "wrong"):
        assert_refused(post(client, envelope(None, token)), "token_store_unavailable")
    assert not sqs.messages


@pytest.mark.parametrize("answer", [{}, {"Parameters": "x"}, {"Parameters": [5]}, [], b""])
def test_garbled_answer_of_ssm_is_503(answer: Any) -> None:
    assert_refused(post(client_of(Ssm(answer))), "token_store_unavailable")


def test_token_parameter_that_never_existed_is_503(aws: SimpleNamespace) -> None:
    client = client_of(aws.ssm, token_ssm_parameter=("/never/put",))
    assert_refused(post(client), "token_store_unavailable")


# --- Rules 9 to 11: the data ----------------------------------------------------------------------


@pytest.mark.parametrize("data", [None, [DATA], "text", 0, True, json.dumps(DATA)])
def test_data_that_is_no_object_is_400(client: FlaskClient, sqs: Sqs, data: Any) -> None:
    body = assert_refused(post(client, envelope(data)), "invalid_data")
    assert "data" in body["message"]
    assert not sqs.messages


def test_missing_data_is_400(client: FlaskClient) -> None:
    for body in ({"token": TOKEN}, {"token": TOKEN, **DATA}):
        assert_refused(post(client, json.dumps(body).encode()), "invalid_data")


BAD_FIELDS = [
    *((field, {}, False) for field in DATA),
    *((field, {field: ""}, True) for field in DATA),
    ("email_sender", {"email_sender": None}, False),
    ("email_timestream", {"email_timestream": None}, False),
    ("email_content", {"email_content": "\t\r\n \u00a0\u2003\u3000"}, True),
    ("email_timestream", {"email_timestream": " "}, True),
    *(("email_subject", {"email_subject": value}, False) for value in (0, True, ["a"], {})),
]


@pytest.mark.parametrize(("field", "change", "empty"), BAD_FIELDS)
def test_bad_field_is_400_that_names_it(
    client: FlaskClient, sqs: Sqs, field: str, change: dict[str, Any], empty: bool
) -> None:
    data = {name: value for name, value in DATA.items() if name != field} | change
    body = assert_refused(post(client, envelope(data)), "invalid_data")
    (error,) = body["errors"]
    assert set(error) == {"field", "message"}
    assert error["field"] == field
    for message in (body["message"], error["message"]):
        assert field in message
        assert ("empty" in message) == empty
    assert not sqs.messages


def test_all_bad_fields_are_listed_at_once(client: FlaskClient) -> None:
    data = {"email_subject": "", "email_sender": 5, "email_timestream": "soon"}
    body = assert_refused(post(client, envelope(data)), "invalid_data")
    assert [error["field"] for error in body["errors"]] == list(DATA)
    for error in body["errors"]:
        assert error["message"] in body["message"]


@pytest.mark.parametrize(
    "timestamp", ["946684800", "4102444800", 946684800, 4102444800, "000946684800"]
)
def test_timestamp_from_2000_to_2100_is_200(client: FlaskClient, timestamp: Any) -> None:
    assert post(client, envelope({**DATA, "email_timestream": timestamp})).status_code == 200


BAD_TIMESTAMPS = [
    *("946684799", "4102444801", "-1693561101", "1" * 5000, "0" * 5000),
    *(946684799, 4102444801, -1693561101, 10**19),
    *("1_693_561_101", " 169\n", " 1693561101", "1693561101\n", "+1693561101", "1693561101\x00"),
    *("1e9", "1693561101.0", "0x64F1B24D", "2023-09-01T09:38:21Z", "169356110\u00b9"),
    "\u0661\u0666\u0669\u0663\u0665\u0666\u0661\u0661\u0660\u0661",  # Arabic-Indic digits
    *(True, False, 1693561101.0, 1693561101.5, [1693561101], {}),
]


@pytest.mark.parametrize("timestamp", BAD_TIMESTAMPS, ids=lambda value: ascii(value)[:24])
def test_bad_timestamp_is_400(client: FlaskClient, sqs: Sqs, timestamp: Any) -> None:
    data = {**DATA, "email_timestream": timestamp}
    body = assert_refused(post(client, envelope(data)), "invalid_timestamp")
    assert "timestamp" in body["message"]
    (error,) = body["errors"]
    assert error["field"] == "email_timestream"
    assert error["message"] in body["message"]
    assert not sqs.messages


@pytest.mark.parametrize("number", ["1" * 5000, "-" + "1" * 5000, "1e400", "1e9", "1693561101e0"])
def test_json_number_that_is_no_timestamp_is_400(client: FlaskClient, number: str) -> None:
    text = json.dumps({**DATA, "email_timestream": 0}).replace(": 0,", f": {number},")
    assert_refused(post_text(client, text), "invalid_timestamp")


# --- The order of the checks ----------------------------------------------------------------------

BIG = {**DATA, "email_content": "x" * 2000}
ORDER: list[tuple[str, dict[str, Any]]] = [
    # Each request breaks the rule of its code, and as many of the later ones as it can.
    ("not_found", {"path": "/nowhere", "body": b"\xff" * 9000, "content_type": "text/plain"}),
    ("method_not_allowed", {"method": "PUT", "body": b"\xff" * 9000, "content_type": "text/plain"}),
    ("request_too_large", {"body": b"\xff" * 9000, "content_type": "text/plain"}),
    ("unsupported_media_type", {"body": b"\xff", "content_type": "text/plain"}),
    ("invalid_json", {"body": b"\xff"}),
    ("token_required", {"body": b"{}", "ssm": DOWN}),
    ("invalid_token", {"body": envelope(None, 5), "ssm": DOWN}),
    ("token_store_unavailable", {"body": envelope(None), "ssm": DOWN}),
    ("invalid_data", {"body": envelope(None)}),
    ("invalid_data", {"body": envelope({**BIG, "email_sender": "", "email_timestream": "x"})}),
    ("invalid_timestamp", {"body": envelope({**BIG, "email_timestream": "x"})}),
    ("message_too_large", {"body": envelope(BIG), "attributes": maximum(1024)}),
    ("queue_unavailable", {"body": envelope(BIG)}),
]


@pytest.mark.parametrize(("code", "broken"), ORDER, ids=[code for code, _ in ORDER])
def test_first_rule_that_is_broken_answers(code: str, broken: dict[str, Any]) -> None:
    sqs = Sqs(DOWN, broken.get("attributes", DOWN))
    client = client_of(Ssm(broken.get("ssm")), sqs, max_request_bytes=8000)
    response = client.open(
        broken.get("path", "/process"),
        method=broken.get("method", "POST"),
        data=broken["body"],
        content_type=broken.get("content_type", "application/json"),
    )
    assert_refused(response, code)


# --- Rule 12: the size of the message -------------------------------------------------------------


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
    def send(sqs: Sqs) -> TestResponse:
        text = json.dumps({**DATA, "email_content": content}, ensure_ascii=False)
        headers = {"X-Request-Id": "r-1", "Idempotency-Key": key, "X-Amzn-Trace-Id": TRACE}
        body = f'{{"token": {json.dumps(TOKEN)}, "data": {text}}}'.encode()
        return post(client_of(sqs=sqs), body, headers=headers)

    roomy = Sqs()
    assert send(roomy).status_code == 200
    size = size_of(roomy.messages[0])
    exact, short = Sqs(attributes=maximum(size)), Sqs(attributes=maximum(size - 1))
    assert send(exact).status_code == 200
    body = assert_refused(send(short), "message_too_large")
    assert str(size) in body["message"]
    assert str(size - 1) in body["message"]
    assert not short.messages


@pytest.mark.parametrize("limit", [1024, 1_048_576])
def test_limit_is_the_queues_own(aws: SimpleNamespace, limit: int) -> None:
    queue = Queue(aws, maximum=limit)
    for size, status in ((limit - 500, 200), (limit, 413)):
        data = {**DATA, "email_content": "x" * (size - len(json.dumps(DATA)))}
        assert post(queue.client, envelope(data)).status_code == status
    assert queue.only_message()


def test_limit_is_asked_for_once(client: FlaskClient, sqs: Sqs) -> None:
    for _ in range(3):
        post(client)
    assert sqs.calls == 1 + 3


def test_limit_lowered_since_it_was_read_is_413(queue: Queue) -> None:
    assert post(queue.client).status_code == 200
    attributes = {"MaximumMessageSize": "1024"}
    queue.sqs.set_queue_attributes(QueueUrl=queue.url, Attributes=attributes)
    assert_refused(post(queue.client, envelope(BIG)), "message_too_large")


# --- Rule 13: the queue ---------------------------------------------------------------------------


@each_outage
@pytest.mark.parametrize("operation", ["sent", "attributes"])
def test_queue_that_fails_is_503_until_it_answers(operation: str, error: Exception) -> None:
    sqs, clock = Sqs(**{operation: error}), Clock()
    client = client_of(sqs=sqs, clock=clock)
    body = assert_refused(post(client), "queue_unavailable")
    assert "as AWS puts it" not in body["message"]
    clock.now += 1
    sqs.sent, sqs.attributes = {"MessageId": "later"}, maximum(1024)
    assert post(client).get_json()["message_id"] == "later"


@pytest.mark.parametrize(
    ("operation", "answer"),
    [
        ("sent", {}),
        ("sent", {"MessageId": ""}),
        ("sent", {"MessageId": None}),
        ("sent", []),
        ("attributes", {}),
        ("attributes", {"Attributes": {}}),
        ("attributes", {"Attributes": "x"}),
        ("attributes", maximum("big")),
        ("attributes", {"Attributes": {"MaximumMessageSize": []}}),
    ],
)
def test_garbled_answer_of_sqs_is_503(operation: str, answer: Any) -> None:
    client = client_of(sqs=Sqs(**{operation: answer}))
    assert_refused(post(client), "queue_unavailable")


def test_queue_that_does_not_exist_is_503(aws: SimpleNamespace) -> None:
    client = client_of(sqs=aws.sqs)
    assert_refused(post(client), "queue_unavailable")
    assert_refused(client.get("/ready"), "queue_unavailable")


# --- Rule 14: the unforeseen ----------------------------------------------------------------------


def test_defect_is_500_that_reveals_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    service = app.create_app(settings(), ssm=Ssm(), sqs=Sqs())

    def defect() -> None:
        raise RuntimeError("something internal")

    service.add_url_rule("/defect", view_func=defect)
    with logging_as_in_production():
        response = service.test_client().get("/defect", headers={"X-Request-Id": "r-1"})
    assert_refused(response, "internal_error")
    assert "something internal" not in response.get_data(as_text=True)
    assert "RuntimeError" not in response.get_data(as_text=True)
    defect_line, answer = lines_of(capsys)
    assert "something internal" in defect_line["exc_info"]
    assert "in defect" in defect_line["exc_info"]
    assert defect_line["level"] == answer["level"] == "ERROR"
    assert defect_line["request_id"] == answer["request_id"] == "r-1"


def test_error_codes_are_those_of_the_contract() -> None:
    assert {code: status for code, (status, _) in app.ERRORS.items()} == {
        "not_found": 404,
        "method_not_allowed": 405,
        "request_too_large": 413,
        "request_timeout": 408,
        "unsupported_media_type": 415,
        "invalid_json": 400,
        "token_required": 401,
        "invalid_token": 401,
        "token_store_unavailable": 503,
        "invalid_data": 400,
        "invalid_timestamp": 400,
        "message_too_large": 413,
        "queue_unavailable": 503,
        "internal_error": 500,
    }


# --- The token's cache ----------------------------------------------------------------------------


def accepts(client: FlaskClient, token: str) -> bool:
    """Whether the token counts, asked without sending anything; from any thread."""
    response = post(client.application.test_client(), envelope(None, token))
    code = response.get_json()["error"]
    assert code in ("invalid_data", "invalid_token"), code
    return bool(code == "invalid_data")


class Store:
    """The service with its SSM, at a time that stands still."""

    def __init__(self, *tokens: str, **changes: Any) -> None:
        names = tuple(f"/{token}" for token in tokens)
        self.ssm = Ssm(values={f"/{token}": token for token in tokens})
        self.clock = Clock()
        self.client = client_of(self.ssm, clock=self.clock, token_ssm_parameter=names, **changes)

    def accepts(self, token: str) -> bool:
        return accepts(self.client, token)

    @property
    def is_ready(self) -> bool:
        return self.client.get("/ready").status_code == 200


@pytest.fixture
def store() -> Store:
    """One whose cache holds the token "old"."""
    store = Store("old")
    assert store.accepts("old")
    return store


def test_token_is_compared_in_constant_time_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(tuple(sorted((one, other))))
        return True

    store = Store("a", "b")
    monkeypatch.setattr(hmac, "compare_digest", compare)
    assert store.accepts("guess")
    # With all, also after one that matched: the time does not tell which.
    assert set(compared) == {(b"a", b"guess"), (b"b", b"guess")}


def test_many_requests_cause_one_read(store: Store) -> None:
    assert all(store.accepts("old") for _ in range(20))
    assert store.ssm.reads == 1


def test_cache_lasts_from_70_to_90_percent_of_its_age() -> None:
    random.seed(1)
    stores = [Store("old") for _ in range(20)]
    read_at = []
    for store in stores:
        assert store.accepts("old")
        while store.ssm.reads == 1:
            store.clock.now += 0.5
            assert store.accepts("old")
        read_at.append(store.clock.now - 1000)
    assert 42 <= min(read_at) < 46
    assert 50 < max(read_at) <= 54.5
    assert len(set(read_at)) > 5, "workers that read in step"


def test_age_of_the_cache_is_that_of_the_settings() -> None:
    store = Store("old", token_cache_seconds=600)
    assert store.accepts("old")
    store.clock.now += 419
    assert store.accepts("old")
    assert store.ssm.reads == 1
    store.clock.now += 122
    assert store.accepts("old")
    assert store.ssm.reads == 2


def test_mismatch_causes_one_read_every_five_seconds(store: Store) -> None:
    for passed, reads in ((4.9, 1), (0.1, 2), (4.9, 2), (0.1, 3)):
        store.clock.now += passed
        for _ in range(3):
            assert not store.accepts("guess")
            assert store.accepts("old")
        assert store.ssm.reads == reads


def test_rotated_token_works_at_once(aws: SimpleNamespace) -> None:
    name, clock = f"/token/{next(_numbers)}", Clock()
    client = client_of(aws.ssm, clock=clock, token_ssm_parameter=(name,))
    for token in ("old", "new"):
        aws.ssm.put_parameter(Name=name, Value=token, Type="SecureString", Overwrite=True)
        clock.now += 5
        assert accepts(client, token)
    assert not accepts(client, "old")


def test_old_token_stops_working_when_the_cache_is_old(store: Store) -> None:
    store.ssm.values = {"/old": "new"}
    store.clock.now += 60
    assert not store.accepts("old")


def test_every_one_of_several_parameters_is_accepted() -> None:
    store = Store("a", "b", "c")
    assert [store.accepts(token) for token in "abcd"] == [True, True, True, False]


def test_deleted_parameter_stops_its_token_alone(caplog: pytest.LogCaptureFixture) -> None:
    store = Store("a", "b")
    assert store.accepts("b")
    del store.ssm.values["/b"]
    store.clock.now += 60
    assert not store.accepts("b")
    assert store.accepts("a")
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    assert warning.__dict__["parameters"] == ["/b"]


def test_only_parameter_deleted_is_no_outage(aws: SimpleNamespace) -> None:
    name, clock = f"/token/{next(_numbers)}", Clock()
    client = client_of(aws.ssm, clock=clock, token_ssm_parameter=(name,))
    aws.ssm.put_parameter(Name=name, Value="old", Type="SecureString")
    assert accepts(client, "old")
    aws.ssm.delete_parameter(Name=name)
    clock.now += 60
    assert not accepts(client, "old")
    aws.ssm.put_parameter(Name=name, Value="again", Type="SecureString")
    clock.now += 5
    assert accepts(client, "again")


UNKNOWN_FATE = {"Parameters": [], "InvalidParameters": []}  # speaks of no parameter


@pytest.mark.parametrize(
    "answer", [*OUTAGES.values(), {}, UNKNOWN_FATE], ids=[*OUTAGES, "garbage", "no word of it"]
)
def test_last_known_token_works_while_ssm_fails(
    store: Store, caplog: pytest.LogCaptureFixture, answer: Any
) -> None:
    def reads(result: str) -> float:
        return counted(store.client, "token_reads_total", result=result)

    failures, successes = reads("failure"), reads("success")
    store.ssm.answer = answer
    store.clock.now += 1000
    assert store.accepts("old")
    assert not store.accepts("guess")
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.__dict__["cause"]
    assert reads("failure") == failures + 1
    store.ssm.answer = None
    store.clock.now += 5
    assert store.accepts("old")
    assert reads("success") == successes + 1


def test_ssm_that_fails_is_asked_every_five_seconds(store: Store) -> None:
    store.ssm.answer = DOWN
    store.clock.now += 60
    for passed, reads in ((0, 2), (4.9, 2), (0.1, 3)):
        store.clock.now += passed
        for _ in range(5):
            assert store.accepts("old")
            assert not store.accepts("guess")
        assert store.ssm.reads == reads


def test_slow_failure_of_ssm_costs_a_request_one_read() -> None:
    store = Store("old")

    def hang(**_: Any) -> None:
        store.clock.now += 5.5
        raise DOWN

    store.ssm.answer = hang
    assert_refused(post(store.client), "token_store_unavailable")
    assert store.ssm.reads == 1


def test_token_store_recovers_when_ssm_does() -> None:
    store = Store("old")
    store.ssm.answer = DOWN
    for _ in range(3):
        assert_refused(post(store.client), "token_store_unavailable")
    assert store.ssm.reads == 1
    assert not store.is_ready
    store.ssm.answer = None
    store.clock.now += 5
    assert store.accepts("old")
    assert store.is_ready


def test_parameter_put_after_the_start_is_found() -> None:
    store = Store("late")
    token = store.ssm.values.pop("/late")
    assert_refused(post(store.client), "token_store_unavailable")
    store.ssm.values["/late"] = token
    store.clock.now += 5
    assert store.accepts("late")


class ReadUnderWay:
    """Another thread is inside of its read of SSM until the gate is opened."""

    def __init__(self, store: Store, token: str) -> None:
        self.store, self.entered, self.gate = store, threading.Event(), threading.Event()
        store.ssm.answer = self._answer
        self._pool = ThreadPoolExecutor()
        self.reading = self.accepts(token)

    def _answer(self, **arguments: Any) -> Any:
        self.entered.set()
        assert self.gate.wait(60)
        return self.store.ssm.find(**arguments)

    def accepts(self, token: str) -> Any:
        """What a further thread finds; it has looked at the clock when this returns."""
        self.store.clock.asked.clear()
        answer = self._pool.submit(self.store.accepts, token)
        assert self.store.clock.asked.wait(60)
        return answer

    def __enter__(self) -> "ReadUnderWay":
        assert self.entered.wait(60)
        return self

    def __exit__(self, *_: object) -> None:
        self.gate.set()
        self._pool.shutdown()


def test_early_read_keeps_no_other_thread_waiting(store: Store) -> None:
    store.clock.now += 59.9
    with ReadUnderWay(store, "old") as other:
        assert all(other.accepts("old").result(timeout=60) for _ in range(4))
        assert not other.reading.done()
        assert store.ssm.reads == 2
        other.gate.set()
        assert other.reading.result(timeout=60)
    assert store.ssm.reads == 2


@pytest.mark.parametrize("loaded", [True, False])
def test_threads_with_too_old_a_cache_share_one_read(loaded: bool) -> None:
    store = Store("old")
    if loaded:
        assert store.accepts("old")
        store.ssm.values = {"/old": "new"}
    store.clock.now += 60
    before, token = store.ssm.reads, store.ssm.values["/old"]
    with ReadUnderWay(store, token) as other:
        waiting = [other.accepts(token) for _ in range(4)]
        assert store.ssm.reads == before + 1
        other.gate.set()
        assert all(answer.result(timeout=60) for answer in (other.reading, *waiting))
    assert store.ssm.reads == before + 1


def test_nobody_waits_for_an_ssm_that_is_known_to_fail(store: Store) -> None:
    store.ssm.answer = DOWN
    store.clock.now += 60
    assert store.accepts("old")
    store.clock.now += 5
    with ReadUnderWay(store, "old") as other:
        assert other.accepts("old").result(timeout=60)
        assert not other.accepts("guess").result(timeout=60)
        assert not other.reading.done()


# --- The message ----------------------------------------------------------------------------------


def text_values(text: str) -> Any:
    """The JSON with every number as it is written."""
    return json.loads(text, parse_int=str, parse_float=str)


NUMBERS = "[1.10, 1E5, 1e400, -0, -0.0, 12345678901234567890123, " + "9" * 5000 + "]"


@pytest.mark.parametrize(
    "more",
    [
        f'"numbers": {NUMBERS}',
        '"nested": {"data": {"email_subject": ""}, "list": [null, true, [], {}]}, "": ""',
        '"text": "\\u0000\\u001f\\ufffe \\\\ \\" \\/ \\ud83d\\ude00 \\ud83d \\ude00\\ud83d"',
        '"\u00e9": "\u65e5\u672c \U0001f600 \u2028 \ufffe \uffff \u200b \u0085 \x7f  "',
    ],
    ids=["numbers", "nesting", "escapes", "characters"],
)
def test_body_is_the_data_unchanged_in_ascii(queue: Queue, more: str) -> None:
    text = f'{{{json.dumps(DATA)[1:-1]}, "email_timestream": 1693561101, {more}}}'
    assert post_text(queue.client, text).status_code == 200
    body = queue.only_message()["Body"]
    assert text_values(body) == text_values(text)
    assert not re.search(r"[^\t\n\r -~\x7f]", body), "SQS takes no other control characters"


@pytest.mark.parametrize("timestamp", [1693561101, "0001693561101"])
def test_timestamp_keeps_its_type_and_text(client: FlaskClient, sqs: Sqs, timestamp: Any) -> None:
    data = {**DATA, "email_timestream": timestamp}
    assert post(client, envelope(data)).status_code == 200
    assert json.loads(sqs.messages[0]["MessageBody"]) == data


@pytest.mark.parametrize(
    "text",
    [
        '\n{ "token"\t:\r\nTOKEN ,"data" \n:\t DATA\n}\n',
        '{"other": {"data": DECOY}, "data": DATA, "more": [{"data": DECOY}], "token": TOKEN}',
        '{"data": DECOY, "token": "x", "token": TOKEN, "data": DATA}',
        '{"Data": DECOY, " data": DECOY, "d\\u0061ta": DATA, "token": TOKEN}',
        '{"a": "data", "b": "\\"data\\": {}", "data": DATA, "c": "\\\\", "token": TOKEN}',
        '{"a": -1.5e3, "b": null, "c": [], "d": {}, "data": DATA, "e": "", "token": TOKEN}',
    ],
    ids=["white space", "nested", "twice", "escaped name", "in strings", "other values"],
)
def test_data_is_found_wherever_it_stands(client: FlaskClient, sqs: Sqs, text: str) -> None:
    decoy = {**DATA, "email_subject": "decoy"}
    for word, value in (("DATA", DATA), ("DECOY", decoy), ("TOKEN", TOKEN)):
        text = text.replace(word, json.dumps(value))
    assert post(client, text.encode()).status_code == 200
    assert json.loads(sqs.messages[0]["MessageBody"]) == DATA


def attributes_of(message: dict[str, Any]) -> dict[str, str]:
    assert all(value["DataType"] == "String" for value in message["MessageAttributes"].values())
    return {name: value["StringValue"] for name, value in message["MessageAttributes"].items()}


def test_attributes_tell_about_the_request(queue: Queue) -> None:
    headers = {"X-Request-Id": "r-1", "Idempotency-Key": " order 1843/\u00e9 "}
    before = datetime.now(UTC)
    assert post(queue.client, headers=headers).status_code == 200
    attributes = attributes_of(queue.only_message())
    processed = datetime.fromisoformat(attributes.pop("ProcessedAt"))
    assert before - timedelta(seconds=1) <= processed <= datetime.now(UTC) + timedelta(seconds=1)
    assert processed.utcoffset() == timedelta(0)
    assert attributes == {
        "ContentType": "application/json",
        "RequestId": "r-1",
        "IdempotencyKey": "order 1843/\u00e9",
    }


@pytest.mark.parametrize("headers", [{}, {"Idempotency-Key": "  "}])
def test_without_idempotency_key_there_is_no_attribute(
    client: FlaskClient, sqs: Sqs, headers: dict[str, str]
) -> None:
    response = post(client, headers=headers)
    attributes = attributes_of(sqs.messages[0])
    assert set(attributes) == {"ContentType", "ProcessedAt", "RequestId"}
    assert attributes["RequestId"] == response.headers["X-Request-Id"]


PARENT, HEX = "53995c3f42cd8ad8", TRACE_ID.replace("-", "")[1:]
LINEAGE = "Lineage=a87bd80c:0|68fd508a:5|c512fbe3:2"


def trace_of(
    client: FlaskClient, sqs: Sqs, capsys: pytest.CaptureFixture[str], headers: dict[str, str]
) -> tuple[str | None, str | None]:
    """The trace header of the message, and the trace id in the log."""
    with logging_as_in_production():
        assert post(client, headers=headers).status_code == 200
        (line,) = lines_of(capsys)
    (message,) = sqs.messages
    assert "AWSTraceHeader" not in message["MessageAttributes"]
    attributes = message.get("MessageSystemAttributes", {})
    return attributes.get("AWSTraceHeader", {}).get("StringValue"), line.get("trace_id")


def test_trace_header_of_the_alb_goes_on_through_the_queue(queue: Queue) -> None:
    trace = f"{TRACE};Parent={PARENT};Sampled=1"
    assert post(queue.client, headers={"X-Amzn-Trace-Id": trace}).status_code == 200
    assert queue.only_message()["Attributes"]["AWSTraceHeader"] == trace


@pytest.mark.parametrize(
    "trace", [TRACE, f"Self={TRACE_ID};{TRACE};CalledFrom=app", f"{TRACE};Sampled=1;{LINEAGE}"]
)
def test_trace_header_counts_before_traceparent(
    client: FlaskClient, sqs: Sqs, capsys: pytest.CaptureFixture[str], trace: str
) -> None:
    headers = {"X-Amzn-Trace-Id": trace, "traceparent": f"00-{'a' * 32}-{PARENT}-01"}
    assert trace_of(client, sqs, capsys, headers) == (trace, TRACE_ID)


@pytest.mark.parametrize(
    ("traceparent", "sampled"),
    [
        (f"00-{HEX}-{PARENT}-01", 1),
        (f"00-{HEX}-{PARENT}-fe", 0),
        (f"fe-{HEX}-{PARENT}-01-what later versions add", 1),
    ],
)
def test_traceparent_goes_on_in_the_form_of_x_ray(
    client: FlaskClient,
    sqs: Sqs,
    capsys: pytest.CaptureFixture[str],
    traceparent: str,
    sampled: int,
) -> None:
    headers = {"X-Amzn-Trace-Id": "Root=1", "traceparent": traceparent}
    expected = f"Root={TRACE_ID};Parent={PARENT};Sampled={sampled}"
    assert trace_of(client, sqs, capsys, headers) == (expected, TRACE_ID)


@pytest.mark.parametrize(
    ("header", "trace"),
    [
        ("X-Amzn-Trace-Id", "Root=1-67891233-ABCDEF"),
        ("X-Amzn-Trace-Id", f"Parent={PARENT}"),
        ("X-Amzn-Trace-Id", f"{TRACE};a=\u00e9"),
        ("X-Amzn-Trace-Id", f"{TRACE};x\x01=y"),
        ("X-Amzn-Trace-Id", f"{TRACE};a=" + "b" * 1024),
        ("traceparent", f"00-{HEX}-{PARENT}-01-more"),
        ("traceparent", f"ff-{HEX}-{PARENT}-01"),
        ("traceparent", f"00-{'0' * 32}-{PARENT}-01"),
        ("traceparent", f"00-{HEX}-{'0' * 16}-01"),
        ("traceparent", f"00-{HEX}-{PARENT}-0\u0661"),
    ],
    ids=lambda text: ascii(text)[-24:],
)
def test_malformed_trace_is_dropped(
    client: FlaskClient, sqs: Sqs, capsys: pytest.CaptureFixture[str], header: str, trace: str
) -> None:
    assert trace_of(client, sqs, capsys, {header: trace}) == (None, None)


def test_fifo_queue_drops_a_repeated_idempotency_key(aws: SimpleNamespace) -> None:
    queue = Queue(aws, fifo=True)
    for request_id in ("r-1", "r-2"):
        headers = {"X-Request-Id": request_id, "Idempotency-Key": "k-1"}
        assert post(queue.client, headers=headers).status_code == 200
    attributes = queue.only_message()["Attributes"]
    assert attributes["MessageGroupId"]
    assert attributes["MessageDeduplicationId"] == "k-1"


def test_fifo_queue_keeps_messages_without_a_key(aws: SimpleNamespace) -> None:
    queue = Queue(aws, fifo=True)
    ids = {post(queue.client).get_json()["message_id"] for _ in range(3)}
    assert len(ids) == 3
    received = queue.received()
    assert len({message["Attributes"]["MessageDeduplicationId"] for message in received}) == 3


def test_deduplication_id_is_one_that_sqs_takes(sqs: Sqs) -> None:
    client = client_of(sqs=sqs, sqs_queue_url=QUEUE_URL + ".fifo")
    keys = [string.punctuation, "x" * 128, "x" * 129, "x" * 130, "a b", "a\u00e9", "\u00ff" * 400]
    for key in keys:
        assert post(client, headers={"Idempotency-Key": key}).status_code == 200
    ids = [message["MessageDeduplicationId"] for message in sqs.messages]
    assert ids[:2] == keys[:2]
    assert len(set(ids)) == len(keys)
    assert all(re.fullmatch(r"[!-~]{1,128}", given) for given in ids)


def test_message_for_a_standard_queue_has_no_fifo_fields(client: FlaskClient, sqs: Sqs) -> None:
    post(client, headers={"Idempotency-Key": "k-1"})
    (message,) = sqs.messages
    assert set(message) == {"QueueUrl", "MessageBody", "MessageAttributes"}
    assert message["QueueUrl"] == QUEUE_URL


# --- Settings -------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_documentation() -> None:
    assert app.Settings.from_environ({"SQS_QUEUE_URL": QUEUE_URL}) == app.Settings(
        sqs_queue_url=QUEUE_URL,
        aws_region="us-west-1",
        token_ssm_parameter=("/email-service/api-token",),
        port=8080,
        gunicorn_workers=4,
        gunicorn_threads=2,
        max_request_bytes=2_097_152,
        body_timeout_seconds=5,
        sqs_calls_in_flight=8,
        token_cache_seconds=60,
        log_level="INFO",
    )


ARN = "arn:aws:ssm:us-west-1:123456789012:parameter/a"
TEN_NAMES = [f"/{n}" for n in range(10)]


@pytest.mark.parametrize(
    ("variable", "text", "value"),
    [
        ("SQS_QUEUE_URL", "http://localhost:5000/1/q.fifo", "http://localhost:5000/1/q.fifo"),
        ("AWS_REGION", "us-gov-east-1", "us-gov-east-1"),
        ("AWS_REGION", "", "us-west-1"),
        ("TOKEN_SSM_PARAMETER", "/a/b.c_d-e, /f ,g,/f", ("/a/b.c_d-e", "/f", "g")),
        ("TOKEN_SSM_PARAMETER", ARN, (ARN,)),
        ("TOKEN_SSM_PARAMETER", ",".join(TEN_NAMES), tuple(TEN_NAMES)),
        ("PORT", " 65535 ", 65535),
        ("GUNICORN_WORKERS", "1", 1),
        ("BODY_TIMEOUT_SECONDS", "1.5", 1.5),
        ("TOKEN_CACHE_SECONDS", "3600", 3600),
        ("LOG_LEVEL", "DEBUG", "DEBUG"),
    ],
)
def test_setting_is_read_from_its_variable(variable: str, text: str, value: Any) -> None:
    environ = {"SQS_QUEUE_URL": QUEUE_URL, variable: text}
    assert getattr(app.Settings.from_environ(environ), variable.lower()) == value


BAD_SETTINGS = {
    "SQS_QUEUE_URL": [" ", "dev-CP-queue", "https://a/", "https://a b/c"],
    "AWS_REGION": ["us west 1", "US-WEST-1", "us-west-1a"],
    "TOKEN_SSM_PARAMETER": ["/a,", "/a b", "/\u00e9", ",".join([*TEN_NAMES, "/10"])],
    "PORT": ["x", "-1", "0", "65536", "+5", "1_0", "1e3", "nan", "\u0665", "80.5", "9" * 5000],
    "GUNICORN_WORKERS": ["0", "65"],
    "GUNICORN_THREADS": ["0", "257"],
    "MAX_REQUEST_BYTES": ["2MB", "1073741825"],
    "BODY_TIMEOUT_SECONDS": ["0.99", "61", "nan"],
    "SQS_CALLS_IN_FLIGHT": ["0", "65"],
    "TOKEN_CACHE_SECONDS": ["1m", "3601"],
    "LOG_LEVEL": ["TRACE", "10"],
}


@pytest.mark.parametrize(
    ("variable", "text"),
    [(variable, text) for variable, texts in BAD_SETTINGS.items() for text in texts],
    ids=lambda text: ascii(text)[1:30],
)
def test_bad_setting_gives_one_line_that_names_it(variable: str, text: str) -> None:
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


def test_request_gives_one_line_with_documented_fields(
    client: FlaskClient, capsys: pytest.CaptureFixture[str]
) -> None:
    headers = {"X-Request-Id": "r-1", "X-Amzn-Trace-Id": TRACE, "X-Forwarded-For": "2.2.2.2"}
    with logging_as_in_production():
        post(client, headers=headers)
        post(client, envelope(token="wrong"), headers=headers)
        client.get("/nowhere")
        accepted, refused, unknown = lines_of(capsys)
    written = datetime.fromisoformat(accepted.pop("time"))
    assert abs(datetime.now(UTC) - written) < timedelta(minutes=5)
    assert accepted.pop("duration_ms") >= 0
    assert accepted == {
        "level": "INFO",
        "logger": "email_processor",
        "message": "request",
        "request_id": "r-1",
        "trace_id": TRACE_ID,
        "client": "2.2.2.2",
        "method": "POST",
        "path": "/process",
        "status": 200,
        "message_id": "6e5f0a2b",
    }
    always = accepted.keys() - {"trace_id", "message_id"} | {"time", "duration_ms", "error"}
    assert refused.keys() == always | {"trace_id"}
    assert unknown.keys() == always
    assert (refused["status"], refused["error"]) == (401, "invalid_token")
    assert (unknown["status"], unknown["path"], unknown["method"]) == (404, "/nowhere", "GET")


@pytest.mark.parametrize("failing", ["token", "queue", "message"])
@pytest.mark.parametrize("headers", [{}, {"X-Amzn-Trace-Id": TRACE}], ids=["untraced", "traced"])
def test_every_line_of_a_request_tells_its_id_and_trace(
    capsys: pytest.CaptureFixture[str], failing: str, headers: dict[str, str]
) -> None:
    def fail(**_: Any) -> None:
        logging.getLogger("botocore").warning("another library's, inside of the request")
        raise DENIED

    ssm = Ssm(fail if failing == "token" else None)
    sqs = Sqs(fail, fail if failing == "queue" else None)
    with logging_as_in_production():
        response = post(client_of(ssm, sqs), headers={"X-Request-Id": "r-1", **headers})
        logging.getLogger("botocore").warning("another library's, outside of it")
        *inside, outside = lines_of(capsys)
    assert response.status_code == 503
    assert {"botocore", "email_processor"} == {line["logger"] for line in inside}
    assert any("AccessDenied" in line.get("cause", "") for line in inside)
    assert {line["request_id"] for line in inside} == {"r-1"}
    assert {line.get("trace_id") for line in inside} == {TRACE_ID if headers else None}
    assert not {"request_id", "trace_id"} & outside.keys()


@pytest.mark.parametrize(
    ("forwarded", "address"),
    [
        ("", "127.0.0.1"),
        ("203.0.113.7", "203.0.113.7"),
        ("spoofed, 203.0.113.7 ", "203.0.113.7"),
        ("10.0.0.1,2001:db8::1", "2001:db8::1"),
    ],
)
def test_client_address_is_the_one_that_the_alb_saw(
    client: FlaskClient, capsys: pytest.CaptureFixture[str], forwarded: str, address: str
) -> None:
    with logging_as_in_production():
        client.get("/", headers={"X-Forwarded-For": forwarded})
        (line,) = lines_of(capsys)
    assert line["client"] == address


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics"])
def test_health_check_is_logged_at_debug_only(
    client: FlaskClient, capsys: pytest.CaptureFixture[str], path: str
) -> None:
    with logging_as_in_production("INFO"):
        client.get(path)
        assert lines_of(capsys) == []
    with logging_as_in_production("DEBUG"):
        client.get(path)
        (line,) = lines_of(capsys)
    assert (line["level"], line["path"], line["status"]) == ("DEBUG", path, 200)


LEVELS = ["DEBUG", "INFO", "WARNING", "ERROR"]


@pytest.mark.parametrize("level", LEVELS)
def test_log_level_chooses_what_is_logged(capsys: pytest.CaptureFixture[str], level: str) -> None:
    client = client_of(sqs=Sqs(DENIED), token_ssm_parameter=(PARAMETER, "/missing"))
    with logging_as_in_production(level):
        client.get("/health")
        client.get("/nowhere")
        post(client)
        levels = {line["level"] for line in lines_of(capsys)}
    assert levels == set(LEVELS[LEVELS.index(level) :])


def test_5xx_is_logged_as_an_error_with_its_cause(capsys: pytest.CaptureFixture[str]) -> None:
    client = client_of(sqs=Sqs(client_error("AccessDenied", 403)))
    with logging_as_in_production():
        post(client)
        cause, answer = lines_of(capsys)
    assert cause["level"] == answer["level"] == "ERROR"
    assert "AccessDenied" in cause["cause"]
    assert "as AWS puts it" in cause["cause"]
    assert (answer["status"], answer["error"]) == (503, "queue_unavailable")


HIDDEN = {name: f"SECRET-{name}" for name in DATA} | {"email_timestream": "1693561101"}
QUOTING = ValueError("no JSON: SECRET-token SECRET-email_content")  # as some parsers do
SECRETS: list[tuple[str, bytes, dict[str, Any]]] = [
    ("success", envelope(HIDDEN, "SECRET-token"), {}),
    ("request_too_large", envelope({**HIDDEN, "more": "x" * 9000}, "SECRET-token"), {}),
    ("invalid_json", envelope(HIDDEN, "SECRET-token")[:-1], {}),
    ("invalid_json", envelope(HIDDEN, "SECRET-token").replace(b"SECRET", b"SECRET\xff"), {}),
    ("token_required", envelope(HIDDEN, None), {}),
    ("invalid_token", envelope(HIDDEN, "SECRET-guess"), {}),
    ("invalid_token", envelope(HIDDEN, ["SECRET-guess"]), {}),
    ("invalid_data", envelope({**HIDDEN, "email_sender": ["SECRET"]}, "SECRET-token"), {}),
    ("invalid_timestamp", envelope({**HIDDEN, "email_timestream": "SECRET"}, "SECRET-token"), {}),
    ("message_too_large", envelope({**HIDDEN, "more": "x" * 3000}, "SECRET-token"), {}),
    *(
        (code, envelope(HIDDEN, "SECRET-token"), {of: answer})
        for code, of, answer in [
            ("token_store_unavailable", "ssm", QUOTING),
            ("token_store_unavailable", "ssm", {"Parameters": ["SECRET-token"]}),
            ("queue_unavailable", "attributes", maximum("SECRET")),
            ("queue_unavailable", "sent", QUOTING),
        ]
    ),
]


@pytest.mark.parametrize(("code", "body", "failing"), SECRETS)
def test_no_log_line_holds_a_token_or_a_field(
    capsys: pytest.CaptureFixture[str], code: str, body: bytes, failing: dict[str, Any]
) -> None:
    ssm = Ssm(failing.get("ssm"), values={PARAMETER: "SECRET-token"})
    sqs = Sqs(failing.get("sent"), failing.get("attributes", maximum(2048)))
    with logging_as_in_production("DEBUG"):
        response = post(client_of(ssm, sqs, max_request_bytes=8000), body)
    assert response.get_json().get("error", "success") == code
    captured = capsys.readouterr()
    assert '"path": "/process"' in captured.out
    assert "SECRET" not in captured.out + captured.err + response.get_data(as_text=True)


def test_log_level_debug_is_for_the_application_alone() -> None:
    with logging_as_in_production("DEBUG"):
        assert logging.getLogger("email_processor").isEnabledFor(logging.DEBUG)
        # At DEBUG, botocore logs decrypted tokens and message bodies.
        for name in ("", "botocore", "botocore.parsers", "urllib3", "gunicorn.error"):
            assert not logging.getLogger(name).isEnabledFor(logging.DEBUG)


def test_log_lines_go_to_standard_output() -> None:
    with logging_as_in_production():
        (handler,) = logging.getLogger().handlers
        assert isinstance(handler, logging.StreamHandler)
        assert handler.stream is sys.stdout
