"""Manifests, template, Dockerfile and scripts: their schemas, their numbers, and each other.

Nothing here needs a cluster or AWS. Schemas of Kubernetes come with kubernetes-validate.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

import app

KUBERNETES = ["1.30", "1.31", "1.32", "1.33", "1.34"]
NAME = "email-processor"
LABELS = {"app.kubernetes.io/name": NAME}
FILES = sorted((app.PROJECT / "k8s").glob("*.yaml"))
TEMPLATE_FILE = app.PROJECT / "infra" / "email-processor.yaml"
DEPLOY = app.PROJECT / "deploy.sh"
SCRIPTS = [*sorted(app.PROJECT.glob("*.sh")), app.PROJECT / ".ci" / "run"]
WORKFLOWS = sorted((app.PROJECT / ".github" / "workflows").iterdir())
DEPENDABOT = app.PROJECT / ".github" / "dependabot.yml"
PRIVATE = {"/metrics", "/ready"}  # the cluster's own
SLOWEST_HEALTH = 6  # seconds; every thread waits for SQS, which has just begun to fail
SLOWEST_READY = 7  # seconds; SSM and SQS take the connection and do not answer


class StrictLoader(yaml.SafeLoader):
    """YAML as `kubectl --validate=strict` reads it: a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"a key is given twice: {sorted(keys)}"
        return super().construct_mapping(node, deep)


def load(text: str) -> list[Any]:
    return list(yaml.load_all(text, StrictLoader))


MANIFESTS = {
    (document["kind"], document["metadata"]["name"]): document
    for file in FILES
    for document in load(file.read_text("utf-8"))
}
DEPLOYMENT = MANIFESTS["Deployment", NAME]
POD = DEPLOYMENT["spec"]["template"]["spec"]
CONTAINER = POD["containers"][0]
SERVICE = MANIFESTS["Service", NAME]
INGRESS = MANIFESTS["Ingress", f"{NAME}-ingress"]
HPA = MANIFESTS["HorizontalPodAutoscaler", f"{NAME}-hpa"]
PDB = MANIFESTS["PodDisruptionBudget", NAME]
CONFIG = MANIFESTS["ConfigMap", f"{NAME}-config"]["data"]
SERVICE_ACCOUNT = MANIFESTS["ServiceAccount", f"{NAME}-sa"]


def annotation(name: str) -> str:
    return str(INGRESS["metadata"]["annotations"][f"alb.ingress.kubernetes.io/{name}"])


def attributes(name: str) -> dict[str, str]:
    return dict(pair.split("=") for pair in annotation(name).split(","))


def gunicorn_setting(name: str) -> Any:
    """A constant of gunicorn.conf.py, which cannot be imported without an environment."""
    for statement in ast.parse((app.PROJECT / "gunicorn.conf.py").read_text("utf-8")).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == name:
            return ast.literal_eval(statement.value)
    raise AssertionError(name)


def find(value: Any, key: str) -> Iterator[Any]:
    """Everything that stands under the key, at any depth."""
    if isinstance(value, dict):
        yield from (found for name, found in value.items() if name == key)
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from find(part, key)


# --- Manifests: schemas and numbers ---------------------------------------------------------------


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("manifest", MANIFESTS, ids="-".join)
def test_manifest_is_strictly_valid(manifest: tuple[str, str], version: str) -> None:
    kubernetes_validate.validate(MANIFESTS[manifest], version, strict=True)


def test_validation_would_find_a_misspelt_field() -> None:
    wrong = {**SERVICE, "spec": {**SERVICE["spec"], "sessionAffinty": "None"}}
    with pytest.raises(kubernetes_validate.ValidationError, match="sessionAffinty"):
        kubernetes_validate.validate(wrong, KUBERNETES[0], strict=True)


def test_every_manifest_is_there_and_no_other() -> None:
    assert [file.name for file in FILES] == [
        "configmap.yaml",
        "deployment.yaml",
        "hpa.yaml",
        "ingress.yaml",
        "namespace.yaml",
        "networkpolicy.yaml",
        "pdb.yaml",
        "serviceaccount.yaml",
    ]
    assert set(MANIFESTS) == {
        ("ConfigMap", "email-processor-config"),
        ("Deployment", "email-processor"),
        ("HorizontalPodAutoscaler", "email-processor-hpa"),
        ("Ingress", "email-processor-ingress"),
        ("Namespace", "email-processor"),
        ("NetworkPolicy", "email-processor"),
        ("PodDisruptionBudget", "email-processor"),
        ("Role", "email-processor-role"),
        ("RoleBinding", "email-processor-role"),
        ("Service", "email-processor"),
        ("ServiceAccount", "email-processor-sa"),
    }


def test_everything_is_in_the_namespace_and_labelled() -> None:
    for (kind, _), document in MANIFESTS.items():
        metadata = document["metadata"]
        assert metadata.get("namespace", NAME) == NAME, kind
        assert ("namespace" in metadata) == (kind != "Namespace"), kind
        assert metadata["labels"].items() >= LABELS.items(), kind


def test_service_comes_before_deployment() -> None:
    documents = load((app.PROJECT / "k8s" / "deployment.yaml").read_text("utf-8"))
    assert [document["kind"] for document in documents] == ["Service", "Deployment"]


@pytest.mark.parametrize(
    ("where", "name", "expected"),
    [
        (DEPLOYMENT["spec"], "replicas", None),  # the HPA owns it
        (DEPLOYMENT["spec"]["strategy"], "type", "RollingUpdate"),
        (DEPLOYMENT["spec"]["strategy"], "rollingUpdate", {"maxUnavailable": 0, "maxSurge": "25%"}),
        (POD, "serviceAccountName", "email-processor-sa"),
        (POD, "automountServiceAccountToken", False),
        (POD, "enableServiceLinks", False),
        (POD, "initContainers", None),
        (CONTAINER["resources"], "requests", {"cpu": "250m", "memory": "256Mi"}),
        (CONTAINER["resources"], "limits", {"cpu": "500m", "memory": "512Mi"}),
        (CONTAINER["lifecycle"], "preStop", {"sleep": {"seconds": 15}}),
        (CONTAINER, "command", None),  # the image's own, in exec form
        (SERVICE_ACCOUNT, "automountServiceAccountToken", False),
        (SERVICE["spec"], "type", "ClusterIP"),
        (INGRESS["spec"], "ingressClassName", "alb"),
        (HPA, "apiVersion", "autoscaling/v2"),
        (HPA["spec"], "minReplicas", 2),
        (HPA["spec"], "maxReplicas", 10),
        (
            HPA["spec"]["behavior"],
            "scaleDown",
            {"policies": [{"type": "Percent", "value": 50, "periodSeconds": 300}]},
        ),
        (CONFIG, "aws_region", "us-west-1"),
        (CONFIG, "sqs_queue_url", "https://sqs.us-west-1.amazonaws.com/ACCOUNT_ID/dev-CP-queue"),
    ],
)
def test_value_is_as_specified(where: dict[str, Any], name: str, expected: Any) -> None:
    assert where.get(name) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("scheme", "internet-facing"),
        ("target-type", "ip"),
        ("healthcheck-path", "/health"),
        ("healthcheck-interval-seconds", "10"),
        ("healthy-threshold-count", "2"),
        ("unhealthy-threshold-count", "3"),
        ("success-codes", "200"),
        ("ssl-redirect", "443"),
        ("ssl-policy", "ELBSecurityPolicy-TLS13-1-2-Res-2021-06"),
        ("certificate-arn", "CERTIFICATE_ARN"),
        ("wafv2-acl-arn", "WEB_ACL_ARN"),
    ],
)
def test_load_balancer_is_as_specified(name: str, expected: str) -> None:
    assert annotation(name) == expected


def test_load_balancer_drops_malformed_headers() -> None:
    name = "routing.http.drop_invalid_header_fields.enabled"
    assert attributes("load-balancer-attributes")[name] == "true"


def test_autoscaler_looks_at_cpu_and_memory() -> None:
    targets = [
        (metric["resource"]["name"], metric["resource"]["target"])
        for metric in HPA["spec"]["metrics"]
    ]
    # The order that Kubernetes gives them back in; in any other, no apply is ever "unchanged".
    assert targets == [
        ("memory", {"type": "Utilization", "averageUtilization": 80}),
        ("cpu", {"type": "Utilization", "averageUtilization": 70}),
    ]


def test_pod_meets_the_restricted_standard_which_the_namespace_enforces() -> None:
    assert POD["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": 1000,
        "runAsGroup": 1000,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert CONTAINER["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    labels = MANIFESTS["Namespace", NAME]["metadata"]["labels"]
    for mode in ("enforce", "audit", "warn"):
        assert labels[f"pod-security.kubernetes.io/{mode}"] == "restricted"
        assert re.fullmatch(r"v1\.\d+|latest", labels[f"pod-security.kubernetes.io/{mode}-version"])
    # Enforced no newer than what the oldest cluster knows.
    assert labels["pod-security.kubernetes.io/enforce-version"] == f"v{KUBERNETES[0]}"
    assert labels["elbv2.k8s.aws/pod-readiness-gate-inject"] == "enabled"


def test_only_a_small_tmp_in_memory_is_writable() -> None:
    assert CONTAINER["volumeMounts"] == [{"name": "tmp", "mountPath": "/tmp"}]
    assert POD["volumes"] == [
        {"name": "tmp", "emptyDir": {"medium": "Memory", "sizeLimit": "32Mi"}}
    ]
    assert {"name": "HOME", "value": "/tmp"} in CONTAINER["env"]


def test_pods_are_spread_over_zones_and_nodes_but_never_kept_from_running() -> None:
    spread = POD["topologySpreadConstraints"]
    assert [constraint["topologyKey"] for constraint in spread] == [
        "topology.kubernetes.io/zone",
        "kubernetes.io/hostname",
    ]
    assert {constraint["whenUnsatisfiable"] for constraint in spread} == {"ScheduleAnyway"}


def test_network_lets_in_8080_and_out_dns_and_443_alone() -> None:
    spec = MANIFESTS["NetworkPolicy", NAME]["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    assert spec["ingress"] == [{"ports": [{"protocol": "TCP", "port": 8080}]}]
    assert spec["egress"] == [
        {"ports": [{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}]},
        {"ports": [{"protocol": "TCP", "port": 443}]},
    ]


def test_drain_takes_one_pod_at_a_time_and_never_the_last() -> None:
    assert PDB["spec"]["maxUnavailable"] == 1 < HPA["spec"]["minReplicas"]
    assert PDB["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow"


def test_service_account_may_do_nothing_in_the_cluster() -> None:
    role = f"{NAME}-role"
    assert not MANIFESTS["Role", role].get("rules")
    binding = MANIFESTS["RoleBinding", role]
    assert (binding["roleRef"]["kind"], binding["roleRef"]["name"]) == ("Role", role)
    assert binding["subjects"] == [
        {"kind": "ServiceAccount", "name": "email-processor-sa", "namespace": NAME}
    ]


# --- Manifests: probes and times ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("probe", "path", "period"),
    [
        ("startupProbe", "/ready", 5),
        ("livenessProbe", "/health", 10),
        ("readinessProbe", "/health", 5),
    ],
)
def test_probe_asks_the_right_path(probe: str, path: str, period: int) -> None:
    assert CONTAINER[probe]["httpGet"] == {"path": path, "port": "http"}
    assert CONTAINER[probe]["periodSeconds"] == period


def test_start_has_30_seconds_of_grace() -> None:
    probe = CONTAINER["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] == 30
    assert "initialDelaySeconds" not in probe
    assert probe["timeoutSeconds"] > SLOWEST_READY


def test_no_probe_fails_while_sqs_begins_to_fail() -> None:
    for probe in (CONTAINER["livenessProbe"], CONTAINER["readinessProbe"]):
        assert probe["timeoutSeconds"] > SLOWEST_HEALTH
        assert probe["failureThreshold"] >= 3
    assert int(annotation("healthcheck-timeout-seconds")) > SLOWEST_HEALTH
    assert int(annotation("unhealthy-threshold-count")) >= 3


def test_load_balancer_asks_less_often_than_it_waits() -> None:
    """It takes no other setting."""
    timeout = int(annotation("healthcheck-timeout-seconds"))
    assert timeout < int(annotation("healthcheck-interval-seconds"))


def test_roll_out_is_given_up_only_after_a_pull_a_start_and_the_load_balancers_consent() -> None:
    """A pod is ready only once the load balancer has found it healthy: its readiness gate."""
    pull = 60
    start = (
        CONTAINER["startupProbe"]["periodSeconds"] * CONTAINER["startupProbe"]["failureThreshold"]
    )
    checks = int(annotation("healthcheck-interval-seconds"))
    checks *= int(annotation("healthy-threshold-count"))
    assert DEPLOYMENT["spec"]["progressDeadlineSeconds"] > pull + start + checks


def test_pod_is_killed_only_after_its_sleep_and_gunicorns_graceful_timeout() -> None:
    asleep = CONTAINER["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert POD["terminationGracePeriodSeconds"] > asleep + gunicorn_setting("graceful_timeout")


def test_rights_of_old_pods_end_only_after_their_grace_period() -> None:
    (seconds,) = re.findall(r"sleep (\d+) # terminationGrace", DEPLOY.read_text("utf-8"))
    assert int(seconds) == POD["terminationGracePeriodSeconds"]


def test_pod_sleeps_as_long_as_the_load_balancer_may_still_send_to_it() -> None:
    delay = attributes("target-group-attributes")["deregistration_delay.timeout_seconds"]
    assert int(delay) == CONTAINER["lifecycle"]["preStop"]["sleep"]["seconds"]


def test_gunicorn_keeps_connections_longer_than_the_load_balancer() -> None:
    idle = attributes("load-balancer-attributes")["idle_timeout.timeout_seconds"]
    assert int(idle) == 60 < gunicorn_setting("keepalive")


# --- Manifests: each other, and the application ---------------------------------------------------


@pytest.mark.parametrize(
    "selector",
    [
        pytest.param(SERVICE["spec"]["selector"], id="service"),
        pytest.param(DEPLOYMENT["spec"]["selector"]["matchLabels"], id="deployment"),
        pytest.param(PDB["spec"]["selector"]["matchLabels"], id="pdb"),
        pytest.param(
            MANIFESTS["NetworkPolicy", NAME]["spec"]["podSelector"]["matchLabels"],
            id="networkpolicy",
        ),
        *(
            pytest.param(constraint["labelSelector"]["matchLabels"], id=constraint["topologyKey"])
            for constraint in POD["topologySpreadConstraints"]
        ),
    ],
)
def test_selector_finds_the_pods(selector: dict[str, str]) -> None:
    assert selector == LABELS
    assert DEPLOYMENT["spec"]["template"]["metadata"]["labels"].items() >= selector.items()


def test_requests_reach_the_port_that_the_application_listens_on() -> None:
    listens = {setting.name: setting.default for setting in fields(app.Settings)}["port"]
    (container_port,) = CONTAINER["ports"]
    (service_port,) = SERVICE["spec"]["ports"]
    (allowed,) = find(MANIFESTS["NetworkPolicy", NAME]["spec"]["ingress"], "port")
    assert container_port["containerPort"] == listens == allowed
    assert service_port["targetPort"] == container_port["name"]
    for backend in find(INGRESS["spec"]["rules"], "service"):
        assert backend == {"name": SERVICE["metadata"]["name"], "port": {"name": "http"}}
    assert service_port["name"] == "http"


def test_autoscaler_scales_the_deployment() -> None:
    assert HPA["spec"]["scaleTargetRef"] == {
        "apiVersion": DEPLOYMENT["apiVersion"],
        "kind": DEPLOYMENT["kind"],
        "name": DEPLOYMENT["metadata"]["name"],
    }


def container_environment() -> dict[str, str]:
    """Raises KeyError for a key that the ConfigMap does not have."""
    environ = {}
    for variable in CONTAINER["env"]:
        if "value" in variable:
            environ[variable["name"]] = variable["value"]
        else:
            reference = variable["valueFrom"]["configMapKeyRef"]
            assert reference["name"] == f"{NAME}-config"
            environ[variable["name"]] = CONFIG[reference["key"]]
    return environ


def test_environment_is_what_the_application_takes() -> None:
    environ = container_environment()
    settings = app.Settings.from_environ(environ)
    assert settings.sqs_queue_url == CONFIG["sqs_queue_url"]
    assert settings.aws_region == CONFIG["aws_region"]
    known = {setting.name.upper() for setting in fields(app.Settings)}
    assert set(environ) - {"HOME"} == {"SQS_QUEUE_URL", "AWS_REGION"} <= known
    assert len(CONFIG) == 2


def is_routed(path: str) -> bool:
    (rule,) = INGRESS["spec"]["rules"]
    return any(
        path == route["path"]
        or (route["pathType"] == "Prefix" and path.startswith(f"{route['path']}/"))
        for route in rule["http"]["paths"]
    )


def app_paths() -> set[str]:
    settings = app.Settings(sqs_queue_url=CONFIG["sqs_queue_url"])
    routes = app.create_app(settings, ssm=object(), sqs=object()).url_map.iter_rules()
    return {re.sub("<.*>", "something", route.rule) for route in routes}


def test_ingress_routes_every_public_path_and_no_private_one() -> None:
    assert app_paths() >= PRIVATE
    assert {path for path in app_paths() if not is_routed(path)} == PRIVATE


def test_ingress_routes_nothing_that_the_application_does_not_serve() -> None:
    (rule,) = INGRESS["spec"]["rules"]
    assert {route["path"] for route in rule["http"]["paths"]} <= app_paths()
    assert {route["pathType"] for route in rule["http"]["paths"]} == {"Exact", "Prefix"}
    assert "host" not in rule


def test_path_that_is_not_routed_is_404_in_json() -> None:
    backend = INGRESS["spec"]["defaultBackend"]["service"]
    assert backend["port"] == {"name": "use-annotation"}
    action = json.loads(annotation(f"actions.{backend['name']}"))
    response = action["fixedResponseConfig"]
    status, message = app.ERRORS["not_found"]
    assert (action["type"], response["statusCode"]) == ("fixed-response", str(status))
    assert response["contentType"] == "application/json"
    assert json.loads(response["messageBody"]) == {
        "status": "error",
        "error": "not_found",
        "message": message,
    }


# --- Manifests: what deploy.sh fills in -----------------------------------------------------------

ALL_FILES = [pytest.param(file, id=file.name) for file in [*FILES, TEMPLATE_FILE]]


@pytest.mark.parametrize(
    ("placeholder", "files"),
    [
        ("ACCOUNT_ID", ["configmap.yaml", "serviceaccount.yaml"]),
        ("IMAGE", ["deployment.yaml"]),
        ("CONFIG_CHECKSUM", ["deployment.yaml"]),
        ("CERTIFICATE_ARN", ["ingress.yaml"]),
        ("WEB_ACL_ARN", ["ingress.yaml"]),
    ],
)
def test_placeholder_stands_where_it_is_filled_in_and_nowhere_else(
    placeholder: str, files: list[str]
) -> None:
    found = [
        file.name
        for file in FILES
        for _ in re.findall(rf"\b{placeholder}\b", file.read_text("utf-8"))
    ]
    assert found == files


def rendered_ingress(*keep: str) -> dict[str, str]:
    """The Ingress's annotations with only those of the marked lines that are kept."""
    lines = []
    for line in (app.PROJECT / "k8s" / "ingress.yaml").read_text("utf-8").splitlines():
        mark = re.search(r"  # (with(?:out)? a (?:certificate|web ACL))$", line)
        if not mark:
            lines.append(line)
        elif mark[1] in keep:
            lines.append(re.sub(r"^( +)# ", r"\1", line))
    (document,) = load("\n".join(lines))
    prefix = "alb.ingress.kubernetes.io/"
    return {
        name.removeprefix(prefix): value
        for name, value in document["metadata"]["annotations"].items()
    }


def test_ingress_with_a_certificate_redirects_to_tls() -> None:
    annotations = rendered_ingress("with a certificate", "with a web ACL")
    assert json.loads(annotations["listen-ports"]) == [{"HTTP": 80}, {"HTTPS": 443}]
    assert annotations["ssl-redirect"] == "443"
    assert annotations["wafv2-acl-arn"] == "WEB_ACL_ARN"


def test_ingress_without_a_certificate_is_plain_http() -> None:
    annotations = rendered_ingress("without a certificate")
    assert json.loads(annotations["listen-ports"]) == [{"HTTP": 80}]
    absent = {"certificate-arn", "ssl-redirect", "ssl-policy", "wafv2-acl-arn"}
    assert not absent & set(annotations)
    assert annotations["healthcheck-path"] == "/health"


@pytest.mark.parametrize("file", ALL_FILES)
def test_file_names_no_account(file: Path) -> None:
    assert re.findall(r"\b\d{12}\b|\.dkr\.ecr\.", file.read_text("utf-8")) == []


# --- Template -------------------------------------------------------------------------------------


class TemplateLoader(StrictLoader):
    """YAML with CloudFormation's short forms: !Ref X is {"Ref": X}, !Sub X is {"Fn::Sub": X}."""


def _short_form(loader: TemplateLoader, name: str, node: yaml.Node) -> Any:
    value: Any
    if isinstance(node, yaml.ScalarNode):
        value = node.value
    elif isinstance(node, yaml.SequenceNode):
        value = loader.construct_sequence(node, deep=True)
    else:
        value = loader.construct_mapping(node, deep=True)
    return {name if name == "Ref" else f"Fn::{name}": value}


TemplateLoader.add_multi_constructor("!", _short_form)
TEMPLATE = yaml.load(TEMPLATE_FILE.read_text("utf-8"), TemplateLoader)
NO_VALUE = object()


class Stack:
    """The template with its functions worked out, as far as it uses them."""

    def __init__(self, **parameters: str) -> None:
        given = {"OidcProvider": "oidc.example/id/1", **parameters}
        assert given.keys() <= TEMPLATE["Parameters"].keys()
        self.values: dict[str, Any] = {
            "AWS::AccountId": "ACCOUNT_ID",
            "AWS::NoValue": NO_VALUE,
            "AWS::Partition": "aws",
            "AWS::Region": "us-west-1",
            "AWS::StackName": NAME,
            "AWS::URLSuffix": "amazonaws.com",
        }
        for name, parameter in TEMPLATE["Parameters"].items():
            value = str(given.get(name, parameter.get("Default")))
            assert re.fullmatch(parameter.get("AllowedPattern", ".*"), value), f"{name}: {value!r}"
            assert value in parameter.get("AllowedValues", [value]), f"{name}: {value!r}"
            self.values[name] = value
        self.resources = {
            name: self.resolve(resource)
            for name, resource in TEMPLATE["Resources"].items()
            if "Condition" not in resource or self.holds(resource["Condition"])
        }

    def properties(self, name: str) -> dict[str, Any]:
        return dict(self.resources[name]["Properties"])

    def of_type(self, kind: str) -> dict[str, dict[str, Any]]:
        return {
            name: resource["Properties"]
            for name, resource in self.resources.items()
            if resource["Type"] == kind
        }

    def outputs(self) -> dict[str, str]:
        return {name: self.resolve(output)["Value"] for name, output in TEMPLATE["Outputs"].items()}

    def holds(self, condition: str) -> bool:
        return bool(self.resolve(TEMPLATE["Conditions"][condition]))

    def resolve(self, value: Any) -> Any:
        if isinstance(value, list):
            return [part for part in map(self.resolve, value) if part is not NO_VALUE]
        if not isinstance(value, dict):
            return value
        match next(iter(value.items()), (None, None)):
            case "Ref", name:
                return self.values.get(name, f"<{name}>")
            case "Fn::GetAtt", name:
                return f"<{name}>"
            case "Fn::If", [condition, yes, no]:
                return self.resolve(yes if self.holds(condition) else no)
            case "Fn::Equals", [left, right]:
                return self.resolve(left) == self.resolve(right)
            case "Fn::Not", [part]:
                return not self.resolve(part)
            case "Fn::And", parts:
                return all(self.resolve(parts))
            case "Fn::Split", [separator, text]:
                return self.resolve(text).split(separator)
            case "Fn::Select", [index, parts]:
                return self.resolve(parts)[index]
            case "Fn::Sub", [text, names]:
                return self._substitute(text, self.resolve(names))
            case "Fn::Sub", text:
                return self._substitute(text, {})
        return {
            name: resolved
            for name, part in value.items()
            if (resolved := self.resolve(part)) is not NO_VALUE
        }

    def _substitute(self, text: str, names: dict[str, str]) -> str:
        known = {**self.values, **names}
        return re.sub(r"\$\{(.*?)\}", lambda match: str(known.get(match[1], f"<{match[1]}>")), text)


WITH_LOAD_BALANCER = {
    "LoadBalancerFullName": "app/email/1a",
    "TargetGroupFullName": "targetgroup/email/2b",
}
ALARM = "AWS::CloudWatch::Alarm"


@pytest.mark.parametrize(
    ("parameter", "default"),
    [
        ("EnvironmentName", ""),
        ("ClusterName", "dev-CP-EKS-CLUSTER"),
        ("OidcProvider", None),
        ("Namespace", "email-processor"),
        ("ServiceAccount", "email-processor-sa"),
        ("QueueName", "dev-CP-queue"),
        ("FormerQueueName", ""),
        ("CreateQueue", "false"),
        ("DeadLetterQueueName", ""),
        ("TokenParameterNames", "/email-service/api-token"),
        ("TokenKeyArn", ""),
        ("RateLimit", 2000),
        ("AlarmEmail", ""),
        ("LoadBalancerFullName", ""),
        ("TargetGroupFullName", ""),
    ],
)
def test_parameter_has_its_default(parameter: str, default: str | int | None) -> None:
    assert TEMPLATE["Parameters"][parameter].get("Default") == default


@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        ("OidcProvider", "https://oidc.example/id/1"),
        ("TokenParameterNames", ""),
        ("TokenParameterNames", "no-slash"),
        ("TokenParameterNames", "/a, /b"),
        ("TokenParameterNames", "/a/*"),
        ("TokenParameterNames", ",".join(["/a"] * 11)),
        ("QueueName", "*"),
        ("FormerQueueName", "*"),
        ("EnvironmentName", "Prod_1"),
        ("TokenKeyArn", "*"),
        ("CreateQueue", "yes"),
    ],
)
def test_parameter_is_refused(parameter: str, value: str) -> None:
    with pytest.raises(AssertionError, match=parameter):
        Stack(**{parameter: value})


@pytest.mark.parametrize(
    ("environment", "role", "repository"),
    [
        ("", "email-processor-role", "email-processor"),
        ("test", "email-processor-role-test", "email-processor-test"),
    ],
)
def test_names_end_with_the_environment(environment: str, role: str, repository: str) -> None:
    stack = Stack(EnvironmentName=environment)
    assert stack.properties("Role")["RoleName"] == role
    assert stack.properties("Repository")["RepositoryName"] == repository


def test_outputs_are_what_deploy_reads() -> None:
    assert Stack().outputs() == {
        "RepositoryUri": "<Repository.RepositoryUri>",
        "RoleArn": "<Role.Arn>",
        "QueueUrl": "https://sqs.us-west-1.amazonaws.com/ACCOUNT_ID/dev-CP-queue",
        "WebAclArn": "arn:aws:wafv2:us-west-1:ACCOUNT_ID:regional/webacl/email-processor/",
        "AlarmTopicArn": "<AlarmTopic>",
        "DashboardName": "<Dashboard>",
    }


def test_web_acl_arn_takes_the_id_out_of_its_reference() -> None:
    stack = Stack()
    stack.values["WebAcl"] = "email-processor|1f-2e|REGIONAL"
    arn = "arn:aws:wafv2:us-west-1:ACCOUNT_ID:regional/webacl/email-processor/1f-2e"
    assert stack.outputs()["WebAclArn"] == arn


def test_manifests_name_the_templates_role_queue_and_service_account() -> None:
    stack = Stack()
    role = stack.properties("Role")["RoleName"]
    annotations = SERVICE_ACCOUNT["metadata"]["annotations"]
    assert annotations == {"eks.amazonaws.com/role-arn": f"arn:aws:iam::ACCOUNT_ID:role/{role}"}
    assert stack.outputs()["QueueUrl"] == CONFIG["sqs_queue_url"]
    assert stack.values["ServiceAccount"] == SERVICE_ACCOUNT["metadata"]["name"]
    assert stack.values["Namespace"] == SERVICE_ACCOUNT["metadata"]["namespace"]
    defaults = {setting.name: setting.default for setting in fields(app.Settings)}
    assert (stack.values["TokenParameterNames"],) == defaults["token_ssm_parameter"]


def test_only_the_service_account_may_take_the_role() -> None:
    trust = json.loads(Stack().properties("Role")["AssumeRolePolicyDocument"])
    assert trust["Statement"] == [
        {
            "Effect": "Allow",
            "Principal": {"Federated": "arn:aws:iam::ACCOUNT_ID:oidc-provider/oidc.example/id/1"},
            "Action": "sts:AssumeRoleWithWebIdentity",
            "Condition": {
                "StringEquals": {
                    "oidc.example/id/1:sub": (
                        "system:serviceaccount:email-processor:email-processor-sa"
                    ),
                    "oidc.example/id/1:aud": "sts.amazonaws.com",
                }
            },
        }
    ]


TEN = [f"/token/{number}" for number in range(10)]


@pytest.mark.parametrize(
    "names", [["/email-service/api-token"], ["/old", "/new"], TEN], ids=["one", "two", "ten"]
)
def test_role_may_read_exactly_its_tokens_and_send_to_exactly_its_queue(names: list[str]) -> None:
    role = Stack(TokenParameterNames=",".join(names)).properties("Role")
    assert "ManagedPolicyArns" not in role
    (policy,) = role["Policies"]
    assert policy["PolicyDocument"]["Statement"] == [
        {
            "Sid": "ReadToken",
            "Effect": "Allow",
            "Action": "ssm:GetParameter*",
            "Resource": [f"arn:aws:ssm:us-west-1:ACCOUNT_ID:parameter{name}" for name in names],
        },
        {
            "Sid": "SendMessages",
            "Effect": "Allow",
            "Action": ["sqs:SendMessage", "sqs:GetQueueAttributes"],
            "Resource": ["arn:aws:sqs:us-west-1:ACCOUNT_ID:dev-CP-queue"],
        },
    ]


def test_role_may_use_the_former_queue_during_a_roll_out() -> None:
    (policy,) = Stack(FormerQueueName="old.fifo").properties("Role")["Policies"]
    assert policy["PolicyDocument"]["Statement"][1]["Resource"] == [
        "arn:aws:sqs:us-west-1:ACCOUNT_ID:dev-CP-queue",
        "arn:aws:sqs:us-west-1:ACCOUNT_ID:old.fifo",
    ]


def test_role_may_use_the_tokens_own_key_when_there_is_one() -> None:
    key = "arn:aws:kms:us-west-1:123:key/1a-2b"
    (policy,) = Stack(TokenKeyArn=key).properties("Role")["Policies"]
    assert policy["PolicyDocument"]["Statement"][2:] == [
        {
            "Sid": "DecryptToken",
            "Effect": "Allow",
            "Action": "kms:Decrypt",
            "Resource": key,
            "Condition": {"StringEquals": {"kms:ViaService": "ssm.us-west-1.amazonaws.com"}},
        }
    ]


def test_no_other_resource_grants_anything() -> None:
    kinds = {resource["Type"] for resource in TEMPLATE["Resources"].values()}
    assert kinds == {
        "AWS::CloudWatch::Alarm",
        "AWS::CloudWatch::Dashboard",
        "AWS::ECR::Repository",
        "AWS::IAM::Role",
        "AWS::SNS::Subscription",
        "AWS::SNS::Topic",
        "AWS::SQS::Queue",
        "AWS::WAFv2::WebACL",
    }


def test_images_are_scanned_immutable_and_cleared_away() -> None:
    repository = Stack().properties("Repository")
    assert repository["ImageTagMutability"] == "IMMUTABLE"
    assert repository["ImageScanningConfiguration"] == {"ScanOnPush": True}
    rules = json.loads(repository["LifecyclePolicy"]["LifecyclePolicyText"])["rules"]
    assert [
        (rule["selection"]["tagStatus"], rule["selection"]["countNumber"]) for rule in rules
    ] == [("untagged", 7), ("any", 30)]


def test_queues_are_made_on_request_only() -> None:
    assert Stack().of_type("AWS::SQS::Queue") == {}
    made = Stack(CreateQueue="true").of_type("AWS::SQS::Queue")
    names = {name: queue["QueueName"] for name, queue in made.items()}
    assert names == {"Queue": "dev-CP-queue", "DeadLetterQueue": "dev-CP-queue-dlq"}


def test_queues_are_encrypted_keep_14_days_and_outlive_the_stack() -> None:
    stack = Stack(CreateQueue="true")
    for name, queue in stack.of_type("AWS::SQS::Queue").items():
        assert queue["MessageRetentionPeriod"] == 14 * 24 * 3600
        assert queue["MaximumMessageSize"] == 2**20, "the most that SQS takes"
        assert queue["SqsManagedSseEnabled"] is True
        # But for those of a stack whose first deployment fails: the next could not make them.
        assert stack.resources[name]["DeletionPolicy"] == "RetainExceptOnCreate"
        assert stack.resources[name]["UpdateReplacePolicy"] == "Retain"


def test_failed_messages_go_to_the_dead_letter_queue() -> None:
    stack = Stack(CreateQueue="true")
    assert stack.properties("Queue")["RedrivePolicy"] == {
        "deadLetterTargetArn": "<DeadLetterQueue.Arn>",
        "maxReceiveCount": 5,
    }
    assert stack.properties("DeadLetterQueue")["RedriveAllowPolicy"] == {
        "redrivePermission": "byQueue",
        "sourceQueueArns": ["arn:aws:sqs:us-west-1:ACCOUNT_ID:dev-CP-queue"],
    }


def test_rate_is_limited_for_each_address_with_429_in_json() -> None:
    acl = Stack(RateLimit="100").properties("WebAcl")
    assert (acl["Scope"], acl["DefaultAction"]) == ("REGIONAL", {"Allow": {}})
    (rule,) = acl["Rules"]
    assert rule["Statement"]["RateBasedStatement"] == {
        "AggregateKeyType": "IP",
        "EvaluationWindowSec": 300,
        "Limit": "100",
    }
    response = rule["Action"]["Block"]["CustomResponse"]
    assert response["ResponseCode"] == 429
    assert [header["Name"] for header in response["ResponseHeaders"]] == ["Retry-After"]
    body = acl["CustomResponseBodies"][response["CustomResponseBodyKey"]]
    assert body["ContentType"] == "APPLICATION_JSON"
    content = json.loads(body["Content"])
    assert content.keys() == {"status", "error", "message"}
    assert (content["status"], content["error"]) == ("error", "too_many_requests")
    assert "too_many_requests" not in app.ERRORS  # the service never gives it
    for visible in (acl, rule):
        assert visible["VisibilityConfig"]["CloudWatchMetricsEnabled"] is True


# --- Template: alarms and dashboard ---------------------------------------------------------------


LOAD_BALANCER = {"LoadBalancer": "app/email/1a"}
TARGET_GROUP = {"TargetGroup": "targetgroup/email/2b"}
QUEUE = {"QueueName": "dev-CP-queue"}
DEAD_LETTERS = {"QueueName": "dev-CP-queue-dlq"}
REPLICAS = {"ClusterName": "dev-CP-EKS-CLUSTER", "Namespace": NAME, "Service": NAME}
ERROR_RATE = "100 * (FILL(target, 0) + FILL(balancer, 0)) / (FILL(requests, 0) + FILL(balancer, 0))"
BALANCER = "AWS/ApplicationELB"
# What AWS publishes, and with which dimensions. With any others there is no data, and so no alarm.
PUBLISHED = {
    (BALANCER, "RequestCount"): {"LoadBalancer"},
    (BALANCER, "HTTPCode_Target_5XX_Count"): {"LoadBalancer"},
    (BALANCER, "HTTPCode_ELB_5XX_Count"): {"LoadBalancer"},
    (BALANCER, "TargetResponseTime"): {"LoadBalancer"},
    (BALANCER, "UnHealthyHostCount"): {"LoadBalancer", "TargetGroup"},
    ("AWS/SQS", "ApproximateNumberOfMessagesVisible"): {"QueueName"},
    ("AWS/SQS", "ApproximateAgeOfOldestMessage"): {"QueueName"},
    ("AWS/WAFV2", "BlockedRequests"): {"WebACL", "Region", "Rule"},
    ("ContainerInsights", "service_number_of_running_pods"): {
        "ClusterName",
        "Namespace",
        "Service",
    },
}
# Alarm -> what it watches, and when it rings: statistic, limit, and how many periods of how many.
ALARMS: dict[str, tuple[dict[str, Any], str]] = {
    "DeadLetterQueueNotEmpty": (
        {"": ("AWS/SQS", "ApproximateNumberOfMessagesVisible", DEAD_LETTERS, "Maximum", 60)},
        "> 0, 1 of 1",
    ),
    "OldestMessageTooOld": (
        {"": ("AWS/SQS", "ApproximateAgeOfOldestMessage", QUEUE, "Maximum", 60)},
        "> 900, 5 of 5",
    ),
    "ServerErrorRateHigh": (
        {
            "rate": ERROR_RATE,
            "target": (BALANCER, "HTTPCode_Target_5XX_Count", LOAD_BALANCER, "Sum", 60),
            "balancer": (BALANCER, "HTTPCode_ELB_5XX_Count", LOAD_BALANCER, "Sum", 60),
            "requests": (BALANCER, "RequestCount", LOAD_BALANCER, "Sum", 60),
        },
        "> 1, 3 of 5",
    ),
    "LatencyHigh": (
        {"": (BALANCER, "TargetResponseTime", LOAD_BALANCER, "p99", 60)},
        "> 1, 3 of 5",
    ),
    "TargetsUnhealthy": (
        {"": (BALANCER, "UnHealthyHostCount", LOAD_BALANCER | TARGET_GROUP, "Maximum", 60)},
        "> 0, 3 of 3",
    ),
    "ReplicasAtMaximum": (
        {"": ("ContainerInsights", "service_number_of_running_pods", REPLICAS, "Minimum", 300)},
        ">= 10, 3 of 3",
    ),
}


def watched(alarm: dict[str, Any]) -> dict[str, Any]:
    """Id -> the expression, or namespace, metric, dimensions, statistic and period."""
    statistic = alarm.get("Statistic", alarm.get("ExtendedStatistic"))
    plain = {"Metric": alarm, "Stat": statistic, "Period": alarm.get("Period")}
    found = {}
    for query in alarm.get("Metrics", [{"Id": "", "MetricStat": plain}]):
        if "Expression" in query:
            found[query["Id"]] = query["Expression"]
            continue
        metric, how = query["MetricStat"]["Metric"], query["MetricStat"]
        dimensions = {part["Name"]: part["Value"] for part in metric["Dimensions"]}
        name = metric["Namespace"], metric["MetricName"]
        found[query["Id"]] = (*name, dimensions, how["Stat"], how["Period"])
    return found


@pytest.mark.parametrize("name", ALARMS)
def test_alarm_watches_its_metric(name: str) -> None:
    alarm = Stack(**WITH_LOAD_BALANCER).properties(name)
    metrics, limit = ALARMS[name]
    assert watched(alarm) == metrics
    periods = alarm["EvaluationPeriods"]
    of_them = f"{alarm.get('DatapointsToAlarm', periods)} of {periods}"
    signs = {"GreaterThanThreshold": ">", "GreaterThanOrEqualToThreshold": ">="}
    assert f"{signs[alarm['ComparisonOperator']]} {alarm['Threshold']}, {of_them}" == limit
    returned = [part["Id"] for part in alarm.get("Metrics", []) if part.get("ReturnData", True)]
    assert returned == (["rate"] if "Metrics" in alarm else [])


def figures(alarm: dict[str, Any]) -> dict[str, list[float]]:
    """What an alarm's text may say -> the numbers in it, by the alarm's own settings."""
    (period,) = {query[-1] for query in watched(alarm).values() if isinstance(query, tuple)}
    minutes, periods = period / 60, alarm["EvaluationPeriods"]
    receives = Stack(CreateQueue="true").properties("Queue")["RedrivePolicy"]["maxReceiveCount"]
    percentile = int(alarm.get("ExtendedStatistic", "p0")[1:])
    threshold = alarm["Threshold"]
    return {
        r"in (\d+) of the last (\d+) minutes": [
            alarm.get("DatapointsToAlarm", periods) * minutes,
            periods * minutes,
        ],
        r"for (\d+) minutes": [periods * minutes],
        r"for over (\d+) minutes": [threshold / 60],
        r"over (\d+) (?:%|s) ": [threshold],
        r"all (\d+) replicas": [threshold],
        r"slowest (\d+) %": [100 - percentile],
        r"on a message (\d+) times": [receives],
    }


@pytest.mark.parametrize("name", ALARMS)
def test_figures_in_an_alarms_text_and_in_its_runbook_entry_follow_from_its_settings(
    name: str,
) -> None:
    alarm = Stack(**WITH_LOAD_BALANCER).properties(name)
    runbook = (app.PROJECT / "RUNBOOK.md").read_text("utf-8")
    entry = runbook.split(f"\n### {name}\n")[1].split("- **Clients see:**")[0]
    description = alarm["AlarmDescription"].lower()
    texts = [description, " ".join(entry.split()).lower().replace("five", "5")]
    for pattern, numbers in figures(alarm).items():
        for text in texts:
            for found in re.finditer(pattern, text):
                assert [float(number) for number in found.groups()] == numbers, found[0]
        description = re.sub(pattern, "", description)
    assert not re.search(r"\b\d+\b", description), "a figure that nothing was said of"


def test_every_alarm_goes_to_the_topic_and_names_its_entry_in_the_runbook() -> None:
    alarms = Stack(**WITH_LOAD_BALANCER).of_type(ALARM)
    assert len(alarms) == 6
    for name, alarm in alarms.items():
        assert alarm["AlarmActions"] == alarm["OKActions"] == ["<AlarmTopic>"]
        assert alarm["AlarmDescription"].endswith(f". See RUNBOOK.md: {name}")
        assert alarm["AlarmName"] == f"email-processor-{name}"
        assert alarm["TreatMissingData"] == "notBreaching"


def test_alarms_on_the_load_balancer_wait_for_it() -> None:
    waiting = {"ServerErrorRateHigh", "LatencyHigh", "TargetsUnhealthy"}
    everything = set(Stack(**WITH_LOAD_BALANCER).of_type(ALARM))
    assert everything - set(Stack().of_type(ALARM)) == waiting
    for alarm in waiting:
        used = json.dumps(Stack(**WITH_LOAD_BALANCER).properties(alarm))
        assert WITH_LOAD_BALANCER["LoadBalancerFullName"] in used


def test_alarm_watches_the_dead_letter_queue_of_the_given_name() -> None:
    alarm = Stack(DeadLetterQueueName="our-dead-letters").properties("DeadLetterQueueNotEmpty")
    assert alarm["Dimensions"] == [{"Name": "QueueName", "Value": "our-dead-letters"}]


def test_replicas_are_watched_against_the_autoscalers_limits() -> None:
    stack = Stack()
    alarm = stack.properties("ReplicasAtMaximum")
    assert alarm["Threshold"] == HPA["spec"]["maxReplicas"]
    assert (SERVICE["metadata"]["namespace"], SERVICE["metadata"]["name"]) == (NAME, NAME)
    body = json.loads(stack.properties("Dashboard")["DashboardBody"])
    (lines,) = find(body, "horizontal")
    assert {line["label"]: line["value"] for line in lines} == {
        "maximum": HPA["spec"]["maxReplicas"],
        "minimum": HPA["spec"]["minReplicas"],
    }


def drawn(body: dict[str, Any]) -> list[tuple[str, str, dict[str, str], str]]:
    """Namespace, metric, dimensions and statistic of every line, its short forms written out."""
    lines = []
    for widget in body["widgets"]:
        before: list[str] = []
        for metric in widget["properties"]["metrics"]:
            *parts, options = metric
            if not parts:
                continue  # an expression
            if parts == ["..."]:
                parts = before
            pairs = zip(parts, before or parts, strict=True)
            before = [old if part == "." else part for part, old in pairs]
            namespace, name, *dimensions = before
            statistic = options.get("stat", widget["properties"].get("stat"))
            named = dict(zip(dimensions[::2], dimensions[1::2], strict=True))
            lines.append((namespace, name, named, statistic))
    return lines


@pytest.mark.parametrize("balancer", ["none", "app/email/1a"], ids=["at first", "later"])
def test_dashboard_shows_every_signal_and_has_no_empty_dimension(balancer: str) -> None:
    stack = Stack(**(WITH_LOAD_BALANCER if balancer != "none" else {}))
    body = json.loads(stack.properties("Dashboard")["DashboardBody"])
    acl = stack.properties("WebAcl")
    blocked = {
        "WebACL": acl["VisibilityConfig"]["MetricName"],
        "Region": "us-west-1",
        "Rule": acl["Rules"][0]["VisibilityConfig"]["MetricName"],
    }
    whole = {"LoadBalancer": balancer}
    assert drawn(body) == [
        (BALANCER, "RequestCount", whole, "Sum"),
        (BALANCER, "HTTPCode_Target_5XX_Count", whole, "Sum"),
        (BALANCER, "HTTPCode_ELB_5XX_Count", whole, "Sum"),
        (BALANCER, "TargetResponseTime", whole, "p50"),
        (BALANCER, "TargetResponseTime", whole, "p99"),
        ("AWS/SQS", "ApproximateNumberOfMessagesVisible", QUEUE, "Maximum"),
        ("AWS/SQS", "ApproximateAgeOfOldestMessage", QUEUE, "Maximum"),
        ("AWS/SQS", "ApproximateNumberOfMessagesVisible", DEAD_LETTERS, "Maximum"),
        ("ContainerInsights", "service_number_of_running_pods", REPLICAS, "Maximum"),
        ("AWS/WAFV2", "BlockedRequests", blocked, "Sum"),
    ]
    assert list(find(body, "expression")) == [ERROR_RATE]


def test_alarms_and_dashboard_ask_for_what_aws_publishes() -> None:
    stack = Stack(**WITH_LOAD_BALANCER)
    asked = [query for alarm in stack.of_type(ALARM).values() for query in watched(alarm).values()]
    asked += drawn(json.loads(stack.properties("Dashboard")["DashboardBody"]))
    found = {(q[0], q[1], *sorted(q[2])) for q in asked if isinstance(q, tuple)}
    assert found == {(*name, *sorted(dimensions)) for name, dimensions in PUBLISHED.items()}


def test_alarms_are_mailed_when_an_address_is_given() -> None:
    assert Stack().of_type("AWS::SNS::Subscription") == {}
    (subscription,) = (
        Stack(AlarmEmail="on-call@example.com").of_type("AWS::SNS::Subscription").values()
    )
    assert subscription == {
        "TopicArn": "<AlarmTopic>",
        "Protocol": "email",
        "Endpoint": "on-call@example.com",
    }


# --- Lint -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        f"cfn-lint --include-checks I --regions us-west-1 --template {TEMPLATE_FILE}",
        f"check-jsonschema -q --builtin-schema github-workflows {' '.join(map(str, WORKFLOWS))}",
        f"check-jsonschema -q --builtin-schema dependabot {DEPENDABOT}",
        f"hadolint {app.PROJECT / 'Dockerfile'}",
        f"shellcheck {' '.join(map(str, SCRIPTS))}",
        f"zizmor -q --offline --pedantic --format github {DEPENDABOT.parent}",
    ],
    ids=lambda command: command.split()[0],
)
def test_is_clean_under(command: str) -> None:
    tool, *arguments = command.split()
    done = subprocess.run(
        [Path(sys.executable).parent / tool, *arguments], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


CI = yaml.safe_load((app.PROJECT / ".github" / "workflows" / "ci.yml").read_text("utf-8"))


@pytest.mark.parametrize(
    ("variable", "arguments"),
    [
        ("GRYPE", "docker-archive:/image.tar --only-fixed --fail-on high"),
        ("CHECKOV", "--directory . --framework dockerfile kubernetes cloudformation"),
    ],
)
def test_pipeline_fails_for_what_a_scanner_finds(variable: str, arguments: str) -> None:
    steps = [step for job in CI["jobs"].values() for step in job["steps"]]
    (script,) = (step["run"] for step in steps if variable in step.get("env", {}))
    words = script.replace("\\\n", "").split()
    assert words[words.index(f'"${variable}"') + 1 :][: len(arguments.split())] == arguments.split()
    assert not {"||", ";", "--soft-fail", "--skip-check"} & set(words)
    assert not any("continue-on-error" in step for step in steps)


def test_pipeline_applies_the_manifests_to_the_oldest_and_the_newest_kubernetes() -> None:
    nodes = CI["jobs"]["kubernetes"]["strategy"]["matrix"]["node"]
    pinned = r"kindest/node:v(1\.\d+)\.\d+@sha256:[0-9a-f]{64}"
    assert [re.sub(pinned, r"\1", node) for node in nodes] == [KUBERNETES[0], KUBERNETES[-1]]


@pytest.mark.parametrize(
    ("first", "second", "passes"),
    [
        ("echo service/a created", "echo service/a unchanged", True),
        ("echo service/a created; echo Warning: old >&2", "echo service/a unchanged", False),
        ("echo service/a created", "echo service/a unchanged; echo Warning: old >&2", False),
        ("echo service/a created", "echo service/a configured", False),
        ("echo error: unknown field >&2; exit 1", "echo service/a unchanged", False),
        ("echo service/a created", "echo service/a unchanged; exit 1", False),
    ],
)
def test_pipeline_fails_for_a_warning_and_for_a_second_apply_that_changes_something(
    first: str, second: str, passes: bool, tmp_path: Path
) -> None:
    steps = {step.get("name"): step for step in CI["jobs"]["kubernetes"]["steps"]}
    script = steps["Apply the manifests twice"]["run"]
    assert script.count("kubectl apply --validate=strict --filename manifests.yaml") == 2
    assert ">manifests.yaml" in steps["Render the manifests"]["run"]
    kubectl = f"kubectl() {{ if [ -s first ]; then {second}; else {first}; fi; }}\n"
    shell = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", kubectl + script]
    done = subprocess.run(shell, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode == 0) == passes, done
