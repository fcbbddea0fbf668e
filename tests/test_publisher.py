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
from typing import Any

import pytest
from botocore.exceptions import ClientError, ConnectTimeoutError, ReadTimeoutError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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
NAMELESS, CAUSELESS = "sent without a MessageId", "failed without saying whose fault"


class Call:
    def __init__(self, entries: list[dict[str, Any]], single: bool, probe: bool = False) -> None:
        self.entries = entries
        self.single = single
        self.probe = probe  # made by the client with less patience
        self.end = threading.Event()
        self.failure = ""
        self.results: list[str] = []  # of the entries in turn; those beyond it are sent


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

    def send_message(
        self,
        QueueUrl: str,  # noqa: N803
        probe: bool = False,
        **entry: Any,
    ) -> dict[str, Any]:
        assert QueueUrl.startswith(QUEUE)
        call = self._hold(Call([entry], single=True, probe=probe))
        if call.results[:1] in ([FAULT], [BUSY]):
            raise aws_error("InvalidMessageContents", 400 if call.results[0] == FAULT else 503)
        return {} if call.results[:1] == [LEFT_OUT] else {"MessageId": self._take(entry)}

    def send_message_batch(
        self,
        QueueUrl: str,  # noqa: N803
        Entries: list[Any],  # noqa: N803
        probe: bool = False,
    ) -> dict[str, Any]:
        assert QueueUrl.startswith(QUEUE)
        call = self._hold(Call(Entries, single=False, probe=probe))
        answer: dict[str, Any] = {"Successful": [], "Failed": []}
        results = [*call.results, *[SENT] * len(Entries)]
        for entry, result in zip(Entries, results, strict=False):
            if result == SENT:
                message_id = self._take(entry)
                answer["Successful"].insert(0, {"Id": entry["Id"], "MessageId": message_id})
            elif result == NAMELESS:
                answer["Successful"].append({"Id": entry["Id"]})
            elif result == CAUSELESS:
                answer["Failed"].append({"Id": entry["Id"], "Code": result})
            elif result != LEFT_OUT:
                failed = {"Id": entry["Id"], "SenderFault": result == FAULT, "Code": result}
                answer["Failed"].append(failed)
        return answer

    def _hold(self, call: Call) -> Call:
        with self.changed:
            self.calls.append(call)
            self.made.append(call)
            self.changed.notify_all()
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


class Probe:
    """The client with less time for a call, for while SQS is down."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue

    def send_message(self, **given: Any) -> dict[str, Any]:
        return self._queue.send_message(probe=True, **given)

    def send_message_batch(self, **given: Any) -> dict[str, Any]:
        return self._queue.send_message_batch(probe=True, **given)


class Requests:
    """Requests that publish, each in a thread of its own."""

    def __init__(
        self, calls: int = 8, fifo: bool = False, seconds: float = 60, threads: int = 1000
    ) -> None:
        self.queue = Queue()
        self.now = 0.0
        self.looks = Counter[str]()  # how often a request's thread has looked at the clock
        url = QUEUE + (".fifo" if fifo else "")
        probe = Probe(self.queue)
        self.publisher = app.Publisher(
            self.queue, probe, url, calls, threads, clock=self.clock, pause=lambda _: None
        )
        self.publisher.SECONDS = seconds  # type: ignore[misc]
        self.publisher.STALL_SECONDS = 0.01  # type: ignore[misc]
        self.publisher.limit.bytes()
        self.answers: dict[str, list[Any]] = {}
        self.threads: list[threading.Thread] = []

    def clock(self) -> float:
        self.looks[threading.current_thread().name] += 1
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
        except app.Refusal as refusal:
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
        return {entry["MessageBody"] for call in list(self.queue.calls) for entry in call.entries}

    def _state(self) -> object:
        answered = sum(map(len, self.answers.values()))
        return len(self.queue.made), len(self.queue.calls), answered

    def end_call(
        self, number: int = 0, failure: str = "", results: list[str] | None = None
    ) -> Call:
        call = self.queue.calls[number]
        call.failure, call.results = failure, results or []
        call.end.set()
        with self.queue.changed:
            assert self.queue.changed.wait_for(lambda: call not in self.queue.calls, 60)
        self.settle()
        return call

    def end_all(self) -> None:
        while self.queue.calls:
            self.end_call()
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive(), "a request waits for ever"


def bodies(call: Call) -> list[str]:
    return [entry["MessageBody"] for entry in call.entries]


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
        entries = [{k: v for k, v in entry.items() if k != "Id"} for entry in call.entries]
        assert 1 <= len(entries) <= 10
        assert call.single == (len(entries) == 1)
        assert sum(size_of(entry) for entry in entries) <= LIMIT
        assert len(set(bodies(call))) == len(entries), "no message twice in a batch"
        if not call.single:
            assert len({entry["Id"] for entry in call.entries}) == len(entries)
    attempts = Counter(body for call in queue.made for body in bodies(call))
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
    requests = Requests(calls, fifo, seconds, threads)
    for _ in range(burst):
        requests.submit()
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


OVERHEAD = size_of(app.Message("", "request-0").entry(fifo=False)[0])  # of the attributes


def sizes(requests: Requests) -> list[int]:
    """Messages in each call made so far."""
    return [len(call.entries) for call in requests.queue.made]


def submit_many(requests: Requests, count: int) -> list[str]:
    return [requests.submit() for _ in range(count)]


def outcomes(requests: Requests) -> str:
    """A letter for each request: s(ent), or how its refusal's code begins; a blank for none yet."""
    return "".join(
        " " if not given else given[0].code[0] if isinstance(given[0], app.Refusal) else "s"
        for given in requests.answers.values()
    )


def test_message_that_comes_alone_goes_at_once() -> None:
    requests = Requests()
    for count in (1, 2, 3):
        requests.submit()
        assert sizes(requests) == [1] * count
        assert requests.end_call().single


def test_messages_that_come_during_a_call_share_the_next() -> None:
    requests = Requests(calls=1)
    sent = submit_many(requests, 26)
    requests.end_all()
    assert sizes(requests) == [1, 10, 10, 5]
    assert [body for call in requests.queue.made for body in bodies(call)] == sent


@pytest.mark.parametrize(
    ("calls", "fifo", "messages", "made"),
    [(8, False, 10, [1]), (8, False, 21, [1, 10, 10]), (2, False, 31, [1, 10]), (8, True, 31, [1])],
)
def test_full_batches_start_further_calls_up_to_the_limit(
    calls: int, fifo: bool, messages: int, made: list[int]
) -> None:
    requests = Requests(calls, fifo)
    submit_many(requests, messages)
    assert sizes(requests) == made
    requests.end_all()
    assert_kept(requests)


@pytest.mark.parametrize(("threads", "made"), [(1, [1]), (2, [1, 1]), (8, [1, 7])])
def test_call_starts_when_no_further_message_could_join(threads: int, made: list[int]) -> None:
    requests = Requests(threads=threads)
    submit_many(requests, threads)
    assert sizes(requests) == made
    requests.end_all()


def test_batch_ends_at_the_byte_limit() -> None:
    requests = Requests(calls=1)
    half = LIMIT // 2 - OVERHEAD
    for size in (0, 300_000, 300_000, 300_000, 300_000, LIMIT - OVERHEAD - 2, half, half - 2, 0):
        requests.submit(size)
    requests.end_all()
    assert sizes(requests) == [1, 3, 1, 1, 2, 1]
    assert_kept(requests)


def test_call_that_takes_long_holds_up_nobody_else() -> None:
    requests = Requests()
    submit_many(requests, 3)
    assert sizes(requests) == [1]
    requests.now += 1
    requests.settle()
    assert sizes(requests) == [1, 2]
    requests.end_call(1)
    assert outcomes(requests) == " ss"
    requests.end_all()


def test_fifo_queue_gets_messages_in_order() -> None:
    requests = Requests(fifo=True, threads=2)
    sent = submit_many(requests, 25)
    requests.now += 1
    requests.settle()
    requests.end_all()
    assert [body for body, _ in requests.queue.taken] == sent
    entries = [entry for call in requests.queue.made for entry in call.entries]
    assert {entry["MessageGroupId"] for entry in entries} == {app.SERVICE}
    assert len({entry["MessageDeduplicationId"] for entry in entries}) == 25


# --- Failures -------------------------------------------------------------------------------------


# Requests come while one call is under way, so all but the first share a batch. The results of its
# entries, what becomes of the requests, and the sizes of the calls made.
PARTIAL = [
    ([SENT, FAULT, SENT], "ssqs", [1, 3]),
    ([BUSY, BUSY, SENT], "ssss", [1, 3, 2]),
    ([LEFT_OUT, SENT, SENT], "ssss", [1, 3, 1]),
    ([NAMELESS, SENT, SENT], "ssss", [1, 3, 1]),
    ([SENT, CAUSELESS, SENT], "ssss", [1, 3, 1]),
    ([FAULT, FAULT, FAULT], "sqqq", [1, 3]),
    ([FAULT, BUSY, LEFT_OUT], "sqss", [1, 3, 2]),
]


@pytest.mark.parametrize(("results", "expected", "made"), PARTIAL)
def test_entry_that_fails_fails_alone(results: list[str], expected: str, made: list[int]) -> None:
    requests = Requests(calls=1)
    submit_many(requests, 4)
    requests.end_call()
    requests.end_call(results=results)
    requests.end_all()
    assert outcomes(requests) == expected
    assert sizes(requests) == made
    assert_kept(requests)


@pytest.mark.parametrize("failure", ["server error", "throttled", "too many", "garbled"])
def test_call_that_fails_is_made_three_times(failure: str) -> None:
    requests = Requests(calls=1)
    submit_many(requests, 4)
    requests.end_call()
    for _ in range(3):
        requests.end_call(failure=failure)
    assert not requests.queue.calls
    assert outcomes(requests) == "sqqq"
    assert sizes(requests) == [1, 3, 3, 3]


def test_refused_batch_goes_message_by_message() -> None:
    requests = Requests(calls=1)
    _, _, guilty, _ = submit_many(requests, 4)
    requests.end_call()
    requests.end_call(failure="refused")
    requests.submit()  # shares no call with one that may be guilty
    while requests.queue.calls:
        call = requests.queue.calls[0]
        requests.end_call(failure="refused" if guilty in bodies(call) else "")
    assert outcomes(requests) == "ssqss"
    assert sizes(requests) == [1, 3, 1, 1, 1, 1]
    assert_kept(requests)


@pytest.mark.parametrize("failure", ["denied", "no queue"])
def test_refusal_of_caller_or_queue_is_final(failure: str) -> None:
    requests = Requests(calls=1)
    submit_many(requests, 4)
    requests.end_call()
    requests.end_call(failure=failure)
    assert outcomes(requests) == "sqqq"
    assert sizes(requests) == [1, 3]


def test_queue_with_a_lowered_limit_refuses_the_large_message_alone() -> None:
    requests = Requests(calls=1)
    submit_many(requests, 3)
    requests.end_call()
    requests.end_call(failure="too large")
    requests.end_call(failure="too large")
    requests.end_all()
    assert outcomes(requests) == "sms"


def test_message_is_tried_again_within_its_time_only() -> None:
    requests = Requests(calls=1)
    requests.submit()
    requests.now += 59
    requests.end_call(failure="server error")
    requests.now += 1
    requests.end_call(failure="server error")
    assert not requests.queue.calls
    assert outcomes(requests) == "q"


def test_message_that_waits_too_long_is_never_sent() -> None:
    requests = Requests(calls=1)
    _, late = submit_many(requests, 2)
    requests.now += 61
    requests.settle()
    assert outcomes(requests) == " q"
    requests.end_all()
    assert late not in [body for body, _ in requests.queue.taken]
    assert outcomes(requests) == "sq"


def test_request_in_a_call_waits_for_its_end() -> None:
    requests = Requests(calls=1)
    requests.submit()
    requests.now += 61
    requests.settle()
    assert outcomes(requests) == " "
    requests.end_call()
    assert outcomes(requests) == "s"


def test_request_is_answered_before_the_pause_of_others() -> None:
    requests = Requests(calls=1)
    paused, go_on = threading.Event(), threading.Event()

    def pause(_: float) -> None:
        paused.set()
        assert go_on.wait(60)

    submit_many(requests, 3)
    requests.end_call()
    requests.publisher._pause = pause
    call = requests.queue.calls[0]
    call.results = [SENT, BUSY]
    call.end.set()
    assert paused.wait(60)
    requests.threads[1].join(60)
    assert outcomes(requests) == "ss "
    go_on.set()
    requests.settle()
    requests.end_all()
    assert outcomes(requests) == "sss"


def test_thread_that_ends_in_its_call_strands_nobody() -> None:
    requests = Requests(calls=1)
    submit_many(requests, 3)
    requests.end_call()
    requests.end_call(failure="thread ends")
    requests.submit()
    requests.end_all()
    assert outcomes(requests)[2:] == "qs"


def test_waiting_thread_that_ends_strands_nobody() -> None:
    requests = Requests(fifo=True)
    submit_many(requests, 2)  # the second waits for the first one's call

    def look() -> float:
        if threading.current_thread() is requests.threads[1]:
            raise ThreadEnds
        return requests.now

    requests.publisher._clock = look
    requests.threads[1].join(60)
    requests.publisher._clock = requests.clock
    requests.submit()
    requests.end_all()
    assert list(requests.answers.values())[1] == ["its thread ended"]
    assert outcomes(requests) == "sss"


# --- SQS is down ----------------------------------------------------------------------------------


def down() -> Requests:
    """Requests to an SQS that is known to be down: the first call and its probe have timed out."""
    requests = Requests()
    requests.submit()
    requests.end_call(failure="no answer")
    assert requests.queue.calls[0].probe
    requests.end_call(failure="no connection")
    assert not requests.queue.calls
    assert outcomes(requests) == "q"
    return requests


def test_call_that_times_out_ends_the_waiting() -> None:
    requests = Requests(calls=1)
    submit_many(requests, 4)
    requests.end_call(failure="no answer")
    assert outcomes(requests) == " qqq"
    assert requests.queue.calls[0].probe
    requests.end_all()
    assert outcomes(requests) == "sqqq"


def test_one_message_at_a_time_probes_while_sqs_is_down() -> None:
    requests = down()
    submit_many(requests, 3)
    assert not requests.queue.calls
    requests.now += requests.publisher.PROBE_SECONDS
    submit_many(requests, 3)
    assert [call.probe for call in requests.queue.calls] == [True]
    assert outcomes(requests) == "qqqq qq"
    requests.end_call(failure="no answer")
    submit_many(requests, 2)
    assert not requests.queue.calls
    assert outcomes(requests) == "q" * 9


def test_earlier_call_that_fails_starts_no_second_probe() -> None:
    requests = Requests(threads=2)
    submit_many(requests, 2)
    requests.end_call(0, failure="no answer")  # its probe begins
    assert [call.probe for call in requests.queue.calls] == [False, True]
    requests.end_call(0, failure="no answer")
    requests.now += requests.publisher.PROBE_SECONDS
    requests.submit()
    assert [call.probe for call in requests.queue.calls] == [True]
    requests.end_all()


@pytest.mark.parametrize("failure", ["", "refused"])
def test_any_answer_closes_the_circuit(failure: str) -> None:
    requests = down()
    requests.now += 1
    requests.submit()
    requests.end_call(failure=failure)
    requests.submit()
    requests.end_call()
    assert outcomes(requests)[2:] == "s"
    assert not requests.queue.made[-1].probe


def test_timeout_beside_an_answer_refuses_nobody() -> None:
    requests = Requests(threads=2)
    submit_many(requests, 2)
    requests.end_call(1)
    requests.end_call(0, failure="no answer")
    assert not requests.queue.calls[0].probe
    requests.end_all()
    assert outcomes(requests) == "ss"


@pytest.mark.parametrize("failure", ["server error", "throttled"])
def test_ten_failed_calls_in_a_row_open_the_circuit(failure: str) -> None:
    requests = Requests()
    for _ in range(3):
        requests.submit()
        for _ in range(3):
            requests.end_call(failure=failure)
    requests.submit()
    requests.end_call(failure=failure)
    assert requests.queue.calls[0].probe
    requests.end_call(failure=failure)
    requests.submit()
    assert outcomes(requests) == "qqqqq"
    assert not requests.queue.calls


def test_success_between_failures_keeps_the_circuit_closed() -> None:
    requests = Requests()
    for _ in range(10):
        requests.submit()
        requests.end_call(failure="server error")
        requests.end_call(failure="server error")
        requests.end_call()
    assert outcomes(requests) == "s" * 10


# --- Logs -----------------------------------------------------------------------------------------


def test_outage_is_logged_at_its_beginning_and_end(caplog: pytest.LogCaptureFixture) -> None:
    requests = down()
    requests.now += 30
    requests.submit()
    requests.end_call()
    levels = [r.levelno for r in caplog.records if "SQS is" in r.getMessage()]
    assert levels == [logging.ERROR, logging.WARNING]
    assert caplog.records[-1].seconds == 30  # type: ignore[attr-defined]


def test_failed_call_is_logged_with_its_request_ids(caplog: pytest.LogCaptureFixture) -> None:
    requests = Requests(calls=1)
    submit_many(requests, 4)
    requests.end_call()
    requests.end_call(failure="throttled")
    requests.end_call(results=[SENT, FAULT, BUSY])
    requests.end_all()
    logged: list[Any] = caplog.records
    assert [(line.levelno, line.request_ids) for line in logged] == [
        (logging.WARNING, ["request-1", "request-2", "request-3"]),
        (logging.ERROR, ["request-2"]),
        (logging.WARNING, ["request-3"]),
    ]
    causes = (str(FAILURES["throttled"][0]), FAULT, BUSY)
    assert all(cause in line.cause for cause, line in zip(causes, logged, strict=True))


# --- Seeing the queue -----------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_requests_share_the_first_look_at_the_queue(fails: bool) -> None:
    asked, end, refused = list[int](), threading.Event(), list[bool]()

    class HeldQueue:
        def get_queue_attributes(self, **_: Any) -> dict[str, Any]:
            asked.append(1)
            assert end.wait(60)
            if fails:
                raise FAILURES["no answer"][0]
            return {"Attributes": {"MaximumMessageSize": str(LIMIT)}}

    limit = app.QueueLimit(HeldQueue(), QUEUE)

    def check() -> None:
        try:
            limit.bytes()
        except app.Refusal:
            refused.append(True)
        else:
            refused.append(False)

    threads = [threading.Thread(target=check) for _ in range(5)]
    for thread in threads:
        thread.start()
    end.set()
    for thread in threads:
        thread.join(60)
    assert refused == [fails] * 5
    if not fails:
        assert len(asked) == 1
