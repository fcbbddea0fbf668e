"""What deploy.sh calls as `docker`, `kubectl` and `sleep`: `stand_in.py TOOL ARGUMENT...`.

It records every call and keeps state.

The folder in STAND_IN holds `calls.jsonl` (arguments, standard input, the environment's names) and
`state.json`: what the registry and the cluster have, and how they are to behave.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(os.environ["STAND_IN"])
CLUSTER_SCOPED = ("Namespace",)


def docker(state: dict[str, Any], arguments: list[str]) -> str:
    match arguments:
        case ["info"] | ["login", *_]:
            return ""
        case ["buildx", "version"]:
            if not state["buildx"]:
                sys.exit("docker: 'buildx' is not a docker command.")
        case ["pull", *_, reference]:
            if reference not in state["pushed"]:
                sys.exit(f"Error response from daemon: manifest for {reference} not found")
        case ["build", *_]:
            if state["build_fails"]:
                sys.exit("ERROR: failed to solve: process did not complete successfully")
            state["built"].append(arguments[arguments.index("--tag") + 1])
        case ["push", *_, reference]:
            assert reference in state["built"], reference
            state["pushed"].append(reference)
        case ["image", "inspect", *_, reference]:
            if reference not in state["pushed"]:
                return ""
            repository = reference.rpartition(":")[0]
            return f"{repository}@sha256:{hashlib.sha256(reference.encode()).hexdigest()}\n"
        case _:
            sys.exit(f"unknown command {arguments}")
    return ""


def kubectl(state: dict[str, Any], arguments: list[str], text: str) -> str:
    while arguments and arguments[0] in ("--kubeconfig", "--namespace"):
        arguments = arguments[2:]
    objects, output = state["objects"], arguments[-1]
    deployment = objects.get("deployment.apps/email-processor", {})
    if arguments[:2] == ["get", state["unreadable"]]:
        sys.exit("Error from server (Forbidden)")
    match arguments:
        case ["config", "view", *_]:
            return "apiVersion: v1\nkind: Config\n"
        case ["get", "deployments.apps,ingressclasses.networking.k8s.io", *_]:
            paused = "email-processor/email-processor true\n" if state["paused"] else ""
            return "".join(f"/{name}\n" for name in state["ingress_classes"]) + paused
        case ["get", "ingress", _, *_] if "certificate-arn" in output:
            ingress = objects.get("ingress.networking.k8s.io/email-processor-ingress", {})
            annotations = ingress.get("metadata", {}).get("annotations", {})
            return str(annotations.get("alb.ingress.kubernetes.io/certificate-arn", ""))
        case ["get", "serviceaccount", name, "--ignore-not-found", *_]:
            account = objects.get(f"serviceaccount/{name}", {})
            annotations = account.get("metadata", {}).get("annotations", {})
            return str(annotations.get("eks.amazonaws.com/role-arn", ""))
        case ["get", "namespace", name, "--ignore-not-found", *_]:
            return f"namespace/{name}\n" if f"namespace/{name}" in objects else ""
        case ["get", "ingress", _, *_] if "hostname" in output:
            return str(state["hostname"])
        case ["get", "deployment", _, *_]:
            return str(len(state["revisions"]) or "")
        case ["get", "targetgroupbindings", *_]:
            return "targetgroupbinding.elbv2.k8s.aws/k8s-email\n"
        case ["get", ("pods" | "events") as kind, *_]:
            return f"{kind}: Back-off pulling image\n"
        case ["logs", *_]:
            return "AWS_REGION must be a region\n"
        case ["apply", "view-last-applied", kind, name, *_]:
            identity = f"{kind.replace('deployment', 'deployment.apps')}/{name}"
            if identity not in state["last_applied"]:
                sys.exit(f'error: no last-applied configuration of "{name}"')
            return json.dumps(state["last_applied"][identity])
        case ["apply", "set-last-applied", "-f", "-"]:
            manifest = json.loads(text)
            state["last_applied"][identity_of(manifest)] = manifest
        case ["apply", "-f", "-"]:
            import yaml  # here, as it would take longer than all else that a call does

            sys.stderr.write(state["warning"])
            manifests = list(yaml.safe_load_all(text))
            printed = "".join(
                apply(state, each) for each in manifests if each["kind"] != state["refused"]
            )
            if state["refused"] in [manifest["kind"] for manifest in manifests]:
                save(state)
                sys.exit(f"Error from server (Invalid): {state['refused']} is invalid")
            return printed
        case ["rollout", "status", *_]:
            if deployment.get("spec") in state["broken"]:
                sys.exit("error: deployment exceeded its progress deadline")
            return 'deployment "email-processor" successfully rolled out\n'
        case ["rollout", "undo", _, "--to-revision", number]:
            objects["deployment.apps/email-processor"] = state["revisions"][int(number) - 1]
        case ["delete", *_]:
            objects.clear()
            state["last_applied"].clear()
        case _:
            sys.exit(f"unknown command {arguments}")
    return ""


def identity_of(manifest: dict[str, Any]) -> str:
    group, slash, _ = manifest["apiVersion"].rpartition("/")
    kind = manifest["kind"].lower()
    return f"{kind}{'.' if slash else ''}{group}/{manifest['metadata']['name']}"


def apply(state: dict[str, Any], manifest: dict[str, Any]) -> str:
    identity = identity_of(manifest)
    if manifest["kind"] not in CLUSTER_SCOPED:
        namespace = f"namespace/{manifest['metadata']['namespace']}"
        assert namespace in state["objects"], f"{identity} comes before {namespace}"
    before, last = (state[found].get(identity) for found in ("objects", "last_applied"))
    if before == last == manifest:
        return f"{identity} unchanged\n"
    state["objects"][identity] = state["last_applied"][identity] = manifest
    if manifest["kind"] == "Deployment" and (before or {}).get("spec") != manifest["spec"]:
        state["revisions"].append(manifest)
        if state["rollout_fails"]:
            state["broken"].append(manifest["spec"])
    return f"{identity} {'configured' if before else 'created'}\n"


def save(state: dict[str, Any]) -> None:
    (FOLDER / "state.json").write_text(json.dumps(state))


def main() -> None:
    tool, *arguments = sys.argv[1:]
    reads = {"-f", "--password-stdin"} & set(arguments)
    text = sys.stdin.read() if reads else ""
    with (FOLDER / "calls.jsonl").open("a") as calls:
        call = {"tool": tool, "arguments": arguments, "stdin": text, "names": [*os.environ]}
        calls.write(json.dumps(call) + "\n")
    state = json.loads((FOLDER / "state.json").read_text())
    match tool:
        case "docker":
            sys.stdout.write(docker(state, arguments))
        case "kubectl":
            sys.stdout.write(kubectl(state, arguments, text))
    save(state)


main()
