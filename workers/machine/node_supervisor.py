"""Supervises the worker of a node that has no other supervisor, and starts it again when it dies.

The worker is a fork of this process, so that a node has one start of Python to wait for. The kernel ends it with the
node supervisor. When the worker has died, the node supervisor ends the processes that it has left, reports the loss to
the queue, and starts the next one. Where the allocation is another than the pilot's it also reports its end.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable
from contextlib import suppress

from pilotq.broker.errors import PilotFailed, ServerUnavailable
from pilotq.broker.log import log, log_as
from pilotq.broker.pilot.queue_client import announce_loss
from pilotq.broker.processes import RestartBudget, become_subreaper, open_pidfd, reap_orphans, terminate_with
from pilotq.broker.settings import Settings
from pilotq.broker.slurm.end_reporter import AllocationEndReporter
from pilotq.broker.store.connection import Connection

POLL_S = 0.5  # without a pidfd, and for the end reporter
ENDING = (signal.SIGTERM, signal.SIGHUP)


class NodeSupervisor:
    """Starts the worker of a node, and starts it again when it has died.

    ``work`` runs the worker, and returns its exit code; ``clean`` ends the processes that a dead one has left.
    """

    def __init__(
        self, node: str, link: Connection, end_reporter: AllocationEndReporter, work: Callable[[], int],
        clean: Callable[[], object], settings: Settings, *, until_eof: bool = False,
    ) -> None:  # fmt: skip
        self._node = node
        self._link = link
        self._end_reporter = end_reporter
        self._work = work
        self._clean = clean
        self._settings = settings
        self._until_eof = until_eof
        self._pid = 0
        self._waited = True  # no process of ours has this number any more
        self._ending = False

    def run(self, log_path: str) -> int:
        """Until the worker has left, or died too often: its exit code. Its log goes to ``log_path``."""
        log_as("node supervisor", self._node)
        become_subreaper()
        for number in ENDING:
            signal.signal(number, self._end)
        signal.signal(signal.SIGINT, lambda *_: None)
        signal.signal(signal.SIGUSR1, lambda *_: None)
        try:
            self._end_reporter.report_first(lambda: self._ending)
            return self._supervise(log_path)
        finally:
            self._end_reporter.close()

    def _supervise(self, log_path: str) -> int:
        budget = RestartBudget(self._settings.restart_limit, self._settings.restart_window_s)
        while True:
            self._clean()
            if self._ending:
                return 0
            self._start(log_path)
            status = self._wait()
            code = os.waitstatus_to_exitcode(status)
            # 3: it has given up by itself, after it had ended its tasks.
            if self._ending or code in (0, PilotFailed.exit_code):
                return max(code, 0)
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            log(f"the worker of node {self._node} {how}", level="warning")
            self._clean()
            self._report_loss(f"its worker {how}")
            if not budget.take(time.monotonic()):
                log(
                    f"the worker of node {self._node} died {budget.limit + 1} times within {budget.window:.0f} s",
                    level="error",
                )
                return PilotFailed.exit_code

    def _start(self, log_path: str) -> None:
        supervisor = os.getpid()
        # A signal to end that arrives now is for the worker, too: it may not be lost between the two.
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        self._pid = os.fork()
        if self._pid:
            self._waited = False
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
            if self._ending:
                self._end()
            return
        code = 1
        try:
            for number in (*ENDING, signal.SIGINT, signal.SIGUSR1):
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
            terminate_with(supervisor)
            file = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            os.dup2(file, 1)
            os.dup2(file, 2)
            code = self._work()
        finally:
            # No code of the node supervisor may run on in the fork.
            os._exit(code)

    def _wait(self) -> int:
        """Its exit status; its orphans are reaped meanwhile."""
        pidfd = open_pidfd(self._pid)
        poll = select.poll()
        if pidfd is not None:
            poll.register(pidfd, select.POLLIN)
        if self._until_eof:
            poll.register(0, select.POLLIN)
        try:
            while True:
                ready = dict(poll.poll(POLL_S * 1000))
                if 0 in ready and not os.read(0, 4096):
                    poll.unregister(0)
                    self._until_eof = False
                    log("the process that started this worker has ended: the worker leaves")
                    self._end()
                reap_orphans({self._pid, self._end_reporter.pid})
                pid, status = os.waitpid(self._pid, os.WNOHANG)
                if pid:
                    self._waited = True
                    return status
                self._end_reporter.poll(time.monotonic())
        finally:
            if pidfd is not None:
                os.close(pidfd)

    def _end(self, *_: object) -> None:
        self._ending = True
        if not self._waited:
            with suppress(ProcessLookupError):  # it has ended
                os.kill(self._pid, signal.SIGTERM)

    def _report_loss(self, why: str) -> None:
        """Report that it is dead; without a server the registration of its next incarnation shows it."""
        try:
            announce_loss(self._link, self._node, self._pid, why)
        except ServerUnavailable as error:
            log(f"its loss could not be reported: {error}", level="warning")
        finally:
            self._link.close()
