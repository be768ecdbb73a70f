"""Signals that ask a command to end: Ctrl-C, SIGTERM, a closed terminal, and those of Slurm."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class Interrupts:
    """Counts the user's requests to end: Ctrl-C is one; SIGTERM and a closed terminal count as two.

    In an allocation SIGUSR1 and SIGTERM are Slurm's notice of its end: ``end_mode`` is how the pilot then ends.

        with Interrupts() as interrupts:
            while not interrupts.count:
                ...
    """

    def __init__(self, *, allocation: bool = False) -> None:
        self.count = 0
        self.end_mode = ""
        self._end_modes = {signal.SIGUSR1: "walltime", signal.SIGTERM: "stop"} if allocation else {}
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        for number in {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, *self._end_modes}:
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if number in self._end_modes:
            self.end_mode = self._end_modes[signal.Signals(number)]
        else:
            self.count += 1 if number == signal.SIGINT else 2
