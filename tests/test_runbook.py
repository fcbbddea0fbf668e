"""The runbook has an entry for whatever an operator can meet, and its commands run."""

from __future__ import annotations

import json
import re
import shutil
from typing import Any

import pytest
from conftest import PROJECT
from fake_aws import FakeAws
from test_deploy import World, emulator, world
from test_documentation import page

import app

__all__ = ["emulator", "world"]  # fixtures

RUNBOOK = page("runbook")
SOURCE = (PROJECT / "app.py").read_text("utf-8")
ENTRIES = {
    text.split("\n", 1)[0]: text.split("\n## ", 1)[0] for text in RUNBOOK.split("\n### ")[1:]
}


def test_every_alarm_has_an_entry() -> None:
    template = (PROJECT / "infra" / "email-processor.yaml").read_text("utf-8")
    alarms = re.findall(r"^  (\w+):\n    Type: AWS::CloudWatch::Alarm", template, re.MULTILINE)
    assert len(alarms) == 6
    assert set(alarms) <= set(ENTRIES)


def test_every_5xx_code_has_an_entry() -> None:
    assert {code for code, (status, _) in app.ERRORS.items() if status >= 500} <= set(ENTRIES)


def test_entries_have_the_same_parts() -> None:
    """What it means, what clients see, where to look, what to do, when it is over."""
    procedures = re.findall(r"^### (.+)$", RUNBOOK.split("\n## Disaster recovery\n")[1], re.M)
    parts = {
        title: tuple(part.rstrip(":") for part in re.findall(r"^- \*\*([\w ]+:?)\*\*", text, re.M))
        for title, text in ENTRIES.items()
        if title not in procedures
    }
    (same,) = set(parts.values())
    assert len(same) == 5


def test_every_link_leads_somewhere() -> None:
    headings = {
        re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", RUNBOOK, re.MULTILINE)
    }
    links = set(re.findall(r"\]\(#([\w-]+)\)", RUNBOOK))
    assert links
    assert links <= headings


def test_first_look_names_log_messages_of_the_service() -> None:
    rows = [row.split("|")[1] for row in RUNBOOK.splitlines() if row.startswith("| ")]
    named = [text for row in rows if "log" in row for text in re.findall(r"`(\w+(?: \w+)+)`", row)]
    assert len(named) >= 5
    assert [text for text in named if text not in SOURCE] == []


def test_metrics_that_it_names_are_the_services() -> None:
    for metric in re.findall(r"email_processor_\w+", RUNBOOK):
        base = re.sub(r"_(total|sum|count|bucket)?$", "", metric)
        assert base.removeprefix("email_processor_") in SOURCE, metric


def error(code: str, status: int = 400) -> dict[str, Any]:
    return {"kind": "error", "code": code, "status": status}


FAULTS = [
    *(error("AccessDeniedException"), error("ThrottlingException"), error("RequestThrottled")),
    *(error("ExpiredTokenException"), error("UnrecognizedClientException")),
    *(error("InvalidClientTokenId"), error("AWS.SimpleQueueService.NonExistentQueue")),
    *(error("InternalFailure", 500), error("ServiceUnavailable", 503)),
    *({"kind": "hang"}, {"kind": "reset"}),
]
# These need a machine without credentials, or another network.
NOT_HERE = {"AssumeRoleWithWebIdentity", "Unable to locate credentials", "Connect timeout"}


@pytest.fixture
def causes(
    fake: FakeAws, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> set[str]:
    """What the log says about a queue that is not seen, for each of the faults."""
    settings = app.Settings(sqs_queue_url=fake.queue_url)
    for name, value in fake.environment().items():
        monkeypatch.setenv(name, value)

    def look(fault: dict[str, Any]) -> None:
        fake.set(faults={"SQS": fault})
        app.create_app(settings).test_client().get("/ready")

    for fault in FAULTS:
        look(fault)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    look({})
    found = [vars(record) for record in caplog.records if record.message == "queue not seen"]
    assert len(found) == len(FAULTS) + 1
    return {str(record["cause"]) for record in found}


def named_in(entry: str) -> set[str]:
    table = ENTRIES[entry].split("\n| `cause` has |")[1].split("\n\n")[0]
    cells = [row.split("|")[1] for row in table.splitlines()[2:] if "anything else" not in row]
    return {word for cell in cells for word in re.findall("`(.+?)`", cell)} - {"cause"}


@pytest.mark.slow  # SQS hangs once
def test_causes_in_its_tables_are_those_of_the_log(causes: set[str]) -> None:
    causes = causes | set(re.findall(r'"cause": "([^"]+)"', SOURCE))  # none of AWS's
    named = named_in("queue_unavailable")
    assert {cause for cause in causes if not any(word in cause for word in named)} == set()
    named |= named_in("token_store_unavailable") - {"token parameter missing in SSM"}
    unseen = {word for word in named if not any(word in cause for cause in causes)}
    assert unseen == NOT_HERE


@pytest.mark.slow  # the AWS command line is started for each
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
