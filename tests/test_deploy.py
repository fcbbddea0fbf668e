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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import botocore.session
import kubernetes_validate
import pytest
import yaml
from commands import assert_one_line, environment, executable, only
from service import PROJECT, eventually

KUBECTL = shutil.which("kubectl") or ""
needs_kubectl = pytest.mark.skipif(not KUBECTL, reason="kubectl is not installed")


def slow(test: Callable[..., None]) -> Any:
    """Runs deploy.sh from its start to its end."""
    return pytest.mark.slow(needs_kubectl(test))


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
HOST = "jsonpath={.status.loadBalancer.ingress[0].hostname}"
TEMPLATE = "jsonpath={.spec.template}"
UTILITIES = (
    *("awk", "bash", "cat", "cp", "cut", "dirname", "git", "grep", "head", "mktemp", "paste"),
    *("rm", "sed", "tail", "tr"),
)
CONTEXT = os.environ.get("CLUSTER_CONTEXT", "")  # of the pipeline's cluster
INITIAL_STATE: dict[str, Any] = {
    "aws": {
        "sts get-caller-identity": ACCOUNT,
        "eks describe-cluster": "https://oidc.example/id/1",
        "iam list-open-id-connect-providers": "its ARN",
        "sqs get-queue-attributes": "None",  # no redrive policy
        "acm describe-certificate": "ISSUED",
        "elbv2 describe-load-balancers": "arn:aws:elasticloadbalancing:loadbalancer/app/a/1",
        "elbv2 describe-target-groups": "arn:aws:elasticloadbalancing:targetgroup/b/2",
    },
    "stack": None,
    "updates": [],  # the parameters of each deployment of the stack
    "parameters": {PARAMETER: "old"},
    "pushed": [],
    "objects": {"ingressclass/alb": {"spec": {"controller": "ingress.k8s.aws/alb"}}},
    "hostname": "alb.example",
    # The faults: calls with these words fail, or get a Ctrl-C, or find a changed state.
    "down": {},
    "interrupted": "",
    "meanwhile": {},
    "invalid": "",
    "late_rollouts": 0,
}


@dataclass
class Machine:
    """A machine with stand-ins of some tools. With an emulator, its aws is the real AWS CLI."""

    folder: Path
    emulator: str = ""
    stand_ins: tuple[str, ...] = ("docker", "kubectl", "curl", "aws")
    project: Path = PROJECT

    def __post_init__(self) -> None:
        for tool in self.stand_ins:
            stand_in = [sys.executable, str(PROJECT / "tests" / "stand_in.py"), tool]
            executable(self.folder / "bin" / tool, f'#!/bin/sh\nexec {shlex.join(stand_in)} "$@"\n')
        call = json.dumps({"tool": "sleep", "arguments": []})
        sleep = f"#!/bin/sh\necho '{call}' >>\"$STAND_IN/calls.jsonl\"\n"
        executable(self.folder / "bin" / "sleep", sleep)
        (self.folder / "state.json").write_text(json.dumps(INITIAL_STATE))

    def __getattr__(self, name: str) -> Any:
        """A part of the state of AWS, registry and cluster."""
        return json.loads((self.folder / "state.json").read_text())[name]

    def set(self, **changes: Any) -> None:
        path = self.folder / "state.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def calls(self, tool: str, *words: str) -> list[dict[str, Any]]:
        """The last run's calls of a tool that hold these words."""
        lines = (self.folder / "calls.jsonl").read_text().splitlines()
        found = [call for call in map(json.loads, lines) if call["tool"] == tool]
        return [call for call in found if set(words) <= set(call["arguments"])]

    def start(
        self, *options: str, registry: str = REGISTRY, shell: tuple[str, ...] = (), **variables: str
    ) -> subprocess.Popen[str]:
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
        script = str(self.project / "deploy.sh")
        return subprocess.Popen(
            [*shell, script, registry, ACCOUNT, *options],
            cwd=self.project,
            env=environment(**given),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *options: str, **more: Any) -> subprocess.CompletedProcess[str]:
        with self.start(*options, **more) as process:
            output, errors = process.communicate(timeout=300)
        return subprocess.CompletedProcess(options, process.returncode, output, errors)

    def deploy(self, *options: str, **more: Any) -> str:
        """Standard output of a run that succeeds without a warning."""
        result = self.run(*options, **more)
        assert (result.returncode, result.stderr) == (0, ""), result
        return result.stdout

    def fail(self, *options: str, status: int = 1, **more: Any) -> str:
        """Standard error of a run that fails."""
        result = self.run(*options, **more)
        assert result.returncode == status, result
        return result.stderr

    def render(self, *options: str, **more: Any) -> list[dict[str, Any]]:
        """The manifests as a first run would apply them, on a machine with git and kubectl only."""
        path = self.folder / "few"
        if not path.exists():
            only(path, *UTILITIES, "kubectl")
        result = self.run("--render", *options, PATH=str(path), **more)
        assert result.returncode == 0, result
        assert all(line.startswith("deploy.sh: note: ") for line in result.stderr.splitlines())
        return list(yaml.safe_load_all(result.stdout))

    def permissions(self) -> list[tuple[str, str]]:
        """The names of the queues and parameters that the role got, at each update of the stack."""
        queues = [update["QueueArns"].replace(QUEUE, "") for update in self.updates]
        parameters = [each["TokenParameterArns"].replace(PARAMETERS, "") for each in self.updates]
        return [*zip(queues, parameters, strict=True)]

    def release(self) -> tuple[dict[str, Any], ...]:
        """ConfigMap and Deployment without its status."""
        deployment = {**self.objects[DEPLOYMENT], "status": {}}
        return self.objects[CONFIG], deployment

    def client(self, service: str) -> Any:
        return boto3.client(
            service,
            region_name=REGION,
            endpoint_url=self.emulator,
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Nothing is deployed."""
    return Machine(tmp_path)


@pytest.fixture(scope="module")
def state_of_first_run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The state of AWS, registry and cluster after a first deployment."""
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


def clone(machine: Machine) -> Path:
    machine.project = machine.folder / "checkout"
    for name in git(PROJECT, "ls-files", "-co", "--exclude-standard").splitlines():
        if (PROJECT / name).is_file():
            (machine.project / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(PROJECT / name, machine.project / name)
    git(machine.project, "init", "--quiet")
    git(machine.project, "add", "--all")
    git(machine.project, "commit", "--quiet", "--message", "test")
    return machine.project


@pytest.fixture
def checkout(machine: Machine) -> Path:
    """The machine's own clone, whose last commit holds the working tree."""
    return clone(machine)


def of_kind(manifests: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = [manifest for manifest in manifests if manifest["kind"] == kind]
    return found


def container(deployment: dict[str, Any]) -> dict[str, Any]:
    return dict(deployment["spec"]["template"]["spec"]["containers"][0])


# --- Arguments ------------------------------------------------------------------------------------

WRONG_ARGUMENTS = {
    REGISTRY: "ECR_REGISTRY and AWS_ACCOUNT_ID are needed",
    f"http://registry {ACCOUNT}": "ECR_REGISTRY 'http://registry' is not a registry's",
    f"{REGISTRY} 12345": "AWS_ACCOUNT_ID '12345' is not an account's 12 digits",
    "--regoin x": "Unknown option '--regoin'",
    "--region --dry-run": "--region needs a value",
    "--region west": "--region 'west' is not a region",
    "--token-parameter token": "--token-parameter 'token' is not a name",
    "--timeout 0": "--timeout '0' is not a number of seconds",
    "--check lb": "--check 'lb' is not a URL, or alb",
    "--parameter RateLimt=300": "--parameter 'RateLimt=300' is not",
    "--render --delete": "Only one of",
}


def show(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A run that ends before it calls a tool."""
    command = [str(PROJECT / "deploy.sh"), *arguments]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)


def test_wrong_argument_is_one_line_and_status_2() -> None:
    for arguments, problem in WRONG_ARGUMENTS.items():
        always = [REGISTRY, ACCOUNT] if arguments.startswith("-") else []
        result = show(*always, *arguments.split())
        assert_one_line(result, problem, status=2, name="deploy.sh: ")


def test_help_names_every_option_and_no_other() -> None:
    script = (PROJECT / "deploy.sh").read_text("utf-8")
    parser = script.split("read_arguments() {")[1].split("\n}\n")[0]
    taken = set(re.findall(r"--[a-z-]{3,}", "".join(re.findall(r"^ +(?:-h|--).*", parser, re.M))))
    assert set(re.findall(r"^  (--[a-z-]+)", show("--help").stdout, re.M)) == taken - {"--help"}


# --- Checks ---------------------------------------------------------------------------------------


def assert_nothing_was_changed(machine: Machine) -> None:
    assert machine.updates == []
    assert not machine.calls("docker", "build")
    changing = ("apply", "patch", "scale", "delete")
    assert not [call for word in changing for call in machine.calls("kubectl", word)]
    assert list(machine.parameters) == [PARAMETER]


POD: dict[str, Any] = {"spec": {"containers": [{"env": []}]}}
OF_ANOTHER_DEPLOYMENT = {
    "serviceaccount/email-processor-sa": {
        "metadata": {"annotations": {"eks.amazonaws.com/role-arn": f"{ROLE}-prod"}}
    },
    "ingressclass/alb": {"spec": {"controller": "k8s.io/ingress-nginx"}},
    DEPLOYMENT: {"spec": {"paused": True, "template": POD}},
}
STOPPED = {DEPLOYMENT: {"spec": {"replicas": 0, "template": POD}}}
UNREADABLE_STACK = {"cloudformation describe-stacks": "An error occurred (AccessDenied)"}


@pytest.mark.parametrize(
    ("aws", "state", "options", "expected"),
    [
        (
            {
                "iam list-open-id-connect-providers": "",
                "sqs get-queue-attributes": "An error occurred (NonExistentQueue)",
                "acm describe-certificate": "FAILED",
            },
            {"objects": OF_ANOTHER_DEPLOYMENT, "down": {"info": 0}},
            f"--certificate-arn {CERTIFICATE}",
            [
                "docker does not reach its engine",
                f"The cluster {CLUSTER} belongs to another deployment, of {ROLE}-prod",
                "The cluster has no IngressClass alb",
                "The Deployment is paused: run kubectl",
                "OIDC provider is not registered in IAM: run eksctl utils associate-iam-oidc",
                "AWS does not show the queue dev-CP-queue: add --create-queue",
                "The certificate is not ISSUED but FAILED",
            ],
        ),
        (
            {"eks describe-cluster": "An error occurred (ResourceNotFoundException)"},
            {"stack": {"RoleArn": "made"}},  # its clients would be locked out by a new token
            "--region eu-west-1 --cluster other --token-parameter /tokne --create-queue "
            f"--check alb --certificate-arn {CERTIFICATE}",
            [
                f"The registry {REGISTRY} is not that of account {ACCOUNT} in eu-west-1",
                "does not show the cluster other in eu-west-1",
                "There is no token parameter /tokne: correct",
                "The queue dev-CP-queue exists already",
                "give --check https://",
            ],
        ),
        (
            {"sqs get-queue-attributes": "An error occurred (NonExistentQueue)"},
            {"objects": INITIAL_STATE["objects"] | STOPPED},
            "--create-queue --queue-name x.fifo --check alb",
            ["A stopped service cannot pass --check", "makes standard queues only, not x.fifo"],
        ),
        (
            {"sts get-caller-identity": "9" * 12},
            {},
            "",
            [f"of account 999999999999, not {ACCOUNT}"],
        ),
        # The manifests would have another queue, no web ACL or plain HTTP.
        (UNREADABLE_STACK, {}, "--render", ["AWS does not show the stack"]),
        ({}, {"down": {"ingress/email-processor-ingress": 0}}, "--render", ["not reach the clust"]),
    ],
)
def test_all_problems_are_listed_before_anything_changes(
    machine: Machine, aws: dict[str, str], state: dict[str, Any], options: str, expected: list[str]
) -> None:
    machine.set(aws=machine.aws | aws, **state)
    result = machine.run(*options.split())
    assert result.returncode == 1
    *problems, summary = result.stderr.splitlines()
    for problem, words in zip(problems, expected, strict=True):
        assert words in problem
    assert summary.startswith(f"deploy.sh: {len(expected)} problem(s)")
    assert "--render" not in options or not result.stdout
    assert_nothing_was_changed(machine)


def test_missing_tools_are_named_together(machine: Machine) -> None:
    problems = machine.fail(PATH=only(machine.folder / "few", *UTILITIES))
    for tool in ("aws", "docker", "kubectl"):
        assert f"{tool} is missing: install it" in problems
    assert_nothing_was_changed(machine)


def test_namespace_of_another_deployment_is_not_deleted(machine: Machine) -> None:
    machine.set(objects=OF_ANOTHER_DEPLOYMENT)
    errors = machine.fail("--environment", "tset", "--delete")
    assert "belongs to another deployment" in errors
    machine.set(objects={"namespace/email-processor": {}})
    assert "another deployment and is kept" in machine.deploy("--environment", "tset", "--delete")
    assert_nothing_was_changed(machine)


@pytest.mark.parametrize(
    ("redrive", "stack", "queue", "parameters"),
    [
        ("None", None, "dev-CP-queue", "CreateQueue=false DeadLetterQueueName=dev-CP-queue-dlq "),
        ("None", None, "a.fifo", "DeadLetterQueueName=a-dlq.fifo "),
        (f'{{"deadLetterTargetArn":"{QUEUE}dead"}}', None, "other", "QueueName=dead "),
        # The stack keeps a queue that it has made, without --create-queue.
        ("None", {"QueueName": "other", "CreateQueue": "true"}, "other", "CreateQueue=true "),
    ],
)
def test_dry_run_prints_the_changes_and_makes_none(
    machine: Machine, redrive: str, stack: dict[str, str] | None, queue: str, parameters: str
) -> None:
    machine.set(aws=machine.aws | {"sqs get-queue-attributes": redrive}, stack=stack)
    options = ("--queue-name", queue, "--parameter", "RateLimit=300", "--check", "alb")
    output = machine.deploy("--dry-run", *options)
    assert parameters in output
    assert "RateLimit=300;\n" in output
    assert ("has no dead-letter queue" in output) == (redrive == "None" and stack is None)
    assert f"keep the token parameter {PARAMETER}" in output
    assert "check the service at alb" in output
    assert output.endswith("Nothing was changed.\n")
    assert_nothing_was_changed(machine)


# --- Manifests ------------------------------------------------------------------------------------


@needs_kubectl
def test_first_manifests_need_only_git_and_kubectl(machine: Machine) -> None:
    https = [{"HTTP": 80}, {"HTTPS": 443}]
    for certificate, ports in ("none", [{"HTTP": 80}]), (CERTIFICATE, https):
        manifests = machine.render("--certificate-arn", certificate)
        for manifest in manifests:
            kubernetes_validate.validate(manifest, "1.34", strict=True)
        kinds = [manifest["kind"] for manifest in manifests]
        assert kinds[0] == "Namespace"
        # A pod gets its readiness gate only if Service and Ingress exist before it.
        assert kinds[-1] == "Deployment"
        annotations = of_kind(manifests, "Ingress")["metadata"]["annotations"]
        assert json.loads(annotations[f"{ALB}/listen-ports"]) == ports
        given = [annotations.get(f"{ALB}/{name}") for name in ("certificate-arn", "ssl-redirect")]
        assert given == ([certificate, "443"] if ports == https else [None, None])
        assert "ACCOUNT_ID" not in json.dumps(manifests)


@needs_kubectl
def test_rendered_manifests_hold_the_values_of_stack_and_options(machine: Machine) -> None:
    acl = f"arn:aws:wafv2:{REGION}:{ACCOUNT}:regional/webacl/theirs/1f-2e"
    names, registry = "/us-west-1/token,/b", REGISTRY.replace(REGION, "eu-west-1")
    machine.set(stack={"WebAclArn": acl}, parameters={"/b": "x"})
    options = ("--region", "eu-west-1", "--environment", "test", "--queue-name", "orders-us-west-1")
    render = ("--render", *options, "--token-parameter", names)
    missing = machine.run(*render, registry=registry)
    assert "the registry shows no image of this commit" in missing.stderr
    machine.set(pushed=[container(list(yaml.safe_load_all(missing.stdout))[-1])["image"]])
    manifests = list(yaml.safe_load_all(machine.deploy(*render, registry=registry)))
    assert of_kind(manifests, "ConfigMap")["data"] == {
        "sqs_queue_url": f"https://sqs.eu-west-1.amazonaws.com/{ACCOUNT}/orders-us-west-1",
        "aws_region": "eu-west-1",
    }
    assert of_kind(manifests, "ServiceAccount")["metadata"]["annotations"] == {
        "eks.amazonaws.com/role-arn": f"{ROLE}-test"
    }
    assert of_kind(manifests, "Ingress")["metadata"]["annotations"][f"{ALB}/wafv2-acl-arn"] == acl
    assert "/email-processor-test@sha256:" in container(manifests[-1])["image"]
    assert {"name": "TOKEN_SSM_PARAMETER", "value": names} in container(manifests[-1])["env"]


@needs_kubectl
def test_names_fit_the_partition_of_the_region(machine: Machine) -> None:
    for partition in botocore.session.get_session().get_data("partitions")["partitions"]:
        region = next(name for name in partition["regions"] if "global" not in name)
        manifests = machine.render("--region", region, registry="registry")
        url = f"https://sqs.{region}.{partition['outputs']['dnsSuffix']}/{ACCOUNT}/dev-CP-queue"
        assert of_kind(manifests, "ConfigMap")["data"]["sqs_queue_url"] == url
        role = of_kind(manifests, "ServiceAccount")["metadata"]["annotations"]
        assert [*role.values()] == [ROLE.replace("aws", partition["id"], 1)]


# --- Rollout --------------------------------------------------------------------------------------


@slow
def test_image_names_its_commit_and_uncommitted_changes(machine: Machine, checkout: Path) -> None:
    git(checkout, "remote", "add", "origin", "https://me:secret@git.example/mail.git")
    commit, date, seconds = git(checkout, "show", "-s", "--format=%H %cI %ct").split()
    tags = set()
    for change, end in ("", ""), ("staged", "-dirty"), ("staged again", "-dirty"):
        with (checkout / "app.py").open("a") as file:
            file.write(change)
        git(checkout, "add", "app.py")
        machine.deploy()
        (build,) = machine.calls("docker", "build")
        given = [word for word in build["arguments"] if re.match("[A-Z_]+=", word)]
        assert sorted(given) == [
            f"COMMIT={commit}{end}",
            f"CREATED={date}",
            "SOURCE=https://git.example/mail.git",
            f"SOURCE_DATE_EPOCH={seconds}",
        ]
        tags.add(build["arguments"][build["arguments"].index("--tag") + 1])
    assert len(tags) == 3


@slow
def test_second_run_keeps_every_option_and_changes_nothing(machine: Machine) -> None:
    machine.set(parameters={})
    options = ("--token-parameter", f"{PARAMETER},/b", "--queue-name", "other")
    deployed = machine.deploy(*options, "--certificate-arn", CERTIFICATE)
    assert deployed.endswith(" s: https://alb.example\n")
    token = machine.parameters[PARAMETER]
    assert re.fullmatch(r"[A-Za-z0-9_-]{43}", token), "random"
    assert token not in deployed
    assert f"--name {PARAMETER}\n" in deployed
    first = (machine.objects, machine.stack)
    output = machine.deploy()
    assert "nothing to change" in output
    assert "which the registry has" in output
    assert (machine.objects, machine.stack) == first
    assert not machine.calls("docker", "build")
    rendered = list(yaml.safe_load_all(machine.deploy("--render")))
    kept = machine.objects[DEPLOYMENT]["metadata"]["annotations"]
    assert rendered[-1] == json.loads(kept["kubectl.kubernetes.io/last-applied-configuration"])


@slow
def test_old_pods_keep_their_permissions_until_new_ones_serve(running: Machine) -> None:
    change = ("--token-parameter", "/new", "--queue-name", "other")
    old = ("dev-CP-queue", PARAMETER)
    both = ("dev-CP-queue,other", f"{PARAMETER},/new")
    running.set(pushed=[], down={"build": 0})
    errors = running.fail(*change, API_TOKEN=f" {TOKEN}\r\n").splitlines()
    assert running.parameters["/new"] == TOKEN, "without the white space around it"
    assert errors[0].startswith("error: You must be logged in"), "of the build"
    assert errors[1].startswith("deploy.sh: The step 'build and push the image")
    assert errors[1].endswith("The Deployment was not changed.")
    assert running.permissions() == [old, old, both]

    # An omitted option keeps the value of the cluster, not that of the failed run.
    running.set(down={})
    running.deploy()
    assert running.permissions()[3:] == [both, old]

    before = running.objects[DEPLOYMENT]["spec"]["template"]["metadata"]["annotations"]
    of_another_run = {"QueueArns": f"{QUEUE}dev-CP-queue,{QUEUE}other,{QUEUE}theirs"}
    running.set(meanwhile={"status": {"stack": of_another_run}})
    running.deploy(*change)
    assert running.permissions()[5:] == [both, ("other,theirs", "/new")]
    assert running.objects[CONFIG]["data"]["sqs_queue_url"].endswith("/other")
    # Pods read the ConfigMap only when they start.
    after = running.objects[DEPLOYMENT]["spec"]["template"]["metadata"]["annotations"]
    assert after["checksum/config"] != before["checksum/config"]


EIGHT_PODS = {"status": {"objects": {DEPLOYMENT: {"spec": {"replicas": 8}}}}}


@slow
@pytest.mark.parametrize(
    ("faults", "shown"),
    [
        ({"late_rollouts": 1, "meanwhile": EIGHT_PODS}, "The step 'wait for the rollout' failed"),
        ({"interrupted": "apply"}, "Interrupted in the step 'apply the manifests"),
        ({"invalid": "Deployment"}, "Deployment is invalid"),
        ({"down": {"curl": 0}}, "alb.example/health does not respond"),
        ({}, f"http://alb.example {PARAMETER} us-west-1"),  # test.sh fails
    ],
)
def test_failed_release_brings_back_deployment_and_configuration(
    running: Machine, checkout: Path, faults: dict[str, Any], shown: str
) -> None:
    # An operator has undone an earlier change by hand.
    objects = running.objects
    objects[DEPLOYMENT]["spec"]["template"]["spec"]["containers"][0]["image"] = "by hand"
    running.set(objects=objects, **faults)
    before = running.release()
    if "meanwhile" in faults:  # the autoscaler has added pods
        before[1]["spec"]["replicas"] = 8
    manifest = checkout / "k8s" / "deployment.yaml"
    deadline = "  progressDeadlineSeconds: 300\n"
    text = manifest.read_text().replace(deadline, f"{deadline}  minReadySeconds: 2\n")
    manifest.write_text(text.replace("  labels:\n", "  labels:\n    new: label\n", 2))
    test = "#!/bin/sh\necho $1 $TOKEN_SSM_PARAMETER $AWS_REGION\nexit 1\n"
    executable(checkout / "test.sh", test)

    result = running.run("--queue-name", "other", "--check", "alb")

    (apply,) = running.calls("kubectl", "apply")
    assert "minReadySeconds: 2" in apply["stdin"]
    assert shown in result.stdout + result.stderr
    assert result.returncode == (130 if "interrupted" in faults else 1)
    assert result.stderr.endswith("The deployment was undone: the earlier release serves again.\n")
    assert running.release() == before
    assert running.permissions()[-1][0] == "dev-CP-queue,other"


def check_fails(machine: Machine, meanwhile: dict[str, Any]) -> str:
    """Standard error of a run whose test.sh fails, and that finds a changed state from then on."""
    script = '#!/bin/sh\necho test of $1\ntest -e "$STAND_IN/passes"\n'
    executable(machine.project / "test.sh", script)
    machine.set(meanwhile={"curl": meanwhile})
    return machine.fail("--check", "alb")


@slow
@pytest.mark.usefixtures("checkout")
@pytest.mark.parametrize(
    ("fault", "result"),
    [
        ({"down": {"patch": 2, TEMPLATE: 2}}, "undone: the earlier release serves again.\n"),
        ({"interrupted": "patch"}, "undone: the earlier release serves again.\n"),
        ({"interrupted": "status"}, "undone, but not all pods serve yet: see kubectl"),
    ],
)
def test_rollback_outlasts_connection_errors_and_ctrl_c(
    running: Machine, fault: dict[str, Any], result: str
) -> None:
    before = running.release()
    errors = check_fails(running, fault)
    assert f"Going back to {container(before[1])['image']}, the earlier release" in errors
    assert result in errors.splitlines(keepends=True)[-1]
    assert running.release() == before


@slow
@pytest.mark.usefixtures("checkout")
def test_rollback_that_failed_is_reported_and_a_second_run_completes_the_release(
    running: Machine,
) -> None:
    errors = check_fails(running, {"down": {"patch": 0}})
    image = container(running.objects[DEPLOYMENT])["image"]
    assert "Unauthorized" in errors
    assert errors.endswith(f"Going back failed. The Deployment has {image}.\n")

    running.set(down={})  # the operator has logged in again
    (running.folder / "passes").touch()
    output = running.deploy("--check", "https://mail.example/")
    assert "the last run did not complete it" in output
    assert "test of https://mail.example\n" in output
    assert "nothing to change" in running.deploy()


@slow
def test_first_deployment_that_failed_can_be_run_again(machine: Machine) -> None:
    machine.set(late_rollouts=2)
    for queue, reason in ("other", "it is the first release"), ("dev-CP-queue", "not completed"):
        errors = machine.fail("--queue-name", queue)
        assert reason in errors.splitlines()[-1]
        assert len(machine.calls("kubectl", "rollout")) == 1, "it does not wait twice"
    # No node had room for the pods, and now one has.
    assert "start the rollout again" in machine.deploy()
    assert machine.calls("kubectl", "restart")
    assert "nothing to change" in machine.deploy()
    assert not machine.calls("kubectl", "restart")


@slow
def test_pods_that_fail_without_a_change_are_not_undone(running: Machine) -> None:
    running.set(late_rollouts=1)
    errors = running.fail()
    assert errors.endswith("failed. Correct the reasons above, and run this again.\n")
    assert not running.calls("kubectl", "patch")


@slow
@pytest.mark.parametrize(
    ("word", "result"),
    [
        ("ingressclass/alb", "in the step 'check tools, credentials and cluster'.\n"),
        ("get-login-password", "The Deployment was not changed.\n"),
        ("describe-target-groups", "The new release serves, and stays.\n"),
    ],
)
def test_interruption_is_explained_in_one_line(machine: Machine, word: str, result: str) -> None:
    machine.set(interrupted=word)
    errors = machine.fail(status=130)
    assert errors.startswith("deploy.sh: Interrupted in the step ")
    assert errors.endswith(result)
    assert errors.count("\n") == 1


@slow
def test_connection_error_is_retried_and_a_final_error_is_not(machine: Machine) -> None:
    machine.set(down={"status": 2, HOST: 2})
    machine.deploy()
    machine.set(down={"status": 0})
    errors = machine.fail()
    assert errors.startswith("error: You must be logged in to the server (Unauthorized)\n")
    assert "The step 'wait for the rollout' failed" in errors
    assert not machine.calls("sleep")


@slow
@pytest.mark.parametrize("check", [(), ("--check", "alb")])
def test_run_does_not_claim_or_undo_the_release_of_another(
    running: Machine, checkout: Path, check: tuple[str, ...]
) -> None:
    executable(checkout / "test.sh", "#!/bin/sh\nexit 1\n")
    theirs = {"spec": {"template": {"spec": {"containers": [{"image": "another"}]}}}}
    running.set(meanwhile={"status": {"objects": {DEPLOYMENT: theirs}}})
    errors = running.fail(*check)
    assert "The Deployment was changed meanwhile, to another." in errors
    assert "stays" not in errors
    assert container(running.objects[DEPLOYMENT])["image"] == "another"


@slow
def test_stopped_service_is_not_called_running(running: Machine) -> None:
    objects = running.objects
    objects[DEPLOYMENT]["spec"]["replicas"] = 0
    running.set(objects=objects)
    output = running.deploy("--queue-name", "other")
    assert output.count("note: the service is stopped: kubectl") == 2


@slow
def test_reason_of_a_failed_rollout_is_shown(machine: Machine) -> None:
    """The pods were rejected; or the ALB finds a pod unhealthy; or its container does not start."""
    unhealthy = {
        "conditions": [{"status": "False", "message": "the gate is closed"}],
        "containerStatuses": [{"ready": True}],
    }
    starting = {"containerStatuses": [{"ready": False}]}
    for pod, shown, hidden in (
        (None, "get events: the reason", "logs"),
        (unhealthy, "the gate is closed", "logs"),
        (starting, "logs pod/new: the reason", "the gate"),
    ):
        pods = {"pod/new": {"status": pod}} if pod else {}
        machine.set(late_rollouts=1, objects={**machine.objects, **pods})
        result = machine.run()
        assert result.stdout.count("Waiting for deployment") == 1
        assert shown in result.stderr
        assert hidden not in result.stderr
    assert len(machine.calls("kubectl", "logs")) == 2, "this start and the previous one"


@slow
def test_progress_of_the_rollout_is_shown_at_once(machine: Machine) -> None:
    os.mkfifo(machine.folder / "go")
    with machine.start() as process:
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
    first, last = machine.fail("--timeout", "1").splitlines()
    assert first == "describe ingress: the reason"
    assert last.startswith("deploy.sh: There is no ALB yet. See the events above, and kubectl")
    assert last.endswith("The new release serves, and stays.")


@slow
def test_failed_deletion_keeps_the_stack(running: Machine) -> None:
    for word, problem in (
        ("delete", "The Ingress was not deleted, so the ALB may be left. See the events"),
        ("namespace", "The namespace email-processor is still there"),
    ):
        running.set(down={word: 0})
        assert problem in running.fail("--delete").splitlines()[-1]
        assert not running.calls("aws", "delete-stack")


@slow
def test_delete_completes_without_eks(running: Machine) -> None:
    no_cluster = {"eks describe-cluster": "An error occurred (ResourceNotFoundException)"}
    made = {"ssm describe-parameters": PARAMETER}
    running.set(aws=running.aws | no_cluster | made)
    assert "not show the cluster other" in running.fail("--delete", "--cluster", "other")
    output = running.deploy("--delete")
    assert f"the cluster {CLUSTER} no longer exists" in output
    assert f"deleted {PARAMETER}\n" in output
    assert running.calls("aws", "delete-stack")


# --- With the pipeline's cluster ------------------------------------------------------------------


@pytest.mark.skipif(not CONTEXT, reason="CLUSTER_CONTEXT names no cluster")
def test_cluster_keeps_changes_by_hand_and_gets_them_back(tmp_path: Path) -> None:
    """The service is stopped, because no registry has its image: then a rollout ends at once."""
    machine = Machine(tmp_path, stand_ins=("docker", "curl", "aws"))
    clone(machine)

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
        return [config["data"], metadata["labels"], metadata["annotations"], deployment["spec"]]

    kubectl("scale", DEPLOYMENT, "--replicas", "0")
    kubectl("set", "env", DEPLOYMENT, "LOG_LEVEL=DEBUG")
    host = {"status": {"loadBalancer": {"ingress": [{"hostname": "alb.example"}]}}}
    ingress = ("ingress/email-processor-ingress", "--type", "merge", "--patch", json.dumps(host))
    kubectl("patch", "--subresource", "status", *ingress)
    eventually(lambda: "NewReplicaSetAvailable" in kubectl("get", DEPLOYMENT, "--output", "yaml"))

    machine.deploy("--context", CONTEXT)
    assert "nothing to change" in machine.deploy("--context", CONTEXT)
    before = release()
    assert {"name": "LOG_LEVEL", "value": "DEBUG"} in container({"spec": before[3]})["env"]

    for name, old, new in (
        ("deployment", "  labels:\n", "  labels:\n    new: label\n"),
        ("deployment", "  strategy:\n", "  minReadySeconds: 2\n  strategy:\n"),
        ("pdb", "maxUnavailable: 1", "maxUnavailable: -1"),
    ):
        manifest = machine.project / "k8s" / f"{name}.yaml"
        manifest.write_text(manifest.read_text().replace(old, new, 2))
    errors = machine.fail("--context", CONTEXT, "--queue-name", "other")
    assert errors.endswith("The deployment was undone: the earlier release serves again.\n")
    assert release() == before


# --- With the AWS CLI -----------------------------------------------------------------------------


@pytest.fixture
def account(emulator: str, tmp_path: Path) -> Machine:
    """An emulated AWS account with a cluster, production's token and a load balancer."""
    if not shutil.which("aws"):
        pytest.skip("the AWS CLI is not installed")
    machine = Machine(tmp_path, emulator, ("docker", "kubectl", "curl"))
    eks = machine.client("eks")
    eks.create_cluster(name=CLUSTER, roleArn=ROLE, resourcesVpcConfig={})
    issuer = eks.describe_cluster(name=CLUSTER)["cluster"]["identity"]["oidc"]["issuer"]
    machine.client("iam").create_open_id_connect_provider(Url=issuer, ThumbprintList=[])
    machine.client("ssm").put_parameter(Name=PARAMETER, Value="production's", Type="SecureString")
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


def stack_of(account: Machine) -> dict[str, str]:
    """The parameters of the only stack."""
    (stack,) = account.client("cloudformation").describe_stacks()["Stacks"]
    return {each["ParameterKey"]: each["ParameterValue"] for each in stack["Parameters"]}


def token_of(account: Machine, name: str) -> str:
    ssm = account.client("ssm")
    return str(ssm.get_parameter(Name=name, WithDecryption=True)["Parameter"]["Value"])


@slow
def test_environment_is_made_kept_by_a_second_run_then_deleted(account: Machine) -> None:
    status = git(PROJECT, "status", "--porcelain")
    parameter = "/email-service/test/api-token"
    key = f"arn:aws:kms:{REGION}:{ACCOUNT}:key/1a-2b"
    names = ("--environment", "test", "--context", "mine", "--platform", "linux/arm64")
    options = ("--queue-name", "new", "--create-queue", "--parameter", "RateLimit=500")
    first = (*names, *options, "--parameter", f"TokenKeyArn={key}")

    result = account.run(*first, shell=("bash", "-x"), API_TOKEN=TOKEN)

    assert result.returncode == 0, result
    assert re.findall(r"^\[(\d)/8\] \d+:\d\d \S", result.stdout, re.M) == list("12345678")
    last = result.stdout.splitlines()[-1]
    assert re.fullmatch(rf"Deployed in \d+ s: http://{re.escape(account.hostname)}", last)
    # The token is in no argument, no variable, no output, and not in the shell's trace.
    assert token_of(account, parameter) == TOKEN
    (described,) = account.client("ssm").describe_parameters(
        ParameterFilters=[{"Key": "tag:made-by-stack", "Values": ["email-processor-test"]}]
    )["Parameters"]
    assert (described["Type"], described["KeyId"]) == ("SecureString", key)
    calls = [*account.calls("docker"), *account.calls("kubectl")]
    seen = result.stdout + result.stderr + json.dumps(calls, ensure_ascii=False)
    assert "+ aws ssm put-parameter" in result.stderr
    assert not [part for part in (TOKEN, TOKEN[:14], TOKEN[-6:], json.dumps(TOKEN)) if part in seen]
    assert not [call for call in calls if "API_TOKEN" in call["names"]]
    stack = stack_of(account)
    assert stack["RateLimit"] == "500"
    assert stack["TokenParameterArns"].strip("[']") == f"{PARAMETERS}{parameter}"
    assert stack["LoadBalancerFullName"].startswith("app/k8s-email/")
    assert stack["TargetGroupFullName"].startswith("targetgroup/k8s-email/")
    objects = account.objects
    role = account.client("iam").get_role(RoleName="email-processor-role-test")["Role"]
    annotations = objects["serviceaccount/email-processor-sa"]["metadata"]["annotations"]
    assert annotations["eks.amazonaws.com/role-arn"] == role["Arn"]
    (repository,) = account.client("ecr").describe_repositories()["repositories"]
    image = container(objects[DEPLOYMENT])["image"]
    assert re.fullmatch(re.escape(repository["repositoryUri"]) + "@sha256:[0-9a-f]{64}", image)
    (build,) = account.calls("docker", "build", "linux/arm64")
    assert re.search(r":[0-9a-f]{12}(-dirty-[0-9a-f]{12})?-arm64$", build["arguments"][-2])
    assert objects[DEPLOYMENT]["spec"]["replicas"] == 2, "the minimum of the autoscaler"
    assert account.calls("kubectl", "--context", "mine", "apply")
    assert not (account.folder / "kubeconfig").exists(), "the operator's own is not written"

    output = account.deploy(*names, API_TOKEN="another one")
    assert f"keep {parameter}; API_TOKEN is not used" in output
    assert "nothing to change" in output
    assert (stack_of(account), account.objects) == (stack, objects)
    assert token_of(account, parameter) == TOKEN
    assert git(PROJECT, "status", "--porcelain") == status

    output = account.deploy(*names, "--delete")
    deleted = [call["arguments"][4:7] for call in account.calls("kubectl", "delete")]
    # The controller can only remove the ALB while the namespace exists.
    assert deleted == [
        ["delete", "ingress", "email-processor-ingress"],
        ["delete", "namespace", "email-processor"],
    ]
    assert "namespace/email-processor" not in account.objects
    assert account.client("cloudformation").describe_stacks()["Stacks"] == []
    assert token_of(account, PARAMETER) == "production's"
    for queue in ("new", "new-dlq"):
        assert re.search(rf"kept {queue}; to delete it: .* --queue-url \S+/{queue}\n", output)
