"""Executions over several nodes of a real pilot: launch agents, sweep and confirmation, lost nodes, quarantine."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pilotq.broker import Request
from pilotq.broker.slurm.step_environment import ENV_SCHEMA
from pilotq.workers.process_tree import environment, processes
from tests.support.live_pilot import LivePilot, live_pilot, worker_of
from tests.support.waiting import wait_until

TWO = Request(nodes=(2, 2), cores=(1, 1))
# What launchers find in their environment: in front of a node and a command it works as ssh does.
AGENT = "$HYDRA_LAUNCHER_EXEC"


@pytest.fixture(scope="module")
def pilot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LivePilot]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ENV_SCHEMA, "slurm")
        with live_pilot(tmp_path_factory.mktemp("multinode"), nodes="n1:1,n2:1") as found:
            yield found


def processes_on(task_id: str, node: str) -> list[int]:
    """Process ids of a task that live on a node."""
    marks = f"\0PILOTQ_TASK_ID={task_id}\0".encode(), f"\0PILOTQ_NODE={node}\0".encode()
    return [p.pid for p in processes().values() if p.alive and all(mark in environment(p.pid) for mark in marks)]


def test_an_agent_starts_commands_on_the_nodes_of_its_task(pilot: LivePilot) -> None:
    remote = "echo on $PILOTQ_NODE core $PILOTQ_CPUS of $PILOTQ_TASK_ID; grep Cpus_allowed_list /proc/self/status"
    script = f"for node in n1 n2; do {AGENT} -x -q user@$node '{remote}; echo bad >&2; exit 3'; echo code $?; done"
    task = pilot.enqueue(script=script, request=TWO)
    assert pilot.ended(task).status == "finished"
    usable = sorted(os.sched_getaffinity(0))
    cpus = {"n1": usable[0], "n2": usable[1 % len(usable)]}
    lines = pilot.output(task).decode().splitlines()
    for number, node in enumerate(("n1", "n2")):
        on, allowed, code = lines[3 * number : 3 * number + 3]
        assert (on, code) == (f"on {node} core 0 of {task}", "code 3")
        assert allowed.split() == ["Cpus_allowed_list:", str(cpus[node])]
    assert pilot.output(task, "stderr").decode().count("bad\n") == 2


def test_what_a_task_finds_of_its_nodes(pilot: LivePilot) -> None:
    script = (
        "cat $PILOTQ_HOSTFILE $SLURM_HOSTFILE $OMPI_MCA_orte_default_hostfile $HYDRA_HOST_FILE; "
        "echo $PILOTQ_NODELIST $PILOTQ_NODES $PILOTQ_CORES $QCG_PM_NODELIST $QCG_PM_TASKS_PER_NODE $SLURM_NODELIST; "
        "echo $QCG_PM_CPU_SET; echo $PILOTQ_HOSTFILE"
    )
    task = pilot.enqueue(script=script, request=TWO)
    assert pilot.ended(task).status == "finished"
    *lines, path = pilot.output(task).decode().splitlines()
    assert lines == [
        "n1", "n2", "n1", "n2", "n1 slots=1", "n2 slots=1", "n1:1", "n2:1", "n1,n2 2 2 n1,n2 1,1 n1,n2", "0,0",
    ]  # fmt: skip
    assert not Path(path).exists()  # it goes with the execution


def test_what_is_left_on_another_node_is_gone_when_the_task_has_ended(pilot: LivePilot) -> None:
    # The first stays behind quietly, the second hides from its session and its parents, and is deaf to SIGTERM.
    quiet = "sleep 1000 >/dev/null 2>&1 &"
    hidden = 'setsid bash -c "trap : TERM; while :; do sleep 100; done" >/dev/null 2>&1 & echo $!'
    task = pilot.enqueue(script=f"{AGENT} n2 '{quiet}'; {AGENT} n2 '{hidden}'", request=TWO)
    assert pilot.ended(task).status == "finished"
    assert pilot.output(task).decode().strip().isdigit()
    assert processes_on(task, "n2") == []
    pilot.assert_calm()


@pytest.mark.parametrize("how", ["cancel", "time limit"])
def test_an_end_from_outside_reaches_all_nodes(pilot: LivePilot, how: str) -> None:
    deaf = "trap : TERM; while :; do sleep 100; done"
    limit = 0.5 if how == "time limit" else None
    task = pilot.enqueue(script=f"{AGENT} n2 bash -c '\"{deaf}\"'", request=TWO, time_limit=limit)
    if how == "cancel":
        wait_until(lambda: processes_on(task, "n2"), what="a process on n2")
        pilot.broker.cancel([task])
    ended = pilot.ended(task)
    assert (ended.status, ended.reason) == (("canceled", "canceled") if how == "cancel" else ("failed", "time limit"))
    assert processes_on(task, "n2") == []
    pilot.assert_calm()


def test_what_an_agent_is_refused(pilot: LivePilot) -> None:
    alone = pilot.enqueue(script=f"{sys.executable} -m pilotq.workers.multinode.agent n1 true; echo $?")
    assert pilot.ended(alone).status == "finished"
    assert pilot.output(alone) == b"255\n"
    assert b"the first node of a task that has several nodes" in pilot.output(alone, "stderr")
    task = pilot.enqueue(script=f"{AGENT} n7 true; echo $?; {AGENT} n2; echo $?", request=TWO)
    assert pilot.ended(task).status == "finished"
    assert pilot.output(task) == b"255\n255\n"
    stderr = pilot.output(task, "stderr").decode()
    assert "node n7 is none of this task's, which are n1, n2" in stderr
    assert "give a node and a command" in stderr


def test_slots_over_several_nodes_go_from_task_to_task(pilot: LivePilot, tmp_path: Path) -> None:
    """Between two of them all nodes have been swept: a task never meets the last one's leftovers."""
    remote = "[ -e last ] && kill -0 $(cat last) && echo met; sleep 1000 & echo $! > last"
    tasks = [pilot.enqueue(script=f"{AGENT} n2 '{remote}'", request=TWO, cwd=str(tmp_path)) for _ in range(8)]
    for task in tasks:
        assert pilot.ended(task).status == "finished"
        assert pilot.output(task) == b""
    pilot.assert_calm()


def test_a_lost_node_ends_the_task_which_runs_again(tmp_path: Path) -> None:
    script = (
        f"if [ $PILOTQ_EXECUTION = 1 ]; then {AGENT} n2 'echo > {tmp_path}/there; exec sleep 1000'; exit 7; fi; "
        f"{AGENT} n2 'echo again'"
    )
    with live_pilot(tmp_path, nodes="n1:1,n2:1") as pilot:
        task = pilot.enqueue(script=script, request=TWO)
        wait_until((tmp_path / "there").exists, what="a process on n2")
        os.kill(worker_of(pilot, "n2"), signal.SIGKILL)
        assert pilot.ended(task).status == "finished"
        assert pilot.output(task) == b"again\n"
        last, first = pilot.lines(task)
        assert (first.execution, first.status, first.reason, first.final) == (1, "failed", "worker lost", False)
        assert last.execution == 2
        pilot.assert_calm()


def test_a_lost_first_node_gives_back_the_others(tmp_path: Path) -> None:
    script = f"[ $PILOTQ_EXECUTION = 1 ] || exit 0; {AGENT} n2 'echo > {tmp_path}/there; exec sleep 1000'"
    with live_pilot(tmp_path, nodes="n1:1,n2:1") as pilot:
        task = pilot.enqueue(script=script, request=TWO)
        wait_until((tmp_path / "there").exists, what="a process on n2")
        os.kill(worker_of(pilot, "n1"), signal.SIGKILL)
        assert pilot.ended(task).status == "finished"
        assert [line.execution for line in pilot.lines(task)] == [2, 1]
        pilot.assert_calm()


def test_a_node_that_does_not_confirm_keeps_its_cores_until_it_does(tmp_path: Path) -> None:
    with live_pilot(tmp_path, nodes="n1:1,n2:1", sweep_confirm_s=0.5) as pilot:
        task = pilot.enqueue(script=f"{AGENT} n2 true; touch there; read line < fifo", request=TWO, cwd=str(tmp_path))
        os.mkfifo(tmp_path / "fifo")
        wait_until((tmp_path / "there").exists, what="the task")
        worker = worker_of(pilot, "n2")
        os.kill(worker, signal.SIGSTOP)
        try:
            (tmp_path / "fifo").write_text("go on\n")
            assert pilot.ended(task).status == "finished"
            assert "n2[0] stays reserved" in pilot.lines(task)[0].message
            wait_until(lambda: [n.used for n in pilot.broker.nodes()] == [0, 1], what="only n2's core in use")
            one = pilot.enqueue(script="echo $PILOTQ_NODELIST")
            pilot.ended(one)
            assert pilot.output(one) == b"n1\n"
        finally:
            os.kill(worker, signal.SIGCONT)
        wait_until(lambda: [n.used for n in pilot.broker.nodes()] == [0, 0], what="no core in use")
        pilot.assert_calm()


def test_the_pilot_ends_under_tasks_over_several_nodes(tmp_path: Path) -> None:
    """Workers leave in any order; `live_pilot` checks whether all ended well, and whether anything is left."""
    with live_pilot(tmp_path, nodes="n1:2,n2:2") as pilot:
        tasks = [pilot.enqueue(script=f"{AGENT} n2 'trap : TERM; sleep 1000'", request=TWO) for _ in range(2)]
        wait_until(lambda: all(processes_on(task, "n2") for task in tasks), what="processes on n2")


def test_a_node_that_leaves_costs_the_task_nothing(tmp_path: Path) -> None:
    """It has deregistered: the task begins again, and its crash limit is not charged."""
    with live_pilot(tmp_path, nodes="n1:1,n2:1", crash_limit=1) as pilot:
        task = pilot.enqueue(script=f"[ $PILOTQ_EXECUTION = 2 ] || exec sleep 1000; {AGENT} n2 echo again", request=TWO)
        wait_until(pilot.of_tasks, what="the task")
        os.kill(worker_of(pilot, "n2"), signal.SIGTERM)
        assert pilot.ended(task).status == "finished"
        assert pilot.output(task) == b"again\n"
        assert [(line.reason, line.final) for line in pilot.lines(task)] == [("", True), ("worker lost", False)]


def test_each_node_of_a_task_has_its_part_of_memory(pilot: LivePilot) -> None:
    """What is above the limit on another node ends the task; the peak is that of the node that has used most."""
    mb = 1 << 20
    use = "kept = bytearray({} << 20); kept[::4096] = kept[1::4096]; import time; time.sleep({})"
    request = Request(nodes=(2, 2), cores=(1, 1), memory=150 * mb)

    def script(here: int, there: int, seconds: int) -> str:
        run = f"{sys.executable} -I -S -c"
        remote = f"{run} '{use.format(there, seconds)}'"
        return f"{run} '{use.format(here, 1)}' & {AGENT} n2 \"{remote}\"; wait"

    fits = pilot.enqueue(script=script(60, 110, 2), request=request)
    assert pilot.ended(fits).status == "finished"
    peak = pilot.lines(fits)[0].max_rss
    assert peak is not None and 110 * mb < peak < 150 * mb
    much = pilot.enqueue(script=script(60, 400, 60), request=request)
    assert pilot.ended(much).reason == "memory"
    assert pilot.lines(much)[0].message.endswith(" of 150 MiB on n2: its worker has killed it.")
    assert processes_on(much, "n2") == []
