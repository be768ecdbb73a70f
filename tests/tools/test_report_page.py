"""The page of `pilotq report html`, in a browser: bars, density, zoom and names.

PILOTQ_TEST_TOOLS=1 (set by `.ci/run`) makes a missing browser a failure.
"""

from __future__ import annotations

import os
import re
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


def show(shown: Browser, folder: Path, number: int) -> None:
    shown.open("about:blank")
    shown.open(page(folder, number))
    shown.await_value("document.getElementById('gantt').dataset.detail")


def detail(shown: Browser) -> str:
    return str(shown.value("document.getElementById('gantt').dataset.detail"))


def await_bars(shown: Browser) -> None:
    wait_until(lambda: detail(shown) == "bars", what="bars where they are few enough")


def under(shown: Browser, x: int, y: int) -> str:
    """What the page says of this point of the chart."""
    move = "(x, y) => document.getElementById('gantt').dispatchEvent(new PointerEvent('pointermove', {clientX: "
    at = "document.getElementById('gantt').getBoundingClientRect()"
    shown.value(f"({move}x + {at}.left, clientY: y + {at}.top}})))({x}, {y})")
    return shown.texts("#tip")[0]


def test_levels_of_detail(tmp_path: Path) -> None:
    if find() is None:
        assert not os.environ.get("PILOTQ_TEST_TOOLS"), "there is no Chromium"
        pytest.skip("Chromium is not installed")
    with browser(tmp_path, "", "") as shown:
        show(shown, tmp_path, 40)
        await_bars(shown)
        assert under(shown, 130, 5) == f"n1:0: task 0 {NAME} failed, 0.9 s"
        show(shown, tmp_path, 60_000)
        assert detail(shown) == "density" and "in use" in under(shown, 130, 5)
        for _ in range(8):
            shown.click("#in")
        await_bars(shown)
        # In view are 29.3 of 7,499.9 s around the middle, and parts of cores 3 and 4.
        one = re.compile(r"n1:(\d): task (\d+) (.*) (finished|failed), 0.9 s")

        def found() -> re.Match[str] | None:  # 0.1 s between two executions are about 2 pixels
            return next(filter(None, (one.fullmatch(under(shown, x, 300)) for x in (600, 610, 620))), None)

        said = wait_until(found, what="an execution under the pointer")
        assert said and said[3] == NAME and abs(int(said[2]) // 8 - 3750) < 15
        assert int(said[2]) % 8 == int(said[1]) and said[4] == ("finished" if int(said[2]) % 9 else "failed")
        assert shown.value("document.images.length") == 0 and shown.value("document.title") == "pilotq report"
        assert not shown.errors
