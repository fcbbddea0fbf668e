"""Turn the raw figures of run.py into tables: as text, and as RESULTS.md with chart.svg.

`python bench/report.py FILE` writes both from a file that `run.py --json FILE` has filled.
"""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any
from xml.sax.saxutils import escape

BENCH = Path(__file__).resolve().parent

# List prices of us-east-1, without the free tier. Fargate stands in for the cost of an EKS node.
PRICES_OF = "2026"
SQS_DOLLARS_PER_MILLION = 0.40
VCPU_DOLLARS_PER_HOUR = 0.04048
API_GATEWAY_DOLLARS_PER_MILLION = 1.00  # HTTP API, up to 300 million requests a month
PRICES = (
    f"Prices: SQS standard queue ${SQS_DOLLARS_PER_MILLION:.2f} per million requests; AWS Fargate "
    f"${VCPU_DOLLARS_PER_HOUR} per vCPU-hour, as a stand-in for EKS; an HTTP API of API Gateway "
    f"${API_GATEWAY_DOLLARS_PER_MILLION:.2f} per million requests. List prices of us-east-1, "
    f"{PRICES_OF}. SQS bills each 64 KB of a call as one request; ten of these messages (0.5 KB "
    "each) are one."
)
SSM_READS_PER_SECOND = 40  # GetParameter(s) of an account and region, without higher throughput
TOKEN_CACHE_SECONDS = 60
REFRESH_SHARE = 0.8  # of the cache's age, on average, at which a worker reads the token again
POD_VCPU, HOURS_A_MONTH, FLEETS = 0.5, 730, (2, 10, 100, 1000)

API_GATEWAY = "API Gateway straight into SQS (computed; checks neither token nor fields)"

Figures = dict[str, float]
Contenders = dict[str, list[Figures]]  # name -> the figures of each round
COLUMNS = {  # heading -> key and format
    "messages/s": ("rate", "{:,.0f}"),
    "CPU us/message": ("cpu_us", "{:,.0f}"),
    "p50 ms": ("p50_ms", "{:.1f}"),
    "p99 ms": ("p99_ms", "{:.1f}"),
    "memory MiB": ("memory_mib", "{:.0f}"),
    "SQS calls/message": ("sqs_calls", "{:.3f}"),
    "SSM calls/message": ("ssm_calls", "{:.4f}"),
    "$/million": ("cost", "{:.3f}"),
    "worst /health ms": ("health_ms", "{:.0f}"),
}
COMPARE = tuple(COLUMNS)[:-1]
RATIOS = tuple(heading for heading in COMPARE if heading != "SSM calls/message")
FEW = ("p50 ms", "p99 ms", "CPU us/message", "SQS calls/message")
METRICS = ("messages/s", "CPU us/message")
PODS = ("messages/s", "CPU us/message", "memory MiB", "p99 ms", "worst /health ms")
CHEAP = {"sqs_calls": "<= 0.20", "cost": "<= 0.25"}
FAST = {"p99_ms": "<= 0.50", **CHEAP}
TARGETS = {  # row of the ratios -> key -> the most or the least that the ratio may be
    "email-processor 4x2 / direct 4x2": {"cpu_us": "<= 0.20", "memory_mib": "<= 0.72", **CHEAP},
    "email-processor 4x2 / flask alone 4x2": {"cpu_us": "<= 1.65"},
    "email-processor 4x2 / FastAPI + aiobotocore": FAST | {"cpu_us": "<= 0.55"},
    "email-processor 4x2 / Fastify + AWS SDK v3": FAST | {"rate": ">= 1.60", "cpu_us": "<= 0.92"},
    "email-processor 1x2 / Fastify + AWS SDK v3": {"cpu_us": "<= 0.70", "sqs_calls": "<= 0.11"},
    "8 clients: email-processor 4x2 / FastAPI + aiobotocore": {"p50_ms": "<= 1.15"},
}


def cost_per_million(sqs_calls: float, cpu_us: float) -> float:
    """Dollars for a million messages, of so many SQS calls and microseconds of a vCPU each."""
    return sqs_calls * SQS_DOLLARS_PER_MILLION + cpu_us * VCPU_DOLLARS_PER_HOUR / 3600


def medians(rounds: list[Figures]) -> Figures:
    return {key: median(figures[key] for figures in rounds) for key in rounds[0]}


def clients_of(count: str | int) -> str:
    return f"{count} client{'s' * (str(count) != '1')}"


# --- Tables: a list of rows, the first one the heading --------------------------------------------

Table = list[list[str]]


def median_table(measured: Contenders, headings: tuple[str, ...], prefix: str = "") -> Table:
    """Medians, and the smallest and largest of the rounds; blank if not measured."""
    table = [["", *headings]]
    for name, rounds in measured.items():
        row = [f"{prefix}{name}"]
        for key, form in (COLUMNS[heading] for heading in headings):
            values = [figures[key] for figures in rounds if key in figures]
            low, mid, high = (form.format(f(values)) if values else "" for f in (min, median, max))
            row.append(mid if low == high else f"{mid} ({low}-{high})")
        table.append(row)
    return table


def ratio_rows(measured: Contenders, prefix: str = "") -> Table:
    """Medians of email-processor divided by those of each other contender, with the targets."""
    table = []
    ours = [name for name in measured if name.startswith("email-processor ")]
    for name, other in product(ours, [name for name in measured if name not in ours]):
        row, a, b = f"{prefix}{name} / {other}", medians(measured[name]), medians(measured[other])
        targets = TARGETS.get(row, {})
        keys = (COLUMNS[heading][0] for heading in RATIOS)
        table.append([row, *(ratio(a, b, key, targets.get(key, "")) for key in keys)])
    return table


def ratio(a: Figures, b: Figures, key: str, target: str) -> str:
    if not b.get(key):
        return ""
    value, (sign, _, limit) = round(a[key] / b[key], 3), target.partition(" ")
    missed = target and (value > float(limit) if sign == "<=" else value < float(limit))
    return f"{value:.3f}" + (f" ({target}{', missed' * bool(missed)})" if target else "")


def sweep_table(rows: list[dict[str, Any]]) -> Table:
    clients = sorted({row["clients"] for row in rows})
    table = [["", "SQS latency", *(clients_of(n) for n in clients)]]
    for name in dict.fromkeys(row["name"] for row in rows):
        for latency in sorted({row["latency_ms"] for row in rows}):
            cells = {
                row["clients"]: f"{row['cpu_us']:,.0f} us, {row['sqs_calls']:.2f} calls"
                for row in rows
                if (row["name"], row["latency_ms"]) == (name, latency)
            }
            table.append([name, f"{latency} ms", *(cells[n] for n in clients)])
    return table


def fleet_table(compared: Contenders) -> Table:
    """Many pods of half a vCPU each at full load, computed from the measured figures."""
    heading = "contender, pods, messages/s, SSM reads/s, SQS calls/s, $/month, limited first by"
    table = [heading.split(", ")]
    for name, rounds in compared.items():
        if name.startswith(("email-processor ", "direct")):
            table += [fleet_row(name, medians(rounds), pods) for pods in FLEETS]
    return table


def fleet_row(name: str, figures: Figures, pods: int) -> list[str]:
    by_cpu = pods * POD_VCPU / figures["cpu_us"] * 1e6
    rate, limit = by_cpu, "the pods' CPU"
    if name.startswith("direct"):
        ssm = rate = min(by_cpu, SSM_READS_PER_SECOND)  # no read of the token, no message
        if by_cpu > SSM_READS_PER_SECOND:
            limit = f"the SSM quota (the CPU would do {by_cpu:,.0f} messages/s)"
    else:
        workers = int(name.split()[-1].partition("x")[0])
        ssm = pods * workers / (REFRESH_SHARE * TOKEN_CACHE_SECONDS)
        if ssm > SSM_READS_PER_SECOND:
            needed = pods * workers / (REFRESH_SHARE * SSM_READS_PER_SECOND)
            limit = f"the SSM quota, unless TOKEN_CACHE_SECONDS is {needed:.0f} or more"
    sqs = rate * figures["sqs_calls"]
    month = HOURS_A_MONTH * (
        pods * POD_VCPU * VCPU_DOLLARS_PER_HOUR + sqs * 3600 / 1e6 * SQS_DOLLARS_PER_MILLION
    )
    figure = (f"{pods:,}", f"{rate:,.0f}", f"{ssm:,.2f}", f"{sqs:,.0f}", f"{month:,.0f}")
    return [name, *figure, limit]


def ceiling_line(raw: dict[str, Any]) -> str:
    compared = raw["compare"].items()
    most, name = max((f.get("aws_rate", 0), name) for name, fs in compared for f in fs)
    return (
        f"The fake of AWS handles {raw['ceiling']:,.0f} SendMessage calls/s; the most that a "
        f"contender asked of it is {most:,.0f} calls/s ({name})."
    )


# --- Text -----------------------------------------------------------------------------------------


def markdown(table: Table) -> str:
    """Padded: it is read in the terminal too."""
    widths = [max(3, *map(len, column)) for column in zip(*table, strict=True)]
    first, *others = widths
    rules = ["-" * first, *("-" * (width - 1) + ":" for width in others)]
    lines = []
    for name, *cells in (table[0], rules, *table[1:]):
        padded = [cell.rjust(width) for cell, width in zip(cells, others, strict=True)]
        lines.append(f"| {' | '.join([name.ljust(first), *padded])} |")
    return "\n".join(lines)


def as_text(raw: dict[str, Any]) -> str:
    """The tables that were measured, and their ratios."""
    options, parts = raw["options"], []
    latency, ratios = f"SQS latency {options['latency_ms']:g} ms", [["", *RATIOS]]
    if compared := raw.get("compare"):
        cost = f"{API_GATEWAY_DOLLARS_PER_MILLION + SQS_DOLLARS_PER_MILLION:.3f}"
        computed = [API_GATEWAY, *("" for _ in COMPARE[:-3]), "1.000", "", cost]
        parts += [
            f"## {options['clients']} clients, {latency}",
            f"Medians of {options['rounds']} interleaved rounds (smallest-largest). `NxM`: workers "
            "x threads. `direct` makes an SSM and an SQS call for each request. `flask alone` is "
            "stock Gunicorn with a view that parses the JSON and returns a constant: the cost of "
            "the framework, without AWS and without a log.",
            markdown([*median_table(compared, COMPARE), computed]),
            PRICES,
            ceiling_line(raw),
        ]
        ratios += ratio_rows(compared)
    if raw.get("few"):
        rows: Table = [["", *FEW]]
        for count, measured in raw["few"].items():
            prefix = f"{clients_of(count)}: "
            rows += median_table(measured, FEW, prefix)[1:]
            ratios += ratio_rows(measured, prefix)
        parts += [f"## Few clients, {latency}", markdown(rows)]
    if metrics := raw.get("metrics"):
        parts += ["## Cost of metrics", markdown(median_table(metrics, METRICS))]
        ratios += ratio_rows(metrics)
    if len(ratios) > 1:
        parts += [
            "## Ratios",
            "Each is the median of email-processor divided by the median of the other contender, "
            "both from the tables above, before they are rounded. In brackets: the target.",
            markdown(ratios),
        ]
    if raw.get("pods"):
        parts += [
            "## A pod of half a core",
            "Measured in containers of the project's image (Python 3.13) with 0.5 CPU and 512 MiB, "
            f"2 threads in each worker, {options['clients']} clients, {latency}. The last column "
            "is the slowest of two `GET /health` a second, each on a new connection.",
            markdown(median_table(raw["pods"], PODS)),
        ]
    if raw.get("sweep"):
        parts += [
            "## How cost grows",
            "CPU and SQS calls per message: how they grow, not how large they are. Each is one "
            "measurement of a few seconds, so that a worker's start and the machine's noise weigh "
            "more than in the medians above.",
            markdown(sweep_table(raw["sweep"])),
        ]
    return "\n\n".join(parts)


# --- Files ----------------------------------------------------------------------------------------


def results(raw: dict[str, Any]) -> str:
    machine, runs = (
        "\n".join(f"- {name}: {value}" for name, value in raw[part].items())
        for part in ("machine", "runs")
    )
    parts = [
        "# Benchmark results",
        "`python bench/run.py --help` says how to measure again, and how to write this page.",
        "![CPU, SQS calls and cost per message of each contender](chart.svg)",
        as_text(raw),
        "## Past this machine",
        f"Computed, not measured: pods of {POD_VCPU} vCPU at full load, with the CPU and the SQS "
        f"calls per message from the first table, {HOURS_A_MONTH} hours a month. A worker of "
        f"email-processor reads the token every {REFRESH_SHARE * TOKEN_CACHE_SECONDS:.0f} s on "
        f"average (TOKEN_CACHE_SECONDS={TOKEN_CACHE_SECONDS}), `direct` for each message; SSM "
        f"allows {SSM_READS_PER_SECOND} reads/s. SQS sets no practical limit on the calls of a "
        "standard queue. While SSM fails, email-processor uses the last known "
        "token, so its messages/s do not change.",
        markdown(fleet_table(raw["compare"])),
        f"## Machine\n\n{machine}\n\nRuns:\n\n{runs}",
    ]
    return "\n\n".join(parts) + "\n"


PANELS = (
    ("CPU per message, microseconds", "cpu_us", "{:,.0f}"),
    ("SQS calls per message", "sqs_calls", "{:.2f}"),
    ("Cost of a million messages, US dollars", "cost", "{:.2f}"),
)
STYLE = """
text { font: 14px system-ui, sans-serif; fill: #1f2328 }
.title { font-weight: 600 } .page { fill: #ffffff } .ours { fill: #0969da } .other { fill: #8c959f }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .page { fill: #0d1117 } .ours { fill: #4493f8 } .other { fill: #6e7681 } }
"""
WIDTH, LABEL_WIDTH, BAR_WIDTH, ROW, GAP = 760, 190, 490, 26, 22


def chart(raw: dict[str, Any]) -> str:
    """Horizontal bars, a panel for each figure; light or dark as the reader's own pages."""
    compared = {name: medians(rounds) for name, rounds in raw["compare"].items()}
    marks, y = [], GAP
    for title, key, form in PANELS:
        marks.append(f'<text class="title" x="16" y="{y + 12}">{escape(title)}</text>')
        y += ROW
        figures = {name: values for name, values in compared.items() if key in values}
        most = max(values[key] for values in figures.values())
        for name, values in figures.items():
            kind = "ours" if name.startswith("email-processor ") else "other"
            width = values[key] / most * BAR_WIDTH
            text = f'<text x="{LABEL_WIDTH + width + 6:.1f}" y="{y + 14}">'
            marks += [
                f'<text x="{LABEL_WIDTH - 8}" y="{y + 14}" text-anchor="end">{escape(name)}</text>',
                f'<rect class="{kind}" x="{LABEL_WIDTH}" y="{y}" width="{width:.1f}" height="18"/>',
                f"{text}{form.format(values[key])}</text>",
            ]
            y += ROW
        y += GAP
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" role="img">'
    page = f'<rect class="page" width="{WIDTH}" height="{y}"/>'
    title = "<title>CPU, SQS calls and cost per message of each contender</title>"
    return "\n".join([head, title, f"<style>{STYLE}</style>", page, *marks, "</svg>"]) + "\n"


def write(raw: dict[str, Any]) -> None:
    if missing := {"compare", "few", "metrics", "pods", "sweep"} - raw.keys():
        sys.exit(f"RESULTS.md needs all tables; not measured yet: {', '.join(missing)}")
    (BENCH / "RESULTS.md").write_text(results(raw))
    (BENCH / "chart.svg").write_text(chart(raw))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    write(json.loads(Path(sys.argv[1]).read_text()))
