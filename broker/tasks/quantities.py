"""Parsers of sizes, durations, spans and resource requests, as files and the command line write them. Pure.

Every function raises InvalidInput with a sentence that fits after "where: ".
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec

from pilotq.broker.errors import InvalidInput
from pilotq.broker.tasks.model import COUNTER, Request

# No number below has more than 15 digits: larger ones are mistakes, and would not fit into a record.
_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,15})?) ?([KMGTP]?)(?:i?B)?", re.IGNORECASE)
MEMORY_POLICIES = ("limit", "watch", "reserve")  # how the memory that tasks ask for is enforced
SIZE_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")
LEAST_MEMORY = 1 << 20  # a request for fewer bytes, without a unit, is a mistake: no process needs so little
_UNITS = re.compile(r"(?:([0-9]{1,9})d)?(?:([0-9]{1,9})h)?(?:([0-9]{1,9})m)?(?:([0-9]{1,9}(?:\.[0-9]{1,9})?)s?)?", re.I)
_CLOCK = re.compile(r"(?:([0-9]{1,9}):)?([0-9]{1,9}):([0-9]{2}(?:\.[0-9]{1,9})?)")
_SLURM = re.compile(r"([0-9]{1,9})-([0-9]{1,9})(?::([0-9]{2})(?::([0-9]{2}))?)?")
_NUMBER = re.compile(r"-?[0-9]{1,9}(\.[0-9]{1,9})?")
_SPAN = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")


def parse_size(text: str) -> int:
    """``512M`` -> bytes. K, M, G, T and P are powers of 1024, with or without ``B`` or ``iB``; no unit means bytes."""
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise InvalidInput(f"{text!r} is no size: write a number of bytes, or a number with K, M, G or T, such as 512M")
    number, unit = match.groups()
    return int(float(number) * 1024.0 ** " KMGTP".index(unit.upper() or " "))


def size_text(size: int) -> str:
    """A number of bytes for people, with three digits and the units of `parse_size`.

    >>> size_text(2254857830)
    '2.1 GiB'
    """
    number, unit = float(size), 0
    while number >= 999.5 and unit < len(SIZE_UNITS) - 1:
        number, unit = number / 1024, unit + 1
    return f"{number:.3g} {SIZE_UNITS[unit]}"


def parse_duration(text: str) -> float:
    """``90``, ``1.5``, ``1m30s``, ``2d``, ``1:30`` (minutes and seconds), ``1:30:00`` -> seconds.

    With days as Slurm has them: ``2-12`` (hours), ``2-12:30`` (hours and minutes), ``2-12:30:00``.
    """
    text = text.strip()
    if slurm := _SLURM.fullmatch(text):
        days, hours, minutes, seconds = (int(part or 0) for part in slurm.groups())
        return float(days * 86_400 + hours * 3600 + minutes * 60 + seconds)
    if clock := _CLOCK.fullmatch(text):
        return int(clock[1] or 0) * 3600 + int(clock[2]) * 60 + float(clock[3])
    units = _UNITS.fullmatch(text)
    if not text or not units:
        raise InvalidInput(
            f"{text!r} is no duration: write seconds (90), units (1h30m) or a clock (1:30:00, 2-00:00:00)"
        )
    day, hour, minute, second = (float(part or 0) for part in units.groups())
    return day * 86_400 + hour * 3600 + minute * 60 + second


def parse_span(text: str) -> tuple[int, int]:
    """``4`` -> (4, 4) and ``2-4`` -> (2, 4); at least 1, and the first not above the second."""
    match = _SPAN.fullmatch(text.strip())
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= low <= high:
        raise InvalidInput(f"{text!r} is no number or range of numbers from 1 on: write 4 or 2-4")
    return low, high


def parse_gpus(text: str) -> tuple[float, str]:
    """``2`` -> (2, ""), ``0.25`` -> (0.25, ""), ``A100:2`` -> (2, "a100"), ``a100-80gb`` -> (1, "a100_80gb").

    A kind is words of the model, in any case and with anything between.
    """
    kind, colon, number = text.strip().rpartition(":")
    if not colon and not _NUMBER.fullmatch(number):
        kind, number = number, "1"
    words = re.findall(r"[a-z0-9]+", kind.lower())
    if not text.strip() or not _NUMBER.fullmatch(number) or ((kind or colon) and not words):
        raise InvalidInput(f"gpus: {text!r} is no number of GPUs: write 2, or 0.25 for a share of one, or a100:2")
    return (float(number) if "." in number else int(number)), "_".join(words)


def request_of(
    base: Request,
    *,
    cores: int | str | None = None,
    nodes: int | str | None = None,
    gpus: float | str | None = None,
    memory: int | str | None = None,
    use: Mapping[str, int] | None = None,
    numa: str | None = None,
) -> Request:
    """``base`` with what is given replaced. ``nodes`` without any ``cores`` asks for entire nodes.

    A ``memory`` below 1 MiB needs a unit. The text of an InvalidInput starts with the name of the argument.
    """
    changes: dict[str, object] = {}
    if cores is not None:
        changes |= {"cores": _named("cores", cores), "whole": False, "spread": False}
    if nodes is not None:
        changes |= {"nodes": _named("nodes", nodes), "spread": False}
        if cores is None and base == Request():
            changes |= {"whole": True}
    if gpus is not None:
        changes["gpus"], changes["gpu_kind"] = parse_gpus(gpus) if isinstance(gpus, str) else (gpus, "")
    if memory is not None:
        try:
            changes["memory"] = _memory(memory)
        except InvalidInput as error:
            raise InvalidInput(f"memory: {error}") from None
    if use is not None:
        for name in use:
            if not COUNTER.fullmatch(name):
                raise InvalidInput(f"use: {name!r} is no name of a counter: use letters, digits and _")
        changes["use"] = tuple(sorted((name, count) for name, count in use.items() if count))
    if numa is not None:
        changes["numa"] = numa
    return msgspec.structs.replace(base, **changes)


def _memory(value: int | str) -> int:
    size = parse_size(value) if isinstance(value, str) else value
    bare = value.strip() if isinstance(value, str) else str(value)
    if bare.isdecimal() and 0 < size < LEAST_MEMORY:
        raise InvalidInput(f"{bare} without a unit would be {bare} bytes: write {bare}M, or {bare}G")
    return size


def _named(name: str, value: int | str) -> tuple[int, int]:
    try:
        return parse_span(value if isinstance(value, str) else str(value))
    except InvalidInput as error:
        raise InvalidInput(f"{name}: {error}") from None
