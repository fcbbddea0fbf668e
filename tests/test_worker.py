"""The worker of gunicorn.conf.py against clients that misbehave, with real sockets; and its log."""

from __future__ import annotations

import json
import os
import re
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from client import BODY, Client, chunk, post, post_head, request_head
from conftest import Aws
from fake_aws import TOKEN, FakeAws
from service import (
    PROJECT,
    WAIT,
    ServiceProcess,
    StartService,
    clean_environment,
    eventually,
    gunicorn,
    kill,
)

HEALTH = request_head("GET", "/health")
CLOSE = request_head("GET", "/health", "Connection: close")
BUNDLE = request_head("GET", "/docs/swagger-ui-bundle.js")
# Usual are some hundredths of a second; Gunicorn's own worker needs twenty seconds and more.
CEILING = 5.0
BOTH = CLOSE, post(BODY, "Connection: close")
CLIENTS = 60
NARROW = {"GUNICORN_WORKERS": "1", "GUNICORN_THREADS": "2"}
CHUNKED = "Transfer-Encoding: chunked"


@pytest.fixture(scope="module")
def crowded(start_service: StartService) -> Iterator[ServiceProcess]:
    """Many more clients than threads, and deadlines that end no client during a test."""
    with start_service(**NARROW, BODY_TIMEOUT_SECONDS="60") as service:
        yield service


@pytest.fixture(scope="module")
def service(start_service: StartService) -> Iterator[ServiceProcess]:
    with start_service(GUNICORN_WORKERS="1", BODY_TIMEOUT_SECONDS="1") as service:
        yield service


def assert_serves(
    service: ServiceProcess,
    workers: list[int],
    times: int = 20,
    requests: Sequence[bytes] = (CLOSE,),
) -> None:
    """The requests are answered again and again, by the workers that there were before."""
    for _ in range(times):
        for sent in requests:
            begin = time.monotonic()
            assert service.request(sent).status == 200
            assert time.monotonic() - begin < CEILING
    assert service.workers() == workers


# --- Clients that do not close --------------------------------------------------------------------

ANSWERED = {
    "Connection: close": CLOSE,
    "HTTP/1.0": b"GET /health HTTP/1.0\r\n\r\n",
    "garbage without an end": b"garbage\r\n",
    "refused POST": post(b"{}", "Connection: close"),
    "two lengths": post_head("Content-Length: 2", "Content-Length: 3") + b"{}",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "garbage behind a request": HEALTH + b"\0garbage\r\n\r\n",
    "oversized length": post_head("Content-Length: 3000000") + b"x" * 10_000,
    "oversized chunk": post_head(CHUNKED) + b"ffffffff\r\n" + b"x" * 10_000,
    "two lengths without a body": post_head("Content-Length: 2", "Content-Length: 3000"),
}
UNANSWERED = {
    "nothing": b"",
    "TLS": bytes.fromhex("16030100c8010000c40303") + bytes(range(50, 250)),
    "half a head": b"POST /process HTTP/1.1\r\nHost: ",
    "half a head of another method": b"M-SEARCH / HTTP/1.1\r\nHost: ",
    "half a head behind a request": HEALTH + b"POST /process HTTP/1.1\r\nHost: ",
    "half a body": post_head("Content-Length: 1000") + BODY,
    "half a body behind a POST": post() + post_head("Content-Length: 1000") + BODY,
    "large half a body": post_head("Content-Length: 1000000") + b" " * 900_000,
    "half a chunk": post_head(CHUNKED) + b"ff\r\n12345",
    "half a chunk's size": post_head(CHUNKED) + chunk(BODY) + b"f",
    "half a chunk's extension": post_head(CHUNKED) + b"5;name=",
    "half the trailers": post_head(CHUNKED) + chunk(BODY) + b"0\r\nName: value\r\n",
}

UNREAD = {"long answers": BUNDLE * 3, "many answers": request_head("GET", "/openapi.json") * 100}
SENT_ON = {
    "flood": b"garbage\r\n\r\n" + b"x" * 60_000,
    "trickle": b"x",
    "requests, and no answer is read": HEALTH * 500,
    "oversized bodies": post_head("Content-Length: 3000000") + b"x" * 60_000,
}


def stays(client: Client, how: str) -> None:
    client.send((ANSWERED | UNANSWERED)[how])
    if how in ANSWERED:
        client.response()


def takes_no_answer(client: Client, how: str) -> None:
    client.send(UNREAD[how])


def leaves_early(client: Client, how: str) -> None:
    client.send(HEALTH)
    if how == "half-closed":
        client.sock.shutdown(socket.SHUT_WR)
    else:
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.sock.close()


CROWDS = [
    *((stays, how) for how in ANSWERED | UNANSWERED),
    *((takes_no_answer, how) for how in UNREAD),
    *((leaves_early, how) for how in ("half-closed", "reset")),
]


@pytest.mark.parametrize(("behave", "how"), CROWDS, ids=[how for _, how in CROWDS])
def test_crowd_that_misbehaves_holds_up_nobody(
    crowded: ServiceProcess, behave: Callable[[Client, str], None], how: str
) -> None:
    workers = crowded.workers()
    with ExitStack() as stack:
        for _ in range(CLIENTS):
            behave(stack.enter_context(crowded.connect(buffer=4096)), how)
        assert_serves(crowded, workers, requests=BOTH)


@pytest.mark.parametrize("part", SENT_ON.values(), ids=SENT_ON)
def test_crowd_that_goes_on_sending_holds_up_nobody(crowded: ServiceProcess, part: bytes) -> None:
    workers, done = crowded.workers(), threading.Event()
    with ExitStack() as stack:
        clients = [stack.enter_context(crowded.connect(buffer=4096)) for _ in range(CLIENTS)]
        for client in clients:
            client.sock.setblocking(False)

        def feed() -> None:
            while not done.wait(0.05):
                for client in clients:
                    with suppress(OSError):
                        client.sock.send(part)

        feeder = threading.Thread(target=feed)
        feeder.start()
        stack.callback(feeder.join)
        stack.callback(done.set)
        assert_serves(crowded, workers)


def test_pipelined_requests_of_a_half_closed_client_are_answered(service: ServiceProcess) -> None:
    with service.connect() as client:
        client.send(HEALTH * 5).sock.shutdown(socket.SHUT_WR)
        assert [client.response().status for _ in range(5)] == [200] * 5
        assert client.is_closed()


@pytest.mark.parametrize(
    ("sent", "status"), [(CLOSE, 200), (post_head("Content-Length: 3000000"), 413)]
)
def test_client_that_does_not_close_is_closed(
    service: ServiceProcess, sent: bytes, status: int
) -> None:
    """Though the kernel would keep the connection for as long as the client does."""
    with service.connect() as client:
        assert client.send(sent).response().status == status

        def is_reset() -> bool:
            try:
                client.sock.sendall(b"x")
            except OSError:
                return True
            return False

        eventually(is_reset)


@pytest.mark.parametrize("end", [b"\n\r\n\r\n", b"x\r\r\n\r\n", b"x\r\n\r\n"])
def test_spaces_in_a_header_take_no_time(service: ServiceProcess, end: bytes) -> None:
    """The head arrives in one piece. A pattern that backtracks takes minutes for it."""
    head = request_head("GET", "/health").removesuffix(b"\r\n")
    for spaces in (b" " * 4000, b"x" + b"\t" * 8000):
        assert service.request(head, b"Content-Length:", spaces, end).status == 400


@pytest.mark.parametrize(
    "head", [post_head("Content-Length: 9", "Content-Length: 8"), b"garbage\r\n"]
)
def test_refused_client_that_sends_on_gets_its_answer(service: ServiceProcess, head: bytes) -> None:
    """It reads only when it has sent everything."""
    with service.connect(buffer=4096) as client:
        client.send(head)
        for _ in range(500):
            client.send(b"x" * 4096)
        client.sock.shutdown(socket.SHUT_WR)
        assert client.response().status == 400


def test_long_answer_is_whole_for_a_client_that_is_slow_to_take_it(service: ServiceProcess) -> None:
    fast = service.request(BUNDLE).body
    with service.connect(buffer=65_536) as client:
        client.send(BUNDLE + CLOSE)
        # Until the service is done with what the sockets have room for.
        assert service.get("/health").status == 200
        assert client.response().body == fast
        assert client.response().json["status"] == "healthy"


# --- Many connections -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("hard", [None, 1024], ids=["soft limit", "hard limit"])
def test_a_thousand_idle_connections_stop_nobody(
    start_service: StartService, hard: int | None
) -> None:
    """With 64 busy ones beside them, and the 1,024 files that many systems allow at first."""
    ours, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most < 4096:
        pytest.skip("needs 4,096 open files")
    service = start_service(GUNICORN_WORKERS="1", GUNICORN_THREADS="64")
    service.command = ["prlimit", f"--nofile=1024:{hard or most}", *service.command]
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, most))
    try:
        with service, ExitStack() as stack:
            before = service.workers()
            idle = []
            for _ in range(1000):
                idle.append(stack.enter_context(service.connect()))
                assert idle[-1].send(HEALTH).response().status == 200
            busy = [stack.enter_context(service.connect()).send(post()) for _ in range(64)]
            assert {client.response().status for client in busy} == {200}
            assert_serves(service, before)
            if not hard:
                assert {client.send(HEALTH).response().status for client in idle} == {200}
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (ours, most))


@pytest.mark.slow
def test_bodies_beyond_the_memory_budget_end_the_oldest(start_service: StartService) -> None:
    """300 clients that stall after 1.9 of 2 MB, against a budget of 96 MiB for the pod."""
    part = post_head("Content-Length: 2000000") + b" " * 1_900_000
    with start_service(BODY_TIMEOUT_SECONDS="60") as service, ExitStack() as stack:
        workers, clients = service.workers(), list[Client]()
        for number in range(300):
            clients.append(stack.enter_context(service.connect()).send(part))
            if number % 30 == 29:
                assert_serves(service, workers, times=1)
        eventually(lambda: len(select.select([c.sock for c in clients], [], [], 0)[0]) >= 240)
        assert clients[0].response().error == "request_timeout"
        assert sum(map(memory, workers)) < 420 * 2**20
        assert_serves(service, workers)
        # The newest are within the budget, and can go on.
        assert clients[-1].send(b" " * 100_000).response().error == "invalid_json"


def test_rejected_head_releases_its_body(start_service: StartService) -> None:
    """Its length is well-formed, so the body is received before Gunicorn rejects the head."""
    sent = post(b" " * 2_000_000, "Malformed Name: x")
    with start_service(**NARROW, BODY_TIMEOUT_SECONDS="60") as service, ExitStack() as stack:
        (worker,) = service.workers()
        before = memory(worker)
        for _ in range(50):
            client = stack.enter_context(service.connect()).send(sent)
            assert client.response().status == 400
        assert memory(worker) - before < 50 * 2**20


@pytest.mark.slow
def test_requests_behind_an_unread_response_count_in_the_memory_budget(
    start_service: StartService,
) -> None:
    ours, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most < 4096:
        pytest.skip("needs 4,096 open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, most))
    sent = BUNDLE + post_head("Content-Length: 1000000") + b" " * 65_000
    try:
        with start_service(**NARROW, BODY_TIMEOUT_SECONDS="60") as service, ExitStack() as stack:
            clients = []
            for _ in range(1700):
                client = stack.enter_context(service.connect())
                client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                clients.append(client.send(sent))
            with pytest.raises((AssertionError, OSError)):
                clients[0].response()  # it was closed: the oldest
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (ours, most))


def memory(pid: int) -> int:
    """A process's memory in bytes, shared pages in proportion."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(re.search(r"^Pss: +(\d+) kB$", lines, re.M)[1]) * 1024  # type: ignore[index]


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def test_worker_without_a_free_file_waits_and_serves_again(start_service: StartService) -> None:
    with start_service(**NARROW, BODY_TIMEOUT_SECONDS="60") as service, ExitStack() as stack:
        (worker,) = service.workers()
        limits = resource.prlimit(worker, resource.RLIMIT_NOFILE)
        eventually(lambda: service.get("/ready").status == 200)
        used = len(os.listdir(f"/proc/{worker}/fd"))
        resource.prlimit(worker, resource.RLIMIT_NOFILE, (used + 4, limits[1]))
        clients = []
        for number in range(20):
            client = stack.enter_context(service.connect())
            client.send(post_head("Content-Length: 9", "Expect: 100-continue", path="/health"))
            # The first ones are not idle, so none can be closed for another.
            assert number >= 4 or client.is_continued()
            clients.append(client)
        begun, cpu = time.monotonic(), cpu_seconds(worker)
        time.sleep(1)
        # A worker that spins takes all of it that the machine gives.
        assert cpu_seconds(worker) - cpu < (time.monotonic() - begun) / 2
        for client in clients:
            assert client.send(b"x" * 9).response().status == 405
        resource.prlimit(worker, resource.RLIMIT_NOFILE, limits)
        assert_serves(service, [worker], times=1)


def test_connection_too_many_closes_the_oldest_idle_one(start_service: StartService) -> None:
    narrow = {**NARROW, "GUNICORN_CMD_ARGS": "--worker-connections 20"}
    with start_service(**narrow, BODY_TIMEOUT_SECONDS="60") as service, ExitStack() as stack:
        clients = [stack.enter_context(service.connect()) for _ in range(20)]
        for client in clients:
            assert client.send(HEALTH).response().status == 200
        clients[0].send(HEALTH[:10])  # it is no longer idle
        later = [stack.enter_context(service.connect()) for _ in range(3)]
        for client in later:
            assert client.send(HEALTH).response().status == 200
        assert all(client.is_closed() for client in clients[1:4])
        assert clients[0].send(HEALTH[10:]).response().status == 200
        for client in clients[4:] + later:
            assert client.send(HEALTH).response().status == 200
        # Where all have begun a request, further ones wait.
        for client in [clients[0], *clients[4:], *later]:
            client.send(HEALTH[:10])
        waiting = stack.enter_context(service.connect()).send(HEALTH)
        for client in [clients[0], *clients[4:], *later]:
            assert client.send(HEALTH[10:]).response().status == 200
        assert waiting.response().status == 200


# --- While AWS does not answer --------------------------------------------------------------------


def wrong_token(number: int = 0) -> bytes:
    return post(BODY.replace(json.dumps(TOKEN).encode(), b'"wrong %d"' % number))


def hang_ssm(service: ServiceProcess, fake_aws: FakeAws) -> None:
    """From now on every read of SSM hangs, and each worker may start one."""
    eventually(lambda: {service.get("/ready").status for _ in range(12)} == {200})
    fake_aws.set(faults={"SSM": {"kind": "hang"}})
    time.sleep(1.1)  # the cache's time, so that an unknown token is worth a read


@pytest.mark.parametrize("workers", [1, 4])
def test_health_is_served_while_all_threads_wait_for_ssm(
    start_service: StartService, fake_aws: FakeAws, workers: int
) -> None:
    variables = {**fake_aws.variables(), "GUNICORN_WORKERS": str(workers)}
    with start_service(**variables, TOKEN_CACHE_SECONDS="1") as service, ExitStack() as stack:
        hang_ssm(service, fake_aws)
        clients = [stack.enter_context(service.connect()) for _ in range(CLIENTS)]
        for client in clients:
            client.send(wrong_token())
        eventually(lambda: fake_aws.counts()["answers"].get("GetParameters hang", 0) >= workers)
        assert {service.get("/health").status for _ in range(20)} == {200}
        assert service.get("/metrics").status == 200
        answered = select.select([client.sock for client in clients], [], [], 0)[0]
        assert answered == [], "they still wait"


def test_post_that_waits_too_long_for_a_thread_is_overloaded(
    start_service: StartService, fake_aws: FakeAws
) -> None:
    variables = {**fake_aws.variables(), **NARROW, "BODY_TIMEOUT_SECONDS": "1"}
    with start_service(**variables, TOKEN_CACHE_SECONDS="1") as service, ExitStack() as stack:
        hang_ssm(service, fake_aws)
        wrong = [stack.enter_context(service.connect()).send(wrong_token()) for _ in range(2)]
        eventually(lambda: fake_aws.counts()["answers"].get("GetParameters hang", 0) >= 1)
        late = [stack.enter_context(service.connect()).send(post()) for _ in range(5)]
        answers = [client.response() for client in late]
        assert {(answer.status, answer.error) for answer in answers} == {(503, "overloaded")}
        assert all(int(answer.headers["Retry-After"]) > 0 for answer in answers)  # type: ignore[arg-type]
        assert [client.response().error for client in wrong] == ["invalid_token"] * 2
        assert late[0].is_closed() or late[0].send(post()).response().status == 200
    causes = [line["cause"] for line in service.log() if line.get("error") == "overloaded"]
    assert len(causes) == 5
    assert set(causes) == {"no thread was free for 1 s"}
    assert fake_aws.messages() == []


# --- Addresses ------------------------------------------------------------------------------------


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="needs IPv6")
def test_both_families_are_served_and_named_plainly(service: ServiceProcess) -> None:
    hosts = ["::1", "127.0.0.1"]
    for host in hosts:
        for sent in (request_head("GET", "/nothing"), b"garbage\r\n"):
            with service.connect(host) as client:
                assert client.send(sent).response().status in (400, 404)

    def clients() -> list[str]:
        lines = [line for line in service.log() if line["message"] == "request"]
        return [line["client"] for line in lines[-4:]]

    eventually(lambda: clients() == [host for host in hosts for _ in range(2)])


def test_machine_without_ipv6_is_served_on_ipv4(
    start_service: StartService, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        textwrap.dedent("""\
            import errno, os, socket
            class Socket(socket.socket):
                def __init__(self, family=-1, *arguments, **options):
                    if family == socket.AF_INET6:
                        raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
                    super().__init__(family, *arguments, **options)
            socket.socket = Socket
            """)
    )
    with start_service(PYTHONPATH=str(tmp_path)) as service:
        assert service.request(post()).status == 200


@pytest.mark.slow
def test_port_that_is_taken_stops_the_start(service: ServiceProcess) -> None:
    """Also when each worker has a listening socket of its own, which could share the port."""
    variables = {"PORT": str(service.port), "GUNICORN_WORKERS": "2"}
    run = subprocess.run(
        gunicorn(),
        cwd=PROJECT,
        env=clean_environment(SQS_QUEUE_URL="http://sqs/queue", **variables),
        capture_output=True,
        timeout=60,
    )
    assert run.returncode == 1
    assert b"in use" in run.stdout
    assert service.metrics(), "the other service's files are there"


# --- Workers --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_worker_that_stops_leaves_no_connection_behind(start_service: StartService) -> None:
    """It has a listening socket of its own, in which connections may wait."""
    with start_service() as service:
        answered, done = [], threading.Event()

        def ask() -> None:
            while not done.is_set():
                with suppress(ConnectionResetError, ConnectionRefusedError):
                    answered.append(service.get("/health").status)

        askers = [threading.Thread(target=ask) for _ in range(4)]
        for asker in askers:
            asker.start()
        try:
            for _ in range(3):
                old = service.workers()
                service.process.send_signal(signal.SIGHUP)
                eventually(lambda old=old: not {*old} & {*service.workers()})
                eventually(lambda: len(service.workers()) == 4)
        finally:
            done.set()
            for asker in askers:
                asker.join()
    assert set(answered) == {200}


# --- The log --------------------------------------------------------------------------------------

DROPPED = "email_processor_log_lines_dropped_total"
UNKNOWN = request_head("GET", "/" + "x" * 2000)


def ask_often(service: ServiceProcess, times: int) -> None:
    with service.connect() as client:
        for _ in range(times // 100):
            client.send(UNKNOWN * 100)
            assert {client.response().status for _ in range(100)} == {404}


@pytest.mark.slow
def test_log_that_nobody_reads_holds_up_nobody(start_service: StartService) -> None:
    service = start_service(GUNICORN_WORKERS="1", GUNICORN_THREADS="8")
    reader, writer = os.pipe()
    into_pipe = f'exec "$@" >/proc/{os.getpid()}/fd/{writer}'
    service.command = ["sh", "-c", into_pipe, "sh", *service.command]
    with service:
        os.close(writer)
        ask_often(service, 2000)  # the pipe has room for 30, the queue for 1,000
        assert service.request(post()).status == 200
        assert 500 < service.metrics()[DROPPED] < 1500
        (worker,) = service.workers()
        kill(worker)
        eventually(lambda: service.workers() not in ([], [worker]))
        assert service.request(post()).status == 200
        assert service.stop() < WAIT
    assert service.process.returncode == 0
    assert service.errors() == ""
    os.close(reader)


def test_further_handler_of_the_log_ends_no_worker(
    start_service: StartService, tmp_path: Path
) -> None:
    """As an agent adds one that is imported before the application."""
    (tmp_path / "sitecustomize.py").write_text(
        textwrap.dedent("""\
            import logging.config
            configure = logging.config.dictConfig
            def configure_and_add(config):
                configure(config)
                logging.getLogger().handlers.insert(0, logging.NullHandler())
            logging.config.dictConfig = configure_and_add
            """)
    )
    with start_service(PYTHONPATH=str(tmp_path), GUNICORN_WORKERS="1") as service:
        workers = service.workers()
        assert service.request(post(b"{")).status == 400
        eventually(lambda: [line for line in service.log() if line.get("status") == 400])
        assert service.workers() == workers


def test_service_that_stops_writes_the_lines_that_wait(start_service: StartService) -> None:
    with start_service(GUNICORN_WORKERS="1") as service:
        ask_often(service, 500)
        service.stop()
    lines = [line for line in service.log() if line.get("error") == "not_found"]
    assert len(lines) == 500


# --- Without Gunicorn -----------------------------------------------------------------------------

HIDE = """
import sys, runpy
sys.modules.update(dict.fromkeys(["gunicorn", "fcntl", "grp", "pwd", "resource", "termios"]))
"""


def test_app_needs_nothing_of_gunicorn_or_posix() -> None:
    run = subprocess.run(
        [sys.executable, "-c", HIDE + "import app; app.create_app()"],
        cwd=PROJECT,
        env=clean_environment(SQS_QUEUE_URL="https://sqs.us-west-1.amazonaws.com/1/q"),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.slow
def test_local_server_works_without_gunicorn(aws: Aws, tmp_path: Path) -> None:
    class Alone(ServiceProcess):
        def workers(self) -> list[int]:
            return [self.process.pid]

    serve = [sys.executable, "-c", HIDE + 'runpy.run_path("app.py", run_name="__main__")']
    with Alone(tmp_path / "tmp", aws.variables(GUNICORN_WORKERS="1"), serve) as service:
        assert service.request(post()).status == 200
        assert service.request(post(b"x", path="/nothing")).error == "not_found"


@pytest.mark.slow
def test_unit_tests_pass_without_gunicorn() -> None:
    code = HIDE + "import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    options = ("-q", "-x", "-p", "no:cacheprovider", "test_app.py")
    run = subprocess.run(
        [sys.executable, "-c", code, *options],
        cwd=PROJECT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout[-3000:]


# --- A frozen service -----------------------------------------------------------------------------


@pytest.mark.slow
def test_workers_survive_a_pause_of_the_whole_service(start_service: StartService) -> None:
    """As `docker pause` or a live migration makes one."""
    with start_service(GUNICORN_CMD_ARGS="--timeout 5") as service:
        workers = service.workers()
        for pid in (service.process.pid, *workers):
            os.kill(pid, signal.SIGSTOP)
        time.sleep(6.5)  # longer than the time-out
        os.kill(service.process.pid, signal.SIGCONT)
        time.sleep(1.5)  # the master looks once a second, and may be the first to run
        for pid in workers:
            os.kill(pid, signal.SIGCONT)
        assert_serves(service, workers)
        assert not any("TIMEOUT" in line["message"] for line in service.log())
