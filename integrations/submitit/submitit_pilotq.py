"""submitit's plugin `pilotq`: jobs are tasks of a pilot. submitit finds it by the entry points of the package.

    executor = submitit.AutoExecutor(folder="log", cluster="pilotq")
    job = executor.submit(math.factorial, 20)
    print(job.result())

The id of a job is that of its task with a mark of its pilot: every pilot counts from 1, and the files of two must not
meet.
"""

from __future__ import annotations

import hashlib
import shlex
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from submitit.core import core, job_environment, logger, utils

from pilotq.broker import Broker, Request, Task
from pilotq.broker.client import private_pilot
from pilotq.broker.errors import NoPilot, PilotFailed, PilotqError, ServerUnavailable
from pilotq.broker.tasks.model import PRIORITY_LIMIT
from pilotq.broker.tasks.submit_context import capture_context

T = TypeVar("T")
REQUEUE_CODE = 144  # a job that is to run again, from its checkpoint, ends with it
TIMEOUT_MIN = 5  # submitit's own default
SIGNAL_DELAY_S = 30  # between the signal for a checkpoint and the end of the time limit
PICKLE_WAIT_S = 60
GONE_S = 60.0  # a server that does not answer for so long is considered gone
STATES = {
    "queued": "PENDING", "deferred": "PENDING", "scheduled": "PENDING", "started": "RUNNING", "finished": "COMPLETED",
    "failed": "FAILED", "stopped": "CANCELLED", "canceled": "CANCELLED",
}  # fmt: skip
LOST = "LOST"  # nobody can say any more what became of it
_lock = threading.Lock()  # a connection is of one thread at a time
_connections: dict[str, _Connection] = {}  # by the mark of the pilot


def _mark(broker: Broker) -> str:
    """The mark of a pilot: of the id of its data, which stays when it is resumed."""
    assert broker.pilot is not None, "it was found by its directory"
    return hashlib.sha256(broker.pilot.connection().queue_id.encode()).hexdigest()[:8]


class _Connection:
    """A pilot that jobs were submitted to, or are looked for in."""

    def __init__(self, broker: Broker) -> None:
        assert broker.pilot is not None, "it was found by its directory"
        self.broker = broker
        self.directory = broker.pilot.directory
        self.mark = _mark(broker)

    @staticmethod
    def to(directory: str | None) -> _Connection:
        """The pilot of a directory, or the one that runs here."""
        made = _Connection(Broker.connect(directory))
        known = _connections.setdefault(made.mark, made)
        if known is not made:
            made.broker.close()
        return known

    def statuses(self, ids: Sequence[str]) -> dict[str, str]:
        """Statuses by task: none of a pilot that has ended; "queued" while one that is alive does not answer."""
        try:
            return self.ask(lambda broker: broker.statuses(ids))
        except PilotqError:
            alive = self.broker.pilot is not None and self.broker.pilot.alive()
            return dict.fromkeys(ids, "queued") if alive else {}

    def submit(self, tasks: Sequence[Task]) -> list[str]:
        """Submit; again while the server does not answer: what has the same key is submitted once."""
        key, context = f"submitit-{uuid.uuid4().hex}", capture_context()
        give_up_at = time.monotonic() + GONE_S
        while True:
            try:
                return self.ask(lambda broker: broker.enqueue_many(tasks, key=key, context=context))
            except ServerUnavailable:
                if time.monotonic() > give_up_at:
                    raise
                time.sleep(0.05)

    def ask(self, question: Callable[[Broker], T]) -> T:
        """An answer; by a new connection where this one fails: a pilot that was resumed has other passwords."""
        with _lock:
            try:
                return question(self.broker)
            except PilotFailed:
                made = Broker.connect(self.directory)
                if _mark(made) != self.mark:
                    made.close()
                    raise NoPilot(f"another pilot runs in {self.directory} now") from None
                self.broker.close()
                self.broker = made
                return question(made)


def _parts(job_id: str) -> tuple[str, str]:
    """The task of a job, and the mark of its pilot."""
    task_id, _, mark = job_id.rpartition("-")
    return task_id, mark


class PilotqInfoWatcher(core.InfoWatcher):
    """Asks for the states of all jobs that have not ended, in one call for each pilot."""

    def update_if_long_enough(self, mode: str) -> None:
        """Ask again at most each half a second; at once when ``mode`` is "force", and never when it is "cache"."""
        pause = {"force": 0.001, "cache": float("inf")}.get(mode, 0.5)
        if time.time() - self._last_status_check > pause:
            self.update()

    def update(self) -> None:
        """Ask."""
        self._num_calls += 1
        asked: dict[str, list[str]] = {}
        for job_id in self._registered - self._finished:
            asked.setdefault(_parts(job_id)[1], []).append(job_id)
        for mark, job_ids in asked.items():
            states = self._states(mark, [_parts(job_id)[0] for job_id in job_ids])
            for job_id in job_ids:
                self._info_dict[job_id] = {"State": states.get(_parts(job_id)[0], LOST)}
        self._last_status_check = time.time()
        self._finished |= {i for i in self._registered - self._finished if self.is_done(i, mode="cache")}

    @staticmethod
    def _states(mark: str, tasks: list[str]) -> dict[str, str]:
        if mark not in _connections:
            try:  # a job of another program: its pilot may be the one that runs here
                with _lock:
                    _Connection.to(None)
            except PilotqError:
                pass
        if mark not in _connections:
            return {}
        return {task: STATES.get(word, LOST) for task, word in _connections[mark].statuses(tasks).items()}

    def get_state(self, job_id: str, mode: str = "standard") -> str:
        """PENDING, RUNNING, COMPLETED, FAILED, CANCELLED; LOST for a job that no pilot here knows."""
        return str(self.get_info(job_id, mode=mode).get("State", "UNKNOWN"))


class PilotqJob(core.Job[core.R]):
    """A job on a pilot. In another program `PilotqJob(folder, job_id)` is the same job, where its pilot runs."""

    watcher = PilotqInfoWatcher()

    def cancel(self, check: bool = True) -> None:
        """Cancel the task, also one that runs."""
        task_id, mark = _parts(self.job_id)
        self.watcher.get_state(self.job_id, mode="force")
        if mark not in _connections:
            if check:
                raise RuntimeError(f"job {self.job_id} cannot be canceled: its pilot does not run here")
            return
        _connections[mark].ask(lambda broker: broker.cancel([task_id]))

    def wait(self) -> None:
        """Wait until the job has ended."""
        while not self.done():
            time.sleep(0.05)


class PilotqJobEnvironment(job_environment.JobEnvironment):
    """What a job finds out about itself."""

    _env: ClassVar[dict[str, str]] = {
        "job_id": "SUBMITIT_PILOTQ_JOB_ID",
        "num_tasks": "SUBMITIT_PILOTQ_NTASKS",
        "num_nodes": "SUBMITIT_PILOTQ_NNODES",
        "node": "SUBMITIT_PILOTQ_NODEID",
        "global_rank": "SUBMITIT_PILOTQ_RANK",
        "local_rank": "SUBMITIT_PILOTQ_RANK",
    }

    def _requeue(self, countdown: int) -> None:
        logger.get_logger().info(f"Requeued job {self.job_id} ({countdown} remaining timeouts)")
        sys.exit(REQUEUE_CODE)


class PilotqExecutor(core.PicklingExecutor):
    """Submits jobs to the pilot of ``dir`` or the one that runs here, else to a private one with ``nodes``.

    Jobs outlive the program in a pilot of your own; a private one ends with the program.
    """

    job_class = PilotqJob

    def __init__(
        self,
        folder: str | Path,
        max_num_timeout: int = 3,
        max_pickle_size_gb: float = 1.0,
        python: str | None = None,
        dir: str | None = None,
        nodes: int | str | None = None,
    ) -> None:
        super().__init__(folder, max_num_timeout=max_num_timeout, max_pickle_size_gb=max_pickle_size_gb)
        self.python = shlex.quote(sys.executable) if python is None else python
        pilot = None if nodes is not None and dir is None else private_pilot.running(dir)
        if pilot is None:
            pilot = private_pilot.start(nodes)
            private_pilot.end_with_program(pilot)
        with _lock:
            self._connection = _Connection.to(pilot.directory)

    @classmethod
    def affinity(cls) -> int:
        """Used where it is named, and never chosen instead of a cluster."""
        return 0

    @classmethod
    def _valid_parameters(cls) -> set[str]:
        return {"priority", "setup", "signal_delay_s"}

    def _internal_update_parameters(self, **kwargs: Any) -> None:
        if kwargs.get("nodes", 1) > 1:
            raise ValueError("a job of submitit is on one node of a pilot: use nodes=1, and more tasks_per_node")
        super()._internal_update_parameters(**kwargs)

    def _internal_process_submissions(self, delayed_submissions: list[utils.DelayedSubmission]) -> list[core.Job[Any]]:
        folder = utils.JobPaths.get_first_id_independent_folder(self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        pickles = []
        for delayed in delayed_submissions:
            pickles.append(folder / f"{uuid.uuid4().hex}.pkl")
            delayed.set_timeout(self.parameters.get("timeout_min", TIMEOUT_MIN), self.max_num_timeout)
            delayed.dump(pickles[-1])
        task = self._task()
        ids = self._connection.submit([task] * len(pickles))
        jobs: list[core.Job[Any]] = []
        for task_id, path in zip(ids, pickles, strict=True):
            job = self.job_class(self.folder, f"{task_id}-{self._connection.mark}", range(self._num_tasks()))
            job.paths.move_temporary_file(path, "submitted_pickle")
            jobs.append(job)
        return jobs

    def _task(self) -> Task:
        get = self.parameters.get
        number = self._num_tasks()
        cores = max(int(get("cpus_per_task", 1)), 1) * number
        limit = float(get("timeout_min", TIMEOUT_MIN)) * 60
        out, err = (str(path) for path in self._logs("{id}-" + self._connection.mark, 0))
        return Task(
            command=["bash", "-c", self._text(limit)],
            name=get("name"),
            request=Request(
                cores=(cores, cores), memory=int(float(get("mem_gb", 0)) * 2**30), gpus=int(get("gpus_per_node", 0))
            ),
            time_limit=limit,
            priority=max(-PRIORITY_LIMIT, min(int(get("priority", 0)), PRIORITY_LIMIT)),
            retries=self.max_num_timeout + 1,
            retry_on=str(REQUEUE_CODE),
            stdout=out,
            stderr=None if get("stderr_to_stdout") else err,
            env={
                "SUBMITIT_EXECUTOR": "pilotq",
                "SUBMITIT_PILOTQ_NTASKS": str(number),
                "SUBMITIT_PILOTQ_NNODES": "1",
                "SUBMITIT_PILOTQ_NODEID": "0",
                "SUBMITIT_PILOTQ_RANK": "0",
            },
        )

    def _logs(self, job_id: str, rank: int) -> tuple[Path, Path]:
        paths = utils.JobPaths(self.folder, job_id=job_id, task_id=rank)
        return paths.stdout, paths.stderr

    def _text(self, limit: float) -> str:
        """Code that waits for the job's pickle, which has the task's id in its name, and runs it on all ranks."""
        here = "PILOTQ-JOB-ID"

        def quoted(path: Path) -> str:
            parts = map(shlex.quote, str(path).split(here))
            return '"$SUBMITIT_PILOTQ_JOB_ID"'.join(parts)

        pickle = quoted(utils.JobPaths(self.folder, job_id=here).submitted_pickle)
        delay = min(float(self.parameters.get("signal_delay_s", SIGNAL_DELAY_S)), 0.2 * limit)
        signal = job_environment.JobEnvironment.USR_SIG
        run = f"timeout --foreground --preserve-status -s {signal} {limit - delay:.3f} {self._submitit_command_str}"
        merged = bool(self.parameters.get("stderr_to_stdout"))
        lines = [
            f'export SUBMITIT_PILOTQ_JOB_ID="$PILOTQ_TASK_ID-{self._connection.mark}"',
            *(["exec 2>&1"] if merged else []),
            f"for tries in $(seq {PICKLE_WAIT_S * 20}); do [ -e {pickle} ] && break; sleep 0.05; done",
            *(f"{line} || exit" for line in _lines(self.parameters.get("setup", ()))),
        ]
        if self._num_tasks() == 1:
            return "\n".join([*lines, f"exec {run}"])
        # The first has the files of the task, which pilotq looks after: a second execution does not empty them.
        lines.append(f"SUBMITIT_PILOTQ_RANK=0 {run} &")
        for rank in range(1, self._num_tasks()):
            out, err = map(quoted, self._logs(here, rank))
            lines.append(f"SUBMITIT_PILOTQ_RANK={rank} {run} >{out} 2>{'&1' if merged else err} &")
        # The first rank ends so when all are to run again; the others do not know.
        lines.append(f"code=0; for rank in $(seq {self._num_tasks()}); do wait -n; ended=$?")
        lines.append(f"[ $ended != {REQUEUE_CODE} ] || exit $ended; [ $ended = 0 ] || code=$ended; done; exit $code")
        return "\n".join(lines)

    @property
    def _submitit_command_str(self) -> str:
        return f"{self.python} -u -m submitit.core._submit {shlex.quote(str(self.folder))}"

    def _num_tasks(self) -> int:
        return max(int(self.parameters.get("tasks_per_node", 1)), 1)

    # What PicklingExecutor asks for, and the method above replaces.
    def _make_submission_file_text(self, command: str, uid: str) -> str:  # noqa: ARG002
        return command

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:  # noqa: ARG002
        return []

    @staticmethod
    def _get_job_id_from_submission_command(string: bytes | str) -> str:
        return str(string)


def _lines(setup: str | Iterable[str]) -> Iterable[str]:
    return [setup] if isinstance(setup, str) else setup
