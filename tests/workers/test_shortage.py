"""A passing shortage at a launch holds the task back: it is tried again, within a bound."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path

import pytest

from tests.support.live_pilot import live_pilot
from tests.support.waiting import wait_until
from tests.support.worker_host import Host

pytestmark = pytest.mark.usefixtures("each_launcher")


def test_tasks_are_held_back_until_the_shortage_is_over(tmp_path: Path) -> None:
    """None of a class that a launcher chains fails while there are no descriptors, and each runs once."""
    with Host(tmp_path, prefetch_after=1, chain_s=3600.0, heartbeat_s=0.05) as host:
        host.run("warm", "true", slot=1)
        host.end_of("warm")
        (launcher,) = host.launchers()
        _, hard = resource.prlimit(launcher, resource.RLIMIT_NOFILE)
        resource.prlimit(launcher, resource.RLIMIT_NOFILE, (3, hard))
        names = [f"t{number}" for number in range(8)]
        for number, name in enumerate(names):
            host.run(name, "sh", "-c", f"echo {name} >> ran", slot=2 if number == 0 else 0, stdout="out")
        host.run("function", "true", slot=3, allocation="n1[1]", class_name="other", flags=32)
        host.until(lambda: any("open files" in beat["pq_shortage"] for (beat,) in host.reported("heartbeat")))
        assert not host.endings.keys() & set(names)
        resource.prlimit(launcher, resource.RLIMIT_NOFILE, (hard, hard))
        assert {host.end_of(name).report.outcome for name in names} == {"finished"}
        assert host.end_of("function").report.reason == "exception"  # its payload is none: it was tried
        assert sorted((tmp_path / "ran").read_text().split()) == names
        host.until(lambda: host.reported("heartbeat")[-1][0]["pq_shortage"] == "")


@pytest.mark.parametrize("end", ["bound", "cancel"])
def test_a_shortage_is_not_waited_out_for_ever(tmp_path: Path, end: str) -> None:
    """A program that is being written cannot be executed until it is closed."""
    program = tmp_path / "program"
    shutil.copy(shutil.which("true") or "", program)
    with Host(tmp_path, shortage_s=0.7 if end == "bound" else 60.0, heartbeat_s=0.05) as host, open(program, "ab"):
        host.run("busy", str(program), slot=1)
        host.run("beside", "true", slot=2, allocation="n1[1]", class_name="other")
        assert host.end_of("beside").report.outcome == "finished"
        host.until(lambda: any("busy" in beat["pq_shortage"] for (beat,) in host.reported("heartbeat")))
        if end == "cancel":
            host.stop("busy")
        ending = host.end_of("busy")
    if end == "bound":
        assert (ending.report.outcome, ending.report.reason) == ("failed", "launch")
        assert "was tried again for" in ending.entry.message
    else:
        assert ending.report.outcome == "canceled"


def test_explain_says_what_a_task_is_held_back_by(tmp_path: Path) -> None:
    program = tmp_path / "program"
    shutil.copy(shutil.which("true") or "", program)
    with live_pilot(tmp_path, "n1:1") as live:
        with open(program, "ab"):
            task = live.enqueue(str(program))
            wait_until(lambda: "tried again" in "".join(live.broker.explain(task).why), what="explain")
        assert live.ended(task).status == "finished"
