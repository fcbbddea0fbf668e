"""OpenTelemetry: spans of requests and messages. app.py imports this module only if tracing is on.

A POST /process is a SERVER span. Its child is a PRODUCER span for the message, from publish() to
the outcome. The message carries the id of the PRODUCER span, which becomes the parent of the
consumer's spans. OpenTelemetry's own environment variables configure everything else.
"""

from __future__ import annotations

import functools
import logging
import math
import random
import re
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import requests
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import TraceIdRatioBased

if TYPE_CHECKING:
    import app

log = logging.getLogger("email_processor")

NO_CONTEXT = Context()
REQUEST = "POST /process"
DEFAULT_PORTS = {"http": 80, "https": 443}
_parent = re.compile("Parent=([0-9a-f]{16})(?=;|$)", re.I).search
_host = re.compile(r"(.+?)(?::([0-9]{1,5}))?").fullmatch


def short(value: Any) -> str:
    """The first 256 characters of a client's value: 2,048 spans may wait in memory."""
    return str(value)[:256]


def x_ray_id(trace_id: int) -> str:
    """A trace id in X-Ray's format."""
    return f"1-{trace_id >> 96:08x}-{trace_id & 2**96 - 1:024x}"


def x_ray_header(span: Any) -> str:
    """The X-Amzn-Trace-Id header that makes the span a parent."""
    context = span.get_span_context()
    sampled = int(context.trace_flags.sampled)
    return f"Root={x_ray_id(context.trace_id)};Parent={context.span_id:016x};Sampled={sampled}"


def _never_raises(method: Callable[..., None]) -> Callable[..., None]:
    """Log an exception instead of raising it: tracing must not fail a request, or the start.

    A process logs only the first exception.
    """

    @functools.wraps(method)
    def call(self: Tracing, *arguments: Any) -> None:
        try:
            method(self, *arguments)
        except Exception:
            if not self.has_failed:
                self.has_failed = True
                log.exception("tracing failed; further failures are not logged")

    return call


class Ids(RandomIdGenerator):
    """Gives a span without a parent the request's trace id, mostly that of the ALB's header.

    The header has a trace id without a parent. OpenTelemetry's X-Ray propagator ignores such a
    header.
    """

    def __init__(self) -> None:
        self.current = threading.local()

    def generate_trace_id(self) -> int:
        """The SDK calls this for a span without a parent."""
        return int(self.current.trace_id)


class Session(requests.Session):
    """Calls the collector without reading the bodies of its responses, which may be endless."""

    result = ""

    def request(self, *arguments: Any, **options: Any) -> Any:
        """Make a call, and keep its result for the log."""
        options["stream"] = True
        try:
            with super().request(*arguments, **options) as response:
                self.result = f"{response.status_code} {response.reason}"
                return response
        except Exception as error:
            self.result = str(error)
            raise


class Exporter(OTLPSpanExporter):
    """Logs the first failed export after a success, and the first success after a failure."""

    def __init__(self) -> None:
        self.calls, self.is_failing = Session(), False
        super().__init__(session=self.calls)

    def export(self, spans: Any) -> SpanExportResult:
        """Send spans to the collector. The SDK calls this in its thread."""
        result = super().export(spans)
        if (is_failing := result is not SpanExportResult.SUCCESS) != self.is_failing:
            self.is_failing = is_failing
            message = "spans are lost" if is_failing else "the collector takes spans again"
            log.warning(message, extra={"cause": short(self.calls.result)})
        return result


class Tracing:
    """The spans of a process. No method raises."""

    has_failed = False
    tracer: Any = None  # until start()

    @_never_raises
    def __init__(self, queue_url: str, resource: dict[str, Any]) -> None:
        """Call this before the fork: workers then share the exporter's memory, 13 MB with TLS."""
        self.exporter, self.resource = Exporter(), Resource(resource)
        url = urlsplit(queue_url)
        queue = url.path.rpartition("/")[2]
        self.send = f"send {queue}"
        self.send_attributes = {
            "messaging.system": "aws_sqs",
            "messaging.operation.name": "send",
            "messaging.operation.type": "send",
            "messaging.destination.name": queue,
            "server.address": url.hostname or "",
            "server.port": url.port or DEFAULT_PORTS[url.scheme],
            # With these, X-Ray's map shows the queue; otherwise a service with the span's name.
            "rpc.system": "aws-api",
            "rpc.service": "SQS",
            "aws.sqs.queue.url": queue_url,
        }

    @_never_raises
    def start(self) -> None:
        """Start the thread that sends spans. Call this after the fork."""
        if self.has_failed:
            return
        self.ids = Ids()
        # The environment comes last, so that its service.name takes precedence.
        resource = Resource.create().merge(self.resource).merge(OTELResourceDetector().detect())
        self.provider = TracerProvider(
            resource=resource, id_generator=self.ids, shutdown_on_exit=False
        )
        self.provider.add_span_processor(BatchSpanProcessor(self.exporter))
        # These loggers would log every lost batch, some with a traceback.
        for name in ("opentelemetry", "urllib3"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        sampler = self.provider.sampler
        log.info("tracing is on", extra={"sampler": sampler.get_description()})
        # If the trace id decides about sampling, other requests need no call of the SDK.
        self.bound = sampler.bound if type(sampler) is TraceIdRatioBased else math.inf
        self.tracer = self.provider.get_tracer(log.name)

    @_never_raises
    def stop(self) -> None:
        """Send the remaining spans, for at most one second. The SDK's own timeout is 30 seconds."""
        if self.tracer:
            stopping = threading.Thread(target=self.provider.shutdown, daemon=True)
            stopping.start()
            stopping.join(1)

    @_never_raises
    def begin(self, exchange: app.Exchange) -> None:
        """Start the request's span if it is sampled, and set the trace id for the log."""
        environ, log_fields = exchange.environ, exchange.log_fields
        header = exchange.trace_header
        if not self.tracer or f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}" != REQUEST:
            return
        trace_id = int((log_fields["trace_id"] or "1-0")[2:].replace("-", ""), 16)
        if not trace_id:  # X-Ray's ids begin with the time in seconds
            trace_id = int(time.time()) << 96 | random.getrandbits(96)
            log_fields["trace_id"] = x_ray_id(trace_id)
            header = f"Root={log_fields['trace_id']}"
        if trace_id & TraceIdRatioBased.TRACE_ID_LIMIT < self.bound:
            context, parent = NO_CONTEXT, _parent(header)
            if parent:
                flags = trace.TraceFlags("Sampled=1" in header)
                remote = trace.SpanContext(trace_id, int(parent[1], 16), True, flags)
                context = trace.set_span_in_context(trace.NonRecordingSpan(remote), NO_CONTEXT)
            self.ids.current.trace_id = trace_id
            span = self.tracer.start_span(REQUEST, context, trace.SpanKind.SERVER)
            if span.is_recording():
                log_fields["trace_id"] = x_ray_id(trace_id)
                exchange.spans = [span]
                return
        # Not sampled: the consumer's parent is the caller's span, if any.
        exchange.trace_header = f"{header.partition(';Sampled')[0]};Sampled=0"

    @_never_raises
    def publish(self, exchange: app.Exchange) -> None:
        """Start the message's span, and set the message's trace header."""
        (server,) = exchange.spans
        context = trace.set_span_in_context(server, NO_CONTEXT)
        span = self.tracer.start_span(self.send, context, trace.SpanKind.PRODUCER)
        exchange.spans = [server, span]
        exchange.trace_header = x_ray_header(span)

    @_never_raises
    def end(self, exchange: app.Exchange, status: int, client: str) -> None:
        """End the spans. No attribute contains a token or a part of an email."""
        environ, log_fields = exchange.environ, exchange.log_fields
        error = log_fields.get("error")
        server, *producers = exchange.spans
        for span in producers:
            attributes = self.send_attributes.copy()
            if delivery := exchange.delivery:
                is_batch = delivery.batch_size > 1
                attributes["rpc.method"] = "SendMessageBatch" if is_batch else "SendMessage"
                attributes["email_processor.attempts"] = delivery.attempts
                if is_batch:
                    attributes["messaging.batch.message_count"] = delivery.batch_size
            if error:
                attributes["error.type"] = error
                span.set_status(trace.StatusCode.ERROR)
            else:
                attributes["messaging.message.id"] = short(log_fields["message_id"])
            span.set_attributes(attributes)
            span.end()
        scheme = environ.get("HTTP_X_FORWARDED_PROTO")
        scheme = scheme if scheme in DEFAULT_PORTS else "http"
        attributes = {
            "http.request.method": "POST",
            "http.response.status_code": status,
            "http.route": "/process",
            "url.path": "/process",
            "url.scheme": scheme,
            "client.address": short(client),
            "email_processor.outcome": error or "success",
            "email_processor.request_id": log_fields["request_id"],
        }
        if host := _host(environ.get("HTTP_HOST", "")):
            attributes["server.address"] = short(host[1])
            attributes["server.port"] = int(host[2] or DEFAULT_PORTS[scheme])
        if agent := environ.get("HTTP_USER_AGENT"):
            attributes["user_agent.original"] = short(agent)
        if status >= 500:  # OpenTelemetry's conventions: a 4xx is not an error of a SERVER span
            attributes["error.type"] = error
            server.set_status(trace.StatusCode.ERROR)
        server.set_attributes(attributes)
        server.end()
