"""A node on which everything fails at once: it is quarantined, its tasks run elsewhere, and repaired it comes back."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from pilotq.broker import ArrayRange, Request, Task
from pilotq.broker.store import keys
from pilotq.broker.store.journal import Journal, JournalEntry
from pilotq.workers.process_tree import processes
from tests.support.live_pilot import LivePilot, live_pilot
from tests.support.waiting import wait_until

QUICK = {"quarantine_local_nodes": 1, "probe_after_s": 0.3, "probe_after_max_s": 1.0, "reconcile_s": 0.2}
LATER = {"quarantine_local_nodes": 1, "probe_after_s": 600.0, "reconcile_s": 0.2}


def broken(folder: Path, node: str = "n1") -> Path:
    """A node is broken as long as this file is there."""
    mark = folder / f"broken.{node}"
    mark.touch()
    return mark


def work(folder: Path, seconds: float = 0.03) -> str:
    """A script that fails at once on a node that is broken."""
    return f'if [ -e {folder}/broken.$PILOTQ_NODELIST ]; then echo "no /scratch here" >&2; exit 3; fi; sleep {seconds}'


def lines(pilot: LivePilot) -> list[JournalEntry]:
    return [line for line in Journal(pilot.pilot.journal).entries() if not line.elements]


def states(pilot: LivePilot) -> dict[str, str]:
    return {node.name: node.state for node in pilot.broker.nodes()}


def why(pilot: LivePilot, node: str = "n1") -> str:
    return next(n.why for n in pilot.broker.nodes() if n.name == node)


def state(pilot: LivePilot, wanted: str, node: str = "n1") -> Callable[[], bool]:
    return lambda: states(pilot)[node] == wanted


def said(pilot: LivePilot) -> str:
    return Path(pilot.pilot.log("dispatcher")).read_text()


def test_a_broken_node_is_quarantined_and_its_tasks_run_elsewhere(tmp_path: Path) -> None:
    broken(tmp_path)
    with live_pilot(tmp_path, "n1:2,n2:2", **LATER) as pilot:
        array = pilot.broker.enqueue(Task(script=work(tmp_path), array=ArrayRange(0, 199)))
        view = pilot.ended(array)
        assert states(pilot) == {"n1": "quarantined", "n2": "up"}
        blamed = [line for line in lines(pilot) if line.final and line.status != "finished"]
        assert len(blamed) <= 2, f"of the first two nobody can know: {view.elements}"
        assert "tasks in a row failed at once" in why(pilot)
        assert "(3): no /scratch here" in why(pilot) and "one task to try after" in why(pilot)
        assert b"n1 is quarantined: " in pilot.cli("nodes").stdout
        assert "node n1 is quarantined" in said(pilot)
        excused = [line for line in lines(pilot) if not line.final]
        assert excused and {(line.reason, line.node) for line in excused} == {("node", "n1")}
        assert max(Counter(line.id for line in lines(pilot)).values()) <= 10


def test_a_node_that_was_mended_comes_back_by_itself(tmp_path: Path) -> None:
    mark = broken(tmp_path)
    with live_pilot(tmp_path, "n1:2,n2:2", **QUICK) as pilot:
        array = pilot.broker.enqueue(Task(script=work(tmp_path, 0.2), array=ArrayRange(0, 79)))
        wait_until(state(pilot, "quarantined"), what="n1 is quarantined")
        wait_until(lambda: said(pilot).count("node n1 is quarantined") > 1, what="a probe that fails")
        mark.unlink()
        wait_until(state(pilot, "up"), what="n1 is used again")
        pilot.ended(array)
        assert "node n1 is used again: a task ran there" in said(pilot)
        assert {line.node for line in lines(pilot) if line.status == "finished"} == {"n1", "n2"}
        assert sum(line.final and line.status == "failed" for line in lines(pilot)) <= 2
        pilot.assert_calm()


def test_a_task_that_lives_brings_it_back_as_well(tmp_path: Path) -> None:
    mark = broken(tmp_path)
    with live_pilot(tmp_path, "n1:2,n2:2", quick_failure_s=1.0, **QUICK) as pilot:
        pilot.broker.enqueue(Task(script=work(tmp_path), array=ArrayRange(0, 39)))
        wait_until(state(pilot, "quarantined"), what="n1 is quarantined")
        mark.unlink()
        pilot.broker.enqueue(Task(command=["sleep", "600"], array=ArrayRange(0, 3)))
        wait_until(state(pilot, "up"), what="n1 is used again")
        assert "node n1 is used again: a task " in said(pilot)


def test_tasks_that_fail_everywhere_quarantine_no_node(tmp_path: Path) -> None:
    with live_pilot(tmp_path, "n1:2,n2:2,n3:1", **LATER) as pilot:
        array = pilot.broker.enqueue(Task(command=["false"], array=ArrayRange(0, 399)))
        assert pilot.ended(array).elements == {"failed": "0-399"}
        assert states(pilot) == {"n1": "up", "n2": "up", "n3": "up"}
        assert "quarantined" not in said(pilot)
        assert len(lines(pilot)) < 800 and max(Counter(line.id for line in lines(pilot)).values()) <= 10
        pilot.assert_calm()


def test_a_single_node_is_never_quarantined_and_nothing_runs_twice(tmp_path: Path) -> None:
    broken(tmp_path)
    with live_pilot(tmp_path, "n1:2", **LATER) as pilot:
        array = pilot.broker.enqueue(Task(script=work(tmp_path), array=ArrayRange(0, 49)))
        assert pilot.ended(array).elements == {"failed": "0-49"}
        assert states(pilot) == {"n1": "up"}
        assert {(line.execution, line.final) for line in lines(pilot)} == {(1, True)}


def test_its_user_takes_it_back_at_once(tmp_path: Path) -> None:
    mark = broken(tmp_path)
    with live_pilot(tmp_path, "n1:2,n2:2", **LATER) as pilot:
        pilot.ended(pilot.broker.enqueue(Task(script=work(tmp_path), array=ArrayRange(0, 99))))
        assert states(pilot)["n1"] == "quarantined"
        waits = pilot.enqueue("true", request=Request(nodes=(2, 2)))
        wait_until(lambda: b"node n1 gets nothing new: it is quarantined (" in pilot.cli("explain", waits).stdout)
        mark.unlink()
        assert pilot.cli("nodes", "resume", "n1").returncode == 0
        assert states(pilot)["n1"] == "up"
        assert pilot.ended(waits).status == "finished"
        pilot.assert_calm()


def test_nodes_made_of_one_machine_are_never_suspected(tmp_path: Path) -> None:
    """What fails there fails once, and its failure counts."""
    with live_pilot(tmp_path, "n1:2,n2:2") as pilot:
        array = pilot.broker.enqueue(Task(script="exit 7", array=ArrayRange(0, 59)))
        assert pilot.ended(array).elements == {"failed": "0-59"}
        assert states(pilot) == {"n1": "up", "n2": "up"}
        assert Counter(line.execution for line in lines(pilot)) == {1: 60}


def test_it_stays_quarantined_when_the_dispatcher_is_started_again(tmp_path: Path) -> None:
    mark = broken(tmp_path)
    with live_pilot(tmp_path, "n1:2,n2:2", **{**QUICK, "probe_after_s": 2.0, "probe_after_max_s": 2.0}) as pilot:
        array = pilot.broker.enqueue(Task(script=work(tmp_path), array=ArrayRange(0, 399)))
        wait_until(state(pilot, "quarantined"), what="n1 is quarantined")
        pilot.ended(array)
        term = pilot.broker.link.call("GET", keys.TERM)
        dispatcher = [p.pid for p in processes().values() if _is_dispatcher(p.pid, pilot.pilot.directory)]
        os.kill(dispatcher[0], signal.SIGKILL)
        wait_until(lambda: pilot.broker.link.call("GET", keys.TERM) != term, what="a new dispatcher")
        assert states(pilot)["n1"] == "quarantined"
        mark.unlink()
        pilot.broker.enqueue(Task(script=work(tmp_path), array=ArrayRange(0, 399)))
        wait_until(state(pilot, "up"), what="n1 is used again")


def _is_dispatcher(pid: int, directory: str) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"dispatcher" in words and os.fsencode(directory) in words


@pytest.mark.parametrize("retries", [0, 2])
def test_what_fails_by_itself_is_failed_once_it_failed_elsewhere(tmp_path: Path, retries: int) -> None:
    """Many failures in one array: their ends on other nodes clear the node, and they end as they would have."""
    script = "if [ $PILOTQ_INDEX -lt 60 ]; then exit 7; fi; sleep 0.02"
    with live_pilot(tmp_path, "n1:2,n2:2", **LATER) as pilot:
        array = pilot.broker.enqueue(Task(script=script, array=ArrayRange(0, 119), retries=retries))
        assert pilot.ended(array).elements == {"finished": "60-119", "failed": "0-59"}
        assert states(pilot) == {"n1": "up", "n2": "up"}
        charged = Counter(line.id for line in lines(pilot) if line.reason == "exit")
        assert set(charged.values()) == {retries + 1}
