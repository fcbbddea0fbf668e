"""RUNBOOK.md has an entry for whatever an operator can meet, and its commands run."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import boto3
import botocore.exceptions as failures
import pytest
from botocore.awsrequest import AWSResponse
from botocore.config import Config
from conftest import PROJECT
from test_deploy import World, emulator, world

import app

__all__ = ["emulator", "world"]  # fixtures

RUNBOOK = (PROJECT / "RUNBOOK.md").read_text("utf-8")
TEMPLATE = (PROJECT / "infra" / "email-processor.yaml").read_text("utf-8")
ENTRIES = {
    text.split("\n", 1)[0]: text.split("\n## ", 1)[0] for text in RUNBOOK.split("\n### ")[1:]
}
PARTS = ["Means:", "Clients see:", "Look:", "Mend", "Mended when:"]


def test_every_alarm_and_every_5xx_code_has_an_entry() -> None:
    alarms = re.findall(r"^  (\w+):\n    Type: AWS::CloudWatch::Alarm", TEMPLATE, re.MULTILINE)
    codes = [code for code, (status, _) in app.ERRORS.items() if status >= 500]
    assert len(alarms) == 6
    assert set(alarms + codes) <= set(ENTRIES)


def test_every_alarm_names_an_entry_that_is_there() -> None:
    assert set(re.findall(r"RUNBOOK\.md:\s+(\w+)", TEMPLATE)) <= set(ENTRIES)


@pytest.mark.parametrize("title", [title for title, text in ENTRIES.items() if "**Means" in text])
def test_entry_says_what_it_means_how_to_look_how_to_mend_and_when_it_is_mended(title: str) -> None:
    parts = re.findall(r"^- \*\*(\w[\w ]*:?)\*\*", ENTRIES[title], re.MULTILINE)
    assert [part.rstrip(":") for part in parts] == [part.rstrip(":") for part in PARTS]


def test_every_entry_of_an_alarm_or_an_answer_has_these_parts() -> None:
    recovery = RUNBOOK.split("\n## Disaster recovery\n")[1]
    without = {title for title, text in ENTRIES.items() if "**Means" not in text}
    assert without == set(re.findall(r"^### (.+)$", recovery, re.MULTILINE))
    assert len(without) == 4


def test_every_link_leads_somewhere() -> None:
    headings = {
        re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", RUNBOOK, re.MULTILINE)
    }
    links = set(re.findall(r"\]\(#([\w-]+)\)", RUNBOOK))
    assert links
    assert links <= headings


def test_every_message_and_metric_that_it_names_is_one_of_the_service() -> None:
    source = (PROJECT / "app.py").read_text("utf-8")
    for text in (
        "token not read",
        "queue not seen",
        "messages not sent",
        "SQS is down",
        "token parameter missing in SSM",
        "unforeseen error",
        "SQS is back",
        "out of time",
    ):
        assert text in RUNBOOK
        assert text in source
    for metric in re.findall(r"email_processor_\w+", RUNBOOK):
        base = re.sub(r"_(total|sum|count|bucket)?$", "", metric)
        assert base.removeprefix("email_processor_") in source, metric


class Answer:
    """What AWS answers: an error by its name, and by the name that SQS's older protocol had."""

    def __init__(self, name: str, older: str = "", status: int = 400, **body: Any) -> None:
        self.status = status
        self.body = json.dumps({"__type": name, "message": "It is so.", **body}).encode()
        fault = "Sender" if status < 500 else "Receiver"
        self.headers = {"x-amzn-query-error": f"{older};{fault}"} if older else {}

    def __call__(self, request: Any, **_: Any) -> AWSResponse:
        response = AWSResponse(request.url, self.status, self.headers, None)
        response._content = self.body
        return response


def failing(error: Exception) -> Callable[..., None]:
    def fail(**_: Any) -> None:
        raise error

    return fail


ROLE_REFUSED = failures.ClientError(
    {"Error": {"Code": "AccessDenied", "Message": "Not authorized."}}, "AssumeRoleWithWebIdentity"
)
URL = {"endpoint_url": "https://aws.example"}
BOTH = [
    Answer("AccessDeniedException"),
    Answer("ThrottlingException"),
    Answer("ExpiredTokenException"),
    Answer("UnrecognizedClientException"),
    failing(ROLE_REFUSED),
    failing(failures.NoCredentialsError()),
    failing(failures.ReadTimeoutError(**URL)),
    failing(failures.ConnectTimeoutError(**URL)),
    failing(failures.EndpointConnectionError(**URL)),
]
# Entry -> what may come instead of an answer.
FAULTS = {
    "queue_unavailable": [
        *BOTH,
        Answer("com.amazonaws.sqs#QueueDoesNotExist", "AWS.SimpleQueueService.NonExistentQueue"),
        Answer("com.amazon.coral.service#InvalidClientTokenId", "InvalidClientTokenId"),
        Answer("com.amazonaws.sqs#RequestThrottled", "RequestThrottled"),
        Answer("InternalFailure", status=500),
        Answer("ServiceUnavailable", status=503),
        Answer("", status=200),
        failing(failures.ConnectionClosedError(**URL)),
    ],
    "token_store_unavailable": [
        *BOTH,
        Answer("", status=200, Parameters=[], InvalidParameters=["/email-service/api-token"]),
    ],
}


def look(entry: str) -> None:
    """Let the service look for the queue or the token, with each of the faults for an answer."""
    service = {"queue_unavailable": "sqs", "token_store_unavailable": "ssm"}[entry]
    session, config = boto3.Session("key", "secret"), Config(retries={"total_max_attempts": 1})
    client = session.client(service, region_name="us-west-1", config=config)
    faults = iter(FAULTS[entry])
    # First, before the emulator that other tests may have left in this process.
    client.meta.events.register_first("before-send", lambda **call: next(faults)(**call))
    for _ in FAULTS[entry]:
        if service == "ssm":
            app.TokenStore(client, ("/email-service/api-token",), 60).refresh_if_old()
        else:
            with suppress(app.Refusal):
                app.QueueLimit(client, "https://sqs.us-west-1.amazonaws.com/1/queue").bytes()


@pytest.mark.parametrize("entry", FAULTS)
def test_causes_in_its_tables_are_those_that_the_log_has(
    entry: str, caplog: pytest.LogCaptureFixture
) -> None:
    look(entry)
    assert len(caplog.records) == len(FAULTS[entry])
    causes = {vars(record).get("cause", record.message) for record in caplog.records}
    if entry == "queue_unavailable":  # the cause that is none of AWS's
        source = (PROJECT / "app.py").read_text("utf-8")
        causes |= set(re.findall(r'"cause": "([^"]+)"', source))
    table = ENTRIES[entry].split("\n| `cause` has |")[1].split("\n\n")[0]
    cells = [row.split("|")[1] for row in table.splitlines()[2:]]
    named = {word for cell in cells for word in re.findall("`(.+?)`", cell)} - {"cause"}
    assert {word for word in named if not any(word in cause for cause in causes)} == set()
    assert {cause for cause in causes if not any(word in cause for word in named)} == set()


@pytest.mark.skipif(shutil.which("aws") is None, reason="the AWS CLI is not installed")
def test_commands_of_aws_run(world: World) -> None:
    sqs = world.client("sqs")
    dead = sqs.create_queue(QueueName="dev-CP-queue-dlq")["QueueUrl"]
    arn = sqs.get_queue_attributes(QueueUrl=dead, AttributeNames=["QueueArn"])["Attributes"]
    redrive = json.dumps({"deadLetterTargetArn": arn["QueueArn"], "maxReceiveCount": 5})
    sqs.create_queue(QueueName="source", Attributes={"RedrivePolicy": redrive})
    world.client("ssm").put_parameter(
        Name="/email-service/api-token", Value="old", Type="SecureString"
    )
    blocks = re.findall(r"```bash\n(.*?)```", RUNBOOK, re.DOTALL)
    commands = [block for block in blocks if "aws " in block and "kubectl" not in block]
    assert len(commands) >= 5
    # Version 1 of the command ignores AWS_ENDPOINT_URL for SQS. What the emulator does not have is
    # checked by the command alone, arguments and all.
    aws = """aws() { case "$*" in
      *message-move-task*) command aws "$@" --generate-cli-skeleton output ;;
      *) command aws --endpoint-url "$AWS_ENDPOINT_URL" "$@" ;;
    esac; }
    """
    for block in commands:
        result = world.execute("bash", "-euo", "pipefail", "-c", aws + block)
        assert result.returncode == 0, (block, result.stderr)
    assert world.token("/email-service/api-token-2")["Value"]
