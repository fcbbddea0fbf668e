"""What needs a real Gunicorn and real sockets: framing, deadlines, connections, start and stop."""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from conftest import (
    BODY,
    DATA,
    PROJECT,
    TOKEN,
    Answer,
    Aws,
    Client,
    Service,
    StartService,
    chunk,
    environment,
    eventually,
    gunicorn,
    kill,
    post,
    post_head,
    request_head,
)
from fake_aws import FakeAws
from prometheus_client import REGISTRY

LIMIT = 2_097_152
DEADLINE = 1.0
CHUNKED = "Transfer-Encoding: chunked"


@pytest.fixture(scope="module")
def service(start_service: StartService) -> Iterator[Service]:
    """The defaults: 4 workers with 2 threads each."""
    with start_service() as service:
        yield service


@pytest.fixture(scope="module")
def hasty(start_service: StartService) -> Iterator[Service]:
    """The same with a body deadline of a second."""
    with start_service(BODY_TIMEOUT_SECONDS=str(DEADLINE)) as service:
        yield service


# --- The way into the queue -----------------------------------------------------------------------


def test_post_is_200_and_the_message_is_in_the_queue(service: Service, aws: Aws) -> None:
    aws.receive()
    answer = service.ask(post(BODY, "X-Request-Id: r-1", "Idempotency-Key: k-1"))
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


@pytest.mark.parametrize("size", [1, 7, 100, 10_000])
def test_chunked_body_is_200(service: Service, size: int) -> None:
    parts = [chunk(BODY[start : start + size]) for start in range(0, len(BODY), size)]
    assert service.ask(post_head(CHUNKED), *parts, b"0\r\n\r\n").status == 200


@pytest.mark.parametrize("expect", [(), ("Expect: 100-continue",)])
@pytest.mark.parametrize("size", [LIMIT + 1, 20_000_000])
def test_oversized_body_is_413_for_a_client_that_sends_all_before_it_reads(
    service: Service, size: int, expect: tuple[str, ...]
) -> None:
    with service.connect() as client:
        answer = client.send(post(b" " * size, *expect)).answer()
        assert (answer.status, answer.error) == (413, "request_too_large")
        assert client.send(post()).answer().status == 200


@pytest.mark.parametrize("size", [LIMIT + 1, 20_000_000])
def test_oversized_chunked_body_is_413(service: Service, size: int) -> None:
    parts = [chunk(b" " * 65_536)] * (size // 65_536 + 1)
    with service.connect() as client:
        answer = client.send(post_head(CHUNKED), *parts, b"0\r\n\r\n").answer()
        assert (answer.status, answer.error) == (413, "request_too_large")
        assert client.send(post()).answer().status == 200


def test_body_of_exactly_the_limit_is_read(service: Service) -> None:
    assert service.ask(post(BODY + b" " * (LIMIT - len(BODY)))).status == 200


@pytest.mark.parametrize(
    "rest",
    [
        b"zz\r\n",
        b"5\r\nhelloX\r\n0\r\n\r\n",
        b"-1\r\n",
        b"5;\x00\r\nhello\r\n0\r\n\r\n",
        b"0\r\nbad\r\n\r\n",
    ],
)
def test_malformed_chunks_are_400_and_end_the_connection(service: Service, rest: bytes) -> None:
    with service.connect() as client:
        answer = client.send(post_head(CHUNKED), rest).answer()
        assert (answer.status, answer.error) == (400, "invalid_json")
        assert answer.headers["Connection"] == "close"
        assert client.is_closed()


@pytest.mark.parametrize(
    "sent", [post_head("Content-Length: 1000") + BODY, post_head(CHUNKED) + chunk(BODY)]
)
def test_body_that_ends_early_is_400_at_once(service: Service, sent: bytes) -> None:
    with service.connect() as client:
        begin = time.monotonic()
        client.send(sent).sock.shutdown(socket.SHUT_WR)
        answer = client.answer()
        assert (answer.status, answer.error) == (400, "invalid_json")
        assert time.monotonic() - begin < 2


# --- Body deadline --------------------------------------------------------------------------------

STALLED = {
    "with Content-Length": post_head("Content-Length: 1000") + BODY[:20],
    "chunked": post_head(CHUNKED) + chunk(BODY[:20]),
    "in a chunk": post_head(CHUNKED) + b"64\r\nab",
    "without a byte": post_head("Content-Length: 1000"),
    "oversized": post_head(f"Content-Length: {LIMIT + 1}") + BODY,
}


@pytest.mark.parametrize("sent", STALLED.values(), ids=STALLED.keys())
def test_stalled_body_is_answered_at_the_deadline_and_the_connection_closed(
    hasty: Service, sent: bytes
) -> None:
    with hasty.connect() as client:
        begin = time.monotonic()
        answer = client.send(sent).answer()
        assert DEADLINE - 0.1 <= time.monotonic() - begin < DEADLINE + 1
        expected = "request_too_large" if str(LIMIT + 1).encode() in sent else "request_timeout"
        assert answer.error == expected
        assert answer.headers["Connection"] == "close"
        assert client.is_closed()


@pytest.mark.parametrize(
    ("head", "part"),
    [(post_head("Content-Length: 1000"), b"x"), (post_head(CHUNKED), chunk(b"x"))],
    ids=["with Content-Length", "chunked"],
)
def test_trickled_body_is_408_at_the_deadline(hasty: Service, head: bytes, part: bytes) -> None:
    with hasty.connect() as client:
        begin = time.monotonic()
        answer = client.send(head).trickle(part)
        assert (answer.status, answer.error) == (408, "request_timeout")
        assert DEADLINE - 0.1 <= time.monotonic() - begin < DEADLINE + 1


@pytest.mark.parametrize("part", [b"", b"x"], ids=["stalled", "trickled"])
@pytest.mark.parametrize(
    "head", [b"POST /process HTTP/1.1\r\nHost: ", b"POST"], ids=["half", "word"]
)
def test_head_that_does_not_end_closes_the_connection_at_the_deadline(
    hasty: Service, head: bytes, part: bytes
) -> None:
    begin = time.monotonic()
    with hasty.connect() as client:
        client.send(head)
        client.sock.settimeout(0.1)
        end = None
        while end is None and time.monotonic() - begin < DEADLINE + 2:
            with suppress(TimeoutError, BrokenPipeError):
                client.sock.sendall(part)
                end = client.sock.recv(1)
    assert end == b""
    assert DEADLINE - 0.1 <= time.monotonic() - begin < DEADLINE + 1


@pytest.mark.parametrize("path", ["/nothing", "/health"])
def test_body_that_nobody_wants_holds_its_thread_no_longer(hasty: Service, path: str) -> None:
    with hasty.connect() as client:
        begin = time.monotonic()
        answer = client.send(post_head("Content-Length: 99", path=path)).trickle(b"x")
        assert answer.status in (404, 405)
        assert time.monotonic() - begin < DEADLINE + 1


# --- Connections ----------------------------------------------------------------------------------


def test_silent_connections_hold_no_thread(service: Service) -> None:
    with ExitStack() as stack:
        for _ in range(24):
            stack.enter_context(service.connect())
        begin = time.monotonic()
        assert service.get("/health").status == 200
        assert time.monotonic() - begin < 1


def test_body_has_its_whole_time_however_long_the_connection_was_silent(hasty: Service) -> None:
    with hasty.connect() as client:
        time.sleep(2 * DEADLINE)
        client.send(post_head(f"Content-Length: {len(BODY)}"))
        time.sleep(DEADLINE / 2)
        assert client.send(BODY).answer().status == 200


def test_connection_serves_on_after_every_kind_of_answer(service: Service) -> None:
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
            answer = client.send(sent).answer()
            assert answer.status == status
            assert answer.headers["Connection"] == "keep-alive"


def test_pipelined_requests_are_answered_in_order(service: Service) -> None:
    with service.connect() as client:
        client.send(post(b"{"), post(), request_head("GET", "/nothing"))
        assert [client.answer().status for _ in range(3)] == [400, 200, 404]


def test_rest_behind_a_short_content_length_is_not_logged(service: Service) -> None:
    with service.connect() as client:
        client.send(post_head("Content-Length: 2"), b'{}"token": "SECRET-token"\r\n\r\n')
        assert client.answer().status == 401
        assert client.answer().status == 400
    assert "SECRET" not in service.output()


# --- What Gunicorn refuses by itself --------------------------------------------------------------

UNREADABLE = {
    "garbage": b"garbage\r\n\r\n",
    "binary": bytes(range(128, 256)) + b"\r\n\r\n",
    "header without colon": request_head("GET", "/health", "broken"),
    "huge request line": request_head("GET", "/" + "x" * 9000),
    "huge header": request_head("GET", "/health", "A: " + "x" * 20_000),
    "many headers": request_head("GET", "/health", *(f"A{n}: x" for n in range(150))),
    "two lengths": post_head("Content-Length: 2", "Content-Length: 3") + b"{}",
    "length and chunks": post_head("Content-Length: 2", CHUNKED) + b"0\r\n\r\n",
    "bad length": post_head("Content-Length: -1"),
    "length in other digits": post_head("Content-Length: \xb2"),
    "long length": post_head("Content-Length: " + "9" * 5000),
    "unknown coding": post_head("Transfer-Encoding: secret"),
    "gzip coding": post_head("Transfer-Encoding: gzip"),
    "unknown expectation": post_head("Content-Length: 2", "Expect: wonders") + b"{}",
    "version": request_head("GET", "/health", version="3.0"),
    "lower-case method": request_head("get", "/health"),
    "bare LF": b"GET /health HTTP/1.1\nHost: x\n\n",
    "NUL in header": request_head("GET", "/health", "A: \0"),
    "folded header": request_head("GET", "/health", "A: x", " y"),
    "bytes in path": "GET /\u00e9 HTTP/1.1\r\n\r\n".encode(),
}


@pytest.mark.parametrize("sent", UNREADABLE.values(), ids=UNREADABLE.keys())
def test_what_is_no_http_is_refused_in_json(service: Service, sent: bytes) -> None:
    with service.connect() as client:
        answer = client.send(sent).answer()
        assert answer.error in ("invalid_json", "request_too_large")
        assert answer.headers["Connection"] == "close"
        assert client.is_closed()


ODD = {
    "SCRIPT_NAME header": request_head("GET", "/health", "SCRIPT_NAME: /x", "PATH_INFO: /y"),
    "absolute form": request_head("GET", "http://other/health"),
    "host junk": b"GET /health HTTP/1.1\r\nHost: <>\"'@[:::\r\n\r\n",
    "no host, HTTP/1.0": b"GET /health HTTP/1.0\r\n\r\n",
    "empty line first": b"\r\n" + request_head("GET", "/health"),
    "query": request_head("GET", "/health?%ff=%00&&&"),
}


@pytest.mark.parametrize("sent", ODD.values(), ids=ODD.keys())
def test_odd_but_well_formed_request_is_200(service: Service, sent: bytes) -> None:
    assert service.ask(sent).status == 200


@pytest.mark.parametrize(
    "target", ["/%ff%00", "/" + "x" * 4000, "/process/", "/process%2f", "/docs/../app.py"]
)
def test_unknown_path_is_404(service: Service, target: str) -> None:
    assert service.ask(request_head("GET", target)).error == "not_found"


@pytest.mark.parametrize(("method", "target"), [("OPTIONS", "*"), ("CONNECT", "host:80")])
def test_target_that_is_no_path_is_404(service: Service, method: str, target: str) -> None:
    assert service.ask(request_head(method, target)).error == "not_found"


# --- Logs and metrics -----------------------------------------------------------------------------


def test_every_line_of_output_is_json_and_none_has_the_token(start_service: StartService) -> None:
    with start_service(LOG_LEVEL="DEBUG") as service:
        service.get("/health")
        service.ask(post())
        service.ask(post(b"{"))
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


REFUSED = 'email_processor_requests_total{outcome="invalid_json"}'
READ_AT = "email_processor_token_read_timestamp_seconds"


def test_metrics_are_those_of_all_workers_together(service: Service) -> None:
    before = service.metrics()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: service.ask(post(b"{")), range(40)))
    assert {answer.status for answer in answers} == {400}
    assert service.metrics()[REFUSED] - before[REFUSED] == 40


def test_every_series_is_there_from_the_start(start_service: StartService) -> None:
    served = {
        f"{sample.name}{{{labels}}}".replace("{}", "")
        for family in REGISTRY.collect()
        for sample in family.samples
        for labels in [",".join(f'{name}="{value}"' for name, value in sample.labels.items())]
        if sample.name.startswith("email_processor") and not sample.name.endswith("_created")
    }
    with start_service() as service:
        metrics = service.metrics()
    assert metrics.keys() == served
    counted = {name for name, value in metrics.items() if value and name != READ_AT}
    # The start asks for /health, and each worker reads the token.
    assert counted <= {
        'email_processor_requests_total{outcome="success"}',
        'email_processor_token_reads_total{result="success"}',
    }


def test_folder_of_the_metrics_is_made_and_emptied_at_the_start(
    start_service: StartService, tmp_path: Path
) -> None:
    folder = tmp_path / "not" / "there"
    counts = []
    for _ in range(2):
        with start_service(PROMETHEUS_MULTIPROC_DIR=str(folder)) as service:
            counts.append(service.metrics()[REFUSED])
            assert service.ask(post(b"{")).status == 400
            assert service.metrics()[REFUSED] == 1
        (folder / "counter_4711.db").write_bytes(b"of an older version")
        (folder / "notes.txt").write_text("somebody's own")
    assert counts == [0, 0]
    assert (folder / "notes.txt").exists()


def test_folder_of_the_metrics_that_cannot_be_made_stops_the_start_with_one_line(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").touch()
    variables = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "file" / "folder")}
    run = subprocess.run(
        gunicorn(),
        cwd=PROJECT,
        env=environment(SQS_QUEUE_URL="http://sqs/queue", **variables),
        capture_output=True,
        timeout=20,
    )
    assert run.returncode != 0
    (line,) = run.stderr.decode().splitlines()
    assert "PROMETHEUS_MULTIPROC_DIR" in line
    assert run.stdout == b""


def test_worker_that_ends_leaves_its_counters_and_takes_its_gauges(
    start_service: StartService, fake: FakeAws, tmp_path: Path
) -> None:
    fake.set(faults={"SendMessage": {"kind": "reset"}})
    variables = {"GUNICORN_WORKERS": "2", "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    begin, circuits = time.time(), "email_processor_sqs_circuits_open"
    with start_service(**fake.environment(), **variables) as service:
        eventually(lambda: service.metrics()[READ_AT] >= begin)

        def open_circuits(number: int) -> bool:
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(lambda _: service.ask(post()), range(8)))
            return service.metrics()[circuits] == number

        eventually(lambda: open_circuits(2))
        before, both = service.metrics(), service.workers()

        service.process.send_signal(signal.SIGTTOU)  # one worker less
        eventually(lambda: len(service.workers()) == 1)
        (last,) = service.workers()
        assert last in both
        eventually(lambda: service.metrics()[circuits] == 1)  # once the master has seen it end
        fewer = service.metrics()
        assert begin <= fewer[READ_AT] <= time.time()

        kill(last)
        eventually(lambda: service.workers() and last not in service.workers())
        replaced = service.metrics()
        assert replaced[circuits] == 0
        eventually(lambda: begin <= service.metrics()[READ_AT] <= time.time())
        gauges = {path.name for path in tmp_path.glob("gauge_*")}
        (new,) = service.workers()
        assert gauges == {f"gauge_livesum_{new}.db", f"gauge_livemin_{new}.db"}
    counters = [name for name in before if not name.endswith(("open", "flight", "_seconds"))]
    assert len(counters) == len(before) - 3
    for name in counters:
        assert before[name] <= fewer[name] <= replaced[name], name


def test_reload_keeps_the_counters(start_service: StartService) -> None:
    with start_service() as service:
        assert service.ask(post(b"{")).status == 400
        old = set(service.workers())
        service.process.send_signal(signal.SIGHUP)
        eventually(lambda: len(set(service.workers()) - old) == 4)
        eventually(lambda: not old & set(service.workers()))
        assert {service.ask(post(b"{")).status for _ in range(20)} == {400}
        assert service.metrics()[REFUSED] == 21


# --- Start and stop -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "value"),
    [("SQS_QUEUE_URL", ""), ("PORT", "http"), ("GUNICORN_THREADS", "0"), ("LOG_LEVEL", "LOUD")],
)
def test_unusable_variable_stops_the_start_with_one_line(variable: str, value: str) -> None:
    variables = {"SQS_QUEUE_URL": "http://sqs/queue", variable: value}
    run = subprocess.run(
        gunicorn(), cwd=PROJECT, env=environment(**variables), capture_output=True, timeout=20
    )
    assert run.returncode != 0
    (line,) = run.stderr.decode().splitlines()
    assert variable in line
    assert run.stdout == b""


def test_gunicorn_settings_are_those_of_the_specification(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQS_QUEUE_URL", "http://sqs/queue")
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "unused")
    conf = runpy.run_path(str(PROJECT / "gunicorn.conf.py"))
    expected = {
        "bind": "[::]:8080" if socket.has_dualstack_ipv6() else "0.0.0.0:8080",
        "reuse_port": sys.platform == "linux",
        "workers": 4,
        "threads": 2,
        "keepalive": 75,
        "graceful_timeout": 25,
        "preload_app": True,
        "max_requests": 0,
        "control_socket_disable": True,
        "worker_tmp_dir": "/dev/shm" if Path("/dev/shm").is_dir() else None,
        "accesslog": None,
    }
    assert {name: conf[name] for name in expected} == expected
    gthread = pytest.importorskip("gunicorn.workers.gthread")
    assert issubclass(conf["worker_class"], gthread.ThreadWorker)


class Silence:
    """A listening socket that takes connections and never answers."""

    def __enter__(self) -> Silence:
        self.sock = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self.sock.getsockname()[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="needs Linux and two cores",
)
@pytest.mark.parametrize(("workers", "one_core"), [(1, True), (2, False)])
def test_a_single_worker_keeps_to_one_core_and_several_use_all(
    start_service: StartService, workers: int, one_core: bool
) -> None:
    with start_service(GUNICORN_WORKERS=str(workers)) as service:
        eventually(lambda: len(service.workers()) == workers)
        all_cores = os.sched_getaffinity(0)
        for pid in service.workers():
            if one_core:
                eventually(lambda pid=pid: len(os.sched_getaffinity(pid)) == 1)
            else:
                assert os.sched_getaffinity(pid) == all_cores


def test_concurrent_requests_share_calls_and_each_gets_the_id_of_its_own_message(
    start_service: StartService, fake: FakeAws
) -> None:
    profile = {"GUNICORN_WORKERS": "1", "GUNICORN_THREADS": "32"}
    with start_service(**fake.environment(), **profile) as service:

        def ask(number: int) -> Answer:
            return service.ask(post(BODY, f"X-Request-Id: r-{number}", "Connection: close"))

        with ThreadPoolExecutor(32) as pool:
            answers = list(pool.map(ask, range(300)))
    assert {answer.status for answer in answers} == {200}
    given = {answer.json["message_id"]: answer.headers["X-Request-Id"] for answer in answers}
    messages = fake.messages()
    assert len(messages) == 300
    assert given == {m["message_id"]: m["attributes"]["RequestId"] for m in messages}
    calls = fake.calls("SendMessage") + fake.calls("SendMessageBatch")
    assert calls < 200, "each would make one of its own"


def test_no_thread_is_started_before_the_fork(start_service: StartService) -> None:
    with start_service() as service:
        assert len(list(Path(f"/proc/{service.process.pid}/task").iterdir())) == 1


def test_each_worker_sees_token_and_queue_once_without_being_asked(
    start_service: StartService, fake: FakeAws
) -> None:
    with start_service(**fake.environment()) as service:
        seen = {"GetParameters": 4, "GetQueueAttributes": 4}
        eventually(lambda: fake.counts()["calls"] == seen)
        assert {service.ask(post()).status for _ in range(20)} == {200}
        assert fake.counts()["calls"] == {**seen, "SendMessage": 20}


def refuse_while_aws_is_away(service: Service) -> Answer:
    """The answer to a POST, while /health answers at once."""
    with ThreadPoolExecutor(1) as pool:
        begin = time.monotonic()
        refusal = pool.submit(service.ask, post())
        while not refusal.done():
            asked = time.monotonic()
            assert service.get("/health").status == 200
            assert time.monotonic() - asked < 1
            time.sleep(0.2)
        assert time.monotonic() - begin < 10
    answer = refusal.result()
    assert answer.status == 503
    assert int(answer.headers["Retry-After"]) > 0
    return answer


@pytest.mark.parametrize(("name", "hangs"), [("SSM", True), ("SSM", False), ("SQS", False)])
def test_aws_out_of_reach_is_503_within_10_s(
    start_service: StartService, name: str, hangs: bool
) -> None:
    with Silence() as away:
        endpoint = away.endpoint if hangs else "http://127.0.0.1:1"
        with start_service(**{f"AWS_ENDPOINT_URL_{name}": endpoint}) as service:
            expected = "token_store_unavailable" if name == "SSM" else "queue_unavailable"
            assert refuse_while_aws_is_away(service).error == expected
            assert service.get("/ready").error == expected


def test_sigterm_answers_what_was_begun_and_leaves_nothing_behind(
    start_service: StartService,
) -> None:
    others = set(Path("/dev/shm").glob("email-processor-*"))
    with start_service() as service, service.connect() as idle, service.connect() as begun:
        assert idle.send(request_head("GET", "/health")).answer().status == 200
        head, rest = post()[:-30], post()[-30:]
        begun.send(head)
        workers = service.workers()
        time.sleep(0.3)  # until a worker reads it
        service.process.send_signal(signal.SIGTERM)
        begun.send(rest)
        assert begun.answer().status == 200
        assert service.stop() < 10
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    assert {path.name for path in service.temporary.iterdir()} == {"stdout", "stderr"}
    assert set(Path("/dev/shm").glob("email-processor-*")) <= others


def test_client_helper_sees_an_open_connection_as_open(service: Service) -> None:
    with Client(service.port) as client:
        assert client.send(request_head("GET", "/health")).answer().status == 200
        assert not client.is_closed(0.1)
