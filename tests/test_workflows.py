"""The pipeline: what would break without a word, and the steps that matter, run.

What a linter knows is asked in test_manifests.py.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import PROJECT
from test_deploy import CLUSTER, REGION, World
from test_deploy import emulator as emulator
from test_deploy import world as world
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
OWN = (".ci/run", "./deploy.sh", "./setup-local.sh", "./test.sh", ".venv/bin/pip-audit")


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
    assert len(images) == 3
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
    if command.startswith(".venv/bin/"):
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


# --- The steps of a deployment --------------------------------------------------------------------


def shell(name: str) -> list[str]:
    """A step as the runner starts it."""
    return ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", SCRIPTS[name]]


needs_aws = pytest.mark.skipif(shutil.which("aws") is None, reason="the AWS CLI is not installed")


@dataclass
class Runner:
    world: World

    def step(self, name: str, options: str = "") -> str:
        """What the step prints; it succeeds."""
        result = self.world.execute(
            *shell(name),
            AWS_REGION=REGION,
            AWS_DEFAULT_REGION=REGION,  # the AWS action sets both
            EKS_CLUSTER=CLUSTER,
            RUNNER_TEMP=str(self.world.folder),
            DEPLOY_OPTIONS=options,
        )
        assert result.returncode == 0, result
        return result.stdout

    def deploy(self, options: str = "") -> None:
        self.step("Note what runs")
        self.step("Deploy", options)

    def set_settings(self, data: dict[str, str]) -> None:
        state = self.world.state
        for manifests in (state["objects"], state["last_applied"]):
            manifests["configmap/email-processor-config"]["data"] = data
        self.world.set(**state)

    def running(self) -> tuple[Any, Any]:
        objects = self.world.state["objects"]
        return (
            objects["deployment.apps/email-processor"]["spec"],
            objects["configmap/email-processor-config"]["data"],
        )


@pytest.fixture
def runner(world: World) -> Runner:
    return Runner(world)


@needs_aws
def test_rollback_undoes_what_this_deployment_has_changed_and_nothing_else(runner: Runner) -> None:
    runner.world.answer(ssm_get_parameter="SecureString")
    runner.deploy()
    assert "the first deployment" in runner.step("Roll back")
    runner.set_settings({"sqs_queue_url": "https://sqs/old"})
    before = runner.running()

    runner.deploy("--token-parameter /other --rate-limit 300")
    changed = runner.running()
    assert changed[0] != before[0]
    assert changed[1] != before[1]
    assert runner.world.stack()["RateLimit"] == "300"
    assert "Revision 1 serves again" in runner.step("Roll back")
    assert runner.running() == before
    words = [call["arguments"][2] for call in runner.world.calls("kubectl")]
    assert words == ["get", "apply", "rollout", "rollout"], "pods read settings as they start"

    runner.step("Note what runs")
    assert "has not changed the pods" in runner.step("Roll back")


def test_rollback_follows_a_deployment_that_did_not_pass_its_smoke_test() -> None:
    steps = JOBS["deploy/deploy"]["steps"]
    names = [step.get("id") or step.get("name") for step in steps if "run" in step]
    assert names == ["Note what runs", "deploy", "smoke", "Roll back"]
    assert steps[-1]["if"] == (
        "always() && steps.deploy.outcome == 'success' && steps.smoke.outcome != 'success'"
    )
    assert [step["if"] for step in steps if "if" in step] == [steps[-1]["if"]]


@pytest.mark.parametrize(
    ("variable", "parameter", "answers", "expected"),
    [
        ("", "", True, "http://alb.example /email-service/api-token"),
        ("", "/other,/next", True, "http://alb.example /other,/next"),
        ("https://mail.example", "", True, "https://mail.example /email-service/api-token"),
        ("", "", False, ""),
    ],
)
def test_smoke_test_asks_the_service_with_the_token_that_its_pods_accept(
    tmp_path: Path, variable: str, parameter: str, answers: bool, expected: str
) -> None:
    tools = tmp_path / "bin"
    executable(
        tools / "kubectl",
        '#!/bin/sh\ncase "$*" in\n'
        "*' get ingress email-processor-ingress '*hostname*) printf alb.example ;;\n"
        f"*' get deployment email-processor '*TOKEN_SSM_PARAMETER*) printf %s '{parameter}' ;;\n"
        "*) exit 1 ;;\nesac\n",
    )
    curl = '#!/bin/sh\nfor url in "$@"; do :; done\n[ "${url##*/}" = health ] || exit 3\n'
    executable(tools / "curl", curl + ("" if answers else "exit 28\n"))
    default = "${TOKEN_SSM_PARAMETER:-/email-service/api-token}"
    assert default in (PROJECT / "test.sh").read_text("utf-8")
    executable(tmp_path / "test.sh", f'#!/bin/sh\necho "$* {default}"\n')
    path = f"{tools}:{environment()['PATH']}"
    done = subprocess.run(
        shell("Smoke test"),
        cwd=tmp_path,
        env=environment(PATH=path, SERVICE_URL=variable),
        capture_output=True,
        text=True,
    )
    assert (done.returncode == 0, done.stdout.strip()) == (answers, expected), done


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
