"""The CloudFormation template: what a stack of it is, with its functions resolved by moto."""

from __future__ import annotations

import itertools
import json
import re
from functools import cache
from typing import Any

import pytest
from moto.cloudformation import cloudformation_backends
from moto.cloudformation.parsing import clean_json
from test_documentation import page
from test_manifests import CONFIG, HPA, NAME, SERVICE, SERVICE_ACCOUNT, SETTINGS

import app

TEMPLATE = (app.PROJECT / "infra" / "email-processor.yaml").read_text("utf-8")
ISSUER = "oidc.example/id/1"
TOKEN = "/email-service/api-token"
WITH_LOAD_BALANCER = {
    "LoadBalancerFullName": "app/email/1a",
    "TargetGroupFullName": "targetgroup/email/2b",
}
accounts = map(
    "{:012}".format, itertools.count(1)
)  # one for each stack: moto has its own for others
pytestmark = pytest.mark.filterwarnings("ignore:Tried to parse")  # moto does not make every type


@cache
def stack(**parameters: str) -> dict[str, Any]:
    """The properties of each resource that the parameters lead to, and "Outputs".

    The account is ACCOUNT_ID, as in the manifests.
    """
    account = next(accounts)
    made = cloudformation_backends[account]["us-west-1"].create_stack(
        NAME, TEMPLATE, {"OidcProvider": ISSUER, **parameters}
    )
    resources = {
        name: clean_json(resource["Properties"], made.resource_map)
        for name, resource in made.template_dict["Resources"].items()
        if made.resource_map.lazy_condition_map.get(resource.get("Condition"), True)
    }
    outputs = clean_json(made.template_dict["Outputs"], made.resource_map)
    resources["Outputs"] = {name: output["Value"] for name, output in outputs.items()}
    return dict(json.loads(json.dumps(resources).replace(account, "ACCOUNT_ID")))


def of_type(kind: str, **parameters: str) -> dict[str, Any]:
    names = re.findall(rf"^  (\w+):\n    Type: AWS::{kind}$", TEMPLATE, re.MULTILINE)
    return {name: found for name, found in stack(**parameters).items() if name in names}


# --- Role -----------------------------------------------------------------------------------------


def statements(**parameters: str) -> list[dict[str, Any]]:
    role = stack(**parameters)["Role"]
    assert "ManagedPolicyArns" not in role
    (policy,) = role["Policies"]
    # moto leaves None where AWS::NoValue leaves nothing.
    found = [statement for statement in policy["PolicyDocument"]["Statement"] if statement]
    for statement in found:
        if isinstance(statement["Resource"], list):
            statement["Resource"] = [resource for resource in statement["Resource"] if resource]
    return found


def test_only_the_service_account_may_take_the_role() -> None:
    metadata = SERVICE_ACCOUNT["metadata"]
    trust = json.loads(stack()["Role"]["AssumeRolePolicyDocument"])
    assert trust["Statement"] == [
        {
            "Effect": "Allow",
            "Principal": {"Federated": f"arn:aws:iam::ACCOUNT_ID:oidc-provider/{ISSUER}"},
            "Action": "sts:AssumeRoleWithWebIdentity",
            "Condition": {
                "StringEquals": {
                    f"{ISSUER}:sub": (
                        f"system:serviceaccount:{metadata['namespace']}:{metadata['name']}"
                    ),
                    f"{ISSUER}:aud": "sts.amazonaws.com",
                }
            },
        }
    ]


@pytest.mark.parametrize("tokens", [[TOKEN], [f"/token/{number}" for number in range(10)]])
def test_role_may_use_its_tokens_and_its_queue_alone(tokens: list[str]) -> None:
    assert statements(TokenParameterNames=",".join(tokens), QueueName="mail.fifo") == [
        {
            "Sid": "ReadToken",
            "Effect": "Allow",
            "Action": "ssm:GetParameter*",
            "Resource": [f"arn:aws:ssm:us-west-1:ACCOUNT_ID:parameter{name}" for name in tokens],
        },
        {
            "Sid": "SendMessages",
            "Effect": "Allow",
            "Action": ["sqs:SendMessage", "sqs:GetQueueAttributes"],
            "Resource": ["arn:aws:sqs:us-west-1:ACCOUNT_ID:mail.fifo"],
        },
    ]


def test_role_may_use_the_former_queue_during_a_roll_out() -> None:
    assert statements(FormerQueueName="old.fifo")[1]["Resource"] == [
        "arn:aws:sqs:us-west-1:ACCOUNT_ID:dev-CP-queue",
        "arn:aws:sqs:us-west-1:ACCOUNT_ID:old.fifo",
    ]


def test_role_may_use_the_tokens_own_key_through_ssm_alone() -> None:
    key = "arn:aws:kms:us-west-1:123:key/1a-2b"
    assert statements(TokenKeyArn=key)[2:] == [
        {
            "Sid": "DecryptToken",
            "Effect": "Allow",
            "Action": "kms:Decrypt",
            "Resource": key,
            "Condition": {"StringEquals": {"kms:ViaService": "ssm.us-west-1.amazonaws.com"}},
        }
    ]


def test_no_other_resource_grants_anything() -> None:
    kinds = set(re.findall(r"^    Type: AWS::(\S+)$", TEMPLATE, re.MULTILINE))
    assert kinds == {
        "CloudWatch::Alarm",
        "CloudWatch::Dashboard",
        "ECR::Repository",
        "IAM::Role",
        "SNS::Subscription",
        "SNS::Topic",
        "SQS::Queue",
        "WAFv2::WebACL",
    }


# --- Names ----------------------------------------------------------------------------------------


def test_names_end_with_the_environment() -> None:
    for end, made in ("", stack()), ("-test", stack(EnvironmentName="test")):
        assert made["Role"]["RoleName"] == f"email-processor-role{end}"
        assert made["Repository"]["RepositoryName"] == f"email-processor{end}"


def test_manifests_name_the_role_of_the_template() -> None:
    annotations = SERVICE_ACCOUNT["metadata"]["annotations"]
    assert annotations == {"eks.amazonaws.com/role-arn": stack()["Outputs"]["RoleArn"]}


def test_manifests_name_the_queue_of_the_template() -> None:
    assert stack()["Outputs"]["QueueUrl"] == CONFIG["sqs_queue_url"]


def test_application_reads_the_token_that_the_role_may_read() -> None:
    (name,) = SETTINGS["token_ssm_parameter"]
    assert statements()[0]["Resource"] == [f"arn:aws:ssm:us-west-1:ACCOUNT_ID:parameter{name}"]


def test_deploy_sh_names_parameters_and_outputs_that_exist() -> None:
    script = (app.PROJECT / "deploy.sh").read_text("utf-8")
    parameters = TEMPLATE.split("\nParameters:\n")[1].split("\nConditions:\n")[0]
    known = {*re.findall(r"^  (\w+):$", parameters, re.MULTILINE), *stack()["Outputs"]}
    read = set(re.findall(r"\$\(value_of (\w+)\)", script))
    given = set(re.findall(r'"([A-Z][a-z]+[A-Z]\w+)=', script))
    assert read
    assert given
    assert read | given <= known


# --- Image, queues, rate limit --------------------------------------------------------------------


def test_images_are_scanned_immutable_and_cleared_away() -> None:
    repository = stack()["Repository"]
    assert repository["ImageTagMutability"] == "IMMUTABLE"
    assert repository["ImageScanningConfiguration"] == {"ScanOnPush": True}
    rules = json.loads(repository["LifecyclePolicy"]["LifecyclePolicyText"])["rules"]
    assert [rule["selection"]["tagStatus"] for rule in rules] == ["untagged", "any"]


def test_queues_are_made_on_request_only() -> None:
    assert of_type("SQS::Queue") == {}
    made = of_type("SQS::Queue", CreateQueue="true")
    names = {name: queue["QueueName"] for name, queue in made.items()}
    assert names == {"Queue": "dev-CP-queue", "DeadLetterQueue": "dev-CP-queue-dlq"}


def test_queues_are_encrypted_with_14_days_to_live() -> None:
    for queue in of_type("SQS::Queue", CreateQueue="true").values():
        assert queue["MessageRetentionPeriod"] == 14 * 24 * 3600
        assert queue["MaximumMessageSize"] == 2**20, "the most that SQS takes"
        assert queue["SqsManagedSseEnabled"] is True


def test_queues_alone_outlive_the_stack() -> None:
    # But for those of a stack whose first deployment fails: the next could not make them.
    kept = r"^    DeletionPolicy: RetainExceptOnCreate\n    UpdateReplacePolicy: Retain$"
    assert len(re.findall(kept, TEMPLATE, re.M)) == TEMPLATE.count("DeletionPolicy") == 2
    assert len(of_type("SQS::Queue", CreateQueue="true")) == 2


def test_failed_messages_go_to_the_dead_letter_queue() -> None:
    made = stack(CreateQueue="true", DeadLetterQueueName="dead")
    assert made["Queue"]["RedrivePolicy"] == {
        "deadLetterTargetArn": "arn:aws:sqs:us-west-1:ACCOUNT_ID:dead",
        "maxReceiveCount": 5,
    }
    source = "arn:aws:sqs:us-west-1:ACCOUNT_ID:dev-CP-queue"
    assert made["DeadLetterQueue"]["RedriveAllowPolicy"]["sourceQueueArns"] == [source]


def test_rate_is_limited_for_each_address_with_429_in_json() -> None:
    acl = stack(RateLimit="100")["WebAcl"]
    assert (acl["Scope"], acl["DefaultAction"]) == ("REGIONAL", {"Allow": {}})
    (rule,) = acl["Rules"]
    limit = rule["Statement"]["RateBasedStatement"]
    assert (limit["AggregateKeyType"], limit["EvaluationWindowSec"]) == ("IP", 300)
    assert int(limit["Limit"]) == 100
    response = rule["Action"]["Block"]["CustomResponse"]
    assert response["ResponseCode"] == 429
    assert [header["Name"] for header in response["ResponseHeaders"]] == ["Retry-After"]
    body = acl["CustomResponseBodies"][response["CustomResponseBodyKey"]]
    assert body["ContentType"] == "APPLICATION_JSON"
    assert json.loads(body["Content"])["error"] == "too_many_requests"


# --- Alarms and dashboard -------------------------------------------------------------------------

BALANCER, DEAD = "LoadBalancer=app/email/1a", "QueueName=dev-CP-queue-dlq"
PODS = f"ClusterName=dev-CP-EKS-CLUSTER Namespace={NAME} Service={NAME}"
# Alarm -> what it watches, when it rings (in how many of how many periods), and how text says that.
ALARMS = {
    "DeadLetterQueueNotEmpty": (
        [f"AWS/SQS ApproximateNumberOfMessagesVisible {DEAD}: Maximum of 60 s"],
        "> 0 in 1 of 1",
        "on a message 5 times",
    ),
    "OldestMessageTooOld": (
        ["AWS/SQS ApproximateAgeOfOldestMessage QueueName=dev-CP-queue: Maximum of 60 s"],
        "> 900 in 5 of 5",
        "for over 15 minutes|in the queue for over 15 minutes",
    ),
    "ServerErrorRateHigh": (
        [
            f"AWS/ApplicationELB HTTPCode_Target_5XX_Count {BALANCER}: Sum of 60 s",
            f"AWS/ApplicationELB HTTPCode_ELB_5XX_Count {BALANCER}: Sum of 60 s",
            f"AWS/ApplicationELB RequestCount {BALANCER}: Sum of 60 s",
        ],
        "> 1 in 3 of 5",
        "over 1 % of the answers were 5xx in 3 of the last 5 minutes",
    ),
    "LatencyHigh": (
        [f"AWS/ApplicationELB TargetResponseTime {BALANCER}: p99 of 60 s"],
        "> 1 in 3 of 5",
        "slowest 1 % of the answers took over 1 s in 3 of the last 5 minutes",
    ),
    "TargetsUnhealthy": (
        [
            f"AWS/ApplicationELB UnHealthyHostCount {BALANCER} TargetGroup=targetgroup/email/2b:"
            " Maximum of 60 s"
        ],
        "> 0 in 3 of 3",
        "unhealthy for 3 minutes",
    ),
    "ReplicasAtMaximum": (
        [f"ContainerInsights service_number_of_running_pods {PODS}: Minimum of 300 s"],
        ">= 10 in 3 of 3",
        "all 10 replicas have run for 15 minutes",
    ),
}
SIGNS = {"GreaterThanThreshold": ">", "GreaterThanOrEqualToThreshold": ">="}
RATE = "100 * (FILL(target, 0) + FILL(balancer, 0)) / (FILL(requests, 0) + FILL(balancer, 0))"


def series(namespace: str, metric: str, dimensions: dict[str, str], statistic: str) -> str:
    named = " ".join(f"{name}={value}" for name, value in dimensions.items())
    return f"{namespace} {metric} {named}: {statistic}"


def watched(alarm: dict[str, Any]) -> list[str]:
    found = []
    statistic = alarm.get("Statistic", alarm.get("ExtendedStatistic"))
    plain = {"Metric": alarm, "Stat": statistic, "Period": alarm.get("Period")}
    for query in alarm.get("Metrics", [{"MetricStat": plain}]):
        if stat := query.get("MetricStat"):
            metric = stat["Metric"]
            dimensions = {part["Name"]: part["Value"] for part in metric["Dimensions"]}
            how = f"{stat['Stat']} of {stat['Period']} s"
            found.append(series(metric["Namespace"], metric["MetricName"], dimensions, how))
    return found


@pytest.mark.parametrize("name", ALARMS)
def test_alarm_watches_its_metric(name: str) -> None:
    alarm = stack(**WITH_LOAD_BALANCER)[name]
    metrics, limit, _ = ALARMS[name]
    assert watched(alarm) == metrics
    periods = alarm["EvaluationPeriods"]
    of_them = f"in {alarm.get('DatapointsToAlarm', periods)} of {periods}"
    assert f"{SIGNS[alarm['ComparisonOperator']]} {alarm['Threshold']} {of_them}" == limit


def test_error_rate_counts_what_the_alb_answers_itself() -> None:
    queries = stack(**WITH_LOAD_BALANCER)["ServerErrorRateHigh"]["Metrics"]
    assert [q["Id"] for q in queries] == ["rate", "target", "balancer", "requests"]
    assert [q["Id"] for q in queries if q.get("ReturnData", True)] == ["rate"]
    assert queries[0]["Expression"] == RATE


@pytest.mark.parametrize("name", ALARMS)
def test_text_of_an_alarm_follows_from_its_settings(name: str) -> None:
    description = stack(**WITH_LOAD_BALANCER)[name]["AlarmDescription"].lower()
    entry = page("runbook").split(f"\n### {name}\n")[1].split("**Clients see:**")[0]
    means = " ".join(entry.split()).lower().replace("five", "5")
    for text in (description, means):
        assert re.search(ALARMS[name][2], text), text


def test_every_alarm_goes_to_the_topic_and_the_runbook() -> None:
    alarms = of_type("CloudWatch::Alarm", **WITH_LOAD_BALANCER)
    assert alarms.keys() == ALARMS.keys()
    for name, alarm in alarms.items():
        topic = ["arn:aws:sns:us-west-1:ACCOUNT_ID:email-processor-alarms"]
        assert alarm["AlarmActions"] == alarm["OKActions"] == topic
        assert re.search(rf"runbook(\.md)?: {name}$", alarm["AlarmDescription"], re.IGNORECASE)
        assert alarm["AlarmName"] == f"email-processor-{name}"
        assert alarm["TreatMissingData"] == "notBreaching"


def test_alarms_on_the_load_balancer_wait_for_it() -> None:
    waiting = ALARMS.keys() - of_type("CloudWatch::Alarm").keys()
    assert waiting == {name for name, (metrics, *_) in ALARMS.items() if BALANCER in metrics[0]}


def test_alarm_watches_the_dead_letter_queue_that_is_given() -> None:
    alarm = stack(DeadLetterQueueName="dead")["DeadLetterQueueNotEmpty"]
    assert alarm["Dimensions"] == [{"Name": "QueueName", "Value": "dead"}]


def test_replicas_are_watched_against_the_autoscalers_limits() -> None:
    assert stack()["ReplicasAtMaximum"]["Threshold"] == HPA["spec"]["maxReplicas"]
    assert (SERVICE["metadata"]["namespace"], SERVICE["metadata"]["name"]) == (NAME, NAME)
    (lines,) = (w["annotations"]["horizontal"] for w in widgets(stack()) if "annotations" in w)
    assert {line["label"]: line["value"] for line in lines} == {
        "maximum": HPA["spec"]["maxReplicas"],
        "minimum": HPA["spec"]["minReplicas"],
    }


def test_alarms_are_mailed_when_an_address_is_given() -> None:
    assert of_type("SNS::Subscription") == {}
    made = stack(AlarmEmail="on-call@example.com")["AlarmSubscription"]
    assert (made["Protocol"], made["Endpoint"]) == ("email", "on-call@example.com")


def widgets(made: dict[str, Any]) -> list[dict[str, Any]]:
    body = json.loads(made["Dashboard"]["DashboardBody"])
    return [widget["properties"] for widget in body["widgets"]]


def drawn(made: dict[str, Any]) -> list[str]:
    """Every line of the dashboard, its short forms written out; of an expression its text."""
    lines = []
    for widget in widgets(made):
        before: list[str] = []
        for *parts, options in widget["metrics"]:
            if not parts:
                lines.append(options["expression"])
                continue
            parts = before if parts == ["..."] else parts
            before = [b if p == "." else p for p, b in zip(parts, before or parts, strict=True)]
            namespace, metric, *names = before
            dimensions = dict(zip(names[::2], names[1::2], strict=True))
            statistic = options.get("stat", widget.get("stat"))
            lines.append(series(namespace, metric, dimensions, statistic))
    return lines


@pytest.mark.parametrize("balancer", ["none", "app/email/1a"], ids=["at first", "later"])
def test_dashboard_shows_every_signal(balancer: str) -> None:
    made = stack(**(WITH_LOAD_BALANCER if balancer != "none" else {}))
    acl = made["WebAcl"]
    rule = acl["Rules"][0]["VisibilityConfig"]["MetricName"]
    blocked = f"WebACL={acl['VisibilityConfig']['MetricName']} Region=us-west-1 Rule={rule}"
    assert drawn(made) == [
        f"AWS/ApplicationELB RequestCount LoadBalancer={balancer}: Sum",
        f"AWS/ApplicationELB HTTPCode_Target_5XX_Count LoadBalancer={balancer}: Sum",
        f"AWS/ApplicationELB HTTPCode_ELB_5XX_Count LoadBalancer={balancer}: Sum",
        RATE,
        f"AWS/ApplicationELB TargetResponseTime LoadBalancer={balancer}: p50",
        f"AWS/ApplicationELB TargetResponseTime LoadBalancer={balancer}: p99",
        "AWS/SQS ApproximateNumberOfMessagesVisible QueueName=dev-CP-queue: Maximum",
        "AWS/SQS ApproximateAgeOfOldestMessage QueueName=dev-CP-queue: Maximum",
        f"AWS/SQS ApproximateNumberOfMessagesVisible {DEAD}: Maximum",
        f"ContainerInsights service_number_of_running_pods {PODS}: Maximum",
        f"AWS/WAFV2 BlockedRequests {blocked}: Sum",
    ]
