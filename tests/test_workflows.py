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
from service import PROJECT
from test_documentation import page
from test_manifests import NEWEST, OLDEST
from test_scripts import environment, executable

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
    assert [file.name for file in FILES] == ["ci.yml", "deploy.yml"]
    assert set(DEPLOY[True]) == {"workflow_dispatch"}  # YAML's `on`
    assert DEPLOY["concurrency"]["cancel-in-progress"] is False


def test_no_failure_is_ignored() -> None:
    assert {workflow["defaults"]["run"]["shell"] for workflow in (CI, DEPLOY)} == {
        "bash"
    }  # pipefail
    assert not [step for step in STEPS if "continue-on-error" in step or "if" in step]


def test_every_container_is_pinned_by_digest() -> None:
    run = [step for step in STEPS if "docker run" in step.get("run", "")]
    images = [value for step in run for value in step["env"].values()]
    assert images
    for image in [*images, *JOBS["kubernetes"]["strategy"]["matrix"]["node"]]:
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+@sha256:[0-9a-f]{64}", image)


def test_ci_tests_every_supported_python_and_kubernetes() -> None:
    tested = JOBS["test"]["strategy"]["matrix"]["python"]
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text("utf-8"))["project"]
    image = re.search(r"FROM python:(3\.\d+)-slim", (PROJECT / "Dockerfile").read_text("utf-8"))
    assert project["requires-python"] == f">={tested[0]}"
    assert image
    assert image[1] in tested
    nodes = JOBS["kubernetes"]["strategy"]["matrix"]["node"]
    assert [re.findall(r":v(1\.\d+)\.", node) for node in nodes] == [[OLDEST], [NEWEST]]


# --- Manifests on a real API server ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "difference", "passes"),
    [
        ("echo service/a created", "echo pdb/a configured", "", True),
        ("echo service/a created; echo Warning: old >&2", "", "", False),
        ("echo service/a created", "echo Warning: old >&2", "", False),
        ("echo error: unknown field >&2; exit 1", "", "", False),
        ("echo service/a created", "exit 1", "", False),
        ("echo service/a created", "", "echo +spec; exit 1", False),
    ],
)
def test_pipeline_fails_for_a_warning_or_a_difference(
    first: str, second: str, difference: str, passes: bool, tmp_path: Path
) -> None:
    kubectl = f"""kubectl() {{
      case "$1 $2 $*" in
        "diff "*" --filename manifests.yaml") {difference or ":"} ;;
        "apply --validate=strict "*" --filename manifests.yaml")
          if [ -s first ]; then {second or ":"}; else {first}; fi ;;
        *) exit 9 ;;
      esac
    }}"""
    done = run_step("Apply the manifests twice", kubectl, cwd=tmp_path)
    assert (done.returncode == 0) == passes, done


# --- The deployment -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "options", "expected"),
    [
        ("", "", ["alb"]),
        ("https://mail.example", "--timeout 600", ["https://mail.example", "--timeout", "600"]),
        ("", "--create-queue\n--rate-limit 3\n", ["alb", "--create-queue", "--rate-limit", "3"]),
    ],
)
def test_deployment_is_one_command_with_a_check(
    tmp_path: Path, variable: str, options: str, expected: list[str]
) -> None:
    executable(tmp_path / "deploy.sh", '#!/bin/sh\nprintf "%s\\n" "$@"\n')
    variables = {"SERVICE_URL": variable, "DEPLOY_OPTIONS": options}
    done = run_step(
        "Deploy",
        """aws() {
            case $1 in ecr) echo https://123456789012.dkr.ecr.us-west-1.amazonaws.com ;;
            *) echo 123456789012 ;; esac
        }""",
        cwd=tmp_path,
        env=environment(AWS_REGION="us-west-1", EKS_CLUSTER="cluster", **variables),
    )
    registry = "123456789012.dkr.ecr.us-west-1.amazonaws.com"
    always = [registry, "123456789012", "--region", "us-west-1", "--cluster", "cluster", "--check"]
    assert (done.returncode, done.stdout.splitlines()) == (0, always + expected), done


def pipeline_section() -> str:
    return page("setup").split("## Pipeline\n")[1].split("\n## ")[0]


def test_guide_lists_every_variable_of_a_deployment() -> None:
    used = set(re.findall(r"\bvars\.(\w+)", FILES[1].read_text("utf-8")))
    assert set(re.findall(r"^\| `(\w+)` \|", pipeline_section(), re.M)) == used


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
        named.get(
            (service, call),
            service.replace("elbv2", "elasticloadbalancing")
            + ":"
            + call.replace("-", " ").title().replace(" ", ""),
        )
        for service, call in calls
    } - {""}
    role = (PROJECT / ".github" / "deploy-role.yaml").read_text("utf-8")
    granted = re.findall(r"\b[a-z0-9]+:[A-Z*][A-Za-z*]*", role)
    assert len(needed) >= 10
    assert [each for each in sorted(needed) if not any(fnmatch(each, a) for a in granted)] == []
