"""email-processor: an HTTP front door for an SQS queue.

Follow a request from `Service.take_message`: it reads the body, parses the JSON, checks the token,
validates the fields, and publishes the message. The sections after `Service` are in that order;
then come the parts that they use: calls of AWS, credentials, metrics, logs. `create_app` puts the
parts together. The last section is the local server, with an embedded AWS. docs/architecture.md
has a drawing. worker.py receives the requests and sends the responses.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import hmac
import json
import logging
import logging.config
import math
import operator
import os
import queue
import random
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import unicodedata
from base64 import b64encode
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields
from datetime import UTC, datetime
from importlib.resources import files
from importlib.util import find_spec
from itertools import accumulate
from json import JSONDecodeError
from json.encoder import encode_basestring_ascii
from logging.handlers import QueueHandler
from pathlib import Path
from typing import Any, NoReturn

import boto3
import botocore.credentials
import botocore.loaders
import botocore.session
import certifi
import prometheus_client
import pycurl
import yaml
from botocore.awsrequest import HeadersDict
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionClosedError,
    ConnectTimeoutError,
    CredentialRetrievalError,
    EndpointConnectionError,
    HTTPClientError,
    NoCredentialsError,
    ProxyConnectionError,
    ReadTimeoutError,
    SSLError,
)
from botocore.parsers import create_parser
from botocore.utils import get_environ_proxies
from flask import Flask, Request, Response, g, has_app_context, request
from prometheus_client.multiprocess import MultiProcessCollector
from werkzeug.exceptions import HTTPException, MethodNotAllowed, NotFound
from werkzeug.routing import MapAdapter
from werkzeug.serving import make_server

SERVICE = "email-processor"
VERSION = "1.0.0"
PROJECT = Path(__file__).parent


def commit_of(checkout: Path) -> str:
    command = ["git", f"--git-dir={checkout / '.git'}", "rev-parse", "--verify", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603
    except OSError:  # there is no git
        return "unknown"
    return "unknown" if done.returncode else done.stdout.strip()


# The image has the variable; there is no git in it.
COMMIT = os.environ.get("COMMIT", "").strip() or commit_of(PROJECT)

log = logging.getLogger("email_processor")


# --- Settings -------------------------------------------------------------------------------------


class SettingsError(SystemExit):
    """The environment is unusable: the start ends with a line for each variable at fault."""


def _setting(default: Any, rule: str, check: Callable[[str], Any]) -> Any:
    """A field of Settings. `check` turns a variable's text into a value, or raises ValueError."""
    return field(default=default, metadata={"rule": rule, "check": check})


def _text(default: Any, rule: str, pattern: str) -> Any:
    def check(text: str) -> str:
        if not re.fullmatch(pattern, text, re.ASCII):
            raise ValueError
        return text

    return _setting(default, rule, check)


def _number(default: float, unit: str, low: int, high: int) -> Any:
    kind = type(default)

    def check(text: str) -> float:
        # int() and float() also accept 8_080, +80 and nan.
        if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", text, re.ASCII) or not low <= kind(text) <= high:
            raise ValueError
        return kind(text)

    return _setting(default, f"a {unit} from {low} to {high}", check)


def _parameter_names(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    # GetParameters takes ten in one call.
    # Besides a parameter's own characters, those of a secret that the name refers to.
    if len(names) > 10 or not all(re.fullmatch(r"[\w./:+=@-]+", n, re.ASCII) for n in names):
        raise ValueError
    return names


@dataclass(frozen=True)
class Settings:
    """The service's configuration; the environment variable of a field is its name in capitals."""

    sqs_queue_url: str = _text(MISSING, "the queue's URL", r"https?://[^/\s]+/\S+")
    aws_region: str = _text(
        "us-west-1", "a region such as us-west-1", r"[a-z]{2,}(-[a-z]+)+-[0-9]+"
    )
    token_ssm_parameter: tuple[str, ...] = _setting(
        ("/email-service/api-token",),
        "1 to 10 parameter names, separated by commas",
        _parameter_names,
    )
    port: int = _number(8080, "port", 1, 65535)
    gunicorn_workers: int = _number(4, "whole number", 1, 64)
    gunicorn_threads: int = _number(2, "whole number", 1, 256)
    max_request_bytes: int = _number(2_097_152, "number of bytes", 1, 2**30)
    body_timeout_seconds: float = _number(5.0, "number of seconds", 1, 60)
    sqs_calls_in_flight: int = _number(8, "whole number", 1, 64)
    token_cache_seconds: float = _number(60.0, "number of seconds", 1, 3600)
    log_level: str = _text("INFO", "DEBUG, INFO, WARNING or ERROR", "DEBUG|INFO|WARNING|ERROR")

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Settings:
        """Read and check every variable; an empty one counts as unset.

        Raises SettingsError naming all variables at fault, a line each.
        """
        values, problems = {}, []
        for setting in fields(cls):
            variable, rule = setting.name.upper(), setting.metadata["rule"]
            text = environ.get(variable, "").strip()
            try:
                if text:
                    values[setting.name] = setting.metadata["check"](text)
                elif setting.default is MISSING:
                    problems.append(f"{variable} is required: {rule}")
            except ValueError:
                problems.append(f"{variable} must be {rule}, not {text!r}")
        if problems:
            raise SettingsError("\n".join(problems))
        return cls(**values)


# --- Errors ---------------------------------------------------------------------------------------


# Every error response: code -> (status, message). README, openapi.yaml, the metric label and the
# tests use the same list.
ERRORS = {
    "not_found": (404, "There is nothing at this path."),
    "method_not_allowed": (405, "This path does not take this method; see the Allow header."),
    "request_too_large": (413, "The request is too large."),
    "request_timeout": (408, "The request body did not arrive in time."),
    "unsupported_media_type": (415, "The Content-Type must be application/json."),
    "invalid_json": (400, "The request is not a JSON object in UTF-8."),
    "token_required": (401, 'The request needs a "token" at the top level of the JSON body.'),
    "invalid_token": (401, "Invalid token."),
    "token_store_unavailable": (503, "The token cannot be checked at present. Try again."),
    "invalid_data": (400, '"data" must be an object with the four email fields.'),
    "invalid_timestamp": (400, "email_timestream is not a valid Unix timestamp."),
    "message_too_large": (413, "The message is larger than the queue takes."),
    "queue_unavailable": (503, "The queue cannot take messages at present. Try again."),
    "overloaded": (503, "More requests wait than the service has time or memory for. Try again."),
    "internal_error": (500, "The service has failed. Its log has the cause."),
}
RETRY_AFTER_SECONDS = 5
# RFC 9110 requires a scheme in a 401. For an unknown scheme, no browser asks for a password.
AUTHENTICATE = f'Token realm="{SERVICE}"'


class ApiError(Exception):
    """An error response, by its code in ERRORS."""

    def __init__(
        self,
        code: str,
        message: str | None = None,
        errors: list[dict[str, str]] | None = None,
        cause: str | None = None,  # for the log
    ) -> None:
        super().__init__(code)
        self.code = code
        self.status, default = ERRORS[code]
        self.message = message or default
        self.errors = errors
        self.cause = cause

    def body(self, request_id: str) -> dict[str, Any]:
        body = {
            "status": "error",
            "error": self.code,
            "message": self.message,
            "request_id": request_id,
        }
        return {**body, "errors": self.errors} if self.errors else body


# --- The application: routes, and the path of a request -------------------------------------------


@dataclass(slots=True)
class Exchange:
    """A request, and the log line of its response."""

    environ: dict[str, Any]
    line: dict[str, Any]
    trace_header: str
    started: float
    is_measured: bool = False  # by the metrics of POST /process
    delivery: Delivery | None = None
    spans: Any = ()  # if its trace is sampled


class Service(Flask):
    """The WSGI application: routes, the path of a request, and its response.

    create_url_adapter matches path and method only: Werkzeug would also reject malformed Host
    headers, and requests that offer to become a WebSocket.
    """

    def __init__(
        self, settings: Settings, tokens: TokenStore, publisher: Publisher, tracing: Any = None
    ) -> None:
        super().__init__(__name__, static_folder=None)
        self.settings, self.tokens, self.publisher = settings, tokens, publisher
        for parameter in settings.token_ssm_parameter:
            TOKENS_ACCEPTED.labels(parameter)  # every series exists from the start
        self.tracing = tracing  # a tracing.Tracing
        self.config["PROVIDE_AUTOMATIC_OPTIONS"] = False  # OPTIONS gets 405
        self.url_map.merge_slashes = False  # /docs//x gets 404, not a redirect in HTML
        for method, path, view in (
            ("POST", "/process", self.process),
            ("GET", "/health", self.health),
            ("GET", "/ready", self.ready),
            ("GET", "/metrics", self.metrics),
            ("GET", "/", self.index),
            ("GET", "/openapi.json", self.openapi),
            ("GET", "/docs", self.docs),
            ("GET", "/docs/<any('swagger-ui.css', 'swagger-ui-bundle.js'):asset>", self.docs_asset),
        ):
            self.add_url_rule(path, view_func=view, methods=[method])
        self.before_request(self.begin)
        self.after_request(self.end)
        self.register_error_handler(Exception, self.handle_error)

    def create_url_adapter(self, request: Request | None) -> MapAdapter | None:
        if request is None:
            return None
        return self.url_map.bind("", path_info=request.path, default_method=request.method)

    def start(self) -> None:
        """After the fork: start to trace, and to keep the tokens fresh, also without requests."""
        if self.tracing:
            self.tracing.start()

        def keep_fresh() -> None:
            with suppress(RuntimeError):  # at the exit, the executor accepts no more reads
                while True:
                    self.refresh()
                    time.sleep(1)

        threading.Thread(target=keep_fresh, daemon=True).start()

    def refresh(self) -> None:
        """Start the reads that are due: of the tokens, and of the queue's limit until known."""
        self.tokens.refresh()
        if not self.publisher.max_message_bytes:
            self.publisher.refresh_limit()

    # `request` and `g` are proxies: dereference them once.

    def begin(self) -> None:
        environ = request.environ
        g.exchange = self.new_exchange(environ)
        if not environ["PATH_INFO"].startswith("/") or environ["PATH_INFO"].startswith("//"):
            raise ApiError("not_found")  # Werkzeug would take //process for /process

    def new_exchange(self, environ: dict[str, Any]) -> Exchange:
        trace_header, trace_id = trace_of(environ.get("HTTP_X_AMZN_TRACE_ID", ""))
        request_id = request_id_of(environ.get("HTTP_X_REQUEST_ID", ""))
        line = {"request_id": request_id, "trace_id": trace_id}
        exchange = Exchange(environ, line, trace_header, time.perf_counter())
        if self.tracing:
            self.tracing.begin(exchange)
        return exchange

    def end(self, response: Response) -> Response:
        if isinstance(response, DeferredResponse):
            return response  # ends when its future is done
        return self.finish(g.exchange, response)

    def finish(self, exchange: Exchange, response: Response) -> Response:
        """Record the response. Called once per request, in any thread, without Flask's context."""
        environ, line = exchange.environ, exchange.line
        response.headers["X-Request-Id"] = line["request_id"]
        forwarded = environ.get("HTTP_X_FORWARDED_FOR", "")
        # The ALB appends the address that it saw; the client may have sent the rest.
        client = forwarded.rpartition(",")[2].strip() or environ.get("REMOTE_ADDR", "")
        client = client.removeprefix("::ffff:")  # of IPv4, on a socket for both
        duration = time.perf_counter() - exchange.started
        if exchange.is_measured:
            REQUESTS_IN_FLIGHT.dec()
            REQUEST_DURATION.observe(duration)
        record_response(
            method=environ["REQUEST_METHOD"],
            path=header_text(environ["PATH_INFO"]),
            client=client,
            status=response.status_code,
            duration_ms=round(duration * 1000, 2),
            **line,
        )
        if exchange.spans:
            self.tracing.end(exchange, response.status_code, client)
        return response

    def process(self) -> Response:
        exchange = g.exchange
        exchange.is_measured = True
        REQUESTS_IN_FLIGHT.inc()
        message_id = exchange.delivery = self.take_message(exchange)

        def respond() -> Response:
            try:
                exchange.line["message_id"] = message_id.result()
            except Exception as error:
                return self.finish(exchange, self.error_response(exchange, error))
            body = {
                "status": "success",
                "message": "Email data processed and queued",
                "message_id": exchange.line["message_id"],
            }
            return self.finish(exchange, json_response(body))

        return DeferredResponse(message_id, respond)

    def take_message(self, exchange: Exchange) -> Delivery:
        """Read and check the request, and publish its message."""
        body = read_body(self.settings.max_request_bytes)
        check_media_type(request)
        members, data = parse_request(body)
        token = members.get("token")
        if token is None or token == "":
            raise ApiError("token_required")
        parameter = self.tokens.accepts(token) if isinstance(token, str) else None
        if parameter is None:
            raise ApiError("invalid_token")
        exchange.line["token_parameter"] = parameter
        TOKENS_ACCEPTED.labels(parameter).inc()
        validate_data(members.pop("data", None))  # which frees its memory
        if exchange.spans:
            self.tracing.publish(exchange)
        return self.publisher.publish(
            Message(
                body=ascii_json(data),
                request_id=exchange.line["request_id"],
                idempotency_key=header_text(exchange.environ.get("HTTP_IDEMPOTENCY_KEY", "")),
                trace_header=exchange.trace_header,
            )
        )

    def health(self) -> Response:
        now = datetime.now(UTC).replace(tzinfo=None).isoformat(timespec="microseconds")
        return json_response({"status": "healthy", "service": SERVICE, "timestamp": now})

    def ready(self) -> Response:
        self.refresh()
        missing = {}
        if not self.tokens.ready:
            missing["token_store_unavailable"] = (
                f"The token has not been read yet: {self.tokens.reason}"
            )
        if not self.publisher.max_message_bytes:
            reason = self.publisher.problem or "sqs:GetQueueAttributes is in progress"
            missing["queue_unavailable"] = f"The queue has not been reached yet: {reason}"
        if missing:
            raise ApiError(next(iter(missing)), "; ".join(missing.values()))
        return json_response({"status": "ready", "service": SERVICE})

    def metrics(self) -> Response:
        return Response(metrics_text(), content_type=prometheus_client.CONTENT_TYPE_LATEST)

    def index(self) -> Response:
        endpoints = sorted(
            f"{method} {rule.rule}"
            for rule in self.url_map.iter_rules()
            if not rule.arguments
            for method in (rule.methods or set()) - {"HEAD"}
        )
        build = {"version": VERSION, "commit": COMMIT}
        return json_response({"service": SERVICE, **build, "endpoints": endpoints})

    def openapi(self) -> Response:
        return Response(openapi_document(), mimetype="application/json")

    def docs(self) -> Response:
        return Response(_DOCS_PAGE, headers={"Content-Security-Policy": _DOCS_POLICY})

    def docs_asset(self, asset: str) -> Response:
        kind = "text/css" if asset.endswith(".css") else "text/javascript"
        return Response(docs_file(asset), mimetype=kind, headers={"Cache-Control": "max-age=3600"})

    def handle_error(self, error: Exception) -> Response:
        return self.error_response(g.exchange, error)

    def reject(self, error: Exception, environ: dict[str, Any]) -> Response:
        """The response to a request that Flask did not handle: Gunicorn could not parse it."""
        exchange = self.new_exchange(environ)
        return self.finish(exchange, self.error_response(exchange, error))

    def error_response(self, exchange: Exchange, error: Exception) -> Response:
        headers = {}
        if isinstance(error, ApiError):
            api_error = error
        elif isinstance(error, NotFound):
            api_error = ApiError("not_found")
        elif isinstance(error, MethodNotAllowed):
            api_error = ApiError("method_not_allowed")
            headers["Allow"] = ", ".join(sorted(error.valid_methods or ()))
        elif isinstance(error, HTTPException) and (error.code or 500) < 500:
            api_error = ApiError("invalid_json", "The request is not well-formed HTTP.")
        else:
            api_error = ApiError("internal_error")
            log.error("unhandled exception", exc_info=error)
        if api_error.status == 503:
            headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
        elif api_error.status == 401:
            headers["WWW-Authenticate"] = AUTHENTICATE
        exchange.line |= {"error": api_error.code, "cause": api_error.cause}
        body = api_error.body(exchange.line["request_id"])
        response = json_response(body, api_error.status)
        response.headers.update(headers)
        return response


class DeferredResponse(Response):
    """A response that is made when a future is done; also its own WSGI iterable.

    Under any WSGI server, iterating blocks until SQS has responded; start_response is called only
    then, as PEP 3333 allows. worker.py calls add_done_callback, and iterates afterwards.
    """

    def __init__(self, future: Future[str], make_response: Callable[[], Response]) -> None:
        super().__init__()
        self.add_done_callback = future.add_done_callback
        self._make_response = make_response  # waits for the future

    def __call__(self, environ: Any, start_response: Any) -> Any:
        self._arguments = environ, start_response
        return self

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._make_response()(*self._arguments))


def header_text(value: str) -> str:
    """A header's value as text: WSGI gives each byte as a character; UTF-8 is decoded.

    SQS rejects U+FFFE and U+FFFF: a value with one of them stays undecoded.
    """
    with suppress(UnicodeDecodeError):
        text = value.encode("latin-1").decode()
        value = value if re.search("[\ufffe\uffff]", text) else text
    return value.strip()


def json_response(body: Mapping[str, Any], status: int = 200) -> Response:
    return Response(json.dumps(body), status, mimetype="application/json")


@functools.cache
def openapi_document() -> str:
    return json.dumps(yaml.safe_load((PROJECT / "openapi.yaml").read_text("utf-8")))


@functools.cache  # slow readers share one copy
def docs_file(name: str) -> bytes:
    return (files("flask_swagger_ui") / "dist" / name).read_bytes()


# --- Read the body --------------------------------------------------------------------------------


def read_body(limit: int) -> bytes:
    """The body of the current request, of at most `limit` bytes.

    Raises ApiError: request_too_large, request_timeout or overloaded, or invalid_json for a body
    that is truncated.
    """
    if error := request.environ.get("worker.error"):  # worker.py did not receive the body
        raise error
    declared = request.content_length or 0
    body = b""
    if declared <= limit:
        try:
            body = request.stream.read(limit + 1)
        except Exception:  # of the server, for a truncated body or a malformed chunk
            declared = len(body) + 1
    if max(declared, len(body)) > limit:
        raise ApiError("request_too_large", f"The request body is larger than {limit} bytes.")
    if len(body) < declared:
        raise ApiError("invalid_json", "The request body is truncated or not well-formed HTTP.")
    return bytes(body)


# --- Parse ----------------------------------------------------------------------------------------


MAX_JSON_DEPTH, MAX_JSON_VALUES = 100, 10_000


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


# The queue gets the original text. Parsed numbers are for validation only: 20 digits show that an
# integer is out of range (int() raises for more than 4,300); a fraction is never valid.
_scan_value = json.JSONDecoder(
    parse_int=lambda digits: int(digits[:20]),
    parse_float=lambda _: math.nan,
    parse_constant=_reject_constant,
).scan_once  # type: ignore[attr-defined]
_space = re.compile(r"[ \t\n\r]*").match
_space_and_brace = re.compile(r"[ \t\n\r]*\{").match
_to_lists = bytes.maketrans(b"{}", b"[]")
_all_but_brackets = bytes(set(range(256)) - set(b"[]"))


def check_media_type(request: Request) -> None:
    """Raises ApiError unsupported_media_type, also for a body that is compressed."""
    if not request.is_json:
        raise ApiError("unsupported_media_type")
    for header, plain in (("Content-Encoding", "identity"), ("Transfer-Encoding", "chunked")):
        codings = request.headers.get(header, "").lower().split(",")
        if any(coding.strip() not in ("", plain) for coding in codings):
            message = f"The {header} must be {plain} or absent: send the body uncompressed."
            raise ApiError("unsupported_media_type", message)


def parse_request(body: bytes) -> tuple[dict[str, Any], str]:
    """The members of the request's JSON object, and the source text of its "data".

    The parsed "data", written out again, would have 1.1 for 1.10 and Infinity for 1e400.

    Raises ApiError invalid_json.
    """
    check_json_limits(body)
    spans: list[tuple[int, int]] = []

    def scan_member(text: str, start: int) -> tuple[Any, int]:
        value, end = _scan_value(text, start)
        spans.append((start, end))
        return value, end

    try:
        text = body.decode("utf-8-sig")  # without PowerShell's byte order mark
        # One emoji makes each character take four bytes. The parser takes up to 6.25 for each of a
        # string, beside the text.
        if sys.getsizeof(text) + 6.25 * len(text) > 16 * 2**20:
            text = ascii_json(text)
        brace = _space_and_brace(text)
        if not brace:
            raise ApiError("invalid_json", "The request body is not a JSON object.")
        # json's own parser of an object. Its C version does not report where members are.
        members, end = json.decoder.JSONObject(  # type: ignore[attr-defined]
            (text, brace.end()), True, scan_member, None, list
        )
        end = _space(text, end).end()  # type: ignore[union-attr]
        if end < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except UnicodeDecodeError:
        raise ApiError("invalid_json", "The request body is not UTF-8.") from None
    except ValueError as error:
        raise ApiError("invalid_json", f"The request body is not JSON: {error}.") from None
    # Of several members with one name, the last counts.
    starts = {name: span for (name, _), span in zip(members, spans, strict=True)}
    return dict(members), text[slice(*starts.get("data", (0, 0)))]


def check_json_limits(body: bytes) -> None:
    """Limit depth and number of values before the parse: `[]` takes 30 times its text in memory.

    Brackets and commas in strings do not count. If the body is not JSON, the counts hold up to its
    first error, where the parser stops.

    Raises ApiError invalid_json.
    """
    brackets = body.count(b"[") + body.count(b"{")
    if brackets <= MAX_JSON_DEPTH and brackets + body.count(b",") < MAX_JSON_VALUES:
        return  # with the strings, which an ordinary email need not pay to remove
    # Without escapes, each part at an even index is outside of strings. 10,000 values have at most
    # 20,000 strings, with their names, and so 40,000 quotes: no further split is needed.
    parts = body.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"', 4 * MAX_JSON_VALUES + 1)
    lists = b'"'.join(parts[::2]).translate(_to_lists, b" \t\n\r")
    values = 1 + lists.count(b"[") + lists.count(b",") - lists.count(b"[]")
    if values > MAX_JSON_VALUES or len(parts) > 4 * MAX_JSON_VALUES + 1:
        message = f"The JSON has more than {MAX_JSON_VALUES:,} values."
        raise ApiError("invalid_json", message)
    open_and_close = lists.translate(None, _all_but_brackets)[: 2 * MAX_JSON_VALUES]
    steps = (1 if bracket == ord("[") else -1 for bracket in open_and_close)
    if max(accumulate(steps), default=0) > MAX_JSON_DEPTH:
        message = f"The JSON nests deeper than {MAX_JSON_DEPTH} levels."
        raise ApiError("invalid_json", message)


# From a character beyond ASCII on, in parts of less than 1 MiB. Control characters are valid only
# between strings, of which check_json_limits allows few.
_not_ascii = re.compile(r"[^\x00-\x7f][^\x00-\x1f]{,99999}")


def ascii_json(text: str) -> str:
    """The same JSON with characters beyond ASCII escaped: SQS rejects some of them.

    A function call for each would take 370 ms for 2 MiB of them.
    """

    def escape(found: re.Match[str]) -> str:
        # Also escapes the backslashes and quotes, which are JSON's own here.
        return encode_basestring_ascii(found[0]).replace(r"\\", "\\").replace(r"\"", '"')[1:-1]

    if text.isascii():
        return text
    # Valid JSON never reaches the count: only a text with control characters in strings does.
    return _not_ascii.sub(escape, text, count=2 * MAX_JSON_VALUES + 100)


# --- Token store ----------------------------------------------------------------------------------


class TokenStore:
    """The tokens that SSM Parameter Store holds, cached.

    SSM allows 40 reads a second for a whole account and region, so a request does not read it. A
    read starts when the cache is nearly `cache_seconds` old, and when a token does not match (it
    may be new), but only one at a time, and none within READ_INTERVAL seconds of the last (or
    `cache_seconds`, if that is less). A known token stays valid while a read is in progress; a
    request waits for SSM only with an unknown token. While SSM fails, the last known tokens stay
    valid. A parameter that SSM no longer has is not a failure: its token stops working.
    """

    READ_INTERVAL = 5.0

    def __init__(
        self,
        ssm: Any,
        names: tuple[str, ...],
        cache_seconds: float,
        executor: Executor,  # of the reads
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._ssm = ssm
        self._names = names
        self._cache_seconds = cache_seconds
        self._interval = min(self.READ_INTERVAL, cache_seconds)
        self._executor = executor
        self._clock = clock
        self._jitter = jitter
        self._lock = threading.Lock()
        self._tokens: tuple[tuple[str, bytes], ...] = ()  # with the parameter's configured name
        self._warned: set[tuple[str, str]] = set()
        self._attempted_at = self._due_at = -math.inf
        self._read_in_progress: Future[None] | None = None
        self.ready = False  # a token was read at least once
        self.problem: str | None = None  # why the last read failed
        self.reason = "SSM has not responded yet"  # why there is no token

    def accepts(self, token: str) -> str | None:
        """The name of the parameter that holds the token, as configured; None if there is none.

        Raises ApiError token_store_unavailable.
        """
        name = self._matches(token)
        if name is None or self._clock() >= self._due_at:
            was_failing = self.problem is not None
            read, is_new = self._start_read()
            # While SSM fails, at most one request waits for it at a time.
            if read and name is None and (is_new or not was_failing):
                read.result()
                name = self._matches(token)
        if not self.ready:
            raise ApiError("token_store_unavailable")
        return name

    def refresh(self) -> None:
        """Start a read if the tokens are nearly too old, or not yet known."""
        if self._clock() >= self._due_at:
            self._start_read()

    def _matches(self, token: str) -> str | None:
        given = token.encode("utf-8", "surrogatepass")
        # Compare with every token: the time does not reveal which token matched.
        names = [name for name, known in self._tokens if hmac.compare_digest(given, known)]
        return names[0] if names else None

    def _start_read(self) -> tuple[Future[None] | None, bool]:
        """The read in progress, if there is one, and whether it was started here."""
        with self._lock:
            read = self._read_in_progress
            if read and not read.done():
                return read, False
            if self._clock() - self._attempted_at < self._interval:
                return None, False
            read = self._read_in_progress = self._executor.submit(self._read)
            return read, True

    def _read(self) -> None:
        now = self._clock()
        try:
            response = self._ssm.get_parameters(Names=list(self._names), WithDecryption=True)
            missing = response.get("InvalidParameters", [])
            if len(response["Parameters"]) + len(missing) != len(self._names):
                raise ValueError("the response does not cover every parameter")
            tokens = [
                (self._configured_name(parameter), token.encode())
                for parameter in response["Parameters"]
                for token in self._tokens_of(parameter)
            ]
        except Exception as error:  # a malformed response may raise any exception
            self.problem = self.reason = f"ssm:GetParameters failed: {cause_of(error)}"
            TOKEN_READS["failure"].inc()
            instead = "the last known token stays valid" if self.ready else "no token is known yet"
            log.warning(f"token not read; {instead}", extra={"cause": detail_of(error)})
            self._attempted_at = self._clock()  # the end of the read: a slow failure counts once
            return
        if missing:
            log.warning("token parameter missing in SSM", extra={"parameters": missing})
        empty = [name for name in self._names if name not in missing]
        self.reason = "; ".join(
            f"{text} {', '.join(names)}"
            for text, names in (("SSM does not have", missing), ("there is no token in", empty))
            if names
        )
        TOKEN_READ_TIMESTAMP.set_to_current_time()
        # In the configured order, which decides when parameters hold the same token.
        self._tokens = tuple(sorted(tokens, key=lambda pair: self._names.index(pair[0])))
        self.ready = self.ready or bool(tokens)
        if self.ready:
            # Between 70 % and 90 % of the cache's age, so that workers do not read in step.
            self._due_at = now + self._cache_seconds * (0.7 + 0.2 * self._jitter())
        self._attempted_at = self._clock()
        self.problem = None
        TOKEN_READS["success"].inc()

    def _configured_name(self, parameter: dict[str, Any]) -> str:
        """The parameter's name as configured: perhaps an ARN, or with a version or label.

        SSM returns the version or label apart, as Selector; emulators leave it out.
        """
        spelled = {parameter.get("Name"), parameter.get("ARN")}
        selected = {f"{name}{parameter.get('Selector', '')}" for name in spelled}
        exact = [name for name in self._names if name in selected]
        close = [name for name in self._names if name.rpartition(":")[0] in spelled]
        return (exact or close or self._names)[0]

    def _tokens_of(self, parameter: dict[str, Any]) -> list[str]:
        """A parameter's tokens. A probable mistake in the value is logged once."""
        kind, value = parameter.get("Type", "SecureString"), parameter["Value"]
        values = value.split(",") if kind == "StringList" else [value]
        tokens = [without_space(value) for value in values]
        problems = {
            f"is a {kind}, which is not encrypted; make it a SecureString": kind != "SecureString",
            "has white space around its value, which is ignored": tokens != values,
            "has quotes around its value, which are part of the token": any(
                re.fullmatch(r"(['\"]).*\1", token) for token in tokens
            ),
            "has JSON in it; the whole text is the token": re.fullmatch(
                r"\s*(\{.*\}|\[.*\])\s*", value, re.DOTALL
            ),
            "has no token in it": not all(tokens),
        }
        name = parameter.get("Name", "")
        for problem, is_there in problems.items():
            if is_there and (name, problem) not in self._warned:
                self._warned.add((name, problem))
                log.warning(f"token parameter {problem}", extra={"parameters": [name]})
        return [token for token in tokens if token]


# --- Validate -------------------------------------------------------------------------------------


FIELDS = ("email_subject", "email_sender", "email_timestream", "email_content")
TIMESTAMP_RANGE = range(946_684_800, 4_102_444_800 + 1)  # 2000-01-01 to 2100-01-01 UTC


def is_space(character: str) -> bool:
    """Whether the character is white space, a control or a format character (U+200B, U+FEFF)."""
    return character.isspace() or unicodedata.category(character) in ("Cc", "Cf")


# Further letters and marks without a shape: Unicode's Default_Ignorable_Code_Point, of
# DerivedCoreProperties.txt 17.0, and the blank Braille pattern.
_is_blank = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2065\u2800\u3164\ufe00-\ufe0f"
    "\uffa0\ufff0-\ufff8\U000e0000-\U000e0fff]"
).match


def is_visible(character: str) -> bool:
    return not is_space(character) and not _is_blank(character)


def without_space(text: str) -> str:
    """The text without leading and trailing spaces."""
    at = [index for index, character in enumerate(text) if not is_space(character)]
    return text[at[0] : at[-1] + 1] if at else ""


def validate_data(data: Any) -> None:
    """Check the four fields. Raises ApiError invalid_data or invalid_timestamp."""
    if not isinstance(data, dict):
        raise ApiError("invalid_data", '"data" is missing or not an object.')
    problems = {}
    for name in FIELDS:
        value = data.get(name)
        if value is None:
            problems[name] = f"{name} is missing"
        elif isinstance(value, str):
            # A long text may be all spaces: then once for each distinct character.
            if not any(map(is_visible, value[:1000])) and not any(map(is_visible, set(value))):
                problems[name] = f"{name} is empty"
        elif name != "email_timestream":
            problems[name] = f"{name} is not a string"
    code = "invalid_data" if problems else "invalid_timestamp"
    if "email_timestream" not in problems and (rule := timestamp_rule(data["email_timestream"])):
        problems["email_timestream"] = f"email_timestream {rule}"
    if problems:
        errors = [{"field": name, "message": problems[name]} for name in FIELDS if name in problems]
        raise ApiError(code, "; ".join(error["message"] for error in errors), errors)


def timestamp_rule(value: Any) -> str | None:
    """The rule that a Unix timestamp (a JSON integer, or a string of ASCII digits) breaks."""
    if isinstance(value, str) and re.fullmatch("[0-9]+", value):
        # int() raises for more than 4,300 digits; leading zeros do not count.
        value = int(value.lstrip("0")[:20] or "0")
    if type(value) is not int:  # bool is an int too
        return "is not a Unix timestamp: give whole seconds, as an integer or a string of digits"
    if value not in TIMESTAMP_RANGE:
        return (
            "is outside the timestamps accepted: "
            f"{TIMESTAMP_RANGE[0]} (2000-01-01) to {TIMESTAMP_RANGE[-1]} (2100-01-01)"
        )
    return None


# --- Publisher ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Message:
    """The message of one request."""

    body: str  # JSON in ASCII
    request_id: str
    idempotency_key: str = ""
    trace_header: str = ""

    def entry(self, fifo: bool) -> tuple[dict[str, Any], int]:
        """The arguments of SendMessage, and the message's size in bytes.

        SQS counts the body, and the attributes' names, types and values; not a system attribute.
        """
        values = {
            "ContentType": "application/json",
            "ProcessedAt": datetime.now(UTC).isoformat(timespec="microseconds"),
            "RequestId": self.request_id,
        }
        if self.idempotency_key:
            values["IdempotencyKey"] = self.idempotency_key
        size = len(self.body) + sum(
            len(name) + len("String") + len(value.encode()) for name, value in values.items()
        )
        entry: dict[str, Any] = {
            "MessageBody": self.body,
            "MessageAttributes": {
                name: {"DataType": "String", "StringValue": value} for name, value in values.items()
            },
        }
        if self.trace_header:
            value = {"DataType": "String", "StringValue": self.trace_header}
            entry["MessageSystemAttributes"] = {"AWSTraceHeader": value}
        if fifo:
            entry["MessageGroupId"] = SERVICE
            entry["MessageDeduplicationId"] = self.deduplication_id()
        return entry, size

    def deduplication_id(self) -> str:
        """The idempotency key, or a new id: several messages may share a request id, and SQS would
        drop all except the first.

        SQS takes 1 to 128 letters, digits and ASCII punctuation; any other key goes hashed.
        """
        key = self.idempotency_key or f"{random.getrandbits(128):032x}"
        if re.fullmatch(r"[!-~]{1,128}", key):
            return key
        return hashlib.sha256(key.encode()).hexdigest()


TIMEOUTS = (ConnectTimeoutError, ReadTimeoutError)


def is_about_the_queue(error: Exception) -> bool:
    """Whether the caller or the queue is the cause, so that a retry of each message cannot help."""
    status = getattr(error, "response", {}).get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status == 403 or cause_of(error).endswith(("NonExistentQueue", "QueueDoesNotExist"))


def result_of(results: list[str | Exception]) -> str:
    """How a call ended, as a label of its metric."""
    failures = [result for result in results if isinstance(result, Exception)]
    if len(failures) < len(results):
        return "partial" if failures else "success"
    if not all(is_temporary(failure) for failure in failures):
        return "refused"
    return "timeout" if isinstance(failures[0], TIMEOUTS) else "unavailable"


class Delivery(Future[str]):
    """Gives the MessageId once SQS has the message, or raises ApiError."""

    attempts = 0
    batch_size = 0  # of the last call


@dataclass(slots=True, eq=False)
class Pending:
    """A message that waits for SQS, or is in flight."""

    entry: dict[str, Any]
    size: int  # bytes
    request_id: str
    deadline: float
    send_separately: bool = False  # SQS rejected a batch that contained it
    message_id: Delivery = field(default_factory=Delivery)


class Publisher:
    """Puts messages into the queue; messages that arrive together share a call.

    A call costs nearly the same for ten messages as for one. So a worker makes at most CALLS at
    once while fewer than ten messages wait; those that arrive meanwhile go together in the next
    call (group commit). No timer delays a message: while fewer than two calls are in flight, it is
    sent at once. With two calls instead of one, a slow call delays no other message; a third would
    make batches smaller.

    SQS counts as down (the circuit is open) when a call times out and no other call got a response
    meanwhile, or when FAILURES calls in a row fail for a reason that may pass. While the circuit is
    open, every message is rejected at once, except one short probe at a time: first the message
    whose call opened the circuit, then one PROBE_SECONDS after the last. Any response closes
    the circuit, except a 5xx or throttling.

    Messages for a FIFO queue are sent in the order of their arrival, but a retry comes after those
    that were sent with it. A client that waits for each response sees its order kept.
    """

    MAX_ENTRIES, MAX_BYTES = 10, 1_048_576  # of one SendMessageBatch
    MAX_PENDING_BYTES = 2**25  # of a worker; four of them have 512 MiB
    CALLS = 2
    ATTEMPTS = 3
    SECONDS = 5.0  # from arrival to the last attempt's start
    FAILURES = 10  # if three calls in ten fail by chance, ten in a row come once in 170,000
    PROBE_SECONDS = 0.25
    READ_INTERVAL = 5.0  # seconds between two reads of the queue's limit

    def __init__(
        self,
        sqs: Any,
        probe: Any,  # the same with less time for a call, while the circuit is open
        queue_url: str,
        calls_in_flight: int,
        executor: Executor,  # of the calls
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._sqs, self._probe, self._queue_url = sqs, probe, queue_url
        self._fifo = queue_url.endswith(".fifo")
        self._calls_in_flight = 1 if self._fifo else calls_in_flight  # in order: one by one
        self._executor = executor
        self._clock, self._pause = clock, pause
        self.max_message_bytes: int | None = None  # the queue's; None until it is known
        self.problem: str | None = None  # why the last read of it failed
        self._read_lock = threading.Lock()
        self._attempted_at = -math.inf
        self._lock = threading.Lock()  # of all that follows
        self._waiting: deque[Pending] = deque()
        self._pending_bytes = 0
        self._in_flight = 0  # calls
        self._failures = 0  # calls in a row
        self._responded_at = -math.inf
        self._open = False  # the circuit
        self._opened_at = 0.0
        self._probe_at = 0.0  # when the next probe may start
        self._probe_batch: list[Pending] | None = None  # in flight

    def publish(self, message: Message) -> Delivery:
        """Queue the message.

        The delivery, or this call, raises ApiError: message_too_large by the queue's own limit,
        queue_unavailable, or overloaded.
        """
        entry, size = message.entry(self._fifo)
        pending = Pending(entry, size, message.request_id, self._clock() + self.SECONDS)
        if self.max_message_bytes and size <= self.max_message_bytes:
            self._add(pending)
        else:
            self._executor.submit(self._add_after_read, pending)
        return pending.message_id

    def read_limit(self) -> None:
        """Read the queue's MaximumMessageSize, unless that is in progress or was just done."""
        if not self._read_lock.acquire(blocking=False):
            return
        try:
            if self._clock() - self._attempted_at < self.READ_INTERVAL:
                return
            self._attempted_at = self._clock()
            response = self._sqs.get_queue_attributes(
                QueueUrl=self._queue_url, AttributeNames=["MaximumMessageSize"]
            )
            self.max_message_bytes = int(response["Attributes"]["MaximumMessageSize"])
            self.problem = None
        except Exception as error:  # a malformed response may raise any exception
            self.problem = f"sqs:GetQueueAttributes failed: {cause_of(error)}"
            log.error("queue not reached", extra={"cause": detail_of(error)})
        finally:
            self._read_lock.release()

    def refresh_limit(self) -> None:
        """Start to read the queue's MaximumMessageSize."""
        self._executor.submit(self.read_limit)

    def _add_after_read(self, pending: Pending) -> None:
        """Add a message, unless the limit of now rejects it: the queue's owner may raise it."""
        self.read_limit()
        try:
            # While the limit is not known, SQS decides.
            if self.max_message_bytes and pending.size > self.max_message_bytes:
                reason = f"has {pending.size} bytes, the queue takes {self.max_message_bytes}."
                raise ApiError("message_too_large", f"The message {reason}")
            self._add(pending)
        except ApiError as error:
            pending.message_id.set_exception(error)

    def _add(self, pending: Pending) -> None:
        with self._lock:
            if self._open and not self._may_start():
                raise ApiError("queue_unavailable")
            if self._pending_bytes + pending.size > self.MAX_PENDING_BYTES:
                cause = f"{self._pending_bytes} bytes of messages wait for SQS"
                raise ApiError("overloaded", cause=cause)
            self._waiting.append(pending)
            self._pending_bytes += pending.size
            batch = self._next_batch()
        if batch:
            self._executor.submit(self._send_batches, batch)

    def _may_start(self) -> bool:
        """Whether a call may start beside those in flight. Locked."""
        if self._open:
            return self._probe_batch is None and self._clock() >= self._probe_at
        is_full = len(self._waiting) >= self.MAX_ENTRIES
        calls = self._calls_in_flight if is_full else min(self.CALLS, self._calls_in_flight)
        return self._in_flight < calls

    def _next_batch(self) -> list[Pending]:
        """The messages of the call that starts now; none if no call may start. Locked."""
        batch, size = list[Pending](), 0
        if not self._waiting or not self._may_start():
            return batch
        while self._waiting and len(batch) < self.MAX_ENTRIES:
            following = self._waiting[0]
            size += following.size
            separate = following.send_separately or (batch and batch[0].send_separately)
            if batch and (size > self.MAX_BYTES or separate):
                break
            batch.append(self._waiting.popleft())
        self._in_flight += 1
        if self._open:
            self._probe_batch = batch
        return batch

    def _send_batches(self, batch: list[Pending]) -> None:
        """Make calls one after the other while messages wait. Runs in a thread of the executor."""
        while batch:
            unavailable = ApiError("queue_unavailable")
            outcomes: dict[Pending, str | ApiError] = {}
            again: list[Pending] = []
            try:
                again = self._send(batch, outcomes)
            except Exception:
                log.exception("unhandled exception")
                for pending in batch:
                    outcomes.setdefault(pending, unavailable)
            with self._lock:
                self._waiting.extendleft(reversed(again))  # in front, in their order
                if self._open and not self._may_start():
                    outcomes |= dict.fromkeys(self._waiting, unavailable)
                    self._waiting.clear()
                self._pending_bytes -= sum(pending.size for pending in outcomes)
            for pending, outcome in outcomes.items():
                if isinstance(outcome, str):
                    pending.message_id.set_result(outcome)
                else:
                    pending.message_id.set_exception(outcome)
            with self._lock:
                self._in_flight -= 1
                if batch is self._probe_batch:
                    self._probe_batch = None
                    self._probe_at = self._clock() + self.PROBE_SECONDS
                batch = self._next_batch()
                others = list(iter(self._next_batch, []))
            for other in others:
                self._executor.submit(self._send_batches, other)

    def _send(self, batch: list[Pending], outcomes: dict[Pending, str | ApiError]) -> list[Pending]:
        """Make one call, and add its outcomes. Returns the messages to send again, in order."""
        if attempts := batch[0].message_id.attempts:
            self._pause((1 + random.random()) * 0.025 * 2**attempts)  # noqa: S311
        began = self._clock()
        in_time = [pending for pending in batch if began < pending.deadline]
        again = list[Pending]()
        # The messages that failed, by cause and by whether they are sent again.
        failed: dict[tuple[str, bool], list[Pending]] = {}
        if late := [pending for pending in batch if pending not in in_time]:
            failed["out of time", False] = late
        if in_time:
            results = self._call(in_time, self._probe if batch is self._probe_batch else self._sqs)
            SQS_CALL_DURATION.observe(self._clock() - began)
            SQS_BATCH_SIZE.observe(len(in_time))
            label = result_of(results)
            SQS_CALLS[label].inc()
            # One message may be at fault: each is sent separately.
            is_whole = len(in_time) > 1 and all(result is results[0] for result in results)
            with self._lock:
                for pending, result in zip(in_time, results, strict=True):
                    pending.message_id.attempts += 1
                    pending.message_id.batch_size = len(in_time)
                    if isinstance(result, str):
                        outcomes[pending] = result
                        continue
                    temporary = is_temporary(result)
                    pending.send_separately |= is_whole and not temporary
                    # The call that opens the circuit is repeated, as the probe; a probe is not.
                    retried = (
                        (temporary or (is_whole and not is_about_the_queue(result)))
                        and not self._open
                        and pending.message_id.attempts < self.ATTEMPTS
                        and self._clock() < pending.deadline
                    )
                    failed.setdefault((detail_of(result), retried), []).append(pending)
                cause = next(iter(failed), ("", False))[0]
                if self._update_circuit(label, began, cause):
                    outcomes.update(dict.fromkeys(self._waiting, ApiError("queue_unavailable")))
                    self._waiting.clear()
        for (cause, retried), messages in failed.items():
            ids = [pending.request_id for pending in messages]
            extra = {"cause": cause, "messages": len(ids), "request_ids": ids}
            if retried:
                again += messages
                log.warning("messages not sent; they are sent again", extra=extra)
            else:
                # The queue's limit may have been lowered since it was read.
                too_large = "must be shorter than" in cause
                error = ApiError("message_too_large" if too_large else "queue_unavailable")
                outcomes.update(dict.fromkeys(messages, error))
                log.error("messages not sent", extra=extra)
        return sorted(again, key=batch.index)

    def _update_circuit(self, label: str, began: float, cause: str) -> bool:
        """Open or close the circuit after a call that began then; whether it opened. Locked."""
        now = self._clock()
        if label not in ("timeout", "unavailable"):
            self._failures, self._responded_at = 0, now
            if self._open:
                self._open = False
                SQS_CIRCUITS_OPEN.set(0)
                seconds = round(now - self._opened_at, 1)
                log.warning("SQS is back; circuit closed", extra={"seconds": seconds})
            return False
        self._failures += 1
        is_timeout = label == "timeout" and self._responded_at < began
        if self._open or not (is_timeout or self._failures >= self.FAILURES):
            return False
        self._open, self._opened_at, self._probe_at = True, now, now
        SQS_CIRCUITS_OPEN.set(1)
        text = "SQS is down; circuit open, messages are rejected until SQS responds"
        log.error(text, extra={"cause": cause})
        return True

    def _call(self, batch: list[Pending], sqs: Any) -> list[str | Exception]:
        """Each message's MessageId or its failure; the same for all if the call as one failed."""
        try:
            if len(batch) == 1:
                response = sqs.send_message(QueueUrl=self._queue_url, **batch[0].entry)
                response = {"Successful": [{"Id": "0", **response}]}
            else:
                entries = [{"Id": str(n), **pending.entry} for n, pending in enumerate(batch)]
                response = sqs.send_message_batch(QueueUrl=self._queue_url, Entries=entries)
            results: dict[str | None, str | Exception] = {}
            for failed in response.get("Failed", []):
                status = {"HTTPStatusCode": 400 if failed.get("SenderFault") else 500}
                error = {"Error": failed, "ResponseMetadata": status}
                results[failed.get("Id")] = ClientError(error, "SendMessageBatch")
            for sent in response.get("Successful", []):
                results[sent.get("Id")] = sent.get("MessageId", "")
            unknown = ValueError("the response has no MessageId")
            return [results.get(str(n)) or unknown for n in range(len(batch))]
        except Exception as error:  # a response may be malformed in any way
            return [error] * len(batch)


# --- Calls of AWS ---------------------------------------------------------------------------------


# libcurl's options that pycurl has no name for.
CURLOPT_SUPPRESS_CONNECT_HEADERS, CURLOPT_QUICK_EXIT = 265, 322
# libcurl's errors as boto3 calls them; any other is a ConnectionClosedError.
CURL_ERRORS: dict[int, type[BotoCoreError]] = {
    pycurl.E_COULDNT_RESOLVE_HOST: EndpointConnectionError,
    pycurl.E_COULDNT_CONNECT: EndpointConnectionError,
    pycurl.E_SSL_CONNECT_ERROR: SSLError,
    pycurl.E_PEER_FAILED_VERIFICATION: SSLError,
    pycurl.E_SSL_CACERT_BADFILE: SSLError,
}


class AwsClient:
    """The calls of SSM and SQS that the service makes, with the names of boto3's methods.

    libcurl makes the calls: it signs them, keeps connections, and ends each call `seconds` after
    its start, which includes the name lookup and the last byte of the response. boto3 needs five
    times the CPU, and has no timeout for a complete call. Region, endpoint and credentials come
    from boto3. Errors are botocore's: ClientError for an error of AWS, otherwise the kind of
    network failure.
    """

    CONNECT_SECONDS = 1.0
    MAX_RESPONSE_BYTES = 2**20  # ten results of a batch have 3 kB

    def __init__(
        self, service: str, region: str, credentials: Credentials, seconds: float = 3
    ) -> None:
        session = aws_session(region)
        # Used for metadata only. The dummy keys prevent a credential search.
        keys = {"aws_access_key_id": "-", "aws_secret_access_key": "-"}
        try:
            meta = boto3.Session(botocore_session=session).client(service, region, **keys).meta
        except (BotoCoreError, ValueError) as error:  # AWS's own variables and files
            detail = _secrets.sub("", str(error))
            raise SettingsError(f"The AWS configuration is unusable: {detail}") from None
        # Of AWS_ENDPOINT_URL, FIPS or dual-stack. A second slash would be signed otherwise than
        # sent.
        self.url = meta.endpoint_url.rstrip("/") + "/"
        self._credentials = credentials
        self._seconds = seconds
        metadata = meta.service_model.metadata
        self._headers = [
            f"Content-Type: application/x-amz-json-{metadata['jsonVersion']}",
            "Expect:",
        ]
        if "awsQueryCompatible" in metadata:  # SQS then sends the error codes that boto3 shows
            self._headers.append("X-Amzn-Query-Mode: true")
        # One thread at a time uses a handle, and none is made before the fork.
        self._handles: deque[tuple[pycurl.Curl, list[int]]] = deque()
        authorities = (
            session.get_config_variable("ca_bundle")
            or os.environ.get("REQUESTS_CA_BUNDLE")
            or certifi.where()
        )
        # libcurl reads other variables, and reads them otherwise, than boto3.
        self._proxy = proxy_of(self.url)
        self._options = {
            pycurl.URL: self.url,
            pycurl.POST: 1,
            pycurl.AWS_SIGV4: f"aws:amz:{meta.region_name}:{meta.service_model.signing_name}",
            pycurl.USERAGENT: f"{SERVICE}/{VERSION}",  # as a header it would be signed
            pycurl.HTTP_VERSION: pycurl.CURL_HTTP_VERSION_1_1,
            pycurl.CONNECTTIMEOUT_MS: int(self.CONNECT_SECONDS * 1000),
            pycurl.DNS_CACHE_TIMEOUT: 0,  # a lookup for each new connection, as in boto3
            pycurl.NOSIGNAL: 1,
            pycurl.TCP_KEEPALIVE: 1,
            pycurl.MAXFILESIZE: self.MAX_RESPONSE_BYTES,
            pycurl.CAINFO: authorities,
            pycurl.PROXY_CAINFO: authorities,
            pycurl.PROXY: self._proxy,
            pycurl.NOPROXY: "",
            CURLOPT_SUPPRESS_CONNECT_HEADERS: 1,
            # Otherwise a handle that is dropped waits for a lookup that hangs.
            CURLOPT_QUICK_EXIT: 1,
        }

    def within(self, seconds: float) -> AwsClient:
        """The same client, whose calls may take this long."""
        client = copy.copy(self)
        client._seconds = seconds
        return client

    def get_parameters(self, **given: Any) -> dict[str, Any]:
        return self._call("AmazonSSM.GetParameters", given, tries=2)

    def get_queue_attributes(self, **given: Any) -> dict[str, Any]:
        return self._call("AmazonSQS.GetQueueAttributes", given, tries=2)

    def send_message(self, **given: Any) -> dict[str, Any]:
        return self._call("AmazonSQS.SendMessage", given)

    def send_message_batch(self, **given: Any) -> dict[str, Any]:
        return self._call("AmazonSQS.SendMessageBatch", given)

    def _call(self, target: str, given: dict[str, Any], tries: int = 1) -> dict[str, Any]:
        """Make the call; where it changes nothing, a second time if that may help."""
        end = time.monotonic() + self._seconds
        while True:
            tries -= 1
            try:
                return self._call_once(target, json.dumps(given).encode(), end)
            except Exception as error:
                if not tries or not is_temporary(error) or time.monotonic() >= end:
                    raise

    def _call_once(self, target: str, body: bytes, end: float) -> dict[str, Any]:
        credentials = self._credentials.frozen()
        headers = [*self._headers, f"X-Amz-Target: {target}"]
        if credentials.token:
            headers.append(f"X-Amz-Security-Token: {credentials.token}")
        try:
            curl, sends = self._handles.pop()
        except IndexError:
            curl, sends = self._new_handle()
        head, parts = list[bytes](), list[bytes]()
        sends[0] = 0
        try:
            curl.setopt(pycurl.TIMEOUT_MS, max(1, int((end - time.monotonic()) * 1000)))
            curl.setopt(pycurl.USERNAME, credentials.access_key)
            curl.setopt(pycurl.PASSWORD, credentials.secret_key)
            curl.setopt(pycurl.HTTPHEADER, headers)
            curl.setopt(pycurl.POSTFIELDS, body)
            curl.setopt(pycurl.HEADERFUNCTION, head.append)
            curl.setopt(pycurl.WRITEFUNCTION, parts.append)
            curl.perform()
        except pycurl.error as error:
            # libcurl may report a timeout after it has received the complete response.
            size = sum(map(len, parts))
            if not size or curl.getinfo(pycurl.CONTENT_LENGTH_DOWNLOAD_T) != size:
                tunnel = curl.getinfo(pycurl.HTTP_CONNECTCODE) // 100 == 2
                raise self._failure(error, sends[0] > 0, tunnel) from None
        finally:
            status = curl.getinfo(pycurl.RESPONSE_CODE)
            # After an error too: libcurl repairs the handle, and dropping it may block.
            self._handles.append((curl, sends))
        content = b"".join(parts)
        if status < 300:
            return json.loads(content)  # type: ignore[no-any-return]
        if status == 407:  # without TLS there is no tunnel
            denied = pycurl.error(pycurl.E_COULDNT_CONNECT, "response 407")
            raise self._failure(denied, sent=False, tunnel=False)
        lines = (line.decode("latin-1").partition(":") for line in head)
        response = {
            "status_code": status,
            "headers": HeadersDict({name: value.strip() for name, _, value in lines}),
            "body": content,
        }
        failure = ClientError(create_parser("json").parse(response, None), target.partition(".")[2])
        if _is_about_credentials(cause_of(failure)):
            self._credentials.reject(credentials)
        raise failure

    def _new_handle(self) -> tuple[pycurl.Curl, list[int]]:
        curl, sends = pycurl.Curl(), [0]
        for option, value in self._options.items():
            curl.setopt(option, value)

        def before_sending(*_: object) -> int:
            # When a kept connection ends before the response, libcurl would send the request again
            # without a report: the queue could get a message twice.
            sends[0] += 1
            return int(sends[0] > 1)  # PREREQFUNC_OK, or PREREQFUNC_ABORT

        curl.setopt(pycurl.PREREQFUNCTION, before_sending)
        return curl, sends

    def _failure(self, error: pycurl.error, sent: bool, tunnel: bool) -> Exception:
        code, text = error.args[:2]
        kind = CURL_ERRORS.get(code, ConnectionClosedError)
        if code == pycurl.E_OPERATION_TIMEDOUT:
            kind = ReadTimeoutError if sent else ConnectTimeoutError
        shown = ProxyConnectionError if self._proxy and not sent and not tunnel else kind
        names = {"endpoint_url": self.url, "proxy_url": self._proxy, "error": ""}
        failure: Exception = (kind if kind in TIMEOUTS else shown)(**names)
        failure.args = (f"{shown(**names)} {text}",)
        return failure


# --- Credentials ----------------------------------------------------------------------------------


class CredentialProcess(subprocess.Popen[bytes]):
    """A profile's credential_process.

    On Linux it ends, children included, with this process or after a minute. botocore would wait
    without a limit, and show its error output, which may hold secrets.
    """

    LIMIT = "setpriv --pdeathsig TERM timeout --kill-after 1 60"

    def __init__(self, command: list[str], **given: Any) -> None:
        if shutil.which("setpriv") and shutil.which(command[0]):  # else the error names the file
            command = [*self.LIMIT.split(), *command]
        super().__init__(command, **given, stdin=subprocess.DEVNULL)

    def communicate(self, *given: Any) -> tuple[bytes, bytes]:
        output = super().communicate(*given)
        if self.returncode:
            text = f"status {self.returncode} (124: no end within 60 s); its errors are not shown"
            raise CredentialRetrievalError(provider="credential_process", error_msg=text)
        return output


def reject_mfa(_: str) -> NoReturn:
    text = "the profile has an mfa_serial, and a service cannot enter a code"
    raise CredentialRetrievalError(provider="assume-role", error_msg=text)


# botocore has no setting for these parameters of its providers.
botocore.credentials.ProcessProvider = functools.partial(
    botocore.credentials.ProcessProvider, popen=CredentialProcess
)
botocore.credentials.AssumeRoleProvider = functools.partial(
    botocore.credentials.AssumeRoleProvider, prompter=reject_mfa
)


def aws_session(region: str) -> botocore.session.Session:
    """A session with short timeouts for its own calls: a role's credentials come from STS.

    botocore itself reads AWS_DEFAULT_REGION, which EKS does not set beside AWS_REGION: calls would
    go to the global endpoint of STS.
    """
    session = botocore.session.get_session()
    session.set_config_variable("region", region)
    session.set_default_client_config(
        Config(connect_timeout=1, read_timeout=2, retries={"total_max_attempts": 1})
    )
    return session


# AWS's codes for credentials that it does not accept, in the spellings of SSM, SQS and STS.
_is_about_credentials = re.compile("Token|Signature|UnrecognizedClient|AccessKeyId").search
_is_key = re.compile("[!-~]+").fullmatch  # raises TypeError for a value that is not a text


class Credentials:
    """AWS credentials as boto3 finds them: environment, files, a command, or a role through STS.

    Any of these can hang, so a daemon thread finds and renews them. A call waits for the first ones
    only, and at most WAIT_SECONDS. Known ones stay in use while their renewal is in progress or
    fails. Others are searched for when AWS rejects the known ones, and while there are none.
    """

    WAIT_SECONDS = 2.0
    SEARCH_SECONDS = 5.0  # botocore renews a role's credentials from 15 minutes before they expire

    def __init__(self, region: str, pause: Callable[[float], None] = time.sleep) -> None:
        self._region, self._pause = region, pause
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._searched = threading.Event()
        self._found: Any = None
        self._rejected: Any = None
        self._problem: Exception = CredentialRetrievalError(
            provider="boto3", error_msg=f"none after {self.WAIT_SECONDS:g} s"
        )

    def frozen(self) -> Any:
        """Access key, secret key and session token. Raises what boto3 raised."""
        with self._lock:
            if self._thread is None:  # not before the fork: it would stay behind in the master
                self._thread = threading.Thread(target=self._keep, daemon=True)
                self._thread.start()
        if not self._searched.wait(self.WAIT_SECONDS):
            self._searched.set()  # later calls do not wait
        if self._found is None:
            raise self._problem.with_traceback(
                None
            )  # otherwise the traceback would grow with each request
        return self._found

    def reject(self, frozen: Any) -> None:
        """Search for others: AWS does not accept these."""
        self._rejected = frozen

    def _keep(self) -> None:
        source = None
        while True:
            try:
                if source is None or self._rejected == self._found:
                    self._rejected = None
                    source = aws_session(self._region).get_credentials()
                if source is None:
                    raise NoCredentialsError
                found = source.get_frozen_credentials()
                if not all(map(_is_key, (found.access_key, found.secret_key, found.token or "-"))):
                    text = "a key is empty, or has a space, a line end or a character beyond ASCII"
                    raise CredentialRetrievalError(provider=source.method, error_msg=text)
                self._found = found
            except Exception as error:  # a file or a response of STS may be malformed in any way
                source = None  # a file may be corrected
                named = isinstance(error, BotoCoreError | ClientError | OSError)
                if not named or type(error) is HTTPClientError:
                    error = CredentialRetrievalError(provider="boto3", error_msg=detail_of(error))
                self._problem = error
                if self._found:
                    log.warning("credentials not renewed", extra={"cause": detail_of(error)})
            self._searched.set()
            self._pause(self.SEARCH_SECONDS)


# --- Causes of failures ---------------------------------------------------------------------------


# AWS's error codes for throttling, and for a request that arrived too slowly.
_is_passing = re.compile(
    "Throttl|TooManyRequests|LimitExceeded|SlowDown|RequestTimeout|PriorRequestNotComplete"
).search

# A URL's user name and password, and output of servers and commands that are not AWS's.
_secrets = re.compile(
    "(?<=//).*@|(?<=Invalid endpoint: ).*@|(?<=from container metadata): .*|(?<=version) '.*'"
)
# Their texts quote names, types and positions, never a value; other ValueErrors may quote any.
HARMLESS = (AttributeError, KeyError, RuntimeError, TypeError, JSONDecodeError, UnicodeDecodeError)
_is_harmless = re.compile("Auth token value|Invalid endpoint|No closing|Unsupported host").match


def proxy_of(url: str) -> str:
    """The proxy that boto3 takes for the URL, or an empty text."""
    proxy = str(get_environ_proxies(url).get(url.partition(":")[0], ""))
    return f"http://{proxy}" if proxy and "//" not in proxy else proxy


def cause_of(error: Exception) -> str:
    """AWS's error code, or the text of a failure on the way there."""
    if isinstance(error, ClientError):
        return str(error.response.get("Error", {}).get("Code", "Unknown"))
    return detail_of(error)


def detail_of(error: Any) -> str:
    """The cause for the log, without secrets: the text of AWS, botocore, the operating system or
    Python. If it may quote a secret, the type of the error and the function that raised it.
    """
    if isinstance(error, ClientError):  # the next lines may quote the request with its token
        return str(error).partition("\n")[0]
    if type(error) is HTTPClientError:  # any other error, wrapped
        error = error.kwargs["error"]
    name, text = type(error).__name__, _secrets.sub("", " ".join(str(error).split()))
    known = getattr(error, "kwargs", {})
    # botocore does not distinguish a proxy that closes or hangs from the endpoint behind it.
    if proxy := "proxy_url" not in known and proxy_of(known.get("endpoint_url", "")):
        text += f' through proxy URL: "{_secrets.sub("", proxy)}"'
    if found := re.search(r"Tunnel connection failed: [\w ]+", str(known.get("error"))):
        text += f" {found[0]}"
    if isinstance(error, OSError | BotoCoreError):
        return text
    if isinstance(error, HARMLESS) or _is_harmless(text):
        return f"{name}: {text}"
    frames = traceback.extract_tb(error.__traceback__)
    return f"{name} in {frames[-1].name}" if frames else name


def is_temporary(error: Exception) -> bool:
    """Whether the same call may succeed later: no valid response, a 5xx, or throttling."""
    if not isinstance(error, ClientError):
        return True
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500)
    return status >= 500 or status == 429 or bool(_is_passing(cause_of(error)))


# --- Metrics --------------------------------------------------------------------------------------


# A call of SQS takes 5 to 30 ms, and 3 s at most. A request takes 11 s at most in a thread and the
# publisher: 3 s to read the token, 5 s until the last call for its message starts, 3 s for that.
BUCKETS = (0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 3, 5, 11)


def _counter(name: str, text: str, label: str, label_values: list[str]) -> dict[str, Any]:
    """A counter for each label value, there from the start: Prometheus sees no increase in a series
    that only begins with its first event.
    """
    counter = prometheus_client.Counter(name, text, [label])
    return {value: counter.labels(value) for value in label_values}


RESPONSES = _counter(
    "email_processor_requests",
    "Responses by outcome: success, or the error code.",
    "outcome",
    ["success", *ERRORS],
)
REQUEST_DURATION = prometheus_client.Histogram(
    "email_processor_request_duration_seconds",
    "Seconds from the start of POST /process in a thread to its response.",
    buckets=BUCKETS,
)
REQUESTS_IN_FLIGHT = prometheus_client.Gauge(
    "email_processor_requests_in_flight",
    "POST /process requests in a thread, or with a message that waits for SQS.",
    multiprocess_mode="livesum",
)
SQS_CALLS = _counter(
    "email_processor_sqs_calls",
    "SendMessage and SendMessageBatch calls by result, retries included.",
    "result",
    ["success", "partial", "timeout", "unavailable", "refused"],
)
SQS_CALL_DURATION = prometheus_client.Histogram(
    "email_processor_sqs_call_duration_seconds",
    "Seconds of a SendMessage or SendMessageBatch call.",
    buckets=BUCKETS,
)
SQS_BATCH_SIZE = prometheus_client.Histogram(
    "email_processor_sqs_batch_size",
    "Messages in a SendMessage or SendMessageBatch call.",
    buckets=range(1, 11),
)
SQS_CIRCUITS_OPEN = prometheus_client.Gauge(
    "email_processor_sqs_circuits_open",
    "Workers whose circuit is open: they reject messages at once.",
    multiprocess_mode="livesum",
)
TOKEN_READS = _counter(
    "email_processor_token_reads",
    "Reads of the token from SSM by result.",
    "result",
    ["success", "failure"],
)
TOKEN_READ_TIMESTAMP = prometheus_client.Gauge(
    "email_processor_token_read_timestamp_seconds",
    "Unix time of the last successful token read, in the worker whose read is oldest; 0 if none.",
    multiprocess_mode="livemin",
)
TOKENS_ACCEPTED = prometheus_client.Counter(
    "email_processor_tokens_accepted",
    "Requests with a valid token, by the parameter that holds the token.",
    ["parameter"],
)
LOG_LINES_DROPPED = prometheus_client.Counter(
    "email_processor_log_lines_dropped",
    "Log lines dropped because standard output did not take them in time.",
)
BUILD_INFO = prometheus_client.Gauge(
    "email_processor_build_info",
    "Always 1. The labels identify the build that the pod runs.",
    ["version", "commit"],
    multiprocess_mode="livemax",  # of all workers together, so that it is 1 and not their number
).labels(VERSION, COMMIT)
BUILD_INFO.set(1)


def metrics_text() -> bytes:
    """All workers of the pod together where there are several, else this process."""
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return prometheus_client.generate_latest()
    registry = prometheus_client.CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return prometheus_client.generate_latest(registry)


# --- Request ids, traces and log lines ------------------------------------------------------------


_is_request_id = re.compile(r"[A-Za-z0-9._-]{1,128}").fullmatch


def request_id_of(offered: str) -> str:
    """The caller's request id when it is well-formed, otherwise a new one.

    It is no secret, so it need not cost a system call.
    """
    return offered if _is_request_id(offered) else f"{random.getrandbits(128):032x}"


_HEX = "[0-9A-Fa-f]"
_trace_fields = re.compile(
    rf"(?:^|[;,])\s*+(Root=1-{_HEX}{{8}}-{_HEX}{{24}}|Parent={_HEX}{{16}}|Sampled=[01])"
    r"(?=\s*+(?:[;,]|$))",
    re.ASCII,
).findall


def trace_of(x_amzn_trace_id: str) -> tuple[str, str | None]:
    """The X-Ray header that goes with the message, and the id of the trace for the log.

    It has the first well-formed Root, Parent and Sampled: the ALB preserves any other field that a
    client adds, and SQS takes only an X-Ray header. Without a Root: the empty text and None.
    """
    first = {found[0]: found for found in reversed(_trace_fields(x_amzn_trace_id))}
    if "R" not in first:
        return "", None
    header = ";".join(first[initial] for initial in "RPS" if initial in first)
    return header, first["R"].removeprefix("Root=")


def logging_config(level: str) -> dict[str, Any]:
    """The logging.config.dictConfig of the whole process: JSON lines on standard output."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {
            "json": {
                "()": "pythonjsonlogger.json.JsonFormatter",
                "fmt": ["levelname", "name", "message"],
                "rename_fields": {"levelname": "level", "name": "logger"},
                "timestamp": "time",
                "json_serializer": short_json,
            }
        },
        "handlers": {"stdout": {"()": LogHandler, "filters": [add_request], "formatter": "json"}},
        # LOG_LEVEL applies to this module only: at DEBUG, botocore logs decrypted tokens and
        # message bodies, and Gunicorn logs malformed requests.
        "root": {"level": "INFO", "handlers": ["stdout"]},
        "loggers": {
            "email_processor": {"level": level},
            # Gunicorn's logger does not propagate by default.
            "gunicorn.error": {"level": "INFO", "propagate": True},
            # botocore warns with a traceback each time that credentials are not renewed.
            "botocore": {"level": "ERROR"},
        },
    }


def add_request(record: logging.LogRecord) -> bool:
    """A logging filter: adds the ids of the request that the thread handles."""
    if not hasattr(record, "request_id") and has_app_context() and "exchange" in g:
        line = g.exchange.line
        vars(record).update({n: line[n] for n in ("request_id", "trace_id") if line[n]})
    return True


# With its end. A pipe takes no more than 4,096 bytes at once: parts of longer lines, from several
# workers, would mix.
LOG_LINE_BYTES = 4000


def short_json(fields: Any, **options: Any) -> str:
    """json.dumps for a log line: its longest values are cut until it fits."""
    line = json.dumps(fields, **options)
    if len(line) >= LOG_LINE_BYTES:
        fields, longest = json.loads(line), LOG_LINE_BYTES
        while len(line) >= LOG_LINE_BYTES and longest > 2:
            longest = longest * 3 // 4
            line = json.dumps(shortened(fields, longest))
    return line


def shortened(value: Any, longest: int) -> Any:
    """The value with the middle of long strings and the ends of long lists cut out."""
    if isinstance(value, dict):
        return {name: shortened(item, longest) for name, item in value.items()}
    if isinstance(value, list):
        kept, cut = value[: longest // 50], value[longest // 50 :]
        items = [shortened(item, longest) for item in kept]
        return [*items, f"[{len(cut)} more]"] if cut else items
    if isinstance(value, str) and len(value) > longest:
        half, cut_characters = longest // 2, len(value) - longest
        return f"{value[:half]} [{cut_characters} characters cut] {value[-half:]}"
    return value


class LogHandler(QueueHandler):
    """Writes log lines to standard output. No caller waits for a reader of the pipe.

    From start() on, a thread writes the lines. Before the fork the caller writes them, if the pipe
    has room. Lines that do not fit are dropped and counted; a later line reports their number.
    """

    def __init__(self, lines: int = 1000) -> None:
        super().__init__(queue.SimpleQueue())
        self._lines = lines  # that may wait for the thread
        self._queued = self._written = self._dropped = self._reported = 0
        self._thread: threading.Thread | None = None
        out: Any = getattr(sys.stdout, "buffer", None)  # None when it was closed before the start
        self._out = getattr(out, "raw", out)  # a full buffer would delay the exit

    def start(self) -> None:
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def prepare(self, record: logging.LogRecord) -> bytes:
        return f"{self.format(record)}\n".encode()

    def enqueue(self, line: Any) -> None:
        if self._thread is None and self._has_room():
            self._write(line)
        elif self._thread and self._queued - self._written < self._lines:
            self._queued += 1
            self.queue.put_nowait(line)
        else:
            self._drop()

    def flush(self) -> None:
        """At the exit: wait until the thread has written its lines, at most one second."""
        end = time.monotonic() + 1
        while self._thread and self._written < self._queued and time.monotonic() < end:
            time.sleep(0.01)

    def _has_room(self) -> bool:
        try:
            return bool(select.select([], [self._out], [], 0)[1])
        except (OSError, TypeError, ValueError):  # it is no file of the system's
            return True

    def _work(self) -> None:
        while True:
            lines = [self.queue.get()]
            time.sleep(0.05)  # to wake for each line would cost a message a tenth more CPU
            while self.queue.qsize():  # type: ignore[attr-defined]
                lines.append(self.queue.get())
            for line in lines:
                self._write(line)
                self._written += 1

    def _write(self, line: bytes) -> None:
        try:
            self._put(line)
            if dropped := self._dropped - self._reported:
                told = {"levelname": "WARNING", "msg": "log lines dropped", "lines": dropped}
                self._put(self.prepare(logging.makeLogRecord({"name": log.name, **told})))
                self._reported += dropped
        except (AttributeError, OSError, TypeError, ValueError):  # closed, or full and non-blocking
            self._drop()

    def _put(self, data: bytes) -> None:
        while data:
            data = data[operator.index(self._out.write(data)) :]

    def _drop(self) -> None:
        LOG_LINES_DROPPED.inc()
        with self.lock:  # type: ignore[union-attr]
            self._dropped += 1


def log_start(settings: Settings, workers: int, threads: int | None) -> None:
    """Write the first log line of the pod: the build, and the settings that matter most."""
    build = {"version": VERSION, "commit": COMMIT, "queue": settings.sqs_queue_url}
    log.info("service starts", extra={**build, "workers": workers, "threads": threads})


def record_response(path: str, status: int, client: str = "", **line: Any) -> None:
    """Count a response and write its log line; no other place does either."""
    RESPONSES[line.get("error") or "success"].inc()
    quiet = path in ("/health", "/ready", "/metrics")
    level = logging.ERROR if status >= 500 else logging.DEBUG if quiet else logging.INFO
    if log.isEnabledFor(level):
        line = {name: value for name, value in line.items() if value is not None}
        line["client"] = client
        log.log(level, "request", extra={**line, "path": path, "status": status})


# --- The page /docs -------------------------------------------------------------------------------


_DOCS_SCRIPT = 'SwaggerUIBundle({url: "/openapi.json", dom_id: "#docs", deepLinking: true});'
_DOCS_PAGE = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{SERVICE}</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="/docs/swagger-ui.css">
</head>
<body>
<div id="docs"></div>
<script src="/docs/swagger-ui-bundle.js"></script>
<script>{_DOCS_SCRIPT}</script>
</body>
</html>
"""
_DOCS_SCRIPT_HASH = b64encode(hashlib.sha256(_DOCS_SCRIPT.encode()).digest()).decode()
_DOCS_POLICY = (
    f"default-src 'none'; script-src 'self' 'sha256-{_DOCS_SCRIPT_HASH}'; "
    "style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


# --- Create the application -----------------------------------------------------------------------


def create_app(
    settings: Settings | None = None,
    ssm: Any = None,
    sqs: Any = None,
    executor: Executor | None = None,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
) -> Service:
    """The WSGI application.

    Without settings they are read from the environment (SettingsError). Tests bring clients: those
    of boto3, or anything with their methods. This calls no AWS and starts no thread: Service.start
    does, or the first request.
    """
    settings = settings or Settings.from_environ(os.environ)
    # The calls that publish, and one thread each for GetParameters and GetQueueAttributes.
    executor = executor or ThreadPoolExecutor(settings.sqs_calls_in_flight + 2, "aws")
    credentials = Credentials(settings.aws_region)
    ssm = ssm or AwsClient("ssm", settings.aws_region, credentials)
    probe = sqs  # a client from outside has its own timeouts
    if sqs is None:
        sqs = AwsClient("sqs", settings.aws_region, credentials)
        probe = sqs.within(0.75)  # seconds: an SQS that is down delays no message longer
    cache_seconds = settings.token_cache_seconds
    tokens = TokenStore(ssm, settings.token_ssm_parameter, cache_seconds, executor, clock)
    publisher = Publisher(
        sqs, probe, settings.sqs_queue_url, settings.sqs_calls_in_flight, executor, clock, pause
    )
    return Service(settings, tokens, publisher, make_tracing(settings))


def make_tracing(settings: Settings) -> Any:
    """A tracing.Tracing if OpenTelemetry's variables turn tracing on, or None."""

    def value(name: str) -> str:
        return os.environ.get(f"OTEL_{name}", "").strip().lower()

    endpoint = value("EXPORTER_OTLP_ENDPOINT") or value("EXPORTER_OTLP_TRACES_ENDPOINT")
    if not endpoint or value("SDK_DISABLED") == "true" or value("TRACES_EXPORTER") == "none":
        return None
    from tracing import Tracing  # OpenTelemetry takes memory and time to load

    build = {"service.version": VERSION, "vcs.ref.head.revision": COMMIT}
    return Tracing(settings.sqs_queue_url, {"service.name": SERVICE, **build})


# --- Local server ---------------------------------------------------------------------------------


EXAMPLE_TOKEN = "$DJISA<$#45ex3RtYr"  # noqa: S105 - the documentation's; opens only the emulator


def start_embedded_aws(settings: Settings) -> Settings:
    """Start moto's server in a thread, with the queue and the example token.

    Sets the environment variables that lead there, and returns the settings with its queue.
    """
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    # Nothing of a developer's own configuration may lead past the emulator.
    for name in list(os.environ):
        if name.upper().startswith("AWS_") or name.upper().endswith("_PROXY"):
            del os.environ[name]
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_REGION": settings.aws_region,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        "HOME": os.devnull,  # botocore reads models of services from .aws/models
        "NO_PROXY": "*",
    }
    botocore.loaders.Loader.CUSTOMER_DATA_PATH = os.devnull
    session = boto3.Session(region_name=settings.aws_region)
    session.client("ssm").put_parameter(
        Name=settings.token_ssm_parameter[0],
        Value=EXAMPLE_TOKEN,
        Type="SecureString",
        Overwrite=True,
    )
    queue = session.client("sqs").create_queue(QueueName="dev-CP-queue")
    os.environ["SQS_QUEUE_URL"] = queue["QueueUrl"]
    return Settings.from_environ(os.environ)


def explain_embedded_aws(settings: Settings) -> str:
    url = f"http://localhost:{settings.port}"
    return f"""
{SERVICE} listens on {url} (API: {url}/docs), with an embedded AWS. Send a message:

  curl {url}/process -H 'Content-Type: application/json' -d '{{"data": {{
    "email_subject": "Happy new year!", "email_sender": "John doe",
    "email_timestream": "1693561101", "email_content": "Just want to say... Happy new year!!!"}},
    "token": "{EXAMPLE_TOKEN}"}}'

See it in the queue:

  curl {os.environ["AWS_ENDPOINT_URL"]} \\
    --aws-sigv4 aws:amz:{settings.aws_region}:sqs -u test:test \\
    -H 'Content-Type: application/x-amz-json-1.0' -H 'X-Amz-Target: AmazonSQS.ReceiveMessage' \\
    -d '{{"QueueUrl": "{settings.sqs_queue_url}",
         "MessageAttributeNames": ["All"], "VisibilityTimeout": 0}}'

Check it from outside:

  API_TOKEN='{EXAMPLE_TOKEN}' ./test.sh {url}

Stop it with Ctrl-C.
"""


def listen(port: int) -> socket.socket:
    """A socket for IPv4 and IPv6, where the machine has both. Raises OSError."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def serve_without_gunicorn(settings: Settings) -> None:
    logging.config.dictConfig(logging_config(settings.log_level))
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it would log each request once more
    log_start(settings, workers=1, threads=None)  # a thread for each connection
    with listen(settings.port) as sock:
        host, app = sock.getsockname()[0], create_app(settings)
        server = make_server(host, settings.port, app, threaded=True, fd=sock.fileno())
    app.start()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    with suppress(KeyboardInterrupt):
        server.serve_forever()
    if app.tracing:
        app.tracing.stop()


def print_in_thread(text: str) -> None:
    """Print without waiting for a reader, also at the exit."""

    def write() -> None:
        with suppress(OSError, ValueError):  # it is closed
            os.write(sys.stdout.fileno(), text.encode())

    threading.Thread(target=write, daemon=True).start()


def serve_beside_embedded_aws(settings: Settings) -> None:
    """Run Gunicorn in a child process, until it or this process ends."""
    stopped: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: stopped.append(number))
    os.environ["STOP_WITH_PROCESS"] = str(os.getpid())
    # In a new session: Gunicorn reloads on the SIGHUP of a closing terminal.
    server = subprocess.Popen(
        [sys.executable, "-m", "gunicorn"], cwd=PROJECT, start_new_session=True
    )
    explained = False
    while server.poll() is None and not stopped:
        if not explained:
            with suppress(OSError), socket.create_connection(("127.0.0.1", settings.port)):
                print_in_thread(explain_embedded_aws(settings))
                explained = True
        time.sleep(0.1)
    server.terminate()
    sys.exit(server.wait())


def main() -> None:
    """Serve with Gunicorn as in production; with an embedded AWS when SQS_QUEUE_URL is unset.

    Gunicorn needs POSIX. Elsewhere Flask's own server takes its place.
    """
    embedded = not os.environ.get("SQS_QUEUE_URL", "").strip()
    if embedded:
        os.environ["SQS_QUEUE_URL"] = "http://embedded/queue"  # until it is made
    settings = Settings.from_environ(os.environ)
    try:
        listen(settings.port).close()
    except OSError as error:
        sys.exit(f"Port {settings.port}: {error.strerror}. Choose another, such as PORT=8081.")
    if embedded:
        try:
            settings = start_embedded_aws(settings)
        except ImportError:
            sys.exit("SQS_QUEUE_URL is required: the embedded AWS needs requirements-dev.txt.")
    if find_spec("fcntl") is None:
        if embedded:
            print(explain_embedded_aws(settings), flush=True)
        serve_without_gunicorn(settings)
    elif embedded:
        serve_beside_embedded_aws(settings)
    else:
        os.chdir(PROJECT)
        os.execv(sys.executable, [sys.executable, "-m", "gunicorn"])  # noqa: S606


if __name__ == "__main__":
    main()
