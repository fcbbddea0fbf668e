"""Rewrite the generated tables of README.md and docs/: venv/bin/python docs/tables.py

A table stands between <!-- table: NAME --> and <!-- end -->. The last column of the settings is
written by hand, and stays.
"""

import dataclasses
import re
import sys
from pathlib import Path

PROJECT = Path(__file__).parent.parent
PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
sys.path.insert(0, str(PROJECT))

import yaml  # noqa: E402
from prometheus_client import REGISTRY  # noqa: E402

import app  # noqa: E402


def settings(old: str) -> list[tuple[str, ...]]:
    meanings = dict(re.findall(r"^\| `(\w+)` .*\| (.*) \|$", old, re.M))
    rows = [("Variable", "Default", "Value", "Meaning")]
    for setting in dataclasses.fields(app.Settings):
        name, default = setting.name.upper(), setting.default
        if isinstance(default, tuple):
            default = ",".join(default)
        shown = f"`{default}`".replace(".0`", "`")
        if default is dataclasses.MISSING:
            shown = "required"
        rows.append((f"`{name}`", shown, setting.metadata["rule"], meanings.get(name, "")))
    return rows


def errors(_: str) -> list[tuple[str, ...]]:
    """In the order of the checks; the explanations come from openapi.yaml."""
    api = (PROJECT / "openapi.yaml").read_text("utf-8")
    texts = [
        response["description"]
        for response in yaml.safe_load(api)["components"]["responses"].values()
    ]
    explained = dict(re.findall(r"^\| (`\w+`) \| (.+) \|$", "\n".join(texts), re.M))
    rows = [("Status", "`error`", "When", "Then")]
    for code, (status, _text) in app.ERRORS.items():
        rows.append((str(status), f"`{code}`", *explained[f"`{code}`"].split(" | ")))
    return rows


# Labels whose values depend on the configuration or the build.
VARIABLE = {
    "parameter": "each name in `TOKEN_SSM_PARAMETER`",
    "version": "as in `GET /`",
    "commit": "as in `GET /`",
}


def metrics(_: str) -> list[tuple[str, ...]]:
    app.TOKENS_ACCEPTED.labels("")  # a metric without a series has no label
    rows = [("Metric", "Type", "Labels", "Meaning")]
    for metric in REGISTRY.collect():
        if not metric.name.startswith("email_processor") or metric.name.endswith("_created"):
            continue
        labels: dict[str, list[str]] = {}
        for name, value in (pair for sample in metric.samples for pair in sample.labels.items()):
            labels.setdefault(name, []).append(value)
        labels.pop("le", None)  # of every histogram
        cells = []
        for name, values in labels.items():
            listed = [f"`{value}`" for value in dict.fromkeys(values) if value not in app.ERRORS]
            codes = ["or an error code"] if set(app.ERRORS) <= set(values) else []
            cells.append(f"`{name}`: {VARIABLE.get(name) or ', '.join(listed + codes)}")
        name = metric.name + "_total" * (metric.type == "counter")
        rows.append((f"`{name}`", metric.type, "; ".join(cells), metric.documentation))
    return rows


def rewritten(page: str) -> str:
    def table(found: re.Match[str]) -> str:
        head, *rows = globals()[found[2]](found[3])
        lines = [head, ("---",) * len(head), *rows]
        return found[1] + "".join(f"| {' | '.join(line)} |\n" for line in lines) + found[4]

    return re.sub(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end -->)", table, page, flags=re.DOTALL)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(rewritten(page.read_text("utf-8")), "utf-8")
