"""The supervisor's client of the queue: reads the control record and the journal stream, announces dead workers.

`poll` never waits for the server, so that a server that hangs delays nothing else. The other calls are rare, and wait
at most REPLY_S; False or nothing means that the server is away, and that the call should be repeated.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from pilotq.broker.errors import ServerUnavailable
from pilotq.broker.pilot import rollback
from pilotq.broker.slurm.deadline import Deadline
from pilotq.broker.store import keys
from pilotq.broker.store.connection import Address, Connection
from pilotq.broker.store.journal_writer import JournalWriter
from pilotq.broker.store.messages import ControlChanged, Leave, NodeLost
from pilotq.broker.store.registry import decode_nodes, read_node
from pilotq.broker.store.resources import NodeInfo
from pilotq.broker.store.store import to_worker

POLL_S = 0.1
REPLY_S = 0.5
_pack = msgspec.msgpack.encode


class QueueClient:
    """A client of the queue that holds what it read last.

    ``stop_mode``: how the pilot is to end, or empty. ``busy``: how many slots are in use, as the dispatcher reports it
    (None: it has not yet). ``lost``: whether the server holds another queue than ours, or none.
    """

    def __init__(self, address: Address, queue_id: str, journal: JournalWriter) -> None:
        self.stop_mode = ""
        self.busy: int | None = None
        self.lost = False
        self.online = True  # whether the last `nodes` had an answer
        self.retired: set[str] = set()  # nodes whose workers end for good, as of then
        self.left: set[str] = set()  # nodes whose workers have ended so, and that were resumed since
        self._queue_id = queue_id.encode()
        self._journal = journal
        self._poll_connection = Connection(address, timeout=REPLY_S)
        self._call_connection = Connection(address, timeout=REPLY_S)
        self._replies: list[Any] = []
        self._poll_at = 0.0

    def fileno(self) -> int | None:
        """Readable when `poll` has something to read; None while no answer is awaited."""
        return self._poll_connection.fileno() if self._poll_connection.outstanding else None

    def poll(self, now: float) -> None:
        """Read what has arrived, and each POLL_S ask again; ``now`` is monotonic."""
        if self.lost:
            return
        try:
            if self._poll_connection.outstanding:
                self._replies += self._poll_connection.replies()
                if self._poll_connection.outstanding:
                    return
                more = self._read(self._replies)
                self._poll_at = now if more else now + POLL_S
            if now >= self._poll_at:
                self._replies = []
                commands = self._journal.commands(now)
                self._poll_connection.post("HGET", keys.CONTROL, "stop")
                self._poll_connection.post("HGET", keys.STATUS, "busy")
                self._poll_connection.post("GET", keys.QUEUE_ID)
                self._poll_connection.post(*rollback.STREAM_QUERY)
                for command in commands:
                    self._poll_connection.post(*command)
        except ServerUnavailable:
            self._poll_connection.close()
            self._poll_at = now + POLL_S

    def _read(self, replies: list[Any]) -> bool:
        stop, busy, queue_id, stream, *rest = replies
        # While the server loads its data it answers everything with an error: that is no answer.
        if not isinstance(queue_id, Exception):
            self.lost = queue_id != self._queue_id or rollback.is_rolled_back(stream, self._journal)
            if self.lost:
                return False
        if not isinstance(stop, Exception):
            self.stop_mode = stop.decode() if stop else ""
            self.busy = int(busy) if busy is not None and not isinstance(busy, Exception) else None
        return self._journal.feed(rest)

    # -- rare calls -----------------------------------------------------------------------------------------------

    def pause(self) -> bool:
        """Have the dispatcher start nothing more."""
        return self._send([("HSET", keys.CONTROL, "paused", "1"), ("RPUSH", keys.EVENTS, _pack(ControlChanged()))])

    def announce_loss(self, node: str, pid: int, why: str) -> bool:
        """Tell the dispatcher that a worker's process is dead, if it had registered."""
        try:
            announce_loss(self._call_connection, node, pid, why)
        except ServerUnavailable:
            return False
        return True

    def expect_no_more(self, nodes: Iterable[str]) -> bool:
        """Let nobody wait for these nodes: what needs them can never run here."""
        return self._send([("LREM", keys.EXPECTED_NODES, 0, node) for node in nodes])

    def report_end(self, deadline: Deadline) -> bool:
        """Report the end of the allocation to the dispatcher, if that has changed; whether it is up to date."""
        command = deadline.pending_update()
        if command is None:
            return True
        if not self._send([command]):
            return False
        deadline.mark_sent()
        return True

    def nodes(self) -> list[NodeInfo]:
        """All nodes that are registered; none, and ``online`` is false, while the server is away."""
        try:
            records, closed, leaving = self._call_connection.pipeline(
                [("HVALS", keys.NODES), ("HGETALL", keys.DRAINED), ("SMEMBERS", keys.LEAVING)]
            )
        except ServerUnavailable:
            self.online = False
            return []
        self.online = True
        states = zip(closed[::2], closed[1::2], strict=True)
        self.retired = {name.decode() for name, state in states if state.startswith(b"retired")}
        nodes = decode_nodes(records)
        self.left = {name.decode() for name in leaving} - self.retired - {node.name for node in nodes}
        return nodes

    def total(self) -> int | None:
        """How many tasks were ever submitted; None while the server is away."""
        try:
            return int(self._call_connection.call("HGET", keys.COUNTS, "total") or 0)
        except ServerUnavailable:
            return None

    def leave(self, nodes: list[NodeInfo], message: Leave) -> bool:
        """Send workers the message to end."""
        return self._send([to_worker(n.name, n.incarnation, message) for n in nodes])

    def drain_journal(self, now: float) -> bool:
        """Move all that has ended to the journal and onto the disk; whether that was possible. Ends `poll`."""
        if self.lost:
            return True  # what that server holds is not ours
        # Replies to `poll` must not arrive between those to this.
        self._poll_connection.close()
        self._poll_at = float("inf")
        try:
            return self._journal.drain(self._call_connection, now)
        except ServerUnavailable:
            return False

    def close(self) -> None:
        self._poll_connection.close()
        self._call_connection.close()

    def _send(self, commands: list[tuple[Any, ...]]) -> bool:
        try:
            self._call_connection.pipeline(commands)
        except ServerUnavailable:
            return False
        return True


def announce_loss(connection: Connection, node: str, pid: int, why: str) -> None:
    """Tell the dispatcher that the worker with this process number is dead, if it had registered."""
    info = read_node(connection, node)
    if info is not None and info.pid == pid:
        connection.call("RPUSH", keys.EVENTS, _pack(NodeLost(node, info.incarnation, why)))
