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
from dataclasses import dataclass
from functools import cache
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
ROLE = f"arn:aws:iam::{ACCOUNT}:role/email-processor-role"
CONFIG = "configmap/email-processor-config"
DEPLOYMENT = "deployment.apps/email-processor"


@pytest.fixture(scope="module")
def emulator() -> Iterator[str]:
    """An AWS of this module's own, as the tests here empty it; its URL."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    # Certificates are issued at once.
    variables = environment(MOTO_ACM_VALIDATION_WAIT="0", COVERAGE_PROCESS_CONFIG="")
    with subprocess.Popen(
        command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
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


@cache
def client(service: str, url: str) -> Any:
    return boto3.client(
        service,
        region_name=REGION,
        endpoint_url=url,
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )


@dataclass
class World:
    """An AWS account with a cluster, and a machine with docker and kubectl."""

    emulator: str
    folder: Path

    def __post_init__(self) -> None:
        request = urllib.request.Request(f"{self.emulator}/moto-api/reset", method="POST")
        urllib.request.urlopen(request).close()
        for tool in ("docker", "kubectl", "sleep"):
            stand_in = [sys.executable, str(PROJECT / "tests" / "stand_in.py"), tool]
            executable(self.folder / "bin" / tool, f'#!/bin/sh\nexec {shlex.join(stand_in)} "$@"\n')
        (self.folder / "calls.jsonl").touch()
        eks = self.client("eks")
        eks.create_cluster(
            name=CLUSTER, roleArn=f"arn:aws:iam::{ACCOUNT}:role/eks", resourcesVpcConfig={}
        )
        cluster = eks.describe_cluster(name=CLUSTER)["cluster"]
        self.issuer = str(cluster["identity"]["oidc"]["issuer"])
        self.client("iam").create_open_id_connect_provider(Url=self.issuer, ThumbprintList=[])
        self.queue_url = self.client("sqs").create_queue(QueueName="dev-CP-queue")["QueueUrl"]
        self.set(
            buildx=True,
            pushed=[],
            built=[],
            build_fails=False,
            unreadable="",
            warning="",
            objects={},
            last_applied={},
            revisions=[],
            broken=[],
            rollout_fails=False,
            refused="",
            ingress_classes=["alb ingress.k8s.aws/alb"],
            paused=False,
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
        return client(service, self.emulator)

    @property
    def state(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "state.json").read_text()))

    def set(self, **changes: Any) -> None:
        path = self.folder / "state.json"
        before = self.state if path.exists() else {}
        path.write_text(json.dumps({**before, **changes}))

    def answer(self, **answers: str) -> None:
        """What these commands of AWS print from now on.

        So do those with which every run begins and ends, which saves time where they do not matter.
        """
        usual = {
            "sts_get_caller_identity": ACCOUNT,
            "eks_describe_cluster": f"ACTIVE\t{self.issuer}",
            "eks_update_kubeconfig": "",
            "iam_list_open_id_connect_providers": f":oidc-provider/{self.issuer[8:]}",
            "ecr_get_login_password": "password",
            "elbv2_describe_load_balancers": "arn:aws:elasticloadbalancing:loadbalancer/app/a/1",
            "elbv2_describe_target_groups": "arn:aws:elasticloadbalancing:targetgroup/b/2",
        }
        cases = ""
        for command, text in {**usual, **answers}.items():
            words = command.replace("_", " ", 1).replace("_", "-")
            cases += f"'{words}') printf %s {shlex.quote(text)} ;;\n"
        executable(
            self.folder / "bin" / "aws",
            f'#!/bin/sh\necho "$@" >>{self.folder}/aws\n'
            f'case "$1 $2" in\n{cases}*) exec {shutil.which("aws")} "$@" ;;\nesac\n',
        )

    def answer_for_stack(self, shown: str, **answers: str) -> None:
        """A stack that is there, with this status and these values, and takes what it is given."""
        self.answer(cloudformation_deploy="", cloudformation_describe_stacks=shown, **answers)

    def answered(self, command: str) -> list[str]:
        """The calls of this command of AWS."""
        lines = (self.folder / "aws").read_text().splitlines()
        return [line for line in lines if line.startswith(command)]

    def runs_deployment(self, role: str) -> None:
        """The cluster has one already, with this role."""
        account = {"metadata": {"annotations": {"eks.amazonaws.com/role-arn": role}}}
        names = ("namespace/email-processor", "serviceaccount/email-processor-sa")
        self.set(objects=dict(zip(names, ({}, account), strict=True)))

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
            "COVERAGE_PROCESS_CONFIG": "",  # nothing here runs app.py
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

    def given_to_the_stack(self, *names: str) -> list[tuple[str, ...]]:
        """The values of these parameters in each deployment of the stack, the newest last."""
        cloudformation = self.client("cloudformation")
        found = []
        for change_set in cloudformation.list_change_sets(StackName="email-processor")["Summaries"]:
            values = cloudformation.describe_change_set(
                StackName="email-processor", ChangeSetName=change_set["ChangeSetId"]
            )["Parameters"]
            given = {value["ParameterKey"]: value.get("ParameterValue", "") for value in values}
            found.append(tuple(given[name] for name in names))
        return found

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

    steps = re.findall(r"^\[(\d)/8\] \d+:\d\d \S", result.stdout, re.MULTILINE)
    assert steps == ["1", "2", "3", "4", "5", "6", "7", "8"]
    url = f"http://{world.state['hostname']}"
    assert re.fullmatch(rf"Deployed in \d+ s: {url}", result.stdout.splitlines()[-1])
    assert world.verbs("docker").count("build") == world.verbs("docker").count("push") == 1
    # It has no limit but progressDeadlineSeconds.
    (wait,) = [c["arguments"][4:] for c in world.calls("kubectl") if "rollout" in c["arguments"]]
    assert wait == ["rollout", "status", DEPLOYMENT.replace(".apps", "")]
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
    for controller in ("elbv2.k8s.aws", "eks.amazonaws.com"):
        gate = f"{controller}/pod-readiness-gate-inject"
        assert before[0]["metadata"]["labels"][gate] == "enabled"
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


OUTPUTS = {
    "RepositoryUri": f"{REGISTRY}/theirs",
    "RoleArn": f"arn:aws:iam::{ACCOUNT}:role/theirs",
    "QueueUrl": f"https://sqs.{REGION}.amazonaws.com/{ACCOUNT}/theirs",
    "WebAclArn": f"arn:aws:wafv2:{REGION}:{ACCOUNT}:regional/webacl/theirs/1f-2e",
}


def make_stack_with_other_outputs(world: World) -> None:
    """The emulator gives a stack its outputs only when it is not made by a change set."""
    template = {
        "Resources": {"Topic": {"Type": "AWS::SNS::Topic"}},
        "Outputs": {name: {"Value": value} for name, value in OUTPUTS.items()},
    }
    world.client("cloudformation").create_stack(
        StackName="email-processor", TemplateBody=json.dumps(template)
    )


def test_options_and_outputs_reach_the_manifests_and_are_kept_by_what_follows(world: World) -> None:
    world.answer()
    make_stack_with_other_outputs(world)
    acm, sqs = world.client("acm"), world.client("sqs")
    certificate = acm.request_certificate(DomainName="email.example.com")["CertificateArn"]
    sqs.create_queue(QueueName="dead-letters")
    redrive = {
        "deadLetterTargetArn": f"arn:aws:sqs:{REGION}:{ACCOUNT}:dead-letters",
        "maxReceiveCount": 5,
    }
    sqs.set_queue_attributes(
        QueueUrl=world.queue_url, Attributes={"RedrivePolicy": json.dumps(redrive)}
    )
    names = "/team/a,/team/b"
    world.client("ssm").put_parameter(Name="/team/b", Value="theirs", Type="SecureString")
    not_kept = ("--platform", "linux/arm64", "--context", "mine")
    output = world.deploy(
        *("--certificate-arn", certificate, "--token-parameter", names),
        *("--alarm-email", "on-call@example.com", "--rate-limit", "500", *not_kept),
    )
    assert "keep /team/b" in output
    assert "dead-letter queue" not in output
    assert output.splitlines()[-2].endswith(f": https://{world.state['hostname']}")
    expected = {
        "TokenParameterNames": names,
        "AlarmEmail": "on-call@example.com",
        "RateLimit": "500",
        "ClusterName": CLUSTER,
        "QueueName": "dev-CP-queue",
        "DeadLetterQueueName": "dead-letters",
    }
    assert world.stack().items() >= expected.items()
    (build,) = [c["arguments"] for c in world.calls("docker") if c["arguments"][0] == "build"]
    assert build[build.index("--platform") + 1] == "linux/arm64"
    assert re.fullmatch(r"[\w./-]+:[0-9a-f]{12}(-dirty-[0-9a-f]{12})?-arm64", build[-2])
    (view,) = [c["arguments"] for c in world.calls("kubectl") if c["arguments"][0] == "config"]
    assert view[view.index("--context") + 1] == "mine"

    before, after = world.applied()
    manifests = {each["kind"]: each for each in before}
    annotations = manifests["Ingress"]["metadata"]["annotations"]
    assert annotations["alb.ingress.kubernetes.io/certificate-arn"] == certificate
    assert annotations["alb.ingress.kubernetes.io/wafv2-acl-arn"] == OUTPUTS["WebAclArn"]
    assert manifests["ServiceAccount"]["metadata"]["annotations"] == {
        "eks.amazonaws.com/role-arn": OUTPUTS["RoleArn"]
    }
    assert manifests["ConfigMap"]["data"]["sqs_queue_url"] == OUTPUTS["QueueUrl"]
    assert container(after)["image"] == world.digest_of(OUTPUTS["RepositoryUri"])
    assert {"name": "TOKEN_SSM_PARAMETER", "value": names} in container(after)["env"]

    assert list(yaml.safe_load_all(world.deploy("--render", *not_kept))) == before + after
    assert "apply" not in world.verbs("kubectl")

    # Deleting is possible when the cluster has gone before, but not with a wrong one.
    (world.folder / "bin" / "aws").unlink()
    world.client("eks").delete_cluster(name=CLUSTER)
    result = world.run("--delete", "--cluster", "other")
    assert "There is no cluster other in us-west-1" in result.stderr
    assert world.stack()
    assert f"there is no cluster {CLUSTER} any more" in world.deploy("--delete")
    assert world.stack() == {}
    assert world.calls("kubectl") == []
    assert world.token("/team/b")["Value"] == "theirs", "it was not made here"


def test_environment_has_what_is_its_own_and_its_queue_outlives_it(world: World) -> None:
    world.answer()
    world.client("ssm").put_parameter(Name=PARAMETER, Value="production's", Type="SecureString")
    names = ("--queue-name", "new", "--environment", "test")
    output = world.deploy(*names, "--create-queue")
    parameter = "/email-service/test/api-token"
    made_up = world.token(parameter)["Value"]
    assert re.fullmatch(r"[A-Za-z0-9_-]{43}", made_up)
    assert made_up not in output
    assert f"--name {parameter}" in output
    assert world.queues() == {"dev-CP-queue", "new", "new-dlq"}
    (stack,) = world.client("cloudformation").describe_stacks()["Stacks"]
    assert stack["StackName"] == "email-processor-test"
    manifests = [manifest for part in world.applied() for manifest in part]
    (config,) = [m for m in manifests if m["kind"] == "ConfigMap"]
    assert config["data"]["sqs_queue_url"].endswith(f"/{ACCOUNT}/new")
    assert {"name": "TOKEN_SSM_PARAMETER", "value": parameter} in container(manifests)["env"]

    output = world.deploy(*names, "--delete")
    deleted = [c["arguments"][4:7] for c in world.calls("kubectl") if "delete" in c["arguments"]]
    assert deleted == [
        ["delete", "ingress", "email-processor-ingress"],
        ["delete", "namespace", "email-processor"],
    ]
    assert world.stack() == {}
    assert f"deleted {parameter}" in output
    (kept,) = world.client("ssm").describe_parameters()["Parameters"]
    assert kept["Name"] == PARAMETER
    assert re.search(r"kept \S+/new with its messages; to delete it: aws sqs delete-queue", output)
    assert world.deploy(*names, "--delete").endswith("there is none\nDeleted.\n")


def test_failed_first_roll_out_leaves_what_delete_queues_removes(world: World) -> None:
    world.answer()
    world.set(rollout_fails=True)
    key = f"arn:aws:kms:{REGION}:{ACCOUNT}:key/1a-2b"
    result = world.run("--queue-name", "new", "--create-queue", "--token-key-arn", key)
    assert result.returncode == 1
    assert "there is nothing to go back to" in result.stderr.splitlines()[-1]
    assert not [call for call in world.calls("kubectl") if "undo" in call["arguments"]]
    assert world.stack()["TokenKeyArn"] == key
    (parameter,) = world.client("ssm").describe_parameters()["Parameters"]
    assert parameter["KeyId"] == key
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


def test_undoing_a_change_by_hand_keeps_every_parameter_of_the_stack(world: World) -> None:
    """The emulator knows no drift, so that the command checks its arguments, and no more."""
    template = PROJECT / "infra" / "email-processor.yaml"
    assert re.search(r"^  Role:\n    Type: AWS::IAM::Role$", template.read_text("utf-8"), re.M)
    parameters = ("QueueName", "TokenParameterNames")
    world.client("cloudformation").create_stack(
        StackName="email-processor",
        TemplateBody=json.dumps(
            {
                "Parameters": {name: {"Type": "String", "Default": name} for name in parameters},
                "Resources": {"Topic": {"Type": "AWS::SNS::Topic"}},
            }
        ),
    )
    executable(
        world.folder / "bin" / "aws",
        f'#!/bin/sh\necho "$@" >>{world.folder}/aws\ncase "$2" in\n'
        f'describe-stacks) exec {shutil.which("aws")} "$@" ;;\nwait|describe-change-set) ;;\n'
        f'*) exec {shutil.which("aws")} "$@" --generate-cli-skeleton output ;;\nesac\n',
    )
    guide = SETUP.split("## Undo a change by hand")[1].split("\n## ")[0]
    blocks = re.findall(r"```bash\n(.*?)```", guide, re.DOTALL)
    result = world.execute("bash", "-euo", "pipefail", "-c", "".join(blocks))
    assert (result.returncode, result.stderr) == (0, ""), result
    (made,) = world.answered("cloudformation create-change-set")
    kept = " ".join(f"ParameterKey={name},UsePreviousValue=true" for name in parameters)
    assert made.endswith(f"--deployment-mode REVERT_DRIFT --parameters {kept}")


# --- What can go wrong ----------------------------------------------------------------------------


def assert_nothing_was_changed(world: World) -> None:
    assert world.stack() == {}
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
    classes = ["nginx k8s.io/ingress-nginx", "internal eks.amazonaws.com/alb"]
    world.set(ingress_classes=classes, paused=True, buildx=False)
    world.runs_deployment(f"{ROLE}-test")
    result = world.run("--certificate-arn", CERTIFICATE)
    assert result.returncode == 1
    *problems, summary = result.stderr.splitlines()
    expected = [
        "docker has no buildx",
        "OIDC provider",
        f"The cluster {CLUSTER} belongs to the environment test (role {ROLE}-test): give --cluster",
        "The cluster has no IngressClass alb of a load balancer controller",
        "paused, so nothing would roll out: run kubectl --namespace email-processor rollout resume",
        "There is no queue dev-CP-queue",
        f"The certificate {CERTIFICATE} is not ISSUED (An error occurred (ResourceNotFound",
    ]
    for problem, words in zip(problems, expected, strict=True):
        assert words in problem
    assert summary.startswith("deploy.sh: 7 problem(s)")
    assert_nothing_was_changed(world)


@pytest.mark.parametrize(
    ("options", "problems"),
    [
        (["--region", "eu-west-1"], [f"The registry {REGISTRY} is not the one of account"]),
        (
            ["--cluster", "other", "--create-queue"],
            ["There is no cluster other in us-west-1", "The queue dev-CP-queue exists already"],
        ),
        (
            ["--environment", "tset", "--delete"],
            ["belongs to the deployment without --environment"],
        ),
    ],
)
def test_preflight_refuses(world: World, options: list[str], problems: list[str]) -> None:
    world.runs_deployment(ROLE)
    result = world.run(*options)
    assert result.returncode == 1
    for problem in problems:
        assert problem in result.stderr
    assert "nothing was changed" in result.stderr
    assert_nothing_was_changed(world)


@pytest.mark.parametrize("mode", ["", "--dry-run"])
def test_token_of_a_service_that_runs_is_not_made_up(world: World, mode: str) -> None:
    """A mistyped name would cut off every client."""
    world.answer_for_stack("UPDATE_COMPLETE\nQueueName\tq\n")
    typo = ("--token-parameter", "/email-service/api-tokne", "--queue-name", "dev-CP-queue")
    result = world.run(mode, *typo) if mode else world.run(*typo)
    assert result.returncode == 1
    assert (
        "The token parameter /email-service/api-tokne does not exist: correct --token-parameter, "
        "or give its value in API_TOKEN." in result.stderr
    )
    assert_nothing_was_changed(world)


def test_new_token_of_a_service_that_runs_is_the_one_that_is_given(world: World) -> None:
    world.answer_for_stack("UPDATE_COMPLETE\nQueueName\tq\n")
    new = ("--token-parameter", "/new,/next", "--queue-name", "dev-CP-queue")
    assert "made /new;" in world.deploy(*new, API_TOKEN=TOKEN)
    assert world.token("/new")["Value"] == TOKEN
    output = world.deploy(*new, "--dry-run")
    assert "note: the token parameter /next does not exist" in output
    assert "would keep the token parameter /new" in output


@pytest.mark.parametrize("mode", ["--dry-run", "--render"])
def test_wrong_account_is_refused(world: World, mode: str) -> None:
    result = world.run(mode, account="999999999999")
    assert (result.returncode, "image:" in result.stdout) == (1, False)
    assert f"The AWS credentials are of account {ACCOUNT}, not 999999999999" in result.stderr


@pytest.mark.parametrize(
    ("state", "option", "problem"),
    [
        ("ROLLBACK_COMPLETE", "--dry-run", "deploy.sh --delete"),
        ("UPDATE_ROLLBACK_FAILED", "--dry-run", "continue-update-rollback --region us-west-1 "),
        ("UPDATE_IN_PROGRESS", "--delete", "wait until the other deployment has ended"),
    ],
)
def test_stack_that_cannot_be_changed_is_refused(
    world: World, state: str, option: str, problem: str
) -> None:
    world.answer(
        cloudformation_describe_stacks=state,
        eks_describe_cluster=f"CREATING\t{world.issuer}",
        acm_describe_certificate="PENDING_VALIDATION",
        ssm_get_parameter="SecureString",
    )
    result = world.run(option, "--certificate-arn", CERTIFICATE)
    assert result.returncode == 1
    stack, cluster, *certificate, _ = result.stderr.splitlines()
    assert f"The stack email-processor is in state {state}" in stack
    assert problem in stack
    assert "in state CREATING: wait until it is ACTIVE" in cluster
    assert [line for line in certificate if "is not ISSUED (PENDING_VALIDATION)" not in line] == []
    assert bool(certificate) == (option == "--dry-run")
    assert_nothing_was_changed(world)


def test_namespace_of_an_environment_without_a_stack_is_not_deleted(world: World) -> None:
    world.answer()
    world.runs_deployment("")
    result = world.run("--environment", "tset", "--delete")
    assert result.returncode == 1
    assert "There is no stack email-processor-tset" in result.stderr
    assert "delete" not in world.verbs("kubectl")


def test_endpoint_that_cannot_be_reached_is_told_from_missing_credentials(world: World) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    result = world.run("--dry-run", AWS_ENDPOINT_URL=url, AWS_MAX_ATTEMPTS="1")
    assert result.returncode == 1
    assert "AWS does not say whose the credentials are (Could not connect" in result.stderr
    assert "check the network and AWS_ENDPOINT_URL" in result.stderr


def test_missing_tools_are_named_together(world: World, tmp_path: Path) -> None:
    path = only(tmp_path / "few", "bash", "mktemp", "rm", "dirname", "grep", "tail", "cat", "git")
    result = world.run(PATH=path)
    assert result.returncode == 1
    for tool in ("aws", "docker", "kubectl"):
        assert f"{tool} is missing: install it (https://" in result.stderr
    assert_nothing_was_changed(world)


def test_old_pods_keep_their_rights_until_new_ones_serve_and_get_everything_back_otherwise(
    world: World,
) -> None:
    world.answer(ssm_get_parameter="SecureString")
    world.deploy("--queue-name", "old", "--create-queue")
    good = world.state
    checksum = good["objects"][DEPLOYMENT]["spec"]["template"]["metadata"]["annotations"]
    rights = ("TokenParameterNames", "QueueName", "FormerQueueName", "CreateQueue")
    alone = (PARAMETER, "old", "", "true")
    assert world.given_to_the_stack(*rights) == [alone, alone]

    # The build fails.
    change = ("--token-parameter", "/other", "--queue-name", "dev-CP-queue")
    both = (f"/other,{PARAMETER}", "dev-CP-queue", "old", "false")
    world.set(pushed=[], build_fails=True)
    result = world.run(*change)
    assert result.returncode == 1
    log, line = result.stderr.splitlines()
    assert log.startswith("ERROR: failed to solve")
    assert line.startswith("deploy.sh: The image was not built")
    assert world.applied() == []
    # A queue that was made here exists, and cannot be made again.
    given_back = (PARAMETER, "old", "", "false")
    assert world.given_to_the_stack(*rights)[2:] == [both, given_back]

    # The roll-out fails.
    world.set(pushed=good["pushed"], build_fails=False, rollout_fails=True)
    result = world.run(*change)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == (
        "deploy.sh: The roll-out failed, for the reasons above, and the deployment was undone: "
        "revision 1 serves again. Correct them and run this again."
    )
    assert "Back-off pulling image" in result.stderr
    assert "AWS_REGION must be a region" in result.stderr
    assert "Deployed" not in result.stdout
    for name in (DEPLOYMENT, CONFIG):
        assert world.state["objects"][name] == good["objects"][name]
        assert world.state["last_applied"][name] == good["last_applied"][name]
    assert world.given_to_the_stack(*rights)[4:] == [both, given_back]

    # The roll-out succeeds; the load balancer does not come in time, and kubectl warns.
    world.set(rollout_fails=False, broken=[], hostname="", warning="Warning: it is deprecated\n")
    result = world.run(*change, "--timeout", "1")
    assert result.returncode == 1
    assert result.stderr.startswith("Warning: it is deprecated\n")
    assert "has no ALB after 1 s" in result.stderr.splitlines()[-1]
    assert world.given_to_the_stack(*rights)[6:] == [both, ("/other", "dev-CP-queue", "", "false")]
    assert ["45"] in [call["arguments"] for call in world.calls("sleep")]
    now = world.state["objects"][DEPLOYMENT]["spec"]["template"]["metadata"]["annotations"]
    assert now.keys() == checksum.keys() >= {"checksum/config"}
    assert now != checksum


def test_failed_roll_out_after_an_undo_by_hand_goes_back_to_what_ran(world: World) -> None:
    world.answer_for_stack("CREATE_COMPLETE\n", ssm_get_parameter="SecureString")
    world.deploy()
    world.deploy("--token-parameter", "/second")
    state = world.state
    first, second = state["revisions"]
    assert first != second
    state["objects"][DEPLOYMENT] = first
    # What was applied last, kubectl notes; an undo does not change it.
    world.set(objects=state["objects"], revisions=[first, second, first], rollout_fails=True)
    result = world.run("--token-parameter", "/third")
    assert result.returncode == 1
    assert "the deployment was undone: revision 3 serves again" in result.stderr
    assert world.state["objects"][DEPLOYMENT] == first
    assert world.state["last_applied"][DEPLOYMENT] == second


@pytest.mark.parametrize("kind", ["PodDisruptionBudget", "HorizontalPodAutoscaler", "Deployment"])
def test_manifest_that_is_refused_leaves_no_roll_out_behind(world: World, kind: str) -> None:
    world.answer_for_stack("CREATE_COMPLETE\n", ssm_get_parameter="SecureString")
    world.set(refused=kind)
    result = world.run()
    assert result.returncode == 1
    assert f"{kind} is invalid" in result.stderr
    assert "The manifests were not all applied" in result.stderr
    assert world.state["revisions"] == []


@dataclass
class Checked:
    """A checkout whose test.sh and the machine's curl only say what they are asked."""

    world: World
    checkout: Path

    def __post_init__(self) -> None:
        self.world.answer_for_stack(
            "CREATE_COMPLETE\nTokenParameterNames\t/old\n", ssm_get_parameter="SecureString"
        )
        self.serve()

    def serve(self, health: int = 0, passes: int = 0) -> None:
        executable(self.world.folder / "bin" / "curl", f"#!/bin/sh\nexit {health}\n")
        executable(
            self.checkout / "test.sh",
            f'#!/bin/sh\necho "$1 $TOKEN_SSM_PARAMETER $AWS_REGION"\nexit {passes}\n',
        )

    def run(self, *options: str) -> subprocess.CompletedProcess[str]:
        script = str(self.checkout / "deploy.sh")
        return self.world.execute(script, REGISTRY, ACCOUNT, "--timeout", "1", *options)


@pytest.fixture
def checked(world: World, clean_checkout: Path) -> Checked:
    return Checked(world, clean_checkout)


def test_check_asks_the_service_before_the_rights_of_before_are_gone(checked: Checked) -> None:
    for variable in ("TOKEN_SSM_PARAMETER", "AWS_REGION"):
        assert f"${{{variable}:-" in (PROJECT / "test.sh").read_text("utf-8")
    result = checked.run("--check", "alb", "--token-parameter", "/new")
    assert (result.returncode, result.stderr) == (0, ""), result
    assert f"      http://{checked.world.state['hostname']} /new {REGION}\n" in result.stdout
    assert "[8/9]" in result.stdout
    narrow = checked.world.answered("cloudformation deploy")[-1]
    assert "TokenParameterNames=/new FormerQueueName= " in narrow

    url = "https://mail.example"
    result = checked.run("--check", f"{url}/", "--token-parameter", "/new")
    assert f"      {url} /new {REGION}\n" in result.stdout

    # Before anything is applied: it could not succeed.
    checked.world.client("acm").request_certificate(DomainName="mail.example")
    state = checked.world.state
    ingress = state["objects"]["ingress.networking.k8s.io/email-processor-ingress"]
    ingress["metadata"]["annotations"]["alb.ingress.kubernetes.io/certificate-arn"] = CERTIFICATE
    checked.world.set(objects=state["objects"])
    result = checked.run("--check", "alb")
    assert result.returncode == 1
    assert "Give --check https://DOMAIN" in result.stderr
    assert checked.world.applied() == []


@pytest.mark.parametrize(
    ("hostname", "health", "passes", "reason"),
    [
        ("alb.example", 0, 1, "http://alb.example /new us-west-1"),
        ("alb.example", 28, 0, "http://alb.example/health does not answer after 1 s"),
        ("", 0, 0, "There is no ALB after 1 s"),
    ],
)
def test_check_that_fails_undoes_the_deployment(
    checked: Checked, hostname: str, health: int, passes: int, reason: str
) -> None:
    world = checked.world
    assert checked.run("--token-parameter", "/old").returncode == 0
    before = world.state
    world.set(hostname=hostname)
    checked.serve(health, passes)
    result = checked.run("--check", "alb", "--token-parameter", "/new")
    assert result.returncode == 1
    assert reason in result.stdout + result.stderr
    assert result.stderr.splitlines()[-1] == (
        "deploy.sh: The check failed, for the reasons above, and the deployment was undone: "
        "revision 1 serves again. Correct them and run this again."
    )
    assert world.state["objects"] == before["objects"]
    assert world.state["last_applied"] == before["last_applied"]
    wide, back = world.answered("cloudformation deploy")[-2:]
    assert "TokenParameterNames=/new,/old " in wide
    assert "TokenParameterNames=/old " in back, "and never without it"


def test_first_check_that_fails_has_nothing_to_go_back_to(checked: Checked) -> None:
    checked.serve(passes=1)
    result = checked.run("--check", "alb")
    assert result.returncode == 1
    assert "The check failed, for the reasons above. It is the first deployment" in result.stderr
    assert "undo" not in str(checked.world.calls("kubectl"))


def test_run_that_broke_off_left_two_queues_and_the_tokens_of_before_up_to_ten(
    world: World,
) -> None:
    old, new = ([f"/{kind}/{number}" for number in range(6)] for kind in ("old", "new"))
    values = {
        "TokenParameterNames": ",".join(["/new/0", *old]),
        "QueueName": "new",
        "FormerQueueName": "dev-CP-queue",
        "CreateQueue": "true",
    }
    lines = "".join(f"{name}\t{value}\n" for name, value in values.items())
    stack = f"CREATE_COMPLETE\n{lines}"
    world.answer(cloudformation_describe_stacks=stack, ssm_get_parameter="SecureString")
    options = ("--token-parameter", ",".join(new), "--dead-letter-queue", "theirs")
    result = world.run("--dry-run", *options)
    assert result.returncode == 1
    assert (
        "The last run broke off while the queue changed from dev-CP-queue to new: give "
        "--queue-name with the one that is to be used." in result.stderr
    )
    # Whichever it is, pods may still send to the other one.
    output = world.deploy("--dry-run", *options, "--queue-name", "dev-CP-queue")
    assert "DeadLetterQueueName=theirs " in output
    assert f"TokenParameterNames={','.join([*new, *old[:4]])} " in output
    assert "QueueName=dev-CP-queue FormerQueueName=new CreateQueue=false" in output


def test_cluster_that_stops_answering_is_one_line_and_gives_back_what_a_run_took(
    world: World,
) -> None:
    world.answer(
        cloudformation_deploy="",
        cloudformation_describe_stacks=(
            "CREATE_COMPLETE\nQueueName\tdev-CP-queue\nFormerQueueName\told\nCreateQueue\ttrue\n"
        ),
        ssm_get_parameter="SecureString",
    )
    world.set(unreadable="deployment")
    result = world.run("--queue-name", "dev-CP-queue", "--create-queue")
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        "deploy.sh: kubectl does not show the Deployment (Error from server (Forbidden)). Get "
        "access to the namespace email-processor and run this again."
    ]
    assert world.state["objects"] == {}
    wide, back = world.answered("cloudformation deploy")
    assert wide.endswith("QueueName=dev-CP-queue FormerQueueName=old CreateQueue=true")
    assert back.endswith("QueueName=dev-CP-queue FormerQueueName=old CreateQueue=true")


def test_run_that_is_interrupted_after_its_roll_out_takes_the_rights_of_before_away(
    world: World,
) -> None:
    world.answer_for_stack(
        "CREATE_COMPLETE\nTokenParameterNames\t/old\n", ssm_get_parameter="SecureString"
    )
    # Ctrl-C reaches both.
    executable(world.folder / "bin" / "sleep", "#!/bin/sh\nkill -INT $PPID $$\n")
    assert world.run("--token-parameter", "/new").returncode != 0
    wide, narrow = world.answered("cloudformation deploy")
    assert "TokenParameterNames=/new,/old " in wide
    assert narrow.endswith("TokenParameterNames=/new FormerQueueName=")


def test_failed_first_roll_out_leaves_the_role_what_was_asked_for(world: World) -> None:
    world.answer_for_stack(
        "CREATE_COMPLETE\nTokenParameterNames\t/old\n", ssm_get_parameter="SecureString"
    )
    world.set(rollout_fails=True)
    assert world.run("--token-parameter", "/new").returncode == 1
    wide, narrow = world.answered("cloudformation deploy")
    assert "TokenParameterNames=/new,/old " in wide
    assert narrow.endswith("TokenParameterNames=/new FormerQueueName=")


# --- Instead of a run -----------------------------------------------------------------------------


def test_dry_run_says_what_would_be_done_and_changes_nothing(world: World) -> None:
    world.answer()
    output = world.deploy("--dry-run", "--alarm-email", "on-call@example.com")
    assert "AlarmEmail=on-call@example.com" in output
    assert "the queue dev-CP-queue has no dead-letter queue" in output
    assert f"would make the token parameter {PARAMETER}" in output
    assert output.endswith("Nothing was changed.\n")
    assert_nothing_was_changed(world)


def test_another_region_is_rendered_everywhere(world: World) -> None:
    world.answer()
    region = "eu-west-1"
    result = world.run("--render", "--region", region)
    assert result.returncode == 0, result
    assert REGION not in result.stdout.replace(REGISTRY, "")
    assert f"https://sqs.{region}.amazonaws.com/{ACCOUNT}/dev-CP-queue" in result.stdout


def test_render_stops_when_aws_does_not_say_whether_there_is_a_stack(world: World) -> None:
    """Else a service would get the queue of a first run, no web ACL, and plain HTTP."""
    refused = "An error occurred (AccessDenied) when calling the DescribeStacks operation"
    world.answer()
    stub = world.folder / "bin" / "aws"
    case = f"'cloudformation describe-stacks') echo '{refused}' >&2; exit 254 ;;\n"
    stub.write_text(stub.read_text().replace("*) exec", f"{case}*) exec"))
    result = world.run("--render")
    assert (result.returncode, result.stdout) == (1, "")
    assert f"does not show the stack email-processor ({refused})" in result.stderr

    url = f"http://127.0.0.1:{free_port()}"
    stub.unlink()
    result = world.run("--render", AWS_ENDPOINT_URL=url, AWS_MAX_ATTEMPTS="1")
    assert (result.returncode, result.stdout) == (1, "")
    assert_one_line(result, "AWS does not say whose the credentials are (Could not connect")


def test_render_fills_in_the_region_but_leaves_it_in_names(world: World) -> None:
    values = {**OUTPUTS, "QueueName": "theirs", "TokenParameterNames": "/us-west-1/token"}
    lines = "".join(f"{name}\t{value}\n" for name, value in values.items())
    digest = f"sha256:{'0' * 64}"
    world.answer(
        cloudformation_describe_stacks=f"UPDATE_COMPLETE\n{lines}", ecr_describe_images=digest
    )
    options = ("--render", "--queue-name", "orders-us-west-1", "--region", "eu-west-1")
    manifests = list(yaml.safe_load_all(world.deploy(*options)))
    (config,) = [m for m in manifests if m["kind"] == "ConfigMap"]
    assert config["data"] == {
        "sqs_queue_url": OUTPUTS["QueueUrl"].replace("theirs", "orders-us-west-1"),
        "aws_region": "eu-west-1",
    }
    # The registry knows the image that was pushed from elsewhere.
    assert container(manifests)["image"] == f"{OUTPUTS['RepositoryUri']}@{digest}"
    assert {"name": "TOKEN_SSM_PARAMETER", "value": "/us-west-1/token"} in container(manifests)[
        "env"
    ]
    (asked,) = world.answered("ecr describe-images")
    assert "--repository-name theirs --image-ids imageTag=" in asked


def test_render_does_not_take_a_certificate_away_that_it_cannot_see(world: World) -> None:
    world.answer()
    world.set(unreadable="ingress")
    assert world.run("--render").returncode == 0, "there is no stack yet"
    make_stack_with_other_outputs(world)
    result = world.run("--render")
    assert (result.returncode, result.stdout) == (1, "")
    assert "does not tell its certificate" in result.stderr
    assert world.run("--render", "--certificate-arn", "none").returncode == 0


@pytest.mark.parametrize("certificate", ["none", CERTIFICATE])
def test_manifests_are_rendered_without_any_tool_but_git(
    world: World, tmp_path: Path, certificate: str
) -> None:
    tools = ("bash", "mktemp", "rm", "dirname", "grep", "tail", "cat", "cut", "head", "sed", "awk")
    path = only(tmp_path / "few", *tools, "git")
    result = world.run("--render", "--certificate-arn", certificate, PATH=path)
    assert result.returncode == 0
    assert all(line.startswith("deploy.sh: note: ") for line in result.stderr.splitlines())
    manifests = list(yaml.safe_load_all(result.stdout))
    for manifest in manifests:
        kubernetes_validate.validate(manifest, "1.34", strict=True)
    assert ("ssl-redirect" in result.stdout) == (certificate != "none")
    placeholders = r"\b(ACCOUNT_ID|IMAGE|CERTIFICATE_ARN|WEB_ACL_ARN|CONFIG_CHECKSUM)\b|# with"
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
        ([REGISTRY, ACCOUNT, "--region", ""], "--region needs a value"),
        (
            [REGISTRY, ACCOUNT, "--dead-letter-queue", "--dry-run"],
            "--dead-letter-queue needs a val",
        ),
        ([REGISTRY, ACCOUNT, "--queue-name", "a" * 81], "is not a queue's name"),
        ([REGISTRY, ACCOUNT, "--queue-name", "a" * 80, "--timeout", "0"], "--timeout '0' is"),
        ([REGISTRY, ACCOUNT, "--region", "west"], "--region 'west' is not a region"),
        ([REGISTRY, ACCOUNT, "--token-parameter", "token"], "is not a parameter's name"),
        ([REGISTRY, ACCOUNT, "--certificate-arn", "x"], "is not the ARN of an ACM certificate"),
        ([REGISTRY, ACCOUNT, "--timeout", "0"], "--timeout '0' is not a number of seconds"),
        ([REGISTRY, ACCOUNT, "--check", "lb"], "--check 'lb' is not a URL, or alb"),
        (
            [REGISTRY, ACCOUNT, "--check", "alb", "--certificate-arn", CERTIFICATE],
            "give --check https://DOMAIN",
        ),
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
