"""Running again what ended and did not finish: tasks one by one, arrays as a whole, or some of their elements."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from pilotq.broker.store import keys
from pilotq.broker.store.store import Store
from pilotq.broker.tasks.states import ENDED

BITS = 5  # the argument of retry.lua that has the bits as they are to be
SLICE = 500  # tasks in one script call
ATTEMPTS = 5  # the bits of an array may change between the read and the script
# Two bits an element (keys.bits): failed and canceled become "not ended", finished stays.
_AGAIN = bytes(sum((1 << s) * ((byte >> s) & 3 == 1) for s in (0, 2, 4, 6)) for byte in range(256))


class _Bits(NamedTuple):
    """The outcomes of an array's elements, and what a retry of them all makes of it."""

    old: bytes
    start: int
    step: int
    size: int

    def positions(self, outcomes: tuple[int, ...]) -> Iterator[int]:
        """Of the elements with one of these outcomes."""
        for place, byte in enumerate(self.old):
            if byte not in (0x00, 0x55):
                for number in range(4):
                    if (byte >> (6 - 2 * number)) & 3 in outcomes and 4 * place + number < self.size:
                        yield 4 * place + number

    def number_of(self, outcome: int) -> int:
        """How many elements have it."""
        of_byte = bytes(sum((byte >> s) & 3 == outcome for s in (0, 2, 4, 6)) for byte in range(256))
        return sum(self.old.translate(of_byte))

    def element(self, array: str, position: int) -> str:
        return f"{array}_{self.start + position * self.step}"


def retry(store: Store, ids: Sequence[str]) -> dict[str, str]:
    """id -> answer, as `Broker.retry` says. In the order given: a parent comes before what depends on it."""
    answers: dict[str, str] = {}
    plain: list[str] = []

    def flush() -> None:
        answers.update(_in_slices(store, plain))
        plain.clear()

    for task_id, status in zip(ids, _array_statuses(store, ids), strict=True):
        if status is None:
            plain.append(task_id)
            continue
        flush()  # what stands before it may be what it depends on
        answers[task_id] = _array(store, task_id)
    flush()
    return answers


def _array_statuses(store: Store, ids: Sequence[str]) -> Iterator[str | None]:
    """The status of each array, None for what is none."""
    for first in range(0, len(ids), SLICE):
        part = ids[first : first + SLICE]
        for array, status in store.link.pipeline([("HMGET", keys.job(i), "pq_array", "status") for i in part]):
            yield status.decode() if array and status else None


def _in_slices(store: Store, ids: Sequence[str]) -> Iterator[tuple[str, str]]:
    for first in range(0, len(ids), SLICE):
        part = ids[first : first + SLICE]
        yield from zip(part, store.retry([[task_id] for task_id in part]), strict=True)


def _array(store: Store, array: str) -> str:
    """Run again what did not finish of an array, whether it has ended or not."""
    answer = "changed"
    for _ in range(ATTEMPTS):
        row, old = store.link.pipeline([("HMGET", keys.job(array), "pq_array", "status"), ("GET", keys.bits(array))])
        if row[0] is None:
            return "unknown"
        bits, status = _Bits(old or b"", *map(int, row[0].split(b":"))), row[1].decode()
        if status not in ENDED and bits.number_of(2) + bits.number_of(3):
            return _elements(store, (bits.element(array, p) for p in bits.positions((2, 3))))
        (answer,) = store.retry([_whole(store, array, bits)], bits.old.translate(_AGAIN))
        if answer != "changed":
            return answer
    return answer


def _whole(store: Store, array: str, bits: _Bits) -> list[Any]:
    """The argument of retry.lua for an array that has ended."""
    first = next(bits.positions((2, 3)), bits.size)
    candidates = [bits.element(array, p) for p in bits.positions((2,))]
    there = store.link.pipeline([("EXISTS", keys.job(i)) for i in candidates]) if candidates else []
    with_record = [i for i, found in zip(candidates, there, strict=True) if found]
    digest = hashlib.sha1(bits.old, usedforsecurity=False).hexdigest()
    return [array, digest, BITS, bits.number_of(2), bits.number_of(3), first, with_record]


def _elements(store: Store, ids: Iterable[str]) -> str:
    """Some elements of an array that has not ended run again; the best of the answers."""
    answers = {answer for _, answer in _in_slices(store, list(ids))}
    return next((word for word in ("queued", "deferred") if word in answers), min(answers))
