"""Writes a launcher's reports to its pipe, and wakes the reader by another one.

Messages are collected and written as far as the pipe takes them. The worker process sleeps until a byte arrives on the
wake pipe: reports that can wait a little share one.
"""

from __future__ import annotations

import os
import select
import time

from pilotq.workers.protocol import FromLauncher, encode_frame

REPORT_MAX = 64  # messages in a frame; more of them would make the worker process wait for the first
WAKE_DELAY_S = 0.010  # how long the ends of chained launches are collected before the worker process is woken
WAKE_REPORTS = 64  # ... or until there are so many


class ReportPipe:
    """Collects messages and writes them.

    ``up`` and ``wake`` are the writing ends of two pipes; ``poll`` gets the first while it is ``full``.

    The loop that owns it calls, once in each turn, `flush` and `wake_if_due`::

        reports.report(Exited(...))
        reports.defer_wake()    # or request_wake() where a core waits for an answer
        reports.flush()
        reports.wake_if_due(time.monotonic())
    """

    def __init__(self, up: int, wake: int, poll: select.epoll) -> None:
        self._up = up
        self._wake = wake
        self._poll = poll
        self._messages: list[FromLauncher] = []
        self._unsent = bytearray()
        self.full = False  # the pipe takes no more for now
        self.peer_closed = False  # nobody reads any more
        self._unseen = 0  # reports since the reader was woken
        self._wake_at = 0.0  # monotonic: when they are old enough
        for end in (up, wake):
            os.set_blocking(end, False)

    def report(self, message: FromLauncher) -> None:
        self._messages.append(message)
        if len(self._messages) >= REPORT_MAX:
            self.flush()

    def resend(self, rest: bytes) -> None:
        """Write what is left of a frame that somebody else has begun to write; before any other message."""
        self._unsent += rest
        self.flush()

    def flush(self) -> None:
        """Write what was reported, as far as the pipe takes it."""
        if self._unsent:
            self.request_wake()  # the wake at that time was for earlier messages
        if self._messages:
            self._unsent += encode_frame(self._messages)
            self._messages.clear()
        full = False
        while self._unsent and not full:
            try:
                del self._unsent[: os.write(self._up, self._unsent)]
            except BlockingIOError:
                full = True  # never wait here: the worker process may be waiting for us to read
                self.wake()
            except OSError:
                self.peer_closed = True
                self._unsent.clear()
        if full and not self.full:
            self._poll.register(self._up, select.EPOLLOUT)
        elif self.full and not full:
            self._poll.unregister(self._up)
        self.full = full

    def defer_wake(self) -> None:
        """The reports of this turn can wait for more: the reader is woken within WAKE_DELAY_S."""
        if not self._unseen:
            self._wake_at = time.monotonic() + WAKE_DELAY_S
        self._unseen += 1

    def request_wake(self) -> None:
        """The reports of this turn cannot wait: the reader is woken at the end of it."""
        self._unseen += WAKE_REPORTS

    def wake_at(self) -> float | None:
        """Monotonic time at which `wake_if_due` is to be called; None when nothing waits for it."""
        return self._wake_at if self._unseen else None

    def wake_if_due(self, now: float) -> None:
        if self._unseen and (self._unseen >= WAKE_REPORTS or now >= self._wake_at):
            self.wake()

    def wake(self) -> None:
        self._unseen = 0
        try:
            os.write(self._wake, b"!")
        except OSError:
            pass  # it is full of unread bytes, or its reader has ended: then the other pipes have closed, too
