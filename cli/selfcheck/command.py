"""`python -m pilotq.selfcheck`: submits the tasks, waits, reads what they wrote, and prints the verdicts."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import click

from pilotq.broker.client.broker import Broker
from pilotq.broker.client.output import output_of_entry
from pilotq.broker.client.views import Counts
from pilotq.broker.errors import PilotFailed, WaitTimedOut
from pilotq.broker.pilot.directory import Pilot
from pilotq.broker.pilot.start import LocalNode, SupervisorOptions, start_pilot
from pilotq.broker.store.journal import Journal, JournalEntry
from pilotq.broker.tasks.submit_context import capture_context
from pilotq.cli import exit_codes, formatting, progress
from pilotq.cli.pilot_options import pilot_failure, plural
from pilotq.cli.selfcheck.judge import Node, Outcome, Run, Verdict, judge
from pilotq.cli.selfcheck.ledger import Ledger, read
from pilotq.cli.selfcheck.plan import Batch, Expected, Place, batches
from pilotq.workers.machine.topology import usable_cpus, virtual_nodes
from pilotq.workers.process_tree import kill_marked

NODES = "n1:2,n2:2"
POLL_S = 0.25
FIRST_S, EACH_S = 120.0, 0.3  # how long the tasks may take: ten times as long as on a small machine
JOURNAL_S = 30.0  # how long the last lines may take to arrive
SHOWN = 5  # findings that are printed for each check


class Target(NamedTuple):
    """The pilot that is checked, and its nodes."""

    pilot: Pilot
    nodes: Mapping[str, Node]


@click.command("selfcheck", context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--tasks", "count", type=click.IntRange(1), default=2000, show_default=True, metavar="N", help="How many tasks."
)
@click.option("--nodes", default=NODES, show_default=True, metavar="SPEC", help="The nodes of a pilot of its own.")
@click.option("--dir", "directory", metavar="DIR", help="Check the pilot that runs in DIR, instead of one of its own.")
def selfcheck_command(count: int, nodes: str, directory: str | None) -> int:
    """Run tasks that check from inside whether they have what they requested, and judge by what they wrote.

    Prints a table of checks. The exit code is 0 when all is as promised; else 1, and what the tasks wrote is kept.
    """
    with _running(directory) if directory else _private(nodes) as target:
        home = target.pilot.path(f"selfcheck-{secrets.token_hex(4)}")
        place = Place(os.path.join(home, "ledgers"), os.path.join(home, "work"))
        for folder in (home, *place):
            os.mkdir(folder, 0o700)
        run = check(target, place, count)
        verdicts = judge(run)
        _print_verdicts(run, verdicts)
        if any(verdict.wrong for verdict in verdicts):
            raise SelfcheckFailedError(f"not everything is as promised; what the tasks wrote is kept in {home}")
        shutil.rmtree(home)
    return exit_codes.ALL_FINISHED


class SelfcheckFailedError(PilotFailed):
    exit_code = exit_codes.TASKS_FAILED


@contextmanager
def _private(spec: str) -> Iterator[Target]:
    """A pilot of our own, in a directory that is removed if nothing is wrong."""
    plans = virtual_nodes(spec, usable_cpus(), socket.gethostname())
    options = SupervisorOptions(nodes=[LocalNode(*plan) for plan in plans], owner_pid=os.getpid())
    directory = tempfile.mkdtemp(prefix="selfcheck-")
    pilot = start_pilot(directory, options)
    try:
        yield Target(pilot, {plan.name: Node(len(plan.cores), plan.real, plan.shared) for plan in plans})
    finally:
        pilot.process.terminate()
        pilot.process.wait()
    if pilot.process.returncode:
        raise pilot_failure(pilot)
    shutil.rmtree(directory)


@contextmanager
def _running(directory: str) -> Iterator[Target]:
    with Broker.connect(directory) as broker:
        assert broker.pilot is not None, "connect always finds a directory"
        yield Target(broker.pilot, {n.name: Node(n.cores, None, n.shared_cores) for n in broker.nodes()})


def check(target: Target, place: Place, count: int) -> Run:
    """Everything but the judgement. Raises WaitTimedOut."""
    begin = time.time()
    base = capture_context("clean")
    planned = batches(count, {name: node.cores for name, node in target.nodes.items()}, place, base)
    expected = [e for batch in planned for elements in batch.expected for e in elements]
    with Broker.connect(target.pilot.directory) as broker:
        submissions = [_submit(broker, batch) for batch in planned]
        _follow(broker, submissions, FIRST_S + EACH_S * count)
    lines: dict[str, list[JournalEntry]] = {}

    def complete() -> bool:
        nonlocal lines
        lines = _lines(target.pilot, submissions)
        return all(any(line.final for line in lines.get(e.id, ())) for e in expected)

    deadline = time.monotonic() + JOURNAL_S
    while not complete():
        if time.monotonic() > deadline:
            raise WaitTimedOut(f"the journal does not have all tasks after {JOURNAL_S:g} s")
        time.sleep(POLL_S)
    end = time.time()
    ledgers = read(place.ledgers)
    outcomes = [_outcome(target.pilot, e, ledgers.pop(e.name, Ledger()), lines.pop(e.id)) for e in expected]
    unexpected = [f"ledger {name}" for name in ledgers] + [f"task {task_id} of the journal" for task_id in lines]
    return Run(outcomes, target.nodes, begin, end, unexpected, _left(target.pilot, {e.id for e in expected}))


def _submit(broker: Broker, batch: Batch) -> str:
    """Returns the key of the submission, and fills in the ids."""
    key = f"selfcheck-{secrets.token_hex(8)}"
    for task_id, elements in zip(
        broker.enqueue_many(batch.tasks, key=key, context=batch.shared), batch.expected, strict=True
    ):
        for e in elements:
            e.id = task_id if e.index is None else f"{task_id}_{e.index}"
    return key


def _follow(broker: Broker, submissions: list[str], timeout: float) -> None:
    """Until all have ended. Other tasks of the pilot do not count."""
    shown = progress.display(quiet=False)
    try:
        deadline = time.monotonic() + timeout
        while (counts := _sum(broker.counts(key) for key in submissions)).left > 0:
            if time.monotonic() > deadline:
                raise WaitTimedOut(f"{counts.left} of {counts.total} tasks had not ended after {timeout:g} s")
            shown.update(counts, sum(node.running for node in broker.nodes()))
            time.sleep(POLL_S)
    finally:
        shown.close()


def _sum(each: Iterator[Counts]) -> Counts:
    counts = list(each)
    return Counts(
        total=sum(c.total for c in counts),
        finished=sum(c.finished for c in counts),
        failed=sum(c.failed for c in counts),
        canceled=sum(c.canceled for c in counts),
    )


def _lines(pilot: Pilot, submissions: list[str]) -> dict[str, list[JournalEntry]]:
    """Id -> the lines of its executions; the lines of arrays as a whole are left out."""
    found: dict[str, list[JournalEntry]] = {}
    for line in Journal(pilot.journal).entries():
        if line.submission in submissions and not line.elements:
            found.setdefault(line.id, []).append(line)
    return found


def _outcome(pilot: Pilot, expected: Expected, ledger: Ledger, lines: list[JournalEntry]) -> Outcome:
    output = {stream: b"".join(output_of_entry(pilot, lines[-1], stream)) for stream in ("stdout", "stderr")}
    return Outcome(expected=expected, ledger=ledger, lines=lines, output=output)


def _left(pilot: Pilot, ids: set[str]) -> list[int]:
    """Numbers of processes on this machine that belong to tasks of ours. All tasks have ended."""
    return kill_marked(
        lambda env: env.get("PILOTQ_DIR") == pilot.directory and env.get("PILOTQ_TASK_ID") in ids, 0, 0.0
    )


def _print_verdicts(run: Run, verdicts: list[Verdict]) -> None:
    rows = [(v.check, f"{v.judged}", f"{len(v.wrong)}" if v.wrong else "none", v.promise) for v in verdicts]
    click.echo(formatting.table(("CHECK", "JUDGED", "WRONG", "WHAT IS PROMISED"), rows))
    for verdict in verdicts:
        for text in verdict.wrong[:SHOWN]:
            click.echo(f"{verdict.check}: {formatting.clean(text)}")
        if len(verdict.wrong) > SHOWN:
            click.echo(f"{verdict.check}: and {len(verdict.wrong) - SHOWN} more")
    executions = sum(len(o.ledger.starts) for o in run.outcomes)
    cores = sum(node.cores for node in run.nodes.values())
    click.echo(
        f"pilotq: {plural(len(run.outcomes), 'task')} in {plural(executions, 'execution')} on "
        f"{plural(len(run.nodes), 'node')} with {plural(cores, 'core')}, in {formatting.seconds(run.end - run.begin)}",
        err=True,
    )
