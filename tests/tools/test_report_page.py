"""The page of `pilotq report html`, in a browser: bars, density, zoom and names.

PILOTQ_TEST_TOOLS=1 (set by `.ci/run`) makes a missing browser a failure.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from pilotq.broker.store.journal import Journal, JournalEntry
from pilotq.cli import report_page
from tests.support.browser import Browser, browser, find
from tests.support.waiting import wait_until

NAME = "</script><img src=x onerror=document.title=1>"


def page(folder: Path, number: int) -> str:
    """The URL of a page with so many executions on eight cores."""
    entries = (
        JournalEntry(
            id=str(i), name=NAME, status="finished" if i % 9 else "failed", execution=1, node="n1",
            cpus=f"n1[{i % 8}]", queued=1.0, started=10.0 + i // 8, ended=10.9 + i // 8,
        )
        for i in range(number)
    )  # fmt: skip
    (folder / "journal.jsonl").write_bytes(b"".join(msgspec.json.encode(entry) + b"\n" for entry in entries))
    assert report_page.write_page(Journal(str(folder / "journal.jsonl")), str(folder / "page.html")) == number
    return f"file://{folder}/page.html"


def detail(shown: Browser) -> str:
    return str(shown.value("document.getElementById('gantt').dataset.detail"))


def test_levels_of_detail(tmp_path: Path) -> None:
    if find() is None:
        assert not os.environ.get("PILOTQ_TEST_TOOLS"), "there is no Chromium"
        pytest.skip("Chromium is not installed")
    with browser(tmp_path, "", "") as shown:
        shown.open(page(tmp_path, 40))
        assert detail(shown) == "bars"
        move = "(x, y) => document.getElementById('gantt').dispatchEvent(new PointerEvent('pointermove', {clientX: "
        at = "document.getElementById('gantt').getBoundingClientRect()"
        shown.value(f"({move}x + {at}.left, clientY: y + {at}.top}})))(130, 5)")
        assert shown.texts("#tip") == [f"n1:0: task 0 {NAME} failed, 0.9 s"]
        shown.open(page(tmp_path, 24_000))
        assert detail(shown) == "density"
        shown.click("#in")
        wait_until(lambda: detail(shown) == "bars", what="bars where they are few enough")
        assert shown.value("document.images.length") == 0 and shown.value("document.title") == "pilotq report"
        shown.open(page(tmp_path, report_page.BARS_MAX + 8))
        assert detail(shown) == "density"
        assert not shown.errors
