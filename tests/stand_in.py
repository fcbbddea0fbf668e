"""What deploy.sh calls as `docker`, `kubectl`, `aws` and `curl`: `stand_in.py TOOL ARGUMENT...`.

The folder in STAND_IN holds `calls.jsonl` (arguments, standard input, the environment's names) and
`state.json`: what the registry, the cluster and AWS have, and how they are to behave. What kubectl
does without a cluster, the real one does.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(os.environ["STAND_IN"])
DEPLOYMENT = "deployment/email-processor"
LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
Object = dict[str, Any]


def docker(state: Object, arguments: list[str]) -> str:
    match arguments:
        case ["info"] if not state["engine"]:
            sys.exit("Cannot connect to the Docker daemon")
        case ["build", *_] if state["build_fails"]:
            sys.exit("ERROR: failed to solve: process did not complete successfully")
        case ["pull", *_, reference]:
            if reference not in state["pushed"]:
                sys.exit(f"Error response from daemon: manifest for {reference} not found")
            digest = hashlib.sha256(reference.encode()).hexdigest()
            return f"Pulling from a registry\nDigest: sha256:{digest}\nStatus: up to date\n"
        case ["push", *_, reference]:
            state["pushed"].append(reference)
    return ""


def aws(state: Object, arguments: list[str], text: str) -> str:
    service, command, *options = arguments
    given = dict(zip(options[::2], options[1::2], strict=False))
    if f"{service} {command}" == state["refused_by_aws"]:
        sys.exit("An error occurred (AccessDenied)")
    match service, command:
        case "sts", _:
            return f"{state['account']}\n"
        case "cloudformation", "describe-stacks":
            if state["stack"] is None:
                sys.exit("An error occurred (ValidationError): Stack does not exist")
            return "".join(f"{key}\t{value}\n" for key, value in state["stack"].items())
        case "cloudformation", "deploy":
            overrides = options[options.index("--parameter-overrides") + 1 :]
            update = dict(override.split("=", 1) for override in overrides)
            state["stack"] = {"RoleArn": "made", **(state["stack"] or {}), **update}
            state["updates"].append(update)
        case "eks", "describe-cluster":
            if given["--name"] not in state["clusters"]:
                sys.exit("An error occurred (ResourceNotFoundException)")
            return "https://oidc.example/id/1\n"
        case "eks", "update-kubeconfig":
            Path(os.environ["KUBECONFIG"]).write_text("apiVersion: v1\nkind: Config\n")
        case "iam", _:
            assert "':oidc-provider/oidc.example/id/1'" in given["--query"]
            return str(state["provider"])
        case "ssm", "get-parameters":
            names = options[options.index("--names") + 1 : options.index("--query")]
            found = [name for name in names if name in state["parameters"]] or ["None"]
            return "\n".join([found[0], *sorted({*names} - {*found})])
        case "ssm", "put-parameter":
            state["parameters"][given["--name"]] = text
        case "sqs", "get-queue-attributes":
            if given["--queue-url"].rpartition("/")[2] not in state["queues"]:
                sys.exit("An error occurred (AWS.SimpleQueueService.NonExistentQueue)")
            return str(state["redrive"])
        case "acm", _:
            return str(state["certificate"])
        case "elbv2", "describe-load-balancers":
            return "arn:aws:elasticloadbalancing:loadbalancer/app/a/1\n"
        case "elbv2", "describe-target-groups":
            return "arn:aws:elasticloadbalancing:targetgroup/b/2\n"
    return ""


def kubectl(state: Object, arguments: list[str], text: str) -> str:
    while arguments[0] in ("--context", "--namespace"):
        arguments = arguments[2:]
    objects = state["objects"]
    if state["unreadable"] and state["unreadable"] in arguments:
        sys.exit("Error from server (Forbidden)")
    for word in {*state["down"]} & {*arguments}:
        state["down"][word] -= 1
        if state["down"][word] < 0:  # until somebody logs in again
            sys.exit("error: You must be logged in to the server (Unauthorized)")
        if not state["down"][word]:
            del state["down"][word]
        save(state)
        sys.exit("The connection to the server was refused - did you specify the right host?")
    match arguments:
        case ["get", *words, "--output", path] if path.startswith("jsonpath="):
            name = "/".join(word for word in words if not word.startswith("--"))
            name = name.replace("hpa/", "horizontalpodautoscaler/")
            paths = path.removeprefix("jsonpath=").split("}{")
            return "".join(field(objects[name], path) for path in paths) if name in objects else ""
        case ["get", "pods", *_, "--output", "name"]:
            return "".join(f"{name}\n" for name in objects if name.startswith("pod/"))
        case ["get", ("pods" | "events") as kind, *_]:
            return f"{kind}: Back-off pulling image\n"
        case ["describe", kind, name]:
            return f"events of {kind} {name}\n"
        case ["logs", name, *_]:
            assert name in objects, "a usage text"
            return "AWS_REGION must be a region\n"
        case ["diff", *_]:
            sys.exit(not all(is_applied(state, each) for each in documents(text)))
        case ["apply", "--server-side=false", "-f", "-"]:
            manifests = documents(text)
            done = [apply(state, each) for each in manifests if each["kind"] != state["refused"]]
            if len(done) < len(manifests):
                save(state)
                sys.exit(f"Error from server (Invalid): {state['refused']} is invalid")
            return "".join(done)
        case ["patch", name, "--type", "json", "--patch", patch]:
            after = patched(objects[name], documents(patch)[0])
            version = after["metadata"].get("resourceVersion")
            assert version in (None, objects[name]["metadata"]["resourceVersion"]), "a conflict"
            store(state, after)
        case ["scale", _, "--replicas", number]:
            operation = {"op": "replace", "path": "/spec/replicas", "value": int(number)}
            store(state, patched(objects[DEPLOYMENT], [operation]))
        case ["annotate", *_, change]:
            annotations = objects[DEPLOYMENT]["metadata"]["annotations"]
            if change.endswith("-"):
                annotations.pop(change[:-1], None)
            else:
                annotations.update([change.split("=")])
        case ["rollout", "restart", _]:
            again = json.loads(json.dumps(objects[DEPLOYMENT]))
            again["spec"]["template"]["metadata"]["annotations"]["restartedAt"] = "now"
            store(state, again)
        case ["rollout", "status", *_]:
            return roll_out(state)
        case ["delete", kind, name, *options]:
            asks = state["kuberc"] and os.environ.get("KUBERC") != "off"
            if kind in state["stuck"]:
                sys.exit(f"error: timed out waiting for the condition on {kind}s/{name}")
            if not asks and "--interactive=false" in options and not state["kept"]:
                objects.pop(f"{kind}/{name}", None)
        case _:
            sys.exit(f"unknown command {arguments}")
    return ""


def documents(text: str) -> list[Any]:
    import yaml  # here, as it would take longer than all else that a call does

    return list(yaml.safe_load_all(text))


def field(value: Any, path: str) -> str:
    """What a jsonpath such as {.a.b\\.c[0].d[?(@.name=="x")].e} finds."""
    pattern = r'\.((?:\\.|[^.[\\])+)|\[(\d+)\]|\[\?\(@\.(\w+)=="(\w+)"\)\]'
    for name, index, key, wanted in re.findall(pattern, path.strip("{}")):
        if wanted:
            value = next((each for each in value if each[key] == wanted), {})
        else:
            key = int(index) if index else name.replace("\\", "")
            value = value[key] if index and value else value.get(key, {})
    if isinstance(value, str):
        return value
    return "" if value == {} else json.dumps(value, separators=(",", ":"))


def patched(found: Object, operations: list[Any]) -> Object:
    found = json.loads(json.dumps(found))
    for operation in operations:
        *parents, last = operation["path"].split("/")[1:]
        parent = found[parents[0]] if parents else found
        assert last in parent
        if operation["op"] == "remove":
            del parent[last]
        else:
            parent[last] = operation["value"]
    return found


def identity(manifest: Object) -> str:
    return f"{manifest['kind'].lower()}/{manifest['metadata']['name']}"


def is_applied(state: Object, manifest: Object) -> bool:
    live = state["objects"].get(identity(manifest), {"metadata": {}})
    return bool(live["metadata"].get("annotations", {}).get(LAST_APPLIED) == json.dumps(manifest))


def apply(state: Object, manifest: Object) -> str:
    name = identity(manifest)
    if namespace := manifest["metadata"].get("namespace"):
        assert f"namespace/{namespace}" in state["objects"], f"{name} comes before its namespace"
    if is_applied(state, manifest):
        # As a real server does: its selector is always patched.
        return f"{name} {'configured' if 'poddisruption' in name else 'unchanged'}\n"
    before = state["objects"].get(name)
    after = json.loads(json.dumps(manifest))
    after["metadata"].setdefault("annotations", {})[LAST_APPLIED] = json.dumps(manifest)
    if name == DEPLOYMENT:
        after["spec"]["replicas"] = before["spec"]["replicas"] if before else 1
        # kubectl takes away what it has applied, and nothing else.
        kept = before or after
        last = json.loads(kept["metadata"]["annotations"][LAST_APPLIED])
        keep(kept["spec"], last["spec"], after["spec"])
        notes = [each["metadata"]["annotations"] for each in (kept, last, after)]
        keep(*notes)
        if state["rollout_fails"]:
            state["broken"].append(after["spec"]["template"])
    if state["hostname"] and manifest["kind"] == "Ingress":
        after["status"] = {"loadBalancer": {"ingress": [{"hostname": state["hostname"]}]}}
    store(state, after)
    return f"{name} {'configured' if before else 'created'}\n"


def keep(before: Object, last: Object, after: Object) -> None:
    """Add to an object the fields of the live one that were not applied."""
    for key in before.keys() - last.keys() - after.keys():
        after[key] = before[key]


def store(state: Object, after: Object) -> None:
    before = state["objects"].get(identity(after), {})
    state["version"] += 1
    after["metadata"]["resourceVersion"] = str(state["version"])
    if identity(after) == DEPLOYMENT and after["spec"] != before.get("spec"):
        after["status"] = {"conditions": [{"type": "Progressing", "reason": "ReplicaSetUpdated"}]}
    state["objects"][identity(after)] = after


def roll_out(state: Object) -> str:
    deployment = state["objects"][DEPLOYMENT]
    print("Waiting for deployment\n" * 3, end="", flush=True)
    if state["blocks"]:
        (FOLDER / "go").read_text()  # a named pipe
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    container["image"] = state["meanwhile"] or container["image"]  # as another run does
    if state["added"]:
        state["stack"]["QueueArns"] += state["added"]
    deployment["spec"]["replicas"] += state["more"]  # as the autoscaler does
    state["more"] = 0
    broken = deployment["spec"]["template"] in state["broken"]
    broken |= deployment["status"]["conditions"][0]["reason"] == "ProgressDeadlineExceeded"
    reason = "ProgressDeadlineExceeded" if broken else "NewReplicaSetAvailable"
    deployment["status"]["conditions"][0]["reason"] = reason
    if broken:
        if state["pod"]:
            state["objects"]["pod/new"] = {"status": state["pod"]}
        save(state)
        sys.exit("error: deployment exceeded its progress deadline")
    return 'deployment "email-processor" successfully rolled out\n'


def save(state: Object) -> None:
    (FOLDER / "state.json").write_text(json.dumps(state))


def main() -> None:
    tool, *arguments = sys.argv[1:]
    if tool == "kubectl" and arguments[0] == "kustomize":
        os.execv(os.environ["REAL_KUBECTL"], ["kubectl", *arguments])
    reads = {"-f", "--password-stdin", "file:///dev/stdin"} & set(arguments)
    text = sys.stdin.read() if reads else ""
    with (FOLDER / "calls.jsonl").open("a") as calls:
        call = {"tool": tool, "arguments": arguments, "stdin": text, "names": [*os.environ]}
        calls.write(json.dumps(call) + "\n")
    state = json.loads((FOLDER / "state.json").read_text())
    if state["interrupted"] and state["interrupted"] in arguments:
        state["interrupted"] = ""
        save(state)
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.killpg(0, signal.SIGINT)  # as Ctrl-C does
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
