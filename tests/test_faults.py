"""Failure modes: real workers, an AWS that fails on command, clients that check every response.

Each test takes seconds; `--full` runs its long form. The figures are printed at the end of the run;
docs/reliability.md has those of a full one. No verdict depends on the speed of a machine: each step
waits for the previous step.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import select
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from client import BODY, chunk, post, post_head, request_head
from fake_aws import PARAMETER, TOKEN, FakeAws
from load import Load, LoadReport
from name_server import NameServer
from service import ServiceProcess, StartService, eventually, kill

pytestmark = pytest.mark.slow

ONE_WORKER = {"GUNICORN_WORKERS": "1"}
SHORT_CACHE = {"TOKEN_CACHE_SECONDS": "1"}
CALL_TIMEOUT = 3.0  # seconds
TOKEN_READ = "email_processor_token_read_timestamp_seconds"
NEW_TOKEN = "the new token"
Figures = Callable[..., None]
Check = Callable[..., LoadReport]


@pytest.fixture
def check_load(fake_aws: FakeAws, figures: Figures) -> Check:
    """Assert that every request got one of the statuses, and no acknowledged message is lost."""

    def check(title: str, *loads: Load, statuses: set[int], notes: str = "") -> LoadReport:
        report = LoadReport.of(fake_aws, *loads)
        figures(title, *filter(None, (report, notes)))
        assert set(report.statuses) <= statuses
        assert not report.lost
        assert not [failure for load in loads for failure in load.failures]
        return report

    return check


@pytest.fixture(scope="module")
def shared_service(start_service: StartService) -> Iterator[ServiceProcess]:
    """The process behind `service`."""
    with start_service() as service:
        yield service


@pytest.fixture
def service(shared_service: ServiceProcess, fake_aws: FakeAws) -> ServiceProcess:
    """The defaults: 4 workers with 2 threads each, all of them ready."""
    eventually(lambda: len(shared_service.workers()) == 4)
    eventually(lambda: {shared_service.request(post()).status for _ in range(8)} == {200})
    fake_aws.forget()
    return shared_service


def body_with(token: str) -> bytes:
    return BODY.replace(json.dumps(TOKEN).encode(), json.dumps(token).encode())


def sends(fake_aws: FakeAws) -> int:
    return fake_aws.calls("SendMessage") + fake_aws.calls("SendMessageBatch")


def seconds_of_health(service: ServiceProcess, times: int = 1) -> float:
    """The longest of several requests for /health, each on a new connection as a probe makes it."""
    longest = 0.0
    for _ in range(times):
        begin = time.monotonic()
        assert service.get("/health").status == 200
        longest = max(longest, time.monotonic() - begin)
    assert longest < CALL_TIMEOUT, "/health waits for a call of AWS"
    return longest


# --- SQS ------------------------------------------------------------------------------------------


def test_every_message_is_queued_while_aws_works(
    start_service: StartService, check_load: Check, full: bool
) -> None:
    number = 10_000 if full else 600
    with start_service() as service, Load(service.port, requests=number) as load:
        load.wait()
    report = check_load("healthy", load, statuses={200})
    assert load.sent >= number
    assert report.acknowledged == report.in_queue == load.sent


def test_sqs_that_fails_a_share_of_calls_loses_no_message(
    service: ServiceProcess, fake_aws: FakeAws, check_load: Check, full: bool
) -> None:
    for share, served, status, code in (
        (0.1, 0.998, 500, "InternalFailure"),
        (0.3, 0.97, 400, "ThrottlingException"),
    ):
        fake_aws.forget()
        fault = {"kind": "error", "status": status, "code": code, "share": share}
        fake_aws.set(faults={"SendMessage": fault, "SendMessageBatch": fault})
        with Load(service.port, requests=20_000 if full else 400) as load:
            load.wait()
        title = f"{share:.0%} of SQS calls fail with {status} {code}"
        report = check_load(title, load, statuses={200, 503})
        assert report.statuses[200] / load.sent >= served - (0 if full else 0.05)  # by chance
        assert not report.twice


def test_failed_batch_entries_are_the_only_ones_to_fail(
    start_service: StartService, fake_aws: FakeAws, check_load: Check, full: bool
) -> None:
    fake_aws.set(faults={"SendMessageBatch": {"kind": "fail_entries", "share": 0.1}})
    with start_service() as service, Load(service.port, requests=10_000 if full else 1000) as load:
        load.wait()
    report = check_load("10% of batch entries fail", load, statuses={200, 503})
    assert max(message["batch_size"] for message in fake_aws.messages()) > 1
    assert report.statuses[200] / load.sent >= 0.998 - (0 if full else 0.05)
    assert not report.twice


def test_sqs_that_hangs_opens_the_circuit(
    start_service: StartService, fake_aws: FakeAws, check_load: Check, full: bool
) -> None:
    """At first it hangs; then it is back but slow; then it is as before."""
    with start_service() as service, Load(service.port) as load:
        load.wait_for(64)
        # "for_good": lost connections stay silent, also when SQS is back.
        fake_aws.set(faults={"SQS": {"kind": "hang", "for_good": True}})
        eventually(fake_aws.hung)
        onset = seconds_of_health(service)
        load.wait_for(64, 503)  # the first calls have timed out
        if full:
            time.sleep(20)
        calls, rejected, circuit_is_open = sends(fake_aws), load.statuses[503], time.monotonic()
        load.wait_for(1500, 503)
        health, end = seconds_of_health(service), time.monotonic()
        calls, rejected = sends(fake_aws) - calls, load.statuses[503] - rejected
        fake_aws.set(faults={"SQS": {"kind": "delay", "seconds": 0.3}})
        load.wait_for(64)
        served = time.monotonic() - end
        fake_aws.set(faults={})
        eventually(lambda: {status for _, _, status in load.responses[-128:]} == {200})
    waited = max(s for at, s, _ in load.responses if circuit_is_open < at - s and at < end)
    notes = (
        f"/health after {onset:.1f} s at the onset, then {health:.1f} s; then 503 within "
        f"{waited:.2f} s, {rejected} of them with {calls} calls; with 0.3 s a call 64 served after "
        f"{served:.1f} s"
    )
    check_load("SQS hangs", load, statuses={200, 503}, notes=notes)
    assert rejected > 12 * calls, "that many calls of ten messages would carry them all"


def test_single_calls_that_hang_delay_no_other_message(
    start_service: StartService, fake_aws: FakeAws, check_load: Check, full: bool
) -> None:
    with start_service() as service:
        eventually(lambda: service.request(post()).status == 200)
        fake_aws.forget()
        fault = {"kind": "hang", "share": 0.01}
        fake_aws.set(faults={"SendMessage": fault, "SendMessageBatch": fault})
        with Load(service.port) as load:
            eventually(lambda: fake_aws.hung() >= (30 if full else 3))
    slow = sum(seconds > 2 for _, seconds, _ in load.responses)
    notes = f"{fake_aws.hung()} calls hung, {slow} responses took over 2 s"
    report = check_load("1% of SQS calls hang", load, statuses={200, 503}, notes=notes)
    # A worker has two calls in flight. When both hang, SQS is down for its other messages.
    assert report.statuses[200] / load.sent >= 0.9


NO_QUEUE = "AWS.SimpleQueueService.NonExistentQueue"
DENIED = {"kind": "error", "status": 403, "code": "AccessDenied"}
SQS_FAULTS = {
    "resets connections": {"kind": "reset"},
    "loses responses": {"kind": "lost_response"},
    "sends garbage": {"kind": "garbage"},
    "rejects expired credentials": {"kind": "error", "status": 403, "code": "ExpiredToken"},
    "denies access": DENIED,
    "has no such queue": {"kind": "error", "status": 400, "code": NO_QUEUE},
    "takes 1 s": {"kind": "delay", "seconds": 1},
}


def test_sqs_that_fails_for_a_while_loses_no_message(
    service: ServiceProcess, fake_aws: FakeAws, check_load: Check, full: bool
) -> None:
    for name, fault in SQS_FAULTS.items():
        fake_aws.forget()
        with Load(service.port, clients=16) as load:
            load.wait_for(16)
            fake_aws.set(faults={"SQS": fault})
            load.wait_for(16, 200 if fault["kind"] == "delay" else 503)
            if full:
                time.sleep(10)
            fake_aws.set(faults={})
            back = time.monotonic()
            load.wait_for(32)
            notes = f"{time.monotonic() - back:.1f} s until 32 are served again"
        report = check_load(f"SQS {name}", load, statuses={200, 503}, notes=notes)
        # A message is sent again only if its first call may have failed.
        assert report.twice == 0 or fault["kind"] in ("lost_response", "garbage")


def test_silent_name_servers_open_the_circuit(
    start_service: StartService, fake_aws: FakeAws, check_load: Check, tmp_path: Path
) -> None:
    name_server = NameServer(tmp_path)
    endpoint = f"http://aws.email-processor.test:{fake_aws.url.rpartition(':')[2]}"
    service = start_service(AWS_ENDPOINT_URL=endpoint)
    service.command = [*name_server.command, *service.command]
    with name_server, service, Load(service.port) as load:
        load.wait_for(64)
        name_server.silent = True
        fake_aws.set(faults={"*": {"kind": "reset"}})  # so that new connections must be made
        begin = time.monotonic()
        load.wait_for(1, 503)
        first = time.monotonic() - begin
        eventually(lambda: any("SQS is down" in line["message"] for line in service.log()))
        health = seconds_of_health(service)
        load.wait_for(1500, 503)
        fake_aws.set(faults={})
        assert service.get("/health").status == 200
        name_server.silent = False
        back = time.monotonic()
        load.wait_for(64)
        served = time.monotonic() - back
    notes = f"first 503 after {first:.1f} s, /health {health:.1f} s; 64 served {served:.1f} s later"
    check_load("name servers silent", load, statuses={200, 503}, notes=notes)


def test_queue_that_hangs_at_the_start_is_503_for_all(
    start_service: StartService, fake_aws: FakeAws, figures: Figures
) -> None:
    fake_aws.set(faults={"SQS": {"kind": "hang"}})
    with start_service() as service:
        with Load(service.port, requests=64) as load:
            load.wait()
        calls, slowest = sends(fake_aws), max(seconds for _, seconds, _ in load.responses)
        fake_aws.set(faults={})
        eventually(lambda: service.request(post()).status == 200)
    figures("SQS hangs at the start", f"503 to all within {slowest:.1f} s, after {calls} calls")
    assert load.statuses == {503: 64}
    assert calls <= 32, "most messages are rejected without a call for them"


@pytest.mark.parametrize(
    ("operation", "error"),
    [("GetParameters", "token_store_unavailable"), ("GetQueueAttributes", "queue_unavailable")],
)
def test_unreachable_aws_is_named_by_ready(
    start_service: StartService, fake_aws: FakeAws, figures: Figures, operation: str, error: str
) -> None:
    fake_aws.set(faults={operation: DENIED})
    with start_service(**ONE_WORKER, **SHORT_CACHE) as service:
        failed = f"{operation} failed: AccessDenied"
        eventually(lambda: failed in service.get("/ready").json.get("message", ""))
        eventually(lambda: service.get("/ready").error == error)
        # Messages are sent although the queue's limit is not known.
        response = service.request(post())
        assert response.status == 200 or response.error == error == "token_store_unavailable"
        assert service.get("/health").status == 200
        assert bool(service.metrics()[TOKEN_READ]) == (operation != "GetParameters")
        fake_aws.set(faults={})
        begin = time.monotonic()
        eventually(lambda: service.request(post()).status == 200)
        eventually(lambda: service.get("/ready").status == 200)
        seconds = time.monotonic() - begin
        fake_aws.set(faults={"*": {"kind": "hang"}})
        assert service.get("/ready").status == 200, "once ready, always ready"
    figures(f"{operation} denied at the start", f"served {seconds:.1f} s after it was allowed")


# --- SSM and STS ----------------------------------------------------------------------------------

SSM_FAULTS = {
    "hangs": {"kind": "hang"},
    "denies access": DENIED,
    "resets connections": {"kind": "reset"},
    "fails with 500": {"kind": "error", "status": 500, "code": "InternalServerError"},
    "sends garbage": {"kind": "garbage"},
}


def test_last_known_token_works_while_ssm_is_down(
    start_service: StartService, fake_aws: FakeAws, check_load: Check, full: bool
) -> None:
    """Each fault lasts until the cache has expired, and the worker has tried to read again."""
    with start_service(**ONE_WORKER, **SHORT_CACHE) as service:
        eventually(lambda: fake_aws.calls("GetParameters") >= 1)
        for name, fault in list(SSM_FAULTS.items())[: None if full else 2]:
            fake_aws.set(faults={"SSM": fault})
            fake_aws.forget()
            with Load(service.port, clients=16) as load:
                eventually(lambda: fake_aws.calls("GetParameters") > 0)
                load.wait_for(64)
                if full:
                    time.sleep(20)
            notes = f"{fake_aws.calls('GetParameters')} reads tried"
            check_load(f"SSM {name} after the start", load, statuses={200}, notes=notes)


def test_missing_credentials_are_503_in_time(
    start_service: StartService, fake_aws: FakeAws, figures: Figures, tmp_path: Path
) -> None:
    identity = tmp_path / "token"
    identity.write_text("of the service account")
    irsa = {
        "AWS_ACCESS_KEY_ID": "",
        "AWS_SECRET_ACCESS_KEY": "",
        "AWS_ROLE_ARN": "arn:aws:iam::000000000000:role/email-processor-role",
        "AWS_WEB_IDENTITY_TOKEN_FILE": str(identity),
    }
    fake_aws.set(faults={"STS": {"kind": "hang"}})
    with start_service(**ONE_WORKER, **SHORT_CACHE, **irsa) as service, service.connect() as client:
        begin = time.monotonic()
        client.send(post())
        health = seconds_of_health(service)
        assert client.response().error == "token_store_unavailable"
        seconds = time.monotonic() - begin
        fake_aws.set(faults={})
        eventually(lambda: service.request(post()).status == 200)
    figures("STS hangs", f"503 after {seconds:.1f} s, /health after {health:.2f} s")


def test_rotated_token_works_at_once(
    start_service: StartService, fake_aws: FakeAws, figures: Figures
) -> None:
    with start_service(**SHORT_CACHE) as service:
        eventually(lambda: fake_aws.calls("GetParameters") >= 4)
        time.sleep(1.2)  # a worker reads at most once a second
        fake_aws.set(parameters={PARAMETER: NEW_TOKEN})
        rotated = time.monotonic()
        new = [service.request(post(body_with(NEW_TOKEN))).status for _ in range(20)]
        for _ in range(20):  # until every worker has dropped the old token
            eventually(lambda: service.request(post()).status == 401)
        seconds = time.monotonic() - rotated
    figures("token rotated", f"new: {new.count(200)} of 20; old: rejected after {seconds:.1f} s")
    assert new == [200] * 20


def test_rotation_with_two_parameters_rejects_no_request(
    start_service: StartService, fake_aws: FakeAws, check_load: Check
) -> None:
    names = {"TOKEN_SSM_PARAMETER": "/token/a,/token/b"}
    fake_aws.set(parameters={"/token/a": TOKEN, "/token/b": "unused"})
    with (
        start_service(**ONE_WORKER, **SHORT_CACHE, **names) as service,
        Load(service.port, clients=8) as old,
    ):
        old.wait_for(8)
        fake_aws.set(parameters={"/token/a": TOKEN, "/token/b": NEW_TOKEN})
        eventually(lambda: service.request(post(body_with(NEW_TOKEN))).status == 200)
        with Load(service.port, clients=8, body=body_with(NEW_TOKEN)) as new:
            new.wait_for(64)
            old.stop()
            fake_aws.set(parameters={"/token/a": "gone", "/token/b": NEW_TOKEN})
            eventually(lambda: service.request(post()).status == 401)
            new.wait_for(64)
    check_load("token rotated with two parameters", old, new, statuses={200})


def test_flood_of_wrong_tokens_does_not_reach_ssm(
    service: ServiceProcess, fake_aws: FakeAws, check_load: Check, full: bool
) -> None:
    begin = time.monotonic()
    with (
        Load(service.port, clients=32, body=body_with("wrong")) as flood,
        Load(service.port, clients=4) as right,
    ):
        flood.wait_for(20_000 if full else 1000, 401)
        right.wait_for(64)
    reads, seconds = fake_aws.calls("GetParameters"), time.monotonic() - begin
    notes = f"{flood.sent / seconds:,.0f} wrong tokens/s, {reads / seconds:.1f} reads of SSM/s"
    check_load("flood of wrong tokens", right, statuses={200}, notes=notes)
    assert set(flood.statuses) == {401}
    assert not flood.failures
    assert reads <= 4 * (1 + seconds / 5), "4 workers, each reads every five seconds at most"


# --- Clients --------------------------------------------------------------------------------------

STALLED = {
    "a length": post_head("Content-Length: 1000") + BODY,
    "chunks": post_head("Transfer-Encoding: chunked") + chunk(BODY),
    "a chunk's size": post_head("Transfer-Encoding: chunked") + b"f",
    "trailers": post_head("Transfer-Encoding: chunked") + chunk(BODY) + b"0\r\nName: ",
}


def test_hundreds_of_stalled_bodies_delay_no_other_client(
    start_service: StartService, check_load: Check, full: bool
) -> None:
    number = 200 if full else 75  # of each kind
    with start_service(BODY_TIMEOUT_SECONDS="60") as service, ExitStack() as stack:
        stalled = [
            stack.enter_context(service.connect()).send(part)
            for part in [*STALLED.values()] * number
        ]
        with Load(service.port, requests=20_000 if full else 1000) as others:
            health = seconds_of_health(service, times=20)
            others.wait()
        assert select.select([client.sock for client in stalled], [], [], 0)[0] == []
    notes = f"/health within {health:.2f} s"
    check_load(f"{number * len(STALLED)} stalled bodies", others, statuses={200}, notes=notes)


def test_overload_loses_no_message_and_delays_no_probe(
    start_service: StartService, check_load: Check, full: bool
) -> None:
    """Many more clients than a pod can serve, none of which pauses."""
    clients, requests = (500, 50_000) if full else (250, 3000)
    with start_service() as service, Load(service.port, clients, requests) as load:
        load.wait_for(clients)
        health = seconds_of_health(service, times=20)
        load.wait()
    notes = f"/health within {health:.2f} s beside {clients} clients"
    report = check_load("overload", load, statuses={200, 503}, notes=notes)
    assert report.in_queue == report.acknowledged


def test_slow_readers_hold_no_thread_and_are_closed(
    start_service: StartService, figures: Figures
) -> None:
    page = request_head("GET", "/docs/swagger-ui-bundle.js")
    variables = {"BODY_TIMEOUT_SECONDS": "1", "GUNICORN_THREADS": "1"}
    with start_service(**ONE_WORKER, **variables) as service, service.connect(buffer=4096) as slow:
        assert slow.send(page).sock.recv(2048).startswith(b"HTTP/1.1 200")
        begin = time.monotonic()
        complete = len(service.request(page).body)
        others = time.monotonic() - begin
        received = 0
        with suppress(ConnectionResetError):
            while part := slow.sock.recv(2048):
                received += len(part)
                time.sleep(0.05)
        seconds = time.monotonic() - begin
    figures("slow reader", f"deadline 2 s: closed after {seconds:.1f} s, others {others:.2f} s")
    assert received < complete
    assert seconds > 1.5


# --- Processes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("held_back", [False, True], ids=["at once", "after preStop"])
def test_sigterm_under_load_serves_every_accepted_request(
    start_service: StartService, fake_aws: FakeAws, figures: Figures, full: bool, held_back: bool
) -> None:
    """In the cluster, the pod leaves the load balancer, and the preStop sleep passes, before."""
    loads, seconds = [], []
    for _ in range(10 if full else 1):
        with start_service() as service, Load(service.port, hold_new_connections=held_back) as load:
            load.wait_for(128)
            seconds.append(service.stop())
        loads.append(load)
    report = LoadReport.of(fake_aws, *loads)
    title = f"SIGTERM under load{' after new connections were held back' * held_back}"
    figures(title, report, f"exit within {max(seconds):.1f} s")
    assert set(report.statuses) == {200}
    assert not report.lost
    assert max(seconds) < 25, "Gunicorn had to kill its workers"
    # Only connections that no worker had accepted end without a response.
    failures = [failure for load in loads for failure in load.failures]
    assert not held_back or not failures
    assert all(failure.first and failure.part == b"" for failure in failures)


RESPONSES = "email_processor_request_duration_seconds_count"  # of POST /process
MESSAGES = "email_processor_sqs_batch_size_sum"


def test_killed_workers_lose_no_message_and_no_count(
    service: ServiceProcess, fake_aws: FakeAws, figures: Figures, full: bool
) -> None:
    """Every response that a client got is counted. A request in flight in a killed worker may be
    counted or not.
    """
    kills, scrapes = 10 if full else 3, [service.metrics()]
    with (
        Load(service.port, clients=32) as right,
        Load(service.port, clients=4, body=body_with("wrong")) as wrong,
    ):
        for number in range(kills):
            right.wait_for(64)
            # The newest worker twice, so that its predecessor's counts must stay; then the oldest.
            victim = service.workers()[0 if number % 3 == 2 else -1]
            kill(victim)
            with suppress(OSError, AssertionError):  # a connection of the killed worker
                scrapes.append(service.metrics())
            eventually(lambda v=victim: len({*service.workers()} - {v}) == 4)
            scrapes.append(service.metrics())
        right.wait_for(64)
    scrapes.append(service.metrics())
    report = LoadReport.of(fake_aws, right)
    ok, denied, failures = right.statuses[200], wrong.statuses[401], len(right.failures)
    counted = {name: scrapes[-1][name] - scrapes[0][name] for name in (RESPONSES, MESSAGES)}
    decreased = [
        name
        for before, after in itertools.pairwise(scrapes)
        for name in before
        if re.search(r"_(total|count|sum|bucket)", name) and after[name] < before[name]
    ]
    figures(
        f"{kills} workers killed",
        report,
        f"{ok:,} x 200 and {denied:,} x 401, {failures + len(wrong.failures)} without a response, "
        f"{counted[RESPONSES]:,.0f} counted",
    )
    assert not report.lost
    assert decreased == []
    assert set(right.statuses) | set(wrong.statuses) == {200, 401}
    assert ok <= counted[MESSAGES] <= ok + failures
    assert ok + denied <= counted[RESPONSES] <= ok + denied + failures + len(wrong.failures)


# --- Arbitrary input ------------------------------------------------------------------------------

JUNK = [b"\0", b"\xff", b"\r\n", b"\n", b" ", b":", b"{", b"}", b'"', b"9" * 30, b"%", b"\\ud800"]
VALID = [
    post(BODY, "X-Amzn-Trace-Id: Root=1", "Idempotency-Key: k"),
    post(b"{}", "Connection: close"),
    post_head("Transfer-Encoding: chunked") + chunk(BODY) + chunk(b""),
    request_head("GET", "/health", "Connection: Upgrade", "Upgrade: websocket"),
    request_head("PUT", "/nowhere"),
]


def damaged(chance: random.Random) -> bytes:
    """A valid request with up to three pieces of junk in it."""
    request = chance.choice(VALID)
    for _ in range(chance.randrange(4)):
        start = chance.randrange(len(request) + 1)
        request = request[:start] + chance.choice(JUNK) + request[start + chance.randrange(4) :]
    return request


def test_damaged_requests_end_no_worker(
    service: ServiceProcess, figures: Figures, full: bool
) -> None:
    number, workers = 100_000 if full else 2000, service.workers()

    def send(seed: int) -> Counter[str]:
        chance, statuses = random.Random(seed), Counter[str]()
        for _ in range(number // 8):
            with service.connect() as client:
                client.send(damaged(chance)).sock.shutdown(socket.SHUT_WR)
                statuses[client.read_to_end()[9:12].decode()] += 1
        return statuses

    with ThreadPoolExecutor(8) as pool:
        statuses = sum(pool.map(send, range(700, 708)), Counter[str]())
    counted = ", ".join(f"{n:,} x {status or 'closed'}" for status, n in sorted(statuses.items()))
    figures("fuzzed requests", f"{statuses.total():,} sent; {counted}")
    assert not {status for status in statuses if status.startswith("5")}
    assert {"200", "400", "401", "404"} <= set(statuses)
    assert service.workers() == workers
