"""Spans, as a real OTLP/HTTP receiver gets them."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest
from client import BODY, Client, post
from fake_aws import PARAMETER, TOKEN, FakeAws
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from service import (
    PROJECT,
    ServiceProcess,
    StartService,
    clean_environment,
    eventually,
    free_port,
    is_listening,
)
from test_documentation import section

import app

QUEUE_URL = "https://sqs.us-west-1.amazonaws.com/123456789012/dev-CP-queue"
SERVER, PRODUCER = 2, 4  # kinds
ERROR = 2  # status
TRACE, ROOT = "6789123300000000000000000000ffff", "1-67891233-00000000000000000000ffff"
CALLER = "53995c3f42cd8ad8"
HEADER = f"Root={ROOT};Parent={CALLER};Sampled=1"


# --- The receiver ---------------------------------------------------------------------------------


@dataclass
class Span:
    name: str
    kind: int
    trace: str
    id: str
    parent: str
    status: int
    begin: int
    end: int
    attributes: dict[str, Any]
    resource: dict[str, Any]

    @property
    def x_ray_id(self) -> str:
        return f"1-{self.trace[:8]}-{self.trace[8:]}"


def values(attributes: Any) -> dict[str, Any]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in attributes}


class Receiver(ThreadingHTTPServer):
    """Keeps the spans of OTLP over HTTP. `answer` decides what the service gets for a batch."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.spans: list[Span] = []
        self.answer = accept
        self.closing = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def add(self, body: bytes) -> None:
        for batch in ExportTraceServiceRequest.FromString(body).resource_spans:
            for span in (span for scope in batch.scope_spans for span in scope.spans):
                ids = (part.hex() for part in (span.trace_id, span.span_id, span.parent_span_id))
                times = span.start_time_unix_nano, span.end_time_unix_nano
                attributes = values(span.attributes), values(batch.resource.attributes)
                found = Span(span.name, span.kind, *ids, span.status.code, *times, *attributes)
                self.spans.append(found)

    def of_kind(self, kind: int) -> list[Span]:
        return [span for span in self.spans if span.kind == kind]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Receiver

    def do_POST(self) -> None:
        assert self.path == "/v1/traces"
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with suppress(OSError):  # the service does not wait for the rest
            self.server.answer(self, body)

    def reply(self, status: int = 200, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def accept(handler: Handler, body: bytes) -> None:
    handler.server.add(body)
    handler.reply()


def hang(handler: Handler, _: bytes) -> None:
    handler.server.closing.wait()
    handler.close_connection = True


def unavailable(handler: Handler, _: bytes) -> None:
    handler.reply(503)


def not_found(handler: Handler, _: bytes) -> None:
    handler.reply(404, b"<html>")


def no_http(handler: Handler, _: bytes) -> None:
    handler.wfile.write(b"\x00\xff garbage\r\n\r\n" * 100)
    handler.close_connection = True


def odd_headers(handler: Handler, _: bytes) -> None:
    handler.wfile.write(b"HTTP/1.1 503 \xff\r\nno colon\r\nRetry-After: \xfe\r\n\r\n")
    handler.close_connection = True


def reset(handler: Handler, _: bytes) -> None:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    handler.close_connection = True


def endless_body(handler: Handler, body: bytes) -> None:
    handler.server.add(body)
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 999999999999\r\n\r\n")
    for _ in range(150):  # in the end it breaks off, for a service that reads it
        handler.wfile.write(bytes(2**16))
        handler.server.closing.wait(0.02)
    handler.close_connection = True


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.closing.set()
        server.shutdown()
        thread.join()


# --- The service in this process ------------------------------------------------------------------


class Inline(Executor):
    """Runs a task at once."""

    def submit(self, task: Any, /, *given: Any, **named: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(task(*given, **named))
        return done


class FakeSqs:
    """Takes each message, unless `failures` has an exception for the call."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.failures: list[Exception] = []

    def get_queue_attributes(self, **_: Any) -> Any:
        return {"Attributes": {"MaximumMessageSize": "2048"}}

    def send_message(self, **entry: Any) -> Any:
        if self.failures:
            raise self.failures.pop(0)
        self.sent.append(entry)
        return {"MessageId": f"message {len(self.sent)}"}

    @property
    def trace_header(self) -> str:
        attributes = self.sent[-1]["MessageSystemAttributes"]
        return str(attributes["AWSTraceHeader"]["StringValue"])


def ssm_of(*tokens: str) -> Any:
    parameters = [{"Name": PARAMETER, "Value": token} for token in tokens]
    missing = [] if tokens else [PARAMETER]
    given = {"Parameters": parameters, "InvalidParameters": missing}
    return SimpleNamespace(get_parameters=lambda **_: given)


@dataclass
class Traced:
    """An application in this process whose spans go to the receiver."""

    receiver: Receiver
    records: list[logging.LogRecord]
    sqs: FakeSqs = field(default_factory=FakeSqs)
    app: app.Service = field(init=False)

    def start(self, ssm: Any = None, queue_url: str = QUEUE_URL) -> Traced:
        settings = app.Settings(sqs_queue_url=queue_url)
        ssm = ssm or ssm_of(TOKEN)
        self.app = app.create_app(settings, ssm, self.sqs, Inline(), pause=lambda _: None)
        self.app.tracing.start()
        return self

    def post(self, body: bytes = BODY, header: str = "", **environ: Any) -> Any:
        environ |= {"HTTP_X_AMZN_TRACE_ID": header} if header else {}
        return self.app.test_client().post(
            "/process",
            data=body,
            content_type=environ.pop("type", "application/json"),
            environ_overrides=environ,
        )

    def spans(self) -> list[Span]:
        """Those of the requests so far, the server's before the producer's."""
        self.app.tracing.provider.force_flush()
        return sorted(self.receiver.spans, key=lambda span: (span.begin, span.kind))

    def lines(self, *, begin: str = "") -> list[logging.LogRecord]:
        return [line for line in self.records if line.getMessage().startswith(begin)]


@pytest.fixture
def traced(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> Iterator[Traced]:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_on")
    levels = {name: logging.getLogger(name).level for name in ("opentelemetry", "urllib3")}
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    handler.addFilter(app.add_request)
    root, level = logging.getLogger(), logging.getLogger().level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    traced = Traced(receiver, records)
    yield traced
    receiver.closing.set()
    traced.app.tracing.stop()
    root.removeHandler(handler)
    root.setLevel(level)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


# --- One request ----------------------------------------------------------------------------------


def test_request_and_message_are_spans_with_the_conventions_attributes(traced: Traced) -> None:
    traced.start()
    headers = {
        "HTTP_HOST": "mail.example.com",
        "HTTP_X_FORWARDED_PROTO": "https",
        "HTTP_X_FORWARDED_FOR": "6.6.6.6, 192.0.2.7",
        "HTTP_X_REQUEST_ID": "r1",
        "HTTP_USER_AGENT": "client/1",
    }
    assert traced.post(header=HEADER, **headers).status_code == 200
    server, producer = traced.spans()
    assert (server.name, server.kind, server.trace, server.parent, server.status) == (
        *("POST /process", SERVER, TRACE, CALLER, 0),
    )
    assert server.attributes == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "http.route": "/process",
        "url.path": "/process",
        "url.scheme": "https",
        "server.address": "mail.example.com",
        "server.port": 443,
        "client.address": "192.0.2.7",
        "user_agent.original": "client/1",
        "email_processor.outcome": "success",
        "email_processor.request_id": "r1",
    }
    assert (producer.name, producer.kind, producer.trace, producer.parent, producer.status) == (
        *("send dev-CP-queue", PRODUCER, TRACE, server.id, 0),
    )
    assert producer.attributes == {
        "messaging.system": "aws_sqs",
        "messaging.operation.name": "send",
        "messaging.operation.type": "send",
        "messaging.destination.name": "dev-CP-queue",
        "messaging.message.id": "message 1",
        "server.address": "sqs.us-west-1.amazonaws.com",
        "server.port": 443,
        "rpc.system": "aws-api",
        "rpc.service": "SQS",
        "rpc.method": "SendMessage",
        "aws.sqs.queue.url": QUEUE_URL,
        "email_processor.attempts": 1,
    }
    assert server.begin <= producer.begin <= producer.end <= server.end
    assert traced.sqs.trace_header == f"Root={ROOT};Parent={producer.id};Sampled=1"
    (line,) = traced.lines(begin="request")
    assert line.trace_id == ROOT  # type: ignore[attr-defined]


def test_resource_names_service_version_and_instance(
    traced: Traced, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test,service.name=x"
    )
    traced.start().post()
    resource = traced.spans()[0].resource
    assert resource["service.version"] == app.VERSION
    assert resource["vcs.ref.head.revision"] == app.COMMIT
    assert resource["service.instance.id"]
    assert resource["deployment.environment.name"] == "test"
    assert resource["service.name"] == "x", "OpenTelemetry's variables take precedence"


@pytest.mark.parametrize(
    ("header", "trace", "parent"),
    [
        ("", None, ""),
        (f"Root={ROOT}", TRACE, ""),
        (f"Self=1-67891234-12456789abcdef0123456789;Root={ROOT}", TRACE, ""),
        (f"Root={ROOT};Parent={CALLER};Sampled=0", TRACE, CALLER),
        (f"Root={ROOT};Parent={'0' * 16};Sampled=1", TRACE, ""),
        (f"Root=1-00000000-{'0' * 24};Parent={CALLER}", None, ""),
        ("Root=1-xyz", None, ""),
        ("\x00\xff", None, ""),
    ],
)
def test_ids_come_from_the_header(
    traced: Traced, header: str, trace: str | None, parent: str
) -> None:
    traced.start()
    before = int(time.time())
    assert traced.post(header=header).status_code == 200
    server, producer = traced.spans()
    assert server.parent == parent
    assert server.trace == producer.trace
    if trace:
        assert server.trace == trace
    else:  # X-Ray's ids begin with the time
        assert before <= int(server.trace[:8], 16) <= time.time()
    assert traced.sqs.trace_header == f"Root={server.x_ray_id};Parent={producer.id};Sampled=1"
    assert traced.lines(begin="request")[0].trace_id == server.x_ray_id  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("sampler", "header", "forwarded"),
    [
        # The message of a request that is not sampled names the caller's span, if there is one.
        ("always_off", HEADER, f"Root={ROOT};Parent={CALLER};Sampled=0"),
        ("always_off", f"Root={ROOT}", f"Root={ROOT};Sampled=0"),
        ("traceidratio 0", HEADER, f"Root={ROOT};Parent={CALLER};Sampled=0"),
        ("traceidratio 1", f"Root={ROOT}", None),
        # By the end of the trace id, whatever the client says.
        ("traceidratio 0.05", f"Root={ROOT}", None),
        ("traceidratio 0.05", f"Root={ROOT};Sampled=0", None),
        ("traceidratio 0.05", f"Root=1-67891233-{'f' * 24};Parent={CALLER};Sampled=1", "0"),
        ("parentbased_always_on", HEADER.replace("Sampled=1", "Sampled=0"), "0"),
        ("parentbased_always_off", HEADER, None),
    ],
)
def test_sampler_decides(
    traced: Traced, monkeypatch: pytest.MonkeyPatch, sampler: str, header: str, forwarded: str
) -> None:
    name, _, ratio = sampler.partition(" ")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", name)
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", ratio)
    traced.start()
    assert traced.post(header=header).status_code == 200
    spans = traced.spans()
    assert len(spans) == (0 if forwarded else 2)
    if spans:
        assert traced.sqs.trace_header.endswith(f"Parent={spans[1].id};Sampled=1")
    elif forwarded == "0":
        assert traced.sqs.trace_header.endswith(f"Parent={CALLER};Sampled=0")
    else:
        assert traced.sqs.trace_header == forwarded
    expected = re.findall(r"1-\w{8}-\w{24}", header)
    assert [line.trace_id for line in traced.lines(begin="request")] == expected  # type: ignore[attr-defined]


def test_request_that_is_not_sampled_has_a_trace_id_in_log_and_message(
    traced: Traced, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    traced.start().post()
    (line,) = traced.lines(begin="request")
    assert traced.sqs.trace_header == f"Root={line.trace_id};Sampled=0"  # type: ignore[attr-defined]


def test_other_routes_have_no_spans(traced: Traced) -> None:
    client = traced.start().app.test_client()
    for path in ("/health", "/ready", "/metrics", "/", "/process", "/nowhere"):
        client.get(path)
    client.post("/nowhere")
    assert traced.spans() == []


# --- Errors ---------------------------------------------------------------------------------------

SECRETS = {
    **{name: f"secret {name}" for name in ("email_subject", "email_sender", "email_content")},
    "email_timestream": "1693561101",
}


def body(token: Any = TOKEN, **data: Any) -> bytes:
    return json.dumps({"data": {**SECRETS, **data}, "token": token}).encode()


@pytest.mark.parametrize(
    ("error", "given"),
    [
        ("request_too_large", {"CONTENT_LENGTH": str(2**22)}),
        ("request_timeout", {"worker.error": app.ApiError("request_timeout")}),
        ("overloaded", {"worker.error": app.ApiError("overloaded")}),
        ("unsupported_media_type", {"type": "text/plain"}),
        ("invalid_json", {"body": body()[:-1]}),
        ("token_required", {"body": body(token=None)}),
        ("invalid_token", {"body": body(token="secret of another")}),
        ("token_store_unavailable", {"tokens": ()}),
        ("invalid_data", {"body": body(email_sender=None)}),
        ("invalid_timestamp", {"body": body(email_timestream="secret time")}),
        ("message_too_large", {"body": body(more="secret" * 1000)}),
        ("queue_unavailable", {"failures": [ConnectionError("secret")] * 3}),
        ("internal_error", {"failures": None}),
    ],
)
def test_each_error_has_a_span_without_secrets(
    traced: Traced, error: str, given: dict[str, Any]
) -> None:
    given = dict(given)
    traced.start(ssm_of(*given.pop("tokens", (TOKEN,))))
    failures = given.pop("failures", ())
    if failures is None:
        traced.app.publisher.publish = None  # type: ignore[assignment,method-assign]
    else:
        traced.sqs.failures += failures
    response = traced.post(given.pop("body", body()), header=HEADER, **given)
    assert response.get_json()["error"] == error
    server, *producers = traced.spans()
    status = app.ERRORS[error][0]
    assert response.status_code == server.attributes["http.response.status_code"] == status
    assert server.attributes["email_processor.outcome"] == error
    assert (server.trace, server.parent) == (TRACE, CALLER)
    # By the conventions, a 4xx is no error of the server.
    assert server.status == (ERROR if status >= 500 else 0)
    assert server.attributes.get("error.type") == (error if status >= 500 else None)
    is_sent = error in ("message_too_large", "queue_unavailable", "internal_error")
    assert len(producers) == is_sent
    for producer in producers:
        assert producer.parent == server.id
        assert (producer.status, producer.attributes["error.type"]) == (ERROR, error)
        assert "messaging.message.id" not in producer.attributes
        attempts = {"queue_unavailable": 3, "message_too_large": 0, "internal_error": None}
        assert producer.attributes.get("email_processor.attempts") == attempts[error]
    assert "secret" not in repr(traced.spans())
    assert TOKEN not in repr(traced.spans())


def test_every_error_of_the_route_is_tested() -> None:
    (mark,) = test_each_error_has_a_span_without_secrets.pytestmark  # type: ignore[attr-defined]
    elsewhere = {"not_found", "method_not_allowed"}  # have no span: they are other routes
    assert {error for error, _ in mark.args[1]} == set(app.ERRORS) - elsewhere


def test_successful_request_has_no_secrets_in_its_spans(traced: Traced) -> None:
    traced.start()
    path = {"QUERY_STRING": f"token={TOKEN}&secret"}
    assert traced.post(body(), HTTP_AUTHORIZATION="secret", **path).status_code == 200
    found = repr(traced.spans())
    assert found.count("POST /process") == 1
    assert "secret" not in found
    assert TOKEN not in found


def test_retries_are_counted_in_one_span(traced: Traced) -> None:
    traced.start().sqs.failures += [ConnectionError()] * 2
    assert traced.post().status_code == 200
    _, producer = traced.spans()
    assert producer.attributes["email_processor.attempts"] == 3
    assert producer.status == 0


def test_odd_values_from_outside_are_shortened_and_cost_no_other_span(traced: Traced) -> None:
    traced.start()
    answer = {"MessageId": "\ud800" + "x" * 5000}
    traced.sqs.send_message = lambda **_: answer  # type: ignore[method-assign]
    headers = ("HTTP_HOST", "HTTP_USER_AGENT", "HTTP_X_FORWARDED_FOR", "HTTP_X_FORWARDED_PROTO")
    for value in ("\xff" * 9000, "[::1", ":", "a:99999999", ""):
        assert traced.post(**dict.fromkeys(headers, value)).status_code == 200
    spans = traced.spans()
    assert len(spans) == 10
    assert max(len(str(value)) for span in spans for value in span.attributes.values()) <= 256
    assert {span.attributes.get("url.scheme") for span in spans} == {"http", None}


# --- Failures of tracing --------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["begin", "publish", "end"])
def test_exception_inside_tracing_is_logged_once_and_fails_no_request(
    traced: Traced, step: str
) -> None:
    tracer, error = traced.start().app.tracing.tracer, RuntimeError("a defect")

    def start_span(name: str, *given: Any) -> Any:
        if name == {"begin": "POST /process", "publish": "send dev-CP-queue"}.get(step):
            raise error
        span = tracer.start_span(name, *given)
        if step == "end":
            span.end = SimpleNamespace
            span.set_attributes = None
        return span

    traced.app.tracing.tracer = SimpleNamespace(start_span=start_span)
    for _ in range(3):
        assert traced.post(header=HEADER).status_code == 200
        assert traced.sqs.trace_header.startswith(f"Root={ROOT}")
    (line,) = [line for line in traced.lines() if line.exc_info]
    assert line.getMessage() == "tracing failed; further failures are not logged"
    assert len(traced.lines(begin="request")) == 3


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "9999"),  # found by start()
        ("OTEL_PYTHON_EXPORTER_OTLP_HTTP_CREDENTIAL_PROVIDER", "none"),  # ignored
        ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "x"),
        ("OTEL_TRACES_SAMPLER", "five percent"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "="),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "localhost:4318"),
        ("OTEL_EXPORTER_OTLP_CERTIFICATE", "/nowhere"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "soon"),
    ],
)
def test_malformed_variable_of_opentelemetry_fails_no_request(
    traced: Traced, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    traced.start()
    for _ in range(2):
        assert traced.post().status_code == 200
    assert len([line for line in traced.lines() if line.exc_info]) <= 1


def test_tracing_that_cannot_be_made_fails_no_request(traced: Traced) -> None:
    traced.start(queue_url="http://sqs:99999/queue")  # no port
    assert traced.post(header=HEADER).status_code == 200
    assert traced.sqs.trace_header == HEADER
    assert len([line for line in traced.lines() if line.exc_info]) == 1


FAULTS: dict[str, Callable[[Handler, bytes], None]] = {
    "hangs": hang,
    "answers 503": unavailable,
    "answers 404": not_found,
    "speaks no HTTP": no_http,
    "sends odd headers": odd_headers,
    "resets": reset,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_lost_spans_are_logged_once_until_the_collector_takes_them_again(
    traced: Traced, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.2")
    traced.start().receiver.answer = FAULTS[fault]
    for _ in range(2):
        assert traced.post().status_code == 200
        assert traced.spans() == []
    traced.receiver.answer = accept

    def arrives() -> bool:  # on a busy machine perhaps not the first
        return traced.post().status_code == 200 and bool(traced.spans())

    eventually(arrives)
    # The executors of earlier tests may still log failed reads.
    lines = [line for line in traced.lines() if line.module == "tracing"]
    warnings = [line for line in lines if line.levelno >= logging.WARNING]
    messages = [line.getMessage() for line in warnings]
    assert messages == ["spans are lost", "the collector takes spans again"]
    assert warnings[0].cause  # type: ignore[attr-defined]
    assert warnings[1].cause == "200 OK"  # type: ignore[attr-defined]


def test_collector_that_is_down_is_logged_once(
    traced: Traced, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.2")
    traced.start()
    for _ in range(2):
        assert traced.post().status_code == 200
        traced.spans()
    lines = [line for line in traced.lines() if line.module == "tracing"]
    (warning,) = [line for line in lines if line.levelno >= logging.WARNING]
    assert "refused" in warning.cause  # type: ignore[attr-defined]


def test_endless_response_of_the_collector_is_not_read(traced: Traced) -> None:
    traced.start().receiver.answer = endless_body
    assert traced.post().status_code == 200
    assert len(traced.spans()) == 2
    assert traced.lines(begin="spans are lost") == []


def test_stop_waits_a_second_for_a_collector_that_hangs(
    traced: Traced, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "60")
    traced.start().receiver.answer = hang
    traced.post()
    begin = time.monotonic()
    traced.app.tracing.stop()
    assert time.monotonic() - begin < 15, "OpenTelemetry alone waits for 30 s"
    traced.receiver.answer = accept  # so that the thread ends, too
    traced.receiver.closing.set()
    eventually(lambda: traced.receiver.spans)


def test_tracing_that_was_never_started_changes_nothing(traced: Traced) -> None:
    traced.start().app.tracing.tracer = None
    assert traced.post(header=HEADER).status_code == 200
    assert traced.sqs.trace_header == HEADER
    traced.app.tracing.stop()


def test_opentelemetry_is_loaded_only_when_its_variables_turn_tracing_on() -> None:
    """In a new process: this one has loaded the module."""
    endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}
    off = [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": " "},
        {"OTEL_SERVICE_NAME": "email-processor", "OTEL_TRACES_SAMPLER": "always_on"},
        {**endpoint, "OTEL_SDK_DISABLED": "TRUE"},
        {**endpoint, "OTEL_TRACES_EXPORTER": "none"},
    ]
    on = [endpoint, {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:9/v1/traces"}]
    program = (
        "import app, json, os, sys\n"
        "for variables in json.loads(sys.argv[1]):\n"
        "    os.environ.update(variables)\n"
        "    made = app.create_app().tracing is not None\n"
        "    names = {name.partition('.')[0] for name in sys.modules}\n"
        "    loaded = sorted(names & {'opentelemetry', 'requests', 'google', 'tracing'})\n"
        "    print(made, *loaded)\n"
        "    for name in variables: del os.environ[name]\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(off + on)],
        cwd=PROJECT,
        env=clean_environment(SQS_QUEUE_URL=QUEUE_URL),
        capture_output=True,
        text=True,
        check=True,
    )
    *lines_off, one, two = done.stdout.splitlines()
    assert lines_off == ["False"] * len(off)
    assert one == two == "True google opentelemetry requests tracing"


# --- The service under Gunicorn -------------------------------------------------------------------


def trace_id(number: int) -> str:
    return f"1-67891233-{number:024x}"


def send_in_parallel(service: ServiceProcess, numbers: range) -> list[int]:
    """POST once for each number, each with a new trace; the statuses."""

    def send(number: int) -> int:
        header = f"X-Amzn-Trace-Id: Root={trace_id(number)}"
        return service.request(post(BODY, header, f"X-Request-Id: r{number}")).status

    with ThreadPoolExecutor(len(numbers)) as pool:
        return list(pool.map(send, numbers))


def check_chains(receiver: Receiver, fake_aws: FakeAws, numbers: range) -> None:
    """From the header through both spans to the message that the consumer gets."""
    servers = {span.x_ray_id: span for span in receiver.of_kind(SERVER)}
    producers = {span.x_ray_id: span for span in receiver.of_kind(PRODUCER)}
    messages = {message["attributes"]["RequestId"]: message for message in fake_aws.messages()}
    assert len(receiver.spans) == 2 * len(numbers)
    for number in numbers:
        server, producer = servers[trace_id(number)], producers[trace_id(number)]
        message = messages[f"r{number}"]
        assert server.parent == ""
        assert producer.parent == server.id
        header = f"Root={trace_id(number)};Parent={producer.id};Sampled=1"
        assert message["trace_header"] == header
        assert producer.attributes["messaging.message.id"] == message["message_id"]
        count = producer.attributes.get("messaging.batch.message_count", 1)
        assert count == message["batch_size"]
        is_batch = message["batch_size"] > 1
        method = "SendMessageBatch" if is_batch else "SendMessage"
        assert producer.attributes["rpc.method"] == method


# Nothing is sent by the clock: what arrives was sent at the exit.
AT_EXIT = {"OTEL_BSP_SCHEDULE_DELAY": "3600000", "OTEL_TRACES_SAMPLER": "always_on"}


def test_four_workers_are_four_instances_and_send_all_spans_at_sigterm(
    start_service: StartService, fake_aws: FakeAws, receiver: Receiver
) -> None:
    variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url, **AT_EXIT}
    numbers = range(1, 81)  # that a worker gets none of so many connections comes once in 10**10
    with start_service(**fake_aws.variables(), **variables) as service:
        assert set(send_in_parallel(service, numbers)) == {200}
        assert receiver.spans == []
        service.stop()
        lines = {line.get("request_id"): line for line in service.log()}
    check_chains(receiver, fake_aws, numbers)
    instances = {span.resource["service.instance.id"] for span in receiver.spans}
    assert len(instances) == 4
    assert all(lines[f"r{number}"]["trace_id"] == trace_id(number) for number in numbers)


def test_messages_of_a_batch_have_a_span_each(
    start_service: StartService, fake_aws: FakeAws, receiver: Receiver
) -> None:
    variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url, "GUNICORN_WORKERS": "1", **AT_EXIT}
    numbers = range(1, 33)
    half = {"SendMessageBatch": {"kind": "fail_entries", "share": 0.3}}
    fake_aws.set(latency_ms=300, faults=half)  # the requests arrive during the first call
    with start_service(**fake_aws.variables(), **variables) as service:
        assert set(send_in_parallel(service, numbers)) <= {200, 503}
        service.stop()
    producers = receiver.of_kind(PRODUCER)
    assert max(s.attributes.get("messaging.batch.message_count", 0) for s in producers) == 10
    assert max(s.attributes["email_processor.attempts"] for s in producers) > 1
    taken = {message["message_id"]: message["batch_size"] for message in fake_aws.messages()}
    sent = {
        s.attributes["messaging.message.id"]: s.attributes.get("messaging.batch.message_count", 1)
        for s in producers
        if not s.status
    }
    assert sent == taken


@pytest.mark.slow
@pytest.mark.parametrize("fault", [*FAULTS, "is down", "sends an endless body"])
def test_collector_that_fails_costs_no_request(
    start_service: StartService, fake_aws: FakeAws, receiver: Receiver, fault: str
) -> None:
    receiver.answer = {**FAULTS, "sends an endless body": endless_body}.get(fault, accept)
    url = f"http://127.0.0.1:{free_port()}" if fault == "is down" else receiver.url
    variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_BSP_SCHEDULE_DELAY": "50"}
    variables |= {"OTEL_EXPORTER_OTLP_TIMEOUT": "1", "OTEL_TRACES_SAMPLER": "always_on"}
    with start_service(**fake_aws.variables(), **variables) as service:
        for start in range(0, 200, 20):
            assert send_in_parallel(service, range(start, start + 20)) == [200] * 20
        if fault != "sends an endless body":
            eventually(lambda: "spans are lost" in service.output())
        service.stop()
        lines, workers = service.log(), 4
    assert len(fake_aws.messages()) == 200
    assert sum(line["message"] == "request" for line in lines) == 200
    assert sum(line["message"] == "spans are lost" for line in lines) <= workers
    assert not [line for line in lines if "exc_info" in line]
    assert service.errors() == ""


@pytest.mark.slow
def test_local_server_beside_the_embedded_aws_sends_spans_at_sigterm(receiver: Receiver) -> None:
    port = free_port()
    variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url, "PORT": str(port), **AT_EXIT}
    process = subprocess.Popen(
        [sys.executable, "app.py"],
        cwd=PROJECT,
        env=clean_environment(**variables),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout
        while "--aws-sigv4" not in (line := process.stdout.readline()):
            endpoint = line
        with Client(port) as client:
            assert client.send(post()).response().status == 200
        received = receive_from(endpoint)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    (producer,) = receiver.of_kind(PRODUCER)
    assert received == f"Root={producer.x_ray_id};Parent={producer.id};Sampled=1"


def receive_from(line: str) -> str:
    """The AWSTraceHeader of the message in the queue of an embedded AWS."""
    import boto3

    (endpoint,) = re.findall(r"http://\S+", line)
    sqs = boto3.client(
        "sqs", "us-west-1", endpoint_url=endpoint, aws_access_key_id="-", aws_secret_access_key="-"
    )
    try:
        (message,) = sqs.receive_message(
            QueueUrl=sqs.get_queue_url(QueueName="dev-CP-queue")["QueueUrl"],
            MessageSystemAttributeNames=["AWSTraceHeader"],
        )["Messages"]
    finally:
        sqs.close()
    return str(message["Attributes"]["AWSTraceHeader"])


@pytest.mark.slow
def test_flasks_server_sends_spans_at_sigterm(fake_aws: FakeAws, receiver: Receiver) -> None:
    port = free_port()
    variables = {**fake_aws.variables(), "PORT": str(port), **AT_EXIT}
    program = "import app; app.find_spec = lambda _: None; app.main()"  # as without POSIX
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=PROJECT,
        env=clean_environment(
            **variables, OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=f"{receiver.url}/v1/traces"
        ),
        stdout=subprocess.DEVNULL,
    )
    try:
        eventually(lambda: is_listening(port))
        with Client(port) as client:
            assert client.send(post()).response().status == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
    assert [span.name for span in receiver.of_kind(SERVER)] == ["POST /process"]


# --- Documentation --------------------------------------------------------------------------------


def test_every_documented_command_names_a_sampler() -> None:
    """Without one, every request is sampled, and clients decide."""
    commands = re.findall(r"^kubectl .*?(?<!\\)$", section("Traces"), re.M | re.DOTALL)
    on = [command for command in commands if "OTEL_EXPORTER_OTLP_ENDPOINT=" in command]
    assert len(on) == 2
    for command in on:
        assert "OTEL_TRACES_SAMPLER=traceidratio" in command
        assert "OTEL_TRACES_SAMPLER_ARG=0.05" in command
