"""A fast fake of SSM, SQS and STS over real HTTP, whose faults can be changed while it runs.

`python tests/fake_aws.py` prints its URL and serves until SIGTERM; tests and the benchmark
start it with the class FakeAws. One asyncio protocol and no framework: it must not limit a
measurement. Besides the services it serves /control:

  PUT     change the settings that the JSON object names (attributes of Behavior); "faults" maps an
          operation, a service or "*" to a fault, and the most exact name counts:
            {"kind": "delay", "seconds": 1}     the response comes that much later
            {"kind": "hang"}                    no response; the connection closes when the fault
                                                ends or, with "for_good", never
            {"kind": "reset"}                   the connection is reset, nothing is accepted
            {"kind": "lost_response"}           accepted, but the connection is reset
            {"kind": "error", "status": 500, "code": "InternalFailure"}
            {"kind": "garbage"}                 200 with a body that is no JSON
            {"kind": "trickle"}                 a response that never ends, byte by byte
            {"kind": "huge"}                    200 with a body of 8 MiB
            {"kind": "fail_entries"}            of a batch
          Each takes "share", from 0 to 1: of the calls, or with fail_entries of a batch's entries.
  GET     the numbers of calls, hung calls and accepted messages; /control/messages: the messages
  DELETE  forget these
"""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import json
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import uuid
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

REGION, ACCOUNT, QUEUE = "us-west-1", "000000000000", "dev-CP-queue"
PARAMETER, TOKEN = "/email-service/api-token", "$DJISA<$#45ex3RtYr"
MAX_BATCH_ENTRIES, MAX_BYTES = 10, 1_048_576


@dataclass
class Behavior:
    """The settings that PUT /control changes."""

    parameters: dict[str, str] = field(default_factory=lambda: {PARAMETER: TOKEN})
    latency_ms: float = 0
    record: bool = True  # keep the messages, not only their number
    faults: dict[str, dict[str, Any]] = field(default_factory=dict)


class AwsError(Exception):
    """An error response. SQS names it twice: by its JSON shape and by its older query code."""

    def __init__(self, shape: str, message: str, code: str = "", status: int = 400) -> None:
        super().__init__(shape)
        self.status = status
        self.body = json.dumps({"__type": shape, "message": message}).encode()
        fault = "Sender" if status < 500 else "Receiver"
        self.header = f"x-amzn-query-error: {code or shape.rpartition('#')[2]};{fault}\r\n"


def message_bytes(entry: dict[str, Any]) -> int:
    """The size by SQS's count: the body, and the attributes' names, types and values."""
    return len(entry["MessageBody"].encode()) + sum(
        len(name) + len(value["DataType"]) + len(value["StringValue"].encode())
        for name, value in entry.get("MessageAttributes", {}).items()
    )


class Services:
    """An operation is the method of its name: JSON objects in and out, but XML from STS."""

    def __init__(self) -> None:
        self.behavior = Behavior()
        self.random = random.Random(1)
        self.forget()

    def forget(self) -> None:
        self.calls: Counter[str] = Counter()
        self.hung = 0
        self.accepted = 0
        self.messages: list[dict[str, Any]] = []

    def fault_of(self, service: str, operation: str) -> dict[str, Any]:
        faults = self.behavior.faults
        return faults.get(operation) or faults.get(service) or faults.get("*") or {}

    def happens(self, fault: dict[str, Any]) -> bool:
        return self.random.random() < float(fault.get("share", 1))

    # --- SSM ---

    def AmazonSSM_GetParameter(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"Parameter": self._parameter(given["Name"], given)}

    def AmazonSSM_GetParameters(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        known = self.behavior.parameters
        return {
            "Parameters": [self._parameter(n, given) for n in given["Names"] if n in known],
            "InvalidParameters": [name for name in given["Names"] if name not in known],
        }

    def _parameter(self, name: str, given: dict[str, Any]) -> dict[str, Any]:
        value = self.behavior.parameters[name] if given.get("WithDecryption") else "encrypted"
        return {"Name": name, "Type": "SecureString", "Value": value}

    # --- STS ---

    def AmazonSTS_AssumeRoleWithWebIdentity(self, _: dict[str, Any]) -> str:  # noqa: N802
        name, credentials = "AssumeRoleWithWebIdentity", ("AccessKeyId", "SecretAccessKey")
        keys = "".join(f"<{key}>test</{key}>" for key in (*credentials, "SessionToken"))
        return (
            f"<{name}Response><{name}Result><Credentials>{keys}"
            f"<Expiration>2099-01-01T00:00:00Z</Expiration></Credentials></{name}Result></{name}Response>"
        )

    # --- SQS ---

    def AmazonSQS_GetQueueAttributes(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        self._check_queue(given)
        assert given["AttributeNames"] == ["MaximumMessageSize"]
        return {"Attributes": {"MaximumMessageSize": str(MAX_BYTES)}}

    def AmazonSQS_SendMessage(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        self._check_queue(given)
        return self._accept(given, 1)

    def AmazonSQS_SendMessageBatch(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        self._check_queue(given)
        entries = given["Entries"]
        if not 1 <= len(entries) <= MAX_BATCH_ENTRIES:
            raise AwsError("com.amazonaws.sqs#TooManyEntriesInBatchRequest", "")
        if len({entry["Id"] for entry in entries}) < len(entries):
            raise AwsError("com.amazonaws.sqs#BatchEntryIdsNotDistinct", "")
        if sum(map(message_bytes, entries)) > MAX_BYTES:
            raise AwsError("com.amazonaws.sqs#BatchRequestTooLong", "")
        fault = self.fault_of("SQS", "SendMessageBatch")
        result: dict[str, Any] = {"Successful": [], "Failed": []}
        for entry in entries:
            if fault.get("kind") == "fail_entries" and self.happens(fault):
                failed = {"Id": entry["Id"], "Code": "InternalError", "SenderFault": False}
                result["Failed"].append(failed)
            else:
                sent = {"Id": entry["Id"], **self._accept(entry, len(entries))}
                result["Successful"].append(sent)
        return {name: results for name, results in result.items() if results}

    def _check_queue(self, given: dict[str, Any]) -> None:
        if not given["QueueUrl"].endswith(f"/{QUEUE}"):
            code = "AWS.SimpleQueueService.NonExistentQueue"
            raise AwsError("com.amazonaws.sqs#QueueDoesNotExist", "No such queue.", code)

    def _accept(self, entry: dict[str, Any], batch_size: int) -> dict[str, Any]:
        self.accepted += 1
        body, message_id = entry["MessageBody"], str(uuid.uuid4())
        if self.behavior.record:
            attributes = entry.get("MessageAttributes", {})
            message = {
                "message_id": message_id,
                "body": body,
                "attributes": {n: value["StringValue"] for n, value in attributes.items()},
                "trace_header": entry.get("MessageSystemAttributes", {})
                .get("AWSTraceHeader", {})
                .get("StringValue"),
                "batch_size": batch_size,
            }
            self.messages.append(message)
        # The SDK for JavaScript checks the digest.
        digest = hashlib.md5(body.encode(), usedforsecurity=False).hexdigest()
        return {"MessageId": message_id, "MD5OfMessageBody": digest}


_content_length = re.compile(rb"\r\ncontent-length:\s*([0-9]+)", re.IGNORECASE).search
_target = re.compile(rb"\r\nx-amz-target:\s*Amazon(\w+)\.(\w+)", re.IGNORECASE).search


class AwsConnection(asyncio.Protocol):
    """HTTP/1.1 with kept-alive connections; requests are served one after the other."""

    hanging: set[AwsConnection] = set()  # noqa: RUF012 - of all connections together

    def __init__(self, services: Services) -> None:
        self.services = services
        self.loop = asyncio.get_running_loop()
        self.buffer = b""
        self.busy = False  # a request waits for its response
        self.operation = ("", "")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport

    def connection_lost(self, _: Exception | None) -> None:
        self.hanging.discard(self)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        self.serve()

    def serve(self) -> None:
        if not self.busy and (head_end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = self.buffer[:head_end]
            length = _content_length(head)
            end = head_end + 4 + (int(length[1]) if length else 0)
            if len(self.buffer) < end:
                return
            body, self.buffer = self.buffer[head_end + 4 : end], self.buffer[end:]
            self.busy = True
            if target := _target(head):
                self.operation = target[1].decode(), target[2].decode()
                self.call(*self.operation, body)
            elif b"Action=AssumeRoleWithWebIdentity" in body:
                self.operation = "STS", "AssumeRoleWithWebIdentity"
                self.call(*self.operation, b"{}")
            else:
                method, path, _ = head.decode("latin-1").split(" ", 2)
                self.respond(200, json.dumps(self.control(method, path, body)).encode())

    def call(self, service: str, operation: str, given: bytes) -> None:
        """Respond to a call, or do what the fault says instead."""
        self.services.calls[operation] += 1
        fault = self.services.fault_of(service, operation)
        kind = fault.get("kind")
        if kind and kind != "fail_entries" and not self.services.happens(fault):
            kind = None
        if kind == "hang":
            self.services.hung += 1
            if not fault.get("for_good"):
                self.hanging.add(self)
            return
        if kind == "trickle":
            self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n")
            self.trickle()
            return
        status, body, header = 200, b"<html>This is no JSON", ""
        try:
            if kind == "error":
                text = fault.get("message", "A fault of the fake.")
                raise AwsError(fault["code"], text, status=fault["status"])
            if kind == "huge":
                body = bytes(2**23)
            elif kind not in ("reset", "garbage"):
                method = getattr(self.services, f"Amazon{service}_{operation}")
                result = method(json.loads(given))
                body = (result if isinstance(result, str) else json.dumps(result)).encode()
        except AwsError as error:
            status, body, header = error.status, error.body, error.header
        delay = self.services.behavior.latency_ms / 1000
        delay += fault["seconds"] if kind == "delay" else 0
        if kind in ("reset", "lost_response"):
            self.loop.call_later(delay, self.reset)
            return
        if delay:
            self.loop.call_later(delay, self.respond, status, body, header)
        else:
            self.respond(status, body, header)

    def trickle(self) -> None:
        if not self.transport.is_closing():
            self.transport.write(b" ")
            self.loop.call_later(0.05, self.trickle)

    def respond(self, status: int, body: bytes, header: str = "") -> None:
        head = (
            f"HTTP/1.1 {status} {http.client.responses.get(status, 'Status')}\r\n"
            f"Content-Type: application/x-amz-json-1.0\r\nContent-Length: {len(body)}\r\n"
            f"x-amzn-RequestId: {uuid.uuid4()}\r\n{header}\r\n"
        )
        if not self.transport.is_closing():
            self.transport.write(head.encode() + body)
        self.busy = False
        self.serve()  # the next request, if the client has sent one

    def reset(self) -> None:
        """Close with RST instead of FIN."""
        if not self.transport.is_closing():
            sock = self.transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.abort()

    def control(self, method: str, path: str, body: bytes) -> Any:
        services = self.services
        if method == "DELETE":
            services.forget()
        elif method == "PUT":
            vars(services.behavior).update(json.loads(body))
            for connection in list(self.hanging):
                if services.fault_of(*connection.operation).get("kind") != "hang":
                    connection.transport.abort()
        elif path == "/control/messages":
            return services.messages
        return {name: getattr(services, name) for name in ("calls", "hung", "accepted")}


class FakeAws:
    """Runs the fake in a process: `with FakeAws() as fake_aws`."""

    def __enter__(self) -> FakeAws:
        command = [sys.executable, __file__]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        self.url = self.process.stdout.readline().strip()
        self.queue_url = f"{self.url}/{ACCOUNT}/{QUEUE}"
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()

    def variables(self) -> dict[str, str]:
        """The variables that point the service, or any AWS SDK, at the fake."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_REGION": REGION,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1",
            "SQS_QUEUE_URL": self.queue_url,
            "TOKEN_SSM_PARAMETER": PARAMETER,
        }

    def set(self, **changes: Any) -> None:
        """Change settings: set(latency_ms=8, faults={"SQS": {"kind": "hang"}})."""
        Behavior(**changes)  # rejects unknown names
        self._control("PUT", changes)

    def counts(self) -> dict[str, Any]:
        return dict(self._control("GET"))

    def calls(self, operation: str) -> int:
        """How many calls have begun."""
        return int(self.counts()["calls"].get(operation, 0))

    def hung(self) -> int:
        """How many calls got no response, because of the fault "hang"."""
        return int(self.counts()["hung"])

    def messages(self) -> list[dict[str, Any]]:
        return list(self._control("GET", path="/control/messages"))

    def forget(self) -> None:
        self._control("DELETE")

    def _control(self, method: str, changes: Any = None, path: str = "/control") -> Any:
        # Not urllib, which would use a proxy that the environment names.
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=30)
        try:
            connection.request(method, path, json.dumps(changes))
            return json.loads(connection.getresponse().read())
        finally:
            connection.close()


async def serve() -> None:
    loop, stopped, services = asyncio.get_running_loop(), asyncio.Event(), Services()
    for stop_signal in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(stop_signal, stopped.set)
    server = await loop.create_server(lambda: AwsConnection(services), "127.0.0.1", 0, backlog=1024)
    host, port = server.sockets[0].getsockname()
    print(f"http://{host}:{port}", flush=True)
    await stopped.wait()
    server.close()


if __name__ == "__main__":
    asyncio.run(serve())
