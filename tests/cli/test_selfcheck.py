"""The selfcheck: a real run finds nothing wrong, and its judge detects every false ledger."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pilotq.broker.store.journal import JournalEntry
from pilotq.broker.tasks.submit_context import SubmitContext
from pilotq.cli.selfcheck.judge import Node, Outcome, Run, judge
from pilotq.cli.selfcheck.ledger import End, Ledger, Start, read
from pilotq.cli.selfcheck.plan import Expected, Place, batches
from pilotq.cli.selfcheck.probe import output
from tests.support.live_pilot import live_pilot

NODES = {"n1": Node(2, {0: 4, 1: 5}), "n2": Node(2, {0: 6, 1: 7})}
BEGIN = 1_000_000.0
LIMIT = 7  # the number of a soft limit
CHECKS = {
    "once", "journal", "output", "resources", "cwd", "umask", "limits", "signals", "descriptors", "environment", "mask",
    "overlap", "times", "processes",
}  # fmt: skip
Lie = Callable[[Run], Run | None]


def selfcheck(*args: str, folder: Path) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("PILOTQ_")} | {"TMPDIR": str(folder)}
    command = [sys.executable, "-m", "pilotq.selfcheck", *args]
    return subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=110)


def rows(text: str) -> dict[str, list[str]]:
    """check -> [judged, wrong], of the table."""
    return {line.split()[0]: line.split()[1:3] for line in text.splitlines()[1 : 1 + len(CHECKS)]}


# real runs


def test_a_run_of_its_own_finds_nothing_wrong(tmp_path: Path) -> None:
    result = selfcheck("--tasks", "300", folder=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    table = rows(result.stdout)
    assert table.keys() == CHECKS
    assert {wrong for _, wrong in table.values()} == {"none"}
    assert table["once"][0] == "300"
    assert all(int(judged) >= 300 for judged, _ in table.values())
    assert re.search(r"300 tasks in 3\d\d executions on 2 nodes with 4 cores", result.stderr)
    assert list(tmp_path.iterdir()) == []


def test_it_checks_a_pilot_that_runs(tmp_path: Path) -> None:
    with live_pilot(tmp_path, "one:2") as pilot:
        before = set(os.listdir(pilot.pilot.directory))
        result = selfcheck("--tasks", "60", "--dir", pilot.pilot.directory, folder=tmp_path)
        assert result.returncode == 0, result.stdout + result.stderr
        assert rows(result.stdout)["once"] == ["60", "none"]
        assert set(os.listdir(pilot.pilot.directory)) == before


def test_what_is_wrong_is_said_and_kept(tmp_path: Path) -> None:
    """A tool in front of bash that changes the umask stands for a pilot that does."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "sh").write_text('#!/bin/sh\numask 011\nexec /bin/sh "$@"\n')
    (tools / "sh").chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
        result = selfcheck("--tasks", "20", folder=tmp_path)
    assert result.returncode == 1
    table = rows(result.stdout)
    assert {check for check, (_, wrong) in table.items() if wrong != "none"} == {"umask"}
    assert "umask: t3: its umask is 0011, not 0027" in result.stdout
    kept = re.search(r"is kept in (\S+)", result.stderr)
    assert kept is not None
    assert len(read(os.path.join(kept[1], "ledgers"))) == 20


# the plan


def test_the_plan_has_every_variety(tmp_path: Path) -> None:
    place = Place(str(tmp_path), str(tmp_path))
    planned = batches(2000, {"n1": 2, "n2": 2}, place, SubmitContext({b"PATH": b"/bin"}, b"/", 0o022, {}))
    tasks = [task for batch in planned for task in batch.tasks]
    expected = [e for batch in planned for elements in batch.expected for e in elements]
    assert len(expected) == len({e.name for e in expected}) == sum(task.size for task in tasks) == 2000
    assert {e.umask for e in expected} == {0o022, 0o077, 0o002, 0o027}
    assert {e.reason for e in expected} == {"", "exit", "signal", "time limit"}
    assert {e.executions for e in expected} == {1, 2}
    assert {(e.nodes, e.cores) for e in expected} == {
        (1, (1, 1)), (1, (2, 2)), (1, (1, 2)), (1, None), (2, (1, 1)), (2, None)
    }  # fmt: skip
    for attribute in ("script", "stdin", "stdout", "stderr", "cwd", "array", "values"):
        assert {bool(getattr(task, attribute)) for task in tasks} == {True, False}
    assert max(e.size for e in expected) > 1 << 20


# the judge


def outcome(name: str, node: str, core: int, begun: float, *, pid: int, **more: object) -> Outcome:
    """What there is of a task that ran for a second, all true."""
    expected = Expected(
        name=name, id=f"id-{name}", cwd="/work", umask=0o022, limits={LIMIT: 100}, env={"PATH": "/bin"}, size=10, **more
    )  # type: ignore[arg-type]
    env = {
        "PATH": "/bin", "PILOTQ_TASK_ID": f"id-{name}", "PILOTQ_EXECUTION": "1", "PILOTQ_NODELIST": node,
        "PILOTQ_NODES": "1", "PILOTQ_CORES": "1", "PILOTQ_CPUS": str(core), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    real = NODES[node].real
    assert real is not None
    start = Start(
        execution=1, pid=pid, begun=begun, at=BEGIN + begun, mask=[real[core]], cwd="/work", umask=0o022, env=env,
        descriptors={0: "/dev/null", 1: "/p/n1.1.pool", 2: "/p/n1.2.pool"}, limits={LIMIT: (100, 500)}, signals=(0, 0),
        by_shell=True, leads=True, stdin="", clock="this host",
    )  # fmt: skip
    line = JournalEntry(
        f"id-{name}", name, "finished", execution=1, node=node, cpus=f"{node}[{core}]", exit_code=0,
        queued=BEGIN, handed=BEGIN + begun, started=BEGIN + begun, ended=BEGIN + begun + 1,
    )  # fmt: skip
    end = End(execution=1, pid=pid, ended=begun + 1, at=BEGIN + begun + 1)
    said = {stream: output(name, 1, stream, 10) for stream in ("stdout", "stderr")}
    return Outcome(expected=expected, ledger=Ledger([start], [end]), lines=[line], output=said)


def truth() -> Run:
    """Two tasks on one core, one after the other, and one beside them."""
    outcomes = [
        outcome("a", "n1", 0, 1.0, pid=11),
        outcome("b", "n1", 0, 3.0, pid=12),
        outcome("c", "n2", 0, 1.5, pid=13),
    ]
    return Run(outcomes, NODES, BEGIN, BEGIN + 10, [], [])


def test_the_judge_believes_the_truth() -> None:
    verdicts = judge(truth())
    assert {v.check for v in verdicts} == CHECKS
    assert [text for v in verdicts for text in v.wrong] == []
    assert {v.judged for v in verdicts} == {3}


def start_of(run: Run, number: int = 0) -> Start:
    return run.outcomes[number].ledger.starts[0]


def line_of(run: Run, number: int = 0) -> JournalEntry:
    return run.outcomes[number].lines[0]


def with_start(field: str, value: object) -> Lie:
    return lambda run: setattr(start_of(run), field, value)


def with_line(field: str, value: object) -> Lie:
    return lambda run: setattr(line_of(run), field, value)


def with_env(**env: str | None) -> Lie:
    def lie(run: Run) -> None:
        for name, value in env.items():
            start_of(run).env[name] = value or ""
            if value is None:
                del start_of(run).env[name]

    return lie


def with_expected(**fields: object) -> Lie:
    def lie(run: Run) -> None:
        for name, value in fields.items():
            setattr(run.outcomes[0].expected, name, value)

    return lie


def ran_twice(run: Run) -> None:
    ledger = run.outcomes[0].ledger
    ledger.starts *= 2
    ledger.ends *= 2


def moved_onto_another(run: Run) -> None:
    start_of(run, 1).begun = 1.9


def hidden_part_on_another_node(run: Run) -> None:
    """A task of two nodes has, by the journal, the core of somebody else there."""
    first = run.outcomes[0]
    first.expected.nodes = 2
    start_of(run).env.update(PILOTQ_NODELIST="n1,n2", PILOTQ_NODES="2", PILOTQ_CORES="2")
    line_of(run).cpus = "n1[0],n2[0]"


def two_cores_one_cpu(run: Run) -> Run:
    """Nobody knows the CPUs of the cores; the tasks tell that two cores have the same."""
    start_of(run, 1).env["PILOTQ_CPUS"] = "1"
    line_of(run, 1).cpus = "n1[1]"
    return run._replace(nodes={name: Node(2) for name in NODES})


LIES: list[tuple[str, Lie]] = [
    ("once", lambda run: run.outcomes[0].ledger.starts.clear()),
    ("once", lambda run: run.outcomes[0].ledger.ends.clear()),
    ("once", ran_twice),
    ("once", with_expected(executions=2, exit_codes=(7, 0))),
    ("once", with_expected(ends=False)),
    ("once", lambda run: run._replace(unexpected=["ledger x"])),
    ("journal", lambda run: run.outcomes[0].lines.clear()),
    ("journal", lambda run: run.outcomes[0].lines.append(line_of(run))),
    ("journal", with_line("execution", 2)),
    ("journal", with_line("status", "failed")),
    ("journal", with_line("reason", "exit")),
    ("journal", with_line("exit_code", 3)),
    ("journal", with_line("exit_code", None)),
    ("journal", with_line("signal", 9)),
    ("journal", with_line("final", False)),
    ("journal", with_line("node", "n2")),
    ("journal", with_line("cpus", "n1[1]")),
    ("journal", with_line("cpus", "n2[0]")),
    ("journal", with_line("cpus", "n1[0],n2[1]")),
    ("journal", with_line("cpus", "")),
    ("journal", with_expected(exit_codes=(5,), reason="exit")),
    ("output", lambda run: run.outcomes[0].output.update(stdout=b"")),
    ("output", lambda run: run.outcomes[0].output.update(stderr=output("b", 1, "stderr", 10))),
    ("output", lambda run: run.outcomes[0].output.update(stdout=output("a", 2, "stdout", 10))),
    ("resources", with_expected(cores=(2, 2))),
    ("resources", with_expected(nodes=2)),
    ("resources", with_env(PILOTQ_NODES="2")),
    ("resources", with_env(OMP_NUM_THREADS="2")),
    ("resources", with_env(OMP_NUM_THREADS=None)),
    ("cwd", with_start("cwd", "/")),
    ("umask", with_start("umask", 0o077)),
    ("limits", with_start("limits", {LIMIT: (500, 500)})),
    ("limits", with_start("limits", {LIMIT: (100, 90)})),
    ("limits", with_expected(limits={LIMIT: -1})),
    ("signals", with_start("signals", (1 << signal.SIGTERM - 1, 0))),
    ("signals", with_start("signals", (0, 1 << signal.SIGINT - 1))),
    ("signals", with_start("signals", (0, 1 << signal.SIGPIPE - 1))),
    ("signals", with_start("leads", False)),
    ("descriptors", lambda run: start_of(run).descriptors.update({3: "socket:[1]"})),
    ("descriptors", lambda run: start_of(run).descriptors.pop(2)),
    ("descriptors", lambda run: start_of(run).descriptors.update({0: "/dev/pts/0"})),
    ("descriptors", with_expected(stdin="something")),
    ("descriptors", with_expected(stdout="/elsewhere/a.out")),
    ("environment", with_env(PILOTQ_TASK_ID="id-b")),
    ("environment", with_env(PILOTQ_EXECUTION="2")),
    ("environment", with_env(PATH="/usr/bin")),
    ("environment", with_env(PATH=None)),
    ("environment", with_env(REDIS_URL="unix:///secret")),
    ("environment", with_expected(index=3)),
    ("mask", with_start("mask", [4, 5])),
    ("mask", with_start("mask", [5])),
    ("mask", with_start("mask", [])),
    ("mask", two_cores_one_cpu),
    ("overlap", moved_onto_another),
    ("overlap", hidden_part_on_another_node),
    ("overlap", with_expected(cores=None)),
    ("times", with_line("started", None)),
    ("times", with_line("started", BEGIN + 3)),
    ("times", with_line("ended", BEGIN)),
    ("times", with_line("queued", BEGIN - 5)),
    ("times", lambda run: run._replace(end=BEGIN)),
    ("processes", lambda run: run._replace(left=[4711])),
]  # fmt: skip


@pytest.mark.parametrize(("check", "lie"), LIES)
def test_the_judge_believes_no_lie(check: str, lie: Lie) -> None:
    run = truth()
    changed = lie(run)
    found = {v.check for v in judge(changed if isinstance(changed, Run) else run) if v.wrong}
    assert check in found


def test_an_overlap_is_seen_behind_others() -> None:
    """The task that goes on longest is not the last one that began."""
    run = truth()
    run.outcomes[0].ledger.ends[0].ended = 9.0
    start_of(run, 1).begun, run.outcomes[1].ledger.ends[0].ended = 1.1, 1.2
    run.outcomes.append(outcome("d", "n1", 0, 4.0, pid=14))
    found = next(v for v in judge(run) if v.check == "overlap")
    assert found.wrong == [f"a.1 and {other}.1 had core 0 of n1 at the same time" for other in "bd"]


def test_what_is_nobodys_fault_is_no_lie() -> None:
    """Signals the libraries ignore, a rerun, a number that was left out, a clock of another host, a task cut off."""
    run = truth()
    start_of(run).signals = (0, 3 << 31)  # the C library's two, in what a shell sees
    start_of(run, 1).signals = (0, 3 << 31 | 1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1)
    start_of(run, 1).by_shell = False
    other = outcome("d", "n1", 0, 1.5, pid=14)  # at the time of a, but by another clock
    other.ledger.starts[0].clock = "that host"
    cut = outcome("e", "n2", 1, 2.0, pid=15, ends=False, exit_codes=(None,), signal=15, reason="time limit")
    cut.ledger.ends.clear()
    cut.lines[0].status, cut.lines[0].reason = "failed", "time limit"
    cut.lines[0].exit_code, cut.lines[0].signal = None, 15
    late = outcome("f", "n2", 1, 5.0, pid=16)
    late.ledger.starts[0].execution = late.ledger.ends[0].execution = late.lines[0].execution = 2
    late.ledger.starts[0].env["PILOTQ_EXECUTION"] = "2"
    late.output = {stream: output("f", 2, stream, 10) for stream in late.output}
    run.outcomes.extend([other, cut, late])
    assert [text for v in judge(run) for text in v.wrong] == []
