"""The commands that a developer types, and the requirements that they install."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Self

import pytest
from commands import assert_one_line, environment, executable, only
from fake_aws import TOKEN
from service import (
    PROJECT,
    WAIT,
    ServiceProcess,
    children,
    eventually,
    free_port,
    is_listening,
    metrics_folder,
)

needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


def run(
    *command: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env=env or environment(), capture_output=True, text=True, timeout=2 * WAIT
    )


# --- python app.py --------------------------------------------------------------------------------


class LocalServer(ServiceProcess):
    """`python app.py` with the embedded AWS, started from another folder."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, str(PROJECT / "app.py")]
        super().__init__(folder / "tmp", foreign_configuration(folder), command, folder)
        self.variables["GUNICORN_WORKERS"] = "2"
        self.url = f"http://localhost:{self.port}"

    def __enter__(self) -> Self:
        super().__enter__()
        eventually(lambda: "Stop it with" in self.output())
        return self

    def workers(self) -> list[int]:
        """Gunicorn's, whose master is a child of this process."""
        return [worker for master in children(self.process.pid) for worker in children(master)]


def foreign_configuration(folder: Path) -> dict[str, str]:
    """A developer's configuration, which a server with an embedded AWS must ignore."""
    home = folder / "home"
    models = home / ".aws" / "models" / "sqs" / "2012-11-05"
    models.mkdir(parents=True)
    for file in (models / "service-2.json", home / ".aws/config", home / ".aws/credentials"):
        file.write_text("malformed")
    proxies = dict.fromkeys(("HTTP_PROXY", "https_proxy", "ALL_PROXY"), "http://127.0.0.1:1")
    aws = {"AWS_PROFILE": "foreign", "AWS_CA_BUNDLE": "/nowhere", "AWS_USE_FIPS_ENDPOINT": "true"}
    ignore = {"AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true", "no_proxy": "example.org"}
    return {"HOME": str(home), **proxies, **aws, **ignore}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """`python app.py` with an embedded AWS, for the tests of this file."""
    with LocalServer(tmp_path_factory.mktemp("service")) as server:
        yield server


@needs_curl
def test_printed_commands_show_a_message_in_the_queue(service: LocalServer) -> None:
    if "aws-sigv4" not in run("curl", "--help", "all").stdout:
        pytest.skip("this curl cannot sign requests for AWS")
    commands = re.findall(r"^  (curl .*?)\n\n", service.output(), re.M | re.DOTALL)
    send, show = (json.loads(run("bash", "-c", command).stdout) for command in commands)
    bodies = {message["MessageId"]: json.loads(message["Body"]) for message in show["Messages"]}
    assert bodies[send["message_id"]]["email_subject"] == "Happy new year!"


@pytest.mark.parametrize(
    ("signal_number", "whole_group", "status"),
    [
        pytest.param(signal.SIGINT, True, 0, id="ctrl-c"),
        pytest.param(signal.SIGKILL, False, -signal.SIGKILL, id="killed"),
        pytest.param(signal.SIGHUP, True, 0, id="terminal-closed", marks=pytest.mark.slow),
    ],
)
def test_stopped_local_server_leaves_nothing_behind(
    tmp_path: Path, signal_number: signal.Signals, whole_group: bool, status: int
) -> None:
    with LocalServer(tmp_path) as server:
        (emulator_port,) = set(map(int, re.findall(r"http://127\.0\.0\.1:(\d+)", server.output())))
        assert is_listening(emulator_port)
        processes = [server.process.pid, *children(server.process.pid), *server.workers()]
        metrics = metrics_folder(processes[-1])
        assert metrics.is_dir()
        send = os.killpg if whole_group else os.kill
        send(server.process.pid, signal_number)
        assert server.process.wait(timeout=WAIT) == status
    eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in processes))
    assert not is_listening(server.port)
    assert not is_listening(emulator_port)
    assert {path.name for path in server.temporary.iterdir()} == {"stdout", "stderr"}
    assert not metrics.exists()
    assert "Traceback" not in server.output()


def test_local_server_stops_while_its_output_is_not_read(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, b"x")
    server = LocalServer(tmp_path)
    server.command = ["sh", "-c", f'exec "$@" >"{pipe}"', "sh", *server.command]
    ServiceProcess.__enter__(server)  # without its output
    server.stop()
    assert server.process.returncode == 0
    os.close(reader)
    os.close(writer)


# --- test.sh --------------------------------------------------------------------------------------

TEST_SH = PROJECT / "test.sh"


@needs_curl
def test_all_nine_checks_pass_without_showing_the_token(
    service: LocalServer, tmp_path: Path
) -> None:
    """Nor in curl's arguments or environment, which other users can see."""
    record, curl = tmp_path / "record", shutil.which("curl")
    recorder = f"""#!/bin/sh\n{{ echo "$@"; env; }} >>'{record}'\nexec '{curl}' "$@"\n"""
    executable(tmp_path / "bin" / "curl", recorder)
    env = environment(tmp_path / "bin", API_TOKEN=TOKEN)
    result = run(TEST_SH, service.url, cwd=tmp_path, env=env)
    assert (result.returncode, result.stderr) == (0, "")
    assert re.findall(r"^ok +(\d)/9 ", result.stdout, re.M) == list("123456789")
    assert result.stdout.endswith(f"\nAll 9 checks passed at {service.url}.\n")
    assert "/process" in record.read_text("utf-8")
    assert TOKEN not in record.read_text("utf-8") + result.stdout


@needs_curl
def test_wrong_token_fails_with_a_summary(service: LocalServer) -> None:
    result = run(TEST_SH, service.url, env=environment(API_TOKEN="wrong"))
    assert_one_line(result, "5 of 9 checks failed", "API_TOKEN", name="test.sh: ")
    failed = [line for line in result.stdout.splitlines() if line.startswith("FAIL ")]
    assert failed[0] == "FAIL  2/9 valid message: expected 200 message_id, got 401 invalid_token"
    assert len(failed) == 5


def test_any_token_is_sent_unchanged_without_being_printed(tmp_path: Path) -> None:
    record = """case "$*" in *process) echo "$*" >>heads && { cat; echo; } >>bodies ;; esac"""
    executable(tmp_path / "bin" / "curl", f"#!/bin/sh\n{record}\necho 200\n")
    token = 'quote" back\\slash tab\t line\nend \x01\x7f & $(id) %s {x} é \N{GRINNING FACE}'
    env = environment(tmp_path / "bin", API_TOKEN=token)
    result = run(TEST_SH, cwd=tmp_path, env=env)
    assert_one_line(result, "9 of 9 checks failed", name="test.sh: ")
    valid, *_ = (tmp_path / "bodies").read_text("utf-8").splitlines()
    assert json.loads(valid)["token"] == token
    # A consumer can recognise the message.
    assert json.loads(valid)["data"]["email_subject"] == "test.sh: please ignore"
    assert len(re.findall(r"X-Request-Id: test-sh-\d+-\d+ ", (tmp_path / "heads").read_text())) == 8
    assert "quote" not in result.stdout + result.stderr


AWS = """#!/bin/sh
case "$*" in
  "ssm get-parameter --with-decryption --name /first --region eu-west-1 "*)
    echo 'a warning' >&2
    echo '$DJISA<$#45ex3RtYr' ;;
  *) echo >&2; echo 'Unable to locate credentials' >&2; exit 1 ;;
esac
"""


@needs_curl
def test_token_comes_from_ssm_without_api_token(service: LocalServer, tmp_path: Path) -> None:
    executable(tmp_path / "aws", AWS)
    names = {"TOKEN_SSM_PARAMETER": "/first, /second", "AWS_REGION": "eu-west-1"}
    result = run(TEST_SH, service.url, env=environment(tmp_path, **names))
    assert (result.returncode, result.stderr) == (0, "")


@needs_curl
def test_problem_before_the_first_check_is_one_line(tmp_path: Path) -> None:
    url, token = f"http://localhost:{free_port()}", {"API_TOKEN": TOKEN}
    aws = executable(tmp_path / "aws", AWS)
    bash, both = only(tmp_path / "1", "bash"), only(tmp_path / "2", "bash", "curl")
    for path, variables, *parts in (
        (f"{aws.parent}:{both}", {}, "/email-service/api-token in us-west-1 (Unable to locate"),
        (both, {}, "set API_TOKEN"),
        (bash, token, "curl is missing"),
        (both, token, f"No response from {url}", "connect"),
    ):
        result = run(TEST_SH, url, env={**environment(), **variables, "PATH": path})
        assert_one_line(result, *parts, name="test.sh: ")
        assert result.stdout == ""


# --- setup-local.sh -------------------------------------------------------------------------------

PYTHON = """#!/bin/sh
# A stub of Python, of the environment's Python and of uv.
case "$*" in
  -c*) printf '%s' "${VERSION:-3.11} $0" ;;
  "-m venv"*)
    mkdir -p venv/bin
    cp "$0" venv/bin/python
    cp "$0" venv/bin/uv ;;
  *) echo "ran ${0##*/} $*" ;;
esac
case "$*" in *"${BROKEN:-nothing is}"*) exit 3 ;; esac
"""


class Project:
    """A folder with setup-local.sh, and a Python that prints its arguments."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "a project"
        self.python = executable(folder / "bin" / "python3", PYTHON)
        self.folder.mkdir()
        shutil.copy(PROJECT / "setup-local.sh", self.folder)
        self.require("uv==1 \\\n    --hash=sha256:1\n    # via nothing\nother==1\n")

    def require(self, requirements: str) -> None:
        (self.folder / "requirements-dev.txt").write_text(requirements)

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run setup-local.sh, which is found on the PATH, from another folder."""
        env = environment(self.folder, self.python.parent, **variables)
        return run("setup-local.sh", *arguments, cwd=self.folder.parent, env=env)

    def ran(self, *arguments: str, **variables: str) -> tuple[int, list[str]]:
        """The exit status, and the commands."""
        result = self.run(*arguments, **variables)
        return result.returncode, re.findall(r"^ran (.+)$", result.stdout, re.MULTILINE)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A new folder with setup-local.sh, and its Python."""
    return Project(tmp_path)


PIP = "python -m pip --quiet install --require-hashes --requirement"
UV = "uv --quiet pip sync --python venv/bin/python --require-hashes requirements-dev.txt"
INSTALLED = [f"{PIP} venv/uv.txt", UV]


def test_unfit_python_is_one_line(project: Project) -> None:
    for python, version, complaint in (
        ("bin/python3", "3.10", "bin/python3 is 3.10."),
        ("bin/python3", "3.15", "bin/python3 is 3.15."),
        ("/nowhere/python3", "", "/nowhere/python3 does not run."),
    ):
        result = project.run(PYTHON=python, VERSION=version)
        assert_one_line(result, "Python 3.11 to 3.14", complaint, name="setup-local.sh: ")
    assert not (project.folder / "venv").exists()


def test_environment_is_made_once_and_again_when_it_does_not_fit(project: Project) -> None:
    assert project.ran() == (0, INSTALLED)
    pin = (project.folder / "venv" / "uv.txt").read_text()
    assert pin == "uv==1 \\\n    --hash=sha256:1\n"
    assert project.ran() == (0, [])
    assert project.ran("run") == (0, ["python app.py"])
    assert project.ran(VERSION="3.12") == (0, INSTALLED)
    project.require("uv==2 --hash=sha256:2\n")
    assert project.ran(VERSION="3.12") == (0, INSTALLED)
    (project.folder / "venv" / "bin" / "python").unlink()
    assert project.ran(VERSION="3.12") == (0, INSTALLED)


def test_pip_installs_where_uv_fails(project: Project) -> None:
    assert project.ran(BROKEN="pip sync") == (0, [*INSTALLED, f"{PIP} requirements-dev.txt"])
    assert project.ran() == (0, [])


def test_failed_installation_starts_again(project: Project) -> None:
    result = project.run(BROKEN="-m pip")
    assert_one_line(result, "cannot be installed", name="setup-local.sh: ")
    assert project.ran() == (0, INSTALLED)


def test_slow_tests_run_with_all_only_and_after_the_quick_ones(project: Project) -> None:
    project.run()
    _, [quick] = project.ran("test")
    common, _, coverage = quick.partition(" -m not slow ")
    assert coverage == "--cov=app --cov-branch --cov-fail-under=98"
    assert project.ran("test", "--all") == (0, [quick, f"{common} -m slow"])
    assert project.ran("test", "--all", BROKEN="not slow") == (3, [quick])
    assert project.ran("test", "--all", BROKEN="-m slow")[0] == 3


def test_tests_pass_however_they_are_started(tmp_path: Path) -> None:
    """From another folder, without a terminal or a home, with signals ignored and variables set."""
    hostile = {"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path), "LANG": "C", "PORT": "1"}
    hostile |= dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "API_TOKEN"), "foreign")
    hostile |= dict.fromkeys(
        ("AWS_ENDPOINT_URL", "SQS_QUEUE_URL", "http_proxy"), "http://127.0.0.1:1/"
    )
    files = [f"{PROJECT}/tests/test_{name}.py" for name in ("server", "scripts", "runbook")]
    tests = "test_post_that_is_200_is_in_the_queue or ctrl-c or (leads_to_its_row and reset)"
    pytest_command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", tests]
    ignoring = ["sh", "-c", 'trap "" HUP INT; exec "$@" </dev/null', "sh", *pytest_command]
    result = run(*ignoring, *files, cwd=tmp_path, env=hostile)
    assert result.returncode == 0, result.stdout
    assert "3 passed" in result.stdout


# --- .ci/run --------------------------------------------------------------------------------------


def test_ci_stops_at_the_first_failure(tmp_path: Path) -> None:
    stub = '#!/bin/sh\necho "ran ${0##*/} $*"\n[ "${0##*/}" != "$BROKEN" ]\n'
    (tmp_path / ".ci").mkdir()
    shutil.copy(PROJECT / ".ci" / "run", tmp_path / ".ci")
    for command in ("setup-local.sh", "venv/bin/ruff", "venv/bin/mypy"):
        executable(tmp_path / command, stub)

    all_checks = ["setup-local.sh test --all", "ruff format --check .", "ruff check .", "mypy "]
    for broken, status, checks in (
        ("nothing", 0, all_checks),
        ("setup-local.sh", 1, all_checks[:1]),
    ):
        result = run(tmp_path / ".ci" / "run", env=environment(BROKEN=broken))
        ran = re.findall(r"^ran (.+)$", result.stdout, re.MULTILINE)
        assert (result.returncode, ran) == (status, checks)


# --- All scripts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["setup-local.sh", "test.sh", "deploy.sh", ".ci/run"])
def test_script_has_help_and_rejects_wrong_arguments(script: str, tmp_path: Path) -> None:
    for option in ("--help", "-h"):
        result = run(PROJECT / script, option, cwd=tmp_path)
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.startswith("Usage: ")
    for arguments in (["--unknown"], ["http://localhost:1", "more"]):
        result = run(PROJECT / script, *arguments, env=environment(API_TOKEN=TOKEN))
        assert_one_line(result, status=2, name=f"{script}: ")


# --- Requirements ---------------------------------------------------------------------------------


def pins(file: str) -> dict[str, str]:
    """Package -> its pin and hashes."""
    text = re.sub(r" *#.*\n", "", (PROJECT / file).read_text("utf-8"))
    text = re.sub(r"^([\w.-]+)\[[\w, ]+\]", r"\1", text, flags=re.MULTILINE)  # extras
    entries = text.replace("\\\n", " ").splitlines()
    return {entry.split("==")[0]: entry for entry in entries}


def test_requirements_pin_what_pyproject_declares_with_hashes() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text("utf-8"))
    runtime, tools = (
        {re.split(r"[^\w.-]", line)[0].lower() for line in lines}
        for lines in (project["project"]["dependencies"], project["dependency-groups"]["dev"])
    )
    production, development = pins("requirements.txt"), pins("requirements-dev.txt")
    assert set(production) >= runtime
    assert set(development) >= tools
    assert not set(production) & tools
    assert production.items() <= development.items()
    pin = r"[\w.-]+==[\w.]+( ; [^\\]*?)?( +--hash=sha256:[0-9a-f]{64})+ *"
    assert [entry for entry in development.values() if not re.fullmatch(pin, entry)] == []


@pytest.mark.skipif(not (PROJECT / ".git").exists(), reason="needs a clone")
def test_every_clone_has_the_line_ends_of_unix(tmp_path: Path) -> None:
    clone = run("git", "clone", "--quiet", "-c", "core.autocrlf=true", PROJECT, "c", cwd=tmp_path)
    assert clone.returncode == 0, clone.stderr
    lines = run("git", "ls-files", "--eol", cwd=tmp_path / "c").stdout.splitlines()
    assert lines
    assert not [line for line in lines if "w/crlf" in line or "w/mixed" in line]
