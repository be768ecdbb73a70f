"""How a user says that they want to end: Ctrl-C, SIGTERM, a closed terminal."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class Interrupts:
    """Counts the user's wishes to end: Ctrl-C is one; SIGTERM and a closed terminal are as good as two.

    In an allocation SIGUSR1 and SIGTERM are Slurm's words that it ends: ``wish`` is how the pilot then shall.
    """

    def __init__(self, *, allocation: bool = False) -> None:
        self.count = 0
        self.wish = ""
        self._slurm = {signal.SIGUSR1: "walltime", signal.SIGTERM: "stop"} if allocation else {}
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        for number in {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, *self._slurm}:
            self._before[number] = signal.signal(number, self._arrived)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _arrived(self, number: int, _frame: FrameType | None) -> None:
        if number in self._slurm:
            self.wish = self._slurm[signal.Signals(number)]
        else:
            self.count += 1 if number == signal.SIGINT else 2
