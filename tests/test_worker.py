"""The worker of gunicorn.conf.py against clients that misbehave, with real sockets; and its log."""

from __future__ import annotations

import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from conftest import (
    PROJECT,
    WAIT,
    Aws,
    Client,
    Service,
    StartService,
    environment,
    eventually,
    gunicorn,
    kill,
    post,
    post_head,
    request_head,
)

HEALTH = request_head("GET", "/health")
CLOSE = request_head("GET", "/health", "Connection: close")
BUNDLE = request_head("GET", "/docs/swagger-ui-bundle.js")
# Usual are some hundredths of a second; Gunicorn's own worker needs twenty seconds and more.
CEILING = 5.0
CLIENTS = 60


@pytest.fixture(scope="module")
def crowded(start_service: StartService) -> Iterator[Service]:
    """A service to which many more clients come than it has threads."""
    with start_service(GUNICORN_WORKERS="1", GUNICORN_THREADS="2") as service:
        yield service


@pytest.fixture(scope="module")
def service(start_service: StartService) -> Iterator[Service]:
    with start_service(GUNICORN_WORKERS="1", BODY_TIMEOUT_SECONDS="1") as service:
        yield service


def assert_serves(service: Service, workers: list[int], times: int = 20) -> None:
    """/health answers again and again, from the workers that there were before."""
    for _ in range(times):
        begin = time.monotonic()
        assert service.get("/health").status == 200
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
}
UNANSWERED = {
    "nothing": b"",
    "TLS": bytes.fromhex("16030100c8010000c40303") + bytes(range(50, 250)),
    "half a head": b"POST /process HTTP/1.1\r\nHost: ",
    "half a head of another method": b"M-SEARCH / HTTP/1.1\r\nHost: ",
    "half a head behind a request": HEALTH + b"POST /process HTTP/1.1\r\nHost: ",
}


UNREAD = {"long answers": BUNDLE * 3, "many answers": request_head("GET", "/openapi.json") * 100}
SENT_ON = {"flood": b"garbage\r\n\r\n" + b"x" * 60_000, "trickle": b"x"}


def stays(client: Client, how: str) -> None:
    client.send((ANSWERED | UNANSWERED)[how])
    if how in ANSWERED:
        client.answer()


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
    crowded: Service, behave: Callable[[Client, str], None], how: str
) -> None:
    workers = crowded.workers()
    with ExitStack() as stack:
        for _ in range(CLIENTS):
            behave(stack.enter_context(crowded.connect(buffer=4096)), how)
        assert_serves(crowded, workers)


@pytest.mark.parametrize("part", SENT_ON.values(), ids=SENT_ON)
def test_crowd_that_goes_on_sending_holds_up_nobody(crowded: Service, part: bytes) -> None:
    workers, done = crowded.workers(), threading.Event()
    with ExitStack() as stack:
        clients = [stack.enter_context(crowded.connect()) for _ in range(CLIENTS)]

        def feed() -> None:
            while not done.wait(0.01):
                for client in clients:
                    with suppress(OSError):
                        client.sock.send(part, socket.MSG_DONTWAIT)

        feeder = threading.Thread(target=feed)
        feeder.start()
        stack.callback(feeder.join)
        stack.callback(done.set)
        assert_serves(crowded, workers)


def test_pipelined_requests_of_a_half_closed_client_are_answered(service: Service) -> None:
    with service.connect() as client:
        client.send(HEALTH * 5).sock.shutdown(socket.SHUT_WR)
        assert [client.answer().status for _ in range(5)] == [200] * 5
        assert client.is_closed()


def test_client_that_does_not_close_is_closed(service: Service) -> None:
    """Though the kernel would keep the connection for as long as the client does."""
    with service.connect() as client:
        assert client.send(CLOSE).answer().status == 200

        def is_reset() -> bool:
            try:
                client.sock.sendall(b"x")
            except OSError:
                return True
            return False

        eventually(is_reset)


@pytest.mark.parametrize(
    "head", [post_head("Content-Length: 9", "Content-Length: 8"), b"garbage\r\n"]
)
def test_refused_client_that_sends_on_gets_its_answer(service: Service, head: bytes) -> None:
    """It reads only when it has sent everything."""
    with service.connect(buffer=4096) as client:
        client.send(head)
        for _ in range(500):
            client.send(b"x" * 4096)
        client.sock.shutdown(socket.SHUT_WR)
        assert client.answer().status == 400


def test_long_answer_is_whole_for_a_client_that_is_slow_to_take_it(service: Service) -> None:
    fast = service.ask(BUNDLE).body
    with service.connect(buffer=65_536) as client:
        client.send(BUNDLE + CLOSE)
        # Until the service is done with what the sockets have room for.
        assert service.get("/health").status == 200
        assert client.answer().body == fast
        assert client.answer().json["status"] == "healthy"


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
                assert idle[-1].send(HEALTH).answer().status == 200
            busy = [stack.enter_context(service.connect()).send(post()) for _ in range(64)]
            assert {client.answer().status for client in busy} == {200}
            assert_serves(service, before)
            if not hard:
                assert {client.send(HEALTH).answer().status for client in idle} == {200}
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (ours, most))


# --- Addresses ------------------------------------------------------------------------------------


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="needs IPv6")
def test_both_families_are_served_and_named_plainly(service: Service) -> None:
    hosts = ["::1", "127.0.0.1"]
    for host in hosts:
        for sent in (request_head("GET", "/nothing"), b"garbage\r\n"):
            with service.connect(host) as client:
                assert client.send(sent).answer().status in (400, 404)

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
        assert service.ask(post()).status == 200


@pytest.mark.slow
def test_port_that_is_taken_stops_the_start(service: Service) -> None:
    """Also when each worker has a listening socket of its own, which could share the port."""
    variables = {"PORT": str(service.port), "GUNICORN_WORKERS": "2"}
    run = subprocess.run(
        gunicorn(),
        cwd=PROJECT,
        env=environment(SQS_QUEUE_URL="http://sqs/queue", **variables),
        capture_output=True,
        timeout=60,
    )
    assert run.returncode == 1
    assert b"in use" in run.stdout
    assert service.metrics(), "the other service's files are there"


# --- Workers --------------------------------------------------------------------------------------


def test_a_single_worker_keeps_to_one_core(service: Service) -> None:
    (pid,) = service.workers()
    eventually(lambda: len(os.sched_getaffinity(pid)) == 1)


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


def ask_often(service: Service, times: int) -> None:
    with service.connect() as client:
        for _ in range(times // 100):
            client.send(UNKNOWN * 100)
            assert {client.answer().status for _ in range(100)} == {404}


@pytest.mark.slow
def test_log_that_nobody_reads_holds_up_nobody(start_service: StartService) -> None:
    service = start_service(GUNICORN_WORKERS="1", GUNICORN_THREADS="8")
    reader, writer = os.pipe()
    into_pipe = f'exec "$@" >/proc/{os.getpid()}/fd/{writer}'
    service.command = ["sh", "-c", into_pipe, "sh", *service.command]
    with service:
        os.close(writer)
        ask_often(service, 2000)  # the pipe has room for 30, the queue for 1,000
        assert service.ask(post()).status == 200
        assert 500 < service.metrics()[DROPPED] < 1500
        (worker,) = service.workers()
        kill(worker)
        eventually(lambda: service.workers() not in ([], [worker]))
        assert service.ask(post()).status == 200
        assert service.stop() < WAIT
    assert service.process.returncode == 0
    assert service.errors() == ""
    os.close(reader)


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
        env=environment(SQS_QUEUE_URL="https://sqs.us-west-1.amazonaws.com/1/q"),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.slow
def test_local_server_works_without_gunicorn(aws: Aws, tmp_path: Path) -> None:
    class Alone(Service):
        def workers(self) -> list[int]:
            return [self.process.pid]

    serve = [sys.executable, "-c", HIDE + 'runpy.run_path("app.py", run_name="__main__")']
    with Alone(tmp_path / "tmp", aws.variables(GUNICORN_WORKERS="1"), serve) as service:
        assert service.ask(post()).status == 200
        assert service.ask(post(b"x", path="/nothing")).error == "not_found"


@pytest.mark.slow
def test_unit_tests_pass_without_gunicorn() -> None:
    code = HIDE + "import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    options = ("-q", "-x", "-p", "no:cacheprovider", "test_app.py")
    run = subprocess.run(
        [sys.executable, "-c", code, *options],
        cwd=PROJECT,
        env=environment(),
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
