"""Arbitrary requests: none of them may get a 5xx, or an answer of the wrong shape."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import schemathesis
from botocore.exceptions import ClientError
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from werkzeug.test import EnvironBuilder, run_wsgi_app

import app

TOKEN = "the token of these tests"
DATA = {
    "email_subject": "Happy new year!",
    "email_sender": "John doe",
    "email_timestream": "1693561101",
    "email_content": "Just want to say... Happy new year!!!",
}
JSON = {"Content-Type": "application/json"}
# The same examples in every run, and no verdict that depends on the machine's speed.
FUZZ = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=120,
    suppress_health_check=[HealthCheck.too_slow],
)


# --- The service, between fakes -------------------------------------------------------------------


class FakeSsm:
    """Parameter Store with one parameter."""

    def get_parameters(self, Names: list[str], WithDecryption: bool) -> dict[str, Any]:  # noqa: N803
        assert WithDecryption
        return {"Parameters": [{"Name": Names[0], "Value": TOKEN}], "InvalidParameters": []}


@dataclass
class FakeSqs:
    """A queue that refuses what SQS refuses."""

    sent: list[dict[str, Any]] = field(default_factory=list)

    def get_queue_attributes(self, **_: Any) -> dict[str, Any]:
        return {"Attributes": {"MaximumMessageSize": "1048576"}}

    def send_message(self, **message: Any) -> dict[str, Any]:
        attributes = {**message["MessageAttributes"], **message.get("MessageSystemAttributes", {})}
        for text in (message["MessageBody"], *(a["StringValue"] for a in attributes.values())):
            if not re.fullmatch("[\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]+", text):
                error = {"Code": "InvalidMessageContents", "Message": repr(text)}
                raise ClientError({"Error": error}, "SendMessage")
        assert re.fullmatch("[!-~]{1,128}", message["MessageDeduplicationId"])
        self.sent.append(message)
        return {"MessageId": f"message-{len(self.sent)}"}


SQS = FakeSqs()
SERVICE = app.create_app(
    app.Settings(sqs_queue_url="http://localhost/queue.fifo"), ssm=FakeSsm(), sqs=SQS
)


@dataclass(frozen=True)
class Answer:
    """An answer that has the shape which every answer must have."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    message: dict[str, Any] | None  # what went into the queue

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def outcome(self) -> str:
        """The error code, or "success"."""
        return str(self.json.get("error", "success"))


def ask(
    method: str = "POST",
    path: str = "/process",
    headers: Mapping[str, str] = JSON,
    body: bytes = b"",
) -> Answer:
    """The service's answer. The environment is made as a server makes it of the request's bytes:
    no client stands between that would refuse, quote or complete anything."""
    environ = EnvironBuilder(method="POST", path="/").get_environ()
    environ |= {"REQUEST_METHOD": method, "PATH_INFO": path, "wsgi.input": io.BytesIO(body)}
    environ |= {"CONTENT_LENGTH": str(len(body))}
    for name, value in headers.items():
        variable = name.upper().replace("-", "_")
        environ[variable if variable.startswith("CONTENT_") else f"HTTP_{variable}"] = value
    SQS.sent.clear()
    parts, status_line, answered = run_wsgi_app(SERVICE, environ, buffered=True)
    answer = Answer(
        status=int(status_line.split()[0]),
        headers={**answered},
        body=b"".join(parts),
        message=SQS.sent[0] if SQS.sent else None,
    )
    assert (answer.message is not None) == (answer.status == 200 and path == "/process")
    check(answer, has_body=method != "HEAD")
    return answer


def check(answer: Answer, has_body: bool) -> None:
    assert answer.status < 500, answer.body
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,128}", answer.headers["X-Request-Id"])
    if answer.status < 400:
        return
    assert answer.headers["Content-Type"] == "application/json"
    if has_body:
        error = answer.json
        assert error.keys() - {"errors"} == {"status", "error", "message", "request_id"}
        assert error["status"] == "error"
        assert app.ERRORS[error["error"]][0] == answer.status
        assert error["request_id"] == answer.headers["X-Request-Id"]
        for problem in error.get("errors", []):
            assert error["error"] in ("invalid_data", "invalid_timestamp")
            assert problem["field"] in DATA
            assert problem["message"] in error["message"]


def exact(text: str) -> Any:
    """The parsed JSON with its numbers as they are written: 1.10 is not 1.1, and 1e400 is a number.
    No string can be taken for one of them."""
    return json.loads(
        text, parse_int=lambda number: (int, number), parse_float=lambda number: (float, number)
    )


# --- What is sent ---------------------------------------------------------------------------------

# st.text() has no surrogates of its own; json.dumps writes a lone one as an escape.
TEXTS = st.text() | st.text(st.characters()) | st.text(st.characters(categories=["Cs", "Cc", "Zs"]))
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner), max_leaves=20
)
TIMESTAMPS = st.integers(946_684_800, 4_102_444_800)
VISIBLE_TEXTS = TEXTS.filter(str.strip)

SPACE = st.text(" \t\r\n", max_size=2)
NUMBERS = st.from_regex(
    r"-?(0|[1-9][0-9]{0,29})(\.[0-9]{1,9})?([eE][+-]?[0-9]{1,3})?",
    fullmatch=True,
    alphabet=st.sampled_from("0123456789.eE+-"),
)


@st.composite
def strings(draw: st.DrawFn, texts: st.SearchStrategy[str] = TEXTS) -> str:
    """The source text of a JSON string, each character as it is or escaped."""

    def escaped(character: str) -> str:
        if character.isprintable() and character not in '"\\' and draw(st.booleans()):
            return character
        units = character.encode("utf-16-be", "surrogatepass")
        pairs = (units[start : start + 2] for start in range(0, len(units), 2))
        return "".join(f"\\u{pair.hex()}" for pair in pairs)

    return '"' + "".join(escaped(character) for character in draw(texts)) + '"'


def documents() -> st.SearchStrategy[str]:
    """The source text of a JSON value, with white space, and names that occur twice."""

    def containers(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        items = st.lists(spaced(inner), max_size=3).map(",".join)
        members = st.lists(member(strings(), inner), max_size=3).map(",".join)
        return items.map("[{}]".format) | members.map("{{{}}}".format)

    leaves = NUMBERS | strings() | st.sampled_from(["null", "true", "false", "1e400", "9" * 5000])
    return st.recursive(leaves, containers, max_leaves=8)


def spaced(source: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.tuples(SPACE, source, SPACE).map("".join)


def member(name: st.SearchStrategy[str], value: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.tuples(spaced(name), spaced(value)).map(":".join)


@st.composite
def valid_requests(draw: st.DrawFn) -> tuple[str, str]:
    """The source text of a valid request, and of its "data"."""
    # The last of several members of one name counts, so these come first.
    names = strings() | strings(st.sampled_from(["data", "token", *DATA]))
    further = st.lists(member(names, documents()), max_size=3)
    values = {name: strings(VISIBLE_TEXTS) for name in DATA}
    values["email_timestream"] = TIMESTAMPS.map(str) | TIMESTAMPS.map('"{}"'.format)
    fields = [draw(member(strings(st.just(name)), value)) for name, value in values.items()]
    data = "{" + ",".join(draw(further) + draw(st.permutations(fields))) + "}"
    token = draw(member(strings(st.just("token")), strings(st.just(TOKEN))))
    named_data = draw(SPACE) + draw(strings(st.just("data"))) + draw(SPACE) + ":" + data
    members = draw(further) + draw(st.permutations([token, named_data]))
    return draw(SPACE) + "{" + ",".join(members) + "}" + draw(SPACE), data


# --- Bodies ---------------------------------------------------------------------------------------


def send(document: Any) -> Answer:
    return ask(body=json.dumps(document).encode())


@FUZZ
@given(st.binary() | st.text().map(str.encode) | documents().map(str.encode))
@example(b"[" * 100_000)
@example(b'{"data":' * 100_000)
@example(b'{"token":' + b"9" * 100_000 + b"}")
def test_any_body_without_a_token_is_no_json_or_lacks_its_token(body: bytes) -> None:
    assert ask(body=body).outcome in ("invalid_json", "token_required", "invalid_token")


@FUZZ
@given(st.data(), valid_requests())
def test_any_damage_to_a_valid_body_gets_a_4xx_or_does_not_matter(
    data: st.DataObject, valid: tuple[str, str]
) -> None:
    body = valid[0].encode()
    start = data.draw(st.integers(0, len(body)))
    end = data.draw(st.integers(start, min(start + 10, len(body))))
    ask(body=body[:start] + data.draw(st.binary(max_size=10)) + body[end:])


@FUZZ
@given(VALUES)
def test_any_json_document_but_an_object_is_invalid_json(document: Any) -> None:
    document = [document] if isinstance(document, dict) else document
    assert send(document).outcome == "invalid_json"


@FUZZ
@given(TEXTS | VALUES, st.booleans())
@example("\ud800", True)
def test_any_token_but_the_one_is_401_and_nothing_is_said_of_the_data(
    token: Any, has_data: bool
) -> None:
    answer = send({"data": DATA if has_data else None, "token": token})
    assert answer.outcome == ("token_required" if token in (None, "") else "invalid_token")


@FUZZ
@given(VALUES)
def test_any_data_without_the_fields_is_invalid_data(data: Any) -> None:
    assert send({"data": data, "token": TOKEN}).outcome == "invalid_data"


def is_valid(name: str, value: Any) -> bool:
    """Rules 10 and 11 of the contract."""
    if name != "email_timestream":
        return isinstance(value, str) and value.strip() != ""
    if isinstance(value, str) and re.fullmatch("[0-9]+", value):
        value = int(value)
    return type(value) is int and 946_684_800 <= value <= 4_102_444_800


# What int() takes, and the contract does not: other scripts' digits, white space, signs, 1_000.
NEARLY_DIGITS = st.builds(
    str.format, st.sampled_from([" {}", "{}\n", "+{}", "\u0660{}", "{:_}", "{}.0"]), TIMESTAMPS
)
NUMBER_TEXTS = TIMESTAMPS.map(str) | st.integers().map(str) | NEARLY_DIGITS
FIELD_VALUES = dict.fromkeys(DATA, TEXTS | VALUES) | {
    "email_timestream": TIMESTAMPS | NUMBER_TEXTS | TEXTS | VALUES
}


@FUZZ
@given(st.fixed_dictionaries({}, optional=FIELD_VALUES), st.sets(st.sampled_from(sorted(DATA))))
def test_any_fields_are_queued_or_all_those_at_fault_are_named(
    changes: dict[str, Any], missing: set[str]
) -> None:
    data = {name: value for name, value in (DATA | changes).items() if name not in missing}
    answer = send({"data": data, "token": TOKEN})
    at_fault = {name for name in DATA if not is_valid(name, data.get(name))}
    assert {problem["field"] for problem in answer.json.get("errors", [])} == at_fault
    assert (answer.message is None) == bool(at_fault)
    if answer.outcome == "invalid_timestamp":
        assert at_fault == {"email_timestream"}
    elif answer.message:
        # What was sent, in which two escapes can make a pair.
        assert json.loads(answer.message["MessageBody"]) == json.loads(json.dumps(data))


@FUZZ
@given(valid_requests())
def test_any_valid_data_is_queued_in_ascii_with_its_texts_and_numbers_unchanged(
    valid: tuple[str, str],
) -> None:
    body, data = valid
    answer = ask(body=body.encode())
    assert answer.outcome == "success"
    assert answer.message is not None
    queued = answer.message["MessageBody"]
    assert queued.isascii()
    assert exact(queued) == exact(data)


# --- Headers, paths and methods -------------------------------------------------------------------

HEADER_NAMES = st.sampled_from(
    [
        *("Accept", "Accept-Encoding", "Authorization", "Connection", "Content-Encoding"),
        *("Content-Length", "Content-Type", "Cookie", "Expect", "Forwarded", "Host", "If-Match"),
        *("If-Modified-Since", "If-None-Match", "If-Range", "Origin", "Range", "Referer"),
        *("Transfer-Encoding", "Upgrade", "User-Agent", "X-Forwarded-For", "X-Forwarded-Host"),
        *("X-Forwarded-Proto", "X-HTTP-Method-Override"),
    ]
)
# A header is read as Latin-1. Gunicorn refuses control characters in it, but for the tab.
HEADER_TEXTS = st.text(st.characters(max_codepoint=255)) | st.text('0123456789-=/;:,.*" \tabcdefx')
UTF_8_TEXTS = st.text().map(lambda text: text.encode().decode("latin-1"))
HEADER_VALUES = (HEADER_TEXTS | UTF_8_TEXTS).map(
    lambda text: re.sub(r"[\x00-\x08\x0a-\x1f\x7f]", "", text)
)
TRACES = HEADER_VALUES | st.from_regex(
    r"(Root=1-[0-9a-f]{8}-[0-9a-f]{24}|[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-0[01])[-;]?[=:|\w]*",
    fullmatch=True,
).filter(str.isascii)
HEADERS = st.dictionaries(HEADER_NAMES, HEADER_VALUES, max_size=6)


BODY = json.dumps({"data": DATA, "token": TOKEN}).encode()


@FUZZ
@given(HEADERS)
def test_any_headers_get_a_4xx_or_do_not_matter(headers: dict[str, str]) -> None:
    answer = ask(headers=JSON | headers, body=BODY)
    if not headers.keys() & {"Content-Length", "Content-Type", "Host", "Transfer-Encoding"}:
        assert answer.outcome == "success"


@FUZZ
@given(HEADER_VALUES, TRACES, TRACES, HEADER_VALUES)
def test_any_headers_that_go_into_the_queue_are_taken(
    key: str, trace: str, traceparent: str, request: str
) -> None:
    headers = {"Idempotency-Key": key, "X-Amzn-Trace-Id": trace, "traceparent": traceparent}
    answer = ask(headers=JSON | headers | {"X-Request-Id": request}, body=BODY)
    assert answer.outcome == "success"
    assert answer.message
    for passed_on in answer.message.get("MessageSystemAttributes", {}).values():
        assert re.search("(^|;)Root=1-[0-9a-f]{8}-[0-9a-f]{24}(;|$)", passed_on["StringValue"])
        assert re.fullmatch(r"[\w=;:.|-]{1,1024}", passed_on["StringValue"], re.ASCII)


ASSETS = ["/docs/swagger-ui.css", "/docs/swagger-ui-bundle.js"]
KNOWN = [rule.rule for rule in SERVICE.url_map.iter_rules() if "<" not in rule.rule] + ASSETS
PATHS = st.sampled_from(KNOWN)


@FUZZ
@given(HEADERS, PATHS, st.sampled_from(["GET", "HEAD"]))
def test_any_headers_of_a_get_get_a_4xx_or_do_not_matter(
    headers: dict[str, str], path: str, method: str
) -> None:
    ask(method, path, headers)


ODD_ENDS = ["/", "//", "/..", "/.", ";a", "%", "%2f", " ", "\n", "\xe4", "?"]


ANY_METHODS = st.sampled_from(
    ["DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE", "get"]
) | st.from_regex(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,20}", fullmatch=True)
ANY_PATHS = (
    PATHS
    | st.tuples(PATHS, st.sampled_from(ODD_ENDS)).map("".join)
    | st.tuples(st.just("/"), PATHS).map("".join)
    | st.binary().map(lambda path: "/" + path.decode("latin-1"))
    | st.text("/.%~\\").map("/".__add__)
)


@settings(FUZZ, max_examples=300)
@given(ANY_METHODS, ANY_PATHS, st.binary(max_size=20))
def test_any_method_and_path_are_answered_or_404_or_405_with_allow(
    method: str, path: str, body: bytes
) -> None:
    answer = ask(method, path, body=body)
    assert (answer.status == 404) == (path not in KNOWN)
    assert (answer.status == 405) == ("Allow" in answer.headers)
    assert method not in answer.headers.get("Allow", "").split(", ")


# --- Metrics --------------------------------------------------------------------------------------


@dataclass
class FailingAws:
    """SSM and SQS at once; one of the two operations fails."""

    operation: str
    code: str
    status: int

    def get_parameters(self, **_: Any) -> dict[str, Any]:
        return self._answer("GetParameters", {"Parameters": [{"Value": TOKEN}]})

    def get_queue_attributes(self, **_: Any) -> dict[str, Any]:
        return {"Attributes": {"MaximumMessageSize": "1048576"}}

    def send_message(self, **_: Any) -> dict[str, Any]:
        return self._answer("SendMessage", {"MessageId": "m"})

    def _answer(self, operation: str, answer: dict[str, Any]) -> dict[str, Any]:
        if operation != self.operation:
            return answer
        metadata = {"HTTPStatusCode": self.status}
        raise ClientError({"Error": {"Code": self.code}, "ResponseMetadata": metadata}, operation)


def series() -> set[tuple[str, frozenset[tuple[str, str]]]]:
    families = text_string_to_metric_families(app.metrics_text().decode())
    samples = [sample for family in families for sample in family.samples]
    return {(s.name, frozenset(s.labels.items())) for s in samples}


SERIES = series()


@FUZZ
@given(
    ANY_METHODS,
    ANY_PATHS,
    HEADERS,
    st.text(),
    st.sampled_from(["GetParameters", "SendMessage"]),
    st.text(),
    st.integers(200, 599),
)
def test_whatever_clients_send_and_aws_answers_makes_no_new_series(
    method: str,
    path: str,
    headers: dict[str, str],
    token: str,
    operation: str,
    code: str,
    status: int,
) -> None:
    ask(method, path, headers)
    ask(body=json.dumps({"token": token}).encode())
    aws = FailingAws(operation, code, status)
    config = app.Settings(sqs_queue_url="http://localhost/queue")
    service = app.create_app(config, ssm=aws, sqs=aws, pause=lambda _: None)
    answer = service.test_client().post("/process", data=BODY, headers=JSON)
    assert answer.status_code == 503
    assert len(SERIES) > 80
    assert series() == SERIES


# --- openapi.yaml ---------------------------------------------------------------------------------


def configuration() -> schemathesis.Config:
    config = schemathesis.Config()
    project = config.projects.default
    project.generation.update(deterministic=True)
    # By default, 401 and 5xx count as accepted too. Here the token is right and AWS is up.
    project.checks.positive_data_acceptance.expected_statuses = ["200"]
    return config


api = schemathesis.openapi.from_wsgi("/openapi.json", SERVICE, config=configuration())
api.location = None  # or else it leaves out the path that it read the description from


@api.parametrize()
@settings(FUZZ, max_examples=200)
def test_the_service_keeps_what_openapi_yaml_promises(case: schemathesis.Case[Any]) -> None:
    if isinstance(case.body, dict):
        if isinstance(case.body.get("token"), str) and case.body["token"]:
            case.body["token"] = TOKEN
        data = case.body.get("data")
        timestamp = data.get("email_timestream") if isinstance(data, dict) else None
        # JSON Schema counts 1693561101.0 among the integers; the contract asks for a JSON integer.
        assume(not (isinstance(timestamp, float) and timestamp.is_integer()))
    case.call_and_validate()
