"""How many tasks may fail before no more are started: ``N``, or ``P%`` of all of them. Pure."""

from __future__ import annotations

import re

from pilotq.broker.errors import InvalidInput

_LIMIT = re.compile(r"([0-9]{1,15})|([0-9]{1,3}(?:\.[0-9]{1,6})?)%")


def failures_allowed(text: str, total: int) -> int:
    """The number of ``total`` tasks that may fail; raises InvalidInput for what is no number and no percentage.

    >>> [failures_allowed(text, 30) for text in ("3", "5%", "0")]
    [3, 1, 0]
    """
    match = _LIMIT.fullmatch(text)
    if match is not None and match[2] and float(match[2]) > 100:
        raise InvalidInput(f"{text!r}: a percentage is from 0 to 100")
    if match is None:
        raise InvalidInput(f"{text!r} is no number of tasks and no percentage: write 20, or 5%")
    return int(match[1]) if match[1] else int(float(match[2]) * total / 100 + 1e-9)
