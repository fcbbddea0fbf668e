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
from botocore.exceptions import ClientError, ReadTimeoutError
from fake_aws import message_bytes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY

import app

QUEUE_URL = "https://sqs.us-west-1.amazonaws.com/123456789012/dev-CP-queue"
LIMIT = app.Publisher.MAX_BYTES


def aws_error(code: str, status: int) -> ClientError:
    response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(response, "Send")


TIMEOUT = ReadTimeoutError(endpoint_url="https://aws.invalid")
# How a call fails: its exception, and whether SQS has accepted the messages.
FAILURES: dict[str, tuple[Exception, bool]] = {
    "server error": (aws_error("InternalFailure", 500), False),
    "throttled": (aws_error("ThrottlingException", 400), False),
    "access denied": (aws_error("AccessDenied", 403), False),
    "no such queue": (aws_error("AWS.SimpleQueueService.NonExistentQueue", 400), False),
    "rejected": (aws_error("InvalidParameterValue", 400), False),
    "timeout": (TIMEOUT, False),
    "lost response": (TIMEOUT, True),
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

    def __init__(self, executor: StepExecutor, limit: int) -> None:
        self._executor = executor
        self.limit, self.limit_reads = limit, 0
        self.in_flight: list[Call] = []
        self.calls: list[Call] = []
        self.accepted: list[tuple[str, str]] = []  # (body, MessageId)
        self.unreported: set[str] = set()  # accepted by a call that failed

    def get_queue_attributes(self, **_: Any) -> dict[str, Any]:
        self.limit_reads += 1
        return {"Attributes": {"MaximumMessageSize": str(self.limit)}}

    def send_message(self, is_probe: bool = False, **entry: Any) -> dict[str, Any]:
        ((entry, result),) = self._call([entry], is_probe)
        if result in (SENDER_FAULT, BUSY):
            raise aws_error(result, 400 if result == SENDER_FAULT else 503)
        return {"MessageId": self._accept(entry)} if result == ACCEPTED else {}

    def send_message_batch(self, is_probe: bool = False, **batch: Any) -> dict[str, Any]:
        response: dict[str, Any] = {"Successful": [], "Failed": []}
        for entry, result in self._call(batch["Entries"], is_probe):
            if result == ACCEPTED:
                sent = {"Id": entry["Id"], "MessageId": self._accept(entry)}
                response["Successful"].insert(0, sent)  # SQS promises no order
            elif result == WITHOUT_ID:
                response["Successful"].append({"Id": entry["Id"]})
            elif result != LEFT_OUT:
                failed = {"Id": entry["Id"], "SenderFault": result == SENDER_FAULT, "Code": result}
                response["Failed"].append(failed)
        return response

    def _call(self, entries: list[dict[str, Any]], is_probe: bool) -> list[tuple[Any, str]]:
        """Wait until the test ends the call; the entries with their results."""
        call = Call(entries, is_probe)
        self.in_flight.append(call)
        self.calls.append(call)
        self._executor.hold(call)
        self.in_flight.remove(call)
        if call.failure:
            error, is_accepted = FAILURES[call.failure]
            for entry in entries if is_accepted else []:
                self.unreported.add(entry["MessageBody"])
                self._accept(entry)
            raise error
        results = call.results[: len(entries)]
        return list(zip_longest(entries, results, fillvalue=ACCEPTED))

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
        limit: int = LIMIT,
    ) -> None:
        self.executor = StepExecutor()
        self.sqs = HeldSqs(self.executor, limit)
        self.now = 0.0
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
            lambda: self.now,
            lambda _: self.pause(),
        )
        self.publisher.RETRY_SECONDS = deadline  # type: ignore[misc]
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

    def end_calls(self, failure: str = "") -> None:
        """End all calls, those that follow included."""
        while self.sqs.in_flight:
            self.end_call(failure=failure)

    @property
    def outcomes(self) -> list[str]:
        return [
            getattr(future.exception(), "code", SENT) if future.done() else WAITING
            for future in self.futures.values()
        ]

    def last_error(self) -> Any:
        return list(self.futures.values())[-1].exception(timeout=0)

    @property
    def bodies(self) -> list[str]:
        """The messages' bodies, in the order of their arrival."""
        return list(self.futures)

    @property
    def call_sizes(self) -> list[int]:
        """Messages in each call so far."""
        return [len(call.entries) for call in self.sqs.calls]

    @property
    def probes(self) -> list[bool]:
        """Whether each call in flight is a probe."""
        return [call.is_probe for call in self.sqs.in_flight]


def batch_of(count: int) -> Publishing:
    """A batch in flight: its messages arrived during the call for the first message."""
    publishing = Publishing(1 + count)
    publishing.end_call()
    return publishing


RESULTS = st.lists(st.sampled_from([ACCEPTED, SENDER_FAULT, BUSY, LEFT_OUT]), max_size=10)
STEPS = st.one_of(
    st.tuples(st.just("publish"), st.sampled_from([2, 2, 2, 2, 200_000, 500_000, LIMIT - 300])),
    st.tuples(st.just("end call"), st.integers(0, 7), st.just(""), RESULTS),
    st.tuples(st.just("end call"), st.integers(0, 7), st.sampled_from(sorted(FAILURES))),
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
    sqs = publishing.sqs
    for step, value, *ending in steps:
        if step == "publish":
            publishing.publish(size=value)
        elif step == "time passes":
            publishing.now += value
        elif sqs.in_flight:
            publishing.end_call(value % len(sqs.in_flight), *ending)
        assert len(sqs.in_flight) <= (1 if fifo else calls_in_flight)
    publishing.end_calls()

    for body, future in publishing.futures.items():
        ids = {message_id for accepted, message_id in sqs.accepted if accepted == body}
        if future.exception(timeout=0) is None:
            assert future.result() in ids, "the id of another message"
        else:
            assert isinstance(future.exception(), app.ApiError)
        assert len(ids) <= 1 or body in sqs.unreported, "sent twice"
    for call in sqs.calls:
        assert 1 <= len(call.entries) <= 10
        assert sum(map(message_bytes, call.entries)) <= LIMIT
        assert len(set(call.bodies)) == len(call.entries)
        assert len({entry.get("Id") for entry in call.entries}) == len(call.entries)
    attempts = Counter(body for call in sqs.calls for body in call.bodies)
    assert max(attempts.values(), default=0) <= app.Publisher.MAX_ATTEMPTS

    publishing.publisher.RETRY_SECONDS = 60  # type: ignore[misc]
    publishing.now += 1  # time for a probe
    publishing.publish()
    publishing.end_calls()
    assert publishing.outcomes[-1] == SENT, "the publisher has stopped"


# --- Batches --------------------------------------------------------------------------------------


def test_two_calls_are_in_flight_and_full_batches_start_further_ones() -> None:
    publishing = Publishing(calls_in_flight=4)
    for messages, call_sizes in [
        (1, [1]),
        (1, [1, 1]),
        (9, [1, 1]),
        (1, [1, 1, 10]),
        (99, [1, 1, 10, 10]),
    ]:
        publishing.publish(messages)
        assert publishing.call_sizes == call_sizes
    publishing.end_calls()
    assert publishing.outcomes == [SENT] * 111


def test_messages_for_a_fifo_queue_go_in_order_one_call_at_a_time() -> None:
    publishing = Publishing(26, calls_in_flight=8, fifo=True)
    assert publishing.call_sizes == [1]
    publishing.end_calls()
    assert publishing.call_sizes == [1, 10, 10, 5]
    assert [body for call in publishing.sqs.calls for body in call.bodies] == publishing.bodies


def test_batch_ends_at_the_byte_limit() -> None:
    publishing = Publishing()
    _, attributes = app.Message("", "request-0").send_arguments(fifo=False)
    half, full = LIMIT // 2 - attributes, LIMIT - attributes
    for size in (2, 300_000, 300_000, 300_000, 300_000, full - 2, half, half - 2, 2):
        publishing.publish(size=size)
    publishing.end_calls()
    assert publishing.call_sizes == [1, 3, 1, 1, 2, 1]
    assert max(sum(map(message_bytes, call.entries)) for call in publishing.sqs.calls) <= LIMIT


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


# --- Failures -------------------------------------------------------------------------------------


def test_each_message_of_a_batch_has_its_own_outcome() -> None:
    publishing = batch_of(5)
    publishing.end_call(results=[SENDER_FAULT, BUSY, LEFT_OUT, WITHOUT_ID, ACCEPTED])
    assert publishing.outcomes == [SENT, UNAVAILABLE, WAITING, WAITING, WAITING, SENT]
    assert publishing.sqs.in_flight[0].bodies == publishing.bodies[2:5], "the temporary failures"
    publishing.end_calls()
    assert publishing.outcomes == [SENT, UNAVAILABLE, SENT, SENT, SENT, SENT]


@pytest.mark.parametrize(
    ("failure", "attempts"),
    [
        ("server error", 3),
        ("throttled", 3),
        ("garbled response", 3),
        ("access denied", 1),
        ("no such queue", 1),
    ],
)
def test_only_a_temporary_failure_has_three_attempts(failure: str, attempts: int) -> None:
    publishing = batch_of(3)
    publishing.end_calls(failure)
    assert publishing.outcomes == [SENT, *[UNAVAILABLE] * 3]
    assert publishing.call_sizes == [1, *[3] * attempts]


def test_messages_of_a_rejected_batch_are_sent_separately() -> None:
    publishing = Publishing(5, calls_in_flight=2)  # two are in flight, three wait
    publishing.end_call()
    publishing.end_call()
    publishing.end_call(failure="rejected")
    assert [len(call.entries) for call in publishing.sqs.in_flight] == [1, 1]
    publishing.publish()  # shares no call with a message that SQS may reject
    rejected = publishing.bodies[3]
    while publishing.sqs.in_flight:
        is_rejected = rejected in publishing.sqs.in_flight[0].bodies
        publishing.end_call(failure="rejected" if is_rejected else "")
    assert publishing.outcomes == [SENT, SENT, SENT, UNAVAILABLE, SENT, SENT]
    assert publishing.call_sizes == [1, 1, 3, 1, 1, 1, 1]


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


def test_messages_are_retried_in_their_order_before_later_ones() -> None:
    publishing = batch_of(5)
    publishing.publish(8)
    publishing.end_call(results=[BUSY, ACCEPTED, LEFT_OUT, ACCEPTED, BUSY])
    retried = publishing.sqs.in_flight[0].bodies
    assert retried == [publishing.bodies[n] for n in (1, 3, 5, *range(6, 13))]
    publishing.end_calls()


def test_sent_messages_do_not_wait_for_the_pause_of_a_retry() -> None:
    publishing, seen = batch_of(2), list[list[str]]()
    publishing.pause = lambda: seen.append(publishing.outcomes)
    publishing.end_call(results=[ACCEPTED, BUSY])
    assert seen == [[SENT, SENT, WAITING]]
    publishing.end_calls()


def test_defect_in_a_sender_thread_leaves_no_message_without_an_outcome() -> None:
    def defect() -> None:
        raise RuntimeError

    publishing = Publishing(13, calls_in_flight=2)
    publishing.pause = defect
    publishing.end_call(failure="throttled")
    publishing.pause = lambda: None
    publishing.end_calls()
    assert WAITING not in publishing.outcomes
    publishing.publish(13)
    assert len(publishing.sqs.in_flight) == 2, "the call that failed still counts"
    publishing.end_calls()
    assert publishing.outcomes[13:] == [SENT] * 13


# --- Circuit --------------------------------------------------------------------------------------


def open_circuit() -> Publishing:
    """A call and its probe have timed out."""
    publishing = Publishing(1, calls_in_flight=8)
    publishing.end_calls("timeout")
    return publishing


def test_timeout_opens_the_circuit_for_the_messages_that_wait() -> None:
    publishing = Publishing(4)
    publishing.end_call(failure="timeout")
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
    publishing.end_call(failure="timeout")
    publishing.publish()
    assert (publishing.outcomes, publishing.probes) == ([UNAVAILABLE] * 8, [])


@pytest.mark.parametrize(
    ("failure", "is_closed"), [("", True), ("access denied", True), ("server error", False)]
)
def test_response_to_the_probe_closes_the_circuit(failure: str, is_closed: bool) -> None:
    publishing = open_circuit()
    publishing.now += app.Publisher.PROBE_SECONDS
    publishing.publish()
    publishing.end_call(failure=failure)
    publishing.publish()
    assert publishing.probes == ([False] if is_closed else [])
    publishing.end_calls()
    assert publishing.outcomes[2:] == [SENT if is_closed else UNAVAILABLE]


def test_timeout_beside_a_success_leaves_the_circuit_closed() -> None:
    publishing = Publishing(2, calls_in_flight=8)
    publishing.end_call(1)
    publishing.end_call(0, failure="timeout")
    assert publishing.probes == [False], "a retry"
    publishing.end_calls()
    assert publishing.outcomes == [SENT, SENT]


@pytest.mark.parametrize("has_success", [False, True])
def test_ten_failed_calls_in_a_row_open_the_circuit(has_success: bool) -> None:
    publishing = Publishing()
    for _ in range(3):
        publishing.publish()
        publishing.end_calls("server error")
    if has_success:
        publishing.publish()
        publishing.end_calls()
    assert len(publishing.sqs.calls) == 9 + has_success
    publishing.publish()
    publishing.end_call(failure="server error")
    assert publishing.probes == [not has_success]
    publishing.end_calls()


# --- Logs and metrics -----------------------------------------------------------------------------


def metric(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"email_processor_{name}", labels) or 0


def test_outage_is_logged_at_its_beginning_and_end(caplog: pytest.LogCaptureFixture) -> None:
    publishing = Publishing()
    publishing.now += 1000
    publishing.publish()
    publishing.end_calls("timeout")
    assert metric("sqs_circuits_open") == 1
    publishing.now += 30
    publishing.publish()
    publishing.end_call()
    assert metric("sqs_circuits_open") == 0
    levels = [record.levelno for record in caplog.records if "circuit" in record.message]
    assert levels == [logging.ERROR, logging.WARNING]
    assert vars(caplog.records[-1])["seconds"] == 30


def test_call_is_counted_by_its_result() -> None:
    names = "sqs_batch_size_sum", "sqs_call_duration_seconds_sum"
    for result, ending in {
        "success": {},
        "partial": {"results": [SENDER_FAULT, BUSY]},
        "unavailable": {"failure": "server error"},
        "timeout": {"failure": "timeout"},
        "refused": {"failure": "access denied"},
    }.items():
        publishing: Any = batch_of(3)
        before = metric("sqs_calls_total", result=result), *map(metric, names)
        publishing.now += 0.5
        publishing.end_call(**ending)
        after = metric("sqs_calls_total", result=result), *map(metric, names)
        assert [a - b for a, b in zip(after, before, strict=True)] == [1, 3, 0.5], result
        publishing.end_calls()


def test_failed_call_is_logged_with_its_request_ids(caplog: pytest.LogCaptureFixture) -> None:
    publishing = batch_of(3)
    publishing.end_call(failure="throttled")
    publishing.end_call(results=[ACCEPTED, SENDER_FAULT, BUSY])
    publishing.end_calls()
    lines = [vars(record) for record in caplog.records]
    assert [(line["levelno"], line["request_ids"]) for line in lines] == [
        (logging.WARNING, ["request-1", "request-2", "request-3"]),
        (logging.ERROR, ["request-2"]),
        (logging.WARNING, ["request-3"]),
    ]
    for line, cause in zip(lines, ("ThrottlingException", SENDER_FAULT, BUSY), strict=True):
        assert cause in line["cause"]


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
