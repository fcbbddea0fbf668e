"""The pipeline: what would break without a word, and the steps that matter, run.

What a linter knows is asked in test_manifests.py.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import PROJECT
from test_scripts import environment, executable

FILES = sorted((PROJECT / ".github" / "workflows").glob("*"))
WORKFLOWS: dict[str, dict[Any, Any]] = {
    file.stem: yaml.safe_load(file.read_text("utf-8")) for file in FILES
}
CI, DEPLOY = WORKFLOWS["ci"], WORKFLOWS["deploy"]
JOBS = {
    f"{name}/{job}": value
    for name, workflow in WORKFLOWS.items()
    for job, value in workflow["jobs"].items()
}
STEPS = [step for job in JOBS.values() for step in job["steps"]]
SCRIPTS = {step["name"]: step["run"] for step in STEPS if "run" in step}
OWN = (".ci/run", "./deploy.sh", "./setup-local.sh", "venv/bin/pip-audit")


def triggers(workflow: dict[Any, Any]) -> dict[str, Any]:
    return dict(workflow[True])  # YAML's `on`


def commands(script: str) -> list[list[str]]:
    """The words of every line that is a command of its own."""
    return [shlex.split(line) for line in script.replace("\\\n", "").splitlines() if line.strip()]


# --- What is trusted ------------------------------------------------------------------------------


def test_there_are_these_workflows_and_no_other() -> None:
    assert [file.name for file in FILES] == ["ci.yml", "deploy.yml"]
    assert set(triggers(CI)) == {"push", "pull_request", "schedule"}
    assert set(triggers(DEPLOY)) == {"workflow_dispatch"}, "deployed by a person alone"


def test_every_action_is_of_github_or_aws_and_pinned_to_one_commit_with_its_version() -> None:
    lines = re.findall(r"^.*\buses:.*$", "\n".join(f.read_text("utf-8") for f in FILES), re.M)
    assert len(lines) == sum("uses" in step for step in STEPS)
    pins: dict[str, set[str]] = {}
    for line in lines:
        found = re.search(r"uses: ((?:aws-)?actions/[\w-]+)@([0-9a-f]{40} # v\d+\.\d+\.\d+)$", line)
        assert found, line
        pins.setdefault(found[1], set()).add(found[2])
    assert [action for action, pin in pins.items() if len(pin) > 1] == []


def test_every_container_is_pinned_by_digest_with_its_version() -> None:
    images = []
    for step in STEPS:
        for words in commands(step.get("run", "")):
            if words[:2] == ["docker", "run"]:
                (variable,) = (word[1:] for word in words if re.fullmatch(r"\$[A-Z]+", word))
                images.append(step["env"][variable])
    assert len(images) == 4
    for image in images:
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+@sha256:[0-9a-f]{64}", image)


def test_permissions_are_to_read_the_code_and_in_deploy_alone_to_ask_for_credentials() -> None:
    assert CI["permissions"] == {"contents": "read"}
    assert DEPLOY["permissions"] == {}
    assert {name: job.get("permissions") for name, job in JOBS.items()} == {
        **dict.fromkeys(JOBS),
        "deploy/deploy": {"contents": "read", "id-token": "write"},
    }


def test_no_credential_is_stored_or_left_behind() -> None:
    for file in FILES:
        assert not re.search(r"secrets\b(?!\.GITHUB_TOKEN)", file.read_text("utf-8")), file.name
    checkouts = [step for step in STEPS if step.get("uses", "").startswith("actions/checkout@")]
    assert len(checkouts) == len(JOBS)
    assert {step["with"]["persist-credentials"] for step in checkouts} == {False}
    (aws,) = (step for step in STEPS if step.get("uses", "").startswith("aws-actions/"))
    assert aws["with"] == {
        "role-to-assume": "${{ vars.AWS_ROLE_ARN }}",
        "aws-region": "${{ env.AWS_REGION }}",
    }


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_expression_becomes_part_of_a_script(name: str) -> None:
    assert "${{" not in SCRIPTS[name]


def test_every_job_has_an_end_and_a_known_machine_and_waits_for_its_like() -> None:
    for name, job in JOBS.items():
        assert 0 < job["timeout-minutes"] <= 60, name
        assert re.fullmatch(r"ubuntu-\d\d\.\d\d", job["runs-on"]), name
    for name, workflow in WORKFLOWS.items():
        assert workflow["concurrency"]["group"].startswith(f"{name}-${{{{ "), name
        assert workflow["defaults"]["run"]["shell"] == "bash", "without it, no pipefail"
    assert DEPLOY["concurrency"]["cancel-in-progress"] is False


def test_environment_is_the_one_that_was_chosen() -> None:
    chosen = "${{ inputs.environment }}"
    given = triggers(DEPLOY)["workflow_dispatch"]["inputs"]
    assert {name: (each["type"], each["required"]) for name, each in given.items()} == {
        "environment": ("environment", True)
    }
    assert JOBS["deploy/deploy"]["environment"] == chosen
    assert chosen in DEPLOY["concurrency"]["group"]


# --- What is run ----------------------------------------------------------------------------------


def test_pythons_are_all_from_the_oldest_that_is_allowed_to_the_images() -> None:
    tested = JOBS["ci/test"]["strategy"]["matrix"]["python"]
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text("utf-8"))["project"]
    image = re.search(r"FROM python:3\.(\d+)-slim$", (PROJECT / "Dockerfile").read_text(), re.M)
    assert image
    minors = [int(version.removeprefix("3.")) for version in tested]
    assert minors == list(range(minors[0], minors[-1] + 1))
    assert project["requires-python"] == f">={tested[0]}"
    assert int(image[1]) in minors
    for name, job in JOBS.items():
        for step in job["steps"]:
            if step.get("uses", "").startswith("actions/setup-python@"):
                expected = "${{ matrix.python }}" if name == "ci/test" else f"3.{image[1]}"
                assert step["with"] == {"python-version": expected}, name


def test_ci_is_the_one_command_that_checks_everything_on_every_python() -> None:
    (step,) = (step for step in JOBS["ci/test"]["steps"] if "run" in step)
    assert (step["run"], step["env"]) == (".ci/run", {"PYTHON": "python${{ matrix.python }}"})


@cache
def help_of(command: str) -> str:
    path = PROJECT / command
    if command.startswith("venv/bin/"):
        path = Path(sys.executable).parent / path.name
    done = subprocess.run([path, "--help"], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, command
    return done.stdout


def test_own_commands_exist_and_know_their_options() -> None:
    used = [words for script in SCRIPTS.values() for words in commands(script) if words[0] in OWN]
    assert {words[0] for words in used} == set(OWN)
    for command, *arguments in used:
        options = {word for word in arguments if word.startswith("-")}
        assert options <= set(re.findall(r"--[\w-]+", help_of(command))), command


def test_every_file_that_is_audited_or_scanned_is_there() -> None:
    (audit,) = commands(SCRIPTS["Run pip-audit"])
    assert {"--strict", "--require-hashes", "--disable-pip"} <= set(audit)
    assert (PROJECT / audit[audit.index("--requirement") + 1]).exists()
    (upload,) = (step for step in STEPS if "upload-artifact@" in step.get("uses", ""))
    assert f">{upload['with']['path']}" in SCRIPTS["Write the SBOM"]
    assert upload["with"]["if-no-files-found"] == "error"


@pytest.mark.parametrize("name", SCRIPTS)
def test_step_is_clean_under_shellcheck(name: str) -> None:
    shellcheck = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run(
        [shellcheck, "--shell", "bash", "-"], input=SCRIPTS[name], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- The deployment -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "options", "expected"),
    [
        ("", "", ["alb"]),
        ("https://mail.example", "--timeout 600", ["https://mail.example", "--timeout", "600"]),
        (
            "",
            "--create-queue\n--rate-limit 300\n",
            ["alb", "--create-queue", "--rate-limit", "300"],
        ),
    ],
)
def test_deployment_is_one_command_which_checks_the_service_and_undoes_what_fails(
    tmp_path: Path, variable: str, options: str, expected: list[str]
) -> None:
    steps = JOBS["deploy/deploy"]["steps"]
    assert [step["name"] for step in steps if "run" in step] == ["Deploy"]
    assert steps[-1]["name"] == "Deploy"
    assert not [step for step in steps if "if" in step or "continue-on-error" in step]
    executable(tmp_path / "bin" / "aws", "#!/bin/sh\necho 123456789012\n")
    executable(tmp_path / "deploy.sh", '#!/bin/sh\nprintf "%s\\n" "$@"\n')
    done = subprocess.run(
        # As the runner starts it.
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", SCRIPTS["Deploy"]],
        cwd=tmp_path,
        env=environment(
            PATH=f"{tmp_path / 'bin'}:{environment()['PATH']}",
            AWS_REGION="us-west-1",
            EKS_CLUSTER="cluster",
            SERVICE_URL=variable,
            DEPLOY_OPTIONS=options,
        ),
        capture_output=True,
        text=True,
    )
    registry = "123456789012.dkr.ecr.us-west-1.amazonaws.com"
    always = [registry, "123456789012", "--region", "us-west-1", "--cluster", "cluster", "--check"]
    assert (done.returncode, done.stdout.splitlines()) == (0, always + expected), done


def pipeline_section() -> str:
    return (PROJECT / "SETUP.md").read_text("utf-8").split("## Pipeline\n")[1].split("\n## ")[0]


def test_guide_lists_every_variable_of_a_deployment() -> None:
    used = set(re.findall(r"\bvars\.(\w+)", FILES[1].read_text("utf-8")))
    assert set(re.findall(r"^\| `(\w+)` \|", pipeline_section(), re.M)) == used


def test_role_of_the_guide_may_do_what_deploy_sh_asks_of_aws() -> None:
    script = (PROJECT / "deploy.sh").read_text("utf-8").split("\ndelete_all() {")[0]
    calls = set(re.findall(r"\baws ([a-z0-9]+) ([a-z-]+)", script))
    calls |= {("sqs", call) for call in re.findall(r"^\s+sqs ([a-z-]+)", script, re.M)}
    named = {  # where the action is not called as the command is
        ("cloudformation", "deploy"): "cloudformation:ExecuteChangeSet",
        ("ecr", "get-login-password"): "ecr:GetAuthorizationToken",
        ("eks", "update-kubeconfig"): "eks:DescribeCluster",
        ("eks", "list-access-entries"): "",  # in a message
        ("iam", "list-open-id-connect-providers"): "iam:ListOpenIDConnectProviders",
        ("sso", "login"): "",  # in a message
        ("sts", "get-caller-identity"): "",  # always allowed
    }
    prefixes = {"elbv2": "elasticloadbalancing"}
    text = pipeline_section().split("--policy-document '")[1].split("}'\n")[0] + "}"
    policy = json.loads(re.sub(r"'\"([^\"]*)\"'", r"\1", text))
    granted = [
        action
        for statement in policy["Statement"]
        for action in (
            [statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"]
        )
    ]
    needed = {
        named.get(
            (service, call),
            prefixes.get(service, service) + ":" + call.replace("-", " ").title().replace(" ", ""),
        )
        for service, call in calls
    } - {""}
    assert len(needed) >= 10
    assert [each for each in sorted(needed) if not any(fnmatch(each, a) for a in granted)] == []
