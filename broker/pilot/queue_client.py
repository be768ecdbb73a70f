"""The supervisor's side of the broker: wishes, the journal, news of dead workers.

`poll` never waits for the server, so that a server that hangs delays nothing else. The other calls are rare, and wait
at most TALK_S; False or nothing means that the server is away, and that they should be made again.
"""

from __future__ import annotations

from typing import Any

import msgspec

from pilotq.broker.errors import ServerUnavailable
from pilotq.broker.pilot import rollback
from pilotq.broker.slurm.deadline import Deadline
from pilotq.broker.store import keys
from pilotq.broker.store.connection import Address, Link
from pilotq.broker.store.journal_writer import JournalWriter
from pilotq.broker.store.messages import Leave, NodeInfo, NodeLost, Nudge
from pilotq.broker.store.store import to_worker

POLL_S = 0.1
TALK_S = 0.5
_pack = msgspec.msgpack.encode


class SupervisorLink:
    """What was read last: ``wish``, how the pilot shall end, or empty; ``busy``, how many lanes are in use by the
    dispatcher's word (None: it has said nothing); ``lost``, whether the server holds another queue than ours, or none.
    """

    def __init__(self, address: Address, epoch: str, journal: JournalWriter) -> None:
        self.wish = ""
        self.busy: int | None = None
        self.lost = False
        self.online = True  # whether `nodes` could ask
        self.retired: set[str] = set()  # nodes whose workers end for good, as of then
        self._epoch = epoch.encode()
        self._journal = journal
        self._link = Link(address, timeout=TALK_S)
        self._talk = Link(address, timeout=TALK_S)
        self._replies: list[Any] = []
        self._next = 0.0

    def fileno(self) -> int | None:
        """Readable when `poll` has something to read; None while no answer is awaited."""
        return self._link.fileno() if self._link.outstanding else None

    def poll(self, now: float) -> None:
        """Read what has arrived, and each POLL_S ask again; ``now`` is monotonic."""
        if self.lost:
            return
        try:
            if self._link.outstanding:
                self._replies += self._link.replies()
                if self._link.outstanding:
                    return
                more = self._read(self._replies)
                self._next = now if more else now + POLL_S
            if now >= self._next:
                self._replies = []
                commands = self._journal.commands(now)
                self._link.post("HMGET", keys.WISH, "stop", "busy")
                self._link.post("GET", keys.EPOCH)
                self._link.post(*rollback.QUESTION)
                for command in commands:
                    self._link.post(*command)
        except ServerUnavailable:
            self._link.close()
            self._next = now + POLL_S

    def _read(self, replies: list[Any]) -> bool:
        wishes, epoch, stream, *rest = replies
        # While the server loads its data it answers everything with an error: that is no answer.
        if not isinstance(epoch, Exception) and (epoch != self._epoch or rollback.is_older(stream, self._journal)):
            self.lost = True
            return False
        if not isinstance(wishes, Exception):
            stop, busy = wishes
            self.wish = stop.decode() if stop else ""
            self.busy = int(busy) if busy is not None else None
        return self._journal.feed(rest)

    # -- rare calls -----------------------------------------------------------------------------------------------

    def pause(self) -> bool:
        """Nothing more is handed out."""
        return self._say([("HSET", keys.WISH, "paused", "1"), ("RPUSH", keys.MAIL, _pack(Nudge()))])

    def announce_loss(self, node: str, pid: int, why: str) -> bool:
        """Tell the dispatcher that a worker's process is dead, if it had registered."""
        try:
            announce_loss(self._talk, node, pid, why)
        except ServerUnavailable:
            return False
        return True

    def tell(self, deadline: Deadline) -> bool:
        """Let the dispatcher know when the allocation ends, if that is news; whether it knows all that we know."""
        command = deadline.news()
        if command is None:
            return True
        if not self._say([command]):
            return False
        deadline.told()
        return True

    def nodes(self) -> list[NodeInfo]:
        """All nodes that are registered; none, and ``online`` is false, while the server is away."""
        try:
            records, closed = self._talk.pipeline([("HVALS", keys.NODES), ("HGETALL", keys.CLOSED)])
        except ServerUnavailable:
            self.online = False
            return []
        self.online = True
        states = zip(closed[::2], closed[1::2], strict=True)
        self.retired = {name.decode() for name, state in states if state.startswith(b"retired")}
        return [msgspec.json.decode(record, type=NodeInfo) for record in records]

    def total(self) -> int | None:
        """How many tasks were ever submitted; None while the server is away."""
        try:
            return int(self._talk.call("HGET", keys.COUNTS, "total") or 0)
        except ServerUnavailable:
            return None

    def leave(self, nodes: list[NodeInfo], word: Leave) -> bool:
        """Tell workers to end."""
        return self._say([to_worker(n.name, n.incarnation, word) for n in nodes])

    def drain_journal(self, now: float) -> bool:
        """Move all that has ended to the journal and onto the disk; whether that was possible. `poll` asks no more."""
        if self.lost:
            return True  # what that server holds is not ours
        # Its answers may not come between ours.
        self._link.close()
        self._next = float("inf")
        try:
            return self._journal.drain(self._talk, now)
        except ServerUnavailable:
            return False

    def close(self) -> None:
        self._link.close()
        self._talk.close()

    def _say(self, commands: list[tuple[Any, ...]]) -> bool:
        try:
            self._talk.pipeline(commands)
        except ServerUnavailable:
            return False
        return True


def announce_loss(link: Link, node: str, pid: int, why: str) -> None:
    """Tell the dispatcher that the worker of this process number is dead, if it had registered."""
    record = link.call("HGET", keys.NODES, node)
    info = msgspec.json.decode(record, type=NodeInfo) if record else None
    if info is not None and info.pid == pid:
        link.call("RPUSH", keys.MAIL, _pack(NodeLost(node, info.incarnation, why)))
