"""The service as a client sees it, over real sockets: framing, deadlines, connections, log, start
and stop.
"""

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
from contextlib import suppress
from pathlib import Path

import pytest
from client import BODY, DATA, Client, chunk, post, post_head, request_head
from fake_aws import TOKEN, FakeAws
from prometheus_client import REGISTRY
from service import (
    ServiceProcess,
    StartService,
    eventually,
    gunicorn,
    has_booted,
    kill,
    metrics_folder,
    run_gunicorn,
)

import app

LIMIT = 2_097_152  # MAX_REQUEST_BYTES
DEADLINE = 1.0  # seconds: BODY_TIMEOUT_SECONDS of the service with a short deadline
TOO_LATE = 10 * DEADLINE  # only a defect takes that long
ONE_WORKER = {"GUNICORN_WORKERS": "1"}
CHUNKED = "Transfer-Encoding: chunked"
EXPECT = "Expect: 100-continue"
HEALTH = request_head("GET", "/health")


@pytest.fixture(scope="module")
def service(start_service: StartService) -> Iterator[ServiceProcess]:
    """The defaults: 4 workers with 2 threads each. No test waits for its deadline of 60 s."""
    with start_service(BODY_TIMEOUT_SECONDS="60") as service:
        yield service


@pytest.fixture(scope="module")
def hasty_service(start_service: StartService) -> Iterator[ServiceProcess]:
    """The same with a body deadline of one second."""
    with start_service(BODY_TIMEOUT_SECONDS=str(DEADLINE)) as service:
        yield service


def test_post_that_is_200_is_in_the_queue(service: ServiceProcess, fake_aws: FakeAws) -> None:
    response = service.request(post(BODY, "X-Request-Id: r-1", "Idempotency-Key: k-1"))
    assert response.status == 200
    (message,) = fake_aws.messages()
    assert message["message_id"] == response.json["message_id"]
    assert json.loads(message["body"]) == DATA
    assert message["attributes"].pop("ProcessedAt")
    assert message["attributes"] == {
        "ContentType": "application/json",
        "RequestId": "r-1",
        "IdempotencyKey": "k-1",
    }


# --- Bodies ---------------------------------------------------------------------------------------

LARGEST = {
    "length": post(BODY.ljust(LIMIT)),
    "one chunk": post_head(CHUNKED) + chunk(BODY.ljust(LIMIT)) + chunk(b""),
    "10,000 chunks": post_head(CHUNKED)
    + b"".join(chunk(bytes([byte])) for byte in BODY[:-1].ljust(9_999) + BODY[-1:])
    + chunk(b""),
}


@pytest.mark.parametrize("sent", LARGEST.values(), ids=LARGEST)
def test_body_at_the_limit_is_200(service: ServiceProcess, sent: bytes) -> None:
    assert service.request(sent).status == 200


OVERSIZED = {
    "length": post_head(f"Content-Length: {LIMIT + 1}"),
    "chunk size": post_head(CHUNKED) + b"%x\r\n" % (LIMIT + 1),
    "chunks": post_head(CHUNKED) + chunk(b" " * 65_536) * (LIMIT // 65_536) + b"1\r\n",
    "10,001 chunks": post_head(CHUNKED) + chunk(b" ") * 10_001,
}


@pytest.mark.parametrize("sent", OVERSIZED.values(), ids=OVERSIZED)
def test_oversized_body_is_413_before_it_is_sent(client: Client, sent: bytes) -> None:
    response = client.send(sent).response()
    assert (response.status, response.error) == (413, "request_too_large")
    assert response.headers["Connection"] == "close"
    assert client.is_closed()


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (OVERSIZED["length"], 413),
        (OVERSIZED["chunk size"], 413),
        (post_head("Content-Length: 9", "Content-Length: 8"), 400),
        (b"garbage\r\n", 400),
    ],
    ids=["oversized length", "oversized chunk", "two lengths", "garbage"],
)
def test_rejected_client_that_reads_only_after_sending_gets_its_response(
    service: ServiceProcess, head: bytes, status: int
) -> None:
    with service.connect(buffer=4096) as client:
        client.send(head)
        for _ in range(500):
            client.send(b"x" * 4096)
        client.sock.shutdown(socket.SHUT_WR)
        assert client.response().status == status


@pytest.mark.parametrize(
    ("head", "body"),
    [
        (post_head(f"Content-Length: {len(BODY)}", EXPECT, "Connection: close"), BODY),
        (post_head(CHUNKED, EXPECT, "Connection: close"), chunk(BODY) + chunk(b"")),
    ],
    ids=["length", "chunked"],
)
def test_expected_continue_is_sent_once(service: ServiceProcess, head: bytes, body: bytes) -> None:
    with service.connect() as client:
        client.send(head)
        assert client.is_continued()
        for start in range(0, len(body), 50):
            client.send(body[start : start + 50])
        assert client.read_to_end().startswith(b"HTTP/1.1 200")
    with service.connect() as client:
        client.send(post(), head)
        assert client.response().status == 200
        assert client.is_continued()
        assert client.send(body).read_to_end().startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "sent",
    [
        post_head(f"Content-Length: {LIMIT + 1}", EXPECT),
        post_head("Content-Length: 2", "Content-Length: 3", EXPECT),
        post_head("Content-Length: 2", "Expect: wonders"),
        post_head("Content-Length: 2", "Expect: wonders", EXPECT),
        post(BODY, EXPECT, "Connection: close"),
        # RFC 9110 section 10.1.1: an expectation of HTTP/1.0 is ignored.
        post_head("Content-Length: 2", EXPECT).replace(b"HTTP/1.1", b"HTTP/1.0"),
    ],
    ids=["oversized", "two lengths", "unknown", "unknown and known", "with its body", "HTTP/1.0"],
)
def test_continue_is_not_sent_for_a_body_that_is_not_awaited(client: Client, sent: bytes) -> None:
    client.send(sent).sock.shutdown(socket.SHUT_WR)
    assert b"100 Continue" not in client.read_to_end()


@pytest.mark.parametrize("rest", [b"zz\r\n", b"5\r\nhelloX\r\n0\r\n\r\n"])
def test_malformed_chunks_are_400_and_close(client: Client, rest: bytes) -> None:
    response = client.send(post_head(CHUNKED), rest).response()
    assert (response.status, response.error) == (400, "invalid_json")
    assert response.headers["Connection"] == "close"
    assert client.is_closed()


@pytest.mark.parametrize(
    "sent", [post_head("Content-Length: 1000") + BODY, post_head(CHUNKED) + chunk(BODY)]
)
def test_truncated_body_is_400(client: Client, sent: bytes) -> None:
    client.send(sent).sock.shutdown(socket.SHUT_WR)
    assert client.response().error == "invalid_json"


# --- Deadlines ------------------------------------------------------------------------------------

LENGTH = post_head("Content-Length: 1000")
SLOW_BODIES = {
    "stalled": (LENGTH, b""),
    "trickled": (LENGTH, b"x"),
    "trickled chunks": (post_head(CHUNKED), chunk(b"x")),
    "stalled in a chunk": (post_head(CHUNKED) + b"9\r\n12345", b""),
    "stalled in a chunk's size": (post_head(CHUNKED) + chunk(BODY[:20]) + b"1", b""),
    "stalled in trailers": (post_head(CHUNKED) + chunk(BODY) + b"0\r\nName: val", b""),
    "stalled behind another request": (post() + LENGTH + BODY, b""),
}


@pytest.mark.parametrize(("sent", "part"), SLOW_BODIES.values(), ids=SLOW_BODIES)
def test_slow_body_is_408_at_the_deadline(
    hasty_service: ServiceProcess, sent: bytes, part: bytes
) -> None:
    with hasty_service.connect() as client:
        begin = time.monotonic()
        client.send(sent)
        if sent.startswith(post()):
            assert client.response().status == 200
        response = client.trickle(part).response()
        assert DEADLINE - 0.1 <= time.monotonic() - begin < TOO_LATE
        assert (response.status, response.error) == (408, "request_timeout")
        assert response.headers["Connection"] == "close"
        assert part or client.is_closed()


@pytest.mark.parametrize("part", [b"", b"x"], ids=["stalled", "trickled"])
def test_incomplete_head_closes_the_connection_at_the_deadline(
    hasty_service: ServiceProcess, part: bytes
) -> None:
    with hasty_service.connect() as client:
        begin = time.monotonic()
        client.send(b"POST /process HTTP/1.1\r\nHost: ").trickle(part)
        assert DEADLINE - 0.1 <= time.monotonic() - begin < TOO_LATE
        assert client.is_closed()


@pytest.mark.parametrize("at_once", [True, False])
def test_line_break_behind_a_body_has_no_deadline(
    hasty_service: ServiceProcess, at_once: bool
) -> None:
    """Some clients send one. It does not begin a request."""
    with hasty_service.connect() as client:
        client.send(post() + b"\r\n" * at_once)
        assert client.response().status == 200
        client.send(b"\r\n" * (not at_once))
        # Neither a response nor the connection's end comes.
        assert select.select([client.sock], [], [], 2 * DEADLINE)[0] == []
        assert client.send(HEALTH).response().status == 200


# --- Connections ----------------------------------------------------------------------------------


def test_connection_is_kept_alive_after_every_kind_of_response(client: Client) -> None:
    requests = {
        post(): 200,
        post(b"{"): 400,
        post(b"{}"): 401,
        post(b"x", path="/nothing"): 404,
        post(b"x", path="/health"): 405,
        post(BODY, path="//process"): 404,
        HEALTH: 200,
    }
    for sent, status in requests.items():
        response = client.send(sent).response()
        assert response.status == status
        assert response.headers["Connection"] == "keep-alive"


@pytest.mark.parametrize("size", [7, 300, 10_000])
def test_pipelined_requests_get_their_responses_in_order(client: Client, size: int) -> None:
    """Also behind messages that wait for SQS and occupy no thread."""
    nothing = request_head("GET", "/nothing")
    chunked = post_head(CHUNKED) + chunk(BODY) + chunk(b"")
    sent = [post(b"{"), post(), HEALTH, chunked, nothing, b"\r\n" + post(), HEALTH, nothing]
    stream = b"".join(sent)
    for start in range(0, len(stream), size):
        client.send(stream[start : start + size])
    responses = [client.response() for _ in sent]
    assert [response.status for response in responses] == [400, 200, 200, 200, 404, 200, 200, 404]
    assert [n for n, response in enumerate(responses) if "message_id" in response.json] == [1, 3, 5]


@pytest.mark.parametrize("options", ["close", "TE, close", "keep-alive, close", "Close ,TE"])
def test_connection_closes_when_the_client_asks_for_it(client: Client, options: str) -> None:
    response = client.send(post(BODY, f"Connection: {options}")).response()
    assert response.headers["Connection"] == "close"
    assert client.is_closed()


@pytest.mark.parametrize(("header", "closes"), [("A: b", True), ("Connection: keep-alive", False)])
def test_http_1_0_connection_closes_unless_kept_alive(
    client: Client, header: str, closes: bool
) -> None:
    client.send(post(BODY, header).replace(b" HTTP/1.1", b" HTTP/1.0"))
    response = client.response()
    assert (response.status, response.headers["Connection"] == "close") == (200, closes)
    assert client.is_closed() if closes else client.send(post()).response().status == 200


# --- Heads that Gunicorn rejects, or might reject -------------------------------------------------

UNREADABLE = {
    "garbage": b"garbage\r\n\r\n",
    "bare line feed": b"GET /health HTTP/1.1\r\nA: b\nC: d\r\n",
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


@pytest.mark.parametrize("head", UNREADABLE)
def test_malformed_head_is_rejected_in_json_without_its_body(client: Client, head: str) -> None:
    begin = time.monotonic()
    response = client.send(UNREADABLE[head]).response()
    assert time.monotonic() - begin < TOO_LATE, "the service has waited for a body"
    assert response.error == ("request_too_large" if "too" in head else "invalid_json")
    assert response.headers["Connection"] == "close"
    assert client.is_closed()


SCHEMES = ("X-Forwarded-Proto: https", "X-Forwarded-Proto: http", "X-Forwarded-SSL: off")
ODD = {
    "bytes that are no UTF-8": request_head("OPTIONS", "/%ff%00"),
    "asterisk": request_head("OPTIONS", "*"),
    "schemes that contradict each other": request_head("GET", "/health", *SCHEMES),
    "SCRIPT_NAME header": request_head("GET", "/health", "SCRIPT_NAME: /x", "PATH_INFO: /y"),
    "long query": request_head("GET", "/health?" + "x" * 8000),
    "absolute form": request_head("GET", "http://other/health"),
    "no host, HTTP/1.0": b"GET /health HTTP/1.0\r\n\r\n",
}


@pytest.mark.parametrize("sent", ODD.values(), ids=ODD)
def test_odd_but_well_formed_head_is_accepted(service: ServiceProcess, sent: bytes) -> None:
    assert service.request(sent).status == (404 if b"OPTIONS" in sent else 200)


# --- The log --------------------------------------------------------------------------------------


def test_bytes_behind_a_too_short_length_are_not_logged(
    service: ServiceProcess, client: Client
) -> None:
    client.send(post_head("Content-Length: 2"), b'{}"token": "SECRET-token"\r\n\r\n')
    assert client.response().status == 401
    rejected = client.response()
    assert rejected.status == 400
    eventually(lambda: str(rejected.headers["X-Request-Id"]) in service.output())
    assert "SECRET" not in service.output()


def test_every_line_of_output_is_json_without_secrets(start_service: StartService) -> None:
    with start_service(LOG_LEVEL="DEBUG") as service:
        service.get("/health")
        service.request(post())
        service.request(post(b"{"))
        eventually(lambda: [line for line in service.log() if line.get("status") == 400])
        eventually(lambda: {line["level"] for line in service.log()} == {"DEBUG", "INFO"})
        kill(service.workers()[0])  # Gunicorn logs an error
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
    pipe, path, requests = tmp_path / "pipe", "/" + "x" * 7000, 400
    os.mkfifo(pipe)
    with ThreadPoolExecutor(8) as pool:
        reading = pool.submit(pipe.read_bytes)
        service = start_service(PIPE=str(pipe))
        service.command = ("sh", "-c", 'exec "$@" >"$PIPE"', "sh", *gunicorn())
        with service:
            responses = list(pool.map(lambda _: service.get(path), range(requests)))
    assert {response.status for response in responses} == {404}
    lines = reading.result().splitlines()
    assert max(map(len, lines)) < 4000
    assert sum("characters cut" in json.loads(line).get("path", "") for line in lines) == requests


def test_warnings_about_credentials_are_json(start_service: StartService, tmp_path: Path) -> None:
    config = tmp_path / "config"
    keys = {"Version": 1, "AccessKeyId": "a", "SecretAccessKey": "s3cr3t", "SessionToken": "t"}
    keys["Expiration"] = "2099-01-01 00:00:00 XYZ"
    config.write_text(f"[default]\ncredential_process = echo '{json.dumps(keys)}'\n")
    with start_service(AWS_CONFIG_FILE=str(config), AWS_ACCESS_KEY_ID="") as service:
        eventually(lambda: "credentials" in service.get("/ready").json["message"])
        eventually(lambda: "UnknownTimezoneWarning" in service.output())
    assert service.errors() == ""
    assert any(line["logger"] == "py.warnings" for line in service.log())
    assert "s3cr3t" not in service.output()


# --- Metrics --------------------------------------------------------------------------------------

INVALID = 'email_processor_requests_total{outcome="invalid_json"}'
SUCCESS = 'email_processor_requests_total{outcome="success"}'
READ = 'email_processor_token_reads_total{result="success"}'
READ_AT = "email_processor_token_read_timestamp_seconds"
ACCEPTED = [f'email_processor_tokens_accepted_total{{parameter="{name}"}}' for name in ("/a", "/b")]
CIRCUITS_OPEN = "email_processor_sqs_circuits_open"
BUILD_INFO = 'email_processor_build_info{{commit="{}",version="{}"}}'.format


def test_metrics_begin_with_every_series_at_zero(
    start_service: StartService, tmp_path: Path
) -> None:
    """Also in a folder with the files of an earlier run."""
    folder = tmp_path / "not" / "there"
    known = {
        sample.name
        for family in REGISTRY.collect()
        for sample in family.samples
        if sample.name.startswith("email_processor") and not sample.name.endswith("_created")
    } | {"email_processor_tokens_accepted_total"}
    variables = {"PROMETHEUS_MULTIPROC_DIR": str(folder), "TOKEN_SSM_PARAMETER": "/a,/b"}
    for _ in range(2):
        with start_service(**variables, **ONE_WORKER) as service:
            metrics = service.metrics()
            assert {name.partition("{")[0] for name in metrics} == known
            # The start asks for /health, and the worker reads the token.
            counted = {name for name, value in metrics.items() if value}
            assert counted <= {SUCCESS, READ, READ_AT, BUILD_INFO(app.COMMIT, app.VERSION)}
            assert [metrics[name] for name in ACCEPTED] == [0, 0]
            assert service.request(post(b"{")).status == 400
            assert service.metrics()[INVALID] == 1
        (folder / "counter_4711.db").write_bytes(b"of an older version")
        (folder / "notes.txt").write_text("not a metric")
    assert (folder / "notes.txt").exists()


def metrics_after_a_kill(service: ServiceProcess) -> dict[str, float]:
    with suppress(OSError, AssertionError):  # a connection of the killed worker
        return service.metrics()
    return {}


def test_killed_worker_takes_only_its_gauges(
    start_service: StartService, fake_aws: FakeAws
) -> None:
    fake_aws.set(faults={"SendMessage": {"kind": "reset"}})
    begin = time.time()
    with start_service(**ONE_WORKER) as service:

        def is_open_after_a_request() -> bool:
            service.request(post())
            return service.metrics()[CIRCUITS_OPEN] == 1

        eventually(is_open_after_a_request)
        before = service.metrics()
        kill(service.workers()[0])
        eventually(lambda: metrics_after_a_kill(service).get(CIRCUITS_OPEN) == 0)
        after = service.metrics()
        eventually(lambda: begin <= service.metrics()[READ_AT] <= time.time())
    counters = [name for name in before if re.search("_(total|count|sum|bucket)", name)]
    assert INVALID in counters
    assert [name for name in counters if after[name] < before[name]] == []


def test_reload_keeps_the_counters_of_all_workers(start_service: StartService) -> None:
    with start_service() as service:
        assert {service.request(post(b"{")).status for _ in range(20)} == {400}
        assert service.metrics()[INVALID] == 20
        old = set(service.workers())
        service.process.send_signal(signal.SIGHUP)
        eventually(lambda: len(set(service.workers()) - old) == 4)
        eventually(lambda: not old & set(service.workers()))
        assert {service.request(post(b"{")).status for _ in range(20)} == {400}
        assert service.metrics()[INVALID] == 40


def test_pod_identifies_its_build_once(start_service: StartService) -> None:
    with start_service(COMMIT="0123abc", GUNICORN_WORKERS="3") as service:
        assert service.get("/").json["commit"] == "0123abc"
        old = service.workers()
        kill(old[0])
        eventually(lambda: len(set(service.workers()) - set(old[1:])) == 1)
        eventually(lambda: all(map(has_booted, service.workers())))
        metrics = eventually(lambda: metrics_after_a_kill(service))
        service.process.send_signal(signal.SIGHUP)
        eventually(lambda: len(set(service.workers()) - set(old)) == 3)
        lines = service.log()
    builds = {name: value for name, value in metrics.items() if "build_info" in name}
    assert builds == {BUILD_INFO("0123abc", app.VERSION): 1}
    (start,) = [line for line in lines if "commit" in line]
    assert start == lines[0]
    settings = {"workers": 3, "threads": 2, "queue": service.variables["SQS_QUEUE_URL"]}
    build = {"version": app.VERSION, "commit": "0123abc", "message": "service starts"}
    assert {**build, **settings}.items() <= start.items()


# --- Start and stop -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "value"), [("PORT", "http"), ("PROMETHEUS_MULTIPROC_DIR", "/dev/null/x")]
)
def test_unusable_variable_stops_the_start_with_a_line(variable: str, value: str) -> None:
    run = run_gunicorn(**{variable: value})
    assert run.returncode != 0
    (line,) = run.stderr.splitlines()
    assert variable in line
    assert run.stdout == ""


UNUSABLE = {"read-only": "ro", "small": "size=64k", "another user's": "mode=700,uid=1"}


def gunicorn_with_dev_shm(options: str) -> tuple[str, ...]:
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
    service.command = gunicorn_with_dev_shm(options)
    with service:
        workers = service.workers()
        assert {service.request(post(b"{")).status for _ in range(40)} == {400}
        assert service.metrics()[INVALID] == 40
        assert service.workers() == workers
        assert metrics_folder(workers[0]).parent == service.temporary


def test_gunicorn_settings_fit_the_deployment() -> None:
    printed = run_gunicorn(*gunicorn("--print-config")).stdout
    settings = dict(re.findall(r"^(\w+) += (.+)$", printed, re.MULTILINE))
    expected = {
        "workers": "4",
        "threads": "2",
        "keepalive": "75",
        "graceful_timeout": "25",
        "preload_app": "True",
        "max_requests": "0",
        "control_socket_disable": "True",
        "accesslog": "None",
        "worker_tmp_dir": "/dev/shm" if Path("/dev/shm").is_dir() else "None",
    }
    assert {name: settings[name] for name in expected} == expected
    assert ":8080" in settings["bind"]


def test_no_thread_is_started_before_the_fork(service: ServiceProcess) -> None:
    assert len(list(Path(f"/proc/{service.process.pid}/task").iterdir())) == 1


def test_each_worker_reads_token_and_queue_once_at_its_start(
    start_service: StartService, fake_aws: FakeAws
) -> None:
    with start_service() as service:
        reads = {"GetParameters": 4, "GetQueueAttributes": 4}
        eventually(lambda: fake_aws.counts()["calls"] == reads)
        assert {service.request(post()).status for _ in range(20)} == {200}
        assert fake_aws.counts()["calls"].items() >= reads.items()


def test_sigterm_serves_begun_requests_and_writes_the_log(start_service: StartService) -> None:
    with (
        start_service(**ONE_WORKER) as service,
        service.connect() as idle,
        service.connect() as begun,
    ):
        eventually(lambda: service.get("/ready").status == 200)
        idle.send(request_head("GET", "/nothing") * 500)
        assert {idle.response().status for _ in range(500)} == {404}
        begun.send(post_head(f"Content-Length: {len(BODY)}", EXPECT))
        assert begun.is_continued()
        service.process.send_signal(signal.SIGTERM)
        begun.send(BODY, request_head("GET", "/health"))
        assert [begun.response().status for _ in range(2)] == [200, 200]
        assert service.stop() < 25, "the idle connection delayed the end until Gunicorn killed"
    lines = [line for line in service.log() if line.get("error") == "not_found"]
    assert len(lines) == 500
