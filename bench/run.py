"""Measure email-processor beside what its users would pick instead, under the same load.

It needs Linux, wrk, and the project's own environment (./setup-local.sh makes it); with Node 20 or
newer Fastify takes part too. It installs the other contenders into bench/venv and
bench/contenders/fastify/node_modules, starts a fake of SSM and SQS with a set latency, and then,
round by round, each contender in turn. Everything stays on loopback. Ratios within one run are what
to compare: a machine's load moves all figures together.
"""

# ruff: noqa: S310, S603, S607 - it starts the contenders, and asks them on loopback
from __future__ import annotations

import argparse
import importlib.metadata
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
import time
import urllib.request
from collections.abc import Iterator
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

SWEEP_CLIENTS, SWEEP_LATENCIES_MS = (1, 8, 64, 256), (2, 8, 30, 100)
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
    """The run cannot go on; the message says what to do."""


@dataclass(frozen=True)
class Contender:
    name: str
    command: tuple[str, ...]  # "{port}" stands for the port
    folder: Path = CONTENDERS
    variables: dict[str, str] = field(default_factory=dict)


def email_processor(workers: int, threads: int) -> Contender:
    return Contender(
        f"email-processor {workers}x{threads}",
        (sys.executable, "-m", "gunicorn", "--bind", "127.0.0.1:{port}"),
        PROJECT,
        {"GUNICORN_WORKERS": str(workers), "GUNICORN_THREADS": str(threads)},
    )


def flask(name: str, app: str) -> Contender:
    options = "--bind 127.0.0.1:{port} --worker-class gthread --workers 4 --threads 2"
    more = "--keep-alive 75 --access-logfile -"
    command = (sys.executable, "-m", "gunicorn", *options.split(), *more.split(), app)
    return Contender(name, command)


DEFAULT, THROUGHPUT = email_processor(4, 2), email_processor(1, 64)
NO_METRICS = Contender(
    "without metrics 1x64",
    (*THROUGHPUT.command, "--pythonpath", str(CONTENDERS), "no_metrics:create_app()"),
    PROJECT,
    THROUGHPUT.variables,
)
DIRECT = flask("direct 4x2", "direct:create_app()")
CACHED = flask("cached token 4x2", "direct:create_app(cache_seconds=60)")
FASTAPI = Contender("FastAPI + aiobotocore", (str(BENCH / "venv/bin/python"), "fastapi_app.py"))
FASTIFY = Contender("Fastify + AWS SDK v3", ("node", "server.js"), CONTENDERS / "fastify")


# --- Processes ------------------------------------------------------------------------------------


def stat_of(pid: str) -> list[str]:
    """/proc/PID/stat from the third field on; what stands before may contain blanks."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()


def session(leader: int) -> Iterator[tuple[str, list[str]]]:
    """Every process of the session that a contender was started in, its children included."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(FileNotFoundError, ProcessLookupError):
            stat = stat_of(pid)
            if int(stat[3]) == leader and stat[0] != "Z":
                yield pid, stat


def cpu_seconds(leader: int) -> float:
    """User and system time of the whole tree, with the children that it has reaped."""
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


@contextmanager
def started(contender: Contender, aws: FakeAws) -> Iterator[Running]:
    """Run the contender in a session of its own until the block ends, and leave nothing behind."""
    port = free_port()
    variables = {"PATH": os.environ["PATH"], "PORT": str(port)}
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(
            [part.format(port=port) for part in contender.command],
            cwd=contender.folder,
            env={**variables, **aws.environment(), **contender.variables},
            stdout=subprocess.DEVNULL,  # a log line for each request: all write it, none keeps it
            stderr=complaints,
            start_new_session=True,
        )
        try:
            running = Running(process.pid, f"http://127.0.0.1:{port}")
            if not serves(running.url, process):
                complaints.seek(0)
                text = complaints.read().decode(errors="replace")[-2000:]
                raise BenchError(f"{contender.name} does not serve:\n{text}")
            yield running
        finally:
            stop(process)


def serves(url: str, process: subprocess.Popen[bytes]) -> bool:
    """Whether it answers /health and takes a message within 30 s."""
    headers = {"Content-Type": "application/json"}
    post = urllib.request.Request(f"{url}/process", json.dumps(MESSAGE).encode(), headers)
    # Without the environment's proxies.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(300):
        if process.poll() is not None:
            return False
        with suppress(OSError):
            for question in (f"{url}/health", post):
                opener.open(question, timeout=5).close()
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


def settled(aws: FakeAws) -> dict[str, Any]:
    """The fake's counts once no call is under way: wrk leaves requests behind when it ends."""
    counts = aws.counts()
    for _ in range(50):
        time.sleep(0.2)
        before, counts = counts, aws.counts()
        if counts == before:
            return counts
    raise BenchError("calls to AWS go on after the load has ended")


def measure(running: Running, aws: FakeAws, clients: int, seconds: float) -> dict[str, float]:
    """One measurement. Raises BenchError when an answer was no success, or a message is missing."""
    url = f"{running.url}/process"
    before, cpu = settled(aws), cpu_seconds(running.pid)
    load = wrk(url, clients, seconds, MESSAGE)
    memory = memory_mib(running.pid)
    after, cpu = settled(aws), cpu_seconds(running.pid) - cpu
    messages, succeeded = after["accepted"] - before["accepted"], load["requests"]
    if load["refused"] or load["broken"]:
        raise BenchError(f"{load['refused']} requests refused, {load['broken']} broken off")
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
        "sqs_calls": sqs / messages,
        "ssm_calls": ssm / messages,
        "sqs_rate": sqs / load["seconds"],
        "ssm_rate": ssm / load["seconds"],
    }
    return {**result, "cost": report.cost_per_million(result["sqs_calls"], result["cpu_us"])}


def ceiling(aws: FakeAws, clients: int, seconds: float) -> float:
    """SendMessage calls a second that the fake answers with no latency, to wrk itself."""
    aws.set(latency_ms=0)
    entry = {"QueueUrl": aws.queue_url, "MessageBody": json.dumps(MESSAGE["data"])}
    values = {"ContentType": "application/json", "ProcessedAt": "x" * 32, "RequestId": "x" * 32}
    attributes = {n: {"DataType": "String", "StringValue": v} for n, v in values.items()}
    body = {**entry, "MessageAttributes": attributes}
    load = wrk(aws.url, clients, seconds, body, "AmazonSQS.SendMessage")
    return load["requests"] / load["seconds"]


class Progress:
    """A line for each measurement: begun, then its figures."""

    def __init__(self, total: int) -> None:
        self._total, self._number = total, 0

    def measure(self, label: str, *arguments: Any) -> dict[str, float]:
        self._number += 1
        print(f"  {self._number}/{self._total} {label}:", end=" ", flush=True)
        try:
            result = measure(*arguments)
        except BenchError as error:
            print("failed")
            raise BenchError(f"{label}: {error}") from error
        print(
            f"{result['rate']:,.0f} messages/s, {result['cpu_us']:,.0f} us CPU each, "
            f"p99 {result['p99_ms']:.0f} ms, {result['sqs_calls']:.2f} SQS calls each"
        )
        return result


def compare(
    contenders: list[Contender], aws: FakeAws, options: argparse.Namespace
) -> dict[str, list[dict[str, float]]]:
    """Each contender's measurements, one a round; in turn, so that all share the noise."""
    results: dict[str, list[dict[str, float]]] = {contender.name: [] for contender in contenders}
    progress = Progress(options.rounds * len(contenders))
    aws.set(latency_ms=options.latency_ms)
    for number in range(1, options.rounds + 1):
        for contender in contenders:
            with started(contender, aws) as running:
                wrk(f"{running.url}/process", options.clients, options.warm_up, MESSAGE)
                label = f"round {number}, {contender.name}"
                result = progress.measure(label, running, aws, options.clients, options.seconds)
            results[contender.name].append(result)
    return results


def sweep(aws: FakeAws, seconds: float) -> list[dict[str, Any]]:
    """CPU per message as the clients and SQS's latency grow."""
    rows, profiles = [], (DEFAULT, THROUGHPUT)
    progress = Progress(len(profiles) * len(SWEEP_CLIENTS) * len(SWEEP_LATENCIES_MS))
    for profile in profiles:
        with started(profile, aws) as running:
            for latency_ms in SWEEP_LATENCIES_MS:
                aws.set(latency_ms=latency_ms)
                for clients in SWEEP_CLIENTS:
                    wrk(f"{running.url}/process", clients, 1, MESSAGE)
                    label = f"{profile.name}, {clients} clients, SQS {latency_ms} ms"
                    result = progress.measure(label, running, aws, clients, seconds)
                    case = {"name": profile.name, "clients": clients, "latency_ms": latency_ms}
                    rows.append({**case, **result})
    return rows


def alone(aws: FakeAws, options: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """One client at a time, against a plain SendMessage with a cached token."""
    results: dict[str, list[dict[str, float]]] = {DEFAULT.name: [], CACHED.name: []}
    progress = Progress(2 * options.rounds)
    aws.set(latency_ms=options.latency_ms)
    with started(DEFAULT, aws) as ours, started(CACHED, aws) as plain:
        pairs = ((DEFAULT, ours), (CACHED, plain))
        for _, running in pairs:
            wrk(f"{running.url}/process", 8, options.warm_up, MESSAGE)  # wakes every worker
        for number in range(1, options.rounds + 1):
            for contender, running in pairs:
                label = f"round {number}, one client, {contender.name}"
                result = progress.measure(label, running, aws, 1, options.seconds)
                results[contender.name].append(result)
    return results


# --- Preparing ------------------------------------------------------------------------------------


def install(folder: Path, pins: Path, *commands: list[str]) -> None:
    """Run the commands that fill the folder, unless it was filled from the same pins before."""
    stamp = folder / "installed-from"
    if stamp.exists() and stamp.read_bytes() == pins.read_bytes():
        return
    shutil.rmtree(folder, ignore_errors=True)
    for command in commands:
        try:
            subprocess.run(command, check=True, cwd=pins.parent, stdout=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError) as error:
            raise BenchError(f"{' '.join(command[:3])} failed: {error}") from error
    shutil.copy(pins, stamp)


def node_version() -> str | None:
    """Node's version if Fastify can run: Node 20 or newer, and npm."""
    if not (shutil.which("node") and shutil.which("npm")):
        return None
    version = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True)
    text = version.stdout.strip().removeprefix("v")
    return text if int(text.partition(".")[0]) >= 20 else None


def prepare(contenders: list[Contender]) -> None:
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
    """What the figures depend on."""
    model = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    pins = dict(re.findall(r"^([\w-]+)==(\S+)", (BENCH / "requirements.txt").read_text(), re.M))
    node_pins = json.loads((FASTIFY.folder / "package.json").read_text())["dependencies"]
    ours = {name: importlib.metadata.version(name) for name in ("boto3", "flask", "gunicorn")}
    theirs = {name: pins[name] for name in ("aiobotocore", "fastapi", "uvicorn")}
    packages = {**ours, **theirs, **node_pins}
    return {
        "CPU": f"{model[1] if model else platform.machine()}, {os.cpu_count()} cores",
        "Load average before": f"{os.getloadavg()[0]:.2f}",
        "Kernel": platform.release(),
        "Python": platform.python_version(),
        "Node": node_version() or "none",
        "Packages": ", ".join(f"{name} {version}" for name, version in packages.items()),
        "Date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


# --- Command line ---------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    about, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(description=about, epilog=details)
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument("--seconds", type=float, default=8, help="of a measurement (default 8)")
    # V8 compiles for some five seconds under load; measured before, Node would look twice as dear.
    parser.add_argument("--warm-up", type=float, default=6, help="seconds before it (default 6)")
    parser.add_argument("--clients", type=int, default=64, help="at once (default 64)")
    parser.add_argument("--latency-ms", type=float, default=8, help="of an AWS call (default 8)")
    parser.add_argument("--only", default="", help="contenders whose names hold one of A,B,...")
    parser.add_argument(
        "--profiles", metavar="1x32,2x32", help="compare workers x threads of email-processor"
    )
    parser.add_argument("--sweep", action="store_true", help="CPU over clients and SQS latencies")
    parser.add_argument("--alone", action="store_true", help="one client's latency")
    parser.add_argument("--metrics", action="store_true", help="CPU with metrics and without")
    parser.add_argument("--json", type=Path, help="keep the raw figures in this file")
    parser.add_argument(
        "--write", action="store_true", help="run everything; write RESULTS.md and chart.svg"
    )
    options = parser.parse_args()
    if options.write and (options.only or options.profiles):
        parser.error("--write takes all contenders: RESULTS.md would lose the others")
    return options


def chosen(options: argparse.Namespace) -> list[Contender]:
    if options.profiles:
        sizes = (profile.split("x") for profile in options.profiles.split(","))
        return [email_processor(int(workers), int(threads)) for workers, threads in sizes]
    contenders = [DEFAULT, THROUGHPUT, DIRECT, FASTAPI, FASTIFY]
    if not node_version():
        print("Fastify is left out: it needs Node 20 or newer, and npm.")
        contenders.remove(FASTIFY)
    wanted = [part.lower() for part in options.only.split(",")]
    return [c for c in contenders if any(part in c.name.lower() for part in wanted)]


def main() -> None:
    options = parse_arguments()
    if not shutil.which("wrk"):
        sys.exit("wrk is needed for the load: install it (apt install wrk, brew install wrk).")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("bench: stopped"))  # what runs is ended too
    more = ("alone", "metrics", "sweep")
    parts = {part for part in more if options.write or getattr(options, part)}
    parts |= {"compare"} if options.write or not parts else set()
    shown = [part for part in sys.argv[1:] if part not in ("--json", str(options.json))]
    raw: dict[str, Any] = {
        "command": " ".join(["python", "bench/run.py", *shown]),
        "machine": machine(),
        "options": {name: getattr(options, name) for name in ("rounds", "seconds", "clients")},
    }
    raw["options"]["latency_ms"] = options.latency_ms
    steps = iter(range(1, len(parts) + 3))

    def step(text: str) -> None:
        print(f"[{next(steps)}/{len(parts) + 2}] {text}", flush=True)

    try:
        contenders = chosen(options) if "compare" in parts else []
        step("prepare the contenders")
        prepare(contenders)
        with FakeAws() as aws:
            aws.set(record=False)
            step("the fake's own ceiling")
            raw["ceiling"] = ceiling(aws, options.clients, 3)
            print(f"  {raw['ceiling']:,.0f} calls/s")
            if "compare" in parts:
                step(f"{options.clients} clients, AWS answers after {options.latency_ms:g} ms")
                raw["compare"] = compare(contenders, aws, options)
            if "alone" in parts:
                step("one client alone")
                raw["alone"] = alone(aws, options)
            if "metrics" in parts:
                step("with metrics and without")
                raw["metrics"] = compare([THROUGHPUT, NO_METRICS], aws, options)
            if "sweep" in parts:
                step("more clients, slower SQS")
                raw["sweep"] = sweep(aws, min(options.seconds, 4))
    except BenchError as error:
        sys.exit(f"bench: {error}")
    if options.json:
        options.json.write_text(json.dumps(raw, indent=1) + "\n")
    print(report.as_text(raw))
    if options.write:
        report.write(raw)
        print("bench/RESULTS.md and bench/chart.svg are written.")


if __name__ == "__main__":
    main()
