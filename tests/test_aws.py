"""The service's own client of AWS, against the fake over real connections, beside boto3's."""

from __future__ import annotations

import datetime
import http.server
import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import boto3
import botocore.exceptions
import pytest
from botocore.exceptions import ClientError
from conftest import DATA, PARAMETER, PROJECT, TOKEN, Aws, environment, eventually
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from fake_aws import REGION, FakeAws

import app

ENTRY, _ = app.Message(json.dumps(DATA), request_id="r", trace_header="Root=1-a-b").entry(
    fifo=False
)
LONG = 30.0  # seconds; a guard against hanging alone


@pytest.fixture(autouse=True)
def aws_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the machine's own configuration, and the fake's keys."""
    for name in [n for n in os.environ if n.startswith("AWS_") or n.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")


@pytest.fixture
def verifying(fake: FakeAws, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeAws]:
    """The fake, checking every signature with botocore's signer."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", fake.url)
    fake.set(latency_ms=0, verify=True)
    yield fake
    fake.set(verify=False, secrets={"test": "test"}, session_token="")


def client(service: str = "sqs", seconds: float = LONG) -> app.AwsClient:
    return app.AwsClient(service, REGION, app.Credentials(), seconds)


def send(sqs: Any, fake: FakeAws) -> Any:
    return sqs.send_message(QueueUrl=fake.queue_url, **ENTRY)


def failure(call: Callable[[], Any]) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - any kind, which is what is looked at
        call()
    return caught.value


# --- Signatures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["", "session-token", "t" * 8000])
@pytest.mark.parametrize("secret", ["test", "a/b+c=="])
def test_every_call_is_signed_as_botocore_signs(
    verifying: FakeAws, monkeypatch: pytest.MonkeyPatch, token: str, secret: str
) -> None:
    verifying.set(secrets={"test": secret}, session_token=token)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    if token:
        monkeypatch.setenv("AWS_SESSION_TOKEN", token)
    sqs, url = client(), verifying.queue_url
    assert send(sqs, verifying)["MessageId"]
    entries = [{"Id": "0", **ENTRY}, {"Id": "1", **ENTRY}]
    assert len(sqs.send_message_batch(QueueUrl=url, Entries=entries)["Successful"]) == 2
    limit = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["MaximumMessageSize"])
    assert limit["Attributes"]["MaximumMessageSize"] == "1048576"
    parameters = client("ssm").get_parameters(Names=[PARAMETER], WithDecryption=True)
    assert parameters["Parameters"][0]["Value"] == TOKEN


def test_wrong_secret_is_refused_by_the_fake(
    verifying: FakeAws, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    error = failure(lambda: send(client(), verifying))
    assert app.cause_of(error) == "InvalidSignatureException"


def test_slash_behind_the_endpoint_does_not_matter(
    verifying: FakeAws, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"{verifying.url}/")
    assert send(client(), verifying)["MessageId"]


def test_both_clients_put_the_same_message_into_the_queue(
    aws: Aws, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", aws.endpoint)
    queue = aws.sqs.create_queue(QueueName="both-clients")["QueueUrl"]
    entry, _ = app.Message('{"a": "\\u00e9 1.10"}', "r", "key").entry(fifo=False)
    theirs = boto3.client("sqs", REGION)
    arrived = []
    for sqs in (client(), theirs):
        sent = [sqs.send_message(QueueUrl=queue, **entry)]
        batch = sqs.send_message_batch(QueueUrl=queue, Entries=[{"Id": "0", **entry}])
        sent += batch["Successful"]
        received = aws.sqs.receive_message(
            QueueUrl=queue, MaxNumberOfMessages=10, MessageAttributeNames=["All"]
        )["Messages"]
        assert {m["MessageId"] for m in received} == {m["MessageId"] for m in sent}
        arrived.append([(m["Body"], m["MessageAttributes"], m["MD5OfBody"]) for m in received])
    theirs.close()
    assert arrived[0] == arrived[1]
    assert arrived[0][0] == arrived[0][1]


# --- Endpoints ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"AWS_USE_FIPS_ENDPOINT": "true"},
        {"AWS_USE_DUALSTACK_ENDPOINT": "true"},
        {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"},
        {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ENDPOINT_URL_SQS": "http://127.0.0.1:8"},
        {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true"},
    ],
    ids=lambda variables: ",".join(variables) or "none",
)
@pytest.mark.parametrize("service", ["sqs", "ssm"])
def test_endpoint_is_the_one_that_boto3_calls(
    monkeypatch: pytest.MonkeyPatch, service: str, variables: dict[str, str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    theirs, asked = boto3.client(service, "us-west-2"), list[str]()

    def before_send(request: Any, **_: Any) -> None:
        asked.append(request.url)
        raise ConnectionAbortedError

    theirs.meta.events.register("before-send", before_send)
    method = {"sqs": "list_queues", "ssm": "describe_parameters"}[service]
    with pytest.raises(ConnectionAbortedError):
        getattr(theirs, method)()
    theirs.close()
    assert app.AwsClient(service, "us-west-2", app.Credentials()).url == asked[0]


@pytest.mark.parametrize(
    ("variable", "value"),
    [("AWS_ENDPOINT_URL", "localhost:4566"), ("AWS_PROFILE", "nope"), ("AWS_CONFIG_FILE", "bad")],
)
def test_unusable_aws_configuration_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str, value: str
) -> None:
    (tmp_path / "bad").write_text("no configuration")
    value = str(tmp_path / "bad") if value == "bad" else value
    monkeypatch.setenv(variable, value)
    with pytest.raises(app.SettingsError, match=r"^The AWS configuration is unusable: .+$"):
        client()


# --- TLS and proxies ------------------------------------------------------------------------------


def make_certificate(folder: Path, name: str, host: str, days: int = 1) -> tuple[Path, Path]:
    """A certificate of a CA of its own: the CA's file, and one with certificate and key."""
    now = datetime.datetime.now(datetime.UTC)
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    names = [x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, n)]) for n in (name, host)]
    built = []
    for subject, key, is_authority in ((names[0], keys[0], True), (names[1], keys[1], False)):
        built.append(
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(names[0])
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=3))
            .not_valid_after(now + datetime.timedelta(days=9 if is_authority else days))
            .add_extension(x509.BasicConstraints(is_authority, None), critical=True)
            .add_extension(
                x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False
            )
            .sign(keys[0], hashes.SHA256())
        )  # fmt: skip
    pem = serialization.Encoding.PEM
    key_text = keys[1].private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    authority, chain = folder / f"{name}-ca.pem", folder / f"{name}.pem"
    authority.write_bytes(built[0].public_bytes(pem))
    chain.write_bytes(built[1].public_bytes(pem) + key_text)
    return authority, chain


@pytest.mark.parametrize("variable", ["AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"])
def test_call_over_tls_trusts_the_configured_authority(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    authority, chain = make_certificate(tmp_path, "good", "localhost")
    with FakeAws(certificate=str(chain)) as fake:
        fake.set(verify=True)
        monkeypatch.setenv("AWS_ENDPOINT_URL", fake.url.replace("127.0.0.1", "localhost"))
        monkeypatch.setenv(variable, str(authority))
        assert send(client(), fake)["MessageId"]


@pytest.mark.parametrize("fault", ["unknown authority", "wrong host", "expired"])
def test_certificate_that_does_not_hold_ends_the_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    host = "other.test" if fault == "wrong host" else "localhost"
    authority, chain = make_certificate(tmp_path, "bad", host, -1 if fault == "expired" else 1)
    with FakeAws(certificate=str(chain)) as fake:
        monkeypatch.setenv("AWS_ENDPOINT_URL", fake.url.replace("127.0.0.1", "localhost"))
        if fault != "unknown authority":
            monkeypatch.setenv("AWS_CA_BUNDLE", str(authority))
        assert app.cause_of(failure(lambda: send(client(), fake))) == "SSLError"
        assert fake.calls("SendMessage") == 0


@pytest.fixture
def proxy(fake: FakeAws) -> Iterator[Any]:
    """An HTTP proxy that passes calls on to the fake, or anywhere by CONNECT, and notes them."""

    class Proxy(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            server.asked.append(self.path)  # type: ignore[attr-defined]
            body = self.rfile.read(int(self.headers["Content-Length"]))
            host = fake.url.removeprefix("http://")
            with socket.create_connection(host.split(":")) as upstream:
                head = f"POST / HTTP/1.1\r\n{self.headers}".replace("\n", "\r\n")
                upstream.sendall(head.replace("\r\r", "\r").encode() + body)
                self.wfile.write(upstream.recv(65536))
            self.close_connection = True

        def do_CONNECT(self) -> None:
            server.asked.append(self.path)  # type: ignore[attr-defined]
            host, port = self.path.split(":")
            self.send_response(200)
            self.end_headers()
            with socket.create_connection((host, int(port))) as upstream:
                back = threading.Thread(target=relay, args=(upstream, self.connection))
                back.start()
                relay(self.connection, upstream)
                back.join()
            self.close_connection = True

        def log_message(self, *_: Any) -> None: ...

    def relay(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    server.asked = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("variables", "through"),
    [
        ({"HTTP_PROXY": "URL"}, True),
        ({"http_proxy": "URL"}, True),
        ({"http_proxy": "URL", "no_proxy": "aws.test"}, False),
        ({"HTTP_PROXY": "URL", "NO_PROXY": "*"}, False),
        ({"HTTP_PROXY": "URL", "NO_PROXY": "other.test"}, True),
        ({"ALL_PROXY": "URL"}, True),  # Python's rule, which boto3 follows
        ({"HTTPS_PROXY": "URL"}, False),  # it is no https call
    ],
)
def test_proxy_is_used_as_boto3_uses_it(
    verifying: FakeAws,
    proxy: Any,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    through: bool,
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://aws.test:{verifying.url.rpartition(':')[2]}")
    for name, value in variables.items():
        monkeypatch.setenv(name, value.replace("URL", f"http://127.0.0.1:{proxy.server_port}"))
    theirs = boto3.client("sqs", REGION)
    config = app.Config(retries={"total_max_attempts": 1})
    theirs = boto3.client("sqs", REGION, config=config)
    for sqs in (client(), theirs):
        proxy.asked.clear()
        if through and "ALL_PROXY" not in variables:
            assert send(sqs, verifying)["MessageId"]
        else:
            error = failure(lambda: send(sqs, verifying))  # noqa: B023
            assert app.cause_of(error) == "EndpointConnectionError"
        assert bool(proxy.asked) == (through and "ALL_PROXY" not in variables)
    theirs.close()


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "https_proxy"])
def test_call_over_tls_goes_through_the_proxy(
    tmp_path: Path, proxy: Any, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    authority, chain = make_certificate(tmp_path, "good", "localhost")
    monkeypatch.setenv("AWS_CA_BUNDLE", str(authority))
    monkeypatch.setenv(variable, f"127.0.0.1:{proxy.server_port}")  # without a scheme
    with FakeAws(certificate=str(chain)) as fake:
        fake.set(verify=True)
        monkeypatch.setenv("AWS_ENDPOINT_URL", fake.url.replace("127.0.0.1", "localhost"))
        sqs = client()
        assert send(sqs, fake)["MessageId"]
        assert proxy.asked == [fake.url.replace("https://127.0.0.1", "localhost")]
        del sqs  # its connection ends with it, and so does the proxy's thread


# --- Errors ---------------------------------------------------------------------------------------


ERRORS = [
    {"status": 500, "code": "InternalFailure"},
    {"status": 403, "code": "AccessDeniedException", "message": "User: x is not authorized"},
    {"status": 400, "code": "com.amazonaws.sqs#RequestThrottled"},
    {"status": 503, "code": "ServiceUnavailable"},
    {"status": 400, "code": "KmsAccessDenied"},
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: str(error["code"]))
@pytest.mark.parametrize("service", ["sqs", "ssm"])
def test_errors_are_those_of_boto3(verifying: FakeAws, service: str, error: dict[str, Any]) -> None:
    verifying.set(faults={"*": {"kind": "error", **error}})
    config = app.Config(retries={"total_max_attempts": 1})
    theirs = boto3.client(service, REGION, config=config)
    seen = []
    for ours in (client(service), theirs):
        call = {
            "sqs": lambda: send(ours, verifying),  # noqa: B023
            "ssm": lambda: ours.get_parameters(Names=["a"]),  # noqa: B023
        }[service]
        found = failure(call)
        assert isinstance(found, ClientError)
        metadata = found.response["ResponseMetadata"]["HTTPStatusCode"]
        text = str(found).replace(" (reached max retries: 0)", "")
        seen.append((text, found.response["Error"], metadata))
    theirs.close()
    assert seen[0] == seen[1]


def test_log_has_the_first_line_of_an_error_alone() -> None:
    text = "The signature does not match.\n\nThe Canonical String was x-amz-security-token:SECRET"
    error = ClientError({"Error": {"Code": "SignatureDoesNotMatch", "Message": text}}, "Send")
    assert app.detail_of(error).endswith("The signature does not match.")


@pytest.mark.usefixtures("verifying")
def test_missing_queue_has_its_older_code() -> None:
    error = failure(lambda: client().send_message(QueueUrl="https://x.test/1/nope", **ENTRY))
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
        ("RequestTimeout", 400, True),
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
    ("kind", "cause"),
    [
        ("reset", "ConnectionClosedError"),
        ("lost_answer", "ConnectionClosedError"),
        ("huge", "ConnectionClosedError"),
        ("garbage", "JSONDecodeError"),
    ],
)
def test_answer_that_is_none_has_its_cause(verifying: FakeAws, kind: str, cause: str) -> None:
    verifying.set(faults={"*": {"kind": kind}})
    error = failure(lambda: send(client(), verifying))
    assert app.cause_of(error) == cause
    assert app.is_temporary(error)


def test_unreachable_endpoint_says_so(monkeypatch: pytest.MonkeyPatch, fake: FakeAws) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        error = failure(lambda: send(client(), fake))
    assert app.cause_of(error) == "EndpointConnectionError"
    assert "Could not connect to" in app.detail_of(error)


def test_unknown_proxy_says_so(monkeypatch: pytest.MonkeyPatch, fake: FakeAws) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://aws.test")
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.invalid:3128")
    error = failure(lambda: send(client(), fake))
    assert app.cause_of(error) == "ProxyConnectionError"
    assert "proxy.invalid" in app.detail_of(error)


# --- One deadline, one send -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hang", "trickle"])
def test_call_ends_at_its_deadline(verifying: FakeAws, kind: str) -> None:
    verifying.set(faults={"*": {"kind": kind}})
    sqs = client().within(0.3)
    error = failure(lambda: send(sqs, verifying))
    assert app.cause_of(error) == "ReadTimeoutError"
    assert isinstance(error, app.TIMEOUTS)
    verifying.set(faults={})
    assert send(sqs.within(LONG), verifying)["MessageId"]  # on the same handle


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
    verifying: FakeAws, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app.pycurl, "Curl", LateCurl)
    assert send(client(), verifying)["MessageId"] == verifying.messages()[0]["message_id"]


def test_connection_that_is_not_made_ends_the_call(
    monkeypatch: pytest.MonkeyPatch, fake: FakeAws
) -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{full.getsockname()[1]}")
        fillers = [socket.socket() for _ in range(3)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        error = failure(lambda: send(client(), fake))
        for filler in fillers:
            filler.close()
    assert app.cause_of(error) == "ConnectTimeoutError"


def test_message_is_sent_once_when_its_connection_dies(verifying: FakeAws) -> None:
    sqs = client()
    send(sqs, verifying)  # the connection is kept
    verifying.set(faults={"*": {"kind": "lost_answer"}})
    before = verifying.calls("SendMessage")
    assert app.cause_of(failure(lambda: send(sqs, verifying))) == "ConnectionClosedError"
    assert verifying.calls("SendMessage") == before + 1


def test_read_is_tried_again_when_its_connection_dies(verifying: FakeAws) -> None:
    ssm = client("ssm")
    verifying.set(faults={"*": {"kind": "reset"}})
    failure(lambda: ssm.get_parameters(Names=[PARAMETER]))
    assert verifying.calls("GetParameters") == 2


def test_connections_closed_while_idle_cost_no_message(verifying: FakeAws) -> None:
    settings = app.Settings(sqs_queue_url=verifying.queue_url)
    service = app.create_app(settings).test_client()
    body = {"data": DATA, "token": TOKEN}
    verifying.set(faults={"SQS": {"kind": "close"}})
    for _ in range(5):
        assert service.post("/process", json=body).status_code == 200
        time.sleep(0.1)  # the fake closes after 0.05 s: what is tested is what time does
    assert len(verifying.messages()) >= 5


def test_no_handle_is_made_before_the_first_call(verifying: FakeAws) -> None:
    threads = threading.active_count()
    sqs = client()
    assert not sqs._handles
    assert threading.active_count() == threads
    send(sqs, verifying)
    assert len(sqs._handles) == 1


def test_calls_take_no_more_memory_or_files(verifying: FakeAws) -> None:
    sqs = client()

    def calls(count: int) -> None:
        for _ in range(count):
            with suppress(Exception):
                send(sqs, verifying)

    verifying.set(verify=False)
    for kind in ("reset", "garbage", "error"):
        verifying.set(faults={"*": {"kind": kind, "share": 0.5, "status": 500, "code": "x"}})
        calls(100)
    files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    calls(2000)
    assert not files or len(os.listdir("/proc/self/fd")) <= files + 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss <= memory + 8192  # kB


# --- Credentials ----------------------------------------------------------------------------------


@pytest.fixture
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setattr(app.Credentials, "LOOK_SECONDS", 0.05)


@pytest.mark.usefixtures("no_keys")
def test_credentials_that_appear_later_are_found(verifying: FakeAws, tmp_path: Path) -> None:
    sqs = client()
    assert app.cause_of(failure(lambda: send(sqs, verifying))) == "NoCredentialsError"
    keys = "[default]\naws_access_key_id = test\naws_secret_access_key = {}\n"
    (tmp_path / "credentials").write_text(keys.format("wrong"))
    eventually(
        lambda: app.cause_of(failure(lambda: send(sqs, verifying))) == "InvalidSignatureException"
    )
    (tmp_path / "credentials").write_text(keys.format("test"))

    def sent() -> Any:
        try:
            return send(sqs, verifying)
        except ClientError:
            return None

    assert eventually(sent)["MessageId"]


@pytest.mark.usefixtures("no_keys")
def test_unreadable_token_file_is_named(
    fake: FakeAws, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", fake.url)
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::000000000000:role/email-processor-role")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "missing"))
    assert "missing" in app.detail_of(failure(lambda: send(client(), fake)))


@pytest.mark.usefixtures("no_keys")
def test_credentials_that_do_not_come_hold_a_request_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, end = threading.Event(), threading.Event()

    class Session:
        def get_credentials(self) -> None:
            asked.set()
            end.wait(LONG)

    monkeypatch.setattr(app, "aws_session", Session)
    monkeypatch.setattr(app.Credentials, "WAIT_SECONDS", 0.2)
    credentials = app.Credentials()
    for _ in range(20):
        assert isinstance(failure(credentials.frozen), botocore.exceptions.BotoCoreError)
    assert asked.is_set()
    end.set()


# --- Name servers that are silent -----------------------------------------------------------------

SILENT = """
import sys, time
sys.path.insert(0, {project!r})
import app
sqs = app.AwsClient("sqs", "us-west-1", app.Credentials(), 0.5)
began = time.monotonic()
try:
    sqs.send_message(QueueUrl="q", MessageBody="b")
except Exception as error:
    print(app.cause_of(error))
del sqs
print("dropped", time.monotonic() - began < 4)
"""


@pytest.fixture
def silent_resolver(tmp_path: Path) -> Iterator[list[str]]:
    """A command that starts another one where the only name server answers nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        try:
            server.bind(("127.0.77.53", 53))
        except OSError as error:
            pytest.skip(f"needs the right to listen on port 53: {error}")
        resolv = tmp_path / "resolv.conf"
        resolv.write_text("nameserver 127.0.77.53\n")
        command = ["unshare", "--mount", "sh", "-c"]
        mount = f'mount --bind {resolv} "$(readlink -f /etc/resolv.conf)" && exec "$@"'
        command += [mount, "sh"]
        try:
            subprocess.run([*command, "true"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"needs a mount namespace: {error}")
        yield command


def test_silent_name_server_ends_the_call_within_its_time(silent_resolver: list[str]) -> None:
    result = subprocess.run(
        [*silent_resolver, sys.executable, "-c", SILENT.format(project=str(PROJECT))],
        env=environment(AWS_ENDPOINT_URL="http://sqs.email-processor.test"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.stdout.split() == ["ConnectTimeoutError", "dropped", "True"], result.stderr
