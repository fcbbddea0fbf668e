"""Clients under load: each posts one message after the other and notes every answer."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import Any

from client import BODY
from fake_aws import FakeAws
from service import WAIT, eventually

_numbers = itertools.count()


@dataclass
class Failure:
    """A request without an answer."""

    error: str
    first: bool  # on its connection: it may never have left the listener's backlog
    part: bytes  # of an answer


@dataclass
class Load:
    """`with` it, the clients run in threads until `requests` are sent, or `stop` is called.

    A client keeps its connection as long as the service does, and sends the next request as soon as
    it has the answer to the last, whatever that is.
    """

    port: int
    clients: int = 64
    requests: int | None = None
    body: bytes = BODY
    hold_new_connections: bool = False
    sent: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    acknowledged: dict[str, str] = field(default_factory=dict)  # request id -> message id
    failures: list[Failure] = field(default_factory=list)
    answers: list[tuple[float, float, int]] = field(default_factory=list)  # end, seconds, status
    retry_after: Counter[str] = field(default_factory=Counter)  # the header of 503 answers

    def __enter__(self) -> Load:
        self._stopped, self._lock = False, threading.Lock()
        self._threads = [threading.Thread(target=self._client) for _ in range(self.clients)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._stopped = True
        self.wait()

    def wait(self, seconds: float = 300) -> None:
        end = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0, end - time.monotonic()))
            assert not thread.is_alive(), "a client waits for ever"

    def _more(self) -> bool:
        return not self._stopped and (self.requests is None or self.sent < self.requests)

    def _client(self) -> None:
        connected = False
        while self._more() and not (connected and self.hold_new_connections):
            with closing(HTTPConnection("127.0.0.1", self.port, timeout=WAIT)) as connection:
                try:
                    connection.connect()
                except OSError:
                    time.sleep(0.02)
                    continue
                connected = True
                self._converse(connection)

    def _converse(self, connection: HTTPConnection) -> None:
        first = True
        while self._more() and connection.sock:
            with self._lock:
                self.sent += 1
            headers = {"Content-Type": "application/json", "X-Request-Id": f"load-{next(_numbers)}"}
            begin = time.monotonic()
            try:
                connection.request("POST", "/process", self.body, headers)
                response = connection.getresponse()
                answer = json.loads(response.read())
            except (OSError, HTTPException, ValueError) as error:
                # Of a connection that ends without a byte of it, there is no more to say.
                part = b"" if isinstance(error, ConnectionError) else repr(error).encode()
                self.failures.append(Failure(type(error).__name__, first, part))
                return
            self._note(headers["X-Request-Id"], response, answer, begin)
            first = False

    def _note(self, request_id: str, response: HTTPResponse, answer: Any, begin: float) -> None:
        now, status = time.monotonic(), response.status
        with self._lock:
            self.statuses[status] += 1
            self.answers.append((now, now - begin, status))
            if status == 200:
                self.acknowledged[request_id] = answer["message_id"]
            elif status == 503:
                self.retry_after[response.headers.get("Retry-After", "none")] += 1

    def wait_for(self, number: int, status: int = 200) -> None:
        """Until the clients have got as many answers of the status more."""
        wanted = self.statuses[status] + number
        eventually(lambda: self.statuses[status] >= wanted)


@dataclass
class LoadReport:
    """What the clients were told, beside what the queue took."""

    sent: int
    statuses: dict[int, int]
    unanswered: int
    acknowledged: int
    lost: list[str]  # acknowledged, but not in the queue
    in_queue: int
    twice: int  # messages that are in the queue more than once

    @classmethod
    def of(cls, fake_aws: FakeAws, *loads: Load) -> LoadReport:
        taken = Counter(message["attributes"]["RequestId"] for message in fake_aws.messages())
        ids = {m["message_id"]: m["attributes"]["RequestId"] for m in fake_aws.messages()}
        acknowledged = {k: v for load in loads for k, v in load.acknowledged.items()}
        return cls(
            sent=sum(load.sent for load in loads),
            statuses=dict(sum((load.statuses for load in loads), Counter[int]())),
            unanswered=sum(len(load.failures) for load in loads),
            acknowledged=len(acknowledged),
            lost=[r for r, message_id in acknowledged.items() if ids.get(message_id) != r],
            in_queue=sum(taken.values()),
            twice=sum(count > 1 for count in taken.values()),
        )

    def __str__(self) -> str:
        answered = ", ".join(f"{n:,} x {status}" for status, n in sorted(self.statuses.items()))
        return (
            f"{self.sent:,} sent; answered {answered or 'none'}; {self.unanswered:,} unanswered; "
            f"{self.acknowledged:,} acknowledged, {len(self.lost)} of them lost; "
            f"{self.in_queue:,} in the queue, {self.twice:,} twice"
        )
