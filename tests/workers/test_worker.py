"""A worker process with real launchers and real tasks; the test plays dispatcher and server."""

from __future__ import annotations

import base64
import os
import signal
import zlib
from pathlib import Path

import pytest

from pilotq.broker.store.messages import Leave, Reopen, RetractTasks, StateRequest
from tests.support.dead_mount import dead_mount
from tests.support.launcher_driver import hanging_program
from tests.support.waiting import wait_until
from tests.support.worker_host import Host, alive, children

pytestmark = pytest.mark.usefixtures("each_launcher")

# Writes its number to a file in the pilot directory and waits to be ended; "deaf" ones have to be killed.
WAITER = "echo $$ > $PILOTQ_DIR/$PILOTQ_TASK_ID.pid; while :; do read -t 100 < <(:) ; sleep 100; done"
DEAF = "trap : TERM; echo $$ > $PILOTQ_DIR/$PILOTQ_TASK_ID.pid; while :; do sleep 100; done"


def pid_of(host: Host, task_id: str) -> int:
    """Number of a WAITER or DEAF, as soon as it has written it."""
    path = host.directory / f"{task_id}.pid"
    return int(host.until(lambda: path.exists() and path.read_text().strip(), f"pid of {task_id}"))


# -- slots and reports ------------------------------------------------------------------------------------------------


def test_a_slot_goes_from_task_to_task_of_its_class(tmp_path: Path) -> None:
    with Host(tmp_path) as host:
        for name in ("b", "c"):
            host.run(name, "sh", "-c", f"echo {name} >> order")
        host.run("other", "sh", "-c", "echo never >> order", class_name="other")
        host.run("a", "sh", "-c", "echo a >> order", slot=4, allocation="n1[1]")
        ends = [host.end_of(name) for name in "abc"]
    assert (tmp_path / "order").read_text() == "a\nb\nc\n"
    assert [(e.end.slot, e.end.class_name, e.end.kept) for e in ends if e.end] == [
        (4, "c", True), (4, "c", True), (4, "c", False),
    ]  # fmt: skip
    assert all(
        e.report.allocation == "n1[1]" and e.report.outcome == "finished" and e.entry.exit_code == 0 for e in ends
    )
    assert "other" not in host.endings


def test_a_slot_that_is_opened_again_goes_on_with_what_is_prefetched_or_is_released(tmp_path: Path) -> None:
    with Host(tmp_path) as host:
        host.run("a", "true")
        host.send(Reopen("c", [(4, "n1[1]"), (5, "n1[0]")]))
        ending = host.end_of("a")
        assert ending.end is not None and (ending.end.slot, ending.report.allocation) == (4, "n1[1]")
        reports, ends = host.reported("ends")[0]
        assert not reports and [end[:4] for end in ends] == [(4, "c", -1.0, True), (5, "c", -1.0, False)]


def test_a_slot_ends_with_a_task_that_was_lost_before(tmp_path: Path) -> None:
    """What comes next could kill this worker before the end is known. Nothing is chained behind it either."""
    with Host(tmp_path, prefetch_after=1, chain_s=3600.0, report_batch_s=3600.0) as host:
        host.run("warm", "true", slot=1)
        host.end_of("warm")
        for name in ("b", "c"):
            host.run(name, "touch", "never")
        host.run("a", "true", slot=2, crashes=1)
        ending = host.end_of("a")
        assert ending.end is not None and not ending.end.kept
        host.send(StateRequest(5))
        ((state,),) = host.until(lambda: host.reported("state"))
        assert (state.slots, state.prefetched) == ([], {"c": 2})
        assert not (tmp_path / "never").exists()


def test_one_report_at_a_time_and_the_next_takes_all_that_ended_meanwhile(tmp_path: Path) -> None:
    with Host(tmp_path) as host:
        host.answering = False
        host.run("first", "true", slot=1)
        host.end_of("first")
        for number in range(2, 7):
            host.run(str(number), "touch", f"ran{number}", slot=number)
        host.until(lambda: all((tmp_path / f"ran{n}").exists() for n in range(2, 7)))
        # All have ended when the worker answers: it takes its own turn for everything it was sent before.
        host.send(RetractTasks("none", 1))
        host.until(lambda: host.reported("back"))
        assert len(host.reported("ends")) == 1
        host.answering = True
        host.answer(host.reported("ends")[0][0])
        for number in range(2, 7):
            assert host.end_of(str(number)).report.outcome == "finished"


def test_a_worker_tells_what_it_holds_after_what_has_ended(tmp_path: Path) -> None:
    with Host(tmp_path, report_batch_s=3600.0) as host:
        host.run("runs", "bash", "-c", WAITER, slot=1)
        host.run("short", "true", slot=2, allocation="n1[1]", class_name="d")
        host.run("next", "bash", "-c", WAITER, class_name="d")
        host.run("prefetched", "true")
        pid_of(host, "next")
        host.send(StateRequest(5))
        ((state,),) = host.until(lambda: host.reported("state"))
        assert host.endings["short"].end is not None and host.endings["short"].end.kept
    assert (state.node, state.incarnation, state.term) == ("n1", 7, 5)
    assert sorted(state.slots) == [(1, "n1[0]", "c"), (2, "n1[1]", "d")]
    assert state.prefetched == {"c": 1}


def test_only_launches_that_live_are_announced(tmp_path: Path) -> None:
    with Host(tmp_path, started_after_s=0.2) as host:
        host.run("long", "bash", "-c", "echo so far; sleep 100", slot=1)
        host.run("short", "true", slot=2, allocation="n1[1]")
        ((starts,),) = host.until(lambda: host.reported("starts"))
        ((task_id, execution, allocation, started, out, _),) = starts
        wait_until(lambda: Path(os.fsdecode(out)).read_text() == "so far\n")
        assert (task_id, execution, allocation) == ("long", 1, "n1[0]")
        assert started.endswith("Z")


def test_it_beats(tmp_path: Path) -> None:
    with Host(tmp_path, heartbeat_s=0.05) as host:
        host.until(lambda: any(beat["state"] == "idle" for (beat,) in host.reported("heartbeat")))
        host.run("a", "bash", "-c", WAITER, slot=1)
        host.until(lambda: any(beat["state"] == "busy" for (beat,) in host.reported("heartbeat")))


# -- what a task finds ------------------------------------------------------------------------------------------------


def test_a_task_finds_its_cores_and_its_surroundings(tmp_path: Path) -> None:
    with Host(tmp_path) as host:
        host.shared("threads", OMP_NUM_THREADS="7", MINE="yes")
        script = "grep Cpus_allowed_list /proc/self/status; env"
        host.run("a", slot=1, allocation="n1[1],n2[0:1]", script=script, env={"TWO": "2"}, array="arr", index=5)
        host.run("b", slot=2, shared="threads", script="env", execution=3)
        found = str(host.end_of("a").entry.stdout).splitlines()
        threads = str(host.end_of("b").entry.stdout).splitlines()
    assert found[0].split() == ["Cpus_allowed_list:", "1"]
    env = dict(line.split("=", 1) for line in found[1:])
    step = env["QCG_PM_STEP_ID"]
    assert len(step) == 32 and step[12] == "4" and step[16] in "89ab"
    expected = {
        "PILOTQ_TASK_ID": "a", "PILOTQ_EXECUTION": "1", "PILOTQ_DIR": str(tmp_path), "PILOTQ_CORES": "3",
        "PILOTQ_NODES": "2", "PILOTQ_NODELIST": "n1,n2", "PILOTQ_NODE": "n1", "PILOTQ_CPUS": "1",
        "PILOTQ_ARRAY_ID": "arr", "PILOTQ_INDEX": "5", "OMP_NUM_THREADS": "1", "QCG_PM_NNODES": "2",
        "QCG_PM_NODELIST": "n1,n2",
        "QCG_PM_NPROCS": "3", "QCG_PM_NTASKS": "3", "QCG_PM_TASKS_PER_NODE": "1,2", "TWO": "2", "PWD": str(tmp_path),
    }  # fmt: skip
    assert {key: env.get(key) for key in expected} == expected
    assert {"OMP_NUM_THREADS=7", "MINE=yes", "PILOTQ_EXECUTION=3", "PILOTQ_NODE=n1"} <= set(threads)


def test_words_are_filled_in_and_paths_are_of_the_working_directory(tmp_path: Path) -> None:
    with Host(tmp_path) as host:
        host.to_session("values", "arr", [b"x", b"y"])
        element = {"array": "arr", "index": 1, "position": 1}
        host.run("arr_1", "echo", "{index}{value}", slot=1, flags=9, stdout="{index}.txt", **element)
        host.run("range_1", "echo", "{value}", slot=2, flags=1, array="range", index=7)
        qcg = "sub/${it}"
        host.run("q", "sh", "-c", "pwd; echo ${itval}", slot=3, flags=11, cwd=qcg, stdout="${it}.out", **element)
        host.run("login", slot=4, flags=4, script="shopt -q login_shell && echo login")
        assert host.end_of("arr_1").entry.stdout_at == [bytes(tmp_path / "1.txt")]
        assert host.end_of("range_1").entry.stdout == "7\n"
        assert host.end_of("login").entry.stdout == "login\n"
        host.end_of("q")
    assert (tmp_path / "1.txt").read_text() == "1y\n"
    assert (tmp_path / "sub/1/1.out").read_text() == f"{tmp_path}/sub/1\ny\n"


def test_output_goes_into_the_line_or_beside_it(tmp_path: Path) -> None:
    with Host(tmp_path) as host:
        host.run("bytes", "printf", r"\377\376", slot=1)
        host.run("long", "head", "-c", "5000", "/dev/zero", slot=2)
        host.run("bad", "sh", "-c", "echo on stderr >&2; exit 9", slot=3)
        assert host.end_of("bytes").entry.stdout == b"\xff\xfe"
        path, offset, length = host.end_of("long").entry.stdout_at
        bad = host.end_of("bad")
    assert path.startswith(b"output/") and length == 5000
    assert (tmp_path / os.fsdecode(path)).read_bytes()[int(offset) :][:5000] == bytes(5000)
    assert (bad.report.outcome, bad.report.reason, bad.report.exit) == ("failed", "exit", "9")
    text = zlib.decompress(base64.b64decode(bad.report.text)).decode()
    assert "bad ended with a non-zero exit code." in text and "exit code 9" in text and text.endswith("on stderr\n")


@pytest.mark.parametrize("verdict", ["ok", "stale"])
def test_output_of_a_rerun_takes_its_name_when_it_counts(tmp_path: Path, verdict: str) -> None:
    out = tmp_path / "out"
    with Host(tmp_path) as host:
        host.verdict = verdict
        host.run("a", "echo", "first", slot=1, stdout="out")
        host.end_of("a")
        assert out.read_text() == "first\n"
        host.answering = False
        host.run("b", "echo", "second", slot=2, stdout="out", execution=2)
        ending = host.end_of("b")
        assert out.read_text() == "first\n" and (tmp_path / "out.2").read_text() == "second\n"
        host.answer([ending.report])
        host.until(lambda: not (tmp_path / "out.2").exists())
    assert out.read_text() == ("second\n" if verdict == "ok" else "first\n")


def test_files_that_hang_stop_neither_beats_nor_limits(tmp_path: Path) -> None:
    """The output of a rerun is to be published there, and a launcher of MPI is searched there."""
    (tmp_path / "sub").mkdir()
    with dead_mount(tmp_path / "dead") as dead, Host(tmp_path, heartbeat_s=0.05) as host:
        host.answering = False
        host.run("named", "true", slot=1, stdout="sub/out", execution=2)
        ending = host.end_of("named")
        (tmp_path / "sub").rename(tmp_path / "moved")
        (tmp_path / "sub").symlink_to(dead.path)
        host.answer([ending.report])
        host.answering = True
        host.shared("searches", PATH=f"{dead.path}:{os.environ['PATH']}")
        host.run("ranks", "true", slot=3, shared="searches", model="mpich", allocation="n1[0:1]")
        host.run("limited", "sleep", "600", slot=4, allocation="n1[1]", time_limit=0.5)
        beats = len(host.reported("heartbeat"))
        assert host.end_of("limited").report.reason == "time limit"
        host.until(lambda: len(host.reported("heartbeat")) > beats + 10, "beats")
        assert "ranks" not in host.endings
        host.stop("ranks")
        assert host.end_of("ranks").report.outcome == "canceled"


def test_a_directory_of_a_job_that_cannot_be_made_in_time_is_that_job_s_failure(tmp_path: Path) -> None:
    with dead_mount(tmp_path / "dead") as dead, Host(tmp_path, heartbeat_s=0.05, launch_confirm_s=2.0) as host:
        host.run("warm", "true", slot=3)
        host.end_of("warm")
        host.run("job", "true", slot=1, flags=2, cwd=str(dead.path / "a" / "b"))
        beats = len(host.reported("heartbeat"))
        host.until(lambda: len(host.reported("heartbeat")) > beats + 3, "beats")
        assert host.end_of("job").report.reason == "launch hangs"
        host.run("other", "true", slot=2)
        assert host.end_of("other").report.outcome == "finished"


def test_a_fifo_as_input_stops_nobody_else(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with Host(tmp_path, started_after_s=0.05) as host:
        host.run("nobody writes", "cat", slot=3, stdin="fifo")
        host.run("other", "true", slot=2)
        assert host.end_of("other").report.outcome == "finished"
        fifo = os.open(tmp_path / "fifo", os.O_RDWR)
        host.run("reader", "cat", slot=1, stdin="fifo")
        host.until(lambda: host.reported("starts"))
        os.write(fifo, b"through")
        os.close(fifo)
        assert host.end_of("reader").entry.stdout == "through"


def test_what_cannot_be_started_says_why_and_its_slot_goes_on(tmp_path: Path) -> None:
    with Host(tmp_path) as host:
        for number in range(1500):  # deeper than Python's stack
            host.run(f"prefetched{number}", "no-such-program")
        host.run("good", "true")
        host.run("first", "no-such-program", slot=1)
        good, first, last = host.end_of("good"), host.end_of("first"), host.end_of("prefetched1499")
    assert good.report.outcome == "finished"
    # So many failures in succession may be the node's fault, and are reported so, but for those reported before.
    assert (last.report.outcome, last.report.reason) == ("suspect", "not found") and first.report.reason == "not found"
    assert first.end is not None and first.end.seconds < 0 and first.end.kept
    assert "no-such-program" in first.entry.message


# -- being ended ------------------------------------------------------------------------------------------------------


def test_a_time_limit_is_a_request_then_an_order(tmp_path: Path) -> None:
    with Host(tmp_path, kill_grace_s=0.3) as host:
        host.run("kind", "bash", "-c", "trap 'echo bye; exit 0' TERM; sleep 100 & wait", slot=1, time_limit=0.2)
        host.run("deaf", "bash", "-c", DEAF, slot=2, time_limit=0.2)
        kind, deaf = host.end_of("kind"), host.end_of("deaf")
        assert not alive(pid_of(host, "deaf"))
    assert (kind.report.outcome, kind.report.reason, kind.entry.stdout) == ("failed", "time limit", "bye\n")
    assert (deaf.report.outcome, deaf.report.reason, deaf.entry.signal) == ("failed", "time limit", signal.SIGKILL)
    assert deaf.end is not None and deaf.end.seconds >= 0.5


def test_cancel_finds_a_task_wherever_it_is(tmp_path: Path) -> None:
    with Host(tmp_path, kill_grace_s=0.2) as host:
        host.run("runs", "bash", "-c", WAITER, slot=1)
        host.run("prefetched", "touch", "never")
        host.run("next", "true")
        host.stop("prefetched")
        canceled = host.end_of("prefetched")
        assert (canceled.report.outcome, canceled.report.started) == ("canceled", "")
        assert canceled.end is not None and canceled.entry.command == "touch never"
        assert (canceled.end.slot, canceled.end.seconds, canceled.end.kept) == (0, -1.0, False)
        pid = pid_of(host, "runs")
        host.stop("runs", execution=2)  # not the one that is here
        host.stop("unknown")
        host.stop("runs", "stopped", execution=1)
        assert host.end_of("runs").report.outcome == "stopped"
        assert not alive(pid)
        assert host.end_of("next").report.outcome == "finished"
    assert not (tmp_path / "never").exists()


def test_a_task_has_ended_when_none_of_its_processes_lives(tmp_path: Path) -> None:
    with Host(tmp_path, kill_grace_s=0.2) as host:
        host.run("a", "bash", "-c", f"setsid bash -c '{DEAF}' & sleep 0.3; exit 0", slot=1)
        ending = host.end_of("a")
        assert not alive(pid_of(host, "a"))
    assert ending.report.outcome == "finished"
    assert ending.end is not None and ending.end.seconds >= 0.4


def test_retract_returns_the_newest_and_is_always_answered(tmp_path: Path) -> None:
    with Host(tmp_path) as host:
        host.run("runs", "bash", "-c", WAITER, slot=1)
        for name in "abc":
            host.run(name, "true")
        host.send(RetractTasks("c", 2))
        host.send(RetractTasks("c", 5))
        host.send(RetractTasks("c", 5))
        host.until(lambda: len(host.reported("back")) == 3)
    assert host.reported("back") == [
        ([("b", 1), ("c", 1)], {"c": 2}), ([("a", 1)], {"c": 1}), ([], {"c": 0}),
    ]  # fmt: skip


# -- when parts fail --------------------------------------------------------------------------------------------------


def test_a_dead_launcher_takes_its_tasks_with_it_and_is_replaced(tmp_path: Path) -> None:
    with Host(tmp_path) as host:
        host.run("a", "bash", "-c", DEAF, slot=1)
        host.run(
            "b", "bash", "-c", f"setsid -w env -i PILOTQ_DIR=$PILOTQ_DIR PILOTQ_TASK_ID=b bash -c '{DEAF}'", slot=2
        )
        host.run("next", "true", class_name="c")
        pids = [pid_of(host, "a"), pid_of(host, "b")]
        (launcher,) = host.launchers()
        os.kill(launcher, signal.SIGKILL)
        ends = [host.end_of("a"), host.end_of("b")]
        assert not any(map(alive, pids))
        assert [(e.report.outcome, e.report.reason) for e in ends] == [("lost", "worker lost")] * 2
        assert sorted(e.end.kept for e in ends if e.end) == [False, True]
        assert host.end_of("next").report.outcome == "finished"
        assert host.launchers() != [launcher]


def test_a_core_gets_its_launcher_when_a_task_begins_there(tmp_path: Path) -> None:
    with Host(tmp_path) as host:
        host.run("a", "bash", "-c", DEAF, slot=1)
        pid_of(host, "a")
        (first,) = host.launchers()
        host.run("b", "bash", "-c", DEAF, slot=2, allocation="n1[1]")
        pid = pid_of(host, "b")
        (second,) = {*host.launchers()} - {first}
        assert pid in children(second)
        os.kill(second, signal.SIGKILL)
        assert host.end_of("b").report.reason == "worker lost"
        host.run("c", "true", slot=2, allocation="n1[1]")
        assert host.end_of("c").report.outcome == "finished"
        assert "a" not in host.endings


def test_launchers_that_keep_dying_end_the_worker(tmp_path: Path) -> None:
    with Host(tmp_path, restart_limit=1, kill_grace_s=0.2) as host:
        host.until(lambda: host.reported("heartbeat"))
        host.run("a", "bash", "-c", DEAF, slot=1)
        pid = pid_of(host, "a")
        for _ in range(2):
            (launcher,) = host.until(host.launchers)
            os.kill(launcher, signal.SIGKILL)
            host.until(lambda gone=launcher: gone not in children(host.process.pid))
        assert host.wait() == 3
        assert not alive(pid)
        assert host.endings["a"].report.outcome == "lost"
    assert "died more than 1 times" in host.log.read_text()


def test_a_launch_that_hangs_fails_and_the_others_are_not_to_blame(tmp_path: Path) -> None:
    settings = {"launch_confirm_s": 2.0, "heartbeat_s": 0.1, "prefetch_after": 1, "chain_s": 3600.0}
    with hanging_program(tmp_path / "held") as held, Host(tmp_path, **settings) as host:
        host.run("warm", "true", slot=3, class_name="d")
        host.end_of("warm")
        host.run("runs", "bash", "-c", DEAF, slot=1)
        pid = pid_of(host, "runs")
        # The launcher comes to it by itself, and to the next one never.
        host.run("hangs", str(held), class_name="d")
        host.run("behind", "true", class_name="d")
        host.run("short", "true", slot=2, class_name="d")
        assert host.end_of("short").report.outcome == "finished"
        host.run("late", "true", slot=4)
        ends = {name: host.end_of(name) for name in ("hangs", "runs", "behind", "late")}
        assert {name: (e.report.outcome, e.report.reason) for name, e in ends.items()} == {
            "hangs": ("failed", "launch hangs"),
            "runs": ("requeue", "worker lost"), "behind": ("requeue", "worker lost"),
            "late": ("requeue", "worker lost"),
        }  # fmt: skip
        assert not alive(pid)
        host.run("good", "true", slot=5)
        assert host.end_of("good").report.outcome == "finished"
        reported = [report.id for reports, _ in host.reported("ends") for report in reports]
        assert len(reported) == len(set(reported))


@pytest.mark.parametrize("fate", [signal.SIGCONT, signal.SIGKILL], ids=["goes on", "is killed"])
def test_what_could_not_be_killed_gives_its_slot_back_when_it_has_ended(tmp_path: Path, fate: int) -> None:
    """A launcher that is stopped kills nothing. Its task has failed by then, and is reported once; the slot goes on."""
    with Host(tmp_path, kill_grace_s=0.1, unkillable_s=0.3, launch_confirm_s=60.0) as host:
        host.run("a", "bash", "-c", WAITER, slot=1)
        pid = pid_of(host, "a")
        host.until(lambda: host.reported("starts"))
        (launcher,) = host.launchers()
        os.kill(launcher, signal.SIGSTOP)
        host.stop("a", "time limit")
        end = host.end_of("a")
        assert (end.report.outcome, end.report.reason, end.end) == ("failed", "unkillable", None)
        assert alive(pid)
        host.run("next", "true")
        host.send(StateRequest(5))
        ((state,),) = host.until(lambda: host.reported("state"))
        assert [slot[0] for slot in state.slots] == [1] and state.prefetched == {"c": 1}
        os.kill(launcher, fate)
        ended = host.end_of("next")
        assert not alive(pid)
        assert ended.report.outcome == "finished" and ended.end is not None
        reported_slots = [(e.slot, e.kept) for _, ends in host.reported("ends") for e in ends]
        assert reported_slots == [(1, True), (1, False)]
        assert [r.id for reports, _ in host.reported("ends") for r in reports] == ["a", "next"]
        assert "has ended after all: n1[0] is free again" in host.log.read_text()


def test_a_launch_waits_for_a_server_that_is_away(tmp_path: Path) -> None:
    with Host(tmp_path) as host:
        host.to_session("away", True)
        host.run("a", "true", slot=1)
        host.run("b", "true", slot=2, class_name="d")
        host.stop("b")
        assert host.end_of("b").report.outcome == "canceled"
        assert "a" not in host.endings
        host.to_session("away", False)
        assert host.end_of("a").report.outcome == "finished"


@pytest.mark.parametrize(("error", "grace"), [("ServerUnavailable", True), ("StateLost", False), ("Superseded", False)])
def test_without_its_server_a_worker_ends_its_tasks(tmp_path: Path, error: str, grace: bool) -> None:
    with Host(tmp_path, kill_grace_s=5.0) as host:
        host.run("a", "bash", "-c", "trap 'touch asked; exit' TERM; echo $$ > a.pid; sleep 100 & wait", slot=1)
        names = ["a"]
        if not grace:
            host.run("deaf", "bash", "-c", DEAF, slot=2)
            names.append("deaf")
        pids = [pid_of(host, name) for name in names]
        host.to_session("raise", error)
        assert host.wait() == 3
        assert not any(map(alive, pids))
        assert "giving up: the test wants it" in host.log.read_text()
        assert not host.reported("deregister")
    if grace:
        assert (tmp_path / "asked").exists()


# -- leaving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["message", "signal"])
def test_leaving_gives_everything_back(tmp_path: Path, by: str) -> None:
    with Host(tmp_path, kill_grace_s=1.0) as host:
        host.run("done", "true", slot=1, class_name="d")
        host.run("runs", "bash", "-c", WAITER, slot=2)
        host.run("deaf", "bash", "-c", DEAF, slot=3)
        host.run("prefetched", "touch", "never")
        pids = [pid_of(host, "runs"), pid_of(host, "deaf")]
        host.end_of("done")
        host.signal(signal.SIGINT)  # the supervisor's business
        if by == "message":
            host.send(Leave(1.0))
        else:
            host.signal(signal.SIGTERM)
        host.until(lambda: "leaving" in host.log.read_text())
        host.run("late", "touch", "never", slot=4)
        host.run("late prefetched", "touch", "never")
        assert host.wait() == 0
        assert not any(map(alive, pids))
    ends = {name: (e.report.outcome, e.report.reason) for name, e in host.endings.items()}
    assert ends.pop("done") == ("finished", "")
    assert ends == dict.fromkeys(("runs", "deaf", "late"), ("requeue", "pilot ended"))
    assert host.reported("back") == [([("prefetched", 1)], {"c": 1}), ([("late prefetched", 1)], {"c": 1})]
    assert len(host.reported("deregister")) == 1
    assert not (tmp_path / "never").exists()


def test_leaving_does_not_wait_for_ever_for_a_confirmation(tmp_path: Path) -> None:
    with Host(tmp_path, stop_wait_s=0.5) as host:
        host.answering = False
        host.run("a", "true", slot=1)
        host.end_of("a")
        host.send(Leave(0.1))
        assert host.wait() == 3
    assert "not everything had ended and was confirmed" in host.log.read_text()
