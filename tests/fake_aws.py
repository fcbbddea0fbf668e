"""A fast fake of SSM and SQS over real HTTP, whose faults are switched while it runs.

`python tests/fake_aws.py` prints its URL, and that of /control, and serves until told to stop;
tests and the benchmark start it with the class FakeAws. One asyncio protocol and no framework: it
must never be what limits a measurement. Beside the two services it serves /control:

  PUT     change the settings that the JSON object names (attributes of Settings); "faults" maps an
          operation, "SSM", "SQS" or "*" to a fault, and the most exact name counts:
            {"kind": "delay", "seconds": 1}     answers that much later
            {"kind": "hang"}                    no answer; the connection closes when the fault ends
                                                or, with "for_good", never
            {"kind": "reset"}                   the connection is reset, nothing is accepted
            {"kind": "lost_answer"}             accepted, but the connection is reset
            {"kind": "error", "status": 500, "code": "InternalFailure"}
            {"kind": "garbage"}                 200 with a body that is no JSON
            {"kind": "trickle"}                 an answer that never ends, byte by byte
            {"kind": "huge"}                    200 with a body of 8 MiB
            {"kind": "close"}                   answers, and closes the connection a moment later
            {"kind": "fail_entries", "code": "InternalError", "sender_fault": false}
          Each takes "share", from 0 to 1: of the calls, or with fail_entries of a batch's entries.
  GET     how many calls, answers and accepted messages there were; /control/messages: the messages
  DELETE  forget these
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import http.client
import json
import random
import re
import signal
import socket
import ssl
import struct
import subprocess
import sys
import uuid
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

REGION, ACCOUNT, QUEUE = "us-west-1", "000000000000", "dev-CP-queue"
PARAMETER, TOKEN = "/email-service/api-token", "$DJISA<$#45ex3RtYr"
MAX_BATCH_ENTRIES, MAX_BATCH_BYTES = 10, 1_048_576


@dataclass
class Settings:
    """What PUT /control changes."""

    parameters: dict[str, str] = field(default_factory=lambda: {PARAMETER: TOKEN})
    queues: list[str] = field(default_factory=lambda: [QUEUE, f"{QUEUE}.fifo"])
    max_message_bytes: int = 1_048_576
    latency_ms: float = 0
    record: bool = True  # keep the messages, not only their number
    verify: bool = False  # check each signature as AWS does, with botocore's signer
    secrets: dict[str, str] = field(default_factory=lambda: {"test": "test"})  # by access key
    session_token: str = ""  # that each call must bring
    faults: dict[str, dict[str, Any]] = field(default_factory=dict)


class AwsError(Exception):
    """An error answer. SQS names it twice: by its JSON shape and by its older query code."""

    def __init__(self, shape: str, message: str, code: str = "", status: int = 400) -> None:
        super().__init__(shape)
        self.status = status
        self.body = json.dumps({"__type": shape, "message": message}).encode()
        fault = "Sender" if status < 500 else "Receiver"
        self.header = f"x-amzn-query-error: {code or shape.rpartition('#')[2]};{fault}\r\n"


def sqs_error(name: str, message: str, code: str = "") -> AwsError:
    return AwsError(f"com.amazonaws.sqs#{name}", message, code or f"AWS.SimpleQueueService.{name}")


_authorization = re.compile(
    r"AWS4-HMAC-SHA256 Credential=([^/]+)/\d{8}/([^/]+)/([^/]+)/aws4_request, ?"
    r"SignedHeaders=([^,]+), ?Signature=([0-9a-f]{64})"
).fullmatch


def check_signature(head: bytes, body: bytes, url: str, settings: Settings) -> None:
    """Raises AwsError unless botocore's signer signs what arrived in the same way."""
    request_line, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (x.partition(":") for x in lines)}
    found = _authorization(headers.get("authorization", ""))
    if not found:
        raise AwsError("MissingAuthenticationTokenException", "", status=403)
    access_key, region, service, signed, signature = found.groups()
    token = headers.get("x-amz-security-token", "")
    if access_key not in settings.secrets or token != settings.session_token:
        raise AwsError("UnrecognizedClientException", "The security token is invalid.", status=403)
    names = signed.split(";")
    needed = {"host", "x-amz-date", "x-amz-target", *(["x-amz-security-token"] if token else [])}
    path = request_line.split()[1]
    request = AWSRequest("POST", url + path, data=body, headers={n: headers[n] for n in names})
    request.context["timestamp"] = headers["x-amz-date"]
    signer = SigV4Auth(Credentials(access_key, settings.secrets[access_key]), service, region)
    text = signer.string_to_sign(request, signer.canonical_request(request))
    if not needed <= {*names} or signer.signature(text, request) != signature:
        message = "The request signature we calculated does not match the one you provided."
        raise AwsError("InvalidSignatureException", message, status=403)


# What XML 1.0 has no place for, SQS refuses.
_forbidden = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]").search


def message_bytes(entry: dict[str, Any]) -> int:
    """The size by SQS's count: the body, and the attributes' names, types and values."""
    size = len(entry["MessageBody"].encode("utf-8", "surrogatepass"))
    for name, value in entry.get("MessageAttributes", {}).items():
        size += len(name) + len(value["DataType"]) + len(value["StringValue"].encode())
    return size


def attributes_md5(attributes: dict[str, Any]) -> str:
    """The digest of string attributes as the SQS guide defines it, for clients that check it."""
    digest = hashlib.md5(usedforsecurity=False)
    for name in sorted(attributes):
        value = attributes[name]
        for number, text in enumerate((name, value["DataType"], value["StringValue"])):
            # The mark 1, "a string", stands before the value.
            data = text.encode()
            digest.update((b"\1" if number == 2 else b"") + struct.pack(">I", len(data)) + data)
    return digest.hexdigest()


class Services:
    """SSM and SQS: an operation is the method of its name, taking and returning JSON objects."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.random = random.Random(1)
        self.forget()

    def forget(self) -> None:
        self.calls: Counter[str] = Counter()
        self.answers: Counter[str] = Counter()
        self.accepted = 0
        self.messages: list[dict[str, Any]] = []
        self.deduplicated: dict[str, str] = {}

    def fault_of(self, service: str, operation: str) -> dict[str, Any]:
        faults = self.settings.faults
        return faults.get(operation) or faults.get(service) or faults.get("*") or {}

    def happens(self, fault: dict[str, Any]) -> bool:
        return self.random.random() < float(fault.get("share", 1))

    # --- SSM ---

    def AmazonSSM_GetParameter(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        if given["Name"] not in self.settings.parameters:
            raise AwsError("ParameterNotFound", "")
        return {"Parameter": self._parameter(given["Name"], given)}

    def AmazonSSM_GetParameters(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        known = self.settings.parameters
        return {
            "Parameters": [self._parameter(n, given) for n in given["Names"] if n in known],
            "InvalidParameters": [name for name in given["Names"] if name not in known],
        }

    def _parameter(self, name: str, given: dict[str, Any]) -> dict[str, Any]:
        clear = given.get("WithDecryption")
        return {
            "ARN": f"arn:aws:ssm:{REGION}:{ACCOUNT}:parameter{name}",
            "DataType": "text",
            "LastModifiedDate": 1_700_000_000.0,
            "Name": name,
            "Type": "SecureString",
            "Value": self.settings.parameters[name] if clear else "encrypted",
            "Version": 1,
        }

    # --- SQS ---

    def AmazonSQS_GetQueueAttributes(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        name = self._queue(given)
        attributes = {
            "QueueArn": f"arn:aws:sqs:{REGION}:{ACCOUNT}:{name}",
            "MaximumMessageSize": str(self.settings.max_message_bytes),
            "VisibilityTimeout": "30",
        }
        asked = given.get("AttributeNames", [])
        return {"Attributes": {n: v for n, v in attributes.items() if {n, "All"} & {*asked}}}

    def AmazonSQS_SendMessage(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        queue = self._queue(given)
        if problem := self._problem(given):
            raise problem[0]
        return self._accept(queue, given, 1)

    def AmazonSQS_SendMessageBatch(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        queue, entries = self._queue(given), given.get("Entries") or []
        if not entries:
            raise sqs_error("EmptyBatchRequest", "There should be at least one entry.")
        if len(entries) > MAX_BATCH_ENTRIES:
            limit = f"Maximum number of entries per request are {MAX_BATCH_ENTRIES}."
            message = f"{limit} You have sent {len(entries)}."
            raise sqs_error("TooManyEntriesInBatchRequest", message)
        repeated = [n for n, count in Counter(e["Id"] for e in entries).items() if count > 1]
        if repeated:
            raise sqs_error("BatchEntryIdsNotDistinct", f"Id {repeated[0]} repeated.")
        total = sum(map(message_bytes, entries))
        if total > MAX_BATCH_BYTES:
            limit = f"Batch requests cannot be longer than {MAX_BATCH_BYTES} bytes."
            raise sqs_error("BatchRequestTooLong", f"{limit} You have sent {total} bytes.")
        fault = self.fault_of("SQS", "SendMessageBatch")
        failing = fault.get("kind") == "fail_entries"
        answer: dict[str, Any] = {"Successful": [], "Failed": []}
        for entry in entries:
            problem = self._problem(entry)
            failed = {"Id": entry["Id"]}
            if problem:
                failed |= {"Code": problem[1], "Message": problem[2], "SenderFault": True}
            elif failing and self.happens(fault):
                failed |= {
                    "Code": fault.get("code", "InternalError"),
                    "Message": "A fault of the fake.",
                    "SenderFault": fault.get("sender_fault", False),
                }
            if len(failed) > 1:
                answer["Failed"].append(failed)
            else:
                sent = {"Id": entry["Id"], **self._accept(queue, entry, len(entries))}
                answer["Successful"].append(sent)
        return {name: results for name, results in answer.items() if results}

    def _queue(self, given: dict[str, Any]) -> str:
        name = str(given.get("QueueUrl", "")).rpartition("/")[2]
        if name not in self.settings.queues:
            message, code = "The specified queue does not exist.", "NonExistentQueue"
            raise sqs_error("QueueDoesNotExist", message, f"AWS.SimpleQueueService.{code}")
        return name

    def _problem(self, entry: dict[str, Any]) -> tuple[AwsError, str, str] | None:
        """Why SQS would refuse the message: the error, and its code and text in a batch."""
        if _forbidden(entry["MessageBody"]):
            code, shape = "InvalidMessageContents", "InvalidMessageContents"
            message = "Invalid characters found. Valid unicode characters are #x9 | #xA | #xD ..."
        elif message_bytes(entry) > (limit := self.settings.max_message_bytes):
            code, shape = "InvalidParameterValue", "InvalidParameterValueException"
            reason = f"Message must be shorter than {limit} bytes."
            message = f"One or more parameters are invalid. Reason: {reason}"
        else:
            return None
        return sqs_error(shape, message, code), code, message

    def _accept(self, queue: str, entry: dict[str, Any], batch_size: int) -> dict[str, Any]:
        body, attributes = entry["MessageBody"], entry.get("MessageAttributes", {})
        answer = {
            "MessageId": str(uuid.uuid4()),
            "MD5OfMessageBody": hashlib.md5(body.encode(), usedforsecurity=False).hexdigest(),
        }
        if attributes:
            answer["MD5OfMessageAttributes"] = attributes_md5(attributes)
        system = entry.get("MessageSystemAttributes", {})
        if system:
            answer["MD5OfMessageSystemAttributes"] = attributes_md5(system)
        if queue.endswith(".fifo"):
            key = entry.get("MessageDeduplicationId", answer["MessageId"])
            first = self.deduplicated.setdefault(key, answer["MessageId"])
            answer["SequenceNumber"] = f"{self.accepted:020}"
            if first != answer["MessageId"]:  # sent before: the same answer, and no new message
                return {**answer, "MessageId": first}
        self.accepted += 1
        if self.settings.record:
            message = {
                "message_id": answer["MessageId"],
                "queue": queue,
                "body": body,
                "attributes": {n: v["StringValue"] for n, v in attributes.items()},
                "system_attributes": {n: v["StringValue"] for n, v in system.items()},
                "group_id": entry.get("MessageGroupId"),
                "deduplication_id": entry.get("MessageDeduplicationId"),
                "batch_size": batch_size,
            }
            self.messages.append(message)
        return answer


_content_length = re.compile(rb"\r\ncontent-length:\s*([0-9]+)", re.IGNORECASE).search
_target = re.compile(rb"\r\nx-amz-target:\s*(\w+)\.(\w+)", re.IGNORECASE).search


class Connection(asyncio.Protocol):
    """HTTP/1.1 with kept-alive connections; requests are answered one after the other."""

    hanging: set[Connection] = set()  # noqa: RUF012 - of all connections together

    def __init__(self, services: Services) -> None:
        self.services = services
        self.settings = services.settings
        self.loop = asyncio.get_running_loop()
        self.buffer = b""
        self.busy = False  # a request waits for its answer
        self.operation = ("", "")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport

    def connection_lost(self, _: Exception | None) -> None:
        self.hanging.discard(self)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        self.serve()

    def serve(self) -> None:
        while not self.busy and (head_end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = self.buffer[:head_end]
            length = _content_length(head)
            end = head_end + 4 + (int(length[1]) if length else 0)
            if len(self.buffer) < end:
                return
            body, self.buffer = self.buffer[head_end + 4 : end], self.buffer[end:]
            self.busy = True
            target = _target(head)
            if target:
                self.call(target[1].decode(), target[2].decode(), head, body)
            else:
                method, path, _ = head.decode("latin-1").split(" ", 2)
                self.control(method, path, body)

    def call(self, target: str, operation: str, head: bytes, body: bytes) -> None:
        """Answer a call to SSM or SQS, or do what the fault says instead."""
        service = target.removeprefix("Amazon")
        self.operation = service, operation
        self.services.calls[operation] += 1
        fault = self.services.fault_of(service, operation)
        kind = fault.get("kind")
        if kind and kind != "fail_entries" and not self.services.happens(fault):
            kind = None
        if kind == "hang":
            self.services.answers[f"{operation} hang"] += 1
            if not fault.get("for_good"):
                self.hanging.add(self)
            return
        status, answer, more = 200, b"<html>This is no JSON", ""
        if kind == "trickle":
            self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n")
            self.trickle()
            return
        try:
            if self.settings.verify:
                check_signature(head, body, f"http://{self.host(head)}", self.settings)
            if kind == "error":
                text = fault.get("message", "A fault of the fake.")
                raise AwsError(fault["code"], text, status=fault["status"])
            if kind == "huge":
                answer = bytes(2**23)
            elif kind not in ("reset", "garbage"):
                method = getattr(self.services, f"{target}_{operation}", None)
                if method is None:
                    raise AwsError("com.amazon.coral.service#UnknownOperationException", "")
                answer = json.dumps(method(json.loads(body))).encode()
        except AwsError as error:
            status, answer, more = error.status, error.body, error.header
        lost = kind in ("reset", "lost_answer")
        self.services.answers[f"{operation} {'reset' if lost else status}"] += 1
        more += f"x-amzn-RequestId: {uuid.uuid4()}\r\n"
        kind_of_json = f"application/x-amz-json-1.{0 if service == 'SQS' else 1}"
        delay = self.settings.latency_ms / 1000 + (fault["seconds"] if kind == "delay" else 0)
        if lost:
            self.loop.call_later(delay, self.reset)
        elif delay:
            self.loop.call_later(delay, self.answer_later, status, answer, kind_of_json, more)
        else:
            self.answer(status, answer, kind_of_json, more)
        if kind == "close":
            self.loop.call_later(delay + 0.05, self.transport.close)

    def host(self, head: bytes) -> str:
        return head.lower().partition(b"\r\nhost:")[2].partition(b"\r\n")[0].decode().strip()

    def trickle(self) -> None:
        if not self.transport.is_closing():
            self.transport.write(b" ")
            self.loop.call_later(0.05, self.trickle)

    def answer(self, status: int, body: bytes, content_type: str, more: str = "") -> None:
        head = (
            f"HTTP/1.1 {status} {http.client.responses.get(status, 'Status')}\r\n"
            f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n{more}\r\n"
        )
        if not self.transport.is_closing():
            self.transport.write(head.encode() + body)
        self.busy = False

    def answer_later(self, status: int, body: bytes, content_type: str, more: str) -> None:
        self.answer(status, body, content_type, more)
        self.serve()

    def reset(self) -> None:
        """Close with RST instead of FIN."""
        if not self.transport.is_closing():
            sock = self.transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.abort()

    def control(self, method: str, path: str, body: bytes) -> None:
        services, status = self.services, 200
        answer: Any = {}
        if (method, path) == ("GET", "/control"):
            counts = {"calls": services.calls, "answers": services.answers}
            answer = {**counts, "accepted": services.accepted}
        elif (method, path) == ("GET", "/control/messages"):
            answer = services.messages
        elif (method, path) == ("DELETE", "/control"):
            services.forget()
        elif (method, path) == ("PUT", "/control"):
            changes = json.loads(body)
            unknown = changes.keys() - vars(self.settings).keys()
            if unknown:
                status, answer = 400, {"error": f"unknown settings: {sorted(unknown)}"}
            else:
                vars(self.settings).update(changes)
            for connection in list(self.hanging):
                if services.fault_of(*connection.operation).get("kind") != "hang":
                    connection.transport.abort()
        else:
            status, answer = 404, {"error": "not found"}
        self.answer(status, json.dumps(answer).encode(), "application/json")


class FakeAws:
    """The fake in a process of its own: `with FakeAws() as aws`."""

    def __init__(self, latency_ms: float = 0, certificate: str = "") -> None:
        self._arguments = ["--latency-ms", str(latency_ms), "--certificate", certificate]

    def __enter__(self) -> FakeAws:
        command = [sys.executable, __file__, *self._arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        self.url = self.process.stdout.readline().strip()
        self.control_url = self.process.stdout.readline().strip()
        self.queue_url = f"{self.url}/{ACCOUNT}/{QUEUE}"
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        assert self.process.stdout
        self.process.stdout.close()

    def environment(self) -> dict[str, str]:
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
        self._control("PUT", changes)

    def counts(self) -> dict[str, Any]:
        return dict(self._control("GET"))

    def calls(self, operation: str) -> int:
        """How many there were; each counts as it begins."""
        return int(self.counts()["calls"].get(operation, 0))

    def messages(self) -> list[dict[str, Any]]:
        return list(self._control("GET", path="/control/messages"))

    def forget(self) -> None:
        self._control("DELETE")

    def _control(self, method: str, changes: Any = None, path: str = "/control") -> Any:
        # Not urllib: a proxy of the environment must not come between.
        connection = http.client.HTTPConnection(
            self.control_url.removeprefix("http://"), timeout=30
        )
        try:
            connection.request(method, path, json.dumps(changes))
            answer = connection.getresponse()
            value = json.loads(answer.read())
        finally:
            connection.close()
        if answer.status != 200:
            raise ValueError(value["error"])
        return value


async def serve(port: int, settings: Settings, certificate: str = "") -> None:
    loop, stopped = asyncio.get_running_loop(), asyncio.Event()
    for stop_signal in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(stop_signal, stopped.set)
    services = Services(settings)
    tls = None
    if certificate:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(certificate)
    servers = []
    for number, context in ((port, tls), (0, None)):
        servers.append(
            await loop.create_server(
                lambda: Connection(services), "127.0.0.1", number, backlog=1024, ssl=context
            )
        )
        host, bound = servers[-1].sockets[0].getsockname()
        print(f"{'https' if context else 'http'}://{host}:{bound}", flush=True)
    await stopped.wait()
    for server in servers:
        server.close()


def main() -> None:
    about, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=0, help="0 (the default): any free one")
    parser.add_argument("--latency-ms", type=float, default=0, help="of each AWS call (default 0)")
    parser.add_argument("--certificate", default="", help="a PEM file with a key: serve over TLS")
    arguments = parser.parse_args()
    settings = Settings(latency_ms=arguments.latency_ms)
    asyncio.run(serve(arguments.port, settings, arguments.certificate))


if __name__ == "__main__":
    main()
