"""The event loop under crowds of odd clients, and at its limits of files, memory and threads."""

from __future__ import annotations

import json
import os
import re
import resource
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from client import BODY, Client, post, post_head, request_head
from fake_aws import TOKEN, FakeAws
from service import ServiceProcess, StartService, eventually

HEALTH = request_head("GET", "/health")
CLOSE = request_head("GET", "/health", "Connection: close")
BUNDLE = request_head("GET", "/docs/swagger-ui-bundle.js")
# Usual are some hundredths of a second; Gunicorn's own worker needs twenty seconds and more.
CEILING = 5.0
TWO_THREADS = {"GUNICORN_WORKERS": "1", "GUNICORN_THREADS": "2", "BODY_TIMEOUT_SECONDS": "60"}


@pytest.fixture(scope="module")
def service(start_service: StartService) -> Iterator[ServiceProcess]:
    """Two threads, and deadlines that end no client during a test."""
    with start_service(**TWO_THREADS) as service:
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


def assert_serves(service: ServiceProcess, workers: list[int], beside: str = "") -> None:
    """Requests get 200 in time, again and again, by the same workers, and none has failed."""
    for sent in (CLOSE, post(BODY, "Connection: close")) * 5:
        begin = time.monotonic()
        assert service.request(sent).status == 200, beside
        assert time.monotonic() - begin < CEILING, beside
    assert service.workers() == workers, beside
    assert "unhandled exception" not in service.output(), beside


def memory(pid: int) -> int:
    """A process's memory in bytes, shared pages in proportion."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(re.search(r"^Pss: +(\d+) kB$", lines, re.M)[1]) * 1024  # type: ignore[index]


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def waits_without_spinning(worker: int) -> Iterator[None]:
    """A worker that waits needs a few milliseconds of CPU time; a loop that spins takes it all."""
    before = cpu_seconds(worker)
    yield
    assert cpu_seconds(worker) - before < 0.2


# --- Crowds ---------------------------------------------------------------------------------------


def send(client: Client, sent: bytes) -> None:
    client.send(sent)


def send_and_read(client: Client, sent: bytes) -> None:
    client.send(sent).response()


def send_and_reset(client: Client, sent: bytes) -> None:
    client.send(sent)
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.sock.close()


CROWDS: dict[str, tuple[Callable[[Client, bytes], None], bytes]] = {
    # They get a response, and do not close.
    "Connection: close": (send_and_read, CLOSE),
    "HTTP/2": (send_and_read, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "oversized": (send_and_read, post_head("Content-Length: 3000000") + b"x" * 10_000),
    # They never complete their request. test_faults.py has incomplete bodies.
    "nothing": (send, b""),
    "TLS": (send, bytes.fromhex("16030100c8010000c40303") + bytes(range(50, 250))),
    "half a head behind a request": (send, HEALTH + b"M-SEARCH / HTTP/1.1\r\nHost: "),
    # They do not read.
    "long responses": (send, BUNDLE * 3),
    "many responses": (send, request_head("GET", "/openapi.json") * 100),
    # They leave early.
    "reset": (send_and_reset, HEALTH),
}


def test_crowd_that_misbehaves_delays_no_other_client(service: ServiceProcess) -> None:
    workers = service.workers()
    for crowd, (behave, sent) in CROWDS.items():
        with ExitStack() as stack:
            for _ in range(60):
                behave(stack.enter_context(service.connect(buffer=4096)), sent)
            assert_serves(service, workers, beside=crowd)


ENDLESS = {
    "flood": b"garbage\r\n\r\n" + b"x" * 60_000,
    "trickle": b"x",
    "requests whose responses are not read": HEALTH * 500,
    "oversized bodies": post_head("Content-Length: 3000000") + b"x" * 60_000,
}


def test_crowd_that_never_stops_sending_delays_no_other_client(service: ServiceProcess) -> None:
    workers, done = service.workers(), threading.Event()
    with ExitStack() as stack:
        crowd = [
            (stack.enter_context(service.connect(buffer=4096)).sock, part)
            for part in list(ENDLESS.values()) * 30
        ]

        def send_without_pause() -> None:
            while not done.wait(0.05):
                for sock, part in crowd:
                    with suppress(OSError):
                        sock.send(part, socket.MSG_DONTWAIT)

        sender = threading.Thread(target=send_without_pause)
        sender.start()
        try:
            assert_serves(service, workers)
        finally:
            done.set()
            sender.join()


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
        for _ in range(10):
            clients += [stack.enter_context(service.connect()).send(part) for _ in range(30)]
            assert_serves(service, workers)
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
        with waits_without_spinning(worker):
            time.sleep(1)
        for client in clients:
            assert client.send(b"x" * 9).response().status == 405
        resource.prlimit(worker, resource.RLIMIT_NOFILE, limits)
        assert_serves(service, [worker])


def test_connection_beyond_the_limit_closes_the_oldest_idle_one(
    start_service: StartService,
) -> None:
    limit = {"GUNICORN_CMD_ARGS": "--worker-connections 20"}
    with start_service(**TWO_THREADS, **limit) as service, ExitStack() as stack:
        slow = stack.enter_context(service.connect(buffer=4096)).send(BUNDLE)
        begun, *idle = [stack.enter_context(service.connect()) for _ in range(19)]
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
        assert slow.response().status == 200


def test_post_that_waits_too_long_for_a_thread_is_overloaded_and_health_is_served(
    start_service: StartService, fake_aws: FakeAws
) -> None:
    """An unknown token causes a read of SSM, which hangs and occupies a thread."""
    wrong = post(BODY.replace(json.dumps(TOKEN).encode(), b'"wrong"'))
    variables = {**TWO_THREADS, "BODY_TIMEOUT_SECONDS": "1", "TOKEN_CACHE_SECONDS": "1"}
    with start_service(**variables) as service, ExitStack() as stack:
        eventually(lambda: service.get("/ready").status == 200)
        fake_aws.set(faults={"SSM": {"kind": "hang"}})
        time.sleep(1.1)  # TOKEN_CACHE_SECONDS
        occupying = [stack.enter_context(service.connect()).send(wrong) for _ in range(2)]
        eventually(lambda: fake_aws.hung() >= 1)
        late = [stack.enter_context(service.connect()).send(post()) for _ in range(5)]
        assert {service.get("/health").status for _ in range(20)} == {200}
        assert select.select([client.sock for client in occupying], [], [], 0)[0] == []
        with waits_without_spinning(*service.workers()):
            occupying[0].send(HEALTH)
            responses = [client.response() for client in late]
        assert {(r.status, r.error) for r in responses} == {(503, "overloaded")}
        assert [client.response().error for client in occupying] == ["invalid_token"] * 2
    causes = [line["cause"] for line in service.log() if line.get("error") == "overloaded"]
    assert causes == ["no thread was free for 1 s"] * 5
    assert fake_aws.messages() == []
