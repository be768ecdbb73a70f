"""A running estimate of how long tasks of one class take. Pure."""

from __future__ import annotations

import msgspec


class RuntimeEstimate(msgspec.Struct):
    """How long tasks of a class take: a moving mean that follows changes within about ten ends."""

    ends: int = 0
    mean_s: float = 0.0

    def add(self, seconds: float) -> None:
        self.ends += 1
        self.mean_s += (seconds - self.mean_s) / min(self.ends, 10)
