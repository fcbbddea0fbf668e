"""README.md, SETUP.md, the pages of docs/, and openapi.yaml."""

from __future__ import annotations

import re
from typing import Any

import yaml
from service import PROJECT

PAGES = {
    file.stem.lower(): file.read_text("utf-8")
    for file in (*sorted(PROJECT.glob("*.md")), *sorted(PROJECT.glob("docs/*.md")))
}
README = PAGES["readme"]
OPENAPI: dict[str, Any] = yaml.safe_load((PROJECT / "openapi.yaml").read_text("utf-8"))
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


def rows_of_causes() -> list[set[str]]:
    """The words in the rows of the runbook's table of causes, under queue_unavailable."""
    rows = section("queue_unavailable").split("\n| `cause` has |")[1].split("\n\n")[0].splitlines()
    return [set(re.findall("`(.+?)`", row.split("|")[1])) for row in rows[2:]]


def row_of(cause: str) -> int | None:
    """The number of the first row that fits the cause."""
    found = (n for n, words in enumerate(rows_of_causes()) if any(word in cause for word in words))
    return next(found, None)
