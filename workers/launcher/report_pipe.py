"""A launcher's way up: records are collected and written as far as the pipe takes them, and the bell is rung."""

from __future__ import annotations

import os
import select
import time

from pilotq.workers.protocol import Up, frame

REPORT_MAX = 64  # records in a frame; more of them would make the control process wait for the first
BELL_S = 0.005  # how long the ends of lines that go on wait for company before the control process is woken
BELL_ENDS = 16  # ... or until there are so many


class Uplink:
    """``up`` and ``bell`` are the writing ends of two pipes; ``poll`` is told when the first is to be watched."""

    def __init__(self, up: int, bell: int, poll: select.epoll) -> None:
        self._up = up
        self._bell = bell
        self._poll = poll
        self._records: list[Up] = []
        self._unsent = bytearray()
        self.waiting = False  # for the pipe to take more
        self.deaf = False  # nobody reads any more
        self._news = 0  # ends that the bell was not rung for
        self._ring_at = 0.0  # monotonic: when they are old enough
        for end in (up, bell):
            os.set_blocking(end, False)

    def report(self, record: Up) -> None:
        self._records.append(record)
        if len(self._records) >= REPORT_MAX:
            self.flush()

    def flush(self) -> None:
        """Write what was reported, as far as the pipe takes it."""
        if self._unsent:
            self.urge()  # the ring at the time was for what came before
        if self._records:
            self._unsent += frame(self._records)
            self._records.clear()
        waiting = False
        while self._unsent and not waiting:
            try:
                del self._unsent[: os.write(self._up, self._unsent)]
            except BlockingIOError:
                waiting = True  # never wait here: the control process may be waiting for us to read
                self.ring()
            except OSError:
                self.deaf = True
                self._unsent.clear()
        if waiting and not self.waiting:
            self._poll.register(self._up, select.EPOLLOUT)
        elif self.waiting and not waiting:
            self._poll.unregister(self._up)
        self.waiting = waiting

    def mention(self) -> None:
        """What is reported in this turn can wait for company."""
        if not self._news:
            self._ring_at = time.monotonic() + BELL_S
        self._news += 1

    def urge(self) -> None:
        """What is reported in this turn cannot wait."""
        self._news += BELL_ENDS

    def ring_at(self) -> float | None:
        """When `ring_if_due` wants to be called; monotonic."""
        return self._ring_at if self._news else None

    def ring_if_due(self, now: float) -> None:
        if self._news and (self._news >= BELL_ENDS or now >= self._ring_at):
            self.ring()

    def ring(self) -> None:
        self._news = 0
        try:
            os.write(self._bell, b"!")
        except OSError:
            pass  # it is full of rings, or nobody hears any more: then the other pipes have closed, too
