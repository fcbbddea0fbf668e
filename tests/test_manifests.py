"""The manifests: their schemas, and the numbers and names that must fit the application's.

Nothing here needs a cluster. The schemas of Kubernetes come with kubernetes-validate.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
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


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_manifests_are_valid_in_kubernetes(version: str) -> None:
    for document in MANIFESTS.values():
        kubernetes_validate.validate(document, version, strict=True)


def test_names_are_the_ones_that_others_rely_on() -> None:
    """Above all those that the runbook and deploy.sh give to kubectl."""
    ends = {"ConfigMap": "-config", "HorizontalPodAutoscaler": "-hpa", "Ingress": "-ingress"}
    ends |= {"Role": "-role", "RoleBinding": "-role", "ServiceAccount": "-sa"}
    assert len(MANIFESTS) == 11
    for (kind, name), document in MANIFESTS.items():
        assert name == NAME + ends.get(kind, "")
        assert document["metadata"].get("namespace") == (None if kind == "Namespace" else NAME)


def probe(path: str, period: int) -> dict[str, Any]:
    asked = {"httpGet": {"path": path, "port": "http"}, "periodSeconds": period}
    return {**asked, "timeoutSeconds": 3, "failureThreshold": 3}


SECURITY = "pod-security.kubernetes.io"
LABELS_OF_NAMESPACE = MANIFESTS["Namespace", NAME]["metadata"]["labels"]
AS_SPECIFIED: list[tuple[dict[str, Any], str, Any]] = [
    (DEPLOYMENT["spec"], "replicas", None),  # the HPA owns it
    (DEPLOYMENT["spec"]["strategy"], "rollingUpdate", {"maxUnavailable": 0, "maxSurge": "25%"}),
    (POD, "automountServiceAccountToken", False),
    (POD, "enableServiceLinks", False),
    (POD["securityContext"], "runAsNonRoot", True),
    (POD["securityContext"], "seccompProfile", {"type": "RuntimeDefault"}),
    (CONTAINER, "command", None),  # the image's own, in exec form
    (CONTAINER["resources"], "requests", {"cpu": "250m", "memory": "256Mi"}),
    (CONTAINER["resources"], "limits", {"cpu": "500m", "memory": "512Mi"}),
    (CONTAINER["securityContext"], "allowPrivilegeEscalation", False),
    (CONTAINER["securityContext"], "readOnlyRootFilesystem", True),
    (CONTAINER["securityContext"], "capabilities", {"drop": ["ALL"]}),
    # 30 s of grace for the start.
    (CONTAINER, "startupProbe", {**probe("/ready", 5), "failureThreshold": 6}),
    (CONTAINER, "livenessProbe", probe("/health", 10)),
    (CONTAINER, "readinessProbe", probe("/health", 5)),
    (HPA["spec"], "minReplicas", 2),
    (HPA["spec"], "maxReplicas", 10),
    (PDB["spec"], "maxUnavailable", 1),
    (MANIFESTS["Role", f"{NAME}-role"], "rules", None),  # nothing in the cluster
    (LABELS_OF_NAMESPACE, f"{SECURITY}/enforce", "restricted"),
    (LABELS_OF_NAMESPACE, f"{SECURITY}/enforce-version", f"v{OLDEST}"),
    (LABELS_OF_NAMESPACE, "elbv2.k8s.aws/pod-readiness-gate-inject", "enabled"),
    (LABELS_OF_NAMESPACE, "eks.amazonaws.com/pod-readiness-gate-inject", "enabled"),
    (INGRESS["metadata"]["annotations"], f"{ALB}/target-type", "ip"),
    (INGRESS["metadata"]["annotations"], f"{ALB}/healthcheck-path", "/health"),
    # It must ask less often than it waits, and waits as the probes do.
    (INGRESS["metadata"]["annotations"], f"{ALB}/healthcheck-timeout-seconds", "3"),
    (INGRESS["metadata"]["annotations"], f"{ALB}/healthcheck-interval-seconds", "10"),
    (INGRESS["metadata"]["annotations"], f"{ALB}/unhealthy-threshold-count", "3"),
    (CONFIG, "aws_region", "us-west-1"),
    (CONFIG, "sqs_queue_url", "https://sqs.us-west-1.amazonaws.com/ACCOUNT_ID/dev-CP-queue"),
    (NETWORK, "ingress", [{"ports": [{"protocol": "TCP", "port": 8080}]}]),
]


@pytest.mark.parametrize(("where", "name", "expected"), AS_SPECIFIED)
def test_value_is_as_specified(where: dict[str, Any], name: str, expected: Any) -> None:
    assert where.get(name) == expected


def test_network_allows_dns_https_traces_and_the_agent_of_pod_identity() -> None:
    assert NETWORK["policyTypes"] == ["Ingress", "Egress"]
    assert NETWORK["egress"] == [
        {"ports": [{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}]},
        {"ports": [{"protocol": "TCP", "port": 4318}]},
        {"ports": [{"protocol": "TCP", "port": 443}]},
        {
            "to": [
                {"ipBlock": {"cidr": "169.254.170.23/32"}},
                {"ipBlock": {"cidr": "fd00:ec2::23/128"}},
            ],
            "ports": [{"protocol": "TCP", "port": 80}],
        },
    ]


def test_autoscaler_looks_at_memory_then_cpu() -> None:
    # The order that Kubernetes gives them back in; in any other, every apply is a change.
    metrics = [metric["resource"] for metric in HPA["spec"]["metrics"]]
    shares = [(each["name"], each["target"]["averageUtilization"]) for each in metrics]
    assert shares == [("memory", 80), ("cpu", 70)]
    half = {"type": "Percent", "value": 50, "periodSeconds": 300}
    assert HPA["spec"]["behavior"] == {"scaleDown": {"policies": [half]}}
    assert HPA["spec"]["scaleTargetRef"] == {
        "apiVersion": DEPLOYMENT["apiVersion"],
        "kind": "Deployment",
        "name": NAME,
    }


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


# --- Times ----------------------------------------------------------------------------------------


def test_roll_out_waits_for_pull_start_and_health_checks() -> None:
    """A pod is ready only once the load balancer has found it healthy: its readiness gate."""
    pull, start = 60, 30
    checks = int(annotation("healthcheck-interval-seconds"))
    checks *= int(annotation("healthy-threshold-count"))
    assert DEPLOYMENT["spec"]["progressDeadlineSeconds"] > pull + start + checks


def test_pod_outlasts_load_balancer_plus_gunicorn() -> None:
    delay = attributes("target-group-attributes")["deregistration_delay.timeout_seconds"]
    assert int(delay) == ASLEEP, "while the load balancer may send to it"
    assert POD["terminationGracePeriodSeconds"] > ASLEEP + gunicorn_setting("graceful_timeout")


def test_gunicorn_keeps_connections_longer_than_the_alb() -> None:
    load_balancer = attributes("load-balancer-attributes")
    idle = int(load_balancer["idle_timeout.timeout_seconds"])
    assert idle == 60 < gunicorn_setting("keepalive")
    assert load_balancer["routing.http.drop_invalid_header_fields.enabled"] == "true"


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


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed")
def test_documents_of_the_guides_are_read_by_kubectl() -> None:
    """Before 1.33 it takes text that begins with { for JSON. The pipeline tries the oldest."""
    guides = [app.PROJECT / "SETUP.md", *sorted((app.PROJECT / "docs").glob("*.md"))]
    text = "".join(guide.read_text("utf-8") for guide in guides)
    documents = re.findall(r"^kubectl apply .*<<'END'\n(.*?)^END$", text, re.MULTILINE | re.DOTALL)
    assert documents
    for document in documents:
        command = ["kubectl", "annotate", "--local", "--filename", "-", "--output", "name", "a=b"]
        done = subprocess.run(command, input=document, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done
