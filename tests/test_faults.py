"""Failure modes: real workers, an AWS that misbehaves on command, clients that count every answer.

Each test has a short form of seconds; `--full` runs the long one. The figures are printed at the
end of the run; docs/reliability.md has those of a full one. No verdict depends on how fast a
machine is: each step waits for the one before.
"""

from __future__ import annotations

import http.server
import json
import random
import re
import select
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from client import BODY, chunk, post, post_head, request_head
from fake_aws import PARAMETER, TOKEN, FakeAws
from load import Load, LoadReport
from name_server import NameServer
from service import ServiceProcess, StartService, eventually, kill

pytestmark = pytest.mark.slow

TOKEN_READ = "email_processor_token_read_timestamp_seconds"
ONE = {"GUNICORN_WORKERS": "1"}
# Seconds until a call of AWS ends that gets no answer: /health waits for none.
HANG = 3.0


@dataclass
class Day:
    """A bad one: what its tests need."""

    fake_aws: FakeAws
    start: StartService
    note: Callable[..., None]
    full: bool

    def service(self, *several: dict[str, str], **variables: str) -> ServiceProcess:
        for more in several:
            variables = more | variables
        return self.start(**(self.fake.variables() | variables))

    def ledger(self, title: str, *loads: Load, statuses: set[int], notes: str = "") -> LoadReport:
        """What the clients were told and the queue took: nothing lost, and each request answered
        with one of the statuses.
        """
        ledger = LoadReport.of(self.fake, *loads)
        self.note(title, *filter(None, (ledger, notes)))
        assert set(ledger.statuses) <= statuses
        assert not ledger.lost
        assert not [failure for load in loads for failure in load.failures]
        return ledger

    def sends(self) -> int:
        return self.fake.calls("SendMessage") + self.fake.calls("SendMessageBatch")

    def hung(self) -> int:
        """The calls that hang."""
        answers = self.fake.counts()["answers"]
        return sum(count for name, count in answers.items() if name.endswith(" hang"))


@pytest.fixture
def day(
    fake_aws: FakeAws, start_service: StartService, figures: Callable[..., None], full: bool
) -> Day:
    return Day(fake_aws, start_service, figures, full)


@pytest.fixture(scope="module")
def service_of_all(
    start_service: StartService, fake_aws_process: FakeAws
) -> Iterator[ServiceProcess]:
    with start_service(**fake_aws_process.variables()) as service:
        yield service


@pytest.fixture
def service(service_of_all: ServiceProcess, fake_aws: FakeAws) -> ServiceProcess:
    """The defaults, 4 workers with 2 threads each, in front of a healthy fake AWS."""
    eventually(lambda: len(service_of_all.workers()) == 4)
    eventually(lambda: {service_of_all.ask(post()).status for _ in range(8)} == {200})
    fake_aws.forget()
    return service_of_all


def with_token(token: str) -> bytes:
    return BODY.replace(json.dumps(TOKEN).encode(), json.dumps(token).encode())


# --- SQS ------------------------------------------------------------------------------------------


def test_healthy_day_queues_every_message(day: Day) -> None:
    number = 10_000 if day.full else 600
    with day.service() as service, Load(service.port, requests=number) as load:
        load.wait()
    ledger = day.ledger("healthy", load, statuses={200})
    assert load.sent >= number
    assert ledger.acknowledged == ledger.in_queue == load.sent


@pytest.mark.parametrize(
    ("share", "served", "status", "code"),
    [
        (0.1, 0.998, 500, "InternalFailure"),
        (0.3, 0.97, 400, "ThrottlingException"),
        pytest.param(0.3, 0.97, 500, "InternalFailure", marks=pytest.mark.full),
        pytest.param(0.1, 0.998, 400, "ThrottlingException", marks=pytest.mark.full),
    ],
)
def test_sqs_that_fails_a_share_of_calls_loses_no_message(
    service: ServiceProcess, day: Day, share: float, served: float, status: int, code: str
) -> None:
    fault = {"kind": "error", "status": status, "code": code, "share": share}
    day.fake.set(faults={"SendMessage": fault, "SendMessageBatch": fault})
    with Load(service.port, requests=20_000 if day.full else 400) as load:
        load.wait()
    title = f"{share:.0%} of SQS calls answer {status} {code}"
    ledger = day.ledger(title, load, statuses={200, 503})
    assert ledger.statuses[200] / load.sent >= served - (0 if day.full else 0.05)  # by chance
    assert not ledger.twice


def test_batch_entries_that_fail_fail_alone(day: Day) -> None:
    with day.service() as service:
        assert service.request(post()).status == 200
        day.fake.forget()
        day.fake.set(faults={"SendMessageBatch": {"kind": "fail_entries", "share": 0.1}})
        with Load(service.port, requests=10_000 if day.full else 1000) as load:
            load.wait()
    ledger = day.ledger("10% of batch entries fail", load, statuses={200, 503})
    assert max(message["batch_size"] for message in day.fake.messages()) > 1
    assert ledger.statuses[200] / load.sent >= 0.998 - (0 if day.full else 0.05)
    assert not ledger.twice


def test_sqs_that_hangs_is_refused_at_once(day: Day) -> None:
    """Then it is back, but slower than before, then as it was."""
    with day.service() as service, Load(service.port) as load:
        load.wait_for(64)
        # Connections that are lost stay silent, also when SQS is back.
        day.fake.set(faults={"SQS": {"kind": "hang", "for_good": True}})
        eventually(day.hung)
        down = time.monotonic()
        assert service.get("/health").status == 200
        onset = time.monotonic() - down
        assert onset < HANG
        load.wait_for(64, 503)  # the first calls have timed out
        if day.full:
            time.sleep(20)
        calls, refused, known = day.sends(), load.statuses[503], time.monotonic()
        load.wait_for(1500, 503)
        assert service.get("/health").status == 200
        later = time.monotonic()
        calls, refused = day.sends() - calls, load.statuses[503] - refused
        day.fake.set(faults={"SQS": {"kind": "delay", "seconds": 0.3}})
        slow = time.monotonic()
        load.wait_for(64)
        served = time.monotonic() - slow
        day.fake.set(faults={})
        eventually(lambda: {status for _, _, status in load.answers[-128:]} == {200})
    waited = max(s for at, s, status in load.answers if known < at - s and at < later)
    notes = (
        f"/health after {onset:.1f} s at the onset; then 503 within {waited:.2f} s, {refused} of "
        f"them with {calls} calls; with 0.3 s a call 64 served after {served:.1f} s"
    )
    day.ledger("SQS hangs", load, statuses={200, 503}, notes=notes)
    assert refused > 12 * calls, "a call of up to ten messages would be made for all of them"
    assert all(int(seconds) > 0 for seconds in load.retry_after)


def test_single_calls_that_hang_refuse_nobody_else(day: Day) -> None:
    with day.service() as service:
        eventually(lambda: service.request(post()).status == 200)
        day.fake.forget()
        fault = {"kind": "hang", "share": 0.01}
        day.fake.set(faults={"SendMessage": fault, "SendMessageBatch": fault})
        with Load(service.port) as load:
            eventually(lambda: day.hung() >= (30 if day.full else 3))
    calls, slow = day.hung(), sum(seconds > 2 for _, seconds, _ in load.answers)
    notes = f"{calls} calls hung, {slow} answers took over 2 s"
    ledger = day.ledger("1% of SQS calls hang", load, statuses={200, 503}, notes=notes)
    # A worker has two calls in flight. When both hang, SQS is down for its other messages.
    assert ledger.statuses[200] / load.sent >= 0.9


NO_QUEUE = "AWS.SimpleQueueService.NonExistentQueue"
DENIED = {"kind": "error", "status": 403, "code": "AccessDenied"}
SQS_FAULTS = {
    "resets": {"kind": "reset"},
    "loses its answer": {"kind": "lost_answer"},
    "answers garbage": {"kind": "garbage"},
    "has expired credentials": {"kind": "error", "status": 403, "code": "ExpiredToken"},
    "denies access": DENIED,
    "has no such queue": {"kind": "error", "status": 400, "code": NO_QUEUE},
    "answers after 1 s": {"kind": "delay", "seconds": 1},
}


def test_sqs_that_misbehaves_for_a_while_loses_nothing(service: ServiceProcess, day: Day) -> None:
    for name, fault in SQS_FAULTS.items():
        day.fake.forget()
        with Load(service.port, clients=16) as load:
            load.wait_for(16)
            day.fake.set(faults={"SQS": fault})
            load.wait_for(16, 200 if fault["kind"] == "delay" else 503)
            if day.full:
                time.sleep(10)
            day.fake.set(faults={})
            back = time.monotonic()
            load.wait_for(32)
            notes = f"{time.monotonic() - back:.1f} s until 32 are served again"
        ledger = day.ledger(f"SQS {name}", load, statuses={200, 503}, notes=notes)
        # Only what may have been sent before, for all that is known, is sent again.
        assert ledger.twice == 0 or name in ("loses its answer", "answers garbage")


def test_silent_name_servers_are_refused_at_once(day: Day, name_server: NameServer) -> None:
    endpoint = f"http://aws.email-processor.test:{day.fake.url.rpartition(':')[2]}"
    service = day.service(AWS_ENDPOINT_URL=endpoint)
    service.command = [*name_server.command, *service.command]
    with service:
        with Load(service.port) as load:
            load.wait_for(64)
            name_server.silent = True
            day.fake.set(faults={"*": {"kind": "reset"}})  # new connections must be made
            begin = time.monotonic()
            load.wait_for(1, 503)
            first = time.monotonic() - begin
            eventually(lambda: any("SQS is down" in line["message"] for line in service.log()))
            asked = time.monotonic()
            assert service.get("/health").status == 200
            health = time.monotonic() - asked
            assert health < HANG
            load.wait_for(1500, 503)
            day.fake.set(faults={})
            assert service.get("/health").status == 200
            name_server.silent = False
            back = time.monotonic()
            load.wait_for(64)
            served = time.monotonic() - back
        # A request whose call has begun is answered, although the service is to stop.
        name_server.silent = True
        day.fake.set(faults={"*": {"kind": "reset"}})
        asked, calls = name_server.asked, day.fake.counts()["calls"]
        with service.connect() as client:
            client.send(post())
            eventually(lambda: name_server.asked > asked or day.fake.counts()["calls"] != calls)
            ended = service.stop()
            assert client.response().status == 503
    notes = (
        f"first 503 after {first:.1f} s, /health {health:.1f} s; 64 served {served:.1f} s after "
        f"they were back; stopped in {ended:.1f} s"
    )
    day.ledger("name servers silent", load, statuses={200, 503}, notes=notes)


def test_queue_that_hangs_at_the_start_is_refused_to_all(day: Day) -> None:
    day.fake.set(faults={"SQS": {"kind": "hang"}})
    with day.service() as service:
        with Load(service.port, requests=64) as load:
            load.wait()
        calls, slowest = day.sends(), max(seconds for _, seconds, _ in load.answers)
        day.fake.set(faults={})
        eventually(lambda: service.request(post()).status == 200)
    day.note("SQS hangs at the start", f"503 to all within {slowest:.1f} s, after {calls} calls")
    assert load.statuses == {503: 64}
    assert calls <= 32, "most are refused without a call of their own"


@pytest.mark.parametrize(
    ("operation", "error"),
    [("GetParameters", "token_store_unavailable"), ("GetQueueAttributes", "queue_unavailable")],
)
def test_aws_out_of_reach_at_the_start_is_named_by_ready(
    day: Day, operation: str, error: str
) -> None:
    day.fake.set(faults={operation: DENIED})
    with day.service(ONE, TOKEN_CACHE_SECONDS="1") as service:
        failed = f"{operation} failed: AccessDenied"
        eventually(lambda: failed in service.get("/ready").json.get("message", ""))
        eventually(lambda: service.get("/ready").error == error)
        # A queue whose limit is not known takes messages all the same.
        answer = service.request(post())
        assert answer.status == 200 or answer.error == error == "token_store_unavailable"
        assert service.get("/health").status == 200
        assert bool(service.metrics()[TOKEN_READ]) == (operation != "GetParameters")
        day.fake.set(faults={})
        begin = time.monotonic()
        eventually(lambda: service.request(post()).status == 200)
        eventually(lambda: service.get("/ready").status == 200)
        seconds = time.monotonic() - begin
        day.fake.set(faults={"*": {"kind": "hang"}})
        assert service.get("/ready").status == 200, "never turns back"
    day.note(f"{operation} refused at the start", f"served {seconds:.1f} s after it came back")


# --- SSM ------------------------------------------------------------------------------------------

SSM_FAULTS = {
    "hangs": {"kind": "hang"},
    "denies access": DENIED,
    "resets": {"kind": "reset"},
    "answers 500": {"kind": "error", "status": 500, "code": "InternalServerError"},
    "answers garbage": {"kind": "garbage"},
}


def test_ssm_down_after_the_start_refuses_nobody(day: Day) -> None:
    """Each fault lasts until the cache is out of date, and SSM was asked again."""
    with day.service(ONE, TOKEN_CACHE_SECONDS="1") as service:
        eventually(lambda: day.fake.calls("GetParameters") == 1)
        for name, fault in list(SSM_FAULTS.items())[: None if day.full else 2]:
            day.fake.set(faults={"SSM": fault})
            day.fake.forget()
            with Load(service.port, clients=16) as load:
                eventually(lambda: day.fake.calls("GetParameters") > 0)
                load.wait_for(64)
                if day.full:
                    time.sleep(20)
            notes = f"{day.fake.calls('GetParameters')} reads tried"
            day.ledger(f"SSM {name} after the start", load, statuses={200}, notes=notes)


class Sts(http.server.ThreadingHTTPServer):
    """Gives credentials for a web identity, as on EKS; not before `answers` is set."""

    ANSWER = """<AssumeRoleWithWebIdentityResponse><AssumeRoleWithWebIdentityResult><Credentials>
    <AccessKeyId>test</AccessKeyId><SecretAccessKey>test</SecretAccessKey>
    <SessionToken>test</SessionToken><Expiration>2099-01-01T00:00:00Z</Expiration>
    </Credentials></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"""

    daemon_threads = True

    def __init__(self) -> None:
        self.answers = answers = threading.Event()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                if answers.wait(60):
                    with suppress(OSError):
                        self.send_response(200)
                        self.end_headers()
                        self.wfile.write(Sts.ANSWER.encode())

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)


def test_credentials_that_do_not_come_hold_no_request(day: Day, tmp_path: Path) -> None:
    identity = tmp_path / "token"
    identity.write_text("of the service account")
    with Sts() as sts:
        thread = threading.Thread(target=sts.serve_forever, args=(0.05,))
        thread.start()
        irsa = {
            "AWS_ACCESS_KEY_ID": "",
            "AWS_SECRET_ACCESS_KEY": "",
            "AWS_ROLE_ARN": "arn:aws:iam::000000000000:role/email-processor-role",
            "AWS_WEB_IDENTITY_TOKEN_FILE": str(identity),
            "AWS_ENDPOINT_URL_STS": f"http://127.0.0.1:{sts.server_port}",
        }
        try:
            with day.service(ONE, irsa, TOKEN_CACHE_SECONDS="1") as service:
                begin = time.monotonic()
                with service.connect() as client:
                    client.send(post())
                    assert service.get("/health").status == 200
                    health = time.monotonic() - begin
                    assert health < HANG
                    assert client.response().error == "token_store_unavailable"
                seconds = time.monotonic() - begin
                sts.answers.set()
                eventually(lambda: service.request(post()).status == 200)
        finally:
            sts.answers.set()
            sts.shutdown()
            thread.join()
    day.note("STS hangs", f"503 after {seconds:.1f} s, /health after {health:.2f} s")


def test_rotated_token_works_at_once(day: Day) -> None:
    with day.service(TOKEN_CACHE_SECONDS="1") as service:
        eventually(lambda: day.fake.calls("GetParameters") == 4)
        time.sleep(1.2)  # a worker asks at most once in a second
        day.fake.set(parameters={PARAMETER: "the new one"})
        rotated = time.monotonic()
        new = [service.request(post(with_token("the new one"))).status for _ in range(20)]
        for _ in range(20):  # until each worker has seen that the old one is gone
            eventually(lambda: service.request(post()).status == 401)
        seconds = time.monotonic() - rotated
    day.note("token rotated", f"new: {new.count(200)} of 20; old: refused after {seconds:.1f} s")
    assert new == [200] * 20


def test_rotation_with_two_parameters_refuses_nobody(day: Day) -> None:
    names = {"TOKEN_SSM_PARAMETER": "/token/a,/token/b", "TOKEN_CACHE_SECONDS": "1"}
    day.fake.set(parameters={"/token/a": TOKEN, "/token/b": "unused"})
    with day.service(ONE, names) as service, Load(service.port, clients=8) as old:
        old.wait_for(8)
        day.fake.set(parameters={"/token/a": TOKEN, "/token/b": "the new one"})
        eventually(lambda: service.request(post(with_token("the new one"))).status == 200)
        with Load(service.port, clients=8, body=with_token("the new one")) as new:
            new.wait_for(64)
            old.stop()
            day.fake.set(parameters={"/token/a": "gone", "/token/b": "the new one"})
            eventually(lambda: service.request(post()).status == 401)
            new.wait_for(64)
    day.ledger("token rotated with two parameters", old, new, statuses={200})


def test_flood_of_wrong_tokens_leaves_ssm_alone(service: ServiceProcess, day: Day) -> None:
    begin = time.monotonic()
    with (
        Load(service.port, clients=32, body=with_token("wrong")) as flood,
        Load(service.port, clients=4) as right,
    ):
        flood.wait_for(20_000 if day.full else 1000, 401)
        right.wait_for(64)
    reads, seconds = day.fake.calls("GetParameters"), time.monotonic() - begin
    notes = f"{flood.sent / seconds:,.0f} wrong ones/s, {reads / seconds:.1f} reads of SSM/s"
    day.ledger("flood of wrong tokens", right, statuses={200}, notes=notes)
    assert set(flood.statuses) == {401}
    assert not flood.failures
    assert reads <= 4 * (1 + seconds / 5), "each of 4 workers reads it every five seconds at most"


# --- Clients --------------------------------------------------------------------------------------


def test_slow_bodies_end_at_the_deadline(day: Day) -> None:
    """24 that stall and 24 that trickle, against 8 threads, however the workers share them."""
    framings = {b"x": "Content-Length: 1000", chunk(b"x"): "Transfer-Encoding: chunked"}
    with day.service(BODY_TIMEOUT_SECONDS="1") as service, ExitStack() as stack:
        slow = [(stack.enter_context(service.connect()), part) for part in [*framings] * 24]
        begin, done = time.monotonic(), threading.Event()
        for client, part in slow:
            client.send(post_head(framings[part]))

        def feed() -> None:
            while not done.wait(0.1):
                for client, part in slow[:24]:
                    with suppress(OSError):  # answered and closed already
                        client.sock.sendall(part)

        feeder = threading.Thread(target=feed)
        feeder.start()
        try:
            with Load(service.port, clients=40, requests=400) as others:
                others.wait()
            served = time.monotonic() - begin
            answers = [client.response() for client, _ in slow]
            gone = time.monotonic() - begin
        finally:
            done.set()
            feeder.join()
    day.note(
        "24 stalled and 24 trickling bodies",
        f"deadline 1 s: the last of 40 other clients served after {served:.1f} s, "
        f"all slow ones gone after {gone:.1f} s",
    )
    assert {(answer.status, answer.error) for answer in answers} == {(408, "request_timeout")}
    assert others.statuses == {200: others.sent}


def longest_health(service: ServiceProcess, times: int = 20) -> float:
    """Seconds; each on a connection of its own, as a probe makes it."""
    longest = 0.0
    for _ in range(times):
        begin = time.monotonic()
        assert service.get("/health").status == 200
        longest = max(longest, time.monotonic() - begin)
    return longest


STALLS = {
    "a length": post_head("Content-Length: 1000") + BODY,
    "chunks": post_head("Transfer-Encoding: chunked") + chunk(BODY),
    "a chunk's size": post_head("Transfer-Encoding: chunked") + b"f",
    "trailers": post_head("Transfer-Encoding: chunked") + chunk(BODY) + b"0\r\nName: ",
}


def test_hundreds_of_stalled_bodies_delay_no_other_client(day: Day) -> None:
    number = 200 if day.full else 75  # of each kind
    with day.service(BODY_TIMEOUT_SECONDS="60") as service, ExitStack() as stack:
        stalled = [stack.enter_context(service.connect()) for _ in range(number * len(STALLS))]
        for client, part in zip(stalled, [*STALLS.values()] * number, strict=True):
            client.send(part)
        with Load(service.port, requests=20_000 if day.full else 1000) as others:
            health = longest_health(service)
            others.wait()
        assert select.select([client.sock for client in stalled], [], [], 0)[0] == []
    title = f"{len(stalled)} stalled bodies"
    day.ledger(title, others, statuses={200}, notes=f"/health within {health:.2f} s")
    assert health < HANG


def test_overload_loses_nothing_and_leaves_health_alone(day: Day) -> None:
    """Many more clients than a pod can serve, none of which pauses."""
    clients = 500 if day.full else 250
    number = 50_000 if day.full else 3000
    with day.service() as service, Load(service.port, clients, requests=number) as load:
        load.wait_for(clients)
        health = longest_health(service)
        load.wait()
    notes = f"/health within {health:.2f} s beside {clients} clients"
    ledger = day.ledger("overload", load, statuses={200, 503}, notes=notes)
    assert ledger.in_queue == ledger.acknowledged
    assert health < HANG


def test_slow_readers_hold_no_thread_and_are_closed(day: Day) -> None:
    ask = request_head("GET", "/docs/swagger-ui-bundle.js")
    variables = {"BODY_TIMEOUT_SECONDS": "1", "GUNICORN_THREADS": "1"}
    with day.service(ONE, variables) as service, service.connect(buffer=4096) as slow:
        assert slow.send(ask).sock.recv(2048).startswith(b"HTTP/1.1 200")
        begin = time.monotonic()
        whole = len(service.request(ask).body)
        others = time.monotonic() - begin
        taken = 0
        with suppress(ConnectionResetError):
            while part := slow.sock.recv(2048):
                taken += len(part)
                time.sleep(0.05)
        seconds = time.monotonic() - begin
    day.note("slow reader", f"deadline 2 s: closed after {seconds:.1f} s, others {others:.2f} s")
    assert taken < whole
    assert seconds > 1.5


# --- Processes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("held_back", [False, True], ids=["at once", "after preStop"])
def test_sigterm_under_load_answers_what_was_begun(day: Day, held_back: bool) -> None:
    """In the cluster, the pod leaves the load balancer, and the preStop sleep passes, before."""
    loads, seconds = [], []
    for _ in range(10 if day.full else 1):
        with day.service() as service, service.connect() as idle:
            assert idle.send(request_head("GET", "/health")).response().status == 200
            with Load(service.port, hold_new_connections=held_back) as load:
                load.wait_for(128)
                seconds.append(service.stop())
        loads.append(load)
    ledger = LoadReport.of(day.fake, *loads)
    title = f"SIGTERM under load{' after new connections were held back' * held_back}"
    day.note(title, ledger, f"exit within {max(seconds):.1f} s")
    assert set(ledger.statuses) == {200}
    assert not ledger.lost
    assert max(seconds) < 25, "Gunicorn had to kill its workers"
    # Only connections that no worker had taken yet end without an answer.
    failures = [failure for load in loads for failure in load.failures]
    assert not held_back or not failures
    assert all(failure.first and failure.part == b"" for failure in failures)


class Scrapes:
    """`with` it, /metrics is read again and again, on a new connection as by Prometheus."""

    def __init__(self, service: ServiceProcess) -> None:
        self.service = service
        self.answered = self.unanswered = 0
        self.fallen: list[str] = []  # counters that were smaller than the time before
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._scrape)

    def __enter__(self) -> Scrapes:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def wait_for(self, number: int) -> None:
        """Until it was read as often again."""
        wanted = self.answered + number
        eventually(lambda: self.answered >= wanted)

    def _scrape(self) -> None:
        seen: dict[str, float] = {}
        while not self._stop.wait(0.02):
            try:
                samples = self.service.metrics()
            except (OSError, AssertionError):  # the killed worker's
                self.unanswered += 1
                continue
            self.answered += 1
            for name, value in samples.items():
                if re.search(r"_(total|count|sum|bucket)", name):
                    if value < seen.get(name, 0):
                        self.fallen.append(f"{name}: {seen[name]:g}, then {value:g}")
                    seen[name] = value


ANSWERS = "email_processor_requests_total"
SUCCESS, INVALID_TOKEN = (f'{ANSWERS}{{outcome="{o}"}}' for o in ("success", "invalid_token"))
DURATIONS = "email_processor_request_duration_seconds_count"
MESSAGES = "email_processor_sqs_batch_size_sum"


def test_killed_workers_lose_nothing_acknowledged_or_counted(
    service: ServiceProcess, day: Day
) -> None:
    """What a client was answered was counted, and nothing that no client has asked for.

    Between the two are the requests that a killed worker had under way: their answers were counted
    before they could be sent, or not. Without a kill the two are equal, after the kills too.
    """
    kills = 10 if day.full else 3
    before = service.metrics()
    with (
        Scrapes(service) as scrapes,
        Load(service.port, clients=32) as right,
        Load(service.port, clients=4, body=with_token("wrong")) as wrong,
    ):
        for number in range(kills):
            right.wait_for(64)
            scrapes.wait_for(2)
            # The newest twice, so that its counts and its predecessor's must stay; then the oldest.
            victim = service.workers()[0 if number % 3 == 2 else -1]
            kill(victim)
            eventually(lambda v=victim: len({*service.workers()} - {v}) == 4)
        right.wait_for(64)
        scrapes.wait_for(2)
    after, ledger = service.metrics(), LoadReport.of(day.fake, right)
    with Load(service.port, requests=400) as calm:
        calm.wait()
    end = service.metrics()

    ok, denied = right.statuses[200], wrong.statuses[401]
    broken, also_broken = len(right.failures), len(wrong.failures)
    bounds = {
        SUCCESS: (ok + scrapes.answered + 1, broken + scrapes.unanswered),  # 1: the first reading
        INVALID_TOKEN: (denied, also_broken),
        DURATIONS: (ok + denied, broken + also_broken),
        MESSAGES: (ok, broken),
    }
    grown = {name: after[name] - before[name] for name in bounds}
    day.note(
        f"{kills} workers killed",
        ledger,
        f"{ok:,} x 200 and {denied:,} x 401 answered, {broken + also_broken} unanswered, "
        f"{grown[DURATIONS]:,.0f} counted; {scrapes.answered} scrapes, {len(scrapes.fallen)} falls",
    )
    assert not ledger.lost
    assert not scrapes.fallen
    assert scrapes.unanswered <= kills
    assert set(right.statuses) | set(wrong.statuses) == {200, 401}
    for name, (answered, unanswered) in bounds.items():
        assert answered <= grown[name] <= answered + unanswered, name
    assert calm.statuses == {200: calm.sent}
    calmly = {SUCCESS: calm.sent + 1, INVALID_TOKEN: 0, DURATIONS: calm.sent, MESSAGES: calm.sent}
    assert {name: end[name] - after[name] for name in bounds} == calmly


# --- Arbitrary input ------------------------------------------------------------------------------

JUNK = [b"\0", b"\xff", b"\r\n", b"\n", b" ", b":", b"{", b"}", b'"', b"9" * 30, b"%", b"\\ud800"]
GOOD = [
    post(BODY, "X-Amzn-Trace-Id: Root=1", "Idempotency-Key: k"),
    post(b"{}", "Connection: close"),
    post_head("Transfer-Encoding: chunked") + chunk(BODY) + chunk(b""),
    request_head("GET", "/health", "Connection: Upgrade", "Upgrade: websocket"),
    request_head("PUT", "/nowhere"),
]


def fuzzed(chance: random.Random) -> bytes:
    """A request that began as a good one."""
    request = chance.choice(GOOD)
    for _ in range(chance.randrange(4)):
        start = chance.randrange(len(request) + 1)
        request = request[:start] + chance.choice(JUNK) + request[start + chance.randrange(4) :]
    return request


def test_fuzzed_requests_end_no_worker(service: ServiceProcess, day: Day) -> None:
    number, before = 100_000 if day.full else 2000, service.workers()

    def send(seed: int) -> Counter[str]:
        chance, statuses = random.Random(seed), Counter[str]()
        for _ in range(number // 8):
            with service.connect() as client:
                client.send(fuzzed(chance))
                client.sock.shutdown(socket.SHUT_WR)  # nothing more will come
                received = b"".join(iter(lambda sock=client.sock: sock.recv(65536), b""))
            statuses[received[9:12].decode()] += 1
        return statuses

    with ThreadPoolExecutor(8) as pool:
        statuses = sum(pool.map(send, range(700, 708)), Counter[str]())
    counted = ", ".join(f"{n:,} x {status or 'closed'}" for status, n in sorted(statuses.items()))
    day.note("fuzzed requests", f"{statuses.total():,} sent; {counted}")
    assert not {status for status in statuses if status.startswith("5")}
    assert {"200", "400", "401", "404"} <= set(statuses)
    assert service.workers() == before
