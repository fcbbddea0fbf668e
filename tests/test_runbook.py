"""RUNBOOK.md has an entry for whatever an operator can meet, and its commands run."""

from __future__ import annotations

import json
import re
import shutil

import pytest
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


def test_every_cause_in_its_tables_is_one_that_the_log_can_have() -> None:
    """By the messages and codes that app.py and botocore have."""
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
