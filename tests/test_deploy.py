"""deploy.sh: the real AWS command line against an emulated AWS; docker and kubectl are stand-ins.

The stand-ins (stand_in.py) record what they were given and answer as a registry and a cluster do.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import kubernetes_validate
import pytest
import yaml
from conftest import PROJECT, eventually, free_port
from test_scripts import assert_one_line, environment, executable, only

pytestmark = pytest.mark.skipif(shutil.which("aws") is None, reason="the AWS CLI is not installed")

DEPLOY = PROJECT / "deploy.sh"
SETUP = (PROJECT / "SETUP.md").read_text("utf-8")
ACCOUNT = "123456789012"  # the emulator's
REGION = "us-west-1"
REGISTRY = f"{ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com"
CLUSTER = "dev-CP-EKS-CLUSTER"
PARAMETER = "/email-service/api-token"
TOKEN = "$DJISA<$#45ex \"3Rt\\Yr' é\N{GRINNING FACE}"
CERTIFICATE = f"arn:aws:acm:{REGION}:{ACCOUNT}:certificate/1a-2b"


@pytest.fixture(scope="module")
def emulator() -> Iterator[str]:
    """An AWS of this module's own, as the tests here empty it; its URL."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            eventually(lambda: answers(f"{url}/moto-api/"))
            yield url
        finally:
            process.terminate()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url):
            return True
    except OSError:
        return False


@dataclass
class World:
    """An AWS account with a cluster, and a machine with docker and kubectl."""

    emulator: str
    folder: Path
    session: boto3.Session = field(
        default_factory=lambda: boto3.Session("test", "test", region_name=REGION)
    )

    def __post_init__(self) -> None:
        request = urllib.request.Request(f"{self.emulator}/moto-api/reset", method="POST")
        urllib.request.urlopen(request).close()
        for tool in ("docker", "kubectl"):
            stand_in = [sys.executable, str(PROJECT / "tests" / "stand_in.py"), tool]
            executable(self.folder / "bin" / tool, f'#!/bin/sh\nexec {shlex.join(stand_in)} "$@"\n')
        (self.folder / "calls.jsonl").touch()
        eks = self.client("eks")
        eks.create_cluster(
            name=CLUSTER, roleArn=f"arn:aws:iam::{ACCOUNT}:role/eks", resourcesVpcConfig={}
        )
        issuer = eks.describe_cluster(name=CLUSTER)["cluster"]["identity"]["oidc"]["issuer"]
        self.client("iam").create_open_id_connect_provider(Url=issuer, ThumbprintList=[])
        self.queue_url = self.client("sqs").create_queue(QueueName="dev-CP-queue")["QueueUrl"]
        self.set(
            pushed=[],
            built=[],
            build_fails=False,
            objects={},
            revisions=[],
            broken=[],
            rollout_fails=False,
            controllers=["aws-load-balancer-controller"],
            hostname=self.make_load_balancer(),
        )

    def make_load_balancer(self) -> str:
        """What the Ingress's controller would make; its host name."""
        subnets = self.client("ec2").describe_subnets()["Subnets"]
        elbv2 = self.client("elbv2")
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
        return str(balancer["DNSName"])

    def client(self, service: str) -> Any:
        return self.session.client(service, endpoint_url=self.emulator)

    @property
    def state(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "state.json").read_text()))

    def set(self, **changes: Any) -> None:
        path = self.folder / "state.json"
        before = self.state if path.exists() else {}
        path.write_text(json.dumps({**before, **changes}))

    def calls(self, tool: str = "") -> list[dict[str, Any]]:
        lines = (self.folder / "calls.jsonl").read_text().splitlines()
        return [call for call in map(json.loads, lines) if call["tool"] in (tool or call["tool"],)]

    def verbs(self, tool: str) -> list[str]:
        """The calls' first words, options that stand before them left out."""
        words = [call["arguments"] for call in self.calls(tool)]
        return [w[4] if w[0] == "--kubeconfig" else w[0] for w in words]

    def run(
        self, *options: str, account: str = ACCOUNT, trace: bool = False, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        shell = ["bash", "-x"] if trace else []
        return self.execute(*shell, str(DEPLOY), REGISTRY, account, *options, **variables)

    def execute(
        self, *command: str, cwd: Path = PROJECT, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        (self.folder / "calls.jsonl").write_text("")
        given = {
            "AWS_ENDPOINT_URL": self.emulator,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "KUBECONFIG": str(self.folder / "kubeconfig"),
            "NO_PROXY": "127.0.0.1",
            "PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "STAND_IN": str(self.folder),
            **variables,
        }
        return subprocess.run(
            command,
            cwd=cwd,
            env=environment(**given),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def deploy(self, *options: str, **variables: str) -> str:
        """Run it, and it succeeds without a warning; what it prints."""
        result = self.run(*options, **variables)
        assert (result.returncode, result.stderr) == (0, ""), result
        return result.stdout

    def stack(self) -> dict[str, str]:
        """The parameters of the stack; empty if there is none."""
        stacks = self.client("cloudformation").describe_stacks()["Stacks"]
        return {
            parameter["ParameterKey"]: parameter["ParameterValue"]
            for stack in stacks
            for parameter in stack["Parameters"]
        }

    def token(self, name: str = PARAMETER) -> dict[str, Any]:
        answer = self.client("ssm").get_parameter(Name=name, WithDecryption=True)
        return dict(answer["Parameter"])

    def queues(self) -> set[str]:
        urls = self.client("sqs").list_queues().get("QueueUrls", [])
        return {url.rpartition("/")[2] for url in urls}

    def digest_of(self, repository: str) -> str:
        """The only image that was pushed there, as the stand-in names it."""
        (pushed,) = self.state["pushed"]
        assert pushed.startswith(f"{repository}:")
        return f"{repository}@sha256:{hashlib.sha256(pushed.encode()).hexdigest()}"

    def applied(self) -> list[list[dict[str, Any]]]:
        """The manifests of each `kubectl apply -f -`."""
        return [
            list(yaml.safe_load_all(call["stdin"]))
            for call in self.calls("kubectl")
            if call["arguments"][-3:] == ["apply", "-f", "-"]
        ]


@pytest.fixture
def world(emulator: str, tmp_path: Path) -> World:
    return World(emulator, tmp_path)


def git_status() -> str:
    command = ["git", "--no-optional-locks", "status", "--porcelain"]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True).stdout


def git(folder: Path, *arguments: str) -> str:
    name = ("-c", "user.name=test", "-c", "user.email=test@example.com")
    command = ["git", *name, "--no-optional-locks", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def clean_checkout(tmp_path: Path) -> Path:
    """The project as it is now, committed."""
    folder = tmp_path / "checkout"
    for name in git(PROJECT, "ls-files", "-co", "--exclude-standard").splitlines():
        if (PROJECT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(PROJECT / name, folder / name)
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "as it is now")
    return folder


def container(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    (deployment,) = [each for each in manifests if each["kind"] == "Deployment"]
    return dict(deployment["spec"]["template"]["spec"]["containers"][0])


# --- A run, and another ---------------------------------------------------------------------------


def test_first_run_makes_everything_and_the_second_changes_nothing(world: World) -> None:
    status = git(PROJECT, "status", "--porcelain")
    result = world.run(API_TOKEN=TOKEN, trace=True)
    assert result.returncode == 0, result

    steps = re.findall(r"^\[(\d)/7\] \d+:\d\d \S", result.stdout, re.MULTILINE)
    assert steps == ["1", "2", "3", "4", "5", "6", "7"]
    url = f"http://{world.state['hostname']}"
    assert re.fullmatch(rf"Deployed in \d+ s: {url}", result.stdout.splitlines()[-1])
    assert world.verbs("docker").count("build") == world.verbs("docker").count("push") == 1
    assert (world.token()["Type"], world.token()["Value"]) == ("SecureString", TOKEN)

    # The token is in no argument, no variable, no output, and not in the shell's trace.
    seen = result.stdout + result.stderr + json.dumps(world.calls(), ensure_ascii=False)
    assert "+ aws ssm put-parameter" in seen
    for part in (TOKEN, TOKEN[:14], TOKEN[-6:], json.dumps(TOKEN)):
        assert part not in seen
    assert not [call for call in world.calls() if "API_TOKEN" in call["names"]]

    role = world.client("iam").get_role(RoleName="email-processor-role")["Role"]
    (repository,) = world.client("ecr").describe_repositories()["repositories"]
    before, after = world.applied()
    assert before[0]["kind"] == "Namespace"
    assert after[0]["kind"] == "Deployment"
    manifests = {each["kind"]: each for each in before}
    assert {"Service", "Ingress", "ConfigMap"} <= set(manifests)
    assert container(after)["image"] == world.digest_of(repository["repositoryUri"])
    annotations = manifests["ServiceAccount"]["metadata"]["annotations"]
    assert annotations == {"eks.amazonaws.com/role-arn": role["Arn"]}
    assert manifests["ConfigMap"]["data"] == {
        "sqs_queue_url": f"https://sqs.{REGION}.amazonaws.com/{ACCOUNT}/dev-CP-queue",
        "aws_region": REGION,
    }
    watched = world.stack()
    assert watched["LoadBalancerFullName"].startswith("app/k8s-email/")
    assert watched["TargetGroupFullName"].startswith("targetgroup/k8s-email/")

    output = world.deploy(API_TOKEN="another one")
    assert f"keep {PARAMETER}" in output
    assert "which the registry has" in output
    assert "nothing to change" in output
    assert not {"build", "push"} & set(world.verbs("docker"))
    assert world.stack() == watched
    assert world.token()["Value"] == TOKEN
    assert len(world.state["revisions"]) == 1
    assert git(PROJECT, "status", "--porcelain") == status


def test_options_reach_stack_and_manifests_and_are_kept_by_what_follows(world: World) -> None:
    names = "/team/a,/team/b"
    world.client("ssm").put_parameter(Name="/team/b", Value="theirs", Type="SecureString")
    output = world.deploy(
        *("--certificate-arn", CERTIFICATE, "--token-parameter", names),
        *("--alarm-email", "on-call@example.com", "--rate-limit", "500"),
    )
    assert "keep /team/b" in output
    assert output.splitlines()[-2].endswith(f": https://{world.state['hostname']}")
    expected = {
        "TokenParameterNames": names,
        "AlarmEmail": "on-call@example.com",
        "RateLimit": "500",
        "ClusterName": CLUSTER,
        "QueueName": "dev-CP-queue",
    }
    assert world.stack().items() >= expected.items()
    before, after = world.applied()
    (ingress,) = [each for each in before if each["kind"] == "Ingress"]
    annotations = ingress["metadata"]["annotations"]
    assert annotations["alb.ingress.kubernetes.io/certificate-arn"] == CERTIFICATE
    assert {"name": "TOKEN_SSM_PARAMETER", "value": names} in container(after)["env"]

    assert list(yaml.safe_load_all(world.deploy("--render"))) == before + after
    assert "apply" not in world.verbs("kubectl")

    world.deploy("--delete")
    assert world.token("/team/b")["Value"] == "theirs", "it was not made here"


def test_queue_is_made_on_request_and_outlives_the_rest(world: World) -> None:
    names = ("--queue-name", "new", "--environment", "test")
    output = world.deploy(*names, "--create-queue")
    made_up = world.token()["Value"]
    assert re.fullmatch(r"[A-Za-z0-9_-]{43}", made_up)
    assert made_up not in output
    assert f"--name {PARAMETER}" in output
    assert world.queues() == {"dev-CP-queue", "new", "new-dlq"}
    (stack,) = world.client("cloudformation").describe_stacks()["Stacks"]
    assert stack["StackName"] == "email-processor-test"
    (config,) = [m for part in world.applied() for m in part if m["kind"] == "ConfigMap"]
    assert config["data"]["sqs_queue_url"].endswith(f"/{ACCOUNT}/new")

    output = world.deploy(*names, "--delete")
    deleted = [c["arguments"][4:7] for c in world.calls("kubectl") if "delete" in c["arguments"]]
    assert deleted == [
        ["delete", "ingress", "email-processor-ingress"],
        ["delete", "namespace", "email-processor"],
    ]
    assert world.stack() == {}
    assert f"deleted {PARAMETER}" in output
    assert world.client("ssm").describe_parameters()["Parameters"] == []
    assert re.search(r"kept \S+/new with its messages; to delete it: aws sqs delete-queue", output)
    assert world.deploy(*names, "--delete").endswith("there is none\nDeleted.\n")


def test_queues_are_deleted_on_a_further_word_alone(world: World) -> None:
    world.set(build_fails=True)  # after the stack
    assert world.run("--queue-name", "new", "--create-queue").returncode == 1
    assert world.queues() == {"dev-CP-queue", "new", "new-dlq"}
    world.deploy("--delete", "--delete-queues")
    assert world.queues() == {"dev-CP-queue"}


def test_deployment_by_hand_applies_the_same_manifests(world: World, clean_checkout: Path) -> None:
    guide = SETUP.split("## Deploy by hand")[1]
    commands = guide.split("```bash\n")[1].split("```")[0]
    result = world.execute("bash", "-euo", "pipefail", "-c", commands, cwd=clean_checkout)
    assert result.returncode == 0, result
    assert result.stdout.endswith(world.state["hostname"])
    assert re.fullmatch(r"[A-Za-z0-9+/]{43}=", world.token()["Value"])
    (by_hand,) = world.applied()
    assert container(by_hand)["image"] == world.digest_of(f"{REGISTRY}/email-processor")
    assert len(by_hand) == len(list((PROJECT / "k8s").glob("*.yaml"))) + 3  # of two files


# --- What can go wrong ----------------------------------------------------------------------------


def assert_nothing_was_changed(world: World) -> None:
    assert world.stack() == {}
    assert world.state["objects"] == {}
    assert not {"build", "push", "login"} & set(world.verbs("docker"))
    assert not {"apply", "delete", "rollout"} & set(world.verbs("kubectl"))
    assert world.client("ssm").describe_parameters()["Parameters"] == []


def test_all_problems_are_listed_at_once_and_nothing_is_changed(world: World) -> None:
    world.client("iam").delete_open_id_connect_provider(
        OpenIDConnectProviderArn=world.client("iam").list_open_id_connect_providers()[
            "OpenIDConnectProviderList"
        ][0]["Arn"]
    )
    world.client("sqs").delete_queue(QueueUrl=world.queue_url)
    world.set(controllers=["coredns"])
    result = world.run()
    assert result.returncode == 1
    *problems, summary = result.stderr.splitlines()
    assert [
        word
        for problem, word in zip(
            problems, ["OIDC provider", "AWS Load Balancer Controller", "dev-CP-queue"], strict=True
        )
        if word in problem
    ] == ["OIDC provider", "AWS Load Balancer Controller", "dev-CP-queue"]
    assert summary.startswith("deploy.sh: 3 problem(s)")
    assert_nothing_was_changed(world)


@pytest.mark.parametrize(
    ("options", "account", "problem"),
    [
        (["--cluster", "other"], ACCOUNT, "There is no cluster other in us-west-1"),
        ([], "999999999999", f"The AWS credentials are of account {ACCOUNT}, not 999999999999"),
        (["--region", "eu-west-1"], ACCOUNT, f"The registry {REGISTRY} is not the one of account"),
        (["--queue-name", "dev-CP-queue", "--create-queue"], ACCOUNT, "exists already"),
    ],
)
def test_preflight_refuses(world: World, options: list[str], account: str, problem: str) -> None:
    result = world.run(*options, account=account)
    assert result.returncode == 1
    assert problem in result.stderr
    assert "nothing was changed" in result.stderr
    assert_nothing_was_changed(world)


def test_missing_tools_are_named_together(world: World, tmp_path: Path) -> None:
    path = only(tmp_path / "few", "bash", "mktemp", "rm", "dirname", "grep", "tail", "cat", "git")
    result = world.run(PATH=path)
    assert result.returncode == 1
    for tool in ("aws", "docker", "kubectl"):
        assert f"{tool} is missing: install it (https://" in result.stderr
    assert_nothing_was_changed(world)


def test_new_settings_restart_the_pods_and_a_failed_roll_out_is_undone(world: World) -> None:
    world.deploy()
    config = "configmap/email-processor-config"
    old = {**world.state["objects"][config], "data": {"sqs_queue_url": "https://sqs/old"}}

    world.set(objects={**world.state["objects"], config: old})
    assert "deployment.apps/email-processor restarted for its new settings" in world.deploy()
    assert len(world.state["revisions"]) == 2
    good = world.state["objects"]["deployment.apps/email-processor"]

    world.client("ssm").put_parameter(Name="/other", Value="x", Type="SecureString")
    world.set(rollout_fails=True, objects={**world.state["objects"], config: old})
    result = world.run("--token-parameter", "/other")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == (
        "deploy.sh: The roll-out failed, for the reasons above, and was undone: revision 2 serves "
        "again. Correct them and run this again."
    )
    assert "Back-off pulling image" in result.stderr
    assert "AWS_REGION must be a region" in result.stderr
    assert "Deployed" not in result.stdout
    assert world.state["objects"]["deployment.apps/email-processor"] == good
    assert world.state["objects"][config] == old


def test_failed_first_roll_out_says_that_there_is_nothing_to_go_back_to(world: World) -> None:
    world.set(rollout_fails=True)
    result = world.run()
    assert result.returncode == 1
    assert "there is nothing to go back to" in result.stderr.splitlines()[-1]
    assert not [call for call in world.calls("kubectl") if "undo" in call["arguments"]]


def test_failed_build_is_one_line_after_its_log_and_applies_nothing(world: World) -> None:
    world.set(build_fails=True)
    result = world.run()
    assert result.returncode == 1
    log, line = result.stderr.splitlines()
    assert log.startswith("ERROR: failed to solve")
    assert line.startswith("deploy.sh: The image was not built")
    assert world.state["objects"] == {}


def test_service_without_a_load_balancer_in_time_is_a_failure(world: World) -> None:
    world.set(hostname="")
    result = world.run("--timeout", "1")
    assert result.returncode == 1
    assert "has no ALB after 1 s" in result.stderr.splitlines()[-1]


# --- Instead of a run -----------------------------------------------------------------------------


def test_dry_run_says_what_would_be_done_and_changes_nothing(world: World) -> None:
    output = world.deploy("--dry-run", "--alarm-email", "on-call@example.com")
    assert "AlarmEmail=on-call@example.com" in output
    assert f"would make the token parameter {PARAMETER}" in output
    assert output.endswith("Nothing was changed.\n")
    assert_nothing_was_changed(world)


def test_another_region_is_rendered_everywhere(world: World) -> None:
    region = "eu-west-1"
    result = world.run("--render", "--region", region)
    assert result.returncode == 0, result
    assert REGION not in result.stdout.replace(REGISTRY, "")
    assert f"https://sqs.{region}.amazonaws.com/{ACCOUNT}/dev-CP-queue" in result.stdout


@pytest.mark.parametrize("certificate", ["none", CERTIFICATE])
def test_manifests_are_rendered_without_any_tool_but_git(
    world: World, tmp_path: Path, certificate: str
) -> None:
    tools = ("bash", "mktemp", "rm", "dirname", "grep", "tail", "cat", "cut", "head", "sed", "awk")
    result = world.run(
        *("--render", "--certificate-arn", certificate), PATH=only(tmp_path / "few", *tools, "git")
    )
    assert result.returncode == 0
    assert all(line.startswith("deploy.sh: note: ") for line in result.stderr.splitlines())
    manifests = list(yaml.safe_load_all(result.stdout))
    for manifest in manifests:
        kubernetes_validate.validate(manifest, "1.34", strict=True)
    assert ("ssl-redirect" in result.stdout) == (certificate != "none")
    placeholders = r"\b(ACCOUNT_ID|IMAGE|CERTIFICATE_ARN|WEB_ACL_ARN)\b|# with"
    assert not re.search(placeholders, result.stdout)


# --- Arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "ECR_REGISTRY and AWS_ACCOUNT_ID are needed"),
        ([REGISTRY], "ECR_REGISTRY and AWS_ACCOUNT_ID are needed"),
        ([REGISTRY, ACCOUNT, "more"], "nothing more"),
        (["http://registry", ACCOUNT], "ECR_REGISTRY 'http://registry' is not a registry's"),
        ([REGISTRY, "12345"], "AWS_ACCOUNT_ID '12345' is not an account's 12 digits"),
        ([REGISTRY, ACCOUNT, "--regoin", "x"], "Unknown option '--regoin'"),
        ([REGISTRY, ACCOUNT, "--region"], "--region needs a value"),
        ([REGISTRY, ACCOUNT, "--region", "west"], "--region 'west' is not a region"),
        ([REGISTRY, ACCOUNT, "--token-parameter", "token"], "is not a parameter's name"),
        ([REGISTRY, ACCOUNT, "--certificate-arn", "x"], "is not the ARN of an ACM certificate"),
        ([REGISTRY, ACCOUNT, "--timeout", "0"], "--timeout '0' is not a number of seconds"),
        ([REGISTRY, ACCOUNT, "--queue-name", "a;b"], "--queue-name 'a;b' is not a queue's name"),
        ([REGISTRY, ACCOUNT, "--queue-name", "a.fifo", "--create-queue"], "standard queues"),
        ([REGISTRY, ACCOUNT, "--render", "--delete"], "Only one of"),
        ([REGISTRY, ACCOUNT, "--delete-queues"], "--delete-queues goes with --delete"),
    ],
)
def test_wrong_argument_is_one_line_and_status_2(arguments: list[str], problem: str) -> None:
    result = subprocess.run(
        [DEPLOY, *arguments], env=environment(), capture_output=True, text=True, timeout=60
    )
    assert_one_line(result, problem, status=2, name="deploy.sh: ")


def test_help_names_every_option_and_no_other() -> None:
    shown = subprocess.run(
        [DEPLOY, "--help"], env=environment(), capture_output=True, text=True, timeout=60
    ).stdout
    parser = DEPLOY.read_text("utf-8").split("read_arguments() {")[1].split("\n}\n")[0]
    taken = set(re.findall(r"--[a-z-]+", "".join(re.findall(r"^ +(?:-h|--).*", parser, re.M))))
    assert set(re.findall(r"^  (--[a-z-]+)", shown, re.M)) == taken - {"--help"}
    runs = re.findall(r"\./deploy\.sh REGISTRY ACCOUNT_ID (.+)", SETUP)
    assert {option for run in runs for option in re.findall(r"--[a-z-]+", run)} <= taken
