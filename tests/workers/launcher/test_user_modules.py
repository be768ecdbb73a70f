"""Code of the user that is edited while a pilot runs, on a real one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pilotq.broker import Request, Task
from tests.support.live_pilot import LivePilot, live_pilot
from tests.support.waiting import wait_until


@pytest.fixture(scope="module")
def pilot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LivePilot]:
    with live_pilot(tmp_path_factory.mktemp("user_modules"), "n1:2") as live:
        yield live


def call(pilot: LivePilot, function: Any, **fields: Any) -> Any:
    return pilot.broker.result(pilot.broker.enqueue(Task(function=function, **fields)), timeout=60)


@pytest.fixture
def edited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the user with a module that uses another one; it is the current directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep.py").write_text("VALUE = 1\n")
    (tmp_path / "top.py").write_text(
        "import os, deep\nCALLS = []\n"
        "def f(): CALLS.append(1); return deep.VALUE, len(CALLS)\n"
        "def pid(): return os.getpid()\n"
        "def ask(path): return open(path).read()\n"
    )
    for path in tmp_path.iterdir():
        os.utime(path, (path.stat().st_mtime - 1,) * 2)
    return tmp_path


def test_an_edited_file_is_imported_anew(pilot: LivePilot, edited: Path) -> None:
    """Edited however quickly: Python's own bytecode knows whole seconds. What has not changed stays."""
    whole = Request(cores=(2, 2))
    assert call(pilot, "top:f", request=whole) == (1, 1)
    pid = call(pilot, "top:pid", request=whole)
    assert call(pilot, "top:f", request=whole) == (1, 2)
    for value in range(2, 6):
        (edited / "deep.py").write_text(f"VALUE = {value}\n")
        assert call(pilot, "top:f", request=whole) == (value, 1)
    assert call(pilot, "top:f", request=whole) == (5, 2)
    assert call(pilot, "top:pid", request=whole) == pid  # the process began anew in its place
    (edited / "new.py").write_text("VALUE = 6\n")
    os.replace(edited / "new.py", edited / "deep.py")
    many = pilot.broker.enqueue_many([Task(function="top:f") for _ in range(40)])
    assert {pilot.broker.result(task, timeout=60)[0] for task in many} == {6}
    pilot.assert_calm()


def test_a_file_that_changed_while_a_call_ran_is_imported_anew(pilot: LivePilot, edited: Path) -> None:
    os.mkfifo(edited / "fifo")
    whole = Request(cores=(2, 2))
    runs = pilot.broker.enqueue(Task(function="top:ask", args=(str(edited / "fifo"),), request=whole))
    with open(edited / "fifo", "w") as fifo:  # it has imported by now
        (edited / "deep.py").write_text("VALUE = 7\n")
        fifo.write("go on")
    assert pilot.broker.result(runs, timeout=60) == "go on"
    assert call(pilot, "top:f", request=whole) == (7, 1)


def test_a_retry_runs_the_code_that_was_mended(pilot: LivePilot, edited: Path) -> None:
    good = (edited / "deep.py").read_text()
    (edited / "deep.py").write_text("VALUE = None.x\n")
    task = pilot.broker.enqueue(Task(function="top:f"))
    with pytest.raises(AttributeError):
        pilot.broker.result(task, timeout=60)
    (edited / "deep.py").write_text(good)
    assert pilot.broker.retry([task]) == {task: "queued"}
    assert pilot.broker.result(task, timeout=60)[0] == 1


def test_a_call_can_be_canceled_while_its_interpreter_begins_anew(pilot: LivePilot, edited: Path) -> None:
    whole = Request(cores=(2, 2))
    assert call(pilot, "top:f", request=whole) == (1, 1)
    (edited / "deep.py").write_text(
        f"import os\nos.chdir({str(edited)!r})\nopen('mark', 'w').close()\nopen('fifo').read()\nVALUE = 8\n"
    )
    os.mkfifo(edited / "fifo")
    task = pilot.broker.enqueue(Task(function="top:f", request=whole))
    wait_until((edited / "mark").exists, what="import")
    pilot.broker.cancel([task])
    assert pilot.ended(task).status == "canceled"
    (edited / "deep.py").write_text("VALUE = 9\n")
    assert call(pilot, "top:f", request=whole)[0] == 9
    pilot.assert_calm()
