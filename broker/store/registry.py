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
    """The nodes of these records (the reply to HVALS or HMGET of ``keys.NODES``); None stands for no node.

    A record that is damaged is left out: its worker writes it again with its next heartbeat.
    """
    decoded = (_node_of(record) for record in records if record)
    return [node for node in decoded if node is not None]


def _node_of(record: bytes) -> NodeInfo | None:
    try:
        return _decode_node(record)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def read_nodes(connection: Connection) -> list[NodeInfo]:
    """All nodes that are registered, and whose records can be read."""
    return [node for node in _registered(connection).values() if node is not None]


def damaged_nodes(connection: Connection) -> list[str]:
    """The names of registered nodes whose records cannot be read."""
    return [name for name, node in _registered(connection).items() if node is None]


def registered_nodes(connection: Connection) -> tuple[list[NodeInfo], set[str]]:
    """All nodes that are registered, and the names of those whose records cannot be read, or are gone.

    Of these all is unknown but the name and the incarnation, which the worker's own record has, too: they have no
    cores. One without a record of its worker has been silent for long, and is left out.
    """
    nodes = _registered(connection)
    found = [node for node in nodes.values() if node is not None]
    workers = {
        key.decode("utf-8", "replace").removeprefix(keys.worker(""))
        for key in connection.call("SMEMBERS", keys.WORKERS)
    }
    unknown = sorted((workers | set(nodes)) - {node.name for node in found})
    incarnations = (
        connection.pipeline([("HGET", keys.worker(name), "pq_incarnation") for name in unknown]) if unknown else []
    )
    for name, incarnation in zip(unknown, incarnations, strict=True):
        if incarnation is not None and incarnation.isdigit():
            found.append(NodeInfo(name, int(incarnation), "", 0, []))
    return found, {node.name for node in found if not node.cores}


def _registered(connection: Connection) -> dict[str, NodeInfo | None]:
    """name -> node; None where the record is damaged, or that of another node."""
    flat = connection.call("HGETALL", keys.NODES)
    found: dict[str, NodeInfo | None] = {}
    for field, record in zip(flat[::2], flat[1::2], strict=True):
        name, node = field.decode("utf-8", "replace"), _node_of(record)
        found[name] = node if node is not None and node.name == name else None
    return found


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
