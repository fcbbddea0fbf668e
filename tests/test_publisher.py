"""The publisher under any interleaving of requests, answers and failures.

Requests are real threads. A scripted SQS holds every call until the script lets it end, so each
step happens in a known state and nothing sleeps.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter
from functools import partial
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
    "refused": (aws_error("InvalidParameterValue", 400), False),
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

    def send_message_batch(self, QueueUrl: str, Entries: list[Any]) -> dict[str, Any]:  # noqa: N803
        assert QueueUrl.startswith(QUEUE)
        call = self._hold(Call(Entries, single=False))
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
        assert call.end.wait(20), "the script forgot a call"
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
    """The client for one message while SQS is down."""

    def __init__(self, queue: Queue) -> None:
        self.send_message = partial(queue.send_message, probe=True)


class Requests:
    """Requests that publish, each in a thread of its own."""

    def __init__(
        self, calls: int = 8, fifo: bool = False, seconds: float = 60, threads: int = 1000
    ) -> None:
        self.queue = Queue()
        self.now = 0.0
        self.publisher = app.Publisher(
            self.queue,
            Probe(self.queue),
            QUEUE + (".fifo" if fifo else ""),
            calls,
            threads,
            clock=self.clock,
            pause=lambda _: None,
            jitter=lambda: 0.5,
        )
        self.publisher.SECONDS = seconds  # type: ignore[misc]
        self.publisher.limit.bytes()
        self.answers: dict[str, list[Any]] = {}
        self.threads: list[threading.Thread] = []

    def clock(self) -> float:
        with self.queue.changed:
            self.queue.changed.notify_all()  # a request is about to wait
        return self.now

    def submit(self, size: int = 0) -> str:
        body = json.dumps(f"{len(self.threads)}".ljust(max(size, 2) - 2))
        self.answers[body] = []
        thread = threading.Thread(target=self._publish, args=(body,), daemon=True)
        self.threads.append(thread)
        thread.start()
        self.settle()
        return body

    def _publish(self, body: str) -> None:
        answer: Any = "its thread ended"
        try:
            answer = self.publisher.publish(app.Message(body, request_id="r"))
        except app.Refusal as refusal:
            answer = refusal
        except ThreadEnds:
            pass
        finally:
            with self.queue.changed:
                self.answers[body].append(answer)
                self.queue.changed.notify_all()

    def settle(self) -> None:
        """Wait until every request has an answer, or waits for a call that the script holds."""

        def is_settled() -> bool:
            with self.publisher._lock:
                known = {body for body, answers in self.answers.items() if answers}
                known |= {pending.entry["MessageBody"] for pending in self.publisher._waiting}
                known |= {e["MessageBody"] for call in self.queue.calls for e in call.entries}
                held = len(self.queue.calls) == self.publisher._under_way
                return held and known == set(self.answers)

        end = time.monotonic() + 20
        # Not under the condition: the publisher looks at the clock while it holds its lock. So a
        # change just before the wait is seen a little later.
        while not is_settled():
            with self.queue.changed:
                self.queue.changed.wait(0.002)
            assert time.monotonic() < end or is_settled(), "a request is stranded"

    def end_call(
        self, number: int = 0, failure: str = "", results: list[str] | None = None
    ) -> Call:
        call = self.queue.calls[number]
        call.failure, call.results = failure, results or []
        call.end.set()
        with self.queue.changed:
            assert self.queue.changed.wait_for(lambda: call not in self.queue.calls, 20)
        self.settle()
        return call

    def end_all(self) -> None:
        while self.queue.calls:
            self.end_call()
        for thread in self.threads:
            thread.join(20)
            assert not thread.is_alive(), "a request waits for ever"


def bodies(call: Call) -> list[str]:
    return [entry["MessageBody"] for entry in call.entries]


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
    assert requests.publisher._under_way == requests.publisher._in_flight == 0
    assert not requests.publisher._waiting


def size_of(entry: dict[str, Any]) -> int:
    return len(entry["MessageBody"]) + sum(
        len(name) + len(value["DataType"]) + len(value["StringValue"])
        for name, value in entry["MessageAttributes"].items()
    )


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
    max_examples=200,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    steps=st.lists(STEPS, min_size=5, max_size=60),
    burst=st.sampled_from([0, 0, 3, 12, 25, 40]),
    calls=st.sampled_from([1, 2, 8]),
    threads=st.sampled_from([2, 12, 100]),
    fifo=st.booleans(),
    seconds=st.sampled_from([60, 60, 60, 1.5, 0]),
)
def test_any_interleaving_and_any_failures_keep_every_promise(
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


OVERHEAD = size_of(app.Message("", "r").entry(fifo=False)[0])  # of the attributes


def sizes(requests: Requests) -> list[int]:
    """Messages in each call made so far."""
    return [len(call.entries) for call in requests.queue.made]


def submit_many(requests: Requests, count: int, size: int = 0) -> list[str]:
    return [requests.submit(size) for _ in range(count)]


def test_message_that_finds_no_call_under_way_goes_at_once_by_send_message() -> None:
    requests = Requests()
    for count in (1, 2, 3):
        requests.submit()
        assert sizes(requests) == [1] * count
        assert requests.end_call().single


@pytest.mark.parametrize(
    ("calls", "fifo", "messages", "made"),
    [
        (8, False, 10, [1]),
        (8, False, 11, [1, 10]),
        (8, False, 20, [1, 10]),
        (8, False, 71, [1, 10, 10, 10, 10, 10, 10, 10]),
        (8, False, 99, [1, 10, 10, 10, 10, 10, 10, 10]),
        (2, False, 30, [1, 10]),
        (1, False, 30, [1]),
        (8, True, 30, [1]),
    ],
)
def test_further_calls_start_for_full_batches_up_to_the_limit(
    calls: int, fifo: bool, messages: int, made: list[int]
) -> None:
    requests = Requests(calls, fifo)
    submit_many(requests, messages)
    assert sizes(requests) == made
    requests.end_all()
    assert_kept(requests)


@pytest.mark.parametrize(
    ("threads", "messages", "made"),
    [(1, 1, [1]), (2, 2, [1, 1]), (3, 3, [1, 2]), (8, 8, [1, 7]), (12, 12, [1, 10, 1])],
)
def test_further_call_starts_when_every_thread_has_a_message_so_that_none_could_join(
    threads: int, messages: int, made: list[int]
) -> None:
    requests = Requests(threads=threads)
    submit_many(requests, messages - 1)
    assert sizes(requests) == made[:-1] or threads == 1
    requests.submit()
    assert sizes(requests) == made
    requests.end_all()
    assert_kept(requests)


def test_messages_that_come_during_a_call_go_together_in_the_next() -> None:
    requests = Requests(calls=1)
    sent = submit_many(requests, 26)
    requests.end_all()
    assert sizes(requests) == [1, 10, 10, 5]
    assert [body for call in requests.queue.made for body in bodies(call)] == sent


def test_batch_ends_before_the_byte_limit() -> None:
    requests = Requests(calls=1)
    for size in (0, 300_000, 300_000, 300_000, 300_000, LIMIT - OVERHEAD, 0, 0):
        requests.submit(size)
    requests.end_all()
    assert sizes(requests) == [1, 3, 1, 1, 2]
    assert_kept(requests)


def test_batch_of_exactly_the_byte_limit_is_one_call() -> None:
    requests = Requests(calls=1)
    for size in (0, LIMIT // 2, LIMIT // 2, 0):
        requests.submit(size - OVERHEAD)
    requests.end_all()
    assert sizes(requests) == [1, 2, 1]


# --- Failures -------------------------------------------------------------------------------------


def outcomes_so_far(requests: Requests) -> str:
    """One letter for each request: s(ent), q(ueue_unavailable), m(essage_too_large), e(nded); a
    blank for one without an answer."""
    return "".join(
        given[0].code[0]
        if given and isinstance(given[0], app.Refusal)
        else {"id-": "s", "its": "e"}[given[0][:3]]
        if given
        else " "
        for given in requests.answers.values()
    )


def outcomes(requests: Requests) -> str:
    found = outcomes_so_far(requests)
    assert " " not in found
    return found


# Requests come while one call is under way, so all but the first share a batch. The results of its
# entries, what becomes of the requests, and the sizes of the calls made.
PARTIAL = [
    ([SENT, SENT, SENT], "ssss", [1, 3]),
    ([SENT, FAULT, SENT], "ssqs", [1, 3]),
    ([SENT, BUSY, SENT], "ssss", [1, 3, 1]),
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
def test_call_that_fails_is_made_three_times_for_all_its_messages(failure: str) -> None:
    requests = Requests(calls=1)
    submit_many(requests, 4)
    requests.end_call()
    for _ in range(3):
        requests.end_call(failure=failure)
    assert not requests.queue.calls
    assert outcomes(requests) == "sqqq"
    assert sizes(requests) == [1, 3, 3, 3]


def test_message_is_not_tried_again_after_its_time() -> None:
    requests = Requests(calls=1)
    submit_many(requests, 3)
    requests.now += 61
    requests.end_call(failure="server error")
    requests.end_all()
    assert outcomes(requests)[0] == "q"


def test_messages_of_a_refused_batch_go_alone_so_that_one_cannot_fail_the_others() -> None:
    requests = Requests(calls=1)
    _, innocent, guilty, *_ = submit_many(requests, 4)
    requests.end_call()
    requests.end_call(failure="refused")
    requests.submit()  # does not share a call with one that may be the guilty one
    while requests.queue.calls:
        call = requests.queue.calls[0]
        requests.end_call(failure="refused" if guilty in bodies(call) else "")
    assert outcomes(requests) == "ssqss"
    assert sizes(requests) == [1, 3, 1, 1, 1, 1]
    assert innocent in [body for body, _ in requests.queue.taken]
    assert_kept(requests)


def test_batch_that_is_refused_whatever_its_messages_is_not_tried_again() -> None:
    requests = Requests(calls=1)
    submit_many(requests, 4)
    requests.end_call()
    requests.end_call(failure="denied")
    assert outcomes(requests) == "sqqq"
    assert sizes(requests) == [1, 3]


def test_message_that_is_tried_again_takes_none_along_that_is_to_stay_alone() -> None:
    requests = Requests(calls=2)
    submit_many(requests, 11)
    requests.end_call(number=1, failure="refused")
    assert sizes(requests) == [1, 10, 1]
    requests.end_call(number=0, failure="server error")
    assert sizes(requests) == [1, 10, 1, 1]
    requests.end_all()
    assert outcomes(requests) == "s" * 11
    assert_kept(requests)


def test_message_of_a_refused_batch_stays_alone_when_sqs_is_busy_the_next_time() -> None:
    requests = Requests(calls=1)
    submit_many(requests, 3)
    requests.end_call()
    requests.end_call(failure="refused")
    requests.end_call()
    requests.submit()
    requests.end_call(failure="server error")
    requests.end_all()
    assert outcomes(requests) == "ssss"
    assert sizes(requests) == [1, 2, 1, 1, 1, 1]


def test_queue_whose_limit_was_lowered_refuses_the_large_message_alone() -> None:
    requests = Requests(calls=1)
    text = "One or more parameters are invalid. Reason: Message must be shorter than 1024 bytes."
    submit_many(requests, 3)
    requests.end_call()
    FAILURES["too large"] = aws_error("InvalidParameterValue", 400, text), False
    requests.end_call(failure="too large")
    requests.end_call(failure="too large")
    requests.end_all()
    assert outcomes(requests) == "sms"


def test_message_is_tried_again_within_five_seconds_and_no_longer() -> None:
    assert app.Publisher.SECONDS == 5
    requests = Requests(calls=1, seconds=5)
    submit_many(requests, 2)
    requests.now += 4.9
    requests.end_call(failure="server error")
    requests.now += 0.1
    requests.end_call(failure="server error")
    assert outcomes_so_far(requests)[0] == "q"
    requests.end_all()


def test_request_is_answered_before_the_pause_for_messages_of_others() -> None:
    requests = Requests(calls=1)
    submit_many(requests, 3)
    requests.end_call()
    paused, go_on = threading.Event(), threading.Event()

    def pause(_: float) -> None:
        paused.set()
        assert go_on.wait(20)

    requests.publisher._pause = pause
    call = requests.queue.calls[0]
    call.results = [SENT, BUSY]
    call.end.set()
    assert paused.wait(20)
    requests.threads[1].join(20)
    assert outcomes_so_far(requests) == "ss "
    go_on.set()
    requests.threads[2].join(0)
    requests.settle()
    requests.end_all()
    assert outcomes(requests) == "sss"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_thread_that_ends_in_the_pause_strands_nobody() -> None:
    requests = Requests(calls=1)
    submit_many(requests, 3)
    requests.end_call()

    def pause(_: float) -> None:
        requests.publisher._pause = lambda _: None
        raise ThreadEnds

    requests.publisher._pause = pause
    requests.end_call(failure="server error")
    assert outcomes(requests) == "seq"
    requests.submit()
    requests.end_all()
    assert outcomes(requests) == "seqs"
    assert_kept(requests)


def test_outcome_of_a_request_that_gave_up_is_not_changed_by_a_late_answer() -> None:
    requests = Requests(calls=1)
    pending = app.Pending({}, 0, 0.0)
    pending.wake.acquire()
    gave_up = app.Refusal("queue_unavailable")
    for outcome in (gave_up, "id-1"):
        requests.publisher._end(pending, outcome)
    assert pending.outcome is gave_up


def test_call_that_does_not_come_back_does_not_hold_up_the_others() -> None:
    requests = Requests(calls=3)
    submit_many(requests, 3)
    assert sizes(requests) == [1]
    requests.now += app.Publisher.STALL_SECONDS
    requests.submit()  # looks after the others, too
    assert sizes(requests) == [1, 3]
    submit_many(requests, 2)
    assert sizes(requests) == [1, 3]
    requests.now += app.Publisher.STALL_SECONDS
    wait_for_sizes(requests, [1, 3, 2])
    requests.end_call(number=1)
    requests.end_all()
    assert outcomes(requests) == "s" * 6
    assert_kept(requests)


def wait_for_sizes(requests: Requests, made: list[int]) -> None:
    """Nothing but time, which has passed by the requests' clock, brings them about."""
    with requests.queue.changed:
        assert requests.queue.changed.wait_for(lambda: sizes(requests) == made, 20)


def test_message_that_waited_for_the_last_call_that_may_start_sees_that_it_has_ended() -> None:
    requests = Requests(calls=2)
    submit_many(requests, 12)
    requests.now += 0.1
    requests.end_call(number=1)
    assert sizes(requests) == [1, 10]
    requests.now += app.Publisher.STALL_SECONDS
    wait_for_sizes(requests, [1, 10, 1])
    requests.end_all()
    assert outcomes(requests) == "s" * 12


def test_message_to_be_tried_again_does_not_wait_for_a_call_that_does_not_come_back() -> None:
    requests = Requests(calls=8)
    submit_many(requests, 3)
    requests.now += app.Publisher.STALL_SECONDS
    wait_for_sizes(requests, [1, 2])
    requests.now += app.Publisher.STALL_SECONDS
    requests.submit()
    assert sizes(requests) == [1, 2, 1]
    requests.end_call(number=1, results=[SENT, BUSY])
    assert sizes(requests) == [1, 2, 1]
    requests.now += app.Publisher.STALL_SECONDS
    wait_for_sizes(requests, [1, 2, 1, 1])
    requests.end_all()
    assert outcomes(requests) == "ssss"
    assert_kept(requests)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_thread_that_ends_in_its_call_strands_nobody() -> None:
    requests = Requests(calls=1)
    submit_many(requests, 14)
    requests.end_call()
    requests.end_call(failure="thread ends")
    requests.end_all()
    assert outcomes(requests) == "s" + "e" + "q" * 9 + "sss"
    assert_kept(requests)


def test_message_that_waits_too_long_is_refused_and_never_sent() -> None:
    requests = Requests(calls=1, seconds=0)
    first, late = requests.submit(), requests.submit()
    requests.threads[1].join(20)
    requests.end_all()
    assert outcomes(requests) == "sq"
    assert [body for body, _ in requests.queue.taken] == [first]
    assert late not in [body for call in requests.queue.made for body in bodies(call)]


def test_request_whose_time_ends_while_another_sends_its_message_gets_503() -> None:
    requests = Requests(calls=1, seconds=0.2)
    submit_many(requests, 3)
    requests.end_call()
    call = requests.queue.calls[0]
    requests.now += 1
    requests.threads[2].join(20)
    assert len(bodies(call)) == 2
    requests.end_all()
    assert outcomes(requests) == "ssq"
    assert_kept(requests)


def test_message_whose_time_ends_just_before_it_would_wait_again_is_not_sent_again() -> None:
    requests = Requests(calls=1, seconds=0.2)
    submit_many(requests, 3)
    requests.end_call()
    settle = requests.publisher._settle

    def settle_slowly(*arguments: Any) -> list[app.Pending]:
        again = settle(*arguments)
        requests.now += 1
        requests.threads[2].join(20)
        return again

    requests.publisher._settle = settle_slowly  # type: ignore[method-assign]
    requests.end_call(results=[SENT, BUSY])
    requests.end_all()
    assert outcomes(requests) == "ssq"
    assert sizes(requests) == [1, 2]
    assert_kept(requests)


def test_message_whose_time_ends_in_the_pause_before_the_next_attempt_is_not_sent_again() -> None:
    requests = Requests(calls=1, seconds=0.2)
    submit_many(requests, 3)
    requests.end_call()

    def pause(_: float) -> None:
        requests.now += 1
        requests.threads[2].join(20)

    requests.publisher._pause = pause
    requests.end_call(failure="no answer")
    requests.end_all()
    assert outcomes(requests) == "ssq"
    assert sizes(requests) == [1, 2, 1]


def test_request_that_is_handed_a_batch_in_the_moment_when_its_time_ends_sends_it() -> None:
    requests = Requests(calls=1, seconds=0.1)
    lose_patience, out_of_time = requests.publisher._lose_patience, threading.Barrier(4)

    def lose_it_late(pending: app.Pending) -> None:
        out_of_time.wait(20)  # all three are,
        out_of_time.wait(20)  # and the batch was handed on
        lose_patience(pending)

    requests.publisher._lose_patience = lose_it_late  # type: ignore[method-assign]
    submit_many(requests, 4)
    requests.now += 1
    out_of_time.wait(20)
    requests.queue.calls[0].end.set()
    requests.threads[0].join(20)
    out_of_time.wait(20)
    for thread in requests.threads[2:]:
        thread.join(20)
    requests.settle()
    requests.end_all()
    assert outcomes(requests) == "ssqq"
    assert_kept(requests)


def test_fifo_queue_gets_messages_in_the_order_of_their_requests() -> None:
    requests = Requests(calls=8, fifo=True)
    sent = submit_many(requests, 30)
    requests.end_call(failure="server error")
    requests.end_all()
    assert [body for body, _ in requests.queue.taken] == sent


# --- Failing fast ---------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", ["no answer", "no connection"])
def test_call_that_times_out_ends_the_waiting_and_is_tried_once_more_as_the_probe(
    failure: str,
) -> None:
    requests = Requests(calls=1)
    submit_many(requests, 4)
    requests.end_call(failure=failure)
    assert outcomes_so_far(requests) == " qqq"  # nobody waits for an SQS that may be down
    assert sizes(requests) == [1, 1]
    requests.end_call()
    assert outcomes(requests) == "sqqq"
    requests.submit()
    requests.end_all()
    assert outcomes(requests) == "sqqqs"  # one answer, and all is as before


def test_call_that_times_out_while_another_is_answered_is_tried_again_and_refuses_nobody() -> None:
    requests = Requests(threads=2)
    submit_many(requests, 2)
    requests.now += 1
    requests.end_call(number=1)
    requests.now += 2
    requests.end_call(failure="no answer")
    requests.submit()
    requests.end_all()
    assert outcomes(requests) == "sss"


def test_call_that_hangs_still_does_not_keep_the_probe_from_being_sent() -> None:
    requests = Requests(threads=2)
    submit_many(requests, 2)
    requests.now = 0.3
    requests.end_call(number=1)
    requests.now = 0.31
    requests.submit()
    requests.now = 3.0
    requests.end_call(failure="no answer")  # SQS has answered since: it is not down yet
    requests.now = 3.31
    requests.end_call(failure="no answer")
    assert [call.probe for call in requests.queue.calls] == [False, True]
    requests.submit()  # one probe at a time
    assert outcomes_so_far(requests) == " s q"
    requests.end_call(number=1)
    assert outcomes_so_far(requests) == " ssq"
    requests.submit()
    requests.end_all()
    assert outcomes(requests) == "sssqs"
    assert_kept(requests)


def down() -> Requests:
    """SQS has timed out twice; the clock stands at 0."""
    requests = Requests(calls=8, threads=2)
    requests.submit()
    requests.end_call(failure="no answer")
    requests.end_call(failure="no answer")
    assert outcomes(requests) == "q"
    return requests


def test_while_sqs_is_down_messages_are_refused_at_once_and_one_at_a_time_is_tried() -> None:
    requests = down()
    assert sizes(requests) == [1, 1]
    requests.submit()
    assert outcomes(requests) == "qq"
    requests.now += app.Circuit.PROBE_SECONDS
    requests.submit()
    assert sizes(requests) == [1, 1, 1]
    submit_many(requests, 2)
    assert outcomes_so_far(requests) == "qq qq"
    requests.end_call(failure="no answer")
    assert outcomes(requests) == "qqqqq"  # the probe's request does not wait for another try
    submit_many(requests, 2)
    assert sizes(requests) == [1, 1, 1]
    requests.now += app.Circuit.PROBE_SECONDS
    requests.submit()
    requests.end_call()
    submit_many(requests, 2)
    assert sizes(requests) == [1] * 6
    requests.end_all()
    assert outcomes(requests) == "qqqqqqqsss"
    assert_kept(requests)


@pytest.mark.parametrize(("answer", "sent"), [("denied", "q"), ("", "s")])
def test_any_answer_of_sqs_ends_the_refusing(answer: str, sent: str) -> None:
    requests = down()
    requests.now += app.Circuit.PROBE_SECONDS
    requests.submit()
    requests.end_call(failure=answer)
    requests.submit()
    requests.end_all()
    assert outcomes(requests) == f"q{sent}s"


@pytest.mark.parametrize("failure", ["server error", "throttled", "garbled"])
@pytest.mark.parametrize("failures", [9, 10])
def test_ten_failed_calls_in_a_row_count_as_down(failure: str, failures: int) -> None:
    requests = Requests()
    for _ in range(failures // 3):
        requests.submit()
        for _ in range(3):
            requests.end_call(failure=failure)
    if failures % 3:
        requests.submit()
        requests.end_call(failure=failure)
        requests.end_call(failure=failure)
    else:
        requests.submit()
        requests.end_call()
    before = len(requests.queue.made)
    requests.submit()
    assert (len(requests.queue.made) == before) == (failures == 10)
    requests.end_all()


def test_success_between_failures_keeps_the_circuit_closed() -> None:
    requests = Requests()
    for _ in range(app.Circuit.FAILURES + 1):
        requests.submit()
        requests.end_call(failure="server error")
        assert not requests.publisher._circuit.open
        requests.end_call()
    assert outcomes(requests) == "s" * (app.Circuit.FAILURES + 1)


def test_going_down_and_coming_back_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    requests = down()
    requests.now += 30
    requests.submit()
    requests.end_call()
    logged = [(r.levelno, r.getMessage()) for r in caplog.records if "SQS is" in r.getMessage()]
    assert logged == [
        (logging.ERROR, "SQS is down; refused until it answers"),
        (logging.WARNING, "SQS is back"),
    ]
    assert caplog.records[-1].seconds == 30  # type: ignore[attr-defined]


# --- Logs -----------------------------------------------------------------------------------------


def test_failed_calls_are_logged_once_each_with_cause_and_number_of_messages(
    caplog: pytest.LogCaptureFixture,
) -> None:
    requests = Requests(calls=1)
    submit_many(requests, 4)
    requests.end_call()
    requests.end_call(failure="throttled")
    requests.end_call(results=[SENT, FAULT, BUSY])
    requests.end_all()
    logged = [(r.levelno, r.cause, r.messages) for r in caplog.records]  # type: ignore[attr-defined]
    throttled = str(FAILURES["throttled"][0])
    assert logged[0] == (logging.WARNING, throttled, 3)
    assert [(level, count) for level, _, count in logged[1:]] == [
        (logging.ERROR, 1),
        (logging.WARNING, 1),
    ]
    assert all(name in logged[1][1] + logged[2][1] for name in (FAULT, BUSY))


def test_message_whose_request_has_given_up_is_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    requests = Requests(calls=1, seconds=0.2)
    submit_many(requests, 3)
    requests.end_call()
    requests.now += 1
    requests.threads[2].join(20)
    requests.end_call(failure="server error")
    assert outcomes(requests) == "sqq"
    logged = [(r.getMessage(), r.messages) for r in caplog.records]  # type: ignore[attr-defined]
    assert logged == [("messages not sent", 2)]


# --- Seeing the queue -----------------------------------------------------------------------------


class HeldQueue:
    """An SQS whose first GetQueueAttributes ends when the test says so, and fails or not."""

    def __init__(self, fails: bool) -> None:
        self.fails, self.asked = fails, 0
        self.begun, self.end = threading.Event(), threading.Event()

    def get_queue_attributes(self, **_: Any) -> dict[str, Any]:
        self.asked += 1
        self.begun.set()
        assert self.end.wait(20)
        if self.fails:
            raise FAILURES["no answer"][0]
        return {"Attributes": {"MaximumMessageSize": str(LIMIT)}}


@pytest.mark.parametrize("fails", [False, True])
def test_requests_that_wait_for_the_first_sight_of_the_queue_share_its_result(fails: bool) -> None:
    queue, refused = HeldQueue(fails), list[bool]()
    limit = app.QueueLimit(queue, QUEUE)

    def check() -> None:
        try:
            limit.bytes()
        except app.Refusal:
            refused.append(True)
        else:
            refused.append(False)

    threads = [threading.Thread(target=check) for _ in range(5)]
    threads[0].start()
    assert queue.begun.wait(20)
    lock, waiting = limit._lock, threading.Semaphore(0)

    class CountingLock:
        """Tells when a thread is about to wait for the lock."""

        release = staticmethod(lock.release)

        @staticmethod
        def acquire(blocking: bool) -> bool:
            waiting.release()
            return lock.acquire(blocking)

    limit._lock = CountingLock()  # type: ignore[assignment]
    for thread in threads[1:]:
        thread.start()
        assert waiting.acquire(timeout=20)
    queue.end.set()
    for thread in threads:
        thread.join(20)
    assert queue.asked == 1
    assert refused == [fails] * 5
