"""Stand-ins of `docker`, `kubectl`, `aws` and `curl` for deploy.sh: `stand_in.py TOOL ARGUMENT...`.

The folder in STAND_IN holds `calls.jsonl` (arguments, standard input, the environment's names) and
`state.json`: the contents of registry, cluster and AWS, and the faults to simulate. `kubectl
kustomize` runs the real one. `kubectl apply` replaces objects: the pipeline's cluster merges.
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
        case ["buildx", "imagetools", "inspect", "--format", template, reference]:
            if reference not in state["pushed"]:
                sys.exit(f"ERROR: {reference}: not found")
            digest = f"sha256:{hashlib.sha256(reference.encode()).hexdigest()}"
            # buildx ignores other templates that begin with {{.Manifest (docker/buildx issue 1175).
            return digest if template.startswith("{{print") else f"Name: x\nDigest: {digest}\n"
        case ["push", *_, reference]:
            state["pushed"].append(reference)
    return ""


def aws(state: Object, arguments: list[str], text: str) -> str:
    service, command, *options = arguments
    given = dict(zip(options[::2], options[1::2], strict=False))
    fixed = str(state["aws"].get(f"{service} {command}", ""))
    if fixed.startswith("An error occurred"):
        sys.exit(fixed)
    match service, command:
        case "cloudformation", "describe-stacks":
            if state["stack"] is None:
                sys.exit("An error occurred (ValidationError): Stack does not exist")
            return "".join(f"{key}\t{value}\n" for key, value in state["stack"].items())
        case "cloudformation", "deploy":
            overrides = options[options.index("--parameter-overrides") + 1 :]
            update = dict(override.split("=", 1) for override in overrides)
            state["stack"] = {"RoleArn": "made", **(state["stack"] or {}), **update}
            state["updates"].append(update)
        case "eks", "update-kubeconfig":
            Path(os.environ["KUBECONFIG"]).write_text("apiVersion: v1\nkind: Config\n")
        case "ssm", "get-parameters":
            names = options[options.index("--names") + 1 : options.index("--query")]
            found = [name for name in names if name in state["parameters"]] or ["None"]
            return "\n".join([found[0], *sorted({*names} - {*found})])
        case "ssm", "put-parameter":
            state["parameters"][given["--name"]] = text
    return fixed


def kubectl(state: Object, arguments: list[str], text: str) -> str:
    objects = state["objects"]
    match arguments:
        case ["get", *words, "--output", path] if path.startswith("jsonpath="):
            name = "/".join(word for word in words if not word.startswith("--"))
            name = name.replace("hpa/", "horizontalpodautoscaler/")
            paths = path.removeprefix("jsonpath=").split("}{")
            return "".join(field(objects[name], path) for path in paths) if name in objects else ""
        case ["get", "pods", *_, "--output", "name"]:
            return "".join(f"{name}\n" for name in objects if name.startswith("pod/"))
        case ["get" | "describe" | "logs" as verb, *words]:
            return f"{verb} {words[0]}: the reason\n"
        case ["diff", *_]:
            sys.exit(not all(is_applied(objects, manifest) for manifest in documents(text)))
        case ["apply", "--server-side=false", "-f", "-"]:
            for manifest in documents(text):
                if manifest["kind"] != state["invalid"]:
                    apply(state, manifest)
            if state["invalid"]:
                save(state)
                sys.exit(f"Error from server (Invalid): {state['invalid']} is invalid")
        case ["patch", name, "--type", "json", "--patch", patch]:
            patched = json.loads(json.dumps(objects[name]))
            for operation in documents(patch)[0]:
                *parents, last = operation["path"].split("/")[1:]
                parent = patched[parents[0]] if parents else patched
                parent.pop(last, None)
                if operation["op"] == "replace":
                    parent[last] = operation["value"]
            store(objects, patched)
        case ["scale", _, "--replicas", number]:
            objects[DEPLOYMENT]["spec"]["replicas"] = int(number)
        case ["annotate", *_, change]:
            annotations = objects[DEPLOYMENT]["metadata"]["annotations"]
            if change.endswith("-"):
                annotations.pop(change[:-1], None)
            else:
                annotations.update([change.split("=")])
        case ["rollout", "restart", _]:
            template = objects[DEPLOYMENT]["spec"]["template"]
            template["metadata"]["annotations"]["restartedAt"] = "now"
            set_progress(objects[DEPLOYMENT], "ReplicaSetUpdated")
        case ["rollout", "status", *_]:
            return roll_out(state)
        case ["delete", kind, name, *options]:
            # As with interactive=true in the operator's kuberc: otherwise kubectl waits for a yes.
            if "--interactive=false" in options and os.environ.get("KUBERC") == "off":
                objects.pop(f"{kind}/{name}", None)
        case _:
            sys.exit(f"unknown command {arguments}")
    return ""


def documents(text: str) -> list[Any]:
    import yaml  # here, because it takes longer than the rest of a call

    return list(yaml.safe_load_all(text))


def field(value: Any, path: str) -> str:
    """The value at a jsonpath such as {.a.b\\.c[0].d[?(@.name=="x")].e}."""
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


def is_applied(objects: Object, manifest: Object) -> bool:
    live = objects.get(identity(manifest), {"metadata": {}})
    return bool(live["metadata"].get("annotations", {}).get(LAST_APPLIED) == json.dumps(manifest))


def identity(manifest: Object) -> str:
    return f"{manifest['kind'].lower()}/{manifest['metadata']['name']}"


def apply(state: Object, manifest: Object) -> None:
    objects, name = state["objects"], identity(manifest)
    if is_applied(objects, manifest):
        return
    after = json.loads(json.dumps(manifest))
    annotations = after["metadata"].setdefault("annotations", {})
    annotations[LAST_APPLIED] = json.dumps(manifest)
    if name == DEPLOYMENT:
        live = objects.get(name, {"spec": {"replicas": 1}, "status": {}})
        after["spec"]["replicas"], after["status"] = live["spec"]["replicas"], live["status"]
        if unfinished := field(live, "{.metadata.annotations.unfinished}"):
            annotations["unfinished"] = unfinished
    if state["hostname"] and manifest["kind"] == "Ingress":
        after["status"] = {"loadBalancer": {"ingress": [{"hostname": state["hostname"]}]}}
    store(objects, after)


def store(objects: Object, after: Object) -> None:
    name = identity(after)
    if name == DEPLOYMENT and after["spec"] != objects.get(name, {}).get("spec"):
        set_progress(after, "ReplicaSetUpdated")
    objects[name] = after


def set_progress(deployment: Object, reason: str) -> None:
    deployment["status"] = {"conditions": [{"type": "Progressing", "reason": reason}]}


def roll_out(state: Object) -> str:
    deployment = state["objects"][DEPLOYMENT]
    print("Waiting for deployment\n" * 3, end="", flush=True)
    if (FOLDER / "go").exists():
        (FOLDER / "go").read_text()  # a named pipe: the rollout ends when the test says so
    late = deployment["status"]["conditions"][0]["reason"] == "ProgressDeadlineExceeded"
    if state["late_rollouts"]:
        late = True
        state["late_rollouts"] -= 1
    set_progress(deployment, "ProgressDeadlineExceeded" if late else "NewReplicaSetAvailable")
    if late:
        save(state)
        sys.exit("error: deployment exceeded its progress deadline")
    return 'deployment "email-processor" successfully rolled out\n'


def fail_or_interrupt(state: Object, words: list[str]) -> None:
    """A call with a word of state["down"] fails that many times, or each time if that is 0."""
    for word in {*state["down"]} & {*words}:
        if not state["down"][word]:
            sys.exit("error: You must be logged in to the server (Unauthorized)")
        state["down"][word] -= 1
        if not state["down"][word]:
            del state["down"][word]
        save(state)
        sys.exit("The connection to the server was refused - did you specify the right host?")
    if state["interrupted"] and state["interrupted"] in words:
        state["interrupted"] = ""
        save(state)
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.killpg(0, signal.SIGINT)  # as Ctrl-C does


def merge(into: Object, changes: Object) -> None:
    for name, value in changes.items():
        if isinstance(value, dict) and value:
            merge(into.setdefault(name, {}), value)
        else:
            into[name] = value


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
    while arguments[0] in ("--context", "--namespace"):
        arguments = arguments[2:]
    state = json.loads((FOLDER / "state.json").read_text())
    fail_or_interrupt(state, [tool, *arguments])
    for word in {*state["meanwhile"]} & {tool, *arguments}:
        merge(state, state["meanwhile"].pop(word))
    if tool == "docker":
        sys.stdout.write(docker(state, arguments))
    elif tool == "kubectl":
        sys.stdout.write(kubectl(state, arguments, text))
    elif tool == "aws":
        sys.stdout.write(aws(state, arguments, text))
    save(state)


main()
