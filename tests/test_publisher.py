"""The publisher under any interleaving of messages, calls of SQS and failures.

Each call of SQS is held until the test ends it, and the clock moves when the test moves it. The
executor runs one task at a time, so each step happens in a known state.
"""

from __future__ import annotations

import json
import logging
import threading
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from types import SimpleNamespace
from typing import Any

import pytest
from botocore.exceptions import ClientError, ConnectTimeoutError, ReadTimeoutError
from fake_aws import message_bytes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY

import app

QUEUE_URL = "https://sqs.us-west-1.amazonaws.com/123456789012/dev-CP-queue"
LIMIT = app.Publisher.MAX_BYTES


def aws_error(code: str, status: int, text: str = "as AWS puts it") -> ClientError:
    response = {"Error": {"Code": code, "Message": text}}
    return ClientError({**response, "ResponseMetadata": {"HTTPStatusCode": status}}, "Send")


# How a call fails: its exception, and whether SQS has accepted the messages.
FAILURES: dict[str, tuple[Exception, bool]] = {
    "server error": (aws_error("InternalFailure", 500), False),
    "throttled": (aws_error("ThrottlingException", 400), False),
    "access denied": (aws_error("AccessDenied", 403), False),
    "no such queue": (aws_error("AWS.SimpleQueueService.NonExistentQueue", 400), False),
    "rejected": (aws_error("InvalidParameterValue", 400), False),
    "too large": (aws_error("InvalidParameterValue", 400, "must be shorter than 9 bytes"), False),
    "read timeout": (ReadTimeoutError(endpoint_url="https://aws.invalid"), False),
    "connect timeout": (ConnectTimeoutError(endpoint_url="https://aws.invalid"), False),
    "lost response": (ReadTimeoutError(endpoint_url="https://aws.invalid"), True),
    "garbled response": (KeyError("MessageId"), True),
}
# How an entry of a successful call ends.
ACCEPTED, SENDER_FAULT, BUSY, LEFT_OUT = "accepted", "SenderFault", "ServiceBusy", "left out"
WITHOUT_ID = "accepted, without a MessageId"
# The outcome of a message.
WAITING, SENT, UNAVAILABLE, TOO_LARGE = "waiting", "sent", "queue_unavailable", "message_too_large"


class StepExecutor(Executor):
    """Runs each task in a thread, one at a time: until it ends, or its call of SQS is held."""

    def __init__(self) -> None:
        self._submitted: deque[Callable[[], Any]] = deque()
        self._paused = threading.Semaphore(0)

    def submit(self, task: Any, /, *arguments: Any, **options: Any) -> Future[Any]:
        self._submitted.append(partial(task, *arguments, **options))
        return Future()

    def run_submitted(self) -> None:
        while self._submitted:
            task = self._submitted.popleft()
            threading.Thread(target=self._run, args=(task,), daemon=True).start()
            assert self._paused.acquire(timeout=60)

    def hold(self, call: Call) -> None:
        """In a task: wait until the test ends the call."""
        self._paused.release()
        assert call.ended.wait(60), "the test has not ended a call"

    def resume(self, call: Call) -> None:
        call.ended.set()
        assert self._paused.acquire(timeout=60)
        self.run_submitted()

    def _run(self, task: Callable[[], Any]) -> None:
        try:
            task()
        except Exception:
            logging.getLogger("executor").exception("task failed")
        finally:
            self._paused.release()


@dataclass(eq=False)
class Call:
    """SendMessage, or SendMessageBatch."""

    entries: list[dict[str, Any]]
    is_probe: bool  # made by the client with less time
    ended: threading.Event = field(default_factory=threading.Event)
    failure: str = ""
    results: list[str] = field(default_factory=list)  # of the entries; others are accepted

    @property
    def bodies(self) -> list[str]:
        return [entry["MessageBody"] for entry in self.entries]


class HeldSqs:
    """An SQS whose calls are in flight until the test ends them."""

    def __init__(self, executor: StepExecutor, limit: int | Exception) -> None:
        self._executor = executor
        self.limit, self.limit_reads = limit, 0
        self.in_flight: list[Call] = []
        self.calls: list[Call] = []
        self.accepted: list[tuple[str, str]] = []  # (body, MessageId)
        self.unreported: set[str] = set()  # accepted by a call that failed

    def get_queue_attributes(self, **_: Any) -> dict[str, Any]:
        self.limit_reads += 1
        if isinstance(self.limit, Exception):
            raise self.limit
        return {"Attributes": {"MaximumMessageSize": str(self.limit)}}

    def send_message(self, is_probe: bool = False, **entry: Any) -> dict[str, Any]:
        assert entry.pop("QueueUrl").startswith(QUEUE_URL)
        call = self._hold(Call([entry], is_probe))
        (result,) = call.results[:1] or [ACCEPTED]
        if result in (SENDER_FAULT, BUSY):
            raise aws_error("InvalidMessageContents", 400 if result == SENDER_FAULT else 503)
        return {} if result == LEFT_OUT else {"MessageId": self._accept(entry)}

    def send_message_batch(self, is_probe: bool = False, **batch: Any) -> dict[str, Any]:
        assert batch["QueueUrl"].startswith(QUEUE_URL)
        call = self._hold(Call(batch["Entries"], is_probe))
        response: dict[str, Any] = {"Successful": [], "Failed": []}
        results = call.results[: len(call.entries)]
        for entry, result in zip_longest(call.entries, results, fillvalue=ACCEPTED):
            if result == ACCEPTED:
                sent = {"Id": entry["Id"], "MessageId": self._accept(entry)}
                response["Successful"].insert(0, sent)
            elif result == WITHOUT_ID:
                response["Successful"].append({"Id": entry["Id"]})
            elif result != LEFT_OUT:
                failed = {"Id": entry["Id"], "SenderFault": result == SENDER_FAULT, "Code": result}
                response["Failed"].append(failed)
        return response

    def _hold(self, call: Call) -> Call:
        self.in_flight.append(call)
        self.calls.append(call)
        self._executor.hold(call)
        self.in_flight.remove(call)
        if call.failure:
            error, is_accepted = FAILURES[call.failure]
            for entry in call.entries if is_accepted else []:
                self.unreported.add(entry["MessageBody"])
                self._accept(entry)
            raise error
        return call

    def _accept(self, entry: dict[str, Any]) -> str:
        message_id = f"id-{len(self.accepted)}"
        self.accepted.append((entry["MessageBody"], message_id))
        return message_id


class Publishing:
    """A publisher, the messages that requests publish, and the calls of SQS."""

    def __init__(
        self,
        messages: int = 0,
        calls_in_flight: int = 1,
        fifo: bool = False,
        deadline: float = 60,
        limit: int | Exception = LIMIT,
    ) -> None:
        self.executor = StepExecutor()
        self.sqs = HeldSqs(self.executor, limit)
        self.now = 0.0
        self.clock: Callable[[], float] = lambda: self.now
        self.pause: Callable[[], object] = lambda: None
        probe = SimpleNamespace(
            send_message=partial(self.sqs.send_message, is_probe=True),
            send_message_batch=partial(self.sqs.send_message_batch, is_probe=True),
        )
        self.publisher = app.Publisher(
            self.sqs,
            probe,
            QUEUE_URL + (".fifo" if fifo else ""),
            calls_in_flight,
            self.executor,
            lambda: self.clock(),
            lambda _: self.pause(),
        )
        self.publisher.SECONDS = deadline  # type: ignore[misc]
        self.publisher.read_limit()
        self.futures: dict[str, Future[str]] = {}  # by the message's body
        self.publish(messages)

    def publish(self, count: int = 1, size: int = 2) -> None:
        for _ in range(count):
            number = len(self.futures)
            body = json.dumps(f"{number}".ljust(size - 2))
            try:
                future = self.publisher.publish(app.Message(body, request_id=f"request-{number}"))
            except app.ApiError as error:
                future = Future()
                future.set_exception(error)
            self.futures[body] = future
            self.executor.run_submitted()

    def end_call(
        self, number: int = 0, failure: str = "", results: list[str] | None = None
    ) -> None:
        """End a call in flight, by default the oldest."""
        call = self.sqs.in_flight[number]
        call.failure, call.results = failure, results or []
        self.executor.resume(call)

    def end_calls(self) -> None:
        while self.sqs.in_flight:
            self.end_call()

    @property
    def outcomes(self) -> list[str]:
        return [
            getattr(future.exception(), "code", SENT) if future.done() else WAITING
            for future in self.futures.values()
        ]

    def last_error(self) -> Any:
        return list(self.futures.values())[-1].exception(timeout=0)

    @property
    def call_sizes(self) -> list[int]:
        """Messages in each call so far."""
        return [len(call.entries) for call in self.sqs.calls]

    @property
    def probes(self) -> list[bool]:
        """Whether each call in flight is a probe."""
        return [call.is_probe for call in self.sqs.in_flight]


def batch_of(count: int) -> Publishing:
    """The first message has been sent; those that arrived during its call are in flight."""
    publishing = Publishing(1 + count)
    publishing.end_call()
    return publishing


def assert_promises(publishing: Publishing) -> None:
    """The invariants of any interleaving, once all calls have ended."""
    sqs, ids = publishing.sqs, dict[str, set[str]]()
    for body, message_id in sqs.accepted:
        ids.setdefault(body, set()).add(message_id)
    for body, future in publishing.futures.items():
        if future.exception(timeout=0) is None:
            assert future.result() in ids[body], "the id of another message"
        else:
            assert isinstance(future.exception(), app.ApiError)
        assert len(ids.get(body, ())) <= 1 or body in sqs.unreported, "sent twice"
    for call in sqs.calls:
        assert 1 <= len(call.entries) <= 10
        assert sum(map(message_bytes, call.entries)) <= LIMIT
        assert len(set(call.bodies)) == len(call.entries)
        if len(call.entries) > 1:
            assert len({entry["Id"] for entry in call.entries}) == len(call.entries)
    attempts = Counter(body for call in sqs.calls for body in call.bodies)
    assert max(attempts.values(), default=0) <= app.Publisher.ATTEMPTS


RESULTS = st.lists(st.sampled_from([ACCEPTED, SENDER_FAULT, BUSY, LEFT_OUT]), max_size=10)
STEPS = st.one_of(
    st.tuples(st.just("publish"), st.sampled_from([2, 2, 2, 2, 200_000, 500_000, LIMIT - 300])),
    st.tuples(st.just("succeed"), st.integers(0, 7)),
    st.tuples(st.just("fail"), st.integers(0, 7), st.sampled_from(sorted(FAILURES))),
    st.tuples(st.just("end entries"), st.integers(0, 7), RESULTS),
    st.tuples(st.just("time passes"), st.sampled_from([1.0, 100.0])),
)


@settings(
    derandomize=True,  # the same examples in every run
    database=None,
    deadline=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    steps=st.lists(STEPS, min_size=5, max_size=40),
    burst=st.sampled_from([0, 0, 3, 12, 25, 40]),
    calls_in_flight=st.sampled_from([1, 2, 8]),
    fifo=st.booleans(),
    deadline=st.sampled_from([60, 60, 60, 1.5, 0]),
)
def test_any_interleaving_keeps_every_promise(
    steps: list[Any], burst: int, calls_in_flight: int, fifo: bool, deadline: float
) -> None:
    publishing = Publishing(burst, calls_in_flight, fifo, deadline)
    for kind, *arguments in steps:
        in_flight = publishing.sqs.in_flight
        assert len(in_flight) <= (1 if fifo else calls_in_flight)
        if kind == "publish":
            publishing.publish(size=arguments[0])
        elif kind == "time passes":
            publishing.now += arguments[0]
        elif in_flight:
            number = arguments[0] % len(in_flight)
            if kind == "succeed":
                publishing.end_call(number)
            elif kind == "fail":
                publishing.end_call(number, failure=arguments[1])
            else:
                publishing.end_call(number, results=arguments[1])
    publishing.end_calls()
    assert_promises(publishing)
    publishing.publisher.SECONDS = 60  # type: ignore[misc]
    publishing.now += 1
    publishing.publish()
    publishing.end_calls()
    assert publishing.outcomes[-1] == SENT, "the publisher has stopped"


# --- Batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fifo", [False, True])
def test_messages_that_arrive_during_a_call_share_the_next_in_order(fifo: bool) -> None:
    publishing = Publishing(26, calls_in_flight=8 if fifo else 1, fifo=fifo)
    publishing.end_calls()
    assert publishing.call_sizes == [1, 10, 10, 5]
    assert [body for call in publishing.sqs.calls for body in call.bodies] == [*publishing.futures]


@pytest.mark.parametrize(
    ("calls_in_flight", "fifo", "messages", "call_sizes"),
    [
        (8, False, 1, [1]),
        (8, False, 11, [1, 1]),
        (8, False, 12, [1, 1, 10]),
        (8, False, 33, [1, 1, 10, 10, 10]),
        (8, False, 90, [1, 1, 10, 10, 10, 10, 10, 10]),
        (3, False, 33, [1, 1, 10]),
        (1, False, 33, [1]),
        (8, True, 33, [1]),
    ],
)
def test_two_calls_are_in_flight_and_full_batches_start_further_ones(
    calls_in_flight: int, fifo: bool, messages: int, call_sizes: list[int]
) -> None:
    publishing = Publishing(messages, calls_in_flight, fifo)
    assert publishing.call_sizes == call_sizes
    publishing.end_calls()
    assert publishing.outcomes == [SENT] * messages


def test_slow_call_delays_no_other_message() -> None:
    publishing = Publishing(3, calls_in_flight=8)
    for _ in range(3):
        publishing.end_call(1)
        publishing.publish()
    assert publishing.outcomes == [WAITING, SENT, SENT, SENT, WAITING, WAITING]
    publishing.end_calls()


def test_batch_ends_at_the_byte_limit() -> None:
    publishing = Publishing()
    _, attributes = app.Message("", "request-0").entry(fifo=False)
    half, full = LIMIT // 2 - attributes, LIMIT - attributes
    for size in (2, 300_000, 300_000, 300_000, 300_000, full - 2, half, half - 2, 2):
        publishing.publish(size=size)
    publishing.end_calls()
    assert publishing.call_sizes == [1, 3, 1, 1, 2, 1]
    assert_promises(publishing)


def test_message_beyond_the_memory_limit_is_overloaded() -> None:
    publishing, size = Publishing(), LIMIT - 1200
    count = app.Publisher.MAX_PENDING_BYTES // LIMIT
    publishing.publish(count + 1, size)
    assert publishing.outcomes == [WAITING] * count + ["overloaded"]
    assert "bytes of messages wait for SQS" in publishing.last_error().cause
    publishing.end_call()
    publishing.publish(2, size)
    assert publishing.outcomes[count:] == ["overloaded", WAITING, "overloaded"], "room for one"
    publishing.end_calls()
    publishing.publish(count, size)
    assert publishing.outcomes[-count:] == [WAITING] * count
    publishing.end_calls()


# --- Failures -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ending", "outcomes"),
    [
        ({"results": [ACCEPTED, SENDER_FAULT, ACCEPTED]}, [SENT, UNAVAILABLE, SENT]),
        ({"results": [BUSY, BUSY, ACCEPTED]}, [WAITING, WAITING, SENT]),
        ({"results": [LEFT_OUT, ACCEPTED, ACCEPTED]}, [WAITING, SENT, SENT]),
        ({"results": [WITHOUT_ID, ACCEPTED, ACCEPTED]}, [WAITING, SENT, SENT]),
        ({"results": [SENDER_FAULT] * 3}, [UNAVAILABLE] * 3),
        ({"results": [SENDER_FAULT, BUSY, LEFT_OUT]}, [UNAVAILABLE, WAITING, WAITING]),
        ({"failure": "server error"}, [WAITING] * 3),
        ({"failure": "garbled response"}, [WAITING] * 3),
        ({"failure": "access denied"}, [UNAVAILABLE] * 3),
        ({"failure": "no such queue"}, [UNAVAILABLE] * 3),
    ],
    ids=str,
)
def test_temporary_failure_of_an_entry_is_retried(ending: Any, outcomes: list[str]) -> None:
    publishing = batch_of(3)
    publishing.end_call(**ending)
    assert publishing.outcomes == [SENT, *outcomes]
    retried = outcomes.count(WAITING)
    assert publishing.call_sizes == [1, 3, retried][: 3 if retried else 2]
    publishing.end_calls()
    assert publishing.outcomes == [SENT, *(SENT if o == WAITING else o for o in outcomes)]


@pytest.mark.parametrize("failure", ["server error", "throttled", "garbled response"])
def test_message_has_three_attempts(failure: str) -> None:
    publishing = batch_of(3)
    for _ in range(3):
        publishing.end_call(failure=failure)
    assert publishing.outcomes == [SENT, *[UNAVAILABLE] * 3]
    assert publishing.call_sizes == [1, 3, 3, 3]


def test_rejected_batch_is_sent_message_by_message() -> None:
    publishing = batch_of(3)
    rejected = list(publishing.futures)[2]
    publishing.end_call(failure="rejected")
    publishing.publish()  # shares no call with a message that SQS may reject
    while publishing.sqs.in_flight:
        is_rejected = rejected in publishing.sqs.in_flight[0].bodies
        publishing.end_call(failure="rejected" if is_rejected else "")
    assert publishing.outcomes == [SENT, SENT, UNAVAILABLE, SENT, SENT]
    assert publishing.call_sizes == [1, 3, 1, 1, 1, 1]


def test_no_attempt_starts_after_the_deadline(caplog: pytest.LogCaptureFixture) -> None:
    publishing = Publishing(2, deadline=5)
    publishing.now += 4
    publishing.end_call(failure="server error")  # retried
    assert publishing.call_sizes == [1, 2]
    publishing.now += 1
    publishing.end_call(failure="server error")  # too late for a third attempt
    assert publishing.outcomes == [UNAVAILABLE] * 2
    publishing.publish(2)
    publishing.now += 6
    caplog.clear()
    publishing.end_calls()  # a call in flight may take longer; a message that waits may not
    assert publishing.outcomes[2:] == [SENT, UNAVAILABLE]
    (line,) = (vars(record) for record in caplog.records)
    assert (line["cause"], line["request_ids"]) == ("out of time", ["request-3"])


def test_messages_of_a_rejected_batch_go_in_two_calls_at_once() -> None:
    publishing = Publishing(5, calls_in_flight=2)  # two are in flight, three wait
    publishing.end_call()
    publishing.end_call()
    publishing.end_call(failure="rejected")
    assert [len(call.entries) for call in publishing.sqs.in_flight] == [1, 1]
    publishing.end_calls()
    assert publishing.outcomes == [SENT] * 5


def test_messages_are_retried_in_their_order_before_later_ones() -> None:
    publishing = batch_of(5)
    publishing.publish(8)
    publishing.end_call(results=[BUSY, ACCEPTED, BUSY, ACCEPTED, BUSY])
    bodies = list(publishing.futures)
    assert publishing.sqs.in_flight[0].bodies == [bodies[n] for n in (1, 3, 5, *range(6, 13))]
    publishing.end_calls()


def test_sent_messages_do_not_wait_for_the_pause_of_a_retry() -> None:
    publishing, seen = batch_of(2), list[list[str]]()
    publishing.pause = lambda: seen.append(publishing.outcomes)
    publishing.end_call(results=[ACCEPTED, BUSY])
    assert seen == [[SENT, SENT, WAITING]]
    publishing.end_calls()


def defect(*_: Any, **__: Any) -> Any:
    raise RuntimeError("a defect of the service")


@pytest.mark.parametrize("place", ["clock", "pause", "result_of", "detail_of"])
def test_defect_in_a_sender_thread_leaves_no_message_without_an_outcome(
    monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    publishing = Publishing(13, calls_in_flight=2)
    target: Any = publishing if place in ("clock", "pause") else app
    with monkeypatch.context() as patch:
        patch.setattr(target, place, defect)
        publishing.end_call(failure="throttled")
    publishing.end_calls()
    assert WAITING not in publishing.outcomes
    publishing.now += 1
    publishing.publish(13)
    assert len(publishing.sqs.in_flight) == 2, "the call that failed still counts"
    publishing.end_calls()
    assert publishing.outcomes[13:] == [SENT] * 13
    assert_promises(publishing)


# --- Circuit --------------------------------------------------------------------------------------


def open_circuit() -> Publishing:
    """A call and its probe have timed out."""
    publishing = Publishing(1, calls_in_flight=8)
    publishing.end_call(failure="read timeout")
    publishing.end_call(failure="connect timeout")
    return publishing


def probing() -> Publishing:
    """The circuit is open, and a probe is in flight."""
    publishing = open_circuit()
    publishing.now += app.Publisher.PROBE_SECONDS
    publishing.publish()
    assert publishing.probes == [True]
    return publishing


def test_timeout_opens_the_circuit_for_the_messages_that_wait() -> None:
    publishing = Publishing(4)
    publishing.end_call(failure="read timeout")
    assert publishing.outcomes == [WAITING, UNAVAILABLE, UNAVAILABLE, UNAVAILABLE]
    assert publishing.probes == [True], "the message of the call that timed out"
    publishing.end_calls()
    assert publishing.outcomes[0] == SENT


def test_open_circuit_rejects_messages_except_one_probe_at_a_time() -> None:
    publishing = open_circuit()
    publishing.publish(3)
    assert (publishing.outcomes, publishing.probes) == ([UNAVAILABLE] * 4, [])
    publishing.now += app.Publisher.PROBE_SECONDS
    publishing.publish(3)
    assert publishing.outcomes[4:] == [WAITING, UNAVAILABLE, UNAVAILABLE]
    assert publishing.probes == [True]
    publishing.end_call(failure="read timeout")
    publishing.publish()
    assert (publishing.outcomes, publishing.probes) == ([UNAVAILABLE] * 8, [])


def test_earlier_call_that_fails_starts_no_second_probe() -> None:
    publishing = Publishing(2, calls_in_flight=8)
    publishing.end_call(failure="read timeout")
    assert publishing.probes == [False, True]
    publishing.end_call(failure="read timeout")
    publishing.now += app.Publisher.PROBE_SECONDS
    publishing.publish()
    assert publishing.probes == [True]
    publishing.end_calls()


@pytest.mark.parametrize(
    ("ending", "is_closed"),
    [
        ({}, True),
        ({"failure": "rejected"}, True),
        ({"failure": "access denied"}, True),
        ({"results": [SENDER_FAULT]}, True),
        ({"failure": "server error"}, False),
        ({"failure": "throttled"}, False),
        ({"failure": "read timeout"}, False),
        ({"failure": "garbled response"}, False),
    ],
    ids=str,
)
def test_response_to_the_probe_closes_the_circuit(ending: Any, is_closed: bool) -> None:
    publishing = probing()
    publishing.end_call(**ending)
    publishing.publish()
    assert publishing.probes == ([False] if is_closed else [])
    publishing.end_calls()
    assert publishing.outcomes[2:] == [SENT if is_closed else UNAVAILABLE]


def test_timeout_beside_a_success_leaves_the_circuit_closed() -> None:
    publishing = Publishing(2, calls_in_flight=8)
    publishing.end_call(1)
    publishing.end_call(0, failure="read timeout")
    assert publishing.probes == [False], "a retry"
    publishing.end_calls()
    assert publishing.outcomes == [SENT, SENT]


@pytest.mark.parametrize("failure", ["server error", "throttled"])
@pytest.mark.parametrize("has_success", [False, True])
def test_ten_failed_calls_in_a_row_open_the_circuit(failure: str, has_success: bool) -> None:
    publishing = Publishing()
    for _ in range(3):
        publishing.publish()
        for _ in range(3):
            publishing.end_call(failure=failure)
    if has_success:
        publishing.publish()
        publishing.end_call()
    publishing.publish()
    publishing.end_call(failure=failure)
    assert publishing.probes == [not has_success]
    publishing.end_calls()


# --- Logs and metrics -----------------------------------------------------------------------------


def metric(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"email_processor_{name}", labels) or 0


def test_outage_is_logged_at_its_beginning_and_end(caplog: pytest.LogCaptureFixture) -> None:
    publishing = open_circuit()
    assert metric("sqs_circuits_open") == 1
    publishing.now += 30
    publishing.publish()
    publishing.end_call()
    assert metric("sqs_circuits_open") == 0
    levels = [record.levelno for record in caplog.records if "circuit" in record.message]
    assert levels == [logging.ERROR, logging.WARNING]
    assert vars(caplog.records[-1])["seconds"] == 30


@pytest.mark.parametrize(
    ("ending", "result"),
    [
        ({}, "success"),
        ({"results": [SENDER_FAULT, BUSY]}, "partial"),
        ({"failure": "server error"}, "unavailable"),
        ({"failure": "read timeout"}, "timeout"),
        ({"failure": "access denied"}, "refused"),
    ],
    ids=str,
)
def test_call_is_counted_by_its_result(ending: Any, result: str) -> None:
    publishing = batch_of(3)
    names = "sqs_batch_size_sum", "sqs_call_duration_seconds_sum"
    before = metric("sqs_calls_total", result=result), *map(metric, names)
    publishing.now += 0.5
    publishing.end_call(**ending)
    after = metric("sqs_calls_total", result=result), *map(metric, names)
    assert [a - b for a, b in zip(after, before, strict=True)] == [1, 3, 0.5]
    publishing.end_calls()


def test_failed_call_is_logged_with_its_request_ids(caplog: pytest.LogCaptureFixture) -> None:
    publishing = batch_of(3)
    publishing.end_call(failure="throttled")
    publishing.end_call(results=[ACCEPTED, SENDER_FAULT, BUSY])
    publishing.end_calls()
    expected = [
        (logging.WARNING, ["request-1", "request-2", "request-3"], "ThrottlingException"),
        (logging.ERROR, ["request-2"], SENDER_FAULT),
        (logging.WARNING, ["request-3"], BUSY),
    ]
    lines = [vars(record) for record in caplog.records]
    assert [(line["levelno"], line["request_ids"]) for line in lines] == [e[:2] for e in expected]
    assert all(cause in line["cause"] for line, (*_, cause) in zip(lines, expected, strict=True))


# --- The queue's limit ----------------------------------------------------------------------------


def test_limit_is_read_again_before_a_message_is_rejected_for_its_size() -> None:
    publishing = Publishing(limit=1000)
    publishing.sqs.limit = 3000
    for seconds, size, outcome, reads in [
        (0.0, 2000, TOO_LARGE, 1),
        (4.9, 2000, TOO_LARGE, 1),
        (0.1, 2000, SENT, 2),
        (4.9, 3500, TOO_LARGE, 2),
        (0.1, 3500, TOO_LARGE, 3),
    ]:
        publishing.now += seconds
        publishing.publish(size=size)
        publishing.end_calls()
        assert (publishing.outcomes[-1], publishing.sqs.limit_reads) == (outcome, reads)
    assert "the queue takes 3000." in publishing.last_error().message
