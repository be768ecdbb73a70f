"""The life of a pilot that was started for one purpose: from its first task until nothing of it is left."""

from __future__ import annotations

import time

import click

from pilotq.broker.client.archive import Archive
from pilotq.broker.client.broker import Broker
from pilotq.broker.client.views import Counts
from pilotq.broker.errors import ServerUnavailable, WaitTimedOut
from pilotq.broker.pilot.start import CUT_SHORT, StartedPilot
from pilotq.cli import formatting, progress
from pilotq.cli.interrupts import Interrupts
from pilotq.cli.pilot_options import failure, plural

LOOK_S = 0.25  # how often the progress is looked at
MODES = ("stop", "drain", "now")  # how the pilot ends, by the number of the user's wishes to end


class Lifetime:
    """One purpose; a subclass says what it is by `begin`, `done`, `complete` and `close`."""

    program = "pilotq"

    def __init__(self, pilot: StartedPilot, interrupts: Interrupts, shown: progress.Silent) -> None:
        self.pilot = pilot
        self.interrupts = interrupts
        self.shown = shown
        self.counts = Counts()
        self.began = 0.0  # unix seconds, as is the next
        self.ended = 0.0  # when the last task had
        self.cores = 0  # of all nodes, as they were at the end
        self.cut_short = False  # the allocation has ended before all tasks had

    def live(self) -> None:
        """All of it; raises what made it fail, and PilotFailed when the pilot did. The pilot is gone then."""
        self.began = time.time()
        try:
            with Broker.connect(self.pilot.directory) as broker:
                try:
                    self.begin(broker)
                    self._follow(broker)
                    self.ended = time.time()
                    self._count_cores(broker)
                    self._end(broker)
                    self.complete()
                finally:
                    self.close()
        except BaseException:
            # Whatever it is, the pilot was for this alone.
            self.pilot.process.terminate()
            self.pilot.process.wait()
            raise
        finally:
            self.shown.close()
        if self.pilot.process.returncode not in (0, CUT_SHORT):
            raise failure(self.pilot)
        if self.pilot.process.returncode == CUT_SHORT or self.interrupts.wish:
            self.counts = Archive(self.pilot).counts()  # some have ended since the last look
            self.cut_short = self.counts.left > 0 and not self.interrupts.count

    # -- what a subclass says ---------------------------------------------------------------------------------------

    def begin(self, broker: Broker) -> None:
        """Submit what it is about."""

    def done(self, broker: Broker) -> bool:
        """Wait up to LOOK_S seconds; whether nothing is left to do. May raise WaitTimedOut to say no."""
        self.counts = broker.wait(timeout=LOOK_S)
        return True

    def complete(self) -> None:
        """The pilot has ended, and its journal is complete."""

    def close(self) -> None:
        """Give back what `begin` has opened."""

    # -- what happens -----------------------------------------------------------------------------------------------

    def _over(self) -> bool:
        return self.pilot.process.poll() is not None

    def _follow(self, broker: Broker) -> None:
        """Until all is done, the pilot has ended, or the user does not want to wait any more."""
        while not self.interrupts.count and not self.interrupts.wish and not self._over():
            try:
                if self.done(broker):
                    return
            except WaitTimedOut:
                self._look(broker)
            except ServerUnavailable:
                # The supervisor starts it again, or ends. A refused connection comes back at once.
                time.sleep(LOOK_S)

    def _count_cores(self, broker: Broker) -> None:
        try:
            self.cores = sum(node.cores for node in broker.nodes())
        except ServerUnavailable:
            pass  # it has ended: what was planned stands

    def _look(self, broker: Broker) -> None:
        try:
            self.counts = broker.counts()
            self.shown.update(self.counts, broker.running())
        except ServerUnavailable:
            pass  # it has ended, or is on its way back: the next look tells

    def _end(self, broker: Broker) -> None:
        """End the pilot. After one Ctrl-C when nothing runs any more, after the next at once."""
        said = ""
        while not self._over():
            count = min(self.interrupts.count, 2)
            mode = MODES[count] if count or not self.interrupts.wish else self.interrupts.wish
            if said != mode:
                self._ask(broker, mode)
                said = mode
            if count:
                self._look(broker)
                time.sleep(LOOK_S)
            else:
                time.sleep(0.01)

    def _ask(self, broker: Broker, mode: str) -> None:
        try:
            if mode == "drain":
                # At once, and not when the supervisor looks: what ends from here on is followed by nothing.
                broker.pause(True)
            broker.request_stop(mode)
            if mode == "drain":
                running = broker.running()
                whom = "it" if running == 1 else "them"
                self.say(f"waiting for {plural(running, 'running task')}; Ctrl-C again ends {whom}")
            elif mode == "now":
                self.say("ending what runs")
        except ServerUnavailable:
            pass  # it is ending already

    def say(self, text: str) -> None:
        click.echo(f"{self.program}: {formatting.clean(text)}", err=True)
