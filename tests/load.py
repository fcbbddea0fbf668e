"""Clients under load: each sends one message after the other and records every response."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException

from client import BODY, WAIT
from fake_aws import FakeAws
from service import eventually

_numbers = itertools.count()


@dataclass
class Failure:
    """A request without a complete response."""

    first: bool  # on its connection: it may never have left the listener's backlog
    part: bytes  # of a response


@dataclass
class Load:
    """`with` it, clients in threads send until there are `requests`, or until `stop` is called.

    A client keeps its connection as long as the service does, and sends its next request as soon as
    it has the response to the last.
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
    responses: list[tuple[float, float, int]] = field(default_factory=list)  # end, seconds, status

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

    def wait(self) -> None:
        eventually(lambda: not any(thread.is_alive() for thread in self._threads), seconds=300)

    def wait_for(self, number: int, status: int = 200) -> None:
        """Wait until the clients have got as many more responses with the status."""
        wanted = self.statuses[status] + number
        eventually(lambda: self.statuses[status] >= wanted)

    def _has_more(self) -> bool:
        return not self._stopped and (self.requests is None or self.sent < self.requests)

    def _client(self) -> None:
        connected = False
        while self._has_more() and not (connected and self.hold_new_connections):
            with closing(HTTPConnection("127.0.0.1", self.port, timeout=WAIT)) as connection:
                try:
                    connection.connect()
                except OSError:
                    time.sleep(0.02)
                    continue
                connected = True
                self._use(connection)

    def _use(self, connection: HTTPConnection) -> None:
        """Send one request after the other, until the connection ends."""
        first = True
        while self._has_more() and connection.sock:
            with self._lock:
                self.sent += 1
            request_id = f"load-{next(_numbers)}"
            headers = {"Content-Type": "application/json", "X-Request-Id": request_id}
            begin = time.monotonic()
            try:
                connection.request("POST", "/process", self.body, headers)
                response = connection.getresponse()
                body = json.loads(response.read())
            except (OSError, HTTPException, ValueError) as error:
                # A ConnectionError comes before the first byte of a response.
                part = b"" if isinstance(error, ConnectionError) else repr(error).encode()
                self.failures.append(Failure(first, part))
                return
            first, now = False, time.monotonic()
            with self._lock:
                self.statuses[response.status] += 1
                self.responses.append((now, now - begin, response.status))
                if response.status == 200:
                    self.acknowledged[request_id] = body["message_id"]


@dataclass
class LoadReport:
    """The responses that the clients got, compared with the messages in the queue."""

    sent: int
    statuses: dict[int, int]
    without_response: int
    acknowledged: int
    lost: list[str]  # acknowledged, but not in the queue
    in_queue: int
    twice: int  # messages that are in the queue more than once

    @classmethod
    def of(cls, fake_aws: FakeAws, *loads: Load) -> LoadReport:
        messages = fake_aws.messages()
        queued = Counter(message["attributes"]["RequestId"] for message in messages)
        ids = {m["message_id"]: m["attributes"]["RequestId"] for m in messages}
        acknowledged = {k: v for load in loads for k, v in load.acknowledged.items()}
        return cls(
            sent=sum(load.sent for load in loads),
            statuses=dict(sum((load.statuses for load in loads), Counter[int]())),
            without_response=sum(len(load.failures) for load in loads),
            acknowledged=len(acknowledged),
            lost=[r for r, message_id in acknowledged.items() if ids.get(message_id) != r],
            in_queue=sum(queued.values()),
            twice=sum(count > 1 for count in queued.values()),
        )

    def __str__(self) -> str:
        responses = ", ".join(f"{n:,} x {status}" for status, n in sorted(self.statuses.items()))
        return (
            f"{self.sent:,} sent; {responses or 'no response'}; "
            f"{self.without_response:,} without a response; "
            f"{self.acknowledged:,} acknowledged, {len(self.lost)} of them lost; "
            f"{self.in_queue:,} in the queue, {self.twice:,} twice"
        )
