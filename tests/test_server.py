"""The service as a client sees it: HTTP at the socket, deadlines, log, metrics, start and stop."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from client import BODY, DATA, WAIT, Client, chunk, post, post_head, request_head
from fake_aws import TOKEN, FakeAws
from prometheus_client import REGISTRY
from service import (
    ServiceProcess,
    StartService,
    eventually,
    gunicorn,
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
    assert message["attributes"].items() >= {"RequestId": "r-1", "IdempotencyKey": "k-1"}.items()


# --- Bodies ---------------------------------------------------------------------------------------

LARGEST = {
    "length": post(BODY.ljust(LIMIT)),
    "one chunk": post_head(CHUNKED) + chunk(BODY.ljust(LIMIT)) + chunk(b""),
    "10,000 chunks": post_head(CHUNKED)
    + b"".join(chunk(bytes([byte])) for byte in BODY[:-1].ljust(9_999) + BODY[-1:])
    + chunk(b""),
}
OVERSIZED = {
    "length": post_head(f"Content-Length: {LIMIT + 1}"),
    "chunks": post_head(CHUNKED) + chunk(b" " * 65_536) * (LIMIT // 65_536) + b"1\r\n",
    "10,001 chunks": post_head(CHUNKED) + chunk(b" ") * 10_001,
}


def test_body_at_the_limit_is_200(service: ServiceProcess) -> None:
    for name, sent in LARGEST.items():
        assert service.request(sent).status == 200, name


@pytest.mark.parametrize("sent", OVERSIZED.values(), ids=OVERSIZED)
def test_oversized_body_is_413_before_it_is_sent(client: Client, sent: bytes) -> None:
    response = client.send(sent).response()
    assert (response.status, response.error) == (413, "request_too_large")
    assert response.headers["Connection"] == "close"
    assert client.is_closed()


def test_rejected_client_that_reads_only_after_sending_gets_its_response(
    service: ServiceProcess,
) -> None:
    with service.connect(buffer=4096) as client:
        client.send(OVERSIZED["length"])
        for _ in range(500):
            client.send(b"x" * 4096)
        client.sock.shutdown(socket.SHUT_WR)
        assert client.response().status == 413


def test_rejected_client_that_does_not_close_is_reset(hasty_service: ServiceProcess) -> None:
    with hasty_service.connect() as client:
        assert client.send(OVERSIZED["length"]).response().status == 413
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            eventually(lambda: not client.send(b"x"))


def test_expected_continue_is_sent_once(client: Client) -> None:
    client.send(post(), post_head(f"Content-Length: {len(BODY)}", EXPECT, "Connection: close"))
    assert client.response().status == 200
    assert client.is_continued()
    for start in (0, 50):
        client.send(BODY[start : start + 50])
        assert select.select([client.sock], [], [], 0.1)[0] == []
    assert client.send(BODY[100:]).read_to_end().startswith(b"HTTP/1.1 200")


NOT_AWAITED = {
    "oversized": post_head(f"Content-Length: {LIMIT + 1}", EXPECT),
    "unknown": post_head("Content-Length: 2", "Expect: wonders"),
    "unknown and known": post_head("Content-Length: 2", "Expect: wonders", EXPECT),
    "with its body": post(BODY, EXPECT, "Connection: close"),
    # RFC 9110 section 10.1.1: an expectation of HTTP/1.0 is ignored.
    "HTTP/1.0": post_head("Content-Length: 2", EXPECT).replace(b"HTTP/1.1", b"HTTP/1.0"),
}


def test_continue_is_not_sent_for_a_body_that_is_not_awaited(service: ServiceProcess) -> None:
    for name, sent in NOT_AWAITED.items():
        with service.connect() as client:
            client.send(sent).sock.shutdown(socket.SHUT_WR)
            assert b"100 Continue" not in client.read_to_end(), name


INCOMPLETE = {
    "no chunk": post_head(CHUNKED) + b"zz\r\n",
    "chunk without its end": post_head(CHUNKED) + b"5\r\nhelloX\r\n0\r\n\r\n",
    "truncated length": post_head("Content-Length: 1000") + BODY,
    "truncated chunks": post_head(CHUNKED) + chunk(BODY),
}


def test_malformed_or_truncated_body_is_400_and_closes(service: ServiceProcess) -> None:
    for name, sent in INCOMPLETE.items():
        with service.connect() as client:
            client.send(sent)
            if "truncated" in name:
                client.sock.shutdown(socket.SHUT_WR)
            assert client.response().error == "invalid_json", name
            assert client.is_closed(), name


# --- Deadlines ------------------------------------------------------------------------------------

LATE = {
    "body": (post_head("Content-Length: 1000"), b"x"),
    "chunks": (post_head(CHUNKED) + chunk(BODY[:20]), chunk(b"x")),
    "body behind another request": (post() + post_head("Content-Length: 1000") + BODY, b""),
    "head": (b"POST /process HTTP/1.1\r\nHost: ", b"x"),
}


@pytest.mark.parametrize("name", LATE)
def test_incomplete_request_ends_at_the_deadline(hasty_service: ServiceProcess, name: str) -> None:
    """With 408, or without a response if its head is incomplete."""
    sent, trickled = LATE[name]
    with hasty_service.connect() as client:
        begin = time.monotonic()
        client.send(sent)
        if sent.startswith(post()):
            assert client.response().status == 200
        client.trickle(trickled)
        assert DEADLINE - 0.1 <= time.monotonic() - begin < TOO_LATE
        if name != "head":
            response = client.response()
            assert (response.status, response.error) == (408, "request_timeout")
            assert response.headers["Connection"] == "close"
        assert client.is_closed()


def test_line_break_behind_a_body_has_no_deadline(hasty_service: ServiceProcess) -> None:
    """Some clients send one. It does not begin a request."""
    with hasty_service.connect() as client:
        assert client.send(post() + b"\r\n").response().status == 200
        client.send(b"\r\n")
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
        assert (response.status, response.headers["Connection"]) == (status, "keep-alive")


@pytest.mark.parametrize("size", [7, 10_000])
def test_pipelined_requests_get_their_responses_in_order(client: Client, size: int) -> None:
    """Also behind messages that wait for SQS, and if the client has ended its side meanwhile."""
    nothing = request_head("GET", "/nothing")
    chunked = post_head(CHUNKED) + chunk(BODY) + chunk(b"")
    sent = [post(b"{"), post(), HEALTH, chunked, nothing, b"\r\n" + post(), HEALTH, nothing]
    stream = b"".join(sent)
    for start in range(0, len(stream), size):
        client.send(stream[start : start + size])
    client.sock.shutdown(socket.SHUT_WR)
    responses = [client.response() for _ in sent]
    assert [response.status for response in responses] == [400, 200, 200, 200, 404, 200, 200, 404]
    assert [n for n, response in enumerate(responses) if "message_id" in response.json] == [1, 3, 5]
    assert client.is_closed()


def test_connection_closes_when_the_client_asks_for_it(service: ServiceProcess) -> None:
    for version, header, closes in (
        ("1.1", "Connection: keep-alive, close", True),
        ("1.1", "Connection: Close ,TE", True),
        ("1.0", "A: b", True),
        ("1.0", "Connection: keep-alive", False),
    ):
        with service.connect() as client:
            client.send(post(BODY, header).replace(b"HTTP/1.1", f"HTTP/{version}".encode()))
            response = client.response()
            assert (response.status, response.headers["Connection"] == "close") == (200, closes)
            assert client.is_closed() if closes else client.send(post()).response().status == 200


# --- Heads that Gunicorn rejects, or might reject -------------------------------------------------

MALFORMED = {
    "garbage": b"garbage\r\n\r\n",
    "bare line feed": b"GET /health HTTP/1.1\r\nA: b\nC: d\r\n",
    "two lengths": post_head("Content-Length: 3000", "Content-Length: 2"),
    "a length and chunks": post_head("Content-Length: 3000", CHUNKED),
    "chunks twice": post_head(CHUNKED, CHUNKED),
    "no number": post_head("Content-Length: +3000"),
    "unknown coding": post_head("Transfer-Encoding: secret"),
    "unknown expectation": post_head("Content-Length: 2", "Expect: wonders") + b"{}",
    # A pattern that backtracks takes minutes for it.
    "spaces": request_head("GET", "/health", "Content-Length:" + " " * 4000 + "x\r"),
    "too long a request line": request_head("GET", "/" + "x" * 9000),
    "too long a header": request_head("GET", "/health", "A: " + "x" * 20_000),
    "too long a head": b"GET /health HTTP/1.1\r\n" + b"A: b\r\n" * 12_000,
    "too long headers together": request_head("GET", "/health", *["A: " + "x" * 1000] * 90),
}


def test_malformed_head_is_rejected_in_json_without_its_body(service: ServiceProcess) -> None:
    for name, head in MALFORMED.items():
        with service.connect() as client:
            begin = time.monotonic()
            response = client.send(head).response()
            assert time.monotonic() - begin < TOO_LATE, f"{name}: the service waited for a body"
            expected = "request_too_large" if "too" in name else "invalid_json"
            assert response.error == expected, name
            assert response.headers["Connection"] == "close", name
            assert client.is_closed(), name


SCHEMES = ("X-Forwarded-Proto: https", "X-Forwarded-Proto: http", "X-Forwarded-SSL: off")
ODD = {
    "bytes that are no UTF-8": (request_head("OPTIONS", "/%ff%00"), 404),
    "asterisk": (request_head("OPTIONS", "*"), 404),
    "schemes that contradict each other": (request_head("GET", "/health", *SCHEMES), 200),
    "SCRIPT_NAME": (request_head("GET", "/health", "SCRIPT_NAME: /x", "PATH_INFO: /y"), 200),
    "long query": (request_head("GET", "/health?" + "x" * 8000), 200),
    "absolute form": (request_head("GET", "http://other/health"), 200),
    "no host, HTTP/1.0": (b"GET /health HTTP/1.0\r\n\r\n", 200),
}


def test_odd_but_well_formed_head_is_accepted(service: ServiceProcess) -> None:
    for name, (sent, status) in ODD.items():
        assert service.request(sent).status == status, name


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
    with start_service(LOG_LEVEL="DEBUG", COMMIT="0123abc") as service:
        service.get("/health")
        service.request(post())
        service.request(post(b"{"))
        eventually(lambda: [line for line in service.log() if line.get("status") == 400])
        eventually(lambda: {line["level"] for line in service.log()} == {"DEBUG", "INFO"})
        kill(service.workers()[0])  # Gunicorn logs an error
        eventually(lambda: "SIGKILL" in service.output())
    lines = service.log()
    start = {"message": "service starts", "version": app.VERSION, "commit": "0123abc"}
    start |= {"workers": 4, "threads": 2, "queue": service.variables["SQS_QUEUE_URL"]}
    assert start.items() <= lines[0].items()
    assert any(line["message"].startswith("Listening at") for line in lines)
    assert service.errors() == ""
    assert {line["level"] for line in lines} == {"DEBUG", "INFO", "ERROR"}
    assert any(line.get("path") == "/health" for line in lines)
    assert all({"time", "level", "message"} <= set(line) for line in lines)
    for secret in (TOKEN, *(value for name, value in DATA.items() if name != "email_timestream")):
        assert secret not in service.output()


def test_warnings_of_libraries_are_json(start_service: StartService, tmp_path: Path) -> None:
    keys = {"Version": 1, "AccessKeyId": "a", "SecretAccessKey": "b", "SessionToken": "c"}
    keys["Expiration"] = "2099-01-01 00:00:00 XYZ"
    config = tmp_path / "config"
    config.write_text(f"[default]\ncredential_process = echo '{json.dumps(keys)}'\n")
    with start_service(AWS_CONFIG_FILE=str(config), AWS_ACCESS_KEY_ID="") as service:
        eventually(lambda: "UnknownTimezoneWarning" in service.output())
    assert any(line["logger"] == "py.warnings" for line in service.log())
    assert service.errors() == ""


@pytest.mark.slow
def test_log_without_a_reader_delays_no_request(start_service: StartService) -> None:
    service = start_service(GUNICORN_WORKERS="1", GUNICORN_THREADS="8")
    reader, writer = os.pipe()
    into_pipe = f'exec "$@" >/proc/{os.getpid()}/fd/{writer}'
    service.command = ["sh", "-c", into_pipe, "sh", *service.command]
    with service:
        os.close(writer)
        with service.connect() as client:
            for _ in range(20):  # the pipe has room for 30 lines, the queue for 1,000
                client.send(request_head("GET", "/" + "x" * 2000) * 100)
                assert {client.response().status for _ in range(100)} == {404}
        assert service.request(post()).status == 200
        assert 500 < service.metrics()["email_processor_log_lines_dropped_total"] < 1500
        kill(service.workers()[0])
        eventually(lambda: metrics_after_a_kill(service))
        assert service.stop() < WAIT
    assert service.process.returncode == 0
    assert service.errors() == ""
    os.close(reader)


def sitecustomize(folder: Path, code: str) -> dict[str, str]:
    """Variables with which Python runs the code before the service."""
    (folder / "sitecustomize.py").write_text(textwrap.dedent(code))
    return {"PYTHONPATH": str(folder)}


def test_additional_log_handler_ends_no_worker(start_service: StartService, tmp_path: Path) -> None:
    """As an agent adds one that is imported before the application."""
    add_handler = """\
        import logging.config
        configure = logging.config.dictConfig
        def configure_and_add(config):
            configure(config)
            logging.getLogger().handlers.insert(0, logging.NullHandler())
        logging.config.dictConfig = configure_and_add
        """
    with start_service(**sitecustomize(tmp_path, add_handler), **ONE_WORKER) as service:
        assert service.request(post(b"{")).status == 400
        eventually(lambda: [line for line in service.log() if line.get("status") == 400])


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="needs IPv6")
def test_clients_of_both_address_families_are_logged_plainly(service: ServiceProcess) -> None:
    hosts = {}  # by request id
    for host in ("::1", "127.0.0.1"):
        for sent in (request_head("GET", "/nothing"), b"garbage\r\n"):
            with service.connect(host) as client:
                hosts[client.send(sent).response().headers["X-Request-Id"]] = host

    def logged() -> dict[str, str]:
        lines = (line for line in service.log() if line.get("request_id") in hosts)
        return {line["request_id"]: line["client"] for line in lines}

    eventually(lambda: logged() == hosts)


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


def metrics_after_a_kill(service: ServiceProcess) -> dict[str, float]:
    with suppress(OSError, AssertionError):  # a connection of the killed worker
        return service.metrics()
    return {}


def test_gauges_are_those_of_the_live_workers(
    start_service: StartService, fake_aws: FakeAws
) -> None:
    """test_faults.py has the counters, which outlast a worker."""
    fake_aws.set(faults={"SendMessage": {"kind": "reset"}})
    with start_service(COMMIT="0123abc", GUNICORN_WORKERS="2") as service:

        def circuits_open() -> float:
            service.request(post())
            return service.metrics()[CIRCUITS_OPEN]

        eventually(lambda: circuits_open() == 2)
        kill(service.workers()[0])
        eventually(lambda: metrics_after_a_kill(service).get(CIRCUITS_OPEN) == 1)
        eventually(lambda: metrics_after_a_kill(service)[BUILD_INFO("0123abc", app.VERSION)] == 1)


# --- Start ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "value"), [("PORT", "http"), ("PROMETHEUS_MULTIPROC_DIR", "/dev/null/x")]
)
def test_unusable_variable_stops_the_start_with_a_line(variable: str, value: str) -> None:
    run = run_gunicorn(**{variable: value})
    assert run.returncode != 0
    (line,) = run.stderr.splitlines()
    assert variable in line
    assert run.stdout == ""


@pytest.mark.slow
def test_port_in_use_stops_the_start(service: ServiceProcess) -> None:
    """Also when each worker has its own listening socket, which could share the port."""
    run = run_gunicorn(PORT=str(service.port), GUNICORN_WORKERS="2")
    assert run.returncode == 1
    assert "in use" in run.stdout
    assert service.metrics(), "the files of the other service were removed"


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


@pytest.mark.parametrize("options", ["size=64k", "mode=700,uid=1"], ids=["small", "another user's"])
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


def test_machine_without_ipv6_is_served_on_ipv4(
    start_service: StartService, tmp_path: Path
) -> None:
    without_ipv6 = """\
        import errno, os, socket
        class Socket(socket.socket):
            def __init__(self, family=-1, *arguments, **options):
                if family == socket.AF_INET6:
                    raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
                super().__init__(family, *arguments, **options)
        socket.socket = Socket
        """
    with start_service(**sitecustomize(tmp_path, without_ipv6)) as service:
        assert service.request(post()).status == 200


def test_each_worker_reads_token_and_queue_once_at_its_start(start_service: StartService) -> None:
    with FakeAws() as fake_aws, start_service(**fake_aws.variables()) as service:
        reads = {"GetParameters": 4, "GetQueueAttributes": 4}
        eventually(lambda: fake_aws.counts()["calls"] == reads)
        assert {service.request(post()).status for _ in range(20)} == {200}
        assert fake_aws.counts()["calls"].items() >= reads.items()
        threads = os.listdir(f"/proc/{service.process.pid}/task")
        assert len(threads) == 1, "a thread was started before the fork"


def test_stop_waits_longer_than_any_request_takes() -> None:
    printed = run_gunicorn(*gunicorn("--print-config")).stdout
    seconds = re.search(r"^graceful_timeout += (\d+)$", printed, re.MULTILINE)
    assert seconds
    assert int(seconds[1]) > app.BUCKETS[-1]


# --- Signals --------------------------------------------------------------------------------------


def test_sigterm_serves_begun_and_waiting_requests_and_writes_the_log(
    start_service: StartService,
) -> None:
    with start_service(**ONE_WORKER) as service, ExitStack() as stack:
        eventually(lambda: service.get("/ready").status == 200)
        idle, begun = (stack.enter_context(service.connect()) for _ in range(2))
        idle.send(request_head("GET", "/nothing") * 500)
        assert {idle.response().status for _ in range(500)} == {404}
        begun.send(post_head(f"Content-Length: {len(BODY)}", EXPECT))
        assert begun.is_continued()
        # The event loop accepts up to 64 connections in a turn: the others are in the backlog.
        (worker,) = service.workers()
        os.kill(worker, signal.SIGSTOP)
        connected = [stack.enter_context(service.connect()).send(HEALTH) for _ in range(100)]
        for pid, number in (
            (service.process.pid, signal.SIGTERM),
            (worker, signal.SIGTERM),
            (worker, signal.SIGCONT),
        ):
            os.kill(pid, number)
        begun.send(BODY, HEALTH)
        assert [begun.response().status for _ in range(2)] == [200, 200]
        assert {client.response().status for client in connected} == {200}
        assert service.stop() < 25, "the idle connection delayed the end until Gunicorn killed"
    assert sum(line.get("error") == "not_found" for line in service.log()) == 500


def test_reload_keeps_the_counters_of_all_workers(start_service: StartService) -> None:
    with start_service() as service:
        assert {service.request(post(b"{")).status for _ in range(20)} == {400}
        old = set(service.workers())
        service.process.send_signal(signal.SIGHUP)
        eventually(lambda: len(set(service.workers()) - old) == 4)
        eventually(lambda: not old & set(service.workers()))
        assert service.request(post(b"{")).status == 400
        assert service.metrics()[INVALID] == 21


@pytest.mark.slow
def test_workers_survive_a_pause_of_the_service(start_service: StartService) -> None:
    """As `docker pause` or a live migration makes one."""
    with start_service(GUNICORN_CMD_ARGS="--timeout 5") as service:
        workers = service.workers()
        for pid in (service.process.pid, *workers):
            os.kill(pid, signal.SIGSTOP)
        time.sleep(6.5)  # longer than the timeout
        os.kill(service.process.pid, signal.SIGCONT)
        time.sleep(1.5)  # the master checks once a second, and may be the first to run
        for pid in workers:
            os.kill(pid, signal.SIGCONT)
        assert {service.get("/health").status for _ in range(20)} == {200}
        assert service.workers() == workers


# --- Without Gunicorn -----------------------------------------------------------------------------


def test_flasks_server_works_without_posix(fake_aws: FakeAws, tmp_path: Path) -> None:
    class FlaskServer(ServiceProcess):
        def workers(self) -> list[int]:
            return [self.process.pid]

    without_posix = """\
        import runpy, sys
        hidden = ["gunicorn", "fcntl", "grp", "pwd", "resource", "termios"]
        sys.modules.update(dict.fromkeys(hidden))
        runpy.run_path("app.py", run_name="__main__")
        """
    command = [sys.executable, "-c", textwrap.dedent(without_posix)]
    variables = {**fake_aws.variables(), "GUNICORN_WORKERS": "1"}
    with FlaskServer(tmp_path / "tmp", variables, command) as service:
        assert service.request(post()).status == 200
        assert service.request(post(b"x", path="/nothing")).error == "not_found"
