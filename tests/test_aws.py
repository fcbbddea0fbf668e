"""The client of AWS over real connections, compared with boto3's."""

from __future__ import annotations

import datetime
import http.server
import json
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
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
from client import DATA
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from fake_aws import PARAMETER, REGION, FakeAws
from pages import row_of
from service import PROJECT, clean_environment, eventually

import app

ENTRY, _ = app.Message(json.dumps(DATA), request_id="r", trace_header="Root=1-a-b").send_arguments(
    fifo=False
)
LONG_TIMEOUT = 30.0  # seconds; no test waits that long


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
    monkeypatch.setattr(app.Credentials, "WAIT_SECONDS", LONG_TIMEOUT)
    monkeypatch.setattr(app.Credentials, "CHECK_SECONDS", 1e6)


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
    """An HTTP server, as AWS_ENDPOINT_URL."""
    with Endpoint() as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint.url)
        yield endpoint


@pytest.fixture
def fake_aws(fake_aws: FakeAws, monkeypatch: pytest.MonkeyPatch) -> FakeAws:
    """The fake of SSM and SQS, as AWS_ENDPOINT_URL, without latency."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", fake_aws.url)
    fake_aws.set(latency_ms=0)
    return fake_aws


def client(service: str = "sqs", seconds: float = LONG_TIMEOUT) -> app.AwsClient:
    return app.AwsClient(service, REGION, app.Credentials(REGION), seconds)


def send_message(sqs: Any, queue_url: str = "http://sqs/000000000000/dev-CP-queue") -> Any:
    return sqs.send_message(QueueUrl=queue_url, **ENTRY)


def read_token(ssm: Any) -> Any:
    return ssm.get_parameters(Names=[PARAMETER], WithDecryption=True)


def raised_by(call: Callable[[], Any]) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - of any kind
        call()
    return caught.value


def error_name(error: Exception) -> str:
    return app.cause_of(error) if isinstance(error, ClientError) else type(error).__name__


def send_failure(sqs: Any) -> str:
    """The kind of failure of sending."""
    return error_name(raised_by(lambda: send_message(sqs)))


def boto3_client(service: str) -> Any:
    return boto3.client(service, REGION, config=app.Config(retries={"total_max_attempts": 1}))


# --- Signatures -----------------------------------------------------------------------------------


def signature(request: Request, url: str, secret: str) -> str:
    """The signature of botocore's signer for a request."""
    headers = {name.lower(): value for name, value in request.headers.items()}
    access_key, _, region, service, _ = re.split("[=/]", headers["authorization"])[1:6]
    (names,) = re.findall(r"SignedHeaders=([^,]+)", headers["authorization"])
    assert {"host", "x-amz-date", "x-amz-target", "x-amz-security-token"} <= {*names.split(";")}
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


def test_every_call_is_signed_as_botocore_signs(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"{endpoint.url}/")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a/b+c==")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "t" * 8000)
    sqs = client()
    assert send_message(sqs) == {"MessageId": "m"}
    sqs.send_message_batch(QueueUrl="q", Entries=[{"Id": "0", **ENTRY}])
    sqs.get_queue_attributes(QueueUrl="q", AttributeNames=["MaximumMessageSize"])
    read_token(client("ssm"))
    assert endpoint.requests[0].headers["X-Amzn-Query-Mode"] == "true", "for its error codes"
    for request, service in zip(endpoint.requests, ("sqs", "sqs", "sqs", "ssm"), strict=True):
        authorization = request.headers["Authorization"]
        assert f"/{REGION}/{service}/aws4_request" in authorization
        expected = signature(request, endpoint.url, "a/b+c==")
        assert authorization.rpartition("Signature=")[2] == expected
        assert request.headers["X-Amz-Security-Token"] == "t" * 8000


# --- Endpoints ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "url"),
    [
        ({}, "https://SERVICE.us-west-1.amazonaws.com/"),
        ({"AWS_USE_FIPS_ENDPOINT": "true"}, "https://SERVICE-fips.us-west-1.amazonaws.com/"),
        (
            {"AWS_ENDPOINT_URL": "http://sqs", "AWS_ENDPOINT_URL_SSM": "http://ssm"},
            "http://SERVICE/",
        ),
    ],
    ids=["default", "FIPS", "configured"],
)
def test_endpoint_is_that_of_the_aws_configuration(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], url: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for service in ("sqs", "ssm"):
        assert client(service).url == url.replace("SERVICE", service)


@pytest.mark.parametrize(
    ("variable", "value"), [("AWS_ENDPOINT_URL", "user:s3cr3t@localhost"), ("AWS_PROFILE", "x")]
)
def test_unusable_aws_configuration_is_one_line(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(app.SettingsError, match=r"^The AWS configuration is unusable: .+$") as end:
        client()
    assert "s3cr3t" not in str(end.value)


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
            assert send_message(client())["MessageId"]
        else:
            assert send_failure(client()) == "SSLError"
            assert not endpoint.requests


@pytest.mark.parametrize(
    ("variables", "through"),
    [
        ({"HTTP_PROXY": "URL", "NO_PROXY": "127.0.0.1"}, False),
        ({"HTTP_PROXY": "URL", "NO_PROXY": "127.0.0.0/8"}, True),  # libcurl reads networks too
        ({"ALL_PROXY": "URL", "HTTPS_PROXY": "URL"}, False),  # libcurl would use the first
    ],
)
def test_proxy_is_used_as_boto3_uses_it(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], through: bool
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:8")
    for name, value in variables.items():
        monkeypatch.setenv(name, value.replace("URL", endpoint.url))
    boto = boto3_client("sqs")
    for sqs in (client(), boto):
        endpoint.requests.clear()
        if through:
            assert send_message(sqs)["MessageId"]
            assert [r.path for r in endpoint.requests] == ["http://127.0.0.1:8/"]
        else:
            assert send_failure(sqs) == "EndpointConnectionError"
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
        assert send_message(client())["MessageId"]
        assert [r.path for r in proxy.requests] == ["localhost:8", "/"]


@pytest.mark.parametrize(
    "proxy",
    [
        "user:s3cr3t@127.0.0.1:9",
        "http://user:/s3cr3t@localhost:9",
        "http://user:s3cr3t@localhost:TLS_PORT",  # closes the connection
        "http://user:s3cr3t@localhost:PORT",  # responds with 407
    ],
)
def test_failing_proxy_is_named_without_its_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proxy: str
) -> None:
    with Endpoint(make_certificate(tmp_path)) as with_tls, Endpoint() as rejecting:
        rejecting.status = 407
        url = proxy.replace("TLS_PORT", str(with_tls.server_port))
        monkeypatch.setenv("HTTPS_PROXY", url.replace("PORT", str(rejecting.server_port)))
        errors = [raised_by(lambda: send_message(client()))]
        assume_role(monkeypatch, tmp_path)  # botocore calls STS
        errors.append(raised_by(lambda: send_message(client())))
    for detail in map(app.detail_of, errors):
        assert ("407" in detail) == ("localhost:PORT" in proxy)
        assert row_of(detail) == row_of("proxy URL")
        assert "r3t" not in detail


def test_proxy_that_rejects_a_call_without_tls_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://aws.test")
    with Endpoint() as proxy:
        proxy.status = 407
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        assert send_failure(client()) == "ProxyConnectionError"


def test_failure_behind_a_proxy_is_not_the_proxys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://localhost:8")
    with Endpoint(make_certificate(tmp_path), is_proxy=True) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.server_port}")
        error = raised_by(lambda: send_message(client()))
    assert isinstance(error, SSLError)
    assert "proxy" not in app.detail_of(error)


# --- Errors ---------------------------------------------------------------------------------------


def test_errors_are_those_of_boto3(fake_aws: FakeAws) -> None:
    def parts(error: Any) -> tuple[Any, ...]:
        text = str(error).replace(" (reached max retries: 0)", "")
        return text, error.response["Error"], error.response["ResponseMetadata"]["HTTPStatusCode"]

    for error in (
        {"status": 500, "code": "InternalFailure"},
        {"status": 403, "code": "AccessDeniedException", "message": "User: x is not authorized"},
        {"status": 400, "code": "com.amazonaws.sqs#RequestThrottled"},
    ):
        fake_aws.set(faults={"*": {"kind": "error", **error}})
        for service, call in {"sqs": send_message, "ssm": read_token}.items():
            boto = boto3_client(service)
            expected = parts(raised_by(partial(call, boto)))
            boto.close()
            assert parts(raised_by(partial(call, client(service)))) == expected


def test_log_has_only_the_first_line_of_an_error() -> None:
    text = "The signature does not match.\n\nThe Canonical String was x-amz-security-token:SECRET"
    error = ClientError({"Error": {"Code": "SignatureDoesNotMatch", "Message": text}}, "Send")
    assert app.detail_of(error).endswith("The signature does not match.")


@pytest.mark.usefixtures("fake_aws")
def test_missing_queue_has_its_older_code() -> None:
    error = raised_by(lambda: send_message(client(), "http://sqs/1/nope"))
    assert app.cause_of(error) == "AWS.SimpleQueueService.NonExistentQueue"
    assert app.concerns_every_message(error)


def test_server_errors_and_throttling_in_any_spelling_are_temporary() -> None:
    for code, status, temporary in [
        ("ThrottlingException", 400, True),
        ("RequestThrottled", 400, True),
        ("RequestLimitExceeded", 400, True),
        ("TooManyRequestsException", 400, True),
        ("SlowDown", 400, True),
        ("RequestTimeout", 400, True),
        ("PriorRequestNotComplete", 400, True),
        ("Unknown", 429, True),
        ("InternalFailure", 500, True),
        ("AccessDenied", 403, False),
        ("InvalidParameterValue", 400, False),
    ]:
        response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
        assert app.is_temporary(ClientError(response, "SendMessage")) is temporary, code


@pytest.mark.parametrize(
    ("kind", "name"), [("huge", "ConnectionClosedError"), ("garbage", "JSONDecodeError")]
)
def test_malformed_response_has_its_cause(fake_aws: FakeAws, kind: str, name: str) -> None:
    fake_aws.set(faults={"*": {"kind": kind}})
    error = raised_by(lambda: send_message(client()))
    assert error_name(error) == name
    assert app.is_temporary(error)


# --- One deadline, one send -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hang", "trickle"])
def test_call_ends_at_its_deadline(fake_aws: FakeAws, kind: str) -> None:
    fake_aws.set(faults={"*": {"kind": kind}})
    sqs, begin = client().with_timeout(0.3), time.monotonic()
    error = raised_by(lambda: send_message(sqs))
    assert time.monotonic() - begin < LONG_TIMEOUT
    assert error_name(error) == "ReadTimeoutError"
    assert isinstance(error, app.TIMEOUTS)
    fake_aws.set(faults={})
    assert send_message(sqs.with_timeout(LONG_TIMEOUT))["MessageId"]  # on the same handle


class LateCurl(app.pycurl.Curl):  # type: ignore[misc]
    """libcurl may report a timeout after it has received the complete response."""

    def perform(self) -> None:
        super().perform()
        raise app.pycurl.error(app.pycurl.E_OPERATION_TIMEDOUT, "Operation timed out")


def test_complete_response_counts_though_libcurl_reports_a_timeout(
    fake_aws: FakeAws, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app.pycurl, "Curl", LateCurl)
    assert send_message(client())["MessageId"] == fake_aws.messages()[0]["message_id"]


def test_connection_that_is_not_made_ends_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = time.monotonic()
    with ExitStack() as stack:
        full = stack.enter_context(socket.socket())
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(3):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{full.getsockname()[1]}")
        assert send_failure(client()) == "ConnectTimeoutError"
    assert time.monotonic() - begin < LONG_TIMEOUT


def test_message_is_sent_once_when_its_connection_dies(fake_aws: FakeAws) -> None:
    sqs = client()
    send_message(sqs)  # the connection is kept
    fake_aws.set(faults={"*": {"kind": "lost_response"}})
    assert send_failure(sqs) == "ConnectionClosedError"
    assert fake_aws.calls("SendMessage") == 2


def test_read_is_tried_again_after_a_temporary_failure(fake_aws: FakeAws) -> None:
    for fault, calls in [
        ({"kind": "reset"}, 2),
        ({"kind": "error", "status": 400, "code": "AccessDeniedException"}, 1),
    ]:
        fake_aws.forget()
        fake_aws.set(faults={"*": fault})
        raised_by(lambda: read_token(client("ssm")))
        assert fake_aws.calls("GetParameters") == calls, fault


def test_connection_is_kept_and_made_at_the_first_call(endpoint: Endpoint) -> None:
    sqs = client()
    assert not sqs._handles, "a handle does not survive the fork"
    for _ in range(3):
        send_message(sqs)
    assert len({request.client for request in endpoint.requests}) == 1


# --- Credentials ----------------------------------------------------------------------------------


ROLE_ARN = "arn:aws:iam::000000000000:role/email-processor-role"


def assume_role(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Set the variables that EKS gives a pod, instead of keys."""
    (folder / "identity").write_text("of the service account")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    monkeypatch.setenv("AWS_ROLE_ARN", ROLE_ARN)
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(folder / "identity"))


@pytest.fixture
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """No keys in the environment, so that other sources of credentials are used."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")


class HeldPause:
    """The pause between two searches for credentials, which the test ends."""

    def __init__(self) -> None:
        self._begun, self._ended = threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, _: float) -> None:
        self._begun.release()
        self._ended.acquire()

    def end(self) -> None:
        """Let the next search begin, and wait for its end."""
        assert self._begun.acquire(timeout=LONG_TIMEOUT)
        self._ended.release()
        assert self._begun.acquire(timeout=LONG_TIMEOUT)
        self._begun.release()


class CredentialProcessClient:
    """A credential_process, and a client with its credentials."""

    def __init__(self, folder: Path) -> None:
        self.output, self.runs = folder / "output", folder / "runs"
        command = f"sh -c 'echo >>{self.runs}; cat {self.output}'"
        (folder / "config").write_text(f"[default]\ncredential_process = {command}\n")
        self.pause = HeldPause()
        self.credentials = app.Credentials(REGION, self.pause)
        self.sqs = app.AwsClient("sqs", REGION, self.credentials, LONG_TIMEOUT)

    def print(self, key: str, **more: str) -> None:
        keys = {"Version": 1, "AccessKeyId": key, "SecretAccessKey": key, **more}
        self.output.write_text(json.dumps(keys))

    def count(self) -> int:
        return len(self.runs.read_text().splitlines())


@pytest.mark.usefixtures("no_keys")
def test_credentials_are_searched_for_until_aws_accepts_them(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    process = CredentialProcessClient(tmp_path)

    def used() -> str:
        send_message(process.sqs)
        authorization = endpoint.requests[-1].headers["Authorization"]
        return str(re.findall("Credential=(\\w+)/", authorization)[0])

    assert send_failure(process.sqs) == "CredentialRetrievalError"
    process.print("key")
    process.pause.end()
    known = used()
    runs = process.count()
    endpoint.rejected = (known, "AccessDeniedException")
    assert send_failure(process.sqs) == "AccessDeniedException"
    process.pause.end()
    assert process.count() == runs, "a permission is missing; the credentials are valid"
    for code in (
        "ExpiredToken",
        "InvalidAccessKeyId",
        "SignatureDoesNotMatch",
        "UnrecognizedClientException",
    ):
        process.print(f"after{code}")
        endpoint.rejected = (known, code)
        assert send_failure(process.sqs) == code
        process.pause.end()
        known = used()
        assert known == f"after{code}"
    process.pause.end()
    assert process.count() == runs + 4, "valid credentials are not searched for again"


@pytest.mark.usefixtures("no_keys")
def test_known_credentials_stay_in_use_while_they_cannot_be_renewed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    process = CredentialProcessClient(tmp_path)
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(minutes=5)
    process.print("first", SessionToken="t", Expiration=soon.isoformat())
    first = process.credentials.current()
    process.output.unlink()
    process.pause.end()
    assert process.credentials.current() == first
    (warning,) = [r for r in caplog.records if r.message == "credentials not renewed"]
    assert "credential_process: status 1" in vars(warning)["cause"]
    process.print("second")
    process.pause.end()
    assert process.credentials.current().access_key == "second"


@pytest.mark.usefixtures("no_keys")
def test_search_that_hangs_delays_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    searching = threading.Event()
    monkeypatch.setattr(app, "aws_session", lambda _: searching.wait(LONG_TIMEOUT))
    monkeypatch.setattr(app.Credentials, "WAIT_SECONDS", 0.1)
    credentials, begin = app.Credentials(REGION), time.monotonic()
    assert isinstance(raised_by(credentials.current), BotoCoreError)
    monkeypatch.setattr(app.Credentials, "WAIT_SECONDS", LONG_TIMEOUT)
    assert isinstance(raised_by(credentials.current), BotoCoreError)  # without a wait
    assert time.monotonic() - begin < LONG_TIMEOUT
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
    assert "status 124" in app.detail_of(raised_by(app.Credentials(REGION).current))


@needs_setpriv
def test_credential_process_ends_with_the_service(tmp_path: Path) -> None:
    """Its children too, even if the service is killed."""
    pid = tmp_path / "pid"
    hang = f"sleep 600 & echo $! >{pid}.new; mv {pid}.new {pid}; wait"
    (tmp_path / "config").write_text(f"[default]\ncredential_process = sh -c '{hang}'\n")
    service = subprocess.Popen(
        [sys.executable, "-c", "import app; app.Credentials('us-west-1').current()"],
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


SOURCE = f"role_arn = {ROLE_ARN}\nsource_profile = b\n[profile b]"
SOURCE_KEYS = "aws_access_key_id = a\naws_secret_access_key = a"
MFA = f"mfa_serial = arn:aws:iam::0:mfa/x\n{SOURCE}\n{SOURCE_KEYS}"
LINE_END_IN_TOKEN = f"{SOURCE}\n{keys(SessionToken='s3cr3t' + chr(10))}"
CLOSED_STS = {"AWS_ENDPOINT_URL_STS": "http://127.0.0.1:9"}
URI, TOKEN = "AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"
CONTAINER = {URI: "http://127.0.0.1/", TOKEN: "FILE"}
IDENTITY = {"AWS_ROLE_ARN": ROLE_ARN, "AWS_WEB_IDENTITY_TOKEN_FILE": "FILE"}
# A pattern of the cause, the default profile's configuration, variables, and the content of FILE.
MISSING: list[tuple[str, str, dict[str, str], bytes]] = [
    ("Unable to locate credentials", "", {}, b""),
    ("still expired", keys(Expiration="2020-01-01T00:00:00Z"), {}, b""),
    ("ParserError in", keys(Expiration="s3cr3t"), {}, b""),
    ("a key is empty", keys(SecretAccessKey="s3cr3t\n"), {}, b""),
    ("custom-process: Unsupported version for", keys(Version="s3cr3t"), {}, b""),
    ("status 3", "credential_process = sh -c 'echo s3cr3t >&2; exit 3'", {}, b""),
    ("boto3: JSONDecodeError", "credential_process = echo s3cr3t", {}, b""),
    ("ValueError: No closing quotation", "credential_process = echo 's3cr3t", {}, b""),
    ("Errno 2", "credential_process = /nowhere/tool s3cr3t", {}, b""),
    ("mfa_serial", MFA, {}, b""),
    ("ValueError in putheader", LINE_END_IN_TOKEN, CLOSED_STS, b""),
    ("Unsupported host 'example.com'", "", {URI: "http://user:s3cr3t@example.com"}, b""),
    ("legal header value", "", CONTAINER, b"s3cr3t\n"),
    ("UnicodeDecodeError", "", IDENTITY, b"s3cr3t\xff"),
    ("non 200 response 501 from container metadata$", "", {URI: "ENDPOINT"}, b""),
]


@pytest.mark.usefixtures("no_keys")
@pytest.mark.parametrize(("pattern", "profile", "variables", "content"), MISSING)
def test_cause_of_missing_credentials_is_logged_without_a_secret(
    endpoint: Endpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    pattern: str,
    profile: str,
    variables: dict[str, str],
    content: bytes,
) -> None:
    (tmp_path / "config").write_text(f"[default]\n{profile}\n")
    (tmp_path / "file").write_bytes(content)
    places = {"FILE": str(tmp_path / "file"), "ENDPOINT": endpoint.url}
    for name, value in variables.items():
        monkeypatch.setenv(name, places.get(value, value))
    detail = app.detail_of(raised_by(app.Credentials(REGION).current))
    assert re.search(pattern, detail)
    assert "s3cr3t" not in detail
    assert row_of(detail) is not None, "the runbook has no entry"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("profile", "region"), [("", "us-west-1"), ("region = eu-west-1", "ap-east-1")]
)
def test_role_is_assumed_in_the_services_region(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, profile: str, region: str
) -> None:
    (tmp_path / "config").write_text(f"[default]\n{profile}\n")
    assume_role(monkeypatch, tmp_path)
    with Endpoint() as proxy:
        proxy.status = 407
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        raised_by(app.Credentials(region).current)
    assert {request.path for request in proxy.requests} == {f"sts.{region}.amazonaws.com:443"}
