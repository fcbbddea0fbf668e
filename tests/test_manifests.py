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
LABELS = {"app.kubernetes.io/name": NAME}
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


def attributes(name: str) -> dict[str, str]:
    return dict(pair.split("=") for pair in annotation(name).split(","))


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


# --- Schemas and names ----------------------------------------------------------------------------


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_manifests_are_valid_in_kubernetes(version: str) -> None:
    for document in MANIFESTS.values():
        kubernetes_validate.validate(document, version, strict=True)


def test_names_are_those_of_deploy_sh_and_runbook() -> None:
    ends = {"ConfigMap": "-config", "HorizontalPodAutoscaler": "-hpa", "Ingress": "-ingress"}
    ends |= {"Role": "-role", "RoleBinding": "-role", "ServiceAccount": "-sa"}
    for (kind, name), document in MANIFESTS.items():
        assert name == NAME + ends.get(kind, "")
        assert document["metadata"].get("namespace") == (None if kind == "Namespace" else NAME)
    target = {"apiVersion": DEPLOYMENT["apiVersion"], "kind": "Deployment", "name": NAME}
    assert HPA["spec"]["scaleTargetRef"] == target


# --- Rollout and permissions ----------------------------------------------------------------------


def test_rollout_and_drain_leave_enough_pods() -> None:
    assert "replicas" not in DEPLOYMENT["spec"], "the HPA owns it"
    assert DEPLOYMENT["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    assert PDB["spec"]["maxUnavailable"] < HPA["spec"]["minReplicas"]
    spread = POD["topologySpreadConstraints"]
    assert {constraint["whenUnsatisfiable"] for constraint in spread} == {"ScheduleAnyway"}


def test_new_pods_wait_for_the_load_balancer() -> None:
    labels = MANIFESTS["Namespace", NAME]["metadata"]["labels"]
    for controller in ("elbv2.k8s.aws", "eks.amazonaws.com"):
        assert labels[f"{controller}/pod-readiness-gate-inject"] == "enabled"
    assert annotation("target-type") == "ip", "only pods that are targets have the gate"


def test_autoscaler_lists_memory_first_as_kubernetes_does() -> None:
    metrics = [metric["resource"] for metric in HPA["spec"]["metrics"]]
    # In any other order, every apply is a change.
    assert [metric["name"] for metric in metrics] == ["memory", "cpu"]
    assert CONTAINER["resources"]["requests"].keys() == {"memory", "cpu"}, "shares of these"


def test_container_has_no_more_rights_than_it_needs() -> None:
    """Pod Security's "restricted" permits these two."""
    assert CONTAINER["securityContext"]["readOnlyRootFilesystem"] is True
    assert POD["automountServiceAccountToken"] is False
    assert "rules" not in MANIFESTS["Role", f"{NAME}-role"]
    labels = MANIFESTS["Namespace", NAME]["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    assert labels["pod-security.kubernetes.io/enforce-version"] == f"v{OLDEST}"


def test_network_allows_only_dns_traces_https_and_pod_identity() -> None:
    assert NETWORK["policyTypes"] == ["Ingress", "Egress"]
    *anywhere, agent = NETWORK["egress"]
    assert [set(find(rule, "port")) for rule in anywhere] == [{53}, {4318}, {443}]
    assert set(find(agent, "cidr")) == {"169.254.170.23/32", "fd00:ec2::23/128"}
    assert list(find(agent, "port")) == [80]


def test_home_is_the_writable_volume() -> None:
    (mount,) = CONTAINER["volumeMounts"]
    (volume,) = POD["volumes"]
    assert mount["name"] == volume["name"]
    assert volume["emptyDir"]["medium"] == "Memory"
    assert {"name": "HOME", "value": mount["mountPath"]} in CONTAINER["env"]


# --- Timeouts -------------------------------------------------------------------------------------


def test_probes_ask_the_right_question_in_time() -> None:
    """/ready only for the start: after that, an AWS outage must not stop the pods."""
    startup, liveness, readiness = (
        CONTAINER[f"{name}Probe"] for name in ("startup", "liveness", "readiness")
    )
    assert startup["httpGet"]["path"] == "/ready"
    assert startup["periodSeconds"] * startup["failureThreshold"] == 30
    paths = [probe["httpGet"]["path"] for probe in (liveness, readiness)]
    assert [*paths, annotation("healthcheck-path")] == ["/health"] * 3
    for probe in (startup, liveness, readiness):
        assert probe["timeoutSeconds"] <= probe["periodSeconds"]
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
    delay = attributes("target-group-attributes")["deregistration_delay.timeout_seconds"]
    assert int(delay) == sleep, "while the load balancer may send to it"
    assert POD["terminationGracePeriodSeconds"] > sleep + gunicorn_setting("graceful_timeout")


def test_gunicorn_keeps_connections_longer_than_the_alb() -> None:
    load_balancer = attributes("load-balancer-attributes")
    assert int(load_balancer["idle_timeout.timeout_seconds"]) < gunicorn_setting("keepalive")
    assert load_balancer["routing.http.drop_invalid_header_fields.enabled"] == "true"


# --- Ports, labels and settings -------------------------------------------------------------------


def test_every_selector_finds_the_pods() -> None:
    spread = [part["labelSelector"]["matchLabels"] for part in POD["topologySpreadConstraints"]]
    others = [each["spec"]["selector"]["matchLabels"] for each in (DEPLOYMENT, PDB)]
    network = NETWORK["podSelector"]["matchLabels"]
    for selector in (SERVICE["spec"]["selector"], network, *others, *spread):
        assert selector == LABELS
    assert DEPLOYMENT["spec"]["template"]["metadata"]["labels"].items() >= LABELS.items()


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
    assert (settings.sqs_queue_url, settings.aws_region) == tuple(
        CONFIG[key] for key in ("sqs_queue_url", "aws_region")
    )
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


def test_ingress_routes_every_public_path_and_no_private_one() -> None:
    assert app_paths() >= PRIVATE
    assert {path for path in app_paths() if not is_routed(path)} == PRIVATE
    assert {route["path"] for route in routes()} <= app_paths()


def test_other_paths_get_the_404_of_the_service() -> None:
    backend = INGRESS["spec"]["defaultBackend"]["service"]
    assert backend["port"] == {"name": "use-annotation"}
    response = json.loads(annotation(f"actions.{backend['name']}"))["fixedResponseConfig"]
    status, message = app.ERRORS["not_found"]
    assert (response["statusCode"], response["contentType"]) == (str(status), "application/json")
    body = {"status": "error", "error": "not_found", "message": message}
    assert json.loads(response["messageBody"]) == body


def test_no_manifest_names_an_account_or_a_registry() -> None:
    for file in [*(app.PROJECT / "k8s").iterdir(), *(app.PROJECT / "infra").iterdir()]:
        assert not re.search(r"\b\d{12}\b|\.dkr\.ecr\.", file.read_text("utf-8")), file.name


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
