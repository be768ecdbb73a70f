"""`Completions`: how the tasks of one executor have ended, as the server tells it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from pilotq.broker.client.results import Ended, Outcome, OutputFiles, fetch
from pilotq.broker.store import keys
from pilotq.broker.store.connection import Argument, Connection
from pilotq.broker.tasks.array_outcomes import OUTCOMES, outcome_at
from pilotq.broker.tasks.states import ENDED

WAIT_MS = 1000  # how long one read waits for the first entry
READ_MAX = 8  # entries that are read at once: each holds the ends of one call of a worker, at most some megabytes
SLICE = 500
LEFT_S = 60  # an entry that nobody reads any more goes after so many seconds
_decode = msgspec.msgpack.Decoder(list[Ended]).decode
_decode_runs = msgspec.msgpack.Decoder(list[tuple[str, int, list[bytes]]]).decode


class Place(NamedTuple):
    """A place in a stream, as the server's ids name them."""

    milliseconds: int
    number: int


START = Place(0, 0)


class Completions:
    """Reads the stream of one executor. What was read is removed with the next read: a lost reply loses nothing.

    Not for several threads, but for `wake`.
    """

    def __init__(self, link: Connection, name: str) -> None:
        self._link = link
        self._key = keys.completed(name)
        self._read = START  # so far everything was read
        self._removed = START
        self._missed: list[tuple[str, Outcome]] = []  # known from the record, and not told yet
        self._missed_after = START  # what is not told by then is not in the stream

    def read(self) -> list[Ended]:
        """What has ended since; waits for the first one, for a second at most."""
        commands: list[tuple[Argument, ...]] = []
        if self._read > self._removed:
            first = f"{self._read.milliseconds}-{self._read.number + 1}"
            commands.append(("XTRIM", self._key, "MINID", first))
        last = f"{self._read.milliseconds}-{self._read.number}"
        commands.append(("XREAD", "COUNT", READ_MAX, "BLOCK", WAIT_MS, "STREAMS", self._key, last))
        reply = self._link.pipeline(commands)[-1]
        self._removed = self._read
        ends: list[Ended] = []
        for entry, fields in reply[0][1] if reply else ():
            if fields[0] == b"ends":
                ends += _decode(fields[1])
            else:
                for bundle, place, values in _decode_runs(fields[1]):
                    ends += [Ended(f"{bundle}_{n}", "finished", "", "", one) for n, one in enumerate(values, place)]
            self._read = _place(entry)
        return ends

    def poll(self, ids: Sequence[str], files: OutputFiles) -> None:
        """Look at the records of tasks: what has ended, or is gone, and is not in the stream, was missed."""
        if self._missed:
            return  # of the last time: the stream is long
        ended = self._ended_of_bundles([task_id for task_id in ids if "_" in task_id])
        alone = [task_id for task_id in ids if "_" not in task_id]
        for first in range(0, len(alone), SLICE):
            part = alone[first : first + SLICE]
            statuses = self._link.pipeline([("HGET", keys.job(task_id), "status") for task_id in part])
            ended += [i for i, s in zip(part, statuses, strict=True) if s is None or s.decode() in ENDED]
        found = fetch(self._link, ended[:SLICE], files)
        self._missed = [(i, o) for i, o in zip(ended, found, strict=False) if o is not None]
        # All that ended before is in the stream by now, or was never told.
        newest = self._link.call("XREVRANGE", self._key, "+", "-", "COUNT", 1)
        self._missed_after = _place(newest[0][0]) if newest else START

    def _ended_of_bundles(self, ids: Sequence[str]) -> list[str]:
        """Those of these that have ended, or whose bundle is gone: most of them have no record while they are open."""
        bundles = list(dict.fromkeys(task_id.partition("_")[0] for task_id in ids))
        commands = [(("HGET", keys.job(bundle), "status"), ("GET", keys.outcomes(bundle))) for bundle in bundles]
        replies = self._link.pipeline([command for pair in commands for command in pair]) if commands else []
        # One whose record was damaged ends as a whole, without an outcome of each.
        over = {b: s is None or s.decode(errors="replace") in ENDED for b, s in zip(bundles, replies[::2], strict=True)}
        outcomes = dict(zip(bundles, (reply or b"" for reply in replies[1::2]), strict=True))
        found = []
        for task_id in ids:
            bundle, _, position = task_id.partition("_")
            if over[bundle] or outcome_at(outcomes[bundle], int(position), 0) != OUTCOMES[0]:
                found.append(task_id)
        return found

    def missed(self) -> list[tuple[str, Outcome]]:
        """What the last poll has found, as soon as the stream is read so far that it cannot be there."""
        if self._read < self._missed_after:
            return []
        missed, self._missed = self._missed, []
        return missed

    def wake(self, link: Connection) -> None:
        """End a wait of `read`, from another thread over another connection."""
        entry = ("XADD", self._key, "*", "ends", msgspec.msgpack.encode([]))
        link.pipeline([entry, ("EXPIRE", self._key, LEFT_S)])  # the reader may have removed it already

    def remove(self) -> None:
        self._link.call("DEL", self._key)


def _place(entry: bytes) -> Place:
    return Place(*map(int, entry.split(b"-")))
