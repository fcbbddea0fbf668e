"""The names in other files that the benchmark needs, and that break it silently."""

from __future__ import annotations

import re
import sys

from fake_aws import FakeAws
from service import PROJECT

sys.path.insert(0, str(PROJECT / "bench"))

import report  # beside run.py
import run

CONTENDERS = [each for each in vars(run).values() if isinstance(each, run.Contender)]


def test_benchmark_finds_its_contenders_and_the_fake(fake_aws_process: FakeAws) -> None:
    for contender in CONTENDERS:
        last = contender.command[-1]
        if found := re.fullmatch(r"(\w+):(create_app\(\)|app)", last):
            assert list((PROJECT / "bench").rglob(f"{found[1]}.py")), contender.name
        elif not last.startswith("127.0.0.1:"):
            assert (contender.folder / last).is_file(), contender.name
    pairs = [row.rpartition(": ")[2].split(" / ") for row in report.TARGETS]
    assert {name for pair in pairs for name in pair} <= {each.name for each in CONTENDERS}
    used = re.findall(r"\baws\.(\w+)", (PROJECT / "bench" / "run.py").read_text("utf-8"))
    assert [name for name in used if not hasattr(fake_aws_process, name)] == []
