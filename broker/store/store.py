"""Calls of the Lua scripts as typed methods, one for each transition, and the few plain writes beside them.

A script is a function of a library (`library.py`); a server that does not have that gets it. Answers that mean that the
queue is not ours any more become StateLost (another queue id) and Superseded (another dispatcher's term).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import datetime, timezone
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from pilotq.broker import failpoints
from pilotq.broker.errors import StateLost, Superseded
from pilotq.broker.settings import Settings
from pilotq.broker.store import keys, library
from pilotq.broker.store.connection import Argument, Connection, ReplyError, ScriptMissing

if TYPE_CHECKING:
    from pilotq.broker.store.messages import EndReport, RunEnd, ToWorker

pack = msgspec.msgpack.Encoder().encode
HEADS_SHOWN = 16  # ids of each class list that `heads` and `claim` return


def iso(seconds: float) -> str:
    """RQ's form of a time: ``2026-01-31T12:00:00.000000Z``."""
    whole = int(seconds)
    return f"{_to_second(whole)}.{int((seconds - whole) * 1e6):06d}Z"


@lru_cache(maxsize=64)
def _to_second(whole: int) -> str:
    return datetime.fromtimestamp(whole, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")


def from_iso(text: str) -> float | None:
    if not text:
        return None
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=timezone.utc).timestamp()


FIRST_REPORT = 10  # number of the argument of complete.lua that has the first journal line


def translate(error: ReplyError) -> Exception:
    """What an error of one of our scripts means to the caller."""
    if error.code == "QUEUE_ID":
        return StateLost("the server came back without the queue we knew: stop this pilot, and start it with --resume")
    if error.code == "TERM":
        return Superseded("another dispatcher has taken over this queue")
    return error


def to_worker(node: str, incarnation: int, message: ToWorker) -> tuple[Argument, ...]:
    """The command that puts a message into the inbox of a node."""
    return ("XADD", keys.inbox(node, incarnation), "*", "m", pack([message]))


class Head(NamedTuple):
    """What waits in one class list.

    ``length``: how many records; ``places``: of the first ones (ids of ours, for `order_of`); ``elements``: left in the
    first if it is an array.
    """

    length: int
    places: list[str]
    elements: int

    @property
    def waiting(self) -> int:
        return self.length - 1 + self.elements if self.elements else self.length


class ClaimTarget(NamedTuple):
    """Where a claim hands a task: to a slot of a node, or to the node without one."""

    node: str  # name:incarnation
    slot: int  # 0: prefetched
    allocation: str


def _counted(targets: Sequence[ClaimTarget]) -> list[tuple[str | int, ...]]:
    """The targets, those that follow each other and are alike once, with their number: prefetched tasks of a node."""
    found: list[tuple[str | int, ...]] = []
    for target, alike in groupby(targets):
        number = sum(1 for _ in alike)
        found.append((*target, number) if number > 1 else target)
    return found


def _head(reply: Any) -> Head:
    length, ids, elements = reply
    return Head(int(length), [i.decode() for i in ids], int(elements))


class Store:
    """Calls scripts over one connection, for one queue (``queue_id``).

    >>> Store(Connection(address), queue_id, settings).cancel(["1f"])
    ['canceled']
    """

    def __init__(self, link: Connection, queue_id: str, settings: Settings, *, term: int = 0) -> None:
        self.link = link
        self.queue_id = queue_id
        self.term = term
        self.settings = settings

    def command(self, name: str, *args: Argument) -> tuple[Argument, ...]:
        """The command that calls a script, for Connection.post."""
        return ("FCALL", library.library().function(name), 0, self.queue_id, *args)

    def run(self, name: str, *args: Argument) -> Any:
        return self.run_with((), name, *args)[0]

    def run_with(self, others: Sequence[tuple[Argument, ...]], name: str, *args: Argument) -> list[Any]:
        """The answer of a script, and behind it those of other commands that are sent with it: in one round trip."""
        commands = [self.command(name, *args), *others]
        failpoints.hit(f"{name}:before")
        try:
            try:
                answers = self.link.pipeline(commands)
            except ScriptMissing:
                library.load(self.link)
                answers = self.link.pipeline(commands)
        except ReplyError as error:
            raise translate(error) from None
        failpoints.hit(f"{name}:after")
        return answers

    def write(self, *command: Argument) -> Any:
        """A plain command that goes through though the memory is full."""
        return self.run("guarded_write", *command)

    # -- clients ------------------------------------------------------------------------------------------------

    def commit(
        self, key: str, first: int, records: int, total: int, work: dict[str, Any], what: str = "whole",
        carried: Sequence[Argument] = (),
    ) -> list[Any]:  # fmt: skip
        """``what``: whole, check, accept or rest; ``carried``: the records, if they are not staged. See commit.lua."""
        now = time.time()
        answer: list[Any] = self.run(
            "commit", key, f"{now:.6f}", iso(now), first, records, total, self.settings.failed_ttl_s, pack(work),
            what, *carried,
        )  # fmt: skip
        return answer

    def cancel(self, ids: Sequence[str], *, waiting: bool = False, reason: str = "canceled") -> list[str]:
        """The answers for all ids, in as many calls as that is work for; ``waiting``: what has begun goes on, and what
        waits is canceled for this reason."""
        answers: list[str] = []
        while True:
            now, rest = time.time(), ids[len(answers) :]
            found = self.run(
                "cancel", f"{now:.6f}", iso(now), self.settings.failed_ttl_s, reason if waiting else "", *rest
            )
            answers += (answer.decode() for answer in found)
            if len(answers) == len(ids):
                return answers

    def requeue(self, items: Sequence[Sequence[Any]], *outcomes: bytes) -> list[str]:
        """Have ended tasks run again; each item is [id], or a whole array as requeue.lua says."""
        answers: list[str] = []
        while True:
            now, rest = time.time(), items[len(answers) :]
            answers += (a.decode() for a in self.run("requeue", f"{now:.6f}", iso(now), pack(rest), *outcomes))
            if len(answers) == len(items):
                return answers

    # -- dispatcher ---------------------------------------------------------------------------------------------

    def take_term(self) -> int:
        """Become the dispatcher: claims of any earlier one are refused from now on."""
        self.term = int(self.write("INCR", keys.TERM))
        return self.term

    def heads(self, classes: Sequence[str]) -> list[Head]:
        return [_head(r[1:]) for r in self.run("heads", self.term, HEADS_SHOWN, 0, *classes)] if classes else []

    def changed_heads(self, limit: int) -> dict[str, Head]:
        """The heads of at most so many classes whose lists have got something, by class; each is told once."""
        return self.read_changed_heads(self.run("heads", self.term, HEADS_SHOWN, limit))

    def changed_heads_command(self, limit: int) -> tuple[Argument, ...]:
        """The command of `changed_heads`, to be sent with others; its reply goes to `read_changed_heads`."""
        return self.command("heads", self.term, HEADS_SHOWN, limit)

    def read_changed_heads(self, reply: Any) -> dict[str, Head]:
        return {r[0].decode(): _head(r[1:]) for r in reply}

    def claim(self, groups: Sequence[tuple[str, Sequence[ClaimTarget]]]) -> list[tuple[int, Head]]:
        """Hand out heads of class lists to targets, in order; returns the number filled and the head of each class."""
        now = time.time()
        packed = pack([(name, _counted(targets)) for name, targets in groups])
        answer = self.run("claim", self.term, f"{now:.6f}", iso(now), HEADS_SHOWN, self.settings.failed_ttl_s, packed)
        return [(int(r[0]), _head(r[1:])) for r in answer]

    def release_dependents(self, limit: int, *others: tuple[Argument, ...]) -> tuple[int, int, list[Any]]:
        """How many were handled, and entries are left; the replies to ``others``, commands that are sent behind it."""
        now, s = time.time(), self.settings
        (handled, left, unwanted), *replies = self.run_with(
            others, "release_dependents", self.term, f"{now:.6f}", iso(now), limit, s.failed_ttl_s, s.finished_ttl_s
        )
        for task_id, children in zip(unwanted[::2], unwanted[1::2], strict=True):
            self.cancel([child.decode() for child in children])
            name = keys.children(task_id.decode())
            self.link.pipeline([("LREM", name, 1, child) for child in children])
        return int(handled), int(left), replies

    def report_lost(self, reports: Sequence[EndReport]) -> list[str]:
        """End executions that no worker reports; what reports leave empty is read from the records."""
        return [v.decode() for v in self.run("complete", *self.complete_arguments("", 0, b"", reports))]

    def count_vanished(self, queues: Sequence[str]) -> int:
        """Count tasks as canceled whose records were deleted, when nothing is left that waits or runs.

        Returns their number. What has changed in class lists must not be read meanwhile.
        """
        stage, cursor = b"classes", b"0"
        while stage:
            number, stage, cursor = self.run(
                "count_vanished", self.term, self.settings.failed_ttl_s, stage, cursor, *queues
            )
        return int(number)

    # -- workers ------------------------------------------------------------------------------------------------

    def complete_arguments(
        self, node: str, call: int, message: bytes, reports: Sequence[EndReport], runs: Sequence[RunEnd] = ()
    ) -> list[Argument]:
        """ARGV of complete.lua after the queue id; ``message`` is for the dispatcher, ``call`` its number."""
        s = self.settings
        rows, specs = [], []
        behind = FIRST_REPORT + 2 * len(reports) + 1 + 2 * len(runs)  # the place of the specs among the arguments
        for r in reports:
            row: tuple[str | int | float, ...] = (
                r.id, r.execution, r.outcome, r.reason, r.ended, r.exit, r.started, r.allocation, r.array, r.position,
                r.class_name, r.submission, r.retries, r.delay,
            )  # fmt: skip
            if r.next_class:
                specs += [r.next_spec] if r.next_spec else []
                row += (r.next_class, behind + len(specs) - 1 if r.next_spec else 0)
            rows.append(row)
        now = f"{time.time():.6f}"
        head: list[Argument] = [
            node, call, message, now, s.finished_ttl_s, s.failed_ttl_s, s.crash_limit, pack(rows)
        ]  # fmt: skip
        for report in reports:
            head += (report.entry, report.text)
        head.append(pack([run[:-2] for run in runs]))
        for run in runs:
            head += (run.lines, run.values)
        return head + specs
