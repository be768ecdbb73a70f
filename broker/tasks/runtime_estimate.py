"""A running estimate of how long tasks of one class take. Pure."""

from __future__ import annotations

import msgspec

CLASSES_MAX = 4096
FOLLOWS = 10


class RuntimeEstimate(msgspec.Struct):
    """How long tasks of a class take: a moving mean that follows changes within about `FOLLOWS` ends."""

    ends: int = 0
    mean_s: float = 0.0

    def add(self, seconds: float, number: int = 1) -> None:
        """So many tasks have run so long, on average."""
        self.ends += number
        weight = number / self.ends if self.ends <= FOLLOWS else 1 - (1 - 1 / FOLLOWS) ** number
        self.mean_s += (seconds - self.mean_s) * weight


class RuntimeEstimates:
    """The estimates by class, of the CLASSES_MAX classes in which a task ended last."""

    def __init__(self) -> None:
        self._estimates: dict[str, RuntimeEstimate] = {}

    def add(self, class_name: str, seconds: float, number: int = 1) -> None:
        """So many tasks of this class have run so long, on average."""
        estimate = self._estimates.pop(class_name, None) or RuntimeEstimate()
        estimate.add(seconds, number)
        self._estimates[class_name] = estimate  # the last one now
        if len(self._estimates) > CLASSES_MAX:
            del self._estimates[next(iter(self._estimates))]

    def get(self, class_name: str) -> RuntimeEstimate | None:
        return self._estimates.get(class_name)
