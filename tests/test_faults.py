"""Failure modes: real workers, an AWS that misbehaves on command, clients that count every answer.

Each test has a short form of seconds; `--full` runs the long one. The figures are printed at the
end of the run; docs/reliability.md has those of a full one. No verdict depends on how fast a
machine is: each step waits for the one before.
"""

from __future__ import annotations

import http.server
import random
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from conftest import (
    BODY,
    DATA,
    PARAMETER,
    TOKEN,
    WAIT,
    NameServer,
    Service,
    StartService,
    eventually,
    kill,
    post,
    post_head,
    request_head,
)
from fake_aws import FakeAws
from load import Ledger, Load

import app

pytestmark = pytest.mark.slow

TOKEN_READ = "email_processor_token_read_timestamp_seconds"
ONE = {"GUNICORN_WORKERS": "1"}
Figures = Callable[..., None]


def profiles(*short: str) -> pytest.MarkDecorator:
    """The service's two profiles; in the short form those alone that are named."""
    every = {
        "4x2": {"GUNICORN_WORKERS": "4", "GUNICORN_THREADS": "2"},
        "1x64": {"GUNICORN_WORKERS": "1", "GUNICORN_THREADS": "64"},
    }
    values = [
        pytest.param(profile, id=name, marks=[] if name in short else [pytest.mark.full])
        for name, profile in every.items()
    ]
    return pytest.mark.parametrize("profile", values)


@pytest.fixture(scope="module")
def service_of_all(start_service: StartService, fake_process: FakeAws) -> Iterator[Service]:
    with start_service(**fake_process.environment()) as service:
        yield service


@pytest.fixture
def service(service_of_all: Service, fake: FakeAws) -> Service:
    """The defaults, 4 workers with 2 threads each, in front of a healthy fake AWS."""
    eventually(lambda: len(service_of_all.workers()) == 4)
    eventually(lambda: {service_of_all.ask(post()).status for _ in range(8)} == {200})
    fake.forget()
    return service_of_all


def with_token(token: str) -> bytes:
    return BODY.replace(app.json.dumps(TOKEN).encode(), app.json.dumps(token).encode())


def sends(fake: FakeAws) -> int:
    return fake.calls("SendMessage") + fake.calls("SendMessageBatch")


def hung(fake: FakeAws) -> int:
    answers = fake.counts()["answers"]
    return sum(count for name, count in answers.items() if name.endswith(" hang"))


# --- SQS ------------------------------------------------------------------------------------------


@profiles("1x64")
def test_healthy_day_queues_every_message(
    start_service: StartService,
    fake: FakeAws,
    figures: Figures,
    full: bool,
    profile: dict[str, str],
) -> None:
    number = 10_000 if full else 600
    with (
        start_service(**fake.environment(), **profile) as service,
        Load(service.port, requests=number) as load,
    ):
        load.wait()
    ledger = Ledger.of(fake, load)
    figures("healthy", ledger)
    assert ledger.statuses == {200: load.sent}
    assert load.sent >= number
    assert ledger.acknowledged == ledger.in_queue == load.sent
    assert not ledger.lost


LONG = pytest.mark.full


@pytest.mark.parametrize(
    ("share", "served", "status", "code"),
    [
        (0.1, 0.998, 500, "InternalFailure"),
        (0.3, 0.97, 400, "ThrottlingException"),
        pytest.param(0.3, 0.97, 500, "InternalFailure", marks=LONG),
        pytest.param(0.1, 0.998, 400, "ThrottlingException", marks=LONG),
    ],
)
def test_sqs_that_fails_a_share_of_calls_loses_no_message(
    service: Service,
    fake: FakeAws,
    figures: Figures,
    full: bool,
    share: float,
    served: float,
    status: int,
    code: str,
) -> None:
    fault = {"kind": "error", "status": status, "code": code, "share": share}
    fake.set(faults={"SendMessage": fault, "SendMessageBatch": fault})
    with Load(service.port, requests=20_000 if full else 400) as load:
        load.wait()
    ledger = Ledger.of(fake, load)
    figures(f"{share:.0%} of SQS calls answer {status} {code}", ledger)
    assert set(ledger.statuses) <= {200, 503}
    assert ledger.statuses[200] / load.sent >= served - (0 if full else 0.05)  # by chance
    assert not ledger.lost
    assert not ledger.twice
    assert not load.failures


def test_batch_entries_that_fail_fail_alone(
    start_service: StartService, fake: FakeAws, figures: Figures, full: bool
) -> None:
    profile = {"GUNICORN_WORKERS": "1", "GUNICORN_THREADS": "64"}
    with start_service(**fake.environment(), **profile) as service:
        assert service.ask(post()).status == 200
        fake.forget()
        fault = {"kind": "fail_entries", "share": 0.1, "sender_fault": False}
        fake.set(faults={"SendMessageBatch": {**fault, "code": "InternalError"}})
        with Load(service.port, requests=10_000 if full else 1000) as load:
            load.wait()
    ledger = Ledger.of(fake, load)
    figures("10% of batch entries fail", ledger)
    assert max(message["batch_size"] for message in fake.messages()) > 1
    assert ledger.statuses[200] / load.sent >= 0.998 - (0 if full else 0.05)
    assert set(ledger.statuses) <= {200, 503}
    assert not ledger.lost
    assert ledger.twice == 0
    assert not load.failures


@profiles("4x2", "1x64")
def test_sqs_that_hangs_is_refused_at_once(
    start_service: StartService,
    fake: FakeAws,
    figures: Figures,
    full: bool,
    profile: dict[str, str],
) -> None:
    """Then it is back, but slower than before, then as it was."""
    with start_service(**fake.environment(), **profile) as service, Load(service.port) as load:
        load.wait_for(64)
        # Connections that are lost stay silent, also when SQS is back.
        fake.set(faults={"SQS": {"kind": "hang", "for_good": True}})
        eventually(lambda: hung(fake))
        down = time.monotonic()
        assert service.get("/health").status == 200
        onset = time.monotonic() - down
        load.wait_for(64, 503)  # the first calls have timed out
        if full:
            time.sleep(20)
        calls, refused, known = sends(fake), load.statuses[503], time.monotonic()
        load.wait_for(1500, 503)
        assert service.get("/health").status == 200
        later = time.monotonic()
        calls, refused = sends(fake) - calls, load.statuses[503] - refused
        fake.set(faults={"SQS": {"kind": "delay", "seconds": 0.3}})
        slow = time.monotonic()
        load.wait_for(64)
        served = time.monotonic() - slow
        fake.set(faults={})
        eventually(lambda: {status for _, _, status in load.answers[-128:]} == {200})
    ledger = Ledger.of(fake, load)
    waited = max(s for at, s, status in load.answers if known < at - s and at < later)
    figures(
        "SQS hangs",
        ledger,
        f"/health after {onset:.1f} s at the onset; then 503 within {waited:.2f} s, {refused} of "
        f"them with {calls} calls; with 0.3 s a call 64 served after {served:.1f} s",
    )
    assert refused > 12 * calls, "a call of up to ten messages would be made for all of them"
    assert set(ledger.statuses) == {200, 503}
    assert all(int(seconds) > 0 for seconds in load.retry_after)
    assert not ledger.lost
    assert not load.failures


@profiles("1x64")
def test_single_calls_that_hang_refuse_nobody_else(
    start_service: StartService,
    fake: FakeAws,
    figures: Figures,
    full: bool,
    profile: dict[str, str],
) -> None:
    with start_service(**fake.environment(), **profile) as service:
        eventually(lambda: service.ask(post()).status == 200)
        fake.forget()
        fault = {"kind": "hang", "share": 0.01}
        fake.set(faults={"SendMessage": fault, "SendMessageBatch": fault})
        with Load(service.port) as load:
            eventually(lambda: hung(fake) >= (30 if full else 3))
    ledger, calls = Ledger.of(fake, load), hung(fake)
    slow = sum(seconds > 2 for _, seconds, _ in load.answers)
    figures("1% of SQS calls hang", ledger, f"{calls} calls hung, {slow} answers took over 2 s")
    assert set(ledger.statuses) <= {200, 503}
    if profile["GUNICORN_THREADS"] == "64":  # two threads may hang at once: then SQS is down
        assert ledger.statuses.get(503, 0) <= 10 * calls, "no more than have hung with them"
    assert not ledger.lost
    assert not load.failures


SQS_FAULTS = {
    "resets": {"kind": "reset"},
    "loses its answer": {"kind": "lost_answer"},
    "answers garbage": {"kind": "garbage"},
    "has expired credentials": {"kind": "error", "status": 403, "code": "ExpiredToken"},
    "denies access": {"kind": "error", "status": 403, "code": "AccessDenied"},
    "has no such queue": {
        "kind": "error",
        "status": 400,
        "code": "AWS.SimpleQueueService.NonExistentQueue",
    },
    "answers after 1 s": {"kind": "delay", "seconds": 1},
}


def test_sqs_that_misbehaves_for_a_while_loses_nothing(
    service: Service, fake: FakeAws, figures: Figures, full: bool
) -> None:
    for name, fault in SQS_FAULTS.items():
        fake.forget()
        with Load(service.port, clients=16) as load:
            load.wait_for(16)
            fake.set(faults={"SQS": fault})
            load.wait_for(16, 200 if fault["kind"] == "delay" else 503)
            if full:
                time.sleep(10)
            fake.set(faults={})
            back = time.monotonic()
            load.wait_for(32)
            seconds = time.monotonic() - back
        ledger = Ledger.of(fake, load)
        figures(f"SQS {name}", ledger, f"{seconds:.1f} s until 32 are served again")
        assert set(ledger.statuses) <= {200, 503}
        assert not ledger.lost
        assert not load.failures
        # Only what may have been sent before, for all that is known, is sent again.
        assert ledger.twice == 0 or name in ("loses its answer", "answers garbage")


@profiles("4x2")
def test_silent_name_servers_are_refused_at_once(
    start_service: StartService,
    fake: FakeAws,
    name_server: NameServer,
    figures: Figures,
    profile: dict[str, str],
) -> None:
    endpoint = f"http://aws.email-processor.test:{fake.url.rpartition(':')[2]}"
    service = start_service(**{**fake.environment(), "AWS_ENDPOINT_URL": endpoint}, **profile)
    service.wrapper = name_server.command
    with service:
        with Load(service.port) as load:
            load.wait_for(64)
            name_server.silent = True
            fake.set(faults={"*": {"kind": "reset"}})  # new connections must be made
            begin = time.monotonic()
            load.wait_for(1, 503)
            first = time.monotonic() - begin
            eventually(lambda: any("SQS is down" in line["message"] for line in service.log()))
            assert service.get("/health").status == 200
            health = time.monotonic() - begin
            load.wait_for(1500, 503)
            fake.set(faults={})
            assert service.get("/health").status == 200
            name_server.silent = False
            back = time.monotonic()
            load.wait_for(64)
            served = time.monotonic() - back
        # A request whose call has begun is answered, although the service is to stop.
        name_server.silent = True
        fake.set(faults={"*": {"kind": "reset"}})
        asked, calls = name_server.asked, fake.counts()["calls"]
        with service.connect() as client:
            client.send(post())
            eventually(lambda: name_server.asked > asked or fake.counts()["calls"] != calls)
            ended = service.stop()
            assert client.answer().status == 503
    ledger = Ledger.of(fake, load)
    figures(
        "name servers silent",
        ledger,
        f"first 503 after {first:.1f} s, /health {health:.1f} s; 64 served {served:.1f} s after "
        f"they were back; stopped in {ended:.1f} s",
    )
    assert set(ledger.statuses) == {200, 503}
    assert not ledger.lost
    assert not load.failures


@profiles("1x64")
def test_queue_that_hangs_at_the_start_is_refused_to_all(
    start_service: StartService, fake: FakeAws, figures: Figures, profile: dict[str, str]
) -> None:
    fake.set(faults={"SQS": {"kind": "hang"}})
    with start_service(**fake.environment(), **profile) as service:
        with Load(service.port, requests=64) as load:
            load.wait()
        calls, slowest = sends(fake), max(seconds for _, seconds, _ in load.answers)
        fake.set(faults={})
        eventually(lambda: service.ask(post()).status == 200)
    figures("SQS hangs at the start", f"503 to all within {slowest:.1f} s, after {calls} calls")
    assert load.statuses == {503: 64}
    assert calls <= 32, "most are refused without a call of their own"


def test_queue_out_of_reach_at_the_start_is_named_by_ready(
    start_service: StartService, fake: FakeAws
) -> None:
    fake.set(faults={"GetQueueAttributes": SQS_FAULTS["denies access"]})
    with start_service(**fake.environment(), **ONE) as service:
        ready = service.get("/ready")
        assert (ready.status, ready.error) == (503, "queue_unavailable")
        assert "sqs:GetQueueAttributes failed: AccessDenied" in ready.json["message"]
        assert service.ask(post()).error == "queue_unavailable"
        fake.set(faults={})
        eventually(lambda: service.get("/ready").status == 200)
        assert service.ask(post()).status == 200


# --- SSM ------------------------------------------------------------------------------------------

SSM_FAULTS = {
    "hangs": {"kind": "hang"},
    "denies access": {"kind": "error", "status": 400, "code": "AccessDeniedException"},
    "resets": {"kind": "reset"},
    "answers 500": {"kind": "error", "status": 500, "code": "InternalServerError"},
    "answers garbage": {"kind": "garbage"},
}


def test_ssm_down_after_the_start_refuses_nobody(
    start_service: StartService, fake: FakeAws, figures: Figures, full: bool
) -> None:
    """Each fault lasts until the cache is out of date, and SSM was asked again."""
    with start_service(**fake.environment(), **ONE, TOKEN_CACHE_SECONDS="1") as service:
        eventually(lambda: fake.calls("GetParameters") == 1)
        for name, fault in list(SSM_FAULTS.items())[: None if full else 2]:
            fake.set(faults={"SSM": fault})
            fake.forget()
            with Load(service.port, clients=16) as load:
                eventually(lambda: fake.calls("GetParameters") > 0)
                load.wait_for(64)
                if full:
                    time.sleep(20)
            ledger, reads = Ledger.of(fake, load), fake.calls("GetParameters")
            figures(f"SSM {name} after the start", ledger, f"{reads} reads tried")
            assert set(ledger.statuses) == {200}
            assert not load.failures


def test_ssm_down_at_the_start_is_not_ready_until_it_is_back(
    start_service: StartService, fake: FakeAws, figures: Figures
) -> None:
    fake.set(faults={"SSM": SSM_FAULTS["denies access"]})
    with start_service(**fake.environment(), **ONE, TOKEN_CACHE_SECONDS="1") as service:
        ready = service.get("/ready")
        assert ready.status == 503
        assert "ssm:GetParameters failed: AccessDeniedException" in ready.json["message"]
        assert service.ask(post()).error == "token_store_unavailable"
        assert service.get("/health").status == 200
        assert service.metrics()[TOKEN_READ] == 0
        fake.set(faults={})
        begin, now = time.monotonic(), time.time()
        eventually(lambda: service.ask(post()).status == 200)
        seconds = time.monotonic() - begin
        assert service.metrics()[TOKEN_READ] >= now
        assert service.get("/ready").status == 200
        fake.set(faults={"*": {"kind": "hang"}})
        assert service.get("/ready").status == 200, "never turns back"
    figures("SSM down at the start", f"served {seconds:.1f} s after it came back")


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


def test_credentials_that_do_not_come_hold_no_request(
    start_service: StartService, fake: FakeAws, figures: Figures, tmp_path: Path
) -> None:
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
            "TOKEN_CACHE_SECONDS": "1",
        }
        try:
            with start_service(**{**fake.environment(), **irsa, **ONE}) as service:
                begin = time.monotonic()
                assert service.ask(post()).error == "token_store_unavailable"
                seconds = time.monotonic() - begin
                assert service.get("/health").status == 200
                sts.answers.set()
                eventually(lambda: service.ask(post()).status == 200)
        finally:
            sts.answers.set()
            sts.shutdown()
            thread.join()
    figures("STS hangs", f"503 after {seconds:.1f} s")


def test_rotated_token_works_at_once(
    start_service: StartService, fake: FakeAws, figures: Figures
) -> None:
    with start_service(**fake.environment(), TOKEN_CACHE_SECONDS="1") as service:
        eventually(lambda: fake.calls("GetParameters") == 4)
        time.sleep(1.2)  # a worker asks at most once in a second
        fake.set(parameters={PARAMETER: "the new one"})
        rotated = time.monotonic()
        new = [service.ask(post(with_token("the new one"))).status for _ in range(20)]
        for _ in range(20):  # until each worker has seen that the old one is gone
            eventually(lambda: service.ask(post()).status == 401)
        seconds = time.monotonic() - rotated
    figures("token rotated", f"new: {new.count(200)} of 20; old: refused after {seconds:.1f} s")
    assert new == [200] * 20


def test_rotation_with_two_parameters_refuses_nobody(
    start_service: StartService, fake: FakeAws, figures: Figures
) -> None:
    names = {"TOKEN_SSM_PARAMETER": "/token/a,/token/b", "TOKEN_CACHE_SECONDS": "1", **ONE}
    fake.set(parameters={"/token/a": TOKEN, "/token/b": "unused"})
    with (
        start_service(**{**fake.environment(), **names}) as service,
        Load(service.port, clients=8) as old,
    ):
        old.wait_for(8)
        fake.set(parameters={"/token/a": TOKEN, "/token/b": "the new one"})
        eventually(lambda: service.ask(post(with_token("the new one"))).status == 200)
        with Load(service.port, clients=8, body=with_token("the new one")) as new:
            new.wait_for(64)
            old.stop()
            fake.set(parameters={"/token/a": "gone", "/token/b": "the new one"})
            eventually(lambda: service.ask(post()).status == 401)
            new.wait_for(64)
    ledger = Ledger.of(fake, old, new)
    figures("token rotated with two parameters", ledger)
    assert set(ledger.statuses) == {200}
    assert not ledger.lost


def test_flood_of_wrong_tokens_leaves_ssm_alone(
    service: Service, fake: FakeAws, figures: Figures, full: bool
) -> None:
    begin = time.monotonic()
    with (
        Load(service.port, clients=32, body=with_token("wrong")) as flood,
        Load(service.port, clients=4) as right,
    ):
        flood.wait_for(20_000 if full else 1000, 401)
        right.wait_for(64)
    reads, seconds = fake.calls("GetParameters"), time.monotonic() - begin
    figures(
        "flood of wrong tokens",
        Ledger.of(fake, right),
        f"{flood.sent / seconds:,.0f} wrong ones/s, {reads / seconds:.1f} reads of SSM/s",
    )
    assert set(flood.statuses) == {401}
    assert set(right.statuses) == {200}
    assert not flood.failures + right.failures
    assert reads <= 4 * (1 + seconds / 5), "each of 4 workers reads it every five seconds at most"


# --- Clients --------------------------------------------------------------------------------------


def test_slow_bodies_end_at_the_deadline(
    start_service: StartService, fake: FakeAws, figures: Figures
) -> None:
    """24 that stall and 24 that trickle, against 8 threads, however the workers share them."""
    framings = {b"x": "Content-Length: 1000", b"1\r\nx\r\n": "Transfer-Encoding: chunked"}
    settings = {"BODY_TIMEOUT_SECONDS": "1"}
    with start_service(**fake.environment(), **settings) as service, ExitStack() as stack:
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
            answers = [client.answer() for client, _ in slow]
            gone = time.monotonic() - begin
        finally:
            done.set()
            feeder.join()
    figures(
        "24 stalled and 24 trickling bodies",
        f"deadline 1 s: the last of 40 other clients served after {served:.1f} s, "
        f"all slow ones gone after {gone:.1f} s",
    )
    assert {(answer.status, answer.error) for answer in answers} == {(408, "request_timeout")}
    assert others.statuses == {200: others.sent}


def test_slow_readers_hold_no_thread_and_are_closed(
    start_service: StartService, fake: FakeAws, figures: Figures
) -> None:
    variables = {"BODY_TIMEOUT_SECONDS": "1", "GUNICORN_THREADS": "1", **ONE}
    ask = request_head("GET", "/docs/swagger-ui-bundle.js")
    with start_service(**fake.environment(), **variables) as service, socket.socket() as slow:
        # As from afar: on loopback the kernel would take the whole answer at once.
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1400)
        slow.settimeout(WAIT)
        slow.connect(("127.0.0.1", service.port))
        slow.sendall(ask)
        assert slow.recv(2048).startswith(b"HTTP/1.1 200")
        begin = time.monotonic()
        whole = len(service.ask(ask).body)
        others = time.monotonic() - begin
        taken = 0
        with suppress(ConnectionResetError):
            while part := slow.recv(2048):
                taken += len(part)
                time.sleep(0.05)
        seconds = time.monotonic() - begin
    figures("slow reader", f"deadline 2 s: closed after {seconds:.1f} s, others after {others:.2f}")
    assert taken < whole
    assert seconds > 1.5


# --- Processes ------------------------------------------------------------------------------------


@profiles("4x2")
def test_sigterm_under_load_answers_what_was_begun(
    start_service: StartService,
    fake: FakeAws,
    figures: Figures,
    full: bool,
    profile: dict[str, str],
) -> None:
    loads, seconds = [], []
    for _ in range(10 if full else 1):
        with start_service(**fake.environment(), **profile) as service, service.connect() as idle:
            assert idle.send(request_head("GET", "/health")).answer().status == 200
            with Load(service.port) as load:
                load.wait_for(128)
                seconds.append(service.stop())
                load.stop()
        loads.append(load)
    ledger = Ledger.of(fake, *loads)
    figures("SIGTERM under load", ledger, f"exit within {max(seconds):.1f} s")
    assert set(ledger.statuses) == {200}
    assert not ledger.lost
    assert max(seconds) < 25, "Gunicorn had to kill its workers"
    # Only connections that no worker had taken yet end without an answer.
    for failure in (failure for load in loads for failure in load.failures):
        assert failure.first
        assert failure.part == b""


@profiles("1x64")
def test_sigterm_without_new_connections_fails_nobody(
    start_service: StartService,
    fake: FakeAws,
    figures: Figures,
    full: bool,
    profile: dict[str, str],
) -> None:
    """As in the cluster: the pod leaves the load balancer, the preStop sleep passes, SIGTERM."""
    loads = []
    for _ in range(10 if full else 1):
        with start_service(**fake.environment(), **profile) as service, Load(service.port) as load:
            load.wait_for(128)
            load.hold_new_connections = True
            service.stop()
            load.wait()
        loads.append(load)
    ledger = Ledger.of(fake, *loads)
    figures("SIGTERM after new connections were held back", ledger)
    assert set(ledger.statuses) == {200}
    assert ledger.unanswered == 0
    assert ledger.acknowledged == ledger.in_queue == ledger.sent
    assert not ledger.lost


class Scrapes:
    """`with` it, /metrics is read again and again, on a new connection as by Prometheus."""

    def __init__(self, service: Service) -> None:
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
    service: Service, fake: FakeAws, figures: Figures, full: bool
) -> None:
    """What a client was answered was counted, and nothing that no client has asked for.

    Between the two are the requests that a killed worker had under way: their answers were counted
    before they could be sent, or not. Without a kill the two are equal, after the kills too.
    """
    kills = 10 if full else 3
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
    after, ledger = service.metrics(), Ledger.of(fake, right)
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
    figures(
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
HEADERS = [
    b"Content-Type: application/json",
    b"Content-Type: text/plain",
    b"Content-Length: 5",
    b"Content-Length: -1",
    b"Transfer-Encoding: chunked",
    b"Transfer-Encoding: gzip, chunked",
    b"Connection: close",
    b"Expect: 100-continue",
    b"X-Request-Id: \xff",
    b"X-Amzn-Trace-Id: Root=1",
    b"X-Forwarded-For: , ,",
    b"Idempotency-Key: \xc3\xa9",
    b"Host: [",
    b"Upgrade: websocket",
    b"Connection: Upgrade",
    b"no colon",
]


def fuzzed(chance: random.Random) -> bytes:
    """A request that began as a good one."""
    values = [chance.choice([None, "", 1e9, True, [], {}, "\u0000", "x", -1]) for _ in range(2)]
    data = {**DATA, chance.choice([*DATA, "more"]): values[0]}
    body = app.json.dumps({"data": data, "token": chance.choice([TOKEN, values[1]])}).encode()
    if chance.random() < 0.5:
        body = spoiled(body, chance)
    line = chance.choice([b"POST /process", b"POST /process", b"GET /health", b"PUT /", b"GET /x"])
    headers = [b"Host: localhost", *chance.sample(HEADERS, chance.randrange(4))]
    if chance.random() < 0.8:
        headers += [b"Content-Type: application/json", b"Content-Length: %d" % len(body)]
    request = b"\r\n".join([line + b" HTTP/1.1", *headers, b"", body])
    return spoiled(request, chance) if chance.random() < 0.2 else request


def spoiled(text: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(text) + 1)
    return text[:start] + chance.choice(JUNK) + text[start + chance.randrange(4) :]


def test_fuzzed_requests_end_no_worker(service: Service, figures: Figures, full: bool) -> None:
    number, before = 100_000 if full else 2000, service.workers()

    def send(seed: int) -> Counter[str]:
        chance, statuses = random.Random(seed), Counter[str]()
        for _ in range(number // 8):
            with service.connect() as client:
                client.send(fuzzed(chance))
                client.sock.shutdown(socket.SHUT_WR)  # nothing more will come
                received = b""
                while part := client.sock.recv(65536):
                    received += part
            statuses[received[9:12].decode()] += 1
        return statuses

    with ThreadPoolExecutor(8) as pool:
        statuses = sum(pool.map(send, range(700, 708)), Counter[str]())
    counted = ", ".join(f"{n:,} x {status or 'closed'}" for status, n in sorted(statuses.items()))
    figures("fuzzed requests", f"{statuses.total():,} sent; {counted}")
    assert not {status for status in statuses if status.startswith("5")}
    assert {"200", "400", "401", "404"} <= set(statuses)
    assert service.workers() == before
