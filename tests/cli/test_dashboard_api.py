"""What the dashboard's page asks for and what its buttons send, without a browser."""

from __future__ import annotations

import http.client
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pilotq.broker import ArrayRange, Broker, Task
from pilotq.broker.client.overview import NodeOverview, Overview, Progress
from pilotq.broker.client.views import Counts
from pilotq.cli.dashboard.live import CHANGE_BYTES, Live, apply, change_between, state_of
from tests.support.command_line import Cli, in_background
from tests.support.dashboard import Served, needs_dashboard, served
from tests.support.waiting import wait_until

HELD = ["sh", "-c", "until test -e go-on; do sleep 0.02; done"]


class Rig(NamedTuple):
    cli: Cli
    page: Served
    broker: Broker
    folder: Path

    def press(self, button: str, **body: Any) -> tuple[int, Any]:
        request = self.page.request(
            f"api/{button}", method="POST", Origin=self.page.url.strip("/"), **{"Content-Type": "application/json"}
        )
        request.data = json.dumps(body).encode()
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    def get(self, path: str) -> tuple[int, Any]:
        status, text = self.page.ask(f"api/{path}")
        return status, json.loads(text)

    @contextmanager
    def events(self, path: str = "events") -> Iterator[Iterator[tuple[str, Any]]]:
        """The server-sent events of a page, until it is closed."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(self.page.request(f"api/{path}"), timeout=60) as answer:
            yield _events(answer)

    def until(self, is_so: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The state of a page that is opened now, once it is like that."""
        with self.events() as events:
            _, state = next(events)
            for _ in range(200):
                if is_so(state):
                    break
                apply(state, next(events)[1])
            else:
                raise AssertionError(f"the state did not become so: {state}")
            return dict(state)


def _events(answer: http.client.HTTPResponse) -> Iterator[tuple[str, Any]]:
    kind = ""
    for line in answer:
        if line.startswith(b"event: "):
            kind = line[7:].decode().strip()
        elif line.startswith(b"data: "):
            yield kind, json.loads(line[6:])


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    folder = tmp_path_factory.mktemp("dashboard")
    home = folder / ".pilotq" / "current"
    with (
        in_background(folder, "--nodes", "n1:2,n2:1") as cli,
        served(folder, home.resolve()) as page,
        Broker.connect(str(home)) as broker,
    ):
        yield Rig(cli, page, broker, folder)


@needs_dashboard
def test_the_state_says_what_the_command_says(rig: Rig) -> None:
    running = rig.broker.enqueue(Task(command=HELD, name="<b>held<b>", cwd=str(rig.folder)))
    rig.broker.enqueue_many([Task(command=["false"], name=f"bad-{n}") for n in range(3)])
    rig.broker.enqueue(Task(command=["true"], name="many", array=ArrayRange(0, 49)))
    state = rig.until(lambda s: s["pilot"]["left"] == 1 and len(s["executions"]) == 1 and bool(s["failures"]))
    said = json.loads(rig.cli("status", "--json").stdout)
    pilot = state["pilot"]
    assert {name: pilot[name] for name in said["tasks"]} == said["tasks"]
    assert (pilot["running"], pilot["cores"], pilot["used"]) == (said["running"], said["cores"], said["used"])
    assert sorted(state["nodes"]) == ["n1", "n2"] and state["nodes"]["n1"]["cores"] == "0-1"
    ((key, execution),) = state["executions"].items()
    assert key.startswith(f"{running}:") and execution["name"] == "<b>held<b>"
    (failure,) = (row for row in state["failures"].values() if row[2] == "bad-*")
    assert failure[:2] == ["exit", 1] and failure[4] == 3
    (array,) = (row for row in state["progress"].values() if row[0] == "many")
    assert array[2:8] == [50, 50, 0, 0, 0, 0]
    (rig.folder / "go-on").touch()
    rig.broker.wait(timeout=60)
    (rig.folder / "go-on").unlink()


@needs_dashboard
def test_a_task_with_all_that_is_known(rig: Rig) -> None:
    task = rig.broker.enqueue(
        Task(command=["sh", "-c", "echo out; echo no such file >&2; exit 4"], name="shown", retries=1)
    )
    rig.broker.wait([task], timeout=60)
    wait_until(lambda: len(rig.get(f"task/{task}")[1]["executions"]) == 2, seconds=60)
    _, found = rig.get(f"task/{task}")
    assert found["task"]["status"] == "failed" and found["task"]["stderr_tail"] == "no such file\n"
    assert [one["exit_code"] for one in found["executions"]] == [4, 4]
    assert "exit code" in found["explain"]["why"][0]
    assert rig.get(f"search?q={task}")[1]["found"][0][:3] == [task, "shown", "failed"]
    assert rig.get("search?q=shown")[1]["found"][0][0] == task
    assert rig.get("search?q=nobody") == (200, {"found": [], "more": 0})
    assert rig.get("search?q=")[0] == 400
    assert rig.get("task/zzz")[0] == 404 and "no task" in rig.get("task/zzz")[1]["error"]
    with rig.events(f"logs/{task}/stderr") as events:
        assert list(events) == [("text", "no such file\n"), ("end", {})]


@needs_dashboard
def test_output_while_it_is_written(rig: Rig) -> None:
    code = "head -c 200000 /dev/zero | tr '\\0' a; echo; until test -e go-on; do sleep 0.02; done; echo second"
    task = rig.broker.enqueue(Task(command=["sh", "-c", code], cwd=str(rig.folder)))
    wait_until(lambda: rig.broker.task(task).cores, seconds=60)
    with rig.events(f"logs/{task}/stdout") as events:
        kind, text = next(events)
        assert kind == "text" and len(text) <= 64 << 10, "of a large output only the end"
        (rig.folder / "go-on").touch()
        rest = list(events)
    assert "".join(text for kind, text in rest if kind == "text").endswith("second\n") and rest[-1] == ("end", {})
    (rig.folder / "go-on").unlink()


@needs_dashboard
def test_every_button_does_what_its_command_does(rig: Rig) -> None:
    assert rig.press("pause", paused=True)[0] == 200
    waits = rig.broker.enqueue(Task(command=["true"], name="waits"))
    assert rig.until(lambda s: s["pilot"]["paused"] and bool(s["queue"]))["queue"]
    assert rig.press("cancel", ids=[waits]) == (200, {"said": [f"{waits} canceled"]})
    assert rig.broker.task(waits).status == "canceled"
    assert rig.press("retry", ids=[waits]) == (200, {"said": [f"{waits} runs again"]})
    assert rig.press("drain", nodes=["n2"], reason="slow disk") == (
        200, {"said": ["n2 gets nothing new; what runs there goes on"]}
    )  # fmt: skip
    state = rig.until(lambda s: s["nodes"]["n2"]["state"] == "drained")
    assert state["nodes"]["n2"]["why"] == "slow disk"
    assert rig.press("resume", nodes=["n2"])[0] == 200 and not rig.broker.closed_nodes()
    assert rig.press("pause", paused=False)[0] == 200
    rig.broker.wait([waits], timeout=60)
    assert rig.broker.task(waits).status == "finished"
    refused = [
        ("cancel", {}), ("cancel", {"ids": [1]}), ("retry", {"ids": []}), ("retry", {"failure": "x"}),
        ("drain", {"nodes": ["n9"]}), ("resume", {"nodes": ["n1"]}), ("pause", {"paused": "yes"}),
        ("stop", {"mode": "walltime"}), ("cancel", {"ids": [waits, "\ud800"]}), ("retry", {"ids": ["\udcff"]}),
        ("drain", {"nodes": ["n1"], "reason": "\ud83d"}),
    ]  # fmt: skip
    assert [rig.press(button, **body)[0] for button, body in refused] == [400] * len(refused)
    assert "half of a character" in rig.press("cancel", ids=["\ud800"])[1]["error"]
    assert not rig.broker.closed_nodes()


@needs_dashboard
def test_a_group_of_failures_runs_again(rig: Rig) -> None:
    code = ["sh", "-c", "test -e mended"]
    tasks = rig.broker.enqueue_many([Task(command=code, name=f"mend-{n}", cwd=str(rig.folder)) for n in range(3)])
    state = rig.until(lambda s: sum(row[4] for row in s["failures"].values() if row[2] == "mend-*") == 3)
    (rig.folder / "mended").touch()
    for key in [key for key, row in state["failures"].items() if row[2] == "mend-*"]:
        assert rig.press("retry", failure=key)[0] == 200
    rig.broker.wait(tasks, timeout=60)
    assert {rig.broker.task(task).status for task in tasks} == {"finished"}
    rig.until(lambda s: not [row for row in s["failures"].values() if row[2] == "mend-*"])


def test_a_change_is_small_and_what_is_left_follows() -> None:
    def overview(used: int) -> Overview:
        nodes = [NodeOverview(name=f"node{n}", state="up", why="x" * 60, cores=[0, 1], used=used) for n in range(1000)]
        return Overview(at=1.0, counts=Counts(), nodes=nodes, cores=2000)

    page, wanted = state_of(overview(0)), state_of(overview(1))
    changes = 0
    while page != wanted:
        change = change_between(page, wanted)
        assert len(json.dumps(change, separators=(",", ":"))) <= CHANGE_BYTES
        apply(page, change)
        changes += 1
    assert 2 < changes < 20


def test_what_is_gone_goes_from_the_page() -> None:
    first = Overview(at=1.0, counts=Counts(), nodes=[NodeOverview(name=name, state="up") for name in ("a", "b")])
    second = Overview(at=2.0, counts=Counts(), nodes=[NodeOverview(name="b", state="lost")])
    page, wanted = state_of(first), state_of(second)
    change = change_between(page, wanted)
    assert change["nodes"]["a"] is None
    apply(page, change)
    assert page == wanted


def test_no_row_waits_for_ever_while_all_change() -> None:
    def overview(used: int) -> Overview:
        nodes = [NodeOverview(name=f"node{n}", state="up", why="x" * 60, cores=[0], used=used) for n in range(500)]
        progress = [Progress(name=f"array{n}", array=str(n), total=used, finished=used, rate=1.0) for n in range(500)]
        return Overview(at=1.0, counts=Counts(), nodes=nodes, progress=progress, cores=2000)

    page = state_of(overview(0))
    new = {section: set(page[section]) for section in ("nodes", "progress")}
    for used in range(1, 1000):
        change = change_between(page, state_of(overview(used)))
        assert len(json.dumps(change, separators=(",", ":"))) <= CHANGE_BYTES
        apply(page, change)
        new = {section: keys - set(change[section]) for section, keys in new.items()}
        if not any(new.values()):
            break
    assert not any(new.values()), "rows that were never sent"


def test_a_row_that_is_too_large_stops_no_other() -> None:
    def overview(used: int) -> Overview:
        large = NodeOverview(name="a" * (CHANGE_BYTES + 1), state="up", cores=[0], used=used)
        small = NodeOverview(name="b", state="up", why="y" * 5000, cores=[0], used=used)
        return Overview(at=1.0, counts=Counts(), nodes=[large, small], cores=2)

    wanted = state_of(overview(1))
    assert len(wanted["nodes"]["b"]["why"]) == 300
    assert change_between(state_of(overview(0)), wanted)["nodes"] == {"b": wanted["nodes"]["b"]}


def test_a_page_that_was_opened_before_the_first_reading_gets_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pilotq.cli.dashboard.live.SILENCE_S", 0.01)
    live = Live("/nowhere")
    events = live.events()
    assert next(events) == b"event: state\ndata: {}\n\n"
    live._publish(Overview(at=1.0, counts=Counts()))
    assert next(events).startswith(b'event: state\ndata: {"pilot":')
    assert next(events) == b": still there\n\n"


def test_a_page_too_many_holds_no_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pilotq.cli.dashboard.live.PAGES_MAX", 0)
    live = Live("/nowhere")
    events = live.events()
    assert next(events).startswith(b"event: full")
    publishing = threading.Thread(target=live._publish, args=(Overview(at=1.0, counts=Counts()),), daemon=True)
    publishing.start()
    publishing.join(20)
    assert live.state and list(events) == []


@needs_dashboard
def test_files_that_cannot_be_read_are_a_sentence(tmp_path: Path) -> None:
    import flask

    from pilotq.cli.dashboard.api import _answer
    from pilotq.cli.dashboard.app import _metrics

    class Unreadable:
        def text(self) -> str:
            return tmp_path.read_text()  # of a folder

    with flask.Flask("test").test_request_context():
        for answer in (_answer(Unreadable().text)(), _metrics(Unreadable())()):  # type: ignore[arg-type]
            assert answer.status_code == 503
            assert "the pilot's files cannot be read: " in answer.get_data(as_text=True)
