"""The image, built and run by a real Docker engine with all the restrictions of the manifests."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from client import Client, request_head
from fake_aws import FakeAws
from load import Load
from service import PROJECT, eventually, free_port

IMAGE = "email-processor:test"
REGISTRY = os.environ.get("REGISTRY", "")  # such as localhost:5000
FILES = {"app.py", "gunicorn.conf.py", "openapi.yaml", "tracing.py", "worker.py"}
RESTRICTIONS = (
    *("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL"),
    *("--security-opt", "no-new-privileges", "--memory", "512m", "--cpus", "0.5"),
)


def has_engine() -> bool:
    docker = shutil.which("docker")
    return bool(docker) and not subprocess.run([docker, "info"], capture_output=True).returncode


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not has_engine(), reason="no Docker engine is running"),
]


def docker(*arguments: str, check: bool = True) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr
    return done.stdout.strip()


IDENTITY = {
    "COMMIT": "0123456789abcdef0123456789abcdef01234567",
    "CREATED": "2026-01-02T03:04:05+01:00",
    "SOURCE": "https://git.example/mail",
    "SOURCE_DATE_EPOCH": "1767319445",
}


def build(*options: str, folder: Path = PROJECT, **changes: str) -> str:
    """The image's id: another run may reuse its name."""
    pairs = {**IDENTITY, **changes}.items()
    arguments = [word for pair in pairs for word in ("--build-arg", "=".join(pair))]
    return docker("build", "--quiet", "--tag", IMAGE, *arguments, *options, str(folder))


@pytest.fixture(scope="module")
def image() -> str:
    """The id of the image of this checkout."""
    return build()


@contextmanager
def running(image: str, fake_aws: FakeAws) -> Iterator[tuple[str, int, float]]:
    """A healthy container: its name, its port, and the seconds until it was healthy."""
    port, begin = free_port(), time.monotonic()
    variables = {**fake_aws.variables(), "PORT": str(port)}
    variables |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    settings = [word for pair in variables.items() for word in ("--env", "=".join(pair))]
    name = docker("run", "--detach", "--network", "host", *RESTRICTIONS, *settings, image)

    def is_healthy() -> bool:
        try:
            with Client(port) as client:
                return client.send(request_head("GET", "/health")).response().status == 200
        except OSError:
            return False

    try:
        eventually(is_healthy)
        yield name, port, time.monotonic() - begin
    finally:
        docker("rm", "--force", name)


def inspect(image: str) -> dict[str, Any]:
    return dict(json.loads(docker("image", "inspect", image))[0])


def test_image_is_small_with_gunicorn_as_uid_1000(image: str) -> None:
    found = inspect(image)
    assert found["Size"] <= 190e6
    assert found["Config"]["User"] == "1000:1000"
    assert found["Config"]["Cmd"] == ["gunicorn"]
    assert not found["Config"].get("Entrypoint")
    assert not found["Config"].get("Healthcheck")


def test_image_names_the_commit_that_it_was_built_from(image: str, fake_aws: FakeAws) -> None:
    prefix = "org.opencontainers.image."
    assert inspect(image)["Config"]["Labels"] == {
        f"{prefix}revision": IDENTITY["COMMIT"],
        f"{prefix}created": IDENTITY["CREATED"],
        f"{prefix}source": IDENTITY["SOURCE"],
    }
    for built, commit in (image, IDENTITY["COMMIT"]), (build(COMMIT="another"), "another"):
        with running(built, fake_aws) as (name, port, _), Client(port) as client:
            assert client.send(request_head("GET", "/")).response().json["commit"] == commit
            assert json.loads(docker("logs", name).splitlines()[0])["commit"] == commit
    command = ("docker", "build", "--quiet", str(PROJECT))
    plain = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    with running(plain, fake_aws) as (_, port, _), Client(port) as client:
        assert client.send(request_head("GET", "/")).response().json["commit"] == "unknown"


def test_each_build_of_a_commit_gives_the_same_image(image: str, tmp_path: Path) -> None:
    for name in ("Dockerfile", ".dockerignore", *FILES, "requirements.txt"):
        shutil.copyfile(PROJECT / name, tmp_path / name)  # with other times and modes
        (tmp_path / name).chmod(0o600)
    assert build("--no-cache", folder=tmp_path) == image


def test_image_holds_only_the_application(image: str) -> None:
    files = docker("run", "--rm", image, "find", "/srv", "-type", "f", "-not", "-name", "*.pyc")
    assert {path.rpartition("/")[2] for path in files.splitlines()} == FILES
    installed = docker("run", "--rm", image, "ls", "/opt/venv/bin")
    assert "gunicorn" in installed
    assert "pip" not in installed.split()
    nothing = ["find", "/opt/venv", "/srv", "-perm", "/022", "-not", "-type", "l"]
    assert docker("run", "--rm", image, *nothing) == "", "writable by others than root"


def test_container_serves_within_its_restrictions_and_stops_in_order(
    image: str, fake_aws: FakeAws, figures: Any
) -> None:
    with running(image, fake_aws) as (name, port, seconds):
        with Load(port, clients=8, requests=200) as load:
            load.wait()
        used = docker("stats", "--no-stream", "--format", "{{.MemUsage}}", name).split("MiB")[0]
        users = {line.split()[1] for line in docker("top", name, "-eo", "pid,uid").splitlines()[1:]}
        docker("stop", "--time", "30", name)
        code = docker("inspect", "--format", "{{.State.ExitCode}}", name)
        lines = [json.loads(line) for line in docker("logs", name).splitlines()]
    figures("container", f"/health after {seconds:.2f} s at 0.5 CPU; {float(used):.0f} MiB")
    assert load.statuses == {200: load.sent}
    assert seconds < 20  # ten times the usual
    assert float(used) < 160
    assert users == {"1000"}
    assert code == "0", "SIGTERM reaches Gunicorn"
    assert [line["level"] for line in lines if line["level"] not in ("INFO", "WARNING")] == []


def test_deploy_finds_the_digest_of_an_image_in_a_registry(image: str) -> None:
    repository, tag = "python", "3.13-slim"  # on Docker Hub
    if REGISTRY:
        repository, tag = f"{REGISTRY}/email-processor", "test"
        docker("tag", image, f"{repository}:{tag}")
        docker("push", "--quiet", f"{repository}:{tag}")
    script = (PROJECT / "deploy.sh").read_text("utf-8")
    (find_image,) = re.findall(r"^find_image\(\) \{\n.*?^\}\n", script, re.DOTALL | re.MULTILINE)
    command = f"{find_image} repository={repository} tag={tag}; find_image && echo $image"
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    if found.returncode and not REGISTRY:
        pytest.skip("Docker Hub is not reachable; REGISTRY=HOST:PORT names another registry")
    assert re.fullmatch(rf"{re.escape(repository)}@sha256:[0-9a-f]{{64}}\n", found.stdout)
