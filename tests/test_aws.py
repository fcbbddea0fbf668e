"""The service's own client of AWS, over real connections, beside boto3's."""

from __future__ import annotations

import datetime
import http.server
import json
import os
import re
import resource
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from email.message import Message
from functools import partial
from pathlib import Path
from typing import Any, Self
from unittest.mock import Mock

import boto3
import pytest
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from botocore.exceptions import BotoCoreError, ClientError, ProxyConnectionError, SSLError
from client import BODY, DATA
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from fake_aws import PARAMETER, REGION, FakeAws
from name_server import NameServer
from service import PROJECT, clean_environment, eventually
from test_runbook import row_of

import app

ENTRY, _ = app.Message(json.dumps(DATA), request_id="r", trace_header="Root=1-a-b").entry(
    fifo=False
)
LONG = 30.0  # seconds; a guard against hanging alone


@pytest.fixture(autouse=True)
def aws_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the machine's own configuration, and the fake's keys."""
    monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    # Each search ends within its test, and no other follows.
    monkeypatch.setattr(app.Credentials, "WAIT_SECONDS", LONG)
    monkeypatch.setattr(app.Credentials, "SEARCH_SECONDS", 1e6)


@dataclass
class Request:
    client: tuple[str, int]
    path: str
    headers: Message
    body: bytes = b""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Endpoint

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append(Request(self.client_address, self.path, self.headers, body))
        status, answer = self.server.status, b'{"MessageId":"m"}'
        if f"Credential={self.server.rejected[0]}/" in self.headers["Authorization"]:
            status, answer = 403, b'{"__type": "%b"}' % self.server.rejected[1].encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def do_CONNECT(self) -> None:
        """Of a proxy, which itself plays the endpoint behind it."""
        self.server.requests.append(Request(self.client_address, self.path, self.headers))
        if self.server.status != 200:
            self.send_error(self.server.status)
            return
        self.send_response(200)
        self.end_headers()
        self.connection = self.server.tls.wrap_socket(self.connection, server_side=True)
        self.rfile = self.connection.makefile("rb")
        self.wfile = self.connection.makefile("wb", 0)
        self.close_connection = False

    def finish(self) -> None:
        super().finish()
        self.connection.close()

    def log_message(self, *_: Any) -> None: ...


class Endpoint(http.server.ThreadingHTTPServer):
    """An AWS, or a proxy on the way to it, that takes every call and notes it."""

    def __init__(self, certificate: Path | None = None, is_proxy: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[Request] = []
        self.status, self.rejected = 200, ("", "")  # an access key, and the error that it gets
        if certificate:
            self.tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            self.tls.load_cert_chain(certificate)
            if not is_proxy:
                self.socket = self.tls.wrap_socket(
                    self.socket, server_side=True, do_handshake_on_connect=False
                )
        self.url = f"{'https' if certificate else 'http'}://localhost:{self.server_port}"

    def handle_error(self, *_: Any) -> None:
        """A client that does not trust it closes the connection."""

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    with Endpoint() as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint.url)
        yield endpoint


@pytest.fixture
def fake_aws(fake_aws: FakeAws, monkeypatch: pytest.MonkeyPatch) -> FakeAws:
    monkeypatch.setenv("AWS_ENDPOINT_URL", fake_aws.url)
    fake_aws.set(latency_ms=0)
    return fake_aws


def client(service: str = "sqs", seconds: float = LONG) -> app.AwsClient:
    return app.AwsClient(service, REGION, app.Credentials(REGION), seconds)


def send(sqs: Any, queue_url: str = "http://sqs/000000000000/dev-CP-queue") -> Any:
    return sqs.send_message(QueueUrl=queue_url, **ENTRY)


def failure(call: Callable[[], Any]) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - any kind, which is what is looked at
        call()
    return caught.value


def kind_of(error: Exception) -> str:
    return app.cause_of(error) if isinstance(error, ClientError) else type(error).__name__


def cause(sqs: Any) -> str:
    """The kind of failure of sending."""
    return kind_of(failure(lambda: send(sqs)))


def theirs(service: str, region: str = REGION) -> Any:
    """boto3's client."""
    return boto3.client(service, region, config=app.Config(retries={"total_max_attempts": 1}))


# --- Signatures -----------------------------------------------------------------------------------


def signature(request: Request, url: str, secret: str) -> str:
    """That of botocore's signer for what has arrived."""
    headers = {name.lower(): value for name, value in request.headers.items()}
    access_key, _, region, service, _ = re.split("[=/]", headers["authorization"])[1:6]
    (names,) = re.findall(r"SignedHeaders=([^,]+)", headers["authorization"])
    assert {"host", "x-amz-date", "x-amz-target"} <= {*names.split(";")}
    assert "x-amz-security-token" not in headers or "x-amz-security-token" in names
    signed = AWSRequest(
        "POST",
        url + request.path,
        data=request.body,
        headers={n: headers[n] for n in names.split(";")},
    )
    signed.context["timestamp"] = headers["x-amz-date"]
    signer = SigV4Auth(Credentials(access_key, secret), service, region)
    return str(
        signer.signature(signer.string_to_sign(signed, signer.canonical_request(signed)), signed)
    )


@pytest.mark.parametrize(
    ("secret", "token", "slash"), [("test", "", ""), ("a/b+c==", "t" * 8000, "/")]
)
def test_every_call_is_signed_as_botocore_signs(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, secret: str, token: str, slash: str
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint.url + slash)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    monkeypatch.setenv("AWS_SESSION_TOKEN", token)
    sqs = client()
    assert send(sqs) == {"MessageId": "m"}
    sqs.send_message_batch(QueueUrl="q", Entries=[{"Id": "0", **ENTRY}])
    sqs.get_queue_attributes(QueueUrl="q", AttributeNames=["MaximumMessageSize"])
    client("ssm").get_parameters(Names=["a"], WithDecryption=True)
    assert len(endpoint.requests) == 4
    assert endpoint.requests[0].headers["X-Amzn-Query-Mode"] == "true", "for its error codes"
    for request in endpoint.requests:
        given = request.headers["Authorization"].rpartition("Signature=")[2]
        assert given == signature(request, endpoint.url, secret)
        assert given != signature(request, endpoint.url, "another")
        assert request.headers.get("X-Amz-Security-Token", "") == token


# --- Endpoints ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"AWS_USE_FIPS_ENDPOINT": "true", "AWS_USE_DUALSTACK_ENDPOINT": "true"},
        {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ENDPOINT_URL_SQS": "http://127.0.0.1:8"},
        {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true"},
    ],
    ids=lambda variables: ",".join(variables) or "none",
)
@pytest.mark.parametrize(
    ("service", "method"), [("sqs", "list_queues"), ("ssm", "describe_parameters")]
)
def test_endpoint_is_the_one_that_boto3_calls(
    monkeypatch: pytest.MonkeyPatch, service: str, method: str, variables: dict[str, str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    boto, asked = theirs(service, "us-west-2"), list[str]()

    def before_send(request: Any, **_: Any) -> None:
        asked.append(request.url)
        raise ConnectionAbortedError

    boto.meta.events.register("before-send", before_send)
    failure(getattr(boto, method))
    boto.close()
    assert app.AwsClient(service, "us-west-2", app.Credentials(REGION)).url == asked[0]


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("AWS_ENDPOINT_URL", "localhost:4566"),
        ("AWS_PROFILE", "nope"),
        ("AWS_CONFIG_FILE", __file__),
    ],
)
def test_unusable_aws_configuration_is_one_line(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(app.SettingsError, match=r"^The AWS configuration is unusable: .+$"):
        client()


# --- TLS and proxies ------------------------------------------------------------------------------


def make_certificate(folder: Path, host: str = "localhost") -> Path:
    """A file with a certificate, which is its own authority, and its key."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, host)])
    built = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    text = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    file = folder / "certificate.pem"
    file.write_bytes(text + built.public_bytes(pem))
    return file


@pytest.mark.parametrize(
    ("variable", "host", "holds"),
    [
        ("AWS_CA_BUNDLE", "localhost", True),
        ("REQUESTS_CA_BUNDLE", "localhost", True),
        ("AWS_CA_BUNDLE", "other.test", False),
        ("UNKNOWN", "localhost", False),
    ],
)
def test_certificate_must_be_of_the_host_and_a_known_authority(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, host: str, holds: bool
) -> None:
    certificate = make_certificate(tmp_path, host)
    monkeypatch.setenv(variable, str(certificate))
    with Endpoint(certificate) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint.url)
        if holds:
            assert send(client())["MessageId"]
        else:
            assert cause(client()) == "SSLError"
            assert not endpoint.requests


@pytest.mark.parametrize(
    ("variables", "through"),
    [
        ({"http_proxy": "URL"}, True),
        ({"HTTP_PROXY": "URL", "NO_PROXY": "aws.test"}, False),
        ({"HTTP_PROXY": "URL", "NO_PROXY": "other.test"}, True),
        ({"ALL_PROXY": "URL", "HTTPS_PROXY": "URL"}, False),  # libcurl would use the first
    ],
)
def test_proxy_is_used_as_boto3_uses_it(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], through: bool
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://aws.test:8")
    for name, value in variables.items():
        monkeypatch.setenv(name, value.replace("URL", endpoint.url))
    boto = theirs("sqs")
    for sqs in (client(), boto):
        endpoint.requests.clear()
        if through:
            assert send(sqs)["MessageId"]
            assert [r.path for r in endpoint.requests] == ["http://aws.test:8/"]
        else:
            assert cause(sqs) == "EndpointConnectionError"
            assert not endpoint.requests
    boto.close()


def test_call_over_tls_goes_through_the_proxy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = make_certificate(tmp_path)
    monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://localhost:8")
    with Endpoint(certificate, is_proxy=True) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"127.0.0.1:{proxy.server_port}")  # without a scheme
        assert send(client())["MessageId"]
        assert [r.path for r in proxy.requests] == ["localhost:8", "/"]


def credentials_of(caller: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys, for a call of the service's; or a role, for botocore's call of STS."""
    if caller == "STS":
        (folder / "identity").write_text("of the service account")
        for name, value in webhook(folder / "identity").items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")


@pytest.mark.parametrize("caller", ["service", "STS"])
@pytest.mark.parametrize("status", [403, 407, 502])
def test_proxy_that_refuses_is_named_without_its_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caller: str, status: int
) -> None:
    credentials_of(caller, tmp_path, monkeypatch)
    with Endpoint() as proxy:
        proxy.status, address = status, f"127.0.0.1:{proxy.server_port}"
        monkeypatch.setenv("HTTPS_PROXY", f"http://user:s3cr3t@{address}")
        error = failure(lambda: send(client()))
    assert isinstance(error, ProxyConnectionError)
    detail = app.detail_of(error)
    assert f'proxy URL: "http://{address}"' in detail
    assert str(status) in detail
    assert "s3cr3t" not in detail
    assert row_of(detail) == row_of("proxy URL")


def test_proxy_that_refuses_a_call_without_tls_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://aws.test")
    with Endpoint() as proxy:
        proxy.status = 407
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        assert cause(client()) == "ProxyConnectionError"


@pytest.mark.parametrize("caller", ["service", "STS"])
@pytest.mark.parametrize(
    "proxy",
    [
        "http://user:s3cr3t@127.0.0.1:9",
        "user:s3cr3t@127.0.0.1:9",
        "http://user:s3cr3t@proxy.invalid:3128",
        "https://user:s3cr3t@localhost:PORT",  # TLS that is not trusted
        "http://user:s3cr3t@localhost:PORT",  # closes the connection
        "http://user:/s3cr3t@localhost:9",
        "http://user:s3c r3t@localhost:9",
    ],
)
def test_proxy_that_fails_is_named_without_its_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caller: str, proxy: str
) -> None:
    credentials_of(caller, tmp_path, monkeypatch)
    with Endpoint(make_certificate(tmp_path)) as endpoint:
        monkeypatch.setenv("HTTPS_PROXY", proxy.replace("PORT", str(endpoint.server_port)))
        detail = app.detail_of(failure(lambda: send(client())))
    assert row_of(detail) == row_of("proxy URL")
    assert "r3t" not in detail


def test_failure_behind_a_proxy_is_not_the_proxys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://localhost:8")
    with Endpoint(make_certificate(tmp_path), is_proxy=True) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.server_port}")
        error = failure(lambda: send(client()))
    assert isinstance(error, SSLError)
    assert "proxy" not in app.detail_of(error)


# --- Errors ---------------------------------------------------------------------------------------


ERRORS = [
    {"status": 500, "code": "InternalFailure"},
    {"status": 403, "code": "AccessDeniedException", "message": "User: x is not authorized"},
    {"status": 400, "code": "com.amazonaws.sqs#RequestThrottled"},
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: str(error["code"]))
@pytest.mark.parametrize(
    ("service", "method", "given"),
    [
        ("sqs", "send_message", {"QueueUrl": "q", **ENTRY}),
        ("ssm", "get_parameters", {"Names": ["a"]}),
    ],
)
def test_errors_are_those_of_boto3(
    fake_aws: FakeAws, service: str, method: str, given: dict[str, Any], error: dict[str, Any]
) -> None:
    fake_aws.set(faults={"*": {"kind": "error", **error}})
    boto = theirs(service)
    seen = []
    for each in (client(service), boto):
        found = failure(partial(getattr(each, method), **given))
        assert isinstance(found, ClientError)
        status = found.response["ResponseMetadata"]["HTTPStatusCode"]
        text = str(found).replace(" (reached max retries: 0)", "")
        seen.append((text, found.response["Error"], status))
    boto.close()
    assert seen[0] == seen[1]


def test_log_has_the_first_line_of_an_error_alone() -> None:
    text = "The signature does not match.\n\nThe Canonical String was x-amz-security-token:SECRET"
    error = ClientError({"Error": {"Code": "SignatureDoesNotMatch", "Message": text}}, "Send")
    assert app.detail_of(error).endswith("The signature does not match.")


@pytest.mark.usefixtures("fake_aws")
def test_missing_queue_has_its_older_code() -> None:
    error = failure(lambda: send(client(), "http://sqs/1/nope"))
    assert app.cause_of(error) == "AWS.SimpleQueueService.NonExistentQueue"
    assert app.is_about_the_queue(error)


@pytest.mark.parametrize(
    ("code", "status", "temporary"),
    [
        ("ThrottlingException", 400, True),
        ("RequestThrottled", 400, True),
        ("RequestLimitExceeded", 400, True),
        ("TooManyRequestsException", 400, True),
        ("SlowDown", 400, True),
        ("Unknown", 429, True),
        ("InternalFailure", 500, True),
        ("AccessDenied", 403, False),
        ("InvalidParameterValue", 400, False),
    ],
)
def test_throttling_in_any_spelling_is_temporary(code: str, status: int, temporary: bool) -> None:
    response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    assert app.is_temporary(ClientError(response, "SendMessage")) is temporary


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("lost_response", "ConnectionClosedError"),
        ("huge", "ConnectionClosedError"),
        ("garbage", "JSONDecodeError"),
    ],
)
def test_answer_that_is_none_has_its_cause(fake_aws: FakeAws, kind: str, name: str) -> None:
    fake_aws.set(faults={"*": {"kind": kind}})
    error = failure(lambda: send(client()))
    assert kind_of(error) == name
    assert app.is_temporary(error)


@pytest.mark.parametrize(
    ("variables", "name", "words"),
    [
        (
            {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"},
            "EndpointConnectionError",
            "Could not connect",
        ),
        ({"HTTP_PROXY": "http://proxy.invalid:3128"}, "ProxyConnectionError", "proxy.invalid"),
    ],
)
def test_what_cannot_be_reached_is_named(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], name: str, words: str
) -> None:
    for variable, value in {"AWS_ENDPOINT_URL": "http://aws.test", **variables}.items():
        monkeypatch.setenv(variable, value)
    error = failure(lambda: send(client()))
    assert kind_of(error) == name
    assert words in app.detail_of(error)


# --- One deadline, one send -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hang", "trickle"])
def test_call_ends_at_its_deadline(fake_aws: FakeAws, kind: str) -> None:
    fake_aws.set(faults={"*": {"kind": kind}})
    sqs = client().within(0.3)
    error = failure(lambda: send(sqs))
    assert kind_of(error) == "ReadTimeoutError"
    assert isinstance(error, app.TIMEOUTS)
    fake_aws.set(faults={})
    assert send(sqs.within(LONG))["MessageId"]  # on the same handle


class LateCurl:
    """libcurl on a busy machine: it has the whole answer when it sees that the time is over."""

    def __init__(self) -> None:
        self._curl = pycurl_curl()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._curl, name)

    def perform(self) -> None:
        self._curl.perform()
        raise app.pycurl.error(app.pycurl.E_OPERATION_TIMEDOUT, "Operation timed out")


pycurl_curl = app.pycurl.Curl


def test_whole_answer_counts_although_its_time_is_over(
    fake_aws: FakeAws, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app.pycurl, "Curl", LateCurl)
    assert send(client())["MessageId"] == fake_aws.messages()[0]["message_id"]


def test_connection_that_is_not_made_ends_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as stack:
        full = stack.enter_context(socket.socket())
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(3):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{full.getsockname()[1]}")
        assert cause(client()) == "ConnectTimeoutError"


def test_message_is_sent_once_when_its_connection_dies(fake_aws: FakeAws) -> None:
    sqs = client()
    send(sqs)  # the connection is kept
    fake_aws.set(faults={"*": {"kind": "lost_response"}})
    assert cause(sqs) == "ConnectionClosedError"
    assert fake_aws.calls("SendMessage") == 2


def test_read_is_tried_again_when_its_connection_dies(fake_aws: FakeAws) -> None:
    fake_aws.set(faults={"*": {"kind": "reset"}})
    failure(lambda: client("ssm").get_parameters(Names=[PARAMETER]))
    assert fake_aws.calls("GetParameters") == 2


def test_connections_closed_while_idle_cost_no_message(fake_aws: FakeAws) -> None:
    fake_aws.set(faults={"SQS": {"kind": "close"}})
    service = app.create_app(app.Settings(sqs_queue_url=fake_aws.queue_url)).test_client()
    for _ in range(5):
        assert service.post("/process", json=json.loads(BODY)).status_code == 200
        time.sleep(0.1)  # the fake closes after 0.05 s: what is tested is what time does


def test_no_handle_is_made_before_the_first_call(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Mock(side_effect=pycurl_curl)
    monkeypatch.setattr(app.pycurl, "Curl", made)
    threads, sqs = threading.active_count(), client()
    assert not made.called
    assert threading.active_count() == threads
    for _ in range(3):
        send(sqs)
    assert made.call_count == 1
    assert len({request.client for request in endpoint.requests}) == 1


def test_calls_take_no_more_memory_or_files(fake_aws: FakeAws) -> None:
    sqs = client()

    def calls(count: int) -> None:
        for _ in range(count):
            with suppress(Exception):
                send(sqs)

    for kind in ("reset", "garbage", "error"):
        fake_aws.set(faults={"*": {"kind": kind, "share": 0.5, "status": 500, "code": "x"}})
        calls(100)
    files = len(os.listdir("/proc/self/fd"))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    calls(2000)
    assert len(os.listdir("/proc/self/fd")) <= files + 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss <= memory + 8192  # kB


# --- Credentials ----------------------------------------------------------------------------------


@pytest.fixture
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")


@pytest.fixture
def identity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The file with a role's web identity token, as on EKS."""
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::000000000000:role/email-processor-role")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "identity"))
    return tmp_path / "identity"


class Pause:
    """Holds the search for credentials between two searches."""

    def __init__(self) -> None:
        self._begun, self._ended = threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, _: float) -> None:
        self._begun.release()
        self._ended.acquire()

    def end(self) -> None:
        """Let the next search begin, and wait for its end."""
        assert self._begun.acquire(timeout=LONG)
        self._ended.release()
        assert self._begun.acquire(timeout=LONG)
        self._begun.release()


class Source:
    """A place where boto3 finds credentials, and a service that uses them."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.runs, self.keys = folder / "runs", folder / "keys"
        self.file, config = folder / "credentials", folder / "config"
        if kind == "process":
            command = f"[X]\ncredential_process = sh -c 'echo >> {self.runs}; cat {self.keys}'\n"
            config.write_text(command.replace("X", "default"))
        self.pause = Pause()
        self.credentials = app.Credentials(REGION, self.pause)
        self.sqs = app.AwsClient("sqs", REGION, self.credentials, LONG)

    def hold(self, key: str, **more: str) -> None:
        keys = {"Version": 1, "AccessKeyId": key, "SecretAccessKey": key, **more}
        self.keys.write_text(json.dumps(keys))
        lines = "[default]", f"aws_access_key_id = {key}", f"aws_secret_access_key = {key}"
        self.file.write_text("\n".join(lines) if not self.is_process() else "")

    def is_process(self) -> bool:
        return (self.file.parent / "config").exists()

    def count(self) -> int:
        return len(self.runs.read_text().splitlines())


@pytest.mark.usefixtures("no_keys")
@pytest.mark.parametrize("kind", ["file", "process"])
@pytest.mark.parametrize(
    "code",
    [
        "ExpiredToken",
        "ExpiredTokenException",
        "InvalidAccessKeyId",
        "InvalidClientTokenId",
        "SignatureDoesNotMatch",
        "UnrecognizedClientException",
    ],
)
def test_other_credentials_are_searched_for_when_aws_rejects_them(
    endpoint: Endpoint, tmp_path: Path, kind: str, code: str
) -> None:
    source = Source(tmp_path, kind)

    def used() -> str:
        send(source.sqs)
        authorization = endpoint.requests[-1].headers["Authorization"]
        return str(re.findall("Credential=(\\w+)/", authorization)[0])

    assert cause(source.sqs) in ("NoCredentialsError", "CredentialRetrievalError")
    source.hold("first")
    source.pause.end()
    assert used() == "first", "those that appear later"
    runs = source.is_process() and source.count()
    source.hold("second")
    endpoint.rejected = ("first", "AccessDeniedException")
    assert cause(source.sqs) == "AccessDeniedException"
    endpoint.rejected = ("", "")
    source.pause.end()
    assert used() == "first"
    assert not source.is_process() or source.count() == runs, "asked again without need"
    endpoint.rejected = ("first", code)
    assert cause(source.sqs) == code
    for _ in range(2):
        source.pause.end()
        assert used() == "second"
    assert not source.is_process() or source.count() == runs + 1


@pytest.mark.usefixtures("no_keys")
def test_known_credentials_stay_in_use_while_they_cannot_be_renewed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = Source(tmp_path, "process")
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(minutes=5)
    source.hold("first", SessionToken="t", Expiration=soon.isoformat())
    first = source.credentials.frozen()
    source.keys.unlink()
    source.pause.end()
    assert source.credentials.frozen() == first
    (warning,) = [r for r in caplog.records if r.message == "credentials not renewed"]
    assert "credential_process: status 1" in vars(warning)["cause"]
    (tmp_path / "config").write_text(f"[default]\n{keys(AccessKeyId='second')}\n")
    source.pause.end()
    assert source.credentials.frozen().access_key == "second"


needs_setpriv = pytest.mark.skipif(not shutil.which("setpriv"), reason="setpriv is of Linux")


@needs_setpriv
@pytest.mark.usefixtures("no_keys")
def test_credential_process_has_a_time_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = app.CredentialProcess.LIMIT
    monkeypatch.setattr(app.CredentialProcess, "LIMIT", limit.replace(" 60", " 0.1"))
    (tmp_path / "config").write_text("[default]\ncredential_process = sh -c 'sleep 600; :'\n")
    assert "status 124" in app.detail_of(failure(app.Credentials(REGION).frozen))


@needs_setpriv
def test_credential_process_ends_with_the_service(tmp_path: Path) -> None:
    """Its children too, even if the service is killed."""
    pid = tmp_path / "pid"
    hang = f"sleep 600 & echo $! >{pid}.new; mv {pid}.new {pid}; wait"
    (tmp_path / "config").write_text(f"[default]\ncredential_process = sh -c '{hang}'\n")
    service = subprocess.Popen(
        [sys.executable, "-c", "import app; app.Credentials('us-west-1').frozen()"],
        cwd=PROJECT,
        env=clean_environment(AWS_CONFIG_FILE=str(tmp_path / "config"), AWS_ACCESS_KEY_ID=""),
        stderr=subprocess.DEVNULL,
    )
    eventually(pid.exists)
    service.kill()
    service.wait()
    eventually(lambda: not Path(f"/proc/{pid.read_text().strip()}").exists())


def keys(**changes: Any) -> str:
    """The command of a credential_process that prints these."""
    given = {"Version": 1, "AccessKeyId": "a", "SecretAccessKey": "s3cr3t", "SessionToken": "t"}
    return f"credential_process = printf %s '{json.dumps({**given, **changes})}'"


ROLE = "role_arn = arn:aws:iam::000000000000:role/email-processor-role"
SOURCE = f"{ROLE}\nsource_profile = b\n[profile b]"
CHAIN = f"{SOURCE}\naws_access_key_id = a\naws_secret_access_key = a"
URI, TOKEN = "AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_CONTAINER_AUTHORIZATION_TOKEN"
IDENTITY = {"AWS_ROLE_ARN": ROLE.split()[2], "AWS_WEB_IDENTITY_TOKEN_FILE": "FOLDER/file"}
# The default profile's configuration, variables, a file's content, and words of the cause.
FAILURES: list[tuple[str, dict[str, str], bytes, str]] = [
    (keys(Expiration="2020-01-01T00:00:00Z"), {}, b"", "still expired"),
    (keys(Expiration="2099-01-01T00:00:00"), {}, b"", "offset-naive"),
    (keys(Expiration="s3cr3t"), {}, b"", "ParserError"),
    (keys(SecretAccessKey="s3cr3t\n"), {}, b"", "a key is empty"),
    (keys(SecretAccessKey=None), {}, b"", "credentials from boto3: TypeError"),
    (keys(Version="s3cr3t"), {}, b"", "custom-process: Unsupported version for"),
    (
        "credential_process = sh -c 'echo s3cr3t >&2; exit 3'",
        {},
        b"",
        "credential_process: status 3",
    ),
    ("credential_process = echo s3cr3t", {}, b"", "credentials from boto3: JSONDecodeError"),
    ("credential_process = echo []", {}, b"", "credentials from boto3: AttributeError"),
    (
        "credential_process = echo 's3cr3t",
        {},
        b"",
        "credentials from boto3: ValueError: No closing quotation",
    ),
    ("credential_process = /nowhere/tool s3cr3t", {}, b"", "[Errno 2]"),
    (f"mfa_serial = arn:aws:iam::0:mfa/x\n{CHAIN}", {}, b"", "mfa_serial"),
    (
        f"{SOURCE}\n{keys(SessionToken='s3cr3t' + chr(10))}",
        {"AWS_ENDPOINT_URL_STS": "http://127.0.0.1:9"},
        b"",
        "credentials from boto3: ValueError in putheader",
    ),
    ("", {URI: "http://user:s3cr3t@example.com"}, b"", "Unsupported host 'example.com'"),
    (
        "",
        {URI: "http://127.0.0.1/", f"{TOKEN}_FILE": "FOLDER/file"},
        b"s3cr3t\n",
        "legal header value",
    ),
    ("", {URI: "http://127.0.0.1/", f"{TOKEN}_FILE": "FOLDER/file"}, b"\xff", "UnicodeDecodeError"),
    ("", IDENTITY, b"", "Parameter validation"),
    ("", IDENTITY, b"s3cr3t\xff", "UnicodeDecodeError"),
    ("", {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "s3cr3t\n"}, b"", "a key is empty"),
]


@pytest.mark.usefixtures("no_keys")
@pytest.mark.parametrize(
    ("profile", "variables", "content", "words"), FAILURES, ids=[words for *_, words in FAILURES]
)
def test_cause_of_missing_credentials_is_shown_without_a_secret(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    profile: str,
    variables: dict[str, str],
    content: bytes,
    words: str,
) -> None:
    (tmp_path / "config").write_text(f"[default]\n{profile}\n")
    (tmp_path / "file").write_bytes(content)
    for name, value in variables.items():
        monkeypatch.setenv(name, value.replace("FOLDER", str(tmp_path)))
    detail = app.detail_of(failure(app.Credentials(REGION).frozen))
    assert words in detail
    assert "s3cr3t" not in detail
    assert row_of(detail) == row_of(words)
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("no_keys")
def test_response_of_a_container_endpoint_is_not_shown(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", endpoint.url)
    detail = app.detail_of(failure(app.Credentials(REGION).frozen))
    assert detail.endswith("Received non 200 response 501 from container metadata")
    assert row_of(detail) == row_of("container metadata")


def webhook(identity: Path, region: str = REGION) -> dict[str, str]:
    """The variables that EKS's webhook gives a pod whose Deployment has AWS_REGION."""
    return {
        "AWS_ROLE_ARN": ROLE.split()[2],
        "AWS_WEB_IDENTITY_TOKEN_FILE": str(identity),
        "AWS_REGION": region,
        "AWS_STS_REGIONAL_ENDPOINTS": "regional",
    }


WEB_IDENTITY = f"{ROLE}\nweb_identity_token_file = FILE"
# A profile's configuration, beside the webhook's variables or without them.
REGIONS = [
    ("", "us-west-1", "sts.us-west-1.amazonaws.com"),
    ("", "ap-east-1", "sts.ap-east-1.amazonaws.com"),
    ("", "cn-north-1", "sts.cn-north-1.amazonaws.com.cn"),
    ("", "us-gov-west-1", "sts.us-gov-west-1.amazonaws.com"),
    ("region = eu-west-1", "ap-east-1", "sts.ap-east-1.amazonaws.com"),
    (CHAIN, "ap-east-1", "sts.ap-east-1.amazonaws.com"),
    (
        f"{ROLE}\nsource_profile = a\n[profile a]\n{CHAIN}",
        "ap-east-1",
        "sts.ap-east-1.amazonaws.com",
    ),
    (WEB_IDENTITY, "ap-east-1", "sts.ap-east-1.amazonaws.com"),
    (f"{SOURCE}\n{WEB_IDENTITY}", "ap-east-1", "sts.ap-east-1.amazonaws.com"),
]


@pytest.mark.usefixtures("no_keys")
@pytest.mark.parametrize(("profile", "region", "host"), REGIONS)
def test_role_is_assumed_in_the_services_region(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, profile: str, region: str, host: str
) -> None:
    identity = tmp_path / "identity"
    identity.write_text("of the service account")
    profile = profile.replace("FILE", str(identity))
    (tmp_path / "config").write_text(f"[default]\n{profile}\n")
    for name, value in webhook(identity, region).items():
        if name == "AWS_REGION" or ROLE not in profile:
            monkeypatch.setenv(name, value)
    settings = app.Settings.from_environ({**os.environ, "SQS_QUEUE_URL": "https://sqs/1/queue"})
    with Endpoint() as proxy:
        proxy.status = 407
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        assert app.create_app(settings).test_client().get("/ready").status_code == 503
        eventually(lambda: proxy.requests)
    assert {request.path for request in proxy.requests} == {f"{host}:443"}


@pytest.mark.usefixtures("no_keys")
def test_unreadable_token_file_is_named(identity: Path) -> None:
    assert str(identity) in app.detail_of(failure(lambda: send(client())))


@pytest.mark.usefixtures("no_keys")
def test_credentials_that_do_not_come_hold_one_request(
    identity: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity.write_text("of the service account")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", f"http://127.0.0.1:{port}")
        monkeypatch.setattr(app.Credentials, "WAIT_SECONDS", 1.0)
        credentials, begin = app.Credentials(REGION), time.monotonic()
        for _ in range(2 * int(LONG)):
            assert isinstance(failure(credentials.frozen), BotoCoreError)
        assert time.monotonic() - begin < LONG, "each has waited"


# --- Name servers that are silent -----------------------------------------------------------------

SILENT = """
import time, app
sqs = app.AwsClient("sqs", "us-west-1", app.Credentials("us-west-1"), 0.5)
began = time.monotonic()
try:
    sqs.send_message(QueueUrl="q", MessageBody="b")
except Exception as error:
    print(type(error).__name__)
del sqs
print("dropped", time.monotonic() - began < 4)
"""


def test_silent_name_server_ends_the_call_within_its_time(name_server: NameServer) -> None:
    name_server.silent = True
    result = subprocess.run(
        [*name_server.command, sys.executable, "-c", SILENT],
        cwd=PROJECT,
        env=clean_environment(AWS_ENDPOINT_URL="http://sqs.email-processor.test"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.stdout.split() == ["ConnectTimeoutError", "dropped", "True"], result.stderr
