"""The dashboard's own page in a browser: its figures, every button, the map, a task's page; whether all can read it.

PILOTQ_TEST_TOOLS=1 (set by `.ci/run`) makes a missing browser or rq-dashboard a failure.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from benchmarks.pretended.pilot import pretended_pilot
from pilotq.broker import ArrayRange, Broker, Request, Task
from tests.support.browser import Browser, browser, find
from tests.support.command_line import Cli, in_background
from tests.support.dashboard import Served, served
from tests.support.waiting import wait_until

WAIT_S = 60.0
CHECK = (Path(__file__).parents[1] / "support" / "page_check.js").read_text()
HELD = "until test -e go-on; do sleep 0.05; done"
HOSTILE = "<img src=x onerror=document.title='taken'>"
NUMBERS = ("finished", "failed", "canceled", "running", "prefetched", "waiting", "total", "used", "cores")


class Page(NamedTuple):
    cli: Cli
    broker: Broker
    served: Served
    browser: Browser
    folder: Path

    def open(self, place: str = "") -> None:
        self.browser.open("about:blank")  # else only the part behind # would change, and nothing be loaded
        self.browser.open(f"{self.served.url}#/{place}")
        self.browser.await_value("document.documentElement?.dataset.shown")

    def shell(self, text: str, **fields: Any) -> str:
        return self.broker.enqueue(Task(command=["sh", "-c", text], cwd=str(self.folder), **fields))

    def numbers(self) -> dict[str, int]:
        """All figures of one moment."""
        code = (
            "Object.fromEntries(%s.map((name) => [name, document.getElementById(name).innerText.replaceAll(',', '')]))"
        )
        found = self.browser.value(code % json.dumps(NUMBERS))
        return {name: int(text) for name, text in found.items()}

    def yes(self) -> None:
        """Answer the question that a button asks."""
        self.browser.await_value("document.getElementById('ask').open")
        self.browser.click("#ask-yes")

    def press(self, selector: str) -> None:
        self.browser.click(selector)
        self.yes()


def needed() -> None:
    asked = os.environ.get("PILOTQ_TEST_TOOLS") == "1"
    for there, what in ((find_spec("rq_dashboard"), "rq-dashboard"), (find(), "Chromium")):
        if there is None:
            (pytest.fail if asked else pytest.skip)(f"{what} is not installed")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    needed()
    folder = tmp_path_factory.mktemp("page")
    with (
        in_background(folder, "--nodes", "n1:3,n2:2") as cli,
        served(folder, (folder / ".pilotq" / "current").resolve()) as shown,
        Broker.connect(str(folder / ".pilotq" / "current")) as broker,
        browser(folder, "pilotq", shown.password) as found,
    ):
        found.look(1200, 900)
        yield Page(cli, broker, shown, found, folder)
        assert found.errors == []


@pytest.fixture
def held(page: Page) -> Iterator[str]:
    """A task of two cores that runs until the test has ended."""
    task = page.shell(HELD, name="held", request=Request(cores=(3, 3)))
    wait_until(lambda: page.broker.task(task).cores, seconds=WAIT_S, what="it runs")
    yield task
    (page.folder / "go-on").touch()
    page.broker.wait(timeout=WAIT_S)
    (page.folder / "go-on").unlink()


def test_every_figure_is_that_of_the_command(page: Page, held: str) -> None:
    page.broker.enqueue_many([Task(command=["false"], name=f"bad-{n}") for n in range(2)])
    page.broker.enqueue(Task(command=["true"], name="many", array=ArrayRange(0, 99)))
    said: dict[str, Any] = {}

    def settled() -> bool:
        """Only the held task is left, and its cores alone are in use: from now on no figure changes."""
        said.update(json.loads(page.cli("status", "--json").stdout))
        return (said["tasks"]["left"], said["running"], said["used"]) == (1, 1, 3)

    wait_until(settled, seconds=WAIT_S, what="nothing but the held task")
    page.open()
    figures = {**said["tasks"], "prefetched": 0, "waiting": 0, **{n: said[n] for n in ("running", "used", "cores")}}
    wanted = {name: figures[name] for name in NUMBERS}
    wait_until(lambda: page.numbers() == wanted, seconds=WAIT_S, what=f"the numbers {wanted}")
    # What the page has from the journal comes when that is written.
    wait_until(lambda: [row.split()[2:4] for row in page.browser.texts("#progress tbody tr") if row.startswith("many")]
               == [["100", "100"]], seconds=WAIT_S, what="the progress of the array")  # fmt: skip
    page.browser.await_text("#failure-list h3", "exit code 1: 2 tasks", WAIT_S)
    assert page.browser.texts("#nodes-sum")[0].startswith("2 nodes, 3 of 5 cores in use")
    assert page.numbers() == wanted


def test_a_core_leads_to_its_task(page: Page, held: str) -> None:
    page.open()
    spot = f"map.spots.find((s) => (s.execution || '').startsWith('{held}:'))"
    page.browser.await_value(f"Boolean({spot})")
    x, y = page.browser.value(
        f"(() => {{ const s = {spot}, b = document.getElementById('map').getBoundingClientRect();"
        "return [b.x + s.x + s.w / 2, b.y + s.y + s.h / 2]; })()"
    )
    page.browser.mouse(x, y)
    (tip,) = page.browser.await_text("#tip", "held")
    assert f"task {held} (held), for" in tip
    page.browser.mouse(x, y, press=True)
    page.browser.await_text("#detail h2", f"Task {held}: held")
    # The same by keyboard.
    page.open()
    page.browser.await_value(f"Boolean({spot})")
    page.browser.value("document.getElementById('map').focus()")
    for _ in range(page.browser.value(f"map.spots.indexOf({spot})") + 1):
        page.browser.key("ArrowRight")
    page.browser.await_text("#map-says", f"task {held} (held)")
    page.browser.key("Enter")
    page.browser.await_text("#detail h2", f"Task {held}: held")


def test_search_by_id_and_by_name(page: Page, held: str) -> None:
    for word in (held, "held"):
        page.open()
        page.browser.key("/")
        page.browser.await_value("document.activeElement.id === 'q'")
        page.browser.type(word)
        page.browser.key("Enter")
        page.browser.await_value("location.hash.startsWith('#/task/') || Boolean(document.querySelector('#detail li'))")
        if page.browser.value("location.hash.startsWith('#/task/')"):
            page.browser.await_text("#detail h2", "held")
        else:  # earlier tests had tasks of that name
            assert held in page.browser.value(
                "[...document.querySelectorAll('#detail li a')].map((a) => a.textContent)"
            )
    page.open("find/nobody")
    page.browser.await_text("#detail", "No task has this id or this name")
    page.open("task/zzz9")
    page.browser.await_text("#detail", "there is no task 'zzz9'")
    page.browser.errors[:] = [error for error in page.browser.errors if not error.startswith("404 ")]


def test_the_page_of_a_task_and_its_output_live(page: Page) -> None:
    task = page.shell(f"echo first; echo oh >&2; {HELD}; echo second; exit 3", name="talks")
    wait_until(lambda: page.broker.task(task).cores, seconds=WAIT_S)
    page.open(f"task/{task}")
    page.browser.await_text("#output", "first")
    page.browser.await_text("#detail li", "it runs on")
    (page.folder / "go-on").touch()
    page.browser.await_text("#output", "first second")
    page.browser.await_text("#detail .state", "failed")
    page.browser.await_text("#detail", "Executions")
    page.browser.await_text("#detail tbody tr", "failed, exit code 3")
    page.browser.value("[...document.querySelectorAll('.tabs button')].at(-1).click()")
    page.browser.await_text("#output", "oh")
    (page.folder / "go-on").unlink()


def test_cancel_and_retry(page: Page) -> None:
    doomed = page.shell("sleep 1000", name="doomed")
    wait_until(lambda: page.broker.task(doomed).cores, seconds=WAIT_S)
    page.open(f"task/{doomed}")
    page.browser.click("#cancel")
    page.browser.await_value("document.getElementById('ask').open")
    page.browser.click("#ask-no")
    page.browser.await_value("!document.getElementById('ask').open")
    assert page.broker.task(doomed).status == "started", "No is no"
    page.press("#cancel")
    page.browser.await_text("#said", f"{doomed} is running, and is being ended")
    wait_until(lambda: page.broker.task(doomed).status == "canceled", seconds=WAIT_S)
    page.press("#retry")
    page.browser.await_text("#said", f"{doomed} runs again")
    wait_until(lambda: page.broker.task(doomed).status == "started", seconds=WAIT_S)
    page.broker.cancel([doomed])
    page.broker.wait([doomed], timeout=WAIT_S)


def test_failures_tell_why_and_run_again(page: Page) -> None:
    code = "test -e mended || { echo 'cannot open input.dat' >&2; exit 7; }"
    tasks = [page.shell(code, name=f"mend-{number}") for number in range(3)]
    page.broker.wait(tasks, timeout=WAIT_S)
    page.open()
    page.browser.await_text("#failure-list h3", "exit code 7: 3 tasks")
    group = "[...document.querySelectorAll('.reason')].find((e) => e.textContent.startsWith('exit code 7'))"
    page.browser.value(f"{group}.querySelectorAll('.failure button')[0].click()")
    page.browser.await_text("#failure-list pre", "cannot open input.dat")
    (page.folder / "mended").touch()
    while page.browser.value(f"Boolean({group})"):
        page.browser.value(f"{group}.querySelectorAll('.failure button')[1].click()")
        page.yes()
        page.browser.await_text("#said", "runs again" if len(tasks) == 1 else "run")
        rows = page.browser.value(f"({group} || document.createElement('p')).querySelectorAll('.failure').length")
        page.browser.await_value(
            f"(({group} || document.createElement('p')).querySelectorAll('.failure').length) < {max(rows, 1)}"
        )
    page.broker.wait(tasks, timeout=WAIT_S)
    assert {page.broker.task(task).status for task in tasks} == {"finished"}


def test_drain_and_resume_a_node(page: Page) -> None:
    page.open()
    page.browser.value("document.getElementById('nodes-list').open = true")
    page.browser.click("[aria-label='Drain node n2']")
    page.browser.await_value("document.activeElement.id === 'ask-input'")
    page.browser.type("slow <i>disk")
    page.yes()
    page.browser.await_text("#closed", "n2 is drained: slow <i>disk")
    assert page.broker.closed_nodes() == {"n2": "drained slow <i>disk"}
    page.press("#closed [aria-label='Resume node n2']")
    page.browser.await_value("!document.querySelector('#closed li')")
    assert page.broker.closed_nodes() == {}
    page.open("node/n1")
    page.press("#drain")
    page.browser.await_text("#detail .state", "drained")
    page.press("#resume")
    page.browser.await_text("#detail .state", "up")


def test_pause_and_go_on_and_what_waits(page: Page) -> None:
    page.open()
    page.press("#pause")
    page.browser.await_text("#notes", "the pilot is paused")
    task = page.shell("true", name="waits", priority=7)
    (row,) = page.browser.await_text("#queue tbody tr", "the pilot is paused")
    assert row.split()[:4] == ["1", "1c", "7", "default"] and task in row
    page.browser.await_text("#pause", "Go on")
    page.press("#pause")
    page.broker.wait([task], timeout=WAIT_S)
    page.browser.await_text("#queue .empty", "Nothing waits for its turn.")


def test_names_and_output_are_text(page: Page) -> None:
    task = page.shell(f'echo "{HOSTILE}" >&2; exit 5', name=HOSTILE)
    page.broker.wait([task], timeout=WAIT_S)
    page.open()
    page.browser.await_text("#failure-list .failure", HOSTILE)
    page.open(f"task/{task}")
    page.browser.await_text("#detail h2", HOSTILE)
    page.browser.await_text("#detail tbody tr", "exit code 5")
    page.browser.value("[...document.querySelectorAll('.tabs button')].at(-1).click()")
    page.browser.await_text("#output", HOSTILE)
    assert page.browser.value("document.images.length") == 0 and page.browser.value("document.title") != "taken"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 380])
def test_it_can_be_read_by_everybody(page: Page, scheme: str, width: int, held: str) -> None:
    failed = page.shell("echo words >&2; exit 9", name="for-readers")
    page.broker.wait([failed], timeout=WAIT_S)
    page.broker.close_nodes(["n2"], "drained", "for readers")
    page.browser.look(width, 900, scheme)
    try:
        for place, selector in (("", "#failure-list .failure"), (f"task/{failed}", "#detail tbody tr"),
                                ("node/n1", "#detail tbody tr"), ("find/nobody", "#detail p")):  # fmt: skip
            page.open(place)
            page.browser.await_value(f"Boolean(document.querySelector({json.dumps(selector)}))")
            assert page.browser.value(CHECK) == [], place
        page.open()
        page.browser.click("#stop")
        page.browser.await_value("document.getElementById('ask').open")
        assert page.browser.value(CHECK) == []
        page.browser.click("#ask-no")
    finally:
        page.browser.look(1200, 900)
        page.broker.open_nodes(["n2"])


def test_a_link_each_way(page: Page) -> None:
    page.open()
    page.browser.value("document.querySelector('header nav a').click()")
    page.browser.await_value("location.pathname.startsWith('/rq/') && Boolean(document.querySelector('a[href=\"/\"]'))")
    page.browser.value("document.querySelector('a[href=\"/\"]').click()")
    page.browser.await_value("document.documentElement?.dataset.shown")
    page.browser.errors[:] = [error for error in page.browser.errors if "favicon" not in error]


def test_stop_ends_the_pilot(tmp_path: Path) -> None:
    needed()
    with (
        in_background(tmp_path, "--nodes", "n1:1"),
        served(tmp_path, (tmp_path / ".pilotq" / "current").resolve()) as shown,
        browser(tmp_path, "pilotq", shown.password) as found,
    ):
        found.open(shown.url)
        found.await_value("document.documentElement?.dataset.shown")
        found.click("#stop")
        found.await_value("document.getElementById('ask').open")
        found.value("document.getElementById('ask-select').value = 'now'")
        found.click("#ask-yes")
        wait_until(lambda: shown.process.poll() is not None, seconds=WAIT_S, what="the dashboard has ended")
        found.await_text("#link", "no connection")


def test_a_large_pilot(tmp_path: Path) -> None:
    needed()
    with pretended_pilot(100, 42) as pilot:
        pilot.broker.enqueue(Task(command=["sleep", "600"], name="large", array=ArrayRange(0, 104_199)))
        wait_until(lambda: pilot.broker.running() == 4200, seconds=WAIT_S)
        with served(tmp_path, Path(pilot.directory)) as shown, browser(tmp_path, "pilotq", shown.password) as found:
            found.look(1200, 900)
            found.open(shown.url)
            wait_until(lambda: found.texts("#waiting") == ["100,000"], seconds=WAIT_S)
            assert found.texts("#running") == ["4,200"] and found.value("map.spots.length") == 100
            found.await_text("#queue tbody tr", "100,000 1c")
            found.await_text("#progress tbody tr", "104,200")
            found.value("document.getElementById('map').focus()")
            found.key("ArrowRight")
            found.await_text("#map-says", "42 of 42 cores in use")
            found.key("Enter")
            found.await_text("#detail tbody tr", "large")
            assert found.errors == []


def test_a_hidden_page_holds_no_connection(page: Page) -> None:
    task = page.shell(f"echo first-words; {HELD}")
    page.open(f"task/{task}")
    page.browser.await_text("#output", "first-words")
    turn = (
        "Object.defineProperty(document, 'hidden', {value: %s, configurable: true}),"
        "document.dispatchEvent(new Event('visibilitychange'))"
    )
    page.browser.value(turn % "true")
    assert page.browser.value("logs.readyState") == 2 and page.browser.value("source === null")
    page.browser.value(turn % "false")
    page.browser.await_value("logs.readyState === 1 && source.readyState === 1")
    page.browser.await_text("#output", "first-words")
    (page.folder / "go-on").touch()
    page.broker.wait([task], timeout=WAIT_S)
    (page.folder / "go-on").unlink()
