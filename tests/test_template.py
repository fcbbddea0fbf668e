"""The stack of the CloudFormation template, whose functions moto resolves."""

from __future__ import annotations

import itertools
import json
import re
from functools import cache
from typing import Any

import pytest
from moto.cloudformation import cloudformation_backends
from moto.cloudformation.parsing import clean_json
from pages import OPENAPI, page
from test_manifests import HPA, NAME, SERVICE_ACCOUNT, SETTINGS

import app

TEMPLATE = (app.PROJECT / "infra" / "email-processor.yaml").read_text("utf-8")
ISSUER = "oidc.example/id/1"
REQUIRED = {
    "OidcProvider": ISSUER,
    "QueueArns": "arn:aws:sqs:us-west-1:1:queue",
    "TokenParameterArns": "arn:aws:ssm:us-west-1:1:parameter/token",
}
accounts = map(
    "{:012}".format, itertools.count(1)
)  # one for each stack: names are unique in an account
pytestmark = pytest.mark.filterwarnings("ignore:Tried to parse")  # moto does not know every type


@cache
def stack(**parameters: str) -> dict[str, Any]:
    """The properties of each resource whose condition holds, and "Outputs".

    The account is ACCOUNT_ID, as in the manifests.
    """
    account = next(accounts)
    made = cloudformation_backends[account]["us-west-1"].create_stack(
        NAME, TEMPLATE, REQUIRED | parameters
    )
    resources = {
        name: clean_json(resource["Properties"], made.resource_map)
        for name, resource in made.template_dict["Resources"].items()
        if made.resource_map.lazy_condition_map.get(resource.get("Condition"), True)
    }
    outputs = clean_json(made.template_dict["Outputs"], made.resource_map)
    resources["Outputs"] = {name: output["Value"] for name, output in outputs.items()}
    return dict(json.loads(json.dumps(resources).replace(account, "ACCOUNT_ID")))


def token_arn(name: str) -> str:
    return f"arn:aws:ssm:us-west-1:123456789012:parameter{name}"


def of_type(kind: str, **parameters: str) -> dict[str, Any]:
    names = re.findall(rf"^  (\w+):\n    Type: AWS::{kind}$", TEMPLATE, re.MULTILINE)
    return {name: found for name, found in stack(**parameters).items() if name in names}


# --- Role -----------------------------------------------------------------------------------------


def test_only_the_service_account_may_take_the_role() -> None:
    metadata = SERVICE_ACCOUNT["metadata"]
    subject = f"system:serviceaccount:{metadata['namespace']}:{metadata['name']}"
    exact = {f"{ISSUER}:sub": subject, f"{ISSUER}:aud": "sts.amazonaws.com"}
    assert json.loads(stack()["Role"]["AssumeRolePolicyDocument"])["Statement"] == [
        {
            "Effect": "Allow",
            "Principal": {"Federated": f"arn:aws:iam::ACCOUNT_ID:oidc-provider/{ISSUER}"},
            "Action": "sts:AssumeRoleWithWebIdentity",
            "Condition": {"StringEquals": exact},
        }
    ]


def test_documented_trust_of_pod_identity_names_the_service_account() -> None:
    (trust,) = re.findall(r"```json\n(.*?)```", page("setup"), re.DOTALL)
    metadata = SERVICE_ACCOUNT["metadata"]
    exact = {
        "aws:RequestTag/kubernetes-namespace": metadata["namespace"],
        "aws:RequestTag/kubernetes-service-account": metadata["name"],
    }
    assert json.loads(trust) == {
        "Effect": "Allow",
        "Principal": {"Service": "pods.eks.amazonaws.com"},
        "Action": ["sts:AssumeRole", "sts:TagSession"],
        "Condition": {"StringEquals": exact},
    }


@pytest.mark.parametrize("key", ["", "arn:aws:kms:us-west-1:123:key/1a-2b"])
def test_role_may_only_use_its_tokens_queues_and_key(key: str) -> None:
    tokens = [token_arn("/old"), token_arn("/new")]
    queues = [f"arn:aws:sqs:us-west-1:123456789012:{name}" for name in ("old", "new.fifo")]
    given = {"TokenParameterArns": ",".join(tokens), "QueueArns": ",".join(queues)}
    role = stack(**given, TokenKeyArn=key)["Role"]
    assert "ManagedPolicyArns" not in role
    (policy,) = role["Policies"]
    read, send, *decrypt = policy["PolicyDocument"]["Statement"]
    assert (read["Action"], read["Resource"]) == ("ssm:GetParameters", tokens)
    assert send["Action"] == ["sqs:SendMessage", "sqs:GetQueueAttributes"]
    assert send["Resource"] == queues
    if key:
        assert (decrypt[0]["Action"], decrypt[0]["Resource"]) == ("kms:Decrypt", key)
        through = {"kms:ViaService": "ssm.us-west-1.amazonaws.com"}
        assert decrypt[0]["Condition"] == {"StringEquals": through}
    else:
        assert not any(decrypt), "moto leaves None where AWS::NoValue leaves nothing"
    # moto has one value for AWS::URLSuffix.
    assert "kms:ViaService: !Sub ssm.${AWS::Region}.${AWS::URLSuffix}" in TEMPLATE


# --- Names ----------------------------------------------------------------------------------------


def test_names_end_with_the_environment() -> None:
    for end, made in ("", stack()), ("-test", stack(EnvironmentName="test")):
        assert made["Role"]["RoleName"] == f"email-processor-role{end}"
        assert made["Repository"]["RepositoryName"] == f"email-processor{end}"
    annotations = SERVICE_ACCOUNT["metadata"]["annotations"]
    assert annotations == {"eks.amazonaws.com/role-arn": stack()["Outputs"]["RoleArn"]}


def test_deploy_sh_gives_what_the_template_takes() -> None:
    script = (app.PROJECT / "deploy.sh").read_text("utf-8")
    parameters = TEMPLATE.split("\nParameters:\n")[1].split("\nConditions:\n")[0]
    known = {*re.findall(r"^  (\w+):$", parameters, re.MULTILINE), *stack()["Outputs"]}
    read = set(re.findall(r"\bvalue_of ([A-Z]\w+)", script))
    given = set(re.findall(r'"([A-Z][a-z]+[A-Z]\w+)=', script))
    assert read
    assert given
    assert read | given <= known
    (token,) = SETTINGS["token_ssm_parameter"]
    assert token in script


def test_patterns_reject_wrong_values() -> None:
    for parameter, accepted, rejected in (
        ("OidcProvider", ISSUER, f"https://{ISSUER}"),
        ("QueueName", "mail.fifo", "*"),
        ("EnvironmentName", "test", "Prod_1"),
        ("QueueArns", "arn:aws:sqs:us-west-1:123456789012:queue", "arn:aws:sqs:*:*:*"),
        ("TokenParameterArns", token_arn("/email-service/api-token"), token_arn("/*")),
        ("TokenKeyArn", "arn:aws:kms:us-west-1:123456789012:key/1a-2b", "*"),
        ("AlarmEmail", "on-call@example.com", "on-call"),
    ):
        (pattern,) = re.findall(
            rf'^  {parameter}:\n(?:    .*\n)*?    AllowedPattern: "(.*)"$', TEMPLATE, re.MULTILINE
        )
        pattern = pattern.replace("\\\\", "\\")  # as YAML reads it
        assert re.fullmatch(pattern, accepted), parameter
        assert not re.fullmatch(pattern, rejected), parameter


# --- Image, queues, rate limit --------------------------------------------------------------------


def test_a_commit_always_means_one_image() -> None:
    assert stack()["Repository"]["ImageTagMutability"] == "IMMUTABLE"


def test_queue_is_only_made_on_request_and_redrives_to_its_dead_letter_queue() -> None:
    assert of_type("SQS::Queue") == {}
    made = of_type("SQS::Queue", CreateQueue="true", DeadLetterQueueName="dead")
    queue, dead = made["Queue"], made["DeadLetterQueue"]
    # A message that moves to the dead-letter queue keeps its age.
    assert queue["MessageRetentionPeriod"] <= dead["MessageRetentionPeriod"]
    assert queue["MaximumMessageSize"] == dead["MaximumMessageSize"]
    arn = "arn:aws:sqs:us-west-1:ACCOUNT_ID:"
    assert queue["RedrivePolicy"]["deadLetterTargetArn"] == f"{arn}dead"
    assert dead["RedriveAllowPolicy"]["sourceQueueArns"] == [f"{arn}dev-CP-queue"]


def test_only_queues_outlive_the_stack() -> None:
    # Except those of a failed first deployment: the next one could not make them.
    kept = r"^    DeletionPolicy: RetainExceptOnCreate\n    UpdateReplacePolicy: Retain$"
    assert len(re.findall(kept, TEMPLATE, re.M)) == TEMPLATE.count("DeletionPolicy") == 2


def test_rate_limit_responds_with_the_documented_429() -> None:
    acl = stack()["WebAcl"]
    (rule,) = acl["Rules"]
    limit = rule["Statement"]["RateBasedStatement"]
    minutes = limit["EvaluationWindowSec"] // 60
    assert f"{int(limit['Limit']):,} requests in {minutes} minutes" in page("setup")
    response = rule["Action"]["Block"]["CustomResponse"]
    assert response["ResponseCode"] == 429
    assert [header["Name"] for header in response["ResponseHeaders"]] == ["Retry-After"]
    body = acl["CustomResponseBodies"][response["CustomResponseBodyKey"]]
    assert body["ContentType"] == "APPLICATION_JSON"
    documented = OPENAPI["components"]["responses"]["TooManyRequests"]["content"]
    assert json.loads(body["Content"]) == documented["application/json"]["example"]
    measured = [each["VisibilityConfig"]["MetricName"] for each in (acl, rule)]
    assert measured == [NAME, "RateLimit"], "as the dashboard draws it"


# --- Alarms and dashboard -------------------------------------------------------------------------

BALANCER, PODS = "LoadBalancer=app/email/1a", f"Namespace={NAME} Service={NAME}"
# The metrics of AWS with their dimensions. With any others there is no data, and so no alarm.
SERIES = {
    f"AWS/ApplicationELB RequestCount {BALANCER}",
    f"AWS/ApplicationELB HTTPCode_Target_5XX_Count {BALANCER}",
    f"AWS/ApplicationELB HTTPCode_ELB_5XX_Count {BALANCER}",
    f"AWS/ApplicationELB TargetResponseTime {BALANCER}",
    f"AWS/ApplicationELB UnHealthyHostCount {BALANCER} TargetGroup=targetgroup/email/2b",
    "AWS/SQS ApproximateNumberOfMessagesVisible QueueName=dead",
    "AWS/SQS ApproximateAgeOfOldestMessage QueueName=dev-CP-queue",
    f"ContainerInsights service_number_of_running_pods ClusterName=dev-CP-EKS-CLUSTER {PODS}",
}
COMPLETE = {
    "LoadBalancerFullName": "app/email/1a",
    "TargetGroupFullName": "targetgroup/email/2b",
    "DeadLetterQueueName": "dead",
}


def watched(alarm: dict[str, Any]) -> set[str]:
    found = set()
    for query in [part["MetricStat"]["Metric"] for part in alarm.get("Metrics", [])[1:]] or [alarm]:
        dimensions = [f"{part['Name']}={part['Value']}" for part in query["Dimensions"]]
        found.add(" ".join([query["Namespace"], query["MetricName"], *dimensions]))
    return found


def named(metrics: list[list[Any]]) -> set[str]:
    """The names of metrics of a dashboard. "..." repeats the line before."""
    return {line[1] for line in metrics if len(line) > 1 and line[0] != "..."}


def widgets(kind: str = "metric", **parameters: str) -> list[dict[str, Any]]:
    body = json.loads(stack(**parameters)["Dashboard"]["DashboardBody"])
    return [widget["properties"] for widget in body["widgets"] if widget["type"] == kind]


def test_alarms_watch_metrics_of_aws() -> None:
    alarms = of_type("CloudWatch::Alarm", **COMPLETE)
    assert len(alarms) == 6
    assert set().union(*map(watched, alarms.values())) <= SERIES


def test_dashboard_draws_the_metrics_of_the_alarms() -> None:
    names = {name for widget in widgets() for name in named(widget["metrics"])}
    assert names == {each.split()[1] for each in SERIES} - {"UnHealthyHostCount"} | {
        "BlockedRequests"
    }
    rate = stack(**COMPLETE)["ServerErrorRateHigh"]["Metrics"][0]["Expression"]
    assert rate in stack()["Dashboard"]["DashboardBody"]
    # A dimension must not be empty, before there is a load balancer.
    assert ["LoadBalancer", "none"] in [widget["metrics"][0][2:4] for widget in widgets()]


def test_dashboard_reads_the_log_of_its_cluster() -> None:
    source = "SOURCE '/aws/containerinsights/blue/application' | filter "
    queries = [widget["query"] for widget in widgets("log", ClusterName="blue")]
    assert queries
    assert all(query.startswith(source) for query in queries)


def test_limits_of_the_autoscaler_are_those_of_alarm_and_dashboard() -> None:
    (lines,) = (each["annotations"]["horizontal"] for each in widgets() if "annotations" in each)
    shown = {line["label"]: line["value"] for line in lines}
    limits = HPA["spec"]["minReplicas"], HPA["spec"]["maxReplicas"]
    assert (shown["minimum"], shown["maximum"]) == limits
    assert stack()["ReplicasAtMaximum"]["Threshold"] == limits[1]


def test_error_rate_counts_responses_of_the_alb_itself() -> None:
    rate, *queries = stack(**COMPLETE)["ServerErrorRateHigh"]["Metrics"]
    errors = "(FILL(target, 0) + FILL(balancer, 0))"
    assert rate["Expression"] == f"100 * {errors} / (FILL(requests, 0) + FILL(balancer, 0))"
    names = {q["Id"]: q["MetricStat"]["Metric"]["MetricName"] for q in queries}
    assert names["target"] == "HTTPCode_Target_5XX_Count"
    assert names["balancer"] == "HTTPCode_ELB_5XX_Count"


def test_every_alarm_is_sent_and_names_its_runbook_entry() -> None:
    topic = ["arn:aws:sns:us-west-1:ACCOUNT_ID:email-processor-alarms"]
    for name, alarm in of_type("CloudWatch::Alarm", **COMPLETE).items():
        assert alarm["AlarmActions"] == alarm["OKActions"] == topic
        assert (alarm["AlarmName"], alarm["TreatMissingData"]) == (f"{NAME}-{name}", "notBreaching")
        assert alarm["AlarmDescription"].endswith(f" Runbook: {name}")
    assert of_type("SNS::Subscription") == {}
    mailed = of_type("SNS::Subscription", AlarmEmail="on-call@example.com")
    assert [each["Endpoint"] for each in mailed.values()] == ["on-call@example.com"]


def test_alarms_on_the_load_balancer_wait_for_it() -> None:
    alarms = of_type("CloudWatch::Alarm", **COMPLETE)
    later = alarms.keys() - of_type("CloudWatch::Alarm").keys()
    assert later == {name for name in alarms if BALANCER in "".join(watched(alarms[name]))}
