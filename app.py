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
    """The commit of a Git checkout, or "unknown" without Git."""
    command = ["git", f"--git-dir={checkout / '.git'}", "rev-parse", "--verify", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603
    except OSError:  # no git command
        return "unknown"
    return "unknown" if done.returncode else done.stdout.strip()


# The image sets COMMIT; it contains neither git nor a checkout.
COMMIT = os.environ.get("COMMIT", "").strip() or commit_of(PROJECT)

log = logging.getLogger("email_processor")


# --- Settings -------------------------------------------------------------------------------------


class SettingsError(SystemExit):
    """Invalid environment variables. As for any SystemExit, Python prints the message and exits."""


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
    # GetParameters takes ten names in a call. A name may refer to a secret of Secrets Manager,
    # which allows more characters than Parameter Store.
    if len(names) > 10 or not all(re.fullmatch(r"[\w./:+=@-]+", n, re.ASCII) for n in names):
        raise ValueError
    return names


@dataclass(frozen=True)
class Settings:
    """The configuration. A field's environment variable is its name in capitals.

    A new setting is a new field, and a row in README.md: docs/tables.py writes the row.
    """

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
        """Read and check every variable. An empty variable counts as unset.

        Raises SettingsError, with a line for each invalid variable.
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


# Every error response: code -> (status, message). The README, openapi.yaml and the metric's labels
# have the same codes; tests compare them.
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
    """An error response. `code` is a key of ERRORS; `cause` is for the log only."""

    def __init__(
        self,
        code: str,
        message: str | None = None,
        errors: list[dict[str, str]] | None = None,
        cause: str | None = None,
    ) -> None:
        super().__init__(code)
        self.code = code
        self.status, default = ERRORS[code]
        self.message = message or default
        self.errors = errors
        self.cause = cause

    def body(self, request_id: str) -> dict[str, Any]:
        """The JSON body of the response."""
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
    """A request, and the fields of the log line that its response writes."""

    environ: dict[str, Any]  # of WSGI
    log_fields: dict[str, Any]
    trace_header: str  # of the message, for X-Ray
    started: float
    is_measured: bool = False  # in the metrics of POST /process
    delivery: Delivery | None = None
    spans: Any = ()  # empty if the trace is not sampled


class Service(Flask):
    """The WSGI application: routes, the path of a request, and its response."""

    def __init__(
        self, settings: Settings, tokens: TokenStore, publisher: Publisher, tracing: Any = None
    ) -> None:
        super().__init__(__name__, static_folder=None)
        self.settings, self.tokens, self.publisher = settings, tokens, publisher
        self.tokens_accepted = {n: TOKENS_ACCEPTED.labels(n) for n in settings.token_ssm_parameter}
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
        """Match path and method only.

        Flask's own adapter also rejects malformed Host headers, and requests for a WebSocket.
        """
        if request is None:
            return None
        return self.url_map.bind("", path_info=request.path, default_method=request.method)

    def ensure_sync(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function itself. Flask would check at each call whether it is a coroutine."""
        return function

    def make_response(self, response: Any) -> Any:
        """The response itself. Flask would accept only instances of its Response."""
        return response

    def start(self) -> None:
        """Start tracing, and a thread that refreshes every second. Call this after the fork."""
        if self.tracing:
            self.tracing.start()

        def keep_fresh() -> None:
            while True:
                try:
                    self.refresh()
                except Exception as error:
                    if "interpreter shutdown" in str(error):  # of the executor, at the exit
                        return
                    log.exception("unhandled exception")
                time.sleep(1)

        threading.Thread(target=keep_fresh, daemon=True).start()

    def refresh(self) -> None:
        """Start the reads that are due: the tokens, and the queue's limit until it is known."""
        self.tokens.refresh()
        self.publisher.refresh()

    def begin(self) -> None:
        """Flask calls this before each request."""
        environ = request.environ
        g.exchange = self.new_exchange(environ)
        if not environ["PATH_INFO"].startswith("/") or environ["PATH_INFO"].startswith("//"):
            raise ApiError("not_found")  # Werkzeug would take //process for /process

    def new_exchange(self, environ: dict[str, Any]) -> Exchange:
        """The exchange of a request, with its ids, and its span if tracing is on."""
        trace_header, trace_id = trace_of(environ.get("HTTP_X_AMZN_TRACE_ID", ""))
        request_id = request_id_of(environ.get("HTTP_X_REQUEST_ID", ""))
        log_fields = {"request_id": request_id, "trace_id": trace_id}
        exchange = Exchange(environ, log_fields, trace_header, time.perf_counter())
        if self.tracing:
            self.tracing.begin(exchange)
        return exchange

    def end(self, response: Response | DeferredResponse) -> Response | DeferredResponse:
        """Flask calls this after each request."""
        if isinstance(response, DeferredResponse):
            return response  # process() finishes it when the delivery is done
        return self.finish(g.exchange, response)

    def finish(self, exchange: Exchange, response: Response) -> Response:
        """Count, log and trace the response, once for each request.

        Any thread may call this, so it must not use `request` or `g`.
        """
        environ, log_fields = exchange.environ, exchange.log_fields
        path, status = header_text(environ["PATH_INFO"]), response.status_code
        response.headers["X-Request-Id"] = log_fields["request_id"]
        forwarded = environ.get("HTTP_X_FORWARDED_FOR", "")
        # The ALB appends the client's address; the client may have sent the rest.
        client = forwarded.rpartition(",")[2].strip() or environ.get("REMOTE_ADDR", "")
        client = client.removeprefix("::ffff:")  # of IPv4, on a socket for both
        duration = time.perf_counter() - exchange.started
        if exchange.is_measured:
            REQUESTS_IN_FLIGHT.dec()
            REQUEST_DURATION.observe(duration)
        RESPONSES[log_fields.get("error") or "success"].inc()
        is_probe = path in ("/health", "/ready", "/metrics")
        level = logging.ERROR if status >= 500 else logging.DEBUG if is_probe else logging.INFO
        if log.isEnabledFor(level):
            line = {name: value for name, value in log_fields.items() if value is not None}
            line |= {
                "method": environ["REQUEST_METHOD"],
                "path": path,
                "client": client,
                "status": status,
                "duration_ms": round(duration * 1000, 2),
            }
            log.log(level, "request", extra=line)
        if exchange.spans:
            self.tracing.end(exchange, status, client)
        return response

    def process(self) -> DeferredResponse:
        """POST /process. The response is made when the delivery is done."""
        exchange = g.exchange
        exchange.is_measured = True
        REQUESTS_IN_FLIGHT.inc()
        delivery = exchange.delivery = self.take_message(exchange)

        def respond() -> Response:
            try:
                message_id = exchange.log_fields["message_id"] = delivery.result()
            except Exception as error:
                return self.finish(exchange, self.error_response(exchange, error))
            body = {
                "status": "success",
                "message": "Email data processed and queued",
                "message_id": message_id,
            }
            return self.finish(exchange, json_response(body))

        return DeferredResponse(delivery, respond)

    def take_message(self, exchange: Exchange) -> Delivery:
        """Read and check the request, and publish its message. Raises ApiError."""
        # Flask's `request` is a proxy, and each use of a proxy takes time.
        received: Request = request._get_current_object()  # type: ignore[attr-defined]
        body = read_body(received, self.settings.max_request_bytes)
        check_media_type(received)
        members, data = parse_request(body)
        token = members.get("token")
        if token is None or token == "":
            raise ApiError("token_required")
        parameter = self.tokens.parameter_of(token) if isinstance(token, str) else None
        if parameter is None:
            raise ApiError("invalid_token")
        exchange.log_fields["token_parameter"] = parameter
        self.tokens_accepted[parameter].inc()
        validate_data(members.pop("data", None))  # pop: frees the parsed data
        if exchange.spans:
            self.tracing.publish(exchange)
        return self.publisher.publish(
            Message(
                body=ascii_json(data),
                request_id=exchange.log_fields["request_id"],
                idempotency_key=header_text(exchange.environ.get("HTTP_IDEMPOTENCY_KEY", "")),
                trace_header=exchange.trace_header,
            )
        )

    def health(self) -> Response:
        """GET /health, for the liveness probe: no call of AWS."""
        now = datetime.now(UTC).replace(tzinfo=None).isoformat(timespec="microseconds")
        return json_response({"status": "healthy", "service": SERVICE, "timestamp": now})

    def ready(self) -> Response:
        """GET /ready, for the startup probe: 503 until a token and the queue's limit are known."""
        self.refresh()
        missing = {}
        if not self.tokens.ready:
            missing["token_store_unavailable"] = (
                f"The token has not been read yet: {self.tokens.not_ready_reason}"
            )
        if not self.publisher.max_message_bytes:
            reason = self.publisher.last_failure or "sqs:GetQueueAttributes is in progress"
            missing["queue_unavailable"] = f"The queue has not been reached yet: {reason}"
        if missing:
            raise ApiError(next(iter(missing)), "; ".join(missing.values()))
        return json_response({"status": "ready", "service": SERVICE})

    def metrics(self) -> Response:
        """GET /metrics, for Prometheus: all workers of the pod together."""
        return Response(metrics_text(), content_type=prometheus_client.CONTENT_TYPE_LATEST)

    def index(self) -> Response:
        """GET /: the build and the endpoints."""
        endpoints = sorted(
            f"{method} {rule.rule}"
            for rule in self.url_map.iter_rules()
            if not rule.arguments
            for method in (rule.methods or set()) - {"HEAD"}
        )
        build = {"version": VERSION, "commit": COMMIT}
        return json_response({"service": SERVICE, **build, "endpoints": endpoints})

    def openapi(self) -> Response:
        """GET /openapi.json: the description of the API."""
        return Response(openapi_document(), mimetype="application/json")

    def docs(self) -> Response:
        """GET /docs: a page to read and try the API."""
        return Response(_DOCS_PAGE, headers={"Content-Security-Policy": _DOCS_POLICY})

    def docs_asset(self, asset: str) -> Response:
        """GET /docs/<asset>: a file of Swagger UI."""
        kind = "text/css" if asset.endswith(".css") else "text/javascript"
        return Response(docs_file(asset), mimetype=kind, headers={"Cache-Control": "max-age=3600"})

    def handle_error(self, error: Exception) -> Response:
        """Flask calls this for an exception of begin(), of a view or of routing."""
        return self.error_response(g.exchange, error)

    def response_without_flask(self, error: Exception, environ: dict[str, Any]) -> Response:
        """The response to a request for which Flask gives none, such as malformed HTTP."""
        exchange = self.new_exchange(environ)
        return self.finish(exchange, self.error_response(exchange, error))

    def error_response(self, exchange: Exchange, error: Exception) -> Response:
        """The response for an exception: 500, except for ApiError and Werkzeug's 4xx."""
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
        exchange.log_fields |= {"error": api_error.code, "cause": api_error.cause}
        body = api_error.body(exchange.log_fields["request_id"])
        response = json_response(body, api_error.status)
        response.headers.update(headers)
        return response


class DeferredResponse:
    """A response that is made when a future is done: a WSGI application and its iterable.

    Under any WSGI server, the iteration waits for the future, and then calls start_response, as
    PEP 3333 allows. worker.py iterates in a callback of the future, so that no thread waits.
    """

    def __init__(self, future: Future[str], make_response: Callable[[], Response]) -> None:
        self.add_done_callback = future.add_done_callback
        self._make_response = make_response  # waits for the future

    def __call__(self, environ: Any, start_response: Any) -> Any:
        self._arguments = environ, start_response
        return self

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._make_response()(*self._arguments))


def json_response(body: Mapping[str, Any], status: int = 200) -> Response:
    """A response with a JSON body."""
    return Response(json.dumps(body), status, content_type="application/json")


# --- Read the body --------------------------------------------------------------------------------


def read_body(request: Request, limit: int) -> bytes:
    """The body of the request, at most `limit` bytes.

    Raises ApiError: request_too_large, request_timeout, overloaded, or invalid_json for a truncated
    body.
    """
    if error := request.environ.get("worker.error"):  # worker.py has dropped the body
        raise error
    # Another server than worker.py gives the application every body.
    declared, body = request.content_length or 0, b""
    truncated = "The request body is truncated or not well-formed HTTP."
    if declared <= limit:
        try:
            body = request.stream.read(limit + 1)
        except Exception:  # Gunicorn's and Werkzeug's, for a truncated body or a malformed chunk
            raise ApiError("invalid_json", truncated) from None
    if max(declared, len(body)) > limit:
        raise ApiError("request_too_large", f"The request body is larger than {limit} bytes.")
    if len(body) < declared:
        raise ApiError("invalid_json", truncated)
    return body


def check_media_type(request: Request) -> None:
    """Check that the body is JSON without compression. Raises ApiError unsupported_media_type."""
    if not request.is_json:
        raise ApiError("unsupported_media_type")
    for variable, header, plain in (
        ("HTTP_CONTENT_ENCODING", "Content-Encoding", "identity"),
        ("HTTP_TRANSFER_ENCODING", "Transfer-Encoding", "chunked"),
    ):
        codings = request.environ.get(variable, "").lower().split(",")
        if any(coding.strip() not in ("", plain) for coding in codings):
            message = f"The {header} must be {plain} or absent: send the body uncompressed."
            raise ApiError("unsupported_media_type", message)


# --- Parse ----------------------------------------------------------------------------------------


MAX_JSON_DEPTH, MAX_JSON_VALUES = 100, 10_000


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


# The queue gets the original text, and parsed numbers are only validated. So 20 digits of an
# integer are enough (int() raises for more than 4,300), and every fraction may become NaN.
_scan_value = json.JSONDecoder(
    parse_int=lambda digits: int(digits[:20]),
    parse_float=lambda _: math.nan,
    parse_constant=_reject_constant,
).scan_once  # type: ignore[attr-defined]
_space = re.compile(r"[ \t\n\r]*").match
_space_and_brace = re.compile(r"[ \t\n\r]*\{").match
_to_lists = bytes.maketrans(b"{}", b"[]")
_all_but_brackets = bytes(set(range(256)) - set(b"[]"))


def parse_request(body: bytes) -> tuple[dict[str, Any], str]:
    """The members of the request's JSON object, and the original text of its "data".

    Parsing and writing "data" would change values: 1.10 to 1.1, and 1e400 to Infinity.

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
        # One emoji makes Python store four bytes for each character of the text. The parser needs
        # up to 6.25 bytes more for each character of a string.
        if sys.getsizeof(text) + 6.25 * len(text) > 16 * 2**20:
            text = ascii_json(text)
        brace = _space_and_brace(text)
        if not brace:
            raise ApiError("invalid_json", "The request body is not a JSON object.")
        # The json module's parser in Python: the C version does not report a member's position.
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

    Brackets and commas in strings do not count. If the body is not JSON, the counts are right up to
    the first error, where the parser stops.

    Raises ApiError invalid_json.
    """
    brackets = body.count(b"[") + body.count(b"{")
    if brackets <= MAX_JSON_DEPTH and brackets + body.count(b",") < MAX_JSON_VALUES:
        return  # the common case: even with the strings, the counts are within the limits
    # Remove escaped characters, and split at quotes: parts[0::2] is the text outside of strings.
    # 10,000 strings and 10,000 names have 40,000 quotes, which make 40,001 parts.
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


# A character beyond ASCII, and up to 99,999 characters behind it, without control characters. Valid
# JSON has these only outside of strings, so check_json_limits also limits the matches.
_not_ascii = re.compile(r"[^\x00-\x7f][^\x00-\x1f]{,99999}")


def ascii_json(text: str) -> str:
    """The same JSON with the characters beyond ASCII escaped: SQS rejects some of them.

    Escapes long parts at once: a function call for each character would take 370 ms for 2 MiB.
    """

    def escape(found: re.Match[str]) -> str:
        # encode_basestring_ascii also escapes the part's backslashes and quotes: undo that.
        return encode_basestring_ascii(found[0]).replace(r"\\", "\\").replace(r"\"", '"')[1:-1]

    if text.isascii():
        return text
    # `count` limits the time for a text that is not JSON. With the default MAX_REQUEST_BYTES, valid
    # JSON has fewer parts.
    return _not_ascii.sub(escape, text, count=2 * MAX_JSON_VALUES + 100)


# --- Token store ----------------------------------------------------------------------------------


class TokenStore:
    """A cache of the tokens in SSM Parameter Store.

    SSM allows 40 reads a second for a whole account and region, so requests share reads. A read
    starts when the cache is nearly `cache_seconds` old, and for an unknown token, which may be new.
    One read is in progress at a time, and reads are READ_INTERVAL seconds apart (or
    `cache_seconds`, if that is less). Only a request with an unknown token waits for a read. While
    SSM fails, the last known tokens stay valid. A deleted parameter is not a failure: the next read
    makes its token invalid.
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
        self._tokens: tuple[tuple[str, bytes], ...] = ()  # (the parameter's configured name, token)
        self._warned: set[tuple[str, str]] = set()
        self._attempted_at = self._due_at = -math.inf
        self._read_in_progress: Future[None] | None = None
        self._is_failing = False
        self.ready = False  # a token was read at least once
        self.not_ready_reason = "SSM has not responded yet"

    def parameter_of(self, token: str) -> str | None:
        """The configured name of the parameter that holds the token; None for an invalid token.

        Raises ApiError token_store_unavailable, if no token was ever read.
        """
        name = self._matches(token)
        if name is None or self._clock() >= self._due_at:
            was_failing = self._is_failing
            read, is_new = self._start_read()
            # While SSM fails, at most one request waits for it at a time.
            if read and name is None and (is_new or not was_failing):
                read.result()
                name = self._matches(token)
        if not self.ready:
            raise ApiError("token_store_unavailable")
        return name

    def refresh(self) -> None:
        """Start a read if the tokens are not known, or nearly `cache_seconds` old."""
        if self._clock() >= self._due_at:
            self._start_read()

    def _matches(self, token: str) -> str | None:
        given = token.encode("utf-8", "surrogatepass")
        # Compare with every token: the time does not reveal which token matched.
        names = [name for name, known in self._tokens if hmac.compare_digest(given, known)]
        return names[0] if names else None

    def _start_read(self) -> tuple[Future[None] | None, bool]:
        """The read in progress, if any, and whether this call has started it."""
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
            self._is_failing = True
            self.not_ready_reason = f"ssm:GetParameters failed: {cause_of(error)}"
            TOKEN_READS["failure"].inc()
            instead = "the last known token stays valid" if self.ready else "no token is known yet"
            log.warning(f"token not read; {instead}", extra={"cause": detail_of(error)})
            self._attempted_at = self._clock()  # the end: a failed read may take seconds
            return
        if missing:
            log.warning("token parameter missing in SSM", extra={"parameters": missing})
        empty = [name for name in self._names if name not in missing]
        self.not_ready_reason = "; ".join(
            f"{text} {', '.join(names)}"
            for text, names in (("SSM does not have", missing), ("there is no token in", empty))
            if names
        )
        TOKEN_READ_TIMESTAMP.set_to_current_time()
        # In the configured order: if several parameters hold one token, the first is reported.
        self._tokens = tuple(sorted(tokens, key=lambda pair: self._names.index(pair[0])))
        self.ready = self.ready or bool(tokens)
        if self.ready:
            # After 70 % to 90 % of the time, so that workers do not read at the same moment.
            self._due_at = now + self._cache_seconds * (0.7 + 0.2 * self._jitter())
        self._attempted_at = self._clock()
        self._is_failing = False
        TOKEN_READS["success"].inc()

    def _configured_name(self, parameter: dict[str, Any]) -> str:
        """The configured name, which may be an ARN, and may end in a version or a label.

        SSM returns version or label in Selector; emulators omit it.
        """
        spelled = {parameter.get("Name"), parameter.get("ARN")}
        selected = {f"{name}{parameter.get('Selector', '')}" for name in spelled}
        exact = [name for name in self._names if name in selected]
        close = [name for name in self._names if name.rpartition(":")[0] in spelled]
        return (exact or close or self._names)[0]

    def _tokens_of(self, parameter: dict[str, Any]) -> list[str]:
        """A parameter's tokens. Logs a warning for a probable mistake in the value, once."""
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
    """Whether the character is white space, or a control or format character such as U+200B."""
    return character.isspace() or unicodedata.category(character) in ("Cc", "Cf")


# Letters and marks without a visible shape: Unicode's Default_Ignorable_Code_Point, from
# DerivedCoreProperties.txt 17.0, and the blank Braille pattern.
_is_blank = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2065\u2800\u3164\ufe00-\ufe0f"
    "\uffa0\ufff0-\ufff8\U000e0000-\U000e0fff]"
).match


def is_visible(character: str) -> bool:
    """Whether the character has a visible shape."""
    return not is_space(character) and not _is_blank(character)


def without_space(text: str) -> str:
    """The text without leading and trailing spaces."""
    at = [index for index, character in enumerate(text) if not is_space(character)]
    return text[at[0] : at[-1] + 1] if at else ""


def validate_data(data: Any) -> None:
    """Check the four fields. Raises ApiError invalid_data or invalid_timestamp, with all problems.

    A further required text needs its name in FIELDS, in openapi.yaml and in every example.
    """
    if not isinstance(data, dict):
        raise ApiError("invalid_data", '"data" is missing or not an object.')
    problems = {}
    for name in FIELDS:
        value = data.get(name)
        if value is None:
            problems[name] = f"{name} is missing"
        elif isinstance(value, str):
            # The second check is for a long text that begins with spaces.
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
    """The rule that the value breaks, or None for a valid Unix timestamp in seconds.

    Valid are a JSON integer and a string of ASCII digits.
    """
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
    """The content of an SQS message."""

    body: str  # JSON in ASCII
    request_id: str
    idempotency_key: str = ""
    trace_header: str = ""

    def send_arguments(self, fifo: bool) -> tuple[dict[str, Any], int]:
        """The arguments of SendMessage, and the message's size in bytes.

        SQS counts the body and the names, types and values of the attributes, except system
        attributes.
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
        """The idempotency key, or a new id.

        Never the request id: messages may share it, and SQS would drop all except the first. SQS
        accepts 1 to 128 letters, digits and ASCII punctuation; any other key is hashed.
        """
        key = self.idempotency_key or f"{random.getrandbits(128):032x}"
        if re.fullmatch(r"[!-~]{1,128}", key):
            return key
        return hashlib.sha256(key.encode()).hexdigest()


TIMEOUTS = (ConnectTimeoutError, ReadTimeoutError)


def concerns_every_message(error: Exception) -> bool:
    """Whether credentials, permissions or the queue are the cause: separate retries cannot help."""
    status = getattr(error, "response", {}).get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status == 403 or cause_of(error).endswith(("NonExistentQueue", "QueueDoesNotExist"))


def call_result(results: list[str | Exception]) -> str:
    """The metric's label for the results of a call's messages."""
    failures = [result for result in results if isinstance(result, Exception)]
    if len(failures) < len(results):
        return "partial" if failures else "success"
    if not all(is_temporary(failure) for failure in failures):
        return "refused"
    return "timeout" if isinstance(failures[0], TIMEOUTS) else "unavailable"


class Delivery(Future[str]):
    """The future of a message: the MessageId once SQS has the message, or an ApiError."""

    attempts = 0
    batch_size = 0  # messages in the last call


@dataclass(slots=True, eq=False)
class Pending:
    """A message that waits for SQS, or is in flight."""

    entry: dict[str, Any]
    size: int  # bytes
    request_id: str
    deadline: float
    send_separately: bool = False  # SQS rejected a batch that contained it
    delivery: Delivery = field(default_factory=Delivery)


class Publisher:
    """Sends messages to the queue. Messages that arrive together share a call (group commit).

    A call costs nearly the same for ten messages as for one. Up to SMALL_BATCH_CALLS calls start at
    once, without a timer. Beyond that, messages wait, and share the next call; further calls, up to
    SQS_CALLS_IN_FLIGHT, start only when ten messages wait. With one call instead of two, a slow
    call would delay every other message; with three, batches would be smaller.

    The circuit of a worker opens when a call times out and no other call got a response in that
    time, or when FAILURES_TO_OPEN calls in a row fail with a temporary error. While the circuit is
    open, messages fail at once with queue_unavailable, except those of a probe: one call at a time,
    with a shorter timeout. The first probe may start at once, a later one PROBE_SECONDS after the
    end of the last. A valid response closes the circuit, unless its status is a 5xx or throttling.

    A worker sends the messages of a FIFO queue in the order of their arrival, except that a retried
    message comes after the other messages of its batch. A client that waits for each response keeps
    its order.
    """

    MAX_ENTRIES, MAX_BYTES = 10, 1_048_576  # of one SendMessageBatch
    MAX_PENDING_BYTES = 2**25  # of a worker: 128 MiB of a pod's 512 MiB for four workers
    SMALL_BATCH_CALLS = 2  # calls in flight while fewer than MAX_ENTRIES messages wait
    MAX_ATTEMPTS = 3
    RETRY_SECONDS = 5.0  # from arrival to the last attempt's start
    FAILURES_TO_OPEN = 10  # if three calls in ten fail by chance, ten in a row come once in 170,000
    PROBE_SECONDS = 0.25
    READ_INTERVAL = 5.0  # seconds between two reads of MaximumMessageSize

    def __init__(
        self,
        sqs: Any,
        probe_client: Any,  # the same client with a shorter timeout
        queue_url: str,
        calls_in_flight: int,
        executor: Executor,  # of the calls
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._sqs, self._probe_client, self._queue_url = sqs, probe_client, queue_url
        self._fifo = queue_url.endswith(".fifo")
        self._max_calls = 1 if self._fifo else calls_in_flight  # FIFO: one call keeps the order
        self._executor = executor
        self._clock, self._pause = clock, pause
        self.max_message_bytes: int | None = None  # the queue's; None until it is known
        self.last_failure: str | None = None  # of reading max_message_bytes
        self._read_lock = threading.Lock()
        self._read_at = -math.inf
        self._lock = threading.Lock()  # for all attributes below
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
        """Add the message to those that wait for a call, and return without waiting.

        This method or the delivery raises ApiError: message_too_large (by the queue's
        MaximumMessageSize), queue_unavailable, or overloaded.
        """
        entry, size = message.send_arguments(self._fifo)
        pending = Pending(entry, size, message.request_id, self._clock() + self.RETRY_SECONDS)
        if self.max_message_bytes and size <= self.max_message_bytes:
            self._add(pending)
        else:
            self._executor.submit(self._add_after_read, pending)
        return pending.delivery

    def read_limit(self) -> None:
        """Read MaximumMessageSize, unless a read is in progress or READ_INTERVAL has not passed."""
        if not self._read_lock.acquire(blocking=False):
            return
        try:
            if self._clock() - self._read_at < self.READ_INTERVAL:
                return
            self._read_at = self._clock()
            response = self._sqs.get_queue_attributes(
                QueueUrl=self._queue_url, AttributeNames=["MaximumMessageSize"]
            )
            self.max_message_bytes = int(response["Attributes"]["MaximumMessageSize"])
            self.last_failure = None
        except Exception as error:  # a malformed response may raise any exception
            self.last_failure = f"sqs:GetQueueAttributes failed: {cause_of(error)}"
            log.error("queue not reached", extra={"cause": detail_of(error)})
        finally:
            self._read_lock.release()

    def refresh(self) -> None:
        """Start a read of MaximumMessageSize until it is known."""
        if not self.max_message_bytes:
            self._executor.submit(self.read_limit)

    def _add_after_read(self, pending: Pending) -> None:
        """Read the limit again before rejecting a message: the queue's owner may have raised it."""
        self.read_limit()
        try:
            # While the limit is not known, SQS decides.
            if self.max_message_bytes and pending.size > self.max_message_bytes:
                reason = f"has {pending.size} bytes, the queue takes {self.max_message_bytes}."
                raise ApiError("message_too_large", f"The message {reason}")
            self._add(pending)
        except ApiError as error:
            pending.delivery.set_exception(error)

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
        """Whether a further call may start now. The caller holds the lock."""
        if self._open:
            return self._probe_batch is None and self._clock() >= self._probe_at
        is_full = len(self._waiting) >= self.MAX_ENTRIES
        max_calls = self._max_calls if is_full else min(self.SMALL_BATCH_CALLS, self._max_calls)
        return self._in_flight < max_calls

    def _next_batch(self) -> list[Pending]:
        """The messages of the next call; empty if no call may start. The caller holds the lock."""
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
        """Make one call after another while messages wait. Runs in a thread of the executor."""
        while batch:
            unavailable = ApiError("queue_unavailable")
            outcomes: dict[Pending, str | ApiError] = {}
            retries: list[Pending] = []
            try:
                retries = self._send(batch, outcomes)
            except Exception:
                log.exception("unhandled exception")
                for pending in batch:
                    outcomes.setdefault(pending, unavailable)
            with self._lock:
                self._waiting.extendleft(reversed(retries))  # in front, in their order
                if self._open and not self._may_start():
                    outcomes |= dict.fromkeys(self._waiting, unavailable)
                    self._waiting.clear()
                self._pending_bytes -= sum(pending.size for pending in outcomes)
            for pending, outcome in outcomes.items():
                if isinstance(outcome, str):
                    pending.delivery.set_result(outcome)
                else:
                    pending.delivery.set_exception(outcome)
            with self._lock:
                self._in_flight -= 1
                if batch is self._probe_batch:
                    self._probe_batch = None
                    self._probe_at = self._clock() + self.PROBE_SECONDS
                batch = self._next_batch()
                further_batches = list(iter(self._next_batch, []))
            for further in further_batches:
                self._executor.submit(self._send_batches, further)

    def _send(self, batch: list[Pending], outcomes: dict[Pending, str | ApiError]) -> list[Pending]:
        """Make one call.

        Adds the final outcomes to `outcomes`, and returns the messages to retry, in order.
        """
        if attempts := batch[0].delivery.attempts:
            self._pause((1 + random.random()) * 0.025 * 2**attempts)  # noqa: S311
        began = self._clock()
        in_time = [pending for pending in batch if began < pending.deadline]
        retries = list[Pending]()
        failed: dict[tuple[str, bool], list[Pending]] = {}  # by (cause, whether to retry)
        if late := [pending for pending in batch if began >= pending.deadline]:
            failed["out of time", False] = late
        if in_time:
            is_probe = batch is self._probe_batch
            results = self._call(in_time, self._probe_client if is_probe else self._sqs)
            SQS_CALL_DURATION.observe(self._clock() - began)
            SQS_BATCH_SIZE.observe(len(in_time))
            label = call_result(results)
            SQS_CALLS[label].inc()
            # SQS may have rejected the call for one of its messages: retry each separately.
            has_call_failed = len(in_time) > 1 and all(result is results[0] for result in results)
            with self._lock:
                for pending, result in zip(in_time, results, strict=True):
                    pending.delivery.attempts += 1
                    pending.delivery.batch_size = len(in_time)
                    if isinstance(result, str):
                        outcomes[pending] = result
                        continue
                    temporary = is_temporary(result)
                    pending.send_separately |= has_call_failed and not temporary
                    can_succeed = temporary or (
                        has_call_failed and not concerns_every_message(result)
                    )
                    retry = can_succeed and self._may_retry(pending)
                    failed.setdefault((detail_of(result), retry), []).append(pending)
                cause = next(iter(failed), ("", False))[0]
                if self._update_circuit(label, began, cause):
                    outcomes.update(dict.fromkeys(self._waiting, ApiError("queue_unavailable")))
                    self._waiting.clear()
        for (cause, retry), messages in failed.items():
            ids = [pending.request_id for pending in messages]
            extra = {"cause": cause, "messages": len(ids), "request_ids": ids}
            if retry:
                retries += messages
                log.warning("messages not sent; they are sent again", extra=extra)
            else:
                # The queue's limit may have been lowered since it was read.
                too_large = "must be shorter than" in cause
                error = ApiError("message_too_large" if too_large else "queue_unavailable")
                outcomes.update(dict.fromkeys(messages, error))
                log.error("messages not sent", extra=extra)
        return sorted(retries, key=batch.index)

    def _may_retry(self, pending: Pending) -> bool:
        """Whether circuit, attempts and time allow a retry. The caller holds the lock.

        The call that opens the circuit is retried, as the first probe. A failed probe is not.
        """
        return (
            not self._open
            and pending.delivery.attempts < self.MAX_ATTEMPTS
            and self._clock() < pending.deadline
        )

    def _update_circuit(self, label: str, began: float, cause: str) -> bool:
        """Open or close the circuit after a call. Returns whether this call opened it.

        The caller holds the lock.
        """
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
        if self._open or not (is_timeout or self._failures >= self.FAILURES_TO_OPEN):
            return False
        self._open, self._opened_at, self._probe_at = True, now, now
        SQS_CIRCUITS_OPEN.set(1)
        text = "SQS is down; circuit open, messages are rejected until SQS responds"
        log.error(text, extra={"cause": cause})
        return True

    def _call(self, batch: list[Pending], sqs: Any) -> list[str | Exception]:
        """Each message's MessageId or failure. If the call itself failed, all have that failure."""
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


# Options of libcurl without a name in pycurl.
CURLOPT_SUPPRESS_CONNECT_HEADERS, CURLOPT_QUICK_EXIT = 265, 322
# libcurl's errors by boto3's names. Any other error is a ConnectionClosedError.
CURL_ERRORS: dict[int, type[BotoCoreError]] = {
    pycurl.E_COULDNT_RESOLVE_HOST: EndpointConnectionError,
    pycurl.E_COULDNT_CONNECT: EndpointConnectionError,
    pycurl.E_SSL_CONNECT_ERROR: SSLError,
    pycurl.E_PEER_FAILED_VERIFICATION: SSLError,
    pycurl.E_SSL_CACERT_BADFILE: SSLError,
}


class AwsClient:
    """A client of SSM or SQS, with the names of boto3's methods.

    libcurl signs and makes the calls, and keeps connections open. A call has one deadline,
    `seconds` after its start, which includes name lookup and the last byte of the response. boto3
    needs five times the CPU, and has no deadline for a complete call. Region, endpoint and
    credentials come from boto3. The methods raise botocore's errors: ClientError for an error
    response of AWS, otherwise a BotoCoreError such as ConnectTimeoutError.
    """

    CONNECT_SECONDS = 1.0
    MAX_RESPONSE_BYTES = 2**20  # the response to a batch of ten has 3 kB

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
        # One slash at the end: libcurl signs a second one differently from what it sends.
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
        # One thread at a time uses a handle. Handles are made after the fork.
        self._handles: deque[tuple[pycurl.Curl, list[int]]] = deque()
        authorities = (
            session.get_config_variable("ca_bundle")
            or os.environ.get("REQUESTS_CA_BUNDLE")
            or certifi.where()
        )
        # libcurl would take the proxy from other variables than boto3.
        self._proxy = proxy_of(self.url)
        self._options = {
            pycurl.URL: self.url,
            pycurl.POST: 1,
            pycurl.AWS_SIGV4: f"aws:amz:{meta.region_name}:{meta.service_model.signing_name}",
            pycurl.USERAGENT: f"{SERVICE}/{VERSION}",  # libcurl signs headers, and not this option
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
            # Without this option, the destructor of a handle waits for a name lookup that hangs.
            CURLOPT_QUICK_EXIT: 1,
        }

    def with_timeout(self, seconds: float) -> AwsClient:
        """The same client with another timeout for its calls."""
        client = copy.copy(self)
        client._seconds = seconds
        return client

    def get_parameters(self, **arguments: Any) -> dict[str, Any]:
        """SSM's GetParameters."""
        return self._call("AmazonSSM.GetParameters", arguments, attempts=2)

    def get_queue_attributes(self, **arguments: Any) -> dict[str, Any]:
        """SQS's GetQueueAttributes."""
        return self._call("AmazonSQS.GetQueueAttributes", arguments, attempts=2)

    def send_message(self, **arguments: Any) -> dict[str, Any]:
        """SQS's SendMessage, without retries: Publisher makes them."""
        return self._call("AmazonSQS.SendMessage", arguments)

    def send_message_batch(self, **arguments: Any) -> dict[str, Any]:
        """SQS's SendMessageBatch, without retries: Publisher makes them."""
        return self._call("AmazonSQS.SendMessageBatch", arguments)

    def _call(self, target: str, arguments: dict[str, Any], attempts: int = 1) -> dict[str, Any]:
        """Make the call. After a temporary error, call again until the attempts or the time end."""
        deadline = time.monotonic() + self._seconds
        body = json.dumps(arguments).encode()
        while True:
            attempts -= 1
            try:
                return self._attempt(target, body, deadline)
            except Exception as error:
                if not attempts or not is_temporary(error) or time.monotonic() >= deadline:
                    raise

    def _attempt(self, target: str, body: bytes, deadline: float) -> dict[str, Any]:
        credentials = self._credentials.current()
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
            curl.setopt(pycurl.TIMEOUT_MS, max(1, int((deadline - time.monotonic()) * 1000)))
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
            # Keep the handle also after an error: it is reusable, and its destructor may block.
            self._handles.append((curl, sends))
        content = b"".join(parts)
        if status < 300:
            return json.loads(content)  # type: ignore[no-any-return]
        if status == 407:  # the proxy of an http:// endpoint needs credentials
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
            self._credentials.report_rejected(credentials)
        raise failure

    def _new_handle(self) -> tuple[pycurl.Curl, list[int]]:
        curl, sends = pycurl.Curl(), [0]
        for option, value in self._options.items():
            curl.setopt(option, value)

        def before_sending(*_: object) -> int:
            # When a kept connection closes before the response, libcurl sends the request again by
            # itself: the queue could get a message twice.
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
        arguments = {"endpoint_url": self.url, "proxy_url": self._proxy, "error": ""}
        failure: Exception = (kind if kind in TIMEOUTS else shown)(**arguments)
        failure.args = (f"{shown(**arguments)} {text}",)
        return failure


def proxy_of(url: str) -> str:
    """The URL of the proxy that boto3 would use for this URL, or an empty text."""
    proxy = str(get_environ_proxies(url).get(url.partition(":")[0], ""))
    return f"http://{proxy}" if proxy and "//" not in proxy else proxy


# --- Credentials ----------------------------------------------------------------------------------


class CredentialProcess(subprocess.Popen[bytes]):
    """A profile's credential_process.

    On Linux the command and its children end with this process, and after a minute at the latest.
    botocore has no timeout, and logs the command's error output, which may hold secrets.
    """

    LIMIT = "setpriv --pdeathsig TERM timeout --kill-after 1 60"

    def __init__(self, command: list[str], **options: Any) -> None:
        # A missing command runs without setpriv, so that the error names the command.
        if shutil.which("setpriv") and shutil.which(command[0]):
            command = [*self.LIMIT.split(), *command]
        super().__init__(command, **options, stdin=subprocess.DEVNULL)

    def communicate(self, *arguments: Any) -> tuple[bytes, bytes]:
        """Wait for the end. Raises CredentialRetrievalError for any exit status but 0."""
        output = super().communicate(*arguments)
        if self.returncode:
            text = f"status {self.returncode} (124: timeout of 60 s); error output is not logged"
            raise CredentialRetrievalError(provider="credential_process", error_msg=text)
        return output


def reject_mfa(_: str) -> NoReturn:
    """botocore calls this to ask for a code of multi-factor authentication."""
    text = "the profile has an mfa_serial, and a service cannot enter a code"
    raise CredentialRetrievalError(provider="assume-role", error_msg=text)


# botocore has no settings for these parameters.
botocore.credentials.ProcessProvider = functools.partial(
    botocore.credentials.ProcessProvider, popen=CredentialProcess
)
botocore.credentials.AssumeRoleProvider = functools.partial(
    botocore.credentials.AssumeRoleProvider, prompter=reject_mfa
)


def aws_session(region: str) -> botocore.session.Session:
    """A session with short timeouts for its calls of STS.

    By itself, botocore reads AWS_DEFAULT_REGION and ignores AWS_REGION.
    """
    session = botocore.session.get_session()
    session.set_config_variable("region", region)
    session.set_default_client_config(
        Config(connect_timeout=1, read_timeout=2, retries={"total_max_attempts": 1})
    )
    return session


# AWS's error codes for invalid credentials, in the spellings of SSM, SQS and STS.
_is_about_credentials = re.compile("Token|Signature|UnrecognizedClient|AccessKeyId").search
_is_key = re.compile("[!-~]+").fullmatch  # TypeError for a value that is not a string


class Credentials:
    """AWS credentials as boto3 finds them: environment, files, a command, or a role through STS.

    Each source can hang, so a daemon thread finds and renews the credentials. Calls wait only for
    the first search, at most WAIT_SECONDS. Credentials stay in use while their renewal is in
    progress or fails. The thread searches again after AWS rejects the credentials, and as long as
    there are none.
    """

    WAIT_SECONDS = 2.0
    CHECK_SECONDS = 5.0  # between two checks; botocore renews 15 minutes before the expiry

    def __init__(self, region: str, pause: Callable[[float], None] = time.sleep) -> None:
        self._region, self._pause = region, pause
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._searched = threading.Event()
        self._found: Any = None
        self._rejected: Any = None
        self._last_failure: Exception = CredentialRetrievalError(
            provider="boto3", error_msg=f"none after {self.WAIT_SECONDS:g} s"
        )

    def current(self) -> Any:
        """Access key, secret key and session token. Raises the last search's BotoCoreError."""
        with self._lock:
            if self._thread is None:  # started here, after the fork: threads are not forked
                self._thread = threading.Thread(target=self._renew, daemon=True)
                self._thread.start()
        if not self._searched.wait(self.WAIT_SECONDS):
            self._searched.set()  # later calls do not wait
        if self._found is None:
            # Without the old traceback, to which each raise adds frames.
            raise self._last_failure.with_traceback(None)
        return self._found

    def report_rejected(self, credentials: Any) -> None:
        """Search again, because AWS has rejected these credentials."""
        self._rejected = credentials

    def _renew(self) -> None:
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
            except Exception as error:  # a malformed file or response may raise any exception
                source = None  # search again: the file may be corrected
                is_known = isinstance(error, BotoCoreError | ClientError | OSError)
                if not is_known or type(error) is HTTPClientError:
                    error = CredentialRetrievalError(provider="boto3", error_msg=detail_of(error))
                self._last_failure = error
                if self._found:
                    log.warning("credentials not renewed", extra={"cause": detail_of(error)})
            self._searched.set()
            self._pause(self.CHECK_SECONDS)


# --- Causes of failures ---------------------------------------------------------------------------


# AWS's error codes for throttling, and for a request that arrived too slowly.
_is_temporary_code = re.compile(
    "Throttl|TooManyRequests|LimitExceeded|SlowDown|RequestTimeout|PriorRequestNotComplete"
).search

# User name and password in a URL, and output of commands and of servers other than AWS.
_secrets = re.compile(
    "(?<=//).*@|(?<=Invalid endpoint: ).*@|(?<=from container metadata): .*|(?<=version) '.*'"
)
# The texts of these errors quote names, types and positions. Other ValueErrors may quote secrets.
SAFE_TO_LOG = (
    AttributeError,
    KeyError,
    RuntimeError,
    TypeError,
    JSONDecodeError,
    UnicodeDecodeError,
)
_is_safe_to_log = re.compile("Auth token value|Invalid endpoint|No closing|Unsupported host").match


def cause_of(error: Exception) -> str:
    """AWS's error code, or the text of a failure without a response of AWS."""
    if isinstance(error, ClientError):
        return str(error.response.get("Error", {}).get("Code", "Unknown"))
    return detail_of(error)


def detail_of(error: Any) -> str:
    """The error's text for the log, without secrets.

    If the text may quote a secret: the error's type, and the function that raised it.
    """
    if isinstance(error, ClientError):  # further lines may quote the request with its token
        return str(error).partition("\n")[0]
    if type(error) is HTTPClientError:  # wraps an error that is unknown to botocore
        error = error.kwargs["error"]
    name, text = type(error).__name__, _secrets.sub("", " ".join(str(error).split()))
    known = getattr(error, "kwargs", {})
    # botocore reports a proxy that closes or hangs as if it were the endpoint.
    if proxy := "proxy_url" not in known and proxy_of(known.get("endpoint_url", "")):
        text += f' through proxy URL: "{_secrets.sub("", proxy)}"'
    if found := re.search(r"Tunnel connection failed: [\w ]+", str(known.get("error"))):
        text += f" {found[0]}"
    if isinstance(error, OSError | BotoCoreError):
        return text
    if isinstance(error, SAFE_TO_LOG) or _is_safe_to_log(text):
        return f"{name}: {text}"
    frames = traceback.extract_tb(error.__traceback__)
    return f"{name} in {frames[-1].name}" if frames else name


def is_temporary(error: Exception) -> bool:
    """Whether a retry may succeed: there was no valid response, or a 5xx, or throttling."""
    if not isinstance(error, ClientError):
        return True
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500)
    return status >= 500 or status == 429 or bool(_is_temporary_code(cause_of(error)))


# --- Metrics --------------------------------------------------------------------------------------


# Seconds. A call of SQS takes 5 to 30 ms, and at most 3 s. A request takes at most 11 s: 3 s to
# read the token, 5 s until the last call for its message starts (RETRY_SECONDS), 3 s for the call.
BUCKETS = (0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 3, 5, 11)


def _counter(name: str, text: str, label: str, label_values: list[str]) -> dict[str, Any]:
    """A counter for each label value.

    The series exist from the start: Prometheus sees no increase in a series that begins at 1.
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
    """The metrics in Prometheus's text format. Under Gunicorn: of all workers together."""
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return prometheus_client.generate_latest()
    registry = prometheus_client.CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return prometheus_client.generate_latest(registry)


# --- Request ids, traces and log lines ------------------------------------------------------------


_is_request_id = re.compile(r"[A-Za-z0-9._-]{1,128}").fullmatch


def request_id_of(offered: str) -> str:
    """The caller's request id if it is valid, otherwise a new one.

    Not from the operating system's random source: an id is no secret, and a system call costs time.
    """
    return offered if _is_request_id(offered) else f"{random.getrandbits(128):032x}"


def header_text(value: str) -> str:
    """The text of a header's value in UTF-8. WSGI gives each byte as a character.

    SQS rejects U+FFFE and U+FFFF: a value with one of them is not decoded.
    """
    if value.isascii():
        return value.strip()
    with suppress(UnicodeDecodeError):
        text = value.encode("latin-1").decode()
        value = value if re.search("[\ufffe\uffff]", text) else text
    return value.strip()


_HEX = "[0-9A-Fa-f]"
_trace_fields = re.compile(
    rf"(?:^|[;,])\s*+(Root=1-{_HEX}{{8}}-{_HEX}{{24}}|Parent={_HEX}{{16}}|Sampled=[01])"
    r"(?=\s*+(?:[;,]|$))",
    re.ASCII,
).findall


def trace_of(x_amzn_trace_id: str) -> tuple[str, str | None]:
    """The X-Ray header for the message, and the trace id for the log.

    The header has the first valid Root, Parent and Sampled. The ALB preserves other fields of a
    client, and SQS rejects them. Without a valid Root: an empty text and None.
    """
    first = {found[0]: found for found in reversed(_trace_fields(x_amzn_trace_id))}
    if "R" not in first:
        return "", None
    header = ";".join(first[initial] for initial in "RPS" if initial in first)
    return header, first["R"].removeprefix("Root=")


def logging_config(level: str) -> dict[str, Any]:
    """The argument of logging.config.dictConfig: JSON lines on standard output."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {
            "json": {
                "()": "pythonjsonlogger.json.JsonFormatter",
                "fmt": ["levelname", "name", "message"],
                "rename_fields": {"levelname": "level", "name": "logger"},
                "timestamp": "time",
                "json_serializer": truncated_json,
            }
        },
        "handlers": {"stdout": {"()": LogHandler, "filters": [add_request], "formatter": "json"}},
        # LOG_LEVEL applies to the service only: at DEBUG, botocore logs decrypted tokens and
        # message bodies, and Gunicorn logs malformed requests.
        "root": {"level": "INFO", "handlers": ["stdout"]},
        "loggers": {
            "email_processor": {"level": level},
            # Gunicorn's logger does not propagate by default.
            "gunicorn.error": {"level": "INFO", "propagate": True},
            # botocore warns with a traceback each time a renewal of credentials fails.
            "botocore": {"level": "ERROR"},
        },
    }


def add_request(record: logging.LogRecord) -> bool:
    """A logging filter that adds the ids of the thread's current request to a record."""
    if not hasattr(record, "request_id") and has_app_context() and "exchange" in g:
        ids = {name: g.exchange.log_fields[name] for name in ("request_id", "trace_id")}
        vars(record).update({name: value for name, value in ids.items() if value})
    return True


# Line end included. A write of up to 4,096 bytes to a pipe is atomic: the parts of longer lines
# would mix with the lines of other workers.
LOG_LINE_BYTES = 4000


def truncated_json(fields: Any, **options: Any) -> str:
    """json.dumps for a log line: cuts the longest values until the line fits LOG_LINE_BYTES."""
    line = json.dumps(fields, **options)
    if len(line) >= LOG_LINE_BYTES:
        fields, longest = json.loads(line), LOG_LINE_BYTES
        while len(line) >= LOG_LINE_BYTES and longest > 2:
            longest = longest * 3 // 4
            line = json.dumps(shortened(fields, longest))
    return line


def shortened(value: Any, longest: int) -> Any:
    """The value without the middle of long strings and the end of long lists."""
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
    """Writes log lines to standard output without waiting for the reader of the pipe.

    From start() on, a thread writes the lines. Before the fork, the caller writes them, if the pipe
    has room. Lines that do not fit are dropped and counted, and a later line reports their number.
    """

    def __init__(self, max_queued: int = 1000) -> None:
        super().__init__(queue.SimpleQueue())
        self._max_queued = max_queued  # lines
        self._queued = self._written = self._dropped = self._reported = 0
        self._thread: threading.Thread | None = None
        out: Any = getattr(sys.stdout, "buffer", None)  # None if it was closed before the start
        self._out = getattr(out, "raw", out)  # raw: the flush of a buffer could delay the exit

    def start(self) -> None:
        """Start the thread. Call this after the fork."""
        self._thread = threading.Thread(target=self._write_queued, daemon=True)
        self._thread.start()

    def prepare(self, record: logging.LogRecord) -> bytes:
        """The line of a record."""
        return f"{self.format(record)}\n".encode()

    def enqueue(self, line: Any) -> None:
        """Write, queue or drop the line."""
        if self._thread is None and self._has_room():
            self._write(line)
        elif self._thread and self._queued - self._written < self._max_queued:
            self._queued += 1
            self.queue.put_nowait(line)
        else:
            self._drop()

    def flush(self) -> None:
        """Wait until the thread has written the queued lines, at most one second."""
        deadline = time.monotonic() + 1
        while self._thread and self._written < self._queued and time.monotonic() < deadline:
            time.sleep(0.01)

    def _has_room(self) -> bool:
        try:
            return bool(select.select([], [self._out], [], 0)[1])
        except (OSError, TypeError, ValueError):  # not a file of the operating system
            return True

    def _write_queued(self) -> None:
        while True:
            lines = [self.queue.get()]
            time.sleep(0.05)  # waking for each line would cost 10 % of a message's CPU
            while self.queue.qsize():  # type: ignore[attr-defined]
                lines.append(self.queue.get())
            for line in lines:
                self._write(line)
                self._written += 1

    def _write(self, line: bytes) -> None:
        try:
            self._put(line)
            if dropped := self._dropped - self._reported:
                report = {"levelname": "WARNING", "msg": "log lines dropped", "lines": dropped}
                self._put(self.prepare(logging.makeLogRecord({"name": log.name, **report})))
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
    """Write the pod's first log line: build, queue, and number of workers and threads."""
    build = {"version": VERSION, "commit": COMMIT, "queue": settings.sqs_queue_url}
    log.info("service starts", extra={**build, "workers": workers, "threads": threads})


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


@functools.cache
def openapi_document() -> str:
    """openapi.yaml as JSON."""
    return json.dumps(yaml.safe_load((PROJECT / "openapi.yaml").read_text("utf-8")))


@functools.cache  # responses to slow clients share one copy
def docs_file(name: str) -> bytes:
    """A file of Swagger UI."""
    return (files("flask_swagger_ui") / "dist" / name).read_bytes()


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

    The default settings come from the environment (SettingsError), the default clients are
    AwsClients. Tests may pass boto3's clients, or other objects with the same methods. Creating the
    application calls no AWS and starts no thread: Service.start does, and so do requests.
    """
    settings = settings or Settings.from_environ(os.environ)
    # Threads: one for each call of SendMessage, one for GetParameters, one for GetQueueAttributes.
    executor = executor or ThreadPoolExecutor(settings.sqs_calls_in_flight + 2, "aws")
    credentials = Credentials(settings.aws_region)
    ssm = ssm or AwsClient("ssm", settings.aws_region, credentials)
    probe_client = sqs  # a given client has its own timeouts
    if sqs is None:
        sqs = AwsClient("sqs", settings.aws_region, credentials)
        probe_client = sqs.with_timeout(seconds=0.75)
    cache_seconds = settings.token_cache_seconds
    tokens = TokenStore(ssm, settings.token_ssm_parameter, cache_seconds, executor, clock)
    publisher = Publisher(
        sqs,
        probe_client,
        settings.sqs_queue_url,
        settings.sqs_calls_in_flight,
        executor,
        clock,
        pause,
    )
    return Service(settings, tokens, publisher, make_tracing(settings))


def make_tracing(settings: Settings) -> Any:
    """A tracing.Tracing if OpenTelemetry's variables enable tracing, otherwise None."""

    def value(name: str) -> str:
        return os.environ.get(f"OTEL_{name}", "").strip().lower()

    endpoint = value("EXPORTER_OTLP_ENDPOINT") or value("EXPORTER_OTLP_TRACES_ENDPOINT")
    if not endpoint or value("SDK_DISABLED") == "true" or value("TRACES_EXPORTER") == "none":
        return None
    from tracing import Tracing  # imported only here: OpenTelemetry takes memory and start time

    build = {"service.version": VERSION, "vcs.ref.head.revision": COMMIT}
    return Tracing(settings.sqs_queue_url, {"service.name": SERVICE, **build})


# --- Local server ---------------------------------------------------------------------------------


# The token of the documentation's examples. Only the emulator accepts it.
EXAMPLE_TOKEN = "$DJISA<$#45ex3RtYr"  # noqa: S105


def start_embedded_aws(settings: Settings) -> Settings:
    """Start moto's server in a thread, with the queue and the example token.

    Sets the environment variables that make boto3 use this server. Returns settings with its queue.
    """
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    # A developer's own configuration must not lead to the real AWS.
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
    """The commands that send a message, show the queue, and test the service."""
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
    """A listening socket, for IPv4 and also for IPv6 if the machine has IPv6. Raises OSError."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def serve_without_gunicorn(settings: Settings) -> None:
    """Serve with Flask's development server, until Ctrl-C or SIGTERM."""
    logging.config.dictConfig(logging_config(settings.log_level))
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # otherwise it also logs each request
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
    """Print without waiting for the reader of standard output, also at the exit."""

    def write() -> None:
        with suppress(OSError, ValueError):  # standard output is closed
            os.write(sys.stdout.fileno(), text.encode())

    threading.Thread(target=write, daemon=True).start()


def serve_beside_embedded_aws(settings: Settings) -> None:
    """Run Gunicorn in a child process, until Gunicorn or this process ends."""
    stopped: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: stopped.append(number))
    os.environ["STOP_WITH_PROCESS"] = str(os.getpid())
    # In a new session: a closing terminal sends SIGHUP to its session, and Gunicorn would reload.
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
    """Serve with Gunicorn as in production; with an embedded AWS if SQS_QUEUE_URL is unset.

    On Windows, Flask's development server replaces Gunicorn.
    """
    embedded = not os.environ.get("SQS_QUEUE_URL", "").strip()
    if embedded:
        os.environ["SQS_QUEUE_URL"] = "http://embedded/queue"  # valid until the queue exists
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
