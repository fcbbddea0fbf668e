"""The manifests: their schemas, and the numbers and names that must fit the application's.

Nothing here needs a cluster. The schemas of Kubernetes come with kubernetes-validate.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import kubernetes_validate
import pytest
import yaml

import app

OLDEST, NEWEST = "1.30", "1.34"  # the releases of Kubernetes that are supported
NAME = "email-processor"
ALB = "alb.ingress.kubernetes.io"
LABELS = {"app.kubernetes.io/name": NAME}
PRIVATE = {"/metrics", "/ready"}  # for the cluster alone
SLOWEST_HEALTH = 6  # seconds; every thread waits for SQS, which has just begun to fail
SLOWEST_READY = 7  # seconds; SSM and SQS take the connection and do not answer


class StrictLoader(yaml.SafeLoader):
    """YAML as `kubectl --validate=strict` reads it: a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"a key is given twice: {sorted(keys)}"
        return super().construct_mapping(node, deep)


MANIFESTS = {
    (document["kind"], document["metadata"]["name"]): document
    for file in sorted((app.PROJECT / "k8s").glob("*.yaml"))
    if file.name != "kustomization.yaml"
    for document in yaml.load_all(file.read_text("utf-8"), StrictLoader)
}
DEPLOYMENT = MANIFESTS["Deployment", NAME]
POD = DEPLOYMENT["spec"]["template"]["spec"]
CONTAINER = POD["containers"][0]
SERVICE = MANIFESTS["Service", NAME]
INGRESS = MANIFESTS["Ingress", f"{NAME}-ingress"]
HPA = MANIFESTS["HorizontalPodAutoscaler", f"{NAME}-hpa"]
PDB = MANIFESTS["PodDisruptionBudget", NAME]
NETWORK = MANIFESTS["NetworkPolicy", NAME]["spec"]
CONFIG = MANIFESTS["ConfigMap", f"{NAME}-config"]["data"]
SERVICE_ACCOUNT = MANIFESTS["ServiceAccount", f"{NAME}-sa"]
SETTINGS = {setting.name: setting.default for setting in fields(app.Settings)}
ASLEEP = CONTAINER["lifecycle"]["preStop"]["sleep"]["seconds"]


def annotation(name: str) -> str:
    return str(INGRESS["metadata"]["annotations"][f"{ALB}/{name}"])


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


# --- Schemas and values ---------------------------------------------------------------------------


@pytest.mark.parametrize("manifest", MANIFESTS, ids="-".join)
def test_manifest_is_valid_in_the_newest_kubernetes(manifest: tuple[str, str]) -> None:
    kubernetes_validate.validate(MANIFESTS[manifest], NEWEST, strict=True)


def test_manifests_are_valid_in_the_oldest_kubernetes() -> None:
    for document in MANIFESTS.values():
        kubernetes_validate.validate(document, OLDEST, strict=True)


def test_names_are_the_ones_that_others_rely_on() -> None:
    """Above all those that the runbook and deploy.sh give to kubectl."""
    names = {kind: name.removeprefix(NAME) for kind, name in MANIFESTS}
    assert names.pop("ConfigMap") == "-config"
    assert names.pop("HorizontalPodAutoscaler") == "-hpa"
    assert names.pop("Ingress") == "-ingress"
    assert names.pop("ServiceAccount") == "-sa"
    assert names.pop("Role") == names.pop("RoleBinding") == "-role"
    assert set(names.values()) == {""}
    assert len(MANIFESTS) == 11


def test_everything_is_in_the_namespace() -> None:
    namespaces = {kind: each["metadata"].get("namespace") for (kind, _), each in MANIFESTS.items()}
    assert namespaces.pop("Namespace") is None
    assert set(namespaces.values()) == {NAME}


@pytest.mark.parametrize(
    ("where", "name", "expected"),
    [
        (DEPLOYMENT["spec"], "replicas", None),  # the HPA owns it
        (DEPLOYMENT["spec"]["strategy"], "rollingUpdate", {"maxUnavailable": 0, "maxSurge": "25%"}),
        (POD, "automountServiceAccountToken", False),
        (POD, "enableServiceLinks", False),
        (CONTAINER, "command", None),  # the image's own, in exec form
        (CONTAINER["resources"], "requests", {"cpu": "250m", "memory": "256Mi"}),
        (CONTAINER["resources"], "limits", {"cpu": "500m", "memory": "512Mi"}),
        (HPA["spec"], "minReplicas", 2),
        (HPA["spec"], "maxReplicas", 10),
        (INGRESS["metadata"]["annotations"], f"{ALB}/target-type", "ip"),
        (INGRESS["metadata"]["annotations"], f"{ALB}/healthcheck-path", "/health"),
        (CONFIG, "aws_region", "us-west-1"),
        (CONFIG, "sqs_queue_url", "https://sqs.us-west-1.amazonaws.com/ACCOUNT_ID/dev-CP-queue"),
    ],
)
def test_value_is_as_specified(where: dict[str, Any], name: str, expected: Any) -> None:
    assert where.get(name) == expected


def test_load_balancer_drops_malformed_headers() -> None:
    name = "routing.http.drop_invalid_header_fields.enabled"
    assert attributes("load-balancer-attributes")[name] == "true"


def test_autoscaler_looks_at_memory_then_cpu() -> None:
    # The order that Kubernetes gives them back in; in any other, every apply is a change.
    metrics = [metric["resource"] for metric in HPA["spec"]["metrics"]]
    assert [(m["name"], m["target"]["averageUtilization"]) for m in metrics] == [
        ("memory", 80),
        ("cpu", 70),
    ]


def test_pod_meets_the_restricted_standard() -> None:
    labels = MANIFESTS["Namespace", NAME]["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    assert labels["pod-security.kubernetes.io/enforce-version"] == f"v{OLDEST}"
    assert POD["securityContext"]["runAsNonRoot"] is True
    assert POD["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert CONTAINER["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_namespace_asks_for_readiness_gates() -> None:
    labels = MANIFESTS["Namespace", NAME]["metadata"]["labels"]
    for controller in ("elbv2.k8s.aws", "eks.amazonaws.com"):
        assert labels[f"{controller}/pod-readiness-gate-inject"] == "enabled"


def test_home_is_a_small_tmp_in_memory() -> None:
    (mount,) = CONTAINER["volumeMounts"]
    (volume,) = POD["volumes"]
    assert mount["name"] == volume["name"]
    assert volume["emptyDir"] == {"medium": "Memory", "sizeLimit": "32Mi"}
    assert {"name": "HOME", "value": mount["mountPath"]} in CONTAINER["env"]


def test_pods_are_spread_but_never_kept_from_running() -> None:
    spread = POD["topologySpreadConstraints"]
    keys = ["topology.kubernetes.io/zone", "kubernetes.io/hostname"]
    assert [constraint["topologyKey"] for constraint in spread] == keys
    assert {constraint["whenUnsatisfiable"] for constraint in spread} == {"ScheduleAnyway"}


def test_network_lets_in_8080_and_out_dns_and_443_alone() -> None:
    assert NETWORK["policyTypes"] == ["Ingress", "Egress"]
    assert NETWORK["ingress"] == [{"ports": [{"protocol": "TCP", "port": 8080}]}]
    assert NETWORK["egress"] == [
        {"ports": [{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}]},
        {"ports": [{"protocol": "TCP", "port": 443}]},
    ]


def test_drain_never_takes_the_last_pod() -> None:
    assert PDB["spec"]["maxUnavailable"] == 1 < HPA["spec"]["minReplicas"]


def test_service_account_may_do_nothing_in_the_cluster() -> None:
    assert not MANIFESTS["Role", f"{NAME}-role"].get("rules")


# --- Probes and times -----------------------------------------------------------------------------


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


def test_roll_out_waits_for_pull_start_and_health_checks() -> None:
    """A pod is ready only once the load balancer has found it healthy: its readiness gate."""
    pull, start = 60, 30
    checks = int(annotation("healthcheck-interval-seconds"))
    checks *= int(annotation("healthy-threshold-count"))
    assert DEPLOYMENT["spec"]["progressDeadlineSeconds"] > pull + start + checks


def test_grace_period_outlasts_sleep_plus_graceful_timeout() -> None:
    assert POD["terminationGracePeriodSeconds"] > ASLEEP + gunicorn_setting("graceful_timeout")


def test_pod_sleeps_while_the_load_balancer_may_send_to_it() -> None:
    delay = attributes("target-group-attributes")["deregistration_delay.timeout_seconds"]
    assert int(delay) == ASLEEP


def test_gunicorn_keeps_connections_longer_than_the_alb() -> None:
    idle = attributes("load-balancer-attributes")["idle_timeout.timeout_seconds"]
    assert int(idle) == 60 < gunicorn_setting("keepalive")


# --- Each other, and the application --------------------------------------------------------------


@pytest.mark.parametrize(
    "selector",
    [
        pytest.param(SERVICE["spec"]["selector"], id="service"),
        pytest.param(DEPLOYMENT["spec"]["selector"]["matchLabels"], id="deployment"),
        pytest.param(PDB["spec"]["selector"]["matchLabels"], id="pdb"),
        pytest.param(NETWORK["podSelector"]["matchLabels"], id="networkpolicy"),
        *(
            pytest.param(constraint["labelSelector"]["matchLabels"], id=constraint["topologyKey"])
            for constraint in POD["topologySpreadConstraints"]
        ),
    ],
)
def test_selector_finds_the_pods(selector: dict[str, str]) -> None:
    assert selector == LABELS
    assert DEPLOYMENT["spec"]["template"]["metadata"]["labels"].items() >= selector.items()


def test_requests_reach_the_port_that_the_application_opens() -> None:
    (container_port,) = CONTAINER["ports"]
    (service_port,) = SERVICE["spec"]["ports"]
    (allowed,) = find(NETWORK["ingress"], "port")
    assert container_port["containerPort"] == SETTINGS["port"] == allowed
    assert service_port["targetPort"] == container_port["name"] == "http"
    for backend in find(INGRESS["spec"]["rules"], "service"):
        assert backend == {"name": NAME, "port": {"name": service_port["name"]}}


def test_autoscaler_scales_the_deployment() -> None:
    assert HPA["spec"]["scaleTargetRef"] == {
        "apiVersion": DEPLOYMENT["apiVersion"],
        "kind": "Deployment",
        "name": NAME,
    }


def test_pods_run_as_the_service_account() -> None:
    account = SERVICE_ACCOUNT["metadata"]["name"]
    assert POD["serviceAccountName"] == account
    (subject,) = MANIFESTS["RoleBinding", f"{NAME}-role"]["subjects"]
    assert subject == {"kind": "ServiceAccount", "name": account, "namespace": NAME}


def test_environment_is_what_the_application_takes() -> None:
    environ = {}
    for variable in CONTAINER["env"]:
        if "value" in variable:
            environ[variable["name"]] = variable["value"]
        else:
            reference = variable["valueFrom"]["configMapKeyRef"]
            assert reference["name"] == f"{NAME}-config"
            environ[variable["name"]] = CONFIG[reference["key"]]
    settings = app.Settings.from_environ(environ)
    assert settings.sqs_queue_url == CONFIG["sqs_queue_url"]
    assert settings.aws_region == CONFIG["aws_region"]
    assert set(environ) - {"HOME"} <= {name.upper() for name in SETTINGS}


def routes() -> list[dict[str, Any]]:
    (rule,) = INGRESS["spec"]["rules"]
    assert "host" not in rule
    return list(rule["http"]["paths"])


def is_routed(path: str) -> bool:
    return any(
        path == route["path"]
        or (route["pathType"] == "Prefix" and path.startswith(f"{route['path']}/"))
        for route in routes()
    )


def app_paths() -> set[str]:
    settings = app.Settings(sqs_queue_url=CONFIG["sqs_queue_url"])
    rules = app.create_app(settings, ssm=object(), sqs=object()).url_map.iter_rules()
    return {re.sub("<.*>", "something", rule.rule) for rule in rules}


def test_ingress_routes_all_public_paths_but_no_private_one() -> None:
    assert app_paths() >= PRIVATE
    assert {path for path in app_paths() if not is_routed(path)} == PRIVATE


def test_ingress_routes_only_what_the_application_serves() -> None:
    assert {route["path"] for route in routes()} <= app_paths()


def test_path_that_is_not_routed_is_404_in_json() -> None:
    backend = INGRESS["spec"]["defaultBackend"]["service"]
    assert backend["port"] == {"name": "use-annotation"}
    answer = json.loads(annotation(f"actions.{backend['name']}"))["fixedResponseConfig"]
    status, message = app.ERRORS["not_found"]
    assert (answer["statusCode"], answer["contentType"]) == (str(status), "application/json")
    body = {"status": "error", "error": "not_found", "message": message}
    assert json.loads(answer["messageBody"]) == body


def test_no_manifest_names_an_account_or_a_registry() -> None:
    for file in [*(app.PROJECT / "k8s").iterdir(), *(app.PROJECT / "infra").iterdir()]:
        assert not re.search(r"\b\d{12}\b|\.dkr\.ecr\.", file.read_text("utf-8")), file.name
