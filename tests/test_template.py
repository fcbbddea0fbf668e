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
from test_documentation import OPENAPI, page
from test_manifests import HPA, NAME, SERVICE, SERVICE_ACCOUNT, SETTINGS

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


def test_key_is_used_through_the_host_of_ssm_in_every_partition() -> None:
    # moto has one value for AWS::URLSuffix.
    assert "kms:ViaService: !Sub ssm.${AWS::Region}.${AWS::URLSuffix}" in TEMPLATE


@pytest.mark.parametrize("key", ["", "arn:aws:kms:us-west-1:123:key/1a-2b"])
def test_role_may_only_use_its_tokens_queues_and_key(key: str) -> None:
    tokens = [token_arn("/old"), token_arn("/new")]
    queues = [f"arn:aws:sqs:us-west-1:123456789012:{name}" for name in ("old", "new.fifo")]
    given = {"TokenParameterArns": ",".join(tokens), "QueueArns": ",".join(queues)}
    role = stack(**given, TokenKeyArn=key)["Role"]
    assert "ManagedPolicyArns" not in role
    (policy,) = role["Policies"]
    through_ssm = {"StringEquals": {"kms:ViaService": "ssm.us-west-1.amazonaws.com"}}
    decrypt = {
        "Sid": "DecryptToken",
        "Effect": "Allow",
        "Action": "kms:Decrypt",
        "Resource": key,
        "Condition": through_ssm,
    }
    # moto leaves None where AWS::NoValue leaves nothing.
    assert list(filter(None, policy["PolicyDocument"]["Statement"])) == [
        {"Sid": "ReadToken", "Effect": "Allow", "Action": "ssm:GetParameters", "Resource": tokens},
        {
            "Sid": "SendMessages",
            "Effect": "Allow",
            "Action": ["sqs:SendMessage", "sqs:GetQueueAttributes"],
            "Resource": queues,
        },
        *([decrypt] if key else []),
    ]


def test_no_other_resource_grants_anything() -> None:
    kinds = set(re.findall(r"^    Type: AWS::(\S+)$", TEMPLATE, re.MULTILINE))
    assert {kind for kind in kinds if re.search("IAM|Policy|Permission", kind)} == {"IAM::Role"}


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


@pytest.mark.parametrize(
    ("parameter", "accepted", "rejected"),
    [
        ("OidcProvider", ISSUER, f"https://{ISSUER}"),
        ("QueueName", "mail.fifo", "*"),
        ("EnvironmentName", "test", "Prod_1"),
        ("QueueArns", "arn:aws:sqs:us-west-1:123456789012:queue", "arn:aws:sqs:*:*:*"),
        ("TokenParameterArns", token_arn("/email-service/api-token"), token_arn("/*")),
        ("TokenKeyArn", "arn:aws:kms:us-west-1:123456789012:key/1a-2b", "*"),
        ("AlarmEmail", "on-call@example.com", "on-call"),
        ("LoadBalancerFullName", "app/email/1a", "arn:aws:app/email/1a"),
    ],
)
def test_pattern_rejects_a_wrong_value(parameter: str, accepted: str, rejected: str) -> None:
    (pattern,) = re.findall(
        rf'^  {parameter}:\n(?:    .*\n)*?    AllowedPattern: "(.*)"$', TEMPLATE, re.MULTILINE
    )
    pattern = pattern.replace("\\\\", "\\")  # as YAML reads it
    assert re.fullmatch(pattern, accepted)
    assert not re.fullmatch(pattern, rejected)


# --- Image, queues, rate limit --------------------------------------------------------------------


def test_a_commit_always_means_one_image() -> None:
    assert stack()["Repository"]["ImageTagMutability"] == "IMMUTABLE"


def test_queue_is_only_made_on_request_and_redrives_to_its_dead_letter_queue() -> None:
    assert of_type("SQS::Queue") == {}
    made = of_type("SQS::Queue", CreateQueue="true", DeadLetterQueueName="dead")
    queue, dead = made["Queue"], made["DeadLetterQueue"]
    assert (queue["QueueName"], dead["QueueName"]) == ("dev-CP-queue", "dead")
    # A message that moves to the dead-letter queue keeps its age.
    assert queue["MessageRetentionPeriod"] <= dead["MessageRetentionPeriod"]
    assert queue["MaximumMessageSize"] == dead["MaximumMessageSize"]
    arn = "arn:aws:sqs:us-west-1:ACCOUNT_ID:"
    assert queue["RedrivePolicy"] == {"deadLetterTargetArn": f"{arn}dead", "maxReceiveCount": 5}
    assert dead["RedriveAllowPolicy"]["sourceQueueArns"] == [f"{arn}dev-CP-queue"]


def test_only_queues_outlive_the_stack() -> None:
    # Except those of a failed first deployment: the next one could not make them.
    kept = r"^    DeletionPolicy: RetainExceptOnCreate\n    UpdateReplacePolicy: Retain$"
    assert len(re.findall(kept, TEMPLATE, re.M)) == TEMPLATE.count("DeletionPolicy") == 2


def test_rate_is_limited_for_each_address_with_429_in_json() -> None:
    acl = stack(RateLimit="100")["WebAcl"]
    (rule,) = acl["Rules"]
    limit = rule["Statement"]["RateBasedStatement"]
    assert (limit["AggregateKeyType"], int(limit["Limit"])) == ("IP", 100)
    response = rule["Action"]["Block"]["CustomResponse"]
    assert response["ResponseCode"] == 429
    assert [header["Name"] for header in response["ResponseHeaders"]] == ["Retry-After"]
    body = acl["CustomResponseBodies"][response["CustomResponseBodyKey"]]
    assert body["ContentType"] == "APPLICATION_JSON"
    documented = OPENAPI["components"]["responses"]["TooManyRequests"]["content"]
    assert json.loads(body["Content"]) == documented["application/json"]["example"]
    measured = [each["VisibilityConfig"]["MetricName"] for each in (acl, rule)]
    assert measured == [NAME, "RateLimit"], "as the dashboard draws it"


def test_default_rate_limit_is_documented() -> None:
    limit = stack()["WebAcl"]["Rules"][0]["Statement"]["RateBasedStatement"]
    minutes = limit["EvaluationWindowSec"] // 60
    assert f"{int(limit['Limit']):,} requests in {minutes} minutes" in page("setup")


# --- Alarms and dashboard -------------------------------------------------------------------------

BALANCER, PODS = "LoadBalancer=app/email/1a", f"Namespace={NAME} Service={NAME}"
# The metrics of AWS with their dimensions. With any others there is no data, and so no alarm.
SERIES = {
    f"AWS/ApplicationELB RequestCount {BALANCER}",
    f"AWS/ApplicationELB HTTPCode_Target_5XX_Count {BALANCER}",
    f"AWS/ApplicationELB HTTPCode_ELB_5XX_Count {BALANCER}",
    f"AWS/ApplicationELB TargetResponseTime {BALANCER}",
    f"AWS/ApplicationELB UnHealthyHostCount {BALANCER} TargetGroup=targetgroup/email/2b",
    "AWS/SQS ApproximateNumberOfMessagesVisible QueueName=dev-CP-queue",
    "AWS/SQS ApproximateNumberOfMessagesVisible QueueName=dead",
    "AWS/SQS ApproximateAgeOfOldestMessage QueueName=dev-CP-queue",
    f"ContainerInsights service_number_of_running_pods ClusterName=dev-CP-EKS-CLUSTER {PODS}",
    f"AWS/WAFV2 BlockedRequests WebACL={NAME} Region=us-west-1 Rule=RateLimit",
}
COMPLETE = {
    "LoadBalancerFullName": "app/email/1a",
    "TargetGroupFullName": "targetgroup/email/2b",
    "DeadLetterQueueName": "dead",
}


def series(namespace: str, metric: str, dimensions: dict[str, str]) -> str:
    return " ".join([namespace, metric, *(f"{name}={each}" for name, each in dimensions.items())])


def watched(alarm: dict[str, Any]) -> set[str]:
    queries = [part["MetricStat"]["Metric"] for part in alarm.get("Metrics", [])[1:]] or [alarm]
    return {
        series(
            query["Namespace"],
            query["MetricName"],
            {part["Name"]: part["Value"] for part in query["Dimensions"]},
        )
        for query in queries
    }


def widgets(kind: str = "metric", **parameters: str) -> list[dict[str, Any]]:
    body = json.loads(stack(**parameters)["Dashboard"]["DashboardBody"])
    return [widget["properties"] for widget in body["widgets"] if widget["type"] == kind]


def drawn(**parameters: str) -> set[str]:
    """The metrics of the dashboard, with short forms expanded, and its expressions."""
    lines = set()
    for widget in widgets(**parameters):
        before: list[str] = []
        for *parts, options in widget["metrics"]:
            if not parts:
                lines.add(options["expression"])
                continue
            parts = before if parts == ["..."] else parts
            before = [b if p == "." else p for p, b in zip(parts, before or parts, strict=True)]
            dimensions = dict(zip(before[2::2], before[3::2], strict=True))
            lines.add(series(before[0], before[1], dimensions))
    return lines


def test_alarms_watch_metrics_of_aws() -> None:
    found = set().union(*map(watched, of_type("CloudWatch::Alarm", **COMPLETE).values()))
    assert found <= SERIES
    assert {each.split()[1] for each in SERIES - found} == {
        "BlockedRequests",
        "ApproximateNumberOfMessagesVisible",  # of the queue: only its age counts
    }


def test_dashboard_draws_metrics_of_aws() -> None:
    rate = stack(**COMPLETE)["ServerErrorRateHigh"]["Metrics"][0]["Expression"]
    (unhealthy,) = (each for each in SERIES if "UnHealthyHostCount" in each)  # only an alarm
    assert drawn(**COMPLETE) == SERIES - {unhealthy} | {rate}
    # A dimension must not be empty, before there is a load balancer.
    assert "AWS/ApplicationELB RequestCount LoadBalancer=none" in drawn()


def test_dashboard_reads_the_log_of_its_cluster() -> None:
    source = "SOURCE '/aws/containerinsights/blue/application' | filter "
    queries = [widget["query"] for widget in widgets("log", ClusterName="blue")]
    assert len(queries) == 3
    assert all(query.startswith(source) for query in queries)


def test_limits_of_the_autoscaler_are_those_of_alarm_and_dashboard() -> None:
    assert (SERVICE["metadata"]["namespace"], SERVICE["metadata"]["name"]) == (NAME, NAME)
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
    assert {(q["ReturnData"], q["MetricStat"]["Stat"]) for q in queries} == {(False, "Sum")}


def numbers(text: str) -> set[str]:
    return set(re.findall(r"\b\d+\b(?!xx)", text.replace("five", "5")))


def test_every_alarm_is_sent_and_has_a_runbook_entry() -> None:
    topic = ["arn:aws:sns:us-west-1:ACCOUNT_ID:email-processor-alarms"]
    for name, alarm in of_type("CloudWatch::Alarm", **COMPLETE).items():
        assert alarm["AlarmActions"] == alarm["OKActions"] == topic
        assert (alarm["AlarmName"], alarm["TreatMissingData"]) == (f"{NAME}-{name}", "notBreaching")
        text, _, entry = alarm["AlarmDescription"].partition(" Runbook: ")
        assert entry == name
        meaning = page("runbook").split(f"\n### {name}\n")[1].split("**Clients see:**")[0]
        assert numbers(text) <= numbers(meaning)


def test_alarms_on_the_load_balancer_wait_for_it() -> None:
    alarms = of_type("CloudWatch::Alarm", **COMPLETE)
    later = alarms.keys() - of_type("CloudWatch::Alarm").keys()
    assert later == {name for name in alarms if BALANCER in "".join(watched(alarms[name]))}


def test_alarms_are_mailed_only_to_a_given_address() -> None:
    assert of_type("SNS::Subscription") == {}
    made = stack(AlarmEmail="on-call@example.com")["AlarmSubscription"]
    assert made["Endpoint"] == "on-call@example.com"
