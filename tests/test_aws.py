"""The client of AWS over real connections, compared with boto3's."""

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

import boto3
import pytest
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from botocore.exceptions import BotoCoreError, ClientError, SSLError
from client import BODY, DATA
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from fake_aws import PARAMETER, REGION, FakeAws
from service import PROJECT, clean_environment, eventually
from test_runbook import row_of

import app

ENTRY, _ = app.Message(json.dumps(DATA), request_id="r", trace_header="Root=1-a-b").entry(
    fifo=False
)
LONG = 30.0  # seconds, in which every wait ends


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
        received = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append(Request(self.client_address, self.path, self.headers, received))
        status, body = self.server.status, b'{"MessageId":"m"}'
        if f"Credential={self.server.rejected[0]}/" in self.headers["Authorization"]:
            status, body = 403, b'{"__type": "%b"}' % self.server.rejected[1].encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_CONNECT(self) -> None:
        """As a proxy, and as the endpoint behind it."""
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
    """An AWS, or a proxy in front of it, that records the requests."""

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
    with pytest.raises(Exception) as caught:  # noqa: PT011 - of any kind
        call()
    return caught.value


def kind_of(error: Exception) -> str:
    return app.cause_of(error) if isinstance(error, ClientError) else type(error).__name__


def cause(sqs: Any) -> str:
    """The kind of failure of sending."""
    return kind_of(failure(lambda: send(sqs)))


def boto3_client(service: str, region: str = REGION) -> Any:
    """boto3's client."""
    return boto3.client(service, region, config=app.Config(retries={"total_max_attempts": 1}))


# --- Signatures -----------------------------------------------------------------------------------


def signature(request: Request, url: str, secret: str) -> str:
    """The signature of botocore's signer for a request."""
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
def test_endpoint_is_that_of_boto3(
    monkeypatch: pytest.MonkeyPatch, service: str, method: str, variables: dict[str, str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    boto, asked = boto3_client(service, "us-west-2"), list[str]()

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
    boto = boto3_client("sqs")
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


@pytest.fixture(params=["service", "STS"])
def caller(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose call fails: the service's own, or botocore's for the credentials of a role."""
    if request.param == "STS":
        (tmp_path / "identity").write_text("of the service account")
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.setenv("AWS_ROLE_ARN", ROLE_ARN)
        monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "identity"))


@pytest.mark.usefixtures("caller")
@pytest.mark.parametrize(
    "proxy",
    [
        "http://user:s3cr3t@127.0.0.1:9",
        "user:s3cr3t@127.0.0.1:9",
        "http://user:s3cr3t@proxy.invalid:3128",
        "https://user:s3cr3t@localhost:TLS_PORT",  # not trusted
        "http://user:s3cr3t@localhost:TLS_PORT",  # closes the connection
        "http://user:s3cr3t@localhost:PORT",  # responds with 407
        "http://user:/s3cr3t@localhost:9",
        "http://user:s3c r3t@localhost:9",
    ],
)
def test_failing_proxy_is_named_without_its_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proxy: str
) -> None:
    with Endpoint(make_certificate(tmp_path)) as with_tls, Endpoint() as rejecting:
        rejecting.status = 407
        proxy = proxy.replace("TLS_PORT", str(with_tls.server_port))
        monkeypatch.setenv("HTTPS_PROXY", proxy.replace("PORT", str(rejecting.server_port)))
        error = failure(lambda: send(client()))
    detail = app.detail_of(error)
    assert ("407" in detail) == ("localhost:PORT" in proxy)
    assert row_of(detail) == row_of("proxy URL")
    assert "r3t" not in detail


def test_proxy_that_rejects_a_call_without_tls_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://aws.test")
    with Endpoint() as proxy:
        proxy.status = 407
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        assert cause(client()) == "ProxyConnectionError"


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
    boto = boto3_client(service)
    seen = []
    for each in (client(service), boto):
        found = failure(partial(getattr(each, method), **given))
        assert isinstance(found, ClientError)
        status = found.response["ResponseMetadata"]["HTTPStatusCode"]
        text = str(found).replace(" (reached max retries: 0)", "")
        seen.append((text, found.response["Error"], status))
    boto.close()
    assert seen[0] == seen[1]


def test_log_has_only_the_first_line_of_an_error() -> None:
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
def test_malformed_response_has_its_cause(fake_aws: FakeAws, kind: str, name: str) -> None:
    fake_aws.set(faults={"*": {"kind": kind}})
    error = failure(lambda: send(client()))
    assert kind_of(error) == name
    assert app.is_temporary(error)


# --- One deadline, one send -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hang", "trickle"])
def test_call_ends_at_its_deadline(fake_aws: FakeAws, kind: str) -> None:
    fake_aws.set(faults={"*": {"kind": kind}})
    sqs, begin = client().within(0.3), time.monotonic()
    error = failure(lambda: send(sqs))
    assert time.monotonic() - begin < LONG
    assert kind_of(error) == "ReadTimeoutError"
    assert isinstance(error, app.TIMEOUTS)
    fake_aws.set(faults={})
    assert send(sqs.within(LONG))["MessageId"]  # on the same handle


class LateCurl:
    """libcurl may report a timeout after it has received the complete response."""

    def __init__(self) -> None:
        self._curl = pycurl_curl()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._curl, name)

    def perform(self) -> None:
        self._curl.perform()
        raise app.pycurl.error(app.pycurl.E_OPERATION_TIMEDOUT, "Operation timed out")


pycurl_curl = app.pycurl.Curl


def test_complete_response_counts_though_libcurl_reports_a_timeout(
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
        time.sleep(0.1)  # the fake closes the connection after 0.05 s


def test_connection_is_kept_and_made_at_the_first_call(endpoint: Endpoint) -> None:
    sqs = client()
    assert not sqs._handles, "a handle does not survive the fork"
    for _ in range(3):
        send(sqs)
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


ROLE_ARN = "arn:aws:iam::000000000000:role/email-processor-role"


@pytest.fixture
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")


class HeldPause:
    """The pause between two searches for credentials, which the test ends."""

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


class Process:
    """A credential_process, and a client with its credentials."""

    def __init__(self, folder: Path) -> None:
        self.output, self.runs = folder / "output", folder / "runs"
        command = f"sh -c 'echo >>{self.runs}; cat {self.output}'"
        (folder / "config").write_text(f"[default]\ncredential_process = {command}\n")
        self.pause = HeldPause()
        self.credentials = app.Credentials(REGION, self.pause)
        self.sqs = app.AwsClient("sqs", REGION, self.credentials, LONG)

    def print(self, key: str, **more: str) -> None:
        keys = {"Version": 1, "AccessKeyId": key, "SecretAccessKey": key, **more}
        self.output.write_text(json.dumps(keys))

    def count(self) -> int:
        return len(self.runs.read_text().splitlines())


@pytest.mark.usefixtures("no_keys")
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
def test_credentials_are_searched_for_until_aws_accepts_them(
    endpoint: Endpoint, tmp_path: Path, code: str
) -> None:
    process = Process(tmp_path)

    def used() -> str:
        send(process.sqs)
        authorization = endpoint.requests[-1].headers["Authorization"]
        return str(re.findall("Credential=(\\w+)/", authorization)[0])

    assert cause(process.sqs) == "CredentialRetrievalError"
    process.print("first")
    process.pause.end()
    assert used() == "first"
    runs = process.count()
    process.print("second")
    endpoint.rejected = ("first", "AccessDeniedException")
    assert cause(process.sqs) == "AccessDeniedException"
    process.pause.end()
    assert process.count() == runs, "a permission is missing; the credentials are valid"
    endpoint.rejected = ("first", code)
    assert cause(process.sqs) == code
    for _ in range(2):
        process.pause.end()
        assert used() == "second"
    assert process.count() == runs + 1


@pytest.mark.usefixtures("no_keys")
def test_known_credentials_stay_in_use_while_they_cannot_be_renewed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    process = Process(tmp_path)
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(minutes=5)
    process.print("first", SessionToken="t", Expiration=soon.isoformat())
    first = process.credentials.frozen()
    process.output.unlink()
    process.pause.end()
    assert process.credentials.frozen() == first
    (warning,) = [r for r in caplog.records if r.message == "credentials not renewed"]
    assert "credential_process: status 1" in vars(warning)["cause"]
    process.print("second")
    process.pause.end()
    assert process.credentials.frozen().access_key == "second"


@pytest.mark.usefixtures("no_keys")
def test_search_that_hangs_delays_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    searching = threading.Event()
    monkeypatch.setattr(app, "aws_session", lambda _: searching.wait(LONG))
    monkeypatch.setattr(app.Credentials, "WAIT_SECONDS", 0.1)
    credentials = app.Credentials(REGION)
    assert isinstance(failure(credentials.frozen), BotoCoreError)
    monkeypatch.setattr(app.Credentials, "WAIT_SECONDS", LONG)
    assert isinstance(failure(credentials.frozen), BotoCoreError), "at once"
    searching.set()


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


ROLE = f"role_arn = {ROLE_ARN}"
SOURCE = f"{ROLE}\nsource_profile = b\n[profile b]"
CHAIN = f"{SOURCE}\naws_access_key_id = a\naws_secret_access_key = a"
URI, TOKEN = "AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"
CONTAINER = {URI: "http://127.0.0.1/", TOKEN: "FILE"}
IDENTITY = {"AWS_ROLE_ARN": ROLE_ARN, "AWS_WEB_IDENTITY_TOKEN_FILE": "FILE"}
CLOSED_STS = {"AWS_ENDPOINT_URL_STS": "http://127.0.0.1:9"}
MALFORMED_KEY = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "s3cr3t\n"}
# Part of the cause, the default profile's configuration, variables, and the content of FILE.
MISSING: list[tuple[str, str, dict[str, str], bytes]] = [
    ("still expired", keys(Expiration="2020-01-01T00:00:00Z"), {}, b""),
    ("offset-naive", keys(Expiration="2099-01-01T00:00:00"), {}, b""),
    ("ParserError", keys(Expiration="s3cr3t"), {}, b""),
    ("a key is empty", keys(SecretAccessKey="s3cr3t\n"), {}, b""),
    ("boto3: TypeError", keys(SecretAccessKey=None), {}, b""),
    ("custom-process: Unsupported version for", keys(Version="s3cr3t"), {}, b""),
    ("status 3", "credential_process = sh -c 'echo s3cr3t >&2; exit 3'", {}, b""),
    ("boto3: JSONDecodeError", "credential_process = echo s3cr3t", {}, b""),
    ("boto3: AttributeError", "credential_process = echo []", {}, b""),
    ("ValueError: No closing quotation", "credential_process = echo 's3cr3t", {}, b""),
    ("[Errno 2]", "credential_process = /nowhere/tool s3cr3t", {}, b""),
    ("mfa_serial", f"mfa_serial = arn:aws:iam::0:mfa/x\n{CHAIN}", {}, b""),
    (
        "ValueError in putheader",
        f"{SOURCE}\n{keys(SessionToken='s3cr3t' + chr(10))}",
        CLOSED_STS,
        b"",
    ),
    ("Unsupported host 'example.com'", "", {URI: "http://user:s3cr3t@example.com"}, b""),
    ("legal header value", "", CONTAINER, b"s3cr3t\n"),
    ("UnicodeDecodeError", "", CONTAINER, b"\xff"),
    ("Parameter validation", "", IDENTITY, b""),
    ("UnicodeDecodeError", "", IDENTITY, b"s3cr3t\xff"),
    ("a key is empty", "", MALFORMED_KEY, b""),
    ("FOLDER/missing", "", {**IDENTITY, "AWS_WEB_IDENTITY_TOKEN_FILE": "FOLDER/missing"}, b""),
    ("non 200 response 501 from container metadata", "", {URI: "ENDPOINT"}, b""),
]


@pytest.mark.usefixtures("no_keys")
@pytest.mark.parametrize(("part", "profile", "variables", "content"), MISSING)
def test_cause_of_missing_credentials_is_logged_without_a_secret(
    endpoint: Endpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    part: str,
    profile: str,
    variables: dict[str, str],
    content: bytes,
) -> None:
    (tmp_path / "config").write_text(f"[default]\n{profile}\n")
    (tmp_path / "file").write_bytes(content)
    places = {"FILE": tmp_path / "file", "FOLDER": tmp_path, "ENDPOINT": endpoint.url}
    for name, value in variables.items():
        for place, path in places.items():
            value = value.replace(place, str(path))
        monkeypatch.setenv(name, value)
    detail = app.detail_of(failure(app.Credentials(REGION).frozen))
    assert part.replace("FOLDER", str(tmp_path)) in detail
    assert "s3cr3t" not in detail
    assert row_of(detail) is not None, "the runbook has no entry"
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("no_keys")
@pytest.mark.parametrize(
    ("profile", "region", "host"),
    [
        ("", "us-west-1", "sts.us-west-1.amazonaws.com"),
        ("", "cn-north-1", "sts.cn-north-1.amazonaws.com.cn"),
        ("", "us-gov-west-1", "sts.us-gov-west-1.amazonaws.com"),
        ("region = eu-west-1", "ap-east-1", "sts.ap-east-1.amazonaws.com"),
        (CHAIN, "ap-east-1", "sts.ap-east-1.amazonaws.com"),
        (
            f"{SOURCE}\n{ROLE}\nweb_identity_token_file = FILE",
            "ap-east-1",
            "sts.ap-east-1.amazonaws.com",
        ),
    ],
)
def test_role_is_assumed_in_the_services_region(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, profile: str, region: str, host: str
) -> None:
    identity = tmp_path / "identity"
    identity.write_text("of the service account")
    (tmp_path / "config").write_text(f"[default]\n{profile.replace('FILE', str(identity))}\n")
    monkeypatch.setenv("AWS_REGION", region)
    if ROLE not in profile:  # the variables that EKS gives a pod
        monkeypatch.setenv("AWS_ROLE_ARN", ROLE_ARN)
        monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(identity))
        monkeypatch.setenv("AWS_STS_REGIONAL_ENDPOINTS", "regional")
    settings = app.Settings.from_environ({**os.environ, "SQS_QUEUE_URL": "https://sqs/1/queue"})
    with Endpoint() as proxy:
        proxy.status = 407
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        assert app.create_app(settings).test_client().get("/ready").status_code == 503
        eventually(lambda: proxy.requests)
    assert {request.path for request in proxy.requests} == {f"{host}:443"}
