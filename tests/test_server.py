"""What needs a real Gunicorn and real sockets: framing, deadlines, connections, start and stop."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from client import BODY, DATA, Client, chunk, post, post_head, request_head
from conftest import Aws
from fake_aws import TOKEN, FakeAws
from prometheus_client import REGISTRY
from service import (
    PROJECT,
    WAIT,
    ServiceProcess,
    StartService,
    clean_environment,
    eventually,
    gunicorn,
    has_booted,
    kill,
    metrics_folder,
)

import app

LIMIT = 2_097_152
DEADLINE = 1.0
ONE = {"GUNICORN_WORKERS": "1"}
CHUNKED = "Transfer-Encoding: chunked"


@pytest.fixture(scope="module")
def service(start_service: StartService) -> Iterator[ServiceProcess]:
    """The defaults, 4 workers with 2 threads each; but a deadline that no test waits for."""
    with start_service(BODY_TIMEOUT_SECONDS="60") as service:
        yield service


@pytest.fixture(scope="module")
def hasty(start_service: StartService) -> Iterator[ServiceProcess]:
    """The same with a body deadline of a second."""
    with start_service(BODY_TIMEOUT_SECONDS=str(DEADLINE)) as service:
        yield service


# --- The way into the queue -----------------------------------------------------------------------


def test_post_that_is_200_is_in_the_queue(service: ServiceProcess, aws: Aws) -> None:
    aws.receive()
    answer = service.request(post(BODY, "X-Request-Id: r-1", "Idempotency-Key: k-1"))
    assert answer.status == 200
    (message,) = aws.receive()
    assert message["MessageId"] == answer.json["message_id"]
    assert json.loads(message["Body"]) == DATA
    values = {name: part["StringValue"] for name, part in message["MessageAttributes"].items()}
    assert values.pop("ProcessedAt")
    assert values == {
        "ContentType": "application/json",
        "RequestId": "r-1",
        "IdempotencyKey": "k-1",
    }


# --- Bodies ---------------------------------------------------------------------------------------


def test_chunked_body_is_200(service: ServiceProcess) -> None:
    parts = [chunk(BODY[start : start + 7]) for start in range(0, len(BODY), 7)]
    assert service.request(post_head(CHUNKED), *parts, chunk(b"")).status == 200


OVERSIZED = {
    "length": post_head(f"Content-Length: {LIMIT + 1}"),
    "chunk size": post_head(CHUNKED) + b"%x\r\n" % (LIMIT + 1),
    "chunks": post_head(CHUNKED) + chunk(b" " * 65_536) * (LIMIT // 65_536) + b"1\r\n",
    "too many chunks": post_head(CHUNKED) + chunk(b" ") * 10_001,
}


@pytest.mark.parametrize("sent", OVERSIZED.values(), ids=OVERSIZED)
def test_oversized_body_is_413_before_it_is_sent(service: ServiceProcess, sent: bytes) -> None:
    with service.connect() as client:
        answer = client.send(sent).response()
        assert (answer.status, answer.error) == (413, "request_too_large")
        assert answer.headers["Connection"] == "close"
        assert client.is_closed()


@pytest.mark.parametrize("sent", OVERSIZED.values(), ids=OVERSIZED)
def test_client_that_sends_a_whole_oversized_body_gets_its_413(
    service: ServiceProcess, sent: bytes
) -> None:
    """It reads only when it has sent everything."""
    with service.connect(buffer=65_536) as client:
        client.send(sent)
        for _ in range(20):
            client.send(b" " * 1_000_000)
        assert client.response().status == 413


def test_body_of_the_limit_is_read_whole(service: ServiceProcess) -> None:
    body = BODY.ljust(LIMIT)
    whole = post(body), post_head(CHUNKED) + chunk(body) + chunk(b"")
    most_chunks = BODY[:-1].ljust(9_999) + BODY[-1:]
    for sent in (*whole, post_head(CHUNKED) + b"".join(chunk(bytes([c])) for c in most_chunks)):
        with service.connect() as client:
            client.send(sent, b"" if sent in whole else chunk(b""))
            assert client.response().status == 200


EXPECT = "Expect: 100-continue"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


@pytest.mark.parametrize(
    ("head", "body"),
    [
        (post_head(f"Content-Length: {len(BODY)}", EXPECT, "Connection: close"), BODY),
        (post_head(CHUNKED, EXPECT, "Connection: close"), chunk(BODY) + chunk(b"")),
    ],
    ids=["length", "chunked"],
)
def test_expectation_is_answered_once(service: ServiceProcess, head: bytes, body: bytes) -> None:
    with service.connect() as client:
        client.send(head)
        assert client.is_continued()
        for start in range(0, len(body), 50):
            client.send(body[start : start + 50])
        assert client.rest().startswith(b"HTTP/1.1 200")
    with service.connect() as client:  # whose request has the length that was promised
        client.send(post(), head)
        assert client.response().status == 200
        assert client.is_continued()
        assert client.send(body).rest().startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "sent",
    [
        post_head(f"Content-Length: {LIMIT + 1}", EXPECT),
        post_head("Content-Length: 2", "Content-Length: 3", EXPECT),
        post_head("Content-Length: 2", "Expect: wonders"),
        post_head("Content-Length: 2", "Expect: wonders", EXPECT),
        post(BODY, EXPECT, "Connection: close"),  # its body is there already
        # RFC 9110 section 10.1.1: an expectation of HTTP/1.0 is ignored.
        post_head("Content-Length: 2", EXPECT).replace(b"HTTP/1.1", b"HTTP/1.0"),
    ],
    ids=["oversized", "two lengths", "unknown", "unknown and known", "with its body", "HTTP/1.0"],
)
def test_expectation_of_a_body_that_is_not_awaited_gets_no_100(
    service: ServiceProcess, sent: bytes
) -> None:
    with service.connect() as client:
        client.send(sent).sock.shutdown(socket.SHUT_WR)
        assert CONTINUE not in client.rest()


@pytest.mark.parametrize("rest", [b"zz\r\n", b"5\r\nhelloX\r\n0\r\n\r\n"])
def test_malformed_chunks_end_the_connection(service: ServiceProcess, rest: bytes) -> None:
    with service.connect() as client:
        answer = client.send(post_head(CHUNKED), rest).response()
        assert (answer.status, answer.error) == (400, "invalid_json")
        assert answer.headers["Connection"] == "close"
        assert client.is_closed()


@pytest.mark.parametrize(
    "sent", [post_head("Content-Length: 1000") + BODY, post_head(CHUNKED) + chunk(BODY)]
)
def test_body_that_ends_early_is_400_not_408(service: ServiceProcess, sent: bytes) -> None:
    with service.connect() as client:
        client.send(sent).sock.shutdown(socket.SHUT_WR)
        assert client.response().error == "invalid_json"


# --- Body deadline --------------------------------------------------------------------------------

LONGEST = 10 * DEADLINE  # of what takes a deadline; only for what hangs
STALLED = {
    "length": post_head("Content-Length: 1000"),
    "chunked": post_head(CHUNKED) + chunk(BODY[:20]),
    "in a chunk's size": post_head(CHUNKED) + chunk(BODY[:20]) + b"1",
    "in a chunk": post_head(CHUNKED) + b"9\r\n12345",
    "behind a chunk": post_head(CHUNKED) + b"5\r\n12345\r",
    "in trailers": post_head(CHUNKED) + chunk(BODY) + b"0\r\nName: val",
    "behind trailers": post_head(CHUNKED) + chunk(BODY) + b"0\r\nName: value\r\n",
    "behind another": post() + post_head("Content-Length: 1000") + BODY,
}


@pytest.mark.parametrize("sent", STALLED.values(), ids=STALLED)
def test_stalled_body_is_answered_at_the_deadline(hasty: ServiceProcess, sent: bytes) -> None:
    with hasty.connect() as client:
        begin = time.monotonic()
        client.send(sent)
        if sent.startswith(post()):
            assert client.response().status == 200
        answer = client.response()
        assert DEADLINE - 0.1 <= time.monotonic() - begin < LONGEST
        assert answer.error == "request_timeout"
        assert answer.headers["Connection"] == "close"
        assert client.is_closed()


@pytest.mark.parametrize(
    ("head", "part", "status"),
    [
        (post_head("Content-Length: 1000"), b"x", 408),
        (post_head(CHUNKED), chunk(b"x"), 408),
        (post_head("Content-Length: 1000", path="/health"), b"x", 405),
    ],
    ids=["length", "chunked", "wrong path"],
)
def test_trickled_body_ends_at_the_deadline(
    hasty: ServiceProcess, head: bytes, part: bytes, status: int
) -> None:
    with hasty.connect() as client:
        begin = time.monotonic()
        assert client.send(head).trickle(part).response().status == status
        assert DEADLINE - 0.1 <= time.monotonic() - begin < LONGEST


@pytest.mark.parametrize("part", [b"", b"x"], ids=["stalled", "trickled"])
def test_head_that_does_not_end_closes_the_connection(hasty: ServiceProcess, part: bytes) -> None:
    with hasty.connect() as client:
        begin = time.monotonic()
        client.send(b"POST /process HTTP/1.1\r\nHost: ").trickle(part)
        assert DEADLINE - 0.1 <= time.monotonic() - begin < LONGEST
        assert client.is_closed()


# --- Connections ----------------------------------------------------------------------------------


def test_silent_connections_hold_no_thread(service: ServiceProcess) -> None:
    """If they did, each would have to be closed at its deadline before anything is answered."""
    with ExitStack() as stack:
        silent = [stack.enter_context(service.connect()).sock for _ in range(24)]
        assert service.get("/health").status == 200
        assert select.select(silent, [], [], 0)[0] == []


def test_body_has_its_whole_time_after_a_silence(hasty: ServiceProcess) -> None:
    def status_after_silence() -> int:
        with hasty.connect() as client:
            time.sleep(2 * DEADLINE)
            client.send(post_head(f"Content-Length: {len(BODY)}", "Expect: 100-continue"))
            assert client.is_continued()
            time.sleep(DEADLINE / 2)
            return client.send(BODY).response().status

    # A machine may stand still for a second, but not each time.
    assert 200 in (status_after_silence() for _ in range(3))


def test_connection_serves_on_after_every_kind_of_answer(service: ServiceProcess) -> None:
    requests = {
        post(): 200,
        post(b"{"): 400,
        post(b"{}"): 401,
        post(b"x", path="/nothing"): 404,
        post(b"x", path="/health"): 405,
        post(BODY, path="//process"): 404,
        request_head("GET", "/health"): 200,
    }
    with service.connect() as client:
        for sent, status in requests.items():
            answer = client.send(sent).response()
            assert answer.status == status
            assert answer.headers["Connection"] == "keep-alive"


@pytest.mark.parametrize("size", [7, 300, 10_000])
def test_pipelined_requests_are_answered_in_order(service: ServiceProcess, size: int) -> None:
    """Also behind messages that wait for SQS, whose thread is free meanwhile."""
    health, nothing = request_head("GET", "/health"), request_head("GET", "/nothing")
    chunked = post_head(CHUNKED) + chunk(BODY) + chunk(b"")
    sent = [post(b"{"), post(), health, chunked, nothing, b"\r\n" + post(), health, nothing]
    stream = b"".join(sent)
    with service.connect() as client:
        for start in range(0, len(stream), size):
            client.send(stream[start : start + size])
        answers = [client.response() for _ in sent]
    assert [answer.status for answer in answers] == [400, 200, 200, 200, 404, 200, 200, 404]
    assert [n for n, answer in enumerate(answers) if "message_id" in answer.json] == [1, 3, 5]


@pytest.mark.parametrize("together", [True, False])
def test_line_break_behind_a_body_begins_no_request(hasty: ServiceProcess, together: bool) -> None:
    """It would have to be complete by the deadline of a body."""
    with hasty.connect() as client:
        client.send(post() + b"\r\n" * together)
        assert client.response().status == 200
        client.send(b"\r\n" * (not together))
        assert not client.is_closed(2 * DEADLINE)
    with hasty.connect() as client:
        client.send(post(), b"\r\n", request_head("GET", "/health"))
        assert [client.response().status for _ in range(2)] == [200, 200]


@pytest.mark.parametrize("options", ["close", "TE, close", "keep-alive, close", "Close ,TE"])
@pytest.mark.parametrize("path", ["/process", "/health"])
def test_connection_closes_when_the_client_asks_for_it(
    service: ServiceProcess, options: str, path: str
) -> None:
    with service.connect() as client:
        answer = client.send(post(BODY, f"Connection: {options}", path=path)).response()
        assert answer.headers["Connection"] == "close"
        assert client.is_closed()


@pytest.mark.parametrize(("options", "closes"), [("", True), ("Connection: keep-alive", False)])
def test_http_1_0_is_answered_and_closed_unless_kept_alive(
    service: ServiceProcess, options: str, closes: bool
) -> None:
    with service.connect() as client:
        client.send(post(BODY, options or "A: b").replace(b" HTTP/1.1", b" HTTP/1.0"))
        answer = client.response()
        assert (answer.status, answer.headers["Connection"] == "close") == (200, closes)
        assert client.is_closed() if closes else client.send(post()).response().status == 200


def test_rest_behind_a_short_length_is_not_logged(service: ServiceProcess) -> None:
    with service.connect() as client:
        client.send(post_head("Content-Length: 2"), b'{}"token": "SECRET-token"\r\n\r\n')
        assert client.response().status == 401
        refused = client.response()
        assert refused.status == 400
    eventually(lambda: str(refused.headers["X-Request-Id"]) in service.output())
    assert "SECRET" not in service.output()


# --- What Gunicorn refuses by itself --------------------------------------------------------------

UNREADABLE = {
    "garbage": b"garbage\r\n\r\n",
    "two lengths": post_head("Content-Length: 2", "Content-Length: 3000") + b"{}",
    "two lengths, the longer first": post_head("Content-Length: 3000", "Content-Length: 2"),
    "a length and chunks": post_head("Content-Length: 3000", CHUNKED),
    "chunks twice": post_head(CHUNKED, CHUNKED),
    "no number": post_head("Content-Length: +3000"),
    "unknown coding": post_head("Transfer-Encoding: secret"),
    "unknown expectation": post_head("Content-Length: 2", "Expect: wonders") + b"{}",
    "bytes in path": "GET /\u00e9 HTTP/1.1\r\n\r\n".encode(),
    "too long a request line": request_head("GET", "/" + "x" * 9000),
    "too long a header": request_head("GET", "/health", "A: " + "x" * 20_000),
    "too many headers": request_head("GET", "/health", *(f"A{n}: x" for n in range(150))),
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_what_is_no_http_is_refused_in_json(service: ServiceProcess, what: str) -> None:
    with service.connect() as client:
        begin = time.monotonic()
        answer = client.send(UNREADABLE[what]).response()
        assert time.monotonic() - begin < LONGEST, "it has waited for a body"
        assert answer.error == ("request_too_large" if "too" in what else "invalid_json")
        assert answer.headers["Connection"] == "close"
        assert client.is_closed()


SCHEMES = ("X-Forwarded-Proto: https", "X-Forwarded-Proto: http", "X-Forwarded-SSL: off")
ODD = {
    "headers of a neighbour": request_head("GET", "/health", *SCHEMES),
    "SCRIPT_NAME header": request_head("GET", "/health", "SCRIPT_NAME: /x", "PATH_INFO: /y"),
    "long query": request_head("GET", "/health?" + "x" * 8000),
    "absolute form": request_head("GET", "http://other/health"),
    "no host, HTTP/1.0": b"GET /health HTTP/1.0\r\n\r\n",
}


@pytest.mark.parametrize("sent", ODD.values(), ids=ODD)
def test_odd_but_well_formed_request_is_200(service: ServiceProcess, sent: bytes) -> None:
    assert service.request(sent).status == 200


@pytest.mark.parametrize("target", ["/%ff%00", "*"])
def test_unknown_target_is_404(service: ServiceProcess, target: str) -> None:
    assert service.request(request_head("OPTIONS", target)).error == "not_found"


# --- Logs and metrics -----------------------------------------------------------------------------


def test_every_line_of_output_is_json_without_secrets(start_service: StartService) -> None:
    with start_service(LOG_LEVEL="DEBUG") as service:
        service.get("/health")
        service.request(post())
        service.request(post(b"{"))
        eventually(lambda: [line for line in service.log() if line.get("status") == 400])
        eventually(lambda: {line["level"] for line in service.log()} == {"DEBUG", "INFO"})
        # Gunicorn logs it as an error.
        kill(service.workers()[0])
        eventually(lambda: "SIGKILL" in service.output())
    lines = service.log()
    assert any(line["message"].startswith("Listening at") for line in lines)
    assert service.errors() == ""
    assert {line["level"] for line in lines} == {"DEBUG", "INFO", "ERROR"}
    assert any(line.get("path") == "/health" for line in lines)
    assert all({"time", "level", "message"} <= set(line) for line in lines)
    for secret in (TOKEN, *(value for name, value in DATA.items() if name != "email_timestream")):
        assert secret not in service.output()


def test_lines_of_several_workers_do_not_mix_in_a_pipe(
    start_service: StartService, tmp_path: Path
) -> None:
    pipe, path, asked = tmp_path / "pipe", "/" + "x" * 7000, 400
    os.mkfifo(pipe)
    with ThreadPoolExecutor(8) as pool:
        reading = pool.submit(pipe.read_bytes)
        service = start_service(PIPE=str(pipe))
        service.command = ("sh", "-c", 'exec "$@" >"$PIPE"', "sh", *gunicorn())
        with service:
            answers = list(pool.map(lambda _: service.get(path), range(asked)))
    assert {answer.status for answer in answers} == {404}
    lines = reading.result().splitlines()
    assert max(map(len, lines)) < 4000
    assert sum("characters cut" in json.loads(line).get("path", "") for line in lines) == asked


def test_warnings_about_credentials_are_json(start_service: StartService, tmp_path: Path) -> None:
    config = tmp_path / "config"
    keys = {"Version": 1, "AccessKeyId": "a", "SecretAccessKey": "s3cr3t", "SessionToken": "t"}
    keys["Expiration"] = "2099-01-01 00:00:00 XYZ"
    config.write_text(f"[default]\ncredential_process = echo '{json.dumps(keys)}'\n")
    with start_service(AWS_CONFIG_FILE=str(config), AWS_ACCESS_KEY_ID="") as service:
        message = service.get("/ready").json["message"]
        eventually(lambda: "UnknownTimezoneWarning" in service.output())
    assert "credentials" in message
    assert service.errors() == ""
    assert any(line["logger"] == "py.warnings" for line in service.log())
    assert "s3cr3t" not in service.output()


REFUSED = 'email_processor_requests_total{outcome="invalid_json"}'
ANSWERED = 'email_processor_requests_total{outcome="success"}'
READ = 'email_processor_token_reads_total{result="success"}'
READ_AT = "email_processor_token_read_timestamp_seconds"
ACCEPTED = [f'email_processor_tokens_accepted_total{{parameter="{name}"}}' for name in ("/a", "/b")]
BUILD_INFO = f'email_processor_build_info{{commit="{app.COMMIT}",version="{app.VERSION}"}}'


def test_metrics_are_those_of_all_workers_together(service: ServiceProcess) -> None:
    before = service.metrics()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: service.request(post(b"{")), range(40)))
    assert {answer.status for answer in answers} == {400}
    assert service.metrics()[REFUSED] - before[REFUSED] == 40


def test_metrics_begin_with_every_series_at_nought(
    start_service: StartService, tmp_path: Path
) -> None:
    """In a folder of one's own, too, in which an earlier run has left its files."""
    folder = tmp_path / "not" / "there"
    known = {
        sample.name
        for family in REGISTRY.collect()
        for sample in family.samples
        if sample.name.startswith("email_processor") and not sample.name.endswith("_created")
    } | {"email_processor_tokens_accepted_total"}
    for _ in range(2):
        settings = {"PROMETHEUS_MULTIPROC_DIR": str(folder), "TOKEN_SSM_PARAMETER": "/a,/b", **ONE}
        with start_service(**settings) as service:
            metrics = service.metrics()
            assert {name.partition("{")[0] for name in metrics} == known
            # The start asks for /health, and the worker reads the token.
            counted = {name for name, value in metrics.items() if value}
            assert counted <= {ANSWERED, READ, READ_AT, BUILD_INFO}
            assert [metrics[name] for name in ACCEPTED] == [0, 0]
            assert service.request(post(b"{")).status == 400
            assert service.metrics()[REFUSED] == 1
        (folder / "counter_4711.db").write_bytes(b"of an older version")
        (folder / "notes.txt").write_text("somebody's own")
    assert (folder / "notes.txt").exists()


def test_worker_that_ends_takes_its_gauges_alone(
    start_service: StartService, fake_aws: FakeAws
) -> None:
    fake_aws.set(faults={"SendMessage": {"kind": "reset"}})
    begin, circuits = time.time(), "email_processor_sqs_circuits_open"
    with start_service(**fake_aws.variables(), **ONE) as service:

        def is_open_after_a_request() -> bool:
            service.request(post())
            return service.metrics()[circuits] == 1

        def is_closed() -> bool:
            with suppress(OSError, AssertionError):  # the killed one's connections end
                return service.metrics()[circuits] == 0
            return False

        eventually(is_open_after_a_request)
        before = service.metrics()
        kill(service.workers()[0])
        eventually(is_closed)
        after = service.metrics()
        eventually(lambda: begin <= service.metrics()[READ_AT] <= time.time())
    counters = [name for name in before if re.search("_(total|count|sum|bucket)", name)]
    assert REFUSED in counters
    assert [name for name in counters if after[name] < before[name]] == []


def test_pod_identifies_its_build_once(start_service: StartService) -> None:
    with start_service(COMMIT="0123abc", GUNICORN_WORKERS="3") as service:

        def metrics_after_the_kill() -> dict[str, float]:
            with suppress(OSError, AssertionError):  # the killed one's connections end
                return service.metrics()
            return {}

        assert service.get("/").json["commit"] == "0123abc"
        old = service.workers()
        kill(old[0])
        eventually(lambda: len(set(service.workers()) - set(old[1:])) == 1)
        eventually(lambda: all(map(has_booted, service.workers())))
        metrics = eventually(metrics_after_the_kill)
        service.process.send_signal(signal.SIGHUP)
        eventually(lambda: len(set(service.workers()) - set(old)) == 3)
        lines = service.log()
    builds = {name: value for name, value in metrics.items() if "build_info" in name}
    assert builds == {BUILD_INFO.replace(app.COMMIT, "0123abc"): 1}
    (start,) = [line for line in lines if "commit" in line]
    assert start == lines[0]
    settings = {"workers": 3, "threads": 2, "queue": service.variables["SQS_QUEUE_URL"]}
    said = {"version": app.VERSION, "commit": "0123abc", "message": "service starts", **settings}
    assert said.items() <= start.items()


def test_reload_keeps_the_counters(start_service: StartService) -> None:
    with start_service() as service:
        assert service.request(post(b"{")).status == 400
        old = set(service.workers())
        service.process.send_signal(signal.SIGHUP)
        eventually(lambda: len(set(service.workers()) - old) == 4)
        eventually(lambda: not old & set(service.workers()))
        assert {service.request(post(b"{")).status for _ in range(20)} == {400}
        assert service.metrics()[REFUSED] == 21


# --- Start and stop -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "value"), [("PORT", "http"), ("PROMETHEUS_MULTIPROC_DIR", "/dev/null/x")]
)
def test_unusable_variable_stops_the_start_with_a_line(variable: str, value: str) -> None:
    variables = {"SQS_QUEUE_URL": "http://sqs/queue", variable: value}
    run = subprocess.run(
        gunicorn(),
        cwd=PROJECT,
        env=clean_environment(**variables),
        capture_output=True,
        timeout=WAIT,
    )
    assert run.returncode != 0
    (line,) = run.stderr.decode().splitlines()
    assert variable in line
    assert run.stdout == b""


UNUSABLE = {"read-only": "ro", "small": "size=64k", "of somebody else": "mode=700,uid=1"}


def with_dev_shm(options: str) -> tuple[str, ...]:
    """Gunicorn with a /dev/shm of these mount options, as an unprivileged user."""
    mount = f"mount -t tmpfs -o {options} tmpfs /dev/shm"
    command = ("unshare", "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh")
    try:
        subprocess.run([*command, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs the right to mount: {error}")
    unprivileged = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")
    return (*command, *unprivileged, *gunicorn())


@pytest.mark.parametrize("options", UNUSABLE.values(), ids=UNUSABLE)
def test_metrics_go_into_the_temporary_folder_if_dev_shm_cannot_be_used(
    start_service: StartService, options: str
) -> None:
    service = start_service()
    service.command = with_dev_shm(options)
    with service:
        workers = service.workers()
        assert {service.request(post(b"{")).status for _ in range(40)} == {400}
        assert service.metrics()[REFUSED] == 40
        assert service.workers() == workers
        assert metrics_folder(workers[0]).parent == service.temporary


@pytest.mark.parametrize("options", UNUSABLE.values(), ids=UNUSABLE)
def test_named_folder_that_cannot_be_used_stops_the_start_with_a_line(options: str) -> None:
    variables = {"SQS_QUEUE_URL": "http://sqs/queue", "PROMETHEUS_MULTIPROC_DIR": "/dev/shm/x"}
    command = with_dev_shm(options)
    run = subprocess.run(
        command, cwd=PROJECT, env=clean_environment(**variables), capture_output=True, timeout=WAIT
    )
    assert run.returncode != 0
    (line,) = run.stderr.decode().splitlines()
    assert "PROMETHEUS_MULTIPROC_DIR" in line
    assert "/dev/shm/x" in line


def test_gunicorn_settings_fit_the_deployment() -> None:
    printed = subprocess.run(
        gunicorn("--print-config"),
        cwd=PROJECT,
        env=clean_environment(SQS_QUEUE_URL="http://sqs/queue"),
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=True,
    )
    found = dict(re.findall(r"^(\w+) += (.+)$", printed.stdout, re.MULTILINE))
    expected = {
        "workers": "4",
        "threads": "2",
        "keepalive": "75",
        "graceful_timeout": "25",
        "preload_app": "True",
        "max_requests": "0",
        "control_socket_disable": "True",
        "accesslog": "None",
    }
    assert {name: found[name] for name in expected} == expected
    assert ":8080" in found["bind"]
    assert found["worker_tmp_dir"] == ("/dev/shm" if Path("/dev/shm").is_dir() else "None")


def test_several_workers_use_all_cores(service: ServiceProcess) -> None:
    for pid in service.workers():
        assert os.sched_getaffinity(pid) == os.sched_getaffinity(0)


def test_no_thread_is_started_before_the_fork(service: ServiceProcess) -> None:
    assert len(list(Path(f"/proc/{service.process.pid}/task").iterdir())) == 1


def test_each_worker_asks_for_its_token_once_unasked(
    start_service: StartService, fake_aws: FakeAws
) -> None:
    with start_service(**fake_aws.variables()) as service:
        seen = {"GetParameters": 4, "GetQueueAttributes": 4}
        eventually(lambda: fake_aws.counts()["calls"] == seen)
        assert {service.request(post()).status for _ in range(20)} == {200}
        assert fake_aws.counts()["calls"].items() >= seen.items()


def test_sigterm_answers_what_was_begun(start_service: StartService) -> None:
    with start_service() as service, service.connect() as idle, service.connect() as begun:
        eventually(lambda: {service.get("/ready").status for _ in range(12)} == {200})
        assert idle.send(request_head("GET", "/health")).response().status == 200
        begun.send(post_head(f"Content-Length: {len(BODY)}", "Expect: 100-continue"))
        assert begun.is_continued()
        service.process.send_signal(signal.SIGTERM)
        assert begun.send(BODY).response().status == 200
        assert service.stop() < 25, "an idle connection held it up until Gunicorn kills"


def test_client_helper_sees_an_open_connection_as_open(service: ServiceProcess) -> None:
    with Client(service.port) as client:
        assert client.send(request_head("GET", "/health")).response().status == 200
        assert not client.is_closed(0.1)
