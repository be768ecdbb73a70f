"""Reads bundles: records, stored as those of arrays, whose elements have each a name and a description of their own.

>>> bundles.member("1f", 7).name
'fit-7'
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator

from pilotq.broker.errors import PilotFailed
from pilotq.broker.os_strings import UNREADABLE
from pilotq.broker.store import keys
from pilotq.broker.store.connection import Connection
from pilotq.broker.store.value_blocks import BLOCK, read_block
from pilotq.broker.tasks.spec import Member, read_member

KEPT_BLOCKS, KEPT_ARRAYS = 16, 10_000


class Bundles:
    """Reads over ``link``; a few blocks are kept, and which arrays are bundles."""

    def __init__(self, link: Connection) -> None:
        self._link = link
        self._blocks: OrderedDict[tuple[str, int], list[bytes]] = OrderedDict()
        self._known: dict[str, bool] = {}

    def learn(self, arrays: Iterable[str]) -> None:
        """Ask in one round trip which of these are bundles."""
        new = [array for array in dict.fromkeys(arrays) if array not in self._known]
        if len(self._known) + len(new) > KEPT_ARRAYS:
            self._known.clear()
        for array, (mark, status) in zip(
            new, self._link.read_hashes([keys.job(array) for array in new], "pq_bundle", "status"), strict=True
        ):
            if status is not None:
                self._known[array] = mark is not None

    def is_bundle(self, array: str) -> bool:
        """False also where the record is gone."""
        self.learn([array])
        return self._known.get(array, False)

    def member(self, array: str, position: int) -> Member | None:
        """One task of a bundle; None of what is none, is gone or damaged: others can write there, too."""
        if not self.is_bundle(array):
            return None
        try:
            return read_member(self._block(array, position // BLOCK)[position % BLOCK])
        except (PilotFailed, IndexError, *UNREADABLE):
            return None

    def names(self, bundle: str) -> Iterator[tuple[str, str]]:
        """(id, name) of each task of a bundle that has a name."""
        for number in sorted(map(int, self._link.call("HKEYS", keys.values(bundle)))):
            for position in range(number * BLOCK, (number + 1) * BLOCK):
                member = self.member(bundle, position)
                if member is not None and member.name:
                    yield f"{bundle}_{position}", member.name

    def _block(self, bundle: str, number: int) -> list[bytes]:
        place = bundle, number
        if place not in self._blocks:
            self._blocks[place] = read_block(bundle, self._link.call("HGET", keys.values(bundle), number))
            while len(self._blocks) > KEPT_BLOCKS:
                self._blocks.popitem(last=False)
        return self._blocks[place]
