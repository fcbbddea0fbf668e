"""What the benchmark needs of other files, which break it without a word; and its tables."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from conftest import PROJECT
from fake_aws import FakeAws, Services, Settings

sys.path.insert(0, str(PROJECT / "bench"))

import report  # beside run.py
import run

SOURCE = (PROJECT / "bench" / "run.py").read_text("utf-8")
FIGURES = {key: 2.0 for key, _ in report.COLUMNS.values()} | {"sqs_rate": 2.0, "ssm_rate": 2.0}
RAW: dict[str, Any] = {  # what a run of two rounds would keep
    "command": "python bench/run.py --write",
    "machine": {"CPU": "one <fast> & quiet"},
    "options": {"rounds": 2, "seconds": 1, "clients": 64, "latency_ms": 8},
    "ceiling": 9_999.0,
    "compare": {
        run.THROUGHPUT.name: [{**FIGURES, "rate": 1_000}, {**FIGURES, "rate": 3_000}],
        "direct 4x2 <&>": [FIGURES, FIGURES],
    },
    "alone": {run.DEFAULT.name: [{**FIGURES, "p50_ms": 3}], run.CACHED.name: [FIGURES]},
    "metrics": {
        run.THROUGHPUT.name: [{**FIGURES, "cpu_us": 103}],
        run.NO_METRICS.name: [{**FIGURES, "cpu_us": 100}],
    },
    "sweep": [{"name": run.THROUGHPUT.name, "clients": 1, "latency_ms": 2, **FIGURES}],
}


def test_every_contender_is_there() -> None:
    for contender in [each for each in vars(run).values() if isinstance(each, run.Contender)]:
        last = contender.command[-1]
        if found := re.fullmatch(r"(\w+):create_app\(.*\)", last):
            assert list((PROJECT / "bench").rglob(f"{found[1]}.py")), contender.name
        elif not last.startswith("127.0.0.1:"):
            assert (contender.folder / last).is_file(), contender.name


def test_fake_has_all_that_is_asked_of_it(fake_process: FakeAws) -> None:
    asked = set(re.findall(r"\baws\.(\w+)", SOURCE))
    assert {name for name in asked if not hasattr(fake_process, name)} == set()
    assert set(re.findall(r"\baws\.set\((\w+)=", SOURCE)) <= vars(Settings()).keys()
    counts = set(re.findall(r'\b(?:before|after)\["(\w+)"\]', SOURCE))
    assert counts <= fake_process.counts().keys()
    operations = {
        name for pair in re.findall(r'calls\("(\w+)", "(\w+)"\)', SOURCE) for name in pair
    }
    assert operations <= {name.partition("_")[2] for name in vars(Services)}
    assert operations


def test_contender_without_metrics_counts_nothing() -> None:
    code = (
        "import app, no_metrics, prometheus_client.metrics as m; no_metrics.create_app();"
        "tables = [v if isinstance(v, dict) else {0: v} for v in vars(app).values()];"
        "values = [v for t in tables for v in t.values()];"
        "print(sum(isinstance(v, no_metrics.Nothing) for v in values));"
        "print(sum(isinstance(v, m.MetricWrapperBase) for v in values))"
    )
    path = f"{PROJECT}:{PROJECT / 'bench' / 'contenders'}"
    environ = {"PYTHONPATH": path, "SQS_QUEUE_URL": "http://127.0.0.1:9/1/queue"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    replaced, left = map(int, done.stdout.split())
    assert replaced >= 5
    assert left == 0


def test_tables_hold_medians_with_ratios() -> None:
    page = report.results(RAW)
    assert "| email-processor 1x64 | 2,000 (1,000-3,000) | 2 |" in page
    metrics = page.split("## What metrics cost\n")[1].split("\n## ")[0]
    assert metrics.strip().splitlines()[-1] == "| ratio | 1.000 | 1.030 |"
    assert page.split("## One client alone\n")[1].split("| ratio | ")[1].startswith("1.500 |")


def test_chart_is_well_formed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "BENCH", tmp_path)
    report.write(json.loads(json.dumps(RAW)))
    assert (tmp_path / "RESULTS.md").read_text("utf-8") == report.results(RAW)
    chart = ElementTree.fromstring((tmp_path / "chart.svg").read_text("utf-8"))
    bars = [bar.get("class") for bar in chart.iter("{http://www.w3.org/2000/svg}rect")]
    assert bars == ["page", *["ours", "other"] * len(report.PANELS)]
