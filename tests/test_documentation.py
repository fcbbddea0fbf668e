"""The pages and openapi.yaml agree with app.py."""

import json
import re
import runpy
import tomllib
from typing import Any

import pytest
import yaml

import app

PAGES = {
    file.stem.lower(): file.read_text("utf-8")
    for file in (*sorted(app.PROJECT.glob("*.md")), *sorted(app.PROJECT.glob("docs/*.md")))
}
README = PAGES["readme"]
TABLES = runpy.run_path(str(app.PROJECT / "docs/tables.py"))
BENCH_RESULTS = (app.PROJECT / "bench/RESULTS.md").read_text("utf-8")
OPENAPI: dict[str, Any] = yaml.safe_load((app.PROJECT / "openapi.yaml").read_text("utf-8"))


page = PAGES.__getitem__  # the text of README.md, SETUP.md or docs/NAME.md


def section(heading: str) -> str:
    """The text under a heading, of any page."""
    for text in PAGES.values():
        if found := re.search(rf"^(#+) {re.escape(heading)}\n", text, re.MULTILINE):
            return re.split(rf"^#{{1,{len(found[1])}}} ", text[found.end() :], flags=re.M)[0]
    raise AssertionError(heading)


def table(heading: str) -> list[list[str]]:
    """The rows of the first table under a heading, without its head; cells stripped of `."""
    found = re.search(r"^\|.*\n\|[-|: ]+\n((?:\|.*\n)+)", section(heading), re.MULTILINE)
    assert found, heading
    rows = found[1].splitlines()
    return [[cell.strip().strip("`") for cell in row.strip("|").split("|")] for row in rows]


def error_examples(schema: Any) -> dict[str, str]:
    """Error code -> message of every example of an error body anywhere in openapi.yaml."""
    if isinstance(schema, dict):
        if schema.get("status") == "error" and isinstance(schema.get("error"), str):
            return {schema["error"]: schema["message"]}
        schema = list(schema.values())
    if isinstance(schema, list):
        return {code: text for part in schema for code, text in error_examples(part).items()}
    return {}


def test_generated_tables_are_up_to_date() -> None:
    """`python docs/tables.py` updates them."""
    stale = [name for name, text in PAGES.items() if TABLES["rewritten"](text) != text]
    assert stale == []
    made = re.findall(r"<!-- table: (\w+) -->", "".join(PAGES.values()))
    assert sorted(made) == ["errors", "metrics", "settings"]


def test_every_setting_has_a_meaning() -> None:
    assert [row[0] for row in table("Configuration") if not row[3]] == []


def test_readme_and_openapi_list_every_route() -> None:
    settings = app.Settings(sqs_queue_url="http://sqs/queue")
    index = app.create_app(settings, ssm=object(), sqs=object()).test_client().get("/")
    in_readme = {route for row in table("API") for route in row[0].replace("`", "").split(", ")}
    in_openapi = {
        f"{method.upper()} {path}" for path, item in OPENAPI["paths"].items() for method in item
    }
    assert in_readme == in_openapi == set(index.get_json()["endpoints"])


def test_readme_and_openapi_list_the_same_headers() -> None:
    parameters = OPENAPI["paths"]["/process"]["post"]["parameters"]
    shared = OPENAPI["components"]["parameters"]
    in_openapi = {
        p["name"] if "name" in p else shared[p["$ref"].split("/")[-1]]["name"] for p in parameters
    }
    assert {row[0] for row in table("POST /process")} == {"Content-Type", *in_openapi}


def test_openapi_gives_every_error_code_an_example_and_no_other() -> None:
    assert set(error_examples(OPENAPI)) == {*app.ERRORS, "too_many_requests"}  # the web ACL's


def test_openapi_documents_every_status_of_process() -> None:
    statuses = {str(status) for status, _ in app.ERRORS.values()} - {"404", "405"}
    documented = set(OPENAPI["paths"]["/process"]["post"]["responses"])
    assert documented - {"404", "405"} == {"200", "429", *statuses}


def test_openapi_explains_the_errors_that_it_shows() -> None:
    for name, response in OPENAPI["components"]["responses"].items():
        if name == "TooManyRequests":
            continue  # not the service's
        content, description = response["content"]["application/json"], response["description"]
        codes = list(error_examples(content))
        assert re.findall(r"^\| `(\w+)` \|", description, re.M)[1:] == codes
        assert list(content.get("examples", {})) == codes  # the page shows these names


def test_readme_and_openapi_list_the_limits_of_json() -> None:
    process = OPENAPI["paths"]["/process"]["post"]["requestBody"]["description"]
    for text in (README, process, *(row[2] for row in table("Errors") if "json" in row[1])):
        assert f"{app.MAX_JSON_VALUES:,} values" in text
        assert f"{app.MAX_JSON_DEPTH} levels" in text


def test_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((app.PROJECT / "pyproject.toml").read_text("utf-8"))["project"]
    assert {project["version"], OPENAPI["info"]["version"]} == {app.VERSION}


def test_readme_example_passes_validation() -> None:
    example = re.search(r"curl http://localhost:8080/process .*? -d '(.*?)'\n", README, re.DOTALL)
    assert example
    document = json.loads(example[1])
    app.validate_data(document["data"])
    assert document["token"] == app.EXAMPLE_TOKEN


def bench_row(name: str) -> dict[str, float]:
    """A row's medians in bench/RESULTS.md, by the heading of its table."""
    found = re.search(rf"\A(.*?)^\| {re.escape(name)} *\|([^\n]*)\|$", BENCH_RESULTS, re.M | re.S)
    assert found, name
    keys = re.findall(r"^\| +\|(.*)\|$", found[1], re.M)[-1].split("|")
    numbers = (float(cell.split()[0].replace(",", "")) for cell in found[2].split("|"))
    return dict(zip((key.strip() for key in keys), numbers, strict=True))


def test_figures_of_the_performance_page_are_the_benchmarks() -> None:
    figures = re.findall(r"(?<![\w=.])\d\.\d+|\d+ (?=microseconds)", page("performance"))
    assert len(figures) >= 7
    measured = set(re.findall(r"[\d.]+", BENCH_RESULTS))
    assert [figure for figure in figures if figure.strip() not in measured] == []


def test_sizing_of_a_pod_is_as_measured() -> None:
    names = {"4": "4 workers", "2": "2 workers", "1": "1 worker"}
    for workers, *cells in table("Sizing"):
        row = bench_row(names.pop(workers.partition(",")[0]))
        keys = ("messages/s", "CPU us/message", "memory MiB", "worst /health ms")
        assert [float(cell.split()[0].replace(",", "")) for cell in cells] == [row[k] for k in keys]
    assert names == {}


def test_reliability_page_lists_every_tested_failure() -> None:
    tests = (app.PROJECT / "tests/test_faults.py").read_text("utf-8")
    named = set(re.findall(r"`(test_\w+)`", page("reliability")))
    assert named == set(re.findall(r"^def (test_\w+)", tests, re.M))


def anchors(text: str) -> set[str]:
    return {
        re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    }


@pytest.mark.parametrize("name", PAGES)
def test_links_of_a_page_lead_somewhere(name: str) -> None:
    folder = app.PROJECT / ("" if name in ("readme", "setup") else "docs")
    for target, anchor in re.findall(r"\]\((?!https:)([^)#]*)#?([\w-]*)\)", page(name)):
        assert (folder / target).exists(), target
        assert not anchor or anchor in anchors(page(name)), anchor


@pytest.mark.parametrize("name", PAGES)
def test_files_named_on_a_page_exist(name: str) -> None:
    named = set(re.findall(r"`(?:\./)?([\w./-]+\.(?:py|sh|md|yaml|toml|txt))\b", page(name)))
    assert [file for file in sorted(named) if not (app.PROJECT / file).exists()] == []
