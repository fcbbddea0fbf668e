"""The pipeline: its scripts are run, and every file that has a linter is linted.

zizmor and actionlint check pins, permissions, secrets and injections of the workflows.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import environment, executable
from pages import table
from service import PROJECT
from test_manifests import NEWEST, OLDEST

FILES = sorted((PROJECT / ".github" / "workflows").iterdir())
CI, DEPLOY = (yaml.safe_load(file.read_text("utf-8")) for file in FILES)
JOBS = {**CI["jobs"], **DEPLOY["jobs"]}
STEPS = [step for job in JOBS.values() for step in job["steps"]]
SCRIPTS = {step["name"]: step["run"] for step in STEPS if "run" in step}
BIN = Path(sys.executable).parent


def run_step(name: str, before: str = "", **how: Any) -> subprocess.CompletedProcess[str]:
    """Run a step's script as the runner does, after functions that stand in for its tools."""
    shell = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", f"{before}\n{SCRIPTS[name]}"]
    return subprocess.run(shell, capture_output=True, text=True, **how)


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(
            "cfn-lint --include-checks I --regions us-west-1 --template infra/email-processor.yaml"
            " .github/deploy-role.yaml",
            marks=pytest.mark.slow,
        ),
        "check-jsonschema -q --builtin-schema github-workflows .github/workflows/*",
        "check-jsonschema -q --builtin-schema dependabot .github/dependabot.yml",
        "hadolint Dockerfile",
        "shellcheck *.sh .ci/run",
        "zizmor -q --offline --pedantic --format github .github",
    ],
    ids=lambda command: " ".join(word for word in command.split()[:4] if word[0] != "-"),
)
def test_linter_finds_nothing(command: str) -> None:
    done = subprocess.run(f"'{BIN}'/{command}", shell=True, cwd=PROJECT, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_only_a_person_starts_a_deployment() -> None:
    assert set(DEPLOY[True]) == {"workflow_dispatch"}  # YAML's `on`
    assert DEPLOY["concurrency"]["cancel-in-progress"] is False


def test_no_failure_is_ignored() -> None:
    shells = {workflow["defaults"]["run"]["shell"] for workflow in (CI, DEPLOY)}
    assert shells == {"bash"}, "with pipefail"
    assert not [step for step in STEPS if "continue-on-error" in step or "if" in step]


def test_every_container_is_pinned_by_digest() -> None:
    run = [step for step in STEPS if "docker run" in step.get("run", "")]
    images = [value for step in run for value in step["env"].values()]
    assert images
    for image in [*images, *JOBS["kubernetes"]["strategy"]["matrix"]["node"]]:
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+@sha256:[0-9a-f]{64}", image)


def test_every_supported_python_and_kubernetes_is_tested() -> None:
    tested = JOBS["test"]["strategy"]["matrix"]["python"]
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text("utf-8"))["project"]
    image = re.search(r"FROM python:(3\.\d+)-slim", (PROJECT / "Dockerfile").read_text("utf-8"))
    assert project["requires-python"] == f">={tested[0]}"
    assert image
    assert image[1] in tested
    nodes = JOBS["kubernetes"]["strategy"]["matrix"]["node"]
    assert [re.findall(r":v(1\.\d+)\.", node) for node in nodes] == [[OLDEST], [NEWEST]]


def test_pipeline_runs_every_test_and_those_of_the_cluster() -> None:
    assert SCRIPTS["Test and lint"] == ".ci/run"
    assert "./setup-local.sh test --all\n" in (PROJECT / ".ci" / "run").read_text("utf-8")
    (step,) = (step for step in STEPS if "CLUSTER_CONTEXT" in step.get("env", {}))
    command = [sys.executable, *step["run"].split()[1:], "--collect-only", "-q"]
    selected = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
    assert "::test_cluster_" in selected.stdout


def test_pipeline_fails_for_a_warning_or_a_difference(tmp_path: Path) -> None:
    """The first and second `kubectl apply`, and `kubectl diff`."""
    created, warning = "echo service/a created", "echo Warning: old >&2"
    for number, (first, second, difference, passes) in enumerate(
        (
            (created, "echo pdb/a configured", ":", True),
            (f"{created}; {warning}", ":", ":", False),
            (created, warning, ":", False),
            ("echo error: unknown field >&2; exit 1", ":", ":", False),
            (created, ":", "echo +spec; exit 1", False),
        )
    ):
        kubectl = f"""kubectl() {{
          case "$1 $2 $*" in
            "diff "*" --filename manifests.yaml") {difference} ;;
            "apply --validate=strict "*" --filename manifests.yaml")
              if [ -s first ]; then {second}; else {first}; fi ;;
            *) exit 9 ;;
          esac
        }}"""
        folder = tmp_path / str(number)
        folder.mkdir()
        done = run_step("Apply the manifests twice", kubectl, cwd=folder)
        assert (done.returncode == 0) == passes, done


def test_deployment_is_one_command_with_a_check(tmp_path: Path) -> None:
    executable(tmp_path / "deploy.sh", '#!/bin/sh\nprintf "%s\\n" "$@"\n')
    registry = "123456789012.dkr.ecr.us-west-1.amazonaws.com"
    aws = f"aws() {{ case $1 in ecr) echo https://{registry} ;; *) echo 123456789012 ;; esac; }}"
    for url, options, expected in (
        ("", "", ["alb"]),
        ("https://mail", "--timeout 600\n--create-queue\n", ["https://mail", "--timeout", "600"]),
    ):
        variables = {"SERVICE_URL": url, "DEPLOY_OPTIONS": options}
        variables |= {"AWS_REGION": "us-west-1", "EKS_CLUSTER": "blue"}
        done = run_step("Deploy", aws, cwd=tmp_path, env=environment(**variables))
        always = [registry, "123456789012", "--region", "us-west-1", "--cluster", "blue", "--check"]
        more = ["--create-queue"] if options else []
        assert (done.returncode, done.stdout.splitlines()) == (0, always + expected + more), done


def test_guide_lists_every_variable_of_a_deployment() -> None:
    used = set(re.findall(r"\bvars\.(\w+)", FILES[1].read_text("utf-8")))
    assert {row[0] for row in table("Pipeline")} == used


def test_role_of_the_pipeline_may_do_what_deploy_sh_asks() -> None:
    script = (PROJECT / "deploy.sh").read_text("utf-8").split("\ndelete() {")[0]
    calls = set(re.findall(r"\baws ([a-z0-9]+) ([a-z-]+)", script))
    named = {  # where the action is not called as the command is
        ("cloudformation", "deploy"): "cloudformation:ExecuteChangeSet",
        ("ecr", "get-login-password"): "ecr:GetAuthorizationToken",
        ("eks", "update-kubeconfig"): "eks:DescribeCluster",
        ("iam", "list-open-id-connect-providers"): "iam:ListOpenIDConnectProviders",
        ("sso", "login"): "",  # in a message
        ("sts", "get-caller-identity"): "",  # always allowed
    }
    needed = {
        named.get((service, call), f"{service}:{call.title().replace('-', '')}")
        for service, call in calls
    } - {""}
    role = (PROJECT / ".github" / "deploy-role.yaml").read_text("utf-8")
    role = role.replace("elasticloadbalancing:", "elbv2:")
    granted = re.findall(r"\b[a-z0-9]+:[A-Z*][A-Za-z*]*", role)
    assert len(needed) >= 10
    assert [each for each in sorted(needed) if not any(fnmatch(each, a) for a in granted)] == []
