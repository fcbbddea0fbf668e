"""The log queries and the Grafana dashboard, against the log and metrics of a running service."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from client import BODY, post
from fake_aws import PARAMETER, TOKEN, FakeAws
from pages import page, section, table
from service import PROJECT, StartService, eventually

import app

TEMPLATE = (PROJECT / "infra" / "email-processor.yaml").read_text("utf-8")
REQUEST_ID = "REQUEST_ID"  # as in the guide
TRACE = "X-Amzn-Trace-Id: Root=1-67891233-abcdef012345678912345678"
Record = dict[str, Any]


@pytest.fixture(scope="module")
def observed(start_service: StartService, fake_aws_process: FakeAws) -> tuple[list[Record], str]:
    """After a success, and failures until the circuit opens: the log as in CloudWatch; /metrics."""
    request = post(BODY, f"X-Request-Id: {REQUEST_ID}", TRACE)
    fake_aws_process.set(latency_ms=2, faults={}, parameters={PARAMETER: TOKEN})
    with start_service(GUNICORN_WORKERS="1") as service:
        eventually(lambda: service.request(request).status == 200)
        throttled = {"kind": "error", "status": 400, "code": "ThrottlingException"}
        fake_aws_process.set(faults={"SQS": throttled})

        def circuit_is_open() -> bool:
            assert service.request(request).error == "queue_unavailable"
            return any("circuit open" in line["message"] for line in service.log())

        eventually(circuit_is_open)
        metrics, lines = service.get("/metrics").body.decode(), service.log()
    fake_aws_process.set(faults={})
    kubernetes = {"namespace_name": "email-processor", "pod_name": "a pod"}
    return [{"kubernetes": kubernetes, "log_processed": line} for line in lines], metrics


def values(records: list[Record], path: str) -> list[Any]:
    """The records' values of a path such as log_processed.status."""
    group, name = path.split(".")
    return [record[group][name] for record in records if name in record[group]]


def test_log_queries_use_fields_and_values_of_the_log(observed: tuple[list[Record], str]) -> None:
    records, _ = observed
    guide = re.findall(r"^# ([^\n]+)\n(filter .*?)(?=\n\n|```)", page("metrics"), re.M | re.DOTALL)
    dashboard = re.findall(r'"title": "(.*)",\n.*\n +"query": (".*")\n', TEMPLATE)
    assert (len(guide), len(dashboard)) == (6, 3)
    for title, query in [*guide, *((title, json.loads(text)) for title, text in dashboard)]:
        fields = set(re.findall(r"(?:log_processed|kubernetes)\.\w+", query))
        assert [field for field in fields if not values(records, field)] == [], title
        for field, listed in re.findall(r'([\w.]+) (?:=|in) (\[[^]]*\]|"[^"]*")', query):
            wanted = set(re.findall(r'"([^"]*)"', listed))
            assert wanted <= set(values(records, field)), f"{title}: {field}"
        for field, pattern in re.findall(r"([\w.]+) like /(.+?)/", query):
            assert re.search(pattern, "\n".join(values(records, field))), title


def test_table_of_signals_has_every_alarm_and_dashboard() -> None:
    alarms = re.findall(r"^  (\w+):\n    Type: AWS::CloudWatch::Alarm", TEMPLATE, re.MULTILINE)
    names = (*alarms, app.SERVICE, "infra/grafana.json")
    assert [name for name in names if f"`{name}`" not in section("Signals")] == []


# --- Grafana --------------------------------------------------------------------------------------

DASHBOARD = json.loads((PROJECT / "infra" / "grafana.json").read_text("utf-8"))
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
BY_PROMETHEUS = {"namespace", "pod"}  # labels that Prometheus adds


def series(metrics: str) -> dict[str, list[dict[str, str]]]:
    """Name -> the labels of each of its series."""
    found: dict[str, list[dict[str, str]]] = {}
    for name, labels in re.findall(r"^(\w+)(?:\{(.*)\})? \S+$", metrics, re.MULTILINE):
        found.setdefault(name, []).append(dict(re.findall(r'(\w+)="([^"]*)"', labels)))
    return found


def test_expressions_use_series_and_labels_of_the_service(
    observed: tuple[list[Record], str],
) -> None:
    served = series(observed[1])
    for expression in EXPRESSIONS:
        selectors = re.findall(
            r'(email_processor_\w+)\{namespace=~"\$namespace"(.*?)\}', expression
        )
        assert len(selectors) == expression.count("email_processor_") > 0, expression
        grouped = re.split(r",\s*", ",".join(re.findall(r"by \(([^)]*)\)", expression)))
        for name, matchers in selectors:
            assert name in served, expression
            for label in set(filter(None, grouped)) - BY_PROMETHEUS:
                assert all(label in labels for labels in served[name]), expression
            for label, value in re.findall(r'(\w+)=~?"([^"]*)"', matchers):
                assert set(value.split("|")) <= {labels[label] for labels in served[name]}, name


def test_dashboard_shows_every_metric_of_the_service() -> None:
    shown = " ".join(EXPRESSIONS)
    assert [name for name, *_ in table("Metrics") if name not in shown] == []


def test_5xx_of_the_dashboard_are_those_of_the_error_list() -> None:
    (codes,) = re.findall(r'outcome=~"([^"]*)"', " ".join(EXPRESSIONS))
    assert set(codes.split("|")) == {c for c, (status, _) in app.ERRORS.items() if status >= 500}


def test_dashboard_can_be_imported_into_any_grafana() -> None:
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    assert variables == {"datasource", "namespace"}
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    for panel in DASHBOARD["panels"]:
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
