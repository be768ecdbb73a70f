"""Runs a pilot that was started for one purpose, from its first task until it has ended."""

from __future__ import annotations

import time

import click

from pilotq.broker.client.archive import Archive
from pilotq.broker.client.broker import Broker
from pilotq.broker.client.views import Counts
from pilotq.broker.errors import ServerUnavailable, WaitTimedOut
from pilotq.broker.pilot.start import ALLOCATION_ENDED, StartedPilot
from pilotq.cli import formatting, progress
from pilotq.cli.failure_stop import FailureStop
from pilotq.cli.interrupts import Interrupts
from pilotq.cli.pilot_options import differences, pilot_failure, plural

POLL_S = 0.25  # how often the progress is read, and whether all is done
MODES = ("stop", "drain", "now")  # how the pilot ends, by the number of the user's requests to end


class Lifetime:
    """A pilot and the one purpose it serves, which a subclass defines by `begin`, `done`, `complete` and `close`."""

    program = "pilotq"
    poll_s = POLL_S

    def __init__(self, pilot: StartedPilot, interrupts: Interrupts, shown: progress.Silent) -> None:
        self.pilot = pilot
        self.interrupts = interrupts
        self.shown = shown
        self.counts = Counts()
        self.began = 0.0  # unix seconds, as is the next
        self.ended = 0.0  # when the last task had
        self.cores = 0  # of all nodes, as they were at the end
        self.mode = MODES[0]  # how the pilot ends when nobody has asked for another way
        self.failure_stop = FailureStop("")
        self.cut_short = False  # the allocation has ended before all tasks had

    def run_to_end(self) -> None:
        """Begin, wait, and end the pilot; raises any failure, PilotFailed if it failed. No pilot is left then."""
        self.began = time.time()
        try:
            with Broker.connect(self.pilot.directory) as broker:
                try:
                    if self.failure_stop.limit:
                        self.failure_stop.before = broker.counts().failed  # of the run that this one resumes
                    self.begin(broker)
                    self._follow(broker)
                    self.ended = time.time()
                    self._count_cores(broker)
                    self._end(broker)
                    self.complete()
                finally:
                    self.close()
        except BaseException:
            # Whatever it is, the pilot served this purpose alone.
            self.pilot.process.terminate()
            self.pilot.process.wait()
            raise
        finally:
            self.shown.close()
        if self.pilot.process.returncode not in (0, ALLOCATION_ENDED):
            raise pilot_failure(self.pilot)
        if self.pilot.process.returncode == ALLOCATION_ENDED or self.interrupts.end_mode:
            self.counts = Archive(self.pilot).counts()  # some have ended since the last poll
            self.cut_short = self.counts.left > 0 and not self.interrupts.count

    # -- what a subclass defines ------------------------------------------------------------------------------------

    def begin(self, broker: Broker) -> None:
        """Submit the tasks."""

    def done(self, broker: Broker) -> bool:
        """Wait up to `poll_s` seconds; whether nothing is left to do. May raise WaitTimedOut in place of False."""
        self.counts = broker.wait(timeout=self.poll_s)
        return True

    def complete(self) -> None:
        """The pilot has ended, and its journal is complete."""

    def close(self) -> None:
        """Release what `begin` has opened."""

    # -- the steps ---------------------------------------------------------------------------------------------------

    def _pilot_ended(self) -> bool:
        return self.pilot.process.poll() is not None

    def _follow(self, broker: Broker) -> None:
        """Until all is done, the pilot has ended, or the user does not want to wait any more."""
        while not self.interrupts.count and not self.interrupts.end_mode and not self._pilot_ended():
            try:
                if self.done(broker):
                    return
            except WaitTimedOut:
                self._update_progress(broker)
                self._enforce_limit(broker)
            except ServerUnavailable:
                # The supervisor starts it again, or ends. A refused connection comes back at once.
                time.sleep(POLL_S)

    def _count_cores(self, broker: Broker) -> None:
        try:
            self.cores = sum(node.cores for node in broker.nodes())
            for sentence in differences(broker):
                self.say(sentence)
        except ServerUnavailable:
            pass  # it has ended: the planned number stands

    def _update_progress(self, broker: Broker) -> None:
        try:
            self.counts = broker.counts()
            self.shown.update(self.counts, broker.running())
        except ServerUnavailable:
            pass  # it has ended, or is being started again: the next poll shows which

    def _enforce_limit(self, broker: Broker) -> None:
        try:
            if sentence := self.failure_stop.enforce(broker, self.counts):
                self.say(sentence)
        except ServerUnavailable:
            pass  # the same

    def _end(self, broker: Broker) -> None:
        """End the pilot. After one Ctrl-C when nothing runs any more, after the next at once."""
        requested = ""
        while not self._pilot_ended():
            count = min(self.interrupts.count, 2)
            mode = MODES[count] if count else self.interrupts.end_mode or self.mode
            if requested != mode:
                self._request_end(broker, mode)
                requested = mode
            if count:
                self._update_progress(broker)
                time.sleep(POLL_S)
            else:
                time.sleep(0.01)

    def _request_end(self, broker: Broker, mode: str) -> None:
        try:
            if mode == "drain":
                # At once, and not only at the supervisor's next poll: from here on nothing starts after what ends.
                broker.pause(True)
            broker.request_stop(mode)
            if mode == "drain":
                running = broker.running()
                whom = "it" if running == 1 else "them"
                self.say(f"waiting for {plural(running, 'running task')}; Ctrl-C again ends {whom}")
            elif mode == "now" and self.interrupts.count:
                self.say("ending all running tasks")
        except ServerUnavailable:
            pass  # it is ending already

    def say(self, text: str) -> None:
        click.echo(f"{self.program}: {formatting.clean(text)}", err=True)
