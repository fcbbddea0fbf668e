"""Bad days: real workers, an AWS that misbehaves on command, clients that count every answer.

Each test has a short form of seconds; `--full` runs the long one. The figures are printed at the
end of the run; RELIABILITY.md has those of a full one.
"""

from __future__ import annotations

import http.server
import math
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from conftest import (
    BODY,
    DATA,
    PARAMETER,
    TOKEN,
    WAIT,
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

TOKENS_READ = 'email_processor_token_reads_total{result="success"}'
TOKEN_READ = "email_processor_token_read_timestamp_seconds"
THROUGHPUT = {"GUNICORN_WORKERS": "1", "GUNICORN_THREADS": "64"}
Figures = Callable[..., None]


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


@pytest.fixture(params=["4x2", "1x64"])
def profile(request: pytest.FixtureRequest) -> dict[str, str]:
    workers, threads = request.param.split("x")
    return {"GUNICORN_WORKERS": workers, "GUNICORN_THREADS": threads}


def with_token(token: str) -> bytes:
    return BODY.replace(app.json.dumps(TOKEN).encode(), app.json.dumps(token).encode())


def least(share: float, number: int, full: bool) -> float:
    """What a share must reach: in the short form three standard deviations less, as by chance."""
    return share - (0 if full else 3 * math.sqrt(share * (1 - share) / number))


class HealthProbes:
    """`with` it, /health is asked ten times a second, each on a new connection as a kubelet's."""

    def __init__(self, service: Service) -> None:
        self.service, self.seconds = service, list[tuple[float, float]]()
        self._stop = threading.Event()
        self._threads = list[threading.Thread]()

    def __enter__(self) -> HealthProbes:
        self._pacer = threading.Thread(target=self._pace)
        self._pacer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pacer.join()
        for thread in self._threads:
            thread.join()

    def _pace(self) -> None:
        while not self._stop.wait(0.1):
            thread = threading.Thread(target=self._probe)
            thread.start()
            self._threads.append(thread)

    def _probe(self) -> None:
        begin = time.monotonic()
        assert self.service.get("/health").status == 200
        self.seconds.append((begin, time.monotonic() - begin))

    def slowest(self, begin: float, end: float) -> float:
        """Of the probes begun between two moments of the monotonic clock."""
        return max(seconds for at, seconds in self.seconds if begin <= at < end)


# --- SQS ------------------------------------------------------------------------------------------


def test_healthy_day_acknowledges_and_queues_every_message(
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
    assert not load.failures


@pytest.mark.parametrize(
    ("code", "status"), [("InternalFailure", 500), ("ThrottlingException", 400)]
)
@pytest.mark.parametrize(("share", "served"), [(0.1, 0.998), (0.3, 0.97)])
def test_sqs_that_fails_a_share_of_calls_costs_few_requests_and_no_message(
    service: Service,
    fake: FakeAws,
    figures: Figures,
    full: bool,
    code: str,
    status: int,
    share: float,
    served: float,
) -> None:
    number = 20_000 if full else 400
    fault = {"kind": "error", "status": status, "code": code, "share": share}
    fake.set(faults={"SendMessage": fault, "SendMessageBatch": fault})
    with Load(service.port, requests=number) as load:
        load.wait()
    ledger = Ledger.of(fake, load)
    figures(f"{share:.0%} of SQS calls answer {status} {code}", ledger)
    assert set(ledger.statuses) <= {200, 503}
    assert ledger.statuses[200] / load.sent >= least(served, load.sent, full)
    assert not ledger.lost
    assert not ledger.twice
    assert not load.failures


def test_batch_entries_that_fail_fail_alone_and_no_other_is_sent_twice(
    start_service: StartService, fake: FakeAws, figures: Figures, full: bool
) -> None:
    number = 10_000 if full else 1000
    with start_service(**fake.environment(), **THROUGHPUT) as service:
        assert service.ask(post()).status == 200
        fake.forget()
        fault = {"kind": "fail_entries", "share": 0.1, "sender_fault": False}
        fake.set(faults={"SendMessageBatch": {**fault, "code": "InternalError"}})
        with Load(service.port, requests=number) as load:
            load.wait()
    ledger = Ledger.of(fake, load)
    figures("10% of batch entries fail", ledger)
    assert fake.calls("SendMessageBatch") > load.sent / 10, "entries were sent again, in batches"
    assert ledger.statuses[200] / load.sent >= least(0.998, load.sent, full)
    assert set(ledger.statuses) <= {200, 503}
    assert not ledger.lost
    assert ledger.twice == 0
    assert not load.failures


def test_sqs_that_hangs_is_refused_at_once_and_health_goes_on(
    start_service: StartService,
    fake: FakeAws,
    figures: Figures,
    full: bool,
    profile: dict[str, str],
) -> None:
    with (
        start_service(**fake.environment(), **profile) as service,
        HealthProbes(service) as health,
        Load(service.port) as load,
    ):
        time.sleep(1.5)
        down = time.monotonic()
        before = load.rate(down - 1, down)
        # Connections that are lost stay silent, also when SQS is back.
        fake.set(faults={"SQS": {"kind": "hang", "for_good": True}})
        time.sleep(30 if full else 6.5)
        up = time.monotonic()
        fake.set(faults={})
        time.sleep(2)
        back = time.monotonic()
        time.sleep(1)
        after = load.rate(back, time.monotonic())
    ledger = Ledger.of(fake, load)
    deadline = 4  # a call: 3 s for the answer, 1 s to connect
    refused = max(s for at, s, _ in load.answers if down + deadline < at - s and at < up)
    onset, later = health.slowest(down - 1, down + deadline), health.slowest(down + deadline, up)
    figures(
        "SQS hangs",
        ledger,
        f"503 within {refused:.2f} s; /health {onset:.1f} s at the onset, then {later:.2f} s; "
        f"{before:.0f} messages/s before, {after:.0f} from 2 s after",
    )
    assert refused < 1
    assert onset <= 6
    assert later <= 1
    assert not [status for at, s, status in load.answers if status != 200 and at - s >= back]
    assert after >= 0.5 * before  # what a second of a shared machine can tell
    assert set(ledger.statuses) == {200, 503}
    assert set(load.retry_after) == {str(app.RETRY_AFTER_SECONDS)}
    assert not ledger.lost
    assert not load.failures


def test_sqs_that_comes_back_slower_than_before_is_served_again(
    start_service: StartService, fake: FakeAws, figures: Figures, profile: dict[str, str]
) -> None:
    with start_service(**fake.environment(), **profile) as service, Load(service.port) as load:
        eventually(lambda: load.statuses[200] > 64)
        fake.set(faults={"SQS": {"kind": "hang"}})
        eventually(lambda: load.statuses[503] > 64)
        fake.set(faults={"SQS": {"kind": "delay", "seconds": 0.3}})
        back, before = time.monotonic(), load.statuses[200]
        eventually(lambda: load.statuses[200] > before + 64)
        seconds = time.monotonic() - back
        fake.set(faults={})
    ledger = Ledger.of(fake, load)
    figures("SQS hangs, then takes 0.3 s", ledger, f"64 served again after {seconds:.1f} s")
    assert not ledger.lost
    assert not load.failures


def test_single_calls_of_sqs_that_hang_refuse_nobody_else(
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
            time.sleep(30 if full else 6)
    ledger, answers = Ledger.of(fake, load), fake.counts()["answers"]
    hung = sum(count for name, count in answers.items() if name.endswith(" hang"))
    slow = sum(seconds > 2 for _, seconds, _ in load.answers)
    figures("1% of SQS calls hang", ledger, f"{hung} calls hung, {slow} answers took over 2 s")
    assert hung > 0
    assert set(ledger.statuses) <= {200, 503}
    if profile == THROUGHPUT:  # both threads of a worker may hang at once: then SQS counts as down
        assert slow <= hung * app.Publisher.MAX_ENTRIES
        # Twice in a row, with three seconds each, is more than a message has.
        assert ledger.statuses[200] / load.sent >= 0.998
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
            time.sleep(0.2)
            fake.set(faults={"SQS": fault})
            time.sleep(10 if full else 0.8)
            fake.set(faults={})
            back = time.monotonic()
            eventually(lambda load=load: load.rate(time.monotonic() - 0.3, time.monotonic()) > 20)
            seconds = time.monotonic() - back
        ledger = Ledger.of(fake, load)
        figures(f"SQS {name}", ledger, f"{seconds:.1f} s until it serves again")
        assert set(ledger.statuses) <= {200, 503}
        assert not ledger.lost
        assert not load.failures
        assert seconds < 2
        # Only what may have been sent before, for all that is known, is sent again.
        assert ledger.twice == 0 or name in ("loses its answer", "answers garbage")


# --- SSM ------------------------------------------------------------------------------------------

SSM_FAULTS = {
    "hangs": {"kind": "hang"},
    "resets": {"kind": "reset"},
    "answers 500": {"kind": "error", "status": 500, "code": "InternalServerError"},
    "denies access": {"kind": "error", "status": 400, "code": "AccessDeniedException"},
    "answers garbage": {"kind": "garbage"},
}


def test_ssm_down_after_the_start_refuses_nobody(
    start_service: StartService, fake: FakeAws, figures: Figures, full: bool
) -> None:
    """Each fault lasts longer than the cache, so that every worker's is out of date."""
    with start_service(**fake.environment(), TOKEN_CACHE_SECONDS="1") as service:
        eventually(lambda: fake.calls("GetParameters") == 4)
        for name, fault in SSM_FAULTS.items():
            fake.set(faults={"SSM": fault})
            fake.forget()
            with Load(service.port, clients=16) as load:
                time.sleep(20 if full else 1.3)
            ledger = Ledger.of(fake, load)
            reads = fake.calls("GetParameters")
            figures(f"SSM {name} after the start", ledger, f"{reads} reads tried")
            assert set(ledger.statuses) == {200}
            assert not load.failures


class DownAfterOneRead:
    """An SSM that answers once."""

    def __init__(self) -> None:
        self.reads = 0

    def get_parameters(self, **_: object) -> dict[str, object]:
        self.reads += 1
        if self.reads > 1:
            raise ConnectionError
        return {"Parameters": [{"Value": TOKEN}]}


def test_ssm_down_for_an_hour_refuses_nobody(figures: Figures) -> None:
    tenths, ssm, accepted = 0, DownAfterOneRead(), 0
    store = app.TokenStore(ssm, (PARAMETER,), 60, lambda: tenths / 10)
    for tenths in range(36_000):  # noqa: B007 - the clock
        accepted += store.accepts(TOKEN)
    figures("SSM down for an hour", f"{accepted:,} of 36,000 accepted, {ssm.reads} reads")
    assert accepted == 36_000
    assert ssm.reads <= 1 + 3600 / app.TokenStore.READ_INTERVAL


def test_ssm_down_at_the_start_is_not_ready_and_recovers_by_itself(
    start_service: StartService, fake: FakeAws, figures: Figures
) -> None:
    fake.set(faults={"SSM": SSM_FAULTS["denies access"]})
    settings = {"TOKEN_CACHE_SECONDS": "1", "GUNICORN_WORKERS": "1"}
    with start_service(**fake.environment(), **settings) as service:
        ready = service.get("/ready")
        assert ready.status == 503
        assert "ssm:GetParameters failed: AccessDeniedException" in ready.json["message"]
        assert service.ask(post()).error == "token_store_unavailable"
        assert service.get("/health").status == 200
        assert service.metrics()[TOKEN_READ] == 0
        fake.set(faults={})
        begin = time.monotonic()
        eventually(lambda: service.ask(post()).status == 200)
        seconds = time.monotonic() - begin
        assert service.metrics()[TOKEN_READ] > time.time() - WAIT
        assert service.get("/ready").status == 200
        fake.set(faults={"*": {"kind": "hang"}})
        assert service.get("/ready").status == 200, "never turns back"
    figures("SSM down at the start", f"served {seconds:.1f} s after it came back")
    assert seconds < 3


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


def test_credentials_that_do_not_come_hold_no_request_for_long(
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
            "GUNICORN_WORKERS": "1",
        }
        try:
            with start_service(**{**fake.environment(), **irsa}) as service:
                begin = time.monotonic()
                assert service.ask(post()).error == "token_store_unavailable"
                seconds = time.monotonic() - begin
                assert service.get("/health").status == 200
                sts.answers.set()
                eventually(lambda: service.ask(post()).status == 200)
        finally:
            sts.shutdown()
            thread.join()
    figures("STS hangs", f"503 after {seconds:.1f} s")
    assert seconds < 10


def test_queue_that_hangs_at_the_start_is_refused_to_all_at_once(
    start_service: StartService, fake: FakeAws, figures: Figures, profile: dict[str, str]
) -> None:
    fake.set(faults={"SQS": {"kind": "hang"}})
    with start_service(**fake.environment(), **profile) as service:
        with Load(service.port, requests=64) as load:
            load.wait()
        slowest = max(seconds for _, seconds, _ in load.answers)
        fake.set(faults={})
        eventually(lambda: service.ask(post()).status == 200)
    figures("SQS hangs at the start", f"503 to all within {slowest:.1f} s")
    assert set(load.statuses) == {503}
    assert slowest < 12  # two calls one after the other take 8 s; and this machine may be busy


def test_queue_out_of_reach_at_the_start_is_not_ready_and_names_the_call(
    start_service: StartService, fake: FakeAws
) -> None:
    fake.set(faults={"GetQueueAttributes": SQS_FAULTS["denies access"]})
    with start_service(**fake.environment(), GUNICORN_WORKERS="1") as service:
        ready = service.get("/ready")
        assert (ready.status, ready.error) == (503, "queue_unavailable")
        assert "sqs:GetQueueAttributes failed: AccessDenied" in ready.json["message"]
        assert service.ask(post()).error == "queue_unavailable"
        fake.set(faults={})
        eventually(lambda: service.get("/ready").status == 200)
        assert service.ask(post()).status == 200


def test_rotated_token_works_at_once_and_the_old_one_ends_within_the_cache_age(
    start_service: StartService, fake: FakeAws, figures: Figures
) -> None:
    settings = {"TOKEN_CACHE_SECONDS": "2"}
    with start_service(**fake.environment(), **settings) as service:
        eventually(lambda: service.metrics()[TOKENS_READ] == 4)
        time.sleep(2.2)  # a worker asks at most once in 2 s
        fake.set(parameters={PARAMETER: "the new one"})
        rotated = time.monotonic()
        new = [service.ask(post(with_token("the new one"))).status for _ in range(20)]
        seconds = []
        for _ in range(20):  # until each worker has seen it
            while service.ask(post()).status == 200:
                time.sleep(0.02)
            seconds.append(time.monotonic() - rotated)
    figures("token rotated", f"new: {new.count(200)} of 20; old: refused after {seconds[-1]:.1f} s")
    assert new == [200] * 20
    assert seconds[-1] < 2 + 1


def test_rotation_with_two_parameters_refuses_nobody(
    start_service: StartService, fake: FakeAws, figures: Figures
) -> None:
    names = {"TOKEN_SSM_PARAMETER": "/token/a,/token/b", "TOKEN_CACHE_SECONDS": "1"}
    fake.set(parameters={"/token/a": TOKEN, "/token/b": "unused"})
    with start_service(**{**fake.environment(), **names}) as service:
        with Load(service.port, clients=8) as old:
            time.sleep(1.2)
            fake.set(parameters={"/token/a": TOKEN, "/token/b": "the new one"})
            time.sleep(1.5)
            with Load(service.port, clients=8, body=with_token("the new one")) as new:
                time.sleep(0.5)
                old.stop()
                fake.set(parameters={"/token/a": "gone", "/token/b": "the new one"})
                time.sleep(1.5)
        eventually(lambda: service.ask(post()).status == 401)
    ledger = Ledger.of(fake, old, new)
    figures("token rotated with two parameters", ledger)
    assert set(ledger.statuses) == {200}
    assert not ledger.lost


def test_flood_of_wrong_tokens_leaves_ssm_and_the_right_ones_alone(
    service: Service, fake: FakeAws, figures: Figures, full: bool
) -> None:
    seconds = 10 if full else 3
    with (
        Load(service.port, clients=32, body=with_token("wrong")) as flood,
        Load(service.port, clients=4) as right,
    ):
        time.sleep(seconds)
    reads = fake.calls("GetParameters")
    figures(
        "flood of wrong tokens",
        Ledger.of(fake, right),
        f"{flood.sent / seconds:,.0f} wrong ones/s, {reads / seconds:.1f} reads of SSM/s",
    )
    assert set(flood.statuses) == {401}
    assert set(right.statuses) == {200}
    assert not flood.failures + right.failures
    assert reads <= 2 * seconds


# --- Clients --------------------------------------------------------------------------------------


@pytest.mark.parametrize("framing", ["Content-Length: 1000", "Transfer-Encoding: chunked"])
def test_slow_bodies_hold_their_threads_no_longer_than_the_deadline(
    start_service: StartService, fake: FakeAws, figures: Figures, framing: str
) -> None:
    """24 that stall and 24 that trickle, against 8 threads, however the workers share them."""
    deadline, part = 1.0, b"1\r\nx\r\n" if "chunked" in framing else b"x"
    settings = {"BODY_TIMEOUT_SECONDS": str(deadline)}
    with start_service(**fake.environment(), **settings) as service, ExitStack() as stack:
        slow = [stack.enter_context(service.connect()) for _ in range(48)]
        begin, done = time.monotonic(), threading.Event()
        for client in slow:
            client.send(post_head(framing))

        def feed() -> None:
            while not done.wait(0.1):
                for client in slow[:24]:
                    try:
                        client.sock.sendall(part)
                    except OSError:
                        continue  # answered and closed already

        feeder = threading.Thread(target=feed)
        feeder.start()
        try:
            time.sleep(0.1)
            with Load(service.port, clients=40, requests=400) as others:
                others.wait()
            served = time.monotonic() - begin
            answers = [client.answer() for client in slow]
            gone = time.monotonic() - begin
        finally:
            done.set()
            feeder.join()
    figures(
        f"24 stalled and 24 trickling bodies, {framing.split(':')[0]}",
        f"deadline {deadline:.0f} s: the last of 40 other clients served after {served:.1f} s, "
        f"all slow ones gone after {gone:.1f} s",
    )
    assert {(answer.status, answer.error) for answer in answers} == {(408, "request_timeout")}
    assert others.statuses == {200: others.sent}
    assert served < 3 * deadline + 2
    assert gone < 3 * deadline + 2


def test_slow_readers_hold_no_thread_and_are_closed(
    start_service: StartService, fake: FakeAws, figures: Figures
) -> None:
    variables = {"BODY_TIMEOUT_SECONDS": "1", "GUNICORN_WORKERS": "1", "GUNICORN_THREADS": "1"}
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
                time.sleep(0.7)
                seconds.append(service.stop())
                load.stop()
        loads.append(load)
    ledger = Ledger.of(fake, *loads)
    figures("SIGTERM under load", ledger, f"exit within {max(seconds):.1f} s")
    assert set(ledger.statuses) == {200}
    assert not ledger.lost
    assert max(seconds) < 25
    # Only connections that no worker had taken yet end without an answer.
    for failure in (failure for load in loads for failure in load.failures):
        assert failure.first
        assert failure.part == b""


def test_sigterm_after_new_connections_are_held_back_fails_nobody(
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
            time.sleep(0.7)
            load.hold_new_connections = True
            service.stop()
            load.wait(30)
        loads.append(load)
    ledger = Ledger.of(fake, *loads)
    figures("SIGTERM after new connections were held back", ledger)
    assert set(ledger.statuses) == {200}
    assert ledger.unanswered == 0
    assert ledger.acknowledged == ledger.in_queue == ledger.sent
    assert not ledger.lost


def test_killed_worker_loses_nothing_acknowledged_and_is_replaced(
    service: Service, fake: FakeAws, figures: Figures, full: bool
) -> None:
    with Load(service.port) as load:
        for _ in range(10 if full else 2):
            time.sleep(0.7)
            victim = random.choice(service.workers())
            kill(victim)
            eventually(lambda v=victim: len({*service.workers()} - {v}) == 4)
        since = time.monotonic()
        time.sleep(0.7)
        assert load.rate(since, time.monotonic()) > 0
    ledger = Ledger.of(fake, load)
    figures("worker killed under load", ledger)
    assert set(ledger.statuses) == {200}
    assert not ledger.lost
    assert ledger.in_queue >= ledger.acknowledged


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


def test_counters_never_fall_while_workers_are_killed_and_agree_with_the_clients(
    service: Service, figures: Figures, full: bool
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
            time.sleep(0.5)
            # The newest twice, so that its counts and its predecessor's must stay; then the oldest.
            victim = service.workers()[0 if number % 3 == 2 else -1]
            kill(victim)
            eventually(lambda v=victim: len({*service.workers()} - {v}) == 4)
        time.sleep(0.5)
    after = service.metrics()
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
        "counters while workers are killed",
        f"{ok:,} x 200 and {denied:,} x 401 answered, {broken + also_broken} unanswered, "
        f"{grown[DURATIONS]:,.0f} counted; {scrapes.answered} scrapes, {len(scrapes.fallen)} falls",
    )
    assert not scrapes.fallen
    assert scrapes.answered > 2 * kills
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


def test_fuzzed_requests_get_no_500_and_end_no_worker(
    service: Service, figures: Figures, full: bool
) -> None:
    number, seconds, seed = (100_000, 900, 7) if full else (2000, 10, 7)
    end, statuses, lock = time.monotonic() + seconds, dict[str, int](), threading.Lock()
    before = service.workers()

    def send(chance: random.Random, share: int) -> None:
        for _ in range(share):
            if time.monotonic() > end:
                return
            with service.connect() as client:
                client.send(fuzzed(chance))
                client.sock.shutdown(socket.SHUT_WR)  # nothing more will come
                received = b""
                while part := client.sock.recv(65536):  # within 15 s, or the test fails
                    received += part
            with lock:
                status = received[9:12].decode()
                statuses[status] = statuses.get(status, 0) + 1

    failed: list[BaseException] = []

    def run(index: int) -> None:
        try:
            send(random.Random(seed * 100 + index), number // 8)
        except BaseException as error:  # shown by the test
            failed.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counted = ", ".join(f"{n:,} x {status or 'closed'}" for status, n in sorted(statuses.items()))
    figures("fuzzed requests", f"{sum(statuses.values()):,} sent; {counted}")
    assert not failed
    assert not {status for status in statuses if status.startswith("5")}
    assert {"200", "400", "401", "404"} <= set(statuses)
    assert not full or sum(statuses.values()) == number
    assert service.workers() == before
