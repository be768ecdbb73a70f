"""Every page of rq-dashboard for a pilot, read in a browser; and its buttons, pressed there.

PILOTQ_TEST_TOOLS=1 (set by `.ci/run`) makes a missing browser or rq-dashboard a failure.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

from pilotq.broker import Broker, Task
from tests.support.browser import Browser, browser, find
from tests.support.command_line import in_background
from tests.support.dashboard import Served, served
from tests.support.waiting import wait_until

WAIT_S = 60.0
CLASS = "default.p0.1c"  # where the waiting tasks of one core stand
# What waits, runs and has ended; the names are commands that can be found on a page.
HELD = "until test -e go-on; do sleep 0.05; done; : "


class Page(NamedTuple):
    """A pilot of one core, its dashboard, and a browser that has logged in."""

    broker: Broker
    served: Served
    browser: Browser
    folder: Path

    def jobs(self, queue: str, registry: str) -> None:
        self.browser.open(f"{self.served.url}rq/0/view/jobs/{queue}/{registry}/200/asc/1")

    def shell(self, text: str, **fields: object) -> str:
        return self.broker.enqueue(Task(command=["sh", "-c", text], cwd=str(self.folder), **fields))  # type: ignore[arg-type]

    def running(self, word: str) -> str:
        """A task that runs until `go_on`, with this word in its command."""
        task = self.shell(HELD + word)
        wait_until(lambda: self.broker.task(task).status == "started", seconds=WAIT_S, what=f"{word} runs")
        return task

    def go_on(self) -> None:
        """Let what runs end; no core is in use when this returns, and nothing waits for one."""
        (self.folder / "go-on").touch()
        last = self.shell("true", priority=-1)
        self.broker.wait([last], timeout=WAIT_S)
        (self.folder / "go-on").unlink()

    def confirm(self) -> None:
        self.browser.click("#confirmation-modal-yes")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    asked = os.environ.get("PILOTQ_TEST_TOOLS") == "1"
    for there, what in ((find_spec("rq_dashboard"), "rq-dashboard"), (find(), "Chromium")):
        if there is None:
            (pytest.fail if asked else pytest.skip)(f"{what} is not installed")
    folder = tmp_path_factory.mktemp("pages")
    with (
        # Prefetched tasks count as started: here they shall wait in their list.
        in_background(folder, "--nodes", "n1:1", PILOTQ_SETTINGS='{"prefetch_after": 1000000}'),
        served(folder, (folder / ".pilotq" / "current").resolve()) as shown,
        Broker.connect(str(folder / ".pilotq" / "current")) as broker,
        browser(folder, "pilotq", shown.password) as found,
    ):
        yield Page(broker, shown, found, folder)
        assert not [error for error in found.errors if "favicon" not in error]


@pytest.fixture
def one_each(page: Page) -> Iterator[dict[str, str]]:
    """A task of each status."""
    finished = page.shell("true finished-one")
    failed = page.shell("echo words of failure >&2; exit 3 # failed-one")
    page.broker.wait([finished, failed], timeout=WAIT_S)
    running = page.running("running-one")
    queued, canceled = page.shell("true queued-one"), page.shell("true canceled-one")
    deferred = page.shell("true deferred-one", after=[running])
    page.broker.cancel([canceled])
    yield {
        "started": running, "queued": queued, "deferred": deferred, "finished": finished, "failed": failed,
        "canceled": canceled,
    }  # fmt: skip
    page.go_on()


def test_the_overview_counts_the_tasks_of_each_state(page: Page, one_each: dict[str, str]) -> None:
    page.browser.open(f"{page.served.url}rq/")
    page.browser.await_text("#queues tbody tr[data-role=queue]", CLASS)
    heads = page.browser.texts("#queues th")
    rows = {
        (cells := row.split())[0]: dict(zip(heads[1:], map(int, cells[1:]), strict=True))
        for row in page.browser.texts("#queues tbody tr[data-role=queue]")
    }
    waiting, own = rows[CLASS], rows["default"]
    assert waiting["Queued jobs"] == 2, "a canceled one stands in its list until its turn comes"
    assert (own["Started jobs"], own["Deferred jobs"]) == (1, 1)
    assert min(own[f"{state} jobs"] for state in ("Finished", "Failed", "Canceled")) >= 1


@pytest.mark.parametrize("state", ["queued", "started", "deferred", "finished", "failed", "canceled"])
def test_the_list_of_a_state_names_its_tasks(page: Page, one_each: dict[str, str], state: str) -> None:
    page.jobs(CLASS if state == "queued" else "default", state)
    word = {"started": "running"}.get(state, state) + "-one"
    found = page.browser.await_text("#jobs tr[data-role=job]", word)
    assert any(one_each[state] in row for row in found)
    if state == "failed":
        assert any("exit code was 3" in text for text in page.browser.texts("#jobs .exc_info"))


@pytest.mark.parametrize("state", ["queued", "started", "deferred", "finished", "failed", "canceled"])
def test_the_page_of_a_task(page: Page, one_each: dict[str, str], state: str) -> None:
    page.browser.open(f"{page.served.url}rq/0/view/job/{one_each[state]}")
    (text,) = page.browser.await_text("#job-data", f"Status: {state}")
    assert "-one" in text and one_each[state] in page.browser.texts("h2")[0]
    if state == "failed":
        assert "exit code was 3" in text


def test_the_workers_page(page: Page, one_each: dict[str, str]) -> None:
    page.browser.open(f"{page.served.url}rq/0/view/workers")
    rows = page.browser.await_text("#workers tr[data-role=worker]", "n1")
    assert len(rows) == 1 and "default" in rows[0]


def test_delete_takes_a_waiting_task_out(page: Page) -> None:
    running, doomed = page.running("in-front"), page.shell("touch never-made # doomed-one")
    page.jobs(CLASS, "queued")
    page.browser.await_text("#jobs", "doomed-one")
    page.browser.click(f"tr[data-job-id='{doomed}'] [data-role=delete-job-btn]")
    page.confirm()
    page.browser.await_text("#jobs", "No jobs.")
    page.go_on()
    assert page.broker.task(running).status == "finished" and not (page.folder / "never-made").exists()


def test_delete_ends_a_running_task(page: Page) -> None:
    doomed = page.running("ended-by-a-button")
    page.jobs("default", "started")
    page.browser.await_text("#jobs", "ended-by-a-button")
    page.browser.click(f"tr[data-job-id='{doomed}'] [data-role=delete-job-btn]")
    page.confirm()
    wait_until(lambda: [node.used for node in page.broker.nodes()] == [0], seconds=WAIT_S, what="its core is free")


def test_empty_takes_all_waiting_tasks_out(page: Page) -> None:
    page.running("in-front")
    page.broker.enqueue_many([Task(command=["touch", "never-made"], cwd=str(page.folder)) for _ in range(20)])
    page.jobs(CLASS, "queued")
    page.browser.await_text("#jobs", "never-made")
    page.browser.click("#empty-btn")
    page.confirm()
    page.browser.await_text("#jobs", "No jobs.")
    page.go_on()
    assert not (page.folder / "never-made").exists()


def test_compact_loses_nothing(page: Page) -> None:
    page.running("in-front")
    waiting = page.broker.enqueue_many([Task(command=["true", "compacted"]) for _ in range(20)])
    page.jobs(CLASS, "queued")
    page.browser.await_text("#jobs", "compacted")
    page.browser.click("#compact-btn")
    page.confirm()
    page.browser.await_answer("/compact")
    page.go_on()
    assert {page.broker.task(task).status for task in waiting} == {"finished"}


def test_requeue_runs_a_failed_task_again(page: Page) -> None:
    task = page.shell("test -e mended || exit 4 # to-be-mended")
    page.broker.wait([task], timeout=WAIT_S)
    (page.folder / "mended").touch()
    page.jobs("default", "failed")
    page.browser.await_text("#jobs", "to-be-mended")
    page.browser.click(f"tr[data-job-id='{task}'] [data-role=requeue-job-btn]")
    wait_until(lambda: page.broker.task(task).status == "finished", seconds=WAIT_S)
    assert page.broker.task(task).execution == 2
