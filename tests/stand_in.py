"""What deploy.sh calls as `docker`, `kubectl`, `aws` and `curl`: `stand_in.py TOOL ARGUMENT...`.

The folder in STAND_IN holds `calls.jsonl` (arguments, standard input, the environment's names) and
`state.json`: what the registry, the cluster and AWS have, and how they are to behave. What kubectl
does without a cluster, the real one does.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(os.environ["STAND_IN"])
DEPLOYMENT = "Deployment/email-processor"
LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"


def docker(state: dict[str, Any], arguments: list[str]) -> str:
    match arguments:
        case ["info"]:
            if not state["engine"]:
                sys.exit("Cannot connect to the Docker daemon")
        case ["pull", *_, reference]:
            if reference not in state["pushed"]:
                sys.exit(f"Error response from daemon: manifest for {reference} not found")
        case ["build", *_]:
            if state["build_fails"]:
                sys.exit("ERROR: failed to solve: process did not complete successfully")
        case ["push", *_, reference]:
            state["pushed"].append(reference)
        case ["image", "inspect", *_, reference] if reference in state["pushed"]:
            repository = reference.rpartition(":")[0]
            return f"{repository}@sha256:{hashlib.sha256(reference.encode()).hexdigest()}\n"
    return ""


def aws(state: dict[str, Any], arguments: list[str], text: str) -> str:
    service, command, *options = arguments
    given = dict(zip(options[::2], options[1::2], strict=False))
    if f"{service} {command}" == state["refused_by_aws"]:
        sys.exit("An error occurred (AccessDenied)")
    match service, command:
        case "sts", _:
            return f"{state['account']}\tarn:aws:iam::{state['account']}:user/me\n"
        case "cloudformation", "describe-stacks":
            if state["stack"] is None:
                sys.exit("An error occurred (ValidationError): Stack does not exist")
            values = {**state["stack"], **state["outputs"]}
            lines = [state["stack_status"], *(f"{key}\t{value}" for key, value in values.items())]
            return "\n".join(lines)
        case "cloudformation", "deploy":
            overrides = options[options.index("--parameter-overrides") + 1 :]
            update = dict(override.split("=", 1) for override in overrides)
            state["stack"] = {**(state["stack"] or {}), **update}
            state["updates"].append(update)
        case "eks", "describe-cluster":
            if given["--name"] not in state["clusters"]:
                sys.exit("An error occurred (ResourceNotFoundException)")
            return f"{state['clusters'][given['--name']]}\thttps://oidc.example/id/1\n"
        case "eks", "update-kubeconfig":
            Path(given["--kubeconfig"]).write_text("apiVersion: v1\nkind: Config\n")
        case "iam", _:
            return str(state["providers"])
        case "ssm", "get-parameter":
            if given["--name"] not in state["parameters"]:
                sys.exit("An error occurred (ParameterNotFound)")
        case "ssm", "put-parameter":
            state["parameters"][given["--name"]] = text
        case "sqs", "get-queue-url":
            if given["--queue-name"] not in state["queues"]:
                sys.exit("An error occurred (AWS.SimpleQueueService.NonExistentQueue)")
        case "sqs", "get-queue-attributes":
            return str(state["redrive"])
        case "acm", _:
            return str(state["certificate"])
        case "ecr", "describe-images":
            return str(state["digest"])
        case "elbv2", "describe-load-balancers":
            return "arn:aws:elasticloadbalancing:loadbalancer/app/a/1\n"
        case "elbv2", "describe-target-groups":
            return "arn:aws:elasticloadbalancing:targetgroup/b/2\n"
    return ""


def kubectl(state: dict[str, Any], arguments: list[str], text: str) -> str:
    while arguments[0] in ("--kubeconfig", "--namespace"):
        arguments = arguments[2:]
    objects, output = state["objects"], arguments[-1]
    if state["unreadable"] in arguments:
        sys.exit("Error from server (Forbidden)")
    match arguments:
        case ["config", "view", *_]:
            return "apiVersion: v1\nkind: Config\n"
        case ["get", "ingressclass/alb", *_]:
            return "".join(map(what_runs, [*state["ingress_classes"], *objects.values()]))
        case ["get", "namespace", name, *_]:
            return f"namespace/{name}\n" if f"Namespace/{name}" in objects else ""
        case ["get", "ingress", _, *_]:
            return str(state["hostname"])
        case ["get", ("configmap/email-processor-config" | "deployment/email-processor"), *_]:
            kind, _, name = arguments[1].partition("/")
            found = objects.get(
                {"configmap": "ConfigMap", "deployment": "Deployment"}[kind] + "/" + name
            )
            if found is None:
                return ""
            return json.dumps(found) if output == "json" else str(found["spec"]["replicas"])
        case ["get", "hpa/email-processor-hpa", *_]:
            return str(
                objects["HorizontalPodAutoscaler/email-processor-hpa"]["spec"]["minReplicas"]
            )
        case ["get", "targetgroupbindings", *_]:
            return "targetgroupbinding.elbv2.k8s.aws/k8s-email\n"
        case ["get", ("pods" | "events") as kind, *_]:
            return f"{kind}: Back-off pulling image\n"
        case ["logs", *_]:
            return "AWS_REGION must be a region\n"
        case ["diff", *_]:
            if any(not is_applied(state, each) for each in documents(text)):
                sys.exit(1)
        case ["apply", "-f", "-"]:
            sys.stderr.write(state["warning"])
            manifests = documents(text)
            done = [apply(state, each) for each in manifests if each["kind"] != state["refused"]]
            if len(done) < len(manifests):
                save(state)
                sys.exit(f"Error from server (Invalid): {state['refused']} is invalid")
            return "".join(done)
        case ["replace", "--raw", path, "-f", "-"]:
            manifest = json.loads(text)
            name = manifest["metadata"]["name"]
            assert path.endswith(f"/email-processor/{manifest['kind'].lower()}s/{name}"), path
            assert "resourceVersion" not in manifest["metadata"], "it has changed since"
            store(state, manifest)
        case ["scale", _, "--replicas", number]:
            deployment = json.loads(json.dumps(objects[DEPLOYMENT]))
            deployment["spec"]["replicas"] = int(number)
            store(state, deployment)
        case ["rollout", "status", *_]:
            return roll_out(state)
        case ["delete", *_]:
            objects.clear()
        case _:
            sys.exit(f"unknown command {arguments}")
    return ""


def documents(text: str) -> list[dict[str, Any]]:
    import yaml  # here, as it would take longer than all else that a call does

    return list(yaml.safe_load_all(text))


def what_runs(found: dict[str, Any]) -> str:
    """As the template of deploy.sh prints it."""
    metadata, spec = found["metadata"], found.get("spec", {})
    values = [spec.get("controller"), found.get("data", {}).get("sqs_queue_url")]
    for annotation in ("eks.amazonaws.com/role-arn", "alb.ingress.kubernetes.io/certificate-arn"):
        values.append(metadata.get("annotations", {}).get(annotation))
    if found["kind"] == "Deployment":
        variables = spec["template"]["spec"]["containers"][0]["env"]
        values += [each["value"] for each in variables if each["name"] == "TOKEN_SSM_PARAMETER"]
    paused = "true" if spec.get("paused") else ""
    return f"running{found['kind']}\t{''.join(filter(None, values))}\npaused\t{paused}\n"


def identity(manifest: dict[str, Any]) -> str:
    return f"{manifest['kind']}/{manifest['metadata']['name']}"


def is_applied(state: dict[str, Any], manifest: dict[str, Any]) -> bool:
    live = state["objects"].get(identity(manifest), {"metadata": {}})
    return bool(live["metadata"].get("annotations", {}).get(LAST_APPLIED) == json.dumps(manifest))


def apply(state: dict[str, Any], manifest: dict[str, Any]) -> str:
    name, kind = identity(manifest), manifest["kind"]
    if namespace := manifest["metadata"].get("namespace"):
        assert f"Namespace/{namespace}" in state["objects"], f"{name} comes before its namespace"
    if is_applied(state, manifest):
        # As a real server does: its selector is always patched.
        return f"{name} {'configured' if kind == 'PodDisruptionBudget' else 'unchanged'}\n"
    before = state["objects"].get(name)
    after = json.loads(json.dumps(manifest))
    after["metadata"].setdefault("annotations", {})[LAST_APPLIED] = json.dumps(manifest)
    if kind == "Deployment":
        after["spec"]["replicas"] = before["spec"]["replicas"] if before else 1
        # kubectl takes away what it has applied, and nothing else.
        kept = (before or {}).get("spec", {})
        last = json.loads((before or after)["metadata"]["annotations"][LAST_APPLIED])["spec"]
        after["spec"] = {key: kept[key] for key in kept if key not in last} | after["spec"]
        if state["rollout_fails"]:
            state["broken"].append(after["spec"]["template"])
    store(state, after)
    return f"{name} {'configured' if before else 'created'}\n"


def store(state: dict[str, Any], after: dict[str, Any]) -> None:
    before = state["objects"].get(identity(after), {"spec": None, "metadata": {"generation": 0}})
    changed = after.get("spec") != before.get("spec")
    state["version"] += 1
    after["metadata"]["resourceVersion"] = str(state["version"])
    after["metadata"]["generation"] = before["metadata"].get("generation", 0) + changed
    if after["kind"] == "Deployment" and changed:
        after["status"] = {"conditions": [{"type": "Progressing", "reason": "ReplicaSetUpdated"}]}
    state["objects"][identity(after)] = after


def roll_out(state: dict[str, Any]) -> str:
    deployment = state["objects"][DEPLOYMENT]
    print("Waiting for deployment", flush=True)
    if state["blocks"]:
        (FOLDER / "go").read_text()  # a named pipe
    if state["interrupted"]:
        state["interrupted"] = False
        save(state)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.killpg(0, signal.SIGINT)  # as Ctrl-C does
    broken = deployment["spec"]["template"] in state["broken"]
    reason = "ProgressDeadlineExceeded" if broken else "NewReplicaSetAvailable"
    deployment["status"]["conditions"][0]["reason"] = reason
    if broken:
        save(state)
        sys.exit("error: deployment exceeded its progress deadline")
    return 'deployment "email-processor" successfully rolled out\n'


def save(state: dict[str, Any]) -> None:
    (FOLDER / "state.json").write_text(json.dumps(state))


def main() -> None:
    tool, *arguments = sys.argv[1:]
    if tool == "kubectl" and ("kustomize" in arguments or "--local" in arguments):
        os.execv(os.environ["REAL_KUBECTL"], ["kubectl", *arguments])
    reads = {"-f", "--password-stdin", "file:///dev/stdin"} & set(arguments)
    text = sys.stdin.read() if reads else ""
    with (FOLDER / "calls.jsonl").open("a") as calls:
        call = {"tool": tool, "arguments": arguments, "stdin": text, "names": [*os.environ]}
        calls.write(json.dumps(call) + "\n")
    state = json.loads((FOLDER / "state.json").read_text())
    if tool == "docker":
        sys.stdout.write(docker(state, arguments))
    elif tool == "kubectl":
        sys.stdout.write(kubectl(state, arguments, text))
    elif tool == "aws":
        sys.stdout.write(aws(state, arguments, text))
    elif state["curl_fails"]:
        sys.exit(28)
    save(state)


main()
