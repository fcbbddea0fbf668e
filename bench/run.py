"""Measure email-processor and its alternatives under the same load.

This needs Linux, wrk, and the project's environment (./setup-local.sh makes it). Fastify also needs
Node 20 or newer; the pods need a Docker engine. The benchmark installs the other contenders into
bench/venv and bench/contenders/fastify/node_modules, and starts a fake of SSM and SQS with a set
latency. Each round measures every contender once. All traffic stays on loopback. Compare ratios
within a run: a machine's load changes all figures together.

Each table takes less than 10 minutes, and a run may measure a single table. `--json FILE` adds the
figures to the file, and `python bench/report.py FILE` writes RESULTS.md and chart.svg from them.
"""

# ruff: noqa: S310, S603 - starts the contenders, and sends them requests on loopback
from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
PROJECT, CONTENDERS = BENCH.parent, BENCH / "contenders"
sys.path.insert(0, str(PROJECT / "tests"))

import report  # noqa: E402 - beside this file
from fake_aws import TOKEN, FakeAws  # noqa: E402

FEW_CLIENTS, POD_WORKERS = (1, 8), (1, 2, 4)
SWEEP_CLIENTS, SWEEP_LATENCIES_MS = (1, 8, 64, 256), (2, 8, 30, 100)
IMAGE = "email-processor:bench"
# Without the environment's proxies.
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
MESSAGE = {
    "data": {
        "email_subject": "Your order 4711-2093 is on its way",
        "email_sender": "Jane Doe <jane.doe@example.com>",
        "email_timestream": "1693561101",
        "email_content": "Hello John,\n\nthank you for your order. It left our warehouse this "
        "morning and should be with you on Thursday. You can follow it with the number on your "
        'invoice; if nobody is at home, the "safe place" that you chose is used.\n\n'
        "With kind regards,\nJane Doe\nCustomer Care",
    },
    "token": TOKEN,
}


class BenchError(Exception):
    """The run cannot continue; the message says how to fix it."""


@dataclass(frozen=True)
class Contender:
    name: str
    command: tuple[str, ...]  # "{port}" stands for the port
    folder: Path = CONTENDERS
    variables: dict[str, str] = field(default_factory=dict)
    publishes: bool = True  # each success is a message in the queue


def email_processor(workers: int, threads: int = 2, folder: Path = PROJECT) -> Contender:
    name = "email-processor" if folder == PROJECT else "/".join(folder.parts[-2:])
    return Contender(
        f"{name} {workers}x{threads}",
        (sys.executable, "-m", "gunicorn", "--bind", "127.0.0.1:{port}"),
        folder,
        {"GUNICORN_WORKERS": str(workers), "GUNICORN_THREADS": str(threads)},
    )


def flask(name: str, *options: str, publishes: bool = True) -> Contender:
    size = ("--worker-class=gthread", "--workers=4", "--threads=2")
    command = (sys.executable, "-m", "gunicorn", "--bind", "127.0.0.1:{port}", *size, *options)
    return Contender(name, command, publishes=publishes)


DEFAULT, ONE_WORKER = email_processor(4), email_processor(1)
NO_METRICS = Contender(
    "without metrics 4x2",
    (*DEFAULT.command, "--pythonpath", str(CONTENDERS), "no_metrics:create_app()"),
    PROJECT,
    DEFAULT.variables,
)
DIRECT = flask("direct 4x2", "--keep-alive=75", "--access-logfile=-", "direct:create_app()")
FLASK_ALONE = flask("flask alone 4x2", "flask_alone:app", publishes=False)
FASTAPI = Contender("FastAPI + aiobotocore", (str(BENCH / "venv/bin/python"), "fastapi_app.py"))
FASTIFY = Contender("Fastify + AWS SDK v3", ("node", "server.js"), CONTENDERS / "fastify")


def pod(workers: int, aws: FakeAws) -> Contender:
    """The image with a pod's limits of CPU and memory."""
    name = f"{workers} worker{'s' * (workers > 1)}"
    engine = {name: value for name, value in os.environ.items() if name.startswith("DOCKER_")}
    variables = email_processor(workers).variables
    settings = [f"--env={name}" for name in ("PORT", *variables, *aws.variables())]
    limits = ("--cpus=0.5", "--memory=512m", "--read-only", "--tmpfs=/tmp", "--log-driver=none")
    run = ("docker", "run", "--rm", "--name=bench-{port}", "--network=host")
    return Contender(name, (*run, *limits, *settings, IMAGE), PROJECT, engine | variables)


# --- Processes ------------------------------------------------------------------------------------


def output(*command: str, folder: Path = PROJECT) -> str:
    try:
        done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        complaints = getattr(error, "stderr", "")
        raise BenchError(f"{' '.join(command[:3])} failed: {error}\n{complaints}") from error
    return done.stdout.strip()


def stat_of(pid: str) -> list[str]:
    """/proc/PID/stat from the third field on. The fields before it may contain blanks."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()


def session(leader: int) -> Iterator[tuple[str, list[str]]]:
    """Every process in the contender's session, children included."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(FileNotFoundError, ProcessLookupError):
            stat = stat_of(pid)
            if int(stat[3]) == leader and stat[0] != "Z":
                yield pid, stat


def cpu_seconds(leader: int) -> float:
    """User and system time of the process tree, with the children that it has reaped."""
    ticks = sum(int(part) for _, stat in session(leader) for part in stat[11:15])
    return ticks / os.sysconf("SC_CLK_TCK")


def memory_mib(leader: int) -> float:
    """Proportional set size: a page that several workers share counts once."""
    kib = 0
    for pid, _ in session(leader):
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        kib += int(re.search(r"^Pss:\s+(\d+)", rollup, re.MULTILINE)[1])  # type: ignore[index]
    return kib / 1024


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@dataclass(frozen=True)
class Running:
    pid: int
    url: str
    publishes: bool


@contextmanager
def started(contender: Contender, aws: FakeAws) -> Iterator[Running]:
    """Run the contender in a new session until the block ends, and remove everything after that."""
    port = free_port()
    variables = {"PATH": os.environ["PATH"], "PORT": str(port)}
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(
            [part.format(port=port) for part in contender.command],
            cwd=contender.folder,
            env={**variables, **aws.variables(), **contender.variables},
            stdout=subprocess.DEVNULL,  # a log line for each request: all write it, none keeps it
            stderr=complaints,
            start_new_session=True,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            if not serves(url, process):
                complaints.seek(0)
                text = complaints.read().decode(errors="replace")[-2000:]
                raise BenchError(f"{contender.name} does not serve:\n{text}")
            pid = process.pid
            if contender.command[0] == "docker":  # `process` is only the docker command
                pid = int(output("docker", "inspect", "-f", "{{.State.Pid}}", f"bench-{port}"))
            yield Running(pid, url, contender.publishes)
        finally:
            stop(process)
            if contender.command[0] == "docker":
                with suppress(BenchError):
                    output("docker", "rm", "--force", f"bench-{port}")


def serves(url: str, process: subprocess.Popen[bytes]) -> bool:
    """Whether it responds to /health and accepts a message within 30 s."""
    headers = {"Content-Type": "application/json"}
    post = urllib.request.Request(f"{url}/process", json.dumps(MESSAGE).encode(), headers)
    for _ in range(300):
        if process.poll() is not None:
            return False
        with suppress(OSError):
            for question in (f"{url}/health", post):
                OPENER.open(question, timeout=5).close()
            return True
        time.sleep(0.1)
    return False


def stop(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for _ in range(20):
        left = [pid for pid, _ in session(process.pid)]
        if not left:
            return
        time.sleep(0.1)
    for pid in left:
        os.kill(int(pid), signal.SIGKILL)
    raise BenchError(f"processes were left behind and have been ended: {', '.join(left)}")


# --- Measuring ------------------------------------------------------------------------------------


def wrk(url: str, clients: int, seconds: float, body: Any, target: str = "") -> dict[str, float]:
    command = ["wrk", "-t1", f"-c{clients}", f"-d{seconds:g}s", "--timeout", "10s", "--latency"]
    variables = {
        "BODY": json.dumps(body),
        "CONTENT_TYPE": "application/x-amz-json-1.0" if target else "application/json",
        "TARGET": target,
    }
    output = subprocess.run(
        [*command, "-s", str(BENCH / "post.lua"), url],
        env={"PATH": os.environ["PATH"], **variables},
        capture_output=True,
        text=True,
        check=True,
        timeout=seconds + 60,
    ).stdout
    return dict(json.loads(output.splitlines()[-1]))


@contextmanager
def probing(url: str) -> Iterator[list[float]]:
    """The milliseconds of each GET /health meanwhile: two a second, each on a new connection."""
    times, ended = [0.0], threading.Event()

    def probe() -> None:
        while not ended.wait(0.5):
            begin = time.monotonic()
            try:
                OPENER.open(f"{url}/health", timeout=60).close()
                times.append((time.monotonic() - begin) * 1000)
            except OSError:
                times.append(float("inf"))

    thread = threading.Thread(target=probe)
    thread.start()
    try:
        yield times
    finally:
        ended.set()
        thread.join()


def settled(aws: FakeAws) -> dict[str, Any]:
    """The fake's counts once no call is in flight: wrk leaves requests behind when it ends."""
    counts = aws.counts()
    for _ in range(100):
        time.sleep(0.2)
        before, counts = counts, aws.counts()
        if counts == before:
            return counts
    raise BenchError("calls of AWS continue after the load has ended")


def measure(running: Running, aws: FakeAws, clients: int, seconds: float) -> dict[str, float]:
    """One measurement. Raises BenchError when a request failed, or a message is missing."""
    url = f"{running.url}/process"
    before, cpu = settled(aws), cpu_seconds(running.pid)
    with probing(running.url) as health:
        load = wrk(url, clients, seconds, MESSAGE)
    memory = memory_mib(running.pid)
    after, cpu = settled(aws), cpu_seconds(running.pid) - cpu
    succeeded = load["requests"]
    messages = after["accepted"] - before["accepted"] if running.publishes else succeeded
    if load["rejected"] or load["failed"]:
        raise BenchError(f"{load['rejected']} requests rejected, {load['failed']} not completed")
    if not 0 <= messages - succeeded <= clients:
        raise BenchError(f"{succeeded} successes, but {messages} messages in the queue")

    def calls(*operations: str) -> float:
        return float(sum(after["calls"].get(o, 0) - before["calls"].get(o, 0) for o in operations))

    sqs, ssm = calls("SendMessage", "SendMessageBatch"), calls("GetParameter", "GetParameters")
    result = {
        "rate": succeeded / load["seconds"],
        "cpu_us": cpu / messages * 1e6,
        "p50_ms": load["p50_ms"],
        "p99_ms": load["p99_ms"],
        "memory_mib": memory,
        "health_ms": max(health),
    }
    if running.publishes:
        result |= {
            "sqs_calls": sqs / messages,
            "ssm_calls": ssm / messages,
            "aws_rate": (sqs + ssm) / load["seconds"],
            "cost": report.cost_per_million(sqs / messages, result["cpu_us"]),
        }
    return result


def ceiling(aws: FakeAws, clients: int, seconds: float) -> float:
    """SendMessage calls a second of the fake without latency, under wrk."""
    aws.set(latency_ms=0)
    entry = {"QueueUrl": aws.queue_url, "MessageBody": json.dumps(MESSAGE["data"])}
    values = {"ContentType": "application/json", "ProcessedAt": "x" * 32, "RequestId": "x" * 32}
    attributes = {n: {"DataType": "String", "StringValue": v} for n, v in values.items()}
    body = {**entry, "MessageAttributes": attributes}
    load = wrk(aws.url, clients, seconds, body, "AmazonSQS.SendMessage")
    return load["requests"] / load["seconds"]


def compare(
    contenders: list[Contender], aws: FakeAws, options: argparse.Namespace
) -> dict[str, list[dict[str, float]]]:
    """Each contender's measurements, one a round; in turn, so that all share the noise."""
    prepare(contenders)
    results: dict[str, list[dict[str, float]]] = {contender.name: [] for contender in contenders}
    aws.set(latency_ms=options.latency_ms)
    case = f"{options.clients} clients, {options.latency_ms:g} ms"
    for number, contender in itertools.product(range(1, options.rounds + 1), contenders):
        print(f"  {case}, round {number}/{options.rounds}, {contender.name}:", end=" ", flush=True)
        with started(contender, aws) as running:
            # Enough clients to warm every worker.
            wrk(f"{running.url}/process", max(64, options.clients), options.warm_up, MESSAGE)
            result = measure(running, aws, options.clients, options.seconds)
        print(
            f"{result['rate']:,.0f} messages/s, {result['cpu_us']:,.0f} us CPU each, "
            f"p99 {result['p99_ms']:.0f} ms, {result.get('sqs_calls', 0):.2f} SQS calls each"
        )
        results[contender.name].append(result)
    return results


def changed(options: argparse.Namespace, **values: float) -> argparse.Namespace:
    return argparse.Namespace(**vars(options) | values)


def few(aws: FakeAws, options: argparse.Namespace) -> dict[str, Any]:
    """Latency with few clients, by their number (text, as in JSON)."""
    contenders = [DEFAULT, FASTAPI, *options.beside]
    return {str(n): compare(contenders, aws, changed(options, clients=n)) for n in FEW_CLIENTS}


def sweep(aws: FakeAws, options: argparse.Namespace) -> list[dict[str, Any]]:
    """CPU per message as the clients and SQS's latency grow."""
    rows = []
    short = changed(
        options, rounds=1, seconds=min(options.seconds, 4), warm_up=min(options.warm_up, 2)
    )
    for latency_ms, clients in itertools.product(SWEEP_LATENCIES_MS, SWEEP_CLIENTS):
        case = {"clients": clients, "latency_ms": latency_ms}
        results = compare([DEFAULT, ONE_WORKER], aws, changed(short, **case))
        rows += [{"name": name, **case, **result} for name, (result,) in results.items()]
    return rows


TABLES: dict[str, Callable[[FakeAws, argparse.Namespace], Any]] = {
    "compare": lambda aws, options: compare(chosen(options), aws, options),
    "few": few,
    "metrics": lambda aws, options: compare([DEFAULT, NO_METRICS], aws, options),
    "pods": lambda aws, options: compare([pod(n, aws) for n in POD_WORKERS], aws, options),
    "sweep": sweep,
}


# --- Preparing ------------------------------------------------------------------------------------


def install(folder: Path, pins: Path, *commands: list[str]) -> None:
    """Run the commands that fill the folder, unless it was filled from the same pins before."""
    stamp = folder / "installed-from"
    if stamp.exists() and stamp.read_bytes() == pins.read_bytes():
        return
    shutil.rmtree(folder, ignore_errors=True)
    for command in commands:
        output(*command, folder=pins.parent)
    shutil.copy(pins, stamp)


def node_version() -> str | None:
    """Node's version if Fastify can run: Node 20 or newer, and npm."""
    if not (shutil.which("node") and shutil.which("npm")):
        return None
    version = output("node", "--version").removeprefix("v")
    return version if int(version.partition(".")[0]) >= 20 else None


def prepare(contenders: list[Contender]) -> None:
    if any(contender.command[0] == "docker" for contender in contenders):
        output("docker", "build", "--quiet", f"--tag={IMAGE}", ".")
    if FASTAPI in contenders:
        venv, pins = BENCH / "venv", BENCH / "requirements.txt"
        make = [sys.executable, "-m", "venv", str(venv)]
        fill = [str(venv / "bin/python"), "-m", "pip", "install", "--quiet"]
        install(venv, pins, make, [*fill, "--require-hashes", "-r", str(pins)])
    if FASTIFY in contenders:
        folder = FASTIFY.folder
        fill = ["npm", "ci", "--no-audit", "--no-fund", "--loglevel=error"]
        install(folder / "node_modules", folder / "package-lock.json", fill)


def machine() -> dict[str, str]:
    """The machine and the versions on which the figures depend."""
    model = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    pins = dict(re.findall(r"^([\w-]+)==(\S+)", (BENCH / "requirements.txt").read_text(), re.M))
    node_pins = json.loads((FASTIFY.folder / "package.json").read_text())["dependencies"]
    ours = {name: importlib.metadata.version(name) for name in ("boto3", "flask", "gunicorn")}
    theirs = {name: pins[name] for name in ("aiobotocore", "fastapi", "uvicorn")}
    packages = {**ours, **theirs, **node_pins}
    return {
        "CPU": f"{model[1] if model else platform.machine()}, {os.cpu_count()} cores",
        "Kernel": platform.release(),
        "Python": platform.python_version(),
        "Node": node_version() or "none",
        "Packages": ", ".join(f"{name} {version}" for name, version in packages.items()),
    }


# --- Command line ---------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    about, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(description=about, epilog=details)
    names = ", ".join(TABLES)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"{names} (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument("--seconds", type=float, default=8, help="of a measurement (default 8)")
    # V8 compiles for about five seconds under load. Measured before that, Node uses twice the CPU.
    parser.add_argument("--warm-up", type=float, default=6, help="seconds before it (default 6)")
    parser.add_argument("--clients", type=int, default=64, help="at once (default 64)")
    parser.add_argument("--latency-ms", type=float, default=8, help="of an AWS call (default 8)")
    size = "4x8 means email-processor with 4 workers x 8 threads"
    parser.add_argument(
        "--only", metavar="A,B", help=f"compare: contenders whose names contain A or B; {size}"
    )
    parser.add_argument(
        "--beside", metavar="FOLDER", type=Path, help="compare, few: add another checkout, as 4x2"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="add the figures to this file")
    options = parser.parse_args()
    if unknown := set(options.tables) - set(TABLES):
        parser.error(f"no such table: {', '.join(unknown)} (there are {names})")
    options.beside = [email_processor(4, folder=options.beside.resolve())] if options.beside else []
    return options


def chosen(options: argparse.Namespace) -> list[Contender]:
    contenders = [DEFAULT, ONE_WORKER, DIRECT, FLASK_ALONE, FASTAPI, FASTIFY]
    if not node_version():
        print("Fastify is left out: it needs Node 20 or newer, and npm.")
        contenders.remove(FASTIFY)
    found = []
    for part in options.only.split(",") if options.only else [""]:
        if size := re.fullmatch(r"(\d+)x(\d+)", part):
            found.append(email_processor(int(size[1]), int(size[2])))
        else:
            found += [each for each in contenders if part.lower() in each.name.lower()]
    return [*found, *options.beside]


def figures_so_far(options: argparse.Namespace) -> dict[str, Any]:
    load = {name: getattr(options, name) for name in ("rounds", "seconds", "clients", "latency_ms")}
    raw: dict[str, Any] = {"runs": {}}
    if options.json and options.json.exists():
        raw = json.loads(options.json.read_text())
        if raw["options"] != load:
            raise BenchError(f"{options.json} holds figures of other options: {raw['options']}")
    return raw | {"options": load, "machine": machine()}


def main() -> None:
    options = parse_arguments()
    if not shutil.which("wrk"):
        sys.exit("wrk is needed for the load: install it (apt install wrk, brew install wrk).")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("bench: stopped"))  # ends the contender too
    shown = [part for part in sys.argv[1:] if part not in ("--json", str(options.json))]
    command = " ".join(["python", "bench/run.py", *shown])
    tables = options.tables or list(TABLES)
    try:
        raw = figures_so_far(options)
        with FakeAws() as aws:
            aws.set(record=False)
            for number, table in enumerate(tables, 1):
                begin, idle = datetime.now(UTC), f"{os.getloadavg()[0]:.2f}"
                print(f"[{number}/{len(tables)}] {table}", flush=True)
                if table == "compare":
                    raw["ceiling"] = ceiling(aws, options.clients, 3)
                raw[table] = TABLES[table](aws, options)
                raw["runs"][table] = f"`{command}`, {begin:%Y-%m-%d}, load average before {idle}"
                if options.json:
                    options.json.write_text(json.dumps(raw, indent=1) + "\n")
    except BenchError as error:
        sys.exit(f"bench: {error}")
    print(report.as_text(raw))


if __name__ == "__main__":
    main()
