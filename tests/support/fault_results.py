"""Writes the results of the tests in docs/faults.toml to docs/faults.json: `make faults` loads it into pytest.

Rows of which no test was run keep what they had.
"""

from __future__ import annotations

import json
import re
import sys

import pytest

from tests.support.paths import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DOCS = ROOT / "docs"
ROWS = tomllib.loads((DOCS / "faults.toml").read_text(encoding="utf-8"))["fault"]
_seen: dict[str, str] = {}  # test -> passed, failed or skipped; what went wrong stands


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if (report.when == "call" or report.outcome != "passed") and _seen.get(report.nodeid) != "failed":
        _seen[report.nodeid] = report.outcome


def pytest_sessionfinish() -> None:
    path = DOCS / "faults.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for row in ROWS:
        mine = [outcome for test, outcome in _seen.items() if re.search(row["tests"], test)]
        if mine:
            results[row["what"]] = {word: mine.count(word) for word in ("passed", "failed", "skipped") if word in mine}
    path.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")
