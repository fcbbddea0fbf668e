"""The log queries and the Grafana dashboard, against the log and metrics of a running service."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from client import BODY, DATA, post, post_head
from fake_aws import PARAMETER, TOKEN, FakeAws
from service import PROJECT, StartService, eventually
from test_documentation import page, table

import app

REQUEST_ID = "REQUEST_ID"  # as in the guide
TRACE = "X-Amzn-Trace-Id: Root=1-67891233-abcdef012345678912345678"
Record = dict[str, Any]


@pytest.fixture(scope="module")
def observed(start_service: StartService, fake_aws_process: FakeAws) -> tuple[list[Record], str]:
    """After successes and failures: the log in the form of CloudWatch, and /metrics."""
    settings = {"GUNICORN_WORKERS": "1", "TOKEN_CACHE_SECONDS": "1"}
    wrong = json.dumps({"data": {**DATA, "email_subject": ""}, "token": TOKEN}).encode()
    marked = post(BODY, f"X-Request-Id: {REQUEST_ID}", TRACE)  # sent, and later rejected
    throttled = {"kind": "error", "status": 400, "code": "ThrottlingException"}
    fake_aws_process.set(latency_ms=2, faults={}, parameters={PARAMETER: TOKEN})
    with start_service(**fake_aws_process.variables(), **settings) as service:
        eventually(lambda: service.get("/ready").status == 200)
        assert service.request(post(wrong)).error == "invalid_data"
        assert service.request(post(b'{"token": "wrong"}')).error == "invalid_token"
        assert service.get("/nowhere").error == "not_found"
        assert service.request(post_head("Content-Length: 0")).error == "invalid_json"
        assert service.request(marked).status == 200
        fake_aws_process.set(faults={"*": throttled})
        assert service.request(marked).error == "queue_unavailable"

        def token_not_read() -> bool:
            service.request(post())
            return any("token not read" in line["message"] for line in service.log())

        eventually(token_not_read)
        metrics, lines = service.get("/metrics").body.decode(), service.log()
    fake_aws_process.set(faults={})
    kubernetes = {"namespace_name": "email-processor", "pod_name": "a pod"}
    records = [
        {"@timestamp": line["time"], "kubernetes": kubernetes, "log_processed": line}
        for line in lines
    ]
    return records, metrics


# --- CloudWatch Logs Insights ---------------------------------------------------------------------


def values(records: list[Record], path: str) -> list[Any]:
    """The records' values of a path such as log_processed.status."""
    found: list[Any] = records
    for name in path.split("."):
        found = [value[name] for value in found if isinstance(value, dict) and name in value]
    return found


def queries() -> dict[str, str]:
    """The queries of the guide, by the question before each, and of CloudWatch's dashboard."""
    guide = re.findall(r"^# ([^\n]+)\n(filter .*?)(?=\n\n|```)", page("metrics"), re.M | re.DOTALL)
    template = (PROJECT / "infra" / "email-processor.yaml").read_text("utf-8")
    dashboard = re.findall(r'"title": "(.*)",\n.*\n +"query": (".*")\n', template)
    return {**dict(guide), **{title: json.loads(query) for title, query in dashboard}}


@pytest.mark.parametrize("title", queries())
def test_log_query_uses_fields_of_the_log(observed: tuple[list[Record], str], title: str) -> None:
    records, _ = observed
    query = queries()[title]
    fields = set(re.findall(r"(?:log_processed|kubernetes)\.\w+", query))
    assert fields
    assert [field for field in fields if not values(records, field)] == []
    for field, listed in re.findall(r'([\w.]+) (?:=|in) (\[[^]]*\]|"[^"]*")', query):
        for value in set(re.findall(r'"([^"]*)"', listed)) - {"ERROR", "WARNING", "CRITICAL"}:
            assert value in values(records, field), f"{field} is never {value}"
    for field, pattern in re.findall(r"([\w.]+) like /(.+?)/", query):
        assert re.search(pattern, "\n".join(values(records, field)))


def test_table_of_signals_has_every_metric_alarm_and_dashboard() -> None:
    template = (PROJECT / "infra" / "email-processor.yaml").read_text("utf-8")
    alarms = re.findall(r"^  (\w+):\n    Type: AWS::CloudWatch::Alarm", template, re.MULTILINE)
    metrics = [row[0].removeprefix("email_processor_") for row in table("Metrics")]
    listed = " ".join(row[0] for row in table("Signals"))
    named = re.findall(r"[\w/.-]+", listed.replace("`", ""))
    assert [name for name in (*metrics, *alarms, app.SERVICE) if name not in named] == []


def test_guide_has_a_query_for_each_question() -> None:
    assert len(queries()) == 6 + 3


# --- Grafana --------------------------------------------------------------------------------------

DASHBOARD = json.loads((PROJECT / "infra" / "grafana.json").read_text("utf-8"))
EXPRESSIONS = {
    f"{panel['title']} {target['refId']}": target["expr"]
    for panel in DASHBOARD["panels"]
    for target in panel["targets"]
}
BY_PROMETHEUS = {"namespace", "pod"}  # labels that Prometheus adds


def series(metrics: str) -> dict[str, list[dict[str, str]]]:
    """Name -> the labels of each of its series."""
    found: dict[str, list[dict[str, str]]] = {}
    for name, labels in re.findall(r"^(\w+)(?:\{(.*)\})? \S+$", metrics, re.MULTILINE):
        found.setdefault(name, []).append(dict(re.findall(r'(\w+)="([^"]*)"', labels)))
    return found


@pytest.mark.parametrize("title", EXPRESSIONS)
def test_expression_uses_series_of_the_service(
    observed: tuple[list[Record], str], title: str
) -> None:
    served, expression = series(observed[1]), EXPRESSIONS[title]
    selectors = re.findall(r"(email_processor_\w+)\{([^}]*)\}", expression)
    assert selectors
    assert len(re.findall("email_processor_", expression)) == len(selectors)
    for name, matchers in selectors:
        labels = served[name]
        for label, operator, value in re.findall(r'(\w+)(=~?)"([^"]*)"', matchers):
            if label in BY_PROMETHEUS:
                assert (operator, value) == ("=~", "$namespace")
                continue
            values = {series[label] for series in labels}
            assert set(value.split("|")) <= values, f"{name} has no such {label}"
        grouped = re.findall(r"by \(([^)]*)\)", expression)
        for label in {label for group in grouped for label in re.split(r",\s*", group)}:
            assert label in BY_PROMETHEUS or all(label in series for series in labels), label


def test_dashboard_shows_every_metric_of_the_service(observed: tuple[list[Record], str]) -> None:
    families = {
        re.sub(r"_(bucket|sum|count|total|created)$", "", name)
        for name in series(observed[1])
        if name.startswith("email_processor_")
    }
    shown = " ".join(EXPRESSIONS.values())
    assert {family for family in families if family not in shown} == set()
    assert len(families) >= 9


def test_5xx_of_the_dashboard_are_those_of_the_error_list() -> None:
    (codes,) = re.findall(r'outcome=~"([^"]*)"', " ".join(EXPRESSIONS.values()))
    assert set(codes.split("|")) == {c for c, (status, _) in app.ERRORS.items() if status >= 500}


def test_dashboard_can_be_imported_as_it_stands() -> None:
    assert DASHBOARD["uid"] == app.SERVICE
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    assert variables == {"datasource", "namespace"}
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    for panel in DASHBOARD["panels"]:
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
