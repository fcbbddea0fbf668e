"""What the benchmark needs of other files, which break it without a word; and its tables."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from fake_aws import Behavior, FakeAws, Services
from service import PROJECT

sys.path.insert(0, str(PROJECT / "bench"))

import report  # beside run.py
import run

SOURCE = (PROJECT / "bench" / "run.py").read_text("utf-8")
FIGURES = {key: 2.0 for key, _ in report.COLUMNS.values()} | {"aws_rate": 2.0}
WITHOUT_AWS = dict.fromkeys(("rate", "cpu_us", "p50_ms", "p99_ms", "memory_mib"), 2.0)
OURS = run.DEFAULT.name
RAW: dict[str, Any] = {  # what a run of two rounds would keep
    "machine": {"CPU": "one <fast> & quiet"},
    "runs": {"compare": "`python bench/run.py`, 2026-11-30"},
    "options": {"rounds": 2, "seconds": 1, "clients": 64, "latency_ms": 8},
    "ceiling": 9_999.0,
    "compare": {
        OURS: [{**FIGURES, "rate": 1_000, "p99_ms": 1}, {**FIGURES, "rate": 3_000, "p99_ms": 1}],
        run.FASTAPI.name: [{**FIGURES, "rate": 1_000}, {**FIGURES, "rate": 2_000}],
        "flask alone <&>": [WITHOUT_AWS, WITHOUT_AWS],
    },
    "few": {"1": {OURS: [FIGURES]}, "8": {OURS: [{**FIGURES, "p50_ms": 3}], "other": [FIGURES]}},
    "metrics": {OURS: [{**FIGURES, "cpu_us": 103}], run.NO_METRICS.name: [FIGURES]},
    "pods": {"1 worker": [FIGURES]},
    "sweep": [{"name": OURS, "clients": 1, "latency_ms": 2, **FIGURES}],
}


def test_every_contender_is_there() -> None:
    for contender in [each for each in vars(run).values() if isinstance(each, run.Contender)]:
        last = contender.command[-1]
        if found := re.fullmatch(r"(\w+):(create_app\(\)|app)", last):
            assert list((PROJECT / "bench").rglob(f"{found[1]}.py")), contender.name
        elif not last.startswith("127.0.0.1:"):
            assert (contender.folder / last).is_file(), contender.name


def test_fake_has_all_that_is_asked_of_it(fake_aws_process: FakeAws) -> None:
    asked = set(re.findall(r"\baws\.(\w+)", SOURCE))
    assert {name for name in asked if not hasattr(fake_aws_process, name)} == set()
    assert set(re.findall(r"\baws\.set\((\w+)=", SOURCE)) <= vars(Behavior()).keys()
    counts = set(re.findall(r'\b(?:before|after)\["(\w+)"\]', SOURCE))
    assert counts <= fake_aws_process.counts().keys()
    operations = {
        name for pair in re.findall(r'calls\("(\w+)", "(\w+)"\)', SOURCE) for name in pair
    }
    assert operations <= {name.partition("_")[2] for name in vars(Services)}
    assert operations


def test_ratios_are_of_the_medians_and_show_their_targets() -> None:
    page = re.sub(" +", " ", report.results(RAW))
    assert f"| {OURS} | 2,000 (1,000-3,000) | 2 |" in page
    assert "| flask alone <&> | 2 | 2 | 2.0 | 2.0 | 2 | | | |" in page
    ratios = page.split("## Ratios\n")[1].split("\n## ")[0]
    targets = ("1.000 (<= 0.55, missed)", "1.000", "0.500 (<= 0.50)")  # CPU, p50, p99
    assert f"| {OURS} / {run.FASTAPI.name} | 1.333 | {' | '.join(targets)} |" in ratios
    assert f"| 8 clients: {OURS} / other | 1.000 | 1.000 | 1.500 |" in ratios


def test_targets_name_ratios_that_a_run_computes() -> None:
    contenders = [each.name for each in vars(run).values() if isinstance(each, run.Contender)]
    for row, targets in report.TARGETS.items():
        pair = row.rpartition(": ")[2].split(" / ")
        assert set(pair) <= set(contenders), row
        assert targets.keys() <= {report.COLUMNS[heading][0] for heading in report.RATIOS}, row


def test_chart_is_well_formed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "BENCH", tmp_path)
    report.write(json.loads(json.dumps(RAW)))
    assert (tmp_path / "RESULTS.md").read_text("utf-8") == report.results(RAW)
    chart = ElementTree.fromstring((tmp_path / "chart.svg").read_text("utf-8"))
    bars = [bar.get("class") for bar in chart.iter("{http://www.w3.org/2000/svg}rect")]
    assert bars == ["page", "ours", "other", "other", *["ours", "other"] * 2]  # CPU, calls, cost
