"""email-processor: an HTTP front door for an SQS queue.

A request travels through this file from top to bottom: settings, the list of errors, metrics,
reading the body, parsing and validation, the token store, the publisher, the routes. The last part
serves on a developer's machine, with an embedded AWS.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import json
import logging
import logging.config
import operator
import os
import queue
import random
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections import Counter, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields
from datetime import UTC, datetime
from importlib.resources import files
from importlib.util import find_spec
from logging.handlers import QueueHandler
from pathlib import Path
from typing import Any, NoReturn

import boto3
import botocore.session
import prometheus_client
import yaml
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, ConnectTimeoutError, ReadTimeoutError
from flask import Flask, Request, Response, g, has_app_context, request
from prometheus_client.multiprocess import MultiProcessCollector
from werkzeug.exceptions import HTTPException, MethodNotAllowed, NotFound
from werkzeug.routing import MapAdapter
from werkzeug.serving import make_server

SERVICE = "email-processor"
VERSION = "1.0.0"
PROJECT = Path(__file__).parent

log = logging.getLogger("email_processor")


# --- Settings -------------------------------------------------------------------------------------


class SettingsError(ValueError):
    """The environment is unusable. One line for each variable at fault."""


def _setting(rule: str, check: Callable[[str], Any], default: Any = MISSING) -> Any:
    return field(default=default, metadata={"rule": rule, "check": check})


def _number(kind: type[int] | type[float], low: int, high: int) -> Callable[[str], float]:
    def check(text: str) -> float:
        # int() and float() alone would take 8_080, +80 and nan.
        if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", text, re.ASCII) or not low <= kind(text) <= high:
            raise ValueError
        return kind(text)

    return check


def _text(pattern: str) -> Callable[[str], str]:
    def check(text: str) -> str:
        if not re.fullmatch(pattern, text, re.ASCII):
            raise ValueError
        return text

    return check


def _parameter_names(text: str) -> tuple[str, ...]:
    check = _text(r"[\w./:-]+")
    names = tuple(dict.fromkeys(check(name.strip()) for name in text.split(",")))
    if len(names) > 10:  # as many as GetParameters takes in one call
        raise ValueError
    return names


@dataclass(frozen=True)
class Settings:
    """The service's configuration; the environment variable of a field is its name in capitals."""

    sqs_queue_url: str = _setting("the queue's URL", _text(r"https?://[^/\s]+/\S+"))
    aws_region: str = _setting(
        "a region such as us-west-1", _text(r"[a-z]{2}(-[a-z]+)+-[0-9]+"), "us-west-1"
    )
    token_ssm_parameter: tuple[str, ...] = _setting(
        "1 to 10 parameter names, separated by commas",
        _parameter_names,
        ("/email-service/api-token",),
    )
    port: int = _setting("a port from 1 to 65535", _number(int, 1, 65535), 8080)
    gunicorn_workers: int = _setting("a whole number from 1 to 64", _number(int, 1, 64), 4)
    gunicorn_threads: int = _setting("a whole number from 1 to 256", _number(int, 1, 256), 2)
    max_request_bytes: int = _setting(
        "a number of bytes from 1 to 1073741824", _number(int, 1, 2**30), 2_097_152
    )
    body_timeout_seconds: float = _setting(
        "a number of seconds from 1 to 60", _number(float, 1, 60), 5
    )
    sqs_calls_in_flight: int = _setting("a whole number from 1 to 64", _number(int, 1, 64), 8)
    token_cache_seconds: float = _setting(
        "a number of seconds from 1 to 3600", _number(float, 1, 3600), 60
    )
    log_level: str = _setting(
        "DEBUG, INFO, WARNING or ERROR", _text("DEBUG|INFO|WARNING|ERROR"), "INFO"
    )

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
            }
        },
        "handlers": {"stdout": {"()": LogHandler, "filters": [add_request], "formatter": "json"}},
        # LOG_LEVEL is for this module alone: at DEBUG, botocore logs decrypted tokens and message
        # bodies, and Gunicorn what it could not parse.
        "root": {"level": "INFO", "handlers": ["stdout"]},
        "loggers": {
            "email_processor": {"level": level},
            # Gunicorn takes its own logger out of the tree.
            "gunicorn.error": {"level": "INFO", "propagate": True},
            "botocore": {"level": "WARNING"},
        },
    }


# --- Errors ---------------------------------------------------------------------------------------

# Every answer that is not a success: code -> (status, message). README, openapi.yaml, the metric
# label and the tests use the same list.
ERRORS = {
    "not_found": (404, "There is nothing at this path."),
    "method_not_allowed": (405, "This path does not take this method; see the Allow header."),
    "request_too_large": (413, "The request is too large."),
    "request_timeout": (408, "The request body did not arrive in time."),
    "unsupported_media_type": (415, "The Content-Type must be application/json."),
    "invalid_json": (400, "The request is not a JSON object in UTF-8."),
    "token_required": (401, 'The request needs a "token".'),
    "invalid_token": (401, "Invalid token."),
    "token_store_unavailable": (503, "The token cannot be checked at present. Try again."),
    "invalid_data": (400, '"data" must be an object with the four email fields.'),
    "invalid_timestamp": (400, "email_timestream is not a valid Unix timestamp."),
    "message_too_large": (413, "The message is larger than the queue takes."),
    "queue_unavailable": (503, "The queue cannot take messages at present. Try again."),
    "internal_error": (500, "Something went wrong here. The cause is in the service's log."),
}
RETRY_AFTER_SECONDS = 5


class Refusal(Exception):  # noqa: N818 - an answer, not always an error of ours
    """A request is answered with an error of ERRORS."""

    def __init__(
        self, code: str, message: str | None = None, errors: list[dict[str, str]] | None = None
    ) -> None:
        super().__init__(code)
        self.code = code
        self.status, default = ERRORS[code]
        self.message = message or default
        self.errors = errors

    def body(self, request_id: str) -> dict[str, Any]:
        body = {
            "status": "error",
            "error": self.code,
            "message": self.message,
            "request_id": request_id,
        }
        return {**body, "errors": self.errors} if self.errors else body


# --- Metrics --------------------------------------------------------------------------------------

# A call of SQS takes 5 to 30 ms; 3, 5 and 14 s are the limits of a call, a message and a request.
SECONDS = (0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 3, 5, 14)


def _counter(name: str, text: str, label: str, label_values: list[str]) -> dict[str, Any]:
    """A counter for each label value, there from the start: Prometheus sees no increase in a series
    that only begins with its first event.
    """
    counter = prometheus_client.Counter(name, text, [label])
    return {value: counter.labels(value) for value in label_values}


ANSWERS = _counter(
    "email_processor_requests",
    "Answers by outcome: success, or the error code.",
    "outcome",
    ["success", *ERRORS],
)
REQUEST_DURATION = prometheus_client.Histogram(
    "email_processor_request_duration_seconds", "Time to answer POST /process.", buckets=SECONDS
)
REQUESTS_IN_FLIGHT = prometheus_client.Gauge(
    "email_processor_requests_in_flight", "POST /process under way.", multiprocess_mode="livesum"
)
SQS_CALLS = _counter(
    "email_processor_sqs_calls",
    "Calls of SQS that send messages, by result.",
    "result",
    ["success", "partial", "timeout", "unavailable", "refused"],
)
SQS_CALL_DURATION = prometheus_client.Histogram(
    "email_processor_sqs_call_duration_seconds",
    "Time of a call of SQS that sends messages.",
    buckets=SECONDS,
)
SQS_BATCH_SIZE = prometheus_client.Histogram(
    "email_processor_sqs_batch_size", "Messages in a call of SQS.", buckets=range(1, 11)
)
SQS_CIRCUITS_OPEN = prometheus_client.Gauge(
    "email_processor_sqs_circuits_open",
    "Workers that take SQS for down and refuse at once.",
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
    "Last read of the token; of the worker for which that is longest ago; 0 for never.",
    multiprocess_mode="livemin",
)
LOG_LINES_DROPPED = prometheus_client.Counter(
    "email_processor_log_lines_dropped", "Log lines that standard output did not take in time."
)


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


_x_ray_header = re.compile(
    r"(?:\w+=[\w:.|-]+;)*Root=(1-[0-9a-f]{8}-[0-9a-f]{24})(?:;\w+=[\w:.|-]*)*;?", re.ASCII
).fullmatch
# By W3C Trace Context: ff is no version, zeros are no id, and only versions after 00 may say more.
_traceparent = re.compile(
    r"(?!ff|00.{54})[0-9a-f]{2}-(?!0{32})([0-9a-f]{8})([0-9a-f]{24})"
    r"-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?"
).fullmatch


def trace_of(x_amzn_trace_id: str, traceparent: str) -> tuple[str, str | None]:
    """The X-Ray header that goes on with the message, and the id of the trace for the log.

    Of the two headers the first that is well-formed counts; SQS would refuse a message with any
    other text. The empty text and None when there is none.
    """
    if 0 < len(x_amzn_trace_id) <= 1024 and (found := _x_ray_header(x_amzn_trace_id)):
        return x_amzn_trace_id, found[1]
    if traceparent and (found := _traceparent(traceparent)):
        seconds, rest, parent, flags = found.groups()
        trace_id = f"1-{seconds}-{rest}"
        return f"Root={trace_id};Parent={parent};Sampled={int(flags, 16) & 1}", trace_id
    return "", None


def add_request(record: logging.LogRecord) -> bool:
    """The log's filter: a line that is written while a request is handled tells which one."""
    if not hasattr(record, "request_id") and has_app_context() and "line" in g:
        vars(record).update({n: g.line[n] for n in ("request_id", "trace_id") if g.line[n]})
    return True


class LogHandler(QueueHandler):
    """Writes log lines to standard output, and makes nobody wait until they are read there.

    From start() on a thread writes them. Before, in a process that is still to fork, the caller
    does, if there is room. A line without room is dropped and counted; a later one tells how many.
    """

    def __init__(self, lines: int = 1000) -> None:
        super().__init__(queue.SimpleQueue())
        self._lines = lines  # that may wait for the thread
        self._queued = self._written = self._dropped = self._told = 0
        self._thread: threading.Thread | None = None
        out: Any = getattr(sys.stdout, "buffer", None)  # None when it was closed before the start
        self._out = getattr(out, "raw", out)  # what is left in a buffer would hold up the exit

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
        """At the exit: let the thread write what waits, for a second at most."""
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
            if dropped := self._dropped - self._told:
                told = {"levelname": "WARNING", "msg": "log lines dropped", "lines": dropped}
                self._put(self.prepare(logging.makeLogRecord({"name": log.name, **told})))
                self._told += dropped
        except (AttributeError, OSError, TypeError):  # closed, or full though it never blocks
            self._drop()

    def _put(self, data: bytes) -> None:
        while data:
            data = data[operator.index(self._out.write(data)) :]

    def _drop(self) -> None:
        LOG_LINES_DROPPED.inc()
        with self.lock:  # type: ignore[union-attr]
            self._dropped += 1


def record_answer(path: str, status: int, client: str = "", **line: Any) -> None:
    """Count one answer and write its log line; the only place that does either."""
    ANSWERS[line.get("error") or "success"].inc()
    quiet = path in ("/health", "/ready", "/metrics")
    level = logging.ERROR if status >= 500 else logging.DEBUG if quiet else logging.INFO
    if log.isEnabledFor(level):
        line = {name: value for name, value in line.items() if value is not None}
        line["client"] = client.removeprefix("::ffff:")  # of IPv4, on a socket for both
        log.log(level, "request", extra={**line, "path": path, "status": status})


# --- Reading the body -----------------------------------------------------------------------------


def read_body(limit: int) -> bytes:
    """The body of the current request, of at most `limit` bytes.

    What is too long is read to its end and dropped: many clients read no answer before they have
    sent everything, and an early close would reset the connection under the answer.

    Raises Refusal: request_too_large, request_timeout, or invalid_json for a body that breaks off.
    """
    g.body_read = True
    stream, declared = request.stream, request.content_length or 0
    too_large, body = declared > limit, b""
    try:
        if not too_large:
            body = stream.read(limit + 1)
            too_large = len(body) > limit
        while too_large and stream.read(65536):
            pass
    except Exception:  # as the server says that it broke off or that a chunk is malformed
        whole = False
    else:
        whole = len(body) >= declared
    if too_large:
        raise Refusal("request_too_large", f"The request body is larger than {limit} bytes.")
    if whole:
        return bytes(body)
    # gunicorn.conf.py ends a body that does not arrive in time.
    if getattr(request.environ.get("gunicorn.socket"), "late", False):
        raise Refusal("request_timeout")
    raise Refusal("invalid_json", "The request body breaks off or is not well-formed HTTP.")


# --- Parsing and validation -----------------------------------------------------------------------

MAX_JSON_DEPTH = 100
FIELDS = ("email_subject", "email_sender", "email_timestream", "email_content")
TIMESTAMP_RANGE = range(946_684_800, 4_102_444_800 + 1)  # 2000-01-01 to 2100-01-01 UTC


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


# Numbers go on as text, so none is needed in full: 20 digits show that one is out of range, and
# int() refuses to read more than 4,300.
_decoder = json.JSONDecoder(
    parse_int=lambda digits: int(digits[:20]), parse_constant=_refuse_constant
)
_to_value = re.compile(r"\s*:\s*").match


def parse_request(body: bytes) -> tuple[dict[str, Any], str]:
    """The members of the request's JSON object, and its text. Raises Refusal invalid_json."""
    try:
        text = body.decode("utf-8")
        members = _decoder.decode(text)
        # Only a text with many brackets can be deep; most never pay for the walk.
        if text.count("[") + text.count("{") > MAX_JSON_DEPTH and _is_deep(members):
            raise RecursionError
    except RecursionError:
        message = f"The JSON nests deeper than {MAX_JSON_DEPTH} levels."
        raise Refusal("invalid_json", message) from None
    except UnicodeDecodeError:
        raise Refusal("invalid_json", "The request body is not UTF-8.") from None
    except ValueError as error:
        raise Refusal("invalid_json", f"The request body is not JSON: {error}.") from None
    if not isinstance(members, dict):
        raise Refusal("invalid_json", "The request body is not a JSON object.")
    return members, text


def data_text(text: str) -> str:
    """The source text of the member "data", in the text of a JSON object.

    That goes into the queue: the parsed value, written out again, would have 1.1 for 1.10 and
    Infinity for 1e400.
    """
    found, index = "", 0
    while (index := text.find('"', index)) >= 0:
        name, index = _decoder.raw_decode(text, index)
        start = _to_value(text, index).end()  # type: ignore[union-attr]
        _, index = _decoder.raw_decode(text, start)
        if name == "data":  # the last one counts, as it does in the decoder
            found = text[start:index]
    return found


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True


def validate_data(data: Any) -> None:
    """Check the four fields. Raises Refusal invalid_data or invalid_timestamp."""
    if not isinstance(data, dict):
        raise Refusal("invalid_data", '"data" is missing or not an object.')
    problems = {}
    for name in FIELDS:
        value = data.get(name)
        if value is None:
            problems[name] = f"{name} is missing"
        elif isinstance(value, str):
            if not value.strip():
                problems[name] = f"{name} is empty"
        elif name != "email_timestream":
            problems[name] = f"{name} is not a string"
    code = "invalid_data" if problems else "invalid_timestamp"
    if "email_timestream" not in problems and (rule := timestamp_rule(data["email_timestream"])):
        problems["email_timestream"] = f"email_timestream {rule}"
    if problems:
        errors = [{"field": name, "message": problems[name]} for name in FIELDS if name in problems]
        raise Refusal(code, "; ".join(error["message"] for error in errors), errors)


def timestamp_rule(value: Any) -> str | None:
    """The rule that a Unix timestamp (a JSON integer, or a string of ASCII digits) breaks."""
    if isinstance(value, str) and re.fullmatch("[0-9]+", value):
        # int() refuses more than 4,300 digits; leading zeros do not count.
        value = int(value.lstrip("0")[:20] or "0")
    if type(value) is not int:  # bool is an int too
        return "is not a Unix timestamp: give whole seconds, as an integer or a string of digits"
    if value not in TIMESTAMP_RANGE:
        return (
            "is outside the timestamps accepted: "
            f"{TIMESTAMP_RANGE[0]} (2000-01-01) to {TIMESTAMP_RANGE[-1]} (2100-01-01)"
        )
    return None


# --- AWS clients ----------------------------------------------------------------------------------


@functools.cache
def aws_session() -> boto3.Session:
    """Where all clients get their credentials from, with short time-outs for that as well.

    On EKS they come from STS, through a client of botocore's own, which would wait for 60 s.
    """
    session = botocore.session.get_session()
    session.set_default_client_config(
        Config(connect_timeout=1, read_timeout=2, retries={"total_max_attempts": 1})
    )
    return boto3.Session(botocore_session=session)


def aws_client(service: str, settings: Settings, connect: float = 1, read: float = 2) -> Any:
    """A boto3 client. It opens no connection until its first call, so a fork may follow.

    An attempt may take `connect` seconds, and then `read` seconds without a byte of the answer. SSM
    gets two of them, SQS one: the publisher has retries of its own, for each message of a batch.
    """
    publishes = service == "sqs"
    return aws_session().client(
        service,
        region_name=settings.aws_region,
        config=Config(
            connect_timeout=connect,
            read_timeout=read,
            retries={"mode": "standard", "total_max_attempts": 1 if publishes else 2},
            max_pool_connections=max(settings.gunicorn_threads, settings.sqs_calls_in_flight),
            tcp_keepalive=True,
            # What each call would cost without need: checks of a message that is ours, and a
            # User-Agent that is built twice.
            parameter_validation=not publishes,
            user_agent=f"{SERVICE}/{VERSION}",
        ),
    )


def cause_of(error: Exception) -> str:
    """AWS's error code, or the type of a failure on the way there."""
    if isinstance(error, ClientError):
        return str(error.response.get("Error", {}).get("Code", "Unknown"))
    return type(error).__name__


def detail_of(error: Exception) -> str:
    """The cause for the log: AWS's text, which names principal and resource but quotes no token.

    The text of any other exception may quote the answer that made botocore fail.
    """
    return str(error) if isinstance(error, ClientError | BotoCoreError) else cause_of(error)


# --- Token store ----------------------------------------------------------------------------------


class TokenStore:
    """The tokens that SSM Parameter Store holds, cached.

    SSM allows 40 reads a second for a whole account and region, so a request does not read it. A
    read happens when the cache is nearly `cache_seconds` old, and when a token does not match (it
    may be new), but never more than one at a time, nor within READ_INTERVAL seconds of the last
    (or `cache_seconds`, if that is less). While SSM fails, the last known tokens count; a parameter
    that SSM no longer has is an answer, not a failure, and its token stops working.
    """

    READ_INTERVAL = 5.0

    def __init__(
        self,
        ssm: Any,
        names: tuple[str, ...],
        cache_seconds: float,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._ssm = ssm
        self._names = names
        self._cache_seconds = cache_seconds
        self._interval = min(self.READ_INTERVAL, cache_seconds)
        self._clock = clock
        self._jitter = jitter
        self._lock = threading.Lock()
        self._tokens: tuple[bytes, ...] = ()
        self._attempted_at = self._due_at = self._stale_at = -float("inf")
        self._reads = 0  # successful ones, to tell whether another thread has just read
        self.ready = False  # a token was read at least once
        self.problem: str | None = None  # why the last read failed

    def accepts(self, token: str) -> bool:
        """Whether SSM holds the token. Raises Refusal token_store_unavailable."""
        self.refresh_if_old()
        reads = self._reads
        if self.ready and self._matches(token):
            return True
        self._refresh(reads, wait=self.problem is None)
        if not self.ready:
            raise Refusal("token_store_unavailable")
        return self._matches(token)

    def refresh_if_old(self) -> None:
        now = self._clock()
        if now >= self._due_at:
            # One thread reads a little early while the others go on. Only when the cache is really
            # too old, and SSM is not known to be failing, do all of them wait for the answer.
            self._refresh(self._reads, wait=now >= self._stale_at and self.problem is None)

    def _matches(self, token: str) -> bool:
        given = token.encode("utf-8", "surrogatepass")
        matches = [hmac.compare_digest(given, known) for known in self._tokens]
        return any(matches)  # after comparing with all: the time does not tell which one matched

    def _refresh(self, reads: int, wait: bool) -> None:
        if not self._lock.acquire(blocking=wait):
            return
        try:
            if self._reads == reads and self._clock() - self._attempted_at >= self._interval:
                self._read()
                self._attempted_at = self._clock()  # the end of it: a slow failure counts once
        finally:
            self._lock.release()

    def _read(self) -> None:
        now = self._clock()
        try:
            answer = self._ssm.get_parameters(Names=list(self._names), WithDecryption=True)
            missing = answer.get("InvalidParameters", [])
            tokens = tuple(parameter["Value"].encode() for parameter in answer["Parameters"])
            if len(tokens) + len(missing) != len(self._names):
                raise ValueError("the answer does not speak of every parameter")
        except Exception as error:  # a garbled answer makes botocore raise almost anything
            self.problem = f"ssm:GetParameters failed: {cause_of(error)}"
            TOKEN_READS["failure"].inc()
            instead = "the last known one counts" if self.ready else "none is known yet"
            log.warning(f"token not read; {instead}", extra={"cause": detail_of(error)})
            return
        if missing:
            log.warning("token parameter missing in SSM", extra={"parameters": missing})
        TOKEN_READ_TIMESTAMP.set_to_current_time()
        self._tokens = tokens
        self.ready = self.ready or bool(tokens)
        if self.ready:
            # Between 70 % and 90 % of the cache's age, so that workers do not read in step.
            self._due_at = now + self._cache_seconds * (0.7 + 0.2 * self._jitter())
            self._stale_at = now + self._cache_seconds
        self._reads += 1
        self.problem = None
        TOKEN_READS["success"].inc()


# --- Publisher ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Message:
    """What goes into the queue for one request."""

    body: str  # JSON in ASCII
    request_id: str
    idempotency_key: str = ""
    trace_header: str = ""

    def entry(self, fifo: bool) -> tuple[dict[str, Any], int]:
        """What SendMessage takes, and its size by SQS's count: the bytes of the body, and of the
        attributes' names, types and values; a system attribute does not count.
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
        """SQS takes 1 to 128 letters, digits and ASCII punctuation; any other key goes hashed."""
        key = self.idempotency_key or self.request_id
        if re.fullmatch(r"[!-~]{1,128}", key):
            return key
        return hashlib.sha256(key.encode()).hexdigest()


def ascii_json(text: str) -> str:
    """The same JSON with every other character escaped: SQS refuses some of them.

    Outside of strings JSON is ASCII, so what is found can only be in one.
    """
    if text.isascii():
        return text
    return re.sub(r"[^\x00-\x7f]+", lambda found: json.dumps(found[0])[1:-1], text)


TIMEOUTS = (ConnectTimeoutError, ReadTimeoutError)


def is_temporary(error: Exception) -> bool:
    """Whether the same call may succeed later: no answer, no proper one, a 5xx, or throttling."""
    if not isinstance(error, ClientError):
        return True
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500)
    return status >= 500 or status == 429 or "Throttl" in cause_of(error)


def is_about_the_queue(error: Exception) -> bool:
    """Whether AWS refuses the caller or the queue, whatever the message."""
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


@dataclass(slots=True, eq=False)
class Pending:
    """A message on its way into the queue, and what its request waits for."""

    entry: dict[str, Any]
    size: int
    deadline: float
    attempts: int = 0
    alone: bool = False  # a batch with it was refused: no other message shall suffer for it again
    in_flight: bool = False  # in a call, or about to be
    call: list[Pending] | None = None  # the batch that its request is to send
    outcome: str | Refusal | None = None  # the MessageId, or why there is none
    wake: threading.Lock = field(default_factory=threading.Lock)  # released when one of both is set


class Circuit:
    """Whether SQS is known to be down, so that requests are refused at once instead of waiting.

    It opens when a call runs out of time while no other one was answered, or when FAILURES calls in
    a row fail in some other way that may pass, and closes with the first answer. While it is open,
    one call at a time is made all the same, with less patience than otherwise, to find out whether
    SQS is back: first with the messages that saw it go down, then with one message PROBE_SECONDS
    after the last try.
    """

    # At three calls in ten failing by chance, ten in a row happen once in 170,000 calls.
    FAILURES = 10
    PROBE_SECONDS = 0.25

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._failures = 0
        self._opened_at = self._probe_at = 0.0
        self._answered_at = -float("inf")
        self.open = False

    def may_probe(self) -> bool:
        return self._clock() >= self._probe_at

    def answered(self) -> None:
        """SQS has taken or refused something."""
        self._failures = 0
        self._answered_at = self._clock()
        if self.open:
            self.open = False
            SQS_CIRCUITS_OPEN.set(0)
            seconds = round(self._clock() - self._opened_at, 1)
            log.warning("SQS is back", extra={"seconds": seconds})

    def failed(self, timed_out: bool, began: float, cause: str) -> None:
        """A call that began then, by the clock, failed in a way that may pass."""
        self._failures += 1
        self._probe_at = self._clock() + self.PROBE_SECONDS
        silent = timed_out and self._answered_at < began
        if not self.open and (silent or self._failures >= self.FAILURES):
            self.open = True
            SQS_CIRCUITS_OPEN.set(1)
            self._opened_at = self._clock()
            log.error("SQS is down; refused until it answers", extra={"cause": cause})


class QueueLimit:
    """The queue's MaximumMessageSize, read once; to have read it is to have seen the queue."""

    def __init__(self, sqs: Any, queue_url: str) -> None:
        self._sqs = sqs
        self._queue_url = queue_url
        self._lock = threading.Lock()
        self._attempts = 0
        self._bytes = 0
        self.problem: str | None = None  # why the last read failed

    def bytes(self) -> int:
        """Raises Refusal queue_unavailable."""
        if not self._bytes:
            # One thread reads. The others wait for its result, unless the last one was a failure.
            attempts = self._attempts
            if not self._lock.acquire(blocking=self.problem is None):
                raise Refusal("queue_unavailable")
            try:
                if self._attempts == attempts:
                    self._read()
                    self._attempts += 1
            finally:
                self._lock.release()
            if self.problem:
                raise Refusal("queue_unavailable")
        return self._bytes

    def _read(self) -> None:
        try:
            answer = self._sqs.get_queue_attributes(
                QueueUrl=self._queue_url, AttributeNames=["MaximumMessageSize"]
            )
            self._bytes = int(answer["Attributes"]["MaximumMessageSize"])
            self.problem = None
        except Exception as error:  # a garbled answer makes botocore raise almost anything
            self.problem = f"sqs:GetQueueAttributes failed: {cause_of(error)}"
            log.error("queue not seen", extra={"cause": detail_of(error)})


class Publisher:
    """Puts messages into the queue, those that arrive together in one call.

    A call costs nearly the same for ten messages as for one, so they share it as commits share a
    write of a database's log: a message that finds no call under way goes at once, those that come
    meanwhile wait and go together in the next. There is no timer and no thread: the request of a
    batch's first message makes the call, gives every other its result, and hands the next batch on.
    Further calls start while one is under way if a full batch waits, or a request in every thread
    of the worker, so that none could join, or if the last call to start does not come back.

    Messages for a FIFO queue go in the order in which they came, but one that is tried again comes
    after those that were sent with it. A client that waits for each answer sees its order kept.
    """

    MAX_ENTRIES, MAX_BYTES = 10, 1_048_576  # of one SendMessageBatch
    ATTEMPTS = 3
    SECONDS = 5.0  # for a message to wait and to be tried again; a call then under way still ends
    STALL_SECONDS = 0.25  # after which the others no longer wait for a call; it usually takes 0.03

    def __init__(
        self,
        sqs: Any,
        probe: Any,  # the client for one message while SQS is down
        queue_url: str,
        calls_in_flight: int,
        threads: int,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._sqs = sqs
        self._probe = probe
        self._queue_url = queue_url
        self.limit = QueueLimit(sqs, queue_url)
        self._fifo = queue_url.endswith(".fifo")
        self._calls_in_flight = 1 if self._fifo else calls_in_flight  # in order: one by one
        self._threads = threads
        self._clock = clock
        self._pause = pause
        self._jitter = jitter
        self._lock = threading.Lock()
        self._waiting: deque[Pending] = deque()
        self._probing: list[Pending] | None = None  # the batch that is to find out if SQS is back
        self._under_way = 0  # calls,
        self._in_flight = 0  # with as many messages
        self._started_at = 0.0  # the last call
        self._circuit = Circuit(clock)

    def publish(self, message: Message) -> str:
        """Send the message and return its SQS MessageId, once SQS has it.

        Raises Refusal: message_too_large by the queue's own limit, or queue_unavailable.
        """
        limit = self.limit.bytes()
        entry, size = message.entry(self._fifo)
        if size > limit:
            reason = f"The message has {size} bytes, the queue takes {limit}."
            raise Refusal("message_too_large", reason)
        pending = Pending(entry, size, self._clock() + self.SECONDS)
        pending.wake.acquire()
        with self._lock:
            if self._circuit.open and not (self._may_start() and self._circuit.may_probe()):
                raise Refusal("queue_unavailable")
            self._waiting.append(pending)
            self._start_call()
        while (outcome := pending.outcome) is None:
            if pending.call:
                batch, pending.call = pending.call, None
                self._send(batch)
            elif not pending.wake.acquire(timeout=self._patience(pending)):
                self._lose_patience(pending)
        if isinstance(outcome, Refusal):
            raise outcome
        return outcome

    def _may_start(self) -> bool:
        """Whether a call may start beside those under way, which may hang while SQS is down."""
        if self._circuit.open:
            return not self._probing and self._under_way < self._calls_in_flight
        waiting = len(self._waiting)
        full = waiting >= self.MAX_ENTRIES or waiting + self._in_flight >= self._threads
        stalled = self._clock() - self._started_at >= self.STALL_SECONDS
        return self._under_way < (self._calls_in_flight if full or stalled else 1)

    def _start_call(self) -> None:
        """Hand the next batch to the request of its first message, if a call may start. Locked."""
        if not self._waiting or not self._may_start():
            return
        batch, size = [self._waiting.popleft()], 0
        while self._waiting and len(batch) < self.MAX_ENTRIES:
            size += batch[-1].size
            following = self._waiting[0]
            if size + following.size > self.MAX_BYTES or following.alone or batch[0].alone:
                break
            batch.append(self._waiting.popleft())
        if self._circuit.open:
            self._probing = batch
        self._under_way += 1
        self._in_flight += len(batch)
        self._started_at = self._clock()
        for pending in batch:
            pending.in_flight = True
        batch[0].call = batch
        self._rouse(batch[0])

    def _send(self, batch: list[Pending]) -> None:
        """Make one call, settle its messages, and hand the next batch on whatever happens."""
        again: list[Pending] = []
        try:
            if batch[0].attempts:
                self._pause((1 + self._jitter()) * 0.025 * 2 ** batch[0].attempts)
            # Without those whose request has given up meanwhile.
            sent, began = [p for p in batch if p.outcome is None], self._clock()
            results = self._call(sent)
            SQS_CALL_DURATION.observe(self._clock() - began)
            SQS_BATCH_SIZE.observe(len(sent))
            again = self._settle(sent, results, began)
        finally:
            with self._lock:
                for pending in batch:
                    pending.in_flight = False
                    if pending not in again:  # it has its outcome, unless this thread is dying
                        self._end(pending, Refusal("queue_unavailable"))
                # In front, in their order.
                self._waiting.extendleft(p for p in reversed(again) if p.outcome is None)
                if self._probing is batch:
                    self._probing = None
                self._under_way -= 1
                self._in_flight -= len(batch)
                self._start_call()
                if self._waiting:  # how long to wait depends on the calls under way
                    self._rouse(self._waiting[0])

    def _call(self, batch: list[Pending]) -> list[str | Exception]:
        """Each message's MessageId or what is wrong; the same for all if the call as one failed."""
        sqs = self._probe if self._circuit.open else self._sqs
        try:
            if len(batch) == 1:
                answer = sqs.send_message(QueueUrl=self._queue_url, **batch[0].entry)
                answer = {"Successful": [{"Id": "0", **answer}]}
            else:
                entries = [{"Id": str(n), **pending.entry} for n, pending in enumerate(batch)]
                answer = sqs.send_message_batch(QueueUrl=self._queue_url, Entries=entries)
            results: dict[str | None, str | Exception] = {}
            for failed in answer.get("Failed", []):
                status = {"HTTPStatusCode": 400 if failed.get("SenderFault") else 500}
                error = {"Error": failed, "ResponseMetadata": status}
                results[failed.get("Id")] = ClientError(error, "SendMessageBatch")
            for sent in answer.get("Successful", []):
                results[sent.get("Id")] = sent.get("MessageId", "")
            unknown = ValueError("the answer has no MessageId")
            return [results.get(str(n)) or unknown for n in range(len(batch))]
        except Exception as error:  # a garbled answer makes botocore raise almost anything
            return [error] * len(batch)

    def _settle(
        self, batch: list[Pending], results: list[str | Exception], began: float
    ) -> list[Pending]:
        """Give every message its outcome, except those that are to be sent again: these."""
        label = result_of(results)
        SQS_CALLS[label].inc()
        # One of them may be at fault: each is tried alone.
        together = len(batch) > 1 and all(result is results[0] for result in results)
        again, now, failures = [], self._clock(), Counter[tuple[str, bool]]()
        with self._lock:
            # What sees SQS go down is tried once more, as the probe; what then fails is not.
            may_retry = not self._circuit.open
            for pending, result in zip(batch, results, strict=True):
                pending.attempts += 1
                if isinstance(result, str):
                    self._end(pending, result)
                    continue
                temporary, cause = is_temporary(result), detail_of(result)
                pending.alone = pending.alone or (together and not temporary)
                in_time = pending.attempts < self.ATTEMPTS and now < pending.deadline
                may_pass = temporary or (together and not is_about_the_queue(result))
                retried = may_pass and in_time and may_retry
                failures[cause, retried] += 1
                if retried:
                    again.append(pending)
                else:
                    # The queue's limit may have been lowered since it was read.
                    too_large = "must be shorter than" in cause
                    code = "message_too_large" if too_large else "queue_unavailable"
                    self._end(pending, Refusal(code))
            if label in ("timeout", "unavailable"):
                self._circuit.failed(label == "timeout", began, cause)
            else:
                self._circuit.answered()
            while self._circuit.open and self._waiting:  # nobody waits any longer
                self._end(self._waiting.popleft(), Refusal("queue_unavailable"))
        for (cause, retried), count in failures.items():
            level, text = (logging.WARNING, "; again") if retried else (logging.ERROR, "")
            log.log(level, f"messages not sent{text}", extra={"cause": cause, "messages": count})
        return again

    def _end(self, pending: Pending, outcome: str | Refusal) -> None:
        if pending.outcome is None:
            pending.outcome = outcome
            self._rouse(pending)

    def _patience(self, pending: Pending) -> float:
        """How many seconds a request waits before it looks after its message itself."""
        end = pending.deadline
        may_start = self._under_way < self._calls_in_flight and not self._circuit.open
        if may_start and not pending.in_flight:
            end = min(end, self._started_at + self.STALL_SECONDS)
        return max(0, end - self._clock())

    def _lose_patience(self, pending: Pending) -> None:
        with self._lock:
            if self._clock() < pending.deadline:
                self._start_call()
            elif pending.outcome is None and pending.call is None:
                self._end(pending, Refusal("queue_unavailable"))
                if not pending.in_flight:  # else it may get into the queue all the same
                    self._waiting.remove(pending)
                    log.error("messages not sent", extra={"cause": "out of time", "messages": 1})

    def _rouse(self, pending: Pending) -> None:
        if pending.wake.locked():
            pending.wake.release()


# --- Routes ---------------------------------------------------------------------------------------

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


def json_response(body: Mapping[str, Any], status: int = 200) -> Response:
    return Response(json.dumps(body), status, mimetype="application/json")


@functools.cache
def openapi_document() -> str:
    return json.dumps(yaml.safe_load((PROJECT / "openapi.yaml").read_text("utf-8")))


@functools.cache  # so that clients who are slow to take it share one copy
def docs_file(name: str) -> bytes:
    return (files("flask_swagger_ui") / "dist" / name).read_bytes()


class Service(Flask):
    """Flask, with routes found by path and method alone.

    Werkzeug would refuse odd Host headers, and requests that offer to become a WebSocket.
    """

    def create_url_adapter(self, request: Request | None) -> MapAdapter | None:
        if request is None:
            return None
        return self.url_map.bind("", path_info=request.path, default_method=request.method)


def create_app(
    settings: Settings | None = None,
    ssm: Any = None,
    sqs: Any = None,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
) -> Flask:
    """The WSGI application.

    Without settings they are read from the environment (SettingsError); without clients, boto3's
    are made. No call to AWS is made and no thread started before the first request.
    """
    settings = settings or Settings.from_environ(os.environ)
    tokens = TokenStore(
        ssm or aws_client("ssm", settings),
        settings.token_ssm_parameter,
        settings.token_cache_seconds,
        clock,
    )
    publisher = Publisher(
        sqs or aws_client("sqs", settings, read=3),
        # Nobody is to wait longer than a second for an SQS that is down.
        sqs or aws_client("sqs", settings, connect=0.3, read=0.6),
        settings.sqs_queue_url,
        settings.sqs_calls_in_flight,
        settings.gunicorn_threads,
        clock,
        pause,
    )

    def warm_up() -> None:
        """See the token and the queue, so that a later outage finds every worker knowing both."""
        tokens.refresh_if_old()
        with suppress(Refusal):  # it is logged, and the first request tries again
            publisher.limit.bytes()

    app = Service(__name__, static_folder=None)
    app.extensions["warm_up"] = warm_up  # a worker's first step
    app.config["PROVIDE_AUTOMATIC_OPTIONS"] = False  # OPTIONS is a wrong method like any other
    app.url_map.merge_slashes = False  # /docs//x is unknown; it is not redirected with HTML

    def take_message() -> str:
        """Read, check and publish what the request brings; the MessageId."""
        body = read_body(settings.max_request_bytes)
        if not request.is_json:
            raise Refusal("unsupported_media_type")
        members, text = parse_request(body)
        token = members.get("token")
        if token is None or token == "":
            raise Refusal("token_required")
        if not isinstance(token, str) or not tokens.accepts(token):
            raise Refusal("invalid_token")
        validate_data(members.get("data"))
        return publisher.publish(
            Message(
                body=ascii_json(data_text(text)),
                request_id=g.line["request_id"],
                idempotency_key=request.environ.get("HTTP_IDEMPOTENCY_KEY", "").strip(),
                trace_header=g.trace_header,
            )
        )

    @app.post("/process")
    def process() -> Response:
        begin = time.perf_counter()
        REQUESTS_IN_FLIGHT.inc()
        try:
            message_id = g.line["message_id"] = take_message()
        finally:
            REQUESTS_IN_FLIGHT.dec()
            REQUEST_DURATION.observe(time.perf_counter() - begin)
        return json_response(
            {
                "status": "success",
                "message": "Email data processed and queued",
                "message_id": message_id,
            }
        )

    @app.get("/health")
    def health() -> Response:
        now = datetime.now(UTC).replace(tzinfo=None).isoformat(timespec="microseconds")
        return json_response({"status": "healthy", "service": SERVICE, "timestamp": now})

    @app.get("/ready")
    def ready() -> Response:
        if not tokens.ready:
            tokens.refresh_if_old()
        missing = {}
        if not tokens.ready:
            reason = tokens.problem or "SSM has no parameter of the configured name"
            missing["token_store_unavailable"] = f"The token was not read yet: {reason}"
        try:
            publisher.limit.bytes()
        except Refusal:
            missing["queue_unavailable"] = f"The queue was not seen yet: {publisher.limit.problem}"
        if missing:
            raise Refusal(next(iter(missing)), "; ".join(missing.values()))
        return json_response({"status": "ready", "service": SERVICE})

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(metrics_text(), content_type=prometheus_client.CONTENT_TYPE_LATEST)

    @app.get("/")
    def index() -> Response:
        endpoints = sorted(
            f"{method} {rule.rule}"
            for rule in app.url_map.iter_rules()
            if not rule.arguments
            for method in (rule.methods or set()) - {"HEAD"}
        )
        return json_response({"service": SERVICE, "version": VERSION, "endpoints": endpoints})

    @app.get("/openapi.json")
    def openapi() -> Response:
        return Response(openapi_document(), mimetype="application/json")

    @app.get("/docs")
    def docs() -> Response:
        return Response(_DOCS_PAGE, headers={"Content-Security-Policy": _DOCS_POLICY})

    @app.get("/docs/<any('swagger-ui.css', 'swagger-ui-bundle.js'):asset>")
    def docs_asset(asset: str) -> Response:
        kind = "text/css" if asset.endswith(".css") else "text/javascript"
        return Response(docs_file(asset), mimetype=kind, headers={"Cache-Control": "max-age=3600"})

    @app.errorhandler(Exception)
    def refused(error: Exception) -> Response:
        headers = {}
        if isinstance(error, Refusal):
            refusal = error
        elif isinstance(error, NotFound):
            refusal = Refusal("not_found")
        elif isinstance(error, MethodNotAllowed):
            refusal = Refusal("method_not_allowed")
            headers["Allow"] = ", ".join(sorted(error.valid_methods or ()))
        elif isinstance(error, HTTPException) and (error.code or 500) < 500:
            refusal = Refusal("invalid_json", "The request is not well-formed HTTP.")
        else:
            refusal = Refusal("internal_error")
            log.error("unforeseen error", exc_info=error)
        if refusal.status == 503:
            headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
        g.line["error"] = refusal.code
        response = json_response(refusal.body(g.line["request_id"]), refusal.status)
        response.headers.update(headers)
        return response

    # Each look at Flask's `request` and `g` searches the context anew, so these two look once.

    @app.before_request
    def begin() -> None:
        environ = request.environ
        g.trace_header, trace_id = trace_of(
            environ.get("HTTP_X_AMZN_TRACE_ID", ""), environ.get("HTTP_TRACEPARENT", "")
        )
        # The request's log line, gathered on the way.
        request_id = request_id_of(environ.get("HTTP_X_REQUEST_ID", ""))
        g.line = {"request_id": request_id, "trace_id": trace_id}
        g.started = time.perf_counter()
        g.body_read = not environ.get("CONTENT_LENGTH") and "HTTP_TRANSFER_ENCODING" not in environ
        if not environ["PATH_INFO"].startswith("/") or environ["PATH_INFO"].startswith("//"):
            raise Refusal("not_found")  # Werkzeug would take //process for /process

    @app.after_request
    def finish(response: Response) -> Response:
        environ, line = request.environ, g.line
        if not g.body_read:
            # Unread bytes would be taken for the next request on this connection.
            with suppress(Refusal):
                read_body(0)
        response.headers["X-Request-Id"] = line["request_id"]
        forwarded = environ.get("HTTP_X_FORWARDED_FOR", "")
        duration = time.perf_counter() - g.started
        record_answer(
            method=environ["REQUEST_METHOD"],
            path=request.path,
            # The ALB appends the address that it saw; what is left of it is the caller's word.
            client=forwarded.rpartition(",")[2].strip() or environ.get("REMOTE_ADDR", ""),
            status=response.status_code,
            duration_ms=round(duration * 1000, 2),
            **line,
        )
        return response

    return app


# --- Local server ---------------------------------------------------------------------------------

EXAMPLE_TOKEN = "$DJISA<$#45ex3RtYr"  # noqa: S105 - the documentation's; opens only the emulator


def start_embedded_aws(settings: Settings) -> dict[str, str]:
    """Start moto's server in a thread, with the queue and the example token.

    Returns the environment variables that point a child process at it.
    """
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    aws = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_REGION": settings.aws_region,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "NO_PROXY": host,
    }
    # Nothing of a developer's own AWS configuration may lead past the emulator.
    for variable in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[variable]
    os.environ.update(aws)
    # The emulator's first answers take seconds on a busy machine; so a try may come twice.
    aws_client("ssm", settings, read=30).put_parameter(
        Name=settings.token_ssm_parameter[0],
        Value=EXAMPLE_TOKEN,
        Type="SecureString",
        Overwrite=True,
    )
    queue = aws_client("sqs", settings, read=30).create_queue(QueueName="dev-CP-queue")
    return {**aws, "SQS_QUEUE_URL": queue["QueueUrl"]}


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
    with listen(settings.port) as sock:
        host, app = sock.getsockname()[0], create_app(settings)
        server = make_server(host, settings.port, app, threaded=True, fd=sock.fileno())
    with suppress(KeyboardInterrupt):
        server.serve_forever()


def main() -> None:
    """Serve with Gunicorn as in production; with an embedded AWS when SQS_QUEUE_URL is unset.

    Gunicorn needs POSIX. Elsewhere Flask's own server takes its place.
    """
    embedded = not os.environ.get("SQS_QUEUE_URL", "").strip()
    try:
        settings = Settings.from_environ(
            {**os.environ, "SQS_QUEUE_URL": "http://embedded/queue"} if embedded else os.environ
        )
    except SettingsError as error:
        sys.exit(str(error))
    try:
        listen(settings.port).close()
    except OSError as error:
        sys.exit(f"Port {settings.port}: {error.strerror}. Choose another, such as PORT=8081.")
    posix = find_spec("fcntl") is not None
    if posix and not embedded:
        os.chdir(PROJECT)
        os.execv(sys.executable, [sys.executable, "-m", "gunicorn"])  # noqa: S606
    if embedded:
        try:
            os.environ.update(start_embedded_aws(settings))
        except ImportError:
            sys.exit("SQS_QUEUE_URL is required: the embedded AWS needs requirements-dev.txt.")
        settings = Settings.from_environ(os.environ)
    if not posix:
        if embedded:
            print(explain_embedded_aws(settings), flush=True)
        serve_without_gunicorn(settings)
        return

    def stop(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    stop_signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for stop_signal in stop_signals:
        signal.signal(stop_signal, stop)
    # In a session of its own: a closing terminal's SIGHUP would make Gunicorn start anew.
    server = subprocess.Popen(
        [sys.executable, "-m", "gunicorn"], cwd=PROJECT, start_new_session=True
    )
    try:
        while server.poll() is None:
            with suppress(OSError), socket.create_connection(("127.0.0.1", settings.port)):
                print(explain_embedded_aws(settings), flush=True)
                break
            time.sleep(0.1)
        # Polled: a signal that another thread takes does not wake a wait without a time-out.
        while server.poll() is None:
            time.sleep(0.1)
    except KeyboardInterrupt:
        for stop_signal in stop_signals:
            signal.signal(stop_signal, signal.SIG_IGN)  # one is enough
        server.terminate()
        server.wait()
    sys.exit(server.returncode)


if __name__ == "__main__":
    main()
