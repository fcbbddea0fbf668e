"""Clients under load: each posts one message after the other and notes every answer."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from conftest import BODY, WAIT, eventually
from fake_aws import FakeAws

_numbers = itertools.count()


@dataclass
class Failure:
    """A request without an answer."""

    error: str
    first: bool  # on its connection: it may never have left the listener's backlog
    part: bytes  # of an answer


@dataclass
class Load:
    """`with` it, the clients run in a thread until `requests` are sent, or `stop` is called.

    A client keeps its connection as long as the service does, and sends the next request as soon as
    it has the answer to the last, whatever that is.
    """

    port: int
    clients: int = 64
    requests: int | None = None
    body: bytes = BODY
    hold_new_connections: bool = False
    not_connected: int = 0
    sent: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    acknowledged: dict[str, str] = field(default_factory=dict)  # request id -> message id
    failures: list[Failure] = field(default_factory=list)
    answers: list[tuple[float, float, int]] = field(default_factory=list)  # end, seconds, status
    retry_after: Counter[str] = field(default_factory=Counter)  # the header of 503 answers

    def __enter__(self) -> Load:
        self._stopped = False
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._stopped = True
        self.wait()

    def wait(self, seconds: float = 300) -> None:
        self._thread.join(seconds)
        assert not self._thread.is_alive(), "a client waits for ever"

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(self.clients):
                group.create_task(self._client())

    def _more(self) -> bool:
        return not self._stopped and (self.requests is None or self.sent < self.requests)

    async def _client(self) -> None:
        connected = False
        while self._more() and not (connected and self.hold_new_connections):
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            except OSError:
                self.not_connected += 1
                await asyncio.sleep(0.02)
                continue
            connected = True
            try:
                await self._converse(reader, writer)
            finally:
                writer.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first = True
        while self._more():
            self.sent += 1
            request_id = f"load-{next(_numbers)}"
            head = (
                "POST /process HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                f"X-Request-Id: {request_id}\r\nContent-Length: {len(self.body)}\r\n\r\n"
            )
            begin, received = time.monotonic(), b""
            try:
                async with asyncio.timeout(WAIT):
                    writer.write(head.encode() + self.body)
                    received = await reader.readuntil(b"\r\n\r\n")
                    status = int(received[9:12])
                    lines = received.decode().split("\r\n")[1:-2]
                    headers = dict(line.lower().split(": ", 1) for line in lines)
                    content = await reader.readexactly(int(headers["content-length"]))
            except (OSError, EOFError) as error:
                part = getattr(error, "partial", b"") or received
                self.failures.append(Failure(type(error).__name__, first, part))
                return
            self._note(request_id, status, headers, json.loads(content), begin)
            first = False
            if headers.get("connection") == "close":
                return

    def _note(
        self, request_id: str, status: int, headers: dict[str, str], answer: Any, begin: float
    ) -> None:
        now = time.monotonic()
        self.statuses[status] += 1
        self.answers.append((now, now - begin, status))
        if status == 200:
            self.acknowledged[request_id] = answer["message_id"]
        else:
            self.errors[answer["error"]] += 1
        if status == 503:
            self.retry_after[headers.get("retry-after", "none")] += 1

    def wait_for(self, number: int, status: int = 200) -> None:
        """Until the clients have got as many answers of the status more."""
        wanted = self.statuses[status] + number
        eventually(lambda: self.statuses[status] >= wanted)


@dataclass
class Ledger:
    """What the clients were told, beside what the queue took."""

    sent: int
    statuses: dict[int, int]
    unanswered: int
    acknowledged: int
    lost: list[str]  # acknowledged, but not in the queue
    in_queue: int
    twice: int  # messages that are in the queue more than once

    @classmethod
    def of(cls, fake: FakeAws, *loads: Load) -> Ledger:
        taken = Counter(message["attributes"]["RequestId"] for message in fake.messages())
        ids = {m["message_id"]: m["attributes"]["RequestId"] for m in fake.messages()}
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
