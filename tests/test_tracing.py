"""Spans, as a real OTLP/HTTP receiver gets them."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
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

import app

QUEUE_URL = "https://sqs.us-west-1.amazonaws.com/123456789012/dev-CP-queue"
SERVER, PRODUCER = 2, 4  # kinds
ERROR = 2  # status
TRACE, ROOT = "6789123300000000000000000000ffff", "1-67891233-00000000000000000000ffff"
CALLER = "53995c3f42cd8ad8"
HEADER = f"Root={ROOT};Parent={CALLER};Sampled=1"


# --- The receiver ---------------------------------------------------------------------------------


def values(attributes: Any) -> dict[str, Any]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in attributes}


class Span:
    def __init__(self, span: Any, resource: Any) -> None:
        ids = span.trace_id, span.span_id, span.parent_span_id
        self.trace, self.id, self.parent = (part.hex() for part in ids)
        self.x_ray_id = f"1-{self.trace[:8]}-{self.trace[8:]}"
        self.name, self.kind, self.status = span.name, span.kind, span.status.code
        self.begin, self.end = span.start_time_unix_nano, span.end_time_unix_nano
        self.attributes, self.resource = values(span.attributes), values(resource.attributes)


class Receiver(ThreadingHTTPServer):
    """A collector: keeps the spans. `respond` decides the response to a batch."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.spans: list[Span] = []
        self.received = b""
        self.respond: Respond = accept
        self.closing = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def add(self, body: bytes) -> None:
        self.received += body
        for batch in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in batch.scope_spans:
                self.spans += [Span(span, batch.resource) for span in scope.spans]

    def of_kind(self, kind: int) -> list[Span]:
        return [span for span in self.spans if span.kind == kind]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Receiver

    def do_POST(self) -> None:
        assert self.path == "/v1/traces"
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with suppress(OSError):  # the service does not wait for the rest
            self.server.respond(self, body)

    def reply(self, status: int = 200, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


Respond = Callable[[Handler, bytes], None]


def accept(handler: Handler, body: bytes) -> None:
    handler.server.add(body)
    handler.reply()


def hang(handler: Handler, _: bytes) -> None:
    handler.server.closing.wait()
    handler.close_connection = True


def unavailable(handler: Handler, _: bytes) -> None:
    handler.reply(503)


def endless_body(handler: Handler, body: bytes) -> None:
    handler.server.add(body)
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 999999999999\r\n\r\n")
    for _ in range(150):  # ends at last, for a service that reads it
        handler.wfile.write(bytes(2**16))
        handler.server.closing.wait(0.02)
    handler.close_connection = True


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """A collector that takes OTLP over HTTP, and keeps the spans."""
    with Receiver() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.closing.set()
        server.shutdown()
        thread.join()


# --- The service in this process ------------------------------------------------------------------


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


class Traced:
    """An application in this process whose spans go to the receiver."""

    def __init__(self, receiver: Receiver, caplog: pytest.LogCaptureFixture) -> None:
        self.receiver, self.caplog, self.sqs = receiver, caplog, FakeSqs()

    def create(self, queue_url: str = QUEUE_URL) -> Traced:
        """Create the application, as before the fork."""
        parameters = {"Parameters": [{"Name": PARAMETER, "Value": TOKEN}]}
        ssm = SimpleNamespace(get_parameters=lambda **_: parameters)
        settings = app.Settings(sqs_queue_url=queue_url)
        self.app = app.create_app(settings, ssm, self.sqs, pause=lambda _: None)
        return self

    def start(self, queue_url: str = QUEUE_URL) -> Traced:
        self.create(queue_url).app.tracing.start()
        return self

    def post(self, body: bytes = BODY, header: str = "", **environ: Any) -> Any:
        environ |= {"HTTP_X_AMZN_TRACE_ID": header} if header else {}
        return self.app.test_client().post(
            "/process", data=body, content_type="application/json", environ_overrides=environ
        )

    def spans(self) -> list[Span]:
        """The spans of the requests so far, the server's before the producer's."""
        self.app.tracing.provider.force_flush()
        return sorted(self.receiver.spans, key=lambda span: (span.begin, span.kind))

    def lines(self, message: str) -> list[Any]:
        return [record for record in self.caplog.records if record.message == message]

    def line(self, message: str) -> Any:
        (line,) = self.lines(message)
        return line

    def exceptions(self) -> list[str]:
        """The messages that have a traceback."""
        return [record.message for record in self.caplog.records if record.exc_info]


@pytest.fixture
def traced(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Iterator[Traced]:
    """The service in this process; it sends each request's spans to the receiver."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_on")
    caplog.set_level(logging.INFO)
    for name in ("opentelemetry", "urllib3"):  # so that their levels are restored after the test
        caplog.set_level(logging.INFO, name)
    traced = Traced(receiver, caplog)
    yield traced
    receiver.closing.set()
    traced.app.tracing.stop()


# --- One request ----------------------------------------------------------------------------------


def test_request_and_its_message_are_spans_by_the_conventions(traced: Traced) -> None:
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
    assert traced.line("request").trace_id == ROOT


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
    assert traced.line("tracing is on").sampler == "AlwaysOnSampler"


@pytest.mark.parametrize(
    ("header", "trace", "parent"),
    [
        ("", None, ""),
        (f"Root={ROOT}", TRACE, ""),
        (f"Root={ROOT};Parent={'0' * 16};Sampled=1", TRACE, ""),
        (f"Root=1-00000000-{'0' * 24};Parent={CALLER}", None, ""),
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
    assert traced.line("request").trace_id == server.x_ray_id


UNSAMPLED = HEADER.replace("Sampled=1", "Sampled=0")
OTHER_ROOT = f"Root=1-67891233-{'f' * 24}"


@pytest.mark.parametrize(
    ("sampler", "header", "forwarded"),
    [
        # The message of a request that is not sampled names the caller's span, if there is one.
        ("always_off", HEADER, UNSAMPLED),
        ("always_off", f"Root={ROOT}", f"Root={ROOT};Sampled=0"),
        # By the end of the trace id, whatever the client says.
        ("traceidratio 0.05", UNSAMPLED, None),
        ("traceidratio 0.05", f"{OTHER_ROOT};Sampled=1", f"{OTHER_ROOT};Sampled=0"),
        ("parentbased_always_on", UNSAMPLED, UNSAMPLED),
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
    if forwarded:
        assert traced.spans() == []
        assert traced.sqs.trace_header == forwarded
    else:
        _, producer = traced.spans()
        assert traced.sqs.trace_header == f"Root={ROOT};Parent={producer.id};Sampled=1"
    assert traced.line("request").trace_id == header[5:40]


def test_request_that_is_not_sampled_has_a_trace_id_in_log_and_message(
    traced: Traced, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    traced.start().post()
    trace_id = traced.line("request").trace_id
    assert traced.sqs.trace_header == f"Root={trace_id};Sampled=0"


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
    ("error", "given", "failures", "attempts"),
    [
        ("overloaded", {"worker.error": app.ApiError("overloaded")}, [], []),
        ("invalid_token", {"body": body(token="secret of another")}, [], []),
        ("invalid_timestamp", {"body": body(email_timestream="secret time")}, [], []),
        ("message_too_large", {"body": body(more="secret" * 1000)}, [], [0]),
        ("queue_unavailable", {"body": body()}, [ConnectionError("secret")] * 3, [3]),
    ],
)
def test_error_has_spans_without_secrets(
    traced: Traced,
    error: str,
    given: dict[str, Any],
    failures: list[Exception],
    attempts: list[int],  # of the producer span, if there is one
) -> None:
    traced.start().sqs.failures += failures
    status = app.ERRORS[error][0]
    assert traced.post(header=HEADER, **given).status_code == status
    server, *producers = traced.spans()
    assert (server.trace, server.parent) == (TRACE, CALLER)
    assert server.attributes["http.response.status_code"] == status
    assert server.attributes["email_processor.outcome"] == error
    # By the conventions, a 4xx is no error of the server.
    assert server.status == (ERROR if status >= 500 else 0)
    assert server.attributes.get("error.type") == (error if status >= 500 else None)
    assert [span.attributes["email_processor.attempts"] for span in producers] == attempts
    for producer in producers:
        assert (producer.parent, producer.status) == (server.id, ERROR)
        assert producer.attributes["error.type"] == error
        assert "messaging.message.id" not in producer.attributes
    assert b"secret" not in traced.receiver.received
    assert TOKEN.encode() not in traced.receiver.received


def test_defect_before_publication_ends_the_messages_span(traced: Traced) -> None:
    traced.start().app.publisher.publish = None  # type: ignore[assignment,method-assign]
    assert traced.post().status_code == 500
    assert [span.status for span in traced.spans()] == [ERROR, ERROR]


def test_successful_request_has_no_secrets_in_its_spans(traced: Traced) -> None:
    traced.start()
    path = {"QUERY_STRING": f"token={TOKEN}&secret"}
    assert traced.post(body(), HTTP_AUTHORIZATION="secret", **path).status_code == 200
    assert len(traced.spans()) == 2
    assert b"secret" not in traced.receiver.received
    assert TOKEN.encode() not in traced.receiver.received


def test_malformed_values_are_shortened_and_cost_no_span(traced: Traced) -> None:
    traced.start()
    response = {"MessageId": "\ud800" + "x" * 5000}
    traced.sqs.send_message = lambda **_: response  # type: ignore[method-assign]
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
    tracer = traced.start().app.tracing.tracer

    def start_span(name: str, *given: Any) -> Any:
        if name == {"begin": "POST /process", "publish": "send dev-CP-queue"}.get(step):
            raise RuntimeError
        span = tracer.start_span(name, *given)
        if step == "end":
            span.set_attributes = None
        return span

    traced.app.tracing.tracer = SimpleNamespace(start_span=start_span)
    for _ in range(3):
        assert traced.post(header=HEADER).status_code == 200
        assert traced.sqs.trace_header.startswith(f"Root={ROOT}")
    assert traced.exceptions() == ["tracing failed; further failures are not logged"]
    assert len(traced.lines("request")) == 3


@pytest.mark.parametrize(
    ("queue_url", "batch_size"),
    [("http://sqs:99999/queue", "512"), (QUEUE_URL, "9999")],
    ids=["cannot be made", "cannot start"],
)
def test_tracing_that_fails_at_the_start_fails_no_request(
    traced: Traced, monkeypatch: pytest.MonkeyPatch, queue_url: str, batch_size: str
) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", batch_size)
    traced.start(queue_url)
    assert traced.post(header=HEADER).status_code == 200
    assert traced.sqs.trace_header == HEADER
    assert len(traced.exceptions()) == 1


@pytest.mark.parametrize(
    ("fault", "cause"), [(hang, "timed out"), (unavailable, "503 Service Unavailable")]
)
def test_lost_spans_are_logged_once_until_the_collector_takes_them_again(
    traced: Traced, monkeypatch: pytest.MonkeyPatch, fault: Respond, cause: str
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.2")
    traced.start().receiver.respond = fault
    for _ in range(2):
        assert traced.post().status_code == 200
        assert traced.spans() == []
    traced.receiver.respond = accept

    def arrives() -> bool:  # on a busy machine perhaps not the first
        return traced.post().status_code == 200 and bool(traced.spans())

    eventually(arrives)
    assert arrives()
    warnings = [vars(r) for r in traced.caplog.records if r.levelno >= logging.WARNING]
    assert [line["message"] for line in warnings] == [
        "spans are lost",
        "the collector takes spans again",
    ]
    assert cause in warnings[0]["cause"]
    assert warnings[1]["cause"] == "200 OK"


def test_endless_response_of_the_collector_is_not_read(traced: Traced) -> None:
    traced.start().receiver.respond = endless_body
    assert traced.post().status_code == 200
    assert len(traced.spans()) == 2
    assert traced.lines("spans are lost") == []


def test_stop_waits_a_second_for_a_collector_that_hangs(
    traced: Traced, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "60")
    traced.start().receiver.respond = hang
    traced.post()
    begin = time.monotonic()
    traced.app.tracing.stop()
    assert time.monotonic() - begin < 15, "OpenTelemetry itself waits for 30 s"
    traced.receiver.respond = accept  # so that the thread ends, too
    traced.receiver.closing.set()
    eventually(lambda: traced.receiver.spans)


def test_tracing_that_was_never_started_changes_nothing(traced: Traced) -> None:
    assert traced.create().post(header=HEADER).status_code == 200
    assert traced.sqs.trace_header == HEADER
    traced.app.tracing.stop()
    assert traced.exceptions() == []


ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}


@pytest.mark.parametrize(
    ("variables", "is_on"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": " "}, False),
        ({**ENDPOINT, "OTEL_SDK_DISABLED": "TRUE"}, False),
        ({**ENDPOINT, "OTEL_TRACES_EXPORTER": "none"}, False),
        (ENDPOINT, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:9/v1/traces"}, True),
    ],
    ids=str,
)
def test_variables_turn_tracing_on(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], is_on: bool
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert bool(app.make_tracing(app.Settings(sqs_queue_url=QUEUE_URL))) is is_on


def test_opentelemetry_takes_no_memory_while_tracing_is_off() -> None:
    program = "import app, sys; app.create_app(); print('opentelemetry' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=PROJECT,
        env=clean_environment(SQS_QUEUE_URL=QUEUE_URL),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "False\n"


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
    assert len(receiver.spans) == 2 * len(numbers)
    assert len({span.resource["service.instance.id"] for span in receiver.spans}) == 4
    # From the header through both spans to the message that the consumer gets.
    servers = {span.x_ray_id: span for span in receiver.of_kind(SERVER)}
    producers = {span.x_ray_id: span for span in receiver.of_kind(PRODUCER)}
    headers = {m["attributes"]["RequestId"]: m["trace_header"] for m in fake_aws.messages()}
    for number in numbers:
        trace = trace_id(number)
        assert producers[trace].parent == servers[trace].id
        assert headers[f"r{number}"] == f"Root={trace};Parent={producers[trace].id};Sampled=1"
        assert lines[f"r{number}"]["trace_id"] == trace


def test_messages_of_a_batch_have_a_span_each(
    start_service: StartService, fake_aws: FakeAws, receiver: Receiver
) -> None:
    variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url, "GUNICORN_WORKERS": "1", **AT_EXIT}
    some_fail = {"SendMessageBatch": {"kind": "fail_entries", "share": 0.3}}
    fake_aws.set(latency_ms=300, faults=some_fail)  # the requests arrive during the first call
    with start_service(**fake_aws.variables(), **variables) as service:
        assert set(send_in_parallel(service, range(24))) <= {200, 503}
        service.stop()
    sent, sizes, attempts = {}, set(), set()
    for span in receiver.of_kind(PRODUCER):
        size = span.attributes.get("messaging.batch.message_count", 1)
        is_batch = span.attributes["rpc.method"] == "SendMessageBatch"
        assert is_batch == (size > 1)
        sizes.add(size)
        attempts.add(span.attributes["email_processor.attempts"])
        if span.status != ERROR:
            sent[span.attributes["messaging.message.id"]] = size
    assert sent == {message["message_id"]: message["batch_size"] for message in fake_aws.messages()}
    assert {1, 10} < sizes
    assert max(attempts) > 1


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
