"""The commands that a developer types, and the requirements that they install."""

from __future__ import annotations

import http.server
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent
TOKEN = "$DJISA<$#45ex3RtYr"
HOSTILE_TOKEN = 'quote" back\\slash tab\t line\nend \x01\x7f & $(id) %s {x} é \N{GRINNING FACE}'

needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


def environment(**more: str) -> dict[str, str]:
    """The tests' environment without what would change the outcome of a command."""
    changing = ("AWS_", "GUNICORN_", "PIP_", "PYTHON", "SQS_", "TOKEN_", "API_TOKEN", "PROMETHEUS_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(changing)}
    return {**kept, **more}


def run(
    *command: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env=env or environment(), capture_output=True, text=True, timeout=60
    )


def assert_one_line(
    result: subprocess.CompletedProcess[str], *parts: str, status: int = 1, name: str = ""
) -> None:
    """The command failed and said why in one line of standard error."""
    assert result.returncode == status, result
    assert re.fullmatch(re.escape(name) + r"[^\n]+\n", result.stderr), result.stderr
    for part in parts:
        assert part in result.stderr


def executable(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script, "utf-8")
    path.chmod(0o755)
    return path


def only(folder: Path, *commands: str) -> str:
    """A PATH on which there is nothing but these commands."""
    folder.mkdir()
    for command in commands:
        found = shutil.which(command)
        assert found, command
        (folder / command).symlink_to(found)
    return str(folder)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_listening(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
        return True
    return False


# --- python app.py --------------------------------------------------------------------------------


class LocalServer:
    """`python app.py` with the embedded AWS; its processes and temporary files can be told."""

    def __init__(self, folder: Path, **variables: str) -> None:
        self.port = free_port()
        self.url = f"http://localhost:{self.port}"
        self.temporary = folder / "tmp"
        self.temporary.mkdir(parents=True)
        self._output = folder / "output"
        # Every process inherits the writing end as its standard input; when none is left, the
        # reading end is at its end.
        self._processes, alive = os.pipe()
        with self._output.open("wb") as output, os.fdopen(alive, "wb") as standard_input:
            self.process = subprocess.Popen(
                [sys.executable, PROJECT / "app.py"],
                cwd=folder,
                env=environment(
                    PORT=str(self.port),
                    GUNICORN_WORKERS="2",
                    TMPDIR=str(self.temporary),
                    **variables,
                ),
                stdin=standard_input,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self._output.read_text("utf-8")

    def wait_until_it_serves(self) -> None:
        end = time.monotonic() + 30
        while "Stop it with" not in self.output or not self._is_healthy():
            assert self.process.poll() is None, self.output
            assert time.monotonic() < end, self.output
            time.sleep(0.05)

    def _is_healthy(self) -> bool:
        with suppress(urllib.error.URLError), urllib.request.urlopen(f"{self.url}/health"):
            return True
        return False

    def printed_commands(self) -> list[str]:
        paragraphs = [paragraph.strip() for paragraph in self.output.split("\n\n")]
        return [paragraph for paragraph in paragraphs if paragraph.startswith("curl ")]

    def has_processes(self) -> bool:
        readable, _, _ = select.select([self._processes], [], [], 0)
        return not readable

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(timeout=30)
        finally:
            self.process.kill()
            os.close(self._processes)


def metrics_folders(server: LocalServer) -> set[Path]:
    """Those of other services as well; in memory where the system has a folder for that."""
    found = [folder.glob("email-processor-*") for folder in (Path("/dev/shm"), server.temporary)]
    return {path for paths in found for path in paths}


@contextmanager
def local_server(folder: Path, **variables: str) -> Iterator[LocalServer]:
    server = LocalServer(folder, **variables)
    try:
        server.wait_until_it_serves()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    with local_server(tmp_path_factory.mktemp("service")) as server:
        yield server


@needs_curl
def test_printed_commands_send_a_message_and_show_it_in_the_queue(tmp_path: Path) -> None:
    if "aws-sigv4" not in run("curl", "--help", "all").stdout:
        pytest.skip("this curl cannot sign requests for AWS")
    with local_server(tmp_path) as server:
        send, show = server.printed_commands()
        answer = json.loads(run("bash", "-c", send).stdout)
        assert answer["status"] == "success"
        (message,) = json.loads(run("bash", "-c", show).stdout)["Messages"]
        assert message["MessageId"] == answer["message_id"]
        assert json.loads(message["Body"])["email_subject"] == "Happy new year!"


@pytest.mark.parametrize(
    ("signal_number", "whole_group"),
    [(signal.SIGINT, True), (signal.SIGTERM, False), (signal.SIGHUP, True)],
    ids=["ctrl-c", "terminated", "terminal-closed"],
)
def test_stopped_local_server_leaves_no_process_no_port_and_no_file(
    tmp_path: Path, signal_number: signal.Signals, whole_group: bool
) -> None:
    before = set(Path("/dev/shm").glob("email-processor-*"))
    with local_server(tmp_path) as server:
        (emulator_port,) = set(map(int, re.findall(r"http://127\.0\.0\.1:(\d+)", server.output)))
        assert is_listening(emulator_port)
        assert server.has_processes()
        made = metrics_folders(server) - before
        assert made
        send = os.killpg if whole_group else os.kill
        send(server.process.pid, signal_number)
        assert server.process.wait(timeout=15) == 0
        assert not server.has_processes()
        assert not is_listening(server.port)
        assert not is_listening(emulator_port)
        assert list(server.temporary.iterdir()) == []
        assert not made & metrics_folders(server)
        assert "Traceback" not in server.output


def test_busy_port_is_one_line(service: LocalServer) -> None:
    result = run(sys.executable, PROJECT / "app.py", env=environment(PORT=str(service.port)))
    assert_one_line(result, str(service.port), "PORT=")


@pytest.mark.parametrize(
    ("variable", "value"), [("PORT", "http"), ("GUNICORN_WORKERS", "0"), ("LOG_LEVEL", "loud")]
)
def test_bad_variable_is_one_line_that_names_it(variable: str, value: str) -> None:
    result = run(sys.executable, PROJECT / "app.py", env=environment(**{variable: value}))
    assert_one_line(result, variable, value)


# --- test.sh --------------------------------------------------------------------------------------

TEST_SH = PROJECT / "test.sh"


@contextmanager
def echoing_server() -> Iterator[tuple[str, list[bytes]]]:
    """A server that answers every request with its body; its URL, and the bodies."""
    bodies: list[bytes] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            bodies.append(body)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815 - the base class's naming

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", bodies
        finally:
            server.shutdown()
            thread.join()


@needs_curl
def test_all_nine_checks_pass_and_the_token_is_in_no_argument_and_no_variable_of_curl(
    service: LocalServer, tmp_path: Path
) -> None:
    record = tmp_path / "record"
    executable(
        tmp_path / "bin" / "curl",
        f"#!/bin/sh\nprintf '%s\\n' \"$@\" >> '{record}'\nenv >> '{record}'\n"
        f"exec '{shutil.which('curl')}' \"$@\"\n",
    )
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    result = run(TEST_SH, service.url, cwd=tmp_path, env=environment(API_TOKEN=TOKEN, PATH=path))
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert [line.split()[:2] for line in lines[:-1]] == [["ok", f"{n}/9"] for n in range(1, 10)]
    assert lines[-1] == f"All 9 checks passed at {service.url}."
    assert "/process" in record.read_text("utf-8")
    assert TOKEN not in record.read_text("utf-8") + result.stdout


@needs_curl
def test_wrong_token_fails_and_the_summary_says_so(service: LocalServer) -> None:
    result = run(TEST_SH, service.url, env=environment(API_TOKEN="wrong"))
    assert_one_line(result, "5 of 9 checks failed", "API_TOKEN", name="test.sh: ")
    assert "FAIL  2/9 valid message: expected 200 message_id, came 401 invalid_token" in (
        result.stdout.splitlines()
    )
    assert result.stdout.count("FAIL ") == 5


@needs_curl
def test_any_token_arrives_unchanged_and_is_not_printed_even_when_the_service_repeats_it() -> None:
    with echoing_server() as (url, bodies):
        result = run(TEST_SH, url, env=environment(API_TOKEN=HOSTILE_TOKEN))
    assert_one_line(result, "9 of 9 checks failed", name="test.sh: ")
    assert json.loads(bodies[1])["token"] == HOSTILE_TOKEN
    assert "quote" not in result.stdout + result.stderr


@needs_curl
def test_token_comes_from_ssm_without_api_token(service: LocalServer, tmp_path: Path) -> None:
    executable(
        tmp_path / "aws",
        "#!/bin/sh\n"
        'case "$*" in\n'
        '  "ssm get-parameter --with-decryption --name /first --region eu-west-1 "*)\n'
        "    echo 'a warning' >&2\n"
        f"    echo '{TOKEN}' ;;\n"
        "  *) exit 1 ;;\n"
        "esac\n",
    )
    result = run(
        TEST_SH,
        service.url,
        env=environment(
            TOKEN_SSM_PARAMETER="/first, /second",
            AWS_REGION="eu-west-1",
            PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        ),
    )
    assert (result.returncode, result.stderr) == (0, "")


@needs_curl
def test_refusal_of_the_aws_cli_is_one_line(tmp_path: Path) -> None:
    executable(
        tmp_path / "aws", "#!/bin/sh\necho >&2\necho 'Unable to locate credentials' >&2\nexit 1\n"
    )
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    result = run(TEST_SH, env=environment(PATH=path))
    assert_one_line(
        result, "/email-service/api-token in us-west-1", "locate credentials", name="test.sh: "
    )


@needs_curl
def test_no_token_to_be_had_is_one_line(tmp_path: Path) -> None:
    result = run(TEST_SH, env=environment(PATH=only(tmp_path / "bin", "bash", "curl")))
    assert_one_line(result, "set API_TOKEN", "AWS CLI", name="test.sh: ")


@needs_curl
def test_nothing_listening_is_one_line() -> None:
    url = f"http://localhost:{free_port()}"
    result = run(TEST_SH, url, env=environment(API_TOKEN=TOKEN))
    assert_one_line(result, f"No answer from {url}", name="test.sh: ")
    assert result.stdout == ""


def test_missing_curl_is_one_line(tmp_path: Path) -> None:
    env = environment(API_TOKEN=TOKEN, PATH=only(tmp_path / "bin", "bash"))
    assert_one_line(run(TEST_SH, env=env), "curl is missing", name="test.sh: ")


# --- setup-local.sh -------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with setup-local.sh, and requirements that need no network: none."""
    folder = tmp_path / "a project"
    folder.mkdir()
    shutil.copy(PROJECT / "setup-local.sh", folder)
    (folder / "requirements-dev.txt").write_text("# nothing\n")
    (folder / "app.py").write_text("print('serving')\n")
    return folder


def fake_python(path: Path, change: str) -> Path:
    """The real Python, changed by a statement."""
    code = f"import sys; {change}; exec(sys.argv[1])"
    return executable(path, f"#!/bin/sh\nexec '{sys.executable}' -c '{code}' \"$2\"\n")


def test_no_python_is_one_line(project: Path, tmp_path: Path) -> None:
    env = environment(PATH=only(tmp_path / "bin", "bash", "cat", "dirname"))
    result = run(project / "setup-local.sh", env=env)
    assert_one_line(result, "no python3", "3.11", name="setup-local.sh: ")
    assert not (project / "venv").exists()


def test_old_python_is_one_line(project: Path, tmp_path: Path) -> None:
    path = only(tmp_path / "bin", "bash", "cat", "dirname")
    fake_python(tmp_path / "bin" / "python3", "sys.version_info = (3, 10, 13)")
    result = run(project / "setup-local.sh", env=environment(PATH=path))
    assert_one_line(result, "python3 is Python 3.10.13", "3.11", name="setup-local.sh: ")
    assert not (project / "venv").exists()


def test_python_without_ensurepip_is_one_line(project: Path, tmp_path: Path) -> None:
    python = fake_python(tmp_path / "python3", 'sys.modules["ensurepip"] = None')
    result = run(project / "setup-local.sh", env=environment(PYTHON=str(python)))
    assert_one_line(result, "apt install python3-venv", name="setup-local.sh: ")
    assert not (project / "venv").exists()


def test_python_that_does_not_run_is_one_line(project: Path) -> None:
    result = run(project / "setup-local.sh", env=environment(PYTHON="/nowhere/python3"))
    assert_one_line(result, "PYTHON=/nowhere/python3", name="setup-local.sh: ")


def test_no_network_is_one_line_and_the_next_run_starts_anew(project: Path) -> None:
    (project / "requirements-dev.txt").write_text(f"flask==3.1.3 --hash=sha256:{'0' * 64}\n")
    env = environment(
        PYTHON=sys.executable,
        PIP_CONFIG_FILE=os.devnull,
        PIP_INDEX_URL=f"http://127.0.0.1:{free_port()}/",
        PIP_RETRIES="0",
    )
    result = run(project / "setup-local.sh", "run", env=env)
    assert_one_line(result, "No network", "venv/install.log", name="setup-local.sh: ")
    assert result.stdout.splitlines()[-1].startswith("[2/3] install")
    assert not (project / "venv" / "made-from").exists()


def test_environment_is_made_once_and_again_when_broken(project: Path) -> None:
    def first_step() -> str:
        # Found on the PATH and called from elsewhere, it works in its own folder.
        path = f"{project}{os.pathsep}{os.environ['PATH']}"
        env = environment(PYTHON=sys.executable, PATH=path)
        result = run("setup-local.sh", "run", cwd=project.parent, env=env)
        assert (result.returncode, result.stderr) == (0, "")
        steps = result.stdout.splitlines()
        assert [step.split()[0] for step in steps] == ["[1/3]", "[2/3]", "[3/3]", "serving"]
        return steps[0].split()[1]

    (project / "venv").mkdir()  # all that an interrupted run has left
    assert first_step() == "make"
    assert first_step() == "use"
    python = project / "venv" / "bin" / "python"
    python.unlink()
    python.symlink_to("/nowhere/python3")
    assert first_step() == "make"


def test_environment_of_other_requirements_or_of_another_folder_is_not_used(project: Path) -> None:
    """Told by the complaint about a Python that is asked for only when one is to be made."""
    commands = project / "venv" / "bin"
    executable(commands / "python", f"#!/bin/sh\nexec '{sys.executable}' \"$@\"\n")
    env = environment(PATH=only(project / "path", "bash", "cat", "dirname"))

    def is_used(made_from: str) -> bool:
        (project / "venv" / "made-from").write_text(made_from)
        return run(project / "setup-local.sh", env=env).returncode == 0

    assert is_used(f"{project}\n# nothing\n")
    assert not is_used(f"{project}\n# something else\n")
    assert not is_used("/elsewhere\n# nothing\n")
    assert not is_used("")


@pytest.mark.parametrize(("tests", "report", "expected"), [(0, 0, 0), (3, 2, 3), (0, 2, 2)])
def test_test_ends_with_the_status_of_the_tests_or_of_the_coverage(
    project: Path, tests: int, report: int, expected: int
) -> None:
    commands = project / "venv" / "bin"
    executable(commands / "python", f"#!/bin/sh\nexec '{sys.executable}' \"$@\"\n")
    executable(
        commands / "coverage",
        '#!/bin/sh\necho "coverage $*"\n'
        f"case $1 in report) exit {report};; run) exit {tests};; esac\n",
    )
    (project / "venv" / "made-from").write_text(f"{project}\n# nothing\n")
    result = run(project / "setup-local.sh", "test")
    assert result.returncode == expected
    steps = ["erase", "run -m pytest", "combine --quiet", "report"]
    assert result.stdout.splitlines()[-4:] == [f"coverage {step}" for step in steps]


# --- .ci/run --------------------------------------------------------------------------------------


def test_ci_runs_the_tests_then_format_lint_and_types_and_stops_at_the_first_failure(
    tmp_path: Path,
) -> None:
    stub = '#!/bin/sh\necho "ran ${0##*/} $*"\n[ "${0##*/}" != "$BROKEN" ]\n'
    (tmp_path / ".ci").mkdir()
    shutil.copy(PROJECT / ".ci" / "run", tmp_path / ".ci")
    executable(tmp_path / "setup-local.sh", stub)
    for tool in ("ruff", "mypy"):
        executable(tmp_path / "venv" / "bin" / tool, stub)

    def ran(broken: str) -> tuple[int, list[str]]:
        result = run(tmp_path / ".ci" / "run", env=environment(BROKEN=broken))
        return result.returncode, re.findall(r"^ran (.+?) ?$", result.stdout, re.MULTILINE)

    everything = ["setup-local.sh test", "ruff format --check .", "ruff check .", "mypy"]
    assert ran("nothing") == (0, everything)
    assert ran("mypy") == (1, everything[:4])
    assert ran("setup-local.sh") == (1, everything[:1])


# --- All scripts ----------------------------------------------------------------------------------

SCRIPTS = ["setup-local.sh", "test.sh", "deploy.sh", ".ci/run"]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_says_how_to_use_the_script(script: str, option: str, tmp_path: Path) -> None:
    result = run(PROJECT / script, option, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("Usage: ")


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("arguments", [("--unknown",), ("http://localhost:1", "more")])
def test_wrong_arguments_are_one_line_and_status_2(script: str, arguments: tuple[str, ...]) -> None:
    result = run(PROJECT / script, *arguments, env=environment(API_TOKEN=TOKEN))
    assert_one_line(result, status=2, name=f"{script}: ")


# --- Requirements ---------------------------------------------------------------------------------

PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text("utf-8"))
RUNTIME, DEVELOPMENT = (
    {re.match(r"[\w.-]+", line)[0].lower() for line in lines}  # type: ignore[index]
    for lines in (PYPROJECT["project"]["dependencies"], PYPROJECT["dependency-groups"]["dev"])
)


def pins(file: str) -> dict[str, str]:
    """Package -> its pin and hashes."""
    text = re.sub(r" *#.*\n", "", (PROJECT / file).read_text("utf-8"))
    entries = text.replace("\\\n", " ").splitlines()
    return {entry.split("==")[0]: entry for entry in entries}


@pytest.mark.parametrize("file", ["requirements.txt", "requirements-dev.txt"])
def test_every_requirement_is_pinned_with_hashes_and_names_no_host(file: str) -> None:
    assert "://" not in (PROJECT / file).read_text("utf-8")
    for entry in pins(file).values():
        assert re.fullmatch(r"[\w.-]+==[\w.]+( ; [^\\]*?)?( +--hash=sha256:[0-9a-f]{64})+ *", entry)


def test_requirements_hold_what_pyproject_declares_and_nothing_for_development() -> None:
    assert set(pins("requirements.txt")) >= RUNTIME
    assert set(pins("requirements-dev.txt")) >= RUNTIME | DEVELOPMENT
    assert not set(pins("requirements.txt")) & DEVELOPMENT


def test_development_has_the_same_pins_as_production() -> None:
    assert pins("requirements.txt").items() <= pins("requirements-dev.txt").items()
