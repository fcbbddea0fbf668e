"""Turn the raw figures of run.py into tables: as text, and as RESULTS.md with chart.svg.

`python bench/report.py FILE` writes both again from a file that `run.py --json FILE` has kept.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any
from xml.sax.saxutils import escape

BENCH = Path(__file__).resolve().parent

# List prices of us-east-1, without the free tier. Fargate stands in for what an EKS node costs.
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

Figures = dict[str, float]
Columns = dict[str, tuple[str, str]]  # heading -> key and format
COLUMNS: Columns = {
    "messages/s": ("rate", "{:,.0f}"),
    "CPU us/message": ("cpu_us", "{:,.0f}"),
    "p50 ms": ("p50_ms", "{:.1f}"),
    "p99 ms": ("p99_ms", "{:.1f}"),
    "memory MiB": ("memory_mib", "{:.0f}"),
    "SQS calls/message": ("sqs_calls", "{:.3f}"),
    "SSM calls/message": ("ssm_calls", "{:.4f}"),
    "$/million": ("cost", "{:.3f}"),
}
ALONE: Columns = {
    "p50 ms": ("p50_ms", "{:.2f}"),
    "p99 ms": ("p99_ms", "{:.2f}"),
    "CPU us/message": ("cpu_us", "{:,.0f}"),
}
METRICS = {name: COLUMNS[name] for name in ("messages/s", "CPU us/message")}


def cost_per_million(sqs_calls: float, cpu_us: float) -> float:
    """Dollars for a million messages, of so many SQS calls and microseconds of a vCPU each."""
    return sqs_calls * SQS_DOLLARS_PER_MILLION + cpu_us * VCPU_DOLLARS_PER_HOUR / 3600


def medians(rounds: list[Figures]) -> Figures:
    return {key: median(figures[key] for figures in rounds) for key in rounds[0]}


# --- Tables: a list of rows, the first one the heading --------------------------------------------

Table = list[list[str]]


def compare_table(compared: dict[str, list[Figures]]) -> Table:
    """Medians, and the smallest and largest of the rounds."""
    table = [["", *COLUMNS]]
    for name, rounds in compared.items():
        row = [name]
        for key, form in COLUMNS.values():
            values = [figures[key] for figures in rounds]
            low, mid, high = map(form.format, (min(values), median(values), max(values)))
            row.append(mid if low == high else f"{mid} ({low}-{high})")
        table.append(row)
    cost = API_GATEWAY_DOLLARS_PER_MILLION + SQS_DOLLARS_PER_MILLION
    computed = {"sqs_calls": "1.000", "cost": f"{cost:.3f}"}
    cells = (computed.get(key, "") for key, _ in COLUMNS.values())
    table.append(
        ["API Gateway straight into SQS (computed; checks neither token nor fields)", *cells]
    )
    return table


def ratio_table(compared: dict[str, list[Figures]]) -> Table:
    """Each profile of ours divided by each other contender: the median of the rounds' ratios."""
    columns = {name: spec for name, spec in COLUMNS.items() if spec[0] != "ssm_calls"}
    table = [["", *columns]]
    ours = [name for name in compared if name.startswith("email-processor")]
    for name in ours:
        for other in (other for other in compared if other not in ours):
            pairs = list(zip(compared[name], compared[other], strict=True))
            ratios = [median(a[key] / b[key] for a, b in pairs) for key, _ in columns.values()]
            table.append([f"{name} / {other}", *(f"{ratio:.3f}" for ratio in ratios)])
    return table


def sweep_table(rows: list[dict[str, Any]]) -> Table:
    clients = sorted({row["clients"] for row in rows})
    table = [["", "SQS latency", *(f"{n} client{'s' * (n > 1)}" for n in clients)]]
    for name in dict.fromkeys(row["name"] for row in rows):
        for latency in sorted({row["latency_ms"] for row in rows}):
            cells = {
                row["clients"]: f"{row['cpu_us']:,.0f} us, {row['sqs_calls']:.2f} calls"
                for row in rows
                if (row["name"], row["latency_ms"]) == (name, latency)
            }
            table.append([name, f"{latency} ms", *(cells[n] for n in clients)])
    return table


def pair_table(rounds: dict[str, list[Figures]], columns: Columns) -> Table:
    """Two contenders' medians, and how the first one's figures compare with the second's."""
    table = [["", *columns]]
    for name, figures in rounds.items():
        middle = medians(figures)
        table.append([name, *(form.format(middle[key]) for key, form in columns.values())])
    pairs = list(zip(*rounds.values(), strict=True))
    ratios = (median(a[key] / b[key] for a, b in pairs) for key, _ in columns.values())
    table.append(["ratio", *(f"{ratio:.3f}" for ratio in ratios)])
    return table


def fleet_table(compared: dict[str, list[Figures]]) -> Table:
    """Many pods of half a vCPU each at full load, computed from the measured figures."""
    heading = "profile, pods, messages/s, SSM reads/s, SQS calls/s, $/month, limited first by"
    table = [heading.split(", ")]
    for name, rounds in compared.items():
        if name.startswith(("email-processor", "direct")):
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
    line = f"The fake itself answers {raw['ceiling']:,.0f} SendMessage calls/s"
    compared = raw.get("compare", {}).items()
    rounds = [(f["sqs_rate"] + f["ssm_rate"], name) for name, fs in compared for f in fs]
    if rounds:
        most, name = max(rounds)
        line += f"; the most that a contender asked of it is {most:,.0f} calls/s ({name})"
    return line + "."


# --- Text -----------------------------------------------------------------------------------------


def aligned(table: Table) -> str:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        first, *others = zip(row, widths, strict=True)
        cells = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def markdown(table: Table) -> str:
    rows = [table[0], ["---", *["---:"] * (len(table[0]) - 1)], *table[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def sections(raw: dict[str, Any], layout: Callable[[Table], str]) -> dict[str, str]:
    """Title -> text of everything that the run has measured."""
    options, found = raw["options"], {}
    if raw.get("compare"):
        load = f"{options['clients']} clients, AWS answers after {options['latency_ms']:g} ms"
        explained = f"Medians of {options['rounds']} interleaved rounds (smallest-largest)."
        table = layout(compare_table(raw["compare"]))
        found[load] = f"{explained}\n\n{table}\n\n{PRICES}\n\n{ceiling_line(raw)}"
        ratios = ratio_table(raw["compare"])
        if len(ratios) > 1:
            found["Ratios within the run"] = layout(ratios)
    else:
        found["The fake"] = ceiling_line(raw)
    if raw.get("alone"):
        found["One client alone"] = layout(pair_table(raw["alone"], ALONE))
    if raw.get("metrics"):
        found["What metrics cost"] = layout(pair_table(raw["metrics"], METRICS))
    if raw.get("sweep"):
        explained = (
            "CPU and SQS calls per message: how they grow, not how large they are. Each is one "
            "measurement of a few seconds, so that a worker's start and the machine's noise weigh "
            "more than in the medians above."
        )
        found["How cost grows"] = f"{explained}\n\n{layout(sweep_table(raw['sweep']))}"
    return found


def as_text(raw: dict[str, Any]) -> str:
    return "\n\n".join(f"\n== {title}\n\n{text}" for title, text in sections(raw, aligned).items())


# --- Files ----------------------------------------------------------------------------------------


def results(raw: dict[str, Any]) -> str:
    machine = "\n".join(f"- {name}: {value}" for name, value in raw["machine"].items())
    parts = [
        "# Benchmark results",
        f"Made by `{raw['command']}`; `python bench/run.py --help` says what it needs.",
        "![CPU, SQS calls and cost per message of each contender](chart.svg)",
        *(f"## {title}\n\n{text}" for title, text in sections(raw, markdown).items()),
        "## Past this machine",
        f"Computed, not measured: pods of {POD_VCPU} vCPU at full load, with the CPU and the SQS "
        f"calls per message from the first table, {HOURS_A_MONTH} hours a month. A worker of "
        f"email-processor reads the token every {REFRESH_SHARE * TOKEN_CACHE_SECONDS:.0f} s on "
        f"average (TOKEN_CACHE_SECONDS={TOKEN_CACHE_SECONDS}), `direct` for each message; SSM "
        f"allows {SSM_READS_PER_SECOND} reads/s. SQS sets no practical limit on the calls of a "
        "standard queue. While SSM refuses a read, email-processor goes on with the last known "
        "token, so its messages/s stay as they are.",
        markdown(fleet_table(raw["compare"])),
        f"## Machine\n\n{machine}",
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
    figures = {name: medians(rounds) for name, rounds in raw["compare"].items()}
    marks, y = [], GAP
    for title, key, form in PANELS:
        marks.append(f'<text class="title" x="16" y="{y + 12}">{escape(title)}</text>')
        y += ROW
        most = max(values[key] for values in figures.values())
        for name, values in figures.items():
            kind = "ours" if name.startswith("email-processor") else "other"
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
    (BENCH / "RESULTS.md").write_text(results(raw))
    (BENCH / "chart.svg").write_text(chart(raw))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    write(json.loads(Path(sys.argv[1]).read_text()))
