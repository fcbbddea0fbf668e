"""The benchmark's own parts, without its load: its options, contenders, fake, tables and chart."""

from __future__ import annotations

import ast
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
CONTENDERS = {value.name: value for value in vars(run).values() if isinstance(value, run.Contender)}


def figures(**changed: float) -> dict[str, float]:
    keys = {key for key, _ in report.COLUMNS.values()} | {"sqs_rate", "ssm_rate"}
    return {**dict.fromkeys(keys, 2.0), **changed}


@pytest.fixture
def raw() -> dict[str, Any]:
    """What a run of two rounds would keep."""
    ours, without = run.THROUGHPUT.name, run.NO_METRICS.name
    case = {"name": ours, "clients": 1, "latency_ms": 2}
    return {
        "command": "python bench/run.py --write",
        "machine": {"CPU": "one <fast> & quiet"},
        "options": {"rounds": 2, "seconds": 1, "clients": 64, "latency_ms": 8},
        "ceiling": 9_999.0,
        "compare": {
            ours: [figures(rate=1_000), figures(rate=3_000)],
            "direct 4x2 <&>": [figures(), figures()],
        },
        "alone": {run.DEFAULT.name: [figures(p50_ms=3)], run.CACHED.name: [figures(p50_ms=2)]},
        "metrics": {ours: [figures(cpu_us=103)], without: [figures(cpu_us=100)]},
        "sweep": [{**case, **figures()}],
    }


def test_run_lists_its_options() -> None:
    command = [sys.executable, PROJECT / "bench" / "run.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT)
    assert (done.returncode, done.stderr) == (0, "")
    assert {"--write", "--alone", "--sweep", "--metrics"} <= set(re.findall(r"--\w+", done.stdout))


def test_every_file_that_a_contender_needs_is_there() -> None:
    assert len(CONTENDERS) == 7
    for name, contender in CONTENDERS.items():
        assert contender.folder.is_dir(), name
        last = contender.command[-1]
        if found := re.fullmatch(r"(\w+):create_app\((\w*).*\)", last):
            (file,) = (PROJECT / "bench").rglob(f"{found[1]}.py")
            (function,) = (
                node
                for node in ast.parse(file.read_text("utf-8")).body
                if isinstance(node, ast.FunctionDef) and node.name == "create_app"
            )
            taken = {argument.arg for argument in function.args.args}
            assert {found[2]} - {""} <= taken, name
        elif not last.startswith("127.0.0.1:"):
            assert (contender.folder / last).is_file(), name
    for file in ("post.lua", "requirements.txt", "contenders/fastify/package-lock.json"):
        assert Path(file).name in SOURCE
        assert (PROJECT / "bench" / file).is_file()


def test_contender_without_metrics_counts_nothing() -> None:
    code = (
        "import app, no_metrics; client = no_metrics.create_app().test_client();"
        "print(client.post('/process').status_code, client.get('/ready').status_code);"
        "print(*(n for n, v in vars(app).items() if isinstance(v, no_metrics.Nothing)));"
        "print(app.metrics_text().decode())"
    )
    path = f"{PROJECT}:{PROJECT / 'bench' / 'contenders'}"
    dead = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "SQS_QUEUE_URL": "http://127.0.0.1:9/1/q"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": path, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", **dead},
        capture_output=True,
        text=True,
        check=True,
    )
    statuses, names, *metrics = done.stdout.splitlines()
    assert statuses == "415 503"
    source = (PROJECT / "app.py").read_text("utf-8")
    metric = r"^([A-Z_]+) = (?:_counter|prometheus_client\.\w+)\("
    assert set(names.split()) == set(re.findall(metric, source, re.MULTILINE))
    ours = [line for line in metrics if re.match(r"email_processor_\w+(?<!_created)[{ ]", line)]
    assert ours
    assert [line for line in ours if not line.endswith(" 0.0")] == []


def test_fake_has_every_setting_count_and_operation_that_is_asked_of_it(
    fake_process: FakeAws,
) -> None:
    asked = set(re.findall(r"\baws\.(\w+)", SOURCE))
    assert {name for name in asked if not hasattr(fake_process, name)} == set()
    settings = set(re.findall(r"\baws\.set\((\w+)=", SOURCE))
    assert settings
    assert settings <= vars(Settings()).keys()
    counts = set(re.findall(r'\b(?:before|after)\["(\w+)"\]', SOURCE))
    assert counts
    assert counts <= fake_process.counts().keys()
    operations = re.findall(r'calls\("(\w+)", "(\w+)"\)', SOURCE)
    services = [name.partition("_")[2] for name in vars(Services) if name.startswith("Amazon")]
    assert len(operations) == 2
    assert {name for pair in operations for name in pair} <= set(services)


def test_tables_hold_medians_and_ratios(raw: dict[str, Any]) -> None:
    page = report.results(raw)
    assert "| email-processor 1x64 | 2,000 (1,000-3,000) | 2 |" in page
    assert re.findall(r"^## (.+)$", page, re.MULTILINE)[1:5] == [
        "Ratios within the run",
        "One client alone",
        "What metrics cost",
        "How cost grows",
    ]
    metrics = page.split("## What metrics cost\n")[1].split("\n## ")[0]
    assert metrics.strip().splitlines()[-1] == "| ratio | 1.000 | 1.030 |"
    assert page.split("## One client alone\n")[1].split("| ratio | ")[1].startswith("1.500 |")


def test_results_and_a_well_formed_chart_are_written(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "BENCH", tmp_path)
    report.write(json.loads(json.dumps(raw)))
    assert (tmp_path / "RESULTS.md").read_text("utf-8") == report.results(raw)
    svg = "{http://www.w3.org/2000/svg}"
    chart = ElementTree.fromstring((tmp_path / "chart.svg").read_text("utf-8"))
    bars = [bar.get("class") for bar in chart.iter(f"{svg}rect")]
    assert bars == ["page", *["ours", "other"] * len(report.PANELS)]
    assert "direct 4x2 <&>" in {text.text for text in chart.iter(f"{svg}text")}
