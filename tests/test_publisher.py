"""The publisher under any interleaving of requests, calls of SQS and failures.

A scripted SQS holds every call until the script ends it, and the clock moves when the script moves
it. The executor runs one task at a time, so each step happens in a known state.
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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY

import app

QUEUE = "https://sqs.us-west-1.amazonaws.com/123456789012/dev-CP-queue"
LIMIT = app.Publisher.MAX_BYTES


def aws_error(code: str, status: int, text: str = "as AWS puts it") -> ClientError:
    response = {"Error": {"Code": code, "Message": text}}
    return ClientError({**response, "ResponseMetadata": {"HTTPStatusCode": status}}, "Send")


# How a call ends: its exception, and whether SQS has taken the messages.
FAILURES: dict[str, tuple[Exception, bool]] = {
    "server error": (aws_error("InternalFailure", 500), False),
    "throttled": (aws_error("ThrottlingException", 400), False),
    "too many": (aws_error("TooManyRequests", 429), False),
    "denied": (aws_error("AccessDenied", 403), False),
    "no queue": (aws_error("AWS.SimpleQueueService.NonExistentQueue", 400), False),
    "refused": (aws_error("InvalidParameterValue", 400), False),
    "too large": (aws_error("InvalidParameterValue", 400, "must be shorter than 9 bytes"), False),
    "no answer": (ReadTimeoutError(endpoint_url="https://aws.invalid"), False),
    "no connection": (ConnectTimeoutError(endpoint_url="https://aws.invalid"), False),
    "lost answer": (ReadTimeoutError(endpoint_url="https://aws.invalid"), True),
    "garbled": (KeyError("MessageId"), True),
}
SENT, FAULT, BUSY, LEFT_OUT = "sent", "sender fault", "service busy", "not in the answer"
NAMELESS = "sent without a MessageId"


class Tasks(Executor):
    """Keeps tasks until the script runs them. Each has a thread, but only one thread runs: a task
    has the turn until it ends, or until its call of SQS waits for the script.
    """

    def __init__(self) -> None:
        self.submitted: deque[Callable[[], Any]] = deque()
        self._paused = threading.Semaphore(0)

    def submit(self, task: Any, /, *arguments: Any, **options: Any) -> Future[Any]:
        self.submitted.append(partial(task, *arguments, **options))
        return Future()

    def run_submitted(self) -> None:
        while self.submitted:
            task = self.submitted.popleft()
            threading.Thread(target=self._run, args=(task,), daemon=True).start()
            self._take_turn_back()

    def resume(self, event: threading.Event) -> None:
        event.set()
        self._take_turn_back()
        self.run_submitted()

    def wait(self, event: threading.Event) -> None:
        """Of a task: give the turn back until the event."""
        self._paused.release()
        assert event.wait(60), "the script forgot a call"

    def _run(self, task: Callable[[], Any]) -> None:
        try:
            task()
        except Exception:  # as in an executor's future that nothing reads
            logging.getLogger("tasks").exception("task failed")
        finally:
            self._paused.release()

    def _take_turn_back(self) -> None:
        assert self._paused.acquire(timeout=60)


@dataclass(eq=False)
class Call:
    entries: list[dict[str, Any]]
    single: bool
    probe: bool  # made by the client with less time
    beside: int  # calls that were in flight when it began
    end: threading.Event = field(default_factory=threading.Event)
    failure: str = ""
    results: list[str] = field(default_factory=list)  # of the entries; further ones are sent

    @property
    def bodies(self) -> list[str]:
        return [entry["MessageBody"] for entry in self.entries]


class Queue:
    """An SQS whose calls end when the script says so; it knows what it took."""

    def __init__(self, tasks: Tasks) -> None:
        self.tasks = tasks
        self.calls: list[Call] = []  # in flight
        self.made: list[Call] = []
        self.taken: list[tuple[str, str]] = []  # (body, MessageId)
        self.ambiguous: set[str] = set()  # taken, but the answer says otherwise
        self.limit: Any = LIMIT
        self.reads = 0  # of it

    def get_queue_attributes(self, **_: Any) -> dict[str, Any]:
        self.reads += 1
        if isinstance(self.limit, Exception):
            raise self.limit
        return {"Attributes": {"MaximumMessageSize": str(self.limit)}}

    def send_message(self, probe: bool = False, **entry: Any) -> dict[str, Any]:
        assert entry.pop("QueueUrl").startswith(QUEUE)
        call = self._hold([entry], single=True, probe=probe)
        if call.results[:1] in ([FAULT], [BUSY]):
            raise aws_error("InvalidMessageContents", 400 if call.results[0] == FAULT else 503)
        return {} if call.results[:1] == [LEFT_OUT] else {"MessageId": self._take(entry)}

    def send_message_batch(self, probe: bool = False, **batch: Any) -> dict[str, Any]:
        assert batch["QueueUrl"].startswith(QUEUE)
        call = self._hold(batch["Entries"], single=False, probe=probe)
        answer: dict[str, Any] = {"Successful": [], "Failed": []}
        results = call.results[: len(call.entries)]
        for entry, result in zip_longest(call.entries, results, fillvalue=SENT):
            if result == SENT:
                message_id = self._take(entry)
                answer["Successful"].insert(0, {"Id": entry["Id"], "MessageId": message_id})
            elif result == NAMELESS:
                answer["Successful"].append({"Id": entry["Id"]})
            elif result != LEFT_OUT:
                failed = {"Id": entry["Id"], "SenderFault": result == FAULT, "Code": result}
                answer["Failed"].append(failed)
        return answer

    def _hold(self, entries: list[dict[str, Any]], single: bool, probe: bool) -> Call:
        call = Call(entries, single, probe, beside=len(self.calls))
        self.calls.append(call)
        self.made.append(call)
        self.tasks.wait(call.end)
        self.calls.remove(call)
        if call.failure:
            error, taken = FAILURES[call.failure]
            for entry in entries if taken else []:
                self.ambiguous.add(entry["MessageBody"])
                self._take(entry)
            raise error
        return call

    def _take(self, entry: dict[str, Any]) -> str:
        message_id = f"id-{len(self.taken)}"
        self.taken.append((entry["MessageBody"], message_id))
        return message_id


class Requests:
    """Requests that publish, and what becomes of each."""

    def __init__(
        self, calls: int = 1, fifo: bool = False, seconds: float = 60, limit: Any = LIMIT
    ) -> None:
        self.tasks = Tasks()
        self.queue = Queue(self.tasks)
        self.queue.limit = limit
        self.now = 0.0
        self.clock: Callable[[], float] = lambda: self.now
        self.pause: Callable[[], object] = lambda: None
        probe = SimpleNamespace(
            send_message=partial(self.queue.send_message, probe=True),
            send_message_batch=partial(self.queue.send_message_batch, probe=True),
        )
        self.publisher = app.Publisher(
            self.queue,
            probe,
            QUEUE + (".fifo" if fifo else ""),
            calls,
            self.tasks,
            lambda: self.clock(),
            lambda _: self.pause(),
        )
        self.publisher.SECONDS = seconds  # type: ignore[misc]
        self.publisher.read_limit()
        self.answers: dict[str, Future[str]] = {}

    def submit(self, size: int = 0) -> str:
        number = len(self.answers)
        body = json.dumps(f"{number}".ljust(max(size, 2) - 2))
        try:
            answer = self.publisher.publish(app.Message(body, request_id=f"request-{number}"))
        except Exception as error:
            answer = Future()
            answer.set_exception(error)
        self.answers[body] = answer
        self.tasks.run_submitted()
        return body

    def end_call(
        self, number: int = 0, failure: str = "", results: list[str] | None = None
    ) -> None:
        call = self.queue.calls[number]
        call.failure, call.results = failure, results or []
        self.tasks.resume(call.end)

    def end_all(self) -> None:
        while self.queue.calls:
            self.end_call()

    def error(self, number: int = -1) -> Any:
        return list(self.answers.values())[number].exception(timeout=0)

    @property
    def outcomes(self) -> str:
        """A letter for each: s(ent), or how its error's code begins; a blank for none yet."""
        return "".join(
            " " if not answer.done() else getattr(answer.exception(), "code", "sent")[0]
            for answer in self.answers.values()
        )

    @property
    def sizes(self) -> list[int]:
        """Messages in each call made so far."""
        return [len(call.entries) for call in self.queue.made]

    @property
    def probes(self) -> list[bool]:
        """Of each call in flight, whether it is one."""
        return [call.probe for call in self.queue.calls]


Step = int | float | str | list[str]
OK: Step = ""


def play(*steps: Step, **options: Any) -> Requests:
    """A number: as many requests come. With a point: seconds pass. A failure's name or OK: the
    oldest call ends so. A list: it ends with these results of its entries.
    """
    requests = Requests(**options)
    for step in steps:
        if isinstance(step, int):
            for _ in range(step):
                requests.submit()
        elif isinstance(step, float):
            requests.now += step
        elif isinstance(step, list):
            requests.end_call(results=step)
        else:
            requests.end_call(failure=step)
    return requests


def size_of(entry: dict[str, Any]) -> int:
    return len(entry["MessageBody"]) + sum(
        len(name) + len(value["DataType"]) + len(value["StringValue"])
        for name, value in entry["MessageAttributes"].items()
    )


def assert_kept(requests: Requests) -> None:
    """What must hold for any requests and any failures, once all calls have ended."""
    queue, ids = requests.queue, dict[str, set[str]]()
    times_taken = Counter(body for body, _ in queue.taken)
    for body, message_id in queue.taken:
        ids.setdefault(body, set()).add(message_id)
    for body, answer in requests.answers.items():
        if answer.exception(timeout=0) is None:
            assert answer.result() in ids[body], "the id of its own message"
        else:
            assert isinstance(answer.exception(), app.ApiError)
        assert times_taken[body] <= 1 or body in queue.ambiguous, "sent once only"
    for call in queue.made:
        assert 1 <= len(call.entries) <= 10
        assert call.single == (len(call.entries) == 1)
        assert sum(map(size_of, call.entries)) <= LIMIT
        assert len(set(call.bodies)) == len(call.entries), "no message twice in a batch"
        assert call.single or len({entry["Id"] for entry in call.entries}) == len(call.entries)
    attempts = Counter(body for call in queue.made for body in call.bodies)
    assert max(attempts.values(), default=0) <= app.Publisher.ATTEMPTS


STEPS = st.one_of(
    st.tuples(st.just("submit"), st.sampled_from([0, 0, 0, 0, 200_000, 500_000, LIMIT - 300])),
    st.tuples(st.just("succeed"), st.integers(0, 7)),
    st.tuples(st.just("fail"), st.integers(0, 7), st.sampled_from(sorted(FAILURES))),
    st.tuples(
        st.just("answer"),
        st.integers(0, 7),
        st.lists(st.sampled_from([SENT, FAULT, BUSY, LEFT_OUT]), max_size=10),
    ),
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
    calls=st.sampled_from([1, 2, 8]),
    fifo=st.booleans(),
    seconds=st.sampled_from([60, 60, 60, 1.5, 0]),
)
def test_any_interleaving_keeps_every_promise(
    steps: list[Any], burst: int, calls: int, fifo: bool, seconds: float
) -> None:
    requests = play(burst, calls=calls, fifo=fifo, seconds=seconds)
    for kind, *arguments in steps:
        in_flight = requests.queue.calls
        assert len(in_flight) <= (1 if fifo else calls)
        if kind == "submit":
            requests.submit(*arguments)
        elif kind == "time passes":
            requests.now += arguments[0]
        elif in_flight:
            number = arguments[0] % len(in_flight)
            if kind == "succeed":
                requests.end_call(number)
            elif kind == "fail":
                requests.end_call(number, failure=arguments[1])
            else:
                requests.end_call(number, results=arguments[1])
    requests.end_all()
    assert_kept(requests)
    requests.publisher.SECONDS = 60  # type: ignore[misc]
    requests.now += 1
    requests.submit()
    requests.end_all()
    assert requests.outcomes[-1] == "s", "the next message is sent"


# --- Which messages share a call ------------------------------------------------------------------


def test_messages_that_arrive_during_a_call_share_the_next() -> None:
    requests = play(26)
    requests.end_all()
    assert requests.sizes == [1, 10, 10, 5]
    assert [body for call in requests.queue.made for body in call.bodies] == list(requests.answers)


# The limit of calls in flight, the messages that arrive, and the sizes of the calls that start.
@pytest.mark.parametrize(
    ("calls", "fifo", "messages", "made"),
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
    calls: int, fifo: bool, messages: int, made: list[int]
) -> None:
    requests = play(messages, calls=calls, fifo=fifo)
    assert requests.sizes == made
    requests.end_all()
    assert requests.outcomes == "s" * messages


def test_third_call_waits_though_other_calls_end() -> None:
    requests = play(15, calls=8)
    requests.end_call(2)
    assert (requests.sizes, len(requests.queue.calls)) == ([1, 1, 10], 2)
    requests.end_call(0)
    assert requests.sizes == [1, 1, 10, 3]
    requests.end_all()


def test_call_that_takes_long_delays_no_other_message() -> None:
    requests = play(3, calls=8)
    for _ in range(3):
        requests.end_call(1)
        requests.submit()
    assert requests.outcomes == " sss  "[:1] + "sss" + " " * (len(requests.outcomes) - 4)
    requests.end_all()


def test_batch_ends_at_the_byte_limit() -> None:
    requests = Requests()
    attributes = size_of(app.Message("", "request-0").entry(fifo=False)[0])
    half, whole = LIMIT // 2 - attributes, LIMIT - attributes
    for size in (0, 300_000, 300_000, 300_000, 300_000, whole - 2, half, half - 2, 0):
        requests.submit(size)
    requests.end_all()
    assert requests.sizes == [1, 3, 1, 1, 2, 1]
    assert_kept(requests)


def test_fifo_queue_gets_messages_in_order() -> None:
    requests = play(25, calls=8, fifo=True)
    requests.end_all()
    assert [body for body, _ in requests.queue.taken] == list(requests.answers)
    entries = [entry for call in requests.queue.made for entry in call.entries]
    assert {entry["MessageGroupId"] for entry in entries} == {app.SERVICE}
    assert len({entry["MessageDeduplicationId"] for entry in entries}) == 25


def test_message_beyond_the_memory_bound_is_overloaded() -> None:
    requests = Requests()
    number = app.Publisher.MAX_PENDING_BYTES // (LIMIT - 1000)
    for _ in range(number + 1):
        requests.submit(LIMIT - 1200)
    assert requests.outcomes == " " * number + "o"
    assert "bytes of messages wait for SQS" in requests.error().cause
    requests.end_call()  # what SQS has no longer counts
    requests.submit(LIMIT - 1200)
    requests.submit(LIMIT - 1200)
    assert requests.outcomes[number:] == "o o"
    requests.end_all()
    for _ in range(number):
        requests.submit(LIMIT - 1200)
    assert "o" not in requests.outcomes[-number:]
    requests.end_all()


# --- Failures -------------------------------------------------------------------------------------

# All but the first request share a batch, as they arrive during its call. The steps, the outcomes
# of the requests, and the sizes of the calls.
SCENARIOS: dict[str, tuple[list[Step], str, list[int]]] = {
    "one by one": ([1, OK, 1, OK, 1], "ss ", [1, 1, 1]),
    "one entry refused": ([4, OK, [SENT, FAULT, SENT]], "ssqs", [1, 3]),
    "two entries to be tried again": ([4, OK, [BUSY, BUSY, SENT]], "s  s", [1, 3, 2]),
    "an entry without an answer": ([4, OK, [LEFT_OUT, SENT, SENT]], "s ss", [1, 3, 1]),
    "an entry without an id": ([4, OK, [NAMELESS, SENT, SENT]], "s ss", [1, 3, 1]),
    "all entries refused": ([4, OK, [FAULT, FAULT, FAULT]], "sqqq", [1, 3]),
    "some of each": ([4, OK, [FAULT, BUSY, LEFT_OUT]], "sq  ", [1, 3, 2]),
    "three attempts": ([4, OK, *["server error"] * 3], "sqqq", [1, 3, 3, 3]),
    "three garbled answers": ([4, OK, *["garbled"] * 3], "sqqq", [1, 3, 3, 3]),
    "too many requests": ([1, *["too many"] * 3], "q", [1, 1, 1]),
    "the caller is refused": ([4, OK, "denied"], "sqqq", [1, 3]),
    "the queue is unknown": ([4, OK, "no queue"], "sqqq", [1, 3]),
    "the queue's limit was lowered": ([3, OK, "too large", "too large"], "sm ", [1, 2, 1, 1]),
    "failures that pass": ([1, "throttled", "throttled", OK] * 10, "s" * 10, [1] * 30),
    "no attempt after its time": ([1, 59.0, "server error", 1.0, "server error"], "q", [1, 1]),
    "a call longer than the wait": ([1, 61.0], " ", [1]),
    "a wait longer than the time": ([2, 61.0, OK], "sq", [1]),
    "a time-out ends the waiting": ([4, "no answer"], " qqq", [1, 1]),
}


@pytest.mark.parametrize(("steps", "outcomes", "sizes"), SCENARIOS.values(), ids=SCENARIOS)
def test_failure_ends_as_it_should(steps: list[Step], outcomes: str, sizes: list[int]) -> None:
    requests = play(*steps)
    assert (requests.outcomes, requests.sizes) == (outcomes, sizes)
    requests.end_all()
    assert requests.outcomes == outcomes.replace(" ", "s")
    assert_kept(requests)


def test_rejected_batch_goes_message_by_message() -> None:
    requests = play(4, OK, "refused", 1)  # the last one shares no call with a message at fault
    guilty = list(requests.answers)[2]
    while requests.queue.calls:
        is_guilty = guilty in requests.queue.calls[0].bodies
        requests.end_call(failure="refused" if is_guilty else "")
    assert requests.outcomes == "ssqss"
    assert requests.sizes == [1, 3, 1, 1, 1, 1]


def test_messages_of_a_rejected_batch_go_in_two_calls_at_once() -> None:
    requests = play(5, OK, OK, "refused", calls=2)
    assert [len(call.entries) for call in requests.queue.calls] == [1, 1]
    requests.end_all()
    assert requests.outcomes == "sssss"


def test_messages_are_retried_in_their_order_before_later_ones() -> None:
    requests = play(6, OK, 8)
    requests.end_call(results=[BUSY, SENT, BUSY, SENT, BUSY])
    bodies = list(requests.answers)
    assert requests.queue.calls[0].bodies == [bodies[n] for n in (1, 3, 5, 6, 7, 8, 9, 10, 11, 12)]
    requests.end_all()


def test_futures_are_resolved_before_the_pause_of_a_retry() -> None:
    requests, seen = play(3, OK), list[str]()
    requests.pause = lambda: seen.append(requests.outcomes)
    requests.end_call(results=[SENT, BUSY])
    assert seen == ["ss "]
    requests.end_all()
    assert requests.outcomes == "sss"


def defect(*_: Any, **__: Any) -> Any:
    raise RuntimeError("a defect of the service")


@pytest.mark.parametrize("place", ["clock", "pause", "result_of", "detail_of"])
def test_exception_in_a_sender_leaves_no_request_without_an_outcome(
    monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    requests = play(13, calls=2)
    if place in ("clock", "pause"):
        setattr(requests, place, defect)
    else:
        monkeypatch.setattr(app, place, defect)
    requests.end_call(failure="throttled")
    monkeypatch.undo()
    requests.clock, requests.pause = lambda: requests.now, lambda: None
    requests.end_all()
    assert " " not in requests.outcomes
    requests.now += 1
    for _ in range(13):
        requests.submit()
    assert len(requests.queue.calls) == 2, "no call is counted that has ended"
    requests.end_all()
    assert requests.outcomes[13:] == "s" * 13
    assert_kept(requests)


# --- SQS is down ----------------------------------------------------------------------------------

# The first call and its probe have timed out.
DOWN: list[Step] = [1, "no answer", "no connection"]
PROBE_TIME = app.Publisher.PROBE_SECONDS


def test_one_message_at_a_time_probes_while_sqs_is_down() -> None:
    requests = play(*DOWN, 3, calls=8)
    assert (requests.outcomes, requests.probes) == ("qqqq", [])
    requests.now += PROBE_TIME
    for _ in range(3):
        requests.submit()
    assert (requests.outcomes, requests.probes) == ("qqqq qq", [True])
    requests.end_call(failure="no answer")
    requests.submit()
    assert (requests.outcomes, requests.probes) == ("q" * 8, [])


def test_earlier_call_that_fails_starts_no_second_probe() -> None:
    requests = play(2, "no answer", calls=8)  # its probe begins
    assert requests.probes == [False, True]
    requests.end_call(failure="no answer")
    requests.now += PROBE_TIME
    requests.submit()
    assert requests.probes == [True]
    requests.end_all()


@pytest.mark.parametrize("answer", [OK, "refused", "denied", [FAULT]], ids=str)
def test_any_answer_closes_the_circuit(answer: Step) -> None:
    requests = play(*DOWN, 1.0, 1, answer, 1)
    assert requests.probes == [False]
    requests.end_all()
    assert requests.outcomes[2:] == "s"


@pytest.mark.parametrize("failure", ["server error", "throttled", "no answer", "garbled"])
def test_probe_that_fails_leaves_the_circuit_open(failure: str) -> None:
    requests = play(*DOWN, 1.0, 1, failure, 1)
    assert (requests.outcomes, requests.probes) == ("qqq", [])


def test_timeout_beside_an_answer_rejects_no_message() -> None:
    requests = play(2, calls=8)
    requests.end_call(1)
    requests.end_call(0, failure="no answer")
    assert requests.probes == [False]
    requests.end_all()
    assert requests.outcomes == "ss"


@pytest.mark.parametrize("failure", ["server error", "throttled"])
def test_ten_failed_calls_in_a_row_open_the_circuit(failure: str) -> None:
    requests = play(*[1, failure, failure, failure] * 3, 1, failure)
    assert requests.probes == [True]
    requests.end_call(failure=failure)
    requests.submit()
    assert (requests.outcomes, requests.probes) == ("qqqqq", [])


def test_failures_with_an_answer_between_them_leave_the_circuit_closed() -> None:
    requests = play(*[1, *["server error"] * 3] * 3, 1, OK, 1, "server error")
    assert requests.probes == [False]
    requests.end_all()


# --- Logs and metrics -----------------------------------------------------------------------------


def test_outage_is_logged_at_its_beginning_and_end(caplog: pytest.LogCaptureFixture) -> None:
    play(*DOWN, 30.0, 1, OK)
    levels = [r.levelno for r in caplog.records if "SQS is" in r.getMessage()]
    assert levels == [logging.ERROR, logging.WARNING]
    assert caplog.records[-1].seconds == 30  # type: ignore[attr-defined]


def test_failed_call_is_logged_with_its_request_ids(caplog: pytest.LogCaptureFixture) -> None:
    play(4, OK, "throttled", [SENT, FAULT, BUSY]).end_all()
    logged: list[Any] = caplog.records
    assert [(line.levelno, line.request_ids) for line in logged] == [
        (logging.WARNING, ["request-1", "request-2", "request-3"]),
        (logging.ERROR, ["request-2"]),
        (logging.WARNING, ["request-3"]),
    ]
    causes = (str(FAILURES["throttled"][0]), FAULT, BUSY)
    assert all(cause in line.cause for cause, line in zip(causes, logged, strict=True))


def test_message_that_waited_too_long_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    play(2, 61.0, OK)
    (line,) = caplog.records
    assert (line.cause, line.request_ids) == ("out of time", ["request-1"])  # type: ignore[attr-defined]


def test_calls_are_counted_by_result_with_their_messages() -> None:
    def counted() -> list[float]:
        name, results = "email_processor_sqs_calls_total", ("success", "partial", "unavailable")
        values = [REGISTRY.get_sample_value(name, {"result": result}) for result in results]
        return [*values, REGISTRY.get_sample_value("email_processor_sqs_batch_size_sum")]

    before = counted()
    play(4, OK, [SENT, FAULT, BUSY], "throttled", OK)
    grown = [now - then for now, then in zip(counted(), before, strict=True)]
    assert grown == [2, 1, 1, 1 + 3 + 1 + 1]


# --- The queue's limit ----------------------------------------------------------------------------


def test_limit_is_read_again_before_a_message_is_rejected_for_its_size() -> None:
    requests = Requests(limit=1000)
    requests.queue.limit = 3000
    # Seconds that pass, the message's size, its outcome, and the reads of the limit so far.
    steps = [
        (0.0, 2000, "m", 1),
        (4.9, 2000, "m", 1),
        (0.1, 2000, "s", 2),
        (4.9, 3500, "m", 2),
        (0.1, 3500, "m", 3),
    ]
    for passed, size, outcome, reads in steps:
        requests.now += passed
        requests.submit(size)
        requests.end_all()
        assert (requests.outcomes[-1], requests.queue.reads) == (outcome, reads), (passed, size)
    assert "the queue takes 3000." in requests.error().message


def test_unknown_limit_lets_sqs_decide() -> None:
    requests = Requests(limit=FAILURES["denied"][0], calls=8)
    assert requests.publisher.problem == "sqs:GetQueueAttributes failed: AccessDenied"
    for size in (0, 2000):
        requests.submit(size)
    requests.end_call(1, failure="too large")
    requests.end_all()
    assert requests.outcomes == "sm"
    assert requests.queue.reads == 1
    requests.queue.limit = 1000
    requests.now += 5
    requests.submit(2000)
    assert (requests.outcomes, requests.publisher.problem) == ("smm", None)


def test_read_of_the_limit_is_made_in_the_executor() -> None:
    requests = Requests()
    requests.now += 5
    requests.publisher.refresh_limit()
    requests.publisher.refresh_limit()
    assert requests.queue.reads == 1
    requests.tasks.run_submitted()
    assert requests.queue.reads == 2
