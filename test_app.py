"""The HTTP contract, in-process.

moto plays AWS wherever it can show the behaviour. Failures, garbled answers and limits in bytes,
which it cannot, come from the small doubles below, from botocore's Stubber, or from a real client
whose answers are made up on the wire.
"""

import hashlib
import io
import itertools
import json
import logging
import logging.config
import os
import random
import re
import socket
import string
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import boto3
import pytest
from botocore.awsrequest import AWSResponse
from botocore.exceptions import (
    ClientError,
    ConnectionClosedError,
    ConnectTimeoutError,
    EndpointConnectionError,
    NoCredentialsError,
    ReadTimeoutError,
)
from botocore.parsers import ResponseParserError
from botocore.stub import Stubber
from flask import Flask
from flask.testing import FlaskClient
from moto import mock_aws
from prometheus_client.parser import text_string_to_metric_families
from werkzeug.test import TestResponse

import app

TOKEN = "$DJISA<$#45ex3RtYr"
SUBJECT, SENDER, CONTENT = "Happy new year!", "John doe", "Just want to say... Happy new year!!!"
DATA = {
    "email_subject": SUBJECT,
    "email_sender": SENDER,
    "email_timestream": "1693561101",
    "email_content": CONTENT,
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


class Ssm:
    """An SSM client that counts its reads; it answers from `answer`, or raises it."""

    def __init__(self, answer: Any = None) -> None:
        self.answer = answer if answer is not None else parameters(TOKEN)
        self.reads = 0

    def get_parameters(self, **arguments: Any) -> Any:
        self.reads += 1
        return give(self.answer, arguments)


class Sqs:
    """An SQS client that remembers what it was given, and answers from its fields or raises them"""

    def __init__(self, sent: Any = None, attributes: Any = None) -> None:
        self.sent = sent or {"MessageId": "6e5f0a2b"}
        self.attributes = attributes or maximum(1_048_576)
        self.messages: list[dict[str, Any]] = []
        self.calls = 0

    def get_queue_attributes(self, **arguments: Any) -> Any:
        self.calls += 1
        return give(self.attributes, arguments)

    def send_message(self, **arguments: Any) -> Any:
        self.calls += 1
        self.messages.append(arguments)
        return give(self.sent, arguments)


def give(answer: Any, arguments: dict[str, Any]) -> Any:
    if isinstance(answer, BaseException):
        raise answer
    return answer(**arguments) if callable(answer) else answer


def parameters(*values: str, missing: tuple[str, ...] = ()) -> dict[str, Any]:
    found = [{"Name": f"/{n}", "Value": value} for n, value in enumerate(values)]
    return {"Parameters": found, "InvalidParameters": list(missing)}


def maximum(size: int) -> dict[str, Any]:
    return {"Attributes": {"MaximumMessageSize": str(size)}}


def client_error(code: str, status: int = 400, message: str = "as AWS puts it") -> ClientError:
    answer = {
        "Error": {"Code": code, "Message": message},
        "ResponseMetadata": {"HTTPStatusCode": status},
    }
    return ClientError(answer, "Operation")


DOWN = EndpointConnectionError(endpoint_url="https://aws.invalid")
OUTAGES = [
    client_error("AccessDenied", 403),
    client_error("AccessDeniedException", 400),
    client_error("RequestThrottled", 403),
    client_error("ThrottlingException", 400),
    client_error("InternalFailure", 500),
    client_error("ServiceUnavailable", 503),
    client_error("ExpiredToken", 403),
    client_error("InvalidClientTokenId", 403),
    client_error("AWS.SimpleQueueService.NonExistentQueue", 400),
    client_error("QueueDoesNotExist", 400),
    client_error("KMS.DisabledException", 400),
    client_error("Garbage", 200, message=""),
    ClientError({}, "Operation"),
    ConnectTimeoutError(endpoint_url="https://aws.invalid"),
    ReadTimeoutError(endpoint_url="https://aws.invalid"),
    ConnectionClosedError(endpoint_url="https://aws.invalid"),
    NoCredentialsError(),
    ResponseParserError("not XML"),
    DOWN,
]


def name_of(error: Any) -> str | None:
    if isinstance(error, ClientError):
        return str(error.response.get("Error", {}).get("Code", "no code"))
    return type(error).__name__ if isinstance(error, Exception) else None


@pytest.fixture(scope="session")
def aws() -> Iterator[SimpleNamespace]:
    """moto, and clients of it. Each test takes its own parameters and queues."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("AWS_ENDPOINT_URL", raising=False)
        patch.delenv("AWS_PROFILE", raising=False)
        with mock_aws():
            yield SimpleNamespace(
                ssm=app.aws_client("ssm", settings()),
                sqs=app.aws_client("sqs", settings()),
                count=itertools.count(),
            )


def settings(**changes: Any) -> app.Settings:
    return app.Settings(**{"sqs_queue_url": QUEUE_URL, **changes})


class Service:
    """The application on moto, as its client sees it and as its queue's consumer does."""

    def __init__(self, aws: SimpleNamespace, fifo: bool = False, maximum: int = 1_048_576) -> None:
        number = next(aws.count)
        attributes = {"MaximumMessageSize": str(maximum)} | ({"FifoQueue": "true"} if fifo else {})
        self.aws = aws
        self.parameter = f"/token/{number}"
        self.queue_url = aws.sqs.create_queue(
            QueueName=f"queue-{number}" + (".fifo" if fifo else ""), Attributes=attributes
        )["QueueUrl"]
        self.put_token(TOKEN)
        self.settings = settings(
            sqs_queue_url=self.queue_url, token_ssm_parameter=(self.parameter,)
        )
        self.client = client_of(self.settings, aws.ssm, aws.sqs)

    def put_token(self, token: str) -> None:
        self.aws.ssm.put_parameter(
            Name=self.parameter, Value=token, Type="SecureString", Overwrite=True
        )

    def received(self) -> list[dict[str, Any]]:
        answer = self.aws.sqs.receive_message(
            QueueUrl=self.queue_url,
            MaxNumberOfMessages=10,
            MessageAttributeNames=["All"],
            AttributeNames=["All"],
        )
        return list(answer.get("Messages", []))

    def only_message(self) -> dict[str, Any]:
        (message,) = self.received()
        return message


def no_pause(seconds: float) -> None:
    assert 0 < seconds < 1


def client_of(
    settings: app.Settings, ssm: Any, sqs: Any, clock: Callable[[], float] = time.monotonic
) -> FlaskClient:
    return app.create_app(settings, ssm, sqs, clock, no_pause).test_client(use_cookies=False)


@pytest.fixture
def service(aws: SimpleNamespace) -> Service:
    return Service(aws)


@pytest.fixture
def sqs() -> Sqs:
    return Sqs()


@pytest.fixture
def client(sqs: Sqs) -> FlaskClient:
    return client_of(settings(), Ssm(), sqs)


def envelope(data: Any = DATA, token: Any = TOKEN, **more: Any) -> bytes:
    return json.dumps({"data": data, "token": token, **more}).encode()


def post(client: FlaskClient, body: bytes | None = None, **options: Any) -> TestResponse:
    options.setdefault("content_type", "application/json")
    return client.post("/process", data=envelope() if body is None else body, **options)


def post_text(client: FlaskClient, data_text: str) -> TestResponse:
    return post(client, f'{{"token": {json.dumps(TOKEN)}, "data": {data_text}}}'.encode())


def assert_refused(response: TestResponse, code: str) -> dict[str, Any]:
    """The answer is the error of that code, in the shape that every error has."""
    body = response.get_json()
    assert (response.status_code, body["error"]) == (app.ERRORS[code][0], code), body
    assert response.mimetype == "application/json"
    assert set(body) - {"errors"} == {"status", "error", "message", "request_id"}
    assert body["status"] == "error"
    assert body["message"]
    assert body["request_id"] == response.headers["X-Request-Id"]
    assert ("Retry-After" in response.headers) == (response.status_code == 503)
    return dict(body)


def counted(client: FlaskClient, metric: str, **labels: str) -> float:
    text = client.get("/metrics").get_data(as_text=True)
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    return sum(s.value for s in samples if s.name == metric and s.labels.items() >= labels.items())


# --- Success --------------------------------------------------------------------------------------


def test_valid_request_is_200_with_the_message_id_of_the_message_in_the_queue(
    service: Service,
) -> None:
    response = post(service.client)
    message = service.only_message()
    assert response.status_code == 200
    assert response.mimetype == "application/json"
    assert response.get_json() == {
        "status": "success",
        "message": "Email data processed and queued",
        "message_id": message["MessageId"],
    }
    assert json.loads(message["Body"]) == DATA


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json",
        "application/json; charset=utf-8",
        "Application/JSON",
        "application/a+json",
    ],
)
def test_json_content_types_are_200(client: FlaskClient, content_type: str) -> None:
    assert post(client, content_type=content_type).status_code == 200


def test_parameters_and_clients_of_the_settings_are_asked(aws: SimpleNamespace) -> None:
    region, number = "eu-central-1", next(aws.count)
    ssm, sqs = boto3.client("ssm", region), boto3.client("sqs", region)
    ssm.put_parameter(Name=f"/there/{number}", Value="there", Type="SecureString")
    url = sqs.create_queue(QueueName=f"there-{number}")["QueueUrl"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_REGION", region)
        patch.setenv("SQS_QUEUE_URL", url)
        patch.setenv("TOKEN_SSM_PARAMETER", f"/there/{number}")
        client = app.create_app().test_client()
    assert post(client, envelope(token="there")).status_code == 200
    assert len(sqs.receive_message(QueueUrl=url)["Messages"]) == 1


def test_without_settings_a_bad_environment_is_a_settings_error() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SQS_QUEUE_URL", raising=False)
        with pytest.raises(app.SettingsError, match="SQS_QUEUE_URL"):
            app.create_app()


def test_creating_the_app_calls_nothing_and_starts_no_thread() -> None:
    ssm, sqs, threads = Ssm(), Sqs(), threading.active_count()
    app.create_app(settings(), ssm=ssm, sqs=sqs)
    assert (ssm.reads, sqs.calls, threading.active_count()) == (0, 0, threads)


def test_clients_wait_for_aws_for_a_short_time_only(aws: SimpleNamespace) -> None:
    for client in (aws.ssm, aws.sqs):
        config = client.meta.config
        attempts = config.retries["total_max_attempts"]
        # Two calls and their back-off (at most 1 s each) must stay below 10 s.
        assert 2 * (attempts * max(config.connect_timeout, config.read_timeout) + 1) <= 10
        assert config.retries["mode"] == "standard"
        assert config.max_pool_connections >= settings().gunicorn_threads
        assert client.meta.region_name == "us-west-1"
    many = settings(gunicorn_threads=40)
    assert app.aws_client("sqs", many).meta.config.max_pool_connections >= 40


# --- The other endpoints --------------------------------------------------------------------------


def test_health_is_200_while_ssm_and_sqs_are_down_and_calls_neither() -> None:
    ssm, sqs = Ssm(DOWN), Sqs(DOWN, DOWN)
    client = client_of(settings(), ssm, sqs)
    assert client.get("/health").status_code == 200
    assert (ssm.reads, sqs.calls) == (0, 0)
    assert client.get("/ready").status_code == 503
    assert_refused(post(client), "token_store_unavailable")
    calls = ssm.reads, sqs.calls
    response = client.get("/health")
    body = response.get_json()
    assert response.status_code == 200
    assert response.mimetype == "application/json"
    assert set(body) == {"status", "service", "timestamp"}
    assert (body["status"], body["service"]) == ("healthy", "email-processor")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}", body["timestamp"])
    said = datetime.fromisoformat(body["timestamp"]).replace(tzinfo=UTC)
    assert abs(datetime.now(UTC) - said) < timedelta(minutes=1)
    assert (ssm.reads, sqs.calls) == calls


def test_ready_is_200_once_token_and_queue_were_seen_and_stays_so(service: Service) -> None:
    aws = service.aws
    ssm, sqs = Ssm(aws.ssm.get_parameters), Sqs(attributes=aws.sqs.get_queue_attributes)
    config = settings(
        sqs_queue_url=service.queue_url,
        token_ssm_parameter=(service.parameter,),
        token_cache_seconds=0,
    )
    client = client_of(config, ssm, sqs)
    response = client.get("/ready")
    assert (response.status_code, response.get_json()["status"]) == (200, "ready")
    assert response.get_json()["service"] == "email-processor"
    ssm.answer = sqs.attributes = sqs.sent = DOWN
    assert_refused(post(client), "queue_unavailable")
    assert client.get("/ready").status_code == 200
    ssm.answer = parameters(missing=(service.parameter,))
    assert_refused(post(client), "invalid_token")
    assert client.get("/ready").status_code == 200


DENIED = client_error("AccessDeniedException", 400)


@pytest.mark.parametrize(
    ("ssm", "attributes", "code", "named"),
    [
        (DENIED, None, "token_store_unavailable", ["ssm:GetParameters", "AccessDeniedException"]),
        (DOWN, None, "token_store_unavailable", ["token", "EndpointConnectionError"]),
        (parameters(missing=(PARAMETER,)), None, "token_store_unavailable", ["parameter"]),
        ({}, None, "token_store_unavailable", ["token"]),
        (None, DENIED, "queue_unavailable", ["sqs:GetQueueAttributes", "AccessDeniedException"]),
        (None, {"Attributes": {}}, "queue_unavailable", ["queue"]),
        (None, {"Attributes": {"MaximumMessageSize": "big"}}, "queue_unavailable", ["queue"]),
        (DENIED, DOWN, "token_store_unavailable", ["ssm:GetParameters", "sqs:GetQueueAttributes"]),
    ],
)
def test_ready_is_503_and_names_what_is_missing(
    ssm: Any, attributes: Any, code: str, named: list[str]
) -> None:
    client = client_of(settings(), Ssm(ssm), Sqs(attributes=attributes))
    body = assert_refused(client.get("/ready"), code)
    for word in named:
        assert word in body["message"]


def test_ready_names_only_what_is_missing() -> None:
    no_token = client_of(settings(), Ssm(DENIED), Sqs()).get("/ready").get_json()
    no_queue = client_of(settings(), Ssm(), Sqs(attributes=DENIED)).get("/ready").get_json()
    assert "queue" not in no_token["message"].lower()
    assert "token" not in no_queue["message"].lower()


def test_ready_turns_200_when_what_was_missing_is_there() -> None:
    ssm, sqs = Ssm(DENIED), Sqs(attributes=DENIED)
    client = client_of(settings(token_cache_seconds=0), ssm, sqs)
    assert_refused(client.get("/ready"), "token_store_unavailable")
    ssm.answer = parameters(TOKEN)
    assert_refused(client.get("/ready"), "queue_unavailable")
    sqs.attributes = maximum(1024)
    assert client.get("/ready").status_code == 200
    assert not sqs.messages


def test_a_first_request_makes_the_worker_ready(client: FlaskClient, sqs: Sqs) -> None:
    post(client)
    calls = sqs.calls
    assert client.get("/ready").status_code == 200
    assert sqs.calls == calls


def test_index_lists_the_endpoints(client: FlaskClient) -> None:
    body = client.get("/").get_json()
    assert set(body) == {"service", "version", "endpoints"}
    assert (body["service"], body["version"]) == ("email-processor", app.VERSION)
    assert set(body["endpoints"]) == {
        "GET /",
        "GET /docs",
        "GET /health",
        "GET /metrics",
        "GET /openapi.json",
        "GET /ready",
        "POST /process",
    }


def test_metrics_are_prometheus_text_that_counts_answers_by_outcome(client: FlaskClient) -> None:
    def count(outcome: str) -> float:
        return counted(client, "email_processor_requests_total", outcome=outcome)

    assert client.get("/metrics").content_type.startswith("text/plain; version=")
    before = {outcome: count(outcome) for outcome in ("not_found", "invalid_token")}
    client.get("/nowhere")
    post(client, envelope(token="wrong"))
    post(client, envelope(token="wrong"))
    assert count("not_found") == before["not_found"] + 1
    assert count("invalid_token") == before["invalid_token"] + 2
    successes = count("success")
    post(client)
    # The request, and the reading of the metrics before it.
    assert count("success") == successes + 2


DURATION = "email_processor_request_duration_seconds"


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "number"),
    [
        ("POST", "/process", envelope(), 200, 1),
        ("POST", "/process", b"{", 400, 1),
        ("POST", "/process", envelope(token="wrong"), 401, 1),
        ("POST", "//process", envelope(), 404, 0),
        ("GET", "/process", b"", 405, 0),
        ("GET", "/health", b"", 200, 0),
        ("GET", "/nowhere", b"", 404, 0),
    ],
)
def test_duration_is_that_of_post_process_alone(
    client: FlaskClient,
    capsys: pytest.CaptureFixture[str],
    method: str,
    path: str,
    body: bytes,
    status: int,
    number: int,
) -> None:
    before = [counted(client, f"{DURATION}_{part}") for part in ("count", "sum")]
    with logging_as_in_production("DEBUG"):
        environ = {"REQUEST_METHOD": method, "PATH_INFO": path}
        response = client.open(
            path,
            method=method,
            data=body,
            environ_overrides=environ,
            content_type="application/json",
        )
        (line,) = lines_of(capsys)
    assert response.status_code == status
    after = [counted(client, f"{DURATION}_{part}") for part in ("count", "sum")]
    assert after[0] - before[0] == number
    assert (0 < after[1] - before[1] <= line["duration_ms"] / 1000 + 1e-5) == bool(number)


@pytest.mark.parametrize("failure", [None, DOWN, ValueError("a defect")], ids=name_of)
def test_requests_in_flight_are_those_of_post_process_that_have_no_answer_yet(
    sqs: Sqs, failure: Exception | None
) -> None:
    client, seen = client_of(settings(), Ssm(), sqs), []

    def send(**_: Any) -> dict[str, str]:
        seen.append(counted(client, "email_processor_requests_in_flight"))
        return dict(give(failure or {"MessageId": "m"}, {}))

    sqs.sent = send
    post(client)
    assert set(seen) == {1}
    assert counted(client, "email_processor_requests_in_flight") == 0


def test_token_read_timestamp_is_the_time_of_the_last_read_that_succeeded(
    aws: SimpleNamespace, client: FlaskClient
) -> None:
    def timestamp() -> float:
        return counted(client, "email_processor_token_read_timestamp_seconds")

    app.TOKEN_READ_TIMESTAMP.set(0)
    store, before = Store(aws), time.time()
    assert store.accepts("token-0")
    first = timestamp()
    assert before <= first <= time.time()
    store.ssm.answer = DOWN
    store.clock.now += 1000
    assert store.accepts("token-0")
    assert timestamp() == first


@pytest.mark.parametrize(
    ("results", "label"),
    [
        (["m"], "success"),
        (["m", "n"], "success"),
        (["m", client_error("InternalError", 500)], "partial"),
        ([client_error("InvalidMessageContents", 400), "m"], "partial"),
        ([ReadTimeoutError(endpoint_url="https://aws.invalid")] * 2, "timeout"),
        ([ConnectTimeoutError(endpoint_url="https://aws.invalid")], "timeout"),
        ([client_error("InternalFailure", 500)], "unavailable"),
        ([client_error("ThrottlingException", 400)] * 3, "unavailable"),
        ([DOWN], "unavailable"),
        ([ValueError("the answer has no MessageId")], "unavailable"),
        ([client_error("AccessDenied", 403)], "refused"),
        (
            [client_error("InternalError", 500), client_error("InvalidMessageContents", 400)],
            "refused",
        ),
        ([client_error("AWS.SimpleQueueService.NonExistentQueue", 400)] * 2, "refused"),
    ],
)
def test_result_of_a_call_is_one_of_five(results: list[str | Exception], label: str) -> None:
    assert app.result_of(results) == label


def test_each_call_of_sqs_is_counted_with_its_result_duration_and_messages() -> None:
    clock, answers = Clock(), [client_error("InternalFailure", 500), {"MessageId": "m"}]

    def send(**_: Any) -> dict[str, str]:
        clock.now += 0.012
        return dict(give(answers.pop(0), {}))

    client = client_of(settings(), Ssm(), Sqs(send), clock)
    names = [
        ("calls_total", {"result": "unavailable"}),
        ("calls_total", {"result": "success"}),
        ("calls_total", {}),
        ("call_duration_seconds_bucket", {"le": "0.01"}),
        ("call_duration_seconds_bucket", {"le": "0.015"}),
        ("call_duration_seconds_sum", {}),
        ("batch_size_bucket", {"le": "1.0"}),
        ("batch_size_sum", {}),
    ]

    def values() -> list[float]:
        return [counted(client, f"email_processor_sqs_{name}", **labels) for name, labels in names]

    before = values()
    assert post(client).status_code == 200
    grown = [now - then for now, then in zip(values(), before, strict=True)]
    assert grown == pytest.approx([1, 1, 2, 0, 2, 0.024, 2, 2])


def test_circuit_is_shown_as_open_until_sqs_answers() -> None:
    clock, sqs = Clock(), Sqs(ReadTimeoutError(endpoint_url="https://aws.invalid"))
    client = client_of(settings(), Ssm(), sqs, clock)

    def is_open() -> float:
        return counted(client, "email_processor_sqs_circuits_open")

    assert is_open() == 0
    post(client)
    assert is_open() == 1
    sqs.sent = {"MessageId": "m"}
    clock.now += 1
    assert post(client).status_code == 200
    assert is_open() == 0


def test_openapi_document_describes_every_endpoint(client: FlaskClient) -> None:
    response = client.get("/openapi.json")
    document = response.get_json()
    assert response.mimetype == "application/json"
    assert document["openapi"].startswith("3.1")
    endpoints = client.get("/").get_json()["endpoints"]
    for method, path in (endpoint.split() for endpoint in endpoints):
        assert method.lower() in document["paths"][path]


def test_docs_page_works_under_a_policy_that_lets_no_other_host_in(client: FlaskClient) -> None:
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
def test_head_works_where_get_does(client: FlaskClient, path: str) -> None:
    get, head = client.get(path), client.head(path)
    assert (head.status_code, head.data) == (get.status_code, b"") == (200, b"")
    assert head.content_type == get.content_type
    assert "X-Request-Id" in head.headers


# --- Request id -----------------------------------------------------------------------------------


@pytest.mark.parametrize("offered", ["a", "x" * 128, string.ascii_letters + string.digits + "._-"])
def test_request_id_of_the_caller_is_kept(client: FlaskClient, offered: str) -> None:
    response = client.get("/health", headers={"X-Request-Id": offered})
    assert response.headers["X-Request-Id"] == offered
    body = assert_refused(client.get("/nowhere", headers={"X-Request-Id": offered}), "not_found")
    assert body["request_id"] == offered


@pytest.mark.parametrize(
    "offered",
    ["", "x" * 129, "a b", "a,b", "a/b", "a:b", "a\u00e9", "a\u00b2", "<script>", "a\x00", "a\x0b"],
)
def test_request_id_that_is_not_well_formed_is_replaced(client: FlaskClient, offered: str) -> None:
    headers = {"X-Request-Id": offered}
    ids = {client.get("/health", headers=headers).headers["X-Request-Id"] for _ in range(3)}
    assert len(ids) == 3
    assert all(re.fullmatch(r"[A-Za-z0-9._-]{1,128}", given) for given in ids)


@pytest.mark.parametrize("path", [*GET_PATHS, "/process", "/nowhere"])
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_every_answer_carries_the_request_id(client: FlaskClient, method: str, path: str) -> None:
    response = client.open(path, method=method, headers={"X-Request-Id": "mine"})
    assert response.headers.getlist("X-Request-Id") == ["mine"]


# --- Rule 1: paths and methods --------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/nowhere",
        "/process/",
        "/health/",
        "/Process",
        "/process/x",
        "/docs/",
        "/docs/other.js",
        "/docs/../app.py",
        "/docs//swagger-ui.css",
        "/static/x",
        "/%ff",
        "/process%00",
        "/process%0a",
        "/*",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_unknown_path_is_404(client: FlaskClient, method: str, path: str) -> None:
    assert_refused(client.open(path, method=method), "not_found")


# As Gunicorn hands them on: the test client would take the first for a host's name.
@pytest.mark.parametrize("path", ["//process", "///process", "//health", "//"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_path_with_leading_slashes_is_404_and_no_redirect(
    client: FlaskClient, sqs: Sqs, method: str, path: str
) -> None:
    response = client.open(
        "/",
        method=method,
        data=envelope() if method == "POST" else None,
        content_type="application/json",
        environ_overrides={"PATH_INFO": path},
    )
    assert_refused(response, "not_found")
    assert not sqs.messages


# `GET http://host HTTP/1.1` is a request line with an empty path.
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_empty_path_is_answered_in_json_and_is_no_redirect(
    client: FlaskClient, method: str
) -> None:
    response = client.open("/", method=method, environ_overrides={"PATH_INFO": ""})
    assert response.status_code in (200, 404, 405)
    assert response.mimetype == "application/json"


WRONG_METHODS = [
    *itertools.product(["/process"], ["GET", "HEAD"]),
    *itertools.product(GET_PATHS, ["POST"]),
    *itertools.product(["/process", *GET_PATHS], ["OPTIONS", "PUT", "PATCH", "DELETE", "X"]),
]


@pytest.mark.parametrize(("path", "method"), WRONG_METHODS)
def test_wrong_method_is_405_with_allow(client: FlaskClient, path: str, method: str) -> None:
    response = client.open(path, method=method)
    allowed = {"POST"} if path == "/process" else {"GET", "HEAD"}
    assert set(response.headers["Allow"].split(", ")) == allowed
    if method == "HEAD":
        assert (response.status_code, response.data) == (405, b"")
    else:
        assert_refused(response, "method_not_allowed")


@pytest.mark.parametrize("host", ["", "a b", "[::1", "..", "x:99999", "\xff", "a" * 70 + ".com"])
@pytest.mark.parametrize("path", ["/health", "/nowhere"])
def test_no_host_name_is_an_error_of_ours(client: FlaskClient, path: str, host: str) -> None:
    response = client.get(path, environ_overrides={"HTTP_HOST": host})
    assert response.status_code == (200 if path == "/health" else 404)


@pytest.mark.parametrize("headers", [{"Connection": "Upgrade", "Upgrade": "websocket"}])
def test_offer_to_change_the_protocol_is_ignored(
    client: FlaskClient, headers: dict[str, str]
) -> None:
    assert client.get("/health", headers=headers).status_code == 200


# --- Rules 2 and 3: the body ----------------------------------------------------------------------


def post_stream(
    client: FlaskClient,
    stream: Any,
    length: int | None = None,
    path: str = "/process",
    content_type: str = "application/json",
    **environ: Any,
) -> TestResponse:
    environ |= {"wsgi.input": stream, "wsgi.input_terminated": True, "CONTENT_TYPE": content_type}
    if length is None:
        environ["HTTP_TRANSFER_ENCODING"] = "chunked"
    else:
        environ["CONTENT_LENGTH"] = str(length)
    return client.open(path, method="POST", environ_overrides=environ)


@pytest.mark.parametrize("declared", [True, False], ids=["Content-Length", "chunked"])
def test_body_of_the_limit_is_200_and_one_byte_more_is_413(declared: bool) -> None:
    sqs, body = Sqs(), envelope()
    client = client_of(settings(max_request_bytes=len(body)), Ssm(), sqs)
    length = len(body) if declared else None
    assert post_stream(client, io.BytesIO(body), length).status_code == 200
    length = len(body) + 1 if declared else None
    body_read = io.BytesIO(body + b" ")
    answer = assert_refused(post_stream(client, body_read, length), "request_too_large")
    assert str(len(body)) in answer["message"]
    assert body_read.read() == b"", "what is not read would be taken for the next request"
    assert len(sqs.messages) == 1


def test_body_far_over_the_limit_is_413_and_read_to_its_end() -> None:
    for length in (None, 500_000):
        stream = io.BytesIO(b"x" * 500_000)
        client = client_of(settings(max_request_bytes=100), Ssm(), Sqs())
        assert_refused(post_stream(client, stream, length), "request_too_large")
        assert stream.read() == b""


def test_body_declared_over_the_limit_is_413_even_if_it_breaks_off() -> None:
    client = client_of(settings(max_request_bytes=100), Ssm(), Sqs())
    assert_refused(post_stream(client, io.BytesIO(b"x"), 101), "request_too_large")


@pytest.mark.parametrize("path", ["/nowhere", "/health"])
@pytest.mark.parametrize("length", [None, 70_000])
def test_unread_body_of_another_answer_is_read_and_dropped(
    client: FlaskClient, path: str, length: int | None
) -> None:
    stream = io.BytesIO(b"x" * 70_000)
    response = post_stream(client, stream, length, path=path)
    assert response.status_code in (404, 405)
    assert stream.read() == b""


class BrokenOff(io.BytesIO):
    """A body that ends, or fails, before it is whole."""

    def __init__(self, body: bytes = b"", failure: Exception | None = None) -> None:
        super().__init__(body)
        self.failure = failure

    def read(self, size: int | None = -1) -> bytes:
        part = super().read(size)
        if self.failure and len(part) < (size or 0):
            raise self.failure
        return part


class MalformedChunk(Exception):  # noqa: N818 - as Gunicorn's, which are no OSErrors
    pass


@pytest.mark.parametrize("body", [b"", envelope()])
@pytest.mark.parametrize(
    ("failure", "length"),
    [
        (None, len(envelope()) + 1),
        (ConnectionResetError(), len(envelope()) + 1),
        (TimeoutError(), len(envelope()) + 1),
        (MalformedChunk(), None),
    ],
    ids=name_of,
)
def test_body_that_is_not_whole_is_400(
    client: FlaskClient, sqs: Sqs, body: bytes, failure: Exception | None, length: int | None
) -> None:
    assert_refused(post_stream(client, BrokenOff(body, failure), length), "invalid_json")
    assert not sqs.messages


@pytest.mark.parametrize("content_type", ["application/json", "text/plain"])
@pytest.mark.parametrize("length", [None, 100])
def test_body_that_was_ended_for_being_late_is_408(
    client: FlaskClient, length: int | None, content_type: str
) -> None:
    stream = BrokenOff(b'{"data"', None if length else MalformedChunk())
    late = {"gunicorn.socket": SimpleNamespace(late=True)}
    response = post_stream(client, stream, length, content_type=content_type, **late)
    assert_refused(response, "request_timeout")


def test_body_over_the_limit_that_was_late_is_413() -> None:
    client = client_of(settings(max_request_bytes=10), Ssm(), Sqs())
    late = {"gunicorn.socket": SimpleNamespace(late=True)}
    response = post_stream(client, BrokenOff(b"x" * 50), 100, **late)
    assert_refused(response, "request_too_large")


# --- Rules 4 and 5: content type and JSON ---------------------------------------------------------


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "",
        "text/plain",
        "text/json",
        "application/x-www-form-urlencoded",
        "multipart/form-data",
    ],
)
def test_content_type_other_than_json_is_415(
    client: FlaskClient, sqs: Sqs, content_type: str | None
) -> None:
    assert_refused(post(client, content_type=content_type), "unsupported_media_type")
    assert not sqs.messages


def nested(levels: int, opening: str = "[", closing: str = "]") -> str:
    return opening * levels + closing * levels


NOT_JSON_OBJECTS = [
    b"",
    b" ",
    b"null",
    b"[]",
    b"1",
    b'"text"',
    b"true",
    b"{",
    b"{}{}",
    b"{} x",
    b"{'a': 1}",
    b'{"a": 1,}',
    b'{"a"}',
    b'{"a": 01}',
    b'{"a": +1}',
    b'{"a": .5}',
    b'{"a": "\x01"}',
    b'{"a": "\\x"}',
    b'{"a": "\\ud8"}',
    b'{"a": NaN}',
    b'{"a": Infinity}',
    b'{"a": -Infinity}',
    b"NaN",
    b"\xff\xfe\xfd",
    b'{"a": "\xe9"}',
    b'{"a": "\xed\xa0\x80"}',
    b'{"a": "\xc0\xaf"}',
    envelope().decode().encode("utf-16"),
    envelope().decode().encode("utf-16-le"),
    envelope().decode().encode("utf-32"),
    nested(101).encode(),
    nested(100_000).encode(),
    b"[" * 100_000,
    b'{"a":' * 100_000,
    f'{{"a": {nested(100)}}}'.encode(),
    nested(100, '{"a":', "}").replace(":}", ":{}}").encode(),
]


@pytest.mark.parametrize("body", NOT_JSON_OBJECTS, ids=lambda body: repr(body[:24]))
def test_what_is_no_json_object_in_utf8_is_400(client: FlaskClient, sqs: Sqs, body: bytes) -> None:
    assert_refused(post(client, body), "invalid_json")
    assert not sqs.messages


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_nesting_of_100_levels_is_200_and_of_101_is_400(
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
    "body",
    [
        json.dumps({"data": DATA}).encode(),
        envelope(token=None),
        envelope(token=""),
        json.dumps({"data": DATA, "Token": TOKEN}).encode(),
        b"{}",
    ],
)
def test_missing_null_or_empty_token_is_401(client: FlaskClient, sqs: Sqs, body: bytes) -> None:
    body_of_answer = assert_refused(post(client, body), "token_required")
    assert "errors" not in body_of_answer
    assert not sqs.messages


WRONG_TOKENS = [
    "wrong",
    TOKEN + " ",
    " " + TOKEN,
    TOKEN[:-1],
    TOKEN.lower(),
    TOKEN + "\x00",
    " ",
    "\x00",
    "\ud800",
    TOKEN + "\udfff",
    "тоќен",
    "\U0001f600",
    "x" * 100_000,
    0,
    1,
    1.5,
    True,
    False,
    [],
    [TOKEN],
    {},
    {"token": TOKEN},
]


@pytest.mark.parametrize("token", WRONG_TOKENS, ids=lambda token: ascii(token)[:24])
def test_unknown_token_is_401_and_reveals_no_field_errors(
    client: FlaskClient, sqs: Sqs, token: Any
) -> None:
    for data in (DATA, None, {}, {"email_subject": ""}):
        body = assert_refused(post(client, envelope(data, token)), "invalid_token")
        assert "Invalid token" in body["message"]
        assert "email_" not in body["message"]
        assert "errors" not in body
    assert not sqs.messages


@pytest.mark.parametrize(
    "token", ["\u043f\u0430\u0440\u043e\u043b\u044c", "\U0001f600 or \u00e9", "x" * 4096]
)
def test_any_token_that_ssm_holds_is_200(service: Service, token: str) -> None:
    service.put_token(token)
    assert post(service.client, envelope(token=token)).status_code == 200


@pytest.mark.parametrize("error", OUTAGES, ids=name_of)
def test_token_that_could_never_be_read_is_503(sqs: Sqs, error: Exception) -> None:
    client = client_of(settings(), Ssm(error), sqs)
    for token in (TOKEN, "wrong"):
        response = post(client, envelope(None, token))
        assert_refused(response, "token_store_unavailable")
        assert int(response.headers["Retry-After"]) > 0
    assert not sqs.messages


def test_token_parameter_that_never_existed_is_503(aws: SimpleNamespace) -> None:
    config = settings(token_ssm_parameter=("/never/put",))
    assert_refused(post(client_of(config, aws.ssm, Sqs())), "token_store_unavailable")


# --- Rules 9 to 11: the data ----------------------------------------------------------------------


@pytest.mark.parametrize("data", [None, [], [DATA], "text", "", 0, 1.5, True, json.dumps(DATA)])
def test_data_that_is_no_object_is_400(client: FlaskClient, sqs: Sqs, data: Any) -> None:
    body = assert_refused(post(client, envelope(data)), "invalid_data")
    assert "data" in body["message"]
    assert not sqs.messages


def test_missing_data_is_400(client: FlaskClient) -> None:
    assert_refused(post(client, json.dumps({"token": TOKEN}).encode()), "invalid_data")
    assert_refused(post(client, json.dumps({"token": TOKEN, **DATA}).encode()), "invalid_data")


ABSENT = object()
BAD_TEXT = [
    (ABSENT, "missing"),
    (None, ""),
    ("", "empty"),
    (" ", "empty"),
    ("\t\r\n \u00a0\u2003\u3000", "empty"),
]
NO_TEXT = [(value, "string") for value in (0, 1, 1.5, True, False, [], ["a"], {}, {"a": "b"})]
BAD_FIELDS = [
    *((field, *case) for field in app.FIELDS for case in BAD_TEXT),
    *((f, *case) for f in app.FIELDS if f != "email_timestream" for case in NO_TEXT),
]


@pytest.mark.parametrize(("field", "value", "word"), BAD_FIELDS)
def test_bad_field_is_400_and_named(
    client: FlaskClient, sqs: Sqs, field: str, value: Any, word: str
) -> None:
    data = {**DATA, field: value} if value is not ABSENT else DATA.keys() - {field}
    data = data if isinstance(data, dict) else {name: DATA[name] for name in data}
    body = assert_refused(post(client, envelope(data)), "invalid_data")
    (error,) = body["errors"]
    assert set(error) == {"field", "message"}
    assert error["field"] == field
    for message in (body["message"], error["message"]):
        assert field in message
        assert word in message
        assert ("empty" in message) == (word == "empty")
    assert not sqs.messages


def test_all_bad_fields_are_listed_at_once(client: FlaskClient) -> None:
    data = {"email_subject": "", "email_sender": 5, "email_timestream": "soon"}
    body = assert_refused(post(client, envelope(data)), "invalid_data")
    assert [error["field"] for error in body["errors"]] == list(app.FIELDS)
    for error in body["errors"]:
        assert error["message"] in body["message"]
    body = assert_refused(post(client, envelope({})), "invalid_data")
    assert {error["field"] for error in body["errors"]} == set(app.FIELDS)


TIMESTAMPS = ["946684800", "946684801", "1693561101", "4102444799", "4102444800"]


@pytest.mark.parametrize("timestamp", [*TIMESTAMPS, *map(int, TIMESTAMPS), "0946684800"])
def test_timestamp_from_2000_to_2100_is_200(client: FlaskClient, timestamp: Any) -> None:
    assert post(client, envelope({**DATA, "email_timestream": timestamp})).status_code == 200


BAD_TIMESTAMPS = [
    *("946684799", "4102444801", "0", "-1693561101", "1" * 5000, "1" + "0" * 19),
    *(946684799, 4102444801, 0, -1, -1693561101, 10**19),
    *("1_693_561_101", " 1693561101", "1693561101 ", " 169\n", "1693561101\n", "+1693561101"),
    *("+169", "1e9", "1.6e9", "1693561101.0", "0x64F1B24D", "NaN", "now", "2023-09-01T09:38:21Z"),
    *("\u0661\u0666\u0669\u0663\u0665\u0666\u0661\u0661\u0660\u0661", "169356110\u00b9"),
    *("\uff11\uff16\uff19\uff13\uff15\uff16\uff11\uff11\uff10\uff11", "1693561101\x00"),
    *(True, False, 1693561101.0, 1e9, 1693561101.5, [], [1693561101], {}, {"a": 1}),
]


@pytest.mark.parametrize("timestamp", BAD_TIMESTAMPS, ids=lambda value: ascii(value)[:24])
def test_bad_timestamp_is_400(client: FlaskClient, sqs: Sqs, timestamp: Any) -> None:
    body = assert_refused(
        post(client, envelope({**DATA, "email_timestream": timestamp})), "invalid_timestamp"
    )
    assert "timestamp" in body["message"]
    (error,) = body["errors"]
    assert error["field"] == "email_timestream"
    assert error["message"] in body["message"]
    assert not sqs.messages


@pytest.mark.parametrize(
    "number",
    [
        "1" * 5000,
        "-" + "1" * 5000,
        "1e400",
        "-1e400",
        "1E9",
        "1693561101e0",
        "1e-400",
        "-0",
        "-0.0",
    ],
)
def test_json_number_that_is_no_timestamp_is_400(client: FlaskClient, number: str) -> None:
    text = json.dumps({**DATA, "email_timestream": 0}).replace(": 0,", f": {number},")
    assert_refused(post_text(client, text), "invalid_timestamp")


# --- The order of the checks ----------------------------------------------------------------------

STORE_DOWN, QUEUE_DOWN = Ssm(DOWN), Sqs(DOWN, DOWN)
BIG = {**DATA, "email_content": "x" * 2000}
ORDER = [
    # Each request breaks the rule of its code, and as many of the later ones as it can.
    ("not_found", {"path": "/nowhere", "body": b"\xff" * 9000, "content_type": "text/plain"}),
    ("method_not_allowed", {"method": "PUT", "body": b"\xff" * 9000, "content_type": "text/plain"}),
    ("request_too_large", {"body": b"\xff" * 9000, "content_type": "text/plain"}),
    ("unsupported_media_type", {"body": b"\xff", "content_type": "text/plain"}),
    ("invalid_json", {"body": b"\xff"}),
    ("token_required", {"body": b"{}", "ssm": STORE_DOWN}),
    ("invalid_token", {"body": envelope(None, 5), "ssm": STORE_DOWN}),
    ("token_store_unavailable", {"body": envelope(None), "ssm": STORE_DOWN}),
    ("invalid_data", {"body": envelope(None)}),
    ("invalid_data", {"body": envelope({**BIG, "email_sender": "", "email_timestream": "x"})}),
    ("invalid_timestamp", {"body": envelope({**BIG, "email_timestream": "x"})}),
    ("message_too_large", {"body": envelope(BIG), "sqs": Sqs(DOWN, maximum(1024))}),
    ("queue_unavailable", {"body": envelope(BIG)}),
]


@pytest.mark.parametrize(("code", "broken"), ORDER, ids=[code for code, _ in ORDER])
def test_first_rule_that_is_broken_answers(code: str, broken: dict[str, Any]) -> None:
    ssm, sqs = broken.get("ssm", Ssm()), broken.get("sqs", QUEUE_DOWN)
    client = client_of(settings(max_request_bytes=8000), ssm, sqs)
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


@pytest.mark.parametrize("key", ["", "key-1", "cl\u00e9 \u00e9\u00e8\u00fc"])
@pytest.mark.parametrize("content", ["x", "x" * 5000, "\u00e9\U0001f600\u65e5" * 100])
def test_message_of_the_queues_limit_is_200_and_one_byte_more_is_413(
    content: str, key: str
) -> None:
    def send(sqs: Sqs) -> TestResponse:
        client = client_of(settings(), Ssm(), sqs)
        body = json.dumps(
            {"token": TOKEN, "data": {**DATA, "email_content": content}}, ensure_ascii=False
        ).encode()
        headers = {"X-Request-Id": "r-1", "Idempotency-Key": key, "X-Amzn-Trace-Id": TRACE}
        return post(client, body, headers=headers)

    roomy = Sqs()
    assert send(roomy).status_code == 200
    size = size_of(roomy.messages[0])
    exact, short = Sqs(attributes=maximum(size)), Sqs(attributes=maximum(size - 1))
    assert send(exact).status_code == 200
    body = assert_refused(send(short), "message_too_large")
    assert str(size) in body["message"]
    assert str(size - 1) in body["message"]
    assert not short.messages


@pytest.mark.parametrize("limit", [1024, 262_144, 1_048_576])
def test_limit_is_the_queues_own(aws: SimpleNamespace, limit: int) -> None:
    service = Service(aws, maximum=limit)
    for size, status in ((limit - 500, 200), (limit, 413)):
        data = {**DATA, "email_content": "x" * (size - len(json.dumps(DATA)))}
        assert post(service.client, envelope(data)).status_code == status
    service.only_message()


def test_limit_is_asked_for_once(client: FlaskClient, sqs: Sqs) -> None:
    for _ in range(3):
        post(client)
    assert sqs.calls == 1 + 3


@pytest.mark.parametrize(
    "message",
    [
        "One or more parameters are invalid. Reason: Message must be shorter than 1024 bytes.",
        "One or more parameters are invalid. Reason: Message must be shorter than 262144 bytes.",
    ],
)
def test_sqs_own_refusal_by_size_is_413(aws: SimpleNamespace, message: str) -> None:
    sqs = SimpleNamespace(
        get_queue_attributes=Sqs().get_queue_attributes, send_message=aws.sqs.send_message
    )
    with Stubber(aws.sqs) as stub:
        stub.add_client_error("send_message", "InvalidParameterValue", message, 400)
        response = post(client_of(settings(), Ssm(), sqs))
    assert_refused(response, "message_too_large")


def test_limit_lowered_since_it_was_read_is_413(aws: SimpleNamespace) -> None:
    service = Service(aws)
    assert post(service.client).status_code == 200
    aws.sqs.set_queue_attributes(
        QueueUrl=service.queue_url, Attributes={"MaximumMessageSize": "1024"}
    )
    assert_refused(post(service.client, envelope(BIG)), "message_too_large")


# --- Rule 13: the queue ---------------------------------------------------------------------------


def failing_sqs(operation: str, failure: Any) -> Sqs:
    return Sqs(failure) if operation == "SendMessage" else Sqs(attributes=failure)


@pytest.mark.parametrize("operation", ["SendMessage", "GetQueueAttributes"])
@pytest.mark.parametrize("error", OUTAGES, ids=name_of)
def test_queue_failure_is_503_and_the_next_message_may_pass(
    operation: str, error: Exception
) -> None:
    sqs, clock = failing_sqs(operation, error), Clock()
    client = client_of(settings(), Ssm(), sqs, clock)
    response = post(client)
    body = assert_refused(response, "queue_unavailable")
    assert int(response.headers["Retry-After"]) > 0
    assert "as AWS puts it" not in body["message"]
    clock.now += 1
    sqs.sent, sqs.attributes = {"MessageId": "later"}, maximum(1024)
    assert post(client).get_json()["message_id"] == "later"


def test_refused_send_through_a_real_client_is_503(service: Service) -> None:
    assert service.client.get("/ready").status_code == 200
    with Stubber(service.aws.sqs) as stub:
        stub.add_client_error("send_message", "AccessDenied", http_status_code=403)
        assert_refused(post(service.client), "queue_unavailable")
    assert not service.received()


def test_queue_that_does_not_exist_is_503(aws: SimpleNamespace) -> None:
    client = client_of(settings(), Ssm(), aws.sqs)
    assert_refused(post(client), "queue_unavailable")
    assert_refused(client.get("/ready"), "queue_unavailable")


@pytest.mark.parametrize("answer", [{"MessageId": ""}, {"MessageId": None}, {"MD5OfBody": "x"}])
def test_answer_without_a_message_id_is_503(answer: dict[str, Any]) -> None:
    assert_refused(post(client_of(settings(), Ssm(), Sqs(answer))), "queue_unavailable")


@pytest.mark.parametrize(
    "attributes",
    [
        {"MD5OfBody": "x"},
        {"Attributes": {}},
        {"Attributes": None},
        {"Attributes": {"MaximumMessageSize": "big"}},
        {"Attributes": {"MaximumMessageSize": None}},
    ],
)
def test_answer_without_the_queues_limit_is_503(attributes: dict[str, Any]) -> None:
    sqs = Sqs(attributes=attributes)
    assert_refused(post(client_of(settings(), Ssm(), sqs)), "queue_unavailable")
    assert not sqs.messages


@contextmanager
def wire_answer(client: Any, operation: str, body: bytes, status: int = 200) -> Iterator[None]:
    """The client gets that status and body, in place of an answer of AWS."""

    class Raw(io.BytesIO):
        def stream(self, **_: Any) -> Iterator[bytes]:
            yield self.read()

    def answer(request: Any, **_: Any) -> AWSResponse:
        headers = {"content-type": "application/x-amz-json-1.1"}
        return AWSResponse(request.url, status, headers, Raw(body))

    event = f"before-send.{client.meta.service_model.service_name}.{operation}"
    client.meta.events.register_first(event, answer, unique_id=event)
    try:
        yield
    finally:
        client.meta.events.unregister(event, unique_id=event)


GARBAGE = [
    *(b"", b"{", b"{}", b"<html>busy</html>", b"\xff\xfe", b"[]", b"null", b"5", b'"text"'),
    *(b'{"MessageId": null}', b'{"Attributes": []}', b'{"Attributes": "x"}', b"[" * 100_000),
    *(b'{"Attributes": {"MaximumMessageSize": []}}', b'{"Parameters": "x"}'),
    *(b'{"Parameters": [5]}', b'{"Parameters": [{"Name": "a"}]}', b'{"Parameters": null}'),
]
OPERATIONS = ["ssm.GetParameters", "sqs.GetQueueAttributes", "sqs.SendMessage"]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("body", GARBAGE, ids=lambda body: repr(body[:24]))
def test_garbled_answer_of_aws_is_503(service: Service, operation: str, body: bytes) -> None:
    name, _, call = operation.partition(".")
    with wire_answer(getattr(service.aws, name), call, body):
        response = post(service.client)
    assert_refused(response, "token_store_unavailable" if name == "ssm" else "queue_unavailable")


# --- Rule 14: the unforeseen ----------------------------------------------------------------------


def test_defect_is_500_logged_with_its_traceback_and_reveals_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flask_app: Flask = app.create_app(settings(), ssm=Ssm(), sqs=Sqs())

    def defect() -> None:
        raise RuntimeError("something internal")

    flask_app.add_url_rule("/defect", view_func=defect)
    with logging_as_in_production("INFO"):
        response = flask_app.test_client().get("/defect", headers={"X-Request-Id": "r-1"})
    assert_refused(response, "internal_error")
    assert "something internal" not in response.get_data(as_text=True)
    assert "RuntimeError" not in response.get_data(as_text=True)
    defect_line, answer = lines_of(capsys)
    assert "something internal" in defect_line["exc_info"]
    assert "in defect" in defect_line["exc_info"]
    assert defect_line["level"] == answer["level"] == "ERROR"
    assert defect_line["request_id"] == answer["request_id"] == "r-1"


def test_every_error_code_has_a_status_of_4xx_or_5xx_and_a_message() -> None:
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
    for code, (status, message) in app.ERRORS.items():
        refusal = app.Refusal(code)
        assert (refusal.status, refusal.message) == (status, message)


# --- The token store ------------------------------------------------------------------------------


class Store:
    """A token store on moto, with a clock that stands still."""

    def __init__(self, aws: SimpleNamespace, count: int = 1, jitter: float = 0.5) -> None:
        number = next(aws.count)
        self.aws = aws
        self.names = tuple(f"/store/{number}/{n}" for n in range(count))
        for n, name in enumerate(self.names):
            self.put(f"token-{n}", name)
        self.clock = Clock()
        self.ssm = Ssm(aws.ssm.get_parameters)
        self.store = app.TokenStore(self.ssm, self.names, 60, self.clock, lambda: jitter)

    def put(self, value: str, name: str | None = None) -> None:
        self.aws.ssm.put_parameter(
            Name=name or self.names[0], Value=value, Type="SecureString", Overwrite=True
        )

    def delete(self, name: str | None = None) -> None:
        self.aws.ssm.delete_parameter(Name=name or self.names[0])

    def accepts(self, token: str) -> bool:
        return self.store.accepts(token)


def test_many_requests_cause_one_read_of_ssm(aws: SimpleNamespace) -> None:
    service = Service(aws)
    ssm = Ssm(aws.ssm.get_parameters)
    client = client_of(service.settings, ssm, aws.sqs)
    assert [post(client).status_code for _ in range(20)] == [200] * 20
    assert ssm.reads == 1


def test_token_is_read_with_decryption() -> None:
    asked: list[dict[str, Any]] = []

    def answer(**arguments: Any) -> dict[str, Any]:
        asked.append(arguments)
        return parameters("a", "b")

    assert app.TokenStore(Ssm(answer), ("/a", "/b"), 60).accepts("b")
    assert asked == [{"Names": ["/a", "/b"], "WithDecryption": True}]


def test_token_is_compared_in_constant_time() -> None:
    class Bytes(bytes):
        """Equality would end at the first byte that differs: its time tells how much is right"""

        def __eq__(self, _: object) -> bool:
            raise AssertionError("compared with ==")

        __hash__ = None  # type: ignore[assignment]

    class Text(str):
        __slots__ = ()

        def encode(self, *arguments: Any, **more: Any) -> bytes:
            return Bytes(super().encode(*arguments, **more))

        def __eq__(self, _: object) -> bool:
            raise AssertionError("compared with ==")

        __hash__ = None  # type: ignore[assignment]

    store = app.TokenStore(Ssm(), (PARAMETER,), 60)
    assert store.accepts(Text(TOKEN))
    assert not store.accepts(Text("wrong"))


@pytest.mark.parametrize(
    ("jitter", "age", "reads"),
    [
        (0.0, 41.9, 1),
        (0.0, 42.0, 2),
        (1.0, 53.9, 1),
        (1.0, 54.0, 2),
        (0.5, 47.9, 1),
        (0.5, 48.0, 2),
    ],
)
def test_token_is_read_again_at_70_to_90_percent_of_the_age_limit(
    aws: SimpleNamespace, jitter: float, age: float, reads: int
) -> None:
    store = Store(aws, jitter=jitter)
    assert store.accepts("token-0")
    store.clock.now += age
    assert store.accepts("token-0")
    assert store.ssm.reads == reads


def test_jitter_differs_between_workers_unless_one_is_given() -> None:
    random.seed(1)
    ages = set()
    for _ in range(5):
        clock, ssm = Clock(), Ssm()
        store = app.TokenStore(ssm, (PARAMETER,), 60, clock)
        assert store.accepts(TOKEN)
        while ssm.reads == 1:
            clock.now += 0.1
            store.refresh_if_old()
        ages.add(round(clock.now, 1))
    assert len(ages) > 1


def test_mismatch_causes_one_read_every_five_seconds_at_most(aws: SimpleNamespace) -> None:
    store = Store(aws)
    assert store.accepts("token-0")
    store.clock.now += 5
    for _ in range(10):
        assert not store.accepts("guess")
    assert store.ssm.reads == 2
    store.clock.now += 4.9
    assert not store.accepts("guess")
    assert store.ssm.reads == 2
    store.clock.now += 0.1
    assert not store.accepts("guess")
    assert store.ssm.reads == 3


def test_known_token_causes_no_read_beside_guesses(aws: SimpleNamespace) -> None:
    store = Store(aws)
    assert store.accepts("token-0")
    store.clock.now += 10
    assert store.accepts("token-0")
    assert store.ssm.reads == 1


def test_rotated_token_works_at_once_and_the_old_one_no_more(aws: SimpleNamespace) -> None:
    store = Store(aws)
    assert store.accepts("token-0")
    store.clock.now += 10
    store.put("rotated")
    assert store.accepts("rotated")
    assert not store.accepts("token-0")


def test_rotated_token_works_at_once_over_http(service: Service) -> None:
    config = settings(
        sqs_queue_url=service.queue_url,
        token_ssm_parameter=(service.parameter,),
        token_cache_seconds=0,
    )
    client = client_of(config, service.aws.ssm, service.aws.sqs)
    assert post(client).status_code == 200
    service.put_token("rotated")
    assert post(client, envelope(token="rotated")).status_code == 200
    assert_refused(post(client), "invalid_token")


def test_old_token_stops_working_when_the_cache_is_old(aws: SimpleNamespace) -> None:
    store = Store(aws)
    assert store.accepts("token-0")
    store.put("rotated")
    store.clock.now += 60
    assert not store.accepts("token-0")


def test_every_one_of_several_parameters_is_accepted(aws: SimpleNamespace) -> None:
    store = Store(aws, count=3)
    assert [store.accepts(f"token-{n}") for n in range(4)] == [True, True, True, False]


def test_deleted_parameter_stops_its_token_and_no_other(
    aws: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(aws, count=2)
    assert store.accepts("token-1")
    store.delete(store.names[1])
    store.clock.now += 60
    assert not store.accepts("token-1")
    assert store.accepts("token-0")
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    assert warning.__dict__["parameters"] == [store.names[1]]


def test_only_parameter_deleted_is_401_and_not_503(service: Service) -> None:
    config = settings(
        sqs_queue_url=service.queue_url,
        token_ssm_parameter=(service.parameter,),
        token_cache_seconds=0,
    )
    client = client_of(config, service.aws.ssm, service.aws.sqs)
    assert post(client).status_code == 200
    service.aws.ssm.delete_parameter(Name=service.parameter)
    assert_refused(post(client), "invalid_token")
    service.put_token("again")
    assert post(client, envelope(token="again")).status_code == 200


@pytest.mark.parametrize("error", [*OUTAGES, {}, parameters()], ids=name_of)
def test_last_known_token_works_while_ssm_fails_with_a_warning_and_a_metric(
    aws: SimpleNamespace, client: FlaskClient, caplog: pytest.LogCaptureFixture, error: Any
) -> None:
    store = Store(aws)
    assert store.accepts("token-0")
    before = counted(client, "email_processor_token_reads_total", result="failure")
    store.ssm.answer = error
    store.clock.now += 1000
    caplog.clear()
    assert store.accepts("token-0")
    assert not store.accepts("guess")
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert counted(client, "email_processor_token_reads_total", result="failure") == before + 1


def test_ssm_that_fails_is_asked_every_five_seconds_at_most(aws: SimpleNamespace) -> None:
    store = Store(aws)
    assert store.accepts("token-0")
    store.ssm.answer = DOWN
    store.clock.now += 60
    for _ in range(10):
        assert store.accepts("token-0")
        assert not store.accepts("guess")
    assert store.ssm.reads == 2
    store.clock.now += 5
    assert store.accepts("token-0")
    assert store.ssm.reads == 3


def test_slow_failure_of_ssm_costs_a_request_one_read() -> None:
    clock = Clock()

    def hang(**_: Any) -> None:
        clock.now += 5.5
        raise DOWN

    ssm = Ssm(hang)
    store = app.TokenStore(ssm, (PARAMETER,), 60, clock)
    with pytest.raises(app.Refusal, match="token_store_unavailable"):
        store.accepts(TOKEN)
    assert ssm.reads == 1


def test_token_store_recovers_when_ssm_does(aws: SimpleNamespace) -> None:
    store = Store(aws)
    working, store.ssm.answer = store.ssm.answer, DOWN
    for _ in range(3):
        with pytest.raises(app.Refusal, match="token_store_unavailable"):
            store.accepts("token-0")
    assert store.ssm.reads == 1
    assert not store.store.ready
    assert store.store.problem
    store.ssm.answer = working
    store.clock.now += 5
    assert store.accepts("token-0")
    assert store.store.ready
    assert store.store.problem is None


def test_parameter_put_after_the_start_is_found(aws: SimpleNamespace) -> None:
    store = Store(aws)
    store.delete()
    with pytest.raises(app.Refusal, match="token_store_unavailable"):
        store.accepts("token-0")
    store.put("late")
    store.clock.now += 5
    assert store.accepts("late")


def test_successful_reads_are_counted(aws: SimpleNamespace, client: FlaskClient) -> None:
    before = counted(client, "email_processor_token_reads_total", result="success")
    assert Store(aws).accepts("token-0")
    assert counted(client, "email_processor_token_reads_total", result="success") == before + 1


class Gate:
    """Holds the next read of SSM inside of the call until it is opened."""

    def __init__(self, store: Store) -> None:
        self.entered, self.open = threading.Event(), threading.Event()
        self._answer, store.ssm.answer = store.ssm.answer, self

    def __call__(self, **arguments: Any) -> Any:
        self.entered.set()
        assert self.open.wait(20)
        return give(self._answer, arguments)


@contextmanager
def read_under_way(store: Store, token: str) -> Iterator[tuple[Gate, ThreadPoolExecutor, Any]]:
    """Another thread is inside of its read of SSM."""
    gate = Gate(store)
    with ThreadPoolExecutor() as pool:
        try:
            reading = pool.submit(store.accepts, token)
            assert gate.entered.wait(20)
            yield gate, pool, reading
        finally:
            gate.open.set()


def test_while_one_thread_reads_early_the_others_answer_from_the_cache(
    aws: SimpleNamespace,
) -> None:
    store = Store(aws)
    assert store.accepts("token-0")
    store.clock.now += 59.9
    with read_under_way(store, "token-0") as (gate, pool, reading):
        others = [pool.submit(store.accepts, "token-0") for _ in range(4)]
        assert all(other.result(timeout=20) for other in others)
        assert not reading.done()
        assert store.ssm.reads == 2
        gate.open.set()
        assert reading.result(timeout=20)
    assert store.ssm.reads == 2


@pytest.mark.parametrize("loaded", [True, False])
def test_threads_that_find_the_cache_too_old_wait_for_one_read(
    aws: SimpleNamespace, loaded: bool
) -> None:
    store = Store(aws)
    if loaded:
        assert store.accepts("token-0")
        store.put("rotated")
    token = "rotated" if loaded else "token-0"
    store.clock.now += 60
    before = store.ssm.reads
    with read_under_way(store, token) as (gate, pool, reading):
        others = []
        for _ in range(4):
            store.clock.asked.clear()
            others.append(pool.submit(store.accepts, token))
            assert store.clock.asked.wait(20)
        assert store.ssm.reads == before + 1
        gate.open.set()
        assert [other.result(timeout=20) for other in (reading, *others)] == [True] * 5
    assert store.ssm.reads == before + 1


def test_threads_do_not_wait_for_an_ssm_that_is_known_to_fail(aws: SimpleNamespace) -> None:
    store = Store(aws)
    assert store.accepts("token-0")
    store.ssm.answer = DOWN
    store.clock.now += 60
    assert store.accepts("token-0")
    store.clock.now += 5
    with read_under_way(store, "token-0") as (_, pool, reading):
        assert pool.submit(store.accepts, "token-0").result(timeout=20)
        assert not pool.submit(store.accepts, "guess").result(timeout=20)
        assert not reading.done()


# --- The message ----------------------------------------------------------------------------------


def text_values(text: str) -> Any:
    """The JSON with every number as it is written."""
    return json.loads(text, parse_int=str, parse_float=str)


NUMBERS = "[1.10, 1E5, 1e400, -0, -0.0, 0.1000, 12345678901234567890123, " + "9" * 5000 + "]"


@pytest.mark.parametrize(
    "more",
    [
        f'"numbers": {NUMBERS}',
        '"nested": {"data": {"email_subject": ""}, "list": [null, true, false, [], {}]}',
        '"": "", "data": "x", "token": "y", "null": null',
        '"text": "\\u0000\\u001f\\u007f\\ufffe\\uffff \\\\ \\" \\/"',
        '"text": "\\ud83d\\ude00 \\ud83d \\ude00\\ud83d"',
        '"text": "\u00e9 \u65e5\u672c \U0001f600 \u2028 \ufffe \uffff \u200b \u0085 \x7f"',
        '"\u00e9\U0001f600": "key"',
        '"text": "   kept   "',
    ],
)
def test_body_is_the_data_unchanged_and_in_ascii(service: Service, more: str) -> None:
    text = f'{{{json.dumps(DATA)[1:-1]}, "email_timestream": 1693561101, {more}}}'
    assert post_text(service.client, text).status_code == 200
    body = service.only_message()["Body"]
    assert text_values(body) == text_values(text)
    assert body.isascii()
    assert not re.search(r"[^\t\n\r -~\x7f]", body), "SQS takes no other control characters"


@pytest.mark.parametrize("timestamp", ["1693561101", 1693561101, "0001693561101"])
def test_timestamp_keeps_its_type_and_text(service: Service, timestamp: Any) -> None:
    data = {**DATA, "email_timestream": timestamp}
    assert post(service.client, envelope(data)).status_code == 200
    assert json.loads(service.only_message()["Body"]) == data


DATA_TEXT, DECOY = json.dumps(DATA), json.dumps({**DATA, "email_subject": "decoy"})


@pytest.mark.parametrize(
    "text",
    [
        '{"data": DATA, "token": TOKEN}',
        '{"token": TOKEN, "data": DATA}',
        '\n{ "token"\t:\r\nTOKEN ,"data" \n:\t DATA\n}\n',
        '{"other": {"data": DECOY}, "data": DATA, "more": [{"data": DECOY}], "token": TOKEN}',
        '{"data": DECOY, "token": "x", "token": TOKEN, "data": DATA}',
        '{"Data": DECOY, " data": DECOY, "d\\u0061ta": DATA, "token": TOKEN}',
        '{"a": "data", "b": "\\"data\\": {}", "data": DATA, "c": "\\\\", "token": TOKEN}',
        '{"a": -1.5e3, "b": null, "c": [], "d": {}, "data": DATA, "e": "", "token": TOKEN}',
    ],
)
def test_data_is_found_wherever_it_stands(service: Service, text: str) -> None:
    for word, value in (("DATA", DATA_TEXT), ("DECOY", DECOY), ("TOKEN", json.dumps(TOKEN))):
        text = text.replace(word, value)
    assert post(service.client, text.encode()).status_code == 200
    assert json.loads(service.only_message()["Body"]) == DATA


def attributes_of(message: dict[str, Any]) -> dict[str, str]:
    assert all(value["DataType"] == "String" for value in message["MessageAttributes"].values())
    return {name: value["StringValue"] for name, value in message["MessageAttributes"].items()}


def test_attributes_tell_content_type_time_request_and_idempotency_key(service: Service) -> None:
    headers = {"X-Request-Id": "r-1", "Idempotency-Key": " order 1843/\u00e9 "}
    before = datetime.now(UTC)
    assert post(service.client, headers=headers).status_code == 200
    attributes = attributes_of(service.only_message())
    processed = datetime.fromisoformat(attributes.pop("ProcessedAt"))
    assert before - timedelta(seconds=1) <= processed <= datetime.now(UTC) + timedelta(seconds=1)
    assert processed.utcoffset() == timedelta(0)
    assert attributes == {
        "ContentType": "application/json",
        "RequestId": "r-1",
        "IdempotencyKey": "order 1843/\u00e9",
    }


@pytest.mark.parametrize("headers", [{}, {"Idempotency-Key": ""}, {"Idempotency-Key": "  "}])
def test_without_an_idempotency_key_there_is_no_such_attribute(
    service: Service, headers: dict[str, str]
) -> None:
    response = post(service.client, headers=headers)
    attributes = attributes_of(service.only_message())
    assert set(attributes) == {"ContentType", "ProcessedAt", "RequestId"}
    assert attributes["RequestId"] == response.headers["X-Request-Id"]


@pytest.mark.parametrize("key", ["\x0b", "a\tb", "a\x85b"])
def test_idempotency_key_never_makes_sqs_refuse_the_message(
    client: FlaskClient, sqs: Sqs, key: str
) -> None:
    response = post(client, headers={"Idempotency-Key": key})
    assert response.status_code in (200, 400)
    for message in sqs.messages:
        for value in attributes_of(message).values():
            assert re.fullmatch("[\t\n\r -\ud7ff\ue000-\ufffd]+", value), "SQS takes no other"


GOOD_TRACES = [
    TRACE,
    f"Self=1-67891234-12456789abcdef012345678;{TRACE}",
    f"Self=1-67891234-12456789abcdef012345678;{TRACE};CalledFrom=app",
    f"{TRACE};Parent=53995c3f42cd8ad8;Sampled=1",
    f"{TRACE};Parent=53995c3f42cd8ad8;Sampled=1;Lineage=a87bd80c:0|68fd508a:5|c512fbe3:2",
]
BAD_TRACES = [
    "",
    "x",
    "Root=1",
    "Root=1-67891233-ABCDEF",
    "Root=1-67891233-abcdef01234567891234567",
    "Parent=53995c3f42cd8ad8",
    f"{TRACE};x\x01=y",
    f"{TRACE};a=\u00e9",
    f"{TRACE} {TRACE}",
    f"{TRACE};a=" + "b" * 1024,
]


PARENT, HEX = "53995c3f42cd8ad8", TRACE_ID.replace("-", "")[1:]
GOOD_TRACEPARENTS = {
    f"00-{HEX}-{PARENT}-01": "Sampled=1",
    f"00-{HEX}-{PARENT}-00": "Sampled=0",
    f"00-{HEX}-{PARENT}-03": "Sampled=1",
    f"00-{HEX}-{PARENT}-fe": "Sampled=0",
    f"01-{HEX}-{PARENT}-01": "Sampled=1",
    f"fe-{HEX}-{PARENT}-01-what later versions add": "Sampled=1",
}
BAD_TRACEPARENTS = [
    "",
    "x",
    HEX,
    f"00-{HEX}-{PARENT}",
    f"00-{HEX}-{PARENT}-1",
    f"00-{HEX}-{PARENT}-01-",
    f"00-{HEX}-{PARENT}-01-more",
    f"00-{HEX}-{PARENT}-011",
    f"01-{HEX}-{PARENT}-011",
    f"ff-{HEX}-{PARENT}-01",
    f"00-{HEX.upper()}-{PARENT}-01",
    f"00-{'0' * 32}-{PARENT}-01",
    f"00-{HEX}-{'0' * 16}-01",
    f"00-{HEX[1:]}-{PARENT}-01",
    f"00-{HEX}-{PARENT}-01,00-{HEX}-{PARENT}-01",
    f" 00-{HEX}-{PARENT}-01",
    f"00-{HEX}-{PARENT}-0\u0661",
    f"00-{HEX}-{PARENT}-01\x0b",
]


def trace_of(
    service: Service, capsys: pytest.CaptureFixture[str], **headers: str
) -> tuple[str | None, str | None]:
    """The trace header in the queue, and the trace id in the log."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    with logging_as_in_production("INFO"):
        assert post(service.client, headers=names).status_code == 200
        (line,) = lines_of(capsys)
    message = service.only_message()
    assert "AWSTraceHeader" not in message["MessageAttributes"]
    return message["Attributes"].get("AWSTraceHeader"), line.get("trace_id")


@pytest.mark.parametrize("trace", GOOD_TRACES)
def test_trace_header_of_the_alb_goes_on_through_the_queue(
    service: Service, capsys: pytest.CaptureFixture[str], trace: str
) -> None:
    both = {"X_Amzn_Trace_Id": trace, "traceparent": f"00-{'a' * 32}-{PARENT}-01"}
    assert trace_of(service, capsys, **both) == (trace, TRACE_ID)


@pytest.mark.parametrize(("traceparent", "sampled"), GOOD_TRACEPARENTS.items())
@pytest.mark.parametrize("other", ["", "Root=1"])
def test_traceparent_goes_on_in_the_form_of_x_ray_where_no_other_header_counts(
    service: Service, capsys: pytest.CaptureFixture[str], traceparent: str, sampled: str, other: str
) -> None:
    headers = {"X_Amzn_Trace_Id": other, "traceparent": traceparent}
    expected = f"Root={TRACE_ID};Parent={PARENT};{sampled}"
    assert trace_of(service, capsys, **headers) == (expected, TRACE_ID)


@pytest.mark.parametrize(
    ("header", "trace"),
    [
        *(("X_Amzn_Trace_Id", trace) for trace in BAD_TRACES),
        *(("traceparent", trace) for trace in BAD_TRACEPARENTS),
    ],
    ids=lambda text: ascii(text)[-24:],
)
def test_bad_trace_header_reaches_neither_queue_nor_log(
    service: Service, capsys: pytest.CaptureFixture[str], header: str, trace: str
) -> None:
    assert trace_of(service, capsys, **{header: trace}) == (None, None)


@pytest.mark.parametrize(
    ("headers", "deduplication_id"),
    [
        ({"X-Request-Id": "r-1"}, "r-1"),
        ({"X-Request-Id": "r-1", "Idempotency-Key": "k-1"}, "k-1"),
        ({"Idempotency-Key": "x" * 128}, "x" * 128),
        ({"Idempotency-Key": string.punctuation}, string.punctuation),
    ],
)
def test_fifo_message_has_a_group_and_is_deduplicated_by_key_or_request_id(
    aws: SimpleNamespace, headers: dict[str, str], deduplication_id: str
) -> None:
    service = Service(aws, fifo=True)
    first, second = (post(service.client, headers=headers) for _ in range(2))
    assert (first.status_code, second.status_code) == (200, 200)
    attributes = service.only_message()["Attributes"]
    assert attributes["MessageGroupId"]
    assert attributes["MessageDeduplicationId"] == deduplication_id


def test_fifo_deduplication_id_of_any_key_is_one_that_sqs_takes(aws: SimpleNamespace) -> None:
    keys = ["x" * 129, "x" * 130, "a b", "a\u00e9", "a\u00e8", "\u00ff" * 400]
    ids = {app.Message("{}", "r-1", key).deduplication_id() for key in keys}
    assert len(ids) == len(keys)
    assert all(re.fullmatch(r"[!-~]{1,128}", given) for given in ids)
    service = Service(aws, fifo=True)
    for key in keys:
        assert post(service.client, headers={"Idempotency-Key": key}).status_code == 200
    assert len(service.received()) >= 1


def test_message_for_a_standard_queue_has_neither_group_nor_deduplication_id(
    client: FlaskClient, sqs: Sqs
) -> None:
    post(client, headers={"Idempotency-Key": "k-1"})
    (message,) = sqs.messages
    assert set(message) == {"QueueUrl", "MessageBody", "MessageAttributes"}
    assert message["QueueUrl"] == QUEUE_URL


def test_publisher_gives_the_message_id_of_sqs(aws: SimpleNamespace) -> None:
    service = Service(aws)
    publisher = app.Publisher(aws.sqs, aws.sqs, service.queue_url, 8, 2)
    given = publisher.publish(app.Message(body="{}", request_id="r-1"))
    assert given == service.only_message()["MessageId"]


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


GOOD_SETTINGS: list[tuple[str, str, Any]] = [
    ("SQS_QUEUE_URL", QUEUE_URL + ".fifo", QUEUE_URL + ".fifo"),
    (
        "SQS_QUEUE_URL",
        "http://localhost:5000/123456789012/q",
        "http://localhost:5000/123456789012/q",
    ),
    ("AWS_REGION", "us-gov-east-1", "us-gov-east-1"),
    ("AWS_REGION", "ap-southeast-2", "ap-southeast-2"),
    ("AWS_REGION", "", "us-west-1"),
    ("TOKEN_SSM_PARAMETER", "/a/b.c_d-e, /f ,g", ("/a/b.c_d-e", "/f", "g")),
    ("TOKEN_SSM_PARAMETER", "/a,/a", ("/a",)),
    (
        "TOKEN_SSM_PARAMETER",
        "arn:aws:ssm:us-west-1:123456789012:parameter/a",
        ("arn:aws:ssm:us-west-1:123456789012:parameter/a",),
    ),
    (
        "TOKEN_SSM_PARAMETER",
        ",".join(f"/{n}" for n in range(10)),
        tuple(f"/{n}" for n in range(10)),
    ),
    ("PORT", "1", 1),
    ("PORT", " 65535 ", 65535),
    ("GUNICORN_WORKERS", "1", 1),
    ("GUNICORN_THREADS", "256", 256),
    ("MAX_REQUEST_BYTES", "1", 1),
    ("BODY_TIMEOUT_SECONDS", "1.5", 1.5),
    ("SQS_CALLS_IN_FLIGHT", "64", 64),
    ("TOKEN_CACHE_SECONDS", "3600", 3600),
    ("LOG_LEVEL", "DEBUG", "DEBUG"),
    ("LOG_LEVEL", "ERROR", "ERROR"),
]


@pytest.mark.parametrize(("variable", "text", "value"), GOOD_SETTINGS)
def test_setting_is_read_from_its_variable(variable: str, text: str, value: Any) -> None:
    environ = {"SQS_QUEUE_URL": QUEUE_URL, variable: text}
    assert getattr(app.Settings.from_environ(environ), variable.lower()) == value


NO_NUMBERS = ["x", "-1", "0", "+5", "1_0", "1e3", "0x10", "nan", "inf", "\u0665", "1,5", "9" * 5000]
BAD_SETTINGS = [
    (
        "SQS_QUEUE_URL",
        ["", " ", "dev-CP-queue", "ftp://a/b", "https://", "https://a/", "https://a b/c"],
    ),
    ("AWS_REGION", ["x", "us west 1", "US-WEST-1", "us-west", "us-west-1a", "us-west-1;x"]),
    ("TOKEN_SSM_PARAMETER", [",", "/a,", "/a b", "/a,,/b", "/\u00e9", "/a\n/b", "/a*"]),
    ("TOKEN_SSM_PARAMETER", [",".join(f"/{n}" for n in range(11))]),
    ("PORT", [*NO_NUMBERS, "65536", "80.5", "8080.0"]),
    ("GUNICORN_WORKERS", [*NO_NUMBERS, "65", "1.5"]),
    ("GUNICORN_THREADS", [*NO_NUMBERS, "257", "1.5"]),
    ("MAX_REQUEST_BYTES", [*NO_NUMBERS, "1073741825", "2MB", "1.5"]),
    ("BODY_TIMEOUT_SECONDS", [*NO_NUMBERS, "61", "0.99", "5s", "."]),
    ("SQS_CALLS_IN_FLIGHT", [*NO_NUMBERS, "65", "1.5"]),
    ("TOKEN_CACHE_SECONDS", [*NO_NUMBERS, "3601", "0.99", "1m"]),
    ("LOG_LEVEL", ["x", "TRACE", "10", "INFO DEBUG"]),
]


@pytest.mark.parametrize(
    ("variable", "text"),
    [(variable, text) for variable, texts in BAD_SETTINGS for text in texts],
    ids=lambda text: ascii(text)[1:30],
)
def test_bad_setting_gives_one_line_that_names_its_variable(variable: str, text: str) -> None:
    with pytest.raises(app.SettingsError) as caught:
        app.Settings.from_environ({"SQS_QUEUE_URL": QUEUE_URL, variable: text})
    (line,) = str(caught.value).splitlines()
    assert line.startswith(variable)
    assert len(line) > len(variable) + 10


def test_several_bad_settings_are_all_named_at_once() -> None:
    with pytest.raises(app.SettingsError) as caught:
        app.Settings.from_environ({"PORT": "x", "LOG_LEVEL": "y", "AWS_REGION": "us-west-1"})
    lines = str(caught.value).splitlines()
    assert [line.split()[0] for line in lines] == ["SQS_QUEUE_URL", "PORT", "LOG_LEVEL"]


# --- Logging --------------------------------------------------------------------------------------

LogLines = Callable[[], list[dict[str, Any]]]


@contextmanager
def logging_as_in_production(level: str) -> Iterator[None]:
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


REQUEST_FIELDS = {"request_id", "client", "method", "path", "status", "duration_ms"}
COMMON_FIELDS = {"time", "level", "logger", "message"}


def test_request_gives_one_json_line_with_the_documented_fields(
    client: FlaskClient, capsys: pytest.CaptureFixture[str]
) -> None:
    headers = {
        "X-Request-Id": "r-1",
        "X-Amzn-Trace-Id": TRACE,
        "X-Forwarded-For": "1.1.1.1, 2.2.2.2",
    }
    with logging_as_in_production("INFO"):
        post(client, headers=headers)
        post(client, envelope(token="wrong"), headers=headers)
        client.get("/nowhere")
        accepted, refused, unknown = lines_of(capsys)
    assert set(accepted) == COMMON_FIELDS | REQUEST_FIELDS | {"trace_id", "message_id"}
    assert set(refused) == COMMON_FIELDS | REQUEST_FIELDS | {"trace_id", "error"}
    assert set(unknown) == COMMON_FIELDS | REQUEST_FIELDS | {"error"}
    time = datetime.fromisoformat(accepted.pop("time"))
    assert abs(datetime.now(UTC) - time) < timedelta(minutes=1)
    assert 0 <= accepted.pop("duration_ms") < 60_000
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
    assert (refused["status"], refused["error"]) == (401, "invalid_token")
    assert (unknown["status"], unknown["path"], unknown["method"]) == (404, "/nowhere", "GET")


@pytest.mark.parametrize(
    ("ssm", "sqs", "text"),
    [
        (DOWN, None, "token not read"),
        (parameters(missing=(PARAMETER,)), None, "token parameter missing"),
        (None, Sqs(attributes=DOWN), "queue not seen"),
        (None, Sqs(DOWN), "messages not sent"),
        (None, Sqs(ReadTimeoutError(endpoint_url="https://aws.invalid")), "SQS is down"),
    ],
    ids=["token", "parameter", "queue", "message", "circuit"],
)
@pytest.mark.parametrize("traced", [True, False])
def test_every_line_of_a_request_tells_its_id_and_trace(
    capsys: pytest.CaptureFixture[str], ssm: Any, sqs: Sqs | None, text: str, traced: bool
) -> None:
    client = client_of(settings(), Ssm(ssm), sqs or Sqs())
    headers = {"X-Request-Id": "r-1"} | ({"X-Amzn-Trace-Id": TRACE} if traced else {})
    with logging_as_in_production("INFO"):
        assert post(client, headers=headers).status_code == 503
        logging.getLogger("botocore").warning("another library's")
        lines = lines_of(capsys)
    *of_request, outside = lines
    assert text in " ".join(line["message"] for line in of_request)
    assert len(of_request) >= 2
    assert {line["request_id"] for line in of_request} == {"r-1"}
    assert {line.get("trace_id") for line in of_request} == {TRACE_ID if traced else None}
    assert not {"request_id", "trace_id"} & outside.keys()


def test_line_of_another_library_tells_the_request_too(capsys: pytest.CaptureFixture[str]) -> None:
    def send(**_: Any) -> dict[str, str]:
        logging.getLogger("botocore").warning("inside")
        return {"MessageId": "m"}

    with logging_as_in_production("INFO"):
        post(client_of(settings(), Ssm(), Sqs(send)), headers={"X-Request-Id": "r-1"})
        inside, _ = lines_of(capsys)
    assert (inside["message"], inside["request_id"]) == ("inside", "r-1")


@pytest.mark.parametrize(
    ("forwarded", "client_address"),
    [
        (None, "127.0.0.1"),
        ("", "127.0.0.1"),
        ("203.0.113.7", "203.0.113.7"),
        ("spoofed, 203.0.113.7", "203.0.113.7"),
        ("10.0.0.1,10.0.0.2 , 203.0.113.7 ", "203.0.113.7"),
        ("2001:db8::1", "2001:db8::1"),
    ],
)
def test_client_address_is_the_one_that_the_alb_saw(
    client: FlaskClient,
    capsys: pytest.CaptureFixture[str],
    forwarded: str | None,
    client_address: str,
) -> None:
    with logging_as_in_production("INFO"):
        client.get("/", headers={} if forwarded is None else {"X-Forwarded-For": forwarded})
        (line,) = lines_of(capsys)
    assert line["client"] == client_address


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics"])
def test_health_checks_are_logged_at_debug_only(
    client: FlaskClient, capsys: pytest.CaptureFixture[str], path: str
) -> None:
    with logging_as_in_production("INFO"):
        client.get(path)
        assert lines_of(capsys) == []
    with logging_as_in_production("DEBUG"):
        client.get(path)
        (line,) = lines_of(capsys)
    assert (line["level"], line["path"], line["status"]) == ("DEBUG", path, 200)


@pytest.mark.parametrize(
    ("level", "levels"),
    [
        ("DEBUG", ["DEBUG", "INFO", "WARNING", "WARNING", "ERROR", "ERROR"]),
        ("INFO", ["INFO", "WARNING", "WARNING", "ERROR", "ERROR"]),
        ("WARNING", ["WARNING", "WARNING", "ERROR", "ERROR"]),
        ("ERROR", ["ERROR", "ERROR"]),
    ],
)
def test_log_level_chooses_what_is_logged(
    capsys: pytest.CaptureFixture[str], level: str, levels: list[str]
) -> None:
    client = client_of(settings(), Ssm(), Sqs(DOWN))
    with logging_as_in_production(level):
        client.get("/health")
        client.get("/nowhere")
        post(client)
        assert [line["level"] for line in lines_of(capsys)] == levels


def test_answer_of_5xx_is_logged_as_an_error_with_its_cause(
    capsys: pytest.CaptureFixture[str],
) -> None:
    client = client_of(settings(), Ssm(), Sqs(client_error("AccessDenied", 403)))
    with logging_as_in_production("INFO"):
        post(client)
        cause, answer = lines_of(capsys)
    assert cause["level"] == answer["level"] == "ERROR"
    assert "AccessDenied" in json.dumps(cause)
    assert (answer["status"], answer["error"]) == (503, "queue_unavailable")


SECRETS = [f"SECRET-{word}" for word in ("token", "guess", "subject", "sender", "content")]
SECRET_DATA = {
    "email_subject": "SECRET-subject",
    "email_sender": "SECRET-sender",
    "email_timestream": "1693561101",
    "email_content": "SECRET-content",
}


def secret(data: Any = SECRET_DATA, token: Any = "SECRET-token") -> bytes:
    return envelope(data, token)


WIRES = [
    ("token_store_unavailable" if operation.startswith("ssm") else "queue_unavailable", wire)
    for operation in OPERATIONS
    for wire in (
        (operation, b'{"__type": "AccessDeniedException"}', 400),
        # Text that may be in an answer and that botocore's errors quote.
        (operation, b'["SECRET-token", "SECRET-content"', 200),
        (operation, b'["SECRET-token", "SECRET-content", "\xff"', 200),
        (operation, b'"SECRET-token"', 200),
        (operation, b'{"Parameters": "SECRET-token", "Attributes": "SECRET-content"}', 200),
        (operation, b'{"Attributes": {"MaximumMessageSize": "SECRET-content"}}', 200),
    )
]
SECRET_REQUESTS: list[tuple[str | None, bytes, dict[str, Any]]] = [
    (None, secret(), {}),
    ("request_too_large", secret({**SECRET_DATA, "more": "x" * 9000}), {}),
    ("unsupported_media_type", secret(), {"content_type": "text/plain"}),
    ("invalid_json", secret()[:-1], {}),
    ("invalid_json", secret() + b"x", {}),
    ("invalid_json", secret().replace(b"content", b"content\xff"), {}),
    ("token_required", secret(token=None), {}),
    ("invalid_token", secret(token="SECRET-guess"), {}),
    ("invalid_token", secret(token=["SECRET-guess"]), {}),
    ("invalid_data", secret("SECRET-content"), {}),
    ("invalid_data", secret({**SECRET_DATA, "email_sender": ["SECRET-sender"]}), {}),
    ("invalid_data", secret({**SECRET_DATA, "email_sender": None}), {}),
    ("invalid_timestamp", secret({**SECRET_DATA, "email_timestream": "SECRET-content"}), {}),
    ("message_too_large", secret({**SECRET_DATA, "more": "x" * 3000}), {}),
    *((code, secret(), {"wire": wire}) for code, wire in WIRES),
]


@pytest.mark.parametrize(
    ("code", "body", "how"), SECRET_REQUESTS, ids=[str(code) for code, _, _ in SECRET_REQUESTS]
)
@pytest.mark.parametrize("level", ["INFO", "DEBUG"])
def test_no_log_line_holds_token_subject_sender_or_content(
    aws: SimpleNamespace,
    capsys: pytest.CaptureFixture[str],
    level: str,
    code: str | None,
    body: bytes,
    how: dict[str, Any],
) -> None:
    service = Service(aws, maximum=2048)
    service.put_token("SECRET-token")
    config = settings(
        sqs_queue_url=service.queue_url,
        token_ssm_parameter=(service.parameter,),
        max_request_bytes=8000,
        log_level=level,
    )
    client = client_of(config, aws.ssm, aws.sqs)
    with logging_as_in_production(level), ExitStack() as stack:
        if "wire" in how:
            operation, answer, status = how["wire"]
            name, _, call = operation.partition(".")
            stack.enter_context(wire_answer(getattr(aws, name), call, answer, status))
        response = post(client, body, content_type=how.get("content_type", "application/json"))
    if code:
        assert_refused(response, code)
    else:
        assert response.status_code == 200
    captured = capsys.readouterr()
    assert '"path": "/process"' in captured.out
    logged = captured.out + captured.err
    for hidden in SECRETS:
        assert hidden not in logged
        assert hidden not in response.get_data(as_text=True)


def test_log_level_debug_is_for_the_application_alone() -> None:
    with logging_as_in_production("DEBUG"):
        assert logging.getLogger("email_processor").isEnabledFor(logging.DEBUG)
        for name in ("", "botocore", "botocore.parsers", "urllib3", "gunicorn.error"):
            assert not logging.getLogger(name).isEnabledFor(logging.DEBUG)


@pytest.mark.parametrize("error", [None, "invalid_token"])
def test_record_answer_counts_once(client: FlaskClient, error: str | None) -> None:
    def count() -> float:
        outcome = error or "success"
        return counted(client, "email_processor_requests_total", outcome=outcome)

    reading = 0 if error else 1  # each reading of the metrics is itself a success
    before = count()
    app.record_answer("/process", 200, request_id="r-1", error=error)
    assert count() == before + 1 + reading


@contextmanager
def log_into_a_pipe(monkeypatch: pytest.MonkeyPatch, lines: int = 3) -> Iterator[tuple[Any, Any]]:
    """A log whose standard output is a pipe with room for a few lines; and the pipe's other end."""
    reader, writer = os.pipe()
    with open(reader, "rb", 0) as reading, open(writer, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        handler = app.LogHandler(lines)
        yield handler, reading


def record(message: str) -> logging.LogRecord:
    return logging.makeLogRecord({"msg": message})


LONG = "x" * 4000


def fill(handler: app.LogHandler) -> int:
    """Log until a line is dropped; how many were not."""
    before, number = app.LOG_LINES_DROPPED.collect(), 0
    while app.LOG_LINES_DROPPED.collect() == before:
        handler.handle(record(LONG))
        number += 1
    return number - 1


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX, which forks")
def test_log_before_the_fork_drops_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    with log_into_a_pipe(monkeypatch) as (handler, reading):
        written = fill(handler)
        handler.handle(record(LONG))
        output = b""
        while output.count(b"\n") < written:
            output += reading.read(65_536)
        assert output == (LONG + "\n").encode() * written
        handler.setFormatter(logging.Formatter("%(levelname)s %(message)s %(lines)s"))
        handler.handle(logging.makeLogRecord({"msg": "next", "levelname": "INFO", "lines": 0}))
        assert reading.read(65_536) == b"INFO next 0\nWARNING log lines dropped 2\n"


def test_log_in_a_thread_drops_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    with log_into_a_pipe(monkeypatch) as (handler, reading):
        handler.start()
        written, output = fill(handler), b""
        while output.count(b"\n") < written + 1:
            output += reading.read(65_536)
        assert output.count(f"{LONG}\n".encode()) == written
        assert output.count(b"log lines dropped\n") == 1


def test_log_in_a_thread_is_written_by_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    with log_into_a_pipe(monkeypatch) as (handler, reading):
        handler.start()
        for text in ("one", "two", "three"):
            handler.handle(record(text))
        handler.flush()
        assert reading.read(65_536) == b"one\ntwo\nthree\n"


@pytest.mark.parametrize("closed", ["by its reader", "before the start"])
def test_log_that_is_closed_is_dropped_in_silence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], closed: str
) -> None:
    with log_into_a_pipe(monkeypatch) as (handler, reading):
        if closed == "before the start":
            monkeypatch.setattr(sys, "stdout", None)
            handler = app.LogHandler()
        reading.close()
        assert fill(handler) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("both", [True, False])
def test_local_server_listens_on_the_families_that_there_are(
    monkeypatch: pytest.MonkeyPatch, both: bool
) -> None:
    if both and not socket.has_dualstack_ipv6():
        pytest.skip("needs IPv6")
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: both)
    with app.listen(0) as sock:
        assert sock.family == (socket.AF_INET6 if both else socket.AF_INET)
        with socket.create_connection(("127.0.0.1", sock.getsockname()[1]), 15):
            pass
