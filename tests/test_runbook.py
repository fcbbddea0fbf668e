"""The runbook has an entry for every alarm, error code and cause, and its commands run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import botocore.session
import pytest
from botocore.exceptions import ClientError
from commands import executable
from fake_aws import FakeAws
from pages import page, row_of, section
from service import PROJECT, clean_environment

import app

RUNBOOK = page("runbook")
SOURCE = "".join((PROJECT / name).read_text("utf-8") for name in ("app.py", "tracing.py"))
ENTRIES = {
    text.split("\n", 1)[0]: text.split("\n## ", 1)[0] for text in RUNBOOK.split("\n### ")[1:]
}


def test_every_alarm_and_every_5xx_code_has_an_entry() -> None:
    template = (PROJECT / "infra" / "email-processor.yaml").read_text("utf-8")
    alarms = re.findall(r"^  (\w+):\n    Type: AWS::CloudWatch::Alarm", template, re.MULTILINE)
    codes = [code for code, (status, _) in app.ERRORS.items() if status >= 500]
    assert len(alarms) == 6
    assert {*alarms, *codes} <= set(ENTRIES)
    parts = {
        tuple(re.findall(r"^- \*\*([\w ]+):?\*\*", ENTRIES[title], re.M))
        for title in alarms + codes
    }
    assert len(parts) == 1, "meaning, effect on clients, evidence, procedure, end"


def test_log_messages_that_it_names_are_the_services() -> None:
    rows = [row.split("|")[1] for row in RUNBOOK.splitlines() if row.startswith("| ")]
    named = [text for row in rows if "log" in row for text in re.findall(r"`(\w+(?: \w+)+)`", row)]
    assert len(named) >= 5
    assert [text for text in named if text not in SOURCE] == []


def test_metrics_that_it_names_are_the_services() -> None:
    for metric in re.findall(r"email_processor_\w+", RUNBOOK):
        base = re.sub(r"_(total|sum|count|bucket)?$", "", metric)
        assert base.removeprefix("email_processor_") in SOURCE, metric


# --- Causes ---------------------------------------------------------------------------------------

OPERATIONS = {
    "sqs": ("SendMessage", "SendMessageBatch", "GetQueueAttributes"),
    "ssm": ("GetParameters",),
    "sts": ("AssumeRoleWithWebIdentity",),
}
# The common errors of AWS's services, and older spellings of SQS, KMS and STS.
COMMON = re.findall(
    r"\S+",
    """
AccessDenied AccessDeniedException AWS.SimpleQueueService.NonExistentQueue
AWS.SimpleQueueService.UnsupportedOperation ExpiredToken ExpiredTokenException IncompleteSignature
InternalError InternalFailure InternalServerError InvalidAction InvalidAddress InvalidClientTokenId
InvalidParameterCombination InvalidParameterValue InvalidQueryParameter InvalidSignatureException
KMS.AccessDeniedException KMS.DisabledException KMS.ThrottlingException
MalformedHttpRequestException MalformedQueryString MissingAction MissingAuthenticationToken
MissingParameter NotAuthorized OptInRequired RequestAbortedException RequestEntityTooLargeException
RequestExpired RequestLimitExceeded RequestThrottled RequestTimeTooSkewed RequestTimeoutException
ServiceUnavailable SignatureDoesNotMatch SlowDown ThrottlingException TooManyRequestsException
UnknownOperationException UnrecognizedClientException ValidationError
""",
)


def documented() -> Iterator[str]:
    """The causes of every error that AWS documents for the service's calls."""
    for service, operations in OPERATIONS.items():
        model = botocore.session.get_session().get_service_model(service)
        for operation in operations:
            shapes = model.operation_model(operation).error_shapes
            for code in (*(shape.name for shape in shapes), *COMMON):
                response = {"Error": {"Code": code, "Message": ""}}
                yield app.detail_of(ClientError(response, operation))


def test_every_error_that_aws_documents_leads_to_a_row() -> None:
    assert [cause for cause in documented() if row_of(cause) is None] == []


NO_TOKEN_FILE = {
    "AWS_ROLE_ARN": "arn:aws:iam::123456789012:role/email-processor-role",
    "AWS_WEB_IDENTITY_TOKEN_FILE": "/nowhere",
    **dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), ""),
}


@pytest.mark.parametrize(
    ("fault", "word"),
    [
        ({"kind": "error", "status": 400, "code": "KMS.DisabledException"}, "KMS"),
        ({"kind": "reset"}, "Connection was closed"),
        pytest.param({"kind": "hang"}, "timeout", marks=pytest.mark.slow),
        ({"kind": "garbage"}, "JSONDecodeError"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "Could not connect"),
        ({"AWS_ENDPOINT_URL": "http://nowhere.invalid"}, "Could not resolve"),
        ({"HTTP_PROXY": "http://127.0.0.1:9", "NO_PROXY": ""}, "proxy URL"),
        (NO_TOKEN_FILE, "Errno"),
    ],
    ids=str,
)
def test_cause_of_the_log_leads_to_its_row(
    fault: dict[str, Any],
    word: str,
    fake_aws: FakeAws,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    variables = {} if "kind" in fault else fault
    for name, value in {**fake_aws.variables(), **variables}.items():
        monkeypatch.setenv(name, value)
    if "kind" in fault:
        fake_aws.set(faults={"SQS": fault})
    settings = app.Settings(sqs_queue_url=fake_aws.queue_url)
    app.create_app(settings).publisher.read_limit()
    (line,) = [vars(record) for record in caplog.records if record.message == "queue not reached"]
    assert row_of(line["cause"]) == row_of(word), line["cause"]


# --- Commands -------------------------------------------------------------------------------------

needs_aws = pytest.mark.skipif(shutil.which("aws") is None, reason="the AWS CLI is not installed")
# The command checks the arguments of an operation, and does not call it.
CHECK_ONLY = "--generate-cli-skeleton output"


def blocks(text: str) -> list[str]:
    return re.findall(r"```bash\n(.*?)```", text, re.DOTALL)


def run(commands: str, **variables: str) -> str:
    """The standard output of commands of a guide."""
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        env=clean_environment(NO_PROXY="127.0.0.1", **variables),
        capture_output=True,
        text=True,
        input="the clients' token\n",
    )
    assert result.returncode == 0, result
    return result.stdout


@pytest.mark.slow  # the AWS command line is started for each
@needs_aws
def test_commands_of_the_runbook_run(emulator: str) -> None:
    keys = dict.fromkeys(("aws_access_key_id", "aws_secret_access_key"), "test")
    sqs, ssm = (
        boto3.client(name, region_name="us-west-1", endpoint_url=emulator, **keys)
        for name in ("sqs", "ssm")
    )
    for queue in ("dev-CP-queue-dlq", "dev-CP-queue"):
        sqs.create_queue(QueueName=queue)
    first, *others = blocks(RUNBOOK)
    commands = "\n".join([first.split("\n\n")[0], *others])
    commands = re.sub(r"^\./deploy\.sh .*", "", commands, flags=re.MULTILINE)
    # Version 1 of the command ignores AWS_ENDPOINT_URL for SQS. The emulator cannot move messages.
    stand_ins = f"""kubectl() {{ case $1 in
      get) echo pod/a ;;
      exec) echo 'email_processor_tokens_accepted_total{{parameter="/a"}} 1.0'
            echo 'email_processor_token_read_timestamp_seconds 1.0' ;;
      logs) echo '{{"token_parameter": "/email-service/api-token", "client": "10.0.0.1"}}' ;;
    esac; }}
    aws() {{ case "$1 $2" in
      eks*) ;;
      *message-move-task*) command aws "$@" {CHECK_ONLY} ;;
      *) command aws --endpoint-url "$AWS_ENDPOINT_URL" "$@" ;;
    esac; }}
    """
    run(stand_ins + commands, AWS_ENDPOINT_URL=emulator)
    (token,) = ssm.describe_parameters()["Parameters"]
    assert token["Name"] == "/email-service/api-token-2"


@pytest.mark.slow
@needs_aws
def test_other_commands_of_aws_have_right_arguments(tmp_path: Path) -> None:
    commands = re.findall("`(aws [^`]+)`", page("setup") + RUNBOOK)
    assert len(commands) >= 5
    undo = blocks(section("Undo a change by hand"))
    kept = "ParameterKey=QueueName,UsePreviousValue=true"
    # xargs calls a file, not a function. The AWS CLI cannot check the arguments of a wait.
    executable(
        tmp_path / "aws",
        f"""#!/bin/sh
        case "$2" in wait) exit ;; describe-stacks) echo {kept} ;; esac
        {shutil.which("aws")} "$@" {CHECK_ONLY} >&2
        echo "$@" >>{tmp_path}/calls
        """,
    )
    regions = dict.fromkeys(("AWS_REGION", "AWS_DEFAULT_REGION"), "us-west-1")
    path = f"{tmp_path}:{os.environ['PATH']}"
    run("\n".join(["queue_url() { echo url; }", *commands, *undo]), PATH=path, **regions)
    assert f"REVERT_DRIFT --parameters {kept}\n" in (tmp_path / "calls").read_text()
