"""The one reader of what Redis holds of nodes and classes: records, and the states of nodes that get no new tasks."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from pilotq.broker.store import keys
from pilotq.broker.store.connection import Connection
from pilotq.broker.store.resources import NodeInfo

DRAINED, RETIRED, QUARANTINED = "drained", "retired", "quarantined"
_decode_node = msgspec.json.Decoder(NodeInfo).decode


def decode_nodes(records: Iterable[bytes | None]) -> list[NodeInfo]:
    """The nodes of these records (the reply to HVALS or HMGET of ``keys.NODES``); None stands for no node."""
    return [_decode_node(record) for record in records if record]


def read_nodes(connection: Connection) -> list[NodeInfo]:
    """All nodes that are registered."""
    return decode_nodes(connection.call("HVALS", keys.NODES))


def nodes_and_missing(connection: Connection) -> tuple[list[NodeInfo], set[str]]:
    """All nodes that are registered, and the names of those that are still to join: they start, or start again."""
    records, expected = connection.pipeline([("HVALS", keys.NODES), ("LRANGE", keys.EXPECTED_NODES, 0, -1)])
    nodes = decode_nodes(records)
    return nodes, {name.decode() for name in expected} - {node.name for node in nodes}


def read_node(connection: Connection, name: str) -> NodeInfo | None:
    """The node with this name, None if none is registered."""
    return next(iter(decode_nodes([connection.call("HGET", keys.NODES, name)])), None)


def user_queues(connection: Connection) -> list[str]:
    """The queues of users: RQ's list of queues without the class lists."""
    members = [name.decode("utf-8", "replace") for name in connection.call("SMEMBERS", keys.QUEUES)]
    # RQ's own names are UTF-8: what somebody else has put there is no queue.
    names = [name.removeprefix(keys.queue("")) for name in members if "\ufffd" not in name]
    classes = connection.call("HMGET", keys.CLASSES, *names) if names else []
    return sorted(name for name, found in zip(names, classes, strict=True) if found is None)


def unavailable_nodes(connection: Connection) -> dict[str, str]:
    """node -> "state reason"; what the user has said comes first."""
    user, dispatcher = (
        decode_texts(flat) for flat in connection.pipeline([("HGETALL", keys.DRAINED), ("HGETALL", keys.QUARANTINE)])
    )
    return {name: f"{QUARANTINED} {why}" for name, why in dispatcher.items()} | user


def decode_texts(flat: list[bytes]) -> dict[str, str]:
    """A hash, as the server gives it."""
    return {
        k.decode("utf-8", "replace"): text.decode("utf-8", "replace")
        for k, text in zip(flat[::2], flat[1::2], strict=True)
    }
