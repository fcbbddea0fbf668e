"""The manifests: their schemas, and names, ports and timeouts that have to fit each other.

Without a cluster: kubernetes-validate has the schemas of Kubernetes. The pipeline's cluster checks
the Pod Security Standard "restricted", and that a second apply changes nothing.
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
PRIVATE = {"/metrics", "/ready"}  # only for the cluster


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


def annotation(name: str) -> str:
    return str(INGRESS["metadata"]["annotations"][f"{ALB}/{name}"])


def attribute(kind: str, name: str) -> str:
    return dict(pair.split("=") for pair in annotation(f"{kind}-attributes").split(","))[name]


def gunicorn_setting(name: str) -> Any:
    """A constant of gunicorn.conf.py, which cannot be imported without an environment."""
    for statement in ast.parse((app.PROJECT / "gunicorn.conf.py").read_text("utf-8")).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == name:
            return ast.literal_eval(statement.value)
    raise AssertionError(name)


def find(value: Any, key: str) -> Iterator[Any]:
    """Every value of the key, at any depth."""
    if isinstance(value, dict):
        yield from (found for name, found in value.items() if name == key)
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from find(part, key)


# --- Schemas, rollout and permissions -------------------------------------------------------------


def test_manifests_are_valid_in_every_supported_kubernetes() -> None:
    for version in (OLDEST, NEWEST):
        for document in MANIFESTS.values():
            kubernetes_validate.validate(document, version, strict=True)


def test_rollout_and_drain_leave_enough_pods() -> None:
    assert "replicas" not in DEPLOYMENT["spec"], "the HPA owns it"
    assert DEPLOYMENT["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    assert PDB["spec"]["maxUnavailable"] < HPA["spec"]["minReplicas"]


def test_new_pods_wait_for_the_load_balancer() -> None:
    labels = MANIFESTS["Namespace", NAME]["metadata"]["labels"]
    for controller in ("elbv2.k8s.aws", "eks.amazonaws.com"):
        assert labels[f"{controller}/pod-readiness-gate-inject"] == "enabled"
    assert annotation("target-type") == "ip", "only pods that are targets have the gate"


def test_autoscaler_lists_memory_first_as_kubernetes_does() -> None:
    metrics = [metric["resource"]["name"] for metric in HPA["spec"]["metrics"]]
    assert metrics == ["memory", "cpu"], "in any other order, every apply is a change"


def test_container_has_no_more_permissions_than_it_needs() -> None:
    """Pod Security's "restricted" permits the first three, and demands the others."""
    assert CONTAINER["securityContext"]["readOnlyRootFilesystem"] is True
    assert POD["automountServiceAccountToken"] is False
    assert "rules" not in MANIFESTS["Role", f"{NAME}-role"]
    assert CONTAINER["securityContext"]["allowPrivilegeEscalation"] is False
    assert CONTAINER["securityContext"]["capabilities"]["drop"] == ["ALL"]
    assert POD["securityContext"]["runAsNonRoot"] is True
    labels = MANIFESTS["Namespace", NAME]["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    assert labels["pod-security.kubernetes.io/enforce-version"] == f"v{OLDEST}"


def test_network_allows_only_dns_traces_https_and_pod_identity() -> None:
    assert NETWORK["policyTypes"] == ["Ingress", "Egress"]
    *anywhere, agent = NETWORK["egress"]
    assert [set(find(rule, "port")) for rule in anywhere] == [{53}, {4318}, {443}]
    assert set(find(agent, "cidr")) == {"169.254.170.23/32", "fd00:ec2::23/128"}
    assert list(find(agent, "port")) == [80]


# --- Timeouts -------------------------------------------------------------------------------------


def test_only_the_start_waits_for_aws() -> None:
    """Once a pod is ready, an AWS outage must not stop it."""
    probes = ("startup", "liveness", "readiness")
    paths = {name: CONTAINER[f"{name}Probe"]["httpGet"]["path"] for name in probes}
    assert paths == {"startup": "/ready", "liveness": "/health", "readiness": "/health"}
    assert annotation("healthcheck-path") == "/health"
    startup = CONTAINER["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] == 30
    timeout = int(annotation("healthcheck-timeout-seconds"))
    assert timeout < int(annotation("healthcheck-interval-seconds")), "or the ALB rejects it"


def test_rollout_waits_for_pull_start_and_health_checks() -> None:
    """A pod is ready only after the load balancer has found it healthy: its readiness gate."""
    pull, start = 60, 30
    checks = int(annotation("healthcheck-interval-seconds"))
    checks *= int(annotation("healthy-threshold-count"))
    assert DEPLOYMENT["spec"]["progressDeadlineSeconds"] > pull + start + checks


def test_pod_outlasts_load_balancer_and_gunicorn() -> None:
    sleep = CONTAINER["lifecycle"]["preStop"]["sleep"]["seconds"]
    delay = attribute("target-group", "deregistration_delay.timeout_seconds")
    assert int(delay) == sleep, "while the load balancer may send to it"
    assert POD["terminationGracePeriodSeconds"] > sleep + gunicorn_setting("graceful_timeout")


def test_gunicorn_keeps_connections_longer_than_the_alb() -> None:
    idle = attribute("load-balancer", "idle_timeout.timeout_seconds")
    assert int(idle) < gunicorn_setting("keepalive")


# --- Names, ports and settings --------------------------------------------------------------------


def test_names_lead_to_the_pods() -> None:
    selectors = [*find([*MANIFESTS.values()], "matchLabels"), SERVICE["spec"]["selector"]]
    assert len(selectors) == 6
    for selector in selectors:
        assert selector == {"app.kubernetes.io/name": NAME}
        assert DEPLOYMENT["spec"]["template"]["metadata"]["labels"].items() >= selector.items()
    target = {"apiVersion": DEPLOYMENT["apiVersion"], "kind": "Deployment", "name": NAME}
    assert HPA["spec"]["scaleTargetRef"] == target
    assert POD["serviceAccountName"] == SERVICE_ACCOUNT["metadata"]["name"]
    namespaces = {document["metadata"].get("namespace") for document in MANIFESTS.values()}
    assert namespaces == {NAME, None}, "None: the Namespace itself"


def test_requests_reach_the_port_that_the_application_opens() -> None:
    (container_port,) = CONTAINER["ports"]
    (service_port,) = SERVICE["spec"]["ports"]
    (allowed,) = find(NETWORK["ingress"], "port")
    assert container_port["containerPort"] == SETTINGS["port"] == allowed
    assert service_port["targetPort"] == container_port["name"] == "http"
    for backend in find(INGRESS["spec"]["rules"], "service"):
        assert backend == {"name": NAME, "port": {"name": service_port["name"]}}


def test_application_accepts_its_environment() -> None:
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
    (mount,) = CONTAINER["volumeMounts"]
    assert environ["HOME"] == mount["mountPath"], "the only writable folder"


def test_ingress_routes_every_public_path_and_no_private_one() -> None:
    settings = app.Settings(sqs_queue_url=CONFIG["sqs_queue_url"])
    rules = app.create_app(settings, ssm=object(), sqs=object()).url_map.iter_rules()
    served = {re.sub("<.*>", "something", rule.rule) for rule in rules}
    (rule,) = INGRESS["spec"]["rules"]
    routed = {route["path"]: route["pathType"] == "Prefix" for route in rule["http"]["paths"]}
    private = {
        path
        for path in served
        if path not in routed
        and not any(path.startswith(f"{start}/") for start in routed if routed[start])
    }
    assert private == PRIVATE
    assert routed.keys() <= served


def test_other_paths_get_the_404_of_the_service() -> None:
    backend = INGRESS["spec"]["defaultBackend"]["service"]
    assert backend["port"] == {"name": "use-annotation"}
    response = json.loads(annotation(f"actions.{backend['name']}"))["fixedResponseConfig"]
    status, message = app.ERRORS["not_found"]
    assert (response["statusCode"], response["contentType"]) == (str(status), "application/json")
    body = {"status": "error", "error": "not_found", "message": message}
    assert json.loads(response["messageBody"]) == body


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed")
def test_kubectl_reads_the_documents_of_the_guides() -> None:
    """Before 1.33, kubectl reads text that begins with { as JSON. The pipeline tries the oldest."""
    guides = [app.PROJECT / "SETUP.md", *sorted((app.PROJECT / "docs").glob("*.md"))]
    text = "".join(guide.read_text("utf-8") for guide in guides)
    documents = re.findall(r"^kubectl apply .*<<'END'\n(.*?)^END$", text, re.MULTILINE | re.DOTALL)
    assert documents
    for document in documents:
        command = ["kubectl", "annotate", "--local", "--filename", "-", "--output", "name", "a=b"]
        done = subprocess.run(command, input=document, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done
