"""deploy.sh with stand-ins of its tools, with the real AWS CLI and with the pipeline's cluster.

The stand-ins (stand_in.py) record their calls and keep the state of AWS, registry and cluster.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import boto3
import botocore.session
import kubernetes_validate
import pytest
import yaml
from service import PROJECT, eventually, free_port
from test_scripts import assert_one_line, environment, executable, only

KUBECTL = shutil.which("kubectl") or ""
AWS = shutil.which("aws") or ""
needs_kubectl = pytest.mark.skipif(not KUBECTL, reason="kubectl is not installed")


def slow(test: Callable[..., None]) -> Any:
    """Runs deploy.sh from its start to its end."""
    return pytest.mark.slow(needs_kubectl(test))


DEPLOY = PROJECT / "deploy.sh"
SETUP = (PROJECT / "SETUP.md").read_text("utf-8")
ACCOUNT = "123456789012"  # the emulator's
REGION = "us-west-1"
REGISTRY = f"{ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com"
CLUSTER = "dev-CP-EKS-CLUSTER"
QUEUE = f"arn:aws:sqs:{REGION}:{ACCOUNT}:"
PARAMETER = "/email-service/api-token"
PARAMETERS = f"arn:aws:ssm:{REGION}:{ACCOUNT}:parameter"
TOKEN = "$DJISA<$#45ex \"3Rt\\Yr' é\N{GRINNING FACE}"
CERTIFICATE = f"arn:aws:acm:{REGION}:{ACCOUNT}:certificate/1a-2b"
ALB = "alb.ingress.kubernetes.io"
ROLE = f"arn:aws:iam::{ACCOUNT}:role/email-processor-role"
DEPLOYMENT = "deployment/email-processor"
CONFIG = "configmap/email-processor-config"
TEXT_TOOLS = ("awk", "cut", "grep", "head", "paste", "sed", "tail", "tr")
UTILITIES = (*TEXT_TOOLS, "bash", "cat", "cp", "dirname", "mktemp", "rm")
PARTITIONS = botocore.session.get_session().get_data("partitions")["partitions"]
HOST = "jsonpath={.status.loadBalancer.ingress[0].hostname}"
TEMPLATE = "jsonpath={.spec.template}"
CONTEXT = os.environ.get("CLUSTER_CONTEXT", "")  # of the pipeline's cluster
# A shell cannot trap a signal that its parent ignores.
NOT_IGNORED = [
    *(sys.executable, "-ISc"),
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "os.execvp(sys.argv[1], sys.argv[1:])",
]


@dataclass
class Machine:
    """A machine with stand-ins of some tools. With an emulator, its aws is the real AWS CLI."""

    folder: Path
    emulator: str = ""
    stand_ins: tuple[str, ...] = ("docker", "kubectl", "curl", "aws")

    def __post_init__(self) -> None:
        for tool in self.stand_ins:
            stand_in = [sys.executable, str(PROJECT / "tests" / "stand_in.py"), tool]
            executable(self.folder / "bin" / tool, f'#!/bin/sh\nexec {shlex.join(stand_in)} "$@"\n')
        call = json.dumps({"tool": "sleep", "arguments": []})
        sleep = f"#!/bin/sh\necho '{call}' >>\"$STAND_IN/calls.jsonl\"\n"
        executable(self.folder / "bin" / "sleep", sleep)
        flags = ("build_fails", "rollout_fails", "blocks", "curl_fails", "kuberc", "kept")
        texts = ("unreadable", "invalid", "denied", "interrupted", "meanwhile", "stuck", "added")
        self.set(
            **dict.fromkeys(flags, False),
            **dict.fromkeys(texts, ""),
            down={},
            from_check={},
            pod={"containerStatuses": [{"ready": False}]},
            engine=True,
            pushed=[],
            broken=[],
            objects={"ingressclass/alb": {"spec": {"controller": "ingress.k8s.aws/alb"}}},
            more=0,
            hostname="alb.example",
            account=ACCOUNT,
            stack=None,
            updates=[],
            clusters=[CLUSTER],
            provider="its ARN",
            parameters={PARAMETER: "old"},
            queues=["dev-CP-queue", "other"],
            certificate="ISSUED",
            redrive="None",
        )

    def __getattr__(self, name: str) -> Any:
        """A part of the state of AWS, registry and cluster."""
        return json.loads((self.folder / "state.json").read_text())[name]

    def set(self, **changes: Any) -> None:
        path = self.folder / "state.json"
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**before, **changes}))

    def calls(self, tool: str, *words: str) -> list[dict[str, Any]]:
        """The last run's calls of a tool that hold these words."""
        lines = (self.folder / "calls.jsonl").read_text().splitlines()
        found = [call for call in map(json.loads, lines) if call["tool"] == tool]
        return [call for call in found if set(words) <= set(call["arguments"])]

    def start(self, *command: str, cwd: Path = PROJECT, **variables: str) -> subprocess.Popen[str]:
        (self.folder / "calls.jsonl").write_text("")
        given = {
            "AWS_ENDPOINT_URL": self.emulator,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "COVERAGE_PROCESS_CONFIG": "",  # nothing here runs app.py
            "NO_PROXY": "127.0.0.1",
            "PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "REAL_KUBECTL": KUBECTL,
            "STAND_IN": str(self.folder),
            **variables,
        }
        if "kubectl" in self.stand_ins:
            given["KUBECONFIG"] = str(self.folder / "kubeconfig")
        return subprocess.Popen(
            [*NOT_IGNORED, *command],
            cwd=cwd,
            env=environment(**given),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def execute(self, *command: str, **options: Any) -> subprocess.CompletedProcess[str]:
        with self.start(*command, **options) as process:
            output, errors = process.communicate(timeout=300)
        return subprocess.CompletedProcess(command, process.returncode, output, errors)

    def run(
        self, *options: str, registry: str = REGISTRY, account: str = ACCOUNT, **more: Any
    ) -> subprocess.CompletedProcess[str]:
        return self.execute(str(DEPLOY), registry, account, *options, **more)

    def deploy(self, *options: str, **variables: str) -> str:
        """Standard output of a run that succeeds without a warning."""
        result = self.run(*options, **variables)
        assert (result.returncode, result.stderr) == (0, ""), result
        return result.stdout

    def fail(self, *options: str, status: int = 1, **variables: str) -> str:
        """Standard error of a run that fails."""
        result = self.run(*options, **variables)
        assert result.returncode == status, result
        return result.stderr

    def applied(self) -> list[list[dict[str, Any]]]:
        """The manifests of each `kubectl apply -f -`."""
        return [list(yaml.safe_load_all(call["stdin"])) for call in self.calls("kubectl", "apply")]

    def rights(self) -> list[tuple[str, str]]:
        """The names of the queues and parameters that the role got, at each update of the stack."""
        return [
            (
                update["QueueArns"].replace(QUEUE, ""),
                update["TokenParameterArns"].replace(PARAMETERS, ""),
            )
            for update in self.updates
        ]

    def token(self, name: str = PARAMETER) -> dict[str, Any]:
        parameter = self.client("ssm").get_parameter(Name=name, WithDecryption=True)["Parameter"]
        return dict(parameter)

    def client(self, service: str) -> Any:
        return client(service, self.emulator)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Nothing is deployed."""
    return Machine(tmp_path)


@pytest.fixture(scope="module")
def state_of_first_run(tmp_path_factory: pytest.TempPathFactory) -> str:
    machine = Machine(tmp_path_factory.mktemp("first"))
    machine.deploy()
    return (machine.folder / "state.json").read_text()


@pytest.fixture
def running(machine: Machine, state_of_first_run: str) -> Machine:
    """The service runs, deployed by an earlier run."""
    (machine.folder / "state.json").write_text(state_of_first_run)
    return machine


def git(folder: Path, *arguments: str) -> str:
    name = ("-c", "user.name=test", "-c", "user.email=test@example.com")
    command = ["git", *name, "--no-optional-locks", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A clone whose last commit holds the working tree."""
    folder = tmp_path / "checkout"
    for name in git(PROJECT, "ls-files", "-co", "--exclude-standard").splitlines():
        if (PROJECT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(PROJECT / name, folder / name)
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "test")
    return folder


def of_kind(manifests: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = [manifest for manifest in manifests if manifest["kind"] == kind]
    return found


def container(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    template = of_kind(manifests, "Deployment")["spec"]["template"]
    return dict(template["spec"]["containers"][0])


# --- Arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (REGISTRY, "ECR_REGISTRY and AWS_ACCOUNT_ID are needed"),
        (f"http://registry {ACCOUNT}", "ECR_REGISTRY 'http://registry' is not a registry's"),
        (f"{REGISTRY} 12345", "AWS_ACCOUNT_ID '12345' is not an account's 12 digits"),
        ("--regoin x", "Unknown option '--regoin'"),
        ("--region --dry-run", "--region needs a value"),
        ("--region west", "--region 'west' is not a region"),
        ("--token-parameter token", "--token-parameter 'token' is not a name"),
        ("--timeout 0", "--timeout '0' is not a number of seconds"),
        ("--check lb", "--check 'lb' is not a URL, or alb"),
        ("--parameter RateLimt=300", "--parameter 'RateLimt=300' is not"),
        ("--render --delete", "Only one of"),
    ],
)
def test_wrong_argument_is_one_line_and_status_2(arguments: str, problem: str) -> None:
    always = [REGISTRY, ACCOUNT] if arguments.startswith("-") else []
    command = [DEPLOY, *always, *arguments.split()]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
    assert_one_line(result, problem, status=2, name="deploy.sh: ")


def test_help_names_every_option_and_no_other() -> None:
    shown = subprocess.run(
        [DEPLOY, "--help"], env=environment(), capture_output=True, text=True, timeout=60
    ).stdout
    parser = DEPLOY.read_text("utf-8").split("read_arguments() {")[1].split("\n}\n")[0]
    taken = set(re.findall(r"--[a-z-]{3,}", "".join(re.findall(r"^ +(?:-h|--).*", parser, re.M))))
    assert set(re.findall(r"^  (--[a-z-]+)", shown, re.M)) == taken - {"--help"}
    runs = re.findall(r"\./deploy\.sh REGISTRY ACCOUNT_ID (.+)", SETUP)
    assert {option for run in runs for option in re.findall(r"--[a-z-]+", run)} <= taken


# --- Checks ---------------------------------------------------------------------------------------


def assert_nothing_was_changed(machine: Machine) -> None:
    assert machine.updates == []
    assert not machine.calls("docker", "build")
    changing = ("apply", "patch", "scale", "delete")
    assert not [call for word in changing for call in machine.calls("kubectl", word)]
    assert list(machine.parameters) == [PARAMETER]


def another_runs(machine: Machine) -> None:
    """The cluster has a paused deployment of another environment, and another kind of Ingress."""
    annotations = {"eks.amazonaws.com/role-arn": f"{ROLE}-prod"}
    account = {"serviceaccount/email-processor-sa": {"metadata": {"annotations": annotations}}}
    nginx = {"ingressclass/alb": {"spec": {"controller": "k8s.io/ingress-nginx"}}}
    pods = {"spec": {"containers": [{"env": []}]}}
    paused = {"deployment/email-processor": {"spec": {"paused": True, "template": pods}}}
    machine.set(objects={**account, **nginx, **paused})


def test_all_problems_are_listed_before_anything_changes(machine: Machine) -> None:
    another_runs(machine)
    machine.set(engine=False, provider="", queues=[], certificate="FAILED")
    *problems, summary = machine.fail("--certificate-arn", CERTIFICATE).splitlines()
    expected = [
        "docker does not reach its engine",
        f"The cluster {CLUSTER} belongs to another deployment, of {ROLE}-prod",
        "The cluster has no IngressClass alb",
        "The Deployment is paused: run kubectl",
        "OIDC provider is not registered in IAM: run eksctl utils associate-iam-oidc-provider",
        "AWS does not show the queue dev-CP-queue",
        "The certificate is not ISSUED but FAILED",
    ]
    for problem, words in zip(problems, expected, strict=True):
        assert words in problem
    assert summary.startswith("deploy.sh: 7 problem(s)")
    assert_nothing_was_changed(machine)


@pytest.mark.parametrize(
    ("state", "options", "problem"),
    [
        ({}, "--cluster other", "does not show the cluster other in us-west-1"),
        ({"clusters": [], "queues": []}, "", "AWS does not show the queue"),
        ({}, "--create-queue", "The queue dev-CP-queue exists already"),
        ({}, "--create-queue --queue-name x.fifo", "makes standard queues only, not x.fifo"),
        ({"account": "9" * 12}, "--dry-run", f"are of account 999999999999, not {ACCOUNT}"),
        ({"denied": "sts get-caller-identity"}, "", "credentials do not work"),
        ({"denied": "sqs get-queue-attributes"}, "", "correct --queue-name (An error"),
        # A mistyped name would cut off every client of a service that runs.
        ({"stack": {"RoleArn": "made"}}, "--token-parameter /tokne", "parameter /tokne: correct"),
        ({}, f"--check alb --certificate-arn {CERTIFICATE}", "give --check https://"),
        # Without what it cannot see, a service would get another queue, no web ACL, or plain HTTP.
        ({"denied": "cloudformation describe-stacks"}, "--render", "not show the stack"),
        ({"unreadable": "ingress/email-processor-ingress"}, "--render", "not reach the cluster"),
    ],
)
def test_problem_stops_the_run(
    machine: Machine, state: dict[str, Any], options: str, problem: str
) -> None:
    machine.set(**state)
    result = machine.run(*options.split())
    assert result.returncode == 1
    assert problem in result.stderr
    assert "--render" not in options or not result.stdout
    assert_nothing_was_changed(machine)


def test_missing_tools_are_named_together(machine: Machine, tmp_path: Path) -> None:
    path = only(tmp_path / "few", *UTILITIES, "git")
    problems = machine.fail(PATH=path)
    for tool in ("aws", "docker", "kubectl"):
        assert f"{tool} is missing: install it" in problems
    assert_nothing_was_changed(machine)


def test_namespace_of_another_deployment_is_not_deleted(machine: Machine) -> None:
    another_runs(machine)
    errors = machine.fail("--environment", "tset", "--delete")
    assert "belongs to another deployment" in errors
    machine.set(objects={"namespace/email-processor": {}})
    assert "another deployment and is kept" in machine.deploy("--environment", "tset", "--delete")
    assert_nothing_was_changed(machine)


@pytest.mark.parametrize(
    ("state", "queue", "parameters"),
    [
        ({}, "dev-CP-queue", "CreateQueue=false DeadLetterQueueName=dev-CP-queue-dlq "),
        ({"queues": ["a.fifo"]}, "a.fifo", "DeadLetterQueueName=a-dlq.fifo "),
        ({"redrive": f'{{"deadLetterTargetArn":"{QUEUE}dead"}}'}, "other", "QueueName=dead "),
        # What the stack has made it keeps, without --create-queue.
        ({"stack": {"QueueName": "other", "CreateQueue": "true"}}, "other", "CreateQueue=true "),
        ({"stack": {"QueueName": "x", "CreateQueue": "true"}}, "other", "CreateQueue=false "),
    ],
)
def test_dry_run_says_what_would_be_done(
    machine: Machine, state: dict[str, Any], queue: str, parameters: str
) -> None:
    machine.set(**state)
    options = ("--queue-name", queue, "--parameter", "RateLimit=300", "--check", "alb")
    output = machine.deploy("--dry-run", *options)
    assert parameters in output
    assert "RateLimit=300;\n" in output
    found = "=true" in parameters or "redrive" in state
    assert ("has no dead-letter queue" in output) != found
    assert f"keep the token parameter {PARAMETER}" in output
    assert "check the service at alb" in output
    assert output.endswith("Nothing was changed.\n")
    assert_nothing_was_changed(machine)


# --- Manifests ------------------------------------------------------------------------------------


@needs_kubectl
@pytest.mark.parametrize("certificate", ["none", CERTIFICATE])
def test_first_manifests_need_only_git_and_kubectl(
    machine: Machine, tmp_path: Path, certificate: str
) -> None:
    path = only(tmp_path / "few", *UTILITIES, "git", "kubectl")
    result = machine.run("--render", "--certificate-arn", certificate, PATH=path)
    assert result.returncode == 0, result
    assert all(line.startswith("deploy.sh: note: ") for line in result.stderr.splitlines())
    manifests = list(yaml.safe_load_all(result.stdout))
    for manifest in manifests:
        kubernetes_validate.validate(manifest, "1.34", strict=True)
    kinds = [manifest["kind"] for manifest in manifests]
    assert kinds[0] == "Namespace"
    # A pod gets its readiness gate only if Service and Ingress exist before it.
    assert kinds[-1] == "Deployment"
    assert {"Service", "Ingress"} < set(kinds)
    annotations = of_kind(manifests, "Ingress")["metadata"]["annotations"]
    ports = json.loads(annotations[f"{ALB}/listen-ports"])
    redirect = annotations.get(f"{ALB}/ssl-redirect")
    if certificate == "none":
        assert (ports, redirect) == ([{"HTTP": 80}], None)
    else:
        assert (ports, redirect) == ([{"HTTP": 80}, {"HTTPS": 443}], "443")
        assert annotations[f"{ALB}/certificate-arn"] == certificate
    assert "ACCOUNT_ID" not in result.stdout


@needs_kubectl
def test_rendered_manifests_hold_what_stack_and_options_say(machine: Machine) -> None:
    acl = f"arn:aws:wafv2:{REGION}:{ACCOUNT}:regional/webacl/theirs/1f-2e"
    names, registry = "/us-west-1/token,/b", REGISTRY.replace(REGION, "eu-west-1")
    options = ("--region", "eu-west-1", "--environment", "test", "--queue-name", "orders-us-west-1")
    machine.set(stack={"WebAclArn": acl}, queues=["orders-us-west-1"], parameters={"/b": "x"})
    render = ("--render", *options, "--token-parameter", names)
    missing = machine.run(*render, registry=registry)
    assert "the registry shows no image of this commit" in missing.stderr
    machine.set(pushed=[container(list(yaml.safe_load_all(missing.stdout)))["image"]])
    output = machine.deploy(*render, registry=registry)
    manifests = list(yaml.safe_load_all(output))
    assert of_kind(manifests, "ConfigMap")["data"] == {
        "sqs_queue_url": f"https://sqs.eu-west-1.amazonaws.com/{ACCOUNT}/orders-us-west-1",
        "aws_region": "eu-west-1",
    }
    assert of_kind(manifests, "ServiceAccount")["metadata"]["annotations"] == {
        "eks.amazonaws.com/role-arn": f"{ROLE}-test"
    }
    assert of_kind(manifests, "Ingress")["metadata"]["annotations"][f"{ALB}/wafv2-acl-arn"] == acl
    assert "/email-processor-test@sha256:" in container(manifests)["image"]
    assert {"name": "TOKEN_SSM_PARAMETER", "value": names} in container(manifests)["env"]


@needs_kubectl
@pytest.mark.parametrize("partition", PARTITIONS, ids=lambda each: str(each["id"]))
def test_names_fit_the_partition_of_the_region(
    machine: Machine, tmp_path: Path, partition: dict[str, Any]
) -> None:
    region = next(name for name in partition["regions"] if "global" not in name)
    path = only(tmp_path / "few", *UTILITIES, "git", "kubectl")
    result = machine.run("--render", "--region", region, registry="registry", PATH=path)
    manifests = list(yaml.safe_load_all(result.stdout))
    url = f"https://sqs.{region}.{partition['outputs']['dnsSuffix']}/{ACCOUNT}/dev-CP-queue"
    assert of_kind(manifests, "ConfigMap")["data"]["sqs_queue_url"] == url
    role = of_kind(manifests, "ServiceAccount")["metadata"]["annotations"]
    assert [*role.values()] == [ROLE.replace("aws", partition["id"], 1)]


@needs_kubectl
def test_staged_change_is_part_of_the_tag(machine: Machine, checkout: Path, tmp_path: Path) -> None:
    path = only(tmp_path / "few", *UTILITIES, "git", "kubectl")
    command = (str(checkout / "deploy.sh"), REGISTRY, ACCOUNT, "--render")
    images = []
    for change in ("", "staged", "staged again"):
        if change:
            with (checkout / "app.py").open("a") as file:
                file.write(f"# {change}\n")
            git(checkout, "add", "app.py")
        result = machine.execute(*command, PATH=path)
        images.append(container(list(yaml.safe_load_all(result.stdout)))["image"])
    assert ["-dirty-" in image for image in images] == [False, True, True]
    assert len({*images}) == 3


# --- Rollout --------------------------------------------------------------------------------------


def test_image_gets_its_commit_with_date_and_source(machine: Machine, checkout: Path) -> None:
    git(checkout, "remote", "add", "origin", "https://me:secret@git.example/mail.git")
    commit, date, seconds = git(checkout, "show", "-s", "--format=%H %cI %ct").split()
    for state in ("", "-dirty"):
        result = machine.execute(str(checkout / "deploy.sh"), REGISTRY, ACCOUNT)
        assert result.returncode == 0, result
        (build,) = machine.calls("docker", "build")
        given = [word for word in build["arguments"] if re.match("[A-Z_]+=", word)]
        assert sorted(given) == [
            f"COMMIT={commit}{state}",
            f"CREATED={date}",
            "SOURCE=https://git.example/mail.git",
            f"SOURCE_DATE_EPOCH={seconds}",
        ]
        (checkout / "app.py").write_text("# changed\n")


@slow
def test_second_run_changes_nothing(machine: Machine) -> None:
    options = ("--token-parameter", f"{PARAMETER},/b", "--queue-name", "other")
    deployed = machine.deploy(*options, "--certificate-arn", CERTIFICATE)
    assert deployed.endswith(" s: https://alb.example\n")
    first = (machine.objects, machine.stack)
    output = machine.deploy()
    assert "nothing to change" in output
    assert "which the registry has" in output
    assert (machine.objects, machine.stack) == first
    assert not machine.calls("docker", "build")
    rendered = list(yaml.safe_load_all(machine.deploy("--render")))
    kept = machine.objects[DEPLOYMENT]["metadata"]["annotations"]
    assert rendered[-1] == json.loads(kept["kubectl.kubernetes.io/last-applied-configuration"])
    assert not machine.calls("kubectl", "apply")


@slow
def test_old_pods_keep_their_rights_until_new_ones_serve(running: Machine) -> None:
    change = ("--token-parameter", "/new", "--queue-name", "other")
    old, new = ("dev-CP-queue", PARAMETER), ("other", "/new")
    both = ("dev-CP-queue,other", f"{PARAMETER},/new")
    running.set(pushed=[], build_fails=True)
    errors = running.fail(*change, API_TOKEN=f" {TOKEN}\r\n").splitlines()
    assert running.parameters["/new"] == TOKEN, "without the white space around it"
    assert errors[0].startswith("ERROR: failed to solve")
    assert errors[1].startswith("deploy.sh: The step 'build and push the image")
    assert running.rights() == [old, old, both]
    # An omitted option keeps the value of the cluster, not that of the failed run.
    running.set(build_fails=False)
    running.deploy()
    assert running.rights()[3:] == [both, old]
    before = running.objects[DEPLOYMENT]["spec"]["template"]["metadata"]["annotations"]
    running.deploy(*change)
    assert running.rights()[5:] == [both, new]
    assert running.objects[CONFIG]["data"]["sqs_queue_url"].endswith("/other")
    # Pods read the ConfigMap only when they start.
    after = running.objects[DEPLOYMENT]["spec"]["template"]["metadata"]["annotations"]
    assert after["checksum/config"] != before["checksum/config"]


def release(machine: Machine) -> tuple[dict[str, Any], ...]:
    """ConfigMap and Deployment without its status."""
    deployment = {**machine.objects[DEPLOYMENT], "status": {}}
    return machine.objects[CONFIG], deployment


PASSES = "echo $1 $TOKEN_SSM_PARAMETER $AWS_REGION"  # the arguments and variables of test.sh


@slow
@pytest.mark.parametrize(
    ("state", "url", "script", "shown"),
    [
        ({"rollout_fails": True, "more": 3}, "", "", "The step 'wait for the rollout' failed"),
        ({"interrupted": "status"}, "", "", "Interrupted in the step 'wait for the rollout'"),
        ({"interrupted": "apply"}, "", "", "Interrupted in the step 'apply the manifests"),
        ({"interrupted": HOST}, "alb", "", "Interrupted in the step 'wait for the ALB'"),
        ({"invalid": "PodDisruptionBudget"}, "", "", "PodDisruptionBudget is invalid"),
        ({"invalid": "Deployment"}, "", "", "Deployment is invalid"),
        ({"curl_fails": True}, "alb", PASSES, "alb.example/health does not respond"),
        ({}, "alb", f"{PASSES}; false", f"http://alb.example {PARAMETER} us-west-1"),
        ({}, "https://mail.example/", PASSES, f"https://mail.example {PARAMETER} us-west-1"),
    ],
)
def test_failed_release_brings_back_deployment_and_configuration(
    running: Machine, checkout: Path, state: dict[str, Any], url: str, script: str, shown: str
) -> None:
    # The autoscaler has added pods, and an operator has undone an earlier change by hand.
    objects = running.objects
    objects[DEPLOYMENT]["spec"]["replicas"] = 5
    objects[DEPLOYMENT]["spec"]["template"]["spec"]["containers"][0]["image"] = "by hand"
    running.set(objects=objects, **state)
    before = release(running)
    before[1]["spec"]["replicas"] += state.get("more", 0)
    manifest = checkout / "k8s" / "deployment.yaml"
    deadline = "  progressDeadlineSeconds: 300\n"
    text = manifest.read_text().replace(deadline, f"{deadline}  minReadySeconds: 2\n")
    manifest.write_text(text.replace("  labels:\n", "  labels:\n    new: label\n", 2))
    executable(checkout / "test.sh", f"#!/bin/sh\n{script}\n")
    check = ("--check", url) if url else ()
    command = (str(checkout / "deploy.sh"), REGISTRY, ACCOUNT, "--queue-name", "other", *check)
    result = running.execute(*command, "--timeout", "1")
    (applied,) = running.applied()
    assert applied[-1]["spec"]["minReadySeconds"] == 2
    assert shown in result.stdout + result.stderr
    if url.startswith("https"):
        assert (result.returncode, result.stderr) == (0, ""), result
        assert running.rights()[-1][0] == "other"
        return
    assert result.returncode == (130 if "interrupted" in state else 1)
    assert result.stderr.endswith("The deployment was undone: the earlier release serves again.\n")
    assert release(running) == before
    assert running.rights()[-1][0] == "dev-CP-queue,other"


@slow
@pytest.mark.parametrize("options", [(), ("--certificate-arn", CERTIFICATE)])
def test_first_deployment_that_failed_can_be_run_again(
    machine: Machine, options: tuple[str, ...]
) -> None:
    machine.set(rollout_fails=True)
    for queue, said in ("other", "it is the first release"), ("dev-CP-queue", "not completed"):
        errors = machine.fail("--queue-name", queue)
        assert said in errors.splitlines()[-1]
        assert len(machine.calls("kubectl", "rollout")) == 1, "it does not wait twice"
        (events,) = machine.calls("kubectl", "events")
        assert "involvedObject.kind!=HorizontalPodAutoscaler" in " ".join(events["arguments"])
    machine.set(rollout_fails=False, broken=[])  # no node had room for the pods, and now one has
    assert "start the rollout again" in machine.deploy(*options)
    assert machine.calls("kubectl", "restart")
    assert "nothing to change" in machine.deploy()
    assert not machine.calls("kubectl", "restart")


@slow
@pytest.mark.parametrize(
    ("word", "options", "said"),
    [
        ("ingressclass/alb", "", "in the step 'check tools, credentials and cluster'.\n"),
        ("ingressclass/alb", "--dry-run", "in the step 'check tools, credentials and cluster'.\n"),
        ("get-login-password", "", "The Deployment was not changed.\n"),
        (HOST, "", "in the step 'wait for the ALB'. The new release serves, and stays.\n"),
        ("describe-target-groups", "", "The new release serves, and stays.\n"),
        ("describe-parameters", "--delete", "in the step 'delete the token parameter"),
    ],
)
def test_interruption_is_explained(machine: Machine, word: str, options: str, said: str) -> None:
    machine.set(interrupted=word)
    errors = machine.fail(*options.split(), status=130)
    assert errors.startswith("deploy.sh: Interrupted in the step ")
    assert said in errors
    assert errors.count("\n") == 1


@slow
@pytest.mark.parametrize(
    ("word", "times"), [("patch", 2), ("patch", 0), (TEMPLATE, 2), ("patch", "interrupted")]
)
def test_failed_check_is_undone_once_the_cluster_responds(
    running: Machine, checkout: Path, word: str, times: int | str
) -> None:
    before = release(running)
    changes = {"interrupted": word} if times == "interrupted" else {"down": {word: times}}
    running.set(from_check=changes)
    once = 'test -e "$STAND_IN/failed" || { : >"$STAND_IN/failed"; exit 1; }'
    executable(checkout / "test.sh", f"#!/bin/sh\n{once}\n")
    command = (str(checkout / "deploy.sh"), REGISTRY, ACCOUNT, "--check", "alb")
    result = running.execute(*command)
    assert result.returncode == 1
    assert f"Going back to {container([before[1]])['image']}, the earlier release" in result.stderr
    if times:
        assert result.stderr.endswith("undone: the earlier release serves again.\n")
        assert release(running) == before
        return
    image = container([running.objects[DEPLOYMENT]])["image"]
    assert "Unauthorized" in result.stderr
    assert result.stderr.endswith(f"Going back failed. The Deployment has {image}.\n")
    running.set(down={})  # the operator has logged in again
    result = running.execute(*command)
    assert "the last run did not complete it" in result.stdout
    assert "nothing to change" in running.execute(*command).stdout


@slow
@pytest.mark.parametrize(
    ("down", "problem"),
    [
        ({"status": 2, HOST: 2}, ""),
        ({"status": 0}, "The step 'wait for the rollout' failed"),
        ({HOST: 0}, "There is no ALB yet. See the events above, and kubectl --namespace kube-sys"),
    ],
)
def test_final_error_ends_a_wait(machine: Machine, down: dict[str, int], problem: str) -> None:
    machine.set(down=down)
    if not problem:
        machine.deploy()
        return
    errors = machine.fail("--timeout", "1")
    assert errors.startswith("error: You must be logged in to the server (Unauthorized)\n")
    assert problem in errors
    assert not machine.calls("sleep")


@slow
@pytest.mark.parametrize("check", [(), ("--check", "alb")])
def test_run_does_not_claim_or_undo_the_release_of_another(
    running: Machine, checkout: Path, check: tuple[str, ...]
) -> None:
    executable(checkout / "test.sh", "#!/bin/sh\nexit 1\n")
    running.set(meanwhile="another", added="")
    result = running.execute(str(checkout / "deploy.sh"), REGISTRY, ACCOUNT, *check)
    assert result.returncode == 1
    assert "The Deployment was changed meanwhile, to another." in result.stderr
    assert "stays" not in result.stderr
    assert container([running.objects[DEPLOYMENT]])["image"] == "another"


@slow
def test_right_that_another_run_added_is_kept(running: Machine) -> None:
    running.set(added=f",{QUEUE}new")
    running.deploy("--queue-name", "other")
    assert running.rights()[-1][0] == "other,new"


@slow
def test_stopped_service_is_not_called_running(running: Machine) -> None:
    objects = running.objects
    objects[DEPLOYMENT]["spec"]["replicas"] = 0
    running.set(objects=objects)
    assert "A stopped service cannot pass --check" in running.fail("--check", "alb")
    output = running.deploy("--queue-name", "other")
    assert output.count("note: the service is stopped: kubectl") == 2


@slow
@pytest.mark.parametrize(
    ("pod", "shown", "hidden"),
    [
        (None, "Back-off pulling image", "usage"),
        ({"conditions": [{"status": "False", "message": "the gate is closed"}]}, "gate", "AWS_"),
        ({"containerStatuses": [{"ready": False}]}, "AWS_REGION must be", "gate"),
    ],
)
def test_reason_of_a_failed_rollout_is_shown(
    machine: Machine, pod: dict[str, Any] | None, shown: str, hidden: str
) -> None:
    ready = {"containerStatuses": [{"ready": True}]}
    machine.set(rollout_fails=True, pod=pod and {**ready, **pod})
    result = machine.run()
    assert result.stdout.count("Waiting for deployment") == 1
    assert shown in result.stderr
    assert hidden not in result.stderr


@slow
@pytest.mark.parametrize(
    ("state", "problem"),
    [
        ({"kuberc": True}, ""),
        ({"kept": True}, "The namespace email-processor is still there"),
        ({"stuck": "namespace"}, "The namespace email-processor is still there"),
        (
            {"stuck": "ingress"},
            "The Ingress was not deleted, so the ALB may be left. See the events",
        ),
    ],
)
def test_deletion_is_verified(running: Machine, state: dict[str, Any], problem: str) -> None:
    running.set(**state)
    if not problem:
        running.deploy("--delete")
        assert "namespace/email-processor" not in running.objects
        return
    errors = running.fail("--delete")
    assert problem in errors.splitlines()[-1]
    assert ("events of" in errors) == ("stuck" in state)
    assert running.calls("kubectl", "delete")
    assert not running.calls("aws", "delete-stack")


@slow
def test_pods_that_fail_without_a_change_are_not_undone(running: Machine) -> None:
    running.set(broken=[running.objects[DEPLOYMENT]["spec"]["template"]])
    errors = running.fail()
    assert "failed. Correct the reasons above, and run this again.\n" in errors
    assert not running.calls("kubectl", "patch")


@slow
def test_progress_of_the_rollout_is_shown_at_once(machine: Machine) -> None:
    os.mkfifo(machine.folder / "go")
    machine.set(blocks=True)
    with machine.start(str(DEPLOY), REGISTRY, ACCOUNT) as process:
        assert process.stdout
        too_late = threading.Timer(60, os.killpg, (process.pid, signal.SIGKILL))
        too_late.start()
        assert any("Waiting for deployment" in line for line in process.stdout)
        too_late.cancel()
        (machine.folder / "go").write_text("continue")
        assert "Deployed" in process.communicate(timeout=300)[0]


@slow
def test_missing_load_balancer_is_a_failure(machine: Machine) -> None:
    machine.set(hostname="")
    errors = machine.fail("--timeout", "1")
    assert errors.startswith(
        "events of ingress email-processor-ingress\ndeploy.sh: There is no ALB"
    )
    assert errors.endswith("The new release serves, and stays.\n")
    assert not machine.calls("kubectl", "patch")


# --- With the pipeline's cluster ------------------------------------------------------------------


@pytest.mark.skipif(not CONTEXT, reason="CLUSTER_CONTEXT names no cluster")
def test_cluster_keeps_changes_by_hand_and_gets_them_back(checkout: Path, tmp_path: Path) -> None:
    """The service is stopped, because no registry has its image: then a rollout ends at once."""
    machine = Machine(tmp_path, stand_ins=("docker", "curl", "aws"))
    command = (str(checkout / "deploy.sh"), REGISTRY, ACCOUNT, "--context", CONTEXT)

    def kubectl(*arguments: str) -> str:
        options = ("--context", CONTEXT, "--namespace", "email-processor")
        return subprocess.run(
            [KUBECTL, *options, *arguments], capture_output=True, text=True, check=True
        ).stdout

    def release() -> list[Any]:
        config, deployment = (
            json.loads(kubectl("get", name, "--output", "json")) for name in (CONFIG, DEPLOYMENT)
        )
        metadata = deployment["metadata"]
        del metadata["annotations"]["deployment.kubernetes.io/revision"]
        labels = metadata["labels"]
        return [config["data"], labels, metadata["annotations"], deployment["spec"]]

    kubectl("scale", DEPLOYMENT, "--replicas", "0")
    kubectl("set", "env", DEPLOYMENT, "LOG_LEVEL=DEBUG")
    host = {"status": {"loadBalancer": {"ingress": [{"hostname": "alb.example"}]}}}
    ingress = ("ingress/email-processor-ingress", "--type", "merge", "--patch", json.dumps(host))
    kubectl("patch", "--subresource", "status", *ingress)
    eventually(lambda: "NewReplicaSetAvailable" in kubectl("get", DEPLOYMENT, "--output", "yaml"))

    deployed = machine.execute(*command)
    assert (deployed.returncode, deployed.stderr) == (0, ""), deployed
    assert "nothing to change" in machine.execute(*command).stdout
    before = release()
    env = before[3]["template"]["spec"]["containers"][0]["env"]
    assert {"name": "LOG_LEVEL", "value": "DEBUG"} in env

    for name, old, new in (
        ("deployment", "  labels:\n", "  labels:\n    new: label\n"),
        ("deployment", "  strategy:\n", "  minReadySeconds: 2\n  strategy:\n"),
        ("pdb", "maxUnavailable: 1", "maxUnavailable: -1"),
    ):
        manifest = checkout / "k8s" / f"{name}.yaml"
        manifest.write_text(manifest.read_text().replace(old, new, 2))
    failed = machine.execute(*command, "--queue-name", "other")
    assert "The deployment was undone: the earlier release serves again." in failed.stderr, failed
    assert release() == before


# --- With the AWS CLI -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def emulator() -> Iterator[str]:
    """The URL of an emulated AWS for this module only, whose tests reset it."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(
        command,
        env=environment(COVERAGE_PROCESS_CONFIG=""),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            eventually(lambda: responds(f"{url}/moto-api/"), 60)
            yield url
        finally:
            process.terminate()


def responds(url: str) -> bool:
    try:
        with urllib.request.urlopen(url):
            return True
    except OSError:
        return False


@cache
def client(service: str, url: str) -> Any:
    return boto3.client(
        service,
        region_name=REGION,
        endpoint_url=url,
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )


@pytest.fixture
def account(emulator: str, tmp_path: Path) -> Machine:
    """An emulated AWS account with a cluster, a queue and a load balancer."""
    if not AWS:
        pytest.skip("the AWS CLI is not installed")
    request = urllib.request.Request(f"{emulator}/moto-api/reset", method="POST")
    urllib.request.urlopen(request).close()
    machine = Machine(tmp_path, emulator, ("docker", "kubectl", "curl"))
    role = f"arn:aws:iam::{ACCOUNT}:role/eks"
    eks = machine.client("eks")
    eks.create_cluster(name=CLUSTER, roleArn=role, resourcesVpcConfig={})
    issuer = eks.describe_cluster(name=CLUSTER)["cluster"]["identity"]["oidc"]["issuer"]
    machine.client("iam").create_open_id_connect_provider(Url=issuer, ThumbprintList=[])
    machine.client("sqs").create_queue(QueueName="dev-CP-queue")
    subnets = machine.client("ec2").describe_subnets()["Subnets"]
    elbv2 = machine.client("elbv2")
    (balancer,) = elbv2.create_load_balancer(
        Name="k8s-email", Subnets=[subnet["SubnetId"] for subnet in subnets]
    )["LoadBalancers"]
    (group,) = elbv2.create_target_group(
        Name="k8s-email", Protocol="HTTP", Port=8080, VpcId=balancer["VpcId"], TargetType="ip"
    )["TargetGroups"]
    elbv2.create_listener(
        LoadBalancerArn=balancer["LoadBalancerArn"],
        Protocol="HTTP",
        Port=80,
        DefaultActions=[{"Type": "forward", "TargetGroupArn": group["TargetGroupArn"]}],
    )
    machine.set(hostname=balancer["DNSName"])
    return machine


def stacks(account: Machine) -> dict[str, dict[str, str]]:
    """The parameters of each stack."""
    return {
        stack["StackName"]: {
            parameter["ParameterKey"]: parameter["ParameterValue"]
            for parameter in stack["Parameters"]
        }
        for stack in account.client("cloudformation").describe_stacks()["Stacks"]
    }


@slow
def test_service_is_made_kept_by_a_second_run_then_deleted(account: Machine) -> None:
    status = git(PROJECT, "status", "--porcelain")
    result = account.execute("bash", "-x", str(DEPLOY), REGISTRY, ACCOUNT, API_TOKEN=TOKEN)
    assert result.returncode == 0, result
    assert re.findall(r"^\[(\d)/8\] \d+:\d\d \S", result.stdout, re.M) == list("12345678")
    last = result.stdout.splitlines()[-1]
    assert re.fullmatch(rf"Deployed in \d+ s: http://{re.escape(account.hostname)}", last)
    (build,) = account.calls("docker", "build")
    assert build["arguments"][build["arguments"].index("--platform") + 1] == "linux/amd64"
    # Its only timeout is progressDeadlineSeconds.
    (wait,) = account.calls("kubectl", "rollout")
    assert wait["arguments"][2:] == ["rollout", "status", DEPLOYMENT]
    assert account.objects[DEPLOYMENT]["spec"]["replicas"] == 2, "the minimum of the autoscaler"

    # The token is in no argument, no variable, no output, and not in the shell's trace.
    assert (account.token()["Type"], account.token()["Value"]) == ("SecureString", TOKEN)
    calls = [*account.calls("docker"), *account.calls("kubectl")]
    seen = result.stdout + result.stderr + json.dumps(calls, ensure_ascii=False)
    assert "+ aws ssm put-parameter" in result.stderr
    for part in (TOKEN, TOKEN[:14], TOKEN[-6:], json.dumps(TOKEN)):
        assert part not in seen
    assert not [call for call in calls if "API_TOKEN" in call["names"]]

    (manifests,) = account.applied()
    role = account.client("iam").get_role(RoleName="email-processor-role")["Role"]
    annotations = of_kind(manifests, "ServiceAccount")["metadata"]["annotations"]
    assert annotations == {"eks.amazonaws.com/role-arn": role["Arn"]}
    (repository,) = account.client("ecr").describe_repositories()["repositories"]
    image = container(manifests)["image"]
    assert re.fullmatch(re.escape(repository["repositoryUri"]) + "@sha256:[0-9a-f]{64}", image)
    stack = stacks(account)["email-processor"]
    assert stack["LoadBalancerFullName"].startswith("app/k8s-email/")
    assert stack["TargetGroupFullName"].startswith("targetgroup/k8s-email/")

    objects = account.objects
    output = account.deploy(API_TOKEN="another one")
    assert f"keep {PARAMETER}" in output
    assert "nothing to change" in output
    assert not account.calls("docker", "build")
    assert stacks(account) == {"email-processor": stack}
    assert account.token()["Value"] == TOKEN
    assert account.objects == objects
    assert git(PROJECT, "status", "--porcelain") == status

    account.deploy("--delete")
    deleted = [call["arguments"][2:5] for call in account.calls("kubectl", "delete")]
    # The controller can only remove the ALB while the namespace exists.
    assert deleted == [
        ["delete", "ingress", "email-processor-ingress"],
        ["delete", "namespace", "email-processor"],
    ]
    assert stacks(account) == {}


@slow
def test_environment_is_made_and_deleted_without_its_queue(account: Machine) -> None:
    account.client("ssm").put_parameter(Name=PARAMETER, Value="production's", Type="SecureString")
    key = f"arn:aws:kms:{REGION}:{ACCOUNT}:key/1a-2b"
    names = ("--queue-name", "new", "--environment", "test")
    options = ("--create-queue", "--parameter", "RateLimit=500")
    key_option = ("--parameter", f"TokenKeyArn={key}")
    output = account.deploy(
        *names, *options, *key_option, "--platform", "linux/arm64", "--context", "mine"
    )
    parameter = "/email-service/test/api-token"
    made_up = account.token(parameter)["Value"]
    assert re.fullmatch(r"[A-Za-z0-9_-]{43}", made_up)
    assert made_up not in output
    assert f"--name {parameter}" in output
    described = account.client("ssm").describe_parameters()["Parameters"]
    assert {each["Name"]: each["KeyId"] for each in described}[parameter] == key
    stack = stacks(account)["email-processor-test"]
    assert stack["RateLimit"] == "500"
    assert stack["TokenParameterArns"].strip("[']") == f"{PARAMETERS}{parameter}"
    (build,) = account.calls("docker", "build")
    assert re.fullmatch(
        r"[\w./-]+:[0-9a-f]{12}(-dirty-[0-9a-f]{12})?-arm64", build["arguments"][-2]
    )
    assert account.calls("kubectl", "--context", "mine", "apply")
    assert not (account.folder / "kubeconfig").exists(), "the operator's own is not written"

    # --delete works after the cluster was deleted, and not with the name of another.
    account.client("eks").delete_cluster(name=CLUSTER)
    assert "not show the cluster other" in account.fail(*names, "--delete", "--cluster", "other")
    output = account.deploy(*names, "--delete")
    assert f"the cluster {CLUSTER} no longer exists" in output
    assert f"deleted {parameter}" in output
    assert output.endswith("\nDeleted.\n")
    for queue in ("new", "new-dlq"):
        assert re.search(
            rf"kept {queue}; to delete it: aws sqs .* --queue-url \S+/{queue}\n", output
        )
    assert stacks(account) == {}
    assert account.token()["Value"] == "production's"


@pytest.mark.slow
def test_undoing_a_change_by_hand_keeps_every_parameter(account: Machine) -> None:
    """The emulator knows no drift, so the AWS CLI only checks the arguments."""
    template = PROJECT / "infra" / "email-processor.yaml"
    assert re.search(r"^  Role:\n    Type: AWS::IAM::Role$", template.read_text("utf-8"), re.M)
    parameters = ("QueueName", "RateLimit")
    account.client("cloudformation").create_stack(
        StackName="email-processor",
        TemplateBody=json.dumps(
            {
                "Parameters": {name: {"Type": "String", "Default": name} for name in parameters},
                "Resources": {"Topic": {"Type": "AWS::SNS::Topic"}},
            }
        ),
    )
    executable(
        account.folder / "bin" / "aws",
        f'#!/bin/sh\necho "$@" >>{account.folder}/aws\ncase "$2" in\n'
        f'describe-stacks) exec {AWS} "$@" ;;\nwait|describe-change-set) ;;\n'
        f'*) exec {AWS} "$@" --generate-cli-skeleton output ;;\nesac\n',
    )
    guide = SETUP.split("## Undo a change by hand")[1].split("\n## ")[0]
    blocks = re.findall(r"```bash\n(.*?)```", guide, re.DOTALL)
    result = account.execute("bash", "-euo", "pipefail", "-c", "".join(blocks))
    assert (result.returncode, result.stderr) == (0, ""), result
    lines = (account.folder / "aws").read_text().splitlines()
    (made,) = [line for line in lines if line.startswith("cloudformation create-change-set")]
    kept = " ".join(f"ParameterKey={name},UsePreviousValue=true" for name in parameters)
    assert made.endswith(f"--deployment-mode REVERT_DRIFT --parameters {kept}")
