"""The worker against clients that misbehave, in crowds; its log, addresses and replacements."""

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
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from client import BODY, WAIT, Client, chunk, post, post_head, request_head
from fake_aws import TOKEN, FakeAws
from service import (
    PROJECT,
    ServiceProcess,
    StartService,
    clean_environment,
    eventually,
    kill,
    run_gunicorn,
)

HEALTH = request_head("GET", "/health")
CLOSE = request_head("GET", "/health", "Connection: close")
BUNDLE = request_head("GET", "/docs/swagger-ui-bundle.js")
CHUNKED = "Transfer-Encoding: chunked"
# Usual are some hundredths of a second; Gunicorn's own worker needs twenty seconds and more.
CEILING = 5.0
CLIENTS = 60
TWO_THREADS = {"GUNICORN_WORKERS": "1", "GUNICORN_THREADS": "2", "BODY_TIMEOUT_SECONDS": "60"}


@pytest.fixture(scope="module")
def crowded_service(start_service: StartService) -> Iterator[ServiceProcess]:
    """Two threads, and deadlines that end no client during a test."""
    with start_service(**TWO_THREADS) as service:
        yield service


@pytest.fixture(scope="module")
def service(start_service: StartService) -> Iterator[ServiceProcess]:
    """One worker with a body deadline of one second."""
    with start_service(GUNICORN_WORKERS="1", BODY_TIMEOUT_SECONDS="1") as service:
        yield service


@pytest.fixture
def many_files() -> Iterator[int]:
    """Raise this process's limit of open files, for a thousand clients. Gives the hard limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 4096:
        pytest.skip("needs 4,096 open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, hard))
    yield hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def assert_serves(
    service: ServiceProcess,
    workers: list[int],
    times: int = 20,
    requests: Sequence[bytes] = (CLOSE,),
) -> None:
    """The requests get 200 in time, again and again, and the workers are the same as before."""
    for _ in range(times):
        for sent in requests:
            begin = time.monotonic()
            assert service.request(sent).status == 200
            assert time.monotonic() - begin < CEILING
    assert service.workers() == workers


def memory(pid: int) -> int:
    """A process's memory in bytes, shared pages in proportion."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(re.search(r"^Pss: +(\d+) kB$", lines, re.M)[1]) * 1024  # type: ignore[index]


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


# --- Crowds ---------------------------------------------------------------------------------------


def send(client: Client, sent: bytes) -> None:
    client.send(sent)


def send_and_read(client: Client, sent: bytes) -> None:
    client.send(sent).response()


def send_and_half_close(client: Client, sent: bytes) -> None:
    client.send(sent).sock.shutdown(socket.SHUT_WR)


def send_and_reset(client: Client, sent: bytes) -> None:
    client.send(sent)
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.sock.close()


CROWDS = {
    # They get a response, and do not close.
    "Connection: close": (send_and_read, CLOSE),
    "garbage without an end": (send_and_read, b"garbage\r\n"),
    "rejected POST": (send_and_read, post(b"{}", "Connection: close")),
    "two lengths": (send_and_read, post_head("Content-Length: 2", "Content-Length: 3") + b"{}"),
    "HTTP/2": (send_and_read, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "garbage behind a request": (send_and_read, HEALTH + b"\0garbage\r\n\r\n"),
    "oversized length": (send_and_read, post_head("Content-Length: 3000000") + b"x" * 10_000),
    "oversized chunk": (send_and_read, post_head(CHUNKED) + b"ffffffff\r\n" + b"x" * 10_000),
    # They never complete their request.
    "nothing": (send, b""),
    "TLS": (send, bytes.fromhex("16030100c8010000c40303") + bytes(range(50, 250))),
    "half a head": (send, b"POST /process HTTP/1.1\r\nHost: "),
    "half a head behind a request": (send, HEALTH + b"M-SEARCH / HTTP/1.1\r\nHost: "),
    "half a body": (send, post_head("Content-Length: 1000") + BODY),
    "half a body behind a POST": (send, post() + post_head("Content-Length: 1000") + BODY),
    "half of a large body": (send, post_head("Content-Length: 1000000") + b" " * 900_000),
    "half a chunk": (send, post_head(CHUNKED) + b"ff\r\n12345"),
    "half a chunk's size": (send, post_head(CHUNKED) + chunk(BODY) + b"f"),
    "half the trailers": (send, post_head(CHUNKED) + chunk(BODY) + b"0\r\nName: value\r\n"),
    # They do not read.
    "long responses": (send, BUNDLE * 3),
    "many responses": (send, request_head("GET", "/openapi.json") * 100),
    # They leave early.
    "half-closed": (send_and_half_close, HEALTH),
    "reset": (send_and_reset, HEALTH),
}


@pytest.mark.parametrize(("behave", "sent"), CROWDS.values(), ids=CROWDS)
def test_crowd_that_misbehaves_delays_no_other_client(
    crowded_service: ServiceProcess, behave: Callable[[Client, bytes], None], sent: bytes
) -> None:
    workers = crowded_service.workers()
    with ExitStack() as stack:
        for _ in range(CLIENTS):
            behave(stack.enter_context(crowded_service.connect(buffer=4096)), sent)
        requests = CLOSE, post(BODY, "Connection: close")
        assert_serves(crowded_service, workers, requests=requests)


ENDLESS = {
    "flood": b"garbage\r\n\r\n" + b"x" * 60_000,
    "trickle": b"x",
    "requests whose responses are not read": HEALTH * 500,
    "oversized bodies": post_head("Content-Length: 3000000") + b"x" * 60_000,
}


@contextmanager
def sending_without_pause(clients: list[Client], part: bytes) -> Iterator[None]:
    done = threading.Event()

    def feed() -> None:
        while not done.wait(0.05):
            for client in clients:
                with suppress(OSError):
                    client.sock.send(part)

    for client in clients:
        client.sock.setblocking(False)
    feeder = threading.Thread(target=feed)
    feeder.start()
    try:
        yield
    finally:
        done.set()
        feeder.join()


@pytest.mark.parametrize("part", ENDLESS.values(), ids=ENDLESS)
def test_crowd_that_never_stops_sending_delays_no_other_client(
    crowded_service: ServiceProcess, part: bytes
) -> None:
    workers = crowded_service.workers()
    with ExitStack() as stack:
        crowd = [stack.enter_context(crowded_service.connect(buffer=4096)) for _ in range(CLIENTS)]
        with sending_without_pause(crowd, part):
            assert_serves(crowded_service, workers)


# --- Single clients -------------------------------------------------------------------------------


def test_half_closed_client_gets_the_responses_to_its_pipelined_requests(client: Client) -> None:
    client.send(HEALTH * 5).sock.shutdown(socket.SHUT_WR)
    assert [client.response().status for _ in range(5)] == [200] * 5
    assert client.is_closed()


@pytest.mark.parametrize(
    ("sent", "status"), [(CLOSE, 200), (post_head("Content-Length: 3000000"), 413)]
)
def test_client_that_does_not_close_is_reset(client: Client, sent: bytes, status: int) -> None:
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


def test_slow_reader_gets_a_long_response_unchanged(service: ServiceProcess) -> None:
    expected = service.request(BUNDLE).body
    with service.connect(buffer=65_536) as client:
        client.send(BUNDLE + CLOSE)
        assert service.get("/health").status == 200  # by now the sockets' buffers are full
        assert client.response().body == expected
        assert client.response().json["status"] == "healthy"


# --- Limits of files, memory, connections and threads ---------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("hard", [None, 1024], ids=["soft limit", "hard limit"])
def test_a_thousand_idle_connections_delay_no_other_client(
    start_service: StartService, many_files: int, hard: int | None
) -> None:
    """With 64 busy ones beside them, and the 1,024 files that many systems allow at first."""
    service = start_service(GUNICORN_WORKERS="1", GUNICORN_THREADS="64")
    service.command = ["prlimit", f"--nofile=1024:{hard or many_files}", *service.command]
    with service, ExitStack() as stack:
        workers, idle = service.workers(), list[Client]()
        for _ in range(1000):
            idle.append(stack.enter_context(service.connect()))
            assert idle[-1].send(HEALTH).response().status == 200
        busy = [stack.enter_context(service.connect()).send(post()) for _ in range(64)]
        assert {client.response().status for client in busy} == {200}
        assert_serves(service, workers)
        if not hard:
            assert {client.send(HEALTH).response().status for client in idle} == {200}


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
        newest = clients[-1]  # is within the budget
        assert newest.send(b" " * 100_000).response().error == "invalid_json"


def test_rejected_head_releases_its_body(start_service: StartService) -> None:
    """Its length is well-formed, so the body is received before Gunicorn rejects the head."""
    sent = post(b" " * 2_000_000, "Malformed Name: x")
    with start_service(**TWO_THREADS) as service, ExitStack() as stack:
        (worker,) = service.workers()
        before = memory(worker)
        for _ in range(50):
            client = stack.enter_context(service.connect()).send(sent)
            assert client.response().status == 400
        assert memory(worker) - before < 50 * 2**20


@pytest.mark.slow
@pytest.mark.usefixtures("many_files")
def test_requests_behind_an_unread_response_count_in_the_memory_budget(
    start_service: StartService,
) -> None:
    sent = BUNDLE + post_head("Content-Length: 1000000") + b" " * 65_000
    with start_service(**TWO_THREADS) as service, ExitStack() as stack:
        clients = []
        for _ in range(1700):
            client = stack.enter_context(service.connect())
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            clients.append(client.send(sent))
        with pytest.raises((AssertionError, OSError)):
            clients[0].response()  # the oldest connection was closed


def test_worker_without_a_free_file_waits_and_serves_again(start_service: StartService) -> None:
    with start_service(**TWO_THREADS) as service, ExitStack() as stack:
        (worker,) = service.workers()
        limits = resource.prlimit(worker, resource.RLIMIT_NOFILE)
        eventually(lambda: service.get("/ready").status == 200)
        used = len(os.listdir(f"/proc/{worker}/fd"))
        resource.prlimit(worker, resource.RLIMIT_NOFILE, (used + 4, limits[1]))
        clients = []
        for number in range(20):
            client = stack.enter_context(service.connect())
            client.send(post_head("Content-Length: 9", "Expect: 100-continue", path="/health"))
            # The first four are not idle, so none can be closed for another.
            assert number >= 4 or client.is_continued()
            clients.append(client)
        begin, cpu = time.monotonic(), cpu_seconds(worker)
        time.sleep(1)
        # A worker that spins takes all the CPU time that it gets.
        assert cpu_seconds(worker) - cpu < (time.monotonic() - begin) / 2
        for client in clients:
            assert client.send(b"x" * 9).response().status == 405
        resource.prlimit(worker, resource.RLIMIT_NOFILE, limits)
        assert_serves(service, [worker], times=1)


def test_connection_beyond_the_limit_closes_the_oldest_idle_one(
    start_service: StartService,
) -> None:
    limit = {"GUNICORN_CMD_ARGS": "--worker-connections 20"}
    with start_service(**TWO_THREADS, **limit) as service, ExitStack() as stack:
        begun, *idle = [stack.enter_context(service.connect()) for _ in range(20)]
        for client in (begun, *idle):
            assert client.send(HEALTH).response().status == 200
        begun.send(HEALTH[:10])
        later = [stack.enter_context(service.connect()) for _ in range(3)]
        for client in later:
            assert client.send(HEALTH).response().status == 200
        assert all(client.is_closed() for client in idle[:3])
        assert begun.send(HEALTH[10:]).response().status == 200
        # When every connection has begun a request, a further one waits.
        connected = [begun, *idle[3:], *later]
        for client in connected:
            client.send(HEALTH[:10])
        waiting = stack.enter_context(service.connect()).send(HEALTH)
        for client in connected:
            assert client.send(HEALTH[10:]).response().status == 200
        assert waiting.response().status == 200


def post_with_wrong_token() -> bytes:
    return post(BODY.replace(json.dumps(TOKEN).encode(), b'"wrong"'))


def hang_ssm(service: ServiceProcess, fake_aws: FakeAws) -> None:
    """From now on, every read of the token hangs, and an unknown token causes one."""
    eventually(lambda: service.get("/ready").status == 200)
    fake_aws.set(faults={"SSM": {"kind": "hang"}})
    time.sleep(1.1)  # TOKEN_CACHE_SECONDS


def test_health_is_served_while_all_threads_wait_for_ssm(
    start_service: StartService, fake_aws: FakeAws
) -> None:
    variables = {**TWO_THREADS, "TOKEN_CACHE_SECONDS": "1"}
    with start_service(**variables) as service, ExitStack() as stack:
        hang_ssm(service, fake_aws)
        clients = [stack.enter_context(service.connect()) for _ in range(CLIENTS)]
        for client in clients:
            client.send(post_with_wrong_token())
        eventually(lambda: fake_aws.calls("GetParameters") >= 2)
        assert {service.get("/health").status for _ in range(20)} == {200}
        assert service.get("/metrics").status == 200
        assert select.select([client.sock for client in clients], [], [], 0)[0] == []


def test_post_that_waits_too_long_for_a_thread_is_overloaded(
    start_service: StartService, fake_aws: FakeAws
) -> None:
    variables = {**TWO_THREADS, "BODY_TIMEOUT_SECONDS": "1", "TOKEN_CACHE_SECONDS": "1"}
    with start_service(**variables) as service, ExitStack() as stack:
        hang_ssm(service, fake_aws)
        occupying = [
            stack.enter_context(service.connect()).send(post_with_wrong_token()) for _ in range(2)
        ]
        eventually(lambda: fake_aws.calls("GetParameters") >= 2)
        late = [stack.enter_context(service.connect()).send(post()) for _ in range(5)]
        responses = [client.response() for client in late]
        assert {(r.status, r.error) for r in responses} == {(503, "overloaded")}
        assert all(int(r.headers["Retry-After"] or 0) > 0 for r in responses)
        assert [client.response().error for client in occupying] == ["invalid_token"] * 2
    causes = [line["cause"] for line in service.log() if line.get("error") == "overloaded"]
    assert causes == ["no thread was free for 1 s"] * 5
    assert fake_aws.messages() == []


# --- Addresses ------------------------------------------------------------------------------------


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="needs IPv6")
def test_clients_of_both_address_families_are_logged_plainly(service: ServiceProcess) -> None:
    hosts = ["::1", "127.0.0.1"]
    for host in hosts:
        for sent in (request_head("GET", "/nothing"), b"garbage\r\n"):
            with service.connect(host) as client:
                assert client.send(sent).response().status in (400, 404)

    def last_clients() -> list[str]:
        lines = [line for line in service.log() if line["message"] == "request"]
        return [line["client"] for line in lines[-4:]]

    eventually(lambda: last_clients() == [host for host in hosts for _ in range(2)])


def sitecustomize(folder: Path, code: str) -> dict[str, str]:
    """Variables with which Python runs the code before the service."""
    (folder / "sitecustomize.py").write_text(textwrap.dedent(code))
    return {"PYTHONPATH": str(folder)}


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


@pytest.mark.slow
def test_port_in_use_stops_the_start(service: ServiceProcess) -> None:
    """Also when each worker has its own listening socket, which could share the port."""
    run = run_gunicorn(PORT=str(service.port), GUNICORN_WORKERS="2")
    assert run.returncode == 1
    assert "in use" in run.stdout
    assert service.metrics(), "the files of the other service were removed"


# --- Replaced and frozen workers ------------------------------------------------------------------


@pytest.mark.slow
def test_reload_loses_no_connection(start_service: StartService) -> None:
    """A worker has its own listening socket, in whose backlog connections may wait."""
    with start_service() as service:
        statuses, done = set[int](), threading.Event()

        def request_again_and_again() -> None:
            while not done.is_set():
                with suppress(ConnectionResetError, ConnectionRefusedError):
                    statuses.add(service.get("/health").status)

        threads = [threading.Thread(target=request_again_and_again) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(3):
                old = service.workers()
                service.process.send_signal(signal.SIGHUP)
                eventually(lambda old=old: not {*old} & {*service.workers()})
                eventually(lambda: len(service.workers()) == 4)
        finally:
            done.set()
            for thread in threads:
                thread.join()
    assert statuses == {200}


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
        assert_serves(service, workers)
        assert not any("TIMEOUT" in line["message"] for line in service.log())


# --- The log --------------------------------------------------------------------------------------

DROPPED = "email_processor_log_lines_dropped_total"


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
        assert 500 < service.metrics()[DROPPED] < 1500
        (worker,) = service.workers()
        kill(worker)
        eventually(lambda: service.workers() not in ([], [worker]))
        assert service.request(post()).status == 200
        assert service.stop() < WAIT
    assert service.process.returncode == 0
    assert service.errors() == ""
    os.close(reader)


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
    variables = sitecustomize(tmp_path, add_handler)
    with start_service(**variables, GUNICORN_WORKERS="1") as service:
        workers = service.workers()
        assert service.request(post(b"{")).status == 400
        eventually(lambda: [line for line in service.log() if line.get("status") == 400])
        assert service.workers() == workers


# --- Without Gunicorn -----------------------------------------------------------------------------

HIDE_POSIX = """
import sys, runpy
sys.modules.update(dict.fromkeys(["gunicorn", "fcntl", "grp", "pwd", "resource", "termios"]))
"""


def test_flasks_server_works_without_posix(fake_aws: FakeAws, tmp_path: Path) -> None:
    class FlaskServer(ServiceProcess):
        def workers(self) -> list[int]:
            return [self.process.pid]

    command = [sys.executable, "-c", HIDE_POSIX + 'runpy.run_path("app.py", run_name="__main__")']
    variables = {**fake_aws.variables(), "GUNICORN_WORKERS": "1"}
    with FlaskServer(tmp_path / "tmp", variables, command) as service:
        assert service.request(post()).status == 200
        assert service.request(post(b"x", path="/nothing")).error == "not_found"


@pytest.mark.slow
def test_unit_tests_pass_without_posix() -> None:
    code = HIDE_POSIX + "import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    run = subprocess.run(
        [sys.executable, "-c", code, "-q", "-x", "-p", "no:cacheprovider", "test_app.py"],
        cwd=PROJECT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout[-3000:]
