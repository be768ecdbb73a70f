"""Handles requests of QCG-PilotJob on a pilot of their own, which ends when all jobs have.

The files that it leaves in the pilot's directory have QCG-PilotJob's names: ``service.log``, the report
(``jobs.report``), ``final_status.json``, and, while programs may send requests (``net``), ``address``.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Any, TextIO

import msgspec

from pilotq.broker.client.broker import Broker
from pilotq.broker.pilot.directory import write_private
from pilotq.broker.pilot.start import StartedPilot
from pilotq.broker.process_identity import start_time
from pilotq.broker.qcg.service.address import address_of
from pilotq.broker.qcg.service.play import PlayResult, play, reply_writer
from pilotq.broker.qcg.service.report import NAMED_MAX, Report
from pilotq.broker.qcg.service.requests import Reply, Requests, begin
from pilotq.broker.qcg.service.states import CANCELED, QUEUED, SUCCEED, timestamp
from pilotq.cli import exit_codes, progress
from pilotq.cli.interrupts import Interrupts
from pilotq.cli.lifetime import POLL_S, Lifetime
from pilotq.cli.pilot_options import await_nodes
from pilotq.cli.qcg.plan import Plan

LOGGED_MAX = 10_000  # characters of a request: the jobs of a submit stand in qcg-jobs.jsonl


@contextmanager
def _paused(broker: Broker) -> Iterator[None]:
    """Start nothing meanwhile: in QCG-PilotJob no job runs that a later request of the same file cancels."""
    broker.pause(True)
    try:
        yield
    finally:
        broker.pause(False)


def _cancels(bodies: Iterable[Any]) -> bool:
    return any(isinstance(body, dict) and body.get("request") == "cancelJob" for body in bodies)


class Play(Lifetime):
    def __init__(self, pilot: StartedPilot, interrupts: Interrupts, shown: progress.Silent, plan: Plan) -> None:
        super().__init__(pilot, interrupts, shown)
        self.plan = plan
        self.played = PlayResult([], {})
        self.report_path = os.path.join(pilot.directory, plan.report_file)
        self._owner_start = start_time(plan.owner) if plan.owner else None
        self._files = ExitStack()
        self._log: TextIO | None = None
        self.requests: Requests | None = None
        self.report: Report | None = None

    def begin(self, broker: Broker) -> None:
        plan = self.plan
        await_nodes(broker, self.pilot, plan.options)
        number = os.open(self.pilot.path("service.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._log = self._files.enter_context(os.fdopen(number, "a", encoding="utf-8", errors="backslashreplace"))
        begin(broker, self.pilot, plan.wd, net=plan.net, system_cores=plan.system_cores)
        self.requests = Requests(broker, env_policy=plan.env_policy)
        self.report = Report(
            self.requests.registry, self.pilot.journal, plan.wd, path=self.report_path, form=plan.report_format
        )
        if plan.net:
            write_private(self.pilot.path("address"), address_of(self.pilot.directory).encode())
        with _paused(broker) if _cancels(plan.bodies) else nullcontext():
            self.played = play(self.requests, plan.bodies, self._log_reply)
        if plan.owner:
            print(self.pilot.directory, flush=True)  # its owner waits for this line: the service is ready

    def _log_reply(self, request: Any, reply: Reply) -> None:
        for line in (f"request {_text(request)[:LOGGED_MAX]}", f"reply {json.dumps(reply)}"):
            print(f"{timestamp(time.time())}: {line}", file=self._log, flush=True)
        reply_writer(self.plan.replies)(request, reply)

    def done(self, broker: Broker) -> bool:
        assert self.requests is not None and self.report is not None
        if self.plan.owner and start_time(self.plan.owner) != self._owner_start:
            self.interrupts.count = 2  # its owner, which would ask it to end, is gone
            return True
        self.report.write_ended()
        super().done(broker)
        self.requests.registry.refresh()
        if not self.plan.stays or self.requests.registry.finish:
            self.requests.omit_unmet()
            if self.requests.all_finished:
                return True
        time.sleep(POLL_S)
        return False

    def complete(self) -> None:
        """Complete the report from the journal, which is complete; everything else has not ended."""
        assert self.requests is not None and self.report is not None
        report, known = self.report, self.requests.registry.jobs
        report.write_ended()
        jobs = Counter(report.jobs)
        jobs[QUEUED] += max(len(known) - sum(jobs.values()), 0)
        tasks = Counter(report.tasks)
        every = sum(len(job.indices or (None,)) for job in known.values())
        tasks[QUEUED] += max(every - sum(tasks.values()), 0)
        nodes = self.plan.options.expected_nodes
        cores, kept = sum(len(node.cores) for node in nodes), self.plan.system_cores
        if self.plan.options.remote is None:
            cores += kept  # the granted cores of an allocation include them
        status = self.requests.status_of((len(nodes), cores, kept), +jobs, +tasks)
        write_private(self.pilot.path("final_status.json"), msgspec.json.format(msgspec.json.encode(status), indent=2))

    def close(self) -> None:
        if self.requests is not None:
            self.requests.close()
        with suppress(FileNotFoundError):
            os.unlink(self.pilot.path("address"))
        self._files.close()

    # -- afterwards -------------------------------------------------------------------------------------------------

    @property
    def code(self) -> int:
        """The exit code: some job did not succeed, or a submit was refused."""
        assert self.report is not None
        if self.interrupts.count:
            return exit_codes.INTERRUPTED
        bad = sum(self.report.tasks.values()) - self.report.tasks[SUCCEED]
        return exit_codes.TASKS_FAILED if bad or self.played.refused else exit_codes.ALL_FINISHED

    def omitted(self) -> dict[str, str]:
        """Jobs and elements that could never run and are no tasks, with a sentence why."""
        assert self.requests is not None
        registry = self.requests.registry
        found = {job.name: job.why for job in registry.never_ran if job.state != CANCELED}
        for job in registry.jobs.values():
            found |= {f"{job.name}:{index}": why for index, why in job.omitted.items()}
        return found

    def print_failures(self) -> None:
        """Print what was refused, and what did not succeed."""
        assert self.report is not None
        for sentence in self.played.refused:
            self.say(sentence)
        for sentence in self.report.failures:
            self.say(f"job {sentence}")
        bad = sum(self.report.tasks.values()) - self.report.tasks[SUCCEED]
        if bad > NAMED_MAX:
            self.say(f"{bad:,} in all did not succeed: see {self.report_path}")


def _text(request: Any) -> str:
    try:
        return json.dumps(request)
    except RecursionError:
        return "(nested too deeply)"
