"""The pages and openapi.yaml agree with app.py."""

import re
import runpy
import tomllib

from pages import OPENAPI, PAGES, README, page, table

import app


def test_generated_tables_are_up_to_date() -> None:
    """`python docs/tables.py` updates them."""
    rewritten = runpy.run_path(str(app.PROJECT / "docs/tables.py"))["rewritten"]
    assert [name for name, text in PAGES.items() if rewritten(text) != text] == []
    made = re.findall(r"<!-- table: (\w+) -->", "".join(PAGES.values()))
    assert sorted(made) == ["errors", "metrics", "settings"]
    assert [row[0] for row in table("Configuration") if not row[3]] == [], "no meaning"


def test_readme_and_openapi_list_every_route_and_the_same_headers() -> None:
    settings = app.Settings(sqs_queue_url="http://sqs/queue")
    index = app.create_app(settings, ssm=object(), sqs=object()).test_client().get("/")
    routes = {
        f"{method.upper()} {path}" for path, item in OPENAPI["paths"].items() for method in item
    }
    in_readme = {route for row in table("API") for route in row[0].replace("`", "").split(", ")}
    assert in_readme == routes == set(index.get_json()["endpoints"])
    shared, own = (
        OPENAPI["components"]["parameters"],
        OPENAPI["paths"]["/process"]["post"]["parameters"],
    )
    headers = {p.get("name") or shared[p["$ref"].rpartition("/")[2]]["name"] for p in own}
    assert {row[0] for row in table("POST /process")} == {"Content-Type", *headers}


def test_openapi_documents_every_status_and_error_of_process() -> None:
    responses = OPENAPI["paths"]["/process"]["post"]["responses"]
    statuses = {str(status) for status, _ in app.ERRORS.values()} - {"404"}
    assert set(responses) == {"200", "429", *statuses}  # 429 is the web ACL's
    for name, response in OPENAPI["components"]["responses"].items():
        if name == "TooManyRequests":
            continue
        examples = response["content"]["application/json"]["examples"]
        assert [e["value"]["error"] for e in examples.values()] == list(examples), name
        assert re.findall(r"^\| `(\w+)` \|", response["description"], re.M)[1:] == list(examples)


def test_readme_and_openapi_list_the_limits_of_json() -> None:
    process = OPENAPI["paths"]["/process"]["post"]["requestBody"]["description"]
    for text in (README, process, *(row[2] for row in table("Errors") if "json" in row[1])):
        assert f"{app.MAX_JSON_VALUES:,} values" in text
        assert f"{app.MAX_JSON_DEPTH} levels" in text


def test_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((app.PROJECT / "pyproject.toml").read_text("utf-8"))["project"]
    assert {project["version"], OPENAPI["info"]["version"]} == {app.VERSION}


def test_openapi_requires_the_validated_fields() -> None:
    schema = OPENAPI["components"]["schemas"]
    required = [s["required"] for s in schema.values() if "email_subject" in s.get("required", [])]
    assert required == [[*app.FIELDS]]


def test_figures_of_performance_and_sizing_are_the_benchmarks() -> None:
    results = (app.PROJECT / "bench/RESULTS.md").read_text("utf-8")
    rows = {}  # name -> the medians, from the first table that has such a row
    for name, cells in re.findall(r"^\| ([^|]*\w) *\|(.*)\|$", results, re.M):
        rows.setdefault(name, re.findall(r"([\d,.]+)[^|]*", cells))
    others = ["FastAPI + aiobotocore", "Fastify + AWS SDK v3", "direct 4x2", "flask alone 4x2"]
    cpu_ratios = [float(rows[f"email-processor 4x2 / {other}"][1]) for other in others]
    assert re.findall(r"\d+(?= %)", page("performance")) == [f"{r:.0%}"[:-1] for r in cpu_ratios]
    ours, fastify, direct = (rows[name] for name in ("email-processor 4x2", *others[1:3]))
    figures = re.findall(r"(?<![\w=.])\d\.\d+|\d+(?=\s+microseconds)", page("performance"))
    assert figures == [ours[1], ours[5], ours[7], fastify[-1], direct[-1]]
    for workers, *cells in table("Sizing"):
        pod = rows["1 worker" if workers == "1" else f"{workers[0]} workers"]
        assert [cell.split()[0] for cell in cells] == [pod[n] for n in (0, 1, 2, 4)], workers


def test_reliability_page_lists_every_tested_failure() -> None:
    tests = (app.PROJECT / "tests/test_faults.py").read_text("utf-8")
    named = set(re.findall(r"`(test_\w+)`", page("reliability")))
    assert named == set(re.findall(r"^def (test_\w+)", tests, re.M))


def anchors(text: str) -> set[str]:
    return {
        re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    }


def test_links_and_files_named_on_the_pages_exist() -> None:
    for name, text in PAGES.items():
        folder = app.PROJECT / ("" if name in ("readme", "setup") else "docs")
        for target, anchor in re.findall(r"\]\((?!https:)([^)#]*)#?([\w-]*)\)", text):
            assert (folder / target).exists(), f"{name}: {target}"
            linked = (folder / target).read_text("utf-8") if target else text
            assert not anchor or anchor in anchors(linked), f"{name}: {anchor}"
        for file in re.findall(r"`(?:\./)?([\w./-]+\.(?:py|sh|md|yaml|toml|txt))\b", text):
            assert (app.PROJECT / file).exists(), f"{name}: {file}"
