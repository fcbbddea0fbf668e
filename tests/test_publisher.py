"""The publisher under any interleaving of requests, answers and failures.

Requests are real threads that call publish(). A scripted SQS holds every call until the script lets
it end, and the clock moves when the script moves it, so each step happens in a known state.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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


class ThreadEnds(BaseException):
    """What no handler of the application catches."""


# How a call ends: what is raised in the leader's thread, and whether SQS has taken the messages.
FAILURES: dict[str, tuple[BaseException, bool]] = {
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
    "thread ends": (ThreadEnds(), False),
}
SENT, FAULT, BUSY, LEFT_OUT = "sent", "sender fault", "service busy", "not in the answer"
NAMELESS = "sent without a MessageId"


@dataclass(eq=False)
class Call:
    entries: list[dict[str, Any]]
    single: bool
    probe: bool  # made by the client with less patience
    end: threading.Event = field(default_factory=threading.Event)
    failure: str = ""
    results: list[str] = field(default_factory=list)  # in turn; entries beyond it are sent

    @property
    def bodies(self) -> list[str]:
        return [entry["MessageBody"] for entry in self.entries]


class Queue:
    """An SQS whose calls end when the script says so; it knows what it took."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.calls: list[Call] = []  # under way
        self.made: list[Call] = []
        self.taken: list[tuple[str, str]] = []  # (body, MessageId)
        self.ambiguous: set[str] = set()  # taken, but the answer says otherwise

    def get_queue_attributes(self, **_: Any) -> dict[str, Any]:
        return {"Attributes": {"MaximumMessageSize": str(LIMIT)}}

    def send_message(self, probe: bool = False, **entry: Any) -> dict[str, Any]:
        assert entry.pop("QueueUrl").startswith(QUEUE)
        call = self._hold(Call([entry], single=True, probe=probe))
        if call.results[:1] in ([FAULT], [BUSY]):
            raise aws_error("InvalidMessageContents", 400 if call.results[0] == FAULT else 503)
        return {} if call.results[:1] == [LEFT_OUT] else {"MessageId": self._take(entry)}

    def send_message_batch(self, probe: bool = False, **batch: Any) -> dict[str, Any]:
        assert batch["QueueUrl"].startswith(QUEUE)
        call = self._hold(Call(batch["Entries"], single=False, probe=probe))
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

    def _hold(self, call: Call) -> Call:
        with self.changed:
            self.calls.append(call)
            self.made.append(call)
        assert call.end.wait(60), "the script forgot a call"
        with self.changed:
            self.calls.remove(call)
            self.changed.notify_all()
        if call.failure:
            error, taken = FAILURES[call.failure]
            for entry in call.entries if taken else []:
                self.ambiguous.add(entry["MessageBody"])
                self._take(entry)
            raise error
        return call

    def _take(self, entry: dict[str, Any]) -> str:
        with self.changed:
            message_id = f"id-{len(self.taken)}"
            self.taken.append((entry["MessageBody"], message_id))
        return message_id


class Requests:
    """Requests that publish, each in a thread of its own."""

    def __init__(
        self, calls: int = 1, fifo: bool = False, seconds: float = 60, threads: int = 1000
    ) -> None:
        self.queue = Queue()
        self.now = 0.0
        self.looks = Counter[str]()  # how often a request's thread has looked at the clock
        self.dying: threading.Thread | None = None  # ends when it next looks at the clock
        self.pause: Callable[[], object] = lambda: None
        url = QUEUE + (".fifo" if fifo else "")
        probe = SimpleNamespace(
            send_message=partial(self.queue.send_message, probe=True),
            send_message_batch=partial(self.queue.send_message_batch, probe=True),
        )
        self.publisher = app.Publisher(
            self.queue, probe, url, calls, threads, self.clock, lambda _: self.pause()
        )
        self.publisher.SECONDS = seconds  # type: ignore[misc]
        self.publisher.STALL_SECONDS = 0.01  # type: ignore[misc]
        self.publisher.limit.bytes()
        self.answers: dict[str, list[Any]] = {}
        self.threads: list[threading.Thread] = []

    def clock(self) -> float:
        thread = threading.current_thread()
        if thread is self.dying:
            raise ThreadEnds
        self.looks[thread.name] += 1
        return self.now

    def submit(self, size: int = 0) -> str:
        body = json.dumps(f"{len(self.threads)}".ljust(max(size, 2) - 2))
        self.answers[body] = []
        thread = threading.Thread(target=self._publish, args=(body,), name=body, daemon=True)
        self.threads.append(thread)
        thread.start()
        self.settle()
        return body

    def _publish(self, body: str) -> None:
        answer: Any = "its thread ended"
        try:
            answer = self.publisher.publish(
                app.Message(body, request_id=f"request-{body[1:-1].strip()}")
            )
        except app.ApiError as refusal:
            answer = refusal
        except ThreadEnds:
            pass
        self.answers[body].append(answer)

    def settle(self) -> None:
        """Wait until nothing more happens by itself: each request has its answer, makes a call that
        the script holds, or has looked twice without any change.
        """
        end = time.monotonic() + 60
        while True:
            before, looks = self._state(), self.looks.copy()
            while not all(
                answers or body in self._held() or self.looks[body] >= looks[body] + 4
                for body, answers in self.answers.items()
            ):
                assert time.monotonic() < end, "a request is stranded"
                time.sleep(0.0005)
            if self._state() == before:
                return

    def _held(self) -> set[str]:
        return {body for call in list(self.queue.calls) for body in call.bodies}

    def _state(self) -> object:
        answered = sum(map(len, self.answers.values()))
        return len(self.queue.made), len(self.queue.calls), answered

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.settle()

    def end_call(
        self, number: int = 0, failure: str = "", results: list[str] | None = None
    ) -> None:
        call = self.queue.calls[number]
        call.failure, call.results = failure, results or []
        call.end.set()
        with self.queue.changed:
            assert self.queue.changed.wait_for(lambda: call not in self.queue.calls, 60)
        self.settle()

    def end_all(self) -> None:
        while self.queue.calls:
            self.end_call()
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive(), "a request waits for ever"

    @property
    def outcomes(self) -> str:
        """A letter for each: s(ent), or how its refusal's code begins; a blank for none yet."""
        return "".join(
            " " if not given else given[0].code[0] if isinstance(given[0], app.ApiError) else "s"
            for given in self.answers.values()
        )

    @property
    def sizes(self) -> list[int]:
        """Messages in each call made so far."""
        return [len(call.entries) for call in self.queue.made]

    @property
    def probes(self) -> list[bool]:
        """Of each call under way, whether it is one."""
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
            requests.wait(step)
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
    """What must hold for any requests and any failures."""
    queue, ids = requests.queue, dict[str, set[str]]()
    times_taken = Counter(body for body, _ in queue.taken)
    for body, message_id in queue.taken:
        ids.setdefault(body, set()).add(message_id)
    for body, answers in requests.answers.items():
        assert len(answers) == 1, "exactly one answer"
        if isinstance(answers[0], str) and answers[0].startswith("id-"):
            assert answers[0] in ids[body], "the id of its own message"
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
    st.tuples(st.just("time goes by"), st.sampled_from([1.0, 100.0])),
)


@settings(
    derandomize=True,  # the same examples in every run
    database=None,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    steps=st.lists(STEPS, min_size=5, max_size=40),
    burst=st.sampled_from([0, 0, 3, 12, 25, 40]),
    calls=st.sampled_from([1, 2, 8]),
    threads=st.sampled_from([2, 12, 100]),
    fifo=st.booleans(),
    seconds=st.sampled_from([60, 60, 60, 1.5, 0]),
)
def test_any_interleaving_keeps_every_promise(
    steps: list[Any], burst: int, calls: int, threads: int, fifo: bool, seconds: float
) -> None:
    requests = play(burst, calls=calls, fifo=fifo, seconds=seconds, threads=threads)
    for kind, *arguments in steps:
        under_way = requests.queue.calls
        assert len(under_way) <= (1 if fifo else calls)
        if kind == "submit":
            requests.submit(*arguments)
        elif kind == "time goes by":
            requests.now += arguments[0]
        elif under_way:
            number = arguments[0] % len(under_way)
            if kind == "succeed":
                requests.end_call(number)
            elif kind == "fail":
                requests.end_call(number, failure=arguments[1])
            else:
                requests.end_call(number, results=arguments[1])
    requests.end_all()
    assert_kept(requests)


# --- Which messages share a call ------------------------------------------------------------------


def test_messages_that_come_during_a_call_share_the_next() -> None:
    requests = play(26)
    requests.end_all()
    assert requests.sizes == [1, 10, 10, 5]
    assert [body for call in requests.queue.made for body in call.bodies] == list(requests.answers)


@pytest.mark.parametrize(
    ("calls", "fifo", "messages", "made"),
    [(8, False, 10, [1]), (8, False, 21, [1, 10, 10]), (2, False, 31, [1, 10]), (8, True, 31, [1])],
)
def test_full_batches_start_further_calls_up_to_the_limit(
    calls: int, fifo: bool, messages: int, made: list[int]
) -> None:
    requests = play(messages, calls=calls, fifo=fifo)
    assert requests.sizes == made
    requests.end_all()


@pytest.mark.parametrize(("threads", "made"), [(1, [1]), (2, [1, 1]), (8, [1, 7])])
def test_call_starts_when_no_further_message_could_join(threads: int, made: list[int]) -> None:
    requests = play(threads, calls=8, threads=threads)
    assert requests.sizes == made
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


def test_call_that_takes_long_holds_up_nobody_else() -> None:
    requests = play(3, 1.0, calls=8)
    assert requests.sizes == [1, 2]
    requests.end_call(1)
    assert requests.outcomes == " ss"
    requests.end_all()


def test_fifo_queue_gets_messages_in_order() -> None:
    requests = play(25, 1.0, calls=8, fifo=True, threads=2)
    requests.end_all()
    assert [body for body, _ in requests.queue.taken] == list(requests.answers)
    entries = [entry for call in requests.queue.made for entry in call.entries]
    assert {entry["MessageGroupId"] for entry in entries} == {app.SERVICE}
    assert len({entry["MessageDeduplicationId"] for entry in entries}) == 25


# --- Failures -------------------------------------------------------------------------------------

# All but the first request share a batch, as they come during its call. What is played, what then
# becomes of the requests, and the sizes of the calls.
SCENARIOS: dict[str, tuple[list[Step], str, list[int]]] = {
    "each one alone": ([1, OK, 1, OK, 1], "ss ", [1, 1, 1]),
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
    "a time-out ends the waiting": ([4, "no answer"], " qqq", [1, 1]),
    "a thread ends in its call": ([3, OK, "thread ends", 1], "ssq ", [1, 2, 1]),
}


@pytest.mark.parametrize(("steps", "outcomes", "sizes"), SCENARIOS.values(), ids=SCENARIOS)
def test_failure_ends_as_it_should(steps: list[Step], outcomes: str, sizes: list[int]) -> None:
    requests = play(*steps)
    assert (requests.outcomes, requests.sizes) == (outcomes, sizes)
    requests.end_all()
    assert requests.outcomes == outcomes.replace(" ", "s")
    assert_kept(requests)


def test_refused_batch_goes_message_by_message() -> None:
    requests = play(4, OK, "refused", 1)  # the last one shares no call with what may be guilty
    guilty = list(requests.answers)[2]
    while requests.queue.calls:
        is_guilty = guilty in requests.queue.calls[0].bodies
        requests.end_call(failure="refused" if is_guilty else "")
    assert requests.outcomes == "ssqss"
    assert requests.sizes == [1, 3, 1, 1, 1, 1]


def test_message_that_waits_too_long_is_never_sent() -> None:
    requests = play(2, 61.0)
    assert requests.outcomes == " q"
    requests.end_all()
    assert [body for body, _ in requests.queue.taken] == list(requests.answers)[:1]


def test_request_is_answered_before_the_pause_of_others() -> None:
    requests = play(3, OK)
    paused, go_on = threading.Event(), threading.Event()

    def pause() -> None:
        paused.set()
        assert go_on.wait(60)

    requests.pause = pause
    (call,) = requests.queue.calls
    call.results = [SENT, BUSY]
    call.end.set()
    assert paused.wait(60)
    requests.threads[1].join(60)
    assert requests.outcomes == "ss "
    go_on.set()
    requests.settle()
    requests.end_all()
    assert requests.outcomes == "sss"


def test_waiting_thread_that_ends_strands_nobody() -> None:
    requests = play(2, fifo=True)  # the second waits for the first one's call
    requests.dying = requests.threads[1]
    requests.threads[1].join(60)
    requests.submit()
    requests.end_all()
    assert list(requests.answers.values())[1] == ["its thread ended"]
    assert requests.outcomes == "sss"


# --- SQS is down ----------------------------------------------------------------------------------

# The first call and its probe have timed out.
DOWN: list[Step] = [1, "no answer", "no connection"]
PROBE_TIME = app.Publisher.PROBE_SECONDS


def test_one_message_at_a_time_probes_while_sqs_is_down() -> None:
    requests = play(*DOWN, 3, calls=8)
    assert (requests.outcomes, requests.probes) == ("qqqq", [])
    requests.wait(PROBE_TIME)
    for _ in range(3):
        requests.submit()
    assert (requests.outcomes, requests.probes) == ("qqqq qq", [True])
    requests.end_call(failure="no answer")
    requests.submit()
    assert (requests.outcomes, requests.probes) == ("q" * 8, [])


def test_earlier_call_that_fails_starts_no_second_probe() -> None:
    requests = play(2, "no answer", calls=8, threads=2)  # its probe begins
    assert requests.probes == [False, True]
    requests.end_call(failure="no answer")
    requests.wait(PROBE_TIME)
    requests.submit()
    assert requests.probes == [True]
    requests.end_all()


@pytest.mark.parametrize("answer", [OK, "refused"])
def test_any_answer_closes_the_circuit(answer: str) -> None:
    requests = play(*DOWN, 1.0, 1, answer, 1)
    assert requests.probes == [False]
    requests.end_all()
    assert requests.outcomes[2:] == "s"


def test_timeout_beside_an_answer_refuses_nobody() -> None:
    requests = play(2, calls=8, threads=2)
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


# --- Logs -----------------------------------------------------------------------------------------


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


def test_calls_are_counted_by_result_with_their_messages() -> None:
    def counted() -> list[float]:
        name, results = "email_processor_sqs_calls_total", ("success", "partial", "unavailable")
        values = [REGISTRY.get_sample_value(name, {"result": result}) for result in results]
        return [*values, REGISTRY.get_sample_value("email_processor_sqs_batch_size_sum")]

    before = counted()
    play(4, OK, [SENT, FAULT, BUSY], "throttled", OK)
    grown = [now - then for now, then in zip(counted(), before, strict=True)]
    assert grown == [2, 1, 1, 1 + 3 + 1 + 1]


# --- Seeing the queue -----------------------------------------------------------------------------


class Look:
    """A queue that is looked at until the end is set, and is then not there, or has its limit."""

    def __init__(self, fails: bool) -> None:
        self.fails, self.begun, self.end, self.number = (
            fails,
            threading.Event(),
            threading.Event(),
            0,
        )
        self.limit = app.QueueLimit(self, QUEUE)

    def get_queue_attributes(self, **_: Any) -> dict[str, Any]:
        self.number += 1
        self.begun.set()
        assert self.end.wait(60)
        if self.fails:
            raise FAILURES["no answer"][0]
        return {"Attributes": {"MaximumMessageSize": str(LIMIT)}}


def test_requests_share_the_first_look_at_the_queue() -> None:
    look = Look(fails=False)
    with ThreadPoolExecutor(5) as pool:
        found = [pool.submit(look.limit.bytes) for _ in range(5)]
        look.end.set()
    assert {each.result() for each in found} == {LIMIT}
    assert look.number == 1


def test_nobody_waits_for_a_queue_that_was_not_there() -> None:
    look = Look(fails=True)
    look.end.set()
    with pytest.raises(app.ApiError):
        look.limit.bytes()
    for event in (look.begun, look.end):
        event.clear()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(look.limit.bytes)
        assert look.begun.wait(60)
        other = pool.submit(look.limit.bytes)
        assert isinstance(other.exception(timeout=20), app.ApiError)
        assert not first.done()
        look.end.set()
