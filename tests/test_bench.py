"""The names in other files that the benchmark needs, and that break it silently."""

from __future__ import annotations

import re
import sys

from fake_aws import Behavior, FakeAws, Services
from service import PROJECT

sys.path.insert(0, str(PROJECT / "bench"))

import report  # beside run.py
import run

SOURCE = (PROJECT / "bench" / "run.py").read_text("utf-8")
CONTENDERS = [each for each in vars(run).values() if isinstance(each, run.Contender)]


def test_every_contender_exists() -> None:
    for contender in CONTENDERS:
        last = contender.command[-1]
        if found := re.fullmatch(r"(\w+):(create_app\(\)|app)", last):
            assert list((PROJECT / "bench").rglob(f"{found[1]}.py")), contender.name
        elif not last.startswith("127.0.0.1:"):
            assert (contender.folder / last).is_file(), contender.name


def test_targets_name_contenders() -> None:
    pairs = [row.rpartition(": ")[2].split(" / ") for row in report.TARGETS]
    assert {name for pair in pairs for name in pair} <= {each.name for each in CONTENDERS}


def test_fake_has_the_attributes_that_the_benchmark_uses(fake_aws_process: FakeAws) -> None:
    used = set(re.findall(r"\baws\.(\w+)", SOURCE))
    assert {name for name in used if not hasattr(fake_aws_process, name)} == set()
    assert set(re.findall(r"\baws\.set\((\w+)=", SOURCE)) <= vars(Behavior()).keys()
    counts = set(re.findall(r'\b(?:before|after)\["(\w+)"\]', SOURCE))
    assert counts <= fake_aws_process.counts().keys()
    pairs = re.findall(r'calls\("(\w+)", "(\w+)"\)', SOURCE)
    operations = {name for pair in pairs for name in pair}
    assert operations
    assert operations <= {name.partition("_")[2] for name in vars(Services)}
