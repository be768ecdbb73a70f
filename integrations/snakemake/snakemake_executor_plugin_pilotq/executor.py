"""`Executor`: submits Snakemake's jobs to a pilot, follows and cancels them."""

from __future__ import annotations

import os
import shlex
import socket
import time
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any

from snakemake_interface_common.exceptions import WorkflowError
from snakemake_interface_executor_plugins.executors.base import SubmittedJobInfo
from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor

from pilotq.broker import Broker, Task
from pilotq.broker.client import private_pilot
from pilotq.broker.errors import InvalidInput, PilotqError, ServerUnavailable, WaitTimedOut
from pilotq.broker.tasks.states import ENDED
from pilotq.broker.tasks.submit_context import capture_context
from snakemake_executor_plugin_pilotq import runs, tasks
from snakemake_executor_plugin_pilotq.runs import Run

BATCH_MAX = 200  # jobs in one submission
CHECK_MIN_S, CHECK_MAX_S = 0.05, 1.0  # between two looks at what is under way ...
CHECK_SHARE = 10  # ... each of which is followed by a pause of so many times its length
GONE_S = 60.0  # a server that does not answer for so long is considered gone
CANCEL_S = 60.0  # how long tasks may take to end that were canceled
LOGS = os.path.join(".snakemake", "pilotq_logs")


class Executor(RemoteExecutor):
    """Runs the jobs of one workflow on the pilot that `ExecutorSettings` names, finds or starts."""

    def __post_init__(self) -> None:
        settings = self.workflow.executor_settings
        self._open: dict[str, SubmittedJobInfo] = {}  # by task id
        self._said: set[str] = set()
        self._answered_at = time.monotonic()
        self._private = None
        self._elsewhere = False
        try:
            pilot = None if settings.nodes and not settings.dir else private_pilot.running(settings.dir)
            if pilot is None:
                pilot = self._private = private_pilot.start(settings.nodes)
            self._broker = Broker.connect(pilot.directory)
            self._reader = Broker.connect(pilot.directory)  # that of the thread that checks
            self._directory = pilot.directory
            self._run = Run()
            self._queue = self._run.queue
            self.logger.info(f"Jobs run as tasks of the pilot in {pilot.directory}, queue {self._queue}.")
            self._resumable = self._take_over()
        except (PilotqError, OSError) as error:
            self._end_pilot()
            super().shutdown()  # at the end of the program its thread would print an error that is none
            raise WorkflowError(f"The executor pilotq has no pilot: {error}") from None

    # -- submitting -------------------------------------------------------------------------------------------------

    def run_jobs(self, jobs: list[Any]) -> None:
        """Submit jobs, many in one call."""
        for first in range(0, len(jobs), BATCH_MAX):
            part = jobs[first : first + BATCH_MAX]
            for job in part:
                self.run_job_pre(job)
            self._submit(part)

    def run_job(self, job: Any) -> None:
        """Submit one job."""
        self._submit([job])

    def _submit(self, jobs: list[Any]) -> None:
        from snakemake.exceptions import RuleException

        self._look_elsewhere()
        made: list[tuple[Any, Task]] = []
        for job in jobs:
            if (task_id := self._resumed(job)) is not None:
                self.logger.info(f"Job {job.jobid} goes on as task {task_id}.")
                self._register(job, task_id)
                continue
            try:
                made.append((job, self._task(job)))
            # Of this job alone: its command cannot be formatted, an output is protected.
            except (WorkflowError, RuleException) as error:
                self.report_job_error(SubmittedJobInfo(job), msg=f"{error} ")
        if not made:
            return
        context = capture_context()
        # The Snakemake of a job must not take the options of this one.
        context.env.pop(b"SNAKEMAKE_PROFILE", None)
        key = f"{self._queue}.{os.urandom(8).hex()}"
        try:
            ids = self._until_answered(key, [task for _, task in made], context)
        except InvalidInput as error:
            if len(made) == 1:
                self.report_job_error(SubmittedJobInfo(made[0][0]), msg=f"The job was not submitted: {error}. ")
                return
            for job, _ in made:  # some of them are wrong
                self._submit([job])
            return
        for (job, _), task_id in zip(made, ids, strict=True):
            self.logger.debug(f"Submitted job {job.jobid} as task {task_id}.")
            self._register(job, task_id)

    def _look_elsewhere(self) -> None:
        """Find out whether a node of the pilot is on another host: nodes may join late."""
        if not self._elsewhere:
            with suppress(PilotqError):
                self._elsewhere = any(node.host != socket.gethostname() for node in self._broker.nodes())

    def _until_answered(self, key: str, wanted: list[Task], context: Any) -> list[str]:
        """Submit; again while the server does not answer: what has the same key is submitted once."""
        give_up_at = time.monotonic() + GONE_S
        while True:
            try:
                return self._broker.enqueue_many(wanted, key=key, context=context)
            except ServerUnavailable as error:
                if time.monotonic() > give_up_at:
                    raise WorkflowError(f"The pilot in {self._directory} does not answer: {error}") from None
                time.sleep(CHECK_MIN_S)
            except InvalidInput:
                raise
            except PilotqError as error:
                raise WorkflowError(f"The pilot in {self._directory} takes no jobs: {error}") from None

    def _register(self, job: Any, task_id: str) -> None:
        info = SubmittedJobInfo(job, external_jobid=f"{task_id}@{self._directory}", aux={"task": task_id})
        self._open[task_id] = info
        self.report_job_submission(info)

    def _task(self, job: Any) -> Task:
        self._say_what_is_ignored(job)
        latency = int(self.workflow.execution_settings.latency_wait)
        may_be_plain = not self.workflow.executor_settings.spawn and self.is_default_jobscript
        if may_be_plain and tasks.is_plain(job, self.workflow):
            plain = tasks.plain_command(job, elsewhere=self._elsewhere, latency=latency)
            if plain is not None:
                self.workflow.async_run(job.prepare())
                return tasks.task_of(job, *plain, queue=self._queue)
        if self.is_default_jobscript:
            text = self.format_job_exec(job)
        else:
            jobscript = self.get_jobscript(job)
            self.write_jobscript(job, jobscript)
            text = f"exec {shlex.quote(jobscript)}"
        return tasks.task_of(job, ["/bin/sh", "-c", text], {}, queue=self._queue)

    def _say_what_is_ignored(self, job: Any) -> None:
        for name in ("disk_mb", "disk"):
            if job.resources.get(name) and "disk" not in self._said:
                self._said.add("disk")
                self.logger.info(f"A pilot does not reserve disk space: {name} is ignored.")

    # -- what a killed Snakemake has left ---------------------------------------------------------------------------

    def _take_over(self) -> set[str]:
        """Open tasks of runs that were killed in this directory, with which jobs of this one go on.

        The others are canceled: two tasks must not write the same file.
        """
        self._dead = self._run.dead()
        left = {
            view.id
            for status in ("started", "queued", "deferred")
            for view in self._broker.tasks(status=status, limit=1_000_000)
            if view.queue in self._dead
        }
        known = {self._task_of(job) for job in self.dag.needrun_jobs()} if left else set[str | None]()
        if gone := left - known:
            self.logger.info(f"Canceling {len(gone)} tasks of an earlier run in this directory.")
            self._cancel(sorted(gone))
        return left & known

    def _task_of(self, job: Any) -> str | None:
        """The task of an incomplete job, if it is one of this pilot."""
        task_id, _, directory = (self.dag.incomplete_external_jobid(job) or "").partition("@")
        return task_id if directory == self._directory else None

    def _resumed(self, job: Any) -> str | None:
        if not self._resumable or job.attempt > 1:
            return None
        found = {self._task_of(each) for each in (job if job.is_group() else [job])} & self._resumable
        if len(found) != 1:
            return None
        self._resumable -= found
        return found.pop()

    # -- following --------------------------------------------------------------------------------------------------

    async def check_active_jobs(self, active_jobs: list[SubmittedJobInfo]) -> AsyncGenerator[SubmittedJobInfo, None]:
        """Report what has ended; yield the rest. One call for all."""
        self.next_seconds_between_status_checks = CHECK_MIN_S
        if not active_jobs:
            return
        began = time.monotonic()
        try:
            statuses = self._reader.statuses(info.aux["task"] for info in active_jobs)
            self._answered_at = time.monotonic()
        except (PilotqError, OSError) as error:
            if time.monotonic() > self._answered_at + GONE_S or not self._alive():
                raise WorkflowError(f"The pilot in {self._directory} is gone: {error}") from None
            statuses = {}
        spent = time.monotonic() - began
        self.next_seconds_between_status_checks = min(max(CHECK_MIN_S, CHECK_SHARE * spent), CHECK_MAX_S)
        for info in active_jobs:
            task_id = info.aux["task"]
            status = statuses.get(task_id, "queued")
            if status == "finished":
                self._open.pop(task_id, None)
                self.report_job_success(info)
            elif status in ENDED or status == "unknown":
                self._open.pop(task_id, None)
                self._report_failure(info, task_id)
            else:
                yield info

    def _alive(self) -> bool:
        return self._reader.pilot is not None and self._reader.pilot.alive()

    def _report_failure(self, info: SubmittedJobInfo, task_id: str) -> None:
        try:
            explained = self._reader.explain(task_id)
            why = f"Task {task_id} {explained.status}: {'; '.join(explained.why)}. "
        except PilotqError as error:
            why = f"Task {task_id}: {error}. "
        self.report_job_error(info, msg=why, aux_logs=self._keep_output(info, task_id))

    def _keep_output(self, info: SubmittedJobInfo, task_id: str) -> list[str]:
        """The file with the output of a job that has failed: the pilot may be gone when somebody looks for it."""
        path = os.path.join(LOGS, f"{str(info.job.name).replace(os.sep, '_')}.{task_id}.log")
        try:
            with suppress(PilotqError):
                pieces = [b"".join(self._reader.output(task_id, stream)) for stream in ("stdout", "stderr")]
                if any(pieces):
                    os.makedirs(LOGS, exist_ok=True)
                    with open(path, "wb") as file:
                        file.writelines(pieces)
                    return [path]
        except OSError as error:
            self.logger.warning(f"The output of task {task_id} cannot be kept in {path}: {error.strerror}.")
        return []

    # -- ending -----------------------------------------------------------------------------------------------------

    def cancel_jobs(self, active_jobs: list[SubmittedJobInfo]) -> None:
        """Cancel jobs, also those that are being checked at this moment, and wait until they have ended."""
        ids = dict.fromkeys([info.aux["task"] for info in active_jobs] + list(self._open))
        try:
            self._cancel(list(ids))
            self._open.clear()
        except (PilotqError, WorkflowError) as error:
            self.logger.warning(f"Jobs may run on in the pilot in {self._directory}: {error}")

    def _cancel(self, ids: list[str]) -> None:
        if not ids:
            return
        self._broker.cancel(ids)
        try:
            self._broker.wait(ids, timeout=CANCEL_S)
        except WaitTimedOut as error:
            raise WorkflowError(f"Tasks that were canceled have not ended: {error}") from None

    def shutdown(self) -> None:
        """End the thread that checks, and a private pilot."""
        super().shutdown()
        for queue in self._dead if not self._open else ():
            runs.remove(queue)
        self._run.end(forget=not self._open)
        self._end_pilot()

    def _end_pilot(self) -> None:
        for name in ("_broker", "_reader"):
            if (broker := getattr(self, name, None)) is not None:
                broker.close()
        pilot, self._private = self._private, None
        if pilot is not None:
            private_pilot.end(pilot)
