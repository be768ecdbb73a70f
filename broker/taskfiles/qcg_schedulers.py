"""The iteration schedulers of QCG-PilotJob: how many cores (or nodes) each element of an iteration gets. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pilotq.broker.errors import InvalidInput


def plan(
    name: str, params: Mapping[str, Any], count: int, least: int | None, total: int | None, where: str
) -> list[int]:
    """Cores (or nodes) for each of ``count`` elements on a pilot of ``total``.

    ``maximum-iters`` runs all at once, or in as few rounds as ``least`` cores an element allow, and shares all
    cores out in each round. ``split-into`` gives each the same part, whatever ``least`` says; params may have ``parts``
    (default: ``count``).
    """
    name = name.lower()
    if name not in ("maximum-iters", "split-into"):
        raise InvalidInput(f"{where}.name: {name!r} is unknown: use maximum-iters or split-into")
    if total is None:
        raise InvalidInput(f"{where}: a scheduler needs to know how many there are: use it with a running pilot")
    if name == "maximum-iters":
        least = least or 1
        if least > total:
            raise InvalidInput(f"{where}: min is {least}, but the pilot has {total}")
        return list(_rounds(count, total, -(-count // (total // least))))
    parts = params.get("parts", count)
    if isinstance(parts, str) and parts.strip().isdecimal():
        parts = int(parts)
    if not isinstance(parts, int) or isinstance(parts, bool) or parts < 1:
        raise InvalidInput(f"{where}.params.parts: must be a whole number from 1 on")
    if parts > total:
        raise InvalidInput(f"{where}: {total} in {parts} parts leave less than 1 for each")
    return [total // parts] * count


def _rounds(count: int, total: int, rounds: int) -> Iterator[int]:
    for left in range(rounds, 0, -1):
        here = -(-count // left)
        count -= here
        yield from _shares(here, total)


def _shares(count: int, total: int) -> Iterator[int]:
    for left in range(count, 0, -1):
        yield total // left
        total -= total // left
